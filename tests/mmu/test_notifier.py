"""The client changes the memory behind slots while vCPUs run: munmap, mmap, mprotect, madvise, mremap.

In this process nobody tells pykvm of it; under `pykvm exec` the preload library does (test_notifier_exec.py).
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from pykvm.abi import uapi
from pykvm.client import Io
from pykvm.kvm.memslots import invalidate_range_end, invalidate_range_start
from tests.mmu.flat import AREA, EFAULT, Flat, Hlt, Memory, fails

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.mmu.conftest import NewFlat

READ, READ_WRITE, NONE = mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE, 0
LOG = uapi.KVM_MEM_LOG_DIRTY_PAGES
PAGE, MIB2 = 0x1000, 2 << 20


# ---- told


@pytest.mark.parametrize("size", [0x8000, 4 << 20], ids=["small", "large"])
@pytest.mark.spec("mmu.notifier", "mmu.rmap_walk")
def test_sptes_of_the_range_are_gone_when_the_notifier_returns(flat: Flat, size: int) -> None:
    memory = flat.memory(AREA, size)
    vm = flat.vm.mmu._vm
    for n in range(8):
        memory.set_word(n * PAGE, n)
        assert flat.read(AREA + n * PAGE) == n
    flushes = flat.stat("remote_tlb_flush_requests")
    invalidate_range_start(vm, memory.hva + 2 * PAGE, memory.hva + 4 * PAGE)
    try:
        left = {n for n in range(8) if flat.levels(AREA + n * PAGE)}
        assert left == ({0, 1, 4, 5, 6, 7} if size == 0x8000 else set())
        assert flat.stat("remote_tlb_flush_requests") > flushes
        memory.remap(2 * PAGE, 2 * PAGE, READ_WRITE)
        memory.set_word(3 * PAGE, 33)
    finally:
        invalidate_range_end(vm, memory.hva + 2 * PAGE, memory.hva + 4 * PAGE)
    assert [flat.read(AREA + n * PAGE) for n in range(5)] == [0, 1, 0, 33, 4]


@pytest.mark.spec("mmu.notifier")
def test_the_notifier_knows_every_slot_and_frame_of_a_host_page(flat: Flat) -> None:
    """One host page may be behind several frames, and may be none of the VM's."""
    memory = flat.memory(AREA, 0x4000)
    flat.slot(7, 2 * AREA, memory)
    for gpa in (AREA, 2 * AREA):
        flat.read(gpa + PAGE)
    vm = flat.vm.mmu._vm
    before = flat.stats("pages_4k", "remote_tlb_flush_requests")
    invalidate_range_start(vm, memory.hva + (8 << 20), memory.hva + (9 << 20))
    invalidate_range_end(vm, memory.hva + (8 << 20), memory.hva + (9 << 20))
    assert flat.stats("pages_4k", "remote_tlb_flush_requests") == before
    invalidate_range_start(vm, memory.hva + PAGE + 5, memory.hva + PAGE + 6)
    invalidate_range_end(vm, memory.hva + PAGE + 5, memory.hva + PAGE + 6)
    assert (flat.levels(AREA + PAGE), flat.levels(2 * AREA + PAGE)) == ([], [])


# ---- not told


@contextmanager
def running(
    flat: Flat, source: str, **regs: Callable[[int], int]
) -> Iterator[list[list[tuple[int, int | None]]]]:
    """Run the source on every vCPU in a thread of its own; yields per vCPU (turn, what OUT gave).

    turn: `Turn.now` before that KVM_RUN.  KVM_RUN's EFAULT is None, and it is tried again.
    """
    seen: list[list[tuple[int, int | None]]] = [[] for _ in flat.vcpus]
    stop = threading.Event()
    errors: list[BaseException] = []

    def run(n: int) -> None:
        try:
            while not stop.is_set():
                turn = Turn.now
                try:
                    found = flat.vcpus[n].run()
                except OSError as error:
                    assert error.errno == EFAULT
                    assert flat.vcpus[n].kvm_run.exit_reason == uapi.KVM_EXIT_MEMORY_FAULT
                    seen[n].append((turn, None))
                    time.sleep(0.0005)
                    continue
                assert isinstance(found, Io), found
                seen[n].append((turn, int.from_bytes(found.data, "little")))
        except BaseException as error:  # noqa: BLE001  told to the test
            errors.append(error)

    Turn.now = 0
    for n in range(len(flat.vcpus)):
        flat.start(source, n, **{name: value(n) for name, value in regs.items()})
    threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(len(flat.vcpus))]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
        assert errors == []
        assert flat.audit() == []


class Turn:
    """How many changes have been made; what began before one may still see what was there."""

    now = 0

    @classmethod
    def next(cls, seen: list[list[tuple[int, int | None]]]) -> list[int | None]:
        """Let every vCPU finish a KVM_RUN that began from now on; return what they saw."""
        cls.now += 1
        until = time.monotonic() + 20
        while time.monotonic() < until:
            if all(each and each[-1][0] == cls.now for each in seen):
                return [next(value for turn, value in each if turn == cls.now) for each in seen]
            time.sleep(0.0005)
        msg = "a vCPU does not come back"
        raise AssertionError(msg)


def mremap_away(memory: Memory, at: int, size: int) -> None:
    """Move the pages somewhere else, and leave a hole."""
    libc = memory.libc
    libc.mremap.restype = ctypes.c_void_p
    libc.mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
    target = memory.hva + memory.size
    assert libc.mremap(memory.hva + at, size, size, 3, target) == target  # MAYMOVE | FIXED
    memory.holes = True


def mremap_here(memory: Memory, at: int, size: int, word: int) -> None:
    """Move other pages over it."""
    other = memory.hva + memory.size
    address = memory.libc.mmap(other, size, READ_WRITE, 0x32, -1, 0)
    assert address == other
    ctypes.c_uint32.from_address(other).value = word
    memory.libc.mremap.restype = ctypes.c_void_p
    memory.libc.mremap.argtypes = (
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p
    )  # fmt: skip
    here = memory.hva + at
    assert memory.libc.mremap(other, size, size, 3, here) == here
    memory.holes = True


@pytest.mark.parametrize("vcpus", [4])
@pytest.mark.parametrize("size", [0x8000, 4 << 20], ids=["small", "large"])
@pytest.mark.spec("mmu.notifier", "vm.memslot_sync")
def test_what_the_client_does_to_memory_counts_at_once(new_flat: NewFlat, vcpus: int, size: int) -> None:
    """Each vCPU reads the page all the time; what it reads after a call has returned is what is there then."""
    flat = new_flat(vcpus=vcpus)
    memory = flat.memory(AREA, size)
    at = 3 * PAGE
    memory.set_word(at, 1)
    value = 1
    with running(flat, "again: mov eax, [ebx]; out 0x10, eax; jmp again", rbx=lambda _: AREA + at) as seen:
        assert Turn.next(seen) == [1] * vcpus
        for _ in range(2):
            memory.unmap(at, PAGE)
            assert Turn.next(seen) == [None] * vcpus
            memory.remap(at, PAGE, READ_WRITE)
            assert Turn.next(seen) == [0] * vcpus
            value += 1
            memory.set_word(at, value)
            assert Turn.next(seen) == [value] * vcpus
            memory.dontneed(at, PAGE)
            assert Turn.next(seen) == [0] * vcpus
            memory.protect(at, PAGE, NONE)
            assert Turn.next(seen) == [None] * vcpus
            memory.protect(at, PAGE, READ)
            assert Turn.next(seen) == [0] * vcpus
            mremap_here(memory, at, PAGE, value)
            assert Turn.next(seen) == [value] * vcpus
            mremap_away(memory, at, PAGE)
            assert Turn.next(seen) == [None] * vcpus
            memory.remap(at, PAGE, READ_WRITE)  # MAP_FIXED over a hole, then over memory
            memory.set_word(at, value)
            memory.remap(at, PAGE, READ_WRITE)
            assert Turn.next(seen) == [0] * vcpus


@pytest.mark.parametrize("vcpus", [4])
@pytest.mark.spec("mmu.notifier", "vm.memslot_sync", "mmu.smp_flush")
def test_no_write_lands_after_mprotect_has_returned(new_flat: NewFlat, vcpus: int) -> None:
    flat = new_flat(vcpus=vcpus)
    memory = flat.memory(AREA, 0x8000)
    source = "again: inc dword ptr [ebx]; mov ecx, 50; pause_: dec ecx; jnz pause_; jmp again"
    with running(flat, source, rbx=lambda n: AREA + n * 4) as seen:
        for _ in range(3):
            before = memory.read(0, 16)
            deadline = time.monotonic() + 20
            while any(
                memory.read(0, 16)[n * 4 : n * 4 + 4] == before[n * 4 : n * 4 + 4] for n in range(vcpus)
            ):
                assert time.monotonic() < deadline
                time.sleep(0.001)
            memory.protect(0, PAGE, READ)
            now = memory.read(0, 16)
            assert Turn.next(seen) == [None] * vcpus
            assert memory.read(0, 16) == now
            memory.protect(0, PAGE, READ_WRITE)
        memory.protect(0, PAGE, NONE)  # all of them come out
        Turn.next(seen)
    memory.protect(0, PAGE, READ_WRITE)


@pytest.mark.spec("mmu.notifier")
def test_code_that_the_client_maps_over_is_the_new_code(new_flat: NewFlat) -> None:
    """What was decoded goes, too."""
    flat = new_flat(vcpus=2)
    memory = flat.memory(AREA, 0x2000)

    def code(value: int) -> bytes:
        return b"\xb8" + value.to_bytes(4, "little") + b"\xe7\x10\xff\xe3"  # mov eax; out 0x10, eax; jmp ebx

    memory.write(0, code(1))
    with running(flat, "jmp ebx", rbx=lambda _: AREA) as seen:
        assert Turn.next(seen) == [1, 1]
        for value in range(2, 7):
            # Another page with other code, moved here in one call: there is never anything else.
            other = memory.hva + memory.size
            assert memory.libc.mmap(other, PAGE, READ_WRITE, 0x32, -1, 0) == other
            ctypes.memmove(other, code(value), len(code(value)))
            memory.libc.mremap.restype = ctypes.c_void_p
            memory.libc.mremap.argtypes = (
                ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p
            )  # fmt: skip
            assert memory.libc.mremap(other, PAGE, PAGE, 3, memory.hva) == memory.hva
            memory.holes = True
            assert Turn.next(seen) == [value, value]


@pytest.mark.spec("mmu.notifier", "mmu.mapping_level")
def test_a_hole_in_a_large_page_takes_only_the_hole_away(flat: Flat) -> None:
    memory = flat.memory(AREA, 4 << 20)
    flat.write(AREA + 7 * PAGE, 7)
    assert flat.levels(AREA) == [2]
    memory.unmap(5 * PAGE, PAGE)
    assert flat.read(AREA + 7 * PAGE) == 7
    for _ in range(2):
        with fails(EFAULT):
            flat.read(AREA + 5 * PAGE)
        assert flat.read(AREA + 6 * PAGE) == 0
        assert flat.levels(AREA + 6 * PAGE) == [1]
    memory.remap(5 * PAGE, PAGE, READ_WRITE)
    memory.set_word(5 * PAGE, 55)
    assert flat.read(AREA + 5 * PAGE) == 55


# ---- the ioctls' side of it


@pytest.mark.parametrize("vcpus", [1, 3])
@pytest.mark.spec("mmu.smp_flush", "mmu.dirty_no_false", "mmu.dirty_log")
def test_after_the_dirty_log_is_read_no_vcpu_writes_unseen(new_flat: NewFlat, vcpus: int) -> None:
    """Each vCPU counts in a page of its own and reads another; the log is read again and again."""
    flat = new_flat(vcpus=vcpus)
    memory = flat.memory(AREA, 0x8000, LOG)
    source = """again: inc dword ptr [ebx]; mov eax, [ebx + 0x4000]; mov ecx, 20
        wait: dec ecx; jnz wait; cmp dword ptr [0x9000], 0; je again; hlt"""
    for n in range(vcpus):
        flat.start(source, n, rbx=AREA + n * PAGE)
    ends: list[object] = []
    threads = [
        threading.Thread(target=lambda v=vcpu: ends.append(v.run()), daemon=True) for vcpu in flat.vcpus
    ]
    for thread in threads:
        thread.start()
    try:
        deadline = time.monotonic() + 20
        while not all(memory.word(n * PAGE) for n in range(vcpus)):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        flushed = flat.stat("remote_tlb_flush")
        pending: set[int] = set()
        changed = 0
        for turn in range(40):
            dirty = flat.dirty(1, 8)
            assert pending <= dirty, f"turn {turn}: lost {pending - dirty}"
            assert dirty <= set(range(vcpus)), "a page that is only read is dirty"
            words = [memory.word(n * PAGE) for n in range(vcpus)]
            time.sleep(0.001)
            pending = {n for n in range(vcpus) if memory.word(n * PAGE) != words[n]}
            changed += len(pending)
        assert changed > 5
        assert flat.stat("remote_tlb_flush") - flushed > 5
    finally:
        flat.low[0x9000] = 1
        for thread in threads:
            thread.join(20)
    assert ends == [Hlt()] * vcpus
    flat.dirty(1, 8)
    assert flat.dirty(1, 8) == set()
