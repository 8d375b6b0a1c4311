"""The reverse map: from a frame to every spte that maps it, per slot and page size.

An spte is named by its host address; `PageTable.sptep_to_sp` finds its page.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from pykvm.mmu import spte as sptes
from pykvm.mmu.pte_list import pte_list_add, pte_list_count, pte_list_iter, pte_list_remove

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pykvm.kvm.vm import Vm
    from pykvm.mmu.pte_list import PteListDesc

_CHUNK_BITS = 9
_CHUNK = 1 << _CHUNK_BITS
_MANY = 1
_NO_HEADS = bytes(8 * _CHUNK)
LEVELS = (sptes.PG_LEVEL_4K, sptes.PG_LEVEL_2M, sptes.PG_LEVEL_1G)


class RmapHeads:
    """The heads of one slot and page size; a number counts pages of that size from the slot's first.

    Heads are kept in arrays of 512, one for each range in which something is mapped: eight bytes for each
    frame, as in kvm_arch_memory_slot, and nothing for memory that is not touched.  A head is 0, the address
    of the one spte, or, with bit 0 set, the sign that its descriptor is in `_many`.
    """

    __slots__ = ("_chunks", "_many")

    def __init__(self) -> None:
        """Start empty."""
        # number >> 9 -> heads, with how many are not 0 behind them
        self._chunks: dict[int, array[int]] = {}
        self._many: dict[int, PteListDesc] = {}

    def __bool__(self) -> bool:
        """Whether something is mapped by pages of the size."""
        return bool(self._chunks)

    def add(self, n: int, sptep: int) -> int:
        """Add an spte; return how many there are now."""
        chunk = self._chunks.get(n >> _CHUNK_BITS)
        if chunk is None:
            chunk = self._chunks[n >> _CHUNK_BITS] = array("Q", _NO_HEADS)
            chunk.append(0)
        at = n & _CHUNK - 1
        if not chunk[at]:
            chunk[at] = sptep
            chunk[_CHUNK] += 1
            return 1
        head = pte_list_add(self._many[n] if chunk[at] & _MANY else chunk[at], sptep)
        self._set(chunk, n, head)
        return pte_list_count(head)

    def remove(self, n: int, sptep: int) -> None:
        """Remove an spte, which must be there."""
        chunk = self._chunks[n >> _CHUNK_BITS]
        at = n & _CHUNK - 1
        self._set(chunk, n, pte_list_remove(self._many[n] if chunk[at] & _MANY else chunk[at], sptep))
        if not chunk[at]:
            chunk[_CHUNK] -= 1
            if not chunk[_CHUNK]:
                del self._chunks[n >> _CHUNK_BITS]

    def _set(self, chunk: array[int], n: int, head: int | PteListDesc) -> None:
        at = n & _CHUNK - 1
        if isinstance(head, int):
            chunk[at] = head
            self._many.pop(n, None)
        else:
            chunk[at] = _MANY
            self._many[n] = head

    def of(self, n: int) -> tuple[int, ...]:
        """Return the sptes of one frame."""
        chunk = self._chunks.get(n >> _CHUNK_BITS)
        if chunk is None:
            return ()
        head = chunk[n & _CHUNK - 1]
        if head & _MANY:
            return pte_list_iter(self._many[n])
        return (head,) if head else ()

    def __iter__(self) -> Iterator[int]:
        """Yield every spte there is."""
        for n in self.numbers(0, 1 << 52):
            yield from self.of(n)

    def numbers(self, first: int, end: int) -> Iterator[int]:
        """Yield the numbers in [first, end) that something maps."""
        if not self._chunks or first >= end:
            return
        keys = range(first >> _CHUNK_BITS, (end - 1 >> _CHUNK_BITS) + 1)
        chunks = self._chunks
        for key in (
            [k for k in keys if k in chunks] if len(keys) < len(chunks) else [k for k in chunks if k in keys]
        ):
            chunk, base = chunks[key], key << _CHUNK_BITS
            for at in range(max(first - base, 0), min(end - base, _CHUNK)):
                if chunk[at]:
                    yield base + at


class Rmap:
    """gfn -> sptes, over all slots of a VM; a large page is listed under its first frame.

    The lists are in the slots (`Memslot.arch`): a frame outside all slots has none, and nothing maps it.
    """

    def __init__(self, vm: Vm) -> None:
        """Look at the lists in a VM's slots."""
        self._vm = vm
        self.max_size = 0  # max_mmu_rmap_size: longest list so far

    def _heads(self, as_id: int, level: int, gfn: int) -> tuple[RmapHeads, int] | None:
        """gfn_to_rmap(): the heads of the frame's slot, and its number among them."""
        slot = self._vm.memslots[as_id].gfn_to_memslot(gfn)
        if slot is None or slot.arch.rmap is None:
            return None
        return slot.arch.rmap[level - 1], slot.arch.index(gfn, level)

    def add(self, as_id: int, level: int, gfn: int, sptep: int) -> int:
        """Record that an spte maps the frame; return how many do (rmap_add)."""
        found = self._heads(as_id, level, gfn)
        if found is None:
            raise KeyError(gfn)
        heads, n = found
        count = heads.add(n, sptep)
        self.max_size = max(self.max_size, count)
        return count

    def remove(self, as_id: int, level: int, gfn: int, sptep: int) -> None:
        """Forget an spte; it is there, or the tables are inconsistent (rmap_remove)."""
        found = self._heads(as_id, level, gfn)
        if found is None:
            raise KeyError(sptep)
        heads, n = found
        heads.remove(n, sptep)

    def of(self, as_id: int, level: int, gfn: int) -> tuple[int, ...]:
        """Return the sptes of one page size that map the frame (for_each_rmap_spte)."""
        found = self._heads(as_id, level, gfn)
        return () if found is None else found[0].of(found[1])

    def of_each(self, as_id: int, gfns: Iterable[int]) -> Iterator[int]:
        """Yield the sptes of every size that map one of these frames; some more than once."""
        slots = self._vm.memslots[as_id]
        slot, used = None, []
        for gfn in gfns:
            if slot is None or not slot.base_gfn <= gfn < slot.end_gfn:
                slot = slots.gfn_to_memslot(gfn)
                rmap = () if slot is None else slot.arch.rmap or ()
                used = [(level, heads) for level, heads in zip(LEVELS, rmap, strict=False) if heads]
            for level, heads in used:
                yield from heads.of(slot.arch.index(gfn, level))  # type: ignore[union-attr]

    def range(self, as_id: int, first: int, end: int) -> list[int]:
        """Return the sptes of every size that map a frame in [first, end)."""
        return [sptep for _, _, sptep in self._range(as_id, first, end)]

    def _range(self, as_id: int, first: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Yield (level, gfn, sptep): by slot, then by page size."""
        for slot in self._vm.memslots[as_id].ordered:
            low, high = max(first, slot.base_gfn), min(end, slot.end_gfn)
            if slot.arch.rmap is None or low >= high:
                continue
            for level, heads in zip(LEVELS, slot.arch.rmap, strict=True):
                for n in heads.numbers(slot.arch.index(low, level), slot.arch.index(high - 1, level) + 1):
                    for sptep in heads.of(n):
                        yield level, slot.arch.gfn(n, level), sptep

    def __iter__(self) -> Iterator[tuple[int, int, int, int]]:
        """Yield (as_id, level, gfn, sptep) of everything recorded."""
        for as_id in range(len(self._vm.memslots)):
            for found in self._range(as_id, 0, 1 << 52):
                yield as_id, *found
