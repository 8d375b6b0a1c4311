"""RESET and INIT of the processor: what each sets, and what INIT leaves alone.

Source: SDM vol. 3 table 9-1; Linux x86.c kvm_vcpu_reset.
"""

from __future__ import annotations

import pytest

from pykvm.abi import ffi, lib
from tests.guest.bare import CODE, GPRS, SEGMENTS, Machine

CD_NW = 0x60000000
KEPT_MSRS = (
    "star", "lstar", "cstar", "sfmask", "kernel_gs_base", "sysenter_cs", "sysenter_esp", "sysenter_eip", "tsc_aux",
)  # fmt: skip


@pytest.fixture
def used() -> Machine:
    """A processor in 64-bit mode whose every register has been used."""
    m = Machine()
    m.asm("fld1; movaps xmm5, [0x100000]; mov eax, 7; xor edx, edx; xor ecx, ecx; cpuid")
    m.long64(CODE)
    m.set(**{r: 0x1234 for r in GPRS if r != "rsp"})
    m.set(rflags=0x246AD7 & ~0x100, cr2=0x5555, cr8=9, dr0=1, dr1=2, dr2=3, dr3=4, dr6=0xFFFF4FFF, dr7=0x700)
    m.set(**dict.fromkeys(KEPT_MSRS, 0x1000), xcr0=7, pkru=0x55, cr4=m.guest.cr4 | lib.X86_CR4_PCIDE)
    m.write(0x100000, 0x1122334455667788)
    for name in ("fs", "gs"):
        m.seg(name).base = 0x7777
    m.guest.interruptibility = lib.CPU_BLOCK_NMI
    m.run(lib.EXIT_CPUID)
    m.guest.pending_dbg = lib.DR6_BS
    m.inject(0x30)
    return m


@pytest.mark.spec("cpu.reset_vector")
@pytest.mark.parametrize("init", [0, 1])
def test_what_both_set(used: Machine, init: int) -> None:
    used.guest.cr0 = used.guest.cr0 | CD_NW
    lib.cpu_reset(used.cpu, init)
    g = used.guest
    assert [used.reg(r) for r in GPRS] == [0x600 if r == "rdx" else 0 for r in GPRS]
    assert (g.rip, g.rflags) == (0xFFF0, 2)
    assert (g.cr0, g.cr2, g.cr3, g.cr4, g.cr8, g.efer) == (CD_NW | 0x10, 0, 0, 0, 0, 0)
    assert ([g.dr[n] for n in range(4)], g.dr6, g.dr7) == ([0] * 4, 0xFFFF0FF0, 0x400)
    assert (g.interruptibility, g.pending_dbg, g.activity) == (0, 0, lib.CPU_ACTIVE)
    for table in (g.gdtr, g.idtr):
        assert (table.base, table.limit) == (0, 0xFFFF)
    for name in SEGMENTS:
        s = used.seg(name)
        at = (0xF000, 0xFFFF0000) if name == "cs" else (0, 0)
        ar = {"cs": 0x9B, "ldtr": 0x82, "tr": 0x8B}.get(name, 0x93)
        assert (s.selector, s.base, s.limit, s.ar) == (*at, 0xFFFF, ar), name
    assert not used.ctl.entry_event.info & lib.CPU_EVENT_VALID, "the interrupt is gone"


@pytest.mark.spec("cpu.reset_vector")
def test_init_keeps_the_fpu_and_msrs(used: Machine) -> None:
    """And CD and NW are whatever they were, set or clear."""
    before = bytes(ffi.buffer(ffi.addressof(used.guest, "fpu")))
    assert used.guest.fpu.ftw
    lib.cpu_reset(used.cpu, 1)
    assert bytes(ffi.buffer(ffi.addressof(used.guest, "fpu"))) == before
    assert {name: used.reg(name) for name in KEPT_MSRS} == dict.fromkeys(KEPT_MSRS, 0x1000)
    assert (used.guest.xcr0, used.guest.pkru, used.guest.cr0) == (7, 0x55, 0x10)


@pytest.mark.spec("cpu.reset_vector")
def test_reset_clears_them(used: Machine) -> None:
    lib.cpu_reset(used.cpu, 0)
    assert {name: used.reg(name) for name in KEPT_MSRS} == dict.fromkeys(KEPT_MSRS, 0)
    g = used.guest
    assert (g.xcr0, g.pkru, g.cr0) == (1, 0, CD_NW | 0x10)
    assert (g.fpu.fcw, g.fpu.fsw, g.fpu.ftw, g.fpu.mxcsr) == (0x37F, 0, 0, 0x1F80)
    assert not any(bytes(ffi.buffer(ffi.addressof(g.fpu, "ymm"))))


@pytest.mark.spec("cpu.reset_vector")
@pytest.mark.parametrize("init", [0, 1])
def test_it_runs_from_there(used: Machine, init: int) -> None:
    """Translations and decoded code of before are gone."""
    used.map(0xFFFFF000, target=0x50000)
    used.load(0x50FF0, b"\xb8\x34\x12\xf4")  # mov ax, 0x1234: as 32-bit code it would be longer
    lib.cpu_reset(used.cpu, init)
    used.run(lib.EXIT_HLT)
    assert (used.reg("rax"), used.guest.rip) == (0x1234, 0xFFF4)
