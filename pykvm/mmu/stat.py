"""Statistics, by the names and in the order of KVM's binary statistics (arch/x86/kvm/x86.c).

What a vCPU's exits count is not here: the processor counts them itself, see kvm/stats.py.
"""

from __future__ import annotations

import dataclasses

from pykvm.mmu import spte as sptes


@dataclasses.dataclass(slots=True)
class VmStat:
    """What the MMU counts for a VM; pages_*, mmu_unsync, nx_lpage_splits go down, too; max_* are peaks."""

    remote_tlb_flush: int = 0
    remote_tlb_flush_requests: int = 0
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
    nx_lpage_splits: int = 0
    max_mmu_rmap_size: int = 0
    max_mmu_page_hash_collisions: int = 0

    def count_page(self, level: int, delta: int) -> None:
        """Count a leaf spte of `level` that came or went."""
        if level == sptes.PG_LEVEL_4K:
            self.pages_4k += delta
        elif level == sptes.PG_LEVEL_2M:
            self.pages_2m += delta
        else:
            self.pages_1g += delta


@dataclasses.dataclass(slots=True)
class VcpuStat:
    """What the module counts for a vCPU, the MMU's first."""

    pf_taken: int = 0
    pf_fixed: int = 0
    pf_emulate: int = 0
    pf_spurious: int = 0
    pf_fast: int = 0
    pf_mmio_spte_created: int = 0
    pf_guest: int = 0
    tlb_flush: int = 0
    invlpg: int = 0
    signal_exits: int = 0
    request_irq_exits: int = 0
    host_state_reload: int = 0
    req_event: int = 0
    halt_wakeup: int = 0
    halt_wait_ns: int = 0
    blocking: int = 0
    directed_yield_attempted: int = 0
    directed_yield_successful: int = 0
    preemption_reported: int = 0
    preemption_other: int = 0
    guest_mode: int = 0


MMU_VCPU_STATS = (
    "pf_taken",
    "pf_fixed",
    "pf_emulate",
    "pf_spurious",
    "pf_fast",
    "pf_mmio_spte_created",
    "pf_guest",
    "tlb_flush",
    "invlpg",
)
