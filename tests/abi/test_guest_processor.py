"""What a guest finds of the processor that profiles, CPUID and memory slots decide.

Source: Linux arch/x86/kvm/cpuid.c, vmx/vmx.c vmx_set_msr, emulate.c em_syscall; api.rst 4.35.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest

from pykvm.abi import uapi
from tests.guest.bare import assemble, descriptor
from tests.machine import Machine, cpuid_list, emulated

if TYPE_CHECKING:
    from tests.conftest import NewMachine

HLT = b"\xf4"

GDT, IDT, PML4, CODE = 0x4000, 0x5000, 0x8000, 0x1000
HANDLER = 0x2000
GP, UD = 13, 6
CODE64, DATA, COMPAT = 0x08, 0x10, 0x18


def code(source: str, bits: int, at: int = CODE) -> bytes:
    return assemble(source, at, bits, ())[0]


def real(machine: Machine, source: str) -> int:
    """Run it in real mode to an HLT; the vector that it met, or -1."""
    for vector in range(32):
        machine.load(struct.pack("<HH", HANDLER + vector, 0), 4 * vector)
    machine.load(HLT * 32, HANDLER)
    machine.start(code(source, 16) + HLT)
    assert machine.go() == uapi.KVM_EXIT_HLT
    vector = int(machine.regs.rip) - HANDLER - 1
    return vector if 0 <= vector < 32 else -1


def long_mode(machine: Machine, source: str, *, compat: bool) -> int:
    """The same in 64-bit or compatibility mode, set up by the client before the first KVM_RUN."""
    ram = machine.ram
    for at, value in ((PML4, 0x9003), (0x9000, 0xA003), (0xA000, 0x83)):
        ram[at : at + 8] = value.to_bytes(8, "little")
    for selector, ar in ((CODE64, 0xA09B), (DATA, 0xC093), (COMPAT, 0xC09B)):
        ram[GDT + selector : GDT + selector + 8] = descriptor(0, 0xFFFFF, ar).to_bytes(8, "little")
    for vector in range(32):
        low = HANDLER + vector | CODE64 << 16 | 0x8E << 40
        ram[IDT + 16 * vector : IDT + 16 * vector + 16] = struct.pack("<QQ", low, 0)
    machine.load(HLT * 32, HANDLER)
    machine.load(code(source, 32 if compat else 64) + HLT, CODE)
    sregs = machine.sregs
    sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = 0x80000011, PML4, 0x20, 0x501
    sregs.gdt.base, sregs.gdt.limit, sregs.idt.base, sregs.idt.limit = GDT, 0x1F, IDT, 0x1FF
    for name in ("cs", "ds", "es", "ss", "fs", "gs"):
        s = getattr(sregs, name)
        s.base, s.limit, s.present, s.s, s.g, s.dpl = 0, 0xFFFFFFFF, 1, 1, 1, 0
        s.selector, s.type, s.l, s.db = DATA, 3, 0, 1
    s = sregs.cs
    s.selector, s.type, s.l, s.db = (COMPAT, 11, 0, 1) if compat else (CODE64, 11, 1, 0)
    machine.set_sregs(sregs)
    machine.set_regs(rip=CODE, rsp=0x7000, rflags=2)
    assert machine.go() == uapi.KVM_EXIT_HLT
    vector = int(machine.regs.rip) - HANDLER - 1
    return vector if 0 <= vector < 32 else -1


@pytest.mark.spec("cpu.btf_lbr")
def test_no_branch_records(new_machine: NewMachine) -> None:
    """DEBUGCTL.BTF and LBR are taken and forgotten, other bits are refused, the old LBR MSRs read 0."""
    source = """
        mov ecx, 0x1d9; mov eax, 3; xor edx, edx; wrmsr
        mov eax, 0x55; rdmsr; mov ebx, eax
        mov ecx, 0x1db; rdmsr; mov esi, eax; or esi, edx
        mov ecx, 0x1de; rdmsr; or esi, eax; or esi, edx
    """
    machine = new_machine()
    assert real(machine, source) == -1
    assert (machine.regs.rbx, machine.regs.rsi) == (0, 0)
    emulated(machine, "ignores the whole register on AMD's")
    assert real(machine, "mov ecx, 0x1d9; mov eax, 0x40; xor edx, edx; wrmsr") == GP


@pytest.mark.spec("cpu.btf_lbr", "cpu.tf")
def test_btf_does_not_change_single_steps(new_machine: NewMachine) -> None:
    """As the bit is not kept, every instruction traps and not every branch."""
    machine = new_machine()
    source = "mov ecx, 0x1d9; mov eax, 2; xor edx, edx; wrmsr; push 0x102; popf; nop; inc ebx; jmp 1f; 1:"
    assert real(machine, source) == 1
    frame = struct.unpack("<H", machine.ram[machine.regs.rsp : machine.regs.rsp + 2])[0]
    assert machine.ram[frame - 1] == 0x90, "behind the NOP"


@pytest.mark.spec("cpu.rdpmc")
@pytest.mark.parametrize("counter", [0, 1 << 30])
def test_no_performance_counters(new_machine: NewMachine, counter: int) -> None:
    assert real(new_machine(), f"mov eax, 0x100; mov cr4, eax; mov ecx, {counter}; rdpmc") == GP


@pytest.mark.spec("cpu.vm86", "cpu.cr_writes")
def test_vme_is_offered_and_can_be_turned_on(new_machine: NewMachine) -> None:
    machine = new_machine()
    assert real(machine, "mov eax, 3; mov cr4, eax; mov ebx, cr4") == -1
    assert machine.regs.rbx == 3


@pytest.mark.spec("cpu.fetch_unmapped", "vm.memslot_readonly")
@pytest.mark.parametrize("extensions", [(), ("no-tdp",)], ids=["tdp", "no-tdp"])
def test_code_in_a_readonly_slot(new_machine: NewMachine, extensions: tuple[str, ...]) -> None:
    """It runs like any other, and its stores to itself are the client's business."""
    machine = new_machine(extensions=extensions)
    rom = machine.add_slot(1, 0x20000, 0x1000, uapi.KVM_MEM_READONLY)
    text = code("mov ax, 0x1234; call 1f; mov cs:[0x10], al; hlt; 1: inc ax; ret", 16, 0)
    rom[: len(text)] = text
    machine.start(HLT)
    machine.segment("cs", 0x2000)
    machine.set_regs(rip=0)
    assert machine.go() == uapi.KVM_EXIT_MMIO
    mmio = machine.run.mmio
    assert (mmio.phys_addr, mmio.len, mmio.data[0], mmio.is_write) == (0x20010, 1, 0x35, 1)
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert rom[: len(text)] == text


@pytest.mark.spec("cpu.syscall", "cpu.sysenter")
@pytest.mark.parametrize(
    ("cpu", "compat", "source", "vector"),
    [
        ("skylake", False, "mov ecx, 0x174; xor edx, edx; mov eax, 8; wrmsr; sysenter", -1),
        ("skylake", True, "mov ecx, 0x174; xor edx, edx; mov eax, 8; wrmsr; sysenter", -1),
        ("skylake", True, "syscall", UD),
        ("epyc", False, "mov ecx, 0x174; xor edx, edx; mov eax, 8; wrmsr; sysenter", UD),
        ("epyc", True, "syscall", -1),
        ("epyc", False, "syscall", -1),
    ],
)
def test_system_calls_are_the_vendors(
    new_machine: NewMachine, cpu: str, compat: bool, source: str, vector: int
) -> None:
    """The client's table says the same vendor as the processor."""
    machine = new_machine(cpu=cpu)
    emulated(machine, "has the vendor of its host")
    table = cpuid_list(256)
    machine.ioctl(machine.kvm, uapi.KVM_GET_SUPPORTED_CPUID, table)
    machine.do(uapi.KVM_SET_CPUID2, table)
    assert machine.set_msr(uapi.MSR_IA32_SYSENTER_EIP, 0x3000)
    for index in (uapi.MSR_LSTAR, uapi.MSR_CSTAR):
        assert machine.set_msr(index, 0x3000)
    assert machine.set_msr(uapi.MSR_STAR, CODE64 << 32)
    machine.load(HLT, 0x3000)
    assert long_mode(machine, source, compat=compat) == vector
    if vector < 0:
        assert machine.regs.rip == 0x3001


STEPPED = {
    "cpuid": "cpuid",
    "rdmsr": "mov ecx, 0x277; popf; rdmsr",
    "out": "out 0x80, al",
    "in": "in al, 0x80",
    "outsb": "outsb",
    "mmio store": "mov es:[0], al",
    "mmio load": "mov al, es:[0]",
    "mmio rmw": "inc byte ptr es:[0]",
    "cr": "mov eax, cr0",
    "nop": "nop",
}


@pytest.mark.spec("cpu.tf")
@pytest.mark.parametrize("name", STEPPED)
def test_single_step_over_what_the_module_does(new_machine: NewMachine, name: str) -> None:
    """One #DB behind the instruction, whoever finished it."""
    machine = new_machine()
    if name in {"out", "outsb", "mmio store", "mmio rmw"}:
        # x86.c x86_emulate_instruction: no singlestep when r is 0; VMX has OUT on another path
        emulated(machine, "forgets the trap when it leaves for the client")
    for vector in range(32):
        machine.load(struct.pack("<HH", HANDLER + vector, 0), 4 * vector)
    machine.load(HLT * 32, HANDLER)
    machine.start(b"")
    machine.segment("es", 0x2000)  # no memory there
    before, _, after = STEPPED[name].rpartition("popf;")
    text = code(f"{before} push 0x102; popf; {after}", 16)
    machine.load(text + HLT)
    machine.set_regs(rip=CODE)
    while machine.go() in {uapi.KVM_EXIT_IO, uapi.KVM_EXIT_MMIO}:
        pass
    assert machine.run.exit_reason == uapi.KVM_EXIT_HLT
    regs = machine.regs
    assert regs.rip == HANDLER + 2
    assert struct.unpack("<HHH", machine.ram[regs.rsp : regs.rsp + 6]) == (CODE + len(text), 0, 0x102)
    assert machine.get(uapi.KVM_GET_DEBUGREGS, "kvm_debugregs").dr6 & 0xF00F == 0x4000
