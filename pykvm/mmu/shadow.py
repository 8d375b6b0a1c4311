"""Shadow paging: gva to host pages, made from the guest's own tables.

The processor walks only our tables.  A guest table that is shadowed is write-protected, or, for
tables of the last level, allowed to go `unsync` until the guest invalidates.  The flow and the
names are those of KVM's mmu.c and paging_tmpl.h; see docs/mmu.md for the walk-throughs.

Everything here but `ShadowMmu`'s public methods runs under mmu_lock.
"""

from __future__ import annotations

import dataclasses
from errno import ENOMEM
from typing import TYPE_CHECKING

from pykvm.abi import Gfn, Gpa, Spte, ffi, lib, uapi
from pykvm.abi.errors import KvmError
from pykvm.mmu import spte as sptes
from pykvm.mmu import walk
from pykvm.mmu.base import Mmu, RetPf, host_access, max_mapping_level
from pykvm.mmu.guest import GuestTables
from pykvm.mmu.pages import MmuPage, PageTable, Role, commit_zap
from pykvm.mmu.rmap import Rmap
from pykvm.mmu.slots import Change, Memslot, Memslots
from pykvm.mmu.walk import ACC_ALL, ACC_EXEC, ACC_USER, ACC_WRITE, Access, Fault, Paging, Walk

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pykvm.kvm.vcpu import Vcpu
    from pykvm.kvm.vm import Vm

NUM_PREV_ROOTS = 3
KVM_MIN_ALLOC_MMU_PAGES = 64
KVM_REFILL_PAGES = 25
WRITE_FLOOD_LIMIT = 3
PTE_PREFETCH_NUM = 8
PAE_ROOT_LEVEL = 3
PDPTE_RESERVED = 0x1E6


@dataclasses.dataclass(slots=True, eq=False)
class Root:
    """What a vCPU's CR3 stands for: one page of the top level, or PAE's four of level 2."""

    paging: Paging
    smm: bool
    eptp: int
    level: int
    pages: tuple[MmuPage | None, ...]
    pae_root: object = None  # the 4-entry table itself, kept alive

    def page_for(self, gla: int) -> MmuPage | None:
        """Return the shadow page the walk of an address starts at."""
        return self.pages[gla >> 30 & 3] if self.level == PAE_ROOT_LEVEL else self.pages[0]

    @property
    def obsolete(self) -> bool:
        """Whether a page of it has been zapped while it was loaded."""
        return any(page is not None and page.invalid for page in self.pages)


@dataclasses.dataclass(slots=True)
class VcpuMmu:
    """One vCPU's part: its root and the last few it had (struct kvm_mmu)."""

    root: Root | None = None
    prev_roots: list[Root] = dataclasses.field(default_factory=list)


class ShadowMmu(Mmu):
    """A VM's shadow MMU."""

    def __init__(self, vm: Vm) -> None:
        """Start without pages."""
        super().__init__(vm)
        self.pages = PageTable()
        self.rmap = Rmap()
        # How many shadow pages of level > 1 stand for a frame: it stays write-protected then.
        self._write_track: dict[tuple[bool, int], int] = {}
        # How many shadow pages of any level stand for frames inside a 2 MiB range.
        self._disallow_lpage: dict[tuple[bool, int], int] = {}
        self._vcpus: dict[int, VcpuMmu] = {}
        self.n_max_mmu_pages = 0

    # ---- entry: kvm_mmu_load ----

    def state(self, vcpu: Vcpu) -> VcpuMmu:
        """Return the vCPU's part."""
        return self._vcpus.setdefault(vcpu.id, VcpuMmu())

    def load(self, vcpu: Vcpu) -> None:
        """Make sure the processor has a current root: alloc_roots, sync_roots, load, flush."""
        state = self.state(vcpu)
        ctl = vcpu.cpu.ctl
        ctl.mmio_gen_mask = sptes.MMIO_GEN_MASK
        ctl.mmio_gen = sptes.mmio_generation(self.memslots(vcpu).generation)
        if state.root is not None and not state.root.obsolete:
            return
        with self.lock:
            if state.root is not None:
                self._put_root(state.root)
            state.root = self._alloc_root(vcpu, self.paging(vcpu))
            self._sync_root(state.root)
            zapped = self.pages.take_zapped()
        self._finish(zapped, flush=bool(zapped))
        ctl.flags &= ~lib.CPU_TDP
        ctl.flags |= lib.CPU_EXIT_CR0_CR4 | lib.CPU_EXIT_CR3 | lib.CPU_EXIT_INVLPG
        ctl.eptp, ctl.ept_level = state.root.eptp, state.root.level
        vcpu.cpu.flush_tlb()

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

    def new_cr3(self, vcpu: Vcpu) -> None:
        """The guest wrote CR3: take the root from the last few if it is there, and sync it."""
        state = self.state(vcpu)
        paging = self.paging(vcpu)
        smm = bool(vcpu.as_id)
        with self.lock:
            old = state.root
            found = next(
                (r for r in state.prev_roots if r.paging == paging and r.smm == smm and not r.obsolete), None
            )
            if old is not None and (old.paging, old.smm) == (paging, smm) and not old.obsolete:
                self._sync_root(old)
            else:
                if found is not None:
                    state.prev_roots.remove(found)
                    self._sync_root(found)
                if old is not None:
                    state.prev_roots.insert(0, old)
                for gone in state.prev_roots[NUM_PREV_ROOTS:]:
                    self._put_root(gone)
                del state.prev_roots[NUM_PREV_ROOTS:]
                state.root = found
            zapped = self.pages.take_zapped()
        self._finish(zapped, flush=True)
        if state.root is not None:
            vcpu.cpu.ctl.eptp, vcpu.cpu.ctl.ept_level = state.root.eptp, state.root.level
        else:
            vcpu.loaded_memslots = None
        vcpu.cpu.flush_tlb()

    def reset_context(self, vcpu: Vcpu) -> None:
        """CR0, CR4 or EFER changed what tables mean: forget all roots (kvm_mmu_reset_context)."""
        state = self.state(vcpu)
        with self.lock:
            for root in (*state.prev_roots, *((state.root,) if state.root else ())):
                self._put_root(root)
            state.root, state.prev_roots = None, []
            zapped = self.pages.take_zapped()
        vcpu.loaded_memslots = None
        self._finish(zapped, flush=bool(zapped))

    def paging(self, vcpu: Vcpu) -> Paging:
        """Return the vCPU's paging mode now."""
        gbpages = bool(vcpu.cpu.ctl.cpuid[lib.CPU_CPUID_8000_0001_EDX] >> 26 & 1)
        return walk.paging_of(vcpu.cpu.guest, gbpages, int(vcpu.cpu.ctl.maxphyaddr))

    def _role(self, paging: Paging, *, smm: bool) -> Role:
        return Role(
            0,
            direct=paging.root_level == 0,
            smm=smm,
            has_4_byte_gpte=paging.root_level == 2,
            efer_nx=paging.nx,
            cr0_wp=paging.wp,
            smep_andnot_wp=paging.smep and not paging.wp,
            smap_andnot_wp=paging.smap and not paging.wp,
        )

    def _alloc_root(self, vcpu: Vcpu, paging: Paging) -> Root:
        """mmu_alloc_shadow_roots(): a page for CR3's frame, or PAE's four for 3 and 2 levels and none."""
        smm = bool(vcpu.as_id)
        role = self._role(paging, smm=smm)
        if paging.root_level >= 4:
            gfn = Gfn((paging.cr3 & walk.FRAME) >> 12)
            page = self._get_page(gfn, dataclasses.replace(role, level=paging.root_level))
            page.root_count += 1
            return Root(paging, smm, page.spt_addr, paging.root_level, (page,))
        pages: list[MmuPage | None] = []
        table = lib.spt_alloc()
        if not table:
            raise KvmError(ENOMEM, "no memory for a PAE root")
        pae_root = ffi.gc(table, lib.spt_free)
        for i in range(4):
            page_or_none = self._pae_root_page(role, paging, i)
            pages.append(page_or_none)
            if page_or_none is not None:
                page_or_none.root_count += 1
                lib.spte_write(pae_root + i, sptes.make_nonleaf_spte(page_or_none.spt_addr))
        address = int(ffi.cast("uintptr_t", pae_root))
        return Root(paging, smm, address, PAE_ROOT_LEVEL, tuple(pages), pae_root)

    def _pae_root_page(self, role: Role, paging: Paging, i: int) -> MmuPage | None:
        role = dataclasses.replace(role, level=sptes.PG_LEVEL_2M)
        if paging.root_level == 0:
            return self._get_page(Gfn(i << 18), role)
        if paging.root_level == 2:
            gfn = Gfn((paging.cr3 & 0xFFFF_F000) >> 12)
            return self._get_page(gfn, dataclasses.replace(role, quadrant=i))
        pdpte = paging.pdptrs[i]
        return self._get_page(paging.table(pdpte), role) if pdpte & walk.PRESENT else None

    def _put_root(self, root: Root) -> None:
        for page in root.pages:
            if page is None:
                continue
            page.root_count -= 1
            if page.invalid and not page.root_count:
                self.pages.retire(page)

    # ---- page faults ----

    def page_fault(self, vcpu: Vcpu, addr: int, error: int, gla: int = 0) -> RetPf | Fault:
        """Handle a fault of the shadow tables: map, emulate, or return what the guest must get.

        addr: linear address; error: error code of the #PF that the shadow tables gave.

        Errors:
            EFAULT  the slot's host memory is not there
        """
        gla = addr
        self.stat.pf_taken += 1
        want = Access(
            bool(error & walk.PF_W),
            bool(error & walk.PF_U),
            bool(error & walk.PF_I),
            bool(vcpu.cpu.guest.rflags & uapi.X86_EFLAGS_AC),
        )
        root = self.state(vcpu).root
        if root is None:
            return RetPf.RETRY
        slots = self.memslots(vcpu)
        paging = root.paging
        guest = GuestTables(self._vm, vcpu.as_id)
        found = self._walk(paging, gla, want, guest)
        if isinstance(found, Fault):
            self.stat.pf_guest += 1
            return found
        slot = slots.gfn_to_memslot(found.gfn)
        with self.lock:
            if want.write and self._is_write_tracked(found.gfn, smm=bool(vcpu.as_id)):
                self._clear_flood(root, gla)
        if slot is None:
            return self._emulate(vcpu, root, gla, found, slots, slot)
        host_writable = host_access(slot, Gpa(found.gfn << 12), write=want.write and not slot.readonly)
        with self.lock:
            if self.is_stale(slots) or root.obsolete:
                return RetPf.RETRY
            self._make_pages_available()
            result, flush = self._fetch(root, gla, want, found, slot, guest, host_writable)
            zapped = self.pages.take_zapped()
        self._finish(zapped, flush=flush or bool(zapped))
        if result is RetPf.EMULATE or (want.write and slot.readonly and result is RetPf.FIXED):
            return self._emulate(vcpu, root, gla, found, slots, slot)
        self.stat.pf_fixed += 1
        return result

    def _walk(self, paging: Paging, gla: int, want: Access, guest: GuestTables) -> Walk | Fault:
        if paging.root_level == 0:
            return Walk(3, Gfn(gla >> 12), ACC_ALL, (), (), (), dirty=True, global_=False)
        return walk.walk_addr(paging, gla, want, guest.read, guest.set_bits)

    def _emulate(
        self, vcpu: Vcpu, root: Root, gla: int, found: Walk, slots: Memslots, slot: Memslot | None
    ) -> RetPf:
        """Have the one instruction done piece by piece: no memory, or memory that we watch."""
        if slot is None:
            with self.lock:
                if self.is_stale(slots) or root.obsolete:
                    return RetPf.RETRY
                self._make_pages_available()
                self._mark_mmio(root, gla, found, slots.generation, GuestTables(self._vm, vcpu.as_id))
                zapped = self.pages.take_zapped()
            self._finish(zapped, flush=bool(zapped))
        vcpu.cpu.ctl.emulate_gla = gla & ~0xFFF
        vcpu.cpu.ctl.emulate_gfn = found.gfn
        self.stat.pf_emulate += 1
        return RetPf.EMULATE

    def _mark_mmio(self, root: Root, gla: int, found: Walk, generation: int, guest: GuestTables) -> None:
        page = self._descend(root, gla, found, guest, sptes.PG_LEVEL_4K)
        if page is None:
            return
        index = sptes.index(gla >> 12, page.role.level)
        self._drop_spte(page, index)
        mmio = sptes.make_mmio_spte(found.gfn, generation)
        mmio = Spte(mmio | lib.SPTE_MMIO_U * bool(found.access & ACC_USER))
        if found.access & ACC_WRITE and found.dirty:
            mmio = Spte(mmio | lib.SPTE_MMIO_W)
        lib.spte_xchg(page.spt + index, mmio)
        if page.gfns is not None:
            page.gfns[index], page.accesses[index] = found.gfn, found.access
        self.stat.pf_mmio_spte_created += 1

    def _fetch(
        self,
        root: Root,
        gla: int,
        want: Access,
        found: Walk,
        slot: Memslot,
        guest: GuestTables,
        host_writable: bool,
    ) -> tuple[RetPf, bool]:
        """FNAME(fetch): link the missing pages and set the leaf. Returns (result, flush)."""
        access = found.access
        if not found.dirty:
            access &= ~ACC_WRITE  # the first write has to set D: protect_clean_gpte()
        paging = root.paging
        if want.write and not access & ACC_WRITE and not paging.wp and not want.user:
            # CR0.WP=0: give the supervisor the page, and take it from the user who could not write it.
            access = (access | ACC_WRITE) & ~ACC_USER
            if paging.smep:
                access &= ~ACC_EXEC
        goal = min(found.level, self._mapping_level(slot, found.gfn, host_writable=host_writable))
        page = self._descend(root, gla, dataclasses.replace(found, access=access), guest, goal)
        if page is None:
            return RetPf.RETRY, False
        index = sptes.index(gla >> 12, page.role.level)
        base = Gfn(found.gfn & ~(sptes.pages_per(page.role.level) - 1))
        result, flush = self._set_spte(
            page, index, access, base, slot, host_writable=host_writable, write=want.write, prefetch=False
        )
        if page.role.level == sptes.PG_LEVEL_4K and page.gfns is not None and result is RetPf.FIXED:
            self._prefetch(page, index, paging, guest)
        return result, flush

    def _descend(self, root: Root, gla: int, found: Walk, guest: GuestTables, goal: int) -> MmuPage | None:
        """Return the table of level `goal` for the address, made and linked; None: start anew."""
        page = root.page_for(gla)
        if page is None:
            return None
        top = found.level + len(found.tables) - 1
        while page.role.level > goal:
            level = page.role.level - 1
            if level >= found.level and found.tables:
                at = top - level
                gfn, access, direct = found.tables[at], found.accesses[at], False
            else:
                gfn = Gfn(found.gfn & ~(sptes.pages_per(level + 1) - 1))
                access, direct = found.access, True
            if not direct and not guest.unchanged(root.paging, gla, found, level + 1):
                return None
            page = self._child(page, gla, gfn, access, direct=direct)
        return page

    def _child(self, page: MmuPage, gla: int, gfn: Gfn, access: int, *, direct: bool) -> MmuPage:
        index = sptes.index(gla >> 12, page.role.level)
        spte = sptes.read(page.spt + index)
        level = page.role.level - 1
        four = page.role.has_4_byte_gpte and not direct
        role = dataclasses.replace(
            page.role,
            level=level,
            direct=direct,
            access=access,
            has_4_byte_gpte=four,
            quadrant=index & 1 if four and level == sptes.PG_LEVEL_4K else 0,
        )
        if sptes.is_shadow_present(spte) and not sptes.is_last(spte, page.role.level):
            child = self.pages.child(spte)
            if child.gfn == gfn and child.role == role:
                return child
        self._drop_spte(page, index)
        child = self._get_page(gfn, role)
        if child.unsync_children:
            self._sync_children(child)
        lib.spte_xchg(page.spt + index, sptes.make_nonleaf_spte(child.spt_addr))
        child.parents.add((page, index))
        if child.unsync or child.unsync_children:
            self._mark_unsync(page, index)
        return child

    # ---- leaves ----

    def _mapping_level(self, slot: Memslot, gfn: Gfn, *, host_writable: bool) -> int:
        if self._disallow_lpage.get((bool(slot.as_id), gfn >> 9)):
            return sptes.PG_LEVEL_4K
        return max_mapping_level(slot, gfn, host_writable=host_writable)

    def _set_spte(
        self,
        page: MmuPage,
        index: int,
        access: int,
        gfn: Gfn,
        slot: Memslot,
        *,
        host_writable: bool,
        write: bool,
        prefetch: bool,
    ) -> tuple[RetPf, bool]:
        """mmu_set_spte() and make_spte(): install one leaf. Returns (result, flush)."""
        level = page.role.level
        writable = bool(access & ACC_WRITE) and host_writable and (write or not slot.logging)
        protected = False
        if writable and self._try_to_unsync(gfn, smm=page.role.smm, can_unsync=not prefetch):
            writable, protected = False, True
        spte = int(sptes.make_spte(slot.hva(gfn), level, writable=writable, host_writable=host_writable))
        if protected or not access & ACC_WRITE:
            spte &= ~sptes.MMU_WRITABLE
        spte &= ~(sptes.X * (not access & ACC_EXEC) | sptes.U * (not access & ACC_USER))
        if writable:
            slot.mark_page_dirty(gfn)
        old = sptes.read(page.spt + index)
        flush = False
        if sptes.is_shadow_present(old) and (not sptes.is_last(old, level) or (old ^ spte) & sptes.PFN_MASK):
            self._drop_spte(page, index)
            old, flush = 0, True
        lib.spte_xchg(page.spt + index, spte)
        if not sptes.is_shadow_present(old):
            self.rmap.add(slot.as_id, level, gfn, page, index)
            self.stat.count_page(level, 1)
        flush = flush or bool(old & (sptes.W | sptes.X | sptes.U) & ~spte)
        page.set_shadowed(index, gfn, access)
        return (RetPf.EMULATE if protected and write else RetPf.FIXED), flush

    def _prefetch(self, page: MmuPage, index: int, paging: Paging, guest: GuestTables) -> None:
        """pte_prefetch(): map the present, accessed neighbours in the aligned window of eight."""
        first = index & ~(PTE_PREFETCH_NUM - 1)
        for i in range(first, first + PTE_PREFETCH_NUM):
            if i != index and not sptes.read(page.spt + i):
                self._prefetch_gpte(page, i, paging, guest)

    def _prefetch_gpte(self, page: MmuPage, index: int, paging: Paging, guest: GuestTables) -> None:
        entry = guest.gpte(page, index)
        if (
            entry is None
            or not entry & walk.PRESENT
            or not entry & walk.ACCESSED
            or paging.reserved(entry, 1)
        ):
            return
        access = page.role.access & paging.access(entry)
        if not entry & walk.DIRTY:
            access &= ~ACC_WRITE
        gfn = paging.frame(entry, 1, 0)
        slot = self._vm.memslots[int(page.role.smm)].gfn_to_memslot(gfn)
        if slot is None or slot.logging:
            return
        if not lib.host_probe(slot.hva(gfn), 1, 0):
            return
        writable = not slot.readonly and bool(lib.host_probe(slot.hva(gfn), 1, 1))
        self._set_spte(page, index, access, gfn, slot, host_writable=writable, write=False, prefetch=True)

    def _drop_spte(self, page: MmuPage, index: int) -> bool:
        """mmu_page_zap_pte(): clear an entry and every record of it; True when it was present."""
        spte = int(lib.spte_xchg(page.spt + index, 0))
        if not sptes.is_shadow_present(spte):
            return False
        if sptes.is_last(spte, page.role.level):
            self.rmap.remove(int(page.role.smm), page.role.level, page.shadowed_gfn(index), page, index)
            self.stat.count_page(page.role.level, -1)
        else:
            self.pages.child(spte).parents.discard((page, index))
            self._clear_unsync_bit(page, index)
        return True

    # ---- shadow pages ----

    def _get_page(self, gfn: Gfn, role: Role) -> MmuPage:
        """kvm_mmu_get_page(): the page of this frame and role, made if it is not there."""
        for page in self.pages.of_gfn(gfn):
            if page.role != role:
                # A last-level table now used as a higher one may not stay unsync.
                if role.level > sptes.PG_LEVEL_4K and page.unsync:
                    self._prepare_zap(page)
                continue
            if page.unsync:
                self._sync_pages([page])
            page.write_flooding_count = 0
            return page
        self.stat.mmu_cache_miss += 1
        page = self.pages.alloc(gfn, role)
        if not role.direct:
            page.gfns, page.accesses = [0] * sptes.PT64_ENTRIES, bytearray(sptes.PT64_ENTRIES)
            self._account_shadowed(page, 1)
            self._write_protect_gfn(gfn, smm=role.smm)
        return page

    def _account_shadowed(self, page: MmuPage, delta: int) -> None:
        smm = page.role.smm
        if page.role.level > sptes.PG_LEVEL_4K:
            _count(self._write_track, (smm, page.gfn), delta)
        _count(self._disallow_lpage, (smm, page.gfn >> 9), delta)

    def _is_write_tracked(self, gfn: int, *, smm: bool) -> bool:
        return (smm, gfn) in self._write_track

    def _write_protect_gfn(self, gfn: int, *, smm: bool) -> bool:
        """Take W from every spte that maps the frame, so that writes to the table are seen."""
        flush = False
        for level in (sptes.PG_LEVEL_4K, sptes.PG_LEVEL_2M):
            for page, index in self.rmap.of(int(smm), level, gfn):
                if level > sptes.PG_LEVEL_4K:
                    flush = self._drop_spte(page, index) or flush
                    continue
                old = sptes.clear_bits(page.spt + index, sptes.W | sptes.MMU_WRITABLE)
                flush = flush or bool(old & sptes.W)
        if flush:
            # Inside the lock: a page may be shadowed only once no processor can write it.
            self.flush_remote_tlbs()
        return flush

    def _prepare_zap(self, page: MmuPage) -> None:
        """kvm_mmu_prepare_zap_page(): unsync children, children, parents; freed after the flush."""
        if page.invalid:
            return
        for child in self._unsync_pages(page):
            if child is not page:
                self._prepare_zap(child)
        for index, spte in enumerate(page.entries()):
            if spte:
                self._drop_spte(page, index)
        for parent, index in tuple(page.parents):
            self._drop_spte(parent, index)
        if not page.role.direct:
            self._account_shadowed(page, -1)
        if page.unsync:
            self._clear_unsync(page)
        page.invalid = True
        if page.root_count:
            self._reload_roots()
        self.stat.mmu_shadow_zapped += 1
        self.pages.remove(page, pinned=page.root_count > 0)

    def _reload_roots(self) -> None:
        """A root has gone: have every vCPU load anew (KVM_REQ_MMU_FREE_OBSOLETE_ROOTS)."""
        for vcpu in tuple(self._vm.vcpus.values()):
            vcpu.loaded_memslots = None
            vcpu.cpu.request(lib.CPU_REQ_KICK)

    def _make_pages_available(self) -> None:
        """make_mmu_pages_available(): zap the oldest until a handful are free."""
        limit = self.limit()
        if len(self.pages) + 5 <= limit:
            return
        for page in self.pages:
            if len(self.pages) <= limit - KVM_REFILL_PAGES:
                break
            if not page.root_count and not page.invalid:
                self._prepare_zap(page)
                self.stat.mmu_recycled += 1

    def limit(self) -> int:
        """Return n_max_mmu_pages: as requested, or one for every fifty pages of memory."""
        if self.n_max_mmu_pages:
            return self.n_max_mmu_pages
        npages = sum(slot.npages for slots in self._vm.memslots for slot in slots.ordered)
        return max(KVM_MIN_ALLOC_MMU_PAGES, npages // 50)

    # ---- unsync and sync ----

    def _try_to_unsync(self, gfn: int, *, smm: bool, can_unsync: bool) -> bool:
        """mmu_try_to_unsync_pages(): True when the frame must stay write-protected."""
        if self._is_write_tracked(gfn, smm=smm):
            return True
        for page in self.pages.of_gfn(Gfn(gfn)):
            if page.role.direct or page.role.smm != smm or page.unsync:
                continue
            if not can_unsync:
                return True
            page.unsync = True
            self.stat.mmu_unsync += 1
            for parent, index in page.parents:
                self._mark_unsync(parent, index)
        return False

    def _mark_unsync(self, page: MmuPage, index: int) -> None:
        if page.unsync_child_bitmap >> index & 1:
            return
        page.unsync_child_bitmap |= 1 << index
        page.unsync_children += 1
        if page.unsync_children == 1:
            for parent, at in page.parents:
                self._mark_unsync(parent, at)

    def _clear_unsync_bit(self, page: MmuPage, index: int) -> None:
        if not page.unsync_child_bitmap >> index & 1:
            return
        page.unsync_child_bitmap &= ~(1 << index)
        page.unsync_children -= 1
        if not page.unsync_children:
            for parent, at in page.parents:
                self._clear_unsync_bit(parent, at)

    def _clear_unsync(self, page: MmuPage) -> None:
        page.unsync = False
        self.stat.mmu_unsync -= 1
        for parent, index in page.parents:
            self._clear_unsync_bit(parent, index)

    def _unsync_pages(self, page: MmuPage) -> Iterator[MmuPage]:
        """Yield the unsync pages below (and including) a page, by the bitmaps."""
        if page.unsync:
            yield page
        bitmap = page.unsync_child_bitmap
        while bitmap:
            index = (bitmap & -bitmap).bit_length() - 1
            bitmap &= bitmap - 1
            spte = sptes.read(page.spt + index)
            if sptes.is_shadow_present(spte) and not sptes.is_last(spte, page.role.level):
                yield from self._unsync_pages(self.pages.child(spte))

    def _sync_root(self, root: Root) -> None:
        for page in root.pages:
            if page is not None and page.unsync_children:
                self._sync_children(page)

    def _sync_children(self, page: MmuPage) -> None:
        self._sync_pages(list(dict.fromkeys(self._unsync_pages(page))))

    def _sync_pages(self, pages: Iterable[MmuPage]) -> None:
        """Write-protect the tables again, then take over what the guest changed meanwhile."""
        pages = list(pages)
        for page in pages:
            self._clear_unsync(page)
            self._write_protect_gfn(page.gfn, smm=page.role.smm)
        flush = False
        for page in pages:
            flush = self._sync_page(page) or flush
        if flush:
            self.flush_remote_tlbs()

    def _sync_page(self, page: MmuPage) -> bool:
        """FNAME(sync_page): bring every entry in line with its gpte; True when rights went away."""
        guest = GuestTables(self._vm, int(page.role.smm))
        paging = _paging_of_role(page.role)
        flush = False
        for index, spte in enumerate(page.entries()):
            if spte:
                flush = self._sync_spte(page, index, spte, paging, guest) or flush
        return flush

    def _sync_spte(self, page: MmuPage, index: int, spte: int, paging: Paging, guest: GuestTables) -> bool:
        entry = guest.gpte(page, index)
        gone = entry is None or not entry & walk.PRESENT or not entry & walk.ACCESSED
        if entry is None or gone or paging.reserved(entry, 1):
            return self._drop_spte(page, index)
        gfn = paging.frame(entry, 1, 0)
        access = page.role.access & paging.access(entry)
        if not entry & walk.DIRTY:
            access &= ~ACC_WRITE
        if sptes.is_mmio(spte) or gfn != page.shadowed_gfn(index):
            return self._drop_spte(page, index)
        if access == page.accesses[index]:
            return False
        slot = self._vm.memslots[int(page.role.smm)].gfn_to_memslot(gfn)
        if slot is None:
            return self._drop_spte(page, index)
        host_writable = bool(spte & sptes.HOST_WRITABLE)
        _, flush = self._set_spte(
            page, index, access, gfn, slot, host_writable=host_writable, write=False, prefetch=True
        )
        return flush

    def invlpg(self, vcpu: Vcpu, gla: int) -> None:
        """FNAME(invlpg): drop the address's entry in an unsync table and try to map it anew."""
        self.stat.invlpg += 1
        state = self.state(vcpu)
        root = state.root
        if root is None:
            return
        with self.lock:
            for each in (root, *state.prev_roots):
                self._invlpg(each, gla, GuestTables(self._vm, vcpu.as_id))
            zapped = self.pages.take_zapped()
        self._finish(zapped, flush=bool(zapped))

    def _invlpg(self, root: Root, gla: int, guest: GuestTables) -> None:
        page = root.page_for(gla)
        while page is not None:
            index = sptes.index(gla >> 12, page.role.level)
            spte = sptes.read(page.spt + index)
            if not sptes.is_shadow_present(spte) or sptes.is_last(spte, page.role.level):
                if page.unsync:
                    self._drop_spte(page, index)
                    self._prefetch_gpte(page, index, root.paging, guest)
                return
            page = self.pages.child(spte)

    # ---- writes to guest page tables ----

    def emulated_write(self, vcpu: Vcpu, gpa: int, data: bytes) -> bool:
        """Write a guest page table for the guest, and bring its shadows up to date."""
        if not self._vm.write_guest(gpa, data, vcpu.as_id):
            return False
        self.track_write(Gpa(gpa), len(data), vcpu.as_id)
        return True

    def set_limit(self, count: int) -> None:
        """Zap what is above the limit now, oldest first."""
        self.n_max_mmu_pages = count
        self.shrink(len(self.pages) - count)

    def track_write(self, gpa: Gpa, size: int, as_id: int) -> None:
        """kvm_mmu_pte_write(): a write that was emulated may have changed a shadowed table."""
        self.stat.mmu_pte_write += 1
        with self.lock:
            flush = False
            for page in self.pages.of_gfn(Gfn(gpa >> 12)):
                if page.role.direct or page.role.smm != bool(as_id):
                    continue
                if _is_misaligned(page, gpa, size) or _is_flooded(page):
                    self._prepare_zap(page)
                    self.stat.mmu_flooded += 1
                    continue
                for index in _written_sptes(page, gpa):
                    spte = sptes.read(page.spt + index)
                    if spte and page.role.level > sptes.PG_LEVEL_4K:
                        self.stat.mmu_pde_zapped += 1
                    flush = self._drop_spte(page, index) or flush
            zapped = self.pages.take_zapped()
        self._finish(zapped, flush=flush or bool(zapped))

    def unprotect_gfn(self, gfn: Gfn, as_id: int) -> bool:
        """kvm_mmu_unprotect_page(): give up shadowing a frame so that an instruction can be retried."""
        with self.lock:
            pages = [p for p in self.pages.of_gfn(gfn) if not p.role.direct and p.role.smm == bool(as_id)]
            for page in pages:
                self._prepare_zap(page)
            zapped = self.pages.take_zapped()
        self._finish(zapped, flush=bool(zapped))
        return bool(pages)

    def _clear_flood(self, root: Root, gla: int) -> None:
        """The tables on the way are in use: they are tables still."""
        page = root.page_for(gla)
        while page is not None:
            page.write_flooding_count = 0
            spte = sptes.read(page.sptep(gla >> 12))
            if not sptes.is_shadow_present(spte) or sptes.is_last(spte, page.role.level):
                return
            page = self.pages.child(spte)

    # ---- slots, dirty logging, the host ----

    def on_memslots_changed(
        self, old: Memslot | None, new: Memslot | None, change: Change, as_id: int
    ) -> None:
        """Make the published change true for the processors, before the ioctl returns."""
        with self.lock:
            if change in (Change.DELETE, Change.MOVE):
                # As KVM does: a frame may be a guest's table, and its shadow would outlive it.
                self._zap_all()
            elif change is Change.FLAGS_ONLY and old is not None and new is not None and new.logging:
                if not self._vm.dirty_log_initially_set:
                    self._write_protect_slot(new)
            elif change is Change.FLAGS_ONLY and old is not None:
                self._unmap(as_id, old.base_gfn, old.end_gfn)
            if not self._vm.memslots[0].generation % (1 << sptes.MMIO_GEN_BITS):
                self._zap_all()
            zapped = self.pages.take_zapped()
        self.flush_remote_tlbs(reload=True)
        commit_zap(zapped)

    def _zap_all(self) -> None:
        for page in self.pages:
            self._prepare_zap(page)

    def unmap_gfn_range(self, as_id: int, first: int, end: int) -> None:
        """Drop the translations of frames whose host memory is going away (the MMU notifier)."""
        with self.lock:
            flush = self._unmap(as_id, first, end)
            zapped = self.pages.take_zapped()
        self._finish(zapped, flush=flush or bool(zapped))

    def _unmap(self, as_id: int, first: int, end: int) -> bool:
        flush = False
        for page, index in self.rmap.range(as_id, first, end):
            flush = self._drop_spte(page, index) or flush
        return flush

    def _write_protect(self, slot: Memslot, gfns: Iterable[int]) -> bool:
        flush = False
        for gfn in gfns:
            for page, index in self.rmap.of(slot.as_id, sptes.PG_LEVEL_4K, gfn):
                flush = bool(sptes.clear_bits(page.spt + index, sptes.W) & sptes.W) or flush
            for page, index in self.rmap.of(slot.as_id, sptes.PG_LEVEL_2M, gfn):
                flush = self._drop_spte(page, index) or flush
        return flush

    def _write_protect_slot(self, slot: Memslot) -> None:
        for page, index in self.rmap.range(slot.as_id, slot.base_gfn, slot.end_gfn):
            if page.role.level > sptes.PG_LEVEL_4K:
                self._drop_spte(page, index)
            else:
                sptes.clear_bits(page.spt + index, sptes.W)

    def shrink(self, count: int) -> int:
        """Free up to `count` of the oldest pages (memory pressure); return how many."""
        done = 0
        with self.lock:
            for page in self.pages:
                if done >= count:
                    break
                if not page.root_count and not page.invalid:
                    self._prepare_zap(page)
                    done += 1
            zapped = self.pages.take_zapped()
        self._finish(zapped, flush=bool(zapped))
        return done

    def vcpu_destroyed(self, vcpu: Vcpu) -> None:
        """Let go of the vCPU's roots."""
        self.reset_context(vcpu)
        self._vcpus.pop(vcpu.id, None)

    def destroy(self) -> None:
        """Free everything: the VM is going away and no vCPU runs."""
        with self.lock:
            for state in self._vcpus.values():
                for root in (*state.prev_roots, *((state.root,) if state.root else ())):
                    self._put_root(root)
            self._vcpus.clear()
            self._zap_all()
            commit_zap(self.pages.take_zapped())


def _count(counts: dict[tuple[bool, int], int], key: tuple[bool, int], delta: int) -> None:
    value = counts.get(key, 0) + delta
    if value:
        counts[key] = value
    else:
        del counts[key]


def _paging_of_role(role: Role) -> Paging:
    """Return the paging mode a page's gptes were read in, as far as level 1 depends on it."""
    return Paging(2 if role.has_4_byte_gpte else 4, nx=role.efer_nx, wp=role.cr0_wp, maxphyaddr=52)


def _is_misaligned(page: MmuPage, gpa: int, size: int) -> bool:
    """detect_write_misaligned(): not how one writes a table entry, so it is no table any more."""
    width = 4 if page.role.has_4_byte_gpte else 8
    offset = gpa & 0xFFF
    # Linux clears a status bit with a one-byte AND of the entry's first byte.
    if offset % width == 0 and size == 1:
        return False
    return size < 4 or bool((offset ^ offset + size - 1) & ~(width - 1))


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
