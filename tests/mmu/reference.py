"""What the guest's page tables say, from SDM vol. 3 chapter 4 alone: small, slow and obviously right.

Nothing here comes from the product.  Reading an entry goes through `read(gpa, size)`, which returns None
where there is no memory; such a table reads as not present, which is KVM's choice, not the SDM's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

READ, WRITE, FETCH = "read", "write", "fetch"

# SDM vol. 3 2.5, 4.1.3
CR0_WP, CR0_PG = 1 << 16, 1 << 31
CR4_PSE, CR4_PAE, CR4_PGE, CR4_LA57, CR4_SMEP, CR4_SMAP = 1 << 4, 1 << 5, 1 << 7, 1 << 12, 1 << 20, 1 << 21
EFER_LMA, EFER_NXE = 1 << 10, 1 << 11

# Table entries, SDM vol. 3 4.3 to 4.5
P, RW, US, ACCESSED, DIRTY, PS, GLOBAL = 1, 2, 4, 1 << 5, 1 << 6, 1 << 7, 1 << 8
XD = 1 << 63

ReadEntry = Callable[[int, int], int | None]


def bits(low: int, high: int) -> int:
    """Return the mask of bits low..high; none when high < low."""
    return (1 << high + 1) - (1 << low) if high >= low else 0


@dataclasses.dataclass(frozen=True)
class Cpu:
    """What the processor's registers say about paging."""

    cr0: int
    cr3: int
    cr4: int
    efer: int
    pdptrs: tuple[int, ...] = ()
    maxphyaddr: int = 46
    page1gb: bool = True

    @property
    def mode(self) -> str:
        if not self.cr0 & CR0_PG:
            return "none"
        if not self.cr4 & CR4_PAE:
            return "32-bit"
        if not self.efer & EFER_LMA:
            return "PAE"
        return "5-level" if self.cr4 & CR4_LA57 else "4-level"


@dataclasses.dataclass(frozen=True)
class Access:
    """One access. `user`: CPL is 3; `ac`: EFLAGS.AC; `implicit`: to a descriptor table or the TSS."""

    kind: str
    user: bool = False
    ac: bool = False
    implicit: bool = False

    @property
    def user_mode(self) -> bool:
        """Whether it is a user-mode access, SDM vol. 3 4.6."""
        return self.user and not self.implicit


@dataclasses.dataclass(frozen=True)
class Translated:
    """The access is done at `gpa`; `updates` are the entries it sets A and D in: gpa -> bits to set."""

    gpa: int
    updates: dict[int, int]
    page_size: int = 4096
    entries: tuple[tuple[int, int], ...] = ()  # (gpa, value) from the top


@dataclasses.dataclass(frozen=True)
class PageFault:
    """#PF with this error code; no entry is changed."""

    error_code: int


Result = Translated | PageFault


def translate(cpu: Cpu, read: ReadEntry, la: int, access: Access) -> Result:
    """Return where the access leads, or the page fault it causes."""
    if cpu.mode == "none":
        return Translated(la & 0xFFFF_FFFF, {})
    entries: list[tuple[int, int]] = []  # gpa of the entry, its value
    size = 4 if cpu.mode == "32-bit" else 8
    table, level = (
        cpu.cr3 & ~0xFFF & bits(0, 51),
        {"32-bit": 2, "PAE": 2, "4-level": 4, "5-level": 5}[cpu.mode],
    )
    if cpu.mode == "32-bit":
        table &= 0xFFFF_F000
    if cpu.mode == "PAE":
        pdpte = cpu.pdptrs[la >> 30 & 3]
        if not pdpte & P:
            return PageFault(_code(cpu, access, present=False, reserved=False))
        table = pdpte & bits(12, cpu.maxphyaddr - 1)
    while True:
        index = la >> (2 + 10 * level if size == 4 else 3 + 9 * level)
        index &= 1023 if size == 4 else 511
        gpa = table + index * size
        entry = read(gpa, size)
        if entry is None or not entry & P:
            return PageFault(_code(cpu, access, present=False, reserved=False))
        leaf = level == 1 or _maps_page(cpu, entry, level)
        if entry & _reserved(cpu, level, leaf=leaf, entry=entry):
            return PageFault(_code(cpu, access, present=True, reserved=True))
        entries.append((gpa, entry))
        if leaf:
            break
        table = entry & (0xFFFF_F000 if size == 4 else bits(12, 51))
        level -= 1
    if not _allowed(cpu, [value for _, value in entries], access):
        return PageFault(_code(cpu, access, present=True, reserved=False))
    page_bits = 12 + (10 if size == 4 else 9) * (level - 1)
    updates = {gpa: ACCESSED for gpa, value in entries if not value & ACCESSED}
    if access.kind == WRITE and not entries[-1][1] & DIRTY:
        leaf_gpa = entries[-1][0]
        updates[leaf_gpa] = updates.get(leaf_gpa, 0) | DIRTY
    return Translated(
        _page(cpu, entries[-1][1], level) | la & bits(0, page_bits - 1),
        updates,
        1 << page_bits,
        tuple(entries),
    )


def _maps_page(cpu: Cpu, entry: int, level: int) -> bool:
    """Whether a PDE or PDPTE maps a large page."""
    if level > 3 or not entry & PS:
        return False
    return bool(cpu.cr4 & CR4_PSE) if cpu.mode == "32-bit" else True


def _reserved(cpu: Cpu, level: int, *, leaf: bool, entry: int) -> int:
    """Return the bits that must be 0 in a present entry, SDM vol. 3 tables 4-5, 4-6, 4-9 ff., 4-15 ff."""
    if cpu.mode == "32-bit":
        if level == 2 and leaf:
            width = min(
                40, cpu.maxphyaddr
            )  # table 4-4: bits 20:13 are address bits 39:32, as far as there are
            return bits(width - 19, 21)
        return 0
    mask = bits(cpu.maxphyaddr, 51)
    if not cpu.efer & EFER_NXE:
        mask |= XD
    if cpu.mode == "PAE":
        mask |= bits(52, 62)
    if level >= 4:
        mask |= PS
    if level == 3 and entry & PS:
        mask |= bits(13, 29) if cpu.page1gb else PS
    if level == 2 and entry & PS:
        mask |= bits(13, 20)
    return mask


def _page(cpu: Cpu, entry: int, level: int) -> int:
    """Return the physical address of the page an entry maps."""
    if cpu.mode == "32-bit":
        if level == 1:
            return entry & 0xFFFF_F000
        return entry & bits(22, 31) | (entry >> 13 & 0xFF) << 32
    return entry & bits(12 + 9 * (level - 1), 51)


def _allowed(cpu: Cpu, entries: list[int], access: Access) -> bool:
    """SDM vol. 3 4.6.1: access rights."""
    user_page = all(entry & US for entry in entries)
    writable = all(entry & RW for entry in entries)
    no_execute = cpu.mode != "32-bit" and bool(cpu.efer & EFER_NXE) and any(entry & XD for entry in entries)
    if access.kind == FETCH:
        if no_execute:
            return False
        if access.user_mode:
            return user_page
        return not (user_page and cpu.cr4 & CR4_SMEP)
    if access.user_mode:
        return user_page and (writable or access.kind == READ)
    if user_page and cpu.cr4 & CR4_SMAP and (access.implicit or not access.ac):
        return False
    return access.kind == READ or writable or not cpu.cr0 & CR0_WP


def _code(cpu: Cpu, access: Access, *, present: bool, reserved: bool) -> int:
    """SDM vol. 3 figure 4-12: the error code."""
    code = present | (access.kind == WRITE) << 1 | access.user_mode << 2 | reserved << 3
    nx = cpu.mode != "32-bit" and cpu.efer & EFER_NXE
    if access.kind == FETCH and (nx or cpu.cr4 & CR4_SMEP):
        code |= 1 << 4
    return code
