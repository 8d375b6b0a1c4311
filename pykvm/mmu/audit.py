"""The auditor: does everything the MMU has written down about its tables agree with the tables?

KVM had one (mmu_audit.c) until 5.18.  Tests run it after every step.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from pykvm.mmu import spte as sptes
from pykvm.mmu.memslot_arch import MemslotArch
from pykvm.mmu.rmap import LEVELS
from pykvm.mmu.shadow import ShadowMmu
from pykvm.mmu.shadow_pages import ACC_GUEST_USER
from pykvm.mmu.walk import ACC_EXEC, ACC_USER, ACC_WRITE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pykvm.mmu.base import Mmu
    from pykvm.mmu.pages import MmuPage
    from pykvm.mmu.slots import Memslots


def audit(mmu: Mmu, memslots: tuple[Memslots, ...]) -> list[str]:
    """Return what is inconsistent, one line each; empty when all is well."""
    with mmu.lock:
        found = [line for page in mmu.pages for line in _audit_page(mmu, page, memslots)]
        found += _audit_counts(mmu)
        if isinstance(mmu, ShadowMmu):
            found += _audit_rmap(mmu)
            found += _audit_write_protection(mmu)
            found += _audit_slots(mmu, memslots)
    return found


def _name(page: MmuPage, index: int | None = None) -> str:
    at = "" if index is None else f"[{index}]"
    return f"page gfn {page.gfn:#x} level {page.role.level}{at}"


def _audit_page(mmu: Mmu, page: MmuPage, memslots: tuple[Memslots, ...]) -> Iterator[str]:
    if page not in mmu.pages.of_gfn(page.gfn):
        yield f"{_name(page)}: not in the hash of its frame"
    if page.invalid:
        yield f"{_name(page)}: invalid but on the active list"
    for sptep in page.parents():
        try:
            parent, index = mmu.pages.sptep_to_sp(sptep)
        except KeyError:
            yield f"{_name(page)}: its parent at {sptep:#x} is no page"
            continue
        if parent.view[index] & sptes.PFN_MASK != page.spt_addr:
            yield f"{_name(page)}: {_name(parent, index)} is no parent of it"
    if page.unsync and page.role.level != sptes.PG_LEVEL_4K:
        yield f"{_name(page)}: unsync above level 1"
    if page.unsync_children != page.unsync_child_bitmap.bit_count():
        yield f"{_name(page)}: {page.unsync_children} unsync children, bitmap says otherwise"
    slots = memslots[int(page.role.smm)]
    for index, spte in enumerate(page.entries()):
        if not spte & sptes.R:
            continue
        if sptes.is_last(spte, page.role.level):
            yield from _audit_leaf(mmu, page, index, spte, slots)
        else:
            yield from _audit_link(mmu, page, index, spte)


def _audit_link(mmu: Mmu, page: MmuPage, index: int, spte: int) -> Iterator[str]:
    try:
        child = mmu.pages.child(spte)
    except KeyError:
        yield f"{_name(page, index)}: points to no table of ours"
        return
    if page.spt_addr + 8 * index not in child.parents():
        yield f"{_name(page, index)}: {_name(child)} does not list it as a parent"
    if child.role.level != page.role.level - 1:
        yield f"{_name(page, index)}: child is of level {child.role.level}"
    if child.role.access & ~page.role.access & ~ACC_GUEST_USER and not _by_cr0_wp(child):
        granted, had = child.role.access, page.role.access
        yield f"{_name(page, index)}: child grants {granted}, more than its parent's {had}"
    unsync = child.unsync or child.unsync_children > 0
    if unsync != bool(page.unsync_child_bitmap >> index & 1):
        yield f"{_name(page, index)}: unsync bit is {not unsync}"


def _audit_leaf(mmu: Mmu, page: MmuPage, index: int, spte: int, slots: Memslots) -> Iterator[str]:
    gfn = page.get_gfn(index)
    level = page.role.level
    npages = sptes.pages_per(level)
    slot = slots.gfn_to_memslot(gfn)
    if slot is None or gfn + npages > slot.end_gfn:
        yield f"{_name(page, index)}: maps gfn {gfn:#x}, which is in no slot"
    elif spte & sptes.PFN_MASK != slot.hva(gfn):
        yield f"{_name(page, index)}: maps the wrong host page for gfn {gfn:#x}"
    elif spte & sptes.W and slot.readonly:
        yield f"{_name(page, index)}: gfn {gfn:#x} of a READONLY slot is writable"
    elif spte & sptes.W and slot.logging and not _is_dirty(slot.dirty_bitmap, gfn - slot.base_gfn):
        yield f"{_name(page, index)}: gfn {gfn:#x} is writable and not in the dirty log"
    if spte & sptes.MMU_WRITABLE and not spte & sptes.HOST_WRITABLE:
        yield f"{_name(page, index)}: MMU-writable but not host-writable"
    if isinstance(mmu, ShadowMmu):
        if page.spt_addr + 8 * index not in mmu.rmap.of(int(page.role.smm), level, gfn):
            yield f"{_name(page, index)}: not in the reverse map of gfn {gfn:#x}"
        yield from _audit_access(page, index, spte)


def _by_cr0_wp(child: MmuPage) -> bool:
    """Whether a page splits a large page that the supervisor wrote with CR0.WP=0: W for U."""
    access = child.role.access
    return child.role.direct and not child.role.cr0_wp and access & (ACC_WRITE | ACC_USER) == ACC_WRITE


def _is_dirty(bitmap: bytearray | None, rel: int) -> bool:
    return bitmap is None or bool(bitmap[rel >> 3] >> (rel & 7) & 1)


def _audit_access(page: MmuPage, index: int, spte: int) -> Iterator[str]:
    allowed = page.get_access(index)
    granted = ACC_EXEC * bool(spte & sptes.X) | ACC_USER * bool(spte & sptes.U)
    granted |= ACC_WRITE * bool(spte & sptes.W)
    if granted & ~allowed:
        yield f"{_name(page, index)}: grants {granted}, recorded are {allowed}"
    # With CR0.WP=0 a supervisor's write gives W for U: the sum is not wider, only other.
    more = page.shadowed is not None and allowed & ~page.role.access & ~ACC_GUEST_USER
    if more and (page.role.cr0_wp or not allowed & ACC_WRITE or allowed & ACC_USER):
        yield f"{_name(page, index)}: has rights {allowed}, its table {page.role.access}"


def _audit_counts(mmu: Mmu) -> Iterator[str]:
    leaves: Counter[int] = Counter()
    for page in mmu.pages:
        level = page.role.level
        leaves[level] += sum(1 for spte in page.entries() if spte & sptes.R and sptes.is_last(spte, level))
    counted = (mmu.stat.pages_4k, mmu.stat.pages_2m, mmu.stat.pages_1g)
    for level, count in enumerate(counted, sptes.PG_LEVEL_4K):
        if leaves[level] != count:
            yield f"{leaves[level]} leaves of level {level}, statistics say {count}"
    if mmu.stat.mmu_unsync != sum(page.unsync for page in mmu.pages):
        yield f"mmu_unsync is {mmu.stat.mmu_unsync}"
    if isinstance(mmu, ShadowMmu):
        yield from _audit_shadow_counts(mmu, leaves)


def _audit_shadow_counts(mmu: ShadowMmu, leaves: Counter[int]) -> Iterator[str]:
    if sum(1 for _ in mmu.rmap) != leaves.total():
        yield f"{leaves.total()} leaves, the reverse map has {sum(1 for _ in mmu.rmap)}"
    for page in mmu.pages:
        if page.role.direct:
            continue
        gfn, smm = page.gfn, page.role.smm
        if not mmu.tables.is_shadowed(gfn, smm=smm):
            yield f"{_name(page)}: not counted among the shadowed frames"
    loaded = Counter(page for root in mmu.loaded_roots() for page in root.pages if page is not None)
    for page in mmu.pages:
        if page.root_count != loaded[page]:
            yield f"{_name(page)}: root_count {page.root_count}, loaded {loaded[page]} times"


def _audit_slots(mmu: ShadowMmu, memslots: tuple[Memslots, ...]) -> Iterator[str]:
    """Compare what slots say of their frames with the pages there are, counted anew."""
    fresh = {
        slot: MemslotArch(slot.base_gfn, slot.npages, slot.userspace_addr)
        for slots in memslots
        for slot in slots.ordered
    }
    for page in mmu.pages:
        slot = memslots[int(page.role.smm)].gfn_to_memslot(page.gfn)
        if not page.role.direct and slot is not None:
            fresh[slot].account_shadowed(page.gfn, 1, tracked=page.role.level > sptes.PG_LEVEL_4K)
    for slot, counted in fresh.items():
        arch = slot.arch
        if arch.write_track != counted.write_track:
            yield f"slot {slot.id}: write-tracked are {arch.write_track}, must be {counted.write_track}"
        if arch.lpage_info != counted.lpage_info:
            yield f"slot {slot.id}: disallow_lpage {arch.lpage_info}, must be {counted.lpage_info}"
        if (arch.rmap is not None) != mmu.tables.shadow_root_allocated:
            yield f"slot {slot.id}: has a reverse map before there is a root, or none"


def _audit_rmap(mmu: ShadowMmu) -> Iterator[str]:
    for _, level, gfn, sptep in mmu.rmap:
        page, index = mmu.pages.sptep_to_sp(sptep)
        if page.role.level != level or not sptes.is_shadow_present(page.view[index]):
            yield f"reverse map of gfn {gfn:#x}: {_name(page, index)} maps nothing"


def _audit_write_protection(mmu: ShadowMmu) -> Iterator[str]:
    for table in mmu.pages:
        if table.role.direct or table.unsync:
            continue
        for level in LEVELS:
            for sptep in mmu.rmap.of(int(table.role.smm), level, table.gfn):
                page, index = mmu.pages.sptep_to_sp(sptep)
                if page.view[index] & (sptes.W | sptes.MMU_WRITABLE):
                    yield f"{_name(page, index)}: guest table gfn {table.gfn:#x} is writable"
