"""Memory slots as data: which guest frames are backed by which host memory.

A `Memslots` is an immutable snapshot of one address space (address space 1 is SMM's).  A change
builds a new snapshot and publishes it by one assignment, as the kernel does with RCU, so that a
reader holding a snapshot sees one generation and never half a change.  The ioctl that changes
them, with its rules, is kvm/memslots.py.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from bisect import bisect_right
from types import MappingProxyType
from typing import TYPE_CHECKING

from pykvm.abi import Gfn, Hva, uapi
from pykvm.mmu.memslot_arch import MemslotArch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PAGE_SHIFT = 12


class Change(enum.Enum):
    """What a KVM_SET_USER_MEMORY_REGION does to its slot (enum kvm_mr_change)."""

    CREATE = enum.auto()
    DELETE = enum.auto()
    MOVE = enum.auto()
    FLAGS_ONLY = enum.auto()


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Memslot:
    """One slot. `npages` in 4 KiB pages; `dirty_bitmap`: one bit per page, None while not logging to it."""

    as_id: int
    id: int
    base_gfn: Gfn
    npages: int
    userspace_addr: Hva
    flags: int
    dirty_bitmap: bytearray | None = None
    # The slot that this one is with other flags.
    same_as: dataclasses.InitVar[Memslot | None] = None
    # First frame behind the slot.
    end_gfn: int = dataclasses.field(init=False)
    arch: MemslotArch = dataclasses.field(init=False)

    def __post_init__(self, same_as: Memslot | None) -> None:
        """Compute what follows."""
        object.__setattr__(self, "end_gfn", self.base_gfn + self.npages)
        arch = same_as.arch if same_as else MemslotArch(self.base_gfn, self.npages, self.userspace_addr)
        object.__setattr__(self, "arch", arch)

    @property
    def readonly(self) -> bool:
        """Guest writes are MMIO exits."""
        return bool(self.flags & uapi.KVM_MEM_READONLY)

    @property
    def logging(self) -> bool:
        """KVM_MEM_LOG_DIRTY_PAGES is set."""
        return bool(self.flags & uapi.KVM_MEM_LOG_DIRTY_PAGES)

    def hva(self, gfn: int) -> Hva:
        """Host address of a frame of this slot."""
        return Hva(self.userspace_addr + ((gfn - self.base_gfn) << PAGE_SHIFT))

    def contains(self, gfn: int) -> bool:
        """Whether the frame is in this slot."""
        return self.base_gfn <= gfn < self.base_gfn + self.npages

    def mark_page_dirty(self, gfn: int) -> None:
        """Set the frame's bit in the dirty bitmap, if there is one."""
        bitmap = self.dirty_bitmap
        if bitmap is not None:
            rel = gfn - self.base_gfn
            bitmap[rel >> 3] |= 1 << (rel & 7)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Memslots:
    """The slots of one address space at one generation."""

    generation: int = 0
    by_id: Mapping[int, Memslot] = dataclasses.field(default_factory=lambda: MappingProxyType({}))
    # Sorted by base_gfn; bases[i] is ordered[i].base_gfn, for bisect.
    ordered: tuple[Memslot, ...] = ()
    bases: tuple[int, ...] = ()

    def gfn_to_memslot(self, gfn: int) -> Memslot | None:
        """Return the slot that holds the frame."""
        at = bisect_right(self.bases, gfn) - 1
        if at < 0:
            return None
        slot = self.ordered[at]
        return slot if gfn < slot.base_gfn + slot.npages else None

    def overlaps(self, base_gfn: int, npages: int, but: int) -> bool:
        """Whether a slot other than number `but` has a frame in the range."""
        end = base_gfn + npages
        at = max(bisect_right(self.bases, base_gfn) - 1, 0)
        for slot in self.ordered[at:]:
            if slot.base_gfn >= end:
                return False
            if slot.end_gfn > base_gfn and slot.id != but:
                return True
        return False

    def replaced(self, old: Memslot | None, new: Memslot | None, generation: int) -> Memslots:
        """Return the snapshot that has `new` in place of `old`."""
        by_id = dict(self.by_id)
        ordered = list(self.ordered)
        if old is not None:
            del by_id[old.id]
            del ordered[bisect_right(self.bases, old.base_gfn) - 1]
        if new is not None:
            by_id[new.id] = new
            ordered.insert(bisect_right([s.base_gfn for s in ordered], new.base_gfn), new)
        bases = tuple(s.base_gfn for s in ordered)
        return Memslots(generation, MappingProxyType(by_id), tuple(ordered), bases)


_NONZERO = re.compile(rb"[^\0]", re.DOTALL)


def set_bits(bitmap: bytes | bytearray, first: int = 0) -> Iterator[int]:
    """Yield the numbers of the bits that are set, counted from `first`."""
    for match in _NONZERO.finditer(bitmap):
        at = match.start()
        byte = bitmap[at]
        for bit in range(8):
            if byte >> bit & 1:
                yield first + at * 8 + bit
