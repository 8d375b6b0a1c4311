"""Segmentation: loads, limits, far transfers, gates, IRET, task switches, system calls.

Source: SDM vol. 3 chapters 3, 5, 7, 21, vol. 2 by instruction; x86-cpu.md sections 1 and 5.
"""

from __future__ import annotations

import pytest

from pykvm.abi import lib
from tests.guest.bare import (
    CODE,
    CODE16,
    CODE32,
    CODE64,
    DATA16,
    DATA32,
    FREE_SELECTOR,
    GDT,
    HANDLERS,
    LDT_SELECTOR,
    STACK,
    STACK0,
    TSS,
    TSS_SELECTOR,
    USER_CODE32,
    USER_CODE64,
    USER_DATA,
    Machine,
    descriptor,
    gate,
)

RF, IF, TF, NT, VM, AC, ID, ZF = 0x10000, 0x200, 0x100, 0x4000, 0x20000, 0x40000, 0x200000, 0x40
DB, UD, DF, TS, NP, SS, GP, PF = 1, 6, 8, 10, 11, 12, 13, 14
UNUSABLE = 0x10000
LDT, DATA = 0x8000, 0x500
NON_CANONICAL = 0x8000_0000_1000


@pytest.fixture
def m() -> Machine:
    return Machine()


def start(m: Machine, mode: str, source: str, cpl: int = 0) -> None:
    """Assemble and be there; what may fault is labelled `bad`."""
    bits = {"real": 16, "vm86": 16, "prot32": 32, "long64": 64}[mode]
    m.asm(source, CODE, bits=bits)
    if mode == "real":
        m.real(CODE)
    elif mode == "vm86":
        m.vm86(CODE >> 4, 0)
    else:
        getattr(m, mode)(CODE, cpl)


def faults(m: Machine, vector: int, error: int | None) -> None:
    """Run into the fault of the instruction at `bad`."""
    m.run(lib.EXIT_HLT)
    size = 8 if m.guest.efer & lib.EFER_LMA else 4
    frame = m.frame(2, size)
    assert (m.vector(), frame[0]) == (vector, m.symbols["bad"] if error is None else error)
    if error is not None:
        assert frame[1] == m.symbols["bad"]


def gdt_byte(m: Machine, selector: int) -> int:
    return m.read(GDT + (selector & ~7) + 5, 1)


# ---- loading segment registers


@pytest.mark.spec("cpu.seg_load")
@pytest.mark.parametrize("mode", ["prot32", "long64"])
@pytest.mark.parametrize("seg", ["ds", "es", "fs", "gs", "ss"])
def test_load_reads_the_descriptor_and_sets_accessed(m: Machine, mode: str, seg: str) -> None:
    start(m, mode, f"mov eax, {FREE_SELECTOR}; mov {seg}, eax; hlt")
    m.set_gdt(FREE_SELECTOR, descriptor(0x12345678, 0x45678, 0xC092))
    m.run(lib.EXIT_HLT)
    s = m.seg(seg)
    assert (s.selector, s.base, s.limit, s.ar) == (FREE_SELECTOR, 0x12345678, 0x45678FFF, 0xC093)
    assert gdt_byte(m, FREE_SELECTOR) == 0x93


@pytest.mark.spec("cpu.seg_load")
@pytest.mark.parametrize(
    ("seg", "selector", "cpl", "ar", "vector"),
    [
        ("ds", FREE_SELECTOR, 0, 0xC013, NP),
        ("ss", FREE_SELECTOR, 0, 0xC013, SS),
        ("ds", FREE_SELECTOR, 0, 0xC099, GP),  # execute-only
        ("ds", FREE_SELECTOR, 0, 0xC082, GP),  # system
        ("ds", FREE_SELECTOR | 3, 0, 0xC093, GP),  # RPL > DPL
        ("ds", FREE_SELECTOR, 3, 0xC093, GP),  # CPL > DPL
        ("ds", FREE_SELECTOR, 3, 0xC09B, GP),
        ("ds", FREE_SELECTOR | 3, 3, 0xC09F, None),  # conforming: any level
        ("ds", FREE_SELECTOR, 0, 0xC0F3, None),
        ("ss", FREE_SELECTOR, 0, 0xC0F3, GP),
        ("ss", FREE_SELECTOR | 3, 0, 0xC093, GP),
        ("ss", FREE_SELECTOR, 0, 0xC091, GP),  # read-only
        ("ss", FREE_SELECTOR, 0, 0xC09B, GP),
        ("ss", FREE_SELECTOR | 3, 3, 0xC0F3, None),
        ("es", 0x1238, 0, 0, GP),
        ("es", 0x0C, 0, 0, GP),
    ],
)
def test_load_checks(m: Machine, seg: str, selector: int, cpl: int, ar: int, vector: int | None) -> None:
    start(m, "prot32", f"mov eax, {selector}; bad: mov {seg}, eax; cpuid", cpl)
    m.set_gdt(FREE_SELECTOR, descriptor(0, 0xFFFFF, ar))
    if vector is None:
        m.run(lib.EXIT_CPUID)
        assert m.selectors()[seg] == selector
    else:
        faults(m, vector, selector & ~3)


@pytest.mark.spec("cpu.seg_load", "cpu.prot16_32")
@pytest.mark.tcg_differs("neither limits nor types of segments are checked: SDM vol. 3 5.3, 5.4")
def test_null_selectors(m: Machine) -> None:
    start(m, "prot32", "mov eax, 3; mov es, eax; bad: mov ebx, es:[0]")
    faults(m, GP, 0)
    assert m.seg("es").ar & UNUSABLE
    assert m.selectors()["es"] == 3
    start(m, "prot32", "xor eax, eax; bad: mov ss, eax")
    faults(m, GP, 0)
    start(m, "long64", "xor eax, eax; mov ss, eax; push rax; hlt")
    m.run(lib.EXIT_HLT)
    assert (m.guest.rip, m.cpl) == (CODE + 6, 0)
    start(m, "long64", "mov eax, 3; bad: mov ss, eax", cpl=3)
    faults(m, GP, 0)


@pytest.mark.spec("cpu.seg_load", "cpu.fsgsbase")
def test_loading_null_clears_the_base_of_fs(m: Machine) -> None:
    start(m, "long64", "xor eax, eax; mov fs, eax; hlt")
    m.seg("fs").base = 0x123456789
    m.run(lib.EXIT_HLT)
    assert m.seg("fs").base == 0


@pytest.mark.spec("cpu.seg_load", "cpu.lldt_ltr_lgdt")
def test_selectors_into_the_ldt(m: Machine) -> None:
    start(m, "prot32", f"mov eax, {LDT_SELECTOR}; lldt ax; mov eax, 0x0c; mov ds, eax; hlt")
    m.set_gdt(LDT_SELECTOR, descriptor(LDT, 0xF, 0x82))
    m.write(LDT + 8, descriptor(0x1000, 0xFFF, 0x4093))
    m.run(lib.EXIT_HLT)
    assert (m.seg("ds").base, m.seg("ds").limit, m.selectors()["ds"]) == (0x1000, 0xFFF, 0x0C)
    start(m, "prot32", f"mov eax, {LDT_SELECTOR}; lldt ax; mov eax, 0x14; bad: mov ds, eax; hlt")
    m.set_gdt(LDT_SELECTOR, descriptor(LDT, 0xF, 0x82))
    faults(m, GP, 0x14)


@pytest.mark.spec("cpu.seg_load")
def test_invalid_segment_register_encodings(m: Machine) -> None:
    for code in ("0x8e, 0xc8", "0x8e, 0xf0", "0x8c, 0xf0", "0x8e, 0xf8"):
        start(m, "prot32", f"bad: .byte {code}")
        faults(m, UD, None)


@pytest.mark.spec("cpu.seg_load")
def test_mov_from_segment_register(m: Machine) -> None:
    start(m, "long64", "mov rax, -1; mov ax, ds; mov rbx, -1; mov ebx, ds; mov [0x500], ds; hlt")
    m.write(DATA, 2**64 - 1)
    m.run(lib.EXIT_HLT)
    assert m.reg("rax") == 0xFFFF_FFFF_FFFF_0000 | DATA32
    assert m.reg("rbx") == DATA32
    assert m.read(DATA) == 0xFFFF_FFFF_FFFF_0000 | DATA32


@pytest.mark.spec("cpu.seg_load")
@pytest.mark.tcg_differs("a selector is pushed with 32 bits: SDM vol. 2 PUSH allows both")
def test_push_and_pop_of_segment_registers(m: Machine) -> None:
    start(m, "prot32", "push ds; push -1; add esp, 4; push fs; pop gs; pop es; hlt")
    m.run(lib.EXIT_HLT)
    assert m.reg("rsp") == STACK
    assert m.read(STACK - 8, 4) == 0xFFFF0000 | DATA32, "16 bits are written"
    start(m, "long64", "push fs; pop gs; hlt")
    m.run(lib.EXIT_HLT)
    assert (m.read(STACK - 8), m.reg("rsp")) == (DATA32, STACK)
    start(m, "real", "push cs; pop ds; pushd 0x12345678; hlt")
    m.run(lib.EXIT_HLT)
    assert m.seg("ds").base == CODE
    assert m.reg("rsp") == STACK - 4


@pytest.mark.spec("cpu.isa_bcd_misc", "cpu.seg_load")
def test_les_loads_offset_and_segment_or_nothing(m: Machine) -> None:
    start(m, "prot32", "les eax, [0x500]; lfs bx, [0x506]; bad: lgs ecx, [0x510]")
    m.load(DATA, bytes.fromhex("78563412 1000 3412 1000") + bytes(6) + bytes.fromhex("11111111 3412"))
    faults(m, GP, 0x1234)
    assert m.reg("rax") == 0x12345678
    assert m.reg("rbx") == 0x1234
    assert m.reg("rcx") == 0
    assert (m.selectors()["es"], m.selectors()["fs"]) == (DATA32, DATA32)


# ---- limits and types


@pytest.mark.spec("cpu.prot16_32")
@pytest.mark.tcg_differs("neither limits nor types of segments are checked: SDM vol. 3 5.3, 5.4")
@pytest.mark.parametrize(
    ("ar", "access", "ok"),
    [
        (0x4093, "mov eax, [0xffc]", True),
        (0x4093, "mov eax, [0xffd]", False),
        (0x4093, "mov al, [0xfff]", True),
        (0x4093, "mov [0x1000], al", False),
        (0x4093, "mov eax, [0xffffffff]", False),
        (0x4091, "mov eax, [0]", True),
        (0x4091, "mov [0], eax", False),
        (0x4091, "lock add dword ptr [0], eax", False),
        (0x4097, "mov al, [0xfff]", False),  # expand-down: above the limit
        (0x4097, "mov al, [0x1000]", True),
        (0x4097, "mov eax, [0xfffffffc]", True),
        (0x0097, "mov eax, [0xfffc]", True),  # B = 0: up to 64 KiB
        (0x0097, "mov eax, [0xfffd]", False),
        (0x409B, "mov eax, [0]", True),
        (0x409B, "mov [0], eax", False),
    ],
)
def test_limits_and_rights(m: Machine, ar: int, access: str, ok: bool) -> None:
    start(m, "prot32", f"mov ebx, {FREE_SELECTOR}; mov ds, ebx; bad: {access}; cpuid")
    m.set_gdt(FREE_SELECTOR, descriptor(0x20000, 0xFFF, ar))
    m.set_seg("cs", CODE32, 0, 0xFFFFFFFF, 0xC09B)
    if ok:
        m.run(lib.EXIT_CPUID)
    else:
        faults(m, GP, 0)


@pytest.mark.spec("cpu.prot16_32")
@pytest.mark.tcg_differs("neither limits nor types of segments are checked: SDM vol. 3 5.3, 5.4")
def test_execute_only_code_cannot_be_read_and_stack_limit_is_ss(m: Machine) -> None:
    start(m, "prot32", "bad: mov eax, cs:[0]")
    m.set_seg("cs", CODE32, 0, 0xFFFFFFFF, 0xC099)
    faults(m, GP, 0)
    start(m, "prot32", f"mov eax, {FREE_SELECTOR}; mov ss, eax; mov esp, 0x1002; bad: push eax")
    m.set_gdt(FREE_SELECTOR, descriptor(0, 0xFFF, 0x4093))
    m.set_gate(SS, gate(TSS_SELECTOR, 0, 0x85))  # a task gate brings a stack of its own
    m.run(lib.EXIT_TRIPLE_FAULT)  # to a busy TSS
    start(m, "prot32", f"mov eax, {FREE_SELECTOR}; mov ss, eax; bad: mov ebx, [ebp + 0x1000]; hlt")
    m.set_gdt(FREE_SELECTOR, descriptor(0, 0xFFF, 0x4093))
    m.set(rsp=0x800)
    faults(m, SS, 0)


@pytest.mark.spec("cpu.real_mode")
@pytest.mark.tcg_differs("neither limits nor types of segments are checked: SDM vol. 3 5.3, 5.4")
@pytest.mark.parametrize(
    ("access", "vector"),
    [("mov ax, [bx]", GP), ("mov [bx], ax", GP), ("mov ax, [bp]", SS), ("mov al, [bx]", None)],
)
def test_real_mode_limit(m: Machine, access: str, vector: int | None) -> None:
    start(m, "real", f"mov bx, 0xffff; mov bp, bx; bad: {access}; hlt")
    m.run(lib.EXIT_HLT)
    if vector is None:
        assert m.guest.rip == 8
    else:
        assert (m.vector(), m.frame(2)) == (vector, [m.symbols["bad"] - CODE, CODE >> 4])


@pytest.mark.spec("cpu.real_mode")
def test_real_mode_addresses_are_20_bits_and_more(m: Machine) -> None:
    start(m, "real", "mov ax, 0xffff; mov ds, ax; mov al, [0x10]; hlt")
    m.load(0x100000, b"\x5a")
    m.run(lib.EXIT_HLT)
    assert m.reg("rax") & 0xFF == 0x5A, "no A20 wrap"


UNREAL = f"""
    cli
    lgdt [0x500]
    mov eax, cr0
    or al, 1
    mov cr0, eax
    jmp 1f
1:  mov bx, {DATA32}
    mov ds, bx
    and al, 0xfe
    mov cr0, eax
    jmp 2f
2:  xor bx, bx
    mov ds, bx
    mov ecx, 0x200000
    mov eax, [ecx]
    hlt
"""


@pytest.mark.spec("cpu.unreal", "cpu.big_real_transition")
def test_unreal_mode(m: Machine) -> None:
    m.prot32(0)  # for its GDT
    start(m, "real", UNREAL)
    m.load(DATA, (0xFFF).to_bytes(2, "little") + GDT.to_bytes(4, "little"))
    m.write(0x200000, 0xCAFEBABE, 4)
    m.run(lib.EXIT_HLT)
    assert m.reg("rax") == 0xCAFEBABE
    assert (m.seg("ds").base, m.seg("ds").limit) == (0, 0xFFFFFFFF)
    assert m.seg("cs").base == CODE


# ---- far JMP, CALL, RET


@pytest.mark.spec("cpu.far_transfers", "cpu.real_mode")
@pytest.mark.tcg_differs("neither limits nor types of segments are checked: SDM vol. 3 5.3, 5.4")
def test_real_mode_far_transfers(m: Machine) -> None:
    start(m, "real", ".byte 0x9a; .word 0x40, 0x1000; back: hlt")
    m.asm("mov ax, 1; retf 4", CODE + 0x40, 16)
    m.run(lib.EXIT_HLT)
    assert (m.guest.rip, m.reg("rsp"), m.reg("rax")) == (6, STACK + 4, 1)
    start(m, "real", ".byte 0x66, 0x9a; .long 0x10000; .word 0x1000")
    m.run(lib.EXIT_HLT)
    assert m.vector() == GP, "offset beyond the limit"
    start(m, "real", "jmp dword ptr [0x500]")
    m.write(DATA, 0x1010_0002, 4)
    m.load(0x10102, b"\xf4")
    m.run(lib.EXIT_HLT)
    assert (m.guest.rip, m.selectors()["cs"], m.seg("cs").base) == (3, 0x1010, 0x10100)


@pytest.mark.spec("cpu.far_transfers")
def test_prot32_far_call_and_ret(m: Machine) -> None:
    start(m, "prot32", f"push 7; call {CODE16}:0x40; back: hlt")
    m.set_gdt(CODE16, descriptor(CODE, 0xFFFF, 0x9A))
    m.asm(".byte 0x66, 0xca, 4, 0", CODE + 0x40, 16)
    m.run(lib.EXIT_HLT)
    assert m.guest.rip == m.symbols["back"] + 1
    assert m.reg("rsp") == STACK
    assert [m.read(STACK - 12, 4), m.read(STACK - 8, 4)] == [m.symbols["back"], CODE32]
    assert gdt_byte(m, CODE16) == 0x9B


FAR_TARGETS = [
    (0, 0xC09B, GP, 0),
    (DATA32, 0xC09B, GP, DATA32),
    (FREE_SELECTOR, 0xC01B, NP, FREE_SELECTOR),
    (FREE_SELECTOR, 0xC0FB, GP, FREE_SELECTOR),
    (FREE_SELECTOR | 3, 0xC09B, GP, FREE_SELECTOR),
    (FREE_SELECTOR, 0xC0FF, GP, FREE_SELECTOR),  # conforming, of a lower privilege
    (FREE_SELECTOR, 0xC01F, NP, FREE_SELECTOR),
    (0x1230, 0xC09B, GP, 0x1230),
    (FREE_SELECTOR, 0x409B, GP, 0),  # offset beyond a limit of 1 MiB
]


@pytest.mark.spec("cpu.far_transfers")
@pytest.mark.tcg_differs("CALL pushes before the limit is checked: SDM vol. 2 CALL has it behind")
@pytest.mark.parametrize("insn", ["jmp", "call"])
@pytest.mark.parametrize(("selector", "ar", "vector", "error"), FAR_TARGETS)
def test_far_target_checks(m: Machine, insn: str, selector: int, ar: int, vector: int, error: int) -> None:
    start(m, "prot32", f"bad: {insn} {selector}:0x100000")
    m.set_gdt(FREE_SELECTOR, descriptor(0, 0xFFFFF, ar))
    faults(m, vector, error)


@pytest.mark.spec("cpu.far_transfers")
def test_far_jump_to_a_conforming_segment_keeps_cpl(m: Machine) -> None:
    start(m, "prot32", f"jmp {FREE_SELECTOR}:{CODE + 0x100}", cpl=3)
    m.set_gdt(FREE_SELECTOR, descriptor(0, 0xFFFFF, 0xC09E))
    m.asm("cpuid", CODE + 0x100)
    m.run(lib.EXIT_CPUID)
    assert (m.selectors()["cs"], m.cpl) == (FREE_SELECTOR | 3, 3)


@pytest.mark.spec("cpu.far_transfers", "cpu.long_mode")
@pytest.mark.tcg_differs("no check that addresses are canonical: SDM vol. 2 JMP")
def test_long_mode_far_jumps(m: Machine) -> None:
    start(m, "long64", "jmp fword ptr [0x500]")
    m.load(DATA, (CODE + 0x100).to_bytes(4, "little") + CODE32.to_bytes(2, "little"))
    m.asm(f"mov eax, [esp]; inc eax; jmp {CODE64}:{CODE + 0x200}", CODE + 0x100, 32)
    m.asm("inc eax; rex.w jmp fword ptr [0x510]", CODE + 0x200)
    m.load(0x510, (HANDLERS + 0x800).to_bytes(8, "little") + CODE64.to_bytes(2, "little"))
    m.write(STACK, 40)
    m.run(lib.EXIT_HLT)
    assert (m.guest.rip, m.reg("rax")) == (HANDLERS + 0x801, 42)
    start(m, "long64", "bad: rex.w jmp fword ptr [0x510]")
    m.load(0x510, NON_CANONICAL.to_bytes(8, "little") + CODE64.to_bytes(2, "little"))
    faults(m, GP, 0)
    start(m, "long64", "bad: jmp fword ptr [0x510]")
    m.load(0x510, CODE.to_bytes(4, "little") + FREE_SELECTOR.to_bytes(2, "little"))
    m.set_gdt(FREE_SELECTOR, descriptor(0, 0xFFFFF, 0xE09B))  # L and D
    faults(m, GP, FREE_SELECTOR)


@pytest.mark.spec("cpu.far_transfers")
def test_long_mode_far_call_and_return(m: Machine) -> None:
    start(m, "long64", "rex.w call fword ptr [0x510]; back: hlt")
    m.load(0x510, (CODE + 0x100).to_bytes(8, "little") + CODE64.to_bytes(2, "little"))
    m.asm("rex.w retf", CODE + 0x100)
    m.run(lib.EXIT_HLT)
    assert (m.guest.rip, m.reg("rsp")) == (m.symbols["back"] + 1, STACK)
    assert [m.read(STACK - 16), m.read(STACK - 8)] == [m.symbols["back"], CODE64]


@pytest.mark.spec("cpu.far_transfers")
def test_far_return_to_an_outer_level(m: Machine) -> None:
    start(m, "prot32", "retf 8")
    for k, v in enumerate((CODE + 0x100, USER_CODE32 | 3, 0x11, 0x22, 0x7000, USER_DATA | 3)):
        m.write(STACK + 4 * k, v, 4)
    m.set_seg("fs", USER_DATA, 0, 0xFFFFFFFF, 0xC0F3)
    m.asm("cpuid", CODE + 0x100)
    m.run(lib.EXIT_CPUID)
    assert m.reg("rsp") == 0x7000 + 8
    assert m.cpl == 3
    assert m.selectors() | {"ldtr": 0, "tr": 0} == {
        "es": 0, "cs": USER_CODE32 | 3, "ss": USER_DATA | 3, "ds": 0, "fs": USER_DATA, "gs": 0,
        "ldtr": 0, "tr": 0,
    }  # fmt: skip
    assert m.seg("ds").ar & UNUSABLE


@pytest.mark.spec("cpu.far_transfers")
@pytest.mark.tcg_differs("a stack segment that is not present is #NP: SDM vol. 2 RET, IRET have #SS")
@pytest.mark.parametrize(
    ("cs", "ss", "vector", "error"),
    [
        (0, 0, GP, 0),
        (USER_CODE32, 0, GP, USER_CODE32),  # RPL 0, DPL 3
        (CODE32 | 3, 0, GP, CODE32),
        (DATA32, 0, GP, DATA32),
        (USER_CODE32 | 3, 0, GP, 0),
        (USER_CODE32 | 3, DATA32, GP, DATA32),
        (USER_CODE32 | 3, USER_DATA, GP, USER_DATA),
        (USER_CODE32 | 3, USER_CODE32 | 3, GP, USER_CODE32),
        (USER_CODE32 | 3, FREE_SELECTOR | 3, SS, FREE_SELECTOR),
        (0x1230, 0, GP, 0x1230),
        (CODE16, 0, GP, CODE16),  # conforming, DPL 3, RPL 0
    ],
)
@pytest.mark.parametrize("insn", ["retf", "iretd"])
def test_far_return_checks(m: Machine, insn: str, cs: int, ss: int, vector: int, error: int) -> None:
    start(m, "prot32", f"bad: {insn}")
    words = [CODE, cs, *([2] if insn == "iretd" else []), STACK, ss]
    for k, v in enumerate(words):
        m.write(STACK + 4 * k, v, 4)
    m.set_gdt(CODE16, descriptor(0, 0xFFFFF, 0xC0FF))
    m.set_gdt(FREE_SELECTOR, descriptor(0, 0xFFFFF, 0xC073))
    faults(m, vector, error)
    assert m.selectors()["ss"] == DATA32


# ---- call gates


def call_gate(m: Machine, selector: int, offset: int, kind: int, count: int = 0) -> None:
    raw = gate(selector, offset, kind)
    wide = m.guest.efer & lib.EFER_LMA
    m.load(GDT + FREE_SELECTOR, raw[:4] + bytes([count]) + raw[5 : 16 if wide else 8])


@pytest.mark.spec("cpu.far_transfers")
@pytest.mark.parametrize("size", [2, 4])
def test_call_gate_to_an_inner_level_copies_parameters_and_returns(m: Machine, size: int) -> None:
    narrow = size == 2
    here = 0xB000  # below 64 KiB, where a 16-bit gate can return to
    m.asm(f"sub esp, 64; call {FREE_SELECTOR}:0; back: cpuid", here, 32)
    m.prot32(here, 3)
    m.set_gdt(CODE16, descriptor(here, 0xFFFF, 0x9B))
    call_gate(m, CODE16 if narrow else CODE32, 0x100 if narrow else here + 0x100, 0xE4 if narrow else 0xEC, 2)
    m.asm(f"retf {2 * size}", here + 0x100, 8 * size)
    m.write(STACK - 64, 0x1111_2222_3333_4444)
    m.run(lib.EXIT_CPUID)
    assert m.guest.rip == m.symbols["back"]
    assert m.reg("rsp") == STACK - 64 + 2 * size
    assert (m.selectors()["cs"], m.selectors()["ss"], m.cpl) == (USER_CODE32 | 3, USER_DATA | 3, 3)
    params = [0x4444, 0x3333] if narrow else [0x33334444, 0x11112222]
    frame = [m.symbols["back"], USER_CODE32 | 3, *params, STACK - 64, USER_DATA | 3]
    assert [m.read(STACK0 - size * (6 - k), size) for k in range(6)] == frame


@pytest.mark.spec("cpu.far_transfers")
def test_call_gate_64(m: Machine) -> None:
    start(m, "long64", "call fword ptr [0x500]; back: cpuid", cpl=3)
    m.load(DATA, bytes(4) + FREE_SELECTOR.to_bytes(2, "little"))
    call_gate(m, CODE64, CODE + 0x100, 0xEC)
    m.asm("mov rax, rsp; rex.w retf", CODE + 0x100)
    m.run(lib.EXIT_CPUID)
    assert m.reg("rax") == STACK0 - 32
    assert [m.read(STACK0 - 32 + 8 * k) for k in range(4)] == [
        m.symbols["back"], USER_CODE64 | 3, STACK, USER_DATA | 3,
    ]  # fmt: skip
    assert (m.guest.rip, m.cpl, m.reg("rsp")) == (m.symbols["back"], 3, STACK)


@pytest.mark.spec("cpu.far_transfers")
def test_call_gate_same_level_and_jump(m: Machine) -> None:
    start(m, "prot32", f"call {FREE_SELECTOR}:0; back: hlt")
    call_gate(m, CODE32, CODE + 0x100, 0x8C, 5)
    m.asm("retf", CODE + 0x100, 32)
    m.run(lib.EXIT_HLT)
    assert (m.guest.rip, m.reg("rsp")) == (m.symbols["back"] + 1, STACK)
    start(m, "prot32", f"bad: jmp {FREE_SELECTOR}:0", cpl=3)
    call_gate(m, CODE32, CODE + 0x100, 0xEC)
    faults(m, GP, CODE32)  # JMP does not change the level


@pytest.mark.spec("cpu.far_transfers")
@pytest.mark.parametrize(
    ("target", "kind", "vector", "error"),
    [
        (CODE32, 0x8C, GP, FREE_SELECTOR),  # DPL 0
        (CODE32, 0x6C, NP, FREE_SELECTOR),
        (0, 0xEC, GP, 0),
        (DATA32, 0xEC, GP, DATA32),
        (0x1230, 0xEC, GP, 0x1230),
        (CODE32, 0xE5, GP, CODE32),  # task gate to no TSS
    ],
)
def test_bad_call_gates(m: Machine, target: int, kind: int, vector: int, error: int) -> None:
    start(m, "prot32", f"bad: call {FREE_SELECTOR}:0", cpl=3)
    call_gate(m, target, CODE, kind)
    faults(m, vector, error)


@pytest.mark.spec("cpu.far_transfers", "cpu.task_switch")
@pytest.mark.parametrize("kind", [0x8C, 0x84, 0x85, 0x89, 0x81])
@pytest.mark.parametrize("insn", ["jmp", "call"])
def test_privilege_of_a_gate_is_that_of_rpl_too(m: Machine, insn: str, kind: int) -> None:
    """Call gates, task gates and TSS of DPL 0, with RPL 1 at CPL 0."""
    start(m, "prot32", f"bad: {insn} {FREE_SELECTOR | 1}:0")
    call_gate(m, CODE32, CODE, kind)
    faults(m, GP, FREE_SELECTOR)


@pytest.mark.spec("cpu.far_transfers")
@pytest.mark.parametrize("count", [15, 16, 31])
def test_call_gate_copies_up_to_31_parameters(m: Machine, count: int) -> None:
    start(m, "prot32", f"sub esp, 128; call {FREE_SELECTOR}:0", cpl=3)
    call_gate(m, CODE32, CODE + 0x100, 0xEC, count)
    m.asm("cpuid", CODE + 0x100, 32)
    for k in range(32):
        m.write(STACK - 128 + 4 * k, 0x1000 + k, 4)
    m.run(lib.EXIT_CPUID)
    assert m.reg("rsp") == STACK0 - 4 * (4 + count)
    assert [m.read(m.reg("rsp") + 8 + 4 * k, 4) for k in range(count)] == [0x1000 + k for k in range(count)]


# ---- IRET


@pytest.mark.spec("cpu.far_transfers", "cpu.long_mode")
@pytest.mark.tcg_differs("L with D is taken: SDM vol. 2 RET, IRET")
@pytest.mark.parametrize("insn", ["rex.w retf", "iretq"])
def test_no_return_to_a_segment_with_l_and_d(m: Machine, insn: str) -> None:
    start(m, "long64", f"bad: {insn}")
    m.set_gdt(FREE_SELECTOR, descriptor(0, 0xFFFFF, 0xE09B))
    for k, v in enumerate((CODE, FREE_SELECTOR, 2, STACK, DATA32)):
        m.write(STACK + 8 * k, v)
    faults(m, GP, FREE_SELECTOR)


@pytest.mark.spec("cpu.far_transfers", "cpu.vm86")
@pytest.mark.tcg_differs("no limits: SDM vol. 3 5.3")
def test_iret_to_vm86_beyond_64_kib(m: Machine) -> None:
    start(m, "prot32", "bad: iretd")
    for k, v in enumerate((0x12345, CODE >> 4, VM | 2, 0x1234, 0x700, 0x11, 0x22, 0x33, 0x44)):
        m.write(STACK + 4 * k, v, 4)
    faults(m, GP, 0)


@pytest.mark.spec("cpu.seg_load", "cpu.long_mode")
@pytest.mark.tcg_differs("RPL is not looked at: SDM vol. 2 MOV, 64-bit mode exceptions")
@pytest.mark.parametrize("rpl", range(4))
def test_a_null_ss_has_the_rpl_of_cpl(m: Machine, rpl: int) -> None:
    start(m, "long64", f"mov eax, {rpl}; bad: mov ss, eax; cpuid")
    if rpl:
        faults(m, GP, 0)
    else:
        m.run(lib.EXIT_CPUID)
        assert m.seg("ss").ar & UNUSABLE


@pytest.mark.spec("cpu.far_transfers")
def test_iret_in_real_mode(m: Machine) -> None:
    start(m, "real", "iret")
    for k, v in enumerate((0x40, CODE >> 4, 0xFFFF & ~0x2100)):
        m.write(STACK + 2 * k, v, 2)
    m.load(CODE + 0x40, b"\xf4")
    m.run(lib.EXIT_HLT)
    assert (m.guest.rip, m.reg("rsp")) == (0x41, STACK + 6)
    assert m.guest.rflags == 0x5ED7


@pytest.mark.spec("cpu.far_transfers")
def test_iretd_in_real_mode_keeps_vm_vif_vip(m: Machine) -> None:
    start(m, "real", "iretd")
    for k, v in enumerate((0x40, CODE >> 4, 0xFFFFFEFF)):
        m.write(STACK + 4 * k, v, 4)
    m.load(CODE + 0x40, b"\xf4")
    m.run(lib.EXIT_HLT)
    assert m.guest.rflags | RF == 0x257ED7 & ~0x20000 | RF


@pytest.mark.spec("cpu.far_transfers", "cpu.cpl_rules")
@pytest.mark.parametrize(
    ("cpl", "iopl", "changed"),
    [(0, 0, IF | 0x3000 | NT | AC | ID), (3, 0, NT | AC | ID), (3, 3, IF | NT | AC | ID)],
)
def test_flags_iret_may_change(m: Machine, cpl: int, iopl: int, changed: int) -> None:
    start(m, "prot32", "iretd", cpl)
    m.set(rflags=2 | iopl << 12)
    flags = (IF | NT | AC | ID | 2) | (~(iopl << 12) & 0x3000)
    cs = USER_CODE32 | 3 if cpl else CODE32
    for k, v in enumerate((CODE + 0x100, cs, flags)):
        m.write(STACK + 4 * k, v, 4)
    m.asm("cpuid", CODE + 0x100)
    m.run(lib.EXIT_CPUID)
    assert m.guest.rflags ^ (2 | iopl << 12) == changed
    assert m.reg("rsp") == STACK + 12


@pytest.mark.spec("cpu.far_transfers")
def test_iret_to_user_in_long_mode(m: Machine) -> None:
    start(m, "long64", "iretq")
    for k, v in enumerate((CODE + 0x100, USER_CODE64 | 3, IF | 0x3002, 0x7008, USER_DATA | 3)):
        m.write(STACK + 8 * k, v)
    m.asm("cpuid", CODE + 0x100)
    m.run(lib.EXIT_CPUID)
    assert (m.reg("rsp"), m.cpl, m.guest.rflags) == (0x7008, 3, IF | 0x3002)
    assert m.selectors()["ds"] == 0


@pytest.mark.spec("cpu.far_transfers")
def test_iret_same_level_pops_ss_rsp_in_64_bit_mode(m: Machine) -> None:
    start(m, "long64", "iretq")
    for k, v in enumerate((CODE + 0x100, CODE64, 2, 0x7008, 0)):
        m.write(STACK + 8 * k, v)
    m.asm("hlt", CODE + 0x100)
    m.run(lib.EXIT_HLT)
    assert (m.reg("rsp"), m.selectors()["ss"], m.cpl) == (0x7008, 0, 0)
    assert m.seg("ss").ar & UNUSABLE


@pytest.mark.spec("cpu.far_transfers")
@pytest.mark.tcg_differs("a null SS is taken: SDM vol. 2 IRET, 64-bit mode exceptions")
def test_iret_to_compatibility_mode_needs_a_stack_segment(m: Machine) -> None:
    start(m, "long64", "bad: iretq")
    for k, v in enumerate((CODE + 0x100, CODE32, 2, 0x7008, 0)):
        m.write(STACK + 8 * k, v)
    faults(m, GP, 0)
    start(m, "long64", "bad: iretq")
    for k, v in enumerate((CODE + 0x100, USER_CODE64 | 3, 2, 0x7008, 3)):
        m.write(STACK + 8 * k, v)
    faults(m, GP, 0)


@pytest.mark.spec("cpu.far_transfers")
@pytest.mark.tcg_differs("the fault comes at CPL 3: SDM vol. 2 IRET")
@pytest.mark.parametrize("rip", [NON_CANONICAL, 0xFFFF_0000_0000_0000])
def test_iret_to_a_non_canonical_address_faults_in_the_kernel(m: Machine, rip: int) -> None:
    start(m, "long64", "bad: iretq")
    for k, v in enumerate((rip, USER_CODE64 | 3, 2, 0x7008, USER_DATA | 3)):
        m.write(STACK + 8 * k, v)
    faults(m, GP, 0)
    assert m.cpl == 0
    start(m, "long64", "bad: iretq")
    m.set(rflags=NT | 2)
    faults(m, GP, 0)


@pytest.mark.spec("cpu.far_transfers", "cpu.vm86")
def test_iret_to_vm86_and_back(m: Machine) -> None:
    start(m, "prot32", "iretd")
    words = (0x100, CODE >> 4, VM | IF | 2, 0x1234, 0x700, 0x11, 0x22, 0x33, 0x44)
    for k, v in enumerate(words):
        m.write(STACK + 4 * k, v, 4)
    m.asm("bad: hlt", CODE + 0x100)
    m.run(lib.EXIT_HLT)
    assert m.vector() == GP
    assert m.frame(10) == [0, *words[:2], words[2] | RF, *words[3:]]
    assert m.selectors()["cs"] == CODE32
    start(m, "prot32", "iretd")
    m.asm("cpuid", CODE + 0x100)
    m.run(lib.EXIT_CPUID)
    s = m.seg("gs")
    assert (s.selector, s.base, s.limit, s.ar) == (0x44, 0x440, 0xFFFF, 0xF3)
    assert m.reg("rsp") == 0x1234


@pytest.mark.spec("cpu.vm86")
def test_iret_pushf_popf_cli_in_vm86_need_iopl_3(m: Machine) -> None:
    for code in ("iret", "pushf", "popf", "cli", "sti"):
        start(m, "vm86", code)
        m.set(rflags=VM | 2)
        m.run(lib.EXIT_HLT)
        assert (m.vector(), m.frame(2)) == (GP, [0, 0]), code
    start(m, "vm86", "iret")
    for k, v in enumerate((0x40, CODE >> 4, 0x8D7 | IF)):
        m.write(STACK + 2 * k, v, 2)
    m.asm("cpuid", CODE + 0x40)
    m.run(lib.EXIT_CPUID)
    assert m.guest.rflags == VM | 0x3000 | 0x8D7 | IF, "IOPL stays"


# ---- task switches

TASK, TASK_SELECTOR, GATE_SELECTOR = 0x7000, 0x70, 0x78


def task(m: Machine, eip: int, cs: int = CODE32, ss: int = DATA32, flags: int = 2, **more: int) -> None:
    """A TSS at TASK that runs with eax = 1 ... edi = 8 on a stack at 0x6800."""
    m.load(TASK, bytes(0x68))
    regs = [1, 2, 3, 4, 0x6800, 6, 7, 8]
    for k, v in enumerate([more.get("cr3", 0), eip, flags, *regs, DATA32, cs, ss, DATA32, 0, USER_DATA]):
        m.write(TASK + 28 + 4 * k, v, 4)
    m.write(TASK + 96, more.get("ldt", 0), 4)
    m.write(TASK + 100, more.get("trap", 0), 2)
    m.set_gdt(TASK_SELECTOR, descriptor(TASK, 0x67, more.get("ar", 0x89)))
    m.set_gdt(GATE_SELECTOR, int.from_bytes(gate(TASK_SELECTOR, 0, 0x85)[:8], "little"))


@pytest.mark.spec("cpu.task_switch")
def test_task_call_and_iret(m: Machine) -> None:
    start(m, "prot32", f"mov ebx, 0x55; call {TASK_SELECTOR}:0; back: hlt")
    task(m, CODE + 0x100)
    m.set(rflags=0x8D7 | IF)
    m.asm("hlt; iretd", CODE + 0x100, 32)
    m.run(lib.EXIT_HLT)
    assert [m.reg(r) for r in ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi")] == [
        1, 2, 3, 4, 0x6800, 6, 7, 8,
    ]  # fmt: skip
    assert m.guest.rflags == NT | 2
    assert m.selectors()["tr"] == TASK_SELECTOR
    assert m.selectors()["gs"] == USER_DATA
    assert m.seg("fs").ar & UNUSABLE
    assert m.guest.cr0 & lib.X86_CR0_TS
    assert m.read(TASK, 2) == TSS_SELECTOR, "back link"
    assert (gdt_byte(m, TASK_SELECTOR), gdt_byte(m, TSS_SELECTOR)) == (0x8B, 0x8B)
    assert [m.read(TSS + o, 4) for o in (32, 36, 52, 56)] == [
        m.symbols["back"], 0x8D7 | IF, 0x55, STACK,
    ]  # fmt: skip
    m.run(lib.EXIT_HLT)
    assert (m.guest.rip, m.reg("rbx"), m.reg("rsp")) == (m.symbols["back"] + 1, 0x55, STACK)
    assert m.guest.rflags == 0x8D7 | IF
    assert m.selectors()["tr"] == TSS_SELECTOR
    assert (gdt_byte(m, TASK_SELECTOR), gdt_byte(m, TSS_SELECTOR)) == (0x89, 0x8B)
    assert m.read(TASK + 36, 4) == 2, "NT is clear in what IRET saves"
    assert m.read(TASK + 32, 4) == CODE + 0x102


@pytest.mark.spec("cpu.task_switch")
@pytest.mark.parametrize("selector", [TASK_SELECTOR, GATE_SELECTOR])
def test_task_jump(m: Machine, selector: int) -> None:
    start(m, "prot32", f"jmp {selector}:0x1234")
    task(m, CODE + 0x100, flags=0x8D7)
    m.asm("hlt", CODE + 0x100)
    m.run(lib.EXIT_HLT)
    assert m.guest.rflags == 0x8D7
    assert m.read(TASK, 2) == 0
    assert (gdt_byte(m, TASK_SELECTOR), gdt_byte(m, TSS_SELECTOR)) == (0x8B, 0x89)


@pytest.mark.spec("cpu.task_switch")
def test_task_gate_in_the_idt_pushes_the_error_code(m: Machine) -> None:
    start(m, "prot32", "mov eax, 0x1234; bad: mov ds, eax")
    task(m, CODE + 0x100)
    m.set_gate(GP, gate(TASK_SELECTOR, 0, 0x85))
    m.asm("hlt", CODE + 0x100)
    m.run(lib.EXIT_HLT)
    assert (m.guest.rip, m.reg("rsp"), m.read(0x67FC, 4)) == (CODE + 0x101, 0x67FC, 0x1234)
    assert m.read(TSS + 32, 4) == m.symbols["bad"]
    assert m.guest.rflags & NT
    start(m, "prot32", "int 0x40; behind: hlt")
    task(m, CODE + 0x100)
    m.set_gate(0x40, gate(TASK_SELECTOR, 0, 0x85))
    m.run(lib.EXIT_HLT)
    assert (m.read(TSS + 32, 4), m.reg("rsp")) == (m.symbols["behind"], 0x6800)


@pytest.mark.spec("cpu.task_switch")
@pytest.mark.tcg_differs("nothing, but its page tables do not map the loader")
def test_task_switch_to_user_with_ldt_and_paging(m: Machine) -> None:
    start(m, "prot32", f"jmp {TASK_SELECTOR}:0")
    directory = 0x100000
    for base in (directory, directory + 0x1000):
        m.write(base, 0xE7, 4)  # 4 MiB page
    m.set(cr0=0x80000011, cr3=directory, cr4=lib.X86_CR4_PSE)
    m.set_gdt(LDT_SELECTOR, descriptor(LDT, 0xF, 0x82))
    m.write(LDT + 8, descriptor(0, 0xFFFFF, 0xC0FA))
    task(m, CODE + 0x100, cs=0x0F, ss=USER_DATA | 3, ldt=LDT_SELECTOR, cr3=directory + 0x1000)
    m.write(TASK + 72, USER_DATA | 3, 4)
    m.write(TASK + 84, USER_DATA | 3, 4)
    m.asm("cpuid", CODE + 0x100)
    m.run(lib.EXIT_CPUID)
    assert (m.selectors()["cs"], m.cpl, m.guest.cr3) == (0x0F, 3, directory + 0x1000)
    assert (m.seg("ldtr").base, m.seg("ldtr").limit) == (LDT, 0xF)


@pytest.mark.spec("cpu.task_switch")
@pytest.mark.tcg_differs("T of the TSS is not looked at: SDM vol. 3 17.3.1.5")
def test_task_trap_flag_is_a_debug_exception_in_the_new_task(m: Machine) -> None:
    start(m, "prot32", f"jmp {TASK_SELECTOR}:0")
    task(m, CODE + 0x100, trap=1)
    m.set(dr7=0x4FF)
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(1)) == (DB, [CODE + 0x100])
    assert m.guest.dr6 & lib.DR6_BT
    assert m.guest.dr7 == 0x4AA, "local breakpoints are off"


@pytest.mark.spec("cpu.task_switch")
@pytest.mark.tcg_differs("EAX keeps its upper half: undefined, KVM's emulate.c clears all")
def test_16_bit_tss(m: Machine) -> None:
    start(m, "prot32", f"mov eax, 0x12345678; call {TASK_SELECTOR}:0; back: hlt")
    m.load(TASK, bytes(0x2C))
    words = [0x100, 2, 0x11, 0x22, 0x33, 0x44, 0x6800, 0x55, 0x66, 0x77, DATA16, CODE16, DATA16, DATA16, 0]
    for k, v in enumerate(words):
        m.write(TASK + 14 + 2 * k, v, 2)
    m.set_gdt(TASK_SELECTOR, descriptor(TASK, 0x2B, 0x81))
    m.set_gdt(CODE16, descriptor(CODE, 0xFFFF, 0x9B))
    m.asm("hlt; iret", CODE + 0x100, 16)
    m.run(lib.EXIT_HLT)
    assert (m.reg("rax") & 0xFFFF, m.reg("rdi") & 0xFFFF, m.guest.rip) == (0x11, 0x77, 0x101)
    m.run(lib.EXIT_HLT)
    assert (m.reg("rax"), m.guest.rip) == (0x12345678, m.symbols["back"] + 1)
    assert m.read(TASK + 14, 2) == 0x102


@pytest.mark.spec("cpu.task_switch")
def test_16_bit_task_gets_an_error_code_of_16_bits(m: Machine) -> None:
    start(m, "prot32", "mov eax, 0x1234; bad: mov ds, eax")
    m.load(TASK, bytes(0x2C))
    words = [0x100, 2, 0, 0, 0, 0, 0x6800, 0, 0, 0, DATA16, CODE16, DATA16, DATA16, 0]
    for k, v in enumerate(words):
        m.write(TASK + 14 + 2 * k, v, 2)
    m.set_gdt(TASK_SELECTOR, descriptor(TASK, 0x2B, 0x81))
    m.set_gdt(CODE16, descriptor(CODE, 0xFFFF, 0x9B))
    m.set_gate(GP, gate(TASK_SELECTOR, 0, 0x85))
    m.write(0x67F8, 0xCCCCCCCC_CCCCCCCC)
    m.asm("hlt", CODE + 0x100, 16)
    m.run(lib.EXIT_HLT)
    assert (m.guest.rip, m.reg("rsp"), m.read(0x67F8)) == (0x101, 0x67FE, 0x1234_CCCCCCCC_CCCC)


@pytest.mark.spec("cpu.task_switch")
@pytest.mark.parametrize(
    ("change", "vector", "error"),
    [
        ({"ar": 0x8B}, GP, TASK_SELECTOR),
        ({"ar": 0x09}, NP, TASK_SELECTOR),
        ({"limit": 0x66}, TS, TASK_SELECTOR),
    ],
)
def test_task_switch_refused_in_the_old_task(
    m: Machine, change: dict[str, int], vector: int, error: int
) -> None:
    start(m, "prot32", f"bad: call {TASK_SELECTOR}:0")
    task(m, CODE + 0x100)
    m.set_gdt(TASK_SELECTOR, descriptor(TASK, change.get("limit", 0x67), change.get("ar", 0x89)))
    faults(m, vector, error)
    assert m.selectors()["tr"] == TSS_SELECTOR


@pytest.mark.spec("cpu.task_switch")
@pytest.mark.parametrize(
    ("change", "vector", "error"),
    [
        ({"cs": DATA32}, TS, DATA32),
        ({"cs": 0}, TS, 0),
        ({"cs": USER_CODE32}, TS, USER_CODE32),
        ({"cs": FREE_SELECTOR}, NP, FREE_SELECTOR),
        ({"ldt": DATA32}, TS, DATA32),
        ({"ldt": 0x0C}, TS, 0x0C),
    ],
)
def test_task_switch_fault_in_the_new_task(
    m: Machine, change: dict[str, int], vector: int, error: int
) -> None:
    start(m, "prot32", f"call {TASK_SELECTOR}:0")
    m.set_gdt(FREE_SELECTOR, descriptor(0, 0xFFFFF, 0xC01B))
    task(m, CODE + 0x100, **change)
    m.ctl.exception_bitmap = 1 << vector
    m.run(lib.EXIT_EXCEPTION)
    assert (m.exit.intr_info & 0xFF, m.exit.error_code) == (vector, error)
    assert (m.guest.rip, m.selectors()["tr"], m.reg("rax")) == (CODE + 0x100, TASK_SELECTOR, 1)
    assert gdt_byte(m, TASK_SELECTOR) == 0x8B


@pytest.mark.spec("cpu.task_switch")
@pytest.mark.parametrize("page", [TASK, TSS, GDT, LDT])
def test_exit_in_a_task_switch_undoes_it(m: Machine, page: int) -> None:
    start(m, "prot32", f"call {TASK_SELECTOR}:0; hlt")
    task(m, CODE + 0x100, ldt=LDT_SELECTOR)
    m.set_gdt(LDT_SELECTOR, descriptor(LDT, 0xF, 0x82))
    m.write(LDT + 8, descriptor(0, 0xFFFFF, 0xC093))
    m.write(TASK + 84, 0x0C, 4)
    m.asm("hlt", CODE + 0x100)
    m.set(rflags=0x8D7)
    m.unmap(page)
    m.run(lib.EXIT_EPT_VIOLATION)
    assert m.exit.gpa & ~0xFFF == page
    assert (m.guest.rip, m.reg("rsp"), m.guest.rflags) == (CODE, STACK, 0x8D7)
    assert (m.selectors()["tr"], gdt_byte(m, TASK_SELECTOR)) == (TSS_SELECTOR, 0x89)
    m.map(page)
    m.run(lib.EXIT_HLT)
    assert (m.guest.rip, m.selectors()["tr"]) == (CODE + 0x101, TASK_SELECTOR)
    assert (m.seg("ds").limit, m.read(TSS + 36, 4)) == (0xFFFFFFFF, 0x8D7)


@pytest.mark.spec("cpu.task_switch")
@pytest.mark.parametrize(
    ("field", "selector", "ar", "vector", "error"),
    [
        (80, 0, 0, TS, 0),  # SS
        (80, CODE32, 0, TS, CODE32),
        (80, DATA32 | 3, 0, TS, DATA32),
        (80, USER_DATA, 0, TS, USER_DATA),
        (80, 0x1230, 0, TS, 0x1230),
        (80, FREE_SELECTOR, 0xC013, SS, FREE_SELECTOR),
        (84, FREE_SELECTOR, 0xC013, NP, FREE_SELECTOR),  # DS
        (84, FREE_SELECTOR, 0xC099, TS, FREE_SELECTOR),
        (84, FREE_SELECTOR | 3, 0xC093, TS, FREE_SELECTOR),
        (72, TSS_SELECTOR, 0, TS, TSS_SELECTOR),  # ES
        (92, 0x0C, 0, TS, 0x0C),  # GS
    ],
)
def test_bad_segments_of_the_new_task(
    m: Machine, field: int, selector: int, ar: int, vector: int, error: int
) -> None:
    """SDM vol. 3 table 7-1: found in the new task, whose first instruction has not run."""
    start(m, "prot32", f"call {TASK_SELECTOR}:0")
    task(m, CODE + 0x100)
    m.write(TASK + field, selector, 4)
    m.set_gdt(FREE_SELECTOR, descriptor(0, 0xFFFFF, ar))
    m.ctl.exception_bitmap = 1 << vector
    m.run(lib.EXIT_EXCEPTION)
    assert (m.exit.intr_info & 0xFF, m.exit.error_code) == (vector, error)
    assert (m.guest.rip, m.selectors()["tr"]) == (CODE + 0x100, TASK_SELECTOR)
    assert m.selectors()["ss"] == (selector if field == 80 else DATA32)


@pytest.mark.spec("cpu.task_switch")
@pytest.mark.parametrize(
    ("link", "ar", "error"),
    [
        (TASK_SELECTOR, 0x89, TASK_SELECTOR),
        (0, 0, 0),
        (DATA32, 0, DATA32),
        (TASK_SELECTOR | 4, 0x8B, TASK_SELECTOR | 4),
    ],
)
def test_iret_to_a_task_that_is_not_busy(m: Machine, link: int, ar: int, error: int) -> None:
    start(m, "prot32", "bad: iretd")
    task(m, CODE + 0x100, ar=ar)
    m.write(TSS, link, 2)
    m.set(rflags=NT | 2)
    faults(m, TS, error)
    assert m.selectors()["tr"] == TSS_SELECTOR


@pytest.mark.spec("cpu.task_switch")
def test_task_gates_have_their_own_privilege(m: Machine) -> None:
    """The DPL of the gate counts, not that of the TSS: SDM vol. 3 7.2.5."""
    start(m, "prot32", f"bad: call {TASK_SELECTOR}:0", cpl=3)
    task(m, CODE + 0x100)
    faults(m, GP, TASK_SELECTOR)
    start(m, "prot32", f"call {GATE_SELECTOR}:0", cpl=3)
    task(m, CODE + 0x100)
    m.set_gdt(GATE_SELECTOR, int.from_bytes(gate(TASK_SELECTOR, 0, 0xE5)[:8], "little"))
    m.asm("hlt", CODE + 0x100)
    m.run(lib.EXIT_HLT)
    assert (m.guest.rip, m.cpl) == (CODE + 0x101, 0)
    assert m.read(TSS + 76, 4) == USER_CODE32 | 3


@pytest.mark.spec("cpu.task_switch", "cpu.double_fault")
@pytest.mark.tcg_differs("no limit of the stack: SDM vol. 3 5.3")
def test_double_fault_through_a_task_gate(m: Machine) -> None:
    """What task gates are for: a stack that is broken does not matter."""
    start(m, "prot32", f"mov eax, {FREE_SELECTOR}; mov ss, eax; mov esp, 2; bad: push eax")
    m.set_gdt(FREE_SELECTOR, descriptor(0, 0xFFF, 0x4093))
    task(m, CODE + 0x100)
    m.set_gate(DF, gate(TASK_SELECTOR, 0, 0x85))
    m.asm("hlt", CODE + 0x100)
    m.run(lib.EXIT_HLT)
    assert (m.guest.rip, m.reg("rsp"), m.read(0x67FC, 4)) == (CODE + 0x101, 0x67FC, 0)
    assert m.read(TSS + 32, 4) == m.symbols["bad"]
    assert m.read(TSS + 56, 4) == 2


@pytest.mark.spec("cpu.task_switch")
def test_jump_out_of_a_nested_task_clears_its_busy_bit_and_keeps_nt(m: Machine) -> None:
    start(m, "prot32", f"call {TASK_SELECTOR}:0; hlt")
    task(m, CODE + 0x100)
    m.asm(f"jmp {TSS_SELECTOR}:0", CODE + 0x100, 32)
    m.set_gate(GP, gate(CODE32, HANDLERS + 16 * GP))
    m.run(lib.EXIT_HLT)
    # the first task is still busy: CALL left it so
    assert (m.vector(), m.frame(2)) == (GP, [TSS_SELECTOR, CODE + 0x100])
    m.set_gdt(TSS_SELECTOR, descriptor(TSS, 0x67, 0x89))
    m.set(rip=CODE + 0x100, rflags=NT | 2)
    m.run(lib.EXIT_HLT)
    assert m.selectors()["tr"] == TSS_SELECTOR
    assert (gdt_byte(m, TASK_SELECTOR), gdt_byte(m, TSS_SELECTOR)) == (0x89, 0x8B)
    assert m.read(TASK + 36, 4) & NT


@pytest.mark.spec("cpu.task_switch", "cpu.page_crossing")
@pytest.mark.tcg_differs("nothing, but its page tables do not map the loader")
def test_tss_that_crosses_a_page(m: Machine) -> None:
    """Both pages are there or nothing happens."""
    far = 0x7FC0
    start(m, "prot32", f"bad: jmp {TASK_SELECTOR}:0")
    task(m, CODE + 0x100)
    m.load(far, m.ram[TASK : TASK + 0x68])
    m.set_gdt(TASK_SELECTOR, descriptor(far, 0x67, 0x89))
    directory = 0x100000
    m.write(directory, 0x101000 | 7, 4)
    for k in range(1024):
        m.write(0x101000 + 4 * k, k << 12 | 0x67, 4)
    m.write(0x101000 + 4 * 8, 0, 4)
    m.write(far + 28, directory, 4)
    m.set(cr3=directory, cr0=0x80000011)
    faults(m, PF, 0)
    assert m.guest.cr2 == 0x8000
    assert (m.selectors()["tr"], gdt_byte(m, TASK_SELECTOR)) == (TSS_SELECTOR, 0x89)


@pytest.mark.spec("cpu.task_switch", "cpu.long_mode")
def test_no_task_switch_in_long_mode(m: Machine) -> None:
    start(m, "long64", "bad: jmp fword ptr [0x500]")
    task(m, CODE)
    m.load(DATA, bytes(4) + TASK_SELECTOR.to_bytes(2, "little"))
    faults(m, GP, TASK_SELECTOR)


# ---- descriptor-table registers


@pytest.mark.spec("cpu.lldt_ltr_lgdt")
def test_lgdt_takes_24_bits_with_a_16_bit_operand(m: Machine) -> None:
    image = bytes.fromhex("3412 78563412")
    start(m, "real", "lgdt [0x500]; sgdt [0x510]; lidtd [0x500]; sidtd [0x520]; hlt")
    m.load(DATA, image)
    m.run(lib.EXIT_HLT)
    assert (m.guest.gdtr.base, m.guest.gdtr.limit) == (0x345678, 0x1234)
    assert (m.guest.idtr.base, m.guest.idtr.limit) == (0x12345678, 0x1234)
    assert m.read(0x510, 6) == 0x345678_1234
    assert m.read(0x520, 6) == 0x12345678_1234


@pytest.mark.spec("cpu.lldt_ltr_lgdt")
@pytest.mark.tcg_differs("24 bits of the base are stored: SDM vol. 2 SGDT has all 32")
@pytest.mark.parametrize("code", ["sgdtw [0x510]", "sgdtd [0x510]", "sidtw [0x510]", "sidtd [0x510]"])
@pytest.mark.parametrize("mode", ["real", "prot32"])
def test_sgdt_stores_32_bits_with_any_operand_size(m: Machine, mode: str, code: str) -> None:
    start(m, mode, f"{code}; cpuid")
    m.guest.gdtr.base = m.guest.idtr.base = 0x89ABCDEF
    m.guest.gdtr.limit = m.guest.idtr.limit = 0x1234
    m.load(0x510, b"\xcc" * 8)
    m.run(lib.EXIT_CPUID)
    assert m.read(0x510) == 0xCCCC_89ABCDEF_1234


@pytest.mark.spec("cpu.lldt_ltr_lgdt")
@pytest.mark.tcg_differs("no check that addresses are canonical: SDM vol. 2 LGDT")
def test_lgdt_in_64_bit_mode(m: Machine) -> None:
    start(m, "long64", "lidt [0x500]; sidt [0x510]; hlt")
    m.load(DATA, bytes.fromhex("3412 f0debc9a78000000"))
    m.run(lib.EXIT_HLT)
    assert (m.guest.idtr.base, m.guest.idtr.limit) == (0x789ABCDEF0, 0x1234)
    assert m.ram[0x510:0x51A] == m.ram[0x500:0x50A]
    start(m, "long64", "bad: lgdt [0x500]")
    m.load(DATA, bytes.fromhex("3412 0000000000800000"))
    faults(m, GP, 0)


@pytest.mark.spec("cpu.lldt_ltr_lgdt")
@pytest.mark.parametrize("mode", ["prot32", "long64"])
def test_ltr_marks_the_tss_busy(m: Machine, mode: str) -> None:
    start(m, mode, f"mov eax, {TASK_SELECTOR}; ltr ax; str ebx; bad: ltr ax")
    m.set_gdt(TASK_SELECTOR, descriptor(TASK, 0x67, 0x89), 0x1234 if mode == "long64" else 0)
    faults(m, GP, TASK_SELECTOR)
    assert m.reg("rbx") == TASK_SELECTOR
    assert gdt_byte(m, TASK_SELECTOR) == 0x8B
    tr = m.seg("tr")
    assert (tr.base, tr.limit, tr.ar) == (TASK | (0x1234_00000000 if mode == "long64" else 0), 0x67, 0x8B)


@pytest.mark.spec("cpu.lldt_ltr_lgdt")
@pytest.mark.tcg_differs("LTR takes a null selector: SDM vol. 2 LTR")
@pytest.mark.parametrize("mode", ["prot32", "long64"])
@pytest.mark.parametrize(
    ("insn", "selector", "ar", "vector", "error"),
    [
        ("ltr", 0, 0x89, GP, 0),
        ("ltr", TASK_SELECTOR, 0x82, GP, TASK_SELECTOR),
        ("ltr", TASK_SELECTOR, 0x09, NP, TASK_SELECTOR),
        ("ltr", TASK_SELECTOR | 4, 0x89, GP, TASK_SELECTOR | 4),
        ("ltr", 0xFF8, 0x89, GP, 0xFF8),
        ("lldt", TASK_SELECTOR, 0x89, GP, TASK_SELECTOR),
        ("lldt", TASK_SELECTOR, 0x02, NP, TASK_SELECTOR),
        ("lldt", 4, 0x82, GP, 4),
    ],
)
def test_ltr_and_lldt_checks(
    m: Machine, mode: str, insn: str, selector: int, ar: int, vector: int, error: int
) -> None:
    start(m, mode, f"mov eax, {selector}; bad: {insn} ax")
    m.set_gdt(TASK_SELECTOR, descriptor(TASK, 0x67, ar))
    faults(m, vector, error)


@pytest.mark.spec("cpu.lldt_ltr_lgdt")
@pytest.mark.tcg_differs("no check that addresses are canonical: as KVM and AMD's APM vol. 2 4.8.3 do")
def test_system_descriptor_in_long_mode_has_16_bytes(m: Machine) -> None:
    start(m, "long64", f"mov eax, {TASK_SELECTOR}; bad: ltr ax")
    m.set_gdt(TASK_SELECTOR, descriptor(TASK, 0x67, 0x89), 1 << 40)
    faults(m, GP, TASK_SELECTOR)
    start(m, "long64", f"mov eax, {TASK_SELECTOR}; bad: lldt ax")
    m.set_gdt(TASK_SELECTOR, descriptor(LDT, 0x67, 0x82), 0x8000)
    faults(m, GP, TASK_SELECTOR)
    start(m, "long64", "xor eax, eax; lldt ax; sldt ecx; hlt")
    m.run(lib.EXIT_HLT)
    assert m.seg("ldtr").ar & UNUSABLE


@pytest.mark.spec("cpu.umip")
@pytest.mark.parametrize("code", ["sgdt [0x500]", "sidt [0x500]", "sldt eax", "str eax", "smsw eax"])
def test_umip(m: Machine, code: str) -> None:
    start(m, "long64", f"bad: {code}; cpuid", cpl=3)
    m.run(lib.EXIT_CPUID)
    start(m, "long64", f"bad: {code}; cpuid", cpl=3)
    m.set(cr4=m.guest.cr4 | lib.X86_CR4_UMIP)
    faults(m, GP, 0)
    start(m, "long64", f"bad: {code}; cpuid")
    m.set(cr4=m.guest.cr4 | lib.X86_CR4_UMIP)
    m.run(lib.EXIT_CPUID)


PRIVILEGED = [
    "lgdt [0x500]", "lidt [0x500]", "lldt ax", "ltr ax", "lmsw ax", "clts", "hlt", "invlpg [0]", "mov {a}, cr0",
    "mov cr0, {a}", "mov {a}, dr7", "mov dr7, {a}", "rdmsr", "wrmsr", "invd", "wbinvd", "cli", "sti", "rdpmc",
    "invpcid {a}, [0]", ".byte 0x0f, 0x35",
]  # fmt: skip
PRIVILEGED_64 = ["mov rax, cr8", "mov cr8, rax", "swapgs", "sysretq", "sysexitq"]


@pytest.mark.spec("cpu.cpl_rules")
@pytest.mark.tcg_differs("there is no INVPCID")
@pytest.mark.parametrize(
    ("mode", "code"),
    [
        *(("prot32", c.format(a="eax")) for c in PRIVILEGED),
        *(("long64", c.format(a="rax")) for c in PRIVILEGED + PRIVILEGED_64),
    ],
)
def test_privileged_instructions(m: Machine, mode: str, code: str) -> None:
    start(m, mode, f"bad: {code}; cpuid", cpl=3)
    faults(m, GP, 0)


# ---- LAR, LSL, VERR, VERW, ARPL

ALL_ONES = 0xFFFFFFFF
QUERIES = [
    # selector, cpl -> LAR, LSL (None: ZF = 0), VERR, VERW
    (CODE32, 0, 0xCF9B00, 0xFFFFFFFF, True, False),
    (CODE32, 3, None, None, False, False),
    (DATA32, 0, 0xCF9300, 0xFFFFFFFF, True, True),
    (DATA32 | 3, 0, None, None, False, False),
    (USER_DATA, 3, 0xCFF300, 0xFFFFFFFF, True, True),
    (0, 0, None, None, False, False),
    (3, 0, None, None, False, False),
    (0x1230, 0, None, None, False, False),
    (TSS_SELECTOR, 0, 0x008B00, 0x67, False, False),
    (FREE_SELECTOR, 0, 0x008C00, None, False, False),
    (GATE_SELECTOR, 0, 0x008E00, None, False, False),
]


@pytest.mark.spec("cpu.seg_load")
@pytest.mark.tcg_differs("LAR masks bits 16 to 19: SDM vol. 2 LAR has them undefined")
@pytest.mark.parametrize("mode", ["prot32", "long64"])
@pytest.mark.parametrize(("selector", "cpl", "lar", "lsl", "verr", "verw"), QUERIES)
def test_queries(
    m: Machine, mode: str, selector: int, cpl: int, lar: int | None, lsl: int | None, verr: bool, verw: bool
) -> None:
    source = f"mov ebx, {selector}; mov edx, -1; mov ecx, edx; lar edx, ebx; setz [0x500];"
    source += "lsl ecx, ebx; setz [0x501]; verr bx; setz [0x502]; verw bx; setz [0x503]; cpuid"
    start(m, mode, source, cpl)
    m.set_gdt(FREE_SELECTOR, descriptor(0, 0, 0x8C))
    m.set_gdt(GATE_SELECTOR, descriptor(0, 0, 0x8E))
    m.run(lib.EXIT_CPUID)
    if selector == GATE_SELECTOR:
        lar = None  # no type LAR knows
    assert list(m.ram[DATA : DATA + 4]) == [lar is not None, lsl is not None, verr, verw]
    assert m.reg("rdx") == (ALL_ONES if lar is None else lar)
    assert m.reg("rcx") == (ALL_ONES if lsl is None else lsl)


@pytest.mark.spec("cpu.seg_load")
def test_queries_are_undefined_outside_protected_mode(m: Machine) -> None:
    for code in ("lar ax, bx", "lsl ax, bx", "verr ax", "verw ax", "sldt ax", "str ax", "lldt ax", "ltr ax"):
        start(m, "real", f"bad: {code}")
        m.run(lib.EXIT_HLT)
        assert m.vector() == UD, code


@pytest.mark.spec("cpu.seg_load")
def test_arpl(m: Machine) -> None:
    start(m, "prot32", "mov eax, 0x11; mov ebx, 0x22; arpl ax, bx; setz cl; arpl [0x500], bx; setz ch; hlt")
    m.write(DATA, 0x7777, 2)
    m.run(lib.EXIT_HLT)
    assert (m.reg("rax"), m.reg("rcx"), m.read(DATA, 2)) == (0x12, 1, 0x7777)


# ---- system calls

STAR = CODE64 << 32 | (USER_CODE32 | 3) << 48  # SYSRET: +0 32-bit, +8 stack, +16 64-bit


@pytest.mark.spec("cpu.syscall")
def test_syscall_and_sysret(m: Machine) -> None:
    start(m, "long64", "syscall; back: cpuid", cpl=3)
    m.set_gdt(FREE_SELECTOR, 0)
    m.set(star=STAR, lstar=CODE + 0x100, sfmask=IF | 0x8D5, rflags=IF | 0x8D7)
    m.asm("hlt; sysretq", CODE + 0x100)
    m.run(lib.EXIT_HLT)
    assert (m.reg("rcx"), m.reg("r11"), m.guest.rflags) == (m.symbols["back"], IF | 0x8D7, 2)
    assert (m.cpl, m.reg("rsp")) == (0, STACK)
    assert (m.selectors()["cs"], m.selectors()["ss"]) == (CODE64, CODE64 + 8)
    cs, ss = m.seg("cs"), m.seg("ss")
    assert (cs.base, cs.limit, cs.ar) == (0, 0xFFFFFFFF, 0xA09B)
    assert (ss.base, ss.limit, ss.ar) == (0, 0xFFFFFFFF, 0xC093)
    m.run(lib.EXIT_CPUID)
    assert (m.guest.rip, m.cpl, m.guest.rflags) == (m.symbols["back"], 3, IF | 0x8D7)
    assert (m.selectors()["cs"], m.seg("cs").ar) == (USER_CODE64 | 3, 0xA0FB)
    assert (m.selectors()["ss"], m.seg("ss").ar) == (USER_DATA | 3, 0xC0F3)


@pytest.mark.spec("cpu.syscall")
@pytest.mark.tcg_differs("VIF and VIP are not loaded: SDM vol. 2 SYSRET")
def test_sysret_to_32_bits_and_its_flags(m: Machine) -> None:
    start(m, "long64", ".byte 0x0f, 0x07")
    m.asm("cpuid", CODE + 0x100)
    m.set(star=STAR, rcx=0xFFFFFFFF_00000000 | CODE + 0x100, r11=0xFFFFFFFF_FFFFFEFF)
    m.run(lib.EXIT_CPUID)
    assert m.guest.rip == CODE + 0x100
    assert (m.selectors()["cs"], m.seg("cs").ar) == (USER_CODE32 | 3, 0xC0FB)
    assert m.guest.rflags == 0x3C7FD7 & ~TF


@pytest.mark.spec("cpu.syscall")
@pytest.mark.tcg_differs("the fault comes at CPL 3, as on AMD: SDM vol. 2 SYSRET")
def test_sysret_to_a_non_canonical_address_faults_at_cpl_0(m: Machine) -> None:
    start(m, "long64", "bad: sysretq")
    m.set(star=STAR, rcx=NON_CANONICAL, r11=2)
    faults(m, GP, 0)
    assert m.frame(3)[2] == CODE64


@pytest.mark.spec("cpu.syscall")
def test_syscall_undefined(m: Machine) -> None:
    start(m, "long64", "bad: syscall", cpl=3)
    m.set(efer=m.guest.efer & ~lib.EFER_SCE)
    faults(m, UD, None)
    start(m, "prot32", "bad: syscall")  # Intel: 64-bit mode only
    faults(m, UD, None)
    start(m, "long64", "bad: sysretq")
    m.set(efer=m.guest.efer & ~lib.EFER_SCE)
    faults(m, UD, None)
    start(m, "long64", "bad: sysretq", cpl=3)
    faults(m, GP, 0)


@pytest.mark.spec("cpu.syscall", "cpu.tf")
@pytest.mark.parametrize("masked", [True, False])
def test_single_step_through_syscall(m: Machine, masked: bool) -> None:
    start(m, "long64", "syscall", cpl=3)
    m.set(star=STAR, lstar=CODE + 0x100, sfmask=TF if masked else 0, rflags=TF | 2)
    m.asm("hlt", CODE + 0x100)
    m.run(lib.EXIT_HLT)
    if masked:
        assert m.guest.rip == CODE + 0x101
    else:
        assert (m.vector(), m.frame(1)) == (DB, [CODE + 0x100])
    assert m.reg("r11") == TF | 2


@pytest.mark.spec("cpu.sysenter")
@pytest.mark.parametrize("mode", ["prot32", "long64"])
def test_sysenter_and_sysexit(m: Machine, mode: str) -> None:
    wide = mode == "long64"
    start(m, mode, "sysenter; back: cpuid", cpl=3)
    m.set(sysenter_cs=CODE64 if wide else CODE32, sysenter_esp=0x7000, sysenter_eip=CODE + 0x100)
    m.set(rflags=IF | 0x3002)
    suffix = "q" if wide else ""
    m.asm(f"hlt; mov edx, offset back; mov ecx, {STACK}; sysexit{suffix}", CODE + 0x100, 64 if wide else 32)
    m.run(lib.EXIT_HLT)
    base = CODE64 if wide else CODE32
    assert (m.cpl, m.reg("rsp"), m.guest.rflags) == (0, 0x7000, 0x3002)
    assert (m.selectors()["cs"], m.selectors()["ss"]) == (base, base + 8)
    assert m.seg("cs").ar == (0xA09B if wide else 0xC09B)
    m.run(lib.EXIT_CPUID)
    assert (m.guest.rip, m.cpl, m.reg("rsp")) == (m.symbols["back"], 3, STACK)
    offset = 32 if wide else 16
    assert (m.selectors()["cs"], m.selectors()["ss"]) == (base + offset | 3, base + offset + 8 | 3)


@pytest.mark.spec("cpu.sysenter")
@pytest.mark.tcg_differs("SYSENTER_CS 3 is not null: SDM vol. 2 SYSENTER")
def test_sysenter_faults(m: Machine) -> None:
    for cs in (0, 3):
        start(m, "prot32", "bad: sysenter", cpl=3)
        m.set(sysenter_cs=cs)
        faults(m, GP, 0)
        start(m, "prot32", "bad: sysexit")
        m.set(sysenter_cs=cs)
        faults(m, GP, 0)
    start(m, "prot32", "bad: sysexit", cpl=3)
    m.set(sysenter_cs=CODE32)
    faults(m, GP, 0)
    start(m, "long64", "bad: sysexitq")
    m.set(sysenter_cs=CODE32, rdx=NON_CANONICAL)
    faults(m, GP, 0)
    start(m, "real", "bad: sysenter")
    m.run(lib.EXIT_HLT)
    assert m.vector() == GP


# ---- FS and GS bases


@pytest.mark.spec("cpu.fsgsbase")
def test_fsgsbase_and_swapgs(m: Machine) -> None:
    base = 0x1234_5678_9000
    start(
        m,
        "long64",
        "wrgsbase rax; swapgs; rdgsbase rbx; swapgs; mov ecx, gs:[0x10]; wrfsbase eax; rdfsbase edx; hlt",
    )
    m.set(cr4=m.guest.cr4 | lib.X86_CR4_FSGSBASE, rax=0x20000, kernel_gs_base=base)
    m.write(0x20010, 0xABCD, 4)
    m.run(lib.EXIT_HLT)
    assert (m.reg("rbx"), m.reg("rcx"), m.reg("rdx")) == (base, 0xABCD, 0x20000)
    assert (m.guest.kernel_gs_base, m.seg("gs").base) == (base, 0x20000)
    assert m.seg("fs").base == 0x20000


@pytest.mark.spec("cpu.fsgsbase")
@pytest.mark.tcg_differs("no check that addresses are canonical: SDM vol. 2 WRFSBASE")
def test_fsgsbase_faults(m: Machine) -> None:
    start(m, "long64", "bad: rdfsbase rax", cpl=3)
    faults(m, UD, None)
    start(m, "long64", "bad: wrgsbase rax", cpl=3)
    m.set(cr4=m.guest.cr4 | lib.X86_CR4_FSGSBASE, rax=NON_CANONICAL)
    faults(m, GP, 0)
    start(m, "long64", "bad: swapgs", cpl=3)
    faults(m, GP, 0)
    start(m, "prot32", "bad: .byte 0xf, 1, 0xf8")
    faults(m, UD, None)
