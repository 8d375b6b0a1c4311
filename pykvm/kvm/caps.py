"""Capabilities: what KVM_CHECK_EXTENSION answers and what KVM_ENABLE_CAP takes.

A capability that announces an ioctl is 1 when the registry offers that ioctl: nothing to keep in
step.  Others are stated here, or beside the code they are about, with `capability`, `vm_cap` and
`vcpu_cap`.  What nobody states is 0, as on a kernel without the feature.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from errno import EINVAL
from typing import TYPE_CHECKING, TypeAlias

from pykvm.abi import CData, capabilities, uapi
from pykvm.abi.errors import KvmError
from pykvm.abi.ioctl import REGISTRY, In, RegistryError, Value, system_ioctl, vcpu_ioctl, vm_ioctl

if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.kvm.system import System
    from pykvm.kvm.vcpu import Vcpu
    from pykvm.kvm.vm import Vm

# A number, or what computes it for the VM asked, or for the System when /dev/kvm is asked.  Both
# have an attribute `system`.
Answer: TypeAlias = "int | Callable[[Vm | System], int]"
Args: TypeAlias = tuple[int, int, int, int]
EnableVm: TypeAlias = "Callable[[Vm, Args], int]"
EnableVcpu: TypeAlias = "Callable[[Vcpu, Args], int]"


@dataclass(slots=True)
class Cap:
    """One capability; answer None: 1 as soon as an ioctl or an enable function names it.

    `any_flags`: KVM_ENABLE_CAP does not look at the flags.
    """

    name: str
    number: int
    answer: Answer | None = None
    enable_vm: EnableVm | None = None
    enable_vcpu: EnableVcpu | None = None
    any_flags: bool = False


CAPS: dict[int, Cap] = {number: Cap(name, number) for name, number in capabilities().items()}


def _row(name: str) -> Cap:
    number = capabilities().get(name)
    if number is None:
        msg = f"{name}: no such capability in include/pykvm/kvm.h"
        raise RegistryError(msg)
    return CAPS[number]


def capability(name: str, value: Answer) -> None:
    """State what KVM_CHECK_EXTENSION answers for a capability."""
    row = _row(name)
    if row.answer is not None:
        msg = f"{name} is stated twice"
        raise RegistryError(msg)
    row.answer = value


def vm_cap(
    name: str, value: Answer | None = None, *, any_flags: bool = False
) -> Callable[[EnableVm], EnableVm]:
    """Register what KVM_ENABLE_CAP on a VM does: ``enable(vm, args) -> int``, args being 4 numbers."""

    def register(func: EnableVm) -> EnableVm:
        row = _row(name)
        if row.enable_vm is not None:
            msg = f"{name} has two enable functions"
            raise RegistryError(msg)
        row.enable_vm = func
        row.any_flags = any_flags
        if value is not None:
            capability(name, value)
        return func

    return register


def vcpu_cap(name: str, value: Answer | None = None) -> Callable[[EnableVcpu], EnableVcpu]:
    """Register what KVM_ENABLE_CAP on a vCPU does: ``enable(vcpu, args) -> int``."""

    def register(func: EnableVcpu) -> EnableVcpu:
        row = _row(name)
        if row.enable_vcpu is not None:
            msg = f"{name} has two enable functions"
            raise RegistryError(msg)
        row.enable_vcpu = func
        if value is not None:
            capability(name, value)
        return func

    return register


def _announced(row: Cap) -> int:
    if row.enable_vm is not None or row.enable_vcpu is not None:
        return 1
    return int(any(ioctl.cap == row.name and not ioctl.absent for ioctl in REGISTRY.values()))


def check_extension(of: Vm | System, number: int) -> int:
    """Return the answer for a capability number; 0 for what is not there and for what nobody knows."""
    row = CAPS.get(number)
    if row is None:
        return 0
    return of.system.kernel.capability(row.name, lambda: _as_built(of, row))


def _as_built(of: Vm | System, row: Cap) -> int:
    if row.answer is None:
        row.answer = _announced(row)
    return row.answer if isinstance(row.answer, int) else int(row.answer(of))


# ---- the ioctls ----------------------------------------------------------------------------------


@system_ioctl("KVM_CHECK_EXTENSION", Value())
def system_check_extension(system: System, cap: int) -> int:
    """Say if there is a capability: 0 no, 1 yes, or the number it stands for.

    Errors: none
    Source: api.rst 4.4; kvm_main.c kvm_vm_ioctl_check_extension_generic, x86.c kvm_vm_ioctl_check_extension
    """
    return check_extension(system, cap)


@vm_ioctl("KVM_CHECK_EXTENSION", Value(), cap="KVM_CAP_CHECK_EXTENSION_VM")
def vm_check_extension(vm: Vm, cap: int) -> int:
    """Say if this VM has a capability: 0 no, 1 yes, or the number it stands for.

    Errors: none
    Source: api.rst 4.4; kvm_main.c kvm_vm_ioctl_check_extension_generic, x86.c kvm_vm_ioctl_check_extension
    """
    return check_extension(vm, cap)


def _enable_args(request: CData, row: Cap | None) -> Args:
    if request.flags and not (row is not None and row.any_flags):
        raise KvmError(EINVAL, f"flags {request.flags:#x}, must be 0")
    a, b, c, d = request.args
    return a, b, c, d


@vm_ioctl("KVM_ENABLE_CAP", In("struct kvm_enable_cap"), cap="KVM_CAP_ENABLE_CAP_VM")
def vm_enable_cap(vm: Vm, request: CData) -> int:
    """Turn a capability of the VM on, or set it.

    Errors:
        EINVAL  flags; a capability that does not exist or cannot be enabled on a VM; its arguments
        E2BIG   KVM_CAP_DIRTY_LOG_RING: larger than a ring can be
        EPERM   KVM_CAP_VM_DISABLE_NX_HUGE_PAGES without CAP_SYS_BOOT
        ENXIO   KVM_CAP_X86_APIC_BUS_CYCLES_NS: there is no local APIC in the kernel
    Source: api.rst 4.37 and 7; kvm_main.c kvm_vm_ioctl_enable_cap_generic, x86.c kvm_vm_ioctl_enable_cap
    """
    row = CAPS.get(request.cap)
    args = _enable_args(request, row)
    if row is None or row.enable_vm is None or not vm.kernel.can_enable(row.name):
        raise KvmError(EINVAL, f"capability {row.name if row else request.cap} cannot be enabled on a VM")
    return row.enable_vm(vm, args)


@vcpu_ioctl("KVM_ENABLE_CAP", In("struct kvm_enable_cap"), cap="KVM_CAP_ENABLE_CAP")
def vcpu_enable_cap(vcpu: Vcpu, request: CData) -> int:
    """Turn a capability of the vCPU on.

    Errors:
        EINVAL  flags; a capability that does not exist or cannot be enabled on a vCPU; its arguments
    Source: api.rst 4.37 and 6; x86.c kvm_vcpu_ioctl_enable_cap
    """
    row = CAPS.get(request.cap)
    args = _enable_args(request, None)
    if row is None or row.enable_vcpu is None or not vcpu.vm.kernel.can_enable(row.name):
        raise KvmError(EINVAL, f"capability {row.name if row else request.cap} cannot be enabled on a vCPU")
    return row.enable_vcpu(vcpu, args)


# ---- what no ioctl announces ---------------------------------------------------------------------


def _recommended_vcpus(of: Vm | System) -> int:
    limits = of.system.kernel.limits
    return limits.soft_vcpus or min(os.cpu_count() or 1, limits.vcpus)


capability("KVM_CAP_NR_VCPUS", _recommended_vcpus)
capability("KVM_CAP_MAX_VCPUS", lambda of: of.system.kernel.limits.vcpus)
capability("KVM_CAP_NR_MEMSLOTS", lambda of: of.system.kernel.limits.memslots)
capability("KVM_CAP_VM_TYPES", 1 << uapi.KVM_X86_DEFAULT_VM)
# A host mapping that changes is seen by the guest: translations name host virtual pages.
capability("KVM_CAP_SYNC_MMU", 1)
capability("KVM_CAP_READONLY_MEM", 1)
for _name in (
    "KVM_CAP_HLT",
    "KVM_CAP_NOP_IO_DELAY",
    "KVM_CAP_DESTROY_MEMORY_REGION_WORKS",
    "KVM_CAP_JOIN_MEMORY_REGIONS_WORKS",
    "KVM_CAP_INTERNAL_ERROR_DATA",
    "KVM_CAP_PCI_SEGMENT",
    "KVM_CAP_IMMEDIATE_EXIT",
    "KVM_CAP_LAST_CPU",
    "KVM_CAP_MEMORY_FAULT_INFO",
):
    capability(_name, 1)
