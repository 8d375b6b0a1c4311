"""Software walk of the guest's own page tables: walk_addr() of KVM's paging_tmpl.h.

One walker for 32-bit, PAE and long mode tables.  It says what the guest's tables say: the frame
and the rights, or the page fault the guest must get.  KVM_TRANSLATE and the shadow MMU use it.
Source: SDM vol. 3 4.3 to 4.7.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import TYPE_CHECKING, NamedTuple, Protocol

from pykvm import trace
from pykvm.abi import CData, Gfn, uapi

if TYPE_CHECKING:
    from collections.abc import Sequence

# Rights of a translation; the values are ours, the order is that of role.access in KVM.
ACC_EXEC, ACC_WRITE, ACC_USER = 1, 2, 4
ACC_ALL = ACC_EXEC | ACC_WRITE | ACC_USER

PRESENT, WRITABLE, USER = 1 << 0, 1 << 1, 1 << 2
ACCESSED, DIRTY, LARGE, GLOBAL = 1 << 5, 1 << 6, 1 << 7, 1 << 8
PAT_LARGE = 1 << 12
NX = 1 << 63
FRAME = 0x000F_FFFF_FFFF_F000
FRAME32 = 0xFFFF_F000

# Error code of #PF, SDM vol. 3 4.7
PF_P, PF_W, PF_U, PF_RSVD, PF_I = 1, 2, 4, 8, 16


def pferr_flags(code: int) -> str:
    """Return an error code's bits by name, as tracepoints show them."""
    names = ((PF_P, "P"), (PF_W, "W"), (PF_U, "U"), (PF_RSVD, "RSVD"), (PF_I, "F"))
    return "|".join(name for bit, name in names if code & bit)


class GuestMemory(Protocol):
    """What a walk needs of guest memory."""

    def gfn_to_hva(self, gfn: int) -> int | None:
        """Return the host address of a frame, None where no slot is."""
        ...

    def read_gpte(self, hva: int, size: int) -> int | None:
        """Return the entry at a host address, None where the host has nothing."""
        ...

    def set_gpte_bits(self, gpa: int, hva: int, size: int, entry: int, bits: int) -> int | None:
        """Set A or D; return what is there now, None when it was `entry` no more: the walk starts anew."""
        ...


class GpteFormat:
    """What an entry of a guest page table means; two modes that agree on it are one object.

    `root_level`: 0 no paging, 2, 3 (PAE), 4, 5.  `entry_bytes`: size of an entry; `index_bits`: bits of the
    linear address that a level consumes.
    """

    __slots__ = ("_reserved", "entry_bytes", "gbpages", "index_bits", "maxphyaddr", "nx", "pse", "root_level")

    def __init__(self, root_level: int, *, pse: bool, nx: bool, gbpages: bool, maxphyaddr: int) -> None:
        """Use `gpte_format`."""
        self.root_level = root_level
        self.pse = pse
        self.nx = nx
        self.gbpages = gbpages
        self.maxphyaddr = maxphyaddr
        self.entry_bytes = 4 if root_level == 2 else 8
        self.index_bits = 10 if root_level == 2 else 9
        # rsvd_bits_mask[large][level]
        self._reserved = tuple(
            tuple(self._mask(level, large) for level in range(6)) for large in (False, True)
        )

    def _mask(self, level: int, large: bool) -> int:
        """Return the bits that must be 0, SDM vol. 3 4.3 to 4.5."""
        if self.root_level == 2:
            if level != 2 or not large:
                return 0
            # PSE36: PDE bits 20:13 are address bits 39:32, as many as there are.
            width = min(40, self.maxphyaddr)
            return (1 << 22) - (1 << width - 19)
        mask = FRAME & ~((1 << self.maxphyaddr) - 1) | NX * (not self.nx)
        if self.root_level == 3:
            mask |= 0x7FF << 52
        if level >= 4 or (level == 3 and large and not self.gbpages):
            mask |= LARGE
        if large and level in (2, 3):
            mask |= ((self.pages_per(level) << 12) - 1) & ~0x1FFF
        return mask

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

    def reserved(self, entry: int, level: int) -> int:
        """Return the reserved bits that are set in a present entry."""
        return entry & self._reserved[level > 1 and entry & LARGE != 0 and self.is_large(entry, level)][level]

    def frame(self, entry: int, level: int, gla: int) -> Gfn:
        """Return the frame that a leaf of `level` gives the address."""
        if self.root_level == 2:
            if level == 1:
                return Gfn(entry >> 12)
            base = (entry & 0xFFC0_0000) >> 12 | (entry >> 13 & 0xFF) << 20
            return Gfn(base | gla >> 12 & 0x3FF)
        if level == 1:
            return Gfn((entry & FRAME) >> 12)
        offset = self.pages_per(level) - 1
        return Gfn((entry & FRAME) >> 12 & ~offset | gla >> 12 & offset)

    def table(self, entry: int) -> Gfn:
        """Return the frame of the table a non-leaf entry points to."""
        return Gfn((entry & (FRAME if self.entry_bytes == 8 else FRAME32)) >> 12)

    def access(self, entry: int) -> int:
        """Return the rights one entry grants."""
        return entry & (WRITABLE | USER) | (not (entry & NX and self.nx))

    def leaf_access(self, entry: int) -> int:
        """Return the rights a leaf grants now: the first write has to set D (protect_clean_gpte)."""
        access = self.access(entry)
        return access if entry & DIRTY else access & ~ACC_WRITE


# access() takes them from the entry as they are.
assert (WRITABLE, USER) == (ACC_WRITE, ACC_USER)  # noqa: S101


@cache
def gpte_format(root_level: int, pse: bool, nx: bool, gbpages: bool, maxphyaddr: int) -> GpteFormat:
    """Return the format of the entries in a paging mode."""
    narrow = root_level == 2
    # Only what counts in the mode, so that the same object means the same.
    return GpteFormat(
        root_level,
        pse=pse and narrow,
        nx=nx and not narrow,
        gbpages=gbpages and root_level > 3,
        maxphyaddr=maxphyaddr,
    )


class Mode(NamedTuple):
    """What CR0, CR4 and EFER say about paging; equal when they say the same."""

    format: GpteFormat
    wp: bool
    smep: bool
    smap: bool


class Paging(NamedTuple):
    """The state that decides what a linear address means; equal values mean equal translations."""

    mode: Mode
    cr3: int
    pdptrs: tuple[int, ...]

    @property
    def root_level(self) -> int:
        """0 no paging, 2, 3 (PAE), 4, 5."""
        return self.mode.format.root_level


_CR0 = uapi.X86_CR0_PG | uapi.X86_CR0_WP
_CR4 = (
    uapi.X86_CR4_PAE | uapi.X86_CR4_PSE | uapi.X86_CR4_LA57 | uapi.X86_CR4_SMEP | uapi.X86_CR4_SMAP
)  # fmt: skip
_EFER = uapi.EFER_LMA | uapi.EFER_NX
# What changes the meaning of tables: KVM_MMU_CR0_ROLE_BITS, KVM_MMU_CR4_ROLE_BITS.
CR0_ROLE_BITS, CR4_ROLE_BITS = _CR0, _CR4


@cache
def _mode(cr0: int, cr4: int, efer: int, gbpages: bool, maxphyaddr: int) -> Mode:
    level = 0
    if cr0 & uapi.X86_CR0_PG:
        level = 2
        if cr4 & uapi.X86_CR4_PAE:
            level = 3
            if efer & uapi.EFER_LMA:
                level = 5 if cr4 & uapi.X86_CR4_LA57 else 4
    if not level:
        return Mode(gpte_format(0, False, False, False, maxphyaddr), wp=True, smep=False, smap=False)
    return Mode(
        gpte_format(level, bool(cr4 & uapi.X86_CR4_PSE), bool(efer & uapi.EFER_NX), gbpages, maxphyaddr),
        wp=bool(cr0 & uapi.X86_CR0_WP),
        smep=bool(cr4 & uapi.X86_CR4_SMEP),
        smap=bool(cr4 & uapi.X86_CR4_SMAP),
    )


def paging_of(guest: CData, cpuid_gbpages: bool, maxphyaddr: int) -> Paging:
    """Read the paging mode out of a `struct cpu_guest`."""
    mode = _mode(guest.cr0 & _CR0, guest.cr4 & _CR4, guest.efer & _EFER, cpuid_gbpages, maxphyaddr)
    level = mode.format.root_level
    if level == 0:
        return Paging(mode, 0, ())
    if level == 3:
        # CR3 itself counts for nothing once the PDPTEs are latched.
        return Paging(mode, 0, tuple(guest.pdptr))
    return Paging(mode, guest.cr3, ())


class Access(NamedTuple):
    """What the guest tries. `user` is CPL 3; `ac`: EFLAGS.AC, of an explicit supervisor access only."""

    write: bool = False
    user: bool = False
    fetch: bool = False
    ac: bool = False


@dataclasses.dataclass(slots=True)
class Walk:
    """A successful walk (struct guest_walker). Lists: first the root table's level, last the leaf's.

    `tables`: frame of the table looked at, per level; `accesses`: rights accumulated *before* the entry
    of that level; `hvas`: where the entry is in the host; `dirty`: the leaf's D bit, as it is now.
    """

    level: int
    gfn: Gfn
    access: int
    tables: Sequence[Gfn]
    entries: Sequence[int]
    accesses: Sequence[int]
    hvas: Sequence[int]
    dirty: bool

    def at(self, level: int) -> int:
        """Return the index of a level in the lists."""
        return self.level + len(self.tables) - 1 - level


@dataclasses.dataclass(frozen=True, slots=True)
class Fault:
    """The guest's page fault: the error code it must see."""

    error_code: int


def permission_fault(mode: Mode, access: int, want: Access) -> bool:
    """Whether the accumulated rights forbid the access (SDM vol. 3 4.6.1)."""
    write, user, fetch, ac = want
    if fetch:
        if not access & ACC_EXEC:
            return True
        return not access & ACC_USER if user else mode.smep and access & ACC_USER != 0
    if user:
        return not access & ACC_USER or (write and not access & ACC_WRITE)
    if mode.smap and access & ACC_USER and not ac:
        return True
    return write and not access & ACC_WRITE and mode.wp


def _fault(mode: Mode, want: Access, bits: int) -> Fault:
    code = bits | PF_W * want.write | PF_U * want.user
    # The I bit exists only where fetches can be forbidden.
    code |= PF_I * (want.fetch and (mode.format.nx or mode.smep))
    if trace.kvm_mmu_walker_error.enabled:
        trace.kvm_mmu_walker_error(pferr=code, flags=pferr_flags(code))
    return Fault(code)


def walk_addr(
    paging: Paging, gla: int, want: Access, memory: GuestMemory, *, mark: bool = True
) -> Walk | Fault:
    """Walk to the leaf. With `mark` A is set at every level, and D in the leaf of a write.

    An entry that changes under the walk starts it anew, as on hardware.
    """
    if trace.kvm_mmu_pagetable_walk.enabled:
        error = PF_W * want.write | PF_U * want.user | PF_I * want.fetch
        trace.kvm_mmu_pagetable_walk(addr=gla, pferr=error, flags=pferr_flags(error))
    while True:
        result = _walk_once(paging, gla, want, memory, mark)
        if result is not None:
            return result


def _walk_once(
    paging: Paging, gla: int, want: Access, memory: GuestMemory, mark: bool
) -> Walk | Fault | None:
    mode = paging.mode
    form = mode.format
    size, bits = form.entry_bytes, form.index_bits
    tables: list[Gfn] = []
    entries: list[int] = []
    accesses: list[int] = []
    hvas: list[int] = []
    access = ACC_ALL
    level = form.root_level
    table = form.table(paging.cr3)
    if level == 3:
        pdpte = paging.pdptrs[gla >> 30 & 3]
        if not pdpte & PRESENT:
            return _fault(mode, want, 0)
        level, table = 2, form.table(pdpte)
    shift = 12 + bits * (level - 1)
    while True:
        hva = memory.gfn_to_hva(table)
        if hva is None:
            return _fault(mode, want, 0)
        hva += (gla >> shift & ((1 << bits) - 1)) * size
        entry = memory.read_gpte(hva, size)
        if entry is None or not entry & PRESENT:
            return _fault(mode, want, 0)
        if trace.kvm_mmu_paging_element.enabled:
            trace.kvm_mmu_paging_element(pte=entry, level=level)
        if form.reserved(entry, level):
            return _fault(mode, want, PF_P | PF_RSVD)
        tables.append(table)
        entries.append(entry)
        accesses.append(access)
        hvas.append(hva)
        access &= form.access(entry)
        if level == 1 or (entry & LARGE and form.is_large(entry, level)):
            break
        table = form.table(entry)
        level -= 1
        shift -= bits
    if permission_fault(mode, access, want):
        return _fault(mode, want, PF_P)
    found = Walk(level, form.frame(entry, level, gla), access, tables, entries, accesses, hvas, dirty=False)
    if mark and not _set_accessed_dirty(form, gla, want, found, memory):
        return None
    # A write has set D, but not where the table is READONLY: then it is allowed all the same.
    found.dirty = entries[-1] & DIRTY != 0 or (mark and want.write)
    return found


def _set_accessed_dirty(form: GpteFormat, gla: int, want: Access, found: Walk, memory: GuestMemory) -> bool:
    """FNAME(update_accessed_dirty_bits): only now that the access is allowed."""
    entries, last = found.entries, len(found.entries) - 1
    for i, entry in enumerate(entries):
        bits = ACCESSED | DIRTY if i == last and want.write else ACCESSED
        if entry & bits == bits:
            continue
        index = form.index(gla, found.level + last - i)
        gpa = (found.tables[i] << 12) + index * form.entry_bytes
        now = memory.set_gpte_bits(gpa, found.hvas[i], form.entry_bytes, entry, bits)
        if now is None:
            return False
        if now == entry:  # in a READONLY slot
            continue
        entries[i] = now  # type: ignore[index]
        if trace.kvm_mmu_set_accessed_bit.enabled and not entry & ACCESSED:
            trace.kvm_mmu_set_accessed_bit(gpa=gpa)
        if trace.kvm_mmu_set_dirty_bit.enabled and bits & ~entry & DIRTY:
            trace.kvm_mmu_set_dirty_bit(gpa=gpa)
    return True
