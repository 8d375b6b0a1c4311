"""The guest's page tables in guest memory: reading gptes, setting their A and D bits."""

from __future__ import annotations

from errno import EFAULT
from typing import TYPE_CHECKING

from pykvm.abi import ffi, lib
from pykvm.abi.errors import KvmError
from pykvm.abi.uaccess import copy_from_user
from pykvm.mmu import spte as sptes

if TYPE_CHECKING:
    from pykvm.kvm.vm import Vm
    from pykvm.mmu.pages import MmuPage
    from pykvm.mmu.walk import Paging, Walk


class GuestTables:
    """One address space of a VM, as the walker sees it."""

    __slots__ = ("_as_id", "_vm")

    def __init__(self, vm: Vm, as_id: int) -> None:
        """Look at the VM's memory."""
        self._vm = vm
        self._as_id = as_id

    def read(self, gpa: int, size: int) -> int | None:
        """Return the entry at `gpa`, or None where there is no memory."""
        slot = self._vm.memslots[self._as_id].gfn_to_memslot(gpa >> 12)
        if slot is None:
            return None
        try:
            return int.from_bytes(copy_from_user(slot.hva(gpa >> 12) + (gpa & 0xFFF), size), "little")
        except KvmError:
            return None

    def set_bits(self, gpa: int, size: int, entry: int, bits: int) -> bool:
        """Set A or D atomically; False when the entry changed, so that the walk starts anew.

        The page is marked dirty, as after any write of the guest's.  In a READONLY slot nothing can
        be set and the walk goes on, as on hardware with the table in ROM.
        """
        gfn = gpa >> 12
        slot = self._vm.memslots[self._as_id].gfn_to_memslot(gfn)
        if slot is None:
            return False
        if slot.readonly:
            return True
        hva = slot.hva(gfn) + (gpa & 0xFFF)
        if not lib.host_probe(hva, size, 1):
            raise KvmError(EFAULT, f"guest page table at {gpa:#x} is not writable")
        # A 32-bit entry is half of an aligned 64-bit word: exchange the word.
        shift = 32 if size == 4 and hva & 4 else 0
        word = ffi.cast("uint64_t *", hva & ~7)
        mask = (1 << 8 * size) - 1
        old = sptes.read(word)
        if old >> shift & mask != entry or not lib.spte_cmpxchg(word, old, old | bits << shift):
            return False
        self._vm.mmu.mark_page_dirty(slot, gfn)
        return True

    def gpte(self, page: MmuPage, index: int) -> int | None:
        """Return the guest's entry that entry `index` of a last-level shadow page stands for."""
        size = 4 if page.role.has_4_byte_gpte else 8
        first = page.role.quadrant * sptes.PT64_ENTRIES
        return self.read((page.gfn << 12) + (first + index) * size, size)

    def unchanged(self, paging: Paging, gla: int, found: Walk, level: int) -> bool:
        """Whether the entry of `level` that was walked is still there (not FNAME(gpte_changed))."""
        at = found.level + len(found.tables) - 1 - level
        if not 0 <= at < len(found.tables):
            return True
        gpa = (found.tables[at] << 12) + paging.index(gla, level) * paging.entry_bytes
        return self.read(gpa, paging.entry_bytes) == found.entries[at]
