"""KVM's own registers, for paravirtual guests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pykvm.abi import uapi
from pykvm.kvm import clock, steal_time
from pykvm.kvm.caps import Args, vcpu_cap
from pykvm.kvm.msr import Check, invalid, msr, stored, unsupported

if TYPE_CHECKING:
    from pykvm.kvm.vcpu import Vcpu


def guest_pv_has(vcpu: Vcpu, feature: int) -> bool:
    """Say if the guest has a KVM_FEATURE_*: all of them, unless the client wants CPUID to rule."""
    return vcpu.pv_has(feature)


@vcpu_cap("KVM_CAP_ENFORCE_PV_FEATURE_CPUID")
def enforce_pv_feature_cpuid(vcpu: Vcpu, args: Args) -> int:
    """Have paravirtual registers and hypercalls follow the guest's CPUID: args[0] on or off.

    Errors: none
    Source: api.rst 6.13
    """
    vcpu.msrs.pv_enforce = bool(args[0])
    return 0


def _clock_msrs(wall: int, system: int, feature: int, *, old: bool) -> None:
    @msr(wall, save=True)
    def wall_clock(vcpu: Vcpu, index: int, host: bool) -> int:
        del index, host
        if not guest_pv_has(vcpu, feature):
            raise unsupported()
        return vcpu.vm.clock.wall_clock

    @wall_clock.writer
    def _write_wall_clock(vcpu: Vcpu, index: int, data: int, host: bool) -> None:
        del index, host
        if not guest_pv_has(vcpu, feature):
            raise unsupported()
        clock.write_wall_clock(vcpu.vm, data)

    @msr(system, save=True)
    def system_time(vcpu: Vcpu, index: int, host: bool) -> int:
        del index, host
        if not guest_pv_has(vcpu, feature):
            raise unsupported()
        return vcpu.clock.system_time

    @system_time.writer
    def _write_system_time(vcpu: Vcpu, index: int, data: int, host: bool) -> None:
        del index
        if not guest_pv_has(vcpu, feature):
            raise unsupported()
        clock.write_system_time(vcpu, data, old_msr=old, host=host)


_clock_msrs(uapi.MSR_KVM_WALL_CLOCK, uapi.MSR_KVM_SYSTEM_TIME, uapi.KVM_FEATURE_CLOCKSOURCE, old=True)
_clock_msrs(
    uapi.MSR_KVM_WALL_CLOCK_NEW, uapi.MSR_KVM_SYSTEM_TIME_NEW, uapi.KVM_FEATURE_CLOCKSOURCE2, old=False
)


def _pv_stored(index: int, feature: int, check: Check | None = None, *, reset: int = 0) -> None:
    row = stored(index, reset=reset, save=True)

    def read(vcpu: Vcpu, index: int, host: bool) -> int:
        del host
        if not guest_pv_has(vcpu, feature):
            raise unsupported()
        return vcpu.msrs.get(index)

    row.read = read

    @row.writer
    def _write(vcpu: Vcpu, index: int, data: int, host: bool) -> None:
        if not guest_pv_has(vcpu, feature):
            raise unsupported()
        if check is not None and not check(vcpu, data, host):
            raise invalid()
        vcpu.msrs.values[index] = data


_APF_RESERVED = 0x30


def _can_enable_apf(vcpu: Vcpu, data: int, host: bool) -> bool:
    """Say if asynchronous page faults can be turned on so: with a local APIC in the kernel only.

    Source: x86.c kvm_pv_enable_async_pf
    """
    del host
    if data & _APF_RESERVED:
        return False
    for bit, feature in (
        (uapi.KVM_ASYNC_PF_DELIVERY_AS_PF_VMEXIT, uapi.KVM_FEATURE_ASYNC_PF_VMEXIT),
        (uapi.KVM_ASYNC_PF_DELIVERY_AS_INT, uapi.KVM_FEATURE_ASYNC_PF_INT),
    ):
        if data & bit and not guest_pv_has(vcpu, feature):
            return False
    return vcpu.lapic_in_kernel or not data


_pv_stored(uapi.MSR_KVM_ASYNC_PF_EN, uapi.KVM_FEATURE_ASYNC_PF, _can_enable_apf)
_pv_stored(
    uapi.MSR_KVM_ASYNC_PF_INT,
    uapi.KVM_FEATURE_ASYNC_PF_INT,
    lambda vcpu, data, _host: not data >> 8 and vcpu.lapic_in_kernel,
)


@msr(uapi.MSR_KVM_ASYNC_PF_ACK, save=True)
def async_pf_ack(vcpu: Vcpu, index: int, host: bool) -> int:
    """Where the guest says that it has seen a page come: there never is one that it waits for."""
    del index, host
    if not guest_pv_has(vcpu, uapi.KVM_FEATURE_ASYNC_PF_INT):
        raise unsupported()
    return 0


@async_pf_ack.writer
def _write_async_pf_ack(vcpu: Vcpu, index: int, data: int, host: bool) -> None:
    del index, data, host
    if not guest_pv_has(vcpu, uapi.KVM_FEATURE_ASYNC_PF_INT):
        raise unsupported()


@msr(uapi.MSR_KVM_STEAL_TIME, save=True)
def steal_time_msr(vcpu: Vcpu, index: int, host: bool) -> int:
    """Where the guest wants to be told of stolen time."""
    del host
    if not guest_pv_has(vcpu, uapi.KVM_FEATURE_STEAL_TIME):
        raise unsupported()
    return vcpu.msrs.get(index)


@steal_time_msr.writer
def _write_steal_time(vcpu: Vcpu, index: int, data: int, host: bool) -> None:
    del host
    if not guest_pv_has(vcpu, uapi.KVM_FEATURE_STEAL_TIME):
        raise unsupported()
    if data & uapi.KVM_STEAL_RESERVED_MASK:
        raise invalid()
    vcpu.msrs.values[index] = data
    steal_time.enable(vcpu, data)


def _can_enable_pv_eoi(vcpu: Vcpu, data: int, host: bool) -> bool:
    """Say if the guest's word can be there; without a local APIC in the kernel nobody writes it.

    Source: lapic.c kvm_lapic_set_pv_eoi
    """
    del host
    slot = vcpu.vm.memslots[0].gfn_to_memslot(data >> 12)
    return not data & 2 and (not data & 1 or slot is not None)


_pv_stored(uapi.MSR_KVM_PV_EOI_EN, uapi.KVM_FEATURE_PV_EOI, _can_enable_pv_eoi)
_pv_stored(
    uapi.MSR_KVM_POLL_CONTROL,
    uapi.KVM_FEATURE_POLL_CONTROL,
    lambda _vcpu, data, _host: not data >> 1,
    reset=1,
)
