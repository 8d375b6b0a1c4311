"""The guest's page tables in guest memory: reading gptes, setting their A and D bits."""

from __future__ import annotations

from errno import EFAULT
from typing import TYPE_CHECKING

from pykvm.abi import ffi, lib
from pykvm.abi.errors import KvmError
from pykvm.mmu import spte as sptes

if TYPE_CHECKING:
    from pykvm.kvm.vm import Vm
    from pykvm.mmu.pages import MmuPage
    from pykvm.mmu.slots import Memslot, Memslots
    from pykvm.mmu.walk import Walk

_gpte_read = lib.gpte_read


class GuestTables:
    """One address space of a VM at one moment, as the walker sees it. Of one thread, and short-lived."""

    __slots__ = ("_as_id", "_slot", "_value", "_vm", "slots")

    def __init__(self, vm: Vm, as_id: int, slots: Memslots | None = None) -> None:
        """Look at the VM's memory as these slots have it, by default the current ones."""
        self._vm = vm
        self._as_id = as_id
        self.slots = vm.memslots[as_id] if slots is None else slots
        self._slot: Memslot | None = None
        self._value = ffi.new("uint64_t *")

    def gfn_to_hva(self, gfn: int) -> int | None:
        """Return the host address of a frame, None where no slot is."""
        slot = self._slot
        # Tables lie close to each other: mostly it is the slot of the last one.
        if slot is None or not slot.base_gfn <= gfn < slot.end_gfn:
            slot = self._slot = self.slots.gfn_to_memslot(gfn)
            if slot is None:
                return None
        return slot.userspace_addr + (gfn - slot.base_gfn << 12)

    def read_gpte(self, hva: int, size: int) -> int | None:
        """Return the entry at a host address, None where the host has nothing."""
        value = self._value
        return value[0] if _gpte_read(hva, value, size) else None

    def read(self, gpa: int, size: int) -> int | None:
        """Return the entry at `gpa`, None where there is no memory."""
        hva = self.gfn_to_hva(gpa >> 12)
        return None if hva is None else self.read_gpte(hva + (gpa & 0xFFF), size)

    def set_gpte_bits(self, gpa: int, hva: int, size: int, entry: int, bits: int) -> int | None:
        """Set A or D atomically; return the entry, None when it changed, so that the walk starts anew.

        The page is marked dirty, as after any write of the guest's.  In a READONLY slot nothing can
        be set and the walk goes on, as on hardware with the table in ROM.

        Errors:
            EFAULT  the host has no writable memory there
        """
        slot = self.slots.gfn_to_memslot(gpa >> 12)
        if slot is None:
            return None
        if slot.readonly:
            return entry
        done = lib.gpte_cmpxchg(hva, entry, entry | bits, size)
        if done < 0:
            raise KvmError(EFAULT, f"guest page table at {gpa:#x} is not writable")
        if done:
            self._vm.mmu.mark_page_dirty(self._as_id, gpa >> 12)
        return entry | bits if done else None

    def gpte(self, page: MmuPage, index: int) -> int | None:
        """Return the guest's entry that entry `index` of a last-level shadow page stands for."""
        size = 4 if page.role.has_4_byte_gpte else 8
        first = page.role.quadrant * sptes.PT64_ENTRIES
        return self.read((page.gfn << 12) + (first + index) * size, size)

    def gpte_changed(self, found: Walk, level: int, size: int) -> bool:
        """Whether the entry of `level` that was walked is there no more (FNAME(gpte_changed))."""
        at = found.at(level)
        return self.read_gpte(found.hvas[at], size) != found.entries[at]
