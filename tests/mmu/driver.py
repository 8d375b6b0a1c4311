"""A guest that does one thing at a time: an access, an edit of its tables, an invalidation, a register write.

Unlike `PagingGuest` it sets no registers from outside after the start but the general ones, so that the
MMU sees nothing but what a guest does.  Memory:

    slot 0   [0, 2 MiB)                 code, stacks, descriptor tables, the tables that do not change
    slot 1   [AREA, AREA + PAGES)       what is under test: page directories, page tables, data frames
    slot 2   [LARGE, LARGE + 4 MiB)     what large pages map

All of it is mapped one to one for the supervisor; slot 0 again at USER for CPL 3.  TEST is where the
tables under test are: two entries of a page directory, each of 512 (1024) pages.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from functools import cache

from pykvm.abi import ffi, uapi
from pykvm.client import Exit, Hlt, Io, Kvm, Mmio, OtherExit, Vcpu
from tests.guest.bare import assemble
from tests.mmu.guest import set_flat_segments
from tests.mmu.reference import Cpu, P

IDT, GDT, TSS, CODE, USER_CODE = 0x2000, 0x3000, 0x3800, 0x10000, 0x18000
STACKS = 0x40000
ROOTS, PDPTS, PD_LOW, LOW_TABLES = 0x20000, 0x22000, 0x24000, 0x28000
LOW = 2 << 20
AREA, AREA_PAGES = 0x20_0000, 64
DIRECTORIES, TABLES, FRAMES = AREA, AREA + 0x2000, AREA + 0x8000  # 2 directories, 6 tables, data
LARGE, LARGE_SIZE = 0x80_0000, 4 << 20
HOLE = 0xD000_0000
USER = 0x1000_0000
TEST = 0x4000_0000
WORD = 0x10  # offset of the word that accesses use
W, U, A, D, PS = 2, 4, 0x20, 0x40, 0x80
FULL = P | W | U | A | D

SOURCE = """
read:
    mov eax, [rbx]
    hlt
write:
    mov [rbx], eax
    hlt
modify:
    lock xadd [rbx], eax
    hlt
fetch:
    call rbx
    hlt
store1:
    mov [rdi], al
    hlt
store2:
    mov [rdi], ax
    hlt
store4:
    mov [rdi], eax
    hlt
{WIDE}
xchg4:
    xchg [rdi], eax
    hlt
or4:
    lock or [rdi], eax
    hlt
and4:
    lock and [rdi], eax
    hlt
stos:
    cld
    rep stosd
    hlt
invlpg:
    invlpg [rbx]
    hlt
cr0:
    mov cr0, rax
    hlt
cr3:
    mov cr3, rax
    hlt
cr4:
    mov cr4, rax
    hlt
efer:
    mov ecx, 0xC0000080
    xor edx, edx
    wrmsr
    hlt
as_user:
    push 0x23
    push {USER} + 0x1F000
    push 2
    push 0x1B
    push rsi
    iret{W}
from_user:
    add esp, 5 * {PTR}
    hlt
page_fault:
    pop rdx
    mov rcx, cr2
    out 0x0E, eax
    hlt
other:
    out 0x0F, eax
    hlt
"""

USER_SOURCE = """
u_read:
    mov eax, [rbx]
    int 0x80
u_write:
    mov [rbx], eax
    int 0x80
u_modify:
    lock xadd [rbx], eax
    int 0x80
u_fetch:
    call rbx
u_exit:
    int 0x80
"""

_WIDE = """
store8:
    mov [rdi], rax
    hlt
xchg8:
    xchg [rdi], rax
    hlt
store16:
    movq xmm0, rax
    punpcklqdq xmm0, xmm0
    movups [rdi], xmm0
    hlt
"""


def _names(source: str, wide: bool) -> str:
    for name in () if wide else ("ax", "bx", "cx", "dx", "si", "di", "bp", "sp"):
        source = source.replace(f"r{name}", f"e{name}")
    return source


@cache
def program(width: int) -> tuple[bytes, bytes, dict[str, int]]:
    wide = width == 64
    values = {"USER": USER, "W": "q" if wide else "d", "PTR": 8 if wide else 4, "WIDE": _WIDE if wide else ""}
    bits = 64 if wide else 32
    user, user_labels = assemble(_names(USER_SOURCE, wide), USER + USER_CODE, bits, ())
    kernel, labels = assemble(_names(SOURCE.format(**values), wide), CODE, bits, ())
    return kernel, user, labels | user_labels


class Memory:
    """Host memory that can be taken away and given back, page by page."""

    libc = ctypes.CDLL(None, use_errno=True)
    holes = False

    def __init__(self, size: int, align: int = 4 << 20) -> None:
        self.size = size
        # Behind a reservation, so that nothing else ever lands in a hole.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
        self.map = mmap.mmap(-1, size + align, flags)
        start = int(ffi.cast("uintptr_t", ffi.from_buffer(self.map)))
        self.hva = (start + align - 1) & ~(align - 1)
        self.offset = self.hva - start
        self.libc.mmap.restype = ctypes.c_void_p
        self.libc.mmap.argtypes = (
            ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
        )  # fmt: skip

    def read(self, at: int, size: int) -> bytes:
        return bytes(self.map[self.offset + at : self.offset + at + size])

    def write(self, at: int, data: bytes) -> None:
        self.map[self.offset + at : self.offset + at + len(data)] = data

    def _check(self, result: int) -> None:
        if result:
            raise OSError(ctypes.get_errno(), "memory")

    def protect(self, at: int, size: int, prot: int) -> None:
        address = ctypes.c_void_p(self.hva + at)
        self._check(self.libc.mprotect(address, ctypes.c_size_t(size), prot))

    def dontneed(self, at: int, size: int) -> None:
        address = ctypes.c_void_p(self.hva + at)
        self._check(self.libc.madvise(address, ctypes.c_size_t(size), mmap.MADV_DONTNEED))

    def remap(self, at: int, size: int, prot: int) -> None:
        """Map fresh zeros over it."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10  # MAP_FIXED
        address = self.libc.mmap(self.hva + at, size, prot, flags, -1, 0)
        assert address == self.hva + at

    def unmap(self, at: int, size: int) -> None:
        """Leave a hole, until `remap` or `close`."""
        self._check(self.libc.munmap(ctypes.c_void_p(self.hva + at), ctypes.c_size_t(size)))
        self.holes = True

    def word(self, at: int) -> int:
        return int.from_bytes(self.read(at, 4), "little")

    def set_word(self, at: int, value: int) -> None:
        self.write(at, value.to_bytes(4, "little"))

    def close(self) -> None:
        """Make it whole again: the interpreter is going to unmap all of it."""
        if self.holes:
            self.remap(0, self.size, mmap.PROT_READ | mmap.PROT_WRITE)
        self.protect(0, self.size, mmap.PROT_READ | mmap.PROT_WRITE)


class Outcome:
    """What came of an operation. `kind`: ok, fault, mmio or efault."""

    def __init__(self, kind: str, value: int = 0, error: int = 0, address: int = 0) -> None:
        self.kind, self.value, self.error, self.address = kind, value, error, address

    def __repr__(self) -> str:
        return f"{self.kind}(value={self.value:#x}, error={self.error:#x}, address={self.address:#x})"


class Driver:
    """The VM. `width`: 64 long mode, 36 PAE, 32 two levels."""

    def __init__(self, *, tdp: bool, width: int, vcpus: int = 1) -> None:
        self.width, self.wide = width, width == 64
        self.size = 4 if width == 32 else 8
        self.span = 22 if width == 32 else 21  # bits that an entry of the directory covers
        self._stack = contextlib.ExitStack()
        kvm = self._stack.enter_context(Kvm(tdp=tdp))
        self.vm = self._stack.enter_context(kvm.create_vm())
        self.low = self.vm.add_memory(0, LOW)
        self.area, self.large = Memory(AREA_PAGES * 4096), Memory(LARGE_SIZE)
        self.slots: dict[int, tuple[int, int, Memory]] = {}
        self.set_slot(1, AREA, AREA_PAGES, self.area)
        self.set_slot(2, LARGE, LARGE_SIZE >> 12, self.large)
        self.vcpus: list[Vcpu] = []
        self.kernel, self.user, self.labels = program(width)
        self.low[CODE : CODE + len(self.kernel)] = self.kernel
        self.low[USER_CODE : USER_CODE + len(self.user)] = self.user
        self._descriptors()
        self._tables()
        cpuid = kvm.supported_cpuid()
        self.maxphyaddr = next(e.eax for e in cpuid if e.function == 0x8000_0008) & 0xFF
        for n in range(vcpus):
            vcpu = self._stack.enter_context(self.vm.create_vcpu(n))
            vcpu.set_cpuid(cpuid)
            self._registers(vcpu, n)
            self.vcpus.append(vcpu)

    def close(self) -> None:
        self.area.close()
        self.large.close()
        self._stack.close()

    # ---- memory ----

    def set_slot(
        self, number: int, gpa: int, pages: int, memory: Memory, flags: int = 0, offset: int = 0
    ) -> None:
        """Create, move or re-flag a slot; no pages: delete it."""
        self.vm._set_region(number, flags, gpa, pages << 12, memory.hva + offset)
        if pages:
            self.slots[number] = (gpa, flags, memory)
        else:
            self.slots.pop(number, None)

    def dirty_log(self, number: int, pages: int) -> set[int]:
        """Return the dirty pages of a slot, by number, and start a new cycle."""
        bitmap = bytearray((pages + 63) // 64 * 8)
        log = ffi.new("struct kvm_dirty_log *", {"slot": number})
        pin = ffi.from_buffer(bitmap)
        log.dirty_bitmap = pin
        self.vm.ioctl(uapi.KVM_GET_DIRTY_LOG, log)
        ffi.release(pin)
        bits = int.from_bytes(bitmap, "little")
        return {n for n in range(pages) if bits >> n & 1}

    def peek(self, gpa: int, size: int) -> int:
        return int.from_bytes(self.read(gpa, size), "little")

    def read(self, gpa: int, size: int) -> bytes:
        if gpa < LOW:
            return bytes(self.low[gpa : gpa + size])
        memory, base = (self.large, LARGE) if gpa >= LARGE else (self.area, AREA)
        return memory.read(gpa - base, size)

    def poke(self, gpa: int, value: int, size: int) -> None:
        data = value.to_bytes(size, "little")
        if gpa < LOW:
            self.low[gpa : gpa + size] = data
        else:
            memory, base = (self.large, LARGE) if gpa >= LARGE else (self.area, AREA)
            memory.write(gpa - base, data)

    # ---- what does not change ----

    def _descriptors(self) -> None:
        code = 0x00AF9B000000FFFF if self.wide else 0x00CF9B000000FFFF
        for at, value in enumerate((0, code, 0x00CF93000000FFFF, code | 0x60 << 40, 0x00CFF3000000FFFF)):
            self.poke(GDT + 8 * at, value, 8)
        gate = 16 if self.wide else 8
        for vector in range(0x81):
            name, kind = {14: ("page_fault", 0x8E00), 0x80: ("from_user", 0xEE00)}.get(
                vector, ("other", 0x8E00)
            )
            at = self.labels[name]
            self.poke(IDT + gate * vector, at & 0xFFFF | 8 << 16 | kind << 32 | (at >> 16) << 48, 8)

    def _stack_of(self, n: int) -> int:
        return STACKS + 0x2000 * (n + 1)

    def _tables(self) -> None:
        """One to one up to 16 MiB, USER, and two roots: TEST is in directory 0 or 1."""
        kernel = P | W | A | D
        if self.width == 32:
            for n in range(4096):
                self.poke(LOW_TABLES + n * 4, n << 12 | kernel, 4)
            for n in range(512):
                self.poke(LOW_TABLES + 0x4000 + n * 4, n << 12 | kernel | U, 4)
            for directory in (DIRECTORIES, DIRECTORIES + 0x1000):
                for n, index in ((0, 0), (1, 1), (2, 2), (3, 3), (4, USER >> 22)):
                    self.poke(directory + index * 4, LOW_TABLES + n * 0x1000 | kernel | U, 4)
            return
        for n in range(8):
            self.poke(PD_LOW + n * 8, n << 21 | kernel | PS, 8)
        self.poke(PD_LOW + (USER >> 21) * 8, kernel | U | PS, 8)
        for n in range(2):
            directory = DIRECTORIES + n * 0x1000
            if self.width == 36:
                self.poke(ROOTS + n * 0x1000, PD_LOW | P, 8)
                self.poke(ROOTS + n * 0x1000 + 8, directory | P, 8)
            else:
                self.poke(ROOTS + n * 0x1000, PDPTS + n * 0x1000 | kernel | U, 8)
                self.poke(PDPTS + n * 0x1000, PD_LOW | kernel | U, 8)
                self.poke(PDPTS + n * 0x1000 + 8, directory | kernel | U, 8)

    def root(self, n: int) -> int:
        """CR3 of root n."""
        return (DIRECTORIES if self.width == 32 else ROOTS) + n * 0x1000

    def pde(self, root: int, half: int) -> int:
        """Address of one of the two entries under test in a directory."""
        index = (TEST >> 22 if self.width == 32 else 0) + half
        return DIRECTORIES + root * 0x1000 + index * self.size

    def _registers(self, vcpu: Vcpu, n: int) -> None:
        tss = TSS + 0x100 * n
        self.poke(tss + 4, self._stack_of(n), 8 if self.wide else 4)
        if not self.wide:
            self.poke(tss + 8, 0x10, 4)
        with vcpu.sregs as sregs:
            sregs.cr0, sregs.cr3 = self.initial_cr0, self.root(0)
            sregs.cr4, sregs.efer = self.initial_cr4, self.initial_efer
            set_flat_segments(sregs, wide=self.wide, data=0x23)
            sregs.idt.base, sregs.idt.limit = IDT, 0x81 * 16
            sregs.gdt.base, sregs.gdt.limit = GDT, 0x27
            sregs.tr.base, sregs.tr.limit, sregs.tr.selector, sregs.tr.type = tss, 0x67, 0x28, 11
            sregs.tr.present, sregs.tr.s, sregs.tr.unusable = 1, 0, 0

    @property
    def initial_cr0(self) -> int:
        return 0x8001_0031

    @property
    def initial_cr4(self) -> int:
        return uapi.X86_CR4_PSE if self.width == 32 else uapi.X86_CR4_PAE | uapi.X86_CR4_OSFXSR

    @property
    def initial_efer(self) -> int:
        return (0x500 if self.wide else 0) | uapi.EFER_NX * (self.width != 32)

    def cpu(self, vcpu: Vcpu) -> Cpu:
        """Return the registers as the reference wants them."""
        sregs = vcpu.get_sregs()
        pdptrs: tuple[int, ...] = ()
        if self.width == 36:
            pdptrs = tuple(self.peek((sregs.cr3 & ~0x1F) + 8 * n, 8) for n in range(4))
        return Cpu(int(sregs.cr0), int(sregs.cr3), int(sregs.cr4), int(sregs.efer), pdptrs, self.maxphyaddr)

    # ---- operations ----

    def do(self, vcpu: Vcpu, operation: str, *, user: bool = False, answer: int = 0, **regs: int) -> Outcome:
        """Run one operation to its end. answer: what a read of MMIO gives."""
        index = self.vcpus.index(vcpu)
        with vcpu.regs as state:
            state.rip = self.labels["as_user" if user else operation]
            state.rsi = self.labels[f"u_{operation}"] if user else 0
            state.rsp, state.rflags = self._stack_of(index), 2
            for name, value in regs.items():
                setattr(state, name, value)
        mmio = None
        while True:
            try:
                found: Exit = vcpu.run()
            except OSError as error:
                run = vcpu.kvm_run
                assert error.errno == 14, error
                assert run.exit_reason == uapi.KVM_EXIT_MEMORY_FAULT
                outcome = Outcome("efault", address=int(run.memory_fault.gpa))
                if user:
                    # Back to CPL 0; the instruction stays undone.
                    vcpu.regs.rip = self.labels["u_exit"]
                    assert vcpu.run() == Hlt()
                return outcome
            if isinstance(found, Mmio):
                mmio = found.phys_addr
                value = int.from_bytes(found.data, "little")
                if not found.is_write:
                    found.data[:] = answer.to_bytes(len(found.data), "little")
                if operation == "fetch":
                    break
                continue
            break
        if isinstance(found, Io):
            assert found.port == 0xE, f"another exception than #PF, at {vcpu.regs.rip:#x}"
            regs_after = vcpu.regs
            return Outcome("fault", error=int(regs_after.rdx), address=int(regs_after.rcx))
        assert found == Hlt() or isinstance(found, OtherExit), f"{found} at {vcpu.regs.rip:#x}"
        eax = int(vcpu.regs.rax) & 0xFFFF_FFFF
        if mmio is not None:
            return Outcome("mmio", value if operation == "write" else eax, address=mmio)
        return Outcome("ok", eax)
