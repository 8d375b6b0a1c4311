"""Shadow pages: the tables the processor walks, and what we know about each of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from errno import ENOMEM

from pykvm.abi import CData, Gfn, ffi, lib
from pykvm.abi.errors import KvmError
from pykvm.mmu import spte as sptes


@dataclasses.dataclass(frozen=True, slots=True)
class Role:
    """What makes two shadow pages of one frame different (union kvm_mmu_page_role)."""

    level: int
    direct: bool = True
    smm: bool = False


class MmuPage:
    """One table: 512 real sptes the processor reads, and its bookkeeping (struct kvm_mmu_page)."""

    __slots__ = ("gfn", "parent", "role", "root_count", "spt", "spt_addr")

    def __init__(self, gfn: Gfn, role: Role) -> None:
        """Allocate an empty table that covers frames from `gfn` on."""
        self.gfn = gfn
        self.role = role
        self.root_count = 0
        # (page, index) of the entry that points here; a direct page has exactly one, a root none.
        self.parent: tuple[MmuPage, int] | None = None
        self.spt: CData = lib.spt_alloc()
        if not self.spt:
            raise KvmError(ENOMEM, "no memory for a shadow page")
        self.spt_addr = int(ffi.cast("uintptr_t", self.spt))

    def free(self) -> None:
        """Give the table back; no processor may be able to reach it any more."""
        lib.spt_free(self.spt)
        self.spt = ffi.NULL

    def sptep(self, gfn: int) -> CData:
        """Return the entry that covers the frame."""
        return self.spt + sptes.index(gfn, self.role.level)

    def entries(self) -> list[int]:
        """Return a copy of all entries."""
        return memoryview(ffi.buffer(self.spt, 4096)).cast("Q").tolist()

    def gfn_of(self, index: int) -> int:
        """Return the first frame that entry `index` covers."""
        return self.gfn + (index << sptes.PT64_LEVEL_BITS * (self.role.level - 1))


class PageTable:
    """All shadow pages of a VM, found by the address of their table (page->private)."""

    def __init__(self) -> None:
        """Start without pages."""
        self._by_spt: dict[int, MmuPage] = {}
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
        return page

    def zap(self, page: MmuPage) -> None:
        """Take an unlinked page out of the active list (kvm_mmu_prepare_zap_page)."""
        del self._by_spt[page.spt_addr]
        self._zapped.append(page)

    def take_zapped(self) -> list[MmuPage]:
        """Return the pages zapped so far: the caller flushes every processor, then commit_zap()."""
        zapped, self._zapped = self._zapped, []
        return zapped

    def child(self, spte: int) -> MmuPage:
        """Return the page a non-leaf entry points to."""
        return self._by_spt[spte & sptes.PFN_MASK]


def commit_zap(zapped: list[MmuPage]) -> None:
    """Free zapped pages that no processor can be walking any more (kvm_mmu_commit_zap_page)."""
    for page in zapped:
        page.free()
