"""Coalesced MMIO and ports: writes to zones the client has named are kept in a ring and do not exit.

The ring is the VM's: the third page of the mapping of every vCPU is the same page.  Here each vCPU's mapping
is a file of its own, so that there is a copy of the ring in each.  Whatever is put in is put into all; how
far a client has taken entries out of one is seen, and told to the others, when the next entry is put in and
when a KVM_RUN begins or ends.  A client sees no difference as long as it takes entries out by one mapping, or
between two KVM_RUNs of the same vCPU by that vCPU's.
"""

from __future__ import annotations

import struct
import threading
from errno import EINVAL, ENOSPC
from typing import TYPE_CHECKING, NamedTuple

from pykvm.abi import CData, ffi, uapi
from pykvm.abi.errors import KvmError
from pykvm.abi.ioctl import In, vm_ioctl
from pykvm.kvm.caps import capability

if TYPE_CHECKING:
    from pykvm.kvm.vm import Vm

_PAGE_SIZE = 4096
OFFSET = uapi.KVM_COALESCED_MMIO_PAGE_OFFSET * _PAGE_SIZE
_RING = ffi.typeof("struct kvm_coalesced_mmio_ring *")
_MAX = uapi.KVM_COALESCED_MMIO_MAX
# first, last; one entry: phys_addr, len, pio, data.
_INDICES = struct.Struct("<II")
_ENTRY = struct.Struct("<QII8s")
# Devices of one bus (NR_IOBUS_DEVS), of which these are the only ones.
_MAX_ZONES = 1000
_INT_MAX = 0x7FFF_FFFF
_MASK64 = 0xFFFF_FFFF_FFFF_FFFF

capability("KVM_CAP_COALESCED_MMIO", uapi.KVM_COALESCED_MMIO_PAGE_OFFSET)
capability("KVM_CAP_COALESCED_PIO", 1)


class Zone(NamedTuple):
    """A range of guest physical addresses, or of ports."""

    addr: int
    size: int
    pio: int

    def contains(self, addr: int, size: int) -> bool:
        """Say if a range lies wholly in the zone; no range is as long as 2 GiB (coalesced_mmio_in_range)."""
        if size > _INT_MAX or addr + size > _MASK64:
            return False
        return self.addr <= addr and addr + size <= (self.addr + self.size & _MASK64)


class CoalescedMmio:
    """The zones of a VM, and its ring: one copy in each vCPU's mapping."""

    def __init__(self) -> None:
        """Start without zones, and with an empty ring."""
        self.zones: tuple[Zone, ...] = ()
        # KVM's ring_lock; a client's signal handler may come in between.
        self._lock = threading.RLock()
        self._page = memoryview(bytearray(_PAGE_SIZE))
        self._copies: dict[int, memoryview] = {}

    def add_copy(self, vcpu_id: int, memory: CData) -> None:
        """Have a new vCPU's mapping, a ``void *``, show the ring, too; until `drop_copy` it must stay."""
        copy = memoryview(ffi.buffer(ffi.cast("char *", memory) + OFFSET, _PAGE_SIZE)).cast("B")
        with self._lock:
            self._take_indices()
            copy[:] = self._page
            self._copies[vcpu_id] = copy

    def drop_copy(self, vcpu_id: int) -> None:
        """Let a vCPU's mapping go."""
        with self._lock:
            self._copies.pop(vcpu_id, None)

    def sync(self) -> None:
        """Show in all copies what the client did to one of them."""
        with self._lock:
            self._take_indices()

    def write(self, addr: int, data: bytes, pio: int) -> bool:
        """Put a write of at most eight bytes into the ring; False: no zone has it, or there is no room."""
        if not any(zone.pio == pio and zone.contains(addr, len(data)) for zone in self.zones):
            return False
        with self._lock:
            first, last = self._take_indices()
            # What the client can write there it may write nonsense to.
            if last >= _MAX or (last + 1) % _MAX == first:
                return False
            at = _INDICES.size + last * _ENTRY.size
            entry = _ENTRY.pack(addr, len(data), pio, data)
            for copy in (self._page, *self._copies.values()):
                copy[at : at + _ENTRY.size] = entry
            # After the entry, by which the client takes it for valid.
            self._put_indices(first, (last + 1) % _MAX)
        return True

    def _take_indices(self) -> tuple[int, int]:
        """Return first and last as the client has them in the copy in which it came furthest."""
        first, last = known = _INDICES.unpack_from(self._page)
        changed = {seen for copy in self._copies.values() if (seen := _INDICES.unpack_from(copy)) != known}
        if changed:
            first, last = max(changed, key=lambda seen: (seen[0] - known[0]) % _MAX)
            self._put_indices(first, last)
        return first, last

    def _put_indices(self, first: int, last: int) -> None:
        for copy in (self._page, *self._copies.values()):
            _INDICES.pack_into(copy, 0, first, last)


def _zone(vm: Vm, request: CData) -> Zone:
    # Older kernels have padding there, and do not look at it.
    pio = int(request.pio) if vm.check_extension(uapi.KVM_CAP_COALESCED_PIO) else 0
    if pio not in {0, 1}:
        raise KvmError(EINVAL, f"pio is {pio}, must be 0 or 1")
    return Zone(int(request.addr), int(request.size), pio)


@vm_ioctl("KVM_REGISTER_COALESCED_MMIO", In("struct kvm_coalesced_mmio_zone"), cap="KVM_CAP_COALESCED_MMIO")
def register_coalesced_mmio(vm: Vm, request: CData) -> int:
    """Keep writes that lie wholly in a range of addresses, or of ports, in the ring while it has room.

    Errors:
        EINVAL  pio is neither 0 nor 1
        ENOSPC  a thousand zones of this kind
    Source: api.rst 4.116; virt/kvm/coalesced_mmio.c kvm_vm_ioctl_register_coalesced_mmio
    """
    zone = _zone(vm, request)
    with vm.slots_lock:
        zones = vm.coalesced_mmio.zones
        if sum(each.pio == zone.pio for each in zones) >= _MAX_ZONES:
            raise KvmError(ENOSPC, f"there are {_MAX_ZONES} zones already")
        vm.coalesced_mmio.zones = (*zones, zone)
    return 0


@vm_ioctl("KVM_UNREGISTER_COALESCED_MMIO", In("struct kvm_coalesced_mmio_zone"), cap="KVM_CAP_COALESCED_MMIO")
def unregister_coalesced_mmio(vm: Vm, request: CData) -> int:
    """Remove every zone that contains the range given; there need be none.

    Errors:
        EINVAL  pio is neither 0 nor 1
    Source: api.rst 4.116; virt/kvm/coalesced_mmio.c kvm_vm_ioctl_unregister_coalesced_mmio
    """
    given = _zone(vm, request)
    with vm.slots_lock:
        zones = vm.coalesced_mmio.zones
        vm.coalesced_mmio.zones = tuple(
            each for each in zones if each.pio != given.pio or not each.contains(given.addr, given.size)
        )
    return 0
