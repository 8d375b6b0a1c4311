"""CPUID: the supported table, a guest's table, the instruction."""

from __future__ import annotations

import mmap
import struct
from errno import E2BIG, EINVAL
from typing import TYPE_CHECKING

import pytest

from pykvm import uapi
from pykvm.abi import ffi, lib, to_bytes
from pykvm.kvm import cpuid, offer, profile
from pykvm.kvm.cpuid import FEATURES, SUPPORTED_CPUID, WORDS
from tests.abi.test_run import long_mode
from tests.machine import Machine, cpuid_list, emulated, errno_of

if TYPE_CHECKING:
    from pykvm.abi import CData

HLT = b"\xf4"
CPUID = b"\x0f\xa2"
SIGNIFICANT = uapi.KVM_CPUID_FLAG_SIGNIFCANT_INDEX
Registers = tuple[int, int, int, int]
# ebx, ecx, edx of leaf 0.
INTEL = (0x756E6547, 0x6C65746E, 0x49656E69)
AMD = (0x68747541, 0x444D4163, 0x69746E65)


def supported(machine: Machine) -> CData:
    cpuid = cpuid_list(256)
    machine.ioctl(machine.kvm, uapi.KVM_GET_SUPPORTED_CPUID, cpuid)
    return cpuid


def leaf_of(cpuid: CData, function: int, index: int = 0) -> Registers | None:
    for at in range(cpuid.nent):
        entry = cpuid.entries[at]
        if (entry.function, entry.index) == (function, index):
            return entry.eax, entry.ebx, entry.ecx, entry.edx
    return None


def give(machine: Machine, *leaves: tuple[int, int | None, Registers]) -> CData:
    """Set a table; leaves are (function, index or None for any, registers)."""
    cpuid = cpuid_list(len(leaves))
    for at, (function, index, registers) in enumerate(leaves):
        entry = cpuid.entries[at]
        entry.function, entry.index = function, index or 0
        entry.flags = 0 if index is None else SIGNIFICANT
        entry.eax, entry.ebx, entry.ecx, entry.edx = registers
    machine.do(uapi.KVM_SET_CPUID2, cpuid)
    return cpuid


def guest(machine: Machine, function: int, index: int = 0, prologue: bytes = b"") -> Registers:
    """Return what CPUID gives the guest."""
    machine.start(prologue + CPUID + HLT, rax=function, rcx=index)
    assert machine.go() == uapi.KVM_EXIT_HLT
    regs = machine.regs
    return regs.rax, regs.rbx, regs.rcx, regs.rdx


# ---- the lists -----------------------------------------------------------------------------------


@pytest.mark.spec("sys.GET_SUPPORTED_CPUID")
def test_too_little_room_does_not_tell_how_much(machine: Machine) -> None:
    cpuid, request = cpuid_list(256), uapi.KVM_GET_SUPPORTED_CPUID
    for room in (0, 1):
        cpuid.nent = room
        assert errno_of(lambda: machine.ioctl(machine.kvm, request, cpuid)) == E2BIG
        assert cpuid.nent == room
    cpuid.nent = 256
    machine.ioctl(machine.kvm, request, cpuid)
    count = cpuid.nent
    assert 10 < count < 256
    cpuid.nent = count - 1
    assert errno_of(lambda: machine.ioctl(machine.kvm, request, cpuid)) == E2BIG
    cpuid.nent = 100_000
    machine.ioctl(machine.kvm, request, cpuid)
    assert cpuid.nent == count


@pytest.mark.spec("cpuid.signature", "cpuid.features", "cpuid.f24")
@pytest.mark.spec("cpuid.f0", "cpuid.f1", "cpuid.f2", "cpuid.f3")
def test_paravirtual_leaves(machine: Machine) -> None:
    cpuid = supported(machine)
    assert leaf_of(cpuid, 0x40000000) == (0x40000001, 0x4B4D564B, 0x564B4D56, 0x4D)
    features = leaf_of(cpuid, 0x40000001)
    assert features is not None
    wanted = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 24
    assert features[0] & wanted == wanted
    assert not features[0] >> 2 & 1
    assert features[1:] == (0, 0, 0)


@pytest.mark.spec("cpuid.0", "cpuid.1", "cpuid.8", "cpuid.hypervisor_bit")
def test_a_64_bit_processor_under_a_hypervisor(machine: Machine) -> None:
    cpuid = supported(machine)
    basic, one = leaf_of(cpuid, 0), leaf_of(cpuid, 1)
    extended, sizes = leaf_of(cpuid, 0x80000001), leaf_of(cpuid, 0x80000008)
    assert basic is not None
    assert one is not None
    assert extended is not None
    assert sizes is not None
    assert cpuid.entries[0].function == 0
    assert basic[0] >= 0xD
    assert one[2] >> uapi.CPUID_1_ECX_HYPERVISOR & 1
    assert not one[2] >> uapi.CPUID_1_ECX_OSXSAVE & 1
    for bit in (uapi.CPUID_1_EDX_TSC, uapi.CPUID_1_EDX_MSR, uapi.CPUID_1_EDX_PAE, uapi.CPUID_1_EDX_CX8,
                uapi.CPUID_1_EDX_CMOV, uapi.CPUID_1_EDX_PGE, uapi.CPUID_1_EDX_APIC):  # fmt: skip
        assert one[3] >> bit & 1
    for bit in (uapi.CPUID_80000001_EDX_LM, uapi.CPUID_80000001_EDX_NX, uapi.CPUID_80000001_EDX_SYSCALL):
        assert extended[3] >> bit & 1
    assert 36 <= sizes[0] & 0xFF <= 52
    assert sizes[0] >> 8 & 0xFF in (48, 57)


@pytest.mark.spec("cpuid.2_4", "cpuid.7", "cpuid.b_1f", "cpuid.d")
def test_leaves_with_subleaves_say_so(machine: Machine) -> None:
    cpuid = supported(machine)
    flags = {cpuid.entries[at].function: cpuid.entries[at].flags for at in range(cpuid.nent)}
    for function in (7, 0xD):
        assert flags[function] & SIGNIFICANT
    assert not flags[1] & SIGNIFICANT
    if machine.backend.real:
        return
    assert flags[4] & flags[0xB] & SIGNIFICANT
    caches = [leaf_of(cpuid, 4, index) for index in range(5)]
    assert [cache[0] & 0x1F for cache in caches if cache is not None] == [1, 2, 3, 3, 0]
    assert leaf_of(cpuid, 0xB) == (0, 0, 0, 0)


@pytest.mark.spec("sys.GET_EMULATED_CPUID")
def test_emulated_features(machine: Machine) -> None:
    request, cpuid = uapi.KVM_GET_EMULATED_CPUID, cpuid_list(256)
    cpuid.nent = 0
    assert errno_of(lambda: machine.ioctl(machine.kvm, request, cpuid)) == E2BIG
    cpuid.nent = 256
    cpuid.entries[17].padding[2] = 1
    assert errno_of(lambda: machine.ioctl(machine.kvm, request, cpuid)) == EINVAL
    cpuid.entries[17].padding[2] = 0
    machine.ioctl(machine.kvm, request, cpuid)
    assert leaf_of(cpuid, 0) == (7, 0, 0, 0)
    assert leaf_of(cpuid, 1) == (0, 0, 1 << uapi.CPUID_1_ECX_MOVBE, 0)
    cpuid.nent = 257
    assert machine.ioctl(machine.kvm, request, cpuid) == 0


# ---- a guest's table -----------------------------------------------------------------------------


@pytest.mark.spec("vcpu.SET_CPUID2", "vcpu.GET_CPUID2")
def test_the_supported_table_is_taken_and_given_back(machine: Machine) -> None:
    given = supported(machine)
    machine.do(uapi.KVM_SET_CPUID2, given)
    kept = cpuid_list(256)
    machine.do(uapi.KVM_GET_CPUID2, kept)
    assert kept.nent == given.nent
    for at in range(given.nent):
        a, b = given.entries[at], kept.entries[at]
        assert (a.function, a.index, a.flags) == (b.function, b.index, b.flags)


@pytest.mark.spec("vcpu.GET_CPUID2")
def test_a_table_that_is_longer_than_the_room(machine: Machine) -> None:
    cpuid = cpuid_list(10)
    machine.do(uapi.KVM_GET_CPUID2, cpuid)
    assert cpuid.nent == 0
    give(machine, (0, None, (2, 1, 1, 1)), (2, None, (3, 3, 3, 3)))
    cpuid.nent = 1
    assert machine.errno(uapi.KVM_GET_CPUID2, cpuid) == E2BIG
    assert cpuid.nent == 1
    cpuid.nent = 10
    machine.do(uapi.KVM_GET_CPUID2, cpuid)
    assert cpuid.nent == 2


@pytest.mark.spec("vcpu.SET_CPUID2")
def test_tables_that_are_refused_change_nothing(machine: Machine) -> None:
    give(machine, (0, None, (7, 8, 9, 10)))
    assert machine.errno(uapi.KVM_SET_CPUID2, cpuid_list(257)) == E2BIG
    for bits, wanted in ((47, EINVAL), (64, EINVAL), (0, 0), (48, 0)):
        cpuid = cpuid_list(1)
        cpuid.entries[0].function, cpuid.entries[0].eax = 0x80000008, bits << 8
        assert machine.errno(uapi.KVM_SET_CPUID2, cpuid) == wanted, bits
        if wanted:
            assert guest(machine, 0) == (7, 8, 9, 10)
            machine = fresh(machine)
            give(machine, (0, None, (7, 8, 9, 10)))


def fresh(machine: Machine) -> Machine:
    return Machine(machine.backend)


@pytest.mark.spec("vcpu.SET_CPUID")
def test_the_old_call_has_no_subleaves(machine: Machine) -> None:
    cpuid = ffi.new("struct kvm_cpuid *", {"entries": 257})
    cpuid.nent = 2
    cpuid.entries[0].eax, cpuid.entries[0].ebx = 1, 0x11
    cpuid.entries[1].function, cpuid.entries[1].eax = 1, 0x600
    machine.do(uapi.KVM_SET_CPUID, cpuid)
    emulated(machine, "adds leaves of its own")
    kept = cpuid_list(256)
    machine.do(uapi.KVM_GET_CPUID2, kept)
    assert (kept.nent, kept.entries[1].eax, kept.entries[1].flags) == (2, 0x600, 0)
    assert guest(machine, 0)[:2] == (1, 0x11)
    cpuid.nent = 257
    assert machine.errno(uapi.KVM_SET_CPUID, cpuid) == E2BIG


@pytest.mark.spec("vcpu.SET_CPUID2")
def test_after_a_run_only_the_same_table_is_taken(machine: Machine) -> None:
    emulated(machine, "edits the table it keeps")
    given = supported(machine)
    machine.do(uapi.KVM_SET_CPUID2, given)
    # KVM_RUN that ran nothing does not count.
    machine.start(HLT)
    machine.complete()
    machine.do(uapi.KVM_SET_CPUID2, given)
    assert machine.go() == uapi.KVM_EXIT_HLT
    machine.do(uapi.KVM_SET_CPUID2, given)
    given.entries[0].ebx ^= 1
    assert machine.errno(uapi.KVM_SET_CPUID2, given) == EINVAL
    given.entries[0].ebx ^= 1
    given.nent -= 1
    assert machine.errno(uapi.KVM_SET_CPUID2, given) == EINVAL


# ---- the instruction -----------------------------------------------------------------------------


@pytest.mark.spec("cpu.cpuid_insn", "vcpu.SET_CPUID2")
def test_the_guest_sees_its_table(machine: Machine) -> None:
    give(
        machine,
        (0, None, (0xB, *INTEL)),
        (2, None, (0x22, 0x33, 4, 5)),
        (4, 0, (0x40, 0, 0, 0)),
        (4, 1, (0x41, 0, 0, 0)),
        (0xB, 0, (0xB0, 0, 0, 0x77)),
        (0xB, 1, (0xB1, 0, 0, 0x77)),
    )
    assert guest(machine, 2) == (0x22, 0x33, 4, 5)
    assert guest(machine, 2, 99) == (0x22, 0x33, 4, 5)
    assert guest(machine, 4)[0] == 0x40
    assert guest(machine, 4, 1)[0] == 0x41
    assert guest(machine, 4, 2) == (0, 0, 0, 0)
    assert guest(machine, 3) == (0, 0, 0, 0)
    # An undefined subleaf of the topology leaf: CL comes back, EDX is the APIC id.
    assert guest(machine, 0xB, 5) == (0, 0, 5, 0x77)


@pytest.mark.spec("cpuid.oor")
def test_past_the_end_intel_repeats_the_highest_leaf(machine: Machine) -> None:
    paravirtual: Registers = (0x40000001, 1, 2, 3)
    give(machine, (0, None, (2, *INTEL)), (2, None, (0x22, 0, 0, 0)), (0x40000000, None, paravirtual))
    assert guest(machine, 9)[0] == 0x22
    assert guest(machine, 0x80000000)[0] == 0x22
    assert guest(machine, 0x40000000) == (0x40000001, 1, 2, 3)
    assert guest(machine, 0x40000001) == (0, 0, 0, 0)
    assert guest(machine, 0x40000002)[0] == 0x22
    assert guest(machine, 0xC0000000)[0] == 0x22


@pytest.mark.spec("cpuid.oor")
def test_past_the_end_amd_gives_nothing(machine: Machine) -> None:
    give(machine, (0, None, (2, *AMD)), (2, None, (0x22, 0, 0, 0)))
    assert guest(machine, 9) == (0, 0, 0, 0)


@pytest.mark.spec("cpu.cpuid_insn")
def test_a_guest_without_a_table(machine: Machine) -> None:
    assert guest(machine, 0) == (0, 0, 0, 0)
    assert guest(machine, 0x40000000) == (0, 0, 0, 0)


@pytest.mark.spec("cpuid.runtime")
def test_the_apic_bit_follows_the_apic(machine: Machine) -> None:
    apic = 1 << uapi.CPUID_1_EDX_APIC
    give(machine, (0, None, (1, *INTEL)), (1, None, (0, 0, 0, 0)))
    assert guest(machine, 1)[3] & apic
    sregs = machine.sregs
    sregs.apic_base = 0xFEE00100
    machine.set_sregs(sregs)
    assert not guest(machine, 1)[3] & apic
    kept = cpuid_list(256)
    machine.do(uapi.KVM_GET_CPUID2, kept)
    one = leaf_of(kept, 1)
    assert one is not None
    assert not one[3] & apic


@pytest.mark.spec("cpuid.governs", "cpu.rdtsc")
def test_an_instruction_hidden_by_cpuid_is_undefined(machine: Machine) -> None:
    emulated(machine, "executes it whatever CPUID says")
    rdtscp = b"\x0f\x01\xf9"
    machine.load(struct.pack("<HH", 0x3000, 0), uapi.UD_VECTOR * 4)
    machine.load(HLT, 0x3000)
    machine.start(rdtscp + HLT)
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert machine.regs.rip != 0x3001
    machine = fresh(machine)
    machine.load(struct.pack("<HH", 0x3000, 0), uapi.UD_VECTOR * 4)
    machine.load(HLT, 0x3000)
    give(machine, (0x80000001, None, (0, 0, 0, 0)))
    machine.start(rdtscp + HLT)
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert machine.regs.rip == 0x3001


# ---- the list of features ------------------------------------------------------------------------


def instructions() -> set[str]:
    """Return the names in the processor's instruction table."""
    names, n = set(), 0
    while row := lib.cpu_insn_row(n):
        words = ffi.string(row).decode().split()
        names |= set(words)
        n += 1
    return names


@pytest.mark.spec("sys.GET_SUPPORTED_CPUID")
def test_every_feature_is_in_the_processor() -> None:
    names = instructions()
    assert "cmpxchg16b" in names
    missing = {feature.name: set(feature.insns) - names for feature in FEATURES}
    assert {name: insns for name, insns in missing.items() if insns} == {}
    assert len({feature.name for feature in FEATURES}) == len(FEATURES)


# Bits of a mode, a register or a promise: other tests have what they mean.
WITHOUT_INSTRUCTIONS = {
    *("PCID", "HYPERVISOR", "DE", "PSE", "PAE", "MCE", "APIC", "MTRR", "PGE", "MCA", "PAT", "PSE36", "ARAT"),
    *("TSC_ADJUST", "SMEP", "ERMS", "UMIP", "LA57", "FSRM", "ARCH_CAPABILITIES", "NX", "GBPAGES", "LM"),
    *("CONSTANT_TSC", "VME"),
}
# Instructions that are there without their bit: x87, hints; the rows say the bit of the narrow or older
# form, and the handler asks for that of the wide one, or of XGETBV with ECX 1.
WITHOUT_ROWS = {"FPU", "3DNOWPREFETCH", "VAES", "VPCLMULQDQ", "XGETBV1"}


@pytest.mark.spec("sys.GET_SUPPORTED_CPUID")
def test_cpuid_offers_exactly_what_the_processor_executes() -> None:
    """Each list derives the other: bits of rows are offered, and offered bits have rows."""
    offered = {
        WORDS[feature.word].ctl << 5 | feature.bit: feature.name  # type: ignore[operator]
        for feature in FEATURES
        if WORDS[feature.word].ctl is not None
    }
    needed, number = set(), 0
    while lib.cpu_insn_row(number):
        needed.add(lib.cpu_insn_feature(number))
        number += 1
    needed.remove(-1)
    assert lib.cpu_insn_feature(number) == -1
    assert {(bit >> 5, bit & 31) for bit in needed - set(offered)} == set()
    names = {feature.name for feature in FEATURES}
    assert names >= WITHOUT_INSTRUCTIONS | WITHOUT_ROWS
    assert names - {offered[bit] for bit in needed} == WITHOUT_INSTRUCTIONS | WITHOUT_ROWS
    assert {feature.name for feature in FEATURES if not feature.insns} == WITHOUT_INSTRUCTIONS


def host_cpuid(function: int, index: int) -> Registers:
    """Return what CPUID gives us."""
    # push rbx; mov r8, rdx; mov eax, edi; mov ecx, esi; cpuid; mov [r8], eax; ...; pop rbx; ret
    code = bytes.fromhex("53 4989d0 89f8 89f1 0fa2 418900 41895804 41894808 4189500c 5b c3")
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    out = ffi.new("uint32_t[4]")
    call = ffi.cast("void (*)(uint32_t, uint32_t, uint32_t *)", ffi.from_buffer(page))
    call(function, index, out)
    a, b, c, d = out
    return a, b, c, d


@pytest.mark.spec("sys.GET_SUPPORTED_CPUID")
def test_xsave_components_are_where_the_host_has_them(machine: Machine) -> None:
    """QEMU tells its guest the offsets of its own CPUID, with -cpu max: they must be ours."""
    cpuid = supported(machine)
    components = leaf_of(cpuid, 0xD) or (0, 0, 0, 0)
    for n in range(2, 32):
        if components[0] >> n & 1:
            assert leaf_of(cpuid, 0xD, n) == host_cpuid(0xD, n)


def test_names_of_the_brand() -> None:
    brand = b"".join(
        struct.pack("<4I", *entry.registers)
        for entry in SUPPORTED_CPUID
        if 0x80000002 <= entry.function <= 0x80000004
    )
    assert brand.rstrip(b"\0") == b"pykvm virtual x86-64 processor"
    assert to_bytes(ffi.new("struct kvm_cpuid_entry2 *")) == bytes(40)


@pytest.mark.parametrize("tdp", [True, False])
def test_protection_keys_need_two_dimensional_paging(monkeypatch: pytest.MonkeyPatch, tdp: bool) -> None:
    """Whatever processor this is: an spte has no key.  Source: cpuid.c kvm_set_cpu_caps."""
    pku = cpuid.BY_NAME["PKU"]
    words = {**cpuid.SUPPORTED, pku.word: cpuid.SUPPORTED[pku.word] | 1 << pku.bit}
    monkeypatch.setattr(cpuid, "SUPPORTED", words)
    kernel, processor = profile.kernel(profile.DEFAULT_KERNEL), profile.processor(profile.DEFAULT_PROCESSOR)
    made = offer.offer.__wrapped__(kernel, processor, tdp=tdp)
    assert made.has("PKU") == bool(made.cr4 & uapi.X86_CR4_PKE) == bool(made.xcr0 & 1 << 9) == tdp


@pytest.mark.spec("cpuid.8", "cpuid.governs")
@pytest.mark.parametrize("bits", [52, 63, 64, 72, 255])
def test_a_table_may_promise_more_physical_address_bits_than_there_can_be(
    machine: Machine, bits: int
) -> None:
    table = cpuid_list(2)
    table.entries[0].function, table.entries[0].eax = 0x8000_0000, 0x8000_0008
    table.entries[1].function, table.entries[1].eax = 0x8000_0008, bits | 48 << 8
    machine.do(uapi.KVM_SET_CPUID2, table)
    # mov cr3, rax; mov ebx, [0x1000]
    long_mode(machine, b"\x0f\x22\xd8\x8b\x1c\x25\x00\x10\x00\x00" + HLT, rax=0x9000)
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert machine.regs.rbx == int.from_bytes(machine.ram[0x1000:0x1004], "little")
