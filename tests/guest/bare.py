"""A bare processor with RAM, for tests of what instructions do: no KVM, no ioctl.

    m = Machine()
    m.asm("mov ax, 1; int 0x80; hlt", CODE, bits=16)
    m.real(CODE)
    assert m.run() == lib.EXIT_HLT
    assert m.reg("rax") & 0xFFFF == 1

RAM is mapped by SPTEs at guest-physical 0; everything behind it is an EPT violation.  Assembly is
GNU as with Intel syntax and no register prefix; a label is a symbol for the `asm()` that follows.

What `real`, `prot32` and `long64` prepare (all of it identity-mapped, and free to be changed):

    GDT       selectors below, `set_gdt()` writes an entry
    IDT       every vector leads to `HANDLERS + 16 * vector`, where there is an HLT: `vector()` says
              which one was taken, `frame()` what was pushed.  Real mode: the same through the IVT
    TSS       ring 0 stack at STACK0, IST1 at IST1, no I/O bitmap; TR is loaded
    paging    long64: 2 MiB pages for the first GiB, accessible to user mode; prot32: off
    stack     rsp = STACK
"""

from __future__ import annotations

import mmap
import os
import struct
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

from pykvm.abi import ffi, lib

GDT, IDT, TSS = 0x1000, 0x2000, 0x3000
PML4, PDPT, PD = 0x4000, 0x5000, 0x6000
STACK0, IST1, STACK = 0x9000, 0xA000, 0xF000
CODE, HANDLERS = 0x10000, 0x30000

CODE32, DATA32, CODE64, USER_CODE32, USER_DATA, USER_CODE64 = 0x08, 0x10, 0x18, 0x20, 0x28, 0x30
CODE16, DATA16, TSS_SELECTOR, LDT_SELECTOR, FREE_SELECTOR = 0x38, 0x40, 0x48, 0x58, 0x68

GPRS = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr")
ALL_ONES = 0xFFFFFFFF


def descriptor(base: int, limit: int, ar: int) -> int:
    """A segment descriptor; `ar` as in struct cpu_seg (0xc09b is flat code), limit before scaling."""
    low = (limit & 0xFFFF) | (base & 0xFFFFFF) << 16 | (ar & 0xFF) << 40
    return low | (limit >> 16 & 0xF) << 48 | (ar >> 12 & 0xF) << 52 | (base >> 24 & 0xFF) << 56


def gate(selector: int, offset: int, kind: int = 0x8E, ist: int = 0) -> bytes:
    """A gate of 16 bytes, as in long mode; the first 8 are the one of 32-bit mode."""
    low = (offset & 0xFFFF) | selector << 16 | ist << 32 | kind << 40 | (offset >> 16 & 0xFFFF) << 48
    return low.to_bytes(8, "little") + (offset >> 32).to_bytes(8, "little")


def read_elf(elf: bytes) -> tuple[bytes, dict[str, int]]:
    """The text section and the symbols of an ELF64 file."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count = struct.unpack_from("<HH", elf, 0x3A)
    # name, type, flags, address, offset, size, link, info, alignment, entry size
    sections = [struct.unpack_from("<IIQQQQIIQQ", elf, table + size * k) for k in range(count)]
    text, symbols = b"", {}
    for _, kind, flags, _, offset, length, link, *_ in sections:
        if kind == 1 and flags & 4:
            text = elf[offset : offset + length]
        if kind == 2:
            for name, _, _, section, value, _ in struct.iter_unpack("<IBBHQQ", elf[offset : offset + length]):
                start = sections[link][4] + name
                if name and section:
                    symbols[elf[start : elf.index(0, start)].decode()] = value
    return text, symbols


@cache
def assemble(
    source: str, address: int, bits: int, known: tuple[tuple[str, int], ...]
) -> tuple[bytes, dict[str, int]]:
    """Machine code of `source` at `address`, and its labels; `known` are those of other code."""
    lines = [".intel_syntax noprefix", f".code{bits}", *(f".set {n}, {v}" for n, v in known), source, ""]
    with tempfile.TemporaryDirectory() as tmp:
        Path(tmp, "t.s").write_text("\n".join(lines))
        subprocess.run(["as", "--64", "-o", "t.o", "t.s"], check=True, cwd=tmp)
        subprocess.run(["ld", f"-Ttext={address:#x}", "-e", "0", "-o", "t.elf", "t.o"], check=True, cwd=tmp)
        text, symbols = read_elf(Path(tmp, "t.elf").read_bytes())
    return text, {n: v for n, v in symbols.items() if not n.startswith("_")}


class Machine:
    """One processor and its RAM.  `guest`, `ctl`, `exit`: the parts of struct vmcs."""

    def __init__(self, mem_size: int = 0x400000) -> None:
        self.ram = mmap.mmap(-1, mem_size)
        self.size = mem_size
        self.symbols: dict[str, int] = {}
        self.cpu = ffi.gc(lib.cpu_create(), lib.cpu_destroy)
        vmcs = lib.cpu_vmcs(self.cpu)
        self.guest: Any = vmcs.guest
        self.ctl: Any = vmcs.ctl
        self.exit: Any = vmcs.exit
        self._tables: list[Any] = []
        self._holes: set[int] = set()
        self._root = self._table()
        self.hva = int(ffi.cast("uintptr_t", ffi.from_buffer(self.ram)))
        for gpa in range(0, mem_size, 4096):
            self.map(gpa)
        ctl = self.ctl
        ctl.flags = lib.CPU_TDP | lib.CPU_EXIT_HLT
        ctl.ept_level = 4
        ctl.eptp = self._address(self._root)
        ctl.maxphyaddr = 40
        ctl.cr0_valid = 0xE005003F
        ctl.cr4_valid = 0x7FFFFF & ~(lib.X86_CR4_VMXE | lib.X86_CR4_SMXE)
        ctl.efer_valid = 0xD01
        ctl.xcr0_valid = 7
        ctl.mmio_gen_mask = 2**64 - 1
        for k in range(lib.CPU_NR_CPUID):
            ctl.cpuid[k] = ALL_ONES

    # ---- memory

    def _table(self) -> Any:
        table = ffi.gc(lib.spt_alloc(), lib.spt_free)
        self._tables.append(table)
        return table

    def _address(self, pointer: Any) -> int:
        return int(ffi.cast("uintptr_t", pointer))

    def _slot(self, gpa: int) -> Any:
        table = self._root
        for level in (4, 3, 2):
            slot = table + (gpa >> (12 + 9 * (level - 1)) & 511)
            if not lib.spte_read(slot):
                lib.spte_write(slot, self._address(self._table()) | lib.SPTE_RWX)
            table = ffi.cast("uint64_t *", lib.spte_read(slot) & lib.SPTE_PFN)
        return table + (gpa >> 12 & 511)

    def map(self, gpa: int, rights: int = 7, target: int | None = None) -> None:
        """Map the page of gpa to the RAM of the same address, or of `target`; rights 0: unmap."""
        hva = self.hva + (gpa if target is None else target) & ~0xFFF
        plain = rights & 7 == 7 and (target is None or target & ~0xFFF == gpa & ~0xFFF)
        (self._holes.discard if plain else self._holes.add)(gpa & ~0xFFF)
        lib.spte_xchg(self._slot(gpa), hva | rights if rights else 0)
        lib.cpu_flush_tlb(self.cpu)

    def unmap(self, gpa: int) -> None:
        self.map(gpa, 0)

    @property
    def has_holes(self) -> bool:
        """Whether a page is anything but RAM with all rights."""
        return bool(self._holes)

    def map_mmio(self, gpa: int) -> None:
        self._holes.add(gpa & ~0xFFF)
        self.ctl.mmio_gen_mask = self.ctl.mmio_gen = lib.SPTE_MMIO
        self.ctl.mmio_gen_mask |= 1
        lib.spte_xchg(self._slot(gpa), gpa & ~0xFFF | lib.SPTE_MMIO)
        lib.cpu_flush_tlb(self.cpu)

    def load(self, address: int, data: bytes) -> None:
        self.ram[address : address + len(data)] = data
        lib.cpu_sync_code(self.cpu)

    def read(self, address: int, size: int = 8) -> int:
        return int.from_bytes(self.ram[address : address + size], "little")

    def write(self, address: int, value: int, size: int = 8) -> None:
        self.load(address, (value & (1 << 8 * size) - 1).to_bytes(size, "little"))

    def asm(self, source: str, address: int = CODE, bits: int = 64) -> dict[str, int]:
        """Assemble and load; labels are returned, and known to what is assembled later."""
        code, labels = assemble(source, address, bits, tuple(self.symbols.items()))
        self.load(address, code)
        self.symbols |= labels
        return self.symbols

    # ---- registers

    def reg(self, name: str) -> int:
        if name in GPRS:
            return int(self.guest.gpr[GPRS.index(name)])
        return int(getattr(self.guest, name))

    def set(self, **values: int) -> None:
        """Set registers: set(rax=1, rflags=2, cr2=0); dr0 to dr3 too."""
        for name, value in values.items():
            if name in GPRS:
                self.guest.gpr[GPRS.index(name)] = value
            elif name in {"dr0", "dr1", "dr2", "dr3"}:
                self.guest.dr[int(name[2])] = value
            else:
                setattr(self.guest, name, value)
        lib.cpu_state_changed(self.cpu)

    def set_seg(self, name: str, selector: int, base: int, limit: int, ar: int) -> None:
        """Set a segment register, hidden part and all; `ar` as in struct cpu_seg."""
        s = self.seg(name)
        s.selector, s.base, s.limit, s.ar = selector, base, limit, ar
        lib.cpu_state_changed(self.cpu)

    def seg(self, name: str) -> Any:
        return self.guest.seg[SEGMENTS.index(name)]

    def selectors(self) -> dict[str, int]:
        return {name: int(self.seg(name).selector) for name in SEGMENTS}

    @property
    def cpl(self) -> int:
        return int(self.seg("ss").ar >> 5 & 3)

    # ---- modes

    def set_gdt(self, selector: int, value: int, high: int = 0) -> None:
        self.write(GDT + (selector & ~7), value)
        if high:
            self.write(GDT + (selector & ~7) + 8, high)

    def set_gate(self, vector: int, raw: bytes) -> None:
        size = 16 if self.guest.efer & lib.EFER_LMA else 8
        self.load(IDT + size * vector, raw[:size])

    def _tables_in_memory(self, wide: bool) -> None:
        ars = {CODE32: 0xC09B, DATA32: 0xC093, CODE64: 0xA09B, USER_CODE32: 0xC0FB, USER_DATA: 0xC0F3}
        for selector, ar in {**ars, USER_CODE64: 0xA0FB}.items():
            self.set_gdt(selector, descriptor(0, 0xFFFFF, ar))
        self.set_gdt(CODE16, descriptor(0, 0xFFFF, 0x9B))
        self.set_gdt(DATA16, descriptor(0, 0xFFFF, 0x93))
        self.set_gdt(TSS_SELECTOR, descriptor(TSS, 0x67, 0x8B))
        for vector in range(256):
            raw = gate(CODE64 if wide else CODE32, HANDLERS + 16 * vector)
            self.load(IDT + (16 if wide else 8) * vector, raw if wide else raw[:8])
            self.load(HANDLERS + 16 * vector, b"\xf4")
        self.load(TSS, bytes(0x68))
        self.write(TSS + 4, STACK0)
        self.write(TSS + 102, 0x68, 2)
        if wide:
            self.write(TSS + 36, IST1)
        else:
            self.write(TSS + 8, DATA32)
        g = self.guest
        g.gdtr.base, g.gdtr.limit = GDT, 0xFFF
        g.idtr.base, g.idtr.limit = IDT, 0xFFF if wide else 0x7FF
        self.set_seg("tr", TSS_SELECTOR, TSS, 0x67, 0x8B)
        self.set_seg("ldtr", 0, 0, 0, 0x10000)

    def _start(self, ip: int) -> None:
        for k in range(16):
            self.guest.gpr[k] = 0
        g = self.guest
        g.rip, g.rflags = ip, 2
        g.gpr[GPRS.index("rsp")] = STACK
        g.interruptibility = g.activity = g.pending_dbg = 0
        g.dr6, g.dr7 = 0xFFFF0FF0, 0x400
        self.ctl.entry_event.info = 0
        lib.cpu_state_changed(self.cpu)
        lib.cpu_flush_tlb(self.cpu)

    def real(self, ip: int, cs: int | None = None) -> None:
        """Real mode at linear address ip (or cs:ip), data segments and SS at 0, SP = STACK."""
        for vector in range(256):
            self.write(4 * vector, (HANDLERS >> 4) << 16 | 16 * vector, 4)
            self.load(HANDLERS + 16 * vector, b"\xf4")
        g = self.guest
        g.cr0, g.cr4, g.efer = 0x10, 0, 0
        g.idtr.base, g.idtr.limit = 0, 0x3FF
        base = (ip & ~0xFFFF) >> 4 if cs is None else cs
        for name in SEGMENTS[:6]:
            self.set_seg(name, 0, 0, 0xFFFF, 0x93)
        self.set_seg("cs", base, base << 4, 0xFFFF, 0x9B)
        self._start(ip - (base << 4) if cs is None else ip)

    def prot32(self, eip: int, cpl: int = 0) -> None:
        """32-bit protected mode, flat segments, paging off."""
        g = self.guest
        g.cr0, g.cr4, g.efer = 0x11, 0, 0
        self._tables_in_memory(wide=False)
        code, data = (USER_CODE32 | 3, USER_DATA | 3) if cpl else (CODE32, DATA32)
        for name in SEGMENTS[:6]:
            self.set_seg(name, data, 0, ALL_ONES, 0xC0F3 if cpl else 0xC093)
        self.set_seg("cs", code, 0, ALL_ONES, 0xC0FB if cpl else 0xC09B)
        self._start(eip)

    def long64(self, rip: int, cpl: int = 0) -> None:
        """64-bit mode, identity-mapped with 2 MiB pages that user mode may use."""
        self.write(PML4, PDPT | 0x27)
        self.write(PDPT, PD | 0x27)
        for k in range(512):
            self.write(PD + 8 * k, k << 21 | 0xE7)
        g = self.guest
        g.cr0, g.cr3, g.cr4, g.efer = 0x80010033, PML4, lib.X86_CR4_PAE | lib.X86_CR4_OSFXSR, 0xD01
        self._tables_in_memory(wide=True)
        code, data = (USER_CODE64 | 3, USER_DATA | 3) if cpl else (CODE64, DATA32)
        for name in SEGMENTS[:6]:
            self.set_seg(name, data, 0, ALL_ONES, 0xC0F3 if cpl else 0xC093)
        self.set_seg("cs", code, 0, ALL_ONES, 0xA0FB if cpl else 0xA09B)
        self._start(rip)

    def vm86(self, cs: int, ip: int, iopl: int = 3) -> None:
        """Virtual-8086 mode under the tables of prot32; segments at 0, stack at STACK."""
        self.prot32(0)
        for name in SEGMENTS[:6]:
            self.set_seg(name, 0, 0, 0xFFFF, 0xF3)
        self.set_seg("cs", cs, cs << 4, 0xFFFF, 0xF3)
        self.set(rip=ip, rflags=2 | lib.X86_EFLAGS_VM | iopl << 12)

    # ---- running

    def enter(self) -> int:
        """Enter once; the exit's reason, preemption too."""
        return int(lib.cpu_enter(self.cpu))

    def run(self, until: int | None = None, seconds: float = 10) -> int:
        """Enter until an exit other than preemption; `until`: the one it must be."""
        end = time.monotonic() + seconds
        while True:
            reason = self.enter()
            if reason not in {lib.EXIT_PREEMPTED, lib.EXIT_KICK}:
                break
            assert time.monotonic() < end, f"still running at {self.guest.rip:#x}"
        if os.environ.get("BARE_TRACE"):
            print(f"exit {reason} rip {self.guest.rip:#x} rsp {self.reg('rsp'):#x}")
        assert until is None or reason == until, f"exit {reason} at {self.guest.rip:#x}, not {until}"
        return reason

    def skip(self) -> None:
        """Retire the instruction of the last exit without executing it."""
        lib.cpu_skip(self.cpu)

    def inject(self, vector: int, kind: int = 0, error: int | None = None, length: int = 0) -> None:
        """Deliver this event at the next entry; kind is a CPU_EVENT_* type."""
        ev = self.ctl.entry_event
        ev.info = vector | kind | lib.CPU_EVENT_VALID | (lib.CPU_EVENT_HAS_ERROR if error is not None else 0)
        ev.error_code = error or 0
        ev.insn_len = length

    def vector(self) -> int:
        """The vector whose default handler was reached, -1 for none."""
        where = int(self.guest.rip) + (int(self.seg("cs").base))
        number, rest = divmod(where - HANDLERS - 1, 16)
        return number if rest == 0 and 0 <= number < 256 else -1

    def frame(self, n: int = 3, size: int | None = None) -> list[int]:
        """The n topmost stack slots."""
        if size is None:
            long_mode = self.guest.efer & lib.EFER_LMA
            size = 8 if long_mode else 4 if self.guest.cr0 & 1 else 2
        rsp = self.reg("rsp") + int(self.seg("ss").base if size < 8 else 0)
        return [self.read(rsp + size * k, size) for k in range(n)]
