"""What a processor has that only ioctls show: A20, machine checks, traps that an exit interrupts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pykvm import uapi
from pykvm.abi import ffi, new
from tests.machine import CODE, HOLE, STACK, emulated

if TYPE_CHECKING:
    from tests.machine import Machine

MC, DB = 18, 1
TF, IF = 0x100, 0x200
HLT = b"\xf4"
HANDLER = 0x3000
MCIP = 4
VALID, UNCORRECTED, ENABLED = 1 << 63, 1 << 61, 1 << 60


def handler(machine: Machine, vector: int, code: bytes = HLT) -> None:
    """Real mode: the vector leads to code at HANDLER + 0x100 * vector."""
    at = HANDLER + 0x20 * vector
    machine.load(at.to_bytes(4, "little"), 4 * vector)
    machine.load(code, at)


# ---- A20


@pytest.mark.spec("cpu.a20")
@pytest.mark.parametrize("wraps", [False, True])
def test_a20_is_the_clients(machine: Machine, wraps: bool) -> None:
    """The processor has 1 MiB and 64 KiB in real mode; a PC without A20 maps the first page there, too."""
    if wraps:
        region = new("kvm_userspace_memory_region")
        region.slot, region.guest_phys_addr, region.memory_size = 1, 0x100000, 0x10000
        region.userspace_addr = int(ffi.cast("uintptr_t", ffi.from_buffer(machine.ram)))
        machine.ioctl(machine.vm, uapi.KVM_SET_USER_MEMORY_REGION, region)
    else:
        machine.add_slot(1, 0x100000, 0x10000)
    # mov ax, 0xffff; mov ds, ax; mov byte [0x510], 0x5a; hlt
    machine.start(b"\xb8\xff\xff\x8e\xd8\xc6\x06\x10\x05\x5a" + HLT)
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert machine.ram[0x500] == (0x5A if wraps else 0)
    assert wraps or machine.memories[1][0x500] == 0x5A


# ---- machine checks


def inject(machine: Machine, status: int) -> None:
    mce = new("kvm_x86_mce")
    mce.status, mce.mcg_status, mce.addr, mce.bank = VALID | ENABLED | status, MCIP, 0x1234, 2
    machine.do(uapi.KVM_X86_SET_MCE, mce)


def with_banks(machine: Machine, *, enabled: bool = True) -> None:
    cap = ffi.new("uint64_t *", 10 | uapi.MCG_CTL_P)
    machine.do(uapi.KVM_X86_SETUP_MCE, cap)
    sregs = machine.sregs
    sregs.cr4 = uapi.X86_CR4_MCE if enabled else 0
    machine.set_sregs(sregs)


@pytest.mark.spec("cpu.mce", "cpu.vectors")
def test_uncorrected_error_is_an_exception_of_the_guest(machine: Machine) -> None:
    """An abort: rip is that of the next instruction.  The guest reads the bank and clears MCIP."""
    machine.start(b"\x90" + HLT)
    with_banks(machine)
    # mov ecx, MCG_STATUS; rdmsr; mov ebx, eax; xor eax, eax; wrmsr; hlt
    read = b"\x66\xb9\x7a\x01\x00\x00\x0f\x32\x66\x89\xc3\x66\x31\xc0\x0f\x30" + HLT
    handler(machine, MC, read)
    inject(machine, UNCORRECTED)
    assert machine.go() == uapi.KVM_EXIT_HLT
    regs = machine.regs
    assert (regs.rip, regs.rbx) == (HANDLER + 0x20 * MC + len(read), MCIP)
    assert regs.rsp == STACK - 6
    assert int.from_bytes(machine.ram[STACK - 6 : STACK - 4], "little") == CODE
    # Another one may come now.
    inject(machine, UNCORRECTED)
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert machine.regs.rsp == STACK - 12


@pytest.mark.spec("cpu.mce")
@pytest.mark.parametrize("why", ["mcip", "cr4"])
def test_machine_check_that_cannot_be_taken_is_a_shutdown(machine: Machine, why: str) -> None:
    """SDM vol. 3 15.8: MCIP is set already, or CR4.MCE is clear."""
    machine.start(HLT * 4)
    with_banks(machine, enabled=why != "cr4")
    handler(machine, MC)
    if why == "mcip":
        inject(machine, UNCORRECTED)
        assert machine.go() == uapi.KVM_EXIT_HLT
    inject(machine, UNCORRECTED)
    assert machine.go() == uapi.KVM_EXIT_SHUTDOWN


@pytest.mark.spec("cpu.mce")
def test_corrected_error_is_only_recorded(machine: Machine) -> None:
    machine.start(HLT)
    with_banks(machine)
    handler(machine, MC)
    inject(machine, 0)
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert machine.regs.rip == CODE + 1


# ---- traps and exits


@pytest.mark.spec("cpu.tf", "cpu.int_priority")
@pytest.mark.parametrize("code", [b"\xe6\x80", b"\xe4\x80", b"\xa2\x00\x00", b"\xa0\x00\x00"])
def test_trap_of_an_instruction_that_exited_comes_before_an_interrupt(machine: Machine, code: bytes) -> None:
    """OUT, IN and MMIO with TF: #DB first, then the interrupt that the client injects meanwhile."""
    if code[0] in {0xE4, 0xA0}:
        emulated(machine, "traps one instruction later when data had to come in")
    machine.start(code + b"\x90" + HLT, rflags=TF | IF | 2)
    machine.segment("ds", HOLE >> 4)
    handler(machine, DB, b"\xcf")
    handler(machine, 0x20)
    machine.run.request_interrupt_window = 0
    machine.go()
    injected = False
    for _ in range(10):
        if machine.run.ready_for_interrupt_injection and not injected:
            interrupt = new("kvm_interrupt")
            interrupt.irq = 0x20
            machine.do(uapi.KVM_INTERRUPT, interrupt)
            injected = True
        machine.run.request_interrupt_window = not injected
        if machine.go() == uapi.KVM_EXIT_HLT:
            break
    assert machine.regs.rip == HANDLER + 0x20 * 0x20 + 1
    frame = machine.ram[STACK - 6 : STACK]
    # The #DB handler has returned when the interrupt came; its frame lies on that of the interrupt.
    assert int.from_bytes(frame[0:2], "little") == CODE + len(code)
