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
from tests.abi.test_run import SPIN

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.machine import Machine

SIG = signal.SIGUSR1


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
