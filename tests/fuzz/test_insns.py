"""A short run of the differential fuzzer (insns.py), and what it found once."""

from __future__ import annotations

import platform
import shutil

import pytest

from tests.fuzz.generate import CODE, CODE_FLAGS, REPEATED, VECTOR, Template, parse_row, table
from tests.fuzz.insns import BATCH, VARIANTS, Fuzzer

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("cc") is None,
    reason="compares with the host processor, through a helper in C",
)
SEED = 20
BATCHES = 4


@pytest.fixture(scope="module", params=[64, 32, 16])
def fuzzer(request: pytest.FixtureRequest) -> Fuzzer:
    return Fuzzer(request.param)


@pytest.mark.spec("cpu.isa_int", "cpu.bit_shift", "cpu.muldiv", "cpu.isa_bcd_misc")
def test_host_and_core_agree(fuzzer: Fuzzer) -> None:
    differences = [d for number in range(BATCHES) for d in fuzzer.batch(SEED, number)]
    assert not differences, "\n".join(map(str, differences[:10]))
    assert len(fuzzer.covered) > 150


@pytest.mark.spec("fpu.sse", "fpu.avx")
@pytest.mark.parametrize("bits", [64, 32, 16])
def test_vectors_agree(bits: int) -> None:
    names = frozenset(row.name for row in table() if row.encodings)
    fuzzer = Fuzzer(bits, names)
    differences = [d for number in range(2 * BATCHES) for d in fuzzer.batch(SEED, number)]
    assert not differences, "\n".join(map(str, differences[:10]))
    assert len(fuzzer.covered) > len(names) * 0.9


def test_every_difference_of_vectors_is_seen() -> None:
    fuzzer = Fuzzer(64, frozenset({"addps"}))
    assert not fuzzer.batch(SEED, 0)
    image = fuzzer.emulated[VARIANTS].out.xsave
    for at in (24, 160, 415, 576, 831):  # MXCSR, XMM0, XMM15, the upper halves of YMM0 and YMM15
        image[at] ^= 1
        assert differing(fuzzer) == VARIANTS, at
        image[at] ^= 1
    assert differing(fuzzer) == BATCH


def test_every_difference_is_seen(fuzzer: Fuzzer) -> None:
    assert not fuzzer.batch(SEED, 0)
    result = fuzzer.emulated[VARIANTS]
    for name in ("rip", "rflags"):
        value = getattr(result.out, name)
        setattr(result.out, name, value ^ 1)
        assert differing(fuzzer) == VARIANTS, name
        setattr(result.out, name, value)
    result.out.gpr[15] ^= 1
    assert differing(fuzzer) == VARIANTS
    result.out.gpr[15] ^= 1
    result.memory_hash ^= 1
    assert differing(fuzzer) == VARIANTS
    result.memory_hash ^= 1
    result.vector ^= 1
    assert differing(fuzzer) == VARIANTS
    result.vector ^= 1
    assert differing(fuzzer) == BATCH


def differing(fuzzer: Fuzzer) -> int:
    return int(fuzzer.lib.fuzz_differs(fuzzer.cases, fuzzer.native, fuzzer.emulated, 0, BATCH))


@pytest.mark.parametrize(("bits", "rax"), [(64, 0x9090_5678), (32, 0x9090_5679), (16, 0x1234_5679)])
def test_host_executes_code_of_that_size(bits: int, rax: int) -> None:
    """REX or INC, and an immediate of 32 bits or one of 16 with two NOPs."""
    fuzzer = Fuzzer(bits)
    fixed = {0: 0x1234_0000, 4: 0x800 if bits == 16 else 0x1000_0800}
    code = bytes.fromhex("b8785690904090")
    template = Template(
        parse_row("40 inc"), code, CODE_FLAGS[bits], fixed, 0x80 if bits == 16 else CODE + 0x80
    )
    fuzzer.run([template], SEED)
    assert (fuzzer.native[0].vector, fuzzer.native[0].out.gpr[0]) == (-1, rax)


# Bytes, registers, what was wrong.
FOUND = [
    (64, "c442a0f5dc", {}, "bzhi: CF by the count after the destination had overwritten it"),
    (64, "41ffd7", {15: 0x8000_0000_0000, 4: 0x1000_3008}, "call: #PF of the push before #GP of the target"),
    (16, "ffd4", {4: 0x2FFE}, "call: the same in 16-bit code"),
    (64, "f2480fbdc1", {1: 0}, "bsr of 0: destination and PF"),
    (64, "660fa5c8", {1: 18}, "shld of 16 bits by more than 16"),
    (64, "f348a6", {1: 5, 6: 0x1000_0FF0, 7: 0x1000_1FF8}, "cmps: flags at a fault in the middle"),
    (32, "3f", {0: 0x9A54}, "aas: SF by ax"),
    (16, "37", {0: 0x9AAF}, "aaa: SF by ax"),
    (32, "d53d", {0: 0xFF}, "aad: CF, AF and OF by its addition"),
    (32, "2f", {0: 0x9A}, "das: OF"),
    (32, "c4e2b9dbc3", {}, "vaesimc: #UD with vvvv 0111"),
    (64, "0f20c8", {}, "mov: #UD of a control register that is not there before #GP of the privilege"),
    (64, "67c482652d9406afe0ffff", {8: 0x9471_14B8, 14: 0x6B8F_0A96},
     "vmaskmovpd: elements behind 4 GiB are not at 0"),
    (32, "16", {}, "push_s: all 32 bits are written (AMD)"),
    (32, "66634bb5", {3: 0x1000_3100}, "arpl: writes only what changes, so not to a read-only page"),
    (64, "0f35", {}, "sysexit: #GP of the privilege before #UD (AMD, in long mode)"),
]  # fmt: skip


@pytest.mark.parametrize(("bits", "code", "registers", "what"), FOUND, ids=[f[3] for f in FOUND])
def test_found_once(bits: int, code: str, registers: dict[int, int], what: str) -> None:
    fuzzer = Fuzzer(bits)
    row = parse_row(f"00 {what.split(':', maxsplit=1)[0].split(maxsplit=1)[0]}")
    fixed = {4: 0x800 if bits == 16 else 0x1000_0800, **registers}
    flags = (
        CODE_FLAGS[bits] | (REPEATED if code[:2] in {"f2", "f3"} else 0) | (VECTOR if what[0] == "v" else 0)
    )
    template = Template(row, bytes.fromhex(code), flags, fixed, 0x80 if bits == 16 else CODE + 0x80)
    assert not fuzzer.run([template], SEED)


def test_rows_are_understood() -> None:
    rows = {row.text: row for row in table()}
    assert rows["0f c7 mem /1 W0 cmpxchg8b M lock"].rex_bit == {"W": 0}
    assert rows["vex 0f38 f3 np /3 blsi V,E"].group == 3
    assert rows["80 /0 add E,I 8-bit lock"].flags == {"8-bit", "lock"}
