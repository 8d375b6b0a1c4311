"""Integer instructions where the host is no reference: real mode, atomicity, random numbers.

Results and flags are compared with the host in tests/fuzz.
"""

from __future__ import annotations

import threading

import pytest

from pykvm.abi import lib
from tests.guest.bare import CODE, STACK, Machine

DE, BR, UD, SS, GP = 0, 5, 6, 12, 13
ALL = 0xFFFFFFFF


@pytest.fixture
def m() -> Machine:
    return Machine()


def start(m: Machine, source: str, mode: str = "real", **registers: int) -> None:
    m.asm(source, CODE, bits={"long64": 64, "prot32": 32, "real": 16}[mode])
    if mode == "real":
        m.real(CODE)
    else:
        getattr(m, mode)(CODE)
    m.set(**registers)


# ---- faults point at the instruction, and change nothing


@pytest.mark.spec("cpu.muldiv", "cpu.isa_bcd_misc")
@pytest.mark.tcg_differs("LOCK MOV is taken: SDM vol. 2 LOCK")
@pytest.mark.parametrize("mode", ["real", "prot32"])
@pytest.mark.parametrize(
    ("source", "vector"),
    [
        ("div cl", DE),
        ("idiv cx", DE),
        ("aam 0", DE),
        ("bound cx, [0x8000]", BR),
        (".byte 0xf0; inc cx", UD),
        (".byte 0xf0; mov [0x8000], cx", UD),
    ],
)
def test_faults(m: Machine, mode: str, source: str, vector: int) -> None:
    m.load(0x8000, b"\1\0\2\0")
    start(m, f"{source}; hlt", mode, rax=0x1234, rcx=0, rdx=0x5678)
    m.run(lib.EXIT_HLT)
    assert m.vector() == vector
    assert m.frame(1) == [CODE & 0xFFFF if mode == "real" else CODE]
    assert (m.reg("rax"), m.reg("rcx"), m.reg("rdx")) == (0x1234, 0, 0x5678)


@pytest.mark.spec("cpu.isa_bcd_misc")
@pytest.mark.parametrize(("index", "ok"), [(-3, False), (-2, True), (5, True), (6, False)])
def test_bound_includes_both_ends(m: Machine, index: int, ok: bool) -> None:
    m.load(0x8000, (-2 & 0xFFFFFFFF).to_bytes(4, "little") + (5).to_bytes(4, "little"))
    start(m, "bound ecx, [0x8000]; hlt", "prot32", rcx=index & 0xFFFFFFFF)
    m.run(lib.EXIT_HLT)
    assert m.vector() == (-1 if ok else BR)


# ---- the stack


@pytest.mark.spec("cpu.real_mode")
@pytest.mark.parametrize(("sp", "where"), [(0, 0xFFFE), (2, 0), (0x8000, 0x7FFE)])
def test_push_wraps_in_real_mode(m: Machine, sp: int, where: int) -> None:
    start(m, "push ax; hlt", rax=0xBEEF, rsp=0x7_0000 | sp)
    m.run(lib.EXIT_HLT)
    assert m.read(where, 2) == 0xBEEF
    assert m.reg("rsp") == 0x7_0000 | where


@pytest.mark.spec("cpu.real_mode")
def test_push_across_the_end_of_the_segment_is_ss(m: Machine) -> None:
    start(m, "push ax; hlt", rsp=1)
    m.ctl.exception_bitmap = 1 << SS
    m.run(lib.EXIT_EXCEPTION)
    assert (m.guest.rip, m.reg("rsp")) == (CODE & 0xFFFF, 1)


@pytest.mark.spec("cpu.isa_int")
def test_push_sp_pushes_the_old_value_and_pop_sp_keeps_the_popped(m: Machine) -> None:
    start(m, "push sp; mov bp, sp; pop sp; hlt")
    m.run(lib.EXIT_HLT)
    assert m.read(STACK - 2, 2) == STACK
    assert m.reg("rsp") == STACK


@pytest.mark.spec("cpu.isa_int")
def test_pop_to_memory_is_addressed_with_the_new_rsp(m: Machine) -> None:
    start(m, "pop qword ptr [rsp + 8]; hlt", "long64")
    m.write(STACK, 0x1122334455667788)
    m.run(lib.EXIT_HLT)
    assert m.read(STACK + 16) == 0x1122334455667788
    assert m.reg("rsp") == STACK + 8


@pytest.mark.spec("cpu.isa_int", "cpu.page_crossing")
def test_pusha_writes_all_or_nothing(m: Machine) -> None:
    start(m, "pushad; hlt", "prot32", rsp=0x1F000A, rax=ALL, rcx=ALL)
    m.unmap(0x1EF000)
    m.run(lib.EXIT_EPT_VIOLATION)
    assert m.guest.rip == CODE
    assert m.reg("rsp") == 0x1F000A
    assert m.read(0x1F0000, 8) == 0
    m.map(0x1EF000)
    m.run(lib.EXIT_HLT)
    assert m.reg("rsp") == 0x1F000A - 32
    assert m.read(0x1F0006, 4) == ALL


@pytest.mark.spec("cpu.isa_bcd_misc")
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("level", [0, 1, 3])
def test_enter_and_leave_in_real_mode(m: Machine, size: int, level: int) -> None:
    code = (b"\x66" if size == 4 else b"") + bytes([0xC8, 0x20, 0, level])
    m.load(CODE, code + b"\xf4" + (b"\x66" if size == 4 else b"") + b"\xc9\xf4")
    m.real(CODE)
    m.set(rbp=0x8000, rsp=STACK)
    for k in range(1, 4):
        m.write(0x8000 - k * size, 0x1111 * k, size)
    m.run(lib.EXIT_HLT)
    frame = STACK - size
    expected = [0x8000] + [0x1111 * k for k in range(1, level)] + ([frame] if level else [])
    assert [m.read(frame - k * size, size) for k in range(len(expected))] == expected
    assert m.reg("rbp") == frame
    assert m.reg("rsp") == frame - size * level - 0x20
    m.run(lib.EXIT_HLT)
    assert (m.reg("rbp"), m.reg("rsp")) == (0x8000, STACK)


# ---- branches


@pytest.mark.spec("cpu.isa_int")
def test_sixteen_bit_branches_truncate_ip(m: Machine) -> None:
    start(m, ".byte 0x66, 0xe9; .word 0x7ff0", "prot32")
    m.load(CODE + 4 + 0x7FF0 & 0xFFFF, b"\xf4")
    m.run(lib.EXIT_HLT)
    assert m.guest.rip == (CODE + 4 + 0x7FF0 & 0xFFFF) + 1


JMP, JMP_EAX, CALL = (
    ".byte 0x66, 0xe9; .long 0x10000",
    ".byte 0x66, 0xff, 0xe0",
    ".byte 0x66, 0xe8; .long 0x20000",
)


@pytest.mark.spec("cpu.real_mode")
@pytest.mark.tcg_differs("no limits: SDM vol. 3 5.3")
@pytest.mark.parametrize("source", [JMP, JMP_EAX, CALL], ids=["jmp", "jmp eax", "call"])
def test_branch_beyond_the_limit_of_cs_is_gp_at_the_branch(m: Machine, source: str) -> None:
    start(m, source, rax=0x10000)
    m.run(lib.EXIT_HLT)
    assert m.vector() == GP
    assert m.frame(1) == [CODE & 0xFFFF]
    assert m.reg("rsp") == STACK - 6


@pytest.mark.spec("cpu.isa_bcd_misc")
@pytest.mark.parametrize(
    ("source", "rcx", "after", "taken"),
    [("loop 1f", 0x7_0001, 0x7_0000, False), ("addr32 loop 1f", 0x1_0000, 0xFFFF, True)],
)
def test_loop_counts_in_the_address_size(m: Machine, source: str, rcx: int, after: int, taken: bool) -> None:
    start(m, f"{source}; hlt; 1: mov bl, 1; hlt", rcx=rcx)
    m.run(lib.EXIT_HLT)
    assert m.reg("rcx") == after
    assert m.reg("rbx") == taken


# ---- other processors


LOOPS = 20_000
COUNT = "jz 3f; pause; jmp 2b; 3: inc qword ptr [rbx]"
LOAD = "mov r8, rcx; mov rax, [rbx]; mov rdx, [rbx + 8]"
SWAP = "lock cmpxchg16b [r9]; mov rbx, r9; jne 2b; mov rcx, r8"
ATOMIC = [
    ("lock inc dword ptr [rbx]", 2 * LOOPS),
    ("lock add qword ptr [rbx], 3", 6 * LOOPS),
    ("mov eax, 1; lock xadd [rbx], eax", 2 * LOOPS),
    ("mov eax, [rbx]; 2: lea edx, [rax + 1]; lock cmpxchg [rbx], edx; jne 2b", 2 * LOOPS),
    (f"2: mov eax, 1; xchg [rbx + 8], eax; test eax, eax; {COUNT}; mov dword ptr [rbx + 8], 0", 2 * LOOPS),
    (f"2: lock bts dword ptr [rbx + 8], 5; sbb al, al; {COUNT}; lock btr dword ptr [rbx + 8], 5", 2 * LOOPS),
    (f"{LOAD}; 2: mov rcx, rdx; mov r9, rbx; lea rbx, [rax + 1]; {SWAP}", 2 * LOOPS),
]  # fmt: skip


@pytest.mark.spec("cpu.atomics_smp", "cpu.xchg_cmpxchg")
@pytest.mark.parametrize(
    ("source", "result"), ATOMIC, ids=["inc", "add", "xadd", "cmpxchg", "xchg", "bts", "16b"]
)
def test_locked_instructions_are_atomic_between_processors(source: str, result: int) -> None:
    first, second = Machine(), Machine()
    second.ram, second.hva = first.ram, first.hva
    for gpa in range(0, second.size, 4096):
        second.map(gpa)
    first.asm(f"1: {source}; dec rcx; jnz 1b; hlt", CODE)
    threads = []
    for m in (first, second):
        m.long64(CODE)
        m.set(rcx=LOOPS, rbx=0x100000)
        m.ctl.flags &= ~lib.CPU_EXIT_PAUSE
        threads.append(threading.Thread(target=m.run, args=(lib.EXIT_HLT, 60)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert first.guest.rip == second.guest.rip
    assert first.read(0x100000) == result


@pytest.mark.spec("cpu.rdrand")
@pytest.mark.tcg_differs("other numbers")
@pytest.mark.parametrize("name", ["rdrand", "rdseed"])
def test_random_numbers(m: Machine, name: str) -> None:
    start(m, f"{name} rax; pushfq; pop r8; {name} rbx; {name} ecx; {name} dx; hlt", "long64",
          rflags=0x8D7, rcx=2**64 - 1, rdx=2**64 - 1)  # fmt: skip
    m.run(lib.EXIT_HLT)
    assert m.reg("r8") & 0x8D5 == 1  # CF alone
    assert len({m.reg("rax"), m.reg("rbx"), 0, 2**64 - 1}) == 4
    assert m.reg("rcx") >> 32 == 0
    assert m.reg("rdx") >> 16 == 2**48 - 1
