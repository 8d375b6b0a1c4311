"""Shadow pages: the tables the processor walks, and what we know about each of them."""

from __future__ import annotations

import dataclasses
from errno import ENOMEM
from typing import TYPE_CHECKING

from pykvm.abi import CData, Gfn, ffi, lib
from pykvm.abi.errors import KvmError
from pykvm.mmu import spte as sptes
from pykvm.mmu.walk import ACC_ALL

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclasses.dataclass(frozen=True, slots=True)
class Role:
    """What makes two shadow pages of one frame different (union kvm_mmu_page_role)."""

    level: int
    direct: bool = True
    smm: bool = False
    quadrant: int = 0
    access: int = ACC_ALL
    has_4_byte_gpte: bool = False
    efer_nx: bool = False
    cr0_wp: bool = False
    smep_andnot_wp: bool = False
    smap_andnot_wp: bool = False


class MmuPage:
    """One table: 512 real sptes the processor reads, and its bookkeeping (struct kvm_mmu_page)."""

    __slots__ = (
        "accesses",
        "gfn",
        "gfns",
        "invalid",
        "parents",
        "role",
        "root_count",
        "spt",
        "spt_addr",
        "unsync",
        "unsync_child_bitmap",
        "unsync_children",
        "write_flooding_count",
    )

    def __init__(self, gfn: Gfn, role: Role) -> None:
        """Allocate an empty table that covers frames from `gfn` on, or shadows the table in `gfn`."""
        self.gfn = gfn
        self.role = role
        self.root_count = 0
        # (page, index) of every entry that points here (parent_ptes).
        self.parents: set[tuple[MmuPage, int]] = set()
        # Frame and rights behind each entry; direct pages need none (shadowed_translation).
        self.gfns: list[int] | None = None
        self.accesses = bytearray()
        self.unsync = False
        self.unsync_children = 0
        self.unsync_child_bitmap = 0
        self.write_flooding_count = 0
        self.invalid = False
        self.spt: CData = lib.spt_alloc()
        if not self.spt:
            raise KvmError(ENOMEM, "no memory for a shadow page")
        self.spt_addr = int(ffi.cast("uintptr_t", self.spt))

    def free(self) -> None:
        """Give the table back; no processor may be able to reach it any more."""
        lib.spt_free(self.spt)
        self.spt = ffi.NULL

    def sptep(self, gfn: int) -> CData:
        """Return the entry that covers the frame (in a shadow page: the linear page)."""
        return self.spt + sptes.index(gfn, self.role.level)

    def entries(self) -> list[int]:
        """Return a copy of all entries."""
        return memoryview(ffi.buffer(self.spt, 4096)).cast("Q").tolist()

    def shadowed_gfn(self, index: int) -> int:
        """Return the frame entry `index` maps: recorded, or following from the page's own."""
        if self.gfns is not None:
            return self.gfns[index]
        return self.gfn + (index << sptes.PT64_LEVEL_BITS * (self.role.level - 1))

    def set_shadowed(self, index: int, gfn: int, access: int) -> None:
        """Record what entry `index` maps."""
        if self.gfns is not None:
            self.gfns[index] = gfn
            self.accesses[index] = access


class PageTable:
    """All shadow pages of a VM: the active list, the hash by frame, and the way back from a table."""

    def __init__(self) -> None:
        """Start without pages."""
        # Insertion order is age: active_mmu_pages. Keys are table addresses: page->private.
        self._by_spt: dict[int, MmuPage] = {}
        self._hash: dict[int, list[MmuPage]] = {}
        # Unlinked, but a processor may still be walking them until it has flushed.
        self._zapped: list[MmuPage] = []

    def __len__(self) -> int:
        """Return n_used_mmu_pages."""
        return len(self._by_spt)

    def __iter__(self) -> Iterator[MmuPage]:
        """Walk active_mmu_pages, oldest first."""
        return iter(tuple(self._by_spt.values()))

    def alloc(self, gfn: Gfn, role: Role) -> MmuPage:
        """Return a new empty page."""
        page = MmuPage(gfn, role)
        self._by_spt[page.spt_addr] = page
        self._hash.setdefault(gfn, []).append(page)
        return page

    def of_gfn(self, gfn: Gfn) -> tuple[MmuPage, ...]:
        """Return the pages that shadow the frame, of whatever role (mmu_page_hash)."""
        return tuple(self._hash.get(gfn, ()))

    def child(self, spte: int) -> MmuPage:
        """Return the page a non-leaf entry points to."""
        return self._by_spt[spte & sptes.PFN_MASK]

    def remove(self, page: MmuPage, *, pinned: bool = False) -> None:
        """Take a zapped page out of list and hash; it is freed unless a root still pins it."""
        del self._by_spt[page.spt_addr]
        pages = self._hash[page.gfn]
        pages.remove(page)
        if not pages:
            del self._hash[page.gfn]
        if not pinned:
            self._zapped.append(page)

    def retire(self, page: MmuPage) -> None:
        """Free a removed page whose last root has gone."""
        self._zapped.append(page)

    def take_zapped(self) -> list[MmuPage]:
        """Return the pages zapped so far: the caller flushes every processor, then commit_zap()."""
        zapped, self._zapped = self._zapped, []
        return zapped


def commit_zap(zapped: list[MmuPage]) -> None:
    """Free zapped pages that no processor can be walking any more (kvm_mmu_commit_zap_page)."""
    for page in zapped:
        page.free()
