"""Architectural registers: state of the processor, time, memory types, what systems read at boot."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pykvm.abi import lib, uapi
from pykvm.abi.errors import KvmError
from pykvm.kvm import clock
from pykvm.kvm.caps import Args, vm_cap
from pykvm.kvm.msr import (
    RESET_VALUES,
    Check,
    Msr,
    fixed,
    invalid,
    msr,
    stored,
    unsupported,
    write_only,
)
from pykvm.kvm.regs import check_apic_base

if TYPE_CHECKING:
    from pykvm.kvm.vcpu import Vcpu
    from pykvm.kvm.vm import Vm

KVM_NR_VAR_MTRR = 8
_MASK64 = 0xFFFF_FFFF_FFFF_FFFF
_HIGH32 = 0xFFFF_FFFF_0000_0000


def in_guest_state(index: int, name: str, *, save: bool, check: Check | None = None) -> Msr:
    """Register a register that the processor keeps, as member `name` of struct cpu_guest."""

    @msr(index, save=save)
    def row(vcpu: Vcpu, index: int, host: bool) -> int:
        del index, host
        value: int = getattr(vcpu.cpu.guest, name)
        return value

    @row.writer
    def _write(vcpu: Vcpu, index: int, data: int, host: bool) -> None:
        del index
        if check is not None and not check(vcpu, data, host):
            raise invalid()
        setattr(vcpu.cpu.guest, name, data)

    return row


# ---- state of the processor ----------------------------------------------------------------------


def is_noncanonical(vcpu: Vcpu, address: int) -> bool:
    """Say if an address does not sign-extend bit 47, or 56 with five-level paging."""
    return canonical(vcpu, address) != address


def canonical(vcpu: Vcpu, address: int) -> int:
    """Return the address with its highest bits made to fit."""
    bits = 57 if vcpu.cpu.guest.cr4 & uapi.X86_CR4_LA57 else 48
    low = address & ((1 << bits) - 1)
    return low | (_MASK64 >> bits << bits if low >> bits - 1 else 0)


def _is_canonical(vcpu: Vcpu, data: int, host: bool) -> bool:
    del host
    return not is_noncanonical(vcpu, data)


in_guest_state(uapi.MSR_IA32_SYSENTER_CS, "sysenter_cs", save=True)


def _sysenter_address(index: int, name: str) -> None:
    row = in_guest_state(index, name, save=True)

    # x86.c __kvm_set_msr: made canonical and not refused, as AMD's processors do.
    @row.writer
    def _write(vcpu: Vcpu, index: int, data: int, host: bool) -> None:
        del index, host
        # svm.c svm_set_msr: what AMD's keep of them has 32 bits.
        truncated = vcpu.vm.processor.is_amd and vcpu.cpuid.is_amd_compatible
        setattr(vcpu.cpu.guest, name, data & 0xFFFF_FFFF if truncated else canonical(vcpu, data))


_sysenter_address(uapi.MSR_IA32_SYSENTER_ESP, "sysenter_esp")
_sysenter_address(uapi.MSR_IA32_SYSENTER_EIP, "sysenter_eip")
in_guest_state(uapi.MSR_STAR, "star", save=True)
in_guest_state(uapi.MSR_CSTAR, "cstar", save=True, check=_is_canonical)
in_guest_state(uapi.MSR_KERNEL_GS_BASE, "kernel_gs_base", save=True, check=_is_canonical)
in_guest_state(uapi.MSR_SYSCALL_MASK, "sfmask", save=True)
in_guest_state(uapi.MSR_LSTAR, "lstar", save=True, check=_is_canonical)


@msr(uapi.MSR_TSC_AUX, save=True)
def tsc_aux(vcpu: Vcpu, index: int, host: bool) -> int:
    """What RDTSCP and RDPID return."""
    del index
    if not host and not (vcpu.cpuid.has("RDTSCP") or vcpu.cpuid.has("RDPID")):
        raise invalid()
    return int(vcpu.cpu.guest.tsc_aux)


@tsc_aux.writer
def _write_tsc_aux(vcpu: Vcpu, index: int, data: int, host: bool) -> None:
    del index
    if not host and not (vcpu.cpuid.has("RDTSCP") or vcpu.cpuid.has("RDPID")):
        raise invalid()
    if data & _HIGH32:
        raise invalid()
    vcpu.cpu.guest.tsc_aux = data


_SEGMENT_BASES = {uapi.MSR_FS_BASE: lib.CPU_SEG_FS, uapi.MSR_GS_BASE: lib.CPU_SEG_GS}


@msr(*_SEGMENT_BASES)
def segment_base(vcpu: Vcpu, index: int, host: bool) -> int:
    """Base of FS or GS."""
    del host
    return int(vcpu.cpu.guest.seg[_SEGMENT_BASES[index]].base)


@segment_base.writer
def _write_segment_base(vcpu: Vcpu, index: int, data: int, host: bool) -> None:
    del host
    if is_noncanonical(vcpu, data):
        raise invalid()
    vcpu.cpu.guest.seg[_SEGMENT_BASES[index]].base = data
    vcpu.cpu.state_changed()


@msr(uapi.MSR_EFER)
def efer(vcpu: Vcpu, index: int, host: bool) -> int:
    """Extended features: long mode, SYSCALL, no-execute."""
    del index, host
    return int(vcpu.cpu.guest.efer)


@efer.writer
def _write_efer(vcpu: Vcpu, index: int, data: int, host: bool) -> None:
    """LMA follows paging and is never written (x86.c set_efer)."""
    del index
    guest = vcpu.cpu.guest
    old = guest.efer
    if data & ~vcpu.vm.system.offer.efer:
        raise invalid()
    if not host:
        if data & ~vcpu.cpu.ctl.efer_valid:
            raise invalid()
        if guest.cr0 & uapi.X86_CR0_PG and (old ^ data) & uapi.EFER_LME:
            raise invalid()
    guest.efer = data & ~uapi.EFER_LMA | old & uapi.EFER_LMA
    vcpu.cpu.state_changed()
    if (old ^ guest.efer) & uapi.EFER_NX:
        vcpu.cpu.flush_tlb()
        if host:
            vcpu.vm.mmu.reset_context(vcpu)
        else:
            vcpu.vm.mmu.paging_changed(vcpu)


@msr(uapi.MSR_IA32_DEBUGCTLMSR, save=True)
def debugctl(vcpu: Vcpu, index: int, host: bool) -> int:
    """Debug control."""
    del index, host
    return int(vcpu.cpu.guest.debugctl)


@debugctl.writer
def _write_debugctl(vcpu: Vcpu, index: int, data: int, host: bool) -> None:
    del index, host
    # vmx.c vmx_set_msr: there are no branch records; guests that try them anyway must not fault.
    data &= ~(uapi.DEBUGCTLMSR_LBR | uapi.DEBUGCTLMSR_BTF)
    if data:
        raise invalid()
    vcpu.cpu.guest.debugctl = data


@msr(uapi.MSR_IA32_XSS)
def xss(vcpu: Vcpu, index: int, host: bool) -> int:
    """Supervisor state components."""
    del index
    if not host and not vcpu.cpuid.has("XSAVES"):
        raise unsupported()
    return int(vcpu.cpu.guest.xss)


@xss.writer
def _write_xss(vcpu: Vcpu, index: int, data: int, host: bool) -> None:
    del index, host
    if not vcpu.cpuid.has("XSAVES"):
        raise unsupported()
    if data:
        raise invalid()
    vcpu.cpu.guest.xss = data


# ---- time ----------------------------------------------------------------------------------------


@msr(uapi.MSR_IA32_TSC, save=True)
def tsc(vcpu: Vcpu, index: int, host: bool) -> int:
    """The time-stamp counter."""
    del index, host
    return clock.read_tsc(vcpu)


@tsc.writer
def _write_tsc(vcpu: Vcpu, index: int, data: int, host: bool) -> None:
    """The guest's write moves TSC_ADJUST by as much; the client's synchronises vCPUs."""
    del index
    if host:
        clock.synchronize_tsc(vcpu, data)
        return
    delta = data - clock.read_tsc(vcpu)
    clock.adjust_tsc_offset(vcpu, delta)
    vcpu.clock.tsc_adjust = (vcpu.clock.tsc_adjust + delta) & _MASK64


@msr(uapi.MSR_IA32_TSC_ADJUST, save=True)
def tsc_adjust(vcpu: Vcpu, index: int, host: bool) -> int:
    """What the guest has moved its TSC by."""
    del index, host
    return vcpu.clock.tsc_adjust


@tsc_adjust.writer
def _write_tsc_adjust(vcpu: Vcpu, index: int, data: int, host: bool) -> None:
    del index
    if not vcpu.cpuid.has("TSC_ADJUST"):
        return
    if not host:
        clock.adjust_tsc_offset(vcpu, data - vcpu.clock.tsc_adjust)
    vcpu.clock.tsc_adjust = data


# Without a local APIC in the kernel there is no deadline: writes are ignored, it reads 0.
@msr(uapi.MSR_IA32_TSC_DEADLINE, save=True)
def tsc_deadline(vcpu: Vcpu, index: int, host: bool) -> int:
    """When the local APIC's timer fires."""
    del vcpu, index, host
    return 0


@tsc_deadline.writer
def _write_tsc_deadline(vcpu: Vcpu, index: int, data: int, host: bool) -> None:
    del vcpu, index, data, host


# ---- the local APIC ------------------------------------------------------------------------------


@msr(uapi.MSR_IA32_APICBASE)
def apic_base(vcpu: Vcpu, index: int, host: bool) -> int:
    """Address and mode of the local APIC."""
    del index, host
    return vcpu.apic_base


@apic_base.writer
def _write_apic_base(vcpu: Vcpu, index: int, data: int, host: bool) -> None:
    """From x2APIC mode only "disabled" can be reached, and only from xAPIC mode x2APIC."""
    del index
    try:
        check_apic_base(vcpu, data)
    except KvmError:
        raise invalid() from None
    if not host:
        enable, x2apic = uapi.MSR_IA32_APICBASE_ENABLE, uapi.X2APIC_ENABLE
        old, new = vcpu.apic_base & (enable | x2apic), data & (enable | x2apic)
        if (old, new) in {(enable | x2apic, enable), (0, enable | x2apic)}:
            raise invalid()
    vcpu.apic_base = data


# ---- memory types --------------------------------------------------------------------------------

_MTRR_TYPES = frozenset(
    {
        uapi.MTRR_TYPE_UNCACHABLE,
        uapi.MTRR_TYPE_WRCOMB,
        uapi.MTRR_TYPE_WRTHROUGH,
        uapi.MTRR_TYPE_WRPROT,
        uapi.MTRR_TYPE_WRBACK,
    }
)
# PAT has one more: "uncached minus".
_PAT_TYPES = _MTRR_TYPES | {7}
_MTRR_DEF_TYPE_RESERVED = ~0xCFF
_MTRRCAP = 0x500 | KVM_NR_VAR_MTRR  # write-combining, fixed ranges


def _bytes_are_in(data: int, types: frozenset[int]) -> bool:
    return all(byte in types for byte in data.to_bytes(8, "little"))


stored(
    uapi.MSR_IA32_CR_PAT,
    reset=uapi.MSR_PAT_RESET,
    save=True,
    check=lambda _vcpu, data, _host: _bytes_are_in(data, _PAT_TYPES),
)
stored(
    uapi.MSR_MTRRfix64K_00000,
    uapi.MSR_MTRRfix16K_80000,
    uapi.MSR_MTRRfix16K_A0000,
    *range(uapi.MSR_MTRRfix4K_C0000, uapi.MSR_MTRRfix4K_F8000 + 1),
    check=lambda _vcpu, data, _host: _bytes_are_in(data, _MTRR_TYPES),
)
stored(
    uapi.MSR_MTRRdefType,
    check=lambda _vcpu, data, _host: not data & _MTRR_DEF_TYPE_RESERVED and data & 0xFF in _MTRR_TYPES,
)
stored(
    *range(uapi.MSR_MTRRphysBase0, uapi.MSR_MTRRphysBase0 + 2 * KVM_NR_VAR_MTRR, 2),
    check=lambda vcpu, data, _host: (
        data & 0xFF in _MTRR_TYPES and not data & (vcpu.cpuid.reserved_gpa_bits | 0xF00)
    ),
)
stored(
    *range(uapi.MSR_MTRRphysMask0, uapi.MSR_MTRRphysMask0 + 2 * KVM_NR_VAR_MTRR, 2),
    check=lambda vcpu, data, _host: not data & (vcpu.cpuid.reserved_gpa_bits | 0x7FF),
)
fixed(uapi.MSR_MTRRcap, value=_MTRRCAP)


# ---- what systems read at boot -------------------------------------------------------------------

_PLATFORM_INFO_CPUID_FAULT = 1 << 31
_CPUID_FAULT = 1
_MISC_ENABLE_READ_ONLY = uapi.MSR_IA32_MISC_ENABLE_PEBS_UNAVAIL | uapi.MSR_IA32_MISC_ENABLE_BTS_UNAVAIL
# This processor leaks nothing: guests need no workaround.
# RDCL_NO, SKIP_VMENTRY_L1DFLUSH, SSB_NO, MDS_NO, PSCHANGE_MC_NO, TAA_NO, SBDR_SSDP_NO, FBSDP_NO,
# PSDP_NO, GDS_NO, RFDS_NO, ITS_NO.
_ARCH_CAPABILITIES = sum(1 << bit for bit in (0, 3, 4, 5, 6, 8, 13, 14, 15, 26, 27, 62))
_UCODE_REV = 0x1_0000_0000

stored(uapi.MSR_SMI_COUNT, save=True, check=lambda _vcpu, _data, host: host)
stored(uapi.MSR_IA32_POWER_CTL, save=True)
stored(
    uapi.MSR_IA32_FEAT_CTL,
    save=True,
    # vmx.c is_vmx_feature_control_msr_valid: with no VMX there is only the lock, and it holds.
    check=lambda vcpu, data, host: (
        not data & ~uapi.FEAT_CTL_LOCKED
        and (host or not vcpu.msrs.get(uapi.MSR_IA32_FEAT_CTL) & uapi.FEAT_CTL_LOCKED)
    ),
)
fixed(uapi.MSR_FSB_FREQ, value=3)
fixed(uapi.MSR_EBC_FREQUENCY_ID, value=1 << 24)
fixed(uapi.MSR_IA32_PERF_STATUS, value=4 << 40 | 1000)
fixed(uapi.MSR_IA32_BBL_CR_CTL3, value=0xBE70_2111, writes_ignored=True)
fixed(
    uapi.MSR_IA32_PLATFORM_ID,
    uapi.MSR_IA32_EBL_CR_POWERON,
    uapi.MSR_AMD64_SYSCFG,
    uapi.MSR_K8_INT_PENDING_MSG,
    uapi.MSR_IA32_PERF_CTL,
    *range(uapi.MSR_IA32_LASTBRANCHFROMIP, uapi.MSR_IA32_LASTINTTOIP + 1),
)
stored(uapi.MSR_FAM10H_MMIO_CONF_BASE, check=lambda _vcpu, data, _host: not data)
# Performance counters that no PMU is behind, and AMD registers that its systems write blindly.
fixed(
    uapi.MSR_AMD64_NB_CFG,
    uapi.MSR_VM_HSAVE_PA,
    uapi.MSR_AMD64_BU_CFG2,
    uapi.MSR_AMD64_DC_CFG,
    *range(uapi.MSR_K7_EVNTSEL0, uapi.MSR_K7_EVNTSEL0 + 4),
    *range(uapi.MSR_K7_PERFCTR0, uapi.MSR_K7_PERFCTR0 + 4),
    uapi.MSR_P6_EVNTSEL0,
    uapi.MSR_P6_EVNTSEL1,
    uapi.MSR_IA32_PERFCTR0,
    uapi.MSR_IA32_PERFCTR1,
    writes_ignored=True,
)
write_only(uapi.MSR_IA32_UCODE_WRITE, uapi.MSR_AMD64_PATCH_LOADER)


@msr(uapi.MSR_IA32_UCODE_REV, save=True, feature=_UCODE_REV)
def ucode_rev(vcpu: Vcpu, index: int, host: bool) -> int:
    """Revision of the microcode, which the client may choose."""
    del host
    return vcpu.msrs.get(index)


@ucode_rev.writer
def _write_ucode_rev(vcpu: Vcpu, index: int, data: int, host: bool) -> None:
    # A guest writes 0 before it reads the revision: nothing happens.
    if host:
        vcpu.msrs.values[index] = data


@msr(uapi.MSR_IA32_ARCH_CAPABILITIES, save=True, feature=_ARCH_CAPABILITIES, immutable=True)
def arch_capabilities(vcpu: Vcpu, index: int, host: bool) -> int:
    """Which known weaknesses the processor does not have."""
    del host
    if not vcpu.cpuid.has("ARCH_CAPABILITIES"):
        raise unsupported()
    return vcpu.msrs.get(index)


@arch_capabilities.writer
def _write_arch_capabilities(vcpu: Vcpu, index: int, data: int, host: bool) -> None:
    if not host or not vcpu.cpuid.has("ARCH_CAPABILITIES"):
        raise unsupported()
    vcpu.msrs.values[index] = data


@msr(uapi.MSR_IA32_MISC_ENABLE, save=True)
def misc_enable(vcpu: Vcpu, index: int, host: bool) -> int:
    """Miscellaneous features."""
    del host
    return vcpu.msrs.get(index)


@misc_enable.writer
def _write_misc_enable(vcpu: Vcpu, index: int, data: int, host: bool) -> None:
    if not host:
        old = vcpu.msrs.get(index)
        if (old ^ data) & _MISC_ENABLE_READ_ONLY:
            raise invalid()
        data = data & ~uapi.MSR_IA32_MISC_ENABLE_EMON | old & uapi.MSR_IA32_MISC_ENABLE_EMON
    vcpu.msrs.values[index] = data


RESET_VALUES[uapi.MSR_IA32_MISC_ENABLE] = _MISC_ENABLE_READ_ONLY


@msr(uapi.MSR_PLATFORM_INFO, save=True, feature=_PLATFORM_INFO_CPUID_FAULT, immutable=True)
def platform_info(vcpu: Vcpu, index: int, host: bool) -> int:
    """That CPUID can be made to fault."""
    if not host and not vcpu.vm.guest_can_read_platform_info:
        raise invalid()
    return vcpu.msrs.get(index)


@platform_info.writer
def _write_platform_info(vcpu: Vcpu, index: int, data: int, host: bool) -> None:
    if not host or (not data & _PLATFORM_INFO_CPUID_FAULT and vcpu.msrs.cpuid_faulting):
        raise invalid()
    vcpu.msrs.values[index] = data


@vm_cap("KVM_CAP_MSR_PLATFORM_INFO")
def enable_platform_info(vm: Vm, args: Args) -> int:
    """Let guests read MSR_PLATFORM_INFO, as they may by default, or not: args[0].

    Errors: none
    Source: api.rst 7.9
    """
    vm.guest_can_read_platform_info = bool(args[0])
    return 0


stored(
    uapi.MSR_MISC_FEATURES_ENABLES,
    save=True,
    check=lambda vcpu, data, _host: (
        not data & ~_CPUID_FAULT
        and (not data or bool(vcpu.msrs.get(uapi.MSR_PLATFORM_INFO) & _PLATFORM_INFO_CPUID_FAULT))
    ),
)
