"""Page faults of the second dimension, in the order and with the names of KVM's mmu.c."""

from __future__ import annotations

import dataclasses
import enum
from errno import EFAULT
from typing import TYPE_CHECKING

from pykvm.abi import CData, Gfn, Gpa, lib
from pykvm.abi.errors import KvmError
from pykvm.mmu import spte as sptes
from pykvm.mmu.pages import commit_zap

if TYPE_CHECKING:
    from pykvm.kvm.memslots import Memslot, Memslots
    from pykvm.kvm.vcpu import Vcpu
    from pykvm.mmu import Mmu
    from pykvm.mmu.tdp import Tdp


class RetPf(enum.Enum):
    """What became of a fault (enum RET_PF_*)."""

    RETRY = enum.auto()
    FIXED = enum.auto()
    SPURIOUS = enum.auto()
    EMULATE = enum.auto()


@dataclasses.dataclass(slots=True)
class PageFault:
    """One fault while it is looked at (struct kvm_page_fault)."""

    gpa: Gpa
    write: bool
    fetch: bool
    slots: Memslots
    goal_level: int = sptes.PG_LEVEL_4K

    @property
    def gfn(self) -> Gfn:
        """Frame of the access."""
        return Gfn(self.gpa >> 12)


class MemoryFault(KvmError):
    """The host has no memory for a frame: KVM_RUN fails with EFAULT and KVM_EXIT_MEMORY_FAULT."""

    def __init__(self, gpa: Gpa, why: str) -> None:
        """Report the frame of `gpa`."""
        super().__init__(EFAULT, why)
        self.memory_fault = (gpa & ~0xFFF, 0x1000, 0)


def tdp_page_fault(mmu: Mmu, vcpu: Vcpu, gpa: Gpa, qualification: int) -> RetPf:
    """Make the access possible, or say that it has to be emulated.

    Errors:
        EFAULT  the slot's host memory is not mapped, or not writable for a write
    """
    fault = PageFault(
        gpa,
        bool(qualification & lib.CPU_EPT_WRITE),
        bool(qualification & lib.CPU_EPT_FETCH),
        mmu.memslots(vcpu),
    )
    tdp = mmu.tdp_of(vcpu)
    slot = fault.slots.gfn_to_memslot(fault.gfn)
    if slot is None:
        return _noslot_fault(mmu, tdp, fault)
    if fault.write and slot.readonly:
        vcpu.cpu.ctl.emulate_gfn = fault.gfn
        return RetPf.EMULATE
    fixed = fast_page_fault(mmu, tdp, fault, slot)
    return fixed or _direct_page_fault(mmu, tdp, fault, slot)


def _noslot_fault(mmu: Mmu, tdp: Tdp, fault: PageFault) -> RetPf:
    """Remember that there is no memory: from now on the processor tells MMIO by itself."""
    with mmu.lock:
        if mmu.is_stale(fault.slots):
            return RetPf.RETRY
        tdp.map(fault.gfn, sptes.PG_LEVEL_4K, sptes.make_mmio_spte(fault.gfn, fault.slots.generation))
    mmu.stat.pf_mmio_spte_created += 1
    return RetPf.EMULATE


def fast_page_fault(mmu: Mmu, tdp: Tdp, fault: PageFault, slot: Memslot) -> RetPf | None:
    """Give the write right back to an entry that lost it to dirty logging only, or see a stale fault."""
    with mmu.lock:
        if mmu.is_stale(fault.slots):
            return RetPf.RETRY
        found = tdp.find(fault.gfn)
        if found is None:
            return None
        sptep, spte, level = found
        if not fault.write or spte & sptes.W:
            mmu.stat.pf_spurious += 1
            return RetPf.SPURIOUS
        if level > sptes.PG_LEVEL_4K or not spte & sptes.MMU_WRITABLE:
            return None
        return _make_writable(mmu, sptep, spte, fault, slot)


def _make_writable(mmu: Mmu, sptep: CData, spte: int, fault: PageFault, slot: Memslot) -> RetPf:
    # The bit goes into the log before the guest can write: a reader of the log must not miss it.
    slot.mark_page_dirty(fault.gfn)
    if not lib.spte_cmpxchg(sptep, spte, spte | sptes.W):
        return RetPf.RETRY
    mmu.stat.pf_fast += 1
    return RetPf.FIXED


def _direct_page_fault(mmu: Mmu, tdp: Tdp, fault: PageFault, slot: Memslot) -> RetPf:
    hva = slot.hva(fault.gfn)
    host_writable = bool(lib.host_probe(hva, 1, 1)) and not slot.readonly
    if not host_writable and (fault.write or not lib.host_probe(hva, 1, 0)):
        raise MemoryFault(fault.gpa, f"no host memory at {hva:#x} behind gpa {fault.gpa:#x}")
    fault.goal_level = max_mapping_level(slot, fault.gfn, host_writable=host_writable)
    with mmu.lock:
        if mmu.is_stale(fault.slots):
            return RetPf.RETRY
        flush = _direct_map(mmu, tdp, fault, slot, host_writable=host_writable)
        zapped = mmu.pages.take_zapped()
    if flush:
        mmu.flush_remote_tlbs()
    commit_zap(zapped)
    return RetPf.FIXED


def _direct_map(mmu: Mmu, tdp: Tdp, fault: PageFault, slot: Memslot, *, host_writable: bool) -> bool:
    # While the slot logs, only a write may map a page writable: it is the write that is logged.
    writable = host_writable and (fault.write or not slot.logging)
    if writable:
        slot.mark_page_dirty(fault.gfn)
    base = fault.gfn & ~(sptes.pages_per(fault.goal_level) - 1)
    spte = sptes.make_spte(
        slot.hva(base), fault.goal_level, writable=writable, host_writable=host_writable
    )
    flush = tdp.map(fault.gfn, fault.goal_level, spte)
    mmu.stat.pf_fixed += 1
    return flush


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

