"""`python -m tests.docs`: write the generated parts of README.md and docs/ anew; a test compares them."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pykvm import doc
from tests.mmu import walkthrough
from tests.spec_report import absent_table

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[1]


def parts() -> dict[tuple[str, str], Callable[[], str]]:
    """Return what belongs where, by file and name of the markers."""
    walks = ("tdp", *walkthrough.SHOWN)
    return {
        ("docs/ioctls.md", "ioctls"): lambda: doc.markdown(doc.ioctl_rows(), doc.HEAD),
        ("docs/capabilities.md", "capabilities"): lambda: doc.markdown(doc.cap_rows(), doc.CAP_HEAD),
        ("docs/exits.md", "exits"): lambda: doc.markdown(doc.exit_rows(), doc.EXIT_HEAD),
        ("docs/insns.md", "insns"): lambda: doc.markdown(doc.insn_rows(), doc.INSN_HEAD),
        ("docs/profiles.md", "profiles"): doc.profiles,
        ("docs/conformance.md", "rows"): absent_table,
        ("README.md", "status"): doc.summary,
        **{("docs/mmu.md", name): partial(walkthrough.text, name) for name in walks},
    }


def between_markers(text: str, name: str) -> str:
    """Return what stands between a pair of markers."""
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- end {name} -->", text, re.DOTALL)
    if found is None:
        msg = f"no markers of {name}"
        raise ValueError(msg)
    return found[1]


def main() -> None:
    """Replace what stands between the markers."""
    for (name, marker), text in parts().items():
        path = ROOT / name
        old = path.read_text()
        markers = f"<!-- {marker} -->\n", f"<!-- end {marker} -->"
        path.write_text(old.replace(between_markers(old, marker).join(markers), text().join(markers)))


if __name__ == "__main__":
    main()
