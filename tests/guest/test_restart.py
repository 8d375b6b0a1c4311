"""Every exit is restartable: a run with all pages missing at first ends as one with all of them there.

Random instructions that load segments, change levels, switch tasks and fault, under random gates,
descriptors and stacks.  Each EPT violation is answered by mapping the page, and the event whose
delivery it interrupted is delivered again.
"""

from __future__ import annotations

import random

import pytest

from pykvm.abi import lib
from tests.guest.bare import (
    ALL_ONES,
    CODE,
    CODE32,
    GDT,
    HANDLERS,
    IDT,
    PD,
    PDPT,
    PML4,
    STACK,
    STACK0,
    TSS,
    Machine,
    descriptor,
    gate,
)

OPCODE_BYTES = """
    cd cc f1 cf 48cf cb 48cb 8e 8c 07 17 1f 0fa1 0fa9 c4 c5 0fb2 9c 9d fa fb 50 58 ff 63 66
    0f00 0f01 0f02 0f03 0f05 0f06 0f07 0f20 0f22 0f21 0f23 0f34 0f35 f30fae 0f0b
"""
OPCODES = [bytes.fromhex(op) for op in OPCODE_BYTES.split()]
SELECTORS = [*range(0, 0x80, 8), 3, 0x23, 0x2B, 0x33, 4, 0x0C]
TASK, LDT = 0x7000, 0x8000
PAGES = [0, GDT, IDT, IDT + 0x800, TSS, PML4, PDPT, PD, TASK, LDT, STACK0 & ~0xFFF, 0xA000, 0xE000, 0xF000]
AT = {lib.EXIT_CPUID, lib.EXIT_RDMSR, lib.EXIT_WRMSR, lib.EXIT_VMCALL, lib.EXIT_RSM, lib.EXIT_MONITOR}


def little(value: int, size: int) -> bytes:
    return (value & (1 << 8 * size) - 1).to_bytes(size, "little")


def random_code(r: random.Random) -> bytes:
    code = b""
    for _ in range(40):
        kind = r.random()
        if kind < 0.2:
            code += b"\xb8" + little(r.choice(SELECTORS), 4)  # mov eax, selector
        elif kind < 0.3:  # far call and jump
            code += (
                r.choice([b"\x9a", b"\xea"])
                + little(CODE + r.randrange(128), 4)
                + little(r.choice(SELECTORS), 2)
            )
        else:
            code += r.choice(OPCODES) + bytes([0xC0 | r.randrange(64)] if kind < 0.7 else r.randbytes(2))
    return code


def random_descriptor(r: random.Random) -> int:
    target = gate(r.choice(SELECTORS), CODE + r.randrange(128), r.choice([0xEC, 0xE4, 0xE5, 0x8C]))
    flat = descriptor(0, 0xFFFFF, r.choice([0xC0F3, 0xC0FB, 0xC0FF, 0xA0FB, 0xC093, 0xC013, 0xC09A]))
    task = r.choice([descriptor(TASK, 0x67, 0x89), descriptor(TASK, 0x2B, 0x81)])
    return r.choice([int.from_bytes(target[:8], "little"), flat, task, descriptor(LDT, 0xFF, 0xE2)])


def prepare(m: Machine, seed: int) -> None:
    r = random.Random(seed)
    lib.cpu_reset(m.cpu, 0)
    m.ram[:] = bytes(m.size)
    mode = r.choice(["real", "prot32", "vm86", "long64", "compat"])
    cpl = r.choice([0, 3])
    if mode == "real":
        m.real(CODE)
    elif mode == "vm86":
        m.vm86(CODE >> 4, 0, r.choice([0, 3]))
    elif mode == "compat":
        m.long64(CODE)
        m.set_seg("cs", CODE32, 0, ALL_ONES, 0xC09B)
    else:
        getattr(m, mode)(CODE, cpl)
    m.load(CODE, random_code(r))
    for selector in (0x58, 0x68, 0x70, 0x78):
        m.set_gdt(selector, random_descriptor(r))
    m.load(LDT, little(random_descriptor(r), 8) * 4)
    if mode != "real":
        for vector in (3, 4, 0x20, 0x40, 0x80, 0xC0):
            kind = r.choice([0xEE, 0xEF, 0xE6, 0xE7, 0xE5, 0x8E])
            m.set_gate(vector, gate(r.choice(SELECTORS), HANDLERS + 16 * vector, kind, r.randrange(2)))
    for k in range(26):
        m.write(TASK + 4 * k, r.choice([CODE + r.randrange(128), r.choice(SELECTORS), 0x6800]), 4)
    m.write(TASK + 28, PML4, 4)
    slot = 8 if mode in {"long64", "compat"} else 4
    for k in range(40):
        values = [CODE + r.randrange(128), r.choice(SELECTORS), 2, 0x202, 0x20202, STACK + r.randrange(256)]
        m.write(STACK + slot * k, r.choice(values), slot)
    for vector in range(256):
        m.load(HANDLERS + 16 * vector, r.choice([b"\xf4", b"\x48\xcf", b"\x58\x48\xcf"]))
    for k in [0, 1, 2, 3, *range(5, 16)]:
        m.guest.gpr[k] = r.choice([CODE + r.randrange(128), r.choice(SELECTORS), 0x500, r.getrandbits(64)])
    m.set(star=0x2B000800000000, lstar=HANDLERS, sysenter_cs=8, sysenter_eip=HANDLERS, sysenter_esp=STACK0)
    m.ctl.insn_budget = 300
    m.ctl.deadline = 1 << 63  # on a busy machine 300 instructions may take longer than a time slice


def guest_state(m: Machine) -> tuple[object, ...]:
    g = m.guest
    segments = [(s.selector, s.base, s.limit, s.ar) for s in g.seg]
    control = (g.cr0, g.cr2, g.cr3, g.cr4, g.efer, g.dr6, g.dr7)
    tables = (g.gdtr.base, g.gdtr.limit, g.idtr.base, g.idtr.limit)
    return (*g.gpr[0:16], g.rip, g.rflags, *segments, *control, *tables, g.interruptibility, g.pending_dbg)


def run(m: Machine, seed: int, *, missing: bool) -> tuple[object, ...] | None:
    """How it ends; None when it does not end soon."""
    prepare(m, seed)
    for page in PAGES if missing else ():
        m.unmap(page)
    exits: list[tuple[int, int]] = []
    while len(exits) < 50:
        reason = m.enter()
        gpa = int(m.exit.gpa)
        if reason == lib.EXIT_EPT_VIOLATION and gpa < m.size:
            assert missing, f"seed {seed}: {gpa:#x} is mapped"
            ev = m.exit.idt_vectoring
            m.ctl.entry_event = ev  # nothing, or what was interrupted
            m.map(gpa)
        elif reason in AT:
            exits.append((reason, int(m.guest.rip)))
            m.skip()
        elif reason == lib.EXIT_PREEMPTED:
            return None
        else:
            return (*exits, reason, guest_state(m), m.ram[:])
    return None


@pytest.mark.spec("cpu.reinject", "cpu.page_crossing")
@pytest.mark.parametrize("batch", range(4))
def test_missing_pages_make_no_difference(batch: int) -> None:
    m = Machine(0x100000)
    ended = 0
    for seed in range(100 * batch, 100 * batch + 100):
        expected = run(m, seed, missing=False)
        if expected is not None:
            ended += 1
            assert run(m, seed, missing=True) == expected, f"seed {seed}"
        for page in PAGES:
            m.map(page)
    assert ended > 30
