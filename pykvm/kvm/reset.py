"""INIT: what it changes of a vCPU and what it leaves alone; and shutdown, which on AMD's brings one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pykvm.abi import lib, uapi
from pykvm.kvm import debug, steal_time
from pykvm.kvm.cpuid import EAX
from pykvm.kvm.events import Events
from pykvm.kvm.exits import Outcome, on_exit, shutdown

if TYPE_CHECKING:
    from pykvm.kvm.vcpu import Vcpu

_RDX = 2
# Registers of guests that do not know yet that they are guests: off again. And SMIs are counted anew.
_CLEARED = (
    uapi.MSR_KVM_ASYNC_PF_EN,
    uapi.MSR_KVM_ASYNC_PF_INT,
    uapi.MSR_KVM_STEAL_TIME,
    uapi.MSR_SMI_COUNT,
)


def init(vcpu: Vcpu) -> None:
    """Put a vCPU into the state after INIT (kvm_vcpu_reset with init_event).

    Floating-point state, XCR0, CR0.CD and NW, the TSC and most model-specific registers stay as they are.
    """
    if vcpu.as_id:
        vcpu.smm_changed(entering=False)
    breakpoints = debug.take_breakpoints(vcpu)
    vcpu.cpu.reset(init=True)
    debug.put_breakpoints(vcpu, breakpoints)
    vcpu.events = Events()
    vcpu.events.requested = True
    version = vcpu.cpuid.find(1)
    if version is not None:
        vcpu.cpu.gpr[_RDX] = version.registers[EAX]
    vcpu.reset_segments()
    for index in _CLEARED:
        vcpu.msrs.values[index] = 0
    steal_time.enable(vcpu, 0)
    vcpu.clock.system_time = 0
    vcpu.clock.guest_stopped = False
    vcpu.cpu.flush_tlb()
    vcpu.vm.mmu.reset_context(vcpu)


@on_exit(lib.EXIT_TRIPLE_FAULT)
def handle_triple_fault(vcpu: Vcpu) -> Outcome:
    """Shut down; on Intel's the state stays as it was at the fault, AMD's is undefined and INIT follows.

    An exit by triple fault is not one during event delivery (SDM vol. 3 28.2.4): the event is gone.
    Source: vmx.c handle_triple_fault, svm.c shutdown_interception
    """
    events = vcpu.events
    events.exception_injected = events.nmi_injected = events.interrupt_injected = False
    if vcpu.vm.processor.is_amd:
        init(vcpu)
    return shutdown(vcpu)
