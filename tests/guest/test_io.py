"""IN, OUT, INS, OUTS on the bare processor: what an exit asks for, and what an answer does.

Source: SDM vol. 2 IN, INS, OUT, OUTS; include/pykvm/cpu.h, exit.io and ctl.pio_*.
"""

from __future__ import annotations

import pytest

from pykvm.abi import lib
from tests.guest.bare import CODE, PD, Machine

GP, PF = 13, 14
DATA = 0x100000
DF = 0x400
PORT = 0x3F8


@pytest.fixture
def m() -> Machine:
    return Machine()


def start(m: Machine, source: str, mode: str = "long64", cpl: int = 0, **registers: int) -> None:
    m.asm(source, CODE, bits={"long64": 64, "prot32": 32, "real": 16}[mode])
    if mode == "real":
        m.real(CODE)
    else:
        getattr(m, mode)(CODE, cpl)
    m.set(**registers)


def answer(m: Machine, size: int, *elements: int) -> None:
    data = b"".join(e.to_bytes(size, "little") for e in elements)
    for k, byte in enumerate(data):
        m.ctl.pio_data[k] = byte
    m.ctl.pio_pos, m.ctl.pio_count = 0, len(elements)


def asked(m: Machine) -> tuple[int, int, int, int, int, int]:
    io = m.exit.io
    return io.port, io.size, getattr(io, "in"), io.string, io.rep, io.count


@pytest.mark.spec("cpu.isa_int")
@pytest.mark.parametrize(
    ("source", "port", "size", "rax"),
    [
        ("in al, 0x60", 0x60, 1, 0x1122334455667781),
        ("in ax, 0x60", 0x60, 2, 0x1122334455668281),
        ("in eax, 0x60", 0x60, 4, 0x84838281),
        ("in al, dx", 0xCF8, 1, 0x1122334455667781),
        ("in ax, dx", 0xCF8, 2, 0x1122334455668281),
        ("in eax, dx", 0xCF8, 4, 0x84838281),
    ],
)
def test_in(m: Machine, source: str, port: int, size: int, rax: int) -> None:
    start(m, f"{source}; hlt", rax=0x1122334455667788, rdx=0xFFFF0CF8)
    for _ in range(2):  # without an answer it is executed again and asks again
        m.run(lib.EXIT_IO)
        assert asked(m) == (port, size, 1, 0, 0, 1)
        assert (m.guest.rip, m.reg("rax")) == (CODE, 0x1122334455667788)
    answer(m, size, 0x84838281 & (1 << 8 * size) - 1)
    m.run(lib.EXIT_HLT)
    assert m.reg("rax") == rax
    assert m.ctl.pio_count == m.ctl.pio_pos == 0


@pytest.mark.spec("cpu.isa_int")
@pytest.mark.parametrize(
    ("source", "port", "size"),
    [("out 0x80, al", 0x80, 1), ("out 0x80, ax", 0x80, 2), ("out dx, eax", 0xCFC, 4)],
)
def test_out(m: Machine, source: str, port: int, size: int) -> None:
    start(m, f"{source}; hlt", rax=0x1122334455667788, rdx=0xCFC)
    for _ in range(2):
        m.run(lib.EXIT_IO)
        assert asked(m) == (port, size, 0, 0, 0, 1)
        assert m.exit.io.data == 0x55667788 & (1 << 8 * size) - 1
        assert m.guest.rip == CODE
    m.ctl.pio_out_done = 1
    m.run(lib.EXIT_HLT)
    assert m.ctl.pio_out_done == 0


@pytest.mark.spec("cpu.string_io")
@pytest.mark.parametrize(("suffix", "size"), [("b", 1), ("w", 2), ("d", 4)])
def test_rep_ins_asks_for_what_fits_the_page_and_a_batch(m: Machine, suffix: str, size: int) -> None:
    count = 3000 // size
    start(m, f"rep ins{suffix}; hlt", rcx=count, rdi=DATA + 0x1000 - 512, rdx=PORT)
    sent: list[int] = []
    batches = []
    while m.run() == lib.EXIT_IO:
        n = m.exit.io.count
        assert asked(m) == (PORT, size, 1, 1, 1, n)
        assert m.reg("rcx") == count - len(sent)
        assert m.reg("rdi") == DATA + 0x1000 - 512 + size * len(sent)
        elements = [(7 * (len(sent) + k)) & (1 << 8 * size) - 1 for k in range(n)]
        answer(m, size, *elements)
        sent += elements
        batches.append(n)
    # KVM's pio_in_emulated(): the rest of the page counts in bytes whatever the element size
    assert batches[0] == min(512, 1024 // size)
    assert batches[1] == 1024 // size
    assert sum(batches) == count
    assert m.reg("rcx") == 0
    assert [m.read(DATA + 0x1000 - 512 + size * k, size) for k in range(count)] == sent


@pytest.mark.spec("cpu.string_io")
def test_ins_without_rep_and_backwards(m: Machine) -> None:
    start(m, "insw; std; rep insb; hlt", rcx=2, rdi=DATA, rdx=PORT)
    m.run(lib.EXIT_IO)
    assert asked(m) == (PORT, 2, 1, 1, 0, 1)
    answer(m, 2, 0x1234)
    m.run(lib.EXIT_IO)
    assert asked(m) == (PORT, 1, 1, 1, 1, 2)
    answer(m, 1, 0x56, 0x78)
    m.run(lib.EXIT_HLT)
    assert m.ram[DATA : DATA + 3] == bytes([0x34, 0x78, 0x56])
    assert m.reg("rdi") == DATA


@pytest.mark.spec("cpu.string_io", "cpu.pf_string_restart")
def test_ins_faults_before_the_port_is_read(m: Machine) -> None:
    start(m, "rep insb; hlt", rcx=8, rdi=0x40000000, rdx=PORT)
    m.run(lib.EXIT_HLT)
    assert m.vector() == PF
    assert (m.reg("rcx"), m.reg("rdi")) == (8, 0x40000000)


@pytest.mark.spec("cpu.string_io")
def test_ins_of_zero_elements_reads_nothing(m: Machine) -> None:
    start(m, "rep insb; rep outsb; hlt", rcx=0, rdi=0x40000000, rsi=0x40000000, rdx=PORT)
    m.run(lib.EXIT_HLT)
    assert m.guest.rip == CODE + 5


@pytest.mark.spec("cpu.string_io", "cpu.string_mmio")
def test_ins_to_mmio_writes_each_element(m: Machine) -> None:
    start(m, "rep insd; hlt", rcx=3, rdi=DATA + 8, rdx=PORT)
    m.map_mmio(DATA)
    writes: list[tuple[int, int, int]] = []
    while (reason := m.run()) != lib.EXIT_HLT:
        if reason == lib.EXIT_IO:
            answer(m, 4, *(0x100 + len(writes) + k for k in range(m.exit.io.count)))
        else:
            assert reason == lib.EXIT_MMIO_WRITE
            piece = m.exit.mmio[0]
            writes.append((piece.gpa, piece.len, int.from_bytes(bytes(piece.data[0:4]), "little")))
    assert writes == [(DATA + 8 + 4 * k, 4, 0x100 + k) for k in range(3)]


@pytest.mark.spec("cpu.string_io")
@pytest.mark.parametrize(("suffix", "size"), [("b", 1), ("w", 2), ("d", 4)])
def test_rep_outs_has_committed_each_element(m: Machine, suffix: str, size: int) -> None:
    start(m, f"rep outs{suffix}; hlt", rcx=5, rsi=DATA + 0xFFE, rdx=PORT)
    m.load(DATA + 0xFFE, bytes(range(1, 40)))
    got = []
    while m.run() == lib.EXIT_IO:
        got.append(m.exit.io.data)
        assert asked(m) == (PORT, size, 0, 1, 1, 1)
        assert m.reg("rcx") == 5 - len(got)
        assert m.reg("rsi") == DATA + 0xFFE + size * len(got)
    expected = bytes(range(1, 40))
    assert got == [int.from_bytes(expected[size * k : size * k + size], "little") for k in range(5)]


@pytest.mark.spec("cpu.string_io")
def test_outs_of_another_segment_in_real_mode(m: Machine) -> None:
    start(m, "mov ax, 0x1000; mov es, ax; es outsb; hlt", "real", rsi=0x5_0123, rdx=PORT)
    m.load(0x10123, b"\x5a")
    m.run(lib.EXIT_IO)
    assert m.exit.io.data == 0x5A
    assert m.reg("rsi") == 0x5_0124  # SI alone has moved
    m.run(lib.EXIT_HLT)


@pytest.mark.spec("cpu.cpl_rules")
@pytest.mark.parametrize("source", ["in al, 0x60", "out dx, eax", "insb", "rep outsb"])
def test_user_mode_without_iopl_is_gp(m: Machine, source: str) -> None:
    start(m, f"{source}; hlt", cpl=3, rcx=1, rsi=DATA, rdi=DATA)
    m.run(lib.EXIT_HLT)
    assert m.vector() == GP
    assert m.frame(2) == [0, CODE]


@pytest.mark.spec("cpu.string_io")
def test_ins_to_a_read_only_page_is_pf(m: Machine) -> None:
    start(m, "insb; hlt", rdi=DATA + 0x100000, rdx=PORT, cr0=0x80010033)
    m.write(PD + 8, 0x200000 | 0xE5)
    m.write(PD, 0x000000 | 0xE7)
    m.set(rdi=0x200000)
    lib.cpu_flush_tlb(m.cpu)
    m.run(lib.EXIT_HLT)
    assert m.vector() == PF
    assert m.guest.cr2 == 0x200000
