"""The MMU of a VM at one moment: everything `pykvm run --mmu` draws, as immutable values.

Two of them make a page (page.py): what was and what is.
"""

from __future__ import annotations

import dataclasses
import time
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from pykvm.mmu import spte as sptes
from pykvm.mmu.direct import TdpMmu
from pykvm.mmu.shadow import ShadowMmu
from pykvm.mmu.view import MmuView, PageView, paging_of
from pykvm.mmu.walk import PRESENT, Paging

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pykvm.kvm.vcpu import Vcpu
    from pykvm.kvm.vm import Vm
    from pykvm.mmu.walk import GpteFormat

# A guest that writes nonsense into its tables can make them reach anywhere.
MAX_GUEST_TABLES = 1 << 15
_PAE = 3


@dataclasses.dataclass(frozen=True, slots=True)
class GuestTable:
    """One of the guest's page tables: 4096 bytes of entries of 4 or 8 bytes each.

    One frame may be several: a table of two levels, or in two modes.
    """

    as_id: int
    gfn: int
    level: int
    entry_bytes: int
    table: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class RootView:
    """A root of shadow paging or TDP: the tables a walk starts at, PAE's four, None where there is none."""

    level: int
    tables: tuple[int | None, ...]
    cr3: int


@dataclasses.dataclass(frozen=True, slots=True)
class VcpuView:
    """What of a vCPU decides how addresses are translated. `roots`: the current one, then previous ones."""

    id: int
    as_id: int
    rip: int
    cr0: int
    cr3: int
    cr4: int
    efer: int
    paging: Paging
    roots: tuple[RootView, ...]


class SlotView(NamedTuple):
    """A memory slot: frames [base_gfn, base_gfn + npages) at host address `hva`."""

    as_id: int
    id: int
    base_gfn: int
    npages: int
    hva: int
    flags: int


@dataclasses.dataclass(frozen=True, slots=True)
class Snapshot:
    """One VM's MMU at one moment. `seconds`: the clock of time.monotonic()."""

    mode: str
    seconds: float
    pages: tuple[PageView, ...]
    guest_tables: tuple[GuestTable, ...]
    vcpus: tuple[VcpuView, ...]
    slots: tuple[SlotView, ...]
    stat: Mapping[str, int]


def take(vm: Vm) -> Snapshot:
    """Take a snapshot; vCPUs may run, the MMU stands still meanwhile."""
    view = MmuView(vm)
    with vm.mmu.lock:
        pages = view.pages()
        vcpus = tuple(_vcpu(vm, vcpu) for vcpu in tuple(vm.vcpus.values()))
        return Snapshot(
            view.mode,
            time.monotonic(),
            pages,
            tuple(_guest_tables(vm, pages, vcpus)),
            vcpus,
            tuple(
                SlotView(slot.as_id, slot.id, slot.base_gfn, slot.npages, slot.userspace_addr, slot.flags)
                for slots in vm.memslots
                for slot in slots.ordered
            ),
            MappingProxyType(view.stat()),
        )


def _vcpu(vm: Vm, vcpu: Vcpu) -> VcpuView:
    guest = vcpu.cpu.guest
    return VcpuView(
        vcpu.id,
        vcpu.as_id,
        int(guest.rip),
        int(guest.cr0),
        int(guest.cr3),
        int(guest.cr4),
        int(guest.efer),
        paging_of(vcpu),
        tuple(_roots(vm, vcpu)),
    )


def _roots(vm: Vm, vcpu: Vcpu) -> Iterator[RootView]:
    mmu = vm.mmu
    if isinstance(mmu, ShadowMmu):
        for root in mmu.state(vcpu).roots():
            tables = tuple(None if page is None else page.spt_addr for page in root.pages)
            yield RootView(root.level, tables, root.paging.cr3)
    elif isinstance(mmu, TdpMmu):
        eptp = int(vcpu.cpu.ctl.eptp)
        for tdp in mmu.tables(vcpu.as_id):
            if tdp.root.spt_addr == eptp:
                yield RootView(tdp.root.role.level, (eptp,), 0)


# ---- the guest's tables ----------------------------------------------------------------------------


def _guest_tables(vm: Vm, pages: tuple[PageView, ...], vcpus: tuple[VcpuView, ...]) -> Iterator[GuestTable]:
    """Yield the tables that the vCPUs' CR3 lead to, and those that are shadowed for whatever reason."""
    todo: dict[tuple[int, int, int, int], GpteFormat] = {}
    for vcpu in vcpus:
        form = vcpu.paging.mode.format
        if form.root_level == _PAE:
            for pdpte in vcpu.paging.pdptrs:
                if pdpte & PRESENT:
                    todo[vcpu.as_id, form.table(pdpte), _PAE - 1, form.entry_bytes] = form
        elif form.root_level:
            todo[vcpu.as_id, form.table(vcpu.paging.cr3), form.root_level, form.entry_bytes] = form
    for page in pages:
        if page.role.format is not None:
            form = page.role.format
            todo[int(page.role.smm), page.gfn, page.role.level, form.entry_bytes] = form
    seen: set[tuple[int, int, int, int]] = set()
    while todo and len(seen) < MAX_GUEST_TABLES:
        key, form = todo.popitem()
        if key in seen:
            continue
        seen.add(key)
        as_id, gfn, level, size = key
        table = vm.read_guest(gfn << 12, 4096, as_id)
        if table is None:
            continue
        yield GuestTable(as_id, gfn, level, size, table)
        if level > sptes.PG_LEVEL_4K:
            for child in _children(table, level, form):
                todo.setdefault((as_id, child, level - 1, size), form)


def _children(table: bytes, level: int, form: GpteFormat) -> Iterator[int]:
    for entry in memoryview(table).cast("Q" if form.entry_bytes > 4 else "I"):
        if entry & PRESENT and not form.is_large(entry, level) and not form.reserved(entry, level):
            yield form.table(entry)
