"""Tables and arithmetic of the kernel module that need no descriptor."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm import uapi
from pykvm.kvm import clock, cpuid, events, exits, msr
from pykvm.kvm.msr_filter import MsrFilter, Range

SIGNIFICANT = uapi.KVM_CPUID_FLAG_SIGNIFCANT_INDEX


@given(khz=st.integers(1000, 20_000_000), seconds=st.integers(1, 1000))
def test_the_scale_of_kvmclock_is_exact(khz: int, seconds: int) -> None:
    mul, shift = clock.time_scale(khz)
    assert 1 << 31 <= mul < 1 << 32
    ticks = khz * 1000 * seconds
    ns = (ticks << shift if shift >= 0 else ticks >> -shift) * mul >> 32
    assert abs(ns - seconds * clock.NSEC_PER_SEC) <= seconds + 1000


def entry(function: int, index: int | None, eax: int) -> cpuid.Entry:
    return cpuid.Entry(function, index or 0, 0 if index is None else SIGNIFICANT, (eax, 0, 0, 0))


@pytest.mark.spec("cpuid.oor")
def test_the_first_entry_of_a_leaf_counts() -> None:
    table = cpuid.GuestCpuid((entry(1, None, 10), entry(1, None, 20), entry(4, 0, 40), entry(4, 1, 41)))
    assert table.registers(1, 99) == (10, 0, 0, 0)
    assert table.registers(4, 1) == (41, 0, 0, 0)
    assert table.find(4, 2) is None
    assert table.registers(4, 2) == (0, 0, 0, 0)


def test_the_physical_address_width() -> None:
    assert cpuid.GuestCpuid().maxphyaddr == 36
    leaves = (entry(0x80000000, None, 0x80000008), entry(0x80000008, None, 0x3028))
    assert cpuid.GuestCpuid(leaves).maxphyaddr == 40
    assert cpuid.GuestCpuid(leaves).reserved_gpa_bits == (1 << 64) - (1 << 40)
    # A leaf beyond the highest one told is not looked at.
    assert cpuid.GuestCpuid(leaves[1:]).maxphyaddr == 36


@pytest.mark.spec("cpuid.signature")
def test_the_paravirtual_leaves_may_be_elsewhere() -> None:
    signature = cpuid.Entry(0x40000100, 0, 0, (0x40000101, 0x4B4D564B, 0x564B4D56, 0x4D))
    table = cpuid.GuestCpuid((signature, entry(0x40000101, None, 0x99)))
    assert table.pv_features == 0x99
    assert cpuid.GuestCpuid((entry(0x40000001, None, 0x11),)).pv_features == 0x11


@pytest.mark.spec("cpuid.d")
@pytest.mark.parametrize(
    ("xcr0", "compacted", "size"),
    [(1, False, 576), (3, False, 576), (7, False, 832), (0x203, False, 2696), (0x207, True, 840)],
)
def test_sizes_of_xsave_areas(xcr0: int, compacted: bool, size: int) -> None:
    assert cpuid.xstate_required_size(xcr0, compacted=compacted) == size


@pytest.mark.spec("vm.X86_SET_MSR_FILTER")
def test_the_first_range_of_a_filter_counts() -> None:
    read, write = uapi.KVM_MSR_FILTER_READ, uapi.KVM_MSR_FILTER_WRITE
    allow = MsrFilter(
        default_allow=True,
        ranges=(Range(read, 0x10, 9, b"\x01\x01"), Range(read | write, 0x10, 2, b"\x00")),
    )
    assert allow.is_allowed(0x10, read)
    assert not allow.is_allowed(0x10, write)
    assert not allow.is_allowed(0x11, read)
    assert allow.is_allowed(0x18, read)
    assert allow.is_allowed(0x18, write)
    assert allow.is_allowed(0x19, read)


def test_classes_of_exceptions() -> None:
    page_fault, contributory, benign = (
        events.exception_class(vector) for vector in (uapi.PF_VECTOR, uapi.GP_VECTOR, uapi.UD_VECTOR)
    )
    assert len({page_fault, contributory, benign}) == 3
    faults = {vector for vector in range(32) if vector != uapi.NMI_VECTOR and events.is_fault(vector)}
    assert {uapi.DE_VECTOR, uapi.UD_VECTOR, uapi.GP_VECTOR, uapi.PF_VECTOR} <= faults
    assert not faults & {uapi.DB_VECTOR, uapi.BP_VECTOR, uapi.OF_VECTOR, uapi.DF_VECTOR, uapi.MC_VECTOR}


def test_every_exit_that_can_happen_has_its_handler() -> None:
    unused = {"NONE", "PAUSE", "MONITOR", "MWAIT"}
    without = {reason for reason, handler in enumerate(exits.HANDLERS) if handler is exits._unexpected}
    assert {exits.EXIT_NAMES[reason] for reason in without} <= unused


@pytest.mark.spec("msr.index_list")
def test_rows_of_msrs_are_whole() -> None:
    for index, row in msr.MSRS.items():
        assert index in row.indices
        assert row.write is not None or not row.save, f"{index:#x} is listed and cannot be written back"
        assert row.feature is None or row.save
