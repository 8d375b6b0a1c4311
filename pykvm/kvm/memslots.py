"""KVM_SET_USER_MEMORY_REGION: the rules by which memory slots change; guest memory for KVM itself."""

from __future__ import annotations

import dataclasses
import mmap
from errno import EEXIST, EINVAL
from typing import TYPE_CHECKING

from pykvm.abi import CData, Gfn, Gpa, Hva, ffi, uapi
from pykvm.abi.errors import KvmError
from pykvm.abi.ioctl import In, vm_ioctl
from pykvm.abi.uaccess import address_of, copy_from_user, copy_to_user
from pykvm.mmu.slots import PAGE_SHIFT, Change, Memslot, Memslots

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pykvm.kvm.vm import Vm

PAGE_SIZE = 1 << PAGE_SHIFT
TASK_SIZE_MAX = 0x7FFF_FFFF_F000
KVM_MEM_MAX_NR_PAGES = (1 << 31) - 1
# A frame number behind this one fits no page table entry: 52-bit physical addresses.
MAX_GFN = (1 << (52 - PAGE_SHIFT)) - 1


@dataclasses.dataclass(frozen=True, slots=True)
class Region:
    """The argument of KVM_SET_USER_MEMORY_REGION, taken from the client's struct."""

    slot: int
    flags: int
    guest_phys_addr: Gpa
    memory_size: int
    userspace_addr: Hva


def set_memory_region(vm: Vm, region: Region) -> int:
    """Create, move, re-flag or delete a slot; the checks are kvm_set_memory_region()'s, in its order."""
    as_id, slot_id = region.slot >> 16, region.slot & 0xFFFF
    strict = vm.kernel.behaviour.strict_memslots
    if not strict:
        region = dataclasses.replace(region, flags=region.flags & uapi.KVM_MEM_LOG_DIRTY_PAGES)
    _check_region(vm, region, as_id, slot_id)
    with vm.slots_lock:
        slots = vm.memslots[as_id]
        old = slots.by_id.get(slot_id)
        if not region.memory_size:
            if old is None and not strict:
                return 0
            if old is None:
                raise KvmError(EINVAL, f"slot {slot_id}: nothing to delete")
            _commit(vm, old, None, Change.DELETE, as_id)
            return 0
        new = Memslot(
            as_id,
            slot_id,
            Gfn(region.guest_phys_addr >> PAGE_SHIFT),
            region.memory_size >> PAGE_SHIFT,
            # Old kernels kept a slot's address, whatever a later call said.
            old.userspace_addr if old is not None and not strict else region.userspace_addr,
            region.flags,
        )
        change = _classify(old, new)
        if change is None:
            return 0
        if change is not Change.FLAGS_ONLY:
            if slots.overlaps(new.base_gfn, new.npages, slot_id):
                raise KvmError(EEXIST, f"slot {slot_id}: {region.guest_phys_addr:#x} overlaps another slot")
            if new.end_gfn - 1 > MAX_GFN:
                raise KvmError(EINVAL, f"slot {slot_id}: beyond the physical address width")
        bitmap, same_as = _dirty_bitmap(vm, old, new), old if change is Change.FLAGS_ONLY else None
        _commit(vm, old, dataclasses.replace(new, dirty_bitmap=bitmap, same_as=same_as), change, as_id)
    return 0


def _check_region(vm: Vm, region: Region, as_id: int, slot_id: int) -> None:
    """Raise EINVAL for what is wrong whatever the slots are."""
    if slot_id >= vm.kernel.limits.memslots:
        raise KvmError(EINVAL, f"slot {slot_id}: only {vm.kernel.limits.memslots} slots")
    if region.flags & ~(uapi.KVM_MEM_LOG_DIRTY_PAGES | uapi.KVM_MEM_READONLY):
        raise KvmError(EINVAL, f"slot {slot_id}: unknown flags {region.flags:#x}")
    if region.memory_size % PAGE_SIZE or region.guest_phys_addr % PAGE_SIZE:
        raise KvmError(EINVAL, f"slot {slot_id}: gpa or size is not page-aligned")
    if region.userspace_addr % PAGE_SIZE or region.userspace_addr + region.memory_size > TASK_SIZE_MAX:
        raise KvmError(EINVAL, f"slot {slot_id}: hva {region.userspace_addr:#x} is no range of user pages")
    if as_id >= len(vm.memslots):
        raise KvmError(EINVAL, f"address space {as_id} does not exist")
    if region.guest_phys_addr + region.memory_size >= 1 << 64:
        raise KvmError(EINVAL, f"slot {slot_id}: gpa range wraps around")
    if region.memory_size >> PAGE_SHIFT > KVM_MEM_MAX_NR_PAGES:
        raise KvmError(EINVAL, f"slot {slot_id}: more than {KVM_MEM_MAX_NR_PAGES} pages")


def set_private_region(vm: Vm, slot_id: int, gpa: Gpa, npages: int, *, replace: bool) -> None:
    """Make a slot of KVM's own, on memory of its own, in every address space (__x86_set_memory_region).

    replace: one that is there moves.

    Errors:
        EEXIST  it is there; another slot is
        EINVAL  gpa is not page-aligned
    """
    with vm.slots_lock:
        if slot_id in vm.private_memory and not replace:
            raise KvmError(EEXIST, f"slot {slot_id} exists")
        if gpa % PAGE_SIZE:
            raise KvmError(EINVAL, f"slot {slot_id}: gpa {gpa:#x} is not page-aligned")
        gfn = Gfn(gpa >> PAGE_SHIFT)
        if any(slots.overlaps(gfn, npages, slot_id) for slots in vm.memslots):
            raise KvmError(EEXIST, f"slot {slot_id}: {gpa:#x} overlaps another slot")
        memory = vm.private_memory.setdefault(slot_id, mmap.mmap(-1, npages << PAGE_SHIFT))
        hva = Hva(address_of(ffi.from_buffer(memory)))
        for as_id in range(len(vm.memslots)):
            old = vm.memslots[as_id].by_id.get(slot_id)
            new = Memslot(as_id, slot_id, gfn, npages, hva, 0)
            change = Change.CREATE if old is None else _classify(old, new)
            if change is not None:
                _commit(vm, old, new, change, as_id)


def _classify(old: Memslot | None, new: Memslot) -> Change | None:
    if old is None:
        return Change.CREATE
    if new.userspace_addr != old.userspace_addr or new.npages != old.npages:
        raise KvmError(EINVAL, f"slot {new.id}: hva and size of an existing slot cannot change")
    if (new.flags ^ old.flags) & uapi.KVM_MEM_READONLY:
        raise KvmError(EINVAL, f"slot {new.id}: READONLY of an existing slot cannot change")
    if new.base_gfn != old.base_gfn:
        return Change.MOVE
    return Change.FLAGS_ONLY if new.flags != old.flags else None


def _dirty_bitmap(vm: Vm, old: Memslot | None, new: Memslot) -> bytearray | None:
    if not new.logging or vm.dirty_ring_size:
        return None
    if old is not None and old.dirty_bitmap is not None:
        return old.dirty_bitmap
    size = dirty_bitmap_bytes(new.npages)
    if not vm.dirty_log_initially_set:
        return bytearray(size)
    return bytearray(((1 << new.npages) - 1).to_bytes(size, "little"))


def dirty_bitmap_bytes(npages: int) -> int:
    """Size of a dirty bitmap as the ABI transfers it: whole 64-bit words."""
    return (npages + 63) // 64 * 8


def _commit(vm: Vm, old: Memslot | None, new: Memslot | None, change: Change, as_id: int) -> None:
    """Publish the change and make every vCPU see it before the ioctl returns."""
    spaces = list(vm.memslots)
    # One generation for all address spaces, as an MMIO spte carries only one.
    generation = max(s.generation for s in spaces) + 1
    for i, slots in enumerate(spaces):
        if i == as_id:
            spaces[i] = slots.replaced(old, new, generation)
        else:
            spaces[i] = dataclasses.replace(slots, generation=generation)
    # No fault may find the new slots before what the old ones meant is gone.
    with vm.mmu.lock:
        vm.memslots = tuple(spaces)
        vm.mmu.on_memslots_changed(old, new, change, as_id)
    for stats_file in vm.stats_files:
        stats_file.refresh()


@vm_ioctl("KVM_SET_USER_MEMORY_REGION", In("struct kvm_userspace_memory_region"), cap="KVM_CAP_USER_MEMORY")
def set_user_memory_region(vm: Vm, region: CData) -> int:
    """Create, move, re-flag or delete a memory slot.

    memory_size 0 deletes; another guest_phys_addr moves; an identical call does nothing.

    Errors:
        EINVAL  gpa, size or hva not page-aligned or out of range; unknown flags; slot or address
                space out of range; delete of an empty slot; resize; another hva or READONLY
        EEXIST  the new range overlaps another slot of the address space
    Source: api.rst 4.35; virt/kvm/kvm_main.c kvm_set_memory_region
    """
    return set_memory_region(vm, _region(region))


@vm_ioctl(
    "KVM_SET_USER_MEMORY_REGION2", In("struct kvm_userspace_memory_region2"), cap="KVM_CAP_USER_MEMORY2"
)
def set_user_memory_region2(vm: Vm, region: CData) -> int:
    """Do what KVM_SET_USER_MEMORY_REGION does; there is no guest_memfd, and its members are not looked at.

    Errors:
        EINVAL  what KVM_SET_USER_MEMORY_REGION refuses; KVM_MEM_GUEST_MEMFD
        EEXIST  the new range overlaps another slot of the address space
    Source: api.rst 4.140; virt/kvm/kvm_main.c kvm_set_memory_region, check_memory_region_flags
    """
    return set_memory_region(vm, _region(region))


def _region(region: CData) -> Region:
    return Region(
        int(region.slot),
        int(region.flags),
        Gpa(int(region.guest_phys_addr)),
        int(region.memory_size),
        Hva(int(region.userspace_addr)),
    )


def _pieces(vm: Vm, gpa: int, size: int, as_id: int) -> Iterator[tuple[Memslot | None, int, int]]:
    """Split [gpa, gpa + size) at page ends: (slot, gpa, length)."""
    slots = vm.memslots[as_id]
    while size:
        n = min(size, PAGE_SIZE - gpa % PAGE_SIZE)
        yield slots.gfn_to_memslot(gpa >> PAGE_SHIFT), gpa, n
        gpa += n
        size -= n


def read_guest(vm: Vm, gpa: int, size: int, as_id: int = 0) -> bytes | None:
    """Return guest memory, or None where there is no slot or no host memory behind it."""
    out = b""
    for slot, at, n in _pieces(vm, gpa, size, as_id):
        if slot is None:
            return None
        try:
            out += copy_from_user(slot.hva(at >> PAGE_SHIFT) + at % PAGE_SIZE, n)
        except KvmError:
            return None
    return out


def write_guest(vm: Vm, gpa: int, data: bytes, as_id: int = 0) -> bool:
    """Write guest memory as the kernel does (dirty-logged); False when it is not there or READONLY."""
    done = 0
    for slot, at, n in _pieces(vm, gpa, len(data), as_id):
        if slot is None or slot.readonly:
            return False
        try:
            copy_to_user(slot.hva(at >> PAGE_SHIFT) + at % PAGE_SIZE, data[done : done + n])
        except KvmError:
            return False
        vm.mmu.mark_page_dirty(as_id, at >> PAGE_SHIFT)
        done += n
    return True


def hva_ranges(vm: Vm) -> tuple[tuple[int, int], ...]:
    """Host ranges [start, end) behind the VM's slots."""
    return tuple(
        (s.userspace_addr, s.userspace_addr + (s.npages << PAGE_SHIFT))
        for slots in vm.memslots
        for s in slots.ordered
    )


def invalidate_range_start(vm: Vm, start: int, end: int) -> None:
    """Drop every translation to host memory in [start, end): the MMU notifier's role.

    Called before the client's munmap, mmap over it, mremap, madvise or mprotect takes effect.  Until
    `invalidate_range_end`, which must follow, faults there are retried.
    """
    vm.mmu.invalidate_begin(start, end)
    for slots in vm.memslots:
        for slot in slots.ordered:
            first = max(start, slot.userspace_addr)
            last = min(end, slot.userspace_addr + (slot.npages << PAGE_SHIFT))
            if first < last:
                gfn = slot.base_gfn + ((first - slot.userspace_addr) >> PAGE_SHIFT)
                npages = (last - first + PAGE_SIZE - 1) >> PAGE_SHIFT
                vm.mmu.unmap_gfn_range(slot.as_id, gfn, gfn + npages)
    for stats_file in vm.stats_files:
        stats_file.refresh()


def invalidate_range_end(vm: Vm, start: int, end: int) -> None:
    """Let faults have the memory at [start, end) as it is now: it has changed."""
    vm.mmu.invalidate_end(start, end)


def new_address_spaces(count: int) -> tuple[Memslots, ...]:
    """Return the empty address spaces of a new VM."""
    return tuple(Memslots() for _ in range(count))
