"""The instruction decoder against iced-x86 (the long form: tests/fuzz/decode.py), and by itself."""

from __future__ import annotations

import random
from unittest.mock import patch

import iced_x86 as iced
import pytest

from pykvm.abi import ffi, lib
from pykvm.kvm.cpuid import FEATURES, WORDS
from tests.fuzz import decode as long_form
from tests.fuzz.decode import ABSENT, RENAMED, Comparison, sequence
from tests.fuzz.generate import Generator, Row, table

SEQUENCES = 40_000


def decode(code: bytes, bits: int) -> int:
    return int(lib.cpu_decode(code, len(code), bits, ffi.NULL, 0))


@pytest.mark.spec("cpu.isa_int", "cpu.ud_space")
@pytest.mark.parametrize("bits", [16, 32, 64])
def test_length_mnemonic_and_validity(bits: int) -> None:
    comparison = Comparison(bits)
    differences = list(comparison.run(0, SEQUENCES))
    assert not differences, "\n".join(differences[:20])
    assert comparison.agreed[True] > SEQUENCES / 3
    assert comparison.agreed[False] > SEQUENCES / 10


def test_every_difference_is_seen() -> None:
    """A name, a length, an instruction too many or too few."""
    comparison = Comparison(64)
    assert comparison.compare(b"\x90".ljust(15)) is None
    for code in (b"\x0f\x0b", b"\x01\xc0", b"\x0f\x01\xd8", b"\x06"):  # UD2, ADD, VMRUN, PUSH ES
        assert comparison.compare(code.ljust(15)) is None
    movs = b"\xa4".ljust(15)
    with patch.dict(RENAMED, clear=True):
        assert comparison.compare(movs) == f"{movs.hex()}: 1 movs, iced: 1 movsb (movsb)"
    with patch.dict(ABSENT, clear=True):
        assert "0 invalid, iced: 3 vmrun" in str(comparison.compare(b"\x0f\x01\xd8".ljust(15)))
    comparison.bits = 32
    assert comparison.compare(b"\xc4\xe2\x39\xdb\xc3".ljust(15)) is None  # VAESIMC with vvvv 0111: once valid
    assert comparison.compare(b"\x0f\x20\xc8".ljust(15)) is None  # MOV EAX, CR1: once #UD at execution only


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_missing_bytes(bits: int) -> None:
    """A prefix of a valid instruction wants more, never something else."""
    r = random.Random(1000 + bits)
    for code in (sequence(r) for _ in range(4000)):
        length = decode(code, bits)
        if length > 0:
            assert all(decode(code[:n], bits) == -1 for n in range(length)), code.hex()


def test_fifteen_bytes() -> None:
    assert decode(b"\x66" * 14 + b"\x90", 64) == 15
    assert decode(b"\x66" * 15 + b"\x90", 64) == 0
    assert decode(b"\x2e" * 10 + b"\x81\x05\0\0\0\0\0\0\0\0", 64) == 0


def test_lock() -> None:
    assert decode(b"\xf0\x01\x00", 64) == 3  # lock add [rax], eax
    assert decode(b"\xf0\x01\xc0", 64) == 0  # a register
    assert decode(b"\xf0\x03\x00", 64) == 0  # memory is the source
    assert decode(b"\xf0\x39\x00", 64) == 0  # CMP writes nothing
    assert decode(b"\xf0\x90", 64) == 0


def test_mnemonics() -> None:
    def name(code: bytes, bits: int = 64) -> str:
        text = ffi.new("char[]", 16)
        assert lib.cpu_decode(code, len(code), bits, text, 16) == len(code)
        return str(ffi.string(text), "ascii")

    assert name(b"\x0f\xaf\xc1") == "imul"
    assert name(b"\xf3\x0f\xb8\xc1") == "popcnt"
    assert name(b"\x48\x0f\xc7\x08") == "cmpxchg16b"
    assert name(b"\x63\xc8") == "movsxd"
    assert name(b"\x63\xc8", 32) == "arpl"
    assert name(b"\x41\x90") == "xchg"
    assert name(b"\xf3\x90") == "pause"
    assert name(b"\xc4\xe2\x70\xf2\xc1") == "andn"


def test_rows() -> None:
    rows: list[str] = []
    while text := lib.cpu_insn_row(len(rows)):
        rows.append(str(ffi.string(text), "ascii"))
    assert "0f af imul G,E" in rows
    assert "f3 0f b8 popcnt G,E" not in rows
    assert "0f b8 f3 popcnt G,E" in rows
    assert "00 add E,G 8-bit lock" in rows
    assert len(rows) > 500


# ---- CPUID's bits of the rows, as iced-x86 knows them

ALWAYS = {
    "INTEL8086",
    "INTEL186",
    "INTEL286",
    "INTEL386",
    "INTEL486",
    "X64",
    "CPUID",
    "MULTIBYTENOP",
    "PAUSE",
}
ALWAYS |= {"FPU", "FPU287", "FPU387"}
# VEX encodings: the row has the bit of the legacy encoding, the handler asks for these.
OF_ENCODING = {"AVX", "AVX2", "VAES", "VPCLMULQDQ"}
LINUX_NAMES = {"LZCNT": "ABM", "CLFSH": "CLFLUSH", "CMPXCHG16B": "CX16", "SHA": "SHA_NI"}
# Rows that do not ask for the bit iced has, and why.
NOT_ASKED = {
    "MONITOR": "monitor mwait",  # leave to the module
    "VMX": "vmcall",  # the same: hypercalls of both vendors
    "SVM": "vmmcall",
    "SEV_ES": "vmmcall",
    "SMM": "rsm",
    "RDPMC": "rdpmc",  # there since the Pentium MMX, without a bit
    "WBNOINVD": "wbinvd",  # F3 is ignored
    "CLDEMOTE": "nop",
    **dict.fromkeys(["PREFETCHITI", "PREFETCHW", "PREFETCHWT1", "SSE"], "prefetch"),  # hints, NOP without
}
# Rows that ask for a bit iced has not: LAHF_LM for 64-bit mode; SSE2, with which PADDQ came (APM vol. 5).
ASKED = {"lahf": "LAHF_LM", "sahf": "LAHF_LM", "paddq": "SSE2"}


def features_of(row: Row, bits: int) -> set[frozenset[str]]:
    """What iced-x86 says that random instructions of this row need."""
    found: set[frozenset[str]] = set()
    if bits == 32 and row.selectors & {"W1", "64"}:
        return found
    generator = Generator(row.text, [row], bits)
    for template in filter(None, (generator.template() for _ in range(20))):
        instruction = iced.Decoder(bits, template.bytes.ljust(15, b"\0")).decode()
        if instruction.code != iced.Code.INVALID and instruction.len == len(template.bytes):
            found.add(frozenset(long_form.FEATURES[value] for value in instruction.cpuid_features()))
    return found


@pytest.mark.spec("sys.GET_SUPPORTED_CPUID")
def test_rows_ask_for_the_features_that_iced_knows() -> None:
    """So that what CPUID offers and what is executed are the same also by another's list."""
    bits_of = {
        (WORDS[f.word].ctl or 0) << 5 | f.bit: f.name for f in FEATURES if WORDS[f.word].ctl is not None
    }
    wrong, seen = [], 0
    for number, row in enumerate(table()):
        bit = lib.cpu_insn_feature(number)
        asked = {bits_of[bit]} if bit >= 0 else set()
        for features in features_of(row, 64) | features_of(row, 32):
            seen += 1
            known = {
                LINUX_NAMES.get(f, f)
                for f in features - ALWAYS
                if row.name not in NOT_ASKED.get(f, "").split()
            }
            missing = known - OF_ENCODING - asked - ({"MMX"} if row.name == "paddq" else set())
            too_many = set() if known & OF_ENCODING else asked - known - {ASKED.get(row.name)}
            if missing or too_many:
                wrong.append(f"{row.text}: {asked or 'nothing'}, iced {sorted(features)}")
    assert not wrong, "\n".join(wrong)
    assert seen > 1000
