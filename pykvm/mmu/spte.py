"""Shadow page table entries: the bits of one spte, and how one is made.

The processor's part of the format is in include/pykvm/cpu.h: an EPT entry whose frame is a
host *virtual* page.  Bits 52 to 62 are ours.
"""

from __future__ import annotations

from pykvm.abi import CData, Spte, ffi, lib

PT64_LEVEL_BITS = 9
PT64_ENTRIES = 1 << PT64_LEVEL_BITS
PG_LEVEL_4K, PG_LEVEL_2M, PG_LEVEL_1G = 1, 2, 3

R = lib.SPTE_R
W = lib.SPTE_W
X = lib.SPTE_X
U = lib.SPTE_U
RWX = lib.SPTE_RWX
PS = lib.SPTE_PS
ACCESSED = lib.SPTE_A
DIRTY = lib.SPTE_D
ROM = lib.SPTE_ROM
GUEST_USER = lib.SPTE_GUEST_USER
PFN_MASK = lib.SPTE_PFN
MMIO_VALUE = lib.SPTE_MMIO
MMIO_U = lib.SPTE_MMIO_U
MMIO_W = lib.SPTE_MMIO_W

# The host lets us write the page; without it a guest write is a fault of the host's.
HOST_WRITABLE = 1 << 52
# We may set W again without looking further: write-protected for dirty logging only.
# "If MMU-writable is set, host-writable must be set" is KVM's invariant too.
MMU_WRITABLE = 1 << 53

# An MMIO spte keeps the memslot generation in bits 3..10 and 52..62, as KVM does: 19 bits.
_GEN_LOW_BITS, _GEN_HIGH_BITS = 8, 11
MMIO_GEN_BITS = _GEN_LOW_BITS + _GEN_HIGH_BITS
_GEN_LOW_MASK = (1 << _GEN_LOW_BITS) - 1
_GEN_HIGH_MASK = (1 << _GEN_HIGH_BITS) - 1
MMIO_GEN_MASK = _GEN_LOW_MASK << 3 | _GEN_HIGH_MASK << 52

_OURS = HOST_WRITABLE | MMU_WRITABLE
_PROCESSORS = RWX | U | PS | ACCESSED | DIRTY | ROM | GUEST_USER | PFN_MASK
if _OURS & _PROCESSORS or MMIO_GEN_MASK & (RWX | MMIO_U | MMIO_W | PFN_MASK):
    msg = "bits of an spte overlap"
    raise AssertionError(msg)


def mmio_generation(generation: int) -> int:
    """Return a memslot generation as the bits an MMIO spte carries it in."""
    return (generation & _GEN_LOW_MASK) << 3 | (generation >> _GEN_LOW_BITS & _GEN_HIGH_MASK) << 52


def generation_of(spte: int) -> int:
    """Return the memslot generation in an MMIO spte, as many bits of it as fit."""
    return spte >> 3 & _GEN_LOW_MASK | (spte >> 52 & _GEN_HIGH_MASK) << _GEN_LOW_BITS


def make_mmio_spte(gfn: int, gen_bits: int, *, user: bool = False, writable: bool = False) -> Spte:
    """Return an entry that tells the processor: no memory here, as of this generation.

    gen_bits: what `mmio_generation` returned; user, writable: what the guest's tables allow, which
    only shadow paging has to tell.
    """
    return Spte(MMIO_VALUE | gfn << 12 & PFN_MASK | gen_bits | MMIO_U * user | MMIO_W * writable)


def make_spte(hva: int, level: int, *, writable: bool, host_writable: bool) -> Spte:
    """Return a leaf: `hva` of the first byte, rights R and X, W when the guest may write now."""
    spte = hva & PFN_MASK | R | X | U | ACCESSED
    if level > PG_LEVEL_4K:
        spte |= PS
    if host_writable:
        spte |= HOST_WRITABLE | MMU_WRITABLE
    if writable:
        spte |= W
    return Spte(spte)


def make_nonleaf_spte(spt: int) -> Spte:
    """Return an entry that points to a table at host address `spt`; rights are the leaves' business."""
    return Spte(spt | RWX | U | ACCESSED)


def is_shadow_present(spte: int) -> bool:
    """Whether the entry maps something (MMIO is not memory)."""
    return bool(spte & R)


def is_mmio(spte: int) -> bool:
    """Whether the entry is an MMIO one, of whatever generation."""
    return spte & RWX == MMIO_VALUE


def is_large(spte: int) -> bool:
    """Whether a present entry is a leaf above level 1."""
    return bool(spte & PS)


def is_last(spte: int, level: int) -> bool:
    """Whether a present entry of this level maps memory rather than a table."""
    return level == PG_LEVEL_4K or bool(spte & PS)


def index(gfn: int, level: int) -> int:
    """Return the entry of a table of `level` that covers the frame."""
    return gfn >> PT64_LEVEL_BITS * (level - 1) & (PT64_ENTRIES - 1)


def pages_per(level: int) -> int:
    """4 KiB pages that one entry of `level` covers."""
    return 1 << PT64_LEVEL_BITS * (level - 1)


def read(sptep: CData) -> int:
    """Read an entry the processor may be changing."""
    return int(lib.spte_read(sptep))


def clear_bits(sptep: CData, bits: int) -> int:
    """Clear bits of an entry, keeping A and D bits the processor sets meanwhile; return the old entry."""
    while True:
        old = int(lib.spte_read(sptep))
        if lib.spte_cmpxchg(sptep, old, old & ~bits):
            return old


def clear_bits_of(spt: CData, entries: int, bits: int) -> int:
    """Clear bits of the present entries that `entries` has, bit 0 the first; return what any had set."""
    mask = ffi.new("uint64_t[8]")
    ffi.memmove(mask, entries.to_bytes(PT64_ENTRIES // 8, "little"), PT64_ENTRIES // 8)
    return int(lib.spt_clear_bits(spt, mask, bits))
