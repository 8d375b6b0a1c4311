"""Alignment checks: #AC at CPL 3 with CR0.AM and EFLAGS.AC.

Source: SDM vol. 3 2.5 (AM), 6.15 interrupt 17 and table 6-7; vol. 2 by instruction.
"""

from __future__ import annotations

from typing import Any

import pytest

from pykvm.abi import lib
from tests.guest.bare import CODE, PD, STACK, Machine

AC_VECTOR, PF, GP, SS = 17, 14, 13, 12
AM, AC = 0x40000, 0x40000
DATA = 0x100000


@pytest.fixture
def m() -> Machine:
    return Machine()


def start(m: Machine, source: str, mode: str = "long64", cpl: int = 3, **registers: int) -> None:
    m.asm(f"bad: {source}; done: cpuid", CODE, {"long64": 64, "prot32": 32}[mode])
    getattr(m, mode)(CODE, cpl)
    m.set(cr0=m.guest.cr0 | AM, cr4=m.guest.cr4 | lib.X86_CR4_OSFXSR | lib.X86_CR4_OSXSAVE, rflags=AC | 2)
    m.set(rbx=DATA, rsi=DATA, rdi=DATA, rcx=1)
    m.set(**registers)


def faults(m: Machine, vector: int, error: int = 0) -> None:
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(2)) == (vector, [error, m.symbols["bad"]])


# access, an offset that faults, one that does not
ACCESSES = [
    ("mov ax, [rbx]", 1, 2),
    ("mov eax, [rbx]", 2, 4),
    ("mov rax, [rbx]", 4, 8),
    ("mov [rbx], ax", 1, 2),
    ("mov [rbx], rax", 4, 8),
    ("mov al, [rbx]", None, 1),
    ("add [rbx], eax", 2, 4),
    ("lock add [rbx], eax", 2, 4),
    ("xchg [rbx], ax", 3, 2),
    ("cmpxchg8b [rbx]", 4, 8),
    ("cmp word ptr [rbx], 5", 1, 2),
    ("bt dword ptr [rbx], 5", 2, 4),
    ("movzx eax, word ptr [rbx]", 1, 2),
    ("push qword ptr [rbx]", 4, 8),
    ("pop qword ptr [rbx]", 4, 8),
    ("fld dword ptr [rbx]", 2, 4),
    ("fld qword ptr [rbx]", 4, 8),
    ("fld tbyte ptr [rbx]", 4, 8),
    ("fnstcw [rbx]", 1, 2),
    ("fnstenv [rbx]", 2, 4),
    ("fnsave [rbx]", 2, 4),
    ("movss xmm0, [rbx]", 2, 4),
    ("movsd xmm0, [rbx]", 4, 8),
    ("movq mm0, [rbx]", 4, 8),
    ("movnti [rbx], eax", 2, 4),
    ("ldmxcsr [rbx]", 2, 4),
    ("movbe eax, [rbx]", 2, 4),
    ("lar eax, [rbx]", 1, 2),
    ("mov [rbx], ds", 1, 2),
    ("jmp qword ptr [rbx]", 4, None),
    ("lea rax, [rbx]", None, 1),
    ("clflush [rbx]", None, 1),
    ("prefetcht0 [rbx]", None, 1),
    ("movdqu xmm0, [rbx]", None, 1),  # "may or may not": not here
    ("sidt [rbx]", 4, 2),  # a word and what is behind it: SDM vol. 3 3.5.1
]


@pytest.mark.spec("cpu.ac_align")
@pytest.mark.tcg_differs("alignment is not checked: SDM vol. 3 6.15")
@pytest.mark.parametrize(("access", "wrong", "right"), ACCESSES, ids=[a[0] for a in ACCESSES])
def test_accesses(m: Machine, access: str, wrong: int | None, right: int | None) -> None:
    if wrong is not None:
        start(m, access, rbx=DATA + wrong)
        faults(m, AC_VECTOR)
        assert m.ram[DATA : DATA + 128] == bytes(128)
    if right is not None:
        start(m, f"fldz; nop; {access}" if "fnst" in access else access, rbx=DATA + right)
        m.run(lib.EXIT_CPUID)
    # aligned or not: the other three conditions
    for change in ({"rflags": 2}, {"cr0": m.guest.cr0 & ~AM}):
        start(m, access, rbx=DATA + (wrong or 1), **change)
        if "jmp" not in access:
            m.run(lib.EXIT_CPUID)
    start(m, access, cpl=0, rbx=DATA + (wrong or 1))
    if "jmp" not in access:
        m.run(lib.EXIT_CPUID)


@pytest.mark.spec("cpu.ac_align")
@pytest.mark.tcg_differs("alignment is not checked: SDM vol. 3 6.15")
@pytest.mark.parametrize(
    "source",
    [
        "push rax",
        "pop rax",
        "call done",
        "ret",
        "leave",
        "enter 8, 0",
        "pushfq",
        "push 1",
        "rex.w retf",
        "iretq",
    ],
)
def test_stack(m: Machine, source: str) -> None:
    start(m, source, rsp=STACK - 4, rbp=STACK - 4)
    faults(m, AC_VECTOR)
    assert m.ram[STACK - 64 : STACK] == bytes(64)


@pytest.mark.spec("cpu.ac_align", "cpu.string_rep")
@pytest.mark.tcg_differs("alignment is not checked: SDM vol. 3 6.15")
@pytest.mark.parametrize(
    ("source", "register"),
    [
        ("rep movsd", "rsi"), ("rep movsd", "rdi"), ("rep stosw", "rdi"), ("lodsq", "rsi"),
        ("repe cmpsw", "rsi"), ("repne scasd", "rdi"),
    ],
)  # fmt: skip
def test_strings(m: Machine, source: str, register: str) -> None:
    registers: dict[str, Any] = {register: DATA + 1, "rcx": 5}
    start(m, source, **registers)
    faults(m, AC_VECTOR)
    assert (m.reg("rcx"), m.reg(register)) == (5, DATA + 1)
    start(m, source, rcx=5)
    m.run(lib.EXIT_CPUID)


@pytest.mark.spec("cpu.ac_align")
@pytest.mark.tcg_differs("alignment is not checked: SDM vol. 3 6.15")
def test_far_pointers_and_16_bit_slots(m: Machine) -> None:
    """A 48-bit pointer is a doubleword and a word; a 16-bit x87 environment is words."""
    start(m, "les eax, [ebx]", "prot32", rbx=DATA + 2)
    faults(m, AC_VECTOR)
    start(m, "les eax, [ebx]", "prot32", rbx=DATA + 4)
    m.run(lib.EXIT_CPUID)
    start(m, "bound ax, [ebx]", "prot32", rbx=DATA + 1)
    faults(m, AC_VECTOR)
    start(m, ".byte 0x66; fnstenv [ebx]", "prot32", rbx=DATA + 2)
    m.run(lib.EXIT_CPUID)
    start(m, ".byte 0x66; fnstenv [ebx]", "prot32", rbx=DATA + 1)
    faults(m, AC_VECTOR)
    start(m, "pusha", "prot32", rsp=STACK - 2)
    faults(m, AC_VECTOR)


@pytest.mark.spec("cpu.ac_align")
def test_what_comes_first(m: Machine) -> None:
    """Page faults before, table 6-2; limits and canonical addresses before both."""
    start(m, "mov eax, [rbx]", rbx=0x1FFFFE)
    m.write(PD + 8, 0)
    faults(m, PF, lib.PFERR_USER_MASK)
    assert m.guest.cr2 == 0x200000
    start(m, "mov eax, [rbx]", rbx=0x8000_0000_0001)
    faults(m, GP)
    start(m, "movaps xmm0, [rbx]", rbx=DATA + 8)
    faults(m, GP)
    start(m, "lock cmpxchg16b [rbx]", rbx=DATA + 8)
    faults(m, GP)


@pytest.mark.spec("cpu.ac_align")
@pytest.mark.tcg_differs("alignment is not checked: SDM vol. 3 6.15")
def test_popf_turns_it_on_and_the_handler_has_none(m: Machine) -> None:
    start(m, "nop; popfq; one: mov eax, [rbx]", rbx=DATA + 1, rflags=2)
    m.write(STACK, AC | 2)
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(4)[:2]) == (AC_VECTOR, [0, m.symbols["one"]])
    assert m.frame(4)[3] & AC
    assert m.guest.rflags & AC, "delivery leaves AC alone; CPL 0 does not care"


@pytest.mark.spec("cpu.ac_align")
@pytest.mark.tcg_differs("alignment is not checked: SDM vol. 3 6.15")
def test_nothing_is_left_behind_for_the_fast_path(m: Machine) -> None:
    """The same page by both kinds of user code, one after the other."""
    start(m, "mov eax, [rbx]; mov [rbx], eax", rbx=DATA + 1, rflags=2)
    m.run(lib.EXIT_CPUID)
    m.set(rip=CODE, rflags=AC | 2)
    faults(m, AC_VECTOR)


@pytest.mark.spec("cpu.ac_align")
def test_mmio_is_not_touched(m: Machine) -> None:
    start(m, "mov eax, [rbx]", rbx=DATA + 2)
    m.map_mmio(DATA)
    faults(m, AC_VECTOR)
