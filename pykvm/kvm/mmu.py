"""What the MMU needs of the vCPU: exits of shadow paging, and the limit for shadow pages."""

from __future__ import annotations

from errno import EINVAL
from typing import TYPE_CHECKING

from pykvm.abi import lib, uapi
from pykvm.abi.errors import KvmError
from pykvm.abi.ioctl import Value, vm_ioctl
from pykvm.kvm.caps import capability
from pykvm.kvm.exits import (
    NO_GFN,
    RESUME,
    Outcome,
    complete_instruction,
    event_vectoring_error,
    on_exit,
    tpr_lowered,
)
from pykvm.mmu import KVM_MIN_ALLOC_MMU_PAGES, RetPf
from pykvm.mmu.walk import Fault

if TYPE_CHECKING:
    from pykvm.kvm.vcpu import Vcpu
    from pykvm.kvm.vm import Vm

capability("KVM_CAP_MMU_SHADOW_CACHE_CONTROL", 1)
_VALID = lib.CPU_EVENT_VALID
_CR3, _CR8 = 3, 8


@on_exit(lib.EXIT_PAGE_FAULT)
def handle_page_fault(vcpu: Vcpu) -> Outcome:
    """Shadow paging: fill the shadow tables, reflect the guest's own fault, or emulate the access.

    Errors:
        EFAULT  the slot's host memory is not there
    """
    ex, ctl = vcpu.cpu.exit, vcpu.cpu.ctl
    gla = int(ex.gla)
    vectoring = ex.idt_vectoring.info & _VALID
    if vectoring:
        vcpu.events.requeue(vcpu)
    result = vcpu.vm.mmu.page_fault(vcpu, gla, int(ex.error_code))
    if isinstance(result, Fault):
        vcpu.events.queue_exception(vcpu, uapi.PF_VECTOR, result.error_code, gla)
        return RESUME
    if result is not RetPf.EMULATE:
        return RESUME
    if vectoring:
        ctl.emulate_gfn = NO_GFN
        return event_vectoring_error(vcpu, gla)
    outcome = complete_instruction(vcpu)
    ctl.emulate_gfn = NO_GFN
    return outcome


@on_exit(lib.EXIT_CR_ACCESS)
def handle_cr_access(vcpu: Vcpu) -> Outcome:
    """CR8 was lowered; or, with shadow paging, the tables mean something else now."""
    mmu, ex = vcpu.vm.mmu, vcpu.cpu.exit
    register = int(ex.qualification)
    if register == _CR8:
        return tpr_lowered(vcpu)
    if not mmu.load_pdptrs(vcpu):
        # The processor wrote the register before anybody could look at the PDPTEs.
        vcpu.cpu.guest.rip -= ex.insn_len
        vcpu.events.inject_gp(vcpu)
    if register == _CR3:
        mmu.new_cr3(vcpu)
    else:
        mmu.reset_context(vcpu)
    return RESUME


@on_exit(lib.EXIT_INVLPG)
def handle_invlpg(vcpu: Vcpu) -> Outcome:
    """Shadow paging: the guest has changed a translation; INVPCID counts as a write to CR3."""
    ex, mmu = vcpu.cpu.exit, vcpu.vm.mmu
    if ex.qualification:
        mmu.new_cr3(vcpu)
    else:
        mmu.invlpg(vcpu, int(ex.gla))
    return RESUME


@vm_ioctl("KVM_SET_NR_MMU_PAGES", Value(), cap="KVM_CAP_MMU_SHADOW_CACHE_CONTROL")
def set_nr_mmu_pages(vm: Vm, count: int) -> int:
    """Limit the shadow pages of the VM; what is above the limit is zapped now.

    count: pages of 512 entries each.

    Errors:
        EINVAL  below 64
    Source: api.rst 4.45; x86.c kvm_vm_ioctl_set_nr_mmu_pages
    """
    if count < KVM_MIN_ALLOC_MMU_PAGES:
        raise KvmError(EINVAL, f"{count} shadow pages: at least {KVM_MIN_ALLOC_MMU_PAGES}")
    with vm.slots_lock:
        vm.mmu.set_limit(count)
    return 0
