"""One instruction that writes to several READONLY frames, each in a slot of its own.

Each write comes out as MMIO, in pieces that do not cross a page; the instruction is done once and the
memory stays what it was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.mmu.guest import FULL, Mmio, PagingGuest

if TYPE_CHECKING:
    from tests.mmu.conftest import NewGuest

ROM = 0x100_0000
LA = 0x4000_0000  # TEST: page n there is the frame n of ROM
END = LA + 0x1000  # where the first frame ends and the second begins
VALUE = 0x8877_6655_4433_2211
BYTES = VALUE.to_bytes(8, "little")


def rom_guest(new_guest: NewGuest, width: int, frames: int = 2) -> PagingGuest:
    """READONLY frames, one slot each; frame n is full of the byte n + 1."""
    guest = new_guest(width=width)
    for n in range(frames):
        memory = guest.vm.add_memory(ROM + n * 0x1000, 0x1000, slot=n + 1, readonly=True)
        memory[:] = bytes([n + 1] * 0x1000)
        guest.map(n, ROM + n * 0x1000)
    return guest


def writes(guest: PagingGuest, source: str, **regs: int) -> bytes:
    """Run to HLT; return what was written from ROM on, as (gpa, data) pieces put together."""
    found: dict[int, int] = {}
    exit_ = guest.run(f"{source}; hlt", **regs)
    while isinstance(exit_, Mmio):
        assert exit_.is_write
        assert exit_.phys_addr >> 12 == exit_.phys_addr + len(exit_.data) - 1 >> 12
        for n, byte in enumerate(bytes(exit_.data)):
            assert exit_.phys_addr + n not in found, "written twice"
            found[exit_.phys_addr + n] = byte
        exit_ = guest.vcpu.run()
    assert guest.vcpu.regs.rip == guest.end_of_code(f"{source}; hlt"), exit_
    first, last = min(found), max(found)
    assert sorted(found) == list(range(first, last + 1))
    return first.to_bytes(8, "little") + bytes(found[at] for at in sorted(found))


def at(address: int, data: bytes) -> bytes:
    return (address - LA + ROM).to_bytes(8, "little") + data


WIDTHS = pytest.mark.parametrize("width", [32, 36, 64])


@pytest.mark.parametrize("behind", [1, 3, 4, 7])
@pytest.mark.spec("vm.memslot_readonly", "mmu.emulate")
def test_a_store_over_the_end_of_a_frame(new_guest: NewGuest, behind: int) -> None:
    guest = rom_guest(new_guest, 64)
    where = END - 8 + behind
    assert writes(guest, "mov [rdi], rax", rdi=where, rax=VALUE) == at(where, BYTES)
    for _ in range(2):  # and again: nothing of the first is left over
        assert writes(guest, "mov [rdi], rax", rdi=where, rax=VALUE) == at(where, BYTES)


@WIDTHS
@pytest.mark.spec("vm.memslot_readonly", "mmu.emulate")
def test_push_over_the_end_of_a_frame(new_guest: NewGuest, width: int) -> None:
    guest = rom_guest(new_guest, width)
    size = guest.bits // 8
    source = f"mov rbp, rsp; mov rsp, {END + 2}; push rax; mov rcx, rsp; mov rsp, rbp"
    assert writes(guest, source, rax=VALUE) == at(END + 2 - size, BYTES[:size])
    assert int(guest.vcpu.regs.rcx) == END + 2 - size


@WIDTHS
@pytest.mark.spec("vm.memslot_readonly", "mmu.emulate")
def test_movs_over_the_end_of_a_frame(new_guest: NewGuest, width: int) -> None:
    guest = rom_guest(new_guest, width)
    data = bytes(range(1, 13))
    guest.ram[0x38000 : 0x38000 + 12] = data
    source = f"mov rsi, 0x38000; mov rdi, {END - 6}; mov ecx, 3; cld; rep movsd"
    assert writes(guest, source) == at(END - 6, data)
    regs = guest.vcpu.regs
    assert (int(regs.rcx), int(regs.rsi), int(regs.rdi)) == (0, 0x3800C, END + 6)


@WIDTHS
@pytest.mark.spec("vm.memslot_readonly", "mmu.emulate")
def test_cmpxchg_over_the_end_of_a_frame(new_guest: NewGuest, width: int) -> None:
    """What is compared is in both frames; what is written comes out though it stays."""
    guest = rom_guest(new_guest, width)
    old = int.from_bytes(b"\1\2\2\2", "little")
    source = f"mov rdi, {END - 1}; mov eax, {old}; mov ebx, 0x44332211; lock cmpxchg [rdi], ebx; setz cl"
    assert writes(guest, source) == at(END - 1, BYTES[:4])
    assert int(guest.vcpu.regs.rcx) & 0xFF == 1


@pytest.mark.spec("vm.memslot_readonly", "mmu.emulate")
def test_movs_from_one_frame_to_the_two_behind_it(new_guest: NewGuest) -> None:
    """Read-only memory can be read in an instruction that writes to it elsewhere."""
    guest = rom_guest(new_guest, 64, frames=3)
    source = f"mov rsi, {END - 4}; mov rdi, {END + 0x1000 - 3}; cld; movsq"
    assert writes(guest, source) == at(END + 0x1000 - 3, b"\1\1\1\1\2\2\2\2")


@pytest.mark.spec("vm.memslot_readonly", "mmu.emulate")
def test_one_frame_at_two_addresses(new_guest: NewGuest, mode: str) -> None:
    """Shadow paging tells the frame by the linear page, of which there are two."""
    guest = rom_guest(new_guest, 64)
    guest.map(1, ROM, FULL)
    found = guest.run("mov [rdi], rax; hlt", rdi=END - 4, rax=VALUE)
    pieces = []
    while isinstance(found, Mmio):
        pieces.append((found.phys_addr, bytes(found.data)))
        found = guest.vcpu.run()
    assert pieces == [(ROM + 0xFFC, BYTES[:4]), (ROM, BYTES[4:])], mode
