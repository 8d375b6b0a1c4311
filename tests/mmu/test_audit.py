"""The auditor notices what is wrong: each test breaks one thing behind the MMU's back, and mends it again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from pykvm.abi import lib
from pykvm.mmu import spte as sptes
from pykvm.mmu.shadow import ShadowMmu
from tests.mmu.guest import FRAMES, FULL, PD, PDPT, PT, TEST, A, P, PagingGuest, U, W

if TYPE_CHECKING:
    from pykvm.mmu.pages import MmuPage
    from tests.mmu.conftest import NewGuest

Break = Callable[[PagingGuest], contextlib.AbstractContextManager[None]]


def mmu_of(guest: PagingGuest) -> ShadowMmu:
    mmu = guest.kernel.mmu
    assert isinstance(mmu, ShadowMmu)
    return mmu


def page_of(guest: PagingGuest, table: int) -> MmuPage:
    return next(page for page in guest.kernel.mmu.pages.of_gfn(table >> 12) if not page.role.direct)


@contextlib.contextmanager
def entry(page: MmuPage, index: int, change: Callable[[int], int]) -> Iterator[None]:
    old = int(lib.spte_xchg(page.spt + index, change(page.view[index])))
    yield
    lib.spte_xchg(page.spt + index, old)


@contextlib.contextmanager
def attribute(owner: Any, name: str, change: Callable[[Any], Any]) -> Iterator[None]:
    old = getattr(owner, name)
    setattr(owner, name, change(old))
    yield
    setattr(owner, name, old)


@contextlib.contextmanager
def counted(counts: dict[int, int], key: int) -> Iterator[None]:
    counts[key] = counts.get(key, 0) + 1
    yield
    counts[key] -= 1
    if not counts[key]:
        del counts[key]


@contextlib.contextmanager
def without_rmap(guest: PagingGuest) -> Iterator[None]:
    ((page, index),) = guest.vm.mmu.rmap(FRAMES >> 12)
    mmu_of(guest).rmap.remove(0, 1, FRAMES >> 12, page.spt + 8 * index)
    yield
    mmu_of(guest).rmap.add(0, 1, FRAMES >> 12, page.spt + 8 * index)


@contextlib.contextmanager
def rmap_of_nothing(guest: PagingGuest) -> Iterator[None]:
    sptep = page_of(guest, PT).spt_addr + 8 * 400
    mmu_of(guest).rmap.add(0, 1, 0x77, sptep)
    yield
    mmu_of(guest).rmap.remove(0, 1, 0x77, sptep)


@contextlib.contextmanager
def without_parent(guest: PagingGuest) -> Iterator[None]:
    page, sptep = page_of(guest, PT), page_of(guest, PD).spt_addr
    page.remove_parent(sptep)
    yield
    page.add_parent(sptep)


@contextlib.contextmanager
def wrong_parent(guest: PagingGuest) -> Iterator[None]:
    page, sptep = page_of(guest, PT), page_of(guest, PD).spt_addr + 8 * 300
    page.add_parent(sptep)
    yield
    page.remove_parent(sptep)


def table_entry(guest: PagingGuest) -> tuple[MmuPage, int]:
    """The spte by which the guest writes its PD: page 9 behind TEST."""
    return page_of(guest, PT), 9


def arch(guest: PagingGuest) -> Any:
    return guest.kernel.memslots[0].ordered[0].arch


CASES: dict[str, tuple[str, Break]] = {
    "writable table": ("is writable", lambda g: entry(*table_entry(g), lambda e: e | sptes.W)),
    "not in rmap": ("not in the reverse map", without_rmap),
    "rmap of nothing": ("maps nothing", rmap_of_nothing),
    "no parent": ("does not list it as a parent", without_parent),
    "wrong parent": ("is no parent of it", wrong_parent),
    "wrong frame": ("wrong host page", lambda g: entry(page_of(g, PT), 0, lambda e: e + 0x1000)),
    "more rights": ("recorded are", lambda g: entry(page_of(g, PT), 1, lambda e: e | sptes.W)),
    "host": ("not host-writable", lambda g: entry(page_of(g, PT), 0, lambda e: e & ~sptes.HOST_WRITABLE)),
    "to nowhere": ("no table of ours", lambda g: entry(page_of(g, PD), 0, lambda e: e ^ 0x1000 << 20)),
    "unsync bit": ("unsync bit is", lambda g: attribute(page_of(g, PT), "unsync", lambda _: True)),
    "unsync level": ("unsync above level 1", lambda g: attribute(page_of(g, PD), "unsync", lambda _: True)),
    "unsync count": ("unsync children", lambda g: attribute(page_of(g, PD), "unsync_children", lambda n: n + 1)),
    "invalid": ("invalid but on the active list", lambda g: attribute(page_of(g, PT), "invalid", lambda _: True)),
    "root_count": ("loaded 0 times", lambda g: attribute(page_of(g, PT), "root_count", lambda n: n + 1)),
    "level": ("child is of level", lambda g: attribute(page_of(g, PDPT), "role", lambda r: r._replace(level=4))),
    "access": ("more than its parent's", lambda g: attribute(page_of(g, PDPT), "role", lambda r: r._replace(access=1))),
    "leaves": ("statistics say", lambda g: attribute(g.kernel.mmu.stat, "pages_4k", lambda n: n + 1)),
    "unsync stat": ("mmu_unsync is", lambda g: attribute(g.kernel.mmu.stat, "mmu_unsync", lambda n: n + 1)),
    "hash": ("not in the hash", lambda g: attribute(page_of(g, PT), "gfn", lambda n: n + 1)),
    "write_track": ("write-tracked", lambda g: counted(arch(g).write_track, 5)),
    "lpage": ("disallow_lpage", lambda g: counted(arch(g).lpage_info[2], 1)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.spec("mmu.audit")
def test_the_auditor_notices(new_shadow: NewGuest, case: str) -> None:
    guest = new_shadow()
    guest.map(0, FRAMES)
    guest.map(1, FRAMES + 0x1000, P | U | A)
    guest.map(9, PD)
    guest.finish(
        f"mov rsi, {TEST}; mov eax, [rsi]; mov [rsi], eax; mov eax, [rsi + 0x1000]; mov eax, [rsi + 0x9000]; hlt"
    )
    assert guest.vm.mmu.audit() == []
    text, broken = CASES[case]
    with broken(guest):
        found = guest.vm.mmu.audit()
        assert any(text in line for line in found), found
    assert guest.vm.mmu.audit() == []


@pytest.mark.spec("mmu.audit")
def test_the_auditor_knows_logged_and_read_only_slots(new_guest: NewGuest) -> None:
    """In both modes: W where a write has to be seen."""
    guest = new_guest(log_dirty=True)
    rom = 0x100_0000
    guest.vm.add_memory(rom, 0x1000, slot=1, readonly=True)
    guest.map(0, FRAMES, FULL)
    guest.map(1, rom, P | W | U | A)
    guest.finish(f"mov rsi, {TEST}; mov eax, [rsi]; mov eax, [rsi + 0x1000]; hlt")
    for gfn, text in ((FRAMES >> 12, "not in the dirty log"), (rom >> 12, "READONLY slot is writable")):
        ((view, index),) = guest.vm.mmu.rmap(gfn)
        (page,) = (page for page in guest.kernel.mmu.pages if page.spt_addr == view.spt)
        with entry(page, index, lambda e: e | sptes.W):
            assert any(text in line for line in guest.vm.mmu.audit())
    assert guest.vm.mmu.audit() == []
