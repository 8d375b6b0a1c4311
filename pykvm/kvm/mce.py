"""Machine checks: the banks of a vCPU, and errors that a client injects."""

from __future__ import annotations

from errno import EINVAL
from typing import TYPE_CHECKING

from pykvm.abi import CData, ffi, uapi
from pykvm.abi.errors import KvmError
from pykvm.abi.ioctl import In, Out, system_ioctl, vcpu_ioctl
from pykvm.kvm.caps import capability
from pykvm.kvm.msr import KVM_MAX_MCE_BANKS

if TYPE_CHECKING:
    from pykvm.kvm.system import System
    from pykvm.kvm.vcpu import Vcpu

SUPPORTED_MCE_CAP = uapi.MCG_CTL_P | uapi.MCG_SER_P
_MASK64 = 0xFFFF_FFFF_FFFF_FFFF
_MCG_EXT_COUNT = 0xFF_0000
_CTL, _STATUS, _ADDR, _MISC = range(4)

capability("KVM_CAP_MCE", KVM_MAX_MCE_BANKS)


def _bank_msr(bank: int, member: int) -> int:
    return uapi.MSR_IA32_MC0_CTL + 4 * bank + member


@system_ioctl("KVM_X86_GET_MCE_CAP_SUPPORTED", Out("uint64_t"), cap="KVM_CAP_MCE")
def get_mce_cap_supported(system: System) -> CData:
    """Return the bits of MCG_CAP that KVM_X86_SETUP_MCE takes.

    Errors: none
    Source: api.rst 4.104; x86.c kvm_arch_dev_ioctl
    """
    del system
    return ffi.new("uint64_t *", SUPPORTED_MCE_CAP)


@vcpu_ioctl("KVM_X86_SETUP_MCE", In("uint64_t"), cap="KVM_CAP_MCE")
def setup_mce(vcpu: Vcpu, mcg_cap: CData) -> int:
    """Give the vCPU machine-check banks: their number in the low byte, capabilities above.

    All banks report.

    Errors:
        EINVAL  no bank, or more than KVM_CAP_MCE says; capabilities that are not supported
    Source: api.rst 4.105; x86.c kvm_vcpu_ioctl_x86_setup_mce
    """
    cap = mcg_cap[0]
    banks = cap & uapi.MCG_BANKCNT_MASK
    if not 0 < banks <= KVM_MAX_MCE_BANKS:
        raise KvmError(EINVAL, f"{banks} banks, there can be 1 to {KVM_MAX_MCE_BANKS}")
    unsupported = cap & ~(SUPPORTED_MCE_CAP | uapi.MCG_BANKCNT_MASK | _MCG_EXT_COUNT)
    if unsupported:
        raise KvmError(EINVAL, f"MCG_CAP bits {unsupported:#x} are not supported")
    vcpu.msrs.mcg_cap = cap
    if cap & uapi.MCG_CTL_P:
        vcpu.msrs.values[uapi.MSR_IA32_MCG_CTL] = _MASK64
    for bank in range(banks):
        vcpu.msrs.values[_bank_msr(bank, _CTL)] = _MASK64
    return 0


@vcpu_ioctl("KVM_X86_SET_MCE", In("struct kvm_x86_mce"), cap="KVM_CAP_MCE")
def set_mce(vcpu: Vcpu, mce: CData) -> int:
    """Report an error in a bank: an uncorrected one raises #MC, or ends the machine.

    A bank or a controller that is turned off reports nothing.

    Errors:
        EINVAL  a bank that is not there; a status that is not valid
    Source: api.rst 4.107; x86.c kvm_vcpu_ioctl_x86_set_mce
    """
    msrs, status = vcpu.msrs, mce.status
    if mce.bank >= msrs.mcg_cap & uapi.MCG_BANKCNT_MASK or not status & uapi.MCI_STATUS_VAL:
        raise KvmError(EINVAL, f"bank {mce.bank}, status {status:#x}")
    uncorrected = status & uapi.MCI_STATUS_UC
    if uncorrected and msrs.mcg_cap & uapi.MCG_CTL_P and msrs.get(uapi.MSR_IA32_MCG_CTL) != _MASK64:
        return 0
    if uncorrected and msrs.get(_bank_msr(mce.bank, _CTL)) != _MASK64:
        return 0
    old = msrs.get(_bank_msr(mce.bank, _STATUS))
    if uncorrected:
        in_progress = msrs.get(uapi.MSR_IA32_MCG_STATUS) & uapi.MCG_STATUS_MCIP
        if in_progress or not vcpu.cpu.guest.cr4 & uapi.X86_CR4_MCE:
            vcpu.events.triple_fault = vcpu.events.requested = True
            return 0
        msrs.values[uapi.MSR_IA32_MCG_STATUS] = mce.mcg_status
    elif old & uapi.MCI_STATUS_VAL and old & uapi.MCI_STATUS_UC:
        msrs.values[_bank_msr(mce.bank, _STATUS)] = old | uapi.MCI_STATUS_OVER
        return 0
    if old & uapi.MCI_STATUS_VAL:
        status |= uapi.MCI_STATUS_OVER
    msrs.values[_bank_msr(mce.bank, _STATUS)] = status
    msrs.values[_bank_msr(mce.bank, _ADDR)] = mce.addr
    msrs.values[_bank_msr(mce.bank, _MISC)] = mce.misc
    if uncorrected:
        vcpu.events.queue_exception(vcpu, uapi.MC_VECTOR)
    return 0


