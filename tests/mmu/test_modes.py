"""What a guest sees of its own page tables, the same in both modes; the auditor runs behind each test."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.mmu.guest import (
    CODE,
    FRAMES,
    FULL,
    NX,
    PS,
    PT,
    ROOT,
    SIZE,
    TEST,
    A,
    D,
    G,
    Mmio,
    P,
    PagingGuest,
    U,
    W,
)

if TYPE_CHECKING:
    from tests.mmu.conftest import NewGuest

WIDTHS = pytest.mark.parametrize("width", [32, 36, 64])


@WIDTHS
@pytest.mark.spec("mmu.paging_shadow", "mmu.levels", "cpu.paging_modes")
def test_read_and_write_through_guest_tables(new_guest: NewGuest, width: int) -> None:
    guest = new_guest(width=width)
    guest.map(3, FRAMES + 0x5000)
    guest.write(FRAMES + 0x5010, 41, 4)
    source = f"mov rsi, {TEST + 0x3010}; mov eax, [rsi]; inc eax; mov [rsi], eax; hlt"
    assert guest.finish(source) == 42
    assert guest.read(FRAMES + 0x5010, 4) == 42


@WIDTHS
@pytest.mark.spec("mmu.ad_bits", "mmu.walk_addr")
def test_accessed_and_dirty_are_set_by_the_walk(new_guest: NewGuest, width: int) -> None:
    guest = new_guest(width=width)
    guest.map(0, FRAMES, P | W | U)
    guest.map(1, FRAMES + 0x1000, P | W | U)
    guest.write(guest.pde(), PT | P | W | U)
    guest.finish(f"mov rsi, {TEST}; mov eax, [rsi]; hlt")
    assert guest.read(guest.pde()) & (A | D) == A
    assert guest.read(guest.pte(0)) & (A | D) == A
    assert guest.read(guest.pte(1)) & (A | D) == 0
    guest.finish(f"mov rsi, {TEST}; mov [rsi], eax; mov [rsi + 4096], eax; hlt")
    assert guest.read(guest.pte(0)) & (A | D) == A | D
    assert guest.read(guest.pte(1)) & (A | D) == A | D
    assert guest.read(guest.pde()) & D == 0


@WIDTHS
@pytest.mark.spec("mmu.ad_bits", "vm.memslot_readonly")
def test_tables_in_a_readonly_slot_work_and_keep_accessed_and_dirty_as_they_are(
    new_guest: NewGuest, width: int
) -> None:
    guest = new_guest(width=width)
    guest.map(0, FRAMES, P | W | U)
    guest.write(guest.pde(), PT | P | W | U)
    guest.vm.remove_memory(0)
    for start, end, readonly in ((0, ROOT, False), (ROOT, PT + 0x1000, True), (PT + 0x1000, SIZE, False)):
        guest.vm.add_memory(start, guest.ram[start:end], readonly=readonly)
    source = f"mov rsi, {TEST}; mov eax, [rsi]; inc eax; mov [rsi], eax; mov eax, [rsi]; hlt"
    assert guest.finish(source) == 1
    assert guest.read(FRAMES, 4) == 1
    assert guest.read(guest.pde()) & (A | D) == guest.read(guest.pte(0)) & (A | D) == 0


@WIDTHS
@pytest.mark.parametrize(
    ("bits", "code", "write"),
    [(0, 0, False), (0, 2, True), (P | U | A, 3, True)],
)
@pytest.mark.spec("mmu.fault_injection", "cpu.pf_error_code", "cpu.wp")
def test_faults_are_the_guests_own(
    new_guest: NewGuest, width: int, bits: int, code: int, write: bool
) -> None:
    guest = new_guest(width=width)
    guest.map(0, FRAMES, bits)
    access = "mov [rsi], eax" if write else "mov eax, [rsi]"
    assert guest.fault(f"mov rsi, {TEST + 0x18}; {access}; hlt") == (code, TEST + 0x18)
    assert guest.stat("pf_guest") == (guest.vm.mmu.mode == "shadow")


@pytest.mark.parametrize("width", [36, 64])
@pytest.mark.spec("cpu.nx_smep_smap", "cpu.reserved_bits")
def test_nx_and_reserved_bits(new_guest: NewGuest, width: int) -> None:
    guest = new_guest(width=width)
    guest.map(0, FRAMES, FULL | NX)
    guest.write(FRAMES, 0xF4, 1)
    assert guest.fault(f"mov rax, {TEST}; jmp rax") == (P | 16, TEST)
    guest.map(1, FRAMES, FULL | 1 << 51)
    assert guest.fault(f"mov rsi, {TEST + 0x1000}; mov eax, [rsi]; hlt") == (P | 8, TEST + 0x1000)


@WIDTHS
@pytest.mark.spec("mmu.sync_invlpg", "mmu.unsync", "mmu.tlb_model")
def test_a_changed_entry_counts_after_invlpg(new_guest: NewGuest, width: int) -> None:
    guest = new_guest(width=width)
    for n in range(4):
        guest.write(FRAMES + n * 0x1000, 100 + n, 4)
    guest.map(0, FRAMES)
    change = "".join(
        f"mov dword ptr [{guest.pte(0)}], {FRAMES + n * 0x1000 | FULL}; invlpg [rsi]; add eax, [rsi]; "
        for n in range(4)
    )
    total = guest.finish(f"mov rsi, {TEST}; mov eax, [rsi]; {change} hlt")
    assert total == 100 + sum(100 + n for n in range(4))


@WIDTHS
@pytest.mark.spec("mmu.sync_cr3", "mmu.sync_drop")
def test_changed_entries_count_after_a_cr3_write(new_guest: NewGuest, width: int) -> None:
    guest = new_guest(width=width)
    for n in range(8):
        guest.map(n, FRAMES + n * 0x1000)
        guest.write(FRAMES + n * 0x1000, n, 4)
        guest.write(FRAMES + 0x10000 + n * 0x1000, 10 + n, 4)
    touch = "".join(f"add eax, [rsi + {n * 0x1000}]; " for n in range(8))
    change = "".join(
        f"mov dword ptr [{guest.pte(n)}], {FRAMES + 0x10000 + n * 0x1000 | FULL}; " for n in range(8)
    )
    source = f"mov rsi, {TEST}; xor eax, eax; {touch} {change} mov rdx, cr3; mov cr3, rdx; {touch} hlt"
    assert guest.finish(source) == sum(range(8)) + sum(10 + n for n in range(8))


@WIDTHS
@pytest.mark.spec("mmu.wp_pt", "mmu.pte_write")
def test_an_upper_table_written_by_the_guest(new_guest: NewGuest, width: int) -> None:
    guest = new_guest(width=width)
    other = 0x25000
    guest.map(0, FRAMES)
    guest.write(FRAMES, 1, 4)
    guest.write(FRAMES + 0x1000, 2, 4)
    guest.write(other, FRAMES + 0x1000 | FULL)
    source = (
        f"mov rsi, {TEST}; mov eax, [rsi]; mov dword ptr [{guest.pde()}], {other | P | W | U | A}; "
        "mov rdx, cr3; mov cr3, rdx; shl eax, 8; add eax, [rsi]; hlt"
    )
    assert guest.finish(source) == 0x102
    if guest.vm.mmu.mode == "shadow":
        assert guest.stat("mmu_pte_write") == 1


@pytest.mark.spec("mmu.gbpages", "cpu.large_pages", "mmu.pse36")
def test_large_pages(new_guest: NewGuest) -> None:
    guest = new_guest(width=64)
    guest.write(guest.pde(), FRAMES | FULL | PS)
    guest.write(FRAMES + 0x12345, 7, 1)
    assert guest.finish(f"mov rsi, {TEST + 0x12345}; movzx eax, byte ptr [rsi]; hlt") == 7
    guest = new_guest(width=32)
    guest.write(guest.pde(), FULL | PS | G)
    guest.write(0x31_2345, 9, 1)
    assert guest.finish(f"mov rsi, {TEST + 0x312345}; movzx eax, byte ptr [rsi]; hlt") == 9
    guest.write(guest.pde(), FULL | PS | 1 << 21)
    guest.vcpu.sregs.cr3 = ROOT
    assert guest.fault(f"mov rsi, {TEST}; mov eax, [rsi]; hlt") == (9, TEST)


@WIDTHS
@pytest.mark.spec("mmu.security", "mmu.abnormal_pfn", "mmu.mmio_spte")
def test_an_entry_to_nowhere_is_mmio(new_guest: NewGuest, width: int) -> None:
    guest = new_guest(width=width)
    guest.map(0, 0xD000_0000)
    source = f"mov rsi, {TEST + 0x10}; mov eax, [rsi]; mov [rsi + 4], eax; mov eax, [rsi]; hlt"
    for value in (5, None, 6):
        found = guest.run(source) if value == 5 else guest.vcpu.run()
        assert isinstance(found, Mmio)
        assert found.phys_addr == 0xD000_0010 + 4 * found.is_write
        if value is None:
            assert bytes(found.data) == b"\5\0\0\0"
        else:
            found.data[:] = value.to_bytes(4, "little")
    guest.vcpu.run()
    assert guest.vcpu.regs.rax == 6
    assert guest.stat("pf_mmio_spte_created") == 1


@WIDTHS
@pytest.mark.spec("mmu.mmio_gen", "mmu.slot_delete_zap")
def test_a_slot_over_mmio_and_back(new_guest: NewGuest, width: int) -> None:
    guest = new_guest(width=width)
    guest.map(0, 0x100_0000)
    source = f"mov rsi, {TEST}; mov eax, [rsi]; hlt"
    found = guest.run(source)
    assert isinstance(found, Mmio)
    guest.vcpu.run()
    memory = guest.vm.add_memory(0x100_0000, 0x1000, slot=7)
    memory[0] = 77
    assert guest.finish(source) == 77
    guest.vm.remove_memory(7)
    assert isinstance(guest.run(source), Mmio)


@WIDTHS
@pytest.mark.spec("mmu.dirty_log", "mmu.dirty_no_false")
def test_dirty_log(new_guest: NewGuest, width: int) -> None:
    guest = new_guest(width=width, log_dirty=True)
    for n in range(4):
        guest.map(n, FRAMES + n * 0x1000)
    guest.vm.dirty_log(0)
    source = f"mov rsi, {TEST}; mov eax, [rsi]; mov [rsi + 0x1000], eax; mov [rsi + 0x3000], eax; hlt"
    for _ in range(3):
        guest.finish(source)
        log = int.from_bytes(guest.vm.dirty_log(0), "little")
        assert {n for n in range(4) if log >> (FRAMES >> 12) + n & 1} == {1, 3}
        assert not log >> (CODE >> 12) & 1
    assert int.from_bytes(guest.vm.dirty_log(0), "little") == 0


@pytest.mark.parametrize("width", [64])
@pytest.mark.spec("mmu.cr0_wp_emul", "mmu.role.cr0_wp")
def test_cr0_wp(new_guest: NewGuest, width: int) -> None:
    """With WP clear the supervisor writes a read-only page; with WP set the same mapping faults at once."""
    guest = new_guest(width=width)
    guest.map(0, FRAMES, P | U | A | D)
    source = f"""
        mov rsi, {TEST}; mov rdx, cr0; mov rcx, rdx; and rcx, ~0x10000; mov cr0, rcx
        mov dword ptr [rsi], 7; mov cr0, rdx; mov eax, [rsi]; mov dword ptr [rsi], 8; hlt"""
    assert guest.fault(source) == (3, TEST)
    assert guest.read(FRAMES, 4) == 7


def test_the_guest_of_the_package_runs(mode: str) -> None:
    from pykvm import run
    from pykvm.client import Kvm

    image = run.default_image()
    small = bytearray(image.rom)
    small[-0x38:-0x34] = (1000).to_bytes(4, "little")
    image = run.Image(image.name, image.pieces, image.entry, image.mode, bytes(small))
    with Kvm(tdp=mode == "tdp") as kvm:
        result = run.Machine(kvm, image, 4 << 20, lambda _: None).run(30)
    assert result.end == "halted"
    assert "interrupt 0x20 from the host: taken" in result.console
    assert "read back as 0x12345603" in result.console


def test_walk_shows_every_level(guest: PagingGuest) -> None:
    guest.map(2, FRAMES)
    guest.finish(f"mov rsi, {TEST + 0x2000}; mov eax, [rsi]; hlt")
    seen = guest.vm.walk(guest.vcpu, TEST + 0x2000)
    assert [step.level for step in seen.guest] == [4, 3, 2, 1]
    assert seen.gfn == FRAMES >> 12
    assert "P W U A" in seen.guest[-1].bits
    assert seen.sptes[-1].bits.startswith("R W X")
    assert guest.vm.walk(guest.vcpu, TEST + 0x5000).fault == 0
    (page, index), *_ = guest.vm.mmu.rmap(FRAMES >> 12)
    assert page.entries[index] & 1
