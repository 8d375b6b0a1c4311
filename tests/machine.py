"""A VM with one vCPU to test with, on pykvm or on the real device, through ioctls only."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
from typing import Any

import pytest

import pykvm
from pykvm import uapi
from pykvm.abi import CData, ffi, new

RAM = 0x10000
CODE = 0x1000
STACK = 0x8000
# A guest physical address that no slot of a Machine covers, and the real-mode segment that starts there.
HOLE = 0xD0000
RUN_SIZE = 3 * mmap.PAGESIZE
# Put into exit_reason before each KVM_RUN, to see whether it was written.
POISON = 0xDEAD


_INT_MAX = 0x7FFF_FFFF


def _wide_ioctl(fd: int, request: int, arg: int) -> int:
    """Do an ioctl with a number that fcntl.ioctl has no room for."""
    libc = ctypes.CDLL(None, use_errno=True)
    result: int = libc.ioctl(fd, ctypes.c_ulong(request), ctypes.c_ulong(arg))
    if result < 0:
        raise OSError(ctypes.get_errno(), "ioctl")
    return result


class Backend:
    """Where the device is: "pykvm" in this process, "exec" for a program's, "real" for the kernel's."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.real = name == "real"
        self.is_file = name != "pykvm"

    def open(self, **options: Any) -> int:
        if options and self.name == "exec":
            pytest.skip("options are for a device in this process")
        if self.is_file:
            return os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        return pykvm.open("/dev/kvm", **options)

    def ioctl(self, fd: int, request: int, arg: Any = 0) -> int:
        """Do an ioctl; `arg` is a number or a cdata pointer."""
        if not self.is_file:
            result = pykvm.ioctl(fd, request, arg)
        elif isinstance(arg, int):
            result = fcntl.ioctl(fd, request, arg) if arg <= _INT_MAX else _wide_ioctl(fd, request, arg)
        else:
            result = fcntl.ioctl(fd, request, memoryview(ffi.buffer(arg)), True)
        assert isinstance(result, int)
        return result


class Machine:
    """One vCPU, 64 KiB of memory at 0, real mode with flat segments once `start` was called."""

    def __init__(
        self, backend: Backend, *, vcpu_id: int = 0, disabled_exits: int = 0, **options: Any
    ) -> None:
        """`options`: those of pykvm.open."""
        self.backend = backend
        self._stack = contextlib.ExitStack()
        self.kvm = self._fd(backend.open(**options))
        self.vm = self._fd(backend.ioctl(self.kvm, uapi.KVM_CREATE_VM))
        if disabled_exits:
            self.enable(self.vm, uapi.KVM_CAP_X86_DISABLE_EXITS, disabled_exits)
        self.memories: list[mmap.mmap] = []
        self.ram = self.add_slot(0, 0, RAM)
        self.vcpu = self._fd(backend.ioctl(self.vm, uapi.KVM_CREATE_VCPU, vcpu_id))
        self.mapping = mmap.mmap(self.vcpu, RUN_SIZE)
        self.run: CData = ffi.cast("struct kvm_run *", ffi.from_buffer(self.mapping))

    def close(self) -> None:
        self._stack.close()

    def _fd(self, fd: int) -> int:
        self._stack.callback(os.close, fd)
        return fd

    # ---- memory

    def add_slot(self, slot: int, gpa: int, size: int, flags: int = 0) -> mmap.mmap:
        memory = mmap.mmap(-1, size)
        region = new("kvm_userspace_memory_region")
        region.slot, region.flags = slot, flags
        region.guest_phys_addr, region.memory_size = gpa, size
        region.userspace_addr = int(ffi.cast("uintptr_t", ffi.from_buffer(memory)))
        self.ioctl(self.vm, uapi.KVM_SET_USER_MEMORY_REGION, region)
        self.memories.append(memory)
        return memory

    def load(self, code: bytes, at: int = CODE) -> None:
        self.ram[at : at + len(code)] = code

    # ---- ioctls

    def ioctl(self, fd: int, request: int, arg: Any = 0) -> int:
        return self.backend.ioctl(fd, request, arg)

    def do(self, request: int, arg: Any = 0) -> int:
        """Do a vCPU ioctl."""
        return self.ioctl(self.vcpu, request, arg)

    def get(self, request: int, struct: str) -> CData:
        out = new(struct)
        self.do(request, out)
        return out

    def errno(self, request: int, arg: Any = 0) -> int:
        """Return the errno a vCPU ioctl fails with, 0 when it does not."""
        return errno_of(lambda: self.do(request, arg))

    def cap(self, number: int) -> int:
        return self.ioctl(self.vm, uapi.KVM_CHECK_EXTENSION, number)

    def enable(self, fd: int, cap: int, *args: int) -> None:
        request = new("kvm_enable_cap")
        request.cap = cap
        for at, value in enumerate(args):
            request.args[at] = value
        self.ioctl(fd, uapi.KVM_ENABLE_CAP, request)

    # ---- registers

    @property
    def regs(self) -> CData:
        return self.get(uapi.KVM_GET_REGS, "kvm_regs")

    @property
    def sregs(self) -> CData:
        return self.get(uapi.KVM_GET_SREGS, "kvm_sregs")

    @property
    def events(self) -> CData:
        return self.get(uapi.KVM_GET_VCPU_EVENTS, "kvm_vcpu_events")

    def set_regs(self, **values: int) -> None:
        regs = self.regs
        for name, value in values.items():
            setattr(regs, name, value)
        self.do(uapi.KVM_SET_REGS, regs)

    def set_sregs(self, sregs: CData) -> None:
        self.do(uapi.KVM_SET_SREGS, sregs)

    def set_events(self, events: CData) -> None:
        self.do(uapi.KVM_SET_VCPU_EVENTS, events)

    def segment(self, name: str, selector: int) -> None:
        """Load a segment register as real mode would."""
        sregs = self.sregs
        register = getattr(sregs, name)
        register.selector, register.base = selector, selector << 4
        self.set_sregs(sregs)

    def start(self, code: bytes, *, rip: int = CODE, **regs: int) -> None:
        """Put code at rip and have the vCPU run it in real mode, segments at 0."""
        self.load(code, rip)
        sregs = self.sregs
        sregs.cs.selector = sregs.cs.base = 0
        self.set_sregs(sregs)
        values = {"rflags": 2, "rsp": STACK, **regs, "rip": rip}
        self.set_regs(**values)

    # ---- running

    def go(self) -> int:
        """Do one KVM_RUN and return the exit reason."""
        self.run.exit_reason = POISON
        assert self.do(uapi.KVM_RUN) == 0
        return int(self.run.exit_reason)

    def go_errno(self) -> int:
        """Do one KVM_RUN and return the errno it fails with, 0 when it does not."""
        self.run.exit_reason = POISON
        return self.errno(uapi.KVM_RUN)

    def complete(self) -> int:
        """Do one KVM_RUN that only completes what is pending; return its errno."""
        self.run.immediate_exit = 1
        try:
            return self.go_errno()
        finally:
            self.run.immediate_exit = 0

    @property
    def data(self) -> memoryview:
        """The PIO data page."""
        return memoryview(self.mapping)[4096:8192]

    def data_bytes(self, n: int) -> bytes:
        return self.mapping[4096 : 4096 + n]

    def mmio_bytes(self) -> bytes:
        return bytes(ffi.buffer(self.run.mmio.data))[: self.run.mmio.len]

    # ---- MSRs

    def get_msr(self, index: int) -> int | None:
        """Return an MSR, None when KVM_GET_MSRS does not know it."""
        msrs = msr_list((index, 0))
        return int(msrs.entries[0].data) if self.do(uapi.KVM_GET_MSRS, msrs) else None

    def set_msr(self, index: int, data: int) -> bool:
        return self.do(uapi.KVM_SET_MSRS, msr_list((index, data))) == 1


def emulated(machine: Machine, how: str) -> None:
    """Skip on a real device: the one at hand runs guest code in KVM's emulator, not on a processor."""
    if machine.backend.real:
        pytest.skip(f"a kernel that emulates guest code {how}")


def msr_list(*entries: tuple[int, int]) -> CData:
    msrs = ffi.new("struct kvm_msrs *", {"entries": len(entries)})
    msrs.nmsrs = len(entries)
    for at, (index, data) in enumerate(entries):
        msrs.entries[at].index, msrs.entries[at].data = index, data
    return msrs


def cpuid_list(room: int) -> CData:
    cpuid = ffi.new("struct kvm_cpuid2 *", {"entries": room})
    cpuid.nent = room
    return cpuid


def errno_of(call: Any) -> int:
    try:
        call()
    except OSError as error:
        return error.errno or 0
    return 0
