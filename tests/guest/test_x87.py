"""x87 and MMX on the bare processor: usability, #MF, images of the environment, exits in between.

Results are compared with the host in tests/fuzz.
Source: SDM vol. 1 chapter 8, vol. 3 chapter 12 and table 9-3 (CR0.EM, MP, TS).
"""

from __future__ import annotations

import ctypes
import random
import struct
from collections.abc import Callable

import pytest

from pykvm.abi import ffi, lib
from tests.guest.bare import CODE, Machine

UD, NM, PF, MF, XM = 6, 7, 14, 16, 19
MP, EM, TS, NE = 2, 4, 8, 0x20
DATA, NEXT_PAGE = 0x20000, 0x21000
FCW_ALL, FCW_UNMASKED = 0x37F, 0x340
ZE, ES_B = 0x04, 0x8080
SF, IE, C1 = 0x40, 0x01, 0x200
ONE = bytes.fromhex("0000000000000080ff3f")
PI = bytes.fromhex("35c26821a2da0fc90040")
INDEFINITE = bytes.fromhex("00000000000000c0ffff")
# 0 / 0 would be invalid; 1 / 0 with ZE unmasked leaves an exception pending
DIVIDE_BY_ZERO = "fldcw [0x20800]; fld1; fldz; fdivp; "


@pytest.fixture
def m() -> Machine:
    machine = Machine()
    machine.write(DATA + 0x800, FCW_UNMASKED, 2)
    return machine


def start(m: Machine, source: str, mode: str = "long64", cr0: int = 0, **registers: int) -> None:
    m.asm(source, CODE, bits={"long64": 64, "prot32": 32, "real": 16}[mode])
    if mode == "real":
        m.real(CODE)
    else:
        getattr(m, mode)(CODE)
    fresh_fpu(m)
    m.set(cr0=m.reg("cr0") & ~(MP | EM | TS) | cr0, **registers)


def fresh_fpu(m: Machine) -> None:
    fpu = m.guest.fpu
    ffi.memmove(ffi.addressof(fpu), bytes(ffi.sizeof(fpu)), ffi.sizeof(fpu))
    fpu.fcw, fpu.mxcsr = FCW_ALL, 0x1F80


def st(m: Machine, n: int) -> bytes:
    return bytes(ffi.buffer(m.guest.fpu.st[n]))[:10]


def mm(m: Machine, n: int) -> int:
    return int.from_bytes(st(m, n)[:8], "little")


# ---- may it be executed?


@pytest.mark.spec("fpu.nm")
@pytest.mark.parametrize("mode", ["real", "prot32", "long64"])
@pytest.mark.parametrize(
    ("source", "cr0", "vector"),
    [
        ("fld1", EM, NM),
        ("fld1", TS, NM),
        ("fld1", MP, -1),
        ("fnstcw [bx]", TS, NM),
        ("fninit", EM, NM),
        ("fwait", TS | MP, NM),
        ("fwait", TS, -1),
        ("fwait", EM | MP, -1),
        ("paddb mm0, mm1", EM, UD),
        ("paddb mm0, mm1", EM | TS, UD),
        ("paddb mm0, mm1", TS, NM),
        ("emms", EM, UD),
        ("emms", TS, NM),
        ("fxsave [bx]", EM, NM),
        ("fxrstor [bx]", TS, NM),
    ],
)
def test_cr0_decides(m: Machine, mode: str, source: str, cr0: int, vector: int) -> None:
    source = source.replace("[bx]", {"long64": "[rbx]", "prot32": "[ebx]", "real": "[bx]"}[mode])
    start(m, f"{source}; hlt", mode, cr0=cr0, rbx=0x8000)
    m.run(lib.EXIT_HLT)
    assert m.vector() == vector
    if vector >= 0:
        assert m.frame(1) == [CODE & 0xFFFF if mode == "real" else CODE]


@pytest.mark.spec("fpu.nm")
def test_lazy_switching(m: Machine) -> None:
    """#NM, CLTS in its handler, and the same block of code goes on."""
    m.asm("clts; inc ebx; iretq", 0x18000)
    start(m, "mov ecx, 3; again: fld1; mov rax, cr0; or al, 8; mov cr0, rax; loop again; hlt")
    m.set_gate(NM, struct.pack("<HHHHII", 0x8000, 0x18, 0x8E00, 1, 0, 0))
    m.run(lib.EXIT_HLT)
    assert m.reg("rbx") == 2
    assert m.guest.fpu.ftw == 0xE0


# ---- the state at exits


@pytest.mark.spec("fpu.x87")
def test_registers_are_in_stack_order_at_an_exit(m: Machine) -> None:
    start(m, "fld1; fldpi; hlt; fxch; fstp tbyte ptr [0x20000]; hlt")
    m.run(lib.EXIT_HLT)
    fpu = m.guest.fpu
    assert (fpu.fsw, fpu.ftw, fpu.fcw) == (6 << 11, 0xC0, FCW_ALL)
    assert (st(m, 0), st(m, 1)) == (PI, ONE)
    assert (fpu.fop, fpu.fip) == (0x1EB, CODE + 2)
    fpu.st[1] = bytes(7) + b"\xc0\0\x40" + bytes(6)  # the client writes 3.0
    m.run(lib.EXIT_HLT)
    assert struct.unpack("<Q", m.ram[DATA : DATA + 8])[0] == 0xC0 << 56
    assert (fpu.fsw, fpu.ftw, fpu.fdp) == (7 << 11, 0x80, DATA)
    assert st(m, 0) == PI


@pytest.mark.spec("fpu.x87")
def test_stack_faults(m: Machine) -> None:
    start(
        m,
        "fstp tbyte ptr [0x20000]; fnstsw ax; mov edx, eax; fnclex; mov ecx, 9; more: fld1; loop more;"
        "fnstsw ax; hlt",
    )
    m.run(lib.EXIT_HLT)
    assert m.reg("rdx") & 0xFFFF == 1 << 11 | SF | IE
    assert m.ram[DATA : DATA + 10] == INDEFINITE
    assert m.reg("rax") & 0x7FF == C1 | SF | IE
    assert st(m, 0) == INDEFINITE


@pytest.mark.spec("fpu.x87")
@pytest.mark.parametrize(
    ("control", "low"), [(0x37F, 0), (0x77F, 0), (0xF7F, 0), (0xB7F, 1), (0xA7F, 1 << 11), (0x87F, 1 << 40)]
)
def test_rounding_and_precision(m: Machine, control: int, low: int) -> None:
    """1 + 2^-64: one more in the last place that the precision has, when rounding is up."""
    m.write(DATA + 0x10, control, 2)
    m.write(DATA + 0x20, -64, 2)
    start(m, "fldcw [0x20010]; fld1; fild word ptr [0x20020]; fld1; fscale; fstp st(1); faddp; hlt")
    m.run(lib.EXIT_HLT)
    assert int.from_bytes(st(m, 0)[:8], "little") == 1 << 63 | low
    assert m.guest.fpu.fsw & (C1 | 0x20) == (C1 if low else 0) | 0x20


# ---- exceptions


@pytest.mark.spec("fpu.x87")
@pytest.mark.parametrize("ne", [NE, 0])
@pytest.mark.parametrize(
    "waiting",
    [
        "fwait",
        "fld1",
        "fadd dword ptr [rbx]",
        "fstp qword ptr [rbx]",
        "fldcw [rbx]",
        "frstor [rbx]",
        "emms",
        "paddb mm0, mm1",
        "movq [rbx], mm0",
        "fincstp",
        "movq2dq xmm0, mm0",
    ],
)
def test_mf_comes_at_the_next_waiting_instruction(m: Machine, waiting: str, ne: int) -> None:
    """Before its memory operand is looked at, which would be #PF.

    Without CR0.NE a PC would raise IRQ 13; we do as KVM on VT-x does, where NE is always set.
    """
    start(m, f"{DIVIDE_BY_ZERO} fnstsw ax; nop; here: {waiting}; hlt", cr0=MP, rbx=1 << 40)
    m.set(cr0=m.reg("cr0") & ~NE | ne)
    m.run(lib.EXIT_HLT)
    assert m.vector() == MF
    assert m.frame(1) == [m.symbols["here"]]
    assert m.reg("rax") & 0xFFFF == 6 << 11 | ZE | ES_B
    fpu = m.guest.fpu
    assert (fpu.fsw, fpu.fop) == (6 << 11 | ZE | ES_B, 0x6F9)
    assert (st(m, 0)[8:], st(m, 1)) == (b"\0\0", ONE)  # neither written nor popped


@pytest.mark.spec("fpu.x87")
@pytest.mark.parametrize(
    "silent",
    [
        "fnclex",
        "fninit",
        "fnsave [0x20100]",
        "fnstenv [0x20100]; fwait",
        "fnstcw [0x20100]; fnclex",
        "fneni; fndisi; fnsetpm; fnclex",
        "fxsave [0x20100]; fnclex",
    ],
)
def test_instructions_that_do_not_wait(m: Machine, silent: str) -> None:
    start(m, f"{DIVIDE_BY_ZERO} {silent}; fld1; hlt")
    m.run(lib.EXIT_HLT)
    assert m.vector() == -1
    assert st(m, 0) == ONE


@pytest.mark.spec("fpu.x87")
def test_unmasking_makes_a_flag_pending(m: Machine) -> None:
    start(m, "fld1; fldz; fdivp; fldcw [0x20800]; fnstsw ax; mov ebx, eax; fldcw [0x20800]; hlt")
    m.run(lib.EXIT_HLT)
    assert m.vector() == MF
    assert m.reg("rbx") & 0xFFFF == 7 << 11 | ZE | ES_B


@pytest.mark.spec("fpu.x87")
def test_pending_exception_comes_in_from_outside(m: Machine) -> None:
    start(m, "nop; fwait; hlt")
    m.guest.fpu.fcw, m.guest.fpu.fsw = FCW_UNMASKED, ZE
    m.run(lib.EXIT_HLT)
    assert m.vector() == MF


# ---- images

Pointers = Callable[[int, int, int], tuple[int, ...]]  # of FIP, FOP, FDP: the last four fields

IMAGES: dict[tuple[str, int], tuple[str, Pointers]] = {
    # real mode: pointers are linear, FCS and FDS count as zero
    ("real", 2): ("<7H", lambda fip, fop, fdp: (fip, fop, fdp, 0)),
    ("real", 4): ("<7I", lambda fip, fop, fdp: (0xFFFF0000 | fip, fop, 0xFFFF0000 | fdp, 0)),
    ("prot32", 2): ("<7H", lambda fip, _, fdp: (fip & 0xFFFF, 0, fdp & 0xFFFF, 0)),
    ("prot32", 4): ("<7I", lambda fip, fop, fdp: (fip, fop << 16, fdp, 0xFFFF0000)),
    ("long64", 4): ("<7I", lambda fip, fop, fdp: (fip, fop << 16, fdp, 0xFFFF0000)),
}


@pytest.mark.spec("fpu.x87")
@pytest.mark.parametrize(("mode", "size"), list(IMAGES))
def test_formats_of_the_environment(m: Machine, mode: str, size: int) -> None:
    form, pointers = IMAGES[mode, size]
    native = 2 if mode == "real" else 4
    prefix = "" if size == native else ".byte 0x66; "
    start(
        m,
        "fldz; fld1; fld tbyte ptr [0x8010]; here: fld dword ptr [0x8000];"
        f"{prefix}fnstenv [0x8100]; {prefix}fnsave [0x8200];"
        f"fld1; {prefix}frstor [0x8200]; hlt",
        mode,
    )
    m.write(0x8000, 0x40490FDB, 4)
    m.load(0x8010, bytes(4) + b"\1" + bytes(5))  # denormal
    m.run(lib.EXIT_HLT)
    assert m.vector() == -1
    high = 0xFFFF0000 if size == 4 else 0
    fip = m.symbols["here"] & (0xFFFF if mode == "real" else 0xFFFFFFFF)
    environment = struct.unpack_from(form, m.ram, 0x8100)
    fop = {"real": 0x106, "prot32": 0x105, "long64": 0x104}[mode]  # ModRM of an address without registers
    tags = 0b01_00_10_00_11_11_11_11
    assert environment[:3] == (high | FCW_ALL, high | 4 << 11, high | tags)
    assert environment[3:] == pointers(fip, fop, 0x8000)
    saved = m.ram[0x8200 : 0x8200 + 7 * size]
    assert saved[3 * size :] == m.ram[0x8100 + 3 * size : 0x8100 + 7 * size]
    assert m.ram[0x8200 + 7 * size + 20 :][:10] == ONE
    fpu = m.guest.fpu
    assert (fpu.fcw, fpu.fsw, fpu.ftw) == (FCW_ALL, 4 << 11, 0xF0)
    assert (st(m, 2), st(m, 3)) == (ONE, bytes(10))
    assert fpu.fop == (0 if (mode, size) == ("prot32", 2) else fop)


@pytest.mark.spec("fpu.x87")
def test_fnstenv_masks_everything(m: Machine) -> None:
    start(m, f"{DIVIDE_BY_ZERO} fnstenv [0x20100]; hlt")
    m.run(lib.EXIT_HLT)
    assert (m.read(DATA + 0x100, 2), m.read(DATA + 0x104, 2)) == (FCW_UNMASKED, 6 << 11 | ZE | ES_B)
    assert (m.guest.fpu.fcw, m.guest.fpu.fsw) == (FCW_ALL, 6 << 11 | ZE)


# ---- memory that is not there, or not memory


@pytest.mark.spec("fpu.x87")
@pytest.mark.parametrize("unmasked", [False, True])
@pytest.mark.parametrize(
    "source",
    [
        "fstp tbyte ptr [rbx]",
        "fistp qword ptr [rbx]",
        "fnsave [rbx]",
        "fnstenv [rbx]",
        "fld tbyte ptr [rbx]",
        "frstor [rbx]",
        "fxsave [rcx]",
        "movq [rbx], mm1",
        "paddb mm1, [rbx]",
        "maskmovq mm0, mm0",
    ],
)
def test_missing_page_leaves_everything(m: Machine, source: str, unmasked: bool) -> None:
    def run(*, missing: bool) -> tuple[bytes, bytes]:
        m.load(DATA, bytes(0x2000))
        m.write(DATA + 0x800, FCW_UNMASKED, 2)
        before = "fldcw [0x20800]; fnop; " if unmasked else ""
        start(
            m,
            f"{before} fldz; fld1; fldpi; nop; {source}; hlt",
            rbx=NEXT_PAGE - 3,
            rdi=NEXT_PAGE - 3,
            rcx=NEXT_PAGE - 0x100,
        )
        if missing:
            m.unmap(NEXT_PAGE)
            m.run(lib.EXIT_EPT_VIOLATION)
            assert m.exit.gpa == NEXT_PAGE
            assert (m.guest.fpu.fsw, m.guest.fpu.ftw) == (5 << 11, 0xE0)
            assert (st(m, 0), st(m, 1)) == (PI, ONE)
            assert m.ram[DATA : DATA + 0x800] == bytes(0x800)
            m.map(NEXT_PAGE)
        m.run(lib.EXIT_HLT)
        assert m.vector() == -1
        return bytes(ffi.buffer(ffi.addressof(m.guest.fpu))), m.ram[DATA : DATA + 0x2000]

    assert run(missing=False) == run(missing=True)


@pytest.mark.spec("fpu.x87")
def test_mmio(m: Machine) -> None:
    start(m, "fldpi; fld1; fstp qword ptr [rbx]; fld qword ptr [rbx + 8]; hlt", rbx=NEXT_PAGE)
    m.map_mmio(NEXT_PAGE)
    m.run(lib.EXIT_MMIO_WRITE)
    mmio = m.exit.mmio[0]
    assert (mmio.gpa, mmio.len) == (NEXT_PAGE, 8)
    assert struct.unpack("<d", bytes(mmio.data)[:8]) == (1.0,)
    assert (m.guest.fpu.ftw, st(m, 0)) == (0x80, PI)
    m.run(lib.EXIT_MMIO_READ)
    assert (m.exit.mmio[0].gpa, m.exit.mmio[0].len) == (NEXT_PAGE + 8, 8)
    assert m.guest.fpu.ftw == 0x80
    m.ctl.mmio_count = 1
    m.ctl.mmio[0].gpa, m.ctl.mmio[0].len = NEXT_PAGE + 8, 8
    ffi.memmove(m.ctl.mmio[0].data, struct.pack("<d", 1.0), 8)
    m.run(lib.EXIT_HLT)
    assert (m.guest.fpu.ftw, st(m, 0), st(m, 1)) == (0xC0, ONE, PI)


@pytest.mark.spec("fpu.x87")
@pytest.mark.parametrize("source", ["fadd dword ptr [rbx]", "fstp qword ptr [rbx]", "mov eax, [rbx]"])
def test_memory_of_the_client_vanishes(m: Machine, source: str) -> None:
    """The guest's registers were in the host's FPU when the signal came."""
    libc = ctypes.CDLL(None, use_errno=True)
    start(
        m, f"fldpi; fld1; mov eax, [rbx]; out 0x80, al; fld1; fld1; fstp st(0); {source}; hlt", rbx=NEXT_PAGE
    )
    m.write(NEXT_PAGE, 0x3F800000, 4)
    m.run(lib.EXIT_IO)
    page = ctypes.c_void_p(m.hva + NEXT_PAGE)
    assert not libc.mprotect(page, 4096, 0)
    m.ctl.pio_out_done = 1
    lib.cpu_complete(m.cpu)
    m.run(lib.EXIT_HOST_FAULT)
    assert m.exit.hva == m.hva + NEXT_PAGE
    assert not libc.mprotect(page, 4096, 3)
    assert (m.guest.fpu.fsw & 0x3800, m.guest.fpu.ftw, st(m, 0), st(m, 2)) == (5 << 11, 0xE0, ONE, PI)
    m.run(lib.EXIT_HLT)
    assert st(m, 1 if source.startswith("fstp") else 2) == PI


@pytest.mark.spec("fpu.x87", "fpu.sse")
def test_unmasked_sse_exception_in_between(m: Machine) -> None:
    """It is found out by a signal of the host's."""
    start(m, "fldpi; fld1; ldmxcsr [0x20010]; divps xmm0, xmm1; hlt")
    m.set(cr4=m.reg("cr4") | lib.X86_CR4_OSXMMEXCPT)
    m.write(DATA + 0x10, 0x1F80 & ~0x200, 4)
    m.guest.fpu.ymm[0] = struct.pack("<4f", 1, 1, 1, 1) + bytes(16)
    m.run(lib.EXIT_HLT)
    assert m.vector() == XM
    assert (st(m, 0), st(m, 1), m.guest.fpu.ftw) == (ONE, PI, 0xC0)


@pytest.mark.spec("fpu.x87")
def test_control_word_of_the_client(m: Machine) -> None:
    """Neither the guest's computations nor the way out change it."""
    libm = ctypes.CDLL("libm.so.6")
    start(m, "fldcw [0x20800]; fld1; hlt; nop; hlt")
    default = libm.fegetround()
    assert not libm.fesetround(0xC00)  # FE_TOWARDZERO
    try:
        m.run(lib.EXIT_HLT)
        assert libm.fegetround() == 0xC00
        m.run(lib.EXIT_HLT)
        assert libm.fegetround() == 0xC00
    finally:
        assert not libm.fesetround(default)
    assert st(m, 0) == ONE


# ---- MMX


@pytest.mark.spec("fpu.sse", "fpu.x87")
def test_mmx_registers_are_the_significands(m: Machine) -> None:
    start(m, "fldpi; fld1; movq mm2, mm6; hlt; fstp tbyte ptr [0x20000]; emms; hlt")
    m.run(lib.EXIT_HLT)
    fpu = m.guest.fpu
    assert (fpu.fsw, fpu.ftw) == (0, 0xFF)
    assert (mm(m, 6), mm(m, 7)) == (1 << 63, int.from_bytes(PI[:8], "little"))
    assert st(m, 2) == ONE[:8] + b"\xff\xff"
    m.run(lib.EXIT_HLT)
    assert (fpu.fsw, fpu.ftw) == (0, 0)


@pytest.mark.spec("fpu.sse")
@pytest.mark.parametrize(
    ("source", "cr4", "vector"),
    [
        ("pshufw mm0, mm1, 3", 0, -1),
        ("movq2dq xmm0, mm1", 0, UD),
        ("cvtpi2ps xmm0, mm1", 0, UD),
    ],
)
def test_osfxsr(m: Machine, source: str, cr4: int, vector: int) -> None:
    start(m, f"{source}; hlt")
    m.set(cr4=m.reg("cr4") & ~lib.X86_CR4_OSFXSR | cr4)
    m.run(lib.EXIT_HLT)
    assert m.vector() == vector


@pytest.mark.spec("fpu.x87", "fpu.sse")
@pytest.mark.parametrize(
    ("word", "bit", "source"),
    [
        ("1_EDX", "CMOV", "fcmovb st, st(1)"),
        ("1_EDX", "CMOV", "fcomip st, st(1)"),
        ("1_ECX", "SSE3", "fisttp word ptr [rbx]"),
        ("1_EDX", "MMX", "paddb mm0, mm1"),
        ("1_EDX", "MMX", "emms"),
        ("1_EDX", "SSE", "pavgb mm0, mm1"),
        ("1_EDX", "SSE2", "paddq mm0, mm1"),
        ("1_ECX", "SSSE3", "pabsb mm0, mm1"),
        ("1_EDX", "FXSR", "fxsave [rbx]"),
    ],
)
def test_cpuid_bits(m: Machine, word: str, bit: str, source: str) -> None:
    start(m, f"{source}; hlt", rbx=DATA)
    m.run(lib.EXIT_HLT)
    assert m.vector() == -1
    m.ctl.cpuid[getattr(lib, f"CPU_CPUID_{word}")] &= ~(1 << getattr(lib, f"CPUID_{word}_{bit}"))
    start(m, f"{source}; hlt", rbx=DATA)
    m.run(lib.EXIT_HLT)
    assert m.vector() == UD


# ---- where the state is kept must not show


def random_code(r: random.Random) -> bytes:
    """x87 with and without operand at [rbx], MMX, FXSAVE and FXRSTOR at [rsi]."""
    kind = r.random()
    if kind < 0.4:
        code = bytes([r.randrange(0xD8, 0xE0), r.randrange(0xC0, 0x100)])
    elif kind < 0.7:
        code = bytes([r.randrange(0xD8, 0xE0), r.randrange(8) << 3 | 3])
    elif kind < 0.95:
        code = bytes([0x0F, r.choice(MMX_OPCODES), r.choice([3, 0xC0]) | r.randrange(64) & 0x38])
    else:
        code = bytes([0x0F, 0xAE, r.randrange(2) << 3 | 6])
    name = ffi.new("char[32]")
    return code if lib.cpu_decode(code, len(code), 64, name, 32) == len(code) else random_code(r)


MMX_OPCODES = [0x60, 0x6F, 0x77, 0x7F, 0xD5, 0xEF, 0xFC]


@pytest.mark.spec("fpu.x87", "fpu.fxsave")
@pytest.mark.parametrize("seed", range(40))
def test_exits_between_instructions_do_not_show(m: Machine, seed: int) -> None:
    """In guest mode the state is in the host's FPU, at every exit in memory."""
    r = random.Random(seed)
    code = b"".join(random_code(r) for _ in range(60)) + b"\xf4"
    data = r.randbytes(16) + struct.pack("<H", r.choice([0x37F, 0x27F, 0xC7F, 0x37E]))

    def run(*, stepping: bool) -> tuple[object, ...]:
        start(m, "hlt")
        m.load(CODE, code)
        m.load(DATA, data + bytes(1024 - len(data)))
        m.write(DATA + 0x200, FCW_ALL)
        m.write(DATA + 0x218, 0x1F80)
        m.ctl.flags = m.ctl.flags & ~lib.CPU_SINGLE_STEP | (lib.CPU_SINGLE_STEP if stepping else 0)
        m.set(rbx=DATA, rsi=DATA + 0x200)
        steps = 0
        while m.run() == lib.EXIT_MTF:
            steps += 1
        assert m.exit.reason == lib.EXIT_HLT
        assert (steps > 0) == stepping
        m.guest.fpu.xinuse = 0
        fpu = bytes(ffi.buffer(ffi.addressof(m.guest.fpu)))
        return m.vector(), m.reg("rip"), m.reg("rax"), fpu, m.ram[DATA : DATA + 1024]

    assert run(stepping=True) == run(stepping=False)
