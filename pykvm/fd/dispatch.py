"""The only way into an ioctl: descriptor, same process, request, argument, handler, errno."""

from __future__ import annotations

from errno import EBADF, EIO
from typing import Any

from pykvm import trace
from pykvm.abi.errors import KvmError, errno_name
from pykvm.abi.ioctl import REGISTRY, UNKNOWN_REQUEST, Ioctl
from pykvm.abi.uaccess import PROCESS, UserMemory
from pykvm.fd import table

# Tests set this: a handler that raises an errno its docstring does not list is a bug then.
strict_errors = False
_IMPLIED = frozenset({"EFAULT", "ENOMEM"})

_fget = table.fget
_lookup = REGISTRY.get


def ioctl(fd: int, request: int, arg: int = 0, memory: UserMemory = PROCESS) -> int:
    """Do on a KVM descriptor what the system call of that name does.

    `request` counts with its low 32 bits: clients pass it through ``int``.  `arg`: unsigned 64 bits,
    a number or an address in `memory`.
    Raises KvmError; anything else is a bug of pykvm's.
    """
    request &= 0xFFFF_FFFF
    arg &= 0xFFFF_FFFF_FFFF_FFFF
    if trace.kvm_ioctl.enabled:
        return _traced(fd, request, arg, memory)
    return _ioctl(fd, request, arg, memory)


def _ioctl(fd: int, request: int, arg: int, memory: UserMemory) -> int:
    file = _fget(fd)
    file.inflight.append(None)
    try:
        if file.released:
            raise KvmError(EBADF, f"descriptor {fd} was closed just now")
        kind = file.kind
        # kvm_main.c: vm, vcpu and device ioctls belong to the address space that made the VM.
        obj: Any = file.obj
        if kind != "system":
            if file.mm != table.current_mm():
                raise KvmError(EIO, "the VM belongs to another process: this one was forked from it")
            if obj.is_dead:
                raise KvmError(EIO, "the VM is dead: it could not go on")
        row = None if request in file.absent else _lookup((kind, request))
        if kind != "vcpu":
            return _call(row, kind, request, obj, arg, memory)
        with obj.mutex:
            return _call(row, kind, request, obj, arg, memory)
    finally:
        file.inflight.pop()


def _call(row: Ioctl | None, kind: str, request: int, obj: object, arg: int, memory: UserMemory) -> int:
    if row is None:
        raise KvmError(UNKNOWN_REQUEST[kind], f"no request {request:#x} on a {kind} descriptor")
    if not strict_errors:
        return row.entry(obj, arg, memory)
    try:
        return row.entry(obj, arg, memory)
    except KvmError as error:
        name = errno_name(error.errno)
        if name not in row.errors and name not in _IMPLIED:
            message = f"{row.name} raised {error}, which {row.module} does not list under Errors:"
            raise AssertionError(message) from error
        raise


def _traced(fd: int, request: int, arg: int, memory: UserMemory) -> int:
    try:
        kind = table.fget(fd).kind
    except KvmError:
        kind = "?"
    row = REGISTRY.get((kind, request))
    name = row.name if row else f"{request:#x}"
    try:
        result = _ioctl(fd, request, arg, memory)
    except KvmError as error:
        trace.kvm_ioctl(fd=fd, kind=kind, name=name, arg=arg, result=f"-{error}")
        raise
    trace.kvm_ioctl(fd=fd, kind=kind, name=name, arg=arg, result=result)
    return result
