"""The arrows of the house: who may import whom (design.md §1)."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "pykvm"

# A module may import its own layer and those named here.
ALLOWED = {
    "abi": set(),
    "trace": {"abi"},
    "fd": {"abi", "trace"},
    "cpu": {"abi"},
    "irq": {"abi"},
    "mmu": {"abi", "cpu", "trace"},
    "kvm": {"abi", "fd", "cpu", "mmu", "irq", "trace"},
    "doc": {"abi", "kvm"},
    "device": {"abi", "fd", "kvm", "mmu"},
    "client": {"abi", "device"},
    "run": {"abi", "client"},
    "preload": {"abi", "fd", "trace", "kvm", "device", "mmu"},
}


def _modules() -> list[tuple[str, Path]]:
    files = sorted(PACKAGE.rglob("*.py"))
    named = [(".".join(f.relative_to(ROOT).with_suffix("").parts), f) for f in files]
    return [(n.removesuffix(".__init__"), f) for n, f in named]


def _type_checking_lines(tree: ast.Module) -> set[int]:
    """Lines inside `if TYPE_CHECKING:`: they import nothing when the program runs."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def imports(path: Path) -> set[str]:
    """Return the pykvm modules a file imports at run time."""
    tree = ast.parse(path.read_text())
    skipped = _type_checking_lines(tree)
    found: set[str] = set()
    for node in ast.walk(tree):
        if getattr(node, "lineno", 0) in skipped:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module == "pykvm":
                found.update(f"pykvm.{alias.name}" for alias in node.names)
    return {name for name in found if name.startswith("pykvm.")}


@pytest.mark.parametrize(("module", "path"), _modules(), ids=lambda v: v if isinstance(v, str) else "")
def test_imports_follow_the_arrows(module: str, path: Path) -> None:
    parts = module.split(".")
    if len(parts) == 1 or parts[1] == "__main__":
        return  # the façade and the command line may see everything
    layer = parts[1]
    assert layer in ALLOWED, f"{module}: a new layer needs a row in ALLOWED"
    for name in imports(path):
        target = name.removeprefix("pykvm.")
        top = target.split(".")[0]
        ok = (
            top == layer
            or top in ALLOWED[layer]
            or any(target == a or target.startswith(a + ".") for a in ALLOWED[layer])
        )
        assert ok, f"{module} imports {name}"


def test_the_core_knows_no_policy() -> None:
    """C names no memslot, ioctl or KVM_EXIT: the processor is policy-free."""
    word = re.compile(r"\b(memslot\w*|KVM_EXIT\w*|KVM_RUN|ioctl)\b")
    for path in sorted((PACKAGE / "cpu").glob("*.[ch]")):
        code = re.sub(r"/\*.*?\*/|//[^\n]*", "", path.read_text(), flags=re.DOTALL)
        assert not word.search(code), f"{path.name}: {word.search(code)}"


def test_the_core_includes_only_the_contract() -> None:
    """C includes libc, include/pykvm and its own private headers."""
    for path in sorted((PACKAGE / "cpu").glob("*.[ch]")):
        for name in re.findall(r'#include "([^"]+)"', path.read_text()):
            assert name in {"pykvm/cpu.h", "pykvm/x86.h"} or (PACKAGE / "cpu" / name).exists(), (
                f"{path.name} includes {name}"
            )
