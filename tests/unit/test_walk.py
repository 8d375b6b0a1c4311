"""The processor's page walker against an independent one.

Guests are one instruction and a UD2, at CPL 0 or 3, run by `cpu_enter` on guest tables and SPTEs made
here.  `reference_walk` is written from SDM vol. 3 chapter 4 and 28.3 alone.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from pykvm.abi import ffi, lib
from tests.unit.cpu_machine import (
    NX,
    PAGE,
    PS,
    ROOT,
    SA,
    SD,
    SPS,
    SR,
    SU,
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
)  # fmt: skip

READ, WRITE, FETCH, MODIFY = "read", "write", "fetch", "modify"
# mov al, [rbx]; mov [rbx], al; lock add [rbx], al
CODE = {READ: b"\x8a\x03" + UD2, WRITE: b"\x88\x03" + UD2, MODIFY: b"\xf0\x00\x03" + UD2}


@pytest.fixture
def machine() -> Machine:
    return Machine()


# ---- the reference ------------------------------------------------------------------------------------


class WalkError(Exception):
    """Ends a reference walk with an outcome."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome


def bits(low: int, high: int) -> int:
    """Mask of bits low..high."""
    return (1 << high + 1) - (1 << low) if high >= low else 0


@dataclass
class Walk:
    """One reference walk: what it found on its way down."""

    m: Machine
    p: Paging
    la: int
    kind: str
    entries: list[tuple[int, int, int]] = field(default_factory=list)  # gpa, value, size

    @property
    def write(self) -> bool:
        return self.kind in (WRITE, MODIFY)

    def fault(self, code: int) -> WalkError:
        code |= 2 if self.write else 0
        code |= 4 if self.p.user else 0
        if self.kind == FETCH and (self.p.smep or (self.p.nxe and self.p.mode in ("pae", "4", "5"))):
            code |= 16
        return WalkError(Outcome("pf", self.la, code))

    def second_level(self, gpa: int, need: int, how: int, gla: int) -> None:
        """Check the SPTE of a guest-physical address."""
        spte = self.m.spte(gpa >> 12)
        if spte & 7 == lib.SPTE_MMIO and spte & 0x7F8 == 0x18:
            raise WalkError(Outcome("mmio", gpa))
        present = spte & 7 if spte & 1 else 0
        if need & ~present:
            raise WalkError(Outcome("ept", gpa, how | present << 3 | gla))

    def read(self, gpa: int, size: int) -> int:
        try:
            self.second_level(gpa, SR, 1, 0x80)
        except WalkError as fault:
            if fault.outcome.what == "mmio":
                raise self.fault(0) from None
            raise
        value = self.m.peek(gpa, size)
        if not value & P:
            raise self.fault(0)
        self.entries.append((gpa, value, size))
        return value

    def tables(self) -> tuple[int, int, int, bool]:
        """Return gpa, writable, user and no-execute."""
        if self.p.mode == "none":
            return self.la, W, U, False
        if self.p.mode == "32":
            return self.tables32()
        high = bits(self.p.maxphyaddr, 51) | (0 if self.p.nxe else NX)
        if self.p.mode == "pae":
            pdpte = self.p.pdptr[self.la >> 30]
            if not pdpte & P:
                raise self.fault(0)
            return self.tables64(2, pdpte & bits(12, 51), high | bits(52, 62))
        return self.tables64(int(self.p.mode), self.p.cr3 & bits(12, 51), high)

    def tables32(self) -> tuple[int, int, int, bool]:
        pde = self.read((self.p.cr3 & ~0xFFF) + (self.la >> 22) * 4, 4)
        if pde & PS and self.p.pse:
            if pde & bits(min(self.p.maxphyaddr, 40) - 19, 21):
                raise self.fault(9)
            gpa = (pde & bits(22, 31)) + ((pde >> 13 & 0xFF) << 32) + (self.la & bits(0, 21))
            return gpa, pde & W, pde & U, False
        pte = self.read((pde & ~0xFFF) + (self.la >> 12 & 1023) * 4, 4)
        return (pte & ~0xFFF) + (self.la & 0xFFF), pde & pte & W, pde & pte & U, False

    def tables64(self, level: int, table: int, high: int) -> tuple[int, int, int, bool]:
        writable, user, nx = W, U, False
        while True:
            shift = 3 + 9 * level
            entry = self.read(table + (self.la >> shift & 511) * 8, 8)
            leaf = level == 1 or bool(entry & PS)
            if entry & high or (entry & PS and level > 3):
                raise self.fault(9)
            if leaf and level > 1 and entry & bits(13, shift - 1):
                raise self.fault(9)
            writable &= entry
            user &= entry
            nx = nx or bool(entry & NX)
            if leaf:
                return (entry & bits(shift, 51)) + (self.la & bits(0, shift - 1)), writable, user, nx
            table = entry & bits(12, 51)
            level -= 1

    def check(self, writable: int, user: int, nx: bool) -> None:
        p, code = self.p, 1
        if p.mode == "none":
            return
        bad = bool(p.user and not user)
        if self.kind == FETCH:
            bad = bad or nx or bool(p.smep and user and not p.user)
        else:
            bad = bad or bool(p.smap and user and not p.user and not p.ac)
            bad = bad or bool(self.write and not writable and (p.user or p.wp))
            if p.pke and p.long and user:
                key = self.entries[-1][1] >> 59 & 15
                access_disable, write_disable = p.pkru >> 2 * key & 1, p.pkru >> 2 * key & 2
                if access_disable or (write_disable and self.write and (p.user or p.wp)):
                    bad = True
                    code |= 32
        if bad:
            raise self.fault(code)

    def accessed_dirty(self) -> dict[int, tuple[int, int]]:
        """Return the entries after the walk: gpa to (value, size)."""
        after: dict[int, tuple[int, int]] = {}
        for i, (gpa, value, size) in enumerate(self.entries):
            want = value | A | (D if self.write and i == len(self.entries) - 1 else 0)
            if want != value:
                self.second_level(gpa, SW, 3, 0x80)
            # the same entry may serve two levels
            after[gpa] = (want | after.get(gpa, (0, 0))[0], size)
        return after


def reference_walk(m: Machine, p: Paging, la: int, kind: str) -> tuple[Outcome, dict[int, tuple[int, int]]]:
    """Return the outcome of an access, and the guest's entries after it where that is certain."""
    walk = Walk(m, p, la, kind)
    after: dict[int, tuple[int, int]] = {}
    try:
        gpa, writable, user, nx = walk.tables()
        walk.check(writable, user, nx)
        after = walk.accessed_dirty()
        need, how = {READ: (SR, 1), FETCH: (SX, 4)}.get(kind, (SW, 2))
        walk.second_level(gpa, need, how, 0x180)
    except WalkError as fault:
        if fault.outcome.what != "mmio":
            return fault.outcome, after
        what = {READ: "mmio-read", WRITE: "mmio-write", MODIFY: "mmio-read", FETCH: "emulation"}[kind]
        if kind == FETCH:
            return Outcome("emulation"), after
        return Outcome(what, fault.outcome.address, 1), after
    return Outcome("ok"), after


# ---- random tables ------------------------------------------------------------------------------------

CODE_PAGE = 1  # gfn
POOL = range(64, 256)  # frames of tables and pages under test


class Guest:
    """Builds the tables of one random case: the code's own mapping, and the path of `la`."""

    def __init__(self, m: Machine, rng: random.Random, mode: str) -> None:
        self.m, self.rng = m, rng
        chance = self.chance
        self.p = Paging(
            mode,
            wp=chance(60), pse=chance(80), pge=chance(50), smep=chance(30), smap=chance(30),
            pke=mode in ("4", "5") and chance(40), nxe=chance(75), pkru=rng.getrandbits(32),
            ac=chance(50), user=chance(50), maxphyaddr=rng.choice([32, 36, 38, 40, 46, 52]),
        )  # fmt: skip
        self.frames = iter(rng.sample(POOL, 16))
        for gfn in range(16):
            m.memory[gfn * PAGE : (gfn + 1) * PAGE] = bytes(PAGE)
        for offset, code in enumerate(CODE.values()):
            m.memory[CODE_PAGE * PAGE + offset * 16 : CODE_PAGE * PAGE + offset * 16 + len(code)] = code

    def chance(self, percent: int) -> bool:
        return self.rng.randrange(100) < percent

    def frame(self) -> int:
        """Return a clean frame of the pool, with its SPTE whole."""
        gfn = next(self.frames)
        self.m.memory[gfn * PAGE : (gfn + 1) * PAGE] = UD2 * (PAGE // 2)
        self.m.map(gfn, SR | SW | SX)
        return gfn

    def table_frame(self) -> int:
        gfn = next(self.frames)
        self.m.memory[gfn * PAGE : (gfn + 1) * PAGE] = bytes(PAGE)
        self.m.map(gfn, SR | SW)
        return gfn

    def flags(self, level: int) -> int:
        """Random low and high bits of an entry that points somewhere."""
        rng, chance = self.rng, self.chance
        e = P if chance(96) else 0
        for bit, percent in ((W, 75), (U, 75), (A, 50), (D, 50), (8, 20), (16, 20), (G, 30), (0xE00, 10)):
            e |= bit if chance(percent) else 0
        if self.p.mode != "32":
            e |= NX if chance(12) else 0
            e |= rng.getrandbits(7) << 52 if self.p.long and chance(30) else 0
            e |= rng.getrandbits(4) << 59 if self.p.long else 0
            if chance(4):
                e |= 1 << rng.randrange(32, 63)
        if level > 1 and chance(3):
            e |= PS
        return e

    def spoil(self, gfn: int, rights: int) -> None:
        """Take some rights of a frame away, or the frame."""
        what = self.rng.randrange(100)
        if what < 3:
            self.m.set_spte(gfn, 0)
        elif what < 6:
            self.m.map_mmio(gfn)
        elif what < 8:
            self.m.map_mmio(gfn, 0x20)  # of another generation
        elif what < 20:
            self.m.map(gfn, rights & self.rng.randrange(8))

    def target(self, align: int) -> int:
        """Return the address of a page of `align` bytes to map."""
        if align == PAGE:
            gfn = self.frame()
            self.spoil(gfn, SR | SW | SX)
            return gfn * PAGE
        return 0 if self.chance(85) else self.rng.getrandbits(20) << 13

    def build(self) -> tuple[int, int]:
        """Return the code's linear address and the one under test."""
        if self.p.mode == "none":
            gfn = self.frame()
            self.spoil(gfn, SR | SW | SX)
            return CODE_PAGE * PAGE, gfn * PAGE
        code_flags = P | W | A | D | (U if self.p.user else 0)
        if self.p.mode == "32":
            return self.build32(code_flags)
        if self.p.mode == "pae":
            pd, code_pd = self.table_frame(), 2
            index = self.rng.randrange(3)
            self.p.pdptr[index] = pd * PAGE | (P if self.chance(97) else 0)
            self.p.pdptr[3] = code_pd * PAGE | P
            self.m.poke(code_pd * PAGE, 3 * PAGE | code_flags)
            self.m.poke(3 * PAGE, CODE_PAGE * PAGE | code_flags)
            return 3 << 30, self.path64(2, pd, index << 30)
        root, top = self.table_frame(), int(self.p.mode)
        self.p.cr3 = root * PAGE
        table, code = root, 0
        for level in range(top, 0, -1):
            index = 511 if level == top else 0
            child = CODE_PAGE if level == 1 else top + 3 - level
            self.m.poke(table * PAGE + index * 8, child * PAGE | code_flags)
            code |= index << 3 + 9 * level
            table = child
        code |= -1 << 12 + 9 * top
        return code & bits(0, 63), self.path64(top, root, 0, limit=255)

    def path64(self, level: int, table: int, la: int, limit: int = 511) -> int:
        while True:
            index = self.rng.randrange(limit + 1 if limit != 511 else 512)
            limit = 511
            shift = 3 + 9 * level
            la |= index << shift
            e = self.flags(level)
            large = level in (2, 3) and self.chance(25)
            if level == 1 or large or e & PS:
                e |= PS if large else 0
                e |= self.target(1 << shift)
                self.m.poke(table * PAGE + index * 8, e)
                # a large page starts at gpa 0: stay inside the pool
                return la | (self.frame() * PAGE & bits(0, shift - 1) if level > 1 else 0)
            child = self.table_frame()
            self.m.poke(table * PAGE + index * 8, e | child * PAGE)
            if self.chance(25):
                self.spoil(child, SR | SW)
            table, level = child, level - 1

    def build32(self, code_flags: int) -> tuple[int, int]:
        root = self.table_frame()
        self.p.cr3 = root * PAGE
        self.m.poke(root * PAGE + 1023 * 4, 2 * PAGE | code_flags, 4)
        self.m.poke(2 * PAGE, CODE_PAGE * PAGE | code_flags, 4)
        index, sub = self.rng.randrange(1023), self.rng.randrange(1024)
        pde = self.flags(2)
        if self.chance(30) or pde & PS:
            pde |= PS
        if pde & PS and self.p.pse:
            if self.chance(20):
                pde |= 1 << self.rng.randrange(13, 22)
            self.m.poke(root * PAGE + index * 4, pde, 4)
            return 1023 << 22, index << 22 | self.frame() * PAGE
        table = self.table_frame()
        self.m.poke(root * PAGE + index * 4, pde | table * PAGE, 4)
        if self.chance(25):
            self.spoil(table, SR | SW)
        self.m.poke(table * PAGE + sub * 4, self.flags(1) | self.target(PAGE), 4)
        return 1023 << 22, index << 22 | sub << 12


def expect(m: Machine, p: Paging, code: int, la: int, kind: str, note: str) -> str:
    """Run one access on both walkers; returns what came of it."""
    want, after = reference_walk(m, p, la, kind)
    m.load(p)
    got = m.run(la, 0) if kind == FETCH else m.run(code + 16 * list(CODE).index(kind), la)
    assert got == want, f"{note}: {kind} {la:#x} {p}"
    if want.what in ("ok", "pf"):
        for gpa, (value, size) in after.items():
            assert m.peek(gpa, size) == value, f"{note}: entry at {gpa:#x}, {kind} {la:#x} {p}"
    if want.what != "ok":
        assert m.guest.rip == (la if kind == FETCH else code + 16 * list(CODE).index(kind)) or (
            want.what == "mmio-write"
        )
    return want.what


@pytest.mark.spec("mmu.correctness", "mmu.levels", "mmu.pse36", "mmu.walk_addr", "mmu.fault_injection",
                  "mmu.ad_bits", "cpu.paging_modes", "cpu.pf_error_code", "cpu.reserved_bits",
                  "cpu.nx_smep_smap", "cpu.wp", "cpu.large_pages")  # fmt: skip
@pytest.mark.parametrize("mode", ["none", "32", "pae", "4", "5"])
def test_random_walks(machine: Machine, mode: str) -> None:
    rng = random.Random(f"walk {mode}")
    seen: dict[str, int] = {}
    for case in range(40 if mode == "none" else 500):
        kind = rng.choice([READ, WRITE, FETCH, MODIFY])
        guest = Guest(machine, rng, mode)
        code, la = guest.build()
        if kind == FETCH and la & 1:
            continue
        what = expect(machine, guest.p, code, la, kind, f"case {case}")
        seen[what] = seen.get(what, 0) + 1
        for gfn in POOL:
            if machine.spte(gfn) & ~lib.SPTE_PFN != SR | SW | SX:
                machine.map(gfn, SR | SW | SX)
    # The cases must not all be of one sort.
    assert seen["ok"] > (10 if mode == "none" else 80)
    assert seen["ept"]
    assert mode == "none" or seen["pf"] > 60


# ---- directed -----------------------------------------------------------------------------------------

CODE_LA = 0x1000  # of gpa 0x1000
DATA = 0x40000000
LONG = Paging("4", cr3=ROOT)


def long_mode(m: Machine, code: bytes, paging: Paging = LONG) -> None:
    """Map and write the code, user-accessible when the paging says CPL 3; load the mode."""
    m.map_linear(CODE_LA, CODE_LA, P | W | A | D | (U if paging.user else 0))
    m.put(CODE_LA, code)
    m.load(paging)


@pytest.mark.spec("cpu.long_mode")
@pytest.mark.parametrize(
    ("la", "code", "what"),
    [
        (0x0000_8000_0000_0000, b"\x8a\x03", "gp"),  # mov al, [rbx]
        (0xFFFF_7FFF_FFFF_FFFF, b"\x88\x03", "gp"),
        (0x0000_7FFF_FFFF_FFFC, b"\x48\x8b\x03", "gp"),  # mov rax, [rbx]: only the end is outside
        (0x8000_0000_0000_0000, b"\x48\x89\xdd\x8a\x45\x00", "ss"),  # mov rbp, rbx; mov al, [rbp]
    ],
)
def test_non_canonical(machine: Machine, la: int, code: bytes, what: str) -> None:
    long_mode(machine, code + UD2)
    assert machine.run(CODE_LA, la) == Outcome(what)


@pytest.mark.spec("cpu.la57")
def test_la57_makes_more_addresses_canonical(machine: Machine) -> None:
    m = machine
    top = 0x3F0000
    m.poke(top, ROOT | P | W | A)
    long_mode(m, b"\x8a\x03" + UD2, Paging("5", cr3=top))
    assert m.run(CODE_LA, 1 << 55) == Outcome("pf", 1 << 55, 0)
    assert m.run(CODE_LA, 1 << 56) == Outcome("gp")


@pytest.mark.spec("mmu.nonpaging")
def test_linear_addresses_wrap_at_4_gib_outside_64_bit_mode(machine: Machine) -> None:
    m = machine
    m.map(0xFFFFF, to=2)
    m.put(CODE_LA, b"\x8b\x03" + UD2)  # mov eax, [ebx]
    m.put(2 * PAGE + 0xFFE, b"\x11\x22")
    m.put(0, b"\x33\x44")
    m.load(Paging("none"))
    assert m.run(CODE_LA, 0xFFFFFFFE) == Outcome("ok")
    assert m.guest.gpr[0] == 0x44332211


@pytest.mark.spec("mmu.pae_pdptrs")
def test_pdptes_are_latched(machine: Machine) -> None:
    m = machine
    table, pd = 0x10000, 0x11000
    m.poke(table, pd | P)
    m.poke(table + 8, 0)
    m.poke(pd, 0 | P | W | PS | A | D)
    m.put(CODE_LA, b"\x8a\x03" + UD2)
    m.load(Paging("pae", cr3=table))
    assert lib.cpu_load_pdptrs(m.cpu) == 0
    assert list(m.guest.pdptr) == [pd | P, 0, 0, 0]
    m.poke(table, 0)
    lib.cpu_flush_tlb(m.cpu)
    assert m.run(CODE_LA, 0x2000) == Outcome("ok")
    assert m.run(CODE_LA, 1 << 30) == Outcome("pf", 1 << 30, 0)


@pytest.mark.spec("mmu.pae_pdptrs")
@pytest.mark.parametrize("bit", [1, 2, 5, 8, 40, 51, 52, 63])
def test_reserved_bits_of_pdptes(machine: Machine, bit: int) -> None:
    m = machine
    m.guest.pdptr = [5, 5, 5, 5]
    m.guest.cr3 = 0x10020
    m.poke(0x10038, 0x11000 | P | 1 << bit)
    assert lib.cpu_load_pdptrs(m.cpu) == -1
    assert list(m.guest.pdptr) == [5, 5, 5, 5]
    m.poke(0x10038, 0x11000 | 1 << bit)  # not present: all bits are free
    assert lib.cpu_load_pdptrs(m.cpu) == 0


def test_pdptes_without_memory(machine: Machine) -> None:
    m = machine
    m.guest.cr3 = 0x10000
    m.set_spte(0x10, 0)
    assert lib.cpu_load_pdptrs(m.cpu) == -2
    assert (m.exit.reason, m.exit.gpa, m.exit.qualification) == (lib.EXIT_EPT_VIOLATION, 0x10000, 1)
    m.map_mmio(0x10)
    assert lib.cpu_load_pdptrs(m.cpu) == -1


@pytest.mark.spec("exit.MMIO_fetch")
def test_tables_outside_memory_are_not_present(machine: Machine) -> None:
    m = machine
    entry = m.map_linear(DATA, 0x5000, level=1)
    m.map_mmio(entry >> 12)
    long_mode(m, b"\x8a\x03" + UD2)
    assert m.run(CODE_LA, DATA) == Outcome("pf", DATA, 0)
    m.map_mmio(0x1234)
    m.map(entry >> 12)
    m.poke(entry, 0x1234000 | P | W)
    m.load(LONG)
    assert m.run(CODE_LA, DATA) == Outcome("mmio-read", 0x1234000, 1)
    assert m.run(DATA) == Outcome("emulation")  # a fetch


def test_accessed_and_dirty_bits_are_left_out_in_a_read_only_slot(machine: Machine) -> None:
    m = machine
    entry = m.map_linear(DATA, 0x5000, P | W)
    m.map(entry >> 12, SR | SX)
    long_mode(m, b"\x88\x03" + UD2)
    assert m.run(CODE_LA, DATA) == Outcome("ept", entry, 3 | (SR | SX) << 3 | 0x80)
    m.ctl.emulate[0].gfn, m.ctl.emulate_count = entry >> 12, 1
    assert lib.cpu_complete(m.cpu) == lib.EXIT_NONE
    assert m.peek(entry) == 0x5000 | P | W
    assert m.guest.rip == CODE_LA + 2


@pytest.mark.spec("mmu.ad_bits")
def test_tables_written_for_accessed_bits_get_a_dirty_spte(machine: Machine) -> None:
    m = machine
    entry = m.map_linear(DATA, 0x5000, P | W)
    long_mode(m, b"\x8a\x03" + UD2)
    assert m.run(CODE_LA, DATA) == Outcome("ok")
    assert m.peek(entry) == 0x5000 | P | W | A
    assert m.spte(entry >> 12) & SD
    assert not m.spte(5) & SD
    assert m.spte(5) & SA


@pytest.mark.spec("mmu.large_4m")
def test_second_level_large_pages(machine: Machine) -> None:
    m = machine
    sptep = ffi.cast("uint64_t *", m.table(0, 2)) + 2  # gpa 4 to 6 MiB
    lib.spte_write(sptep, (m.hva + 0x80000) | SR | SW | SX | SPS)
    m.put(0x80000 + 0x12345, b"\x5a")
    m.put(CODE_LA, b"\x8a\x03\x88\x43\x01" + UD2)
    m.load(Paging("none"))
    assert m.run(CODE_LA, 0x412345) == Outcome("ok")
    assert m.peek(0x80000 + 0x12345, 2) == 0x5A5A
    assert lib.spte_read(sptep) & (SA | SD) == SA | SD


SEL_LOAD = b"\xb8\x10\x00\x00\x00\x8e\xd8" + UD2  # mov eax, 10h; mov ds, eax


@pytest.mark.spec("cpu.nx_smep_smap")
@pytest.mark.parametrize(
    ("flags", "smap", "want"),
    [
        (P | W | A | D, False, Outcome("ok")),
        (P | W | A | D, True, Outcome("ok")),
        (P | W | U | A | D, False, Outcome("ok")),
        (P | W | U | A | D, True, Outcome("pf", DATA + 0x10, 1)),  # whatever AC is, and not a user access
    ],
)
@pytest.mark.parametrize("user", [False, True])
def test_descriptor_tables_are_read_as_supervisor(
    machine: Machine, flags: int, smap: bool, want: Outcome, user: bool
) -> None:
    m = machine
    m.map_linear(DATA, 0x5000, flags)
    m.poke(0x5010, 0x00CFF3000000FFFF)
    m.guest.gdtr.base, m.guest.gdtr.limit = DATA, 0xFF
    paging = Paging("4", cr3=ROOT, user=user, smap=smap, ac=True)
    long_mode(m, b"\x8a\x03" + SEL_LOAD, paging)
    if not user or flags & U:
        # the page is in the TLB by an explicit access
        assert m.run(CODE_LA, DATA) == want
    assert m.run(CODE_LA + 2) == want


# ---- shadow mode --------------------------------------------------------------------------------------


def shadow(m: Machine, code: bytes, paging: Paging) -> None:
    m.ctl.flags &= ~lib.CPU_TDP
    m.put(CODE_LA, code)
    m.map(1, SR | SW | SX | (SU if paging.user else 0))
    m.load(paging)


@pytest.mark.spec("mmu.paging_shadow")
@pytest.mark.parametrize(
    ("rights", "code", "paging", "error"),
    [
        (SR | SW | SX | SU, b"\x88\x03", Paging("4", user=True), None),
        (SR | SW | SX, b"\x8a\x03", Paging("4", user=True), 5),
        (SR | SX | SU, b"\x88\x03", Paging("4", user=True), 7),
        (SR | SX, b"\x88\x03", Paging("4", wp=False), 3),  # WP=0 is the module's to emulate
        (SR | SW | SX | SU, b"\x8a\x03", Paging("4", smap=True), 1),
        (SR | SW | SX | SU, b"\x8a\x03", Paging("4", smap=True, ac=True), None),
        (SR | SW | SX | SU, b"\x8a\x03", Paging("none", smap=True), None),
        (0, b"\x8a\x03", Paging("4"), 0),
        (0, b"\x88\x03", Paging("4", user=True), 6),
        (SR | SW | SU, b"\xff\xe3", Paging("4", user=True), 0x15),  # jmp rbx
        (SR | SW | SX | SU, b"\xff\xe3", Paging("4", smep=True), 0x11),
        (SR | SW | SX | SU, b"\xff\xe3", Paging("4"), None),
    ],
)
def test_shadow_tables(machine: Machine, rights: int, code: bytes, paging: Paging, error: int | None) -> None:
    m = machine
    shadow(m, code + UD2, paging)
    m.put(0x5000, UD2)
    m.set_spte(0x123, rights and rights | m.hva + 0x5000)
    want = Outcome("ok") if error is None else Outcome("shadow", 0x123000, error)
    assert m.run(CODE_LA, 0x123000) == want
    if code == b"\x88\x03":
        assert bool(m.spte(0x123) & SD) == (error is None)


def test_shadow_mmio(machine: Machine) -> None:
    m = machine
    shadow(m, b"\x8a\x03" + UD2 + b"\x88\x03" + UD2, Paging("4", user=True))
    m.set_spte(0x123, lib.SPTE_MMIO | 0xFEE00000 | 0x18)
    assert m.run(CODE_LA, 0x123456) == Outcome("shadow", 0x123456, 5)
    m.set_spte(0x123, lib.SPTE_MMIO | 0xFEE00000 | 0x18 | lib.SPTE_MMIO_U)
    assert m.run(CODE_LA, 0x123456) == Outcome("mmio-read", 0xFEE00456, 1)
    assert m.run(CODE_LA + 4, 0x123456) == Outcome("shadow", 0x123456, 7)
    m.set_spte(0x123, lib.SPTE_MMIO | 0xFEE00000 | 0x18 | lib.SPTE_MMIO_U | lib.SPTE_MMIO_W)
    assert m.run(CODE_LA + 4, 0x123456) == Outcome("mmio-write", 0xFEE00456, 1)
    m.set_spte(0x123, lib.SPTE_MMIO | 0xFEE00000 | 0x20 | lib.SPTE_MMIO_U)  # another generation
    assert m.run(CODE_LA, 0x123456) == Outcome("shadow", 0x123456, 4)


@pytest.mark.spec("mmu.wp_pt")
def test_shadow_write_to_a_protected_page_is_emulated(machine: Machine) -> None:
    m = machine
    shadow(m, b"\x48\x89\x03" + UD2, Paging("4"))  # mov [rbx], rax
    m.map(0x123, SR | SX, to=5)
    m.guest.gpr[0] = 0x1122334455667788
    assert m.run(CODE_LA, 0x123010) == Outcome("shadow", 0x123010, 3)
    m.ctl.emulate[0].gfn, m.ctl.emulate[0].gla, m.ctl.emulate_count = 0x77, 0x123000, 1
    assert m.outcome(lib.cpu_complete(m.cpu)) == Outcome("mmio-write", 0x77010, 8)
    assert bytes(m.exit.mmio[0].data)[:8] == bytes.fromhex("8877665544332211")
    assert m.peek(0x5010) == 0


def test_shadow_pae_root_has_four_entries(machine: Machine) -> None:
    m = machine
    root = ffi.gc(lib.spt_alloc(), lib.spt_free)
    lib.spte_write(root + 0, m.table(0, 2) | SR | SW | SX | SU)
    lib.spte_write(root + 3, m.table(0, 2) | SR | SW | SX | SU)
    shadow(m, b"\x8a\x03" + UD2, Paging("32"))
    m.ctl.ept_level, m.ctl.eptp = 3, int(ffi.cast("uintptr_t", root))
    m.put(0x5000, b"\x99")
    assert m.run(CODE_LA, 3 << 30 | 0x5000) == Outcome("ok")
    assert m.guest.gpr[0] & 0xFF == 0x99
    assert m.run(CODE_LA, 1 << 30) == Outcome("shadow", 1 << 30, 0)
