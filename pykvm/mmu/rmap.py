"""The reverse map: from a frame to every spte that maps it, per address space and page size.

An spte is named by its host address; `PageTable.sptep_to_sp` finds its page.  One spte is kept as that
number itself, several as a dictionary (struct kvm_rmap_head, struct pte_list_desc).
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, TypeAlias

from pykvm.mmu import spte as sptes

if TYPE_CHECKING:
    from collections.abc import Iterator

PteList: TypeAlias = "int | dict[int, None]"
"""No spte (0), the address of one, or several in the order they came."""

_CHUNK_BITS = 9
_CHUNK = 1 << _CHUNK_BITS
_MANY = 1
_NO_HEADS = bytes(8 * _CHUNK)
LEVELS = (sptes.PG_LEVEL_4K, sptes.PG_LEVEL_2M, sptes.PG_LEVEL_1G)


def pte_list_add(head: PteList, sptep: int) -> PteList:
    """Return the list with one more spte."""
    if not head:
        return sptep
    if isinstance(head, int):
        return {head: None, sptep: None}
    head[sptep] = None
    return head


def pte_list_remove(head: PteList, sptep: int) -> PteList:
    """Return the list without an spte, which must be in it."""
    if isinstance(head, dict):
        del head[sptep]
        if len(head) > 1:
            return head
        (left,) = head
        return left
    if head != sptep:
        raise KeyError(sptep)
    return 0


def pte_list_iter(head: PteList) -> tuple[int, ...]:
    """Return the sptes of a list."""
    if isinstance(head, dict):
        return tuple(head)
    return (head,) if head else ()


class Rmap:
    """gfn -> sptes; a large page is listed under its first frame.

    Heads are kept in arrays of 512, one for each range in which something is mapped: eight bytes for each
    frame, as in kvm_arch_memory_slot, and nothing for memory that is not touched.  A head is 0, the address
    of the one spte, or, with bit 0 set, the sign that there are several in `_many`.
    """

    def __init__(self) -> None:
        """Start empty."""
        # (as_id, level) -> gfn in units of the level >> 9 -> heads, with how many are not 0 behind them
        self._heads: dict[tuple[int, int], dict[int, array[int]]] = {}
        self._many: dict[tuple[int, int, int], dict[int, None]] = {}
        self.max_size = 0  # max_mmu_rmap_size: longest list so far

    def add(self, as_id: int, level: int, gfn: int, sptep: int) -> None:
        """Record that an spte maps the frame (rmap_add)."""
        n = gfn >> sptes.PT64_LEVEL_BITS * (level - 1)
        chunks = self._heads.setdefault((as_id, level), {})
        chunk = chunks.get(n >> _CHUNK_BITS)
        if chunk is None:
            chunk = chunks[n >> _CHUNK_BITS] = array("Q", _NO_HEADS)
            chunk.append(0)
        at = n & _CHUNK - 1
        head = chunk[at]
        if not head:
            chunk[at] = sptep
            chunk[_CHUNK] += 1
            self.max_size = self.max_size or 1
            return
        many = self._many.get((as_id, level, n))
        if many is None:
            many = self._many[as_id, level, n] = {head: None}
            chunk[at] = _MANY
        many[sptep] = None
        self.max_size = max(self.max_size, len(many))

    def remove(self, as_id: int, level: int, gfn: int, sptep: int) -> None:
        """Forget an spte; it is there, or the tables are inconsistent (rmap_remove)."""
        n = gfn >> sptes.PT64_LEVEL_BITS * (level - 1)
        chunks = self._heads[as_id, level]
        chunk = chunks[n >> _CHUNK_BITS]
        at = n & _CHUNK - 1
        if chunk[at] & _MANY:
            many = self._many[as_id, level, n]
            del many[sptep]
            if len(many) == 1:
                (chunk[at],) = many
                del self._many[as_id, level, n]
            return
        if chunk[at] != sptep:
            raise KeyError(sptep)
        chunk[at] = 0
        chunk[_CHUNK] -= 1
        if not chunk[_CHUNK]:
            del chunks[n >> _CHUNK_BITS]

    def of(self, as_id: int, level: int, gfn: int) -> tuple[int, ...]:
        """Return the sptes of one page size that map the frame (for_each_rmap_spte)."""
        n = gfn >> sptes.PT64_LEVEL_BITS * (level - 1)
        chunk = self._heads.get((as_id, level), {}).get(n >> _CHUNK_BITS)
        if chunk is None:
            return ()
        head = chunk[n & _CHUNK - 1]
        if head & _MANY:
            return tuple(self._many[as_id, level, n])
        return (head,) if head else ()

    def range(self, as_id: int, first: int, end: int) -> list[int]:
        """Return the sptes of every size that map a frame in [first, end)."""
        return [sptep for level in LEVELS for n in self._numbers(as_id, level, first, end)
                for sptep in self.of(as_id, level, n << sptes.PT64_LEVEL_BITS * (level - 1))]  # fmt: skip

    def _numbers(self, as_id: int, level: int, first: int, end: int) -> Iterator[int]:
        """Yield the frames, in units of the level, that something maps."""
        chunks = self._heads.get((as_id, level))
        if not chunks or first >= end:
            return
        bits = sptes.PT64_LEVEL_BITS * (level - 1)
        low, high = first >> bits, (end - 1 >> bits) + 1
        keys = range(low >> _CHUNK_BITS, (high - 1 >> _CHUNK_BITS) + 1)
        for key in (
            [k for k in keys if k in chunks] if len(keys) < len(chunks) else [k for k in chunks if k in keys]
        ):
            chunk, base = chunks[key], key << _CHUNK_BITS
            for at in range(max(low - base, 0), min(high - base, _CHUNK)):
                if chunk[at]:
                    yield base + at

    def __iter__(self) -> Iterator[tuple[int, int, int, int]]:
        """Yield (as_id, level, gfn, sptep) of everything recorded."""
        for as_id, level in self._heads:
            bits = sptes.PT64_LEVEL_BITS * (level - 1)
            for n in self._numbers(as_id, level, 0, 1 << 52):
                for sptep in self.of(as_id, level, n << bits):
                    yield as_id, level, n << bits, sptep
