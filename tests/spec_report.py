"""`pytest --spec-report`: which rows of the x86 KVM surface have a test (plugin, see conftest.py).

Rows are in tests/spec/features.json with their tier: S named by the seeds, 1 boots Linux under
today's VMMs, 2 devices, migration and debugging, 3 the rest, X obsolete.
"""

from __future__ import annotations

import json
import tomllib
from collections import defaultdict
from pathlib import Path
from typing import TypedDict

import pytest

SPEC = Path(__file__).parent / "spec"
ROWS, ABSENT = SPEC / "features.json", SPEC / "absent.toml"
TIERS = ("S", "1", "2", "3", "X")


class Row(TypedDict):
    """One line of features.json."""

    id: str
    area: str
    tier: str
    title: str
    file: str


def load_rows() -> dict[str, Row]:
    """Return all rows by id."""
    rows: list[Row] = json.loads(ROWS.read_text())
    return {row["id"]: row for row in rows}


def load_absent() -> dict[str, str]:
    """Return why no test proves a row of tiers S, 1 or 2, by its id."""
    return {
        row: group["why"] for group in tomllib.loads(ABSENT.read_text())["absent"] for row in group["rows"]
    }


def absent_table() -> str:
    """Return those rows as a table, as docs/processor.md and others have them."""
    rows = load_rows()
    lines = ["| row | tier | what | why no test proves it |", "|---|---|---|---|"]
    for name, why in load_absent().items():
        lines.append(f"| {name} | {rows[name]['tier']} | {rows[name]['title'].replace('|', '/')} | {why} |")
    return "\n".join(lines) + "\n"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --spec-report."""
    parser.addoption("--spec-report", action="store_true", help="list the spec rows that have a test")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Check every `spec` marker against the list of rows; remember who covers what."""
    rows = load_rows()
    covered: dict[str, list[str]] = defaultdict(list)
    for item in items:
        for marker in item.iter_markers("spec"):
            for row in marker.args:
                if row not in rows:
                    message = f"{item.nodeid}: no spec row {row!r}"
                    raise pytest.UsageError(message)
                covered[row].append(item.nodeid)
    config.stash[_COVERED] = dict(covered)


def pytest_collection_finish(session: pytest.Session) -> None:
    """With --spec-report print the table and run nothing."""
    if not session.config.getoption("--spec-report"):
        return
    print(report(session.config.stash[_COVERED]))
    session.items.clear()


def report(covered: dict[str, list[str]]) -> str:
    """Return the rows with a test, by area, and how many of each tier there are."""
    rows = load_rows()
    lines = []
    area = ""
    for row in rows.values():
        if row["id"] not in covered:
            continue
        if row["area"] != area:
            area = row["area"]
            lines.append(f"\n{area}")
        tests = covered[row["id"]]
        lines.append(f"  {row['tier']}  {row['id']:34} {row['title'][:48]:48} {len(tests):3} tests")
    lines.append("\ntier  rows  with a test")
    for tier in TIERS:
        of_tier = [row["id"] for row in rows.values() if row["tier"] == tier]
        lines.append(f"{tier:4}  {len(of_tier):4}  {sum(row in covered for row in of_tier):4}")
    return "\n".join(lines)


_COVERED = pytest.StashKey[dict[str, list[str]]]()
