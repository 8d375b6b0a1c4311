"""A VM whose vCPUs run in 32-bit protected mode without paging: linear addresses are guest-physical.

So a test decides alone what the MMU gets to see: slots, host memory and accesses.  Slot 0 is [0, 1 MiB)
with the code; the tests' own memory comes behind it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from pykvm import trace
from pykvm.abi import uapi
from pykvm.client import Exit, Hlt, Io, Kvm, Mmio, Shutdown, Vcpu
from tests.guest.bare import assemble
from tests.mmu.driver import Memory

CODE, CODE_STEP, STACK = 0x10000, 0x1000, 0x8000
LOW = 1 << 20
AREA = 64 << 20  # where tests put memory
EFAULT, ENOMEM = 14, 12


class Flat:
    """The VM. `vm`, `vcpus`; `low`: slot 0 as bytes."""

    def __init__(self, *, tdp: bool, vcpus: int = 1, cpu: str | None = None) -> None:
        self.tdp = tdp
        self._stack = contextlib.ExitStack()
        kvm = self._stack.enter_context(Kvm(tdp=tdp, cpu=cpu))
        self.vm = self._stack.enter_context(kvm.create_vm())
        self.low = self.vm.add_memory(0, LOW)
        self.vcpus: list[Vcpu] = []
        self._cpuid = kvm.supported_cpuid()
        for _ in range(vcpus):
            self.add_vcpu()
        self.slots = 1

    def add_vcpu(self) -> None:
        """Make one more vCPU."""
        vcpu = self._stack.enter_context(self.vm.create_vcpu(len(self.vcpus)))
        vcpu.set_cpuid(self._cpuid)
        self._flat_mode(vcpu)
        self.vcpus.append(vcpu)

    def close(self) -> None:
        """Take it down; the auditor has the last word."""
        assert self.audit() == []
        self._stack.close()

    @staticmethod
    def _flat_mode(vcpu: Vcpu) -> None:
        with vcpu.sregs as sregs:
            sregs.cr0 = uapi.X86_CR0_PE | uapi.X86_CR0_ET
            for name in ("cs", "ds", "es", "ss", "fs", "gs"):
                segment = getattr(sregs, name)
                segment.base, segment.limit, segment.selector = 0, 0xFFFF_FFFF, 8 if name == "cs" else 16
                segment.type = 11 if name == "cs" else 3
                segment.present = segment.s = segment.g = segment.db = 1
                segment.dpl = segment.unusable = segment.l = 0

    # ---- memory

    def memory(self, gpa: int, size: int, flags: int = 0, align: int = 4 << 20) -> Memory:
        """Add a slot with memory of its own; `align`: of its host address."""
        memory = Memory(size, align)
        self._stack.callback(memory.close)
        self.slot(self.slots, gpa, memory, flags)
        self.slots += 1
        return memory

    def slot(self, number: int, gpa: int, memory: Memory, flags: int = 0, *, delete: bool = False) -> None:
        """Create, move or re-flag a slot, or delete it; the auditor looks at what that leaves."""
        self.vm._set_region(number, flags, gpa, 0 if delete else memory.size, memory.hva)
        assert self.audit() == []

    # ---- running

    def load(self, source: str, n: int = 0) -> int:
        """Assemble code for a vCPU; return where it is."""
        at = CODE + n * CODE_STEP
        code, _ = assemble(source, at, 32, ())
        self.low[at : at + len(code)] = code
        return at

    def start(self, source: str, n: int = 0, **regs: int) -> None:
        """Prepare a vCPU to run the source."""
        at = self.load(source, n)
        with self.vcpus[n].regs as state:
            state.rip, state.rsp, state.rflags = at, STACK + n * 0x1000, 2
            for name, value in regs.items():
                setattr(state, name, value)

    def enter(self, n: int = 0) -> Exit:
        """KVM_RUN, and the auditor."""
        try:
            return self.vcpus[n].run()
        finally:
            assert self.audit() == []

    def run(self, source: str, n: int = 0, **regs: int) -> Exit:
        """Run to the first exit."""
        self.start(source, n, **regs)
        return self.enter(n)

    def finish(self, source: str, n: int = 0, **regs: int) -> int:
        """Run to HLT without any exit before; return eax."""
        found = self.run(source, n, **regs)
        assert found == Hlt(), f"{found} at {self.vcpus[n].regs.rip:#x}"
        return int(self.vcpus[n].regs.rax) & 0xFFFF_FFFF

    def read(self, gpa: int, n: int = 0) -> int:
        """Have a vCPU read four bytes."""
        return self.finish("mov eax, [ebx]; hlt", n, rbx=gpa)

    def write(self, gpa: int, value: int, n: int = 0) -> None:
        """Have a vCPU write four bytes."""
        self.finish("mov [ebx], eax; hlt", n, rbx=gpa, rax=value)

    # ---- looking

    def audit(self) -> list[str]:
        return self.vm.mmu.audit()

    def stat(self, name: str) -> int:
        return self.vm.mmu.stat()[name]

    def stats(self, *names: str) -> tuple[int, ...]:
        stat = self.vm.mmu.stat()
        return tuple(stat[name] for name in names)

    def sptes(self, gpa: int) -> list[int]:
        """Return the leaves that map a frame."""
        return [page.entries[index] for page, index in self.vm.mmu.rmap(gpa >> 12)]

    def levels(self, gpa: int) -> list[int]:
        """Return the sizes of page by which a frame is mapped."""
        return [page.role.level for page, _ in self.vm.mmu.rmap(gpa >> 12)]

    def dirty(self, number: int, pages: int) -> set[int]:
        """Read the dirty log of a slot made by `memory`; pages by number."""
        from pykvm.abi import ffi

        bitmap = bytearray((pages + 63) // 64 * 8)
        log = ffi.new("struct kvm_dirty_log *", {"slot": number})
        pin = ffi.from_buffer(bitmap)
        log.dirty_bitmap = pin
        self.vm.ioctl(uapi.KVM_GET_DIRTY_LOG, log)
        ffi.release(pin)
        assert self.audit() == []
        bits = int.from_bytes(bitmap, "little")
        return {page for page in range(pages) if bits >> page & 1}


Event = tuple[str, Mapping[str, object]]


@contextlib.contextmanager
def listen(names: str) -> Iterator[list[Event]]:
    """Collect tracepoints: (name, fields)."""
    seen: list[Event] = []
    with trace.listen(names, lambda name, fields: seen.append((name, dict(fields)))):
        yield seen


def steps(seen: list[Event], gpa: int | None = None) -> list[str]:
    """Return the steps of mmu_step events, those of faults on one frame only if there is a gpa."""
    return [
        str(f["step"]) for name, f in seen if name == "mmu_step" and gpa in (None, int(str(f["gfn"])) << 12)
    ]


@contextlib.contextmanager
def fails(number: int) -> Iterator[None]:
    """Expect an OSError with this errno."""
    try:
        yield
    except OSError as error:
        assert error.errno == number, error
        return
    msg = f"no error {number}"
    raise AssertionError(msg)


__all__ = ["AREA", "CODE", "EFAULT", "ENOMEM", "LOW", "Exit", "Flat", "Hlt", "Io", "Memory", "Mmio", "Shutdown",
           "fails", "listen", "steps"]  # fmt: skip
