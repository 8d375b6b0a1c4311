"""A VM whose guest runs in 32-bit, PAE or long mode on page tables that the test or it itself writes.

The first 2 MiB (4 MiB in 32-bit mode) of linear addresses are mapped one to one by a large page that
holds code, tables and stack.  TEST is where tests map things: its table of the last level is at PT, the
one above at PD.
"""

from __future__ import annotations

import contextlib

from pykvm.abi import uapi
from pykvm.client import Exit, Hlt, Io, Kvm, Mmio, Shutdown
from tests.guest.bare import assemble

CODE, STACK = 0x10000, 0x9000
ROOT, PDPT, PD_LOW, PD, PT = 0x20000, 0x21000, 0x22000, 0x23000, 0x24000
IDT, GDT = 0x2000, 0x3000
TEST = 0x4000_0000
FRAMES = 0x20_0000  # frames that tests map; the memory ends at 4 MiB
SIZE = 0x40_0000
P, W, U, A, D, PS, G = 1, 2, 4, 0x20, 0x40, 0x80, 0x100
NX = 1 << 63
FULL = P | W | U | A | D

_CODE64, _CODE32, _DATA = (0xB, 1, 0), (0xB, 0, 1), (3, 0, 1)


class PagingGuest:
    """One vCPU. `width`: 64 long mode, 36 PAE, 32 two levels."""

    def __init__(self, *, tdp: bool = True, width: int = 64, log_dirty: bool = False) -> None:
        self.width = width
        self.entry = 4 if width == 32 else 8
        self._stack = contextlib.ExitStack()
        kvm = self._stack.enter_context(Kvm(tdp=tdp))
        self.vm = self._stack.enter_context(kvm.create_vm())
        self.ram = self.vm.add_memory(0, SIZE, log_dirty=log_dirty)
        self.vcpu = self._stack.enter_context(self.vm.create_vcpu(0))
        self.vcpu.set_cpuid(kvm.supported_cpuid())
        self._tables()
        self._mode()

    def close(self) -> None:
        self._stack.close()

    # ---- tables ----

    def write(self, address: int, value: int, size: int | None = None) -> None:
        size = size or self.entry
        self.ram[address : address + size] = value.to_bytes(size, "little")

    def read(self, address: int, size: int | None = None) -> int:
        size = size or self.entry
        return int.from_bytes(self.ram[address : address + size], "little")

    def _tables(self) -> None:
        if self.width == 32:
            self.write(ROOT, FULL | PS)
            self.write(self.pde(), PT | P | W | U | A)
            return
        self.write(PD_LOW, FULL | PS)
        if self.width == 36:
            self.write(ROOT, PD_LOW | P)
            self.write(ROOT + 8, PD | P)
        else:
            self.write(ROOT, PDPT | P | W | U | A)
            self.write(PDPT, PD_LOW | P | W | U | A)
            self.write(PDPT + 8, PD | P | W | U | A)
        self.write(self.pde(), PT | P | W | U | A)

    def pde(self) -> int:
        """Address of the entry that points to PT."""
        return ROOT + (TEST >> 22) * 4 if self.width == 32 else PD

    def pte(self, page: int) -> int:
        """Address of the entry of the page at TEST + page * 4096."""
        return PT + page * self.entry

    def map(self, page: int, frame: int, bits: int = FULL) -> None:
        self.write(self.pte(page), frame | bits)

    # ---- registers ----

    def _mode(self) -> None:
        with self.vcpu.sregs as sregs:
            sregs.cr0 = uapi.X86_CR0_PE | uapi.X86_CR0_PG | uapi.X86_CR0_WP | uapi.X86_CR0_ET
            sregs.cr3 = ROOT
            sregs.cr4 = uapi.X86_CR4_PSE if self.width == 32 else uapi.X86_CR4_PAE
            sregs.efer = uapi.EFER_NX * (self.width != 32)
            if self.width == 64:
                sregs.efer |= uapi.EFER_LME | uapi.EFER_LMA
            for name in ("cs", "ds", "es", "ss", "fs", "gs"):
                segment = getattr(sregs, name)
                segment.base, segment.limit, segment.selector = 0, 0xFFFF_FFFF, 8 if name == "cs" else 16
                kind = _DATA if name != "cs" else _CODE64 if self.width == 64 else _CODE32
                segment.type, segment.l, segment.db = kind
                segment.present = segment.s = segment.g = 1
                segment.dpl = segment.unusable = 0
            sregs.idt.base, sregs.idt.limit = IDT, 0xFFF
            sregs.gdt.base, sregs.gdt.limit = GDT, 0x7F
        self.write(GDT + 8, 0xAF9B000000FFFF if self.width == 64 else 0xCF9B000000FFFF, 8)
        self.write(GDT + 16, 0xCF93000000FFFF, 8)
        self._fault_handler()

    def _fault_handler(self) -> None:
        """#PF: out of the error code to port 0xe, then of CR2 to port 0xc (low half), then HLT."""
        wide = self.width == 64
        ax, pop = ("rax", "pop rax") if wide else ("eax", "pop eax")
        code, _ = assemble(f"{pop}; out 0xe, eax; mov {ax}, cr2; out 0xc, eax; hlt", 0x8000, self.bits, ())
        self.ram[0x8000 : 0x8000 + len(code)] = code
        self.write(IDT + 14 * (16 if wide else 8), 0x8E00 << 32 | 8 << 16 | 0x8000, 8)

    @property
    def bits(self) -> int:
        return 64 if self.width == 64 else 32

    # ---- running ----

    def run(self, source: str, **regs: int) -> Exit:
        """Assemble, run to the first exit. In the source, `ax` to `di` with an `r` are of the mode's width."""
        if self.bits == 32:
            for name in ("ax", "bx", "cx", "dx", "si", "di", "bp", "sp"):
                source = source.replace(f"r{name}", f"e{name}")
        code, _ = assemble(source, CODE, self.bits, ())
        self.ram[CODE : CODE + len(code)] = code
        with self.vcpu.regs as state:
            state.rip, state.rsp, state.rflags = CODE, STACK, 2
            for name, value in regs.items():
                setattr(state, name, value)
        return self.vcpu.run()

    def finish(self, source: str, **regs: int) -> int:
        """Run to HLT without any exit before; return rax."""
        found = self.run(source, **regs)
        assert found == Hlt(), f"{found} at {self.vcpu.regs.rip:#x}"
        return int(self.vcpu.regs.rax)

    def fault(self, source: str, **regs: int) -> tuple[int, int]:
        """Run into a page fault; return (error code, CR2)."""
        found = self.run(source, **regs)
        values = []
        for port in (0xE, 0xC):
            assert isinstance(found, Io), found
            assert found.port == port
            values.append(int.from_bytes(found.data, "little"))
            found = self.vcpu.run()
        assert found == Hlt()
        return values[0], values[1]

    def stat(self, name: str) -> int:
        return self.vm.mmu.stat()[name]


__all__ = ["Hlt", "Io", "Mmio", "PagingGuest", "Shutdown"]
