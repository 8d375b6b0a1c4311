"""Saving a vCPU and restoring it elsewhere, by the ioctl sequences of QEMU and of Firecracker.

Both first finish what is under way, with immediate_exit; what that gives is the caller's to handle.
Sequences are those of QEMU 7.2's kvm_arch_get_registers and kvm_arch_put_registers and of
Firecracker's KvmVcpu::save_state and restore_state, without the local APIC.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pykvm import uapi
from pykvm.abi import CData, ffi
from tests.machine import cpuid_list, msr_list

if TYPE_CHECKING:
    from tests.machine import Machine

# (request, structure) in the order of the client; None stands for the MSRs.
Step = tuple[int, str] | None

_REGS = (uapi.KVM_GET_REGS, "kvm_regs")
_SREGS = (uapi.KVM_GET_SREGS, "kvm_sregs")
_SREGS2 = (uapi.KVM_GET_SREGS2, "kvm_sregs2")
_XSAVE = (uapi.KVM_GET_XSAVE, "kvm_xsave")
_XSAVE2 = (uapi.KVM_GET_XSAVE2, "kvm_xsave")
_XCRS = (uapi.KVM_GET_XCRS, "kvm_xcrs")
_DEBUGREGS = (uapi.KVM_GET_DEBUGREGS, "kvm_debugregs")
_EVENTS = (uapi.KVM_GET_VCPU_EVENTS, "kvm_vcpu_events")
_MP_STATE = (uapi.KVM_GET_MP_STATE, "kvm_mp_state")
_SETTERS = {
    uapi.KVM_GET_REGS: uapi.KVM_SET_REGS,
    uapi.KVM_GET_SREGS: uapi.KVM_SET_SREGS,
    uapi.KVM_GET_SREGS2: uapi.KVM_SET_SREGS2,
    uapi.KVM_GET_XSAVE: uapi.KVM_SET_XSAVE,
    uapi.KVM_GET_XSAVE2: uapi.KVM_SET_XSAVE,
    uapi.KVM_GET_XCRS: uapi.KVM_SET_XCRS,
    uapi.KVM_GET_DEBUGREGS: uapi.KVM_SET_DEBUGREGS,
    uapi.KVM_GET_VCPU_EVENTS: uapi.KVM_SET_VCPU_EVENTS,
    uapi.KVM_GET_MP_STATE: uapi.KVM_SET_MP_STATE,
}


@dataclass(frozen=True)
class Client:
    """A client's order of saving and of restoring."""

    name: str
    save: tuple[Step, ...]
    restore: tuple[Step, ...]


QEMU = Client(
    "qemu",
    (_EVENTS, _MP_STATE, _REGS, _XSAVE2, _XCRS, _SREGS2, None, _DEBUGREGS),
    (_SREGS2, _REGS, _XSAVE2, _XCRS, None, _EVENTS, _MP_STATE, _DEBUGREGS),
)
FIRECRACKER = Client(
    "firecracker",
    (_MP_STATE, _REGS, _SREGS, _XSAVE2, _XCRS, _DEBUGREGS, None, _EVENTS),
    (_MP_STATE, _REGS, _SREGS, _XSAVE2, _XCRS, _DEBUGREGS, None, _EVENTS),
)
CLIENTS = (QEMU, FIRECRACKER)


@dataclass
class Snapshot:
    """What a client saved: structures by the request that read them, MSRs, CPUID, TSC frequency."""

    structs: dict[int, CData]
    msrs: list[tuple[int, int]]
    cpuid: CData
    tsc_khz: int


def msr_indices(machine: Machine) -> list[int]:
    """Return what KVM_GET_MSR_INDEX_LIST names."""
    listed = ffi.new("struct kvm_msr_list *", {"indices": 512})
    listed.nmsrs = 512
    machine.ioctl(machine.kvm, uapi.KVM_GET_MSR_INDEX_LIST, listed)
    return [listed.indices[at] for at in range(listed.nmsrs)]


# Without a local APIC in the kernel it can be read and not be written, on Linux, too.
_NEEDS_LAPIC = frozenset({uapi.MSR_KVM_ASYNC_PF_INT})


def read_msrs(machine: Machine) -> list[tuple[int, int]]:
    """Return all listed registers; every one must be readable."""
    indices = [index for index in msr_indices(machine) if index not in _NEEDS_LAPIC]
    found: list[tuple[int, int]] = []
    for start in range(0, len(indices), 200):
        msrs = msr_list(*((index, 0) for index in indices[start : start + 200]))
        assert machine.do(uapi.KVM_GET_MSRS, msrs) == msrs.nmsrs
        found += [(msrs.entries[at].index, msrs.entries[at].data) for at in range(msrs.nmsrs)]
    return found


def write_msrs(machine: Machine, values: list[tuple[int, int]]) -> None:
    """Write registers; every one must be taken back."""
    for start in range(0, len(values), 200):
        msrs = msr_list(*values[start : start + 200])
        done = machine.do(uapi.KVM_SET_MSRS, msrs)
        assert done == msrs.nmsrs, f"MSR {values[start + done][0]:#x} is not taken back"


def read_cpuid(machine: Machine) -> CData:
    cpuid = cpuid_list(256)
    machine.do(uapi.KVM_GET_CPUID2, cpuid)
    return cpuid


def save(machine: Machine, client: Client) -> Snapshot:
    """Save a vCPU that nothing is pending for."""
    snapshot = Snapshot({}, [], read_cpuid(machine), machine.do(uapi.KVM_GET_TSC_KHZ))
    for step in client.save:
        if step is None:
            snapshot.msrs = read_msrs(machine)
        else:
            request, struct = step
            snapshot.structs[request] = machine.get(request, struct)
    return snapshot


def restore(machine: Machine, snapshot: Snapshot, client: Client) -> None:
    """Restore a vCPU that has not run yet; memory is in its place already."""
    machine.do(uapi.KVM_SET_TSC_KHZ, snapshot.tsc_khz)
    machine.do(uapi.KVM_SET_CPUID2, snapshot.cpuid)
    for step in client.restore:
        if step is None:
            write_msrs(machine, snapshot.msrs)
        else:
            machine.do(_SETTERS[step[0]], snapshot.structs[step[0]])


def whole_state(machine: Machine) -> dict[str, Any]:
    """Return everything a client can read of a vCPU, but time."""
    volatile = {uapi.MSR_IA32_TSC, uapi.MSR_IA32_TSC_ADJUST}
    steps = (_REGS, _SREGS, _SREGS2, _XSAVE, _XCRS, _DEBUGREGS, _EVENTS, _MP_STATE)
    state: dict[str, Any] = {name: bytes(ffi.buffer(machine.get(request, name))) for request, name in steps}
    cpuid = read_cpuid(machine)
    state["cpuid"] = bytes(ffi.buffer(cpuid.entries, 40 * cpuid.nent))
    state["msrs"] = [each for each in read_msrs(machine) if each[0] not in volatile]
    state["tsc_khz"] = machine.do(uapi.KVM_GET_TSC_KHZ)
    return state


def supported_cpuid(machine: Machine) -> CData:
    """Return KVM_GET_SUPPORTED_CPUID's table."""
    cpuid = cpuid_list(256)
    machine.ioctl(machine.kvm, uapi.KVM_GET_SUPPORTED_CPUID, cpuid)
    return cpuid
