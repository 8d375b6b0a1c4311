"""Roots of shadow paging: what a vCPU's CR3 stands for, and the last few it had."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

from pykvm.abi import CData, Gfn, ffi, lib, uapi
from pykvm.mmu import spte as sptes
from pykvm.mmu.pages import MemoryCache, MmuPage, Role
from pykvm.mmu.walk import FRAME, FRAME32, PRESENT, Paging

if TYPE_CHECKING:
    from pykvm.mmu.shadow_pages import ShadowPages

NUM_PREV_ROOTS = 3
PAE_ROOT_LEVEL = 3
PAE_ROOT_ENTRIES = 4


@dataclasses.dataclass(slots=True, eq=False)
class Root:
    """One root: a page of the top level, or PAE's four of level 2 under a table of four entries.

    `eptp`, `level`: what the processor is given.
    """

    paging: Paging
    smm: bool
    eptp: int
    level: int
    pages: tuple[MmuPage | None, ...]
    pae_root: CData = None

    def page_for(self, gla: int) -> MmuPage | None:
        """Return the shadow page the walk of an address starts at."""
        return self.pages[gla >> 30 & 3] if self.level == PAE_ROOT_LEVEL else self.pages[0]

    def is_of(self, paging: Paging, smm: bool) -> bool:
        """Whether the root stands for these registers, and may still be used."""
        return self.smm == smm and self.paging == paging and not self.obsolete

    @property
    def pcid(self) -> int:
        """The PCID in its CR3, or what is there without PCIDs."""
        return self.paging.cr3 & uapi.X86_CR3_PCID_MASK

    @property
    def obsolete(self) -> bool:
        """Whether a page of it has been zapped while it was loaded."""
        return any(page is not None and page.invalid for page in self.pages)


@dataclasses.dataclass(slots=True)
class VcpuMmu:
    """One vCPU's part: its root and the last few it had (struct kvm_mmu)."""

    root: Root | None = None
    prev_roots: list[Root] = dataclasses.field(default_factory=list)

    def roots(self) -> tuple[Root, ...]:
        """Return all roots it holds."""
        return (*((self.root,) if self.root else ()), *self.prev_roots)

    def take(self, paging: Paging, smm: bool) -> Root | None:
        """Return the previous root for these registers, out of the list (cached_root_find)."""
        for root in self.prev_roots:
            if root.is_of(paging, smm):
                self.prev_roots.remove(root)
                return root
        return None

    def push(self, root: Root) -> list[Root]:
        """Make a root the latest previous one; return those that there is no room for."""
        self.prev_roots.insert(0, root)
        gone = self.prev_roots[NUM_PREV_ROOTS:]
        del self.prev_roots[NUM_PREV_ROOTS:]
        return gone


class ExtendedRole(NamedTuple):
    """What CR4 and EFER mean for paging beside the role itself (union kvm_mmu_extended_role)."""

    valid: bool
    execonly: bool  # of EPT tables that a guest hypervisor makes: there are none
    cr4_pse: bool
    cr4_pke: bool
    cr4_smap: bool
    cr4_smep: bool
    cr4_la57: bool
    efer_lma: bool


class CpuRole(NamedTuple):
    """What a vCPU's registers ask of its root (union kvm_cpu_role)."""

    base: Role
    ext: ExtendedRole


def calc_cpu_role(paging: Paging, smm: bool, cr4: int) -> CpuRole:
    """kvm_calc_cpu_role(). cr4: the vCPU's; the rest of its registers is in `paging`."""
    level = paging.root_level
    ext = ExtendedRole(
        valid=True,
        execonly=False,
        cr4_pse=level > 0 and bool(cr4 & uapi.X86_CR4_PSE),
        cr4_pke=level >= 4 and bool(cr4 & uapi.X86_CR4_PKE),
        cr4_smap=paging.mode.smap,
        cr4_smep=paging.mode.smep,
        cr4_la57=level == 5,
        efer_lma=level >= 4,
    )
    return CpuRole(_root_role(paging, smm)._replace(level=level), ext)


def alloc_root(tables: ShadowPages, paging: Paging, smm: bool, cache: MemoryCache) -> Root:
    """mmu_alloc_shadow_roots(): a page for CR3's frame, or PAE's four for 3 and 2 levels and none.

    A CR3 that points nowhere gives a root like any other: every walk below it faults.
    """
    role = _root_role(paging, smm)
    if paging.root_level > PAE_ROOT_LEVEL:
        page = tables.get_page(Gfn((paging.cr3 & FRAME) >> 12), role._replace(level=paging.root_level), cache)
        page.root_count += 1
        return Root(paging, smm, page.spt_addr, paging.root_level, (page,))
    pae_root = ffi.gc(cache.take(), lib.spt_free)
    pages: list[MmuPage | None] = []
    for i in range(PAE_ROOT_ENTRIES):
        page_or_none = _pae_root_page(tables, role._replace(level=sptes.PG_LEVEL_2M), paging, i, cache)
        pages.append(page_or_none)
        if page_or_none is not None:
            page_or_none.root_count += 1
            lib.spte_write(pae_root + i, sptes.make_nonleaf_spte(page_or_none.spt_addr))
    return Root(paging, smm, int(ffi.cast("uintptr_t", pae_root)), PAE_ROOT_LEVEL, tuple(pages), pae_root)


def _root_role(paging: Paging, smm: bool) -> Role:
    mode = paging.mode
    direct = paging.root_level == 0
    return Role(
        0,
        direct=direct,
        smm=smm,
        has_4_byte_gpte=mode.format.root_level == 2,
        efer_nx=mode.format.nx,
        cr0_wp=mode.wp,
        smep_andnot_wp=mode.smep and not mode.wp,
        smap_andnot_wp=mode.smap and not mode.wp,
        format=None if direct else mode.format,
    )


def _pae_root_page(
    tables: ShadowPages, role: Role, paging: Paging, i: int, cache: MemoryCache
) -> MmuPage | None:
    if paging.root_level == 0:
        return tables.get_page(Gfn(i << 18), role, cache)
    if paging.root_level == 2:
        return tables.get_page(Gfn((paging.cr3 & FRAME32) >> 12), role._replace(quadrant=i), cache)
    pdpte = paging.pdptrs[i]
    if not pdpte & PRESENT:
        return None
    return tables.get_page(Gfn((pdpte & FRAME) >> 12), role, cache)


def put_root(tables: ShadowPages, root: Root) -> None:
    """mmu_free_root_page(): what was zapped meanwhile goes with its last root."""
    for page in root.pages:
        if page is None:
            continue
        page.root_count -= 1
        if page.invalid and not page.root_count:
            tables.pages.retire(page)
