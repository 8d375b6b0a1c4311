"""Which translation mode a vCPU is in, and what makes two shadow pages of one guest table different.

Rows of mmu.md sections 1 and 2 about modes and roles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pykvm.abi import uapi
from tests.guest.bare import assemble
from tests.mmu.driver import Memory
from tests.mmu.guest import (
    FRAMES,
    FULL,
    IDT,
    PD,
    PD_LOW,
    PS,
    PT,
    ROOT,
    ROOT5,
    SIZE,
    TEST,
    A,
    D,
    Io,
    P,
    PagingGuest,
    U,
    W,
)

if TYPE_CHECKING:
    from tests.mmu.conftest import NewGuest

WIDTHS = pytest.mark.parametrize("width", [32, 36, 64, 57])
PAGES = FULL & ~D

# The tables of the guest that goes through all modes; the last one is shared by PAE and long mode.
TWO, PAE, LONG, LONG5, LONG_PDPT, SHARED_PD = 0x30000, 0x31000, 0x32000, 0x33000, 0x34000, 0x35000
SMALL = 0x36000  # a page table of both sizes of entries
WHERE = 0x4000_0000

TRANSITIONS = f"""
    STOP
    mov edx, cr0
    mov esi, edx
    or edx, 0x80000000
    mov ecx, {uapi.X86_CR4_PSE}; mov cr4, ecx; mov ecx, {TWO}; mov cr3, ecx; mov cr0, edx
    mov eax, [{WHERE}]
    STOP
    mov cr0, esi
    STOP
    mov ecx, {uapi.X86_CR4_PAE}; mov cr4, ecx; mov ecx, {PAE}; mov cr3, ecx; mov cr0, edx
    mov eax, [{WHERE}]
    STOP
    mov cr0, esi
    mov edi, edx
    mov ecx, 0xC0000080; rdmsr; or eax, {uapi.EFER_LME | uapi.EFER_NX}; wrmsr
    mov edx, edi
    mov ecx, {LONG}; mov cr3, ecx; mov cr0, edx
    mov eax, [{WHERE}]
    STOP
    mov cr0, esi
    mov ecx, {uapi.X86_CR4_PAE | uapi.X86_CR4_LA57}; mov cr4, ecx; mov ecx, {LONG5}; mov cr3, ecx; mov cr0, edx
    mov eax, [{WHERE}]
    STOP
    hlt"""
STAGES = ("none", "32-bit", "none", "PAE", "4-level", "5-level")


def through_all_modes(guest: PagingGuest) -> None:
    """Tables for TRANSITIONS: low memory one to one, and a page at WHERE through SMALL."""
    high = WHERE >> 22
    guest.write(TWO, FULL | PS, 4)
    guest.write(TWO + high * 4, SMALL | PAGES, 4)
    guest.write(PAE, SHARED_PD | P, 8)
    guest.write(PAE + 8, PD | P, 8)
    guest.write(LONG5, LONG | PAGES, 8)
    guest.write(LONG, LONG_PDPT | PAGES, 8)
    guest.write(LONG_PDPT, SHARED_PD | PAGES, 8)
    guest.write(LONG_PDPT + 8, PD | PAGES, 8)
    guest.write(SHARED_PD, FULL | PS, 8)
    guest.write(PD, SMALL | PAGES, 8)
    # One entry of 8 bytes, and the same as one of 4.
    guest.write(SMALL, FRAMES | FULL, 8)
    guest.write(FRAMES, 0x1234, 4)


@pytest.mark.spec("mmu.mode_pick", "mmu.nonpaging", "mmu.levels", "mmu.role.later", "mmu.tdp_mmu_norm")
def test_the_mode_is_picked_by_cr0_cr4_and_efer(new_guest: NewGuest, mode: str) -> None:
    """shadow: nonpaging, paging32, paging32E, paging64 with 4 and 5 levels. tdp: always the same."""
    guest = new_guest(width=0)
    through_all_modes(guest)
    vcpu = guest.kernel_vcpu()
    seen = []
    for n, stage in enumerate(STAGES):
        with guest.events("kvm_mmu_pagetable_walk") as walks:
            value = guest.begin(TRANSITIONS) if n == 0 else guest.go()
        assert value == 0x1234 or stage == "none"
        pages = {page.spt: page for page in guest.vm.mmu.pages()}
        root, role = guest.vm.mmu.roots(vcpu)[0], guest.vm.mmu.role(vcpu)
        seen.append((stage, role.base.level, role.ext.efer_lma, role.ext.cr4_la57, role.ext.cr4_pse))
        assert guest.vm.mmu.is_tdp_mmu(vcpu) == (mode == "tdp")
        tops = [pages[spt] for spt in root.pages if spt]
        if mode == "tdp":
            assert (root.level, [top.role.level for top in tops]) == (4, [4])
        elif stage == "none":
            assert (root.level, [top.role.level for top in tops]) == (3, [2] * 4)
            assert not walks
        else:
            level = {"32-bit": 2, "PAE": 2, "4-level": 4, "5-level": 5}[stage]
            assert {top.role.level for top in tops} == {level}
            assert root.level == {2: 3}.get(level, level)
            gfns = {"32-bit": [TWO] * 4, "PAE": [SHARED_PD, PD], "4-level": [LONG], "5-level": [LONG5]}[stage]
            assert [top.gfn << 12 for top in tops] == gfns
            assert {top.role.has_4_byte_gpte for top in tops} == {stage == "32-bit"}
            assert {top.role.efer_nx for top in tops} == {stage.endswith("level")}
        assert {top.role.direct for top in tops} == {mode == "tdp" or stage == "none"}
        if mode == "tdp":
            assert not walks
    assert seen == [
        ("none", 0, False, False, False),
        ("32-bit", 2, False, False, True),
        ("none", 0, False, False, False),
        ("PAE", 3, False, False, False),
        ("4-level", 4, True, False, False),
        ("5-level", 5, True, True, False),
    ]
    assert guest.stat("pf_guest") == 0


@pytest.mark.spec("mmu.role.cr4_pae", "mmu.role.nxe")
def test_a_table_of_two_entry_sizes_has_a_page_for_each(new_shadow: NewGuest) -> None:
    guest = new_shadow(width=0)
    through_all_modes(guest)
    guest.begin(TRANSITIONS)
    for _ in STAGES[1:]:
        guest.go()
    roles = [page.role for page in guest.shadows(SMALL)]
    assert sorted((role.has_4_byte_gpte, role.efer_nx) for role in roles) == [
        (False, False),  # PAE
        (False, True),  # long mode with 4 levels and EFER.NX
        (False, True),  # and with 5
        (True, False),
    ]
    # A PD of PAE and long mode agrees on everything but NX.
    assert sorted(page.role.efer_nx for page in guest.shadows(SHARED_PD)) == [False, True, True]
    assert len({role.word for role in roles}) == 3


@pytest.mark.spec("mmu.role.nxe")
def test_efer_nx_selects_other_pages_and_makes_bit_63_reserved(new_shadow: NewGuest) -> None:
    guest = new_shadow()
    guest.map(0, FRAMES, FULL)
    guest.map(1, FRAMES, FULL | 1 << 63)
    source = f"""
        mov rsi, {TEST}; mov eax, [rsi]; mov eax, [rsi + 0x1000]; STOP
        mov ecx, 0xC0000080; rdmsr; and eax, ~{uapi.EFER_NX}; wrmsr; mov eax, [rsi]; STOP
        mov eax, [rsi + 0x1000]; hlt"""
    guest.begin(source)
    assert [page.role.efer_nx for page in guest.shadows(PT)] == [True]
    guest.go()
    assert [page.role.efer_nx for page in guest.shadows(PT)] == [True, False]
    assert all(page.role.efer_nx == (page.role.word >> 12 & 1) for page in guest.vm.mmu.pages())
    found = guest.vcpu.run()
    assert isinstance(found, Io)
    assert int.from_bytes(found.data, "little") == P | 8  # RSVD


@pytest.mark.spec("mmu.tdp")
def test_the_guest_owns_its_tables(new_guest: NewGuest, mode: str) -> None:
    """With tdp a guest's #PF is its own affair; the module hears of gpas without a mapping only."""
    guest = new_guest()
    memory = guest.vm.add_memory(0x100_0000, 0x4000, slot=1)
    memory[0x1000] = 7
    guest.map(2, 0x100_1000)
    # Everything is mapped: code, tables, IDT, stack, and the frame that is there at first.
    guest.map(0, FRAMES)
    warm = f"mov rsi, {TEST}; mov eax, [rsi]; mov [rsi], eax; lea rdx, [{IDT}]; mov eax, [rdx]; push rax; pop rax"
    guest.finish(f"{warm}; hlt")
    guest.fault(f"mov rsi, {TEST + 0x1000}; mov eax, [rsi]; hlt")
    taken, entries = guest.stat("pf_taken"), len(guest.vm.mmu.pages())
    assert guest.fault(f"mov rsi, {TEST + 0x1000}; mov eax, [rsi]; hlt") == (0, TEST + 0x1000)
    assert guest.fault(f"mov rsi, {TEST + 0x9000}; mov [rsi], eax; hlt") == (2, TEST + 0x9000)
    if mode == "shadow":
        assert guest.stat("pf_taken") > taken
        return
    assert guest.stat("pf_guest") == 0
    assert guest.stat("pf_taken") == taken
    # Its tables are written and used without a word, too; the auditor has nothing to protect.
    guest.finish(f"mov rdx, {guest.pte(5)}; mov rax, {FRAMES | FULL}; mov [rdx], rax; mov rsi, {TEST + 0x5000}; "
                 "mov eax, [rsi]; hlt")  # fmt: skip
    assert guest.stat("pf_taken") == taken
    assert len(guest.vm.mmu.pages()) == entries
    assert guest.finish(f"mov rsi, {TEST + 0x2000}; mov eax, [rsi]; hlt") == 7
    assert guest.stat("pf_taken") == taken + 1


@pytest.mark.spec("mmu.levels", "mmu.paging_shadow")
def test_five_levels(new_guest: NewGuest, mode: str) -> None:
    """A page behind the second entry of the PML5, which four levels cannot reach."""
    guest = new_guest(width=57)
    pml4, pdpt, pd, pt = 0x30000, 0x31000, 0x32000, 0x33000
    high = 1 << 48
    for at, value in ((ROOT5 + 8, pml4), (pml4, pdpt), (pdpt, pd), (pd, pt), (pt, FRAMES)):
        guest.write(at, value | FULL)
    guest.write(FRAMES, 0x77, 4)
    assert guest.finish(f"mov rsi, {high}; mov eax, [rsi]; mov [rsi + 8], eax; hlt") == 0x77
    assert guest.read(FRAMES + 8, 4) == 0x77
    seen = guest.vm.walk(guest.vcpu, high)
    assert [step.level for step in seen.guest] == [5, 4, 3, 2, 1]
    assert seen.guest[0].index == 1
    assert next(step.level for step in seen.sptes) == (5 if mode == "shadow" else 4)
    if mode == "shadow":
        assert [guest.shadow(at).role.level for at in (ROOT5, pml4, pdpt, pd, pt)] == [5, 4, 3, 2, 1]
    assert guest.fault(f"mov rsi, {2 << 48}; mov eax, [rsi]; hlt")[0] == 0
    # PS is reserved in a PML5 entry.
    guest.code(f"mov rdx, {ROOT5 + 24}; mov rax, {pml4 | FULL | PS}; mov [rdx], rax")
    assert guest.fault(f"mov rsi, {3 << 48}; mov eax, [rsi]; hlt")[0] == P | 8


@pytest.mark.spec("mmu.role.level", "mmu.sp")
def test_levels_and_what_they_span(new_shadow: NewGuest) -> None:
    """A leaf above level 1 is a large page; a page of level n spans 512^n small ones."""
    guest = new_shadow()
    memory = Memory(4 << 20)
    guest.vm._set_region(1, 0, 0x1000_0000, 4 << 20, memory.hva)
    memory.write(0x20_3000, b"\x55")
    guest.map(0, FRAMES)
    guest.write(guest.pde(1), 0x1020_0000 | FULL | PS)
    assert guest.finish(f"mov rsi, {TEST}; mov eax, [rsi]; mov eax, [rsi + 0x203000]; hlt") == 0x55
    pages = {page.gfn << 12: page for page in guest.vm.mmu.pages() if not page.role.direct}
    assert [pages[at].role.level for at in (ROOT, 0x21000, PD, PT)] == [4, 3, 2, 1]
    by_spt = {page.spt: page for page in guest.vm.mmu.pages()}
    leaves = 0
    for page in by_spt.values():
        assert len(page.entries) == 512
        assert page.role.level == page.role.word & 0xF
        for entry in page.entries:
            if not entry & 1:
                continue
            child = by_spt.get(entry & 0x000F_FFFF_FFFF_F000)
            assert (child is None) == (page.role.level == 1 or bool(entry & PS))
            leaves += child is None
            assert child is None or child.role.level == page.role.level - 1
    (found,) = guest.vm.mmu.rmap(0x1020_0000 >> 12)
    assert (found[0].role.level, found[0].gfn, found[1]) == (2, PD >> 12, 1)
    assert guest.stat("pages_2m") == sum(
        bool(entry & PS) for page in by_spt.values() for entry in page.entries if entry & 1
    )
    assert leaves == sum(guest.stat(name) for name in ("pages_4k", "pages_2m", "pages_1g"))
    guest.vm._set_region(1, 0, 0x1000_0000, 0, 0)
    memory.close()


@pytest.mark.spec("mmu.role.direct")
def test_a_large_guest_page_over_small_host_pages_is_split_directly(new_shadow: NewGuest) -> None:
    """Then the page that splits it records nothing: the frame follows from its own."""
    guest = new_shadow()
    memory = Memory(4 << 20)
    # Congruent modulo 4 KiB only.
    guest.vm._set_region(1, 0, 0x1000_0000, 2 << 20, memory.hva + 0x5000)
    guest.write(guest.pde(1), 0x1000_0000 | FULL | PS)
    for n in (0, 3, 511):
        memory.write(0x5000 + n * 0x1000, bytes([n & 0xFF | 1]))
        assert guest.finish(f"mov rsi, {TEST + 0x20_0000 + n * 0x1000}; mov eax, [rsi]; hlt") == n & 0xFF | 1
    (page,) = {page.spt: page for page, _ in guest.vm.mmu.rmap(0x1000_0000 >> 12)}.values()
    assert (page.role.level, page.role.direct, page.recorded) == (1, True, None)
    assert page.role.word >> 7 & 1
    assert page.gfn == 0x1000_0000 >> 12
    for n in (0, 3, 511):
        ((again, index),) = guest.vm.mmu.rmap((0x1000_0000 >> 12) + n)
        assert (again.spt, index, page.gfn_of(index)) == (page.spt, n, page.gfn + n)
    assert guest.shadow(PD).recorded is not None
    guest.vm._set_region(1, 0, 0x1000_0000, 0, 0)
    memory.close()


@pytest.mark.spec("mmu.role.direct", "mmu.nonpaging", "mmu.rmap")
def test_without_paging_every_page_is_direct(new_shadow: NewGuest) -> None:
    guest = new_shadow(width=0)
    memory = guest.vm.add_memory(3 << 30, 0x4000, slot=1)
    memory[0x2000] = 9
    assert guest.finish(f"mov esi, {(3 << 30) + 0x2000}; mov eax, [esi]; hlt") == 9
    pages = guest.vm.mmu.pages()
    assert all(page.role.direct and page.recorded is None for page in pages)
    tops = [page for page in pages if page.role.level == 2]
    assert [page.gfn for page in tops] == [n << 18 for n in range(4)]
    assert all(page.root_count == 1 for page in tops)
    ((page, index),) = guest.vm.mmu.rmap((3 << 30) + 0x2000 >> 12)
    assert page.gfn_of(index) == (3 << 30) + 0x2000 >> 12
    assert guest.stat("pf_guest") == 0


@pytest.mark.spec("mmu.role.quadrant", "mmu.role.cr4_pae")
def test_quadrants(new_shadow: NewGuest) -> None:
    """A 32-bit PT is two shadow pages, the PD four of 1 GiB each."""
    guest = new_shadow(width=32)
    low, high = 5, 700
    for n in (low, high):
        guest.map(n, FRAMES + n * 4)
    guest.map(low, FRAMES)
    guest.map(high, FRAMES + 0x1000)
    guest.write(FRAMES, 1, 4)
    guest.write(FRAMES + 0x1000, 2, 4)
    at = f"mov rsi, {TEST + low * 0x1000}; mov rdi, {TEST + high * 0x1000}"
    guest.begin(f"{at}; mov eax, [rsi]; STOP; shl eax, 8; or eax, [rdi]; hlt")
    assert [page.role.quadrant for page in guest.shadows(PT)] == [0]
    assert guest.go() == 0x102
    assert [page.role.quadrant for page in guest.shadows(PT)] == [0, 1]
    assert [page.role.quadrant for page in guest.shadows(ROOT)] == [0, 1, 2, 3]
    assert all(page.role.has_4_byte_gpte for page in guest.shadows(PT) + guest.shadows(ROOT))
    assert {page.role.word >> 5 & 3 for page in guest.shadows(ROOT)} == {0, 1, 2, 3}
    first, second = guest.shadows(PT)
    assert first.entries[low] & 1
    assert second.entries[high - 512] & 1
    # One PDE is two entries of its quadrant, and only of that.
    quadrant, index = (TEST >> 30, (TEST >> 21) & 511)
    assert {n: page.entries[index] & 1 for n, page in enumerate(guest.shadows(ROOT))}[quadrant]
    assert guest.shadows(ROOT)[quadrant].entries[index + 1] & 1


@WIDTHS
@pytest.mark.spec("mmu.role.access", "mmu.paging_shadow")
def test_a_table_behind_a_read_only_and_a_writable_entry(new_shadow: NewGuest, width: int) -> None:
    guest = new_shadow(width=width)
    span = 22 if width == 32 else 21
    guest.map(1, FRAMES)
    guest.write(guest.pde(1), PT | P | U | A)
    guest.write(guest.pde(2), PT | P | W | A)
    guest.write(FRAMES, 5, 4)
    writable, read_only, kernel = (TEST + 0x1000 + (n << span) for n in range(3))
    read = "; ".join(f"mov rsi, {la}; mov eax, [rsi]" for la in (writable, read_only, kernel))
    assert guest.finish(f"{read}; mov rsi, {writable}; inc eax; mov [rsi], eax; mov eax, [rsi]; hlt") == 6
    assert guest.fault(f"mov rsi, {read_only}; mov [rsi], eax; hlt") == (P | W, read_only)
    access = sorted(page.role.access & 7 for page in guest.shadows(PT))
    assert access == [3, 5, 7]  # -wx, u-x, uwx
    assert [page.role.word >> 8 & 7 for page in guest.shadows(PT)] == [
        page.role.access & 7 for page in guest.shadows(PT)
    ]
    for page in guest.shadows(PT):
        assert bool(page.entries[1] & 2) == bool(page.role.access & 2)
        assert bool(page.entries[1] & 8) == bool(page.role.access & 4)


@pytest.mark.spec("mmu.role.smep_smap", "mmu.role.cr0_wp", "mmu.role.later")
def test_cr0_wp_and_smep_smap_without_it_are_in_the_role(new_shadow: NewGuest) -> None:
    """smep_andnot_wp and smap_andnot_wp: with WP set both are checked at each access, no page differs."""
    guest = new_shadow()
    # SMEP and SMAP leave the kernel its own pages.
    guest.write(PD_LOW, FULL & ~U | PS)
    guest.map(0, FRAMES, P | W | A | D)
    source = f"""
        mov rsi, {TEST}; mov rdx, cr0; mov rcx, rdx; and rcx, ~0x10000; mov rbx, cr4; mov rdi, rbx
        mov eax, [rsi]; STOP
        or rbx, {uapi.X86_CR4_SMEP}; mov cr4, rbx; mov eax, [rsi]; STOP
        mov cr0, rcx; mov eax, [rsi]; STOP
        or rbx, {uapi.X86_CR4_SMAP}; mov cr4, rbx; mov eax, [rsi]; STOP
        mov cr4, rdi; mov eax, [rsi]; hlt"""
    guest.begin(source)
    names = ("cr0_wp", "smep_andnot_wp", "smap_andnot_wp")
    seen = []
    for _ in range(5):
        spt = guest.vm.mmu.roots(guest.kernel_vcpu())[0].pages[0]
        (role,) = (page.role for page in guest.vm.mmu.pages() if page.spt == spt)
        ext = guest.vm.mmu.role(guest.kernel_vcpu()).ext
        seen.append((*(getattr(role, name) for name in names), ext.cr4_smep, ext.cr4_smap))
        assert (role.word >> 13 & 7) == role.cr0_wp | role.smep_andnot_wp << 1 | role.smap_andnot_wp << 2
        if len(seen) < 5:
            guest.go()
    assert seen == [
        (True, False, False, False, False),
        (True, False, False, True, False),
        (False, True, False, True, False),
        (False, True, True, True, True),
        (False, False, False, False, False),
    ]


@pytest.mark.spec("mmu.role.later")
def test_system_management_mode_has_pages_of_its_own(new_shadow: NewGuest) -> None:
    """role.smm: the same linear address leads to the other address space; back again the old pages count."""
    guest = new_shadow(width=36)
    guest.map(0, FRAMES)
    guest.write(FRAMES, 1, 4)
    smram = guest.vm.add_memory(0, SIZE, slot=1 << 16)
    code, _ = assemble(f"mov esi, {FRAMES}; mov eax, [esi]; out 0x10, eax; rsm", 0x8000, 16, ())
    smram[0x38000 : 0x38000 + len(code)] = code
    smram[FRAMES] = 2
    assert guest.begin(f"mov esi, {TEST}; STOP; mov eax, [esi]; STOP; mov eax, [esi]; hlt") != 1
    assert guest.go() == 1
    assert not any(page.role.smm for page in guest.vm.mmu.pages())
    guest.vcpu.ioctl(uapi.KVM_SMI)
    assert guest.go() & 0xFF == 2
    role = guest.vm.mmu.role(guest.kernel_vcpu()).base
    assert (role.smm, role.direct, role.word >> 24) == (True, True, 1)
    pages = guest.vm.mmu.pages()
    assert any(page.role.smm for page in pages)
    ((page, _),) = guest.vm.mmu.rmap(FRAMES >> 12, as_id=1)
    assert page.role.smm
    assert all(not page.role.smm for page, _ in guest.vm.mmu.rmap(FRAMES >> 12))
    assert {
        page.role.smm for page in pages if page.spt in guest.vm.mmu.roots(guest.kernel_vcpu())[0].pages
    } == {True}
    assert guest.go() == 1
    guest.vm.remove_memory(1 << 16)


@pytest.mark.spec("mmu.role.direct", "mmu.role.level", "mmu.tdp")
def test_what_direct_pages_cover() -> None:
    """2 MiB, 1 GiB, 512 GiB and 256 TiB, from the level 1 to 4; the frame of an entry follows from the page's."""
    guest = PagingGuest()
    high = (5 << 39) + (7 << 30) + (9 << 21) + 0x3000
    guest.vm.add_memory(high, 0x1000)[:4] = bytes([1, 2, 3, 4])
    guest.map(0, high)
    assert guest.finish(f"mov rsi, {TEST}; mov eax, [rsi]; hlt") == 0x04030201
    ((page, index),) = guest.vm.mmu.rmap(high >> 12)
    by_spt = {each.spt: each for each in guest.vm.mmu.pages()}
    way = []
    while True:
        level = page.role.level
        assert page.role.direct
        assert page.gfn << 12 == high >> 12 + 9 * level << 12 + 9 * level
        assert page.gfn_of(index) << 12 == high >> 3 + 9 * level << 3 + 9 * level
        way.append((level, index))
        if not page.parents:
            break
        ((spt, index),) = page.parents
        page = by_spt[spt]
    assert way == [(1, 3), (2, 9), (3, 7), (4, 5)]
    assert guest.vm.mmu.audit() == []
    guest.close()
