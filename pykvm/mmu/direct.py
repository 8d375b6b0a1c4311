"""The MMU in its usual mode: two-dimensional paging (TDP). The guest owns its tables.

Page faults here are EPT violations, handled in the order and with the names of KVM's mmu.c.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from pykvm import trace
from pykvm.abi import CData, Gfn, Gpa, Spte, lib
from pykvm.abi.uaccess import address_of
from pykvm.mmu import spte as sptes
from pykvm.mmu.base import MemoryFault, Mmu, PoisonedPageError, RetPf, bitmap_words, host_access
from pykvm.mmu.pages import Role
from pykvm.mmu.slots import Change, Memslot, Memslots
from pykvm.mmu.tdp import Tdp, has_tables
from pykvm.mmu.walk import ACC_ALL, PF_W

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pykvm.kvm.vcpu import Vcpu
    from pykvm.kvm.vm import Vm

# 4-level second-level tables reach 48 bits of gpa, 5-level ones all 52.
_FOUR_LEVEL_GPA_BITS = 48


@dataclasses.dataclass(slots=True)
class PageFault:
    """One fault while it is looked at (struct kvm_page_fault)."""

    gpa: Gpa
    write: bool
    slots: Memslots
    gfn: Gfn
    seq: int  # mmu_invalidate_seq before anything of the host was looked at
    fetch: bool = False
    goal_level: int = sptes.PG_LEVEL_4K


class TdpMmu(Mmu):
    """A VM's second-level tables, one set for each address space and depth."""

    def __init__(self, vm: Vm) -> None:
        """Start without tables."""
        super().__init__(vm)
        self._roots: dict[Role, Tdp] = {}

    def load(self, vcpu: Vcpu) -> None:
        """Point the processor at its root and at the slots' generation (kvm_mmu_load).

        Errors:
            ENOMEM  no memory for the root
        """
        tdp = self.tdp_of(vcpu)
        ctl = vcpu.cpu.ctl
        ctl.mmio_gen_mask = sptes.MMIO_GEN_MASK
        ctl.mmio_gen = self.mmio_generation(self.memslots(vcpu))
        if ctl.eptp != tdp.root.spt_addr:
            self._step(vcpu, 0, "load_mmu_pgd")
            ctl.flags |= lib.CPU_TDP
            ctl.ept_level = tdp.root.role.level
            ctl.eptp = tdp.root.spt_addr
            vcpu.cpu.flush_tlb()
            vcpu.stat.tlb_flush += 1

    def tdp_of(self, vcpu: Vcpu) -> Tdp:
        """Return the tables the vCPU runs on, making their root if need be."""
        level = 5 if vcpu.cpu.ctl.maxphyaddr > _FOUR_LEVEL_GPA_BITS else 4
        role = _role(level, bool(vcpu.as_id))
        tdp = self._roots.get(role)
        return tdp if tdp is not None else self._alloc_root(role, vcpu)

    def _alloc_root(self, role: Role, vcpu: Vcpu) -> Tdp:
        """mmu_alloc_direct_roots()."""
        cache = self.cache(vcpu)
        cache.topup()
        self._step(vcpu, 0, "mmu_topup_memory_caches")
        with self.lock:
            if role not in self._roots:
                self._step(vcpu, 0, "mmu_alloc_direct_roots")
                self._roots[role] = Tdp(self.pages, role, self.stat, cache)
            return self._roots[role]

    def tables(self, as_id: int) -> list[Tdp]:
        """Return the tables of an address space; one for each depth in use."""
        return [tdp for role, tdp in self._roots.items() if role.smm == bool(as_id)]

    # ---- page faults ----

    def page_fault(self, vcpu: Vcpu, addr: int, error: int, gla: int = 0) -> RetPf:
        """Handle an EPT violation: map the frame, or say that the access has to be emulated.

        addr: gpa; error: the exit's qualification; gla: the linear address, for tracing.

        Errors:
            EFAULT  the slot's host memory is not mapped, or not writable for a write (a MemoryFault)
            ENOMEM  no memory for a table; nothing has changed
        """
        del gla
        vcpu.stat.pf_taken += 1
        self.cache(vcpu).topup()
        self._step(vcpu, addr, "mmu_topup_memory_caches")
        slots = self._vm.memslots[vcpu.as_id]
        gfn = Gfn(addr >> 12)
        write, fetch = bool(error & lib.CPU_EPT_WRITE), bool(error & lib.CPU_EPT_FETCH)
        fault = PageFault(Gpa(addr), write, slots, gfn, self.invalidate_seq, fetch)
        tdp = self.tdp_of(vcpu)
        if trace.check_mmio_spte.enabled:
            self._trace_met(tdp, gfn, slots)
        slot = slots.gfn_to_memslot(gfn)
        if slot is None or (fault.write and slot.readonly):
            return self._handle_abnormal_pfn(vcpu, tdp, fault, slot)
        fault.goal_level = self.max_mapping_level(slot, gfn)
        self._step(vcpu, addr, "mapping_level")
        return self._fast_page_fault(vcpu, tdp, fault, slot) or self._direct_page_fault(
            vcpu, tdp, fault, slot
        )

    def _trace_met(self, tdp: Tdp, gfn: int, slots: Memslots) -> None:
        with self.lock:
            page = tdp.last_table(gfn)
            if page is not None:
                self._trace_check(page.view[sptes.index(gfn, sptes.PG_LEVEL_4K)], slots)

    def _handle_abnormal_pfn(self, vcpu: Vcpu, tdp: Tdp, fault: PageFault, slot: Memslot | None) -> RetPf:
        """There is nothing to map for this access: no slot, or a READONLY one that is written."""
        if slot is not None:
            # Written by the instruction as by any other, then handed out piece by piece.
            emulate_gfn(vcpu, fault.gfn)
            vcpu.stat.pf_emulate += 1
            return RetPf.EMULATE
        self._step(vcpu, fault.gpa, "handle_abnormal_pfn")
        if trace.handle_mmio_page_fault.enabled:
            trace.handle_mmio_page_fault(addr=fault.gpa, gfn=fault.gfn, access=ACC_ALL)
        gen = self.mmio_generation(fault.slots)
        with self.lock:
            if self.is_stale(fault.slots):
                return RetPf.RETRY
            self._limit_pages()
            # From now on the processor tells MMIO by itself.
            mmio = sptes.make_mmio_spte(fault.gfn, gen)
            flush = tdp.map(fault.gfn, sptes.PG_LEVEL_4K, mmio, self.cache(vcpu))
            if trace.mark_mmio_spte.enabled:
                sptep = tdp.last_table(fault.gfn).sptep(fault.gfn)  # type: ignore[union-attr]
                self._trace_mmio(address_of(sptep), fault.gfn, ACC_ALL, fault.slots)
            zapped = self.pages.take_zapped()
        self._finish(zapped, flush=flush)
        vcpu.stat.pf_mmio_spte_created += 1
        vcpu.stat.pf_emulate += 1
        return RetPf.EMULATE

    def _fast_page_fault(self, vcpu: Vcpu, tdp: Tdp, fault: PageFault, slot: Memslot) -> RetPf | None:
        """Give W back to an entry that lost it to dirty logging only, or see a stale fault."""
        self._step(vcpu, fault.gpa, "fast_page_fault")
        with self.lock:
            if self.is_stale(fault.slots):
                return RetPf.RETRY
            found = tdp.find(fault.gfn)
            if found is None:
                return None
            sptep, spte, level = found
            if fault.fetch and not spte & sptes.X:
                return None
            if not fault.write or spte & sptes.W:
                vcpu.stat.pf_spurious += 1
                return RetPf.SPURIOUS
            if level > sptes.PG_LEVEL_4K or not spte & sptes.MMU_WRITABLE:
                return None
            return self._fast_pf_fix_direct_spte(vcpu, sptep, spte, fault, slot)

    def _fast_pf_fix_direct_spte(
        self, vcpu: Vcpu, sptep: CData, spte: int, fault: PageFault, slot: Memslot
    ) -> RetPf:
        # The bit goes into the log before the guest can write: a reader of the log must not miss it.
        self.mark_page_dirty_in_slot(slot, fault.gfn, vcpu)
        fixed = bool(lib.spte_cmpxchg(sptep, spte, spte | sptes.W))
        if trace.fast_page_fault.enabled:
            self._trace_fast(vcpu, fault.gpa, PF_W, sptep, spte, fixed=fixed)
        if not fixed:
            return RetPf.RETRY
        vcpu.stat.pf_fast += 1
        return RetPf.FIXED

    def _direct_page_fault(self, vcpu: Vcpu, tdp: Tdp, fault: PageFault, slot: Memslot) -> RetPf:
        self._step(vcpu, fault.gpa, "kvm_faultin_pfn")
        try:
            host_writable = host_access(slot, fault.gpa, write=fault.write)
        except PoisonedPageError as poisoned:
            self._handle_error_pfn(vcpu, poisoned)
            raise
        except MemoryFault:
            self._step(vcpu, fault.gpa, "handle_abnormal_pfn")
            raise
        with self.lock:
            self._step(vcpu, fault.gpa, "is_page_fault_stale")
            if self.is_stale(fault.slots) or self._is_invalidated(fault, slot):
                return RetPf.RETRY
            self._limit_pages()
            self._step(vcpu, fault.gpa, "make_mmu_pages_available")
            flush = self._direct_map(vcpu, tdp, fault, slot, host_writable=host_writable)
            self._step(vcpu, fault.gpa, "direct_map")
            zapped = self.pages.take_zapped()
        self._finish(zapped, flush=flush)
        return RetPf.FIXED

    def _is_invalidated(self, fault: PageFault, slot: Memslot) -> bool:
        npages = sptes.pages_per(fault.goal_level)
        return self.is_invalidated(fault.seq, slot.hva(fault.gfn & ~(npages - 1)), npages << 12)

    def _direct_map(
        self, vcpu: Vcpu, tdp: Tdp, fault: PageFault, slot: Memslot, *, host_writable: bool
    ) -> bool:
        # While the slot logs, only a write may map a page writable: it is the write that is logged.
        writable = host_writable and (fault.write or not slot.logging)
        if writable and slot.logging:
            self.mark_page_dirty_in_slot(slot, fault.gfn, vcpu)
        level = self._disallowed_hugepage_adjust(tdp, fault)
        base = fault.gfn & ~(sptes.pages_per(level) - 1)
        spte = sptes.make_spte(slot.hva(base), level, writable=writable, host_writable=host_writable)
        if self.nx_huge_pages and level > sptes.PG_LEVEL_4K:
            spte = Spte(spte & ~sptes.X)
        if trace.kvm_mmu_spte_requested.enabled:
            trace.kvm_mmu_spte_requested(gfn=fault.gfn, pfn=slot.hva(fault.gfn) >> 12, level=level)
        vcpu.stat.pf_fixed += 1
        flush = tdp.map(fault.gfn, level, spte | sptes.ROM * slot.readonly, self.cache(vcpu))
        if self.nx_huge_pages and fault.fetch:
            tables = (tdp.table(fault.gfn, at) for at in range(level, fault.goal_level))
            self.account_nx_splits(page.spt_addr for page in tables if page is not None)
        return flush

    def _disallowed_hugepage_adjust(self, tdp: Tdp, fault: PageFault) -> int:
        """Return the level to map: a fetch gets a small page, and what was split for one stays so."""
        level = fault.goal_level
        if not self.nx_huge_pages:
            return level
        if fault.fetch:
            return sptes.PG_LEVEL_4K
        while level > sptes.PG_LEVEL_4K:
            below = tdp.table(fault.gfn, level - 1)
            if below is None or not self.is_nx_split(below.spt_addr):
                break
            level -= 1
        return level

    def _limit_pages(self) -> None:
        # As many as it takes (tdp_mmu.c), unless the client has set a limit.
        if self.n_max_mmu_pages:
            self._make_pages_available()

    def _zap_oldest(self, count: int) -> int:
        start = before = len(self.pages)
        while start - len(self.pages) < count:
            self._zap_oldest_tables(count - start + len(self.pages))
            if before == len(self.pages):
                break
            before = len(self.pages)
        return start - len(self.pages)

    def _zap_oldest_tables(self, count: int) -> None:
        """Zap up to `count` of those that have no tables below them: the older ones are mostly above."""
        start = len(self.pages)
        for page in self.pages.oldest():
            if start - len(self.pages) >= count:
                return
            if not page.root_count and not has_tables(page):
                # Which of the trees it is in makes no difference.
                next(iter(self._roots.values())).zap_page(page)

    # ---- slots ----

    def on_memslots_changed(
        self, old: Memslot | None, new: Memslot | None, change: Change, as_id: int
    ) -> None:
        """Make the published change true for the processors, before the ioctl returns."""
        with self.lock:
            for slot in (old, new):
                if slot is not None:
                    self._forget_mixed(slot)
            for tdp in self.tables(as_id):
                self._apply(tdp, old, new, change)
            if not self._vm.memslots[0].generation % (1 << self.mmio_gen_bits):
                for tdp in self._roots.values():
                    tdp.zap_mmio()
            zapped = self.pages.take_zapped()
        # Even with nothing zapped: processors hold the generation by which they tell MMIO entries.
        self.flush_remote_tlbs(reload=True)
        self._commit_zap(zapped)

    def _apply(self, tdp: Tdp, old: Memslot | None, new: Memslot | None, change: Change) -> None:
        if change in (Change.DELETE, Change.MOVE) and old is not None:
            tdp.zap_range(old.base_gfn, old.end_gfn)
        elif change is Change.FLAGS_ONLY and old is not None and new is not None:
            if new.logging and not self._vm.dirty_log_initially_set:
                tdp.write_protect_slot(new)
            elif old.logging and not new.logging:
                # Frames mapped one by one for the log may be mapped large again.
                tdp.zap_range(old.base_gfn, old.end_gfn)

    def unmap_gfn_range(self, as_id: int, first: int, end: int) -> None:
        """Drop the translations of frames whose host memory is going away (the MMU notifier)."""
        with self.lock:
            flush = False
            for tdp in self.tables(as_id):
                flush = tdp.zap_range(first, end) or flush
            zapped = self.pages.take_zapped()
        self._finish(zapped, flush=flush)

    def _write_protect(self, slot: Memslot, gfns: Iterable[int]) -> bool:
        gfns = list(gfns)
        flush = False
        for tdp in self.tables(slot.as_id):
            flush = tdp.write_protect(gfns) or flush
        return flush

    def _write_protect_bitmap(self, slot: Memslot, first: int, bitmap: bytes) -> bool:
        words = list(bitmap_words(bitmap, slot.base_gfn + first))
        flush = False
        for tdp in self.tables(slot.as_id):
            flush = tdp.write_protect_words(words) or flush
        return flush

    def destroy(self) -> None:
        """Free everything: the VM is going away and no vCPU runs."""
        with self.lock:
            for tdp in self._roots.values():
                tdp.destroy()
            self._roots.clear()
            self._commit_zap(self.pages.take_zapped())
            for cache in self._caches.values():
                cache.free()


_ROLES = {(level, smm): Role(level, smm=smm) for level in (4, 5) for smm in (False, True)}


def _role(level: int, smm: bool) -> Role:
    return _ROLES[level, smm]


def emulate_gfn(vcpu: Vcpu, gfn: int, gla: int = 0) -> None:
    """Have the instruction's writes to the frame come out as MMIO, besides those it met before."""
    ctl = vcpu.cpu.ctl
    # There is room: the most is a task switch with its descriptors, TSSs and stack.
    frame = ctl.emulate[ctl.emulate_count]
    frame.gfn, frame.gla = gfn, gla
    ctl.emulate_count += 1
