"""Lists of sptes: those that map a frame, those that point to a table (struct kvm_rmap_head).

Most lists have one spte, and then the head is its address.  More are in descriptors of 14 each: a new one
goes in front when the first is full, so that all behind it always are, and a list is counted without
walking it.  KVM tells the two kinds of heads apart by bit 0; here they are of two types.
"""

from __future__ import annotations

from typing import TypeAlias

PTE_LIST_EXT = 14


class PteListDesc:
    """Some of a list's sptes (struct pte_list_desc). `tail_count`: how many are behind `more`."""

    __slots__ = ("more", "sptes", "tail_count")

    def __init__(self, sptes: list[int], more: PteListDesc | None = None, tail_count: int = 0) -> None:
        """Put sptes in front of those there are."""
        self.sptes = sptes
        self.more = more
        self.tail_count = tail_count


PteList: TypeAlias = "int | PteListDesc"
"""No spte (0), the address of one, or a descriptor."""


def pte_list_add(head: PteList, sptep: int) -> PteList:
    """Return the list with one more spte."""
    if isinstance(head, int):
        return PteListDesc([head, sptep]) if head else sptep
    if len(head.sptes) == PTE_LIST_EXT:
        return PteListDesc([sptep], head, pte_list_count(head))
    head.sptes.append(sptep)
    return head


def pte_list_remove(head: PteList, sptep: int) -> PteList:
    """Return the list without an spte, which must be in it."""
    if isinstance(head, int):
        if head != sptep or not head:
            raise KeyError(sptep)
        return 0
    desc: PteListDesc | None = head
    while desc is not None and sptep not in desc.sptes:
        desc = desc.more
    if desc is None:
        raise KeyError(sptep)
    # The last of the first descriptor fills the gap.
    at = desc.sptes.index(sptep)
    desc.sptes[at] = head.sptes[-1]
    head.sptes.pop()
    return head if head.sptes else head.more or 0


def pte_list_count(head: PteList) -> int:
    """Return how many sptes there are."""
    return bool(head) if isinstance(head, int) else head.tail_count + len(head.sptes)


def pte_list_iter(head: PteList) -> tuple[int, ...]:
    """Return the sptes as they are now."""
    if isinstance(head, int):
        return (head,) if head else ()
    found: list[int] = []
    desc: PteListDesc | None = head
    while desc is not None:
        found += desc.sptes
        desc = desc.more
    return tuple(found)
