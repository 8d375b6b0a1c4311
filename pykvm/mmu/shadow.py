"""Shadow paging: gva to host pages, made from the guest's own tables.

The processor walks only our tables.  The flow and the names are those of KVM's mmu.c and paging_tmpl.h;
docs/mmu.md walks through a fault, a sync and a zap.  Roots are in roots.py, the pages and everything
that is recorded about them in shadow_pages.py.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from pykvm import trace
from pykvm.abi import Gfn, Gpa, lib, uapi
from pykvm.mmu import spte as sptes
from pykvm.mmu import walk
from pykvm.mmu.base import KVM_MAX_HUGEPAGE_LEVEL, MemoryFault, Mmu, PoisonedPageError, RetPf, host_access
from pykvm.mmu.direct import emulate_gfn
from pykvm.mmu.guest import GuestTables
from pykvm.mmu.pages import MmuPage, child_role
from pykvm.mmu.roots import Root, VcpuMmu, alloc_root, put_root
from pykvm.mmu.shadow_pages import ACC_GUEST_USER, ShadowPages
from pykvm.mmu.slots import Change, Memslot, Memslots
from pykvm.mmu.walk import ACC_ALL, ACC_EXEC, ACC_USER, ACC_WRITE, Access, Fault, GpteFormat, Paging, Walk

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pykvm.kvm.vcpu import Vcpu
    from pykvm.kvm.vm import Vm
    from pykvm.mmu.rmap import Rmap

PTE_PREFETCH_NUM = 8
PDPTE_RESERVED = 0x1E6


class ShadowMmu(Mmu):
    """A VM's shadow MMU."""

    def __init__(self, vm: Vm) -> None:
        """Start without pages."""
        super().__init__(vm)
        self.tables = ShadowPages(
            vm, self.pages, self.stat, self.flush_remote_tlbs, self._reload_roots, lambda: self.tlbs_dirty
        )
        self._vcpus: dict[int, VcpuMmu] = {}

    @property
    def rmap(self) -> Rmap:
        """The reverse map."""
        return self.tables.rmap

    # ---- entry: kvm_mmu_load ----

    def state(self, vcpu: Vcpu) -> VcpuMmu:
        """Return the vCPU's part."""
        state = self._vcpus.get(vcpu.id)
        if state is None:
            state = self._vcpus.setdefault(vcpu.id, VcpuMmu())
        return state

    def load(self, vcpu: Vcpu) -> None:
        """Make sure the processor has a current root: topup, alloc_roots, sync_roots, load, flush.

        Errors:
            ENOMEM  no memory for the root
            ENOSPC  no shadow page is left that could be given up for it
        """
        state, ctl = self.state(vcpu), vcpu.cpu.ctl
        ctl.mmio_gen_mask = sptes.MMIO_GEN_MASK
        ctl.mmio_gen = self.mmio_generation(self.memslots(vcpu))
        paging, smm = self.paging(vcpu), bool(vcpu.as_id)
        if state.root is not None and state.root.is_of(paging, smm):
            return
        cache = self.cache(vcpu)
        cache.topup()
        self._step(vcpu, paging.cr3, "mmu_topup_memory_caches")
        with self.lock:
            self._put_roots(state, obsolete_only=True)
            self._switch_root(state, paging, smm)
            if state.root is None:
                self._make_pages_available()
                self._step(vcpu, paging.cr3, "mmu_alloc_shadow_roots")
                self.tables.alloc_first_root()
                state.root = alloc_root(self.tables, paging, smm, cache)
            self._step(vcpu, paging.cr3, "kvm_mmu_sync_roots")
            self._sync_root(state.root)
            zapped = self.pages.take_zapped()
        self._finish(zapped, flush=False)
        self._step(vcpu, paging.cr3, "load_mmu_pgd")
        ctl.flags &= ~lib.CPU_TDP
        ctl.flags |= lib.CPU_EXIT_CR0_CR4 | lib.CPU_EXIT_CR3 | lib.CPU_EXIT_INVLPG
        ctl.eptp, ctl.ept_level = state.root.eptp, state.root.level
        vcpu.cpu.flush_tlb()
        vcpu.stat.tlb_flush += 1

    def load_pdptrs(self, vcpu: Vcpu) -> bool:
        """Latch PAE's four PDPTEs from guest memory; False when one has a reserved bit set (#GP).

        In shadow mode only the module can: the processor knows no guest-physical addresses.
        """
        guest = vcpu.cpu.guest
        if not guest.cr0 & uapi.X86_CR0_PG or not guest.cr4 & uapi.X86_CR4_PAE or guest.efer & uapi.EFER_LMA:
            return True
        tables = GuestTables(self._vm, vcpu.as_id)
        reserved = -(1 << int(vcpu.cpu.ctl.maxphyaddr)) | PDPTE_RESERVED
        pdptrs = [tables.read((guest.cr3 & 0xFFFF_FFE0) + 8 * i, 8) or 0 for i in range(4)]
        if any(pdpte & walk.PRESENT and pdpte & reserved for pdpte in pdptrs):
            return False
        guest.pdptr = pdptrs
        return True

    def loaded_roots(self) -> list[Root]:
        """Return the roots that vCPUs hold, for the auditor."""
        return [root for state in self._vcpus.values() for root in state.roots()]

    def paging(self, vcpu: Vcpu) -> Paging:
        """Return the vCPU's paging mode now."""
        ctl = vcpu.cpu.ctl
        gbpages = bool(ctl.cpuid[lib.CPU_CPUID_8000_0001_EDX] >> 26 & 1)
        return walk.paging_of(vcpu.cpu.guest, gbpages, int(ctl.maxphyaddr))

    def new_cr3(self, vcpu: Vcpu, *, noflush: bool = False) -> None:
        """Take the root from the last few if it is there (kvm_mmu_new_pgd), and sync it.

        noflush: what the guest changed in the tables of this PCID it does not want to see yet.
        """
        state = self.state(vcpu)
        with self._changing_root(vcpu, state):
            self._switch_root(state, self.paging(vcpu), bool(vcpu.as_id))
            if not noflush:
                vcpu.stat.tlb_flush += 1
                self._invalidate_pcid(vcpu, state, int(vcpu.cpu.guest.cr3) & uapi.X86_CR3_PCID_MASK)

    def paging_changed(self, vcpu: Vcpu) -> None:
        """CR0, CR4 or EFER changed what tables mean: another root, or one of the last few."""
        self.flush_tlb_guest(vcpu)

    def flush_tlb_guest(self, vcpu: Vcpu) -> None:
        """Sync every root (kvm_vcpu_flush_tlb_guest); the PDPTEs may be others, too."""
        state = self.state(vcpu)
        with self._changing_root(vcpu, state):
            self._switch_root(state, self.paging(vcpu), bool(vcpu.as_id))
            vcpu.stat.tlb_flush += 1
            for root in state.roots():
                self._sync_root(root)

    def invalidate_pcid(self, vcpu: Vcpu, pcid: int) -> None:
        """Sync the root if it is the PCID's, and forget its previous ones (kvm_invalidate_pcid)."""
        state = self.state(vcpu)
        with self._changing_root(vcpu, state):
            vcpu.stat.tlb_flush += 1
            self._invalidate_pcid(vcpu, state, pcid)

    def _invalidate_pcid(self, vcpu: Vcpu, state: VcpuMmu, pcid: int) -> None:
        if not vcpu.cpu.guest.cr4 & uapi.X86_CR4_PCIDE:
            # Whatever CR3 is written next, its root is synced.
            pcid = state.root.pcid if state.root else 0
        elif gone := [root for root in state.prev_roots if root.pcid == pcid]:
            state.prev_roots = [root for root in state.prev_roots if root not in gone]
            for root in gone:
                put_root(self.tables, root)
        if state.root is not None and state.root.pcid == pcid:
            self._sync_root(state.root)

    @contextlib.contextmanager
    def _changing_root(self, vcpu: Vcpu, state: VcpuMmu) -> Iterator[None]:
        """Under the lock; then have the processor use the root there is, or none yet."""
        old = state.root
        with self.lock:
            yield
            zapped = self.pages.take_zapped()
        self._finish(zapped, flush=False)
        if state.root is None:
            vcpu.loaded_memslots = None
        elif state.root is not old:
            ctl = vcpu.cpu.ctl
            ctl.eptp, ctl.ept_level = state.root.eptp, state.root.level

    def _switch_root(self, state: VcpuMmu, paging: Paging, smm: bool) -> None:
        """fast_pgd_switch(): keep the current root or take one of the last few; None: it has to be made."""
        old = state.root
        if old is not None and old.is_of(paging, smm):
            return
        state.root = state.take(paging, smm)
        if old is not None:
            for gone in state.push(old):
                put_root(self.tables, gone)

    def reset_context(self, vcpu: Vcpu) -> None:
        """The client set registers: forget the roots, and all pages (kvm_mmu_reset_context).

        Whoever sets registers has mostly written guest memory, too, and tables with it: no fault tells us.
        """
        with self.lock:
            self._put_roots(self.state(vcpu))
            if len(self.pages):
                self.tables.zap_all_fast()
            zapped = self.pages.take_zapped()
        vcpu.loaded_memslots = None
        if zapped:
            self.flush_remote_tlbs(reload=True)
            self._commit_zap(zapped)

    def _put_roots(self, state: VcpuMmu, *, obsolete_only: bool = False) -> None:
        """kvm_mmu_free_roots()."""
        gone = [root for root in state.roots() if root.obsolete or not obsolete_only]
        for root in gone:
            put_root(self.tables, root)
        if state.root in gone:
            state.root = None
        state.prev_roots = [root for root in state.prev_roots if root not in gone]

    def _sync_root(self, root: Root) -> None:
        """kvm_mmu_sync_roots()."""
        for page in root.pages:
            if page is not None and page.unsync_children:
                self.tables.sync_children(page)

    def _reload_roots(self) -> None:
        """A root has gone: have every vCPU load anew (KVM_REQ_MMU_FREE_OBSOLETE_ROOTS)."""
        for vcpu in tuple(self._vm.vcpus.values()):
            vcpu.loaded_memslots = None
            vcpu.cpu.request(lib.CPU_REQ_KICK)

    # ---- page faults ----

    def page_fault(self, vcpu: Vcpu, addr: int, error: int, gla: int = 0) -> RetPf | Fault:
        """Handle a fault of the shadow tables: map, emulate, or return what the guest must get.

        addr: linear address; error: error code of the #PF that the shadow tables gave.

        Errors:
            EFAULT  the slot's host memory is not there
            ENOMEM  no memory for a shadow page; nothing has changed
            ENOSPC  no shadow page is left that could be given up
        """
        gla, stat = addr, vcpu.stat
        stat.pf_taken += 1
        ac = bool(vcpu.cpu.guest.rflags & uapi.X86_EFLAGS_AC) and not error & lib.CPU_PF_IMPLICIT
        want = Access(bool(error & walk.PF_W), bool(error & walk.PF_U), bool(error & walk.PF_I), ac)
        seq = self.invalidate_seq
        root, slots = self.state(vcpu).root, self.memslots(vcpu)
        if root is None or root.obsolete:
            # Here and not at the next entry: the instruction may be one that is being completed.
            self.load(vcpu)
            return RetPf.RETRY
        if trace.check_mmio_spte.enabled:
            self._trace_met(root, gla, slots)
        guest = GuestTables(self._vm, vcpu.as_id, slots)
        found = self._walk(root.paging, gla, want, guest)
        if isinstance(found, Fault):
            stat.pf_guest += 1
            return found
        gpa = found.gfn << 12
        self.cache(vcpu).topup()
        self._step(vcpu, gpa, "mmu_topup_memory_caches")
        slot = slots.gfn_to_memslot(found.gfn)
        if slot is None or (want.write and slot.readonly):
            return self._handle_abnormal_pfn(vcpu, root, gla, found, guest, slot)
        if want.write:
            result = self._write_fault(vcpu, root, gla, want, found, slot)
            if result is not None:
                return result
        self._step(vcpu, gpa, "kvm_faultin_pfn")
        try:
            host_writable = host_access(slot, Gpa(gpa), write=want.write)
        except PoisonedPageError as poisoned:
            self._handle_error_pfn(vcpu, poisoned)
            raise
        except MemoryFault:
            self._step(vcpu, gpa, "handle_abnormal_pfn")
            raise
        with self.lock:
            self._step(vcpu, gpa, "is_page_fault_stale")
            # As much as may be mapped: the guest's page, if the host has one as large.
            npages = sptes.pages_per(min(found.level, KVM_MAX_HUGEPAGE_LEVEL))
            first = slot.hva(found.gfn & ~(npages - 1))
            if self._is_page_fault_stale(slots, root) or self.is_invalidated(seq, first, npages << 12):
                return RetPf.RETRY
            self._make_pages_available()
            self._step(vcpu, gpa, "make_mmu_pages_available")
            result, flush = self._fetch(vcpu, root, gla, want, found, slot, guest, host_writable)
            zapped = self.pages.take_zapped()
        self._finish(zapped, flush=flush)
        return self._count_result(vcpu, gla, found, result)

    def _walk(self, paging: Paging, gla: int, want: Access, guest: GuestTables) -> Walk | Fault:
        if paging.root_level == 0:
            return Walk(sptes.PG_LEVEL_1G, Gfn(gla >> 12), ACC_ALL, (), (), (), (), dirty=True)
        # Under the lock: A and D are not set in the middle of another vCPU's emulated write.
        with self.lock:
            return walk.walk_addr(paging, gla, want, guest)

    def _is_page_fault_stale(self, slots: Memslots, root: Root) -> bool:
        return self.is_stale(slots) or root.obsolete

    def _count_result(self, vcpu: Vcpu, gla: int, found: Walk, result: RetPf) -> RetPf:
        stat = vcpu.stat
        if result is RetPf.FIXED:
            stat.pf_fixed += 1
        elif result is RetPf.SPURIOUS:
            stat.pf_spurious += 1
        elif result is RetPf.WRITE_PROTECTED:
            emulate_gfn(vcpu, found.gfn, gla & ~0xFFF)
            stat.pf_emulate += 1
        return result

    def _write_fault(
        self, vcpu: Vcpu, root: Root, gla: int, want: Access, found: Walk, slot: Memslot
    ) -> RetPf | None:
        """See if a write to what is mapped already goes to a watched table, or is only not logged yet."""
        tables = self.tables
        smm = bool(vcpu.as_id)
        self._step(vcpu, found.gfn << 12, "fast_page_fault")
        with self.lock:
            page, index = self._lookup(root, gla)
            if page is None or not page.view[index] & sptes.R:
                return None
            if tables.is_write_tracked(found.gfn, smm=smm):
                # page_fault_handle_page_track(): it is mapped, and read-only for good.
                self._clear_flood(root, gla)
                return self._count_result(vcpu, gla, found, RetPf.WRITE_PROTECTED)
            return self._fast_page_fault(vcpu, page, index, gla, want, found, slot)

    def _lookup(self, root: Root, gla: int) -> tuple[MmuPage | None, int]:
        """Return the last table our walk of the address comes to, and the index in it."""
        page, index = root.page_for(gla), 0
        while page is not None:
            level = page.role.level
            index = sptes.index(gla >> 12, level)
            spte = page.view[index]
            if not spte & sptes.R or sptes.is_last(spte, level):
                break
            page = self.pages.child(spte)
        return page, index

    def _fast_page_fault(
        self, vcpu: Vcpu, page: MmuPage, index: int, gla: int, want: Access, found: Walk, slot: Memslot
    ) -> RetPf | None:
        """Give W back to an entry that lost it to dirty logging only."""
        spte = page.view[index]
        need = sptes.MMU_WRITABLE | (sptes.U if want.user else 0)
        if page.role.level > sptes.PG_LEVEL_4K or spte & need != need or spte & sptes.W:
            return None
        if spte & sptes.PFN_MASK != slot.hva(found.gfn):
            return None
        self.mark_page_dirty_in_slot(slot, found.gfn, vcpu)
        fixed = bool(lib.spte_cmpxchg(page.spt + index, spte, spte | sptes.W))
        if trace.fast_page_fault.enabled:
            error = walk.PF_W | walk.PF_U * want.user
            self._trace_fast(vcpu, gla, error, page.spt + index, spte, fixed=fixed)
        if not fixed:
            return RetPf.RETRY
        vcpu.stat.pf_fast += 1
        return RetPf.FIXED

    def _trace_met(self, root: Root, gla: int, slots: Memslots) -> None:
        with self.lock:
            page, index = self._lookup(root, gla)
            if page is not None and not root.obsolete:
                self._trace_check(page.view[index], slots)

    def _handle_abnormal_pfn(
        self, vcpu: Vcpu, root: Root, gla: int, found: Walk, guest: GuestTables, slot: Memslot | None
    ) -> RetPf:
        """No memory, or READONLY memory that is written: have the instruction done piece by piece."""
        self._step(vcpu, found.gfn << 12, "handle_abnormal_pfn")
        if trace.handle_mmio_page_fault.enabled:
            trace.handle_mmio_page_fault(addr=gla, gfn=found.gfn, access=found.access)
        with self.lock:
            if self.is_stale(guest.slots) or root.obsolete:
                return RetPf.RETRY
            self._make_pages_available()
            page = self._descend(vcpu, root, gla, found, found.access, guest, sptes.PG_LEVEL_4K)
            flush = page is not None and self._map_abnormal(vcpu, page, gla, found, guest.slots, slot)
            zapped = self.pages.take_zapped()
        self._finish(zapped, flush=flush)
        if page is None:
            return RetPf.RETRY
        emulate_gfn(vcpu, found.gfn, gla & ~0xFFF)
        vcpu.stat.pf_emulate += 1
        return RetPf.EMULATE

    def _map_abnormal(
        self, vcpu: Vcpu, page: MmuPage, gla: int, found: Walk, slots: Memslots, slot: Memslot | None
    ) -> bool:
        index = sptes.index(gla >> 12, page.role.level)
        access = found.access if found.dirty else found.access & ~ACC_WRITE
        if slot is not None:
            host_writable = host_access(slot, Gpa(found.gfn << 12), write=False)
            return self.tables.set_spte(
                page, index, found.gfn, access, slot, host_writable=host_writable, writable=False
            )[2]
        self.tables.set_mmio_spte(page, index, found.gfn, access, self.mmio_generation(slots))
        self._trace_mmio(page.spt_addr + 8 * index, found.gfn, access, slots)
        vcpu.stat.pf_mmio_spte_created += 1
        return False

    def _fetch(
        self,
        vcpu: Vcpu,
        root: Root,
        gla: int,
        want: Access,
        found: Walk,
        slot: Memslot,
        guest: GuestTables,
        host_writable: bool,
    ) -> tuple[RetPf, bool]:
        """FNAME(fetch): link the missing pages and set the leaf. Returns (result, flush)."""
        access = found.access if found.dirty else found.access & ~ACC_WRITE  # the first write has to set D
        mode = root.paging.mode
        if want.write and not access & ACC_WRITE and not mode.wp and not want.user:
            # CR0.WP=0: give the supervisor the page, and take it from the user who could not write it.
            if access & ACC_USER:
                access = access & ~ACC_USER | ACC_GUEST_USER
            access |= ACC_WRITE
            if mode.smep and access & ACC_GUEST_USER:
                access &= ~ACC_EXEC
        goal = self._mapping_level(slot, found)
        self._step(vcpu, found.gfn << 12, "mapping_level")
        allowed = self._disallowed_hugepage_adjust(root, gla, want, goal)
        page = self._descend(vcpu, root, gla, found, access, guest, allowed)
        if page is None:
            return RetPf.RETRY, False
        level = page.role.level
        if self.nx_huge_pages and level > sptes.PG_LEVEL_4K:
            access &= ~ACC_EXEC
        if self.nx_huge_pages and want.fetch and goal > level:
            self.account_nx_splits(t.spt_addr for t in self._tables_of(root, gla) if t.role.level < goal)
        index = sptes.index(gla >> 12, level)
        gfn = Gfn(found.gfn & ~(sptes.pages_per(level) - 1))
        if trace.kvm_mmu_spte_requested.enabled:
            trace.kvm_mmu_spte_requested(gfn=found.gfn, pfn=slot.hva(found.gfn) >> 12, level=level)
        # While the slot logs, only a write may map a page writable: it is the write that is logged.
        writable = want.write or not slot.logging
        protected, changed, flush = self.tables.set_spte(
            page, index, gfn, access, slot, host_writable=host_writable, writable=writable
        )
        if slot.logging and page.view[index] & sptes.W:
            self.mark_page_dirty_in_slot(slot, found.gfn, vcpu)
        if protected and want.write:
            return RetPf.WRITE_PROTECTED, flush
        self._step(vcpu, found.gfn << 12, "fetch")
        if not changed:
            return RetPf.SPURIOUS, flush
        if level == sptes.PG_LEVEL_4K and not self._invalidating:
            self._step(vcpu, found.gfn << 12, "pte_prefetch")
            flush = self._pte_prefetch(page, index, guest) or flush
        return RetPf.FIXED, flush

    def _descend(
        self, vcpu: Vcpu, root: Root, gla: int, found: Walk, access: int, guest: GuestTables, goal: int
    ) -> MmuPage | None:
        """Return the table of level `goal` for the address, made and linked; None: start anew.

        Each entry the walk went by is looked at again once its table is write-protected.
        access: the rights of the leaf, which a page that splits a guest's large page inherits.
        """
        page = root.page_for(gla)
        if page is None:
            return None
        size = root.paging.mode.format.entry_bytes
        if found.tables and guest.gpte_changed(found, page.role.level, size):
            return None
        page.write_flooding_count = 0
        level = page.role.level
        cache = self.cache(vcpu)
        while level > goal:
            index = sptes.index(gla >> 12, level)
            level -= 1
            direct = level < found.level or not found.tables
            if direct:
                gfn = Gfn(found.gfn & ~(sptes.pages_per(level + 1) - 1))
                role = child_role(page.role, level, True, access, index)
            else:
                at = found.at(level)
                gfn = found.tables[at]
                role = child_role(page.role, level, False, found.accesses[at], index)
            child = self._existing_child(page, index, gfn, role)
            if child is None:
                if self.tables.drop_spte(page, index):
                    # A large page, or what the guest's entry was before (drop_large_spte).
                    self.flush_remote_tlbs()
                child = self.tables.get_page(gfn, role, cache)
                # Needed before it is linked: a guest need not flush for an entry that was not present.
                self.tables.sync_children(child)
                if not direct and guest.gpte_changed(found, level, size):
                    return None
                self.tables.link(page, index, child)
            elif not direct and guest.gpte_changed(found, level, size):
                return None
            child.write_flooding_count = 0
            page = child
        return page

    def _existing_child(self, page: MmuPage, index: int, gfn: int, role: object) -> MmuPage | None:
        spte = page.view[index]
        if not spte & sptes.R or spte & sptes.PS:
            return None
        child = self.pages.child(spte)
        return child if child.gfn == gfn and child.role == role else None

    def _disallowed_hugepage_adjust(self, root: Root, gla: int, want: Access, goal: int) -> int:
        """Return the level to map: a fetch gets a small page, and what was split for one stays so."""
        if not self.nx_huge_pages or goal == sptes.PG_LEVEL_4K:
            return goal
        if want.fetch:
            return sptes.PG_LEVEL_4K
        split = [t.role.level for t in self._tables_of(root, gla) if self.is_nx_split(t.spt_addr)]
        return min([goal, *split])

    def _tables_of(self, root: Root, gla: int) -> Iterator[MmuPage]:
        """Yield our tables on the way to an address, from the top."""
        page = root.page_for(gla)
        while page is not None:
            yield page
            spte = page.view[sptes.index(gla >> 12, page.role.level)]
            if not spte & sptes.R or sptes.is_last(spte, page.role.level):
                return
            page = self.pages.child(spte)

    def _mapping_level(self, slot: Memslot, found: Walk) -> int:
        """kvm_mmu_hugepage_adjust(): as large as the guest's page, the host's, and what lies in it allow."""
        return self.max_mapping_level(slot, found.gfn, min(found.level, KVM_MAX_HUGEPAGE_LEVEL))

    # ---- prefetch ----

    def _pte_prefetch(self, page: MmuPage, index: int, guest: GuestTables) -> bool:
        """Map the neighbours in the aligned window of eight, if that costs nothing. True: flush."""
        first = index & ~(PTE_PREFETCH_NUM - 1)
        form, flush = page.role.format, False
        for i in range(first, first + PTE_PREFETCH_NUM):
            if page.view[i]:
                continue
            if form is None:
                flush = self._prefetch_gfn(page, i, page.get_gfn(i), page.role.access, guest) or flush
            else:
                flush = self._prefetch_gpte(page, i, form, guest) or flush
        return flush

    def _prefetch_gpte(self, page: MmuPage, index: int, form: GpteFormat, guest: GuestTables) -> bool:
        """FNAME(prefetch_gpte): only what the guest has used already, so that no A or D has to be set."""
        gpte = guest.gpte(page, index)
        if gpte is None or not gpte & walk.PRESENT or not gpte & walk.ACCESSED or form.reserved(gpte, 1):
            return False
        access = page.role.access & form.leaf_access(gpte)
        return self._prefetch_gfn(page, index, form.frame(gpte, 1, 0), access, guest)

    def _prefetch_gfn(self, page: MmuPage, index: int, gfn: int, access: int, guest: GuestTables) -> bool:
        slot = guest.slots.gfn_to_memslot(gfn)
        if slot is None or (slot.logging and access & ACC_WRITE) or not lib.host_resident(slot.hva(gfn)):
            return False
        if (slot.as_id, gfn >> sptes.PT64_LEVEL_BITS) in self._mixed:
            return False
        return self.tables.set_spte(
            page, index, gfn, access, slot, host_writable=not slot.readonly, writable=True, prefetch=True
        )[2]

    def _zap_oldest(self, count: int) -> int:
        return self.tables.zap_oldest(count)

    # ---- the guest's invalidations and writes ----

    def invlpg(self, vcpu: Vcpu, gla: int) -> None:
        """FNAME(invlpg): drop the address's entry in an unsync table and try to map it anew."""
        vcpu.stat.invlpg += 1
        state = self.state(vcpu)
        if state.root is None:
            return
        guest = GuestTables(self._vm, vcpu.as_id)
        with self.lock:
            # A global translation is every PCID's, and this may be one.
            for root in state.roots():
                self._invlpg(root, gla, guest)

    def invpcid_gva(self, vcpu: Vcpu, gla: int, pcid: int) -> None:
        """Do the same for the roots of a PCID (kvm_mmu_invpcid_gva)."""
        vcpu.stat.invlpg += 1
        guest = GuestTables(self._vm, vcpu.as_id)
        with self.lock:
            for root in self.state(vcpu).roots():
                if root.pcid == pcid:
                    self._invlpg(root, gla, guest)

    def _invlpg(self, root: Root, gla: int, guest: GuestTables) -> None:
        page, index = self._lookup(root, gla)
        if page is None or not page.unsync or page.role.format is None:
            return
        # This processor has flushed the address; for others a stale entry is as good as in a TLB.
        if self.tables.drop_spte(page, index):
            self.tlbs_dirty = True
        if self._prefetch_gpte(page, index, page.role.format, guest):
            self.flush_remote_tlbs()

    def emulated_write(self, vcpu: Vcpu, gpa: int, data: bytes) -> bool:
        """Write a guest page table for the guest, and bring its shadows up to date (emulator_write_phys)."""
        with self.lock:
            if not self._vm.write_guest(gpa, data, vcpu.as_id):
                return False
            flush = self.tables.track_write(gpa, data, smm=bool(vcpu.as_id))
            zapped = self.pages.take_zapped()
            self._finish(zapped, flush=flush)
        return True

    def unprotect_gfn(self, gfn: int, as_id: int) -> bool:
        """Give up shadowing a frame so that an instruction can be retried."""
        with self.lock:
            found = self.tables.unprotect_gfn(gfn, smm=bool(as_id))
            zapped = self.pages.take_zapped()
        self._finish(zapped, flush=False)
        return found

    def _clear_flood(self, root: Root, gla: int) -> None:
        """shadow_page_table_clear_flood(): the tables on the way are in use, they are tables still."""
        page = root.page_for(gla)
        while page is not None:
            page.write_flooding_count = 0
            spte = page.view[sptes.index(gla >> 12, page.role.level)]
            if not spte & sptes.R or sptes.is_last(spte, page.role.level):
                return
            page = self.pages.child(spte)

    # ---- slots, dirty logging, the host ----

    def on_memslots_changed(
        self, old: Memslot | None, new: Memslot | None, change: Change, as_id: int
    ) -> None:
        """Make the published change true for the processors, before the ioctl returns."""
        with self.lock:
            for slot in (old, new):
                if slot is not None:
                    self._forget_mixed(slot)
            wrapped = not self._vm.memslots[0].generation % (1 << self.mmio_gen_bits)
            if change in (Change.DELETE, Change.MOVE) or wrapped:
                # As KVM does: a frame may be a guest's table, and its shadow would outlive it.
                self.tables.zap_all_fast()
            elif change is Change.FLAGS_ONLY and old is not None and new is not None:
                self._apply_flags(old, new, as_id)
            if new is not None and change is not Change.FLAGS_ONLY:
                self.tables.add_slot(new)
            self._update_limit()
            zapped = self.pages.take_zapped()
        self.flush_remote_tlbs(reload=True)
        self._commit_zap(zapped)

    def _apply_flags(self, old: Memslot, new: Memslot, as_id: int) -> None:
        if new.logging and not self._vm.dirty_log_initially_set:
            self.tables.write_protect_slot(new)
        elif old.logging and not new.logging:
            # Frames mapped one by one for the log may be mapped large again.
            self.tables.unmap(as_id, old.base_gfn, old.end_gfn)

    def unmap_gfn_range(self, as_id: int, first: int, end: int) -> None:
        """Drop the translations of frames whose host memory is going away (the MMU notifier)."""
        with self.lock:
            flush = self.tables.unmap(as_id, first, end)
            self.tables.unshadow_range(as_id, first, end)
            zapped = self.pages.take_zapped()
        self._finish(zapped, flush=flush or self.tlbs_dirty)

    def _write_protect(self, slot: Memslot, gfns: Iterable[int]) -> bool:
        return self.tables.write_protect_log(slot.as_id, gfns)

    def destroy(self) -> None:
        """Free everything: the VM is going away and no vCPU runs."""
        with self.lock:
            for state in self._vcpus.values():
                self._put_roots(state)
            self._vcpus.clear()
            self.tables.zap_all_fast()
            self._commit_zap(self.pages.take_zapped())
            for cache in self._caches.values():
                cache.free()
