"""Descriptors to test with, and the check that handlers raise only what they document."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import pytest

import pykvm
from pykvm import uapi
from pykvm.fd import dispatch, table

Open = Callable[[int], int]


@pytest.fixture(autouse=True)
def strict_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "strict_errors", True)


@pytest.fixture
def track() -> Iterator[Open]:
    """Descriptors given to it are closed at the end, if the test has not done so."""
    fds: list[int] = []

    def add(fd: int) -> int:
        fds.append(fd)
        return fd

    yield add
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
    table.reap()


@pytest.fixture
def kvm(track: Open) -> int:
    return track(pykvm.open("/dev/kvm"))


@pytest.fixture
def vm(kvm: int, track: Open) -> int:
    fd = pykvm.ioctl(kvm, uapi.KVM_CREATE_VM)
    assert isinstance(fd, int)
    return track(fd)


@pytest.fixture
def vcpu(vm: int, track: Open) -> int:
    fd = pykvm.ioctl(vm, uapi.KVM_CREATE_VCPU, 0)
    assert isinstance(fd, int)
    return track(fd)


def errno_of(function: Callable[..., object], *args: object) -> int | None:
    """Return the errno a call fails with; None when it does not."""
    try:
        function(*args)
    except OSError as error:
        return error.errno
    return None
