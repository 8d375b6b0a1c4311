"""Each row of the surface in tiers S, 1 and 2 is proved by a test, or listed with the reason why not."""

from __future__ import annotations

import re
from pathlib import Path

from tests.spec_report import load_absent, load_rows

MARKER = re.compile(r"\bmark\.spec\(([^)]*)\)")


def marked() -> set[str]:
    tests = Path(__file__).parents[1]
    markers = (found[1] for path in tests.rglob("test_*.py") for found in MARKER.finditer(path.read_text()))
    return {row for marker in markers for row in re.findall(r'"([^"]+)"', marker)}


def test_every_row_is_proved_or_listed() -> None:
    wanted = {row["id"] for row in load_rows().values() if row["tier"] in {"S", "1", "2"}}
    assert wanted - marked() == set(load_absent())
