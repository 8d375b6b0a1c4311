"""A distribution's user space, and the kernel's own tests, on pykvm: ``python -m tests.clients.linux_userland``.

Boots Debian's kernel as linux_boot does, with every feature of the processor (-cpu max), and then

    kernel     loads the kernel's modules of algorithms and tests: ciphers and digests in AES, SHA, AVX and
               AVX2 instructions, which the kernel compares with its portable ones before it takes them, the
               BPF compiler's test suite, RAID 6, user access
    workload   runs workload.py with this machine's Python and OpenSSL, in the guest and here: every line has
               to be the same
    script     runs workload.js with this machine's node, if there is one: a just-in-time compiler

Exit status: 0 all is well, 1 something is not, 2 cannot run.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.clients.guests import MODULES, CannotRunError, Initramfs, fetch
from tests.clients.linux_boot import BOOT_TIMEOUT, MACHINES, PROMPT, Machine, exit_status, is_trouble, start
from tests.clients.qemu import Console, is_there, kernel_messages

HERE = Path(__file__).parent
PYTHON = Path("/usr/bin/python3")
TIMEOUT = 900
# Modules that are there to make errors, or that want more than we have.
_LEFT_OUT = {"tcrypt", "crypto_user", "test_firmware"}
_FAILED = re.compile(r"alg: .*(fail|mismatch)|[1-9]\d* FAILED|FAIL \(|test_\w+: .* failed")


def kernel_tests(machine: Machine) -> bool:
    """Load the kernel's modules in a guest; print what fails."""
    names = [path.stem for path in sorted(MODULES.rglob("*.ko"))]
    wanted = [name for name in names if name not in _LEFT_OUT and "error-inject" not in name]
    archive = Initramfs()
    for path in MODULES.rglob("*"):
        if path.is_file():
            archive.copy(path, f"lib/modules/{path.relative_to(MODULES)}")
    lines = ["depmod", *(f"modprobe {name} || echo refused: {name}" for name in wanted), "echo all loaded"]
    archive.file("load", "\n".join(lines).encode() + b"\n")
    with start("pykvm", machine, archive.write("modules.cpio"), megabytes=1024) as console:
        text = _ask(console, "sh /load", "all loaded")
    trouble = re.findall(r"^refused: .*", text, re.MULTILINE)
    trouble += [line for line in kernel_messages(text) if is_trouble(line) or _FAILED.search(line)]
    passed = re.findall(r"Summary: (\d+) PASSED", text)
    print(f"kernel: {len(wanted)} modules loaded, test_bpf passed {' + '.join(passed)} tests")
    for line in trouble:
        print(f"  {line}")
    return not trouble and len(passed) > 1


def workload(machine: Machine) -> bool:
    """Run the Python workload in a guest and here; print what is different."""
    if not PYTHON.exists() or shutil.which("openssl") is None:
        raise CannotRunError("the workload needs Debian's python3 and openssl")
    program = PYTHON.resolve()
    archive = Initramfs()
    library = Path("/usr/lib") / program.name
    for path in (Path(shutil.which("openssl") or ""), *library.glob("lib-dynload/*.so")):
        archive.program(path)
    for path in library.rglob("*.py"):
        if not {"test", "idlelib", "lib2to3", "dist-packages"} & set(path.parts):
            archive.copy(path)
    for path in (Path("/etc/ssl/openssl.cnf"), Path("/usr/lib/ssl/openssl.cnf")):
        if path.exists():
            archive.copy(path)
    return _same_in_a_guest("workload", machine, archive, program, HERE / "workload.py")


def script(machine: Machine) -> bool:
    """Run the JavaScript workload in a guest and here; print what is different."""
    node = shutil.which("node")
    if node is None:
        print("script: left out, there is no node here")
        return True
    return _same_in_a_guest("script", machine, Initramfs(), Path(node), HERE / "workload.js")


def _same_in_a_guest(name: str, machine: Machine, archive: Initramfs, program: Path, source: Path) -> bool:
    """Run a program with a source file in a guest and here; say if it prints the same."""
    done = subprocess.run([program, source], capture_output=True, text=True, check=True)
    archive.program(program)
    archive.copy(source, source.name)
    with start("pykvm", machine, archive.write("userland.cpio"), megabytes=1536) as console:
        text = _ask(console, f"{program} /{source.name}; echo end of it", "\nend of it")
    expected, printed = done.stdout.splitlines(), set(text.splitlines())
    different = [line for line in expected if line not in printed]
    print(f"{name}: {len(expected)} results")
    for line in different:
        print(f"  not in the guest: {line}")
    if different:
        print(text[text.index(f"/{source.name}") :][-3000:])
    return not different


def _ask(console: Console, line: str, end: str) -> str:
    console.expect(PROMPT, BOOT_TIMEOUT)
    console.send(line)
    console.expect(end, TIMEOUT)
    console.expect(PROMPT, BOOT_TIMEOUT)
    return console.text


PARTS = {"kernel": kernel_tests, "workload": workload, "script": script}


def run(parts: list[str], machine: Machine) -> bool:
    """Run the parts named."""
    fetch()
    if not is_there():
        raise CannotRunError("qemu-system-x86_64 is not installed")
    results = [PARTS[part](machine) for part in parts]
    return all(results)


def main() -> int:
    """Take the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.clients.linux_userland", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default: all")
    parser.add_argument("--no-tdp", action="store_true", help="on shadow paging")
    arguments = parser.parse_args()
    parts, machine = arguments.parts, MACHINES["max"]
    if arguments.no_tdp:
        machine = machine._replace(extensions=("no-tdp",))
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}")
    return exit_status(lambda: run(parts or list(PARTS), machine))


if __name__ == "__main__":
    sys.exit(main())
