"""The MMU from outside: what tests, tools and the curious may see of it. Only `shrink` changes anything."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from pykvm.abi import Gfn, lib
from pykvm.mmu import spte as sptes
from pykvm.mmu import walk as guest_walk
from pykvm.mmu.audit import audit
from pykvm.mmu.direct import TdpMmu
from pykvm.mmu.guest import GuestTables
from pykvm.mmu.shadow import ShadowMmu
from pykvm.mmu.stat import MMU_VCPU_STATS
from pykvm.mmu.walk import Access, Fault, Paging, Walk

if TYPE_CHECKING:
    from pykvm.kvm.vcpu import Vcpu
    from pykvm.kvm.vm import Vm
    from pykvm.mmu.pages import MmuPage, Role

_GBPAGES_BIT = 26


@dataclasses.dataclass(frozen=True, slots=True)
class PageView:
    """A shadow page at one moment; `entries` are its 512 sptes."""

    gfn: int
    role: Role
    spt: int
    root_count: int
    unsync: bool
    unsync_children: int
    parents: tuple[tuple[int, int], ...]  # (address of the parent's table, index)
    entries: tuple[int, ...]

    @property
    def present(self) -> int:
        """How many entries map something."""
        return sum(map(sptes.is_shadow_present, self.entries))


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One level of a walk: which entry of which table, its value, and its bits by name."""

    level: int
    table: int  # guest: frame of the table; ours: address of the table
    index: int
    entry: int
    bits: str


@dataclasses.dataclass(frozen=True, slots=True)
class WalkView:
    """A linear address through the guest's tables and through ours, and why it stops if it does."""

    gla: int
    guest: tuple[Step, ...]
    gfn: int | None
    fault: int | None  # error code of the guest's #PF
    sptes: tuple[Step, ...]


def spte_bits(spte: int) -> str:
    """Return the bits of an spte by name."""
    if sptes.is_mmio(spte):
        return "mmio"
    names = (
        (sptes.R, "R"),
        (sptes.W, "W"),
        (sptes.X, "X"),
        (sptes.U, "U"),
        (sptes.PS, "large"),
        (sptes.ACCESSED, "A"),
        (sptes.DIRTY, "D"),
        (sptes.ROM, "rom"),
        (sptes.GUEST_USER, "guest-user"),
        (sptes.HOST_WRITABLE, "host-writable"),
        (sptes.MMU_WRITABLE, "mmu-writable"),
    )
    return " ".join(name for bit, name in names if spte & bit) or "none"


def gpte_bits(entry: int, paging: Paging) -> str:
    """Return the bits of a guest page table entry by name."""
    names = [
        (guest_walk.PRESENT, "P"),
        (guest_walk.WRITABLE, "W"),
        (guest_walk.USER, "U"),
        (guest_walk.ACCESSED, "A"),
        (guest_walk.DIRTY, "D"),
        (guest_walk.LARGE, "PS"),
        (guest_walk.GLOBAL, "G"),
    ]
    if paging.mode.format.entry_bytes > 4:
        names.append((guest_walk.NX, "NX"))
    return " ".join(name for bit, name in names if entry & bit) or "none"


class MmuView:
    """One VM's MMU: `pages()`, `rmap(gfn)`, `walk(vcpu, gla)`, `audit()`, `stat()`."""

    def __init__(self, vm: Vm) -> None:
        """Look at a VM."""
        self._vm = vm

    @property
    def mode(self) -> str:
        """Return "tdp" or "shadow"."""
        return "shadow" if isinstance(self._vm.mmu, ShadowMmu) else "tdp"

    def pages(self) -> tuple[PageView, ...]:
        """Return every shadow page, oldest first."""
        with self._vm.mmu.lock:
            return tuple(self._page(page) for page in self._vm.mmu.pages)

    def _page(self, page: MmuPage) -> PageView:
        return PageView(
            page.gfn,
            page.role,
            page.spt_addr,
            page.root_count,
            page.unsync,
            page.unsync_children,
            tuple((sptep & ~0xFFF, sptep >> 3 & 511) for sptep in page.parents()),
            tuple(page.entries()),
        )

    def rmap(self, gfn: int, as_id: int = 0) -> tuple[tuple[PageView, int], ...]:
        """Return (page, index) of every leaf that maps the frame, largest last."""
        mmu = self._vm.mmu
        with mmu.lock:
            if isinstance(mmu, ShadowMmu):
                levels = (sptes.PG_LEVEL_4K, sptes.PG_LEVEL_2M, sptes.PG_LEVEL_1G)
                found = [
                    mmu.pages.sptep_to_sp(pte) for level in levels for pte in mmu.rmap.of(as_id, level, gfn)
                ]
            else:
                found = self._tdp_leaves(mmu, gfn, as_id)
            return tuple((self._page(page), index) for page, index in found)

    def _tdp_leaves(self, mmu: object, gfn: int, as_id: int) -> list[tuple[MmuPage, int]]:
        if not isinstance(mmu, TdpMmu):
            return []
        return [
            (page, index)
            for tdp in mmu.tables(as_id)
            for page, index, spte in tdp.leaves(gfn, gfn + 1)
            if sptes.is_shadow_present(spte)
        ]

    def walk(self, vcpu: Vcpu, gla: int, want: Access | None = None) -> WalkView:
        """Walk a linear address as `want` (a supervisor's read by default), changing nothing."""
        ctl = vcpu.cpu.ctl
        gbpages = bool(ctl.cpuid[lib.CPU_CPUID_8000_0001_EDX] >> _GBPAGES_BIT & 1)
        paging = guest_walk.paging_of(vcpu.cpu.guest, gbpages, int(ctl.maxphyaddr))
        steps: tuple[Step, ...] = ()
        gfn, fault = gla >> 12, None
        if paging.root_level:
            guest = GuestTables(self._vm, vcpu.as_id)
            found = guest_walk.walk_addr(paging, gla, want or Access(ac=True), guest, mark=False)
            if isinstance(found, Fault):
                return WalkView(gla, (), None, found.error_code, ())
            steps, gfn = self._guest_steps(paging, gla, found), found.gfn
        with self._vm.mmu.lock:
            ours = self._spte_steps(vcpu, gla, Gfn(gfn))
        return WalkView(gla, steps, gfn, fault, ours)

    def _guest_steps(self, paging: Paging, gla: int, found: Walk) -> tuple[Step, ...]:
        top = found.level + len(found.tables) - 1
        form = paging.mode.format
        return tuple(
            Step(top - i, table, form.index(gla, top - i), entry, gpte_bits(entry, paging))
            for i, (table, entry) in enumerate(zip(found.tables, found.entries, strict=True))
        )

    def _spte_steps(self, vcpu: Vcpu, gla: int, gfn: Gfn) -> tuple[Step, ...]:
        mmu = self._vm.mmu
        if isinstance(mmu, ShadowMmu):
            root = mmu.state(vcpu).root
            page, key = (root.page_for(gla) if root else None), gla >> 12
        elif isinstance(mmu, TdpMmu):
            page, key = mmu.tdp_of(vcpu).root, int(gfn)
        else:
            return ()
        steps = []
        while page is not None:
            index = sptes.index(key, page.role.level)
            spte = page.view[index]
            steps.append(Step(page.role.level, page.spt_addr, index, spte, spte_bits(spte)))
            if not sptes.is_shadow_present(spte) or sptes.is_last(spte, page.role.level):
                break
            page = mmu.pages.child(spte)
        return tuple(steps)

    def audit(self) -> list[str]:
        """Return what is inconsistent; empty when all is well."""
        return audit(self._vm.mmu, self._vm.memslots)

    def shrink(self, count: int) -> int:
        """Have up to `count` of the oldest shadow pages freed, as under memory pressure; return how many."""
        return self._vm.mmu.shrink(count)

    def stat(self) -> dict[str, int]:
        """Return the MMU's statistics by KVM's names: the VM's, and the sum of its vCPUs'."""
        stat = dataclasses.asdict(self._vm.mmu.stat)
        for name in MMU_VCPU_STATS:
            stat[name] = sum(getattr(vcpu.stat, name) for vcpu in self._vm.vcpus.values())
        return stat
