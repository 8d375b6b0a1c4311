"""Which MSRs a guest may access at all, and which of its failures the client wants to see."""

from __future__ import annotations

from dataclasses import dataclass
from errno import EINVAL
from typing import TYPE_CHECKING

from pykvm.abi import CData, lib, uapi
from pykvm.abi.errors import KvmError
from pykvm.abi.ioctl import In, vm_ioctl
from pykvm.abi.uaccess import address_of
from pykvm.kvm.caps import Args, vm_cap

if TYPE_CHECKING:
    from pykvm.abi.uaccess import UserMemory
    from pykvm.kvm.vcpu import Vcpu
    from pykvm.kvm.vm import Vm

# A filter never hides the local APIC: its registers may be accessed without an exit.
_X2APIC = range(uapi.APIC_BASE_MSR, uapi.APIC_BASE_MSR + 0x100)
_MAX_BITMAP_SIZE = uapi.KVM_MSR_FILTER_MAX_BITMAP_SIZE


@dataclass(frozen=True, slots=True)
class Range:
    """Registers base to base + nmsrs - 1; `bitmap`: bit n allows what `flags` names, of base + n."""

    flags: int
    base: int
    nmsrs: int
    bitmap: bytes

    @property
    def end(self) -> int:
        """Number behind the range, of 32 bits: one that wraps around matches nothing (kvm_msr_allowed)."""
        return self.base + self.nmsrs & 0xFFFF_FFFF

    def allows(self, index: int) -> bool:
        """Say what the bitmap says of a register in the range."""
        offset = index - self.base
        return bool(self.bitmap[offset >> 3] >> (offset & 7) & 1)


@dataclass(frozen=True, slots=True)
class MsrFilter:
    """The ranges, the first that matches counts; `default_allow`: what holds outside of them."""

    default_allow: bool
    ranges: tuple[Range, ...]

    def is_allowed(self, index: int, access: int) -> bool:
        """Say if the guest may do KVM_MSR_FILTER_READ or _WRITE to a register."""
        for each in self.ranges:
            if each.base <= index < each.end and each.flags & access:
                return each.allows(index)
        return self.default_allow


def is_allowed(vm: Vm, index: int, access: int) -> bool:
    """Say if a guest may access a register in this way (kvm_msr_allowed)."""
    return vm.msr_filter is None or index in _X2APIC or vm.msr_filter.is_allowed(index, access)


def update_intercept(vcpu: Vcpu) -> None:
    """Have every MSR access exit if there is a filter: those the processor keeps do not by themselves."""
    vcpu.events.set_control(vcpu, lib.CPU_EXIT_MSR_ALL, on=vcpu.vm.msr_filter is not None)


@vm_ioctl("KVM_X86_SET_MSR_FILTER", In("struct kvm_msr_filter"), cap="KVM_CAP_X86_MSR_FILTER", user=True)
def set_msr_filter(vm: Vm, given: CData, user: UserMemory) -> int:
    """Replace the filter of MSR accesses of all vCPUs; the client's own are not filtered.

    An access that is denied is #GP, or an exit (KVM_CAP_X86_USER_SPACE_MSR).  A filter that allows
    all, with no range, is none.

    Errors:
        EINVAL  unknown flags; nothing allowed by default and no range; a range with flags that are
                unknown or 0, or with a bitmap that is too large
    Source: api.rst 4.97; x86.c kvm_vm_ioctl_set_msr_filter, kvm_add_msr_filter
    """
    if given.flags & ~uapi.KVM_MSR_FILTER_VALID_MASK:
        raise KvmError(EINVAL, f"unknown flags {given.flags:#x}")
    used = [each for each in given.ranges if each.nmsrs]
    default_allow = not given.flags & uapi.KVM_MSR_FILTER_DEFAULT_DENY
    if not used and not default_allow:
        raise KvmError(EINVAL, "all is denied and no range allows anything")
    ranges = tuple(_range(each, user) for each in used)
    vm.msr_filter = MsrFilter(default_allow, ranges) if ranges else None
    for vcpu in tuple(vm.vcpus.values()):
        vcpu.events.requested = True
        vcpu.cpu.kick()
    return 0


def _range(given: CData, user: UserMemory) -> Range:
    flags, size = given.flags, (given.nmsrs + 63) // 64 * 8
    if not flags or flags & ~uapi.KVM_MSR_FILTER_RANGE_VALID_MASK:
        raise KvmError(EINVAL, f"range at {given.base:#x}: flags {flags:#x}")
    if size > _MAX_BITMAP_SIZE:
        raise KvmError(EINVAL, f"range at {given.base:#x}: {given.nmsrs} registers are too many")
    return Range(flags, given.base, given.nmsrs, user.read(address_of(given.bitmap), size))


@vm_cap("KVM_CAP_X86_USER_SPACE_MSR")
def enable_user_space_msr(vm: Vm, args: Args) -> int:
    """Say which failures exit instead of raising #GP: args[0] is a mask of KVM_MSR_EXIT_REASON_*.

    Errors:
        EINVAL  an unknown reason
    Source: api.rst 7.22
    """
    if args[0] & ~uapi.KVM_MSR_EXIT_REASON_VALID_MASK:
        raise KvmError(EINVAL, f"reasons {args[0]:#x}")
    vm.user_space_msr_mask = args[0]
    return 0
