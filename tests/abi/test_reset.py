"""INIT, by the way a client meets it without a local APIC in the kernel: a shutdown of an AMD processor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pykvm import uapi
from pykvm.abi import new, to_bytes
from tests.snapshot import supported_cpuid

if TYPE_CHECKING:
    from tests.conftest import NewMachine
    from tests.machine import Machine

UD2 = b"\x0f\x0b"


def shut_down(machine: Machine, cpuid: object = None) -> None:
    """Give a vCPU a state of its own everywhere and have it shut down in real mode: no IDT, and #UD."""
    if machine.backend.real:
        pytest.skip("the real device has one processor")
    machine.do(uapi.KVM_SET_CPUID2, cpuid or supported_cpuid(machine))
    debug, fpu, events = new("kvm_debugregs"), new("kvm_fpu"), machine.events
    debug.db[0], debug.dr6, debug.dr7 = 0x1234, 0xFFFF0FF1, 0x400
    machine.do(uapi.KVM_SET_DEBUGREGS, debug)
    fpu.fcw, fpu.xmm[3][0] = 0x27F, 0x5A
    machine.do(uapi.KVM_SET_FPU, fpu)
    assert machine.set_msr(uapi.MSR_STAR, 0x1111)
    assert machine.set_msr(uapi.MSR_IA32_CR_PAT, 0x0606)
    assert machine.set_msr(uapi.MSR_KVM_SYSTEM_TIME_NEW, 0x9001)
    assert machine.set_msr(uapi.MSR_KVM_STEAL_TIME, 0xA001)
    xcrs = new("kvm_xcrs")
    xcrs.nr_xcrs, xcrs.xcrs[0].value = 1, 3
    machine.do(uapi.KVM_SET_XCRS, xcrs)
    machine.start(UD2, rax=0x77, r9=0x99, rflags=0x202)
    sregs = machine.sregs
    sregs.idt.limit, sregs.cr2, sregs.cr3, sregs.cr4 = 0, 0x5000, 0x6000, uapi.X86_CR4_PAE
    sregs.cr0 = 0x4000_0010
    machine.set_sregs(sregs)
    events = machine.events
    events.nmi.masked, events.nmi.pending, events.flags = 1, 1, uapi.KVM_VCPUEVENT_VALID_NMI_PENDING
    machine.set_events(events)
    assert machine.go() == uapi.KVM_EXIT_SHUTDOWN


@pytest.mark.spec("exit.SHUTDOWN", "vcpu.init_state", "vcpu.reset_state")
def test_a_shutdown_of_amd_is_an_init(new_machine: NewMachine) -> None:
    fresh, machine = new_machine(cpu="epyc"), new_machine(cpu="epyc")
    cpuid = supported_cpuid(fresh)
    signature = next(e.eax for e in cpuid.entries[0 : cpuid.nent] if e.function == 1)
    shut_down(machine)
    wanted = fresh.regs
    wanted.rdx = signature
    assert to_bytes(machine.regs) == to_bytes(wanted)
    reset = fresh.sregs
    # Caches stay on or off.
    reset.cr0 = 0x4000_0010
    assert to_bytes(machine.sregs) == to_bytes(reset)
    assert to_bytes(machine.events) == to_bytes(fresh.events)
    regs, wanted_regs = (each.get(uapi.KVM_GET_DEBUGREGS, "kvm_debugregs") for each in (machine, fresh))
    assert to_bytes(regs) == to_bytes(wanted_regs)


@pytest.mark.spec("exit.SHUTDOWN", "vcpu.init_state")
def test_what_an_init_leaves_alone(new_machine: NewMachine) -> None:
    machine = new_machine(cpu="epyc")
    shut_down(machine)
    fpu = machine.get(uapi.KVM_GET_FPU, "kvm_fpu")
    assert (fpu.fcw, fpu.xmm[3][0]) == (0x27F, 0x5A)
    assert machine.get(uapi.KVM_GET_XCRS, "kvm_xcrs").xcrs[0].value == 3
    assert machine.get_msr(uapi.MSR_STAR) == 0x1111
    assert machine.get_msr(uapi.MSR_IA32_CR_PAT) == 0x0606
    assert machine.get_msr(uapi.MSR_IA32_APICBASE) == 0xFEE00900
    # But what a guest told KVM of itself is gone.
    for index in (uapi.MSR_KVM_SYSTEM_TIME_NEW, uapi.MSR_KVM_STEAL_TIME):
        assert machine.get_msr(index) == 0
    assert machine.ram[0x9000:0x9004] != bytes(4)
    machine.ram[0x9000:0x9020] = bytes(32)
    # And it runs from the reset vector, where there is no memory.
    assert machine.go() == uapi.KVM_EXIT_INTERNAL_ERROR
    assert machine.ram[0x9000:0x9020] == bytes(32)


@pytest.mark.spec("exit.SHUTDOWN")
def test_a_shutdown_of_intel_leaves_all_as_it_was(new_machine: NewMachine) -> None:
    machine = new_machine(cpu="skylake")
    shut_down(machine)
    regs, sregs = machine.regs, machine.sregs
    assert (regs.rip, regs.rax, regs.r9, regs.rflags & 0x200) == (0x1000, 0x77, 0x99, 0x200)
    assert (sregs.cr2, sregs.cr3, sregs.idt.limit, sregs.cs.base) == (0x5000, 0x6000, 0, 0)
    assert machine.get_msr(uapi.MSR_KVM_STEAL_TIME) == 0xA001


@pytest.mark.spec("vcpu.init_state", "vcpu.SET_GUEST_DEBUG")
def test_an_init_leaves_the_clients_breakpoints(new_machine: NewMachine) -> None:
    machine = new_machine(cpu="epyc")
    if machine.backend.real:
        pytest.skip("the real device has one processor")
    debug = new("kvm_guest_debug")
    debug.control = uapi.KVM_GUESTDBG_ENABLE | uapi.KVM_GUESTDBG_USE_HW_BP
    debug.arch.debugreg[0], debug.arch.debugreg[7] = 0x3000, 0x401
    machine.do(uapi.KVM_SET_GUEST_DEBUG, debug)
    shut_down(machine)
    assert machine.get(uapi.KVM_GET_DEBUGREGS, "kvm_debugregs").dr7 == 0x400
    machine.start(b"\x90\xf4", rip=0x3000)
    assert machine.go() == uapi.KVM_EXIT_DEBUG
    assert machine.run.debug.arch.pc == 0x3000
