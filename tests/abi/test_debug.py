"""Debugging of the guest by the client: steps, breakpoints, injection."""

from __future__ import annotations

import struct
from errno import EBUSY

import pytest

from pykvm import uapi
from pykvm.abi import new
from tests.machine import CODE, Machine, emulated

ENABLE, STEP = uapi.KVM_GUESTDBG_ENABLE, uapi.KVM_GUESTDBG_SINGLESTEP
SW_BP, HW_BP = uapi.KVM_GUESTDBG_USE_SW_BP, uapi.KVM_GUESTDBG_USE_HW_BP
HLT, NOP = b"\xf4", b"\x90"
ACTIVE_LOW = 0xFFFF0FF0
DR7_FIXED = 0x400


def debug(machine: Machine, control: int, *addresses: int, dr7: int = 0) -> int:
    """Do KVM_SET_GUEST_DEBUG; return its errno."""
    request = new("kvm_guest_debug")
    request.control = control
    for at, address in enumerate(addresses):
        request.arch.debugreg[at] = address
    request.arch.debugreg[7] = dr7
    return machine.errno(uapi.KVM_SET_GUEST_DEBUG, request)


def go_debug(machine: Machine) -> tuple[int, int, int]:
    """Run to a DEBUG exit; return (exception, pc, dr6)."""
    assert machine.go() == uapi.KVM_EXIT_DEBUG
    arch = machine.run.debug.arch
    return arch.exception, arch.pc, arch.dr6


@pytest.mark.spec("vcpu.SET_GUEST_DEBUG", "exit.DEBUG", "cpu.guest_vs_host_debug", "cap.SET_GUEST_DEBUG2")
def test_single_steps_leave_no_trace(machine: Machine) -> None:
    machine.start(NOP * 3 + HLT)
    assert debug(machine, ENABLE | STEP) == 0
    assert machine.regs.rflags == 2
    for n in range(1, 4):
        assert go_debug(machine) == (uapi.DB_VECTOR, CODE + n, ACTIVE_LOW | uapi.DR6_BS)
    assert machine.regs.rflags == 2
    debugregs = machine.get(uapi.KVM_GET_DEBUGREGS, "kvm_debugregs")
    assert (debugregs.dr6, debugregs.dr7) == (ACTIVE_LOW, DR7_FIXED)
    assert debug(machine, 0) == 0
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert machine.cap(uapi.KVM_CAP_SET_GUEST_DEBUG2) == 0x1F0003


@pytest.mark.spec("vcpu.SET_GUEST_DEBUG", "exit.DEBUG")
def test_a_step_over_what_exits(machine: Machine) -> None:
    emulated(machine, "answers such a step late")
    machine.start(b"\xe6\x10" + b"\x0f\xa2" + HLT)  # out %al, $0x10; cpuid; hlt
    assert debug(machine, ENABLE | STEP) == 0
    assert machine.go() == uapi.KVM_EXIT_IO
    assert go_debug(machine)[1] == CODE + 2
    assert go_debug(machine)[1] == CODE + 4


@pytest.mark.spec("vcpu.SET_GUEST_DEBUG", "exit.DEBUG")
def test_software_breakpoints(machine: Machine) -> None:
    emulated(machine, "cannot do INT3 with it")
    machine.start(NOP + b"\xcc" + HLT)
    assert debug(machine, ENABLE | SW_BP) == 0
    assert go_debug(machine)[:2] == (uapi.BP_VECTOR, CODE + 1)
    assert machine.regs.rip == CODE + 1
    assert machine.events.exception.injected == 0
    # Without it INT3 is the guest's.
    assert debug(machine, ENABLE) == 0
    machine.load(struct.pack("<HH", 0x3000, 0), uapi.BP_VECTOR * 4)
    machine.load(HLT, 0x3000)
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert machine.regs.rip == 0x3001


@pytest.mark.spec("vcpu.SET_GUEST_DEBUG", "exit.DEBUG", "cpu.guest_vs_host_debug", "vcpu.GET_DEBUGREGS")
def test_hardware_breakpoints_are_hidden(machine: Machine) -> None:
    machine.start(NOP * 3 + HLT)
    assert debug(machine, ENABLE | HW_BP, CODE + 2, dr7=0x402) == 0
    debugregs = machine.get(uapi.KVM_GET_DEBUGREGS, "kvm_debugregs")
    assert (list(debugregs.db), debugregs.dr7) == ([0] * 4, DR7_FIXED)
    assert go_debug(machine) == (uapi.DB_VECTOR, CODE + 2, ACTIVE_LOW | uapi.DR6_B0)
    assert machine.regs.rip == CODE + 2
    assert debug(machine, 0) == 0
    assert machine.go() == uapi.KVM_EXIT_HLT


@pytest.mark.spec("vcpu.SET_GUEST_DEBUG", "cpu.guest_vs_host_debug")
def test_the_guest_keeps_its_own_registers(machine: Machine) -> None:
    emulated(machine, "does not keep two sets")
    # mov %eax, %dr0; mov %dr0, %ecx; mov %dr7, %edx; hlt
    machine.start(b"\x0f\x23\xc0" + b"\x0f\x21\xc1" + b"\x0f\x21\xfa" + HLT, rax=0x1234)
    assert debug(machine, ENABLE | HW_BP, 0x5000, dr7=0x402) == 0
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert (machine.regs.rcx, machine.regs.rdx) == (0x1234, DR7_FIXED)
    assert machine.get(uapi.KVM_GET_DEBUGREGS, "kvm_debugregs").db[0] == 0x1234
    # They come back into use when the client is done.
    assert debug(machine, 0) == 0
    machine.start(b"\x0f\x21\xc1" + HLT, rcx=0)
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert machine.regs.rcx == 0x1234


@pytest.mark.spec("vcpu.SET_GUEST_DEBUG")
def test_injection(machine: Machine) -> None:
    machine.start(NOP + HLT)
    machine.load(struct.pack("<HH", 0x3000, 0), uapi.BP_VECTOR * 4)
    machine.load(b"\xe6\x99\xf4", 0x3000)
    assert debug(machine, ENABLE | uapi.KVM_GUESTDBG_INJECT_BP) == 0
    assert debug(machine, ENABLE | uapi.KVM_GUESTDBG_INJECT_BP) == EBUSY
    assert machine.go() == uapi.KVM_EXIT_IO
    assert machine.run.io.port == 0x99
    assert struct.unpack_from("<H", machine.ram, 0x8000 - 6)[0] == CODE


@pytest.mark.spec("vcpu.SET_GUEST_DEBUG")
def test_nmis_wait_while_they_are_blocked(machine: Machine) -> None:
    emulated(machine, "lets the NMI in")
    machine.start(NOP * 2 + HLT)
    machine.load(struct.pack("<HH", 0x3000, 0), uapi.NMI_VECTOR * 4)
    machine.load(HLT, 0x3000)
    machine.do(uapi.KVM_NMI)
    assert debug(machine, ENABLE | STEP | uapi.KVM_GUESTDBG_BLOCKIRQ) == 0
    assert go_debug(machine)[1] == CODE + 1
    assert debug(machine, 0) == 0
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert machine.regs.rip == 0x3001
    assert struct.unpack_from("<H", machine.ram, 0x8000 - 6)[0] == CODE + 1


@pytest.mark.spec("vcpu.SET_GUEST_DEBUG", "smm.entry")
def test_smis_wait_while_they_are_blocked(machine: Machine) -> None:
    if not machine.cap(uapi.KVM_CAP_X86_SMM):
        pytest.skip("a kernel without CONFIG_KVM_SMM")
    machine.start(NOP * 2 + HLT)
    assert debug(machine, ENABLE | STEP | uapi.KVM_GUESTDBG_BLOCKIRQ) == 0
    machine.do(uapi.KVM_SMI)
    assert go_debug(machine)[1] == CODE + 1
    assert (machine.events.smi.smm, machine.events.smi.pending) == (0, 1)
    machine.add_slot(1 << 16, 0x30000, 0x10000)[0x8000:0x8003] = b"\xe6\x99\xf4"
    assert debug(machine, 0) == 0
    assert machine.go() == uapi.KVM_EXIT_IO
    assert machine.run.flags & uapi.KVM_RUN_X86_SMM


@pytest.mark.spec("vcpu.SET_GUEST_DEBUG", "vcpu.SET_DEBUGREGS", "cpu.guest_vs_host_debug")
def test_delivery_of_db_ends_the_guests_general_detect(machine: Machine) -> None:
    emulated(machine, "has no breakpoints")
    machine.enable(machine.vm, uapi.KVM_CAP_EXCEPTION_PAYLOAD, 1)
    machine.start(NOP + HLT)
    machine.load(struct.pack("<HH", 0x3000, 0), uapi.DB_VECTOR * 4)
    machine.load(HLT, 0x3000)
    debugregs = machine.get(uapi.KVM_GET_DEBUGREGS, "kvm_debugregs")
    debugregs.dr7 = DR7_FIXED | uapi.DR7_GD
    machine.do(uapi.KVM_SET_DEBUGREGS, debugregs)
    assert debug(machine, ENABLE | HW_BP, dr7=DR7_FIXED) == 0
    events = machine.events
    events.flags, events.exception.pending = uapi.KVM_VCPUEVENT_VALID_PAYLOAD, 1
    events.exception.nr = uapi.DB_VECTOR
    machine.set_events(events)
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert machine.get(uapi.KVM_GET_DEBUGREGS, "kvm_debugregs").dr7 == DR7_FIXED
