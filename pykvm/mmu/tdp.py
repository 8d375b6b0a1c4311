"""Two-dimensional paging: gpa to host pages. The guest owns its own tables, this is the other half.

Every function here runs under mmu_lock. Processors walk the tables meanwhile and set A and D, so
entries that may be in use change only by atomic operations, and a table is freed only after every
processor has flushed (`PageTable.take_zapped`, `commit_zap`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pykvm.abi import CData, Gfn, lib
from pykvm.mmu import spte as sptes
from pykvm.mmu.pages import MmuPage, PageTable, Role

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pykvm.mmu.base import Stat
    from pykvm.mmu.slots import Memslot


class Tdp:
    """The tables of one address space."""

    def __init__(self, pages: PageTable, role: Role, stat: Stat) -> None:
        """Allocate the root."""
        self.pages = pages
        self.stat = stat
        self.root = pages.alloc(Gfn(0), role)
        self.root.root_count = 1

    def map(self, gfn: int, level: int, spte: int) -> bool:
        """Install a leaf for the frame at `level`; True when an old translation must be flushed."""
        page, flush = self._descend(gfn, level)
        sptep = page.sptep(gfn)
        old = sptes.read(sptep)
        if sptes.is_shadow_present(old):
            if not sptes.is_last(old, level):
                self._zap_subtree(self.pages.child(old))
                flush = True
            flush = flush or (old ^ spte) & sptes.PFN_MASK != 0 or bool(old & sptes.W & ~spte)
            # The processor may have set D since: it is the page's, keep it.
            spte |= old & sptes.DIRTY if not (old ^ spte) & sptes.PFN_MASK else 0
        self._count(lib.spte_xchg(sptep, spte), spte, level)
        return flush

    def _count(self, old: int, new: int, level: int) -> None:
        was = sptes.is_shadow_present(old) and sptes.is_last(old, level)
        self.stat.count_page(level, sptes.is_shadow_present(new) - was)

    def _descend(self, gfn: int, level: int) -> tuple[MmuPage, bool]:
        """Return the table of `level` for the frame, making those missing on the way."""
        page, flush = self.root, False
        while page.role.level > level:
            sptep = page.sptep(gfn)
            spte = sptes.read(sptep)
            if sptes.is_shadow_present(spte) and not sptes.is_large(spte):
                page = self.pages.child(spte)
                continue
            # A large leaf in the way goes: its frames come back one by one.
            flush = flush or sptes.is_shadow_present(spte)
            child = self._link_child(page, gfn)
            self._count(lib.spte_xchg(sptep, sptes.make_nonleaf_spte(child.spt_addr)), 0, page.role.level)
            page = child
        return page, flush

    def _link_child(self, page: MmuPage, gfn: int) -> MmuPage:
        level = page.role.level - 1
        base = gfn & ~(sptes.pages_per(level + 1) - 1)
        child = self.pages.alloc(Gfn(base), Role(level, smm=page.role.smm))
        child.parents.add((page, sptes.index(gfn, page.role.level)))
        return child

    def find(self, gfn: int) -> tuple[CData, int, int] | None:
        """Return (sptep, spte, level) of the leaf that maps the frame, or None."""
        page = self.root
        while True:
            sptep = page.sptep(gfn)
            spte = sptes.read(sptep)
            if not sptes.is_shadow_present(spte):
                return None
            if sptes.is_last(spte, page.role.level):
                return sptep, spte, page.role.level
            page = self.pages.child(spte)

    def leaves(self, first: int, end: int) -> Iterator[tuple[MmuPage, int, int]]:
        """Yield (page, index, spte) of every leaf or MMIO entry that covers frames in [first, end)."""
        yield from self._leaves(self.root, first, end)

    def _leaves(self, page: MmuPage, first: int, end: int) -> Iterator[tuple[MmuPage, int, int]]:
        level = page.role.level
        span = sptes.pages_per(level)
        low = max(first - page.gfn, 0) // span
        high = min(-(-(end - page.gfn) // span), sptes.PT64_ENTRIES)
        entries = page.entries()
        for i in range(low, high):
            spte = entries[i]
            if not spte:
                continue
            if sptes.is_shadow_present(spte) and not sptes.is_last(spte, level):
                yield from self._leaves(self.pages.child(spte), first, end)
            else:
                yield page, i, spte

    def zap_range(self, first: int, end: int) -> bool:
        """Drop every translation of frames in [first, end); True when processors must flush."""
        flush = False
        for page, i, spte in list(self.leaves(first, end)):
            self._drop(page, i)
            flush = flush or sptes.is_shadow_present(spte)
        return self._prune(self.root, first, end) or flush

    def _prune(self, page: MmuPage, first: int, end: int) -> bool:
        """Unlink the tables below `page` that cover nothing but frames in the range."""
        level = page.role.level
        if level == sptes.PG_LEVEL_4K:
            return False
        span, flush = sptes.pages_per(level), False
        for i, spte in enumerate(page.entries()):
            base = page.gfn + i * span
            if not sptes.is_shadow_present(spte) or sptes.is_large(spte):
                continue
            if base >= end or base + span <= first:
                continue
            child = self.pages.child(spte)
            if first <= base and base + span <= end:
                lib.spte_xchg(page.spt + i, 0)
                self._zap_subtree(child)
                flush = True
            else:
                flush = self._prune(child, first, end) or flush
        return flush

    def zap_mmio(self) -> None:
        """Drop every MMIO entry: the generation in them has wrapped."""
        for page, i, spte in list(self.leaves(0, 1 << 52)):
            if sptes.is_mmio(spte):
                lib.spte_xchg(page.spt + i, 0)

    def _drop(self, page: MmuPage, index: int) -> None:
        self._count(lib.spte_xchg(page.spt + index, 0), 0, page.role.level)

    def _zap_subtree(self, page: MmuPage) -> None:
        for index, spte in enumerate(page.entries()):
            if sptes.is_shadow_present(spte) and not sptes.is_last(spte, page.role.level):
                self._zap_subtree(self.pages.child(spte))
            elif sptes.is_shadow_present(spte):
                self._drop(page, index)
        self.pages.remove(page)

    def write_protect(self, gfns: Iterable[int]) -> bool:
        """Make the frames' next write fault again; large leaves are dropped. True: flush."""
        flush = False
        for gfn in gfns:
            found = self.find(gfn)
            if found is None:
                continue
            sptep, _, level = found
            if level > sptes.PG_LEVEL_4K:
                self._count(lib.spte_xchg(sptep, 0), 0, level)
                flush = True
            elif sptes.clear_bits(sptep, sptes.W | sptes.DIRTY) & sptes.W:
                flush = True
        return flush

    def write_protect_slot(self, slot: Memslot) -> bool:
        """Write-protect every mapped frame of the slot; large leaves are dropped. True: flush."""
        flush = False
        for page, i, spte in list(self.leaves(slot.base_gfn, slot.end_gfn)):
            if not sptes.is_shadow_present(spte):
                continue
            if page.role.level > sptes.PG_LEVEL_4K:
                self._drop(page, i)
                flush = True
            elif sptes.clear_bits(page.spt + i, sptes.W | sptes.DIRTY) & sptes.W:
                flush = True
        return flush

    def destroy(self) -> None:
        """Zap every table; no processor may enter any more."""
        self._zap_subtree(self.root)
