"""Signals and KVM_RUN with several threads: only the thread that takes a signal is interrupted.

A signal sent to the process goes to its first thread if that does not block it, else to another that
does not (signal.c complete_signal).  Where a vCPU is in the first thread and another thread does not
block the signal either, pykvm differs: KVM_RUN blocks signals, so that the other one takes it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from errno import EINTR
from typing import TYPE_CHECKING

import pytest

from pykvm import uapi
from pykvm.abi import ffi
from tests.abi.test_events import handler
from tests.abi.test_run import SPIN
from tests.machine import CODE, cpuid_list

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.machine import Machine

SIG = signal.SIGUSR1
NOP = b"\x90"


class Runner(threading.Thread):
    """A thread in KVM_RUN; `errno` is what ended it."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(daemon=True)
        self.machine, self.errno, self.ready = machine, -1, threading.Event()
        self.start()
        self.ready.wait(5)
        time.sleep(0.05)

    def run(self) -> None:
        self.ready.set()
        self.errno = self.machine.go_errno()

    def kick(self) -> None:
        assert self.ident is not None
        signal.pthread_kill(self.ident, SIG)


@pytest.fixture
def taken() -> Iterator[list[int]]:
    """Signals that Python's handler saw, in the first thread."""
    seen: list[int] = []
    before = signal.signal(SIG, lambda number, _: seen.append(number))
    yield seen
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {SIG})
    signal.signal(SIG, before)


@pytest.fixture
def spinning(machine: Machine) -> Machine:
    machine.start(SPIN)
    return machine


@pytest.mark.spec("run.eintr")
def test_a_signal_to_the_thread(spinning: Machine, taken: list[int]) -> None:
    runner = Runner(spinning)
    runner.kick()
    runner.join(5)
    assert runner.errno == EINTR
    assert spinning.run.exit_reason == uapi.KVM_EXIT_INTR
    time.sleep(0.01)
    assert taken == [SIG]


@pytest.mark.spec("run.eintr")
def test_a_signal_to_the_process_that_only_the_vcpus_thread_takes(
    spinning: Machine, taken: list[int]
) -> None:
    runner = Runner(spinning)
    signal.pthread_sigmask(signal.SIG_BLOCK, {SIG})
    os.kill(os.getpid(), SIG)
    runner.join(5)
    assert runner.errno == EINTR
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {SIG})
    time.sleep(0.01)
    assert taken == [SIG]


@pytest.mark.spec("run.eintr")
def test_a_signal_to_the_process_that_the_first_thread_takes(spinning: Machine, taken: list[int]) -> None:
    runner = Runner(spinning)
    os.kill(os.getpid(), SIG)
    deadline = time.monotonic() + 5
    while not taken and time.monotonic() < deadline:
        time.sleep(0.01)
    assert taken == [SIG]
    runner.join(0.1)
    assert runner.is_alive()
    runner.kick()
    runner.join(5)
    assert runner.errno == EINTR


@pytest.mark.spec("run.eintr", "vcpu.SET_SIGNAL_MASK")
def test_a_signal_that_the_vcpus_thread_blocks(spinning: Machine, taken: list[int]) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {SIG})
    runner = Runner(spinning)
    runner.kick()
    runner.join(0.1)
    assert runner.is_alive()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {SIG})
    assert not taken
    # Another signal ends it.
    before = signal.signal(signal.SIGUSR2, lambda *_: None)
    assert runner.ident is not None
    signal.pthread_kill(runner.ident, signal.SIGUSR2)
    runner.join(5)
    signal.signal(signal.SIGUSR2, before)
    assert runner.errno == EINTR


@pytest.fixture
def waiting(machine: Machine, taken: list[int]) -> Machine:
    """A machine to run with a signal that waits, and that KVM_RUN does not block."""
    del taken
    mask = ffi.new("struct kvm_signal_mask *", {"sigset": 8})
    mask.len = 8
    machine.do(uapi.KVM_SET_SIGNAL_MASK, mask)
    signal.pthread_sigmask(signal.SIG_BLOCK, {SIG})
    signal.pthread_kill(threading.get_ident(), SIG)
    return machine


@pytest.mark.spec("run.eintr", "vcpu.SET_SIGNAL_MASK", "run.order")
def test_with_a_signal_that_waits_nothing_is_executed(waiting: Machine) -> None:
    waiting.start(NOP * 2 + SPIN)
    assert waiting.go_errno() == EINTR
    assert waiting.run.exit_reason == uapi.KVM_EXIT_INTR
    assert waiting.regs.rip == CODE
    # It has not run: its CPUID may change.
    cpuid = cpuid_list(1)
    cpuid.entries[0].function = 1
    assert waiting.errno(uapi.KVM_SET_CPUID2, cpuid) == 0


@pytest.mark.spec("run.eintr", "run.complete_then_signal", "exit.IO")
def test_a_signal_that_waits_lets_an_exit_be_completed(waiting: Machine) -> None:
    signal.sigtimedwait({SIG}, 0)
    waiting.start(b"\xe4\x10" + NOP * 2 + SPIN)  # in al, 0x10
    assert waiting.go() == uapi.KVM_EXIT_IO
    waiting.data[0] = 0x55
    signal.pthread_kill(threading.get_ident(), SIG)
    assert waiting.go_errno() == EINTR
    assert (waiting.regs.rip, waiting.regs.rax & 0xFF) == (CODE + 2, 0x55)


@pytest.mark.spec("run.eintr", "vcpu.GET_VCPU_EVENTS")
def test_an_exception_that_a_signal_keeps_out_is_injected_the_next_time(waiting: Machine) -> None:
    waiting.enable(waiting.vm, uapi.KVM_CAP_EXCEPTION_PAYLOAD, 1)
    handler(waiting, uapi.UD_VECTOR)
    waiting.start(SPIN)
    events = waiting.events
    events.flags, events.exception.pending = uapi.KVM_VCPUEVENT_VALID_PAYLOAD, 1
    events.exception.nr = uapi.UD_VECTOR
    waiting.set_events(events)
    assert waiting.go_errno() == EINTR
    assert waiting.regs.rip == CODE
    told = waiting.events.exception
    assert (told.pending, told.injected, told.nr) == (0, 1, uapi.UD_VECTOR)
    signal.sigtimedwait({SIG}, 0)
    assert waiting.go() == uapi.KVM_EXIT_HLT


@pytest.mark.spec("run.eintr", "run.irq_window")
def test_an_open_window_comes_before_a_signal(waiting: Machine) -> None:
    waiting.start(SPIN, rflags=uapi.X86_EFLAGS_IF | 2)
    waiting.run.request_interrupt_window = 1
    assert waiting.go() == uapi.KVM_EXIT_IRQ_WINDOW_OPEN
