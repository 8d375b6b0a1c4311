"""Suspend a running Linux to a file and resume it in another QEMU: ``python -m tests.clients.linux_migrate``.

All of a guest's state goes out through ioctls and comes back through ioctls, with memory written meanwhile
followed by the dirty log.  In the guest a program keeps registers of every kind busy; it must not notice.
Afterwards the guest is reset from outside and boots again.  Exit status: 0 good, 1 not, 2 cannot run.
"""

from __future__ import annotations

import argparse
import socket
import sys
import tempfile
import time
from pathlib import Path

from tests.clients.guests import CannotRunError, Initramfs, fetch
from tests.clients.linux_boot import (
    BOOT_TIMEOUT,
    COMMAND_TIMEOUT,
    MACHINES,
    PROMPT,
    exit_status,
    is_trouble,
    start,
)
from tests.clients.qemu import Console, ConsoleError, is_there, kernel_messages

# Sums in floating point, checked against the same sums: a register lost on the way shows.
BUSY = rb"""n=0
while true; do
    awk 'BEGIN { for (i = 1; i < 20000; i++) { s += 1 / i; t += 1 / i } print s == t, s }' > /tmp/sum
    [ "$(cat /tmp/sum)" = "1 10.4807" ] || echo "wrong: $(cat /tmp/sum)"
    n=$((n + 1)); echo $n > /tmp/count
done
"""


class Monitor:
    """QEMU's monitor behind a socket."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._socket.settimeout(COMMAND_TIMEOUT)
        self._answer()

    def ask(self, command: str) -> str:
        """Give a command and return what QEMU answers."""
        self._socket.sendall(command.encode() + b"\n")
        return self._answer()

    def _answer(self) -> str:
        text = b""
        while not text.endswith(b"(qemu) "):
            received = self._socket.recv(65536)
            if not received:
                raise ConsoleError("the monitor is gone")
            text += received
        return text.decode("latin1")


def migrate(directory: Path) -> bool:
    """Do it; say if all went well."""
    archive = Initramfs()
    archive.file("busy", BUSY)
    initrd = archive.write("migrate.cpio")
    machine, state = MACHINES["kvm"], directory / "state"

    def options(name: str, *more: str) -> tuple[str, ...]:
        monitor = ("-monitor", f"unix:{directory / name},server,nowait")
        return (*machine.options, "-cpu", "max", "-action", "reboot=reset", *monitor, *more)

    with start("pykvm", machine._replace(options=options("one")), initrd) as console:
        console.expect(PROMPT, BOOT_TIMEOUT)
        console.send("sh /busy & sleep 2; cat /tmp/count")
        console.expect(PROMPT, COMMAND_TIMEOUT)
        monitor = Monitor(directory / "one")
        monitor.ask("migrate_set_parameter max-bandwidth 1G")
        began = time.monotonic()
        monitor.ask(f'migrate "exec:cat > {state}"')
        while "Migration status: completed" not in (answer := monitor.ask("info migrate")):
            if "failed" in answer or time.monotonic() - began > COMMAND_TIMEOUT:
                raise ConsoleError(answer)
            time.sleep(0.1)
        print(f"suspended in {time.monotonic() - began:.1f} s, {state.stat().st_size >> 20} MiB")
    incoming = options("two", "-incoming", f"exec:cat {state}")
    with start("pykvm", machine._replace(options=incoming), initrd) as console:
        monitor = _running(directory / "two")
        good = _goes_on(console)
        monitor.ask("system_reset")
        console.expect("Run /init as init process", BOOT_TIMEOUT)
        console.expect(PROMPT, BOOT_TIMEOUT)
        print("booted again after a reset")
    return good


def _running(path: Path) -> Monitor:
    """Wait until the state is loaded: what is typed before is lost."""
    end = time.monotonic() + COMMAND_TIMEOUT
    while not path.exists():
        time.sleep(0.1)
    monitor = Monitor(path)
    while "VM status: running" not in (answer := monitor.ask("info status")):
        if time.monotonic() > end:
            raise ConsoleError(answer)
        time.sleep(0.1)
    return monitor


def _goes_on(console: Console) -> bool:
    counts = []
    for _ in range(2):
        console.send("sleep 2; echo count $(cat /tmp/count) of it; cat /tmp/sum")
        console.expect("\ncount ", COMMAND_TIMEOUT)
        console.expect(PROMPT, COMMAND_TIMEOUT)
        counts.append(int(console.text.rpartition("\ncount ")[2].split()[0]))
    wrong = [line for line in console.text.splitlines() if line.startswith("wrong: ")]
    wrong += [line for line in kernel_messages(console.text) if is_trouble(line)]
    print(f"resumed, and the count went from {counts[0]} to {counts[1]}", *wrong, sep="\n")
    return counts[1] > counts[0] > 0 and not wrong


def run() -> bool:
    """Migrate with what is fetched; say if all went well."""
    fetch()
    if not is_there():
        raise CannotRunError("qemu-system-x86_64 is not installed")
    with tempfile.TemporaryDirectory() as scratch:
        return migrate(Path(scratch))


def main() -> int:
    """Return the exit status."""
    argparse.ArgumentParser(prog="python -m tests.clients.linux_migrate", description=__doc__).parse_args()
    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
