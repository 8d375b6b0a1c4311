"""`--tcg`: every guest of the bare processor runs under QEMU's TCG as well, and has to end the same.

A test whose guest TCG gets wrong says so, with the section of the SDM that decides:

    @pytest.mark.tcg_differs("no limit checks: SDM vol. 3 5.3")
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import cache

import pytest

from pykvm.abi import lib
from tests.guest import tcg
from tests.guest.bare import Machine

# Exits at an instruction of two bytes or more, or at one whose followers do not matter: TCG gets an
# endless loop in its place.
AT_INSTRUCTION = {
    lib.EXIT_CPUID, lib.EXIT_IO, lib.EXIT_RDMSR, lib.EXIT_WRMSR, lib.EXIT_VMCALL, lib.EXIT_XSETBV, lib.EXIT_RSM,
}  # fmt: skip
# Of x87 and vector registers nothing is compared; the host has them all (tests/fuzz).
WITHOUT = {"test_vector", "test_x87", "test_xsave"}
LOOP = b"\xeb\xfe"
Run = Callable[[Machine, int | None, float], int]


@cache
def emulator() -> tcg.Tcg:
    """The one QEMU of the session."""
    return tcg.Tcg()


@pytest.fixture(autouse=True)
def under_tcg(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not request.config.getoption("--tcg") or request.path.stem in WITHOUT:
        yield
        return
    verdicts = [marker.args[0] for marker in request.node.iter_markers("tcg_differs")]
    run: Run = Machine.run

    def checked(m: Machine, until: int | None = None, seconds: float = 10) -> int:
        if threading.current_thread() is not threading.main_thread():
            return run(m, until, seconds)  # one of several processors
        try:
            before = tcg.snapshot(m)
        except tcg.NotExportableError:
            return run(m, until, seconds)
        reason = run(m, until, seconds)
        found = compare(m, before, reason)
        assert not found or verdicts, "TCG ends differently:\n" + "\n".join(found)
        return reason

    monkeypatch.setattr(Machine, "run", checked)
    yield


def compare(m: Machine, before: tcg.Snapshot, reason: int) -> list[str]:
    """Run it under TCG, too: where that ends differently."""
    skip, stop_at = (0, 0), None
    if reason in AT_INSTRUCTION:
        if m.guest.rflags & lib.X86_EFLAGS_TF:
            return []  # the loop would trap
        stop_at = tcg.linear_rip(m)
        code = bytes(m.exit.insn[0 : m.exit.insn_len])
        if before.ram[stop_at : stop_at + len(code)] != code:
            return []  # not where its linear address is, or made by the guest
        if reason == lib.EXIT_IO and m.exit.io.string:
            return []  # it has begun
        skip = stop_at, stop_at + 2
        before.ram = before.ram[:stop_at] + LOOP + before.ram[stop_at + 2 :]
    elif reason not in {lib.EXIT_HLT, lib.EXIT_TRIPLE_FAULT}:
        return []
    try:
        end = emulator().run(before, stop_at)
    except tcg.QemuError as error:
        emulator().close()
        emulator.cache_clear()
        return [str(error)]
    expected = {lib.EXIT_HLT: "hlt", lib.EXIT_TRIPLE_FAULT: "triple fault"}.get(reason, "there")
    if end.how != expected:
        return [f"{end.how}, not {expected}", *tcg.differences(m, end, skip=skip)]
    return [] if reason == lib.EXIT_TRIPLE_FAULT else tcg.differences(m, end, skip=skip)


def pytest_sessionfinish() -> None:
    if emulator.cache_info().currsize:
        emulator().close()
