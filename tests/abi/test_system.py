"""/dev/kvm, what it creates, and the ways in from Python."""

from __future__ import annotations

import array
import ctypes
import fcntl
import io
import os
import threading
from collections.abc import Callable
from errno import EBUSY, EEXIST, EFAULT, EINVAL, ENOENT, ENOTTY
from pathlib import Path

import pytest

import pykvm
from pykvm import uapi
from pykvm.abi import capabilities, ffi
from pykvm.abi.ioctl import rows
from pykvm.fd.table import is_ours
from tests.abi.conftest import errno_of

Track = Callable[[int], int]
MAX_VCPU_ID = 4096


def call(fd: int, request: int, arg: object = 0) -> int:
    result = pykvm.ioctl(fd, request, arg)
    assert isinstance(result, int)
    return result


def cap(fd: int, number: int) -> int:
    return call(fd, uapi.KVM_CHECK_EXTENSION, number)


def enable(fd: int, number: int, *args: int, flags: int = 0) -> int:
    request = ffi.new("struct kvm_enable_cap *", {"cap": number, "flags": flags, "args": list(args)})
    return call(fd, uapi.KVM_ENABLE_CAP, request)


# ---- system ioctls -------------------------------------------------------------------------------


@pytest.mark.spec("sys.GET_API_VERSION", "sys.GET_VCPU_MMAP_SIZE", "fd.arg_zero")
def test_version_and_mmap_size_take_no_argument(kvm: int) -> None:
    assert call(kvm, uapi.KVM_GET_API_VERSION) == 12
    assert call(kvm, uapi.KVM_GET_VCPU_MMAP_SIZE) == 3 * 4096
    for request in (uapi.KVM_GET_API_VERSION, uapi.KVM_GET_VCPU_MMAP_SIZE):
        assert errno_of(call, kvm, request, 1) == EINVAL
        assert errno_of(call, kvm, request, 1 << 63) == EINVAL


@pytest.mark.spec("sys.CREATE_VM", "cap.MEM_ATTR")
def test_machine_types(kvm: int) -> None:
    types = cap(kvm, uapi.KVM_CAP_VM_TYPES)
    for machine in (*range(64), (1 << 64) - 1):
        if machine < 32 and types & 1 << machine:
            os.close(call(kvm, uapi.KVM_CREATE_VM, machine))
        else:
            assert errno_of(call, kvm, uapi.KVM_CREATE_VM, machine) == EINVAL


@pytest.mark.spec("sys.CHECK_EXTENSION", "vm.CHECK_EXTENSION")
def test_check_extension_never_fails(kvm: int, vm: int, vcpu: int) -> None:
    for number in (*range(300), 9999, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 32, (1 << 64) - 1):
        assert cap(kvm, number) >= 0
        assert cap(vm, number) == cap(kvm, number)
        if number > 300:
            assert cap(kvm, number) == 0
    assert errno_of(cap, vcpu, uapi.KVM_CAP_HLT) == EINVAL


@pytest.mark.spec("cap.foreign", "cap.obsolete")
def test_capabilities_of_other_machines_are_0(kvm: int) -> None:
    foreign = (
        "KVM_CAP_PPC_",
        "KVM_CAP_S390_",
        "KVM_CAP_ARM_",
        "KVM_CAP_MIPS_",
        "KVM_CAP_SPAPR_",
        "KVM_CAP_RISCV_",
    )
    names = [name for name in capabilities() if name.startswith(foreign)]
    assert len(names) > 80
    for name in [*names, "KVM_CAP_PV_MMU", "KVM_CAP_IOMMU", "KVM_CAP_ASSIGN_DEV_IRQ", "KVM_CAP_PCI_2_3"]:
        assert cap(kvm, capabilities()[name]) == 0, name


@pytest.mark.spec("cap.NR_VCPUS", "cap.NR_MEMSLOTS", "cap.READONLY_MEM")
def test_capabilities_that_are_numbers(kvm: int) -> None:
    assert cap(kvm, uapi.KVM_CAP_NR_VCPUS) == os.cpu_count()
    assert cap(kvm, uapi.KVM_CAP_MAX_VCPUS) == 1024
    assert cap(kvm, uapi.KVM_CAP_MAX_VCPU_ID) == MAX_VCPU_ID
    assert cap(kvm, uapi.KVM_CAP_NR_MEMSLOTS) == 32764
    assert cap(kvm, uapi.KVM_CAP_READONLY_MEM) == 1
    assert cap(kvm, uapi.KVM_CAP_MULTI_ADDRESS_SPACE) == 2


def test_a_capability_announces_an_ioctl_that_is_there(kvm: int) -> None:
    for row in rows():
        if row.cap is None:
            continue
        announced = cap(kvm, capabilities()[row.cap])
        assert announced > 0, f"{row.name} is offered and {row.cap} is 0"


# ---- vCPUs ---------------------------------------------------------------------------------------


@pytest.mark.spec("vm.CREATE_VCPU")
def test_vcpu_ids(vm: int, track: Track) -> None:
    track(call(vm, uapi.KVM_CREATE_VCPU, 0))
    track(call(vm, uapi.KVM_CREATE_VCPU, MAX_VCPU_ID - 1))
    assert errno_of(call, vm, uapi.KVM_CREATE_VCPU, 0) == EEXIST
    for number in (MAX_VCPU_ID, 0x7FFFFFFF, (1 << 64) - 1):
        assert errno_of(call, vm, uapi.KVM_CREATE_VCPU, number) == EINVAL


@pytest.mark.spec("vm.CREATE_VCPU")
def test_a_closed_vcpu_still_exists(vm: int) -> None:
    os.close(call(vm, uapi.KVM_CREATE_VCPU, 0))
    assert errno_of(call, vm, uapi.KVM_CREATE_VCPU, 0) == EEXIST


@pytest.mark.spec("cap.NR_VCPUS")
def test_the_limit_of_ids_is_lowered_once_and_early(kvm: int, vm: int, track: Track) -> None:
    limit = uapi.KVM_CAP_MAX_VCPU_ID
    assert enable(vm, limit, 0) == 0
    assert errno_of(enable, vm, limit, 1 << 33) == EINVAL
    assert enable(vm, limit, 4) == 0
    assert enable(vm, limit, 4) == 0
    assert errno_of(enable, vm, limit, 8) == EINVAL
    assert cap(vm, limit) == cap(kvm, limit)
    assert errno_of(call, vm, uapi.KVM_CREATE_VCPU, 4) == EINVAL
    track(call(vm, uapi.KVM_CREATE_VCPU, 3))
    other = track(call(kvm, uapi.KVM_CREATE_VM))
    track(call(other, uapi.KVM_CREATE_VCPU, 9))
    assert errno_of(enable, other, limit, 4) == EINVAL


@pytest.mark.spec("vm.SET_BOOT_CPU_ID")
def test_boot_cpu_id(vm: int, track: Track) -> None:
    assert errno_of(call, vm, uapi.KVM_SET_BOOT_CPU_ID, 100000) == EINVAL
    assert call(vm, uapi.KVM_SET_BOOT_CPU_ID, 5) == 0
    assert errno_of(enable, vm, uapi.KVM_CAP_MAX_VCPU_ID, 4) == EINVAL
    assert enable(vm, uapi.KVM_CAP_MAX_VCPU_ID, 6) == 0
    assert errno_of(call, vm, uapi.KVM_SET_BOOT_CPU_ID, 7) == EINVAL
    track(call(vm, uapi.KVM_CREATE_VCPU, 0))
    assert errno_of(call, vm, uapi.KVM_SET_BOOT_CPU_ID, 0) == EBUSY


# ---- addresses that are only stored ----------------------------------------------------------------


@pytest.mark.spec("vm.SET_TSS_ADDR")
def test_tss_addr(vm: int) -> None:
    for good in (0xFFFBD000, 0xFFFBD000, 0xD0000000, 0x1234, 0, 0xFFFFD000):
        assert call(vm, uapi.KVM_SET_TSS_ADDR, good) == 0
    for bad in (0xFFFFD001, 0xFFFFF000, 1 << 32, (1 << 64) - 1):
        assert errno_of(call, vm, uapi.KVM_SET_TSS_ADDR, bad) == EINVAL


@pytest.mark.spec("vm.SET_IDENTITY_MAP_ADDR")
def test_identity_map_addr(vm: int, track: Track) -> None:
    address = bytearray((0xFFFBC000).to_bytes(8, "little"))
    assert call(vm, uapi.KVM_SET_IDENTITY_MAP_ADDR, address) == 0
    assert call(vm, uapi.KVM_SET_IDENTITY_MAP_ADDR, bytearray(8)) == 0
    assert errno_of(call, vm, uapi.KVM_SET_IDENTITY_MAP_ADDR, 1) == EFAULT
    track(call(vm, uapi.KVM_CREATE_VCPU, 0))
    assert errno_of(call, vm, uapi.KVM_SET_IDENTITY_MAP_ADDR, address) == EINVAL
    assert errno_of(call, vm, uapi.KVM_SET_IDENTITY_MAP_ADDR, 1) == EINVAL


# ---- KVM_ENABLE_CAP --------------------------------------------------------------------------------


@pytest.mark.spec("vm.ENABLE_CAP", "vcpu.ENABLE_CAP")
def test_enable_cap_refuses_what_cannot_be_enabled(vm: int, vcpu: int) -> None:
    for fd in (vm, vcpu):
        for number in (9999, uapi.KVM_CAP_HLT, uapi.KVM_CAP_PPC_OSI, uapi.KVM_CAP_S390_PSW, 0xFFFFFFFF):
            assert errno_of(enable, fd, number) == EINVAL
    assert errno_of(enable, vcpu, uapi.KVM_CAP_HALT_POLL, 1) == EINVAL


@pytest.mark.spec("vm.ENABLE_CAP", "cap.HALT_POLL")
def test_enable_cap_takes_no_flags(vm: int) -> None:
    assert enable(vm, uapi.KVM_CAP_HALT_POLL, 100000) == 0
    assert errno_of(lambda: enable(vm, uapi.KVM_CAP_HALT_POLL, 0, flags=1)) == EINVAL
    assert errno_of(enable, vm, uapi.KVM_CAP_HALT_POLL, 1 << 33) == EINVAL


# ---- the ways in -----------------------------------------------------------------------------------

ENABLE = uapi.KVM_ENABLE_CAP


class EnableCap(ctypes.Structure):
    _fields_ = [
        ("cap", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("args", ctypes.c_uint64 * 4),
        ("pad", ctypes.c_uint8 * 64),
    ]


def test_every_kind_of_argument(vm: int) -> None:
    image = ffi.new("struct kvm_enable_cap *", {"cap": uapi.KVM_CAP_HALT_POLL, "args": [7]})
    data = bytes(ffi.buffer(image))
    assert pykvm.ioctl(vm, ENABLE, data) == data
    assert pykvm.ioctl(vm, ENABLE, bytearray(data)) == 0
    assert pykvm.ioctl(vm, ENABLE, bytearray(data), False) == data
    assert pykvm.ioctl(vm, ENABLE, memoryview(data)) == data
    assert pykvm.ioctl(vm, ENABLE, memoryview(bytearray(data))) == 0
    assert pykvm.ioctl(vm, ENABLE, array.array("B", data)) == 0
    assert pykvm.ioctl(vm, ENABLE, array.array("Q", data)) == 0
    assert pykvm.ioctl(vm, ENABLE, EnableCap.from_buffer_copy(data)) == 0
    assert pykvm.ioctl(vm, uapi.KVM_SET_IDENTITY_MAP_ADDR, "\0" * 8) == bytes(8)
    assert pykvm.ioctl(vm, ENABLE, image) == 0
    assert pykvm.ioctl(vm, ENABLE, image[0]) == 0
    assert pykvm.ioctl(vm, ENABLE, ffi.cast("void *", image)) == 0
    assert pykvm.ioctl(vm, ENABLE, ffi.cast("uintptr_t", image)) == 0
    assert pykvm.ioctl(vm, ENABLE, int(ffi.cast("uintptr_t", image))) == 0
    assert pykvm.ioctl(vm, ENABLE, ffi.from_buffer(data)) == 0
    with pytest.raises(TypeError):
        pykvm.ioctl(vm, ENABLE, 1.5)
    with pytest.raises(TypeError):
        pykvm.ioctl(vm, ENABLE, None)


def test_behind_a_buffer_there_is_nothing(vm: int) -> None:
    data = bytes(ffi.buffer(ffi.new("struct kvm_enable_cap *", {"cap": uapi.KVM_CAP_HALT_POLL})))
    for length in (0, 1, len(data) - 1):
        assert errno_of(pykvm.ioctl, vm, ENABLE, bytearray(data[:length])) == EFAULT
        assert errno_of(pykvm.ioctl, vm, ENABLE, data[:length]) == EFAULT
    assert pykvm.ioctl(vm, ENABLE, bytearray(data + b"more")) == 0


def test_a_result_lands_in_the_buffer(vcpu: int) -> None:
    size = ffi.sizeof("struct kvm_regs")
    image = bytearray(size + 8)
    image[size:] = b"untouched"[:8]
    assert pykvm.ioctl(vcpu, uapi.KVM_GET_REGS, image) == 0
    assert any(image[:size])
    assert image[size:] == b"untouche"
    given = bytes(size)
    got = pykvm.ioctl(vcpu, uapi.KVM_GET_REGS, given)
    assert got == bytes(image[:size])
    assert given == bytes(size)
    kept = bytearray(size)
    assert pykvm.ioctl(vcpu, uapi.KVM_GET_REGS, kept, False) == bytes(image[:size])
    assert kept == bytes(size)


@pytest.mark.spec("fd.nr_reuse")
def test_the_low_32_bits_of_a_request_count(vm: int, kvm: int) -> None:
    data = bytearray(ffi.buffer(ffi.new("struct kvm_enable_cap *", {"cap": uapi.KVM_CAP_HALT_POLL})))
    signed = ENABLE | ~0xFFFFFFFF
    assert signed < 0
    for request in (signed, signed & (1 << 64) - 1, ENABLE):
        assert pykvm.ioctl(vm, request, data) == 0
    assert call(kvm, uapi.KVM_GET_API_VERSION - (1 << 32)) == 12


def test_cdata_that_is_too_small_is_efault_and_not_overrun(kvm: int, track: Track) -> None:
    vm = track(call(kvm, uapi.KVM_CREATE_VM))
    vcpu = track(call(vm, uapi.KVM_CREATE_VCPU))
    for small in (ffi.new("struct kvm_regs *"), ffi.new("struct kvm_regs *")[0], ffi.new("char[311]")):
        assert errno_of(call, vcpu, uapi.KVM_GET_SREGS, small) == EFAULT
        assert errno_of(call, vcpu, uapi.KVM_GET_SREGS ^ 0x40, small) == EINVAL  # no such request
    assert call(vcpu, uapi.KVM_GET_SREGS, ffi.new("char[312]")) == 0
    sregs = ffi.new("struct kvm_sregs *")
    assert call(vcpu, uapi.KVM_GET_SREGS, ffi.cast("void *", sregs)) == 0
    assert sregs.cr0


def test_an_argument_may_be_an_object_that_is_a_number(kvm: int) -> None:
    class Number:
        def __index__(self) -> int:
            return uapi.KVM_CAP_HLT

    assert call(kvm, uapi.KVM_CHECK_EXTENSION, Number()) == 1
    with pytest.raises(TypeError):
        call(kvm, uapi.KVM_CHECK_EXTENSION, 1.0)


def test_an_object_with_fileno(kvm: int) -> None:
    with os.fdopen(kvm, "rb", closefd=False, buffering=0) as file:
        assert pykvm.ioctl(file, uapi.KVM_GET_API_VERSION) == 12


def test_open_takes_the_device_only(tmp_path: Path) -> None:
    for path in ("/dev/null", "/dev/kvm2", "kvm", tmp_path / "kvm"):
        assert errno_of(pykvm.open, path) == ENOENT
    link = tmp_path / "my-kvm"
    link.symlink_to("/dev/kvm")
    for name in (link, b"/dev/kvm", "/dev//./kvm", "/dev/../dev/kvm"):
        os.close(pykvm.open(name))
    with pytest.raises(ValueError, match="no extension"):
        pykvm.open("/dev/kvm", extensions={"x86-everything"})


def test_errors_say_why(kvm: int) -> None:
    with pytest.raises(pykvm.KvmError, match=r"EINVAL: no machine type 0x7") as caught:
        pykvm.ioctl(kvm, uapi.KVM_CREATE_VM, 7)
    assert caught.value.errno == EINVAL
    assert "0x7" in caught.value.why


# ---- unchanged programs ----------------------------------------------------------------------------


def test_installed_serves_unchanged_code() -> None:
    with pykvm.installed():
        kvm = os.open("/dev/kvm", os.O_RDWR)
        assert fcntl.ioctl(kvm, uapi.KVM_GET_API_VERSION) == 12
        vm = fcntl.ioctl(kvm, uapi.KVM_CREATE_VM, 0)
        data = bytearray(ffi.buffer(ffi.new("struct kvm_enable_cap *", {"cap": uapi.KVM_CAP_HALT_POLL})))
        assert fcntl.ioctl(vm, uapi.KVM_ENABLE_CAP, data) == 0
        with open("/dev/kvm", "r+b", buffering=0) as file:
            assert fcntl.ioctl(file, uapi.KVM_GET_API_VERSION) == 12
        with io.open("/dev/kvm", "rb") as file:  # noqa: UP020  this one too
            assert fcntl.ioctl(file, uapi.KVM_GET_API_VERSION, 0) == 12
        with Path(os.devnull).open("rb") as other:
            assert errno_of(fcntl.ioctl, other, uapi.KVM_GET_API_VERSION) == ENOTTY
    assert fcntl.ioctl.__module__ == "fcntl"
    assert call(vm, uapi.KVM_CHECK_EXTENSION, uapi.KVM_CAP_HLT) == 1
    os.close(vm)
    os.close(kvm)


@pytest.mark.skipif(not Path("/dev/kvm").exists(), reason="without a real /dev/kvm links lead nowhere")
def test_installed_never_gives_the_real_device(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("/dev/kvm")
    directory = os.open("/dev", os.O_RDONLY)
    with pykvm.installed():
        for fd in (os.open(link, os.O_RDWR), os.open("kvm", os.O_RDWR, dir_fd=directory)):
            assert is_ours(fd)
            os.close(fd)
    os.close(directory)


def test_installed_nests_and_leaves_on_errors() -> None:
    before = (os.open, open, io.open, fcntl.ioctl)
    with pykvm.installed():
        with pykvm.installed():
            os.close(os.open("/dev/kvm", os.O_RDWR))
        os.close(os.open("/dev/kvm", os.O_RDWR))
    assert (os.open, open, io.open, fcntl.ioctl) == before
    with pytest.raises(ZeroDivisionError), pykvm.installed():
        raise ZeroDivisionError
    assert (os.open, open, io.open, fcntl.ioctl) == before
    with pytest.raises(ValueError, match="no extension"), pykvm.installed(extensions=["nonsense"]):
        pass
    assert (os.open, open, io.open, fcntl.ioctl) == before


def test_installed_concerns_all_threads() -> None:
    seen: list[int] = []

    def work() -> None:
        kvm = os.open("/dev/kvm", os.O_RDWR)
        seen.append(fcntl.ioctl(kvm, uapi.KVM_GET_API_VERSION))
        os.close(kvm)

    with pykvm.installed():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seen == [12]


# ---- pykvm's own extension ---------------------------------------------------------------------------


@pytest.mark.spec("osi.cap_default")
def test_osi_is_offered_only_when_asked_for(kvm: int, track: Track) -> None:
    assert cap(kvm, uapi.KVM_CAP_PPC_OSI) == 0
    asked = track(pykvm.open("/dev/kvm", extensions={"x86-osi"}))
    assert cap(asked, uapi.KVM_CAP_PPC_OSI) == 1
    assert cap(track(call(asked, uapi.KVM_CREATE_VM)), uapi.KVM_CAP_PPC_OSI) == 1
