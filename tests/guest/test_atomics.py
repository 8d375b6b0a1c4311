"""LOCK and XCHG against another processor and against the client's own threads, wherever the operand is.

Source: SDM vol. 3 8.1.2.2: locked operations are atomic for operands of any alignment, across cache
lines and pages too.
"""

from __future__ import annotations

import threading

import pytest

from pykvm.abi import ffi, lib
from tests.guest.bare import CODE, Machine

LOOPS = 10_000
PAGE = 0x100000
# Where an operand of 8 bytes begins: aligned, in a line, across lines, across pages.
PLACES = {"aligned": PAGE, "in a line": PAGE + 3, "across lines": PAGE + 0x3D, "across pages": PAGE + 0xFFB}
# Each adds 1 to the quadword at [rbx]; rdi counts, so that all others are free.
ADDERS = {
    "inc": "lock inc qword ptr [rbx]",
    "add": "lock add qword ptr [rbx], 1",
    "adc": "stc; lock adc qword ptr [rbx], 0",
    "sub": "lock sub qword ptr [rbx], -1",
    "xadd": "mov eax, 1; lock xadd [rbx], rax",
    "cmpxchg": "mov rax, [rbx]; 2: lea rdx, [rax + 1]; lock cmpxchg [rbx], rdx; jnz 2b",
    "cmpxchg8b": """
        mov eax, [rbx]; mov edx, [rbx + 4]; mov rsi, rbx
     2: mov ecx, edx; mov ebx, eax; add ebx, 1; adc ecx, 0; lock cmpxchg8b [rsi]; jnz 2b; mov rbx, rsi
    """,
    # a spin lock of XCHG in the byte behind, around a plain increment
    "xchg": "3: mov al, 1; xchg [rbx + 9], al; test al, al; jnz 3b; inc qword ptr [rbx]; mov byte ptr [rbx + 9], 0",
    # the same of BTS and BTR in a dword that crosses as the operand does
    "bts": """
     3: lock bts dword ptr [rbx + 0x2002], 7; jc 3b; inc qword ptr [rbx]; lock btr dword ptr [rbx + 0x2002], 7
    """,
}


def share(first: Machine, second: Machine) -> None:
    second.ram, second.hva = first.ram, first.hva
    for gpa in range(0, second.size, 4096):
        second.map(gpa)


def apart(m: Machine) -> None:
    """Have the second page somewhere else in memory."""
    m.map(PAGE + 0x1000, target=0x180000)
    m.map(0x102000, target=0x190000)
    m.map(0x103000, target=0x1A0000)


def prepare(m: Machine, source: str, at: int) -> None:
    m.asm(f"1: {source}; dec rdi; jnz 1b; hlt", CODE)
    m.long64(CODE)
    m.set(rdi=LOOPS, rbx=at)


def together(*work: threading.Thread) -> None:
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()


@pytest.mark.spec("cpu.atomics_smp", "cpu.xchg_cmpxchg")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ADDERS)
def test_processors_add(name: str, place: str) -> None:
    first, second = Machine(), Machine()
    share(first, second)
    for m in (first, second):
        prepare(m, ADDERS[name], PLACES[place])
    together(*(threading.Thread(target=m.run, args=(lib.EXIT_HLT, 60)) for m in (first, second)))
    assert first.read(PLACES[place]) == 2 * LOOPS


@pytest.mark.spec("cpu.atomics_smp", "cpu.xchg_cmpxchg")
@pytest.mark.parametrize("name", ADDERS)
def test_pages_that_the_host_has_apart(name: str) -> None:
    first, second = Machine(), Machine()
    share(first, second)
    for m in (first, second):
        prepare(m, ADDERS[name], PLACES["across pages"])
        apart(m)
    together(*(threading.Thread(target=m.run, args=(lib.EXIT_HLT, 60)) for m in (first, second)))
    at, split = PLACES["across pages"], 0x1000 - 0xFFB
    value = first.read(at, split) | first.read(0x180000, 8 - split) << 8 * split
    assert value == 2 * LOOPS


@pytest.mark.spec("cpu.atomics_smp", "cpu.xchg_cmpxchg")
def test_cmpxchg16b() -> None:
    """Both halves count, the second three times as fast: never one without the other."""
    source = """
        mov rax, [rsi]; mov rdx, [rsi + 8]
     2: lea rbx, [rax + 1]; lea rcx, [rdx + 3]; lock cmpxchg16b [rsi]; jnz 2b
        lea rbx, [rax + 2 * rax]; sub rbx, rdx; or r8, rbx
    """
    first, second = Machine(), Machine()
    share(first, second)
    for m in (first, second):
        prepare(m, source, 0)
        m.set(rsi=PAGE)
    # the first read is not one access: what it saw is compared before it counts
    together(*(threading.Thread(target=m.run, args=(lib.EXIT_HLT, 60)) for m in (first, second)))
    assert (first.read(PAGE), first.read(PAGE + 8)) == (2 * LOOPS, 6 * LOOPS)
    assert first.reg("r8") == second.reg("r8") == 0


@pytest.mark.spec("cpu.xchg_cmpxchg")
@pytest.mark.parametrize("offset", [1, 8])
def test_cmpxchg16b_must_be_aligned(offset: int) -> None:
    m = Machine()
    m.asm("bad: cmpxchg16b [rsi]; cpuid")
    m.long64(CODE)
    m.set(rsi=PAGE + offset)
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(2)) == (13, [0, CODE])


@pytest.mark.spec("cpu.atomics_smp")
@pytest.mark.parametrize("name", ["inc", "xadd", "cmpxchg", "cmpxchg8b"])
def test_client_adds(name: str) -> None:
    """A thread of the client works on the same quadword with the host's own atomic instructions."""
    m = Machine()
    prepare(m, ADDERS[name], PAGE)
    rounds = LOOPS // 4

    def client() -> None:
        cell = ffi.new("uint64_t *")
        for _ in range(rounds):
            while True:
                lib.gpte_read(m.hva + PAGE, cell, 8)
                if lib.gpte_cmpxchg(m.hva + PAGE, cell[0], cell[0] + 1, 8) == 1:
                    break

    m.set(rdi=50 * LOOPS)
    together(threading.Thread(target=client), threading.Thread(target=m.run, args=(lib.EXIT_HLT, 60)))
    assert m.read(PAGE) == 50 * LOOPS + rounds
