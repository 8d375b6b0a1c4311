"""Every way an instruction can touch memory, on MMIO: the same result as on RAM, each access once.

A device answers reads from a byte array and counts; the program runs once on RAM and once on the device.
Source: exit.mmio and ctl.mmio in include/pykvm/cpu.h; SDM vol. 2 for which accesses an instruction makes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from pykvm.abi import lib
from tests.guest.bare import CODE, GPRS, STACK, Machine

PLACE = 0x100000
NEXT_PAGE = PLACE + 0x1000


@dataclass
class Device:
    """What lies behind the MMIO pages, and what was done to it: (address, length, is a write)."""

    data: bytearray
    log: list[tuple[int, int, bool]] = field(default_factory=list)

    def run(self, m: Machine) -> None:
        """Run to the HLT; MMIO exits are served from the data."""
        while (reason := m.run()) != lib.EXIT_HLT:
            if reason == lib.EXIT_MMIO_READ:
                self.read(m)
            else:
                assert reason == lib.EXIT_MMIO_WRITE, f"exit {reason}"
                for k in range(m.exit.mmio_count):
                    self.write(m.exit.mmio[k])

    def read(self, m: Machine) -> None:
        piece = m.exit.mmio[0]
        at, n = piece.gpa - PLACE, piece.len
        self.log.append((piece.gpa, n, False))
        answer = m.ctl.mmio[m.ctl.mmio_count]
        answer.gpa, answer.len = piece.gpa, n
        for k in range(n):
            answer.data[k] = self.data[at + k]
        m.ctl.mmio_count += 1

    def write(self, piece: object) -> None:
        at, n = piece.gpa - PLACE, piece.len  # type: ignore[attr-defined]
        self.log.append((at + PLACE, n, True))
        self.data[at : at + n] = bytes(piece.data[0:n])  # type: ignore[attr-defined]


def contents() -> bytearray:
    return bytearray((k * 37 + 11) & 0xFF for k in range(0x2000))


def prepare(m: Machine, source: str) -> None:
    m.asm(f"{source}; mov r14, 1; hlt", CODE)
    m.long64(CODE)
    m.set(rax=0x1122334455667788, rbx=PLACE + 0x40, rcx=3, rdx=5, rsi=PLACE + 0x80, rdi=0x180000, r8=0x99)


def state(m: Machine) -> list[int]:
    return [int(m.guest.gpr[k]) for k in range(16)] + [m.guest.rip, m.guest.rflags]


R, W = False, True
CASES = [
    ("mov eax, [rbx]", [(0x40, 4, R)]),
    ("mov [rbx], ax", [(0x40, 2, W)]),
    ("mov byte ptr [rbx], 7", [(0x40, 1, W)]),
    ("add [rbx], rax", [(0x40, 8, R), (0x40, 8, W)]),
    ("lock add [rbx], eax", [(0x40, 4, R), (0x40, 4, W)]),
    ("cmp [rbx], eax", [(0x40, 4, R)]),
    ("not byte ptr [rbx]", [(0x40, 1, R), (0x40, 1, W)]),
    ("shl word ptr [rbx], cl", [(0x40, 2, R), (0x40, 2, W)]),
    ("xchg [rbx], eax", [(0x40, 4, R), (0x40, 4, W)]),
    ("xadd [rbx], eax", [(0x40, 4, R), (0x40, 4, W)]),
    ("cmpxchg [rbx], edx", [(0x40, 4, R), (0x40, 4, W)]),
    ("lock cmpxchg8b [rbx]", [(0x40, 8, R), (0x40, 8, W)]),
    ("bts [rbx], rcx", [(0x40, 8, R), (0x40, 8, W)]),
    ("bt dword ptr [rbx], 5", [(0x40, 4, R)]),
    ("movzx eax, byte ptr [rbx]", [(0x40, 1, R)]),
    ("sete [rbx]", [(0x40, 1, W)]),
    ("cmove eax, [rbx]", [(0x40, 4, R)]),
    ("imul eax, [rbx], 3", [(0x40, 4, R)]),
    ("mul qword ptr [rbx]", [(0x40, 8, R)]),
    ("push qword ptr [rbx]", [(0x40, 8, R)]),
    ("pop qword ptr [rbx]", [(0x40, 8, W)]),
    ("mov rsp, rbx; push rax", [(0x38, 8, W)]),
    ("mov rsp, rbx; pop rax", [(0x40, 8, R)]),
    ("mov rsp, rbx; push qword ptr [rsi]", [(0x80, 8, R), (0x38, 8, W)]),
    ("mov rsp, rbx; call 1f; 1: nop", [(0x38, 8, W)]),
    ("mov rbp, rbx; leave", [(0x40, 8, R)]),
    ("movsd", [(0x80, 4, R)]),
    ("mov rdi, rbx; movsd", [(0x80, 4, R), (0x40, 4, W)]),
    ("rep movsb", [(0x80, 1, R), (0x81, 1, R), (0x82, 1, R)]),
    ("mov rdi, rbx; rep movsw", [(a + 2 * k, 2, w) for k in range(3) for a, w in ((0x80, R), (0x40, W))]),
    ("mov rdi, rbx; rep stosd", [(0x40 + 4 * k, 4, W) for k in range(3)]),
    ("lodsq", [(0x80, 8, R)]),
    ("mov rdi, rbx; repe cmpsb", [(0x80, 1, R), (0x40, 1, R)]),
    ("mov rdi, rbx; repne scasb", [(0x40 + k, 1, R) for k in range(3)]),
    ("mov rbx, rsi; xlat", [(0x80 + 0x88, 1, R)]),
    ("movbe eax, [rbx]", [(0x40, 4, R)]),
    ("mov eax, [0x100ffe]", [(0xFFE, 2, R), (0x1000, 2, R)]),
    ("mov [0x100ffd], rax", [(0xFFD, 3, W), (0x1000, 5, W)]),
    ("add [0x100fff], ax", [(0xFFF, 1, R), (0x1000, 1, R), (0xFFF, 1, W), (0x1000, 1, W)]),
]


@pytest.mark.spec("cpu.string_mmio", "cpu.page_crossing")
@pytest.mark.tcg_differs("other values of undefined flags: SDM vol. 2 SHL, IMUL, MUL")
@pytest.mark.parametrize(("source", "accesses"), CASES, ids=[c[0] for c in CASES])
def test_each_access_once(source: str, accesses: list[tuple[int, int, bool]]) -> None:
    on_ram, on_device = Machine(), Machine()
    on_ram.load(PLACE, bytes(contents()))
    prepare(on_ram, source)
    on_ram.run(lib.EXIT_HLT)

    device = Device(contents())
    on_device.map_mmio(PLACE)
    on_device.map_mmio(NEXT_PAGE)
    prepare(on_device, source)
    device.run(on_device)

    assert dict(zip((*GPRS, "rip", "rflags"), state(on_device), strict=True)) == dict(
        zip((*GPRS, "rip", "rflags"), state(on_ram), strict=True),
    )
    assert device.data == on_ram.ram[PLACE : PLACE + 0x2000]
    assert on_device.ram[STACK - 64 : STACK + 64] == on_ram.ram[STACK - 64 : STACK + 64]
    assert device.log == [(PLACE + at, n, write) for at, n, write in accesses]
    assert on_device.reg("r14") == 1


@pytest.mark.spec("cpu.page_crossing")
@pytest.mark.parametrize("first", ["ram", "device"])
def test_half_in_ram_and_half_in_a_device(first: str) -> None:
    """The read-modify-write of eight bytes that are half RAM, half MMIO."""
    m = Machine()
    data = contents()
    m.load(PLACE, bytes(data))
    device = Device(data)
    m.map_mmio(NEXT_PAGE if first == "ram" else PLACE)
    prepare(m, "add qword ptr [0x100ffc], 1")
    device.run(m)
    before = int.from_bytes(contents()[0xFFC:0x1004], "little")
    low = m.ram[PLACE + 0xFFC : PLACE + 0x1000] if first == "ram" else bytes(device.data[0xFFC:0x1000])
    high = bytes(device.data[0x1000:0x1004]) if first == "ram" else m.ram[NEXT_PAGE : NEXT_PAGE + 4]
    assert int.from_bytes(low + high, "little") == before + 1
    assert [write for _, _, write in device.log] == [False, True]
