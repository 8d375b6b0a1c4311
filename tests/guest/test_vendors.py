"""Where AMD's processors differ from Intel's; every other test is of Intel's.

ctl.flags says which one the processor is (CPU_AMD), and that the guest's CPUID says the other one
(CPU_OTHER_VENDOR), for which KVM emulates the system calls that this one lacks.
Source: APM vol. 3 SYSCALL, SYSRET, SYSENTER, SYSEXIT, "CALL (Far)", LFS; vol. 2 4.8.1, 15.5.1; SDM
vol. 2 by instruction; Linux arch/x86/kvm/emulate.c em_syscall, em_sysenter.
"""

from __future__ import annotations

import pytest

from pykvm.abi import lib
from tests.guest.bare import CODE, CODE32, CODE64, DATA32, STACK, USER_CODE32, USER_CODE64, USER_DATA, Machine

UD, SS, GP = 6, 12, 13
IF, RF, TF = 0x200, 0x10000, 0x100
TARGET = CODE + 0x800
NON_CANONICAL = 0x8000_0000_1000
STAR = CODE64 << 32 | (USER_CODE32 | 3) << 48
INTEL, AMD = 0, lib.CPU_AMD
OTHER = lib.CPU_OTHER_VENDOR
UNUSABLE = lib.CPU_AR_UNUSABLE


@pytest.fixture
def m() -> Machine:
    return Machine()


def start(m: Machine, mode: str, source: str, flags: int, cpl: int = 3) -> None:
    """`mode`: long64, compat or prot32."""
    m.asm(source, CODE, 64 if mode == "long64" else 32)
    if mode == "compat":
        m.long64(CODE, cpl)
        m.set_seg("cs", USER_CODE32 | 3 if cpl else CODE32, 0, 0xFFFFFFFF, 0xC0FB if cpl else 0xC09B)
    else:
        getattr(m, mode)(CODE, cpl)
    m.asm("cpuid", TARGET)
    m.set(star=STAR, lstar=TARGET, cstar=TARGET, sfmask=IF, efer=m.guest.efer | 1)
    m.set(sysenter_cs=CODE64 if mode != "prot32" else CODE32, sysenter_eip=TARGET, sysenter_esp=0x7000)
    m.ctl.flags = m.ctl.flags & ~(AMD | OTHER) | flags


def undefined(m: Machine) -> None:
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(1)) == (UD, [m.symbols["bad"]])


@pytest.mark.spec("cpu.syscall")
@pytest.mark.parametrize("flags", [AMD, AMD | OTHER, INTEL | OTHER])
def test_syscall_in_compatibility_mode_goes_to_cstar(m: Machine, flags: int) -> None:
    start(m, "compat", "syscall; back: hlt", flags)
    m.set(lstar=NON_CANONICAL - 1, rflags=2 | IF | 1)
    m.run(lib.EXIT_CPUID)
    assert (m.guest.rip, m.cpl) == (TARGET, 0)
    assert (m.reg("rcx"), m.reg("r11")) == (m.symbols["back"], 2 | IF | 1)
    assert m.guest.rflags == 3
    assert (m.seg("cs").selector, m.seg("cs").ar, m.seg("ss").selector) == (CODE64, 0xA09B, CODE64 + 8)


@pytest.mark.spec("cpu.syscall")
def test_syscall_outside_long_mode_goes_to_star(m: Machine) -> None:
    start(m, "prot32", "syscall; back: hlt", AMD)
    m.asm("cpuid", TARGET, 32)
    m.set(star=CODE32 << 32 | TARGET, rflags=2 | IF, r11=0x1234)
    m.run(lib.EXIT_CPUID)
    assert (m.guest.rip, m.cpl, m.reg("rcx"), m.reg("r11")) == (TARGET, 0, m.symbols["back"], 0x1234)
    assert m.guest.rflags == 2
    assert (m.seg("cs").selector, m.seg("cs").ar, m.seg("ss").ar) == (CODE32, 0xC09B, 0xC093)


@pytest.mark.spec("cpu.syscall")
@pytest.mark.tcg_differs("SYSCALL in every mode: AMD's, SDM vol. 2 SYSCALL has it undefined")
@pytest.mark.parametrize("mode", ["compat", "prot32"])
def test_syscall_of_intels_is_for_64_bit_mode(m: Machine, mode: str) -> None:
    start(m, mode, "bad: syscall", INTEL)
    undefined(m)
    start(m, mode, "bad: sysret", INTEL, cpl=0)
    undefined(m)
    start(m, mode, "bad: sysret", INTEL)  # before its privilege
    undefined(m)


@pytest.mark.spec("cpu.syscall")
@pytest.mark.parametrize("flags", [INTEL, AMD])
@pytest.mark.parametrize("code", ["syscall", "sysretq"])
def test_sce_before_privilege(m: Machine, flags: int, code: str) -> None:
    start(m, "long64", f"bad: {code}", flags)
    m.set(efer=m.guest.efer & ~1)
    undefined(m)


@pytest.mark.spec("cpu.syscall")
@pytest.mark.parametrize("mode", ["compat", "prot32"])
def test_amds_sysret_outside_64_bit_mode(m: Machine, mode: str) -> None:
    """R11 is not looked at, and IF is set."""
    start(m, mode, "sysret", AMD, cpl=0)
    m.asm("cpuid", TARGET, 32)
    m.set(rcx=TARGET, r11=0xFFFF, rflags=3)
    m.run(lib.EXIT_CPUID)
    assert (m.guest.rip, m.guest.rflags, m.cpl) == (TARGET, 3 | IF, 3)
    assert (m.seg("cs").selector, m.seg("cs").ar) == (USER_CODE32 | 3, 0xC0FB)
    start(m, mode, "bad: sysret", AMD)
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(2)) == (GP, [0, m.symbols["bad"]])


@pytest.mark.spec("cpu.syscall")
def test_amds_sysret_loads_nothing_of_ss_but_the_selector(m: Machine) -> None:
    """After an interrupt's null SS the stack of 32-bit code is not usable: Linux's SYSRET_SS_ATTRS."""
    for flags, vector in ((AMD, SS), (INTEL, 0x80)):
        start(m, "long64", ".byte 0x0f, 7", flags, cpl=0)
        m.asm("push eax; int 0x80", TARGET, 32)
        m.load(0x2000 + 16 * 0x80 + 5, b"\xee")
        m.set_seg("ss", 0, 0, 0, UNUSABLE)
        m.set(rcx=TARGET, r11=2, rsp=STACK)
        m.run(lib.EXIT_HLT)
        assert m.vector() == vector
        assert m.frame(6 if vector == SS else 5)[-1] == USER_DATA | 3


@pytest.mark.spec("cpu.syscall")
def test_amds_sysret_to_a_non_canonical_address_faults_there(m: Machine) -> None:
    start(m, "long64", "bad: sysretq", AMD, cpl=0)
    m.set(rcx=NON_CANONICAL, r11=2)
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(3)) == (GP, [0, NON_CANONICAL, USER_CODE64 | 3])


@pytest.mark.spec("cpu.syscall")
def test_entry_with_a_non_canonical_rip(m: Machine) -> None:
    """APM vol. 2 15.5.1 does not check it, SDM vol. 3 26.3.1.4 does."""
    start(m, "long64", "nop", INTEL)
    m.set(rip=NON_CANONICAL)
    m.run(lib.EXIT_INVALID_STATE)
    m.ctl.flags |= AMD
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(2)) == (GP, [0, NON_CANONICAL])


@pytest.mark.spec("cpu.sysenter")
@pytest.mark.parametrize(
    ("mode", "flags", "there"),
    [
        ("long64", INTEL, True),
        ("compat", INTEL, True),
        ("prot32", INTEL, True),
        ("long64", AMD, False),
        ("compat", AMD, False),
        ("prot32", AMD, True),
        ("long64", AMD | OTHER, False),
        ("compat", AMD | OTHER, True),
    ],
)
def test_sysenter(m: Machine, mode: str, flags: int, there: bool) -> None:
    start(m, mode, "bad: sysenter", flags)
    if there:
        m.run(lib.EXIT_CPUID)
        assert (m.guest.rip, m.reg("rsp"), m.cpl) == (TARGET, 0x7000, 0)
        assert bool(m.seg("cs").ar & lib.CPU_AR_L) == (mode != "prot32")
    else:
        undefined(m)


@pytest.mark.spec("cpu.sysenter")
@pytest.mark.parametrize(
    ("mode", "flags", "there"),
    [("compat", INTEL, True), ("compat", AMD, False), ("prot32", AMD, True), ("long64", AMD | OTHER, True)],
)
def test_sysexit(m: Machine, mode: str, flags: int, there: bool) -> None:
    start(m, mode, "bad: .byte 0x0f, 0x35", flags, cpl=0)
    m.asm("cpuid", TARGET, 32)
    m.set(rdx=TARGET, rcx=0x7000, sysenter_cs=CODE32)
    if there:
        m.run(lib.EXIT_CPUID)
        assert (m.guest.rip, m.reg("rsp"), m.cpl, m.seg("cs").selector) == (
            TARGET,
            0x7000,
            3,
            CODE32 + 16 | 3,
        )
    else:
        undefined(m)
    start(m, mode, "bad: .byte 0x0f, 0x35", flags)  # privileged before it is defined: measured on Zen 5
    m.run(lib.EXIT_HLT)
    assert m.vector() == GP


@pytest.mark.spec("cpu.fsgsbase", "cpu.seg_load")
@pytest.mark.parametrize(("flags", "value"), [(INTEL, 0), (AMD, 0x11)])
def test_null_selector_and_the_base_of_fs(m: Machine, flags: int, value: int) -> None:
    start(m, "long64", "xor eax, eax; mov fs, eax; mov bl, fs:[0x500]; cpuid", flags)
    m.ram[0x500], m.ram[0x1500] = 0, 0x11
    m.set_seg("fs", USER_DATA | 3, 0x1000, 0xFFFFFFFF, 0xC0F3)
    m.run(lib.EXIT_CPUID)
    assert m.reg("rbx") == value
    assert m.seg("fs").ar & UNUSABLE


@pytest.mark.spec("cpu.far_transfers")
@pytest.mark.tcg_differs("no m16:64 in LGS: SDM vol. 2 LDS")
@pytest.mark.parametrize("flags", [INTEL, AMD])
def test_far_pointers_with_rex_w(m: Machine, flags: int) -> None:
    """m16:64 is Intel's: AMD's read m16:32 all the same."""
    wide = flags == INTEL
    pointer = TARGET.to_bytes(8 if wide else 4, "little") + CODE64.to_bytes(2, "little")
    start(m, "long64", "rex.w call fword ptr [0x500]; back: hlt", flags, cpl=0)
    m.load(0x500, pointer.ljust(12, b"\xff"))
    m.run(lib.EXIT_CPUID)
    assert m.guest.rip == TARGET
    size = 8 if wide else 4
    frame = [m.read(m.reg("rsp") + size * k, size) for k in range(2)]
    assert (frame, m.reg("rsp")) == ([m.symbols["back"], CODE64], STACK - 2 * size)
    start(m, "long64", "rex.w jmp fword ptr [0x500]", flags, cpl=0)
    m.load(0x500, pointer.ljust(12, b"\xff"))
    m.run(lib.EXIT_CPUID)
    assert m.guest.rip == TARGET
    pointer = pointer[:-2] + DATA32.to_bytes(2, "little")
    start(m, "long64", ".byte 0x48, 0x0f, 0xb5, 4, 0x25; .long 0x500; cpuid", flags, cpl=0)
    m.load(0x500, pointer.ljust(12, b"\xff"))
    m.set(rax=-1 & 2**64 - 1)
    m.run(lib.EXIT_CPUID)
    assert (m.reg("rax"), m.seg("gs").selector) == (TARGET, DATA32)
