"""What the MMU needs of the vCPU: exits of shadow paging, and the limit for shadow pages."""

from __future__ import annotations

from errno import EINVAL
from typing import TYPE_CHECKING

from pykvm.abi import lib, uapi
from pykvm.abi.errors import KvmError
from pykvm.abi.ioctl import Ignored, Value, vm_ioctl
from pykvm.kvm import stats
from pykvm.kvm.caps import capability
from pykvm.kvm.exits import (
    HANDLERS,
    RESUME,
    Outcome,
    complete_instruction,
    event_vectoring_error,
    on_exit,
    tpr_lowered,
)
from pykvm.mmu import KVM_MIN_ALLOC_MMU_PAGES, RetPf
from pykvm.mmu.walk import CR0_ROLE_BITS, CR4_ROLE_BITS, Fault

if TYPE_CHECKING:
    from pykvm.kvm.vcpu import Vcpu
    from pykvm.kvm.vm import Vm

capability("KVM_CAP_MMU_SHADOW_CACHE_CONTROL", 1)
_VALID = lib.CPU_EVENT_VALID
_EXIT_NONE = lib.EXIT_NONE
_CR0, _CR3, _CR4, _CR8 = 0, 3, 4, 8
_INVLPG, _INVPCID_ADDRESS, _INVPCID_SINGLE = 0, 1, 2  # what EXIT_INVLPG is of
# An instruction that runs into more watched frames than this has its tables unprotected instead.
_EMULATED_FRAMES = lib.CPU_NR_EMULATE - 1
# SDM vol. 3 4.4.1: what has the PDPTEs read again.
_CR0_PDPTR_BITS = uapi.X86_CR0_CD | uapi.X86_CR0_NW | uapi.X86_CR0_PG
_CR4_PDPTR_BITS = uapi.X86_CR4_PAE | uapi.X86_CR4_PGE | uapi.X86_CR4_PSE | uapi.X86_CR4_SMEP


@on_exit(lib.EXIT_PAGE_FAULT)
def handle_page_fault(vcpu: Vcpu) -> Outcome:
    """Shadow paging: fill the shadow tables, reflect the guest's own fault, or emulate the access.

    Errors:
        EFAULT  the slot's host memory is not there
        ENOSPC  there is no shadow page left
    """
    ex, mmu = vcpu.cpu.exit, vcpu.vm.mmu
    gla = int(ex.gla)
    vectoring = ex.idt_vectoring.info & _VALID
    if vectoring:
        vcpu.events.requeue(vcpu)
    result = mmu.page_fault(vcpu, gla, int(ex.error_code))
    if isinstance(result, Fault):
        vcpu.events.queue_exception(vcpu, uapi.PF_VECTOR, result.error_code, gla)
        return RESUME
    if result is RetPf.WRITE_PROTECTED:
        ctl = vcpu.cpu.ctl
        gfn = int(ctl.emulate[ctl.emulate_count - 1].gfn)
        if vectoring:
            # The delivery of an event cannot be emulated; what it writes to is no table any more, anyway.
            _stop_emulating(vcpu)
            mmu.unprotect_gfn(gfn, vcpu.as_id)
            return RESUME
        return _emulate_table_write(vcpu, gfn)
    if result is not RetPf.EMULATE:
        return RESUME
    if vectoring:
        _stop_emulating(vcpu)
        return event_vectoring_error(vcpu, gla)
    outcome = complete_instruction(vcpu)
    _stop_emulating(vcpu)
    return outcome


def _emulate_table_write(vcpu: Vcpu, gfn: int) -> Outcome:
    """Do an instruction that writes to a watched table (x86_emulate_instruction with EMULTYPE_PF).

    What cannot be done so, because it writes too much or to too many watched frames, finds the table
    unprotected and is executed as any other.
    """
    mmu, frames = vcpu.vm.mmu, 0
    # One at a time, so that a LOCKed instruction is atomic: all writes to watched tables come by here.
    with mmu.lock:
        while True:
            reason = vcpu.cpu.complete()
            if reason == _EXIT_NONE:
                return RESUME
            nested = reason == lib.EXIT_PAGE_FAULT
            frames += nested
            if reason == lib.EXIT_EMULATION or frames > _EMULATED_FRAMES:
                _stop_emulating(vcpu)
                if mmu.unprotect_gfn(gfn, vcpu.as_id):
                    return RESUME
            elif nested:
                ex = vcpu.cpu.exit
                result = mmu.page_fault(vcpu, int(ex.gla), int(ex.error_code))
                if isinstance(result, Fault):
                    _stop_emulating(vcpu)
                    vcpu.events.queue_exception(vcpu, uapi.PF_VECTOR, result.error_code, int(ex.gla))
                    return RESUME
                continue
            outcome = HANDLERS[reason](vcpu)
            _stop_emulating(vcpu)
            return outcome


def _stop_emulating(vcpu: Vcpu) -> None:
    vcpu.cpu.ctl.emulate_count = 0


@on_exit(lib.EXIT_CR_ACCESS)
def handle_cr_access(vcpu: Vcpu) -> Outcome:
    """CR8 was lowered; or, with shadow paging, the tables mean something else now."""
    mmu, ex, guest = vcpu.vm.mmu, vcpu.cpu.exit, vcpu.cpu.guest
    register, old = int(ex.qualification) & 0xF, int(ex.gla)
    if register == _CR8:
        return tpr_lowered(vcpu)
    changed = old ^ int(guest.cr3 if register == _CR3 else guest.cr0 if register == _CR0 else guest.cr4)
    pdptr_bits = {_CR0: _CR0_PDPTR_BITS, _CR4: _CR4_PDPTR_BITS}.get(register)
    if (pdptr_bits is None or changed & pdptr_bits) and not mmu.load_pdptrs(vcpu):
        # The processor wrote the register before anybody could look at the PDPTEs: as if it had not.
        setattr(guest, f"cr{register}", old)
        guest.rip -= ex.insn_len
        vcpu.cpu.state_changed()
        vcpu.events.inject_gp(vcpu)
        return RESUME
    if register == _CR3:
        mmu.new_cr3(vcpu, noflush=bool(ex.qualification & lib.CPU_CR3_NOFLUSH))
    elif changed & (CR0_ROLE_BITS if register == _CR0 else CR4_ROLE_BITS):
        mmu.paging_changed(vcpu)
    elif register == _CR4 and changed & (uapi.X86_CR4_PGE | uapi.X86_CR4_PCIDE):
        mmu.flush_tlb_guest(vcpu)
    return RESUME


@on_exit(lib.EXIT_INVLPG)
def handle_invlpg(vcpu: Vcpu) -> Outcome:
    """Shadow paging: the guest has changed a translation, or those of a PCID (kvm_handle_invpcid)."""
    ex, mmu = vcpu.cpu.exit, vcpu.vm.mmu
    how, gla, pcid = int(ex.qualification), int(ex.gla), int(ex.gpa)
    if how == _INVLPG:
        mmu.invlpg(vcpu, gla)
    elif how == _INVPCID_ADDRESS:
        mmu.invpcid_gva(vcpu, gla, pcid)
    elif how == _INVPCID_SINGLE:
        mmu.invalidate_pcid(vcpu, pcid)
    else:
        mmu.flush_tlb_guest(vcpu)
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
        vm.n_requested_mmu_pages = count
        vm.mmu.set_limit(count)
    stats.refresh(vm)
    return 0


@vm_ioctl("KVM_GET_NR_MMU_PAGES", Ignored(), cap="KVM_CAP_MMU_SHADOW_CACHE_CONTROL", removed="6.4")
def get_nr_mmu_pages(vm: Vm) -> int:
    """Return the limit for shadow pages: as set, or one for every fifty pages of memory.

    Errors: none
    Source: api.txt 4.47 of old kernels; x86.c kvm_vm_ioctl_get_nr_mmu_pages
    """
    if vm.n_requested_mmu_pages:
        return vm.n_requested_mmu_pages & 0x7FFF_FFFF
    npages = sum(slot.npages for slots in vm.memslots for slot in slots.ordered)
    return max(KVM_MIN_ALLOC_MMU_PAGES, npages // 50) if npages else 0
