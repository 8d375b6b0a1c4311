"""Software walk of the guest's own page tables: walk_addr() of KVM's paging_tmpl.h.

One walker for 32-bit, PAE and long mode tables.  It says what the guest's tables say: the frame
and the rights, or the page fault the guest must get.  KVM_TRANSLATE and the shadow MMU use it.
Source: SDM vol. 3 4.3 to 4.7.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

from pykvm.abi import Gfn, uapi

# Rights of a translation; the values are ours, the order is that of role.access in KVM.
ACC_EXEC, ACC_WRITE, ACC_USER = 1, 2, 4
ACC_ALL = ACC_EXEC | ACC_WRITE | ACC_USER

PRESENT, WRITABLE, USER = 1 << 0, 1 << 1, 1 << 2
ACCESSED, DIRTY, LARGE, GLOBAL = 1 << 5, 1 << 6, 1 << 7, 1 << 8
PAT_LARGE = 1 << 12
NX = 1 << 63
FRAME = 0x000F_FFFF_FFFF_F000

# Error code of #PF, SDM vol. 3 4.7
PF_P, PF_W, PF_U, PF_RSVD, PF_I = 1, 2, 4, 8, 16

ReadEntry: TypeAlias = Callable[[int, int], int | None]
"""(gpa, bytes) -> the entry there, or None where no slot has memory."""
SetBits: TypeAlias = Callable[[int, int, int, int], bool]
"""(gpa, bytes, entry, bits) -> whether the entry still was that and has the bits set now."""


@dataclasses.dataclass(frozen=True, slots=True)
class Paging:
    """The state that decides what a table entry means; equal values mean equal translations."""

    root_level: int  # 0 no paging, 2, 3 (PAE), 4, 5
    cr3: int = 0
    pdptrs: tuple[int, ...] = ()
    pse: bool = False
    nx: bool = False
    wp: bool = False
    smep: bool = False
    smap: bool = False
    gbpages: bool = False
    maxphyaddr: int = 36

    @property
    def entry_bytes(self) -> int:
        """Size of a table entry."""
        return 4 if self.root_level == 2 else 8

    @property
    def index_bits(self) -> int:
        """Bits of the linear address that one level consumes."""
        return 10 if self.root_level == 2 else 9

    def index(self, gla: int, level: int) -> int:
        """Return the entry of a table of `level` that covers the address."""
        return gla >> 12 + self.index_bits * (level - 1) & ((1 << self.index_bits) - 1)

    def pages_per(self, level: int) -> int:
        """4 KiB pages that one entry of `level` covers."""
        return 1 << self.index_bits * (level - 1)

    def is_large(self, entry: int, level: int) -> bool:
        """Whether a present entry maps a large page."""
        if level == 1 or not entry & LARGE:
            return False
        return self.pse if self.root_level == 2 else level in (2, 3)

    def reserved(self, entry: int, level: int) -> bool:
        """Whether a present entry has a reserved bit set."""
        if self.root_level == 2:
            # PSE36: PDE bits 20:13 are address bits 39:32, bit 21 is reserved.
            return self.is_large(entry, level) and bool(entry & 1 << 21)
        high = FRAME & ~((1 << self.maxphyaddr) - 1)
        if entry & high or (entry & NX and not self.nx):
            return True
        if self.root_level == 3:
            if entry & 0x7FF << 52:
                return True
        elif level == 3 and entry & LARGE and not self.gbpages:
            return True
        if level >= 4:
            return bool(entry & LARGE)
        if self.is_large(entry, level):
            return bool(entry & ((self.pages_per(level) << 12) - 1) & ~0x1FFF)
        return False

    def frame(self, entry: int, level: int, gla: int) -> Gfn:
        """Return the frame that a leaf of `level` gives the address."""
        if self.root_level == 2:
            if level == 1:
                return Gfn(entry >> 12)
            base = (entry & 0xFFC0_0000) >> 12 | (entry >> 13 & 0xFF) << 20
            return Gfn(base | gla >> 12 & 0x3FF)
        offset = self.pages_per(level) - 1
        return Gfn((entry & FRAME) >> 12 & ~offset | gla >> 12 & offset)

    def table(self, entry: int) -> Gfn:
        """Return the frame of the table a non-leaf entry points to."""
        return Gfn((entry & (FRAME if self.entry_bytes == 8 else 0xFFFF_F000)) >> 12)

    def access(self, entry: int) -> int:
        """Return the rights one entry grants."""
        access = ACC_EXEC if not (self.nx and entry & NX) else 0
        return access | ACC_WRITE * bool(entry & WRITABLE) | ACC_USER * bool(entry & USER)


@dataclasses.dataclass(frozen=True, slots=True)
class Access:
    """What the guest tries: `user` is CPL 3, `ac` EFLAGS.AC for an explicit supervisor access."""

    write: bool = False
    user: bool = False
    fetch: bool = False
    ac: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Walk:
    """A successful walk. Index 0 of the tuples is the root table's level, the last the leaf's."""

    level: int
    gfn: Gfn
    access: int
    tables: tuple[Gfn, ...]  # frame of the table looked at, per level
    entries: tuple[int, ...]
    accesses: tuple[int, ...]  # rights accumulated *before* the entry of that level
    dirty: bool  # the leaf's D bit, as it is now
    global_: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Fault:
    """The guest's page fault: the error code it must see."""

    error_code: int


def paging_of(guest: object, cpuid_gbpages: bool, maxphyaddr: int) -> Paging:
    """Read the paging mode out of a `struct cpu_guest`."""
    cr0, cr4, efer = guest.cr0, guest.cr4, guest.efer  # type: ignore[attr-defined]
    if not cr0 & uapi.X86_CR0_PG:
        return Paging(0, maxphyaddr=maxphyaddr)
    level = 2
    if cr4 & uapi.X86_CR4_PAE:
        level = 3
        if efer & uapi.EFER_LMA:
            level = 5 if cr4 & uapi.X86_CR4_LA57 else 4
    return Paging(
        level,
        guest.cr3,  # type: ignore[attr-defined]
        tuple(int(guest.pdptr[i]) for i in range(4)) if level == 3 else (),  # type: ignore[attr-defined]
        pse=bool(cr4 & uapi.X86_CR4_PSE),
        nx=bool(efer & uapi.EFER_NX),
        wp=bool(cr0 & uapi.X86_CR0_WP),
        smep=bool(cr4 & uapi.X86_CR4_SMEP),
        smap=bool(cr4 & uapi.X86_CR4_SMAP),
        gbpages=cpuid_gbpages,
        maxphyaddr=maxphyaddr,
    )


def permission_fault(paging: Paging, access: int, want: Access) -> bool:
    """Whether the accumulated rights forbid the access (SDM vol. 3 4.6.1)."""
    if want.fetch:
        if not access & ACC_EXEC:
            return True
        return not access & ACC_USER if want.user else paging.smep and bool(access & ACC_USER)
    if want.user:
        return not access & ACC_USER or (want.write and not access & ACC_WRITE)
    if paging.smap and access & ACC_USER and not want.ac:
        return True
    return want.write and not access & ACC_WRITE and paging.wp


def _error_code(paging: Paging, want: Access, bits: int) -> int:
    code = bits | PF_W * want.write | PF_U * want.user
    # The I bit exists only where fetches can be forbidden.
    return code | PF_I * (want.fetch and (paging.nx or paging.smep))


def walk_addr(
    paging: Paging, gla: int, want: Access, read: ReadEntry, set_bits: SetBits | None
) -> Walk | Fault:
    """Walk to the leaf. With `set_bits` A is set at every level and D in the leaf of a write.

    An entry that changes under the walk starts it anew, as on hardware.
    """
    while True:
        result = _walk_once(paging, gla, want, read, set_bits)
        if result is not None:
            return result


def _walk_once(
    paging: Paging, gla: int, want: Access, read: ReadEntry, set_bits: SetBits | None
) -> Walk | Fault | None:
    tables: list[Gfn] = []
    entries: list[int] = []
    accesses: list[int] = []
    access = ACC_ALL
    level = paging.root_level
    table = Gfn((paging.cr3 & FRAME) >> 12)
    if level == 3:
        pdpte = paging.pdptrs[gla >> 30 & 3]
        if not pdpte & PRESENT:
            return Fault(_error_code(paging, want, 0))
        level, table = 2, paging.table(pdpte)
    while True:
        gpa = (table << 12) + paging.index(gla, level) * paging.entry_bytes
        entry = read(gpa, paging.entry_bytes)
        if entry is None or not entry & PRESENT:
            return Fault(_error_code(paging, want, 0))
        if paging.reserved(entry, level):
            return Fault(_error_code(paging, want, PF_P | PF_RSVD))
        tables.append(table)
        entries.append(entry)
        accesses.append(access)
        access &= paging.access(entry)
        if level == 1 or paging.is_large(entry, level):
            break
        table = paging.table(entry)
        level -= 1
    if permission_fault(paging, access, want):
        return Fault(_error_code(paging, want, PF_P))
    if set_bits is not None and not _set_accessed_dirty(paging, gla, want, tables, entries, level, set_bits):
        return None
    return Walk(
        level,
        paging.frame(entries[-1], level, gla),
        access,
        tuple(tables),
        tuple(entries),
        tuple(accesses),
        bool(entries[-1] & DIRTY),
        bool(entries[-1] & GLOBAL),
    )


def _set_accessed_dirty(
    paging: Paging,
    gla: int,
    want: Access,
    tables: list[Gfn],
    entries: list[int],
    leaf: int,
    set_bits: SetBits,
) -> bool:
    top = leaf + len(tables) - 1
    for i, (table, entry) in enumerate(zip(tables, entries, strict=True)):
        level = top - i
        bits = ACCESSED | (DIRTY if want.write and level == leaf else 0)
        if entry & bits == bits:
            continue
        gpa = (table << 12) + paging.index(gla, level) * paging.entry_bytes
        if not set_bits(gpa, paging.entry_bytes, entry, bits):
            return False
        entries[i] = entry | bits
    return True
