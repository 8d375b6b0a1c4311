"""Boot Debian's stock kernel with QEMU, on pykvm and on TCG: ``python -m tests.clients.linux_boot``.

The kernel is that of the package linux-image-amd64, user space is a busybox-static, firmware is QEMU's SeaBIOS
or the OVMF of the package ovmf; they are fetched once with ``apt-get download``, into build/guests.  A run goes from the firmware to the shell's prompt on the
serial console, runs a few commands, and powers off.

What must hold: the kernel prints no message on pykvm that it does not print on TCG, numbers and names of the
processor aside, and the commands print the same.  A guest that knows that it runs on KVM has more to say (the
machine `kvm`); one that is not told (`plain`) has not.  Exit status: 0 it holds, 1 it does not, 2 cannot run.
"""

from __future__ import annotations

import argparse
import re
import sys
from typing import TYPE_CHECKING, NamedTuple

from tests.clients.guests import KERNEL, OVMF_CODE, OVMF_VARS, CannotRunError, Initramfs, fetch
from tests.clients.qemu import Console, ConsoleError, command, is_there, kernel_messages, without_numbers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

PROMPT = "/ # "
# No timer check: on a host that has other things to do the kernel may find that ticks come too late, and panic.
COMMAND_LINE = "console=ttyS0 ignore_loglevel no_timer_check"
# Seconds, for a machine that does ten other things.
BOOT_TIMEOUT = 300
COMMAND_TIMEOUT = 120

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


class Machine(NamedTuple):
    """What is run: QEMU's options beside those that every run has, and extensions of pykvm's.

    `told`: the guest knows that it runs on KVM.  `own_cpu`: -cpu means another processor on KVM than on TCG.
    """

    options: tuple[str, ...]
    extensions: tuple[str, ...] = ()
    told: bool = False
    own_cpu: bool = False


def _flash(path: Path, how: str) -> tuple[str, str]:
    return "-drive", f"if=pflash,format=raw,{how}=on,file={path}"


MACHINES = {
    "kvm": Machine(("-M", "pc"), told=True),
    "plain": Machine(("-M", "pc", "-cpu", "qemu64,kvm=off")),
    "q35": Machine(("-M", "q35", "-cpu", "qemu64,kvm=off")),
    "max": Machine(("-M", "pc", "-cpu", "max,kvm=off"), own_cpu=True),
    "efi": Machine(
        ("-M", "pc", "-cpu", "qemu64,kvm=off", *_flash(OVMF_CODE, "readonly"), *_flash(OVMF_VARS, "snapshot"))
    ),
    "shadow": Machine(("-M", "pc", "-cpu", "qemu64,kvm=off"), extensions=("no-tdp",)),
}
DEFAULT_MACHINES = ("kvm", "plain")
# What a kernel says that finds KVM's own leaves in CPUID: it is told, and should be.
_PARAVIRTUAL = re.compile(r"kvm-clock|kvm-guest|on KVM$|Hypervisor detected: KVM")
# Depends on how fast the machine was at that moment: TCG's runs differ among themselves here.
_TIMING = re.compile(
    r"tsc: |APIC (calibration|delta)|Calibrating delay loop|clocksource: Switched|sched_clock: Marking"
    r"|timekeeping watchdog|read-back delay|Lost \d+ RTC interrupts|deferred pages initialised|took \d+ usecs"
    r"|8254 timer|IRQ0|found apic|\.\.\.\. (failed|works)"
)
# The processor and what it can do.
_PROCESSOR = re.compile(r"smpboot: CPU0|x86/fpu|Spectre|_OSC: OS supports|PCI: Using configuration type 1")
_TROUBLE = re.compile(r"BUG:|WARNING: CPU|Oops|Call Trace|Kernel panic|unchecked MSR|RIP:|stuck|stall|lockup")


class Boot(NamedTuple):
    """One run: the kernel's messages, what the shell printed, seconds to the prompt, CPU seconds in all."""

    messages: list[str]
    shell: list[str]
    seconds: float
    cpu_seconds: float


# ---- the guest -----------------------------------------------------------------------------------


def initramfs() -> Path:
    """Write an initramfs whose init is a shell on the console; return where it is."""
    archive = Initramfs()
    archive.file("ask", ASK)
    return archive.write("initramfs.cpio")


def start(engine: str, machine: Machine, initrd: Path, megabytes: int = 512) -> Console:
    """Start a QEMU with the kernel."""
    options = machine.options
    if engine == "tcg":
        options = tuple(option.removesuffix(",kvm=off") for option in options)
    guest = ("-kernel", str(KERNEL), "-initrd", str(initrd), "-append", COMMAND_LINE)
    return Console(
        command(engine, "-m", str(megabytes), *guest, *options, extensions=machine.extensions),
    )


def boot(engine: str, machine: str = "kvm") -> Boot:
    """Boot on "pykvm" or "tcg", ask the shell, power off.  Raises ConsoleError."""
    with start(engine, MACHINES[machine], initramfs()) as console:
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


def additional(ours: Boot, reference: Boot, machine: Machine) -> Iterator[str]:
    """Yield the messages that the reference does not have."""
    known = {without_numbers(message) for message in reference.messages}
    for message in ours.messages:
        if without_numbers(message) in known or _TIMING.search(message):
            continue
        if machine.told and _PARAVIRTUAL.search(message):
            continue
        if machine.own_cpu and _PROCESSOR.search(message):
            continue
        yield message


def compare(name: str) -> bool:
    """Boot on both and print what is different; say if nothing is."""
    machine = MACHINES[name]
    print(f"{name}: {' '.join(machine.options)}", *machine.extensions)
    reference, ours = boot("tcg", name), boot("pykvm", name)
    for engine, run in (("tcg", reference), ("pykvm", ours)):
        messages = f"{len(run.messages)} messages"
        print(
            f"  {engine:6} prompt after {run.seconds:5.1f} s, {run.cpu_seconds:5.1f} s of CPU time, {messages}"
        )
    print(f"  pykvm takes {ours.cpu_seconds / reference.cpu_seconds:.1f} times the CPU time")
    found = list(additional(ours, reference, machine))
    for message in found:
        print(f"  only on pykvm: {message}")
    same = ours.shell == reference.shell
    if not same:
        print("  the shell says", *ours.shell, "and on tcg", *reference.shell, sep="\n    ")
    return same and not found


def run(machines: Iterable[str], *, only_fetch: bool) -> bool:
    """Do what the command line says; False when something differs."""
    fetch()
    if only_fetch:
        initramfs()
        return True
    if not is_there():
        raise CannotRunError("qemu-system-x86_64 is not installed")
    held = [compare(machine) for machine in machines]
    return all(held)


def exit_status(campaign: Callable[[], bool]) -> int:
    """Run a campaign: 0 all is well, 1 something is not, 2 it cannot be run here."""
    try:
        return 0 if campaign() else 1
    except (CannotRunError, ConsoleError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, CannotRunError) else 1


def main() -> int:
    """Take the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.clients.linux_boot", description=__doc__)
    names = f"{', '.join(MACHINES)}; default: {' '.join(DEFAULT_MACHINES)}"
    parser.add_argument("machines", nargs="*", metavar="MACHINE", help=names)
    parser.add_argument("--fetch", action="store_true", help="only fetch what is booted")
    arguments = parser.parse_args()
    if unknown := set(arguments.machines) - set(MACHINES):
        parser.error(f"no machine {', '.join(sorted(unknown))}")
    return exit_status(lambda: run(arguments.machines or DEFAULT_MACHINES, only_fetch=arguments.fetch))


if __name__ == "__main__":
    sys.exit(main())
