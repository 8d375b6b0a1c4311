"""What both MMUs have in common: lock, statistics, host pages, dirty log, and flushing processors."""

from __future__ import annotations

import abc
import enum
import threading
from errno import EFAULT, EINTR, ENOSPC
from typing import TYPE_CHECKING

from pykvm import trace
from pykvm.abi import CData, Gfn, Gpa, ffi, lib, uapi
from pykvm.abi.errors import KvmError
from pykvm.abi.uaccess import address_of
from pykvm.mmu import spte as sptes
from pykvm.mmu.pages import MemoryCache, MmuPage, PageTable, commit_zap
from pykvm.mmu.slots import set_bits
from pykvm.mmu.stat import VmStat
from pykvm.mmu.walk import pferr_flags

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pykvm.kvm.vcpu import Vcpu
    from pykvm.kvm.vm import Vm
    from pykvm.mmu.slots import Change, Memslot, Memslots
    from pykvm.mmu.walk import Fault

KVM_MAX_HUGEPAGE_LEVEL = sptes.PG_LEVEL_1G
KVM_MIN_ALLOC_MMU_PAGES = 64
KVM_MIN_FREE_MMU_PAGES = 5
KVM_REFILL_PAGES = 25
# One shadow page for so many pages of memory.
KVM_MEMSLOT_PAGES_TO_MMU_PAGES_RATIO = 50


class RetPf(enum.Enum):
    """What became of a fault (enum RET_PF_*)."""

    RETRY = enum.auto()
    FIXED = enum.auto()
    SPURIOUS = enum.auto()
    EMULATE = enum.auto()
    # The frame is watched, a guest's page table: emulate, or unprotect it and retry.
    WRITE_PROTECTED = enum.auto()


class MemoryFault(KvmError):
    """The host has no memory for a frame: KVM_RUN fails with EFAULT and KVM_EXIT_MEMORY_FAULT."""

    def __init__(self, gpa: Gpa, why: str) -> None:
        """Report the frame of `gpa`."""
        super().__init__(EFAULT, why)
        self.memory_fault = (gpa & ~0xFFF, 0x1000, 0)


class PoisonedPageError(KvmError):
    """The hardware has lost a page: the thread gets SIGBUS, and KVM_RUN ends (kvm_send_hwpoison_signal)."""

    def __init__(self, hva: int) -> None:
        """Report the page at `hva`."""
        super().__init__(EINTR, f"the host's page at {hva:#x} is poisoned")
        self.hva = hva


class Mmu(abc.ABC):
    """The MMU of one VM. `lock` is mmu_lock: it guards the tables, not the slots.

    `mmio_gen_bits`: how many bits of the memslot generation an MMIO spte carries; fewer than there are only
    for tests of what happens when they wrap.  `n_requested_mmu_pages`: what KVM_SET_NR_MMU_PAGES asked for,
    0 when it did not; `n_max_mmu_pages`: the limit there is.  `invalidate_seq`: how often host memory behind
    slots has changed (mmu_invalidate_seq).
    """

    mmio_gen_bits = sptes.MMIO_GEN_BITS

    def __init__(self, vm: Vm) -> None:
        """Start without tables: they are made at the first entry."""
        self._vm = vm
        # flush_remote_tlbs() under the lock waits for processors, never for other module threads.
        self.lock = threading.RLock()
        self.pages = PageTable()
        self.stat = VmStat()
        # 2 MiB ranges in which host pages turned out to have different rights: mapped by 4 KiB pages.
        self._mixed: set[tuple[int, int]] = set()
        self._caches: dict[int, MemoryCache] = {}
        # A present spte went without a flush; a flush for the host's sake must not be left out then.
        self.tlbs_dirty = False
        self.n_requested_mmu_pages = 0
        self.n_max_mmu_pages = 0
        # Large pages are not executable, for the sake of a processor with a bug (is_nx_huge_page_enabled).
        self.nx_huge_pages = vm.processor.itlb_multihit
        self._nx_splits: set[int] = set()
        self.invalidate_seq = 0
        # Host ranges [start, end) whose mapping is changing right now (mmu_invalidate_in_progress).
        self._invalidating: list[tuple[int, int]] = []

    def memslots(self, vcpu: Vcpu) -> Memslots:
        """Return the current slots of the address space the vCPU is in."""
        return self._vm.memslots[vcpu.as_id]

    def is_stale(self, slots: Memslots) -> bool:
        """Whether the slots changed since the snapshot was taken; call under the lock."""
        return slots.generation != self._vm.memslots[0].generation

    def mmio_generation(self, slots: Memslots) -> int:
        """Return the slots' generation as an MMIO spte carries it."""
        return sptes.mmio_generation(slots.generation & (1 << self.mmio_gen_bits) - 1)

    def cache(self, vcpu: Vcpu) -> MemoryCache:
        """Return the vCPU's reserve of tables."""
        cache = self._caches.get(vcpu.id)
        if cache is None:
            cache = self._caches.setdefault(vcpu.id, MemoryCache())
        return cache

    @abc.abstractmethod
    def load(self, vcpu: Vcpu) -> None:
        """Point the processor at its root and at the slots' generation (kvm_mmu_load)."""

    @abc.abstractmethod
    def page_fault(self, vcpu: Vcpu, addr: int, error: int, gla: int = 0) -> RetPf | Fault:
        """Handle a fault of our tables; see `TdpMmu` and `ShadowMmu` for what addr and error are."""

    # ---- what only shadow paging has to follow; the processor does it alone otherwise ----

    def new_cr3(self, vcpu: Vcpu, *, noflush: bool = False) -> None:
        """The guest wrote CR3. noflush: with bit 63 set, what is known of its PCID stays."""

    def flush_tlb_guest(self, vcpu: Vcpu) -> None:
        """The guest invalidated everything, of all PCIDs."""

    def invalidate_pcid(self, vcpu: Vcpu, pcid: int) -> None:
        """The guest invalidated the translations of a PCID."""

    def invpcid_gva(self, vcpu: Vcpu, gla: int, pcid: int) -> None:
        """The guest invalidated a translation of a PCID."""

    def paging_changed(self, vcpu: Vcpu) -> None:
        """The guest changed CR0, CR4 or EFER so that tables mean something else."""

    def reset_context(self, vcpu: Vcpu) -> None:
        """The client set the vCPU's state: nothing that was known of its tables counts any more."""

    def invlpg(self, vcpu: Vcpu, gla: int) -> None:
        """The guest invalidated a translation."""

    def load_pdptrs(self, vcpu: Vcpu) -> bool:  # noqa: ARG002
        """Latch PAE's PDPTEs; False when one is invalid."""
        return True

    def emulated_write(self, vcpu: Vcpu, gpa: int, data: bytes) -> bool:  # noqa: ARG002
        """Do a write that exited as MMIO though there is memory; False when there is none."""
        return False

    def unprotect_gfn(self, gfn: int, as_id: int) -> bool:  # noqa: ARG002
        """Give up watching a frame so that an instruction can be retried; False when nothing did."""
        return False

    # ---- how many pages there may be ----

    @abc.abstractmethod
    def _zap_oldest(self, count: int) -> int:
        """Zap that many pages from the tail of the active list, but no loaded root; return how many."""

    def _make_pages_available(self) -> None:
        """make_mmu_pages_available(): zap the oldest until a handful are free.

        Errors:
            ENOSPC  all that are left are loaded roots
        """
        available = self.n_max_mmu_pages - len(self.pages)
        if available >= KVM_MIN_FREE_MMU_PAGES:
            return
        self.stat.mmu_recycled += self._zap_oldest(KVM_REFILL_PAGES - available)
        if self.n_max_mmu_pages <= len(self.pages):
            raise KvmError(ENOSPC, f"all {len(self.pages)} shadow pages are in use")

    def set_limit(self, count: int) -> None:
        """Zap what is above the limit now, oldest first (KVM_SET_NR_MMU_PAGES, kvm_mmu_change_mmu_pages)."""
        with self.lock:
            self.n_requested_mmu_pages = count
            self._change_mmu_pages(count)
            zapped = self.pages.take_zapped()
        self._finish(zapped, flush=False)

    def _change_mmu_pages(self, goal: int) -> None:
        if len(self.pages) > goal:
            self._zap_oldest(len(self.pages) - goal)
            goal = max(goal, len(self.pages))
        self.n_max_mmu_pages = goal

    def _update_limit(self) -> None:
        """kvm_arch_commit_memory_region(): by how much memory there is, unless somebody asked."""
        if self.n_requested_mmu_pages:
            return
        npages = sum(slot.npages for slots in self._vm.memslots for slot in slots.ordered)
        self._change_mmu_pages(max(npages // KVM_MEMSLOT_PAGES_TO_MMU_PAGES_RATIO, KVM_MIN_ALLOC_MMU_PAGES))

    def shrink(self, count: int) -> int:
        """Free up to `count` of the oldest pages (memory pressure); return how many."""
        with self.lock:
            done = self._zap_oldest(count)
            zapped = self.pages.take_zapped()
        self._finish(zapped, flush=False)
        return done

    # ---- slots and the host's memory ----

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

    def invalidate_begin(self, start: int, end: int) -> None:
        """Host memory at [start, end) is about to change: until the end nothing there is mapped anew."""
        with self.lock:
            self._invalidating.append((start, end))

    def invalidate_end(self, start: int, end: int) -> None:
        """It has changed: what was found out about host pages before does not count any more."""
        with self.lock:
            self.invalidate_seq += 1
            self._invalidating.remove((start, end))

    def is_invalidated(self, seq: int, hva: int, size: int = 0x1000) -> bool:
        """Whether host memory may have changed since `seq` was read (mmu_invalidate_retry_gfn).

        Call under the lock: whoever changes it zaps under the lock, before or after the caller maps it.
        """
        return seq != self.invalidate_seq or any(
            start < hva + size and hva < end for start, end in self._invalidating
        )

    def host_fault(self, as_id: int, slot: Memslot, gfn: int) -> None:
        """An access of the guest's to mapped memory failed in the host: from now on look at each page.

        The tables map large ranges by what their first page allows; here that was too much.
        """
        base = gfn & ~(sptes.pages_per(sptes.PG_LEVEL_2M) - 1)
        with self.lock:
            self._mixed.add((as_id, gfn >> sptes.PT64_LEVEL_BITS))
        end = base + sptes.pages_per(sptes.PG_LEVEL_2M)
        self.unmap_gfn_range(as_id, max(base, slot.base_gfn), min(end, slot.end_gfn))

    def max_mapping_level(self, slot: Memslot, gfn: Gfn, limit: int = KVM_MAX_HUGEPAGE_LEVEL) -> int:
        """Return the largest page a frame can be mapped by (kvm_mmu_max_mapping_level).

        Gpa and hva must be congruent, the page wholly in the slot and without a shadowed table, and the host
        range mapped throughout; dirty logging needs 4 KiB.
        """
        if slot.logging or limit == sptes.PG_LEVEL_4K:
            return sptes.PG_LEVEL_4K
        for level in range(limit, sptes.PG_LEVEL_4K, -1):
            npages = sptes.pages_per(level)
            base = gfn & ~(npages - 1)
            if slot.arch.disallow_lpage(gfn, level):
                continue
            if self._mixed and self._is_mixed(slot.as_id, base, npages):
                continue
            if lib.host_mapped(slot.hva(base), npages << 12):
                return level
        return sptes.PG_LEVEL_4K

    def account_nx_splits(self, tables: Iterable[int]) -> None:
        """Count tables, by their address, that are there only because large pages are not executable."""
        self._nx_splits.update(tables)
        self.stat.nx_lpage_splits = len(self._nx_splits)

    def is_nx_split(self, table: int) -> bool:
        """Whether the table at an address is one of those."""
        return table in self._nx_splits

    def _is_mixed(self, as_id: int, base: int, npages: int) -> bool:
        first = base >> sptes.PT64_LEVEL_BITS
        end = first + (npages >> sptes.PT64_LEVEL_BITS)
        return any(space == as_id and first <= n < end for space, n in self._mixed)

    def _forget_mixed(self, slot: Memslot) -> None:
        """Slots change: what was found out about their host memory may be wrong now."""
        if self._mixed:
            first, end = slot.base_gfn >> sptes.PT64_LEVEL_BITS, slot.end_gfn >> sptes.PT64_LEVEL_BITS
            self._mixed = {(a, n) for a, n in self._mixed if a != slot.as_id or not first <= n <= end}

    # ---- dirty logging ----

    def mark_page_dirty(self, as_id: int, gfn: int) -> None:
        """Log a write that KVM itself did to a frame, after it is done."""
        # The slots as they are now: logging may have begun since the caller looked.
        slot = self._vm.memslots[as_id].gfn_to_memslot(gfn)
        if slot is not None and slot.logging:
            with self.lock:
                self.mark_page_dirty_in_slot(slot, gfn, self._running_vcpu())

    def _running_vcpu(self) -> Vcpu | None:
        """Return the vCPU whose ioctl this thread is in (kvm_get_running_vcpu); only dirty rings ask."""
        if not self._vm.dirty_ring_size:
            return None
        # An RLock tells who owns it, but the type stubs do not.
        vcpus = self._vm.vcpus.values()
        return next((vcpu for vcpu in vcpus if vcpu.mutex._is_owned()), None)  # type: ignore[attr-defined]  # noqa: SLF001

    def mark_page_dirty_in_slot(self, slot: Memslot, gfn: int, vcpu: Vcpu | None) -> None:
        """Log a write, under the lock: in the slot's bitmap, or in the ring of the vCPU that writes."""
        if slot.logging and vcpu is not None and vcpu.dirty_ring is not None:
            vcpu.dirty_ring.push(slot.as_id << 16 | slot.id, gfn - slot.base_gfn)
        elif slot.dirty_bitmap is not None:
            slot.mark_page_dirty(gfn)

    def take_dirty(self, slot: Memslot, bitmap: bytearray) -> bytes:
        """Return the bitmap, clear it and write-protect the pages in it; no write gets lost."""
        with self.lock:
            snapshot, clean = bytes(bitmap), bytes(len(bitmap))
            flush = False
            if snapshot != clean:
                bitmap[:] = clean
                flush = self._write_protect_bitmap(slot, 0, snapshot)
        self._flush_for_host(flush=flush)
        return snapshot

    def clear_dirty(self, slot: Memslot, bitmap: bytearray, first: int, wanted: bytes) -> None:
        """Clear the bits set in `wanted` (bit 0 = page `first`, of 64) and write-protect those pages."""
        at = first >> 3
        with self.lock:
            mask = int.from_bytes(wanted, "little") & int.from_bytes(bitmap[at : at + len(wanted)], "little")
            cleared = mask.to_bytes(len(wanted), "little")
            left = int.from_bytes(bitmap[at : at + len(wanted)], "little") & ~mask
            bitmap[at : at + len(wanted)] = left.to_bytes(len(wanted), "little")
            flush = self._write_protect_bitmap(slot, first, cleared)
        self._flush_for_host(flush=flush)

    def reset_dirty(self, slot: Memslot, gfns: Iterable[int]) -> None:
        """Write-protect the pages that were collected from a dirty ring; the caller flushes."""
        with self.lock:
            self._write_protect(slot, gfns)

    def _write_protect_bitmap(self, slot: Memslot, first: int, bitmap: bytes) -> bool:
        """Write-protect the pages of a bitmap that starts at page `first` of the slot. True: flush."""
        return self._write_protect(slot, set_bits(bitmap, slot.base_gfn + first))

    # ---- processors ----

    def flush_remote_tlbs(self, *, reload: bool = False) -> None:
        """Return when no processor uses a translation it looked up before the call.

        reload: they must also come out, because their root or the slots' generation changed.
        """
        self.tlbs_dirty = False
        self.stat.remote_tlb_flush_requests += 1
        vcpus = tuple(self._vm.vcpus.values())
        request = lib.CPU_REQ_FLUSH_TLB | (lib.CPU_REQ_KICK if reload else 0)
        for vcpu in vcpus:
            vcpu.cpu.request(request)
            vcpu.stat.tlb_flush += 1
        for vcpu in vcpus:
            vcpu.cpu.sync()
        self.stat.remote_tlb_flush += bool(vcpus)

    def _flush_for_host(self, *, flush: bool) -> None:
        """Flush when something changed, or when processors may know more than the reverse map does."""
        if flush or self.tlbs_dirty:
            self.flush_remote_tlbs()

    def _commit_zap(self, zapped: list[MmuPage]) -> None:
        """Free zapped pages, once every processor has flushed."""
        if self._nx_splits:
            self._nx_splits.difference_update(page.spt_addr for page in zapped)
            self.stat.nx_lpage_splits = len(self._nx_splits)
        commit_zap(zapped)

    def _finish(self, zapped: list[MmuPage], *, flush: bool) -> None:
        if flush or zapped:
            self.flush_remote_tlbs()
        self._commit_zap(zapped)

    def _handle_error_pfn(self, vcpu: Vcpu, error: PoisonedPageError) -> None:
        """Tell the client's thread of a page that is lost, as an access of its own would."""
        vcpu.kvm_run.exit_reason = uapi.KVM_EXIT_INTR
        vcpu.stat.signal_exits += 1
        lib.host_send_hwpoison_signal(error.hva)

    def _step(self, vcpu: Vcpu, addr: int, step: str) -> None:
        if trace.mmu_step.enabled:
            trace.mmu_step(vcpu=vcpu.id, gfn=addr >> 12, step=step)

    def _trace_fast(self, vcpu: Vcpu, addr: int, error: int, sptep: CData, old: int, *, fixed: bool) -> None:
        trace.fast_page_fault(
            vcpu=vcpu.id,
            addr=addr,
            flags=pferr_flags(error),
            sptep=address_of(sptep),
            old=old,
            new=sptes.read(sptep),
            spurious=False,
            fixed=fixed,
        )

    def _trace_check(self, spte: int, slots: Memslots) -> None:
        """Tell of an MMIO spte that an access has met: only one of another generation leads to a fault."""
        if sptes.is_mmio(spte):
            generation, mask = self.mmio_generation(slots), sptes.MMIO_GEN_MASK
            trace.check_mmio_spte(
                spte=spte,
                gen=sptes.generation_of(generation),
                spte_gen=sptes.generation_of(spte),
                valid=spte & mask == generation,
            )

    def _trace_mmio(self, sptep: int, gfn: int, access: int, slots: Memslots) -> None:
        if trace.mark_mmio_spte.enabled:
            trace.mark_mmio_spte(sptep=sptep, gfn=gfn, access=access, gen=slots.generation)


def host_access(slot: Memslot, gpa: Gpa, *, write: bool) -> bool:
    """Find the host page behind a frame (kvm_faultin_pfn); return whether it may be mapped writable.

    Errors:
        EFAULT  it is not mapped, or not writable and `write` asks for that (a MemoryFault)
        EINTR   the hardware cannot give it back (a PoisonedPageError)
    """
    hva = slot.hva(gpa >> 12)
    writable = not slot.readonly and bool(lib.host_probe(hva, 1, 1))
    if not writable and (write or not lib.host_probe(hva, 1, 0)):
        if lib.host_poisoned():
            raise PoisonedPageError(hva)
        raise MemoryFault(gpa, f"no host memory at {hva:#x} behind gpa {gpa:#x}")
    return writable


def bitmap_words(bitmap: bytes, first: int) -> Iterable[tuple[int, CData]]:
    """Yield (number, mask) for every 512 frames of which a bitmap has some: mask is ``uint64_t[8]``.

    first: the frame that bit 0 stands for; `number` is a frame number divided by 512.
    """
    shift = first & sptes.PT64_ENTRIES - 1
    if shift:
        # Frames of one table have to lie in one group of 512.
        bitmap = (int.from_bytes(bitmap, "little") << shift).to_bytes(len(bitmap) + 64, "little")
    number = first >> sptes.PT64_LEVEL_BITS
    for at in _pieces(bitmap):
        piece = bitmap[at : at + 64]
        if piece.strip(b"\0"):
            mask = ffi.new("uint64_t[8]")
            ffi.memmove(mask, piece, len(piece))
            yield number + at // 64, mask


def _pieces(bitmap: bytes) -> Iterator[int]:
    """Yield the offsets of 64-byte pieces; long stretches of nothing are passed over at once."""
    for block in range(0, len(bitmap), _BLOCK):
        if not _EMPTY_BLOCK.startswith(bitmap[block : block + _BLOCK]):
            yield from range(block, min(block + _BLOCK, len(bitmap)), 64)


_BLOCK = 1024
_EMPTY_BLOCK = bytes(_BLOCK)
