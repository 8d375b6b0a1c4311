"""Real runs behind docs/mmu.md: which functions of the MMU ran, in which order, and what the tracepoints said.

`python -m tests.docs` writes the tracepoints there; a test compares the order with the walk-throughs.
"""

from __future__ import annotations

import contextlib
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from pykvm import trace
from pykvm.client import Hlt, Kvm
from pykvm.mmu import spte as sptes
from pykvm.mmu.pages import child_role
from tests.mmu.guest import FRAMES, FULL, PT, TEST, PagingGuest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import FrameType

PACKAGE = Path(trace.__file__).parent
_FILES = {str(path) for path in (PACKAGE / "mmu").glob("*.py")} | {
    str(PACKAGE / "kvm" / name) for name in ("mmu.py", "exits.py")
}


class Recorder:
    """Names of the MMU's functions in the order they are called in this thread."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __enter__(self) -> Self:
        sys.setprofile(self._event)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _event(self, frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename in _FILES:
            self.calls.append(frame.f_code.co_qualname)


# Beside kvm_mmu_*.
KVMS = ("kvm_page_fault", "fast_page_fault", "mark_mmio_spte", "handle_mmio_page_fault")


@contextlib.contextmanager
def events(lines: list[str]) -> Iterator[None]:
    """Collect what the MMU's tracepoints say; of host addresses only what is the same in every run."""
    names = ",".join(name for name in trace.TRACEPOINTS if name in KVMS or name.startswith("kvm_mmu_"))

    def listener(name: str, fields: Mapping[str, object]) -> None:
        shown = dict(fields)
        for field, keep in (("spte", ~sptes.PFN_MASK), ("old", ~sptes.PFN_MASK), ("new", ~sptes.PFN_MASK),
                            ("sptep", 0xFFF), ("pfn", 0)):  # fmt: skip
            if field in shown:
                shown[field] = int(str(shown[field])) & keep
        lines.append(f"{name}: {trace.TRACEPOINTS[name].format.format(**shown)}")

    with trace.listen(names, listener):
        yield


# ---- the runs --------------------------------------------------------------------------------------


class Step(NamedTuple):
    """What happened between two exits."""

    calls: list[str]
    events: list[str]


def _watch(run: Callable[[], object]) -> Step:
    lines: list[str] = []
    with events(lines), Recorder() as recorder:
        run()
    return Step(recorder.calls, lines)


def tdp_fault() -> Step:
    """A write to a frame that nothing maps yet."""
    with Kvm() as kvm, kvm.create_vm() as vm:
        # Smaller than 2 MiB: wherever the host puts it, no large page fits.
        memory = vm.add_memory(0, 0x10000)
        memory[0x1000:0x1005] = bytes.fromhex("f4 a20050 f4")  # hlt; mov %al, 0x5000; hlt
        with vm.create_vcpu(0) as vcpu:
            with vcpu.sregs as sregs:
                sregs.cs.base = sregs.cs.selector = 0
            vcpu.regs.rip = 0x1000
            assert vcpu.run() == Hlt()
            return _watch(vcpu.run)


# What the guest does between two OUTs. PT is its table of the last level for TEST and what follows.
SHADOW = {
    "read": "mov eax, [rsi]",
    "edit": f"mov dword ptr [{PT + 8}], {FRAMES + 0x9000 | FULL}",
    "again": f"mov dword ptr [{PT + 16}], {FRAMES + 0xA000 | FULL}",
    "invlpg": "invlpg [rsi + 0x1000]",
    "cr3": "mov rax, cr3; mov cr3, rax",
    "once more": f"mov dword ptr [{PT + 24}], {FRAMES + 0xB000 | FULL}",
}


def shadow() -> dict[str, Step]:
    """Return the steps of SHADOW, and `zap`: the oldest pages under memory pressure."""
    child_role.cache_clear()  # or it is not seen to be called
    guest = PagingGuest(tdp=False)
    try:
        for number in range(4):
            guest.map(number, FRAMES + number * 0x1000)
        for frame in range(FRAMES, FRAMES + 0x10000, 0x1000):
            guest.ram[frame] = 1  # so that the host has it, and it can be mapped ahead
        guest.run(f"mov rsi, {TEST}; out 1, al; {'; out 1, al; '.join(SHADOW.values())}; hlt")
        steps = {name: _watch(guest.vcpu.run) for name in SHADOW}
        steps["zap"] = _watch(lambda: guest.vm.mmu.shrink(100))
        assert guest.vm.mmu.audit() == []
        return steps
    finally:
        guest.close()


SHOWN = (*[name for name in SHADOW if name not in {"again", "once more"}], "zap")


@cache
def steps() -> dict[str, Step]:
    """Return all steps by name, run once."""
    return {"tdp": tdp_fault(), **shadow()}


def text(name: str) -> str:
    """Return the events of a step as docs/mmu.md shows them."""
    return "```text\n" + "\n".join(steps()[name].events) + "\n```\n"


if __name__ == "__main__":
    for name, step in steps().items():
        print(f"== {name}", *step.calls, "--", *step.events, sep="\n")
