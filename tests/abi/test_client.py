"""The typed layer: the same program on pykvm and, with --real, on the kernel's device."""

from __future__ import annotations

import contextlib
import mmap
import threading
from errno import EEXIST, EINVAL, ENOENT
from typing import TYPE_CHECKING

import pytest

from pykvm.abi import uapi
from pykvm.client import CpuidEntry, Hlt, Intr, Io, Kvm, Mmio, Osi, Shutdown, Vcpu, Vm

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.machine import Backend

CODE = 0x1000


@pytest.fixture
def kvm(backend: Backend) -> Iterator[Kvm]:
    with Kvm("/dev/kvm" if backend.is_file else None) as opened:
        yield opened


@pytest.fixture
def vm(kvm: Kvm) -> Iterator[Vm]:
    with kvm.create_vm() as made:
        yield made


def boot(vm: Vm, code: bytes) -> Vcpu:
    """A vCPU in real mode at CODE, with 64 KiB of memory at 0."""
    memory = vm.add_memory(0, 0x10000)
    memory[CODE : CODE + len(code)] = code
    vcpu = vm.create_vcpu(0)
    with vcpu.sregs as sregs:
        sregs.cs.base = sregs.cs.selector = 0
    with vcpu.regs as regs:
        regs.rip, regs.rsp, regs.rflags = CODE, 0x8000, 2
    return vcpu


@pytest.mark.spec("sys.GET_API_VERSION", "sys.GET_VCPU_MMAP_SIZE")
def test_system(kvm: Kvm) -> None:
    assert kvm.api_version() == 12
    assert kvm.vcpu_mmap_size() == 12288
    assert kvm.check_extension(uapi.KVM_CAP_USER_MEMORY) == 1
    assert uapi.MSR_STAR in kvm.msr_index_list()


@pytest.mark.spec("exit.IO", "exit.HLT", "run.io_data_page")
def test_io_and_hlt(vm: Vm) -> None:
    # mov al, 0x41; out 0x10, al; in al, 0x11; hlt
    with boot(vm, bytes.fromhex("b041e610e411f4")) as vcpu:
        match vcpu.run():
            case Io(out=True, port=0x10, size=1, count=1, data=data):
                assert bytes(data) == b"A"
            case other:
                pytest.fail(f"{other}")
        match vcpu.run():
            case Io(out=False, port=0x11, data=data):
                data[:] = b"\x7f"
            case other:
                pytest.fail(f"{other}")
        assert vcpu.run() == Hlt()
        assert vcpu.regs.rax & 0xFF == 0x7F


@pytest.mark.spec("exit.MMIO")
def test_mmio_read_modify_write(vm: Vm) -> None:
    # mov ax, 0xd000; mov ds, ax; inc word ptr [4]; hlt
    with boot(vm, bytes.fromhex("b800d08ed8ff060400f4")) as vcpu:
        match vcpu.run():
            case Mmio(phys_addr=0xD0004, is_write=False, data=data):
                assert len(data) == 2
                data[:] = b"\xff\x00"
            case other:
                pytest.fail(f"{other}")
        match vcpu.run():
            case Mmio(phys_addr=0xD0004, is_write=True, data=data):
                assert bytes(data) == b"\x00\x01"
            case other:
                pytest.fail(f"{other}")
        assert vcpu.run() == Hlt()


@pytest.mark.spec("run.immediate_exit")
def test_immediate_exit(vm: Vm) -> None:
    with boot(vm, b"\xf4") as vcpu:
        vcpu.immediate_exit = True
        assert vcpu.run() == Intr()
        assert vcpu.regs.rip == CODE
        vcpu.immediate_exit = False
        assert vcpu.run() == Hlt()


@pytest.mark.spec("exit.SHUTDOWN")
def test_triple_fault(vm: Vm) -> None:
    # lidt [0x1010] (limit 0); ud2
    with boot(vm, bytes.fromhex("0f011e10100f0b").ljust(32, b"\0")) as vcpu:
        assert vcpu.run() == Shutdown()


def test_registers_as_attributes(vm: Vm) -> None:
    with boot(vm, b"\xf4") as vcpu:
        vcpu.regs.rbx = 0x1122334455667788
        assert vcpu.regs.rbx == 0x1122334455667788
        vcpu.sregs.cr2 = 0x1234
        assert vcpu.sregs.cr2 == 0x1234
        vcpu.sregs.ds.base = 0x5670
        assert vcpu.sregs.ds.base == 0x5670
        assert vcpu.sregs.interrupt_bitmap == (0, 0, 0, 0)
        with vcpu.sregs.es as es:
            es.base, es.selector = 0x10, 1
        assert (vcpu.sregs.es.base, vcpu.sregs.es.selector) == (0x10, 1)
        with contextlib.suppress(ZeroDivisionError), vcpu.regs as regs:
            regs.rcx = 1
            regs.rdx = 1 // 0
        assert vcpu.regs.rcx == 0, "a body that fails writes nothing"


def test_cpuid_and_msrs(kvm: Kvm, vm: Vm) -> None:
    with boot(vm, b"\xf4") as vcpu:
        own = [CpuidEntry(0, 0, 0, 1, 2, 3, 4), CpuidEntry(1, 0, 0, 5, 6, 7, 8)]
        vcpu.set_cpuid(own)
        # KVM may add what it knows better, but keeps what it is given.
        assert {0, 1} <= {e.function for e in vcpu.get_cpuid()}
        assert vcpu.get_cpuid()[0].ebx == 2
        assert any(e.function == 0x4000_0000 for e in kvm.supported_cpuid())
        assert vcpu.set_msrs({uapi.MSR_STAR: 5, uapi.MSR_CSTAR: 6, 0xDEAD_0000: 1, uapi.MSR_LSTAR: 7}) == 2
        assert vcpu.get_msrs([uapi.MSR_STAR, uapi.MSR_CSTAR, uapi.MSR_LSTAR]) == {
            uapi.MSR_STAR: 5,
            uapi.MSR_CSTAR: 6,
            uapi.MSR_LSTAR: 0,
        }


@pytest.mark.spec("vm.GET_DIRTY_LOG", "vm.dirty_toggle")
def test_memory(vm: Vm) -> None:
    # mov byte ptr [0x2000], 1; hlt
    with boot(vm, bytes.fromhex("c606002001f4")) as vcpu:
        shared = mmap.mmap(-1, 0x2000)
        vm.add_memory(0x20000, shared, slot=5, log_dirty=True)
        with pytest.raises(OSError) as caught:
            vm.add_memory(0x21000, 0x1000)
        assert caught.value.errno == EEXIST
        with pytest.raises(OSError) as caught:
            vm.add_memory(0x40000, bytearray(4096)[1:])
        assert caught.value.errno == EINVAL
        assert 6 not in vm.regions
        vcpu.sregs.ds.base = 0  # ds:2000 is in slot 0, which does not log
        assert vcpu.run() == Hlt()
        assert vm.dirty_log(5) == bytes(8)
        with vcpu.sregs as sregs:
            sregs.ds.base, sregs.ds.selector = 0x1F000, 0x1F00
        vcpu.regs.rip = CODE
        assert vcpu.run() == Hlt()
        assert shared[0x1000] == 1
        assert vm.dirty_log(5)[0] == 2
        vm.remove_memory(5)
        shared.close()


@pytest.mark.spec("exit.OSI", "osi.enable", "osi.exit_layout", "osi.complete")
def test_osi(backend: Backend) -> None:
    if backend.is_file:
        pytest.skip("an extension of pykvm's, asked for in this process")
    code = bytes.fromhex("66b8fa24371166bb9b0f81770f01c1f4")  # mov eax; mov ebx; vmcall; hlt
    with Kvm(extensions={"x86-osi"}) as kvm, kvm.create_vm() as vm, boot(vm, code) as vcpu:
        assert kvm.check_extension(uapi.KVM_CAP_PPC_OSI) == 1
        vcpu.enable_cap(uapi.KVM_CAP_PPC_OSI)
        match vcpu.run():
            case Osi(gprs=gprs):
                assert gprs[0] & 0xFFFF_FFFF == 0x113724FA
                assert gprs[16] == CODE + 15
                gprs[3] = 0xCAFE
            case other:
                pytest.fail(f"{other}")
        assert vcpu.run() == Hlt()
        assert vcpu.regs.rbx == 0xCAFE


@pytest.mark.spec("osi.cap_default")
def test_osi_is_off_by_default(kvm: Kvm, vm: Vm) -> None:
    assert kvm.check_extension(uapi.KVM_CAP_PPC_OSI) == 0
    with vm.create_vcpu(0) as vcpu, pytest.raises(OSError) as caught:
        vcpu.enable_cap(uapi.KVM_CAP_PPC_OSI)
    assert caught.value.errno == EINVAL


def test_vcpus_run_in_parallel_threads(kvm: Kvm) -> None:
    """Two guests that wait for each other: neither could end if they ran one after the other."""
    # wait for [0x3000] == own number, then write the other's; 200 times
    with kvm.create_vm() as vm:
        memory = vm.add_memory(0, 0x10000)
        code = bytes.fromhex(
            "b9c800"  # mov cx, 200
            "38060030"  # 1: cmp [0x3000], al
            "75fa"  # jne 1b
            "88260030"  # mov [0x3000], ah
            "e2f4"  # loop 1b
            "f4"
        )
        memory[CODE : CODE + len(code)] = code
        vcpus = []
        for number in range(2):
            vcpu = vm.create_vcpu(number)
            with vcpu.sregs as sregs:
                sregs.cs.base = sregs.cs.selector = 0
            with vcpu.regs as regs:
                regs.rip, regs.rflags, regs.rax = CODE, 2, number | (1 - number) << 8
            vcpus.append(vcpu)
        ends: list[object] = []
        threads = [threading.Thread(target=lambda v=v: ends.append(v.run())) for v in vcpus]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert ends == [Hlt(), Hlt()]


def test_instructions_are_counted(backend: Backend, vm: Vm) -> None:
    with boot(vm, bytes.fromhex("b90a00e2fef4")) as vcpu:  # mov cx, 10; loop $; hlt
        assert vcpu.run() == Hlt()
        assert vcpu.instructions() == (None if backend.is_file else 12)


def test_closing_twice_is_harmless(kvm: Kvm) -> None:
    vm = kvm.create_vm()
    vm.close()
    vm.close()
    with pytest.raises(OSError):
        vm.ioctl(uapi.KVM_CREATE_VCPU, 0)


def test_a_dirty_log_of_no_slot(vm: Vm) -> None:
    with pytest.raises(OSError) as caught:
        vm.dirty_log(7)
    assert caught.value.errno == ENOENT


@pytest.mark.parametrize(
    "options", [{"cpu": "epyc"}, {"kernel": "5.10"}, {"extensions": ["x86-osi"]}, {"tdp": False}]
)
def test_a_real_device_takes_no_options(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="fake device"):
        Kvm("/dev/null", **options)  # type: ignore[arg-type]


def test_registers_print_as_what_they_are(vm: Vm) -> None:
    with boot(vm, b"\xf4") as vcpu:
        assert "rsp=0x8000" in str(vcpu.regs)
        assert "rip=0x1000 rflags=0x2" in str(vcpu.regs)
        assert "cr0=0x60000010" in str(vcpu.sregs)
        assert str(vcpu.sregs.cs).startswith("base=0x0 limit=0xffff selector=0x0 type=0xb ")
