"""System instructions: control and debug registers, MSRs, flags, time, TLB, and exits.

Source: SDM vol. 3 chapter 2, 4.1, 4.4, 17.2; vol. 2 by instruction; x86-cpu.md, cpuid-msr-pv.md section 4.
"""

from __future__ import annotations

import pytest

from pykvm.abi import lib
from tests.guest.bare import (
    CODE,
    CODE32,
    CODE64,
    DATA32,
    HANDLERS,
    PML4,
    STACK,
    STACK0,
    TSS,
    Machine,
)

RF, IF, TF, NT, VM, AC, ID = 0x10000, 0x200, 0x100, 0x4000, 0x20000, 0x40000, 0x200000
DB, UD, NP, SS, GP, PF = 1, 6, 11, 12, 13, 14
DATA = 0x500
NON_CANONICAL = 0x8000_0000_1000
PE, MP, EM, TS, ET, NE, WP, AM = 1, 2, 4, 8, 0x10, 0x20, 0x10000, 0x40000
NW, CD, PG = 0x20000000, 0x40000000, 0x80000000


@pytest.fixture
def m() -> Machine:
    return Machine()


def start(m: Machine, mode: str, source: str, cpl: int = 0) -> None:
    bits = {"real": 16, "vm86": 16, "prot32": 32, "long64": 64}[mode]
    m.asm(source, CODE, bits=bits)
    if mode == "real":
        m.real(CODE)
    elif mode == "vm86":
        m.vm86(CODE >> 4, 0)
    else:
        getattr(m, mode)(CODE, cpl)


def faults(m: Machine, vector: int, error: int | None = 0) -> None:
    m.run(lib.EXIT_HLT)
    expected = [m.symbols["bad"]] if error is None else [error, m.symbols["bad"]]
    assert (m.vector(), m.frame(len(expected))) == (vector, expected)


def write(m: Machine, mode: str, register: str, value: int) -> None:
    """Run `mov register, value` and the HLT behind it."""
    reg = "rax" if mode == "long64" else "eax"
    start(m, mode, f"mov {reg}, {value}; bad: mov {register}, {reg}; cpuid")


# ---- control registers


@pytest.mark.spec("cpu.cr_writes")
@pytest.mark.tcg_differs("reserved bits and combinations are not checked: SDM vol. 2 MOV CR, vol. 3 2.5")
@pytest.mark.parametrize(
    ("value", "result"),
    [
        (PE, PE | ET),
        (PE | ET | NE | WP | AM | MP | EM | TS, PE | ET | NE | WP | AM | MP | EM | TS),
        (PE | CD, PE | ET | CD),
        (PE | CD | NW, PE | ET | CD | NW),
        (PE | 0x1FFA_FFC0, PE | ET),  # reserved bits are ignored
        (PE | NW, None),
        (PG, None),
    ],
)
def test_cr0(m: Machine, value: int, result: int | None) -> None:
    write(m, "prot32", "cr0", value)
    if result is None:
        faults(m, GP)
    else:
        m.run(lib.EXIT_CPUID)
        assert m.guest.cr0 == result


@pytest.mark.spec("cpu.cr_writes")
@pytest.mark.tcg_differs("reserved bits and combinations are not checked: SDM vol. 2 MOV CR, vol. 3 2.5")
def test_cr0_in_64_bit_mode(m: Machine) -> None:
    write(m, "long64", "cr0", 1 << 32 | 0x80010033)
    faults(m, GP)
    write(m, "long64", "cr0", 0x00010033)  # PG cannot be cleared in 64-bit code
    faults(m, GP)
    write(m, "long64", "cr0", 0x80000033)
    m.run(lib.EXIT_CPUID)
    assert m.guest.cr0 == 0x80000033


ENTER_LONG = f"""
    mov eax, {PML4}
    mov cr3, eax
    mov eax, cr4
    or eax, 0x20
    mov cr4, eax
    mov eax, cr0
    or eax, 0x80000000
    bad: mov cr0, eax
    jmp {CODE64}:1f
    .code64
1:  mov rbx, 0x123456789abcdef0
    jmp fword ptr [0x500]
    .code32
2:  mov eax, cr0
    and eax, 0x7fffffff
    mov cr0, eax
    nop
    cpuid
    .set compat, 2b
"""


@pytest.mark.spec("cpu.long_mode", "cpu.lmode_exit", "cpu.paging_modes")
def test_entering_and_leaving_long_mode(m: Machine) -> None:
    m.long64(0)  # for its page tables and GDT
    m.asm(ENTER_LONG, CODE, 32)
    m.set(cr0=0x11, cr3=0, cr4=0, efer=lib.EFER_LME, rip=CODE)
    m.set_seg("cs", CODE32, 0, 0xFFFFFFFF, 0xC09B)
    m.load(DATA, m.symbols["compat"].to_bytes(4, "little") + CODE32.to_bytes(2, "little"))
    m.run(lib.EXIT_CPUID)
    assert m.reg("rbx") == 0x123456789ABCDEF0
    assert m.guest.efer == lib.EFER_LME
    assert m.guest.cr0 == 0x11


@pytest.mark.spec("cpu.long_mode", "cpu.cr_writes")
@pytest.mark.tcg_differs("reserved bits and combinations are not checked: SDM vol. 2 MOV CR, vol. 3 2.5")
def test_paging_with_lme_needs_pae_and_no_64_bit_segment(m: Machine) -> None:
    write(m, "prot32", "cr0", PG | PE)
    m.set(efer=lib.EFER_LME)
    faults(m, GP)
    m.asm("mov eax, 0x80000001; bad: mov cr0, eax", CODE, 16)
    m.prot32(CODE)
    m.set(efer=lib.EFER_LME, cr4=lib.X86_CR4_PAE, cr3=PML4)
    m.set_seg("cs", CODE64, 0, 0xFFFFFFFF, 0xA09B)  # before LMA, L means nothing and D = 0 16 bits
    faults(m, GP)


PAE_TABLE = 0x100000


@pytest.mark.spec("cpu.reserved_bits", "cpu.cr_writes")
@pytest.mark.parametrize("pdpte", [0x101001, 0x101003, 1 << 40 | 1, 0])
def test_pdptes_are_loaded_with_cr3(m: Machine, pdpte: int) -> None:
    start(m, "prot32", f"mov eax, {PAE_TABLE}; bad: mov cr3, eax; cpuid")
    m.load(PAE_TABLE, bytes(32))
    m.write(PAE_TABLE, 0x101001)
    m.write(PAE_TABLE + 24, pdpte)
    m.write(0x101000, 0xE7)
    m.set(cr0=PG | PE | ET, cr4=lib.X86_CR4_PAE, cr3=PAE_TABLE)
    m.guest.pdptr[0] = 0x101001
    if pdpte in {0x101003, 1 << 40 | 1}:
        faults(m, GP)
        assert m.guest.pdptr[3] == 0
    else:
        m.run(lib.EXIT_CPUID)
        assert m.guest.pdptr[3] == pdpte
        m.write(PAE_TABLE + 24, 0x101001)
        m.asm("mov eax, cr4; or eax, 0x80; mov cr4, eax; cpuid", CODE, 32)
        m.set(rip=CODE)
        m.run(lib.EXIT_CPUID)
        assert m.guest.pdptr[3] == 0x101001, "CR4.PGE reloads"


@pytest.mark.spec("cpu.cr_writes", "cpu.reserved_bits")
def test_cr3(m: Machine) -> None:
    for bit in (40, 51, 62, 63):
        write(m, "long64", "cr3", PML4 | 1 << bit)
        m.ctl.cpuid[lib.CPU_CPUID_7_1_EAX] = 0
        faults(m, GP)
    write(m, "long64", "cr3", PML4 | 0x18)
    m.run(lib.EXIT_CPUID)
    assert m.guest.cr3 == PML4 | 0x18


@pytest.mark.spec("cpu.pcid", "cpu.cr_writes")
@pytest.mark.tcg_differs("there are no PCIDs")
def test_pcid_rules(m: Machine) -> None:
    pcide = lib.X86_CR4_PAE | lib.X86_CR4_PCIDE
    write(m, "long64", "cr3", PML4 | 1 << 63 | 5)
    m.set(cr4=pcide)
    m.run(lib.EXIT_CPUID)
    assert m.guest.cr3 == PML4 | 5
    write(m, "long64", "cr4", pcide)
    m.set(cr3=PML4 | 5)
    faults(m, GP)
    write(m, "long64", "cr4", pcide)
    m.run(lib.EXIT_CPUID)
    write(m, "prot32", "cr4", pcide)
    faults(m, GP)


@pytest.mark.spec("cpu.cr_writes", "cpu.la57")
@pytest.mark.tcg_differs("reserved bits and combinations are not checked: SDM vol. 2 MOV CR, vol. 3 2.5")
@pytest.mark.parametrize(
    ("mode", "value", "ok"),
    [
        ("prot32", 0x7F7, True),
        ("prot32", 0x2000, False),  # not in ctl.cr4_valid
        ("prot32", 0x80000000, False),
        ("long64", 0x200, False),  # PAE
        ("long64", 0x1020, False),  # LA57
        ("long64", 0x2A0, True),
        ("long64", 1 << 40 | 0x220, False),
    ],
)
def test_cr4(m: Machine, mode: str, value: int, ok: bool) -> None:
    write(m, mode, "cr4", value)
    if ok:
        m.run(lib.EXIT_CPUID)
        assert m.guest.cr4 == value
    else:
        faults(m, GP)


@pytest.mark.spec("cpu.cr8_tpr")
@pytest.mark.tcg_differs("reserved bits and combinations are not checked: SDM vol. 2 MOV CR, vol. 3 2.5")
def test_cr8(m: Machine) -> None:
    write(m, "long64", "cr8", 16)
    faults(m, GP)
    write(m, "long64", "cr8", 9)
    m.run(lib.EXIT_CPUID)
    assert m.guest.cr8 == 9
    m.asm("mov eax, 12; mov cr8, rax; mov eax, 3; mov cr8, rax; mov rbx, cr8; cpuid")
    m.set(rip=CODE)
    m.ctl.flags |= lib.CPU_EXIT_CR8
    m.run(lib.EXIT_CR_ACCESS)
    assert (m.exit.qualification, m.guest.cr8, m.guest.rip) == (8, 3, CODE + 18)
    m.run(lib.EXIT_CPUID)
    assert m.reg("rbx") == 3


@pytest.mark.spec("cpu.cr_writes")
def test_control_registers_that_do_not_exist(m: Machine) -> None:
    for n in (1, 5, 6, 7):
        start(m, "prot32", f"bad: .byte 0x0f, 0x20, {0xC0 | n << 3}")
        faults(m, UD, None)
        start(m, "prot32", f"bad: .byte 0x0f, 0x22, {0xC0 | n << 3}")
        faults(m, UD, None)


@pytest.mark.spec("cpu.cr_writes")
def test_trap_like_exits(m: Machine) -> None:
    start(
        m, "long64", "mov rax, cr0; mov cr0, rax; xor eax, 8; mov cr0, rax; mov rax, cr3; mov cr3, rax; hlt"
    )
    m.ctl.flags |= lib.CPU_EXIT_CR0_CR4 | lib.CPU_EXIT_CR3
    m.run(lib.EXIT_CR_ACCESS)  # the first write changes nothing
    assert (m.exit.qualification, m.guest.cr0 & TS, m.guest.rip) == (0, TS, CODE + 12)
    m.run(lib.EXIT_CR_ACCESS)
    assert (m.exit.qualification, m.guest.rip) == (3, CODE + 18)
    m.run(lib.EXIT_HLT)


@pytest.mark.spec("cpu.smsw_lmsw")
def test_lmsw_never_clears_pe(m: Machine) -> None:
    start(m, "prot32", "mov eax, 0xfffe; lmsw ax; mov ebx, -1; smsw bx; smsw ecx; smsw [0x500]; hlt")
    m.write(DATA, 0xFFFFFFFF, 4)
    m.run(lib.EXIT_HLT)
    assert m.guest.cr0 == 0x1F
    assert (m.reg("rbx"), m.reg("rcx"), m.read(DATA, 4)) == (0xFFFF001F, 0x1F, 0xFFFF001F)
    start(m, "prot32", "xor eax, eax; lmsw ax; hlt")
    m.set(cr0=0x1F)
    m.run(lib.EXIT_HLT)
    assert m.guest.cr0 == 0x11
    start(m, "real", "mov ax, 1; lmsw ax; smsw eax; hlt")
    m.run(lib.EXIT_HLT)
    assert (m.guest.cr0, m.reg("rax")) == (0x11, 0x11)


@pytest.mark.spec("cpu.cr_writes")
def test_clts(m: Machine) -> None:
    start(m, "prot32", "clts; hlt")
    m.set(cr0=0x19)
    m.run(lib.EXIT_HLT)
    assert m.guest.cr0 == 0x11


@pytest.mark.spec("cpu.wp", "cpu.tlb_rules")
def test_wp_takes_effect_at_once(m: Machine) -> None:
    toggle = "mov rax, cr0; xor eax, 0x10000; mov cr0, rax"
    start(
        m, "long64", f"{toggle}; mov [0x200000], eax; {toggle}; mov ebx, [0x200000]; bad: mov [0x200000], eax"
    )
    m.write(0x6008, 0x200000 | 0xA5)
    faults(m, PF, lib.PFERR_PRESENT_MASK | lib.PFERR_WRITE_MASK)
    assert m.read(0x200000, 4) == m.reg("rbx") == 0x80000033


# ---- debug registers


@pytest.mark.spec("cpu.dr_access")
@pytest.mark.tcg_differs("fixed bits of DR6 and DR7 can be changed: SDM vol. 3 17.2")
def test_dr6_dr7_fixed_bits_and_aliases(m: Machine) -> None:
    source = "mov rax, 0xffffffff; mov dr6, rax; mov rbx, dr6; mov dr7, rax; xor eax, eax; mov rcx, dr7"
    start(m, "long64", f"xor eax, eax; mov dr6, rax; mov rdx, dr6; mov dr7, rax; mov rsi, dr5; {source}")
    m.asm("hlt", HANDLERS + 16)
    m.run(lib.EXIT_HLT)
    assert (m.reg("rdx"), m.reg("rsi")) == (0xFFFF0FF0, 0x400)
    assert m.reg("rbx") == 0xFFFFEFFF
    assert m.guest.dr6 & lib.DR6_BD, "GD was among the bits"
    assert m.guest.dr7 == 0xFFFF2FFF & ~0x2000 | 0x400
    start(m, "long64", "mov rax, 0x1234567890; mov dr3, rax; mov rbx, dr3; hlt")
    m.run(lib.EXIT_HLT)
    assert m.reg("rbx") == 0x1234567890


@pytest.mark.spec("cpu.dr_access")
def test_debug_register_faults(m: Machine) -> None:
    for code in ("mov rax, dr4", "mov dr5, rax"):
        start(m, "long64", f"bad: {code}")
        m.set(cr4=m.guest.cr4 | lib.X86_CR4_DE)
        faults(m, UD, None)
    for dr in (6, 7):
        start(m, "long64", f"mov rax, 0x100000000; bad: mov dr{dr}, rax")
        faults(m, GP)


@pytest.mark.spec("cpu.dr_access")
def test_dr_exit_names_the_registers(m: Machine) -> None:
    start(m, "long64", "mov dr7, r9; hlt")
    m.ctl.flags |= lib.CPU_EXIT_DR
    m.set(dr7=0x2400)
    m.run(lib.EXIT_DR_ACCESS)  # before the #DB of GD
    assert (m.exit.qualification, m.guest.rip) == (7 | 1 << 4 | 9 << 8, CODE)
    m.skip()
    m.run(lib.EXIT_HLT)
    assert m.guest.rip == CODE + 5


# ---- MSRs

OWN = {
    "MSR_FS_BASE": None,
    "MSR_GS_BASE": None,
    "MSR_KERNEL_GS_BASE": "kernel_gs_base",
    "MSR_STAR": "star",
    "MSR_LSTAR": "lstar",
    "MSR_CSTAR": "cstar",
    "MSR_SYSCALL_MASK": "sfmask",
    "MSR_IA32_SYSENTER_CS": "sysenter_cs",
    "MSR_IA32_SYSENTER_ESP": "sysenter_esp",
    "MSR_IA32_SYSENTER_EIP": "sysenter_eip",
    "MSR_TSC_AUX": "tsc_aux",
}


@pytest.mark.spec("cpu.wrmsr_gp", "msr.vmm_set")
@pytest.mark.parametrize("name", OWN)
def test_msrs_of_the_processor(m: Machine, name: str) -> None:
    number, field = getattr(lib, name), OWN[name]
    value = 0x1234 if name in {"MSR_TSC_AUX", "MSR_IA32_SYSENTER_CS"} else 0x0000_1234_5678_9ABC
    start(m, "long64", "wrmsr; xor eax, eax; xor edx, edx; rdmsr; cpuid")
    m.set(rcx=number | 0xFFFFFFFF_00000000, rax=value & 0xFFFFFFFF, rdx=value >> 32)
    m.run(lib.EXIT_CPUID)
    assert m.reg("rdx") << 32 | m.reg("rax") == value
    if field:
        assert getattr(m.guest, field) == value
    m.ctl.flags |= lib.CPU_EXIT_MSR_ALL
    m.set(rip=CODE)
    m.run(lib.EXIT_WRMSR)
    assert m.guest.rip == CODE


@pytest.mark.spec("msr.canonical", "cpu.wrmsr_gp")
@pytest.mark.tcg_differs("no check that addresses are canonical: SDM vol. 2 WRMSR")
@pytest.mark.parametrize("name", [n for n in OWN if "BASE" in n or "STAR" in n or "ESP" in n or "EIP" in n])
def test_canonical_msrs(m: Machine, name: str) -> None:
    start(m, "long64", "bad: wrmsr; cpuid")
    m.set(rcx=getattr(lib, name), rax=0x1000, rdx=0x8000)
    if name == "MSR_STAR":
        m.run(lib.EXIT_CPUID)
    else:
        faults(m, GP)


@pytest.mark.spec("cpu.wrmsr_gp")
@pytest.mark.tcg_differs("bits 32 to 63 of TSC_AUX can be set: SDM vol. 4 table 2-2")
def test_tsc_aux_has_32_bits_and_needs_a_feature(m: Machine) -> None:
    start(m, "long64", "bad: wrmsr")
    m.set(rcx=lib.MSR_TSC_AUX, rdx=1)
    faults(m, GP)
    start(m, "long64", "bad: wrmsr")
    m.set(rcx=lib.MSR_TSC_AUX)
    m.ctl.cpuid[lib.CPU_CPUID_8000_0001_EDX] = 0
    m.ctl.cpuid[lib.CPU_CPUID_7_ECX] = 0
    lib.cpu_state_changed(m.cpu)
    m.run(lib.EXIT_WRMSR)


@pytest.mark.spec("cpu.efer_gp_rip", "cpu.wrmsr_gp")
def test_other_msrs_exit_at_the_instruction(m: Machine) -> None:
    start(m, "long64", "nop; bad: wrmsr; rdmsr; hlt")
    m.set(rcx=lib.MSR_EFER)
    m.run(lib.EXIT_WRMSR)
    assert (m.guest.rip, m.exit.insn_len) == (CODE + 1, 2)
    m.inject(GP, lib.CPU_EVENT_HARD_EXC, 0)
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(2)) == (GP, [0, CODE + 1])
    m.set(rip=CODE + 1)
    m.run(lib.EXIT_WRMSR)
    m.skip()
    m.run(lib.EXIT_RDMSR)
    assert m.guest.rip == CODE + 3
    m.skip()
    m.run(lib.EXIT_HLT)


# ---- time


@pytest.mark.spec("cpu.rdtsc")
@pytest.mark.tcg_differs("it has its own time")
def test_tsc_offset_ratio_and_aux(m: Machine) -> None:
    start(m, "long64", "rdtsc; mov ebx, eax; mov ebp, edx; rdtscp; mov r8, rcx; rdpid r9; cpuid")
    m.set(tsc_aux=0x55)
    m.ctl.tsc_offset = (1 << 64) - lib.host_tsc()
    m.run(lib.EXIT_CPUID)
    first = m.reg("rbp") << 32 | m.reg("rbx")
    assert 0 < first <= m.reg("rdx") << 32 | m.reg("rax")
    assert first < 10**9
    assert (m.reg("r8"), m.reg("r9")) == (0x55, 0x55)
    start(m, "long64", "rdtsc; cpuid")
    m.ctl.tsc_offset = 0
    m.ctl.tsc_ratio = 1 << 46
    before = lib.host_tsc()
    m.run(lib.EXIT_CPUID)
    assert before >> 2 <= m.reg("rdx") << 32 | m.reg("rax") <= lib.host_tsc() >> 2


@pytest.mark.spec("cpu.rdtsc", "cpu.wrmsr_gp")
def test_tsc_that_counts_instructions(m: Machine) -> None:
    start(m, "long64", "rdtsc; mov ebx, eax; mov ecx, 1000; 1: loop 1b; mov ecx, 0x10; rdmsr; cpuid")
    m.ctl.flags |= lib.CPU_NO_HOST_TSC
    m.ctl.tsc_offset = 1 << 40
    m.run(lib.EXIT_CPUID)
    assert m.reg("rdx") == 1 << 8
    assert 990 <= m.reg("rax") - m.reg("rbx") <= 1010


@pytest.mark.spec("cpu.rdtsc", "cpu.cpl_rules", "cpu.rdpmc")
@pytest.mark.tcg_differs("it has its own time")
def test_tsd(m: Machine) -> None:
    for code in ("rdtsc", "rdtscp"):
        start(m, "long64", f"bad: {code}; cpuid", cpl=3)
        m.run(lib.EXIT_CPUID)
        start(m, "long64", f"bad: {code}; cpuid", cpl=3)
        m.set(cr4=m.guest.cr4 | lib.X86_CR4_TSD)
        faults(m, GP)
    start(m, "long64", "bad: rdpmc")
    faults(m, GP)


# ---- flags


@pytest.mark.spec("cpu.cpl_rules")
@pytest.mark.parametrize(
    ("cpl", "iopl", "changed"),
    [(0, 0, IF | NT | AC | ID | 0x3000), (3, 0, NT | AC | ID), (3, 3, IF | NT | AC | ID)],
)
def test_flags_popf_may_change(m: Machine, cpl: int, iopl: int, changed: int) -> None:
    start(m, "prot32", "popfd; cpuid", cpl)
    m.set(rflags=2 | iopl << 12)
    m.write(STACK, (0xFFFFFFFF & ~(TF | 0x3000 | 0x8D5)) | (0 if iopl else 0x3000), 4)
    m.run(lib.EXIT_CPUID)
    assert m.guest.rflags ^ (2 | iopl << 12) == changed | 0x400


@pytest.mark.spec("cpu.cpl_rules")
def test_popf_of_16_bits_keeps_the_upper_flags(m: Machine) -> None:
    start(m, "long64", "popfw; cpuid")
    m.set(rflags=AC | ID | 2)
    m.write(STACK, 0x8D7, 2)
    m.run(lib.EXIT_CPUID)
    assert (m.guest.rflags, m.reg("rsp")) == (AC | ID | 0x8D7, STACK + 2)


@pytest.mark.spec("cpu.vm86", "cpu.cpl_rules")
def test_pushf_hides_vm_and_rf(m: Machine) -> None:
    start(m, "vm86", "pushfd; cpuid")
    m.set(rflags=VM | RF | 0x3000 | AC | 2)
    m.run(lib.EXIT_CPUID)
    assert m.read(STACK - 4, 4) == 0x3000 | AC | 2


@pytest.mark.spec("cpu.cpl_rules", "cpu.sti_shadow")
def test_cli_and_sti_follow_iopl(m: Machine) -> None:
    start(m, "long64", "sti; cli; sti; cpuid", cpl=3)
    m.set(rflags=0x3002)
    m.run(lib.EXIT_CPUID)
    assert m.guest.rflags == IF | 0x3002
    assert m.guest.interruptibility == lib.CPU_BLOCK_STI, "CPUID has not retired"
    for code in ("sti", "cli"):
        start(m, "long64", f"bad: {code}", cpl=3)
        m.set(rflags=0x1002)
        faults(m, GP)


@pytest.mark.spec("cpu.nx_smep_smap")
def test_stac_and_clac(m: Machine) -> None:
    start(m, "long64", "stac; mov eax, [0x600000]; clac; bad: mov eax, [0x600000]")
    for k in range(0x200000, 0x600000, 0x200000):
        m.write(0x6000 + (k >> 18), k | 0xE3)
    m.write(0x6000, 0xE3)
    m.set(cr4=m.guest.cr4 | lib.X86_CR4_SMAP)
    m.write(0x6000 + 8 * 3, 0x200000 | 0xE7)
    faults(m, PF, 1)
    start(m, "long64", "bad: stac", cpl=3)
    faults(m, UD, None)


# ---- TLB and caches


@pytest.mark.spec("cpu.tlb_rules")
@pytest.mark.tcg_differs("there is no INVPCID")
@pytest.mark.parametrize("flush", ["invlpg [0x200000]", "mov cr3, rbx", "invpcid rcx, [0x500]"])
def test_stale_translation_ends(m: Machine, flush: str) -> None:
    change = "mov rax, [0x200000]; mov qword ptr [0x6008], 0x2000e7; mov rax, [0x200000]"
    start(m, "long64", f"{change}; {flush}; mov rdx, [0x200000]; hlt")
    m.write(0x6008, 0xE7)
    m.write(0x0, 0x1111)
    m.write(0x200000, 0x2222)
    m.load(DATA, bytes(8) + (0x200000).to_bytes(8, "little"))
    m.set(rbx=PML4, rcx=0)
    m.run(lib.EXIT_HLT)
    assert m.reg("rdx") == 0x2222


@pytest.mark.spec("cpu.tlb_rules", "cpu.pcid")
def test_invlpg_and_invpcid_exits(m: Machine) -> None:
    start(m, "long64", "invlpg [0x12345678]; mov ecx, 2; invpcid rcx, [0x500]; hlt")
    m.load(DATA, bytes(16))
    m.ctl.flags |= lib.CPU_EXIT_INVLPG
    m.run(lib.EXIT_INVLPG)
    assert (m.exit.gla, m.exit.qualification, m.guest.rip) == (0x12345678, 0, CODE + 8)
    m.run(lib.EXIT_INVLPG)
    assert m.exit.qualification == 3
    m.run(lib.EXIT_HLT)


@pytest.mark.spec("cpu.pcid")
@pytest.mark.tcg_differs("there is no INVPCID")
@pytest.mark.parametrize(
    ("kind", "pcid", "address", "ok"),
    [
        (0, 0, 0, True),
        (0, 0, NON_CANONICAL, False),
        (0, 1, 0, False),
        (1, 1, 0, False),
        (2, 1, 0, True),
        (3, 0, NON_CANONICAL, True),
        (4, 0, 0, False),
        (3, 0x1000, 0, False),
    ],
)
def test_invpcid_checks(m: Machine, kind: int, pcid: int, address: int, ok: bool) -> None:
    start(m, "long64", "bad: invpcid rcx, [0x500]; cpuid")
    m.load(DATA, pcid.to_bytes(8, "little") + address.to_bytes(8, "little"))
    m.set(rcx=kind)
    if ok:
        m.run(lib.EXIT_CPUID)
    else:
        faults(m, GP)


@pytest.mark.spec("cpu.tlb_rules")
def test_invlpg_of_a_non_canonical_address_is_a_nop(m: Machine) -> None:
    start(m, "long64", "invlpg [rax]; cpuid")
    m.set(rax=NON_CANONICAL)
    m.ctl.flags |= lib.CPU_EXIT_INVLPG
    m.run(lib.EXIT_CPUID)


@pytest.mark.spec("cpu.invd_wbinvd", "cpu.ud_space")
@pytest.mark.tcg_differs("there is no SERIALIZE")
def test_cache_instructions_fences_and_nops(m: Machine) -> None:
    source = """
        invd; wbinvd; clflush [0x500]; clflushopt [0x500]; clwb [0x500]; lfence; mfence; sfence; serialize
        prefetcht0 [rax]; prefetchw [rax]; nop dword ptr [rax + rax]; endbr64; pause; nop; cpuid
    """
    start(m, "long64", source)
    m.set(rax=NON_CANONICAL)
    m.run(lib.EXIT_CPUID)
    for code in ("clflush", "clflushopt", "clwb"):
        start(m, "long64", f"bad: {code} [rax]")
        m.set(rax=NON_CANONICAL)
        faults(m, GP)
        start(m, "long64", f"bad: {code} [rax]")
        m.set(rax=0x200000)
        m.write(0x6008, 0)
        faults(m, PF, 0)
        assert m.guest.cr2 == 0x200000


@pytest.mark.spec("cpu.ud_space")
@pytest.mark.parametrize("mode", ["prot32", "long64"])
@pytest.mark.parametrize("code", ["0x0f, 0x0b", "0x0f, 0xb9, 0xc0", "0x0f, 0xff, 0xc0", "0x0f, 0x04"])
def test_undefined(m: Machine, mode: str, code: str) -> None:
    start(m, mode, f"bad: .byte {code}")
    faults(m, UD, None)


# ---- exits


@pytest.mark.spec("cpu.hlt")
def test_hlt_exits_behind_itself(m: Machine) -> None:
    start(m, "long64", "sti; hlt; cpuid")
    m.run(lib.EXIT_HLT)
    assert m.guest.rip == CODE + 2
    assert m.guest.interruptibility == 0
    m.inject(0x30)
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(1)) == (0x30, [CODE + 2])


@pytest.mark.spec("cpu.cpuid_insn", "cpu.vmx_svm")
@pytest.mark.parametrize(
    ("code", "exit_name", "qualification"),
    [
        ("cpuid", "EXIT_CPUID", 0),
        ("vmcall", "EXIT_VMCALL", 0),
        ("vmmcall", "EXIT_VMCALL", 1),
        ("rsm", "EXIT_RSM", 0),
        ("xsetbv", "EXIT_XSETBV", 0),
    ],
)
def test_exits_at_the_instruction(m: Machine, code: str, exit_name: str, qualification: int) -> None:
    start(m, "long64", f"nop; here: {code}; hlt")
    m.set(cr4=m.guest.cr4 | lib.X86_CR4_OSXSAVE)
    m.run(getattr(lib, exit_name))
    assert (m.guest.rip, m.exit.qualification) == (m.symbols["here"], qualification)
    length = m.exit.insn_len
    assert bytes(m.exit.insn[0:length]) == m.ram[CODE + 1 : CODE + 1 + length]
    m.skip()
    m.run(lib.EXIT_HLT)
    assert m.guest.rip == CODE + 2 + length


@pytest.mark.spec("cpu.pause_ple")
def test_pause(m: Machine) -> None:
    start(m, "long64", "pause; pause; hlt")
    m.run(lib.EXIT_HLT)
    m.set(rip=CODE)
    m.ctl.flags |= lib.CPU_EXIT_PAUSE
    m.run(lib.EXIT_PAUSE)
    assert m.guest.rip == CODE + 2


@pytest.mark.spec("cpu.monitor_mwait")
@pytest.mark.tcg_differs("MWAIT waits")
@pytest.mark.parametrize("code", ["monitor", "mwait"])
def test_monitor_mwait(m: Machine, code: str) -> None:
    start(m, "long64", f"bad: {code}; cpuid")
    m.run(lib.EXIT_CPUID)
    m.set(rip=CODE)
    m.ctl.flags |= lib.CPU_EXIT_MWAIT
    m.run(getattr(lib, f"EXIT_{code.upper()}"))
    assert m.guest.rip == CODE
    m.ctl.flags |= lib.CPU_MWAIT_UD
    m.run(getattr(lib, f"EXIT_{code.upper()}"))
    m.ctl.cpuid[lib.CPU_CPUID_1_ECX] = 0
    faults(m, UD, None)
    start(m, "long64", f"bad: {code}", cpl=3)
    faults(m, UD, None)


@pytest.mark.spec("cpu.tf")
@pytest.mark.parametrize("code", ["cpuid", "rdmsr", "wrmsr"])
def test_single_step_after_a_skipped_instruction(m: Machine, code: str) -> None:
    start(m, "long64", f"{code}; nop; hlt")
    m.set(rflags=TF | 2)
    m.run()
    m.skip()
    m.run(lib.EXIT_HLT)
    assert (m.vector(), m.frame(1)) == (DB, [CODE + 2])


# ---- extended state


@pytest.mark.spec("fpu.xsave")
def test_xgetbv(m: Machine) -> None:
    start(m, "long64", "bad: xgetbv; cpuid")
    faults(m, UD, None)
    for index, value in ((0, 7), (1, 4)):
        start(m, "long64", "bad: xgetbv; cpuid", cpl=3)
        m.set(cr4=m.guest.cr4 | lib.X86_CR4_OSXSAVE, xcr0=7, rcx=index, rdx=1)
        m.guest.fpu.fcw = 0x37F  # x87 and XMM are in their initial state,
        m.guest.fpu.ymm[3][16] = 1  # the upper half of YMM3 is not
        m.run(lib.EXIT_CPUID)
        assert (m.reg("rax"), m.reg("rdx")) == (value, 0)
    start(m, "long64", "bad: xgetbv; cpuid")
    m.set(cr4=m.guest.cr4 | lib.X86_CR4_OSXSAVE, rcx=2)
    faults(m, GP)


@pytest.mark.spec("cpu.pku_pks")
def test_rdpkru_and_wrpkru(m: Machine) -> None:
    start(m, "long64", "mov ebx, [0x200000]; wrpkru; rdpkru; bad: mov ebx, [0x200000]", cpl=3)
    m.set(cr4=m.guest.cr4 | lib.X86_CR4_PKE, rax=4)
    m.write(0x6008, 1 << 59 | 0x200000 | 0xE7)  # key 1
    faults(m, PF, lib.PFERR_PRESENT_MASK | lib.PFERR_USER_MASK | lib.PFERR_PK_MASK)
    assert (m.guest.pkru, m.reg("rax")) == (4, 4)
    start(m, "long64", "bad: rdpkru")
    faults(m, UD, None)
    for register in ("rcx", "rdx"):
        start(m, "long64", "bad: wrpkru")
        m.set(**{"cr4": m.guest.cr4 | lib.X86_CR4_PKE, register: 1})
        faults(m, GP)


# ---- I/O permission


@pytest.mark.spec("cpu.cpl_rules", "cpu.string_io")
@pytest.mark.parametrize(
    ("port", "size", "limit", "allowed"),
    [
        (0x10, 1, 0x6F, True),
        (0x13, 1, 0x6F, False),
        (0x12, 2, 0x6F, False),
        (0x10, 2, 0x6F, True),
        (0x10, 4, 0x6F, False),
        (0x27, 2, 0x6F, True),
        (0x37, 1, 0x6F, True),
        (0x38, 1, 0x6F, False),  # the byte behind must be in the TSS too
        (0x10, 1, 0x66, False),
    ],
)
def test_io_bitmap(m: Machine, port: int, size: int, limit: int, allowed: bool) -> None:
    register = {1: "al", 2: "ax", 4: "eax"}[size]
    start(m, "prot32", f"mov edx, {port}; bad: in {register}, dx", cpl=3)
    m.load(TSS + 0x68, bytes([0, 0, 0x08]) + bytes(5))
    m.seg("tr").limit = limit
    if allowed:
        m.run(lib.EXIT_IO)
        assert (m.exit.io.port, m.exit.io.size) == (port, size)
    else:
        faults(m, GP)


@pytest.mark.spec("cpu.cpl_rules")
def test_io_with_iopl(m: Machine) -> None:
    start(m, "prot32", "bad: in al, 0x80", cpl=3)
    m.set(rflags=0x3002)
    m.run(lib.EXIT_IO)
    start(m, "prot32", "bad: in al, 0x80", cpl=3)
    m.seg("tr").ar = 0x83  # a 16-bit TSS has no bitmap
    m.load(TSS + 2, STACK0.to_bytes(2, "little") + DATA32.to_bytes(2, "little"))
    faults(m, GP)


@pytest.mark.spec("cpu.vm86")
def test_io_in_vm86_looks_at_the_bitmap_even_with_iopl_3(m: Machine) -> None:
    start(m, "vm86", "in al, 0x80")
    m.seg("tr").limit = 0x87
    m.load(TSS + 0x68, bytes(17) + b"\xff")
    m.run(lib.EXIT_IO)
    start(m, "vm86", "in al, 0x80")
    m.run(lib.EXIT_HLT)
    assert m.vector() == GP
