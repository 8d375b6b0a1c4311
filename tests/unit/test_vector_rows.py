"""Every form of every vector instruction decodes: opcode maps against iced-x86, without chance."""

from __future__ import annotations

import re
from itertools import product
from typing import TYPE_CHECKING, Any

import iced_x86 as iced
import pytest
from iced_x86 import CpuidFeature, Decoder, EncodingKind, OpCodeInfo

from pykvm.abi import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Iterator

NAMES = "SSE SSE2 SSE3 SSSE3 SSE4_1 SSE4_2 AES PCLMULQDQ SHA AVX AVX2 FMA F16C VAES VPCLMULQDQ GFNI"
OFFERED = {getattr(CpuidFeature, name) for name in NAMES.split()}
MNEMONIC = {value: name.lower() for name, value in vars(iced.Mnemonic).items() if name.isupper()}
ESCAPES = {1: b"\x0f", 2: b"\x0f\x38", 3: b"\x0f\x3a"}
MODS = (0x05, 0x44, 0xC0)
TAIL = bytes.fromhex("2413354759")
# iced's names of forms with 64-bit registers, and names that we have for a group
SAME = {"pcmpestri64": "pcmpestri", "pcmpestrm64": "pcmpestrm"}
PREFETCHES = {"prefetchnta", "prefetcht0", "prefetcht1", "prefetcht2"}


def encodings(bits: int) -> Iterator[bytes]:
    """Each opcode of the maps with each mandatory prefix, W, L, reg field and kind of operand."""
    for (map_, escape), opcode, prefix in product(ESCAPES.items(), range(256), range(4)):
        if map_ == 1 and opcode in {0x38, 0x3A}:
            continue
        for reg, mod in product(range(8), MODS):
            modrm = bytes([opcode, mod | reg << 3]) + TAIL
            for rex in (b"", b"\x48") if bits == 64 else (b"",):
                yield (b"", b"\x66", b"\xf3", b"\xf2")[prefix] + rex + escape + modrm
            for w, wide, vvvv in product((0, 1), (0, 1), (15, 9)):
                yield bytes([0xC4, 0xE0 | map_, w << 7 | vvvv << 3 | wide << 2 | prefix]) + modrm


def decode(code: bytes, bits: int) -> tuple[int, str]:
    text = ffi.new("char[]", 32)
    length = int(lib.cpu_decode(code, len(code), bits, text, 32))
    return length, ffi.string(text).decode()


def expected(instruction: iced.Instruction) -> tuple[int, str]:
    name = MNEMONIC[instruction.mnemonic]
    plain = name.removeprefix("v")
    return instruction.len, name if plain not in SAME else name[: -len(plain)] + SAME[plain]


def is_vector(instruction: iced.Instruction) -> bool:
    features = set(instruction.cpuid_features())
    name = MNEMONIC[instruction.mnemonic]
    return bool(features) and features <= OFFERED and name not in PREFETCHES


@pytest.mark.spec("fpu.sse", "fpu.avx")
@pytest.mark.parametrize("bits", [16, 32, 64])
def test_forms(bits: int) -> None:
    seen: set[int] = set()
    wrong = []
    for code in encodings(bits):
        instruction = Decoder(bits, code).decode()
        if instruction.is_invalid:
            length, name = decode(code, bits)
            if length > 0:
                wrong.append(f"{code.hex()}: {name}, and invalid")
        elif is_vector(instruction):
            seen.add(instruction.code)
            if decode(code, bits) != expected(instruction):
                wrong.append(f"{code.hex()}: {decode(code, bits)}, not {expected(instruction)}")
    assert not wrong, wrong[:20]
    if bits == 64:
        assert not unseen(seen)


def unseen(seen: set[int]) -> list[str]:
    """Forms that iced knows and `encodings` did not make."""
    missing = []
    for name in vars(iced.Code):
        code: Any = getattr(iced.Code, name)
        if not name.isupper() or code in seen or not OpCodeInfo(code).is_instruction:
            continue
        instruction = iced.Instruction()
        instruction.code = code
        encoding = OpCodeInfo(code).encoding
        if encoding in {EncodingKind.LEGACY, EncodingKind.VEX} and is_vector(instruction):
            missing.append(name)
    # without prefix: their ModRM bytes; with two: the 16-bit CRC32
    return [name for name in missing if not re.search(r"FENCE_|CRC32_R32_RM16", name)]
