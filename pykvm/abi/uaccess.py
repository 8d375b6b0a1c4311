"""User memory as an ioctl sees it: copies that answer EFAULT and never fault.

`UserMemory` is the whole calling process.  `BufferMemory` is the same process seen through one
Python buffer: an address inside the buffer belongs to it and ends with it, so that a bytearray that
is too short for the structure is EFAULT and not a read of whatever lies behind it.
"""

from __future__ import annotations

from errno import EFAULT

from pykvm.abi import CData, ffi, lib
from pykvm.abi.errors import KvmError

_new = ffi.new
_buffer = ffi.buffer
_user_read = lib.user_read
_user_write = lib.user_write
_CHARS = ffi.typeof("char[]")


class UserMemory:
    """The calling process's memory."""

    __slots__ = ()

    def read(self, addr: int, size: int) -> bytes:
        """Return `size` bytes at `addr`.  Raises EFAULT."""
        data = _new(_CHARS, size)
        self.read_into(data, addr, size)
        return bytes(_buffer(data, size))

    def read_into(self, to: CData, addr: int, size: int) -> None:
        """Copy `size` bytes at `addr` to the cdata pointer `to`.  Raises EFAULT."""
        if size and _user_read(to, addr & 0xFFFF_FFFF_FFFF_FFFF, size):
            raise KvmError(EFAULT, f"cannot read {size} bytes at {addr:#x}")

    def write(self, addr: int, data: bytes | bytearray | memoryview) -> None:
        """Copy `data` to `addr`.  Raises EFAULT; the start may have been written then."""
        if data:
            self.write_from(addr, ffi.from_buffer(_CHARS, data), len(data))

    def write_from(self, addr: int, data: CData, size: int) -> None:
        """Copy `size` bytes at the cdata pointer `data` to `addr`.  Raises EFAULT."""
        if size and _user_write(addr & 0xFFFF_FFFF_FFFF_FFFF, data, size):
            raise KvmError(EFAULT, f"cannot write {size} bytes at {addr:#x}")


class BufferMemory(UserMemory):
    """The process's memory with one buffer in it whose end is known."""

    __slots__ = ("_end", "_keep", "_start", "_writable")

    def __init__(self, buffer: bytearray | memoryview, *, writable: bool) -> None:
        """Take a contiguous buffer; `writable` says if an ioctl may write to it."""
        self._keep = ffi.from_buffer(_CHARS, buffer)
        self._start = address_of(self._keep)
        self._end = self._start + len(self._keep)
        self._writable = writable

    @property
    def address(self) -> int:
        """Return the address to pass as the ioctl's argument."""
        return self._start

    def _check(self, addr: int, size: int, *, write: bool) -> None:
        # `<=`: what an ioctl takes from right behind its argument is still that argument's tail.
        if self._start <= addr <= self._end and (addr + size > self._end or (write and not self._writable)):
            room = self._end - addr
            raise KvmError(
                EFAULT, f"{size} bytes wanted at offset {addr - self._start} of a buffer with {room} left"
            )

    def read_into(self, to: CData, addr: int, size: int) -> None:
        """As `UserMemory.read_into`, bounded by the buffer."""
        self._check(addr, size, write=False)
        super().read_into(to, addr, size)

    def write_from(self, addr: int, data: CData, size: int) -> None:
        """As `UserMemory.write_from`, bounded by the buffer."""
        self._check(addr, size, write=True)
        super().write_from(addr, data, size)


PROCESS = UserMemory()


def copy_from_user(addr: int, size: int) -> bytes:
    """Return `size` bytes of this process at `addr`.  Raises EFAULT."""
    return PROCESS.read(addr, size)


def copy_to_user(addr: int, data: bytes | bytearray | memoryview) -> None:
    """Copy `data` to `addr` in this process.  Raises EFAULT."""
    PROCESS.write(addr, data)


def address_of(pointer: CData) -> int:
    """Return the address in a cdata pointer or of a cdata array."""
    return int(ffi.cast("uintptr_t", pointer))
