"""`python -m tests.conformance [GROUP...]`: abi_probe under `pykvm exec`, compared with Linux's answers.

Needs ../shared/conformance (or --probe DIR): abi_probe.c, the golden answers and compare.py.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = ROOT.parent / "shared" / "conformance"
GOLDEN = "golden-linux-6.18.jsonl"


def build(directory: Path, out: Path) -> Path:
    """Compile the probe."""
    probe = out / "abi_probe"
    source = directory / "abi_probe.c"
    subprocess.run(["cc", "-std=c11", "-O1", "-o", str(probe), str(source), "-pthread"], check=True)
    return probe


def compare(
    directory: Path, actual: Path, *, group: str | None = None, quiet: bool = False
) -> tuple[int, str]:
    """Return compare.py's exit status and output."""
    command = [sys.executable, str(directory / "compare.py"), str(directory / GOLDEN), str(actual)]
    command += ["--ignore", str(directory / "host_specific.json")]
    command += ["--group", group] if group else []
    command += ["--quiet"] if quiet else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@click.command()
@click.argument("groups", nargs=-1)
@click.option("--probe", type=click.Path(path_type=Path), default=DEFAULT, help="where abi_probe.c is")
@click.option("--keep", type=click.Path(path_type=Path), help="write the answers to this file")
@click.option("--real", is_flag=True, help="ask the real /dev/kvm instead")
@click.option("--quiet", is_flag=True, help="the table only")
def main(groups: tuple[str, ...], probe: Path, keep: Path | None, real: bool, quiet: bool) -> None:
    """Run the probe's cases of these groups (all by default) and compare."""
    if not (probe / "abi_probe.c").is_file():
        raise click.UsageError(f"no abi_probe.c in {probe}: say with --probe where it is")
    with tempfile.TemporaryDirectory() as scratch:
        binary = build(probe, Path(scratch))
        actual = keep or Path(scratch) / "actual.jsonl"
        command = [str(binary)] if real else [sys.executable, "-m", "pykvm", "exec", "--", str(binary)]
        with actual.open("wb") as out:
            for group in groups or (None,):
                only = ["--group", group] if group else []
                subprocess.run([*command, *only], stdout=out, check=False)
        status = 0
        for group in groups or (None,):
            failed, text = compare(probe, actual, group=group, quiet=quiet)
            click.echo(text, nl=False)
            status |= failed
    sys.exit(status)


if __name__ == "__main__":
    main()
