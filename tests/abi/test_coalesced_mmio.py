"""Writes that are kept in a ring: KVM_CAP_COALESCED_MMIO and KVM_CAP_COALESCED_PIO."""

from __future__ import annotations

import mmap
import os
import threading
from errno import EFAULT, EINVAL, ENOSPC, ENOTTY
from typing import TYPE_CHECKING

import pytest

from pykvm import uapi
from pykvm.abi import CData, ffi, new
from tests.machine import HOLE, RUN_SIZE, Machine, emulated, errno_of

if TYPE_CHECKING:
    from tests.conftest import NewMachine

MAX = 170
PAGE = 4096
HLT = b"\xf4"
# mov ds, HOLE >> 4
DS_HOLE = b"\xb8\x00\xd0\x8e\xd8"


def ring_of(mapping: mmap.mmap) -> CData:
    return ffi.cast("struct kvm_coalesced_mmio_ring *", ffi.addressof(ffi.from_buffer(mapping), 2 * PAGE))


def entries(ring: CData) -> list[tuple[int, int, int, bytes]]:
    """Return what is in the ring: (address, length, pio, data)."""
    found = []
    at = ring.first
    while at != ring.last:
        entry = ring.coalesced_mmio[at]
        found.append((entry.phys_addr, entry.len, entry.pio, bytes(ffi.buffer(entry.data))[: entry.len]))
        at = (at + 1) % MAX
    return found


def zone(machine: Machine, request: int, addr: int, size: int, pio: int = 0) -> int:
    value = new("kvm_coalesced_mmio_zone")
    value.addr, value.size, value.pio = addr, size, pio
    return machine.ioctl(machine.vm, request, value)


def register(machine: Machine, addr: int, size: int, pio: int = 0) -> None:
    assert zone(machine, uapi.KVM_REGISTER_COALESCED_MMIO, addr, size, pio) == 0


def unregister(machine: Machine, addr: int, size: int, pio: int = 0) -> None:
    assert zone(machine, uapi.KVM_UNREGISTER_COALESCED_MMIO, addr, size, pio) == 0


def store(offset: int, value: int, size: int) -> bytes:
    """Return MOV [offset], value with a real-mode guest's operand of so many bytes."""
    prefix, opcode = {1: (b"", b"\xc6"), 2: (b"", b"\xc7"), 4: (b"\x66", b"\xc7")}[size]
    return prefix + opcode + b"\x06" + offset.to_bytes(2, "little") + value.to_bytes(size, "little")


@pytest.fixture
def ring(machine: Machine) -> CData:
    return ring_of(machine.mapping)


# ---- the ioctls ----------------------------------------------------------------------------------


@pytest.mark.spec("cap.COALESCED_MMIO", "vm.REGISTER_COALESCED_MMIO", "vm.UNREGISTER_COALESCED_MMIO")
def test_zones_come_and_go(machine: Machine) -> None:
    assert machine.cap(uapi.KVM_CAP_COALESCED_MMIO) == 2
    assert machine.cap(uapi.KVM_CAP_COALESCED_PIO) == 1
    for pio in (0, 1):
        register(machine, HOLE, 0x100, pio)
        register(machine, HOLE, 0x100, pio)
        register(machine, HOLE, 0, pio)
        unregister(machine, HOLE, 0x100, pio)
        unregister(machine, 0x1234, 1, pio)
    for request in (uapi.KVM_REGISTER_COALESCED_MMIO, uapi.KVM_UNREGISTER_COALESCED_MMIO):
        for pio in (2, 0xFFFF_FFFF):
            assert errno_of(lambda r=request, p=pio: zone(machine, r, HOLE, 1, p)) == EINVAL
        assert errno_of(lambda r=request: machine.ioctl(machine.vm, r, 1)) == EFAULT
        assert errno_of(lambda r=request: machine.ioctl(machine.kvm, r, 0)) == EINVAL


@pytest.mark.spec("vm.REGISTER_COALESCED_MMIO")
def test_a_thousand_zones_of_each_kind(machine: Machine) -> None:
    for at in range(1000):
        register(machine, at * 16, 16)
    assert errno_of(lambda: zone(machine, uapi.KVM_REGISTER_COALESCED_MMIO, 0, 1)) == ENOSPC
    register(machine, 0, 1, pio=1)
    unregister(machine, 16, 16)
    register(machine, 16, 16)


def test_a_kernel_without_ports_takes_the_field_for_padding(new_machine: NewMachine) -> None:
    machine = new_machine(kernel="4.14")
    if machine.backend.real:
        pytest.skip("the real device has one kernel")
    ring = ring_of(machine.mapping)
    assert machine.cap(uapi.KVM_CAP_COALESCED_MMIO) == 2
    assert machine.cap(uapi.KVM_CAP_COALESCED_PIO) == 0
    register(machine, HOLE, 16, 7)
    machine.start(DS_HOLE + store(0, 0x11, 1) + b"\xe6\x00" + HLT)
    assert machine.go() == uapi.KVM_EXIT_IO
    assert entries(ring) == [(HOLE, 1, 0, b"\x11")]
    unregister(machine, HOLE, 1, 9)
    assert errno_of(lambda: machine.ioctl(machine.vcpu, uapi.KVM_REGISTER_COALESCED_MMIO, 0)) in {
        EINVAL,
        ENOTTY,
    }


# ---- what goes into the ring ---------------------------------------------------------------------


@pytest.mark.spec("run.coalesced_ring")
def test_stores_are_kept_in_order(machine: Machine, ring: CData) -> None:
    register(machine, HOLE, 0x100)
    code = store(0, 0x11, 1) + store(0x10, 0x2222, 2) + store(0xFC, 0x33333333, 4)
    machine.start(DS_HOLE + code + HLT)
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert entries(ring) == [
        (HOLE, 1, 0, b"\x11"),
        (HOLE + 0x10, 2, 0, b"\x22" * 2),
        (HOLE + 0xFC, 4, 0, b"\x33" * 4),
    ]


@pytest.mark.spec("run.coalesced_ring")
def test_what_is_not_wholly_inside_exits(machine: Machine, ring: CData) -> None:
    register(machine, HOLE + 0x10, 0x10)
    outside = (0x0E, 0x1E, 0x0C, 0x20)
    code = b"".join(store(offset, 0x44444444, 4) for offset in outside) + store(0x1C, 0x55555555, 4)
    machine.start(DS_HOLE + code + HLT)
    for offset in outside:
        assert machine.go() == uapi.KVM_EXIT_MMIO
        assert machine.run.mmio.phys_addr == HOLE + offset
        assert machine.run.mmio.len == 4
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert entries(ring) == [(HOLE + 0x1C, 4, 0, b"\x55" * 4)]


@pytest.mark.spec("run.coalesced_ring")
def test_two_zones_side_by_side_are_not_one(machine: Machine, ring: CData) -> None:
    register(machine, HOLE, 2)
    register(machine, HOLE + 2, 2)
    machine.start(DS_HOLE + store(0, 0x66666666, 4) + store(2, 0x7777, 2) + HLT)
    assert machine.go() == uapi.KVM_EXIT_MMIO
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert entries(ring) == [(HOLE + 2, 2, 0, b"\x77\x77")]


@pytest.mark.spec("run.coalesced_ring")
def test_reads_exit(machine: Machine, ring: CData) -> None:
    register(machine, HOLE, 0x100)
    # mov [0], 0x11; mov al, [0x10]; mov [1], al
    machine.start(DS_HOLE + store(0, 0x11, 1) + b"\xa0\x10\x00\xa2\x01\x00" + HLT)
    assert machine.go() == uapi.KVM_EXIT_MMIO
    assert not machine.run.mmio.is_write
    assert entries(ring) == [(HOLE, 1, 0, b"\x11")]
    machine.run.mmio.data[0] = 0x99
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert entries(ring)[1:] == [(HOLE + 1, 1, 0, b"\x99")]


@pytest.mark.spec("run.coalesced_ring")
def test_a_modified_zone_reads_by_exit_and_writes_to_the_ring(machine: Machine, ring: CData) -> None:
    register(machine, HOLE, 0x100)
    # inc byte [4]
    machine.start(DS_HOLE + b"\xfe\x06\x04\x00" + HLT)
    assert machine.go() == uapi.KVM_EXIT_MMIO
    assert not machine.run.mmio.is_write
    machine.run.mmio.data[0] = 0x41
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert entries(ring) == [(HOLE + 4, 1, 0, b"\x42")]


@pytest.mark.spec("run.coalesced_ring")
def test_string_stores_are_kept_element_by_element(machine: Machine, ring: CData) -> None:
    register(machine, HOLE, 0x1000)
    # mov es, ax; xor di, di; mov cx, 5; mov ax, 0x1234; rep stosw
    machine.start(b"\xb8\x00\xd0\x8e\xc0\x31\xff\xb9\x05\x00\xb8\x34\x12\xf3\xab" + HLT)
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert entries(ring) == [(HOLE + 2 * n, 2, 0, b"\x34\x12") for n in range(5)]
    assert machine.regs.rcx == 0
    assert machine.regs.rdi == 10


@pytest.mark.spec("run.coalesced_ring", "vm.REGISTER_COALESCED_MMIO")
def test_ports(machine: Machine, ring: CData) -> None:
    register(machine, 0x70, 4, pio=1)
    # out 0x70, al; out 0x72, ax; out 0x73, ax (runs out of the zone); in al, 0x70
    machine.start(b"\xb8\x34\x12\xe6\x70\xe7\x72\xe7\x73\xe4\x70" + HLT)
    assert machine.go() == uapi.KVM_EXIT_IO
    assert (machine.run.io.port, machine.run.io.size) == (0x73, 2)
    assert entries(ring) == [(0x70, 1, 1, b"\x34"), (0x72, 2, 1, b"\x34\x12")]
    assert machine.go() == uapi.KVM_EXIT_IO
    assert machine.run.io.direction == uapi.KVM_EXIT_IO_IN
    assert machine.go() == uapi.KVM_EXIT_HLT


@pytest.mark.spec("run.coalesced_ring")
def test_a_port_is_no_address(machine: Machine, ring: CData) -> None:
    register(machine, HOLE, 0x100)
    register(machine, 0x70, 1)
    register(machine, HOLE + 0x100, 1, pio=1)
    machine.start(DS_HOLE + store(0x100, 0x11, 1) + b"\xe6\x70" + HLT)
    assert machine.go() == uapi.KVM_EXIT_MMIO
    assert machine.go() == uapi.KVM_EXIT_IO
    assert entries(ring) == []


@pytest.mark.spec("run.coalesced_ring")
def test_rep_outs_to_a_zone(machine: Machine, ring: CData) -> None:
    register(machine, 0x70, 1, pio=1)
    machine.load(b"abcd", 0x3000)
    # mov si, 0x3000; mov dx, 0x70; mov cx, 4; rep outsb
    machine.start(b"\xbe\x00\x30\xba\x70\x00\xb9\x04\x00\xf3\x6e" + HLT)
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert [data for *_, data in entries(ring)] == [b"a", b"b", b"c", b"d"]
    assert machine.regs.rsi == 0x3004


def test_a_step_over_a_coalesced_out_is_one_step(machine: Machine, ring: CData) -> None:
    emulated(machine, "answers a step over OUT late")
    register(machine, 0x70, 1, pio=1)
    machine.start(b"\xe6\x70\x90" + HLT)
    debug = new("kvm_guest_debug")
    debug.control = uapi.KVM_GUESTDBG_ENABLE | uapi.KVM_GUESTDBG_SINGLESTEP
    machine.do(uapi.KVM_SET_GUEST_DEBUG, debug)
    for rip in (0x1002, 0x1003):
        assert machine.go() == uapi.KVM_EXIT_DEBUG
        assert machine.regs.rip == rip
        assert len(entries(ring)) == 1


# ---- the ring is full, or not --------------------------------------------------------------------


@pytest.mark.spec("run.coalesced_ring")
def test_a_full_ring_exits_until_there_is_room(machine: Machine, ring: CData) -> None:
    register(machine, HOLE, 0x100)
    # mov cx, 400; again: mov [0], cl; loop again
    machine.start(DS_HOLE + b"\xb9\x90\x01\x88\x0e\x00\x00\xe2\xfa" + HLT)
    seen = []
    while machine.go() == uapi.KVM_EXIT_MMIO:
        seen += [data[0] for *_, data in entries(ring)]
        ring.first = ring.last
        seen.append(machine.run.mmio.data[0])
    seen += [data[0] for *_, data in entries(ring)]
    # 169 entries, one exit, and so on: nothing is lost, and the order is the guest's.
    assert seen == [n & 0xFF for n in range(400, 0, -1)]


@pytest.mark.spec("run.coalesced_ring")
@pytest.mark.parametrize("last", [MAX, MAX + 1, 0xFFFF_FFFF])
def test_nonsense_in_last_turns_it_off(machine: Machine, ring: CData, last: int) -> None:
    register(machine, HOLE, 0x100)
    ring.last = last
    machine.start(DS_HOLE + store(0, 0x11, 1) + store(1, 0x22, 1) + HLT)
    assert machine.go() == uapi.KVM_EXIT_MMIO
    assert ring.last == last
    ring.first = ring.last = 5
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert entries(ring) == [(HOLE + 1, 1, 0, b"\x22")]
    assert ring.first == 5


@pytest.mark.spec("run.coalesced_ring")
def test_nonsense_in_first_is_no_danger(machine: Machine, ring: CData) -> None:
    register(machine, HOLE, 0x100)
    ring.first = 0xFFFF_FFFF
    machine.start(DS_HOLE + b"\xb9\x90\x01\x88\x0e\x00\x00\xe2\xfa" + HLT)
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert ring.last == 400 % MAX


# ---- several vCPUs, and threads ------------------------------------------------------------------


def second(machine: Machine) -> tuple[int, mmap.mmap]:
    fd = machine.ioctl(machine.vm, uapi.KVM_CREATE_VCPU, 1)
    return fd, mmap.mmap(fd, RUN_SIZE)


@pytest.mark.spec("run.coalesced_ring")
def test_every_vcpu_shows_the_ring(machine: Machine, ring: CData) -> None:
    register(machine, HOLE, 0x100)
    machine.start(DS_HOLE + store(0, 0x11, 1) + b"\xe6\x99" + store(1, 0x22, 1) + HLT)
    assert machine.go() == uapi.KVM_EXIT_IO
    fd, mapping = second(machine)
    try:
        other = ring_of(mapping)
        assert entries(other) == entries(ring) == [(HOLE, 1, 0, b"\x11")]
        other.first = other.last
        assert machine.go() == uapi.KVM_EXIT_HLT
        assert entries(ring) == entries(other) == [(HOLE + 1, 1, 0, b"\x22")]
    finally:
        os.close(fd)


@pytest.mark.spec("run.coalesced_ring")
def test_two_vcpus_fill_it_and_a_thread_empties_it(machine: Machine, ring: CData) -> None:
    """No store comes twice, and none is lost."""
    emulated(machine, "is slow")
    register(machine, HOLE, 0x100)
    fd, mapping = second(machine)
    count = 600
    code = DS_HOLE + b"\xb9" + count.to_bytes(2, "little") + b"\x89\x0d\xe2\xfc" + HLT
    machine.start(code, rdi=0)
    regs, sregs = machine.regs, machine.sregs
    regs.rdi = 0x10
    machine.ioctl(fd, uapi.KVM_SET_SREGS, sregs)
    machine.ioctl(fd, uapi.KVM_SET_REGS, regs)
    lock = threading.Lock()
    seen: dict[int, list[int]] = {HOLE: [], HOLE + 0x10: []}

    def drain(run: CData) -> None:
        with lock:
            while ring.first != ring.last:
                entry = ring.coalesced_mmio[ring.first]
                seen[entry.phys_addr].append(int.from_bytes(bytes(entry.data)[:2], "little"))
                ring.first = (ring.first + 1) % MAX
            if run.exit_reason == uapi.KVM_EXIT_MMIO:
                seen[run.mmio.phys_addr].append(int.from_bytes(bytes(run.mmio.data)[:2], "little"))

    def work(vcpu: int, run: CData) -> None:
        while True:
            machine.ioctl(vcpu, uapi.KVM_RUN)
            drain(run)
            if run.exit_reason == uapi.KVM_EXIT_HLT:
                return

    run = ffi.cast("struct kvm_run *", ffi.from_buffer(mapping))
    threads = [threading.Thread(target=work, args=each) for each in ((machine.vcpu, machine.run), (fd, run))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    os.close(fd)
    for values in seen.values():
        assert sorted(values, reverse=True) == list(range(count, 0, -1))
