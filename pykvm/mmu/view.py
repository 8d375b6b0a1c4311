"""The MMU from outside: what tests, tools and the curious may see of it. Only `shrink` changes anything."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from pykvm.abi import lib
from pykvm.mmu import spte as sptes
from pykvm.mmu import walk as guest_walk
from pykvm.mmu.audit import audit
from pykvm.mmu.direct import TdpMmu
from pykvm.mmu.guest import GuestTables
from pykvm.mmu.roots import CpuRole, calc_cpu_role
from pykvm.mmu.shadow import ShadowMmu
from pykvm.mmu.stat import MMU_VCPU_STATS
from pykvm.mmu.walk import Access, Walk

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pykvm.kvm.vcpu import Vcpu
    from pykvm.kvm.vm import Vm
    from pykvm.mmu.pages import MmuPage, Role
    from pykvm.mmu.slots import Memslot
    from pykvm.mmu.snapshot import Snapshot
    from pykvm.mmu.walk import GpteFormat, Paging

_GBPAGES_BIT = 26
_PAE = 3


@dataclasses.dataclass(frozen=True, slots=True)
class PageView:
    """A shadow page at one moment.

    `table`: its 512 sptes as bytes; `recorded`: frame << 12 | rights behind each of them, as KVM keeps them
    for pages that are not direct, None for those that are; `parents`: (address of the table, index).
    """

    gfn: int
    role: Role
    spt: int
    root_count: int
    unsync: bool
    unsync_children: int
    parents: tuple[tuple[int, int], ...]
    table: bytes
    recorded: bytes | None = None
    unsync_child_bitmap: int = 0
    write_flooding_count: int = 0
    mmu_valid_gen: int = 0
    tdp_mmu_page: bool = False

    @property
    def entries(self) -> Sequence[int]:
        """The 512 sptes."""
        return memoryview(self.table).cast("Q")

    @property
    def present(self) -> int:
        """How many entries map something."""
        return sum(map(sptes.is_shadow_present, self.entries))

    def gfn_of(self, index: int) -> int:
        """Return the frame that entry `index`, a leaf, maps."""
        if self.recorded is not None:
            return memoryview(self.recorded).cast("Q")[index] >> 12
        return self.gfn + index * sptes.pages_per(self.role.level)


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
    """A linear address through the guest's tables and through ours.

    `gfn`: the frame the guest's tables give, None when they give none; `fault`: error code of the guest's
    #PF, None when it gets none; `reason`: why the access does not go through now, "" when it does.
    """

    gla: int
    guest: tuple[Step, ...]
    gfn: int | None
    fault: int | None
    sptes: tuple[Step, ...]
    reason: str = ""


SPTE_BITS = (
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
GPTE_BITS = (
    (guest_walk.PRESENT, "P"),
    (guest_walk.WRITABLE, "W"),
    (guest_walk.USER, "U"),
    (guest_walk.ACCESSED, "A"),
    (guest_walk.DIRTY, "D"),
    (guest_walk.LARGE, "PS"),
    (guest_walk.GLOBAL, "G"),
    (guest_walk.NX, "NX"),
)


def spte_bits(spte: int) -> str:
    """Return the bits of an spte by name."""
    if sptes.is_mmio(spte):
        return f"mmio gfn {(spte & sptes.PFN_MASK) >> 12:#x}"
    return " ".join(name for bit, name in SPTE_BITS if spte & bit) or "none"


def gpte_bits(entry: int, paging: Paging) -> str:
    """Return the bits of a guest page table entry by name."""
    names = GPTE_BITS if paging.mode.format.entry_bytes > 4 else GPTE_BITS[:-1]
    return " ".join(name for bit, name in names if entry & bit) or "none"


def guest_steps(paging: Paging, gla: int, memory: GuestTables) -> tuple[tuple[Step, ...], str]:
    """Return the guest's entries on the way to an address, and why there are no more ("" at a leaf)."""
    form = paging.mode.format
    steps: list[Step] = []
    level, table = form.root_level, form.table(paging.cr3)
    if level == _PAE:
        pdpte = paging.pdptrs[gla >> 30 & 3]
        if not pdpte & guest_walk.PRESENT:
            return (), f"guest: PDPTE {gla >> 30 & 3} is not present"
        level, table = _PAE - 1, form.table(pdpte)
    while True:
        index = form.index(gla, level)
        entry = memory.read((table << 12) + index * form.entry_bytes, form.entry_bytes)
        if entry is None:
            return tuple(steps), f"guest: the table of level {level}, gfn {table:#x}, is not in memory"
        steps.append(Step(level, table, index, entry, gpte_bits(entry, paging)))
        why = _entry_fault(form, entry, level)
        if why or level == 1 or form.is_large(entry, level):
            return tuple(steps), why
        level, table = level - 1, form.table(entry)


def _entry_fault(form: GpteFormat, entry: int, level: int) -> str:
    if not entry & guest_walk.PRESENT:
        return f"guest: the entry of level {level} is not present"
    reserved = form.reserved(entry, level)
    return f"guest: the entry of level {level} has reserved bits {reserved:#x} set" if reserved else ""


def _permission_reason(paging: Paging, steps: tuple[Step, ...], want: Access) -> str:
    """Say what forbids an access that every entry is present for."""
    access = guest_walk.ACC_ALL
    for step in steps:
        access &= paging.mode.format.access(step.entry)
    names = ((guest_walk.ACC_WRITE, "write"), (guest_walk.ACC_USER, "user"), (guest_walk.ACC_EXEC, "execute"))
    granted = " ".join(name for bit, name in names if access & bit) or "supervisor's reads only"
    who = "user" if want.user else "supervisor"
    what = "fetch" if want.fetch else "write" if want.write else "read"
    mode = paging.mode
    rules = " ".join(n for n, on in (("WP", mode.wp), ("SMEP", mode.smep), ("SMAP", mode.smap)) if on)
    return f"guest: a {who}'s {what} is forbidden: the tables grant {granted}; {rules or 'no WP'}"


def paging_of(vcpu: Vcpu) -> Paging:
    """Return the paging mode that the vCPU's registers say now."""
    ctl = vcpu.cpu.ctl
    gbpages = bool(ctl.cpuid[lib.CPU_CPUID_8000_0001_EDX] >> _GBPAGES_BIT & 1)
    return guest_walk.paging_of(vcpu.cpu.guest, gbpages, int(ctl.maxphyaddr))


@dataclasses.dataclass(frozen=True, slots=True)
class SlotView:
    """What is recorded of the frames of a slot (struct kvm_arch_memory_slot) at one moment.

    `rmap`: page size as a level -> how many sptes map frames of it, None before there is a shadow root;
    `disallow_lpage`: level -> number of the page in the slot -> reasons; `write_track`: gfn -> shadow pages.
    """

    as_id: int
    id: int
    base_gfn: int
    npages: int
    rmap: dict[int, int] | None
    disallow_lpage: dict[int, dict[int, int]]
    write_track: dict[int, int]


@dataclasses.dataclass(frozen=True, slots=True)
class RootView:
    """A root of a vCPU. `pages`: addresses of its tables, 0: PAE has none; `eptp`: what the processor has."""

    eptp: int
    level: int
    cr3: int
    pages: tuple[int, ...]


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
            page.view.tobytes(),
            None if page.shadowed is None else page.shadowed.tobytes(),
            page.unsync_child_bitmap,
            page.write_flooding_count,
            page.mmu_valid_gen,
            page.tdp_mmu_page,
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
        want = want or Access(ac=True)
        paging = paging_of(vcpu)
        steps: tuple[Step, ...] = ()
        gfn: int | None = gla >> 12
        fault, reason = None, ""
        if paging.root_level:
            guest = GuestTables(self._vm, vcpu.as_id)
            steps, reason = guest_steps(paging, gla, guest)
            found = guest_walk.walk_addr(paging, gla, want, guest, mark=False)
            if isinstance(found, Walk):
                gfn = found.gfn
            else:
                gfn, fault = None, found.error_code
                reason = reason or _permission_reason(paging, steps, want)
        with self._vm.mmu.lock:
            ours = self._spte_steps(vcpu, gla, gfn)
            if gfn is not None:
                reason = self._our_reason(vcpu, gfn, want, ours)
        return WalkView(gla, steps, gfn, fault, ours, reason)

    def _our_reason(self, vcpu: Vcpu, gfn: int, want: Access, steps: tuple[Step, ...]) -> str:
        """Say why our tables would fault on an access that the guest's allow."""
        if not steps:
            return "there is no root yet"
        last = steps[-1]
        if sptes.is_mmio(last.entry):
            return "there is no memory: MMIO"
        if not sptes.is_shadow_present(last.entry):
            return f"the entry of level {last.level} is not present: the first access maps it"
        if want.write and not last.entry & sptes.W:
            return self._why_read_only(vcpu, gfn, last.entry)
        if isinstance(self._vm.mmu, ShadowMmu):
            if want.user and not last.entry & sptes.U:
                return "mapped for the supervisor only: CR0.WP is clear and it wrote the page"
            if want.fetch and not last.entry & sptes.X:
                return "not executable: CR0.WP is clear, SMEP is on, and the supervisor wrote the page"
        return ""

    def _why_read_only(self, vcpu: Vcpu, gfn: int, spte: int) -> str:
        mmu, smm = self._vm.mmu, bool(vcpu.as_id)
        slot = mmu.memslots(vcpu).gfn_to_memslot(gfn)
        if slot is not None and slot.readonly:
            return "read-only: the slot is READONLY"
        if isinstance(mmu, ShadowMmu):
            if mmu.tables.is_write_tracked(gfn, smm=smm):
                return "write-protected: the frame is a guest's table of level 2 or more"
            if mmu.tables.is_shadowed(gfn, smm=smm) and not spte & sptes.MMU_WRITABLE:
                return "write-protected: the frame is a guest's last-level table; a write makes it unsync"
        if spte & sptes.MMU_WRITABLE:
            return "write-protected for the dirty log"
        if not spte & sptes.HOST_WRITABLE:
            return "read-only: so is the host's memory"
        return "read-only: the guest's D bit is clear, and the first write has to set it"

    def _spte_steps(self, vcpu: Vcpu, gla: int, gfn: int | None) -> tuple[Step, ...]:
        mmu = self._vm.mmu
        if isinstance(mmu, ShadowMmu):
            root = mmu.state(vcpu).root
            page, key = (root.page_for(gla) if root else None), gla >> 12
        elif isinstance(mmu, TdpMmu) and gfn is not None:
            page, key = mmu.tdp_of(vcpu).root, gfn
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

    def slots(self) -> tuple[SlotView, ...]:
        """Return what is recorded of each slot's frames."""
        with self._vm.mmu.lock:
            return tuple(self._slot(slot) for slots in self._vm.memslots for slot in slots.ordered)

    def _slot(self, slot: Memslot) -> SlotView:
        arch, rmap = slot.arch, None
        if arch.rmap is not None:
            rmap = {level: sum(1 for _ in heads) for level, heads in enumerate(arch.rmap, sptes.PG_LEVEL_4K)}
        lpages = {level: arch.disallowed(level) for level in arch.lpage_info}
        return SlotView(slot.as_id, slot.id, slot.base_gfn, slot.npages, rmap, lpages, dict(arch.write_track))

    def roots(self, vcpu: Vcpu) -> tuple[RootView, ...]:
        """Return the vCPU's root and then the last few it had; with two-dimensional paging the only one."""
        mmu = self._vm.mmu
        with mmu.lock:
            if isinstance(mmu, TdpMmu):
                root = mmu.tdp_of(vcpu).root
                return (RootView(root.spt_addr, root.role.level, 0, (root.spt_addr,)),)
            if not isinstance(mmu, ShadowMmu):
                return ()
            return tuple(
                RootView(
                    root.eptp,
                    root.level,
                    root.paging.cr3,
                    tuple(page.spt_addr if page else 0 for page in root.pages),
                )
                for root in mmu.state(vcpu).roots()
            )

    def role(self, vcpu: Vcpu) -> CpuRole:
        """Return what the vCPU's registers ask of its root: role and extended role."""
        return calc_cpu_role(paging_of(vcpu), bool(vcpu.as_id), int(vcpu.cpu.guest.cr4))

    def is_tdp_mmu(self, vcpu: Vcpu) -> bool:
        """Whether the processor runs on tables of two-dimensional paging."""
        with self._vm.mmu.lock:
            return self._vm.mmu.pages.is_tdp_mmu(int(vcpu.cpu.ctl.eptp))

    def audit(self) -> list[str]:
        """Return what is inconsistent; empty when all is well."""
        return audit(self._vm.mmu, self._vm.memslots)

    def snapshot(self) -> Snapshot:
        """Return everything there is to see at this moment; see pykvm/mmu/page.py for what draws it."""
        from pykvm.mmu import snapshot  # noqa: PLC0415  it is made of what is here

        return snapshot.take(self._vm)

    def shrink(self, count: int) -> int:
        """Have up to `count` of the oldest shadow pages freed, as under memory pressure; return how many."""
        return self._vm.mmu.shrink(count)

    def stat(self) -> dict[str, int]:
        """Return the MMU's statistics by KVM's names: the VM's, and the sum of its vCPUs'."""
        stat = dataclasses.asdict(self._vm.mmu.stat)
        for name in MMU_VCPU_STATS:
            stat[name] = sum(getattr(vcpu.stat, name) for vcpu in self._vm.vcpus.values())
        return stat
