"""What a guest sees of its own page tables, the same in both modes; the auditor runs behind each test."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pykvm.abi import uapi
from pykvm.mmu.guest import GuestTables
from tests.guest.bare import assemble
from tests.mmu.driver import FRAMES as DATA
from tests.mmu.driver import TABLES, WORD, Driver
from tests.mmu.guest import (
    CODE,
    FRAMES,
    FULL,
    IDT,
    NX,
    PD,
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


@pytest.mark.spec("mmu.pae_pdptrs")
def test_pdptes_are_latched(new_guest: NewGuest) -> None:
    """Another PDPTE counts from MOV CR3, or from a write to CR4 that says so; a bad one is #GP and changes nothing."""
    guest = new_guest(width=36)
    other_pd, other_pt, pdpte = 0x30000, 0x31000, ROOT + 8
    for table, frame in ((PT, FRAMES), (other_pt, FRAMES + 0x1000)):
        guest.write(table, frame | FULL)
    guest.write(other_pd, other_pt | P | W | U | A)
    guest.write(FRAMES, 1, 4)
    guest.write(FRAMES + 0x1000, 2, 4)
    code, _ = assemble("pop eax; mov eax, 0x60D; out 0x10, eax", 0x8800, 32, ())
    guest.ram[0x8800 : 0x8800 + len(code)] = code
    guest.write(IDT + 13 * 8, 0x8E00 << 32 | 8 << 16 | 0x8800, 8)
    new = f"mov dword ptr [{pdpte}], {other_pd | P}"
    guest.begin(f"""
        mov esi, {TEST}; mov eax, [esi]; STOP
        {new}; invlpg [esi]; mov eax, [esi]; STOP
        mov ecx, cr4; xor ecx, 0x200; mov cr4, ecx; mov eax, [esi]; STOP
        xor ecx, 0x80; mov cr4, ecx; mov eax, [esi]; STOP
        mov dword ptr [{pdpte}], {PD | P}; mov ecx, {ROOT}; mov cr3, ecx; mov eax, [esi]; STOP
        mov dword ptr [{pdpte}], {other_pd | P | W}; mov ebx, cr3; mov cr3, ecx; hlt""")
    assert [guest.go() for _ in range(4)] == [1, 1, 2, 1]
    assert guest.go() == 0x60D
    assert guest.vcpu.sregs.cr3 == ROOT
    assert guest.finish("mov esi, 0x40000000; mov eax, [esi]; hlt") == 1
    # A PDPTE that is not present has nothing reserved.
    source = f"mov dword ptr [{pdpte}], {W}; mov ecx, cr3; mov cr3, ecx; mov esi, {TEST}; mov eax, [esi]; hlt"
    assert guest.fault(source) == (0, TEST)


@pytest.mark.spec("mmu.global_pages")
def test_global_pages(new_guest: NewGuest) -> None:
    """They may outlive MOV CR3, but no INVLPG and no write to CR4.PGE."""
    guest = new_guest(width=64)
    old, new = FRAMES, FRAMES + 0x1000
    guest.write(old, 1, 4)
    guest.write(new, 2, 4)
    guest.map(0, old, FULL | G)
    guest.map(1, old, FULL | G)
    change = "; ".join(f"mov dword ptr [{guest.pte(n)}], {new | FULL | G}" for n in (0, 1))
    guest.begin(f"""
        mov rcx, cr4; or rcx, 0x80; mov cr4, rcx
        mov rsi, {TEST}; mov eax, [rsi]; mov eax, [rsi + 0x1000]; {change}
        mov rdx, cr3; mov cr3, rdx; mov eax, [rsi]; STOP
        invlpg [rsi]; mov eax, [rsi]; STOP
        xor rcx, 0x80; mov cr4, rcx; mov eax, [rsi + 0x1000]; hlt""")
    assert int(guest.vcpu.regs.rax) in {1, 2}
    assert guest.go() == 2
    assert guest.go() == 2


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


@WIDTHS
@pytest.mark.spec("mmu.walk_addr", "mmu.security")
def test_a_table_where_there_is_no_memory_is_not_present(new_guest: NewGuest, width: int) -> None:
    """Not even MMIO: nobody is asked for entries, the guest gets #PF."""
    guest = new_guest(width=width)
    nowhere = 0xD000_0000
    guest.write(guest.pde(1), nowhere | P | W | U | A)
    span = 1 << (22 if width == 32 else 21)
    assert guest.fault(f"mov rsi, {TEST + span}; mov eax, [rsi]; hlt") == (0, TEST + span)
    assert guest.fault(f"mov rsi, {TEST + span}; mov [rsi], eax; hlt") == (2, TEST + span)
    memory = guest.vm.add_memory(nowhere, 0x1000, slot=1)
    memory[: guest.entry] = (FRAMES | FULL).to_bytes(guest.entry, "little")
    guest.write(FRAMES, 9, 4)
    assert guest.finish(f"mov rsi, {TEST + span}; mov eax, [rsi]; hlt") == 9


@WIDTHS
@pytest.mark.spec("mmu.walk_addr", "mmu.ad_bits")
def test_a_walk_starts_anew_when_an_entry_changes_under_it(
    new_shadow: NewGuest, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between reading an entry and setting its A bit: what counts is what is there then."""
    guest = new_shadow(width=width)
    guest.map(0, FRAMES, P | W | U)
    guest.write(FRAMES, 1, 4)
    guest.write(FRAMES + 0x1000, 2, 4)
    real = GuestTables.set_gpte_bits
    seen: list[int] = []

    def set_gpte_bits(self: GuestTables, gpa: int, hva: int, size: int, entry: int, bits: int) -> int | None:
        if gpa == guest.pte(0) and not seen:
            guest.map(0, FRAMES + 0x1000, P | W | U)
            seen.append(entry)
        return real(self, gpa, hva, size, entry, bits)

    monkeypatch.setattr(GuestTables, "set_gpte_bits", set_gpte_bits)
    with guest.events("kvm_mmu_pagetable_walk") as walks:
        assert guest.finish(f"mov rsi, {TEST}; mov eax, [rsi]; hlt") == 2
    # In one walk, and in one fault.
    assert [fields["addr"] for _, fields in walks].count(TEST) == 1
    assert seen == [FRAMES | P | W | U]
    assert guest.read(guest.pte(0)) == FRAMES + 0x1000 | P | W | U | A


@WIDTHS
@pytest.mark.spec("mmu.ad_bits", "mmu.dirty_log", "mmu.walk_addr")
def test_setting_accessed_and_dirty_is_a_write_to_the_table(new_guest: NewGuest, width: int) -> None:
    """It is logged once it happened, and only then; a fault sets nothing."""
    guest = new_guest(width=width, log_dirty=True)
    guest.map(0, FRAMES, P | W | U)
    guest.map(1, FRAMES + 0x1000, P | U)
    read, write = f"mov rsi, {TEST}; mov eax, [rsi]; hlt", f"mov rsi, {TEST}; mov [rsi], eax; hlt"

    def logged(address: int) -> bool:
        return bool(int.from_bytes(guest.vm.dirty_log(0), "little") >> (address >> 12) & 1)

    guest.finish("hlt")
    logged(PT)
    assert guest.fault(f"mov rsi, {TEST + 0x1000}; mov [rsi], eax; hlt")[0] == 3
    assert not logged(PT)
    assert guest.read(guest.pte(1)) & (A | D) == 0
    for source, expected in ((read, True), (read, False), (write, True), (write, False)):
        guest.finish(source)
        assert logged(PT) == expected
    assert guest.read(guest.pte(0)) & (A | D) == A | D


@pytest.mark.parametrize("smep", [False, True])
@pytest.mark.spec("mmu.cr0_wp_emul", "mmu.role.cr0_wp", "mmu.role.smep_smap")
def test_a_supervisors_write_with_cr0_wp_clear_takes_the_page_from_the_user(smep: bool) -> None:
    """The entry gives W for U, and X too under SMEP; a user's read turns it round again."""
    driver = Driver(tdp=False, width=64)
    try:
        vcpu, table, frame = driver.vcpus[0], TABLES, DATA
        driver.poke(driver.pde(0, 0), table | FULL, 8)
        driver.poke(table, frame | P | U | A | D, 8)
        driver.poke(frame + WORD, 7, 4)

        def bits() -> str:
            return driver.vm.walk(vcpu, TEST).sptes[-1].bits

        if smep:
            driver.do(vcpu, "cr4", rax=driver.initial_cr4 | uapi.X86_CR4_SMEP)
        driver.do(vcpu, "cr0", rax=driver.initial_cr0 & ~uapi.X86_CR0_WP)
        la = TEST + WORD
        assert driver.do(vcpu, "read", user=True, rbx=la).value == 7
        assert bits().startswith("R X U")
        assert driver.do(vcpu, "write", rbx=la, rax=8).kind == "ok"
        assert bits().startswith("R W A" if smep else "R W X A")
        assert "guest-user" in bits()
        assert driver.do(vcpu, "read", user=True, rbx=la).value == 8
        assert bits().startswith("R X U")
        fault = driver.do(vcpu, "write", user=True, rbx=la, rax=9)
        assert (fault.kind, fault.error, fault.address) == ("fault", 7, la)
        assert driver.do(vcpu, "write", rbx=la, rax=10).kind == "ok"
        # Set again, without any invalidation: the page was made for WP clear.
        driver.do(vcpu, "cr0", rax=driver.initial_cr0)
        fault = driver.do(vcpu, "write", rbx=la, rax=11)
        assert (fault.kind, fault.error) == ("fault", 3)
        assert driver.peek(frame + WORD, 4) == 10
        assert driver.vm.mmu.audit() == []
    finally:
        driver.close()
