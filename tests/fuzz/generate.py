"""Random instructions from the core's own table, with the state that makes them interesting.

A template is the bytes of an instruction and those registers that matter: the ones of its address,
chosen so that it accesses the data pages, its stack, the counter of a repetition.  The other registers
are filled in by `fuzz_expand()` (cases.c), several times for one template.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pykvm.abi import ffi, lib
from tests.fuzz import fpu
from tests.fuzz.undefined import CHECKED_FLAGS, undefined_flags

if TYPE_CHECKING:
    from collections.abc import Iterator

# fuzz.h
DATA, CODE, GS_BASE = 0x1000_0000, 0x2000_0000, 0x1000
BRANCH, REPEATED, RAX_FOUND, VECTOR = 1, 2, 4, 64
CODE_FLAGS = {64: 0, 32: 16, 16: 32}

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
MASK64 = 2**64 - 1
TF, AC, NT = 0x100, 0x40000, 0x4000

SEGMENT_PREFIXES = (0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65)
SELECTOR = re.compile(r"/\d|rm\d|mem|reg|np|66|f3|f2|[WB]\d|64|16/32|vex|legacy")
FORMS_WITHOUT_MODRM = {"", "A,I", "Z", "Z,I", "A,Z", "I", "Ib", "Iw", "Iw,Ib", "Jb", "J", "A,O", "O,A"}
FORMS_WITHOUT_MODRM |= {"DX", "far", "string", "S"}
FORMS_WITH_MODRM = {"E,G", "G,E", "E,I", "E,Ib", "G,E,I", "G,E,Ib", "E", "E,1", "E,CL", "E,G,Ib", "E,G,CL"}
FORMS_WITH_MODRM |= {"M", "G,M", "R", "ModRM", "control", "E,S", "G,V,E", "G,E,V", "V,E"}
# V, H: vector registers of reg and vvvv; W: r/m; X: r/m that is a general register; G: reg that is one
FORMS_OF_VECTORS = {"V,W", "V,W,Ib", "V,H,W", "V,H,W,Ib", "W,V", "W,H,V", "W,V,Ib", "H,W,Ib"}
FORMS_OF_VECTORS |= {"V,X", "V,H,X", "V,H,X,Ib", "X,V", "X,V,Ib", "G,W", "G,W,Ib"}
FORMS_WITH_MODRM |= FORMS_OF_VECTORS | fpu.FORMS
ENCODINGS = {"sse", "vex128", "vex256"}
ROW_FLAGS = {"8-bit", "lock", "cpl0"} | ENCODINGS

# The instructions among rows of these forms that are generated.
NAMES_OF_FORM = {
    "M": {"cmpxchg8b", "cmpxchg16b", "ldmxcsr", "stmxcsr", "clflush", "clflushopt", "clwb", "lgdt", "lidt",
          "invlpg", *fpu.STATE},
    "V,E": {"blsr", "blsmsk", "blsi"},
    "ModRM": {"nop", "prefetch", "lfence", "mfence", "sfence", "ud0", "ud1"},
}  # fmt: skip
# What is not compared, and why.
SKIPPED = {
    **dict.fromkeys(
        ["cpuid", "rdtsc", "rdtscp", "rdpmc", "rdrand", "rdseed", "rdpid", "xgetbv", "rdpkru", "wrpkru"],
        "reads what is the host's own, or different at every execution",
    ),
    **dict.fromkeys(["syscall", "sysenter"], "enters Linux"),
    **dict.fromkeys(["vmcall", "vmmcall", "rsm"], "leaves to the KVM module, which decides"),
    **dict.fromkeys(["monitor", "mwait", "serialize"], "depends on an MSR or a CPUID bit of the host"),
    **dict.fromkeys(
        ["sgdt", "sidt", "sldt", "str", "smsw"], "UMIP: Linux emulates them, with values of its own"
    ),
    **dict.fromkeys(
        [
            "lar",
            "lsl",
            "verr",
            "verw",
            "pop_s",
            "les",
            "lds",
            "lss",
            "lfs",
            "lgs",
            "retf",
            "iret",
        ],
        "loads or looks at segments, which are Linux's on the host: tests/guest/test_segments.py",
    ),
    **dict.fromkeys(["rdfsbase", "wrfsbase", "rdgsbase", "wrgsbase"], "FS is the C library's on the host"),
}
BRANCHES = {"jmp", "call", "ret", "jcxz", "loop", "loope", "loopne"}
CONDITIONAL = re.compile(r"j(n?[opsble]|ae|[ag]e?|[bl]e|n[ps])$")
HOST_FEATURES = {
    "andn": "bmi1", "blsr": "bmi1", "blsmsk": "bmi1", "blsi": "bmi1", "bextr": "bmi1", "tzcnt": "bmi1",
    "bzhi": "bmi2", "pext": "bmi2", "pdep": "bmi2", "mulx": "bmi2", "rorx": "bmi2", "shlx": "bmi2",
    "sarx": "bmi2", "shrx": "bmi2", "adcx": "adx", "adox": "adx", "lzcnt": "abm", "popcnt": "popcnt",
    "movbe": "movbe", "crc32": "sse4_2", "cmpxchg16b": "cx16",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A line of the instruction table."""

    text: str
    escape: str
    opcode: int
    name: str
    form: str
    vex: bool = False
    flags: frozenset[str] = frozenset()
    selectors: frozenset[str] = frozenset()

    @property
    def modrm(self) -> bool:
        return (
            self.form in FORMS_WITH_MODRM or bool(self.selectors & {"mem", "reg"}) or self.group is not None
        )

    @property
    def encodings(self) -> list[str]:
        """Of a vector instruction: those it has.  Of others: nothing."""
        if "legacy" in self.selectors:
            return ["sse"]
        return sorted((ENCODINGS - {"sse"} if "vex" in self.selectors else ENCODINGS) & self.flags)

    @property
    def is_gather(self) -> bool:
        return "gather" in self.name

    @property
    def group(self) -> int | None:
        return next((int(s[1]) for s in self.selectors if s[0] == "/"), None)

    @property
    def rm(self) -> int | None:
        return next((int(s[2]) for s in self.selectors if s.startswith("rm")), None)

    @property
    def prefix(self) -> str | None:
        return next((s for s in self.selectors if s in {"np", "66", "f3", "f2"}), None)

    @property
    def rex_bit(self) -> dict[str, int]:
        """What the table asks of REX.W and REX.B."""
        return {s[0]: int(s[1]) for s in self.selectors if s[0] in "WB"}

    @property
    def is_branch(self) -> bool:
        return self.name in BRANCHES or (bool(CONDITIONAL.match(self.name)) and self.form in {"J", "Jb"})


def parse_row(text: str) -> Row:
    """Row of `cpu_insn_row()`: [vex] opcode, selectors, mnemonic, form, flags."""
    tokens = text.split()
    vex = tokens[0] == "vex"
    tokens = tokens[vex:]
    escape = tokens.pop(0) if tokens[0] in {"0f", "0f38", "0f3a"} else ""
    opcode = int(tokens.pop(0), 16)
    selectors = set()
    while SELECTOR.fullmatch(tokens[0]):
        selectors.add(tokens.pop(0))
    name = tokens.pop(0)
    form = tokens.pop(0) if tokens and tokens[0] not in ROW_FLAGS else ""
    return Row(text, escape, opcode, name, form, vex, frozenset(tokens), frozenset(selectors))


def table() -> list[Row]:
    """The whole instruction table."""
    rows: list[Row] = []
    while (text := lib.cpu_insn_row(len(rows))) != ffi.NULL:
        rows.append(parse_row(ffi.string(text).decode()))
    return rows


def is_generated(row: Row, host_features: frozenset[str], bits: int) -> bool:
    """Is this row one for the fuzzer, on this host?"""
    if row.name in SKIPPED or row.name not in NAMES_OF_FORM.get(row.form, {row.name}):
        return False
    if row.selectors & ({"16/32"} if bits == 64 else {"64", "B1"} if row.encodings else {"64", "W1", "B1"}):
        return False
    if row.form not in FORMS_WITH_MODRM | FORMS_WITHOUT_MODRM or row.form == "far":
        return False
    if (row.name in {"jmp", "call"} and row.form == "M") or (bits == 64 and row.name == "bound"):
        return False  # far transfers; EVEX
    if bits == 64 and not row.escape and 0x40 <= row.opcode < 0x50:
        return False  # REX
    return HOST_FEATURES.get(row.name, "") in host_features | {""}


@dataclass
class Template:
    """An instruction and the registers that are not left to chance."""

    row: Row
    bytes: bytes = b""
    flags: int = 0
    fixed: dict[int, int] = field(default_factory=dict)
    rip: int = CODE + 0x100
    patch: tuple[int, int] = (0, 0)
    flags_mask: int = CHECKED_FLAGS
    zeroed: list[tuple[int, int]] = field(default_factory=list)
    ignored: list[tuple[int, int]] = field(default_factory=list)
    index: tuple[int, int] = (0, 0)  # size of the indexes and register, of a gather


@dataclass
class Encoding:
    """What has been decided about an instruction under construction."""

    bits: int
    vex: bool = False
    vsib: bool = False
    legacy: list[int] = field(default_factory=list)
    rex: int = 0
    has_rex: bool = False
    vvvv: int = 0
    vex_l: int = 0
    modrm: int = 0
    sib: int | None = None
    disp: bytes = b""
    imm: bytes = b""
    memory: bool = False
    rip_relative: bool = False
    target: int = 0  # linear address of the memory operand

    @property
    def asize(self) -> int:
        other = 0x67 in self.legacy
        return (4 if other else 8) if self.bits == 64 else 2 if (self.bits == 16) != other else 4

    @property
    def address_mask(self) -> int:
        return (1 << 8 * self.asize) - 1

    @property
    def modrm16(self) -> bool:
        return self.asize == 2

    def segment_base(self, segment: int | None = None) -> int:
        """Base of the segment of an operand; without a segment: of the override or DS."""
        override = next((p for p in reversed(self.legacy) if p in SEGMENT_PREFIXES), segment)
        if self.bits == 64:
            return GS_BASE if override == 0x65 else 0
        return 0 if self.bits == 32 else CODE if override == 0x2E else DATA

    @property
    def base(self) -> int | None:
        """Base register of the memory operand."""
        if not self.memory:
            return None
        if self.modrm16:
            no_base = self.modrm & 0xC7 == 6
            return None if no_base else (RBX, RBX, RBP, RBP, RSI, RDI, RBP, RBX)[self.modrm & 7]
        low = self.modrm & 7 if self.sib is None else self.sib & 7
        if self.modrm >> 6 == 0 and low == 5:
            return None
        return low | (self.rex & 1) << 3

    @property
    def index(self) -> int | None:
        if not self.memory:
            return None
        if self.modrm16:
            return (RSI, RDI, RSI, RDI, None, None, None, None)[self.modrm & 7]
        if self.sib is None:
            return None
        index = (self.sib >> 3 & 7) | (self.rex & 2) << 2
        return None if index == RSP or self.vsib else index

    @property
    def vector_index(self) -> int:
        return ((self.sib or 0) >> 3 & 7) | (self.rex & 2) << 2

    @property
    def scale(self) -> int:
        return 0 if self.sib is None else self.sib >> 6

    @property
    def reg(self) -> int:
        """Register of the reg field."""
        return (self.modrm >> 3 & 7) | (self.rex & 4) << 1

    @property
    def rm(self) -> int:
        return (self.modrm & 7) | (self.rex & 1) << 3

    def opsize(self, row: Row) -> int:
        if "8-bit" in row.flags:
            return 1
        if self.rex & 8:
            return 8
        other = 0x66 in self.legacy and not row.prefix
        return 2 if (self.bits == 16) != other else 4


def signed(value: int, size: int) -> bytes:
    return (value & (1 << 8 * size) - 1).to_bytes(size, "little")


class Generator:
    """Templates of 64-, 32- or 16-bit code, reproducible from the seed."""

    def __init__(self, seed: object, rows: list[Row], bits: int) -> None:
        self.random = random.Random(str(seed))
        self.rows = rows
        self.bits = bits
        self.code = 0 if bits == 16 else CODE
        self.stack = DATA if bits == 16 else 0  # base of SS

    def templates(self, n: int) -> Iterator[Template]:
        while n:
            template = self.template()
            if template:
                yield template
                n -= 1

    # ---- choices

    def chance(self, one_in: int) -> bool:
        return self.random.randrange(one_in) == 0

    def data_address(self) -> int:
        """Mostly within a page; sometimes across the end of one, and in every kind of page."""
        pick, low = self.random.randrange(16), self.random.randrange(16)
        edges = {0: 0x1000 - low, 1: 0x2000 - low, 2: 0x3000 + 8 * low, 3: 0x3000 - low, 4: 0x4000 + 8 * low}
        if pick in edges:
            return DATA + edges[pick]
        return DATA + 0x40 + self.random.randrange(0x1F00) & ~(7 if pick & 1 else 0)

    def writable_address(self) -> int:
        return DATA + 0x100 + self.random.randrange(0x1E00)

    def any_address(self) -> int:
        if self.chance(64):
            # about the first that is not canonical, and about the limit of DS
            return (0x8000_0000_0000 if self.bits == 64 else DATA + 0x4FFC) + self.random.randrange(64) - 32
        return self.data_address()

    def displacement(self) -> int:
        limit = 1 << 31 if self.chance(8) else 0x4000
        return self.random.randrange(-limit, limit)

    def number(self, bits: int) -> int:
        return self.random.getrandbits(self.random.randint(1, bits))

    # ---- building

    def template(self) -> Template | None:
        row = self.random.choice(self.rows)
        t = Template(row, flags=CODE_FLAGS[self.bits], rip=self.code + 0x80 + self.random.randrange(64))
        if self.chance(8):
            t.rip = self.code + 0x1000 - self.random.randrange(16)
        e = Encoding(self.bits)
        self.choose_prefixes(row, e, t)
        self.choose_modrm(row, e)
        self.choose_immediate(row, e)
        self.set_stack(
            t, self.data_address() if self.chance(4) else DATA + 0x800 + self.random.randrange(0x400)
        )
        if row.is_branch:
            self.make_branch(row, e, t)
        if e.memory:
            self.solve_address(row, e, t)
        self.choose_state(row, e, t)
        if fpu.is_fpu(row):
            fpu.choose_state(self, row, e, t)
        t.bytes = self.encode(row, e)
        if e.rip_relative:
            self.aim_rip_relative(row, e, t)
        t.flags_mask &= ~undefined_flags(row, e.opsize(row), e.imm)
        return t if len(t.bytes) <= 15 and not self.is_known(row, e, t) else None

    def set_stack(self, t: Template, where: int) -> None:
        t.fixed[RSP] = where - self.stack
        if self.bits == 16 and self.chance(2):
            t.fixed[RSP] |= self.number(16) << 16  # above SP

    def choose_prefixes(self, row: Row, e: Encoding, t: Template) -> None:
        legacy = []
        e.vex = row.vex
        if row.encodings:
            self.choose_encoding(row, e, t)
        if row.prefix in {"66", "f2", "f3"} and not e.vex:
            legacy.append(int(row.prefix, 16))
        elif not row.prefix and self.chance(2 if row.form == "string" else 10):
            legacy.append(self.random.choice((0xF2, 0xF3)))
        if not row.prefix and not e.vex and self.chance(5):
            legacy.append(0x66)
        if self.chance(12):
            legacy.append(0x67)
        if self.chance(16):
            prefix = self.random.choice((*SEGMENT_PREFIXES, 0x65))
            # the host's FS is the C library's in 64-bit code
            legacy.append(0x65 if prefix == 0x64 and self.bits == 64 else prefix)
        if not e.vex and self.chance(6 if "lock" in row.flags else 60):
            legacy.append(0xF0)
        self.random.shuffle(legacy)
        e.legacy = legacy
        e.has_rex = self.bits == 64 and (self.chance(2) or bool(row.rex_bit))
        e.rex = self.random.getrandbits(4) if e.has_rex or (e.vex and self.bits == 64) else 0
        if e.vex and self.bits < 64:
            e.rex = self.random.getrandbits(1) << 3
        for bit, value in row.rex_bit.items() if self.bits == 64 or e.vex else ():
            mask = 8 if bit == "W" else 1
            e.rex = e.rex & ~mask | mask * value
        e.vvvv = self.random.getrandbits(4)  # 32-bit code: the upper bit is ignored, unless none is used
        if row.encodings and "H" not in row.form and not self.chance(30):
            e.vvvv = 0
        if self.chance(30):
            e.vex_l ^= 1

    def choose_encoding(self, row: Row, e: Encoding, t: Template) -> None:
        encoding = self.random.choice(row.encodings)
        e.vex = encoding != "sse"
        e.vex_l = int(encoding == "vex256")
        e.vsib = row.is_gather
        t.flags |= VECTOR

    def choose_modrm(self, row: Row, e: Encoding) -> None:
        if not row.modrm:
            return
        if row.form == "control":
            e.modrm = self.random.getrandbits(8)  # mod is ignored
            return
        reg = self.random.getrandbits(3) if row.group is None else row.group
        e.memory = self.chance(2) and row.rm is None
        if row.selectors & {"mem", "reg"}:
            e.memory = "mem" in row.selectors
        if not e.memory:
            e.modrm = 0xC0 | reg << 3 | (self.random.getrandbits(3) if row.rm is None else row.rm)
            return
        mod = self.random.randrange(3)
        rm = RSP if row.is_gather and not self.chance(60) else self.random.getrandbits(3)
        e.modrm = mod << 6 | reg << 3 | rm
        if e.modrm16:
            size = 2 if mod == 2 or e.base is None else mod
        else:
            if e.modrm & 7 == RSP:
                e.sib = self.random.getrandbits(8)
            e.rip_relative = self.bits == 64 and e.base is None and e.sib is None
            size = 4 if mod == 2 or e.base is None else mod
        e.disp = signed(self.displacement(), size)

    def choose_immediate(self, row: Row, e: Encoding) -> None:
        size = e.opsize(row)
        sizes = {"Ib": 1, "Jb": 1, "Iw": 2, "J": 4 if self.bits == 64 else size}
        for part in row.form.split(","):
            n = sizes.get(part, 0)
            if part == "I":
                n = 8 if row.form == "Z,I" and size == 8 else min(size, 4)
            e.imm += signed(self.number(8 * n), n) if n else b""
        if row.form == "far":
            e.imm = bytes(6)

    def solve_address(self, row: Row, e: Encoding, t: Template) -> None:
        """Registers or displacement so that the operand is at e.target, or near it."""
        e.target = e.target or self.any_address()
        if row.encodings and not self.chance(4):
            e.target &= -32 if e.vex_l else -16
        if fpu.is_fpu(row) and not self.chance(4):
            e.target &= -fpu.alignment(row)
        if row.is_gather:
            t.index = (8 if row.name[-2:-1] == "q" or "gatherq" in row.name else 4, e.vector_index)
        if row.name == "cmpxchg16b" and not self.chance(4):
            e.target &= ~15
        base, index, scale = e.base, e.index, e.scale
        segment_base = e.segment_base()
        offset = e.target - segment_base
        disp = int.from_bytes(e.disp, "little", signed=True)
        if base is None and index is None:
            if not e.rip_relative:
                e.disp = signed(offset, len(e.disp))
                e.target = (int.from_bytes(e.disp, "little", signed=True) & e.address_mask) + segment_base
            return
        if index is None:
            assert base is not None
            t.fixed[base] = offset - disp
        elif base is None:
            t.fixed[index] = offset - disp >> scale
        elif base == index:
            t.fixed[base] = (offset - disp) // (1 + (1 << scale))
        else:
            if index not in t.fixed:
                t.fixed[index] = self.number(6) if self.chance(2) else self.number(64 - scale)
            t.fixed[base] = offset - disp - (t.fixed[index] << scale)
        total = disp + (0 if base is None else t.fixed[base])
        total += 0 if index is None else t.fixed[index] << scale
        e.target = (total & e.address_mask) + segment_base & MASK64
        register = index if base is None else base
        assert register is not None
        if e.asize < 8 and self.chance(2) and base != index and (base is not None or not scale):
            t.fixed[register] ^= self.number(32) << 8 * e.asize

    def aim_rip_relative(self, row: Row, e: Encoding, t: Template) -> None:
        offset = (e.target or self.data_address()) - e.segment_base() - t.rip - len(t.bytes)
        e.disp = signed(offset, 4)
        t.bytes = self.encode(row, e)

    def make_branch(self, row: Row, e: Encoding, t: Template) -> None:
        t.flags |= BRANCH
        where = self.code + 0x400 + self.random.randrange(0x400)
        if self.chance(16):
            where = 0x8000_0000_0000 if self.bits == 64 else self.code + 0x2000
            where += self.random.randrange(4096)
        if row.form in {"J", "Jb"}:
            ahead = self.chance(2)
            distance = self.random.randrange(1, 100) if ahead else -self.random.randrange(20, 100)
            e.imm = signed(distance, len(e.imm))
        elif row.name == "ret":
            address = self.writable_address()
            self.set_stack(t, address)
            t.patch = (address, where)
        elif e.memory:
            e.target = self.writable_address()
            t.patch = (e.target, where)  # the address is looked at again in choose_state
        else:
            t.fixed[e.rm] = where

    def choose_state(self, row: Row, e: Encoding, t: Template) -> None:
        busy = {e.base, e.index}
        if row.is_branch and e.memory and not e.rip_relative and e.target != t.patch[0]:
            self.move_patch(e, t)
        if row.form == "string":
            self.make_string(row, e, t)
        elif row.name == "xlat":
            t.fixed[RAX] = self.number(64)
            t.fixed[RBX] = self.any_address() - e.segment_base() - (t.fixed[RAX] & 0xFF)
        elif row.form in {"A,O", "O,A"}:
            e.disp = signed(self.any_address() - e.segment_base(), e.asize)
        elif row.name in {"enter", "leave"}:
            t.fixed[RBP] = self.data_address() - self.stack
            if row.name == "enter":
                e.imm = signed(self.number(10), 2) + signed(self.number(8), 1)
        elif row.name in {"pusha", "popa"}:
            # Zen 5 has done the slots before the one that faults; we do all or none
            self.set_stack(t, self.writable_address())
        elif row.name == "popf":
            address = self.writable_address()
            self.set_stack(t, address)
            t.patch = (address, self.number(22) & ~(TF | AC | NT))
        elif row.name in {"loop", "loope", "loopne", "jcxz"}:
            t.fixed[RCX] = self.random.randrange(3) | (self.number(32) << 32 if self.chance(2) else 0)
        elif row.name in {"bt", "bts", "btr", "btc"} and row.form == "E,G" and e.memory:
            if e.reg in busy:
                t.fixed = {}  # the bit offset would move the operand far away: given up in is_known()
            else:
                t.fixed[e.reg] = self.bit_offset(e.opsize(row))
        elif row.name in {"div", "idiv"} and not busy & {RAX, RDX} and (e.memory or e.rm not in {RAX, RDX}):
            t.fixed[RDX] = self.random.choice((0, 0, MASK64, self.number(8), self.number(62)))
        elif row.name.startswith("cmpxchg") and self.chance(2):
            self.make_equal(row, e, t)
        elif row.name.startswith("pcmpestr") and not busy & {RAX, RDX}:
            t.fixed[RAX], t.fixed[RDX] = self.length(), self.length()
        elif row.name == "maskmovdqu":
            t.fixed[RDI] = self.any_address() - e.segment_base()
        elif row.name == "ldmxcsr":
            self.make_mxcsr(e, t)

    def make_mxcsr(self, e: Encoding, t: Template) -> None:
        """Without bit 17: AMD's misaligned-exception mask, which is reserved with Intel."""
        if DATA <= e.target <= DATA + 0x1FF8:
            t.patch = (e.target, self.number(16) if self.chance(2) else self.number(64) & ~0x20000)
        elif DATA <= e.target < DATA + 0x5000:
            t.fixed = {}

    def length(self) -> int:
        return self.random.randrange(-20, 20) if self.chance(2) else self.number(64)

    def move_patch(self, e: Encoding, t: Template) -> None:
        """The address could not be met exactly."""
        t.patch = (e.target, t.patch[1])
        if not DATA <= e.target <= DATA + 0x1FF8:
            t.fixed = {}

    def bit_offset(self, size: int) -> int:
        offset = self.random.randrange(-20000, 20000)
        upper = 0 if size == 8 else self.number(64 - 8 * size) << 8 * size
        return offset & MASK64 if size == 8 else offset & (1 << 8 * size) - 1 | upper

    def make_string(self, row: Row, e: Encoding, t: Template) -> None:
        t.fixed[RSI] = self.any_address() - e.segment_base()
        t.fixed[RDI] = self.any_address() - self.stack  # ES is where SS is
        if self.chance(4):
            t.fixed[RDI] = t.fixed[RSI] + self.random.randrange(-8, 12)
        t.fixed[RCX] = self.random.randrange(3000 if self.chance(4) else 40)
        if e.asize < 8:
            for register in (RSI, RDI, RCX):
                t.fixed[register] ^= self.number(32) << 8 * e.asize
        t.flags |= REPEATED if {0xF2, 0xF3} & set(e.legacy) else 0
        t.flags |= RAX_FOUND if row.name == "scas" else 0

    def make_equal(self, row: Row, e: Encoding, t: Template) -> None:
        """The comparison succeeds, in registers or (aligned) memory."""
        if not e.memory:
            value = self.number(64)
            t.fixed.update({RAX: value, e.rm: value})
        elif DATA <= e.target <= DATA + 0x1FF8 and {e.base, e.index}.isdisjoint({RAX, RDX}):
            word = self.number(64)
            t.patch = (e.target, word)
            t.fixed[RAX] = word
            if row.name == "cmpxchg8b":
                t.fixed[RAX], t.fixed[RDX] = word & 0xFFFF_FFFF, word >> 32

    # ---- bytes

    def encode(self, row: Row, e: Encoding) -> bytes:
        out = bytes(e.legacy)
        if e.vex:
            out += self.encode_vex(row, e)
        else:
            out += bytes([0x40 | e.rex]) if e.has_rex else b""
            out += bytes.fromhex(row.escape)
        out += bytes([row.opcode])
        if row.modrm:
            out += bytes([e.modrm]) + (b"" if e.sib is None else bytes([e.sib]))
        return out + e.disp + e.imm

    def encode_vex(self, row: Row, e: Encoding) -> bytes:
        mmmmm = {"0f": 1, "0f38": 2, "0f3a": 3}[row.escape]
        pp = {"np": 0, None: 0, "66": 1, "f3": 2, "f2": 3}[row.prefix]
        low = (e.vvvv ^ 15) << 3 | e.vex_l << 2 | pp
        return bytes([0xC4, (~e.rex & 7) << 5 | mmmmm, (e.rex & 8) << 4 | low])

    def reads_code(self, row: Row, e: Encoding, t: Template) -> bool:
        near = abs(e.target - CODE - t.rip) < 64
        return near or row.form in {"string", "A,O"} or row.name == "xlat"

    def is_known(self, row: Row, e: Encoding, t: Template) -> bool:
        """Cases that cannot be compared, and where AMD processors differ from the SDM, which we follow."""
        if not t.fixed or (e.rip_relative and row.is_branch):
            return True
        if self.bits == 16 and 0x2E in e.legacy and self.reads_code(row, e, t):
            return True  # what is behind the instruction is not the same
        if self.bits == 64 and row.is_branch and 0x66 in e.legacy:
            return True  # AMD truncates rip to 16 bits; we ignore the prefix as Intel does (SDM vol. 2, JMP)
        if row.name == "maskmovdqu" and t.fixed[RDI] >> 46:
            return True  # across the end of canonical addresses: implementation-specific (SDM vol. 2)
        if row.name == "prefetch" and row.opcode == 0x0D and not e.memory:
            return True  # of a register: #UD (APM vol. 3, PREFETCH); Intel and iced-x86: NOP
        if row.name in {"loope", "loopne"} and {0xF2, 0xF3} & set(e.legacy):
            return True  # REPE and REPNE decide about ZF in place of the opcode (measured on Zen 5)
        if row.name in {"pextrd", "pinsrd"} and e.vex and e.rex & 8 and self.bits < 64:
            return True  # VEX.W is ignored outside 64-bit mode (SDM vol. 2, PINSRD); Zen 5 raises #UD
        # MOVSXD r16: the source is 16 bits (SDM vol. 2); Zen 5 reads 32
        return row.name == "movsxd" and e.memory and e.opsize(row) == 2
