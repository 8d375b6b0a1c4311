"""A VM whose guest runs in 32-bit, PAE or long mode on page tables that the test or it itself writes.

`run`, `finish` and `fault` are one piece of code each; `begin` and `go` run a longer one from one STOP in it
to the next, so that a test looks at the MMU in between.  Tables that have been used are edited by the guest:
what the client writes into them behind the MMU's back is nobody's to see.

The first 2 MiB (4 MiB in 32-bit mode) of linear addresses are mapped one to one by a large page that
holds code, tables and stack.  TEST is where tests map things: its table of the last level is at PT, the
one above at PD.
"""

from __future__ import annotations

import contextlib
import os
import struct
from typing import TYPE_CHECKING

from pykvm import device, trace
from pykvm.abi import uapi
from pykvm.client import Exit, Hlt, Io, Kvm, Mmio, Shutdown, Vcpu
from tests.guest.bare import assemble

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pykvm.abi import CData
    from pykvm.kvm.vcpu import Vcpu as KernelVcpu
    from pykvm.kvm.vm import Vm as KernelVm
    from pykvm.mmu.view import PageView

CODE, STACK = 0x10000, 0x9000
ROOT, PDPT, PD_LOW, PD, PT = 0x20000, 0x21000, 0x22000, 0x23000, 0x24000
ROOT5 = 0x2F000
STOP_PORT = 0x10
IDT, GDT = 0x2000, 0x3000
TEST = 0x4000_0000
FRAMES = 0x20_0000  # frames that tests map; the memory ends at 4 MiB
SIZE = 0x40_0000
P, W, U, A, D, PS, G = 1, 2, 4, 0x20, 0x40, 0x80, 0x100
NX = 1 << 63
FULL = P | W | U | A | D

_CODE64, _CODE32, _DATA = (0xB, 1, 0), (0xB, 0, 1), (3, 0, 1)


class BinaryStats:
    """What a KVM_GET_STATS_FD descriptor says, by name."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        _, name_size, count, _, descs, data = struct.unpack("<6I", os.pread(fd, 24, 0))
        row = struct.Struct(f"<IhHII{name_size}s")
        rows = row.iter_unpack(os.pread(fd, row.size * count, descs))
        self.offsets = {name.rstrip(b"\0").decode(): data + at for *_, at, _, name in rows}

    def __getitem__(self, name: str) -> int:
        return int.from_bytes(os.pread(self.fd, 8, self.offsets[name]), "little")


def set_flat_segments(sregs: CData, *, wide: bool, data: int) -> None:
    """Code 8, stack 0x10, and the others `data`, all from 0 to 4 GiB; wide: 64-bit code."""
    for name in ("cs", "ds", "es", "ss", "fs", "gs"):
        segment = getattr(sregs, name)
        segment.base, segment.limit = 0, 0xFFFF_FFFF
        segment.selector = {"cs": 8, "ss": 0x10}.get(name, data)
        kind = _DATA if name != "cs" else _CODE64 if wide else _CODE32
        segment.type, segment.l, segment.db = kind
        segment.present = segment.s = segment.g = 1
        segment.dpl, segment.unusable = segment.selector & 3, 0


class PagingGuest:
    """`width`: 57 and 64 long mode with 5 and 4 levels, 36 PAE, 32 two levels, 0 no paging."""

    def __init__(
        self, *, tdp: bool = True, width: int = 64, log_dirty: bool = False, vcpus: int = 1, cr4: int = 0
    ) -> None:
        self.width = width
        self.long = width in {57, 64}
        self.cr4 = cr4
        self.entry = 4 if width == 32 else 8
        self._stack = contextlib.ExitStack()
        self._stats: list[BinaryStats] | None = None
        kvm = self._stack.enter_context(Kvm(tdp=tdp))
        self.vm = self._stack.enter_context(kvm.create_vm())
        self.ram = self.vm.add_memory(0, SIZE, log_dirty=log_dirty)
        self.vcpus = [self._stack.enter_context(self.vm.create_vcpu(n)) for n in range(vcpus)]
        self.vcpu = self.vcpus[0]
        self._tables()
        for vcpu in self.vcpus:
            vcpu.set_cpuid(kvm.supported_cpuid())
            self._mode(vcpu)

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
        if not self.width:
            return
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
            self.write(ROOT5, ROOT | P | W | U | A)
        self.write(self.pde(), PT | P | W | U | A)

    def pde(self, n: int = 0) -> int:
        """Address of the entry that points to PT, or of one behind it."""
        return (ROOT + (TEST >> 22) * 4 if self.width == 32 else PD) + n * self.entry

    def pte(self, page: int) -> int:
        """Address of the entry of the page at TEST + page * 4096."""
        return PT + page * self.entry

    def map(self, page: int, frame: int, bits: int = FULL) -> None:
        self.write(self.pte(page), frame | bits)

    # ---- registers ----

    def _mode(self, vcpu: Vcpu) -> None:
        with vcpu.sregs as sregs:
            sregs.cr0 = uapi.X86_CR0_PE | uapi.X86_CR0_ET
            if self.width:
                sregs.cr0 |= uapi.X86_CR0_PG | uapi.X86_CR0_WP
                sregs.cr3 = ROOT5 if self.width == 57 else ROOT
                sregs.cr4 = uapi.X86_CR4_PSE if self.width == 32 else uapi.X86_CR4_PAE
                sregs.efer = uapi.EFER_NX * (self.width != 32)
            sregs.cr4 |= self.cr4 | uapi.X86_CR4_LA57 * (self.width == 57)
            if self.long:
                sregs.efer |= uapi.EFER_LME | uapi.EFER_LMA
            set_flat_segments(sregs, wide=self.long, data=0x10)
            sregs.idt.base, sregs.idt.limit = IDT, 0xFFF
            sregs.gdt.base, sregs.gdt.limit = GDT, 0x7F
        self.write(GDT + 8, 0xAF9B000000FFFF if self.long else 0xCF9B000000FFFF, 8)
        self.write(GDT + 16, 0xCF93000000FFFF, 8)
        self._fault_handler()

    def _fault_handler(self) -> None:
        """#PF: out of the error code to port 0xe, then of CR2 to port 0xc (low half), then HLT."""
        wide = self.long
        ax, pop = ("rax", "pop rax") if wide else ("eax", "pop eax")
        code, _ = assemble(f"{pop}; out 0xe, eax; mov {ax}, cr2; out 0xc, eax; hlt", 0x8000, self.bits, ())
        self.ram[0x8000 : 0x8000 + len(code)] = code
        self.write(IDT + 14 * (16 if wide else 8), 0x8E00 << 32 | 8 << 16 | 0x8000, 8)

    @property
    def bits(self) -> int:
        return 64 if self.long else 32

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

    def end_of_code(self, source: str) -> int:
        """Return where `run` of this source gets to when all of it is executed."""
        if self.bits == 32:
            for name in ("ax", "bx", "cx", "dx", "si", "di", "bp", "sp"):
                source = source.replace(f"r{name}", f"e{name}")
        return CODE + len(assemble(source, CODE, self.bits, ())[0])

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

    def begin(self, source: str, vcpu: Vcpu | None = None, **regs: int) -> int:
        """Run to the first STOP, or HLT, and return rax."""
        vcpu = vcpu or self.vcpu
        if self.bits == 32:
            for name in ("ax", "bx", "cx", "dx", "si", "di", "bp", "sp"):
                source = source.replace(f"r{name}", f"e{name}")
        at = CODE + 0x1000 * self.vcpus.index(vcpu)
        code, _ = assemble(source.replace("STOP", f"out {STOP_PORT}, eax"), at, self.bits, ())
        self.ram[at : at + len(code)] = code
        with vcpu.regs as state:
            state.rip, state.rsp, state.rflags = at, STACK - 0x100 * self.vcpus.index(vcpu), 2
            for name, value in regs.items():
                setattr(state, name, value)
        return self.go(vcpu)

    def go(self, vcpu: Vcpu | None = None) -> int:
        """Run on to the next STOP, or HLT, and return rax."""
        vcpu = vcpu or self.vcpu
        found = vcpu.run()
        stopped = found == Hlt() or (isinstance(found, Io) and found.port == STOP_PORT)
        assert stopped, f"{found} at {vcpu.regs.rip:#x}"
        return int(vcpu.regs.rax)

    def code(self, source: str) -> int:
        """Run a piece of code that ends in STOP or HLT, without having to say so."""
        return self.begin(f"{source}; hlt")

    # ---- what the MMU has ----

    def stat(self, name: str) -> int:
        """Read one of the kernel's binary statistics: the VM's, or the sum of its vCPUs'."""
        if self._stats is None:
            self._stats = [BinaryStats(each.ioctl(uapi.KVM_GET_STATS_FD)) for each in (self.vm, *self.vcpus)]
            for stats in self._stats:
                self._stack.callback(os.close, stats.fd)
        return sum(stats[name] for stats in self._stats if name in stats.offsets)

    @property
    def kernel(self) -> KernelVm:
        """The VM as the module has it."""
        return device.vcpu_of(self.vcpu.fd).vm

    def kernel_vcpu(self, vcpu: Vcpu | None = None) -> KernelVcpu:
        return device.vcpu_of((vcpu or self.vcpu).fd)

    def shadows(self, address: int) -> list[PageView]:
        """Return the shadow pages of the guest table at an address."""
        return [page for page in self.vm.mmu.pages() if page.gfn == address >> 12 and not page.role.direct]

    def shadow(self, address: int) -> PageView:
        """Return the only one."""
        (page,) = self.shadows(address)
        return page

    def spte(self, gla: int, level: int = 1) -> int:
        """Return our entry of a level for an address; 0 when the walk ends before."""
        steps = self.vm.walk(self.vcpu, gla).sptes
        return next((step.entry for step in steps if step.level == level), 0)

    @contextlib.contextmanager
    def events(self, names: str) -> Iterator[list[tuple[str, Mapping[str, object]]]]:
        """Collect tracepoints."""
        found: list[tuple[str, Mapping[str, object]]] = []

        def listener(name: str, fields: Mapping[str, object]) -> None:
            found.append((name, dict(fields)))

        with trace.listen(names, listener):
            yield found


__all__ = ["Hlt", "Io", "Mmio", "PagingGuest", "Shutdown"]
