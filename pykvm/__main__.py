"""The command line: every verb is a function here that calls one function elsewhere."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from errno import EPIPE
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

import pykvm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pykvm.client import Kvm, Vm
    from pykvm.run import Result

CONTEXT = {"help_option_names": ["-h", "--help"]}


@click.group(context_settings=CONTEXT)
@click.version_option(pykvm.__version__, prog_name="pykvm")
def main() -> None:
    """KVM without hardware: Linux's x86 KVM ioctl API in user space."""


def _known_profile(_: click.Context, option: click.Parameter, name: str | None) -> str | None:
    from pykvm.kvm import profile

    try:
        if name is not None:
            (profile.kernel if option.name == "kernel" else profile.processor)(name)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    return name


def personality(command: Callable[..., None]) -> Callable[..., None]:
    """Add --kernel and --cpu to a verb."""
    for name, what in (("--cpu", "processor"), ("--kernel", "kernel")):
        text = f"claim to be this {what}; see `pykvm profiles`"
        command = click.option(
            name, metavar="NAME", callback=_known_profile, help=text,
            envvar=f"PYKVM_{name[2:].upper()}", show_envvar=True,
        )(command)  # fmt: skip
    return command


def paging(command: Callable[..., None]) -> Callable[..., None]:
    """Add --no-tdp to a verb."""
    text = "shadow paging instead of two-dimensional paging"
    return click.option("--no-tdp", is_flag=True, envvar="PYKVM_NO_TDP", show_envvar=True, help=text)(command)


def _seconds(_: click.Context, __: click.Parameter, text: str | None) -> tuple[float, ...]:
    from pykvm.mmu.recorder import parse_times

    try:
        return parse_times(text) if text else ()
    except ValueError:
        raise click.BadParameter("one number of seconds, or two that rise: 5 or 5,20") from None


def mmu_page(command: Callable[..., None]) -> Callable[..., None]:
    """Add --mmu and --mmu-at to a verb."""
    times = (
        "when, in seconds from the first vCPU on; two moments show what changed between them; a program that"
        " ends before them leaves no page"
    )
    command = click.option("--mmu-at", metavar="SECONDS[,SECONDS]", callback=_seconds, help=times)(command)
    text = "write the guest's and the MMU's page tables as an HTML page"
    return click.option("--mmu", "mmu_file", metavar="FILE", type=click.Path(dir_okay=False), help=text)(
        command
    )


# ---- run ---------------------------------------------------------------------------------------------


@main.command()
@click.argument("image", required=False, type=click.Path(path_type=Path))
@click.option("--rom", is_flag=True, help="the flat image is a ROM that ends at the reset vector")
@click.option("--memory", "mib", default=64, show_default=True, type=click.IntRange(2, 3072), help="in MiB")
@click.option("--timeout", type=click.FloatRange(min=0), help="stop after so many seconds")
@click.option("--device", help="use this real device, /dev/kvm, instead of the fake one")
@paging
@mmu_page
@personality
@click.option("--json", "as_json", is_flag=True, help="print one JSON object and nothing else")
def run(
    image: Path | None,
    rom: bool,
    mib: int,
    timeout: float | None,
    device: str | None,
    no_tdp: bool,
    mmu_file: str | None,
    mmu_at: tuple[float, ...],
    kernel: str | None,
    cpu: str | None,
    as_json: bool,
) -> None:
    """Boot IMAGE (ELF, boot sector or --rom) on one vCPU; without IMAGE the guest of the package.

    \b
    pykvm run
    pykvm run kernel.elf --memory 256
    pykvm run --cpu epyc
    pykvm run kernel.elf --no-tdp --mmu tables.html --mmu-at 0.5
    """
    from pykvm import run as machine

    if device and mmu_file:
        raise click.UsageError("--mmu needs the fake device: the kernel does not show its tables")
    _check_page(mmu_file, mmu_at)

    write = (lambda _: None) if as_json else _write_console
    try:
        loaded = machine.load_image(image, rom=rom) if image else machine.default_image()
        with _opened(device, tdp=not no_tdp, kernel=kernel, cpu=cpu) as kvm:
            vm = machine.Machine(kvm, loaded, mib << 20, write)
            with _recorded(vm.vm, mmu_file, mmu_at, loaded.name):
                result = vm.run(timeout)
    except machine.ImageError as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        click.echo(json.dumps({**dataclasses.asdict(result), "mips": result.mips}))
    else:
        _print_result(result)
    sys.exit(result.status)


@contextlib.contextmanager
def _opened(device: str | None, *, tdp: bool = True, kernel: str | None, cpu: str | None) -> Iterator[Kvm]:
    """Open the device for a block; what the kernel or pykvm refuses in it is one line for the user."""
    if device and (kernel or cpu or not tdp):
        raise click.UsageError("--kernel, --cpu and --no-tdp need the fake device")
    try:
        with pykvm.Kvm(device, tdp=tdp, kernel=kernel, cpu=cpu) as kvm:
            yield kvm
    except OSError as error:
        if error.errno == EPIPE:  # of `pykvm caps | head`: click ends quietly
            raise
        raise click.ClickException(f"{device or 'pykvm'}: {error.strerror}") from None


def _check_page(mmu_file: str | None, mmu_at: tuple[float, ...]) -> None:
    if mmu_file and not os.access(Path(mmu_file).absolute().parent, os.W_OK | os.X_OK):
        raise click.BadParameter(f"nothing can be written to {Path(mmu_file).parent}", param_hint="--mmu")
    if mmu_at and not mmu_file:
        raise click.UsageError("--mmu-at needs --mmu FILE: where to write the page")


@contextlib.contextmanager
def _recorded(vm: Vm, path: str | None, times: tuple[float, ...], title: str) -> Iterator[None]:
    """Write the page of a VM's MMU, if that is wanted, as it is when the block ends."""
    from pykvm.mmu.recorder import Recorder

    if path is None:
        yield
        return
    recorder = Recorder(vm.mmu.snapshot, path, times, title)
    recorder.start(to_the_end=True)
    yield
    recorder.finish()


def _write_console(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _print_result(result: Result) -> None:
    if result.console and not result.console.endswith("\n"):
        click.echo()
    console = Console()
    console.print(f"{result.end} after {result.seconds:.3f} s")
    table = Table()
    table.add_column("exit")
    table.add_column("count", justify="right")
    for name, count in sorted(result.exits.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{count:,}")
    console.print(table)
    if result.instructions is not None and result.mips is not None:
        console.print(f"{result.instructions:,} instructions, {result.mips:.1f} MIPS")


# ---- exec, doctor --------------------------------------------------------------------------------------


@main.command("exec", context_settings={**CONTEXT, "allow_interspersed_args": False})
@click.option(
    "--extension", "extensions", multiple=True, help="offer an extension of pykvm's, such as x86-osi"
)
@paging
@mmu_page
@personality
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def exec_(
    extensions: tuple[str, ...],
    no_tdp: bool,
    mmu_file: str | None,
    mmu_at: tuple[float, ...],
    kernel: str | None,
    cpu: str | None,
    command: tuple[str, ...],
) -> None:
    """Run a program with /dev/kvm replaced by pykvm, in its own process.

    \b
    pykvm exec -- ./vmm --memory 128
    pykvm exec --kernel 5.10 --cpu skylake -- ./vmm
    pykvm exec --mmu tables.html --mmu-at 5,20 -- ./vmm
    """
    from pykvm.mmu import recorder
    from pykvm.preload import launcher

    _check_page(mmu_file, mmu_at)
    if mmu_file:
        if not mmu_at:
            raise click.UsageError("--mmu needs --mmu-at: nobody knows when a program ends")
        os.environ[recorder.FILE] = str(Path(mmu_file).absolute())
        os.environ[recorder.TIMES] = ",".join(map(str, mmu_at))
    wanted = frozenset(extensions) | (frozenset({"no-tdp"}) if no_tdp else frozenset())
    sys.exit(launcher.run(list(command), extensions=wanted, kernel=kernel, cpu=cpu))


@main.command()
@click.argument("program")
def doctor(program: str) -> None:
    """Say whether `pykvm exec` can run PROGRAM, and if not, why.

    \b
    pykvm doctor /usr/bin/qemu-system-x86_64
    """
    from pykvm.preload import launcher

    problems = launcher.problems(program)
    for problem in problems:
        click.echo(f"{program}: {problem}")
    if not problems:
        click.echo(f"{program}: can be run by pykvm exec")
    sys.exit(1 if problems else 0)


# ---- tables ----------------------------------------------------------------------------------------------


@main.command()
@click.option("--markdown", is_flag=True, help="as the table in the documentation")
def ioctls(markdown: bool) -> None:
    """List every ioctl of the x86 KVM API: offered, or absent and why."""
    from pykvm import doc

    rows = doc.ioctl_rows()
    short = ((name, number, fd, status) for name, number, fd, *_, status, _ in rows)
    click.echo(doc.markdown(rows, doc.HEAD) if markdown else doc.text(short), nl=False)


@main.command()
@click.option("--device", help="ask this real device, /dev/kvm, instead of the fake one")
@personality
def caps(device: str | None, kernel: str | None, cpu: str | None) -> None:
    """List the capabilities that are there, with their values."""
    from pykvm.abi import capabilities

    with _opened(device, kernel=kernel, cpu=cpu) as kvm:
        for name, number in sorted(capabilities().items(), key=lambda item: item[1]):
            value = kvm.check_extension(number)
            if value:
                click.echo(f"{number:4}  {name:44} {value:#x}")


@main.command()
@click.option("--markdown", is_flag=True, help="as the tables in docs/profiles.md")
def profiles(markdown: bool) -> None:
    """List the kernels and processors that the fake device can claim to be.

    \b
    pykvm profiles
    pykvm run --kernel 5.10 --cpu milan
    """
    from pykvm import doc

    if markdown:
        click.echo(doc.profiles(), nl=False)
        return
    for option, rows in (("--kernel", doc.kernel_rows()), ("--cpu", doc.cpu_rows())):
        click.echo(doc.text((option, row[0], row[-1]) for row in rows), nl=False)


@main.command()
@click.option("--markdown", is_flag=True, help="as the table in the documentation")
def insns(markdown: bool) -> None:
    """List the instructions that the processor executes, from its decode table."""
    from pykvm import doc

    rows = doc.insn_rows()
    click.echo(doc.markdown(rows, doc.INSN_HEAD) if markdown else doc.text(rows), nl=False)


if __name__ == "__main__":
    main()
