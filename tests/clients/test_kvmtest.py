"""examples/kvmtest.c, an unmodified C client, prints under `pykvm exec` what it prints on a real KVM.

`kvmtest.expected` is the output of `./kvmtest` on Linux 6.18 (kvm_pvm); `kvmtest-whole-cpu.expected`,
for the tests that device's instruction emulator cannot run, is written from the SDM, the APM and KVM's
sources. The head of kvmtest.c says how each came to be.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "examples" / "kvmtest.c"


def expected() -> dict[str, str]:
    """The expected output by test: each line starts with its test's name and a dot."""
    out: dict[str, str] = {}
    for name in ("kvmtest.expected", "kvmtest-whole-cpu.expected"):
        for line in (HERE / name).read_text().splitlines(keepends=True):
            test = line.split(".", 1)[0]
            out[test] = out.get(test, "") + line
    return out


EXPECTED = expected()


@pytest.fixture(scope="session")
def kvmtest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """kvmtest built as its README says, with warnings as errors."""
    cc = shutil.which("cc")
    assert cc is not None, "building a C client needs a C compiler"
    path = tmp_path_factory.mktemp("kvmtest") / "kvmtest"
    flags = ["-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread"]
    subprocess.run([cc, *flags, "-o", path, SOURCE], check=True)
    return path


def run_under_pykvm(kvmtest: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pykvm", "exec", "--", str(kvmtest), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_every_test_has_an_expectation(kvmtest: Path) -> None:
    listed = subprocess.run([kvmtest, "-l"], capture_output=True, text=True, check=True).stdout
    assert {line.split()[0] for line in listed.splitlines()} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_prints_the_same_as_on_a_real_kvm(kvmtest: Path, name: str) -> None:
    done = run_under_pykvm(kvmtest, name)
    assert done.stdout == EXPECTED[name], done.stderr
    assert done.returncode == 0, done.stderr


def test_all_in_one_process(kvmtest: Path) -> None:
    """One process after another machine: nothing of a VM leaks into the next."""
    done = run_under_pykvm(kvmtest)
    assert done.stdout == (HERE / "kvmtest.expected").read_text(), done.stderr
    assert done.returncode == 0, done.stderr


def test_unknown_test_is_a_usage_error(kvmtest: Path) -> None:
    done = run_under_pykvm(kvmtest, "no-such-test")
    assert done.returncode == 2
    assert "no-such-test" in done.stderr
