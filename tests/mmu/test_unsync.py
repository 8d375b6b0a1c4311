"""Guest page tables that are written: write protection, unsync, sync, and tables that are tables no more.

Rows of mmu.md section 4.  The guest does all the writing, at CPL 0 through its one to one mapping.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.mmu.guest import (
    FRAMES,
    FULL,
    GDT,
    NX,
    PD,
    PDPT,
    PT,
    ROOT,
    TEST,
    A,
    Io,
    P,
    PagingGuest,
    U,
    W,
)

if TYPE_CHECKING:
    from tests.mmu.conftest import NewGuest

WIDTHS = pytest.mark.parametrize("width", [32, 36, 64])
TABLE = P | W | U | A
PT2 = 0x30000
SYNC = f"mov rdx, {ROOT}; mov cr3, rdx"


def read(*pages: int) -> str:
    return "; ".join(f"mov rsi, {TEST + page * 0x1000}; mov eax, [rsi]" for page in pages)


def set_entry(at: int, value: int) -> str:
    """Write the low half of an entry; the upper half of what tests write is 0."""
    return f"mov dword ptr [{at}], {value}"


def counts(guest: PagingGuest, *names: str) -> tuple[int, ...]:
    return tuple(guest.stat(name) for name in names)


def with_pages(guest: PagingGuest, count: int) -> None:
    """Map `count` pages behind TEST to frames that hold their number."""
    for n in range(count):
        guest.map(n, FRAMES + n * 0x1000)
        guest.write(FRAMES + n * 0x1000, n + 1, 4)


# ---- write protection ----


@WIDTHS
@pytest.mark.spec("mmu.wp_pt", "mmu.pte_write", "mmu.stats_vm")
def test_a_write_to_an_upper_table_is_emulated_and_takes_effect_at_once(
    new_shadow: NewGuest, width: int
) -> None:
    """No INVLPG, no CR3 write: when the instruction is done the shadow entry is up to date."""
    guest = new_shadow(width=width)
    with_pages(guest, 2)
    guest.write(PT2, FRAMES + 0x1000 | FULL)
    names = ("pf_emulate", "mmu_pte_write", "mmu_pde_zapped", "mmu_unsync", "mmu_flooded")
    guest.begin(f"{read(0)}; STOP; {set_entry(guest.pde(), PT2 | TABLE)}; STOP; mov eax, [rsi]; hlt")
    # The PD is mapped, though read-only: the entry of the large page that holds it had to be split for it.
    (upper,) = {page.spt: page for page in guest.shadows(guest.pde() & ~0xFFF) if any(page.entries)}.values() \
        if width != 32 else [guest.shadows(ROOT)[1]]  # fmt: skip
    index = TEST >> 21 & 511
    assert upper.entries[index] & 1
    assert counts(guest, *names) == (0, 0, 0, 0, 0)
    guest.go()
    assert counts(guest, *names) == (1, 1, 1 + (width == 32), 0, 0)
    (upper,) = [page for page in guest.vm.mmu.pages() if page.spt == upper.spt]
    assert upper.entries[index] == 0
    assert guest.read(guest.pde(), 4) & ~0xFFF == PT2
    for page, at in guest.vm.mmu.rmap(guest.pde() >> 12):
        assert page.entries[at] & 3 == 1  # R, not W
    assert guest.go() == 2
    assert guest.vm.walk(guest.vcpu, guest.pde()).sptes[-1].bits.startswith("R X")


@pytest.mark.spec("mmu.pte_write", "mmu.role.access")
def test_every_role_of_a_written_table_is_updated(new_shadow: NewGuest) -> None:
    guest = new_shadow()
    with_pages(guest, 1)
    guest.write(PT2, FRAMES + 0x1000 | FULL)
    guest.write(FRAMES + 0x1000, 2, 4)
    guest.write(PDPT + 16, PD | P | U | A)
    both = f"mov rsi, {TEST}; mov eax, [rsi]; mov rdi, {TEST + (1 << 30)}; shl eax, 8; or eax, [rdi]"
    assert guest.begin(f"{both}; STOP; {set_entry(PD, PT2 | TABLE)}; STOP; {both}; hlt") == 0x101
    assert sorted(page.role.access & 7 for page in guest.shadows(PD)) == [5, 7]
    assert all(page.entries[0] & 1 for page in guest.shadows(PD))
    guest.go()
    assert [page.entries[0] for page in guest.shadows(PD)] == [0, 0]
    assert counts(guest, "mmu_pte_write", "mmu_pde_zapped") == (1, 2)
    assert guest.go() == 0x202


@pytest.mark.spec("mmu.pte_write", "mmu.role.quadrant")
def test_a_written_entry_of_32_bits_is_two_of_its_quadrant(new_shadow: NewGuest) -> None:
    guest = new_shadow(width=32)
    with_pages(guest, 1)
    guest.map(600, FRAMES)
    other = 0xC000_0000
    guest.write(ROOT + (other >> 22) * 4, PT | TABLE)
    touch = f"{read(0, 600)}; mov esi, {other}; mov eax, [esi]"
    guest.begin(f"{touch}; STOP; {set_entry(guest.pde(), 0)}; STOP; hlt")
    before = guest.shadows(ROOT)
    index = TEST >> 21 & 511
    assert before[1].entries[index] & 1
    assert before[1].entries[index + 1] & 1
    guest.go()
    after = guest.shadows(ROOT)
    assert [page.entries == old.entries for page, old in zip(after, before, strict=True)] == [
        True, False, True, True
    ]  # fmt: skip
    assert [i for i in range(512) if after[1].entries[i] != before[1].entries[i]] == [index, index + 1]
    # Both tables of 512 are there still, without this parent.
    assert [len(page.parents) for page in guest.shadows(PT)] == [1, 0]


@pytest.mark.parametrize(
    ("write", "counted"),
    [
        (f"mov dword ptr [{PD + 8}], 0", 1),  # the upper half is still there
        (f"mov dword ptr [{PD + 12}], 0", 1),
        (f"xor eax, eax; mov [{PD + 8}], rax", 0),
    ],
)
@pytest.mark.spec("mmu.pte_write")
def test_half_of_an_entry_is_read_as_a_whole_entry(new_shadow: NewGuest, write: str, counted: int) -> None:
    guest = new_shadow()
    with_pages(guest, 1)
    guest.write(guest.pde(1), PT | TABLE | NX)
    guest.begin(f"{read(0)}; mov rsi, {TEST + (1 << 21)}; mov eax, [rsi]; STOP; {write}; STOP; hlt")
    assert guest.shadow(PD).entries[1] & 1
    guest.go()
    assert guest.shadow(PD).entries[1] == 0
    assert counts(guest, "mmu_pte_write", "mmu_pde_zapped", "mmu_flooded") == (1, counted, 0)


# ---- unsync ----


@WIDTHS
@pytest.mark.spec("mmu.unsync", "mmu.stats_vm")
def test_the_first_write_to_a_last_level_table_makes_it_unsync(new_shadow: NewGuest, width: int) -> None:
    guest = new_shadow(width=width)
    with_pages(guest, 8)
    names = ("pf_taken", "pf_emulate", "mmu_pte_write")
    edits = "; ".join(set_entry(guest.pte(n), FRAMES + n * 0x1000 | FULL) for n in range(8))
    with guest.events("kvm_mmu_unsync_page,kvm_mmu_sync_page") as found:
        guest.begin(f"{read(0)}; STOP; {set_entry(guest.pte(9), 0)}; STOP; {edits}; STOP; {SYNC}; STOP; hlt")
        assert guest.shadow(PT).unsync is False
        assert counts(guest, "mmu_unsync") == (0,)
        before = counts(guest, *names)
        guest.go()
        # One fault, nothing emulated.
        assert counts(guest, *names) == (before[0] + 1, *before[1:])
        assert guest.shadow(PT).unsync is True
        assert counts(guest, "mmu_unsync") == (1,)
        guest.go()
        assert counts(guest, *names) == (before[0] + 1, *before[1:])
        assert [name for name, _ in found] == ["kvm_mmu_unsync_page"]
        guest.go()
    assert [(name, fields["gfn"]) for name, fields in found] == [
        ("kvm_mmu_unsync_page", PT >> 12),
        ("kvm_mmu_sync_page", PT >> 12),
    ]
    assert guest.shadow(PT).unsync is False
    assert counts(guest, "mmu_unsync") == (0,)


@pytest.mark.parametrize("table", [PD, PDPT, ROOT])
@pytest.mark.spec("mmu.unsync_level", "mmu.wp_pt")
def test_tables_above_the_last_level_are_never_unsync(new_shadow: NewGuest, table: int) -> None:
    """Each write traps; the table is used in between, so that it does not count as flooded."""
    guest = new_shadow()
    with_pages(guest, 4)
    writes = "".join(
        f"mov qword ptr [{table + 0xF00 + n * 8}], 0; STOP; mov rsi, {TEST + (n + 1) * 0x20_0000}; mov eax, [rsi]; "
        for n in range(4)
    )
    for n in range(1, 5):
        guest.write(guest.pde(n), PT | TABLE)
    guest.begin(f"{read(0)}; STOP; {writes}; hlt")
    for n in range(1, 5):
        guest.go()
        assert counts(guest, "pf_emulate", "mmu_pte_write", "mmu_unsync") == (n, n, 0)
        assert not guest.shadow(table).unsync
        assert guest.shadow(table).write_flooding_count == 1
    assert guest.stat("mmu_flooded") == 0


@pytest.mark.parametrize("written_first", [False, True])
@pytest.mark.spec("mmu.unsync_level")
def test_a_frame_that_is_also_a_higher_table_stays_protected(
    new_shadow: NewGuest, written_first: bool
) -> None:
    """PT is a PT and, behind another entry of the PDPT, a PD; unsync or not when it becomes one."""
    guest = new_shadow()
    guest.map(0, FRAMES)
    guest.map(1, FRAMES + 0x8000)
    guest.write(FRAMES, FRAMES + 0x1000 | FULL)  # as a PT
    guest.write(FRAMES + 0x1000, 0x55, 4)
    guest.write(PDPT + 16, PT | TABLE)
    as_pd = TEST + (1 << 30)
    edit = set_entry(PT + 0x800, 0) if written_first else "nop"
    more = "; ".join(f"{set_entry(PT + 0x808 + 8 * n, 0)}; mov rdi, {as_pd}; invlpg [rdi]" for n in range(2))
    guest.begin(f"{read(0)}; {edit}; STOP; mov rdi, {as_pd}; mov eax, [rdi]; STOP; {more}; STOP; hlt")
    assert guest.shadow(PT).unsync == written_first
    assert guest.go() == 0x55
    assert {page.role.level for page in guest.shadows(PT)} == ({2} if written_first else {1, 2})
    assert guest.stat("mmu_unsync") == 0
    emulated = guest.stat("pf_emulate")
    guest.go()
    assert guest.stat("pf_emulate") == emulated + 2
    assert guest.stat("mmu_unsync") == 0
    assert not any(page.unsync for page in guest.vm.mmu.pages())


@pytest.mark.spec("mmu.unsync_children")
def test_every_ancestor_knows_the_way_to_an_unsync_table(new_shadow: NewGuest) -> None:
    """Bit and count on each level, for each way; all clear after the sync."""
    guest = new_shadow()
    with_pages(guest, 2)
    guest.write(PT2, FRAMES + 0x1000 | FULL)
    for n, table in ((5, PT2), (7, PT)):
        guest.write(guest.pde(n), table | TABLE)
    guest.write(PDPT + 24, PD | TABLE)
    ways = [TEST + (n << 21) for n in (0, 5, 7)] + [TEST + (2 << 30)]
    touch = "; ".join(f"mov rsi, {la}; mov eax, [rsi]" for la in ways)
    guest.begin(
        f"{touch}; STOP; {set_entry(PT + 0x800, 0)}; STOP; {set_entry(PT2 + 0x800, 0)}; STOP; "
        f"mov rsi, {TEST}; invlpg [rsi]; STOP; {SYNC}; STOP; hlt"
    )

    def bits(table: int) -> set[int]:
        page = guest.shadow(table)
        found = {n for n in range(512) if page.unsync_child_bitmap >> n & 1}
        assert page.unsync_children == len(found)
        return found

    assert [bits(table) for table in (PD, PDPT, ROOT)] == [set(), set(), set()]
    guest.go()
    assert [bits(table) for table in (PD, PDPT, ROOT)] == [{0, 7}, {1, 3}, {0}]
    guest.go()
    assert [bits(table) for table in (PD, PDPT, ROOT)] == [{0, 5, 7}, {1, 3}, {0}]
    assert guest.stat("mmu_unsync") == 2
    guest.go()  # INVLPG is about one address: the tables stay what they are
    assert [bits(table) for table in (PD, PDPT, ROOT)] == [{0, 5, 7}, {1, 3}, {0}]
    guest.go()
    assert [bits(table) for table in (PD, PDPT, ROOT)] == [set(), set(), set()]
    assert guest.stat("mmu_unsync") == 0


@pytest.mark.spec("mmu.unsync_children", "mmu.sync_cr3")
def test_an_unsync_table_that_is_linked_marks_its_new_parent(new_shadow: NewGuest) -> None:
    """And is synced before: an entry that was not present needs no invalidation to be used."""
    guest = new_shadow()
    with_pages(guest, 3)
    guest.write(guest.pde(3), PT | TABLE)
    guest.begin(f"{read(0)}; {set_entry(PT, FRAMES + 0x2000 | FULL)}; STOP; "
                f"mov rsi, {TEST + (3 << 21)}; mov eax, [rsi]; STOP; hlt")  # fmt: skip
    assert guest.shadow(PD).unsync_child_bitmap == 1
    assert guest.go() == 3
    assert guest.shadow(PD).unsync_child_bitmap == (0b1001 if guest.shadow(PT).unsync else 0)
    assert len(guest.shadow(PT).parents) == 2


# ---- sync ----


@WIDTHS
@pytest.mark.spec("mmu.invlpg_prefetch", "mmu.sync_invlpg", "mmu.stats_vcpu")
def test_invlpg_maps_the_address_anew(new_shadow: NewGuest, width: int) -> None:
    """The next access takes no fault and sees the new frame; not so when the guest never used the entry."""
    guest = new_shadow(width=width)
    with_pages(guest, 3)
    for n in (1, 2):
        guest.map(n, 0, 0)
    unused = FULL & ~A
    guest.begin(
        f"{read(0)}; {set_entry(guest.pte(0), FRAMES + 0x1000 | FULL)}; invlpg [rsi]; STOP; mov eax, [rsi]; STOP; "
        f"{set_entry(guest.pte(0), FRAMES + 0x2000 | unused)}; invlpg [rsi]; STOP; mov eax, [rsi]; STOP; "
        f"{set_entry(guest.pte(0), 0)}; invlpg [rsi]; STOP; hlt"
    )
    (taken,) = counts(guest, "pf_taken")
    assert counts(guest, "invlpg") == (1,)
    ((page, index),) = guest.vm.mmu.rmap((FRAMES >> 12) + 1)
    assert (page.gfn, index) == (PT >> 12, 0)
    assert guest.go() == 2
    assert counts(guest, "pf_taken") == (taken,)
    guest.go()
    assert guest.shadow(PT).entries[0] == 0
    assert guest.read(guest.pte(0)) & A == 0
    assert guest.go() == 3
    assert counts(guest, "pf_taken") == (taken + 1,)
    assert guest.read(guest.pte(0)) & A
    guest.go()
    assert guest.shadow(PT).entries[0] == 0
    assert counts(guest, "pf_taken", "invlpg") == (taken + 1, 3)


@WIDTHS
@pytest.mark.spec("mmu.sync_drop", "mmu.sync_cr3", "mmu.gfns")
def test_what_becomes_of_each_entry_at_a_sync(new_shadow: NewGuest, width: int) -> None:
    guest = new_shadow(width=width)
    with_pages(guest, 8)
    guest.map(6, FRAMES + 0x6000, FULL & ~W)
    guest.map(7, 0, 0)
    frame = [FRAMES + n * 0x1000 for n in range(16)]
    edits = {
        0: 0,  # gone
        1: frame[9] | FULL,  # another frame
        2: frame[2] | FULL & ~W,  # fewer rights
        4: frame[4] | FULL & ~A,  # not used: its A bit has to be set first
        6: frame[6] | FULL,  # more rights
        7: frame[7] | FULL,  # not present before
    }
    source = "; ".join(set_entry(guest.pte(n), value) for n, value in edits.items())
    guest.begin(f"{read(*range(7))}; STOP; {source}; STOP; {SYNC}; STOP; hlt")
    before = guest.shadow(PT).entries
    assert [entry & 1 for entry in before[:8]] == [1] * 7 + [0]
    guest.go()
    assert list(guest.shadow(PT).entries[:8]) == list(before[:8])
    guest.go()
    after = guest.shadow(PT).entries
    assert [after[n] for n in (0, 1, 4, 7)] == [0] * 4
    rmap = {n: [i for _, i in guest.vm.mmu.rmap(frame[n] >> 12)] for n in (*range(8), 9)}
    assert rmap == {0: [], 1: [], 2: [2], 3: [3], 4: [], 5: [5], 6: [6], 7: [], 9: []}
    assert (before[2] & 3, after[2] & 3) == (3, 1)
    assert (before[6] & 3, after[6] & 3) == (1, 3)
    for n in (3, 5):
        assert after[n] == before[n]
    kept = 0x000F_FFFF_FFFF_F000
    assert after[2] & kept == before[2] & kept


@pytest.mark.parametrize(("bits", "more"), [(FULL, 0), (FULL & ~W, 1), (FULL & ~U, 1), (0, 1)])
@pytest.mark.spec("mmu.sync_drop")
def test_a_sync_flushes_when_rights_were_taken_away(new_shadow: NewGuest, bits: int, more: int) -> None:
    """Once to see all writes to the table, and once more when an entry grants less than before."""
    guest = new_shadow()
    with_pages(guest, 2)
    guest.begin(f"{read(0)}; {set_entry(PT, FRAMES | bits)}; STOP; {SYNC}; STOP; hlt")
    before = guest.stat("remote_tlb_flush_requests")
    guest.go()
    assert guest.stat("remote_tlb_flush_requests") - before == 1 + more


# ---- no tables any more ----


@pytest.mark.spec("mmu.flood", "mmu.stats_vm")
def test_a_table_written_three_times_without_being_used_is_none(new_shadow: NewGuest) -> None:
    guest = new_shadow()
    with_pages(guest, 1)
    writes = "; STOP; ".join(f"mov qword ptr [{PD + 0xF00 + 8 * n}], 0" for n in range(6))
    guest.begin(f"{read(0)}; STOP; {writes}; STOP; hlt")
    names = ("pf_emulate", "mmu_pte_write", "mmu_flooded", "mmu_shadow_zapped")
    for n in (1, 2):
        guest.go()
        assert counts(guest, *names) == (n, n, 0, 0)
        assert guest.shadow(PD).write_flooding_count == n
    guest.go()
    assert counts(guest, *names) == (3, 3, 1, 1)
    assert guest.shadows(PD) == []
    # From now on it is memory: one fault gives the right to write.
    guest.go()
    (taken,) = counts(guest, "pf_taken")
    guest.go()
    guest.go()
    assert counts(guest, "pf_taken", *names) == (taken, 3, 3, 1, 1)


@pytest.mark.spec("mmu.flood")
def test_using_a_table_takes_it_back(new_shadow: NewGuest) -> None:
    """A walk through it sets the count to 0."""
    guest = new_shadow()
    with_pages(guest, 1)
    for n in range(1, 4):
        guest.write(guest.pde(n), PT | TABLE)
    write = f"mov qword ptr [{PD + 0xF00}], 0; mov qword ptr [{PD + 0xF08}], 0; STOP"
    use = [f"mov rsi, {TEST + (n << 21)}; mov eax, [rsi]; STOP" for n in (1, 2, 3)]
    source = "; ".join(f"{write}; {each}" for each in use)
    guest.begin(f"{read(0)}; {source}; {write}; mov qword ptr [{PD + 0xF10}], 0; STOP; hlt")
    for _ in range(3):
        assert guest.shadow(PD).write_flooding_count == 2
        guest.go()
        assert guest.shadow(PD).write_flooding_count == 0
        guest.go()
    assert counts(guest, "mmu_flooded", "mmu_pte_write") == (0, 8)
    guest.go()
    assert counts(guest, "mmu_flooded", "mmu_pte_write") == (1, 9)


@pytest.mark.parametrize(
    ("write", "zapped"),
    [
        ("mov byte ptr [{at}], 0", False),  # how Linux clears a bit of an entry
        ("mov byte ptr [{at} + 1], 0", True),
        ("mov word ptr [{at}], 0", True),
        ("mov dword ptr [{at}], 0", False),
        ("mov dword ptr [{at} + 4], 0", False),
        ("mov dword ptr [{at} + 2], 0", False),
        ("mov dword ptr [{at} + 6], 0", True),  # in two entries
        ("mov qword ptr [{at}], 0", False),
        ("mov qword ptr [{at} + 4], 0", True),
        ("mov qword ptr [{at} + 1], 0", True),
    ],
)
@pytest.mark.spec("mmu.misaligned")
def test_writes_that_are_not_those_of_a_page_table(new_shadow: NewGuest, write: str, zapped: bool) -> None:
    guest = new_shadow()
    with_pages(guest, 1)
    at = PD + 0x800
    guest.begin(f"{read(0)}; STOP; {write.format(at=at)}; STOP; hlt")
    guest.go()
    assert counts(guest, "mmu_pte_write", "mmu_flooded", "mmu_shadow_zapped") == (1, zapped, zapped)
    assert bool(guest.shadows(PD)) != zapped


@pytest.mark.parametrize(
    ("offset", "size", "zapped"), [(0, "dword", False), (0, "byte", False), (2, "dword", True), (4, "byte", False)]
)  # fmt: skip
@pytest.mark.spec("mmu.misaligned", "mmu.role.cr4_pae")
def test_the_same_with_entries_of_four_bytes(
    new_shadow: NewGuest, offset: int, size: str, zapped: bool
) -> None:
    guest = new_shadow(width=32)
    with_pages(guest, 1)
    guest.begin(f"{read(0)}; STOP; mov {size} ptr [{ROOT + 0x800 + offset}], 0; STOP; hlt")
    old = {page.spt for page in guest.shadows(ROOT)}
    guest.go()
    assert guest.stat("mmu_flooded") == 4 * zapped  # one for each quadrant
    # They were the root, and are again.
    assert ({page.spt for page in guest.shadows(ROOT)} == old) != zapped


# ---- what cannot be emulated ----


@pytest.mark.spec("mmu.unshadow_retry")
def test_a_descriptor_in_a_page_table(new_shadow: NewGuest) -> None:
    """The Accessed bit that a segment load sets is no data access: the table goes, the load is done again."""
    guest = new_shadow()
    with_pages(guest, 1)
    gdt, selector = PD + 0x800, 0x10
    guest.ram[gdt : gdt + 16] = guest.ram[GDT : GDT + 16]
    guest.write(gdt + selector, 0xCF92000000FFFF, 8)  # data, not accessed yet
    guest.write(0x38000, 0x7F, 2)
    guest.write(0x38002, gdt, 8)
    guest.begin(f"{read(0)}; lgdt [{0x38000}]; mov ebx, {selector}; mov ecx, 1; STOP; mov fs, bx; inc ecx; "
                f"mov eax, ecx; STOP; {read(0)}; hlt")  # fmt: skip
    assert guest.shadow(PD).entries[0] & 1
    with guest.events("kvm_mmu_prepare_zap_page") as found:
        assert guest.go() == 2
    assert [fields["gfn"] for _, fields in found] == [PD >> 12]
    assert guest.read(gdt + selector, 8) == 0xCF93000000FFFF
    assert int(guest.vcpu.sregs.fs.selector) == selector
    assert guest.go() == 1
    assert guest.vm.mmu.audit() == []


@pytest.mark.spec("mmu.unshadow_retry")
def test_an_exception_frame_pushed_into_a_page_table(new_shadow: NewGuest) -> None:
    guest = new_shadow()
    with_pages(guest, 1)
    stack = PD + 0xF00
    # The handler of #PF sends the error code out.
    source = f"{read(0)}; mov rsp, {stack}; STOP; mov rsi, {TEST + 0x10_0000}; mov eax, [rsi]; hlt"
    guest.begin(source)
    assert guest.shadow(PD).entries[0] & 1
    with guest.events("kvm_mmu_prepare_zap_page") as found:
        io = guest.vcpu.run()
    assert isinstance(io, Io)
    assert (io.port, int.from_bytes(io.data, "little")) == (0xE, 0)
    assert PD >> 12 in [fields["gfn"] for _, fields in found]
    assert guest.shadows(PD) == []
    # SS, RSP, RFLAGS, CS, RIP, error code
    assert (guest.read(stack - 8), guest.read(stack - 16), guest.read(stack - 32)) == (16, stack, 8)
    assert guest.read(stack - 48) == 0
