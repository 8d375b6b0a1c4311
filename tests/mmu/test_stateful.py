"""Random interleavings of what guests, clients and hosts do, against the reference walker.

The model keeps, for each vCPU and page under test, every translation that its tables have had since the
vCPU last invalidated it: what a TLB may still hold.  An access must do what one of those, or the tables as
they are, say; a page fault must be what the tables say now.  The auditor runs after every step.

`together` has several vCPUs access at the same time, in threads of their own, while another one edits an
entry of the tables or the client changes slots or memory, reads the dirty log or shrinks: then both what was
before and what is after may be seen, and nothing else.

Longer: ``python -m tests.mmu.test_stateful --minutes 15``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import mmap
import os
import threading
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pykvm.abi import uapi
from pykvm.kvm.memslots import invalidate_range_end, invalidate_range_start
from tests.mmu import reference
from tests.mmu.driver import (
    AREA,
    AREA_PAGES,
    DIRECTORIES,
    FRAMES,
    HOLE,
    LARGE,
    LARGE_SIZE,
    PS,
    TABLES,
    TEST,
    WORD,
    A,
    D,
    Driver,
    Outcome,
    U,
    W,
)
from tests.mmu.reference import FETCH, READ, WRITE, Access, Cpu, P, PageFault, Translated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

EXAMPLES = int(os.environ.get("MMU_EXAMPLES", "12"))
STEPS = int(os.environ.get("MMU_STEPS", "35"))
SHRINK = os.environ.get("MMU_SHRINK", "1") == "1"

NX = 1 << 63
NR_TABLES, NR_FRAMES = 4, 12
PTES = (0, 1, 2, 9)  # pages under test of each half: two in one window of prefetch, and one outside
RET = 0xC3
ANSWER = 0x5A5A5AC3
KINDS = {"read": READ, "write": WRITE, "modify": WRITE, "fetch": FETCH}


@dataclasses.dataclass(frozen=True)
class Cached:
    """A translation that a TLB may hold: the entries it was made of, and the page."""

    values: tuple[int, ...]
    page: int
    size: int

    def gpa(self, la: int) -> int:
        return self.page | la & self.size - 1


@dataclasses.dataclass
class VcpuModel:
    """What one vCPU may have cached."""

    root: int = 0
    pdes: dict[int, set[int]] = dataclasses.field(default_factory=dict)  # gpa of a PDE -> values it may use
    cached: dict[int, set[Cached]] = dataclasses.field(default_factory=dict)  # linear page -> translations

    def flush(self) -> None:
        self.pdes.clear()
        self.cached.clear()


@dataclasses.dataclass
class Planned:
    """One access of those at the same time: where it may lead, and which faults it may meet."""

    n: int
    la: int
    kind: str
    user: bool
    value: int = 0
    gpas: set[int] = dataclasses.field(default_factory=set)
    faults: set[int] = dataclasses.field(default_factory=set)
    found: list[Outcome] = dataclasses.field(default_factory=list)

    @property
    def access(self) -> Access:
        return Access(KINDS[self.kind], user=self.user)


@dataclasses.dataclass
class Batch:
    """What happens at the same time. `at`, `value`: the entry that is edited, or the frame that is changed."""

    editor: str
    at: int = 0
    value: int = 0
    accesses: list[Planned] = dataclasses.field(default_factory=list)
    edited: Outcome | None = None
    dirty: set[int] = dataclasses.field(default_factory=set)


class MmuMachine(RuleBasedStateMachine):
    """See the module."""

    tdp = True

    @initialize(width=st.sampled_from([64, 36, 32]), vcpus=st.sampled_from([1, 2, 3, 4]))
    def start(self, width: int, vcpus: int) -> None:
        self.driver = Driver(tdp=self.tdp, width=width, vcpus=vcpus)
        self.models = [VcpuModel() for _ in range(vcpus)]
        self.counter = 0
        self.lost: dict[int, str] = {}  # frame under test -> what its host page may do: "none" or "read"
        self.readonly = False
        self.logging = False
        self.dirty: set[int] = set()
        self.maybe_dirty: set[int] = set()
        self.has_area = True
        for n in range(AREA_PAGES - (FRAMES - AREA >> 12)):
            self.refill(FRAMES + n * 0x1000)
        for root, half in ((0, 0), (0, 1), (1, 0), (1, 1)):
            # Tables 0 and 1 are in both directories, the others in one.
            table = half if root == 0 else half * 2
            self.driver.poke(self.driver.pde(root, half), TABLES + table * 0x1000 | P | W | U, self.size)
        for table in range(NR_TABLES):
            for n, slot in enumerate(PTES):
                frame = FRAMES + (table * len(PTES) + n) % NR_FRAMES * 0x1000
                bits = (P | W | U, P | W | U | A | D, P | U | A, P | W | A)[(n + table) % 4]
                self.driver.poke(TABLES + table * 0x1000 + slot * self.size, frame | bits, self.size)
        for n in range(16):
            self.refill(LARGE + n * 0x1000)
        self.remember()

    def teardown(self) -> None:
        if hasattr(self, "driver"):
            self.driver.close()

    # ---- the model ----

    @property
    def size(self) -> int:
        return self.driver.size

    def pages(self) -> list[int]:
        return [TEST + (half << self.driver.span) + n * 0x1000 for half in (0, 1) for n in PTES]

    def reader(self, over: dict[int, int] | None = None) -> reference.ReadEntry:
        left = dict(over or {})

        def read(gpa: int, size: int) -> int | None:
            # Once: a directory may be its own table, and a table is read anew.
            if gpa in left:
                return left.pop(gpa)
            if gpa >= 0x20_0000 and self.memory_at(gpa) == "mmio":
                return None
            return self.driver.peek(gpa, size)

        return read

    def registers(self, n: int) -> Cpu:
        return self.driver.cpu(self.driver.vcpus[n])

    def walk(self, cpu: Cpu, la: int, over: dict[int, int] | None = None) -> Translated | PageFault:
        """What the tables give at all: the access that needs the least."""
        loose = dataclasses.replace(cpu, cr4=cpu.cr4 & ~reference.CR4_SMAP)
        return reference.translate(loose, self.reader(over), la, Access(READ, ac=True))

    def remember(self) -> None:
        """Note for every vCPU what its tables say now; called after everything that may have changed them."""
        if not self.has_area:
            return
        for n, model in enumerate(self.models):
            cpu = self.registers(n)
            for half in (0, 1):
                at = self.driver.pde(model.root, half)
                model.pdes.setdefault(at, set()).add(self.driver.peek(at, self.size))
            for la in self.pages():
                at = self.driver.pde(model.root, la - TEST >> self.driver.span)
                for pde in tuple(model.pdes[at]):
                    found = self.walk(cpu, la, {at: pde})
                    if isinstance(found, Translated):
                        values = tuple(value for _, value in found.entries)
                        page = found.gpa & ~(found.page_size - 1)
                        model.cached.setdefault(la, set()).add(Cached(values, page, found.page_size))

    def refill(self, frame: int) -> None:
        """Give a frame contents of its own: a word whose first byte is RET."""
        self.counter += 1
        self.driver.poke(frame + WORD, self.counter << 8 | RET, 4)

    def memory_at(self, gpa: int) -> str:
        """Return what is behind a gpa: ram, mmio, lost (EFAULT for this access), or readonly."""
        if AREA <= gpa < AREA + AREA_PAGES * 0x1000:
            return "ram" if self.has_area else "mmio"
        return "ram" if gpa < 0x20_0000 or LARGE <= gpa < LARGE + LARGE_SIZE else "mmio"

    def possible(self, n: int, la: int, access: Access, current: Translated | PageFault) -> set[int]:
        """Return the gpas that the access may get at."""
        model, cpu = self.models[n], self.registers(n)
        gpas = {current.gpa} if isinstance(current, Translated) else set()
        for cached in model.cached.get(la & ~0xFFF, ()):
            if not reference._allowed(cpu, list(cached.values), access):
                continue
            if access.kind == WRITE and not cached.values[-1] & D:
                continue
            gpas.add(cached.gpa(la))
        # A cached entry of the directory, and from there on the tables as they are.
        at = self.driver.pde(model.root, la - TEST >> self.driver.span)
        for pde in model.pdes.get(at, ()):
            found = reference.translate(cpu, self.reader({at: pde}), la, access)
            if isinstance(found, Translated):
                gpas.add(found.gpa)
        return gpas

    # ---- accesses ----

    @rule(
        n=st.integers(0, 3),
        page=st.integers(0, 2 * len(PTES) - 1),
        kind=st.sampled_from(sorted(KINDS)),
        user=st.booleans(),
        again=st.booleans(),
    )
    def access(self, n: int, page: int, kind: str, user: bool, again: bool) -> None:
        n %= len(self.models)
        la = self.pages()[page] + WORD
        for _ in range(1 + again):
            self._access(n, la, kind, user)

    @rule(n=st.integers(0, 3), kind=st.sampled_from(["read", "write"]), user=st.booleans())
    def access_all(self, n: int, kind: str, user: bool) -> None:
        n %= len(self.models)
        for la in self.pages():
            self._access(n, la + WORD, kind, user)

    @rule(
        n=st.integers(0, 3),
        m=st.integers(0, 3),
        page=st.integers(0, 2 * len(PTES) - 1),
        frame=st.integers(0, NR_FRAMES - 1),
        bits=st.sampled_from([0, P | W | U | A | D, P | U | A, P | W | U]),
        flush=st.sampled_from(["no", "invlpg", "cr3"]),
        kinds=st.lists(st.sampled_from(["read", "write", "fetch"]), min_size=1, max_size=3),
        user=st.booleans(),
    )
    def remap(
        self, n: int, m: int, page: int, frame: int, bits: int, flush: str, kinds: list[str], user: bool
    ) -> None:
        """Do what an operating system does all the time: use, change, invalidate, use again."""
        n %= len(self.models)
        la = self.pages()[page]
        self._access(n, la + WORD, kinds[0], user)
        pde = self.driver.peek(self.driver.pde(self.models[n].root, la - TEST >> self.driver.span), self.size)
        table = pde & 0xFFFF_F000
        if pde & (P | PS) != P or table - TABLES not in range(0, NR_TABLES * 0x1000, 0x1000):
            return
        at = table + (la >> 12 & 511) * self.size
        self.store(m, at, FRAMES + frame * 0x1000 | bits, "store")
        if flush == "invlpg":
            self.invlpg(n, page)
        elif flush == "cr3":
            self.write_cr3(n, self.models[n].root)
        for kind in kinds:
            self._access(n, la + WORD, kind, user)

    @rule(
        n=st.integers(0, 3),
        m=st.integers(0, 3),
        page=st.integers(0, 2 * len(PTES) - 1),
        table=st.integers(0, NR_TABLES),
        bits=st.sampled_from([0, P | W | U, P | U, P | W | U | A]),
        flush=st.sampled_from(["no", "invlpg", "cr3"]),
        how=st.sampled_from(["store", "halves", "xchg"]),
    )
    def remap_table(self, n: int, m: int, page: int, table: int, bits: int, flush: str, how: str) -> None:
        """The same one level up."""
        n %= len(self.models)
        la = self.pages()[page]
        self._access(n, la + WORD, "read", user=False)
        at = self.driver.pde(self.models[n].root, la - TEST >> self.driver.span)
        self.store(m, at, (LARGE | PS if table == NR_TABLES else TABLES + table * 0x1000) | bits, how)
        if flush == "invlpg":
            self.invlpg(n, page)
        elif flush == "cr3":
            self.write_cr3(n, self.models[n].root)
        for kind in ("read", "write"):
            self._access(n, la + WORD, kind, user=True)

    def _access(self, n: int, la: int, kind: str, user: bool) -> None:
        vcpu, access = self.driver.vcpus[n], Access(KINDS[kind], user=user)
        current = reference.translate(self.registers(n), self.reader(), la, access)
        gpas = self.possible(n, la, access, current)
        if not all(self.is_harmless(gpa, kind) for gpa in gpas):
            return
        before = self.snapshot()
        if access.kind == WRITE:
            self.maybe_dirty |= {gpa - AREA >> 12 for gpa in self.lost}
        self.counter += 1
        value = self.counter << 8 | RET
        reads = {
            gpa: self.driver.peek(gpa, 4)
            for gpa in gpas
            if self.memory_at(gpa) == "ram" and self.can(gpa, "read")
        }
        found = self.driver.do(vcpu, kind, user=user, rbx=la, rax=value, answer=0x5A5A5AC3)
        message = f"vcpu {n} {kind} {'user' if user else 'kernel'} {la:#x}: {found}, tables say {current}, gpas {[hex(g) for g in gpas]}"
        if found.kind == "fault":
            assert isinstance(current, PageFault), message
            assert (found.error, found.address) == (current.error_code, la), message
            self.check_tables(before, set(), message)
            return
        assert gpas, message
        self.check_done(found, kind, value, gpas, reads, before, message)
        self.check_accessed_dirty(access, current, gpas, found, message)
        self.remember()

    def check_done(
        self,
        found: Outcome,
        kind: str,
        value: int,
        gpas: set[int],
        reads: dict[int, int],
        before: dict[int, int],
        message: str,
    ) -> None:
        writes = kind in {"write", "modify"}
        if found.kind == "efault":
            assert any(
                self.memory_at(g) == "ram" and found.address == g & ~0xFFF and not self.can(g, kind)
                for g in gpas
            ), message
            self.check_tables(before, gpas, message)
            return
        if found.kind == "mmio":
            assert any(self.memory_at(g) == "mmio" and g == found.address for g in gpas), message
            if kind == "read":
                assert found.value == 0x5A5A5AC3, message
            self.check_tables(before, set(), message)
            return
        if kind in {"read", "modify"}:
            assert found.value in {word for gpa, old in reads.items() for word in self.words_at(gpa, old)}, (
                message
            )
        if not writes:
            assert any(self.can(g, kind) for g in reads), message
            self.check_tables(before, set(), message)
            return
        want = {g for g in reads if self.can(g, "write")}
        if kind == "write":
            hit = {g for g in want if self.driver.peek(g, 4) == value}
        else:
            hit = {g for g in want if self.driver.peek(g, 4) == (found.value + value) & 0xFFFF_FFFF}
        assert len(hit) == 1, message
        (gpa,) = hit
        self.written(gpa, 4)
        self.check_tables(before, hit, message)
        self.driver.poke(gpa, self.driver.peek(gpa, 4) & ~0xFF | RET, 4)

    def words_at(self, gpa: int, word: int) -> set[int]:
        """Return what an access may find there: an entry of a table may get A and D by the very access."""
        return {word, word | A, word | A | D} if gpa < FRAMES else {word}

    def check_accessed_dirty(
        self, access: Access, current: Translated | PageFault, gpas: set[int], found: Outcome, message: str
    ) -> None:
        """With only one way for the access to go, its A and D bits are set."""
        if found.kind == "efault" or not isinstance(current, Translated) or len(gpas) > 1:
            return
        for at, bits in current.updates.items():
            # Another translation that leads to the same page may have been used, without new bits.
            if any(
                c.gpa(current.gpa) == current.gpa for m in self.models for s in m.cached.values() for c in s
            ):
                return
            assert self.driver.peek(at, self.size) & bits == bits, f"{message}: A or D not set at {at:#x}"

    def is_harmless(self, gpa: int, kind: str) -> bool:
        """Whether the guest survives the access: frames of tables, or of the guest itself, may be mapped, too."""
        if kind == "fetch":
            ram = self.memory_at(gpa) == "ram"
            return ram and (not self.can(gpa, kind) or self.driver.peek(gpa, 1) == RET)
        return gpa >= AREA or kind == "read"

    def can(self, gpa: int, kind: str) -> bool:
        """Whether the host lets the guest do this to a frame."""
        lost = self.lost.get(gpa & ~0xFFF)
        return lost is None or (lost == "read" and kind in {"read", "fetch"})

    # ---- tables ----

    def table_words(self) -> list[int]:
        """Addresses of the entries that processors may set A and D in."""
        words = [self.driver.pde(root, half) for root in (0, 1) for half in (0, 1)]
        words += [TABLES + t * 0x1000 + n * self.size for t in range(NR_TABLES) for n in PTES]
        if self.size == 4:
            words += []
        return words

    def snapshot(self) -> dict[int, int]:
        return {at: self.driver.peek(at, self.size) for at in self.table_words()}

    def check_tables(self, before: dict[int, int], written: set[int], message: str) -> None:
        """No entry changed but for A and D; note the pages that KVM wrote so."""
        for at, old in before.items():
            new = self.driver.peek(at, self.size)
            if new == old or any(at <= gpa < at + 8 or gpa <= at < gpa + 4 for gpa in written):
                continue
            assert new & ~(A | D) == old & ~(A | D), (
                f"{message}: entry at {at:#x} became {new:#x}, was {old:#x}"
            )
            assert new & old == old, f"{message}: entry at {at:#x} lost bits: {new:#x}, was {old:#x}"
            self.written(at, 1)

    def written(self, gpa: int, size: int) -> None:
        if self.logging and AREA <= gpa < AREA + AREA_PAGES * 0x1000:
            self.dirty |= {page - (AREA >> 12) for page in range(gpa >> 12, (gpa + size - 1 >> 12) + 1)}

    def entry(self, target: int, bits: int) -> int:
        return target | bits

    pte_bits = st.sampled_from(
        [0, P, P | W, P | U, P | W | U, P | W | U | A, P | W | U | A | D, P | U | A | D, P | A | D | W]
    )

    @rule(
        n=st.integers(0, 3),
        table=st.integers(0, NR_TABLES - 1),
        slot=st.sampled_from(PTES),
        frame=st.integers(0, NR_FRAMES + 1),
        bits=pte_bits,
        how=st.sampled_from(["store", "halves", "xchg", "or", "and", "byte"]),
        nx=st.booleans(),
    )
    def edit_pte(self, n: int, table: int, slot: int, frame: int, bits: int, how: str, nx: bool) -> None:
        """The last but one frame is a page table, the last one is in no slot."""
        target = FRAMES + frame * 0x1000
        if frame == NR_FRAMES:
            target = TABLES
        elif frame == NR_FRAMES + 1:
            target = HOLE
        at = TABLES + table * 0x1000 + slot * self.size
        self.store(n, at, target | bits | NX * (nx and self.size == 8), how)

    @rule(
        n=st.integers(0, 3),
        root=st.integers(0, 1),
        half=st.integers(0, 1),
        table=st.integers(0, NR_TABLES + 1),
        bits=st.sampled_from([0, P | W, P | U, P | W | U, P | W | U | A, P | W | U | A | D]),
        how=st.sampled_from(["store", "halves", "xchg", "or", "and"]),
    )
    def edit_pde(self, n: int, root: int, half: int, table: int, bits: int, how: str) -> None:
        """The last but one table is a large page, the last one is a page directory used as a table."""
        target = TABLES + table * 0x1000
        if table == NR_TABLES:
            target = LARGE | PS
        elif table == NR_TABLES + 1:
            target = DIRECTORIES
            if self.size == 4:
                return  # it maps the kernel, too: a translation the model does not follow
        self.store(n, self.driver.pde(root, half), target | bits, how)

    def store(self, n: int, at: int, value: int, how: str) -> None:
        """Have the guest write an entry, in one or in several instructions; other entries stay."""
        n %= len(self.models)
        if not self.has_area:
            return
        vcpu, size = self.driver.vcpus[n], self.size
        old = self.driver.peek(at, size)
        low = (1 << 32) - 1
        steps: list[tuple[str, int, int, int]] = []  # operation, address, operand, bytes
        match how:
            case "store":
                steps = [(f"store{size}", at, value, size)] if self.driver.wide or size == 4 else []
            case "xchg":
                steps = [(f"xchg{size}", at, value, size)] if self.driver.wide or size == 4 else []
            case "byte":
                steps = [("store1", at, value & 0xFF, 1)]
                value = old & ~0xFF | value & 0xFF
            case "or":
                steps = [("or4", at, value & low & 0xFFF, 4)]
                value = old | value & 0xFFF
            case "and":
                steps = [("and4", at, value & low | ~0xFFF & low, 4)]
                value = old & (value | ~0xFFF)
        if not steps:
            # P last, so that no walk ever sees half an entry that is present.
            steps = [("store4", at, 0, 4)]
            if size == 8:
                steps.append(("store4", at + 4, value >> 32, 4))
            steps.append(("store4", at, value & low, 4))
        for operation, address, operand, width in steps:
            found = self.driver.do(vcpu, operation, rdi=address, rax=operand)
            assert found.kind == "ok", f"{operation} at {address:#x}: {found}"
            self.written(address, width)
            self.remember()
        now = self.driver.peek(at, size)
        assert now == value, f"{how} of {value:#x} at {at:#x} left {now:#x}"

    @rule(
        n=st.integers(0, 3),
        table=st.integers(0, NR_TABLES - 1),
        at=st.sampled_from([3, 5, 6, 11]),
        size=st.sampled_from([1, 2, 4, 8, 16]),
    )
    def write_across(self, n: int, table: int, at: int, size: int) -> None:
        """Write a table as no table is written: short, misaligned, too long; between the entries under test."""
        n %= len(self.models)
        if not self.has_area or (size > 4 and not self.driver.wide):
            return
        # Entries 3 to 8 are nobody's: offset 3 * 8 or 3 * 4 and on.
        address = TABLES + table * 0x1000 + 3 * self.size + at % (5 * self.size - 16 if self.size == 8 else 3)
        value = 0x1122_3344_5566_7788 & (1 << 8 * min(size, 8)) - 1
        before = self.driver.read(address - 16, 64)
        found = self.driver.do(self.driver.vcpus[n], f"store{size}", rdi=address, rax=value)
        assert found.kind == "ok"
        data = value.to_bytes(min(size, 8), "little") * (2 if size == 16 else 1)
        assert self.driver.read(address - 16, 64) == before[:16] + data + before[16 + size :]
        self.written(address, size)
        self.remember()

    # ---- registers ----

    @rule(n=st.integers(0, 3), page=st.integers(0, 2 * len(PTES) - 1))
    def invlpg(self, n: int, page: int) -> None:
        n %= len(self.models)
        la = self.pages()[page]
        assert self.driver.do(self.driver.vcpus[n], "invlpg", rbx=la).kind == "ok"
        self.models[n].pdes.clear()
        self.models[n].cached.pop(la, None)
        self.remember()

    @rule(n=st.integers(0, 3), root=st.integers(0, 1))
    def write_cr3(self, n: int, root: int) -> None:
        n %= len(self.models)
        assert self.driver.do(self.driver.vcpus[n], "cr3", rax=self.driver.root(root)).kind == "ok"
        self.models[n].root = root
        self.models[n].flush()
        self.remember()

    @rule(
        n=st.integers(0, 3),
        which=st.sampled_from(["cr0", "cr4", "efer"]),
        one=st.booleans(),
        two=st.booleans(),
    )
    def write_register(self, n: int, which: str, one: bool, two: bool) -> None:
        """CR0.WP; CR4.SMEP and SMAP; EFER.NXE."""
        n %= len(self.models)
        driver = self.driver
        if which == "cr0":
            value = driver.initial_cr0 & ~reference.CR0_WP | reference.CR0_WP * one
        elif which == "cr4":
            value = driver.initial_cr4 | reference.CR4_SMEP * one | reference.CR4_SMAP * two
        elif self.size == 8:
            if bool(self.registers(n).efer & reference.EFER_NXE) != one:
                self.models[n].flush()
            value = driver.initial_efer & ~reference.EFER_NXE & ~reference.EFER_LMA | reference.EFER_NXE * one
        else:
            return
        assert driver.do(driver.vcpus[n], which, rax=value).kind == "ok"
        self.remember()

    # ---- the client ----

    @precondition(lambda self: self.has_area)
    @rule()
    def delete_slot(self) -> None:
        # 32-bit guests have their kernel's mapping there.
        if self.size == 4:
            return
        self.driver.set_slot(1, AREA, 0, self.driver.area)
        self.has_area = self.logging = False
        self.dirty.clear()
        # The tables are gone with it: nothing is translated, and what was known is not to be used.
        for model in self.models:
            model.flush()

    @precondition(lambda self: not self.has_area)
    @rule(logging=st.booleans())
    def create_slot(self, logging: bool) -> None:
        flags = uapi.KVM_MEM_LOG_DIRTY_PAGES * logging
        self.driver.set_slot(1, AREA, AREA_PAGES, self.driver.area, flags)
        self.has_area, self.logging = True, logging
        self.remember()

    @precondition(lambda self: self.has_area)
    @rule(logging=st.booleans())
    def set_logging(self, logging: bool) -> None:
        flags = uapi.KVM_MEM_LOG_DIRTY_PAGES * logging
        self.driver.set_slot(1, AREA, AREA_PAGES, self.driver.area, flags)
        if logging != self.logging:
            self.dirty.clear()
        self.logging = logging

    @precondition(lambda self: self.has_area and self.logging)
    @rule()
    def read_dirty_log(self) -> None:
        found = self.driver.dirty_log(1, AREA_PAGES)
        # Nobody tells us of mprotect() here: a write that then failed may have been logged.
        found -= self.maybe_dirty - self.dirty
        self.maybe_dirty.clear()
        assert found == self.dirty, (
            f"lost {sorted(self.dirty - found)}, invented {sorted(found - self.dirty)}"
        )
        self.dirty.clear()

    @rule(
        frame=st.integers(0, NR_FRAMES - 1),
        what=st.sampled_from(["dontneed", "remap", "none", "read", "whole", "unmap"]),
        told=st.booleans(),
    )
    def change_host_memory(self, frame: int, what: str, told: bool) -> None:
        """told: as under `pykvm exec`, where the MMU notifier is called."""
        gpa = FRAMES + frame * 0x1000
        at, memory = gpa - AREA, self.driver.area
        before = self.lost.pop(gpa, None)
        with self.notifier(gpa) if told else contextlib.nullcontext():
            if before == "gone":
                memory.remap(at, 0x1000, mmap.PROT_READ | mmap.PROT_WRITE)
            memory.protect(at, 0x1000, mmap.PROT_READ | mmap.PROT_WRITE)
            if what == "dontneed":
                memory.dontneed(at, 0x1000)
            elif what == "remap":
                memory.remap(at, 0x1000, mmap.PROT_READ | mmap.PROT_WRITE)
            if what in {"dontneed", "remap"}:
                assert self.driver.peek(gpa + WORD, 4) == 0
            self.refill(gpa)
            if what in {"none", "read"}:
                memory.protect(at, 0x1000, mmap.PROT_READ if what == "read" else 0)
                self.lost[gpa] = what
            elif what == "unmap":
                memory.unmap(at, 0x1000)
                self.lost[gpa] = "gone"

    @contextlib.contextmanager
    def notifier(self, gpa: int) -> Iterator[None]:
        """Do what the preload library does around a system call that changes the memory behind a frame."""
        vm, hva = self.driver.vm.mmu._vm, self.driver.area.hva + (gpa - AREA)
        invalidate_range_start(vm, hva, hva + 0x1000)
        yield
        invalidate_range_end(vm, hva, hva + 0x1000)

    # ---- at the same time

    @precondition(lambda self: self.has_area and len(self.models) > 1)
    @rule(
        accesses=st.lists(
            st.tuples(
                st.integers(0, 2 * len(PTES) - 1), st.sampled_from(["read", "write", "fetch"]), st.booleans()
            ),
            min_size=3,
            max_size=3,
        ),
        editor=st.sampled_from(
            ["none", "pte", "pde", "dirty", "shrink", "remap", "dontneed", "slot", "logging"]
        ),
        number=st.integers(0, 63),
        bits=pte_bits,
    )
    def together(self, accesses: list[tuple[int, str, bool]], editor: str, number: int, bits: int) -> None:
        """Several vCPUs access, the last one or the client changes something, all at the same time."""
        batch = Batch(editor)
        editing = editor in {"pte", "pde"}
        for n, (page, kind, user) in zip(range(len(self.models) - editing), accesses, strict=False):
            batch.accesses.append(Planned(n, self.pages()[page] + WORD, kind, user))
        if not batch.accesses or not self.plan_edit(batch, number, bits):
            return
        self.plan(batch)
        if editing:
            # As it will be: the model looks at memory, no processor does just now.
            old = self.driver.peek(batch.at, self.size)
            self.driver.poke(batch.at, batch.value, self.size)
            self.plan(batch)
            self.driver.poke(batch.at, old, self.size)
        if editor == "slot":
            for each in batch.accesses:
                each.faults.add(
                    reference._code(self.registers(each.n), each.access, present=False, reserved=False)
                )
        batch.accesses = [each for each in batch.accesses if self.may_race(each, batch)]
        before = self.snapshot()
        words = {gpa: self.driver.peek(gpa, 4) for each in batch.accesses for gpa in each.gpas
                 if self.memory_at(gpa) == "ram" and self.can(gpa, "read")}  # fmt: skip
        for each in batch.accesses:
            self.counter += 1
            each.value = self.counter << 8 | RET
        self.race(batch)
        self.remember()
        self.check_race(batch, before, words)

    def plan_edit(self, batch: Batch, number: int, bits: int) -> bool:
        """Choose what is changed; False: nothing can be."""
        size = self.size
        if batch.editor == "pte":
            table, slot = number % NR_TABLES, PTES[number // NR_TABLES % len(PTES)]
            batch.at = TABLES + table * 0x1000 + slot * size
            batch.value = FRAMES + number % NR_FRAMES * 0x1000 | bits
        elif batch.editor == "pde":
            batch.at = self.driver.pde(number & 1, number >> 1 & 1)
            table = number >> 2 & 7
            target = LARGE | PS if table > NR_TABLES else TABLES + table % NR_TABLES * 0x1000
            batch.value = target | bits & (P | W | U | A) | P
        elif batch.editor in {"remap", "dontneed"}:
            batch.at = FRAMES + number % NR_FRAMES * 0x1000
            return batch.at not in self.lost
        elif batch.editor == "slot":
            return self.size == 8  # 32-bit guests have their kernel's mapping there
        elif batch.editor == "dirty":
            return self.logging
        elif batch.editor == "logging":
            return not self.logging
        if batch.at and size == 8 and not self.driver.wide:
            # PAE: one instruction writes half an entry, the other half stays.
            batch.value |= self.driver.peek(batch.at, 8) >> 32 << 32
        return True

    def plan(self, batch: Batch) -> None:
        """Add what the accesses may do as the tables are now."""
        for each in batch.accesses:
            current = reference.translate(self.registers(each.n), self.reader(), each.la, each.access)
            each.gpas |= self.possible(each.n, each.la, each.access, current)
            if isinstance(current, PageFault):
                each.faults.add(current.error_code)

    def may_race(self, each: Planned, batch: Batch) -> bool:
        """Whether the guest survives the access, and no other one depends on what it writes."""
        if not all(self.is_harmless(gpa, each.kind) for gpa in each.gpas):
            return False
        if each.kind == "write" and any(AREA <= gpa < FRAMES for gpa in each.gpas):
            return False
        if each.kind == "fetch":
            return batch.editor != "slot" and not any(gpa & ~0xFFF == batch.at for gpa in each.gpas)
        return True

    def race(self, batch: Batch) -> None:
        """Do it all, each in a thread of its own, as often as that finds something to overlap."""
        driver, errors = self.driver, list[BaseException]()
        barrier = threading.Barrier(len(batch.accesses) + 1)

        def access(each: Planned) -> None:
            barrier.wait(20)
            for _ in range(3):
                each.found.append(
                    driver.do(
                        driver.vcpus[each.n], each.kind, user=each.user, rbx=each.la, rax=each.value, answer=ANSWER
                    )
                )  # fmt: skip

        def edit() -> None:
            barrier.wait(20)
            self.edit_now(batch)

        def guarded(func: Callable[[], None]) -> None:
            try:
                func()
            except BaseException as error:  # noqa: BLE001  told to the test
                errors.append(error)

        works = [edit, *(functools.partial(access, each) for each in batch.accesses)]
        threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), f"{batch} hangs"
        if errors:
            raise errors[0]

    def edit_now(self, batch: Batch) -> None:
        driver, area, rights = self.driver, self.driver.area, mmap.PROT_READ | mmap.PROT_WRITE
        flags = uapi.KVM_MEM_LOG_DIRTY_PAGES * self.logging
        if batch.editor in {"pte", "pde"}:
            wide = 8 if driver.wide else 4
            value = batch.value & (1 << 8 * wide) - 1
            batch.edited = driver.do(driver.vcpus[-1], f"store{wide}", rdi=batch.at, rax=value)
        elif batch.editor == "dirty":
            batch.dirty = driver.dirty_log(1, AREA_PAGES)
        elif batch.editor == "shrink":
            driver.vm.mmu.shrink(20)
        elif batch.editor == "remap":
            with self.notifier(batch.at):
                area.remap(batch.at - AREA, 0x1000, rights)
        elif batch.editor == "dontneed":
            area.dontneed(batch.at - AREA, 0x1000)
        elif batch.editor == "slot":
            driver.set_slot(1, AREA, 0, area)
            driver.set_slot(1, AREA, AREA_PAGES, area, flags)
        elif batch.editor == "logging":
            driver.set_slot(1, AREA, AREA_PAGES, area, uapi.KVM_MEM_LOG_DIRTY_PAGES)
            driver.dirty_log(1, AREA_PAGES)

    def check_race(self, batch: Batch, before: dict[int, int], words: dict[int, int]) -> None:
        writes = [each for each in batch.accesses if each.kind == "write"]
        for each in batch.accesses:
            for found in each.found:
                self.check_raced(batch, each, found, words, writes)
        touched = {gpa for each in writes for gpa in each.gpas}
        edited = set(range(batch.at, batch.at + self.size)) if batch.edited is not None else set()
        if batch.edited is not None:
            now = self.driver.peek(batch.at, self.size)
            assert batch.edited.kind == "ok"
            assert now & ~(A | D) == batch.value & ~(A | D), f"{batch}: entry is {now:#x}"
            self.written(batch.at, self.size)
        self.check_tables(before, touched | edited, str(batch))
        for each in writes:
            hit = [gpa for gpa in words if gpa in each.gpas and self.driver.peek(gpa, 4) == each.value]
            self.maybe_dirty |= {
                gpa - AREA >> 12 for gpa in each.gpas if AREA <= gpa < AREA + AREA_PAGES * 0x1000
            }
            for gpa in hit:
                self.written(gpa, 4)
        if batch.editor in {"remap", "dontneed"}:
            self.refill(batch.at)
        elif batch.editor == "slot" and self.logging:
            # What was dirty went with the slot; what is now may be of before or after.
            self.driver.dirty_log(1, AREA_PAGES)
            self.dirty.clear()
        elif batch.editor == "logging":
            self.driver.dirty_log(1, AREA_PAGES)
            self.driver.set_slot(1, AREA, AREA_PAGES, self.driver.area)
            self.dirty.clear()
        elif batch.editor == "dirty":
            # In this reading of the log or in the next one.
            found_dirty = batch.dirty | self.driver.dirty_log(1, AREA_PAGES)
            lost, invented = self.dirty - found_dirty, found_dirty - self.dirty - self.maybe_dirty
            assert not lost, f"{batch}: lost {sorted(lost)}"
            assert not invented, f"{batch}: invented {sorted(invented)}"
            self.dirty.clear()
            self.maybe_dirty.clear()

    def check_raced(
        self, batch: Batch, each: Planned, found: Outcome, words: dict[int, int], writes: list[Planned]
    ) -> None:
        message = f"{batch}: {each}: {found}"
        if found.kind == "fault":
            assert (found.error in each.faults, found.address) == (True, each.la), message
            return
        if found.kind == "efault":
            assert any(found.address == gpa & ~0xFFF and not self.can(gpa, each.kind) for gpa in each.gpas), (
                message
            )
            return
        if found.kind == "mmio":
            gone = batch.editor == "slot" and AREA <= found.address < AREA + AREA_PAGES * 0x1000
            assert found.address in each.gpas, message
            assert gone or self.memory_at(found.address) == "mmio", message
            return
        assert words.keys() & each.gpas, message
        if each.kind == "read":
            may = {word for gpa in each.gpas if gpa in words for word in self.words_at(gpa, words[gpa])}
            may |= {write.value for write in writes if write.gpas & each.gpas}
            if any(gpa & ~0xFFF == batch.at for gpa in each.gpas):
                may.add(0)
            assert found.value in may, message
        elif each.kind == "write":
            now = {self.driver.peek(gpa, 4) for gpa in each.gpas if gpa in words}
            others = {write.value for write in writes if write.gpas & each.gpas}
            gone = any(gpa & ~0xFFF == batch.at for gpa in each.gpas)
            assert gone or now & others, message

    @rule(count=st.integers(1, 40))
    def shrink(self, count: int) -> None:
        self.driver.vm.mmu.shrink(count)

    @invariant()
    def audit(self) -> None:
        if hasattr(self, "driver"):
            assert self.driver.vm.mmu.audit() == []


class TdpMachine(MmuMachine):
    tdp = True


class ShadowMachine(MmuMachine):
    tdp = False


@pytest.mark.parametrize("machine", [TdpMachine, ShadowMachine])
@pytest.mark.spec(
    "mmu.correctness", "mmu.tlb_model", "mmu.dirty_log", "mmu.dirty_no_false", "mmu.audit", "mmu.sync_cr3"
)
def test_interleavings(machine: type[MmuMachine]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
            phases=[Phase.reuse, Phase.generate, *([Phase.shrink] if SHRINK else [])],
        ),
    )


def main() -> None:
    """Run both machines in turn, each time with other examples, for so many minutes."""
    import argparse
    import time

    parser = argparse.ArgumentParser(prog="python -m tests.mmu.test_stateful", description=main.__doc__)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--examples", type=int, default=25, help="in each turn")
    parser.add_argument(
        "--shrink", action="store_true", help="find the shortest way to a failure: takes long"
    )
    options = parser.parse_args()
    end, turns = time.monotonic() + 60 * options.minutes, 0
    while time.monotonic() < end:
        for machine in (TdpMachine, ShadowMachine):
            run_state_machine_as_test(
                machine,
                settings=settings(
                    max_examples=options.examples,
                    stateful_step_count=options.steps,
                    deadline=None,
                    database=None,
                    suppress_health_check=list(HealthCheck),
                    phases=[Phase.generate, *([Phase.shrink] if options.shrink else [])],
                ),
            )
        turns += 1
        print(f"{turns * 2 * options.examples} examples of {options.steps} steps: all well", flush=True)


if __name__ == "__main__":
    main()
