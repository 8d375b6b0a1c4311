"""The block cache: code that changes, code at page ends and segment limits, links, flushes."""

from __future__ import annotations

import random

import pytest

from pykvm.abi import lib
from tests.guest.bare import CODE, PD, STACK, Machine

GP, UD = 13, 6
FETCH = 4


@pytest.fixture
def m() -> Machine:
    return Machine()


def long64(m: Machine, source: str, address: int = CODE) -> None:
    m.asm(source, address)
    m.long64(address)


# ---- the processor's own stores


@pytest.mark.spec("cpu.smc")
def test_store_to_the_next_instruction(m: Machine) -> None:
    """Even in the same block, and without a jump between."""
    long64(m, "xor eax, eax; mov byte ptr [target + 1], 7; target: mov al, 1; hlt")
    m.run(lib.EXIT_HLT)
    assert m.reg("rax") == 7


@pytest.mark.spec("cpu.smc")
def test_loop_that_patches_itself(m: Machine) -> None:
    long64(m, "mov ecx, 500; l: add dword ptr [imm + 1], 1; imm: mov eax, 0; add ebx, eax; loop l; hlt")
    m.run(lib.EXIT_HLT)
    assert m.reg("rbx") == 500 * 501 // 2


@pytest.mark.spec("cpu.smc")
def test_patched_subroutine(m: Machine) -> None:
    long64(
        m,
        "mov ecx, 300; l: mov [f + 1], ecx; call f; add ebx, eax; loop l; hlt; .align 64; f: mov eax, 0; ret",
    )
    m.run(lib.EXIT_HLT)
    assert m.reg("rbx") == 300 * 301 // 2


@pytest.mark.spec("cpu.smc")
def test_store_by_an_alias(m: Machine) -> None:
    """The same frame at another linear address."""
    store = f"mov [{CODE + 0x200000} + (f - {CODE}) + 1], ecx"
    long64(m, f"mov ecx, 9; l: {store}; call f; add ebx, eax; loop l; hlt; f: mov eax, 0; ret")
    m.write(PD + 8, 0x87)  # the second 2 MiB are the first
    m.run(lib.EXIT_HLT)
    assert m.reg("rbx") == 45


@pytest.mark.spec("cpu.smc", "cpu.string_rep")
def test_string_store_over_code(m: Machine) -> None:
    """REP MOVSB copies a subroutine over another, and over what follows itself."""
    long64(
        m,
        """
        call f
        lea rsi, [g]; lea rdi, [f]; mov ecx, 6; rep movsb
        call f
        lea rsi, [new]; lea rdi, [old]; mov ecx, 2; rep movsb
        old: mov bl, 1
        hlt
        f: add eax, 1; ret; nop; nop; nop
        g: add eax, 0x10; ret; nop; nop
        new: mov bl, 9
        """,
    )
    m.run(lib.EXIT_HLT)
    assert (m.reg("rax"), m.reg("rbx")) == (0x11, 9)


@pytest.mark.spec("cpu.smc")
def test_stack_in_a_code_page(m: Machine) -> None:
    """Data next to code: slow, never wrong, and the code stays cached."""
    long64(m, "mov ecx, 1000; l: push rcx; pop rax; add rbx, rax; loop l; hlt")
    m.set(rsp=CODE + 0x800)
    before = int(lib.cpu_vmcs(m.cpu).stats.blocks_built)
    m.run(lib.EXIT_HLT)
    assert m.reg("rbx") == 500500
    assert lib.cpu_vmcs(m.cpu).stats.blocks_built - before < 20


# ---- stores of others


@pytest.mark.spec("cpu.smc")
def test_store_of_the_vmm(m: Machine) -> None:
    long64(m, "l: mov eax, 1; hlt; jmp l")
    m.run(lib.EXIT_HLT)
    m.ram[CODE + 1] = 42  # no call says so
    m.run(lib.EXIT_HLT)
    assert m.reg("rax") == 42


@pytest.mark.spec("cpu.smc")
def test_links_see_a_new_epoch(m: Machine) -> None:
    """Two linked blocks; the second is changed while the guest is out, the first is not."""
    long64(m, "l: mov eax, 1; jmp n; n: mov ebx, 1; hlt; jmp l")
    m.run(lib.EXIT_HLT)
    m.run(lib.EXIT_HLT)
    m.ram[m.symbols["n"] + 1] = 5
    m.run(lib.EXIT_HLT)
    assert m.reg("rbx") == 5


# ---- page ends


@pytest.mark.spec("cpu.page_crossing")
def test_instruction_across_pages(m: Machine) -> None:
    at = CODE + 0x1000 - 3
    m.asm("mov eax, 0x12345678; inc ebx; hlt", at)
    m.long64(at)
    m.run(lib.EXIT_HLT)
    assert (m.reg("rax"), m.reg("rbx")) == (0x12345678, 1)


@pytest.mark.spec("cpu.page_crossing", "cpu.smc")
def test_second_page_of_an_instruction_changes(m: Machine) -> None:
    """By its mapping, by the VMM and by the guest."""
    at = CODE + 0x1000 - 3
    m.asm("l: mov eax, 0x11110000; hlt; jmp l", at)
    m.long64(at)
    m.run(lib.EXIT_HLT)
    copy = bytearray(m.ram[CODE + 0x1000 : CODE + 0x2000])
    copy[1] = 0x22
    m.load(0x200000, bytes(copy))
    m.map(CODE + 0x1000, target=0x200000)
    m.run(lib.EXIT_HLT)
    assert m.reg("rax") == 0x22110000
    m.ram[0x200000] = 0x33
    m.run(lib.EXIT_HLT)
    assert m.reg("rax") == 0x22330000


@pytest.mark.spec("cpu.page_crossing", "cpu.smc")
def test_store_to_the_second_page_of_an_instruction(m: Machine) -> None:
    at = CODE + 0x1000 - 3
    m.asm(f"l: mov eax, 0; add ebx, eax; inc dword ptr [{at + 1}]; cmp ecx, 5; inc ecx; jb l; hlt", at)
    m.long64(at)
    m.run(lib.EXIT_HLT)
    assert m.reg("rbx") == 15


@pytest.mark.spec("cpu.page_crossing")
def test_next_page_missing(m: Machine) -> None:
    """What is in the page is executed; the exit belongs to the instruction that needs the next."""
    at = CODE + 0x1000 - 5
    m.asm("inc ebx; mov eax, 1; hlt", at)
    m.long64(at)
    m.unmap(CODE + 0x1000)
    m.run(lib.EXIT_EPT_VIOLATION)
    assert (m.reg("rip"), m.reg("rbx")) == (at + 2, 1)
    assert m.exit.gpa == CODE + 0x1000
    assert m.exit.qualification & 7 == FETCH
    m.map(CODE + 0x1000)
    m.run(lib.EXIT_HLT)
    assert m.reg("rax") == 1


@pytest.mark.spec("cpu.page_crossing")
def test_complete_instruction_at_the_page_end(m: Machine) -> None:
    """It does not need the next page."""
    at = CODE + 0x1000 - 1
    m.load(at, b"\xf4")
    m.long64(at)
    m.unmap(CODE + 0x1000)
    m.run(lib.EXIT_HLT)


# ---- the limit of CS


@pytest.mark.spec("cpu.prot16_32", "cpu.real_mode")
def test_fetch_beyond_the_limit(m: Machine) -> None:
    """#GP(0) of the instruction that crosses it, after those before."""
    m.real(CODE)
    m.load(CODE + 0xFFFC, b"\x43\x43\xb8\x34")  # inc bx; inc bx; mov ax, 0x..34
    m.set(rip=0xFFFC)
    m.run(lib.EXIT_HLT)
    assert m.vector() == GP
    assert m.reg("rbx") == 2
    assert m.frame(1) == [0xFFFE]


def test_limit_changes_for_cached_code(m: Machine) -> None:
    m.asm("inc ebx; inc ebx; inc ebx; hlt", CODE, bits=32)
    m.prot32(CODE)
    m.run(lib.EXIT_HLT)
    m.prot32(CODE)
    m.seg("cs").limit = CODE + 1
    m.set(rbx=0)
    m.run(lib.EXIT_HLT)
    assert m.vector() == GP
    assert m.reg("rbx") == 2
    m.prot32(CODE)
    m.set(rbx=0)
    m.run(lib.EXIT_HLT)
    assert m.reg("rbx") == 3


@pytest.mark.spec("cpu.real_mode")
def test_branches_wrap_at_64k(m: Machine) -> None:
    m.real(0, cs=CODE >> 4)
    m.load(CODE, b"\x43\x83\xfb\x03\x72\x0a\xf4")  # inc bx; cmp bx, 3; jb 0x10; hlt
    m.load(CODE + 0x10, b"\xe9\xdd\xff")  # jmp 0xfff0
    m.load(CODE + 0xFFF0, b"\xeb\x0e")  # jmp 0
    m.run(lib.EXIT_HLT)
    assert m.reg("rbx") == 3


# ---- one frame, several places


def test_aliased_code_is_relative_to_where_it_runs(m: Machine) -> None:
    """A cached block depends on no linear address: RIP-relative operands, calls, links."""
    source = "lea rax, [rip]; call f; add rcx, 1; cmp rcx, 3; jne 1b; hlt; f: pop rdx; push rdx; ret"
    long64(m, "1: " + source)
    m.write(PD + 8, 0x87)
    for base in (0, 0x200000, 0):
        m.set(rip=CODE + base, rcx=0, rsp=STACK)
        m.run(lib.EXIT_HLT)
        assert m.reg("rax") == CODE + 7 + base
        assert m.reg("rdx") == CODE + 12 + base


def test_same_bytes_in_two_modes(m: Machine) -> None:
    """48 is DEC EAX or REX.W."""
    m.load(CODE, b"\x48\x01\xd8\xf4")
    for _ in range(2):
        m.prot32(CODE)
        m.set(rax=5, rbx=1 << 32 | 1)
        m.run(lib.EXIT_HLT)
        assert m.reg("rax") == 5
        m.long64(CODE)
        m.set(rax=5, rbx=1 << 32 | 1)
        m.run(lib.EXIT_HLT)
        assert m.reg("rax") == 1 << 32 | 6


def test_address_space_switch(m: Machine) -> None:
    """The page of the next instruction is another one after MOV CR3."""
    other_pml4, other_pdpt, other_pd = 0x100000, 0x101000, 0x102000
    at = 0x200000 + CODE
    m.asm("mov ebx, 1; mov cr3, rax; mov ebx, 2; hlt", at)
    m.long64(at)
    m.write(other_pml4, other_pdpt | 7)
    m.write(other_pdpt, other_pd | 7)
    m.write(other_pd, 0x87)
    m.write(other_pd + 8, 0x87)  # linear 2 MiB: frames 0..
    m.load(CODE, b"\xbb\x01\0\0\0\x0f\x22\xd8\xbb\x63\0\0\0\xf4")
    m.set(rip=at, rax=other_pml4)
    m.run(lib.EXIT_HLT)
    assert m.reg("rbx") == 0x63


# ---- the arena


def test_arena_overflow(m: Machine) -> None:
    """More blocks than there is memory for: everything is thrown away and decoded again."""
    jumps = 0x40000
    m.load(0x200000, b"\xeb\x00" * jumps + b"\xff\xc3\xf4")
    m.long64(0x200000)
    stats = lib.cpu_vmcs(m.cpu).stats
    insns, flushed = int(stats.insns), int(stats.blocks_flushed)
    for _ in range(2):
        m.set(rip=0x200000)
        m.run(lib.EXIT_HLT)
    assert m.reg("rbx") == 2
    assert stats.insns - insns == 2 * (jumps + 2)
    assert stats.blocks_flushed - flushed >= 2


# ---- chained and fused: faster, and otherwise as instruction by instruction


def trace(m: Machine) -> list[int]:
    """Where every instruction begins, by single steps."""
    rips = []
    m.ctl.flags |= lib.CPU_SINGLE_STEP
    while m.run() == lib.EXIT_MTF:
        rips.append(m.guest.rip)
    m.ctl.flags &= ~lib.CPU_SINGLE_STEP
    assert m.exit.reason == lib.EXIT_HLT
    return rips


@pytest.mark.spec("cpu.tf")
def test_steps_through_blocks_that_are_cached_and_linked(m: Machine) -> None:
    source = """
        mov ecx, 3
        l: call f; lea rax, [g]; call rax; push offset back; lea rax, [r]; jmp rax
        back: cmp ecx, 1; jne next
        next: test ecx, ecx; js l; sub ecx, 1; jnz l
        call [p]; hlt
        f: add ebx, 1; jo f; ret
        .align 4096
        g: and ebx, 0xff; jz g; ret
        r: ret
        p: .quad f
    """
    long64(m, source)
    cold = trace(m)
    assert len(cold) > 60
    stats = lib.cpu_vmcs(m.cpu).stats
    counts = []
    for _ in range(3):  # decoded, linked, run
        before = int(stats.insns)
        m.long64(CODE)
        m.run(lib.EXIT_HLT)
        counts.append(int(stats.insns) - before)
    assert counts == [len(cold) + 1] * 3
    m.long64(CODE)
    assert trace(m) == cold
    for n, rip in enumerate(cold[:-1]):  # and breakpoints there are met, as often as the trace says
        m.long64(CODE)
        m.set(dr7=2, dr0=rip)
        m.ctl.exception_bitmap = 1 << 1
        m.run(lib.EXIT_EXCEPTION)
        assert (m.guest.rip, cold.index(rip) <= n) == (rip, True)
        m.set(dr7=0)
    m.ctl.exception_bitmap = 0


@pytest.mark.spec("cpu.sti_shadow")
@pytest.mark.parametrize("go", ["ret", "jmp rdx", "call rdx", "jmp [rsp]", "call [rsp]"])
def test_single_instruction_before_a_block_that_has_run(m: Machine, go: str) -> None:
    """The branch in STI's shadow is executed by itself, and what comes behind it is looked at."""
    source = f"""
        mov ecx, 5; lea rdx, [back]
        l: mov rsp, {STACK}; push rdx; dec ecx; jz last; jmp rdx
        back: test ecx, ecx; jnz l; mov ebx, 1; hlt
        last: sti; {go}
        """
    long64(m, source)
    m.set(rflags=2)
    m.ctl.flags |= lib.CPU_EXIT_IRQ_WINDOW
    m.run(lib.EXIT_IRQ_WINDOW)
    assert m.guest.rip == m.symbols["back"]


OPERANDS = (
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    1 << 63,
    (1 << 63) - 1,
    (1 << 64) - 1,
)
CONDITIONS = ["o", "no", "b", "ae", "e", "ne", "be", "a", "s", "ns", "p", "np", "l", "ge", "le", "g"]
REGISTERS = {8: ("al", "bl"), 32: ("eax", "ebx"), 64: ("rax", "rbx")}
SIZES = {8: "byte", 32: "dword", 64: "qword"}
FUSED = ["cmp {r}, {s}", "cmp {r}, -5", "cmp {r}, [rdi]", "cmp [rdi], {s}", "cmp {m} ptr [rdi], 1"]
FUSED += ["test {r}, {s}", "test {r}, 0x41", "test [rdi], {s}", "test {m} ptr [rdi], 0x41"]
FUSED += [f"{op} {{r}}, {s}" for op in ("add", "sub", "and") for s in ("{s}", "-1")]


@pytest.mark.spec("cpu.isa_int", "cpu.tf")
@pytest.mark.parametrize("bits", [8, 32, 64])
def test_fused_pairs(m: Machine, bits: int) -> None:
    """Every pair, in one handler and by steps: where it goes, flags and registers, counts."""
    r, s = REGISTERS[bits]
    pairs = [f"{text.format(r=r, s=s, m=SIZES[bits])}; j{cc} t" for text in FUSED for cc in CONDITIONS]
    stats = lib.cpu_vmcs(m.cpu).stats
    m.asm(
        "; ".join(
            f".balign 32; {pair.replace(' t', f' t{n}')}; hlt; t{n}: nop; hlt" for n, pair in enumerate(pairs)
        )
    )
    for number in range(len(pairs)):
        outcomes = []
        for step in range(2):
            r_ = random.Random(bits * 1000 + number)
            for _ in range(4):
                m.long64(CODE + 32 * number)
                m.write(0x20000, r_.choice(OPERANDS))
                m.set(
                    rax=r_.choice(OPERANDS),
                    rbx=r_.choice(OPERANDS),
                    rdi=0x20000,
                    rflags=2 | r_.getrandbits(12) & 0x8D5,
                )
                before = int(stats.insns)
                if step:
                    trace(m)
                else:
                    m.run(lib.EXIT_HLT)
                outcomes.append(
                    (m.guest.rip, m.guest.rflags, m.reg("rax"), m.reg("rbx"), stats.insns - before)
                )
        assert outcomes[:4] == outcomes[4:], pairs[number]


def test_fused_branch_to_a_bad_address(m: Machine) -> None:
    """#GP of the branch: the comparison is done, and rip and the count are the branch's."""
    last = (1 << 47) - 4096
    m.asm("cmp eax, eax; bad: .byte 0x0f, 0x84; .long 0x2000", CODE)
    m.long64(CODE)
    table = 0x30000
    for level in range(2):
        m.write(table + 0x1000 * level + 8 * 511, table + 0x1000 * (level + 1) | 7)
    m.write(table + 0x2000 + 8 * 511, CODE | 3)
    m.write(m.guest.cr3 + 8 * 255, table | 7)
    m.set(rip=last, rflags=0x8D7)
    before = int(lib.cpu_vmcs(m.cpu).stats.insns)
    m.ctl.exception_bitmap = 1 << GP
    m.run(lib.EXIT_EXCEPTION)
    assert (m.guest.rip, m.guest.rflags & 0x8D5) == (last + 2, 0x44)
    assert lib.cpu_vmcs(m.cpu).stats.insns - before == 1


def test_fused_operand_that_faults(m: Machine) -> None:
    """The comparison is executed again; the flags are still those of before."""
    long64(m, "cmp [rdi], eax; je t; hlt; t: hlt")
    m.set(rdi=0x20000, rax=5, rflags=0x8D7)
    m.write(PD + 8 * 1, 0)
    m.set(rdi=0x200000)
    m.ctl.exception_bitmap = 1 << 14
    m.run(lib.EXIT_EXCEPTION)
    assert (m.guest.rip, m.guest.rflags & 0x8D5) == (CODE, 0x8D5)
    m.write(PD + 8 * 1, 0x200087)
    m.write(0x200000, 5)
    m.run(lib.EXIT_HLT)
    assert m.guest.rip == m.symbols["t"] + 1
