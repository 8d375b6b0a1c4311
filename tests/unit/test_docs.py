"""Generated documentation is what its source says now."""

from __future__ import annotations

import re
from pathlib import Path

from pykvm import doc

ROOT = Path(__file__).parents[2]


def between_markers(text: str, name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- end {name} -->", text, re.DOTALL)
    assert found, f"no markers of {name}"
    return found[1]


def test_ioctl_table() -> None:
    """When this fails: `pykvm ioctls --markdown`, between the markers of docs/ioctls.md."""
    text = (ROOT / "docs" / "ioctls.md").read_text()
    assert between_markers(text, "ioctls") == doc.markdown(doc.ioctl_rows(), doc.HEAD)


def test_instruction_table() -> None:
    """When this fails: `pykvm insns --markdown`, between the markers of docs/insns.md."""
    text = (ROOT / "docs" / "insns.md").read_text()
    assert between_markers(text, "insns") == doc.markdown(doc.insn_rows(), doc.INSN_HEAD)


def test_readme_status() -> None:
    """When this fails: the line of `doc.summary()`, between the markers of README.md."""
    assert between_markers((ROOT / "README.md").read_text(), "status") == doc.summary()


def test_readme_example_is_the_example_that_is_tested() -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code
    assert code[1] == (ROOT / "examples" / "hello.py").read_text()
