"""The vCPU: its state beside the processor's, and KVM_RUN.

KVM_RUN works in this order: signals blocked, cr8 and registers taken from kvm_run, the pending exit
completed, immediate_exit, and only then events, guest and exits, until one is the client's to
handle or a signal waits.
"""

from __future__ import annotations

import threading
from errno import EINTR, EINVAL, EIO
from typing import TYPE_CHECKING

from pykvm import trace
from pykvm.abi import CData, ffi, lib, uapi
from pykvm.abi.errors import KvmError
from pykvm.abi.ioctl import NoArg, vcpu_ioctl
from pykvm.cpu import Cpu
from pykvm.kvm import clock, cpuid, dirty_ring, halt, msr_filter, quirks, regs, smm, steal_time
from pykvm.kvm.clock import VcpuClock
from pykvm.kvm.cpuid import GuestCpuid
from pykvm.kvm.debug import GuestDebug
from pykvm.kvm.events import Events
from pykvm.kvm.exits import (
    ENTRIES_UNSEEN,
    EXIT_NAMES,
    HANDLERS,
    RESUME,
    USERSPACE,
    Outcome,
    memory_fault,
)
from pykvm.kvm.msr import MsrState
from pykvm.kvm.profile import absent_requests
from pykvm.kvm.signals import signal_pending
from pykvm.kvm.steal_time import StealTime
from pykvm.mmu import MemoryFault, VcpuStat

if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.kvm.dirty_ring import DirtyRing
    from pykvm.kvm.vm import Vm
    from pykvm.kvm.xsave import Fpstate
    from pykvm.mmu.slots import Memslots

PIO_DATA_OFFSET = uapi.KVM_PIO_PAGE_OFFSET * 4096
_RUN_BYTES = 3 * 4096
# DX after reset is what CPUID.1 says of the processor, and no CPUID is set yet.
_RESET_RDX = 0x600
_RESET_SMBASE = 0x3_0000
_RDX = 2
_CR8_RESERVED = ~0xF
_KVM_EXIT_UNKNOWN = uapi.KVM_EXIT_UNKNOWN
_KVM_EXIT_INTR = uapi.KVM_EXIT_INTR
_KVM_EXIT_IRQ_WINDOW_OPEN = uapi.KVM_EXIT_IRQ_WINDOW_OPEN
_SYNC_REGS = uapi.KVM_SYNC_X86_VALID_FIELDS
_IF = uapi.X86_EFLAGS_IF

_block_signals = lib.signals_block
_restore_signals = lib.signals_restore


class Vcpu:
    """A virtual CPU.  Its ioctls run with `mutex` held, and so does all of KVM_RUN.

    `cpu`: the processor, which holds the architectural state that instructions work on.
    `kvm_run`: what the client maps, as a cdata ``struct kvm_run *``; `run_memory`: the same as bytes,
    with the PIO data page behind it.
    `complete_userspace_io`: what the next KVM_RUN does first; `pending_linear_rip`: where rip was
    when that was left, if the client has set registers since.
    `as_id`: the address space it runs in, 1 in system management mode; `smbase`: where SMRAM is then;
    `smm_inside_nmi`: NMIs were blocked already when it was entered.
    `fpstate`: what the client makes of the floating-point state, until the processor runs with it.
    `loaded_memslots`: the slots that the processor's tables stand for.
    """

    def __init__(self, vm: Vm, vcpu_id: int) -> None:
        """Make a vCPU in the state after reset."""
        self.vm = vm
        self.id = vcpu_id
        # A client's signal handler may run in the middle of KVM_RUN, in its thread, and use the vCPU.
        self.mutex = threading.RLock()
        self.cpu = Cpu()
        self.kvm_run: CData = ffi.NULL
        self.run_memory = memoryview(b"")
        self.as_id = 0
        self.smbase = _RESET_SMBASE
        self.smm_inside_nmi = False
        self.latched_init = False
        self.halted_in_guest = False
        self.mp_state: int = uapi.KVM_MP_STATE_RUNNABLE
        self.sipi_vector = 0
        self.complete_userspace_io: Callable[[Vcpu], Outcome] | None = None
        self.pending_linear_rip: int | None = None
        self.loaded_memslots: tuple[Memslots, ...] | None = None
        self.has_run = False
        # The signals blocked in KVM_RUN: those of KVM_SET_SIGNAL_MASK, else those of the thread.
        self.sigset: int | None = None
        self.signal_mask = 0
        # MMIO under way: what the client answered of a read, what it has not seen of a write.
        self.mmio_read = b""
        self.mmio_fragments: list[tuple[int, bytes]] = []
        self.osi_enabled = False
        # Who makes interrupt controllers in the kernel sets these on each vCPU.
        self.lapic_in_kernel: bool = False
        self.pic_in_kernel: bool = False
        self.events = Events()
        self.stat = VcpuStat()
        self.dirty_ring: DirtyRing | None = None
        # Where the host refused an access of the guest's, and how far the guest had come.
        self.last_host_fault: tuple[int, int] | None = None
        self.apic_base = self._reset_apic_base()
        self.cpuid: GuestCpuid = GuestCpuid()
        self.msrs: MsrState = MsrState()
        self.clock: VcpuClock = VcpuClock()
        self.debug: GuestDebug = GuestDebug()
        self.steal_time = StealTime()
        self.fpstate: Fpstate | None = None
        # As the VM's: every ioctl asks.
        self.is_dead = vm.is_dead
        self._reset()

    def _reset_apic_base(self) -> int:
        base = uapi.APIC_DEFAULT_PHYS_BASE | uapi.MSR_IA32_APICBASE_ENABLE
        return base | (uapi.MSR_IA32_APICBASE_BSP if self.is_bsp else 0)

    def _reset(self) -> None:
        self.cpu.gpr[_RDX] = _RESET_RDX
        ctl = self.cpu.ctl
        # No local APIC in the kernel: the client wants to see the TPR fall.
        ctl.flags |= lib.CPU_EXIT_HLT | lib.CPU_EXIT_CR8
        ctl.flags |= lib.CPU_AMD if self.vm.processor.is_amd else 0
        cpuid.after_set_cpuid(self)
        clock.synchronize_tsc(self, None)
        if not quirks.has_quirk(self.vm, uapi.KVM_X86_QUIRK_STUFF_FEATURE_MSRS):
            self.msrs.values[uapi.MSR_IA32_ARCH_CAPABILITIES] = 0
            self.msrs.values[uapi.MSR_PLATFORM_INFO] = 0

        self.reset_segments()
        self.msrs.values[uapi.MSR_IA32_UCODE_REV] = self.vm.processor.microcode

    def reset_segments(self) -> None:
        """Give AMD's CS, SS and TR the types that kvm_amd gives them at reset (svm.c init_vmcb)."""
        if not self.vm.processor.is_amd:
            return
        for segment, kind in ((lib.CPU_SEG_CS, 0xA), (lib.CPU_SEG_SS, 2), (lib.CPU_SEG_TR, 3)):
            register = self.cpu.guest.seg[segment]
            register.ar = register.ar & ~lib.CPU_AR_TYPE | kind
        self.cpu.state_changed()

    @property
    def absent_requests(self) -> frozenset[int]:
        """Requests on a vCPU that its kernel does not know."""
        return absent_requests(self.vm.kernel, "vcpu")

    @property
    def is_bsp(self) -> bool:
        """Say if this is the boot processor."""
        return self.id == self.vm.boot_cpu_id

    @property
    def run(self) -> CData:
        """What the client maps, a struct kvm_run; setting it makes the vCPU ready to run."""
        return self.kvm_run

    @run.setter
    def run(self, kvm_run: CData) -> None:
        self.kvm_run = kvm_run
        self.run_memory = memoryview(ffi.buffer(kvm_run, _RUN_BYTES)).cast("B")

    def release(self) -> None:
        """Let the descriptor and the mappings go; the vCPU stays part of the VM."""
        self.vm.put()

    def destroy(self) -> None:
        """Free the processor: the VM is going away and nobody can reach the vCPU."""
        self.complete_userspace_io = None

    def pv_has(self, feature: int) -> bool:
        """Say if the guest has a KVM_FEATURE_*: all of them, unless the client wants CPUID to rule."""
        return not self.msrs.pv_enforce or bool(self.cpuid.pv_features >> feature & 1)

    def smm_changed(self, *, entering: bool) -> None:
        """Move into system management mode or out of it: to the other address space (kvm_smm_changed)."""
        self.as_id = int(entering)
        if not entering:
            self.smm_inside_nmi = False
            # What waited for this: another SMI, an INIT.
            self.events.requested = True
        self.loaded_memslots = None
        self.cpu.flush_tlb()
        self.vm.mmu.paging_changed(self)

    def check_signal(self) -> None:
        """End KVM_RUN when a signal waits.

        Errors:
            EINTR  one does; exit_reason says KVM_EXIT_INTR
        """
        if signal_pending(self):
            self.kvm_run.exit_reason = _KVM_EXIT_INTR
            self.stat.signal_exits += 1
            steal_time.set_preempted(self)
            raise KvmError(EINTR, "a signal is pending")


# ---- KVM_RUN -------------------------------------------------------------------------------------


@vcpu_ioctl("KVM_RUN", NoArg())
def run(vcpu: Vcpu) -> int:
    """Run the guest until something is the client's to handle; kvm_run says what.

    An exit that the client handled is completed first of all, even when immediate_exit is set or a
    signal waits; doing so may give the next exit of the same instruction.

    Errors:
        EINVAL  the argument is not 0; unknown bits in kvm_valid_regs or kvm_dirty_regs, invalid
                registers there; cr8 above 15
        EINTR   a signal is pending (exit_reason KVM_EXIT_INTR), or immediate_exit is set
        EFAULT  guest memory that the host does not have (exit_reason KVM_EXIT_MEMORY_FAULT)
        ENOSPC  shadow paging, and no shadow page is left
        EIO     an SMI, and no memory at SMBASE to save the state in: the VM is dead
    Source: api.rst 4.10 and 5; x86.c kvm_arch_vcpu_ioctl_run, vcpu_run, vcpu_enter_guest
    """
    blocked = _block_signals()
    try:
        vcpu.signal_mask = mask = blocked if vcpu.sigset is None else vcpu.sigset
        vcpu.cpu.set_signal_mask(mask)
        kvm_run = vcpu.kvm_run
        rules = vcpu.vm.kernel.behaviour
        immediate_exit = kvm_run.immediate_exit if rules.immediate_exit else 0
        kvm_run.flags = 0
        vcpu.fpstate = None
        coalesced = vcpu.vm.coalesced_mmio
        if coalesced.zones:
            coalesced.sync()
        try:
            return _run(vcpu, kvm_run, immediate_exit)
        except MemoryFault as fault:
            memory_fault(vcpu, *fault.memory_fault)
            raise
        finally:
            if vcpu.cpu.guest.pending_dbg:
                vcpu.events.take_pending_debug(vcpu)
            if kvm_run.kvm_valid_regs and rules.sync_regs:
                regs.store_sync_regs(vcpu)
            post_run_save(vcpu)
            vcpu.stat.host_state_reload += 1
            if coalesced.zones:
                coalesced.sync()
            for stats_file in vcpu.vm.stats_files:
                stats_file.refresh()
    finally:
        _restore_signals(blocked)
        if trace.kvm_userspace_exit.enabled:
            trace.kvm_userspace_exit(reason=vcpu.kvm_run.exit_reason)


def _run(vcpu: Vcpu, kvm_run: CData, immediate_exit: int) -> int:
    if kvm_run.kvm_valid_regs | kvm_run.kvm_dirty_regs and vcpu.vm.kernel.behaviour.sync_regs:
        if (kvm_run.kvm_valid_regs | kvm_run.kvm_dirty_regs) & ~_SYNC_REGS:
            raise KvmError(EINVAL, "unknown bits in kvm_valid_regs or kvm_dirty_regs")
        if kvm_run.kvm_dirty_regs:
            regs.load_sync_regs(vcpu)
    if not vcpu.lapic_in_kernel:
        cr8 = kvm_run.cr8
        if cr8 & _CR8_RESERVED:
            raise KvmError(EINVAL, f"kvm_run.cr8 is {cr8:#x}")
        vcpu.cpu.guest.cr8 = cr8
    complete = vcpu.complete_userspace_io
    if complete is not None:
        vcpu.complete_userspace_io = None
        if vcpu.loaded_memslots is not vcpu.vm.memslots:
            _load_mmu(vcpu)
        outcome = complete(vcpu)
        # Where no completion asks, as after a part of a write, it must not be taken for the next one's.
        vcpu.pending_linear_rip = None
        if outcome is USERSPACE:
            return 0
    if immediate_exit:
        raise KvmError(EINTR, "immediate_exit is set")
    return vcpu_run(vcpu)


def vcpu_run(vcpu: Vcpu) -> int:
    """Enter the guest again and again until an exit is the client's."""
    vm, cpu, kvm_run, events = vcpu.vm, vcpu.cpu, vcpu.kvm_run, vcpu.events
    enter = cpu.enter
    if vm.kernel.behaviour.memory_fault_exit:
        kvm_run.exit_reason = _KVM_EXIT_UNKNOWN
    if vcpu.steal_time.gpa is not None:
        steal_time.record(vcpu)
    if vcpu.halted_in_guest:
        halt.wait(vcpu)
    entries = 0
    is_entered = False
    while True:
        if vcpu.loaded_memslots is not vm.memslots:
            _load_mmu(vcpu)
        if events.requested and not _prepare_events(vcpu):
            return 0
        if kvm_run.request_interrupt_window and not _open_window(vcpu):
            vcpu.has_run = True
            return 0
        if not is_entered:
            is_entered = True
            _begin(vcpu)
        if trace.kvm_entry.enabled:
            trace.kvm_entry(vcpu=vcpu.id, rip=cpu.guest.rip)
        reason = enter()
        if events.in_flight:
            events.after_entry(vcpu)
        if trace.kvm_exit.enabled:
            trace.kvm_exit(vcpu=vcpu.id, reason=EXIT_NAMES[reason], rip=cpu.guest.rip)
        if HANDLERS[reason](vcpu) is not RESUME:
            return 0
        # The processor looks for signals itself, but not while each entry ends in delivering an event.
        entries += 1
        if not entries % ENTRIES_UNSEEN:
            for stats_file in vm.stats_files:
                stats_file.refresh()
            vcpu.check_signal()


def _begin(vcpu: Vcpu) -> None:
    """Execute nothing if a signal waited before KVM_RUN: clients complete an exit so (api.rst 5).

    Without KVM_SET_SIGNAL_MASK none can have waited, its handler would have run.

    Errors:
        EINTR  one did; an event that was to be delivered is injected the next time
    """
    if vcpu.sigset is not None and signal_pending(vcpu):
        if vcpu.events.in_flight:
            vcpu.events.after_entry(vcpu)
        vcpu.check_signal()
    vcpu.has_run = True


def _load_mmu(vcpu: Vcpu) -> None:
    # Read before it is loaded: a change in between makes the next entry load again.
    memslots = vcpu.vm.memslots
    vcpu.vm.mmu.load(vcpu)
    vcpu.loaded_memslots = memslots


def _prepare_events(vcpu: Vcpu) -> bool:
    """Hand over the next event; False when that is a shutdown, told in kvm_run."""
    events = vcpu.events
    # First: what another thread asks for from now on is looked at again.
    events.requested = False
    if vcpu.vm.is_dead:
        raise KvmError(EIO, "the VM is dead: it could not go on")
    vcpu.stat.req_event += 1
    if vcpu.dirty_ring is not None and dirty_ring.check_full(vcpu):
        return False
    if events.triple_fault:
        events.triple_fault = False
        vcpu.kvm_run.exit_reason = uapi.KVM_EXIT_SHUTDOWN
        return False
    if vcpu.clock.update_requested:
        clock.update_guest_time(vcpu)
    if vcpu.steal_time.gpa is not None:
        steal_time.record(vcpu)
    msr_filter.update_intercept(vcpu)
    quirks.update_mwait(vcpu)
    can_inject = events.inject_exception(vcpu)
    if vcpu.debug.control & uapi.KVM_GUESTDBG_BLOCKIRQ:
        return True
    if events.smi_pending:
        can_inject = smm.inject_smi(vcpu, can_inject=can_inject)
        if vcpu.loaded_memslots is None:
            _load_mmu(vcpu)
    if events.nmi_queued:
        events.process_nmi(vcpu)
    if events.nmi_pending:
        events.inject_nmi(vcpu, can_inject=can_inject)
    return True


def _open_window(vcpu: Vcpu) -> bool:
    """Ask for the moment the client waits for; False when it is now, told in kvm_run."""
    events = vcpu.events
    if vcpu.pic_in_kernel:
        return True
    if not events.in_flight and events.ready_for_interrupt_injection(vcpu):
        vcpu.kvm_run.exit_reason = _KVM_EXIT_IRQ_WINDOW_OPEN
        vcpu.stat.request_irq_exits += 1
        return False
    events.set_control(vcpu, lib.CPU_EXIT_IRQ_WINDOW, on=True)
    return True


def post_run_save(vcpu: Vcpu) -> None:
    """Refresh what kvm_run says after every KVM_RUN, failed ones included."""
    kvm_run, guest = vcpu.kvm_run, vcpu.cpu.guest
    if vcpu.as_id:
        kvm_run.flags |= uapi.KVM_RUN_X86_SMM
    kvm_run.if_flag = 1 if guest.rflags & _IF else 0
    kvm_run.cr8 = guest.cr8
    kvm_run.apic_base = vcpu.apic_base
    kvm_run.ready_for_interrupt_injection = (
        1 if vcpu.pic_in_kernel or vcpu.events.ready_for_interrupt_injection(vcpu) else 0
    )
