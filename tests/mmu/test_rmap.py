"""The reverse map: which sptes map a frame, kept per slot; and what else a slot keeps of its frames.

Rows of mmu.md section 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.abi import ffi, uapi
from pykvm.kvm.memslots import invalidate_range_end, invalidate_range_start
from pykvm.mmu.pte_list import (
    PTE_LIST_EXT,
    PteList,
    PteListDesc,
    pte_list_add,
    pte_list_count,
    pte_list_iter,
    pte_list_remove,
)
from pykvm.mmu.rmap import LEVELS
from tests.mmu.driver import Memory
from tests.mmu.guest import FRAMES, FULL, PD, PDPT, PS, PT, ROOT, SIZE, TEST, A, P, PagingGuest, U, W

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.mmu.conftest import NewGuest

WIDTHS = pytest.mark.parametrize("width", [32, 36, 64])
TABLE = P | W | U | A
PT2 = 0x31000
TABLES = 0x30000  # page tables of tests that need many


def leaves(guest: PagingGuest) -> dict[tuple[int, int], tuple[int, int]]:
    """Every leaf there is: (table, index) -> (level, frame)."""
    found = {}
    for page in guest.vm.mmu.pages():
        for index, entry in enumerate(page.entries):
            if entry & 1 and (page.role.level == 1 or entry & PS):
                found[page.spt, index] = (page.role.level, page.gfn_of(index))
    return found


def hva_of(memory: memoryview) -> int:
    return int(ffi.cast("uintptr_t", ffi.from_buffer(memory)))


@pytest.fixture
def memory() -> Iterator[Memory]:
    """4 MiB that start at a multiple of 4 MiB, so that large pages are possible."""
    made = Memory(4 << 20)
    yield made
    made.close()


@WIDTHS
@pytest.mark.spec("mmu.rmap")
def test_every_leaf_is_in_the_reverse_map_and_nothing_else(
    new_shadow: NewGuest, width: int, memory: Memory
) -> None:
    """Small and large pages, made by faults and by prefetching; gone again, one by one and all together."""
    guest = new_shadow(width=width)
    large = 0x1000_0000
    guest.vm._set_region(1, 0, large, 4 << 20, memory.hva)
    for n in range(24):
        guest.map(n, FRAMES + (n % 7) * 0x1000)
    guest.write(guest.pde(1), large | FULL | PS)
    span = 1 << (22 if width == 32 else 21)
    source = "; ".join(f"mov rsi, {TEST + n * 0x1000}; mov eax, [rsi]" for n in range(0, 24, 2))
    guest.finish(f"{source}; mov rsi, {TEST + span}; mov eax, [rsi]; mov eax, [rsi + {span - 4096}]; hlt")

    def check() -> None:
        expected = leaves(guest)
        assert len(expected) == sum(guest.stat(f"pages_{size}") for size in ("4k", "2m", "1g"))
        seen = set()
        for gfn in {frame for _, frame in expected.values()}:
            for page, index in guest.vm.mmu.rmap(gfn):
                assert expected[page.spt, index] == (page.role.level, gfn)
                seen.add((page.spt, index))
        assert seen == set(expected)

    check()
    assert {level for level, _ in leaves(guest).values()} == {1, 2}
    if width == 32:
        assert guest.stat("pages_2m") == 2  # 4 MiB
    edits = "; ".join(f"mov dword ptr [{guest.pte(n)}], 0; invlpg [rsi]" for n in (1, 2, 8))
    guest.finish(f"mov rsi, {TEST + 0x2000}; {edits}; mov edx, {ROOT}; mov cr3, rdx; hlt")
    check()
    guest.vm._set_region(1, 0, large, 0, 0)
    assert leaves(guest) == {}
    assert all(guest.vm.mmu.rmap(gfn) == () for gfn in range(SIZE >> 12))


@pytest.mark.spec("mmu.rmap", "mmu.gbpages")
def test_the_reverse_map_of_a_large_page_is_at_its_first_frame(new_shadow: NewGuest, memory: Memory) -> None:
    guest = new_shadow()
    large = 0x1000_0000
    guest.vm._set_region(1, 0, large, 4 << 20, memory.hva)
    guest.write(guest.pde(1), large | FULL | PS)
    guest.finish(f"mov rsi, {TEST + (1 << 21) + 0x5000}; mov eax, [rsi]; hlt")
    ((page, index),) = guest.vm.mmu.rmap(large >> 12)
    assert (page.role.level, index) == (2, 1)
    (slot,) = (slot for slot in guest.vm.mmu.slots() if slot.id == 1)
    assert slot.rmap == {1: 0, 2: 1, 3: 0}
    guest.vm._set_region(1, 0, large, 0, 0)


@WIDTHS
@pytest.mark.spec("mmu.rmap_walk", "mmu.notifier")
def test_when_host_memory_goes_all_its_aliases_fault(
    new_shadow: NewGuest, width: int, memory: Memory
) -> None:
    """One frame at five addresses: unmapped by the host, each of them comes back with what is there now."""
    guest = new_shadow(width=width)
    gpa = 0x1000_0000
    guest.vm._set_region(1, 0, gpa, 0x4000, memory.hva)
    memory.write(0, b"\1")
    memory.write(0x1000, b"\7")
    pages = (0, 3, 8, 77, 200)
    for n in pages:
        guest.map(n, gpa)
    guest.map(1, gpa + 0x1000)
    read = "; ".join(f"mov rsi, {TEST + n * 0x1000}; add eax, [rsi]" for n in pages)
    source = f"xor eax, eax; {read}; mov rsi, {TEST + 0x1000}; mov ebx, [rsi]; hlt"
    assert guest.finish(source) == 5
    assert sorted(i for _, i in guest.vm.mmu.rmap(gpa >> 12)) == list(pages)
    kept = guest.vm.mmu.rmap(gpa + 0x1000 >> 12)
    invalidate_range_start(guest.kernel, memory.hva, memory.hva + 0x1000)
    assert guest.vm.mmu.rmap(gpa >> 12) == ()
    assert [guest.spte(TEST + n * 0x1000) for n in pages] == [0] * 5
    assert [(page.spt, i) for page, i in guest.vm.mmu.rmap(gpa + 0x1000 >> 12)] == [
        (page.spt, i) for page, i in kept
    ]
    memory.dontneed(0, 0x1000)
    invalidate_range_end(guest.kernel, memory.hva, memory.hva + 0x1000)
    memory.write(0, b"\3")
    assert guest.finish(source) == 15
    guest.vm._set_region(1, 0, gpa, 0, 0)


@WIDTHS
@pytest.mark.spec("mmu.rmap_walk", "mmu.dirty_log")
def test_write_protection_for_the_log_finds_every_alias(new_shadow: NewGuest, width: int) -> None:
    guest = new_shadow(width=width, log_dirty=True)
    pages = (0, 5, 66)
    for n in pages:
        guest.map(n, FRAMES)
    write = "; ".join(f"mov rsi, {TEST + n * 0x1000}; mov [rsi], eax" for n in pages) + "; hlt"
    for _ in range(2):
        guest.finish(write)
        assert [bool(guest.spte(TEST + n * 0x1000) & 2) for n in pages] == [True] * 3
        assert int.from_bytes(guest.vm.dirty_log(0), "little") >> (FRAMES >> 12) & 1
        assert [bool(guest.spte(TEST + n * 0x1000) & 2) for n in pages] == [False] * 3
        # One written through one alias is logged though the others are not touched.
        guest.finish(f"mov rsi, {TEST + 0x5000}; mov [rsi], eax; hlt")
        assert int.from_bytes(guest.vm.dirty_log(0), "little") >> (FRAMES >> 12) & 1


def aliases(guest: PagingGuest, count: int) -> str:
    """Map FRAMES at so many addresses behind TEST, table behind table; return code that writes at all."""
    for n in range(-(-count // 512)):
        guest.write(guest.pde(n), TABLES + n * 0x1000 | TABLE)
    for n in range(count):
        guest.write(TABLES + n * 8, FRAMES | FULL)
    return f"""
        mov rsi, {TEST}; mov ecx, {count}
    1:  inc dword ptr [rsi]; add rsi, 0x1000; dec ecx; jnz 1b"""


@pytest.mark.spec("mmu.pte_list", "mmu.rmap_walk")
def test_a_frame_at_six_hundred_addresses(new_shadow: NewGuest) -> None:
    """The longest list is reported; what leaves it from the middle leaves the others where they are."""
    guest = new_shadow()
    count = 600
    source = aliases(guest, count)
    assert guest.stat("max_mmu_rmap_size") <= 1
    guest.code(source)
    assert guest.read(FRAMES, 4) == count
    assert len(guest.vm.mmu.rmap(FRAMES >> 12)) == count
    assert guest.stat("max_mmu_rmap_size") == count
    gone = [n for n in range(count) if n % 3 == 1]
    edits = f"""
        mov rdi, {TABLES + 8}; mov rsi, {TEST + 0x1000}; mov ecx, {len(gone)}
    2:  mov qword ptr [rdi], 0; invlpg [rsi]; add rdi, 24; add rsi, 0x3000; dec ecx; jnz 2b"""
    guest.code(edits)
    table = {page.spt: page.gfn - (TABLES >> 12) for page in guest.vm.mmu.pages()}
    left = {table[page.spt] * 512 + index for page, index in guest.vm.mmu.rmap(FRAMES >> 12)}
    assert left == set(range(count)) - set(gone)
    assert guest.vm.mmu.audit() == []
    taken = guest.stat("pf_taken")
    guest.code(f"mov rsi, {TEST}; mov eax, [rsi]; mov eax, [rsi + {599 * 0x1000}]")
    assert guest.stat("pf_taken") == taken
    assert guest.stat("max_mmu_rmap_size") == count


@pytest.mark.spec("mmu.pte_list")
def test_a_list_that_grew_too_long_is_begun_anew(new_shadow: NewGuest) -> None:
    """RMAP_RECYCLE_THRESHOLD: behind 1000 aliases all of them are dropped, and come back when used."""
    guest = new_shadow()
    count = 1300
    guest.code(aliases(guest, count))
    assert guest.read(FRAMES, 4) == count
    assert guest.stat("max_mmu_rmap_size") == 1001
    assert len(guest.vm.mmu.rmap(FRAMES >> 12)) < 1000
    guest.code(f"mov rsi, {TEST}; inc dword ptr [rsi]")
    assert guest.read(FRAMES, 4) == count + 1


@given(st.lists(st.integers(0, 60), max_size=200))
@pytest.mark.spec("mmu.pte_list", "mmu.parent_ptes")
def test_a_list_of_sptes_is_a_set(numbers: list[int]) -> None:
    """Adding and removing in any order; one entry is itself, and all descriptors but the first are full."""
    head: PteList = 0
    there: set[int] = set()
    for n in numbers:
        sptep = 0x1000 + 8 * n
        if sptep in there:
            head = pte_list_remove(head, sptep)
            there.discard(sptep)
        else:
            head = pte_list_add(head, sptep)
            there.add(sptep)
        assert sorted(pte_list_iter(head)) == sorted(there)
        assert pte_list_count(head) == len(there)
        if isinstance(head, PteListDesc):
            desc, behind = head.more, head.tail_count
            assert 0 < len(head.sptes) <= PTE_LIST_EXT == 14
            while desc is not None:
                assert (len(desc.sptes), desc.tail_count) == (14, behind - 14)
                desc, behind = desc.more, behind - 14
            assert behind == 0
    for missing in (0x9000, 0):
        with pytest.raises(KeyError):
            pte_list_remove(head, missing)


@pytest.mark.spec("mmu.memslot_arch")
def test_what_a_slot_keeps_comes_and_goes_with_it(new_shadow: NewGuest, memory: Memory) -> None:
    """Arrays by page size; partial large pages at head and tail; shadowed tables; gone with the slot."""
    guest = new_shadow()
    mmu = guest.vm.mmu
    gpa = 0x1000_0000

    def slot(number: int) -> object:
        return next((each for each in guest.kernel.memslots[0].ordered if each.id == number), None)

    def view(number: int) -> object:
        return next(each for each in mmu.slots() if each.id == number)

    # Frames 3 to 1027: the first and the last 2 MiB only in part, and of the 1 GiB page only that.
    guest.vm._set_region(1, 0, gpa + 0x3000, 0x40_0000 - 0x3000, memory.hva + 0x3000)
    assert view(1).disallow_lpage == {2: {0: 1}, 3: {0: 1}}  # type: ignore[attr-defined]
    guest.vm._set_region(1, 0, gpa, 0, 0)
    guest.vm._set_region(1, 0, gpa + 0x3000, 0x3F_0000, memory.hva + 0x3000)
    assert view(1).disallow_lpage == {2: {0: 1, 1: 1}, 3: {0: 1}}  # type: ignore[attr-defined]
    guest.write(guest.pde(1), gpa + 0x20_0000 | FULL | PS)
    guest.write(guest.pde(2), gpa | FULL | PS)
    guest.finish(f"mov rsi, {TEST + (1 << 21)}; mov eax, [rsi]; mov eax, [rsi + 0x205000]; hlt")
    assert view(1).rmap[2] == 0  # type: ignore[attr-defined]
    guest.vm._set_region(1, 0, gpa, 0, 0)
    # Whole large pages, but the host's memory does not start together with them.
    guest.vm._set_region(1, 0, gpa, 0x20_0000, memory.hva + 0x1000)
    assert slot(1).arch.disallow_lpage(gpa >> 12, 2) == 1  # type: ignore[attr-defined]
    guest.vm._set_region(1, 0, gpa, 0, 0)

    guest.vm._set_region(1, 0, gpa, 4 << 20, memory.hva)
    guest.finish(f"mov rsi, {TEST + (2 << 21)}; mov eax, [rsi]; hlt")
    arch = slot(1).arch  # type: ignore[attr-defined]
    assert view(1).rmap == {1: 0, 2: 1, 3: 0}  # type: ignore[attr-defined]
    guest.vm._set_region(1, uapi.KVM_MEM_LOG_DIRTY_PAGES, gpa, 4 << 20, memory.hva)
    assert slot(1).arch is arch  # type: ignore[attr-defined]
    guest.vm._set_region(1, 0, gpa + 0x400_0000, 4 << 20, memory.hva)
    assert slot(1).arch is not arch  # type: ignore[attr-defined]
    assert view(1).rmap == {1: 0, 2: 0, 3: 0}  # type: ignore[attr-defined]
    guest.vm._set_region(1, 0, gpa, 0, 0)
    assert slot(1) is None


@pytest.mark.spec("mmu.memslot_arch", "mmu.wp_pt", "mmu.mapping_level")
def test_shadowed_tables_are_counted_in_their_slot(new_shadow: NewGuest) -> None:
    guest = new_shadow()
    guest.map(0, FRAMES)
    guest.write(guest.pde(1), PT | P | U | A)
    guest.begin(f"mov rsi, {TEST}; mov eax, [rsi]; mov eax, [rsi + 0x200000]; STOP; "
                f"mov word ptr [{PD + 0x800}], 0; hlt")  # fmt: skip
    (slot,) = guest.vm.mmu.slots()
    upper = {gfn >> 12: 1 for gfn in (ROOT, PDPT, 0x22000, PD)}
    assert slot.write_track == upper  # PT is of level 1: it may be written, once unsync
    assert len(guest.shadows(PT)) == 2
    # The memory is two whole pages of 2 MiB, if it starts at one in the host, too; the tables lie in the first.
    whole = guest.kernel.memslots[0].ordered[0].userspace_addr % (2 << 20) == 0
    assert slot.disallow_lpage[2] == {0: len(upper) + 2} if whole else {0: len(upper) + 3, 1: 1}
    assert slot.disallow_lpage[3] == {0: 1 + len(upper) + 2}
    guest.go()
    (slot,) = guest.vm.mmu.slots()
    assert slot.write_track == {gfn: 1 for gfn in upper if gfn != PD >> 12}


@pytest.mark.spec("mmu.tdp_mmu_norm", "mmu.memslot_arch")
def test_slots_have_no_reverse_map_before_there_is_a_shadow_root(new_guest: NewGuest, mode: str) -> None:
    """So with two-dimensional paging they never have one; what can be asked of the MMU is the same."""
    guest = new_guest()
    guest.vm.add_memory(0x100_0000, 0x4000, slot=1)
    assert [slot.rmap for slot in guest.vm.mmu.slots()] == [None, None]
    assert not guest.vm.mmu.is_tdp_mmu(guest.kernel_vcpu())  # no root is loaded yet
    guest.map(0, FRAMES)
    guest.finish(f"mov rsi, {TEST}; mov [rsi], eax; hlt")
    guest.vm.add_memory(0x200_0000, 0x4000, slot=2)
    tdp = mode == "tdp"
    assert [slot.rmap is None for slot in guest.vm.mmu.slots()] == [tdp] * 3
    assert guest.vm.mmu.is_tdp_mmu(guest.kernel_vcpu()) == tdp
    assert {page.tdp_mmu_page for page in guest.vm.mmu.pages()} == {tdp}
    assert guest.stat("max_mmu_rmap_size") == (0 if tdp else 1)
    ((page, index),) = guest.vm.mmu.rmap(FRAMES >> 12)
    assert page.entries[index] & 3 == 3
    assert page.role.direct == tdp
    assert len(LEVELS) == 3


@pytest.mark.parametrize("width", [0, 32, 36])
@pytest.mark.spec("mmu.tdp_mmu_norm")
def test_a_root_of_four_entries_is_no_tdp_mmu(new_shadow: NewGuest, width: int) -> None:
    """pae_root is a table without a shadow page."""
    guest = new_shadow(width=width)
    guest.begin("STOP; hlt")
    root = guest.vm.mmu.roots(guest.kernel_vcpu())[0]
    assert root.level == 3
    assert root.eptp not in {page.spt for page in guest.vm.mmu.pages()}
    assert not guest.vm.mmu.is_tdp_mmu(guest.kernel_vcpu())


@pytest.mark.spec("mmu.memslot_arch", "mmu.wp_pt", "mmu.alloc_roots")
def test_a_slot_made_around_a_table_that_is_shadowed_already(new_shadow: NewGuest) -> None:
    """PAE's root may point to where no memory is; when there is some, writes to it are seen like any other."""
    guest = new_shadow(width=36)
    nowhere, la = 0x1000_0000, 3 << 30
    guest.write(ROOT + 24, nowhere | P)
    guest.vcpu.sregs.cr3 = ROOT
    guest.map(0, nowhere)  # as data
    guest.begin(f"STOP; mov esi, {la}; mov eax, [esi]; STOP; "
                f"mov edi, {TEST}; mov dword ptr [edi], {0x30000 | TABLE}; mov eax, [esi]; hlt")  # fmt: skip
    assert guest.shadow(nowhere).root_count == 1
    memory = guest.vm.add_memory(nowhere, 0x1000, slot=1)
    assert next(slot for slot in guest.vm.mmu.slots() if slot.id == 1).write_track == {nowhere >> 12: 1}
    for n, table in enumerate((PT2, 0x30000)):
        guest.write(table, FRAMES + 0x1000 * (n + 1) | FULL)
        guest.write(FRAMES + 0x1000 * (n + 1), n + 5, 4)
    memory[:8] = (PT2 | TABLE).to_bytes(8, "little")
    assert guest.go() == 5
    assert guest.go() == 6
    assert guest.stat("mmu_pte_write") == 1
