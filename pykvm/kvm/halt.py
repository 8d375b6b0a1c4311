"""HLT and PAUSE: an exit, or with KVM_CAP_X86_DISABLE_EXITS the guest's own affair.

A processor whose HLT does not exit waits for an event, inside KVM_RUN and over several of them; with no
local APIC in the kernel that event comes between two KVM_RUNs, which only a signal ends.
"""

from __future__ import annotations

import time
from errno import EINVAL, EIO
from typing import TYPE_CHECKING

from pykvm.abi import lib, uapi
from pykvm.abi.errors import KvmError
from pykvm.kvm.caps import Args, vm_cap
from pykvm.kvm.exits import RESUME, USERSPACE, Outcome, on_exit

if TYPE_CHECKING:
    from pykvm.kvm.vcpu import Vcpu
    from pykvm.kvm.vm import Vm

# PAUSE never exits here.  MWAIT is a NOP, and C-state and frequency registers are not there: for none
# of them is there anything to leave to the guest.
_ALLOWED = uapi.KVM_X86_DISABLE_EXITS_HLT | uapi.KVM_X86_DISABLE_EXITS_PAUSE
_POLL_SECONDS = 0.001


@vm_cap("KVM_CAP_X86_DISABLE_EXITS", _ALLOWED)
def disable_exits(vm: Vm, args: Args) -> int:
    """Leave instructions to the guest that wait: KVM_X86_DISABLE_EXITS_* of args[0], for good.

    Errors:
        EINVAL  others than KVM_CHECK_EXTENSION says; a vCPU exists
    Source: api.rst 7.13; x86.c kvm_vm_ioctl_enable_cap
    """
    if args[0] & ~_ALLOWED:
        raise KvmError(EINVAL, f"exits {args[0]:#x}: only {_ALLOWED:#x} can be disabled")
    with vm.lock:
        if vm.created_vcpus:
            raise KvmError(EINVAL, "a vCPU exists")
        vm.disabled_exits |= args[0]
    return 0


@on_exit(lib.EXIT_HLT)
def handle_hlt(vcpu: Vcpu) -> Outcome:
    """Without a local APIC in the kernel a halted vCPU is the client's affair; rip is past the HLT."""
    if vcpu.vm.hlt_in_guest:
        vcpu.halted_in_guest = True
        wait(vcpu)
        return RESUME
    vcpu.kvm_run.exit_reason = uapi.KVM_EXIT_HLT
    return USERSPACE


def wait(vcpu: Vcpu) -> None:
    """Wait until something ends a HLT that did not exit.

    Errors:
        EINTR  a signal is pending; the processor stays halted
        EIO    the VM died
    """
    while not _is_woken(vcpu):
        if vcpu.is_dead:
            raise KvmError(EIO, "the VM is dead: it could not go on")
        vcpu.check_signal()
        time.sleep(_POLL_SECONDS)
    vcpu.halted_in_guest = False
    vcpu.events.requested = True


def _is_woken(vcpu: Vcpu) -> bool:
    events = vcpu.events
    if events.exception_pending or events.needs_reinjection() or events.triple_fault:
        return True
    if events.smi_pending and not vcpu.as_id:
        return True
    return bool(events.nmi_queued or (events.nmi_pending and events.nmi_allowed(vcpu)))
