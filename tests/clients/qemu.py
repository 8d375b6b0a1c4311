"""QEMU as a client: its processes, its serial console, and the messages of a guest's kernel."""

from __future__ import annotations

import os
import re
import selectors
import shutil
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

QEMU = "qemu-system-x86_64"
EXEC = (sys.executable, "-m", "pykvm", "exec")
ACCELERATORS = {"pykvm": "kvm,kernel-irqchip=off", "tcg": "tcg"}
# Serial console on standard output; no network card, whose option ROM only takes time.
MACHINE = ("-nographic", "-net", "none", "-no-reboot")
_MESSAGE = re.compile(r"\[ *\d+\.\d{6}\] (.*)")
_NUMBER = re.compile(r"0x[0-9a-f]+|\b[0-9a-f]{8,}\b|\d+(\.\d+)?")


class ConsoleError(Exception):
    """The guest did not say what was waited for; the message has the end of what it said."""


def is_there() -> bool:
    """Say if QEMU is installed."""
    return shutil.which(QEMU) is not None


def command(engine: str, *options: str, extensions: Sequence[str] = ()) -> list[str]:
    """Return the command line of a QEMU on "pykvm", with extensions of pykvm's, or on "tcg"."""
    qemu = [QEMU, "-accel", ACCELERATORS[engine], *MACHINE, *options]
    if engine == "tcg":
        return qemu
    return [*EXEC, *(f"--extension={name}" for name in extensions), "--", *qemu]


class Console:
    """A running QEMU and its serial console.

    `text`: all it has printed.  `cpu_seconds`: what the process has used, once it has ended.
    """

    def __init__(self, line: Sequence[str]) -> None:
        """Start it."""
        self.text = ""
        self.cpu_seconds = 0.0
        self._position = 0
        self._started = time.monotonic()
        self._process = subprocess.Popen(
            line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert self._process.stdout is not None
        self._out = self._process.stdout.fileno()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._out, selectors.EVENT_READ)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        """End the process."""
        self._process.terminate()
        self._reap()

    def send(self, line: str) -> None:
        """Type a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()

    def expect(self, what: str, seconds: float) -> float:
        """Wait for a text after all that was waited for before; return the seconds since the start."""
        end = time.monotonic() + seconds
        while (found := self.text.find(what, self._position)) < 0:
            if time.monotonic() > end:
                raise ConsoleError(f"no {what!r} in {seconds} s:\n{self.text[-1500:]}")
            if not self._read():
                raise ConsoleError(f"QEMU ended without {what!r}:\n{self.text[-1500:]}")
        self._position = found + len(what)
        return time.monotonic() - self._started

    def finish(self, seconds: float) -> int:
        """Wait for the end; return the exit status."""
        end = time.monotonic() + seconds
        while self._read():
            if time.monotonic() > end:
                raise ConsoleError(f"still running after {seconds} s:\n{self.text[-1500:]}")
        return self._reap()

    def _read(self) -> bool:
        """Take what there is, waiting a second at most; False at the end of the output."""
        if not self._selector.select(1):
            return True
        data = os.read(self._out, 65536)
        self.text += data.decode("latin1").replace("\r", "")
        return bool(data)

    def _reap(self) -> int:
        if self._process.returncode is None:
            _, status, usage = os.wait4(self._process.pid, 0)
            self._process.returncode = os.waitstatus_to_exitcode(status)
            self.cpu_seconds = usage.ru_utime + usage.ru_stime
            self._selector.close()
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                pipe.close()
        return self._process.returncode


def kernel_messages(text: str) -> list[str]:
    """Return what a Linux kernel printed on its console, without the times."""
    return [found.group(1) for line in text.splitlines() if (found := _MESSAGE.search(line))]


def without_numbers(message: str) -> str:
    """Return a message with every number, address and amount taken out."""
    return _NUMBER.sub("N", message)
