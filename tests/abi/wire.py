"""A second declaration of the structures this project is about, made with cstruct2.

It shares nothing with include/pykvm/kvm.h: written from the layouts in the KVM manual, with every
byte of padding spelled out.  test_wire.py reads random bytes through both and compares each value.

cstruct2 1.0.2b0 is fenced in here: only from_stream() is used, which reads what is missing at the end
as zeros, so read() checks the length itself.  It does not understand string annotations, hence no
``from __future__ import annotations``; it keeps the values being read on the class, so no threads.
"""

from io import BytesIO
from typing import Any

from cstruct2.cstruct2 import cstruct2, structure


def array(count: int, width: int) -> Any:
    """Return how cstruct2 wants to be told of count numbers of width bytes each."""
    return [count, width]


def raw(size: int) -> Any:
    """Return how cstruct2 wants to be told of bytes that are nothing but bytes."""
    return size


@cstruct2
class UserspaceMemoryRegion:
    slot: int = 4
    flags: int = 4
    guest_phys_addr: int = 8
    memory_size: int = 8
    userspace_addr: int = 8


@cstruct2
class EventsException:
    injected: int = 1
    nr: int = 1
    has_error_code: int = 1
    pending: int = 1
    error_code: int = 4


@cstruct2
class EventsInterrupt:
    injected: int = 1
    nr: int = 1
    soft: int = 1
    shadow: int = 1


@cstruct2
class EventsNmi:
    injected: int = 1
    pending: int = 1
    masked: int = 1
    pad: int = 1


@cstruct2
class EventsSmi:
    smm: int = 1
    pending: int = 1
    smm_inside_nmi: int = 1
    latched_init: int = 1


@cstruct2
class EventsTripleFault:
    pending: int = 1


@cstruct2
class VcpuEvents:
    exception: structure = EventsException
    interrupt: structure = EventsInterrupt
    nmi: structure = EventsNmi
    sipi_vector: int = 4
    flags: int = 4
    smi: structure = EventsSmi
    triple_fault: structure = EventsTripleFault
    reserved: int = array(26, 1)
    exception_has_payload: int = 1
    exception_payload: int = 8


@cstruct2
class DebugRegs:
    db: int = array(4, 8)
    dr6: int = 8
    dr7: int = 8
    flags: int = 8
    reserved: int = array(9, 8)


@cstruct2
class MpState:
    mp_state: int = 4


@cstruct2
class EnableCap:
    cap: int = 4
    flags: int = 4
    args: int = array(4, 8)
    pad: int = array(64, 1)


@cstruct2
class CpuidEntry2:
    function: int = 4
    index: int = 4
    flags: int = 4
    eax: int = 4
    ebx: int = 4
    ecx: int = 4
    edx: int = 4
    padding: int = array(3, 4)


@cstruct2
class ClockData:
    clock: int = 8
    flags: int = 4
    pad0: int = 4
    realtime: int = 8
    host_tsc: int = 8
    pad: int = array(4, 4)


@cstruct2
class Regs:
    rax: int = 8
    rbx: int = 8
    rcx: int = 8
    rdx: int = 8
    rsi: int = 8
    rdi: int = 8
    rsp: int = 8
    rbp: int = 8
    r8: int = 8
    r9: int = 8
    r10: int = 8
    r11: int = 8
    r12: int = 8
    r13: int = 8
    r14: int = 8
    r15: int = 8
    rip: int = 8
    rflags: int = 8


@cstruct2
class Segment:
    base: int = 8
    limit: int = 4
    selector: int = 2
    type: int = 1
    present: int = 1
    dpl: int = 1
    db: int = 1
    s: int = 1
    l: int = 1  # noqa: E741  the kernel's name
    g: int = 1
    avl: int = 1
    unusable: int = 1
    padding: int = 1


@cstruct2
class Dtable:
    base: int = 8
    limit: int = 2
    padding: int = array(3, 2)


@cstruct2
class Sregs:
    cs: structure = Segment
    ds: structure = Segment
    es: structure = Segment
    fs: structure = Segment
    gs: structure = Segment
    ss: structure = Segment
    tr: structure = Segment
    ldt: structure = Segment
    gdt: structure = Dtable
    idt: structure = Dtable
    cr0: int = 8
    cr2: int = 8
    cr3: int = 8
    cr4: int = 8
    cr8: int = 8
    efer: int = 8
    apic_base: int = 8
    interrupt_bitmap: int = array(4, 8)


# struct kvm_run: a head, 256 bytes whose meaning the exit reason chooses, a tail


@cstruct2
class RunHead:
    request_interrupt_window: int = 1
    immediate_exit: int = 1
    padding1: int = array(6, 1)
    exit_reason: int = 4
    ready_for_interrupt_injection: int = 1
    if_flag: int = 1
    flags: int = 2
    cr8: int = 8
    apic_base: int = 8


@cstruct2
class RunTail:
    kvm_valid_regs: int = 8
    kvm_dirty_regs: int = 8
    s: bytes = raw(2048)


@cstruct2
class Io:
    direction: int = 1
    size: int = 1
    port: int = 2
    count: int = 4
    data_offset: int = 8


@cstruct2
class RunIo:
    head: structure = RunHead
    io: structure = Io
    rest: bytes = raw(256 - 16)
    tail: structure = RunTail


@cstruct2
class Mmio:
    phys_addr: int = 8
    data: int = array(8, 1)
    len: int = 4
    is_write: int = 1


@cstruct2
class RunMmio:
    head: structure = RunHead
    mmio: structure = Mmio
    rest: bytes = raw(256 - 21)
    tail: structure = RunTail


@cstruct2
class Osi:
    gprs: int = array(32, 8)


@cstruct2
class RunOsi:
    head: structure = RunHead
    osi: structure = Osi
    tail: structure = RunTail


@cstruct2
class Hypercall:
    nr: int = 8
    args: int = array(6, 8)
    ret: int = 8
    flags: int = 8


@cstruct2
class RunHypercall:
    head: structure = RunHead
    hypercall: structure = Hypercall
    rest: bytes = raw(256 - 72)
    tail: structure = RunTail


STRUCTURES: dict[str, tuple[Any, int]] = {
    "kvm_userspace_memory_region": (UserspaceMemoryRegion, 32),
    "kvm_vcpu_events": (VcpuEvents, 64),
    "kvm_debugregs": (DebugRegs, 128),
    "kvm_mp_state": (MpState, 4),
    "kvm_enable_cap": (EnableCap, 104),
    "kvm_cpuid_entry2": (CpuidEntry2, 40),
    "kvm_clock_data": (ClockData, 48),
    "kvm_regs": (Regs, 144),
    "kvm_sregs": (Sregs, 312),
}
"""Structures with one meaning: name in the kernel, declaration, size in bytes."""

RUN: dict[str, Any] = {"io": RunIo, "mmio": RunMmio, "osi": RunOsi, "hypercall": RunHypercall}
"""struct kvm_run by the member of its union."""

RUN_SIZE = 2352


class _Exact(BytesIO):
    """A stream that has an end."""

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        if size is not None and len(data) < size:
            raise EOFError(f"{len(data)} bytes left, {size} wanted")
        return data


def read(declaration: Any, data: bytes) -> dict[str, Any]:
    """Return the values in data, which the declaration must use up to the last byte."""
    stream = _Exact(data)
    values: dict[str, Any] = declaration.from_stream(stream)
    if stream.tell() != len(data):
        raise ValueError(f"the declaration has {stream.tell()} bytes, the data {len(data)}")
    return values
