"""Code that another processor or the client writes while this one runs it.

SDM vol. 3 8.1.3: the writer stores the code, then a flag; the other sees the flag, executes a
serializing instruction (8.3), then the code.  Stores of a processor into its own code need nothing
(unit/test_blocks).  Without any of that they are seen sooner or later.
"""

from __future__ import annotations

import threading
import time

import pytest

from pykvm.abi import lib
from tests.guest.bare import CODE, PML4, STACK, Machine

ROUNDS = 25
FLAG, ACK, OPERAND = 0x100000, 0x100040, 0x100080
PATCHED = 0x20000

SERIALIZING = {
    "serialize": "serialize",
    "iretq": "mov r8, rsp; mov eax, ss; push rax; push r8; pushfq; mov eax, cs; push rax; lea rax, [rip + 5f]; push rax; iretq; 5:",
    "mov cr0": "mov rax, cr0; mov cr0, rax",
    "mov cr3": f"mov eax, {PML4}; mov cr3, rax",
    "mov cr4": "mov rax, cr4; mov cr4, rax",
    "mov dr7": "mov eax, 0x400; mov dr7, rax",
    "wrmsr": f"mov ecx, {lib.MSR_KERNEL_GS_BASE}; xor eax, eax; xor edx, edx; wrmsr",
    "invlpg": "invlpg [0x100000]",
    "wbinvd": "wbinvd",
    "invd": "invd",
    "lgdt": f"sgdt [{OPERAND}]; lgdt [{OPERAND}]",
    "lidt": f"sidt [{OPERAND}]; lidt [{OPERAND}]",
    "lldt": "xor eax, eax; lldt ax",
    "ltr": "and byte ptr [0x1048 + 5], 0xfd; mov eax, 0x48; ltr ax",
}


def pair() -> tuple[Machine, Machine]:
    first, second = Machine(), Machine()
    second.ram, second.hva = first.ram, first.hva
    for gpa in range(0, second.size, 4096):
        second.map(gpa)
    return first, second


def together(*machines: Machine) -> None:
    threads = [threading.Thread(target=m.run, args=(lib.EXIT_HLT, 60)) for m in machines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(m.vector() == -1 for m in machines)


@pytest.mark.spec("cpu.smc")
@pytest.mark.parametrize("name", SERIALIZING)
def test_another_processor_stores_code(name: str) -> None:
    """Round n: `mov eax, n` is stored, told, called, and must return n."""
    runner, writer = pair()
    runner.asm("mov eax, 0; ret", PATCHED)
    runner.asm(
        f"""
        mov r15d, 1
     1: cmp [{FLAG}], r15d
        jne 1b
        {SERIALIZING[name]}
        call {PATCHED}
        cmp eax, r15d
        jne 2f
        mov [{ACK}], r15d
        inc r15d
        cmp r15d, {ROUNDS}
        jne 1b
        hlt
     2: mov dword ptr [{ACK}], -1
        hlt
        """,
        CODE,
    )
    writer.asm(
        f"""
        mov r15d, 1
     1: mov [{PATCHED + 1}], r15d
        mov [{FLAG}], r15d
     2: cmp [{ACK}], r15d
        je 3f
        cmp dword ptr [{ACK}], -1
        jne 2b
        hlt
     3: inc r15d
        cmp r15d, {ROUNDS}
        jne 1b
        hlt
        """,
        CODE + 0x1000,
    )
    for m, code in ((writer, CODE + 0x1000), (runner, CODE)):
        m.long64(code)
        m.set(rsp=STACK - 0x100)
    together(runner, writer)
    assert runner.reg("r15") == ROUNDS
    assert writer.reg("r15") == ROUNDS


@pytest.mark.spec("cpu.smc")
@pytest.mark.parametrize("who", ["a processor", "the client"])
def test_an_endless_loop_is_ended_from_outside(who: str) -> None:
    """EB FE becomes HLT: nothing but time passes between its iterations."""
    runner, writer = pair()
    runner.load(CODE, b"\xeb\xfe\xf4")
    runner.long64(CODE)
    thread = threading.Thread(target=runner.run, args=(lib.EXIT_HLT, 20))
    thread.start()
    time.sleep(0.02)
    assert thread.is_alive()
    if who == "a processor":
        writer.asm(f"mov word ptr [{CODE}], 0x9090; hlt", CODE + 0x1000)
        writer.long64(CODE + 0x1000)
        writer.run(lib.EXIT_HLT)
    else:
        runner.ram[CODE : CODE + 2] = b"\x90\x90"
    thread.join()
    assert runner.guest.rip == CODE + 3


@pytest.mark.spec("cpu.smc")
def test_the_client_stores_code_between_entries() -> None:
    """After any exit the next entry sees it: no notice is needed."""
    m = Machine()
    m.asm("1: mov eax, 0x11111111; cpuid; jmp 1b", CODE)
    m.long64(CODE)
    for value in range(1, 20):
        m.ram[CODE + 1 : CODE + 5] = value.to_bytes(4, "little")
        m.run(lib.EXIT_CPUID)
        assert m.reg("rax") == value
        m.skip()


@pytest.mark.spec("cpu.smc", "cpu.page_crossing")
@pytest.mark.parametrize("offset", range(11))
@pytest.mark.parametrize("lock", [b"", b"\xf0"])
def test_an_instruction_that_writes_itself_across_pages(offset: int, lock: bytes) -> None:
    """It finishes as it was fetched, and is another one the next time."""
    at, value = 0x21000 - offset, 0x1234567
    add = lock + b"\x81\x05" + (-4 & 0xFFFFFFFF).to_bytes(4, "little") + value.to_bytes(4, "little")
    m = Machine()
    m.asm(f".byte {','.join(map(str, add))}; dec ecx; jnz {at}; hlt; end:", at)
    m.long64(at)
    m.set(rcx=3)
    m.run(lib.EXIT_HLT)
    assert m.read(at + len(add) - 4, 4) == value << 3
    assert m.guest.rip == m.symbols["end"]
