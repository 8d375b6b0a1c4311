"""KVM_GET_STATS_FD: statistics of a VM or a vCPU, as a file to be read.

The file is memory with the kernel's layout: header, name, descriptors, values.  Values are put there when the
vCPU that counts comes back to its client, every ten milliseconds while it does not, and after the ioctls that
change them; nothing is done while nobody has asked for a descriptor.

Unlike the kernel's, the file can be mapped, and lseek() moves where read() reads: as its end is fixed, a
client that reads it as the manual says sees no difference.
"""

from __future__ import annotations

import dataclasses
import os
import struct
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from pykvm.abi import CData, ffi, lib, uapi
from pykvm.abi.ioctl import Ignored, vcpu_ioctl, vm_ioctl
from pykvm.fd.table import File, anon_inode_getfd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pykvm.kvm.vcpu import Vcpu
    from pykvm.kvm.vm import Vm

_CUMULATIVE, _INSTANT, _PEAK = (
    uapi.KVM_STATS_TYPE_CUMULATIVE,
    uapi.KVM_STATS_TYPE_INSTANT,
    uapi.KVM_STATS_TYPE_PEAK,
)
_LOG_HIST, _SECONDS, _BOOLEAN = (
    uapi.KVM_STATS_TYPE_LOG_HIST,
    uapi.KVM_STATS_UNIT_SECONDS,
    uapi.KVM_STATS_UNIT_BOOLEAN,
)
HALT_POLL_HIST_COUNT = 32
_HEADER = struct.Struct("<6I")
_DESCRIPTOR = struct.Struct("<IhHII")
# KVM_STATS_NAME_SIZE: a header says it, so that it is in no header of the ABI.
_NAME_SIZE = 48


class Desc(NamedTuple):
    """One statistic: name, KVM_STATS_* flags, power of ten of its unit, how many values."""

    name: str
    flags: int = _CUMULATIVE
    exponent: int = 0
    size: int = 1


def _counters(names: str) -> list[Desc]:
    return [Desc(name) for name in names.split()]


VM_STATS: tuple[Desc, ...] = (
    *_counters(
        "remote_tlb_flush remote_tlb_flush_requests mmu_shadow_zapped mmu_pte_write mmu_pde_zapped"
        " mmu_flooded mmu_recycled mmu_cache_miss"
    ),
    *(Desc(name, _INSTANT) for name in ("mmu_unsync", "pages_4k", "pages_2m", "pages_1g", "nx_lpage_splits")),
    Desc("max_mmu_rmap_size", _PEAK),
    Desc("max_mmu_page_hash_collisions", _PEAK),
)
# Its value is the last all the same: that is its place in struct kvm_vm_stat.
_LAST_VALUE = "max_mmu_rmap_size"
VCPU_STATS: tuple[Desc, ...] = (
    *_counters("halt_successful_poll halt_attempted_poll halt_poll_invalid halt_wakeup"),
    *(Desc(name, _SECONDS, -9) for name in ("halt_poll_success_ns", "halt_poll_fail_ns", "halt_wait_ns")),
    *(
        Desc(name, _LOG_HIST | _SECONDS, -9, HALT_POLL_HIST_COUNT)
        for name in ("halt_poll_success_hist", "halt_poll_fail_hist", "halt_wait_hist")
    ),
    Desc("blocking", _INSTANT | _BOOLEAN),
    *_counters(
        "pf_taken pf_fixed pf_emulate pf_spurious pf_fast pf_mmio_spte_created pf_guest tlb_flush invlpg"
        " exits io_exits mmio_exits signal_exits irq_window_exits nmi_window_exits l1d_flush halt_exits"
        " request_irq_exits irq_exits host_state_reload fpu_reload insn_emulation insn_emulation_fail"
        " hypercalls irq_injections nmi_injections req_event nested_run directed_yield_attempted"
        " directed_yield_successful preemption_reported preemption_other"
    ),
    Desc("guest_mode", _INSTANT | _BOOLEAN),
    Desc("notify_window_exits"),
)


class StatsFile:
    """One open statistics descriptor. `values` returns what it shows, by name."""

    # It is read, and all it says to an ioctl is ENOTTY.
    is_dead = False

    def __init__(
        self, vm: Vm, name: str, descs: tuple[Desc, ...], values: Callable[[], dict[str, int | list[int]]]
    ) -> None:
        """Describe the file; `open` makes it."""
        self._vm = vm
        self._descs = descs
        self._in_order = sorted(descs, key=lambda desc: desc.name == _LAST_VALUE)
        self._values = values
        self._memory: CData = ffi.NULL
        name_bytes = name.encode().ljust(_NAME_SIZE, b"\0")
        desc_offset = _HEADER.size + _NAME_SIZE
        self._data_offset = desc_offset + len(descs) * (_DESCRIPTOR.size + _NAME_SIZE)
        header = _HEADER.pack(0, _NAME_SIZE, len(descs), _HEADER.size, desc_offset, self._data_offset)
        self._head = header + name_bytes + b"".join(self._descriptors())
        self.size = self._data_offset + 8 * sum(desc.size for desc in descs)

    def _descriptors(self) -> Iterable[bytes]:
        sizes = [8 * desc.size for desc in self._in_order]
        offsets = dict(zip(self._in_order, accumulate(sizes, initial=0), strict=False))
        for desc in self._descs:
            head = _DESCRIPTOR.pack(desc.flags, desc.exponent, desc.size, offsets[desc], 0)
            yield head + desc.name.encode().ljust(_NAME_SIZE, b"\0")

    def open(self, name: str) -> int:
        """Return a new descriptor, which can be read and nothing else.  Raises EMFILE, ENFILE."""
        self._vm.get()
        try:
            return anon_inode_getfd(name, "stats", self, self.size, install=self._install, readonly=True)
        except BaseException:
            self._vm.put()
            raise

    def _install(self, file: File) -> None:
        self._memory = file.memory
        ffi.memmove(self._memory, self._head, len(self._head))
        self.refresh()
        self._vm.stats_files += (self,)

    def refresh(self) -> None:
        """Write the values as they are."""
        values = self._values()
        data: list[int] = []
        for desc in self._in_order:
            value = values.get(desc.name, 0)
            data += value if isinstance(value, list) else [value] * desc.size
        packed = struct.pack(f"<{len(data)}Q", *data)
        ffi.memmove(ffi.cast("char *", self._memory) + self._data_offset, packed, len(packed))

    def release(self) -> None:
        """Let the descriptor go."""
        self._vm.stats_files = tuple(each for each in self._vm.stats_files if each is not self)
        self._vm.put()


def refresh(vm: Vm) -> None:
    """Bring every open descriptor of the VM and its vCPUs up to date; there mostly is none."""
    for file in vm.stats_files:
        file.refresh()


def vm_values(vm: Vm) -> dict[str, int | list[int]]:
    """Return the statistics of a VM."""
    return dataclasses.asdict(vm.mmu.stat)


def vcpu_values(vcpu: Vcpu) -> dict[str, int | list[int]]:
    """Return the statistics of a vCPU: what the module counts, and what the processor does."""
    values: dict[str, int | list[int]] = dataclasses.asdict(vcpu.stat)
    counts = vcpu.cpu.stats
    exits = list(counts.exits)
    injected = counts.injected
    values |= {
        "exits": sum(exits),
        "fpu_reload": vcpu.stat.host_state_reload,
        "io_exits": exits[lib.EXIT_IO],
        "mmio_exits": exits[lib.EXIT_MMIO_READ] + exits[lib.EXIT_MMIO_WRITE],
        "irq_window_exits": exits[lib.EXIT_IRQ_WINDOW],
        "nmi_window_exits": exits[lib.EXIT_NMI_WINDOW],
        "halt_exits": exits[lib.EXIT_HLT],
        # What interrupts the guest from outside: the deadline, and a kick.
        "irq_exits": exits[lib.EXIT_PREEMPTED] + exits[lib.EXIT_KICK],
        "insn_emulation": int(counts.completed),
        "insn_emulation_fail": exits[lib.EXIT_EMULATION],
        "hypercalls": exits[lib.EXIT_VMCALL],
        "irq_injections": int(injected[lib.CPU_EVENT_INTR >> 8]),
        "nmi_injections": int(injected[lib.CPU_EVENT_NMI >> 8]),
    }
    return values


@vm_ioctl("KVM_GET_STATS_FD", Ignored(), cap="KVM_CAP_BINARY_STATS_FD")
def vm_get_stats_fd(vm: Vm) -> int:
    """Return a descriptor to read the VM's statistics from: header, name, descriptors, values.

    Errors:
        EMFILE, ENFILE  no descriptor left
    Source: api.rst 4.133; kvm_main.c kvm_vm_ioctl_get_stats_fd
    """
    return StatsFile(vm, f"kvm-{os.getpid()}", VM_STATS, lambda: vm_values(vm)).open("kvm-vm-stats")


@vcpu_ioctl("KVM_GET_STATS_FD", Ignored(), cap="KVM_CAP_BINARY_STATS_FD")
def vcpu_get_stats_fd(vcpu: Vcpu) -> int:
    """Return a descriptor to read the vCPU's statistics from.

    Errors:
        EMFILE, ENFILE  no descriptor left
    Source: api.rst 4.133; kvm_main.c kvm_vcpu_ioctl_get_stats_fd
    """
    name = f"kvm-{os.getpid()}/vcpu-{vcpu.id}"
    file = StatsFile(vcpu.vm, name, VCPU_STATS, lambda: vcpu_values(vcpu))
    return file.open(f"kvm-vcpu-stats:{vcpu.id}")
