"""From an access without a translation to one with it: loads, faults and their order, in both modes."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Any

import pytest

from pykvm.abi import ffi, lib, uapi
from pykvm.mmu import base, direct, pages, shadow
from pykvm.mmu import spte as sptes
from tests.mmu.driver import LARGE, PS, TEST, Driver, U, W
from tests.mmu.flat import AREA, EFAULT, ENOMEM, Flat, Hlt, Mmio, Shutdown, fails, listen, steps
from tests.mmu.guest import FRAMES, FULL, ROOT, PagingGuest
from tests.mmu.guest import TEST as PAGED
from tests.mmu.reference import P

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.mmu.conftest import NewFlat, NewGuest

READ, READ_WRITE, NONE = mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE, 0
LOG = uapi.KVM_MEM_LOG_DIRTY_PAGES
MIB2, GIB = 2 << 20, 1 << 30
COUNTERS = (
    "pf_taken",
    "pf_fixed",
    "pf_emulate",
    "pf_spurious",
    "pf_fast",
    "pf_mmio_spte_created",
    "pf_guest",
)
GAUGES = ("pages_4k", "pages_2m", "pages_1g")


def changes(
    guest: Flat | PagingGuest, do: Callable[[], object], names: tuple[str, ...] = COUNTERS
) -> dict[str, int]:
    """Return the statistics that something moves, and by how much."""
    before = guest.vm.mmu.stat()
    do()
    after = guest.vm.mmu.stat()
    return {name: after[name] - before[name] for name in names if after[name] != before[name]}


# ---- load


@pytest.mark.spec("mmu.load")
def test_a_root_is_loaded_at_the_first_entry_and_when_it_has_gone(flat: Flat) -> None:
    assert flat.vm.mmu.pages() == ()
    with listen("mmu_step") as seen:
        assert flat.finish("hlt") == 0
    alloc = "mmu_alloc_direct_roots" if flat.tdp else "mmu_alloc_shadow_roots"
    sync = [] if flat.tdp else ["kvm_mmu_sync_roots"]
    load = [step for step in steps(seen, 0) if step in {alloc, *sync, "load_mmu_pgd"}]
    assert load == [alloc, *sync, "load_mmu_pgd"]
    # Before it anything else: tables in reserve.
    assert steps(seen)[0] == "mmu_topup_memory_caches"
    flushes = flat.stat("tlb_flush")
    assert flushes > 0
    with listen("mmu_step") as seen:
        assert flat.finish("mov eax, 3; hlt") == 3
    assert steps(seen) == []
    assert flat.stat("tlb_flush") == flushes
    # Shadow roots go with a slot; those of two-dimensional paging stay.
    memory = flat.memory(AREA, MIB2)
    flat.slot(1, AREA, memory, delete=True)
    flushes = flat.stat("tlb_flush")
    with listen("mmu_step") as seen:
        assert flat.finish("mov eax, 4; hlt") == 4
    assert (alloc in steps(seen)) == (not flat.tdp)
    assert (flat.stat("tlb_flush") > flushes) == (not flat.tdp)


class OutOfMemory:
    """The host has so many tables left."""

    def __init__(self, left: int) -> None:
        self.left = left

    def __getattr__(self, name: str) -> Any:
        return getattr(lib, name)

    def spt_alloc(self) -> Any:
        self.left -= 1
        return lib.spt_alloc() if self.left >= 0 else ffi.NULL


def state(guest: Flat | PagingGuest) -> object:
    vcpu = guest.vcpus[0] if isinstance(guest, Flat) else guest.vcpu
    regs, found = vcpu.get_regs(), guest.vm.mmu.pages()
    return bytes(ffi.buffer(regs)), [(page.gfn, page.role, page.entries) for page in found]


@pytest.mark.spec("mmu.topup")
def test_no_memory_for_tables_fails_the_entry_and_nothing_else(
    flat: Flat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each fault takes what it needs before it begins; KVM_RUN says ENOMEM, and again, then goes on."""
    for n in range(24):
        flat.memory(AREA + n * (8 << 20), 0x1000).set_word(0, n)
    source = "".join(f"add eax, [{AREA + n * (8 << 20):#x}]; " for n in range(24)) + "hlt"
    flat.start(source, rax=0)
    failed = 0
    for _ in range(200):
        memory = OutOfMemory(1)
        monkeypatch.setattr(pages, "lib", memory)
        with fails(ENOMEM):
            flat.enter()
        before, taken = state(flat), flat.stat("pf_taken")
        with fails(ENOMEM):
            flat.enter()
        assert state(flat) == before
        assert flat.stat("pf_taken") - taken in {0, 1}
        failed += 1
        monkeypatch.setattr(pages, "lib", OutOfMemory(9 if failed > 1 else 5))
        try:
            found = flat.enter()
        except OSError as again:
            assert again.errno == ENOMEM
            continue
        assert found == Hlt()
        break
    assert flat.vcpus[0].regs.rax == sum(range(24))
    assert failed >= 2


@pytest.mark.parametrize("width", [32, 36, 64])
@pytest.mark.spec("mmu.topup")
def test_however_much_memory_there_is_a_fault_is_whole_or_does_not_begin(
    new_guest: NewGuest, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    """PAE's root and its four pages are the most one load takes."""
    guest = new_guest(width=width)
    guest.map(0, FRAMES)
    guest.write(FRAMES, 7, 4)
    left = 0
    while left < 20:
        monkeypatch.setattr(pages, "lib", OutOfMemory(left))
        try:
            assert guest.finish(f"mov rsi, {PAGED}; mov eax, [rsi]; hlt") == 7
            break
        except OSError as error:
            assert error.errno == ENOMEM
            assert guest.vm.mmu.audit() == []
            left += 1
        # What was in reserve goes: the next try begins with nothing.
        monkeypatch.setattr(pages, "lib", lib)
        guest.vm.mmu._vm.mmu.cache(guest.vm.mmu._vm.vcpus[0]).free()
        guest.vcpu.sregs.cr3 = ROOT
    # The loop ends before 20, and not at once.
    assert 0 < left < 20


@pytest.mark.spec("mmu.alloc_roots")
def test_roots_are_one_page_or_paes_four(new_guest: NewGuest) -> None:
    for width in (64, 36, 32):
        guest = new_guest(width=width)
        assert guest.finish("mov eax, 5; hlt") == 5
        roots = [page for page in guest.vm.mmu.pages() if page.root_count]
        if guest.vm.mmu.mode == "tdp":
            assert [(page.role.level, page.role.direct) for page in roots] == [(4, True)]
            continue
        assert not any(page.role.direct for page in roots)
        if width == 64:
            assert [(page.role.level, page.gfn) for page in roots] == [(4, ROOT >> 12)]
        elif width == 36:
            # Two PDPTEs of the four are present: each has a page of its own.
            assert sorted((page.role.level, page.gfn) for page in roots) == [(2, 0x22), (2, 0x23)]
        else:
            assert sorted((page.role.level, page.gfn, page.role.quadrant) for page in roots) == [
                (2, ROOT >> 12, quadrant) for quadrant in range(4)
            ]


@pytest.mark.spec("mmu.alloc_roots")
def test_roots_without_paging_are_direct(flat: Flat) -> None:
    flat.finish("hlt")
    roots = [page for page in flat.vm.mmu.pages() if page.root_count]
    assert all(page.role.direct for page in roots)
    found = sorted((page.role.level, page.gfn << 12) for page in roots)
    assert found == ([(4, 0)] if flat.tdp else [(2, n * GIB) for n in range(4)])


@pytest.mark.parametrize("width", [32, 36, 64])
@pytest.mark.parametrize("cr3", [0x7F00_0000, 0xFFFF_F000])
@pytest.mark.spec("mmu.alloc_roots")
def test_a_cr3_outside_the_slots_is_the_guests_end_not_the_hosts(
    new_guest: NewGuest, width: int, cr3: int
) -> None:
    guest = new_guest(width=width)
    guest.vcpu.sregs.cr3 = cr3
    found = guest.run("mov eax, 1; hlt")
    if width == 36:
        # What the PDPTEs were when they could be read.
        assert found == Hlt()
    else:
        assert found == Shutdown()
    assert guest.vm.mmu.audit() == []


@pytest.mark.spec("mmu.set_cr0")
def test_paging_on_and_off_counts_for_the_next_access(flat: Flat) -> None:
    """The same linear address before, while and after CR0.PG is set."""
    directory, target, other = 0x20000, AREA, AREA + 0x40_0000
    memory = flat.memory(AREA, 8 << 20)
    memory.set_word(0x10, 0x11)
    memory.set_word(other - AREA + 0x10, 0x2200)
    for index, frame in ((0, 0), (target >> 22, other), (other >> 22, target)):
        flat.low[directory + index * 4 : directory + index * 4 + 4] = (frame | 0xE3).to_bytes(4, "little")
    read = f"add eax, [{target + 0x10:#x}]; "
    toggle = "mov ecx, cr0; xor ecx, 0x80000000; mov cr0, ecx; "
    source = f"xor eax, eax; mov ecx, cr4; or ecx, 0x10; mov cr4, ecx; mov ecx, {directory}; mov cr3, ecx; "
    source += read + toggle + read + read + toggle + read + toggle + read + toggle + "hlt"
    for _ in range(2):
        assert flat.finish(source) == 3 * 0x2200 + 2 * 0x11
    roots = {page.role.direct for page in flat.vm.mmu.pages() if page.root_count}
    assert roots == ({True} if flat.tdp else {True, False})


# ---- the order of a fault


def fault_order(tdp: bool) -> list[str]:
    if tdp:
        return [
            "mmu_topup_memory_caches",
            "mapping_level",
            "fast_page_fault",
            "kvm_faultin_pfn",
            "is_page_fault_stale",
            "make_mmu_pages_available",
            "direct_map",
        ]
    return [
        "mmu_topup_memory_caches",
        "fast_page_fault",
        "kvm_faultin_pfn",
        "is_page_fault_stale",
        "make_mmu_pages_available",
        "mapping_level",
        "fetch",
        "pte_prefetch",
    ]


@pytest.mark.spec("mmu.tdp_page_fault")
def test_the_order_of_a_fault(flat: Flat) -> None:
    flat.memory(AREA, 0x8000)
    flat.finish("hlt")
    with listen("mmu_step") as seen:
        flat.write(AREA + 0x3000, 1)
    assert steps(seen, AREA + 0x3000) == fault_order(flat.tdp)


@pytest.mark.spec("mmu.tdp_page_fault", "mmu.abnormal_pfn")
def test_the_order_of_a_fault_that_ends_early(flat: Flat) -> None:
    memory = flat.memory(AREA, 0x8000)
    flat.finish("hlt")
    memory.protect(0x3000, 0x1000, NONE)
    with listen("mmu_step") as seen, fails(EFAULT):
        flat.read(AREA + 0x3000)
    order = [step for step in fault_order(flat.tdp) if flat.tdp or step != "fast_page_fault"]
    assert steps(seen, AREA + 0x3000) == [
        *order[: order.index("kvm_faultin_pfn") + 1],
        "handle_abnormal_pfn",
    ]
    with listen("mmu_step") as seen:
        assert isinstance(flat.run(f"mov eax, [{2 * AREA:#x}]; hlt"), Mmio)
    assert steps(seen, 2 * AREA) == ["mmu_topup_memory_caches", "handle_abnormal_pfn"]


@pytest.mark.parametrize("when", ["before", "while"])
@pytest.mark.spec("mmu.tdp_page_fault", "mmu.slot_delete_zap")
def test_a_slot_that_goes_during_a_fault_is_not_mapped(
    flat: Flat, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """The stale check: the pfn was looked up in slots that are no more."""
    memory, other = flat.memory(AREA, 0x1000), flat.memory(2 * AREA, 0x1000)
    memory.set_word(0, 1)
    other.set_word(0, 2)
    found = base.host_access
    changed: list[int] = []

    def host_access(slot: Any, gpa: Any, *, write: bool) -> bool:
        def change() -> None:
            changed.append(gpa)
            flat.vm._set_region(1, 0, AREA, 0, 0)
            flat.vm._set_region(2, 0, AREA, 0x1000, other.hva)

        if gpa >> 12 == AREA >> 12 and not changed and when == "before":
            change()
        result = found(slot, gpa, write=write)
        if gpa >> 12 == AREA >> 12 and not changed and when == "while":
            change()
        return result

    for module in (direct, shadow):
        monkeypatch.setattr(module, "host_access", host_access)
    with listen("mmu_step") as seen:
        assert flat.read(AREA) == 2
    # Twice, and only the second time to the end.
    assert steps(seen, AREA).count("kvm_faultin_pfn") == 2
    assert steps(seen, AREA).count("make_mmu_pages_available") == 1


@pytest.mark.spec("mmu.tdp_page_fault", "mmu.dirty_no_false")
def test_logging_that_begins_during_a_fault_sees_its_write(
    flat: Flat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault looked at a slot without a log; the ioctl is over before it maps the page writable."""
    memory = flat.memory(AREA, 0x8000)
    flat.read(AREA + 0x1000)
    found = base.host_access
    changed: list[int] = []

    def host_access(slot: Any, gpa: Any, *, write: bool) -> bool:
        result = found(slot, gpa, write=write)
        if gpa >> 12 == (AREA >> 12) + 5 and not changed:
            changed.append(gpa)
            flat.vm._set_region(1, LOG, AREA, memory.size, memory.hva)
        return result

    for module in (direct, shadow):
        monkeypatch.setattr(module, "host_access", host_access)
    for _ in range(2):
        flat.write(AREA + 0x5000, 7)
        assert flat.dirty(1, 8) == {5}
    assert len(changed) == 1


@pytest.mark.spec("mmu.notifier", "mmu.tdp_page_fault")
def test_host_memory_that_changes_during_a_fault_is_looked_at_again(
    flat: Flat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """invalidate_seq: between the lookup of the host page and the map it was taken away."""
    from pykvm.kvm.memslots import invalidate_range_end, invalidate_range_start

    memory = flat.memory(AREA, MIB2)
    vm = flat.vm.mmu._vm
    found = base.host_access
    calls: list[int] = []

    def host_access(slot: Any, gpa: Any, *, write: bool) -> bool:
        result = found(slot, gpa, write=write)
        if gpa >> 12 == AREA >> 12:
            calls.append(gpa)
            if len(calls) == 1:
                # All of it, as munmap() and mmap() would.
                invalidate_range_start(vm, memory.hva, memory.hva + 0x1000)
                memory.protect(0, 0x1000, READ)
                invalidate_range_end(vm, memory.hva, memory.hva + 0x1000)
            elif len(calls) == 2:
                invalidate_range_start(vm, memory.hva, memory.hva + 0x1000)
            elif len(calls) == 5:
                # The fault is not over as long as it goes on.
                assert flat.levels(AREA) == []
                invalidate_range_end(vm, memory.hva, memory.hva + 0x1000)
        return result

    for module in (direct, shadow):
        monkeypatch.setattr(module, "host_access", host_access)
    assert flat.read(AREA) == 0
    assert len(calls) == 6
    (spte,) = flat.sptes(AREA)
    assert not spte & (sptes.W | sptes.HOST_WRITABLE)


# ---- map


@pytest.mark.spec("mmu.direct_map", "mmu.mapping_level")
def test_the_leaf_has_all_rights_that_the_host_grants(flat: Flat) -> None:
    memory = flat.memory(AREA, 0x8000)
    memory.protect(0x1000, 0x1000, READ)
    flat.finish("hlt")
    assert changes(flat, lambda: flat.read(AREA)) == {"pf_taken": 1, "pf_fixed": 1}
    taken = changes(flat, lambda: flat.read(AREA + 0x1000))
    assert taken in ({"pf_taken": 1, "pf_fixed": 1}, {})
    (spte,) = flat.sptes(AREA)
    assert spte & (sptes.RWX | sptes.U) == sptes.RWX | sptes.U
    assert spte & sptes.PFN_MASK == memory.hva
    if flat.tdp:
        # A prefetch finds out about host rights only when they are used.
        (spte,) = flat.sptes(AREA + 0x1000)
        assert spte & (sptes.RWX | sptes.HOST_WRITABLE) == sptes.R | sptes.X
    with fails(EFAULT):
        flat.write(AREA + 0x1000, 1)
    assert memory.word(0x1000) == 0


@pytest.mark.spec("mmu.direct_map")
def test_missing_tables_are_made_down_to_the_goal_and_no_further(flat: Flat) -> None:
    flat.memory(AREA, 4 << 20)
    flat.memory(2 * AREA, 0x1000)
    flat.finish("hlt")

    def levels(gpa: int) -> list[int]:
        """Levels of the tables whose range holds the gpa."""
        return sorted(
            page.role.level
            for page in flat.vm.mmu.pages()
            if page.gfn <= gpa >> 12 < page.gfn + (1 << 9 * page.role.level)
        )

    assert levels(AREA) == levels(2 * AREA)
    above = levels(AREA)
    assert 1 not in above
    flat.write(AREA, 1)
    assert flat.levels(AREA) == [2]
    assert levels(AREA) == above
    flat.write(2 * AREA, 1)
    assert flat.levels(2 * AREA) == [1]
    assert levels(2 * AREA) == [1, *above]


@pytest.mark.spec("mmu.direct_map", "mmu.large_split")
def test_a_large_leaf_in_the_way_is_dropped(flat: Flat) -> None:
    memory = flat.memory(AREA, 4 << 20)
    memory.protect(0, 0x1000, READ)
    flat.read(AREA)
    assert flat.levels(AREA) == [2]
    memory.unmap(0x5000, 0x1000)
    flushes = flat.stat("remote_tlb_flush_requests")
    flat.write(AREA + 0x1000, 7)
    assert memory.word(0x1000) == 7
    assert flat.levels(AREA + 0x1000) == [1]
    assert 2 not in flat.levels(AREA)
    assert flat.stat("remote_tlb_flush_requests") > flushes
    assert flat.read(AREA) == 0
    with fails(EFAULT):
        flat.read(AREA + 0x5000)


# ---- large pages


def gauges(flat: Flat, do: Callable[[], object]) -> tuple[int, ...]:
    before = flat.stats(*GAUGES)
    do()
    return tuple(now - then for now, then in zip(flat.stats(*GAUGES), before, strict=True))


@pytest.mark.spec("mmu.mapping_level")
def test_pages_are_as_large_as_host_and_slot_allow(flat: Flat) -> None:
    """Congruent addresses, the whole page in one slot, the whole host range there; 1 GiB if it can be."""
    flat.finish("hlt")
    flat.memory(4 * AREA, GIB, align=GIB)
    assert gauges(flat, lambda: flat.read(4 * AREA + 0x1234)) == (0, 1, 0)
    flat.memory(2 * GIB, GIB + MIB2, align=GIB)
    assert gauges(flat, lambda: flat.read(2 * GIB + 0x123_4567)) == ((0, 0, 1) if flat.tdp else (0, 1, 0))
    # The rest of the slot is too short for a gigabyte, a piece of two megabytes it is.
    assert gauges(flat, lambda: flat.read(3 * GIB + 0x1000)) == (0, 1, 0)
    # A slot that begins and ends in the middle of a large page.
    memory = flat.memory(AREA, 8 << 20)
    flat.slot(3, AREA, memory, delete=True)
    flat.vm._set_region(3, 0, AREA + 0x1000, MIB2 * 2, memory.hva + 0x1000)
    flat.finish("hlt")
    assert flat.levels(AREA + 0x1000) == []
    for gpa, level in ((AREA + 0x1000, 1), (AREA + MIB2, 2), (AREA + 2 * MIB2, 1)):
        flat.read(gpa)
        assert flat.levels(gpa) == [level]
    # Not congruent: the host's page begins elsewhere.
    flat.vm._set_region(9, 0, 2 * AREA, MIB2 * 2, memory.hva + 0x1000)
    flat.read(2 * AREA)
    assert flat.levels(2 * AREA) == [1]
    # A hole in the host's range.
    hole = flat.memory(3 * AREA, 4 << 20)
    hole.unmap(0x1F_F000, 0x1000)
    flat.read(3 * AREA)
    flat.read(3 * AREA + MIB2)
    assert (flat.levels(3 * AREA), flat.levels(3 * AREA + MIB2)) == ([1], [2])


@pytest.mark.spec("mmu.mapping_level", "mmu.large_split", "mmu.page_track")
def test_a_guest_table_inside_keeps_a_large_page_apart() -> None:
    """Shadow paging: write-tracked frames are never below a large spte, and split one that is there."""
    driver = Driver(tdp=False, width=64)
    try:
        vcpu, table = driver.vcpus[0], LARGE + 0x3000
        driver.poke(driver.pde(0, 0), LARGE | PS | P | W | U, 8)
        assert driver.do(vcpu, "write", rbx=TEST, rax=0xC3).kind == "ok"
        assert [page.role.level for page, _ in driver.vm.mmu.rmap(LARGE >> 12)] == [2]
        # The guest takes a frame of it as page table.
        driver.poke(table, AREA_FRAME | P | W | U, 8)
        assert driver.do(vcpu, "store8", rdi=driver.pde(0, 1), rax=table | P | W | U).kind == "ok"
        assert driver.do(vcpu, "read", rbx=TEST + MIB2).kind == "ok"
        assert 2 not in [page.role.level for page, _ in driver.vm.mmu.rmap(LARGE >> 12)]
        assert driver.vm.mmu.audit() == []
        for offset in (0, 0x3008):
            assert driver.do(vcpu, "write", rbx=TEST + offset, rax=0xC3).kind == "ok"
        assert {page.role.level for page, _ in driver.vm.mmu.rmap(LARGE >> 12)} == {1}
        # Another large page of the slot, without a table in it, is large.
        driver.poke(driver.pde(0, 0), LARGE + MIB2 | PS | P | W | U, 8)
        assert driver.do(vcpu, "cr3", rax=driver.root(0)).kind == "ok"
        driver.do(vcpu, "read", rbx=TEST)
        assert driver.vm.mmu.audit() == []
    finally:
        driver.close()


AREA_FRAME = 0x20_8000


@pytest.mark.spec("mmu.mapping_level")
def test_a_small_guest_page_is_a_small_page_in_shadow_mode() -> None:
    levels = {}
    for tdp in (True, False):
        driver = Driver(tdp=tdp, width=64)
        driver.poke(TABLES_FRAME, LARGE | P | W | U, 8)
        driver.poke(driver.pde(0, 0), TABLES_FRAME | P | W | U, 8)
        driver.do(driver.vcpus[0], "read", rbx=TEST)
        levels[tdp] = [page.role.level for page, _ in driver.vm.mmu.rmap(LARGE >> 12)]
        driver.close()
    assert levels == {True: [2], False: [1]}


TABLES_FRAME = 0x20_2000


@pytest.mark.spec("mmu.large_4m")
def test_a_4m_guest_page_is_two_2m_sptes(mode: str) -> None:
    driver = Driver(tdp=mode == "tdp", width=32)
    try:
        vcpu = driver.vcpus[0]
        driver.poke(driver.pde(0, 0), LARGE | PS | P | W | U, 4)
        before = driver.vm.mmu.stat()["pages_2m"]
        for half in (0, 1):
            driver.large.set_word(half * MIB2 + 0x10, 100 + half)
            assert driver.do(vcpu, "read", rbx=TEST + half * MIB2 + 0x10).value == 100 + half
            assert driver.vm.mmu.stat()["pages_2m"] == before + 1 + half
            (page, index), *others = driver.vm.mmu.rmap((LARGE >> 12) + half * 512)
            assert (page.role.level, others) == (2, [])
            assert page.entries[index] & sptes.PFN_MASK == driver.large.hva + half * MIB2
        if mode == "shadow":
            assert page.role.quadrant == 1
            # One PDE write takes both.
            assert driver.do(vcpu, "store4", rdi=driver.pde(0, 0), rax=0).kind == "ok"
            assert driver.vm.mmu.stat()["pages_2m"] == before
        assert driver.vm.mmu.audit() == []
    finally:
        driver.close()


@pytest.mark.spec("mmu.large_split")
def test_dirty_logging_splits_large_pages_and_its_end_brings_them_back(flat: Flat) -> None:
    memory = flat.memory(AREA, 4 << 20)
    flat.write(AREA, 1)
    flat.write(AREA + MIB2, 1)
    assert (flat.levels(AREA), flat.levels(AREA + MIB2)) == ([2], [2])
    flat.slot(1, AREA, memory, LOG)
    flat.write(AREA + 0x5000, 2)
    assert flat.levels(AREA + 0x5000) == [1]
    assert flat.dirty(1, 1024) == {5}
    flat.read(AREA + MIB2)
    assert flat.levels(AREA + MIB2) == [1]
    assert flat.dirty(1, 1024) == set()
    flat.slot(1, AREA, memory)
    for gpa in (AREA, AREA + MIB2):
        flat.write(gpa, 3)
        assert flat.levels(gpa) == [2]


# ---- fast and spurious


@pytest.mark.spec("mmu.fast_pf")
def test_a_page_protected_for_the_log_is_writable_again_at_once(flat: Flat) -> None:
    flat.memory(AREA, 0x8000, LOG)
    flat.write(AREA + 0x2000, 1)
    assert flat.dirty(1, 8) == {2}
    for _ in range(3):
        with listen("fast_page_fault") as seen:
            moved = changes(flat, lambda: flat.write(AREA + 0x2000, 2))
        assert moved == {"pf_taken": 1, "pf_fast": 1}
        ((_, fields),) = seen
        old, new = int(str(fields["old"])), int(str(fields["new"]))
        assert (new ^ old, fields["fixed"]) == (sptes.W, True)
        assert old & sptes.MMU_WRITABLE
        assert flat.dirty(1, 8) == {2}
    # Writable: no fault; and not logged twice.
    flat.write(AREA + 0x2000, 3)
    assert changes(flat, lambda: flat.write(AREA + 0x2000, 4)) == {}
    assert flat.dirty(1, 8) == {2}


@pytest.mark.parametrize("width", [32, 36, 64])
@pytest.mark.spec("mmu.fast_pf", "mmu.emulate", "mmu.page_track")
def test_a_guest_table_is_not_made_writable_by_the_fast_path(width: int) -> None:
    """A directory is write-protected for good: its writes are emulated, each once, whatever the log says."""
    guest = PagingGuest(tdp=False, width=width, log_dirty=True)
    try:
        guest.map(0, FRAMES)
        read = f"mov rsi, {PAGED}; mov eax, [rsi]; "
        guest.finish(read + f"mov eax, [{guest.pde()}]; hlt")
        guest.vm.dirty_log(0)
        before, entry = guest.vm.mmu.stat(), guest.read(guest.pde())
        source = f"mov ebx, 0x200; lock xadd [{guest.pde()}], ebx; {read} mov eax, ebx; hlt"
        assert guest.finish(source) == entry & 0xFFFF_FFFF
        after = guest.vm.mmu.stat()
        assert guest.read(guest.pde()) == entry + 0x200
        assert after["mmu_pte_write"] - before["mmu_pte_write"] == 1
        assert after["pf_fast"] == before["pf_fast"]
        assert after["pf_emulate"] > before["pf_emulate"]
        log = int.from_bytes(guest.vm.dirty_log(0), "little")
        assert log >> (guest.pde() >> 12) & 1
        assert guest.vm.mmu.audit() == []
    finally:
        guest.close()


@pytest.mark.spec("mmu.spurious")
def test_a_fault_that_another_vcpu_has_handled_is_spurious(new_flat: NewFlat) -> None:
    flat = new_flat(vcpus=2)
    memory = flat.memory(AREA, 0x8000)
    memory.set_word(0, 5)
    for n in (0, 1):
        flat.finish("hlt", n)
    states: list[Any] = []

    def while_in_the_fault(_: str, fields: Any) -> None:
        if fields["vcpu"] == 0 and fields["gfn"] == AREA >> 12 and not states:
            states.append(0)
            flat.write(AREA, 6, 1)
            states.append([(page.gfn, page.entries) for page in flat.vm.mmu.pages()])

    from pykvm import trace

    with trace.listen("mmu_step", while_in_the_fault):
        before = flat.stats("pf_spurious", "pf_fixed", "pf_taken")
        flat.write(AREA, 7, 0)
    after = flat.stats("pf_spurious", "pf_fixed", "pf_taken")
    assert tuple(b - a for a, b in zip(before, after, strict=True)) == (1, 1, 2)
    # D, which the processor sets, is all that has changed.
    now = [(page.gfn, tuple(entry & ~sptes.DIRTY for entry in page.entries)) for page in flat.vm.mmu.pages()]
    assert now == [(gfn, tuple(entry & ~sptes.DIRTY for entry in es)) for gfn, es in states[1]]
    assert memory.word(0) == 7


# ---- prefetch


@pytest.mark.parametrize("width", [32, 36, 64])
@pytest.mark.spec("mmu.prefetch")
def test_neighbours_that_the_guest_has_used_are_mapped_in_advance(width: int) -> None:
    guest = PagingGuest(tdp=False, width=width)
    try:
        # Page 3 was not accessed, page 5 is absent, page 8 is in the next window; host pages are there.
        for n in range(9):
            guest.map(n, FRAMES + n * 0x1000, P | W | U | (0 if n == 3 else 0x20))
            guest.write(FRAMES + n * 0x1000, n + 1, 4)
        guest.write(guest.pte(5), 0)
        entries = [guest.read(guest.pte(n)) for n in range(9)]
        guest.finish("hlt")
        assert changes(guest, lambda: guest.finish(f"mov rsi, {PAGED + 0x2000}; mov eax, [rsi]; hlt")) == {
            "pf_taken": 1,
            "pf_fixed": 1,
        }
        assert [guest.read(guest.pte(n)) for n in range(9)] == entries, "A or D was set"
        mapped = {n for n in range(9) if guest.vm.mmu.rmap((FRAMES >> 12) + n)}
        assert mapped == {0, 1, 2, 4, 6, 7}
        reads = "".join(f"add eax, [rsi + {n * 0x1000}]; " for n in sorted(mapped))
        found = changes(guest, lambda: guest.finish(f"xor eax, eax; mov rsi, {PAGED}; {reads} hlt"))
        assert found == {}
        assert guest.vcpu.regs.rax == sum(n + 1 for n in mapped)
        for n in (3, 8):
            source = f"mov rsi, {PAGED + n * 0x1000}; mov eax, [rsi]; hlt"
            assert changes(guest, lambda s=source: guest.finish(s))["pf_taken"] == 1  # type: ignore[misc]
        assert guest.vm.mmu.audit() == []
    finally:
        guest.close()


@pytest.mark.spec("mmu.prefetch", "mmu.dirty_no_false")
def test_what_is_prefetched_is_not_dirty(flat: Flat) -> None:
    """direct_pte_prefetch(); the log wants to see the first write."""
    memory = flat.memory(AREA, 0x1_0000)
    for n in range(16):
        memory.set_word(n * 0x1000, n)
    flat.finish("hlt")
    assert changes(flat, lambda: flat.read(AREA + 0x9000)) == {"pf_taken": 1, "pf_fixed": 1}
    mapped = {n for n in range(16) if flat.levels(AREA + n * 0x1000)}
    # Two-dimensional paging maps as large as it can, and nothing in advance (tdp_mmu.c).
    assert mapped == ({9} if flat.tdp else set(range(8, 16)))
    if not flat.tdp:
        assert changes(flat, lambda: flat.write(AREA + 0xE000, 1)) == {}
    flat.slot(1, AREA, memory, LOG)
    flat.dirty(1, 16)
    flat.read(AREA)
    flat.write(AREA + 0x1000, 1)
    assert flat.dirty(1, 16) == {1}
    for n in range(2, 8):
        flat.write(AREA + n * 0x1000, 1)
    assert flat.dirty(1, 16) == set(range(2, 8))


@pytest.mark.spec("mmu.prefetch")
def test_host_pages_that_are_not_there_are_not_fetched_for_a_guess() -> None:
    flat = Flat(tdp=False)
    try:
        memory = flat.memory(AREA, 0x8000)
        memory.set_word(0x3000, 1)
        flat.read(AREA + 0x4000)
        assert {n for n in range(8) if flat.levels(AREA + n * 0x1000)} == {3, 4}
    finally:
        flat.close()


# ---- what cannot be mapped


@pytest.mark.parametrize("what", ["none", "read-only", "unmapped", "beyond the file"])
@pytest.mark.spec("mmu.abnormal_pfn")
def test_host_memory_that_is_not_there_is_efault_with_its_address(
    flat: Flat, what: str, tmp_path: Any
) -> None:
    """KVM_RUN: EFAULT, KVM_EXIT_MEMORY_FAULT says where; the guest goes on when it is there again."""
    memory = flat.memory(AREA, 0x8000)
    flat.write(AREA + 0x5000, 1)
    flat.write(AREA + 0x4000, 1)
    if what == "unmapped":
        memory.unmap(0x5000, 0x1000)
    elif what == "beyond the file":
        path = tmp_path / "short"
        path.write_bytes(bytes(0x1000))
        with path.open("r+b") as file:
            address = memory.libc.mmap(memory.hva + 0x4000, 0x2000, READ_WRITE, 0x11, file.fileno(), 0)
        assert address == memory.hva + 0x4000
        memory.holes = True
    else:
        memory.protect(0x5000, 0x1000, NONE if what == "none" else READ)
    flat.start(f"mov ecx, 3; mov dword ptr [{AREA + 0x5ABC:#x}], ecx; inc ecx; hlt")
    for _ in range(2):
        with fails(EFAULT):
            flat.enter()
        run = flat.vcpus[0].kvm_run
        assert run.exit_reason == uapi.KVM_EXIT_MEMORY_FAULT
        assert (run.memory_fault.gpa, run.memory_fault.size) == (AREA + 0x5000, 0x1000)
        assert run.memory_fault.flags == 0
        assert flat.vcpus[0].regs.rcx == 3
    if what == "read-only":
        memory.protect(0x5000, 0x1000, READ_WRITE)
    else:
        memory.remap(0x5000, 0x1000, READ_WRITE)
    assert flat.enter() == Hlt()
    assert memory.word(0x5ABC) == 3
    assert flat.vcpus[0].regs.rcx == 4


# ---- emulation


@pytest.mark.parametrize(
    ("instruction", "exits", "eax", "left"),
    [
        ("lock xadd [{mmio}], eax", [("r", 0), ("w", 12)], 5, None),
        ("inc dword ptr [{mmio}]", [("r", 0), ("w", 6)], 7, None),
        ("push dword ptr [{mmio}]", [("r", 0)], 7, 4),
        ("mov esi, {mmio}; mov edi, {ram}; movsd; sub esi, {mmio}; mov eax, esi", [("r", 0)], 4, None),
        ("mov edi, {mmio}; mov ecx, 3; rep stosd; mov eax, ecx", [("w", 7), ("w", 7), ("w", 7)], 0, None),
    ],
)
@pytest.mark.spec("mmu.emulate")
def test_mmio_instructions_have_their_effects_once(
    flat: Flat, instruction: str, exits: list[tuple[str, int]], eax: int, left: int | None
) -> None:
    flat.memory(AREA, 0x1000)
    source = instruction.format(mmio=f"{2 * AREA:#x}", ram=f"{AREA:#x}")
    seen = []
    found = flat.run(f"mov eax, 7; {source}; hlt")
    stack = flat.vcpus[0].regs.rsp
    while isinstance(found, Mmio):
        if found.is_write:
            seen.append(("w", int.from_bytes(found.data, "little")))
        else:
            seen.append(("r", 0))
            found.data[:] = (5).to_bytes(4, "little")
        found = flat.enter()
    assert found == Hlt()
    assert seen == exits
    assert flat.vcpus[0].regs.rax == eax
    if left is not None:
        assert stack - flat.vcpus[0].regs.rsp == left
        assert int.from_bytes(flat.low[stack - 4 : stack], "little") == 5


# ---- what other processors still know


@pytest.mark.spec("mmu.tlb_model", "mmu.smp_flush", "mmu.sync_invlpg")
def test_a_translation_that_only_a_tlb_has_left_cannot_write_a_guest_table_unseen() -> None:
    """vCPU 0 invalidates a page and makes its frame a table; vCPU 1 has not flushed, and writes the table."""
    driver = Driver(tdp=False, width=64, vcpus=2)
    try:
        one, two = driver.vcpus
        frame, entry = FRAMES_OF_AREA, FULL
        driver.poke(TABLES_FRAME, frame | entry, 8)
        driver.poke(frame, frame + 0x1000 | entry, 8)
        for n in (1, 2):
            driver.poke(frame + n * 0x1000 + 0x10, 100 * n, 4)
        driver.poke(driver.pde(0, 0), TABLES_FRAME | P | W | U, 8)
        for vcpu in (one, two):
            assert driver.do(vcpu, "store8", rdi=TEST + 0x800, rax=1).kind == "ok"
        assert driver.do(one, "store8", rdi=TABLES_FRAME, rax=0).kind == "ok"
        assert driver.do(one, "invlpg", rbx=TEST).kind == "ok"
        assert driver.do(one, "store8", rdi=driver.pde(0, 1), rax=frame | P | W | U).kind == "ok"
        assert driver.do(one, "read", rbx=TEST + MIB2 + 0x10).value == 100
        wrote = driver.do(two, "store8", rdi=TEST, rax=frame + 0x2000 | entry).kind == "ok"
        assert driver.do(one, "invlpg", rbx=TEST + MIB2).kind == "ok"
        assert driver.do(one, "read", rbx=TEST + MIB2 + 0x10).value == (200 if wrote else 100)
        assert driver.vm.mmu.audit() == []
    finally:
        driver.close()


FRAMES_OF_AREA = 0x20_8000
