"""The floating-point and vector state: KVM_GET/SET_FPU, XSAVE images, XCR0."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from errno import EINVAL
from typing import TYPE_CHECKING

from pykvm.abi import CData, ffi, lib, uapi
from pykvm.abi.errors import KvmError
from pykvm.abi.ioctl import In, Out, vcpu_ioctl
from pykvm.kvm.caps import capability
from pykvm.kvm.exits import RESUME, Outcome, get_cpl, on_exit

if TYPE_CHECKING:
    from pykvm.kvm.system import System
    from pykvm.kvm.vcpu import Vcpu
    from pykvm.kvm.vm import Vm

XSAVE_SIZE = ffi.sizeof("struct kvm_xsave")
# The legacy area as FXSAVE64 writes it: fcw, fsw, ftw, fop, fip, fdp, mxcsr, mxcsr_mask; at 32 the
# eight ST, at 160 the sixteen XMM, at 512 the header, then the components.
_LEGACY = struct.Struct("<HHHHQQII")
_MXCSR, _ST, _XMM, _HEADER = 24, 32, 160, 512
# What software may keep in the legacy area: Linux says there which components the host has.
_SW_RESERVED = 464
_XSAVE_HEADER = struct.Struct("<QQ48s")
_YMM_OFFSET, _PKRU_OFFSET = 576, 2688
_PKRU_COMPONENT = uapi.XFEATURE_MASK_PKRU
_FP, _SSE, _YMM = uapi.XFEATURE_MASK_FP, uapi.XFEATURE_MASK_SSE, uapi.XFEATURE_MASK_YMM
_XMM_BYTES, _YMM_BYTES, _ST_BYTES, _NR_XMM = 16, 32, 8 * 16, 16
_XMM_END, _YMM_END = _XMM + _NR_XMM * _XMM_BYTES, _YMM_OFFSET + _NR_XMM * _XMM_BYTES
_INITIAL = _LEGACY.pack(uapi.FCW_INIT, 0, 0, 0, 0, 0, uapi.MXCSR_INIT, uapi.MXCSR_MASK)

# Bytes of KVM_GET_XSAVE2's image: no component reaches beyond the page.
capability("KVM_CAP_XSAVE2", XSAVE_SIZE)


@dataclass(slots=True)
class Fpstate:
    """The state between two KVM_RUNs, as the kernel keeps it for its next XRSTOR (struct fpstate).

    `area`: the registers in the standard format of XSAVE, without a header; what is there of components that
    are not in `xfeatures` does not count, and is not overwritten either.
    """

    area: bytearray
    xfeatures: int


def _fpstate(vcpu: Vcpu) -> Fpstate:
    """Return the state to look at and to change; after a KVM_RUN it is what the processor has."""
    if vcpu.fpstate is None:
        fpu = vcpu.cpu.guest.fpu
        area = bytearray(_YMM_END)
        numbers = (fpu.fcw, fpu.fsw, fpu.ftw, fpu.fop, fpu.fip, fpu.fdp, fpu.mxcsr, uapi.MXCSR_MASK)
        _LEGACY.pack_into(area, 0, *numbers)
        area[_ST : _ST + _ST_BYTES] = bytes(ffi.buffer(fpu.st))
        for n in range(_NR_XMM):
            register = bytes(ffi.buffer(fpu.ymm[n]))
            area[_XMM + n * _XMM_BYTES : _XMM + (n + 1) * _XMM_BYTES] = register[:_XMM_BYTES]
            area[_YMM_OFFSET + n * _XMM_BYTES : _YMM_OFFSET + (n + 1) * _XMM_BYTES] = register[_XMM_BYTES:]
        vcpu.fpstate = Fpstate(area, int(fpu.xinuse))
    return vcpu.fpstate


# ---- KVM_GET_FPU, KVM_SET_FPU --------------------------------------------------------------------


@vcpu_ioctl("KVM_GET_FPU", Out("struct kvm_fpu"))
def get_fpu(vcpu: Vcpu) -> CData:
    """Return x87 and XMM registers; MXCSR is not part of it and reads 0.

    Errors: none
    Source: api.rst 4.22; x86.c kvm_arch_vcpu_ioctl_get_fpu
    """
    area = _fpstate(vcpu).area
    out = ffi.new("struct kvm_fpu *")
    ffi.memmove(out.fpr, area[_ST : _ST + _ST_BYTES], _ST_BYTES)
    out.fcw, out.fsw, ftw, out.last_opcode, out.last_ip, out.last_dp, *_ = _LEGACY.unpack_from(area)
    out.ftwx = ftw & 0xFF
    ffi.memmove(out.xmm, area[_XMM:_XMM_END], _NR_XMM * _XMM_BYTES)
    return out


@vcpu_ioctl("KVM_SET_FPU", In("struct kvm_fpu"))
def set_fpu(vcpu: Vcpu, new: CData) -> int:
    """Set x87 and XMM registers; MXCSR is not looked at.

    KVM_GET_XSAVE does not tell of components that were in their initial state, until the next KVM_RUN: the
    kernel leaves XSTATE_BV as it is.

    Errors: none
    Source: api.rst 4.23; x86.c kvm_arch_vcpu_ioctl_set_fpu
    """
    state, fpu = _fpstate(vcpu), vcpu.cpu.guest.fpu
    mxcsr = bytes(state.area[_MXCSR:_ST])
    numbers = (new.fcw, new.fsw, new.ftwx, new.last_opcode, new.last_ip, new.last_dp, 0, 0)
    _LEGACY.pack_into(state.area, 0, *numbers)
    state.area[_MXCSR:_ST] = mxcsr
    state.area[_ST : _ST + _ST_BYTES] = bytes(ffi.buffer(new.fpr))
    state.area[_XMM:_XMM_END] = bytes(ffi.buffer(new.xmm))
    # For the guest they are all there is: the kernel's next XRSTOR would initialise them, which helps nobody.
    kept = fpu.mxcsr
    _load(vcpu, Fpstate(state.area, int(fpu.xinuse) | _FP | _SSE))
    fpu.mxcsr = kept
    return 0


# ---- KVM_GET_XSAVE, KVM_SET_XSAVE ----------------------------------------------------------------


@vcpu_ioctl("KVM_GET_XSAVE", Out("struct kvm_xsave"), cap="KVM_CAP_XSAVE")
def get_xsave(vcpu: Vcpu) -> CData:
    """Return the state as XSAVE writes it in the standard format, 4096 bytes.

    Components in their initial state have their bit in XSTATE_BV clear and the initial values all
    the same, MXCSR included.

    Errors: none
    Source: api.rst 4.42; fpu/xstate.c copy_xstate_to_uabi_buf
    """
    out = ffi.new("struct kvm_xsave *")
    _write_image(vcpu, memoryview(ffi.buffer(out)).cast("B"))
    return out


@vcpu_ioctl("KVM_GET_XSAVE2", Out("struct kvm_xsave"), cap="KVM_CAP_XSAVE2")
def get_xsave2(vcpu: Vcpu) -> CData:
    """Return the state as KVM_GET_XSAVE does, in as many bytes as KVM_CAP_XSAVE2 says.

    Errors: none
    Source: api.rst 4.134
    """
    return get_xsave(vcpu)


def _write_image(vcpu: Vcpu, image: memoryview) -> None:
    state = _fpstate(vcpu)
    area, in_use = state.area, state.xfeatures & (vcpu.cpuid.supported_xcr0 | _FP | _SSE)
    image[:_ST] = _INITIAL
    if in_use & _FP:
        image[:_MXCSR] = area[:_MXCSR]
        image[_ST:_XMM] = area[_ST:_XMM]
    if in_use & (_SSE | _YMM):
        image[_MXCSR:_ST] = area[_MXCSR:_ST]
    if in_use & _SSE:
        image[_XMM:_XMM_END] = area[_XMM:_XMM_END]
    if in_use & _YMM:
        image[_YMM_OFFSET:_YMM_END] = area[_YMM_OFFSET:_YMM_END]
    if in_use & _PKRU_COMPONENT:
        struct.pack_into("<I", image, _PKRU_OFFSET, vcpu.cpu.guest.pkru)
    _XSAVE_HEADER.pack_into(image, _HEADER, in_use, 0, b"")
    if vcpu.vm.kernel.behaviour.xsave_tells_host:
        struct.pack_into("<Q", image, _SW_RESERVED, vcpu.vm.system.offer.xcr0)


@vcpu_ioctl("KVM_SET_XSAVE", In("struct kvm_xsave"), cap="KVM_CAP_XSAVE")
def set_xsave(vcpu: Vcpu, new: CData) -> int:
    """Set the state from an image in the standard format; components not in XSTATE_BV are initialised.

    But PKRU: it stays as it is.

    Errors:
        EINVAL  components that are not supported; the compacted format; reserved bytes of the header;
                reserved bits of MXCSR
    Source: api.rst 4.43; fpu/xstate.c copy_uabi_to_xstate, fpu/core.c fpu_copy_uabi_to_guest_fpstate
    """
    image = memoryview(ffi.buffer(new)).cast("B")
    given, compacted, reserved = _XSAVE_HEADER.unpack_from(image, _HEADER)
    unsupported = given & ~(vcpu.vm.system.offer.xcr0 | _FP | _SSE)
    if unsupported:
        raise KvmError(EINVAL, f"XSTATE_BV {given:#x}: components {unsupported:#x} are not supported")
    if compacted or any(reserved):
        raise KvmError(EINVAL, "compacted format, or reserved bytes in the header")
    (mxcsr,) = struct.unpack_from("<I", image, _MXCSR)
    if given & (_FP | _SSE | _YMM) and mxcsr & ~uapi.MXCSR_MASK:
        raise KvmError(EINVAL, f"MXCSR {mxcsr:#x}: reserved bits")
    state = _fpstate(vcpu)
    state.xfeatures = given
    for components, start, end in (
        (_FP | _SSE | _YMM, _MXCSR, _ST),
        (_FP, 0, _XMM),
        (_SSE, _XMM, _XMM_END),
        (_YMM, _YMM_OFFSET, _YMM_END),
    ):
        if given & components:
            state.area[start:end] = image[start:end]
    if given & _PKRU_COMPONENT:
        (vcpu.cpu.guest.pkru,) = struct.unpack_from("<I", image, _PKRU_OFFSET)
    _load(vcpu, state)
    return 0


def _load(vcpu: Vcpu, state: Fpstate) -> None:
    """Give the processor the state, as XRSTOR would: what is not among the components is initialised."""
    area, components, fpu = state.area, state.xfeatures, vcpu.cpu.guest.fpu
    legacy = area if components & _FP else bytearray(_INITIAL.ljust(_XMM, b"\0"))
    fpu.fcw, fpu.fsw, ftw, fpu.fop, fpu.fip, fpu.fdp, *_ = _LEGACY.unpack_from(legacy)
    fpu.ftw = ftw & 0xFF
    ffi.memmove(fpu.st, bytes(legacy[_ST : _ST + _ST_BYTES]), _ST_BYTES)
    (mxcsr,) = struct.unpack_from("<I", area, _MXCSR)
    fpu.mxcsr = mxcsr if components & (_SSE | _YMM) else uapi.MXCSR_INIT
    for n in range(_NR_XMM):
        low, high = _XMM + n * _XMM_BYTES, _YMM_OFFSET + n * _XMM_BYTES
        xmm = bytes(area[low : low + _XMM_BYTES]) if components & _SSE else bytes(_XMM_BYTES)
        ymm = bytes(area[high : high + _XMM_BYTES]) if components & _YMM else bytes(_XMM_BYTES)
        ffi.memmove(fpu.ymm[n], xmm + ymm, _YMM_BYTES)
    fpu.xinuse = components


# ---- XCR0 ----------------------------------------------------------------------------------------


def set_xcr0(vcpu: Vcpu, xcr: int, value: int) -> bool:
    """Set XCR0; False when there is no such register, or the guest may not have the value."""
    valid = vcpu.cpuid.supported_xcr0 | _FP
    if xcr or not value & _FP or value & ~valid or (value & _YMM and not value & _SSE):
        return False
    vcpu.cpu.guest.xcr0 = value
    vcpu.cpu.state_changed()
    return True


@on_exit(lib.EXIT_XSETBV)
def handle_xsetbv(vcpu: Vcpu) -> Outcome:
    """Set XCR0 for the guest."""
    gpr = vcpu.cpu.gpr
    value = gpr[0] & 0xFFFF_FFFF | (gpr[2] & 0xFFFF_FFFF) << 32
    if get_cpl(vcpu) or not set_xcr0(vcpu, gpr[1] & 0xFFFF_FFFF, value):
        vcpu.events.inject_gp(vcpu)
    else:
        vcpu.cpu.skip()
    return RESUME


def _has_xsave(of: Vm | System) -> bool:
    """Say if the processor has XSAVE, whatever a guest sees of it."""
    return bool(of.system.offer.words["1_ECX"] >> uapi.CPUID_1_ECX_XSAVE & 1)


capability("KVM_CAP_XCRS", lambda of: int(_has_xsave(of)))


@vcpu_ioctl("KVM_GET_XCRS", Out("struct kvm_xcrs"), cap="KVM_CAP_XCRS")
def get_xcrs(vcpu: Vcpu) -> CData:
    """Return the one extended control register there is, XCR0; none on a processor without XSAVE.

    Errors: none
    Source: api.rst 4.44; x86.c kvm_vcpu_ioctl_x86_get_xcrs
    """
    out = ffi.new("struct kvm_xcrs *")
    if _has_xsave(vcpu.vm):
        out.nr_xcrs = 1
        out.xcrs[0].value = vcpu.cpu.guest.xcr0
    return out


@vcpu_ioctl("KVM_SET_XCRS", In("struct kvm_xcrs"), cap="KVM_CAP_XCRS")
def set_xcrs(vcpu: Vcpu, new: CData) -> int:
    """Set XCR0 if it is among the registers given; others are not looked at.

    Errors:
        EINVAL  flags; more than 16 registers; a value that the guest's CPUID does not have; a processor
                without XSAVE
    Source: api.rst 4.45; x86.c kvm_vcpu_ioctl_x86_set_xcrs
    """
    if not _has_xsave(vcpu.vm):
        raise KvmError(EINVAL, "the processor has no XSAVE")
    if new.nr_xcrs > uapi.KVM_MAX_XCRS or new.flags:
        raise KvmError(EINVAL, f"{new.nr_xcrs} registers, flags {new.flags:#x}")
    for at in range(new.nr_xcrs):
        if new.xcrs[at].xcr == 0:
            if not set_xcr0(vcpu, 0, new.xcrs[at].value):
                raise KvmError(EINVAL, f"XCR0 {new.xcrs[at].value:#x}")
            break
    return 0
