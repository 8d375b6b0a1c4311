"""Logging begins on a slot whose pages are mapped writable: the next write to each of them is logged."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pykvm.abi import ffi, uapi
from pykvm.abi.uaccess import address_of
from tests.mmu.guest import FRAMES, SIZE, TEST

if TYPE_CHECKING:
    from tests.mmu.conftest import NewGuest
    from tests.mmu.guest import PagingGuest

PAGES = (SIZE - FRAMES) >> 12
# The slot begins and ends within a table of ours: other slots have the rest of its entries.
BEFORE, BEHIND = 3, 2


def _slots(guest: PagingGuest) -> None:
    first, last = FRAMES + (BEFORE << 12), SIZE - (BEHIND << 12)
    guest.vm.remove_memory(0)
    for slot, (start, end) in enumerate(((0, first), (first, last), (last, SIZE))):
        guest.vm.add_memory(start, guest.ram[start:end], slot=slot)


def _log(guest: PagingGuest) -> set[int]:
    bits = int.from_bytes(guest.vm.dirty_log(1), "little")
    return {n for n in range(PAGES) if bits >> n & 1}


@pytest.mark.spec("mmu.dirty_log")
def test_every_page_of_the_slot_is_write_protected_when_logging_begins(new_guest: NewGuest) -> None:
    guest = new_guest()
    _slots(guest)
    for page in range(PAGES):
        guest.map(page, FRAMES + page * 0x1000)
    write = f"mov rsi, {TEST}; mov ecx, {PAGES}; 1: mov [rsi], ecx; add rsi, 4096; dec ecx; jnz 1b; hlt"
    guest.finish(write)
    region = guest.vm.regions[1]
    pin = ffi.from_buffer(region.memory)
    flags = uapi.KVM_MEM_LOG_DIRTY_PAGES
    guest.vm._set_region(1, flags, region.guest_phys_addr, len(region.memory), address_of(pin))
    # The other slots' entries of the same table are as they were: no write to them faults.
    faults = guest.stat("pf_taken")
    guest.finish(f"mov rsi, {TEST}; mov [rsi], eax; mov [rsi + {(PAGES - 1) << 12}], eax; hlt")
    assert guest.stat("pf_taken") == faults
    assert _log(guest) == set()
    everything = set(range(PAGES - BEFORE - BEHIND))
    for _ in range(2):
        guest.finish(write)
        assert _log(guest) == everything
        assert _log(guest) == set()
