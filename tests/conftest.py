"""Fixtures of every test; the markers are described in pyproject.toml."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import pytest

from tests.machine import Backend, Machine

pytest_plugins = ("tests.spec_report",)

NewMachine = Callable[..., Machine]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --real, --exec and --tcg."""
    parser.addoption("--real", action="store_true", help="also test the real /dev/kvm, as the reference")
    parser.addoption(
        "--exec", action="store_true", help="only ABI tests, in here: under `pykvm exec -- pytest`"
    )
    parser.addoption("--tcg", action="store_true", help="compare guests with QEMU's TCG (tests/guest)")


def pytest_configure() -> None:
    """Have SIGINT: who is started in the background has it ignored, and so would the programs of tests."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what uses `backend` on pykvm, and with --real on the kernel's device."""
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", _backends(metafunc.config), indirect=True)


def _backends(config: pytest.Config) -> list[str]:
    if config.getoption("--exec"):
        if "libpykvm-preload" not in os.environ.get("LD_PRELOAD", ""):
            raise pytest.UsageError("--exec is for a pytest that `pykvm exec` runs")
        return ["exec"]
    return ["pykvm", "real"] if config.getoption("--real") else ["pykvm"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --exec, leave out what does not say where its device is."""
    if config.getoption("--exec"):
        left_out = [item for item in items if "backend" not in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Backend:
    """Return where the device is."""
    return Backend(request.param)


@pytest.fixture
def new_machine(backend: Backend) -> Iterator[NewMachine]:
    """Return a function that makes a VM with one vCPU and memory; it goes with the test."""
    machines: list[Machine] = []

    def make(**options: object) -> Machine:
        machines.append(Machine(backend, **options))  # type: ignore[arg-type]
        return machines[-1]

    yield make
    for machine in machines:
        machine.close()


@pytest.fixture
def machine(new_machine: NewMachine) -> Machine:
    """Return a VM with one vCPU and 64 KiB of memory."""
    return new_machine()
