"""KVM's MMU: what the processor's tables hold, and when that has to change.

`direct` is two-dimensional paging, `shadow` shadow paging; `new_mmu` makes one of them.  Both
build their tables as the guest faults and take them apart when slots, dirty logging, the client's
host memory or, for `shadow`, the guest's own tables change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pykvm.mmu.base import KVM_MIN_ALLOC_MMU_PAGES, MemoryFault, Mmu, RetPf
from pykvm.mmu.direct import TdpMmu
from pykvm.mmu.shadow import ShadowMmu
from pykvm.mmu.stat import VcpuStat, VmStat

if TYPE_CHECKING:
    from pykvm.kvm.vm import Vm

__all__ = [
    "KVM_MIN_ALLOC_MMU_PAGES",
    "MemoryFault",
    "Mmu",
    "RetPf",
    "ShadowMmu",
    "TdpMmu",
    "VcpuStat",
    "VmStat",
    "new_mmu",
]


def new_mmu(vm: Vm, *, tdp: bool = True) -> Mmu:
    """Return the MMU of a new VM: two-dimensional, or shadow paging with `tdp` off (ept=0)."""
    return TdpMmu(vm) if tdp else ShadowMmu(vm)
