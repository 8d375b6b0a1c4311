"""The multiprocessing state: whether a vCPU runs, is halted or waits to be started."""

from __future__ import annotations

from errno import EINVAL
from typing import TYPE_CHECKING

from pykvm.abi import CData, ffi, uapi
from pykvm.abi.errors import KvmError
from pykvm.abi.ioctl import In, Out, vcpu_ioctl

if TYPE_CHECKING:
    from pykvm.kvm.vcpu import Vcpu

# What a vCPU can be only if it has a local APIC in the kernel, which starts and wakes it.
_WITH_LAPIC = frozenset(
    {
        uapi.KVM_MP_STATE_UNINITIALIZED,
        uapi.KVM_MP_STATE_INIT_RECEIVED,
        uapi.KVM_MP_STATE_HALTED,
        uapi.KVM_MP_STATE_SIPI_RECEIVED,
        uapi.KVM_MP_STATE_AP_RESET_HOLD,
    }
)
_INIT_OR_SIPI = frozenset({uapi.KVM_MP_STATE_INIT_RECEIVED, uapi.KVM_MP_STATE_SIPI_RECEIVED})


@vcpu_ioctl("KVM_GET_MP_STATE", Out("struct kvm_mp_state"), cap="KVM_CAP_MP_STATE")
def get_mp_state(vcpu: Vcpu) -> CData:
    """Return the multiprocessing state, KVM_MP_STATE_*.

    Errors: none
    Source: api.rst 4.38; x86.c kvm_arch_vcpu_ioctl_get_mpstate
    """
    out = ffi.new("struct kvm_mp_state *")
    out.mp_state = vcpu.mp_state
    return out


@vcpu_ioctl("KVM_SET_MP_STATE", In("struct kvm_mp_state"), cap="KVM_CAP_MP_STATE")
def set_mp_state(vcpu: Vcpu, new: CData) -> int:
    """Set the multiprocessing state.

    Errors:
        EINVAL  a state x86 does not have; any but RUNNABLE without a local APIC in the kernel;
                INIT_RECEIVED or SIPI_RECEIVED in SMM, or with an SMI pending
    Source: api.rst 4.39; x86.c kvm_arch_vcpu_ioctl_set_mpstate
    """
    state = new.mp_state
    strict = vcpu.vm.kernel.behaviour.strict_mp_state
    if strict and state != uapi.KVM_MP_STATE_RUNNABLE and not (state in _WITH_LAPIC and vcpu.lapic_in_kernel):
        raise KvmError(EINVAL, f"mp_state {state}")
    if state in _INIT_OR_SIPI and (vcpu.as_id or vcpu.events.smi_pending):
        raise KvmError(EINVAL, "INIT and SIPI are latched in SMM")
    vcpu.mp_state = state
    vcpu.events.requested = True
    return 0
