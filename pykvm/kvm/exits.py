"""Exits of the processor: a table by reason, and the handlers that belong to no other subject.

A handler does what the exit asks for and says how to go on: RESUME the guest, or return to
USERSPACE with kvm_run filled.  What has to be done when the client comes back it leaves in
`vcpu.complete_userspace_io`.
"""

from __future__ import annotations

import enum
from errno import EFAULT, EINVAL
from typing import TYPE_CHECKING, TypeAlias

from pykvm import trace
from pykvm.abi import Gpa, ffi, lib, uapi
from pykvm.abi.errors import KvmError
from pykvm.kvm import steal_time
from pykvm.kvm.caps import Args, vm_cap
from pykvm.mmu import RetPf

if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.kvm.vcpu import Vcpu
    from pykvm.kvm.vm import Vm


class Outcome(enum.Enum):
    """How KVM_RUN goes on after an exit, or after the completion of one."""

    RESUME = enum.auto()
    USERSPACE = enum.auto()


# Names of the module: an attribute of an Enum costs a descriptor call at every exit.
RESUME = Outcome.RESUME
USERSPACE = Outcome.USERSPACE

Handler: TypeAlias = "Callable[[Vcpu], Outcome]"

# SDM vol. 3 appendix C: what the INTERNAL_ERROR data calls an exit, for the exits that it can name.
_BASIC_EXIT_REASONS = {
    lib.EXIT_EXCEPTION: 0,
    lib.EXIT_TRIPLE_FAULT: 2,
    lib.EXIT_EPT_VIOLATION: 48,
    lib.EXIT_EMULATION: 49,
    lib.EXIT_MMIO_READ: 49,
    lib.EXIT_MMIO_WRITE: 49,
}
_EPT_MISCONFIG = 49
# SDM vol. 3 26.8: VM-entry failure due to invalid guest state, with the failure bit.
INVALID_GUEST_STATE = 0x8000_0021
CPL_SHIFT = lib.CPU_AR_DPL_SHIFT
_INSN_BYTES = 15
_NOP = b"\x90"
_VALID = lib.CPU_EVENT_VALID
_EXIT_NONE = lib.EXIT_NONE
_EXIT_IO = lib.EXIT_IO
# After so many exits that KVM_RUN handled alone it looks for a signal.
ENTRIES_UNSEEN = 256


def _unexpected(vcpu: Vcpu) -> Outcome:
    """Report an exit nobody asked for: KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON."""
    return internal_error(vcpu, uapi.KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, vcpu.cpu.exit.reason, 0)


HANDLERS: list[Handler] = [_unexpected] * lib.CPU_NR_EXITS
EXIT_NAMES = {
    value: name.removeprefix("EXIT_")
    for value, name in ffi.typeof("enum cpu_exit_reason").elements.items()
    if name.startswith("EXIT_")
}


def on_exit(reason: int) -> Callable[[Handler], Handler]:
    """Register the handler of an exit reason."""

    def register(handler: Handler) -> Handler:
        if HANDLERS[reason] is not _unexpected:
            msg = f"two handlers of EXIT_{EXIT_NAMES[reason]}"
            raise RuntimeError(msg)
        HANDLERS[reason] = handler
        return handler

    return register


# ---- what handlers share -------------------------------------------------------------------------


def linear_rip(vcpu: Vcpu) -> int:
    """Return the linear address of rip (kvm_get_linear_rip)."""
    guest = vcpu.cpu.guest
    rip: int = guest.rip
    if is_64_bit_mode(vcpu):
        return rip
    base: int = guest.seg[lib.CPU_SEG_CS].base
    return (base + rip) & 0xFFFF_FFFF


def is_64_bit_mode(vcpu: Vcpu) -> bool:
    """Say if the guest is executing 64-bit code."""
    guest = vcpu.cpu.guest
    return bool(guest.efer & uapi.EFER_LMA and guest.seg[lib.CPU_SEG_CS].ar & lib.CPU_AR_L)


def get_cpl(vcpu: Vcpu) -> int:
    """Return the current privilege level: 0 in real mode, 3 in virtual-8086 mode, else SS.DPL."""
    guest = vcpu.cpu.guest
    if not guest.cr0 & uapi.X86_CR0_PE:
        return 0
    if guest.rflags & uapi.X86_EFLAGS_VM:
        return 3
    return int(guest.seg[lib.CPU_SEG_SS].ar >> CPL_SHIFT & 3)


def note_rip(vcpu: Vcpu) -> None:
    """Remember where rip is before the client moves it: a pending completion wants to know."""
    if vcpu.complete_userspace_io is not None and vcpu.pending_linear_rip is None:
        vcpu.pending_linear_rip = linear_rip(vcpu)


def rip_moved(vcpu: Vcpu) -> bool:
    """Say if the client moved rip away from the instruction that waits for its completion.

    Then the client wins: the instruction is neither finished nor skipped (kvm_is_linear_rip).
    """
    before, vcpu.pending_linear_rip = vcpu.pending_linear_rip, None
    return before is not None and before != linear_rip(vcpu)


def complete_instruction(vcpu: Vcpu) -> Outcome:
    """Finish the instruction at rip with the answers in ctl; it may exit again for another one."""
    cpu, entries = vcpu.cpu, 0
    while True:
        reason = cpu.complete()
        # KVM's emulator leaves REP INS after each batch: the next one is asked for by the guest again.
        if reason == _EXIT_NONE or (reason == _EXIT_IO and getattr(cpu.exit.io, "in")):
            return RESUME
        entries += 1
        try:
            outcome = HANDLERS[reason](vcpu)
            # A page that had to be mapped first: the instruction is still to be done.
            if outcome is USERSPACE or reason not in _RETRIED or vcpu.events.exception_pending:
                return outcome
            if not entries % ENTRIES_UNSEEN:
                vcpu.check_signal()
        except KvmError:
            # The client may mend its memory: the answers in ctl are still good then.
            vcpu.complete_userspace_io = _complete_later
            raise


def _complete_later(vcpu: Vcpu) -> Outcome:
    if not rip_moved(vcpu):
        return complete_instruction(vcpu)
    ctl = vcpu.cpu.ctl
    ctl.pio_count = ctl.pio_out_done = ctl.mmio_count = ctl.emulate_count = 0
    return RESUME


_RETRIED = frozenset({lib.EXIT_EPT_VIOLATION, lib.EXIT_PAGE_FAULT})


def internal_error(vcpu: Vcpu, suberror: int, *data: int) -> Outcome:
    """Leave with KVM_EXIT_INTERNAL_ERROR."""
    run = vcpu.kvm_run
    run.exit_reason = uapi.KVM_EXIT_INTERNAL_ERROR
    run.internal.suberror = suberror
    run.internal.ndata = len(data)
    for at, value in enumerate(data):
        run.internal.data[at] = value
    return USERSPACE


def event_vectoring_error(vcpu: Vcpu, gpa: int) -> Outcome:
    """Report an event that cannot be delivered, its frame being where no memory is.

    Data: vectoring information, basic exit reason, qualification, gpa, host CPU.
    Source: x86.c kvm_prepare_event_vectoring_exit
    """
    ex = vcpu.cpu.exit
    reason = _BASIC_EXIT_REASONS.get(ex.reason, ex.reason)
    suberror = uapi.KVM_INTERNAL_ERROR_DELIVERY_EV
    rules = vcpu.vm.kernel.behaviour
    data = [ex.idt_vectoring.info, reason, ex.qualification]
    if rules.delivery_event_gpa or reason == _EPT_MISCONFIG:
        data.append(gpa)
    if rules.last_cpu:
        data.append(0)
    return internal_error(vcpu, suberror, *data)


def emulation_failure(vcpu: Vcpu) -> Outcome:
    """Give up on an instruction: #UD for the guest, and at CPL 0 an exit, too.

    Data: flags; size and bytes of the instruction, padded with NOPs; reason, qualification, gpa,
    interruption information, error code.
    Source: x86.c handle_emulation_failure, prepare_emulation_failure_exit
    """
    always = vcpu.vm.exit_on_emulation_error
    if not always:
        vcpu.events.queue_exception(vcpu, uapi.UD_VECTOR)
        if get_cpl(vcpu):
            return RESUME
    if not vcpu.vm.kernel.behaviour.emulation_failure_data:
        return internal_error(vcpu, uapi.KVM_INTERNAL_ERROR_EMULATION)
    ex, run = vcpu.cpu.exit, vcpu.kvm_run
    size = min(ex.insn_bytes, _INSN_BYTES)
    info = (_BASIC_EXIT_REASONS.get(ex.reason, ex.reason), ex.qualification, ex.gpa, 0, 0)
    run.exit_reason = uapi.KVM_EXIT_INTERNAL_ERROR
    failure = run.emulation_failure
    failure.suberror = uapi.KVM_INTERNAL_ERROR_EMULATION
    failure.flags = uapi.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES if size else 0
    start = 3 if size else 1
    if size:
        failure.insn_size = size
        code = bytes(ffi.buffer(ex.insn, size))
        ffi.memmove(failure.insn_bytes, code.ljust(_INSN_BYTES, _NOP), _INSN_BYTES)
    for at, value in enumerate(info, start):
        run.internal.data[at] = value
    failure.ndata = start + len(info)
    return USERSPACE


@vm_cap("KVM_CAP_EXIT_ON_EMULATION_FAILURE")
def enable_exit_on_emulation_failure(vm: Vm, args: Args) -> int:
    """Have what cannot be executed always exit, without #UD: args[0] on (1) or off (0).

    Errors:
        EINVAL  another value
    Source: api.rst 7.26
    """
    if args[0] & ~1:
        raise KvmError(EINVAL, f"args[0] is {args[0]:#x}, must be 0 or 1")
    vm.exit_on_emulation_error = bool(args[0])
    return 0


def memory_fault(vcpu: Vcpu, gpa: int, size: int, flags: int) -> None:
    """Fill kvm_run for a KVM_RUN that fails with EFAULT because of guest memory."""
    if not vcpu.vm.kernel.behaviour.memory_fault_exit:
        return
    run = vcpu.kvm_run
    run.exit_reason = uapi.KVM_EXIT_MEMORY_FAULT
    run.memory_fault.flags = flags
    run.memory_fault.gpa = gpa
    run.memory_fault.size = size


# ---- handlers ------------------------------------------------------------------------------------


@on_exit(lib.EXIT_PREEMPTED)
def handle_preempted(vcpu: Vcpu) -> Outcome:
    """Let Python look at its signals and threads, and go on; a signal may wait for this thread, too."""
    if vcpu.steal_time.gpa is not None:
        steal_time.record(vcpu)
    for stats_file in vcpu.vm.stats_files:
        stats_file.refresh()
    return _stop_for_signal(vcpu)


@on_exit(lib.EXIT_KICK)
def handle_kick(vcpu: Vcpu) -> Outcome:
    """Somebody has work for this vCPU, or a signal waits."""
    vcpu.cpu.clear_kick()
    return _stop_for_signal(vcpu)


def _stop_for_signal(vcpu: Vcpu) -> Outcome:
    vcpu.check_signal()
    return RESUME


def shutdown(vcpu: Vcpu) -> Outcome:
    """Leave with KVM_EXIT_SHUTDOWN."""
    vcpu.complete_userspace_io = None
    vcpu.mmio_fragments = []
    vcpu.kvm_run.exit_reason = uapi.KVM_EXIT_SHUTDOWN
    return USERSPACE


@on_exit(lib.EXIT_INVALID_STATE)
def handle_invalid_state(vcpu: Vcpu) -> Outcome:
    """Report a guest state that no processor can be entered with."""
    run = vcpu.kvm_run
    run.exit_reason = uapi.KVM_EXIT_FAIL_ENTRY
    run.fail_entry.hardware_entry_failure_reason = INVALID_GUEST_STATE
    run.fail_entry.cpu = 0
    return USERSPACE


@on_exit(lib.EXIT_IRQ_WINDOW)
def handle_irq_window(vcpu: Vcpu) -> Outcome:
    """Interrupts can be taken now; the run loop sees that by itself and tells the client."""
    vcpu.events.set_control(vcpu, lib.CPU_EXIT_IRQ_WINDOW, on=False)
    vcpu.events.requested = True
    return RESUME


@on_exit(lib.EXIT_NMI_WINDOW)
def handle_nmi_window(vcpu: Vcpu) -> Outcome:
    """Take the NMI that waited."""
    vcpu.events.set_control(vcpu, lib.CPU_EXIT_NMI_WINDOW, on=False)
    vcpu.events.requested = True
    return RESUME


@on_exit(lib.EXIT_EPT_VIOLATION)
def handle_ept_violation(vcpu: Vcpu) -> Outcome:
    """Have the MMU map the page; what no slot backs comes back as MMIO.

    Errors:
        EFAULT  the slot's host memory is not there
    """
    ex = vcpu.cpu.exit
    gpa = Gpa(ex.gpa)
    vectoring = ex.idt_vectoring.info & _VALID
    if vectoring:
        vcpu.events.requeue(vcpu)
    if trace.kvm_page_fault.enabled:
        trace.kvm_page_fault(vcpu=vcpu.id, gpa=gpa, error_code=ex.qualification)
    result = vcpu.vm.mmu.page_fault(vcpu, gpa, ex.qualification, ex.gla)
    if result is not RetPf.EMULATE or not vcpu.cpu.ctl.emulate_count:
        return RESUME
    if vectoring:
        vcpu.cpu.ctl.emulate_count = 0
        return event_vectoring_error(vcpu, gpa)
    # A write to a READONLY slot: once more, with writes to this frame coming out as MMIO.
    outcome = complete_instruction(vcpu)
    vcpu.cpu.ctl.emulate_count = 0
    return outcome


@on_exit(lib.EXIT_HOST_FAULT)
def handle_host_fault(vcpu: Vcpu) -> Outcome:
    """Host memory is not what it was when it was mapped for the guest, and nobody told us.

    The translations go, so that the access faults and finds out page by page what there is.

    Errors:
        EFAULT  the slot's host memory is not there
    """
    ex = vcpu.cpu.exit
    if ex.idt_vectoring.info & _VALID:
        vcpu.events.requeue(vcpu)
    hva, before = ex.hva, vcpu.last_host_fault
    vcpu.last_host_fault = here = (int(hva), int(vcpu.cpu.stats.insns))
    for slot in vcpu.vm.memslots[vcpu.as_id].ordered:
        offset = hva - slot.userspace_addr
        if 0 <= offset < slot.npages << 12:
            gpa = (slot.base_gfn << 12) + (offset & ~0xFFF)
            if before == here:
                memory_fault(vcpu, gpa, 0x1000, 0)
                raise KvmError(EFAULT, f"host memory at {hva:#x} behind gpa {gpa:#x} is gone")
            vcpu.vm.mmu.host_fault(vcpu.as_id, slot, gpa >> 12)
            return RESUME
    if before == here:
        raise KvmError(EFAULT, f"host memory at {hva:#x} is gone, and there is no slot over it")
    # The slot went, too; the processor must not look there again.
    vcpu.cpu.flush_tlb()
    return RESUME


@on_exit(lib.EXIT_EMULATION)
def handle_emulation(vcpu: Vcpu) -> Outcome:
    """Report what the processor cannot execute: code or descriptor tables where no memory is."""
    ex = vcpu.cpu.exit
    if ex.idt_vectoring.info & _VALID:
        vcpu.events.requeue(vcpu)
        return event_vectoring_error(vcpu, ex.gpa)
    return emulation_failure(vcpu)


def tpr_lowered(vcpu: Vcpu) -> Outcome:
    """Tell a client that keeps the local APIC that the guest lowered its TPR."""
    vcpu.kvm_run.exit_reason = uapi.KVM_EXIT_SET_TPR
    return USERSPACE
