"""What few clients use: registers by number, memory mapped beforehand, attributes, inert capabilities."""

from __future__ import annotations

import mmap
import os
import signal
import struct
import threading
import time
from errno import EBADF, EEXIST, EFAULT, EINTR, EINVAL, ENOENT, ENOTTY, ENXIO, EOPNOTSUPP, EPERM
from typing import TYPE_CHECKING

import pytest

from pykvm import uapi
from pykvm.abi import CData, ffi, new
from pykvm.kvm import inert
from tests.machine import HOLE, POISON, RAM, Machine, emulated, errno_of
from tests.snapshot import supported_cpuid

if TYPE_CHECKING:
    from tests.conftest import NewMachine

PAGE = 4096
HLT, VMCALL = b"\xf4", b"\x0f\x01\xc1"
PAT = 0x0007_0406_0007_0406
MASK64 = (1 << 64) - 1


def only_pykvm(machine: Machine, why: str) -> None:
    if machine.backend.real:
        pytest.skip(why)


# ---- KVM_GET_ONE_REG and its like ----------------------------------------------------------------

MSR_REG = 0x2030_0002_0000_0000


def one_reg(machine: Machine, request: int, number: int, value: int = 0) -> int:
    """Do KVM_GET_ONE_REG or KVM_SET_ONE_REG; return the value."""
    cell = ffi.new("uint64_t *", value)
    reg = new("kvm_one_reg")
    reg.id, reg.addr = number, int(ffi.cast("uintptr_t", cell))
    assert machine.do(request, reg) == 0
    return int(cell[0])


@pytest.mark.spec("vcpu.ONE_REG", "cap.ONE_REG")
def test_msrs_by_number(machine: Machine) -> None:
    assert machine.cap(uapi.KVM_CAP_ONE_REG) == 1
    assert one_reg(machine, uapi.KVM_GET_ONE_REG, MSR_REG | uapi.MSR_IA32_CR_PAT) == PAT
    one_reg(machine, uapi.KVM_SET_ONE_REG, MSR_REG | uapi.MSR_STAR, 0x1234_5678_9ABC_DEF0)
    assert machine.get_msr(uapi.MSR_STAR) == 0x1234_5678_9ABC_DEF0
    machine.set_msr(uapi.MSR_STAR, 7)
    assert one_reg(machine, uapi.KVM_GET_ONE_REG, MSR_REG | uapi.MSR_STAR) == 7


@pytest.mark.spec("vcpu.ONE_REG")
def test_numbers_that_name_no_register(machine: Machine) -> None:
    pat = MSR_REG | uapi.MSR_IA32_CR_PAT
    wrong = {
        "another size": pat ^ 1 << 52,
        "no size": pat & ~(0xF << 52),
        "another architecture": pat ^ 1 << 60,
        "reserved, low": pat | 1 << 40,
        "reserved, high": pat | 1 << 48,
        "no type": pat & ~(0xFF << 32),
        "another type": pat ^ 6 << 32,
        "the shadow stack pointer, without CET": 0x2030_0003_0000_0000,
        "another of KVM's": 0x2030_0003_0000_0001,
        "an MSR that nobody has": MSR_REG | 0x12345,
    }
    for request in (uapi.KVM_GET_ONE_REG, uapi.KVM_SET_ONE_REG):
        for why, number in wrong.items():
            assert errno_of(lambda r=request, n=number: one_reg(machine, r, n)) == EINVAL, why
    # A value that it does not take; MTRRCAP is not written to.
    for msr, value in ((uapi.MSR_LSTAR, 1 << 63), (uapi.MSR_MTRRcap, 0)):
        number = MSR_REG | msr
        assert errno_of(lambda n=number, v=value: one_reg(machine, uapi.KVM_SET_ONE_REG, n, v)) == EINVAL
    reg = new("kvm_one_reg")
    reg.id, reg.addr = pat, 8
    assert machine.errno(uapi.KVM_GET_ONE_REG, reg) == EFAULT
    assert machine.errno(uapi.KVM_SET_ONE_REG, reg) == EFAULT
    # The number comes first.
    reg.id = 0
    assert machine.errno(uapi.KVM_GET_ONE_REG, reg) == EINVAL
    assert machine.get_msr(uapi.MSR_IA32_CR_PAT) == PAT


@pytest.mark.spec("vcpu.GET_REG_LIST")
@pytest.mark.parametrize("room", [0, 5, MASK64])
def test_the_list_of_registers_is_empty_without_cet(machine: Machine, room: int) -> None:
    listed = ffi.new("struct kvm_reg_list *", {"reg": 1})
    listed.n, listed.reg[0] = room, POISON
    assert machine.do(uapi.KVM_GET_REG_LIST, listed) == 0
    assert (listed.n, listed.reg[0]) == (0, POISON)
    assert machine.errno(uapi.KVM_GET_REG_LIST, 8) == EFAULT


# ---- KVM_PRE_FAULT_MEMORY ------------------------------------------------------------------------


def pre_fault(machine: Machine, gpa: int, size: int, flags: int = 0) -> tuple[int, int, int]:
    """Return (errno, gpa, size) as they are afterwards."""
    wanted = new("kvm_pre_fault_memory")
    wanted.gpa, wanted.size, wanted.flags = gpa, size, flags
    return machine.errno(uapi.KVM_PRE_FAULT_MEMORY, wanted), int(wanted.gpa), int(wanted.size)


@pytest.mark.spec("vcpu.PRE_FAULT_MEMORY", "cap.MEM_ATTR")
def test_memory_is_mapped_before_it_is_used(machine: Machine) -> None:
    emulated(machine, "has no two-dimensional paging")
    assert machine.cap(uapi.KVM_CAP_PRE_FAULT_MEMORY) == 1
    fd = machine.do(uapi.KVM_GET_STATS_FD)
    raw = os.pread(fd, 1 << 16, 0)
    count, desc_at, data_at = struct.unpack_from("<8xI4xII", raw)

    def faults() -> int:
        raw = os.pread(fd, 1 << 16, 0)
        for at in range(desc_at, desc_at + count * 64, 64):
            if raw[at + 16 : at + 64].rstrip(b"\0") == b"pf_fixed":
                (offset,) = struct.unpack_from("<I", raw, at + 8)
                return int.from_bytes(raw[data_at + offset : data_at + offset + 8], "little")
        raise AssertionError

    assert pre_fault(machine, 0, RAM) == (0, RAM, 0)
    machine.start(b"\xa0\x00\x50\xc6\x06\x00\x60\x01\xa0\x00\x90" + HLT)
    assert machine.go() == uapi.KVM_EXIT_HLT
    # All of it was there: what the guest touched has not been faulted in.
    assert faults() == RAM // PAGE
    os.close(fd)


@pytest.mark.spec("vcpu.PRE_FAULT_MEMORY")
def test_a_range_that_leaves_memory_is_mapped_up_to_there(machine: Machine) -> None:
    emulated(machine, "has no two-dimensional paging")
    assert pre_fault(machine, RAM - 2 * PAGE, 5 * PAGE) == (0, RAM, 3 * PAGE)
    assert pre_fault(machine, RAM, 3 * PAGE) == (ENOENT, RAM, 3 * PAGE)
    # A slot whose host memory is not there.
    memory = machine.add_slot(1, HOLE, 2 * PAGE)
    region = new("kvm_userspace_memory_region")
    region.slot = 1
    machine.ioctl(machine.vm, uapi.KVM_SET_USER_MEMORY_REGION, region)
    region.guest_phys_addr, region.memory_size, region.userspace_addr = HOLE, 2 * PAGE, 16 * PAGE
    machine.ioctl(machine.vm, uapi.KVM_SET_USER_MEMORY_REGION, region)
    machine.run.exit_reason = POISON
    assert pre_fault(machine, HOLE, PAGE) == (EFAULT, HOLE, PAGE)
    assert machine.run.exit_reason == uapi.KVM_EXIT_MEMORY_FAULT
    assert machine.run.memory_fault.gpa == HOLE
    assert memory


@pytest.mark.spec("vcpu.PRE_FAULT_MEMORY")
def test_a_large_page_ends_where_it_ends(machine: Machine) -> None:
    emulated(machine, "has no two-dimensional paging")
    large = 2 << 20
    memory = mmap.mmap(-1, 2 * large)
    hva = int(ffi.cast("uintptr_t", ffi.from_buffer(memory)))
    region = new("kvm_userspace_memory_region")
    region.slot, region.guest_phys_addr, region.memory_size = 1, 4 * large, large
    region.userspace_addr = -(-hva // large) * large
    machine.ioctl(machine.vm, uapi.KVM_SET_USER_MEMORY_REGION, region)
    # Its last page, and one behind the slot.
    assert pre_fault(machine, 5 * large - PAGE, 2 * PAGE) == (0, 5 * large, PAGE)
    assert pre_fault(machine, 4 * large, 2 * large) == (0, 5 * large, large)


@pytest.mark.spec("vcpu.PRE_FAULT_MEMORY")
def test_a_signal_that_the_thread_blocks_does_not_end_it(machine: Machine) -> None:
    emulated(machine, "has no two-dimensional paging")
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        assert pre_fault(machine, 0, RAM) == (0, RAM, 0)
        assert signal.SIGUSR1 in signal.sigpending()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.spec("vcpu.PRE_FAULT_MEMORY")
def test_a_signal_that_it_takes_ends_it(machine: Machine) -> None:
    emulated(machine, "has no two-dimensional paging")
    size = 64 << 20
    # Logged, so that it is mapped by small pages.
    machine.add_slot(1, 1 << 30, size, uapi.KVM_MEM_LOG_DIRTY_PAGES)
    taken: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: taken.append(number))
    kick = threading.Timer(0.002, signal.pthread_kill, (threading.get_ident(), signal.SIGUSR1))
    try:
        kick.start()
        errno, gpa, left = pre_fault(machine, 1 << 30, size)
    finally:
        kick.join()
        signal.signal(signal.SIGUSR1, before)
    assert (errno, gpa + left) in {(0, (1 << 30) + size), (EINTR, (1 << 30) + size)}
    assert left
    assert taken


@pytest.mark.spec("vcpu.PRE_FAULT_MEMORY")
def test_ranges_that_are_none(machine: Machine) -> None:
    for gpa, size, flags in (
        (0, 0, 0),
        (0, PAGE, 1),
        (1, PAGE, 0),
        (0, 100, 0),
        (0, PAGE + 1, 0),
        (MASK64 - PAGE + 1, PAGE, 0),
        (PAGE, MASK64 - PAGE + 1, 0),
        (0, PAGE, 1 << 63),
    ):
        assert pre_fault(machine, gpa, size, flags)[0] == EINVAL, (gpa, size, flags)


@pytest.mark.spec("vcpu.PRE_FAULT_MEMORY")
def test_shadow_paging_has_nothing_to_map_beforehand(new_machine: NewMachine) -> None:
    machine = new_machine(extensions={"no-tdp"})
    if not machine.backend.real:
        assert machine.cap(uapi.KVM_CAP_PRE_FAULT_MEMORY) == 0
    assert pre_fault(machine, 0, PAGE)[0] == EOPNOTSUPP
    assert pre_fault(machine, 0, 100)[0] == EINVAL


# ---- KVM_SET_USER_MEMORY_REGION2 -----------------------------------------------------------------


def region2(slot: int, gpa: int, memory: mmap.mmap | None, flags: int = 0) -> CData:
    region = new("kvm_userspace_memory_region2")
    region.slot, region.flags, region.guest_phys_addr = slot, flags, gpa
    if memory is not None:
        region.memory_size = len(memory)
        region.userspace_addr = int(ffi.cast("uintptr_t", ffi.from_buffer(memory)))
    return region


@pytest.mark.spec("vm.SET_USER_MEMORY_REGION2")
def test_the_second_call_makes_the_same_slots(machine: Machine) -> None:
    assert machine.cap(uapi.KVM_CAP_USER_MEMORY2) == 1
    memory = mmap.mmap(-1, 2 * PAGE)
    memory[0], memory[PAGE] = 0x41, 0x42
    set_region = uapi.KVM_SET_USER_MEMORY_REGION2

    def do(region: CData) -> int:
        return errno_of(lambda: machine.ioctl(machine.vm, set_region, region))

    made = region2(1, HOLE, memory)
    # What belongs to guest_memfd is not looked at without its flag, and padding never.
    made.guest_memfd, made.guest_memfd_offset, made.pad1, made.pad2[13] = 0xFFFF, 3, 1, 1
    assert do(made) == do(made) == 0
    # mov ds, HOLE >> 4; mov al, [0]; mov ah, [0x1000]; out 0x10, ax
    machine.start(b"\xb8\x00\xd0\x8e\xd8\x8a\x1e\x00\x00\x8a\x3e\x00\x10" + HLT)
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert machine.regs.rbx & 0xFFFF == 0x4241
    # One slot, whichever call it is by.
    old = new("kvm_userspace_memory_region")
    old.slot, old.guest_phys_addr, old.memory_size = 1, HOLE + PAGE, 2 * PAGE
    old.userspace_addr = made.userspace_addr
    machine.ioctl(machine.vm, uapi.KVM_SET_USER_MEMORY_REGION, old)
    assert do(region2(2, HOLE, memory)) == EEXIST
    assert do(region2(1, 0, None)) == 0
    assert do(region2(1, 0, None)) == EINVAL
    assert do(region2(2, HOLE, memory, uapi.KVM_MEM_READONLY | uapi.KVM_MEM_LOG_DIRTY_PAGES)) == 0


@pytest.mark.spec("vm.SET_USER_MEMORY_REGION2", "vm.CREATE_GUEST_MEMFD", "cap.MEM_ATTR")
def test_there_is_no_guest_memfd(machine: Machine) -> None:
    memory = mmap.mmap(-1, PAGE)
    for flags in (8, 1 << 8, 1 << 31):
        region = region2(1, HOLE, memory, flags)
        assert (
            errno_of(lambda r=region: machine.ioctl(machine.vm, uapi.KVM_SET_USER_MEMORY_REGION2, r))
            == EINVAL
        )
    assert errno_of(lambda: machine.ioctl(machine.vm, uapi.KVM_SET_USER_MEMORY_REGION2, 8)) == EFAULT
    region = region2(1, HOLE, memory, uapi.KVM_MEM_GUEST_MEMFD)
    region.guest_memfd = 0xFFFF_FFFF
    wanted = EBADF if machine.cap(uapi.KVM_CAP_GUEST_MEMFD) else EINVAL
    assert errno_of(lambda: machine.ioctl(machine.vm, uapi.KVM_SET_USER_MEMORY_REGION2, region)) == wanted
    only_pykvm(machine, "has guest_memfd")
    assert machine.cap(uapi.KVM_CAP_GUEST_MEMFD) == machine.cap(uapi.KVM_CAP_GUEST_MEMFD_FLAGS) == 0
    assert machine.cap(uapi.KVM_CAP_MEMORY_ATTRIBUTES) == 0
    for request in (uapi.KVM_CREATE_GUEST_MEMFD, uapi.KVM_SET_MEMORY_ATTRIBUTES):
        assert errno_of(lambda r=request: machine.ioctl(machine.vm, r, 0)) == ENOTTY


# ---- attributes ----------------------------------------------------------------------------------

ATTRS = (uapi.KVM_HAS_DEVICE_ATTR, uapi.KVM_GET_DEVICE_ATTR, uapi.KVM_SET_DEVICE_ATTR)


def attr(group: int, number: int, cell: CData | None = None, flags: int = 0) -> CData:
    made = new("kvm_device_attr")
    made.group, made.attr, made.flags = group, number, flags
    made.addr = 8 if cell is None else int(ffi.cast("uintptr_t", cell))
    return made


@pytest.mark.spec("dev.attr", "vcpu.TSC_OFFSET")
def test_attributes_of_a_vcpu(machine: Machine) -> None:
    assert machine.cap(uapi.KVM_CAP_VCPU_ATTRIBUTES) == 1
    cell = ffi.new("uint64_t *", 0x1234_5678_9ABC)
    # Flags are not looked at, and an address only where it is used.
    assert machine.do(uapi.KVM_HAS_DEVICE_ATTR, attr(0, 0)) == 0
    assert machine.do(uapi.KVM_SET_DEVICE_ATTR, attr(0, 0, cell, flags=7)) == 0
    # The device at hand keeps no offset.
    kept = 0 if machine.backend.real else 0x1234_5678_9ABC
    cell[0] = 1
    assert machine.do(uapi.KVM_GET_DEVICE_ATTR, attr(0, 0, cell)) == 0
    assert cell[0] == kept
    for request in ATTRS:
        for group, number in ((0, 1), (0, 1 << 32), (1, 0), (0xFFFF_FFFF, 0)):
            assert machine.errno(request, attr(group, number, cell)) == ENXIO
        assert machine.errno(request, 8) == EFAULT
    for request in ATTRS[1:]:
        assert machine.errno(request, attr(0, 0)) == EFAULT
    assert machine.do(uapi.KVM_GET_DEVICE_ATTR, attr(0, 0, cell)) == 0
    assert cell[0] == kept


@pytest.mark.spec("dev.attr", "sys.DEVICE_ATTR", "dev.vm_attr_absent")
def test_attributes_of_the_device_and_of_a_vm(machine: Machine) -> None:
    assert machine.cap(uapi.KVM_CAP_SYS_ATTRIBUTES) == 1
    assert machine.cap(uapi.KVM_CAP_VM_ATTRIBUTES) == 0
    cell = ffi.new("uint64_t *")

    def do(fd: int, request: int, arg: CData) -> int:
        return errno_of(lambda: machine.ioctl(fd, request, arg))

    assert do(machine.kvm, uapi.KVM_HAS_DEVICE_ATTR, attr(0, 0)) == 0
    assert do(machine.kvm, uapi.KVM_GET_DEVICE_ATTR, attr(0, 0, cell)) == 0
    assert cell[0] & 3 == 3
    assert do(machine.kvm, uapi.KVM_GET_DEVICE_ATTR, attr(0, 0)) == EFAULT
    for request in ATTRS[:2]:
        for group, number in ((0, 1), (2, 0), (0xFFFF_FFFF, 0)):
            assert do(machine.kvm, request, attr(group, number, cell)) == ENXIO
    # /dev/kvm has none that can be set, and a VM has none at all.
    assert do(machine.kvm, uapi.KVM_SET_DEVICE_ATTR, attr(0, 0, cell)) == EINVAL
    for request in ATTRS:
        assert do(machine.vm, request, attr(0, 0, cell)) == ENOTTY


# ---- capabilities that change nothing ------------------------------------------------------------


@pytest.mark.spec("cap.APIC_BUS_CYCLES")
def test_the_bus_of_an_apic_that_is_not_there(machine: Machine) -> None:
    assert machine.cap(uapi.KVM_CAP_X86_APIC_BUS_CYCLES_NS) == 1

    def enable(value: int) -> int:
        return errno_of(lambda: machine.enable(machine.vm, uapi.KVM_CAP_X86_APIC_BUS_CYCLES_NS, value))

    largest = MASK64 // (0xFFFF_FFFF * 128)
    assert enable(0) == enable(largest + 1) == enable(MASK64) == EINVAL
    assert enable(1) == enable(10) == enable(largest) == ENXIO


@pytest.mark.spec("cap.NX_HUGE_PAGES")
def test_nx_huge_pages_can_be_done_without(new_machine: NewMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = new_machine()
    cap = uapi.KVM_CAP_VM_DISABLE_NX_HUGE_PAGES
    assert machine.cap(cap) == 1
    only_pykvm(machine, "asks for a right that the tests may not have")
    monkeypatch.setattr(inert, "_is_capable", lambda: False)
    assert errno_of(lambda: machine.enable(machine.vm, cap, 0)) == EPERM
    monkeypatch.setattr(inert, "_is_capable", lambda: True)
    vm = machine.ioctl(machine.kvm, uapi.KVM_CREATE_VM)
    assert errno_of(lambda: machine.enable(vm, cap, 1)) == EINVAL
    machine.enable(vm, cap, 0)
    os.close(vm)
    # With a vCPU it is too late.
    assert errno_of(lambda: machine.enable(machine.vm, cap, 0)) == EINVAL


def test_the_right_to_do_so_is_read_from_the_process() -> None:
    assert inert._is_capable() is bool(os.geteuid() == 0 and _effective() >> 22 & 1)


def _effective() -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        return int(next(line for line in status if line.startswith("CapEff:")).split()[1], 16)


@pytest.mark.spec("cap.X86_GUEST_MODE")
def test_capabilities_that_are_always_there(machine: Machine) -> None:
    for name in ("X86_GUEST_MODE", "SYSTEM_EVENT_DATA", "ASYNC_PF", "ASYNC_PF_INT"):
        cap = getattr(uapi, f"KVM_CAP_{name}")
        assert machine.cap(cap) == 1, name
        assert errno_of(lambda c=cap: machine.enable(machine.vm, c)) == EINVAL
    machine.start(HLT)
    machine.go()
    assert not machine.run.flags & uapi.KVM_RUN_X86_GUEST_MODE


@pytest.mark.spec("cap.IRQ_ROUTING")
def test_routes_can_be_counted_on_but_not_set_without_controllers(machine: Machine) -> None:
    assert machine.cap(uapi.KVM_CAP_IRQ_ROUTING) == 4096
    table = ffi.new("struct kvm_irq_routing *", {"entries": 1})
    for count in (0, 1):
        table.nr = count
        assert errno_of(lambda: machine.ioctl(machine.vm, uapi.KVM_SET_GSI_ROUTING, table)) == EINVAL


@pytest.mark.spec("vm.ASSIGN_DEVICE")
@pytest.mark.parametrize("number", [0x69, 0x70, 0x71, 0x72, 0x73, 0x74, 0x75, 0xA4])
def test_devices_are_not_assigned_any_more(machine: Machine, number: int) -> None:
    """KVM_ASSIGN_PCI_DEVICE (64 bytes) and its family went with Linux 4.12."""
    for size in (4, 8, 16, 52, 64):
        request = 1 << 30 | size << 16 | 0xAE << 8 | number
        assert errno_of(lambda r=request: machine.ioctl(machine.vm, r, new("kvm_regs"))) == ENOTTY


@pytest.mark.spec("msr.migration")
def test_migration_control_is_the_clients(machine: Machine) -> None:
    """MSR_KVM_MIGRATION_CONTROL is none of KVM's: a client serves it by exits."""
    emulated(machine, "has its own way of exits for registers")
    control = 0x4B56_4D08
    assert machine.get_msr(control) is None
    assert not machine.set_msr(control, 1)
    machine.enable(machine.vm, uapi.KVM_CAP_X86_USER_SPACE_MSR, uapi.KVM_MSR_EXIT_REASON_UNKNOWN)
    # wrmsr; rdmsr; hlt
    machine.start(b"\x0f\x30\x0f\x32" + HLT, rcx=control, rax=1, rdx=0)
    assert machine.go() == uapi.KVM_EXIT_X86_WRMSR
    assert (machine.run.msr.index, machine.run.msr.data) == (control, 1)
    assert machine.go() == uapi.KVM_EXIT_X86_RDMSR
    machine.run.msr.data = 1
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert machine.regs.rax == 1


# ---- what needs a local APIC in the kernel, without one ------------------------------------------


@pytest.mark.spec("msr.async_pf_en", "msr.apf_int_ack", "msr.pv_eoi", "cpuid.f6")
def test_paravirtual_registers_without_a_local_apic(machine: Machine) -> None:
    supported = supported_cpuid(machine)
    eax = next(e.eax for e in supported.entries[0 : supported.nent] if e.function == 0x4000_0001)
    assert eax >> uapi.KVM_FEATURE_PV_EOI & 1
    good = {
        uapi.MSR_KVM_ASYNC_PF_EN: (0,),
        uapi.MSR_KVM_ASYNC_PF_INT: (),
        uapi.MSR_KVM_ASYNC_PF_ACK: (0, 1, 2, MASK64),
        # Its page has to be there if it is turned on.
        uapi.MSR_KVM_PV_EOI_EN: (0, 0x1001, 0x1004, 0x10, RAM),
    }
    bad = {
        uapi.MSR_KVM_ASYNC_PF_EN: (1, 2, 4, 8, 0x10, 0x1000, 0x1001),
        uapi.MSR_KVM_ASYNC_PF_INT: (0, 1, 0xEC, 0x100),
        uapi.MSR_KVM_PV_EOI_EN: (2, 3, 0x1002, RAM | 1, 1 << 63 | 1),
    }
    for index, values in good.items():
        for value in values:
            assert machine.set_msr(index, value), (hex(index), hex(value))
            assert machine.get_msr(index) == (0 if index == uapi.MSR_KVM_ASYNC_PF_ACK else value)
    for index, values in bad.items():
        before = machine.get_msr(index)
        for value in values:
            assert not machine.set_msr(index, value), (hex(index), hex(value))
        assert machine.get_msr(index) == before


def hypercall(machine: Machine, number: int, *args: int) -> int:
    """Do a hypercall in 64-bit code; return its result, signed."""
    values = dict(zip(("rbx", "rcx", "rdx", "rsi"), args, strict=False))
    machine.set_regs(rip=0x1000, rax=number, rflags=2, **values)
    assert machine.go() == uapi.KVM_EXIT_HLT
    result = int(machine.regs.rax)
    return result - (1 << 64) if result >> 63 else result


@pytest.fixture
def long_mode(machine: Machine) -> Machine:
    """A guest in long mode, its first 2 MiB mapped one to one, VMCALL and HLT at 0x1000."""
    emulated(machine, "knows no VMCALL")
    for table, entry in ((0x4000, 0x5003), (0x5000, 0x6003), (0x6000, 0x83)):
        machine.load(struct.pack("<Q", entry), table)
    machine.load(VMCALL + HLT, 0x1000)
    machine.do(uapi.KVM_SET_CPUID2, supported_cpuid(machine))
    sregs = machine.sregs
    sregs.cr0, sregs.cr3, sregs.cr4 = 0x8000_0011, 0x4000, uapi.X86_CR4_PAE
    sregs.efer = uapi.EFER_LME | uapi.EFER_LMA
    sregs.cs.base, sregs.cs.selector, sregs.cs.limit = 0, 8, 0xFFFF_FFFF
    sregs.cs.type, sregs.cs.l, sregs.cs.db, sregs.cs.g, sregs.cs.s, sregs.cs.present = 11, 1, 0, 1, 1, 1
    machine.set_sregs(sregs)
    return machine


def test_ipis_are_not_sent_without_a_local_apic(long_mode: Machine) -> None:
    send = uapi.KVM_HC_SEND_IPI
    assert hypercall(long_mode, send, 1, 0, 0, 0xFB) == -uapi.KVM_EOPNOTSUPP
    for icr in (0x8FB, 0x4_00FB, 0x8_00FB, 0xC_08FB):
        assert hypercall(long_mode, send, 1, 0, 0, icr) == -uapi.KVM_EINVAL
    # As with every other call, CPUID decides if the client says so.
    long_mode.enable(long_mode.vcpu, uapi.KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 1)
    assert hypercall(long_mode, send, 1, 0, 0, 0xFB) == -uapi.KVM_ENOSYS


@pytest.mark.spec("hc.CLOCK_PAIRING")
def test_the_time_of_day_is_paired_with_the_tsc(long_mode: Machine) -> None:
    pairing = uapi.KVM_HC_CLOCK_PAIRING
    long_mode.load(b"\xff" * 80, 0x3000)
    before = time.time_ns()
    tsc = long_mode.get_msr(uapi.MSR_IA32_TSC)
    assert hypercall(long_mode, pairing, 0x3000, 0) == 0
    now = new("kvm_clock_pairing")
    ffi.memmove(now, long_mode.ram[0x3000:0x3040], 64)
    assert before <= now.sec * 10**9 + now.nsec <= time.time_ns()
    assert now.nsec < 10**9
    assert tsc is not None
    assert tsc < now.tsc < (long_mode.get_msr(uapi.MSR_IA32_TSC) or 0)
    assert now.flags == 0
    assert list(now.pad) == [0] * 9
    assert long_mode.ram[0x3040] == 0xFF
    for kind in (1, MASK64):
        assert hypercall(long_mode, pairing, 0x3000, kind) == -uapi.KVM_EOPNOTSUPP
    assert hypercall(long_mode, pairing, RAM, 0) == -uapi.KVM_EFAULT
