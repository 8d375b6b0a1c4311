"""Steal time: what the guest is told of the time its vCPU was ready to run and did not.

The host's scheduler counts that for each thread.  It is read when KVM_RUN begins and when the processor
has run for a while, and at most once in a millisecond: the file costs more than most exits.
"""

from __future__ import annotations

import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pykvm.abi import Gpa, ffi, lib, uapi
from pykvm.kvm.caps import capability

if TYPE_CHECKING:
    from pykvm.kvm.vcpu import Vcpu
    from pykvm.kvm.vm import Vm

_SCHEDSTAT = Path("/proc/thread-self/schedstat")
_INTERVAL_NS = 1_000_000
_STRUCT = "struct kvm_steal_time"
_STEAL, _VERSION, _PREEMPTED = (ffi.offsetof(_STRUCT, name) for name in ("steal", "version", "preempted"))
_LOW_BITS = (1 << uapi.KVM_STEAL_ALIGNMENT_BITS + 1) - 1
_SIZE = ffi.sizeof(_STRUCT)
_MASK32, _MASK64 = 0xFFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF


def _sched_info_on() -> int:
    """Say if the host counts how long threads wait (CONFIG_SCHED_INFO)."""
    return int(run_delay() is not None)


def run_delay() -> int | None:
    """Return for how many ns this thread has waited for a processor so far; None: nobody counts."""
    try:
        return int(_SCHEDSTAT.read_bytes().split()[1])
    except (OSError, IndexError):
        return None


capability("KVM_CAP_STEAL_TIME", lambda _of: _sched_info_on())


@dataclass(slots=True)
class StealTime:
    """What the vCPU's guest is told of stolen time.

    `gpa`: of struct kvm_steal_time, None when it is off.  `last`: run_delay when it was last told, of
    thread `thread`.  `told_at`: when that was.  `preempted`: the guest was told that we do not run.
    """

    gpa: int | None = None
    last: int = 0
    thread: int = 0
    told_at: int = 0
    preempted: bool = False


def enable(vcpu: Vcpu, data: int) -> None:
    """Take a new MSR_KVM_STEAL_TIME; the structure is filled at the next entry."""
    steal = vcpu.steal_time
    steal.gpa = data & ~_LOW_BITS if data & uapi.KVM_MSR_ENABLED else None
    steal.told_at = 0
    vcpu.events.requested = True


def record(vcpu: Vcpu) -> None:
    """Tell the guest how much time was stolen, and that its vCPU runs (record_steal_time).

    The version is odd while the structure is inconsistent.
    """
    steal, vm = vcpu.steal_time, vcpu.vm
    now, gpa = time.monotonic_ns(), steal.gpa
    if gpa is None or (not steal.preempted and now - steal.told_at < _INTERVAL_NS):
        return
    raw = vm.read_guest(gpa, _SIZE)
    if raw is None:
        return
    (told,) = struct.unpack_from("<Q", raw, _STEAL)
    (version,) = struct.unpack_from("<I", raw, _VERSION)
    # Odd at the first time is garbage.
    version += (version & 1) + 1
    if not vm.write_guest(gpa + _VERSION, struct.pack("<I", version & _MASK32)):
        return
    if _take_preempted(vm, Gpa(gpa)) & uapi.KVM_VCPU_FLUSH_TLB:
        _flush(vcpu)
    steal.preempted, steal.told_at = False, now
    vm.write_guest(gpa + _STEAL, struct.pack("<Q", told + _stolen(steal) & _MASK64))
    vm.write_guest(gpa + _VERSION, struct.pack("<I", version + 1 & _MASK32))


def _stolen(steal: StealTime) -> int:
    """Return what the thread has waited since this was last asked; 0 for one that is new to the vCPU."""
    delay, thread = run_delay() or 0, threading.get_ident()
    waited = delay - steal.last if thread == steal.thread else 0
    steal.last, steal.thread = delay, thread
    return max(waited, 0)


def _take_preempted(vm: Vm, gpa: Gpa) -> int:
    """Clear `preempted` and return what it was; at once, for other vCPUs may be asking for a flush."""
    slot = vm.memslots[0].gfn_to_memslot(gpa >> 12)
    if slot is None:
        return 0
    word = ffi.cast("uint64_t *", slot.hva(gpa >> 12) + gpa % 0x1000 + _PREEMPTED)
    while True:
        old = word[0]
        if lib.spte_cmpxchg(word, old, old & ~0xFF):
            return int(old & 0xFF)


def _flush(vcpu: Vcpu) -> None:
    """Do the flush that another vCPU asked for instead of interrupting one that did not run."""
    if vcpu.pv_has(uapi.KVM_FEATURE_PV_TLB_FLUSH):
        vcpu.cpu.flush_tlb()
        vcpu.vm.mmu.reset_context(vcpu)


def set_preempted(vcpu: Vcpu) -> None:
    """Tell the guest's other vCPUs that this one stopped between two instructions.

    Source: x86.c kvm_steal_time_set_preempted
    """
    steal = vcpu.steal_time
    if steal.preempted or steal.gpa is None:
        return
    flag = bytes((uapi.KVM_VCPU_PREEMPTED,))
    steal.preempted = vcpu.vm.write_guest(steal.gpa + _PREEMPTED, flag)
