"""KVM's MMU: what the processor's second-level tables hold, and when that has to change.

`Mmu` is one VM's.  Its tables are made by `tdp`, entry by entry as the guest faults (`fault`),
and taken apart when slots, dirty logging or the client's host memory change.
"""

from __future__ import annotations

import dataclasses
import threading
from typing import TYPE_CHECKING

from pykvm.abi import Gpa, lib
from pykvm.kvm.memslots import Change, Memslot, Memslots
from pykvm.mmu import spte as sptes
from pykvm.mmu.fault import RetPf, tdp_page_fault
from pykvm.mmu.pages import PageTable, Role, commit_zap
from pykvm.mmu.tdp import Tdp

if TYPE_CHECKING:
    from pykvm.kvm.vcpu import Vcpu
    from pykvm.kvm.vm import Vm

__all__ = ["Mmu", "RetPf", "Stat"]

# 4-level second-level tables reach 48 bits of gpa, 5-level ones all 52.
_FOUR_LEVEL_GPA_BITS = 48


@dataclasses.dataclass(slots=True)
class Stat:
    """MMU statistics with the names of KVM's binary statistics."""

    pf_taken: int = 0
    pf_fixed: int = 0
    pf_fast: int = 0
    pf_spurious: int = 0
    pf_emulate: int = 0
    pf_mmio_spte_created: int = 0
    remote_tlb_flush: int = 0
    remote_tlb_flush_requests: int = 0


class Mmu:
    """The MMU of one VM. `lock` is mmu_lock: it guards the tables, not the slots."""

    def __init__(self, vm: Vm) -> None:
        """Start without tables: they are made at the first entry."""
        self._vm = vm
        self.lock = threading.Lock()
        self.pages = PageTable()
        self.stat = Stat()
        self._roots: dict[Role, Tdp] = {}

    # ---- entry ----

    def memslots(self, vcpu: Vcpu) -> Memslots:
        """Return the current slots of the address space the vCPU is in."""
        return self._vm.memslots[vcpu.as_id]

    def tdp_of(self, vcpu: Vcpu) -> Tdp:
        """Return the tables the vCPU runs on, making their root if need be."""
        level = 5 if vcpu.cpu.ctl.maxphyaddr > _FOUR_LEVEL_GPA_BITS else 4
        role = Role(level, smm=bool(vcpu.as_id))
        tdp = self._roots.get(role)
        return tdp if tdp is not None else self._alloc_root(role)

    def _alloc_root(self, role: Role) -> Tdp:
        with self.lock:
            if role not in self._roots:
                self._roots[role] = Tdp(self.pages, role)
            return self._roots[role]

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

    def page_fault(self, vcpu: Vcpu, gpa: Gpa, qualification: int, gla: int) -> RetPf:
        """Handle an EPT violation at `gpa`; `gla` is the linear address, for tracing.

        Errors:
            EFAULT  the slot's host memory is not there (a MemoryFault)
        """
        del gla
        self.stat.pf_taken += 1
        result = tdp_page_fault(self, vcpu, gpa, qualification)
        if result is RetPf.EMULATE:
            self.stat.pf_emulate += 1
        return result

    def is_stale(self, slots: Memslots) -> bool:
        """Whether the slots changed since the snapshot was taken; call under the lock."""
        return slots.generation != self._vm.memslots[0].generation

    # ---- slots ----

    def on_memslots_changed(self, old: Memslot | None, new: Memslot | None, change: Change) -> None:
        """Make the published change true for the processors, before the ioctl returns."""
        with self.lock:
            for role, tdp in self._roots.items():
                self._apply(role, tdp, old, new, change)
            if not self._vm.memslots[0].generation % (1 << sptes.MMIO_GEN_BITS):
                for tdp in self._roots.values():
                    tdp.zap_mmio()
            zapped = self.pages.take_zapped()
        # Even with nothing zapped: processors hold the generation by which they tell MMIO entries.
        self.flush_remote_tlbs()
        commit_zap(zapped)

    def _apply(
        self, role: Role, tdp: Tdp, old: Memslot | None, new: Memslot | None, change: Change
    ) -> None:
        slot = old or new
        assert slot is not None
        if role.smm != bool(slot.as_id):
            return
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
            for role, tdp in self._roots.items():
                if role.smm == bool(as_id):
                    flush = tdp.zap_range(first, end) or flush
            zapped = self.pages.take_zapped()
        if flush:
            self.flush_remote_tlbs()
        commit_zap(zapped)

    # ---- dirty logging ----

    def mark_page_dirty(self, slot: Memslot, gfn: int) -> None:
        """Log a write that KVM itself did to a frame."""
        if slot.dirty_bitmap is not None:
            with self.lock:
                slot.mark_page_dirty(gfn)

    def take_dirty(self, slot: Memslot, bitmap: bytearray) -> bytes:
        """Return the bitmap, clear it and write-protect the pages in it; no write gets lost."""
        from pykvm.kvm.dirty import set_bits  # noqa: PLC0415  (dirty imports the VM's modules)

        with self.lock:
            snapshot = bytes(bitmap)
            bitmap[:] = bytes(len(bitmap))
            flush = self._write_protect(slot, list(set_bits(snapshot, slot.base_gfn)))
        if flush:
            self.flush_remote_tlbs()
        return snapshot

    def clear_dirty(self, slot: Memslot, bitmap: bytearray, first: int, wanted: bytes) -> None:
        """Clear the bits set in `wanted` (bit 0 = page `first`) and write-protect those pages."""
        from pykvm.kvm.dirty import set_bits  # noqa: PLC0415

        gfns = []
        with self.lock:
            for rel in set_bits(wanted, first):
                if rel < slot.npages and bitmap[rel >> 3] >> (rel & 7) & 1:
                    bitmap[rel >> 3] &= ~(1 << (rel & 7)) & 0xFF
                    gfns.append(slot.base_gfn + rel)
            flush = self._write_protect(slot, gfns)
        if flush:
            self.flush_remote_tlbs()

    def _write_protect(self, slot: Memslot, gfns: list[int]) -> bool:
        flush = False
        for role, tdp in self._roots.items():
            if role.smm == bool(slot.as_id):
                flush = tdp.write_protect(slot, iter(gfns)) or flush
        return flush

    # ---- processors ----

    def flush_remote_tlbs(self) -> None:
        """Return when no processor uses a translation it looked up before the call."""
        self.stat.remote_tlb_flush_requests += 1
        cpus = [vcpu.cpu for vcpu in tuple(self._vm.vcpus.values())]
        for cpu in cpus:
            cpu.request(lib.CPU_REQ_FLUSH_TLB | lib.CPU_REQ_KICK)
        for cpu in cpus:
            cpu.sync()
        self.stat.remote_tlb_flush += bool(cpus)

    def destroy(self) -> None:
        """Free everything: the VM is going away and no vCPU runs."""
        with self.lock:
            for tdp in self._roots.values():
                tdp.destroy()
            self._roots.clear()
            commit_zap(self.pages.take_zapped())
