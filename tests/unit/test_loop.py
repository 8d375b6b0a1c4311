"""The main loop: counting, preemption, requests, traps, shadows, windows, breakpoints, refused entries.

Source: SDM vol. 3 6.9 and table 6-2, 6.8.3, 17.2 and 17.3, 26.3.1; vol. 2 STI, MOV, POP.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest

from pykvm.abi import ffi, lib
from tests.guest.bare import CODE, CODE64, HANDLERS, PD, STACK, Machine, gate

if TYPE_CHECKING:
    from collections.abc import Callable

IF, TF, RF = 0x200, 0x100, 0x10000
DB, NMI, UD, GP = 1, 2, 6, 13
BS = 0x4000
STI, MOVSS, BLOCK_NMI = 1, 2, 8


@pytest.fixture
def m() -> Machine:
    return Machine()


def long64(m: Machine, source: str, cpl: int = 0) -> None:
    m.asm(source, CODE)
    m.long64(CODE, cpl)


def insns(m: Machine) -> int:
    return int(lib.cpu_vmcs(m.cpu).stats.insns)


# ---- counting


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("nop; nop; hlt", 3),
        ("mov ecx, 1000; l: dec ecx; jnz l; hlt", 2002),
        ("call f; hlt; f: ret", 3),
        ("mov ecx, 100; lea rdi, [0x20000]; rep stosb; hlt", 4),
        ("mov ecx, 20000; lea rdi, [0x20000]; lea rsi, [0x28000]; rep movsb; hlt", 5),
        ("int3; hlt", 2),  # the HLT of the handler
        ("nop; ud2; hlt", 2),
        ("sti; nop; hlt", 3),
        ("mov ax, ss; mov ss, ax; nop; hlt", 4),
        ("l: cmp byte ptr [l2 + 1], 9; l2: mov al, 1; mov byte ptr [l2 + 1], 9; jne l; hlt", 9),
    ],
)
def test_instructions_are_counted(m: Machine, source: str, count: int) -> None:
    long64(m, source)
    before = insns(m)
    m.run(lib.EXIT_HLT)
    assert insns(m) - before == count


def test_uncommitted_instruction_is_not_counted(m: Machine) -> None:
    long64(m, "nop; mov eax, [0x3ff000]; hlt")
    m.unmap(0x3FF000)
    before = insns(m)
    m.run(lib.EXIT_EPT_VIOLATION)
    assert insns(m) - before == 1
    m.map(0x3FF000)
    m.run(lib.EXIT_HLT)
    assert insns(m) - before == 3


# ---- preemption and requests


def test_insn_budget(m: Machine) -> None:
    long64(m, "l: inc rax; jmp l")
    m.ctl.insn_budget = 1000
    for _ in range(5):
        before = insns(m)
        assert lib.cpu_enter(m.cpu) == lib.EXIT_PREEMPTED
        assert 1000 <= insns(m) - before < 1000 + 64


def test_deadline(m: Machine) -> None:
    long64(m, "l: jmp l")
    start = time.perf_counter()
    assert lib.cpu_enter(m.cpu) == lib.EXIT_PREEMPTED
    assert 0.002 < time.perf_counter() - start < 0.5
    m.ctl.deadline = lib.host_tsc()
    start = time.perf_counter()
    assert lib.cpu_enter(m.cpu) == lib.EXIT_PREEMPTED
    assert time.perf_counter() - start < 0.005


def test_long_repetition_is_preempted(m: Machine) -> None:
    """It retires nothing for as long as it lasts; the registers say how far it got."""
    long64(m, "rep lodsb; hlt")
    m.set(rcx=1 << 40, rsi=0x20000)
    m.write(PD + 8, 0x87)
    m.ctl.deadline = lib.host_tsc() + 3_000_000
    before = insns(m)
    assert lib.cpu_enter(m.cpu) in {lib.EXIT_PREEMPTED, lib.EXIT_EPT_VIOLATION}
    assert m.reg("rcx") + m.reg("rsi") == (1 << 40) + 0x20000
    assert m.guest.rip == CODE
    assert insns(m) == before


def test_guest_that_only_faults_is_preempted(m: Machine) -> None:
    """UD2 with a handler that is another UD2 retires nothing at all."""
    m.real(CODE)
    m.load(CODE, b"\x0f\x0b")
    m.write(4 * UD, (CODE >> 4) << 16, 4)
    assert lib.cpu_enter(m.cpu) == lib.EXIT_PREEMPTED


def run_thread(m: Machine) -> tuple[threading.Thread, list[int]]:
    m.ctl.deadline = 2**64 - 1
    result: list[int] = []
    thread = threading.Thread(target=lambda: result.append(int(lib.cpu_enter(m.cpu))))
    thread.start()
    while not lib.cpu_in_guest(m.cpu):
        time.sleep(0)
    return thread, result


def kick(m: Machine, thread: threading.Thread) -> None:
    lib.cpu_request(m.cpu, lib.CPU_REQ_KICK)
    thread.join(5)
    assert not thread.is_alive()


@pytest.mark.parametrize("source", ["l: jmp l", "l: call f; jmp l; f: ret", "l: jmp rax"])
def test_kick(m: Machine, source: str) -> None:
    long64(m, source)
    m.set(rax=CODE)
    thread, result = run_thread(m)
    kick(m, thread)
    assert result == [lib.EXIT_KICK]
    assert lib.cpu_enter(m.cpu) == lib.EXIT_KICK  # it stays
    lib.cpu_clear_kick(m.cpu)
    m.ctl.insn_budget = 10
    assert lib.cpu_enter(m.cpu) == lib.EXIT_PREEMPTED


def test_flush_requests_are_done_and_acknowledged(m: Machine) -> None:
    """A page remapped under a running guest is the new one when cpu_sync() returns."""
    long64(m, "l: mov eax, [0x200000]; mov [0x20000], eax; jmp l")
    m.write(0x200000, 1, 4)
    m.write(0x300000, 2, 4)
    thread, _ = run_thread(m)
    try:
        while m.read(0x20000, 4) != 1:
            time.sleep(0)
        slot = m._slot(0x200000)
        for target in (0x300000, 0x200000) * 200:
            lib.spte_xchg(slot, (m.hva + target) | lib.SPTE_RWX)
            lib.cpu_request(m.cpu, lib.CPU_REQ_FLUSH_TLB)
            lib.cpu_sync(m.cpu)
            m.ram[0x20000:0x20004] = b"\xff" * 4
            value = 0xFFFFFFFF
            while value == 0xFFFFFFFF:
                value = m.read(0x20000, 4)
            assert value == (1 if target == 0x200000 else 2)
    finally:
        kick(m, thread)


@pytest.mark.spec("cpu.smc")
def test_flush_code_request(m: Machine) -> None:
    """Code written by another thread is executed once the request is acknowledged."""
    long64(m, "l: mov eax, 1; mov [0x20000], eax; jmp l")
    thread, _ = run_thread(m)
    try:
        for n in range(2, 50):
            m.ram[CODE + 1] = n
            lib.cpu_request(m.cpu, lib.CPU_REQ_FLUSH_CODE)
            lib.cpu_sync(m.cpu)
            m.ram[0x20000] = 0
            while not m.ram[0x20000]:
                pass
            assert m.ram[0x20000] == n
    finally:
        kick(m, thread)


# ---- single step


def trace_db(m: Machine, source: str, setup: Callable[[], None] = lambda: None, bits: int = 64) -> list[int]:
    """Where #DB trapped, relative to CODE, while the guest ran `source` to its HLT."""
    m.asm(source, CODE, bits=bits)
    if bits == 64:
        m.long64(CODE)
    else:
        m.prot32(CODE)
    setup()
    m.ctl.exception_bitmap = 1 << DB
    trapped: list[int] = []
    while len(trapped) < 20 and m.run() == lib.EXIT_EXCEPTION:
        assert m.exit.intr_info & 0xFF == DB
        m.guest.dr6 |= m.exit.qualification
        trapped.append(int(m.guest.rip) - CODE)
    return trapped


@pytest.mark.spec("cpu.tf")
def test_trap_after_every_instruction(m: Machine) -> None:
    where = trace_db(m, "nop; mov eax, 1; jmp 1f; 1: call f; hlt; f: ret", lambda: m.set(rflags=TF | 2))
    # HLT traps too, but only when it is woken
    assert where == [1, 6, 8, 14, 13]
    assert m.guest.dr6 & BS


@pytest.mark.spec("cpu.tf")
def test_delivered_single_step(m: Machine) -> None:
    """Through the IDT, with the frame a trap has, and TF off in the handler."""
    m.asm("inc rbx; bts qword ptr [rsp + 16], 0; iretq", HANDLERS + 0x2000)
    m.asm(
        "pushfq; or dword ptr [rsp], 0x100; popfq; nop; nop; pushfq; pop rax;"
        "and dword ptr [rsp - 8], -0x101; push qword ptr [rsp - 8]; popfq; nop; hlt",
        CODE,
    )
    m.long64(CODE)
    m.set_gate(DB, gate(CODE64, HANDLERS + 0x2000))
    m.run(lib.EXIT_HLT)
    # nop nop pushfq pop and push popfq
    assert m.reg("rbx") == 7
    assert m.reg("rax") & TF
    assert m.guest.dr6 & BS


@pytest.mark.spec("cpu.tf")
def test_popf_and_iret_start_with_the_next_instruction(m: Machine) -> None:
    assert trace_db(m, "push 0x102; popfq; nop; nop; push 2; popfq; nop; hlt") == [7, 8, 10, 11]
    source = (
        f"push 0x10; push {STACK}; push 0x102; push {CODE64}; lea rax, [l]; push rax; iretq; l: nop; nop; hlt"
    )
    where = trace_db(m, source)
    first = m.symbols["l"] + 1 - CODE
    assert where == [first, first + 1]


@pytest.mark.spec("cpu.tf", "cpu.string_rep")
def test_trap_after_every_iteration(m: Machine) -> None:
    where = trace_db(m, "rep stosb; hlt", lambda: m.set(rflags=TF | 2, rcx=3, rdi=0x20000))
    assert where == [0, 0, 2]
    assert m.read(0x20000, 4) == 0


@pytest.mark.spec("cpu.tf")
def test_exits_trap_when_skipped(m: Machine) -> None:
    long64(m, "cpuid; hlt")
    m.ctl.exception_bitmap = 1 << DB
    m.set(rflags=TF | 2)
    m.run(lib.EXIT_CPUID)
    m.skip()
    m.run(lib.EXIT_EXCEPTION)
    assert m.guest.rip == CODE + 2


@pytest.mark.spec("cpu.tf", "cpu.soft_int")
def test_int_n_does_not_trap(m: Machine) -> None:
    """It clears TF; SYSCALL traps when SFMASK leaves TF alone."""
    assert trace_db(m, "int 0x80; hlt", lambda: m.set(rflags=TF | 2)) == []
    assert m.vector() == 0x80

    def syscall(mask: int) -> list[int]:
        return trace_db(
            m,
            "syscall; nop; t: hlt",
            lambda: m.set(rflags=TF | 2, lstar=CODE + 2, star=0x10 << 32, sfmask=mask),
        )

    m.ctl.efer_valid = 0xD01
    assert syscall(TF) == []
    assert syscall(0) == [2, 3]


@pytest.mark.spec("cpu.movss_shadow", "cpu.tf")
def test_mov_ss_holds_the_trap_back(m: Machine) -> None:
    where = trace_db(m, "mov ss, eax; nop; nop; hlt", lambda: m.set(rflags=TF | 2, rax=0x10), bits=32)
    assert where == [3, 4]
    where = trace_db(m, "push 0x10; pop ss; nop; nop; hlt", lambda: m.set(rflags=TF | 2), bits=32)
    assert where == [2, 4, 5]


def test_trap_flag_and_fault(m: Machine) -> None:
    """The fault wins: its handler runs with TF clear, and nothing is pending."""
    assert trace_db(m, "nop; ud2", lambda: m.set(rflags=TF | 2)) == [1]
    assert m.vector() == UD
    assert m.frame(3)[2] & (TF | RF) == TF | RF
    assert m.guest.pending_dbg == 0


# ---- shadows and windows


@pytest.mark.spec("cpu.sti_shadow", "cpu.if_window_extint")
def test_interrupt_window_after_sti(m: Machine) -> None:
    long64(m, "nop; sti; nop; nop; hlt")
    m.ctl.flags |= lib.CPU_EXIT_IRQ_WINDOW
    m.run(lib.EXIT_IRQ_WINDOW)
    assert m.guest.rip == CODE + 3
    assert m.guest.interruptibility & (STI | MOVSS) == 0


@pytest.mark.spec("cpu.sti_shadow")
def test_sti_has_no_shadow_when_if_was_set(m: Machine) -> None:
    long64(m, "sti; nop; nop; hlt")
    m.set(rflags=IF | 2)
    m.ctl.flags |= lib.CPU_EXIT_IRQ_WINDOW
    m.run(lib.EXIT_IRQ_WINDOW)
    assert m.guest.rip == CODE
    m.ctl.flags &= ~lib.CPU_EXIT_IRQ_WINDOW & 0xFFFFFFFF
    m.ctl.insn_budget = 1
    assert lib.cpu_enter(m.cpu) == lib.EXIT_PREEMPTED
    assert m.guest.interruptibility & STI == 0


@pytest.mark.spec("cpu.sti_shadow", "cpu.hlt")
def test_sti_hlt(m: Machine) -> None:
    """The window opens behind the HLT: the HLT exit comes first."""
    long64(m, "sti; hlt; nop")
    m.ctl.flags |= lib.CPU_EXIT_IRQ_WINDOW
    m.run(lib.EXIT_HLT)
    assert m.guest.rip == CODE + 2
    m.run(lib.EXIT_IRQ_WINDOW)


@pytest.mark.spec("cpu.movss_shadow")
def test_interrupt_window_after_mov_ss(m: Machine) -> None:
    m.asm("mov ss, eax; nop; nop; hlt", CODE, bits=32)
    m.prot32(CODE)
    m.set(rax=0x10, rflags=2)
    m.ctl.insn_budget = 1
    assert lib.cpu_enter(m.cpu) == lib.EXIT_PREEMPTED
    assert m.guest.interruptibility & MOVSS
    m.ctl.insn_budget = 0
    m.set(rflags=IF | 2)
    m.ctl.flags |= lib.CPU_EXIT_IRQ_WINDOW | lib.CPU_EXIT_NMI_WINDOW
    m.run(lib.EXIT_NMI_WINDOW)
    assert m.guest.rip == CODE + 3


@pytest.mark.spec("cpu.movss_shadow")
def test_shadow_survives_an_exit_and_ends_with_a_fault(m: Machine) -> None:
    long64(m, "sti; mov eax, [0x3ff000]; hlt")
    m.unmap(0x3FF000)
    m.run(lib.EXIT_EPT_VIOLATION)
    assert m.guest.interruptibility & STI
    m.map(0x3FF000)
    m.ctl.flags |= lib.CPU_EXIT_IRQ_WINDOW
    m.run(lib.EXIT_IRQ_WINDOW)
    long64(m, "sti; ud2")
    m.ctl.flags &= ~lib.CPU_EXIT_IRQ_WINDOW & 0xFFFFFFFF
    m.run(lib.EXIT_HLT)
    assert m.vector() == UD
    assert m.guest.interruptibility & STI == 0


@pytest.mark.spec("cpu.if_window_extint")
def test_interrupt_window_by_popf_and_iret(m: Machine) -> None:
    long64(m, "push 0x202; popfq; nop; hlt")
    m.ctl.flags |= lib.CPU_EXIT_IRQ_WINDOW
    m.run(lib.EXIT_IRQ_WINDOW)
    assert m.guest.rip == CODE + 6


@pytest.mark.spec("cpu.nmi_blocking")
def test_nmi_window(m: Machine) -> None:
    """Opened by IRET."""
    m.asm("nop; iretq", HANDLERS + 0x2000)
    long64(m, "nop; nop; hlt")
    m.set_gate(NMI, gate(CODE64, HANDLERS + 0x2000))
    m.inject(NMI, lib.CPU_EVENT_NMI)
    m.ctl.flags |= lib.CPU_EXIT_NMI_WINDOW
    m.run(lib.EXIT_NMI_WINDOW)
    assert m.guest.rip == CODE
    assert m.guest.interruptibility & BLOCK_NMI == 0


# ---- monitor trap


def test_monitor_trap(m: Machine) -> None:
    long64(m, "nop; add eax, 5; jmp 1f; nop; 1: ud2")
    m.ctl.flags |= lib.CPU_SINGLE_STEP
    where = []
    for _ in range(4):
        m.run(lib.EXIT_MTF)
        where.append(int(m.guest.rip))
    assert where == [CODE + 1, CODE + 4, CODE + 7, HANDLERS + 16 * UD]
    m.run(lib.EXIT_HLT)


def test_monitor_trap_after_an_injected_event(m: Machine) -> None:
    long64(m, "nop; hlt")
    m.ctl.flags |= lib.CPU_SINGLE_STEP
    m.inject(0x40)
    m.run(lib.EXIT_MTF)
    assert m.guest.rip == HANDLERS + 0x400


# ---- instruction breakpoints


def breakpoints(m: Machine, dr7: int, *labels: str) -> None:
    for n, label in enumerate(labels):
        m.guest.dr[n] = m.symbols[label]
    m.set(dr7=dr7 | 0x400)


@pytest.mark.spec("cpu.dr_breakpoints")
def test_instruction_breakpoint(m: Machine) -> None:
    """A fault, before the instruction; RF lets it pass once."""
    where = trace_db(m, "nop; a: nop; b: nop; hlt", lambda: breakpoints(m, 0x1, "a", "b"))
    assert where == [1] * 20  # nobody sets RF


@pytest.mark.spec("cpu.dr_breakpoints")
def test_resume_flag(m: Machine) -> None:
    long64(m, "mov ecx, 3; l: nop; b: inc eax; loop l; hlt")
    breakpoints(m, 0x3 | 0xC, "l", "b")
    m.ctl.exception_bitmap = 1 << DB
    hits = []
    while m.run() == lib.EXIT_EXCEPTION:
        hits.append((int(m.guest.rip) - CODE, int(m.exit.qualification) & 0xF))
        m.set(rflags=m.guest.rflags | RF)
    assert hits == [(5, 1), (6, 2)] * 3
    assert m.reg("rax") == 3


@pytest.mark.spec("cpu.dr_breakpoints")
def test_delivered_breakpoint_and_iret_with_rf(m: Machine) -> None:
    m.asm("inc rbx; or dword ptr [rsp + 16], 0x10000; iretq", HANDLERS + 0x2000)
    long64(m, "mov ecx, 5; l: nop; loop l; hlt")
    m.set_gate(DB, gate(CODE64, HANDLERS + 0x2000))
    breakpoints(m, 2, "l")
    m.run(lib.EXIT_HLT)
    assert m.reg("rbx") == 5
    assert m.guest.dr6 & 0xF == 1
    assert m.guest.rflags & RF == 0


@pytest.mark.spec("cpu.dr_breakpoints")
def test_breakpoints_that_are_not_for_instructions(m: Machine) -> None:
    assert trace_db(m, "a: nop; hlt", lambda: breakpoints(m, 0x1 | 1 << 16, "a")) == []
    assert trace_db(m, "a: nop; hlt", lambda: breakpoints(m, 0x4, "a")) == []


@pytest.mark.spec("cpu.dr_breakpoints")
def test_breakpoint_set_by_the_guest(m: Machine) -> None:
    """Effective at once, in blocks that are decoded and linked already."""
    where = trace_db(
        m,
        "mov ecx, 100; l: nop; loop l; lea rax, [b]; mov dr0, rax; mov eax, 0x401; mov dr7, rax; b: nop; hlt",
    )
    assert where == [m.symbols["b"] - CODE] * 20


@pytest.mark.spec("cpu.dr_breakpoints")
def test_data_breakpoints(m: Machine) -> None:
    """Traps behind the instruction; in code that has been running at full speed."""
    warm = "mov ecx, 50; l: mov [0x20000], ecx; mov eax, [0x20004]; loop l"
    enable = f"mov eax, 0x20004; mov dr1, rax; mov eax, {0x400 | 8 | 0xF << 20:#x}; mov dr7, rax"
    use = "mov [0x20000], eax; mov [0x20006], al; b: mov al, [0x20004]; c: hlt"
    where = trace_db(m, f"{warm}; {enable}; {use}")
    assert where == [m.symbols["b"] - CODE, m.symbols["c"] - CODE]
    assert m.guest.dr6 & 0xF == 2


# ---- entries


@pytest.mark.parametrize(
    "change",
    [
        {"cr0": 0x80000010},
        {"efer": 0x900 | 0x400, "cr0": 0x11},
        {"efer": 0x100},
        {"cr4": 0},
        {"rflags": 0},
        {"rflags": 0x8002},
        {"rflags": 0x20002},
        {"rip": 1 << 47},
    ],
)
def test_states_no_processor_can_hold(m: Machine, change: dict[str, int]) -> None:
    long64(m, "hlt")
    m.set(**change)
    assert lib.cpu_enter(m.cpu) == lib.EXIT_INVALID_STATE
    assert m.exit.qualification


def test_code_segment_with_l_and_d(m: Machine) -> None:
    long64(m, "hlt")
    m.seg("cs").ar |= lib.CPU_AR_DB
    assert lib.cpu_enter(m.cpu) == lib.EXIT_INVALID_STATE


def test_exit_tells_the_instruction(m: Machine) -> None:
    long64(m, "nop; mov byte ptr [0x3ff000 + rax], 0x12; hlt")
    m.unmap(0x3FF000)
    m.run(lib.EXIT_EPT_VIOLATION)
    assert m.exit.insn_len == 7
    assert bytes(ffi.buffer(m.exit.insn, m.exit.insn_bytes)) == bytes.fromhex("c68000f03f0012")


def test_status_flags_cross_the_border(m: Machine) -> None:
    long64(m, "hlt; pushfq; pop rax; hlt")
    for status in (0x8D5, 0, 0x41, 0x884, 0x10, 0x80, 0x800):
        m.set(rip=CODE, rflags=status | 2)
        m.run(lib.EXIT_HLT)
        assert m.guest.rflags == status | 2
        m.run(lib.EXIT_HLT)
        assert m.reg("rax") == status | 2
