"""The modes of the processor, and the ways from one to another.

Source: SDM vol. 3 9.1.4 (first instruction), 9.8 (mode initialisation), 9.9 (switching), 20.1 (real mode),
5.3 (limits), 3.3 and 3.4 (64-bit mode); x86-cpu.md section 1.
"""

from __future__ import annotations

import pytest

from pykvm.abi import lib
from tests.guest.bare import (
    ALL_ONES,
    CODE,
    CODE16,
    CODE32,
    CODE64,
    DATA16,
    DATA32,
    FREE_SELECTOR,
    GDT,
    HANDLERS,
    PML4,
    STACK,
    USER_DATA,
    Machine,
    descriptor,
    gate,
)

UD, SS, GP, PF = 6, 12, 13, 14
DATA = 0x500
NON_CANONICAL = 0x8000_0000_1000
ROM = 0xFFFF0000


@pytest.fixture
def m() -> Machine:
    return Machine()


def table(base: int, limit: int) -> bytes:
    return limit.to_bytes(2, "little") + base.to_bytes(4, "little")


# ---- reset


def reset_into_rom(m: Machine, source: str) -> None:
    """RESET with a ROM below 4 GiB, as it is on a PC; `source` is at the reset vector."""
    m.ram[0x3F0000:0x400000] = b"\xf4" * 0x10000
    m.asm(source, 0x3F0000 + 0xFFF0, 16)
    for at in range(0, 0x10000, 0x1000):
        m.map(ROM + at, target=0x3F0000 + at)
    lib.cpu_reset(m.cpu, 0)


@pytest.mark.spec("cpu.reset_vector")
def test_first_instruction_is_at_fffffff0(m: Machine) -> None:
    reset_into_rom(m, "hlt")
    m.unmap(0xFF000)
    m.run(lib.EXIT_HLT)
    assert m.guest.rip == 0xFFF1
    cs = m.seg("cs")
    assert (cs.selector, cs.base, cs.limit) == (0xF000, ROM, 0xFFFF)


@pytest.mark.spec("cpu.reset_vector", "cpu.real_mode")
def test_near_jump_stays_in_the_rom_and_far_jump_leaves_it(m: Machine) -> None:
    reset_into_rom(m, "jmp 1f - 0x101; 1:")
    m.asm("mov ax, cs:[0xfff0]; mov bx, [0xfff0]; jmp 0xf000:0xe000", 0x3F0000 + 0xFFF2 - 0x100, 16)
    m.load(0xFE000, b"\xf4")  # below 1 MiB
    m.run(lib.EXIT_HLT)
    assert (m.guest.rip, m.seg("cs").base, m.selectors()["cs"]) == (0xE001, 0xF0000, 0xF000)
    assert m.reg("rax") == m.read(0x3FFFF0, 2) != 0
    assert m.reg("rbx") == 0


@pytest.mark.spec("cpu.reset_vector")
def test_interrupt_saves_f000_and_returns_elsewhere(m: Machine) -> None:
    """The base that no selector describes is lost: the return goes below 1 MiB."""
    reset_into_rom(m, "int 0x20")
    m.write(4 * 0x20, 0x0000_1000, 4)
    m.asm("iret", 0x1000, 16)
    m.set(rsp=STACK)
    m.load(0xFFFF2, b"\xf4")
    m.run(lib.EXIT_HLT)
    assert (m.guest.rip, m.seg("cs").base) == (0xFFF3, 0xF0000)


# ---- real mode that is not quite that


@pytest.mark.spec("cpu.unreal", "cpu.big_real_transition")
def test_code_stays_32_bit_until_a_descriptor_says_otherwise(m: Machine) -> None:
    """PE cleared in 32-bit code: D and the limits stay, even behind a far jump; selectors mean other things.

    That is why SDM vol. 3 9.9.2 step 2 wants a 16-bit segment of 64 KiB before.
    """
    m.asm(
        f"""
        mov eax, cr0
        and al, 0xfe
        mov cr0, eax
        mov ebx, 0x12345678
        mov ax, 0x8000
        mov ds, ax
        mov [0x123456], ebx
        .byte 0xea
        .long 0x200
        .word {CODE >> 4}
        """,
        CODE,
        32,
    )
    m.asm("mov ecx, 0x44332211; hlt", CODE + 0x200, 32)
    m.prot32(CODE)
    m.run(lib.EXIT_HLT)
    assert m.reg("rbx") == 0x12345678
    assert m.read(0x80000 + 0x123456, 4) == 0x12345678  # DS still reaches 4 GiB
    assert (m.seg("ds").limit, m.seg("cs").base, m.guest.rip) == (ALL_ONES, CODE, 0x206)
    assert m.reg("rcx") == 0x44332211


@pytest.mark.spec("cpu.big_real_transition")
def test_protected_mode_begins_with_the_segments_of_real_mode(m: Machine) -> None:
    """Between MOV CR0 and the far jump CS keeps its base, and SS and DS theirs."""
    m.prot32(0)
    m.asm(
        f"""
        lgdt cs:[gdtr - {CODE}]
        mov ax, 0x2000
        mov ds, ax
        mov eax, cr0
        inc ax
        mov cr0, eax
        mov bx, [0x10]
        push bx
        addr32 mov ecx, [0x14]
        data32 ljmp {CODE32}, {CODE + 0x100}
        gdtr: .word 0xfff
        .long {GDT}
        """.replace("data32 ljmp", ".byte 0x66, 0xea; .long").replace(
            f".long {CODE32}, {CODE + 0x100}", f".long {CODE + 0x100}; .word {CODE32}"
        ),
        CODE,
        16,
    )
    m.asm("mov edx, 0x11223344; hlt", CODE + 0x100, 32)
    m.real(CODE)
    m.write(0x20010, 0x5555_6666_7777_8888)
    m.run(lib.EXIT_HLT)
    assert m.reg("rbx") & 0xFFFF == 0x8888
    assert m.reg("rcx") == 0x55556666
    assert m.reg("rdx") == 0x11223344
    assert m.read(STACK - 2, 2) == 0x8888
    assert m.selectors()["ds"] == 0x2000


# ---- 16-bit protected mode


def prot16(m: Machine, source: str, base: int = CODE) -> None:
    """16-bit segments: code at base, stack of 64 KiB at 0x40000."""
    m.asm(source, base, 16)
    m.prot32(0)
    m.set_gdt(CODE16, descriptor(base, 0xFFFF, 0x9B))
    m.set_gdt(DATA16, descriptor(0x40000, 0xFFFF, 0x93))
    m.set_seg("cs", CODE16, base, 0xFFFF, 0x9B)
    m.set_seg("ss", DATA16, 0x40000, 0xFFFF, 0x93)
    m.set(rip=0)


@pytest.mark.spec("cpu.prot16_32")
def test_16_bit_code_and_stack(m: Machine) -> None:
    prot16(m, "mov ax, 0x1234; push ax; data32 push 0x55667788; pop eax; mov bx, sp; call f; hlt; f: ret")
    m.set(rsp=0xABCD_0010, rax=0)
    m.run(lib.EXIT_HLT)
    assert m.reg("rsp") == 0xABCD_000E
    assert m.reg("rax") == 0x55667788
    assert m.reg("rbx") == 0x000E
    assert m.read(0x4000E, 2) == 0x1234


@pytest.mark.spec("cpu.prot16_32")
@pytest.mark.parametrize(("sp", "where"), [(0, 0xFFFE), (2, 0)])
def test_16_bit_stack_pointer_wraps(m: Machine, sp: int, where: int) -> None:
    prot16(m, "push ax; hlt")
    m.set(rsp=0x7_0000 | sp, rax=0xBEEF)
    m.run(lib.EXIT_HLT)
    assert (m.reg("rsp"), m.read(0x40000 + where, 2)) == (0x7_0000 | where, 0xBEEF)


@pytest.mark.spec("cpu.prot16_32")
def test_32_bit_code_on_a_16_bit_stack(m: Machine) -> None:
    m.asm("push eax; call f; hlt; f: enter 8, 0; leave; ret", CODE, 32)
    m.prot32(CODE)
    m.set_gdt(DATA16, descriptor(0x40000, 0xFFFF, 0x93))
    m.set_seg("ss", DATA16, 0x40000, 0xFFFF, 0x93)
    m.set(rsp=0x1234_0002, rax=0xCAFE, rbp=0x9999_9999)
    m.ctl.exception_bitmap = 1 << SS
    m.run(lib.EXIT_EXCEPTION)  # four bytes at fffe leave the segment
    assert (m.guest.rip, m.exit.error_code) == (CODE, 0)
    m.set(rsp=0x1234_0100)
    m.run(lib.EXIT_HLT)
    assert (m.reg("rsp"), m.reg("rbp")) == (0x1234_00FC, 0x9999_9999)
    assert m.read(0x400FC, 4) == 0xCAFE


@pytest.mark.spec("cpu.prot16_32")
@pytest.mark.parametrize(
    ("source", "vector"),
    [
        ("mov ax, [bx]", GP),  # ffff and one more
        ("mov ax, [bp]", SS),
        ("addr32 mov al, [ebx + 1]", GP),
        ("mov al, [bx]", None),
        ("mov al, [bx + 1]", None),  # wraps to 0
    ],
)
def test_16_bit_addresses(m: Machine, source: str, vector: int | None) -> None:
    prot16(m, f"{source}; cpuid")
    m.set_gdt(FREE_SELECTOR, descriptor(0x40000, 0xFFFF, 0x93))
    m.set_seg("ds", FREE_SELECTOR, 0x40000, 0xFFFF, 0x93)
    m.set(rbx=0xFFFF, rbp=0xFFFF)
    m.ctl.exception_bitmap = 1 << GP | 1 << SS
    if vector is None:
        m.run(lib.EXIT_CPUID)
    else:
        m.run(lib.EXIT_EXCEPTION)
        assert m.exit.intr_info & 0xFF == vector


@pytest.mark.spec("cpu.prot16_32", "cpu.idt_delivery")
def test_32_bit_handler_of_16_bit_code(m: Machine) -> None:
    prot16(m, "int 0x40; back: mov cx, 7; hlt")
    m.set(rsp=0x100)
    m.asm("mov eax, [esp]; iretd", HANDLERS + 0x400, 32)
    m.run(lib.EXIT_HLT)
    assert m.reg("rax") == 2
    assert (m.reg("rcx"), m.reg("rsp")) == (7, 0x100)
    assert [m.read(0x400F4 + 4 * k, 4) for k in range(3)] == [2, CODE16, 2]


@pytest.mark.spec("cpu.prot16_32")
def test_expand_down_stack(m: Machine) -> None:
    """Valid from the limit up to 64 KiB: grows down until it meets the limit."""
    prot16(m, "push ax; hlt")
    m.set_gdt(DATA16, descriptor(0x40000, 0xFFD, 0x97))
    m.set_seg("ss", DATA16, 0x40000, 0xFFD, 0x97)
    m.set(rsp=0x1000, rax=0x77)
    m.run(lib.EXIT_HLT)
    assert m.read(0x40FFE, 2) == 0x77
    m.ctl.exception_bitmap = 1 << SS
    m.set(rip=0)
    m.run(lib.EXIT_EXCEPTION)
    assert m.reg("rsp") == 0xFFE


@pytest.mark.spec("cpu.prot16_32")
def test_near_branches_meet_the_limit_of_cs(m: Machine) -> None:
    """#GP(0) at the branch, whose stack is as it was."""
    for branch in ("jmp 1f", "call 1f", "mov ebx, 0x2000; jmp ebx", "push 0x2000; ret"):
        m.asm(f"{branch}; .org 0x1800; 1: hlt", CODE, 32)
        m.prot32(0)
        m.set_gdt(FREE_SELECTOR, descriptor(CODE, 0xFFF, 0x409B))
        m.set_seg("cs", FREE_SELECTOR, CODE, 0xFFF, 0x409B)
        m.ctl.exception_bitmap = 1 << GP
        m.run(lib.EXIT_EXCEPTION)
        assert m.exit.error_code == 0, branch
        assert m.guest.rip < 0x10, branch
        m.ctl.exception_bitmap = 0


# ---- 64-bit and compatibility mode


@pytest.mark.spec("cpu.long_mode")
def test_only_fs_and_gs_have_bases_in_64_bit_mode(m: Machine) -> None:
    m.asm(
        "mov rax, ds:[0x500]; mov rbx, ss:[0x500]; mov rcx, fs:[0x500]; mov rdx, cs:[0x500]; lodsq; hlt", CODE
    )
    m.long64(CODE)
    for name in ("ds", "es", "ss"):
        m.set_seg(name, DATA32, 0x1000, 0xFF, 0x93)  # limits mean nothing either
    m.seg("fs").base = 0x1000
    m.set(rsi=0x1500)
    m.write(DATA, 0x1111)
    m.write(DATA + 0x1000, 0x2222)
    m.run(lib.EXIT_HLT)
    assert [m.reg(r) for r in ("rbx", "rcx", "rdx", "rax")] == [0x1111, 0x2222, 0x1111, 0x2222]


@pytest.mark.spec("cpu.long_mode")
@pytest.mark.parametrize(
    ("source", "vector"),
    [
        ("mov eax, [rbx]", GP),
        ("mov [rbx], eax", GP),
        ("mov eax, [rbp]", SS),
        ("mov eax, [rsp + rbx]", SS),
        ("mov eax, ds:[rbp]", SS),  # the prefix is ignored
        ("mov eax, fs:[rbp]", GP),
        ("mov eax, gs:[rbx]", GP),
        ("mov rax, [rcx]", GP),  # crosses the end of the canonical half
        ("mov rsp, rbx; bad: push rax", SS),
        ("mov rsp, rbx; bad: pop rax", SS),
        ("mov rsp, rbx; bad: call 1f; 1:", SS),
        ("mov rsp, rbx; bad: ret", SS),
        ("mov rsp, rbx; bad: pushfq", SS),
        ("mov rbp, rbx; bad: leave", SS),
        ("mov rdi, rbx; bad: stosb", GP),
        ("mov rsi, rbx; bad: lodsb", GP),
        ("jmp rbx", GP),
        ("call rbx", GP),
        ("push rbx; bad: ret", GP),
        ("xlatb", GP),
        ("lidt [rbx]", GP),
        ("movaps xmm0, [rbp]", SS),
        ("fld dword ptr [rbp]", SS),
    ],
)
@pytest.mark.tcg_differs("#GP for all, and behind a JMP or RET at its target: SDM vol. 1 3.3.7.1, vol. 2 JMP")
def test_non_canonical_addresses(m: Machine, source: str, vector: int) -> None:
    m.asm(source if "bad:" in source else f"bad: {source}", CODE)
    m.long64(CODE)
    m.set_gate(vector, gate(CODE64, HANDLERS + 16 * vector, ist=1))
    m.set(rbx=NON_CANONICAL, rbp=NON_CANONICAL, rcx=0x7FFF_FFFF_FFFC)
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(2)) == (vector, [0, m.symbols["bad"]])


@pytest.mark.spec("cpu.long_mode")
@pytest.mark.tcg_differs("no limits: SDM vol. 3 5.3")
def test_compatibility_mode_is_32_bit_protected_mode_with_long_tables(m: Machine) -> None:
    """Bases, limits and 32-bit registers as there; interrupts and gates as in 64-bit mode."""
    m.asm("mov eax, ds:[0x10]; dec ecx; inc edx; bad: mov bl, ds:[0x1000]", CODE, 32)
    m.long64(CODE)
    m.set_seg("cs", CODE32, 0, ALL_ONES, 0xC09B)
    m.set_gdt(FREE_SELECTOR, descriptor(0x20000, 0xFFF, 0x4093))
    m.set_seg("ds", FREE_SELECTOR, 0x20000, 0xFFF, 0x4093)
    m.set(rcx=0)
    m.write(0x20010, 0x1234, 4)
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(3)) == (GP, [0, m.symbols["bad"], CODE32])
    assert (m.reg("rax"), m.reg("rcx"), m.reg("rdx")) == (0x1234, ALL_ONES, 1)


@pytest.mark.spec("cpu.long_mode")
def test_linear_addresses_wrap_in_compatibility_mode(m: Machine) -> None:
    m.asm("mov eax, ds:[0xfffff510]; hlt", CODE, 32)
    m.long64(CODE)
    m.set_seg("cs", CODE32, 0, ALL_ONES, 0xC09B)
    m.set_gdt(FREE_SELECTOR, descriptor(0x1000, 0xFFFFF, 0xC093))
    m.set_seg("ds", FREE_SELECTOR, 0x1000, ALL_ONES, 0xC093)
    m.write(0x510, 0x77, 4)
    m.run(lib.EXIT_HLT)
    assert m.reg("rax") == 0x77


@pytest.mark.spec("cpu.long_mode")
@pytest.mark.parametrize(
    "code",
    ["06", "07", "0e", "16", "17", "1e", "1f", "27", "2f", "37", "3f", "60", "61", "62 00", "82 c0 00",
     "9a 00 00 00 00 08 00", "c4 00", "ce", "d4 0a", "d5 0a", "d6", "ea 00 00 00 00 08 00"],
)  # fmt: skip
def test_instructions_64_bit_mode_does_not_have(m: Machine, code: str) -> None:
    m.load(CODE, bytes.fromhex(code))
    m.long64(CODE)
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(1)) == (UD, [CODE])


@pytest.mark.spec("cpu.lmode_exit", "cpu.cr_writes")
@pytest.mark.tcg_differs("neither is refused: SDM vol. 2 MOV CR")
def test_long_mode_is_left_through_compatibility_mode_only(m: Machine) -> None:
    m.asm("bad: mov cr4, rax", CODE)  # PAE
    m.long64(CODE)
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(2)) == (GP, [0, m.symbols["bad"]])
    m.asm("bad: mov cr0, eax; cpuid", CODE, 32)
    m.long64(CODE)
    m.set_seg("cs", CODE32, 0, ALL_ONES, 0xC09B)
    m.set(rax=0x11, cr4=m.guest.cr4 | lib.X86_CR4_PCIDE)
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(2)) == (GP, [0, m.symbols["bad"]])
    m.long64(CODE)
    m.set_seg("cs", CODE32, 0, ALL_ONES, 0xC09B)
    m.set(rax=0x11)
    m.run(lib.EXIT_CPUID)
    assert m.guest.efer & (lib.EFER_LME | lib.EFER_LMA) == lib.EFER_LME


@pytest.mark.spec("cpu.long_mode", "cpu.seg_load")
def test_descriptors_in_64_bit_mode(m: Machine) -> None:
    """Loads of data segments look at types and levels, not at limits; their limits stay readable."""
    m.asm(f"mov eax, {FREE_SELECTOR}; mov ds, eax; mov rbx, [{PML4}]; lsl ecx, eax; hlt", CODE)
    m.long64(CODE)
    m.set_gdt(FREE_SELECTOR, descriptor(0x123000, 0xF, 0x93))
    m.run(lib.EXIT_HLT)
    assert (m.reg("rbx") & 1, m.reg("rcx")) == (1, 0xF)
    assert (m.seg("ds").base, m.seg("ds").limit) == (0x123000, 0xF)


@pytest.mark.spec("cpu.long_mode", "cpu.paging_modes")
def test_32_bit_user_code_under_a_64_bit_kernel(m: Machine) -> None:
    """IRETQ to compatibility mode at CPL 3, an interrupt back, and 64-bit state that survived."""
    m.asm(
        f"mov r12, -2; push {USER_DATA | 3}; push 0x7000; push 2; push {0x20 | 3}; push {CODE + 0x100}; iretq",
        CODE,
    )
    m.asm("push ebp; pop edx; int 0x40", CODE + 0x100, 32)
    m.long64(CODE)
    m.set_gate(0x40, gate(CODE64, HANDLERS + 0x400, 0xEE))
    m.set(rbp=0x99, rbx=0x1122334455667788)
    m.run(lib.EXIT_HLT)
    assert m.frame(5) == [CODE + 0x104, 0x23, 2, 0x7000, USER_DATA | 3]
    assert (m.reg("rdx"), m.reg("r12"), m.reg("rbx")) == (0x99, 2**64 - 2, 0x1122334455667788)
