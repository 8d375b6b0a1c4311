"""A call that fails changes nothing: all state of the vCPU and what can be asked of the VM, before and after.

Every ioctl there is gets arguments that hypothesis makes: what the matching GET says, a few members
overwritten, or bytes out of nothing.
"""

from __future__ import annotations

import contextlib
import os
from errno import E2BIG, EINVAL
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pykvm.kvm  # noqa: F401  fills the registry
from pykvm import uapi
from pykvm.abi import capabilities, ffi, new
from pykvm.abi.ioctl import Array, Ioctl, rows
from tests import snapshot
from tests.machine import Backend, Machine, errno_of

if TYPE_CHECKING:
    from collections.abc import Iterator

KINDS = ("system", "vm", "vcpu")
# Those that make something else, or run the guest.
OTHERS = {"KVM_RUN", "KVM_CREATE_VM"}
ROWS = [row for kind in KINDS for row in rows(kind) if not row.absent and row.name not in OTHERS]
# What a SET takes its first bytes from.
GETTERS = {row.name.replace("_GET_", "_SET_"): row for row in rows("vcpu") if "_GET_" in row.name}
ENTRIES = 8
CAPS = sorted(capabilities().values())

_interesting = st.sampled_from((0, 1, 2, 3, 7, 31, 32, 64, 255, 0x100, 0x1000, 1 << 31, 1 << 32, 1 << 63, ~0))
_values = _interesting | st.integers(0, (1 << 64) - 1)
_changes = st.lists(
    st.tuples(st.integers(0, 1 << 12), st.sampled_from((1, 2, 4, 8)), _values), min_size=0, max_size=6
)


class Subject:
    """A machine in a state that has something in every part of it."""

    def __init__(self, backend: Backend) -> None:
        self.machine = machine = Machine(backend)
        machine.do(uapi.KVM_SET_CPUID2, snapshot.supported_cpuid(machine))
        machine.enable(machine.vm, uapi.KVM_CAP_EXCEPTION_PAYLOAD, 1)
        machine.start(b"\xf4" * 16, rax=1, rbx=2, rsp=0x8000)
        machine.set_msr(uapi.MSR_KERNEL_GS_BASE, 0x1234)
        events = machine.events
        events.exception.pending, events.exception.nr, events.nmi.pending = 1, 13, 1
        events.flags |= uapi.KVM_VCPUEVENT_VALID_PAYLOAD
        machine.set_events(events)
        self.fds = {"system": machine.kvm, "vm": machine.vm, "vcpu": machine.vcpu}
        machine.get(uapi.KVM_GET_MP_STATE, "kvm_mp_state")

    def state(self) -> dict[str, Any]:
        machine = self.machine
        state = snapshot.whole_state(machine)
        state["caps"] = [machine.cap(number) for number in CAPS]
        state["vm_tsc_khz"] = machine.ioctl(machine.vm, uapi.KVM_GET_TSC_KHZ)
        return state

    def argument(self, row: Ioctl, changes: list[tuple[int, int, int]]) -> bytearray:
        """Return the bytes of an argument: sensible ones, then changed."""
        assert row.form is not None
        ctype = row.form.ctype()
        assert ctype is not None
        data = bytearray(ffi.sizeof(ctype) + 40 * ENTRIES)
        getter = GETTERS.get(row.name)
        if getter is not None and getter.request >> 16 & 0x3FFF == row.request >> 16 & 0x3FFF:
            if isinstance(row.form, Array):
                data[0] = ENTRIES
            with contextlib.suppress(OSError):
                self.machine.do(getter.request, data)
        elif isinstance(row.form, Array):
            data[0] = ENTRIES
        for where, width, value in changes:
            at = where % ffi.sizeof(ctype) // width * width if where & 1 else where % len(data)
            data[at : at + width] = (value & (1 << 8 * width) - 1).to_bytes(8, "little")[:width]
        return data

    def close(self) -> None:
        self.machine.close()


@pytest.fixture
def subject(backend: Backend) -> Iterator[Subject]:
    if backend.real:
        pytest.skip("the kernel's own failures are not to be proved here")
    made = Subject(backend)
    yield made
    made.close()


def name(row: Ioctl) -> str:
    return f"{row.kind}-{row.name}"


POINTERS = [row for row in ROWS if row.form is not None and row.form.ctype() is not None]
NUMBERS = [row for row in ROWS if row not in POINTERS]
_SETTINGS = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.parametrize("row", POINTERS, ids=name)
@_SETTINGS
@given(changes=_changes)
def test_a_bad_structure(row: Ioctl, subject: Subject, changes: list[tuple[int, int, int]]) -> None:
    if subject.machine.backend.is_file:
        pytest.skip("arguments of wrong sizes: only pykvm.ioctl() stops at their end")
    argument = subject.argument(row, changes)
    before = subject.state()
    try:
        result = subject.machine.ioctl(subject.fds[row.kind], row.request, argument)
    except OSError:
        after = subject.state()
        assert {part for part in before if before[part] != after[part]} == set()
    else:
        assert result >= 0


@pytest.mark.parametrize("row", NUMBERS, ids=name)
@_SETTINGS
@given(argument=_values)
def test_a_bad_number(row: Ioctl, subject: Subject, argument: int) -> None:
    before = subject.state()
    try:
        result = subject.machine.ioctl(subject.fds[row.kind], row.request, argument & (1 << 64) - 1)
    except OSError:
        after = subject.state()
        assert {part for part in before if before[part] != after[part]} == set()
    else:
        if row.name == "KVM_CREATE_VCPU":
            os.close(result)


@pytest.mark.spec("vcpu.ENABLE_CAP", "vm.ENABLE_CAP")
@pytest.mark.parametrize("kind", ["vm", "vcpu"])
@pytest.mark.parametrize("cap", sorted(capabilities()))
def test_a_capability_that_is_refused(kind: str, cap: str, subject: Subject) -> None:
    before = subject.state()
    for flags, first in ((1, 0), (0, (1 << 64) - 1), (0, 1 << 40)):
        request = new("kvm_enable_cap")
        request.cap, request.flags, request.args[0] = capabilities()[cap], flags, first
        fd = subject.fds[kind]
        errno = errno_of(
            lambda fd=fd, request=request: subject.machine.ioctl(fd, uapi.KVM_ENABLE_CAP, request)
        )
        # A dirty ring's size is checked before whether there can still be one.
        too_large = (E2BIG,) if "DIRTY_LOG_RING" in cap and not flags else ()
        assert errno in (((EINVAL,) if flags else (EINVAL, 0)) + too_large)
        after = subject.state()
        if errno:
            assert {part for part in before if before[part] != after[part]} == set()
        before = after


@pytest.mark.spec("run.cr8_in", "run.sync_regs")
@pytest.mark.parametrize(
    ("member", "value"), [("cr8", 16), ("kvm_valid_regs", 8), ("kvm_dirty_regs", 1 << 63)]
)
def test_a_run_that_is_refused(subject: Subject, member: str, value: int) -> None:
    before = subject.state()
    setattr(subject.machine.run, member, value)
    assert subject.machine.go_errno() == EINVAL
    assert subject.state() == before
