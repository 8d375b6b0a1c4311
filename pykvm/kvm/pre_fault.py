"""KVM_PRE_FAULT_MEMORY: guest memory is mapped before the guest asks for it."""

from __future__ import annotations

from errno import EFAULT, EINTR, EINVAL, ENOENT, EOPNOTSUPP
from typing import TYPE_CHECKING

from pykvm.abi import CData, lib
from pykvm.abi.errors import KvmError
from pykvm.abi.ioctl import InOut, vcpu_ioctl
from pykvm.kvm.caps import capability
from pykvm.kvm.exits import memory_fault
from pykvm.kvm.signals import signal_pending
from pykvm.mmu import MemoryFault, RetPf, TdpMmu
from pykvm.mmu import spte as sptes

if TYPE_CHECKING:
    from pykvm.kvm.system import System
    from pykvm.kvm.vcpu import Vcpu
    from pykvm.kvm.vm import Vm

_PAGE_SIZE = 4096
_MASK64 = 0xFFFF_FFFF_FFFF_FFFF


def _has_tdp(of: Vm | System) -> int:
    return int("no-tdp" not in of.system.extensions)


capability("KVM_CAP_PRE_FAULT_MEMORY", _has_tdp)


@vcpu_ioctl("KVM_PRE_FAULT_MEMORY", InOut("struct kvm_pre_fault_memory"), cap="KVM_CAP_PRE_FAULT_MEMORY")
def pre_fault_memory(vcpu: Vcpu, wanted: CData) -> int:
    """Map guest memory as a read by the vCPU would; gpa and size are moved behind what has been mapped.

    It is no error if only the start of the range could be mapped.

    Errors:
        EINVAL      flags; gpa or size not page-aligned; size 0; gpa + size wraps around
        ENOENT      no slot
        EFAULT      the slot's host memory is not there (exit_reason KVM_EXIT_MEMORY_FAULT)
        EINTR       a signal is pending
        EOPNOTSUPP  shadow paging
    Source: api.rst 4.143; kvm_main.c kvm_vcpu_pre_fault_memory, mmu.c kvm_arch_vcpu_pre_fault_memory
    """
    if wanted.flags:
        raise KvmError(EINVAL, f"flags {wanted.flags:#x}, must be 0")
    gpa, size = int(wanted.gpa), int(wanted.size)
    if gpa % _PAGE_SIZE or size % _PAGE_SIZE or (gpa + size & _MASK64) <= gpa:
        raise KvmError(EINVAL, f"no range of pages: {gpa:#x}, {size:#x}")
    mmu = vcpu.vm.mmu
    if not isinstance(mmu, TdpMmu):
        raise KvmError(EOPNOTSUPP, "shadow paging has no second-level tables")
    # Handlers run afterwards, as the kernel would have it; which signals count says the thread's own mask.
    blocked = lib.signals_block()
    vcpu.signal_mask = blocked
    try:
        return _map_range(vcpu, mmu, wanted)
    finally:
        lib.signals_restore(blocked)


def _map_range(vcpu: Vcpu, mmu: TdpMmu, wanted: CData) -> int:
    size = wanted.size
    mmu.load(vcpu)
    while wanted.size:
        try:
            _check_signal(vcpu)
            done = min(int(wanted.size), _map(vcpu, mmu, int(wanted.gpa)))
        except KvmError:
            if wanted.size != size:
                return 0
            raise
        wanted.gpa += done
        wanted.size -= done
    return 0


def _check_signal(vcpu: Vcpu) -> None:
    if signal_pending(vcpu):
        raise KvmError(EINTR, "a signal is pending")


def _map(vcpu: Vcpu, mmu: TdpMmu, gpa: int) -> int:
    """Map what is at gpa; return how many bytes are mapped from there on."""
    while True:
        try:
            result = mmu.page_fault(vcpu, gpa, lib.CPU_EPT_READ)
        except MemoryFault as fault:
            memory_fault(vcpu, *fault.memory_fault)
            raise KvmError(EFAULT, fault.why) from fault
        if result is RetPf.EMULATE:
            raise KvmError(ENOENT, f"no slot at {gpa:#x}")
        found = mmu.tdp_of(vcpu).find(gpa >> 12) if result is not RetPf.RETRY else None
        if found is not None:
            size = sptes.pages_per(found[2]) << 12
            return size - gpa % size
