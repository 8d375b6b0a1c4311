"""Dirty pages, told in rings or in bitmaps that the client clears: none is lost, and none is invented."""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
import sys
import threading
import time
from errno import E2BIG, EFAULT, EINTR, EINVAL, ENOENT, ENXIO
from typing import TYPE_CHECKING

import pytest

from pykvm import uapi
from pykvm.abi import CData, ffi, new
from pykvm.client import Vm as ClientVm
from tests.guest.bare import assemble
from tests.machine import Backend, errno_of, msr_list
from tests.mmu.guest import FRAMES, TEST, PagingGuest, W

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PAGE = 4096
RING_PAGE = 64
SIZE = 0x10_0000
CODE = 0x1000
DIRTY, RESET = uapi.KVM_DIRTY_GFN_F_DIRTY, uapi.KVM_DIRTY_GFN_F_RESET
LOG = uapi.KVM_MEM_LOG_DIRTY_PAGES
HLT = b"\xf4"
RESERVED = 64
# again: mov es, ax; mov es:[0], cl; add ax, 0x100; loop again; hlt: one byte in each of CX pages from AX.
FILL = b"\x8e\xc0\x26\x88\x0e\x00\x00\x05\x00\x01\xe2\xf4"
Entry = tuple[int, int]


class RingVm:
    """A VM with dirty rings, or without for `entries` 0, 1 MiB of logged memory in slot 0, and vCPUs in real mode."""

    def __init__(
        self, backend: Backend, *, entries: int = 256, vcpus: int = 1, flags: int = LOG, **options: object
    ) -> None:
        self.backend = backend
        self._stack = contextlib.ExitStack()
        self.kvm = self._fd(backend.open(**options))
        self.vm = self._fd(backend.ioctl(self.kvm, uapi.KVM_CREATE_VM))
        self.entries = entries
        self.ram = mmap.mmap(-1, SIZE)
        self.slot(0, 0, SIZE, self.ram, flags)
        if entries:
            self.enable(uapi.KVM_CAP_DIRTY_LOG_RING_ACQ_REL, entries * 16)
        self.maps: list[mmap.mmap] = []
        self.vcpus: list[int] = []
        self.runs: list[CData] = []
        self.rings: list[CData] = []
        # Where each ring is read next.
        self.heads = [0] * vcpus
        for number in range(vcpus):
            self._vcpu(number)

    def _vcpu(self, number: int) -> None:
        fd = self._fd(self.backend.ioctl(self.vm, uapi.KVM_CREATE_VCPU, number))
        self.vcpus.append(fd)
        self.runs.append(self._map(fd, "struct kvm_run *", 3 * PAGE, 0))
        if self.entries:
            self.rings.append(self._map(fd, "struct kvm_dirty_gfn *", self.entries * 16, RING_PAGE * PAGE))

    def _map(self, fd: int, ctype: str, size: int, offset: int) -> CData:
        # A cast keeps nothing alive.
        self.maps.append(mmap.mmap(fd, size, offset=offset))
        return ffi.cast(ctype, ffi.from_buffer(self.maps[-1]))

    def _fd(self, fd: int) -> int:
        self._stack.callback(os.close, fd)
        return fd

    def close(self) -> None:
        self._stack.close()

    def do(self, request: int, arg: object = 0) -> int:
        return self.backend.ioctl(self.vm, request, arg)

    def enable(self, cap: int, *args: int, flags: int = 0) -> int:
        request = new("kvm_enable_cap")
        request.cap, request.flags = cap, flags
        for at, value in enumerate(args):
            request.args[at] = value
        return self.do(uapi.KVM_ENABLE_CAP, request)

    def slot(self, number: int, gpa: int, size: int, memory: mmap.mmap, flags: int = LOG) -> None:
        region = new("kvm_userspace_memory_region")
        region.slot, region.flags, region.guest_phys_addr, region.memory_size = number, flags, gpa, size
        region.userspace_addr = int(ffi.cast("uintptr_t", ffi.from_buffer(memory)))
        self.do(uapi.KVM_SET_USER_MEMORY_REGION, region)

    def start(self, code: bytes, vcpu: int = 0, *, at: int = CODE, **regs: int) -> None:
        self.ram[at : at + len(code)] = code
        fd = self.vcpus[vcpu]
        sregs, values = new("kvm_sregs"), new("kvm_regs")
        self.backend.ioctl(fd, uapi.KVM_GET_SREGS, sregs)
        if sregs.cs.base:
            sregs.cs.base = sregs.cs.selector = 0
            self.backend.ioctl(fd, uapi.KVM_SET_SREGS, sregs)
        values.rflags, values.rip, values.rsp = 2, at, 0x800
        for name, value in regs.items():
            setattr(values, name, value)
        self.backend.ioctl(fd, uapi.KVM_SET_REGS, values)

    def fill(self, first: int, count: int, vcpu: int = 0) -> None:
        """Have the guest write a byte to each of `count` pages when it runs."""
        self.start(FILL + HLT, vcpu, rax=first << 8, rcx=count)

    def go(self, vcpu: int = 0) -> int:
        assert self.backend.ioctl(self.vcpus[vcpu], uapi.KVM_RUN) == 0
        return int(self.runs[vcpu].exit_reason)

    def harvest(self, vcpu: int = 0, limit: int = 1 << 30) -> list[Entry]:
        """Collect entries: (slot, offset)."""
        found: list[Entry] = []
        while len(found) < limit:
            entry = self.rings[vcpu][self.heads[vcpu] % self.entries]
            if not entry.flags & DIRTY:
                break
            found.append((int(entry.slot), int(entry.offset)))
            entry.flags = RESET
            self.heads[vcpu] += 1
        return found

    def pages(self, vcpu: int = 0) -> list[int]:
        return [offset for _, offset in self.harvest(vcpu)]

    def reset(self) -> int:
        return self.do(uapi.KVM_RESET_DIRTY_RINGS)


def hardware(vm: RingVm) -> None:
    if vm.backend.real:
        pytest.skip("the device at hand emulates: slowly, stopping late, entering a page at every store")


@pytest.fixture(params=["tdp", "shadow"])
def options(request: pytest.FixtureRequest, backend: Backend) -> dict[str, object]:
    if backend.real:
        if request.param == "shadow":
            pytest.skip("the real device has one mode")
        return {}
    return {"extensions": {"no-tdp"}} if request.param == "shadow" else {}


@pytest.fixture
def new_rings(backend: Backend, options: dict[str, object]) -> Iterator[Callable[..., RingVm]]:
    made: list[RingVm] = []

    def make(*, entries: int = 256, vcpus: int = 1, flags: int = LOG) -> RingVm:
        made.append(RingVm(backend, entries=entries, vcpus=vcpus, flags=flags, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def rings(new_rings: Callable[..., RingVm]) -> RingVm:
    return new_rings()


# ---- turning them on -----------------------------------------------------------------------------


@pytest.mark.spec("cap.DIRTY_LOG_RING", "cap.DIRTY_LOG_RING_WITH_BITMAP")
@pytest.mark.parametrize("cap", [uapi.KVM_CAP_DIRTY_LOG_RING, uapi.KVM_CAP_DIRTY_LOG_RING_ACQ_REL])
def test_enabling(new_rings: Callable[..., RingVm], cap: int) -> None:
    vm = new_rings(entries=0, vcpus=0)
    assert vm.do(uapi.KVM_CHECK_EXTENSION, cap) == 1 << 20
    assert vm.do(uapi.KVM_CHECK_EXTENSION, uapi.KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP) == 0
    assert errno_of(lambda: vm.enable(uapi.KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP)) == EINVAL
    for size in (0, 1, 16, 2048, 4095, 4097, 12288, 1 << 32, 3 << 20):
        assert errno_of(lambda s=size: vm.enable(cap, s)) == EINVAL, size
    for size in (2 << 20, 1 << 31):
        assert errno_of(lambda s=size: vm.enable(cap, s)) == E2BIG, size
    assert errno_of(lambda: vm.enable(cap, 4097, flags=1)) == EINVAL
    assert errno_of(vm.reset) == EINVAL
    # The kernel's parameter has 32 bits, and nobody looks at the flags.
    assert vm.enable(cap, 4096 | 1 << 32, flags=1) == 0
    assert vm.reset() == 0
    for again in (4096, 8192):
        assert errno_of(lambda s=again: vm.enable(cap, s)) == EINVAL
        assert errno_of(lambda s=again: vm.enable(uapi.KVM_CAP_DIRTY_LOG_RING, s)) == EINVAL


@pytest.mark.spec("cap.DIRTY_LOG_RING", "vm.RESET_DIRTY_RINGS")
def test_too_late_with_a_vcpu(new_rings: Callable[..., RingVm]) -> None:
    vm = new_rings(entries=0)
    assert errno_of(lambda: vm.enable(uapi.KVM_CAP_DIRTY_LOG_RING, 4096)) == EINVAL
    assert errno_of(vm.reset) == EINVAL
    # The bitmap works on.
    log = new("kvm_dirty_log")
    bitmap = ffi.new("uint64_t[]", SIZE // PAGE // 64)
    log.dirty_bitmap = bitmap
    vm.fill(16, 2)
    assert vm.go() == uapi.KVM_EXIT_HLT
    assert vm.do(uapi.KVM_GET_DIRTY_LOG, log) == 0
    assert bitmap[0] == 3 << 16


@pytest.mark.spec("run.mmap_layout", "run.dirty_ring")
@pytest.mark.parametrize("entries", [256, 65536])
def test_the_ring_is_at_page_64_and_ends_there(new_rings: Callable[..., RingVm], entries: int) -> None:
    vm = new_rings(entries=entries)
    assert vm.backend.ioctl(vm.kvm, uapi.KVM_GET_VCPU_MMAP_SIZE) == 3 * PAGE
    vm.fill(16, 2)
    assert vm.go() == uapi.KVM_EXIT_HLT
    last = mmap.mmap(vm.vcpus[0], PAGE, offset=(RING_PAGE * PAGE) + entries * 16 - PAGE)
    assert bytes(last[-16:]) == bytes(16)
    whole = mmap.mmap(vm.vcpus[0], RING_PAGE * PAGE + entries * 16)
    assert whole[RING_PAGE * PAGE : RING_PAGE * PAGE + 4] == DIRTY.to_bytes(4, "little")


@pytest.mark.spec("cap.DIRTY_LOG_RING", "vm.GET_DIRTY_LOG", "vm.CLEAR_DIRTY_LOG")
def test_bitmaps_are_not_to_be_had(rings: RingVm) -> None:
    log, clear = new("kvm_dirty_log"), new("kvm_clear_dirty_log")
    log.slot = clear.slot = 99
    assert errno_of(lambda: rings.do(uapi.KVM_GET_DIRTY_LOG, log)) == ENXIO
    assert errno_of(lambda: rings.do(uapi.KVM_CLEAR_DIRTY_LOG, clear)) == ENXIO


@pytest.mark.spec("run.dirty_ring")
def test_a_bitmap_from_before_is_not_written_any_more(new_rings: Callable[..., RingVm]) -> None:
    """A slot that logged already when rings were turned on tells of its pages in the rings."""
    vm = new_rings(flags=LOG)
    vm.fill(16, 3)
    assert vm.go() == uapi.KVM_EXIT_HLT
    assert vm.pages() == [16, 17, 18]


# ---- what is in them -----------------------------------------------------------------------------


@pytest.mark.spec("run.dirty_ring", "vm.RESET_DIRTY_RINGS")
def test_pages_come_in_the_order_of_their_first_write(rings: RingVm) -> None:
    # mov byte [0x6000], 1; [0x3000]; [0x5000]; [0x6001]; and reads of 0x7000 and 0x8000
    code = b"".join(b"\xc6\x06" + at.to_bytes(2, "little") + b"\x01" for at in (0x6000, 0x3000, 0x5000))
    code += b"\xa0\x00\x70\xa0\x00\x80"
    rings.start(code + HLT)
    assert rings.go() == uapi.KVM_EXIT_HLT
    first = rings.rings[0][0]
    assert (first.flags, first.slot, first.offset) == (DIRTY, 0, 6)
    assert rings.harvest() == [(0, 6), (0, 3), (0, 5)]
    assert rings.reset() == 3
    assert [rings.rings[0][n].flags for n in range(4)] == [0] * 4
    assert rings.harvest() == []
    assert rings.reset() == 0


@pytest.mark.spec("vm.RESET_DIRTY_RINGS")
def test_a_page_is_told_again_after_its_reset_and_only_then(rings: RingVm) -> None:
    hardware(rings)
    for _ in range(2):
        rings.fill(16, 3)
        rings.go()
    assert rings.pages() == [16, 17, 18]
    rings.fill(16, 3)
    rings.go()
    # Collected, and not reset: not write-protected yet.
    assert rings.pages() == []
    assert rings.reset() == 3
    rings.fill(16, 3)
    rings.go()
    assert rings.pages() == [16, 17, 18]


@pytest.mark.spec("run.dirty_ring", "vm.dirty_toggle")
def test_only_slots_that_log(rings: RingVm) -> None:
    rings.slot(0, 0, SIZE, rings.ram, 0)
    rings.fill(16, 3)
    rings.go()
    assert rings.pages() == []
    rings.slot(0, 0, SIZE, rings.ram, LOG)
    rings.fill(16, 3)
    rings.go()
    assert rings.pages() == [16, 17, 18]


@pytest.mark.spec("run.dirty_ring")
def test_entries_name_slot_and_offset(rings: RingVm) -> None:
    other = mmap.mmap(-1, 4 * PAGE)
    rings.slot(7, SIZE, 4 * PAGE, other)
    # mov ax, 0xffff; mov ds, ax; mov byte [0x1010], 1: linear 0x101000
    rings.start(b"\xb8\xff\xff\x8e\xd8\xc6\x06\x10\x10\x01" + HLT)
    assert rings.go() == uapi.KVM_EXIT_HLT
    assert rings.harvest() == [(7, 1)]
    assert other[PAGE] == 1


@pytest.mark.spec("run.dirty_ring", "msr.system_time")
def test_what_kvm_writes_is_told_by_the_vcpu_it_is_for(new_rings: Callable[..., RingVm]) -> None:
    vm = new_rings(vcpus=2)
    assert vm.backend.ioctl(vm.vcpus[1], uapi.KVM_SET_MSRS, msr_list((uapi.MSR_KVM_SYSTEM_TIME_NEW, 0x9001)))
    vm.start(HLT, 1)
    assert vm.go(1) == uapi.KVM_EXIT_HLT
    assert vm.pages(0) == []
    assert set(vm.pages(1)) == {9}


@pytest.mark.spec("run.dirty_ring", "cap.X86_SMM")
def test_smm_has_an_address_space_of_its_own(rings: RingVm) -> None:
    if not rings.do(uapi.KVM_CHECK_EXTENSION, uapi.KVM_CAP_X86_SMM):
        pytest.skip("without SMM there is one address space")
    memory = mmap.mmap(-1, 0x10000)
    rings.slot(1 << 16 | 3, 0x30000, 0x10000, memory)
    # RSM at SMBASE + 0x8000
    memory[0x8000:0x8002] = b"\x0f\xaa"
    rings.start(HLT)
    rings.backend.ioctl(rings.vcpus[0], uapi.KVM_SMI)
    assert rings.go() == uapi.KVM_EXIT_HLT
    assert rings.harvest() == [(1 << 16 | 3, 0xF)]


# ---- taking entries back -------------------------------------------------------------------------


@pytest.mark.spec("vm.RESET_DIRTY_RINGS")
def test_reset_takes_what_was_collected_and_no_more(rings: RingVm) -> None:
    rings.fill(16, 8)
    rings.go()
    assert [offset for _, offset in rings.harvest(limit=3)] == [16, 17, 18]
    # One behind a gap waits for the gap.
    rings.rings[0][4].flags = RESET
    assert rings.reset() == 3
    assert rings.reset() == 0
    assert [rings.rings[0][n].flags for n in range(6)] == [0, 0, 0, DIRTY, RESET, DIRTY]
    rings.rings[0][3].flags = RESET
    assert rings.reset() == 2


@pytest.mark.spec("vm.RESET_DIRTY_RINGS")
def test_reset_minds_nothing_that_the_client_wrote(rings: RingVm) -> None:
    wild = [(0, 1 << 63), (0, SIZE // PAGE), (5, 0), (0xFFFF, 0), (1 << 16, 0), (0xFFFF_FFFF, (1 << 64) - 1)]
    rings.fill(16, len(wild))
    rings.go()
    rings.pages()
    for at, (slot, offset) in enumerate(wild):
        rings.rings[0][at].slot, rings.rings[0][at].offset = slot, offset
    assert rings.reset() == len(wild)
    rings.fill(40, 2)
    rings.go()
    assert rings.pages()[-2:] == [40, 41]


@pytest.mark.spec("vm.RESET_DIRTY_RINGS")
def test_slots_that_changed_before_the_reset(rings: RingVm) -> None:
    small = mmap.mmap(-1, 8 * PAGE)
    rings.slot(4, SIZE, 8 * PAGE, small)
    # mov ds, 0xffff; mov byte [0x10], [0x1010] ... [0x3010]
    stores = b"".join(b"\xc6\x06" + (n * PAGE + 16).to_bytes(2, "little") + b"\x01" for n in range(4))
    code = b"\xb8\xff\xff\x8e\xd8" + stores + HLT
    rings.start(code)
    rings.go()
    assert rings.harvest() == [(4, 0), (4, 1), (4, 2), (4, 3)]
    rings.slot(4, SIZE, 0, small)
    assert rings.reset() == 4
    rings.slot(4, SIZE, 8 * PAGE, small)
    rings.start(code)
    rings.go()
    assert rings.harvest() == [(4, 0), (4, 1), (4, 2), (4, 3)]
    # Shorter than what was collected.
    rings.slot(4, SIZE, 0, small)
    rings.slot(4, SIZE, 2 * PAGE, small)
    assert rings.reset() == 4
    # Moved: it is the place in the slot that counts.
    rings.slot(4, SIZE + 4 * PAGE, 2 * PAGE, small)
    rings.slot(5, SIZE, 4 * PAGE, rings.ram)
    rings.start(code)
    rings.go()
    assert rings.harvest() == [(5, 0), (5, 1), (5, 2), (5, 3)]
    assert rings.reset() == 4


# ---- full ----------------------------------------------------------------------------------------


def run_to_halt(vm: RingVm, vcpu: int = 0) -> list[int]:
    """Run, emptying the ring each time it is full; return all pages in order.

    The one that filled it was not written yet: the vCPU stopped before it tried again, and it comes anew.
    """
    seen: list[int] = []
    while vm.go(vcpu) != uapi.KVM_EXIT_HLT:
        assert vm.runs[vcpu].exit_reason == uapi.KVM_EXIT_DIRTY_RING_FULL
        found = vm.pages(vcpu)
        assert len(found) == vm.entries - RESERVED
        seen += found
        assert vm.reset() == len(found)
        assert vm.ram[found[-1] * PAGE] == 0
    return [*dict.fromkeys(seen + vm.pages(vcpu))]


@pytest.mark.spec("exit.DIRTY_RING_FULL", "run.dirty_ring")
def test_a_full_ring_stops_the_vcpu_until_there_is_room(rings: RingVm) -> None:
    hardware(rings)
    rings.fill(16, 230)
    for _ in range(3):
        assert rings.go() == uapi.KVM_EXIT_DIRTY_RING_FULL
    assert sum(rings.rings[0][n].flags == DIRTY for n in range(256)) == 256 - RESERVED
    # Collected is not given back.
    collected = rings.harvest(limit=5)
    assert rings.go() == uapi.KVM_EXIT_DIRTY_RING_FULL
    assert rings.reset() == len(collected) == 5
    assert rings.go() == uapi.KVM_EXIT_DIRTY_RING_FULL
    seen = [offset for _, offset in collected] + rings.pages()
    assert seen == list(range(16, 16 + 256 - RESERVED + 5))
    assert rings.reset() == 256 - RESERVED
    assert rings.go() == uapi.KVM_EXIT_HLT
    assert [*dict.fromkeys(seen + rings.pages())] == list(range(16, 246))


@pytest.mark.spec("exit.DIRTY_RING_FULL")
def test_round_and_round(rings: RingVm) -> None:
    hardware(rings)
    for _ in range(4):
        rings.ram[16 * PAGE :] = bytes(SIZE - 16 * PAGE)
        rings.fill(16, 230)
        assert run_to_halt(rings) == list(range(16, 246))
        rings.reset()
        assert all(rings.rings[0][n].flags == 0 for n in range(256))


@pytest.mark.spec("exit.DIRTY_RING_FULL", "run.immediate_exit")
def test_a_full_ring_and_immediate_exit(rings: RingVm) -> None:
    hardware(rings)
    rings.fill(16, 230)
    assert rings.go() == uapi.KVM_EXIT_DIRTY_RING_FULL
    run = rings.runs[0]
    run.immediate_exit, run.exit_reason = 1, 0xDEAD
    assert errno_of(rings.go) == EINTR
    assert run.exit_reason == 0xDEAD
    run.immediate_exit = 0
    assert rings.go() == uapi.KVM_EXIT_DIRTY_RING_FULL


@pytest.mark.spec("exit.DIRTY_RING_FULL", "run.order", "run.complete_then_signal")
def test_a_pending_instruction_is_completed_into_the_full_ring(rings: RingVm) -> None:
    hardware(rings)
    # Then: mov ds, 0xffff; mov si, 0x10; mov es, 0xf800; xor di, di; movsb from behind the slot; in al, 0x61
    code = FILL + b"\xb8\xff\xff\x8e\xd8\xbe\x10\x00\xb8\x00\xf8\x8e\xc0\x31\xff\xa4\xe4\x61" + HLT
    rings.start(code, rax=16 << 8, rcx=256 - RESERVED - 1)
    assert rings.go() == uapi.KVM_EXIT_MMIO
    rings.runs[0].mmio.data[0] = 0x5A
    assert rings.go() == uapi.KVM_EXIT_DIRTY_RING_FULL
    assert rings.ram[0xF8000] == 0x5A
    assert rings.pages()[-1] == 0xF8
    assert rings.reset() == 256 - RESERVED
    assert rings.go() == uapi.KVM_EXIT_IO
    assert rings.runs[0].io.port == 0x61


@pytest.mark.spec("exit.DIRTY_RING_FULL")
def test_one_full_ring_is_not_the_others(new_rings: Callable[..., RingVm]) -> None:
    vm = new_rings(vcpus=2)
    hardware(vm)
    vm.fill(16, 230, 0)
    assert vm.go(0) == uapi.KVM_EXIT_DIRTY_RING_FULL
    vm.start(b"\xc6\x06\x00\x20\x01" + HLT, 1, at=0x1800)
    assert vm.go(1) == uapi.KVM_EXIT_HLT
    assert vm.pages(1) == [2]
    assert vm.go(0) == uapi.KVM_EXIT_DIRTY_RING_FULL
    # Both rings are given back by one call.
    count = len(vm.pages(0))
    assert vm.reset() == count + 1


# ---- threads: nothing is lost --------------------------------------------------------------------

# One of 128 pages from 0x20000 on at random, a counter in it at DI, until the client says so at 0x700.
RANDOM_WRITER = """
again:  mov ax, bp; shl ax, 7; xor bp, ax
        mov ax, bp; shr ax, 9; xor bp, ax
        mov ax, bp; shl ax, 8; xor bp, ax
        mov ax, bp; shl ax, 8; and ax, 0x7f00; add ax, 0x2000; mov es, ax
        inc word ptr es:[di]
        cmp byte ptr [0x700], 0
        je again
        hlt
"""


@pytest.mark.spec("vm.RESET_DIRTY_RINGS", "run.dirty_ring", "mmu.dirty_no_false")
def test_a_copy_kept_by_rings_is_the_memory(new_rings: Callable[..., RingVm]) -> None:
    """Two vCPUs write at random while a client copies pages as migration does; then it has them all."""
    vm = new_rings(vcpus=2)
    hardware(vm)
    code, _ = assemble(RANDOM_WRITER, CODE, 16, ())
    for number in range(2):
        vm.start(code, number, at=CODE + 0x800 * number, rdi=2 * number, rbp=0x1234 + number)
    copy = bytearray(vm.ram)
    done: list[int] = []
    full = [0, 0]

    def work(number: int) -> None:
        while vm.go(number) != uapi.KVM_EXIT_HLT:
            assert vm.runs[number].exit_reason == uapi.KVM_EXIT_DIRTY_RING_FULL
            full[number] += 1
            threading.Event().wait(0.001)
        done.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    told = 0

    def copy_pages() -> None:
        nonlocal told
        # Pages are read after the reset: a write from then on is told again.
        found = [offset for number in range(2) for _, offset in vm.harvest(number)]
        told += len(found)
        assert vm.reset() == len(found)
        for offset in found:
            assert 0x20 <= offset < 0xA0
            copy[offset * PAGE : (offset + 1) * PAGE] = vm.ram[offset * PAGE : (offset + 1) * PAGE]

    for _ in range(60):
        copy_pages()
        threading.Event().wait(0.005)
    vm.ram[0x700] = 1
    while len(done) < 2:
        copy_pages()
    for thread in threads:
        thread.join(10)
    copy_pages()
    copy[0x700] = 1
    assert told > 128
    assert bytes(copy) == vm.ram[:]


# ---- guests with page tables of their own --------------------------------------------------------


@pytest.mark.spec("run.dirty_ring", "mmu.dirty_log")
@pytest.mark.parametrize("width", [32, 36, 64])
@pytest.mark.parametrize("tdp", [True, False])
def test_page_tables_of_the_guest_are_pages_too(
    monkeypatch: pytest.MonkeyPatch, width: int, *, tdp: bool
) -> None:
    """Accessed and dirty bits that a walk sets are told, and so are writes to watched tables."""
    made = ClientVm.create_vcpu

    def create_vcpu(vm: ClientVm, number: int) -> object:
        vm.enable_cap(uapi.KVM_CAP_DIRTY_LOG_RING_ACQ_REL, 4096)
        return made(vm, number)

    monkeypatch.setattr(ClientVm, "create_vcpu", create_vcpu)
    guest = PagingGuest(tdp=tdp, width=width, log_dirty=True)
    ring = mmap.mmap(guest.vcpu.fd, 4096, offset=RING_PAGE * PAGE)
    entries = ffi.cast("struct kvm_dirty_gfn *", ffi.from_buffer(ring))

    def told() -> set[int]:
        found: set[int] = set()
        for at in range(256):
            if entries[at].flags & DIRTY:
                found.add(int(entries[at].offset))
                entries[at].flags = RESET
        return found

    guest.map(0, FRAMES, 1 | W | 4)
    guest.map(1, FRAMES + 0x1000, 1 | W | 4)
    guest.finish(f"mov rsi, {TEST}; mov eax, [rsi]; mov [rsi + 4096], eax; hlt")
    first = told()
    assert FRAMES + 0x1000 >> 12 in first
    assert guest.pte(0) >> 12 in first
    assert FRAMES >> 12 not in first
    guest.vm.ioctl(uapi.KVM_RESET_DIRTY_RINGS)
    # The guest writes its own table: a watched one in shadow mode.
    source = f"mov rsi, {guest.pte(2)}; mov dword ptr [rsi], {FRAMES + 0x2007}; mov rsi, {TEST + 0x2000}"
    guest.finish(source + "; mov dword ptr [rsi], 1; hlt")
    second = told()
    assert {guest.pte(2) >> 12, FRAMES + 0x2000 >> 12} <= second
    assert FRAMES + 0x1000 >> 12 not in second
    guest.close()


# ---- mapping it ----------------------------------------------------------------------------------

MMAP_RULES = """
import fcntl, mmap, os
from pykvm import uapi
from pykvm.abi import ffi, new
PAGE = 4096
kvm = os.open("/dev/kvm", os.O_RDWR)
vm = fcntl.ioctl(kvm, uapi.KVM_CREATE_VM, 0)
request = new("kvm_enable_cap")
request.cap, request.args[0] = uapi.KVM_CAP_DIRTY_LOG_RING_ACQ_REL, 8192
fcntl.ioctl(vm, uapi.KVM_ENABLE_CAP, ffi.buffer(request))
vcpu = fcntl.ioctl(vm, uapi.KVM_CREATE_VCPU, 0)
RW = mmap.PROT_READ | mmap.PROT_WRITE
def attempt(page, pages, flags=mmap.MAP_SHARED, prot=RW):
    try:
        mmap.mmap(vcpu, pages * PAGE, flags=flags, prot=prot, offset=page * PAGE).close()
    except OSError as error:
        return os.strerror(error.errno) and error.errno
    return 0
print(attempt(64, 2), attempt(65, 1), attempt(0, 66), attempt(0, 3, mmap.MAP_PRIVATE))
print([attempt(*range_, mmap.MAP_PRIVATE) for range_ in ((64, 1), (64, 2), (65, 1), (0, 65), (63, 2))])
print([attempt(*range_, mmap.MAP_PRIVATE) for range_ in ((0, 64), (63, 1))])
print(bool(attempt(64, 2, prot=mmap.PROT_READ | mmap.PROT_EXEC)), attempt(64, 2, prot=mmap.PROT_READ))
"""


@pytest.mark.spec("run.dirty_ring", "run.mmap_layout")
def test_the_ring_is_mapped_shared_and_without_code(backend: Backend) -> None:
    command = [] if backend.real else [sys.executable, "-m", "pykvm", "exec", "--"]
    done = subprocess.run(
        [*command, sys.executable, "-c", MMAP_RULES], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.splitlines() == [
        "0 0 0 0",
        str([EINVAL] * 5),
        "[0, 0]",
        "True 0",
    ], done.stderr


# ---- KVM_CLEAR_DIRTY_LOG -------------------------------------------------------------------------

NPAGES = SIZE // PAGE
ENABLE, INITIALLY_SET = uapi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, uapi.KVM_DIRTY_LOG_INITIALLY_SET
PROTECT2 = uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2


def get_log(vm: RingVm, slot: int = 0, npages: int = NPAGES) -> set[int]:
    bitmap = ffi.new("uint64_t[]", (npages + 63) // 64)
    log = new("kvm_dirty_log")
    log.slot, log.dirty_bitmap = slot, bitmap
    assert vm.do(uapi.KVM_GET_DIRTY_LOG, log) == 0
    bits = int.from_bytes(bytes(ffi.buffer(bitmap)), "little")
    return {n for n in range(len(bitmap) * 64) if bits >> n & 1}


def clear_log(vm: RingVm, first: int, num: int, pages: set[int], slot: int = 0) -> int:
    bits = sum(1 << page for page in pages)
    bitmap = ffi.new("uint8_t[]", bits.to_bytes(max((num + 63) // 64 * 8, 8), "little"))
    log = new("kvm_clear_dirty_log")
    log.slot, log.first_page, log.num_pages, log.dirty_bitmap = slot, first, num, bitmap
    return vm.do(uapi.KVM_CLEAR_DIRTY_LOG, log)


def write_pages(vm: RingVm, first: int, count: int) -> None:
    vm.fill(first, count)
    assert vm.go() == uapi.KVM_EXIT_HLT


@pytest.fixture
def logged(new_rings: Callable[..., RingVm]) -> RingVm:
    return new_rings(entries=0)


@pytest.mark.spec("cap.MANUAL_DIRTY_LOG_PROTECT2")
def test_manual_protect_takes_its_two_bits(logged: RingVm) -> None:
    assert logged.do(uapi.KVM_CHECK_EXTENSION, PROTECT2) == 3
    for bits in (INITIALLY_SET, 4, ENABLE | 4, 1 << 32, ENABLE | 1 << 63):
        assert errno_of(lambda b=bits: logged.enable(PROTECT2, b)) == EINVAL
    assert errno_of(lambda: logged.enable(PROTECT2, ENABLE, flags=1)) == EINVAL
    assert errno_of(lambda: logged.enable(uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT, ENABLE)) == EINVAL
    # On and off at any time, with vCPUs there.
    for bits in (ENABLE, 0, ENABLE | INITIALLY_SET, 0):
        assert logged.enable(PROTECT2, bits) == 0


@pytest.mark.spec("cap.MANUAL_DIRTY_LOG_PROTECT2", "vm.CLEAR_DIRTY_LOG", "vm.GET_DIRTY_LOG")
def test_with_manual_protect_only_clear_clears(logged: RingVm) -> None:
    assert logged.enable(PROTECT2, ENABLE) == 0
    write_pages(logged, 60, 10)
    for _ in range(2):
        assert get_log(logged) == set(range(60, 70))
    # A bit that is clear in the log, and one that is set, in the second word.
    assert clear_log(logged, 64, 64, {0, 1, 40}) == 0
    assert get_log(logged) == {60, 61, 62, 63, 66, 67, 68, 69}
    # Writable still, and told: no second time.  Cleared, and told when written again.
    write_pages(logged, 62, 4)
    assert get_log(logged) == set(range(60, 70))
    assert clear_log(logged, 0, 128, set(range(128))) == 0
    assert get_log(logged) == set()
    write_pages(logged, 61, 1)
    assert get_log(logged) == {61}
    # Off again: reading clears.
    assert logged.enable(PROTECT2, 0) == 0
    assert get_log(logged) == {61}
    assert get_log(logged) == set()


@pytest.mark.spec("vm.CLEAR_DIRTY_LOG")
def test_clear_works_without_manual_protect(logged: RingVm) -> None:
    write_pages(logged, 16, 3)
    assert clear_log(logged, 0, 64, {17}) == 0
    assert get_log(logged) == {16, 18}


@pytest.mark.spec("cap.MANUAL_DIRTY_LOG_PROTECT2", "vm.dirty_toggle")
@pytest.mark.parametrize("written_before", [False, True])
def test_initially_set(new_rings: Callable[..., RingVm], *, written_before: bool) -> None:
    vm = new_rings(entries=0, flags=0)
    assert vm.enable(PROTECT2, ENABLE | INITIALLY_SET) == 0
    if written_before:
        write_pages(vm, 16, 3)
    vm.slot(0, 0, SIZE, vm.ram, LOG)
    assert get_log(vm) == set(range(NPAGES))
    write_pages(vm, 16, 3)
    assert clear_log(vm, 0, NPAGES, set(range(NPAGES))) == 0
    assert get_log(vm) == set()
    write_pages(vm, 17, 3)
    assert get_log(vm) == {17, 18, 19}
    # The end of a slot that is no multiple of 64 pages: no bits behind it.
    small = mmap.mmap(-1, 70 * PAGE)
    vm.slot(3, 2 * SIZE, 70 * PAGE, small)
    assert get_log(vm, 3, 70) == set(range(70))


@pytest.mark.spec("vm.CLEAR_DIRTY_LOG")
def test_ranges_that_can_be_cleared(new_rings: Callable[..., RingVm]) -> None:
    vm = new_rings(entries=0)
    small = mmap.mmap(-1, 100 * PAGE)
    vm.slot(3, 2 * SIZE, 100 * PAGE, small)
    for first, num in ((0, 0), (0, 64), (0, 100), (64, 36), (64, 0), (0, NPAGES - 156)):
        assert clear_log(vm, first, num, set(), 3) == 0, (first, num)
    whole = 0xFFFF_FFFF
    for first, num in ((1, 64), (63, 1), (0, 63), (0, 1), (64, 35), (64, 37), (128, 0), (0, 101), (0, whole)):
        assert errno_of(lambda f=first, n=num: clear_log(vm, f, n, set(), 3)) == EINVAL, (first, num)
    for first in (1 << 63, (1 << 64) - 64):
        log = new("kvm_clear_dirty_log")
        log.slot, log.first_page, log.num_pages = 3, first, 64
        assert errno_of(lambda arg=log: vm.do(uapi.KVM_CLEAR_DIRTY_LOG, arg)) == EINVAL


@pytest.mark.spec("vm.CLEAR_DIRTY_LOG", "vm.GET_DIRTY_LOG")
def test_slots_that_can_be_cleared(new_rings: Callable[..., RingVm]) -> None:
    vm = new_rings(entries=0)
    vm.slot(5, 2 * SIZE, PAGE, vm.ram, 0)
    spaces = vm.do(uapi.KVM_CHECK_EXTENSION, uapi.KVM_CAP_MULTI_ADDRESS_SPACE) or 1
    slots = vm.do(uapi.KVM_CHECK_EXTENSION, uapi.KVM_CAP_NR_MEMSLOTS)
    for slot, errno in ((5, ENOENT), (6, ENOENT), (slots, EINVAL), (spaces << 16, EINVAL), (0xFFFF, EINVAL)):
        assert errno_of(lambda s=slot: clear_log(vm, 0, 64, set(), s)) == errno, slot
        log = new("kvm_dirty_log")
        log.slot = slot
        assert errno_of(lambda arg=log: vm.do(uapi.KVM_GET_DIRTY_LOG, arg)) == errno, slot
    # Alignment comes before the slot, the bitmap after it; nothing is cleared then.
    assert errno_of(lambda: clear_log(vm, 1, 64, set(), 6)) == EINVAL
    write_pages(vm, 16, 2)
    log = new("kvm_clear_dirty_log")
    log.num_pages, log.dirty_bitmap = 64, ffi.cast("void *", 8)
    assert errno_of(lambda: vm.do(uapi.KVM_CLEAR_DIRTY_LOG, log)) == EFAULT
    assert get_log(vm) == {16, 17}


@pytest.mark.spec("vm.CLEAR_DIRTY_LOG", "mmu.dirty_no_false")
def test_a_copy_kept_by_clearing_is_the_memory(new_rings: Callable[..., RingVm]) -> None:
    vm = new_rings(entries=0, vcpus=2, flags=0)
    hardware(vm)
    assert vm.enable(PROTECT2, ENABLE | INITIALLY_SET) == 0
    vm.slot(0, 0, SIZE, vm.ram, LOG)
    code, _ = assemble(RANDOM_WRITER, CODE, 16, ())
    for number in range(2):
        vm.start(code, number, at=CODE + 0x800 * number, rdi=2 * number, rbp=0x4321 + number)
    threads = [threading.Thread(target=vm.go, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    copy = bytearray(SIZE)

    def copy_pages() -> int:
        found = get_log(vm)
        for word in {page >> 6 for page in found}:
            pages = {page & 63 for page in found if page >> 6 == word}
            assert clear_log(vm, word << 6, 64, pages) == 0
        for page in found:
            copy[page * PAGE : (page + 1) * PAGE] = vm.ram[page * PAGE : (page + 1) * PAGE]
        return len(found)

    # A hundred times, and until the guests have got to write between two of them.
    told, end = sum(copy_pages() for _ in range(100)), time.monotonic() + 30
    while told <= NPAGES and time.monotonic() < end:
        told += copy_pages()
    vm.ram[0x700] = 1
    for thread in threads:
        thread.join(10)
    copy_pages()
    copy[0:PAGE] = vm.ram[0:PAGE]
    assert told > NPAGES
    assert bytes(copy) == vm.ram[:]
