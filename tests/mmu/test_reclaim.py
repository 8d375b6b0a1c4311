"""How many tables there may be, which go when there are too many, and that all go in the end."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import pytest

from pykvm.abi import lib, uapi
from pykvm.client import Kvm
from pykvm.fd import table
from pykvm.mmu import pages, roots
from pykvm.mmu import spte as sptes
from pykvm.mmu.pages import MmuPage
from tests.mmu.driver import FRAMES, TABLES, TEST, A, D, Driver, U, W
from tests.mmu.flat import AREA, Flat, Mmio, fails, listen
from tests.mmu.guest import TEST as PAGED
from tests.mmu.reference import P

if TYPE_CHECKING:
    from tests.mmu.conftest import NewFlat, NewGuest

FULL = P | W | U | A | D
EINVAL, ENOSPC = 22, 28
LIMIT = 64
MIB2 = 2 << 20


def used(flat: Flat) -> int:
    """n_used_mmu_pages."""
    return len(flat.vm.mmu.pages())


def scattered(flat: Flat, count: int) -> list[int]:
    """Make one-page slots, each in a range of 2 MiB of its own: each needs a table; word 0 is its number."""
    gpas = [AREA + n * MIB2 for n in range(count)]
    for n, gpa in enumerate(gpas):
        flat.memory(gpa, 0x1000, align=0x1000).set_word(0, n)
    return gpas


# ---- the limit


@pytest.mark.spec("mmu.max_pages")
def test_the_limit_follows_the_memory_until_it_is_set() -> None:
    with Kvm(kernel="5.10", tdp=False) as kvm, kvm.create_vm() as vm:
        mmu = vm.mmu._vm.mmu

        def limit() -> int:
            found = vm.ioctl(uapi.KVM_GET_NR_MMU_PAGES, 0)
            assert found == mmu.n_max_mmu_pages
            return found

        assert limit() == 0
        vm.add_memory(0, 1 << 20, slot=0)
        assert limit() == LIMIT  # 256 pages / 50 would be less
        vm.add_memory(1 << 24, 32 << 20, slot=1)
        assert limit() == (256 + 8192) // 50
        vm.remove_memory(1)
        assert limit() == LIMIT
        vm.ioctl(uapi.KVM_SET_NR_MMU_PAGES, 200)
        assert limit() == 200
        vm.add_memory(1 << 24, 64 << 20, slot=1)
        assert limit() == 200
        with fails(EINVAL):
            vm.ioctl(uapi.KVM_SET_NR_MMU_PAGES, LIMIT - 1)
        assert limit() == 200


@pytest.mark.spec("mmu.max_pages", "mmu.make_available", "mmu.zap_oldest")
def test_a_guest_runs_right_with_few_tables(flat: Flat) -> None:
    """Every access of 80 tables' worth of memory, twice, with 64: never more, and none is lost."""
    flat.vm.ioctl(uapi.KVM_SET_NR_MMU_PAGES, LIMIT)
    gpas = scattered(flat, 80)
    most, before = 0, flat.stat("mmu_recycled")
    for turn in (0, 1):
        for n, gpa in enumerate(gpas):
            assert flat.finish("mov eax, [ebx]; inc dword ptr [ebx]; hlt", rbx=gpa) == n + turn
            most = max(most, used(flat))
            assert used(flat) <= LIMIT
    assert most > LIMIT - 25
    recycled = flat.stat("mmu_recycled") - before
    assert recycled >= 2 * 80 - LIMIT - 20
    # At least 25 are free after each time: it does not happen at every fault.
    with listen("mmu_step") as seen:
        was = flat.stat("mmu_recycled")
        for gpa in gpas[:20]:
            flat.read(gpa)
    rounds = flat.stat("mmu_recycled") - was
    assert rounds in range(60)
    assert seen


@pytest.mark.spec("mmu.make_available")
def test_making_room_frees_twenty_five_at_once(flat: Flat) -> None:
    flat.vm.ioctl(uapi.KVM_SET_NR_MMU_PAGES, LIMIT)
    counts = []
    for gpa in scattered(flat, 70):
        before = flat.stat("mmu_recycled")
        flat.read(gpa)
        counts.append((flat.stat("mmu_recycled") - before, used(flat)))
    # The first that finds fewer than 5 free zaps until 25 are; then none does for twenty more.
    (first, (zapped, left)), *more = [(n, c) for n, c in enumerate(counts) if c[0]]
    assert counts[first - 1][1] == LIMIT - 4
    assert zapped in range(21, 24)
    assert left in range(LIMIT - 25, LIMIT - 25 + 4)
    assert all(n - first > 18 for n, _ in more)


@pytest.mark.spec("mmu.max_pages", "mmu.zap_oldest")
def test_a_lower_limit_zaps_the_oldest_at_once(flat: Flat) -> None:
    flat.vm.ioctl(uapi.KVM_SET_NR_MMU_PAGES, 200)
    gpas = scattered(flat, 70)
    for gpa in gpas:
        flat.read(gpa)
    order = [page.spt for page in flat.vm.mmu.pages() if not page.root_count]
    pinned = {page.spt for page in flat.vm.mmu.pages() if page.root_count}
    assert used(flat) > 70
    flat.vm.ioctl(uapi.KVM_SET_NR_MMU_PAGES, LIMIT)
    assert flat.audit() == []
    left = [page.spt for page in flat.vm.mmu.pages() if not page.root_count]
    assert used(flat) <= LIMIT
    # Those above others stay with them in two-dimensional paging.
    assert left == order[-len(left) :] if not flat.tdp else set(order[-len(left) + 4 :]) <= set(left)
    assert {page.spt for page in flat.vm.mmu.pages() if page.root_count} == pinned
    for n, gpa in enumerate(gpas):
        assert flat.read(gpa) == n


@pytest.mark.spec("mmu.zap_oldest", "mmu.role.invalid")
def test_loaded_roots_are_never_zapped_for_room(flat: Flat) -> None:
    """With nothing left but roots an entry says ENOSPC."""
    flat.finish("hlt")
    pinned = [page.spt for page in flat.vm.mmu.pages() if page.root_count]
    assert flat.vm.mmu.shrink(1000) > 0
    assert [page.spt for page in flat.vm.mmu.pages()] == pinned
    assert flat.audit() == []
    mmu = flat.vm.mmu._vm.mmu
    mmu.n_max_mmu_pages = len(pinned)
    with fails(ENOSPC):
        flat.finish("hlt")
    mmu.n_max_mmu_pages = LIMIT
    assert flat.finish("mov eax, 2; hlt") == 2


# ---- memory pressure


@pytest.mark.spec("mmu.shrinker", "mmu.zap_oldest")
def test_shrink_frees_so_many_of_one_vm(new_flat: NewFlat) -> None:
    flat, other = new_flat(), new_flat()
    for guest in (flat, other):
        for gpa in scattered(guest, 12):
            guest.read(gpa)
    others = [page.spt for page in other.vm.mmu.pages()]
    for count in (1, 3, 2):
        before = [page.spt for page in flat.vm.mmu.pages()]
        victims = [page.spt for page in flat.vm.mmu.pages() if not page.root_count][:count]
        done = flat.vm.mmu.shrink(count)
        assert flat.audit() == []
        after = [page.spt for page in flat.vm.mmu.pages()]
        assert done == len(before) - len(after) == count
        assert not set(victims) & set(after) or flat.tdp
        assert set(before) > set(after)
        for n in range(12):
            assert flat.read(AREA + n * MIB2) == n
    assert [page.spt for page in other.vm.mmu.pages()] == others
    assert flat.vm.mmu.shrink(0) == 0


# ---- one page


@pytest.mark.spec("mmu.zap_page")
def test_a_zapped_table_is_nowhere_any_more_and_freed_after_the_flush(
    flat: Flat, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = flat.memory(AREA, 0x4000)
    for n in range(4):
        memory.set_word(n * 0x1000, n)
        flat.read(AREA + n * 0x1000)
    (spt,) = {page.spt for page, _ in flat.vm.mmu.rmap(AREA >> 12)}
    (page,) = [page for page in flat.vm.mmu.pages() if page.spt == spt]
    (parent,) = page.parents
    order: list[str] = []
    mmu = flat.vm.mmu._vm.mmu
    flush, free = mmu.flush_remote_tlbs, MmuPage.free

    def flush_remote_tlbs(**how: bool) -> None:
        order.append("flush")
        flush(**how)

    def freed(self: MmuPage) -> None:
        order.append("free" if self.spt_addr == spt else "other")
        free(self)

    monkeypatch.setattr(mmu, "flush_remote_tlbs", flush_remote_tlbs)
    monkeypatch.setattr(MmuPage, "free", freed)
    before = flat.stat("pages_4k")
    with listen("kvm_mmu_prepare_zap_page") as seen:
        while spt in {page.spt for page in flat.vm.mmu.pages()}:
            assert flat.vm.mmu.shrink(1)
            assert flat.audit() == []
    assert (AREA >> 12) in [f["gfn"] for _, f in seen]
    assert "flush" in order[: order.index("free")]
    assert flat.stat("pages_4k") <= before - 4
    assert flat.levels(AREA) == []
    for found in flat.vm.mmu.pages():
        if found.spt == parent[0]:
            assert found.entries[parent[1]] == 0
        assert spt not in [entry & ~0xFFF & (1 << 48) - 1 for entry in found.entries if entry & 1]
    for n in range(4):
        assert flat.read(AREA + n * 0x1000) == n


@pytest.mark.parametrize("width", [32, 36, 64])
@pytest.mark.spec("mmu.zap_page")
def test_zapping_a_directory_takes_its_unsync_children_along(width: int) -> None:
    """zap_unsync_children, unlink_children, unlink_parents: what is left agrees with the guest's tables."""
    driver = Driver(tdp=False, width=width)
    try:
        vcpu, size = driver.vcpus[0], driver.size
        for half in (0, 1):
            driver.poke(driver.pde(0, half), TABLES + half * 0x1000 | FULL, size)
            driver.poke(TABLES + half * 0x1000, FRAMES + half * 0x1000 | FULL, size)
            driver.poke(FRAMES + half * 0x1000, 10 + half, 4)
        addresses = [TEST + (half << driver.span) for half in (0, 1)]
        for half, la in enumerate(addresses):
            assert driver.do(vcpu, "read", rbx=la).value == 10 + half
            # Another entry: the table goes unsync.
            assert driver.do(vcpu, "store4", rdi=TABLES + half * 0x1000 + 8 * size, rax=0).kind == "ok"
        stat = driver.vm.mmu.stat()
        assert stat["mmu_unsync"] == 2
        directory = driver.pde(0, 0) >> 12
        above = [page for page in driver.vm.mmu.pages() if page.gfn == directory and page.unsync_children]
        assert sum(page.unsync_children for page in above) == 2
        driver.vm.mmu._vm.mmu.unprotect_gfn(directory, 0)
        assert driver.vm.mmu.audit() == []
        after = driver.vm.mmu.stat()
        assert after["mmu_unsync"] == 0
        left = {page.gfn for page in driver.vm.mmu.pages() if not page.role.direct}
        assert not left & {directory, TABLES >> 12, (TABLES >> 12) + 1}
        assert after["mmu_shadow_zapped"] - stat["mmu_shadow_zapped"] >= 3
        for half, la in enumerate(addresses):
            assert driver.do(vcpu, "read", rbx=la).value == 10 + half
        assert driver.vm.mmu.audit() == []
    finally:
        driver.close()


# ---- the beginning and the end


class Counting:
    """Counts the tables that are out."""

    def __init__(self) -> None:
        self.out = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(lib, name)

    def spt_alloc(self) -> Any:
        self.out += 1
        return lib.spt_alloc()

    def spt_free(self, spt: Any) -> None:
        self.out -= 1
        lib.spt_free(spt)


@pytest.mark.parametrize("tdp", [True, False], ids=["tdp", "shadow"])
@pytest.mark.spec("mmu.module_init")
def test_a_vm_gives_back_every_table(monkeypatch: pytest.MonkeyPatch, tdp: bool) -> None:
    """n_used_mmu_pages is 0 when the last descriptor is closed, whatever the vCPUs' roots were."""
    table.reap()
    gc.collect()
    counting = Counting()
    monkeypatch.setattr(pages, "lib", counting)
    monkeypatch.setattr(roots, "lib", counting)
    for width in (32, 36, 64):
        driver = Driver(tdp=tdp, width=width, vcpus=2)
        mmu = driver.vm.mmu._vm.mmu
        assert len(mmu.pages) == 0
        driver.poke(driver.pde(0, 0), TABLES | FULL, driver.size)
        driver.poke(TABLES, FRAMES | FULL, driver.size)
        for n, vcpu in enumerate(driver.vcpus):
            assert driver.do(vcpu, "cr3", rax=driver.root(n)).kind == "ok"
            assert driver.do(vcpu, "cr3", rax=driver.root(0)).kind == "ok"
            assert driver.do(vcpu, "write", rbx=TEST).kind == "ok"
        assert len(mmu.pages) > 2
        assert counting.out >= len(mmu.pages)
        driver.vcpus[1].close()
        driver.close()
        table.reap()
        assert len(mmu.pages) == 0
        stat = mmu.stat
        assert (stat.pages_4k, stat.pages_2m, stat.mmu_unsync) == (0, 0, 0)
        del driver, mmu, vcpu
        gc.collect()
        assert counting.out == 0


@pytest.mark.parametrize("width", [32, 36, 64])
@pytest.mark.spec("mmu.module_init", "mmu.set_cr0")
def test_registers_set_by_the_client_give_a_context_anew(new_guest: NewGuest, width: int) -> None:
    """The same linear address through the tables, without paging, and through the tables again."""
    guest = new_guest(width=width)
    guest.map(0, 0x30_0000)
    guest.write(0x30_0000, 5, 4)
    source = f"mov rsi, {PAGED}; mov eax, [rsi]; hlt"
    for _ in range(2):
        assert guest.finish(source) == 5
        before = guest.vcpu.get_sregs()
        with guest.vcpu.sregs as sregs:
            sregs.cr0 &= ~uapi.X86_CR0_PG & 0xFFFF_FFFF
            sregs.efer = 0
            sregs.cs.l, sregs.cs.db = 0, 1
        found = guest.run(source) if width != 64 else None
        if found is not None:
            assert isinstance(found, Mmio)
            assert found.phys_addr == PAGED
            found.data[:] = bytes(4)
            guest.vcpu.run()
        assert guest.vm.mmu.audit() == []
        guest.vcpu.set_sregs(before)


# ---- processors on which a large page must not be executable


@pytest.mark.spec("mmu.nx_hugepage")
def test_executable_large_pages_are_split_on_processors_with_the_bug(new_flat: NewFlat) -> None:
    """iTLB multihit: a large page is no code; code gets pages of 4 KiB, and what is beside it stays small."""
    flat = new_flat(cpu="skylake")
    memory = flat.memory(AREA, 4 << 20)
    flat.read(AREA + 0x5000)
    (spte,) = flat.sptes(AREA)
    assert flat.levels(AREA) == [2]
    assert not spte & sptes.X
    before = flat.stats("nx_lpage_splits", "pages_2m")
    assert before[0] == 0
    # mov eax, 7; add [0x4006010], eax; hlt
    memory.write(0x5000, b"\xb8\x07\0\0\0\x01\x05\x10\x60\x00\x04\xf4")
    assert flat.finish("jmp ebx", rbx=AREA + 0x5000) == 7
    assert memory.word(0x6010) == 7
    assert (flat.levels(AREA + 0x5000), flat.levels(AREA + 0x6000)) == ([1], [1])
    assert flat.stats("nx_lpage_splits", "pages_2m") == (1, before[1] - 1)
    # The other large page of the slot is large, and data beside code does not undo the split.
    flat.write(AREA + MIB2, 1)
    flat.write(AREA + 0x9000, 1)
    assert flat.levels(AREA + MIB2) == [2]
    assert flat.finish("jmp ebx", rbx=AREA + 0x5000) == 7
    assert flat.stat("nx_lpage_splits") == 1
    flat.slot(1, AREA, memory, delete=True)
    assert flat.stat("nx_lpage_splits") == 0


@pytest.mark.parametrize("how", ["processor", "capability"])
@pytest.mark.spec("mmu.nx_hugepage")
def test_without_the_bug_or_with_the_mitigation_disabled_code_may_be_large(how: str, mode: str) -> None:
    flat = Flat(tdp=mode == "tdp", cpu="icelake" if how == "processor" else "skylake", vcpus=0)
    try:
        flat.vm.enable_cap(uapi.KVM_CAP_VM_DISABLE_NX_HUGE_PAGES, 0) if how == "capability" else None
        flat.add_vcpu()
        memory = flat.memory(AREA, 4 << 20)
        memory.write(0x5000, b"\xb8\x07\0\0\0\xf4")
        assert flat.finish("jmp ebx", rbx=AREA + 0x5000) == 7
        assert flat.levels(AREA + 0x5000) == [2]
        assert flat.stat("nx_lpage_splits") == 0
    finally:
        flat.close()
