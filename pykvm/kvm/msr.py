"""Model-specific registers: one row per register, and every list derived from the rows.

A row says how a register is read and written, by the guest (`host` False) or by the client (`host`
True), and whether KVM_GET_MSR_INDEX_LIST names it.  What is listed can be read and written back.
A register that nobody knows is #GP for the guest, and ends KVM_GET_MSRS and KVM_SET_MSRS early.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from errno import E2BIG
from typing import TYPE_CHECKING, TypeAlias

from pykvm import trace
from pykvm.abi import CData, ffi, lib, uapi
from pykvm.abi.errors import KvmError
from pykvm.abi.ioctl import Array, ArrayArg, system_ioctl, vcpu_ioctl
from pykvm.kvm import clock
from pykvm.kvm.caps import Args, vcpu_cap
from pykvm.kvm.cpuid import EFER_SUPPORTED
from pykvm.kvm.exits import RESUME, Outcome, on_exit
from pykvm.kvm.regs import check_apic_base

if TYPE_CHECKING:
    from pykvm.kvm.system import System
    from pykvm.kvm.vcpu import Vcpu

MAX_IO_MSRS = 256
KVM_MAX_MCE_BANKS = 32
KVM_NR_VAR_MTRR = 8
_MASK64 = 0xFFFF_FFFF_FFFF_FFFF
_HIGH32 = 0xFFFF_FFFF_0000_0000

Read: TypeAlias = "Callable[[Vcpu, int, bool], int]"
Write: TypeAlias = "Callable[[Vcpu, int, int, bool], None]"
Check: TypeAlias = "Callable[[Vcpu, int, bool], bool]"


class MsrError(Exception):
    """An access that the guest would get #GP for; `reason`: KVM_MSR_EXIT_REASON_INVAL or _UNKNOWN."""

    def __init__(self, reason: int = uapi.KVM_MSR_EXIT_REASON_INVAL) -> None:
        """Say why."""
        super().__init__(reason)
        self.reason = reason


def invalid() -> MsrError:
    """Return the error for a register that is there, and a value or a writer it does not take."""
    return MsrError(uapi.KVM_MSR_EXIT_REASON_INVAL)


def unsupported() -> MsrError:
    """Return the error for a register that is not there."""
    return MsrError(uapi.KVM_MSR_EXIT_REASON_UNKNOWN)


@dataclass(slots=True)
class Msr:
    """One register, or a range of alike ones."""

    indices: tuple[int, ...]
    read: Read
    write: Write | None = None
    save: bool = False

    def writer(self, write: Write) -> Write:
        """Give the row its other half: ``@row.writer``.  Without one the register is read-only."""
        self.write = write
        return write


MSRS: dict[int, Msr] = {}


def _names(*names: str) -> tuple[int, ...]:
    return tuple(getattr(uapi, name) for name in names)


def msr(*indices: int, save: bool = False) -> Callable[[Read], Msr]:
    """Register how registers are read; the row's `writer` registers how they are written."""

    def register(read: Read) -> Msr:
        row = Msr(tuple(indices), read, save=save)
        for index in indices:
            if index in MSRS:
                msg = f"MSR {index:#x} has two rows"
                raise RuntimeError(msg)
            MSRS[index] = row
        return row

    return register


@dataclass(slots=True)
class MsrState:
    """Registers that are nothing but a stored value, by index, and what is made of some of them.

    `mcg_cap`: number of banks and capabilities of machine checks.  `pv_enforce`: the guest has only
    the paravirtual registers that its CPUID tells.
    """

    values: dict[int, int] = field(default_factory=dict)
    mcg_cap: int = KVM_MAX_MCE_BANKS
    pv_enforce: bool = False

    def get(self, index: int) -> int:
        """Return a stored value, or that of reset."""
        value = self.values.get(index)
        return RESET_VALUES.get(index, 0) if value is None else value

    @property
    def cpuid_faulting(self) -> bool:
        """Say if CPUID is CPL 0's."""
        return bool(self.values.get(uapi.MSR_MISC_FEATURES_ENABLES, 0) & 1)


RESET_VALUES: dict[int, int] = {}


def stored(*indices: int, reset: int = 0, save: bool = False, check: Check | None = None) -> Msr:
    """Register registers that keep what is written, if `check(vcpu, data, host)` says so."""
    for index in indices:
        if reset:
            RESET_VALUES[index] = reset

    @msr(*indices, save=save)
    def row(vcpu: Vcpu, index: int, host: bool) -> int:
        del host
        return vcpu.msrs.get(index)

    @row.writer
    def _write(vcpu: Vcpu, index: int, data: int, host: bool) -> None:
        if check is not None and not check(vcpu, data, host):
            raise invalid()
        vcpu.msrs.values[index] = data

    return row


def fixed(*indices: int, value: int = 0, writes_ignored: bool = False) -> None:
    """Register registers that always read the same; writes are refused or have no effect."""

    @msr(*indices)
    def row(vcpu: Vcpu, index: int, host: bool) -> int:
        del vcpu, index, host
        return value

    if writes_ignored:

        @row.writer
        def _write(vcpu: Vcpu, index: int, data: int, host: bool) -> None:
            del vcpu, index, data, host


def write_only(*indices: int) -> None:
    """Register registers that take any value and cannot be read."""

    @msr(*indices)
    def row(vcpu: Vcpu, index: int, host: bool) -> int:
        del vcpu, index, host
        raise unsupported()

    @row.writer
    def _write(vcpu: Vcpu, index: int, data: int, host: bool) -> None:
        del vcpu, index, data, host


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


# ---- access --------------------------------------------------------------------------------------


def get_msr(vcpu: Vcpu, index: int, *, host: bool) -> int:
    """Return a register.  Raises MsrError."""
    row = MSRS.get(index)
    if row is None:
        raise unsupported()
    try:
        return row.read(vcpu, index, host)
    except MsrError:
        # msr.c kvm_do_msr_access: what is listed reads as 0 for the client even if CPUID hides it.
        if host and row.save:
            return 0
        raise


def set_msr(vcpu: Vcpu, index: int, data: int, *, host: bool) -> None:
    """Write a register.  Raises MsrError."""
    row = MSRS.get(index)
    if row is None:
        raise unsupported()
    if row.write is None:
        raise invalid()
    if index in IMMUTABLE and vcpu.has_run and host:
        if data != get_msr(vcpu, index, host=True):
            raise invalid()
        return
    try:
        row.write(vcpu, index, data, host)
    except MsrError as error:
        hidden = error.reason == uapi.KVM_MSR_EXIT_REASON_UNKNOWN and row.save
        if not (host and hidden and not data):
            raise


# ---- the ioctls ----------------------------------------------------------------------------------


def _msrs(*, copy_out: bool) -> Array:
    # `nmsrs >= MAX_IO_MSRS` is refused: 255 is the most.
    return Array(
        "struct kvm_msrs",
        entry="struct kvm_msr_entry",
        count="nmsrs",
        entries="entries",
        copy_in=True,
        copy_out=copy_out,
        limit=MAX_IO_MSRS - 1,
    )


def _each(entries: CData, n: int, access: Callable[[CData], None]) -> int:
    """Do registers in order up to the first that fails; return how many were done."""
    for at in range(n):
        try:
            access(entries[at])
        except MsrError:
            return at
    return n


@vcpu_ioctl("KVM_GET_MSRS", _msrs(copy_out=True))
def get_msrs(vcpu: Vcpu, a: ArrayArg) -> int:
    """Read registers in the order given, and return how many; the first that fails ends it.

    Errors:
        E2BIG  256 or more
    Source: api.rst 4.18; x86.c msr_io, do_get_msr
    """

    def read(entry: CData) -> None:
        entry.data = get_msr(vcpu, entry.index, host=True)

    done = _each(a.entries, a.n, read)
    a.reply(a.entries)
    return done


@vcpu_ioctl("KVM_SET_MSRS", _msrs(copy_out=False))
def set_msrs(vcpu: Vcpu, a: ArrayArg) -> int:
    """Write registers in the order given, and return how many; the first that fails ends it.

    Errors:
        E2BIG  256 or more
    Source: api.rst 4.19; x86.c msr_io, do_set_msr
    """
    return _each(a.entries, a.n, lambda entry: set_msr(vcpu, entry.index, entry.data, host=True))


@system_ioctl("KVM_GET_MSRS", _msrs(copy_out=True), cap="KVM_CAP_GET_MSR_FEATURES")
def get_feature_msrs(system: System, a: ArrayArg) -> int:
    """Read feature registers in the order given, and return how many; others that are listed read as 0.

    Errors:
        E2BIG  256 or more
    Source: api.rst 4.18; x86.c do_get_feature_msr
    """
    del system

    def read(entry: CData) -> None:
        if entry.index not in FEATURE_MSRS and entry.index not in INDEX_LIST:
            raise unsupported()
        entry.data = FEATURE_MSRS.get(entry.index, 0)

    done = _each(a.entries, a.n, read)
    a.reply(a.entries)
    return done


_MSR_LIST = Array(
    "struct kvm_msr_list", entry="uint32_t", count="nmsrs", entries="indices", copy_out=True, limit_errno=None
)


def _answer_list(a: ArrayArg, indices: Iterable[int]) -> int:
    listed = list(indices)
    if a.n < len(listed):
        a.set_count(len(listed))
        raise KvmError(E2BIG, f"{len(listed)} registers, room for {a.n}", writeback=True)
    a.reply(ffi.new("uint32_t[]", listed), len(listed))
    return 0


@system_ioctl("KVM_GET_MSR_INDEX_LIST", _MSR_LIST)
def get_msr_index_list(system: System, a: ArrayArg) -> int:
    """Return the registers that a client has to save.

    Errors:
        E2BIG  too little room; the count needed is told
    Source: api.rst 4.3; x86.c kvm_arch_dev_ioctl
    """
    del system
    return _answer_list(a, INDEX_LIST)


@system_ioctl("KVM_GET_MSR_FEATURE_INDEX_LIST", _MSR_LIST, cap="KVM_CAP_GET_MSR_FEATURES")
def get_msr_feature_index_list(system: System, a: ArrayArg) -> int:
    """Return the registers that tell features, which KVM_GET_MSRS on /dev/kvm reads.

    Errors:
        E2BIG  too little room; the count needed is told
    Source: api.rst 4.3; x86.c kvm_arch_dev_ioctl
    """
    del system
    return _answer_list(a, FEATURE_MSRS)


# ---- the instructions ----------------------------------------------------------------------------


@on_exit(lib.EXIT_RDMSR)
def handle_rdmsr(vcpu: Vcpu) -> Outcome:
    """Read a register for the guest."""
    gpr = vcpu.cpu.gpr
    index = gpr[1] & 0xFFFF_FFFF
    try:
        data = get_msr(vcpu, index, host=False)
    except MsrError:
        if trace.kvm_msr.enabled:
            trace.kvm_msr(direction="read", index=index, data=0, suffix=" (#GP)")
        vcpu.events.inject_gp(vcpu)
        return RESUME
    if trace.kvm_msr.enabled:
        trace.kvm_msr(direction="read", index=index, data=data, suffix="")
    gpr[0], gpr[2] = data & 0xFFFF_FFFF, data >> 32
    vcpu.cpu.skip()
    return RESUME


@on_exit(lib.EXIT_WRMSR)
def handle_wrmsr(vcpu: Vcpu) -> Outcome:
    """Write a register for the guest; rip is at the WRMSR when that is #GP."""
    gpr = vcpu.cpu.gpr
    index, data = gpr[1] & 0xFFFF_FFFF, gpr[0] & 0xFFFF_FFFF | (gpr[2] & 0xFFFF_FFFF) << 32
    try:
        set_msr(vcpu, index, data, host=False)
    except MsrError:
        if trace.kvm_msr.enabled:
            trace.kvm_msr(direction="write", index=index, data=data, suffix=" (#GP)")
        vcpu.events.inject_gp(vcpu)
        return RESUME
    if trace.kvm_msr.enabled:
        trace.kvm_msr(direction="write", index=index, data=data, suffix="")
    vcpu.cpu.skip()
    return RESUME


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
        setattr(vcpu.cpu.guest, name, canonical(vcpu, data))


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
    if data & ~EFER_SUPPORTED:
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
    *_names(
        "MSR_MTRRfix64K_00000", "MSR_MTRRfix16K_80000", "MSR_MTRRfix16K_A0000",
        "MSR_MTRRfix4K_C0000", "MSR_MTRRfix4K_C8000", "MSR_MTRRfix4K_D0000", "MSR_MTRRfix4K_D8000",
        "MSR_MTRRfix4K_E0000", "MSR_MTRRfix4K_E8000", "MSR_MTRRfix4K_F0000", "MSR_MTRRfix4K_F8000",
    ),  # fmt: skip
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


# ---- machine checks ------------------------------------------------------------------------------

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


@mc_bank.writer
def _write_mc_bank(vcpu: Vcpu, index: int, data: int, host: bool) -> None:
    bank, member = divmod(index - uapi.MSR_IA32_MC0_CTL, 4)
    _check_bank(vcpu, bank)
    # Bits 0 and 10 some systems clear to work around errata: x86.c set_msr_mce.
    if member == 0 and data and data | 1 << 10 | 1 != _MASK64:
        raise invalid()
    writable = host or vcpu.msrs.get(uapi.MSR_K7_HWCR) & _HWCR_MC_STATUS_WRITE_ENABLE
    if member == 1 and data and not writable:
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


# ---- what systems read at boot -------------------------------------------------------------------

_PLATFORM_INFO_CPUID_FAULT = 1 << 31
_CPUID_FAULT = 1
_MISC_ENABLE_READ_ONLY = uapi.MSR_IA32_MISC_ENABLE_PEBS_UNAVAIL | uapi.MSR_IA32_MISC_ENABLE_BTS_UNAVAIL
# This processor leaks nothing: guests need no workaround.
# RDCL_NO, SKIP_VMENTRY_L1DFLUSH, SSB_NO, MDS_NO, PSCHANGE_MC_NO, TAA_NO, SBDR_SSDP_NO, FBSDP_NO,
# PSDP_NO, GDS_NO, RFDS_NO, ITS_NO.
_ARCH_CAPABILITIES = (
    1 << 0 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 13 | 1 << 14 | 1 << 15 | 1 << 26 | 1 << 27 | 1 << 62
)
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
    *_names(
        "MSR_IA32_PLATFORM_ID", "MSR_IA32_EBL_CR_POWERON", "MSR_AMD64_SYSCFG", "MSR_K8_INT_PENDING_MSG",
        "MSR_FAM10H_MMIO_CONF_BASE", "MSR_IA32_PERF_CTL", "MSR_IA32_LASTBRANCHFROMIP",
        "MSR_IA32_LASTBRANCHTOIP", "MSR_IA32_LASTINTFROMIP", "MSR_IA32_LASTINTTOIP",
    ),  # fmt: skip
)
# Performance counters that no PMU is behind, and AMD registers that its systems write blindly.
fixed(
    *_names("MSR_AMD64_NB_CFG", "MSR_VM_HSAVE_PA", "MSR_AMD64_BU_CFG2", "MSR_AMD64_DC_CFG"),
    *range(uapi.MSR_K7_EVNTSEL0, uapi.MSR_K7_EVNTSEL0 + 4),
    *range(uapi.MSR_K7_PERFCTR0, uapi.MSR_K7_PERFCTR0 + 4),
    *_names("MSR_P6_EVNTSEL0", "MSR_P6_EVNTSEL1", "MSR_IA32_PERFCTR0", "MSR_IA32_PERFCTR1"),
    writes_ignored=True,
)
write_only(uapi.MSR_IA32_UCODE_WRITE, uapi.MSR_AMD64_PATCH_LOADER)


@msr(uapi.MSR_IA32_UCODE_REV, save=True)
def ucode_rev(vcpu: Vcpu, index: int, host: bool) -> int:
    """Revision of the microcode, which the client may choose."""
    del host
    return vcpu.msrs.get(index)


@ucode_rev.writer
def _write_ucode_rev(vcpu: Vcpu, index: int, data: int, host: bool) -> None:
    # A guest writes 0 before it reads the revision: nothing happens.
    if host:
        vcpu.msrs.values[index] = data


RESET_VALUES[uapi.MSR_IA32_UCODE_REV] = _UCODE_REV


@msr(uapi.MSR_IA32_ARCH_CAPABILITIES, save=True)
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


RESET_VALUES[uapi.MSR_IA32_ARCH_CAPABILITIES] = _ARCH_CAPABILITIES


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


@msr(uapi.MSR_PLATFORM_INFO, save=True)
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


RESET_VALUES[uapi.MSR_PLATFORM_INFO] = _PLATFORM_INFO_CPUID_FAULT

stored(
    uapi.MSR_MISC_FEATURES_ENABLES,
    save=True,
    check=lambda vcpu, data, _host: (
        not data & ~_CPUID_FAULT
        and (not data or bool(vcpu.msrs.get(uapi.MSR_PLATFORM_INFO) & _PLATFORM_INFO_CPUID_FAULT))
    ),
)


# ---- KVM's own -----------------------------------------------------------------------------------


def guest_pv_has(vcpu: Vcpu, feature: int) -> bool:
    """Say if the guest has a KVM_FEATURE_*: all of them, unless the client wants CPUID to rule."""
    return not vcpu.msrs.pv_enforce or bool(vcpu.cpuid.pv_features >> feature & 1)


@vcpu_cap("KVM_CAP_ENFORCE_PV_FEATURE_CPUID")
def enforce_pv_feature_cpuid(vcpu: Vcpu, args: Args) -> int:
    """Have paravirtual registers and hypercalls follow the guest's CPUID: args[0] on or off.

    Errors: none
    Source: api.rst 6.13
    """
    vcpu.msrs.pv_enforce = bool(args[0])
    return 0


def _clock_msrs(wall: int, system: int, feature: int, *, old: bool) -> None:
    @msr(wall, save=True)
    def wall_clock(vcpu: Vcpu, index: int, host: bool) -> int:
        del index, host
        if not guest_pv_has(vcpu, feature):
            raise unsupported()
        return vcpu.vm.clock.wall_clock

    @wall_clock.writer
    def _write_wall_clock(vcpu: Vcpu, index: int, data: int, host: bool) -> None:
        del index, host
        if not guest_pv_has(vcpu, feature):
            raise unsupported()
        clock.write_wall_clock(vcpu.vm, data)

    @msr(system, save=True)
    def system_time(vcpu: Vcpu, index: int, host: bool) -> int:
        del index, host
        if not guest_pv_has(vcpu, feature):
            raise unsupported()
        return vcpu.clock.system_time

    @system_time.writer
    def _write_system_time(vcpu: Vcpu, index: int, data: int, host: bool) -> None:
        del index
        if not guest_pv_has(vcpu, feature):
            raise unsupported()
        clock.write_system_time(vcpu, data, old_msr=old, host=host)


_clock_msrs(uapi.MSR_KVM_WALL_CLOCK, uapi.MSR_KVM_SYSTEM_TIME, uapi.KVM_FEATURE_CLOCKSOURCE, old=True)
_clock_msrs(
    uapi.MSR_KVM_WALL_CLOCK_NEW, uapi.MSR_KVM_SYSTEM_TIME_NEW, uapi.KVM_FEATURE_CLOCKSOURCE2, old=False
)


def _pv_stored(index: int, feature: int, check: Check | None = None, *, reset: int = 0) -> None:
    row = stored(index, reset=reset, save=True)

    def read(vcpu: Vcpu, index: int, host: bool) -> int:
        del host
        if not guest_pv_has(vcpu, feature):
            raise unsupported()
        return vcpu.msrs.get(index)

    row.read = read

    @row.writer
    def _write(vcpu: Vcpu, index: int, data: int, host: bool) -> None:
        if not guest_pv_has(vcpu, feature):
            raise unsupported()
        if check is not None and not check(vcpu, data, host):
            raise invalid()
        vcpu.msrs.values[index] = data


_STEAL_RESERVED = 0x3E
# Asynchronous page faults and their interrupt need a local APIC in the kernel.
_pv_stored(
    uapi.MSR_KVM_ASYNC_PF_EN, uapi.KVM_FEATURE_ASYNC_PF, lambda vcpu, data, _: vcpu.lapic_in_kernel or not data
)
_pv_stored(
    uapi.MSR_KVM_ASYNC_PF_INT,
    uapi.KVM_FEATURE_ASYNC_PF_INT,
    lambda vcpu, data, _: not data >> 8 and vcpu.lapic_in_kernel,
)
_pv_stored(uapi.MSR_KVM_STEAL_TIME, uapi.KVM_FEATURE_STEAL_TIME, lambda _v, data, _h: not data & _STEAL_RESERVED)
_pv_stored(uapi.MSR_KVM_PV_EOI_EN, uapi.KVM_FEATURE_PV_EOI, lambda _v, data, _h: not data & 2)
_pv_stored(uapi.MSR_KVM_POLL_CONTROL, uapi.KVM_FEATURE_POLL_CONTROL, lambda _v, data, _h: not data >> 1, reset=1)


# ---- the lists -----------------------------------------------------------------------------------

# Registers that /dev/kvm itself can be asked about.
FEATURE_MSRS = {
    uapi.MSR_IA32_UCODE_REV: _UCODE_REV,
    uapi.MSR_IA32_ARCH_CAPABILITIES: _ARCH_CAPABILITIES,
}
# Those of them that stay what they are once a vCPU has run.
IMMUTABLE = frozenset({uapi.MSR_IA32_ARCH_CAPABILITIES})
INDEX_LIST = tuple(index for index, row in MSRS.items() if row.save)

