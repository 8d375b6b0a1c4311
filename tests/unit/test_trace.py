"""Tracepoints: off by default, the kernel's wording, and the reason of a refusal."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from errno import EINVAL
from typing import TYPE_CHECKING

import pytest

import pykvm
from pykvm import trace, uapi

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    out = io.StringIO()
    yield out
    trace.enable("")


def test_off_by_default() -> None:
    assert not any(point.enabled for point in trace.TRACEPOINTS.values())
    assert all(name == point.name for name, point in trace.TRACEPOINTS.items())


def test_only_what_is_asked_for(lines: io.StringIO) -> None:
    trace.enable("kvm_pio, kvm_exit", lines)
    assert {name for name, point in trace.TRACEPOINTS.items() if point.enabled} == {"kvm_pio", "kvm_exit"}
    trace.kvm_pio(direction="write", port=0x3F8, size=1, count=1, val=0x41)
    assert lines.getvalue().endswith("kvm_pio:             pio_write at 0x3f8 size 1 count 1 val 0x41\n")
    trace.enable("all", lines)
    assert all(point.enabled for point in trace.TRACEPOINTS.values())
    with pytest.raises(ValueError, match="no tracepoint kvm_nonsense; there are kvm_entry"):
        trace.enable("kvm_nonsense")


def test_a_refused_ioctl_says_why(lines: io.StringIO) -> None:
    kvm = pykvm.open("/dev/kvm")
    trace.enable("kvm_ioctl", lines)
    assert pykvm.ioctl(kvm, uapi.KVM_GET_API_VERSION) == 12
    with pytest.raises(pykvm.KvmError) as caught:
        pykvm.ioctl(kvm, uapi.KVM_CREATE_VM, 9)
    assert caught.value.errno == EINVAL
    with pytest.raises(pykvm.KvmError):
        pykvm.ioctl(kvm, 0xAEFF)
    trace.enable("")
    os.close(kvm)
    said = [line.split(": ", 2)[2].strip() for line in lines.getvalue().splitlines()]
    assert said == [
        f"fd {kvm} system KVM_GET_API_VERSION arg 0x0 = 12",
        f"fd {kvm} system KVM_CREATE_VM arg 0x9 = -EINVAL: no machine type 0x9",
        f"fd {kvm} system 0xaeff arg 0x0 = -EINVAL: no request 0xaeff on a system descriptor",
    ]


def test_the_environment_turns_it_on(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    program = "import pykvm; pykvm.ioctl(pykvm.open(), pykvm.uapi.KVM_GET_API_VERSION)"
    env = {**os.environ, "PYKVM_TRACE": "kvm_ioctl", "PYKVM_TRACE_FILE": str(path)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, check=True)
    assert done.stderr == b""
    assert "KVM_GET_API_VERSION arg 0x0 = 12" in path.read_text()
