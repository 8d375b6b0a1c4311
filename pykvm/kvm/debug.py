"""Debug registers of the guest."""

from __future__ import annotations

from errno import EINVAL
from typing import TYPE_CHECKING

from pykvm.abi import CData, ffi
from pykvm.abi.errors import KvmError
from pykvm.abi.ioctl import In, Out, vcpu_ioctl

if TYPE_CHECKING:
    from pykvm.kvm.vcpu import Vcpu

_NR_ADDRESSES = 4


@vcpu_ioctl("KVM_GET_DEBUGREGS", Out("struct kvm_debugregs"), cap="KVM_CAP_DEBUGREGS")
def get_debugregs(vcpu: Vcpu) -> CData:
    """Return DR0 to DR3, DR6 and DR7.

    Errors: none
    Source: api.rst 4.33; x86.c kvm_vcpu_ioctl_x86_get_debugregs
    """
    guest = vcpu.cpu.guest
    out = ffi.new("struct kvm_debugregs *")
    for n in range(_NR_ADDRESSES):
        out.db[n] = guest.dr[n]
    out.dr6, out.dr7 = guest.dr6, guest.dr7
    return out


@vcpu_ioctl("KVM_SET_DEBUGREGS", In("struct kvm_debugregs"), cap="KVM_CAP_DEBUGREGS")
def set_debugregs(vcpu: Vcpu, new: CData) -> int:
    """Set DR0 to DR3, DR6 and DR7; addresses may be any.

    Errors:
        EINVAL  flags; DR6 or DR7 with a bit above 31
    Source: api.rst 4.34; x86.c kvm_vcpu_ioctl_x86_set_debugregs
    """
    if new.flags:
        raise KvmError(EINVAL, f"flags {new.flags:#x}, must be 0")
    if new.dr6 >> 32 or new.dr7 >> 32:
        raise KvmError(EINVAL, f"dr6 {new.dr6:#x}, dr7 {new.dr7:#x}: 32 bits each")
    guest = vcpu.cpu.guest
    for n in range(_NR_ADDRESSES):
        guest.dr[n] = new.db[n]
    guest.dr6, guest.dr7 = new.dr6, new.dr7
    vcpu.cpu.state_changed()
    return 0
