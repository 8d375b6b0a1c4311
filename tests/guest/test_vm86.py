"""Virtual-8086 mode extensions: CR4.VME in virtual-8086 mode, CR4.PVI at CPL 3.

The rest of virtual-8086 mode is where its instructions are: test_segments, test_system, test_events.
Source: SDM vol. 3 20.2, 20.3 (tables 20-2 and 20-3) and 20.4; vol. 2 by instruction.
"""

from __future__ import annotations

import pytest

from pykvm.abi import lib
from tests.guest.bare import CODE, HANDLERS, STACK, TSS, Machine

CF, TF, IF, IOPL, NT, VM, VIF, VIP = 1, 0x100, 0x200, 0x3000, 0x4000, 0x20000, 0x80000, 0x100000
VME, PVI = lib.X86_CR4_VME, lib.X86_CR4_PVI
GP = 13
PROGRAM = 0x20000  # where the program's own handlers are
BITMAP = TSS + 0x68  # of redirection; the I/O bitmap is behind it


@pytest.fixture
def m() -> Machine:
    return Machine()


def start(m: Machine, source: str, iopl: int = 0, flags: int = 0, cr4: int = VME, clear: int = -1) -> None:
    """Prepare virtual-8086 mode; `clear`: the vector that goes to the program, -1 for none."""
    m.asm(source, CODE, bits=16)
    m.vm86(CODE >> 4, 0, iopl)
    m.set(cr4=cr4, rflags=2 | VM | iopl << 12 | flags)
    bits = (1 << 256) - 1 & ~(1 << clear if clear >= 0 else 0)
    m.load(BITMAP, bits.to_bytes(32, "little") + b"\xff" * 2)
    m.write(TSS + 102, 0x68 + 32, 2)
    m.set_seg("tr", 0x48, TSS, 0x68 + 33, 0x8B)
    m.write(0x48 + 0x1000, 0x68 + 33, 2)  # its descriptor says the same
    for vector in range(256):
        m.write(4 * vector, (PROGRAM >> 4) << 16 | vector, 4)
    m.load(PROGRAM, b"\xf4" * 256)


def ends(m: Machine) -> None:
    """To the HLT behind the program, which faults as CPL is 3."""
    m.run(lib.EXIT_HLT)
    assert m.vector() == GP
    assert m.frame(2)[1] == m.symbols["end"] - CODE


def refused(m: Machine) -> None:
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(2)) == (GP, [0, m.symbols["bad"] - CODE])


def flags_then(m: Machine) -> int:
    """EFLAGS as the handler of the end found them."""
    return m.frame(4)[3]


@pytest.mark.spec("cpu.vm86")
@pytest.mark.tcg_differs("neither VME nor PVI: SDM vol. 3 20.3, 20.4")
def test_cli_and_sti_change_vif(m: Machine) -> None:
    start(m, "bad: sti; end: hlt")
    ends(m)
    assert flags_then(m) & (IF | VIF) == VIF
    start(m, "bad: cli; end: hlt", flags=VIF | IF)
    ends(m)
    assert flags_then(m) & (IF | VIF) == IF


@pytest.mark.spec("cpu.vm86")
def test_cli_and_sti_with_iopl_3_change_if(m: Machine) -> None:
    start(m, "bad: sti; end: hlt", iopl=3, flags=VIP)
    ends(m)
    assert flags_then(m) & (IF | VIF) == IF
    start(m, "bad: cli; end: hlt", iopl=3, flags=VIF | IF)
    ends(m)
    assert flags_then(m) & (IF | VIF) == VIF


@pytest.mark.spec("cpu.vm86")
@pytest.mark.parametrize("code", ["sti", "cli", "pushf", "popf", "iret", "int 0x21"])
def test_without_vme_all_are_gp(m: Machine, code: str) -> None:
    start(m, f"bad: {code}; end: hlt", cr4=0, clear=0x21)
    refused(m)


@pytest.mark.spec("cpu.vm86")
@pytest.mark.tcg_differs("neither VME nor PVI: SDM vol. 3 20.3, 20.4")
def test_what_waits_is_the_supervisors(m: Machine) -> None:
    """VIP: what would turn VIF on is #GP, and turning it off is not."""
    start(m, "bad: sti; end: hlt", flags=VIP)
    refused(m)
    start(m, "bad: cli; end: hlt", flags=VIP | VIF)
    ends(m)
    for code, slot in (("popf", 0), ("iret", 2)):
        start(m, f"bad: {code}; end: hlt", flags=VIP)
        m.load(STACK, bytes(6))
        m.write(STACK + 2 * slot, IF, 2)
        refused(m)
        assert m.frame(5)[4] == STACK, "nothing was popped"


@pytest.mark.spec("cpu.vm86")
@pytest.mark.tcg_differs("neither VME nor PVI: SDM vol. 3 20.3, 20.4")
@pytest.mark.parametrize("vif", [0, VIF])
def test_pushf_shows_vif_as_if_and_iopl_3(m: Machine, vif: int) -> None:
    start(m, "pushf; end: hlt", flags=IF ^ vif >> 10 | vif | NT | CF)
    ends(m)
    assert m.read(STACK - 2, 2) == 2 | IOPL | NT | CF | vif >> 10


@pytest.mark.spec("cpu.vm86")
@pytest.mark.parametrize("code", ["pushfd", "popfd", "iretd"])
def test_32_bit_forms_are_gp(m: Machine, code: str) -> None:
    start(m, f"bad: {code}; end: hlt")
    refused(m)


@pytest.mark.spec("cpu.vm86")
@pytest.mark.tcg_differs("neither VME nor PVI: SDM vol. 3 20.3, 20.4")
@pytest.mark.parametrize("value", [IF, 0])
def test_popf_sets_vif_and_neither_if_nor_iopl(m: Machine, value: int) -> None:
    start(m, "bad: popf; end: hlt", iopl=1, flags=IF ^ value | VIF ^ value << 10)
    m.write(STACK, value | 0x2000 | NT | CF, 2)
    ends(m)
    assert flags_then(m) & (IF | IOPL | NT | CF | VIF) == IF ^ value | 0x1000 | NT | CF | value << 10


@pytest.mark.spec("cpu.vm86")
@pytest.mark.parametrize(("code", "slot"), [("popf", 0), ("iret", 2)])
def test_tf_is_not_for_the_program(m: Machine, code: str, slot: int) -> None:
    start(m, f"bad: {code}; end: hlt")
    m.write(STACK + 2 * slot, TF, 2)
    refused(m)


@pytest.mark.spec("cpu.vm86")
@pytest.mark.tcg_differs("neither VME nor PVI: SDM vol. 3 20.3, 20.4")
def test_iret_sets_vif(m: Machine) -> None:
    start(m, "iret; end: hlt", iopl=1)
    m.load(STACK, (m.symbols["end"] - CODE).to_bytes(2, "little") + (CODE >> 4).to_bytes(2, "little"))
    m.write(STACK + 4, IF | IOPL | CF, 2)
    ends(m)
    assert flags_then(m) & (IF | IOPL | CF | VIF | VM) == 0x1000 | CF | VIF | VM
    assert m.frame(5)[4] == STACK + 6


@pytest.mark.spec("cpu.vm86")
@pytest.mark.tcg_differs("neither VME nor PVI: SDM vol. 3 20.3, 20.4")
@pytest.mark.parametrize(
    ("iopl", "flags", "pushed", "left"), [(1, VIF, IF, 0), (3, IF | VIF, IF, VIF), (2, IF, 0, IF)]
)
def test_int_goes_to_the_program_where_its_bit_is_clear(
    m: Machine, iopl: int, flags: int, pushed: int, left: int
) -> None:
    start(m, "int 0x21; back: hlt", iopl=iopl, flags=flags | NT, clear=0x21)
    m.run(lib.EXIT_HLT)  # #GP of the HLT there
    assert m.vector() == GP
    eip, cs, eflags, esp = m.frame(5)[1:]
    assert (eip, cs, esp) == (0x21, PROGRAM >> 4, STACK - 6)
    frame = [m.read(STACK - 6 + 2 * k, 2) for k in range(3)]
    assert frame == [m.symbols["back"] - CODE, CODE >> 4, 2 | IOPL | NT | pushed]
    assert eflags & (IF | VIF | TF | VM | IOPL) == left | VM | iopl << 12


@pytest.mark.spec("cpu.vm86")
def test_int_whose_bit_is_set_goes_to_the_idt_with_iopl_3_only(m: Machine) -> None:
    start(m, "int 0x22; back: hlt", iopl=3, clear=0x21)
    m.load(0x2000 + 8 * 0x22 + 5, b"\xee")
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(1)) == (0x22, [m.symbols["back"] - CODE])
    start(m, "bad: int 0x22; end: hlt", clear=0x21)
    refused(m)


@pytest.mark.spec("cpu.vm86")
def test_int_beyond_the_tss_is_gp(m: Machine) -> None:
    start(m, "bad: int 0xff; end: hlt", clear=0xFF)
    m.seg("tr").limit = 0x68 + 30
    refused(m)


@pytest.mark.spec("cpu.vm86", "cpu.tf")
@pytest.mark.tcg_differs("neither VME nor PVI: SDM vol. 3 20.3, 20.4")
def test_redirected_int_does_not_trap(m: Machine) -> None:
    start(m, "int 0x21; back: hlt", iopl=3, flags=TF, clear=0x21)
    m.run(lib.EXIT_HLT)
    assert m.vector() == GP
    assert m.read(STACK - 2, 2) & TF
    assert not m.frame(4)[3] & TF


@pytest.mark.spec("cpu.vm86")
@pytest.mark.tcg_differs("neither VME nor PVI: SDM vol. 3 20.3, 20.4")
def test_missing_pages_make_no_difference(m: Machine) -> None:
    """The bitmap, the program's table and its stack may have to be mapped first."""
    start(m, "int 0x21; back: hlt", clear=0x21)
    m.set(rsp=0x8002)
    pages = {0, 0x7000, 0x8000}
    for page in pages:
        m.unmap(page)
    seen = []
    while (reason := m.run()) == lib.EXIT_EPT_VIOLATION:
        assert m.reg("rsp") == 0x8002
        page = int(m.exit.gpa) & ~0xFFF
        seen.append(page)
        m.map(page)
    assert reason == lib.EXIT_HLT
    assert set(seen) == pages
    assert (m.frame(5)[1], m.frame(5)[4]) == (0x21, 0x7FFC)


# ---- protected mode


@pytest.mark.spec("cpu.vm86", "cpu.cpl_rules")
@pytest.mark.tcg_differs("neither VME nor PVI: SDM vol. 3 20.3, 20.4")
@pytest.mark.parametrize("mode", ["prot32", "long64"])
def test_pvi(m: Machine, mode: str) -> None:
    bits = 32 if mode == "prot32" else 64
    cr4 = 0 if mode == "prot32" else lib.X86_CR4_PAE | lib.X86_CR4_OSFXSR
    for code, before, after in (("sti", 0, VIF), ("cli", VIF | IF, IF), ("cli", VIP | VIF, VIP)):
        m.asm(f"bad: {code}; cpuid", CODE, bits)
        getattr(m, mode)(CODE, 3)
        m.set(cr4=cr4 | PVI, rflags=2 | before)
        m.run(lib.EXIT_CPUID)
        assert m.guest.rflags == 2 | after
    for code, flags, enable in (("sti", VIP, PVI), ("sti", 0, VME), ("cli", 0, VME)):
        m.asm(f"bad: {code}; cpuid", CODE, bits)
        getattr(m, mode)(CODE, 3)
        m.set(cr4=cr4 | enable, rflags=2 | flags)
        m.run(lib.EXIT_HLT)
        assert (m.vector(), m.frame(2)) == (GP, [0, CODE])
    m.asm("sti; cpuid", CODE, bits)
    getattr(m, mode)(CODE, 3)
    m.set(cr4=cr4 | PVI, rflags=2 | IOPL | VIP)
    m.run(lib.EXIT_CPUID)
    assert m.guest.rflags == 2 | IOPL | IF | VIP


@pytest.mark.spec("cpu.vm86")
@pytest.mark.tcg_differs("neither VME nor PVI: SDM vol. 3 20.3, 20.4")
def test_pvi_is_not_for_popf(m: Machine) -> None:
    m.asm("popfd; cpuid", CODE, 32)
    m.prot32(CODE, 3)
    m.set(cr4=PVI, rflags=2 | VIF)
    m.write(STACK, IF | VIP, 4)
    m.run(lib.EXIT_CPUID)
    assert m.guest.rflags == 2 | VIF


assert HANDLERS not in range(PROGRAM, PROGRAM + 256)
