"""The kvmmmu tracepoints as events: the kernel's names, at the moment and with the words of the kernel's."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from pykvm import device, trace
from pykvm.mmu.walk import Access
from tests.mmu.guest import FRAMES, FULL, PD, PT, SIZE, TEST, A, Mmio, P, PagingGuest, U, W

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tests.mmu.conftest import NewGuest

# TP_printk of arch/x86/kvm/mmu/mmutrace.h, as patterns of what it gives.
_HEX = r"[0-9a-f]+"
_FLAGS = r"((P|W|U|RSVD|F)(\||$| (?=sptep)))*"
_SP = (
    rf"sp gen [01] gfn {_HEX} l[1-5] [48]-byte q[0-3]( direct)? [w-][u-][x-] !?nxe ad( !wp)?( smm)?"
    r" root \d+ (un)?sync"
)
WORDING = {
    "kvm_mmu_pagetable_walk": rf"addr {_HEX} pferr {_HEX} {_FLAGS}",
    "kvm_mmu_paging_element": rf"pte {_HEX} level [1-5]",
    "kvm_mmu_set_accessed_bit": rf"gpa {_HEX}",
    "kvm_mmu_set_dirty_bit": rf"gpa {_HEX}",
    "kvm_mmu_walker_error": rf"pferr {_HEX} {_FLAGS}",
    "kvm_mmu_get_page": _SP + " (new|existing)",
    "kvm_mmu_sync_page": _SP,
    "kvm_mmu_unsync_page": _SP,
    "kvm_mmu_prepare_zap_page": _SP,
    "mark_mmio_spte": rf"sptep:{_HEX} gfn {_HEX} access [0-9a-f] gen {_HEX}",
    "handle_mmio_page_fault": rf"addr:{_HEX} gfn {_HEX} access [0-9a-f]",
    "fast_page_fault": (
        rf"vcpu \d+ gva {_HEX} error_code {_FLAGS}sptep {_HEX} old 0x{_HEX} new {_HEX}"
        r" spurious [01] fixed [01]"
    ),
    "kvm_mmu_zap_all_fast": rf"kvm-mmu-valid-gen [01] used_pages {_HEX}",
    "check_mmio_spte": rf"spte {_HEX} kvm_gen {_HEX} spte-gen {_HEX} valid [01]",
    "kvm_mmu_set_spte": rf"gfn {_HEX} spte {_HEX} \([r-][w-][x-][u-]\) level [1-5] at {_HEX}",
    "kvm_mmu_spte_requested": rf"gfn {_HEX} pfn {_HEX} level [1-5]",
}
# What the processor does alone in two dimensions, and what has no pages of the guest's to tell of.
ONLY_SHADOW = {
    "kvm_mmu_pagetable_walk", "kvm_mmu_paging_element", "kvm_mmu_set_accessed_bit", "kvm_mmu_set_dirty_bit",
    "kvm_mmu_walker_error", "kvm_mmu_get_page", "kvm_mmu_sync_page", "kvm_mmu_unsync_page",
    "kvm_mmu_zap_all_fast",
}  # fmt: skip


class Events:
    """What tracepoints say while something is done."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, object]]] = []

    def __call__(self, name: str, fields: Mapping[str, object]) -> None:
        assert re.fullmatch(WORDING[name], trace.TRACEPOINTS[name].format.format(**fields))
        self.seen.append((name, dict(fields)))

    def of(self, do: Callable[[], object]) -> list[tuple[str, dict[str, object]]]:
        start = len(self.seen)
        with trace.listen(",".join(WORDING), self):
            do()
        return self.seen[start:]


def _named(events: list[tuple[str, dict[str, object]]], name: str) -> list[dict[str, object]]:
    return [fields for each, fields in events if each == name]


@pytest.mark.spec("mmu.tracepoints")
def test_every_kvmmmu_tracepoint_tells_its_event(new_guest: NewGuest, mode: str) -> None:
    guest = new_guest(log_dirty=True)
    shadow, events = mode == "shadow", Events()
    guest.map(0, FRAMES, P | W | U)
    guest.map(1, FRAMES + 0x1000)

    # A write through tables that nobody has used: walk, A and D, pages, the leaf.
    found = events.of(lambda: guest.finish(f"mov rsi, {TEST}; mov [rsi], eax; hlt"))
    (requested,) = [f for f in _named(found, "kvm_mmu_spte_requested") if f["gfn"] == FRAMES >> 12]
    slot = guest.vm.mmu.snapshot().slots[0]
    assert requested["pfn"] == (slot.hva + FRAMES) >> 12
    assert requested["level"] == 1
    leaf = next(f for f in _named(found, "kvm_mmu_set_spte") if f["gfn"] == FRAMES >> 12)
    assert leaf["rights"] == "rwxu"
    (page, index), *_ = guest.vm.mmu.rmap(FRAMES >> 12)
    assert leaf["sptep"] == page.spt + 8 * index
    if shadow:
        assert _named(found, "kvm_mmu_pagetable_walk")[-1] == {"addr": TEST, "pferr": 2, "flags": "W"}
        entries = [f["level"] for f in _named(found, "kvm_mmu_paging_element")][-4:]
        assert entries == [4, 3, 2, 1]
        assert PT in [f["gpa"] for f in _named(found, "kvm_mmu_set_accessed_bit")]
        assert _named(found, "kvm_mmu_set_dirty_bit") == [{"gpa": PT}]
        made = [(f["gfn"], f["state"]) for f in _named(found, "kvm_mmu_get_page")]
        assert (PT >> 12, "new") in made

    # The dirty log takes W back; the next write gets it again without looking any further.
    guest.vm.dirty_log(0)
    found = events.of(lambda: guest.finish(f"mov rsi, {TEST}; mov [rsi], eax; hlt"))
    fast = next(f for f in _named(found, "fast_page_fault") if f["addr"] == (TEST if shadow else FRAMES))
    assert (fast["fixed"], fast["spurious"], fast["flags"]) == (True, False, "W")
    assert int(str(fast["old"])) ^ int(str(fast["new"])) == 2

    # No slot there: an MMIO spte; another generation of slots, and it is met once more, stale.
    guest.map(2, 0x5000_0000)
    access = f"mov rsi, {TEST + 0x2000}; mov al, [rsi]; hlt"
    found = events.of(lambda: _expect_mmio(guest, access))
    (mark,) = _named(found, "mark_mmio_spte")
    assert mark["gfn"] == 0x5000_0000 >> 12
    (handled,) = _named(found, "handle_mmio_page_fault")
    assert handled["gfn"] == 0x5000_0000 >> 12
    assert handled["addr"] == (TEST + 0x2000 if shadow else 0x5000_0000)
    assert not _named(found, "check_mmio_spte")
    guest.vm.add_memory(0x6000_0000, 0x1000, slot=7)
    found = events.of(lambda: _expect_mmio(guest, access))
    (check,) = _named(found, "check_mmio_spte")
    assert check["valid"] is False
    assert check["spte_gen"] != check["gen"] == _named(found, "mark_mmio_spte")[0]["gen"]

    # The guest's own fault, and what it does to its tables.
    found = events.of(lambda: guest.fault(f"mov rsi, {TEST + 0x9000}; mov eax, [rsi]; hlt"))
    assert _named(found, "kvm_mmu_walker_error")[:1] == ([{"pferr": 0, "flags": ""}] if shadow else [])
    guest.map(8, FRAMES, P | U | A)
    found = events.of(lambda: guest.fault(f"mov rsi, {TEST + 0x8000}; mov [rsi], eax; hlt"))
    assert _named(found, "kvm_mmu_walker_error")[:1] == ([{"pferr": 3, "flags": "P|W"}] if shadow else [])
    edit = f"mov dword ptr [{guest.pte(1)}], {FRAMES + 0x3000 | FULL}"
    touch = f"mov rsi, {TEST}; mov eax, [rsi + 0x1000]"
    found = events.of(lambda: guest.finish(f"{touch}; {edit}; mov rax, cr3; mov cr3, rax; {touch}; hlt"))
    if shadow:
        (unsync,) = _named(found, "kvm_mmu_unsync_page")
        assert (unsync["gfn"], unsync["sync"]) == (PT >> 12, "sync")
        assert PT >> 12 in [f["gfn"] for f in _named(found, "kvm_mmu_sync_page")]

    # Zapped one by one, and all at once.
    if shadow:
        found = events.of(lambda: guest.vm.mmu.shrink(100))
        assert {PT >> 12, PD >> 12} <= {f["gfn"] for f in _named(found, "kvm_mmu_prepare_zap_page")}
        pages = len(guest.vm.mmu.pages())
        found = events.of(lambda: guest.vm.remove_memory(7))
        assert _named(found, "kvm_mmu_zap_all_fast")[0]["pages"] == pages
    else:
        found = events.of(lambda: guest.vm.remove_memory(0))
        assert _named(found, "kvm_mmu_prepare_zap_page")
    assert {name for name, _ in events.seen} == WORDING.keys() - (set() if shadow else ONLY_SHADOW)


def _expect_mmio(guest: PagingGuest, source: str) -> None:
    assert isinstance(guest.run(source), Mmio)
    guest.vcpu.run()


@pytest.mark.parametrize("width", [32, 36, 64])
def test_walk_says_why_an_access_does_not_go_through(new_guest: NewGuest, width: int, mode: str) -> None:
    guest = new_guest(width=width)
    for n, bits in enumerate((P | A, FULL, FULL, P | U | A, FULL & ~W)):
        guest.map(n, FRAMES + n * 0x1000, bits)
    guest.map(6, PT)
    guest.map(7, 0x5000_0000)
    source = f"mov rsi, {TEST}; mov eax, [rsi]; mov [rsi + 0x1000], eax; mov eax, [rsi + 0x3000]"
    guest.finish(f"{source}; mov eax, [rsi + 0x6000]; hlt")
    _expect_mmio(guest, f"mov rsi, {TEST + 0x7000}; mov al, [rsi]; hlt")
    vcpu = device.vcpu_of(guest.vcpu.fd)

    def reason(page: int, **want: bool) -> str:
        return guest.vm.mmu.walk(vcpu, TEST + page * 0x1000, Access(**want)).reason

    assert reason(0) == reason(1) == reason(1, write=True, user=True) == ""
    assert reason(0, write=True).startswith("guest: a supervisor's write is forbidden: the tables grant")
    assert reason(0, user=True).startswith("guest: a user's read is forbidden")
    assert reason(5) == "guest: the entry of level 1 is not present"
    assert reason(1024 * 5) == "guest: the entry of level 2 is not present"
    assert reason(7) == "there is no memory: MMIO"
    if mode == "shadow":
        assert reason(6, write=True).startswith("write-protected: the frame is a guest's last-level table")
    guest.vm.remove_memory(0)
    guest.vm.add_memory(0, guest.ram[: guest.pte(0)], slot=0)
    assert re.fullmatch(r"guest: the table of level \d, gfn 0x[0-9a-f]+, is not in memory", reason(0))
    guest.vm.remove_memory(0)
    guest.vm.add_memory(0, guest.ram[:SIZE], slot=0, log_dirty=True)
    if mode == "tdp":
        guest.finish(f"mov rsi, {TEST}; mov eax, [rsi + 0x1000]; hlt")
        assert reason(1, write=True) == "write-protected for the dirty log"
