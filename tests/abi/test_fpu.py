"""Floating-point and vector state: FPU, XSAVE images, XCR0."""

from __future__ import annotations

import struct
from errno import EINVAL
from typing import TYPE_CHECKING

import pytest

from pykvm import uapi
from pykvm.abi import ffi, new, to_bytes
from tests.machine import Machine, cpuid_list

if TYPE_CHECKING:
    from pykvm.abi import CData

XSTATE_BV, XCOMP_BV = 512, 520


def xsave(machine: Machine) -> CData:
    return machine.get(uapi.KVM_GET_XSAVE, "kvm_xsave")


def image(state: CData) -> memoryview:
    return memoryview(ffi.buffer(state)).cast("B")


@pytest.mark.spec("vcpu.GET_FPU", "vcpu.reset_state")
def test_fpu_after_reset(machine: Machine) -> None:
    fpu = machine.get(uapi.KVM_GET_FPU, "kvm_fpu")
    assert (fpu.fcw, fpu.fsw, fpu.ftwx, fpu.last_opcode, fpu.mxcsr) == (0x37F, 0, 0, 0, 0)
    assert not any(to_bytes(fpu.fpr))
    assert not any(to_bytes(fpu.xmm))


@pytest.mark.spec("vcpu.SET_FPU", "vcpu.GET_FPU")
def test_all_but_mxcsr_comes_back(machine: Machine) -> None:
    fpu = new("kvm_fpu")
    ffi.memmove(fpu.fpr, bytes(range(128)), 128)
    ffi.memmove(fpu.xmm, bytes(range(256)), 256)
    fpu.fcw, fpu.fsw, fpu.ftwx, fpu.last_opcode = 0x27F, 0x3800, 0x80, 0x123
    fpu.last_ip, fpu.last_dp, fpu.mxcsr = 0x1122334455, 0x66778899, 0x1F00
    machine.do(uapi.KVM_SET_FPU, fpu)
    fpu.mxcsr = 0
    assert to_bytes(machine.get(uapi.KVM_GET_FPU, "kvm_fpu")) == to_bytes(fpu)
    assert struct.unpack_from("<I", image(xsave(machine)), 24)[0] == 0x1F80


@pytest.mark.spec("vcpu.GET_XSAVE")
def test_a_fresh_image_has_initial_values_and_no_component(machine: Machine) -> None:
    state = image(xsave(machine))
    fcw, fsw = struct.unpack_from("<HH", state)
    mxcsr, mask = struct.unpack_from("<II", state, 24)
    assert (fcw, fsw, mxcsr) == (0x37F, 0, 0x1F80)
    assert mask & 0x1F80 == 0x1F80
    assert struct.unpack_from("<QQ", state, XSTATE_BV) == (0, 0)


@pytest.mark.spec("vcpu.SET_XSAVE", "vcpu.GET_XSAVE", "fpu.state_ioctl")
def test_an_image_comes_back_and_is_the_fpu_state(machine: Machine) -> None:
    state = xsave(machine)
    view = image(state)
    struct.pack_into("<HHBxHQQI", view, 0, 0x27F, 0x3800, 0x80, 0x123, 0x1122334455, 0x66778899, 0x1FA0)
    view[32:160] = bytes(range(128))
    view[160:416] = bytes(range(256))
    struct.pack_into("<Q", view, XSTATE_BV, 3)
    machine.do(uapi.KVM_SET_XSAVE, state)
    assert bytes(image(xsave(machine))) == bytes(view)
    fpu = machine.get(uapi.KVM_GET_FPU, "kvm_fpu")
    assert (fpu.fcw, fpu.ftwx, fpu.last_ip, fpu.mxcsr) == (0x27F, 0x80, 0x1122334455, 0)
    assert to_bytes(fpu.xmm) == bytes(range(256))


@pytest.mark.spec("vcpu.SET_XSAVE")
def test_components_not_given_are_initialised(machine: Machine) -> None:
    state = xsave(machine)
    view = image(state)
    struct.pack_into("<H", view, 0, 0x27F)
    view[160:176] = b"x" * 16
    struct.pack_into("<Q", view, XSTATE_BV, 1)
    machine.do(uapi.KVM_SET_XSAVE, state)
    after = image(xsave(machine))
    assert struct.unpack_from("<H", after)[0] == 0x27F
    assert bytes(after[160:176]) == bytes(16)
    assert struct.unpack_from("<Q", after, XSTATE_BV)[0] == 1


@pytest.mark.spec("vcpu.SET_XSAVE")
@pytest.mark.parametrize(
    ("offset", "size", "value"),
    [(XSTATE_BV, "Q", 1 << 62 | 3), (XCOMP_BV, "Q", 1 << 63), (528, "Q", 1), (24, "I", 0xFFFF0000)],
    ids=["unknown component", "compacted", "reserved header", "reserved MXCSR"],
)
def test_bad_images_change_nothing(machine: Machine, offset: int, size: str, value: int) -> None:
    state = xsave(machine)
    view = image(state)
    struct.pack_into("<H", view, 0, 0x27F)
    struct.pack_into("<Q", view, XSTATE_BV, 3)
    struct.pack_into("<" + size, view, offset, value)
    assert machine.errno(uapi.KVM_SET_XSAVE, state) == EINVAL
    assert struct.unpack_from("<H", image(xsave(machine)))[0] == 0x37F


@pytest.mark.spec("vcpu.GET_XSAVE2", "cap.XSAVE2")
def test_the_second_version_is_as_large_as_its_capability_says(machine: Machine) -> None:
    size = machine.cap(uapi.KVM_CAP_XSAVE2)
    assert size >= 4096
    state = ffi.new("struct kvm_xsave *", {"extra": (size - 4096) // 4})
    machine.do(uapi.KVM_GET_XSAVE2, state)
    assert bytes(image(state))[:4096] == bytes(image(xsave(machine)))


@pytest.mark.spec("vcpu.GET_XCRS", "vcpu.SET_XCRS")
def test_xcr0(machine: Machine) -> None:
    cpuid = cpuid_list(256)
    machine.ioctl(machine.kvm, uapi.KVM_GET_SUPPORTED_CPUID, cpuid)
    machine.do(uapi.KVM_SET_CPUID2, cpuid)
    xcrs = machine.get(uapi.KVM_GET_XCRS, "kvm_xcrs")
    assert (xcrs.nr_xcrs, xcrs.flags, xcrs.xcrs[0].xcr, xcrs.xcrs[0].value) == (1, 0, 0, 1)
    for nr, flags, xcr, value, wanted in (
        (1, 0, 0, 0, EINVAL),  # x87 must be on
        (1, 0, 0, 1 << 63 | 1, EINVAL),
        (1, 0, 0, 5, EINVAL),  # AVX without SSE
        (1, 1, 0, 1, EINVAL),
        (17, 0, 0, 1, EINVAL),
        (0, 0, 0, 7, 0),
        (1, 0, 9, 7, 0),  # not XCR0: not looked at
        (1, 0, 0, 1, 0),
    ):
        xcrs.nr_xcrs, xcrs.flags = nr, flags
        xcrs.xcrs[0].xcr, xcrs.xcrs[0].value = xcr, value
        assert machine.errno(uapi.KVM_SET_XCRS, xcrs) == wanted, (nr, flags, xcr, value)
        assert machine.get(uapi.KVM_GET_XCRS, "kvm_xcrs").xcrs[0].value == 1
