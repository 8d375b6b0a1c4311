"""Shadow pages: how they are found, listed, linked, counted as roots, and what becomes of them.

Rows of mmu.md section 2, without the role (test_roles.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pykvm.abi import ffi, uapi
from tests.mmu.guest import (
    FRAMES,
    FULL,
    PD,
    PD_LOW,
    PDPT,
    PT,
    ROOT,
    TEST,
    A,
    P,
    PagingGuest,
    U,
    W,
)

if TYPE_CHECKING:
    from tests.mmu.conftest import NewGuest

WIDTHS = pytest.mark.parametrize("width", [32, 36, 64])
TABLE = P | W | U | A


def touch(*pages: int) -> str:
    """Read the first word of pages behind TEST."""
    return "; ".join(f"mov rsi, {TEST + page * 0x1000}; mov eax, [rsi]" for page in pages)


def sp_of(guest: PagingGuest, address: int) -> object:
    """The module's own object for the only shadow page of a table."""
    (page,) = (p for p in guest.kernel.mmu.pages.of_gfn(address >> 12) if not p.role.direct)
    return page


@WIDTHS
@pytest.mark.spec("mmu.sp")
def test_from_the_address_of_any_spte_its_page_is_found(new_shadow: NewGuest, width: int) -> None:
    guest = new_shadow(width=width)
    for n in range(16):
        guest.map(n, FRAMES + n * 0x1000)
    guest.finish(f"{touch(*range(16))}; hlt")
    pages = guest.kernel.mmu.pages
    assert len(pages) > 3
    for page in pages:
        assert len(page.view) == 512
        for index in (0, 17, 511):
            assert pages.sptep_to_sp(page.spt_addr + 8 * index) == (page, index)
    for n in range(16):
        ((found, index),) = guest.vm.mmu.rmap((FRAMES >> 12) + n)
        assert (found.gfn, index) == (PT >> 12, n)


@WIDTHS
@pytest.mark.spec("mmu.gfns")
def test_a_changed_entry_leaves_the_reverse_map_of_the_frame_it_had(new_shadow: NewGuest, width: int) -> None:
    """When the spte goes the gpte already names another frame: what was recorded counts."""
    guest = new_shadow(width=width)
    guest.map(0, FRAMES)
    old, new = FRAMES >> 12, (FRAMES >> 12) + 9
    source = f"""
        {touch(0)}; STOP
        mov dword ptr [{PT}], {new << 12 | FULL}; STOP
        invlpg [rsi]; STOP
        mov eax, [rsi]; hlt"""
    guest.begin(source)
    page, index = guest.shadow(PT), 0
    assert page.gfn_of(index) == old
    guest.go()
    # The gpte has changed and the spte has not: it is still the old frame's.
    assert guest.shadow(PT).gfn_of(index) == old
    assert [i for _, i in guest.vm.mmu.rmap(old)] == [0]
    assert guest.vm.mmu.audit() == []
    guest.go()
    assert guest.vm.mmu.rmap(old) == ()
    guest.go()
    assert guest.shadow(PT).gfn_of(index) == new
    assert [i for _, i in guest.vm.mmu.rmap(new)] == [0]


def bucket(gfn: int) -> int:
    """hash_64() of the kernel, to 12 bits: 4096 buckets."""
    return (gfn * 0x61C8_8646_80B5_83EB & (1 << 64) - 1) >> 52


@pytest.mark.spec("mmu.hash")
def test_pages_of_different_frames_collide_in_a_bucket(new_shadow: NewGuest) -> None:
    base = 0x100_0000
    gfns = range(base >> 12, (base >> 12) + 4096)
    first = gfns[0]
    same = next(gfn for gfn in gfns[1:] if bucket(gfn) == bucket(first))
    # In a bucket near it: with fewer buckets the two would collide.
    other = next(gfn for gfn in gfns[1:] if 0 < bucket(gfn) ^ bucket(first) < 4)
    assert len({bucket(gfn) for gfn in range(100_000)}) == 4096
    guest = new_shadow()
    memory = guest.vm.add_memory(base, 16 << 20, slot=1)
    for n, gfn in enumerate((first, other, same), 1):
        at = (gfn << 12) - base
        memory[at : at + 8] = (FRAMES | FULL).to_bytes(8, "little")
        guest.write(guest.pde(n), gfn << 12 | TABLE)
    source = "; ".join(f"mov rsi, {TEST + (n << 21)}; mov eax, [rsi]; STOP" for n in (1, 2, 3)) + "; hlt"
    guest.begin(source)
    guest.go()
    before = guest.stat("max_mmu_page_hash_collisions")
    assert before == 0
    guest.go()
    assert guest.stat("max_mmu_page_hash_collisions") == 1
    assert [page.gfn for page in guest.vm.mmu.pages() if page.gfn in {first, same}] == [first, same]


@pytest.mark.spec("mmu.hash", "mmu.role.access")
def test_a_page_is_used_again_when_frame_and_role_are_the_same(new_shadow: NewGuest) -> None:
    guest = new_shadow()
    guest.map(0, FRAMES)
    for n, bits in ((1, TABLE), (2, P | U | A)):
        guest.write(guest.pde(n), PT | bits)
    source = "; ".join(f"mov rsi, {TEST + (n << 21)}; mov eax, [rsi]; STOP" for n in range(3)) + "; hlt"
    guest.begin(source)
    misses = guest.stat("mmu_cache_miss")
    assert misses == len(guest.vm.mmu.pages())
    with guest.events("kvm_mmu_get_page") as found:
        guest.go()
    assert [(fields["gfn"], fields["state"]) for _, fields in found] == [(PT >> 12, "existing")]
    assert guest.stat("mmu_cache_miss") == misses
    with guest.events("kvm_mmu_get_page") as found:
        guest.go()
    assert [(fields["gfn"], fields["state"]) for _, fields in found] == [(PT >> 12, "new")]
    assert guest.stat("mmu_cache_miss") == misses + 1
    # Not after the generation has changed: an obsolete page is never found again.
    guest.vm.add_memory(0x800_0000, 0x1000, slot=5)
    guest.vm.remove_memory(5)
    assert guest.vm.mmu.pages() == ()
    with guest.events("kvm_mmu_get_page") as found:
        guest.finish(f"{touch(0)}; hlt")
    assert {fields["state"] for _, fields in found} == {"new"}


@pytest.mark.spec("mmu.active_list")
def test_the_active_list_is_in_the_order_pages_were_made(new_shadow: NewGuest) -> None:
    guest = new_shadow()
    for n in range(6):
        guest.write(guest.pde(n), 0x30000 + n * 0x1000 | TABLE)
        guest.write(0x30000 + n * 0x1000, FRAMES + n * 0x1000 | FULL)
    order = (3, 0, 5, 1)
    source = "; ".join(f"mov rsi, {TEST + (n << 21)}; mov eax, [rsi]" for n in order)
    with guest.events("kvm_mmu_get_page,kvm_mmu_prepare_zap_page") as found:
        guest.finish(f"{source}; hlt")
        made = [
            cast("int", f["gfn"]) for name, f in found if name == "kvm_mmu_get_page" and f["state"] == "new"
        ]
        assert [page.gfn for page in guest.vm.mmu.pages()] == made
        assert [gfn for gfn in made if 0x30 <= gfn < 0x36] == [0x30 + n for n in order]
        assert len(guest.kernel.mmu.pages) == len(made) == guest.stat("mmu_cache_miss")
        # The oldest go first; a loaded root never.
        root = guest.shadow(ROOT).spt
        del found[:]
        assert guest.vm.mmu.shrink(2) >= 2
        assert next(f["gfn"] for _, f in found) == next(gfn for gfn in made if gfn != ROOT >> 12)
    assert guest.shadow(ROOT).spt == root
    left = [page.gfn for page in guest.vm.mmu.pages()]
    assert left == [gfn for gfn in made if gfn in left]
    assert len(guest.kernel.mmu.pages) == len(left) == len(made) - guest.vm.mmu.stat()["mmu_shadow_zapped"]


@pytest.mark.parametrize("count", [2, 14, 15, 40])
@pytest.mark.spec("mmu.parent_ptes", "mmu.pte_list")
def test_a_table_that_many_entries_point_to(new_shadow: NewGuest, count: int) -> None:
    """One entry is kept as itself, more in descriptors of 14; zapping the table clears all of them."""
    guest = new_shadow()
    guest.map(0, FRAMES)
    for n in range(count):
        guest.write(guest.pde(n), PT | TABLE)
    guest.begin(f"{touch(0)}; STOP; " + "; ".join(
        f"mov rsi, {TEST + (n << 21)}; mov eax, [rsi]" for n in range(1, count)
    ) + f"; STOP; mov rsi, {TEST + (1 << 21)}; mov word ptr [{PD + 8}], 0; STOP; mov eax, [rsi]; hlt")  # fmt: skip
    upper = guest.shadow(PD)
    assert guest.shadow(PT).parents == ((upper.spt, 0),)
    guest.go()
    assert sorted(guest.shadow(PT).parents) == [(upper.spt, n) for n in range(count)]
    assert guest.stat("mmu_shadow_zapped") == 0
    # Two bytes into the PD: not how a table is written, so it goes, and with it what it points to has no parent.
    guest.go()
    assert guest.shadows(PD) == []
    assert guest.shadow(PT).parents == ()
    assert guest.shadow(PDPT).entries[1] == 0
    assert guest.vm.mmu.audit() == []


@pytest.mark.spec("mmu.parent_ptes", "mmu.zap_page")
def test_zapping_a_table_clears_the_entries_of_all_its_parents(new_shadow: NewGuest) -> None:
    guest = new_shadow()
    guest.map(0, FRAMES)
    for n in (2, 3):
        guest.write(PDPT + 8 * n, PD | TABLE)
    read = "; ".join(f"mov rsi, {TEST + (n << 30)}; mov eax, [rsi]" for n in range(3))
    guest.begin(f"{read}; STOP; mov word ptr [{PD + 8}], 0; STOP; {read}; hlt")
    upper = guest.shadow(PDPT)
    assert sorted(guest.shadow(PD).parents) == [(upper.spt, n) for n in (1, 2, 3)]
    guest.go()
    assert guest.shadows(PD) == []
    assert [guest.shadow(PDPT).entries[n] for n in (1, 2, 3)] == [0, 0, 0]
    assert guest.shadow(PDPT).entries[0]
    guest.go()
    assert len(guest.shadow(PD).parents) == 3


@pytest.mark.parametrize("width", [36, 64])
@pytest.mark.spec("mmu.role.invalid", "mmu.root_count")
def test_a_zapped_root_lives_until_its_last_vcpu_has_left_it(new_shadow: NewGuest, width: int) -> None:
    guest = new_shadow(width=width, vcpus=2)
    top = PD_LOW if width == 36 else ROOT
    first, second = guest.vcpus
    # Far from what is mapped: the write itself changes nothing that is used.
    guest.begin(f"STOP; mov word ptr [{top + 0xFF0}], 0; STOP; hlt", first)
    guest.begin("STOP; STOP; hlt", second)
    page = sp_of(guest, top)
    assert (page.root_count, page.invalid) == (2, False)  # type: ignore[attr-defined]
    assert [p.root_count for p in guest.shadows(top)] == [2]
    with guest.events("kvm_mmu_prepare_zap_page,kvm_mmu_get_page") as found:
        guest.go(first)
    zapped = [f for name, f in found if name == "kvm_mmu_prepare_zap_page" and f["gfn"] == top >> 12]
    assert [f["root_count"] for f in zapped] == [2]
    # The first has loaded a new one; the second has the old one, which is in no list any more.
    assert (page.invalid, page.root_count) == (True, 1)  # type: ignore[attr-defined]
    assert page not in guest.kernel.mmu.pages.of_gfn(top >> 12)
    assert page not in tuple(guest.kernel.mmu.pages)
    assert page.spt != ffi.NULL  # type: ignore[attr-defined]
    again = guest.shadow(top)
    assert (again.root_count, again.spt != page.spt_addr) == (1, True)  # type: ignore[attr-defined]
    guest.go(second)
    assert (page.root_count, page.spt) == (0, ffi.NULL)  # type: ignore[attr-defined]
    assert guest.shadow(top).root_count == 2


def roots_of(guest: PagingGuest) -> list[int]:
    """The CR3 values of the current root and the previous ones."""
    return [root.cr3 & ~0xFFF for root in guest.vm.mmu.roots(guest.kernel_vcpu())]


def same_tables(guest: PagingGuest, count: int) -> list[int]:
    """Make more root tables like the one there is; return their addresses."""
    tables = [ROOT, *(0x30000 + n * 0x1000 for n in range(count - 1))]
    for table in tables[1:]:
        guest.ram[table : table + 0x1000] = guest.ram[ROOT : ROOT + 0x1000]
    return tables


@pytest.mark.spec("mmu.prev_roots", "mmu.root_count", "mmu.load")
def test_four_values_of_cr3_need_no_new_root(new_shadow: NewGuest) -> None:
    guest = new_shadow()
    tables = same_tables(guest, 5)

    def switch(*values: int) -> str:
        return "; ".join(f"mov edx, {value}; mov cr3, rdx" for value in values)

    four = tables[:4]
    guest.begin(f"{switch(*four)}; STOP; {switch(*four * 3)}; STOP; {switch(tables[4])}; STOP; "
                f"{switch(tables[0])}; STOP; hlt")  # fmt: skip
    assert roots_of(guest) == [four[3], four[2], four[1], four[0]]
    assert [guest.shadow(table).root_count for table in four] == [1, 1, 1, 1]
    with guest.events("kvm_mmu_get_page") as found:
        guest.go()
    assert found == []
    assert sorted(roots_of(guest)) == sorted(four)
    with guest.events("kvm_mmu_get_page") as found:
        guest.go()
    assert [f["gfn"] for _, f in found if f["state"] == "new"] == [tables[4] >> 12]
    assert roots_of(guest) == [tables[4], *reversed(four[1:])]
    # Nobody holds the first any more; it is there to be found again.
    assert guest.shadow(tables[0]).root_count == 0
    with guest.events("kvm_mmu_get_page") as found:
        guest.go()
    assert [(f["gfn"], f["state"]) for _, f in found] == [(tables[0] >> 12, "existing")]
    # What a vCPU holds is not given up for memory.
    assert guest.vm.mmu.shrink(1000) > 0
    held = {page.spt for page in guest.vm.mmu.pages() if page.root_count}
    assert held == {page.spt for page in guest.vm.mmu.pages()}
    assert len(held) == 4


@pytest.mark.spec("mmu.root_count")
def test_pae_holds_four_roots(new_shadow: NewGuest) -> None:
    guest = new_shadow(width=36)
    guest.write(ROOT + 24, PD | P)  # the fourth is the second once more
    guest.vcpu.sregs.cr3 = ROOT
    other = 0x30000
    guest.write(other, PD_LOW | P)
    guest.begin(f"STOP; mov edx, {other}; mov cr3, edx; STOP; hlt")
    root = guest.vm.mmu.roots(guest.kernel_vcpu())[0]
    assert root.level == 3
    assert root.eptp not in root.pages  # pae_root is no shadow page
    assert root.pages == (guest.shadow(PD_LOW).spt, guest.shadow(PD).spt, 0, guest.shadow(PD).spt)
    assert (guest.shadow(PD_LOW).root_count, guest.shadow(PD).root_count) == (1, 2)
    guest.go()
    assert (guest.shadow(PD_LOW).root_count, guest.shadow(PD).root_count) == (2, 2)
    guest.vcpu.sregs.cr3 = ROOT  # the client's write: no root outlives it
    assert all(page.root_count == 0 for page in guest.vm.mmu.pages())


PCID = uapi.X86_CR4_PCIDE
NOFLUSH = 1 << 63


def pcid_guest(new_shadow: NewGuest) -> tuple[PagingGuest, int, int]:
    guest = new_shadow(cr4=PCID)
    first, second = same_tables(guest, 2)
    guest.map(0, FRAMES)
    guest.write(FRAMES, 1, 4)
    guest.write(FRAMES + 0x1000, 2, 4)
    # The second address space has only low memory: there the kernel edits the tables of the first.
    other = 0x3A000
    guest.ram[other : other + 8] = guest.ram[PDPT : PDPT + 8]
    guest.write(second, other | TABLE)
    return guest, first, second | 1


EDIT = f"mov rax, {FRAMES + 0x1000 | FULL}; mov [{PT}], rax"


@pytest.mark.parametrize("noflush", [True, False])
@pytest.mark.spec("mmu.prev_roots", "mmu.sync_cr3")
def test_bit_63_of_cr3_leaves_the_root_of_a_pcid_as_it_is(new_shadow: NewGuest, noflush: bool) -> None:
    """Without it the tables are synced at the switch; with it their state may stay what it was."""
    guest, first, second = pcid_guest(new_shadow)
    back = first | NOFLUSH * noflush
    guest.begin(f"""
        {touch(0)}; mov rbx, {second}; mov cr3, rbx; {EDIT}; STOP
        mov rbx, {back}; mov cr3, rbx; STOP
        mov rbx, {first}; mov cr3, rbx; mov eax, [rsi]; hlt""")
    assert guest.shadow(PT).unsync
    with guest.events("kvm_mmu_sync_page,kvm_mmu_get_page") as found:
        guest.go()
    assert [name for name, _ in found] == ([] if noflush else ["kvm_mmu_sync_page"])
    assert roots_of(guest)[:2] == [first & ~0xFFF, second & ~0xFFF]
    assert guest.shadow(PT).unsync == noflush
    assert guest.go() == 2


@pytest.mark.parametrize(
    ("kind", "pcid", "synced"), [(0, 0, True), (1, 0, True), (2, 0, True), (3, 0, True), (1, 1, False)]
)
@pytest.mark.spec("mmu.prev_roots", "mmu.tlb_model")
def test_invpcid_reaches_the_roots_of_other_pcids(
    new_shadow: NewGuest, kind: int, pcid: int, synced: bool
) -> None:
    """After it, a switch that flushes nothing must not bring the old translation back."""
    guest, first, second = pcid_guest(new_shadow)
    descriptor = 0x38000
    guest.write(descriptor, pcid, 8)
    guest.write(descriptor + 8, TEST, 8)
    back = first | NOFLUSH
    source = f"""
        {touch(0)}; mov rbx, {second}; mov cr3, rbx; {EDIT}
        mov ecx, {kind}; invpcid rcx, [{descriptor}]; STOP
        mov rbx, {back}; mov cr3, rbx; mov eax, [rsi]; hlt"""
    guest.begin(source)
    value = guest.go()
    assert value == 2 if synced else value in {1, 2}


@pytest.mark.parametrize("how", ["pge", "pcide"])
@pytest.mark.spec("mmu.tlb_model", "mmu.global_pages")
def test_toggling_cr4_syncs_every_root(new_shadow: NewGuest, how: str) -> None:
    guest, first, second = pcid_guest(new_shadow)
    bit = uapi.X86_CR4_PGE
    toggle = f"mov rcx, cr4; xor rcx, {bit}; mov cr4, rcx" if how == "pge" else (
        f"mov rbx, {second & ~0xFFF}; mov cr3, rbx; mov rcx, cr4; xor rcx, {PCID}; mov cr4, rcx; "
        f"xor rcx, {PCID}; mov cr4, rcx"
    )  # fmt: skip
    source = f"""
        {touch(0)}; mov rbx, {second}; mov cr3, rbx; {EDIT}; {toggle}
        mov rbx, {first | NOFLUSH}; mov cr3, rbx; mov eax, [rsi]; hlt"""
    assert guest.finish(source) == 2


PCID_TABLES = ((ROOT, PT), (0x30000, 0x33000))  # of two address spaces: CR3, and the table behind TEST
DESCRIPTORS = 0x38000
pcids = st.integers(0, 1)
pcid_operation = st.one_of(
    st.tuples(st.just("edit"), pcids, st.integers(0, 5)),
    st.tuples(st.just("switch"), pcids, st.booleans()),
    st.tuples(st.just("invpcid"), pcids, st.integers(0, 3)),
    st.sampled_from([("invlpg", 0, 0), ("pge", 0, 0), ("read", 0, 0), ("read", 0, 0)]),
)


def pcid_program(operations: list[tuple[str, int, int]]) -> tuple[str, list[set[int]]]:
    """Return the guest's code, and for each of its reads the frames that the architecture allows.

    A translation of a PCID may be as old as the last invalidation of that PCID.
    """
    now, current, allowed = 0, [0, 0], [{0}, {0}]
    source, reads = [f"mov rsi, {TEST}", "mov ebp, 1"], []

    def invalidate(*which: int) -> None:
        for pcid in which:
            allowed[pcid] = {current[pcid]}

    for name, pcid, value in operations:
        if name == "edit":
            source.append(f"mov rax, {FRAMES + value * 0x1000 | FULL}; mov [{PCID_TABLES[pcid][1]}], rax")
            current[pcid] = value
            allowed[pcid].add(value)
        elif name == "switch":
            source.append(f"mov rbx, {PCID_TABLES[pcid][0] | pcid | NOFLUSH * value}; mov cr3, rbx")
            now = pcid
            if not value:
                invalidate(pcid)
        elif name == "invpcid":
            source.append(f"mov ecx, {value}; invpcid rcx, [{DESCRIPTORS + 16 * pcid}]")
            invalidate(*((pcid,) if value < 2 else (0, 1)))
        elif name == "invlpg":
            source.append("invlpg [rsi]")
            invalidate(now)
        elif name == "pge":
            source.append(f"mov rcx, cr4; xor rcx, {uapi.X86_CR4_PGE}; mov cr4, rcx")
            invalidate(0, 1)
        else:
            source.append("mov eax, [rsi]; STOP")
            reads.append(set(allowed[now]))
    return "; ".join([*source, "hlt"]), reads


@given(st.lists(pcid_operation, min_size=8, max_size=40))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.spec("mmu.prev_roots", "mmu.tlb_model", "mmu.sync_cr3", "mmu.sync_invlpg")
def test_pcids_at_random(mode: str, operations: list[tuple[str, int, int]]) -> None:
    """Edits of two address spaces from either, switches that flush and that do not, and INVPCID."""
    guest = PagingGuest(tdp=mode == "tdp", cr4=PCID)
    try:
        pdpt, pd = 0x31000, 0x32000
        root, table = PCID_TABLES[1]
        for at, value in ((root, pdpt), (pdpt, PD_LOW), (pdpt + 8, pd), (pd, table)):
            guest.write(at, value | TABLE)
        for n in range(6):
            guest.write(FRAMES + n * 0x1000, n, 4)
        for pcid in (0, 1):
            guest.write(PCID_TABLES[pcid][1], FRAMES | FULL)
            guest.write(DESCRIPTORS + 16 * pcid, pcid, 8)
            guest.write(DESCRIPTORS + 16 * pcid + 8, TEST, 8)
        source, reads = pcid_program(operations)
        for n, allowed in enumerate(reads):
            value = guest.begin(source) if n == 0 else guest.go()
            assert value in allowed, f"read {n} of {len(reads)}"
        assert guest.vm.mmu.audit() == []
    finally:
        guest.close()


@pytest.mark.spec("mmu.slot_bitmap", "mmu.dirty_log")
def test_dirty_logging_of_a_slot_touches_what_maps_it_and_nothing_else(new_shadow: NewGuest) -> None:
    guest = new_shadow()
    other = 0x100_0000
    memory = guest.vm.add_memory(other, 0x8000, slot=1)
    for n in range(4):
        guest.map(n, FRAMES + n * 0x1000)
        guest.map(8 + n, other + n * 0x1000)
    pages = (*range(4), *range(8, 12))
    write = "; ".join(f"mov rsi, {TEST + n * 0x1000}; mov [rsi], eax" for n in pages)
    guest.finish(f"{write}; hlt")

    def writable() -> list[bool]:
        return [bool(guest.shadow(PT).entries[n] & 2) for n in pages]

    assert writable() == [True] * 8
    before = guest.vm.mmu.pages()
    region = {"slot": 1, "guest_phys_addr": other, "memory_size": 0x8000}
    hva = int(ffi.cast("uintptr_t", ffi.from_buffer(memory)))
    guest.vm._set_region(1, uapi.KVM_MEM_LOG_DIRTY_PAGES, region["guest_phys_addr"], 0x8000, hva)
    assert writable() == [True] * 4 + [False] * 4
    after = guest.vm.mmu.pages()
    # The same pages, and only the table that maps the slot is another: in those four entries.
    assert [page.spt for page in after] == [page.spt for page in before]
    changed = [(p.gfn, i) for p, q in zip(before, after, strict=True) for i in range(512)
               if p.entries[i] != q.entries[i]]  # fmt: skip
    assert changed == [(PT >> 12, n) for n in range(8, 12)]
    taken = guest.stat("pf_taken")
    guest.finish(f"{write}; hlt")
    assert guest.stat("pf_taken") == taken + 4
    assert int.from_bytes(guest.vm.dirty_log(1), "little") == 0xF
    guest.vm.remove_memory(1)
