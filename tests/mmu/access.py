"""Permutations of table entries, control registers and accesses, done by a guest, as kvm-unit-tests' access.c.

A batch is a table of records and one setting of CR0, CR4 and EFER.  The guest walks the table: it writes
the two entries of a record, invalidates, does the access at CPL 0 or 3, and records what came of it; its
handler notes the page fault.  The host compares with tests/mmu/reference.py.

    python -m tests.mmu.access --count 1000000 [--mode tdp|shadow] [--width 64|36|32] [--seed N]

Memory: 8 MiB at 0, mapped one to one for the supervisor, and again from USER on for CPL 3.  The large page
under test is [LARGE, ...), and its start is also the page table that the upper entry points to when it maps
no large page: so the same address bits are right for both.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import random
import struct
import sys
import time
from functools import cache
from math import gcd
from typing import TYPE_CHECKING

from pykvm.client import Hlt, Kvm
from tests.guest.bare import assemble
from tests.mmu import reference
from tests.mmu.guest import set_flat_segments
from tests.mmu.reference import (
    ACCESSED,
    CR0_WP,
    CR4_LA57,
    CR4_PAE,
    CR4_PSE,
    CR4_SMAP,
    CR4_SMEP,
    DIRTY,
    EFER_LMA,
    EFER_NXE,
    FETCH,
    GLOBAL,
    PS,
    READ,
    RW,
    US,
    WRITE,
    XD,
    Access,
    Cpu,
    PageFault,
)
from tests.mmu.reference import P as PRESENT

if TYPE_CHECKING:
    from collections.abc import Iterator

MEMORY = 8 << 20
HEADER, IDT, GDT, TSS, STACK, USER_STACK = 0x1000, 0x2000, 0x3000, 0x3800, 0x9000, 0xA000
CODE, USER_CODE = 0x10000, 0x18000
ROOT, PDPT, PD_LOW, ROOT5, LOW_TABLES = (
    0x20000,
    0x21000,
    0x22000,
    0x23000,
    0x24000,
)  # 32 bit: 3 tables from LOW_TABLES on
UPPER, MIDDLE = 0x2A000, 0x2B000  # tables on the way to the entries under test
RECORDS, RECORDS_END = 0x100000, 0x200000
USER = 0xC0_0000  # linear address of the CPL 3 alias of gpa 0
SMALL = 0x60_5000  # the frame behind the lower entry
OFFSET = 0x40  # of the word that is accessed, in its page
LDT_SELECTOR = OFFSET | 7

RECORD = struct.Struct("<6Q4I2IQ2I2Q2I16x")
# upper address, value, lower address, value, word's address, linear address,
# kind, marker, high half of the descriptor, pad;
# results: error, pad, cr2, value read, pad, upper, lower, word, pad
assert RECORD.size == 128
MAX_RECORDS = (RECORDS_END - RECORDS) // RECORD.size
NO_FAULT = 0xFFFF_FFFF
USER_MODE, WITH_AC, BY_CR3 = 0x100, 0x200, 0x400

# (width, level of the upper entry): 64 is 4-level paging, with level 5 5-level; 36 PAE, 32 two levels.
GUESTS = ((64, 2), (64, 3), (64, 4), (64, 5), (36, 2), (32, 2))
KINDS = ("read", "write", "modify", "fetch", "implicit", "implicit_write")

# Registers: rbp the record, rbx the linear address under test. Names with r are of the guest's width.
KERNEL = """
start:
    mov esp, {STACK}
    mov rax, [{HEADER} + 8]
    mov cr4, rax
    {SET_EFER}
    mov rax, [{HEADER} + 16]
    mov cr0, rax
    mov rbp, {RECORDS}
next:
    mov rdi, [rbp + 0]
    {WRITE_UPPER}
    mov rdi, [rbp + 16]
    {WRITE_LOWER}
    mov rdi, [rbp + 32]
    mov eax, [rbp + 52]
    mov [rdi], eax
    mov eax, [rbp + 56]
    mov [rdi + 4], eax
    mov rbx, [rbp + 40]
    mov edx, [rbp + 48]
    mov dword ptr [rbp + 64], -1
    xor eax, eax
    test edx, {BY_CR3}
    jnz by_cr3
    invlpg [rbx]
    jmp flushed
by_cr3:
    mov rcx, cr3
    mov cr3, rcx
flushed:
    mov ecx, 2
    test edx, {WITH_AC}
    jz 1f
    mov ecx, 0x40002
1:  movzx esi, dl
    test edx, {USER_MODE}
    jnz user
    push rcx
    popf{W}
    jmp [rsi * {PTR} + kernel_kinds]
user:
    mov rsi, [rsi * {PTR} + user_kinds]
    push {USER_DATA}
    push {USER} + {USER_STACK}
    push rcx
    push {USER_CS}
    push rsi
    iret{W}
k_read:
    mov eax, [rbx]
    jmp done
k_write:
    mov eax, [rbp + 52]
    xor eax, 0xFFFFFF00
    mov [rbx], eax
    jmp done
k_modify:
    mov eax, 0xFFFFFF00
    lock xor [rbx], eax
    jmp done
k_fetch:
    call rbx
    jmp done
k_implicit:
    mov eax, {LDT_SELECTOR}
    mov es, eax
    jmp done
page_fault:
    pop rax
    mov [rbp + 64], eax
    mov rax, cr2
    mov [rbp + 72], rax
    xor eax, eax
    jmp done
from_user:
done:
    mov esp, {STACK}
    push 2
    popf{W}
    mov [rbp + 80], eax
    mov rdi, [rbp + 0]
    {READ_UPPER}
    mov rdi, [rbp + 16]
    {READ_LOWER}
    mov rdi, [rbp + 32]
    mov eax, [rdi]
    mov [rbp + 104], eax
    mov eax, [rdi + 4]
    mov [rbp + 108], eax
    add rbp, 128
    dec dword ptr [{HEADER}]
    jnz next
    hlt
other_fault:
    mov dword ptr [rbp + 64], 0xBAD
    hlt
.balign 8
kernel_kinds: {WORD} k_read, k_write, k_modify, k_fetch, k_implicit, k_implicit
user_kinds: {WORD} u_read, u_write, u_modify, u_fetch, u_implicit, u_implicit
"""

USER_PROGRAM = """
u_read:
    mov eax, [rbx]
    int 0x80
u_write:
    mov eax, {VALUE_ADDRESS}
u_write_it:
    xor eax, 0xFFFFFF00
    mov [rbx], eax
    int 0x80
u_modify:
    mov eax, 0xFFFFFF00
    lock xor [rbx], eax
    int 0x80
u_fetch:
    call rbx
    int 0x80
u_implicit:
    mov eax, {LDT_SELECTOR}
    mov es, eax
    int 0x80
"""


def _names(source: str, wide: bool) -> str:
    if wide:
        return source
    for name in ("ax", "bx", "cx", "dx", "si", "di", "bp", "sp"):
        source = source.replace(f"r{name}", f"e{name}")
    return source


@cache
def program(width: int) -> tuple[bytes, bytes, dict[str, int]]:
    """Return the kernel's code, the user's, and the labels; the user program runs at USER + USER_CODE."""
    wide = width == 64
    # A 64-bit entry written by a 32-bit guest: the half with P last, as every guest does.
    wide_move = "mov rax, [rbp + {at}]; mov [rdi], rax"
    halves = "mov eax, [rbp + {at} + 4]; mov [rdi + 4], eax; mov eax, [rbp + {at}]; mov [rdi], eax"
    read_halves = "mov eax, [rdi]; mov [rbp + {at}], eax; mov eax, [rdi + 4]; mov [rbp + {at} + 4], eax"
    narrow = "mov eax, [rbp + {at}]; mov [rdi], eax"
    write = {64: wide_move, 36: halves, 32: narrow}[width]
    read = {
        64: "mov rax, [rdi]; mov [rbp + {at}], rax",
        36: read_halves,
        32: "mov eax, [rdi]; mov [rbp + {at}], eax",
    }
    values = {
        **{k: v for k, v in globals().items() if isinstance(v, int)},
        "W": "q" if wide else "d",
        "PTR": 8 if wide else 4,
        "WORD": ".quad" if wide else ".long",
        "USER_CS": 0x1B,
        "USER_DATA": 0x23,
        "WRITE_UPPER": write.format(at=8),
        "WRITE_LOWER": write.format(at=24),
        "READ_UPPER": read[width].format(at=88),
        "READ_LOWER": read[width].format(at=96),
        "SET_EFER": f"mov ecx, 0xC0000080; xor edx, edx; mov eax, [{HEADER} + 24]; wrmsr",
        "VALUE_ADDRESS": "[rbp + 0xC00000 + 52]",
    }
    bits = 64 if wide else 32
    user, user_labels = assemble(_names(USER_PROGRAM.format(**values), wide), USER + USER_CODE, bits, ())
    known = tuple((n, v) for n, v in user_labels.items())
    kernel, labels = assemble(_names(KERNEL.format(**values), wide), CODE, bits, known)
    return kernel, user, labels


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One record: values of the two entries (with their addresses), and the access."""

    upper: int
    lower: int
    kind: str
    user: bool
    ac: bool
    by_cr3: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Mode:
    """CPU bits of a batch."""

    wp: bool = True
    smep: bool = False
    smap: bool = False
    nxe: bool = True
    pse: bool = True


class AccessGuest:
    """The guest. `level`: of the upper entry under test."""

    def __init__(self, *, width: int, tdp: bool, level: int = 2) -> None:
        self.width, self.level = width, level
        self.wide = width == 64
        self.size = 4 if width == 32 else 8
        self.root = ROOT5 if level == 5 else ROOT
        self._stack = contextlib.ExitStack()
        kvm = self._stack.enter_context(Kvm(tdp=tdp))
        self.vm = self._stack.enter_context(kvm.create_vm())
        self.ram = self.vm.add_memory(0, MEMORY)
        self.vcpu = self._stack.enter_context(self.vm.create_vcpu(0))
        cpuid = kvm.supported_cpuid()
        self.vcpu.set_cpuid(cpuid)
        leaf = next(entry for entry in cpuid if entry.function == 0x8000_0008)
        self.maxphyaddr = leaf.eax & 0xFF
        self._load()

    def close(self) -> None:
        self._stack.close()

    # ---- memory ----

    def write(self, address: int, value: int, size: int | None = None) -> None:
        size = size or self.size
        self.ram[address : address + size] = value.to_bytes(size, "little")

    def _load(self) -> None:
        kernel, user, labels = program(self.width)
        self.start = labels["start"]
        self.ram[CODE : CODE + len(kernel)] = kernel
        self.ram[USER_CODE : USER_CODE + len(user)] = user
        self._descriptors(labels)
        self._static_tables()
        self._test_tables()
        self._registers()

    def _descriptors(self, labels: dict[str, int]) -> None:
        code = 0x00AF9B000000FFFF if self.wide else 0x00CF9B000000FFFF
        for at, value in enumerate((0, code, 0x00CF93000000FFFF, code | 0x60 << 40, 0x00CFF3000000FFFF)):
            self.write(GDT + 8 * at, value, 8)
        gate_size = 16 if self.wide else 8
        for vector in range(0x81):
            handler, kind = labels["other_fault"], 0x8E00
            if vector == 14:
                handler = labels["page_fault"]
            elif vector == 0x80:
                handler, kind = labels["from_user"], 0xEE00
            low = handler & 0xFFFF | 8 << 16 | kind << 32 | (handler >> 16 & 0xFFFF) << 48
            self.write(IDT + gate_size * vector, low, 8)
        if self.wide:
            self.write(TSS + 4, STACK, 8)
        else:
            self.write(TSS + 4, STACK, 4)
            self.write(TSS + 8, 0x10, 4)

    def _static_tables(self) -> None:
        """One to one for the supervisor up to 8 MiB, and gpa 0.. at USER for CPL 3."""
        full = PRESENT | RW | ACCESSED | DIRTY
        if self.width == 32:
            # Small pages: they mean the same whatever CR4.PSE is.
            for n in range(2048):
                self.write(LOW_TABLES + n * 4, n << 12 | full)
            for n in range(1024):
                self.write(LOW_TABLES + 0x2000 + n * 4, n << 12 | full | US)
            for n, index in ((0, 0), (1, 1), (2, USER >> 22)):
                self.write(ROOT + index * 4, LOW_TABLES + n * 0x1000 | full | US)
            return
        for n in range(4):
            self.write(PD_LOW + n * 8, n << 21 | full | PS)
        for n in range(2):
            self.write(PD_LOW + (USER >> 21) * 8 + n * 8, n << 21 | full | US | PS)
        if self.width == 36:
            self.write(ROOT, PD_LOW | PRESENT)
        else:
            self.write(ROOT5, ROOT | full | US)
            self.write(ROOT, PDPT | full | US)
            self.write(PDPT, PD_LOW | full | US)

    def _test_tables(self) -> None:
        """Set `la`, `large`, the addresses of the two entries, and the fixed tables above them."""
        full = PRESENT | RW | US | ACCESSED
        if self.width == 32:
            # 4 MiB: the large page is [0x400000, 0x800000), the table is its first page
            self.large, self.la = 0x40_0000, 0x4020_3000 + OFFSET
            self.upper_at = ROOT + (self.la >> 22) * 4
            self.lower_at = self.large + (self.la >> 12 & 1023) * 4
            self.large_word = 0x60_3000 + OFFSET
            return
        self.la = 0x4020_3000 + OFFSET
        if self.level == 2:
            self.large, self.la = 0x60_0000, 0x4000_3000 + OFFSET
            self.upper_at = UPPER + (self.la >> 21 & 511) * 8
            self.lower_at = self.large + (self.la >> 12 & 511) * 8
            self.large_word = 0x60_3000 + OFFSET
            if self.width == 36:
                self.write(ROOT + 8, UPPER | PRESENT)
            else:
                self.write(PDPT + 8, UPPER | full)
            return
        # The large page starts at 0, and so does the table: its entry is in a hole of the layout.
        self.large, self.large_word = 0, 0x60_3000 + OFFSET
        if self.level == 3:
            self.la = (1 << 30) + 0x60_3000 + OFFSET
            self.upper_at, self.lower_at = PDPT + 8, (self.la >> 21 & 511) * 8
        elif self.level == 4:
            self.la = (1 << 39) + 0x60_3000 + OFFSET
            self.upper_at, self.lower_at = ROOT + 8, (self.la >> 30 & 511) * 8
        else:
            # The lower entry is one of a PML4; behind it 1 GiB that allows everything.
            self.la = (1 << 48) + 0x60_3000 + OFFSET
            self.upper_at, self.lower_at = ROOT5 + 8, (self.la >> 39 & 511) * 8
            self.write(MIDDLE, full | US | DIRTY | PS)

    def _registers(self) -> None:
        with self.vcpu.sregs as sregs:
            sregs.cr0, sregs.cr3 = 0x8001_0031, self.root
            sregs.cr4 = CR4_PSE if self.width == 32 else CR4_PAE | CR4_LA57 * (self.level == 5)
            sregs.efer = 0x500 if self.wide else 0
            # The data segments stay what they are through IRET to CPL 3.
            set_flat_segments(sregs, wide=self.wide, data=0x23)
            sregs.idt.base, sregs.idt.limit = IDT, 0x81 * 16
            sregs.gdt.base, sregs.gdt.limit = GDT, 0x27
            sregs.tr.base, sregs.tr.limit, sregs.tr.selector, sregs.tr.type = TSS, 0x67, 0x28, 11
            sregs.tr.present, sregs.tr.s, sregs.tr.unusable = 1, 0, 0
            ldt = sregs.ldt
            ldt.base, ldt.limit, ldt.selector, ldt.type = self.la & ~0xFFF, 0xFFF, 0x30, 2
            ldt.present, ldt.s, ldt.unusable = 1, 0, 0

    # ---- running ----

    def run(self, mode: Mode, cases: list[Case]) -> list[tuple[int, ...]]:
        """Run a batch; return the records as the guest left them."""
        assert len(cases) <= MAX_RECORDS
        packed = [self._pack(mode, at, case) for at, case in enumerate(cases)]
        self.ram[RECORDS : RECORDS + 128 * len(cases)] = b"".join(packed)
        cpu = self.cpu(mode)
        self.ram[HEADER : HEADER + 32] = struct.pack("<QQQQ", len(cases), cpu.cr4, cpu.cr0, cpu.efer)
        with self.vcpu.regs as regs:
            regs.rip, regs.rsp, regs.rflags = self.start, STACK, 2
        found = self.vcpu.run()
        done = len(cases) - int.from_bytes(self.ram[HEADER : HEADER + 4], "little")
        regs = self.vcpu.regs
        assert found == Hlt(), f"{found} at {regs.rip:#x} in case {done}: {cases[min(done, len(cases) - 1)]}"
        assert done == len(cases), f"fault at {regs.rip:#x} in case {done}: {cases[done]}"
        return list(RECORD.iter_unpack(bytes(self.ram[RECORDS : RECORDS + 128 * len(cases)])))

    def _pack(self, mode: Mode, at: int, case: Case) -> bytes:
        flags = KINDS.index(case.kind) | USER_MODE * case.user | WITH_AC * case.ac | BY_CR3 * case.by_cr3
        word = self.word(mode, case)
        high = 0x00CFF200 if case.kind == "implicit_write" else 0x00CFF300
        # The first byte is RET.
        marker = (at * 0x9E3779 & 0xFFFFFF) << 8 | 0xC3
        return RECORD.pack(
            self.upper_at, case.upper, self.lower_at, case.lower, word, self.la, flags, marker, high,
            *[0] * 10,
        )  # fmt: skip

    def is_large(self, mode: Mode, case: Case) -> bool:
        """Whether the upper entry maps the page."""
        return bool(case.upper & PS) and (self.width != 32 or mode.pse)

    def word(self, mode: Mode, case: Case) -> int:
        """Address of the word that the access gets at, if it does."""
        if self.level > 2 or self.is_large(mode, case):
            return self.large_word
        return SMALL + OFFSET

    def cpu(self, mode: Mode) -> Cpu:
        cr0 = 0x8000_0031 | CR0_WP * mode.wp
        cr4 = CR4_PAE * (self.width != 32) | CR4_PSE * mode.pse | CR4_SMEP * mode.smep | CR4_SMAP * mode.smap
        cr4 |= CR4_LA57 * (self.level == 5)
        efer = (0x100 | EFER_LMA) * self.wide | EFER_NXE * mode.nxe
        pdptrs = (PD_LOW | 1, UPPER | 1, 0, 0) if self.width == 36 else ()
        return Cpu(cr0, self.root, cr4, efer, pdptrs, self.maxphyaddr)

    # ---- what must come of it ----

    def check(self, mode: Mode, cases: list[Case], records: list[tuple[int, ...]]) -> None:
        cpu = self.cpu(mode)
        for case, record in zip(cases, records, strict=True):
            problem = self._compare(cpu, mode, case, record)
            if problem:
                raise AssertionError(f"{mode} {describe(case, self.size)}: {problem}")

    def _compare(self, cpu: Cpu, mode: Mode, case: Case, record: tuple[int, ...]) -> str:
        marker, error, cr2, value, upper, lower, word, high = (
            record[i] for i in (7, 10, 12, 13, 15, 16, 17, 18)
        )
        if self.size == 4:
            upper, lower = upper & 0xFFFF_FFFF, lower & 0xFFFF_FFFF
        target = self.word(mode, case)
        wanted, updates = self.expect(cpu, case)
        want_upper = case.upper | updates.get(self.upper_at, 0)
        want_lower = case.lower | updates.get(self.lower_at, 0)
        if isinstance(wanted, PageFault):
            if error != wanted.error_code:
                return f"#PF {error:#x}, must be {wanted.error_code:#x}"
            # Where in the descriptor its Accessed bit is written is not architectural.
            if cr2 != self.la and not (
                case.kind == "implicit_write" and error & 2 and cr2 - self.la in range(8)
            ):
                return f"CR2 {cr2:#x}"
            if (upper, lower, word) != (want_upper, want_lower, marker):
                return f"changed to upper {upper:#x} lower {lower:#x} word {word:#x} by a fault"
            return ""
        if error != NO_FAULT:
            return f"#PF {error:#x}, must be none"
        if wanted.gpa != target:
            return f"test is wrong: {wanted.gpa:#x} is not {target:#x}"
        after = marker ^ 0xFFFFFF00 if case.kind in {"write", "modify"} else marker
        if word != after:
            return f"word is {word:#x}, must be {after:#x}"
        if case.kind == "read" and value != marker:
            return f"read {value:#x}, must be {marker:#x}"
        if high != 0x00CFF300:
            return f"descriptor is {high:#x}"
        if (upper, lower) != (want_upper, want_lower):
            return f"entries {upper:#x} {lower:#x}, must be {want_upper:#x} {want_lower:#x}"
        return ""

    def expect(self, cpu: Cpu, case: Case) -> tuple[reference.Result, dict[int, int]]:
        """Ask the reference; return its answer and the bits that are set in entries by then."""
        entries = {self.upper_at: case.upper, self.lower_at: case.lower}

        def read(gpa: int, size: int) -> int:
            if gpa in entries:
                return entries[gpa]
            return int.from_bytes(self.ram[gpa : gpa + size], "little")

        implicit = case.kind.startswith("implicit")
        kinds = {"read": (READ,), "fetch": (FETCH,), "implicit": (READ,), "implicit_write": (READ, WRITE)}
        updates: dict[int, int] = {}
        # A descriptor is read, and then its Accessed bit is set: two walks.
        for kind in kinds.get(case.kind, (WRITE,)):
            result = reference.translate(cpu, read, self.la, Access(kind, case.user, case.ac, implicit))
            if isinstance(result, PageFault):
                break
            for gpa, bits in result.updates.items():
                updates[gpa] = updates.get(gpa, 0) | bits
        return result, updates


def describe(case: Case, size: int) -> str:
    names = [(1, "P"), (2, "W"), (4, "U"), (32, "A"), (64, "D"), (128, "PS"), (256, "G")]
    if size == 8:
        names.append((XD, "XD"))

    def entry(value: int) -> str:
        return " ".join([name for bit, name in names if value & bit] + [hex(value & ~0x1FF & ~XD)])

    where = "user" if case.user else "kernel"
    ac, flush = " ac" * case.ac, " cr3" * case.by_cr3
    return f"{case.kind} {where}{ac}{flush} upper [{entry(case.upper)}] lower [{entry(case.lower)}]"


# ---- the cases ------------------------------------------------------------------------------------------


class Space:
    """All cases of one guest, numbered."""

    def __init__(self, guest: AccessGuest) -> None:
        self.guest = guest
        narrow = guest.width == 32
        upper = [PRESENT, RW, US, ACCESSED, PS] + ([] if narrow else [XD])
        lower = [PRESENT, RW, US, ACCESSED, DIRTY, GLOBAL] + ([] if narrow else [XD])
        # What the lower entry maps: a small page, or a large one of the level.
        self.frame = {2: SMALL, 3: 0x60_0000 | PS, 4: PS, 5: MIDDLE}[guest.level]
        self.upper = [guest.large | bits for bits in _subsets(upper)] + self._reserved_upper()
        self.lower = [self.frame | bits for bits in _subsets(lower)] + self._reserved_lower()
        self.accesses = [
            (kind, user, ac) for kind, user, ac in itertools.product(KINDS, (False, True), (False, True))
        ]
        self.modes = self._modes()
        self.per_mode = len(self.upper) * len(self.lower) * len(self.accesses)

    def __len__(self) -> int:
        return self.per_mode * len(self.modes)

    def _modes(self) -> list[Mode]:
        narrow = self.guest.width == 32
        return [
            Mode(*values) for values in itertools.product(
                (True, False), (False, True), (False, True), (True, False), (True, False) if narrow else (True,)
            )
        ]  # fmt: skip

    def _reserved_upper(self) -> list[int]:
        g = self.guest
        full = PRESENT | RW | US
        if g.width == 32:
            # bit 21 is reserved in a large page; D, G, ignored bits and PAT are not
            special = [1 << 21 | PS, DIRTY | PS, DIRTY, GLOBAL, GLOBAL | PS, 0xE00, 1 << 12 | PS]
        else:
            special = [1 << 51, 1 << g.maxphyaddr, 1 << 13 | PS, 1 << 20 | PS, 1 << 12 | PS, DIRTY | PS]
            special += [DIRTY, GLOBAL, GLOBAL | PS, 0xE00, 1 << 52, 1 << 58, 0x7F << 52]
            special += [1 << 51 | PS, XD | 1 << 52 | PS]
        return [g.large | full | bits for bits in special if not (bits & 1 << 12 and not bits & PS)]

    def _reserved_lower(self) -> list[int]:
        g = self.guest
        full = PRESENT | RW | US
        special = [PS, 0xE00, 0x18]
        if g.width != 32:
            special += [1 << 51, 1 << g.maxphyaddr, 1 << 52, 1 << 62, XD | 1 << 51, 0x7F << 52]
        if g.level in {3, 4}:
            special += [1 << 13, 1 << 20, 1 << 12]
        found = [self.frame | full | bits for bits in special]
        return found if g.level == 2 else [*found, self.frame & ~PS | full]

    def case(self, number: int) -> Case:
        """Return case `number` within a mode."""
        number, a = divmod(number, len(self.accesses))
        number, low = divmod(number, len(self.lower))
        kind, user, ac = self.accesses[a]
        return Case(self.upper[number], self.lower[low], kind, user, ac, by_cr3=not (number + low + a) % 5)

    def batches(self, count: int, seed: int) -> Iterator[tuple[Mode, list[Case]]]:
        """Yield `count` cases, spread evenly: a step that is coprime to the number of cases visits all."""
        rng = random.Random(seed)
        each = -(-min(count, len(self)) // len(self.modes))
        for mode in self.modes:
            step = _coprime(self.per_mode, rng)
            at = rng.randrange(self.per_mode)
            left = each
            while left:
                n = min(left, MAX_RECORDS)
                cases = []
                for _ in range(n):
                    cases.append(self.case(at))
                    at = (at + step) % self.per_mode
                left -= n
                yield mode, cases


def _subsets(bits: list[int]) -> list[int]:
    return [sum(b for i, b in enumerate(bits) if n >> i & 1) for n in range(1 << len(bits))]


def _coprime(n: int, rng: random.Random) -> int:
    while True:
        step = rng.randrange(n // 3, n)
        if gcd(step, n) == 1:
            return step


def run(guest: AccessGuest, count: int, seed: int) -> int:
    """Run `count` cases and compare all of them; return how many there were."""
    done = 0
    for mode, cases in Space(guest).batches(count, seed):
        guest.check(mode, cases, guest.run(mode, cases))
        done += len(cases)
    return done


def main() -> None:
    """Run many, and say how many were right."""
    parser = argparse.ArgumentParser(
        description="permutations of table entries, control registers and accesses"
    )
    parser.add_argument("--count", type=int, default=100_000, help="cases of each guest; there are millions")
    parser.add_argument("--mode", choices=["tdp", "shadow"])
    parser.add_argument("--width", type=int, choices=[32, 36, 64])
    parser.add_argument("--level", type=int, choices=[2, 3, 4, 5], help="of the upper of the two entries")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    for mode, (width, level) in itertools.product(("tdp", "shadow"), GUESTS):
        if options.mode in {None, mode} and options.width in {None, width} and options.level in {None, level}:
            guest = AccessGuest(width=width, tdp=mode == "tdp", level=level)
            total = len(Space(guest))
            start = time.perf_counter()
            done = run(guest, options.count, options.seed)
            seconds = time.perf_counter() - start
            problems = guest.vm.mmu.audit()
            guest.close()
            what = f"{mode:6} {width}-bit, levels {level} and {level - 1}"
            print(f"{what}: {done} of {total} cases right in {seconds:.1f} s, audit {problems or 'clean'}")
            if problems:
                sys.exit(1)


if __name__ == "__main__":
    main()
