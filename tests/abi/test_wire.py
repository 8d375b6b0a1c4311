"""Bytes read through the header (cffi) and through an independent declaration (cstruct2) agree."""

from __future__ import annotations

import random
from typing import Any

import pytest
from cstruct2.cstruct2_exceptions import cstruct2_overflow_exception

from pykvm import abi
from tests.abi import wire

ROUNDS = 20


def samples(size: int) -> list[bytes]:
    """Return byte patterns in which no field of any width equals another by rule."""
    generator = random.Random(size)
    counting = bytes(i * 7 & 0xFF for i in range(size))
    return [bytes(size), b"\xff" * size, counting, *(generator.randbytes(size) for _ in range(ROUNDS))]


def leaves(value: object) -> int:
    """Return how many numbers a structure holds."""
    match value:
        case dict():
            return sum(map(leaves, value.values()))
        case list():
            return sum(map(leaves, value))
    return 1


@pytest.mark.parametrize("name", wire.STRUCTURES)
def test_structure(name: str) -> None:
    declaration, size = wire.STRUCTURES[name]
    assert abi.sizeof(name) == size
    for data in samples(size):
        ours = abi.to_dict(abi.from_bytes(name, data))
        assert ours == wire.read(declaration, data)
    assert leaves(ours) > 0


@pytest.mark.parametrize("name", wire.STRUCTURES)
def test_every_byte_counts(name: str) -> None:
    """A declaration with a hole would agree with anything there."""
    declaration, size = wire.STRUCTURES[name]
    for position in range(size):
        data = bytes(position) + b"\x5a" + bytes(size - position - 1)
        assert wire.read(declaration, data) != wire.read(declaration, bytes(size))
        assert abi.to_dict(abi.from_bytes(name, data)) != abi.to_dict(abi.new(name))


HEAD = (
    "request_interrupt_window",
    "immediate_exit",
    "padding1",
    "exit_reason",
    "ready_for_interrupt_injection",
    "if_flag",
    "flags",
    "cr8",
    "apic_base",
)


@pytest.mark.spec("run.layout")
@pytest.mark.parametrize("member", wire.RUN)
def test_kvm_run(member: str) -> None:
    assert abi.sizeof("kvm_run") == wire.RUN_SIZE
    for data in samples(wire.RUN_SIZE):
        run = abi.to_dict(abi.from_bytes("kvm_run", data))
        theirs = wire.read(wire.RUN[member], data)
        assert {name: run[name] for name in HEAD} == theirs["head"]
        assert without_overlay(run[member]) == theirs[member]
        tail = {name: run[name] for name in ("kvm_valid_regs", "kvm_dirty_regs")}
        assert tail | {"s": run["s"]["padding"]} == theirs["tail"]
        sync = wire.read(wire.Regs, theirs["tail"]["s"][:144])
        assert run["s"]["regs"]["regs"] == sync


def without_overlay(values: dict[str, Any]) -> dict[str, Any]:
    """Check hypercall.longmode against flags, whose low half it is, and leave it out."""
    values = dict(values)
    longmode = values.pop("longmode", None)
    assert longmode is None or longmode == values["flags"] & 0xFFFFFFFF
    return values


def test_a_wrong_declaration_is_noticed() -> None:
    data = bytes(range(40))
    with pytest.raises(ValueError, match="32 bytes, the data 40"):
        wire.read(wire.STRUCTURES["kvm_userspace_memory_region"][0], data)
    with pytest.raises(cstruct2_overflow_exception):
        wire.read(wire.STRUCTURES["kvm_regs"][0], data)
    swapped = bytes(4) + data[:28]
    assert abi.to_dict(abi.from_bytes("kvm_userspace_memory_region", swapped)) != wire.read(
        wire.STRUCTURES["kvm_userspace_memory_region"][0], data[:32]
    )
