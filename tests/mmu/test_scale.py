"""Many slots, many pages, much memory: what they cost, counted in tables and in Python calls, not in time.

A million pages one by one: ``MMU_SCALE=1000000 pytest tests/mmu/test_scale.py -k one_by_one``; it takes
minutes and 4 GiB of memory.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest

from pykvm.abi import uapi
from tests.mmu.driver import FRAMES, LOW, TABLES, TEST, A, D, Driver, Memory, U, W
from tests.mmu.flat import AREA, Flat, Mmio
from tests.mmu.reference import P

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.mmu.conftest import NewFlat

FULL = P | W | U | A | D
PAGE, MIB2, GIB = 0x1000, 2 << 20, 1 << 30
LOG = uapi.KVM_MEM_LOG_DIRTY_PAGES
SCALE = int(os.environ.get("MMU_SCALE", "4096"))


def calls(do: Callable[[], object]) -> int:
    """Return how many functions are called while something is done."""
    count = 0

    def profile(_: object, event: str, __: object) -> None:
        nonlocal count
        count += event in {"call", "c_call"}

    sys.setprofile(profile)
    try:
        do()
    finally:
        sys.setprofile(None)
    return count


def run(flat: Flat, source: str, **regs: int) -> int:
    """Count the calls of one KVM_RUN."""
    flat.start(source, **regs)
    return calls(flat.vcpus[0].run)


@pytest.mark.spec("mmu.memslot_arch")
def test_512_slots(new_flat: NewFlat) -> None:
    few, many = new_flat(), new_flat()
    mask = 511 - 3  # every slot its own range of 2 MiB, but for some that share one
    memory = Memory(512 * PAGE)
    cost = []
    for n in range(508):
        gpa = AREA + (n & mask) * MIB2 + (n & 3) * 2 * PAGE
        memory.set_word(n * PAGE, n)
        region = (n + 2, 0, gpa, PAGE, memory.hva + n * PAGE)
        if n < 4:
            few.vm._set_region(*region)
        cost.append(calls(lambda region=region: many.vm._set_region(*region)))  # type: ignore[misc]
        if n == 100:
            many.read(AREA)
            tables = many.stats("pages_4k", "mmu_shadow_zapped")
    # A slot more costs as many calls as there are slots to copy at most, and takes nothing away.
    assert cost[-1] < cost[10] + 3 * 512
    assert many.stats("pages_4k", "mmu_shadow_zapped") == tables
    source = "mov eax, [ebx]; hlt"
    for flat in (few, many):
        run(flat, source, rbx=AREA)
    for n in (1, 2, 3):
        gpa = AREA + n * 2 * PAGE
        assert abs(run(few, source, rbx=gpa) - run(many, source, rbx=gpa)) <= 2
    for n in range(0, 508, 13):
        assert many.read(AREA + (n & mask) * MIB2 + (n & 3) * 2 * PAGE) == n
    assert isinstance(many.run(source, rbx=AREA + PAGE), Mmio)
    memory.close()


@pytest.mark.spec("mmu.rmap", "mmu.sp")
def test_pages_mapped_one_by_one(flat: Flat) -> None:
    """Each costs an eight-byte spte and as many calls as the first; a slot's end as many as there are tables."""
    memory = Memory(SCALE * PAGE)
    # Not congruent, so that every page has an spte of its own.
    flat.vm._set_region(1, 0, AREA + PAGE, (SCALE - 1) * PAGE, memory.hva)
    touch = f"again: mov eax, [ebx]; add ebx, {PAGE}; dec ecx; jnz again; hlt"

    def all_pages(first: int, count: int) -> int:
        return run(flat, touch, rbx=AREA + PAGE + first * PAGE, rcx=count)

    half = (SCALE - 1) // 2
    flat.finish("hlt")
    before = flat.stats("pages_4k", "pf_taken")
    first = all_pages(0, 64)
    costs = all_pages(64, half - 64), all_pages(half, half)
    after = flat.stats("pages_4k", "pf_taken")
    assert after[0] - before[0] == 2 * half
    # The second half costs what the first did: nothing that is looked through grows.
    assert costs[1] < costs[0] * 64 // 60 + 400
    assert costs[1] / half < first / 64 * 1.2
    tables = len([page for page in flat.vm.mmu.pages() if page.role.level == 1])
    assert tables <= 2 * half // 512 + 4
    assert SCALE > 100000 or flat.audit() == []
    # Again: no fault, and next to no call.
    assert all_pages(0, 2 * half) < 200
    # Logging: one dirty page is found among all the others, whatever there is beside it.
    flat.vm._set_region(1, LOG, AREA + PAGE, (SCALE - 1) * PAGE, memory.hva)
    few = calls(lambda: flat_dirty(flat))
    run(flat, "mov [ebx], eax; hlt", rbx=AREA + PAGE + half * PAGE)
    assert calls(lambda: flat_dirty(flat)) < few + 300
    run(flat, "mov [ebx], eax; hlt", rbx=AREA + PAGE + 2 * PAGE)
    assert flat_dirty(flat) == {2}
    zap = calls(lambda: flat.vm._set_region(1, 0, AREA + PAGE, 0, memory.hva))
    # Two-dimensional paging has leaves to count, shadow paging drops all at once.
    assert zap < (30 * SCALE if flat.tdp else 40 * tables + 500)
    assert flat.levels(AREA + PAGE) == []
    memory.map.close()


def flat_dirty(flat: Flat) -> set[int]:
    from pykvm.abi import ffi

    bitmap = bytearray((SCALE + 63) // 64 * 8)
    log = ffi.new("struct kvm_dirty_log *", {"slot": 1})
    pin = ffi.from_buffer(bitmap)
    log.dirty_bitmap = pin
    flat.vm.ioctl(uapi.KVM_GET_DIRTY_LOG, log)
    ffi.release(pin)
    return {at * 8 + bit for at, byte in enumerate(bitmap) if byte for bit in range(8) if byte >> bit & 1}


@pytest.mark.spec("mmu.memslot_arch", "mmu.dirty_log")
def test_a_sparse_slot_of_64_gib_costs_what_is_touched_of_it(mode: str) -> None:
    driver = Driver(tdp=mode == "tdp", width=64)
    size, base = 64 * GIB, 4 * GIB
    memory = Memory(size + PAGE)
    try:
        vcpu = driver.vcpus[0]
        driver.poke(driver.pde(0, 0), TABLES | FULL, 8)
        driver.do(vcpu, "read", rbx=TEST + 0x1F0000)
        driver.poke(TABLES, FRAMES | FULL, 8)
        driver.do(vcpu, "cr3", rax=driver.root(0))
        driver.do(vcpu, "write", rbx=TEST)
        tables, resident = len(driver.vm.mmu.pages()), rss()
        small = calls(lambda: driver.vm._set_region(8, 0, base + 2 * size, PAGE, memory.hva))
        # Not congruent: nothing large could hide what a frame costs.
        made = calls(lambda: driver.vm._set_region(9, 0, base, size, memory.hva + PAGE))
        assert made <= small + 10
        assert len(driver.vm.mmu.pages()) == tables
        assert rss() - resident < 2 << 20
        touched = [base + n * (size // 16) + n * PAGE for n in range(16)]
        for n, gpa in enumerate(touched):
            assert driver.do(vcpu, "store8", rdi=TABLES + n * 8, rax=gpa | FULL).kind == "ok"
        driver.do(vcpu, "cr3", rax=driver.root(0))
        for n in range(16):
            assert driver.do(vcpu, "write", rbx=TEST + n * PAGE, rax=n + 1).kind == "ok"
        for n, gpa in enumerate(touched):
            assert memory.word(gpa - base + PAGE) == n + 1
        # A table of the last level each, one above for every gigabyte, and one of those for every 512.
        assert len(driver.vm.mmu.pages()) - tables <= 16 + 16 + 2
        assert rss() - resident < 4 << 20
        # The log of sixteen million pages is two megabytes: it is not looked through bit by bit.
        driver.vm._set_region(9, LOG, base, size, memory.hva + PAGE)
        for n in (3, 11):
            assert driver.do(vcpu, "write", rbx=TEST + n * PAGE, rax=n).kind == "ok"
        expected = {touched[n] - base >> 12 for n in (3, 11)}
        found: list[set[int]] = []
        assert calls(lambda: found.append(dirty(driver, 9, size >> 12))) < 5000
        assert found == [expected]
        assert dirty(driver, 9, size >> 12) == set()
        assert calls(lambda: driver.vm._set_region(9, 0, base, 0, memory.hva + PAGE)) < 5000
        assert driver.vm.mmu.audit() == []
    finally:
        driver.close()
        memory.map.close()


def dirty(driver: Driver, slot: int, pages: int) -> set[int]:
    from pykvm.abi import ffi
    from pykvm.mmu.slots import set_bits

    bitmap = bytearray(pages // 8)
    log = ffi.new("struct kvm_dirty_log *", {"slot": slot})
    pin = ffi.from_buffer(bitmap)
    log.dirty_bitmap = pin
    driver.vm.ioctl(uapi.KVM_GET_DIRTY_LOG, log)
    ffi.release(pin)
    return set(set_bits(bitmap))


def rss() -> int:
    """Bytes of memory that this process has."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * PAGE


assert LOW == MIB2
