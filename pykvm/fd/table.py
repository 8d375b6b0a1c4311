"""The files behind pykvm's descriptors.

Every descriptor is a real one, of a file in memory of its own: mmap, dup, select, CLOEXEC and
passing it to another thread are the kernel's work.  Which file a descriptor means is told by its
inode, so that dup() and SCM_RIGHTS need no help.  That the last descriptor *and* the last mapping
are gone is told by an inotify watch; the queue is looked at (`reap`) when something is opened or not
found.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from errno import EBADF, ENOTTY
from typing import TYPE_CHECKING, Protocol

from pykvm.abi import CData, ffi, lib
from pykvm.abi.errors import KvmError

if TYPE_CHECKING:
    from collections.abc import Callable

_MAX_EVENTS = 256


class Releasable(Protocol):
    """A kernel-side object behind a descriptor: a System, Vm, Vcpu or device.

    It may have `absent_requests`, numbers of requests that it refuses as unknown ones.
    """

    def release(self) -> None:
        """Let go of it: its last descriptor and mapping are gone."""


class File:
    """One open file: `kind` of descriptor, the kernel-side object, and its memory if it has some.

    `memory`: the memory that the client maps, as a cdata ``void *``; it stays mapped here as long as
    somebody holds this pointer.  None when the file has none.
    `mm`: `current_mm()` of the process that made it; another value means that a fork lies between.
    """

    __slots__ = ("absent", "inflight", "inode", "kind", "memory", "mm", "obj", "released", "watch")

    def __init__(self, kind: str, obj: Releasable, made: CData, memory: CData | None, mm: int) -> None:
        """Describe a file; `anon_inode_getfd` makes them, from a struct memory_file."""
        self.kind = kind
        self.obj = obj
        self.absent: frozenset[int] = getattr(obj, "absent_requests", frozenset())
        self.inode: int = made.inode
        self.watch: int = made.watch
        self.memory = memory
        self.mm = mm
        # One element per ioctl under way: append and pop are atomic, a counter would need a lock.
        self.inflight: deque[None] = deque()
        self.released = False


class _Table:
    """The files of this process."""

    def __init__(self) -> None:
        # Re-entrant: a client's signal handler may open and close in the middle of our own doing so.
        self.lock = threading.RLock()
        self.files: dict[int, File] = {}
        self.watched: dict[int, File] = {}
        self.closing: list[File] = []
        self.queue = -1
        # Counts forks: the identity of this address space.
        self.mm = 0

    def after_fork_in_child(self) -> None:
        """Start anew: the queue is shared with the parent, and so are its files."""
        self.lock = threading.RLock()
        if self.queue >= 0:
            os.close(self.queue)
        self.queue = -1
        self.watched = {}
        self.closing = []
        self.mm += 1


_table = _Table()
os.register_at_fork(after_in_child=_table.after_fork_in_child)
_file_inode = lib.file_inode
_files_get = _table.files.get


def current_mm() -> int:
    """Return what `File.mm` is of files made in this process."""
    return _table.mm


def fget(fd: int) -> File:
    """Return the file behind a descriptor.

    Raises EBADF when there is no such descriptor, ENOTTY when it is not one of pykvm's.
    """
    try:
        inode = _file_inode(fd)
    except OverflowError:
        inode = -1
    file = _files_get(inode)
    if file is not None:
        return file
    reap()
    if inode < 0:
        raise KvmError(EBADF, f"{fd} is no open file descriptor")
    raise KvmError(ENOTTY, f"descriptor {fd} is not pykvm's")


def is_ours(fd: int) -> bool:
    """Say if a descriptor is one of pykvm's."""
    return -1 < fd < 1 << 31 and _file_inode(fd) in _table.files


def anon_inode_getfd(
    name: str,
    kind: str,
    obj: Releasable,
    size: int = 0,
    *,
    install: Callable[[File], None] | None = None,
    cloexec: bool = True,
    readonly: bool = False,
) -> int:
    """Open a new file and return its descriptor; the caller owns it.

    `name` is shown in /proc/self/fd; `size`: bytes of memory that the client can map, or read, and with
    `readonly` nothing else.  `install` is called with the file before any client can reach it.
    Raises EMFILE, ENFILE, ENOMEM.
    """
    reap()
    made = ffi.new("struct memory_file *")
    with _table.lock:
        if _table.queue < 0:
            _table.queue = lib.file_queue()
        if _table.queue < 0 or lib.file_create(made, name.encode(), size, cloexec, readonly, _table.queue):
            raise KvmError(ffi.errno, f"no file for {name}: {os.strerror(ffi.errno)}")
        memory = ffi.gc(made.memory, lambda address: lib.file_unmap(address, size)) if size else None
        file = File(kind, obj, made, memory, _table.mm)
        if install is not None:
            install(file)
        _table.watched[file.watch] = file
        _table.files[file.inode] = file
    return int(made.fd)


def reap() -> int:
    """Release the files whose last reference is gone; return how many."""
    with _table.lock:
        # Taken first and in one step: a signal handler's reap() must not release the same files.
        closing, _table.closing = _table.closing, []
        candidates = closing + _closed()
        gone = []
        still_open = _open_inodes() if candidates else frozenset()
        for file in candidates:
            # Opened again through /proc/self/fd: that was the end of one open file of several.
            if file.inode in still_open:
                _table.watched[file.watch] = file
                continue
            file.released = True
            # Closed by one thread in the middle of another's ioctl: the kernel's fget() keeps it.
            if file.inflight:
                file.released = False
                _table.closing.append(file)
                continue
            _table.files.pop(file.inode, None)
            gone.append(file)
    for file in gone:
        file.obj.release()
    return len(gone)


def _open_inodes() -> frozenset[int]:
    """Return the inodes of all descriptors of this process."""
    try:
        with os.scandir("/proc/thread-self/fd") as entries:
            return frozenset(_file_inode(int(entry.name)) for entry in entries)
    except OSError:
        return frozenset()


def _closed() -> list[File]:
    """Return the watched files that were closed since, and forget their watches."""
    if _table.queue < 0:
        return []
    names = ffi.new("int32_t[]", _MAX_EVENTS)
    closed: list[File] = []
    while True:
        n = lib.file_closed(_table.queue, names, _MAX_EVENTS)
        if n < 0:
            # The client closed the queue's descriptor; what was watched stays until the process ends.
            _table.queue = -1
            _table.watched = {}
        closed += [file for name in names[0 : max(n, 0)] if (file := _table.watched.pop(name, None))]
        if n <= _MAX_EVENTS - 64:
            return closed
