"""What both MMUs have in common: the lock, the statistics, host pages, and flushing processors."""

from __future__ import annotations

import abc
import dataclasses
import enum
import threading
from errno import EFAULT
from typing import TYPE_CHECKING

from pykvm.abi import Gfn, Gpa, lib
from pykvm.abi.errors import KvmError
from pykvm.mmu import spte as sptes
from pykvm.mmu.pages import MmuPage, PageTable, commit_zap
from pykvm.mmu.slots import set_bits

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pykvm.kvm.vcpu import Vcpu
    from pykvm.kvm.vm import Vm
    from pykvm.mmu.slots import Change, Memslot, Memslots
    from pykvm.mmu.walk import Fault


class RetPf(enum.Enum):
    """What became of a fault (enum RET_PF_*)."""

    RETRY = enum.auto()
    FIXED = enum.auto()
    SPURIOUS = enum.auto()
    EMULATE = enum.auto()


class MemoryFault(KvmError):
    """The host has no memory for a frame: KVM_RUN fails with EFAULT and KVM_EXIT_MEMORY_FAULT."""

    def __init__(self, gpa: Gpa, why: str) -> None:
        """Report the frame of `gpa`."""
        super().__init__(EFAULT, why)
        self.memory_fault = (gpa & ~0xFFF, 0x1000, 0)


@dataclasses.dataclass(slots=True)
class Stat:
    """MMU statistics with the names of KVM's binary statistics."""

    pf_taken: int = 0
    pf_fixed: int = 0
    pf_fast: int = 0
    pf_spurious: int = 0
    pf_emulate: int = 0
    pf_guest: int = 0
    pf_mmio_spte_created: int = 0
    invlpg: int = 0
    mmu_shadow_zapped: int = 0
    mmu_pte_write: int = 0
    mmu_pde_zapped: int = 0
    mmu_flooded: int = 0
    mmu_recycled: int = 0
    mmu_cache_miss: int = 0
    mmu_unsync: int = 0
    pages_4k: int = 0
    pages_2m: int = 0
    pages_1g: int = 0
    remote_tlb_flush: int = 0
    remote_tlb_flush_requests: int = 0

    def count_page(self, level: int, delta: int) -> None:
        """Count a leaf spte of `level` that came or went."""
        if level == sptes.PG_LEVEL_4K:
            self.pages_4k += delta
        elif level == sptes.PG_LEVEL_2M:
            self.pages_2m += delta
        else:
            self.pages_1g += delta


class Mmu(abc.ABC):
    """The MMU of one VM. `lock` is mmu_lock: it guards the tables, not the slots."""

    def __init__(self, vm: Vm) -> None:
        """Start without tables: they are made at the first entry."""
        self._vm = vm
        # flush_remote_tlbs() under the lock waits for processors, never for other module threads.
        self.lock = threading.RLock()
        self.pages = PageTable()
        self.stat = Stat()

    def memslots(self, vcpu: Vcpu) -> Memslots:
        """Return the current slots of the address space the vCPU is in."""
        return self._vm.memslots[vcpu.as_id]

    def is_stale(self, slots: Memslots) -> bool:
        """Whether the slots changed since the snapshot was taken; call under the lock."""
        return slots.generation != self._vm.memslots[0].generation

    @abc.abstractmethod
    def load(self, vcpu: Vcpu) -> None:
        """Point the processor at its root and at the slots' generation (kvm_mmu_load)."""

    @abc.abstractmethod
    def page_fault(self, vcpu: Vcpu, addr: int, error: int, gla: int = 0) -> RetPf | Fault:
        """Handle a fault of our tables; see `TdpMmu` and `ShadowMmu` for what addr and error are."""

    # ---- what only shadow paging has to follow; the processor does it alone otherwise ----

    def new_cr3(self, vcpu: Vcpu) -> None:
        """The guest wrote CR3."""

    def reset_context(self, vcpu: Vcpu) -> None:
        """CR0, CR4 or EFER changed what tables mean."""

    def invlpg(self, vcpu: Vcpu, gla: int) -> None:
        """The guest invalidated a translation."""

    def load_pdptrs(self, vcpu: Vcpu) -> bool:  # noqa: ARG002
        """Latch PAE's PDPTEs; False when one is invalid."""
        return True

    def emulated_write(self, vcpu: Vcpu, gpa: int, data: bytes) -> bool:  # noqa: ARG002
        """Do a write that exited as MMIO though there is memory; False when there is none."""
        return False

    def set_limit(self, count: int) -> None:
        """Keep to so many shadow pages from now on (KVM_SET_NR_MMU_PAGES)."""

    @abc.abstractmethod
    def on_memslots_changed(
        self, old: Memslot | None, new: Memslot | None, change: Change, as_id: int
    ) -> None:
        """Make the published change true for the processors, before the ioctl returns."""

    @abc.abstractmethod
    def unmap_gfn_range(self, as_id: int, first: int, end: int) -> None:
        """Drop the translations of frames whose host memory is going away (the MMU notifier)."""

    @abc.abstractmethod
    def _write_protect(self, slot: Memslot, gfns: Iterable[int]) -> bool:
        """Make the frames' next write fault again; True when processors must flush."""

    @abc.abstractmethod
    def destroy(self) -> None:
        """Free everything: the VM is going away and no vCPU runs."""

    # ---- dirty logging ----

    def mark_page_dirty(self, slot: Memslot, gfn: int) -> None:
        """Log a write that KVM itself did to a frame."""
        if slot.dirty_bitmap is not None:
            with self.lock:
                slot.mark_page_dirty(gfn)

    def take_dirty(self, slot: Memslot, bitmap: bytearray) -> bytes:
        """Return the bitmap, clear it and write-protect the pages in it; no write gets lost."""
        with self.lock:
            snapshot = bytes(bitmap)
            bitmap[:] = bytes(len(bitmap))
            flush = self._write_protect(slot, list(set_bits(snapshot, slot.base_gfn)))
        if flush:
            self.flush_remote_tlbs()
        return snapshot

    def clear_dirty(self, slot: Memslot, bitmap: bytearray, first: int, wanted: bytes) -> None:
        """Clear the bits set in `wanted` (bit 0 = page `first`) and write-protect those pages."""
        gfns = []
        with self.lock:
            for rel in set_bits(wanted, first):
                if rel < slot.npages and bitmap[rel >> 3] >> (rel & 7) & 1:
                    bitmap[rel >> 3] &= ~(1 << (rel & 7)) & 0xFF
                    gfns.append(slot.base_gfn + rel)
            flush = self._write_protect(slot, gfns)
        if flush:
            self.flush_remote_tlbs()

    # ---- processors ----

    def flush_remote_tlbs(self, *, reload: bool = False) -> None:
        """Return when no processor uses a translation it looked up before the call.

        reload: they must also come out, because their root or the slots' generation changed.
        """
        self.stat.remote_tlb_flush_requests += 1
        cpus = [vcpu.cpu for vcpu in tuple(self._vm.vcpus.values())]
        request = lib.CPU_REQ_FLUSH_TLB | (lib.CPU_REQ_KICK if reload else 0)
        for cpu in cpus:
            cpu.request(request)
        for cpu in cpus:
            cpu.sync()
        self.stat.remote_tlb_flush += bool(cpus)

    def _finish(self, zapped: list[MmuPage], *, flush: bool) -> None:
        if flush or zapped:
            self.flush_remote_tlbs()
        commit_zap(zapped)


def host_access(slot: Memslot, gpa: Gpa, *, write: bool) -> bool:
    """Find the host page behind a frame (gfn_to_pfn); return whether it may be mapped writable.

    Errors:
        EFAULT  it is not mapped, or not writable and `write` asks for that (a MemoryFault)
    """
    hva = slot.hva(gpa >> 12)
    writable = not slot.readonly and bool(lib.host_probe(hva, 1, 1))
    if not writable and (write or not lib.host_probe(hva, 1, 0)):
        raise MemoryFault(gpa, f"no host memory at {hva:#x} behind gpa {gpa:#x}")
    return writable


def max_mapping_level(slot: Memslot, gfn: Gfn, *, host_writable: bool) -> int:
    """Return the largest page a frame can be mapped by.

    Gpa and hva must be congruent, the page wholly in the slot, and the host range mapped with the
    same rights throughout; dirty logging needs 4 KiB.
    """
    if slot.logging:
        return sptes.PG_LEVEL_4K
    npages = sptes.pages_per(sptes.PG_LEVEL_2M)
    base = gfn & ~(npages - 1)
    if base < slot.base_gfn or base + npages > slot.end_gfn or slot.hva(base) % (npages << 12):
        return sptes.PG_LEVEL_4K
    if not lib.host_probe(slot.hva(base), npages << 12, int(host_writable)):
        return sptes.PG_LEVEL_4K
    return sptes.PG_LEVEL_2M
