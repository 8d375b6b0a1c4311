"""Port and memory-mapped I/O: exits, fragments and completions.

The processor leaves an IN or an MMIO read unexecuted and executes it again when its answer is there:
registers that the client reads in between show the state before.  An OUT waits for its completion,
too, with rip on it; an MMIO write and an element of OUTS are done when they exit.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from pykvm import trace
from pykvm.abi import ffi, lib, uapi
from pykvm.kvm.exits import (
    RESUME,
    USERSPACE,
    Outcome,
    complete_instruction,
    event_vectoring_error,
    on_exit,
    rip_moved,
)
from pykvm.kvm.quirks import has_quirk

if TYPE_CHECKING:
    from pykvm.kvm.vcpu import Vcpu

# struct cpu_exit_io: port, size, in, string, rep, count, data.
_CPU_IO = struct.Struct("<HBBBBxxII")
_CPU_IO_OFFSET = ffi.offsetof("struct vmcs", "exit", "io")
# struct cpu_mmio: gpa, len, data.
_CPU_MMIO = struct.Struct("<QI64s")
_CPU_MMIO_SIZE = ffi.sizeof("struct cpu_mmio")
_CPU_MMIO_OFFSET = ffi.offsetof("struct vmcs", "exit", "mmio")
# kvm_run.exit_reason; kvm_run.io: direction, size, port, count, data_offset;
# kvm_run.mmio: phys_addr, data, len, is_write; the data of a read are the client's to write.
_EXIT_REASON = struct.Struct("<I")
_EXIT_REASON_OFFSET = ffi.offsetof("struct kvm_run", "exit_reason")
_RUN_IO = struct.Struct("<BBHIQ")
_RUN_IO_OFFSET = ffi.offsetof("struct kvm_run", "io")
_RUN_MMIO = struct.Struct("<Q8sIB")
_RUN_MMIO_OFFSET = ffi.offsetof("struct kvm_run", "mmio")
_RUN_MMIO_DATA = _RUN_MMIO_OFFSET + ffi.offsetof("struct kvm_run_mmio", "data")
_RUN_MMIO_READ = struct.Struct("<IB")
_RUN_MMIO_LEN = _RUN_MMIO_OFFSET + ffi.offsetof("struct kvm_run_mmio", "len")
_GPA_LENGTH = struct.Struct("<QI")
_GPA = struct.Struct("<Q")
_PIO_DATA = uapi.KVM_PIO_PAGE_OFFSET * 4096
_CTL_PIO_DATA = ffi.offsetof("struct vmcs", "ctl", "pio_data")
_CTL_MMIO = ffi.offsetof("struct vmcs", "ctl", "mmio")

_IO = uapi.KVM_EXIT_IO
_MMIO = uapi.KVM_EXIT_MMIO
_IN, _OUT = uapi.KVM_EXIT_IO_IN, uapi.KVM_EXIT_IO_OUT
# The most bytes an MMIO exit carries.
_FRAGMENT = 8
_VALID = lib.CPU_EVENT_VALID
# x86.c kvm_fast_pio_out: firmware that KVM once ran wants rip past its OUT to this port.
_PORT_7E = 0x7E


# ---- ports ---------------------------------------------------------------------------------------


@on_exit(lib.EXIT_IO)
def handle_io(vcpu: Vcpu) -> Outcome:
    """Hand IN, INS, OUT or OUTS to the client."""
    port, size, is_in, string, _, count, data = _CPU_IO.unpack_from(vcpu.cpu.memory, _CPU_IO_OFFSET)
    if is_in:
        return _pio_in(vcpu, port, size, count)
    return _pio_out(vcpu, port, size, data, string)


def _pio_exit(vcpu: Vcpu, direction: int, size: int, port: int, count: int) -> Outcome:
    memory = vcpu.run_memory
    _EXIT_REASON.pack_into(memory, _EXIT_REASON_OFFSET, _IO)
    _RUN_IO.pack_into(memory, _RUN_IO_OFFSET, direction, size, port, count, _PIO_DATA)
    return USERSPACE


def _pio_in(vcpu: Vcpu, port: int, size: int, count: int) -> Outcome:
    n = size * count
    # A client that writes nothing answers 0.
    vcpu.run_memory[_PIO_DATA : _PIO_DATA + n] = bytes(n)
    vcpu.complete_userspace_io = _complete_pio_in
    return _pio_exit(vcpu, _IN, size, port, count)


def _complete_pio_in(vcpu: Vcpu) -> Outcome:
    if vcpu.pending_linear_rip is not None and rip_moved(vcpu):
        return RESUME
    # From the processor and not from kvm_run, where the client may have written by now.
    memory, run_memory = vcpu.cpu.memory, vcpu.run_memory
    port, size, _, _, _, count, _ = _CPU_IO.unpack_from(memory, _CPU_IO_OFFSET)
    n = size * count
    data = run_memory[_PIO_DATA : _PIO_DATA + n]
    memory[_CTL_PIO_DATA : _CTL_PIO_DATA + n] = data
    ctl = vcpu.cpu.ctl
    ctl.pio_pos = 0
    ctl.pio_count = count
    if trace.kvm_pio.enabled:
        value = int.from_bytes(data[:size], "little")
        trace.kvm_pio(direction="read", port=port, size=size, count=count, val=value)
    return complete_instruction(vcpu)


def _pio_out(vcpu: Vcpu, port: int, size: int, data: int, string: int) -> Outcome:
    vcpu.run_memory[_PIO_DATA : _PIO_DATA + size] = data.to_bytes(4, "little")[:size]
    if trace.kvm_pio.enabled:
        trace.kvm_pio(direction="write", port=port, size=size, count=1, val=data)
    ring = vcpu.vm.coalesced_mmio
    if ring.zones and ring.write(port, data.to_bytes(4, "little")[:size], pio=1):
        return RESUME if string else _complete_pio_out(vcpu)
    if not string:
        quirk = port == _PORT_7E and has_quirk(vcpu.vm, uapi.KVM_X86_QUIRK_OUT_7E_INC_RIP)
        if quirk or not vcpu.vm.kernel.behaviour.out_waits:
            vcpu.cpu.skip()
        else:
            vcpu.complete_userspace_io = _complete_pio_out
    return _pio_exit(vcpu, _OUT, size, port, 1)


def _complete_pio_out(vcpu: Vcpu) -> Outcome:
    if vcpu.pending_linear_rip is not None and rip_moved(vcpu):
        return RESUME
    vcpu.cpu.ctl.pio_out_done = 1
    return complete_instruction(vcpu)


# ---- memory --------------------------------------------------------------------------------------


@on_exit(lib.EXIT_MMIO_READ)
def handle_mmio_read(vcpu: Vcpu) -> Outcome:
    """Ask the client for what a read of one page gives, eight bytes at a time."""
    ex = vcpu.cpu.exit
    if ex.idt_vectoring.info & _VALID:
        vcpu.events.requeue(vcpu)
        return event_vectoring_error(vcpu, ex.gpa)
    vcpu.mmio_read = b""
    return _mmio_read_exit(vcpu)


def _mmio_read_exit(vcpu: Vcpu) -> Outcome:
    gpa, length = _GPA_LENGTH.unpack_from(vcpu.cpu.memory, _CPU_MMIO_OFFSET)
    done = len(vcpu.mmio_read)
    n = min(length - done, _FRAGMENT)
    memory = vcpu.run_memory
    _EXIT_REASON.pack_into(memory, _EXIT_REASON_OFFSET, _MMIO)
    _GPA.pack_into(memory, _RUN_MMIO_OFFSET, gpa + done)
    _RUN_MMIO_READ.pack_into(memory, _RUN_MMIO_LEN, n, 0)
    vcpu.complete_userspace_io = _complete_mmio_read
    return USERSPACE


def _complete_mmio_read(vcpu: Vcpu) -> Outcome:
    if vcpu.pending_linear_rip is not None and rip_moved(vcpu):
        vcpu.cpu.ctl.mmio_count = 0
        return RESUME
    gpa, length = _GPA_LENGTH.unpack_from(vcpu.cpu.memory, _CPU_MMIO_OFFSET)
    n = min(length - len(vcpu.mmio_read), _FRAGMENT)
    vcpu.mmio_read += bytes(vcpu.run_memory[_RUN_MMIO_DATA : _RUN_MMIO_DATA + n])
    if len(vcpu.mmio_read) < length:
        return _mmio_read_exit(vcpu)
    ctl = vcpu.cpu.ctl
    at = ctl.mmio_count
    _CPU_MMIO.pack_into(vcpu.cpu.memory, _CTL_MMIO + at * _CPU_MMIO_SIZE, gpa, length, vcpu.mmio_read)
    ctl.mmio_count = at + 1
    if trace.kvm_mmio.enabled:
        value = int.from_bytes(vcpu.mmio_read[:8], "little")
        trace.kvm_mmio(direction="read", len=length, gpa=gpa, val=value)
    return complete_instruction(vcpu)


@on_exit(lib.EXIT_MMIO_WRITE)
def handle_mmio_write(vcpu: Vcpu) -> Outcome:
    """Hand out what an instruction wrote where no memory is; the instruction itself is done."""
    ex, memory = vcpu.cpu.exit, vcpu.cpu.memory
    if ex.idt_vectoring.info & _VALID:
        vcpu.events.requeue(vcpu)
        return event_vectoring_error(vcpu, ex.gpa)
    fragments, mmu, ring = vcpu.mmio_fragments, vcpu.vm.mmu, vcpu.vm.coalesced_mmio
    for piece in range(ex.mmio_count):
        gpa, length, data = _CPU_MMIO.unpack_from(memory, _CPU_MMIO_OFFSET + piece * _CPU_MMIO_SIZE)
        # Shadow paging: a guest page table that is watched, and memory all the same.
        if mmu.emulated_write(vcpu, gpa, data[:length]):
            continue
        start = _coalesce(vcpu, gpa, data[:length]) if ring.zones else 0
        for at in range(start, length, _FRAGMENT):
            fragments.append((gpa + at, data[at : min(at + _FRAGMENT, length)]))
    return _mmio_write_exit(vcpu)


def _coalesce(vcpu: Vcpu, gpa: int, data: bytes) -> int:
    """Put into the ring what of a write, from its start on, belongs there; return how many bytes did."""
    for at in range(0, len(data), _FRAGMENT):
        if not vcpu.vm.coalesced_mmio.write(gpa + at, data[at : at + _FRAGMENT], pio=0):
            return at
    return len(data)


def _mmio_write_exit(vcpu: Vcpu) -> Outcome:
    """Hand out the next fragment; the completion of the last one resumes the guest."""
    fragments = vcpu.mmio_fragments
    if not fragments:
        return RESUME
    gpa, data = fragments.pop(0)
    if trace.kvm_mmio.enabled:
        trace.kvm_mmio(direction="write", len=len(data), gpa=gpa, val=int.from_bytes(data, "little"))
    memory = vcpu.run_memory
    _EXIT_REASON.pack_into(memory, _EXIT_REASON_OFFSET, _MMIO)
    _RUN_MMIO.pack_into(memory, _RUN_MMIO_OFFSET, gpa, data, len(data), 1)
    vcpu.complete_userspace_io = _mmio_write_exit if fragments else None
    return USERSPACE
