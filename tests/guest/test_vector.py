"""What vector instructions do beyond arithmetic: who may execute them, MXCSR and its exceptions,
alignment, faults in the middle, MMIO.  The arithmetic itself is compared with the host in tests/fuzz.
"""

from __future__ import annotations

import mmap
import struct

import pytest

from pykvm.abi import ffi, lib
from tests.guest.bare import CODE, PD, Machine

UD, NM, SS, GP, PF, XM = 6, 7, 12, 13, 14, 19
PLACE = 0x100000
HOLE = 0x101000  # the page behind PLACE, not present in hole()
OSXSAVE, OSFXSR, OSXMMEXCPT = lib.X86_CR4_OSXSAVE, lib.X86_CR4_OSFXSR, lib.X86_CR4_OSXMMEXCPT
HLT = lib.EXIT_HLT


def host_has(word: int, bit: int) -> bool:
    return bool(lib.cpu_host_features(word) >> bit & 1)


HAS_AVX = host_has(lib.CPU_CPUID_1_ECX, lib.CPUID_1_ECX_AVX)
HAS_AVX2 = HAS_AVX and host_has(lib.CPU_CPUID_7_EBX, lib.CPUID_7_EBX_AVX2)
avx = pytest.mark.skipif(not HAS_AVX, reason="executed by the host's own AVX")
avx2 = pytest.mark.skipif(not HAS_AVX2, reason="executed by the host's own AVX2")


@pytest.fixture
def m() -> Machine:
    return Machine()


def machine(m: Machine, source: str, *, bits: int = 64, cr4: int = OSFXSR | OSXMMEXCPT | OSXSAVE) -> Machine:
    """A program in long mode, or in 32-bit protected mode, that may use everything."""
    m.asm(f"{source}; hlt", CODE, bits)
    if bits == 64:
        m.long64(CODE)
    else:
        m.prot32(CODE)
    m.guest.xcr0 = 7
    m.guest.fpu.mxcsr = 0x1F80
    m.set(cr4=m.guest.cr4 | cr4)
    return m


def hole(m: Machine) -> None:
    """Small pages for the 2 MiB of PLACE, with a hole."""
    table = 0x7000
    for page in range(512):
        m.write(table + 8 * page, page << 12 | 0x67 if page << 12 != HOLE else 0)
    m.write(PD, table | 0x27)
    lib.cpu_flush_tlb(m.cpu)


def ymm(m: Machine, n: int) -> bytes:
    return bytes(m.guest.fpu.ymm[n])


def set_ymm(m: Machine, n: int, value: bytes) -> None:
    ffi.memmove(m.guest.fpu.ymm[n], value.ljust(32, b"\0"), 32)


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def fault(m: Machine) -> int:
    """Run to the handler of an exception; its vector, -1 when there was none."""
    m.run(HLT)
    return m.vector()


LEGACY = ("addps xmm1, xmm2", "paddd xmm1, [rbx]", "movss [rbx], xmm1", "ldmxcsr [rbx]", "pxor xmm0, xmm0")
VEX = ("vaddps xmm1, xmm2, xmm3", "vxorps ymm0, ymm0, ymm0", "vzeroupper", "vmovups [rbx], ymm1",
       "vstmxcsr [rbx]")  # fmt: skip


# ---- who may execute them -----------------------------------------------------------------------------


@pytest.mark.spec("fpu.sse", "fpu.nm")
@pytest.mark.parametrize("source", LEGACY)
@pytest.mark.parametrize(
    ("cr0", "cr4", "vector"),
    [(0, OSFXSR, -1), (0, 0, UD), (4, OSFXSR, UD), (8, OSFXSR, NM), (12, OSFXSR, UD), (8, 0, UD)],
)
def test_legacy_encoding(m: Machine, source: str, cr0: int, cr4: int, vector: int) -> None:
    """SDM vol. 3 table 2-1 (CR0.EM, CR0.TS, CR4.OSFXSR), vol. 2 2.4."""
    machine(m, source, cr4=0)
    m.write(PLACE, 0x1F80)
    m.set(cr0=m.guest.cr0 | cr0, cr4=m.guest.cr4 & ~OSFXSR | cr4, rbx=PLACE)
    assert fault(m) == vector


@avx
@pytest.mark.spec("fpu.avx", "fpu.nm")
@pytest.mark.parametrize("source", VEX)
@pytest.mark.parametrize(
    ("cr0", "cr4", "xcr0", "vector"),
    [
        (0, OSXSAVE, 7, -1),
        (0, 0, 7, UD),
        (0, OSXSAVE, 3, UD),
        (0, OSXSAVE, 1, UD),
        (8, OSXSAVE, 7, NM),
        (8, OSXSAVE, 3, UD),
        (4, OSXSAVE, 7, -1),  # CR0.EM is for the legacy encoding
    ],
)
def test_vex_encoding(m: Machine, source: str, cr0: int, cr4: int, xcr0: int, vector: int) -> None:
    """SDM vol. 2 2.6: #UD unless XCR0 has SSE and AVX and CR4.OSXSAVE is set; CR4.OSFXSR does not matter."""
    machine(m, source, cr4=0)
    m.guest.xcr0 = xcr0
    m.set(cr0=m.guest.cr0 | cr0, cr4=m.guest.cr4 & ~OSFXSR | cr4, rbx=PLACE)
    assert fault(m) == vector


@pytest.mark.spec("fpu.nm")
def test_clts_is_seen_at_once(m: Machine) -> None:
    """The same instruction, before and after."""
    machine(m, "mov ecx, 2; again: clts; paddd xmm1, xmm2; mov rax, cr0; or eax, 8; dec ecx; jz out;"
               "jmp again; out: mov cr0, rax; paddd xmm1, xmm2")  # fmt: skip
    set_ymm(m, 2, struct.pack("<4I", 1, 2, 3, 4))
    assert fault(m) == NM
    assert ymm(m, 1)[:16] == struct.pack("<4I", 2, 4, 6, 8)


@avx
@pytest.mark.spec("cpu.ud_space", "fpu.avx")
@pytest.mark.parametrize("mode", ["real", "vm86"])
def test_vex_outside_protected_mode(m: Machine, mode: str) -> None:
    """There C5 is LDS, and undefined with a register operand."""
    m.load(CODE, bytes.fromhex("c5f058d3f4"))  # vaddps xmm2, xmm1, xmm3
    m.ctl.exception_bitmap = 1 << UD
    if mode == "real":
        m.real(CODE)
    else:
        m.vm86(CODE >> 4, 0)
    m.guest.xcr0 = 7
    m.set(cr4=m.guest.cr4 | OSXSAVE | OSFXSR)
    assert m.run() == lib.EXIT_EXCEPTION


@pytest.mark.parametrize(
    ("source", "word", "bit"),
    [
        ("addps xmm1, xmm2", lib.CPU_CPUID_1_EDX, lib.CPUID_1_EDX_SSE),
        ("paddd xmm1, xmm2", lib.CPU_CPUID_1_EDX, lib.CPUID_1_EDX_SSE2),
        ("pshufb xmm1, xmm2", lib.CPU_CPUID_1_ECX, lib.CPUID_1_ECX_SSSE3),
        ("ptest xmm1, xmm2", lib.CPU_CPUID_1_ECX, lib.CPUID_1_ECX_SSE4_1),
        ("pcmpgtq xmm1, xmm2", lib.CPU_CPUID_1_ECX, lib.CPUID_1_ECX_SSE4_2),
        ("aesenc xmm1, xmm2", lib.CPU_CPUID_1_ECX, lib.CPUID_1_ECX_AES),
        ("vaddps xmm1, xmm2, xmm3", lib.CPU_CPUID_1_ECX, lib.CPUID_1_ECX_AVX),
        ("vpaddd ymm1, ymm2, ymm3", lib.CPU_CPUID_7_EBX, lib.CPUID_7_EBX_AVX2),
        ("vaesenc ymm1, ymm2, ymm3", lib.CPU_CPUID_7_ECX, lib.CPUID_7_ECX_VAES),
        ("vfmadd132ps ymm1, ymm2, ymm3", lib.CPU_CPUID_1_ECX, lib.CPUID_1_ECX_FMA),
        ("vcvtph2ps xmm1, xmm2", lib.CPU_CPUID_1_ECX, lib.CPUID_1_ECX_F16C),
        ("sha1msg1 xmm1, xmm2", lib.CPU_CPUID_7_EBX, lib.CPUID_7_EBX_SHA_NI),
    ],
)
def test_feature_gates(m: Machine, source: str, word: int, bit: int) -> None:
    """Undefined without its CPUID bit, and where the host cannot execute it."""
    machine(m, source)
    assert fault(m) == (-1 if host_has(word, bit) else UD)
    m.ctl.cpuid[word] &= ~(1 << bit)
    machine(m, source)
    assert fault(m) == UD


# ---- operands ------------------------------------------------------------------------------------------

ALIGNED = ("movaps xmm0, [rbx]", "movdqa [rbx], xmm0", "paddd xmm0, [rbx]", "addps xmm0, [rbx]",
           "movntdq [rbx], xmm0", "pshufd xmm0, [rbx], 1", "pblendvb xmm1, [rbx], xmm0")  # fmt: skip
UNALIGNED = ("movups xmm0, [rbx]", "movdqu [rbx], xmm0", "lddqu xmm0, [rbx]", "addsd xmm0, [rbx]",
             "cvtdq2pd xmm0, [rbx]", "pcmpistri xmm0, [rbx], 0")  # fmt: skip
VEX_UNALIGNED = ("vpaddd xmm0, xmm1, [rbx]", "vaddps ymm0, ymm1, [rbx]", "vmovdqu [rbx], ymm0")
VEX_ALIGNED = ("vmovaps xmm0, [rbx]", "vmovdqa [rbx], xmm0", "vmovntps [rbx], xmm0")


@pytest.mark.spec("fpu.sse")
def test_alignment(m: Machine) -> None:
    """SDM vol. 2 2.4: 16 bytes of the legacy encoding must be aligned, with the exceptions here."""
    for source in (*ALIGNED, *UNALIGNED):
        machine(m, source)
        m.set(rbx=PLACE + 16)
        assert fault(m) == -1, source
        machine(m, source)
        m.set(rbx=PLACE + 8)
        assert fault(m) == (GP if source in ALIGNED else -1), source


@avx
@pytest.mark.spec("fpu.avx")
def test_alignment_of_vex(m: Machine) -> None:
    for source, place, vector in [
        *((s, PLACE + 1, -1) for s in VEX_UNALIGNED),
        *((s, PLACE + 8, GP) for s in VEX_ALIGNED),
        *((s, PLACE + 16, -1) for s in VEX_ALIGNED),
        *((s.replace("xmm", "ymm"), PLACE + 16, GP) for s in VEX_ALIGNED),
        *((s.replace("xmm", "ymm"), PLACE + 32, -1) for s in VEX_ALIGNED),
    ]:
        machine(m, source)
        m.set(rbx=place)
        assert fault(m) == vector, source


@avx
@pytest.mark.spec("fpu.avx")
def test_upper_half(m: Machine) -> None:
    """Legacy encodings keep it, VEX.128 clears it."""
    machine(m, "movaps xmm1, xmm0; vmovaps xmm2, xmm0; addps xmm3, xmm0; vaddps xmm4, xmm4, xmm0;"
               "movd xmm5, eax; vmovd xmm6, eax; movlhps xmm7, xmm0; vmovlhps xmm8, xmm8, xmm0")  # fmt: skip
    for n in range(9):
        set_ymm(m, n, bytes([n + 1]) * 32)
    m.run(HLT)
    for n in range(1, 9):
        assert ymm(m, n)[16:] == bytes([n + 1 if n % 2 else 0]) * 16, n


@avx
@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("source", ["vzeroupper", "vzeroall"])
def test_vzero(m: Machine, bits: int, source: str) -> None:
    """Outside 64-bit mode the upper eight registers keep what they have."""
    machine(m, source, bits=bits)
    for n in range(16):
        set_ymm(m, n, b"\x55" * 32)
    m.run(HLT)
    cleared = (b"\0" * 16 if source == "vzeroall" else b"\x55" * 16) + b"\0" * 16
    for n in range(16):
        assert ymm(m, n) == (cleared if n < 8 or bits == 64 else b"\x55" * 32), n


# ---- MXCSR ---------------------------------------------------------------------------------------------


@pytest.mark.spec("fpu.sse")
def test_mxcsr_register(m: Machine) -> None:
    machine(m, "ldmxcsr [rbx]; stmxcsr [rbx + 4]; ldmxcsr [rbx + 8]")
    m.write(PLACE, 0xFFBF, 4)
    m.write(PLACE + 8, 0x10000, 4)
    m.set(rbx=PLACE)
    assert fault(m) == GP
    assert m.read(PLACE + 4, 4) == 0xFFBF
    assert m.guest.fpu.mxcsr == 0xFFBF


@pytest.mark.spec("fpu.sse")
def test_flags_accumulate(m: Machine) -> None:
    """They are there at every exit, at STMXCSR, and stay until LDMXCSR clears them."""
    machine(m, "divss xmm0, xmm1; hlt; mulss xmm2, xmm2; stmxcsr [rbx]; ldmxcsr [rbx + 4]; addss xmm3, xmm4")
    set_ymm(m, 0, floats(1.0))
    set_ymm(m, 2, floats(1e-30))
    set_ymm(m, 3, floats(1.0))
    set_ymm(m, 4, floats(1e-30))
    m.write(PLACE + 4, 0x1F80, 4)
    m.set(rbx=PLACE)
    m.run(HLT)
    assert m.guest.fpu.mxcsr == 0x1F84  # ZE
    m.run(HLT)
    assert m.read(PLACE, 4) == 0x1FB4  # and UE, PE
    assert m.guest.fpu.mxcsr == 0x1FA0  # PE of the addition


@pytest.mark.spec("fpu.sse")
@pytest.mark.parametrize(
    ("mxcsr", "result"),
    [(0x1F80, 0x3F800000), (0x3F80, 0x3F800000), (0x5F80, 0x3F800001), (0x7F80, 0x3F800000)],
)
def test_rounding(m: Machine, mxcsr: int, result: int) -> None:
    """Nearest, down, up, towards zero; and the host's own rounding is what it was."""
    machine(m, "addss xmm0, xmm1")
    set_ymm(m, 0, floats(1.0))
    set_ymm(m, 1, floats(1e-9))
    m.guest.fpu.mxcsr = mxcsr
    m.run(HLT)
    assert int.from_bytes(ymm(m, 0)[:4], "little") == result
    assert 1.0 + 1e-17 == 1.0
    assert -1.0 - 1e-17 == -1.0


def test_denormals(m: Machine) -> None:
    """FTZ flushes results, DAZ operands; FTZ does nothing while underflow is unmasked."""
    cases = [(0x1F80, 0x00400000, 0), (0x9F80, 0, 0x30), (0x1FC0, 0, 0), (0x9780, 0x400000, 0x10)]
    for mxcsr, result, flags in cases:
        machine(m, "mulss xmm0, xmm1" if mxcsr != 0x1FC0 else "addss xmm0, xmm2")
        set_ymm(m, 0, struct.pack("<I", 0x00800000 if mxcsr != 0x1FC0 else 0x00400000))
        set_ymm(m, 1, floats(0.5))
        set_ymm(m, 2, floats(0.0))
        m.guest.fpu.mxcsr = mxcsr
        lib.cpu_state_changed(m.cpu)
        vector = fault(m)
        if mxcsr == 0x9780:
            assert vector == XM
            assert ymm(m, 0)[:4] == struct.pack("<I", 0x00800000)
        else:
            assert int.from_bytes(ymm(m, 0)[:4], "little") == result
        assert m.guest.fpu.mxcsr & 0x3F == flags, hex(mxcsr)


@pytest.mark.spec("fpu.sse")
@pytest.mark.parametrize(
    ("source", "mxcsr", "flags"),
    [
        ("divps xmm0, xmm1", 0x1F80 & ~0x200, 0x04),
        ("sqrtss xmm0, xmm2", 0x1F80 & ~0x80, 0x01),
        ("addps xmm0, xmm3", 0x1F80 & ~0x1000, 0x20),
        ("mulss xmm0, xmm4", 0x1F80 & ~0x400, None),
        ("ucomiss xmm0, xmm5", 0x1F80 & ~0x80, 0x01),
        ("cvttss2si rax, xmm4", 0x1F80 & ~0x80, 0x01),
        ("addps xmm0, [rbx]", 0x1F80 & ~0x1000, 0x20),
        ("cmpltps xmm0, xmm2", 0x1F80 & ~0x80, None),
    ],
)
def test_unmasked_exceptions(m: Machine, source: str, mxcsr: int, flags: int | None) -> None:
    """SDM vol. 1 11.5.2: the flag is set, nothing else has changed, and #XM is raised at the
    instruction; without CR4.OSXMMEXCPT it is #UD."""
    values = [floats(1.0, 2.0, 3.0, 1e38), bytes(16), floats(-4.0, -1, -1, -1), floats(1e-20, 1, 1, 1),
              floats(1e38, 1, 1, 1), struct.pack("<4I", 0x7F812345, 0, 0, 0)]  # fmt: skip
    for cr4, vector in [(OSFXSR | OSXMMEXCPT, XM), (OSFXSR, UD)]:
        machine(m, f"nop; here: {source}", cr4=cr4)
        m.load(PLACE, floats(1e-20, 1, 1, 1))
        for n, value in enumerate(values):
            set_ymm(m, n, value)
        m.guest.fpu.mxcsr = mxcsr
        m.set(rax=0x1234, rbx=PLACE, rflags=0xAD7)
        if source.startswith("mulss"):
            set_ymm(m, 0, floats(1e38))
        before = ymm(m, 0)
        if source.startswith("cmplt"):
            assert fault(m) == -1  # ordered comparison of numbers: nothing is invalid
            continue
        assert fault(m) == vector
        rip, _, rflags = m.frame()
        assert rip == m.symbols["here"]
        assert rflags & 0x8D5 == 0x8D5 & 0xAD7
        assert ymm(m, 0) == before
        assert m.reg("rax") == 0x1234
        if flags is not None:
            assert m.guest.fpu.mxcsr == mxcsr | flags


@pytest.mark.spec("fpu.sse")
def test_unmasking_by_ldmxcsr(m: Machine) -> None:
    """What was decoded while all were masked is checked from then on, and no more when they are again."""
    machine(m, "mov ecx, 2; loop: divss xmm0, xmm1; ldmxcsr [rbx]; dec ecx; jnz loop")
    set_ymm(m, 0, floats(1.0))
    m.write(PLACE, 0x1D80, 4)
    m.set(rbx=PLACE)
    assert fault(m) == -1  # infinity by zero the second time: no exception
    assert m.guest.fpu.mxcsr == 0x1D80
    machine(m, "ldmxcsr [rbx]; ldmxcsr [rbx + 4]; divss xmm0, xmm1")
    set_ymm(m, 0, floats(1.0))
    m.write(PLACE + 4, 0x1F80, 4)
    m.set(rbx=PLACE)
    assert fault(m) == -1
    machine(m, "ldmxcsr [rbx]; divss xmm0, xmm1")
    set_ymm(m, 0, floats(1.0))
    m.set(rbx=PLACE)
    assert fault(m) == XM


def test_store_faults_before_arithmetic(m: Machine) -> None:
    """VCVTPS2PH to a page that is not there: #PF, and no flag; then #XM and nothing is written."""
    if not host_has(lib.CPU_CPUID_1_ECX, lib.CPUID_1_ECX_F16C):
        pytest.skip("executed by the host's own F16C")
    for mxcsr in (0x1F80, 0x0F80):
        machine(m, "vcvtps2ph [rbx], xmm0, 4")
        hole(m)
        set_ymm(m, 0, floats(1.00001, 1, 1, 1))
        m.guest.fpu.mxcsr = mxcsr
        m.set(rbx=HOLE - 4)
        assert fault(m) == PF
        assert m.guest.cr2 == HOLE
        assert m.guest.fpu.mxcsr == mxcsr
        m.load(PLACE, b"\xee" * 8)
        machine(m, "vcvtps2ph [rbx], xmm0, 4")
        m.guest.fpu.mxcsr = mxcsr
        m.set(rbx=PLACE)
        assert fault(m) == (-1 if mxcsr & 0x1000 else XM)
        assert (m.read(PLACE, 4) == 0x3C003C00) == bool(mxcsr & 0x1000)


@pytest.mark.spec("cpu.page_crossing")
@pytest.mark.parametrize("source", ["movups [rbx], xmm0", "movq [rbx], xmm0", "vmovups [rbx], ymm0"])
def test_store_across_pages(m: Machine, source: str) -> None:
    """Nothing is written when the second page is not there; CR2 is its first byte."""
    if source[0] == "v" and not HAS_AVX:
        pytest.skip("executed by the host's own AVX")
    machine(m, source)
    hole(m)
    m.load(PLACE + 0xFE0, b"\xee" * 32)
    m.set(rbx=HOLE - 4)
    assert fault(m) == PF
    assert m.guest.cr2 == HOLE
    assert m.ram[PLACE + 0xFE0 : PLACE + 0x1000] == b"\xee" * 32


def test_own_code(m: Machine) -> None:
    """A vector store into the block that is being executed."""
    machine(m, "movups [rip + patch], xmm0; patch: mov eax, 1; mov ebx, 1; nop; nop; nop; nop; nop; nop")
    set_ymm(m, 0, bytes.fromhex("b802000000bb0200000090909090f490"))
    m.run(HLT)
    assert (m.reg("rax"), m.reg("rbx")) == (2, 2)


# ---- masked moves, gathers -----------------------------------------------------------------------------

ON, OFF = 0x80000000, 0


@avx
def test_masked_load(m: Machine) -> None:
    """An element that is masked off does not fault and reads as zero."""
    machine(m, "vmaskmovps ymm0, ymm1, [rbx]; mov eax, 1; vmaskmovps ymm2, ymm3, [rbx]")
    hole(m)
    m.load(HOLE - 16, struct.pack("<4I", 1, 2, 3, 4))
    set_ymm(m, 0, b"\xff" * 32)
    set_ymm(m, 1, struct.pack("<8I", ON, OFF, OFF, ON, OFF, OFF, OFF, OFF))
    set_ymm(m, 2, b"\xff" * 32)
    set_ymm(m, 3, struct.pack("<8I", ON, OFF, OFF, ON, OFF, ON, OFF, OFF))
    m.set(rbx=HOLE - 16)
    assert fault(m) == PF
    assert m.guest.cr2 == HOLE + 4
    assert m.reg("rax") == 1
    assert ymm(m, 0) == struct.pack("<8I", 1, 0, 0, 4, 0, 0, 0, 0)
    assert ymm(m, 2) == b"\xff" * 32


@avx
def test_masked_store(m: Machine) -> None:
    """All or nothing, of what is not masked off."""
    machine(m, "vmaskmovps [rbx], ymm1, ymm0; mov eax, 1; vmaskmovps [rbx], ymm3, ymm0")
    hole(m)
    m.load(HOLE - 16, b"\xee" * 16)
    set_ymm(m, 0, struct.pack("<8I", *range(1, 9)))
    set_ymm(m, 1, struct.pack("<8I", OFF, ON, OFF, ON, OFF, OFF, OFF, OFF))
    set_ymm(m, 3, struct.pack("<8I", ON, OFF, ON, OFF, OFF, OFF, OFF, ON))
    m.set(rbx=HOLE - 16)
    assert fault(m) == PF
    assert m.guest.cr2 == HOLE + 12
    assert m.reg("rax") == 1
    assert m.ram[HOLE - 16 : HOLE] == struct.pack("<4I", 0xEEEEEEEE, 2, 0xEEEEEEEE, 4)


@avx2
@pytest.mark.parametrize("name", ["vpgatherdd", "vgatherdps"])
def test_gather_goes_on_after_a_fault(m: Machine, name: str) -> None:
    """Elements before the one that faults are done and their mask is clear (SDM vol. 2, VGATHERDPS)."""
    machine(m, f"nop; here: {name} ymm0, [rbx + ymm2 * 4], ymm1")
    hole(m)
    indexes = [0, 3, 1, 0x400, 2, 0x401, 5, 4]
    m.load(PLACE, struct.pack("<8I", *range(100, 108)))
    set_ymm(m, 0, struct.pack("<8I", *[0x99] * 8))
    set_ymm(m, 1, struct.pack("<8I", ON, ON, OFF, ON, ON, ON, ON, ON))
    set_ymm(m, 2, struct.pack("<8I", *indexes))
    m.set(rbx=PLACE)
    assert fault(m) == PF
    assert m.guest.cr2 == HOLE
    assert m.frame()[1] == m.symbols["here"]
    assert struct.unpack("<8I", ymm(m, 0)) == (100, 103, 0x99, *[0x99] * 5)
    assert struct.unpack("<8I", ymm(m, 1)) == (0, 0, 0, ON, ON, ON, ON, ON)
    m.write(0x7000 + 8 * (HOLE >> 12), HOLE | 0x67)
    lib.cpu_flush_tlb(m.cpu)
    m.load(HOLE, struct.pack("<2I", 77, 78))
    m.set(rip=m.symbols["here"])
    assert m.run(HLT)
    assert m.vector() == -1
    assert struct.unpack("<8I", ymm(m, 0)) == (100, 103, 0x99, 77, 102, 78, 105, 104)
    assert ymm(m, 1) == bytes(32)


@avx2
@pytest.mark.parametrize("code", ["c4e275900c93", "c4e26d900413", "c4e275901493"])
def test_gather_wants_three_registers(m: Machine, code: str) -> None:
    """Destination, mask and index must differ: here two of them are the same."""
    machine(m, "nop")
    m.load(CODE, bytes.fromhex(code + "f4"))
    assert fault(m) == UD


# ---- MMIO ----------------------------------------------------------------------------------------------


def serve(m: Machine, data: bytearray) -> list[tuple[int, int, bool]]:
    """Run to the HLT with MMIO at HOLE; the accesses: offset, length, is a write."""
    log = []
    while (reason := m.run()) != HLT:
        if reason == lib.EXIT_MMIO_READ:
            at, n = m.exit.mmio[0].gpa - HOLE, m.exit.mmio[0].len
            answer = m.ctl.mmio[m.ctl.mmio_count]
            answer.gpa, answer.len = m.exit.mmio[0].gpa, n
            ffi.memmove(answer.data, bytes(data[at : at + n]), n)
            m.ctl.mmio_count += 1
            log.append((at, n, False))
            continue
        assert reason == lib.EXIT_MMIO_WRITE
        for k in range(m.exit.mmio_count):
            at, n = m.exit.mmio[k].gpa - HOLE, m.exit.mmio[k].len
            data[at : at + n] = ffi.buffer(m.exit.mmio[k].data)[:n]
            log.append((at, n, True))
    return log


R, W = False, True
MMIO = [
    ("movups xmm0, [rbx]", 16, [(16, 16, R)], 16),
    ("movups [rbx], xmm1", 16, [(16, 16, W)], 0),
    ("paddd xmm0, [rbx]", 16, [(16, 16, R)], 16),
    ("movsd xmm0, [rbx]", 4, [(4, 8, R)], 16),
    ("pextrw [rbx], xmm1, 3", 5, [(5, 2, W)], 0),
    ("cvtsi2sd xmm0, dword ptr [rbx]", 8, [(8, 4, R)], 16),
    ("vmovups ymm0, [rbx]", 3, [(3, 32, R)], 32),
    ("vmovups [rbx], ymm1", 3, [(3, 32, W)], 0),
    ("vmovups ymm0, [rbx]", -8, [(0, 24, R)], 32),
    ("vmovups [rbx], ymm1", -8, [(0, 24, W)], 0),
    ("vmaskmovps ymm0, ymm3, [rbx]", 0, [(0, 4, R), (8, 4, R), (28, 4, R)], 32),
    ("vmaskmovps [rbx], ymm3, ymm1", 0, [(0, 4, W), (8, 4, W), (28, 4, W)], 0),
    ("vmaskmovps [rbx], ymm3, ymm1", -8, [(0, 4, W), (20, 4, W)], 0),
    ("lea rdi, [rbx]; maskmovdqu xmm1, xmm3", 0, [(3, 1, W), (11, 1, W)], 0),
    ("vpgatherdd ymm0, [rbx + ymm2 * 4], ymm3", -4, [(0, 4, R), (4, 4, R)], 32),
]


@pytest.mark.parametrize(
    ("source", "offset", "accesses", "changed"), MMIO, ids=[f"{case[0]} {case[1]}" for case in MMIO]
)
def test_mmio(
    m: Machine, source: str, offset: int, accesses: list[tuple[int, int, bool]], changed: int
) -> None:
    """The result is that of RAM, and each access reaches the device once."""
    if "ymm" in source and not HAS_AVX2:
        pytest.skip("executed by the host's own AVX")
    data = bytearray(range(1, 65))
    results = []
    for device in (False, True):
        m.load(PLACE, bytes(0x1000))
        m.load(HOLE - 32, bytes(range(200, 232)))
        m.load(HOLE, bytes(data) if not device else bytes(64))
        machine(m, source)
        set_ymm(m, 0, b"\x10" * 32)
        set_ymm(m, 1, bytes(range(100, 132)))
        set_ymm(m, 2, struct.pack("<8I", 1, 0, 2, 0, 0, 0, 0, 0))
        last = OFF if "gather" in source else ON
        set_ymm(m, 3, struct.pack("<8I", ON, OFF, ON, OFF, OFF, OFF, OFF, last))
        m.set(rbx=HOLE + offset, rax=0)
        memory = bytearray(data)
        if device:
            m.map_mmio(HOLE)
            log = serve(m, memory)
            assert log == accesses
        else:
            m.run(HLT)
            memory[:] = m.ram[HOLE : HOLE + 64]
        results.append((memory, m.ram[PLACE:HOLE], [ymm(m, n) for n in range(16)], m.reg("rip")))
    assert results[0] == results[1]
    assert (ymm(m, 0)[:changed] != b"\x10" * changed) == bool(changed)


# ---- the host ------------------------------------------------------------------------------------------


def test_flags_survive_the_loss_of_memory(m: Machine) -> None:
    """An instruction whose memory is gone exits, and what MXCSR had gathered before is kept."""
    gone = mmap.mmap(-1, 8192)
    hva = int(ffi.cast("uintptr_t", ffi.from_buffer(gone)))
    machine(m, "movups xmm5, [rbx]; divss xmm0, xmm1; addps xmm2, [rbx]")
    set_ymm(m, 0, floats(1.0))
    lib.spte_xchg(m._slot(HOLE), (hva + 4095) & ~0xFFF | 7)
    m.set(rbx=HOLE)
    m.asm("movups xmm5, [rbx]; divss xmm0, xmm1; hlt", CODE)
    m.run(HLT)
    assert m.guest.fpu.mxcsr == 0x1F84
    m.guest.fpu.mxcsr = 0x5F80
    m.asm("divss xmm0, xmm1; movups xmm5, [rbx]; hlt", CODE)
    set_ymm(m, 0, floats(1.0))
    m.set(rip=CODE)
    gone.close()
    assert m.run() == lib.EXIT_HOST_FAULT
    assert m.guest.fpu.mxcsr == 0x5F84
    assert m.guest.rip == CODE + 4
    assert 1.0 + 1e-17 == 1.0
