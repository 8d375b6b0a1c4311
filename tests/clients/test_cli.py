"""The command line as a user meets it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKSUM = "0x185f2e107cafeb29"  # of 20 million iterations, from an independent C program


def pykvm(*args: str, timeout: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line, output piped: plain text."""
    command = [sys.executable, "-m", "pykvm", *args]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout, env=env)


def boot_sector(tmp_path: Path, code: str) -> str:
    image = tmp_path / "boot.bin"
    image.write_bytes(bytes.fromhex(code))
    return str(image)


@pytest.mark.parametrize("options", [(), ("--no-tdp",)])
def test_run_boots_the_guest_of_the_package(options: tuple[str, ...]) -> None:
    done = pykvm("run", *options)
    assert done.returncode == 0, done.stderr
    for line in (
        "hello from real mode",
        "hello from protected mode",
        "hello from long mode on GenuineIntel",
        "interrupt 0x30 by INT: taken",
        "interrupt 0x20 from the host: taken",
        f"checksum {CHECKSUM}",
    ):
        assert line in done.stdout
    assert "MIPS" in done.stdout
    assert "\x1b" not in done.stdout, "no colours when piped"


def test_switches_come_from_the_environment_too(tmp_path: Path) -> None:
    # xor eax, eax; cpuid; mov al, bl; out 0xe9, al; mov al, 5; out 0xf4, al
    image = boot_sector(tmp_path, "6631c0 0fa2 88d8 e6e9 b005 e6f4")
    for cpu, first in (("skylake", "G"), ("epyc", "A")):
        done = pykvm("run", image, PYKVM_NO_TDP="1", PYKVM_CPU=cpu)
        assert done.stdout.startswith(f"{first}\n"), done.stderr
    done = pykvm("exec", "--", "env", PYKVM_NO_TDP="1", PYKVM_KERNEL="5.10")
    assert "PYKVM_EXEC_EXTENSIONS=no-tdp\n" in done.stdout
    assert "PYKVM_EXEC_KERNEL=5.10\n" in done.stdout


def test_run_json() -> None:
    done = pykvm("run", "--json")
    result = json.loads(done.stdout)
    assert result["end"] == "halted"
    assert result["exits"]["HLT"] == 1
    assert result["instructions"] > 100_000_000
    assert result["mips"] > 0
    assert CHECKSUM in result["console"]


def test_run_a_boot_sector(tmp_path: Path) -> None:
    # mov al, 'x'; out 0xe9, al; mov al, 5; out 0xf4, al
    done = pykvm("run", boot_sector(tmp_path, "b078 e6e9 b005 e6f4"))
    assert done.stdout.startswith("x\n")
    assert done.returncode == 5 << 1 | 1, "as QEMU's isa-debug-exit"


def test_run_an_elf_file(tmp_path: Path) -> None:
    source = tmp_path / "guest.S"
    source.write_text(
        ".globl _start\n_start: movabs $0x123456789a, %rax; shr $32, %rax; add $'A', %al; "
        "sub $0x12, %al; outb %al, $0xe9; hlt\n",
    )
    elf = tmp_path / "guest.elf"
    link = ["cc", "-nostdlib", "-static", "-Wl,-Ttext=0x100000,--build-id=none", "-o", str(elf), str(source)]
    subprocess.run(link, check=True)
    done = pykvm("run", str(elf))
    assert done.stdout.startswith("A\n"), done
    assert done.returncode == 0


def test_run_reports_a_guest_that_fails(tmp_path: Path) -> None:
    done = pykvm("run", boot_sector(tmp_path, "0f011e107c 0f0b" + "00" * 20))  # lidt of nothing; ud2
    assert "triple fault" in done.stdout
    assert done.returncode == 1


@pytest.mark.parametrize("code", ["e680 ebfc", "ebfe"], ids=["exits", "no exits"])
def test_run_stops_at_its_timeout(tmp_path: Path, code: str) -> None:
    # 1: out 0x80, al; jmp 1b
    done = pykvm("run", "--timeout", "0.2", boot_sector(tmp_path, code), timeout=30)
    assert "timeout" in done.stdout
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "No such file"),
        (b"", "empty file"),
        (b"\x7fELF\2\1\1" + bytes(9), "truncated ELF"),
        (b"\x7fELF\2\1\1" + bytes(11) + b"\xb7\0" + bytes(60), "is not x86"),
    ],
)
def test_bad_images_get_one_clear_line(tmp_path: Path, data: bytes | None, message: str) -> None:
    image = tmp_path / "image"
    if data is not None:
        image.write_bytes(data)
    done = pykvm("run", str(image))
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_device_that_is_not_there() -> None:
    done = pykvm("run", "--device", "/nonexistent")
    assert done.returncode == 1
    assert "No such file" in done.stderr


@pytest.mark.parametrize("verb", ["run", "caps"])
def test_a_device_that_is_not_kvm(verb: str) -> None:
    done = pykvm(verb, "--device", "/dev/null")
    assert done.returncode == 1
    assert done.stderr == "Error: /dev/null: Inappropriate ioctl for device\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "--device", "/dev/null", "--cpu", "epyc"), "need the fake device"),
        (("run", "--device", "/dev/null", "--no-tdp"), "need the fake device"),
        (("caps", "--device", "/dev/null", "--kernel", "5.10"), "need the fake device"),
        (("run", "--mmu-at", "1"), "--mmu-at needs --mmu"),
        (("run", "--mmu", "/nowhere/x.html"), "nothing can be written to /nowhere"),
        (("exec", "--mmu-at", "1", "--", "true"), "--mmu-at needs --mmu"),
        (("exec", "--bogus", "true"), "No such option"),
    ],
)
def test_options_that_do_not_go_together(arguments: tuple[str, ...], message: str) -> None:
    done = pykvm(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_options_behind_the_program_are_its_own() -> None:
    assert pykvm("exec", "echo", "--no-tdp", "--help").stdout == "--no-tdp --help\n"


def test_tables() -> None:
    assert "KVM_RUN " in pykvm("ioctls").stdout
    assert pykvm("ioctls", "--markdown").stdout.startswith("| ioctl |")
    assert "KVM_CAP_USER_MEMORY" in pykvm("caps").stdout
    assert "cmpxchg" in pykvm("insns").stdout


def test_doctor() -> None:
    assert pykvm("doctor", sys.executable).returncode == 0
    missing = pykvm("doctor", "/nonexistent")
    assert missing.returncode == 1
    assert "/nonexistent" in missing.stdout


def test_doctor_knows_a_program_beside_it_that_is_not_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vmm").symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path)
    assert pykvm("doctor", "vmm").stdout == "vmm: it is not on PATH; say ./vmm\n"
