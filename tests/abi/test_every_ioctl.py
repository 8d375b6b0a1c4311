"""Every ioctl there is, wrongly used: the errno of Linux, nothing changed, no crash."""

from __future__ import annotations

import mmap
import os
import random
from errno import EBADF, EFAULT, EINVAL, ENOTTY, errorcode
from typing import TYPE_CHECKING

import pytest

import pykvm
import pykvm.kvm
from pykvm.abi import ffi, requests
from pykvm.abi.ioctl import UNKNOWN_REQUEST, Array, Ioctl, NoArg, lookup, rows
from pykvm.abi.uaccess import address_of
from tests.abi.conftest import errno_of

if TYPE_CHECKING:
    from collections.abc import Iterator

KIND_FDS = ("system", "vm", "vcpu")

OFFERED = [row for kind in KIND_FDS for row in rows(kind) if not row.absent]
ABSENT = [row for kind in KIND_FDS for row in rows(kind) if row.absent]
POINTERS = [row for row in OFFERED if row.form is not None and row.form.ctype() is not None]
# A random state may well run for ever; guests' tests are for KVM_RUN.
NOT_AT_RANDOM = {"KVM_RUN", "KVM_CREATE_VM"}
# NULL means "no mask".
NULL_ALLOWED = {"KVM_SET_SIGNAL_MASK"}
# Looks at the vCPUs before it looks at the pointer, as Linux does.
LATE = {"KVM_SET_IDENTITY_MAP_ADDR"}
STATE = {
    "KVM_GET_REGS",
    "KVM_GET_SREGS",
    "KVM_GET_FPU",
    "KVM_GET_XSAVE",
    "KVM_GET_DEBUGREGS",
    "KVM_GET_VCPU_EVENTS",
}

Fds = dict[str, int]


def name(row: Ioctl) -> str:
    return f"{row.kind}-{row.name}"


@pytest.fixture
def fds(kvm: int, vm: int, vcpu: int) -> Fds:
    return {"system": kvm, "vm": vm, "vcpu": vcpu}


@pytest.fixture
def no_access() -> Iterator[int]:
    """Address of a page that cannot be accessed."""
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=0)
    yield address_of(ffi.from_buffer(page))
    page.close()


def state(fds: Fds) -> list[object]:
    """What an ioctl that fails must not have changed."""
    asked = (row.request for row in OFFERED if row.kind == "vcpu" and row.name in STATE)
    return [pykvm.ioctl(fds["vcpu"], request, bytes(request >> 16 & 0x3FFF)) for request in asked]


@pytest.mark.parametrize("row", POINTERS, ids=name)
def test_a_bad_pointer_is_efault(row: Ioctl, fds: Fds, no_access: int) -> None:
    before = state(fds)
    allowed = {EINVAL} if row.name in LATE else {EFAULT}
    for pointer in (
        0,
        1,
        0xFFFF_FFFF_8100_0000,
        0x8000_0000_0000,
        (1 << 64) - 1,
        no_access,
        no_access + 4090,
    ):
        if pointer == 0 and row.name in NULL_ALLOWED:
            continue
        assert errno_of(pykvm.ioctl, fds[row.kind], row.request, pointer) in allowed, f"{pointer:#x}"
    assert state(fds) == before


@pytest.mark.parametrize("row", [row for row in POINTERS if row.name not in LATE], ids=name)
def test_a_short_buffer_is_efault(row: Ioctl, fds: Fds) -> None:
    assert row.form is not None
    ctype = row.form.ctype()
    assert ctype is not None
    size = ffi.sizeof(ctype)
    before = state(fds)
    for length in {0, 1, size // 2, size - 1}:
        assert errno_of(pykvm.ioctl, fds[row.kind], row.request, bytearray(length)) == EFAULT
    assert state(fds) == before


@pytest.mark.parametrize("row", [row for row in OFFERED if isinstance(row.form, Array)], ids=name)
def test_entries_behind_the_end_are_efault(row: Ioctl, fds: Fds) -> None:
    form = row.form
    assert isinstance(form, Array)
    header = ffi.new(f"{form.type} *")
    setattr(header, form.count, 200)
    image = bytearray(ffi.buffer(header, ffi.sizeof(form.type)))
    before = state(fds)
    assert errno_of(pykvm.ioctl, fds[row.kind], row.request, image) in {EFAULT, None}
    if form.copy_in:
        assert errno_of(pykvm.ioctl, fds[row.kind], row.request, image) == EFAULT
    assert state(fds) == before


@pytest.mark.spec("fd.unknown_ioctl", "vcpu.foreign")
@pytest.mark.parametrize("kind", KIND_FDS)
def test_a_request_for_another_descriptor_is_unknown(kind: str, fds: Fds) -> None:
    wrong = [request for request in requests().values() if lookup(kind, request.number) is None]
    assert len(wrong) > 50
    scratch = bytearray(1 << 14)
    for request in wrong:
        assert errno_of(pykvm.ioctl, fds[kind], request.number, scratch) == UNKNOWN_REQUEST[kind], (
            request.name
        )
        assert errno_of(pykvm.ioctl, fds[kind], request.number) == UNKNOWN_REQUEST[kind], request.name


@pytest.mark.spec(
    "fd.unknown_ioctl", "sys.TRACE", "vcpu.DEBUG_GUEST", "vm.SET_MEMORY_REGION", "vm.SET_MEMORY_ALIAS"
)
@pytest.mark.parametrize("kind", KIND_FDS)
def test_withdrawn_and_foreign_numbers_are_unknown(kind: str, fds: Fds) -> None:
    # _IO(KVMIO, 0x1f), _IO('K', 1), TCGETS, the trace ioctls, SET_MEMORY_REGION, _ALIAS, DEBUG_GUEST
    for request in (
        0xAE1F,
        0x4B01,
        0x5401,
        0xAE06,
        0xAE07,
        0xAE08,
        0x4018AE40,
        0x4020AE43,
        0x4048AE87,
        0,
        0xFFFFFFFF,
    ):
        assert errno_of(pykvm.ioctl, fds[kind], request, bytearray(4096)) == UNKNOWN_REQUEST[kind]


@pytest.mark.spec("fd.nr_reuse", "fd.odd_dir")
@pytest.mark.parametrize("row", OFFERED, ids=name)
def test_direction_and_size_are_part_of_the_number(row: Ioctl, fds: Fds) -> None:
    for other in (row.request ^ 1 << 30, row.request ^ 1 << 31, row.request ^ 1 << 16, row.request ^ 0x100):
        if lookup(row.kind, other) is None:
            number = errno_of(pykvm.ioctl, fds[row.kind], other, bytearray(1 << 14))
            assert number == UNKNOWN_REQUEST[row.kind], f"{other:#x}"


@pytest.mark.spec("vm.SET_PMU_EVENT_FILTER", "vm.XEN_HVM_CONFIG", "vm.XEN_HVM_ATTR", "vm.XEN_HVM_EVTCHN_SEND")
@pytest.mark.spec("vm.HYPERV_EVENTFD", "vm.MEMORY_ENCRYPT_OP", "vm.MEMORY_ENCRYPT_REGION", "vcpu.XEN_ATTR")
@pytest.mark.spec("sys.GET_SUPPORTED_HV_CPUID", "vcpu.GET_SUPPORTED_HV_CPUID", "vcpu.NESTED_STATE")
@pytest.mark.spec("vcpu.MEMORY_ENCRYPT_OP", "vm.SET_MEMORY_ATTRIBUTES", "vm.CREATE_GUEST_MEMFD")
@pytest.mark.parametrize("row", ABSENT, ids=name)
def test_an_absent_ioctl_says_so(row: Ioctl, fds: Fds) -> None:
    with pytest.raises(pykvm.KvmError, match="not offered") as caught:
        pykvm.ioctl(fds[row.kind], row.request, bytearray(1 << 14))
    assert [errorcode[caught.value.errno or 0]] == list(row.errors)


@pytest.mark.spec("fd.arg_zero")
@pytest.mark.parametrize("row", [row for row in OFFERED if isinstance(row.form, NoArg)], ids=name)
def test_no_argument_means_0(row: Ioctl, fds: Fds) -> None:
    assert errno_of(pykvm.ioctl, fds[row.kind], row.request, 1) == EINVAL


@pytest.mark.parametrize("row", OFFERED, ids=name)
def test_on_a_descriptor_of_something_else(row: Ioctl) -> None:
    ends = os.pipe()
    assert errno_of(pykvm.ioctl, ends[0], row.request, bytearray(1 << 14)) == ENOTTY
    for end in ends:
        os.close(end)
    assert errno_of(pykvm.ioctl, ends[0], row.request, bytearray(1 << 14)) == EBADF


@pytest.mark.parametrize("row", [row for row in OFFERED if row.name not in NOT_AT_RANDOM], ids=name)
def test_random_arguments_give_an_errno_or_an_answer(row: Ioctl, fds: Fds) -> None:
    seeded = random.Random(row.request)
    for _ in range(60):
        data = bytearray(seeded.randbytes(seeded.choice((8, 64, 512, 1 << 13))))
        for at in seeded.sample(range(len(data)), len(data) // 2):
            data[at] = seeded.choice((0, 0, 1, 0xFF))
        argument: object = data if seeded.random() < 0.8 else seeded.getrandbits(64)
        try:
            result = pykvm.ioctl(fds[row.kind], row.request, argument)
        except pykvm.KvmError:
            continue
        assert isinstance(result, int)
        assert 0 <= result < 1 << 31
        if row.name == "KVM_CREATE_VCPU":
            os.close(result)
