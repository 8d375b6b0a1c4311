"""The soft TLB and the slow paths of memory accesses: what may be stale, and what is in what order."""

from __future__ import annotations

import pytest

from pykvm.abi import lib
from tests.unit.cpu_machine import (
    NX,
    PAGE,
    PGE,
    ROOT,
    SD,
    SR,
    SW,
    SX,
    UD2,
    A,
    D,
    G,
    Machine,
    Outcome,
    P,
    Paging,
    U,
    W,
)

CODE_LA = 0x1000
LA = 0x40000000
LONG = Paging("4", cr3=ROOT)

LOAD = b"\x8a\x03"  # mov al, [rbx]
STORE = b"\x88\x03"  # mov [rbx], al
LOAD8 = b"\x48\x8b\x03"  # mov rax, [rbx]
STORE8 = b"\x48\x89\x03"  # mov [rbx], rax
INVLPG = b"\x0f\x01\x3b"  # invlpg [rbx]
MOV_CR3 = b"\x0f\x22\xd9"  # mov cr3, rcx


@pytest.fixture
def machine() -> Machine:
    m = Machine()
    m.map_linear(CODE_LA, CODE_LA)
    return m


def code(m: Machine, *insns: bytes, paging: Paging = LONG) -> None:
    m.put(CODE_LA, b"".join(insns) + UD2)
    m.load(paging)


def load(m: Machine, la: int) -> int:
    """Load a byte through the code that `code(m, LOAD)` wrote."""
    assert m.run(CODE_LA, la) == Outcome("ok")
    return int(m.guest.gpr[0]) & 0xFF


# ---- flushing -----------------------------------------------------------------------------------------


@pytest.mark.spec("mmu.tlb_model", "cpu.tlb_rules", "mmu.sync_invlpg")
@pytest.mark.parametrize("flags", [0, G])
def test_invlpg(machine: Machine, flags: int) -> None:
    m = machine
    m.put(0x5000, b"\x55")
    m.put(0x6000, b"\x66")
    entry = m.map_linear(LA, 0x5000, P | W | A | D | flags)
    # load, point the entry at the other frame, invlpg, load
    code(m, LOAD, b"\x48\x89\x3e", INVLPG, LOAD, paging=Paging("4", cr3=ROOT, pge=True))
    m.map_linear(0x2000000, entry & ~0xFFF)
    m.guest.gpr[6], m.guest.gpr[7] = 0x2000000 + (entry & 0xFFF), 0x6000 | P | W | A | D | flags
    assert load(m, LA) == 0x66


@pytest.mark.spec("mmu.tlb_model", "cpu.tlb_rules")
@pytest.mark.parametrize("level", [2, 3])
def test_invlpg_flushes_the_whole_large_page(machine: Machine, level: int) -> None:
    m = machine
    m.put(0x5000, b"\x55")
    m.put(0x105000, b"\x56")
    entry = m.map_linear(LA, 0, level=level)
    code(m, LOAD)
    assert load(m, LA + 0x5000) == 0x55
    assert load(m, LA + 0x105000) == 0x56
    m.poke(entry, 0)
    m.put(CODE_LA, INVLPG + LOAD + UD2)
    # invlpg anywhere in it
    assert m.run(CODE_LA, LA + 0x7000) == Outcome("pf", LA + 0x7000, 0)
    m.put(CODE_LA, LOAD + UD2)
    assert m.run(CODE_LA, LA + 0x5000) == Outcome("pf", LA + 0x5000, 0)
    assert m.run(CODE_LA, LA + 0x105000) == Outcome("pf", LA + 0x105000, 0)


@pytest.mark.spec("cpu.tlb_rules")
def test_invlpg_of_a_4_mib_page(machine: Machine) -> None:
    m = machine
    root = 0x10000
    m.poke(root, 0 | P | W | U | A | D | 0x80, 4)
    m.poke(root + 4, 0 | P | W | U | A | D | 0x80, 4)
    code(m, LOAD, paging=Paging("32", cr3=root))
    m.put(0x305000, b"\x77")
    assert load(m, 0x705000) == 0x77
    m.poke(root + 4, 0, 4)
    m.put(CODE_LA, INVLPG + UD2 + LOAD + UD2)
    assert m.run(CODE_LA, 0x401000) == Outcome("ok")
    assert m.run(CODE_LA + 5, 0x705000) == Outcome("pf", 0x705000, 0)


def test_invlpg_leaves_other_pages_alone(machine: Machine) -> None:
    m = machine
    for k in range(64):
        m.map_linear(LA + k * PAGE, 0x5000)
    code(m, LOAD)
    for k in range(64):
        load(m, LA + k * PAGE)
    m.put(CODE_LA, INVLPG + LOAD + UD2)
    walks, flushes = m.stats.walks, m.stats.tlb_flushes
    load(m, LA)
    for k in range(1, 64):
        m.put(CODE_LA, LOAD + UD2)
        load(m, LA + k * PAGE)
    assert m.stats.walks - walks == 1
    assert m.stats.tlb_flushes == flushes


@pytest.mark.spec("mmu.tlb_model", "mmu.global_pages", "mmu.sync_cr3", "cpu.tlb_rules")
def test_cr3_load_flushes_all_but_global_pages(machine: Machine) -> None:
    m = machine
    m.put(0x5000, b"\x55")
    m.put(0x6000, b"\x66")
    entry = m.map_linear(LA, 0x5000)
    kept = m.map_linear(LA + PAGE, 0x5000, P | W | A | D | G)
    paging = Paging("4", cr3=ROOT, pge=True)
    code(m, LOAD, paging=paging)
    assert load(m, LA) == load(m, LA + PAGE) == 0x55
    m.poke(entry, 0x6000 | P | A | D)
    m.poke(kept, 0x6000 | P | A | D | G)
    m.put(CODE_LA, MOV_CR3 + LOAD + UD2)
    m.guest.gpr[1] = ROOT
    assert load(m, LA) == 0x66
    assert load(m, LA + PAGE) in (0x55, 0x66)
    # toggling PGE flushes global ones too: mov cr4, rcx twice
    m.put(CODE_LA, b"\x0f\x20\xe1\x80\xf1\x80\x0f\x22\xe1\x80\xf1\x80\x0f\x22\xe1" + LOAD + UD2)
    m.ctl.cr4_valid = ~0 & (1 << 64) - 1
    assert load(m, LA + PAGE) == 0x66
    assert m.guest.cr4 & PGE


@pytest.mark.spec("cpu.tlb_rules")
def test_a_page_replaced_by_a_local_one_does_not_outlive_a_cr3_load(machine: Machine) -> None:
    m = machine
    m.put(0x5000, b"\x55")
    m.put(0x6000, b"\x66")
    code(m, LOAD, paging=Paging("4", cr3=ROOT, pge=True))
    entry = m.map_linear(LA, 0x5000, P | A | D | G)
    for flags, frame in ((G, 0x5000), (0, 0x6000), (G, 0x5000), (0, 0x6000), (0, 0x5000)):
        m.poke(entry, frame | P | A | D | flags)
        m.put(CODE_LA, INVLPG + LOAD + UD2)
        assert load(m, LA) == frame >> 12 | frame >> 8
    m.poke(entry, 0)
    m.put(CODE_LA, MOV_CR3 + LOAD + UD2)
    m.guest.gpr[1] = ROOT
    assert m.run(CODE_LA, LA) == Outcome("pf", LA, 0)


@pytest.mark.spec("mmu.tlb_model")
def test_more_rights_need_no_flush(machine: Machine) -> None:
    m = machine
    entry = m.map_linear(LA, 0x5000, P | A)
    code(m, LOAD, STORE)
    assert m.run(CODE_LA, LA) == Outcome("pf", LA, 3)
    m.poke(entry, 0x5000 | P | W | A)
    assert m.run(CODE_LA, LA) == Outcome("ok")
    absent = m.map_linear(LA + PAGE, 0x5000, 0)
    assert m.run(CODE_LA, LA + PAGE) == Outcome("pf", LA + PAGE, 0)
    m.poke(absent, 0x5000 | P | W)
    assert m.run(CODE_LA, LA + PAGE) == Outcome("ok")
    closed = m.map_linear(LA + 2 * PAGE, 0x1000, P | A | NX)
    m.put(CODE_LA, UD2)
    assert m.run(LA + 2 * PAGE) == Outcome("pf", LA + 2 * PAGE, 0x11)
    m.poke(closed, 0x1000 | P | A)
    assert m.run(LA + 2 * PAGE) == Outcome("ok")


@pytest.mark.spec("mmu.smp_flush")
@pytest.mark.parametrize("how", ["request", "flush"])
def test_sptes_taken_away_are_not_used_after_a_flush(machine: Machine, how: str) -> None:
    m = machine
    m.map_linear(LA, 0x5000)
    code(m, LOAD, STORE)
    assert m.run(CODE_LA, LA) == Outcome("ok")
    assert m.spte(5) & SD
    m.map(5, SR | SX)
    if how == "request":
        lib.cpu_request(m.cpu, lib.CPU_REQ_FLUSH_TLB)
        lib.cpu_sync(m.cpu)
    else:
        lib.cpu_flush_tlb(m.cpu)
    assert m.run(CODE_LA, LA) == Outcome("ept", 0x5000, 2 | (SR | SX) << 3 | 0x180)
    m.map(5, SR | SW | SX)
    assert m.run(CODE_LA, LA) == Outcome("ok")
    assert m.spte(5) & SD


def test_another_root_needs_no_flush(machine: Machine) -> None:
    m, other = machine, Machine()
    code(m, LOAD, paging=Paging("none"))
    m.put(0x5000, b"\x55")
    other.put(0x5000, b"\x66")
    other.put(CODE_LA, LOAD + UD2)
    assert load(m, 0x5000) == 0x55
    m.ctl.eptp = other.ctl.eptp
    assert load(m, 0x5000) == 0x66


def test_dirty_is_set_when_a_page_that_was_read_is_written(machine: Machine) -> None:
    m = machine
    entry = m.map_linear(LA, 0x5000, P | W | A)
    code(m, LOAD)
    load(m, LA)
    assert not m.spte(5) & SD
    m.put(CODE_LA, STORE + UD2)
    assert m.run(CODE_LA, LA) == Outcome("ok")
    assert m.spte(5) & SD
    assert m.peek(entry) & D


def test_pages_that_collide_do_not_thrash(machine: Machine) -> None:
    m = machine
    stride = 32 << 20  # source and destination of c_mem/4
    for k in range(4):
        m.map_linear(LA + k * stride, 0x5000)
    # 1000 times: mov al, [rbx]; mov al, [rbx + stride]; mov al, [rbx + 2 * stride]
    far = b"".join(b"\x8a\x83" + (k * stride).to_bytes(4, "little") for k in range(4))
    code(m, b"\xb9\xe8\x03\x00\x00", far, b"\xff\xc9\x75" + bytes([256 - len(far) - 4]))
    walks = m.stats.walks
    load(m, LA)
    assert m.stats.walks - walks <= 5


# ---- page crossing ------------------------------------------------------------------------------------


@pytest.mark.spec("cpu.page_crossing")
@pytest.mark.parametrize("insn", [LOAD8, STORE8, b"\x48\x01\x03"])  # add [rbx], rax
def test_crossing_faults_at_the_first_byte_that_faults(machine: Machine, insn: bytes) -> None:
    m = machine
    m.map_linear(LA, 0x5000, P | W)
    second = m.map_linear(LA + PAGE, 0x7000, 0)
    code(m, insn)
    write = 0 if insn == LOAD8 else 2
    m.put(0x5FFC, b"\1\2\3\4")
    m.guest.gpr[0] = 0x1111111111111111
    assert m.run(CODE_LA, LA + PAGE - 4) == Outcome("pf", LA + PAGE, write)
    assert m.peek(0x5FFC, 4) == 0x04030201
    assert m.run(CODE_LA, LA + 2 * PAGE - 4) == Outcome("pf", LA + 2 * PAGE - 4, write)
    m.poke(second, 0x7000 | P | W)
    assert m.run(CODE_LA, LA + PAGE - 4) == Outcome("ok")
    if insn == STORE8:
        assert m.peek(0x5FFC, 4) == m.peek(0x7000, 4) == 0x11111111
    elif insn != LOAD8:
        assert (m.peek(0x5FFC, 4), m.peek(0x7000, 4)) == (0x15141312, 0x11111111)


@pytest.mark.spec("cpu.page_crossing", "exit.MMIO")
def test_mmio_that_crosses_a_page_comes_in_pieces(machine: Machine) -> None:
    m = machine
    m.map_linear(LA, 0x1234000)
    m.map_linear(LA + PAGE, 0x5678000)
    m.map_mmio(0x1234)
    m.map_mmio(0x5678)
    code(m, LOAD8)
    assert m.run(CODE_LA, LA + PAGE - 3) == Outcome("mmio-read", 0x1234FFD, 3)
    answer(m, b"\x11\x22\x33")
    assert m.outcome(lib.cpu_complete(m.cpu)) == Outcome("mmio-read", 0x5678000, 5)
    assert m.guest.rip == CODE_LA
    answer(m, b"\x44\x55\x66\x77\x88")
    assert lib.cpu_complete(m.cpu) == lib.EXIT_NONE
    assert m.guest.gpr[0] == 0x8877665544332211
    assert m.ctl.mmio_count == 0

    m.put(CODE_LA, STORE8 + UD2)
    assert m.run(CODE_LA, LA + PAGE - 3) == Outcome("mmio-write", 0x1234FFD, 3)
    assert posted(m) == [(0x1234FFD, b"\x11\x22\x33"), (0x5678000, b"\x44\x55\x66\x77\x88")]
    assert m.guest.rip == CODE_LA + 3


def answer(m: Machine, data: bytes) -> None:
    """Give the data of the MMIO read that the processor left for."""
    want = m.exit.mmio[0]
    assert want.len == len(data)
    piece = m.ctl.mmio[m.ctl.mmio_count]
    piece.gpa, piece.len, piece.data[0 : len(data)] = want.gpa, want.len, data
    m.ctl.mmio_count += 1


def posted(m: Machine) -> list[tuple[int, bytes]]:
    pieces = m.exit.mmio[0 : m.exit.mmio_count]
    return [(p.gpa, bytes(p.data)[: p.len]) for p in pieces]


def test_store_across_memory_and_mmio(machine: Machine) -> None:
    m = machine
    m.map_mmio(6)
    code(m, b"\x89\x03", paging=Paging("none"))  # mov [ebx], eax
    m.guest.gpr[0] = 0x44332211
    assert m.run(CODE_LA, 0x5FFE) == Outcome("mmio-write", 0x6000, 2)
    assert posted(m) == [(0x6000, b"\x33\x44")]
    assert m.peek(0x5FFE, 2) == 0x2211


@pytest.mark.spec("exit.MMIO")
def test_modify_mmio(machine: Machine) -> None:
    m = machine
    m.map_mmio(6)
    code(m, b"\x01\x03", paging=Paging("none"))  # add [rbx], eax
    m.guest.gpr[0] = 1
    assert m.run(CODE_LA, 0x6010) == Outcome("mmio-read", 0x6010, 4)
    answer(m, b"\xff\x00\x00\x00")
    assert m.outcome(lib.cpu_complete(m.cpu)) == Outcome("mmio-write", 0x6010, 4)
    assert posted(m) == [(0x6010, b"\x00\x01\x00\x00")]


@pytest.mark.spec("mmu.mmio_gen")
def test_mmio_of_an_older_generation_is_an_ept_violation(machine: Machine) -> None:
    m = machine
    m.map_mmio(6)
    code(m, LOAD, paging=Paging("none"))
    assert m.run(CODE_LA, 0x6010) == Outcome("mmio-read", 0x6010, 1)
    m.ctl.mmio_gen = 0x20
    assert m.run(CODE_LA, 0x6010) == Outcome("ept", 0x6010, 1 | 0x180)


# ---- read-only memory ----------------------------------------------------------------------------------


def test_writes_to_an_emulated_frame_are_posted(machine: Machine) -> None:
    m = machine
    m.map(5, SR | SX)
    m.put(0x5010, b"\x10\x20")
    code(m, b"\x66\x01\x03", paging=Paging("none"))  # add [rbx], ax
    m.guest.gpr[0] = 1
    assert m.run(CODE_LA, 0x5010) == Outcome("ept", 0x5010, 2 | (SR | SX) << 3 | 0x180)
    m.ctl.emulate[0].gfn, m.ctl.emulate_count = 5, 1
    assert m.outcome(lib.cpu_complete(m.cpu)) == Outcome("mmio-write", 0x5010, 2)
    assert posted(m) == [(0x5010, b"\x11\x20")]
    assert m.peek(0x5010, 2) == 0x2010
    assert m.ctl.emulate_count == 0


# ---- code ---------------------------------------------------------------------------------------------


@pytest.mark.spec("cpu.smc")
def test_stores_into_code(machine: Machine) -> None:
    m = machine
    # mov byte [rip + 1], 0x77; mov al, 0x11
    code(m, b"\xc6\x05\x01\x00\x00\x00\x77\xb0\x11")
    for value in (0x77, 0x77):
        assert load(m, 0) == value
    # through another mapping, and in another page than the code that runs
    m.map_linear(LA, 0x1000)
    m.map_linear(LA + PAGE, 0x9000)
    m.put(0x9000, b"\xb0\x11\xc3")  # mov al, 11h; ret
    m.map_linear(0x200000, 0x20000)
    m.guest.gpr[4] = 0x200800
    # call rsi; mov [rbx], cl; call rsi
    code(m, b"\xff\xd6\x88\x0b\xff\xd6")
    m.guest.gpr[6], m.guest.gpr[1] = LA + PAGE, 0x99
    m.map_linear(LA + 2 * PAGE, 0x9000)
    assert load(m, LA + 2 * PAGE + 1) == 0x99


def test_locked_operations_beside_code_are_done_in_place(machine: Machine) -> None:
    m = machine
    code(m, b"\xf0\x48\x0f\xc1\x03")  # lock xadd [rbx], rax
    m.guest.gpr[0] = 5
    m.poke(CODE_LA + 0x800, 37)
    assert m.run(CODE_LA, CODE_LA + 0x800) == Outcome("ok")
    assert (m.guest.gpr[0], m.peek(CODE_LA + 0x800)) == (37, 42)


# ---- data breakpoints ---------------------------------------------------------------------------------

BOTH, ON_WRITE = 3, 1


@pytest.mark.spec("cpu.dr_breakpoints")
@pytest.mark.parametrize(
    ("insn", "offset", "kind", "length", "hit"),
    [
        (STORE, 0, ON_WRITE, 1, True),
        (STORE, 1, ON_WRITE, 1, False),
        (LOAD, 0, ON_WRITE, 1, False),
        (LOAD, 0, BOTH, 1, True),
        (LOAD8, -7, BOTH, 1, True),
        (LOAD8, -8, BOTH, 1, False),
        (STORE8, 3, ON_WRITE, 4, True),
        (STORE8, 8, ON_WRITE, 8, False),
        (b"\x48\x01\x03", 4, ON_WRITE, 8, True),
    ],
)
def test_data_breakpoints(
    machine: Machine, insn: bytes, offset: int, kind: int, length: int, hit: bool
) -> None:
    m = machine
    m.map_linear(LA, 0x5000)
    code(m, insn, b"\x90\x90")
    m.ctl.exception_bitmap |= 2
    assert m.run(CODE_LA, LA + 0x100) == Outcome("ok")  # the page is in the TLB before
    m.guest.dr[2] = LA + 0x100
    m.guest.dr7 = 0x400 | 1 << 4 | kind << 24 | {1: 0, 2: 1, 4: 3, 8: 2}[length] << 26
    reason = m.run_raw(CODE_LA, LA + 0x100 + offset)
    assert reason == lib.EXIT_EXCEPTION
    assert m.exit.intr_info & 0xFF == (1 if hit else 6)
    if hit:
        assert m.exit.qualification & 0xF == 4
        assert m.guest.rip == CODE_LA + len(insn)
    m.guest.dr7 = 0x400
    m.guest.pending_dbg = 0
    assert m.run(CODE_LA, LA + 0x100) == Outcome("ok")
