"""System management mode: SMIs in, the state save map, RSM out, and what a client sees of it."""

from __future__ import annotations

import os
import struct
import threading
from errno import EIO
from typing import TYPE_CHECKING

import pytest

from pykvm import uapi
from pykvm.abi import to_bytes
from tests import snapshot
from tests.abi import test_snapshot as guest64
from tests.machine import CODE, STACK, Machine, errno_of

if TYPE_CHECKING:
    import mmap

    from tests.conftest import NewMachine

HLT, NOP, RSM = b"\xf4", b"\x90", b"\x0f\xaa"
SMBASE, SMM_SLOT = 0x30000, 1 << 16
ENTRY, MAP = 0x8000, 0xFE00
# out 0x99, al
OUT_99 = b"\xe6\x99"
SMM = uapi.KVM_RUN_X86_SMM


@pytest.fixture
def smm(new_machine: NewMachine) -> Machine:
    machine = new_machine()
    if not machine.cap(uapi.KVM_CAP_X86_SMM):
        pytest.skip("a kernel without CONFIG_KVM_SMM")
    return machine


def smram(machine: Machine, handler: bytes, at: int = SMBASE) -> mmap.mmap:
    """Give the machine memory that only SMM sees, with a handler in it."""
    memory = machine.add_slot(SMM_SLOT, at, 0x10000)
    memory[ENTRY : ENTRY + len(handler)] = handler
    return memory


def word(memory: mmap.mmap, at: int, size: int = 4) -> int:
    return int.from_bytes(memory[at : at + size], "little")


def smi(machine: Machine) -> None:
    machine.do(uapi.KVM_SMI)


def io(machine: Machine) -> int:
    """Run up to an OUT and return its port."""
    assert machine.go() == uapi.KVM_EXIT_IO
    return int(machine.run.io.port)


@pytest.mark.spec("cap.X86_SMM", "vcpu.SMI")
def test_what_announces_it(smm: Machine) -> None:
    assert smm.cap(uapi.KVM_CAP_X86_SMM) == 1
    assert smm.cap(uapi.KVM_CAP_MULTI_ADDRESS_SPACE) == 2
    smi(smm)
    smi(smm)
    assert smm.events.smi.pending == 1
    assert smm.events.smi.smm == 0


@pytest.mark.spec("smm.entry", "smm.rsm", "vcpu.SMI", "run.in_out_fields")
def test_there_and_back_in_real_mode(smm: Machine) -> None:
    memory = smram(smm, b"\xb8\x34\x12" + OUT_99 + RSM)
    smm.start(NOP + OUT_99 + HLT, rax=0x5678, rsp=STACK, rflags=0x202)
    before, sregs = to_bytes(smm.regs), to_bytes(smm.sregs)
    smi(smm)
    assert io(smm) == 0x99
    assert smm.run.flags == SMM
    assert smm.run.if_flag == 0
    now, inside = smm.regs, smm.sregs
    assert (now.rip, now.rflags, now.rax & 0xFFFF) == (ENTRY + 3, 2, 0x1234)
    assert (inside.cs.selector, inside.cs.base, inside.cs.limit) == (0x3000, SMBASE, 0xFFFFFFFF)
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        segment = getattr(inside, name)
        assert (segment.limit, segment.g, segment.type, segment.present) == (0xFFFFFFFF, 1, 3, 1)
    assert (inside.idt.base, inside.idt.limit, inside.cr4, inside.efer) == (0, 0, 0, 0)
    events = smm.events
    assert (events.smi.smm, events.smi.pending, events.nmi.masked) == (1, 0, 1)
    # The state as a 32-bit processor saves it.
    assert word(memory, 0xFEFC) == 0x20000
    assert word(memory, 0xFEF8) == SMBASE
    assert (word(memory, 0xFFF0), word(memory, 0xFFF4), word(memory, 0xFFD0)) == (CODE, 0x202, 0x5678)
    assert (word(memory, 0xFFE0), word(memory, 0xFFC8), word(memory, 0xFFCC)) == (STACK, 0x400, 0xFFFF0FF0)
    smm.set_msr(uapi.MSR_SMI_COUNT, smm.get_msr(uapi.MSR_SMI_COUNT) or 0)
    assert smm.get_msr(uapi.MSR_SMI_COUNT) == 1
    assert io(smm) == 0x99
    assert smm.run.flags == 0
    assert (smm.regs.rip, smm.regs.rax) == (CODE + 1, 0x5678)
    smm.set_regs(rip=CODE)
    assert to_bytes(smm.regs) == before
    assert to_bytes(smm.sregs) == sregs
    assert smm.events.nmi.masked == 0


@pytest.mark.spec("smm.entry", "smm.rsm")
def test_there_and_back_in_64_bit_mode(smm: Machine) -> None:
    memory = smram(smm, OUT_99 + RSM)
    guest64.boot(smm, b"\xfb" + NOP * 4 + HLT)
    smm.set_regs(rax=1 << 40, r15=0xABCDEF, r8=8)
    smi(smm)
    state = snapshot.whole_state(smm)
    assert io(smm) == 0x99
    assert (smm.sregs.efer, smm.sregs.cr4, smm.sregs.cr0 & 0x80000001) == (0, 0, 0)
    assert word(memory, 0xFEFC) == 0x20064
    assert word(memory, 0xFF00) == SMBASE
    assert word(memory, 0xFF78, 8) == guest64.CODE
    assert word(memory, 0xFF80, 8) == 0xABCDEF
    assert word(memory, 0xFFF8, 8) == 1 << 40
    assert word(memory, 0xFED0, 8) == uapi.EFER_LME | uapi.EFER_LMA
    assert (word(memory, 0xFF58, 8), word(memory, 0xFF50, 8)) == (0x80050033, guest64.PML4)
    # CS: selector, attributes with L, limit
    assert struct.unpack_from("<HHIQ", memory, 0xFE10) == (8, 0xA09B, 0xFFFFFFFF, 0)
    assert smm.complete() != 0
    smm.set_msr(uapi.MSR_SMI_COUNT, 0)
    assert smm.go() == uapi.KVM_EXIT_HLT
    smm.set_regs(rip=guest64.CODE, rflags=2)
    after = snapshot.whole_state(smm)
    # The SMI is not pending any more.
    assert {name for name in state if after[name] != state[name]} == {"kvm_vcpu_events"}


@pytest.mark.spec("smm.smbase_msr", "smm.rsm")
def test_smbase_moves_at_rsm_and_by_the_client_only(smm: Machine) -> None:
    # mov dword ptr cs:[0xfef8], 0x48000 (with a 16-bit address): SMBASE of the map
    relocate = b"\x2e\x66\xc7\x06\xf8\xfe" + struct.pack("<I", 0x48000)
    smram(smm, relocate + RSM)
    smm.start(HLT)
    assert smm.get_msr(uapi.MSR_IA32_SMBASE) == SMBASE
    smi(smm)
    assert smm.go() == uapi.KVM_EXIT_HLT
    assert smm.get_msr(uapi.MSR_IA32_SMBASE) == 0x48000
    assert smm.set_msr(uapi.MSR_IA32_SMBASE, 0x52000)
    assert smm.get_msr(uapi.MSR_IA32_SMBASE) == 0x52000
    # The guest cannot: #GP through a zero vector, at CODE again.
    smm.load(struct.pack("<HH", 0x2000, 0), 13 * 4)
    smm.load(OUT_99, 0x2000)
    smm.start(b"\x0f\x32" + HLT, rcx=uapi.MSR_IA32_SMBASE)
    assert io(smm) == 0x99


@pytest.mark.spec("smm.masks")
def test_memory_of_smm_is_its_own(smm: Machine) -> None:
    # mov al, [0x5000] of DS: slot 0 of address space 1 is not there, so the client is asked.
    smram(smm, b"\xa0\x00\x50" + RSM)
    smm.load(b"\x77", 0x5000)
    smm.start(b"\xa0\x00\x50" + OUT_99 + HLT)
    smi(smm)
    assert smm.go() == uapi.KVM_EXIT_MMIO
    assert (smm.run.mmio.phys_addr, smm.run.flags) == (0x5000, SMM)
    assert io(smm) == 0x99
    assert smm.data_bytes(1) == b"\x77"


@pytest.mark.spec("smm.masks")
def test_an_nmi_and_an_smi_wait_for_rsm(smm: Machine) -> None:
    smram(smm, OUT_99 + RSM)
    smm.load(struct.pack("<HH", 0x2000, 0), 2 * 4)
    smm.load(b"\xe6\x02\xcf", 0x2000)
    smm.start(NOP + HLT)
    smi(smm)
    assert io(smm) == 0x99
    smm.do(uapi.KVM_NMI)
    smi(smm)
    assert (smm.events.smi.pending, smm.events.nmi.pending) == (1, 1)
    # The SMI is served first.
    assert io(smm) == 0x99
    assert smm.events.smi.pending == 0
    assert io(smm) == 2
    assert smm.run.flags == 0
    assert smm.go() == uapi.KVM_EXIT_HLT
    assert smm.get_msr(uapi.MSR_SMI_COUNT) == 2


@pytest.mark.spec("smm.masks", "vcpu.GET_VCPU_EVENTS", "vcpu.SET_VCPU_EVENTS")
def test_nmis_blocked_before_stay_blocked(smm: Machine) -> None:
    smram(smm, OUT_99 + RSM)
    smm.start(HLT)
    events = smm.events
    events.nmi.masked, events.smi.pending = 1, 1
    smm.set_events(events)
    assert io(smm) == 0x99
    assert smm.events.smi.smm_inside_nmi == 1
    assert smm.go() == uapi.KVM_EXIT_HLT
    assert (smm.events.nmi.masked, smm.events.smi.smm_inside_nmi) == (1, 0)


@pytest.mark.spec("vcpu.SET_VCPU_EVENTS", "smm.rsm")
def test_a_client_puts_a_vcpu_into_smm_and_out(smm: Machine) -> None:
    events = smm.events
    events.smi.smm, events.smi.pending, events.smi.smm_inside_nmi = 1, 1, 1
    smm.set_events(events)
    now = smm.events.smi
    assert (now.smm, now.pending, now.smm_inside_nmi, now.latched_init) == (1, 1, 1, 0)
    events.flags &= ~uapi.KVM_VCPUEVENT_VALID_SMM
    events.smi.smm = 0
    smm.set_events(events)
    assert smm.events.smi.smm == 1
    events.flags |= uapi.KVM_VCPUEVENT_VALID_SMM
    smm.set_events(events)
    now = smm.events.smi
    assert (now.smm, now.smm_inside_nmi) == (0, 0)


@pytest.mark.spec("smm.entry")
def test_an_event_on_its_way_goes_first(smm: Machine) -> None:
    memory = smram(smm, OUT_99 + RSM)
    smm.load(struct.pack("<HH", 0x2000, 0), 6 * 4)
    smm.load(HLT, 0x2000)
    smm.start(NOP)
    events = smm.events
    events.exception.injected, events.exception.nr, events.smi.pending = 1, 6, 1
    smm.set_events(events)
    assert io(smm) == 0x99
    assert word(memory, 0xFFF0) == 0x2000
    assert smm.go() == uapi.KVM_EXIT_HLT
    assert smm.regs.rip == 0x2001


@pytest.mark.spec("smm.rsm")
def test_rsm_elsewhere_is_undefined(smm: Machine) -> None:
    smm.load(struct.pack("<HH", 0x2000, 0), 6 * 4)
    smm.load(OUT_99, 0x2000)
    smm.start(RSM)
    assert io(smm) == 0x99


@pytest.mark.spec("smm.rsm", "exit.SHUTDOWN")
@pytest.mark.parametrize(
    ("field", "value"), [(0xFFFC, 0x80000010), (0xFFFC, 0x20000010), (0xFF14, 1 << 31)], ids=hex
)
def test_a_state_that_cannot_be_is_a_shutdown(smm: Machine, field: int, value: int) -> None:
    # mov dword ptr cs:[field], value; rsm
    smram(smm, b"\x2e\x66\xc7\x06" + struct.pack("<HI", field, value) + RSM)
    smm.start(HLT)
    smi(smm)
    assert smm.go() == uapi.KVM_EXIT_SHUTDOWN
    assert smm.run.flags == 0


@pytest.mark.spec("smm.entry", "fd.mm_owner")
def test_no_memory_to_save_the_state_in(smm: Machine) -> None:
    """Then the VM is dead: nothing can be done with it any more, and its other vCPUs stop."""
    other = smm.ioctl(smm.vm, uapi.KVM_CREATE_VCPU, 1)
    stats = smm.do(uapi.KVM_GET_STATS_FD)
    smm.start(b"\xeb\xfe")
    sregs, regs = smm.sregs, smm.regs
    smm.ioctl(other, uapi.KVM_SET_SREGS, sregs)
    smm.ioctl(other, uapi.KVM_SET_REGS, regs)
    ended: list[int] = []

    def spin() -> None:
        ended.append(errno_of(lambda: smm.ioctl(other, uapi.KVM_RUN)))

    thread = threading.Thread(target=spin, daemon=True)
    thread.start()
    smi(smm)
    assert smm.go_errno() == EIO
    thread.join(10)
    assert ended == [EIO]
    for fd, request in (
        (smm.vcpu, uapi.KVM_RUN),
        (smm.vcpu, uapi.KVM_GET_REGS),
        (other, uapi.KVM_NMI),
        (smm.vm, uapi.KVM_CHECK_EXTENSION),
        (smm.vm, uapi.KVM_CREATE_VCPU),
        (smm.vm, 0xDEAD),
    ):
        assert errno_of(lambda f=fd, r=request: smm.ioctl(f, r)) == EIO
    # The device, and what has been opened for reading, are not concerned.
    assert smm.ioctl(smm.kvm, uapi.KVM_GET_API_VERSION) == 12
    assert os.pread(stats, 4, 0) == bytes(4)
    for fd in (stats, other):
        os.close(fd)


@pytest.mark.spec("smm.entry", "smm.rsm", "vcpu.save_order")
@pytest.mark.parametrize("way", snapshot.CLIENTS, ids=lambda way: way.name)
def test_a_vcpu_moves_while_in_smm(new_machine: NewMachine, smm: Machine, way: snapshot.Client) -> None:
    memory = smram(smm, b"\xb0\x01" + OUT_99 + RSM)
    guest64.boot(smm, b"\xb0\x05" + OUT_99 + HLT)
    smi(smm)
    assert (io(smm), smm.data_bytes(1)) == (0x99, b"\x01")
    assert smm.complete() != 0
    saved = snapshot.save(smm, way)
    other = new_machine()
    smram(other, b"")[:] = memory[:]
    other.ram[:] = smm.ram[:]
    snapshot.restore(other, saved, way)
    assert (io(other), other.data_bytes(1), other.run.flags) == (0x99, b"\x05", 0)
    assert other.get_msr(uapi.MSR_IA32_SMBASE) == SMBASE
