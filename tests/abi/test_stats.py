"""KVM_GET_STATS_FD: how the files are made up, and that what they count is what happened."""

from __future__ import annotations

import os
import signal
import struct
import threading
import time
from errno import EBADF, ENOTTY
from typing import TYPE_CHECKING, NamedTuple

import pytest

from pykvm import uapi
from pykvm.abi import ffi, new
from pykvm.fd import table
from pykvm.kvm.vm import live_vms
from tests.abi.test_events import handler
from tests.machine import Machine, emulated, errno_of

if TYPE_CHECKING:
    from tests.conftest import NewMachine

NAME_SIZE = 48
DESC = struct.Struct("<IhHII48s")
HLT = b"\xf4"
CUMULATIVE, INSTANT, PEAK, LOG_HIST = 0, 1, 2, 4
SECONDS, BOOLEAN = 0x20, 0x40
VM_NAMES = """remote_tlb_flush remote_tlb_flush_requests mmu_shadow_zapped mmu_pte_write mmu_pde_zapped mmu_flooded
    mmu_recycled mmu_cache_miss mmu_unsync pages_4k pages_2m pages_1g nx_lpage_splits max_mmu_rmap_size
    max_mmu_page_hash_collisions"""
VCPU_NAMES = """halt_successful_poll halt_attempted_poll halt_poll_invalid halt_wakeup halt_poll_success_ns
    halt_poll_fail_ns halt_wait_ns halt_poll_success_hist halt_poll_fail_hist halt_wait_hist blocking pf_taken
    pf_fixed pf_emulate pf_spurious pf_fast pf_mmio_spte_created pf_guest tlb_flush invlpg exits io_exits
    mmio_exits signal_exits irq_window_exits nmi_window_exits l1d_flush halt_exits request_irq_exits irq_exits
    host_state_reload fpu_reload insn_emulation insn_emulation_fail hypercalls irq_injections nmi_injections
    req_event nested_run directed_yield_attempted directed_yield_successful preemption_reported
    preemption_other guest_mode notify_window_exits"""


class Desc(NamedTuple):
    flags: int
    exponent: int
    size: int
    offset: int
    bucket_size: int
    name: str


class Stats:
    """A statistics descriptor, read as the manual says."""

    def __init__(self, machine: Machine, fd: int) -> None:
        self.fd = machine.ioctl(fd, uapi.KVM_GET_STATS_FD)
        header = struct.unpack("<6I", os.pread(self.fd, 24, 0))
        self.flags, self.name_size, self.count, self.id_offset, self.desc_offset, self.data_offset = header
        raw = os.pread(self.fd, self.count * DESC.size, self.desc_offset)
        self.descs = [
            Desc._make((*numbers, name.rstrip(b"\0").decode())) for *numbers, name in DESC.iter_unpack(raw)
        ]

    def close(self) -> None:
        os.close(self.fd)

    @property
    def id(self) -> str:
        return os.pread(self.fd, NAME_SIZE, self.id_offset).rstrip(b"\0").decode()

    @property
    def size(self) -> int:
        values = sum(desc.size for desc in self.descs)
        return int(self.data_offset) + 8 * values

    def __getitem__(self, name: str) -> int:
        desc = next(desc for desc in self.descs if desc.name == name)
        return int.from_bytes(os.pread(self.fd, 8, self.data_offset + desc.offset), "little")

    def all(self) -> dict[str, int]:
        return {desc.name: self[desc.name] for desc in self.descs}


@pytest.fixture(params=["vm", "vcpu"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def stats(machine: Machine, kind: str) -> Stats:
    return Stats(machine, machine.vm if kind == "vm" else machine.vcpu)


# ---- the file ------------------------------------------------------------------------------------


@pytest.mark.spec("vm.GET_STATS_FD", "vcpu.GET_STATS_FD")
def test_header_and_id(stats: Stats, kind: str) -> None:
    assert (stats.flags, stats.name_size, stats.id_offset, stats.desc_offset) == (0, NAME_SIZE, 24, 72)
    assert stats.data_offset == 72 + stats.count * DESC.size
    assert stats.id == f"kvm-{os.getpid()}" + ("/vcpu-0" if kind == "vcpu" else "")


@pytest.mark.spec("mmu.stats_vm", "vm.GET_STATS_FD")
def test_descriptors_of_a_vm(machine: Machine) -> None:
    stats = Stats(machine, machine.vm)
    assert [desc.name for desc in stats.descs] == VM_NAMES.split()
    peaks = {"max_mmu_rmap_size", "max_mmu_page_hash_collisions"}
    now = {"mmu_unsync", "pages_4k", "pages_2m", "pages_1g", "nx_lpage_splits"}
    for desc in stats.descs:
        assert desc.flags == (PEAK if desc.name in peaks else INSTANT if desc.name in now else CUMULATIVE)
        assert (desc.exponent, desc.size, desc.bucket_size) == (0, 1, 0)
    # Each value has a place of its own, and these two are not in order.
    assert sorted(desc.offset for desc in stats.descs) == list(range(0, 8 * len(stats.descs), 8))
    assert [desc.offset for desc in stats.descs[-2:]] == [112, 104]


@pytest.mark.spec("mmu.stats_vcpu", "vcpu.GET_STATS_FD")
def test_descriptors_of_a_vcpu(machine: Machine) -> None:
    stats = Stats(machine, machine.vcpu)
    assert [desc.name for desc in stats.descs] == VCPU_NAMES.split()
    offset = 0
    for desc in stats.descs:
        flags = LOG_HIST if desc.name.endswith("_hist") else CUMULATIVE
        if desc.name in {"blocking", "guest_mode"}:
            flags = INSTANT | BOOLEAN
        time = desc.name.endswith("_ns") or flags == LOG_HIST
        assert desc.flags == flags | (SECONDS if time else 0)
        assert desc.exponent == (-9 if time else 0)
        assert desc.size == (32 if flags == LOG_HIST else 1)
        assert (desc.offset, desc.bucket_size) == (offset, 0)
        offset += 8 * desc.size


@pytest.mark.spec("vm.GET_STATS_FD", "vcpu.GET_STATS_FD")
def test_reading(stats: Stats) -> None:
    whole = os.pread(stats.fd, 1 << 16, 0)
    assert len(whole) == stats.size
    for at, size in ((0, 24), (1, 7), (20, 60), (71, 2), (stats.size - 5, 100), (stats.data_offset - 4, 12)):
        assert os.pread(stats.fd, size, at) == whole[at : at + size]
    for at in (stats.size, stats.size + 1, 1 << 40):
        assert os.pread(stats.fd, 100, at) == b""
    # read() goes on where it was, to the end.
    assert b"".join(iter(lambda: os.read(stats.fd, 1000), b"")) == whole
    assert os.read(stats.fd, 8) == b""


@pytest.mark.spec("vm.GET_STATS_FD", "vcpu.GET_STATS_FD")
def test_nothing_else_is_done_with_it(machine: Machine, stats: Stats) -> None:
    assert errno_of(lambda: os.write(stats.fd, b"x")) == EBADF
    for request in (uapi.KVM_GET_STATS_FD, uapi.KVM_CHECK_EXTENSION, uapi.KVM_RUN, uapi.KVM_GET_API_VERSION):
        assert errno_of(lambda r=request: machine.ioctl(stats.fd, r)) == ENOTTY
    assert not os.get_inheritable(stats.fd)


@pytest.mark.spec("vm.GET_STATS_FD", "vcpu.GET_STATS_FD", "fd.lifetime")
def test_each_descriptor_reads_for_itself(machine: Machine, kind: str) -> None:
    first, second = (Stats(machine, machine.vm if kind == "vm" else machine.vcpu) for _ in range(2))
    os.read(first.fd, 24)
    assert os.read(second.fd, 24) == os.pread(first.fd, 24, 0)
    first.close()
    assert second.id.startswith("kvm-")


@pytest.mark.spec("vm.GET_STATS_FD", "vcpu.GET_STATS_FD", "fd.lifetime")
def test_it_outlives_vm_and_vcpu(new_machine: NewMachine, kind: str) -> None:
    machine = new_machine()
    stats = Stats(machine, machine.vm if kind == "vm" else machine.vcpu)
    machine.start(b"\xe6\x10" + HLT)
    assert machine.go() == uapi.KVM_EXIT_IO
    before = stats.all()
    run, machine.run = machine.run, ffi.NULL
    del run
    for fd in (machine.vm, machine.vcpu, machine.kvm):
        os.dup2(os.open("/dev/null", os.O_RDONLY), fd)
    table.reap()
    assert stats.all().keys() == before.keys()
    if kind == "vcpu":
        assert stats["io_exits"] == before["io_exits"] == (0 if machine.backend.real else 1)
    stats.close()


@pytest.mark.spec("vm.GET_STATS_FD", "fd.lifetime")
def test_it_keeps_the_vm(machine: Machine) -> None:
    if machine.backend.real:
        pytest.skip("the kernel does not tell when a VM goes")
    before = set(live_vms())
    vm = machine.ioctl(machine.kvm, uapi.KVM_CREATE_VM)
    stats = Stats(machine, vm)
    (made,) = set(live_vms()) - before
    os.close(vm)
    table.reap()
    assert made in live_vms()
    assert stats.id
    stats.close()
    table.reap()
    assert made not in live_vms()


# ---- what is counted -----------------------------------------------------------------------------


def counted(machine: Machine, stats: Stats, code: bytes, **regs: int) -> dict[str, int]:
    """Run code until HLT, answering nothing; return what grew, without what grows all the time."""
    before = stats.all()
    machine.start(code + HLT, **regs)
    while machine.go() != uapi.KVM_EXIT_HLT:
        pass
    return {name: value - before[name] for name, value in stats.all().items() if value != before[name]}


@pytest.mark.spec("mmu.stats_vcpu", "vcpu.GET_STATS_FD")
def test_exits_are_counted_by_their_kind(machine: Machine) -> None:
    emulated(machine, "exits seldom")
    stats = Stats(machine, machine.vcpu)
    machine.start(HLT)
    machine.go()
    # out, in, out; mov ds, HOLE; mov [0], al; mov al, [0]; vmcall
    grew = counted(machine, stats, b"\xe6\x10\xe4\x10\xe6\x10")
    assert grew["io_exits"] == 3
    assert grew["halt_exits"] == 1
    assert grew["host_state_reload"] == grew["fpu_reload"] == 4
    # Each exit, and beside them nothing but the deadline of a slow machine.
    assert grew["exits"] - grew.get("irq_exits", 0) == 4
    grew = counted(machine, stats, b"\xb8\x00\xd0\x8e\xd8\xa2\x00\x00\xa0\x00\x00\xa2\x01\x00")
    assert grew["mmio_exits"] == 3
    assert grew["pf_mmio_spte_created"] == 1
    assert grew["pf_emulate"] == 1
    assert "io_exits" not in grew
    grew = counted(machine, stats, b"\x66\xb8\x01\x00\x00\x00\x0f\x01\xc1" * 4)
    assert grew["hypercalls"] == 4


@pytest.mark.spec("mmu.stats_vcpu")
def test_events_are_counted(machine: Machine) -> None:
    emulated(machine, "delivers events in batches")
    stats = Stats(machine, machine.vcpu)
    for vector in (2, 0x20):
        handler(machine, vector)
    # The first one is injected again after each page that its delivery found not mapped yet.
    for _ in range(2):
        events = machine.events
        events.nmi.masked = 0
        machine.set_events(events)
        before = stats.all()
        machine.do(uapi.KVM_NMI)
        machine.start(b"\x90" + HLT)
        machine.go()
    assert stats["nmi_injections"] - before["nmi_injections"] == 1
    assert stats["irq_injections"] == before["irq_injections"]
    assert stats["req_event"] > before["req_event"]
    # The client waits for STI.
    machine.start(b"\xfa\x90\xfb\x90\x90" + HLT)
    machine.run.request_interrupt_window = 1
    assert machine.go() == uapi.KVM_EXIT_IRQ_WINDOW_OPEN
    machine.run.request_interrupt_window = 0
    assert stats["irq_window_exits"] - before["irq_window_exits"] == 1
    assert stats["request_irq_exits"] - before["request_irq_exits"] == 1
    interrupt = new("kvm_interrupt")
    interrupt.irq = 0x20
    machine.do(uapi.KVM_INTERRUPT, interrupt)
    machine.go()
    assert stats["irq_injections"] - before["irq_injections"] == 1


@pytest.mark.spec("mmu.stats_vcpu")
def test_signals_are_counted(machine: Machine) -> None:
    stats = Stats(machine, machine.vcpu)
    machine.start(b"\xeb\xfe")
    old = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        timer = threading.Timer(0.05, signal.pthread_kill, (threading.get_ident(), signal.SIGUSR1))
        timer.start()
        assert machine.go_errno()
        timer.join()
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert stats["signal_exits"] == 1
    # immediate_exit is no signal.
    machine.complete()
    assert stats["signal_exits"] == 1


@pytest.mark.spec("mmu.stats_vcpu", "mmu.stats_vm")
@pytest.mark.parametrize("tdp", [True, False])
def test_faults_and_pages_are_counted(new_machine: NewMachine, *, tdp: bool) -> None:
    machine = new_machine(**({} if tdp else {"extensions": {"no-tdp"}}))
    emulated(machine, "reads memory itself")
    vm, vcpu = Stats(machine, machine.vm), Stats(machine, machine.vcpu)
    assert vm["pages_4k"] == vcpu["pf_taken"] == 0
    # A byte into each of four pages: 64 KiB of memory are mapped by 4 KiB pages.
    stores = b"".join(b"\xc6\x06" + (n << 12).to_bytes(2, "little") + b"\x01" for n in range(4, 8))
    grew = counted(machine, vcpu, stores)
    assert grew["pf_taken"] >= grew["pf_fixed"] >= 5
    assert "pf_fast" not in grew
    mapped = vm["pages_4k"]
    assert mapped >= 5
    region = new("kvm_userspace_memory_region")
    region.flags, region.memory_size = uapi.KVM_MEM_LOG_DIRTY_PAGES, 0x10000
    region.userspace_addr = int(ffi.cast("uintptr_t", ffi.from_buffer(machine.ram)))
    flushes = vm["remote_tlb_flush"]
    machine.ioctl(machine.vm, uapi.KVM_SET_USER_MEMORY_REGION, region)
    # At once, with no vCPU running.
    assert vm["remote_tlb_flush"] > flushes
    assert vm["remote_tlb_flush_requests"] >= vm["remote_tlb_flush"]
    if tdp:
        assert counted(machine, vcpu, stores)["pf_fast"] >= 4
    region.memory_size = 0
    machine.ioctl(machine.vm, uapi.KVM_SET_USER_MEMORY_REGION, region)
    assert vm["pages_4k"] == 0
    assert vm["pages_2m"] == vm["pages_1g"] == 0


@pytest.mark.spec("mmu.stats_vm")
def test_large_pages_are_counted(new_machine: NewMachine) -> None:
    machine = new_machine()
    emulated(machine, "reads memory itself")
    vm = Stats(machine, machine.vm)
    size = 4 << 20
    memory = machine.add_slot(1, 4 << 20, size + (2 << 20))
    hva = int(ffi.cast("uintptr_t", ffi.from_buffer(memory)))
    region = new("kvm_userspace_memory_region")
    region.slot = 1
    machine.ioctl(machine.vm, uapi.KVM_SET_USER_MEMORY_REGION, region)
    region.guest_phys_addr, region.memory_size = 4 << 20, size
    region.userspace_addr = -(-hva // (2 << 20)) * (2 << 20)
    machine.ioctl(machine.vm, uapi.KVM_SET_USER_MEMORY_REGION, region)
    # A data segment in real mode that lies there.
    machine.start(b"\xc6\x06\x00\x00\x01" + HLT)
    sregs = machine.sregs
    sregs.ds.base = 4 << 20
    machine.set_sregs(sregs)
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert vm["pages_2m"] == 1
    assert vm["pages_1g"] == 0


@pytest.mark.spec("mmu.stats_vcpu")
def test_values_of_a_running_vcpu_are_seen(machine: Machine) -> None:
    emulated(machine, "exits seldom")
    stats = Stats(machine, machine.vcpu)
    # Hypercalls without end: nothing of it is the client's.
    machine.start(b"\x66\xb8\x01\x00\x00\x00\x0f\x01\xc1\xeb\xf5")
    thread = threading.Thread(target=machine.go_errno)
    thread.start()
    seen, end = [stats["hypercalls"]], time.monotonic() + 10
    while len(seen) < 3 and time.monotonic() < end:
        threading.Event().wait(0.02)
        if (now := stats["hypercalls"]) != seen[-1]:
            seen.append(now)
    machine.run.immediate_exit = 1
    assert thread.ident
    old = signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.pthread_kill(thread.ident, signal.SIGUSR1)
    thread.join(10)
    signal.signal(signal.SIGUSR1, old)
    assert len(seen) == 3
    assert seen == sorted(seen)
