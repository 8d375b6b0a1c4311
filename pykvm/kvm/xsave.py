"""The floating-point and vector state: KVM_GET/SET_FPU, XSAVE images, XCR0."""

from __future__ import annotations

import struct
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
_LEGACY = struct.Struct("<HHBxHQQII")
_ST, _XMM, _HEADER = 32, 160, 512
_XSAVE_HEADER = struct.Struct("<QQ48s")
_YMM_OFFSET, _PKRU_OFFSET = 576, 2688
_PKRU_COMPONENT = uapi.XFEATURE_MASK_PKRU
_FP, _SSE, _YMM = uapi.XFEATURE_MASK_FP, uapi.XFEATURE_MASK_SSE, uapi.XFEATURE_MASK_YMM
_XMM_BYTES, _YMM_BYTES, _ST_BYTES, _NR_XMM = 16, 32, 8 * 16, 16

# Bytes of KVM_GET_XSAVE2's image: no component reaches beyond the page.
capability("KVM_CAP_XSAVE2", XSAVE_SIZE)


# ---- KVM_GET_FPU, KVM_SET_FPU --------------------------------------------------------------------


@vcpu_ioctl("KVM_GET_FPU", Out("struct kvm_fpu"))
def get_fpu(vcpu: Vcpu) -> CData:
    """Return x87 and XMM registers; MXCSR is not part of it and reads 0.

    Errors: none
    Source: api.rst 4.22; x86.c kvm_arch_vcpu_ioctl_get_fpu
    """
    fpu = vcpu.cpu.guest.fpu
    out = ffi.new("struct kvm_fpu *")
    ffi.memmove(out.fpr, fpu.st, _ST_BYTES)
    out.fcw, out.fsw, out.ftwx, out.last_opcode = fpu.fcw, fpu.fsw, fpu.ftw, fpu.fop
    out.last_ip, out.last_dp = fpu.fip, fpu.fdp
    for n in range(_NR_XMM):
        ffi.memmove(out.xmm[n], fpu.ymm[n], _XMM_BYTES)
    return out


@vcpu_ioctl("KVM_SET_FPU", In("struct kvm_fpu"))
def set_fpu(vcpu: Vcpu, new: CData) -> int:
    """Set x87 and XMM registers; MXCSR is not looked at.

    Errors: none
    Source: api.rst 4.23; x86.c kvm_arch_vcpu_ioctl_set_fpu
    """
    fpu = vcpu.cpu.guest.fpu
    ffi.memmove(fpu.st, new.fpr, _ST_BYTES)
    fpu.fcw, fpu.fsw, fpu.ftw, fpu.fop = new.fcw, new.fsw, new.ftwx, new.last_opcode
    fpu.fip, fpu.fdp = new.last_ip, new.last_dp
    for n in range(_NR_XMM):
        ffi.memmove(fpu.ymm[n], new.xmm[n], _XMM_BYTES)
    fpu.xinuse |= _FP | _SSE
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
    guest = vcpu.cpu.guest
    fpu = guest.fpu
    in_use = fpu.xinuse & (vcpu.cpuid.supported_xcr0 | _FP | _SSE)
    fcw, fsw, ftw, fop, fip, fdp = uapi.FCW_INIT, 0, 0, 0, 0, 0
    if in_use & _FP:
        fcw, fsw, ftw, fop, fip, fdp = fpu.fcw, fpu.fsw, fpu.ftw, fpu.fop, fpu.fip, fpu.fdp
        image[_ST : _ST + _ST_BYTES] = bytes(ffi.buffer(fpu.st))
    mxcsr = fpu.mxcsr if in_use & (_SSE | _YMM) else uapi.MXCSR_INIT
    _LEGACY.pack_into(image, 0, fcw, fsw, ftw, fop, fip, fdp, mxcsr, uapi.MXCSR_MASK)
    _XSAVE_HEADER.pack_into(image, _HEADER, in_use, 0, b"")
    for n in range(_NR_XMM):
        register = bytes(ffi.buffer(fpu.ymm[n]))
        if in_use & _SSE:
            image[_XMM + n * _XMM_BYTES : _XMM + (n + 1) * _XMM_BYTES] = register[:_XMM_BYTES]
        if in_use & _YMM:
            image[_YMM_OFFSET + n * _XMM_BYTES : _YMM_OFFSET + (n + 1) * _XMM_BYTES] = register[_XMM_BYTES:]
    if in_use & _PKRU_COMPONENT:
        struct.pack_into("<I", image, _PKRU_OFFSET, guest.pkru)


@vcpu_ioctl("KVM_SET_XSAVE", In("struct kvm_xsave"), cap="KVM_CAP_XSAVE")
def set_xsave(vcpu: Vcpu, new: CData) -> int:
    """Set the state from an image in the standard format; components not in XSTATE_BV are initialised.

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
    fcw, fsw, ftw, fop, fip, fdp, mxcsr, _ = _LEGACY.unpack_from(image, 0)
    if given & (_FP | _SSE | _YMM) and mxcsr & ~uapi.MXCSR_MASK:
        raise KvmError(EINVAL, f"MXCSR {mxcsr:#x}: reserved bits")
    guest = vcpu.cpu.guest
    fpu = guest.fpu
    if not given & _FP:
        fcw, fsw, ftw, fop, fip, fdp = uapi.FCW_INIT, 0, 0, 0, 0, 0
    fpu.fcw, fpu.fsw, fpu.ftw, fpu.fop, fpu.fip, fpu.fdp = fcw, fsw, ftw, fop, fip, fdp
    ffi.memmove(fpu.st, bytes(image[_ST : _ST + _ST_BYTES]) if given & _FP else bytes(_ST_BYTES), _ST_BYTES)
    fpu.mxcsr = mxcsr if given & (_SSE | _YMM) else uapi.MXCSR_INIT
    for n in range(_NR_XMM):
        low, high = _XMM + n * _XMM_BYTES, _YMM_OFFSET + n * _XMM_BYTES
        xmm = bytes(image[low : low + _XMM_BYTES]) if given & _SSE else bytes(_XMM_BYTES)
        ymm = bytes(image[high : high + _XMM_BYTES]) if given & _YMM else bytes(_XMM_BYTES)
        ffi.memmove(fpu.ymm[n], xmm + ymm, _YMM_BYTES)
    guest.pkru = struct.unpack_from("<I", image, _PKRU_OFFSET)[0] if given & _PKRU_COMPONENT else 0
    fpu.xinuse = given
    return 0


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
