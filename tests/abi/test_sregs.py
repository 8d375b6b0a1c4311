"""Segment and control registers: what may be set, and that a refusal changes nothing."""

from __future__ import annotations

import struct
from errno import EINVAL
from typing import TYPE_CHECKING, Any

import pytest

from pykvm import uapi
from pykvm.abi import to_bytes
from tests.machine import Machine, cpuid_list, emulated

if TYPE_CHECKING:
    from pykvm.abi import CData

PE, PG, NW, CD = uapi.X86_CR0_PE, uapi.X86_CR0_PG, uapi.X86_CR0_NW, uapi.X86_CR0_CD
PAE = uapi.X86_CR4_PAE
LME, LMA = uapi.EFER_LME, uapi.EFER_LMA
RESET_CR0 = 0x6000_0010
SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")


def put(registers: CData, **values: Any) -> CData:
    """Set members; `cs_l` is member l of member cs."""
    for name, value in values.items():
        holder, _, member = name.rpartition("_")
        if holder in SEGMENTS:
            setattr(getattr(registers, holder), member, value)
        else:
            setattr(registers, name, value)
    return registers


def with_supported_cpuid(machine: Machine) -> None:
    cpuid = cpuid_list(256)
    machine.ioctl(machine.kvm, uapi.KVM_GET_SUPPORTED_CPUID, cpuid)
    machine.do(uapi.KVM_SET_CPUID2, cpuid)


def segment_of(segment: CData) -> tuple[int, ...]:
    s = segment
    return s.selector, s.base, s.limit, s.type, s.present, s.dpl, s.db, s.s, s.l, s.g, s.avl, s.unusable


@pytest.mark.spec("vcpu.GET_SREGS", "vcpu.reset_state")
def test_reset(machine: Machine) -> None:
    sregs = machine.sregs
    assert segment_of(sregs.cs) == (0xF000, 0xFFFF0000, 0xFFFF, 0xB, 1, 0, 0, 1, 0, 0, 0, 0)
    for name in ("ds", "es", "fs", "gs", "ss"):
        assert segment_of(getattr(sregs, name)) == (0, 0, 0xFFFF, 3, 1, 0, 0, 1, 0, 0, 0, 0)
    assert segment_of(sregs.tr) == (0, 0, 0xFFFF, 0xB, 1, 0, 0, 0, 0, 0, 0, 0)
    assert segment_of(sregs.ldt) == (0, 0, 0xFFFF, 2, 1, 0, 0, 0, 0, 0, 0, 0)
    assert (sregs.gdt.base, sregs.gdt.limit, sregs.idt.base, sregs.idt.limit) == (0, 0xFFFF, 0, 0xFFFF)
    control = (sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, sregs.cr8, sregs.efer)
    assert control == (RESET_CR0, 0, 0, 0, 0, 0)
    assert sregs.apic_base == 0xFEE00900
    assert not any(sregs.interrupt_bitmap)


@pytest.mark.spec("vcpu.SET_SREGS", "vcpu.GET_SREGS")
def test_what_was_set_is_read_back(machine: Machine) -> None:
    sregs = machine.sregs
    for n, name in enumerate(SEGMENTS):
        segment = getattr(sregs, name)
        segment.base, segment.limit, segment.selector = 0x1000 * n, 0x10000 + n, 8 * n
        segment.dpl, segment.g, segment.avl, segment.db = n & 3, n & 1, 1, n >> 1 & 1
    put(sregs, cr2=0xDEADBEEF000, cr3=0x7000, cr8=5, cr4=0x620)
    put(sregs.gdt, base=0x1234, limit=0x57)
    put(sregs.idt, base=0x4321, limit=0x75)
    machine.set_sregs(sregs)
    assert to_bytes(machine.sregs) == to_bytes(sregs)


@pytest.mark.spec("vcpu.SET_SREGS")
def test_a_segment_that_is_not_present_is_unusable(machine: Machine) -> None:
    emulated(machine, "keeps both bits, as AMD does")
    machine.set_sregs(put(machine.sregs, fs_present=0, gs_unusable=1))
    sregs = machine.sregs
    assert (sregs.fs.present, sregs.fs.unusable) == (0, 1)
    assert (sregs.gs.present, sregs.gs.unusable) == (0, 1)


ILLEGAL = {
    "PG without PE": {"cr0": PG | CD},
    "NW without CD": {"cr0": NW},
    "CR0 bit 32": {"cr0": 1 << 32 | RESET_CR0},
    "CR4 bit 15": {"cr4": 1 << 15},
    "CR4 bit 63": {"cr4": 1 << 63},
    "CR4.VMXE": {"cr4": uapi.X86_CR4_VMXE},
    "LME and PG without PAE": {"cr0": PG | PE, "efer": LME | LMA, "cs_l": 1},
    "LME and PG without LMA": {"cr0": PG | PE, "cr4": PAE, "efer": LME},
    "LMA without LME": {"cr0": PG | PE, "cr4": PAE, "efer": LMA},
    "LMA without PG": {"efer": LME | LMA},
    "64-bit CS outside long mode": {"cs_l": 1},
    "CR3 beyond the address width": {"cr0": PG | PE, "cr4": PAE, "efer": LME | LMA, "cr3": 1 << 52},
    "APIC base bit 0": {"apic_base": 0xFEE00901},
    "APIC base beyond the address width": {"apic_base": 1 << 52 | 0xFEE00900},
    "x2APIC without CPUID": {"apic_base": 0xFEE00D00},
    "x2APIC of a disabled APIC": {"apic_base": 0xFEE00500},
}


@pytest.mark.spec("vcpu.SET_SREGS", "vcpu.SET_SREGS2")
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("values", ILLEGAL.values(), ids=ILLEGAL)
def test_illegal_states_change_nothing(machine: Machine, values: dict[str, int], version: int) -> None:
    get, set_, struct_name = {
        1: (uapi.KVM_GET_SREGS, uapi.KVM_SET_SREGS, "kvm_sregs"),
        2: (uapi.KVM_GET_SREGS2, uapi.KVM_SET_SREGS2, "kvm_sregs2"),
    }[version]
    before = machine.get(get, struct_name)
    sregs = put(machine.get(get, struct_name), cr2=0x5555, ds_base=0x7777, **values)
    assert machine.errno(set_, sregs) == EINVAL
    assert to_bytes(machine.get(get, struct_name)) == to_bytes(before)


LEGAL = {
    "CR0.PE": {"cr0": PE | 0x10},
    "CR0 bit 7": {"cr0": 0x90},
    "CR4 that is always there": {"cr4": 0x7FF},
    "LME before paging": {"efer": LME},
    "unknown EFER bits": {"efer": 1 << 20},
    "a disabled APIC": {"apic_base": 0xFEE00100},
    "an APIC elsewhere": {"apic_base": 0xFEC00900},
}


@pytest.mark.spec("vcpu.SET_SREGS")
@pytest.mark.parametrize("values", LEGAL.values(), ids=LEGAL)
def test_legal_states_are_kept(machine: Machine, values: dict[str, int]) -> None:
    machine.set_sregs(put(machine.sregs, **values))
    sregs = machine.sregs
    assert {name: getattr(sregs, name) for name in values} == values


@pytest.mark.spec("cpuid.governs", "vcpu.SET_SREGS", "cpu.cr_writes")
def test_cr4_bits_follow_the_guests_cpuid(machine: Machine) -> None:
    smep = uapi.X86_CR4_SMEP
    machine.set_sregs(put(machine.sregs, cr4=smep))  # no CPUID: what the processor can
    machine.set_sregs(put(machine.sregs, cr4=0))
    emulated(machine, "knows the host's CR4 only")
    cpuid = cpuid_list(1)
    cpuid.entries[0].eax = 1
    machine.do(uapi.KVM_SET_CPUID2, cpuid)
    assert machine.errno(uapi.KVM_SET_SREGS, put(machine.sregs, cr4=smep)) == EINVAL
    with_supported_cpuid(machine)
    machine.set_sregs(put(machine.sregs, cr4=smep))
    assert machine.sregs.cr4 == smep


@pytest.mark.spec("vcpu.SET_SREGS")
def test_cr3_keeps_its_low_bits_in_long_mode(machine: Machine) -> None:
    with_supported_cpuid(machine)
    values = {"cr0": 0x8005_0033, "cr3": 0x3FFF, "cr4": PAE, "efer": LME | LMA}
    machine.set_sregs(put(machine.sregs, cs_l=1, **values))
    sregs = machine.sregs
    assert {name: getattr(sregs, name) for name in values} == values


@pytest.mark.spec("vcpu.SET_SREGS", "vcpu.GET_SREGS")
def test_the_lowest_interrupt_of_the_bitmap_is_queued(machine: Machine) -> None:
    sregs = machine.sregs
    sregs.interrupt_bitmap[1], sregs.interrupt_bitmap[3] = 1 << 5 | 1 << 9, 1
    machine.set_sregs(sregs)
    events = machine.events
    assert (events.interrupt.injected, events.interrupt.nr) == (1, 69)
    assert list(machine.sregs.interrupt_bitmap) == [0, 1 << 5, 0, 0]
    # Nothing in the bitmap takes nothing back.
    sregs.interrupt_bitmap[1] = sregs.interrupt_bitmap[3] = 0
    machine.set_sregs(sregs)
    assert machine.events.interrupt.injected == 1


# ---- PAE and the second version ------------------------------------------------------------------


def pae(registers: CData, cr3: int) -> CData:
    return put(registers, cr0=PG | PE | 0x10, cr3=cr3, cr4=PAE)


@pytest.mark.spec("vcpu.SET_SREGS", "vcpu.GET_SREGS2")
def test_pdptes_are_read_from_memory(machine: Machine) -> None:
    emulated(machine, "pages in long mode only")
    machine.load(struct.pack("<4Q", 0x4001, 0x5001, 0, 0x7001), 0x2020)
    machine.set_sregs(pae(machine.sregs, 0x2020))
    sregs = machine.get(uapi.KVM_GET_SREGS2, "kvm_sregs2")
    assert sregs.flags == uapi.KVM_SREGS2_FLAGS_PDPTRS_VALID
    assert list(sregs.pdptrs) == [0x4001, 0x5001, 0, 0x7001]
    # Later changes in memory do not matter.
    machine.load(struct.pack("<Q", 0x8001), 0x2020)
    assert machine.get(uapi.KVM_GET_SREGS2, "kvm_sregs2").pdptrs[0] == 0x4001


@pytest.mark.spec("vcpu.SET_SREGS2", "vcpu.GET_SREGS2")
def test_pdptes_are_given(machine: Machine) -> None:
    emulated(machine, "pages in long mode only")
    machine.load(struct.pack("<4Q", 1, 1, 1, 1), 0x2000)
    sregs = pae(machine.get(uapi.KVM_GET_SREGS2, "kvm_sregs2"), 0x2000)
    sregs.flags = uapi.KVM_SREGS2_FLAGS_PDPTRS_VALID
    for at in range(4):
        sregs.pdptrs[at] = 0x4001 + 0x1000 * at
    machine.do(uapi.KVM_SET_SREGS2, sregs)
    assert to_bytes(machine.get(uapi.KVM_GET_SREGS2, "kvm_sregs2")) == to_bytes(sregs)


@pytest.mark.spec("vcpu.SET_SREGS2")
@pytest.mark.parametrize("flags", [1, 2, 1 << 63])
def test_flags_outside_pae_paging_are_refused(machine: Machine, flags: int) -> None:
    sregs = machine.get(uapi.KVM_GET_SREGS2, "kvm_sregs2")
    assert (sregs.flags, list(sregs.pdptrs)) == (0, [0] * 4)
    sregs.flags = flags
    assert machine.errno(uapi.KVM_SET_SREGS2, sregs) == EINVAL
    assert machine.cap(uapi.KVM_CAP_SREGS2) == 1
