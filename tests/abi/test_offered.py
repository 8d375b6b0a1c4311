"""What a client finds by asking, and what it may turn on: capabilities, quirks, devices, hypercalls."""

from __future__ import annotations

import struct
from errno import EINVAL, EIO, ENODEV, ENOTTY, ENXIO
from typing import TYPE_CHECKING

import pytest

from pykvm import uapi
from pykvm.abi import ffi, new
from tests.abi.test_events import handler
from tests.machine import HOLE, POISON, Machine, emulated, errno_of
from tests.snapshot import supported_cpuid

if TYPE_CHECKING:
    from tests.conftest import NewMachine

HLT, OUT_99 = b"\xf4", b"\xe6\x99"
VMCALL, VMMCALL = b"\x0f\x01\xc1", b"\x0f\x01\xd9"
MONITOR, MWAIT = b"\x0f\x01\xc8", b"\x0f\x01\xc9"
UD = uapi.UD_VECTOR
# Without those of interrupt controllers and event descriptors, which come later.
BASE1 = [
    "HLT",
    "USER_MEMORY",
    "SET_TSS_ADDR",
    "EXT_CPUID",
    "CLOCKSOURCE",
    "NOP_IO_DELAY",
    "DESTROY_MEMORY_REGION_WORKS",
    "JOIN_MEMORY_REGIONS_WORKS",
    "SET_IDENTITY_MAP_ADDR",
    "CHECK_EXTENSION_VM",
    "ENABLE_CAP_VM",
    "IMMEDIATE_EXIT",
]
BASE2 = [
    "USER_NMI",
    "SET_GUEST_DEBUG",
    "SET_BOOT_CPU_ID",
    "INTERNAL_ERROR_DATA",
    "PCI_SEGMENT",
    "X86_ROBUST_SINGLESTEP",
    "XSAVE",
    "GET_TSC_KHZ",
    "KVMCLOCK_CTRL",
    "DEVICE_CTRL",
    "EXT_EMUL_CPUID",
    "VCPU_ATTRIBUTES",
    "GET_MSR_FEATURES",
    "LAST_CPU",
    "SREGS2",
    "SYS_ATTRIBUTES",
    "MEMORY_FAULT_INFO",
]


@pytest.mark.spec("cap.base1")
@pytest.mark.parametrize("name", BASE1)
def test_what_every_monitor_asks_for(machine: Machine, name: str) -> None:
    assert machine.cap(getattr(uapi, f"KVM_CAP_{name}")) == 1


@pytest.mark.spec("cap.base2")
@pytest.mark.parametrize("name", BASE2)
def test_what_debugging_and_migration_ask_for(machine: Machine, name: str) -> None:
    assert machine.cap(getattr(uapi, f"KVM_CAP_{name}")) == 1


@pytest.mark.spec("cap.SYNC_REGS", "cap.DISABLE_QUIRKS")
def test_masks(machine: Machine) -> None:
    assert machine.cap(uapi.KVM_CAP_SYNC_REGS) == 7
    assert machine.cap(uapi.KVM_CAP_DISABLE_QUIRKS) == 1
    emulated(machine, "has quirks of its own")
    known = machine.cap(uapi.KVM_CAP_DISABLE_QUIRKS2)
    assert known & uapi.KVM_X86_QUIRK_FIX_HYPERCALL_INSN
    unknown = 1 << 40
    assert errno_of(lambda: machine.enable(machine.vm, uapi.KVM_CAP_DISABLE_QUIRKS2, unknown)) == EINVAL
    # The first version does not look at what it does not know.
    machine.enable(machine.vm, uapi.KVM_CAP_DISABLE_QUIRKS, unknown)


@pytest.mark.spec("cap.BUS_LOCK_EXIT", "cap.X86_NOTIFY_VMEXIT")
@pytest.mark.parametrize("name", ["X86_BUS_LOCK_EXIT", "X86_NOTIFY_VMEXIT"])
def test_what_needs_hardware_is_absent(machine: Machine, name: str) -> None:
    cap = getattr(uapi, f"KVM_CAP_{name}")
    emulated(machine, "may have it")
    assert machine.cap(cap) == 0
    assert errno_of(lambda: machine.enable(machine.vm, cap, 1)) == EINVAL


@pytest.mark.spec("cap.HALT_POLL")
def test_halt_polling_takes_32_bits(machine: Machine) -> None:
    assert machine.cap(uapi.KVM_CAP_HALT_POLL) == 1
    machine.enable(machine.vm, uapi.KVM_CAP_HALT_POLL, 0xFFFFFFFF)
    assert errno_of(lambda: machine.enable(machine.vm, uapi.KVM_CAP_HALT_POLL, 1 << 32)) == EINVAL


# ---- devices -------------------------------------------------------------------------------------


@pytest.mark.spec("vm.CREATE_DEVICE")
@pytest.mark.parametrize("flags", [0, uapi.KVM_CREATE_DEVICE_TEST, 1 << 10])
@pytest.mark.parametrize("kind", [0, 5, 99, 0xFFFFFFFF])
def test_a_device_that_is_not_there(machine: Machine, kind: int, flags: int) -> None:
    request = new("kvm_create_device")
    request.type, request.flags, request.fd = kind, flags, 77
    assert errno_of(lambda: machine.ioctl(machine.vm, uapi.KVM_CREATE_DEVICE, request)) == ENODEV
    assert request.fd == 77


@pytest.mark.spec("sys.DEVICE_ATTR")
def test_the_state_components_that_guests_can_have(machine: Machine) -> None:
    value = ffi.new("uint64_t *")
    attr = new("kvm_device_attr")
    attr.addr = int(ffi.cast("uintptr_t", value))
    for group, number, expected in ((0, 0, 0), (0, 1, ENXIO), (7, 0, ENXIO)):
        attr.group, attr.attr = group, number
        for request in (uapi.KVM_HAS_DEVICE_ATTR, uapi.KVM_GET_DEVICE_ATTR):
            assert errno_of(lambda request=request: machine.ioctl(machine.kvm, request, attr)) == expected
    cpuid = supported_cpuid(machine)
    leaf = next(each for each in (cpuid.entries[at] for at in range(cpuid.nent)) if each.function == 0xD)
    assert value[0] == leaf.eax | leaf.edx << 32


@pytest.mark.spec("dev.vm_attr_absent")
def test_a_vm_has_no_attributes(machine: Machine) -> None:
    assert machine.cap(uapi.KVM_CAP_VM_ATTRIBUTES) == 0
    attr = new("kvm_device_attr")
    for request in (uapi.KVM_HAS_DEVICE_ATTR, uapi.KVM_GET_DEVICE_ATTR, uapi.KVM_SET_DEVICE_ATTR):
        assert errno_of(lambda request=request: machine.ioctl(machine.vm, request, attr)) == ENOTTY


# ---- quirks --------------------------------------------------------------------------------------


@pytest.mark.spec("hc.patch", "cap.quirk_hypercall")
@pytest.mark.parametrize("processor", ["skylake", "epyc"])
def test_the_other_vendors_hypercall(new_machine: NewMachine, processor: str) -> None:
    own, other = (VMMCALL, VMCALL) if processor == "epyc" else (VMCALL, VMMCALL)
    for code, disabled, works in ((own, 0, True), (other, 0, True), (own, 0x20, True), (other, 0x20, False)):
        machine = new_machine(cpu=processor)
        emulated(machine, "has no hypercalls")
        machine.enable(machine.vm, uapi.KVM_CAP_DISABLE_QUIRKS2, disabled)
        handler(machine, UD, b"\xe6\x06")
        machine.start(code + OUT_99, rax=uapi.KVM_HC_VAPIC_POLL_IRQ)
        assert machine.go() == uapi.KVM_EXIT_IO
        assert machine.run.io.port == (0x99 if works else 6)
        if works:
            assert machine.regs.rax == 0


@pytest.mark.spec("cap.quirk_mwait")
@pytest.mark.parametrize("disabled", [0, uapi.KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS])
def test_mwait_without_its_bit(machine: Machine, disabled: int) -> None:
    emulated(machine, "executes neither")
    machine.enable(machine.vm, uapi.KVM_CAP_DISABLE_QUIRKS2, disabled)
    cpuid = supported_cpuid(machine)
    one = next(each for each in (cpuid.entries[at] for at in range(cpuid.nent)) if each.function == 1)
    one.ecx &= ~(1 << uapi.CPUID_1_ECX_MONITOR)
    machine.do(uapi.KVM_SET_CPUID2, cpuid)
    handler(machine, UD, b"\xe6\x06")
    for instruction in (MONITOR, MWAIT):
        machine.start(instruction + OUT_99)
        assert machine.go() == uapi.KVM_EXIT_IO
        assert machine.run.io.port == (6 if disabled else 0x99)
        assert machine.complete()


@pytest.mark.spec("cap.EXIT_ON_EMULATION_FAILURE", "exit.emul_fail_policy")
@pytest.mark.parametrize("always", [0, 1])
def test_who_is_told_of_an_emulation_failure(machine: Machine, always: int) -> None:
    emulated(machine, "reports its own failures")
    assert machine.cap(uapi.KVM_CAP_EXIT_ON_EMULATION_FAILURE) == 1
    for bad in (2, 1 << 32):
        cap = uapi.KVM_CAP_EXIT_ON_EMULATION_FAILURE
        assert errno_of(lambda bad=bad, cap=cap: machine.enable(machine.vm, cap, bad)) == EINVAL
    machine.enable(machine.vm, uapi.KVM_CAP_EXIT_ON_EMULATION_FAILURE, always)
    machine.start(HLT)
    machine.segment("cs", HOLE >> 4)
    machine.set_regs(rip=0)
    assert machine.go() == uapi.KVM_EXIT_INTERNAL_ERROR
    assert machine.run.internal.suberror == uapi.KVM_INTERNAL_ERROR_EMULATION
    # #UD only for a guest that is to go on.
    assert machine.events.exception.injected == 1 - always


# ---- hypercalls and CPUID ------------------------------------------------------------------------


@pytest.mark.spec("hc.KICK_CPU", "hc.SCHED_YIELD", "msr.enforce")
@pytest.mark.parametrize(
    ("number", "feature"),
    [
        (uapi.KVM_HC_KICK_CPU, uapi.KVM_FEATURE_PV_UNHALT),
        (uapi.KVM_HC_SCHED_YIELD, uapi.KVM_FEATURE_PV_SCHED_YIELD),
    ],
)
def test_hypercalls_by_feature(machine: Machine, number: int, feature: int) -> None:
    emulated(machine, "has no hypercalls")
    for enforced, offered, result in ((0, 0, 0), (1, 0, -uapi.KVM_ENOSYS), (1, 1, 0)):
        cpuid = supported_cpuid(machine)
        leaf = next(
            each for each in (cpuid.entries[at] for at in range(cpuid.nent)) if each.function == 0x40000001
        )
        leaf.eax = offered << feature
        if not enforced or not offered:
            machine.enable(machine.vcpu, uapi.KVM_CAP_ENFORCE_PV_FEATURE_CPUID, enforced)
        fresh = machine if not enforced else _like(machine, cpuid)
        fresh.enable(fresh.vcpu, uapi.KVM_CAP_ENFORCE_PV_FEATURE_CPUID, enforced)
        fresh.start(VMCALL + HLT, rax=number, rbx=0, rcx=1)
        assert fresh.go() == uapi.KVM_EXIT_HLT
        assert fresh.regs.rax & 0xFFFFFFFF == result & 0xFFFFFFFF


def _like(machine: Machine, cpuid: object) -> Machine:
    """Return another machine, with this table: one that has run does not take a new one."""
    fresh = Machine(machine.backend)
    machine._stack.callback(fresh.close)
    fresh.do(uapi.KVM_SET_CPUID2, cpuid)
    return fresh


@pytest.mark.spec("cpuid.f15", "cpuid.timing_leaf", "cpuid.6_a")
def test_what_is_for_the_client_to_add(machine: Machine) -> None:
    cpuid = supported_cpuid(machine)
    entries = {each.function: each for each in (cpuid.entries[at] for at in range(cpuid.nent))}
    assert not entries[0x40000001].eax & (7 << 15)
    assert 0x40000010 not in entries
    assert (entries[6].eax, entries[6].ebx, entries[6].ecx, entries[6].edx) == (4, 0, 0, 0)
    # What the client adds, the guest gets.
    entries[0x40000001].eax |= 1 << uapi.KVM_FEATURE_MSI_EXT_DEST_ID
    machine.do(uapi.KVM_SET_CPUID2, cpuid)
    machine.start(b"\x0f\xa2" + HLT, rax=0x40000001)
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert machine.regs.rax >> uapi.KVM_FEATURE_MSI_EXT_DEST_ID & 1


@pytest.mark.spec("exit.UNKNOWN")
def test_exit_reason_is_0_where_nothing_is_told(machine: Machine) -> None:
    """A KVM_RUN that fails before it starts says nothing; one that fails later leaves the preset value."""
    machine.start(HLT)
    machine.run.cr8 = 99
    assert machine.go_errno() == EINVAL
    assert machine.run.exit_reason == POISON
    machine.run.cr8 = 0
    if machine.cap(uapi.KVM_CAP_X86_SMM):
        machine.do(uapi.KVM_SMI)
        assert machine.go_errno() == EIO
        assert machine.run.exit_reason == uapi.KVM_EXIT_UNKNOWN


@pytest.mark.spec("vm.memslot_alias")
def test_two_slots_on_the_same_memory(machine: Machine) -> None:
    region = new("kvm_userspace_memory_region")
    region.slot, region.flags, region.guest_phys_addr = 1, uapi.KVM_MEM_LOG_DIRTY_PAGES, 0x20000
    region.memory_size = 0x2000
    region.userspace_addr = int(ffi.cast("uintptr_t", ffi.from_buffer(machine.ram))) + 0x4000
    machine.ioctl(machine.vm, uapi.KVM_SET_USER_MEMORY_REGION, region)
    # mov byte [0x1000], 0x5a with DS at the alias; mov al, cs:[0x5000]; out
    machine.start(b"\xc6\x06\x00\x10\x5a\x2e\xa0\x00\x50" + OUT_99)
    machine.segment("ds", 0x2000)
    assert machine.go() == uapi.KVM_EXIT_IO
    assert machine.data_bytes(1) == b"\x5a"
    assert machine.ram[0x5000] == 0x5A
    log, bitmap = new("kvm_dirty_log"), ffi.new("uint64_t *")
    log.slot, log.dirty_bitmap = 1, bitmap
    machine.ioctl(machine.vm, uapi.KVM_GET_DIRTY_LOG, log)
    # Logs are per slot: only what was written through this one.
    assert bitmap[0] == 2


@pytest.mark.spec("pv.kvmclock_migration", "msr.pvclock_monotonic")
def test_kvmclock_goes_on_after_a_move(machine: Machine, new_machine: NewMachine) -> None:
    emulated(machine, "has no stable TSC")
    area = 0x6000

    def told(of: Machine) -> tuple[int, int]:
        version, _, _, ns, _, _, flags = struct.unpack_from("<IIQQIbB", of.ram, area)
        assert version % 2 == 0
        return ns, flags

    def run(of: Machine) -> None:
        of.start(HLT)
        assert of.go() == uapi.KVM_EXIT_HLT

    machine.set_msr(uapi.MSR_KVM_SYSTEM_TIME_NEW, area | 1)
    run(machine)
    first, _ = told(machine)
    clock = new("kvm_clock_data")
    machine.ioctl(machine.vm, uapi.KVM_GET_CLOCK, clock)
    assert clock.clock >= first
    other, saved = new_machine(), clock.clock + 10**12
    other.ram[:] = machine.ram[:]
    wanted = new("kvm_clock_data")
    wanted.clock = saved
    other.ioctl(other.vm, uapi.KVM_SET_CLOCK, wanted)
    other.set_msr(uapi.MSR_KVM_SYSTEM_TIME_NEW, area | 1)
    other.do(uapi.KVM_KVMCLOCK_CTRL)
    run(other)
    then, flags = told(other)
    # Where it was set to, told that it was stopped, and never backwards from there.
    assert saved <= then < saved + 10**10
    assert flags & uapi.PVCLOCK_GUEST_STOPPED
    other.do(uapi.KVM_KVMCLOCK_CTRL)
    run(other)
    assert told(other)[0] >= then
