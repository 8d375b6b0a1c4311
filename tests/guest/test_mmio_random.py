"""Any instruction on MMIO: random ones of the whole table, with any of the pages they touch a device.

Every case runs twice from the same state, on RAM and with some of the pages behind a device.  Both end alike:
registers, flags, x87 and vector registers, memory, the exception raised.  The device's log shows that no
piece of an instruction was read or written twice; of string instructions it is known to the byte.
An instruction of more pieces than the processor can replay (CPU_NR_MMIO) has to leave without a trace.

Source: exit.mmio and ctl.mmio in include/pykvm/cpu.h; tests/fuzz/generate.py for the instructions.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from pykvm.abi import ffi, lib
from tests.fuzz.generate import DATA, GS_BASE, RCX, RDI, RSI, Generator, Template, is_generated, table
from tests.fuzz.undefined import host
from tests.guest.bare import PD, Machine

if TYPE_CHECKING:
    import random

PAGE = 4096
PAGES = (0, 1, 3, 4)  # of DATA, as the generator knows them: 2 is missing, 3 is read-only
WRITABLE = (0, 1, 4)
DATA_TABLE, CODE_TABLE = 0x7000, 0x8000
CODE_RAM, DATA_RAM = 0x100000, 0x110000
CODE_LINEAR = 0x2000_0000
BP, SIZE = 3, 5 * PAGE
MASK64 = 2**64 - 1
CASES = 1500
# More pieces than an instruction may have: eight of 64 bytes, up to 31 frame pointers, or elements apart.
MANY_PIECES = {"fxsave", "fxrstor", "xsave", "xrstor", "xsavec", "xsaveopt", "xsaves", "xrstors", "enter"}
STRINGS = {
    "movs": (1, 1),
    "stos": (0, 1),
    "lods": (1, 0),
    "scas": (0, 1),
    "cmps": (1, 1),
}  # source, destination


@dataclass
class Device:
    """What is behind the MMIO pages, and what was done to it."""

    data: bytearray
    reads: list[tuple[int, int]] = field(default_factory=list)
    writes: list[tuple[int, int]] = field(default_factory=list)

    def read(self, m: Machine) -> None:
        piece = m.exit.mmio[0]
        at, n = piece.gpa - DATA_RAM, piece.len
        self.reads.append((at, n))
        answer = m.ctl.mmio[m.ctl.mmio_count]
        answer.gpa, answer.len = piece.gpa, n
        ffi.memmove(answer.data, bytes(self.data[at : at + n]), n)
        m.ctl.mmio_count += 1

    def write(self, m: Machine) -> None:
        for k in range(m.exit.mmio_count):
            piece = m.exit.mmio[k]
            at, n = piece.gpa - DATA_RAM, piece.len
            self.writes.append((at, n))
            self.data[at : at + n] = bytes(ffi.buffer(piece.data, n))


def new_machine(bits: int) -> Machine:
    m = Machine()
    m.long64(CODE_LINEAR, cpl=3)
    for entry in range(512):
        m.write(PD + 8 * entry, 0)
    m.load(DATA_TABLE, bytes(2 * PAGE))
    m.write(PD + 8 * (DATA >> 21), DATA_TABLE | 7)
    m.write(PD + 8 * (CODE_LINEAR >> 21), CODE_TABLE | 7)
    for page in PAGES:
        m.write(DATA_TABLE + 8 * page, DATA_RAM + PAGE * page | 0x60 | (7 if page in WRITABLE else 5))
    for page in (0, 1):
        m.write(CODE_TABLE + 8 * page, CODE_RAM + PAGE * page | 0x65)
    m.seg("gs").base = GS_BASE
    if bits < 64:
        m.seg("cs").ar = 0xC0FB if bits == 32 else 0x00FB
        m.seg("fs").ar = m.seg("gs").ar = 0x10000
    if bits == 16:
        m.seg("cs").base, m.seg("cs").limit = CODE_LINEAR, 0x1FFF
        for name, ar, limit in (("ds", 0xF3, 0x4FFB), ("ss", 0xF3, 0x4FFF), ("es", 0xF7, 0xFF)):
            m.seg(name).base, m.seg(name).ar, m.seg(name).limit = DATA, ar, limit
    m.guest.cr4 |= lib.X86_CR4_OSFXSR | lib.X86_CR4_OSXMMEXCPT | lib.X86_CR4_OSXSAVE
    m.guest.xcr0 = 7
    m.ctl.exception_bitmap = 2**32 - 1
    lib.cpu_state_changed(m.cpu)
    return m


@dataclass
class Start:
    """State and memory that a case begins with."""

    gpr: list[int]
    rflags: int
    ymm: bytes
    data: bytes


def choose(t: Template, r: random.Random) -> Start:
    gpr = [r.getrandbits(r.choice([3, 8, 16, 32, 64])) for _ in range(16)]
    for register, value in t.fixed.items():
        gpr[register] = value & MASK64
    data = bytearray(r.randbytes(SIZE))
    for at, size in t.zeroed:
        if DATA <= at < DATA + SIZE - size:
            data[at - DATA : at - DATA + size] = bytes(size)
    at, value = t.patch
    if DATA <= at < DATA + SIZE - 8:
        data[at - DATA : at - DATA + 8] = (value & MASK64).to_bytes(8, "little")
    rflags = 2 | r.getrandbits(12) & 0xCD5
    return Start(gpr, rflags, r.randbytes(512), bytes(data))


def prepare(m: Machine, t: Template, s: Start) -> None:
    g = m.guest
    code = bytearray(b"\xcc" * 2 * PAGE)
    at = t.rip & 0x1FFF
    code[at : at + len(t.bytes)] = t.bytes
    m.load(CODE_RAM, bytes(code))
    m.load(DATA_RAM, s.data)
    for k in range(16):
        g.gpr[k] = s.gpr[k]
    g.rip, g.rflags = t.rip, s.rflags
    g.cr2 = g.interruptibility = g.pending_dbg = 0
    fpu = g.fpu
    ffi.memmove(fpu.ymm, s.ymm, 512)
    ffi.memmove(fpu.st, s.ymm[:128], 128)
    fpu.fcw, fpu.fsw, fpu.ftw, fpu.fop, fpu.fip, fpu.fdp, fpu.mxcsr = 0x37F, 0, 0xFF, 0, 0, 0, 0x1F80
    m.ctl.mmio_count = m.ctl.entry_event.info = 0
    lib.cpu_state_changed(m.cpu)


def registers(m: Machine) -> tuple[object, ...]:
    g, f = m.guest, m.guest.fpu
    x87 = (f.fcw, f.fsw, f.ftw, f.fop, f.fip, f.fdp, f.mxcsr, ffi.buffer(f.st)[:])
    return (*g.gpr[0:16], g.rip, g.rflags, g.cr2, *x87, ffi.buffer(f.ymm)[:])


def finish(m: Machine, device: Device | None) -> str:
    """Run to the exception behind the instruction, or the one it raises: what ended it."""
    for _ in range(200_000):
        reason = m.enter()
        if reason == lib.EXIT_EXCEPTION:
            info = m.exit.intr_info
            return (
                f"exception {info & 0xFF} {m.exit.error_code:#x} {m.exit.gla if info & 0xFF == 14 else 0:#x}"
            )
        if reason == lib.EXIT_EMULATION:
            return "emulation"
        if reason == lib.EXIT_PREEMPTED:
            continue
        assert device is not None, f"exit {reason}"
        if reason == lib.EXIT_MMIO_READ:
            device.read(m)
        else:
            assert reason == lib.EXIT_MMIO_WRITE, f"exit {reason}"
            device.write(m)
    raise AssertionError("it does not end")


def pieces(linear: int, size: int, mmio: set[int]) -> list[tuple[int, int]]:
    """Of an access: those that the device sees."""
    first = min(size, PAGE - (linear & PAGE - 1))
    parts = [(linear - DATA, first), (linear - DATA + first, size - first)]
    return [(at, n) for at, n in parts if n and at // PAGE in mmio]


def string_accesses(
    t: Template, s: Start, m: Machine, bits: int, mmio: set[int]
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """What a string instruction that raised nothing must have read and written."""
    legacy = t.bytes[: next(k for k, b in enumerate(t.bytes) if b in range(0xA4, 0xB0))]
    size = 1 << (0 if "8-bit" in t.row.flags else (3 if bits == 64 and legacy[-1:] and legacy[-1] & 0xF8 == 0x48 else
                 1 if (0x66 in legacy) != (bits == 16) else 2))  # fmt: skip
    asize = (4 if 0x67 in legacy else 8) if bits == 64 else 2 if (bits == 16) != (0x67 in legacy) else 4
    mask = (1 << 8 * asize) - 1
    override = next((b for b in reversed(legacy) if b in {0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65}), None)
    base = DATA if bits == 16 else 0
    source_base = GS_BASE if override == 0x65 and bits == 64 else base
    repeated = {0xF2, 0xF3} & set(legacy)
    count = (s.gpr[RCX] - m.reg("rcx") & mask) if repeated else 1
    step = -size if s.rflags & 0x400 else size
    source, destination = STRINGS[t.row.name]
    reads, writes = [], []
    for k in range(count):
        if source:
            reads += pieces((s.gpr[RSI] + k * step & mask) + source_base, size, mmio)
        if destination:
            to = pieces((s.gpr[RDI] + k * step & mask) + base, size, mmio)
            if t.row.name in {"movs", "stos"}:
                writes += to
            else:
                reads += to
    return reads, writes


def touches_once(log: list[tuple[int, int]]) -> bool:
    touched = Counter(byte for at, n in log for byte in range(at, at + n))
    return not touched or max(touched.values()) == 1


class Pair:
    """The two processors, and what came of the cases."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.on_ram, self.on_device = new_machine(bits), new_machine(bits)
        self.mmio: set[int] = set()
        self.seen: Counter[str] = Counter()

    def set_pages(self, mmio: set[int]) -> None:
        for page in PAGES:
            if page in mmio and page not in self.mmio:
                self.on_device.map_mmio(DATA_RAM + PAGE * page)
            elif page in self.mmio and page not in mmio:
                self.on_device.map(DATA_RAM + PAGE * page)
        self.mmio = mmio

    def run(self, t: Template, r: random.Random) -> None:
        self.set_pages({page for page in PAGES if r.random() < 0.6} or {0, 1})
        s = choose(t, r)
        prepare(self.on_ram, t, s)
        expected = finish(self.on_ram, None)
        m, device = self.on_device, Device(bytearray(s.data))
        prepare(m, t, s)
        before = registers(m)
        got = finish(m, device)
        what = f"{t.bytes.hex()} {t.row.text}, pages {sorted(self.mmio)}"
        if got == "emulation":
            self.left(t, device, before, what)
            return
        assert got == expected, what
        assert registers(m) == registers(self.on_ram), what
        for page in PAGES:
            part = slice(DATA_RAM + PAGE * page, DATA_RAM + PAGE * (page + 1))
            here = device.data[PAGE * page : PAGE * (page + 1)] if page in self.mmio else m.ram[part]
            assert here == self.on_ram.ram[part], f"{what}: page {page}"
        self.check_log(t, s, device, got, what)
        self.seen["reads"] += bool(device.reads)
        self.seen["writes"] += bool(device.writes)
        self.seen[got.split()[1]] += 1

    def left(self, t: Template, device: Device, before: Any, what: str) -> None:
        """It was too much: nothing has happened, but that the device was read."""
        assert t.row.name in MANY_PIECES or t.row.is_gather, what
        assert registers(self.on_device) == before, what
        assert not device.writes, what
        self.seen["emulation"] += 1

    def check_log(self, t: Template, s: Start, device: Device, got: str, what: str) -> None:
        if t.row.form == "string":
            if got.startswith(f"exception {BP} "):
                assert (device.reads, device.writes) == string_accesses(
                    t, s, self.on_device, self.bits, self.mmio
                ), what
        elif not t.row.is_gather:
            assert touches_once(device.writes), f"{what}: {device.writes}"
            # ENTER reads frame pointers that it may have written; MASKMOV and the like read once as well
            assert touches_once(device.reads) or t.row.name == "enter", f"{what}: {device.reads}"


@pytest.mark.spec("cpu.page_crossing", "cpu.string_mmio", "cpu.reinject")
@pytest.mark.parametrize("bits", [64, 32, 16])
def test_random_instructions(bits: int) -> None:
    rows = [row for row in table() if is_generated(row, host()[2], bits) and "cpl0" not in row.flags]
    generator = Generator(f"mmio:{bits}", rows, bits)
    pair = Pair(bits)
    for t in generator.templates(CASES):
        pair.run(t, generator.random)
    assert pair.seen["reads"] > CASES / 10
    assert pair.seen["writes"] > CASES / 20
    assert pair.seen[str(BP)] > CASES / 2
