"""A bare processor with guest memory and second-level tables, for tests of the C core."""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pykvm.abi import ffi, lib

PAGE = 4096
PAGES = 1024
UD2 = b"\x0f\x0b"
ROOT = 0x300000  # of map_linear(), with tables behind it

# gpte
P, W, U, A, D, PS, G = 1, 2, 4, 0x20, 0x40, 0x80, 0x100
NX = 1 << 63
# CR0, CR4, EFER, RFLAGS
PE, WP, PG = 1, 1 << 16, 1 << 31
PSE, PAE, PGE, LA57, SMEP, SMAP, PKE = 1 << 4, 1 << 5, 1 << 7, 1 << 12, 1 << 20, 1 << 21, 1 << 22
LME, LMA, NXE = 1 << 8, 1 << 10, 1 << 11
AC = 1 << 18
# SPTE
SR, SW, SX, SU, SPS, SA, SD = 1, 2, 4, 8, 0x80, 0x100, 0x200

UD, SS, GP, PF = 6, 12, 13, 14


class Outcome(NamedTuple):
    """What came of an access."""

    what: str  # "ok", "pf", "gp", "ss", "ept", "mmio-read", "mmio-write", "emulation", ...
    address: int = 0  # gpa, or linear address for faults
    code: int = 0  # error code or qualification


@dataclass
class Paging:
    """Everything a walk depends on."""

    mode: str  # "none", "32", "pae", "4", "5"
    cr3: int = 0
    pdptr: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    wp: bool = True
    pse: bool = True
    pge: bool = False
    smep: bool = False
    smap: bool = False
    pke: bool = False
    nxe: bool = True
    pkru: int = 0
    ac: bool = False
    user: bool = False
    maxphyaddr: int = 40

    @property
    def long(self) -> bool:
        return self.mode in ("4", "5")

    @property
    def cr0(self) -> int:
        return PE | 0x10 | (WP if self.wp else 0) | (PG if self.mode != "none" else 0)

    @property
    def cr4(self) -> int:
        cr4 = (PAE if self.mode in ("pae", "4", "5") else 0) | (LA57 if self.mode == "5" else 0)
        for on, bit in (
            (self.pse, PSE), (self.pge, PGE), (self.smep, SMEP), (self.smap, SMAP), (self.pke, PKE),
        ):  # fmt: skip
            cr4 |= bit if on else 0
        return cr4

    @property
    def efer(self) -> int:
        return (LME | LMA if self.long else 0) | (NXE if self.nxe else 0)


class Machine:
    """A processor with 4 MiB of memory at gpa 0."""

    def __init__(self) -> None:
        self.cpu = ffi.gc(lib.cpu_create(), lib.cpu_destroy)
        vmcs = lib.cpu_vmcs(self.cpu)
        self.guest, self.ctl, self.exit, self.stats = vmcs.guest, vmcs.ctl, vmcs.exit, vmcs.stats
        self.memory = mmap.mmap(-1, PAGES * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.hva = int(ffi.cast("uintptr_t", ffi.from_buffer(self.memory)))
        self.tables: dict[tuple[int, int], Any] = {}
        self.next_table = ROOT + PAGE
        self.ctl.eptp = self.table(0, 4)
        self.ctl.maxphyaddr = 40
        self.ctl.mmio_gen_mask = 0x7F8
        self.ctl.mmio_gen = 0x18
        self.ctl.exception_bitmap = 1 << UD | 1 << SS | 1 << GP | 1 << PF
        for gfn in range(PAGES):
            self.map(gfn)

    def table(self, gfn: int, level: int) -> int:
        """Address of the second-level table of `level` for a frame, made when missing."""
        key = (gfn >> 9 * level, level)
        if key not in self.tables:
            self.tables[key] = ffi.gc(lib.spt_alloc(), lib.spt_free)
            if level < 4:
                parent = self.table(gfn, level + 1)
                sptep = ffi.cast("uint64_t *", parent) + (gfn >> 9 * level & 511)
                addr = int(ffi.cast("uintptr_t", self.tables[key]))
                lib.spte_write(sptep, addr | SR | SW | SX | SU | SA)
        return int(ffi.cast("uintptr_t", self.tables[key]))

    def sptep(self, gfn: int) -> Any:
        return ffi.cast("uint64_t *", self.table(gfn, 1)) + (gfn & 511)

    def spte(self, gfn: int) -> int:
        return lib.spte_read(self.sptep(gfn))

    def set_spte(self, gfn: int, spte: int) -> None:
        lib.spte_write(self.sptep(gfn), spte)

    def map(self, gfn: int, rights: int = SR | SW | SX | SU | SA, to: int | None = None) -> None:
        self.set_spte(gfn, self.hva + (gfn if to is None else to) * PAGE | rights)

    def map_mmio(self, gfn: int, generation: int = 0x18) -> None:
        self.set_spte(gfn, lib.SPTE_MMIO | gfn << 12 | generation)

    def peek(self, gpa: int, size: int = 8) -> int:
        return int.from_bytes(self.memory[gpa : gpa + size], "little")

    def poke(self, gpa: int, value: int, size: int = 8) -> None:
        self.memory[gpa : gpa + size] = value.to_bytes(size, "little")

    def put(self, gpa: int, data: bytes) -> None:
        """Copy bytes into guest memory."""
        self.memory[gpa : gpa + len(data)] = data
        lib.cpu_sync_code(self.cpu)

    def map_linear(self, la: int, gpa: int, flags: int = P | W | U | A | D, level: int = 1) -> int:
        """Map a page in the 4-level tables at ROOT, making tables; returns the gpa of its entry."""
        table = ROOT
        for at in range(4, level, -1):
            entry = table + (la >> 3 + 9 * at & 511) * 8
            if not self.peek(entry) & P:
                self.poke(entry, self.next_table | P | W | U | A)
                self.next_table += PAGE
            table = self.peek(entry) & ~0xFFF
        entry = table + (la >> 3 + 9 * level & 511) * 8
        self.poke(entry, gpa | flags | (PS if level > 1 else 0))
        return entry

    def load(self, paging: Paging) -> None:
        """Put the processor into the paging mode, at the privilege, with flat segments."""
        g = self.guest
        g.cr0, g.cr3, g.cr4, g.efer = paging.cr0, paging.cr3, paging.cr4, paging.efer
        g.pdptr = paging.pdptr
        g.pkru = paging.pkru
        g.rflags = 2 | (AC if paging.ac else 0)
        dpl = 0x60 if paging.user else 0
        for seg in g.seg[0:6]:
            seg.base, seg.limit, seg.ar, seg.selector = 0, 0xFFFFFFFF, 0xC093 | dpl, 8 | dpl >> 5
        g.seg[lib.CPU_SEG_CS].ar = (0xA09B if paging.long else 0xC09B) | dpl
        self.ctl.maxphyaddr = paging.maxphyaddr
        lib.cpu_flush_tlb(self.cpu)
        lib.cpu_state_changed(self.cpu)

    def run(self, rip: int, rbx: int = 0) -> Outcome:
        """Execute from rip up to the UD2 or whatever comes first."""
        return self.outcome(self.run_raw(rip, rbx))

    def run_raw(self, rip: int, rbx: int = 0) -> int:
        """Do the same and return the reason of the exit."""
        self.guest.rip, self.guest.gpr[3] = rip, rbx
        return int(lib.cpu_enter(self.cpu))

    def outcome(self, reason: int) -> Outcome:
        e = self.exit
        if reason == lib.EXIT_EXCEPTION:
            vector = e.intr_info & 0xFF
            if vector == UD:
                return Outcome("ok")
            if vector == PF:
                return Outcome("pf", e.qualification, e.error_code)
            return Outcome({GP: "gp", SS: "ss"}[vector], 0, e.error_code)
        if reason == lib.EXIT_EPT_VIOLATION:
            return Outcome("ept", e.gpa, e.qualification)
        if reason == lib.EXIT_MMIO_READ:
            return Outcome("mmio-read", e.mmio[0].gpa, e.mmio[0].len)
        if reason == lib.EXIT_MMIO_WRITE:
            return Outcome("mmio-write", e.mmio[0].gpa, e.mmio[0].len)
        if reason == lib.EXIT_EMULATION:
            return Outcome("emulation")
        if reason == lib.EXIT_PAGE_FAULT:
            return Outcome("shadow", e.gla, e.error_code)
        if reason == lib.EXIT_HOST_FAULT:
            return Outcome("host-fault", e.hva)
        return Outcome(f"exit {reason}")
