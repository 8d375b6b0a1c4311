"""The shadow pages of a VM and everything that is recorded about them; all of it under mmu_lock.

A guest table that is shadowed is write-protected, or, for tables of the last level, allowed to go
`unsync` until the guest invalidates.  Names are those of KVM's mmu.c; docs/mmu.md tells the story.
Nothing here knows a vCPU: what a fault needs of one is shadow.py's affair.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pykvm import trace
from pykvm.abi import Gfn, lib
from pykvm.mmu import spte as sptes
from pykvm.mmu.guest import GuestTables
from pykvm.mmu.memslot_arch import add_count
from pykvm.mmu.rmap import LEVELS, Rmap
from pykvm.mmu.walk import ACC_ALL, ACC_EXEC, ACC_USER, ACC_WRITE, ACCESSED, PRESENT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pykvm.kvm.vm import Vm
    from pykvm.mmu.pages import MemoryCache, MmuPage, PageTable, Role
    from pykvm.mmu.slots import Memslot
    from pykvm.mmu.stat import VmStat

WRITE_FLOOD_LIMIT = 3
RMAP_RECYCLE_THRESHOLD = 1000
# In role.access and in recorded rights: to the guest it is a user page, though CPL 3 may not have it now.
ACC_GUEST_USER = 8
_RIGHTS = sptes.W | sptes.X | sptes.U
_SMM = 1 << 52


class ShadowPages:
    """Pages, reverse map, unsync marks and counts.

    `flush`: flushes every processor at once; `reload`: has every vCPU load its root anew; `tlbs_dirty`:
    whether processors may know translations that the reverse map does not have any more.
    """

    def __init__(
        self,
        vm: Vm,
        pages: PageTable,
        stat: VmStat,
        flush: Callable[[], None],
        reload: Callable[[], None],
        tlbs_dirty: Callable[[], bool],
    ) -> None:
        """Start without pages."""
        self._vm = vm
        self.pages = pages
        self.stat = stat
        self.rmap = Rmap(vm)
        self.shadow_root_allocated = False
        self._flush = flush
        self._reload = reload
        self._tlbs_dirty = tlbs_dirty
        # How many shadow pages of any level stand for a frame; the rest is in the slots.
        self._shadowed: dict[int, int] = {}

    def alloc_first_root(self) -> None:
        """mmu_first_shadow_root_alloc(): from now on slots have a reverse map."""
        if not self.shadow_root_allocated:
            self.shadow_root_allocated = True
            for slot in self._slots():
                slot.arch.alloc_rmap()

    def add_slot(self, slot: Memslot) -> None:
        """Begin with a slot that was just published."""
        if self.shadow_root_allocated:
            slot.arch.alloc_rmap()
        # A root may be where no memory was.
        for page in self.pages:
            if not page.role.direct and int(page.role.smm) == slot.as_id and slot.contains(page.gfn):
                tracked = page.role.level > sptes.PG_LEVEL_4K
                slot.arch.account_shadowed(page.gfn, 1, tracked=tracked)

    def _slots(self) -> Iterator[Memslot]:
        for slots in self._vm.memslots:
            yield from slots.ordered

    def _slot_of(self, gfn: int, *, smm: bool) -> Memslot | None:
        return self._vm.memslots[int(smm)].gfn_to_memslot(gfn)

    # ---- finding and making pages ----

    def get_page(self, gfn: Gfn, role: Role, cache: MemoryCache) -> MmuPage:
        """kvm_mmu_get_shadow_page(): the page of this frame and role, made if it is not there."""
        page = self._find_page(gfn, role)
        if page is None:
            page = self._alloc_page(gfn, role, cache)
            state = "new"
        else:
            state = "existing"
        if trace.kvm_mmu_get_page.enabled:
            trace.kvm_mmu_get_page(**page.traced(), state=state)
        return page

    def _find_page(self, gfn: Gfn, role: Role) -> MmuPage | None:
        collisions = 0
        found = None
        for page in tuple(self.pages.bucket(gfn)):
            if page.gfn != gfn:
                collisions += 1
            elif page.role == role:
                found = page
                break
            elif role.level > sptes.PG_LEVEL_4K and page.unsync:
                # A last-level table is now used as a higher one, too: those are never unsync.
                self.prepare_zap(page)
        self.stat.max_mmu_page_hash_collisions = max(self.stat.max_mmu_page_hash_collisions, collisions)
        if found is not None:
            # It is good, but may be stale; it stays unsync, and whoever links it will mark that.
            if found.unsync and self._sync_page(found):
                self._flush()
            found.write_flooding_count = 0
        return found

    def _alloc_page(self, gfn: Gfn, role: Role, cache: MemoryCache) -> MmuPage:
        self.stat.mmu_cache_miss += 1
        page = self.pages.alloc(gfn, role, cache)
        if not role.direct:
            self._account_shadowed(page, 1)
            if self.write_protect_gfn(gfn, smm=role.smm):
                # Now: a page may be shadowed only once no processor can write it.
                self._flush()
        return page

    def _account_shadowed(self, page: MmuPage, delta: int) -> None:
        add_count(self._shadowed, page.gfn | _SMM * page.role.smm, delta)
        slot = self._slot_of(page.gfn, smm=page.role.smm)
        if slot is not None:
            slot.arch.account_shadowed(page.gfn, delta, tracked=page.role.level > sptes.PG_LEVEL_4K)

    def is_write_tracked(self, gfn: int, *, smm: bool) -> bool:
        """Whether the frame is a guest's table of level 2 or more (kvm_gfn_is_write_tracked)."""
        slot = self._slot_of(gfn, smm=smm)
        return slot is not None and gfn in slot.arch.write_track

    def is_shadowed(self, gfn: int, *, smm: bool) -> bool:
        """Whether the frame is a guest's table of any level, unsync or not."""
        return gfn | _SMM * smm in self._shadowed

    def link(self, page: MmuPage, index: int, child: MmuPage) -> None:
        """Have entry `index`, which is empty, point to the child (link_shadow_page)."""
        lib.spte_xchg(page.spt + index, sptes.make_nonleaf_spte(child.spt_addr))
        child.add_parent(page.spt_addr + 8 * index)
        if child.unsync or child.unsync_children:
            self._mark_unsync(page, index)

    # ---- leaves ----

    def set_spte(
        self,
        page: MmuPage,
        index: int,
        gfn: int,
        access: int,
        slot: Memslot,
        *,
        host_writable: bool,
        writable: bool,
        prefetch: bool = False,
        synchronizing: bool = False,
    ) -> tuple[bool, bool, bool]:
        """mmu_set_spte() and make_spte(): install one leaf. Returns (write-protected, changed, flush).

        access: the guest's rights; writable: the guest may write from now on, if it has the right and
        nothing is watched there.  A page that is logged is marked dirty by the caller.
        """
        level = page.role.level
        spte = slot.hva(gfn) | sptes.R | sptes.ACCESSED
        if level > sptes.PG_LEVEL_4K:
            spte |= sptes.PS
        if access & ACC_EXEC:
            spte |= sptes.X
        if access & ACC_USER:
            spte |= sptes.U
        elif access & ACC_GUEST_USER:
            spte |= sptes.GUEST_USER
        if slot.readonly:
            spte |= sptes.ROM
        protected = False
        if host_writable:
            spte |= sptes.HOST_WRITABLE
            if access & ACC_WRITE:
                if gfn | _SMM * page.role.smm not in self._shadowed or level > sptes.PG_LEVEL_4K:
                    spte |= sptes.MMU_WRITABLE | sptes.W * writable
                elif writable:
                    protected = self._try_to_unsync(
                        gfn, smm=page.role.smm, synchronizing=synchronizing, prefetch=prefetch
                    )
                    spte |= 0 if protected else sptes.MMU_WRITABLE | sptes.W
        return protected, *self._install(page, index, gfn, access, spte, slot.as_id)

    def _install(
        self, page: MmuPage, index: int, gfn: int, access: int, spte: int, as_id: int
    ) -> tuple[bool, bool]:
        level = page.role.level
        old, flush = page.view[index], False
        if old & sptes.R:
            if (old ^ spte) & sptes.PFN_MASK or not sptes.is_last(old, level):
                self.drop_spte(page, index)
                old, flush = 0, True
            else:
                # The processor may have set D; it will set it again, but need not.
                spte |= old & sptes.DIRTY if spte & sptes.W else 0
                flush = bool(old & _RIGHTS & ~spte)
        if old == spte:
            return False, False
        lib.spte_xchg(page.spt + index, spte)
        page.set_translation(index, gfn, access)
        if trace.kvm_mmu_set_spte.enabled:
            page.trace_spte(index, gfn, spte)
        if not old & sptes.R:
            flush = self._rmap_add(as_id, level, gfn, page.spt_addr + 8 * index) or flush
        return True, flush

    def _rmap_add(self, as_id: int, level: int, gfn: int, sptep: int) -> bool:
        self.stat.count_page(level, 1)
        count = self.rmap.add(as_id, level, gfn, sptep)
        self.stat.max_mmu_rmap_size = self.rmap.max_size
        if count <= RMAP_RECYCLE_THRESHOLD:
            return False
        # Looking for one of them takes too long by now: all go, those in use come back.
        for each in self.rmap.of(as_id, level, gfn):
            self.drop_spte(*self.pages.sptep_to_sp(each))
        return True

    def set_mmio_spte(self, page: MmuPage, index: int, gfn: int, access: int, gen_bits: int) -> None:
        """Remember that there is no memory behind an address (mark_mmio_spte)."""
        self.drop_spte(page, index)
        user, writable = bool(access & ACC_USER), bool(access & ACC_WRITE)
        mmio = sptes.make_mmio_spte(gfn, gen_bits, user=user, writable=writable)
        lib.spte_xchg(page.spt + index, mmio)
        page.set_translation(index, gfn, access)

    def drop_spte(self, page: MmuPage, index: int) -> bool:
        """mmu_page_zap_pte(): clear an entry and every record of it; True when it was present."""
        spte = int(lib.spte_xchg(page.spt + index, 0))
        if not spte & sptes.R:
            return False
        level, sptep = page.role.level, page.spt_addr + 8 * index
        if level == sptes.PG_LEVEL_4K or spte & sptes.PS:
            self.rmap.remove(int(page.role.smm), level, page.get_gfn(index), sptep)
            self.stat.count_page(level, -1)
        else:
            self.pages.child(spte).remove_parent(sptep)
            self._clear_unsync_bit(page, index)
        return True

    # ---- the reverse map's users ----

    def write_protect_gfn(self, gfn: int, *, smm: bool) -> bool:
        """Take W from every spte that maps the frame, so that writes to the table are seen. True: flush."""
        flush = self._tlbs_dirty()
        for level in LEVELS:
            for sptep in self.rmap.of(int(smm), level, gfn):
                page, index = self.pages.sptep_to_sp(sptep)
                if level > sptes.PG_LEVEL_4K:
                    flush = self.drop_spte(page, index) or flush
                    continue
                old = sptes.clear_bits(page.spt + index, sptes.W | sptes.MMU_WRITABLE)
                flush = flush or bool(old & sptes.W)
        return flush

    def write_protect_log(self, as_id: int, gfns: Iterable[int]) -> bool:
        """Make the frames' next write fault for the dirty log; large pages are dropped. True: flush."""
        return self._protect_sptes(self.rmap.of_each(as_id, gfns))

    def write_protect_slot(self, slot: Memslot) -> bool:
        """Do the same for everything that maps the slot."""
        return self._protect_sptes(self.rmap.range(slot.as_id, slot.base_gfn, slot.end_gfn))

    def _protect_sptes(self, found: Iterable[int]) -> bool:
        flush = False
        # Table by table: most of what is logged is mapped by neighbours.
        tables: dict[int, int] = {}
        for sptep in found:
            spt = sptep & ~0xFFF
            tables[spt] = tables.get(spt, 0) | 1 << (sptep >> 3 & sptes.PT64_ENTRIES - 1)
        for spt, entries in tables.items():
            page, _ = self.pages.sptep_to_sp(spt)
            if page.role.level == sptes.PG_LEVEL_4K:
                flush = bool(sptes.clear_bits_of(page.spt, entries, sptes.W | sptes.DIRTY) & sptes.W) or flush
                continue
            for index in range(sptes.PT64_ENTRIES):
                if entries >> index & 1:
                    flush = self.drop_spte(page, index) or flush
        return flush

    def unmap(self, as_id: int, first: int, end: int) -> bool:
        """Drop every spte that maps a frame in the range. True: flush."""
        flush = False
        for sptep in self.rmap.range(as_id, first, end):
            flush = self.drop_spte(*self.pages.sptep_to_sp(sptep)) or flush
        return flush

    def unshadow_range(self, as_id: int, first: int, end: int) -> None:
        """Zap the shadows of guest tables in the range: what is in these frames is about to change."""
        keys = self._shadowed
        space = _SMM * bool(as_id)
        wanted = range(first | space, end | space)
        for key in (
            [k for k in wanted if k in keys] if len(wanted) < len(keys) else [k for k in keys if k in wanted]
        ):
            self.unprotect_gfn(key & ~_SMM, smm=bool(as_id))

    def unprotect_gfn(self, gfn: int, *, smm: bool) -> bool:
        """kvm_mmu_unprotect_page(): zap every shadow of a frame; False when there was none."""
        pages = [p for p in self.pages.of_gfn(gfn) if not p.role.direct and p.role.smm == smm]
        for page in pages:
            self.prepare_zap(page)
        return bool(pages)

    # ---- zapping ----

    def prepare_zap(self, page: MmuPage) -> None:
        """kvm_mmu_prepare_zap_page(): unsync children, children, parents; freed after the flush."""
        if page.invalid:
            return
        for child in list(self.unsync_pages(page)):
            if child is not page:
                self.prepare_zap(child)
        for index, spte in enumerate(page.entries()):
            if spte:
                self.drop_spte(page, index)
        for sptep in page.parents():
            self.drop_spte(*self.pages.sptep_to_sp(sptep))
        if not page.role.direct:
            self._account_shadowed(page, -1)
        if page.unsync:
            self._clear_unsync(page)
        page.invalid = True
        self.stat.mmu_shadow_zapped += 1
        self.pages.remove(page, pinned=page.root_count > 0)
        if page.root_count:
            self._reload()

    def zap_oldest(self, count: int) -> int:
        """Zap that many from the tail, but no loaded root; return how many (zap_oldest_mmu_pages)."""
        start = len(self.pages)
        for page in self.pages.oldest():
            if start - len(self.pages) >= count:
                break
            if not page.root_count:
                self.prepare_zap(page)
        return start - len(self.pages)

    def zap_all_fast(self) -> None:
        """kvm_mmu_zap_all_fast(): another generation; every page there is becomes obsolete.

        All go together, so that none has to be taken out of the records one spte at a time.  A loaded
        root stays allocated, empty, until its vCPUs have put it down.
        """
        self.pages.mmu_valid_gen ^= 1
        obsolete = self.pages.take_all()
        if trace.kvm_mmu_zap_all_fast.enabled:
            trace.kvm_mmu_zap_all_fast(gen=self.pages.mmu_valid_gen, pages=len(obsolete))
        self._shadowed.clear()
        for slot in self._slots():
            slot.arch.reset()
        for page in obsolete:
            page.invalid = True
            page.parent_ptes = 0
            if not page.root_count:
                self.pages.retire(page)
                continue
            for index, spte in enumerate(page.entries()):
                if spte:
                    lib.spte_xchg(page.spt + index, 0)
        stat = self.stat
        stat.mmu_shadow_zapped += len(obsolete)
        stat.pages_4k = stat.pages_2m = stat.pages_1g = stat.mmu_unsync = 0
        self._reload()

    # ---- unsync ----

    def _try_to_unsync(self, gfn: int, *, smm: bool, synchronizing: bool, prefetch: bool) -> bool:
        """mmu_try_to_unsync_pages(): True when the frame must stay write-protected."""
        if self.is_write_tracked(gfn, smm=smm):
            return True
        for page in self.pages.of_gfn(gfn):
            if page.role.direct or page.role.smm != smm:
                continue
            if synchronizing:
                return True
            if page.unsync:
                continue
            if prefetch:
                return True
            self._unsync_page(page)
        return False

    def _unsync_page(self, page: MmuPage) -> None:
        if trace.kvm_mmu_unsync_page.enabled:
            trace.kvm_mmu_unsync_page(**page.traced())
        page.unsync = True
        self.stat.mmu_unsync += 1
        self._mark_parents(page)

    def _mark_parents(self, page: MmuPage) -> None:
        for sptep in page.parents():
            self._mark_unsync(*self.pages.sptep_to_sp(sptep))

    def _mark_unsync(self, page: MmuPage, index: int) -> None:
        if page.unsync_child_bitmap >> index & 1:
            return
        page.unsync_child_bitmap |= 1 << index
        page.unsync_children += 1
        if page.unsync_children == 1:
            self._mark_parents(page)

    def _clear_unsync_bit(self, page: MmuPage, index: int) -> None:
        if not page.unsync_child_bitmap >> index & 1:
            return
        page.unsync_child_bitmap &= ~(1 << index)
        page.unsync_children -= 1
        if not page.unsync_children:
            self._clear_parents(page)

    def _clear_parents(self, page: MmuPage) -> None:
        for sptep in page.parents():
            self._clear_unsync_bit(*self.pages.sptep_to_sp(sptep))

    def _clear_unsync(self, page: MmuPage) -> None:
        """kvm_unlink_unsync_page()."""
        page.unsync = False
        self.stat.mmu_unsync -= 1
        self._clear_parents(page)

    def unsync_pages(self, page: MmuPage) -> Iterator[MmuPage]:
        """Yield the unsync pages below (and including) a page, by the bitmaps (mmu_unsync_walk)."""
        if page.unsync:
            yield page
        bitmap = page.unsync_child_bitmap
        while bitmap:
            index = (bitmap & -bitmap).bit_length() - 1
            bitmap &= bitmap - 1
            yield from self.unsync_pages(self.pages.child(page.view[index]))

    # ---- sync ----

    def sync_children(self, page: MmuPage) -> None:
        """mmu_sync_children(): write-protect the tables below again, take over what was changed."""
        if not page.unsync_children:
            return
        pages = list(dict.fromkeys(self.unsync_pages(page)))
        protected = False
        for each in pages:
            protected = self.write_protect_gfn(each.gfn, smm=each.role.smm) or protected
        if protected:
            # Nobody may write a table any more when it is looked at.
            self._flush()
        for each in pages:
            self._clear_unsync(each)
        flush = False
        for each in pages:
            flush = self._sync_page(each) or flush
        if flush:
            self._flush()

    def _sync_page(self, page: MmuPage) -> bool:
        """FNAME(sync_page): bring every entry in line with its gpte; True when rights went away."""
        if trace.kvm_mmu_sync_page.enabled:
            trace.kvm_mmu_sync_page(**page.traced())
        guest = GuestTables(self._vm, int(page.role.smm))
        flush = False
        for index, spte in enumerate(page.entries()):
            if spte:
                flush = self._sync_spte(page, index, spte, guest) or flush
        return flush

    def _sync_spte(self, page: MmuPage, index: int, spte: int, guest: GuestTables) -> bool:
        """FNAME(sync_spte); a gpte that came into being is left to the next fault."""
        gpte = guest.gpte(page, index)
        form = page.role.format
        if (
            gpte is None
            or form is None
            or not gpte & PRESENT
            or not gpte & ACCESSED
            or form.reserved(gpte, 1)
        ):
            return self.drop_spte(page, index)
        gfn = form.frame(gpte, 1, 0)
        access = page.role.access & form.leaf_access(gpte)
        if not spte & sptes.R or gfn != page.get_gfn(index):
            return self.drop_spte(page, index)
        if access == page.get_access(index):
            return False
        slot = guest.slots.gfn_to_memslot(gfn)
        if slot is None:
            return self.drop_spte(page, index)
        _, _, flush = self.set_spte(
            page,
            index,
            gfn,
            access,
            slot,
            host_writable=bool(spte & sptes.HOST_WRITABLE),
            writable=not slot.logging,
            synchronizing=True,
        )
        return flush

    # ---- writes to guest page tables ----

    def track_write(self, gpa: int, data: bytes, *, smm: bool) -> bool:
        """kvm_mmu_track_write(): a write that was emulated may have changed a shadowed table. True: flush."""
        self.stat.mmu_pte_write += 1
        flush, size = False, len(data)
        guest = GuestTables(self._vm, int(smm))
        for page in self.pages.of_gfn(gpa >> 12):
            if page.role.direct or page.role.smm != smm:
                continue
            if _is_misaligned(page, gpa, size) or _is_flooded(page):
                self.prepare_zap(page)
                self.stat.mmu_flooded += 1
                continue
            for index in _written_sptes(page, gpa):
                if page.role.level > sptes.PG_LEVEL_4K and _written_gpte(page, gpa, guest):
                    self.stat.mmu_pde_zapped += 1
                flush = self.drop_spte(page, index) or flush
        return flush


def _is_misaligned(page: MmuPage, gpa: int, size: int) -> bool:
    """detect_write_misaligned(): not how one writes a table entry, so it is no table any more."""
    width = 4 if page.role.has_4_byte_gpte else 8
    offset = gpa & 0xFFF
    # Linux clears a status bit with a one-byte AND of the entry's first byte.
    if offset % width == 0 and size == 1:
        return False
    return size < 4 or bool((offset ^ offset + size - 1) & ~(width - 1))


def _written_gpte(page: MmuPage, gpa: int, guest: GuestTables) -> int:
    """mmu_pte_write_fetch_gpte(): the whole entry as it is now, though half of it was written."""
    width = 4 if page.role.has_4_byte_gpte else 8
    return guest.read(gpa & ~(width - 1), width) or 0


def _is_flooded(page: MmuPage) -> bool:
    """detect_write_flooding(): written again and again without being used as a table."""
    if page.role.level == sptes.PG_LEVEL_4K:
        return False
    page.write_flooding_count += 1
    return page.write_flooding_count >= WRITE_FLOOD_LIMIT


def _written_sptes(page: MmuPage, gpa: int) -> range:
    """get_written_sptes(): the entries of this page that shadow the gpte at `gpa`."""
    offset, count = gpa & 0xFFF, 1
    if page.role.has_4_byte_gpte:
        offset <<= 1
        if page.role.level == sptes.PG_LEVEL_2M:
            # A 32-bit PDE maps 4 MiB: two sptes.
            offset = (offset & ~7) << 1
            count = 2
        if offset >> 12 != page.role.quadrant:
            return range(0)
    index = (offset & 0xFFF) >> 3
    return range(index, index + count)


__all__ = ["ACC_ALL", "ACC_GUEST_USER", "WRITE_FLOOD_LIMIT", "ShadowPages"]
