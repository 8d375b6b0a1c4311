"""String instructions where the host is no reference: repetition in pieces, MMIO, real mode.

What they do to registers, flags and memory is compared with the host in tests/fuzz.
Source: SDM vol. 2 REP, MOVS, STOS; vol. 1 7.3.9.
"""

from __future__ import annotations

import pytest

from pykvm.abi import lib
from tests.guest.bare import CODE, HANDLERS, PD, Machine

DB, PF = 1, 14
TF, IF = 0x100, 0x200
SRC, DST = 0x100000, 0x180000


@pytest.fixture
def m() -> Machine:
    return Machine()


def start(m: Machine, source: str, mode: str = "long64", **registers: int) -> None:
    m.asm(source, CODE, bits={"long64": 64, "prot32": 32, "real": 16}[mode])
    if mode == "real":
        m.real(CODE)
    else:
        getattr(m, mode)(CODE)
    m.set(**registers)


def pattern(n: int) -> bytes:
    return bytes((k * 7 + k // 251) & 0xFF for k in range(n))


@pytest.mark.spec("cpu.string_rep")
@pytest.mark.parametrize("offset", [0, 1, 0xFFF])
def test_rep_movs_over_many_pages(m: Machine, offset: int) -> None:
    n = 100_000
    start(m, "rep movsb; hlt", rsi=SRC, rdi=DST + offset, rcx=n)
    m.load(SRC, pattern(n))
    m.run(lib.EXIT_HLT)
    assert m.ram[DST + offset : DST + offset + n] == pattern(n)
    assert (m.reg("rcx"), m.reg("rsi"), m.reg("rdi")) == (0, SRC + n, DST + offset + n)


@pytest.mark.spec("cpu.string_rep")
@pytest.mark.parametrize(("suffix", "size"), [("b", 1), ("w", 2), ("d", 4), ("q", 8)])
@pytest.mark.parametrize("distance", [-9, -1, 1, 2, 3, 5, 8, 12, 700])
def test_overlap_is_that_of_elements_one_by_one(m: Machine, suffix: str, size: int, distance: int) -> None:
    n = 900
    memory = bytearray(pattern(16384))
    for k in range(n):
        at = 512 + k * size
        memory[at + distance : at + distance + size] = memory[at : at + size]
    start(m, f"rep movs{suffix}; hlt", rsi=SRC + 512, rdi=SRC + 512 + distance, rcx=n)
    m.load(SRC, pattern(16384))
    m.run(lib.EXIT_HLT)
    assert m.ram[SRC : SRC + 16384] == memory


@pytest.mark.spec("cpu.string_rep", "cpu.pf_string_restart")
@pytest.mark.parametrize(("source", "moved"), [("rep movsd", True), ("rep stosd", False)])
def test_fault_in_the_middle_leaves_what_was_done(m: Machine, source: str, moved: bool) -> None:
    start(m, f"{source}; hlt", rsi=SRC, rdi=0x200000 - 6, rcx=100, rax=0x01010101)
    m.load(SRC, b"\1" * 400)
    m.write(PD + 8, 0)
    lib.cpu_flush_tlb(m.cpu)
    m.run(lib.EXIT_HLT)
    assert m.vector() == PF
    assert m.guest.cr2 == 0x200000
    assert (m.reg("rcx"), m.reg("rdi")) == (99, 0x200000 - 2)
    assert m.reg("rsi") == SRC + 4 * moved
    assert m.read(0x200000 - 6, 6) == 0x0000_01010101  # the element that crosses was not written
    m.write(PD + 8, 0x200000 | 0xE7)
    m.set(rip=CODE, rsp=m.reg("rsp") + 48)
    lib.cpu_flush_tlb(m.cpu)
    m.run(lib.EXIT_HLT)
    assert m.ram[0x200000 - 6 : 0x200000 + 394] == b"\1" * 400


@pytest.mark.spec("cpu.string_rep")
def test_long_repetitions_are_interruptible(m: Machine) -> None:
    """An interrupt comes before the end, and the instruction goes on behind its handler."""
    start(m, "std; rep stosb; hlt", rdi=SRC + 0x1FFFFF, rcx=0x200000, rax=0x5A)
    m.asm("inc qword ptr [0x8000]; mov [0x8008], rcx; iretq", HANDLERS + 16 * 0x20)
    preempted = 0
    while (reason := enter_until(m, 20_000)) == lib.EXIT_PREEMPTED:
        preempted += 1
        assert m.guest.rip in {CODE + 1, CODE + 3}
        if preempted == 1:
            m.set(rflags=m.guest.rflags | IF)
            m.inject(0x20)
    assert reason == lib.EXIT_HLT
    assert preempted
    assert m.read(0x8000) == 1
    assert 0 < m.read(0x8008) < 0x200000
    assert m.ram[SRC : SRC + 0x200000] == b"\x5a" * 0x200000


def enter_until(m: Machine, ticks: int) -> int:
    m.ctl.deadline = lib.host_tsc() + ticks
    return int(lib.cpu_enter(m.cpu))


@pytest.mark.spec("cpu.tf", "cpu.string_rep")
def test_trap_flag_traps_after_each_iteration(m: Machine) -> None:
    start(m, "rep movsb; hlt", rsi=SRC, rdi=DST, rcx=3, r9=0x8000, rflags=TF | 2)
    m.asm("mov r8, [rsp]; mov [r9], r8; add r9, 8; iretq", HANDLERS + 16 * DB)
    m.run(lib.EXIT_HLT)
    assert [m.read(0x8000 + 8 * k) for k in range(3)] == [CODE, CODE, CODE + 2]


@pytest.mark.spec("cpu.string_rep")
def test_monitor_trap_comes_after_each_iteration(m: Machine) -> None:
    start(m, "rep lodsb; hlt", rsi=SRC, rcx=3)
    m.ctl.flags |= lib.CPU_SINGLE_STEP
    for left in (2, 1, 0):
        m.run(lib.EXIT_MTF)
        assert m.reg("rcx") == left
    assert m.guest.rip == CODE + 2


@pytest.mark.spec("cpu.smc", "cpu.string_rep")
def test_rep_stos_over_the_instructions_behind_it(m: Machine) -> None:
    start(m, "rep stosb; mov bl, 1; mov bl, 2; hlt", rdi=CODE + 2, rcx=4, rax=0x90)
    m.run(lib.EXIT_HLT)
    assert m.reg("rbx") == 0


# ---- real mode


@pytest.mark.spec("cpu.string_rep", "cpu.real_mode")
def test_real_mode_offsets_wrap(m: Machine) -> None:
    start(m, "rep stosb; hlt", "real", rdi=0x7_FFF0, rcx=0x9_0020, rax=0x77)
    m.seg("es").base = 0x100000
    lib.cpu_state_changed(m.cpu)
    m.run(lib.EXIT_HLT)
    assert m.ram[0x10FFF0:0x110010] == b"\x77" * 16 + bytes(16)
    assert m.ram[0x100000:0x100020] == b"\x77" * 16 + bytes(16)
    assert (m.reg("rdi"), m.reg("rcx")) == (0x7_0010, 0x9_0000)


@pytest.mark.spec("cpu.string_rep", "cpu.unreal")
@pytest.mark.tcg_differs("no limits: SDM vol. 3 5.3")
def test_address_size_prefix_in_real_mode_needs_the_limit(m: Machine) -> None:
    start(m, "addr32 rep movsb; hlt", "real", rsi=0x10_0000, rdi=0x18_0000, rcx=0x1_0001)
    m.load(SRC, pattern(0x10001))
    m.run(lib.EXIT_HLT)
    assert m.vector() == 13
    start(m, "addr32 rep movsb; hlt", "real", rsi=0x10_0000, rdi=0x18_0000, rcx=0x1_0001)
    for name in ("ds", "es"):
        m.seg(name).limit = 0xFFFFFFFF
    lib.cpu_state_changed(m.cpu)
    m.run(lib.EXIT_HLT)
    assert m.ram[0x180000:0x190001] == pattern(0x10001)
    assert m.reg("rcx") == 0
