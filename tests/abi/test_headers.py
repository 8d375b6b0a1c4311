"""include/pykvm against the system's kernel headers: values, sizes, offsets, signedness.

Ours is what Python sees (pykvm.abi), theirs is what the compiler says of <linux/kvm.h> and its
neighbours.  The probe is C with one printf per line; lines the compiler refuses are names or members
that the installed headers do not have, and are left out.  The minimum counts keep that from hiding
everything.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pykvm import abi
from pykvm.abi import _build

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pykvm.abi._native import CType

ROOT = Path(__file__).resolve().parents[2]
SYSTEM_HEADERS = (
    "stdio.h",
    "string.h",
    "linux/version.h",
    "linux/kvm.h",
    "linux/kvm_para.h",
    "asm/kvm_para.h",
    "asm/processor-flags.h",
    "asm/debugreg.h",
    "asm/mtrr.h",
)
INCLUDES = "".join(f"#include <{name}>\n" for name in SYSTEM_HEADERS)
# asm/kvm_para.h uses it and defines it nowhere
INCLUDES += "#define GENMASK(high, low) (~0UL << (low) & ~0UL >> (63 - (high)))\n"

CHANGED = {
    "KVM_DEV_TYPE_MAX": "the end of a list",
    "KVM_SEV_NR_MAX": "the end of a list",
    "KVM_TDX_CMD_NR_MAX": "the end of a list",
    "kvm_vcpu_pv_apf_data": "lost its last member, the guest's own, in 6.8",
    "kvm_svm_nested_state_hdr": "grew after 6.18",
    "kvm_nested_state.hdr.svm size": "grew after 6.18",
}
"""What is not the same in all versions of Linux, and why."""

LINUX_6_18 = 6 << 16 | 18 << 8 | 255

NOT_OURS = re.compile(
    r"""
    KVM_S390_ | KVM_PPC_ | KVM_ARM_DEV_                             # details of other architectures
    | KVM_PV_ (?! REASON | EOI)                                     # s390 protected guests
    | KVM_TRC_ | KVM_TRACE_ | KVM_DEBUG_GUEST                       # gone long before 6.18
    | KVM_MMU_OP_ | KVM_MAX_MMU_OP_BATCH | KVM_SET_MEMORY_(REGION|ALIAS)$
    | KVM_(DE)?ASSIGN_ | KVM_DEV_ASSIGN_ | KVM_DEV_IRQ_ | KVM_MAX_MSIX_PER_DEV
    | KVM_X86_DISABLE_VALID_EXITS                                   # withdrawn: it grew
    """,
    re.VERBOSE,
)

pytestmark = pytest.mark.skipif(not Path("/usr/include/linux/kvm.h").exists(), reason="no <linux/kvm.h>")


# ---- what we have ----------------------------------------------------------------------------------


def our_constants() -> dict[str, int]:
    """Return every integer constant of our headers with the value that Python sees."""
    names = [name for name in dir(abi.lib) if not name.startswith(("CPU_", "SPTE_", "EXIT_"))]
    values = {name: getattr(abi.lib, name) for name in names}
    return {name: value for name, value in values.items() if isinstance(value, int)}


@dataclass(frozen=True)
class Member:
    """A member of a structure of ours, at any depth."""

    struct: str
    path: str
    offset: int
    size: int
    kind: str
    """signed, unsigned, pointer, char, struct, array, flexible or bits."""

    @property
    def key(self) -> str:
        return f"{self.struct}.{self.path}"


def kind_of(ctype: CType) -> str:
    """Return the kind of a member's type, as far as C can tell it from outside."""
    if ctype.kind == "array":
        return "flexible" if ctype.length is None else "array"
    if ctype.kind == "primitive":
        if ctype.cname == "char":
            return "char"
        return "signed" if int(abi.ffi.cast(ctype, -1)) < 0 else "unsigned"
    return "struct" if ctype.kind in {"struct", "union"} else ctype.kind


def members(name: str, ctype: CType, prefix: str = "", base: int = 0) -> Iterator[Member]:
    """Walk a structure depth first; an array is looked at as a whole and in its first element."""
    for field in abi.fields(ctype.cname):
        path, offset = prefix + field.name, base + field.offset
        kind = "bits" if field.bits else kind_of(field.type)
        yield Member(name, path, offset, field.size, kind)
        element = field.type.item if kind in {"array", "flexible"} else field.type
        if element.kind in {"struct", "union"}:
            index = "[0]" if element is not field.type else ""
            yield from members(name, element, f"{path}{index}.", offset)


def our_members() -> list[Member]:
    """Return every member of every structure of kvm.h."""
    text = (ROOT / "include/pykvm/kvm.h").read_text()
    names = re.findall(r"^struct (kvm_\w+) \{", text, re.MULTILINE)
    return [member for name in names for member in members(name, abi.struct_type(name))]


# ---- what they have --------------------------------------------------------------------------------


def probe(statements: dict[str, str], tmp_path: Path) -> dict[str, int]:
    """Return what each statement prints, less those that do not compile."""
    keys, kept = list(statements), dict(statements)
    source, program = tmp_path / "probe.c", tmp_path / "probe"
    for _ in range(4):  # an error can hide another in the same function
        lines = [f'{{ {kept[key]} }} puts(" {key}");' if key in kept else "" for key in keys]
        head = f'{INCLUDES}\nint main(void)\n{{\n#line 1 "probe"\n'
        source.write_text(head + "\n".join(lines) + "\nreturn 0; }\n")
        command = ["cc", "-w", "-ftrack-macro-expansion=0", "-o", str(program), str(source)]
        result = subprocess.run(command, check=False, capture_output=True, text=True)
        if result.returncode == 0:
            break
        for number in re.findall(r"^probe:(\d+):\d+: error", result.stderr, re.MULTILINE):
            kept.pop(keys[int(number) - 1], None)
    else:
        pytest.fail(f"probe does not compile:\n{result.stderr[:2000]}")
    output = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    return {key: int(value) for value, key in (line.split(" ", 1) for line in output.splitlines())}


def print_number(expression: str) -> str:
    return f'printf("%lld", (long long)({expression}));'


def print_bits(member: Member) -> str:
    """Print the bytes that a bit-field occupies, as a number."""
    first = member.path.rsplit(".", 1)[0]
    return (
        f"static struct {member.struct} x; unsigned long long v = 0; x.{member.path} = -1;"
        f" memcpy(&v, &x.{first}, sizeof x.{first} < 8 ? sizeof x.{first} : 8); {print_number('v')}"
    )


def our_bits(member: Member) -> int:
    """Return the same number for our declaration."""
    *parents, last = re.findall(r"\w+(?:\[0\])?", member.path)
    outer = abi.new(member.struct)
    inner = outer
    for parent in parents:
        inner = getattr(inner, parent.removesuffix("[0]"))
        inner = inner[0] if parent.endswith("[0]") else inner
    ctype = abi.ffi.typeof(inner)
    fields = abi.fields((ctype.item if ctype.kind == "pointer" else ctype).cname)
    width = next(field.bits[1] for field in fields if field.name == last and field.bits)
    setattr(inner, last, (1 << width) - 1)
    data = abi.to_bytes(inner)[:8]
    return int.from_bytes(data.ljust(8, b"\0"), "little", signed=True)


def member_statements(member: Member) -> dict[str, str]:
    """Return the probes of one member: where it is, how big, and what kind of number."""
    struct, path, key = f"struct {member.struct}", member.path, member.key
    if member.kind == "bits":
        return {f"{key} bits": print_bits(member)}
    value = f"(({struct} *)0)->{path}"
    found = {f"{key} offset": print_number(f"__builtin_offsetof({struct}, {path})")}
    if member.kind != "flexible":
        found[f"{key} size"] = print_number(f"sizeof({value})")
    if member.kind in {"signed", "unsigned"}:
        found[f"{key} signed"] = print_number(f"(__typeof__({value}))-1 < 0")
    return found


def member_values(member: Member) -> dict[str, int]:
    """Return what the probes of one member should say."""
    if member.kind == "bits":
        return {f"{member.key} bits": our_bits(member)}
    values = {f"{member.key} offset": member.offset, f"{member.key} size": member.size}
    return values | {f"{member.key} signed": int(member.kind == "signed")}


def differences(ours: dict[str, int], theirs: dict[str, int]) -> list[str]:
    """Return a line for everything both have and say differently."""
    return [
        f"{key}: ours {ours[key]:#x}, theirs {value:#x}"
        for key, value in theirs.items()
        if key not in CHANGED and ours[key] & 2**64 - 1 != value & 2**64 - 1
    ]


@pytest.fixture(scope="module")
def their_constants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    statements = {name: print_number(name) for name in our_constants()}
    return probe(statements, tmp_path_factory.mktemp("constants"))


@pytest.fixture(scope="module")
def their_members(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    statements: dict[str, str] = {}
    for member in our_members():
        statements |= member_statements(member)
    return probe(statements, tmp_path_factory.mktemp("members"))


# ---- the comparison --------------------------------------------------------------------------------


def test_constants(their_constants: dict[str, int]) -> None:
    assert differences(our_constants(), their_constants) == []
    assert len(their_constants) >= 720


@pytest.mark.parametrize(
    ("prefix", "least"),
    [("KVM_CAP_", 215), ("KVM_EXIT_", 40), ("KVM_GET_", 30), ("KVM_SET_", 30), ("X86_CR", 30), ("MSR_", 11)],
)
def test_constants_of_each_kind(their_constants: dict[str, int], prefix: str, least: int) -> None:
    assert sum(name.startswith(prefix) for name in their_constants) >= least


def test_members(their_members: dict[str, int]) -> None:
    ours: dict[str, int] = {}
    for member in our_members():
        ours |= member_values(member)
    assert differences(ours, their_members) == []
    assert len(their_members) >= 2000


def test_sizes(tmp_path: Path) -> None:
    names = sorted({member.struct for member in our_members()})
    theirs = probe({name: print_number(f"sizeof(struct {name})") for name in names}, tmp_path)
    assert differences({name: abi.sizeof(name) for name in names}, theirs) == []
    assert len(theirs) >= 80


def test_a_difference_is_found(their_constants: dict[str, int], their_members: dict[str, int]) -> None:
    wrong = their_constants | {"KVM_CAP_XSAVE": 56}
    assert differences(wrong, their_constants) == ["KVM_CAP_XSAVE: ours 0x38, theirs 0x37"]
    for key in ("kvm_run.io.port offset", "kvm_pit_channel_state.count_load_time signed"):
        expected = f"{key}: ours 0x9, theirs {their_members[key]:#x}"
        assert differences(their_members | {key: 9}, their_members) == [expected]
    assert "kvm_ioapic_state.redirtbl[0].fields.mask bits" in their_members


def preprocessed(tmp_path: Path, *flags: str) -> str:
    source = tmp_path / "names.c"
    source.write_text(INCLUDES)
    command = ["cc", "-E", *flags, str(source)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_nothing_is_missing(tmp_path: Path) -> None:
    """Every KVM_ name of headers up to ours is here, foreign details and the withdrawn aside."""
    version = probe({"version": print_number("LINUX_VERSION_CODE")}, tmp_path)["version"]
    if version > LINUX_6_18:
        pytest.skip("the system's headers are newer than ours")
    # an identifier, then a value; not a function-like macro, a string or a feature test
    macros = re.findall(r'(?m)^#define ((?:KVM|MSR_KVM)_\w+) (?!")\S', preprocessed(tmp_path, "-dM"))
    enums = re.findall(r"enum\s+\w*\s*\{([^}]*)\}", preprocessed(tmp_path, "-P"))
    names = {*macros, *(name for body in enums for name in re.findall(r"\bKVM_\w+", body))}
    assert len(names) > 500
    missing = {name for name in names - set(our_constants()) if not NOT_OURS.match(name)}
    assert sorted(missing) == []


# ---- what the numbers must be, whatever headers the system has -------------------------------------


@pytest.mark.spec("run.layout")
def test_kvm_run_layout() -> None:
    offsets = {field.name: field.offset for field in abi.fields("kvm_run")}
    expected = {
        "request_interrupt_window": 0,
        "immediate_exit": 1,
        "exit_reason": 8,
        "ready_for_interrupt_injection": 12,
        "if_flag": 13,
        "flags": 14,
        "cr8": 16,
        "apic_base": 24,
        "io": 32,
        "padding": 32,
        "kvm_valid_regs": 288,
        "kvm_dirty_regs": 296,
        "s": 304,
    }
    assert {name: offsets[name] for name in expected} == expected
    assert abi.sizeof("kvm_run") == 304 + 2048
    union = [field for field in abi.fields("kvm_run") if field.offset == 32]
    assert len(union) == 32
    assert all(field.size <= 256 for field in union)
    assert abi.sizeof("kvm_sync_regs") == 520


@pytest.mark.spec("fd.nr_reuse")
def test_the_same_nr_in_several_requests() -> None:
    numbers = {name: request.number for name, request in abi.requests().items()}
    x86 = [request for request in abi.requests().values() if request.fds != ("none",)]
    assert len({request.number for request in x86}) == len(x86)
    expected = {
        "KVM_IRQ_LINE_STATUS": 0xC008AE67,
        "KVM_REGISTER_COALESCED_MMIO": 0x4010AE67,
        "KVM_GET_PIT2": 0x8070AE9F,
        "KVM_GET_VCPU_EVENTS": 0x8040AE9F,
        "KVM_SET_PIT2": 0x4070AEA0,
        "KVM_SET_VCPU_EVENTS": 0x4040AEA0,
        "KVM_GET_DEBUGREGS": 0x8080AEA1,
        "KVM_SET_DEBUGREGS": 0x4080AEA2,
        "KVM_SET_TSC_KHZ": 0xAEA2,
        "KVM_GET_TSC_KHZ": 0xAEA3,
        "KVM_ENABLE_CAP": 0x4068AEA3,
    }
    assert {name: numbers[name] for name in expected} == expected


@pytest.mark.spec("fd.odd_dir")
def test_directions_are_as_odd_as_in_linux() -> None:
    requests = abi.requests()
    for name in (
        "KVM_SET_IRQCHIP",
        "KVM_SET_PIT",
        "KVM_MEMORY_ENCRYPT_REG_REGION",
        "KVM_MEMORY_ENCRYPT_UNREG_REGION",
    ):
        assert (requests[name].reads, requests[name].writes) == (True, False)
    for name in ("KVM_GET_DIRTY_LOG", "KVM_GET_DEVICE_ATTR"):
        assert (requests[name].reads, requests[name].writes) == (False, True)


def test_exit_reasons_are_complete() -> None:
    assert list(abi.exit_reasons().values()) == list(range(41))


def test_capabilities_are_complete() -> None:
    values = list(abi.capabilities().values())
    assert len(set(values)) == len(values)
    assert sorted(set(range(245)) - set(values)) == [5, 17, 19, 20, 27, 28]


# ---- the tables of pykvm.abi -----------------------------------------------------------------------


def test_every_request_is_in_the_table() -> None:
    text = (ROOT / "include/pykvm/kvm.h").read_text()
    defined = re.findall(r"^#define (KVM_\w+)\s+KVM_IO(?:R|W|WR|C)?\(", text, re.MULTILINE)
    assert sorted(defined) == sorted(abi.requests())
    assert len(defined) == 150


@pytest.mark.parametrize("request_", abi.requests().values(), ids=lambda row: row.name)
def test_request(request_: abi.Request) -> None:
    number = request_.number
    assert number == getattr(abi.uapi, request_.name)
    assert number >> 8 & 0xFF == abi.uapi.KVMIO
    assert request_.nr == number & 0xFF
    assert set(request_.fds) <= {"system", "vm", "vcpu", "device", "none"}
    assert not request_.cap or request_.cap in abi.capabilities()
    if "none" not in request_.fds:
        size = abi.ffi.sizeof(request_.argument) if request_.argument else 0
        assert request_.size == size
        assert (request_.reads or request_.writes) == bool(request_.argument)


def test_constants_through_the_module() -> None:
    assert abi.KVM_RUN == abi.uapi.KVM_RUN == abi.lib.KVM_RUN == 0xAE80
    assert abi.KVM_S390_STORE_STATUS_NOADDR == 2**64 - 1
    with pytest.raises(AttributeError, match="KVM_NO_SUCH_THING"):
        _ = abi.KVM_NO_SUCH_THING
    with pytest.raises(KeyError):
        abi.struct_type("kvm_no_such_struct")


def test_structures_as_bytes() -> None:
    regs = abi.new("kvm_regs", {"rip": 0xFFF0, "rflags": 2})
    data = abi.to_bytes(regs)
    assert (len(data), data[128:130], data[136]) == (144, b"\xf0\xff", 2)
    assert abi.to_bytes(regs[0]) == data
    assert abi.to_dict(abi.from_bytes("struct kvm_regs", data))["rip"] == 0xFFF0
    with pytest.raises(ValueError, match="143 bytes, the structure has 144"):
        abi.from_bytes("kvm_regs", data[1:])


# ---- the filter between header and cffi ------------------------------------------------------------


def test_cdef_filter() -> None:
    header = """
    #ifndef GUARD
    #define GUARD
    #include <stdint.h>
    /* a comment
       #define HIDDEN 1 */
    #define NUMBER 12 // and why
    #define HEX 0x1f
    #define SUM (NUMBER \\
                 + 1)
    #define TEXT "no"
    #define CALL(x) (x)
#ifndef PYKVM_CDEF
    static inline int only_c(void) { return 0; }
#endif
    struct s { _Atomic uint32_t a __attribute__((aligned(8))); };
    #endif
    """
    lines = [line.strip() for line in _build.cdef_of(header).splitlines() if line.strip()]
    assert lines[:3] == ["#define NUMBER 12", "#define HEX 0x1f", "#define SUM ..."]
    assert " ".join(lines[3:]).split() == ["struct", "s", "{", "uint32_t", "a", ";", "};"]


def test_stub_is_current() -> None:
    """The checked-in stub is what the header says; the build writes it anew."""
    stub = (ROOT / "pykvm/abi/_native.pyi").read_text()
    declared = set(re.findall(r"^    (\w+): int$", stub, re.MULTILINE))
    constants = {name for name in dir(abi.lib) if isinstance(getattr(abi.lib, name), int)}
    assert constants <= declared
