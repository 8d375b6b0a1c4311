"""A short form of the permutation test; the long one is ``python -m tests.mmu.access --count 1000000``."""

from __future__ import annotations

import dataclasses

import pytest

from tests.mmu import reference
from tests.mmu.access import GUESTS, AccessGuest, run

COUNT = {"tdp": 12_000, "shadow": 4_000}


@pytest.mark.parametrize(("width", "level"), GUESTS)
@pytest.mark.spec(
    "mmu.correctness",
    "mmu.levels",
    "mmu.fault_injection",
    "mmu.ad_bits",
    "mmu.walk_addr",
    "mmu.cr0_wp_emul",
    "mmu.role.smep_smap",
    "mmu.role.nxe",
    "mmu.role.cr0_wp",
    "mmu.gbpages",
    "mmu.pse36",
    "cpu.wp",
    "cpu.nx_smep_smap",
    "cpu.reserved_bits",
    "cpu.pf_error_code",
    "cpu.large_pages",
)
def test_permutations_of_entries_registers_and_accesses(mode: str, width: int, level: int) -> None:
    guest = AccessGuest(width=width, tdp=mode == "tdp", level=level)
    try:
        assert run(guest, COUNT[mode], seed=width + level) >= COUNT[mode]
        assert guest.vm.mmu.audit() == []
    finally:
        guest.close()


def test_the_comparison_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a reference that knows no SMEP the test fails."""
    allowed = reference._allowed

    def without_smep(cpu: reference.Cpu, entries: list[int], access: reference.Access) -> bool:
        return allowed(dataclasses.replace(cpu, cr4=cpu.cr4 & ~reference.CR4_SMEP), entries, access)

    monkeypatch.setattr(reference, "_allowed", without_smep)
    guest = AccessGuest(width=64, tdp=True)
    try:
        with pytest.raises(AssertionError, match="fetch kernel"):
            run(guest, 12_000, seed=1)
    finally:
        guest.close()
