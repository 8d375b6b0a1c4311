"""What x86 keeps of each frame of a slot: reverse map, large pages, write tracking (kvm_arch_memory_slot).

It is made with the slot and goes with it; KVM_MEM_LOG_DIRTY_PAGES going on or off leaves it alone.
Nothing is allocated for frames of which there is nothing to say.
"""

from __future__ import annotations

from pykvm.mmu import spte as sptes
from pykvm.mmu.rmap import LEVELS, RmapHeads

LARGE_LEVELS = LEVELS[1:]


class MemslotArch:
    """Of one slot. All of it under mmu_lock.

    `rmap`: the heads by page size, None until the VM has a shadow root.  `lpage_info`: for each large size,
    number of the page -> why it must not be mapped: how many shadowed tables lie in it, and one more for the
    first and the last page if the slot has only a part of it; `disallowed` says it all.  `write_track`:
    gfn -> how many shadow pages want to see writes to it.
    """

    __slots__ = ("_base_gfn", "_incongruent", "_npages", "lpage_info", "rmap", "write_track")

    def __init__(self, base_gfn: int, npages: int, userspace_addr: int) -> None:
        """Describe a slot in which nothing is mapped (kvm_alloc_memslot_metadata)."""
        self._base_gfn, self._npages = base_gfn, npages
        self.rmap: tuple[RmapHeads, ...] | None = None
        # A host page is never behind a guest page as large when they do not start together.
        self._incongruent = {
            level: ((base_gfn ^ userspace_addr >> 12) & sptes.pages_per(level) - 1) != 0
            for level in LARGE_LEVELS
        }
        self._clear()

    def _clear(self) -> None:
        self.write_track: dict[int, int] = {}
        self.lpage_info: dict[int, dict[int, int]] = {level: {} for level in LARGE_LEVELS}
        end = self._base_gfn + self._npages
        for level, pages in self.lpage_info.items():
            partial = sptes.pages_per(level) - 1
            if self._incongruent[level]:
                continue
            if self._base_gfn & partial:
                pages[0] = 1
            if end & partial:
                pages[self.index(end - 1, level)] = 1

    def reset(self) -> None:
        """Forget all pages: none is left."""
        self._clear()
        if self.rmap is not None:
            self.alloc_rmap()

    def alloc_rmap(self) -> None:
        """Have a reverse map from now on (memslot_rmap_alloc)."""
        self.rmap = tuple(RmapHeads() for _ in LEVELS)

    def index(self, gfn: int, level: int) -> int:
        """Return the number of the frame's page of a size in the slot (gfn_to_index)."""
        bits = sptes.PT64_LEVEL_BITS * (level - 1)
        return (gfn >> bits) - (self._base_gfn >> bits)

    def gfn(self, index: int, level: int) -> int:
        """Return the first frame of a page of a size."""
        bits = sptes.PT64_LEVEL_BITS * (level - 1)
        return index + (self._base_gfn >> bits) << bits

    def disallow_lpage(self, gfn: int, level: int) -> int:
        """Return how many reasons there are not to map the frame by a page as large as that."""
        return self.lpage_info[level].get(self.index(gfn, level), 0) + self._incongruent[level]

    def disallowed(self, level: int) -> dict[int, int]:
        """Return the pages of a size that must not be mapped, by number, and how many reasons there are."""
        pages = self.lpage_info[level]
        if not self._incongruent[level]:
            return dict(pages)
        last = self.index(self._base_gfn + self._npages - 1, level)
        return {n: pages.get(n, 0) + 1 for n in range(last + 1)}

    def account_shadowed(self, gfn: int, delta: int, *, tracked: bool) -> None:
        """Count a shadow page of the frame that comes or goes (account_shadowed, unaccount_shadowed).

        tracked: its frame stays write-protected (__kvm_write_track_add_gfn).
        """
        for level, pages in self.lpage_info.items():
            add_count(pages, self.index(gfn, level), delta)
        if tracked:
            add_count(self.write_track, gfn, delta)


def add_count(counts: dict[int, int], key: int, delta: int) -> None:
    """Change a count; one of 0 is not kept."""
    value = counts.get(key, 0) + delta
    if value:
        counts[key] = value
    else:
        del counts[key]
