"""Events on their way into the guest: exceptions, NMIs, interrupts, and their order.

An event is *pending* until the processor is entered with it, *injected* from then on until its
delivery succeeded: an exit in the middle of the delivery brings it back and it is injected again,
once.  Names and order are those of kvm_check_and_inject_events.
"""

from __future__ import annotations

import enum
from errno import EEXIST, EINVAL, ENXIO
from typing import TYPE_CHECKING

from pykvm import trace
from pykvm.abi import CData, ffi, lib, uapi
from pykvm.abi.errors import KvmError
from pykvm.abi.ioctl import Ignored, In, Out, vcpu_ioctl
from pykvm.kvm.caps import Args, vm_cap

if TYPE_CHECKING:
    from pykvm.kvm.vcpu import Vcpu
    from pykvm.kvm.vm import Vm

KVM_NR_INTERRUPTS = 256
_BLOCK_INTR = lib.CPU_BLOCK_STI | lib.CPU_BLOCK_MOVSS
_BLOCK_NMI = _BLOCK_INTR | lib.CPU_BLOCK_NMI
_IF = uapi.X86_EFLAGS_IF
_VALID = lib.CPU_EVENT_VALID

_SOFT_VECTORS = frozenset({uapi.BP_VECTOR, uapi.OF_VECTOR})
_ABORTS = frozenset({uapi.DF_VECTOR, uapi.MC_VECTOR})
_CONTRIBUTORY = frozenset({uapi.DE_VECTOR, uapi.TS_VECTOR, uapi.NP_VECTOR, uapi.SS_VECTOR, uapi.GP_VECTOR})


class _Class(enum.Enum):
    BENIGN = enum.auto()
    CONTRIBUTORY = enum.auto()
    PAGE_FAULT = enum.auto()


def exception_class(vector: int) -> _Class:
    """Return the class that decides about double faults, SDM vol. 3 table 6-4."""
    if vector == uapi.PF_VECTOR:
        return _Class.PAGE_FAULT
    return _Class.CONTRIBUTORY if vector in _CONTRIBUTORY else _Class.BENIGN


def is_fault(vector: int) -> bool:
    """Say if an exception sets RF in the flags it pushes: neither trap, nor abort, nor #DB."""
    return vector not in _SOFT_VECTORS and vector not in _ABORTS and vector != uapi.DB_VECTOR


class Events:
    """The events of one vCPU (exception, nmi_* and interrupt of struct kvm_vcpu_arch)."""

    __slots__ = (
        "error_code",
        "exception_injected",
        "exception_pending",
        "has_error_code",
        "has_payload",
        "in_flight",
        "interrupt_injected",
        "interrupt_nr",
        "interrupt_soft",
        "nmi_injected",
        "nmi_pending",
        "nmi_queued",
        "payload",
        "pending_external_vector",
        "requested",
        "smi_pending",
        "triple_fault",
        "vector",
    )

    def __init__(self) -> None:
        """Start with nothing on the way."""
        self.exception_pending = False
        self.exception_injected = False
        self.vector = 0
        self.has_error_code = False
        self.error_code = 0
        self.has_payload = False
        self.payload = 0
        self.nmi_injected = False
        self.nmi_pending = 0
        # Sent, and not looked at yet: how many of them count follows from the state at that moment.
        self.nmi_queued = 0
        self.interrupt_injected = False
        self.interrupt_nr = 0
        self.interrupt_soft = False
        self.pending_external_vector = -1
        self.triple_fault = False
        self.smi_pending = False
        # There is something to look at before the next entry (KVM_REQ_EVENT).
        self.requested = False
        # ctl.entry_event was given to the processor, and not asked back yet.
        self.in_flight = False

    # ---- exceptions

    def queue_exception(
        self,
        vcpu: Vcpu,
        vector: int,
        error_code: int | None = None,
        payload: int | None = None,
    ) -> None:
        """Raise an exception in the guest, on top of one that is being delivered: #DF, or shutdown.

        `payload`: CR2 of a #PF, the DR6 bits of a #DB.
        Source: x86.c kvm_multiple_exception
        """
        self.requested = True
        if self.exception_pending or self.exception_injected:
            if self.vector == uapi.DF_VECTOR:
                self.triple_fault = True
                return
            first, second = exception_class(self.vector), exception_class(vector)
            double = first is _Class.PAGE_FAULT and second is not _Class.BENIGN
            if double or first is second is _Class.CONTRIBUTORY:
                vector, error_code, payload = uapi.DF_VECTOR, 0, None
        self.exception_pending = True
        self.exception_injected = False
        self.vector = vector
        self.has_error_code = error_code is not None
        self.error_code = error_code or 0
        self.has_payload = payload is not None
        self.payload = payload or 0
        self.deliver_payload(vcpu)

    def inject_gp(self, vcpu: Vcpu, error_code: int = 0) -> None:
        """Raise #GP in the guest."""
        self.queue_exception(vcpu, uapi.GP_VECTOR, error_code)

    def deliver_payload(self, vcpu: Vcpu) -> None:
        """Put the payload of an exception into the register it belongs to."""
        if not self.has_payload:
            return
        guest = vcpu.cpu.guest
        if self.vector == uapi.DB_VECTOR:
            dr6 = guest.dr6 & ~0xF | uapi.DR6_ACTIVE_LOW | self.payload
            # In DR6 the active-low bits are clear when they apply; in a payload they are set.
            guest.dr6 = (dr6 ^ self.payload & uapi.DR6_ACTIVE_LOW) & ~(1 << 12)
        elif self.vector == uapi.PF_VECTOR:
            guest.cr2 = self.payload
        self.has_payload = False
        self.payload = 0

    # ---- what is allowed now

    def needs_reinjection(self) -> bool:
        """Say if an event is half delivered."""
        return self.exception_injected or self.interrupt_injected or self.nmi_injected

    def nmi_allowed(self, vcpu: Vcpu) -> bool:
        """Say if the guest would take an NMI now."""
        return not vcpu.cpu.guest.interruptibility & _BLOCK_NMI

    def ready_for_interrupt_injection(self, vcpu: Vcpu) -> bool:
        """Say if the client may use KVM_INTERRUPT now: see `run.irq_window` of the specification."""
        guest = vcpu.cpu.guest
        return (
            bool(guest.rflags & _IF)
            and not guest.interruptibility & _BLOCK_INTR
            and not (self.exception_pending or self.exception_injected or self.triple_fault)
            and not (self.interrupt_injected or self.nmi_injected)
            and self.pending_external_vector < 0
        )

    def set_control(self, vcpu: Vcpu, flag: int, *, on: bool) -> None:
        """Set or clear a flag of ctl.flags, unless it is so already."""
        ctl = vcpu.cpu.ctl
        flags = ctl.flags
        if bool(flags & flag) is not on:
            ctl.flags = flags ^ flag

    # ---- before and after the processor runs

    def inject_exception(self, vcpu: Vcpu) -> bool:
        """Give the processor an event it has to be given first; say if it can take another one.

        Source: x86.c kvm_check_and_inject_events
        """
        can_inject = not self.needs_reinjection()
        if self.exception_injected:
            self._enter_with_exception(vcpu)
        elif not self.exception_pending:
            if self.nmi_injected:
                self._enter_with(vcpu, lib.CPU_EVENT_NMI | uapi.NMI_VECTOR)
            elif self.interrupt_injected:
                self._enter_with_interrupt(vcpu)
        if self.exception_pending:
            self._inject_pending_exception(vcpu)
            can_inject = False
        return can_inject

    def _inject_pending_exception(self, vcpu: Vcpu) -> None:
        guest = vcpu.cpu.guest
        if is_fault(self.vector):
            guest.rflags |= uapi.X86_EFLAGS_RF
        self.deliver_payload(vcpu)
        if self.vector == uapi.DB_VECTOR:
            vcpu.debug.end_general_detect(guest)
        self.exception_pending = False
        self.exception_injected = True
        self._enter_with_exception(vcpu)

    def inject_nmi(self, vcpu: Vcpu, *, can_inject: bool) -> None:
        """Give the processor a pending NMI, or ask for the moment that it can take one."""
        if can_inject and self.nmi_allowed(vcpu):
            self.nmi_pending -= 1
            self.nmi_injected = True
            self._enter_with(vcpu, lib.CPU_EVENT_NMI | uapi.NMI_VECTOR)
        if self.nmi_pending:
            self.set_control(vcpu, lib.CPU_EXIT_NMI_WINDOW, on=True)

    def _enter_with_exception(self, vcpu: Vcpu) -> None:
        soft = self.vector in _SOFT_VECTORS
        info = (lib.CPU_EVENT_SOFT_EXC if soft else lib.CPU_EVENT_HARD_EXC) | self.vector
        # Real mode pushes no error codes, whatever the client says: x86.c kvm_inject_exception.
        if self.has_error_code and vcpu.cpu.guest.cr0 & uapi.X86_CR0_PE:
            info |= lib.CPU_EVENT_HAS_ERROR
        if trace.kvm_inj_exception.enabled:
            trace.kvm_inj_exception(vector=self.vector, error_code=self.error_code)
        self._enter_with(vcpu, info, self.error_code)

    def _enter_with_interrupt(self, vcpu: Vcpu) -> None:
        kind = lib.CPU_EVENT_SOFT_INTR if self.interrupt_soft else lib.CPU_EVENT_INTR
        if trace.kvm_inj_virq.enabled:
            trace.kvm_inj_virq(vector=self.interrupt_nr)
        self._enter_with(vcpu, kind | self.interrupt_nr)

    def _enter_with(self, vcpu: Vcpu, info: int, error_code: int = 0) -> None:
        event = vcpu.cpu.ctl.entry_event
        event.info = info | _VALID
        event.error_code = error_code
        event.insn_len = 0
        self.in_flight = True

    def after_entry(self, vcpu: Vcpu) -> None:
        """Forget the event that the processor took; one it has not taken is injected again."""
        event = vcpu.cpu.ctl.entry_event
        self.in_flight = False
        if event.info & _VALID:
            event.info = 0
            self.requested = True
            return
        self.exception_injected = self.nmi_injected = self.interrupt_injected = False

    def requeue(self, vcpu: Vcpu) -> None:
        """Take back an event whose delivery an exit interrupted (vmx.c __vmx_complete_interrupts).

        Those of an INT n and its like are not: nothing of the instruction happened, it runs again.
        One that a client injected has no instruction, and no length of one.
        """
        vectoring = vcpu.cpu.exit.idt_vectoring
        info = vectoring.info
        vcpu.cpu.ctl.entry_event.info = 0
        kind, soft = info & lib.CPU_EVENT_TYPE, not vectoring.insn_len
        self.exception_injected = kind == lib.CPU_EVENT_HARD_EXC or (soft and kind == lib.CPU_EVENT_SOFT_EXC)
        self.nmi_injected = kind == lib.CPU_EVENT_NMI
        self.interrupt_injected = kind == lib.CPU_EVENT_INTR or (soft and kind == lib.CPU_EVENT_SOFT_INTR)
        self.requested = True
        if self.exception_injected:
            self.vector = info & lib.CPU_EVENT_VECTOR
            self.has_error_code = bool(info & lib.CPU_EVENT_HAS_ERROR)
            self.error_code = vectoring.error_code
            self.has_payload = False
        elif self.nmi_injected:
            # Delivered again, it must not find itself blocked.
            vcpu.cpu.guest.interruptibility &= ~lib.CPU_BLOCK_NMI
        elif self.interrupt_injected:
            self.interrupt_nr = info & lib.CPU_EVENT_VECTOR
            self.interrupt_soft = kind == lib.CPU_EVENT_SOFT_INTR

    def take_pending_debug(self, vcpu: Vcpu) -> None:
        """Make an exception of a #DB trap that the processor has due: what is to be saved is seen here.

        A client's breakpoint stays the processor's to report, and after MOV SS the trap is not due yet.
        """
        guest, debugged = vcpu.cpu.guest, vcpu.cpu.ctl.exception_bitmap >> uapi.DB_VECTOR & 1
        blocked = guest.interruptibility & lib.CPU_BLOCK_MOVSS
        if debugged or blocked or self.exception_pending or self.exception_injected:
            return
        dr6, guest.pending_dbg = guest.pending_dbg, 0
        self.queue_exception(vcpu, uapi.DB_VECTOR, payload=dr6)

    def queue_interrupt(self, vector: int) -> None:
        """Inject an external interrupt at the next entry, whatever IF says."""
        self.interrupt_injected = True
        self.interrupt_nr = vector
        self.interrupt_soft = False
        self.requested = True

    def queue_nmi(self, count: int = 1) -> None:
        """Send NMIs."""
        self.nmi_queued += count
        self.requested = True

    def process_nmi(self, vcpu: Vcpu) -> None:
        """Latch the NMIs that were sent: at most two wait, at most one while NMIs are blocked."""
        blocked = vcpu.cpu.guest.interruptibility & lib.CPU_BLOCK_NMI
        limit = 1 if blocked or self.nmi_injected else 2
        queued, self.nmi_queued = self.nmi_queued, 0
        self.nmi_pending = min(self.nmi_pending + queued, limit)


# ---- ioctls --------------------------------------------------------------------------------------


@vcpu_ioctl("KVM_INTERRUPT", In("struct kvm_interrupt"))
def interrupt(vcpu: Vcpu, request: CData) -> int:
    """Queue an external interrupt; the client has seen to it that the guest can take it.

    Errors:
        EINVAL  a vector above 255
        ENXIO   the PIC is in the kernel
        EEXIST  with a split irqchip: one is queued already
    Source: api.rst 4.16; x86.c kvm_vcpu_ioctl_interrupt
    """
    vector, events = request.irq, vcpu.events
    if vector >= KVM_NR_INTERRUPTS:
        raise KvmError(EINVAL, f"interrupt vector {vector:#x}")
    if not vcpu.lapic_in_kernel:
        events.queue_interrupt(vector)
        return 0
    if vcpu.pic_in_kernel:
        raise KvmError(ENXIO, "the PIC is in the kernel: use KVM_IRQ_LINE")
    if events.pending_external_vector >= 0:
        raise KvmError(EEXIST, f"vector {events.pending_external_vector:#x} waits already")
    events.pending_external_vector = vector
    events.requested = True
    return 0


@vcpu_ioctl("KVM_NMI", Ignored(), cap="KVM_CAP_USER_NMI")
def nmi(vcpu: Vcpu) -> int:
    """Queue an NMI.

    Errors: none
    Source: api.rst 4.64; x86.c kvm_vcpu_ioctl_nmi, kvm_inject_nmi
    """
    vcpu.events.queue_nmi()
    return 0


@vcpu_ioctl("KVM_GET_VCPU_EVENTS", Out("struct kvm_vcpu_events"), cap="KVM_CAP_VCPU_EVENTS")
def get_vcpu_events(vcpu: Vcpu) -> CData:
    """Return the events on their way: what KVM_SET_VCPU_EVENTS needs on the other machine.

    Without KVM_CAP_EXCEPTION_PAYLOAD a pending exception looks injected, and its payload is in CR2
    or DR6 from now on.  Software exceptions are not told: the guest will meet them again.

    Errors: none
    Source: api.rst 4.31; x86.c kvm_vcpu_ioctl_x86_get_vcpu_events
    """
    e, vm, guest = vcpu.events, vcpu.vm, vcpu.cpu.guest
    out = ffi.new("struct kvm_vcpu_events *")
    e.process_nmi(vcpu)
    if not vm.exception_payload_enabled and e.exception_pending:
        e.deliver_payload(vcpu)
    if e.vector not in _SOFT_VECTORS:
        out.exception.injected = e.exception_injected
        out.exception.pending = e.exception_pending
        if not vm.exception_payload_enabled:
            out.exception.injected |= e.exception_pending
    out.exception.nr = e.vector
    out.exception.has_error_code = e.has_error_code
    out.exception.error_code = e.error_code
    out.exception_has_payload = e.has_payload
    out.exception_payload = e.payload
    out.interrupt.injected = e.interrupt_injected and not e.interrupt_soft
    out.interrupt.nr = e.interrupt_nr
    out.interrupt.shadow = vm.processor.shadow_read_back(get_interrupt_shadow(guest))
    out.nmi.injected = e.nmi_injected
    out.nmi.pending = e.nmi_pending
    out.nmi.masked = bool(guest.interruptibility & lib.CPU_BLOCK_NMI)
    out.flags = vm.kernel.behaviour.vcpu_events_get
    if out.flags & uapi.KVM_VCPUEVENT_VALID_SMM:
        out.smi.smm, out.smi.pending = vcpu.as_id, e.smi_pending
        out.smi.smm_inside_nmi, out.smi.latched_init = vcpu.smm_inside_nmi, vcpu.latched_init
    if out.flags & uapi.KVM_VCPUEVENT_VALID_SIPI_VECTOR:
        out.sipi_vector = vcpu.sipi_vector
    if vm.exception_payload_enabled:
        out.flags |= uapi.KVM_VCPUEVENT_VALID_PAYLOAD
    if vm.triple_fault_event:
        out.triple_fault.pending = e.triple_fault
        out.flags |= uapi.KVM_VCPUEVENT_VALID_TRIPLE_FAULT
    return out


def get_interrupt_shadow(guest: CData) -> int:
    """Return KVM_X86_SHADOW_INT_* of the guest."""
    blocked = guest.interruptibility
    shadow = uapi.KVM_X86_SHADOW_INT_STI if blocked & lib.CPU_BLOCK_STI else 0
    return shadow | (uapi.KVM_X86_SHADOW_INT_MOV_SS if blocked & lib.CPU_BLOCK_MOVSS else 0)


def set_interrupt_shadow(guest: CData, shadow: int) -> None:
    """Set the interrupt shadow to KVM_X86_SHADOW_INT_*; MOV SS wins (vmx_set_interrupt_shadow)."""
    blocked = guest.interruptibility & ~_BLOCK_INTR
    if shadow & uapi.KVM_X86_SHADOW_INT_MOV_SS:
        blocked |= lib.CPU_BLOCK_MOVSS
    elif shadow & uapi.KVM_X86_SHADOW_INT_STI:
        blocked |= lib.CPU_BLOCK_STI
    guest.interruptibility = blocked


@vcpu_ioctl("KVM_SET_VCPU_EVENTS", In("struct kvm_vcpu_events"), cap="KVM_CAP_VCPU_EVENTS")
def set_vcpu_events(vcpu: Vcpu, new: CData) -> int:
    """Replace the events on their way; optional members count when their flag is set.

    Errors:
        EINVAL  unknown flags; exception 2 or above 31; PAYLOAD or TRIPLE_FAULT without its capability;
                SMM or an SMI while INIT_RECEIVED
    Source: api.rst 4.32; x86.c kvm_vcpu_ioctl_x86_set_vcpu_events
    """
    _check_vcpu_events(vcpu, new)
    e, guest, flags = vcpu.events, vcpu.cpu.guest, new.flags
    e.process_nmi(vcpu)
    e.exception_injected = bool(new.exception.injected)
    e.exception_pending = bool(new.exception.pending)
    e.vector = new.exception.nr
    e.has_error_code = bool(new.exception.has_error_code)
    e.error_code = new.exception.error_code
    e.has_payload = bool(new.exception_has_payload)
    e.payload = new.exception_payload
    e.interrupt_injected = bool(new.interrupt.injected)
    e.interrupt_nr = new.interrupt.nr
    e.interrupt_soft = bool(new.interrupt.soft)
    if flags & uapi.KVM_VCPUEVENT_VALID_SHADOW:
        set_interrupt_shadow(guest, new.interrupt.shadow)
    e.nmi_injected = bool(new.nmi.injected)
    masked = lib.CPU_BLOCK_NMI if new.nmi.masked else 0
    guest.interruptibility = guest.interruptibility & ~lib.CPU_BLOCK_NMI | masked
    if flags & uapi.KVM_VCPUEVENT_VALID_NMI_PENDING:
        e.nmi_pending, e.nmi_queued = 0, new.nmi.pending
    if flags & uapi.KVM_VCPUEVENT_VALID_TRIPLE_FAULT:
        e.triple_fault = bool(new.triple_fault.pending)
    if flags & uapi.KVM_VCPUEVENT_VALID_SIPI_VECTOR:
        vcpu.sipi_vector = new.sipi_vector
    if flags & uapi.KVM_VCPUEVENT_VALID_SMM:
        _set_smm(vcpu, new.smi)
    e.requested = True
    return 0


def _set_smm(vcpu: Vcpu, smi: CData) -> None:
    if bool(vcpu.as_id) is not bool(smi.smm):
        vcpu.smm_changed(entering=bool(smi.smm))
    vcpu.events.smi_pending = bool(smi.pending)
    if smi.smm:
        vcpu.smm_inside_nmi = bool(smi.smm_inside_nmi)
    if vcpu.lapic_in_kernel:
        vcpu.latched_init = bool(smi.latched_init)


def _check_vcpu_events(vcpu: Vcpu, new: CData) -> None:
    vm, flags, exception = vcpu.vm, new.flags, new.exception
    if flags & ~vm.kernel.behaviour.vcpu_events_set:
        raise KvmError(EINVAL, f"unknown flags {flags:#x}")
    if flags & uapi.KVM_VCPUEVENT_VALID_PAYLOAD:
        if not vm.exception_payload_enabled:
            raise KvmError(EINVAL, "a payload without KVM_CAP_EXCEPTION_PAYLOAD")
        if exception.pending:
            exception.injected = 0
        else:
            new.exception_has_payload = 0
    else:
        exception.pending = 0
        new.exception_has_payload = 0
    if (exception.injected or exception.pending) and (exception.nr > 31 or exception.nr == uapi.NMI_VECTOR):
        raise KvmError(EINVAL, f"{exception.nr} is no exception")
    smi = new.smi
    in_smm = flags & uapi.KVM_VCPUEVENT_VALID_SMM and (smi.smm or smi.pending)
    if in_smm and vcpu.mp_state == uapi.KVM_MP_STATE_INIT_RECEIVED:
        raise KvmError(EINVAL, "INITs are latched in SMM, and one was received")
    if flags & uapi.KVM_VCPUEVENT_VALID_TRIPLE_FAULT and not vm.triple_fault_event:
        raise KvmError(EINVAL, "a triple fault without KVM_CAP_X86_TRIPLE_FAULT_EVENT")


@vm_cap("KVM_CAP_EXCEPTION_PAYLOAD")
def enable_exception_payload(vm: Vm, args: Args) -> int:
    """Tell pending exceptions from injected ones, with their payload: args[0] on or off.

    Errors: none
    Source: api.rst 7.15
    """
    vm.exception_payload_enabled = bool(args[0])
    return 0


@vm_cap("KVM_CAP_X86_TRIPLE_FAULT_EVENT")
def enable_triple_fault_event(vm: Vm, args: Args) -> int:
    """Have KVM_GET/SET_VCPU_EVENTS carry a pending triple fault: args[0] on or off.

    Errors: none
    Source: api.rst 7.29
    """
    vm.triple_fault_event = bool(args[0])
    return 0
