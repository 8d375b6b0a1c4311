"""Delivery of exceptions and interrupts, on the bare processor.

Source: SDM vol. 3 chapter 6, vol. 2 INT n and IRET; x86-cpu.md section 3.
"""

from __future__ import annotations

import pytest

from pykvm.abi import lib
from tests.guest.bare import (
    CODE,
    CODE16,
    CODE32,
    CODE64,
    DATA32,
    FREE_SELECTOR,
    HANDLERS,
    IDT,
    IST1,
    LDT_SELECTOR,
    STACK,
    STACK0,
    TSS,
    TSS_SELECTOR,
    USER_CODE64,
    USER_DATA,
    Machine,
    descriptor,
    gate,
)

RF, IF, TF, NT, VM = 0x10000, 0x200, 0x100, 0x4000, 0x20000
DE, DB, NMI, BP, OF, UD, DF, TS, NP, SS, GP, PF = 0, 1, 2, 3, 4, 6, 8, 10, 11, 12, 13, 14


@pytest.fixture
def m() -> Machine:
    return Machine()


def start(m: Machine, mode: str, source: str, cpl: int = 0) -> None:
    bits = {"real": 16, "vm86": 16, "prot32": 32, "long64": 64}[mode]
    m.asm(source, CODE, bits=bits)
    if mode == "real":
        m.real(CODE)
    elif mode == "vm86":
        m.vm86(CODE >> 4, 0)
    else:
        getattr(m, mode)(CODE, cpl)


# ---- frames


@pytest.mark.spec("cpu.idt_delivery", "cpu.real_mode")
def test_real_mode_interrupt_pushes_flags_cs_ip(m: Machine) -> None:
    start(m, "real", "int 0x21")
    m.set(rflags=IF | 0x40002)  # AC
    m.run(lib.EXIT_HLT)
    assert m.vector() == 0x21
    assert m.frame(3) == [2, CODE >> 4, IF | 2]
    assert m.reg("rsp") == STACK - 6
    assert m.guest.rflags & (IF | TF | 0x40000) == 0


@pytest.mark.spec("cpu.idt_delivery")
def test_real_mode_keeps_the_upper_half_of_esp_and_wraps_nothing(m: Machine) -> None:
    start(m, "real", "int 0x21")
    m.set(rsp=0x5555_8000)
    m.run(lib.EXIT_HLT)
    assert m.reg("rsp") == 0x5555_7FFA


@pytest.mark.spec("cpu.real_mode", "cpu.double_fault")
def test_real_mode_vector_behind_the_ivt_is_gp(m: Machine) -> None:
    start(m, "real", "int 0x21")
    m.guest.idtr.limit = 0x21 * 4 + 2
    m.run(lib.EXIT_HLT)
    assert m.vector() == GP
    assert m.frame(2) == [0, CODE >> 4]  # a fault: at the INT; no error code in real mode


@pytest.mark.spec("cpu.double_fault")
def test_real_mode_without_ivt_is_a_triple_fault(m: Machine) -> None:
    start(m, "real", "int 0x21")
    m.guest.idtr.limit = 0
    m.run(lib.EXIT_TRIPLE_FAULT)
    assert m.guest.rip == 0


@pytest.mark.spec("cpu.double_fault")
@pytest.mark.tcg_differs("neither limits nor types of segments are checked: SDM vol. 3 5.3, 5.4")
def test_real_mode_without_stack_is_a_triple_fault(m: Machine) -> None:
    start(m, "real", "int 0x21")
    m.set(rsp=1)
    m.run(lib.EXIT_TRIPLE_FAULT)


@pytest.mark.spec("cpu.idt_delivery")
@pytest.mark.parametrize("kind", [0x8E, 0x8F])
def test_prot32_same_level(m: Machine, kind: int) -> None:
    start(m, "prot32", "int 0x40")
    m.set_gate(0x40, gate(CODE32, HANDLERS + 0x400, kind))
    m.set(rflags=IF | NT | 2)
    m.run(lib.EXIT_HLT)
    assert m.vector() == 0x40
    assert m.frame(3) == [CODE + 2, CODE32, IF | NT | 2]
    assert m.reg("rsp") == STACK - 12
    assert m.guest.rflags == (2 if kind == 0x8E else IF | 2)


@pytest.mark.spec("cpu.idt_delivery")
def test_16_bit_gate_pushes_words(m: Machine) -> None:
    start(m, "prot32", "int 0x40")
    m.set_gdt(CODE16, descriptor(HANDLERS, 0xFFFF, 0x9B))
    m.set_gate(0x40, gate(CODE16, 0x400, 0x86))
    m.run(lib.EXIT_HLT)
    assert m.guest.rip == 0x401
    assert m.frame(3, 2) == [CODE + 2 & 0xFFFF, CODE32, 2]
    assert m.reg("rsp") == STACK - 6


@pytest.mark.spec("cpu.idt_delivery", "cpu.far_transfers")
def test_prot32_from_user_switches_to_the_tss_stack(m: Machine) -> None:
    start(m, "prot32", "int 0x40", cpl=3)
    m.set_gate(0x40, gate(CODE32, HANDLERS + 0x400, 0xEE))
    m.run(lib.EXIT_HLT)
    assert m.vector() == 0x40
    assert m.frame(5) == [CODE + 2, 0x23, 2, STACK, USER_DATA | 3]
    assert m.reg("rsp") == STACK0 - 20
    assert (m.selectors()["ss"], m.selectors()["cs"], m.cpl) == (DATA32, CODE32, 0)
    assert m.selectors()["ds"] == USER_DATA | 3


@pytest.mark.spec("cpu.idt_delivery")
def test_conforming_handler_keeps_cpl_and_stack(m: Machine) -> None:
    start(m, "prot32", "int 0x40", cpl=3)
    m.set_gdt(FREE_SELECTOR, descriptor(0, 0xFFFFF, 0xC09E))
    m.set_gate(0x40, gate(FREE_SELECTOR, CODE + 0x100, 0xEE))
    m.asm("ud2", CODE + 0x100)
    m.run(lib.EXIT_HLT)
    assert m.vector() == UD
    assert m.frame(2) == [CODE + 0x100, FREE_SELECTOR | 3]
    assert m.read(STACK - 12, 4) == CODE + 2
    assert m.read(0x1000 + FREE_SELECTOR + 5, 1) & 1, "accessed bit"


@pytest.mark.spec("cpu.idt_delivery")
def test_long_mode_always_pushes_ss_rsp_and_aligns(m: Machine) -> None:
    start(m, "long64", "int 0x40")
    m.set(rsp=STACK - 5, rflags=IF | 0x8D7)
    m.run(lib.EXIT_HLT)
    assert m.frame(5) == [CODE + 2, CODE64, IF | 0x8D7, STACK - 5, DATA32]
    assert m.reg("rsp") == STACK - 16 - 40
    assert m.guest.rflags == 0x8D7


@pytest.mark.spec("cpu.idt_delivery")
def test_long_mode_from_user_loads_a_null_ss(m: Machine) -> None:
    start(m, "long64", "int 0x40", cpl=3)
    m.set_gate(0x40, gate(CODE64, HANDLERS + 0x400, 0xEE))
    m.run(lib.EXIT_HLT)
    assert m.frame(5) == [CODE + 2, USER_CODE64 | 3, 2, STACK, USER_DATA | 3]
    assert m.reg("rsp") == STACK0 - 40
    assert m.selectors()["ss"] == 0
    assert m.seg("ss").ar & 0x10000
    assert m.cpl == 0


@pytest.mark.spec("cpu.idt_delivery")
@pytest.mark.tcg_differs("SS becomes null without a change of CPL: SDM vol. 2 INT n, intra-privilege-level")
@pytest.mark.parametrize("cpl", [0, 3])
def test_ist_switches_the_stack_at_any_level(m: Machine, cpl: int) -> None:
    start(m, "long64", "ud2", cpl)
    m.set_gate(UD, gate(CODE64, HANDLERS + 0x60, ist=1))
    m.run(lib.EXIT_HLT)
    assert m.reg("rsp") == IST1 - 40
    assert m.frame(5)[3] == STACK
    assert m.cpl == 0


@pytest.mark.spec("cpu.idt_delivery")
def test_long_mode_from_compatibility_mode(m: Machine) -> None:
    m.asm("int 0x40", CODE, bits=32)
    m.long64(CODE)
    m.set_seg("cs", CODE32, 0, 0xFFFFFFFF, 0xC09B)
    m.run(lib.EXIT_HLT)
    assert m.vector() == 0x40
    assert m.frame(5) == [CODE + 2, CODE32, 2, STACK, DATA32]
    assert m.selectors()["cs"] == CODE64


@pytest.mark.spec("cpu.vm86", "cpu.idt_delivery")
def test_vm86_interrupt_pushes_the_segments_and_nulls_them(m: Machine) -> None:
    start(m, "vm86", "int 0x40")
    m.set_gate(0x40, gate(CODE32, HANDLERS + 0x400, 0xEE))
    for k, name in enumerate(("es", "ds", "fs", "gs")):
        m.set_seg(name, 0x10 + k, 0x100 + 16 * k, 0xFFFF, 0xF3)
    m.run(lib.EXIT_HLT)
    assert m.frame(9) == [2, CODE >> 4, VM | 0x3002, STACK, 0, 0x10, 0x11, 0x12, 0x13]
    assert m.reg("rsp") == STACK0 - 36
    assert [m.seg(n).ar >> 16 for n in ("es", "ds", "fs", "gs")] == [1, 1, 1, 1]
    assert m.guest.rflags == 0x3002


@pytest.mark.spec("cpu.vm86")
def test_vm86_int_needs_iopl_3_but_int3_does_not(m: Machine) -> None:
    start(m, "vm86", "int 0x40")
    m.set(rflags=VM | 2)
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(2)) == (GP, [0, 0])
    start(m, "vm86", "int3")
    m.set_gate(BP, gate(CODE32, HANDLERS + 16 * BP, 0xEE))
    m.set(rflags=VM | 2)
    m.run(lib.EXIT_HLT)
    assert m.vector() == BP


@pytest.mark.spec("cpu.vm86")
@pytest.mark.tcg_differs("#TS, not #GP: SDM vol. 2 INT n, interrupt from virtual-8086 mode")
def test_vm86_handler_must_be_ring_0(m: Machine) -> None:
    start(m, "vm86", "int 0x40")
    m.set_gdt(FREE_SELECTOR, descriptor(0, 0xFFFFF, 0xC0BB))  # DPL 1
    m.set_gate(0x40, gate(FREE_SELECTOR, HANDLERS + 0x400, 0xEE))
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(1)) == (GP, [FREE_SELECTOR])


# ---- vectors, error codes, RF


FAULTS = {
    "ud2": (UD, None),
    "xor edx, edx; xor ecx, ecx; div ecx": (DE, None),
    "mov ax, 0x1234; mov ds, ax": (GP, 0x1234),
    "mov ax, 0x68; mov ds, ax": (GP, 0x68),
    "int 0x40": (GP, 0x202),
}


@pytest.mark.spec("cpu.vectors", "cpu.idt_delivery")
@pytest.mark.tcg_differs("error codes of the IDT are 16 * vector in long mode: SDM vol. 3 6.13")
@pytest.mark.parametrize("mode", ["prot32", "long64"])
@pytest.mark.parametrize("source", FAULTS)
def test_faults_push_the_rip_of_the_instruction_and_rf(m: Machine, mode: str, source: str) -> None:
    vector, error = FAULTS[source]
    *before, faulting = source.split(";")
    start(m, mode, ";".join([*before, "fault:" + faulting]), cpl=3)
    m.run(lib.EXIT_HLT)
    assert m.vector() == vector
    frame = m.frame(4)
    if error is not None:
        assert frame.pop(0) == error
    assert frame[0] == m.symbols["fault"]
    assert frame[2] & RF


@pytest.mark.spec("cpu.soft_int", "cpu.vectors")
@pytest.mark.tcg_differs("INT1 is #UD: SDM vol. 2 INT n")
@pytest.mark.parametrize("mode", ["prot32", "long64"])
@pytest.mark.parametrize(
    ("code", "vector", "length"),
    [("int3", BP, 1), (".byte 0xcd, 3", BP, 2), (".byte 0xf1", DB, 1), ("int 0x80", 0x80, 2)],
)
def test_software_events_return_behind_and_push_no_rf(
    m: Machine, mode: str, code: str, vector: int, length: int
) -> None:
    start(m, mode, code)
    m.run(lib.EXIT_HLT)
    assert m.vector() == vector
    assert m.frame(3)[0] == CODE + length
    assert m.frame(3)[2] == 2


@pytest.mark.spec("cpu.soft_int")
def test_into(m: Machine) -> None:
    start(m, "prot32", ".byte 0xce; mov al, 127; inc al; .byte 0xce")
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(1)) == (OF, [CODE + 6])
    start(m, "long64", ".byte 0xce")
    m.run(lib.EXIT_HLT)
    assert m.vector() == UD


@pytest.mark.spec("cpu.soft_int", "cpu.idt_delivery")
@pytest.mark.tcg_differs("IDT error codes are 16 * vector, INT1 is #UD: SDM vol. 3 6.13, vol. 2 INT n")
@pytest.mark.parametrize("mode", ["prot32", "long64"])
@pytest.mark.parametrize(("code", "vector"), [("int3", BP), ("int 0x80", 0x80), (".byte 0xf1", DB)])
def test_dpl_of_the_gate_is_checked_for_all_but_int1(m: Machine, mode: str, code: str, vector: int) -> None:
    start(m, mode, code, cpl=3)
    m.run(lib.EXIT_HLT)
    if vector == DB:
        assert m.vector() == DB
    else:
        assert (m.vector(), m.frame(2)) == (GP, [vector * 8 + 2, CODE])


@pytest.mark.spec("cpu.soft_int")
def test_hardware_vector_through_int_pushes_no_error_code(m: Machine) -> None:
    start(m, "long64", "int 13")
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(1)) == (GP, [CODE + 2])


# ---- gates


@pytest.mark.spec("cpu.idt_delivery")
@pytest.mark.tcg_differs("error codes of the IDT are 16 * vector in long mode: SDM vol. 3 6.13")
@pytest.mark.parametrize("mode", ["prot32", "long64"])
@pytest.mark.parametrize(
    ("selector", "kind", "vector", "error"),
    [
        (None, 0x0E, NP, 0x202),  # gate not present
        (None, 0x8C, GP, 0x202),  # a call gate
        (None, 0x80, GP, 0x202),
        (0, 0x8E, GP, 0),
        (3, 0x8E, GP, 0),
        (DATA32, 0x8E, GP, DATA32),
        (USER_CODE64, 0x8E, GP, USER_CODE64),  # less privileged
        (0x1230, 0x8E, GP, 0x1230),  # behind the table
        (0x0C, 0x8E, GP, 0x0C),  # no LDT
        (FREE_SELECTOR, 0x8E, NP, FREE_SELECTOR),
    ],
)
def test_bad_gates(m: Machine, mode: str, selector: int | None, kind: int, vector: int, error: int) -> None:
    start(m, mode, "int 0x40")
    ok = CODE64 if mode == "long64" else CODE32
    m.set_gdt(FREE_SELECTOR, descriptor(0, 0xFFFFF, 0xA01B if mode == "long64" else 0xC01B))
    m.set_gate(0x40, gate(ok if selector is None else selector, HANDLERS + 0x400, kind))
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(2)) == (vector, [error, CODE])


@pytest.mark.spec("cpu.idt_delivery")
def test_external_interrupt_sets_ext_in_the_error_code(m: Machine) -> None:
    start(m, "long64", "nop")
    m.set_gate(0x40, gate(DATA32, HANDLERS))
    m.inject(0x40, lib.CPU_EVENT_INTR)
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(2)) == (GP, [DATA32 | 1, CODE])
    start(m, "long64", "nop")
    m.set_gate(0x41, gate(CODE64, HANDLERS, 0x0E))
    m.inject(0x41, lib.CPU_EVENT_INTR)
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(1)) == (NP, [0x41 * 8 + 3])


@pytest.mark.spec("cpu.idt_delivery")
@pytest.mark.tcg_differs("error codes of the IDT are 16 * vector in long mode: SDM vol. 3 6.13")
def test_long_mode_gates(m: Machine) -> None:
    start(m, "long64", "int 0x40")
    m.set_gate(0x40, gate(CODE32, HANDLERS + 0x400))  # not a 64-bit segment
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(1)) == (GP, [CODE32])
    for kind in (0x86, 0x87, 0x85):
        start(m, "long64", "int 0x40")
        m.set_gate(0x40, gate(CODE64, HANDLERS + 0x400, kind))
        m.run(lib.EXIT_HLT)
        assert (m.vector(), m.frame(1)) == (GP, [0x202]), hex(kind)
    start(m, "long64", "int 0x40")
    m.set_gate(0x40, gate(CODE64, 0x8000_0000_0000))
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(2)) == (GP, [0, CODE])
    start(m, "long64", "int 0x80")
    m.guest.idtr.limit = 0x80 * 16 + 14
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(1)) == (GP, [0x402])


@pytest.mark.spec("cpu.idt_delivery")
@pytest.mark.tcg_differs("a stack segment that is not present is not #SS: SDM vol. 2 INT n")
@pytest.mark.parametrize(
    ("limit", "selector", "vector", "error"),
    [
        (8, DATA32, TS, TSS_SELECTOR),
        (0x67, 0, TS, 0),
        (0x67, USER_DATA, TS, USER_DATA),
        (0x67, DATA32 | 3, TS, DATA32),
        (0x67, CODE32, TS, CODE32),
        (0x67, 0x1230, TS, 0x1230),
        (0x67, FREE_SELECTOR, SS, FREE_SELECTOR),
    ],
)
def test_bad_stacks_in_the_tss(m: Machine, limit: int, selector: int, vector: int, error: int) -> None:
    start(m, "prot32", "int 0x40", cpl=3)
    m.set_gate(0x40, gate(CODE32, HANDLERS + 0x400, 0xEE))
    # The handler of the fault must not need that stack: a conforming one.
    m.set_gdt(LDT_SELECTOR, descriptor(0, 0xFFFFF, 0xC09E))
    m.set_gate(vector, gate(LDT_SELECTOR, CODE + 0x100, 0xEE))
    m.asm("pop eax; mov ebx, [esp]; mov byte ptr [0], 1; mov dword ptr [0x500], eax; cpuid", CODE + 0x100, 32)
    m.set_gdt(FREE_SELECTOR, descriptor(0, 0xFFFFF, 0xC013))
    m.write(TSS + 8, selector, 4)
    m.seg("tr").limit = limit
    m.run(lib.EXIT_CPUID)
    assert m.reg("rax") == error
    assert m.reg("rbx") == CODE


@pytest.mark.spec("cpu.idt_delivery")
@pytest.mark.tcg_differs("neither limits nor types of segments are checked: SDM vol. 3 5.3, 5.4")
def test_no_room_on_the_new_stack_is_ss_with_its_selector(m: Machine) -> None:
    start(m, "prot32", "int 0x40", cpl=3)
    m.set_gate(0x40, gate(CODE32, HANDLERS + 0x400, 0xEE))
    m.set_gdt(LDT_SELECTOR, descriptor(0, 0xFFFFF, 0xC09E))
    m.set_gate(SS, gate(LDT_SELECTOR, CODE + 0x100, 0xEE))
    m.asm("pop eax; cpuid", CODE + 0x100, 32)
    m.set_gdt(FREE_SELECTOR, descriptor(0, 0x7F, 0x4093))
    m.write(TSS + 8, FREE_SELECTOR, 4)
    m.run(lib.EXIT_CPUID)
    assert m.reg("rax") == FREE_SELECTOR


@pytest.mark.spec("cpu.idt_delivery")
def test_non_canonical_stack_is_ss(m: Machine) -> None:
    start(m, "long64", "int 0x40", cpl=3)
    m.set_gate(0x40, gate(CODE64, HANDLERS + 0x400, 0xEE))
    m.set_gate(SS, gate(CODE64, HANDLERS + 16 * SS, ist=1))
    m.write(TSS + 4, 0x8000_0000_1000)
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(2)) == (SS, [0, CODE])


# ---- two at once


@pytest.mark.spec("cpu.double_fault", "cpu.nested_exceptions")
@pytest.mark.parametrize("mode", ["prot32", "long64"])
def test_gp_whose_gate_is_not_present_is_a_double_fault(m: Machine, mode: str) -> None:
    start(m, mode, "int 0x40", cpl=3)
    m.set_gate(GP, gate(CODE32, 0, 0x0E))
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(2)) == (DF, [0, CODE])


@pytest.mark.spec("cpu.double_fault")
@pytest.mark.tcg_differs("error codes of the IDT are 16 * vector in long mode: SDM vol. 3 6.13")
def test_benign_first_is_no_double_fault(m: Machine) -> None:
    start(m, "long64", "ud2")
    m.set_gate(UD, gate(CODE64, 0, 0x0E))
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(2)) == (NP, [UD * 8 + 3, CODE])


@pytest.mark.spec("cpu.double_fault")
@pytest.mark.tcg_differs("error codes of the IDT are 16 * vector in long mode: SDM vol. 3 6.13")
def test_software_interrupt_13_is_not_contributory(m: Machine) -> None:
    start(m, "long64", "int 10")
    m.set_gate(10, gate(CODE64, 0, 0x0E))
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(2)) == (NP, [10 * 8 + 2, CODE])


@pytest.mark.spec("cpu.double_fault")
def test_double_fault_whose_gate_is_not_present_is_a_triple_fault(m: Machine) -> None:
    start(m, "long64", "int 0x40", cpl=3)
    m.set_gate(GP, gate(CODE64, 0, 0x0E))
    m.set_gate(DF, gate(CODE64, 0, 0x0E))
    before = [m.reg(r) for r in ("rip", "rsp", "rflags")]
    m.run(lib.EXIT_TRIPLE_FAULT)
    assert [m.reg(r) for r in ("rip", "rsp", "rflags")] == before


def page_out(m: Machine, la: int) -> None:
    """The guest's page tables say: not present.  Splits the 2 MiB page."""
    table = 0x7000
    for k in range(512):
        m.write(table + 8 * k, k << 12 | 0x67)
    m.write(table + 8 * (la >> 12), 0)
    m.write(0x6000, table | 0x27)


@pytest.mark.spec("cpu.double_fault", "cpu.nested_exceptions")
def test_page_fault_on_the_stack_of_a_page_fault(m: Machine) -> None:
    start(m, "long64", "mov eax, [0x20123456]", cpl=3)
    page_out(m, STACK0 - 8)
    m.write(0x6000 + 8 * 0x100, 0)
    m.set_gate(DF, gate(CODE64, HANDLERS + 16 * DF, ist=1))
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(2)) == (DF, [0, CODE])
    assert m.guest.cr2 == STACK0 - 8


@pytest.mark.spec("cpu.nested_exceptions")
def test_page_fault_on_the_stack_of_an_interrupt(m: Machine) -> None:
    start(m, "long64", "nop", cpl=3)
    page_out(m, STACK0 - 8)
    m.set_gate(PF, gate(CODE64, HANDLERS + 16 * PF, ist=1))
    m.inject(0x40)
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(2)) == (PF, [2, CODE])
    assert m.guest.cr2 == STACK0 - 8


@pytest.mark.spec("cpu.vectors")
def test_page_fault_pushes_its_error_code_and_sets_cr2(m: Machine) -> None:
    start(m, "long64", "mov [0x20123456], eax", cpl=3)
    m.write(0x6000 + 8 * 0x100, 0)
    m.run(lib.EXIT_HLT)
    assert m.vector() == PF
    assert m.frame(2) == [lib.PFERR_WRITE_MASK | lib.PFERR_USER_MASK, CODE]
    assert m.guest.cr2 == 0x20123456


# ---- exits


@pytest.mark.spec("cpu.reinject")
@pytest.mark.parametrize("what", [STACK0 - 8, TSS, IDT, 0x1000])
def test_exit_during_delivery_changes_nothing_and_is_delivered_again(m: Machine, what: int) -> None:
    start(m, "long64", "mov [0x20123456], eax", cpl=3)
    m.write(0x6000 + 8 * 0x100, 0)
    m.unmap(what)
    before = [m.reg(r) for r in ("rip", "rsp", "rflags")]
    m.run(lib.EXIT_EPT_VIOLATION)
    assert m.exit.gpa & ~0xFFF == what & ~0xFFF
    ev = m.exit.idt_vectoring
    assert ev.info == PF | lib.CPU_EVENT_HARD_EXC | lib.CPU_EVENT_HAS_ERROR | lib.CPU_EVENT_VALID
    assert ev.error_code == 6
    assert [m.reg(r) for r in ("rip", "rsp", "rflags")] == before
    assert m.cpl == 3
    assert m.guest.cr2 == 0x20123456
    m.map(what)
    m.write(0x6000 + 8 * 0x100, 0x20000000 | 0xE7)  # the instruction would not fault again
    m.inject(ev.info & 0xFF, ev.info & lib.CPU_EVENT_TYPE, ev.error_code)
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(2)) == (PF, [6, CODE])
    assert m.frame(4)[3] & RF


@pytest.mark.spec("cpu.reinject", "cpu.soft_int")
def test_exit_during_a_software_interrupt_knows_its_length(m: Machine) -> None:
    start(m, "long64", "int 0x40", cpl=3)
    m.set_gate(0x40, gate(CODE64, HANDLERS + 0x400, 0xEE))
    m.unmap(STACK0 - 8)
    m.run(lib.EXIT_EPT_VIOLATION)
    ev = m.exit.idt_vectoring
    assert ev.info == 0x40 | lib.CPU_EVENT_SOFT_INTR | lib.CPU_EVENT_VALID
    assert ev.insn_len == 2
    assert m.guest.rip == CODE
    m.map(STACK0 - 8)
    m.inject(0x40, lib.CPU_EVENT_SOFT_INTR, length=ev.insn_len)
    m.run(lib.EXIT_HLT)
    assert m.frame(1) == [CODE + 2]
    assert m.ctl.entry_event.info == 0


@pytest.mark.spec("cpu.reinject")
def test_exits_without_delivery_have_no_vectoring_information(m: Machine) -> None:
    start(m, "long64", "int 0x40", cpl=3)
    m.set_gate(0x40, gate(CODE64, HANDLERS + 0x400, 0xEE))
    m.unmap(STACK0 - 8)
    m.run(lib.EXIT_EPT_VIOLATION)
    m.map(STACK0 - 8)
    start(m, "long64", "mov eax, [0x20000000]")
    m.run(lib.EXIT_EPT_VIOLATION)
    assert m.exit.idt_vectoring.info == 0


@pytest.mark.spec("cpu.guest_vs_host_debug")
def test_exception_bitmap_exits_instead_of_delivering(m: Machine) -> None:
    start(m, "long64", "int3")
    m.ctl.exception_bitmap = 1 << BP
    m.run(lib.EXIT_EXCEPTION)
    assert m.exit.intr_info == BP | lib.CPU_EVENT_SOFT_EXC | lib.CPU_EVENT_VALID
    assert (m.exit.insn_len, m.guest.rip, m.reg("rsp")) == (1, CODE, STACK)
    start(m, "long64", ".byte 0xcd, 3")  # INT 3 is not #BP
    m.run(lib.EXIT_HLT)
    assert m.vector() == BP
    start(m, "long64", "mov eax, [0x20123456]")
    m.write(0x6000 + 8 * 0x100, 0)
    m.guest.cr2 = 0
    m.ctl.exception_bitmap = 1 << PF
    m.run(lib.EXIT_EXCEPTION)
    assert m.exit.intr_info & 0xFF == PF
    assert (m.exit.error_code, m.exit.qualification, m.guest.cr2) == (0, 0x20123456, 0)


@pytest.mark.spec("cpu.guest_vs_host_debug")
def test_intercepted_exception_during_delivery(m: Machine) -> None:
    start(m, "long64", "nop", cpl=3)
    page_out(m, STACK0 - 8)
    m.ctl.exception_bitmap = 1 << PF
    m.inject(0x40)
    m.run(lib.EXIT_EXCEPTION)
    assert m.exit.intr_info & 0xFF == PF
    assert m.exit.idt_vectoring.info == 0x40 | lib.CPU_EVENT_VALID


# ---- interrupts and blocking


@pytest.mark.spec("cpu.if_window_extint")
def test_interrupt_is_delivered_at_rip_and_once(m: Machine) -> None:
    start(m, "long64", "hlt")
    m.set(rflags=IF | 2)
    m.inject(0x30)
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(3)) == (0x30, [CODE, CODE64, IF | 2])
    assert m.ctl.entry_event.info == 0
    m.asm("iretq", HANDLERS + 0x301)
    m.run(lib.EXIT_HLT)
    assert m.guest.rip == CODE + 1
    assert m.guest.rflags & IF


@pytest.mark.spec("cpu.if_window_extint", "cpu.sti_shadow")
def test_interrupt_window_opens_behind_the_sti_shadow(m: Machine) -> None:
    start(m, "long64", "sti; nop; nop; nop; hlt")
    m.ctl.flags |= lib.CPU_EXIT_IRQ_WINDOW
    m.run(lib.EXIT_IRQ_WINDOW)
    assert m.guest.rip == CODE + 2
    start(m, "long64", "sti; nop; nop; hlt")
    m.set(rflags=IF | 2)
    m.run(lib.EXIT_IRQ_WINDOW)
    assert m.guest.rip == CODE
    # IF was set before: this STI has no shadow
    start(m, "long64", "nop; popfq; sti; nop; hlt")
    m.write(STACK, IF | 2)
    m.run(lib.EXIT_IRQ_WINDOW)
    assert m.guest.rip == CODE + 2


@pytest.mark.spec("cpu.movss_shadow")
@pytest.mark.parametrize("code", ["mov ss, eax", "push eax; pop ss", "lss esp, [0x500]"])
def test_nmi_and_interrupts_wait_behind_mov_ss(m: Machine, code: str) -> None:
    start(m, "prot32", f"mov eax, {DATA32}; {code}; behind: nop; hlt")
    m.write(0x500, DATA32 << 32 | STACK, 6)
    m.ctl.insn_budget = code.count(";") + 2
    assert m.enter() == lib.EXIT_PREEMPTED
    assert m.guest.rip == m.symbols["behind"]
    blocked = 0 if "lss" in code else lib.CPU_BLOCK_MOVSS
    assert m.guest.interruptibility == blocked
    m.ctl.insn_budget = 0
    m.ctl.flags |= lib.CPU_EXIT_NMI_WINDOW
    m.run(lib.EXIT_NMI_WINDOW)
    assert m.guest.rip == m.symbols["behind"] + bool(blocked)
    assert m.guest.interruptibility == 0


@pytest.mark.spec("cpu.movss_shadow", "cpu.tf")
def test_single_step_trap_waits_behind_mov_ss(m: Machine) -> None:
    start(m, "prot32", f"mov eax, {DATA32}; mov ss, eax; nop; nop; hlt")
    m.set(rflags=TF | 2)
    m.asm("iretd", HANDLERS + 16 * DB, 32)
    stops = []
    m.ctl.exception_bitmap = 1 << DB
    for _ in range(3):
        m.run(lib.EXIT_EXCEPTION)
        assert m.exit.qualification & lib.DR6_BS
        stops.append(m.guest.rip - CODE)
    assert stops == [5, 8, 9]  # not behind MOV SS


@pytest.mark.spec("cpu.nmi_blocking")
def test_nmi_blocks_nmi_until_iret(m: Machine) -> None:
    start(m, "long64", "nop; hlt")
    m.asm("nop; iretq", HANDLERS + 16 * NMI)
    m.inject(NMI, lib.CPU_EVENT_NMI)
    m.ctl.flags |= lib.CPU_EXIT_NMI_WINDOW
    m.run(lib.EXIT_NMI_WINDOW)
    assert m.guest.rip == CODE
    assert not m.guest.interruptibility & lib.CPU_BLOCK_NMI
    start(m, "long64", "hlt")
    m.load(HANDLERS + 16 * NMI, b"\xf4")
    m.inject(NMI, lib.CPU_EVENT_NMI)
    m.run(lib.EXIT_HLT)
    assert m.vector() == NMI
    assert m.guest.interruptibility == lib.CPU_BLOCK_NMI


@pytest.mark.spec("cpu.nmi_blocking")
def test_faulting_iret_unblocks_nmi(m: Machine) -> None:
    start(m, "long64", "iretq")
    for k, v in enumerate((CODE, 0x1230, 2, STACK, DATA32)):
        m.write(STACK + 8 * k, v)
    m.guest.interruptibility = lib.CPU_BLOCK_NMI
    m.run(lib.EXIT_HLT)
    assert m.vector() == GP
    assert m.guest.interruptibility == 0


# ---- #DB


@pytest.mark.spec("cpu.dr_breakpoints", "cpu.tf")
@pytest.mark.tcg_differs("GD stays set: SDM vol. 3 17.2.4")
def test_debug_trap_merges_dr6_and_clears_gd(m: Machine) -> None:
    start(m, "long64", "nop; hlt")
    m.set(rflags=TF | 2, dr6=0xFFFF2FF3, dr7=0x2400)
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(3)) == (DB, [CODE + 1, CODE64, TF | 2])
    assert m.guest.dr6 == 0xFFFF6FF0
    assert m.guest.dr7 == 0x400
    assert not m.guest.rflags & TF


@pytest.mark.spec("cpu.dr_breakpoints")
@pytest.mark.tcg_differs("GD stays set: SDM vol. 3 17.2.4")
def test_general_detect_is_a_fault(m: Machine) -> None:
    start(m, "long64", "mov rax, dr0")
    m.set(dr7=0x2400)
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(1)) == (DB, [CODE])
    assert m.frame(3)[2] & RF
    assert m.guest.dr6 == 0xFFFF2FF0
    assert m.guest.dr7 == 0x400


@pytest.mark.spec("cpu.dr_breakpoints")
def test_instruction_breakpoint_and_rf(m: Machine) -> None:
    start(m, "long64", "nop; nop; hlt")
    m.set(dr0=CODE + 1, dr7=0x401)
    m.asm("or qword ptr [rsp + 16], 0x10000; iretq", HANDLERS + 16)
    m.run(lib.EXIT_HLT)
    assert m.guest.rip == CODE + 3
    assert m.guest.dr6 == 0xFFFF0FF1
    m.asm("hlt", HANDLERS + 16)
    m.set(rip=CODE)
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(3)) == (DB, [CODE + 1, CODE64, 2])
