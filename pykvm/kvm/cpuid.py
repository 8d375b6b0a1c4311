"""CPUID: what this processor can do, what a client lets its guest see, and what follows from it.

`FEATURES` is the one list of what is offered: a feature is in it when the processor, or a module
here, does what the bit promises.  KVM_GET_SUPPORTED_CPUID, the CR4 bits a guest may set and the
instructions that are undefined without their bit derive from it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from errno import E2BIG, EINVAL
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from pykvm import trace
from pykvm.abi import CData, ffi, lib, uapi
from pykvm.abi.errors import KvmError
from pykvm.abi.ioctl import Array, ArrayArg, system_ioctl, vcpu_ioctl
from pykvm.kvm.exits import RESUME, Outcome, get_cpl, on_exit
from pykvm.kvm.quirks import has_quirk

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pykvm.kvm.system import System
    from pykvm.kvm.vcpu import Vcpu

KVM_MAX_CPUID_ENTRIES = 256
# Where the maximal leaf is not known yet: x86.c cpuid_query_maxphyaddr.
DEFAULT_MAXPHYADDR = 36
_MAX_PHYS_BITS = 52
_MASK64 = 0xFFFF_FFFF_FFFF_FFFF
_SIGNIFICANT = uapi.KVM_CPUID_FLAG_SIGNIFCANT_INDEX

Registers: TypeAlias = tuple[int, int, int, int]
"""eax, ebx, ecx, edx."""
_NONE: Registers = (0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Word:
    """A register of a leaf that holds feature bits; `ctl`: its place in ctl.cpuid[], if it has one."""

    function: int
    index: int
    register: int
    ctl: int | None = None


EAX, EBX, ECX, EDX = range(4)
WORDS = {
    "1_ECX": Word(1, 0, ECX, lib.CPU_CPUID_1_ECX),
    "1_EDX": Word(1, 0, EDX, lib.CPU_CPUID_1_EDX),
    "6_EAX": Word(6, 0, EAX, lib.CPU_CPUID_6_EAX),
    "7_EBX": Word(7, 0, EBX, lib.CPU_CPUID_7_EBX),
    "7_ECX": Word(7, 0, ECX, lib.CPU_CPUID_7_ECX),
    "7_EDX": Word(7, 0, EDX, lib.CPU_CPUID_7_EDX),
    "D_1_EAX": Word(0xD, 1, EAX, lib.CPU_CPUID_D_1_EAX),
    "80000001_ECX": Word(0x8000_0001, 0, ECX, lib.CPU_CPUID_8000_0001_ECX),
    "80000001_EDX": Word(0x8000_0001, 0, EDX, lib.CPU_CPUID_8000_0001_EDX),
    "80000007_EDX": Word(0x8000_0007, 0, EDX),
}


class Feature(NamedTuple):
    """A CPUID bit that is offered.

    `insns`: the instructions it promises, by their name in the instruction table; a test looks them
    up there.  `gated`: a processor under KVM refuses them to a guest whose CPUID lacks the bit; all
    others work whatever CPUID says, as they do on hardware.
    """

    name: str
    word: str
    insns: tuple[str, ...] = ()
    gated: bool = False

    @property
    def bit(self) -> int:
        """Position of the bit in its word."""
        position: int = getattr(uapi, f"CPUID_{self.word}_{self.name}")
        return position


FEATURES = (
    Feature("SSE3", "1_ECX", ("addsubps", "haddpd", "lddqu", "movddup", "movshdup")),
    Feature("PCLMULQDQ", "1_ECX", ("pclmulqdq",)),
    Feature("SSSE3", "1_ECX", ("pshufb", "palignr", "pabsd", "phaddw")),
    Feature("FMA", "1_ECX", ("vfmadd132ps", "vfnmsub231sd")),
    Feature("PCID", "1_ECX"),
    Feature("CX16", "1_ECX", ("cmpxchg16b",)),
    Feature("SSE4_1", "1_ECX", ("pblendvb", "ptest", "roundsd", "dpps", "pmulld", "insertps")),
    Feature("SSE4_2", "1_ECX", ("pcmpestri", "pcmpistrm", "pcmpgtq", "crc32")),
    Feature("MOVBE", "1_ECX", ("movbe",)),
    Feature("POPCNT", "1_ECX", ("popcnt",)),
    Feature("AES", "1_ECX", ("aesenc", "aesdeclast", "aesimc", "aeskeygenassist")),
    Feature("XSAVE", "1_ECX", ("xsave", "xrstor", "xgetbv", "xsetbv"), gated=True),
    Feature("AVX", "1_ECX", ("vbroadcastss", "vperm2f128", "vmaskmovps", "vzeroupper")),
    Feature("F16C", "1_ECX", ("vcvtph2ps", "vcvtps2ph")),
    Feature("RDRAND", "1_ECX", ("rdrand",), gated=True),
    Feature("HYPERVISOR", "1_ECX"),
    Feature("FPU", "1_EDX", ("fadd", "fldcw", "fnsave", "fsqrt")),
    Feature("VME", "1_EDX"),
    Feature("DE", "1_EDX"),
    Feature("PSE", "1_EDX"),
    Feature("TSC", "1_EDX", ("rdtsc",)),
    Feature("MSR", "1_EDX", ("rdmsr", "wrmsr")),
    Feature("PAE", "1_EDX"),
    Feature("MCE", "1_EDX"),
    Feature("CX8", "1_EDX", ("cmpxchg8b",)),
    Feature("APIC", "1_EDX"),
    Feature("SEP", "1_EDX", ("sysenter", "sysexit")),
    Feature("MTRR", "1_EDX"),
    Feature("PGE", "1_EDX"),
    Feature("MCA", "1_EDX"),
    Feature("CMOV", "1_EDX", ("cmovo", "cmovg")),
    Feature("PAT", "1_EDX"),
    Feature("PSE36", "1_EDX"),
    Feature("CLFLUSH", "1_EDX", ("clflush",)),
    Feature("MMX", "1_EDX", ("emms", "packsswb", "pmaddwd")),
    Feature("FXSR", "1_EDX", ("fxsave", "fxrstor")),
    Feature("SSE", "1_EDX", ("movaps", "addss", "ldmxcsr", "stmxcsr", "movntps")),
    Feature("SSE2", "1_EDX", ("movdqa", "addsd", "paddd", "maskmovdqu", "movnti")),
    Feature("ARAT", "6_EAX"),
    Feature("FSGSBASE", "7_EBX", ("rdfsbase", "rdgsbase", "wrfsbase", "wrgsbase")),
    Feature("TSC_ADJUST", "7_EBX"),
    Feature("BMI1", "7_EBX", ("andn", "bextr", "blsi", "blsmsk", "blsr", "tzcnt")),
    Feature("AVX2", "7_EBX", ("vpbroadcastb", "vpgatherdd", "vpermq", "vpsllvd")),
    Feature("SMEP", "7_EBX"),
    Feature("BMI2", "7_EBX", ("bzhi", "mulx", "pdep", "pext", "rorx", "sarx", "shlx", "shrx")),
    Feature("ERMS", "7_EBX"),
    Feature("INVPCID", "7_EBX", ("invpcid",), gated=True),
    Feature("RDSEED", "7_EBX", ("rdseed",), gated=True),
    Feature("ADX", "7_EBX", ("adcx", "adox")),
    Feature("SMAP", "7_EBX", ("clac", "stac")),
    Feature("CLFLUSHOPT", "7_EBX", ("clflushopt",)),
    Feature("CLWB", "7_EBX", ("clwb",)),
    Feature("SHA_NI", "7_EBX", ("sha1rnds4", "sha256rnds2", "sha256msg1")),
    Feature("UMIP", "7_ECX"),
    Feature("PKU", "7_ECX", ("rdpkru", "wrpkru"), gated=True),
    Feature("GFNI", "7_ECX", ("gf2p8mulb", "gf2p8affineqb", "gf2p8affineinvqb")),
    Feature("VAES", "7_ECX", ("aesenc", "aesdeclast")),
    Feature("VPCLMULQDQ", "7_ECX", ("pclmulqdq",)),
    Feature("LA57", "7_ECX"),
    Feature("RDPID", "7_ECX", ("rdpid",), gated=True),
    Feature("FSRM", "7_EDX"),
    Feature("SERIALIZE", "7_EDX", ("serialize",)),
    Feature("ARCH_CAPABILITIES", "7_EDX"),
    Feature("XSAVEOPT", "D_1_EAX", ("xsaveopt",), gated=True),
    Feature("XSAVEC", "D_1_EAX", ("xsavec",), gated=True),
    Feature("XGETBV1", "D_1_EAX", ("xgetbv",)),
    Feature("XSAVES", "D_1_EAX", ("xsaves", "xrstors"), gated=True),
    Feature("LAHF_LM", "80000001_ECX", ("lahf", "sahf")),
    Feature("ABM", "80000001_ECX", ("lzcnt",)),
    Feature("3DNOWPREFETCH", "80000001_ECX", ("prefetch",)),
    Feature("SYSCALL", "80000001_EDX", ("syscall", "sysret")),
    Feature("NX", "80000001_EDX"),
    Feature("GBPAGES", "80000001_EDX"),
    Feature("RDTSCP", "80000001_EDX", ("rdtscp",), gated=True),
    Feature("LM", "80000001_EDX"),
    Feature("CONSTANT_TSC", "80000007_EDX"),
)
BY_NAME = {feature.name: feature for feature in FEATURES}


def _bits(word: str, *, gated: bool | None = None) -> int:
    return sum(1 << f.bit for f in FEATURES if f.word == word and gated in {None, f.gated})


def _host(word: Word) -> int:
    """Return the bits this host's processor leaves: vector instructions are executed by its own."""
    allowed: int = 0xFFFF_FFFF if word.ctl is None else lib.cpu_host_features(word.ctl)
    return allowed


SUPPORTED = {name: _bits(name) & _host(word) for name, word in WORDS.items()}
_GATED = {word: _bits(word, gated=True) for word in WORDS}
# State components of XSAVE by the feature that has them; x87 is always there.
XCR0_FEATURES = {
    uapi.XFEATURE_MASK_SSE: "SSE",
    uapi.XFEATURE_MASK_YMM: "AVX",
    uapi.XFEATURE_MASK_PKRU: "PKU",
}


def _is_supported(name: str) -> bool:
    feature = BY_NAME.get(name)
    return feature is not None and bool(SUPPORTED[feature.word] >> feature.bit & 1)


SUPPORTED_XCR0 = uapi.XFEATURE_MASK_FP | sum(
    bit for bit, name in XCR0_FEATURES.items() if _is_supported("XSAVE") and _is_supported(name)
)

_CR0_VALID = (
    uapi.X86_CR0_PE | uapi.X86_CR0_MP | uapi.X86_CR0_EM | uapi.X86_CR0_TS | uapi.X86_CR0_ET | uapi.X86_CR0_NE
    | uapi.X86_CR0_WP | uapi.X86_CR0_AM | uapi.X86_CR0_NW | uapi.X86_CR0_CD | uapi.X86_CR0_PG
)  # fmt: skip
CR4_ALWAYS = (
    uapi.X86_CR4_VME | uapi.X86_CR4_PVI | uapi.X86_CR4_TSD | uapi.X86_CR4_DE | uapi.X86_CR4_PSE
    | uapi.X86_CR4_PAE | uapi.X86_CR4_MCE | uapi.X86_CR4_PGE | uapi.X86_CR4_PCE | uapi.X86_CR4_OSFXSR
    | uapi.X86_CR4_OSXMMEXCPT
)  # fmt: skip
# CR4 bits that only a processor with the feature has (x86.h __cr4_reserved_bits).
CR4_FEATURES = {
    uapi.X86_CR4_UMIP: "UMIP",
    uapi.X86_CR4_LA57: "LA57",
    uapi.X86_CR4_FSGSBASE: "FSGSBASE",
    uapi.X86_CR4_PCIDE: "PCID",
    uapi.X86_CR4_OSXSAVE: "XSAVE",
    uapi.X86_CR4_SMEP: "SMEP",
    uapi.X86_CR4_SMAP: "SMAP",
    uapi.X86_CR4_PKE: "PKU",
}
EFER_FEATURES = {
    uapi.EFER_SCE: "SYSCALL",
    uapi.EFER_LME | uapi.EFER_LMA: "LM",
    uapi.EFER_NX: "NX",
    uapi.EFER_FFXSR: "FXSR_OPT",
}


# ---- the supported table -------------------------------------------------------------------------

_VENDOR = (0x756E6547, 0x6C65746E, 0x49656E69)  # "Genu" "ntel" "ineI", as ebx, ecx, edx
_BRAND = b"pykvm virtual x86-64 processor"
# Family 6, model 0x55, stepping 4: a 64-bit Intel without errata that kernels work around.
_SIGNATURE = 0x0005_0654
_CLFLUSH_LINES = 8 << 8
_MAX_BASIC = 0xD
_MAX_EXTENDED = 0x8000_0008
PHYS_BITS = 46
VIRT_BITS = 57
# Linux also offers ASYNC_PF, ASYNC_PF_VMEXIT, ASYNC_PF_INT, PV_UNHALT and PV_SEND_IPI, local APIC in the
# kernel or not.  Without one they do not work there either: QEMU gives up when the register of ASYNC_PF_INT
# does not take its own reset value, and a guest's other processors never see the IPIs.
_KVM_FEATURES = (
    1 << uapi.KVM_FEATURE_CLOCKSOURCE
    | 1 << uapi.KVM_FEATURE_NOP_IO_DELAY
    | 1 << uapi.KVM_FEATURE_CLOCKSOURCE2
    | 1 << uapi.KVM_FEATURE_STEAL_TIME
    | 1 << uapi.KVM_FEATURE_PV_EOI
    | 1 << uapi.KVM_FEATURE_PV_TLB_FLUSH
    | 1 << uapi.KVM_FEATURE_POLL_CONTROL
    | 1 << uapi.KVM_FEATURE_PV_SCHED_YIELD
    | 1 << uapi.KVM_FEATURE_CLOCKSOURCE_STABLE_BIT
)


def _cache(kind: int, level: int, ways: int, sets: int) -> Registers:
    """Return a subleaf of leaf 4: kind 1 data, 2 instructions, 3 both; lines of 64 bytes."""
    return kind | level << 5 | 1 << 8, 63 | (ways - 1) << 22, sets - 1, 0


_CACHES = (_cache(1, 1, 8, 64), _cache(2, 1, 8, 64), _cache(3, 2, 16, 1024), _cache(3, 3, 16, 8192), _NONE)


def _brand(leaf: int) -> Registers:
    text = _BRAND.ljust(48, b"\0")[leaf * 16 : leaf * 16 + 16]
    a, b, c, d = (int.from_bytes(text[at : at + 4], "little") for at in range(0, 16, 4))
    return a, b, c, d


def _features(function: int, index: int = 0) -> Registers:
    """Return the registers of a leaf that has nothing but feature bits."""
    registers = [0, 0, 0, 0]
    for name, word in WORDS.items():
        if (word.function, word.index) == (function, index):
            registers[word.register] = SUPPORTED[name]
    a, b, c, d = registers
    return a, b, c, d


_LEAVES: dict[int, Registers] = {
    0: (_MAX_BASIC, *_VENDOR),
    1: (_SIGNATURE, _CLFLUSH_LINES, *_features(1)[2:]),
    2: (0x00FE_FF01, 0xF0, 0, 0),  # no prefetch, caches are told by leaf 4
    6: _features(6),
    0x8000_0000: (_MAX_EXTENDED, 0, 0, 0),
    0x8000_0001: _features(0x8000_0001),
    0x8000_0002: _brand(0),
    0x8000_0003: _brand(1),
    0x8000_0004: _brand(2),
    0x8000_0006: (0, 0, 1024 << 16 | 8 << 12 | 64, 0),  # L2: KiB, associativity, line
    0x8000_0007: _features(0x8000_0007),
    0x8000_0008: (PHYS_BITS | VIRT_BITS << 8 | PHYS_BITS << 16, 0, 0, 0),
}
# Offset and size of the components in the standard format of XSAVE.
XSTATE_COMPONENTS = {2: (576, 256), 9: (2688, 8)}
_XSAVE_HEADER_END = 576


def xstate_required_size(xstate_bv: int, *, compacted: bool) -> int:
    """Return the bytes of an XSAVE area with these components."""
    size = _XSAVE_HEADER_END
    for component, (offset, length) in XSTATE_COMPONENTS.items():
        if xstate_bv >> component & 1:
            size = size + length if compacted else max(size, offset + length)
    return size


def xsave_leaves(xcr0: int, features: int, *, xsave: bool) -> dict[int, Registers]:
    """Return the subleaves of leaf 0xD; sizes of the current state are filled in at run time.

    `features`: eax of subleaf 1.
    """
    if not xsave:
        return {0: _NONE}
    low, high = xcr0 & 0xFFFF_FFFF, xcr0 >> 32
    largest = xstate_required_size(xcr0, compacted=False)
    leaves: dict[int, Registers] = {0: (low, _XSAVE_HEADER_END, largest, high), 1: (features, 0, 0, 0)}
    for component, (offset, size) in XSTATE_COMPONENTS.items():
        if xcr0 >> component & 1:
            leaves[component] = (size, offset, 0, 0)
    return leaves


# Leaves with subleaves, by index; the flag says so to the guest's CPUID.
_SUBLEAVES: dict[int, dict[int, Registers]] = {
    4: dict(enumerate(_CACHES)),
    7: {0: _features(7)},
    0xB: {0: _NONE},
    0xD: xsave_leaves(SUPPORTED_XCR0, SUPPORTED["D_1_EAX"], xsave=_is_supported("XSAVE")),
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One leaf: struct kvm_cpuid_entry2 as Python values."""

    function: int
    index: int
    flags: int
    registers: Registers


def _supported() -> Iterator[Entry]:
    for first, last in ((0, _MAX_BASIC), (0x8000_0000, _MAX_EXTENDED)):
        for function in range(first, last + 1):
            if function in _SUBLEAVES:
                for index, registers in _SUBLEAVES[function].items():
                    yield Entry(function, index, _SIGNIFICANT, registers)
            else:
                yield Entry(function, 0, 0, _LEAVES.get(function, _NONE))
    signature = (0x4B4D_564B, 0x564B_4D56, 0x4D)  # "KVMK" "VMKV" "M"
    yield Entry(uapi.KVM_CPUID_SIGNATURE, 0, 0, (uapi.KVM_CPUID_FEATURES, *signature))
    yield Entry(uapi.KVM_CPUID_FEATURES, 0, 0, (_KVM_FEATURES, 0, 0, 0))


SUPPORTED_CPUID = tuple(_supported())
# What KVM's emulator executes for processors without it: cpuid.c __do_cpuid_func_emulated.
EMULATED_CPUID = (
    Entry(0, 0, 0, (7, 0, 0, 0)),
    Entry(1, 0, 0, (0, 0, 1 << uapi.CPUID_1_ECX_MOVBE, 0)),
    Entry(7, 0, _SIGNIFICANT, (0, 0, 1 << uapi.CPUID_7_ECX_RDPID, 0)),
)


def _fill(out: CData, entry: Entry) -> None:
    out.function, out.index, out.flags = entry.function, entry.index, entry.flags
    out.eax, out.ebx, out.ecx, out.edx = entry.registers


def _answer(a: ArrayArg, entries: tuple[Entry, ...]) -> int:
    """Copy a table out; with too little room nothing, not even the count, is written."""
    if a.n < len(entries):
        raise KvmError(E2BIG, f"{len(entries)} entries, room for {a.n}")
    out = ffi.new("struct kvm_cpuid_entry2[]", len(entries))
    for at, entry in enumerate(entries):
        _fill(out[at], entry)
    a.reply(out, len(entries))
    return 0


def _cpuid2(*, copy_in: bool = False, limit: int = KVM_MAX_CPUID_ENTRIES, errno: int | None = None) -> Array:
    return Array(
        "struct kvm_cpuid2",
        entry="struct kvm_cpuid_entry2",
        count="nent",
        entries="entries",
        copy_in=copy_in,
        copy_out=True,
        limit=limit,
        limit_errno=errno,
    )


@system_ioctl("KVM_GET_SUPPORTED_CPUID", _cpuid2(), cap="KVM_CAP_EXT_CPUID")
def get_supported_cpuid(system: System, a: ArrayArg) -> int:
    """Return the CPUID table a guest may be given, paravirtual leaves included.

    More than 256 entries of room are taken as 256.

    Errors:
        E2BIG  too little room; the count is not told
    Source: api.rst 4.46; cpuid.c kvm_dev_ioctl_get_cpuid
    """
    rules, entries = system.kernel, system.offer.supported
    # Up to 2.6.35 a table that just fits counted as too long.
    if not rules.cpuid.exact_room and min(a.n, rules.limits.cpuid_entries) == len(entries):
        raise KvmError(E2BIG, f"{len(entries)} entries need room for one more")
    return _answer(a, entries)


@system_ioctl("KVM_GET_EMULATED_CPUID", _cpuid2(copy_in=True), cap="KVM_CAP_EXT_EMUL_CPUID")
def get_emulated_cpuid(system: System, a: ArrayArg) -> int:
    """Return the features that are emulated where the processor lacks them.

    Errors:
        E2BIG   too little room; the count is not told
        EINVAL  the padding of an entry given is not 0
    Source: api.rst 4.88; cpuid.c sanity_check_entries
    """
    del system
    if not a.n:
        raise KvmError(E2BIG, "no room")
    for at in range(a.n):
        if any(a.entries[at].padding):
            raise KvmError(EINVAL, f"padding of entry {at} is not 0")
    return _answer(a, EMULATED_CPUID)


# ---- a guest's table -----------------------------------------------------------------------------


class GuestCpuid:
    """The CPUID table of one vCPU, as the client gave it, and what follows from it.

    `maxphyaddr`: bits of a physical address; `reserved_gpa_bits`: those above; `supported_xcr0`: the
    state components the guest may turn on.
    """

    def __init__(self, entries: tuple[Entry, ...] = (), offered_xcr0: int = SUPPORTED_XCR0) -> None:
        """Take a table, and the state components that any guest may turn on."""
        self.entries = entries
        self._leaves: dict[int, list[Entry]] = {}
        for entry in entries:
            self._leaves.setdefault(entry.function, []).append(entry)
        self.maxphyaddr = self._maxphyaddr()
        self.reserved_gpa_bits = _MASK64 & ~((1 << self.maxphyaddr) - 1)
        low, _, _, high = self.registers(0xD)
        self.supported_xcr0 = (low | high << 32) & offered_xcr0
        kvm = next((e.function for e in entries if _is_kvm_signature(e)), uapi.KVM_CPUID_SIGNATURE)
        self.pv_leaf = kvm + 1
        self.pv_features = self.registers(self.pv_leaf)[EAX]

    def _maxphyaddr(self) -> int:
        if self.registers(0x8000_0000)[EAX] < 0x8000_0008 or not self.find(0x8000_0008):
            return DEFAULT_MAXPHYADDR
        return self.registers(0x8000_0008)[EAX] & 0xFF

    def find(self, function: int, index: int = 0) -> Entry | None:
        """Return the first entry of a leaf that this index selects."""
        for entry in self._leaves.get(function, ()):
            if not entry.flags & _SIGNIFICANT or entry.index == index:
                return entry
        return None

    def registers(self, function: int, index: int = 0) -> Registers:
        """Return what the table says of a leaf, zeros when it says nothing."""
        entry = self.find(function, index)
        return entry.registers if entry else _NONE

    def word(self, name: str) -> int:
        """Return a register of feature bits, by its name in `WORDS`."""
        word = WORDS[name]
        return self.registers(word.function, word.index)[word.register]

    def has(self, name: str) -> bool:
        """Say if the guest has a feature: it is offered, and the client's table has its bit."""
        feature = BY_NAME.get(name)
        return feature is not None and bool(self.word(feature.word) >> feature.bit & 1)

    @property
    def is_amd_compatible(self) -> bool:
        """Say if the table claims to be an AMD or a Hygon processor."""
        vendor = self.registers(0)[1:]
        return vendor in {(0x6874_7541, 0x444D_4163, 0x6974_6E65), (0x6F67_7948, 0x656E_6975, 0x6E65_476E)}


def _is_kvm_signature(entry: Entry) -> bool:
    base = entry.function
    return (
        uapi.KVM_CPUID_SIGNATURE <= base <= 0x4000_FF00
        and base & 0xFF == 0
        and entry.registers[1:] == (0x4B4D_564B, 0x564B_4D56, 0x4D)
    )


def after_set_cpuid(vcpu: Vcpu) -> None:
    """Make the processor what the table says (kvm_vcpu_after_set_cpuid).

    A vCPU without a table can do everything: instructions do not ask CPUID.
    """
    cpuid, ctl, offer = vcpu.cpuid, vcpu.cpu.ctl, vcpu.vm.system.offer
    given = bool(cpuid.entries)
    for name, word in WORDS.items():
        if word.ctl is not None:
            masked = _GATED[name] & ~cpuid.word(name) if given else 0
            ctl.cpuid[word.ctl] = offer.words[name] & ~masked
    # Table entries have no more bits, whatever a table says.
    ctl.maxphyaddr = min(cpuid.maxphyaddr, _MAX_PHYS_BITS)
    ctl.cr0_valid = _CR0_VALID
    ctl.cr4_valid = offer.cr4
    ctl.efer_valid = offer.efer
    if given:
        ctl.cr4_valid &= CR4_ALWAYS | sum(bit for bit, name in CR4_FEATURES.items() if cpuid.has(name))
        ctl.efer_valid &= sum(bits for bits, name in EFER_FEATURES.items() if cpuid.has(name))
    ctl.xcr0_valid = cpuid.supported_xcr0 | uapi.XFEATURE_MASK_FP
    other = cpuid.is_amd_compatible != vcpu.vm.processor.is_amd
    ctl.flags = ctl.flags & ~lib.CPU_OTHER_VENDOR | (lib.CPU_OTHER_VENDOR if other else 0)
    # The root's level follows from the physical address width.
    vcpu.loaded_memslots = None
    vcpu.cpu.state_changed()
    vcpu.cpu.flush_tlb()


def runtime(vcpu: Vcpu, entry: Entry) -> Entry:
    """Return an entry with the bits that follow the processor's state (kvm_update_cpuid_runtime)."""
    guest = vcpu.cpu.guest
    function, index = entry.function, entry.index
    eax, ebx, ecx, edx = entry.registers
    if function == 1:
        ecx = _with_bit(ecx, uapi.CPUID_1_ECX_OSXSAVE, on=bool(guest.cr4 & uapi.X86_CR4_OSXSAVE))
        if not has_quirk(vcpu.vm, uapi.KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT):
            mwait = vcpu.msrs.get(uapi.MSR_IA32_MISC_ENABLE) & uapi.MSR_IA32_MISC_ENABLE_MWAIT
            ecx = _with_bit(ecx, uapi.CPUID_1_ECX_MONITOR, on=bool(mwait))
        edx = _with_bit(edx, uapi.CPUID_1_EDX_APIC, on=bool(vcpu.apic_base & uapi.MSR_IA32_APICBASE_ENABLE))
    elif function == vcpu.cpuid.pv_leaf and vcpu.vm.hlt_in_guest:
        # Nobody would see the vCPU halt, and nobody need kick it.
        eax = _with_bit(eax, uapi.KVM_FEATURE_PV_UNHALT, on=False)
    elif function == 7 and index == 0:
        ecx = _with_bit(ecx, uapi.CPUID_7_ECX_OSPKE, on=bool(guest.cr4 & uapi.X86_CR4_PKE))
    elif function == 0xD and index == 0 and eax:
        ebx = xstate_required_size(guest.xcr0, compacted=False)
    elif function == 0xD and index == 1 and eax & 0xA:
        ebx = xstate_required_size(guest.xcr0 | guest.xss, compacted=True)
    else:
        return entry
    return replace(entry, registers=(eax, ebx, ecx, edx))


def _with_bit(value: int, bit: int, *, on: bool) -> int:
    return value | 1 << bit if on else value & ~(1 << bit)


def _take(entries: CData, n: int) -> tuple[Entry, ...]:
    given = (entries[at] for at in range(n))
    return tuple(Entry(e.function, e.index, e.flags, (e.eax, e.ebx, e.ecx, e.edx)) for e in given)


def _set_cpuid(vcpu: Vcpu, entries: tuple[Entry, ...]) -> int:
    """Give the vCPU a table; one that has run takes only the table it has (kvm_set_cpuid)."""
    if vcpu.has_run and not vcpu.vm.kernel.cpuid.any_after_run:
        old = [runtime(vcpu, entry) for entry in vcpu.cpuid.entries]
        if [runtime(vcpu, entry) for entry in entries] != old:
            raise KvmError(EINVAL, "the vCPU has run: its CPUID cannot change")
        return 0
    if len(entries) > vcpu.vm.kernel.limits.cpuid_entries:
        raise KvmError(E2BIG, f"{len(entries)} entries")
    cpuid = GuestCpuid(entries, vcpu.vm.system.offer.xcr0)
    address_sizes = cpuid.find(0x8000_0008)
    virtual = address_sizes.registers[EAX] >> 8 & 0xFF if address_sizes else 0
    if virtual not in {0, 48, 57}:
        raise KvmError(EINVAL, f"leaf 0x80000008: {virtual} bits of linear address")
    vcpu.cpuid = cpuid
    after_set_cpuid(vcpu)
    return 0


@vcpu_ioctl("KVM_SET_CPUID2", _cpuid2(copy_in=True, errno=E2BIG), cap="KVM_CAP_EXT_CPUID")
def set_cpuid2(vcpu: Vcpu, a: ArrayArg) -> int:
    """Replace the guest's CPUID table.

    Errors:
        E2BIG   more than 256 entries
        EINVAL  the vCPU has run and the table is another; leaf 0x80000008 with linear addresses of
                other than 48 or 57 bits
    Source: api.rst 4.20; cpuid.c kvm_vcpu_ioctl_set_cpuid2, kvm_set_cpuid, kvm_check_cpuid
    """
    return _set_cpuid(vcpu, _take(a.entries, a.n))


@vcpu_ioctl("KVM_GET_CPUID2", _cpuid2(limit=1 << 16), cap="KVM_CAP_EXT_CPUID")
def get_cpuid2(vcpu: Vcpu, a: ArrayArg) -> int:
    """Return the guest's CPUID table, with the bits that follow the processor's state.

    Errors:
        E2BIG  too little room; the count is not told
    Source: api.rst 4.21; cpuid.c kvm_vcpu_ioctl_get_cpuid2
    """
    return _answer(a, tuple(runtime(vcpu, entry) for entry in vcpu.cpuid.entries))


@vcpu_ioctl(
    "KVM_SET_CPUID",
    Array(
        "struct kvm_cpuid",
        entry="struct kvm_cpuid_entry",
        count="nent",
        entries="entries",
        copy_in=True,
        limit=KVM_MAX_CPUID_ENTRIES,
    ),
)
def set_cpuid(vcpu: Vcpu, a: ArrayArg) -> int:
    """Replace the guest's CPUID table by one without subleaves.

    Errors:
        E2BIG   more than 256 entries
        EINVAL  as KVM_SET_CPUID2
    Source: api.rst 4.20; cpuid.c kvm_vcpu_ioctl_set_cpuid
    """
    given = (a.entries[at] for at in range(a.n))
    return _set_cpuid(vcpu, tuple(Entry(e.function, 0, 0, (e.eax, e.ebx, e.ecx, e.edx)) for e in given))


# ---- the instruction -----------------------------------------------------------------------------


def cpuid_of(vcpu: Vcpu, function: int, index: int) -> Registers:
    """Return what CPUID gives the guest (kvm_cpuid)."""
    cpuid = vcpu.cpuid
    entry = cpuid.find(function, index)
    if entry is None:
        function, entry = _OUT_OF_RANGE[vcpu.vm.kernel.cpuid.out_of_range](cpuid, function, index)
    if entry is not None:
        return runtime(vcpu, entry).registers
    first = cpuid.find(function, 1) if function in {0xB, 0x1F} else None
    # Of an undefined subleaf of the topology leaves CL comes back, and the APIC id is right.
    return (0, 0, index & 0xFF, first.registers[EDX]) if first else _NONE


Found: TypeAlias = tuple[int, Entry | None]


def _by_vendor(cpuid: GuestCpuid, function: int, index: int) -> Found:
    """Return (leaf, entry) past the highest leaf: Intel's rule, or nothing as on AMD."""
    return (function, None) if cpuid.is_amd_compatible else _highest_basic(cpuid, function, index)


def _highest_basic(cpuid: GuestCpuid, function: int, index: int) -> Found:
    """Return (leaf, entry) that Intel's CPUID gives past the highest leaf: the highest basic one."""
    basic = cpuid.find(0)
    if basic is None:
        return function, None
    if 0x4000_0000 <= function <= 0x4FFF_FFFF:
        head = cpuid.find(function & 0xFFFF_FF00)
    elif function >= 0xC000_0000:
        head = cpuid.find(0xC000_0000)
    else:
        head = cpuid.find(function & 0x8000_0000)
    if head is not None and function <= head.registers[EAX]:
        return function, None
    highest = basic.registers[EAX]
    return highest, cpuid.find(highest, index)


def _highest_of_half(cpuid: GuestCpuid, function: int, index: int) -> Found:
    """Return (leaf, entry) of the highest leaf there is, basic or extended as the one asked for.

    Source: x86.c of 2.6.35, kvm_find_cpuid_entry
    """
    del index
    half = [entry for entry in cpuid.entries if not (entry.function ^ function) & 0x8000_0000]
    # The first of the highest: later subleaves are no higher.
    best = max(half, key=lambda entry: entry.function, default=None)
    return (best.function, best) if best else (function, None)


# By KernelCpuid.out_of_range.
_OUT_OF_RANGE = {"vendor": _by_vendor, "basic": _highest_basic, "half": _highest_of_half}


@on_exit(lib.EXIT_CPUID)
def handle_cpuid(vcpu: Vcpu) -> Outcome:
    """Answer CPUID from the vCPU's table; with CPUID faulting on it is CPL 0's."""
    if vcpu.msrs.cpuid_faulting and get_cpl(vcpu):
        vcpu.events.inject_gp(vcpu)
        return RESUME
    gpr = vcpu.cpu.gpr
    function, index = gpr[0] & 0xFFFF_FFFF, gpr[1] & 0xFFFF_FFFF
    eax, ebx, ecx, edx = cpuid_of(vcpu, function, index)
    # Encoding order: eax, ecx, edx, ebx.
    gpr[0], gpr[1], gpr[2], gpr[3] = eax, ecx, edx, ebx
    if trace.kvm_cpuid.enabled:
        trace.kvm_cpuid(function=function, index=index, rax=eax, rbx=ebx, rcx=ecx, rdx=edx)
    vcpu.cpu.skip()
    return RESUME
