"""FXSAVE, FXRSTOR and the XSAVE family on the bare processor.

Results are compared with the host in tests/fuzz; here what that cannot show: modes, control bits,
privilege, PKRU, missing pages.
Source: SDM vol. 1 10.5 and chapter 13.
"""

from __future__ import annotations

import struct

import pytest

from pykvm.abi import ffi, lib
from tests.guest.bare import CODE, PD, Machine

UD, NM, GP, PF = 6, 7, 13, 14
EM, TS = 4, 8
AREA, NEXT_PAGE = 0x20000, 0x21000
XSTATE_BV, XCOMP_BV = AREA + 512, AREA + 520
X87, SSE, AVX, PKRU = 1, 2, 4, 0x200
COMPACTED = 1 << 63
MXCSR, MXCSR_MASK = 24, 28
XMM, YMM_STANDARD, PKRU_STANDARD = 160, 576, 2688
INSTRUCTIONS = ["xsave", "xsaveopt", "xsavec", "xsaves", "xrstor", "xrstors"]


@pytest.fixture
def m() -> Machine:
    return Machine()


def start(m: Machine, source: str, rfbm: int = X87 | SSE | AVX, mode: str = "long64", cpl: int = 0) -> None:
    """In 64-bit mode with every component enabled; rfbm is in edx:eax, the area at rbx."""
    m.asm(source, CODE, bits={"long64": 64, "prot32": 32, "real": 16}[mode])
    if mode == "real":
        m.real(CODE)
    else:
        getattr(m, mode)(CODE, cpl)
    fpu = m.guest.fpu
    ffi.memmove(ffi.addressof(fpu), bytes(ffi.sizeof(fpu)), ffi.sizeof(fpu))
    fpu.fcw, fpu.mxcsr = 0x37F, 0x1F80
    cr4 = m.reg("cr4") | lib.X86_CR4_OSXSAVE | lib.X86_CR4_OSFXSR
    cr4 |= lib.X86_CR4_PKE if mode == "long64" else 0
    m.set(
        cr4=cr4, xcr0=X87 | SSE | AVX | PKRU, xss=0, pkru=0, rax=rfbm & 0xFFFFFFFF, rdx=rfbm >> 32, rbx=AREA
    )
    m.load(AREA, b"\xa5" * 0x1000)
    m.load(XSTATE_BV, bytes(64))


def fill(m: Machine) -> None:
    """Registers with recognizable values, none of them initial."""
    fpu = m.guest.fpu
    fpu.fcw, fpu.fsw, fpu.ftw, fpu.fop = 0x27F, 5 << 11, 0xE0, 0x123
    fpu.fip, fpu.fdp, fpu.mxcsr = 0x1234_5678_9ABC, 0x2345_6789_ABCD, 0x1FA0
    for n in range(8):
        fpu.st[n] = bytes([0x10 + n]) * 10 + bytes(6)
    for n in range(16):
        fpu.ymm[n] = bytes([0x40 + n]) * 16 + bytes([0x80 + n]) * 16
    m.guest.pkru = 0xC0
    m.set()


def registers(m: Machine) -> tuple[object, ...]:
    fpu = m.guest.fpu
    return (fpu.fcw, fpu.fsw, fpu.ftw, fpu.fop, fpu.fip, fpu.fdp, fpu.mxcsr, bytes(ffi.buffer(fpu.st)),
            bytes(ffi.buffer(fpu.ymm)), m.guest.pkru)  # fmt: skip


def area(m: Machine, offset: int, size: int) -> bytes:
    return m.ram[AREA + offset : AREA + offset + size]


def xmm(n: int) -> bytes:
    return bytes([0x40 + n]) * 16


def ymm_high(n: int) -> bytes:
    return bytes([0x80 + n]) * 16


UNTOUCHED = b"\xa5"


# ---- FXSAVE, FXRSTOR


@pytest.mark.spec("fpu.fxsave")
def test_fxsave_image(m: Machine) -> None:
    start(m, "fxsave64 [rbx]; fxsave [rbx + 512]; hlt")
    fill(m)
    m.run(lib.EXIT_HLT)
    head = struct.unpack("<HHBBHQQII", area(m, 0, 32))
    assert head == (0x27F, 5 << 11, 0xE0, 0, 0x123, 0x1234_5678_9ABC, 0x2345_6789_ABCD, 0x1FA0, 0xFFFF)
    head = struct.unpack("<HHBBHIHHIHHII", area(m, 512, 32))
    assert head[5:] == (0x5678_9ABC, 0, 0, 0x6789_ABCD, 0, 0, 0x1FA0, 0xFFFF)
    assert area(m, 32, 128) == b"".join(bytes([0x10 + n]) * 10 + bytes(6) for n in range(8))
    assert area(m, XMM, 256) == b"".join(map(xmm, range(16)))
    assert area(m, 416, 96) == UNTOUCHED * 96


@pytest.mark.spec("fpu.fxsave")
@pytest.mark.parametrize("mode", ["real", "prot32"])
def test_fxsave_outside_64_bit_mode(m: Machine, mode: str) -> None:
    """Eight XMM registers, both ways."""
    base = {"real": "[bx]", "prot32": "[ebx]"}[mode]
    start(m, f"fxsave {base}; xorps xmm7, xmm7; fxrstor {base}; hlt", mode=mode)
    m.set(rbx=0x8000)
    m.load(0x8000, UNTOUCHED * 512)
    fill(m)
    m.run(lib.EXIT_HLT)
    assert m.ram[0x8000 + XMM : 0x8000 + 288] == b"".join(map(xmm, range(8)))
    assert m.ram[0x8000 + 288 : 0x8200] == UNTOUCHED * 224
    assert bytes(ffi.buffer(m.guest.fpu.ymm[7])) == xmm(7) + ymm_high(7)
    assert bytes(ffi.buffer(m.guest.fpu.ymm[8])) == xmm(8) + ymm_high(8)


@pytest.mark.spec("fpu.fxsave")
def test_fxrstor_brings_it_back(m: Machine) -> None:
    start(m, "fxsave64 [rbx]; hlt; fxrstor64 [rbx]; hlt")
    fill(m)
    before = registers(m)
    m.run(lib.EXIT_HLT)
    fpu = m.guest.fpu
    fpu.fcw, fpu.fsw, fpu.ftw, fpu.fip, fpu.mxcsr = 0x37F, 0, 0, 0, 0x1F80
    for n in range(16):
        fpu.ymm[n] = bytes(16) + ymm_high(n)
    fpu.st = [bytes(16)] * 8
    m.run(lib.EXIT_HLT)
    assert registers(m) == before  # and the upper halves stayed


@pytest.mark.spec("fpu.fxsave")
@pytest.mark.parametrize(
    ("source", "offset", "mxcsr"),
    [
        ("fxsave [rbx]", 8, 0x1F80),
        ("fxrstor [rbx]", 4, 0x1F80),
        ("fxrstor [rbx]", 0, 0x10000),
        ("xrstor [rbx]", 0, 0x10000),
    ],
)
def test_general_protection(m: Machine, source: str, offset: int, mxcsr: int) -> None:
    start(m, f"{source}; hlt")
    m.write(AREA + MXCSR, mxcsr, 4)
    fill(m)
    m.set(rbx=AREA + offset)
    before = registers(m)
    m.run(lib.EXIT_HLT)
    assert m.vector() == GP
    assert registers(m) == before


@pytest.mark.spec("fpu.fxsave", "fpu.sse")
def test_loaded_mxcsr_counts_at_once(m: Machine) -> None:
    """Unmasked by FXRSTOR, division by zero is #XM in the next instruction; masked again it is not."""
    start(m, "fxrstor [rbx]; divps xmm1, xmm2; hlt")
    m.set(cr4=m.reg("cr4") | lib.X86_CR4_OSXMMEXCPT)
    m.load(AREA, bytes(512))
    m.write(AREA + MXCSR, 0x1D80, 4)
    m.load(AREA + XMM + 16, struct.pack("<4f", 1, 1, 1, 1))
    m.run(lib.EXIT_HLT)
    assert m.vector() == 19
    assert m.guest.fpu.mxcsr == 0x1D84


# ---- may it be executed?


@pytest.mark.spec("fpu.xsave", "fpu.nm")
@pytest.mark.parametrize("source", INSTRUCTIONS)
@pytest.mark.parametrize(
    ("change", "vector"),
    [
        ("none", -1),
        ("osxsave", UD),
        ("ts", NM),
        ("em", -1),
        ("lock", UD),
        ("66", UD),
        ("align", GP),
        ("cpl3", -1),
    ],
)
def test_usable(m: Machine, source: str, change: str, vector: int) -> None:
    prefix = {"lock": ".byte 0xf0; ", "66": ".byte 0x66; "}.get(change, "")
    start(m, f"{prefix}{source} [rbx]; int 0x80", cpl=3 if change == "cpl3" else 0)
    m.set_gate(0x80, struct.pack("<HHHHII", 0x0800, 0x18, 0xEE00, 3, 0, 0))  # HANDLERS + 16 * 0x80
    if source == "xrstors":
        m.write(XCOMP_BV, COMPACTED)
    if change == "66" and source == "xsaveopt":
        vector = -1  # CLWB
    if change == "cpl3" and source in {"xsaves", "xrstors"}:
        vector = GP
    cr0 = m.reg("cr0") & ~(EM | TS) | {"ts": TS, "em": EM}.get(change, 0)
    cr4 = m.reg("cr4") & ~(lib.X86_CR4_OSXSAVE if change == "osxsave" else 0)
    m.write(AREA + MXCSR, 0x1F80, 4)
    m.set(cr0=cr0, cr4=cr4, rbx=AREA + (32 if change == "align" else 0))
    m.run(lib.EXIT_HLT)
    assert m.vector() == (0x80 if vector < 0 else vector)


@pytest.mark.spec("fpu.xsave")
@pytest.mark.parametrize(
    ("word", "bit", "source"),
    [("1_ECX", "XSAVE", "xsave"), ("1_ECX", "XSAVE", "xrstor"), ("D_1_EAX", "XSAVEOPT", "xsaveopt"),
     ("D_1_EAX", "XSAVEC", "xsavec"), ("D_1_EAX", "XSAVES", "xsaves"), ("D_1_EAX", "XSAVES", "xrstors")],
)  # fmt: skip
def test_cpuid_bits(m: Machine, word: str, bit: str, source: str) -> None:
    m.ctl.cpuid[getattr(lib, f"CPU_CPUID_{word}")] &= ~(1 << getattr(lib, f"CPUID_{word}_{bit}"))
    start(m, f"{source} [rbx]; hlt")
    m.run(lib.EXIT_HLT)
    assert m.vector() == UD


# ---- what is saved


@pytest.mark.spec("fpu.xsave")
@pytest.mark.parametrize("rfbm", [0, X87, SSE, AVX, PKRU, X87 | SSE | AVX | PKRU, 0xFFFF_FFFF_FFFF_FFFF])
@pytest.mark.parametrize("source", ["xsave64", "xsavec64", "xsaves64"])
def test_saved_components(m: Machine, source: str, rfbm: int) -> None:
    start(m, f"{source} [rbx]; hlt", rfbm)
    m.write(XSTATE_BV, 0xF000 | X87 | PKRU)
    fill(m)
    m.run(lib.EXIT_HLT)
    rfbm &= X87 | SSE | AVX | PKRU
    compacted = source != "xsave64"
    expected_bv = rfbm if compacted else 0xF000 | (X87 | PKRU) | rfbm
    assert m.read(XSTATE_BV) == expected_bv
    assert m.read(XCOMP_BV) == (COMPACTED | rfbm if compacted else 0)
    assert area(m, 528, 48) == bytes(48)
    assert (area(m, 0, 2) == b"\x7f\x02") == bool(rfbm & X87)
    assert (area(m, MXCSR, 8) == struct.pack("<II", 0x1FA0, 0xFFFF)) == bool(
        rfbm & (SSE if compacted else SSE | AVX)
    )
    assert (area(m, XMM, 256) == b"".join(map(xmm, range(16)))) == bool(rfbm & SSE)
    assert (area(m, YMM_STANDARD, 256) == b"".join(map(ymm_high, range(16)))) == bool(rfbm & AVX)
    where = PKRU_STANDARD if not compacted else 832 if rfbm & AVX else 576
    assert (area(m, where, 8) == struct.pack("<Q", 0xC0)) == bool(rfbm & PKRU)


@pytest.mark.spec("fpu.xsave")
@pytest.mark.parametrize("source", ["xsaveopt", "xsavec", "xsaves"])
def test_initial_components_are_not_written(m: Machine, source: str) -> None:
    start(m, f"{source} [rbx]; hlt", X87 | SSE | AVX | PKRU)
    m.guest.fpu.ymm[3] = bytes(16) + ymm_high(3)
    m.run(lib.EXIT_HLT)
    assert m.read(XSTATE_BV) == AVX
    assert area(m, 0, MXCSR) + area(m, 32, 480) == UNTOUCHED * 504
    assert area(m, MXCSR, 4) == (struct.pack("<I", 0x1F80) if source == "xsaveopt" else UNTOUCHED * 4)
    assert area(m, YMM_STANDARD + 48, 16) == ymm_high(3)
    assert area(m, 832, 3000) == UNTOUCHED * 3000


@pytest.mark.spec("fpu.xsave")
@pytest.mark.parametrize("source", ["xsavec", "xsaves"])
def test_mxcsr_makes_sse_not_initial(m: Machine, source: str) -> None:
    start(m, f"{source} [rbx]; hlt", X87 | SSE | AVX)
    m.guest.fpu.mxcsr = 0x1F00
    m.run(lib.EXIT_HLT)
    assert m.read(XSTATE_BV) == SSE
    assert area(m, MXCSR, 8) == struct.pack("<II", 0x1F00, 0xFFFF)


@pytest.mark.spec("fpu.xsave")
def test_supervisor_components_are_for_xsaves(m: Machine) -> None:
    """XSS widens RFBM of XSAVES only; there is no such component, so nothing but XCOMP_BV shows it."""
    start(m, "xsavec [rbx]; xsaves [rbx + 0x400]; hlt", 0xFFFF)
    m.guest.xss = 0x800
    m.run(lib.EXIT_HLT)
    assert m.read(XCOMP_BV) == COMPACTED | X87 | SSE | AVX | PKRU
    assert m.read(XCOMP_BV + 0x400) == COMPACTED | X87 | SSE | AVX | PKRU | 0x800


@pytest.mark.spec("fpu.xsave")
def test_xgetbv_1(m: Machine) -> None:
    start(m, "mov ecx, 1; xgetbv; hlt; fld1; xgetbv; hlt; movd xmm1, eax; xgetbv; hlt; fninit; xgetbv; hlt")
    m.set(xcr0=X87 | SSE | AVX)
    found = []
    for _ in range(4):
        m.run(lib.EXIT_HLT)
        found.append(m.reg("rax"))
    assert found == [0, X87, X87 | SSE, X87 | SSE]  # FNINIT leaves ST(7)
    assert m.guest.fpu.xinuse & 7 == X87 | SSE


@pytest.mark.spec("fpu.xsave")
def test_components_for_the_module(m: Machine) -> None:
    """What guest.fpu.xinuse says: MXCSR counts as SSE, and all registers whatever the mode."""
    start(m, "xgetbv; hlt")
    m.set(xcr0=X87 | SSE | AVX, rcx=1)
    m.guest.fpu.mxcsr = 0x1F00
    m.run(lib.EXIT_HLT)
    assert (m.reg("rax"), m.guest.fpu.xinuse) == (0, SSE)


@pytest.mark.spec("fpu.xsave")
@pytest.mark.parametrize("register", [7, 8])
def test_components_in_compatibility_mode(m: Machine, register: int) -> None:
    """XMM8 to XMM15 are not seen by XGETBV there, but still for the module."""
    start(m, "xgetbv; hlt")
    m.seg("cs").ar = 0xC09B
    m.set(xcr0=X87 | SSE | AVX, rcx=1)
    m.guest.fpu.ymm[register] = bytes([1]) + bytes(15) + bytes([1]) + bytes(15)
    m.run(lib.EXIT_HLT)
    assert (m.reg("rax"), m.guest.fpu.xinuse) == (0 if register == 8 else SSE | AVX, SSE | AVX)


# ---- what is loaded


@pytest.mark.spec("fpu.xsave")
@pytest.mark.parametrize(
    ("save", "restore"), [("xsave64", "xrstor64"), ("xsavec64", "xrstor64"), ("xsaves64", "xrstors64")]
)
def test_restored(m: Machine, save: str, restore: str) -> None:
    start(m, f"{save} [rbx]; hlt; {restore} [rbx]; hlt", X87 | SSE | AVX | PKRU)
    fill(m)
    before = registers(m)
    m.run(lib.EXIT_HLT)
    fpu = m.guest.fpu
    ffi.memmove(ffi.addressof(fpu), bytes(ffi.sizeof(fpu)), ffi.sizeof(fpu))
    fpu.fcw, fpu.mxcsr = 0x37F, 0x1F80
    m.set(pkru=0)
    m.run(lib.EXIT_HLT)
    assert registers(m) == before


@pytest.mark.spec("fpu.xsave")
@pytest.mark.parametrize("xcomp_bv", [0, COMPACTED | X87 | SSE | AVX | PKRU])
def test_components_not_in_the_area_are_initialised(m: Machine, xcomp_bv: int) -> None:
    start(m, "xrstor [rbx]; hlt", X87 | SSE | AVX | PKRU)
    fill(m)
    m.write(XCOMP_BV, xcomp_bv)
    m.write(AREA + MXCSR, 0x1F00, 4)
    m.run(lib.EXIT_HLT)
    mxcsr = 0x1F80 if xcomp_bv else 0x1F00
    assert registers(m) == (0x37F, 0, 0, 0, 0, 0, mxcsr, bytes(128), bytes(512), 0)


@pytest.mark.spec("fpu.xsave")
@pytest.mark.parametrize(
    ("source", "xstate_bv", "xcomp_bv", "reserved", "vector"),
    [
        ("xrstor", 0, 0, {}, -1),
        ("xrstor", 0x10, 0, {}, GP),  # not in XCR0
        ("xrstor", 1 << 63, 0, {}, GP),
        ("xrstor", 0, X87, {}, GP),  # standard format: bytes 23:8
        ("xrstor", 0, 0, {16: 1}, GP),
        ("xrstor", 0, 0, {24: 1}, -1),
        ("xrstor", X87, COMPACTED | X87, {}, -1),
        ("xrstor", X87 | SSE, COMPACTED | X87, {}, GP),
        ("xrstor", 0, COMPACTED | 0x10, {}, GP),
        ("xrstor", 1 << 63, COMPACTED, {}, GP),
        ("xrstor", 0, COMPACTED, {56: 1}, GP),
        ("xrstors", 0, 0, {}, GP),
        ("xrstors", 0, COMPACTED, {}, -1),
        ("xrstors", 0, COMPACTED | 0x10, {}, GP),
        ("xrstors", X87, COMPACTED, {}, GP),
    ],
)
def test_header(
    m: Machine, source: str, xstate_bv: int, xcomp_bv: int, reserved: dict[int, int], vector: int
) -> None:
    start(m, f"{source} [rbx]; hlt")
    fill(m)
    m.write(AREA + MXCSR, 0x1F80, 4)
    m.write(XSTATE_BV, xstate_bv)
    m.write(XCOMP_BV, xcomp_bv)
    for offset, value in reserved.items():
        m.write(XSTATE_BV + offset, value, 1)
    before = registers(m)
    m.run(lib.EXIT_HLT)
    assert m.vector() == vector
    assert (registers(m) == before) == (vector == GP)


@pytest.mark.spec("fpu.xsave")
def test_compacted_format_needs_xsavec(m: Machine) -> None:
    m.ctl.cpuid[lib.CPU_CPUID_D_1_EAX] &= ~(1 << lib.CPUID_D_1_EAX_XSAVEC)
    start(m, "xrstor [rbx]; hlt")
    m.write(XCOMP_BV, COMPACTED)
    m.run(lib.EXIT_HLT)
    assert m.vector() == GP


@pytest.mark.spec("fpu.xsave", "cpu.pku_pks")
def test_restored_pkru_counts_at_once(m: Machine) -> None:
    """Key 1 becomes inaccessible, while its translation is in the TLB."""
    start(m, "mov ecx, [rsi]; xrstor [rbx]; mov ecx, [rsi]; hlt", PKRU)
    m.write(PD + 8, 1 << 59 | 0x200000 | 0xE7)
    m.write(XSTATE_BV, PKRU)
    m.write(AREA + PKRU_STANDARD, 1 << 2)
    m.set(rsi=0x200000)
    m.run(lib.EXIT_HLT)
    assert m.vector() == PF
    assert m.guest.cr2 == 0x200000
    assert m.frame(1)[0] & 0x20  # PFERR_PK


# ---- memory that is not there


@pytest.mark.spec("fpu.xsave", "fpu.fxsave")
@pytest.mark.parametrize("source", [*INSTRUCTIONS, "fxsave", "fxrstor"])
def test_missing_page_leaves_everything(m: Machine, source: str) -> None:
    where = NEXT_PAGE - (0x100 if source[0] == "f" else 0x280)

    def run(*, missing: bool) -> tuple[object, ...]:
        start(m, f"{source} [rbx]; hlt", X87 | SSE | AVX)
        m.load(AREA, bytes(range(256)) * 32)
        m.load(where + 512, bytes(64))
        if "rs" in source:
            m.write(where + 512, X87 | SSE | AVX)
            m.write(where + 520, COMPACTED | X87 | SSE | AVX)
        m.write(where + MXCSR, 0x1FA0, 4)
        fill(m)
        m.set(rbx=where)
        if missing:
            before, ram = registers(m), m.ram[AREA : AREA + 0x1000]
            m.unmap(NEXT_PAGE)
            m.run(lib.EXIT_EPT_VIOLATION)
            assert m.exit.gpa & ~0xFFF == NEXT_PAGE
            assert registers(m) == before
            assert m.ram[AREA : AREA + 0x1000] == ram
            m.map(NEXT_PAGE)
        m.run(lib.EXIT_HLT)
        assert m.vector() == -1
        return (*registers(m), m.ram[AREA : AREA + 0x2000])

    assert run(missing=False) == run(missing=True)


@pytest.mark.spec("fpu.xsave")
@pytest.mark.parametrize("source", ["xsave", "xrstor"])
def test_mmio_is_not_emulated(m: Machine, source: str) -> None:
    """As under KVM, whose emulator does not know these: more pieces than an exit has."""
    start(m, f"{source} [rbx]; hlt")
    m.map_mmio(AREA)
    while m.run() == lib.EXIT_MMIO_READ:
        n = m.ctl.mmio_count
        m.ctl.mmio[n] = m.exit.mmio[0]
        m.ctl.mmio[n].data = bytes([7 if m.exit.gpa == XSTATE_BV else 0]) + bytes(63)
        m.ctl.mmio_count = n + 1
    assert m.exit.reason == lib.EXIT_EMULATION
