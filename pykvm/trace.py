"""Tracepoints, named and worded as the kernel's: ``PYKVM_TRACE=kvm_exit,kvm_pio``.

PYKVM_TRACE lists tracepoints, or says ``all``; PYKVM_TRACE_FILE names a file, default is stderr.
A tracepoint that is off costs its caller one attribute test::

    if trace.kvm_exit.enabled:
        trace.kvm_exit(vcpu=vcpu.id, reason="HLT", rip=rip)

`listen` gives the events to a function instead of writing them.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


class Tracepoint:
    """One kind of event; calling it writes a line, or tells who listens."""

    __slots__ = ("enabled", "format", "listeners", "name", "written")

    def __init__(self, name: str, text: str) -> None:
        """Make a tracepoint whose fields are shown as the format string `text` says."""
        self.name = name
        self.format = text
        self.enabled = False
        self.written = False
        self.listeners: tuple[Callable[[str, Mapping[str, object]], None], ...] = ()

    def __call__(self, **fields: object) -> None:
        """Write the event with its fields, and tell who listens."""
        if self.written:
            _write(self.name, self.format.format(**fields))
        for listener in self.listeners:
            listener(self.name, fields)

    def update(self) -> None:
        """Set `enabled` by what follows from it."""
        self.enabled = self.written or bool(self.listeners)


_output: TextIO | None = None

# The wording is that of the kernel's TP_printk, arch/x86/kvm/trace.h and include/trace/events/kvm.h.
kvm_entry = Tracepoint("kvm_entry", "vcpu {vcpu}, rip {rip:#x}")
kvm_exit = Tracepoint("kvm_exit", "vcpu {vcpu} reason {reason} rip {rip:#x}")
kvm_userspace_exit = Tracepoint("kvm_userspace_exit", "reason {reason}")
kvm_pio = Tracepoint("kvm_pio", "pio_{direction} at {port:#x} size {size} count {count} val {val:#x}")
kvm_mmio = Tracepoint("kvm_mmio", "mmio {direction} len {len} gpa {gpa:#x} val {val:#x}")
kvm_msr = Tracepoint("kvm_msr", "msr_{direction} {index:x} = {data:#x}{suffix}")
kvm_cpuid = Tracepoint(
    "kvm_cpuid", "func {function:x} idx {index:x} rax {eax:x} rbx {ebx:x} rcx {ecx:x} rdx {edx:x}"
)
kvm_hypercall = Tracepoint("kvm_hypercall", "nr {nr:#x} a0 {a0:#x} a1 {a1:#x} a2 {a2:#x} a3 {a3:#x}")
kvm_inj_virq = Tracepoint("kvm_inj_virq", "IRQ {vector:#x}")
kvm_inj_exception = Tracepoint("kvm_inj_exception", "{vector} (error code {error_code:#x})")
kvm_page_fault = Tracepoint("kvm_page_fault", "vcpu {vcpu} address {gpa:#018x} error_code {error_code:#x}")
# arch/x86/kvm/mmu/mmutrace.h; `role` is shown as there by whoever calls.
kvm_mmu_pagetable_walk = Tracepoint("kvm_mmu_pagetable_walk", "addr {addr:x} pferr {pferr:x} {flags}")
kvm_mmu_paging_element = Tracepoint("kvm_mmu_paging_element", "pte {pte:x} level {level}")
kvm_mmu_set_accessed_bit = Tracepoint("kvm_mmu_set_accessed_bit", "gpa {gpa:x}")
kvm_mmu_set_dirty_bit = Tracepoint("kvm_mmu_set_dirty_bit", "gpa {gpa:x}")
kvm_mmu_walker_error = Tracepoint("kvm_mmu_walker_error", "pferr {pferr:x} {flags}")
_PAGE = "sp gen {gen} gfn {gfn:x} {role} root {root_count} {sync}"
kvm_mmu_get_page = Tracepoint("kvm_mmu_get_page", _PAGE + " {state}")
kvm_mmu_sync_page = Tracepoint("kvm_mmu_sync_page", _PAGE)
kvm_mmu_unsync_page = Tracepoint("kvm_mmu_unsync_page", _PAGE)
kvm_mmu_prepare_zap_page = Tracepoint("kvm_mmu_prepare_zap_page", _PAGE)
kvm_mmu_zap_all_fast = Tracepoint("kvm_mmu_zap_all_fast", "kvm-mmu-valid-gen {gen} used_pages {pages:x}")
kvm_mmu_set_spte = Tracepoint(
    "kvm_mmu_set_spte", "gfn {gfn:x} spte {spte:x} ({rights}) level {level} at {sptep:x}"
)
# A pfn is that of a host virtual address here.
kvm_mmu_spte_requested = Tracepoint("kvm_mmu_spte_requested", "gfn {gfn:x} pfn {pfn:x} level {level}")
mark_mmio_spte = Tracepoint("mark_mmio_spte", "sptep:{sptep:x} gfn {gfn:x} access {access:x} gen {gen:x}")
handle_mmio_page_fault = Tracepoint("handle_mmio_page_fault", "addr:{addr:x} gfn {gfn:x} access {access:x}")
check_mmio_spte = Tracepoint(
    "check_mmio_spte", "spte {spte:x} kvm_gen {gen:x} spte-gen {spte_gen:x} valid {valid:d}"
)
fast_page_fault = Tracepoint(
    "fast_page_fault",
    "vcpu {vcpu} gva {addr:x} error_code {flags} sptep {sptep:x} old {old:#x} new {new:x}"
    " spurious {spurious:d} fixed {fixed:d}",
)
# The two the kernel does not have: how far the load of a root or a page fault has come, by the names of
# mmu.c's functions; and every call with its answer, and why it was refused.
mmu_step = Tracepoint("mmu_step", "vcpu {vcpu} gfn {gfn:x} {step}")
kvm_ioctl = Tracepoint("kvm_ioctl", "fd {fd} {kind} {name} arg {arg:#x} = {result}")

TRACEPOINTS = {point.name: point for point in list(globals().values()) if isinstance(point, Tracepoint)}


def enable(names: str, output: TextIO | None = None) -> None:
    """Turn tracepoints on: a comma-separated list, or "all"; "" turns all off.

    Raises ValueError for a name that is none.
    """
    global _output  # noqa: PLW0603  tracing is the process's, as the kernel's is the machine's
    wanted = (
        set(TRACEPOINTS) if names == "all" else {name.strip() for name in names.split(",") if name.strip()}
    )
    if unknown := wanted - set(TRACEPOINTS):
        message = f"no tracepoint {', '.join(sorted(unknown))}; there are {', '.join(TRACEPOINTS)}"
        raise ValueError(message)
    _output = output
    for point in TRACEPOINTS.values():
        point.written = point.name in wanted
        point.update()


@contextlib.contextmanager
def listen(names: str, listener: Callable[[str, Mapping[str, object]], None]) -> Iterator[None]:
    """Call `listener(name, fields)` for the events of these tracepoints, in the thread they happen in.

    names: a comma-separated list, or "all".
    """
    wanted = set(TRACEPOINTS) if names == "all" else {name.strip() for name in names.split(",")}
    points = [TRACEPOINTS[name] for name in wanted]
    for point in points:
        point.listeners += (listener,)
        point.update()
    try:
        yield
    finally:
        for point in points:
            point.listeners = tuple(each for each in point.listeners if each is not listener)
            point.update()


def _write(name: str, text: str) -> None:
    out = _output or sys.stderr
    task = f"{threading.current_thread().name[:15]}-{threading.get_native_id()}"
    out.write(f"{task:>24} {time.monotonic():14.6f}: {name + ':':<20} {text}\n")
    out.flush()


def enable_from_environment() -> None:
    """Do what PYKVM_TRACE and PYKVM_TRACE_FILE say."""
    names = os.environ.get("PYKVM_TRACE", "")
    if names:
        path = os.environ.get("PYKVM_TRACE_FILE")
        # Line-buffered text that lives as long as the process does.
        enable(names, Path(path).open("a", encoding="utf-8") if path else None)  # noqa: SIM115


enable_from_environment()
