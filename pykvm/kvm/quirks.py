"""Quirks: where KVM deviates from processors because clients have relied on it, until told not to."""

from __future__ import annotations

from errno import EINVAL
from typing import TYPE_CHECKING

from pykvm.abi import lib, uapi
from pykvm.abi.errors import KvmError
from pykvm.kvm.caps import Args, vm_cap

if TYPE_CHECKING:
    from pykvm.kvm.system import System
    from pykvm.kvm.vcpu import Vcpu
    from pykvm.kvm.vm import Vm

# Memory has no types here, all slots are dropped alike, and there is no local APIC: five change nothing.
SUPPORTED = (
    uapi.KVM_X86_QUIRK_LINT0_REENABLED
    | uapi.KVM_X86_QUIRK_CD_NW_CLEARED
    | uapi.KVM_X86_QUIRK_LAPIC_MMIO_HOLE
    | uapi.KVM_X86_QUIRK_OUT_7E_INC_RIP
    | uapi.KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT
    | uapi.KVM_X86_QUIRK_FIX_HYPERCALL_INSN
    | uapi.KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS
    | uapi.KVM_X86_QUIRK_SLOT_ZAP_ALL
    | uapi.KVM_X86_QUIRK_STUFF_FEATURE_MSRS
    | uapi.KVM_X86_QUIRK_IGNORE_GUEST_PAT
)


def supported(of: Vm | System) -> int:
    """Return the quirks that this kernel lets a client turn off."""
    known = of.system.kernel.behaviour.quirks
    return SUPPORTED if known is None else SUPPORTED & known


def has_quirk(vm: Vm, quirk: int) -> bool:
    """Say if a KVM_X86_QUIRK_* is on."""
    return not vm.disabled_quirks & quirk


def update_mwait(vcpu: Vcpu) -> None:
    """Make MONITOR and MWAIT undefined without their CPUID bit, or let them do nothing."""
    never = has_quirk(vcpu.vm, uapi.KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS)
    offered = vcpu.cpuid.word("1_ECX") >> uapi.CPUID_1_ECX_MONITOR & 1
    undefined = not vcpu.vm.kernel.behaviour.mwait_is_nop or not (never or offered)
    vcpu.events.set_control(vcpu, lib.CPU_MWAIT_UD, on=undefined)


@vm_cap("KVM_CAP_DISABLE_QUIRKS", 1)
def disable_quirks(vm: Vm, args: Args) -> int:
    """Turn the quirks of args[0] off for good; unknown ones are not looked at.

    Errors: none
    Source: api.rst 7.6
    """
    disabled = args[0] & supported(vm)
    vm.disabled_quirks = disabled | (vm.disabled_quirks if vm.kernel.behaviour.quirks_add_up else 0)
    _apply(vm)
    return 0


@vm_cap("KVM_CAP_DISABLE_QUIRKS2", supported)
def disable_quirks2(vm: Vm, args: Args) -> int:
    """Turn the quirks of args[0] off for good.

    Errors:
        EINVAL  an unknown quirk
    Source: api.rst 7.30
    """
    if args[0] & ~supported(vm):
        raise KvmError(EINVAL, f"quirks {args[0]:#x}: only {supported(vm):#x} are known")
    return disable_quirks(vm, args)


def _apply(vm: Vm) -> None:
    for vcpu in tuple(vm.vcpus.values()):
        vcpu.events.requested = True
        vcpu.cpu.kick()
