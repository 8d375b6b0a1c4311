"""The reverse map: from a frame to every spte that maps it, per address space and page size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pykvm.mmu import spte as sptes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pykvm.mmu.pages import MmuPage


class Rmap:
    """gfn -> {(page, index)}; a large page is listed under its first frame."""

    def __init__(self) -> None:
        """Start empty."""
        self._lists: dict[tuple[int, int], dict[int, dict[tuple[MmuPage, int], None]]] = {}
        self.max_size = 0  # max_mmu_rmap_size: longest list so far

    def add(self, as_id: int, level: int, gfn: int, page: MmuPage, index: int) -> None:
        """Record that an spte maps the frame (rmap_add)."""
        ptes = self._lists.setdefault((as_id, level), {}).setdefault(_head(gfn, level), {})
        ptes[page, index] = None
        self.max_size = max(self.max_size, len(ptes))

    def remove(self, as_id: int, level: int, gfn: int, page: MmuPage, index: int) -> None:
        """Forget an spte (rmap_remove); it is there, or the tables are inconsistent."""
        lists = self._lists[as_id, level]
        ptes = lists[_head(gfn, level)]
        del ptes[page, index]
        if not ptes:
            del lists[_head(gfn, level)]

    def of(self, as_id: int, level: int, gfn: int) -> tuple[tuple[MmuPage, int], ...]:
        """Return the sptes of one page size that map the frame."""
        return tuple(self._lists.get((as_id, level), {}).get(_head(gfn, level), ()))

    def range(self, as_id: int, first: int, end: int) -> list[tuple[MmuPage, int]]:
        """Return the sptes of every size that map a frame in [first, end)."""
        return [
            pte
            for level in (sptes.PG_LEVEL_4K, sptes.PG_LEVEL_2M, sptes.PG_LEVEL_1G)
            for gfn in self._heads(as_id, level, first, end)
            for pte in self._lists[as_id, level][gfn]
        ]

    def _heads(self, as_id: int, level: int, first: int, end: int) -> list[int]:
        lists = self._lists.get((as_id, level))
        if not lists:
            return []
        step = sptes.pages_per(level)
        first = _head(first, level)
        if (end - first) // step < len(lists):
            return [gfn for gfn in range(first, end, step) if gfn in lists]
        return [gfn for gfn in lists if first <= gfn < end]

    def __iter__(self) -> Iterator[tuple[int, int, int, MmuPage, int]]:
        """Yield (as_id, level, gfn, page, index) of everything recorded."""
        for (as_id, level), lists in self._lists.items():
            for gfn, ptes in lists.items():
                for page, index in ptes:
                    yield as_id, level, gfn, page, index


def _head(gfn: int, level: int) -> int:
    return gfn & ~(sptes.pages_per(level) - 1)
