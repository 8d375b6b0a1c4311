"""The auditor: does everything the MMU has written down about its tables agree with the tables?

KVM had one (mmu_audit.c) until 5.18.  Tests run it after every step.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from pykvm.mmu import spte as sptes
from pykvm.mmu.shadow import ShadowMmu
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
    return found


def _name(page: MmuPage, index: int | None = None) -> str:
    at = "" if index is None else f"[{index}]"
    return f"page gfn {page.gfn:#x} level {page.role.level}{at}"


def _audit_page(mmu: Mmu, page: MmuPage, memslots: tuple[Memslots, ...]) -> Iterator[str]:
    if page not in mmu.pages.of_gfn(page.gfn):
        yield f"{_name(page)}: not in the hash of its frame"
    if page.invalid:
        yield f"{_name(page)}: invalid but on the active list"
    for parent, index in page.parents:
        if sptes.read(parent.spt + index) & sptes.PFN_MASK != page.spt_addr:
            yield f"{_name(page)}: {_name(parent, index)} is no parent of it"
    if page.unsync and page.role.level != sptes.PG_LEVEL_4K:
        yield f"{_name(page)}: unsync above level 1"
    if page.unsync_children != page.unsync_child_bitmap.bit_count():
        yield f"{_name(page)}: {page.unsync_children} unsync children, bitmap says otherwise"
    slots = memslots[int(page.role.smm)]
    for index, spte in enumerate(page.entries()):
        if not sptes.is_shadow_present(spte):
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
    if (page, index) not in child.parents:
        yield f"{_name(page, index)}: {_name(child)} does not list it as a parent"
    if child.role.level != page.role.level - 1:
        yield f"{_name(page, index)}: child is of level {child.role.level}"
    if child.role.access & ~page.role.access:
        granted, had = child.role.access, page.role.access
        yield f"{_name(page, index)}: child grants {granted}, more than its parent's {had}"
    unsync = child.unsync or child.unsync_children > 0
    if unsync != bool(page.unsync_child_bitmap >> index & 1):
        yield f"{_name(page, index)}: unsync bit is {not unsync}"


def _audit_leaf(mmu: Mmu, page: MmuPage, index: int, spte: int, slots: Memslots) -> Iterator[str]:
    gfn = page.shadowed_gfn(index)
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
        if (page, index) not in mmu.rmap.of(int(page.role.smm), level, gfn):
            yield f"{_name(page, index)}: not in the reverse map of gfn {gfn:#x}"
        yield from _audit_access(page, index, spte)


def _is_dirty(bitmap: bytearray | None, rel: int) -> bool:
    return bitmap is None or bool(bitmap[rel >> 3] >> (rel & 7) & 1)


def _audit_access(page: MmuPage, index: int, spte: int) -> Iterator[str]:
    # With CR0.WP=0 a supervisor's write gives W for U: the sum is not wider, only other.
    allowed = page.role.access if page.gfns is None else page.accesses[index]
    granted = ACC_EXEC * bool(spte & sptes.X) | ACC_USER * bool(spte & sptes.U)
    granted |= ACC_WRITE * bool(spte & sptes.W)
    if granted & ~allowed:
        yield f"{_name(page, index)}: grants {granted}, recorded are {allowed}"


def _audit_counts(mmu: Mmu) -> Iterator[str]:
    leaves: Counter[int] = Counter()
    for page in mmu.pages:
        for spte in page.entries():
            if sptes.is_shadow_present(spte) and sptes.is_last(spte, page.role.level):
                leaves[page.role.level] += 1
    counted = (mmu.stat.pages_4k, mmu.stat.pages_2m, mmu.stat.pages_1g)
    for level, count in enumerate(counted, sptes.PG_LEVEL_4K):
        if leaves[level] != count:
            yield f"{leaves[level]} leaves of level {level}, statistics say {count}"
    if mmu.stat.mmu_unsync != sum(page.unsync for page in mmu.pages):
        yield f"mmu_unsync is {mmu.stat.mmu_unsync}"


def _audit_rmap(mmu: ShadowMmu) -> Iterator[str]:
    for _, level, gfn, page, index in mmu.rmap:
        spte = sptes.read(page.spt + index)
        if page.role.level != level or not sptes.is_shadow_present(spte):
            yield f"reverse map of gfn {gfn:#x}: {_name(page, index)} maps nothing"


def _audit_write_protection(mmu: ShadowMmu) -> Iterator[str]:
    for table in mmu.pages:
        if table.role.direct or table.unsync:
            continue
        for level in (sptes.PG_LEVEL_4K, sptes.PG_LEVEL_2M):
            for page, index in mmu.rmap.of(int(table.role.smm), level, table.gfn):
                if sptes.read(page.spt + index) & sptes.W:
                    yield f"{_name(page, index)}: guest table gfn {table.gfn:#x} is writable"
