"""`--tcg`: every guest of the bare processor runs under QEMU's TCG as well, and has to end the same.

At the end it says how many runs there were of which sort, and which marks below nothing needs.

A test whose guest TCG gets wrong says so, with the section of the SDM that decides:

    @pytest.mark.tcg_differs("no limit checks: SDM vol. 3 5.3")
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

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
# Every difference goes there, for who looks at them: TCG_LOG=file pytest tests/guest --tcg
LOG = Path(os.environ["TCG_LOG"]) if "TCG_LOG" in os.environ else None
# Runs of the session by what came of them, and for marked tests whether one differed.
TALLY: Counter[str] = Counter()
MARKED: dict[str, bool] = {}
AGREES, DIFFERS = "ended the same", "ended differently, as its mark says"


class NotComparableError(Exception):
    """TCG cannot stop where this run did."""


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
    name = request.node.nodeid.partition("[")[0]
    if verdicts:
        MARKED.setdefault(name, False)
    run: Run = Machine.run

    def checked(m: Machine, until: int | None = None, seconds: float = 10) -> int:
        if threading.current_thread() is not threading.main_thread():
            TALLY["not run: one of several processors"] += 1
            return run(m, until, seconds)
        try:
            before = tcg.snapshot(m)
        except tcg.NotExportableError as why:
            TALLY[f"not run: {why}"] += 1
            return run(m, until, seconds)
        reason = run(m, until, seconds)
        try:
            found = compare(m, before, reason)
        except NotComparableError as why:
            TALLY[f"not run: {why}"] += 1
            return reason
        TALLY[DIFFERS if found else AGREES] += 1
        if verdicts and found:
            MARKED[name] = True
        if found and LOG:
            with LOG.open("a") as log:
                log.write(f"{request.node.nodeid}: {verdicts}\n" + "".join(f"    {f}\n" for f in found))
        assert not found or verdicts, "TCG ends differently:\n" + "\n".join(found)
        return reason

    monkeypatch.setattr(Machine, "run", checked)
    yield


def compare(m: Machine, before: tcg.Snapshot, reason: int) -> list[str]:
    """Run it under TCG, too: where that ends differently."""
    skip, stop_at = (0, 0), None
    if reason in AT_INSTRUCTION:
        if m.guest.rflags & lib.X86_EFLAGS_TF:
            raise NotComparableError("the loop it would wait in would trap")
        stop_at = tcg.linear_rip(m)
        code = bytes(m.exit.insn[0 : m.exit.insn_len])
        if before.ram[stop_at : stop_at + len(code)] != code:
            raise NotComparableError("the instruction it would wait at is made by the guest")
        if reason == lib.EXIT_IO and m.exit.io.string:
            raise NotComparableError("a string instruction has begun")
        skip = stop_at, stop_at + 2
        before.ram = before.ram[:stop_at] + LOOP + before.ram[stop_at + 2 :]
    elif reason not in {lib.EXIT_HLT, lib.EXIT_TRIPLE_FAULT}:
        raise NotComparableError("an exit of the contract, not of a processor")
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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not TALLY:
        return
    terminalreporter.section("runs under TCG")
    ran = TALLY[AGREES] + TALLY[DIFFERS]
    terminalreporter.line(f"{ran} of {TALLY.total()} runs were compared")
    for what, count in TALLY.most_common():
        terminalreporter.line(f"{count:6} {what}")
    for name in sorted(name for name, needed in MARKED.items() if not needed):
        terminalreporter.line(f"mark without need: {name}")
