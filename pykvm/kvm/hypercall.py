"""Hypercalls: KVM's own, and Open Scripting interface calls of a guest to its client (OSI).

VMCALL and VMMCALL are the same here: a guest may use either, as with a kernel that patches the
other vendor's instruction.
"""

from __future__ import annotations

import struct
import time
from errno import EINVAL
from typing import TYPE_CHECKING

from pykvm import trace
from pykvm.abi import lib, uapi
from pykvm.abi.errors import KvmError
from pykvm.kvm import clock
from pykvm.kvm.caps import Args, vcpu_cap, vm_cap
from pykvm.kvm.exits import RESUME, USERSPACE, Outcome, get_cpl, is_64_bit_mode, on_exit, rip_moved
from pykvm.kvm.msr_pv import guest_pv_has
from pykvm.kvm.quirks import has_quirk

if TYPE_CHECKING:
    from pykvm.kvm.system import System
    from pykvm.kvm.vcpu import Vcpu
    from pykvm.kvm.vm import Vm

_MASK32 = 0xFFFF_FFFF
_MASK64 = 0xFFFF_FFFF_FFFF_FFFF
RAX, RCX, RDX, RBX, RSI = 0, 1, 2, 3, 6
# exits.md §3: what a Mac-on-Linux guest puts into its first two registers.
OSI_MAGIC_RAX = 0x1137_24FA
OSI_MAGIC_RBX = 0x7781_0F9B
_GPRS = 16
_VMMCALL = 1
# lapic.h: logical destination, and shorthands, which KVM_HC_SEND_IPI does not take.
_APIC_DEST_MASK, _APIC_SHORT_MASK = 0x800, 0xC_0000
# struct kvm_clock_pairing: sec, nsec, tsc, flags, padding.
_CLOCK_PAIRING = struct.Struct("<qqQI36x")
# Exits a client can ask for: KVM_CAP_EXIT_HYPERCALL's mask.
_EXIT_HYPERCALLS = 1 << uapi.KVM_HC_MAP_GPA_RANGE


@on_exit(lib.EXIT_VMCALL)
def handle_vmcall(vcpu: Vcpu) -> Outcome:
    """Do a hypercall: number in rax, arguments in rbx, rcx, rdx, rsi, result in rax."""
    gpr = vcpu.cpu.gpr
    magic = gpr[RAX] & _MASK32 == OSI_MAGIC_RAX and gpr[RBX] & _MASK32 == OSI_MAGIC_RBX
    if vcpu.osi_enabled and magic:
        return _osi_exit(vcpu)
    # Of the other vendor than this processor.
    patched = (vcpu.cpu.exit.qualification == _VMMCALL) is not vcpu.vm.processor.is_amd
    if patched and not has_quirk(vcpu.vm, uapi.KVM_X86_QUIRK_FIX_HYPERCALL_INSN):
        vcpu.events.queue_exception(vcpu, uapi.UD_VECTOR)
        return RESUME
    mask = _MASK64 if is_64_bit_mode(vcpu) else _MASK32
    nr, *args = (gpr[register] & mask for register in (RAX, RBX, RCX, RDX, RSI))
    if trace.kvm_hypercall.enabled:
        trace.kvm_hypercall(nr=nr, a0=args[0], a1=args[1], a2=args[2], a3=args[3])
    if get_cpl(vcpu):
        result = -uapi.KVM_EPERM
    elif nr == uapi.KVM_HC_MAP_GPA_RANGE:
        return _map_gpa_range(vcpu, *args[:3], mask=mask)
    else:
        result = _do_hypercall(vcpu, nr, args)
    return _complete(vcpu, result & mask)


def _complete(vcpu: Vcpu, result: int) -> Outcome:
    vcpu.cpu.gpr[RAX] = result
    vcpu.cpu.skip()
    return RESUME


def _do_hypercall(vcpu: Vcpu, nr: int, args: list[int]) -> int:
    """Return the result of a hypercall that this side of the client can do."""
    if nr == uapi.KVM_HC_VAPIC_POLL_IRQ:
        return 0
    # Kicks and yields to a processor that is not there, or that does not wait, do nothing.
    if nr == uapi.KVM_HC_KICK_CPU and guest_pv_has(vcpu, uapi.KVM_FEATURE_PV_UNHALT):
        return 0
    if nr == uapi.KVM_HC_SCHED_YIELD and guest_pv_has(vcpu, uapi.KVM_FEATURE_PV_SCHED_YIELD):
        return 0
    if nr == uapi.KVM_HC_SEND_IPI and guest_pv_has(vcpu, uapi.KVM_FEATURE_PV_SEND_IPI):
        return _send_ipi(*args)
    if nr == uapi.KVM_HC_CLOCK_PAIRING and is_64_bit_mode(vcpu):
        return _clock_pairing(vcpu, *args[:2])
    return -uapi.KVM_ENOSYS


def _send_ipi(low: int, high: int, first: int, icr: int) -> int:
    """Send an interrupt to the processors in a bitmap: there is no local APIC in the kernel to do so.

    Source: lapic.c kvm_pv_send_ipi
    """
    del low, high, first
    return -uapi.KVM_EINVAL if icr & (_APIC_DEST_MASK | _APIC_SHORT_MASK) else -uapi.KVM_EOPNOTSUPP


def _clock_pairing(vcpu: Vcpu, gpa: int, clock_type: int) -> int:
    """Write the time of day, and the guest's TSC at that moment, to where the guest wants them.

    Source: x86.c kvm_pv_clock_pairing
    """
    if clock_type != uapi.KVM_CLOCK_PAIRING_WALLCLOCK:
        return -uapi.KVM_EOPNOTSUPP
    sec, nsec = divmod(time.time_ns(), clock.NSEC_PER_SEC)
    written = vcpu.vm.write_guest(gpa, _CLOCK_PAIRING.pack(sec, nsec, clock.read_tsc(vcpu), 0))
    return 0 if written else -uapi.KVM_EFAULT


def _map_gpa_range(vcpu: Vcpu, gpa: int, npages: int, attributes: int, *, mask: int) -> Outcome:
    """Have the client change how a range of guest memory is mapped (KVM_EXIT_HYPERCALL)."""
    if not vcpu.vm.hypercall_exits >> uapi.KVM_HC_MAP_GPA_RANGE & 1:
        return _complete(vcpu, -uapi.KVM_ENOSYS & mask)
    gfn = gpa >> 12
    if gpa & 0xFFF or not npages or (gfn + npages & _MASK64) <= gfn:
        return _complete(vcpu, -uapi.KVM_EINVAL & mask)
    run = vcpu.kvm_run
    run.exit_reason = uapi.KVM_EXIT_HYPERCALL
    run.hypercall.nr = uapi.KVM_HC_MAP_GPA_RANGE
    # Clients have relied on finding 0 and leaving it there.
    run.hypercall.ret = 0
    run.hypercall.args[0], run.hypercall.args[1], run.hypercall.args[2] = gpa, npages, attributes
    run.hypercall.flags = uapi.KVM_EXIT_HYPERCALL_LONG_MODE if mask == _MASK64 else 0
    vcpu.complete_userspace_io = _complete_map_gpa_range
    return USERSPACE


def _complete_map_gpa_range(vcpu: Vcpu) -> Outcome:
    moved = rip_moved(vcpu)
    result = vcpu.kvm_run.hypercall.ret
    vcpu.cpu.gpr[RAX] = result if is_64_bit_mode(vcpu) else result & _MASK32
    if not moved:
        vcpu.cpu.skip()
    return RESUME


@vm_cap("KVM_CAP_EXIT_HYPERCALL", _EXIT_HYPERCALLS)
def enable_exit_hypercall(vm: Vm, args: Args) -> int:
    """Say which hypercalls become KVM_EXIT_HYPERCALL: bit n of args[0] for number n.

    Errors:
        EINVAL  one that cannot
    Source: api.rst 8.33
    """
    if args[0] & ~_EXIT_HYPERCALLS:
        raise KvmError(EINVAL, f"hypercalls {args[0]:#x}: only {_EXIT_HYPERCALLS:#x} exit")
    vm.hypercall_exits = args[0]
    return 0


# ---- OSI -----------------------------------------------------------------------------------------
# pykvm's extension "x86-osi": the seed's OSI calls, which upstream has on PowerPC only, for x86.


def _osi_available(of: Vm | System) -> int:
    return int("x86-osi" in of.system.extensions)


@vcpu_cap("KVM_CAP_PPC_OSI", _osi_available)
def enable_osi(vcpu: Vcpu, args: Args) -> int:
    """Have the vCPU's OSI calls exit; arguments are not looked at, and there is no way back.

    Errors:
        EINVAL  the client did not ask for the extension x86-osi
    Source: api.rst 6.1 of PowerPC; specification exits.md 3, osi.enable
    """
    del args
    if not _osi_available(vcpu.vm):
        raise KvmError(EINVAL, "KVM_CAP_PPC_OSI needs the extension x86-osi")
    vcpu.osi_enabled = True
    return 0


def _osi_exit(vcpu: Vcpu) -> Outcome:
    """Show the client all registers: gprs[0..15] in encoding order, then rip behind the call, rflags."""
    vcpu.cpu.skip()
    run, guest = vcpu.kvm_run, vcpu.cpu.guest
    run.exit_reason = uapi.KVM_EXIT_OSI
    gprs = run.osi.gprs
    values = (*vcpu.cpu.gpr, guest.rip, guest.rflags)
    for at in range(len(gprs)):
        gprs[at] = values[at] if at < len(values) else 0
    vcpu.complete_userspace_io = _complete_osi
    return USERSPACE


def _complete_osi(vcpu: Vcpu) -> Outcome:
    """Take the sixteen registers back, whatever KVM_SET_REGS has done to them since; rip stays."""
    vcpu.pending_linear_rip = None
    mask = _MASK64 if is_64_bit_mode(vcpu) else _MASK32
    gprs, gpr = vcpu.kvm_run.osi.gprs, vcpu.cpu.gpr
    for register in range(_GPRS):
        gpr[register] = gprs[register] & mask
    return RESUME
