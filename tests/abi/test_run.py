"""KVM_RUN: the order of its work, its exits and their completions, through guests in real mode."""

from __future__ import annotations

import signal
import struct
import threading
import time
from errno import EFAULT, EINTR, EINVAL
from typing import TYPE_CHECKING, Any, Self

import pytest

from pykvm import uapi
from pykvm.abi import ffi, fields, new
from pykvm.device import vcpu_of
from pykvm.kvm import exits
from pykvm.mmu import RetPf
from tests.machine import CODE, HOLE, POISON, Machine, emulated, errno_of

if TYPE_CHECKING:
    from tests.conftest import NewMachine

HOLE_SEGMENT = HOLE >> 4
HLT = b"\xf4"
OUT_DX_AL, OUT_DX_AX, OUT_DX_EAX = b"\xee", b"\xef", b"\x66\xef"
IN_AL_DX, IN_AX_DX, IN_EAX_DX = b"\xec", b"\xed", b"\x66\xed"
REP_OUTSB, REP_INSB = b"\xf3\x6e", b"\xf3\x6c"
SPIN = b"\xeb\xfe"
NOP = b"\x90"


def io_of(machine: Machine) -> tuple[int, int, int, int]:
    """Return (direction, size, port, count) of an IO exit."""
    assert machine.run.exit_reason == uapi.KVM_EXIT_IO
    assert machine.run.io.data_offset == 4096
    io = machine.run.io
    return io.direction, io.size, io.port, io.count


def mmio_of(machine: Machine) -> tuple[int, int, bytes | None]:
    """Return (gpa, length, data written or None) of an MMIO exit."""
    assert machine.run.exit_reason == uapi.KVM_EXIT_MMIO
    mmio = machine.run.mmio
    return mmio.phys_addr, mmio.len, machine.mmio_bytes() if mmio.is_write else None


def in_hole(machine: Machine, code: bytes, **regs: int) -> None:
    """Run code with DS at a hole."""
    machine.start(code, **regs)
    machine.segment("ds", HOLE_SEGMENT)


# ---- kvm_run itself ------------------------------------------------------------------------------


@pytest.mark.spec("run.layout")
def test_offsets_of_kvm_run() -> None:
    offsets = {field.name: field.offset for field in fields("kvm_run")}
    wanted = {
        "request_interrupt_window": 0,
        "immediate_exit": 1,
        "exit_reason": 8,
        "ready_for_interrupt_injection": 12,
        "if_flag": 13,
        "flags": 14,
        "cr8": 16,
        "apic_base": 24,
        "io": 32,
        "kvm_valid_regs": 288,
        "kvm_dirty_regs": 296,
        "s": 304,
    }
    assert {name: offsets[name] for name in wanted} == wanted


@pytest.mark.spec("run.in_out_fields", "exit.HLT")
def test_fields_are_refreshed_on_every_return(machine: Machine) -> None:
    machine.start(HLT * 2, rflags=2)
    machine.run.flags = 0xFFFF
    assert machine.go() == uapi.KVM_EXIT_HLT
    run = machine.run
    assert (run.if_flag, run.ready_for_interrupt_injection, run.flags) == (0, 0, 0)
    assert run.apic_base == 0xFEE00900
    machine.set_regs(rip=CODE, rflags=0x202)
    run.immediate_exit = 1
    assert machine.go_errno() == EINTR
    assert (run.if_flag, run.ready_for_interrupt_injection) == (1, 1)


@pytest.mark.spec("run.cr8_in")
def test_cr8_is_taken_from_kvm_run(machine: Machine) -> None:
    machine.start(HLT)
    machine.run.cr8 = 5
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert machine.sregs.cr8 == 5
    machine.run.cr8 = 16
    assert machine.go_errno() == EINVAL
    assert machine.sregs.cr8 == 5
    assert machine.run.cr8 == 5


@pytest.mark.spec("fd.arg_zero", "vcpu.RUN")
def test_run_takes_no_argument(machine: Machine) -> None:
    machine.start(HLT)
    assert machine.errno(uapi.KVM_RUN, 1) == EINVAL
    assert machine.go() == uapi.KVM_EXIT_HLT


@pytest.mark.spec("run.sync_regs")
def test_registers_travel_in_kvm_run(machine: Machine) -> None:
    machine.start(HLT * 2)
    run, regs = machine.run, machine.run.s.regs
    run.kvm_valid_regs = uapi.KVM_SYNC_X86_REGS | uapi.KVM_SYNC_X86_SREGS
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert regs.regs.rip == CODE + 1
    assert regs.sregs.apic_base == 0xFEE00900
    regs.regs.rip, regs.regs.rax = CODE, 0x1234
    run.kvm_dirty_regs = uapi.KVM_SYNC_X86_REGS
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert run.kvm_dirty_regs == 0
    assert (machine.regs.rip, machine.regs.rax) == (CODE + 1, 0x1234)
    assert machine.cap(uapi.KVM_CAP_SYNC_REGS) == 7


@pytest.mark.spec("run.sync_regs")
@pytest.mark.parametrize("field", ["kvm_valid_regs", "kvm_dirty_regs"])
def test_unknown_register_classes_are_refused(machine: Machine, field: str) -> None:
    machine.start(HLT)
    setattr(machine.run, field, 8)
    assert machine.go_errno() == EINVAL
    assert machine.regs.rip == CODE


@pytest.mark.spec("run.sync_regs")
def test_bad_registers_in_kvm_run_are_refused(machine: Machine) -> None:
    machine.start(HLT)
    machine.run.s.regs.sregs = machine.sregs[0]
    machine.run.s.regs.sregs.cr0 = uapi.X86_CR0_PG
    machine.run.kvm_dirty_regs = uapi.KVM_SYNC_X86_SREGS
    assert machine.go_errno() == EINVAL
    assert not machine.sregs.cr0 & uapi.X86_CR0_PG


# ---- ports ---------------------------------------------------------------------------------------


@pytest.mark.spec("exit.IO", "run.io_data_page")
def test_out_of_every_size(machine: Machine) -> None:
    machine.start(OUT_DX_AL + OUT_DX_AX + OUT_DX_EAX + b"\xe6\x80" + HLT, rax=0x44332211, rdx=0x100)
    for size, port in ((1, 0x100), (2, 0x100), (4, 0x100), (1, 0x80)):
        assert machine.go() == uapi.KVM_EXIT_IO
        assert io_of(machine) == (uapi.KVM_EXIT_IO_OUT, size, port, 1)
        assert machine.data_bytes(size) == b"\x11\x22\x33\x44"[:size]
    assert machine.go() == uapi.KVM_EXIT_HLT


@pytest.mark.spec("exit.IO", "run.order", "run.complete_then_signal", "run.immediate_exit")
def test_in_reaches_registers_at_the_next_run_only(machine: Machine) -> None:
    machine.start(IN_AL_DX + IN_AX_DX + IN_EAX_DX + HLT, rax=0xFFFF_FFFF_4433_2211, rdx=0x200)
    for size, filler, rax in (
        (1, b"\xa1", 0xFFFF_FFFF_4433_22A1),
        (2, b"\xb2", 0xFFFF_FFFF_4433_B2B2),
        (4, b"\xc3", 0xC3C3_C3C3),
    ):
        before = machine.regs
        assert machine.go() == uapi.KVM_EXIT_IO
        assert io_of(machine) == (uapi.KVM_EXIT_IO_IN, size, 0x200, 1)
        assert machine.data_bytes(size) == bytes(size)
        machine.data[:4] = filler * 4
        assert machine.regs.rip == before.rip
        assert machine.regs.rax == before.rax
        # Completed, and nothing after it.
        assert machine.complete() == EINTR
        assert machine.run.exit_reason == POISON
        assert machine.regs.rip == before.rip + (2 if size == 4 else 1)
        assert machine.regs.rax == rax
    assert machine.go() == uapi.KVM_EXIT_HLT


@pytest.mark.spec("exit.IO")
def test_out_waits_for_its_completion_with_rip_on_it(machine: Machine) -> None:
    emulated(machine, "leaves rip behind an OUT")
    machine.start(OUT_DX_AL + HLT, rdx=0x3F8)
    assert machine.go() == uapi.KVM_EXIT_IO
    assert machine.regs.rip == CODE
    assert machine.complete() == EINTR
    assert machine.regs.rip == CODE + 1


@pytest.mark.spec("cap.quirk_out7e")
def test_out_to_port_7e_is_past_already(machine: Machine) -> None:
    machine.start(b"\xe6\x7e" + HLT)
    assert machine.go() == uapi.KVM_EXIT_IO
    assert machine.regs.rip == CODE + 2
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert machine.regs.rip == CODE + 3


@pytest.mark.spec("exit.IO")
@pytest.mark.parametrize("code", [IN_AL_DX, OUT_DX_AL])
def test_a_client_that_moves_rip_wins(machine: Machine, code: bytes) -> None:
    emulated(machine, "finishes an IN where it began")
    machine.start(code + HLT, rdx=0x200, rax=0x55)
    machine.load(HLT, 0x2000)
    assert machine.go() == uapi.KVM_EXIT_IO
    machine.data[0] = 0xAA
    machine.set_regs(rip=0x2000)
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert machine.regs.rip == 0x2001
    assert machine.regs.rax == 0x55


@pytest.mark.spec("exit.IO")
def test_setting_the_same_rip_changes_nothing(machine: Machine) -> None:
    emulated(machine, "forgets the data when registers are set")
    machine.start(IN_AL_DX + HLT, rdx=0x200)
    assert machine.go() == uapi.KVM_EXIT_IO
    machine.data[0] = 0xAA
    machine.set_regs(rbx=7)
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert (machine.regs.rax, machine.regs.rbx) == (0xAA, 7)


@pytest.mark.spec("exit.IO", "run.multi_fragment")
def test_registers_set_between_two_parts_of_a_write_concern_no_later_exit(machine: Machine) -> None:
    emulated(machine, "keeps the second part for itself")
    # mov [0xffe], eax; nop; out dx, al
    in_hole(machine, b"\x66\xa3\xfe\x0f" + NOP + OUT_DX_AL + HLT, rax=0x44332211, rdx=0x200)
    assert machine.go() == uapi.KVM_EXIT_MMIO
    machine.set_regs(rbx=7)
    assert machine.go() == uapi.KVM_EXIT_MMIO
    assert machine.go() == uapi.KVM_EXIT_IO
    assert machine.go() == uapi.KVM_EXIT_HLT


@pytest.mark.spec("exit.IO_rep", "run.io_data_page")
def test_rep_outs_exits_for_each_element(machine: Machine) -> None:
    machine.start(REP_OUTSB + HLT, rcx=3, rsi=0x2000, rdx=0x3F8)
    machine.load(b"abc", 0x2000)
    for n, letter in enumerate(b"abc", 1):
        assert machine.go() == uapi.KVM_EXIT_IO
        assert io_of(machine) == (uapi.KVM_EXIT_IO_OUT, 1, 0x3F8, 1)
        assert machine.data_bytes(1)[0] == letter
        regs = machine.regs
        assert (regs.rcx, regs.rsi, regs.rip) == (3 - n, 0x2000 + n, CODE)
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert machine.regs.rip == CODE + 3


@pytest.mark.spec("exit.IO_rep")
def test_rep_ins_asks_for_many_at_once(machine: Machine) -> None:
    machine.start(REP_INSB + HLT, rcx=6, rdi=0x2000, rdx=0x300)
    assert machine.go() == uapi.KVM_EXIT_IO
    assert io_of(machine) == (uapi.KVM_EXIT_IO_IN, 1, 0x300, 6)
    machine.data[:6] = b"012345"
    assert machine.regs.rcx == 6
    assert machine.ram[0x2000:0x2006] == bytes(6)
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert machine.ram[0x2000:0x2007] == b"012345\0"
    assert (machine.regs.rcx, machine.regs.rdi) == (0, 0x2006)


@pytest.mark.spec("exit.IO_rep")
def test_rep_ins_ends_its_batch_with_the_page(machine: Machine) -> None:
    machine.start(REP_INSB + HLT, rcx=6, rdi=0x2FFE, rdx=0x300)
    assert machine.go() == uapi.KVM_EXIT_IO
    assert io_of(machine)[3] == 2
    machine.data[:2] = b"01"
    # Unlike a second MMIO fragment, the next batch is not part of the completion.
    assert machine.complete() == EINTR
    assert (machine.regs.rcx, machine.regs.rdi, machine.regs.rip) == (4, 0x3000, CODE)
    assert machine.go() == uapi.KVM_EXIT_IO
    assert io_of(machine)[3] == 4
    machine.data[:4] = b"2345"
    assert machine.complete() == EINTR
    assert machine.ram[0x2FFE:0x3004] == b"012345"


@pytest.mark.spec("exit.IO_rep")
def test_rep_ins_backwards_comes_one_by_one(machine: Machine) -> None:
    machine.start(b"\xfd" + REP_INSB + HLT, rcx=2, rdi=0x2001, rdx=0x300)
    for letter in b"ab":
        assert machine.go() == uapi.KVM_EXIT_IO
        assert io_of(machine)[3] == 1
        machine.data[0] = letter
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert machine.ram[0x2000:0x2002] == b"ba"


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.spec("exit.MMIO", "run.complete_then_signal")
@pytest.mark.parametrize(
    ("load", "length", "rax"),
    [
        (b"\xa0\x00\x00", 1, 0x4433_2281),
        (b"\xa1\x00\x00", 2, 0x4433_8281),
        (b"\x66\xa1\x00\x00", 4, 0x8483_8281),
    ],
)
def test_loads_wait_for_their_data(machine: Machine, load: bytes, length: int, rax: int) -> None:
    in_hole(machine, load + HLT, rax=0x4433_2211)
    assert machine.go() == uapi.KVM_EXIT_MMIO
    assert mmio_of(machine) == (HOLE, length, None)
    ffi.memmove(machine.run.mmio.data, b"\x81\x82\x83\x84\x85\x86\x87\x88", 8)
    assert (machine.regs.rip, machine.regs.rax) == (CODE, 0x4433_2211)
    assert machine.complete() == EINTR
    assert (machine.regs.rip, machine.regs.rax) == (CODE + len(load), rax)


@pytest.mark.spec("exit.MMIO")
def test_stores_are_done_when_they_exit(machine: Machine) -> None:
    store = b"\xa3\x02\x00"
    in_hole(machine, store + HLT, rax=0x1234)
    assert machine.go() == uapi.KVM_EXIT_MMIO
    assert mmio_of(machine) == (HOLE + 2, 2, b"\x34\x12")
    assert machine.regs.rip == CODE + len(store)
    assert machine.go() == uapi.KVM_EXIT_HLT


@pytest.mark.spec("exit.MMIO")
def test_read_modify_write_exits_twice(machine: Machine) -> None:
    add = b"\x80\x06\x00\x00\x03"  # addb $3, (0)
    in_hole(machine, add + HLT)
    assert machine.go() == uapi.KVM_EXIT_MMIO
    assert mmio_of(machine) == (HOLE, 1, None)
    machine.run.mmio.data[0] = 0xFE
    assert machine.complete() == 0
    assert mmio_of(machine) == (HOLE, 1, b"\x01")
    assert machine.regs.rip == CODE + len(add)
    assert machine.regs.rflags & 1
    assert machine.complete() == EINTR


@pytest.mark.spec("exit.MMIO", "run.multi_fragment")
def test_a_store_across_pages_comes_in_two(machine: Machine) -> None:
    in_hole(machine, b"\x66\xa3\xfe\x0f" + HLT, rax=0x44332211)
    assert machine.go() == uapi.KVM_EXIT_MMIO
    assert mmio_of(machine) == (HOLE + 0xFFE, 2, b"\x11\x22")
    assert machine.complete() == 0
    assert mmio_of(machine) == (HOLE + 0x1000, 2, b"\x33\x44")
    assert machine.complete() == EINTR
    assert machine.regs.rip == CODE + 4


@pytest.mark.spec("exit.MMIO", "run.multi_fragment")
def test_a_load_across_pages_comes_in_two(machine: Machine) -> None:
    in_hole(machine, b"\x66\xa1\xfe\x0f" + HLT)
    assert machine.go() == uapi.KVM_EXIT_MMIO
    assert mmio_of(machine) == (HOLE + 0xFFE, 2, None)
    ffi.memmove(machine.run.mmio.data, b"\x11\x22", 2)
    assert machine.complete() == 0
    assert mmio_of(machine) == (HOLE + 0x1000, 2, None)
    ffi.memmove(machine.run.mmio.data, b"\x33\x44", 2)
    assert machine.regs.rax == 0
    assert machine.complete() == EINTR
    assert machine.regs.rax == 0x44332211


@pytest.mark.spec("exit.MMIO")
def test_a_store_half_in_memory(machine: Machine) -> None:
    page = machine.add_slot(1, HOLE, 0x1000)
    in_hole(machine, b"\x66\xa3\xfe\x0f" + HLT, rax=0x44332211)
    assert machine.go() == uapi.KVM_EXIT_MMIO
    assert mmio_of(machine) == (HOLE + 0x1000, 2, b"\x33\x44")
    assert page[0xFFE:0x1000] == b"\x11\x22"
    assert machine.go() == uapi.KVM_EXIT_HLT


@pytest.mark.spec("exit.MMIO")
def test_push_to_a_hole(machine: Machine) -> None:
    machine.start(b"\x68\x34\x12" + HLT, rsp=0x100)
    machine.segment("ss", HOLE_SEGMENT)
    assert machine.go() == uapi.KVM_EXIT_MMIO
    assert mmio_of(machine) == (HOLE + 0xFE, 2, b"\x34\x12")
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert machine.regs.rsp == 0xFE


@pytest.mark.spec("exit.MMIO_rep")
def test_rep_movs_from_a_hole_exits_for_each_element(machine: Machine) -> None:
    in_hole(machine, b"\xf3\xa4" + HLT, rcx=3, rsi=0x10, rdi=0x2000)
    for n, letter in enumerate(b"abc"):
        assert machine.go() == uapi.KVM_EXIT_MMIO
        assert mmio_of(machine) == (HOLE + 0x10 + n, 1, None)
        regs = machine.regs
        assert (regs.rcx, regs.rsi, regs.rdi) == (3 - n, 0x10 + n, 0x2000 + n)
        machine.run.mmio.data[0] = letter
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert machine.ram[0x2000:0x2003] == b"abc"


@pytest.mark.spec("exit.MMIO_rep")
def test_rep_stos_to_a_hole_exits_for_each_element(machine: Machine) -> None:
    machine.start(b"\xf3\xab" + HLT, rcx=2, rdi=0, rax=0x1234)
    machine.segment("es", HOLE_SEGMENT)
    for n in range(2):
        assert machine.go() == uapi.KVM_EXIT_MMIO
        assert mmio_of(machine) == (HOLE + 2 * n, 2, b"\x34\x12")
        assert machine.regs.rdi == 2 * n + 2
    assert machine.go() == uapi.KVM_EXIT_HLT


@pytest.mark.spec("vm.memslot_readonly", "exit.MMIO")
def test_a_readonly_slot_is_read_and_exits_on_writes(machine: Machine) -> None:
    rom = machine.add_slot(1, HOLE, 0x1000, uapi.KVM_MEM_READONLY)
    rom[0:1] = b"\x05"
    in_hole(machine, b"\xa0\x00\x00" + b"\x80\x06\x00\x00\x03" + HLT)
    assert machine.go() == uapi.KVM_EXIT_MMIO
    assert mmio_of(machine) == (HOLE, 1, b"\x08")
    assert rom[0] == 5
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert machine.regs.rax == 5


@pytest.mark.spec("vm.memslot_readonly", "exit.MMIO")
@pytest.mark.parametrize("extensions", [(), ("no-tdp",)], ids=["tdp", "no-tdp"])
def test_the_first_access_to_a_readonly_slot_may_be_a_write(
    extensions: tuple[str, ...], new_machine: NewMachine
) -> None:
    """OVMF writes a command to its flash, a slot that QEMU has made a moment before."""
    machine = new_machine(extensions=extensions)
    rom = machine.add_slot(1, HOLE, 0x1000, uapi.KVM_MEM_READONLY)
    rom[0:2] = b"\x05\x77"
    in_hole(machine, b"\xc6\x06\x01\x00\x40" + b"\xa0\x00\x00" + HLT)
    assert machine.go() == uapi.KVM_EXIT_MMIO
    assert mmio_of(machine) == (HOLE + 1, 1, b"\x40")
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert machine.regs.rax == 5
    assert rom[0:2] == b"\x05\x77"


@pytest.mark.spec("vm.memslot_sync", "exit.MEMORY_FAULT", "run.return_values")
def test_memory_the_host_has_not_is_efault(machine: Machine) -> None:
    emulated(machine, "turns it into MMIO")
    region = new("kvm_userspace_memory_region")
    region.slot, region.guest_phys_addr, region.memory_size = 1, HOLE, 0x1000
    region.userspace_addr = 0x2000_0000  # nothing is mapped there, and no sanitizer has its shadow there
    machine.ioctl(machine.vm, uapi.KVM_SET_USER_MEMORY_REGION, region)
    in_hole(machine, b"\xa0\x00\x00" + HLT)
    assert machine.go_errno() == EFAULT
    assert machine.run.exit_reason == uapi.KVM_EXIT_MEMORY_FAULT
    fault = machine.run.memory_fault
    assert (fault.flags, fault.gpa, fault.size) == (0, HOLE, 0x1000)
    assert machine.regs.rip == CODE
    assert machine.cap(uapi.KVM_CAP_MEMORY_FAULT_INFO) == 1


def test_a_host_fault_that_no_slot_explains_is_not_tried_for_ever(machine: Machine) -> None:
    if machine.backend.is_file:
        pytest.skip("looks inside")
    machine.start(HLT)
    vcpu = vcpu_of(machine.vcpu)
    vcpu.cpu.exit.hva = 0x2000_0000
    assert exits.handle_host_fault(vcpu) is exits.RESUME
    assert errno_of(lambda: exits.handle_host_fault(vcpu)) == EFAULT


@pytest.mark.spec("run.return_values", "run.complete_then_signal")
def test_what_a_port_gave_survives_efault(machine: Machine) -> None:
    emulated(machine, "writes to memory that is not there by MMIO")
    page = machine.add_slot(1, 0x20000, 0x1000)
    machine.start(REP_INSB + HLT, rcx=2, rdi=0, rdx=0x300)
    machine.segment("es", 0x2000)
    assert machine.go() == uapi.KVM_EXIT_IO
    machine.data[:2] = b"ab"
    # The slot goes, and comes back over memory that is not there.
    region = new("kvm_userspace_memory_region")
    region.slot = 1
    machine.ioctl(machine.vm, uapi.KVM_SET_USER_MEMORY_REGION, region)
    region.guest_phys_addr, region.memory_size = 0x20000, 0x1000
    region.userspace_addr = 0x2000_0000
    machine.ioctl(machine.vm, uapi.KVM_SET_USER_MEMORY_REGION, region)
    assert machine.go_errno() == EFAULT
    assert machine.regs.rcx == 2
    region.memory_size = 0
    machine.ioctl(machine.vm, uapi.KVM_SET_USER_MEMORY_REGION, region)
    region.memory_size = 0x1000
    region.userspace_addr = int(ffi.cast("uintptr_t", ffi.from_buffer(page)))
    machine.ioctl(machine.vm, uapi.KVM_SET_USER_MEMORY_REGION, region)
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert page[:3] == b"ab\0"


# ---- HLT, SHUTDOWN, errors -----------------------------------------------------------------------


@pytest.mark.spec("exit.HLT")
def test_hlt_is_behind_and_running_goes_on(machine: Machine) -> None:
    machine.start(HLT + b"\xe6\x10" + HLT)
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert machine.regs.rip == CODE + 1
    assert machine.go() == uapi.KVM_EXIT_IO
    assert machine.go() == uapi.KVM_EXIT_HLT


@pytest.mark.spec("exit.SHUTDOWN")
def test_triple_fault_and_a_new_life(machine: Machine) -> None:
    reset = machine.sregs
    machine.start(b"\x0f\x0b")  # ud2
    sregs = machine.sregs
    sregs.idt.limit = 0
    sregs.cr0 |= uapi.X86_CR0_PE
    sregs.cs.db = sregs.cs.type = 0
    sregs.cs.type = 0xB
    machine.set_sregs(sregs)
    assert machine.go() == uapi.KVM_EXIT_SHUTDOWN
    assert machine.regs.rip == CODE
    machine.set_sregs(reset)
    machine.start(HLT)
    assert machine.go() == uapi.KVM_EXIT_HLT


@pytest.mark.spec("exit.INTERNAL_ERROR", "exit.MMIO_fetch", "exit.emul_fail_policy", "cpu.fetch_unmapped")
def test_code_in_a_hole_is_an_emulation_error(machine: Machine) -> None:
    machine.start(HLT)
    machine.segment("cs", HOLE_SEGMENT)
    machine.set_regs(rip=0)
    assert machine.go() == uapi.KVM_EXIT_INTERNAL_ERROR
    internal = machine.run.internal
    assert internal.suberror == uapi.KVM_INTERNAL_ERROR_EMULATION
    assert internal.ndata >= 1
    emulated(machine, "queues no #UD")
    # The guest gets #UD, too, if the client runs it on.
    events = machine.events
    assert (events.exception.injected, events.exception.nr) == (1, uapi.UD_VECTOR)


@pytest.mark.spec("exit.INTERNAL_ERROR")
def test_an_event_whose_frame_is_in_a_hole_cannot_be_delivered(machine: Machine) -> None:
    emulated(machine, "writes the frame by MMIO")
    machine.start(NOP + HLT, rsp=0x100)
    machine.segment("ss", HOLE_SEGMENT)
    interrupt = new("kvm_interrupt")
    interrupt.irq = 0x20
    machine.do(uapi.KVM_INTERRUPT, interrupt)
    assert machine.go() == uapi.KVM_EXIT_INTERNAL_ERROR
    internal = machine.run.internal
    assert (internal.suberror, internal.ndata) == (uapi.KVM_INTERNAL_ERROR_DELIVERY_EV, 5)
    assert internal.data[0] == 0x8000_0020
    assert internal.data[3] & ~0xFFF == HOLE


@pytest.mark.spec("exit.FAIL_ENTRY")
def test_a_state_no_processor_can_hold(machine: Machine) -> None:
    emulated(machine, "enters it")
    machine.start(HLT)
    # RFLAGS.VM in long mode: SDM vol. 3 26.3.1.4.
    sregs = machine.sregs
    sregs.cr0 |= uapi.X86_CR0_PE | uapi.X86_CR0_PG
    sregs.cr4 |= uapi.X86_CR4_PAE
    sregs.efer = uapi.EFER_LME | uapi.EFER_LMA
    machine.set_sregs(sregs)
    machine.set_regs(rflags=uapi.X86_EFLAGS_VM)
    assert machine.go() == uapi.KVM_EXIT_FAIL_ENTRY
    assert machine.run.fail_entry.hardware_entry_failure_reason == 0x80000021
    machine.set_regs(rflags=2)


@pytest.mark.spec("exit.SET_TPR")
def test_lowering_cr8_exits_with_the_new_value(machine: Machine) -> None:
    emulated(machine, "has no exit for CR8")
    # mov %rax, %cr8 needs 64-bit mode; in real mode CR8 is reached by LOCK MOV CR0 on AMD only.
    long_mode(machine, b"\x44\x0f\x22\xc0" + HLT, rax=3)
    machine.run.cr8 = 5
    assert machine.go() == uapi.KVM_EXIT_SET_TPR
    assert machine.run.cr8 == 3
    assert machine.regs.rip == CODE + 4
    assert machine.go() == uapi.KVM_EXIT_HLT


@pytest.mark.spec("exit.SET_TPR")
def test_raising_cr8_does_not_exit(machine: Machine) -> None:
    long_mode(machine, b"\x44\x0f\x22\xc0" + HLT, rax=7)
    machine.run.cr8 = 5
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert machine.run.cr8 == 7


def long_mode(machine: Machine, code: bytes, **regs: int) -> None:
    """Run 64-bit code with the first 2 MiB mapped by one large page."""
    for at, entry in ((0x9000, 0xA007), (0xA000, 0xB007), (0xB000, 0x87)):
        machine.load(struct.pack("<Q", entry), at)
    machine.start(code)
    sregs = machine.sregs
    sregs.cr3, sregs.cr4 = 0x9000, uapi.X86_CR4_PAE
    sregs.cr0 |= uapi.X86_CR0_PE | uapi.X86_CR0_PG
    sregs.efer = uapi.EFER_LME | uapi.EFER_LMA
    for name in ("cs", "ss", "ds", "es"):
        segment, is_code = getattr(sregs, name), name == "cs"
        segment.selector, segment.base, segment.limit, segment.g = 8, 0, 0xFFFF_FFFF, 1
        segment.type, segment.l, segment.db = 0xB if is_code else 3, is_code, not is_code
    machine.set_sregs(sregs)
    machine.set_regs(**regs)


@pytest.mark.spec("exit.MMIO")
def test_eight_bytes_are_one_exit(machine: Machine) -> None:
    # mov %rax, (%rbx); mov 8(%rbx), %rcx
    long_mode(machine, b"\x48\x89\x03\x48\x8b\x4b\x08" + HLT, rax=0x1122334455667788, rbx=HOLE)
    assert machine.go() == uapi.KVM_EXIT_MMIO
    assert mmio_of(machine) == (HOLE, 8, struct.pack("<Q", 0x1122334455667788))
    assert machine.go() == uapi.KVM_EXIT_MMIO
    assert mmio_of(machine) == (HOLE + 8, 8, None)
    ffi.memmove(machine.run.mmio.data, b"01234567", 8)
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert machine.regs.rcx == int.from_bytes(b"01234567", "little")


# ---- leaving early -------------------------------------------------------------------------------


@pytest.mark.spec("run.immediate_exit", "run.order")
def test_immediate_exit_runs_nothing_and_leaves_exit_reason(machine: Machine) -> None:
    machine.start(HLT)
    assert machine.complete() == EINTR
    assert machine.run.exit_reason == POISON
    assert machine.regs.rip == CODE
    assert machine.go() == uapi.KVM_EXIT_HLT


class Later:
    """Sends a signal to the thread that made it, after a while."""

    def __init__(self, number: int, seconds: float) -> None:
        self.calls: list[int] = []
        self.number = number
        self.old = signal.signal(number, self.handler)
        target = threading.get_ident()
        self.thread = threading.Timer(seconds, lambda: signal.pthread_kill(target, number))
        self.thread.start()

    def handler(self, number: int, frame: Any) -> None:
        del frame
        self.calls.append(number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self.thread.join()
        signal.signal(self.number, self.old)


@pytest.mark.spec("run.eintr", "exit.INTR")
def test_a_signal_ends_a_spinning_guest(machine: Machine) -> None:
    machine.start(SPIN)
    with Later(signal.SIGUSR1, 0.05) as later:
        assert machine.go_errno() == EINTR
        assert machine.run.exit_reason == uapi.KVM_EXIT_INTR
        assert later.calls == [signal.SIGUSR1]
    assert machine.regs.rip == CODE


@pytest.mark.spec("run.eintr")
@pytest.mark.parametrize("way", ["delivery", "completion"])
def test_a_signal_ends_kvm_run_even_when_nothing_gets_on(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    if machine.backend.is_file:
        pytest.skip("looks inside")
    mmu = vcpu_of(machine.vcpu).vm.mmu
    if way == "completion":
        machine.start(b"\x6c" + HLT, rdx=0x60, rdi=0x3000)  # insb
        assert machine.go() == uapi.KVM_EXIT_IO
        machine.data[:1] = b"\x5a"
        mmu.unmap_gfn_range(0, 0, 16)  # what the instruction needs is gone
    else:
        machine.start(SPIN, rflags=uapi.X86_EFLAGS_IF | 2)
        machine.do(uapi.KVM_INTERRUPT, ffi.new("struct kvm_interrupt *", {"irq": 0x20}))
    with monkeypatch.context() as patch, Later(signal.SIGUSR1, 0.05):
        patch.setattr(type(mmu), "page_fault", lambda *_: RetPf.RETRY)
        assert machine.go_errno() == EINTR
    if way == "completion":
        assert machine.go() == uapi.KVM_EXIT_HLT
        assert machine.ram[0x3000] == 0x5A


@pytest.mark.spec("run.complete_then_signal")
def test_a_pending_in_is_completed_before_the_signal(machine: Machine) -> None:
    machine.start(IN_AL_DX + SPIN, rdx=0x200)
    assert machine.go() == uapi.KVM_EXIT_IO
    machine.data[0] = 0x77
    with Later(signal.SIGUSR1, 0):
        time.sleep(0.02)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        signal.raise_signal(signal.SIGUSR1)
        mask = new_sigmask(set())
        machine.do(uapi.KVM_SET_SIGNAL_MASK, mask)
        assert machine.go_errno() == EINTR
        assert machine.run.exit_reason == uapi.KVM_EXIT_INTR
        assert machine.regs.rax == 0x77
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])


def new_sigmask(blocked: set[int], length: int = 8) -> Any:
    bits = sum(1 << number - 1 for number in blocked)
    mask = ffi.new("struct kvm_signal_mask *", {"sigset": 8})
    mask.len = length
    ffi.memmove(mask.sigset, bits.to_bytes(8, "little"), 8)
    return mask


@pytest.mark.spec("vcpu.SET_SIGNAL_MASK")
def test_the_signal_mask_of_a_vcpu(machine: Machine) -> None:
    assert machine.errno(uapi.KVM_SET_SIGNAL_MASK, new_sigmask(set(), 4)) == EINVAL
    assert machine.errno(uapi.KVM_SET_SIGNAL_MASK, new_sigmask(set(), 128)) == EINVAL
    machine.start(b"\xe6\x10" + SPIN)
    with Later(signal.SIGUSR1, 0) as later:
        later.thread.join()
        # Blocked in KVM_RUN: the guest gets to its OUT although the signal is there.
        machine.do(uapi.KVM_SET_SIGNAL_MASK, new_sigmask({signal.SIGUSR1}))
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        signal.raise_signal(signal.SIGUSR1)
        assert machine.go() == uapi.KVM_EXIT_IO
        # No mask: the thread's counts, and that blocks it, too.
        machine.do(uapi.KVM_SET_SIGNAL_MASK, 0)
        assert machine.complete() == EINTR
        before = len(later.calls)
        machine.set_regs(rip=CODE)
        assert machine.go() == uapi.KVM_EXIT_IO
        assert len(later.calls) == before
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
        assert len(later.calls) == before + 1


def test_ignored_signals_do_not_end_a_run(machine: Machine) -> None:
    machine.start(b"\xb9\x00\x40\xe2\xfe" + HLT)  # mov $0x4000, %cx; loop .; hlt
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    signal.raise_signal(signal.SIGWINCH)
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_ctrl_c_reaches_python(machine: Machine) -> None:
    machine.start(SPIN)
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    target = threading.get_ident()
    timer = threading.Timer(0.05, lambda: signal.pthread_kill(target, signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            machine.go_errno()
    finally:
        timer.join()
        signal.signal(signal.SIGINT, old)
    machine.start(HLT)
    assert machine.go() == uapi.KVM_EXIT_HLT


@pytest.mark.spec("fd.vcpu_mutex")
def test_another_thread_waits_until_the_run_is_over(machine: Machine) -> None:
    machine.start(SPIN)
    took: list[float] = []

    def look() -> None:
        start = time.monotonic()
        assert machine.regs.rip == CODE
        took.append(time.monotonic() - start)

    with Later(signal.SIGUSR1, 0.2):
        other = threading.Timer(0.05, look)
        other.start()
        assert machine.go_errno() == EINTR
        other.join()
    assert took[0] > 0.05


@pytest.mark.spec("fd.first_slow")
def test_any_thread_may_run_a_vcpu(machine: Machine) -> None:
    machine.start(HLT)
    reasons: list[int] = []
    thread = threading.Thread(target=lambda: reasons.append(machine.go()))
    thread.start()
    thread.join()
    assert reasons == [uapi.KVM_EXIT_HLT]


def test_two_vcpus_run_guest_code_at_the_same_time(machine: Machine) -> None:
    """Each spins until the other has stored to memory: one at a time they would never end."""
    other = machine.ioctl(machine.vm, uapi.KVM_CREATE_VCPU, 1)
    # incb (%si); cmpb $0, (%di); je .-3; hlt
    code = b"\xfe\x04\x80\x3d\x00\x74\xfb" + HLT
    machine.load(code)
    machine.start(code, rsi=0x2000, rdi=0x2001)
    sregs, regs = machine.sregs, machine.regs
    regs.rsi, regs.rdi = 0x2001, 0x2000
    machine.ioctl(other, uapi.KVM_SET_SREGS, sregs)
    machine.ioctl(other, uapi.KVM_SET_REGS, regs)
    thread = threading.Thread(target=lambda: machine.ioctl(other, uapi.KVM_RUN))
    thread.start()
    assert machine.go() == uapi.KVM_EXIT_HLT
    thread.join(20)
    assert not thread.is_alive()


# ---- interrupts by hand --------------------------------------------------------------------------


@pytest.mark.spec("run.irq_window", "exit.IRQ_WINDOW_OPEN", "vcpu.INTERRUPT")
def test_the_window_opens_behind_the_shadow_of_sti(machine: Machine) -> None:
    emulated(machine, "looks at windows between batches of instructions")
    machine.start(NOP + b"\xfb" + NOP + SPIN)
    machine.load(struct.pack("<HH", 0x3000, 0), 0x20 * 4)
    machine.load(HLT, 0x3000)
    machine.run.request_interrupt_window = 1
    assert machine.go() == uapi.KVM_EXIT_IRQ_WINDOW_OPEN
    assert machine.regs.rip == CODE + 3
    assert (machine.run.if_flag, machine.run.ready_for_interrupt_injection) == (1, 1)
    machine.run.request_interrupt_window = 0
    interrupt = new("kvm_interrupt")
    interrupt.irq = 0x20
    machine.do(uapi.KVM_INTERRUPT, interrupt)
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert machine.regs.rip == 0x3001
    assert struct.unpack_from("<HHH", machine.ram, 0x8000 - 6) == (CODE + 3, 0, 0x202)


@pytest.mark.spec("run.irq_window")
def test_an_open_window_exits_before_anything_runs(machine: Machine) -> None:
    emulated(machine, "looks at windows between batches of instructions")
    machine.start(OUT_DX_AL + HLT, rflags=0x202)
    machine.run.request_interrupt_window = 1
    assert machine.go() == uapi.KVM_EXIT_IRQ_WINDOW_OPEN
    assert machine.regs.rip == CODE


@pytest.mark.spec("vcpu.INTERRUPT")
def test_interrupt_vectors(machine: Machine) -> None:
    interrupt = new("kvm_interrupt")
    for bad in (256, 0xFFFF_FFFF):
        interrupt.irq = bad
        assert machine.errno(uapi.KVM_INTERRUPT, interrupt) == EINVAL
    for vector in (0x30, 0x31):
        interrupt.irq = vector
        machine.do(uapi.KVM_INTERRUPT, interrupt)
    assert machine.events.interrupt.nr == 0x31
    assert machine.sregs.interrupt_bitmap[0] == 1 << 0x31


@pytest.mark.spec("vcpu.NMI", "cpu.nmi_blocking")
def test_an_nmi_blocks_the_next_until_iret(machine: Machine) -> None:
    emulated(machine, "does not see the window that IRET opens")
    machine.start(NOP + HLT)
    machine.load(struct.pack("<HH", 0x3000, 0), 2 * 4)
    machine.load(b"\xe6\x99\xcf", 0x3000)  # out %al, $0x99; iret
    machine.do(uapi.KVM_NMI)
    machine.do(uapi.KVM_NMI)
    machine.do(uapi.KVM_NMI)
    assert machine.events.nmi.pending == 2
    assert machine.go() == uapi.KVM_EXIT_IO
    assert (machine.events.nmi.masked, machine.events.nmi.pending) == (1, 1)
    machine.do(uapi.KVM_NMI)
    assert machine.events.nmi.pending == 1
    assert machine.go() == uapi.KVM_EXIT_IO  # the second, right after the first one's IRET
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert machine.events.nmi.masked == 0
    assert machine.regs.rip == CODE + 2


# ---- hypercalls and OSI --------------------------------------------------------------------------

VMCALL, VMMCALL = b"\x0f\x01\xc1", b"\x0f\x01\xd9"
MAGIC = {"rax": 0x1137_24FA, "rbx": 0x7781_0F9B}
ENOSYS_32 = -uapi.KVM_ENOSYS & 0xFFFF_FFFF


@pytest.mark.spec("hc.abi", "hc.VAPIC_POLL_IRQ", "hc.MMU_OP", "cap.quirk_hypercall")
@pytest.mark.parametrize("instruction", [VMCALL, VMMCALL])
@pytest.mark.parametrize(("number", "result"), [(1, 0), (2, ENOSYS_32), (12, ENOSYS_32), (4711, ENOSYS_32)])
def test_hypercall_results(machine: Machine, instruction: bytes, number: int, result: int) -> None:
    emulated(machine, "may have no VMCALL")
    machine.start(instruction + HLT, rax=number)
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert machine.regs.rax == result
    assert machine.regs.rip == CODE + 4


@pytest.mark.spec("hc.abi")
def test_hypercalls_are_the_kernels_only(machine: Machine) -> None:
    emulated(machine, "may have no VMCALL")
    long_mode(machine, VMCALL + b"\xeb\xfe", rax=1)
    sregs = machine.sregs
    sregs.cs.selector = sregs.ss.selector = 0x1B
    sregs.cs.dpl = sregs.ss.dpl = 3
    machine.set_sregs(sregs)
    with Later(signal.SIGUSR1, 0.05):
        assert machine.go_errno() == EINTR
    assert machine.regs.rax == -uapi.KVM_EPERM & 0xFFFF_FFFF_FFFF_FFFF


@pytest.mark.spec("exit.HYPERCALL", "hc.MAP_GPA_RANGE", "cap.EXIT_HYPERCALL")
def test_a_hypercall_for_the_client(machine: Machine) -> None:
    emulated(machine, "may have no VMCALL")
    assert machine.cap(uapi.KVM_CAP_EXIT_HYPERCALL) == 1 << 12
    with pytest.raises(OSError) as refused:
        machine.enable(machine.vm, uapi.KVM_CAP_EXIT_HYPERCALL, 1 << 5)
    assert refused.value.errno == EINVAL
    machine.enable(machine.vm, uapi.KVM_CAP_EXIT_HYPERCALL, 1 << 12)
    machine.start(VMCALL + HLT, rax=12, rbx=0x2000, rcx=1, rdx=0x10)
    assert machine.go() == uapi.KVM_EXIT_HYPERCALL
    call = machine.run.hypercall
    assert (call.nr, list(call.args)[:3], call.ret, call.flags) == (12, [0x2000, 1, 0x10], 0, 0)
    assert machine.regs.rip == CODE
    call.ret = 0x1_0000_0016
    assert machine.complete() == EINTR
    assert (machine.regs.rax, machine.regs.rip) == (0x16, CODE + 3)
    machine.start(VMCALL + HLT, rax=12, rbx=0x2001, rcx=1)
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert machine.regs.rax == -uapi.KVM_EINVAL & 0xFFFF_FFFF


@pytest.mark.spec("osi.cap_default", "cap.foreign")
def test_osi_is_off_unless_asked_for(machine: Machine) -> None:
    assert machine.cap(uapi.KVM_CAP_PPC_OSI) == 0
    with pytest.raises(OSError, match=r"EINVAL|Invalid"):
        machine.enable(machine.vcpu, uapi.KVM_CAP_PPC_OSI)


@pytest.fixture
def osi(new_machine: NewMachine, machine: Machine) -> Machine:
    if machine.backend.real:
        pytest.skip("an extension of pykvm's")
    return new_machine(extensions=("x86-osi",))


@pytest.mark.spec("osi.enable", "osi.trigger", "exit.OSI", "osi.exit_layout", "osi.complete")
def test_an_osi_call_shows_and_takes_all_registers(osi: Machine) -> None:
    assert osi.cap(uapi.KVM_CAP_PPC_OSI) == 1
    osi.start(VMCALL + HLT, **MAGIC, rcx=5, rdx=6, rsp=0x7000, rsi=8)
    # Not enabled: an ordinary hypercall that nobody knows.
    assert osi.go() == uapi.KVM_EXIT_HLT
    assert osi.regs.rax == ENOSYS_32
    osi.enable(osi.vcpu, uapi.KVM_CAP_PPC_OSI, 1, 2, 3)
    osi.enable(osi.vcpu, uapi.KVM_CAP_PPC_OSI)
    osi.set_regs(rip=CODE, r15=0xF, **MAGIC)
    assert osi.go() == uapi.KVM_EXIT_OSI
    gprs = list(osi.run.osi.gprs)
    assert gprs[:8] == [MAGIC["rax"], 5, 6, MAGIC["rbx"], 0x7000, 0, 8, 0]
    assert gprs[15] == 0xF
    assert gprs[16:18] == [CODE + 3, osi.regs.rflags]
    assert not any(gprs[18:])
    osi.run.osi.gprs[0] = 0xFFFF_FFFF_0000_002A
    osi.run.osi.gprs[1] = 0x77
    osi.run.osi.gprs[16] = 0x4000
    assert osi.go() == uapi.KVM_EXIT_HLT
    assert (osi.regs.rax, osi.regs.rcx, osi.regs.rip) == (0x2A, 0x77, CODE + 4)


@pytest.mark.spec("osi.order_rule", "osi.complete", "run.order", "run.complete_then_signal")
def test_an_osi_call_is_completed_before_immediate_exit(osi: Machine) -> None:
    osi.enable(osi.vcpu, uapi.KVM_CAP_PPC_OSI)
    osi.start(VMMCALL + HLT, **MAGIC)
    assert osi.go() == uapi.KVM_EXIT_OSI
    osi.run.osi.gprs[0], osi.run.osi.gprs[6] = 0x11, 0x66
    osi.load(HLT, 0x2000)
    osi.set_regs(rip=0x2000, rsi=0x99)
    assert osi.complete() == EINTR
    regs = osi.regs
    assert (regs.rax, regs.rsi, regs.rip) == (0x11, 0x66, 0x2000)


@pytest.mark.spec("osi.trigger")
def test_osi_needs_both_halves_of_the_magic(osi: Machine) -> None:
    osi.enable(osi.vcpu, uapi.KVM_CAP_PPC_OSI)
    for wrong in ({"rax": MAGIC["rax"], "rbx": 0}, {"rax": 1, "rbx": MAGIC["rbx"]}):
        osi.start(VMCALL + HLT, **wrong)
        assert osi.go() == uapi.KVM_EXIT_HLT
    high = {name: value | 0xAAAA_0000_0000_0000 for name, value in MAGIC.items()}
    osi.start(VMCALL + HLT, **high)
    assert osi.go() == uapi.KVM_EXIT_OSI


@pytest.mark.spec("osi.trigger", "exit.OSI")
def test_osi_calls_come_from_user_mode_too(osi: Machine) -> None:
    osi.enable(osi.vcpu, uapi.KVM_CAP_PPC_OSI)
    long_mode(osi, VMCALL + b"\xeb\xfe", **MAGIC)
    sregs = osi.sregs
    sregs.cs.selector = sregs.ss.selector = 0x1B
    sregs.cs.dpl = sregs.ss.dpl = 3
    osi.set_sregs(sregs)
    assert osi.go() == uapi.KVM_EXIT_OSI
    osi.run.osi.gprs[0] = 0xFFFF_FFFF_0000_002A
    assert osi.complete() == EINTR
    assert osi.regs.rax == 0xFFFF_FFFF_0000_002A


@pytest.mark.spec("osi.enable")
def test_osi_is_per_vcpu(osi: Machine) -> None:
    osi.enable(osi.vcpu, uapi.KVM_CAP_PPC_OSI)
    other = osi.ioctl(osi.vm, uapi.KVM_CREATE_VCPU, 1)
    osi.start(VMCALL + HLT, **MAGIC)
    osi.ioctl(other, uapi.KVM_SET_SREGS, osi.sregs)
    osi.ioctl(other, uapi.KVM_SET_REGS, osi.regs)
    osi.ioctl(other, uapi.KVM_RUN)
    regs = new("kvm_regs")
    osi.ioctl(other, uapi.KVM_GET_REGS, regs)
    assert regs.rax == ENOSYS_32
