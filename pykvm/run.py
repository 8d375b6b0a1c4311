"""`pykvm run`: a small monitor of our own that boots one image on one vCPU.

Images: an ELF file (32-bit: protected mode, flat segments, paging off; 64-bit: long mode, the
first 4 GiB mapped one to one), a ROM (flat, ends at the reset vector) or a boot sector (flat,
loaded at 0x7c00, real mode).  Devices: a serial port's transmitter, a debug port, an exit port,
one memory-mapped register and a port that asks for an interrupt; see pykvm/guest/hello.S.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import signal
import struct
import threading
import time
from collections import Counter
from importlib import resources
from typing import TYPE_CHECKING

from pykvm.client import (
    Exit,
    FailEntry,
    Hlt,
    InternalError,
    Intr,
    Io,
    IrqWindowOpen,
    Kvm,
    Mmio,
    Shutdown,
    Vcpu,
    Vm,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pykvm.abi import CData

SERIAL_DATA, SERIAL_LSR = 0x3F8, 0x3FD
LSR_TRANSMITTER_EMPTY = 0x60
DEBUG_PORT = 0xE9
REQUEST_IRQ = 0x80
EXIT_PORT = 0xF4
DEVICE = 0xD000_0000
BOOT_SECTOR = 0x7C00
FOUR_GIB = 1 << 32
ROM_ALIGNMENT = 1 << 16
# Page tables of a 64-bit ELF guest, behind the first MiB's legacy areas but below its code.
PAGE_TABLES = 0x70000
_CODE64, _CODE32, _DATA = (0xB, 1, 0), (0xB, 0, 1), (3, 0, 1)  # type, l, db
_CR0_PE, _CR0_PG, _CR4_PAE, _EFER_LME_LMA = 1, 1 << 31, 1 << 5, 0x500


class ImageError(Exception):
    """The image cannot be booted; the message is one line for the user."""


@dataclasses.dataclass(frozen=True, slots=True)
class Image:
    """What to load: (guest physical address, bytes) pieces, and how the vCPU starts."""

    name: str
    pieces: tuple[tuple[int, bytes], ...]
    entry: int
    mode: str  # "reset", "real", "protected", "long"
    rom: bytes = b""


@dataclasses.dataclass(slots=True)
class Result:
    """What a run came to. `instructions` is None on a real device: it does not tell."""

    end: str
    status: int
    seconds: float
    instructions: int | None
    exits: dict[str, int]
    console: str

    @property
    def mips(self) -> float | None:
        """Million guest instructions per second of wall time."""
        if self.instructions is None or not self.seconds:
            return None
        return self.instructions / self.seconds / 1e6


# ---- images -------------------------------------------------------------------------------------


def default_image() -> Image:
    """Return the guest that comes with the package."""
    return Image("hello", (), 0, "reset", resources.files("pykvm").joinpath("guest/hello.bin").read_bytes())


def load_image(path: Path, *, rom: bool = False) -> Image:
    """Read an image file.

    Errors:
        ImageError  unreadable, empty, or an ELF file of another machine
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}") from None
    if not data:
        raise ImageError(f"{path}: empty file")
    if data.startswith(b"\x7fELF"):
        return _elf_image(path.name, data)
    if rom:
        if len(data) % ROM_ALIGNMENT:
            raise ImageError(f"{path}: a ROM is a multiple of 64 KiB long, this is {len(data)} bytes")
        return Image(path.name, (), 0, "reset", data)
    return Image(path.name, ((BOOT_SECTOR, data),), BOOT_SECTOR, "real")


def _elf_image(name: str, data: bytes) -> Image:
    try:
        return _parse_elf(name, data)
    except struct.error:
        raise ImageError(f"{name}: truncated ELF file") from None


def _parse_elf(name: str, data: bytes) -> Image:
    wide = data[4] == 2
    machine = struct.unpack_from("<H", data, 18)[0]
    if machine not in (3, 62):
        raise ImageError(f"{name}: ELF machine {machine} is not x86")
    if wide:
        entry, phoff = struct.unpack_from("<QQ", data, 24)
        phentsize, phnum = struct.unpack_from("<HH", data, 54)
    else:
        entry, phoff = struct.unpack_from("<II", data, 24)
        phentsize, phnum = struct.unpack_from("<HH", data, 42)
    pieces = []
    for i in range(phnum):
        at = phoff + i * phentsize
        if wide:
            kind, _, offset, _, paddr, filesz, memsz = struct.unpack_from("<IIQQQQQ", data, at)
        else:
            kind, offset, _, paddr, filesz, memsz = struct.unpack_from("<IIIIII", data, at)
        if kind != 1:  # PT_LOAD
            continue
        if offset + filesz > len(data):
            raise ImageError(f"{name}: truncated ELF file")
        pieces.append((paddr, data[offset : offset + filesz] + bytes(memsz - filesz)))
    if not pieces:
        raise ImageError(f"{name}: nothing to load in this ELF file")
    return Image(name, tuple(pieces), entry, "long" if wide else "protected")


# ---- the machine ----------------------------------------------------------------------------------


class Machine:
    """One VM with one vCPU and the devices of `pykvm run`."""

    def __init__(self, kvm: Kvm, image: Image, memory_size: int, write: Callable[[str], object]) -> None:
        """Load the image; `write` gets the console's output as it comes."""
        self._write = write
        self._console: list[str] = []
        self._exits: Counter[str] = Counter()
        self._vector: int | None = None
        self._register = 0
        self._status = 0
        self.vm: Vm = kvm.create_vm()
        self.memory = self.vm.add_memory(0, memory_size)
        self._load(image)
        self.vcpu: Vcpu = self.vm.create_vcpu(0)
        self.vcpu.set_cpuid(kvm.supported_cpuid())
        _START[image.mode](self, image)

    def _load(self, image: Image) -> None:
        for gpa, data in image.pieces:
            if gpa + len(data) > len(self.memory):
                need = -(-(gpa + len(data)) >> 20)
                raise ImageError(f"{image.name}: needs {need} MiB of memory, use --memory")
            self.memory[gpa : gpa + len(data)] = data
        if image.rom:
            view = self.vm.add_memory(FOUR_GIB - len(image.rom), len(image.rom), readonly=True)
            view[:] = image.rom

    def run(self, timeout: float | None = None) -> Result:
        """Run until the guest halts, shuts down, fails or writes the exit port."""
        start = time.perf_counter()
        end = ""
        try:
            with self._alarm(timeout):
                while not end:
                    end = self._step()
                    if timeout is not None and time.perf_counter() - start > timeout:
                        end, self._status = end or "timeout", 1
        except KeyboardInterrupt:
            end, self._status = "interrupted", 130
        seconds = time.perf_counter() - start
        return Result(
            end, self._status, seconds, self.vcpu.instructions(), dict(self._exits), "".join(self._console)
        )

    @contextlib.contextmanager
    def _alarm(self, seconds: float | None) -> Iterator[None]:
        """End KVM_RUN by a signal after so long: a guest without exits would not come back by itself.

        Only the main thread can set handlers; in others a timeout waits for the next exit.
        """
        if seconds is None or threading.current_thread() is not threading.main_thread():
            yield
            return

        def ring(*_: object) -> None:
            # For a signal that comes between two KVM_RUNs.
            self.vcpu.immediate_exit = True

        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def _step(self) -> str:
        """Run to the next exit and serve it; return what ended the run, or ""."""
        exit_ = self.vcpu.run()
        self._exits[_exit_name(exit_)] += 1
        match exit_:
            case Io():
                return self._io(exit_)
            case Mmio():
                self._mmio(exit_)
            case IrqWindowOpen():
                self._inject()
            case Hlt():
                # With interrupts off nothing here could wake it; with them on nothing is coming either,
                # unless one was asked for.
                return "" if self._vector is not None and self._inject() else "halted"
            case Intr():
                pass
            case Shutdown():
                self._status = 1
                return "shutdown (triple fault)"
            case InternalError(suberror, data):
                self._status = 1
                return f"internal error {suberror}, data {' '.join(f'{d:#x}' for d in data)}"
            case FailEntry(reason, _):
                self._status = 1
                return f"entry failed: {reason:#x}"
            case _:
                self._status = 1
                return f"unexpected exit: {exit_}"
        return ""

    def _io(self, io: Io) -> str:
        if not io.out:
            io.data[:] = bytes([LSR_TRANSMITTER_EMPTY if io.port == SERIAL_LSR else 0xFF]) * len(io.data)
            return ""
        if io.port in (SERIAL_DATA, DEBUG_PORT):
            text = bytes(io.data).decode("latin-1")
            self._console.append(text)
            self._write(text)
        elif io.port == REQUEST_IRQ:
            self._vector = io.data[0]
            self.vcpu.kvm_run.request_interrupt_window = 1
        elif io.port == EXIT_PORT:
            # QEMU's isa-debug-exit: the status is the value twice and one.
            self._status = (int.from_bytes(io.data, "little") << 1 | 1) & 0xFF
            return "exit port"
        return ""

    def _mmio(self, mmio: Mmio) -> None:
        if mmio.phys_addr != DEVICE:
            if not mmio.is_write:
                mmio.data[:] = b"\xff" * len(mmio.data)
        elif mmio.is_write:
            self._register = int.from_bytes(mmio.data, "little")
        else:
            value = (self._register + 1) & ((1 << 8 * len(mmio.data)) - 1)
            mmio.data[:] = value.to_bytes(len(mmio.data), "little")

    def _inject(self) -> bool:
        """Inject the vector asked for, if the guest can take it now."""
        if self._vector is None or not self.vcpu.kvm_run.ready_for_interrupt_injection:
            return False
        self.vcpu.interrupt(self._vector)
        self._vector = None
        self.vcpu.kvm_run.request_interrupt_window = 0
        return True


def _exit_name(exit_: Exit) -> str:
    """Return KVM's name of an exit: IRQ_WINDOW_OPEN for IrqWindowOpen."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(exit_).__name__).upper()


# ---- how a vCPU starts ------------------------------------------------------------------------------


def _flat(segment: CData, kind: tuple[int, int, int], selector: int) -> None:
    segment.base, segment.limit, segment.selector = 0, 0xFFFF_FFFF, selector
    segment.type, segment.l, segment.db = kind
    segment.present = segment.s = segment.g = 1
    segment.dpl = segment.unusable = 0


def _start_reset(machine: Machine, image: Image) -> None:
    """Leave the vCPU as it is after reset: at the reset vector, in real mode."""


def _start_real(machine: Machine, image: Image) -> None:
    with machine.vcpu.sregs as sregs:
        for name in ("cs", "ds", "es", "ss"):
            segment = getattr(sregs, name)
            segment.base = segment.selector = 0
    with machine.vcpu.regs as regs:
        regs.rip, regs.rsp = image.entry, BOOT_SECTOR


def _start_protected(machine: Machine, image: Image) -> None:
    with machine.vcpu.sregs as sregs:
        sregs.cr0 |= _CR0_PE
        _flat(sregs.cs, _CODE32, 8)
        for name in ("ds", "es", "ss", "fs", "gs"):
            _flat(getattr(sregs, name), _DATA, 16)
    machine.vcpu.regs.rip = image.entry


def _start_long(machine: Machine, image: Image) -> None:
    tables = struct.pack("<Q", PAGE_TABLES + 0x1000 | 3).ljust(4096, b"\0")
    directories = range(PAGE_TABLES + 0x2000, PAGE_TABLES + 0x6000, 0x1000)
    tables += struct.pack("<4Q", *(d | 3 for d in directories)).ljust(4096, b"\0")
    tables += struct.pack("<2048Q", *(page << 21 | 0x83 for page in range(2048)))
    machine.memory[PAGE_TABLES : PAGE_TABLES + len(tables)] = tables
    with machine.vcpu.sregs as sregs:
        sregs.cr3, sregs.cr4 = PAGE_TABLES, sregs.cr4 | _CR4_PAE
        sregs.cr0 |= _CR0_PE | _CR0_PG
        sregs.efer |= _EFER_LME_LMA
        _flat(sregs.cs, _CODE64, 8)
        for name in ("ds", "es", "ss", "fs", "gs"):
            _flat(getattr(sregs, name), _DATA, 16)
    with machine.vcpu.regs as regs:
        regs.rip, regs.rsp = image.entry, PAGE_TABLES


_START: dict[str, Callable[[Machine, Image], None]] = {
    "reset": _start_reset,
    "real": _start_real,
    "protected": _start_protected,
    "long": _start_long,
}
