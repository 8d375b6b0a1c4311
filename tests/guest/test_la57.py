"""Five-level paging: into it, what it makes canonical, and out of it.

Source: SDM vol. 3 4.1.2 (LA57 changes outside IA-32e mode only), 4.5; vol. 1 3.3.7.1.
"""

from __future__ import annotations

import pytest

from pykvm.abi import lib
from tests.guest.bare import CODE, CODE32, CODE64, PML4, Machine

PML5, PD_HIGH, PDPT_HIGH, PML4_HIGH = 0x100000, 0x101000, 0x102000, 0x103000
GP, PF, SS = 13, 14, 12
HIGH = 0x00AA_0000_0000_0000  # canonical with 57 bits only
INDEX = HIGH >> 48 & 511

# From 32-bit code with paging off to 64-bit code; from there back, and into 64-bit code of 4 levels.
SWITCH = f"""
    .code32
    mov eax, cr4; or eax, 0x1020; mov cr4, eax
    mov eax, {PML5}; mov cr3, eax
    mov eax, cr0; or eax, 0x80000000; mov cr0, eax
    jmp {CODE64}:1f
    .code64
1:  movabs rbx, {HIGH + 0x123}
    mov rsi, [rbx]
    mov rdi, [0x500]
    mov [rbx + 8], rdi
    mov rax, cr4
    xor eax, 0x1000
bad: mov cr4, rax
    nop
after:
    push {CODE32}
    push offset 2f
    rex.w retf
    .code32
2:  mov eax, cr0; and eax, 0x7fffffff; mov cr0, eax
    mov eax, cr4; and eax, 0xffffefff; mov cr4, eax
    mov eax, {PML4}; mov cr3, eax
    mov eax, cr0; or eax, 0x80000000; mov cr0, eax
    jmp {CODE64}:3f
    .code64
3:  mov rbp, [0x500]
worse: mov rdx, [rbx]
    hlt
"""


def tables(m: Machine) -> None:
    m.load(PML5, bytes(0x4000))
    m.write(PML5, PML4 | 7)
    m.write(PML5 + 8 * INDEX, PML4_HIGH | 7)
    m.write(PML4_HIGH, PDPT_HIGH | 7)
    m.write(PDPT_HIGH, PD_HIGH | 7)
    m.write(PD_HIGH, 0x200000 | 0x87)
    m.write(0x200123, 0x1122334455667788)
    m.write(0x500, 0xABCD)


@pytest.mark.spec("cpu.la57", "cpu.paging_modes", "mmu.levels")
def test_there_and_back() -> None:
    m = Machine()
    m.long64(0)  # for its tables
    tables(m)
    m.asm(SWITCH, CODE, 32)
    m.set(cr0=0x11, cr3=0, cr4=0, efer=lib.EFER_LME, rip=CODE)
    m.set_seg("cs", CODE32, 0, 0xFFFFFFFF, 0xC09B)
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(2)) == (GP, [0, m.symbols["bad"]]), "not in IA-32e mode"
    assert (m.reg("rsi"), m.reg("rdi"), m.read(0x20012B)) == (0x1122334455667788, 0xABCD, 0xABCD)
    assert m.guest.cr4 & lib.X86_CR4_LA57
    m.set(rip=m.symbols["after"], rsp=0xF000)
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(2)) == (GP, [0, m.symbols["worse"]]), "48 bits again"
    assert m.reg("rbp") == 0xABCD
    assert not m.guest.cr4 & lib.X86_CR4_LA57


@pytest.mark.spec("cpu.la57", "cpu.long_mode")
@pytest.mark.tcg_differs(
    "#GP for all but LGDT and WRFSBASE, behind a JMP, as in test_modes; A is set on the way to a #PF: SDM vol. 3 4.8 allows both"
)
@pytest.mark.parametrize(
    ("source", "vector"),
    [
        ("mov rax, [rbx]", GP),
        ("mov rax, [rbp]", SS),
        ("jmp rbx", GP),
        ("mov rcx, [rdx]", PF),  # canonical, and nobody is there
        ("lgdt [0x510]", GP),
        ("wrfsbase rbx", GP),
        ("swapgs; hlt", -1),
    ],
)
def test_57_bits_are_canonical(source: str, vector: int) -> None:
    m = Machine()
    m.asm(f"bad: {source}; hlt")
    m.long64(CODE)
    tables(m)
    beyond = 1 << 56
    m.load(0x510, b"\xff\xff" + beyond.to_bytes(8, "little"))
    cr4 = m.guest.cr4 | lib.X86_CR4_LA57 | lib.X86_CR4_FSGSBASE
    m.set(cr3=PML5, cr4=cr4, rbx=beyond, rbp=beyond, rdx=HIGH + (1 << 47))
    m.run(lib.EXIT_HLT)
    assert m.vector() == vector
    if vector == PF:
        assert m.guest.cr2 == HIGH + (1 << 47)


@pytest.mark.spec("cpu.la57", "cpu.reserved_bits")
@pytest.mark.parametrize("bits", [lib.PT_PAGE_SIZE_MASK, 1 << 45])
def test_reserved_bits_of_the_fifth_level(bits: int) -> None:
    m = Machine()
    m.asm("bad: mov rax, [rbx]")
    m.long64(CODE)
    tables(m)
    m.write(PML5 + 8 * INDEX, PML4_HIGH | 7 | bits)
    m.set(cr3=PML5, cr4=m.guest.cr4 | lib.X86_CR4_LA57, rbx=HIGH)
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(1)) == (PF, [lib.PFERR_PRESENT_MASK | lib.PFERR_RSVD_MASK])
