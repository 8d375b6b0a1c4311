"""Why a program cannot be run with the preload library: `pykvm doctor PROGRAM`, and exec's check."""

from __future__ import annotations

import os
import re
import shutil
import stat
import struct
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

LIBRARY = Path(__file__).with_name("libpykvm-preload.so")
EMBED = Path(__file__).with_name("libpykvm-embed.so")

_EM_X86_64 = 62
_ELFCLASS64 = 2
_EHDR_SIZE = 64
_PT_DYNAMIC, _PT_INTERP = 2, 3
_DT_NEEDED, _DT_STRTAB, _DT_SYMTAB, _DT_STRSZ = 1, 5, 6, 10
_MACHINES = {3: "i386", 40: "ARM", 183: "AArch64", 243: "RISC-V", 21: "PowerPC 64", 22: "S/390"}
# Scripts that name a script that names a script: the kernel follows five.
_MAX_SCRIPTS = 5


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What was found about a program.

    `path`: the file that was looked at; `program`: the one the kernel would load for it, another one
    when `path` is a script.  `problems`: reasons why it cannot be run; `notes`: what else to know.
    """

    path: str
    program: str
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Say if the program can be run."""
        return not self.problems


class BadElfError(ValueError):
    """A file that is no ELF file, or a broken one."""


@dataclass(frozen=True, slots=True)
class Elf:
    """What matters of an ELF file: its loader (None: static), libraries and sections."""

    machine: int
    bits: int
    loader: str | None
    needed: tuple[str, ...]
    sections: frozenset[str]
    exports: frozenset[str]

    @classmethod
    def parse(cls, data: bytes) -> Elf:
        """Read a 64-bit little-endian ELF file.  Raises ValueError when it is none or is cut short."""
        try:
            return cls._parse(data)
        except (struct.error, IndexError) as error:
            raise BadElfError("the ELF file is damaged") from error

    @classmethod
    def _parse(cls, data: bytes) -> Elf:
        if data[:4] != b"\x7fELF":
            raise BadElfError("it is not an ELF file")
        if len(data) < _EHDR_SIZE:
            raise BadElfError("the ELF file is damaged")
        (machine,) = struct.unpack_from("<H", data, 18)
        if data[4] != _ELFCLASS64:
            return cls(machine, 32, None, (), frozenset(), frozenset())
        phoff, shoff = struct.unpack_from("<QQ", data, 32)
        phentsize, phnum, shentsize, shnum, shstrndx = struct.unpack_from("<5H", data, 54)
        segments = [struct.unpack_from("<IIQQQQ", data, phoff + i * phentsize) for i in range(phnum)]
        loader = next((_text(data, s[2]) for s in segments if s[0] == _PT_INTERP), None)
        dynamic = next((s for s in segments if s[0] == _PT_DYNAMIC), None)
        headers = [struct.unpack_from("<IIQQQQIIQQ", data, shoff + i * shentsize) for i in range(shnum)]
        names = headers[shstrndx][4] if shstrndx < len(headers) else 0
        sections = {_text(data, names + header[0]): header for header in headers}
        needed = _needed(data, segments, dynamic) if dynamic else ()
        exports = _exports(data, sections, headers)
        return cls(machine, 64, loader, needed, frozenset(sections), exports)


def _text(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode(errors="replace") if at < len(data) else ""


def _needed(data: bytes, segments: list[tuple[int, ...]], dynamic: tuple[int, ...]) -> tuple[str, ...]:
    offset, size = dynamic[2], dynamic[5]
    entries = [struct.unpack_from("<qQ", data, at) for at in range(offset, offset + size, 16)]
    table = next((value for tag, value in entries if tag == _DT_STRTAB), 0)
    # The string table is named by its address; a segment says where that is in the file.
    for kind, _, at, address, _, length in segments:
        if kind == 1 and address <= table < address + length:
            strings = at + table - address
            return tuple(_text(data, strings + value) for tag, value in entries if tag == _DT_NEEDED)
    return ()


def _exports(
    data: bytes, sections: dict[str, tuple[int, ...]], headers: list[tuple[int, ...]]
) -> frozenset[str]:
    if ".dynsym" not in sections:
        return frozenset()
    offset, size, link = (sections[".dynsym"][i] for i in (4, 5, 6))
    strings = headers[link][4]
    symbols = (struct.unpack_from("<IBBH", data, at) for at in range(offset, offset + size, 24))
    return frozenset(_text(data, strings + name) for name, _, _, section in symbols if section)


# ---- looking at a program --------------------------------------------------------------------------


def find(program: str) -> str | None:
    """Return the file that a shell would run for a name; None when there is none."""
    return shutil.which(program)


def examine(program: str) -> Diagnosis:
    """Say whether the preload library works with a program, a name or a path."""
    path = find(program)
    if path is None:
        reason = "there is no such program"
        if Path(program).is_file():
            here = os.access(program, os.X_OK)
            reason = f"it is not on PATH; say ./{program}" if here else "it is not executable"
        return Diagnosis(program, program, (reason,))
    target, problems = _follow_scripts(path)
    problems += _mode_problems(target)
    notes: list[str] = []
    try:
        elf = Elf.parse(Path(target).read_bytes())
    except PermissionError:
        problems.append("it cannot be read, so that nobody knows if it is linked dynamically")
    except (OSError, ValueError) as error:
        problems.append(str(error))
    else:
        problems += _elf_problems(elf)
        more, notes = _python_findings(elf, target)
        problems += more
    return Diagnosis(path, target, tuple(problems + installation_problems()), tuple(notes))


def _follow_scripts(path: str) -> tuple[str, list[str]]:
    for _ in range(_MAX_SCRIPTS):
        try:
            with Path(path).open("rb") as file:
                line = file.readline(256)
        except OSError:
            return path, []
        match = re.match(rb"#![ \t]*([^ \t\n]+)[ \t]*([^\n]*)", line)
        if match is None:
            return path, []
        interpreter, argument = (os.fsdecode(part) for part in match.groups())
        # "#!/usr/bin/env python3": what env will run is what matters.
        if Path(interpreter).name == "env" and argument:
            interpreter = find(argument.split()[-1]) or interpreter
        if not Path(interpreter).exists():
            return path, [f"its interpreter {interpreter} does not exist"]
        path = interpreter
    return path, ["too many interpreters of interpreters"]


def _mode_problems(path: str) -> list[str]:
    try:
        info = Path(path).stat()
        capabilities = "security.capability" in os.listxattr(path)
    except OSError:
        return []
    if (info.st_mode & stat.S_ISUID and info.st_uid != os.getuid()) or (
        info.st_mode & stat.S_ISGID and info.st_gid != os.getgid()
    ):
        return ["it is setuid or setgid, and the loader ignores LD_PRELOAD then"]
    if capabilities and os.getuid():
        return ["it has file capabilities, and the loader ignores LD_PRELOAD then"]
    return []


def _elf_problems(elf: Elf) -> list[str]:
    if elf.machine != _EM_X86_64:
        return [f"it is a program for {_MACHINES.get(elf.machine, f'machine {elf.machine}')}, not x86-64"]
    if elf.bits != 64:
        return ["it is a 32-bit program"]
    if elf.loader is None:
        return ["it is statically linked: there is no libc to stand before"]
    if "musl" in elf.loader or any("musl" in library for library in elf.needed):
        return ["it is linked with another C library (musl)"]
    if ".go.buildinfo" in elf.sections:
        return ["it is a Go program: those make their system calls without libc"]
    return []


def _python_findings(elf: Elf, path: str) -> tuple[list[str], list[str]]:
    """Say what follows when the program is a Python interpreter: there can be only one in a process."""
    ours = f"{sys.version_info.major}.{sys.version_info.minor}"
    versions = {match[1] for name in elf.needed if (match := re.match(r"libpython(\d+\.\d+)", name))}
    if "Py_IsInitialized" in elf.exports:
        match = re.search(r"python(\d+\.\d+)", os.path.realpath(path))
        versions.add(match[1] if match else "of unknown version")
    if not versions:
        return [], []
    if versions != {ours}:
        theirs = ", ".join(sorted(versions))
        return [
            f"it has a Python {theirs} in it, and pykvm runs on {ours}; use pykvm.installed() instead"
        ], []
    return [], ["it has a Python in it: pykvm will share that; pykvm.installed() is simpler"]


def installation_problems() -> list[str]:
    """Say what is missing of pykvm itself."""
    if not sysconfig.get_config_var("Py_ENABLE_SHARED"):
        return [f"this Python ({sys.base_prefix}) has no shared libpython; pykvm exec needs one"]
    missing = [file.name for file in (LIBRARY, EMBED) if not file.exists()]
    if missing:
        return [f"{' and '.join(missing)} not built: python -m pykvm.abi._build"]
    if re.search(r"[ :]", str(LIBRARY)):
        return [f"LD_PRELOAD cannot name a path with a space or a colon: {LIBRARY}"]
    return []
