"""Boot Linux: a virtual machine monitor with a serial console, a timer and an interrupt controller.

    python examples/linux.py VMLINUZ --initrd INITRAMFS [--protocol 64|32|pvh]

No firmware: the kernel is put into memory and entered where its boot protocol says, in long mode (64), in
protected mode (32), or, taken out of its bzImage, where the ELF note of PVH says.  One thread: KVM_RUN runs
the guest, a signal from the host's interval timer is the tick of the guest's, and HLT waits in select().
"""

from __future__ import annotations

import argparse
import contextlib
import lzma
import os
import select
import signal
import struct
import sys
import termios
import tty
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from pykvm.client import Hlt, Intr, Io, IrqWindowOpen, Kvm, Mmio

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pykvm.abi import CData

COMMAND_LINE = "console=ttyS0 pci=off reboot=k panic=-1"
TIMER_IRQ, SERIAL_IRQ = 0, 4
# Guest physical addresses.
GDT, START_INFO, BOOT_PARAMS, COMMAND, PML4, KERNEL = 0x500, 0x6000, 0x7000, 0x8000, 0x9000, 0x10_0000
LOW_MEMORY_END = 0x9_FC00
CR0_PE, CR0_PG, CR4_PAE, EFER_LME, EFER_LMA = 1, 1 << 31, 1 << 5, 1 << 8, 1 << 10
# Linux 6.1 copies wrongly on a processor whose CPUID has FSRM but whose fast strings are off.
IA32_MISC_ENABLE, FAST_STRINGS = 0x1A0, 1
PT_LOAD, PT_NOTE = 1, 4
PHYS32_ENTRY = 18  # the note of Xen's that names the PVH entry point

Ram = tuple[tuple[int, int], ...]  # start and size of each piece

# ---- devices --------------------------------------------------------------------------------------


class Pic:
    """The first 8259: eight lines, 0 the most urgent.  What is here needs no second one."""

    def __init__(self) -> None:
        self.requested = self.in_service = self.base = 0
        self.mask = 0xFF
        self.words_to_come = 0
        self.reads_in_service = False

    def raise_line(self, irq: int) -> None:
        self.requested |= 1 << irq

    def pending(self) -> bool:
        """A line is as urgent as its bit is low: the lowest must not be one that is being served."""
        wanted = self.requested & ~self.mask
        return bool(wanted) and (wanted & -wanted) < (self.in_service & -self.in_service or 0x100)

    def acknowledge(self) -> int:
        """Return the vector of the most urgent line; it is in service until the guest says it is done."""
        wanted = self.requested & ~self.mask
        bit = wanted & -wanted
        self.requested &= ~bit
        self.in_service |= bit
        return self.base + bit.bit_length() - 1

    def read(self, register: int) -> int:
        if register:
            return self.mask
        return self.in_service if self.reads_in_service else self.requested

    def write(self, register: int, value: int) -> None:
        if register == 0:
            self._command(value)
        elif not self.words_to_come:
            self.mask = value
        else:
            if self.words_to_come == 3:
                self.base = value & 0xF8
            self.words_to_come -= 1

    def _command(self, value: int) -> None:
        if value & 0x10:  # ICW1: three more words follow
            self.requested = self.in_service = self.mask = 0
            self.words_to_come = 3
        elif value & 0x08:  # OCW3: which register is read
            self.reads_in_service = value & 3 == 3
        elif value & 0xE0 == 0x60:  # OCW2: the end of the one it names
            self.in_service &= ~(1 << (value & 7))
        else:  # OCW2: the end of the most urgent one
            self.in_service &= self.in_service - 1


class Pit:
    """The 8254's channel 0.  The host's interval timer counts for it; its signal also ends KVM_RUN."""

    FREQUENCY = 1_193_182

    def __init__(self) -> None:
        self.expired = False
        self.periodic = False
        self.low: int | None = None
        signal.signal(signal.SIGALRM, self._on_alarm)

    def _on_alarm(self, *_: object) -> None:
        self.expired = True

    def read(self, _: int) -> int:
        return 0

    def write(self, register: int, value: int) -> None:
        if register == 3 and value >> 6 == 0 and value & 0x30:
            self.periodic = (value >> 1 & 3) in (2, 3)
            self.low = None
            signal.setitimer(signal.ITIMER_REAL, 0)
        elif register == 0 and self.low is None:
            self.low = value
        elif register == 0 and self.low is not None:
            self._start(value << 8 | self.low or 0x10000)
            self.low = None

    def _start(self, count: int) -> None:
        seconds = count / self.FREQUENCY
        signal.setitimer(signal.ITIMER_REAL, seconds, seconds if self.periodic else 0)


class Uart:
    """A 16550A on standard input and output."""

    RBR, IER, IIR, LCR, MCR, LSR = range(6)
    DIVISOR_ACCESS, RECEIVED, TRANSMITTED = 0x80, 1, 2

    def __init__(self, pic: Pic) -> None:
        self.pic = pic
        self.registers = bytearray(8)
        self.divisor = bytearray(2)
        self.received = bytearray()
        self.transmitted = False
        self.asks = 0

    def receive(self, data: bytes) -> None:
        self.received += data
        self._update()

    def _update(self) -> None:
        """Ask for an interrupt when there is a new reason."""
        reasons = (self.RECEIVED if self.received else 0) | (self.TRANSMITTED if self.transmitted else 0)
        asks = reasons & self.registers[self.IER]
        if asks & ~self.asks:
            self.pic.raise_line(SERIAL_IRQ)
        self.asks = asks

    def read(self, register: int) -> int:
        value = self.registers[register]
        if register <= self.IER and self.registers[self.LCR] & self.DIVISOR_ACCESS:
            return self.divisor[register]
        if register == self.RBR:
            value = self.received.pop(0) if self.received else 0
        elif register == self.IIR:
            value = 0xC0 | (4 if self.asks & self.RECEIVED else 2 if self.asks else 1)
            if value & 2:
                self.transmitted = False
        elif register == self.LSR:
            value = 0x60 | bool(self.received)
        self._update()
        return value

    def write(self, register: int, value: int) -> None:
        if register <= self.IER and self.registers[self.LCR] & self.DIVISOR_ACCESS:
            self.divisor[register] = value
            return
        if register == self.RBR:
            os.write(1, bytes([value]))
            self.transmitted = True
        elif register == self.IER:
            value &= 0x0F
            self.transmitted = bool(value & self.TRANSMITTED)
        self.registers[register] = value
        self._update()


# ---- the machine -----------------------------------------------------------------------------------


class Machine:
    """A processor, memory from 0 on, and the devices at their ports."""

    def __init__(self, kvm: Kvm, megabytes: int) -> None:
        self.vm = kvm.create_vm()
        self.memory = self.vm.add_memory(0, megabytes << 20)
        self.vcpu = self.vm.create_vcpu()
        self.vcpu.set_cpuid(kvm.supported_cpuid())
        self.vcpu.set_msrs({IA32_MISC_ENABLE: FAST_STRINGS})
        self.pic, self.pit = Pic(), Pit()
        self.uart = Uart(self.pic)
        self.ports: dict[int, tuple[Pic | Pit | Uart, int]] = {
            0x20: (self.pic, 0), 0x21: (self.pic, 1), 0x40: (self.pit, 0), 0x43: (self.pit, 3),
            **{0x3F8 + register: (self.uart, register) for register in range(8)},
        }  # fmt: skip
        # Where signals are told: select() wakes for one that came just before it, too.
        self.signals, told = os.pipe()
        for end in (self.signals, told):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(told, warn_on_full_buffer=False)
        self.inputs = [self.signals, sys.stdin.fileno()]

    def put(self, address: int, data: bytes) -> None:
        self.memory[address : address + len(data)] = data

    def run(self) -> str:
        """Run the guest; return how it ended."""
        vcpu, pic, kvm_run = self.vcpu, self.pic, self.vcpu.kvm_run
        while True:
            if self.pit.expired:
                self.pit.expired = False
                pic.raise_line(TIMER_IRQ)
                self.receive(0)
            if pic.pending() and kvm_run.ready_for_interrupt_injection:
                vcpu.interrupt(pic.acknowledge())
            kvm_run.request_interrupt_window = pic.pending()
            match vcpu.run():
                case Io(out=True, port=0x64, data=data) if data[0] == 0xFE:
                    return "the guest asked for a reset"
                case Io() as io:
                    self.access_port(io)
                case Mmio(is_write=False, data=data):
                    data[:] = b"\xff" * len(data)
                case Hlt() if not kvm_run.if_flag:
                    return "the guest has halted"
                case Hlt() if not pic.pending():
                    self.receive(None)
                case Hlt() | Mmio() | Intr() | IrqWindowOpen():
                    pass
                case end:
                    return f"the guest ended in {end}"

    def access_port(self, io: Io) -> None:
        device, register = self.ports.get(io.port, (None, 0))
        if io.out and device is not None:
            for value in io.data:
                device.write(register, value)
        elif not io.out:
            io.data[:] = bytes(0xFF if device is None else device.read(register) for _ in io.data)

    def receive(self, seconds: float | None) -> None:
        """Wait for input, a signal, or for so long; None: however long it takes."""
        for ready in select.select(self.inputs, [], [], seconds)[0]:
            data = os.read(ready, 256)
            if ready == self.signals:
                continue
            if not data:
                self.inputs.remove(ready)
            self.uart.receive(data)


# ---- the kernel's ways in ---------------------------------------------------------------------------


def load(machine: Machine, image: bytes, initrd: bytes, command_line: str, protocol: str) -> None:
    """Put everything into memory and the processor at the kernel's entry."""
    end = len(machine.memory)
    initrd_at = end - len(initrd) & ~0xFFF
    machine.put(COMMAND, command_line.encode() + b"\0")
    machine.put(initrd_at, initrd)
    ram = (0, LOW_MEMORY_END), (KERNEL, end - KERNEL)
    set_flat_mode(machine, long=protocol == "64")
    with machine.vcpu.regs as regs:
        if protocol == "pvh":
            regs.rip, regs.rbx = load_elf(machine, unpack(image)), START_INFO
            put_start_info(machine, initrd_at, len(initrd), ram)
        else:
            regs.rip, regs.rsi = KERNEL + (0x200 if protocol == "64" else 0), BOOT_PARAMS
            # What unpacks the kernel, and the packed kernel in it.
            machine.put(KERNEL, image[payload_start(image) :])
            put_boot_params(machine, image, initrd_at, len(initrd), ram)


def put_boot_params(machine: Machine, image: bytes, initrd_at: int, initrd_size: int, ram: Ram) -> None:
    """Documentation/arch/x86/boot.rst and zero-page.rst."""
    params = bytearray(4096)
    header = slice(0x1F1, 0x202 + image[0x201])
    params[header] = image[header]
    params[0x210] = 0xFF  # a boot loader without a number
    struct.pack_into("<II", params, 0x218, initrd_at, initrd_size)
    struct.pack_into("<I", params, 0x228, COMMAND)
    params[0x1E8] = len(ram)
    for i, (start, size) in enumerate(ram):
        struct.pack_into("<QQI", params, 0x2D0 + 20 * i, start, size, 1)
    machine.put(BOOT_PARAMS, bytes(params))


def put_start_info(machine: Machine, initrd_at: int, initrd_size: int, ram: Ram) -> None:
    """Xen's public/arch-x86/hvm/start_info.h."""
    module, memory_map = START_INFO + 0x40, START_INFO + 0x80
    words = (0x336E_C578, 1, 0, 1, module, COMMAND, 0, memory_map, len(ram), 0)
    machine.put(START_INFO, struct.pack("<4I4Q2I", *words))
    machine.put(module, struct.pack("<4Q", initrd_at, initrd_size, 0, 0))
    machine.put(memory_map, b"".join(struct.pack("<QQII", start, size, 1, 0) for start, size in ram))


def payload_start(image: bytes) -> int:
    """The boot sector and the real mode part, which are the firmware's way in, are in front of it."""
    return (1 + (image[0x1F1] or 4)) * 512


def unpack(image: bytes) -> bytes:
    """Return the ELF file that a bzImage packs."""
    offset, size = struct.unpack_from("<II", image, 0x248)
    packed = image[payload_start(image) + offset :][:size]
    if packed.startswith(b"\xfd7zXZ"):
        return lzma.LZMADecompressor().decompress(packed)
    if packed.startswith(b"\x1f\x8b"):
        return zlib.decompressobj(wbits=31).decompress(packed)
    raise SystemExit("the kernel is packed neither by xz nor by gzip")


def load_elf(machine: Machine, elf: bytes) -> int:
    """Load a 64-bit ELF file; return the address that its PVH note names."""
    entry = 0
    (table,), (size, count) = struct.unpack_from("<Q", elf, 0x20), struct.unpack_from("<HH", elf, 0x36)
    for i in range(count):
        kind, _, offset, _, address, length = struct.unpack_from("<IIQQQQ", elf, table + i * size)
        if kind == PT_LOAD:
            machine.put(address, elf[offset : offset + length])
        elif kind == PT_NOTE:
            entry = entry or pvh_entry(elf[offset : offset + length])
    if not entry:
        raise SystemExit("the kernel has no PVH entry")
    return entry


def pvh_entry(notes: bytes) -> int:
    at = 0
    while at < len(notes):
        name_size, size, kind = struct.unpack_from("<III", notes, at)
        value = at + 12 + (name_size + 3 & ~3)
        if notes[at + 12 : value] == b"Xen\0" and kind == PHYS32_ENTRY:
            return int.from_bytes(notes[value : value + size], "little")
        at = value + (size + 3 & ~3)
    return 0


def set_flat_mode(machine: Machine, *, long: bool) -> None:
    """Segments over everything, of ring 0; protected mode without paging, or long mode with a GiB mapped."""
    machine.put(
        GDT, struct.pack("<4Q", 0, 0, 0xAF9B000000FFFF if long else 0xCF9B000000FFFF, 0xCF93000000FFFF)
    )
    with machine.vcpu.sregs as sregs:
        sregs.gdt.base, sregs.gdt.limit = GDT, 31
        flat(sregs.cs, 0xB, 0x10, long=long)
        for register in (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss):
            flat(register, 3, 0x18)
        sregs.cr0 |= CR0_PE
        # No local APIC: interrupts are the 8259's.
        sregs.apic_base = 0
        if long:
            machine.put(PML4, struct.pack("<Q", PML4 + 0x1000 | 3))
            machine.put(PML4 + 0x1000, struct.pack("<Q", PML4 + 0x2000 | 3))
            machine.put(PML4 + 0x2000, struct.pack("<512Q", *(n << 21 | 0x83 for n in range(512))))
            sregs.cr3, sregs.cr4, sregs.efer = PML4, CR4_PAE, EFER_LME | EFER_LMA
            sregs.cr0 |= CR0_PG


def flat(segment: CData, kind: int, selector: int, *, long: bool = False) -> None:
    segment.base, segment.limit, segment.selector = 0, 0xFFFF_FFFF, selector
    segment.type, segment.l, segment.db = kind, long, not long
    segment.present = segment.s = segment.g = 1


# ---- the command -------------------------------------------------------------------------------------


@contextlib.contextmanager
def keys_as_typed() -> Iterator[None]:
    """Hand over each key as it is typed, and let the guest echo it; Ctrl-C still ends this program."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def main() -> None:
    parser = argparse.ArgumentParser(description="Boot Linux on KVM without firmware, with a serial console.")
    parser.add_argument("kernel", type=Path, help="a bzImage: /boot/vmlinuz")
    parser.add_argument("--initrd", type=Path, help="the first file system")
    parser.add_argument("--append", default="", metavar="TEXT", help="more for the kernel's command line")
    parser.add_argument("--protocol", choices=("64", "32", "pvh"), default="64", help="how it is entered")
    parser.add_argument("--memory", type=int, default=256, metavar="MIB", help="default: 256")
    parser.add_argument("--device", help="/dev/kvm for the real one")
    parser.add_argument("--no-tdp", action="store_true", help="shadow paging")
    options = parser.parse_args()
    try:
        kernel = options.kernel.read_bytes()
        initrd = options.initrd.read_bytes() if options.initrd else b""
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}")
    if kernel[0x202:0x206] != b"HdrS":
        parser.error(f"{options.kernel}: not a bzImage")
    command_line = f"{COMMAND_LINE} {options.append}"
    with Kvm(options.device, tdp=not options.no_tdp) as kvm, keys_as_typed():
        machine = Machine(kvm, options.memory)
        load(machine, kernel, initrd, command_line, options.protocol)
        with contextlib.suppress(KeyboardInterrupt):
            print(machine.run(), file=sys.stderr)


if __name__ == "__main__":
    main()
