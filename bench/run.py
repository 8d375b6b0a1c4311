"""Measure pykvm beside its peers, all in one run: ``python bench/run.py [--quick] [--json] [SECTION...]``.

Sections: ioctls, trips (port and memory-mapped I/O round trips), creation, mips.

Engines:
    pykvm         this process calls pykvm.ioctl
    pykvm exec    a C client (vmm/) under ``pykvm exec``
    real          the same Python calls, on the kernel's /dev/kvm
    real C        the same C client, on the kernel's /dev/kvm
    qemu          QEMU's TCG, the same guest image
    native        the same object files as a Linux program

What is not there is said and left out. Times are CPU time of the process, so that other load on the machine
shifts them little; rates are N / (cpu(N) - cpu(0)).
"""

import contextlib
import fcntl
import json
import mmap
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import click
from rich.console import Console
from rich.table import Table

import pykvm
from pykvm import abi
from pykvm.abi import CData, ffi

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build" / "bench"
SECTIONS = ("ioctls", "trips", "creation", "mips")
SLOW_MIPS = 20
"""An engine slower than this gets no guest that needs millions of instructions to start."""


class BenchError(Exception):
    """A measurement that cannot be had, and why."""


# ---- engines ---------------------------------------------------------------------------------------


class Device(Protocol):
    """A /dev/kvm as Python sees it."""

    name: str

    def open(self) -> int: ...
    def ioctl(self, fd: int, request: int, arg: int | CData) -> int: ...


class Emulated:
    """pykvm in this process."""

    name = "pykvm"

    def open(self) -> int:
        return pykvm.open("/dev/kvm")

    def ioctl(self, fd: int, request: int, arg: int | CData) -> int:
        return pykvm.ioctl(fd, request, arg)


class Real:
    """The kernel's KVM through fcntl."""

    name = "real"

    def open(self) -> int:
        return os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)

    def ioctl(self, fd: int, request: int, arg: int | CData) -> int:
        return fcntl.ioctl(fd, request, arg if isinstance(arg, int) else ffi.buffer(arg))


@dataclass
class Settings:
    seconds: float
    """CPU time a measurement should take."""
    divisor: int
    """By how much ioctlbench shortens its loops."""
    devices: list[Device]
    clients: dict[str, list[str]]
    """Command prefixes that give a C client its /dev/kvm."""
    qemu: str | None
    missing: list[str] = field(default_factory=list)


def find_engines(*, quick: bool) -> Settings:
    """Look for what there is to compare with."""
    exec_ = [sys.executable, "-m", "pykvm", "exec", "--"]
    seconds, divisor = (0.05, 100) if quick else (0.4, 20)
    qemu = shutil.which("qemu-system-x86_64")
    settings = Settings(seconds, divisor, [Emulated()], {"pykvm exec": exec_}, qemu)
    try:
        os.close(Real().open())
    except OSError as e:
        settings.missing.append(f"real: /dev/kvm: {e.strerror}")
    else:
        settings.devices.append(Real())
        settings.clients["real C"] = []
    if qemu is None:
        settings.missing.append("qemu: no qemu-system-x86_64 on PATH")
    return settings


def build() -> None:
    """Compile the guests and the C clients."""
    BUILD.mkdir(parents=True, exist_ok=True)
    make = ["make", "-s", "-C", str(HERE / "guest"), f"B={BUILD}"]
    subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
    for name in ("benchvmm", "ioctlbench"):
        source = HERE / "vmm" / f"{name}.c"
        if not (BUILD / name).exists() or (BUILD / name).stat().st_mtime < source.stat().st_mtime:
            subprocess.run(["cc", "-O2", "-o", BUILD / name, source], check=True)


# ---- measuring -------------------------------------------------------------------------------------


def per_second(call: Callable[[], object], seconds: float) -> float:
    """Return how often call runs in a second of CPU time."""
    count, n = 0, 1
    start = time.process_time()
    while (spent := time.process_time() - start) < seconds:
        for _ in range(n):
            call()
        count += n
        n = min(n * 2, 1 << 16)
    return count / spent


def rss() -> int:
    """Return this process's resident memory, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


# ---- a machine, from Python ------------------------------------------------------------------------


class Machine:
    """One VM with one vCPU and some memory at 0, through nothing but ioctls."""

    def __init__(self, device: Device, memory: int = 1 << 16, cpuid: CData | None = None) -> None:
        self.device = device
        self.kvm = device.open()
        self.vm = device.ioctl(self.kvm, abi.KVM_CREATE_VM, 0)
        self.ram = mmap.mmap(-1, memory, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.view = ffi.from_buffer("char[]", self.ram)
        region = abi.new("kvm_userspace_memory_region")
        region.memory_size = memory
        region.userspace_addr = int(ffi.cast("uintptr_t", self.view))
        device.ioctl(self.vm, abi.KVM_SET_USER_MEMORY_REGION, region)
        self.vcpu = device.ioctl(self.vm, abi.KVM_CREATE_VCPU, 0)
        size = device.ioctl(self.kvm, abi.KVM_GET_VCPU_MMAP_SIZE, 0)
        self.run_pages = mmap.mmap(self.vcpu, size)
        self.run_view = ffi.from_buffer("char[]", self.run_pages)
        self.run = ffi.cast("struct kvm_run *", self.run_view)
        if cpuid is not None:
            device.ioctl(self.vcpu, abi.KVM_SET_CPUID2, cpuid)

    def enter(self) -> int:
        """KVM_RUN; return the exit reason."""
        self.device.ioctl(self.vcpu, abi.KVM_RUN, 0)
        reason: int = self.run.exit_reason
        return reason

    def start_real(self, code: bytes) -> None:
        """Real mode at 0x1000 with DS at 0x90000, where there is no memory."""
        self.ram[0x1000 : 0x1000 + len(code)] = code
        sregs = abi.new("kvm_sregs")
        self.device.ioctl(self.vcpu, abi.KVM_GET_SREGS, sregs)
        sregs.cs.base = sregs.cs.selector = 0
        sregs.ds.base, sregs.ds.selector = 0x90000, 0x9000
        self.device.ioctl(self.vcpu, abi.KVM_SET_SREGS, sregs)
        self.device.ioctl(self.vcpu, abi.KVM_SET_REGS, abi.new("kvm_regs", {"rip": 0x1000, "rflags": 2}))

    def start_image(self, image: bytes, mode: int, n: int) -> None:
        """Long mode at 1 MiB, everything identity-mapped by large pages: what benchvmm.c does."""
        self.ram[0x100000 : 0x100000 + len(image)] = image
        self.ram[0x100080:0x100098] = struct.pack("<3Q", mode, n, 0)
        self.ram[0x2000:0x2008] = struct.pack("<Q", 0x3007)
        self.ram[0x3000:0x3020] = struct.pack("<4Q", 0x4007, 0x5007, 0x6007, 0x7007)
        self.ram[0x4000:0x8000] = struct.pack("<2048Q", *(i << 21 | 0x87 for i in range(2048)))
        sregs = abi.new("kvm_sregs")
        self.device.ioctl(self.vcpu, abi.KVM_GET_SREGS, sregs)
        code = {"limit": 0xFFFFFFFF, "selector": 8, "type": 11, "present": 1, "s": 1, "l": 1, "g": 1}
        data = code | {"selector": 0x10, "type": 3, "l": 0, "db": 1}
        sregs.cs = code
        sregs.ds = sregs.es = sregs.ss = sregs.fs = sregs.gs = data
        sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = 0x80010033, 0x2000, 0x620, 0xD01
        self.device.ioctl(self.vcpu, abi.KVM_SET_SREGS, sregs)
        regs = abi.new("kvm_regs", {"rip": 0x100000, "rsp": 0x90000, "rflags": 2})
        self.device.ioctl(self.vcpu, abi.KVM_SET_REGS, regs)

    def close(self) -> None:
        """Undo it all, vCPU first."""
        ffi.release(self.run_view)
        self.run_pages.close()
        for fd in (self.vcpu, self.vm, self.kvm):
            os.close(fd)
        ffi.release(self.view)
        self.ram.close()


@contextlib.contextmanager
def machine(device: Device, memory: int = 1 << 16, cpuid: CData | None = None) -> Iterator[Machine]:
    """A Machine for the length of a block."""
    m = Machine(device, memory, cpuid)
    try:
        yield m
    finally:
        m.close()


def supported_cpuid(device: Device) -> CData:
    """Return what KVM_GET_SUPPORTED_CPUID says."""
    cpuid = ffi.new("struct kvm_cpuid2 *", {"entries": 256})
    cpuid.nent = 256
    with contextlib.closing(os.fdopen(device.open(), "rb", buffering=0)) as kvm:
        device.ioctl(kvm.fileno(), abi.KVM_GET_SUPPORTED_CPUID, cpuid)
    return cpuid


# ---- sections --------------------------------------------------------------------------------------

Results = dict[str, dict[str, float | str]]
"""Row -> column -> rate, or why there is none."""


def run_client(prefix: list[str], *command: str) -> str:
    """Run a C client and return what it printed."""
    done = subprocess.run([*prefix, *command], capture_output=True, text=True, timeout=300, check=False)
    if done.returncode and not done.stdout:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise BenchError(lines[-1])
    return done.stdout


CLIENT_LINE = re.compile(r"^(.{44}) cpu +(\d+) ns .*?(FAILED.*)?$")


def client_ioctls(settings: Settings, prefix: list[str]) -> dict[str, float | str]:
    """Run ioctlbench: calls a second by name, and the lines about creation in their own units."""
    rows: dict[str, float | str] = {}
    for line in run_client(prefix, str(BUILD / "ioctlbench"), str(settings.divisor)).splitlines():
        if match := CLIENT_LINE.match(line):
            name, ns, failed = match.groups()
            rows[name.strip()] = failed or 1e9 / max(float(ns), 1)
        elif match := re.match(r"^(VM\+vCPU, 64 kept alive) +(\d+) ns", line):
            rows[match[1]] = 1e9 / float(match[2])
        elif match := re.match(r"^memory per VM\+vCPU .*? (-?[\d.]+) KiB \(RSS (-?[\d.]+)\)", line):
            rows["memory"], rows["rss"] = float(match[1]), float(match[2])
    return rows


STATES = {
    "REGS": "kvm_regs",
    "SREGS": "kvm_sregs",
    "SREGS2": "kvm_sregs2",
    "FPU": "kvm_fpu",
    "XSAVE": "kvm_xsave",
    "XCRS": "kvm_xcrs",
    "DEBUGREGS": "kvm_debugregs",
    "VCPU_EVENTS": "kvm_vcpu_events",
    "MP_STATE": "kvm_mp_state",
}
"""The state of a vCPU: KVM_GET_* and KVM_SET_* by the structure they take."""


def state_calls(m: Machine) -> Iterator[tuple[str, int, int, CData]]:
    """Yield name, descriptor, request and argument of each GET, and of the SET of what it got."""
    arguments = {name: abi.new(struct) for name, struct in STATES.items()}
    msrs = ffi.new("struct kvm_msrs *", {"entries": 1})
    msrs.nmsrs = 1
    msrs.entries[0].index = 0x277  # IA32_PAT
    arguments["MSRS"] = msrs
    arguments["CPUID2"] = supported_cpuid(m.device)
    for name, argument in arguments.items():
        if name != "CPUID2":
            yield f"KVM_GET_{name}", m.vcpu, getattr(abi, f"KVM_GET_{name}"), argument
        yield f"KVM_SET_{name}", m.vcpu, getattr(abi, f"KVM_SET_{name}"), argument
    yield "KVM_GET_CPUID2", m.vcpu, abi.KVM_GET_CPUID2, arguments["CPUID2"]
    clock = abi.new("kvm_clock_data")
    yield "KVM_GET_CLOCK", m.vm, abi.KVM_GET_CLOCK, clock
    yield "KVM_SET_CLOCK", m.vm, abi.KVM_SET_CLOCK, abi.new("kvm_clock_data")


def bench_ioctls(settings: Settings, clients: dict[str, dict[str, float | str]]) -> Results:
    """Calls a second: the cheap ones every client makes all the time, and each part of a vCPU's state."""
    results: Results = {}
    for device in settings.devices:
        with machine(device) as m:
            check = (m.kvm, abi.KVM_CHECK_EXTENSION, abi.KVM_CAP_USER_MEMORY)
            for name, *call in (("KVM_CHECK_EXTENSION", *check), *state_calls(m)):
                row = results.setdefault(name, {})
                row[device.name] = per_second(partial(device.ioctl, *call), settings.seconds)
    for column, rows in clients.items():
        for name, rate in rows.items():
            if name.startswith("KVM_"):
                results.setdefault(name.replace("MSRS(1)", "MSRS"), {})[column] = rate
    return results


TRIPS = {
    "OUT": (b"\xe6\xe2\xeb\xfc", 0),  # out %al,$0xe2; jmp .-2
    "IN": (b"\xe4\xe2\xeb\xfc", 1),  # in $0xe2,%al; jmp .-2
    "MMIO write": (b"\xa2\x10\x00\xeb\xfb", 2),  # mov %al,0x10; jmp .-3
    "MMIO read": (b"\xa0\x10\x00\xeb\xfb", 3),  # mov 0x10,%al; jmp .-3
}
"""A guest for Python, and the mode of g_io for the C client, by kind of access."""


def bench_trips(settings: Settings) -> Results:
    """KVM_RUN round trips a second: the guest does nothing but the access and a jump."""
    results: Results = {name: {} for name in TRIPS}
    for name, (code, mode) in TRIPS.items():
        for device in settings.devices:
            with machine(device) as m:
                m.start_real(code)
                m.enter()
                results[name][device.name] = per_second(m.enter, settings.seconds)
        for column, prefix in settings.clients.items():
            results[name][column] = or_why(partial(client_trips, settings, prefix, mode))
    return results


def bench_creation(settings: Settings, clients: dict[str, dict[str, float | str]]) -> Results:
    """Machines a second, and what one weighs."""
    kept = 32
    create, weight = "VM + vCPU + mmap + close, a second", "KiB per VM + vCPU, of the process"
    free = "KiB per VM + vCPU, of the machine's free memory"
    results: Results = {create: {}, weight: {}, free: {}}
    for device in settings.devices:

        def once(device: Device = device) -> None:
            with machine(device):
                pass

        once()
        results[create][device.name] = per_second(once, settings.seconds)
        with contextlib.ExitStack() as alive:
            before = rss()
            for _ in range(kept):
                alive.enter_context(machine(device))
            results[weight][device.name] = (rss() - before) / kept / 1024
    for column, rows in clients.items():
        made = "CREATE_VM + CREATE_VCPU + mmap + close"
        for row, name in ((create, made), (weight, "rss"), (free, "memory")):
            if name in rows:
                results[row][column] = rows[name]
    return results


@dataclass(frozen=True)
class Workload:
    """One guest image in one mode."""

    image: str
    mode: int
    insns: float
    """Instructions an operation: counted by QEMU's -icount, images built by gcc 12.2."""
    what: str
    start: int = 1
    """Operations of the first, shortest run."""
    heavy: bool = False
    """Needs tens of millions of instructions to start or for one operation."""

    @property
    def native(self) -> bool:
        """Say if it exists as a Linux program."""
        return self.image[0] in "abcdh"

    @property
    def name(self) -> str:
        return f"{self.image}/{self.mode} {self.what}"


WORKLOADS = (
    Workload("h_loop", 0, 5, "five-instruction loop", 20000),
    Workload("a_int", 0, 452275, "integer mix"),
    Workload("b_branch", 1, 18763011, "sieve", heavy=True),
    Workload("b_branch", 2, 11551784, "quicksort", heavy=True),
    Workload("c_mem", 3, 6, "pointer chase, 4 MiB", 100000, heavy=True),
    Workload("c_mem", 0, 6, "pointer chase, 64 MiB", 100000, heavy=True),
    Workload("c_mem", 1, 20971531, "copy by 8 bytes", heavy=True),
    Workload("c_mem", 2, 33554444, "copy by REP MOVSB (a byte is one)", heavy=True),
    Workload("c_mem", 4, 20971531, "copy, aliased in the TLB", heavy=True),
    Workload("d_sse", 0, 19935714, "mandelbrot, scalar double", heavy=True),
    Workload("d_sse", 1, 6611361, "mandelbrot, packed float", heavy=True),
    Workload("e_paging", 0, 18, "PTE edit, INVLPG, touch", 1000),
    Workload("e_paging", 1, 21.75, "PTE edits, CR3 load each 16", 1600),
    Workload("e_paging", 2, 646, "CR3 load, 64 pages", 100),
    Workload("f_exc", 0, 6, "INT3, IRETQ", 1000),
    Workload("f_exc", 1, 7, "#PF, IRETQ", 1000),
    Workload("f_exc", 2, 5, "SYSCALL, SYSRET", 1000),
    Workload("f_exc", 3, 5, "INT 0x80 from ring 3, IRETQ", 1000),
    Workload("f_exc", 4, 25, "#PF, map, retry", 1000),
    Workload("g_io", 0, 4, "OUT", 1000),
    Workload("g_io", 1, 6, "IN", 1000),
    Workload("g_io", 2, 4, "MMIO write", 1000),
    Workload("g_io", 3, 5, "MMIO read", 1000),
    Workload("g_io", 4, 1, "REP OUTSB (a byte is one)", 4096),
)

Once = Callable[[str, int, int], tuple[float, str]]
"""(image, mode, n) -> (CPU seconds, checksum); raises BenchError."""


def once_client(prefix: list[str]) -> Once:
    """Run an image in benchvmm, which takes the time between the guest's own marks."""

    def once(image: str, mode: int, n: int) -> tuple[float, str]:
        command = (str(BUILD / "benchvmm"), str(BUILD / f"{image}.bin"), str(mode), str(n))
        answer = json.loads(run_client(prefix, *command))
        if answer["why"] != "port 0xF4" or answer["rc"] != 0x10:
            raise BenchError(answer["why"])
        return answer["cpu"], checksum(answer["text"])

    return once


def once_native(image: str, mode: int, n: int) -> tuple[float, str]:
    """Run the Linux program of the same object files, which takes its own time."""
    out = run_client([], str(BUILD / f"native_{image[0]}"), str(mode), str(n))
    match = re.search(r"CPUNS=([0-9a-f]+)", out)
    if match is None:
        raise BenchError("no answer")
    return int(match[1], 16) / 1e9, checksum(out)


# fmt: off
QEMU_OPTIONS = [
    "-accel", "tcg,thread=single", "-cpu", "max", "-m", "320", "-nodefaults", "-display", "none",
    "-debugcon", "stdio", "-device", "isa-debug-exit,iobase=0xf4",
]
# fmt: on


def once_qemu(qemu: str) -> Once:
    """Run an image in QEMU; the time is that of the whole process, the caller subtracts the start."""

    def once(image: str, mode: int, n: int) -> tuple[float, str]:
        patched = bytearray((BUILD / f"{image}.bin").read_bytes())
        patched[0x80:0x98] = struct.pack("<3Q", mode, n, 0)
        path = BUILD / "qemu-guest.bin"
        path.write_bytes(patched)
        before = os.times()
        out = run_client([qemu, *QEMU_OPTIONS], "-kernel", str(path))
        after = os.times()
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        return cpu, checksum(out)

    return once


def once_python(device: Device) -> Once:
    """Run an image in this process, with a loop in Python around KVM_RUN."""

    def once(image: str, mode: int, n: int) -> tuple[float, str]:
        started, text, data = 0.0, "", b""
        with machine(device, 320 << 20, supported_cpuid(device)) as m:
            m.start_image((BUILD / f"{image}.bin").read_bytes(), mode, n)
            while m.enter() == abi.KVM_EXIT_IO:
                offset = m.run.io.data_offset
                data = m.run_pages[offset : offset + m.run.io.size]
                if m.run.io.port == 0xE1 and data[0] == 1:
                    started = time.process_time()
                elif m.run.io.port == 0xE1:
                    spent = time.process_time() - started
                elif m.run.io.port == 0xE9:
                    text += data.decode()
                elif m.run.io.port == 0xF4:
                    return spent, checksum(text)
            raise BenchError(f"exit {m.run.exit_reason}")

    return once


def checksum(text: str) -> str:
    """Return the guest's result."""
    match = re.search(r"CK=([0-9a-f]+)", text)
    if match is None:
        raise BenchError(f"no checksum: {text.strip()[:40]!r}")
    return match[1]


def cost(settings: Settings, once: Once, work: Workload, expect: dict[str, str] | None = None) -> float:
    """Return CPU seconds an operation, from a run long enough to be timed and one of none.

    The shortest run's checksum must be every engine's; devices may read differently (g_io).
    """
    base, _ = once(work.image, work.mode, 0)
    n = work.start
    spent, ck = once(work.image, work.mode, n)
    if expect is not None and work.image != "g_io" and expect.setdefault(work.name, ck) != ck:
        raise BenchError("wrong checksum")
    while spent - base < settings.seconds / 2:
        n *= int(min(max(settings.seconds / max(spent - base, 1e-4), 2), 200))
        spent, _ = once(work.image, work.mode, n)
    return (spent - base) / n


def client_trips(settings: Settings, prefix: list[str], mode: int) -> float:
    """Return accesses a second of g_io under a C client."""
    work = next(w for w in WORKLOADS if (w.image, w.mode) == ("g_io", mode))
    return 1 / cost(settings, once_client(prefix), work)


def mips(settings: Settings, once: Once, work: Workload, expect: dict[str, str]) -> float:
    """Return million instructions a second."""
    return work.insns / cost(settings, once, work, expect) / 1e6


def or_why(measure: Callable[[], float]) -> float | str:
    """Return the measurement, or why there is none."""
    try:
        return measure()
    except subprocess.TimeoutExpired:
        return "fails: no end"
    except (BenchError, OSError, json.JSONDecodeError) as e:
        return f"fails: {e}"


def bench_mips(settings: Settings) -> Results:
    """Million guest instructions a CPU second, per image."""
    engines: dict[str, Once] = {"native": once_native}
    if settings.qemu is not None:
        engines["qemu"] = once_qemu(settings.qemu)
    engines |= {column: once_client(prefix) for column, prefix in settings.clients.items()}
    results: Results = {}
    expect: dict[str, str] = {}
    slow: set[str] = set()
    for work in WORKLOADS:
        row = results[work.name] = {}
        for column, once in engines.items():
            if column == "native" and not work.native:
                continue
            if column in slow and work.heavy:
                row[column] = "too slow"
                continue
            row[column] = or_why(partial(mips, settings, once, work, expect))
            value = row[column]
            if work.image == "h_loop" and isinstance(value, float) and value < SLOW_MIPS:
                slow.add(column)
    for device in settings.devices:
        loop = WORKLOADS[0]
        results[loop.name][device.name] = or_why(partial(mips, settings, once_python(device), loop, expect))
    return results


# ---- the report ------------------------------------------------------------------------------------


def shown(value: float | str | None) -> str:
    """Spell a rate with three digits that count; the reason of a failure goes below the table."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value.split(":", 1)[0]
    if value >= 1e6:
        return f"{value / 1e6:.3g} M"
    if value >= 1e5:
        return f"{value / 1e3:.0f} k"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


Ratios = tuple[tuple[str, str], ...]
"""Pairs of columns of which a table shows the quotients."""
COLUMNS = ("native", "qemu", "pykvm", "pykvm exec", "pykvm tdp", "pykvm shadow", "real", "real C")


def cells(results: Results, ratios: Ratios) -> tuple[list[str], list[list[str]]]:
    """Return the head of a table and its rows: the rates, then the quotients of pairs of columns."""
    present = {column for row in results.values() for column in row}
    columns = [column for column in COLUMNS if column in present]
    pairs = [(a, b) for a, b in ratios if {a, b} <= present]
    rows = []
    for name, row in results.items():
        quotients = []
        for a, b in pairs:
            x, y = row.get(a), row.get(b)
            quotients.append(f"{x / y:.3g}" if isinstance(x, float) and isinstance(y, float) and y else "-")
        rows.append([name, *(shown(row.get(column)) for column in columns), *quotients])
    return ["", *columns, *(f"{a} / {b}" for a, b in pairs)], rows


def markdown(results: Results, ratios: Ratios) -> str:
    """Return a table as the documentation has it."""
    head, rows = cells(results, ratios)
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:], ""])


def show(console: Console, title: str, results: Results, ratios: Ratios) -> None:
    """Print one table, and why there is no rate where there is none."""
    head, rows = cells(results, ratios)
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for column in head[1:]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for name, values in results.items():
        for column, value in values.items():
            if isinstance(value, str) and ":" in value:
                console.print(f"{name}, {column} {value}", highlight=False)


TITLES = {
    "ioctls": ("ioctls a second", (("pykvm", "real"), ("pykvm exec", "real C"))),
    "trips": ("KVM_RUN round trips a second", (("pykvm", "real"), ("pykvm exec", "real C"))),
    "creation": ("machines", (("pykvm", "real"), ("pykvm exec", "real C"))),
    "mips": (
        "million guest instructions a CPU second",
        (("pykvm exec", "qemu"), ("pykvm exec", "native"), ("pykvm exec", "real C")),
    ),
}


@click.command()
@click.option("--quick", is_flag=True, help="Measure shorter and less exactly.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--markdown", "as_markdown", is_flag=True, help="Print the tables of docs/performance.md.")
@click.argument("sections", nargs=-1, type=click.Choice(SECTIONS))
def main(sections: tuple[str, ...], *, quick: bool, as_json: bool, as_markdown: bool) -> None:
    """Measure pykvm beside QEMU's TCG, native code and the kernel's KVM, as far as they are there."""
    wanted = sections or SECTIONS
    build()
    settings = find_engines(quick=quick)
    clients: dict[str, dict[str, float | str]] = {}
    if {"ioctls", "creation"} & set(wanted):
        for column, prefix in settings.clients.items():
            try:
                clients[column] = client_ioctls(settings, prefix)
            except (BenchError, subprocess.TimeoutExpired) as e:
                settings.missing.append(f"{column}: ioctlbench: {e}")
    measure: dict[str, Callable[[], Results]] = {
        "ioctls": lambda: bench_ioctls(settings, clients),
        "trips": lambda: bench_trips(settings),
        "creation": lambda: bench_creation(settings, clients),
        "mips": lambda: bench_mips(settings),
    }
    console = Console(width=None if sys.stdout.isatty() else 160)
    report: dict[str, Results] = {}
    for section in wanted:
        report[section] = measure[section]()
        if as_markdown:
            print(f"{section}\n\n{markdown(report[section], TITLES[section][1])}")
        elif not as_json:
            show(console, TITLES[section][0], report[section], TITLES[section][1])
    if as_json:
        print(json.dumps({"missing": settings.missing, "results": report}, indent=1))
        return
    for line in settings.missing:
        console.print(f"not measured: {line}")


if __name__ == "__main__":
    main()
