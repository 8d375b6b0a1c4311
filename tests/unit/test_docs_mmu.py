"""docs/mmu.md names functions: they exist, and run in the order it says."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import pykvm.kvm
import pykvm.mmu
from pykvm import trace, uapi
from tests.docs import ROOT
from tests.mmu import walkthrough

PAGE = ROOT / "docs" / "mmu.md"
_MODULES = [
    importlib.import_module(f"{package.__name__}.{info.name}")
    for package in (pykvm.mmu, pykvm.kvm)
    for info in pkgutil.iter_modules(package.__path__)
] + [importlib.import_module("pykvm.abi")]
_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)?")


def _prose() -> str:
    """The page without its code blocks."""
    return re.sub(r"```.*?```|^    .*$", "", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)


def _resolves(name: str) -> bool:
    first, _, attribute = name.partition(".")
    if first == "trace" and attribute:
        return hasattr(trace, attribute)
    for module in _MODULES:
        found = getattr(module, first, None)
        if found is None:
            continue
        if not attribute:
            return True
        if hasattr(found, attribute) or attribute in getattr(found, "__annotations__", {}):
            return True
        # Set in __init__, of the class or of one it is made of.
        if inspect.isclass(found) and any(
            re.search(rf"self\.{attribute}\b.* = ", inspect.getsource(c)) for c in found.__mro__[:-1]
        ):
            return True
    return False


NAMES = sorted({name for name in re.findall(r"`([^`]+)`", _prose()) if _NAME.fullmatch(name)})


def test_there_are_names() -> None:
    assert len(NAMES) > 90


@pytest.mark.parametrize("name", NAMES)
def test_a_name_in_the_page_is_there(name: str) -> None:
    if name in {"gla", "at", "sort"}:  # a variable's name; a word of the output; a program
        return
    assert hasattr(uapi, name) or name in trace.TRACEPOINTS or _resolves(name)


def test_other_things_in_backticks_are_files_or_command_lines() -> None:
    for thing in re.findall(r"`([^`]+)`", _prose()):
        if _NAME.fullmatch(thing) or thing == "this type":
            continue
        if "/" in thing and " " not in thing:
            assert Path(ROOT / thing).exists(), thing
        else:
            assert re.match(r"pykvm |Kvm\(|vm\.|PYKVM_TRACE=|#gva=", thing), thing


WALKS = re.findall(r"<!-- walk: (\w+) -->\n(.*?)<!-- end walk -->", PAGE.read_text(), flags=re.DOTALL)


def test_every_walk_is_there() -> None:
    assert [name for name, _ in WALKS] == ["tdp", *walkthrough.SHOWN]


@pytest.mark.parametrize(("step", "prose"), WALKS, ids=[name for name, _ in WALKS])
def test_functions_run_in_the_order_the_page_says(step: str, prose: str) -> None:
    """What is in parentheses explains: it has run, too, but at a time of its own."""
    calls = walkthrough.steps()[step].calls
    assert set(re.findall(r"`([\w.]+)`", prose)) <= set(calls)
    at = 0
    for name in re.findall(r"`([\w.]+)`", re.sub(r"\([^)]*\)", "", prose)):
        assert name in calls[at:], f"{name} is called earlier"
        at = calls.index(name, at)
