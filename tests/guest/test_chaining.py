"""Blocks that run each other without the loop in between: nothing of that can be seen from outside.

What a fuzzer of single instructions cannot find: the next block is run from inside the handler that
ended the one before.
"""

from __future__ import annotations

import threading

import pytest

from pykvm.abi import lib
from tests.guest.bare import CODE, PDPT, Machine

DATA = 0x100000
SMALL_STACK = 256 << 10


@pytest.mark.spec("cpu.isa_int")
@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("loop", ["loop", "loope", "loopne"])
def test_loop_counts_whatever_stops_a_later_iteration(bits: int, loop: str) -> None:
    m = Machine()
    compare = "cmp edx, 1" if loop == "loopne" else "cmp edx, edx"
    r = "r" if bits == 64 else "e"
    m.asm(
        f"mov ecx, 10; mov ebx, {DATA}; again: mov eax, [{r}bx]; add ebx, 0x1000; {compare}; {loop} again; hlt",
        bits=bits,
    )
    m.unmap(DATA + 0x5000)
    (m.long64 if bits == 64 else m.prot32)(CODE)
    m.run(until=lib.EXIT_EPT_VIOLATION)
    assert m.reg("rcx") == 5
    assert m.reg("rbx") == DATA + 0x5000


@pytest.mark.spec("cpu.isa_int")
def test_loop_to_beyond_the_limit_leaves_the_counter() -> None:
    m = Machine()
    m.asm("mov ecx, 7; jmp at; .org 0x40; at: loop . + 0x40; hlt", bits=32)
    m.prot32(CODE)
    m.set_seg("cs", 8, 0, CODE + 0x60, 0x409B)
    m.run(until=lib.EXIT_HLT)
    assert m.vector() == 13
    assert m.reg("rcx") == 7


@pytest.mark.spec("cpu.isa_int")
@pytest.mark.parametrize(
    "body",
    [
        "nop",
        "fxsave [rbx]",
        "xsave [rbx]",
        "xsavec [rbx]",
        "fldcw [rbx]",
        "fnsave [rbx]",
        "pushfq; popfq",
        "xlatb",
        "rdrand rdx",
        "enter 0, 3; leave",
        "lock xadd [rbx], rdx",
        "loop . + 2",
    ],
)
def test_no_guest_uses_up_the_stack_of_its_thread(body: str) -> None:
    m = Machine()
    m.asm(f"mov r12d, 30000; again: mov ecx, 2; {body}; dec r12d; jnz again; hlt")
    m.long64(CODE)
    m.set(cr4=m.reg("cr4") | lib.X86_CR4_OSXSAVE, xcr0=7, rax=7, rbx=DATA, rbp=DATA + 0x1000)
    reasons: list[int] = []
    before = threading.stack_size(SMALL_STACK)
    try:
        thread = threading.Thread(target=lambda: reasons.append(m.run()))
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    assert reasons == [lib.EXIT_HLT]
    assert m.reg("r12") == 0


@pytest.mark.spec("cpu.tlb_rules")
@pytest.mark.parametrize("flush", ["invlpg [rbx]", "mov rax, cr3; mov cr3, rax"])
def test_a_jump_into_a_page_that_was_an_alias(flush: str) -> None:
    """A and B were one frame when the jump from A to B was linked. Then B is another."""
    m = Machine()
    m.long64(CODE)
    directory, table = 0x8000, 0x7000
    a = 1 << 30
    b = a + 0x1000
    m.write(PDPT + 8, directory | 0x27)
    m.write(directory, table | 0x27)
    m.write(table, DATA | 0x27)
    m.write(table + 8, DATA | 0x27)
    m.asm("jmp . + 0x1100", DATA)
    m.asm("mov edi, 1; jmp r8", DATA + 0x100)
    m.asm("mov edi, 2; jmp r8", DATA + 0x1100)
    m.asm(
        f"""
        mov r12, {a}
        lea r8, [rip + second]
        jmp r12
    second: # the link that the first has made
        lea r8, [rip + change]
        jmp r12
    change:
        mov qword ptr [{table + 8}], {DATA + 0x1000 | 0x27}
        mov rbx, {b}
        {flush}
        lea r8, [rip + third]
        lea r13, [r12 + 0x100] # the old successor is code of this epoch, too
        jmp r13
    third:
        lea r8, [rip + end]
        jmp r12
    end:
        hlt
        """
    )
    m.run(until=lib.EXIT_HLT)
    assert m.reg("rdi") == 2


@pytest.mark.spec("cpu.ud_space")
@pytest.mark.tcg_differs("LOCK before a branch is ignored: SDM vol. 2 LOCK")
@pytest.mark.parametrize("compare", ["cmp eax, eax", "test rcx, rcx", "sub cl, cl", "cmp dword ptr [rbx], 1"])
def test_lock_before_a_branch_that_would_be_fused(compare: str) -> None:
    m = Machine()
    m.asm(f"{compare}; at: .byte 0xf0; je 1f; nop; 1: hlt")
    m.long64(CODE)
    m.set(rbx=DATA)
    m.run(until=lib.EXIT_HLT)
    assert m.vector() == 6
    assert m.frame(1) == [m.symbols["at"]]


@pytest.mark.spec("cpu.smc", "cpu.seg_load")
def test_code_that_a_limit_cuts_off_and_that_writes_itself() -> None:
    m = Machine()
    m.asm("mov byte ptr [next + 1], 7; jmp 1f; 1: nop; next: mov al, 1; inc edx; cut: nop; nop; hlt", bits=32)
    code = bytes(m.ram[CODE : CODE + 0x40])
    for limit in (0xFFFFFFFF, m.symbols["cut"], m.symbols["cut"] - 1, m.symbols["next"], 0xFFFFFFFF):
        for _ in range(2):
            m.prot32(CODE)
            m.load(CODE, code)
            m.set_seg("cs", 8, 0, limit, 0xC09B if limit == 0xFFFFFFFF else 0x409B)
            m.run(until=lib.EXIT_HLT)
            assert m.vector() == (-1 if limit == 0xFFFFFFFF else 13)
            assert m.reg("rax") & 0xFF == (0 if limit == m.symbols["next"] else 7)
            if limit != 0xFFFFFFFF:
                expected = m.symbols["next"] if limit == m.symbols["next"] else limit + 1
                assert m.frame(2)[1] == expected  # behind the error code
