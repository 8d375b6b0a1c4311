"""Shadow pages: the tables the processor walks, and what we know about each of them."""

from __future__ import annotations

from array import array
from errno import ENOMEM
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from pykvm import trace
from pykvm.abi import CData, Gfn, ffi, lib
from pykvm.abi.errors import KvmError
from pykvm.mmu import spte as sptes
from pykvm.mmu.pte_list import pte_list_add, pte_list_iter, pte_list_remove
from pykvm.mmu.walk import ACC_ALL, GpteFormat

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pykvm.mmu.pte_list import PteList

KVM_MMU_HASH_SHIFT = 12
# Enough for one fault: a page for each level of the longest walk, or PAE's root and its four pages.
PT64_ROOT_MAX_LEVEL = 5
KVM_ARCH_NR_OBJS_PER_MEMORY_CACHE = 8
_GOLDEN_RATIO_64 = 0x61C8_8646_80B5_83EB
_GFN_SHIFT = 12
_ACCESS_MASK = (1 << _GFN_SHIFT) - 1


class Role(NamedTuple):
    """What makes two shadow pages of one frame different (union kvm_mmu_page_role).

    `format`: what the guest's entries mean, None of a direct page, which has none.  KVM tells formats apart
    by the extended role of the root alone; here no page is ever found in another one.  Its bits ad_disabled,
    guest_mode and passthrough are not here: our entries always have A and D, and no guest is nested.
    """

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
    format: GpteFormat | None = None

    @property
    def word(self) -> int:
        """The role as the kernel has it, in the bits of union kvm_mmu_page_role."""
        bits = (
            (self.has_4_byte_gpte, 4), (self.quadrant, 5), (self.direct, 7), (self.access & ACC_ALL, 8),
            (self.efer_nx, 12), (self.cr0_wp, 13), (self.smep_andnot_wp, 14), (self.smap_andnot_wp, 15),
            (self.smm, 24),
        )  # fmt: skip
        return self.level | sum(int(value) << shift for value, shift in bits)

    def __str__(self) -> str:
        """Return it as the kernel's trace shows it, and what else is not as usual."""
        access = "".join(c if self.access & bit else "-" for c, bit in (("w", 2), ("u", 4), ("x", 1)))
        return (
            f"l{self.level} {4 if self.has_4_byte_gpte else 8}-byte q{self.quadrant}"
            f"{' direct' * self.direct} {access} {'!' * (not self.efer_nx)}nxe ad"
            f"{' !wp' * (not self.cr0_wp and not self.direct)}{' smm' * self.smm}"
        )


@cache
def child_role(parent: Role, level: int, direct: bool, access: int, index: int) -> Role:
    """kvm_mmu_child_role(): the role of what entry `index` of a page of the parent's role points to.

    A 32-bit guest's table has 1024 entries and is shadowed by two pages: quadrants 0 and 1.
    """
    four = parent.has_4_byte_gpte and not direct
    return parent._replace(
        level=level,
        direct=direct,
        access=access,
        has_4_byte_gpte=four,
        quadrant=index & 1 if four and level == sptes.PG_LEVEL_4K else 0,
        format=None if direct else parent.format,
    )


class MemoryCache:
    """Tables in reserve (struct kvm_mmu_memory_cache): a fault that has begun does not fail for memory."""

    __slots__ = ("_tables",)

    def __init__(self) -> None:
        """Start empty."""
        self._tables: list[CData] = []

    def topup(self) -> None:
        """Make sure that one fault finds what it needs (mmu_topup_memory_caches).

        Errors:
            ENOMEM  the host has none; nothing has changed
        """
        tables = self._tables
        if len(tables) >= PT64_ROOT_MAX_LEVEL:
            return
        while len(tables) < KVM_ARCH_NR_OBJS_PER_MEMORY_CACHE:
            table = lib.spt_alloc()
            if not table and len(tables) >= PT64_ROOT_MAX_LEVEL:
                return
            if not table:
                raise KvmError(ENOMEM, "no memory for a shadow page")
            tables.append(table)

    def take(self) -> CData:
        """Return a zeroed table: `topup` has seen to it that there is one."""
        return self._tables.pop()

    def free(self) -> None:
        """Give back what is left."""
        while self._tables:
            lib.spt_free(self._tables.pop())


class MmuPage:
    """One table: 512 real sptes the processor reads, and its bookkeeping (struct kvm_mmu_page).

    `gfn`: the first frame it covers, or the frame of the guest's table it shadows.  `view`: the sptes as
    a sequence of integers, for reading.  `parent_ptes`: the sptes that point here, as a `PteList`.
    """

    __slots__ = (
        "gfn",
        "invalid",
        "mmu_valid_gen",
        "parent_ptes",
        "role",
        "root_count",
        "shadowed",
        "spt",
        "spt_addr",
        "tdp_mmu_page",
        "unsync",
        "unsync_child_bitmap",
        "unsync_children",
        "view",
        "write_flooding_count",
    )

    def __init__(self, gfn: Gfn, role: Role, spt: CData, mmu_valid_gen: int) -> None:
        """Describe an empty table."""
        self.gfn = gfn
        self.role = role
        self.mmu_valid_gen = mmu_valid_gen
        self.root_count = 0
        # Made by Tdp and found by walking only: there is no reverse map, nothing is unsync.
        self.tdp_mmu_page = False
        self.parent_ptes: PteList = 0
        # Frame and rights behind each entry; direct pages need none (shadowed_translation).
        self.shadowed = None if role.direct else array("Q", _EMPTY)
        self.unsync = False
        self.unsync_children = 0
        self.unsync_child_bitmap = 0
        self.write_flooding_count = 0
        self.invalid = False
        self.spt = spt
        self.spt_addr = int(ffi.cast("uintptr_t", spt))
        self.view = memoryview(ffi.buffer(spt, 4096)).cast("Q")

    def free(self) -> None:
        """Give the table back; no processor may be able to reach it any more."""
        self.view = _FREED
        lib.spt_free(self.spt)
        self.spt = ffi.NULL

    def traced(self) -> dict[str, object]:
        """Return what tracepoints tell of a page (KVM_MMU_PAGE_FIELDS)."""
        return {
            "gen": self.mmu_valid_gen,
            "gfn": self.gfn,
            "role": self.role,
            "root_count": self.root_count,
            "sync": "unsync" if self.unsync else "sync",
        }

    def trace_spte(self, index: int, gfn: int, spte: int) -> None:
        """Tell that entry `index` has been set."""
        rights = ((sptes.R, "r"), (sptes.W, "w"), (sptes.X, "x"), (sptes.U, "u"))
        trace.kvm_mmu_set_spte(
            gfn=gfn,
            spte=spte,
            rights="".join(letter if spte & bit else "-" for bit, letter in rights),
            level=self.role.level,
            sptep=self.spt_addr + 8 * index,
        )

    def sptep(self, gfn: int) -> CData:
        """Return the entry that covers the frame (in a shadow page: the linear page)."""
        return self.spt + sptes.index(gfn, self.role.level)

    def entries(self) -> list[int]:
        """Return a copy of all entries."""
        return self.view.tolist()

    def get_gfn(self, index: int) -> int:
        """Return the frame entry `index` maps: recorded, or following from the page's own."""
        if self.shadowed is not None:
            return self.shadowed[index] >> _GFN_SHIFT
        return self.gfn + (index << sptes.PT64_LEVEL_BITS * (self.role.level - 1))

    def get_access(self, index: int) -> int:
        """Return the guest's rights behind entry `index`."""
        return self.role.access if self.shadowed is None else self.shadowed[index] & _ACCESS_MASK

    def set_translation(self, index: int, gfn: int, access: int) -> None:
        """Record what entry `index` maps."""
        if self.shadowed is not None:
            self.shadowed[index] = gfn << _GFN_SHIFT | access

    def add_parent(self, sptep: int) -> None:
        """Record that the spte at this address points here (kvm_mmu_add_parent_pte)."""
        self.parent_ptes = pte_list_add(self.parent_ptes, sptep)

    def remove_parent(self, sptep: int) -> None:
        """Forget a parent; it is there, or the tables are inconsistent."""
        self.parent_ptes = pte_list_remove(self.parent_ptes, sptep)

    def parents(self) -> tuple[int, ...]:
        """Return the addresses of the sptes that point here."""
        return pte_list_iter(self.parent_ptes)


_EMPTY = bytes(8 * sptes.PT64_ENTRIES)
_FREED = memoryview(bytes(4096)).cast("Q")


class PageTable:
    """All shadow pages of a VM: the active list, the hash by frame, and the way back from a table."""

    def __init__(self) -> None:
        """Start without pages."""
        # Insertion order is age: active_mmu_pages. Keys are table addresses: page->private.
        self._by_spt: dict[int, MmuPage] = {}
        self._hash: dict[int, list[MmuPage]] = {}
        # Unlinked, but a processor may still be walking them until it has flushed.
        self._zapped: list[MmuPage] = []
        self.mmu_valid_gen = 0

    def __len__(self) -> int:
        """Return n_used_mmu_pages."""
        return len(self._by_spt)

    def __iter__(self) -> Iterator[MmuPage]:
        """Walk active_mmu_pages, oldest first."""
        return iter(tuple(self._by_spt.values()))

    def oldest(self) -> Iterator[MmuPage]:
        """Walk active_mmu_pages, oldest first; the pages that are yielded may be zapped."""
        skipped = 0
        while True:
            page = next(islice(self._by_spt.values(), skipped, None), None)
            if page is None:
                return
            before = len(self._by_spt)
            yield page
            skipped += len(self._by_spt) == before

    def alloc(self, gfn: Gfn, role: Role, cache: MemoryCache) -> MmuPage:
        """Return a new empty page (kvm_mmu_alloc_shadow_page)."""
        page = MmuPage(gfn, role, cache.take(), self.mmu_valid_gen)
        self._by_spt[page.spt_addr] = page
        self._hash.setdefault(_hashfn(gfn), []).append(page)
        return page

    def bucket(self, gfn: int) -> list[MmuPage]:
        """Return the pages in the frame's bucket of mmu_page_hash, those of other frames too."""
        return self._hash.get(_hashfn(gfn), _NONE)

    def of_gfn(self, gfn: int) -> tuple[MmuPage, ...]:
        """Return the pages that shadow the frame, of whatever role."""
        return tuple([page for page in self._hash.get(_hashfn(gfn), _NONE) if page.gfn == gfn])

    def child(self, spte: int) -> MmuPage:
        """Return the page a non-leaf entry points to."""
        return self._by_spt[spte & sptes.PFN_MASK]

    def sptep_to_sp(self, sptep: int) -> tuple[MmuPage, int]:
        """Return the page and the index of the spte at a host address (page->private)."""
        return self._by_spt[sptep & ~0xFFF], sptep >> 3 & sptes.PT64_ENTRIES - 1

    def is_tdp_mmu(self, root: int) -> bool:
        """Whether the root table at an address is one of two-dimensional paging, and in use (is_tdp_mmu).

        PAE's table of four entries has no page and so is none.
        """
        page = self._by_spt.get(root)
        return page is not None and page.tdp_mmu_page and page.root_count > 0

    def remove(self, page: MmuPage, *, pinned: bool = False) -> None:
        """Take a zapped page out of list and hash; it is freed unless a root still pins it."""
        if trace.kvm_mmu_prepare_zap_page.enabled:
            trace.kvm_mmu_prepare_zap_page(**page.traced())
        del self._by_spt[page.spt_addr]
        key = _hashfn(page.gfn)
        pages = self._hash[key]
        pages.remove(page)
        if not pages:
            del self._hash[key]
        if not pinned:
            self._zapped.append(page)

    def retire(self, page: MmuPage) -> None:
        """Free a removed page whose last root has gone."""
        self._zapped.append(page)

    def take_zapped(self) -> list[MmuPage]:
        """Return the pages zapped so far: the caller flushes every processor, then commit_zap()."""
        if not self._zapped:
            return _NONE
        zapped, self._zapped = self._zapped, []
        return zapped

    def take_all(self) -> list[MmuPage]:
        """Start anew without pages, and return those there were, oldest first."""
        pages = list(self._by_spt.values())
        self._by_spt, self._hash = {}, {}
        return pages


_NONE: list[MmuPage] = []


def _hashfn(gfn: int) -> int:
    """kvm_page_table_hashfn(): 4096 buckets."""
    return (gfn * _GOLDEN_RATIO_64 & 0xFFFF_FFFF_FFFF_FFFF) >> 64 - KVM_MMU_HASH_SHIFT


def commit_zap(zapped: list[MmuPage]) -> None:
    """Free zapped pages that no processor can be walking any more (kvm_mmu_commit_zap_page)."""
    for page in zapped:
        page.free()
