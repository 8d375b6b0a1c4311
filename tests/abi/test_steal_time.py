"""Steal time: the structure in guest memory, its version protocol, and the preempted byte."""

from __future__ import annotations

import os
import signal
import struct
import threading
from errno import EINTR
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pykvm import uapi
from tests.abi.test_run import HLT, SPIN
from tests.machine import Machine, cpuid_list, emulated
from tests.snapshot import supported_cpuid

if TYPE_CHECKING:
    from collections.abc import Iterator

AREA = 0x4000
ENABLED = uapi.KVM_MSR_ENABLED


def told(machine: Machine, at: int = AREA) -> tuple[int, int, int, int]:
    """Return (steal, version, flags, preempted)."""
    return struct.unpack_from("<QIIB", machine.ram, at)


def waited() -> int:
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1])


@pytest.fixture
def steal(machine: Machine) -> Machine:
    if not machine.cap(uapi.KVM_CAP_STEAL_TIME):
        pytest.skip("a host without scheduler statistics")
    return machine


@pytest.fixture
def alarm() -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.spec("msr.steal", "cap.STEAL_TIME", "cpuid.f5")
def test_what_is_told_at_entry(steal: Machine) -> None:
    steal.start(HLT * 8)
    steal.ram[AREA : AREA + 64] = struct.pack("<QIIB", 1000, 7, 0, 1).ljust(64, b"\x55")
    assert steal.set_msr(uapi.MSR_KVM_STEAL_TIME, AREA | ENABLED)
    assert steal.get_msr(uapi.MSR_KVM_STEAL_TIME) == AREA | ENABLED
    # Nothing before the guest runs.
    assert told(steal) == (1000, 7, 0, 1)
    steal.go()
    stolen, version, flags, preempted = told(steal)
    # Garbage is made even, then odd while it is written, then even: 7, 8, 9, 10; a slow host tells it again.
    assert (version % 2, flags, preempted) == (0, 0, 0)
    assert version >= 10
    assert stolen >= 1000
    assert steal.ram[AREA + 20 : AREA + 64] == b"\x55" * 44
    assert steal.ram[AREA + 17 : AREA + 20] == b"\x55" * 3


@pytest.mark.spec("msr.steal")
def test_it_grows_by_what_the_thread_waited(steal: Machine) -> None:
    """Two threads that are always ready on one processor: each waits for half of the time."""
    steal.start(HLT * 64)
    steal.set_msr(uapi.MSR_KVM_STEAL_TIME, AREA | ENABLED)
    processors = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(processors)})
    ready, pid = threading.Event(), os.fork()
    if not pid:
        while True:
            pass
    try:
        steal.go()
        first, start = told(steal)[0], waited()
        while waited() - start < 20_000_000:
            ready.wait(0)
        lower = waited() - start
        steal.go()
        grown = told(steal)[0] - first
        assert lower <= grown + 1_000_000
        assert grown <= waited() - start + 40_000_000
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.sched_setaffinity(0, processors)


@pytest.mark.spec("msr.steal")
@pytest.mark.usefixtures("alarm")
def test_a_vcpu_that_a_signal_stopped_is_preempted(steal: Machine) -> None:
    emulated(steal, "does not know when it is between two instructions")
    steal.start(SPIN + HLT)
    steal.set_msr(uapi.MSR_KVM_STEAL_TIME, AREA | ENABLED)
    signal.setitimer(signal.ITIMER_REAL, 0.02)
    assert steal.go_errno() == EINTR
    assert told(steal)[3] == uapi.KVM_VCPU_PREEMPTED
    version = told(steal)[1]
    # The guest asks for a flush instead of sending an interrupt; it runs, and has been told so.
    steal.ram[AREA + 16] |= uapi.KVM_VCPU_FLUSH_TLB
    steal.set_regs(rip=0x1002)
    assert steal.go() == uapi.KVM_EXIT_HLT
    assert told(steal)[3] == 0
    assert told(steal)[1] > version


@pytest.mark.spec("cpuid.f5")
def test_the_guest_is_told(steal: Machine) -> None:
    cpuid = supported_cpuid(steal)
    leaf = next(cpuid.entries[at] for at in range(cpuid.nent) if cpuid.entries[at].function == 0x40000001)
    both = 1 << uapi.KVM_FEATURE_STEAL_TIME | 1 << uapi.KVM_FEATURE_PV_TLB_FLUSH
    assert leaf.eax & both == both


@pytest.mark.spec("msr.steal")
def test_values_that_are_refused(steal: Machine) -> None:
    for low in (2, 4, 8, 16, 32):
        assert not steal.set_msr(uapi.MSR_KVM_STEAL_TIME, AREA | low | ENABLED)
    assert steal.get_msr(uapi.MSR_KVM_STEAL_TIME) == 0


@pytest.mark.spec("msr.steal")
def test_off_or_where_no_memory_is_nothing_is_written(steal: Machine) -> None:
    before = steal.ram[:]
    steal.start(HLT * 4)
    started = steal.ram[:]
    for value in (AREA, 0xD0000 | ENABLED):
        assert steal.set_msr(uapi.MSR_KVM_STEAL_TIME, value)
        assert steal.go() == uapi.KVM_EXIT_HLT
    assert steal.ram[:] == started
    assert len(before) == len(started)


@pytest.mark.spec("msr.enforce", "msr.poll", "cap.ENFORCE_PV_FEATURE_CPUID")
@pytest.mark.parametrize(
    ("index", "feature"),
    [
        (uapi.MSR_KVM_STEAL_TIME, uapi.KVM_FEATURE_STEAL_TIME),
        (uapi.MSR_KVM_POLL_CONTROL, uapi.KVM_FEATURE_POLL_CONTROL),
        (uapi.MSR_KVM_PV_EOI_EN, uapi.KVM_FEATURE_PV_EOI),
        (uapi.MSR_KVM_SYSTEM_TIME_NEW, uapi.KVM_FEATURE_CLOCKSOURCE2),
        (uapi.MSR_KVM_WALL_CLOCK, uapi.KVM_FEATURE_CLOCKSOURCE),
    ],
    ids=hex,
)
def test_cpuid_rules_only_if_it_is_enforced(machine: Machine, index: int, feature: int) -> None:
    value = {uapi.MSR_KVM_POLL_CONTROL: 1, uapi.MSR_KVM_WALL_CLOCK: 0x4000}.get(index, 0x4001)
    assert machine.set_msr(index, value)
    machine.enable(machine.vcpu, uapi.KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 1)
    assert not machine.set_msr(index, value)
    # What is listed can be saved and set to 0 all the same.
    assert machine.set_msr(index, 0)
    assert machine.get_msr(index) == 0

    cpuid = cpuid_list(2)
    cpuid.entries[0].function, cpuid.entries[0].eax = uapi.KVM_CPUID_SIGNATURE, uapi.KVM_CPUID_FEATURES
    for register, word in zip(("ebx", "ecx", "edx"), struct.unpack("<3I", b"KVMKVMKVM\0\0\0"), strict=True):
        setattr(cpuid.entries[0], register, word)
    cpuid.entries[1].function, cpuid.entries[1].eax = uapi.KVM_CPUID_FEATURES, 1 << feature
    machine.do(uapi.KVM_SET_CPUID2, cpuid)
    assert machine.set_msr(index, value)
    assert machine.get_msr(index) == value
