"""Measure the MMU: ``python bench/mmu.py [--quick] [SECTION...]``.

Sections:
    faults    pages faulted in a second, page-table edits of a guest a second
    dirty     KVM_GET_DIRTY_LOG of a slot of 1 GiB
    size      memory and time for so many mapped pages, up to a million
    slots     a slot of 64 GiB of which nothing is touched, 512 slots

Columns are pykvm's two modes and the kernel's /dev/kvm, where it opens, in one run. Times are CPU time of
this process, KVM_RUN in the kernel included.
"""

import contextlib
import ctypes
import json
import mmap
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
from rich.console import Console
from run import BenchError, Device, Real, Results, markdown, or_why, per_second, supported_cpuid

import pykvm
from pykvm import abi
from pykvm.abi import CData, ffi

SECTIONS = ("faults", "dirty", "size", "slots")
GIB = 1 << 30
PAGE = 4096
CODE, PML4, PDPT, PD_LOW, TABLES = 0x1000, 0x2000, 0x3000, 0x4000, 0x20_0000
LOW_SIZE = 32 << 20
AREA = 4 * GIB  # linear and guest physical address of what is touched

# mov [rdi], rax; add rdi, rsi; dec rcx; jnz; hlt
TOUCH = bytes.fromhex("488907 4801f7 48ffc9 75f5 f4")
# mov [rdi], rax; mov bl, [rdx]; dec rcx; jnz; hlt: a table entry is written, what it maps is used
EDIT = bytes.fromhex("488907 8a1a 48ffc9 75f6 f4")
# xor rax, r8; mov [rdi], rax; invlpg [rdx]; mov bl, [rdx]; dec rcx; jnz; hlt
EDIT_INVLPG = bytes.fromhex("4c31c0 488907 0f013a 8a1a 48ffc9 75f0 f4")


class Emulated:
    """pykvm in this process, in one of its modes."""

    def __init__(self, name: str, *extensions: str) -> None:
        self.name = name
        self._extensions = extensions

    def open(self) -> int:
        return pykvm.open("/dev/kvm", extensions=self._extensions)

    def ioctl(self, fd: int, request: int, arg: int | CData) -> int:
        return pykvm.ioctl(fd, request, arg)


TDP, SHADOW = Emulated("pykvm tdp"), Emulated("pykvm shadow", "no-tdp")


# ---- memory ----------------------------------------------------------------------------------------

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000


@contextlib.contextmanager
def reserved(size: int, *, offset: int = 0, same: bool = False) -> Iterator[int]:
    """Address space of `size` bytes that costs nothing until touched; its start is `offset` behind 2 MiB's.

    same: it is the same 2 MiB over and over, so that even all of it costs next to nothing.
    """
    room = size + (4 << 20)
    anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    base = _libc.mmap(None, room, 3, anonymous, -1, 0)
    start = (base + (2 << 20) - 1 & -(2 << 20)) + offset
    if same:
        fd = os.memfd_create("bench")
        os.ftruncate(fd, 2 << 20)
        for at in range(start, start + size, 2 << 20):
            _libc.mmap(at, min(2 << 20, start + size - at), 3, mmap.MAP_SHARED | _MAP_FIXED, fd, 0)
        os.close(fd)
    try:
        yield start
    finally:
        _libc.munmap(base, room)


def anonymous_memory() -> int:
    """Bytes of this process's own memory; what it shares with a memfd not among them."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise BenchError("no RssAnon")


# ---- the guest -------------------------------------------------------------------------------------


class Guest:
    """A guest in long mode: 4 KiB pages of its own from AREA on, and the first 2 MiB one to one."""

    def __init__(self, device: Device, pages: int) -> None:
        self.device = device
        self.pages = pages
        self.kvm = device.open()
        self.vm = device.ioctl(self.kvm, abi.KVM_CREATE_VM, 0)
        self.ram = mmap.mmap(-1, LOW_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._view = ffi.from_buffer("char[]", self.ram)
        self.slot(0, 0, LOW_SIZE, int(ffi.cast("uintptr_t", self._view)))
        self.vcpu = device.ioctl(self.vm, abi.KVM_CREATE_VCPU, 0)
        size = device.ioctl(self.kvm, abi.KVM_GET_VCPU_MMAP_SIZE, 0)
        self._run_pages = mmap.mmap(self.vcpu, size)
        self._run_view = ffi.from_buffer("char[]", self._run_pages)
        self.run = ffi.cast("struct kvm_run *", self._run_view)
        device.ioctl(self.vcpu, abi.KVM_SET_CPUID2, supported_cpuid(device))
        self._tables()
        self._long_mode()

    def slot(self, number: int, gpa: int, size: int, hva: int, flags: int = 0) -> None:
        region = abi.new("kvm_userspace_memory_region")
        region.slot, region.guest_phys_addr, region.memory_size = number, gpa, size
        region.userspace_addr, region.flags = hva, flags
        self.device.ioctl(self.vm, abi.KVM_SET_USER_MEMORY_REGION, region)

    def pte(self, page: int) -> int:
        """Where the guest's entry of the page is."""
        return self._last + page * 8

    def pde(self, page: int) -> int:
        return TABLES + page // 512 * 8

    def _tables(self) -> None:
        tables = -(-self.pages // 512)
        directories = -(-tables // 512)
        self._last = TABLES + directories * PAGE
        self._write(PML4, [PDPT | 0x27])
        self._write(PDPT, [PD_LOW | 0x27, 0, 0, 0, *(TABLES + i * PAGE | 0x27 for i in range(directories))])
        self._write(PD_LOW, [i << 21 | 0xE7 for i in range(LOW_SIZE >> 21)])
        self._write(TABLES, [self._last + i * PAGE | 0x27 for i in range(tables)])
        self._write(self._last, [AREA + i * PAGE | 0x67 for i in range(self.pages)])

    def _write(self, at: int, entries: list[int]) -> None:
        self.ram[at : at + 8 * len(entries)] = struct.pack(f"<{len(entries)}Q", *entries)

    def _long_mode(self) -> None:
        sregs = abi.new("kvm_sregs")
        self.device.ioctl(self.vcpu, abi.KVM_GET_SREGS, sregs)
        code = {"limit": 0xFFFFFFFF, "selector": 8, "type": 11, "present": 1, "s": 1, "l": 1, "g": 1}
        data = code | {"selector": 0x10, "type": 3, "l": 0, "db": 1}
        sregs.cs = code
        sregs.ds = sregs.es = sregs.ss = sregs.fs = sregs.gs = data
        sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = 0x80010033, PML4, 0x20, 0xD00
        self.device.ioctl(self.vcpu, abi.KVM_SET_SREGS, sregs)

    def start(self, code: bytes, **registers: int) -> float:
        """Run code to its HLT; return the CPU seconds of it."""
        self.ram[CODE : CODE + len(code)] = code
        regs = abi.new("kvm_regs", {"rip": CODE, "rflags": 2, "rsp": 0x9000} | registers)
        self.device.ioctl(self.vcpu, abi.KVM_SET_REGS, regs)
        before = time.process_time()
        self.device.ioctl(self.vcpu, abi.KVM_RUN, 0)
        spent = time.process_time() - before
        if self.run.exit_reason != abi.KVM_EXIT_HLT:
            raise BenchError(f"exit {self.run.exit_reason}")
        return spent

    def touch(self, count: int, *, first: int = 0, stride: int = 1) -> float:
        return self.start(TOUCH, rdi=AREA + first * PAGE, rsi=stride * PAGE, rcx=count)

    def dirty_log(self, number: int, bitmap: CData) -> Callable[[], int]:
        log = abi.new("kvm_dirty_log")
        log.slot, log.dirty_bitmap = number, bitmap
        return lambda: self.device.ioctl(self.vm, abi.KVM_GET_DIRTY_LOG, log)

    def close(self) -> None:
        ffi.release(self._run_view)
        self._run_pages.close()
        for fd in (self.vcpu, self.vm, self.kvm):
            os.close(fd)
        ffi.release(self._view)
        self.ram.close()


@contextlib.contextmanager
def guest(device: Device, pages: int) -> Iterator[Guest]:
    made = Guest(device, pages)
    try:
        yield made
    finally:
        made.close()


# ---- sections --------------------------------------------------------------------------------------


def faults(device: Device, count: int) -> float:
    """Pages a second, each in a window of eight of its own: no prefetch spares a fault."""
    pages = count * 8
    with guest(device, pages) as g, reserved(pages * PAGE, offset=PAGE) as hva:
        g.slot(1, AREA, pages * PAGE, hva)
        g.touch(1, first=pages - 8)
        return count / g.touch(count - 1, stride=8)


def edits(device: Device, code: bytes, count: int, *, level: int) -> float:
    """Edits a second of one entry of the guest's tables, each followed by a use of what it maps."""
    with guest(device, 512) as g, reserved(512 * PAGE, offset=PAGE) as hva:
        g.slot(1, AREA, 512 * PAGE, hva)
        at = g.pde(0) if level > 1 else g.pte(0)
        value = struct.unpack("<Q", g.ram[at : at + 8])[0]
        registers = {"rdi": at, "rax": value, "rdx": AREA, "r8": PAGE}
        g.start(code, rcx=10, **registers)
        return count / g.start(code, rcx=count, **registers)


def bench_faults(devices: list[Device], quick: bool) -> Results:
    """How fast the guest gets its pages and changes its tables."""
    count = 2048 if quick else 8192
    rows: dict[str, Callable[[Device], float]] = {
        "first write to a 4 KiB page": lambda d: faults(d, count),
        "PDE written, page used": lambda d: edits(d, EDIT, count, level=2),
        "PTE written, INVLPG, page used": lambda d: edits(d, EDIT_INVLPG, count, level=1),
    }
    return {name: {d.name: or_why(lambda d=d, m=m: m(d)) for d in devices} for name, m in rows.items()}


DIRTY = {"clean": 0, "1,000 pages written": 1000, "all 262,144 pages written": 262_144}


def dirty(device: Device, written: int, seconds: float) -> float:
    """GET_DIRTY_LOGs a second of a slot of 1 GiB of which `written` pages were written before each."""
    pages = GIB // PAGE
    with guest(device, pages) as g, reserved(GIB, same=True) as hva:
        g.slot(1, AREA, GIB, hva, abi.KVM_MEM_LOG_DIRTY_PAGES)
        bitmap = ffi.new("uint64_t[]", pages // 64)
        read = g.dirty_log(1, bitmap)
        if not written:
            g.touch(1)
            read()
            return per_second(read, seconds)
        spent, n = 0.0, 0
        while spent < seconds / 4 and n < 20:
            g.touch(written, stride=pages // written)
            start = time.process_time()
            read()
            spent += time.process_time() - start
            n += 1
            if sum(int(word).bit_count() for word in bitmap) < written:
                raise BenchError("pages are missing in the log")
        return n / spent


def bench_dirty(devices: list[Device], quick: bool) -> Results:
    """What migration costs."""
    results: Results = {}
    for name, written in DIRTY.items():
        # A second of the emulator's time each: not for a device that needs minutes for the writes.
        row = results[f"KVM_GET_DIRTY_LOG 1 GiB, {name}"] = {}
        for d in devices:
            if (quick and written > 1000) or (d.name == "real" and written > 1000):
                continue
            row[d.name] = or_why(lambda d=d, written=written: dirty(d, written, 0.1 if quick else 0.4))
    return results


def size_in_this_process(device: Device, size: int) -> dict[str, float]:
    """Map so many pages: bytes of ours a page, pages a second, and ms of what then is done to all."""
    with guest(device, size) as g, reserved(size * PAGE, offset=PAGE, same=True) as hva:
        # As many pages for tables as they need: none is given up.
        device.ioctl(g.vm, abi.KVM_SET_NR_MMU_PAGES, 1 << 20)
        g.slot(1, AREA, size * PAGE, hva)
        g.touch(1)
        before = anonymous_memory()
        spent = g.touch(size - 1, first=1)
        answer = {"bytes": (anonymous_memory() - before) / size, "a second": size / spent}
        calls: dict[str, Callable[[], object]] = {
            "take a snapshot": lambda: pykvm.device.mmu(g.vm).snapshot(),
            "start dirty logging": lambda: g.slot(1, AREA, size * PAGE, hva, abi.KVM_MEM_LOG_DIRTY_PAGES),
            "delete the slot": lambda: g.slot(1, 0, 0, 0),
        }
        for name, call in calls.items():
            start = time.process_time()
            call()
            answer[name] = (time.process_time() - start) * 1e3
        return answer


def bench_size(devices: list[Device], quick: bool) -> Results:
    """Memory of our structures, and time, by how many pages are mapped; each in a process of its own."""
    results: Results = {}
    sizes = (4096, 16384, 65536) if quick else (4096, 16384, 65536, 262_144, 1 << 20)
    for device in devices:
        if device.name == "real":  # it does not say what it uses
            continue
        for size in sizes:
            child = [sys.executable, __file__, "--child", device.name, str(size)]
            done = subprocess.run(child, capture_output=True, text=True, check=True)
            answer = json.loads(done.stdout)
            results.setdefault(f"{size:,} pages: bytes of ours a page", {})[device.name] = answer.pop("bytes")
            results.setdefault(f"{size:,} pages: mapped a second", {})[device.name] = answer.pop("a second")
        for name, value in answer.items():
            results.setdefault(f"{size:,} pages mapped: ms to {name}", {})[device.name] = value
    return results


def slots_512(device: Device) -> tuple[float, float]:
    """Return ms for making 512 slots, and pages a second touched among them."""
    count, size = 511, 16
    with guest(device, count * size) as g, reserved(count * size * PAGE, offset=PAGE) as hva:
        start = time.process_time()
        for i in range(count):
            g.slot(i + 1, AREA + i * size * PAGE, size * PAGE, hva + i * size * PAGE)
        spent = time.process_time() - start
        return spent * 1e3, count / g.touch(count, stride=size)


def sparse(device: Device) -> tuple[float, float, float]:
    """Return ms for a slot of 64 GiB, KiB it costs, and ms for deleting it once a page was touched."""
    size = 64 * GIB
    with guest(device, 512) as g, reserved(size, offset=PAGE) as hva:
        before, start = anonymous_memory(), time.process_time()
        g.slot(1, AREA, size, hva)
        spent = time.process_time() - start
        cost = anonymous_memory() - before
        g.touch(1)
        start = time.process_time()
        g.slot(1, 0, 0, 0)
        return spent * 1e3, cost / 1024, (time.process_time() - start) * 1e3


def bench_slots(devices: list[Device], quick: bool) -> Results:
    """Large and many slots."""
    del quick
    names = (
        "64 GiB sparse slot: ms to make",
        "64 GiB sparse slot: KiB of the process",
        "64 GiB sparse slot: ms to delete, a page touched",
        "512 slots: ms to make all",
        "512 slots: first writes a second",
    )
    results: Results = {name: {} for name in names}
    for device in devices:
        try:
            for name, value in zip(names, (*sparse(device), *slots_512(device)), strict=True):
                if device.name != "real" or "KiB" not in name:
                    results[name][device.name] = value
        except (BenchError, OSError) as error:
            results[names[0]][device.name] = f"fails: {error}"
    return results


# ---- the report ------------------------------------------------------------------------------------

TITLES: dict[str, tuple[str, Callable[[list[Device], bool], Results]]] = {
    "faults": ("Faults and page-table edits, a second", bench_faults),
    "dirty": ("Dirty log, calls a second", bench_dirty),
    "size": ("Mapped pages", bench_size),
    "slots": ("Slots", bench_slots),
}
RATIOS = (("pykvm tdp", "real"), ("pykvm shadow", "real"))


@click.command()
@click.option("--quick", is_flag=True, help="Measure shorter and less exactly.")
@click.option("--child", type=(str, int), hidden=True)
@click.argument("sections", nargs=-1, type=click.Choice(SECTIONS))
def main(sections: tuple[str, ...], *, quick: bool, child: tuple[str, int] | None) -> None:
    """Measure pykvm's MMU in both modes beside the kernel's, where there is one; prints Markdown."""
    devices: list[Device] = [TDP, SHADOW]
    if child:
        device = next(d for d in devices if d.name == child[0])
        print(json.dumps(size_in_this_process(device, child[1])))
        return
    console = Console(width=160, highlight=False, soft_wrap=True)
    try:
        os.close(Real().open())
    except OSError as error:
        console.print(f"not measured: real: /dev/kvm: {error.strerror}", style=None)
    else:
        devices.append(Real())
    for section in sections or SECTIONS:
        title, measure = TITLES[section]
        results = measure(devices, quick)
        console.print(f"### {title}\n\n{markdown(results, RATIOS)}", markup=False)
        for name, row in results.items():
            for column, value in row.items():
                if isinstance(value, str):
                    console.print(f"{name}, {column} {value}", markup=False)


if __name__ == "__main__":
    main()
