"""`python -m tests.docs`: write the generated parts of README.md and docs/ anew; a test compares them."""

from __future__ import annotations

import re
from pathlib import Path

from pykvm import doc

ROOT = Path(__file__).parents[1]


def parts() -> dict[str, tuple[str, str]]:
    """Return file, name of the markers, and what belongs between them."""
    return {
        "docs/ioctls.md": ("ioctls", doc.markdown(doc.ioctl_rows(), doc.HEAD)),
        "docs/insns.md": ("insns", doc.markdown(doc.insn_rows(), doc.INSN_HEAD)),
        "docs/profiles.md": ("profiles", doc.profiles()),
        "README.md": ("status", doc.summary()),
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
    for name, (marker, text) in parts().items():
        path = ROOT / name
        old = path.read_text()
        markers = f"<!-- {marker} -->\n", f"<!-- end {marker} -->"
        path.write_text(old.replace(between_markers(old, marker).join(markers), text.join(markers)))


if __name__ == "__main__":
    main()
