"""Debug registers of the guest, and debugging of the guest by the client.

A client's breakpoints and steps are its own: the guest sees neither them nor their traces.  Steps
are the processor's monitor trap and not TF; while the client uses the breakpoint registers, the
guest's values are kept here and its MOV DR works on those.
"""

from __future__ import annotations

from dataclasses import dataclass
from errno import EBUSY, EINVAL
from typing import TYPE_CHECKING

from pykvm.abi import CData, ffi, lib, uapi
from pykvm.abi.errors import KvmError
from pykvm.abi.ioctl import In, Out, vcpu_ioctl
from pykvm.kvm.caps import capability
from pykvm.kvm.exits import RESUME, USERSPACE, Outcome, is_64_bit_mode, linear_rip, on_exit

if TYPE_CHECKING:
    from pykvm.kvm.vcpu import Vcpu

_NR_ADDRESSES = 4
_DR6, _DR7 = 6, 7
# What MOV to DR6 may change: without RTM and bus-lock detection their bits stay 1.
DR6_VOLATILE = uapi.DR6_BD | uapi.DR6_BS | uapi.DR6_BT | 0xF
_STEP, _SW_BP, _HW_BP = (
    uapi.KVM_GUESTDBG_SINGLESTEP,
    uapi.KVM_GUESTDBG_USE_SW_BP,
    uapi.KVM_GUESTDBG_USE_HW_BP,
)
_INJECT = uapi.KVM_GUESTDBG_INJECT_DB | uapi.KVM_GUESTDBG_INJECT_BP

capability(
    "KVM_CAP_SET_GUEST_DEBUG2",
    uapi.KVM_GUESTDBG_ENABLE | _STEP | _SW_BP | _HW_BP | _INJECT | uapi.KVM_GUESTDBG_BLOCKIRQ,
)
capability("KVM_CAP_X86_ROBUST_SINGLESTEP", 1)


@dataclass(slots=True)
class GuestDebug:
    """How the client debugs a vCPU: `control` is KVM_GUESTDBG_*, 0 when it does not.

    `guest_db`, `guest_dr7`: the guest's own, while the processor has the client's; else None.
    """

    control: int = 0
    guest_db: list[int] | None = None
    guest_dr7: int = 0

    def end_general_detect(self, guest: CData) -> None:
        """Clear GD in the guest's DR7, and not in the debugger's, as the delivery of #DB does."""
        if self.guest_db is not None:
            self.guest_dr7 &= ~uapi.DR7_GD
        else:
            guest.dr7 &= ~uapi.DR7_GD


# ---- the guest's registers -----------------------------------------------------------------------


def _get_db(vcpu: Vcpu) -> list[int]:
    own = vcpu.debug.guest_db
    return own if own is not None else [vcpu.cpu.guest.dr[n] for n in range(_NR_ADDRESSES)]


def get_dr7(vcpu: Vcpu) -> int:
    """Return the guest's DR7, and not the debugger's."""
    if vcpu.debug.guest_db is not None:
        return vcpu.debug.guest_dr7
    return int(vcpu.cpu.guest.dr7)


def _set(vcpu: Vcpu, db: list[int], dr7: int) -> None:
    """Set the guest's breakpoints, where they are now."""
    if vcpu.debug.guest_db is not None:
        vcpu.debug.guest_db, vcpu.debug.guest_dr7 = db, dr7
    else:
        _load(vcpu, db, dr7)


def set_dr7(vcpu: Vcpu, dr7: int) -> None:
    """Set the guest's DR7."""
    _set(vcpu, _get_db(vcpu), dr7)


def _load(vcpu: Vcpu, db: list[int], dr7: int) -> None:
    guest = vcpu.cpu.guest
    for n in range(_NR_ADDRESSES):
        guest.dr[n] = db[n]
    guest.dr7 = dr7
    vcpu.cpu.state_changed()


def take_breakpoints(vcpu: Vcpu) -> tuple[list[int], int] | None:
    """Return the client's breakpoints while the processor has them, else None: what INIT must not clear."""
    if vcpu.debug.guest_db is None:
        return None
    guest = vcpu.cpu.guest
    return [guest.dr[n] for n in range(_NR_ADDRESSES)], int(guest.dr7)


def put_breakpoints(vcpu: Vcpu, breakpoints: tuple[list[int], int] | None) -> None:
    """Give them back after INIT, which has cleared the guest's own."""
    if breakpoints is not None:
        vcpu.debug.guest_db, vcpu.debug.guest_dr7 = [0] * _NR_ADDRESSES, uapi.DR7_FIXED_1
        _load(vcpu, *breakpoints)


@vcpu_ioctl("KVM_GET_DEBUGREGS", Out("struct kvm_debugregs"), cap="KVM_CAP_DEBUGREGS")
def get_debugregs(vcpu: Vcpu) -> CData:
    """Return the guest's DR0 to DR3, DR6 and DR7, and not the debugger's.

    Errors: none
    Source: api.rst 4.33; x86.c kvm_vcpu_ioctl_x86_get_debugregs
    """
    out = ffi.new("struct kvm_debugregs *")
    for n, address in enumerate(_get_db(vcpu)):
        out.db[n] = address
    out.dr6, out.dr7 = vcpu.cpu.guest.dr6, get_dr7(vcpu)
    return out


@vcpu_ioctl("KVM_SET_DEBUGREGS", In("struct kvm_debugregs"), cap="KVM_CAP_DEBUGREGS")
def set_debugregs(vcpu: Vcpu, new: CData) -> int:
    """Set the guest's DR0 to DR3, DR6 and DR7; addresses may be any.

    Errors:
        EINVAL  flags; DR6 or DR7 with a bit above 31
    Source: api.rst 4.34; x86.c kvm_vcpu_ioctl_x86_set_debugregs
    """
    if new.flags:
        raise KvmError(EINVAL, f"flags {new.flags:#x}, must be 0")
    if (new.dr6 >> 32 or new.dr7 >> 32) and vcpu.vm.kernel.behaviour.strict_debugregs:
        raise KvmError(EINVAL, f"dr6 {new.dr6:#x}, dr7 {new.dr7:#x}: 32 bits each")
    _set(vcpu, list(new.db), new.dr7)
    vcpu.cpu.guest.dr6 = new.dr6
    return 0


# ---- the client's debugging ----------------------------------------------------------------------


@vcpu_ioctl("KVM_SET_GUEST_DEBUG", In("struct kvm_guest_debug"), cap="KVM_CAP_SET_GUEST_DEBUG")
def set_guest_debug(vcpu: Vcpu, new: CData) -> int:
    """Debug the guest: steps, breakpoints by INT3 or in the registers given, or an exception at once.

    Without KVM_GUESTDBG_ENABLE debugging ends.

    Errors:
        EBUSY  an exception is to be injected, and one or a triple fault is pending
    Source: api.rst 4.83; x86.c kvm_arch_vcpu_ioctl_set_guest_debug
    """
    control, events, debug = new.control, vcpu.events, vcpu.debug
    if control & _INJECT:
        if events.exception_pending or events.triple_fault:
            raise KvmError(EBUSY, f"exception {events.vector} or a triple fault is pending")
        is_db = control & uapi.KVM_GUESTDBG_INJECT_DB
        events.queue_exception(vcpu, uapi.DB_VECTOR if is_db else uapi.BP_VECTOR)
    debug.control = control if control & uapi.KVM_GUESTDBG_ENABLE else 0
    db, dr7 = _get_db(vcpu), get_dr7(vcpu)
    if debug.control & _HW_BP:
        debug.guest_db, debug.guest_dr7 = db, dr7
        _load(vcpu, list(new.arch.debugreg)[:_NR_ADDRESSES], new.arch.debugreg[_DR7] & 0xFFFF_FFFF)
    else:
        debug.guest_db = None
        _load(vcpu, db, dr7)
    _intercept(vcpu, debug.control)
    events.requested = True
    return 0


def _intercept(vcpu: Vcpu, control: int) -> None:
    set_control = vcpu.events.set_control
    set_control(vcpu, lib.CPU_SINGLE_STEP, on=bool(control & _STEP))
    set_control(vcpu, lib.CPU_EXIT_DR, on=bool(control & _HW_BP))
    bitmap = 1 << uapi.DB_VECTOR if control & _HW_BP else 0
    bitmap |= 1 << uapi.BP_VECTOR if control & _SW_BP else 0
    vcpu.cpu.ctl.exception_bitmap = bitmap


def debug_exit(vcpu: Vcpu, exception: int, dr6: int = 0) -> Outcome:
    """Leave with KVM_EXIT_DEBUG."""
    run = vcpu.kvm_run
    run.exit_reason = uapi.KVM_EXIT_DEBUG
    arch = run.debug.arch
    arch.exception = exception
    arch.pc = linear_rip(vcpu)
    arch.dr6 = dr6 | uapi.DR6_ACTIVE_LOW
    arch.dr7 = vcpu.cpu.guest.dr7
    return USERSPACE


@on_exit(lib.EXIT_MTF)
def handle_mtf(vcpu: Vcpu) -> Outcome:
    """Report a step."""
    return debug_exit(vcpu, uapi.DB_VECTOR, uapi.DR6_BS)


@on_exit(lib.EXIT_EXCEPTION)
def handle_exception(vcpu: Vcpu) -> Outcome:
    """Report a breakpoint of the client's."""
    ex = vcpu.cpu.exit
    vector = ex.intr_info & lib.CPU_EVENT_VECTOR
    return debug_exit(vcpu, vector, ex.qualification if vector == uapi.DB_VECTOR else 0)


@on_exit(lib.EXIT_DR_ACCESS)
def handle_dr_access(vcpu: Vcpu) -> Outcome:
    """Do the guest's MOV DR on its own registers (vmx.c handle_dr)."""
    qualification = vcpu.cpu.exit.qualification
    number, write, register = qualification & 7, qualification >> 4 & 1, qualification >> 8 & 15
    guest, gpr = vcpu.cpu.guest, vcpu.cpu.gpr
    if guest.dr7 & uapi.DR7_GD:
        return debug_exit(vcpu, uapi.DB_VECTOR, uapi.DR6_BD)
    # DR4 and DR5 are other names of DR6 and DR7; with CR4.DE the processor has refused them.
    number += 2 if number in {4, 5} else 0
    mask = 0xFFFF_FFFF_FFFF_FFFF if is_64_bit_mode(vcpu) else 0xFFFF_FFFF
    if not write:
        values = {_DR6: guest.dr6, _DR7: get_dr7(vcpu), **dict(enumerate(_get_db(vcpu)))}
        gpr[register] = values[number] & mask
    elif not _write_dr(vcpu, number, gpr[register] & mask):
        vcpu.events.inject_gp(vcpu)
        return RESUME
    vcpu.cpu.skip()
    return RESUME


def _write_dr(vcpu: Vcpu, number: int, value: int) -> bool:
    """Write a debug register for the guest; False: #GP."""
    db, dr7 = _get_db(vcpu), get_dr7(vcpu)
    if number < _NR_ADDRESSES:
        db[number] = value
    elif value >> 32:
        return False
    elif number == _DR6:
        vcpu.cpu.guest.dr6 = value & DR6_VOLATILE | uapi.DR6_ACTIVE_LOW
    else:
        dr7 = value & uapi.DR7_VOLATILE | uapi.DR7_FIXED_1
    _set(vcpu, db, dr7)
    return True
