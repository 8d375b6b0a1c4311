"""Descriptors are real ones: what the kernel does with them, and how long what is behind them lives."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import mmap
import os
import select
import socket
import threading
from errno import EBADF, EEXIST, EIO, EMFILE, ENOTTY
from pathlib import Path
from resource import RLIMIT_NOFILE, getrlimit, setrlimit
from typing import TYPE_CHECKING

import pytest

import pykvm
from pykvm import uapi
from pykvm.abi import ffi
from pykvm.fd import table
from pykvm.kvm.vm import live_vms
from tests.abi.conftest import errno_of

if TYPE_CHECKING:
    from collections.abc import Callable

RUN_SIZE = 3 * mmap.PAGESIZE


def call(fd: int, request: int, arg: object = 0) -> int:
    result = pykvm.ioctl(fd, request, arg)
    assert isinstance(result, int)
    return result


def vms() -> int:
    table.reap()
    return len(live_vms())


@pytest.mark.spec("fd.types")
def test_new_descriptors_are_close_on_exec_and_named(vm: int, vcpu: int) -> None:
    for fd, name in ((vm, "kvm-vm"), (vcpu, "kvm-vcpu:0")):
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        assert name in str(Path(f"/proc/self/fd/{fd}").readlink())
    plain = pykvm.open("/dev/kvm", os.O_RDWR)
    assert not fcntl.fcntl(plain, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    os.close(plain)


def test_the_lowest_free_number_is_used(vcpu: int) -> None:
    os.close(vcpu)
    ends = os.pipe()
    assert ends[0] == vcpu
    assert errno_of(call, ends[0], uapi.KVM_GET_REGS) == ENOTTY
    for end in ends:
        os.close(end)


@pytest.mark.spec("run.mmap_layout")
def test_mmap_of_the_standard_library_shows_kvm_run(vcpu: int) -> None:
    with mmap.mmap(vcpu, RUN_SIZE) as one, mmap.mmap(vcpu, RUN_SIZE) as two:
        immediate_exit = ffi.offsetof("struct kvm_run", "immediate_exit")
        one[immediate_exit] = 1
        assert two[immediate_exit] == 1
        assert len(one) == RUN_SIZE


def test_a_client_cannot_resize_kvm_run(vcpu: int) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(vcpu, 0)


def test_poll_says_ready(kvm: int, vm: int, vcpu: int) -> None:
    poll = select.poll()
    for fd in (kvm, vm, vcpu):
        poll.register(fd, select.POLLIN | select.POLLOUT)
    assert dict(poll.poll(0)) == dict.fromkeys((kvm, vm, vcpu), select.POLLIN | select.POLLOUT)


@pytest.mark.spec("fd.lifetime")
def test_a_duplicate_is_the_same_vm(vm: int, track: Callable[[int], int]) -> None:
    again = track(os.dup(vm))
    track(call(again, uapi.KVM_CREATE_VCPU, 0))
    assert errno_of(call, vm, uapi.KVM_CREATE_VCPU, 0) == EEXIST
    os.close(vm)
    assert errno_of(call, vm, uapi.KVM_CREATE_VCPU, 1) == EBADF
    track(call(again, uapi.KVM_CREATE_VCPU, 1))


@pytest.mark.spec("fd.lifetime")
@pytest.mark.parametrize("order", ["vm first", "vcpu first", "mapping last", "mapping first"])
def test_a_vm_lives_until_its_last_descriptor_and_mapping(kvm: int, order: str) -> None:
    before = vms()
    vm = call(kvm, uapi.KVM_CREATE_VM)
    vcpu = call(vm, uapi.KVM_CREATE_VCPU, 0)
    mapping = mmap.mmap(vcpu, RUN_SIZE)
    # mmap.mmap keeps a duplicate of the descriptor, which counts as well.
    steps = {"vm": lambda: os.close(vm), "vcpu": lambda: os.close(vcpu), "mapping": mapping.close}
    named = order.split(maxsplit=1)[0]
    others = [name for name in steps if name != named]
    names = [*others, named] if order.endswith("last") else [named, *others]
    for name in names:
        assert vms() == before + 1
        steps[name]()
    assert vms() == before


@pytest.mark.spec("fd.lifetime")
def test_a_mapping_alone_keeps_the_vm(kvm: int) -> None:
    before = vms()
    vm = call(kvm, uapi.KVM_CREATE_VM)
    vcpu = call(vm, uapi.KVM_CREATE_VCPU, 0)
    # mmap.mmap would keep a descriptor of its own.
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    flags = mmap.PROT_READ | mmap.PROT_WRITE
    address = libc.mmap(None, ctypes.c_size_t(RUN_SIZE), flags, mmap.MAP_SHARED, vcpu, ctypes.c_long(0))
    os.close(vm)
    os.close(vcpu)
    assert vms() == before + 1
    assert ctypes.string_at(address, 1) == b"\0"
    libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(RUN_SIZE))
    assert vms() == before


def test_memory_of_a_vm_is_given_back(kvm: int) -> None:
    def pages() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    def one() -> None:
        vm = call(kvm, uapi.KVM_CREATE_VM)
        vcpu = call(vm, uapi.KVM_CREATE_VCPU, 0)
        os.close(vcpu)
        os.close(vm)
        table.reap()

    for _ in range(5):
        one()
    gc.collect()
    before = pages()
    for _ in range(30):
        one()
    gc.collect()
    assert pages() - before < 512


@pytest.mark.spec("fd.lifetime")
def test_a_descriptor_in_a_message_is_still_the_vm(kvm: int) -> None:
    vm = call(kvm, uapi.KVM_CREATE_VM)
    left, right = socket.socketpair()
    with left, right:
        socket.send_fds(left, [b"x"], [vm])
        os.close(vm)
        table.reap()
        _, fds, _, _ = socket.recv_fds(right, 1, 1)
    os.close(call(fds[0], uapi.KVM_CREATE_VCPU, 0))
    os.close(fds[0])


@pytest.mark.spec("fd.lifetime")
def test_opening_it_again_by_its_name_in_proc(kvm: int, vm: int) -> None:
    for fd in (kvm, vm):
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        os.close(again)
        table.reap()
    os.close(call(vm, uapi.KVM_CREATE_VCPU, 0))
    other = os.open(f"/proc/self/fd/{kvm}", os.O_RDWR)
    os.close(kvm)
    table.reap()
    os.close(call(other, uapi.KVM_CREATE_VM))
    os.close(other)
    assert errno_of(call, other, uapi.KVM_GET_API_VERSION) == EBADF


def test_another_thread_may_use_and_close_it(kvm: int) -> None:
    vm = call(kvm, uapi.KVM_CREATE_VM)
    seen: list[int] = []

    def work() -> None:
        seen.append(call(vm, uapi.KVM_CREATE_VCPU, 3))
        os.close(vm)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    os.close(seen[0])
    assert errno_of(call, vm, uapi.KVM_CREATE_VCPU, 4) == EBADF


def test_many_vms_in_many_threads(kvm: int) -> None:
    before = vms()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for number in range(10):
                vm = call(kvm, uapi.KVM_CREATE_VM)
                vcpu = call(vm, uapi.KVM_CREATE_VCPU, number)
                os.close(vm)
                os.close(vcpu)
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert vms() == before


@pytest.mark.spec("fd.mm_owner")
def test_after_fork_vm_and_vcpu_are_eio_and_the_device_works(kvm: int, vm: int, vcpu: int) -> None:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            assert errno_of(call, vm, uapi.KVM_CREATE_VCPU, 1) == EIO
            assert errno_of(call, vm, 0x1234) == EIO
            assert errno_of(call, vcpu, uapi.KVM_GET_REGS) == EIO
            assert call(kvm, uapi.KVM_CHECK_EXTENSION, uapi.KVM_CAP_USER_MEMORY) == 1
            mine = call(kvm, uapi.KVM_CREATE_VM)
            os.close(call(mine, uapi.KVM_CREATE_VCPU, 0))
            os.close(mine)
            assert table.reap() == 2
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(call(vm, uapi.KVM_CREATE_VCPU, 1))


def test_a_forked_child_does_not_take_the_parents_news(kvm: int) -> None:
    before = vms()
    vm = call(kvm, uapi.KVM_CREATE_VM)
    pid = os.fork()
    if pid == 0:
        os.close(vm)
        table.reap()
        os._exit(0)
    os.waitpid(pid, 0)
    assert vms() == before + 1
    os.close(vm)
    assert vms() == before


def test_no_descriptor_left_is_emfile(kvm: int) -> None:
    before = vms()
    soft, hard = getrlimit(RLIMIT_NOFILE)
    free = os.dup(kvm)
    os.close(free)
    setrlimit(RLIMIT_NOFILE, (free, hard))
    try:
        assert errno_of(call, kvm, uapi.KVM_CREATE_VM) == EMFILE
    finally:
        setrlimit(RLIMIT_NOFILE, (soft, hard))
    assert vms() == before
    vm = call(kvm, uapi.KVM_CREATE_VM)
    free = os.dup(kvm)
    os.close(free)
    setrlimit(RLIMIT_NOFILE, (free, hard))
    try:
        assert errno_of(call, vm, uapi.KVM_CREATE_VCPU, 0) == EMFILE
    finally:
        setrlimit(RLIMIT_NOFILE, (soft, hard))
    # The failed attempt left no vCPU behind.
    os.close(call(vm, uapi.KVM_CREATE_VCPU, 0))
    os.close(vm)


def test_a_client_that_closes_every_descriptor_does_no_harm() -> None:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(pykvm.open("/dev/kvm"))
            os.closerange(3, 4096)
            ends = os.pipe()
            numbers = {os.dup(ends[0]) for _ in range(1020)}
            os.write(ends[1], b"mine")
            kvm = pykvm.open("/dev/kvm")
            os.close(call(kvm, uapi.KVM_CREATE_VM))
            assert table.reap() == 1
            assert os.read(max(numbers), 4) == b"mine"
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_signal_handler_may_open_and_close_while_we_do() -> None:
    class Nothing:
        def release(self) -> None:
            pass

    def handler(_: object = None) -> None:
        os.close(pykvm.open())
        assert errno_of(call, -1, uapi.KVM_GET_API_VERSION) == EBADF

    def interrupted() -> None:
        # Where a signal may come in: in the middle, with the lock held.
        os.close(table.anon_inode_getfd("test", "system", Nothing(), install=handler))

    thread = threading.Thread(target=interrupted, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.spec("fd.unknown_ioctl")
def test_descriptors_that_are_not_ours() -> None:
    ends = os.pipe()
    assert errno_of(call, ends[0], uapi.KVM_CREATE_VM) == ENOTTY
    os.close(ends[0])
    assert errno_of(call, ends[0], uapi.KVM_CREATE_VM) == EBADF
    os.close(ends[1])
    memory = os.memfd_create("kvm-vm")
    assert errno_of(call, memory, uapi.KVM_CREATE_VCPU) == ENOTTY
    os.close(memory)
    for fd in (-1, 1 << 31, 1 << 40, -(1 << 70)):
        assert errno_of(call, fd, uapi.KVM_CREATE_VM) == EBADF
