"""Every vector with its class, every pair of exceptions, and which of several comes first.

Source: SDM vol. 3 6.5 (classes), 6.9 and table 6-2 (priority), 6.15 by interrupt, tables 6-4 and 6-5 (#DF).
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from pykvm.abi import lib
from tests.guest.bare import (
    ALL_ONES,
    CODE,
    CODE32,
    CODE64,
    DATA32,
    FREE_SELECTOR,
    HANDLERS,
    IDT,
    PD,
    STACK,
    STACK0,
    TSS,
    Machine,
    descriptor,
    gate,
)

DE, DB, NMI, BP, OF, BR, UD, NM, DF, TS, NP, SS, GP, PF, MF, AC, MC, XM = (
    0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 14, 16, 17, 18, 19,
)  # fmt: skip
IF, TF, RF = 0x200, 0x100, 0x10000
CR0_NE, CR0_MP, CR0_TS, CR0_AM = 0x20, 2, 8, 0x40000
NON_CANONICAL = 0x8000_0000_1000


@pytest.fixture
def m() -> Machine:
    return Machine()


# ---- the vectors


@dataclass
class Case:
    """What raises a vector, at the label `bad`; `behind`: the class is trap, or rip is the next."""

    vector: int
    source: str
    error: int | None = None
    trap: bool = False
    cpl: int = 0


VECTORS = [
    Case(DE, "xor ecx, ecx; bad: div ecx"),
    Case(DE, "mov eax, 0x80000000; cdq; mov ecx, -1; bad: idiv ecx"),
    Case(DB, "push 0x102; popf; nop; bad:", trap=True),
    Case(DB, "bad: .byte 0xf1", trap=True),
    Case(BP, "bad: int3", trap=True),
    Case(UD, "bad: ud2"),
    Case(NM, "mov eax, cr0; or al, 8; mov cr0, eax; bad: fld1"),
    Case(NM, "mov eax, cr0; or al, 8; mov cr0, eax; bad: movaps xmm0, xmm1"),
    Case(NM, "mov eax, cr0; or al, 10; mov cr0, eax; bad: fwait"),
    Case(TS, "bad: int 0x41", DATA32, cpl=3),
    Case(NP, f"mov eax, {FREE_SELECTOR}; bad: mov es, eax", FREE_SELECTOR),
    Case(SS, f"mov eax, {FREE_SELECTOR}; bad: mov ss, eax", FREE_SELECTOR),
    Case(GP, "bad: hlt", 0, cpl=3),
    Case(GP, "mov eax, 0x1238; bad: mov es, eax", 0x1238),
    Case(PF, "bad: mov eax, [0x300000]", 0),
    Case(MF, "fninit; push 0x37b; fldcw [{sp}]; fld1; fldz; fdivp; bad: fld1"),
    Case(AC, "push 0x40202; popf; bad: mov eax, [{sp} + 1]", 0, cpl=3),
    Case(XM, "push 0x1f00; ldmxcsr [{sp}]; bad: divss xmm0, xmm1"),
]


def prepare(m: Machine, mode: str, case: Case) -> None:
    wide = mode == "long64"
    source = case.source.format(sp="rsp" if wide else "esp")
    if wide:
        source = (
            source.replace("popf;", "popfq;")
            .replace("mov eax, cr0", "mov rax, cr0")
            .replace("mov cr0, eax", "mov cr0, rax")
        )
    m.asm(f"{source}; hlt", CODE, 64 if wide else 32)
    getattr(m, mode)(CODE, case.cpl)
    # 2 MiB and 4 KiB: a page that is not there
    if not wide:
        for k in range(1024):
            m.write(0x100000 + 4 * k, k << 22 | 0xE7, 4)
        m.write(0x100000, 0x101000 | 7, 4)
        for k in range(1024):
            m.write(0x101000 + 4 * k, k << 12 | 0x67, 4)
        m.write(0x101000 + 4 * 0x300, 0, 4)
        m.set(cr3=0x100000, cr4=lib.X86_CR4_PSE | lib.X86_CR4_OSFXSR, cr0=0x80000011)
    else:
        m.write(PD + 8, 0)
    m.set(cr0=m.guest.cr0 | CR0_NE | CR0_AM, cr4=m.guest.cr4 | lib.X86_CR4_OSXMMEXCPT)
    m.set_gdt(FREE_SELECTOR, descriptor(0, 0xFFFFF, 0xC013))
    if case.vector == TS:
        m.set_gate(0x41, gate(CODE64 if wide else CODE32, HANDLERS, 0xEE))
        m.write(TSS + 8, DATA32 | 3, 4)
        if wide:
            m.set_seg("tr", 0x48, TSS, 0xA, 0x8B)
    for vector in (DB, BP):
        m.set_gate(vector, gate(CODE64 if wide else CODE32, HANDLERS + 16 * vector, 0xEE))


@pytest.mark.spec("cpu.vectors", "cpu.idt_delivery")
@pytest.mark.tcg_differs("no #AC, INT1 is #UD, #TS of the TSS is another: SDM vol. 3 6.15")
@pytest.mark.parametrize("mode", ["prot32", "long64"])
@pytest.mark.parametrize("case", VECTORS, ids=lambda c: f"{c.vector}: {c.source.split('bad:')[1].strip()}")
def test_class_and_error_code(m: Machine, mode: str, case: Case) -> None:
    prepare(m, mode, case)
    error = case.error
    if case.vector == TS:
        # the stack of CPL 0 is what is wrong: look at the exception before it is delivered
        m.ctl.exception_bitmap = 1 << TS
        m.run(lib.EXIT_EXCEPTION)
        assert m.exit.intr_info & 0xFF == TS
        assert m.exit.error_code == (0x48 if mode == "long64" else error)
        return
    m.run(lib.EXIT_HLT)
    frame = m.frame(4)
    assert m.vector() == case.vector
    if error is not None:
        assert frame.pop(0) == error
    rip = m.symbols["bad"]
    if case.trap and m.ram[rip] in {0xF1, 0xCC}:
        rip += 1
    assert frame[0] == rip
    assert bool(frame[2] & RF) is not case.trap


@pytest.mark.spec("cpu.vectors")
@pytest.mark.parametrize(
    ("source", "vector"), [("mov al, 127; inc al; into; nop", OF), ("bound eax, [0x500]; nop", BR)]
)
def test_vectors_of_32_bit_mode_only(m: Machine, source: str, vector: int) -> None:
    m.asm(source.replace("; into", "; bad: into").replace("bound", "bad: bound"), CODE, 32)
    m.prot32(CODE)
    m.set(rax=0xFFFF)
    m.run(lib.EXIT_HLT)
    assert m.vector() == vector
    assert m.frame(1) == [m.symbols["bad"] + (1 if vector == OF else 0)]


@pytest.mark.spec("cpu.vectors", "cpu.mce")
@pytest.mark.parametrize("mode", ["real", "prot32", "long64"])
@pytest.mark.parametrize(("vector", "kind"), [(NMI, "NMI"), (MC, "HARD_EXC"), (0x80, "INTR")])
def test_events_from_outside(m: Machine, mode: str, vector: int, kind: str) -> None:
    """At the next instruction, with the flags as they are."""
    m.asm("nop; hlt", CODE, {"real": 16, "prot32": 32, "long64": 64}[mode])
    getattr(m, mode)(CODE)
    m.set(rflags=IF | 0x8D7)
    m.inject(vector, getattr(lib, f"CPU_EVENT_{kind}"))
    m.run(lib.EXIT_HLT)
    frame = m.frame(3)
    assert m.vector() == vector
    assert frame[0] == (0 if mode == "real" else CODE)
    assert frame[2] == IF | 0x8D7
    assert m.guest.rflags == 0x8D7


# ---- pairs of exceptions

BENIGN, CONTRIBUTORY, PAGE_FAULT = "benign", "contributory", "page fault"
FIRST = {BENIGN: ("bad: ud2", UD), CONTRIBUTORY: ("xor ecx, ecx; bad: div ecx", DE),
         PAGE_FAULT: ("bad: mov eax, [0x20000000]", PF)}  # fmt: skip


@pytest.mark.spec("cpu.double_fault", "cpu.nested_exceptions")
@pytest.mark.tcg_differs("error codes of the IDT are 16 * vector in long mode: SDM vol. 3 6.13")
@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("second", [CONTRIBUTORY, PAGE_FAULT])
def test_second_exception_while_the_first_is_delivered(m: Machine, first: str, second: str) -> None:
    """SDM vol. 3 table 6-5."""
    source, vector = FIRST[first]
    m.asm(source, CODE)
    m.long64(CODE, 3)
    m.write(PD + 8 * 0x100, 0)
    for v in (DF, GP, PF, NP):
        m.set_gate(v, gate(CODE64, HANDLERS + 16 * v, ist=1))
    if second == CONTRIBUTORY:
        m.set_gate(vector, gate(CODE64, HANDLERS, 0x0E))  # not present: #NP
        expected = (NP, vector * 8 + 3)
    else:
        m.set_gate(vector, gate(CODE64, HANDLERS))
        m.write(TSS + 4, 0x2000_1000)
        expected = (PF, 2)
    double = (first, second) in {
        (CONTRIBUTORY, CONTRIBUTORY),
        (PAGE_FAULT, CONTRIBUTORY),
        (PAGE_FAULT, PAGE_FAULT),
    }
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(2)[0]) == ((DF, 0) if double else expected)
    assert m.frame(2)[1] == m.symbols["bad"]


@pytest.mark.spec("cpu.double_fault")
@pytest.mark.parametrize("second", [CONTRIBUTORY, PAGE_FAULT])
def test_anything_while_a_double_fault_is_delivered_is_a_triple_fault(m: Machine, second: str) -> None:
    m.asm("mov eax, [0x20000000]", CODE)
    m.long64(CODE, 3)
    m.write(PD + 8 * 0x100, 0)
    m.set_gate(PF, gate(CODE64, HANDLERS, 0x0E))
    m.set_gate(DF, gate(CODE64, HANDLERS, 0x8E if second == PAGE_FAULT else 0x0E))
    m.write(TSS + 4, 0x2000_1000)
    m.run(lib.EXIT_TRIPLE_FAULT)
    assert (m.guest.rip, m.reg("rsp"), m.cpl) == (CODE, STACK, 3)


@pytest.mark.spec("cpu.double_fault")
@pytest.mark.parametrize("mode", ["real", "prot32", "long64"])
def test_no_table_is_a_triple_fault(m: Machine, mode: str) -> None:
    m.asm("ud2", CODE, {"real": 16, "prot32": 32, "long64": 64}[mode])
    getattr(m, mode)(CODE)
    m.guest.idtr.limit = 0
    m.run(lib.EXIT_TRIPLE_FAULT)


@pytest.mark.spec("cpu.nested_exceptions", "cpu.if_window_extint")
def test_interrupt_whose_gate_faults_is_lost_and_the_guest_goes_on(m: Machine) -> None:
    """The handler of #PF makes the page of the IDT present; the code that was interrupted continues."""
    m.asm("nop; mov ebx, 7; hlt", CODE)
    m.long64(CODE)
    idt = 0x3FE000
    for vector in range(32):
        m.load(idt + 0x1000 + 16 * vector - 0x200, m.ram[IDT + 16 * vector : IDT + 16 * vector + 16])
    base = idt + 0x1000 - 0x200  # vectors from 32 on are in the next page
    m.guest.idtr.base = base
    m.load(idt + 0x1000, m.ram[IDT + 16 * 32 : IDT + 16 * 33])
    pages = 0x3FD000
    for k in range(512):
        m.write(pages + 8 * k, 0x200000 | k << 12 | 0x67)
    m.write(pages + 8 * 0x1FF, 0)
    m.write(PD + 8, pages | 0x27)
    m.load(base + 16 * PF, gate(CODE64, HANDLERS + 0x2000))
    m.asm(f"mov qword ptr [{pages + 8 * 0x1FF}], 0x3ff067; inc r15; add rsp, 8; iretq", HANDLERS + 0x2000)
    m.set(rflags=IF | 2)
    m.inject(32)
    m.run(lib.EXIT_HLT)
    assert (m.guest.rip, m.reg("rbx"), m.reg("r15")) == (CODE + 7, 7, 1)
    assert m.guest.cr2 == idt + 0x1000


# ---- which comes first

PRIORITIES = [
    # traps of the last instruction before faults of the next
    ("push 0x102; popfq; nop; ud2", DB),
    # the fetch before decoding
    ("jmp [0x500]", PF),
    # decoding before the operands
    (".byte 0xf0; mov eax, [0x20000000]", UD),
    (".byte 0x0f, 0xff; nop", UD),
    # not available before its operands
    ("mov rax, cr0; or al, 8; mov cr0, rax; fld dword ptr [0x20000000]", NM),
    ("mov rax, cr0; or al, 8; mov cr0, rax; movaps xmm0, [0x20000001]", NM),
    # undefined before not available
    ("mov rax, cr0; or al, 12; mov cr0, rax; movaps xmm0, xmm0", UD),
    # segments and canonical addresses before pages
    ("mov rbx, 0x800000000000; cmpxchg16b [rbx + 8]", GP),
    ("movaps xmm0, [0x20000001]", GP),
    # the operand before the operation
    ("xor eax, eax; div dword ptr [0x20000000]", PF),
    ("mov ds, [0x20000000]", PF),
    ("lidt [0x20000000]", PF),
    # both operands are read before the result
    ("push qword ptr [0x20000000]", PF),
]


@pytest.mark.spec("cpu.int_priority")
@pytest.mark.tcg_differs(
    "0F FF is no UD0, alignment and canonical addresses come later: SDM vol. 3 table 6-2"
)
@pytest.mark.parametrize(("source", "vector"), PRIORITIES, ids=[p[0] for p in PRIORITIES])
def test_priority(m: Machine, source: str, vector: int) -> None:
    m.asm(source, CODE)
    m.long64(CODE)
    m.write(PD + 8 * 0x100, 0)
    m.write(0x500, 0x20000000)
    m.run(lib.EXIT_HLT)
    assert m.vector() == vector


@pytest.mark.spec("cpu.int_priority", "cpu.cpl_rules")
@pytest.mark.tcg_differs("XSETBV is #GP before it is #UD: the SDM does not say; #UD is found first")
@pytest.mark.parametrize(
    ("source", "vector", "error"),
    [
        ("invlpg [0x20000000]", GP, 0),
        ("lidt [0x20000000]", GP, 0),
        ("lmsw [0x20000000]", GP, 0),
        ("lldt [0x20000000]", GP, 0),
        ("mov cr0, rax", GP, 0),
        ("in al, dx", GP, 0),
        ("rep insb", GP, 0),
        ("xsetbv", UD, None),  # OSXSAVE is clear
        ("clac", UD, None),
        ("vmcall; ud2", None, None),
    ],
)
def test_privilege_before_operands(m: Machine, source: str, vector: int | None, error: int | None) -> None:
    m.asm(f"bad: {source}", CODE)
    m.long64(CODE, 3)
    m.write(PD + 8 * 0x100, 0)
    m.set(rdi=0x20000000, rcx=1)
    reason = m.run()
    if vector is None:
        assert reason == lib.EXIT_VMCALL  # KVM decides about the level
        return
    assert m.vector() == vector
    if error is not None:
        assert m.frame(2) == [error, m.symbols["bad"]]


@pytest.mark.spec("cpu.int_priority")
def test_limit_of_cs_before_the_page(m: Machine) -> None:
    m.asm("nop", CODE + 0xFFF, 32)
    m.prot32(0xFFF)
    m.set_seg("cs", FREE_SELECTOR, CODE, 0xFFF, 0x409B)
    m.set_gdt(FREE_SELECTOR, descriptor(CODE, 0xFFF, 0x409B))
    m.unmap(CODE + 0x1000)
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(3)) == (GP, [0, 0x1000, FREE_SELECTOR])


@pytest.mark.spec("cpu.int_priority", "cpu.isa_int")
def test_too_long_instruction_before_its_missing_page(m: Machine) -> None:
    """15 prefixes at the end of a page: the 16th byte is not fetched."""
    m.load(CODE + 0x1000 - 15, b"\x66" * 15)
    m.long64(CODE + 0x1000 - 15)
    m.unmap(CODE + 0x1000)
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(2)) == (GP, [0, CODE + 0x1000 - 15])


@pytest.mark.spec("cpu.int_priority", "cpu.nmi_blocking", "cpu.if_window_extint")
def test_nmi_before_interrupts_and_both_before_breakpoints(m: Machine) -> None:
    m.asm("sti; nop; b: nop; hlt", CODE)
    m.long64(CODE)
    m.set(dr0=m.symbols["b"], dr7=0x402)
    m.ctl.flags |= lib.CPU_EXIT_IRQ_WINDOW | lib.CPU_EXIT_NMI_WINDOW
    m.run(lib.EXIT_NMI_WINDOW)
    assert m.guest.rip == CODE
    m.ctl.flags &= ~lib.CPU_EXIT_NMI_WINDOW & ALL_ONES
    m.run(lib.EXIT_IRQ_WINDOW)
    assert (m.guest.rip, m.guest.dr6 & 1) == (m.symbols["b"], 0)
    m.ctl.flags &= ~lib.CPU_EXIT_IRQ_WINDOW & ALL_ONES
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(1)) == (DB, [m.symbols["b"]])


@pytest.mark.spec("cpu.int_priority", "cpu.tf")
def test_trap_before_nmi_and_interrupt_windows(m: Machine) -> None:
    m.asm("nop; hlt", CODE)
    m.long64(CODE)
    m.set(rflags=TF | IF | 2)
    m.ctl.insn_budget = 1
    assert m.enter() == lib.EXIT_PREEMPTED
    assert m.guest.pending_dbg == lib.DR6_BS
    m.ctl.insn_budget = 0
    m.ctl.exception_bitmap = 1 << DB
    m.ctl.flags |= lib.CPU_EXIT_IRQ_WINDOW | lib.CPU_EXIT_NMI_WINDOW
    m.run(lib.EXIT_EXCEPTION)
    assert m.guest.rip == CODE + 1


@pytest.mark.spec("cpu.nmi_blocking", "cpu.nested_exceptions")
def test_fault_in_the_delivery_of_an_nmi_blocks_nmis_all_the_same(m: Machine) -> None:
    m.asm("nop; hlt", CODE)
    m.long64(CODE)
    m.set_gate(NMI, gate(CODE64, HANDLERS, 0x0E))
    m.inject(NMI, lib.CPU_EVENT_NMI)
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(1)) == (NP, [NMI * 8 + 3])
    assert m.guest.interruptibility & lib.CPU_BLOCK_NMI


@pytest.mark.spec("cpu.nmi_blocking")
@pytest.mark.parametrize("mode", ["real", "prot32"])
def test_any_iret_ends_nmi_blocking(m: Machine, mode: str) -> None:
    wide = mode == "prot32"
    m.asm("iretd" if wide else "iret", CODE, 32 if wide else 16)
    m.asm("hlt", CODE + 0x100)
    getattr(m, mode)(CODE)
    size = 4 if wide else 2
    for k, v in enumerate((CODE + 0x100 if wide else 0x100, CODE32 if wide else CODE >> 4, 2)):
        m.write(STACK + size * k, v, size)
    m.guest.interruptibility = lib.CPU_BLOCK_NMI
    m.run(lib.EXIT_HLT)
    assert (m.guest.rip & 0xFFF, m.guest.interruptibility) == (0x101, 0)


@pytest.mark.spec("cpu.nmi_blocking", "cpu.task_switch")
def test_iret_to_another_task_ends_nmi_blocking(m: Machine) -> None:
    m.asm("iretd", CODE, 32)
    m.asm("hlt", CODE + 0x100)
    m.prot32(CODE)
    m.set_gdt(FREE_SELECTOR, descriptor(0x7000, 0x67, 0x8B))
    regs = [0] * 4 + [0x6800] + [0] * 3
    for k, v in enumerate([0, CODE + 0x100, 2, *regs, DATA32, CODE32, DATA32, DATA32, 0, 0, 0]):
        m.write(0x7000 + 28 + 4 * k, v, 4)
    m.write(TSS, FREE_SELECTOR, 2)
    m.set(rflags=0x4002)
    m.guest.interruptibility = lib.CPU_BLOCK_NMI
    m.run(lib.EXIT_HLT)
    assert (m.guest.rip, m.guest.interruptibility) == (CODE + 0x101, 0)


@pytest.mark.spec("cpu.vectors", "cpu.idt_delivery")
@pytest.mark.tcg_differs("a non-canonical gate is entered: SDM vol. 2 INT n")
def test_delivery_order_of_checks(m: Machine) -> None:
    """The new stack is looked at before the new instruction pointer: SDM vol. 2 INT n."""
    m.asm("int 0x40", CODE)
    m.long64(CODE, 3)
    m.set_gate(0x40, gate(CODE64, NON_CANONICAL, 0xEE))
    m.write(TSS + 4, NON_CANONICAL)
    for v in (SS, GP):
        m.set_gate(v, gate(CODE64, HANDLERS + 16 * v, ist=1))
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(1)) == (SS, [0])
    m.long64(CODE, 3)
    m.set_gate(0x40, gate(CODE64, NON_CANONICAL, 0xEE))
    m.write(TSS + 4, STACK0)
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(1)) == (GP, [0])
