"""Generated documentation is what its source says now."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs import ROOT, between_markers, parts


@pytest.mark.parametrize(("name", "marker"), parts())
def test_generated(name: str, marker: str) -> None:
    """When this fails: `python -m tests.docs`."""
    assert between_markers((ROOT / name).read_text(), marker) == parts()[name, marker]()


def test_readme_example_is_the_example_that_is_tested() -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code
    assert code[1] == Path(ROOT / "examples" / "hello.py").read_text()
