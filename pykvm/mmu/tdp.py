"""Two-dimensional paging: gpa to host pages. The guest owns its own tables, this is the other half.

Every function here runs under mmu_lock. Processors walk the tables meanwhile and set A and D, so
entries that may be in use change only by atomic operations, and a table is freed only after every
processor has flushed (`PageTable.take_zapped`, `commit_zap`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pykvm import trace
from pykvm.abi import CData, Gfn, lib
from pykvm.mmu import spte as sptes
from pykvm.mmu.pages import MemoryCache, MmuPage, PageTable, Role

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pykvm.mmu.slots import Memslot
    from pykvm.mmu.stat import VmStat


def has_tables(page: MmuPage) -> bool:
    """Whether an entry of the table points to another."""
    level = page.role.level
    return level > sptes.PG_LEVEL_4K and any(
        sptes.is_shadow_present(spte) and not sptes.is_last(spte, level) for spte in page.entries()
    )


class Tdp:
    """The tables of one address space."""

    def __init__(self, pages: PageTable, role: Role, stat: VmStat, cache: MemoryCache) -> None:
        """Allocate the root."""
        self.pages = pages
        self.stat = stat
        self.root = pages.alloc(Gfn(0), role, cache)
        self.root.root_count = 1
        self.root.tdp_mmu_page = True

    def map(self, gfn: int, level: int, spte: int, cache: MemoryCache) -> bool:
        """Install a leaf for the frame at `level`; True when an old translation must be flushed.

        cache: has tables for those that are missing on the way.
        """
        page, flush = self._descend(gfn, level, cache)
        index = sptes.index(gfn, level)
        sptep = page.spt + index
        old = page.view[index]
        if sptes.is_shadow_present(old):
            if not sptes.is_last(old, level):
                self._zap_subtree(self.pages.child(old))
                flush = True
            flush = flush or (old ^ spte) & sptes.PFN_MASK != 0 or bool(old & sptes.W & ~spte)
            # The processor may have set D since: it is the page's, keep it.
            spte |= old & sptes.DIRTY if not (old ^ spte) & sptes.PFN_MASK else 0
        self._count(lib.spte_xchg(sptep, spte), spte, level)
        if trace.kvm_mmu_set_spte.enabled:
            page.trace_spte(index, gfn, spte)
        return flush

    def _count(self, old: int, new: int, level: int) -> None:
        was = sptes.is_shadow_present(old) and sptes.is_last(old, level)
        self.stat.count_page(level, sptes.is_shadow_present(new) - was)

    def _descend(self, gfn: int, level: int, cache: MemoryCache) -> tuple[MmuPage, bool]:
        """Return the table of `level` for the frame, making those missing on the way."""
        page, flush, at = self.root, False, self.root.role.level
        while at > level:
            index = sptes.index(gfn, at)
            spte = page.view[index]
            if spte & sptes.R and not spte & sptes.PS:
                page = self.pages.child(spte)
            else:
                # A large leaf in the way goes: its frames come back one by one.
                flush = flush or sptes.is_shadow_present(spte)
                page = self._link_child(page, index, gfn, cache)
            at -= 1
        return page, flush

    def _link_child(self, page: MmuPage, index: int, gfn: int, cache: MemoryCache) -> MmuPage:
        level = page.role.level - 1
        base = gfn & ~(sptes.pages_per(level + 1) - 1)
        child = self.pages.alloc(Gfn(base), Role(level, smm=page.role.smm), cache)
        child.tdp_mmu_page = True
        child.add_parent(page.spt_addr + 8 * index)
        old = lib.spte_xchg(page.spt + index, sptes.make_nonleaf_spte(child.spt_addr))
        self._count(old, 0, page.role.level)
        return child

    def find(self, gfn: int) -> tuple[CData, int, int] | None:
        """Return (sptep, spte, level) of the leaf that maps the frame, or None."""
        page, level = self.root, self.root.role.level
        while True:
            index = sptes.index(gfn, level)
            spte = page.view[index]
            if not spte & sptes.R:
                return None
            if level == sptes.PG_LEVEL_4K or spte & sptes.PS:
                return page.spt + index, spte, level
            page = self.pages.child(spte)
            level -= 1

    def last_table(self, gfn: int) -> MmuPage | None:
        """Return the level-1 table that covers the frame, or None."""
        return self.table(gfn, sptes.PG_LEVEL_4K)

    def table(self, gfn: int, wanted: int) -> MmuPage | None:
        """Return the table of a level that covers the frame, or None."""
        page, level = self.root, self.root.role.level
        while level > wanted:
            spte = page.view[sptes.index(gfn, level)]
            if not spte & sptes.R or spte & sptes.PS:
                return None
            page = self.pages.child(spte)
            level -= 1
        return page

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
        return self._zap(self.root, first, end)

    def _zap(self, page: MmuPage, first: int, end: int) -> bool:
        """Drop leaves in the range, and the tables below `page` that cover nothing else."""
        level = page.role.level
        span, flush = sptes.pages_per(level), False
        low = max(first - page.gfn, 0) // span
        high = min(-(-(end - page.gfn) // span), sptes.PT64_ENTRIES)
        for i, spte in enumerate(page.entries()[low:high], low):
            if not spte:
                continue
            if not spte & sptes.R or sptes.is_last(spte, level):
                self._drop(page, i)
                flush = flush or sptes.is_shadow_present(spte)
                continue
            child, base = self.pages.child(spte), page.gfn + i * span
            if first <= base and base + span <= end:
                lib.spte_xchg(page.spt + i, 0)
                self._zap_subtree(child)
                flush = True
            else:
                flush = self._zap(child, first, end) or flush
        return flush

    def zap_mmio(self) -> None:
        """Drop every MMIO entry: the generation in them has wrapped."""
        for page, i, spte in list(self.leaves(0, 1 << 52)):
            if sptes.is_mmio(spte):
                lib.spte_xchg(page.spt + i, 0)

    def _drop(self, page: MmuPage, index: int) -> None:
        self._count(lib.spte_xchg(page.spt + index, 0), 0, page.role.level)

    def _zap_subtree(self, page: MmuPage) -> None:
        if page.role.level == sptes.PG_LEVEL_4K:
            # Nothing leads here any more: the leaves go with the table.
            present = [spte for spte in page.entries() if spte & sptes.R]
            self.stat.count_page(sptes.PG_LEVEL_4K, -len(present))
            self.pages.remove(page)
            return
        for index, spte in enumerate(page.entries()):
            if not spte & sptes.R:
                continue
            if sptes.is_last(spte, page.role.level):
                self._drop(page, index)
            else:
                self._zap_subtree(self.pages.child(spte))
        self.pages.remove(page)

    def zap_page(self, page: MmuPage) -> None:
        """Take a table out of the tree, with everything below it (kvm_mmu_prepare_zap_page)."""
        for sptep in page.parents():
            parent, index = self.pages.sptep_to_sp(sptep)
            lib.spte_xchg(parent.spt + index, 0)
        self._zap_subtree(page)

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

    def write_protect_words(self, words: Iterable[tuple[int, CData]]) -> bool:
        """Do the same for frames given as (frame number / 512, mask of 512 bits). True: flush."""
        flush = False
        for number, mask in words:
            first = number << sptes.PT64_LEVEL_BITS
            table = self.last_table(first)
            if table is not None:
                old = lib.spt_clear_bits(table.spt, mask, sptes.W | sptes.DIRTY)
                flush = flush or bool(old & sptes.W)
            elif self.find(first) is not None:
                flush = self.write_protect((first,)) or flush
        return flush

    def write_protect_slot(self, slot: Memslot) -> bool:
        """Write-protect every mapped frame of the slot; large leaves are dropped. True: flush."""
        return self._write_protect_range(self.root, slot.base_gfn, slot.end_gfn)

    def _write_protect_range(self, page: MmuPage, first: int, end: int) -> bool:
        level = page.role.level
        span, flush = sptes.pages_per(level), False
        low = max(first - page.gfn, 0) // span
        high = min(-(-(end - page.gfn) // span), sptes.PT64_ENTRIES)
        if level == sptes.PG_LEVEL_4K:
            # A million pages are protected in the time Python would need for a few thousand.
            entries = (1 << high) - (1 << low)
            return bool(sptes.clear_bits_of(page.spt, entries, sptes.W | sptes.DIRTY) & sptes.W)
        for i, spte in enumerate(page.entries()[low:high], low):
            if not sptes.is_shadow_present(spte):
                continue
            if sptes.is_last(spte, level):
                self._drop(page, i)
                flush = True
            else:
                flush = self._write_protect_range(self.pages.child(spte), first, end) or flush
        return flush

    def destroy(self) -> None:
        """Zap every table; no processor may enter any more."""
        self._zap_subtree(self.root)
