"""Instructions that this processor does not have, and says so in CPUID: docs/processor.md lists them.

Source: SDM vol. 2 by instruction; APM vol. 3; x86-cpu.md.
"""

from __future__ import annotations

import pytest

from pykvm.abi import lib
from tests.guest.bare import CODE, Machine

UD = 6
# name: bytes. Memory operands are at [rax] (16-bit: [bx + si]), which is 0.
VMX = {
    "vmlaunch": "0f01c2", "vmresume": "0f01c3", "vmxoff": "0f01c4", "vmfunc": "0f01d4", "vmread": "0f78c0",
    "vmwrite": "0f79c0", "vmptrld": "0fc730", "vmptrst": "0fc738", "vmclear": "660fc730", "vmxon": "f30fc730",
    "invept": "660f388000", "invvpid": "660f388100",
}  # fmt: skip
SVM = {
    "vmrun": "0f01d8", "vmload": "0f01da", "vmsave": "0f01db", "stgi": "0f01dc", "clgi": "0f01dd",
    "skinit": "0f01de", "invlpga": "0f01df",
}  # fmt: skip
TSX = {"xbegin": "c7f800000000", "xabort": "c6f800", "xend": "0f01d5", "xtest": "0f01d6"}
CET = {"incsspd": "f30faee8", "setssbsy": "f30f01e8", "saveprevssp": "f30f01ea", "rstorssp": "f30f0128",
       "clrssbsy": "f30fae30", "wrssd": "0f38f600", "wrussd": "660f38f500"}  # fmt: skip
# Hints for processors without it: endbr64, endbr32, rdsspd
CET_NOPS = {"endbr64": "f30f1efa", "endbr32": "f30f1efb", "rdsspd": "f30f1ec9"}
MPX_NOPS = {"bndmk": "f30f1b00", "bndcl": "f30f1a00", "bndstx": "0f1b00"}
OTHERS = {
    "rdpru": "0f01fd", "clzero": "0f01fc", "monitorx": "0f01fa", "mwaitx": "0f01fb", "invlpgb": "0f01fe",
    "getsec": "0f37", "pconfig": "0f01c5", "encls": "0f01cf", "enclu": "0f01d7", "ptwrite": "f30faee0",
    "umonitor": "f30faef0", "umwait": "f20faef0", "tpause": "660faef0", "movdiri": "0f38f900",
    "movdir64b": "660f38f800", "enqcmd": "f20f38f800", "rdmsrlist": "f20f01c6",
    "wrmsrns": "0f01c6", "uiret": "f30f01ec", "hreset": "f30f3af0c000", "femms": "0f0e", "pfadd": "0f0fc19e",
    "extrq": "660f79c1", "movntss": "f30f2b00", "jmpe": "0f00f0", "loadall": "0f04", "ud2; kvm": "0f0b6b766d",
}  # fmt: skip
EVEX = {"vmovdqu32 zmm0, zmm1": "62f17e486fc1", "vaddps xmm0 {k1}": "62f1740958c2", "kmovw": "c5f892c0"}
AMX = {"tilerelease": "c4e27849c0", "ldtilecfg": "c4e2784900"}
XOP = {"vphaddbw": "8fe978c1c0", "vfmaddps": "c4e3f168c210"}


@pytest.fixture
def m() -> Machine:
    return Machine()


def run(m: Machine, code: str, mode: str, cpl: int = 0, xcr0: int = 1) -> int:
    """The vector it raises, -1 for none; every bit of CPUID that a row may ask for is set."""
    bits = {"real": 16, "prot32": 32, "long64": 64}[mode]
    m.asm(f".byte {','.join(str(b) for b in bytes.fromhex(code))}; cpuid", CODE, bits)
    m.real(CODE) if mode == "real" else getattr(m, mode)(CODE, cpl)
    m.set(xcr0=xcr0, cr4=m.guest.cr4 | lib.X86_CR4_OSFXSR | lib.X86_CR4_OSXSAVE, rax=0x100000)
    return -1 if m.run() == lib.EXIT_CPUID else m.vector()


@pytest.mark.spec("cpu.vmx_svm")
@pytest.mark.parametrize("mode", ["prot32", "long64"])
@pytest.mark.parametrize("name", VMX | SVM)
def test_virtualization(m: Machine, name: str, mode: str) -> None:
    assert run(m, (VMX | SVM)[name], mode) == UD
    assert run(m, (VMX | SVM)[name], mode, 3) == UD


@pytest.mark.spec("cpu.vmx_svm", "cpu.cr_writes")
@pytest.mark.tcg_differs("reserved bits of CR4 are not checked: SDM vol. 2 MOV CR")
def test_vmxe_cannot_be_set(m: Machine) -> None:
    """Without it VMXON is not defined; ctl.cr4_valid is what the module offers."""
    m.asm("mov rax, cr4; or eax, 0x2000; bad: mov cr4, rax")
    m.long64(CODE)
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(2)) == (13, [0, m.symbols["bad"]])


@pytest.mark.spec("cpu.tsx", "cpu.ud_space")
@pytest.mark.tcg_differs("C6 and C7 are MOV whatever reg is: SDM vol. 2 MOV, C6 /0 and C7 /0")
@pytest.mark.parametrize("name", TSX)
def test_transactions(m: Machine, name: str) -> None:
    assert run(m, TSX[name], "long64") == UD


@pytest.mark.spec("cpu.tsx")
def test_hardware_lock_elision_is_a_prefix_without_meaning(m: Machine) -> None:
    m.asm("mov eax, 1; .byte 0xf2; lock add [0x500], eax; .byte 0xf3; mov dword ptr [0x504], 2; hlt")
    m.long64(CODE)
    m.run(lib.EXIT_HLT)
    assert (m.read(0x500, 4), m.read(0x504, 4)) == (1, 2)


@pytest.mark.spec("cpu.cet", "cpu.ud_space")
@pytest.mark.tcg_differs("INCSSPD is taken for LFENCE: SDM vol. 2 INCSSPD")
def test_control_flow_enforcement(m: Machine) -> None:
    for name, code in CET.items():
        assert run(m, code, "long64") == UD, name
    for name, code in CET_NOPS.items():
        for mode in ("real", "prot32", "long64"):
            m.set(rcx=0x1234)
            assert run(m, code, mode) == -1, name
            assert m.reg("rcx") == 0, name  # as `run` sets it: nothing was read into it
    m.asm("mov rax, cr4; or eax, 0x800000; bad: mov cr4, rax")
    m.long64(CODE)
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(2)) == (13, [0, m.symbols["bad"]])


@pytest.mark.spec("cpu.ud_space")
@pytest.mark.parametrize("name", MPX_NOPS)
def test_bound_registers_are_hints(m: Machine, name: str) -> None:
    """0F 1A and 0F 1B are NOPs of a ModRM byte: their address is not looked at."""
    for mode in ("prot32", "long64"):
        assert run(m, MPX_NOPS[name], mode) == -1


@pytest.mark.spec("cpu.ud_space", "cpu.rdrand", "cpu.fep", "cpu.monitor_mwait")
@pytest.mark.tcg_differs(
    "3DNow! and SSE4A are there, and 0F AE with any prefix is a fence: SDM vol. 2 UMONITOR, UMWAIT, TPAUSE"
)
@pytest.mark.parametrize("name", OTHERS)
def test_others(m: Machine, name: str) -> None:
    assert run(m, OTHERS[name], "long64") == UD


@pytest.mark.spec("cpu.ud_space", "fpu.avx512")
@pytest.mark.parametrize("name", EVEX | AMX | XOP)
def test_vectors_of_others(m: Machine, name: str) -> None:
    """EVEX (AVX-512), AMX, XOP and FMA4."""
    assert run(m, (EVEX | AMX | XOP)[name], "long64", xcr0=7) == UD


@pytest.mark.spec("cpu.ud_space")
def test_bound_and_les_are_not_prefixes_outside_64_bit_mode(m: Machine) -> None:
    """62, C4, C5 with a memory operand, in real mode whatever the operand; VEX is for protected mode."""
    for code, register in (("c400", "es"), ("c500", "ds")):
        m.asm(f".byte {','.join(str(b) for b in bytes.fromhex(code))}; hlt", CODE, 16)
        m.real(CODE)
        m.load(0x500, b"\x11\x22\x33\x44")
        m.set(rbx=0x500, rax=0)
        m.run(lib.EXIT_HLT)
        assert (m.reg("rax") & 0xFFFF, m.seg(register).selector) == (0x2211, 0x4433)
    for code in ("62f17e486fc1", "c5f877", "c4e27849c0"):
        assert run(m, code, "real") == UD


@pytest.mark.spec("cpu.lam", "cpu.cr_writes")
@pytest.mark.parametrize(("register", "bit"), [("cr3", 61), ("cr3", 62), ("cr4", 28)])
def test_linear_address_masking(m: Machine, register: str, bit: int) -> None:
    """Not offered: its bits are reserved, and addresses are compared whole."""
    m.asm(f"movabs rbx, {1 << bit}; mov rax, {register}; or rax, rbx; bad: mov {register}, rax")
    m.long64(CODE)
    m.ctl.cpuid[lib.CPU_CPUID_7_1_EAX] = 0
    m.set(cr4=m.guest.cr4)
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(2)) == (13, [0, m.symbols["bad"]])
