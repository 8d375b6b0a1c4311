"""The MMU in its usual mode: two-dimensional paging (TDP). The guest owns its tables.

Page faults here are EPT violations, handled in the order and with the names of KVM's mmu.c.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from pykvm.abi import CData, Gfn, Gpa, lib
from pykvm.mmu import spte as sptes
from pykvm.mmu.base import Mmu, RetPf, host_access, max_mapping_level
from pykvm.mmu.pages import Role, commit_zap
from pykvm.mmu.slots import Change, Memslot, Memslots
from pykvm.mmu.tdp import Tdp

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
    goal_level: int = sptes.PG_LEVEL_4K

    @property
    def gfn(self) -> Gfn:
        """Frame of the access."""
        return Gfn(self.gpa >> 12)


class TdpMmu(Mmu):
    """A VM's second-level tables, one set for each address space and depth."""

    def __init__(self, vm: Vm) -> None:
        """Start without tables."""
        super().__init__(vm)
        self._roots: dict[Role, Tdp] = {}

    def load(self, vcpu: Vcpu) -> None:
        """Point the processor at its root and at the slots' generation (kvm_mmu_load)."""
        tdp = self.tdp_of(vcpu)
        ctl = vcpu.cpu.ctl
        ctl.mmio_gen_mask = sptes.MMIO_GEN_MASK
        ctl.mmio_gen = sptes.mmio_generation(self.memslots(vcpu).generation)
        if ctl.eptp != tdp.root.spt_addr:
            ctl.flags |= lib.CPU_TDP
            ctl.ept_level = tdp.root.role.level
            ctl.eptp = tdp.root.spt_addr
            vcpu.cpu.flush_tlb()

    def tdp_of(self, vcpu: Vcpu) -> Tdp:
        """Return the tables the vCPU runs on, making their root if need be."""
        level = 5 if vcpu.cpu.ctl.maxphyaddr > _FOUR_LEVEL_GPA_BITS else 4
        role = Role(level, smm=bool(vcpu.as_id))
        tdp = self._roots.get(role)
        return tdp if tdp is not None else self._alloc_root(role)

    def _alloc_root(self, role: Role) -> Tdp:
        with self.lock:
            if role not in self._roots:
                self._roots[role] = Tdp(self.pages, role, self.stat)
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
        """
        del gla
        self.stat.pf_taken += 1
        fault = PageFault(Gpa(addr), bool(error & lib.CPU_EPT_WRITE), self.memslots(vcpu))
        tdp = self.tdp_of(vcpu)
        slot = fault.slots.gfn_to_memslot(fault.gfn)
        if slot is None:
            return self._noslot_fault(tdp, fault)
        if fault.write and slot.readonly:
            # Written by the instruction as by any other, then handed out piece by piece.
            vcpu.cpu.ctl.emulate_gfn = fault.gfn
            self.stat.pf_emulate += 1
            return RetPf.EMULATE
        return self._fast_page_fault(tdp, fault, slot) or self._direct_page_fault(tdp, fault, slot)

    def _noslot_fault(self, tdp: Tdp, fault: PageFault) -> RetPf:
        """Remember that there is no memory: from now on the processor tells MMIO by itself."""
        with self.lock:
            if self.is_stale(fault.slots):
                return RetPf.RETRY
            tdp.map(fault.gfn, sptes.PG_LEVEL_4K, sptes.make_mmio_spte(fault.gfn, fault.slots.generation))
        self.stat.pf_mmio_spte_created += 1
        self.stat.pf_emulate += 1
        return RetPf.EMULATE

    def _fast_page_fault(self, tdp: Tdp, fault: PageFault, slot: Memslot) -> RetPf | None:
        """Give W back to an entry that lost it to dirty logging only, or see a stale fault."""
        with self.lock:
            if self.is_stale(fault.slots):
                return RetPf.RETRY
            found = tdp.find(fault.gfn)
            if found is None:
                return None
            sptep, spte, level = found
            if not fault.write or spte & sptes.W:
                self.stat.pf_spurious += 1
                return RetPf.SPURIOUS
            if level > sptes.PG_LEVEL_4K or not spte & sptes.MMU_WRITABLE:
                return None
            return self._make_writable(sptep, spte, fault, slot)

    def _make_writable(self, sptep: CData, spte: int, fault: PageFault, slot: Memslot) -> RetPf:
        # The bit goes into the log before the guest can write: a reader of the log must not miss it.
        slot.mark_page_dirty(fault.gfn)
        if not lib.spte_cmpxchg(sptep, spte, spte | sptes.W):
            return RetPf.RETRY
        self.stat.pf_fast += 1
        return RetPf.FIXED

    def _direct_page_fault(self, tdp: Tdp, fault: PageFault, slot: Memslot) -> RetPf:
        host_writable = host_access(slot, fault.gpa, write=fault.write)
        fault.goal_level = max_mapping_level(slot, fault.gfn, host_writable=host_writable)
        with self.lock:
            if self.is_stale(fault.slots):
                return RetPf.RETRY
            flush = self._direct_map(tdp, fault, slot, host_writable=host_writable)
            zapped = self.pages.take_zapped()
        self._finish(zapped, flush=flush)
        return RetPf.FIXED

    def _direct_map(self, tdp: Tdp, fault: PageFault, slot: Memslot, *, host_writable: bool) -> bool:
        # While the slot logs, only a write may map a page writable: it is the write that is logged.
        writable = host_writable and (fault.write or not slot.logging)
        if writable:
            slot.mark_page_dirty(fault.gfn)
        level = fault.goal_level
        base = fault.gfn & ~(sptes.pages_per(level) - 1)
        spte = sptes.make_spte(slot.hva(base), level, writable=writable, host_writable=host_writable)
        self.stat.pf_fixed += 1
        return tdp.map(fault.gfn, level, spte)

    # ---- slots ----

    def on_memslots_changed(
        self, old: Memslot | None, new: Memslot | None, change: Change, as_id: int
    ) -> None:
        """Make the published change true for the processors, before the ioctl returns."""
        with self.lock:
            for tdp in self.tables(as_id):
                self._apply(tdp, old, new, change)
            if not self._vm.memslots[0].generation % (1 << sptes.MMIO_GEN_BITS):
                for tdp in self._roots.values():
                    tdp.zap_mmio()
            zapped = self.pages.take_zapped()
        # Even with nothing zapped: processors hold the generation by which they tell MMIO entries.
        self.flush_remote_tlbs(reload=True)
        commit_zap(zapped)

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

    def destroy(self) -> None:
        """Free everything: the VM is going away and no vCPU runs."""
        with self.lock:
            for tdp in self._roots.values():
                tdp.destroy()
            self._roots.clear()
            commit_zap(self.pages.take_zapped())
