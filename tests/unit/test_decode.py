"""The instruction decoder against iced-x86: length and validity of random and of directed bytes."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import iced_x86 as iced
import pytest
from iced_x86 import CpuidFeature

from pykvm.abi import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Iterator

SEQUENCES = 40_000
PREFIXES = b"\x66\x67\xf2\xf3\xf0\x2e\x36\x3e\x26\x64\x65\x40\x41\x44\x48\x4f"
# Where most of the structure is: escapes, VEX, groups and their sub-tables.
STARTS = (
    *[b""] * 8,
    *[b"\x0f"] * 6,
    *[b"\x0f\x38", b"\x0f\x3a", b"\x0f\x38\xf0", b"\x0f\x38\xf1", b"\x0f\x38\xf6"] * 2,
    *[b"\xc4\xe2", b"\xc4\xe3", b"\xc4\x42", b"\xc4\x22", b"\xc5", b"\xc4\xe2\x78\xf7"] * 2,
    *[b"\x0f\x00", b"\x0f\x01", b"\x0f\xae", b"\x0f\xc7", b"\x0f\xba", b"\x0f\xb8", b"\x0f\xbc"],
    *[b"\x80", b"\x83", b"\xc0", b"\xd3", b"\xf6", b"\xf7", b"\xfe", b"\xff", b"\x8f", b"\x63", b"\x90"],
)

# Instructions of these must decode; those of other features may be missing, and are #UD then.
OFFERED = {
    getattr(CpuidFeature, name)
    for name in [
        "INTEL8086",
        "INTEL186",
        "INTEL286",
        "INTEL386",
        "INTEL486",
        "X64",
        *["SSE", "SSE2", "SSE3", "SSSE3", "SSE4_1", "SSE4_2", "AES", "PCLMULQDQ", "SHA", "GFNI"],
        *["AVX", "AVX2", "FMA", "F16C", "VAES", "VPCLMULQDQ"],
        "ADX",
        "BMI1",
        "BMI2",
        "CLFLUSHOPT",
        "CLFSH",
        "CLWB",
        "CMOV",
        "CMPXCHG16B",
        "CX8",
        "FSGSBASE",
        "INVPCID",
        "LZCNT",
        "MONITOR",
        "MOVBE",
        "MSR",
        "MULTIBYTENOP",
        "PAUSE",
        "PKU",
        "POPCNT",
        "RDPID",
        "RDPMC",
        "RDRAND",
        "RDSEED",
        "RDTSCP",
        "SEP",
        "SERIALIZE",
        "SMAP",
        "SYSCALL",
        "TSC",
        "XSAVE",
        "SMM",
        "CPUID",
        "UDBG",
        "VMX",
        "SVM",
    ]
}
# Valid for iced, of an offered feature, and still undefined here: what it is, and why.
UNDEFINED = {
    "WAIT": "x87",
    "GETSEC": "SMX is not offered",
    **dict.fromkeys(
        [
            "VMCLEAR",
            "VMLAUNCH",
            "VMPTRLD",
            "VMPTRST",
            "VMREAD",
            "VMRESUME",
            "VMWRITE",
            "VMXOFF",
            "VMXON",
            "VMFUNC",
            "INVEPT",
            "INVVPID",
        ],
        "VMX is not offered",
    ),
    **dict.fromkeys(
        ["VMRUN", "VMLOAD", "VMSAVE", "STGI", "CLGI", "INVLPGA", "SKINIT"],
        "SVM is not offered",
    ),
    **dict.fromkeys(
        ["XSAVE", "XSAVE64", "XRSTOR", "XRSTOR64"],
        "vector state has its own rows",
    ),
}
MNEMONIC = {value: name for name, value in vars(iced.Mnemonic).items() if name.isupper()}


def sequences(seed: int) -> Iterator[bytes]:
    r = random.Random(seed)
    for _ in range(SEQUENCES):
        count = r.choice((0, 0, 0, 1, 1, 2, 3, r.randrange(14)))
        head = bytes(r.choices(PREFIXES, k=count)) + r.choice(STARTS)
        yield (head + r.randbytes(15))[:15]


def decode(code: bytes, bits: int) -> int:
    return int(lib.cpu_decode(code, len(code), bits, ffi.NULL, 0))


def is_exception(instruction: iced.Instruction, code: bytes, bits: int, ours: int) -> bool:
    """Differences that are meant."""
    if instruction.code == iced.Code.INVALID:
        # a register that is not there: MOV CR1 is #UD when executed
        opcode = code.lstrip(PREFIXES if bits == 64 else PREFIXES[:-5])[:2]
        return opcode in {b"\x0f\x20", b"\x0f\x21", b"\x0f\x22", b"\x0f\x23"}
    if ours:
        return False
    mnemonic = MNEMONIC[instruction.mnemonic]
    return bool(UNDEFINED.get(mnemonic)) or not set(instruction.cpuid_features()) <= OFFERED


@pytest.mark.spec("cpu.isa_int", "cpu.ud_space")
@pytest.mark.parametrize("bits", [16, 32, 64])
def test_length_and_validity(bits: int) -> None:
    wrong = []
    for code in sequences(bits):
        ours = decode(code, bits)
        instruction = iced.Decoder(bits, code).decode()
        theirs = 0 if instruction.code == iced.Code.INVALID else instruction.len
        if ours != theirs and not is_exception(instruction, code, bits, ours):
            wrong.append(f"{code.hex()}: {ours}, iced {theirs} {instruction}")
    assert not wrong, wrong[:20]


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_missing_bytes(bits: int) -> None:
    """A prefix of a valid instruction wants more, never something else."""
    for code in list(sequences(1000 + bits))[:4000]:
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
