"""General registers, debug registers, multiprocessing state, address translation."""

from __future__ import annotations

import struct
from errno import EINVAL
from typing import TYPE_CHECKING

import pytest

from pykvm import uapi
from pykvm.abi import fields, new
from tests.machine import CODE, Machine

if TYPE_CHECKING:
    from tests.conftest import NewMachine

HLT = b"\xf4"


@pytest.mark.spec("vcpu.GET_REGS", "vcpu.reset_state")
def test_registers_after_reset(machine: Machine) -> None:
    regs = machine.regs
    assert (regs.rip, regs.rflags, regs.rdx) == (0xFFF0, 2, 0x600)
    others = [f.name for f in fields("kvm_regs") if f.name not in {"rip", "rflags", "rdx"}]
    assert not any(getattr(regs, name) for name in others)


@pytest.mark.spec("vcpu.SET_REGS", "vcpu.GET_REGS")
def test_all_registers_are_64_bits_even_in_real_mode(machine: Machine) -> None:
    regs = new("kvm_regs")
    values = {f.name: 0x0E11_1111_1111_1111 * (n + 1) for n, f in enumerate(fields("kvm_regs"))}
    values["rflags"] = 0x202
    for name, value in values.items():
        setattr(regs, name, value)
    machine.do(uapi.KVM_SET_REGS, regs)
    assert {name: getattr(machine.regs, name) for name in values} == values


@pytest.mark.spec("vcpu.SET_REGS")
def test_rip_may_be_anything_and_flags_bit_1_is_set(machine: Machine) -> None:
    machine.set_regs(rip=1 << 63, rflags=0)
    assert (machine.regs.rip, machine.regs.rflags) == (1 << 63, 2)


@pytest.mark.spec("vcpu.SET_REGS")
def test_guest_and_client_mean_the_same_registers(machine: Machine) -> None:
    # Store ax cx dx bx sp bp si di, and load them from elsewhere: pusha; mov $0x3000, %sp; popa
    order = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi")
    values = {name: 0x1000 + 0x111 * n for n, name in enumerate(order)} | {"rsp": 0x8000}
    machine.start(b"\x60\xbc\x00\x30\x61" + HLT, **values)
    machine.load(struct.pack("<8H", *range(8, 0, -1)), 0x3000)
    assert machine.go() == uapi.KVM_EXIT_HLT
    pushed = struct.unpack_from("<8H", machine.ram, 0x7FF0)
    assert dict(zip(reversed(order), pushed, strict=True)) == values
    popped = {name: getattr(machine.regs, name) for name in order}
    assert popped == {
        "rdi": 8, "rsi": 7, "rbp": 6, "rsp": 0x3010, "rbx": 4, "rdx": 3, "rcx": 2, "rax": 1,
    }  # fmt: skip


@pytest.mark.spec("vcpu.SET_REGS")
def test_setting_registers_drops_a_pending_exception(machine: Machine) -> None:
    machine.enable(machine.vm, uapi.KVM_CAP_EXCEPTION_PAYLOAD, 1)
    events = machine.events
    events.exception.pending, events.exception.nr = 1, uapi.UD_VECTOR
    machine.set_events(events)
    assert machine.events.exception.pending == 1
    machine.set_regs(rax=1)
    assert machine.events.exception.pending == 0
    events.exception.pending, events.exception.injected = 0, 1
    machine.set_events(events)
    machine.set_regs(rax=1)
    assert machine.events.exception.injected == 1


# ---- debug registers -----------------------------------------------------------------------------


@pytest.mark.spec("vcpu.GET_DEBUGREGS", "vcpu.SET_DEBUGREGS", "cap.base_s", "vcpu.reset_state")
def test_debug_registers(machine: Machine) -> None:
    debugregs = machine.get(uapi.KVM_GET_DEBUGREGS, "kvm_debugregs")
    assert list(debugregs.db) == [0] * 4
    assert (debugregs.dr6, debugregs.dr7, debugregs.flags) == (0xFFFF0FF0, 0x400, 0)
    for at in range(4):
        debugregs.db[at] = (1 << 63) + at
    debugregs.dr6, debugregs.dr7 = 0xFFFF4FF1, 0x402
    machine.do(uapi.KVM_SET_DEBUGREGS, debugregs)
    kept = machine.get(uapi.KVM_GET_DEBUGREGS, "kvm_debugregs")
    assert (list(kept.db), kept.dr6, kept.dr7) == (list(debugregs.db), 0xFFFF4FF1, 0x402)
    assert machine.cap(uapi.KVM_CAP_DEBUGREGS) == 1


@pytest.mark.spec("vcpu.SET_DEBUGREGS")
@pytest.mark.parametrize(("name", "value"), [("flags", 1), ("dr6", 1 << 32), ("dr7", 1 << 63)])
def test_bad_debug_registers_change_nothing(machine: Machine, name: str, value: int) -> None:
    debugregs = machine.get(uapi.KVM_GET_DEBUGREGS, "kvm_debugregs")
    debugregs.db[0] = 0x1234
    setattr(debugregs, name, value)
    assert machine.errno(uapi.KVM_SET_DEBUGREGS, debugregs) == EINVAL
    assert machine.get(uapi.KVM_GET_DEBUGREGS, "kvm_debugregs").db[0] == 0


@pytest.mark.spec("vcpu.GET_DEBUGREGS")
def test_the_guest_sees_its_debug_registers(machine: Machine) -> None:
    debugregs = machine.get(uapi.KVM_GET_DEBUGREGS, "kvm_debugregs")
    debugregs.db[1] = 0x4321
    machine.do(uapi.KVM_SET_DEBUGREGS, debugregs)
    # mov %dr1, %eax; mov %eax, %dr0; hlt
    machine.start(b"\x0f\x21\xc8\x0f\x23\xc0" + HLT)
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert machine.regs.rax == 0x4321
    assert machine.get(uapi.KVM_GET_DEBUGREGS, "kvm_debugregs").db[0] == 0x4321


# ---- multiprocessing state -----------------------------------------------------------------------


@pytest.mark.spec("vcpu.GET_MP_STATE", "vcpu.SET_MP_STATE", "cap.base_s")
def test_without_a_local_apic_a_vcpu_is_runnable(new_machine: NewMachine) -> None:
    machine = new_machine()
    other = machine.ioctl(machine.vm, uapi.KVM_CREATE_VCPU, 1)
    state = new("kvm_mp_state")
    state.mp_state = 99
    machine.ioctl(other, uapi.KVM_GET_MP_STATE, state)
    assert state.mp_state == uapi.KVM_MP_STATE_RUNNABLE
    machine.do(uapi.KVM_SET_MP_STATE, state)
    for bad in (*range(1, 11), 99, 0xFFFF_FFFF):
        state.mp_state = bad
        assert machine.errno(uapi.KVM_SET_MP_STATE, state) == EINVAL
    assert machine.get(uapi.KVM_GET_MP_STATE, "kvm_mp_state").mp_state == uapi.KVM_MP_STATE_RUNNABLE
    assert machine.cap(uapi.KVM_CAP_MP_STATE) == 1


# ---- translation ---------------------------------------------------------------------------------


@pytest.mark.spec("vcpu.TRANSLATE")
def test_without_paging_addresses_are_physical(machine: Machine) -> None:
    translation = new("kvm_translation")
    for address in (0, CODE, 0xDEAD_0000_0000):
        translation.linear_address = address
        machine.do(uapi.KVM_TRANSLATE, translation)
        found = (translation.valid, translation.physical_address, translation.writeable, translation.usermode)
        assert found == (1, address, 1, 0)


@pytest.mark.spec("vcpu.TRANSLATE")
def test_translation_is_a_read_of_the_systems(machine: Machine) -> None:
    for at, entry in ((0x9000, 0xA003), (0xA000, 0xB003), (0xB000, 0xC003), (0xC008, 0x5001)):
        machine.load(struct.pack("<Q", entry), at)
    sregs = machine.sregs
    sregs.cr3, sregs.cr4 = 0x9000, uapi.X86_CR4_PAE
    sregs.cr0 |= uapi.X86_CR0_PE | uapi.X86_CR0_PG
    sregs.efer = uapi.EFER_LME | uapi.EFER_LMA
    machine.set_sregs(sregs)
    translation = new("kvm_translation")
    translation.linear_address = 0x1234
    machine.do(uapi.KVM_TRANSLATE, translation)
    assert (translation.valid, translation.physical_address) == (1, 0x5234)
    # The row says "no A/D update"; Linux 6.18 sets A as any walk does.
    assert struct.unpack_from("<Q", machine.ram, 0xC008)[0] == 0x5021
    translation.linear_address = 0x2000
    machine.do(uapi.KVM_TRANSLATE, translation)
    assert (translation.valid, translation.physical_address) == (0, (1 << 64) - 1)
