"""Boot Debian's kernel without firmware, with examples/linux.py: ``python -m tests.clients.linux_entry``.

Each boot protocol (64, 32, pvh), with and without two-dimensional paging (pvh-shadow), goes to the shell's
prompt, runs linux_boot's commands and reboots.  Exit status: 0 all is well, 1 something is not, 2 cannot run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tests.clients.guests import KERNEL, fetch
from tests.clients.linux_boot import (
    ANSWERED,
    BOOT_TIMEOUT,
    COMMAND_TIMEOUT,
    PROMPT,
    SHELL_SAYS,
    exit_status,
    initramfs,
    is_trouble,
)
from tests.clients.qemu import Console, ConsoleError, kernel_messages

if TYPE_CHECKING:
    from collections.abc import Iterable

EXAMPLE = str(Path(__file__).parents[2] / "examples" / "linux.py")
WAYS = ("64", "32", "pvh", "64-shadow", "pvh-shadow")
LAST_WORDS = "the guest asked for a reset"


def boot(way: str) -> Console:
    """Boot and reboot.  Raises ConsoleError when something is not as it should be."""
    protocol, _, paging = way.partition("-")
    options = ["--protocol", protocol, *(["--no-tdp"] if paging else [])]
    with Console([sys.executable, EXAMPLE, str(KERNEL), "--initrd", str(initramfs()), *options]) as console:
        seconds = console.expect(PROMPT, BOOT_TIMEOUT)
        console.send("sh /ask")
        console.expect(ANSWERED, COMMAND_TIMEOUT)
        console.expect(PROMPT, COMMAND_TIMEOUT)
        console.send("reboot -f")
        status = console.finish(COMMAND_TIMEOUT)
    missing = SHELL_SAYS | {LAST_WORDS}
    missing -= set(console.text.splitlines())
    trouble = [line for line in kernel_messages(console.text) if is_trouble(line)]
    if status or missing or trouble:
        raise ConsoleError(f"{way}: status {status}, not said: {missing}, trouble: {trouble}")
    print(f"{way:10} prompt after {seconds:5.1f} s, {console.cpu_seconds:5.1f} s of CPU time")
    return console


def run(ways: Iterable[str]) -> bool:
    """Boot in each way; True: what is wrong raises."""
    fetch()
    for way in ways:
        boot(way)
    return True


def main() -> int:
    """Return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.clients.linux_entry", description=__doc__)
    parser.add_argument("ways", nargs="*", metavar="WAY", help=f"{', '.join(WAYS)}; default: all")
    ways = parser.parse_args().ways or WAYS
    if unknown := set(ways) - set(WAYS):
        parser.error(f"no way {', '.join(sorted(unknown))}")
    return exit_status(lambda: run(ways))


if __name__ == "__main__":
    sys.exit(main())
