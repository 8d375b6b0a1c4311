"""Capabilities that Linux has on every machine, and that there is little to do for here.

They are answered as Linux does, and taken and refused by its rules.
"""

from __future__ import annotations

from errno import EINVAL, ENXIO, EPERM
from pathlib import Path
from typing import TYPE_CHECKING

from pykvm.abi.errors import KvmError
from pykvm.kvm.caps import Args, capability, vm_cap

if TYPE_CHECKING:
    from pykvm.kvm.system import System
    from pykvm.kvm.vm import Vm

_CAP_SYS_BOOT = 1 << 22
# Nanoseconds of a cycle of the local APIC's bus.
_BUS_CYCLE_NS = 1
# What its timer counts at most: a 32-bit count, divided by 128 (lapic.c tmict_to_ns).
_MAX_CYCLES = 0xFFFF_FFFF * 128

# The bit in kvm_run.flags says that an exit came from a guest's guest, of which there are none.
capability("KVM_CAP_X86_GUEST_MODE", 1)
# KVM_EXIT_SYSTEM_EVENT has data; what it tells of on x86 are crashes by Hyper-V's registers, SEV and TDX.
capability("KVM_CAP_SYSTEM_EVENT_DATA", 1)
# Both need a local APIC in the kernel: without it MSR_KVM_ASYNC_PF_EN takes nothing but 0.
capability("KVM_CAP_ASYNC_PF", 1)
capability("KVM_CAP_ASYNC_PF_INT", 1)


def _smaller_maxphyaddr(of: Vm | System) -> int:
    return int("no-tdp" in of.system.extensions)


# The guest's own walk checks addresses against its width; with two-dimensional paging Linux does not say so.
capability("KVM_CAP_SMALLER_MAXPHYADDR", _smaller_maxphyaddr)


def _is_capable() -> bool:
    """Say if this process has CAP_SYS_BOOT."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    effective = next((line.split()[1] for line in lines if line.startswith("CapEff:")), "0")
    return bool(int(effective, 16) & _CAP_SYS_BOOT)


@vm_cap("KVM_CAP_VM_DISABLE_NX_HUGE_PAGES")
def disable_nx_huge_pages(vm: Vm, args: Args) -> int:
    """Do without the mitigation that splits executable large pages, on processors that need it.

    Errors:
        EPERM   no CAP_SYS_BOOT: a guest could bring an affected host down
        EINVAL  args[0] is not 0; a vCPU exists
    Source: api.rst 7.31; x86.c kvm_vm_ioctl_enable_cap
    """
    if not _is_capable():
        raise KvmError(EPERM, "this needs CAP_SYS_BOOT")
    with vm.lock:
        if args[0] or vm.created_vcpus:
            raise KvmError(EINVAL, f"args[0] is {args[0]:#x}, {vm.created_vcpus} vCPUs: both must be 0")
        vm.mmu.nx_huge_pages = False
    return 0


@vm_cap("KVM_CAP_X86_APIC_BUS_CYCLES_NS", _BUS_CYCLE_NS)
def set_apic_bus_cycles(vm: Vm, args: Args) -> int:
    """Set the frequency of the local APIC's timer, for which there has to be one in the kernel.

    Errors:
        EINVAL  0, or so long that the timer's time overflows
        ENXIO   there are no interrupt controllers in the kernel
    Source: api.rst 7.35; x86.c kvm_vm_ioctl_enable_cap
    """
    del vm
    if not args[0] or args[0] * _MAX_CYCLES >> 64:
        raise KvmError(EINVAL, f"a bus cycle of {args[0]} ns")
    raise KvmError(ENXIO, "there is no local APIC in the kernel")
