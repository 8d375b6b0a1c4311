"""Snapshots as one HTML page that needs nothing else: tables side by side, reverse map, changes.

page.html is the page without its data: it decodes and draws.  Here the data is only packed: every table
once, its 4096 bytes as they are, all of them compressed; and everything else as JSON.
"""

from __future__ import annotations

import base64
import json
import zlib
from importlib import resources
from typing import TYPE_CHECKING

from pykvm.mmu import spte as sptes
from pykvm.mmu import walk
from pykvm.mmu.view import GPTE_BITS, SPTE_BITS

if TYPE_CHECKING:
    from pykvm.mmu.pages import Role
    from pykvm.mmu.snapshot import GuestTable, Snapshot, VcpuView
    from pykvm.mmu.view import PageView

DATA, TABLES = "/*DATA*/null", "/*TABLES*/"
# The page is written while somebody waits: mostly empty tables compress well at any level.
_ZLIB_LEVEL = 1


def html(after: Snapshot, before: Snapshot | None = None, title: str = "") -> str:
    """Return the page that draws a snapshot, and what changed since an earlier one if there is one."""
    packed = _Packed()
    data = {
        "title": title,
        "mode": after.mode,
        "before": None if before is None else packed.moment(before),
        "after": packed.moment(after),
        "roles": packed.roles,
        "spteBits": [[name, bit.bit_length() - 1] for bit, name in SPTE_BITS],
        "gpteBits": [[name, bit.bit_length() - 1] for bit, name in GPTE_BITS],
        "spte": {
            "present": sptes.R,
            "large": sptes.PS,
            "rwx": sptes.RWX,
            "mmio": sptes.MMIO_VALUE,
            "writable": sptes.W,
        },
        "gpte": {"present": walk.PRESENT, "large": walk.LARGE},
    }
    text = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    template = resources.files("pykvm.mmu").joinpath("page.html").read_text(encoding="utf-8")
    return template.replace(DATA, text, 1).replace(TABLES, packed.tables(), 1)


class _Packed:
    """Tables by number, each content once, and roles by number."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}
        self._roles: dict[Role, int] = {}
        self.roles: list[dict[str, object]] = []

    def tables(self) -> str:
        """Return all tables, deflated, in base 64."""
        squeezer = zlib.compressobj(_ZLIB_LEVEL)
        pieces = [squeezer.compress(table) for table in self._numbers]
        return base64.b64encode(b"".join([*pieces, squeezer.flush()])).decode("ascii")

    def _number(self, table: bytes | None) -> int:
        return -1 if table is None else self._numbers.setdefault(table, len(self._numbers))

    def _role(self, role: Role) -> int:
        number = self._roles.get(role)
        if number is None:
            number = self._roles[role] = len(self.roles)
            form = role.format
            fields: dict[str, object] = {
                **role._asdict(),
                "format": None,
                "text": str(role),
                "bytes": 0 if form is None else form.entry_bytes,
            }
            self.roles.append(fields)
        return number

    def moment(self, snapshot: Snapshot) -> dict[str, object]:
        """Return what JSON holds of a snapshot."""
        return {
            "seconds": snapshot.seconds,
            "pages": [self._page(page) for page in snapshot.pages],
            "tables": [self._table(table) for table in snapshot.guest_tables],
            "vcpus": [_vcpu(vcpu) for vcpu in snapshot.vcpus],
            "slots": snapshot.slots,
            "stat": dict(snapshot.stat),
        }

    def _page(self, page: PageView) -> list[object]:
        return [
            page.gfn,
            self._role(page.role),
            page.spt,
            page.root_count,
            int(page.unsync),
            page.unsync_children,
            [number for parent in page.parents for number in parent],
            self._number(page.table),
            self._number(page.recorded),
        ]

    def _table(self, table: GuestTable) -> list[int]:
        return [table.as_id, table.gfn, table.level, table.entry_bytes, self._number(table.table)]


def _vcpu(vcpu: VcpuView) -> dict[str, object]:
    mode = vcpu.paging.mode
    form = mode.format
    return {
        "id": vcpu.id,
        "as": vcpu.as_id,
        "registers": {name: f"{getattr(vcpu, name):#x}" for name in ("rip", "cr0", "cr3", "cr4", "efer")},
        "level": form.root_level,
        "bytes": form.entry_bytes,
        "bits": form.index_bits,
        "pse": form.pse,
        "root": form.table(vcpu.paging.cr3),
        "pdptrs": [form.table(p) if p & walk.PRESENT else None for p in vcpu.paging.pdptrs],
        "rules": [name for name in ("wp", "smep", "smap") if getattr(mode, name)] + ["nx"] * form.nx,
        "roots": [[root.level, root.tables, f"{root.cr3:#x}"] for root in vcpu.roots],
    }
