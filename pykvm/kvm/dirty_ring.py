"""Dirty rings: each vCPU tells in a ring that it shares with the client which frames it has written.

The client maps a ring at page KVM_DIRTY_LOG_PAGE_OFFSET of the vCPU's descriptor, collects entries (DIRTY
becomes RESET), and has KVM_RESET_DIRTY_RINGS write-protect their frames again.
"""

from __future__ import annotations

from errno import E2BIG, EINVAL
from typing import TYPE_CHECKING

from pykvm.abi import CData, ffi, uapi
from pykvm.abi.errors import KvmError
from pykvm.abi.ioctl import NoArg, vm_ioctl
from pykvm.kvm import stats
from pykvm.kvm.caps import Args, vm_cap

if TYPE_CHECKING:
    from pykvm.kvm.vcpu import Vcpu
    from pykvm.kvm.vm import Vm
    from pykvm.mmu.slots import Memslot

PAGE_SIZE = 4096
OFFSET = uapi.KVM_DIRTY_LOG_PAGE_OFFSET * PAGE_SIZE
ENTRY_SIZE = ffi.sizeof("struct kvm_dirty_gfn")
KVM_DIRTY_RING_MAX_ENTRIES = 65536
# A vCPU that has to stop may still log what its exit does.
KVM_DIRTY_RING_RSVD_ENTRIES = 64
_MAX_SIZE = KVM_DIRTY_RING_MAX_ENTRIES * ENTRY_SIZE
_DIRTY, _RESET = uapi.KVM_DIRTY_GFN_F_DIRTY, uapi.KVM_DIRTY_GFN_F_RESET


class DirtyRing:
    """One vCPU's ring (struct kvm_dirty_ring): pushed to under mmu_lock, reset under slots_lock."""

    def __init__(self, vcpu: Vcpu, entries: CData, size: int) -> None:
        """Take the memory the client maps: ``struct kvm_dirty_gfn *``, `size` entries, a power of two."""
        self._vcpu = vcpu
        self._entries = entries
        self._mask = size - 1
        self._soft_limit = size - KVM_DIRTY_RING_RSVD_ENTRIES
        self._dirty_index = 0
        self._reset_index = 0

    @property
    def soft_full(self) -> bool:
        """Whether the vCPU must not run until entries are reset."""
        return self._dirty_index - self._reset_index >= self._soft_limit

    def push(self, slot: int, offset: int) -> None:
        """Tell of a write to page `offset` of a slot (address space in the high half)."""
        entry = self._entries[self._dirty_index & self._mask]
        entry.slot = slot
        entry.offset = offset
        # Last: the client takes an entry for valid by it.
        entry.flags = _DIRTY
        self._dirty_index += 1
        if self.soft_full:
            # KVM_REQ_DIRTY_RING_SOFT_FULL
            self._vcpu.events.requested = True

    def collected(self) -> list[tuple[int, int]]:
        """Take back the entries that the client has collected, in order: (slot, offset)."""
        found: list[tuple[int, int]] = []
        while True:
            entry = self._entries[self._reset_index & self._mask]
            if not entry.flags & _RESET:
                return found
            found.append((int(entry.slot), int(entry.offset)))
            entry.flags = 0
            self._reset_index += 1


def make_ring(vcpu: Vcpu, memory: CData, size: int) -> DirtyRing:
    """Return the ring in the memory behind a vCPU's descriptor; size: of the ring, in bytes."""
    entries = ffi.cast("struct kvm_dirty_gfn *", ffi.cast("char *", memory) + OFFSET)
    return DirtyRing(vcpu, entries, size // ENTRY_SIZE)


def check_full(vcpu: Vcpu) -> bool:
    """Say if the vCPU has to stop for its ring, told in kvm_run; it stays so until there is room."""
    ring = vcpu.dirty_ring
    if ring is None or not ring.soft_full:
        return False
    vcpu.events.requested = True
    vcpu.kvm_run.exit_reason = uapi.KVM_EXIT_DIRTY_RING_FULL
    return True


def _enable(vm: Vm, size: int) -> int:
    # An unsigned int in the kernel.
    size &= 0xFFFF_FFFF
    if not size or size & (size - 1):
        raise KvmError(EINVAL, f"a ring of {size} bytes: not a power of two")
    if size < max(KVM_DIRTY_RING_RSVD_ENTRIES * ENTRY_SIZE, PAGE_SIZE):
        raise KvmError(EINVAL, f"a ring of {size} bytes: less than a page")
    if size > _MAX_SIZE:
        raise KvmError(E2BIG, f"a ring of {size} bytes: at most {_MAX_SIZE}")
    with vm.lock:
        if vm.dirty_ring_size:
            raise KvmError(EINVAL, "there are rings already")
        if vm.created_vcpus:
            raise KvmError(EINVAL, "a vCPU exists")
        vm.dirty_ring_size = size
    return 0


@vm_cap("KVM_CAP_DIRTY_LOG_RING", _MAX_SIZE, any_flags=True)
def enable_dirty_log_ring(vm: Vm, args: Args) -> int:
    """Give each vCPU a dirty ring of args[0] bytes in place of the slots' bitmaps; before the first vCPU.

    Errors:
        EINVAL  no power of two, less than a page; there are rings, or vCPUs, already
        E2BIG   more than 65536 entries
    Source: api.rst 8.29; kvm_main.c kvm_vm_ioctl_enable_dirty_log_ring
    """
    return _enable(vm, args[0])


@vm_cap("KVM_CAP_DIRTY_LOG_RING_ACQ_REL", _MAX_SIZE, any_flags=True)
def enable_dirty_log_ring_acq_rel(vm: Vm, args: Args) -> int:
    """Do the same, for clients that order their accesses to the ring themselves.

    Errors:
        EINVAL  no power of two, less than a page; there are rings, or vCPUs, already
        E2BIG   more than 65536 entries
    Source: api.rst 8.29; kvm_main.c kvm_vm_ioctl_enable_dirty_log_ring
    """
    return _enable(vm, args[0])


@vm_ioctl("KVM_RESET_DIRTY_RINGS", NoArg(), cap="KVM_CAP_DIRTY_LOG_RING")
def reset_dirty_rings(vm: Vm) -> int:
    """Write-protect the frames that the client has collected, and give their entries back; return how many.

    Errors:
        EINVAL  there are no rings
    Source: api.rst 4.129; kvm_main.c kvm_vm_ioctl_reset_dirty_pages
    """
    if not vm.dirty_ring_size:
        raise KvmError(EINVAL, "there are no dirty rings")
    count = 0
    with vm.slots_lock:
        for vcpu in tuple(vm.vcpus.values()):
            if vcpu.dirty_ring is None:
                continue
            found = vcpu.dirty_ring.collected()
            count += len(found)
            _protect(vm, found)
        if count:
            vm.mmu.flush_remote_tlbs()
    stats.refresh(vm)
    return count


def _protect(vm: Vm, found: list[tuple[int, int]]) -> None:
    """kvm_reset_dirty_gfn(): slots may have changed since, and the numbers were the client's to write."""
    wanted: dict[int, list[int]] = {}
    for number, offset in found:
        wanted.setdefault(number, []).append(offset)
    for number, offsets in wanted.items():
        slot = _slot(vm, number)
        if slot is not None:
            gfns = [slot.base_gfn + offset for offset in offsets if offset < slot.npages]
            vm.mmu.reset_dirty(slot, gfns)


def _slot(vm: Vm, number: int) -> Memslot | None:
    as_id, slot_id = number >> 16, number & 0xFFFF
    return vm.memslots[as_id].by_id.get(slot_id) if as_id < len(vm.memslots) else None
