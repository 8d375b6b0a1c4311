"""The typed layer over the ioctls: `Kvm`, `Vm`, `Vcpu`, in the manner of rust-vmm's kvm-ioctls.

    with Kvm() as kvm, kvm.create_vm() as vm:
        memory = vm.add_memory(0x1000, 0x1000)
        memory[:3] = bytes([0xE6, 0x10, 0xF4])  # out %al, $0x10; hlt
        vcpu = vm.create_vcpu(0)
        with vcpu.sregs as sregs:
            sregs.cs.base = sregs.cs.selector = 0
        vcpu.regs.rip = 0x1000
        match vcpu.run():
            case Io(port=0x10, data=data):
                print(bytes(data))

Without a device the fake one is used; `Kvm(device="/dev/kvm")` asks the kernel for the real one
and the rest of the program stays as it is.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from errno import E2BIG, EBADF, EINTR, ENOENT
from functools import reduce
from typing import TYPE_CHECKING, Self, TypeAlias, cast

from pykvm import device as fake
from pykvm.abi import CData, ffi, uapi
from pykvm.abi.uaccess import address_of

if TYPE_CHECKING:
    from types import TracebackType

    from pykvm.mmu.view import MmuView, WalkView

PAGE_SIZE = 4096

# ---- what ends a KVM_RUN -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Io:
    """IN or OUT. `data` is the PIO data page: read it for OUT, fill it for IN, before the next run."""

    out: bool
    port: int
    size: int
    count: int
    data: memoryview


@dataclass(frozen=True, slots=True)
class Mmio:
    """Access to an address without memory. `data`: what was written, or what to fill in for a read."""

    phys_addr: int
    is_write: bool
    data: memoryview


@dataclass(frozen=True, slots=True)
class Hlt:
    """HLT without an in-kernel APIC; rip is behind it."""


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Triple fault."""


@dataclass(frozen=True, slots=True)
class IrqWindowOpen:
    """The guest can take an interrupt now (request_interrupt_window)."""


@dataclass(frozen=True, slots=True)
class Intr:
    """KVM_RUN failed with EINTR: a signal, or immediate_exit."""


@dataclass(frozen=True, slots=True)
class InternalError:
    """KVM gave up; `suberror` is KVM_INTERNAL_ERROR_*."""

    suberror: int
    data: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FailEntry:
    """The processor refused the guest state."""

    hardware_entry_failure_reason: int
    cpu: int


@dataclass(frozen=True, slots=True)
class Debug:
    """KVM_SET_GUEST_DEBUG stopped the guest at linear address `pc`."""

    exception: int
    pc: int
    dr6: int
    dr7: int


@dataclass(frozen=True, slots=True)
class Hypercall:
    """VMCALL for the client: put the result into `vcpu.kvm_run.hypercall.ret`."""

    nr: int
    args: tuple[int, ...]
    longmode: bool


@dataclass(frozen=True, slots=True)
class Osi:
    """OSI call: `gprs` are written back at the next run (`vcpu.kvm_run.osi.gprs`)."""

    gprs: CData


@dataclass(frozen=True, slots=True)
class SetTpr:
    """The guest lowered CR8."""

    cr8: int


@dataclass(frozen=True, slots=True)
class SystemEvent:
    """Reset, crash and the like: KVM_SYSTEM_EVENT_*."""

    type: int
    data: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class OtherExit:
    """An exit this layer has no class for: look at `vcpu.kvm_run`."""

    reason: int


Exit: TypeAlias = (
    Io
    | Mmio
    | Hlt
    | Shutdown
    | IrqWindowOpen
    | Intr
    | InternalError
    | FailEntry
    | Debug
    | Hypercall
    | Osi
    | SetTpr
    | SystemEvent
    | OtherExit
)

# ---- devices -----------------------------------------------------------------------------------

Ioctl: TypeAlias = Callable[[int, int, "int | CData"], int]


def _fake_ioctl(fd: int, request: int, arg: int | CData) -> int:
    return cast("int", fake.ioctl(fd, request, arg))


def _real_ioctl(fd: int, request: int, arg: int | CData) -> int:
    if isinstance(arg, int):
        return fcntl.ioctl(fd, request, arg)
    # sizeof(arg[0]) counts a flexible array that ffi.buffer() alone would leave out.
    buffer = ffi.buffer(arg, ffi.sizeof(arg[0])) if isinstance(arg, ffi.CData) else arg
    return int(fcntl.ioctl(fd, request, cast("bytearray", buffer)))


class _Fd:
    """A file descriptor of KVM's, closed once; `with` closes it."""

    def __init__(self, fd: int, ioctl: Ioctl) -> None:
        self.fd = fd
        self._ioctl = ioctl

    def fileno(self) -> int:
        """Return the descriptor, for select and os functions."""
        return self.fd

    def ioctl(self, request: int, arg: int | CData = 0) -> int:
        """Issue any request; `arg` is a number, a cffi struct pointer or a writable buffer.

        Errors:
            those of the request, as OSError
        """
        if self.fd < 0:  # fcntl.ioctl would say ValueError
            raise OSError(EBADF, os.strerror(EBADF))
        return self._ioctl(self.fd, request, arg)

    def close(self) -> None:
        """Close the descriptor; the VM or vCPU lives on while others hold it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _get(self, request: int, struct: str) -> CData:
        value = ffi.new(f"struct {struct} *")
        self.ioctl(request, value)
        return value

    def _set(self, request: int, value: CData) -> int:
        return self.ioctl(request, value)


class Kvm(_Fd):
    """/dev/kvm: pykvm's own by default, the kernel's when `device` names it.

    `extensions` are pykvm's (for example "x86-osi"), `kernel` and `cpu` say what it claims to be ("5.10",
    "epyc"; see `pykvm profiles`), and `tdp` off chooses shadow paging; all need the fake device.
    """

    def __init__(
        self,
        device: str | None = None,
        *,
        extensions: Iterable[str] = (),
        kernel: str | None = None,
        cpu: str | None = None,
        tdp: bool = True,
    ) -> None:
        """Open the device.

        Errors:
            ValueError  an extension, a kernel or a processor that pykvm does not have, or a real device
                        together with any of them
        """
        if device is None:
            options = frozenset(extensions) | (frozenset() if tdp else {"no-tdp"})
            fd = fake.open(extensions=options, kernel=kernel, cpu=cpu)
            super().__init__(fd, _fake_ioctl)
        elif extensions or kernel or cpu or not tdp:
            raise ValueError(f"extensions, kernel, cpu and tdp are of the fake device, not of {device}")
        else:
            super().__init__(os.open(device, os.O_RDWR | os.O_CLOEXEC), _real_ioctl)

    def api_version(self) -> int:
        """Return KVM_GET_API_VERSION: 12."""
        return self.ioctl(uapi.KVM_GET_API_VERSION)

    def check_extension(self, cap: int) -> int:
        """Return the value of a capability, 0 when it is absent."""
        return self.ioctl(uapi.KVM_CHECK_EXTENSION, cap)

    def vcpu_mmap_size(self) -> int:
        """Return the size in bytes of a vCPU's kvm_run mapping."""
        return self.ioctl(uapi.KVM_GET_VCPU_MMAP_SIZE)

    def supported_cpuid(self) -> list[CpuidEntry]:
        """Return what a vCPU may be given (KVM_GET_SUPPORTED_CPUID)."""
        return _get_cpuid(self, uapi.KVM_GET_SUPPORTED_CPUID)

    def msr_index_list(self) -> list[int]:
        """Return the MSRs that save and restore need (KVM_GET_MSR_INDEX_LIST)."""
        room = 0
        while True:
            msrs = ffi.new("struct kvm_msr_list *", {"nmsrs": room, "indices": room})
            try:
                self.ioctl(uapi.KVM_GET_MSR_INDEX_LIST, msrs)
            except OSError as error:
                if error.errno != E2BIG:
                    raise
                room = int(msrs.nmsrs)
            else:
                return [int(msrs.indices[i]) for i in range(msrs.nmsrs)]

    def create_vm(self, machine_type: int = 0) -> Vm:
        """Return a new VM without memory and vCPUs."""
        return Vm(self.ioctl(uapi.KVM_CREATE_VM, machine_type), self._ioctl, self.vcpu_mmap_size())


@dataclass(frozen=True, slots=True)
class CpuidEntry:
    """One leaf (or subleaf, with flag KVM_CPUID_FLAG_SIGNIFCANT_INDEX) of a CPUID table."""

    function: int
    index: int
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int


def _get_cpuid(fd: _Fd, request: int) -> list[CpuidEntry]:
    room = 64
    while True:
        table = ffi.new("struct kvm_cpuid2 *", {"nent": room, "entries": room})
        try:
            fd.ioctl(request, table)
        except OSError as error:
            if error.errno != E2BIG or room >= uapi.KVM_MAX_CPUID_ENTRIES:
                raise
            room *= 2
        else:
            return [
                CpuidEntry(*(int(getattr(table.entries[i], name)) for name in CpuidEntry.__slots__))
                for i in range(table.nent)
            ]


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """A slot as it was set, with its memory kept alive and in place."""

    slot: int
    guest_phys_addr: int
    flags: int
    memory: memoryview
    pin: CData


class Vm(_Fd):
    """A VM. Memory given to it stays referenced until the slot or the VM goes."""

    def __init__(self, fd: int, ioctl: Ioctl, vcpu_mmap_size: int) -> None:
        """Wrap a VM descriptor."""
        super().__init__(fd, ioctl)
        self._vcpu_mmap_size = vcpu_mmap_size
        self.regions: dict[int, MemoryRegion] = {}

    def check_extension(self, cap: int) -> int:
        """Return the value of a capability for this VM."""
        return self.ioctl(uapi.KVM_CHECK_EXTENSION, cap)

    def enable_cap(self, cap: int, *args: int, flags: int = 0) -> int:
        """Enable a capability (KVM_ENABLE_CAP)."""
        return _enable_cap(self, cap, args, flags)

    def add_memory(
        self,
        guest_phys_addr: int,
        memory: int | bytearray | mmap.mmap | memoryview,
        *,
        slot: int | None = None,
        readonly: bool = False,
        log_dirty: bool = False,
    ) -> memoryview:
        """Back guest memory by a buffer, or by so many bytes of new memory; return it as a view.

        The buffer must start at a page boundary and be whole pages long: mmap.mmap(-1, size) is.

        Errors:
            EINVAL, EEXIST  as KVM_SET_USER_MEMORY_REGION
        """
        view = memoryview(mmap.mmap(-1, memory) if isinstance(memory, int) else memory).cast("B")
        number = slot if slot is not None else max(self.regions, default=-1) + 1
        flags = readonly * uapi.KVM_MEM_READONLY | log_dirty * uapi.KVM_MEM_LOG_DIRTY_PAGES
        region = MemoryRegion(number, guest_phys_addr, flags, view, ffi.from_buffer(view))
        self._set_region(number, flags, guest_phys_addr, len(view), address_of(region.pin))
        self.regions[number] = region
        return view

    def remove_memory(self, slot: int) -> None:
        """Delete a slot and let go of its memory."""
        self._set_region(slot, 0, 0, 0, 0)
        del self.regions[slot]

    def _set_region(self, slot: int, flags: int, gpa: int, size: int, hva: int) -> None:
        region = ffi.new(
            "struct kvm_userspace_memory_region *",
            {
                "slot": slot,
                "flags": flags,
                "guest_phys_addr": gpa,
                "memory_size": size,
                "userspace_addr": hva,
            },
        )
        self._set(uapi.KVM_SET_USER_MEMORY_REGION, region)

    def dirty_log(self, slot: int) -> bytes:
        """Return the slot's dirty bitmap, bit 0 first page, and start a new cycle.

        Errors:
            ENOENT  no such slot, or it is not logged
        """
        if slot not in self.regions:
            raise OSError(ENOENT, os.strerror(ENOENT))
        pages = len(self.regions[slot].memory) // PAGE_SIZE
        bitmap = bytearray((pages + 63) // 64 * 8)
        log = ffi.new("struct kvm_dirty_log *", {"slot": slot})
        pin = ffi.from_buffer(bitmap)
        log.dirty_bitmap = pin
        self._set(uapi.KVM_GET_DIRTY_LOG, log)
        ffi.release(pin)
        return bytes(bitmap)

    @property
    def mmu(self) -> MmuView:
        """A view of the fake device's MMU: `pages()`, `rmap(gfn)`, `audit()`, `stat()`.

        Errors:
            ENOTTY  this is a VM of the real device
        """
        return fake.mmu(self.fd)

    def walk(self, vcpu: Vcpu, gla: int) -> WalkView:
        """Return every level of a linear address through the guest's tables and the MMU's."""
        return self.mmu.walk(fake.vcpu_of(vcpu.fd), gla)

    def set_tss_addr(self, addr: int) -> None:
        """Give KVM three pages of guest physical address space (KVM_SET_TSS_ADDR)."""
        self.ioctl(uapi.KVM_SET_TSS_ADDR, addr)

    def create_vcpu(self, vcpu_id: int = 0) -> Vcpu:
        """Return a new vCPU in its reset state."""
        fd = self.ioctl(uapi.KVM_CREATE_VCPU, vcpu_id)
        return Vcpu(fd, self._ioctl, self._vcpu_mmap_size)


def _enable_cap(fd: _Fd, cap: int, args: Sequence[int], flags: int) -> int:
    request = ffi.new("struct kvm_enable_cap *", {"cap": cap, "flags": flags, "args": list(args)})
    return fd._set(uapi.KVM_ENABLE_CAP, request)


class State:
    """A register struct of a vCPU as attributes, nested ones too.

    `vcpu.regs.rip` reads it, `vcpu.sregs.cs.base = 0` reads the whole, changes it and writes it
    back; `with vcpu.sregs as s:` reads once, lets the body change the struct, and writes it back
    when the body ends well.  Arrays read as tuples.
    """

    __slots__ = ("_path", "_read", "_structs", "_write")

    def __init__(
        self, read: Callable[[], CData], write: Callable[[CData], object], path: tuple[str, ...] = ()
    ) -> None:
        """Make a view from a GET and a SET; `path` leads to a member struct."""
        object.__setattr__(self, "_read", read)
        object.__setattr__(self, "_write", write)
        object.__setattr__(self, "_path", path)
        object.__setattr__(self, "_structs", [])

    def __getattr__(self, name: str) -> CData:
        struct = self._read()
        value = getattr(reduce(getattr, self._path, struct), name)
        if not isinstance(value, ffi.CData):
            return value
        # A member is no copy: it must not outlive the struct that was read for it.
        if ffi.typeof(value).kind == "array":
            return tuple(value)
        return State(self._read, self._write, (*self._path, name))

    def __setattr__(self, name: str, value: object) -> None:
        struct = self._read()
        setattr(reduce(getattr, self._path, struct), name, value)
        self._write(struct)

    def __str__(self) -> str:
        """Return the numbers in hexadecimal, and the names of other members; repr() waits for no vCPU."""
        struct = reduce(getattr, self._path, self._read())
        kind = ffi.typeof(struct)
        fields = (kind.item if kind.kind == "pointer" else kind).fields
        values = ((name, getattr(struct, name)) for name, _ in fields or ())
        return " ".join(f"{name}={value:#x}" if isinstance(value, int) else name for name, value in values)

    def __enter__(self) -> CData:
        struct = self._read()
        self._structs.append(struct)
        return reduce(getattr, self._path, struct)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        struct = self._structs.pop()
        if kind is None:
            self._write(struct)


class Vcpu(_Fd):
    """A vCPU: its state as attributes, and `run()`."""

    def __init__(self, fd: int, ioctl: Ioctl, mmap_size: int) -> None:
        """Wrap a vCPU descriptor and map its kvm_run."""
        super().__init__(fd, ioctl)
        self._map = mmap.mmap(fd, mmap_size)
        self._pages = memoryview(self._map)
        self.kvm_run: CData = ffi.cast("struct kvm_run *", ffi.from_buffer(self._map))
        """The shared struct kvm_run itself."""
        self.regs = State(self.get_regs, self.set_regs)
        self.sregs = State(self.get_sregs, self.set_sregs)

    def get_regs(self) -> CData:
        """Return a new struct kvm_regs."""
        return self._get(uapi.KVM_GET_REGS, "kvm_regs")

    def set_regs(self, regs: CData) -> None:
        """Set the general registers, rip and rflags."""
        self._set(uapi.KVM_SET_REGS, regs)

    def get_sregs(self) -> CData:
        """Return a new struct kvm_sregs; keep it while you use a member struct of it."""
        return self._get(uapi.KVM_GET_SREGS, "kvm_sregs")

    def set_sregs(self, sregs: CData) -> None:
        """Set segments, tables, control registers, EFER and the APIC base.

        Errors:
            EINVAL  a combination no processor has
        """
        self._set(uapi.KVM_SET_SREGS, sregs)

    def get_fpu(self) -> CData:
        """Return a new struct kvm_fpu."""
        return self._get(uapi.KVM_GET_FPU, "kvm_fpu")

    def set_fpu(self, fpu: CData) -> None:
        """Set x87 and XMM registers."""
        self._set(uapi.KVM_SET_FPU, fpu)

    def get_cpuid(self) -> list[CpuidEntry]:
        """Return the vCPU's CPUID table."""
        return _get_cpuid(self, uapi.KVM_GET_CPUID2)

    def set_cpuid(self, entries: Sequence[CpuidEntry]) -> None:
        """Replace the vCPU's CPUID table."""
        table = ffi.new("struct kvm_cpuid2 *", {"nent": len(entries), "entries": len(entries)})
        for slot, entry in zip(table.entries, entries, strict=True):
            for name in CpuidEntry.__slots__:
                setattr(slot, name, getattr(entry, name))
        self.ioctl(uapi.KVM_SET_CPUID2, table)

    def get_msrs(self, indices: Sequence[int]) -> dict[int, int]:
        """Return the values of the MSRs up to the first one that cannot be read."""
        msrs = _msrs([(index, 0) for index in indices])
        done = self.ioctl(uapi.KVM_GET_MSRS, msrs)
        return {int(msrs.entries[i].index): int(msrs.entries[i].data) for i in range(done)}

    def set_msrs(self, values: dict[int, int]) -> int:
        """Write MSRs in order; return how many were written before the first that was refused.

        To restore all that Kvm.msr_index_list() names, skip what is refused and go on behind it: without a
        local APIC in the kernel MSR_KVM_ASYNC_PF_INT takes no value, not even what it reads as.
        """
        return self.ioctl(uapi.KVM_SET_MSRS, _msrs(list(values.items())))

    def interrupt(self, vector: int) -> None:
        """Queue an external interrupt (KVM_INTERRUPT)."""
        self._set(uapi.KVM_INTERRUPT, ffi.new("struct kvm_interrupt *", {"irq": vector}))

    def nmi(self) -> None:
        """Queue an NMI (KVM_NMI)."""
        self.ioctl(uapi.KVM_NMI)

    def enable_cap(self, cap: int, *args: int, flags: int = 0) -> int:
        """Enable a capability of the vCPU (KVM_ENABLE_CAP)."""
        return _enable_cap(self, cap, args, flags)

    @property
    def immediate_exit(self) -> bool:
        """Whether the next run only completes the last exit and returns Intr()."""
        return bool(self.kvm_run.immediate_exit)

    @immediate_exit.setter
    def immediate_exit(self, value: bool) -> None:
        self.kvm_run.immediate_exit = value

    def run(self) -> Exit:
        """Run the guest until it exits.

        Errors:
            EAGAIN  an application processor has just been started: run again
            EFAULT  the guest touched memory whose host page is gone (see kvm_run.memory_fault)
        """
        try:
            self._ioctl(self.fd, uapi.KVM_RUN, 0)
        except OSError as error:
            if error.errno != EINTR:
                raise
            return Intr()
        reason = int(self.kvm_run.exit_reason)
        return _EXITS.get(reason, _other_exit)(self)

    def instructions(self) -> int | None:
        """Return how many instructions the guest has retired; None on a real device."""
        return None if self._ioctl is _real_ioctl else fake.instructions(self.fd)

    def close(self) -> None:
        """Unmap kvm_run and close the descriptor."""
        self.kvm_run = ffi.NULL
        with contextlib.suppress(BufferError):  # an exit's data may still be looked at
            self._pages.release()
            self._map.close()
        super().close()

    def _data(self, offset: int, size: int) -> memoryview:
        return self._pages[offset : offset + size]


def _msrs(values: Sequence[tuple[int, int]]) -> CData:
    msrs = ffi.new("struct kvm_msrs *", {"nmsrs": len(values), "entries": len(values)})
    for i, (index, data) in enumerate(values):
        msrs.entries[i].index = index
        msrs.entries[i].data = data
    return msrs


_MMIO_DATA = 40  # offset of kvm_run.mmio.data


def _io_exit(vcpu: Vcpu) -> Exit:
    io = vcpu.kvm_run.io
    size, count = int(io.size), int(io.count)
    data = vcpu._data(int(io.data_offset), size * count)
    return Io(io.direction == uapi.KVM_EXIT_IO_OUT, int(io.port), size, count, data)


def _mmio_exit(vcpu: Vcpu) -> Exit:
    mmio = vcpu.kvm_run.mmio
    data = vcpu._data(_MMIO_DATA, int(mmio.len))
    return Mmio(int(mmio.phys_addr), bool(mmio.is_write), data)


def _numbers(array: CData, count: int) -> tuple[int, ...]:
    return tuple(int(array[i]) for i in range(count))


def _internal_error(vcpu: Vcpu) -> Exit:
    error = vcpu.kvm_run.internal
    return InternalError(int(error.suberror), _numbers(error.data, min(int(error.ndata), 16)))


def _system_event(vcpu: Vcpu) -> Exit:
    event = vcpu.kvm_run.system_event
    return SystemEvent(int(event.type), _numbers(event.data, min(int(event.ndata), 16)))


def _debug(vcpu: Vcpu) -> Exit:
    arch = vcpu.kvm_run.debug.arch
    return Debug(int(arch.exception), int(arch.pc), int(arch.dr6), int(arch.dr7))


def _hypercall(vcpu: Vcpu) -> Exit:
    call = vcpu.kvm_run.hypercall
    return Hypercall(int(call.nr), _numbers(call.args, 6), bool(call.flags & 1))


def _fail_entry(vcpu: Vcpu) -> Exit:
    fail = vcpu.kvm_run.fail_entry
    return FailEntry(int(fail.hardware_entry_failure_reason), int(fail.cpu))


def _other_exit(vcpu: Vcpu) -> Exit:
    return OtherExit(int(vcpu.kvm_run.exit_reason))


_EXITS: dict[int, Callable[[Vcpu], Exit]] = {
    uapi.KVM_EXIT_IO: _io_exit,
    uapi.KVM_EXIT_MMIO: _mmio_exit,
    uapi.KVM_EXIT_HLT: lambda _: Hlt(),
    uapi.KVM_EXIT_SHUTDOWN: lambda _: Shutdown(),
    uapi.KVM_EXIT_IRQ_WINDOW_OPEN: lambda _: IrqWindowOpen(),
    uapi.KVM_EXIT_INTERNAL_ERROR: _internal_error,
    uapi.KVM_EXIT_FAIL_ENTRY: _fail_entry,
    uapi.KVM_EXIT_DEBUG: _debug,
    uapi.KVM_EXIT_HYPERCALL: _hypercall,
    uapi.KVM_EXIT_OSI: lambda vcpu: Osi(vcpu.kvm_run.osi.gprs),
    uapi.KVM_EXIT_SET_TPR: lambda vcpu: SetTpr(int(vcpu.kvm_run.cr8)),
    uapi.KVM_EXIT_SYSTEM_EVENT: _system_event,
}
