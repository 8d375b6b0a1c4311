"""examples/linux.py enters kernels as their boot protocols say: a kernel of a few instructions, and Debian's."""

from __future__ import annotations

import lzma
import struct
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.clients import guests, linux_entry

if TYPE_CHECKING:
    from pathlib import Path

KERNEL_ADDRESS, ELF_ENTRY = 0x10_0000, 0x100_0000
PROTECTED_MODE, LONG_MODE = "1", "0"
# Says in which mode it runs, then four bytes from where it was told to look, then asks for a reset:
#   xor %eax, %eax; inc %eax (in long mode a REX prefix); nop; add $'0', %al; mov $0x3f8, %dx; out %al, %dx
#   mov $4, %ecx; rep outsb; mov $0xfe, %al; out %al, $0x64; hlt
CODE = bytes.fromhex("31c0 40 90 0430 66baf803 ee b904000000 f36e b0fe e664 f4")
FROM_HEADER = bytes.fromhex("8db602020000")  # lea 0x202(%rsi), %esi
FROM_START_INFO = bytes.fromhex("89de")  # mov %ebx, %esi


def elf(code: bytes) -> bytes:
    """An ELF file with a segment and the note that names its 32-bit entry."""
    note = struct.pack("<III4sI", 4, 4, 18, b"Xen", ELF_ENTRY)
    other = struct.pack("<III4s8s", 4, 5, 18, b"GNU", b"no")
    notes = other + note
    at = 64 + 2 * 56
    head = b"\x7fELF\2\1\1".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH", 2, 62, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0
    )
    loaded = struct.pack("<IIQQQQQQ", 1, 5, at + len(notes), 0, ELF_ENTRY, len(code), len(code), 1)
    noted = struct.pack("<IIQQQQQQ", 4, 4, at, 0, 0, len(notes), len(notes), 1)
    return head + loaded + noted + notes + code


def bzimage(code: bytes) -> bytes:
    """A boot sector, one sector of real mode code, and what is entered at its start or 512 bytes behind."""
    setup = bytearray(1024)
    setup[0x1F1], setup[0x201] = 1, 0x66
    setup[0x202:0x206] = b"HdrS"
    entries = code.ljust(512, b"\x90") * 2
    packed = lzma.compress(elf(FROM_START_INFO + CODE))
    struct.pack_into("<II", setup, 0x248, len(entries), len(packed))
    return bytes(setup) + entries + packed


@pytest.mark.spec("env.linux_boot", "env.pvh")
@pytest.mark.parametrize("options", [(), ("--no-tdp",)], ids=["tdp", "shadow"])
@pytest.mark.parametrize(
    ("protocol", "says"),
    [
        ("64", f"{LONG_MODE}HdrS".encode()),
        ("32", f"{PROTECTED_MODE}HdrS".encode()),
        ("pvh", PROTECTED_MODE.encode() + struct.pack("<I", 0x336E_C578)),
    ],
)
def test_a_kernel_is_entered(tmp_path: Path, protocol: str, says: bytes, options: tuple[str, ...]) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(bzimage(FROM_HEADER + CODE))
    line = [
        sys.executable,
        linux_entry.EXAMPLE,
        str(kernel),
        "--memory",
        "32",
        "--protocol",
        protocol,
        *options,
    ]
    done = subprocess.run(line, capture_output=True, stdin=subprocess.DEVNULL, check=False, timeout=60)
    assert (done.stdout, done.stderr) == (says, b"the guest asked for a reset\n")


@pytest.mark.spec("env.pvh")
@pytest.mark.skipif(not guests.are_fetched(), reason=f"no kernel: run {guests.FETCH} once")
def test_debians_kernel_is_entered() -> None:
    """By the protocol that leaves the unpacking to us: the others are linux_entry's."""
    linux_entry.boot("pvh")
