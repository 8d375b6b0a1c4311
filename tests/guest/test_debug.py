"""Debug exceptions at instruction boundaries: what meets them, what holds them back, and in which order.

Source: SDM vol. 3 17.2 and 17.3, 6.8.3, table 6-2; x86-cpu.md section 4.
"""

from __future__ import annotations

import pytest

from pykvm.abi import lib
from tests.guest.bare import CODE, CODE64, DATA32, HANDLERS, PD, STACK, Machine, gate

DB, NMI, BP, UD, GP, PF = 1, 2, 3, 6, 13, 14
IF, TF, RF = 0x200, 0x100, 0x10000
BS = lib.DR6_BS
LOG = 0x20000  # r15 points here: rip, flags, DR6 of each #DB
SRC, DST, PORT = 0x100000, 0x180000, 0x3F8
EXECUTE, WRITE, IO, ACCESS = 0, 1, 2, 3
LEN1, LEN2, LEN8, LEN4 = 0, 1, 2, 3


@pytest.fixture
def m() -> Machine:
    return Machine()


def start(m: Machine, source: str, cpl: int = 0, **registers: int) -> None:
    """64-bit code, and a #DB handler that logs, clears DR6 and sets RF."""
    m.asm(source, CODE)
    m.asm(
        "push rax; mov rax, [rsp + 8]; mov [r15], rax; mov rax, [rsp + 24]; mov [r15 + 8], rax;"
        "mov rax, dr6; mov [r15 + 16], rax; xor eax, eax; mov dr6, rax; add r15, 24;"
        "or dword ptr [rsp + 24], 0x10000; pop rax; iretq",
        HANDLERS + 0x2000,
    )
    m.long64(CODE, cpl)
    m.set_gate(DB, gate(CODE64, HANDLERS + 0x2000))
    m.set(r15=LOG, **registers)


def breakpoint_at(m: Machine, address: int, kind: int = EXECUTE, length: int = LEN1, n: int = 0) -> None:
    m.guest.dr[n] = address
    m.set(dr7=m.guest.dr7 | 2 << 2 * n | kind << 16 + 4 * n | length << 18 + 4 * n)


def log(m: Machine) -> list[tuple[int, bool, int]]:
    """(rip from CODE, was RF pushed, active bits of DR6) of every #DB."""
    count, rest = divmod(m.reg("r15") - LOG, 24)
    assert rest == 0
    entries = [[m.read(LOG + 24 * k + 8 * n) for n in range(3)] for k in range(count)]
    return [(rip - CODE, bool(flags & RF), dr6 ^ 0xFFFF0FF0) for rip, flags, dr6 in entries]


def serve_io(m: Machine) -> list[tuple[int, int, bool]]:
    """Run to the HLT; what was at ports: (port, size, is an input).  Inputs get 0x11, 0x22, ..."""
    seen: list[tuple[int, int, bool]] = []
    while (reason := m.run()) == lib.EXIT_IO:
        io = m.exit.io
        inward = bool(getattr(io, "in"))
        seen.append((io.port, io.size, inward))
        if inward:
            for k in range(io.count * io.size):
                m.ctl.pio_data[k] = 0x11
            m.ctl.pio_pos, m.ctl.pio_count = 0, io.count
        elif not io.string:
            m.ctl.pio_out_done = 1
    assert reason == lib.EXIT_HLT
    return seen


# ---- I/O breakpoints


@pytest.mark.spec("cpu.dr_breakpoints")
@pytest.mark.parametrize(
    ("access", "address", "length", "hit"),
    [
        ("out dx, al", PORT, LEN1, True),
        ("in al, dx", PORT, LEN1, True),
        ("out dx, eax", PORT + 3, LEN1, True),
        ("out dx, eax", PORT + 4, LEN1, False),
        ("in ax, dx", PORT + 3, LEN4, True),  # the breakpoint is aligned to its length
        ("in ax, dx", PORT - 1, LEN4, False),
        ("in ax, dx", PORT - 1, LEN2, False),
        ("out 0x80, al", 0x80, LEN1, True),
        ("out 0x80, al", 0x10080, LEN1, True),  # ports have 16 bits
    ],
)
def test_io_breakpoint_traps_behind_the_access(
    m: Machine, access: str, address: int, length: int, hit: bool
) -> None:
    start(m, f"{access}; b: nop; hlt", rdx=PORT, cr4=lib.X86_CR4_PAE | lib.X86_CR4_DE)
    breakpoint_at(m, address, IO, length, n=2)
    assert len(serve_io(m)) == 1
    assert log(m) == ([(m.symbols["b"] - CODE, False, lib.DR6_B2)] if hit else [])


@pytest.mark.spec("cpu.dr_breakpoints")
def test_io_breakpoints_need_cr4_de(m: Machine) -> None:
    start(m, "out dx, al; hlt", rdx=PORT)
    breakpoint_at(m, PORT, IO)
    serve_io(m)
    assert log(m) == []


@pytest.mark.spec("cpu.dr_breakpoints", "cpu.string_io")
@pytest.mark.parametrize("access", ["rep outsb", "rep insb"])
def test_io_breakpoint_of_a_repetition_traps_after_each_iteration(m: Machine, access: str) -> None:
    start(m, f"a: {access}; b: hlt", rdx=PORT, rcx=3, rsi=SRC, rdi=DST, cr4=lib.X86_CR4_PAE | lib.X86_CR4_DE)
    breakpoint_at(m, PORT, IO)
    serve_io(m)
    assert [dr6 for _, _, dr6 in log(m)] == [lib.DR6_B0] * 3
    assert [rip for rip, _, _ in log(m)][:2] == [0, 0]
    assert m.reg("rcx") == 0


@pytest.mark.spec("cpu.dr_breakpoints", "cpu.cpl_rules")
def test_permission_is_checked_before_io_breakpoints(m: Machine) -> None:
    start(m, "out dx, al", 3, rdx=PORT, cr4=lib.X86_CR4_PAE | lib.X86_CR4_DE)
    breakpoint_at(m, PORT, IO)
    m.run(lib.EXIT_HLT)
    assert (m.vector(), log(m), m.guest.pending_dbg) == (GP, [], 0)


# ---- repetitions and RF


@pytest.mark.spec("cpu.dr_breakpoints", "cpu.string_rep")
@pytest.mark.tcg_differs("met at every iteration: SDM vol. 3 17.3.1.1")
def test_instruction_breakpoint_on_a_repetition_is_met_once(m: Machine) -> None:
    """The handler sets RF, which lasts until the instruction is through: SDM vol. 3 17.3.1.1."""
    start(m, "nop; b: rep movsb; hlt", rcx=5, rsi=SRC, rdi=DST)
    breakpoint_at(m, m.symbols["b"])
    m.run(lib.EXIT_HLT)
    assert log(m) == [(1, False, lib.DR6_B0)]
    assert m.reg("rcx") == 0
    assert m.guest.rflags & RF == 0


@pytest.mark.spec("cpu.tf", "cpu.string_rep")
def test_trap_between_iterations_pushes_rf(m: Machine) -> None:
    start(m, "rep movsb; nop; hlt", rcx=3, rsi=SRC, rdi=DST, rflags=TF | 2)
    m.run(lib.EXIT_HLT)
    assert log(m) == [(0, True, BS), (0, True, BS), (2, False, BS), (3, False, BS)]


@pytest.mark.spec("cpu.string_rep", "cpu.if_window_extint")
def test_interrupt_between_iterations_pushes_rf(m: Machine) -> None:
    start(m, "std; rep stosb; hlt", rdi=SRC + 0xFFFFF, rcx=0x100000)
    m.asm("mov rbx, [rsp + 16]; iretq", HANDLERS + 16 * 0x20)
    m.ctl.deadline = lib.host_tsc() + 20_000
    assert m.enter() == lib.EXIT_PREEMPTED
    assert 0 < m.reg("rcx") < 0x100000
    m.set(rflags=m.guest.rflags | IF)
    m.inject(0x20)
    m.run(lib.EXIT_HLT)
    assert m.reg("rbx") & (RF | IF) == RF | IF
    start(m, "nop; hlt")
    m.set(rflags=IF | 2)
    m.inject(0x20)
    m.run(lib.EXIT_HLT)
    assert m.reg("rbx") & RF == 0


@pytest.mark.spec("cpu.dr_breakpoints", "cpu.string_rep")
def test_data_breakpoint_of_a_repetition_traps_after_its_iteration(m: Machine) -> None:
    start(m, "rep movsb; hlt", rcx=5, rsi=SRC, rdi=DST)
    breakpoint_at(m, DST + 2, WRITE, n=3)
    m.run(lib.EXIT_HLT)
    assert log(m) == [(0, True, lib.DR6_B3)]
    assert m.reg("rcx") == 0


# ---- RF in pushed flags


@pytest.mark.spec("cpu.idt_delivery", "cpu.dr_breakpoints")
@pytest.mark.tcg_differs("INT n pushes the RF it began with: SDM vol. 3 17.3.1.1")
def test_rf_ends_with_the_next_instruction(m: Machine) -> None:
    start(m, "nop; pushfq; pop rbx; hlt", rflags=RF | 2)
    m.run(lib.EXIT_HLT)
    assert m.reg("rbx") == 2
    start(m, "nop; ud2", rflags=RF | 2)
    m.run(lib.EXIT_HLT)
    assert m.frame(3)[2] == RF | 2  # of the fault
    start(m, "int 0x40", rflags=RF | 2)
    m.run(lib.EXIT_HLT)
    assert m.frame(3)[2] == 2  # a trap: after the instruction


# ---- MOV SS, STI


@pytest.mark.spec("cpu.movss_shadow", "cpu.dr_breakpoints")
@pytest.mark.tcg_differs("met there: SDM vol. 3 6.8.3")
def test_no_instruction_breakpoint_behind_mov_ss(m: Machine) -> None:
    """As Intel's processors do (x86.c kvm_is_code_breakpoint_inhibited); the SDM says "may not"."""
    start(m, "mov ss, eax; b: nop; c: nop; hlt", rax=DATA32)
    breakpoint_at(m, m.symbols["b"])
    breakpoint_at(m, m.symbols["c"], n=1)
    m.run(lib.EXIT_HLT)
    assert log(m) == [(m.symbols["c"] - CODE, False, lib.DR6_B1)]


@pytest.mark.spec("cpu.movss_shadow", "cpu.dr_breakpoints")
def test_data_breakpoint_of_mov_ss_waits_for_the_next_instruction(m: Machine) -> None:
    start(m, "mov ss, [rbx]; nop; b: nop; hlt", rbx=DST)
    m.write(DST, DATA32, 2)
    breakpoint_at(m, DST, ACCESS, LEN2)
    m.run(lib.EXIT_HLT)
    assert log(m) == [(m.symbols["b"] - CODE, False, lib.DR6_B0)]


@pytest.mark.spec("cpu.movss_shadow", "cpu.soft_int")
@pytest.mark.tcg_differs("it traps before the INT: SDM vol. 3 6.8.3")
def test_data_breakpoint_of_mov_ss_before_int_traps_in_the_handler(m: Machine) -> None:
    """What CVE-2018-8897 was about: SDM vol. 3 6.8.3."""
    start(m, "mov ss, [rbx]; int 0x40", rbx=DST)
    m.asm("here: nop; hlt", HANDLERS + 16 * 0x40)
    m.write(DST, DATA32, 2)
    breakpoint_at(m, DST, ACCESS, LEN2)
    m.run(lib.EXIT_HLT)
    assert log(m) == [(m.symbols["here"] - CODE, False, lib.DR6_B0)]


@pytest.mark.spec("cpu.sti_shadow", "cpu.tf")
@pytest.mark.tcg_differs("STI holds traps back as MOV SS does: SDM vol. 2 STI")
def test_sti_holds_no_trap_back(m: Machine) -> None:
    start(m, "sti; nop; hlt", rflags=TF | 2)
    m.run(lib.EXIT_HLT)
    assert [rip for rip, _, _ in log(m)] == [1, 2]


# ---- several at once


@pytest.mark.spec("cpu.dr_breakpoints", "cpu.tf")
@pytest.mark.tcg_differs("two exceptions: SDM vol. 3 17.3.1.2")
def test_all_that_hit_come_in_one_exception(m: Machine) -> None:
    start(m, "mov [rbx], eax; nop; hlt", rbx=DST, rflags=TF | 2)
    breakpoint_at(m, DST, WRITE, LEN4, n=0)
    breakpoint_at(m, DST + 2, ACCESS, LEN1, n=1)
    breakpoint_at(m, DST + 4, ACCESS, LEN1, n=2)
    m.run(lib.EXIT_HLT)
    assert log(m)[0] == (2, False, BS | lib.DR6_B0 | lib.DR6_B1)


@pytest.mark.spec("cpu.dr_breakpoints")
@pytest.mark.tcg_differs("B1 of the next instruction: SDM vol. 3 table 6-2")
def test_trap_comes_before_the_breakpoint_of_the_next_instruction(m: Machine) -> None:
    start(m, "mov [rbx], eax; b: nop; hlt", rbx=DST)
    breakpoint_at(m, DST, WRITE, LEN4)
    breakpoint_at(m, m.symbols["b"], n=1)
    m.run(lib.EXIT_HLT)
    # RF of the trap's handler lets the breakpoint pass
    assert log(m) == [(2, False, lib.DR6_B0)]


@pytest.mark.spec("cpu.dr_breakpoints")
def test_dr6_keeps_what_nobody_cleared(m: Machine) -> None:
    """B0 to B3 are of the last exception, the others accumulate."""
    start(m, "mov [rbx], eax; hlt", rbx=DST)
    m.set_gate(DB, gate(CODE64, HANDLERS + 16 * DB))
    m.set(dr6=0xFFFF0FF0 | lib.DR6_B3 | BS)
    breakpoint_at(m, DST, WRITE, LEN4)
    m.run(lib.EXIT_HLT)
    assert m.guest.dr6 == 0xFFFF0FF0 | BS | lib.DR6_B0


# ---- data breakpoints: what counts as an access


@pytest.mark.spec("cpu.dr_breakpoints")
@pytest.mark.tcg_differs("XSTATE_BV: the x87 state at the start is not ours")
@pytest.mark.parametrize(
    ("access", "kind", "hit"),
    [
        ("mov al, [rbx]", WRITE, False),
        ("mov al, [rbx]", ACCESS, True),
        ("mov [rbx], al", WRITE, True),
        ("add [rbx], al", WRITE, True),
        ("cmp [rbx], al", WRITE, False),
        ("cmpxchg [rbx], ecx", WRITE, True),
        ("push rax", WRITE, True),
        ("pop rax", ACCESS, True),
        ("call 1f; 1:", WRITE, True),
        ("movups [rbx], xmm0", WRITE, True),
        ("lea rax, [rbx]", ACCESS, False),
        ("prefetcht0 [rbx]", ACCESS, False),
        ("clflush [rbx]", WRITE, False),
        ("nop dword ptr [rbx]", ACCESS, False),
        ("xsave [rbx]", WRITE, True),
        ("stosb", WRITE, True),
        ("movq mm0, [rbx]", ACCESS, True),
        ("fld qword ptr [rbx]", ACCESS, True),
    ],
)
def test_accesses(m: Machine, access: str, kind: int, hit: bool) -> None:
    start(
        m,
        f"{access}; nop; hlt",
        rbx=DST,
        rdi=DST,
        rsp=DST + (8 if "push" in access or "call" in access else 0),
    )
    m.set(cr4=m.guest.cr4 | lib.X86_CR4_OSXSAVE, rax=1)
    m.set_gate(DB, gate(CODE64, HANDLERS + 0x2000, ist=1))
    breakpoint_at(m, DST, kind)
    m.run(lib.EXIT_HLT)
    assert [dr6 for _, _, dr6 in log(m)] == ([lib.DR6_B0] if hit else [])


@pytest.mark.spec("cpu.dr_breakpoints")
def test_a_fault_loses_no_breakpoint_and_makes_none(m: Machine) -> None:
    """The write that faulted did not happen; done again it traps."""
    start(m, "mov [rbx], eax; hlt", rbx=0x200000)
    m.write(PD + 8, 0)
    m.asm(f"mov qword ptr [{PD + 8}], 0x2000e7; add rsp, 8; iretq", HANDLERS + 16 * PF + 0x1000)
    m.set_gate(PF, gate(CODE64, HANDLERS + 16 * PF + 0x1000))
    breakpoint_at(m, 0x200000, WRITE, LEN4)
    m.run(lib.EXIT_HLT)
    assert log(m) == [(2, False, lib.DR6_B0)]


@pytest.mark.spec("cpu.dr_breakpoints")
@pytest.mark.tcg_differs("QEMU 7.2 aborts")
def test_implicit_accesses_meet_no_breakpoint(m: Machine) -> None:
    """Of descriptors and of the frame of an event: SDM vol. 3 17.2.4 speaks of the instruction's data."""
    start(m, "mov ds, eax; int 0x40", rax=DATA32)
    m.asm("hlt", HANDLERS + 16 * 0x40)
    breakpoint_at(m, 0x1000 + DATA32, ACCESS, LEN8)
    breakpoint_at(m, STACK - 8, ACCESS, LEN8, n=1)
    m.run(lib.EXIT_HLT)
    assert log(m) == []


@pytest.mark.spec("cpu.dr_breakpoints")
@pytest.mark.parametrize(
    ("enabled", "hit"),
    [(1, True), (2, True), (3, True), (0x301, True), (0x302, True), (0, False), (0x300, False), (0xC, False)],
)
@pytest.mark.parametrize("kind", ["instruction", "data"])
def test_either_enable_bit_will_do(m: Machine, kind: str, enabled: int, hit: bool) -> None:
    """L0 or G0; LE and GE have no meaning of their own: SDM vol. 3 17.2.4."""
    m.asm("nop; here: mov [0x500], eax; behind: nop; hlt")
    m.long64(CODE)
    at, control = (m.symbols["here"], 0) if kind == "instruction" else (0x500, 0xD << 16)
    m.set(dr0=at, dr7=0x400 | enabled | control)
    m.run(lib.EXIT_HLT)
    if not hit:
        assert m.vector() == -1
        return
    assert m.vector() == 1
    assert m.frame(1) == [m.symbols["here" if kind == "instruction" else "behind"]]
    assert m.guest.dr6 & 0xF == 1
