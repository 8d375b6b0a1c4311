"""Guests to boot: Debian's kernel, a busybox and firmware, fetched once, and initramfs archives."""

from __future__ import annotations

import re
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

GUESTS = Path(__file__).parents[2] / "build" / "guests"
FETCH = "python -m tests.clients.linux_boot --fetch"
KERNEL = GUESTS / "vmlinuz"
BUSYBOX = GUESTS / "busybox"
MODULES = GUESTS / "modules"
# UEFI firmware: its code, and the flash with its variables.
OVMF_CODE, OVMF_VARS = GUESTS / "OVMF_CODE.fd", GUESTS / "OVMF_VARS.fd"
# Of the kernel's modules: algorithms that are tested when they are loaded, and tests.
_WANTED_MODULES = ("kernel/arch/x86/crypto", "kernel/crypto", "kernel/lib")

INIT = b"""#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
exec setsid cttyhack sh
"""


class CannotRunError(Exception):
    """Something is not installed or cannot be fetched."""


def are_fetched() -> bool:
    """Say if everything is there."""
    return all(path.exists() for path in (KERNEL, BUSYBOX, OVMF_CODE, OVMF_VARS, MODULES))


def fetch() -> None:
    """Get kernel, busybox and firmware from Debian's archive, unless they are there."""
    if are_fetched():
        return
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise CannotRunError("fetching the kernel needs apt-get and dpkg-deb")
    GUESTS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=GUESTS) as scratch:
        directory = Path(scratch)
        done = subprocess.run(
            ["apt-get", "download", _kernel_package(), "busybox-static", "ovmf"],
            cwd=directory, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise CannotRunError(f"apt-get download: {done.stderr.strip()}")
        root = directory / "root"
        for package in directory.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, root], check=True)
        shutil.copy(next((root / "boot").glob("vmlinuz-*")), KERNEL)
        shutil.copy(root / "bin/busybox", BUSYBOX)
        for path in (OVMF_CODE, OVMF_VARS):
            shutil.copy(root / "usr/share/OVMF" / path.name, path)
        _keep_modules(next((root / "lib/modules").iterdir()))


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


def _keep_modules(directory: Path) -> None:
    shutil.rmtree(MODULES, ignore_errors=True)
    kept = MODULES / directory.name
    for part in _WANTED_MODULES:
        shutil.copytree(directory / part, kept / part)
    for path in directory.glob("modules.*"):
        shutil.copy(path, kept)


class Initramfs:
    """An archive in the format "newc", which the kernel unpacks into its first file system."""

    def __init__(self) -> None:
        """Start with what a shell on the console needs."""
        self._out = bytearray()
        self._entries = 0
        self._paths: set[str] = set()
        for name in ("dev", "proc", "sys", "tmp"):
            self.directory(name)
        self._entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
        self.file("bin/busybox", BUSYBOX.read_bytes(), 0o755)
        self._entry("bin/sh", stat.S_IFLNK | 0o777, b"busybox")
        self.file("init", INIT, 0o755)

    def directory(self, name: str) -> None:
        """Add a directory and those above it, unless it is there."""
        if name in {"", "."} or name in self._paths:
            return
        self.directory(str(Path(name).parent))
        self._entry(name, stat.S_IFDIR | 0o755)

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """Add a file, unless it is there."""
        if name in self._paths:
            return
        self.directory(str(Path(name).parent))
        self._entry(name, stat.S_IFREG | mode, data)

    def copy(self, path: Path, to: str = "") -> None:
        """Add a file of the host's, at the same place if no other is given."""
        self.file(to or str(path).lstrip("/"), path.read_bytes(), stat.S_IMODE(path.stat().st_mode))

    def program(self, path: Path) -> None:
        """Add a program or a library with the libraries it needs."""
        self.copy(path)
        done = subprocess.run(["ldd", path], capture_output=True, text=True, check=False)
        for library in re.findall(r"(/\S+) \(0x", done.stdout):
            self.copy(Path(library))

    def write(self, name: str) -> Path:
        """Write the archive into the directory of guests; return where it is."""
        self._entry("TRAILER!!!", 0)
        path = GUESTS / name
        path.write_bytes(self._out)
        return path

    def _entry(self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._entries += 1
        self._paths.add(name)
        path = name.encode() + b"\0"
        fields = (self._entries, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0)
        self._out += b"070701" + b"".join(b"%08X" % field for field in fields) + path
        self._out += bytes(-len(self._out) % 4) + data
        self._out += bytes(-len(self._out) % 4)
