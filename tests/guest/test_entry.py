"""What an entry refuses, and what it takes: states that a client may set and a processor not hold.

Source: SDM vol. 3 26.3.1; APM vol. 2 15.5.1.  docs/processor.md says which checks are left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pykvm.abi import lib
from tests.guest.bare import CODE, CODE64, Machine

if TYPE_CHECKING:
    from collections.abc import Callable

CR0, EFER, RFLAGS, CS, VM86_SEGMENT, RIP = range(1, 7)
VM, PG = 0x20000, 0x80000000
UNUSABLE = lib.CPU_AR_UNUSABLE


def long64(m: Machine, **values: int) -> None:
    m.long64(CODE)
    m.set(**values)


def real(m: Machine, **values: int) -> None:
    m.real(CODE)
    m.set(**values)


def prot32(m: Machine, **values: int) -> None:
    m.prot32(CODE)
    m.set(**values)


def vm86(m: Machine, **segment: int) -> None:
    m.vm86(CODE >> 4, 0)
    for name, value in segment.items():
        setattr(m.seg("fs"), name, value)


def code_segment(m: Machine, ar: int) -> None:
    m.long64(CODE)
    m.set_seg("cs", CODE64, 0, 0xFFFFFFFF, ar)


REFUSED: dict[str, tuple[Callable[[Machine], None], int]] = {
    "PG without PE": (lambda m: prot32(m, cr0=PG), CR0),
    "LMA without LME": (lambda m: long64(m, efer=0x400), EFER),
    "LME and PG without LMA": (lambda m: long64(m, efer=0x100), EFER),
    "LMA without PAE": (lambda m: long64(m, cr4=0), EFER),
    "LMA without PG": (lambda m: prot32(m, efer=0x500), EFER),
    "flag 1 clear": (lambda m: long64(m, rflags=0), RFLAGS),
    "flag 15": (lambda m: long64(m, rflags=0x8002), RFLAGS),
    "flag 32": (lambda m: long64(m, rflags=1 << 32 | 2), RFLAGS),
    "VM in long mode": (lambda m: long64(m, rflags=VM | 2), RFLAGS),
    "VM without PE": (lambda m: real(m, rflags=VM | 2), RFLAGS),
    "L with D": (lambda m: code_segment(m, 0xE09B), CS),
    "base of virtual-8086 mode": (lambda m: vm86(m, base=0x10), VM86_SEGMENT),
    "limit of virtual-8086 mode": (lambda m: vm86(m, limit=0xFFFFF), VM86_SEGMENT),
    "rights of virtual-8086 mode": (lambda m: vm86(m, ar=0x93), VM86_SEGMENT),
    "unusable in virtual-8086 mode": (lambda m: vm86(m, ar=0xF1), VM86_SEGMENT),
    "rip of 33 bits": (lambda m: prot32(m, rip=1 << 32), RIP),
    "rip not canonical": (lambda m: long64(m, rip=1 << 47), RIP),
}


@pytest.mark.spec("exit.FAIL_ENTRY")
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    """Nothing is executed, nothing is changed, and a mended state runs."""
    prepare, what = REFUSED[name]
    m = Machine()
    m.load(CODE, b"\xf4")
    prepare(m)
    before = m.guest.rip, m.guest.rflags
    m.run(lib.EXIT_INVALID_STATE)
    assert m.exit.qualification == what
    assert (m.guest.rip, m.guest.rflags) == before
    m.long64(CODE)
    m.run(lib.EXIT_HLT)


@pytest.mark.spec("exit.FAIL_ENTRY")
@pytest.mark.parametrize("name", ["null tr", "null data", "null ss", "wide limits"])
def test_taken(name: str) -> None:
    """As with unrestricted guests: real mode with anything in its segments, and unusable ones."""
    m = Machine()
    m.load(CODE, b"\xf4")
    m.real(CODE) if name == "wide limits" else m.long64(CODE)
    if name == "null tr":
        m.set_seg("tr", 0, 0, 0, UNUSABLE)
    elif name == "null data":
        for segment in ("ds", "es", "fs", "gs"):
            m.set_seg(segment, 0, 0, 0, UNUSABLE)
    elif name == "null ss":
        m.set_seg("ss", 0, 0, 0, UNUSABLE)
    else:
        for segment in ("ds", "ss"):
            m.set_seg(segment, 0x1234, 0x100, 0xFFFFFFFF, 0x8093)
    m.run(lib.EXIT_HLT)


@pytest.mark.spec("fpu.state_ioctl")
@pytest.mark.tcg_differs("reserved bits of MXCSR are kept: SDM vol. 1 10.2.3")
def test_reserved_bits_of_mxcsr_do_not_get_to_the_host() -> None:
    m = Machine()
    m.asm("addps xmm1, xmm2; stmxcsr [rbx]; hlt")
    m.long64(CODE)
    m.set(rbx=0x100000, cr4=m.reg("cr4") | lib.X86_CR4_OSXMMEXCPT)
    m.guest.fpu.mxcsr = 0xABCD_1F00  # and #I unmasked: the exact way, which loads what is there
    m.run(lib.EXIT_HLT)
    assert m.read(0x100000, 4) == 0x1F00
