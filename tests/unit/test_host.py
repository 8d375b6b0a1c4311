"""The processor and its host: memory that vanishes, signals, requests of other threads, reset, skip."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from pykvm.abi import ffi, lib
from tests.unit.cpu_machine import PAGE, ROOT, SD, SR, SW, SX, UD2, Machine, Outcome, P, Paging, W

CODE_LA = 0x1000
LA = 0x40000000
LONG = Paging("4", cr3=ROOT)
FLAT = Paging("none")
PROT_NONE = 0

libc = ctypes.CDLL(None, use_errno=True)


def protect(hva: int, prot: int) -> None:
    assert libc.mprotect(ctypes.c_void_p(hva), ctypes.c_size_t(PAGE), prot) == 0


@pytest.fixture
def machine() -> Machine:
    return Machine()


# ---- memory that vanishes --------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["fast", "slow", "crossing", "modify", "string", "call", "push"])
def test_data_whose_host_page_is_gone(machine: Machine, how: str) -> None:
    m = machine
    insn = {
        "fast": b"\x8b\x03",  # mov eax, [rbx]
        "slow": b"\x8b\x03",
        "crossing": b"\x8b\x43\xfe",  # mov eax, [rbx - 2]
        "modify": b"\xf0\xff\x03",  # lock inc dword [rbx]
        "string": b"\xf3\xa4",  # rep movsb
        "call": b"\xff\x13",  # call [rbx]
        "push": b"\xff\x33",  # push dword [rbx]
    }[how]
    m.put(CODE_LA, b"\x42" + insn + b"\x42" + UD2)  # inc edx; ...; inc edx
    m.put(0x5000, (CODE_LA + 1 + len(insn)).to_bytes(4, "little"))
    m.load(FLAT)

    def go() -> Outcome:
        m.guest.gpr[2], m.guest.gpr[4] = 0, 0x8000
        m.guest.gpr[6], m.guest.gpr[7], m.guest.gpr[1] = 0x5000, 0x7000, 64
        return m.run(CODE_LA, 0x5000)

    assert go() == Outcome("ok")
    if how == "slow":
        lib.cpu_flush_tlb(m.cpu)
    protect(m.hva + 0x5000, PROT_NONE if how != "modify" else mmap.PROT_READ)
    for _ in range(2):
        what, address, _ = go()
        assert (what, address & ~0xFFF) == ("host-fault", m.hva + 0x5000)
        # uncommitted, and what came before it is done once
        assert (m.guest.rip, m.guest.gpr[2]) == (CODE_LA + 1, 1)
        assert m.exit.insn_len == len(insn)
    protect(m.hva + 0x5000, mmap.PROT_READ | mmap.PROT_WRITE)
    assert m.outcome(lib.cpu_enter(m.cpu)) == Outcome("ok")
    assert m.guest.gpr[2] == 2


# opcode, reg of ModRM, immediate: instructions that read or write [ebx]
MEMORY_FORMS = [
    ("8a", 0, ""), ("8b", 0, ""), ("88", 0, ""), ("89", 0, ""), ("66 8b", 0, ""), ("66 89", 0, ""),
    ("00", 0, ""), ("01", 0, ""), ("02", 0, ""), ("03", 0, ""), ("13", 0, ""), ("19", 0, ""),
    ("39", 0, ""), ("3b", 0, ""), ("84", 0, ""), ("85", 0, ""), ("80", 7, "05"), ("81", 0, "01020304"),
    ("83", 1, "01"), ("c6", 0, "00"), ("c7", 0, "00000000"), ("f6", 0, "01"), ("f7", 0, "01000000"),
    ("f7", 2, ""), ("f7", 3, ""), ("f7", 4, ""), ("f7", 5, ""), ("fe", 0, ""), ("ff", 0, ""),
    ("ff", 1, ""), ("ff", 6, ""), ("8f", 0, ""), ("0f b6", 0, ""), ("0f b7", 0, ""), ("0f be", 0, ""),
    ("0f af", 0, ""), ("69", 0, "01000000"), ("6b", 0, "03"), ("c1", 4, "01"), ("d1", 5, ""), ("d3", 7, ""),
    ("0f a3", 0, ""), ("0f ab", 0, ""), ("0f ba", 4, "01"), ("0f ba", 7, "01"), ("0f bc", 0, ""),
    ("0f 45", 0, ""), ("0f 94", 0, ""), ("0f a4", 0, "03"), ("0f b1", 0, ""), ("0f c1", 0, ""),
    ("0f c7", 1, ""), ("86", 0, ""), ("87", 0, ""), ("f0 01", 0, ""), ("f0 0f b1", 0, ""),
    ("62", 0, ""), ("0f 00", 4, ""), ("0f 01", 3, ""), ("0f 01", 0, ""),
    ("d9", 0, ""), ("dd", 0, ""), ("d8", 0, ""), ("d9", 2, ""), ("dd", 3, ""), ("d9", 5, ""), ("d9", 7, ""),
    ("df", 7, ""), ("db", 5, ""), ("0f 6f", 0, ""), ("0f 7f", 0, ""), ("0f 10", 0, ""), ("0f 11", 0, ""),
    ("66 0f 6f", 0, ""), ("f3 0f 7f", 0, ""), ("f2 0f 10", 0, ""), ("f2 0f 11", 0, ""), ("0f 58", 0, ""),
    ("66 0f fe", 0, ""), ("f2 0f 59", 0, ""), ("0f 2b", 0, ""), ("0f ae", 0, ""), ("0f ae", 1, ""),
    ("0f ae", 2, ""), ("0f ae", 3, ""), ("66 0f d6", 0, ""), ("0f 13", 0, ""), ("66 0f 3a 0f", 0, "04"),
]  # fmt: skip


@pytest.mark.parametrize("form", MEMORY_FORMS, ids=lambda f: f"{f[0]}/{f[1]}")
def test_the_instruction_that_faulted_is_found(machine: Machine, form: tuple[str, int, str]) -> None:
    m = machine
    opcode, reg, imm = bytes.fromhex(form[0]), form[1], bytes.fromhex(form[2])
    good = opcode + bytes([reg << 3 | 6]) + imm  # [esi]
    bad = opcode + bytes([reg << 3 | 3]) + imm  # [ebx]
    # edx counts; the register operand is eax
    m.put(CODE_LA, b"\x42" + good + b"\x42" + bad + b"\x42" + good + UD2)
    m.load(FLAT)
    m.ctl.cpuid = [0xFFFFFFFF] * lib.CPU_NR_CPUID
    m.guest.cr4 |= lib.X86_CR4_OSFXSR
    lib.cpu_state_changed(m.cpu)
    done = CODE_LA + 3 + 2 * len(good) + len(bad)

    def go() -> Outcome:
        m.guest.gpr[0], m.guest.gpr[1], m.guest.gpr[2] = 0, 1, 0
        m.guest.gpr[4], m.guest.gpr[6] = 0x8000, 0x6000
        return m.run(CODE_LA, 0x5000)

    # eax is within the bounds of BOUND
    m.put(0x5000, b"\x00\x00\x00\x00\xff\xff\xff\x7f")
    m.put(0x6000, b"\x00\x00\x00\x00\xff\xff\xff\x7f")
    assert go() == Outcome("ok")
    assert m.guest.rip == done
    for prot in (mmap.PROT_READ, PROT_NONE):
        m.put(0x5000, b"\x00\x00\x00\x00\xff\xff\xff\x7f")
        m.put(0x6000, b"\x00\x00\x00\x00\xff\xff\xff\x7f")
        protect(m.hva + 0x5000, prot)
        for flush in (False, True):
            if flush:
                lib.cpu_flush_tlb(m.cpu)
            outcome = go()
            if m.guest.rip != done or prot == PROT_NONE:
                assert (outcome.what, outcome.address & ~0xFFF) == ("host-fault", m.hva + 0x5000)
                assert m.guest.rip == CODE_LA + 2 + len(good)
                assert m.exit.insn_len == len(bad)
                assert m.guest.gpr[4] == 0x8000 + {b"\x8f": 4, b"\xff": -4 if reg == 6 else 0}.get(opcode, 0)
        protect(m.hva + 0x5000, mmap.PROT_READ | mmap.PROT_WRITE)


@pytest.mark.parametrize(
    "insn",
    ["50", "58", "6a 01", "c3", "c2 04 00", "e8 00 00 00 00", "c9", "9c", "9d", "60", "61", "c8 08 00 01",
     "cb", "1e", "1f", "a4", "a5", "aa", "ab", "ac", "ad", "a6", "a7", "ae", "af", "d7", "66 a5",
     "f3 a4", "f3 a5", "f3 aa", "f3 ab", "f3 ac", "f3 a6", "f3 ae", "f2 ae"],
)  # fmt: skip
@pytest.mark.parametrize("flush", [False, True])
def test_the_instruction_with_implicit_operands_is_found(machine: Machine, insn: str, flush: bool) -> None:
    m = machine
    code = bytes.fromhex(insn)
    m.put(CODE_LA, b"\x42" + code + UD2)
    m.load(FLAT)

    def go(page: int) -> Outcome:
        # a stack, string and table in the page
        m.guest.gpr = [7, 16, 0, 0, page + 0x400, page + 0x480, page + 0x200, page + 0x600] + [0] * 10
        return m.run(CODE_LA, page + 0x800)

    for page in (0x5000, 0x6000):
        m.put(page, bytes(0x400) + (CODE_LA + 1 + len(code)).to_bytes(4, "little") * 2)
    go(0x5000)
    go(0x6000)
    m.put(0x5400, (CODE_LA + 1 + len(code)).to_bytes(4, "little") * 2)
    protect(m.hva + 0x5000, PROT_NONE)
    if flush:
        lib.cpu_flush_tlb(m.cpu)
    what, address, _ = go(0x5000)
    assert (what, address & ~0xFFF) == ("host-fault", m.hva + 0x5000)
    assert (m.guest.rip, m.guest.gpr[2], m.exit.insn_len) == (CODE_LA + 1, 1, len(code))
    assert list(m.guest.gpr[4:8]) == [0x5400, 0x5480, 0x5200, 0x5600]
    assert (m.guest.gpr[0], m.guest.gpr[1]) == (7, 16)
    protect(m.hva + 0x5000, mmap.PROT_READ | mmap.PROT_WRITE)


@pytest.mark.parametrize("again", [False, True])
def test_code_whose_host_page_is_gone(machine: Machine, again: bool) -> None:
    m = machine
    m.put(CODE_LA, b"\x42\xff\xe3")  # inc edx; jmp ebx
    m.put(0x5000, b"\x42" + UD2)
    m.load(FLAT)
    if again:
        assert m.run(CODE_LA, 0x5000) == Outcome("ok")
    m.guest.gpr[2] = 0
    protect(m.hva + 0x5000, PROT_NONE)
    assert m.run(CODE_LA, 0x5000) == Outcome("host-fault", m.hva + 0x5000)
    assert (m.guest.rip, m.guest.gpr[2]) == (0x5000, 1)
    protect(m.hva + 0x5000, mmap.PROT_READ | mmap.PROT_WRITE)
    assert m.outcome(lib.cpu_enter(m.cpu)) == Outcome("ok")
    assert m.guest.gpr[2] == 2


def test_page_table_whose_host_page_is_gone(machine: Machine) -> None:
    m = machine
    m.map_linear(CODE_LA, CODE_LA)
    entry = m.map_linear(LA, 0x5000, P | W)
    m.put(CODE_LA, b"\x8a\x03" + UD2)
    m.load(LONG)
    page = m.hva + (entry & ~0xFFF)
    protect(page, mmap.PROT_READ)
    assert m.run(CODE_LA, LA) == Outcome("host-fault", m.hva + entry)  # A is to be set
    protect(page, PROT_NONE)
    assert m.run(CODE_LA, LA) == Outcome("host-fault", m.hva + entry)
    protect(page, mmap.PROT_READ | mmap.PROT_WRITE)
    assert m.run(CODE_LA, LA) == Outcome("ok")


def test_faults_on_many_threads() -> None:
    results: list[set[Outcome]] = []

    def work() -> None:
        m = Machine()
        m.put(CODE_LA, b"\x8b\x03\x42\xeb\xfb")  # loop: mov eax, [ebx]; inc edx; jmp loop
        m.load(FLAT)
        m.ctl.insn_budget = 30000
        protect(m.hva + 0x5000, PROT_NONE)
        seen = set()
        for k in range(50):
            seen.add((m.run(CODE_LA, 0x5000 + k % 2 * PAGE), k % 2, m.hva))
        results.append({Outcome(o.what, o.address - hva if o.address else 0, odd) for o, odd, hva in seen})

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    preempted = Outcome(f"exit {lib.EXIT_PREEMPTED}", 0, 1)
    assert results == [{Outcome("host-fault", 0x5000, 0), preempted}] * 4


CHAIN = """
    import ctypes, faulthandler, sys
    from pykvm.abi import ffi, lib
    libc = ctypes.CDLL(None)
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda sig: libc._exit(33))
    before = sys.argv[1] == "before"
    if before:
        libc.signal(11, handler)
    cpu = lib.cpu_create()
    if not before:
        libc.signal(11, handler)
        cpu = lib.cpu_create()
    ctypes.string_at(0x123000)
"""


@pytest.mark.parametrize("when", ["before", "between"])
def test_faults_that_are_not_ours_go_to_the_handler_that_was_there(when: str) -> None:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(CHAIN), when], check=False)
    assert done.returncode == 33


def test_without_another_handler_the_process_dies_of_the_signal() -> None:
    program = "import ctypes; from pykvm.abi import lib; lib.cpu_create(); ctypes.string_at(0x123000)"
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == -signal.SIGSEGV


FAULTHANDLER = """
    import ctypes, faulthandler, sys, time
    from tests.unit.test_host import CODE_LA, FLAT, PROT_NONE, UD2, Machine, protect
    m = Machine()
    m.put(CODE_LA, bytes.fromhex("8b03") + UD2)  # mov eax, [ebx]
    m.load(FLAT)
    if sys.argv[1] == "disable":
        faulthandler.disable()
    else:
        faulthandler.enable()
    time.sleep(0.01)
    protect(m.hva + 0x5000, PROT_NONE)
    assert m.run(CODE_LA, 0x5000).what == "host-fault"
    ctypes.string_at(0x123000)
"""


@pytest.mark.parametrize("how", ["enable", "disable"])
def test_a_handler_that_comes_later_does_not_take_our_faults(how: str) -> None:
    # -X faulthandler: there before the processor, so that disable() takes the signals away, too.
    flags = ["-X", "faulthandler"] if how == "disable" else []
    line = [sys.executable, *flags, "-c", textwrap.dedent(FAULTHANDLER), how]
    done = subprocess.run(line, check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGSEGV
    assert done.stderr.count("Fatal Python error") == (how == "enable"), done.stderr


# ---- probing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backed", ["anonymous", "file"])
def test_host_probe(backed: str) -> None:
    if backed == "anonymous":
        area = mmap.mmap(-1, 4 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:
        fd = os.memfd_create("probe")
        os.ftruncate(fd, 4 * PAGE)
        area = mmap.mmap(fd, 4 * PAGE)
        os.ftruncate(fd, 3 * PAGE)
    hva = int(ffi.cast("uintptr_t", ffi.from_buffer(area)))
    area[0:4] = b"abcd"
    protect(hva + PAGE, mmap.PROT_READ)
    assert lib.host_probe(hva, PAGE, 1)
    assert lib.host_probe(hva + 3, 1, 1)
    assert lib.host_probe(hva, 2 * PAGE, 0)
    assert not lib.host_probe(hva, PAGE + 1, 1)
    assert not lib.host_probe(hva + PAGE, 1, 1)
    protect(hva + PAGE, PROT_NONE)
    assert not lib.host_probe(hva + PAGE + 7, 1, 0)
    assert lib.host_probe(hva + 3 * PAGE, 1, 0) == (backed == "anonymous")
    assert area[0:4] == b"abcd"
    assert not lib.host_probe(0x10000, 1, 0)
    assert not lib.host_probe((1 << 64) - 4, 8, 0)
    assert lib.host_probe(0, 0, 1)


# ---- signals and requests --------------------------------------------------------------------------------


def spin(m: Machine) -> None:
    m.put(CODE_LA, b"\xeb\xfe")
    m.load(FLAT)
    m.guest.rip = CODE_LA
    m.ctl.deadline = lib.host_tsc() + 10**11


@pytest.mark.parametrize(
    ("sig", "handler", "outside", "kicks"),
    [
        (signal.SIGUSR1, lambda *_: None, True, True),
        (signal.SIGUSR1, lambda *_: None, False, False),
        (signal.SIGUSR1, signal.SIG_IGN, True, False),
        (signal.SIGCHLD, signal.SIG_DFL, True, False),
        (signal.SIGRTMIN, lambda *_: None, True, True),
    ],
)
def test_pending_signals(machine: Machine, sig: int, handler: object, outside: bool, kicks: bool) -> None:
    m = machine
    spin(m)
    m.ctl.deadline = lib.host_tsc() + 10**8
    lib.cpu_set_signal_mask(m.cpu, 1, 0 if outside else 1 << sig - 1)
    old = signal.signal(sig, handler)  # type: ignore[arg-type]
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [sig])
    try:
        signal.pthread_kill(threading.get_ident(), sig)
        assert lib.cpu_enter(m.cpu) == (lib.EXIT_KICK if kicks else lib.EXIT_PREEMPTED)
        lib.cpu_set_signal_mask(m.cpu, 0, 0)
        m.ctl.deadline = lib.host_tsc() + 10**6
        assert lib.cpu_enter(m.cpu) == lib.EXIT_PREEMPTED
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        signal.signal(sig, old)


@pytest.mark.spec("mmu.smp_flush")
def test_requests_reach_a_running_processor(machine: Machine) -> None:
    m = machine
    m.put(CODE_LA, b"\x88\x03\xeb\xfc")  # loop: mov [ebx], al; jmp loop
    m.load(FLAT)
    m.ctl.deadline = lib.host_tsc() + 10**12
    m.guest.rip, m.guest.gpr[3] = CODE_LA, 0x5000
    reasons: list[int] = []
    thread = threading.Thread(target=lambda: reasons.append(lib.cpu_enter(m.cpu)))
    assert not lib.cpu_in_guest(m.cpu)
    thread.start()
    while not m.spte(5) & SD:
        time.sleep(0.001)
    assert lib.cpu_in_guest(m.cpu)
    m.map(5, SR | SX)
    lib.cpu_request(m.cpu, lib.CPU_REQ_FLUSH_TLB)
    lib.cpu_sync(m.cpu)
    before = bytes(m.memory[0x5000:0x6000])
    m.memory[0x5000] = before[0] ^ 0xFF
    thread.join(5)
    assert reasons == [lib.EXIT_EPT_VIOLATION]
    assert m.memory[0x5000] == before[0] ^ 0xFF
    assert not lib.cpu_in_guest(m.cpu)

    m.map(5, SR | SW | SX)
    thread = threading.Thread(target=lambda: reasons.append(lib.cpu_enter(m.cpu)))
    thread.start()
    while not lib.cpu_in_guest(m.cpu):
        time.sleep(0.001)
    lib.cpu_request(m.cpu, lib.CPU_REQ_KICK)
    thread.join(5)
    assert reasons[1:] == [lib.EXIT_KICK]
    assert lib.cpu_enter(m.cpu) == lib.EXIT_KICK  # until it is taken back
    lib.cpu_clear_kick(m.cpu)
    m.ctl.deadline = 1
    assert lib.cpu_enter(m.cpu) == lib.EXIT_PREEMPTED


# ---- reset and skip ---------------------------------------------------------------------------------------


@pytest.mark.spec("vcpu.reset_state")
def test_reset_state() -> None:
    m = Machine()
    g = m.guest
    assert (g.rip, g.rflags, g.cr0, g.gpr[2]) == (0xFFF0, 2, 0x60000010, 0x600)
    assert [v for n, v in enumerate(g.gpr) if n != 2] == [0] * 17
    cs = g.seg[lib.CPU_SEG_CS]
    assert (cs.selector, cs.base, cs.limit, cs.ar) == (0xF000, 0xFFFF0000, 0xFFFF, 0x9B)
    for n in (lib.CPU_SEG_DS, lib.CPU_SEG_ES, lib.CPU_SEG_SS, lib.CPU_SEG_FS, lib.CPU_SEG_GS):
        assert (g.seg[n].selector, g.seg[n].base, g.seg[n].limit, g.seg[n].ar) == (0, 0, 0xFFFF, 0x93)
    assert (g.seg[lib.CPU_SEG_LDTR].ar, g.seg[lib.CPU_SEG_TR].ar) == (0x82, 0x8B)
    assert g.gdtr.limit == g.idtr.limit == 0xFFFF
    assert (g.cr2, g.cr3, g.cr4, g.cr8, g.efer) == (0, 0, 0, 0, 0)
    assert (g.dr6, g.dr7, list(g.dr)) == (0xFFFF0FF0, 0x400, [0] * 4)
    assert (g.fpu.fcw, g.fpu.mxcsr, g.xcr0) == (0x37F, 0x1F80, 1)


@pytest.mark.spec("vcpu.init_state")
def test_init_keeps_what_reset_clears() -> None:
    m = Machine()
    g = m.guest
    g.cr0, g.cr2, g.cr3, g.cr4, g.efer = 0x80000011 | 1 << 29, 1, 2, 0x20, 0x500
    g.rip, g.rflags, g.gpr[2], g.gpr[5], g.dr7 = 1, 0x246, 2, 3, 0x455
    g.fpu.fcw, g.fpu.mxcsr, g.xcr0, g.star, g.sysenter_cs, g.tsc_aux = 0x27F, 0x1FA0, 7, 9, 10, 11
    lib.cpu_reset(m.cpu, 1)
    assert (g.cr0, g.cr2, g.cr3, g.cr4, g.efer) == (0x20000010, 0, 0, 0, 0)
    assert (g.rip, g.rflags, g.gpr[2], g.gpr[5], g.dr7) == (0xFFF0, 2, 0x600, 0, 0x400)
    assert (g.fpu.fcw, g.fpu.mxcsr, g.xcr0, g.star, g.sysenter_cs, g.tsc_aux) == (0x27F, 0x1FA0, 7, 9, 10, 11)
    lib.cpu_reset(m.cpu, 0)
    assert (g.cr0, g.fpu.fcw, g.xcr0, g.star, g.tsc_aux) == (0x60000010, 0x37F, 1, 0, 0)


def test_skip(machine: Machine) -> None:
    m = machine
    m.map_linear(CODE_LA, CODE_LA)
    m.put(CODE_LA, b"\x0f\xa2" + UD2)  # cpuid
    m.load(LONG)
    assert m.run_raw(CODE_LA) == lib.EXIT_CPUID
    m.guest.interruptibility = lib.CPU_BLOCK_STI | lib.CPU_BLOCK_NMI
    m.guest.rflags |= 1 << 16 | 1 << 8
    lib.cpu_skip(m.cpu)
    assert m.guest.rip == CODE_LA + 2
    assert m.guest.interruptibility == lib.CPU_BLOCK_NMI
    assert m.guest.rflags & (1 << 16 | 1 << 8) == 1 << 8
    assert m.guest.pending_dbg == 1 << 14


def test_skip_wraps_eip(machine: Machine) -> None:
    m = machine
    m.load(FLAT)
    m.guest.rip, m.exit.insn_len = 0xFFFFFFFE, 3
    lib.cpu_skip(m.cpu)
    assert m.guest.rip == 1
