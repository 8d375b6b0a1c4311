"""HLT: an exit, and with KVM_CAP_X86_DISABLE_EXITS none."""

from __future__ import annotations

import os
import signal
import threading
from errno import EINTR, EINVAL, EIO
from typing import TYPE_CHECKING

import pytest

from pykvm import uapi
from pykvm.abi import new
from tests.abi.test_events import handler
from tests.machine import CODE, Machine, cpuid_list, emulated, errno_of
from tests.snapshot import supported_cpuid

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import NewMachine
    from tests.machine import Backend

HLT, OUT_99 = b"\xf4", b"\xe6\x99"
HLT_BIT, PAUSE_BIT = uapi.KVM_X86_DISABLE_EXITS_HLT, uapi.KVM_X86_DISABLE_EXITS_PAUSE


@pytest.fixture
def quiet(backend: Backend) -> Iterator[Machine]:
    """A machine whose HLT does not exit."""
    machine = Machine(backend, disabled_exits=HLT_BIT | PAUSE_BIT)
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    yield machine
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    machine.close()


@pytest.mark.spec("cap.X86_DISABLE_EXITS")
def test_before_the_first_vcpu_only(machine: Machine) -> None:
    allowed = machine.cap(uapi.KVM_CAP_X86_DISABLE_EXITS)
    assert allowed & HLT_BIT
    fresh = machine.ioctl(machine.kvm, uapi.KVM_CREATE_VM)
    assert errno_of(lambda: machine.enable(fresh, uapi.KVM_CAP_X86_DISABLE_EXITS, 0x100)) == EINVAL
    assert errno_of(lambda: machine.enable(fresh, uapi.KVM_CAP_X86_DISABLE_EXITS, HLT_BIT)) == 0
    os.close(fresh)
    assert errno_of(lambda: machine.enable(machine.vm, uapi.KVM_CAP_X86_DISABLE_EXITS, HLT_BIT)) == EINVAL


@pytest.mark.spec("cap.X86_DISABLE_EXITS", "exit.HLT")
def test_a_halted_processor_waits_for_an_event(quiet: Machine) -> None:
    emulated(quiet, "exits all the same: its emulator does HLT")
    handler(quiet, 2, b"\xe6\x02\xcf")
    quiet.start(b"\xf3\x90" + HLT + OUT_99)
    for _ in range(2):
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        assert quiet.go_errno() == EINTR
        assert quiet.regs.rip == CODE + 3
    quiet.do(uapi.KVM_NMI)
    assert (quiet.go(), quiet.run.io.port) == (uapi.KVM_EXIT_IO, 2)
    assert (quiet.go(), quiet.run.io.port) == (uapi.KVM_EXIT_IO, 0x99)


@pytest.mark.spec("cap.X86_DISABLE_EXITS", "exit.HLT")
def test_an_interrupt_ends_it(quiet: Machine) -> None:
    emulated(quiet, "exits all the same: its emulator does HLT")
    handler(quiet, 0x40, b"\xe6\x40\xcf")
    quiet.start(b"\xfb" + HLT + OUT_99)
    signal.setitimer(signal.ITIMER_REAL, 0.02)
    assert quiet.go_errno() == EINTR
    request = new("kvm_interrupt")
    request.irq = 0x40
    quiet.do(uapi.KVM_INTERRUPT, request)
    assert (quiet.go(), quiet.run.io.port) == (uapi.KVM_EXIT_IO, 0x40)
    assert (quiet.go(), quiet.run.io.port) == (uapi.KVM_EXIT_IO, 0x99)


@pytest.mark.spec("cap.X86_DISABLE_EXITS", "smm.entry")
def test_the_death_of_the_vm_ends_it(quiet: Machine) -> None:
    if not quiet.cap(uapi.KVM_CAP_X86_SMM):
        pytest.skip("a kernel without CONFIG_KVM_SMM")
    other = quiet.ioctl(quiet.vm, uapi.KVM_CREATE_VCPU, 1)
    quiet.start(HLT)
    quiet.ioctl(other, uapi.KVM_SET_SREGS, quiet.sregs)
    quiet.ioctl(other, uapi.KVM_SET_REGS, quiet.regs)
    ended: list[int] = []
    thread = threading.Thread(
        target=lambda: ended.append(errno_of(lambda: quiet.ioctl(other, uapi.KVM_RUN))), daemon=True
    )
    thread.start()
    thread.join(0.05)
    assert not ended
    # No memory to save the state in.
    quiet.do(uapi.KVM_SMI)
    assert quiet.go_errno() == EIO
    thread.join(5)
    assert ended == [EIO]
    os.close(other)


@pytest.mark.spec("cpuid.f7")
def test_nobody_kicks_who_does_not_halt(quiet: Machine, new_machine: NewMachine) -> None:
    for machine, kept in ((quiet, False), (new_machine(), True)):
        cpuid = supported_cpuid(machine)
        leaf = next(at for at in range(cpuid.nent) if cpuid.entries[at].function == uapi.KVM_CPUID_FEATURES)
        cpuid.entries[leaf].eax |= 1 << uapi.KVM_FEATURE_PV_UNHALT
        machine.do(uapi.KVM_SET_CPUID2, cpuid)
        cpuid = cpuid_list(256)
        machine.do(uapi.KVM_GET_CPUID2, cpuid)
        entries = [cpuid.entries[at] for at in range(cpuid.nent)]
        features = next(entry.eax for entry in entries if entry.function == uapi.KVM_CPUID_FEATURES)
        assert bool(features >> uapi.KVM_FEATURE_PV_UNHALT & 1) is kept
