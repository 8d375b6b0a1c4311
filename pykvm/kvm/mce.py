"""Machine checks: the banks of a vCPU, and errors that a client injects."""

from __future__ import annotations

from errno import EINVAL
from typing import TYPE_CHECKING

from pykvm.abi import CData, ffi, uapi
from pykvm.abi.errors import KvmError
from pykvm.abi.ioctl import In, Out, system_ioctl, vcpu_ioctl
from pykvm.kvm.caps import capability
from pykvm.kvm.msr import KVM_MAX_MCE_BANKS, fixed, invalid, msr, stored

if TYPE_CHECKING:
    from pykvm.kvm.system import System
    from pykvm.kvm.vcpu import Vcpu

SUPPORTED_MCE_CAP = uapi.MCG_CTL_P | uapi.MCG_SER_P
_MASK64 = 0xFFFF_FFFF_FFFF_FFFF
_MCG_EXT_COUNT = 0xFF_0000
_CTL, _STATUS, _ADDR, _MISC = range(4)
# SDM vol. 3 15.6.3: context corrupt, signaled, action required. Without any of them software need do nothing.
_ACTION_REQUIRED = 1 << 57 | 1 << 56 | 1 << 55

capability("KVM_CAP_MCE", KVM_MAX_MCE_BANKS)


def _bank_msr(bank: int, member: int) -> int:
    return uapi.MSR_IA32_MC0_CTL + 4 * bank + member


# ---- registers ------------------------------------------------------------------------------------

_MCI_CTL2_VALID = 1 << 30 | 0x7FFF  # CMCI enable and threshold
_HWCR_MC_STATUS_WRITE_ENABLE = 1 << 18
# Bits that clients have asked to set or clear with no effect: x86.c kvm_set_msr_common.
_HWCR_IGNORED = 1 << 3 | 1 << 6 | 1 << 8
_HWCR_VALID = _HWCR_MC_STATUS_WRITE_ENABLE | 1 << 24

fixed(uapi.MSR_IA32_P5_MC_ADDR, uapi.MSR_IA32_P5_MC_TYPE)
stored(uapi.MSR_IA32_MCG_STATUS, save=True)


@msr(uapi.MSR_IA32_MCG_CAP)
def mcg_cap(vcpu: Vcpu, index: int, host: bool) -> int:
    """How many banks there are, and what machine checks can do."""
    del index, host
    return vcpu.msrs.mcg_cap


@msr(uapi.MSR_IA32_MCG_CTL, save=True)
def mcg_ctl(vcpu: Vcpu, index: int, host: bool) -> int:
    """Reporting of machine checks: all or nothing."""
    if not vcpu.msrs.mcg_cap & uapi.MCG_CTL_P and not host:
        raise invalid()
    return vcpu.msrs.get(index)


@mcg_ctl.writer
def _write_mcg_ctl(vcpu: Vcpu, index: int, data: int, host: bool) -> None:
    if not vcpu.msrs.mcg_cap & uapi.MCG_CTL_P and (data or not host):
        raise invalid()
    if data not in {0, _MASK64}:
        raise invalid()
    vcpu.msrs.values[index] = data


def _check_bank(vcpu: Vcpu, bank: int) -> None:
    if bank >= vcpu.msrs.mcg_cap & uapi.MCG_BANKCNT_MASK:
        raise invalid()


@msr(*range(uapi.MSR_IA32_MC0_CTL, uapi.MSR_IA32_MC0_CTL + 4 * KVM_MAX_MCE_BANKS))
def mc_bank(vcpu: Vcpu, index: int, host: bool) -> int:
    """Control, status, address and miscellany of a bank."""
    del host
    _check_bank(vcpu, index - uapi.MSR_IA32_MC0_CTL >> 2)
    return vcpu.msrs.get(index)


def _can_set_status(vcpu: Vcpu) -> bool:
    """AMD's processors let software write a status if it asks for that first."""
    enabled = vcpu.msrs.get(uapi.MSR_K7_HWCR) & _HWCR_MC_STATUS_WRITE_ENABLE
    return vcpu.cpuid.is_amd_compatible and bool(enabled)


@mc_bank.writer
def _write_mc_bank(vcpu: Vcpu, index: int, data: int, host: bool) -> None:
    bank, member = divmod(index - uapi.MSR_IA32_MC0_CTL, 4)
    _check_bank(vcpu, bank)
    # Bits 0 and 10 some systems clear to work around errata: x86.c set_msr_mce.
    if member == 0 and data and data | 1 << 10 | 1 != _MASK64:
        raise invalid()
    if member == 1 and data and not (host or _can_set_status(vcpu)):
        raise invalid()
    vcpu.msrs.values[index] = data


@msr(*range(uapi.MSR_IA32_MC0_CTL2, uapi.MSR_IA32_MC0_CTL2 + KVM_MAX_MCE_BANKS))
def mc_ctl2(vcpu: Vcpu, index: int, host: bool) -> int:
    """Interrupt of a bank's corrected errors."""
    _check_bank(vcpu, index - uapi.MSR_IA32_MC0_CTL2)
    if not vcpu.msrs.mcg_cap & uapi.MCG_CMCI_P and not host:
        raise invalid()
    return vcpu.msrs.get(index)


@mc_ctl2.writer
def _write_mc_ctl2(vcpu: Vcpu, index: int, data: int, host: bool) -> None:
    _check_bank(vcpu, index - uapi.MSR_IA32_MC0_CTL2)
    if not vcpu.msrs.mcg_cap & uapi.MCG_CMCI_P and (data or not host):
        raise invalid()
    if data & ~_MCI_CTL2_VALID:
        raise invalid()
    vcpu.msrs.values[index] = data


@msr(uapi.MSR_K7_HWCR, save=True)
def hwcr(vcpu: Vcpu, index: int, host: bool) -> int:
    """AMD's hardware configuration."""
    del host
    return vcpu.msrs.get(index)


@hwcr.writer
def _write_hwcr(vcpu: Vcpu, index: int, data: int, host: bool) -> None:
    del host
    data &= ~_HWCR_IGNORED
    if data & ~_HWCR_VALID:
        raise invalid()
    vcpu.msrs.values[index] = data


# ---- ioctls ---------------------------------------------------------------------------------------


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
    if uncorrected and not mce.mcg_status and not status & _ACTION_REQUIRED:
        # UCNA: logged, and told by an interrupt of the local APIC, which is not in the kernel.
        _log(vcpu, mce, status)
        msrs.values[uapi.MSR_IA32_MCG_STATUS] = 0
        return 0
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
    _log(vcpu, mce, status)
    if uncorrected:
        vcpu.events.queue_exception(vcpu, uapi.MC_VECTOR)
    return 0


def _log(vcpu: Vcpu, mce: CData, status: int) -> None:
    """Write an error into its bank."""
    for member, value in ((_STATUS, status), (_ADDR, mce.addr), (_MISC, mce.misc)):
        vcpu.msrs.values[_bank_msr(mce.bank, member)] = value
