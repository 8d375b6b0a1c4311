"""What a personality offers: KVM_GET_SUPPORTED_CPUID, and the bits of control registers that follow.

The processor says what there is, the kernel what can be virtualized, and `cpuid.SUPPORTED` what this
core executes: a bit is offered when all three have it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING

from pykvm.abi import uapi
from pykvm.kvm import cpuid
from pykvm.kvm.cpuid import EAX, Entry, Registers

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from collections.abc import Set as AbstractSet

    from pykvm.kvm.profile import Kernel, Processor

_NONE: Registers = (0, 0, 0, 0)
_SIGNIFICANT = uapi.KVM_CPUID_FLAG_SIGNIFCANT_INDEX
_STATEFUL = uapi.KVM_CPUID_FLAG_STATEFUL_FUNC | uapi.KVM_CPUID_FLAG_STATE_READ_NEXT
_EXTENDED = 0x8000_0000
_PV = uapi.KVM_CPUID_SIGNATURE
_ADDRESS_SIZES = 0x8000_0008
# Leaves of which an index selects the registers.
_INDEXED = frozenset({4, 7, 0xB, 0xD, 0xF, 0x10, 0x12, 0x14, 0x17, 0x18, 0x1F, 0x8000_001D})
# Rights that are not in an spte, which is all there is to walk in shadow mode (kvm_set_cpu_caps).
_NEED_TDP = frozenset({"PKU"})
_VENDORS = MappingProxyType({"intel": b"GenuineIntel", "amd": b"AuthenticAMD"})
# Level types of the topology leaves.
_THREAD, _CORE = 1, 2


@dataclass(frozen=True, slots=True)
class Offer:
    """What a client is told, and what its guests can do.

    `words`: bits the processor has, whatever the kernel knows, by the names of `cpuid.WORDS`: what
    decides about instructions.  `supported`: the table of KVM_GET_SUPPORTED_CPUID.
    `cr4`, `efer`, `xcr0`: bits that can be set at all.  `known`: bits that are offered.
    """

    words: Mapping[str, int]
    supported: tuple[Entry, ...]
    cr4: int
    efer: int
    xcr0: int
    known: Mapping[str, int]

    def has(self, feature: str) -> bool:
        """Say if a feature is offered."""
        return _has(self.known, feature)


@cache
def offer(kernel: Kernel, processor: Processor, *, tdp: bool = True) -> Offer:
    """Return what this kernel offers on this processor, with two-dimensional or with shadow paging."""
    words = _words(None if processor.as_built else processor.features)
    known = _virtualized(kernel, processor)
    if not tdp:
        known = MappingProxyType({word: bits & ~_mask(word, _NEED_TDP) for word, bits in known.items()})
    xcr0 = _xcr0(known)
    cr4 = cpuid.CR4_ALWAYS | sum(bit for bit, name in cpuid.CR4_FEATURES.items() if _has(known, name))
    efer = sum(bits for bits, name in cpuid.EFER_FEATURES.items() if _has(known, name))
    entries = cpuid.SUPPORTED_CPUID if processor.as_built else tuple(_leaves(kernel, processor))
    entries = tuple(_through_kernel(kernel, entries, known, xcr0))
    return Offer(words, _fit(entries, kernel), cr4, efer, xcr0, known)


# ---- features --------------------------------------------------------------------------------------


def _mask(word: str, names: AbstractSet[str] | None) -> int:
    """Return the bits of a word that are named, all of them for None."""
    return sum(1 << f.bit for f in cpuid.FEATURES if f.word == word and (names is None or f.name in names))


def _has(words: Mapping[str, int], name: str) -> bool:
    feature = cpuid.BY_NAME.get(name)
    return feature is not None and bool(words[feature.word] >> feature.bit & 1)


def _words(names: AbstractSet[str] | None) -> Mapping[str, int]:
    return MappingProxyType({word: bits & _mask(word, names) for word, bits in cpuid.SUPPORTED.items()})


def _virtualized(kernel: Kernel, processor: Processor) -> Mapping[str, int]:
    """Return what the kernel offers of the processor's features, and its own."""
    names = None if processor.as_built else processor.features
    rules = kernel.cpuid
    if rules.features is not None:
        names = rules.features if names is None else names & rules.features
    return _words(None if names is None else names | rules.software)


def _xcr0(words: Mapping[str, int]) -> int:
    if not _has(words, "XSAVE"):
        return uapi.XFEATURE_MASK_FP
    components = (bit for bit, name in cpuid.XCR0_FEATURES.items() if _has(words, name))
    return uapi.XFEATURE_MASK_FP | sum(components)


# ---- leaves ----------------------------------------------------------------------------------------


def _leaves(kernel: Kernel, processor: Processor) -> Iterator[Entry]:
    """Yield the leaves of a processor; feature bits are put in later."""
    for first, last in ((0, processor.max_basic), (_EXTENDED, processor.max_extended)):
        for function in range(first, last + 1):
            for index, registers in enumerate(_subleaves(kernel, processor, function)):
                yield Entry(function, index, _SIGNIFICANT if function in _INDEXED else 0, registers)
    yield from (entry for entry in cpuid.SUPPORTED_CPUID if entry.function & 0xF000_0000 == _PV)


def _subleaves(kernel: Kernel, processor: Processor, function: int) -> tuple[Registers, ...]:
    if function in processor.leaves:
        return (processor.leaves[function],)
    if function == 4:
        return _caches(processor) if not processor.is_amd else (_NONE,)
    if function == 0x8000_001D:
        return _caches(processor)
    if function == 0xB:
        return _topology(processor) if kernel.cpuid.host_topology else (_NONE,)
    return (_leaf(processor, function),)


def _leaf(processor: Processor, function: int) -> Registers:
    b, c, d = (int.from_bytes(_VENDORS[processor.vendor][at : at + 4], "little") for at in (0, 8, 4))
    if function == 0:
        return processor.max_basic, b, c, d
    if function == 1:
        logical = min(processor.cores * processor.threads, 0xFF)
        return processor.signature, logical << 16 | 8 << 8, 0, 0
    if function == _EXTENDED:
        return (processor.max_extended, b, c, d) if processor.is_amd else (processor.max_extended, 0, 0, 0)
    if function == 0x8000_0001 and processor.is_amd:
        return processor.signature, 0, 0, 0
    if 0x8000_0002 <= function <= 0x8000_0004:
        return _brand(processor, function - 0x8000_0002)
    if function == _ADDRESS_SIZES:
        return processor.phys_bits | processor.virt_bits << 8 | processor.phys_bits << 16, 0, 0, 0
    return _NONE


def _brand(processor: Processor, part: int) -> Registers:
    text = processor.brand.encode().ljust(48, b"\0")[part * 16 : part * 16 + 16]
    a, b, c, d = (int.from_bytes(text[at : at + 4], "little") for at in range(0, 16, 4))
    return a, b, c, d


def _caches(processor: Processor) -> tuple[Registers, ...]:
    cores = 0 if processor.is_amd else min(processor.cores, 64) - 1 << 26
    found = [each.registers for each in processor.caches]
    return (*((a | cores, b, c, d) for a, b, c, d in found), _NONE)


def _topology(processor: Processor) -> tuple[Registers, ...]:
    """Return leaf 0xB of the processor with APIC id 0."""
    logical = processor.cores * processor.threads
    thread_bits, core_bits = ((n - 1).bit_length() for n in (processor.threads, logical))
    thread = (thread_bits, processor.threads, _THREAD << 8, 0)
    return thread, (core_bits, logical, _CORE << 8 | 1, 0), (0, 0, 2, 0)


# ---- what the kernel makes of them -------------------------------------------------------------------


def _through_kernel(
    kernel: Kernel, entries: Iterable[Entry], words: Mapping[str, int], xcr0: int
) -> Iterator[Entry]:
    rules = kernel.cpuid
    for entry in entries:
        function = entry.function
        if function == 0xD:
            # Its subleaves are made anew, of what is left.
            if entry.index == 0 and function <= rules.max_basic:
                yield from _xsave_leaves(words, xcr0)
        elif function < _PV:
            if function <= rules.max_basic:
                yield _limited(_stateful(kernel, _masked(entry, words)), 0, rules.max_basic)
        elif function < _EXTENDED:
            yield _paravirtual(kernel, entry)
        elif function <= rules.max_extended:
            yield _limited(
                _address_sizes(kernel, _masked(entry, words), words), _EXTENDED, rules.max_extended
            )


def _masked(entry: Entry, words: Mapping[str, int]) -> Entry:
    registers = list(entry.registers)
    for name, word in cpuid.WORDS.items():
        if (word.function, word.index) == (entry.function, entry.index):
            registers[word.register] = words[name]
    a, b, c, d = registers
    return dataclasses.replace(entry, registers=(a, b, c, d))


def _limited(entry: Entry, function: int, highest: int) -> Entry:
    if entry.function != function or entry.registers[EAX] <= highest:
        return entry
    _, b, c, d = entry.registers
    return dataclasses.replace(entry, registers=(highest, b, c, d))


def _stateful(kernel: Kernel, entry: Entry) -> Entry:
    if entry.function != 2 or not kernel.cpuid.stateful_leaf_2:
        return entry
    return dataclasses.replace(entry, flags=_STATEFUL)


def _paravirtual(kernel: Kernel, entry: Entry) -> Entry:
    a, b, c, d = entry.registers
    if entry.function == uapi.KVM_CPUID_SIGNATURE:
        a = kernel.cpuid.signature_eax
    elif entry.function == uapi.KVM_CPUID_FEATURES and kernel.cpuid.pv_features is not None:
        a &= kernel.cpuid.pv_features
    return dataclasses.replace(entry, registers=(a, b, c, d))


def _address_sizes(kernel: Kernel, entry: Entry, words: Mapping[str, int]) -> Entry:
    if entry.function != _ADDRESS_SIZES:
        return entry
    a, b, c, d = entry.registers
    if not kernel.cpuid.guest_phys_bits:
        a &= 0xFFFF
    if a >> 8 & 0xFF > 48 and not _has(words, "LA57"):
        a = a & ~0xFF00 | 48 << 8
    return dataclasses.replace(entry, registers=(a, b, c, d))


def _xsave_leaves(words: Mapping[str, int], xcr0: int) -> Iterator[Entry]:
    for index, registers in cpuid.xsave_leaves(xcr0, words["D_1_EAX"], xsave=_has(words, "XSAVE")).items():
        yield Entry(0xD, index, _SIGNIFICANT, registers)


def _fit(entries: tuple[Entry, ...], kernel: Kernel) -> tuple[Entry, ...]:
    """Leave out leaves of zeros, from the end, if the table is longer than this kernel takes.

    No kernel had to: the processors of its time had fewer leaves.
    """
    room = kernel.limits.cpuid_entries - (0 if kernel.cpuid.exact_room else 1)
    kept = list(entries)
    for entry in reversed(entries):
        if len(kept) <= room:
            break
        if entry.registers == _NONE and not entry.index:
            kept.remove(entry)
    return tuple(kept)
