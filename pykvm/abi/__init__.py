"""The KVM ABI in Python: what ``include/pykvm/*.h`` says, as the C compiler understood it.

- ``ffi``, ``lib``: the cffi module; ``lib`` has the C core's functions and every constant;
- ``uapi``: the constants alone, ``uapi.KVM_RUN``; ``pykvm.abi.KVM_RUN`` is the same;
- ``requests()``, ``capabilities()``, ``exit_reasons()``: the header's tables, by name;
- ``struct_type()``, ``new()``, ``fields()`` and the rest: structures as bytes and as Python values.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NewType, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import ModuleType

    from pykvm.abi._native import FFI, CType, Lib, Uapi

__all__ = [
    "CData",
    "Field",
    "Gfn",
    "Gpa",
    "Gva",
    "Hva",
    "Request",
    "Spte",
    "capabilities",
    "exit_reasons",
    "ffi",
    "fields",
    "from_bytes",
    "lib",
    "new",
    "requests",
    "sizeof",
    "struct_type",
    "to_bytes",
    "to_dict",
    "uapi",
]

CData: TypeAlias = Any
"""A C value or pointer: cffi types them when the program runs, not before."""

Gpa = NewType("Gpa", int)
"""Guest physical address, in bytes."""
Gva = NewType("Gva", int)
"""Guest virtual (linear) address, in bytes."""
Hva = NewType("Hva", int)
"""Host virtual address: one in this process, in bytes."""
Gfn = NewType("Gfn", int)
"""Guest frame number: a Gpa in 4 KiB pages."""
Spte = NewType("Spte", int)
"""A shadow page-table entry, as 64 bits."""


def _load() -> ModuleType:
    """Import the native module; PYKVM_BUILD=asan takes the sanitized one from build/."""
    if os.environ.get("PYKVM_BUILD") == "asan":
        from pykvm.abi import _build, _stub  # noqa: PLC0415  development only

        tree = _build.Tree(_build.source_root(), _build.VARIANTS["asan"])
        return _stub.load(str(tree.scratch / f"_native{_build.EXT_SUFFIX}"))
    from pykvm.abi import _native  # noqa: PLC0415

    return _native


# ``python -m pykvm.abi._build`` imports this package first, and may find no module to load yet.
if "pykvm.abi._build" not in sys.orig_argv:
    _module = _load()
    ffi: FFI = _module.ffi
    lib: Lib = _module.lib
    uapi: Uapi = _module.lib


def __getattr__(name: str) -> int:
    """Look up a constant of the headers: ``pykvm.abi.KVM_RUN``."""
    if name[0].isupper():
        try:
            value: int = getattr(lib, name)
        except AttributeError:
            pass
        else:
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# ---- the header's tables ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Request:
    """One request of kvm.h."""

    name: str
    number: int
    """All 32 bits: direction, size, type and nr; none of them alone is unique."""
    argument: str
    """C type of what the argument points to, "" when the argument is the value itself."""
    fds: tuple[str, ...]
    """Kinds of file descriptor it is for: system, vm, vcpu, device; ("none",) on x86."""
    cap: str
    """Capability that announces it, "" when it was always there."""

    @property
    def nr(self) -> int:
        """Return the low byte."""
        return self.number & 0xFF

    @property
    def size(self) -> int:
        """Return the bytes of the argument that the number states."""
        return self.number >> 16 & 0x3FFF

    @property
    def writes(self) -> bool:
        """Say if the number claims that the kernel reads the argument (_IOC_WRITE)."""
        return bool(self.number >> 30 & 1)

    @property
    def reads(self) -> bool:
        """Say if the number claims that the kernel writes the argument (_IOC_READ)."""
        return bool(self.number >> 30 & 2)


@cache
def requests() -> Mapping[str, Request]:
    """Return every request of kvm.h by name, in the header's order."""
    rows = {}
    for row in lib.kvm_requests:
        name, argument, fds, cap = (
            ffi.string(text).decode() for text in (row.name, row.argument, row.fds, row.cap)
        )
        rows[name] = Request(name, row.number, argument, tuple(fds.split(",")), cap)
    return rows


@cache
def capabilities() -> Mapping[str, int]:
    """Return every KVM_CAP_* by name, in the order of their numbers."""
    return _constants("KVM_CAP_")


@cache
def exit_reasons() -> Mapping[str, int]:
    """Return every value of kvm_run.exit_reason by name, in the order of their numbers."""
    details = ("KVM_EXIT_IO_", "KVM_EXIT_HYPERCALL_", "KVM_EXIT_HYPERV_", "KVM_EXIT_XEN_")
    return {name: value for name, value in _constants("KVM_EXIT_").items() if not name.startswith(details)}


def _constants(prefix: str) -> dict[str, int]:
    names = (name for name in dir(lib) if name.startswith(prefix))
    return dict(sorted(((name, getattr(lib, name)) for name in names), key=lambda item: item[1]))


# ---- structures ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Field:
    """One member of a structure; members of unnamed unions count as the structure's own."""

    name: str
    offset: int
    """In bytes from the start of the structure."""
    size: int
    """In bytes; 0 for a flexible array."""
    type: CType
    bits: tuple[int, int] | None = None
    """(shift, width) of a bit-field."""


@cache
def struct_type(name: str) -> CType:
    """Return the type of a structure or union: "kvm_regs" and "struct kvm_regs" are the same.

    Errors:
        KeyError  there is no such type in the headers
    """
    spelled = name if " " in name else f"struct {name}"
    try:
        return ffi.typeof(spelled)
    except ffi.error:
        raise KeyError(name) from None


def sizeof(name: str) -> int:
    """Return the bytes of a type; for "struct kvm_msrs" and its like without the entries."""
    return ffi.sizeof(struct_type(name))


def new(name: str, init: object = None) -> CData:
    """Return a pointer to a new, zeroed or initialised structure; it lives as long as the pointer."""
    struct = struct_type(name)
    return ffi.new(f"{struct.cname} *") if init is None else ffi.new(f"{struct.cname} *", init)


def fields(name: str) -> tuple[Field, ...]:
    """Return the members of a structure or union, in the order of declaration."""
    return _fields(struct_type(name))


@cache
def _fields(struct: CType) -> tuple[Field, ...]:
    members: list[Field] = []
    for name, field in struct.fields or ():
        if not name:
            members += (
                Field(m.name, field.offset + m.offset, m.size, m.type, m.bits) for m in _fields(field.type)
            )
            continue
        flexible = field.type.kind == "array" and field.type.length is None
        size = 0 if flexible else ffi.sizeof(field.type)
        bits = (field.bitshift, field.bitsize) if field.bitsize > 0 else None
        members.append(Field(name, field.offset, size, field.type, bits))
    return tuple(members)


def from_bytes(name: str, data: bytes | bytearray | memoryview) -> CData:
    """Return a pointer to a new structure that holds a copy of data, of exactly its size.

    Errors:
        ValueError  data is shorter or longer than the structure
    """
    struct = new(name)
    size = sizeof(name)
    if len(data) != size:
        raise ValueError(f"{name}: {len(data)} bytes, the structure has {size}")
    ffi.memmove(struct, data, size)
    return struct


def to_bytes(struct: CData) -> bytes:
    """Return a copy of the bytes of a structure, or of what a pointer points to."""
    if ffi.typeof(struct).kind in {"struct", "union"}:
        struct = ffi.addressof(struct)
    return bytes(ffi.buffer(struct))


def to_dict(struct: CData) -> dict[str, Any]:
    """Return a structure as Python values: ints, lists of ints, bytes for char arrays, dicts."""
    ctype = ffi.typeof(struct)
    members = _fields(ctype.item if ctype.kind == "pointer" else ctype)
    return {member.name: _value(getattr(struct, member.name)) for member in members if member.size}


def _value(value: Any) -> Any:
    if isinstance(value, (int, bytes)):
        return value
    ctype = ffi.typeof(value)
    if ctype.kind in {"struct", "union"}:
        return to_dict(value)
    if ctype.kind == "array":
        return to_bytes(value) if ctype.item.cname == "char" else [_value(item) for item in value]
    return int(ffi.cast("uintptr_t", value))
