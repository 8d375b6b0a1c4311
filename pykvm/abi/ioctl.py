"""The registry of ioctls: one ioctl is one decorated function.

::

    @vm_ioctl("KVM_SET_TSS_ADDR", Value(), cap="KVM_CAP_SET_TSS_ADDR")
    def set_tss_addr(vm: Vm, address: int) -> int:
        \"\"\"Store where a processor may keep its real-mode TSS: three pages.

        Errors:
            EINVAL  the pages do not end below 4 GiB
        Source: api.rst 4.33; x86.c kvm_vm_ioctl_set_tss_addr
        \"\"\"

The name is the one token: the request's number and the capability's value are looked up by it in
the header, so a typo dies at import.  The *form* says how bytes cross between client and handler;
a handler never sees an address unless its form is `User`.  EFAULT and ENOMEM need no mention in
``Errors:``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from errno import E2BIG, EINVAL, ENOTTY
from types import MappingProxyType
from typing import Any, TypeAlias, TypeVar

from pykvm.abi import CData, ffi, uapi
from pykvm.abi.errors import KvmError, errno_name
from pykvm.abi.uaccess import PROCESS, UserMemory

# What the kernel answers to a request that a descriptor of this kind does not know.
UNKNOWN_REQUEST = MappingProxyType(
    {"system": EINVAL, "vm": ENOTTY, "vcpu": EINVAL, "device": ENOTTY, "stats": ENOTTY},
)
KINDS = tuple(UNKNOWN_REQUEST)

Handler: TypeAlias = Callable[..., Any]
# How the dispatcher calls an ioctl: (kernel-side object, argument, the client's memory) -> result.
Entry: TypeAlias = Callable[[Any, int, UserMemory], int]
F = TypeVar("F", bound=Handler)


def ioc_size(request: int) -> int:
    """Return the size of the argument structure that is part of a request's number."""
    return (request >> 16) & 0x3FFF


# ---- forms ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """How an ioctl's argument crosses."""

    def bind(self, handler: Handler, *, user: bool) -> Entry:
        """Return the function that the dispatcher calls."""
        raise NotImplementedError

    def ctype(self) -> str | None:
        """Return the C type the argument points to, if it does."""
        return None


@dataclass(frozen=True)
class NoArg(Form):
    """The argument must be 0: ``handler(obj) -> int``."""

    def bind(self, handler: Handler, *, user: bool) -> Entry:
        """See `Form.bind`."""
        del user

        def entry(obj: Any, arg: int, memory: UserMemory) -> int:
            del memory
            if arg:
                raise KvmError(EINVAL, f"argument is {arg:#x}, must be 0")
            return handler(obj)  # type: ignore[no-any-return]

        return entry


@dataclass(frozen=True)
class Value(Form):
    """The argument is the number itself, 64 bits unsigned: ``handler(obj, arg: int) -> int``."""

    def bind(self, handler: Handler, *, user: bool) -> Entry:
        """See `Form.bind`."""
        del user

        def entry(obj: Any, arg: int, memory: UserMemory) -> int:
            del memory
            return handler(obj, arg)  # type: ignore[no-any-return]

        return entry


@dataclass(frozen=True)
class Ignored(Form):
    """The argument is not looked at: ``handler(obj) -> int``."""

    def bind(self, handler: Handler, *, user: bool) -> Entry:
        """See `Form.bind`."""
        del user

        def entry(obj: Any, arg: int, memory: UserMemory) -> int:
            del arg, memory
            return handler(obj)  # type: ignore[no-any-return]

        return entry


@dataclass(frozen=True)
class _Struct(Form):
    """A form with a structure (or scalar) that the argument points to."""

    type: str

    def ctype(self) -> str:
        """See `Form.ctype`."""
        return self.type

    def _pointer(self) -> tuple[Any, int]:
        return ffi.typeof(self.type + " *"), ffi.sizeof(self.type)


@dataclass(frozen=True)
class In(_Struct):
    """``handler(obj, x) -> int``; `x` is the handler's own copy, a cdata pointer."""

    def bind(self, handler: Handler, *, user: bool) -> Entry:
        """See `Form.bind`."""
        pointer, size = self._pointer()
        new = ffi.new

        def entry(obj: Any, arg: int, memory: UserMemory) -> int:
            x = new(pointer)
            memory.read_into(x, arg, size)
            return handler(obj, x, PROCESS) if user else handler(obj, x)  # type: ignore[no-any-return]

        return entry


@dataclass(frozen=True)
class Out(_Struct):
    """``handler(obj) -> cdata pointer``, copied out; the ioctl returns 0."""

    def bind(self, handler: Handler, *, user: bool) -> Entry:
        """See `Form.bind`."""
        size = self._pointer()[1]

        def entry(obj: Any, arg: int, memory: UserMemory) -> int:
            memory.write_from(arg, handler(obj, PROCESS) if user else handler(obj), size)
            return 0

        return entry


@dataclass(frozen=True)
class InOut(_Struct):
    """``handler(obj, x) -> int``; `x` is copied back on success, and when KvmError.writeback says so."""

    def bind(self, handler: Handler, *, user: bool) -> Entry:
        """See `Form.bind`."""
        pointer, size = self._pointer()
        new = ffi.new

        def entry(obj: Any, arg: int, memory: UserMemory) -> int:
            x = new(pointer)
            memory.read_into(x, arg, size)
            try:
                result: int = handler(obj, x, PROCESS) if user else handler(obj, x)
            except KvmError as error:
                if error.writeback:
                    memory.write_from(arg, x, size)
                raise
            memory.write_from(arg, x, size)
            return result

        return entry


@dataclass(slots=True)
class ArrayArg:
    """A header with entries behind it, as a handler gets it.

    `head`: cdata pointer to the header.  `n`: entries the client has room for or gives.
    `entries`: cdata array of `n` entries: the client's when the form copies in, zeros otherwise.
    """

    head: CData
    entries: CData
    n: int
    count: str
    _reply: tuple[CData, int] | None = field(default=None, init=False)
    _head_out: bool = field(default=False, init=False)

    def set_count(self, n: int) -> None:
        """Put `n` into the header's count and have the header copied back."""
        setattr(self.head, self.count, n)
        self._head_out = True

    def reply(self, entries: CData, n: int | None = None) -> None:
        """Copy `n` entries out (None: all the client gave, count untouched) when the handler returns."""
        self._reply = (entries, self.n if n is None else n)
        if n is not None:
            self.set_count(n)


@dataclass(frozen=True)
class Array(Form):
    """A header with a count, and entries behind it: ``handler(obj, a: ArrayArg) -> int``.

    More than `limit` entries are `limit_errno`, or are taken as `limit` entries when that is None.
    """

    type: str
    entry: str
    count: str
    entries: str
    copy_in: bool = False
    copy_out: bool = False
    limit: int = 1 << 16
    limit_errno: int | None = E2BIG

    def ctype(self) -> str:
        """See `Form.ctype`."""
        return self.type

    def bind(self, handler: Handler, *, user: bool) -> Entry:
        """See `Form.bind`."""
        head_type, head_size = ffi.typeof(self.type + " *"), ffi.sizeof(self.type)
        array_type, entry_size = ffi.typeof(self.entry + "[]"), ffi.sizeof(self.entry)
        offset = ffi.offsetof(self.type, self.entries)

        def copy_out(a: ArrayArg, arg: int, memory: UserMemory) -> None:
            if a._reply is not None:  # noqa: SLF001
                entries, n = a._reply  # noqa: SLF001
                memory.write_from(arg + offset, entries, n * entry_size)
            if a._head_out:  # noqa: SLF001
                memory.write_from(arg, a.head, head_size)

        def entry(obj: Any, arg: int, memory: UserMemory) -> int:
            head = ffi.new(head_type)
            memory.read_into(head, arg, head_size)
            n = getattr(head, self.count)
            if n > self.limit:
                if self.limit_errno is not None:
                    raise KvmError(self.limit_errno, f"{self.count} is {n}, at most {self.limit}")
                n = self.limit
            entries = ffi.new(array_type, n)
            if self.copy_in:
                memory.read_into(entries, arg + offset, n * entry_size)
            a = ArrayArg(head, entries, n, self.count)
            try:
                result: int = handler(obj, a, PROCESS) if user else handler(obj, a)
            except KvmError as error:
                if error.writeback:
                    copy_out(a, arg, memory)
                raise
            copy_out(a, arg, memory)
            return result

        return entry


@dataclass(frozen=True)
class User(Form):
    """The odd ones: ``handler(obj, u: UserMemory, addr: int) -> int`` reads and writes by itself.

    `type` is the structure at `addr`, for the table of ioctls and the check of its size.
    """

    type: str | None = None

    def ctype(self) -> str | None:
        """See `Form.ctype`."""
        return self.type

    def bind(self, handler: Handler, *, user: bool) -> Entry:
        """See `Form.bind`."""
        del user

        def entry(obj: Any, arg: int, memory: UserMemory) -> int:
            return handler(obj, memory, arg)  # type: ignore[no-any-return]

        return entry


# ---- rows ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ioctl:
    """One row: a request that descriptors of `kind` take, or (`absent`) that they refuse knowingly."""

    name: str
    kind: str
    request: int
    form: Form | None
    cap: str | None
    func: Handler
    entry: Entry
    # errno name -> cause, in the docstring's order
    errors: Mapping[str, str]
    source: str
    # the docstring's first line; for an absent row the reason
    doc: str
    absent: bool = False
    # the version of Linux that no longer had it: only older kernels' profiles offer it
    removed: str | None = None

    @property
    def module(self) -> str:
        """Return the module the handler lives in."""
        return self.func.__module__


REGISTRY: dict[tuple[str, int], Ioctl] = {}
# Requests that no descriptor takes: other architectures'.  name -> why
FOREIGN: dict[str, str] = {}


def lookup(kind: str, request: int) -> Ioctl | None:
    """Return the row of a request; the number's low 32 bits count, as in the kernel."""
    return REGISTRY.get((kind, request & 0xFFFF_FFFF))


def rows(kind: str | None = None) -> Iterator[Ioctl]:
    """Yield the rows of one kind, or of all in the order of `KINDS`, by number."""
    for each in KINDS if kind is None else (kind,):
        yield from sorted(
            (row for row in REGISTRY.values() if row.kind == each), key=lambda row: row.request & 0xFFFF
        )


class RegistryError(Exception):
    """A row that contradicts the header, its docstring or another row.  Seen at import only."""


def _request(name: str) -> int:
    number = getattr(uapi, name, None)
    if not isinstance(number, int):
        msg = f"{name}: no such request in include/pykvm/kvm.h"
        raise RegistryError(msg)
    return number & 0xFFFF_FFFF


def _check_cap(name: str, cap: str | None) -> None:
    if cap is not None and not (cap.startswith("KVM_CAP_") and isinstance(getattr(uapi, cap, None), int)):
        msg = f"{name}: no such capability: {cap}"
        raise RegistryError(msg)


def _check_size(name: str, request: int, form: Form) -> None:
    ctype = form.ctype()
    size = ioc_size(request)
    # _IO requests that take a pointer all the same have no size in their number.
    if ctype is not None and size and ffi.sizeof(ctype) != size:
        msg = f"{name}: {ctype} has {ffi.sizeof(ctype)} bytes, the request says {size}"
        raise RegistryError(msg)


@dataclass(frozen=True, slots=True)
class _Docs:
    doc: str
    errors: Mapping[str, str]
    source: str


def parse_docstring(name: str, text: str | None) -> _Docs:
    """Take a handler's docstring apart: first line, ``Errors:`` block, ``Source:`` line."""
    lines = [line.strip() for line in (text or "").splitlines()]
    starts = {
        key: at for at, line in enumerate(lines) for key in ("Errors:", "Source:") if line.startswith(key)
    }
    if not lines or starts.keys() != {"Errors:", "Source:"} or starts["Errors:"] > starts["Source:"]:
        msg = f"{name}: the docstring needs a first line, Errors: and Source:"
        raise RegistryError(msg)
    errors: dict[str, str] = {}
    first, *block = lines[starts["Errors:"] : starts["Source:"]]
    for line in [first.removeprefix("Errors:").strip(), *block]:
        if match := re.match(r"(E[A-Z0-9]+(?:, E[A-Z0-9]+)*)\s+(.+)", line):
            errors |= dict.fromkeys(match[1].split(", "), match[2])
        elif line and errors:
            errors[next(reversed(errors))] += " " + line
        elif line and line.lower() != "none":
            msg = f"{name}: cannot read the line {line!r} under Errors:"
            raise RegistryError(msg)
    source = " ".join(lines[starts["Source:"] :]).removeprefix("Source:").strip()
    return _Docs(lines[0], MappingProxyType(errors), source)


def _add(row: Ioctl) -> None:
    key = (row.kind, row.request)
    if other := REGISTRY.get(key):
        places = " and ".join(f"{r.module} ({'absent' if r.absent else r.name})" for r in (other, row))
        msg = f"{row.name} on {row.kind} is registered twice: in {places}"
        raise RegistryError(msg)
    REGISTRY[key] = row


def _decorator(
    kind: str, name: str, form: Form, *, cap: str | None, user: bool, removed: str | None = None
) -> Callable[[F], F]:
    request = _request(name)
    _check_cap(name, cap)
    _check_size(name, request, form)

    def register(func: F) -> F:
        docs = parse_docstring(f"{func.__module__}.{func.__name__}", func.__doc__)
        entry = form.bind(func, user=user)
        errors, source, doc = docs.errors, docs.source, docs.doc
        _add(Ioctl(name, kind, request, form, cap, func, entry, errors, source, doc, removed=removed))
        return func

    return register


def system_ioctl(name: str, form: Form, *, cap: str | None = None, user: bool = False) -> Callable[[F], F]:
    """Register the handler of a request on /dev/kvm."""
    return _decorator("system", name, form, cap=cap, user=user)


def vm_ioctl(
    name: str, form: Form, *, cap: str | None = None, user: bool = False, removed: str | None = None
) -> Callable[[F], F]:
    """Register the handler of a request on a VM descriptor; `removed`: from Linux, in this version."""
    return _decorator("vm", name, form, cap=cap, user=user, removed=removed)


def vcpu_ioctl(name: str, form: Form, *, cap: str | None = None, user: bool = False) -> Callable[[F], F]:
    """Register the handler of a request on a vCPU descriptor; it is called with vcpu.mutex held."""
    return _decorator("vcpu", name, form, cap=cap, user=user)


def not_offered(kind: str, name: str, *, why: str, errno: int | None = None) -> None:
    """Declare that descriptors of `kind` refuse a request with `errno`, by default as if unknown."""
    number = UNKNOWN_REQUEST[kind] if errno is None else errno

    def refuse(obj: object, arg: int, memory: UserMemory) -> int:
        del obj, arg, memory
        raise KvmError(number, f"{name} is not offered: {why}")

    errors = MappingProxyType({errno_name(number): "always"})
    _add(Ioctl(name, kind, _request(name), None, None, refuse, refuse, errors, "", why, absent=True))


def foreign(name: str, *, why: str) -> None:
    """Declare a request that exists on other architectures only: unknown to every descriptor."""
    _request(name)
    FOREIGN[name] = why
