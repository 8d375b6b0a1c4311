"""Model-specific registers: one row per register, and every list derived from the rows.

A row says how a register is read and written, by the guest (`host` False) or by the client (`host`
True), and whether KVM_GET_MSR_INDEX_LIST names it.  What is listed can be read and written back.
A register that nobody knows is #GP for the guest, and ends KVM_GET_MSRS and KVM_SET_MSRS early.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from errno import E2BIG
from typing import TYPE_CHECKING, TypeAlias

from pykvm import trace
from pykvm.abi import CData, ffi, lib, uapi
from pykvm.abi.errors import KvmError
from pykvm.abi.ioctl import Array, ArrayArg, system_ioctl, vcpu_ioctl
from pykvm.kvm.exits import RESUME, USERSPACE, Outcome, on_exit
from pykvm.kvm.msr_filter import is_allowed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pykvm.kvm.system import System
    from pykvm.kvm.vcpu import Vcpu

MAX_IO_MSRS = 256
RAX, RCX, RDX = 0, 1, 2
_MASK32 = 0xFFFF_FFFF
KVM_MAX_MCE_BANKS = 32

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
    """One register, or a range of alike ones.

    `save`: KVM_GET_MSR_INDEX_LIST names it.  `feature`: it tells a feature, and /dev/kvm answers this
    for it.  `immutable`: it stays what it is once the vCPU has run.
    """

    indices: tuple[int, ...]
    read: Read
    write: Write | None = None
    save: bool = False
    feature: int | None = None
    immutable: bool = False

    def writer(self, write: Write) -> Write:
        """Give the row its other half: ``@row.writer``.  Without one the register is read-only."""
        self.write = write
        return write


MSRS: dict[int, Msr] = {}
# Where that is not 0.
RESET_VALUES: dict[int, int] = {}


def msr(
    *indices: int, save: bool = False, feature: int | None = None, immutable: bool = False
) -> Callable[[Read], Msr]:
    """Register how registers are read; the row's `writer` registers how they are written.

    `feature`: the value of reset, too.
    """

    def register(read: Read) -> Msr:
        row = Msr(tuple(indices), read, save=save, feature=feature, immutable=immutable)
        if feature is not None:
            RESET_VALUES.update(dict.fromkeys(indices, feature))
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


# ---- access --------------------------------------------------------------------------------------


def get_msr(vcpu: Vcpu, index: int, *, host: bool) -> int:
    """Return a register.  Raises MsrError."""
    row = MSRS.get(index)
    if row is None or index in vcpu.vm.absent_msrs:
        raise unsupported()
    try:
        return row.read(vcpu, index, host)
    except MsrError as error:
        # x86.c kvm_do_msr_access: what is listed reads as 0 for the client even if CPUID hides it.
        if host and row.save and error.reason == uapi.KVM_MSR_EXIT_REASON_UNKNOWN:
            return 0
        raise


def set_msr(vcpu: Vcpu, index: int, data: int, *, host: bool) -> None:
    """Write a register.  Raises MsrError."""
    row = MSRS.get(index)
    if row is None or index in vcpu.vm.absent_msrs:
        raise unsupported()
    if row.write is None:
        raise invalid()
    if row.immutable and vcpu.has_run and host and vcpu.vm.kernel.msrs.immutable:
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
    clears = vcpu.vm.kernel.msrs.clears_unreadable

    def read(entry: CData) -> None:
        # kvm_do_msr_access: of one that cannot be read, too, the client's number is gone.
        if clears:
            entry.data = 0
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
    tell = _features(system)
    known = frozenset(_saved(system)) if system.kernel.msrs.others_on_system else frozenset()

    def read(entry: CData) -> None:
        index = entry.index
        if system.kernel.msrs.clears_unreadable:
            entry.data = 0
        if index not in tell and index not in known:
            raise unsupported()
        entry.data = tell.get(index, 0)

    done = _each(a.entries, a.n, read)
    a.reply(a.entries)
    return done


def _saved(system: System) -> list[int]:
    """Return what KVM_GET_MSR_INDEX_LIST names, in the order of this kernel."""
    listed, missing = system.kernel.msrs.save, set(system.absent_msrs)
    if not any(system.offer.has(name) for name in ("RDTSCP", "RDPID")):
        missing.add(uapi.MSR_TSC_AUX)
    order = MSRS if listed is None else (index for index in listed if index in MSRS)
    return [index for index in order if MSRS[index].save and index not in missing]


def _features(system: System) -> dict[int, int]:
    """Return the registers that tell features, and what they tell."""
    known = system.kernel.msrs.feature
    found = {
        index: row.feature
        for index, row in MSRS.items()
        if row.feature is not None and index not in system.absent_msrs and (known is None or index in known)
    }
    if uapi.MSR_IA32_UCODE_REV in found:
        found[uapi.MSR_IA32_UCODE_REV] = system.processor.microcode
    return found


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
    return _answer_list(a, _saved(system))


@system_ioctl("KVM_GET_MSR_FEATURE_INDEX_LIST", _MSR_LIST, cap="KVM_CAP_GET_MSR_FEATURES")
def get_msr_feature_index_list(system: System, a: ArrayArg) -> int:
    """Return the registers that tell features, which KVM_GET_MSRS on /dev/kvm reads.

    Errors:
        E2BIG  too little room; the count needed is told
    Source: api.rst 4.3; x86.c kvm_arch_dev_ioctl
    """
    return _answer_list(a, _features(system))


# ---- the instructions ----------------------------------------------------------------------------


@on_exit(lib.EXIT_RDMSR)
def handle_rdmsr(vcpu: Vcpu) -> Outcome:
    """Read a register for the guest."""
    index = vcpu.cpu.gpr[RCX] & _MASK32
    try:
        _check_filter(vcpu, index, uapi.KVM_MSR_FILTER_READ)
        data = get_msr(vcpu, index, host=False)
    except MsrError as error:
        _trace("read", index, 0, " (#GP)")
        return _ask_client(vcpu, uapi.KVM_EXIT_X86_RDMSR, index, 0, error)
    _trace("read", index, data)
    _return_data(vcpu, data)
    vcpu.cpu.skip()
    return RESUME


@on_exit(lib.EXIT_WRMSR)
def handle_wrmsr(vcpu: Vcpu) -> Outcome:
    """Write a register for the guest; rip is at the WRMSR when that is #GP."""
    gpr = vcpu.cpu.gpr
    index, data = gpr[RCX] & _MASK32, gpr[RAX] & _MASK32 | (gpr[RDX] & _MASK32) << 32
    try:
        _check_filter(vcpu, index, uapi.KVM_MSR_FILTER_WRITE)
        set_msr(vcpu, index, data, host=False)
    except MsrError as error:
        _trace("write", index, data, " (#GP)")
        return _ask_client(vcpu, uapi.KVM_EXIT_X86_WRMSR, index, data, error)
    _trace("write", index, data)
    vcpu.cpu.skip()
    return RESUME


def _check_filter(vcpu: Vcpu, index: int, access: int) -> None:
    if not is_allowed(vcpu.vm, index, access):
        raise MsrError(uapi.KVM_MSR_EXIT_REASON_FILTER)


def _trace(direction: str, index: int, data: int, suffix: str = "") -> None:
    if trace.kvm_msr.enabled:
        trace.kvm_msr(direction=direction, index=index, data=data, suffix=suffix)


def _return_data(vcpu: Vcpu, data: int) -> None:
    gpr = vcpu.cpu.gpr
    gpr[RAX], gpr[RDX] = data & _MASK32, data >> 32


def _ask_client(vcpu: Vcpu, exit_reason: int, index: int, data: int, error: MsrError) -> Outcome:
    """Raise #GP, or have a client that wants to know (KVM_CAP_X86_USER_SPACE_MSR) decide."""
    if not vcpu.vm.user_space_msr_mask & error.reason:
        vcpu.events.inject_gp(vcpu)
        return RESUME
    run = vcpu.kvm_run
    run.exit_reason = exit_reason
    run.msr.error = 0
    ffi.memmove(run.msr.pad, bytes(len(run.msr.pad)), len(run.msr.pad))
    run.msr.reason, run.msr.index, run.msr.data = error.reason, index, data
    reading = exit_reason == uapi.KVM_EXIT_X86_RDMSR
    vcpu.complete_userspace_io = _complete_rdmsr if reading else _complete_wrmsr
    return USERSPACE


def _complete_rdmsr(vcpu: Vcpu) -> Outcome:
    if not vcpu.kvm_run.msr.error:
        _return_data(vcpu, vcpu.kvm_run.msr.data)
    return _complete_wrmsr(vcpu)


def _complete_wrmsr(vcpu: Vcpu) -> Outcome:
    vcpu.pending_linear_rip = None
    if vcpu.kvm_run.msr.error:
        vcpu.events.inject_gp(vcpu)
    else:
        vcpu.cpu.skip()
    return RESUME
