"""System management mode: SMIs, the state save map in SMRAM, and RSM.

In SMM a vCPU runs on address space 1.  The map is AMD's of a 64-bit processor if the guest's CPUID has
long mode, else the old one of 32 bits, at SMBASE + 0xfe00.  Auto-HALT and I/O restart are not done, and
their fields stay 0.
"""

from __future__ import annotations

import struct
from errno import EIO
from types import MappingProxyType
from typing import TYPE_CHECKING

from pykvm.abi import CData, lib, uapi
from pykvm.abi.errors import KvmError
from pykvm.abi.ioctl import Ignored, vcpu_ioctl
from pykvm.kvm import debug, regs
from pykvm.kvm.events import get_interrupt_shadow, set_interrupt_shadow
from pykvm.kvm.exits import RESUME, Outcome, on_exit
from pykvm.kvm.msr import invalid, msr

if TYPE_CHECKING:
    from pykvm.kvm.vcpu import Vcpu

_SMRAM = 0xFE00
_SMRAM_BYTES = 0x200
_ENTRY_RIP = 0x8000
_MASK32 = 0xFFFF_FFFF
_MASK64 = 0xFFFF_FFFF_FFFF_FFFF
_AR_BITS = 0xFFFF
# Flat, writable, accessed data of ring 0, even for CS: smm.c enter_smm.
_FLAT = 3 | lib.CPU_AR_S | lib.CPU_AR_P | lib.CPU_AR_G

_ES, _CS, _SS, _DS, _FS, _GS, _LDTR, _TR = (
    lib.CPU_SEG_ES,
    lib.CPU_SEG_CS,
    lib.CPU_SEG_SS,
    lib.CPU_SEG_DS,
    lib.CPU_SEG_FS,
    lib.CPU_SEG_GS,
    lib.CPU_SEG_LDTR,
    lib.CPU_SEG_TR,
)

# ---- the maps: offsets from SMBASE + 0xfe00 ------------------------------------------------------
# smm.h struct kvm_smram_state_64; AMD APM vol. 2 table 10-1.

_SEGMENTS_64 = MappingProxyType(
    {_ES: 0x00, _CS: 0x10, _SS: 0x20, _DS: 0x30, _FS: 0x40, _GS: 0x50, _LDTR: 0x70, _TR: 0x90}
)
_SEGMENT_64 = struct.Struct("<HHIQ")  # selector, attributes, limit, base
_GDTR_64, _IDTR_64 = 0x60, 0x80
_INT_SHADOW_64 = 0xCB
_REVISION_AT = 0xFC
_REVISION_64, _REVISION_32 = 0x0002_0064, 0x0002_0000
_SMBASE_64 = 0x100
_EFER_64 = 0xD0
_WORDS_64 = MappingProxyType(
    {"cr4": 0x148, "cr3": 0x150, "cr0": 0x158, "dr7": 0x160, "dr6": 0x168, "rflags": 0x170, "rip": 0x178}
)
# R15 first, RAX last.
_GPRS_64 = 0x180

# struct kvm_smram_state_32; SDM vol. 3 table 31-1 has the parts that Intel documents.
_SEGMENTS_32 = MappingProxyType(
    {
        _DS: (0x12C, 0x1B4),
        _FS: (0x138, 0x1B8),
        _GS: (0x144, 0x1BC),
        _TR: (0x15C, 0x1C4),
        _LDTR: (0x178, 0x1C0),
        _ES: (0x184, 0x1A8),
        _CS: (0x190, 0x1AC),
        _SS: (0x19C, 0x1B0),
    }
)
_SEGMENT_32 = struct.Struct("<III")  # flags, limit, base
_IDTR_32, _GDTR_32 = 0x150, 0x16C
_SMBASE_32 = 0xF8
_INT_SHADOW_32 = 0x11A
_WORDS_32 = MappingProxyType(
    {"cr4": 0x114, "dr7": 0x1C8, "dr6": 0x1CC, "rip": 0x1F0, "rflags": 0x1F4, "cr3": 0x1F8, "cr0": 0x1FC}
)
_GPRS_32 = 0x1D0


def _words(vcpu: Vcpu) -> dict[str, int]:
    guest = vcpu.cpu.guest
    words = {name: getattr(guest, name) for name in ("cr0", "cr3", "cr4", "dr6", "rflags", "rip")}
    return {**words, "dr7": debug.get_dr7(vcpu)}


def _save_64(vcpu: Vcpu) -> bytes:
    guest, image = vcpu.cpu.guest, bytearray(_SMRAM_BYTES)
    for number, at in _SEGMENTS_64.items():
        segment = guest.seg[number]
        _SEGMENT_64.pack_into(image, at, segment.selector, segment.ar & _AR_BITS, segment.limit, segment.base)
    for table, at in ((guest.gdtr, _GDTR_64), (guest.idtr, _IDTR_64)):
        _SEGMENT_64.pack_into(image, at, 0, 0, table.limit, table.base)
    for name, value in _words(vcpu).items():
        struct.pack_into("<Q", image, _WORDS_64[name], value)
    struct.pack_into("<16Q", image, _GPRS_64, *reversed(vcpu.cpu.gpr))
    struct.pack_into("<Q", image, _EFER_64, guest.efer)
    struct.pack_into("<I", image, _SMBASE_64, vcpu.smbase & _MASK32)
    struct.pack_into("<I", image, _REVISION_AT, _REVISION_64)
    image[_INT_SHADOW_64] = get_interrupt_shadow(guest)
    return bytes(image)


def _save_32(vcpu: Vcpu) -> bytes:
    guest, image = vcpu.cpu.guest, bytearray(_SMRAM_BYTES)
    for number, (at, selector) in _SEGMENTS_32.items():
        segment = guest.seg[number]
        flags = (segment.ar & _AR_BITS) << 8
        _SEGMENT_32.pack_into(image, at, flags, segment.limit, segment.base & _MASK32)
        struct.pack_into("<I", image, selector, segment.selector)
    for table, at in ((guest.gdtr, _GDTR_32), (guest.idtr, _IDTR_32)):
        _SEGMENT_32.pack_into(image, at, 0, table.limit, table.base & _MASK32)
    for name, value in _words(vcpu).items():
        struct.pack_into("<I", image, _WORDS_32[name], value & _MASK32)
    struct.pack_into("<8I", image, _GPRS_32, *(value & _MASK32 for value in vcpu.cpu.gpr[:8]))
    struct.pack_into("<I", image, _SMBASE_32, vcpu.smbase & _MASK32)
    struct.pack_into("<I", image, _REVISION_AT, _REVISION_32)
    image[_INT_SHADOW_32] = get_interrupt_shadow(guest)
    return bytes(image)


# ---- into it -------------------------------------------------------------------------------------


def inject_smi(vcpu: Vcpu, *, can_inject: bool) -> bool:
    """Enter SMM for a pending SMI if that is possible now; say if other events still are.

    In SMM an SMI waits for RSM, and behind an event that is being delivered it comes at once.
    Errors:
        EIO  there is no memory for the state at SMBASE: the VM is dead
    Source: x86.c kvm_check_and_inject_events, smm.c enter_smm
    """
    if vcpu.as_id:
        return can_inject
    if not can_inject:
        # Delivery of the event comes first in the processor; then it is out again at once.
        vcpu.events.requested = True
        vcpu.cpu.kick()
        return False
    vcpu.events.smi_pending = False
    vcpu.msrs.values[uapi.MSR_SMI_COUNT] = vcpu.msrs.get(uapi.MSR_SMI_COUNT) + 1 & _MASK64
    _enter(vcpu)
    return False


def _enter(vcpu: Vcpu) -> None:
    guest, long_mode = vcpu.cpu.guest, vcpu.cpuid.has("LM")
    image = _save_64(vcpu) if long_mode else _save_32(vcpu)
    vcpu.smm_changed(entering=True)
    if not vcpu.vm.write_guest(vcpu.smbase + _SMRAM, image, vcpu.as_id):
        vcpu.vm.die()
        raise KvmError(EIO, f"no memory at {vcpu.smbase + _SMRAM:#x} to save the state in")
    vcpu.smm_inside_nmi = bool(guest.interruptibility & lib.CPU_BLOCK_NMI)
    set_interrupt_shadow(guest, 0)
    guest.interruptibility |= lib.CPU_BLOCK_NMI
    guest.rflags, guest.rip = uapi.X86_EFLAGS_FIXED, _ENTRY_RIP
    guest.cr0 &= ~(uapi.X86_CR0_PE | uapi.X86_CR0_EM | uapi.X86_CR0_TS | uapi.X86_CR0_PG)
    guest.cr4 = 0
    # Undocumented, and relied on: an interrupt in SMM before SMM code has an IDT is a shutdown.
    guest.idtr.base = guest.idtr.limit = 0
    debug.set_dr7(vcpu, uapi.DR7_FIXED_1)
    for number in (_ES, _CS, _SS, _DS, _FS, _GS):
        segment = guest.seg[number]
        segment.selector = vcpu.smbase >> 4 & 0xFFFF if number == _CS else 0
        segment.base = vcpu.smbase if number == _CS else 0
        segment.limit, segment.ar = _MASK32, _FLAT
    if long_mode:
        guest.efer = 0
    _changed(vcpu)


def _changed(vcpu: Vcpu) -> None:
    vcpu.cpu.state_changed()
    vcpu.cpu.flush_tlb()
    vcpu.vm.mmu.reset_context(vcpu)


@vcpu_ioctl("KVM_SMI", Ignored(), cap="KVM_CAP_X86_SMM")
def smi(vcpu: Vcpu) -> int:
    """Queue an SMI; several that wait are one.

    Errors: none
    Source: api.rst 4.96; x86.c kvm_arch_vcpu_ioctl, smm.h kvm_inject_smi
    """
    vcpu.events.smi_pending = True
    vcpu.events.requested = True
    return 0


# ---- out of it -----------------------------------------------------------------------------------


@on_exit(lib.EXIT_RSM)
def handle_rsm(vcpu: Vcpu) -> Outcome:
    """Leave SMM; #UD outside it, a shutdown when what SMRAM says is no state of a processor.

    Source: emulate.c em_rsm, smm.c emulator_leave_smm
    """
    if not vcpu.as_id:
        vcpu.events.queue_exception(vcpu, uapi.UD_VECTOR)
        return RESUME
    image = vcpu.vm.read_guest(vcpu.smbase + _SMRAM, _SMRAM_BYTES, vcpu.as_id)
    if not vcpu.smm_inside_nmi:
        vcpu.cpu.guest.interruptibility &= ~lib.CPU_BLOCK_NMI
    vcpu.smm_changed(entering=False)
    if image is None or not _leave(vcpu, image):
        vcpu.events.triple_fault = True
    return RESUME


def _leave(vcpu: Vcpu, image: bytes) -> bool:
    long_mode = vcpu.cpuid.has("LM")
    offsets, form = (_WORDS_64, "<Q") if long_mode else (_WORDS_32, "<I")
    words: dict[str, int] = {name: struct.unpack_from(form, image, at)[0] for name, at in offsets.items()}
    efer = struct.unpack_from("<Q", image, _EFER_64)[0] if long_mode else vcpu.cpu.guest.efer
    if not _is_valid(vcpu, words, efer):
        return False
    guest = vcpu.cpu.guest
    guest.efer = efer & ~uapi.EFER_LMA
    if efer & uapi.EFER_LME and words["cr0"] & uapi.X86_CR0_PG:
        guest.efer |= uapi.EFER_LMA
    guest.cr0, guest.cr3, guest.cr4 = words["cr0"], words["cr3"], words["cr4"]
    guest.rip, guest.rflags = words["rip"], words["rflags"] | uapi.X86_EFLAGS_FIXED
    guest.dr6 = words["dr6"] & debug.DR6_VOLATILE | uapi.DR6_ACTIVE_LOW
    debug.set_dr7(vcpu, words["dr7"] & uapi.DR7_VOLATILE | uapi.DR7_FIXED_1)
    (_load_64 if long_mode else _load_32)(vcpu, image)
    _changed(vcpu)
    return not regs.is_pae_paging(vcpu) or regs.load_pdptrs(vcpu)


def _is_valid(vcpu: Vcpu, words: dict[str, int], efer: int) -> bool:
    """Say if the guest could have these control registers (rsm_enter_protected_mode)."""
    cr0, cr3, cr4 = words["cr0"], words["cr3"], words["cr4"]
    ctl, paging = vcpu.cpu.ctl, bool(cr0 & uapi.X86_CR0_PG)
    long_mode = paging and bool(efer & uapi.EFER_LME)
    return not (
        words["dr6"] >> 32
        or words["dr7"] >> 32
        or efer & ~uapi.EFER_LMA & ~ctl.efer_valid
        or cr4 & ~ctl.cr4_valid
        or not regs.is_valid_cr0(cr0)
        or (long_mode and not cr4 & uapi.X86_CR4_PAE)
        or (long_mode and cr3 & vcpu.cpuid.reserved_gpa_bits)
        or (cr4 & uapi.X86_CR4_PCIDE and not long_mode)
    )


def _load_64(vcpu: Vcpu, image: bytes) -> None:
    guest = vcpu.cpu.guest
    for number, at in _SEGMENTS_64.items():
        selector, attributes, limit, base = _SEGMENT_64.unpack_from(image, at)
        _load_segment(guest.seg[number], selector, attributes, limit, base)
    for table, at in ((guest.gdtr, _GDTR_64), (guest.idtr, _IDTR_64)):
        _, _, table.limit, table.base = _SEGMENT_64.unpack_from(image, at)
    for number, value in enumerate(reversed(struct.unpack_from("<16Q", image, _GPRS_64))):
        vcpu.cpu.gpr[number] = value
    (vcpu.smbase,) = struct.unpack_from("<I", image, _SMBASE_64)
    set_interrupt_shadow(guest, image[_INT_SHADOW_64])


def _load_32(vcpu: Vcpu, image: bytes) -> None:
    guest = vcpu.cpu.guest
    for number, (at, selector_at) in _SEGMENTS_32.items():
        flags, limit, base = _SEGMENT_32.unpack_from(image, at)
        (selector,) = struct.unpack_from("<I", image, selector_at)
        _load_segment(guest.seg[number], selector & 0xFFFF, flags >> 8, limit, base)
    for table, at in ((guest.gdtr, _GDTR_32), (guest.idtr, _IDTR_32)):
        _, table.limit, table.base = _SEGMENT_32.unpack_from(image, at)
    for number, value in enumerate(struct.unpack_from("<8I", image, _GPRS_32)):
        vcpu.cpu.gpr[number] = value
    (vcpu.smbase,) = struct.unpack_from("<I", image, _SMBASE_32)
    set_interrupt_shadow(guest, image[_INT_SHADOW_32])


def _load_segment(segment: CData, selector: int, attributes: int, limit: int, base: int) -> None:
    segment.selector, segment.limit, segment.base = selector, limit, base
    # What is not present cannot be used: rsm_set_seg_flags.
    unusable = 0 if attributes & lib.CPU_AR_P else lib.CPU_AR_UNUSABLE
    segment.ar = attributes & ~0xF00 & _AR_BITS | unusable


# ---- where SMRAM is ------------------------------------------------------------------------------


@msr(uapi.MSR_IA32_SMBASE, save=True)
def smbase(vcpu: Vcpu, index: int, host: bool) -> int:
    """SMBASE, which only a client can read and write here; a guest changes it in SMRAM."""
    del index
    if not host:
        raise invalid()
    return vcpu.smbase


@smbase.writer
def _write_smbase(vcpu: Vcpu, index: int, data: int, host: bool) -> None:
    del index
    if not host:
        raise invalid()
    vcpu.smbase = data
