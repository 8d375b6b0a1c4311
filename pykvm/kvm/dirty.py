"""Dirty logging: which frames of a slot the guest (or KVM for it) has written."""

from __future__ import annotations

from errno import EINVAL, ENOENT, ENXIO
from typing import TYPE_CHECKING

from pykvm.abi import CData, uapi
from pykvm.abi.errors import KvmError
from pykvm.abi.ioctl import In, vm_ioctl
from pykvm.abi.uaccess import address_of
from pykvm.kvm.caps import vm_cap
from pykvm.kvm.memslots import dirty_bitmap_bytes

if TYPE_CHECKING:
    from pykvm.abi.uaccess import UserMemory
    from pykvm.kvm.vm import Vm
    from pykvm.mmu.slots import Memslot


def _logged_slot(vm: Vm, number: int) -> tuple[Memslot, bytearray]:
    if vm.dirty_ring_size:
        raise KvmError(ENXIO, "dirty frames are told in rings")
    as_id, slot_id = number >> 16, number & 0xFFFF
    if as_id >= len(vm.memslots) or slot_id >= vm.kernel.limits.memslots:
        raise KvmError(EINVAL, f"slot {number:#x} is out of range")
    slot = vm.memslots[as_id].by_id.get(slot_id)
    if slot is None or slot.dirty_bitmap is None:
        raise KvmError(ENOENT, f"slot {number:#x} has no dirty log")
    return slot, slot.dirty_bitmap


@vm_ioctl("KVM_GET_DIRTY_LOG", In("struct kvm_dirty_log"), user=True)
def get_dirty_log(vm: Vm, log: CData, user: UserMemory) -> int:
    """Copy a slot's dirty bitmap (bit 0 = first page, whole 64-bit words) and start a new cycle.

    With MANUAL_DIRTY_LOG_PROTECT2 nothing is cleared: KVM_CLEAR_DIRTY_LOG does that.

    Errors:
        ENXIO   the VM has dirty rings
        EINVAL  slot or address space out of range
        ENOENT  no such slot, or it does not log
        EFAULT  dirty_bitmap is not writable; the log has been cleared all the same, as on Linux
    Source: api.rst 4.8; virt/kvm/kvm_main.c kvm_get_dirty_log_protect
    """
    with vm.slots_lock:
        slot, bitmap = _logged_slot(vm, int(log.slot))
        snapshot = bytes(bitmap) if vm.dirty_log_manual_protect else vm.mmu.take_dirty(slot, bitmap)
        for stats_file in vm.stats_files:
            stats_file.refresh()
    user.write(address_of(log.dirty_bitmap), snapshot)
    return 0


@vm_ioctl(
    "KVM_CLEAR_DIRTY_LOG",
    In("struct kvm_clear_dirty_log"),
    cap="KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2",
    user=True,
)
def clear_dirty_log(vm: Vm, log: CData, user: UserMemory) -> int:
    """Clear and write-protect the pages whose bit is set, within [first_page, first_page + num_pages).

    Errors:
        ENXIO   the VM has dirty rings
        EINVAL  slot or address space out of range; first_page or num_pages not a multiple of 64
                (num_pages may end the slot); range beyond the slot
        ENOENT  no such slot, or it does not log
        EFAULT  dirty_bitmap is not readable
    Source: api.rst 4.117; virt/kvm/kvm_main.c kvm_clear_dirty_log_protect
    """
    first, num = int(log.first_page), int(log.num_pages)
    with vm.slots_lock:
        if vm.dirty_ring_size:
            raise KvmError(ENXIO, "dirty frames are told in rings")
        as_id, slot_id = int(log.slot) >> 16, int(log.slot) & 0xFFFF
        if as_id >= len(vm.memslots) or slot_id >= vm.kernel.limits.memslots:
            raise KvmError(EINVAL, f"slot {int(log.slot):#x} is out of range")
        if first % 64:
            raise KvmError(EINVAL, f"first_page {first} is not a multiple of 64")
        slot, bitmap = _logged_slot(vm, int(log.slot))
        left = slot.npages - first
        if left < 0 or num > left or (num < left and num % 64):
            raise KvmError(EINVAL, f"pages {first}+{num} are no range of slot {slot.id}")
        wanted = user.read(address_of(log.dirty_bitmap), dirty_bitmap_bytes(num))
        vm.mmu.clear_dirty(slot, bitmap, first, wanted)
    return 0


@vm_cap(
    "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2",
    value=uapi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | uapi.KVM_DIRTY_LOG_INITIALLY_SET,
)
def enable_manual_dirty_log_protect(vm: Vm, args: tuple[int, int, int, int]) -> int:
    """Let the client clear the dirty log itself; args[0]: 1 ENABLE, 2 INITIALLY_SET (needs 1).

    Errors:
        EINVAL  unknown bits, or INITIALLY_SET without ENABLE
    Source: api.rst 7.20; virt/kvm/kvm_main.c kvm_vm_ioctl_enable_cap_generic
    """
    enable, initially_set = uapi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, uapi.KVM_DIRTY_LOG_INITIALLY_SET
    allowed = enable | initially_set if args[0] & enable else 0
    if args[0] & ~allowed:
        raise KvmError(EINVAL, f"manual dirty log protect: bits {args[0]:#x}")
    vm.dirty_log_manual_protect = bool(args[0] & enable)
    vm.dirty_log_initially_set = bool(args[0] & initially_set)
    return 0
