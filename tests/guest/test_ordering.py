"""What two processors may see of each other's memory accesses: the litmus tests of the SDM.

Both loop over the same lines in step (a barrier of two counters) and count the outcomes that must
never be seen.  The host's memory model is the guest's, so what is proved is that nothing of ours is
weaker: no access is done early, late, twice or in halves.
Source: SDM vol. 3 8.2.3 (examples 8-1 to 8-10) and 8.1.1.
"""

from __future__ import annotations

import threading

import pytest

from pykvm.abi import lib
from tests.guest.bare import CODE, Machine

# On a host with one processor to spare each round lasts a time slice.
ROUNDS = 1200
X, Y, BARRIER, RESULTS = 0x100000, 0x100040, 0x100080, 0x200000
SLOT = 16  # of a round: a quadword of each processor

# Both wait for the other; rcx counts rounds down, r9 points to the results of this round.
LOOP = """
1:  mov [rsi], rcx
2:  cmp [rdi], rcx
    ja 2b
    {body}
    mov [r9], rax
    add r9, 16
    dec rcx
    jnz 1b
    hlt
"""


def run(first: str, second: str) -> list[tuple[int, int]]:
    """Results of every round: rax of both.  A round stores its number, so that nothing is reset."""
    machines = [Machine(), Machine()]
    a, b = machines
    b.ram, b.hva = a.ram, a.hva
    for gpa in range(0, b.size, 4096):
        b.map(gpa)
    for k in range(2):
        a.write(BARRIER + 64 * k, ROUNDS + 1)
    threads = []
    for k, (m, body) in enumerate(((a, first), (b, second))):
        code = CODE + 0x1000 * k
        m.asm(LOOP.format(body=body), code)
        m.long64(code)
        m.set(rcx=ROUNDS, rbx=X, rdx=Y, rsi=BARRIER + 64 * k, rdi=BARRIER + 64 * (1 - k), r9=RESULTS + 8 * k)
        threads.append(threading.Thread(target=m.run, args=(lib.EXIT_HLT, 100)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [(a.read(RESULTS + SLOT * k), a.read(RESULTS + SLOT * k + 8)) for k in range(ROUNDS)]


def old(value: int, k: int) -> bool:
    """Was it not yet the value that round k stores (ROUNDS - k)?  Earlier rounds stored more."""
    return value == 0 or value > ROUNDS - k


@pytest.mark.spec("cpu.tso")
@pytest.mark.parametrize(
    "fence", ["mfence", "lock or dword ptr [rsp], 0", "xchg [rsp - 8], r11", "serialize"]
)
def test_loads_do_not_pass_stores_before_a_fence(fence: str) -> None:
    """Example 8-3 with a fence: at least one sees the other's store.

    Without it some of every thousand rounds do not, here as on any processor.
    """
    results = run(f"mov [rbx], rcx; {fence}; mov rax, [rdx]", f"mov [rdx], rcx; {fence}; mov rax, [rbx]")
    bad = [k for k, (r1, r2) in enumerate(results) if old(r1, k) and old(r2, k)]
    assert not bad


@pytest.mark.spec("cpu.tso")
def test_stores_are_seen_in_order() -> None:
    """Examples 8-1 and 8-2: who sees the second store sees the first."""
    reader = "mov rax, [rdx]; mov r11, [rbx]; shl rax, 32; or rax, r11"
    results = run("mov [rbx], rcx; mov [rdx], rcx; xor eax, eax", reader)
    bad = [k for k, (_, seen) in enumerate(results) if not old(seen >> 32, k) and old(seen & 0xFFFFFFFF, k)]
    assert not bad


@pytest.mark.spec("cpu.tso")
def test_loads_are_not_passed_by_stores() -> None:
    """Example 8-4: not both see what the other stores behind its load."""
    results = run("mov rax, [rdx]; mov [rbx], rcx", "mov rax, [rbx]; mov [rdx], rcx")
    bad = [k for k, (r1, r2) in enumerate(results) if not old(r1, k) and not old(r2, k)]
    assert not bad


@pytest.mark.spec("cpu.tso")
def test_own_stores_are_seen_at_once() -> None:
    """Example 8-5."""
    results = run("mov [rbx], rcx; mov rax, [rbx]", "mov [rdx], rcx; mov rax, [rdx]")
    assert results == [(ROUNDS - k, ROUNDS - k) for k in range(ROUNDS)]


@pytest.mark.spec("cpu.tso", "cpu.atomics_smp")
@pytest.mark.parametrize("size", [2, 4, 8])
def test_aligned_accesses_are_whole(size: int) -> None:
    """8.1.1: a load sees one store or the other, never half of each; string stores element by element."""
    mask = (1 << 8 * size) - 1
    register = {2: "ax", 4: "eax", 8: "rax"}[size]
    fill = "mov r11, 0x0001000100010001; mov rax, rcx; imul rax, r11"
    string = f"mov r13, rdi; mov rdi, rbx; mov r12, rcx; mov ecx, 3; rep stos{'wdq'[size // 4]}; mov rcx, r12; mov rdi, r13"
    results = run(
        f"{fill}; mov [rbx], {register}; {string}; xor eax, eax", f"xor eax, eax; mov {register}, [rbx]"
    )
    for _, seen in results:
        assert seen & mask == (seen & 0xFFFF) * 0x0001000100010001 & mask


@pytest.mark.spec("cpu.tso")
def test_locked_instructions_are_seen_in_one_order() -> None:
    """Example 8-8: with XCHG for the stores, of both loads one sees its store."""
    store = "mov r11, rcx; xchg [{0}], r11; mov rax, [{1}]"
    results = run(store.format("rbx", "rdx"), store.format("rdx", "rbx"))
    bad = [k for k, (r1, r2) in enumerate(results) if old(r1, k) and old(r2, k)]
    assert not bad
