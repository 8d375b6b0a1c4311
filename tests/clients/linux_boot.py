"""Boot Debian's stock kernel with QEMU, on pykvm and on TCG: ``python -m tests.clients.linux_boot``.

The kernel is that of the package linux-image-amd64, user space is a busybox-static; both are fetched once
with ``apt-get download``, into build/guests.  A run goes from the firmware to the shell's prompt on the
serial console, types a few commands, and powers off.

What must hold: the kernel prints no message on pykvm that it does not print on TCG, numbers and names of the
processor aside, and the commands print the same.  A guest that knows that it runs on KVM has more to say (the
`kvm` machine); one that is not told (`plain`) has not.  Exit status: 0 it holds, 1 it does not, 2 cannot run.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tests.clients.qemu import Console, ConsoleError, command, is_there, kernel_messages, without_numbers

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

GUESTS = Path(__file__).parents[2] / "build" / "guests"
FETCH = "python -m tests.clients.linux_boot --fetch"
KERNEL = GUESTS / "vmlinuz"
BUSYBOX = GUESTS / "busybox"
PROMPT = "/ # "
# Seconds, for a machine that does ten other things.
BOOT_TIMEOUT = 300
COMMAND_TIMEOUT = 120

INIT = b"""#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
exec setsid cttyhack sh
"""
# What the shell is asked; each answer is the same on every processor.
ASK = b"""echo answers:
uname -srm
sha256sum /bin/busybox
gzip -c /bin/busybox | gunzip | md5sum
awk 'BEGIN { for (i = 1; i < 5000; i++) s += (i % 7) * 1.1 / i - i / 3e5; print s }'
seq 1 3000 | sort -rn | tail -n 2
(sleep 0.2; echo child) | cat
grep -c processor /proc/cpuinfo
dmesg | grep -iE 'oops|BUG:|WARNING:|Call Trace'
echo answered
"""
ANSWERED = "answered"
SHELL_SAYS = {"-13.7868", "child", "2", "1"}

# Machines: QEMU's options beside those that every run has.
MACHINES = {
    "kvm": ("-M", "pc"),
    "plain": ("-M", "pc", "-cpu", "qemu64,kvm=off"),
    "q35": ("-M", "q35", "-cpu", "qemu64,kvm=off"),
    "max": ("-M", "pc", "-cpu", "max,kvm=off"),
}
DEFAULT_MACHINES = ("kvm", "plain")
# What a kernel says that finds KVM's own leaves in CPUID: it is told, and should be.
_PARAVIRTUAL = re.compile(r"kvm-clock|kvm-guest|on KVM$|Hypervisor detected: KVM")
# Depends on how fast the machine was at that moment: TCG's runs differ among themselves here.
_TIMING = re.compile(
    r"tsc: |APIC (calibration|delta)|Calibrating delay loop|clocksource: Switched|sched_clock: Marking|Lost \d+ RTC interrupts"
    r"|deferred pages initialised|took \d+ usecs|8254 timer|IRQ0|found apic|\.\.\.\. (failed|works)"
)
# The processor and what it can do, which -cpu max takes from the host on KVM.
_PROCESSOR = re.compile(r"smpboot: CPU0|x86/fpu|Spectre|_OSC: OS supports|PCI: Using configuration type 1")
_TROUBLE = re.compile(r"BUG|WARNING|Oops|Call Trace|panic|unchecked MSR|RIP:|stuck|stall|lockup|unsupported")


class CannotRunError(Exception):
    """Something is not installed or cannot be fetched."""


class Boot(NamedTuple):
    """One run: the kernel's messages, what the shell printed, seconds to the prompt, CPU seconds in all."""

    messages: list[str]
    shell: list[str]
    seconds: float
    cpu_seconds: float


# ---- the guest -----------------------------------------------------------------------------------


def is_fetched() -> bool:
    """Say if kernel and busybox are there."""
    return KERNEL.exists() and BUSYBOX.exists()


def fetch() -> None:
    """Get kernel and busybox from Debian's archive, unless they are there."""
    if is_fetched():
        return
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise CannotRunError("fetching the kernel needs apt-get and dpkg-deb")
    GUESTS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=GUESTS) as scratch:
        directory = Path(scratch)
        done = subprocess.run(
            ["apt-get", "download", _kernel_package(), "busybox-static"],
            cwd=directory, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise CannotRunError(f"apt-get download: {done.stderr.strip()}")
        for package in directory.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, directory / "root"], check=True)
        shutil.copy(next((directory / "root/boot").glob("vmlinuz-*")), KERNEL)
        shutil.copy(directory / "root/bin/busybox", BUSYBOX)


def _kernel_package() -> str:
    """Return the package that linux-image-amd64 stands for today."""
    done = subprocess.run(
        ["apt-cache", "show", "--no-all-versions", "linux-image-amd64"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = re.search(r"^Depends: (linux-image-\S+)", done.stdout, re.MULTILINE)
    if found is None:
        raise CannotRunError("apt knows no linux-image-amd64: apt-get update?")
    return found[1]


def initramfs() -> Path:
    """Write an initramfs whose init is a shell on the console; return where it is."""
    path = GUESTS / "initramfs.cpio"
    directories = ((name, 0o040755, b"") for name in ("bin", "dev", "proc", "sys", "tmp"))
    files = (
        ("bin/busybox", 0o100755, BUSYBOX.read_bytes()),
        ("bin/sh", 0o120777, b"busybox"),
        ("init", 0o100755, INIT),
        ("ask", 0o100644, ASK),
    )
    path.write_bytes(_cpio([*directories, *files]))
    return path


def _cpio(entries: Iterable[tuple[str, int, bytes]]) -> bytes:
    """Return an archive of (name, mode, content), in the format "newc" that the kernel unpacks."""
    out = bytearray()
    console = ("dev/console", 0o020600, b"")
    for inode, (name, mode, data) in enumerate([*entries, console, ("TRAILER!!!", 0, b"")], 1):
        major, minor = (5, 1) if name == console[0] else (0, 0)
        path = name.encode() + b"\0"
        fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, major, minor, len(path), 0)
        out += b"070701" + b"".join(b"%08X" % field for field in fields) + path
        out += bytes(-len(out) % 4) + data
        out += bytes(-len(out) % 4)
    return bytes(out)


def boot(engine: str, machine: str = "kvm") -> Boot:
    """Boot on "pykvm" or "tcg", ask the shell, power off.  Raises ConsoleError."""
    options = list(MACHINES[machine])
    if engine == "tcg":
        options = [option.removesuffix(",kvm=off") for option in options]
    line = command(engine, "-m", "512", "-kernel", str(KERNEL), "-initrd", str(initramfs()),
                   "-append", "console=ttyS0 ignore_loglevel", *options)  # fmt: skip
    with Console(line) as console:
        seconds = console.expect(PROMPT, BOOT_TIMEOUT)
        console.send("sh /ask")
        console.expect(ANSWERED, COMMAND_TIMEOUT)
        console.expect(PROMPT, COMMAND_TIMEOUT)
        console.send("poweroff -f")
        console.finish(COMMAND_TIMEOUT)
    return Boot(kernel_messages(console.text), _answers(console.text), seconds, console.cpu_seconds)


def _answers(text: str) -> list[str]:
    """Return what the shell's commands printed, without what the kernel said in between."""
    lines = text[text.index("answers:") : text.index(ANSWERED)].splitlines()[1:]
    return [line for line in lines if not kernel_messages(line)]


# ---- the comparison ------------------------------------------------------------------------------


def is_trouble(message: str) -> bool:
    """Say if a message is one of a kernel that met something it should not."""
    return _TROUBLE.search(message) is not None


def additional(ours: Boot, reference: Boot, machine: str) -> Iterator[str]:
    """Yield the messages that the reference does not have."""
    known = {without_numbers(message) for message in reference.messages}
    for message in ours.messages:
        if without_numbers(message) in known or _TIMING.search(message):
            continue
        if machine == "kvm" and _PARAVIRTUAL.search(message):
            continue
        if machine == "max" and _PROCESSOR.search(message):
            continue
        yield message


def compare(machine: str) -> bool:
    """Boot on both and print what is different; say if nothing is."""
    reference, ours = boot("tcg", machine), boot("pykvm", machine)
    ratio = ours.cpu_seconds / reference.cpu_seconds
    print(f"{machine}: {' '.join(MACHINES[machine])}")
    for name, run in (("tcg", reference), ("pykvm", ours)):
        print(f"  {name:6} prompt after {run.seconds:5.1f} s, {run.cpu_seconds:5.1f} s of CPU time, "
              f"{len(run.messages)} messages")  # fmt: skip
    print(f"  ratio of CPU time {ratio:.2f}")
    messages = list(additional(ours, reference, machine))
    for message in messages:
        print(f"  only on pykvm: {message}")
    same = ours.shell == reference.shell
    if not same:
        print("  the shell says", *ours.shell, "and on tcg", *reference.shell, sep="\n    ")
    return same and not messages


def run(machines: Iterable[str], *, only_fetch: bool) -> bool:
    """Do what the command line says; False when something differs."""
    fetch()
    if only_fetch:
        return True
    if not is_there():
        raise CannotRunError("qemu-system-x86_64 is not installed")
    held = [compare(machine) for machine in machines]
    return all(held)


def main() -> int:
    """Take the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.clients.linux_boot", description=__doc__)
    names = f"{', '.join(MACHINES)}; default: {' '.join(DEFAULT_MACHINES)}"
    parser.add_argument("machines", nargs="*", metavar="MACHINE", help=names)
    parser.add_argument("--fetch", action="store_true", help="only fetch the kernel and busybox")
    arguments = parser.parse_args()
    if unknown := set(arguments.machines) - set(MACHINES):
        parser.error(f"no machine {', '.join(sorted(unknown))}")
    try:
        holds = run(arguments.machines or DEFAULT_MACHINES, only_fetch=arguments.fetch)
    except CannotRunError as error:
        print(error, file=sys.stderr)
        return 2
    except ConsoleError as error:
        print(error, file=sys.stderr)
        return 1
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
