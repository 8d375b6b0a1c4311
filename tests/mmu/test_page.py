"""The page of `--mmu`, as a person meets it: in a real Chromium, with a mouse and a keyboard."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

import pytest

from pykvm.abi import uapi
from pykvm.mmu import page
from pykvm.mmu import spte as sptes
from pykvm.mmu.recorder import parse_times
from pykvm.mmu.view import gpte_bits, spte_bits
from tests.mmu.browser import MISSING, Browser
from tests.mmu.guest import FRAMES, FULL, PD, PDPT, PS, PT, ROOT, TEST, PagingGuest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pykvm.mmu.snapshot import Snapshot
    from tests.mmu.conftest import NewGuest


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if MISSING:
        pytest.skip(MISSING)
    with Browser() as browser:
        yield browser


class Shown(NamedTuple):
    """A guest, its two moments, and the page that shows them in the browser."""

    guest: PagingGuest
    before: Snapshot
    after: Snapshot
    browser: Browser


def _show(
    browser: Browser, tmp_path: Path, after: Snapshot, before: Snapshot | None = None, fragment: str = ""
) -> None:
    path = tmp_path / "mmu.html"
    path.write_text(page.html(after, before, "a <guest> & its tables"), encoding="utf-8")
    browser.log()
    browser.open(path, fragment)


@pytest.fixture
def shown(browser: Browser, tmp_path: Path, new_guest: NewGuest, request: pytest.FixtureRequest) -> Shown:
    guest = new_guest(width=getattr(request, "param", 64))
    for n in range(6):
        guest.map(n, FRAMES + n * 0x1000)
    guest.map(6, FRAMES)  # a second address of the first frame
    guest.finish(f"mov rsi, {TEST}; mov eax, [rsi]; mov [rsi+0x1000], eax; mov eax, [rsi+0x6000]; hlt")
    before = guest.vm.mmu.snapshot()
    # Another frame behind an address in use, without INVLPG: the shadow of the table goes unsync.
    edit = f"mov dword ptr [{guest.pte(1)}], {FRAMES + 0x9000 | FULL}"
    guest.map(9, FRAMES + 0x8000)
    guest.finish(f"mov rsi, {TEST}; mov eax, [rsi]; {edit}; mov [rsi+0x9000], eax; hlt")
    after = guest.vm.mmu.snapshot()
    _show(browser, tmp_path, after, before)
    return Shown(guest, before, after, browser)


WIDTHS = pytest.mark.parametrize("shown", [32, 36, 64], indirect=True)


def _tile(browser: Browser, name: str) -> int:
    return int(
        browser.js("return document.querySelector(`[data-name='${arguments[0]}']`).dataset.value", name)
    )


def test_the_numbers_are_the_snapshots(shown: Shown) -> None:
    browser, after = shown.browser, shown.after
    kind = "shadow pages" if after.mode == "shadow" else "TDP pages"
    assert _tile(browser, kind) == len(after.pages) == len(shown.guest.vm.mmu.pages())
    for level in {p.role.level for p in after.pages}:
        assert _tile(browser, f"level {level}") == sum(p.role.level == level for p in after.pages)
    assert _tile(browser, "guest tables") == len(after.guest_tables)
    leaves = [(p, i) for p in after.pages for i, e in enumerate(p.entries) if e & 1 and p.role.level == 1]
    assert _tile(browser, "4 KiB mapped") == len(leaves) == after.stat["pages_4k"]
    if after.mode == "shadow":
        assert _tile(browser, "unsync") == sum(p.unsync for p in after.pages) == 1
    assert browser.text("h1") == "a <guest> & its tables"
    assert browser.log() == []


@pytest.mark.parametrize("mode", ["shadow"], indirect=True)
def test_it_needs_nothing_from_elsewhere(shown: Shown) -> None:
    assert shown.browser.js("return performance.getEntriesByType('resource').map(e => e.name)") == []


def test_looking_for_an_address_shows_the_walk(shown: Shown) -> None:
    guest, browser = shown.guest, shown.browser
    browser.type("#search", f"{TEST + 0x9123:x}")
    seen = guest.vm.walk(guest.vcpu, TEST + 0x9123)
    (slot,) = [s for s in shown.after.slots if s.id == 0]
    assert seen.gfn is not None
    assert browser.text("#result") == f"gfn {seen.gfn:#x}, hva {slot.hva + (seen.gfn << 12) + 0x123:#x}"
    rows = browser.js(
        "return [...document.querySelectorAll('table.walk tr')].slice(1)"
        ".map(tr => [...tr.cells].map(td => td.textContent))"
    )
    assert [(r[1], r[2]) for r in rows if r[1]] == [(f"{s.entry:#x}", s.bits) for s in seen.guest]
    assert [(r[4], r[5]) for r in rows if r[4]] == [(f"{s.entry:#x}", s.bits) for s in seen.sptes]
    browser.type("#search", f"{TEST + 0x20000:x}")
    assert "is not present" in browser.text("#result")
    assert seen.reason == ""
    assert "of level 1 is not present" in guest.vm.walk(guest.vcpu, TEST + 0x20000).reason
    assert browser.log() == []


def test_an_unsync_entry_is_shown_as_stale(shown: Shown) -> None:
    browser = shown.browser
    browser.type("#search", hex(TEST + 0x1000))
    stale = browser.js("return document.querySelector('#stale')?.textContent")
    if shown.after.mode == "shadow":
        assert stale.startswith(f"ours maps gfn {FRAMES + 0x1000 >> 12:#x} still")
    else:
        assert stale is None


def _click_page(browser: Browser, spt: int) -> None:
    x, y, width, height = browser.js("return mmu.rectOf(mmu.state.moment.bySpt.get(arguments[0]))", spt)
    left, top, scrolled = browser.js(
        "const c = document.querySelector('#canvas').getBoundingClientRect();"
        "return [c.x, c.y, document.querySelector('#scroll').scrollTop]"
    )
    browser.click(left + x + width / 2, top + y - scrolled + height / 2)


def _click_entry(browser: Browser, side: str, index: int, columns: int = 16) -> None:
    code = (
        "const e = document.querySelector(`#grids canvas[data-side=${arguments[0]}]`);"
        "e.scrollIntoView({block: 'nearest'}); const r = e.getBoundingClientRect();"
        "return [r.x, r.y, r.width, r.height]"
    )
    x, y, width, height = browser.js(code, side)
    rows = 512 // columns
    browser.click(x + (index % columns + 0.5) * width / columns, y + (index // columns + 0.5) * height / rows)


def _bits(browser: Browser, card: str) -> str:
    code = (
        "return [...document.querySelectorAll(`${arguments[0]} .bit.set`)].map(e => e.dataset.bit).join(' ')"
    )
    return str(browser.js(code, card))


@WIDTHS
def test_clicking_an_spte_shows_its_bits_its_origin_and_its_rmap(shown: Shown) -> None:
    browser, after, guest = shown.browser, shown.after, shown.guest
    walked = guest.vm.walk(guest.vcpu, TEST)
    leaf = walked.sptes[-1]
    (target,) = [p for p in after.pages if p.spt == leaf.table]
    _click_page(browser, target.spt)
    assert f"level {leaf.level} · gfn {target.gfn:#x}" in browser.text("#node")
    _click_entry(browser, "ours", leaf.index)
    assert browser.text("#entry .value") == f"{target.entries[leaf.index]:#x}"
    bits = _bits(browser, "#entry > .card:first-of-type")
    assert bits == spte_bits(leaf.entry) == leaf.bits
    assert {"R", "W", "X", "U", "A", "host-writable"} <= set(bits.split())
    gfn = target.gfn_of(leaf.index)
    assert gfn == FRAMES >> 12
    assert browser.text("#gfn") == f"{gfn:#x}"
    assert int(browser.text("#rmap-count")) == len(guest.vm.mmu.rmap(gfn))
    if after.mode == "shadow":
        assert len(guest.vm.mmu.rmap(gfn)) == 2
        assert browser.text("#origin .value") == f"{walked.guest[-1].entry:#x}"
        assert _bits(browser, "#origin") == gpte_bits(walked.guest[-1].entry, after.vcpus[0].paging)
        assert "in sync" in browser.text("#origin")
    else:
        mapping = browser.text("#origin")
        # In 32-bit mode the large page of the lowest 4 MiB maps it, too.
        assert browser.js("return document.querySelectorAll('#origin li').length") == 2 + (guest.width == 32)
        assert f"{PT >> 12:#x}[0]" in mapping
        assert f"{PT >> 12:#x}[6]" in mapping
    assert browser.log() == []


def _changed(shown: Shown) -> int:
    """Count what differs, not as the page does."""
    count = 0
    for old, new in zip(_tables(shown.before), _tables(shown.after), strict=True):
        count += len(old.keys() ^ new.keys())
        for key in old.keys() & new.keys():
            (was, size), (now, _) = old[key], new[key]
            count += sum(was[i : i + size] != now[i : i + size] for i in range(0, 4096, size))
    return count


def test_32_bit_tables_of_1024_entries(browser: Browser, tmp_path: Path, new_guest: NewGuest) -> None:
    """Two shadow pages for one table: the upper half's entries belong to the second."""
    guest = new_guest(width=32)
    guest.map(700, FRAMES + 0x2000)
    guest.write(ROOT + 8, 0x40_0000 | FULL | PS)
    gva = TEST + 700 * 0x1000
    guest.finish(f"mov rsi, {gva}; mov eax, [rsi]; hlt")
    _show(browser, tmp_path, guest.vm.mmu.snapshot())
    browser.type("#search", f"{gva:x}")
    walked = guest.vm.walk(guest.vcpu, gva)
    assert browser.text("#result").startswith(f"gfn {FRAMES + 0x2000 >> 12:#x}, hva ")
    assert browser.text("#entry .value") == f"{walked.sptes[-1].entry:#x}"
    if guest.vm.mmu.mode == "shadow":
        assert walked.sptes[-1].index == 700 - 512
        assert browser.text("#origin .value") == f"{FRAMES + 0x2000 | FULL:#x}"
        assert "in sync" in browser.text("#origin")
    browser.js("mmu.select(mmu.state.moment.tables.find(t => t.root), 2)")
    assert "gfn 0x400 " in browser.text("#entry .card"), "a page of 4 MiB"


def test_a_snapshot_has_the_tables_of_all_address_spaces(new_guest: NewGuest) -> None:
    """Those of a CR3 that was are shadowed still; in two dimensions nobody knows of them."""
    guest = new_guest()
    other = 0x30000
    guest.ram[other : other + 0x1000] = guest.ram[ROOT : ROOT + 0x1000]
    guest.finish(f"mov rax, {other}; mov cr3, rax; hlt")
    seen = guest.vm.mmu.snapshot()
    roots = {t.gfn for t in seen.guest_tables if t.level == 4}
    assert roots == ({ROOT >> 12, other >> 12} if seen.mode == "shadow" else {other >> 12})
    assert seen.vcpus[0].cr3 == other
    (table,) = [t for t in seen.guest_tables if t.gfn == other >> 12]
    assert table.table == bytes(guest.ram[other : other + 0x1000])


@pytest.mark.parametrize("mode", ["shadow"], indirect=True)
def test_a_snapshot_of_a_running_guest_is_of_one_moment(new_guest: NewGuest) -> None:
    guest = new_guest()
    for page_number in range(8):
        guest.map(page_number, FRAMES + page_number * 0x1000)
    stop = 0x6000
    loop = f"1: mov [{PD}], rax; mov ebx, [rsi]; cmp byte ptr [{stop}], 0; je 1b; hlt"
    guest.run(f"mov rsi, {TEST}; mov rax, [{PD}]; out 1, al; {loop}")
    runner = threading.Thread(target=guest.vcpu.run, daemon=True)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    runner.start()
    try:
        moments: list[Snapshot] = []
        faults: set[int] = set()
        end = time.monotonic() + 30
        while len(moments) < 1500 or (len(faults) <= 10 and time.monotonic() < end):
            moments.append(guest.vm.mmu.snapshot())
            faults.add(moments[-1].stat["pf_taken"])
            time.sleep(0)
    finally:
        sys.setswitchinterval(interval)
        guest.ram[stop] = 1
        runner.join(30)
    assert not runner.is_alive()
    assert len(faults) > 10, "it did not run meanwhile"
    for seen in moments:
        links = {
            (e & sptes.PFN_MASK, p.spt, i)
            for p in seen.pages
            for i, e in enumerate(p.entries)
            if sptes.is_shadow_present(e) and not sptes.is_last(e, p.role.level)
        }
        assert links == {(p.spt, *parent) for p in seen.pages for parent in p.parents}


def _tables(moment: Snapshot) -> tuple[dict[object, tuple[bytes, int]], dict[object, tuple[bytes, int]]]:
    ours: dict[object, tuple[bytes, int]] = {(p.spt, p.gfn, p.role): (p.table, 8) for p in moment.pages}
    guests: dict[object, tuple[bytes, int]] = {
        (t.gfn, t.level): (t.table, t.entry_bytes) for t in moment.guest_tables
    }
    return ours, guests


def test_what_changed_between_two_moments(shown: Shown) -> None:
    browser, guest = shown.browser, shown.guest
    assert _tile(browser, "changes") == _changed(shown) > 0
    browser.click_element("[data-tab=changes]")
    rows = browser.js(
        "return [...document.querySelectorAll('#sheet .row:not(.head)')]"
        ".map(r => [...r.children].map(c => c.textContent))"
    )
    assert len(rows) == _changed(shown)
    edited = f"{FRAMES + 0x9000 | FULL:#x}"
    assert any(r[1] == "guest" and r[0] == "changed" and r[5] == edited for r in rows), rows
    was = next(i for i, r in enumerate(rows) if r[5] == edited)
    browser.click_element(f"#sheet .row[data-i='{was}']")
    assert f"gfn {PT >> 12:#x}" in browser.text("#node")
    assert browser.text("#entry .value") == edited
    browser.click_element("[data-moment=before]")
    assert _tile(browser, "4 KiB mapped") == shown.before.stat["pages_4k"]
    assert guest.vm.mmu.audit() == []
    assert browser.log() == []


def test_each_vcpu_has_its_own_registers(browser: Browser, tmp_path: Path, new_guest: NewGuest) -> None:
    guest = new_guest()
    guest.map(0, FRAMES)
    guest.finish(f"mov rsi, {TEST}; mov eax, [rsi]; hlt")
    with guest.vm.create_vcpu(1):
        _show(browser, tmp_path, guest.vm.mmu.snapshot())
        browser.type("#search", f"{TEST:x}")
        assert browser.text("#result").startswith(f"gfn {FRAMES >> 12:#x}, hva ")
        browser.js("const s = document.querySelector('#vcpu'); s.value = 1; s.onchange({target: s})")
        # In the state after reset: linear addresses are physical ones.
        assert browser.text("#result").startswith(f"gfn {TEST >> 12:#x}, not mapped")
        assert browser.text("#cpu").startswith("paging off")
    assert browser.log() == []


@pytest.mark.parametrize("mode", ["shadow"], indirect=True)
def test_light_and_dark(shown: Shown) -> None:
    browser = shown.browser
    colours = set()
    for _ in range(2):
        colours.add(browser.js("return getComputedStyle(document.body).backgroundColor"))
        browser.click_element("#theme")
    assert len(colours) == 2
    for colour in ("role", "fill", "change", "level"):
        browser.js(
            "const s = document.querySelector('#colour'); s.value = arguments[0]; s.onchange({target: s})",
            colour,
        )
    assert browser.log() == []


@pytest.mark.parametrize("mode", ["shadow"], indirect=True)
def test_the_address_of_the_page_says_what_is_chosen(shown: Shown, tmp_path: Path) -> None:
    browser = shown.browser
    _show(browser, tmp_path, shown.after, shown.before, f"moment=before&theme=dark&gva={TEST:#x}")
    assert browser.js("return mmu.state.moment.name") == "before"
    assert browser.js("return document.documentElement.dataset.theme") == "dark"
    assert browser.text("#result").startswith(f"gfn {FRAMES >> 12:#x}")


# ---- ten thousand pages ----------------------------------------------------------------------------

TABLES = 10_000
FIRST = 4 << 30  # linear address of the first


def _guest_of_many_tables() -> PagingGuest:
    """A guest with TABLES tables of the last level that touches two pages of each."""
    guest = PagingGuest(tdp=False)
    directories, pd, base = -(-TABLES // 512), 0x100_0000, 0x110_0000
    memory = guest.vm.add_memory(pd, base + TABLES * 4096 - pd)
    entries = struct.pack("<512Q", *(FRAMES + (i % 256 << 12) | 7 for i in range(512)))
    rnd = random.Random(4)
    for at in range(base - pd, len(memory), 4096):
        turn = rnd.randrange(256) * 8
        memory[at : at + 4096] = entries[turn:] + entries[:turn]
    memory[: TABLES * 8] = struct.pack(f"<{TABLES}Q", *(base + i * 4096 | 0x27 for i in range(TABLES)))
    for i in range(directories):
        guest.write(PDPT + 8 * (FIRST // (1 << 30) + i), pd + i * 4096 | 0x27)
    guest.vm.ioctl(uapi.KVM_SET_NR_MMU_PAGES, TABLES + 100)
    loop = "1: mov eax, [rsi]; mov [rsi + 0x5000], eax; add rsi, 0x200000; dec ecx; jnz 1b; hlt"
    guest.finish(f"mov rsi, {FIRST}; mov ecx, {TABLES}; {loop}")
    return guest


def test_ten_thousand_pages(browser: Browser, tmp_path: Path) -> None:
    guest = _guest_of_many_tables()
    start = time.process_time()
    after = guest.vm.mmu.snapshot()
    path = tmp_path / "mmu.html"
    path.write_text(page.html(after), encoding="utf-8")
    assert time.process_time() - start < 8, "a few seconds, on a slow machine"
    assert len(after.pages) > TABLES
    browser.open(path)
    assert _tile(browser, "shadow pages") == len(after.pages)
    assert _tile(browser, "4 KiB mapped") == after.stat["pages_4k"] >= 2 * TABLES
    assert browser.js("return document.querySelectorAll('#sheet .row').length") < 60
    # The seven thousandth table: by its address, by hand in the drawing, and one of its entries.
    gva = FIRST + 7000 * 0x20_0000 + 0x5000
    browser.type("#search", f"{gva:x}")
    seen = guest.vm.walk(guest.vcpu, gva)
    assert browser.text("#result").startswith(f"gfn {seen.gfn:#x}, hva ")
    assert browser.text("#entry .value") == f"{seen.sptes[-1].entry:#x}"
    _click_page(browser, seen.sptes[-1].table)
    _click_entry(browser, "ours", seen.sptes[-1].index)
    assert browser.text("#entry .value") == f"{seen.sptes[-1].entry:#x}"
    # Hundreds of addresses of one frame.
    browser.js("document.querySelector('#kind').value = 'gfn'")
    browser.type("#search", f"{seen.gfn:x}")
    mapped = guest.vm.mmu.rmap(seen.gfn or 0)
    assert len(mapped) > 50
    assert browser.js(
        "return document.querySelector('#sheet .row:not(.head)').children[1].textContent"
    ) == str(len(mapped))
    assert browser.log() == []
    guest.close()


# ---- the command line ------------------------------------------------------------------------------


def _pykvm(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pykvm", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_run_writes_the_page(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "run.html"
    done = _pykvm("run", "--no-tdp", "--json", "--mmu", str(path), "--mmu-at", "0.05")
    assert done.returncode == 0, done.stderr
    browser.open(path)
    assert browser.text("h1") == "hello"
    assert _tile(browser, "shadow pages") > 5
    assert browser.js("return !!mmu.moments.before")
    assert browser.log() == []


CLIENT = r"""
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>
#include <linux/kvm.h>
int main(int argc, char **argv)
{
    int kvm = open("/dev/kvm", O_RDWR), vm = ioctl(kvm, KVM_CREATE_VM, 0);
    char *memory = mmap(0, 0x10000, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct kvm_userspace_memory_region region = { 0, 0, 0, 0x10000, (uintptr_t)memory };
    ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region);
    memory[0x1000] = 0xf4; /* hlt */
    int vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
    struct kvm_sregs sregs;
    ioctl(vcpu, KVM_GET_SREGS, &sregs);
    sregs.cs.base = sregs.cs.selector = 0;
    ioctl(vcpu, KVM_SET_SREGS, &sregs);
    struct kvm_regs regs = { .rip = 0x1000, .rflags = 2 };
    ioctl(vcpu, KVM_SET_REGS, &regs);
    if (ioctl(vcpu, KVM_RUN, 0))
        return 1;
    for (int i = 0; i < 1000 && access(argv[1], F_OK); i++)
        usleep(20000);
    return access(argv[1], F_OK) ? 2 : 0;
}
"""


def test_run_says_what_it_cannot_do(tmp_path: Path) -> None:
    path = str(tmp_path / "mmu.html")
    assert "--mmu needs the fake device" in _pykvm("run", "--device", "/dev/kvm", "--mmu", path).stderr
    assert "two that rise" in _pykvm("run", "--mmu", path, "--mmu-at", "5,1").stderr


def test_exec_writes_the_page_of_an_unmodified_program(browser: Browser, tmp_path: Path) -> None:
    source, program, path = tmp_path / "client.c", tmp_path / "client", tmp_path / "exec.html"
    source.write_text(CLIENT)
    subprocess.run(["cc", "-o", program, source], check=True)
    done = _pykvm("exec", "--mmu", str(path), "--mmu-at", "0.1", "--", str(program), str(path))
    assert done.returncode == 0, done
    browser.open(path)
    assert browser.js("return mmu.changes === null && !mmu.moments.before")
    path.unlink()
    options = ("--no-tdp", "--mmu", str(path), "--mmu-at", "0,0.3")
    done = _pykvm("exec", *options, "--", str(program), str(path))
    assert done.returncode == 0, done
    browser.open(path)
    assert browser.text("h1") == "client"
    assert _tile(browser, "4 KiB mapped") >= 1
    assert browser.text("#mode") == "shadow paging"
    assert browser.js("return mmu.moments.after.data.seconds - mmu.moments.before.data.seconds") >= 0.3
    assert "--mmu needs --mmu-at" in _pykvm("exec", "--mmu", str(path), "--", str(program)).stderr


def test_recorder_times() -> None:
    assert parse_times("5") == (5,)
    assert parse_times("0,0.5") == (0, 0.5)
    for wrong in ("", "a", "5,2", "1,2,3", "-1", "inf", "nan", "5,5"):
        with pytest.raises(ValueError):
            parse_times(wrong)
