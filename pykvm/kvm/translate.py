"""KVM_TRANSLATE: where a linear address of the guest's leads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pykvm.abi import CData, uapi
from pykvm.abi.ioctl import InOut, vcpu_ioctl
from pykvm.mmu.guest import GuestTables
from pykvm.mmu.walk import Access, Walk, paging_of, walk_addr

if TYPE_CHECKING:
    from pykvm.kvm.vcpu import Vcpu

_INVALID_GPA = 0xFFFF_FFFF_FFFF_FFFF
_OFFSET = 0xFFF


def gva_to_gpa(vcpu: Vcpu, gla: int) -> int | None:
    """Return what a read by the system finds at a linear address; None: a page fault.

    As any walk of KVM's it sets A bits.
    """
    guest = vcpu.cpu.guest
    if not guest.cr0 & uapi.X86_CR0_PG:
        return gla
    paging = paging_of(guest, vcpu.cpuid.has("GBPAGES"), vcpu.cpuid.maxphyaddr)
    want = Access(ac=bool(guest.rflags & uapi.X86_EFLAGS_AC))
    tables = GuestTables(vcpu.vm, vcpu.as_id)
    found = walk_addr(paging, gla, want, tables)
    return (found.gfn << 12) | gla & _OFFSET if isinstance(found, Walk) else None


@vcpu_ioctl("KVM_TRANSLATE", InOut("struct kvm_translation"))
def translate(vcpu: Vcpu, translation: CData) -> int:
    """Walk the guest's page tables for a linear address; without paging it is the physical one.

    writeable is always 1 and usermode always 0.

    Errors: none
    Source: api.rst 4.15; x86.c kvm_arch_vcpu_ioctl_translate
    """
    gpa = gva_to_gpa(vcpu, translation.linear_address)
    translation.physical_address = _INVALID_GPA if gpa is None else gpa
    # Without paging the highest address is no address, either.
    translation.valid = translation.physical_address != _INVALID_GPA
    translation.writeable = 1
    translation.usermode = 0
    return 0
