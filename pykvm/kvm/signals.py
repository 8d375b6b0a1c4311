"""Signals and KVM_RUN: which of them end it, and when their handlers run.

While a vCPU runs its thread blocks all signals that somebody sends; the processor looks for pending
ones from time to time, KVM_RUN returns EINTR, and the handler runs when the thread's mask is put
back, before the client sees the answer.  That is the order a kernel gives, with no handler of ours.
"""

from __future__ import annotations

from errno import EINVAL
from typing import TYPE_CHECKING

from pykvm.abi import ffi, lib
from pykvm.abi.errors import KvmError
from pykvm.abi.ioctl import User, vcpu_ioctl

if TYPE_CHECKING:
    from pykvm.abi.uaccess import UserMemory
    from pykvm.kvm.vcpu import Vcpu

SIGSET_BYTES = 8
# SIGKILL and SIGSTOP cannot be blocked.
_UNBLOCKABLE = 1 << 8 | 1 << 18
_SIGSET_OFFSET = ffi.offsetof("struct kvm_signal_mask", "sigset")
_HEAD = ffi.sizeof("struct kvm_signal_mask")


def signal_pending(vcpu: Vcpu) -> bool:
    """Say if a signal waits that ends KVM_RUN; one that the process ignores is thrown away here.

    The kernel drops an ignored signal when it is sent, except to a thread that blocks it, as ours
    does: SIGCHLD and SIGWINCH must not make KVM_RUN return.
    """
    waiting = lib.signals_pending() & ~vcpu.signal_mask
    if not waiting:
        return False
    ignored = lib.signals_ignored(waiting)
    if ignored:
        # Unblocked for a moment, they are gone.
        before = lib.signals_block()
        lib.signals_restore(before & ~ignored)
        lib.signals_restore(before)
    return bool(waiting & ~ignored)


@vcpu_ioctl("KVM_SET_SIGNAL_MASK", User("struct kvm_signal_mask"))
def set_signal_mask(vcpu: Vcpu, user: UserMemory, addr: int) -> int:
    """Say which signals are blocked during KVM_RUN instead of those the thread blocks; NULL: those.

    Errors:
        EINVAL  len is not 8, the size of the kernel's sigset_t
    Source: api.rst 4.17; kvm_main.c kvm_vcpu_ioctl, kvm_vcpu_ioctl_set_sigmask
    """
    if not addr:
        vcpu.sigset = None
        return 0
    length = int.from_bytes(user.read(addr, _HEAD)[:4], "little")
    if length != SIGSET_BYTES:
        raise KvmError(EINVAL, f"len is {length}, a sigset_t has {SIGSET_BYTES} bytes")
    sigset = int.from_bytes(user.read(addr + _SIGSET_OFFSET, SIGSET_BYTES), "little")
    vcpu.sigset = sigset & ~_UNBLOCKABLE
    return 0
