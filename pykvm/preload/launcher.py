"""`pykvm exec -- PROGRAM ARGUMENTS`: becomes the program, with the preload library in it."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pykvm.kvm import profile
from pykvm.kvm.system import EXTENSIONS as KNOWN_EXTENSIONS
from pykvm.preload.doctor import LIBRARY, examine

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

# Variables that the library looks at; it hands them on to children that lose them.
HOME = "PYKVM_EXEC_HOME"
PATH = "PYKVM_EXEC_PATH"
EXTENSIONS = "PYKVM_EXEC_EXTENSIONS"
KERNEL = "PYKVM_EXEC_KERNEL"
CPU = "PYKVM_EXEC_CPU"
# Exit status when the program was not started.
CANNOT_RUN = 2


class CannotRunError(Exception):
    """The program was not started; the message is one line for the person who asked."""


def problems(program: str) -> list[str]:
    """Say why a program cannot be run; empty when it can."""
    return list(examine(program).problems)


def search_path() -> list[str]:
    """Return where the interpreter in the program is to look for modules."""
    # The first entry is the current directory or that of a script: whatever lies there is not meant.
    entries = sys.path if sys.flags.safe_path else sys.path[1:]
    package = str(Path(__file__).parents[2])
    return list(dict.fromkeys(str(Path(entry).absolute()) for entry in [*entries, package] if entry))


def environment(
    extensions: Iterable[str], base: Mapping[str, str], *, kernel: str | None = None, cpu: str | None = None
) -> dict[str, str]:
    """Return `base` with what loads the library into a program."""
    claims = {KERNEL: kernel, CPU: cpu}
    base = {name: value for name, value in base.items() if name not in claims}
    loaded = base.get("LD_PRELOAD", "").replace(":", " ").split()
    others = [entry for entry in loaded if entry != str(LIBRARY)]
    return {
        **base,
        "LD_PRELOAD": ":".join([str(LIBRARY), *others]),
        HOME: sys.base_prefix,
        PATH: os.pathsep.join(search_path()),
        EXTENSIONS: ",".join(sorted(extensions)),
        **{name: value for name, value in claims.items() if value is not None},
    }


def undo_python() -> None:
    """Give back what this interpreter changed of what a program inherits."""
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    # PEP 538: in the C locale Python sets LC_CTYPE for its children.
    if b"LC_CTYPE=" not in b"\0" + Path("/proc/self/environ").read_bytes():
        os.environ.pop("LC_CTYPE", None)


def check(
    argv: Sequence[str], extensions: Iterable[str], *, kernel: str | None = None, cpu: str | None = None
) -> str:
    """Return the file to execute.  Raises CannotRunError when pykvm would not be in it."""
    if not argv:
        raise CannotRunError("no program given")
    diagnosis = examine(argv[0])
    if not diagnosis.ok:
        raise CannotRunError(f"cannot run {argv[0]}: {diagnosis.problems[0]}")
    for name in extensions:
        if name not in KNOWN_EXTENSIONS:
            raise CannotRunError(f"no extension {name}; there is {', '.join(sorted(KNOWN_EXTENSIONS))}")
    try:
        profile.kernel(kernel or profile.DEFAULT_KERNEL)
        profile.processor(cpu or profile.DEFAULT_PROCESSOR)
    except ValueError as error:
        raise CannotRunError(str(error)) from None
    return diagnosis.path


def run(
    argv: Sequence[str], extensions: Iterable[str] = (), *, kernel: str | None = None, cpu: str | None = None
) -> int:
    """Replace this process by the program argv[0]; returns, with status 2, only when that cannot be.

    `extensions`: names of pykvm's extensions that the fake device is to have; `kernel`, `cpu`: names of
    the profiles it claims to be.
    """
    try:
        path = check(argv, extensions, kernel=kernel, cpu=cpu)
        undo_python()
        env = environment(extensions, os.environ, kernel=kernel, cpu=cpu)
        os.execve(path, list(argv), env)  # noqa: S606  becoming it is the point
    except CannotRunError as error:
        print(f"pykvm: {error}", file=sys.stderr)
    except OSError as error:
        print(f"pykvm: cannot run {argv[0]}: {error.strerror}", file=sys.stderr)
    return CANNOT_RUN
