"""Addresses without memory: how they are remembered, and when that is forgotten."""

from __future__ import annotations

import mmap
import threading
from typing import TYPE_CHECKING, Any

import pytest

from pykvm import trace
from pykvm.mmu import spte as sptes
from pykvm.mmu.base import Mmu
from tests.mmu.driver import HOLE, TABLES, TEST, A, D, Driver, U, W
from tests.mmu.flat import AREA, Exit, Flat, Hlt, Mmio, listen, steps
from tests.mmu.reference import P

if TYPE_CHECKING:
    from tests.mmu.conftest import NewFlat

FULL = P | W | U | A | D
MIB2 = 2 << 20


def answer(flat: Flat, found: Exit, value: int, n: int = 0) -> Exit:
    """Answer a read of MMIO and go on."""
    assert isinstance(found, Mmio), found
    assert not found.is_write
    found.data[:] = value.to_bytes(len(found.data), "little")
    return flat.enter(n)


def mmio_sptes(flat: Flat) -> list[int]:
    return [spte for page in flat.vm.mmu.pages() for spte in page.entries if sptes.is_mmio(spte)]


@pytest.mark.spec("mmu.mmio_spte")
def test_the_first_access_leaves_an_mmio_spte_and_the_others_take_no_fault(flat: Flat) -> None:
    flat.finish("hlt")
    source = f"mov eax, [{AREA + 0x18:#x}]; mov [{AREA + 0x20:#x}], eax; mov al, [{AREA + 0x7FF:#x}]; hlt"
    exits: list[list[tuple[int, int | bytes, bool]]] = []
    for turn in range(3):
        before = flat.stats("pf_taken", "pf_emulate", "pf_mmio_spte_created")
        with listen("mark_mmio_spte") as seen:
            found = flat.run(source)
            assert isinstance(found, Mmio)
            exits.append([(found.phys_addr, len(found.data), found.is_write)])
            found.data[:] = b"\1\2\3\4"
            found = flat.enter()
            assert isinstance(found, Mmio)
            exits[-1].append((found.phys_addr, bytes(found.data), found.is_write))
            found = flat.enter()
            assert isinstance(found, Mmio)
            exits[-1].append((found.phys_addr, len(found.data), found.is_write))
            assert answer(flat, found, 7) == Hlt()
        after = flat.stats("pf_taken", "pf_emulate", "pf_mmio_spte_created")
        moved = tuple(b - a for a, b in zip(before, after, strict=True))
        # Shadow paging has the code's fault to take once, too: it ran from there before.
        assert moved == ((1, 1, 1) if turn == 0 else (0, 0, 0))
        assert [(f["gfn"], f["access"]) for _, f in seen] == ([(AREA >> 12, 7)] if turn == 0 else [])
        assert flat.vcpus[0].regs.rax == 0x04030207
    assert exits[0] == [(AREA + 0x18, 4, False), (AREA + 0x20, b"\1\2\3\4", True), (AREA + 0x7FF, 1, False)]
    assert exits[1:] == exits[:1] * 2
    (spte,) = mmio_sptes(flat)
    # No right, so that every access stops there; the frame is in it, and the generation.
    assert spte & sptes.PFN_MASK == AREA
    assert spte & sptes.MMIO_GEN_MASK == sptes.mmio_generation(flat.vm.mmu._vm.memslots[0].generation)


@pytest.mark.parametrize("width", [32, 36, 64])
@pytest.mark.spec("mmu.mmio_cache")
def test_mmio_is_known_per_address_until_the_guest_or_the_slots_say_otherwise(mode: str, width: int) -> None:
    """No walk while it is known; INVLPG, CR3 and another generation of slots have it looked up again."""
    driver = Driver(tdp=mode == "tdp", width=width)
    try:
        vcpu, size = driver.vcpus[0], driver.size
        frame = TABLES + 0x6000
        driver.poke(frame + 0x10, 0x77, 4)
        driver.poke(TABLES, HOLE | FULL, size)
        driver.poke(driver.pde(0, 0), TABLES | FULL, size)

        def read(address: int | None, value: int, *, faults: int | None = None) -> None:
            before = driver.vm.mmu.stat()["pf_taken"]
            found = driver.do(vcpu, "read", rbx=TEST + 0x10, answer=0x5A)
            assert (found.kind, found.value) == ("mmio" if address else "ok", value)
            if address:
                assert found.address == address
            assert driver.vm.mmu.audit() == []
            if faults is not None:
                assert driver.vm.mmu.stat()["pf_taken"] - before == faults

        def change(entry: int, *, by: str) -> None:
            assert driver.do(vcpu, "store4", rdi=TABLES, rax=entry & 0xFFFF_FFFF).kind == "ok"
            if by == "invlpg":
                assert driver.do(vcpu, "invlpg", rbx=TEST).kind == "ok"
            elif by == "cr3":
                assert driver.do(vcpu, "cr3", rax=driver.root(0)).kind == "ok"

        read(HOLE + 0x10, 0x5A)
        with listen("kvm_mmu_pagetable_walk,handle_mmio_page_fault") as seen:
            for _ in range(3):
                read(HOLE + 0x10, 0x5A, faults=0)
        assert seen == []
        for by in ("invlpg", "cr3"):
            change(frame | FULL, by=by)
            read(None, 0x77)
            change(HOLE + 0x1000 | FULL, by=by)
            read(HOLE + 0x1010, 0x5A)
            read(HOLE + 0x1010, 0x5A, faults=0)
            change(HOLE | FULL, by=by)
            read(HOLE + 0x10, 0x5A)
        read(HOLE + 0x10, 0x5A, faults=0)
        # A slot comes somewhere else: what is known is of another generation now.
        created = driver.vm.mmu.stat()["pf_mmio_spte_created"]
        driver.vm.add_memory(0x2000_0000, 0x1000, slot=5)
        read(HOLE + 0x10, 0x5A)
        assert driver.vm.mmu.stat()["pf_mmio_spte_created"] == created + 1
        read(HOLE + 0x10, 0x5A, faults=0)
    finally:
        driver.close()


@pytest.mark.spec("mmu.mmio_cache")
def test_one_vcpus_mmio_is_anothers_memory(mode: str) -> None:
    """The same linear address under two roots, on two vCPUs, in turn."""
    driver = Driver(tdp=mode == "tdp", width=64, vcpus=2)
    try:
        for root, entry in ((0, HOLE | FULL), (1, TABLES + 0x6000 | FULL)):
            driver.poke(TABLES + root * 0x1000, entry, 8)
            driver.poke(driver.pde(root, 0), TABLES + root * 0x1000 | FULL, 8)
        driver.poke(TABLES + 0x6010, 3, 4)
        assert driver.do(driver.vcpus[1], "cr3", rax=driver.root(1)).kind == "ok"
        for _ in range(3):
            found = driver.do(driver.vcpus[0], "read", rbx=TEST + 0x10, answer=8)
            assert (found.kind, found.value, found.address) == ("mmio", 8, HOLE + 0x10)
            found = driver.do(driver.vcpus[1], "read", rbx=TEST + 0x10)
            assert (found.kind, found.value) == ("ok", 3)
            assert driver.vm.mmu.audit() == []
    finally:
        driver.close()


@pytest.mark.spec("mmu.mmio_gen_inprogress")
def test_a_slot_that_comes_while_an_mmio_spte_is_made(flat: Flat) -> None:
    """The fault saw no slot; the ioctl is over before it writes its spte: the access must hit the memory."""
    memory = flat.memory(2 * AREA, 0x1000)
    memory.set_word(0, 0x1234)
    flat.finish("hlt")
    done: list[int] = []

    def publish(_: str, fields: Any) -> None:
        if fields["step"] == "handle_abnormal_pfn" and fields["gfn"] == AREA >> 12 and not done:
            done.append(flat.stat("pf_mmio_spte_created"))
            # From another thread, as a client does.
            thread = threading.Thread(target=flat.slot, args=(7, AREA, memory))
            thread.start()
            thread.join(20)
            assert not thread.is_alive()

    with listen("mmu_step") as seen, trace.listen("mmu_step", publish):
        assert flat.read(AREA) == 0x1234
    assert done == [0]
    assert flat.stat("pf_mmio_spte_created") == 0
    assert mmio_sptes(flat) == []
    assert steps(seen, AREA).count("handle_abnormal_pfn") == 1


@pytest.mark.spec(
    "mmu.mmio_gen_inprogress", "mmu.mmio_gen", "mmu.slot_delete_zap", "vm.memslot_sync", "mmu.smp_flush"
)
def test_slots_come_and_go_under_running_vcpus(new_flat: NewFlat) -> None:
    """After KVM_SET_USER_MEMORY_REGION has returned, no access is done as before it."""
    flat = new_flat(vcpus=2)
    memory = flat.memory(2 * AREA, 0x1000)
    memory.set_word(0, 0x1234)
    sequence, present, stop = 0, False, False  # odd: a change is under way
    wrong: list[str] = []
    counts = [0, 0]
    source = f"again: mov eax, [{AREA:#x}]; out 0x10, eax; jmp again"

    def run(n: int) -> None:
        vcpu = flat.vcpus[n]
        while not stop:
            before = sequence, present
            found = vcpu.run()
            value = 0
            if isinstance(found, Mmio):
                found.data[:] = (0x5A).to_bytes(4, "little")
            else:
                value = int.from_bytes(found.data, "little")  # type: ignore[union-attr]
            after = sequence, present
            counts[n] += 1
            if before == after and not before[0] % 2 and isinstance(found, Mmio) == before[1]:
                wrong.append(f"{found} with {'a' if before[1] else 'no'} slot, {value:#x}")
            if not isinstance(found, Mmio) and value not in {0x1234, 0x5A}:
                wrong.append(f"read {value:#x}")
            if isinstance(found, Mmio):
                vcpu.run()  # its OUT

    for n in (0, 1):
        flat.start(source, n)
    threads = [threading.Thread(target=run, args=(n,)) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for _ in range(60):
        sequence += 1
        flat.slot(7, AREA, memory, delete=present)
        present = not present
        sequence += 1
        seen = list(counts)
        for _ in range(200):
            if wrong or all(now > then + 1 for now, then in zip(counts, seen, strict=True)):
                break
            threading.Event().wait(0.002)
    stop = True
    for thread in threads:
        thread.join(20)
    assert not wrong, wrong[:3]
    assert min(counts) > 60


@pytest.mark.spec("mmu.mmio_gen", "mmu.smp_flush")
def test_a_vcpu_that_does_not_exit_learns_of_a_new_slot_before_the_ioctl_returns(flat: Flat) -> None:
    """It knows the address as MMIO, waits for a word, and then has to find the memory."""
    source = """mov eax, [ebx]; mov dword ptr [0x9004], 1
        wait: cmp dword ptr [0x9000], 0; je wait; mov eax, [ebx]; hlt"""
    for n in range(8):
        gpa = AREA + n * MIB2
        flat.low[0x9000:0x9008] = bytes(8)
        found = flat.run(source, rbx=gpa)
        assert isinstance(found, Mmio)
        found.data[:] = bytes(4)
        ends: list[Exit] = []
        thread = threading.Thread(target=lambda: ends.append(flat.vcpus[0].run()))  # noqa: B023
        thread.start()
        while not flat.low[0x9004]:
            pass
        flat.vm.add_memory(gpa, b_word(n + 1), slot=10 + n)
        flat.low[0x9000] = 1
        thread.join(20)
        assert ends == [Hlt()]
        assert flat.vcpus[0].regs.rax == n + 1
        assert flat.audit() == []


def b_word(value: int) -> mmap.mmap:
    memory = mmap.mmap(-1, 0x1000)
    memory[:4] = value.to_bytes(4, "little")
    return memory


@pytest.mark.spec("mmu.mmio_gen_wrap")
def test_when_the_generation_wraps_no_old_mmio_spte_counts(
    new_flat: NewFlat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three bits of generation instead of nineteen: the eighth change brings the old number back."""
    monkeypatch.setattr(Mmu, "mmio_gen_bits", 3)
    for start in range(8):
        flat = new_flat()
        memory = flat.memory(2 * AREA, 0x1000)
        memory.set_word(0, 77)
        for n in range(start):
            flat.vm.add_memory(8 * AREA + n * 0x1000, 0x1000, slot=100 + n)
        found = flat.run(f"mov eax, [{AREA:#x}]; hlt")
        assert answer(flat, found, 1) == Hlt()
        (spte,) = mmio_sptes(flat)
        generation = flat.vm.mmu._vm.memslots[0].generation
        for n in range(7):
            flat.vm.add_memory(9 * AREA + n * 0x1000, 0x1000, slot=200 + n)
        flat.slot(30, AREA, memory)
        assert flat.vm.mmu._vm.memslots[0].generation == generation + 8
        assert spte & sptes.MMIO_GEN_MASK == sptes.mmio_generation(generation & 7)
        assert flat.read(AREA) == 77


@pytest.mark.spec("mmu.valid_gen", "mmu.slot_delete_zap")
def test_a_deleted_slot_makes_every_shadow_page_obsolete(new_flat: NewFlat, mode: str) -> None:
    flat = new_flat(vcpus=2)
    memory = flat.memory(AREA, 0x4000)
    for turn in range(3):
        flat.slot(1, AREA, memory)
        for n in (0, 1):
            flat.write(AREA + 0x1000 * n, 1, n)
        mmu: Any = flat.vm.mmu._vm.mmu
        generation, old = mmu.pages.mmu_valid_gen, {page.spt for page in flat.vm.mmu.pages()}
        assert {page.mmu_valid_gen for page in mmu.pages} == {generation}
        zapped, reloads = flat.stat("mmu_shadow_zapped"), [vcpu.loaded_memslots for vcpu in flat_vcpus(flat)]
        assert all(reloads)
        with listen("kvm_mmu_zap_all_fast") as seen:
            flat.slot(1, AREA, memory, delete=True)
        assert flat.levels(AREA) == []
        if mode == "tdp":
            # The TDP MMU zaps the slot's range and keeps the rest.
            assert seen == []
            assert flat.stats("pages_4k")[0] > 0
        else:
            assert [f["gen"] for _, f in seen] == [generation ^ 1]
            assert mmu.pages.mmu_valid_gen == generation ^ 1
            assert flat.vm.mmu.pages() == ()
            assert flat.stat("mmu_shadow_zapped") - zapped == len(old)
            assert flat.stats("pages_4k", "pages_2m", "mmu_unsync") == (0, 0, 0)
            # Every vCPU has to load a root anew; that drops the last of the old ones.
            assert [vcpu.loaded_memslots for vcpu in flat_vcpus(flat)] == [None, None]
            assert all(root.obsolete for root in mmu.loaded_roots())
        for n in (0, 1):
            assert answer(flat, flat.run(f"mov eax, [{AREA:#x}]; hlt", n), turn, n) == Hlt()
        if mode == "shadow":
            assert {page.mmu_valid_gen for page in mmu.pages} == {generation ^ 1}
            assert not any(root.obsolete for root in mmu.loaded_roots())


def flat_vcpus(flat: Flat) -> list[Any]:
    return list(flat.vm.mmu._vm.vcpus.values())


@pytest.mark.spec("mmu.slot_delete_zap", "vm.memslot_sync")
def test_a_slot_moved_is_gone_from_where_it_was(flat: Flat) -> None:
    memory = flat.memory(AREA, MIB2)
    memory.set_word(0x5000, 9)
    for turn in range(4):
        here, there = (AREA, 2 * AREA) if turn % 2 == 0 else (2 * AREA, AREA)
        assert flat.read(here + 0x5000) == 9
        flat.slot(1, there, memory)
        assert flat.levels(here) == []
        found = flat.run(f"mov eax, [{here + 0x5000:#x}]; hlt")
        assert answer(flat, found, 1) == Hlt()
        assert flat.read(there + 0x5000) == 9
