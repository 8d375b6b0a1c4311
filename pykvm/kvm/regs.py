"""General, segment and control registers, and the copies of them in kvm_run.

A call that fails has changed nothing: everything is checked, then everything is written.
"""

from __future__ import annotations

import struct
from errno import EINVAL
from functools import cache
from typing import TYPE_CHECKING

from pykvm.abi import CData, ffi, lib, uapi
from pykvm.abi.errors import KvmError
from pykvm.abi.ioctl import In, Out, vcpu_ioctl
from pykvm.kvm.caps import capability
from pykvm.kvm.events import get_vcpu_events, set_vcpu_events
from pykvm.kvm.exits import note_rip

if TYPE_CHECKING:
    from pykvm.kvm.vcpu import Vcpu

capability("KVM_CAP_SYNC_REGS", uapi.KVM_SYNC_X86_VALID_FIELDS)

# struct kvm_regs: the processor has the registers in the order of their encoding, then rip, rflags.
_REGS = struct.Struct("<18Q")
_GUEST = struct.Struct("<16Q16x2Q")
_GUEST_OFFSET = ffi.offsetof("struct vmcs", "guest")
# gpr[16] and gpr[17] are the processor's own: see cpu.h.

# struct kvm_segment: base, limit, selector, then type to padding as bytes.
_KVM_SEGMENT = struct.Struct("<QIH10s")
_CPU_SEGMENT = struct.Struct("<QIIH6x")
# cs ds es fs gs ss tr ldt, as struct kvm_sregs has them.
SREGS_ORDER = (
    lib.CPU_SEG_CS,
    lib.CPU_SEG_DS,
    lib.CPU_SEG_ES,
    lib.CPU_SEG_FS,
    lib.CPU_SEG_GS,
    lib.CPU_SEG_SS,
    lib.CPU_SEG_TR,
    lib.CPU_SEG_LDTR,
)
# Bits of the type that are always set.  Intel's processors want what old clients leave clear
# (vmx.c __vmx_set_segment); AMD's take it, and give back some as if set (svm.c svm_get_segment).
_INTEL_CORRECTED = dict.fromkeys(set(SREGS_ORDER) - {lib.CPU_SEG_LDTR}, uapi.SEG_TYPE_ACCESSED)
_AMD_CORRECTED = {
    **dict.fromkeys((lib.CPU_SEG_DS, lib.CPU_SEG_ES, lib.CPU_SEG_FS, lib.CPU_SEG_GS), uapi.SEG_TYPE_ACCESSED),
    lib.CPU_SEG_TR: 2,
}
_SEGMENTS = ffi.offsetof("struct vmcs", "guest", "seg")
_APIC_BASE_RESERVED = 0x2FF
_RESET_CS_BASE = 0xFFFF_0000
_PDPTE_RESERVED = 0x1E6
_CR8_RESERVED = ~0xF


# ---- KVM_GET_REGS, KVM_SET_REGS ------------------------------------------------------------------


@vcpu_ioctl("KVM_GET_REGS", Out("struct kvm_regs"))
def get_regs(vcpu: Vcpu) -> CData:
    """Return the sixteen general registers, rip and rflags.

    Errors: none
    Source: api.rst 4.11; x86.c kvm_arch_vcpu_ioctl_get_regs
    """
    out = ffi.new("struct kvm_regs *")
    read_regs(vcpu, out)
    return out


def read_regs(vcpu: Vcpu, out: CData) -> None:
    """Fill a struct kvm_regs."""
    ax, cx, dx, bx, sp, bp, si, di, *rest = _GUEST.unpack_from(vcpu.cpu.memory, _GUEST_OFFSET)
    _REGS.pack_into(ffi.buffer(out, _REGS.size), 0, ax, bx, cx, dx, si, di, sp, bp, *rest)
    if vcpu.debug.control & uapi.KVM_GUESTDBG_SINGLESTEP:
        # The client's steps hide the guest's own: x86.c kvm_get_rflags.
        out.rflags &= ~uapi.X86_EFLAGS_TF


@vcpu_ioctl("KVM_SET_REGS", In("struct kvm_regs"))
def set_regs(vcpu: Vcpu, new: CData) -> int:
    """Set the sixteen general registers, rip and rflags, whatever they are.

    A pending exception is dropped: it belonged to where the guest was.

    Errors: none
    Source: api.rst 4.12; x86.c __set_regs
    """
    note_rip(vcpu)
    ax, bx, cx, dx, si, di, sp, bp, *rest = _REGS.unpack_from(ffi.buffer(new, _REGS.size))
    *extended, rip, rflags = rest
    guest = vcpu.cpu.guest
    gpr = vcpu.cpu.gpr
    for number, value in enumerate((ax, cx, dx, bx, sp, bp, si, di, *extended)):
        gpr[number] = value
    guest.rip = rip
    guest.rflags = rflags | uapi.X86_EFLAGS_FIXED
    vcpu.events.exception_pending = False
    vcpu.events.requested = True
    # VM86, and AC with SMAP, are part of what the processor derives its mode from.
    vcpu.cpu.state_changed()
    return 0


# ---- segments ------------------------------------------------------------------------------------


@cache
def _segment_bytes(ar: int) -> bytes:
    """Return type, present, dpl, db, s, l, g, avl, unusable, padding of struct kvm_segment."""
    unusable = ar >> 16 & 1
    # vmx.c vmx_get_segment: what is usable is present, and the other way round.
    present = 1 - unusable
    dpl, db, s = ar >> 5 & 3, ar >> 14 & 1, ar >> 4 & 1
    long, g, avl = ar >> 13 & 1, ar >> 15 & 1, ar >> 12 & 1
    return bytes((ar & 15, present, dpl, db, s, long, g, avl, unusable, 0))


@cache
def _access_rights(flags: bytes) -> int:
    """Return cpu_seg.ar of the same ten bytes (vmx_segment_access_rights)."""
    kind, present, dpl, db, s, long, g, avl, unusable, _ = flags
    ar = kind & 15 | (s & 1) << 4 | (dpl & 3) << 5 | (present & 1) << 7 | (avl & 1) << 12
    ar |= (long & 1) << 13 | (db & 1) << 14 | (g & 1) << 15
    return ar | (lib.CPU_AR_UNUSABLE if unusable or not present else 0)


def _read_segments(vcpu: Vcpu, out: memoryview) -> None:
    memory = vcpu.cpu.memory
    for at, segment in enumerate(SREGS_ORDER):
        base, limit, ar, selector = _CPU_SEGMENT.unpack_from(memory, _SEGMENTS + segment * _CPU_SEGMENT.size)
        flags = _segment_bytes(ar)
        _KVM_SEGMENT.pack_into(out, at * _KVM_SEGMENT.size, base, limit, selector, flags)


def _write_segments(vcpu: Vcpu, new: memoryview) -> None:
    memory = vcpu.cpu.memory
    corrected = _AMD_CORRECTED if vcpu.vm.processor.is_amd else _INTEL_CORRECTED
    for at, segment in enumerate(SREGS_ORDER):
        base, limit, selector, flags = _KVM_SEGMENT.unpack_from(new, at * _KVM_SEGMENT.size)
        ar = _access_rights(flags) | corrected.get(segment, 0)
        offset = _SEGMENTS + segment * _CPU_SEGMENT.size
        _CPU_SEGMENT.pack_into(memory, offset, base, limit, ar, selector)


# ---- KVM_GET_SREGS, KVM_SET_SREGS, and their second versions -------------------------------------


@vcpu_ioctl("KVM_GET_SREGS", Out("struct kvm_sregs"))
def get_sregs(vcpu: Vcpu) -> CData:
    """Return segment, table and control registers, EFER, the APIC base and an interrupt on its way.

    Errors: none
    Source: api.rst 4.13; x86.c __get_sregs
    """
    out = ffi.new("struct kvm_sregs *")
    read_sregs(vcpu, out)
    return out


def read_sregs(vcpu: Vcpu, out: CData) -> None:
    """Fill a struct kvm_sregs."""
    _read_common(vcpu, out)
    events = vcpu.events
    for word in range(len(out.interrupt_bitmap)):
        out.interrupt_bitmap[word] = 0
    if events.interrupt_injected and not events.interrupt_soft:
        nr = events.interrupt_nr
        out.interrupt_bitmap[nr >> 6] = 1 << (nr & 63)


def _read_common(vcpu: Vcpu, out: CData) -> None:
    guest = vcpu.cpu.guest
    _read_segments(vcpu, memoryview(ffi.buffer(out)))
    for to, table in ((out.gdt, guest.gdtr), (out.idt, guest.idtr)):
        to.base, to.limit = table.base, table.limit & 0xFFFF
    out.cr0, out.cr2, out.cr3, out.cr4 = guest.cr0, guest.cr2, guest.cr3, guest.cr4
    out.cr8, out.efer, out.apic_base = guest.cr8, guest.efer, vcpu.apic_base


@vcpu_ioctl("KVM_SET_SREGS", In("struct kvm_sregs"))
def set_sregs(vcpu: Vcpu, new: CData) -> int:
    """Set segment, table and control registers, EFER and the APIC base; queue the lowest interrupt given.

    With PAE paging the PDPTEs are read from guest memory.  Descriptors and EFER's bits are taken as
    they are.

    Errors:
        EINVAL  CR0 with reserved high bits, PG without PE or NW without CD; CR4 with bits that the
                guest's CPUID does not have; EFER.LME and CR0.PG without CR4.PAE and EFER.LMA, or with a
                CR3 beyond the physical address width; EFER.LMA or a 64-bit CS without both;
                an APIC base with reserved bits
    Source: api.rst 4.14; x86.c __set_sregs, __set_sregs_common, kvm_is_valid_sregs
    """
    _check_sregs(vcpu, new)
    _write_common(vcpu, new)
    if is_pae_paging(vcpu):
        load_pdptrs(vcpu)
    bitmap = int.from_bytes(bytes(ffi.buffer(new.interrupt_bitmap)), "little")
    if bitmap:
        vcpu.events.queue_interrupt((bitmap & -bitmap).bit_length() - 1)
    return 0


@vcpu_ioctl("KVM_GET_SREGS2", Out("struct kvm_sregs2"), cap="KVM_CAP_SREGS2")
def get_sregs2(vcpu: Vcpu) -> CData:
    """Return what KVM_GET_SREGS does but the interrupt, and with PAE paging the PDPTEs in use.

    Errors: none
    Source: api.rst 4.132; x86.c __get_sregs2
    """
    out = ffi.new("struct kvm_sregs2 *")
    _read_common(vcpu, out)
    if is_pae_paging(vcpu):
        out.flags = uapi.KVM_SREGS2_FLAGS_PDPTRS_VALID
        for at in range(4):
            out.pdptrs[at] = vcpu.cpu.guest.pdptr[at]
    return out


@vcpu_ioctl("KVM_SET_SREGS2", In("struct kvm_sregs2"), cap="KVM_CAP_SREGS2")
def set_sregs2(vcpu: Vcpu, new: CData) -> int:
    """Set what KVM_SET_SREGS does but the interrupt, with the PDPTEs given instead of those in memory.

    Errors:
        EINVAL  unknown flags; PDPTEs without PAE paging; what KVM_SET_SREGS refuses
    Source: api.rst 4.133; x86.c __set_sregs2
    """
    flags = new.flags
    valid = flags & uapi.KVM_SREGS2_FLAGS_PDPTRS_VALID
    if flags & ~uapi.KVM_SREGS2_FLAGS_PDPTRS_VALID:
        raise KvmError(EINVAL, f"unknown flags {flags:#x}")
    pae = new.cr0 & uapi.X86_CR0_PG and new.cr4 & uapi.X86_CR4_PAE and not new.efer & uapi.EFER_LMA
    if valid and not pae:
        raise KvmError(EINVAL, "PDPTEs without PAE paging")
    _check_sregs(vcpu, new)
    _write_common(vcpu, new)
    if valid:
        for at in range(4):
            vcpu.cpu.guest.pdptr[at] = new.pdptrs[at]
        vcpu.cpu.flush_tlb()
    elif is_pae_paging(vcpu):
        load_pdptrs(vcpu)
    return 0


def is_pae_paging(vcpu: Vcpu) -> bool:
    """Say if the guest pages with PAE outside long mode: its four PDPTEs are latched."""
    guest = vcpu.cpu.guest
    return bool(
        guest.cr0 & uapi.X86_CR0_PG and guest.cr4 & uapi.X86_CR4_PAE and not guest.efer & uapi.EFER_LMA
    )


def load_pdptrs(vcpu: Vcpu) -> bool:
    """Latch the PDPTEs at CR3; False, and nothing latched, when one is invalid or not in memory."""
    guest = vcpu.cpu.guest
    raw = vcpu.vm.read_guest(guest.cr3 & 0xFFFF_FFE0, 32, vcpu.as_id)
    if raw is None:
        return False
    pdptes = struct.unpack("<4Q", raw)
    reserved = vcpu.cpuid.reserved_gpa_bits | _PDPTE_RESERVED
    if any(pdpte & uapi.PT_PRESENT_MASK and pdpte & reserved for pdpte in pdptes):
        return False
    for at, pdpte in enumerate(pdptes):
        guest.pdptr[at] = pdpte
    vcpu.cpu.flush_tlb()
    return True


def _check_sregs(vcpu: Vcpu, new: CData) -> None:
    cr0, cr4, efer = new.cr0, new.cr4, new.efer
    if efer & uapi.EFER_LME and cr0 & uapi.X86_CR0_PG:
        if not cr4 & uapi.X86_CR4_PAE or not efer & uapi.EFER_LMA:
            raise KvmError(EINVAL, "EFER.LME and CR0.PG without CR4.PAE or EFER.LMA")
        if new.cr3 & vcpu.cpuid.reserved_gpa_bits:
            raise KvmError(EINVAL, f"cr3 {new.cr3:#x} is beyond the physical address width")
    elif efer & uapi.EFER_LMA or new.cs.l:
        raise KvmError(EINVAL, "EFER.LMA or 64-bit code without EFER.LME and CR0.PG")
    _check_cr0(cr0)
    if cr4 & ~vcpu.cpu.ctl.cr4_valid:
        raise KvmError(EINVAL, f"cr4 {cr4:#x}: bits {cr4 & ~vcpu.cpu.ctl.cr4_valid:#x} are not to be set")
    check_apic_base(vcpu, new.apic_base)


def is_valid_cr0(cr0: int) -> bool:
    """Say if CR0 can be this value at all (kvm_is_valid_cr0)."""
    try:
        _check_cr0(cr0)
    except KvmError:
        return False
    return True


def _check_cr0(cr0: int) -> None:
    if cr0 >> 32:
        raise KvmError(EINVAL, f"cr0 {cr0:#x}: high bits are reserved")
    if cr0 & uapi.X86_CR0_NW and not cr0 & uapi.X86_CR0_CD:
        raise KvmError(EINVAL, "CR0.NW without CD")
    if cr0 & uapi.X86_CR0_PG and not cr0 & uapi.X86_CR0_PE:
        raise KvmError(EINVAL, "CR0.PG without PE")


def check_apic_base(vcpu: Vcpu, base: int) -> None:
    """Raise EINVAL for an APIC base that not even the client may set (kvm_apic_set_base)."""
    if base == vcpu.apic_base:
        return
    reserved = vcpu.cpuid.reserved_gpa_bits | _APIC_BASE_RESERVED
    if not vcpu.cpuid.has("X2APIC"):
        reserved |= uapi.X2APIC_ENABLE
    if base & reserved:
        raise KvmError(EINVAL, f"APIC base {base:#x}: bits {base & reserved:#x} are reserved")
    if base & uapi.X2APIC_ENABLE and not base & uapi.MSR_IA32_APICBASE_ENABLE:
        raise KvmError(EINVAL, f"APIC base {base:#x}: x2APIC mode of a disabled APIC")


def _write_common(vcpu: Vcpu, new: CData) -> None:
    note_rip(vcpu)
    guest = vcpu.cpu.guest
    for table, given in ((guest.gdtr, new.gdt), (guest.idtr, new.idt)):
        table.base, table.limit = given.base, given.limit
    guest.cr0, guest.cr2, guest.cr3, guest.cr4 = new.cr0, new.cr2, new.cr3, new.cr4
    if not new.cr8 & _CR8_RESERVED:
        guest.cr8 = new.cr8
    guest.efer = new.efer
    vcpu.apic_base = new.apic_base
    _write_segments(vcpu, memoryview(ffi.buffer(new)))
    vcpu.cpu.state_changed()
    vcpu.cpu.flush_tlb()
    vcpu.vm.mmu.reset_context(vcpu)
    # Older clients reset a processor so and expect it to run.
    cs = new.cs
    reset_vector = guest.rip == 0xFFF0 and cs.selector == 0xF000 and cs.base == _RESET_CS_BASE
    if vcpu.is_bsp and reset_vector and not new.cr0 & uapi.X86_CR0_PE:
        vcpu.mp_state = uapi.KVM_MP_STATE_RUNNABLE


# ---- kvm_run.s.regs ------------------------------------------------------------------------------


def store_sync_regs(vcpu: Vcpu) -> None:
    """Copy what kvm_valid_regs asks for into kvm_run (store_regs)."""
    valid, regs = vcpu.kvm_run.kvm_valid_regs, vcpu.kvm_run.s.regs
    if valid & uapi.KVM_SYNC_X86_REGS:
        read_regs(vcpu, ffi.addressof(regs, "regs"))
    if valid & uapi.KVM_SYNC_X86_SREGS:
        read_sregs(vcpu, ffi.addressof(regs, "sregs"))
    if valid & uapi.KVM_SYNC_X86_EVENTS:
        regs.events = get_vcpu_events(vcpu)[0]


def load_sync_regs(vcpu: Vcpu) -> None:
    """Take what kvm_dirty_regs says the client changed in kvm_run; each class is taken once.

    Errors:
        EINVAL  registers that KVM_SET_SREGS or KVM_SET_VCPU_EVENTS would refuse
    Source: x86.c sync_regs
    """
    kvm_run = vcpu.kvm_run
    # A copy: the client may write to the shared page while it is being checked.
    regs = ffi.new("struct kvm_sync_regs *", kvm_run.s.regs)
    for bit, member, setter in (
        (uapi.KVM_SYNC_X86_REGS, "regs", set_regs),
        (uapi.KVM_SYNC_X86_SREGS, "sregs", set_sregs),
        (uapi.KVM_SYNC_X86_EVENTS, "events", set_vcpu_events),
    ):
        if kvm_run.kvm_dirty_regs & bit:
            setter(vcpu, ffi.addressof(regs, member))
            kvm_run.kvm_dirty_regs &= ~bit
