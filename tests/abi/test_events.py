"""Events on their way into the guest: what GET tells, what SET takes, in which order they arrive."""

from __future__ import annotations

import struct
from errno import EINVAL
from typing import TYPE_CHECKING

import pytest

from pykvm import uapi
from pykvm.abi import new, to_bytes
from tests.machine import CODE, Machine, emulated

if TYPE_CHECKING:
    from pykvm.abi import CData

HLT, NOP = b"\xf4", b"\x90"
OUT_99 = b"\xe6\x99"
HANDLER = 0x3000
DEFAULT_FLAGS = (
    uapi.KVM_VCPUEVENT_VALID_NMI_PENDING | uapi.KVM_VCPUEVENT_VALID_SHADOW | uapi.KVM_VCPUEVENT_VALID_SMM
)


def handler(machine: Machine, vector: int, code: bytes = HLT, at: int | None = None) -> int:
    """Have a real-mode vector run code."""
    where = HANDLER + 0x10 * vector if at is None else at
    machine.load(struct.pack("<HH", where, 0), vector * 4)
    machine.load(code, where)
    return where


def zeroed(flags: int = 0) -> CData:
    events = new("kvm_vcpu_events")
    events.flags = flags
    return events


def frame(machine: Machine, depth: int = 1) -> tuple[int, int, int]:
    """Return (ip, cs, flags) of a real-mode interrupt frame, depth 1 the outermost."""
    return struct.unpack_from("<HHH", machine.ram, 0x8000 - 6 * depth)


# ---- GET and SET ---------------------------------------------------------------------------------


@pytest.mark.spec("vcpu.GET_VCPU_EVENTS", "cap.base_s")
def test_nothing_after_reset(machine: Machine) -> None:
    events = machine.events
    assert events.flags == DEFAULT_FLAGS
    events.flags = 0
    assert not any(to_bytes(events))
    assert machine.cap(uapi.KVM_CAP_VCPU_EVENTS) == 1


@pytest.mark.spec("vcpu.GET_VCPU_EVENTS", "cap.EXCEPTION_PAYLOAD", "cap.X86_TRIPLE_FAULT_EVENT")
def test_capabilities_add_their_flags(machine: Machine) -> None:
    machine.enable(machine.vm, uapi.KVM_CAP_EXCEPTION_PAYLOAD, 1)
    assert machine.events.flags == DEFAULT_FLAGS | uapi.KVM_VCPUEVENT_VALID_PAYLOAD
    machine.enable(machine.vm, uapi.KVM_CAP_X86_TRIPLE_FAULT_EVENT, 1)
    both = uapi.KVM_VCPUEVENT_VALID_PAYLOAD | uapi.KVM_VCPUEVENT_VALID_TRIPLE_FAULT
    assert machine.events.flags == DEFAULT_FLAGS | both
    machine.enable(machine.vm, uapi.KVM_CAP_EXCEPTION_PAYLOAD, 0)
    assert machine.events.flags == DEFAULT_FLAGS | uapi.KVM_VCPUEVENT_VALID_TRIPLE_FAULT


@pytest.mark.spec("vcpu.SET_VCPU_EVENTS")
@pytest.mark.parametrize(
    "change",
    [
        {"flags": 0x40},
        {"flags": 1 << 31},
        {"flags": uapi.KVM_VCPUEVENT_VALID_PAYLOAD},
        {"flags": uapi.KVM_VCPUEVENT_VALID_TRIPLE_FAULT},
        {"exception.injected": 1, "exception.nr": 2},
        {"exception.injected": 1, "exception.nr": 32},
        {"exception.injected": 1, "exception.nr": 255},
    ],
    ids=str,
)
def test_bad_events_change_nothing(machine: Machine, change: dict[str, int]) -> None:
    events = machine.events
    events.nmi.masked = 1
    for name, value in change.items():
        *path, member = name.split(".")
        target = events
        for part in path:
            target = getattr(target, part)
        setattr(target, member, value)
    assert machine.errno(uapi.KVM_SET_VCPU_EVENTS, events) == EINVAL
    # Linux looks at the last flag when it has set all else.
    if not (machine.backend.real and change == {"flags": uapi.KVM_VCPUEVENT_VALID_TRIPLE_FAULT}):
        assert machine.events.nmi.masked == 0
    assert machine.events.exception.nr == 0


@pytest.mark.spec("vcpu.SET_VCPU_EVENTS", "vcpu.GET_VCPU_EVENTS")
def test_optional_members_count_with_their_flag_only(machine: Machine) -> None:
    events = zeroed()
    events.nmi.pending, events.interrupt.shadow, events.sipi_vector = 1, 2, 7
    events.nmi.masked, events.nmi.injected = 1, 1
    machine.set_events(events)
    now = machine.events
    assert (now.nmi.pending, now.interrupt.shadow, now.sipi_vector) == (0, 0, 0)
    assert (now.nmi.masked, now.nmi.injected) == (1, 1)
    events.flags = DEFAULT_FLAGS
    machine.set_events(events)
    now = machine.events
    assert (now.nmi.pending, now.interrupt.shadow) == (1, 2)


@pytest.mark.spec("vcpu.events_shadow", "cap.base_s")
@pytest.mark.parametrize("shadow", [uapi.KVM_X86_SHADOW_INT_MOV_SS, uapi.KVM_X86_SHADOW_INT_STI])
def test_interrupt_shadow(machine: Machine, shadow: int) -> None:
    events = zeroed(uapi.KVM_VCPUEVENT_VALID_SHADOW)
    events.interrupt.shadow = shadow
    machine.set_events(events)
    assert machine.events.interrupt.shadow == shadow
    assert machine.cap(uapi.KVM_CAP_INTR_SHADOW) == 0
    machine.set_regs(rflags=0x202)
    machine.run.immediate_exit = 1
    machine.go_errno()
    assert machine.run.ready_for_interrupt_injection == 0


@pytest.mark.spec("cap.EXCEPTION_PAYLOAD", "vcpu.SET_VCPU_EVENTS")
def test_pending_needs_the_capability_and_the_flag(machine: Machine) -> None:
    events = zeroed()
    events.exception.pending, events.exception.nr = 1, uapi.PF_VECTOR
    machine.set_events(events)
    assert (machine.events.exception.pending, machine.events.exception.injected) == (0, 0)
    machine.enable(machine.vm, uapi.KVM_CAP_EXCEPTION_PAYLOAD, 1)
    machine.set_events(events)
    assert machine.events.exception.pending == 0
    events.flags = uapi.KVM_VCPUEVENT_VALID_PAYLOAD
    events.exception.injected = 1  # one of the two: pending
    events.exception_has_payload, events.exception_payload = 1, 0x12345000
    machine.set_events(events)
    now = machine.events
    assert (now.exception.pending, now.exception.injected) == (1, 0)
    assert (now.exception_has_payload, now.exception_payload) == (1, 0x12345000)
    assert machine.sregs.cr2 == 0
    # A payload belongs to a pending exception.
    events.exception.pending = 0
    machine.set_events(events)
    assert (machine.events.exception.injected, machine.events.exception_has_payload) == (1, 0)


@pytest.mark.spec("cap.EXCEPTION_PAYLOAD", "vcpu.GET_VCPU_EVENTS")
def test_without_the_capability_the_payload_is_given_at_once(machine: Machine) -> None:
    machine.enable(machine.vm, uapi.KVM_CAP_EXCEPTION_PAYLOAD, 1)
    events = zeroed(uapi.KVM_VCPUEVENT_VALID_PAYLOAD)
    events.exception.pending, events.exception.nr = 1, uapi.PF_VECTOR
    events.exception_has_payload, events.exception_payload = 1, 0xABC000
    machine.set_events(events)
    machine.enable(machine.vm, uapi.KVM_CAP_EXCEPTION_PAYLOAD, 0)
    now = machine.events
    assert (now.exception.injected, now.exception.nr, now.exception_has_payload) == (1, uapi.PF_VECTOR, 0)
    assert machine.sregs.cr2 == 0xABC000


# ---- delivery ------------------------------------------------------------------------------------


@pytest.mark.spec("vcpu.SET_VCPU_EVENTS", "cpu.idt_delivery")
def test_an_exception_comes_before_the_next_instruction(machine: Machine) -> None:
    machine.start(NOP + HLT)
    at = handler(machine, uapi.UD_VECTOR)
    events = machine.events
    events.exception.injected, events.exception.nr = 1, uapi.UD_VECTOR
    machine.set_events(events)
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert machine.regs.rip == at + 1
    assert frame(machine) == (CODE, 0, 2)
    assert machine.events.exception.injected == 0


@pytest.mark.spec("vcpu.SET_VCPU_EVENTS", "vcpu.GET_VCPU_EVENTS", "cpu.reinject")
@pytest.mark.parametrize("vector", [uapi.BP_VECTOR, uapi.OF_VECTOR])
def test_a_software_exception_is_taken_and_not_told(machine: Machine, vector: int) -> None:
    emulated(machine, "does not inject one")
    machine.start(NOP + HLT)
    at = handler(machine, vector)
    events = machine.events
    events.exception.injected, events.exception.nr = 1, vector
    machine.set_events(events)
    assert (machine.events.exception.injected, machine.events.exception.nr) == (0, vector)
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert machine.regs.rip == at + 1
    assert frame(machine)[0] == CODE


@pytest.mark.spec("cpu.idt_delivery")
def test_real_mode_pushes_no_error_code(machine: Machine) -> None:
    machine.start(NOP + HLT)
    handler(machine, uapi.GP_VECTOR)
    events = machine.events
    events.exception.injected, events.exception.nr = 1, uapi.GP_VECTOR
    events.exception.has_error_code, events.exception.error_code = 1, 0x18
    machine.set_events(events)
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert machine.regs.rsp == 0x8000 - 6


@pytest.mark.spec("vcpu.SET_VCPU_EVENTS", "cap.EXCEPTION_PAYLOAD")
def test_a_payload_reaches_cr2_with_the_exception(machine: Machine) -> None:
    machine.enable(machine.vm, uapi.KVM_CAP_EXCEPTION_PAYLOAD, 1)
    machine.start(NOP + HLT)
    handler(machine, uapi.PF_VECTOR)
    events = zeroed(uapi.KVM_VCPUEVENT_VALID_PAYLOAD)
    events.exception.pending, events.exception.nr = 1, uapi.PF_VECTOR
    events.exception_has_payload, events.exception_payload = 1, 0xABC000
    machine.set_events(events)
    assert machine.complete()
    assert machine.sregs.cr2 == 0
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert machine.sregs.cr2 == 0xABC000


@pytest.mark.spec("vcpu.SET_VCPU_EVENTS", "cap.EXCEPTION_PAYLOAD")
def test_a_payload_reaches_dr6_with_the_exception(machine: Machine) -> None:
    machine.enable(machine.vm, uapi.KVM_CAP_EXCEPTION_PAYLOAD, 1)
    machine.start(NOP + HLT)
    handler(machine, uapi.DB_VECTOR)
    events = zeroed(uapi.KVM_VCPUEVENT_VALID_PAYLOAD)
    events.exception.pending, events.exception.nr = 1, uapi.DB_VECTOR
    events.exception_has_payload, events.exception_payload = 1, uapi.DR6_BS
    machine.set_events(events)
    assert machine.go() == uapi.KVM_EXIT_HLT
    debugregs = machine.get(uapi.KVM_GET_DEBUGREGS, "kvm_debugregs")
    assert debugregs.dr6 == 0xFFFF0FF0 | uapi.DR6_BS


@pytest.mark.spec("cap.X86_TRIPLE_FAULT_EVENT", "exit.SHUTDOWN")
def test_a_pending_triple_fault_ends_the_next_run(machine: Machine) -> None:
    machine.enable(machine.vm, uapi.KVM_CAP_X86_TRIPLE_FAULT_EVENT, 1)
    machine.start(HLT)
    events = zeroed(uapi.KVM_VCPUEVENT_VALID_TRIPLE_FAULT)
    events.triple_fault.pending = 1
    machine.set_events(events)
    assert machine.events.triple_fault.pending == 1
    assert machine.go() == uapi.KVM_EXIT_SHUTDOWN
    assert machine.regs.rip == CODE
    assert machine.events.triple_fault.pending == 0
    assert machine.go() == uapi.KVM_EXIT_HLT


@pytest.mark.spec("vcpu.INTERRUPT", "cpu.int_priority", "cpu.reinject")
def test_exception_then_interrupt_then_nmi(machine: Machine) -> None:
    """All are there at once: an injected exception first, then the interrupt, then the NMI."""
    emulated(machine, "does not see the NMI window")
    machine.start(NOP + HLT)
    nmi = handler(machine, uapi.NMI_VECTOR)
    ud = handler(machine, uapi.UD_VECTOR, NOP + HLT)
    events = machine.events
    events.exception.injected, events.exception.nr = 1, uapi.UD_VECTOR
    events.nmi.pending = 1
    machine.set_events(events)
    assert machine.go() == uapi.KVM_EXIT_HLT
    # The NMI interrupts the handler of #UD before its first instruction.
    assert machine.regs.rip == nmi + 1
    assert frame(machine, 1)[0] == CODE
    assert frame(machine, 2)[0] == ud
    assert machine.events.nmi.masked == 1


@pytest.mark.spec("cpu.nmi_blocking", "vcpu.SET_VCPU_EVENTS")
def test_an_nmi_waits_while_nmis_are_masked(machine: Machine) -> None:
    machine.start(OUT_99 + HLT)
    handler(machine, uapi.NMI_VECTOR)
    events = machine.events
    events.nmi.masked, events.nmi.pending = 1, 1
    machine.set_events(events)
    assert machine.go() == uapi.KVM_EXIT_IO
    assert (machine.events.nmi.masked, machine.events.nmi.pending) == (1, 1)
    events = machine.events
    events.nmi.masked = 0
    machine.set_events(events)
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert frame(machine)[0] == CODE + 2


@pytest.mark.spec("cpu.reinject", "vcpu.events_shadow")
def test_an_nmi_waits_for_the_shadow(machine: Machine) -> None:
    emulated(machine, "does not see the NMI window")
    machine.start(NOP + NOP + HLT)
    handler(machine, uapi.NMI_VECTOR)
    events = machine.events
    events.interrupt.shadow, events.nmi.pending = uapi.KVM_X86_SHADOW_INT_MOV_SS, 1
    machine.set_events(events)
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert frame(machine)[0] == CODE + 1


@pytest.mark.spec("cpu.reinject", "cpu.nested_exceptions")
def test_an_event_is_delivered_once_though_its_stack_must_be_mapped(machine: Machine) -> None:
    """The frame spans two pages nobody has touched: two faults of ours in the middle of the delivery."""
    stack = machine.add_slot(1, 0x20000, 0x2000)
    machine.start(NOP + HLT, rsp=0x1002)
    machine.segment("ss", 0x2000)
    at = handler(machine, 0x20)
    interrupt = new("kvm_interrupt")
    interrupt.irq = 0x20
    machine.do(uapi.KVM_INTERRUPT, interrupt)
    assert machine.go() == uapi.KVM_EXIT_HLT
    regs = machine.regs
    assert (regs.rip, regs.rsp) == (at + 1, 0x1002 - 6)
    assert struct.unpack_from("<HHH", stack, 0x1002 - 6) == (CODE, 0, 2)
    assert machine.events.interrupt.injected == 0


@pytest.mark.spec("vcpu.INTERRUPT")
def test_an_interrupt_given_with_interrupts_off_is_taken(machine: Machine) -> None:
    emulated(machine, "waits for IF")
    machine.start(NOP + HLT)
    handler(machine, 0x20)
    interrupt = new("kvm_interrupt")
    interrupt.irq = 0x20
    machine.do(uapi.KVM_INTERRUPT, interrupt)
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert frame(machine)[0] == CODE
