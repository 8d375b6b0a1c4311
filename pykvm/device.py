"""How Python programs reach the fake device: `open`, `ioctl`, and `installed` for unchanged ones."""

from __future__ import annotations

import builtins
import contextlib
import fcntl
import io
import operator
import os
import stat
import threading
from errno import EINVAL, ENOENT
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypedDict

from pykvm import kvm as _kvm  # noqa: F401  fills the registry
from pykvm.abi import ffi
from pykvm.abi.errors import KvmError
from pykvm.abi.ioctl import ioc_size
from pykvm.abi.uaccess import BufferMemory, address_of
from pykvm.fd import dispatch
from pykvm.fd.table import fget, is_ours
from pykvm.kvm.system import System
from pykvm.kvm.vcpu import Vcpu
from pykvm.kvm.vm import Vm
from pykvm.mmu.view import MmuView

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

DEVICE = "/dev/kvm"
_DEVICE_NUMBER = os.makedev(10, 232)
# In no process's half of the address space: EFAULT, when the request looks there at all.
_BAD_ADDRESS = 1 << 63


class HasFileno(Protocol):
    """What has a descriptor: a file object, a socket."""

    def fileno(self) -> int:
        """Return the descriptor."""
        ...


FileDescriptor: TypeAlias = int | HasFileno
Path: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]


def is_device(path: object) -> bool:
    """Say if a path names the KVM device."""
    if not isinstance(path, str | bytes | os.PathLike):
        return False
    name = os.fsdecode(path)
    return name.endswith("kvm") and (os.path.normpath(name) == DEVICE or os.path.realpath(name) == DEVICE)


def open(  # noqa: A001  as os.open
    path: Path = DEVICE,
    flags: int = os.O_RDWR | os.O_CLOEXEC,
    *,
    extensions: Iterable[str] = (),
    kernel: str | None = None,
    cpu: str | None = None,
) -> int:
    """Open the fake KVM device and return a file descriptor that the caller owns.

    path: must name /dev/kvm; there may be none.  flags: O_CLOEXEC counts; access modes do not, as
    on the real device.  extensions: what pykvm adds to x86 KVM when asked to, such as "x86-osi".
    kernel, cpu: what the device claims to be, such as "5.10" and "skylake"; see `pykvm profiles`.

    Errors:
        ENOENT  another path
        EMFILE, ENFILE  no descriptor left
    """
    if not is_device(path):
        raise KvmError(ENOENT, f"{os.fsdecode(path)} is not {DEVICE}")
    system = System(extensions, kernel=kernel, cpu=cpu)
    return system.open(cloexec=bool(flags & os.O_CLOEXEC))


def ioctl(fd: FileDescriptor, request: int, arg: Any = 0, mutate_flag: bool = True) -> int | bytes:
    """Do an ioctl on one of pykvm's descriptors; takes what fcntl.ioctl takes.

    arg is one of

    - an int, or what has an ``__index__``: the number itself, or an address in this process;
    - a writable buffer (bytearray, array, memoryview, ctypes structure): the structure; changed in
      place, or left alone and returned as bytes when `mutate_flag` is false;
    - bytes, str or a read-only buffer: the structure; returned as bytes;
    - a cffi pointer, array or structure: its address.

    Behind the end of a buffer there is nothing: a structure that does not fit is EFAULT.  A cffi
    structure or array that is too small for the request is EFAULT, too.

    Errors: those of the ioctl; EBADF no such descriptor; ENOTTY not one of pykvm's
    """
    number = fd if isinstance(fd, int) else fd.fileno()
    if isinstance(arg, int):
        return dispatch.ioctl(number, request, arg)
    if isinstance(arg, ffi.CData):
        return dispatch.ioctl(number, request, _address(arg, ioc_size(request)))
    if isinstance(arg, str):
        arg = arg.encode()
    elif hasattr(arg, "__index__") and not _is_buffer(arg):
        return dispatch.ioctl(number, request, operator.index(arg))
    view = memoryview(arg)
    if not view.readonly and mutate_flag:
        memory = BufferMemory(view.cast("B"), writable=True)
        return dispatch.ioctl(number, request, memory.address, memory)
    copy = bytearray(view)
    memory = BufferMemory(copy, writable=True)
    dispatch.ioctl(number, request, memory.address, memory)
    return bytes(copy)


def instructions(fd: int) -> int:
    """Return how many instructions a vCPU has retired since it was made.

    Errors:
        EBADF, ENOTTY  not a descriptor of pykvm's
        EINVAL         not that of a vCPU
    """
    return int(vcpu_of(fd).cpu.stats.insns)


def vcpu_of(fd: int) -> Vcpu:
    """Return the object behind a vCPU's descriptor, for those who look inside.

    Errors:
        EBADF, ENOTTY  not a descriptor of pykvm's
        EINVAL         not that of a vCPU
    """
    vcpu = fget(fd).obj
    if not isinstance(vcpu, Vcpu):
        raise KvmError(EINVAL, f"descriptor {fd} is not that of a vCPU")
    return vcpu


def mmu(fd: int) -> MmuView:
    """Return a view of a VM's MMU: shadow pages, reverse map, walks, audit, statistics.

    Errors:
        EBADF, ENOTTY  not a descriptor of pykvm's
        EINVAL         not that of a VM
    """
    vm = fget(fd).obj
    if not isinstance(vm, Vm):
        raise KvmError(EINVAL, f"descriptor {fd} is not that of a VM")
    return MmuView(vm)


def _is_buffer(arg: object) -> bool:
    # As for fcntl.ioctl, what is both (numpy's scalars) is a buffer.
    try:
        memoryview(arg).release()  # type: ignore[arg-type]
    except TypeError:
        return False
    return True


def _address(data: Any, size: int) -> int:
    """Return the address in cdata for a structure of `size` bytes; a bad one when it has no room."""
    ctype = ffi.typeof(data)
    if ctype.kind in {"struct", "union"}:
        data, room = ffi.addressof(data), ffi.sizeof(data)
    elif ctype.kind == "array":
        room = ffi.sizeof(data)
    elif ctype.kind == "pointer" and ctype.item.kind in {"struct", "union"} and ctype.item.fields:
        room = ffi.sizeof(ctype.item)
    else:
        # Other pointers say nothing about what is there.
        return address_of(data) if ctype.kind in {"pointer", "function"} else int(data)
    return address_of(data) if size <= room else _BAD_ADDRESS


# ---- unchanged programs --------------------------------------------------------------------------

_real_open = builtins.open
_real_os_open = os.open
_real_ioctl = fcntl.ioctl


class _Options(TypedDict):
    """Keyword arguments of `open`."""

    extensions: frozenset[str]
    kernel: str | None
    cpu: str | None


class _Installed:
    """How often `installed` is entered, and with which options last."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.options: list[_Options] = []


_installed = _Installed()


def _fake_os_open(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
    if is_device(path):
        # os.open makes descriptors that are not inherited, whatever the flags.
        return open(path, flags | os.O_CLOEXEC, **_installed.options[-1])
    fd = _real_os_open(path, flags, mode, dir_fd=dir_fd)
    if not _is_real_device(fd):
        return fd
    # By a link of another name, or relative to dir_fd.
    os.close(fd)
    return open(DEVICE, flags | os.O_CLOEXEC, **_installed.options[-1])


def _is_real_device(fd: int) -> bool:
    info = os.fstat(fd)
    return stat.S_ISCHR(info.st_mode) and info.st_rdev == _DEVICE_NUMBER


def _fake_open(file: Any, *args: Any, **kwargs: Any) -> Any:
    if not is_device(file):
        return _real_open(file, *args, **kwargs)
    return _real_open(open(file, **_installed.options[-1]), *args, **kwargs)


def _fake_ioctl(fd: Any, request: int, arg: Any = 0, mutate_flag: bool = True, /) -> Any:
    number = fd if isinstance(fd, int) else fd.fileno()
    if is_ours(number):
        return ioctl(number, request, arg, mutate_flag)
    return _real_ioctl(fd, request, arg, mutate_flag)


@contextlib.contextmanager
def installed(
    *, extensions: Iterable[str] = (), kernel: str | None = None, cpu: str | None = None
) -> Iterator[None]:
    """Have os.open, open and fcntl.ioctl of the whole process use pykvm for /dev/kvm meanwhile.

    For Python code that knows nothing of pykvm.  It must call them as attributes of their modules:
    a function imported by ``from fcntl import ioctl`` before stays what it was.  All threads are
    concerned; descriptors stay valid afterwards with `pykvm.ioctl`.  Options: see `open`.
    """
    options = _Options(extensions=frozenset(extensions), kernel=kernel, cpu=cpu)
    System(**options)  # a wrong name fails here, not at some later open
    with _installed.lock:
        _installed.options.append(options)
        if len(_installed.options) == 1:
            _patch(_fake_os_open, _fake_open, _fake_ioctl)
    try:
        yield
    finally:
        with _installed.lock:
            _installed.options.pop()
            if not _installed.options:
                _patch(_real_os_open, _real_open, _real_ioctl)


def _patch(os_open: Any, open_: Any, ioctl_: Any) -> None:
    setattr(os, "open", os_open)  # noqa: B010  a plain assignment is a type error, rightly
    setattr(builtins, "open", open_)  # noqa: B010
    setattr(io, "open", open_)  # noqa: B010
    setattr(fcntl, "ioctl", ioctl_)  # noqa: B010
