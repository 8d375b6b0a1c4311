"""Time: the guest's TSC, kvmclock and its page in guest memory.

All clocks are made from the host's TSC.  A vCPU's TSC is the host's, scaled and with an offset;
vCPUs that start together get the same offset.  kvmclock counts nanoseconds since the VM was made;
every vCPU's page tells it by the same snapshot of TSC and clock, so that it never runs backwards
from one vCPU to another ("master clock").
"""

from __future__ import annotations

import struct
import threading
import time
from dataclasses import dataclass
from errno import EINVAL, ENXIO
from functools import cache
from typing import TYPE_CHECKING

from pykvm.abi import CData, ffi, lib, uapi
from pykvm.abi.errors import KvmError
from pykvm.abi.ioctl import Ignored, In, Out, Value, vcpu_ioctl, vm_ioctl
from pykvm.kvm.caps import capability

if TYPE_CHECKING:
    from pykvm.abi.uaccess import UserMemory
    from pykvm.kvm.vcpu import Vcpu
    from pykvm.kvm.vm import Vm

NSEC_PER_SEC = 1_000_000_000
_MASK64 = 0xFFFF_FFFF_FFFF_FFFF
# ctl.tsc_ratio: 16.48 fixed point.
_RATIO_BITS = 48
# vmx.c: what the VMCS multiplier can scale to, as far as tsc_khz is an int.
MAX_GUEST_TSC_KHZ = 0x7FFF_FFFF
_CALIBRATION_NS = 20_000_000
_PAGE_SIZE = 4096
_PVCLOCK = struct.Struct("<IIQQIbB2x")
_CLOCK_FLAGS = uapi.KVM_CLOCK_TSC_STABLE | uapi.KVM_CLOCK_REALTIME | uapi.KVM_CLOCK_HOST_TSC

capability("KVM_CAP_CLOCKSOURCE", 1)
capability("KVM_CAP_ADJUST_CLOCK", _CLOCK_FLAGS)


def _now() -> tuple[int, int]:
    """Return (host TSC, CLOCK_MONOTONIC_RAW in ns) of one moment."""
    return lib.host_tsc(), time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)


_import_time = _now()


@cache
def host_tsc_khz() -> int:
    """Return the frequency of the host's TSC, measured since this module was imported."""
    tsc, ns = _now()
    if ns - _import_time[1] < _CALIBRATION_NS:
        time.sleep(_CALIBRATION_NS / NSEC_PER_SEC)
        tsc, ns = _now()
    return (tsc - _import_time[0]) * 1_000_000 // (ns - _import_time[1])


def time_scale(khz: int) -> tuple[int, int]:
    """Return (tsc_to_system_mul, tsc_shift) of a TSC frequency: ns = (ticks << shift) * mul >> 32."""
    shift = NSEC_PER_SEC.bit_length() - (khz * 1000).bit_length()
    mul = _mul(khz, shift)
    while mul >= 1 << 32:
        shift += 1
        mul = _mul(khz, shift)
    while mul < 1 << 31:
        shift -= 1
        mul = _mul(khz, shift)
    return mul, shift


def _mul(khz: int, shift: int) -> int:
    numerator, denominator = NSEC_PER_SEC << 32, khz * 1000
    return numerator // (denominator << shift) if shift >= 0 else (numerator << -shift) // denominator


def cycles_to_ns(cycles: int, khz: int) -> int:
    """Return the nanoseconds that cycles of a TSC take."""
    return cycles * 1_000_000 // khz


def ns_to_cycles(ns: int, khz: int) -> int:
    """Return the cycles that a TSC counts in so many nanoseconds."""
    return ns * khz // 1_000_000


# ---- the VM's clock ------------------------------------------------------------------------------


class VmClock:
    """The clocks a VM's vCPUs share: what TSCs are synchronised by, and kvmclock.

    `default_tsc_khz`: frequency of new vCPUs.  `last_*`, `cur_tsc_offset`: the last write of a TSC.
    `master`: (host TSC, kvmclock in ns) of one moment.  `wall_clock`: gpa last given for the time of
    day.
    """

    def __init__(self) -> None:
        """Start kvmclock at 0."""
        self.default_tsc_khz = host_tsc_khz()
        # vCPUs restored by several threads at once; a client's signal handler may come in between.
        self.tsc_write_lock = threading.RLock()
        self.last_tsc_ns = 0
        self.last_tsc_write = 0
        self.last_tsc_khz = 0
        self.cur_tsc_offset = 0
        self.user_set_tsc = False
        self.master: tuple[int, int] = (lib.host_tsc(), 0)
        self.boot_vcpu_runs_old_kvmclock = False
        self.wall_clock = 0

    def kvmclock(self) -> int:
        """Return kvmclock now, in nanoseconds."""
        return self.kvmclock_at(lib.host_tsc())

    def kvmclock_at(self, host_tsc: int) -> int:
        """Return kvmclock at a moment of the host's TSC."""
        tsc, ns = self.master
        return (ns + cycles_to_ns(host_tsc - tsc, host_tsc_khz())) & _MASK64


def is_master_clock(vm: Vm) -> bool:
    """Say if all vCPUs' TSCs agree, so that kvmclock is one clock for all of them."""
    offsets = {(v.clock.virtual_tsc_khz, v.cpu.ctl.tsc_offset) for v in tuple(vm.vcpus.values())}
    return vm.kernel.behaviour.master_clock and len(offsets) <= 1 and not vm.clock.boot_vcpu_runs_old_kvmclock


def request_global_update(vm: Vm) -> None:
    """Have every vCPU write its page anew (KVM_REQ_GLOBAL_CLOCK_UPDATE)."""
    for vcpu in tuple(vm.vcpus.values()):
        vcpu.clock.update_requested = True
        vcpu.events.requested = True


@vm_ioctl("KVM_GET_CLOCK", Out("struct kvm_clock_data"), cap="KVM_CAP_ADJUST_CLOCK")
def get_clock(vm: Vm) -> CData:
    """Return kvmclock, with the host's time of day and TSC at the same moment.

    Errors: none
    Source: api.rst 4.29; x86.c kvm_vm_ioctl_get_clock
    """
    data = ffi.new("struct kvm_clock_data *")
    host_tsc = lib.host_tsc()
    realtime = time.time_ns()
    data.clock = vm.clock.kvmclock_at(host_tsc)
    flags = uapi.KVM_CLOCK_REALTIME | uapi.KVM_CLOCK_HOST_TSC
    if is_master_clock(vm):
        flags |= uapi.KVM_CLOCK_TSC_STABLE
    data.flags = flags & vm.kernel.behaviour.clock_get_flags
    if data.flags & uapi.KVM_CLOCK_REALTIME:
        data.realtime, data.host_tsc = realtime, host_tsc
    return data


@vm_ioctl("KVM_SET_CLOCK", In("struct kvm_clock_data"), cap="KVM_CAP_ADJUST_CLOCK")
def set_clock(vm: Vm, data: CData) -> int:
    """Set kvmclock; with KVM_CLOCK_REALTIME the time that passed since is added.

    Errors:
        EINVAL  unknown flags
    Source: api.rst 4.30; x86.c kvm_vm_ioctl_set_clock
    """
    if data.flags & ~vm.kernel.behaviour.clock_set_flags:
        raise KvmError(EINVAL, f"unknown flags {data.flags:#x}")
    clock = data.clock
    if data.flags & uapi.KVM_CLOCK_REALTIME:
        clock += max(time.time_ns() - data.realtime, 0)
    vm.clock.master = (lib.host_tsc(), clock & _MASK64)
    request_global_update(vm)
    return 0


# ---- a vCPU's clock ------------------------------------------------------------------------------


@dataclass(slots=True)
class VcpuClock:
    """The clocks of one vCPU.

    `system_time`: MSR_KVM_SYSTEM_TIME, gpa of the page and bit 0 for "on".  `update_requested`: write
    the page before the next entry.  `guest_stopped`: tell the guest that it was paused.
    """

    virtual_tsc_khz: int = 0
    tsc_adjust: int = 0
    system_time: int = 0
    update_requested: bool = False
    guest_stopped: bool = False

    @property
    def has_page(self) -> bool:
        """Say if kvmclock is on; where its structure would cross pages it is not (kvm_gpc_activate)."""
        gpa = self.system_time & ~1
        return bool(self.system_time & 1) and gpa % _PAGE_SIZE <= _PAGE_SIZE - _PVCLOCK.size


def scale_tsc(vcpu: Vcpu, host_tsc: int) -> int:
    """Return a host TSC value at the vCPU's frequency, without its offset."""
    ratio: int = vcpu.cpu.ctl.tsc_ratio
    return host_tsc * ratio >> _RATIO_BITS & _MASK64 if ratio else host_tsc


def read_tsc(vcpu: Vcpu) -> int:
    """Return the guest's TSC now."""
    offset: int = vcpu.cpu.ctl.tsc_offset
    return (scale_tsc(vcpu, lib.host_tsc()) + offset) & _MASK64


def set_tsc_khz_of(vcpu: Vcpu, khz: int) -> None:
    """Set a vCPU's TSC frequency."""
    host = host_tsc_khz()
    vcpu.clock.virtual_tsc_khz = khz
    vcpu.cpu.ctl.tsc_ratio = 0 if khz == host else (khz << _RATIO_BITS) // host


def synchronize_tsc(vcpu: Vcpu, value: int | None) -> None:
    """Set the guest's TSC from outside: for a new vCPU (None) or by KVM_SET_MSRS.

    vCPUs get the same offset when the value is 0, or within a second of what the last written TSC
    would be by now: that is how clients restore several vCPUs one after another.
    Source: x86.c kvm_synchronize_tsc
    """
    vm_clock, clock = vcpu.vm.clock, vcpu.clock
    if not clock.virtual_tsc_khz:
        set_tsc_khz_of(vcpu, vm_clock.default_tsc_khz)
    khz, data = clock.virtual_tsc_khz, value or 0
    with vm_clock.tsc_write_lock:
        tsc, ns = _now()
        offset = (data - scale_tsc(vcpu, tsc)) & _MASK64
        synchronizing = data == 0
        if data and vm_clock.user_set_tsc:
            expected = vm_clock.last_tsc_write + ns_to_cycles(ns - vm_clock.last_tsc_ns, khz)
            synchronizing = abs(data - expected) < khz * 1000
        if value is not None:
            vm_clock.user_set_tsc = True
        if synchronizing and khz == vm_clock.last_tsc_khz:
            offset = vm_clock.cur_tsc_offset
        vm_clock.last_tsc_ns, vm_clock.last_tsc_write, vm_clock.last_tsc_khz = ns, data, khz
        vm_clock.cur_tsc_offset = offset
        vcpu.cpu.ctl.tsc_offset = offset
    clock.update_requested = vcpu.events.requested = True


def adjust_tsc_offset(vcpu: Vcpu, delta: int) -> None:
    """Move the guest's TSC by so many ticks."""
    ctl = vcpu.cpu.ctl
    ctl.tsc_offset = (ctl.tsc_offset + delta) & _MASK64
    vcpu.clock.update_requested = vcpu.events.requested = True


# ---- kvmclock's pages ----------------------------------------------------------------------------


def write_system_time(vcpu: Vcpu, value: int, *, old_msr: bool, host: bool) -> None:
    """Write MSR_KVM_SYSTEM_TIME: where the page is, and if it is on (kvm_write_system_time)."""
    if vcpu.id == 0 and not host:
        vcpu.vm.clock.boot_vcpu_runs_old_kvmclock = old_msr
    vcpu.clock.system_time = value
    request_global_update(vcpu.vm)


def update_guest_time(vcpu: Vcpu) -> None:
    """Write struct pvclock_vcpu_time_info into the guest's page (kvm_guest_time_update).

    The version is odd while the page is inconsistent; a guest reads again when it saw an odd or a
    changed one.
    """
    clock, vm = vcpu.clock, vcpu.vm
    clock.update_requested = False
    if not clock.has_page:
        return
    gpa = clock.system_time & ~1
    page = vm.read_guest(gpa, _PVCLOCK.size, vcpu.as_id)
    if page is None:
        return
    version, _, _, _, _, _, old_flags = _PVCLOCK.unpack(page)
    version = (version + 1 | 1) & 0xFFFF_FFFF
    host_tsc, ns = vm.clock.master
    flags = old_flags & uapi.PVCLOCK_GUEST_STOPPED
    if clock.guest_stopped:
        flags |= uapi.PVCLOCK_GUEST_STOPPED
        clock.guest_stopped = False
    if is_master_clock(vm):
        flags |= uapi.PVCLOCK_TSC_STABLE_BIT
    else:
        host_tsc = lib.host_tsc()
        ns = vm.clock.kvmclock_at(host_tsc)
    tsc = (scale_tsc(vcpu, host_tsc) + vcpu.cpu.ctl.tsc_offset) & _MASK64
    mul, shift = time_scale(clock.virtual_tsc_khz)
    vm.write_guest(gpa, version.to_bytes(4, "little"), vcpu.as_id)
    vm.write_guest(gpa, _PVCLOCK.pack(version, 0, tsc, ns, mul, shift, flags), vcpu.as_id)
    vm.write_guest(gpa, ((version + 1) & 0xFFFF_FFFF).to_bytes(4, "little"), vcpu.as_id)


def write_wall_clock(vm: Vm, gpa: int) -> None:
    """Write struct pvclock_wall_clock: the time of day when kvmclock was 0 (kvm_write_wall_clock)."""
    vm.clock.wall_clock = gpa
    raw = vm.read_guest(gpa, 4) if gpa else None
    if raw is None:
        return
    version = int.from_bytes(raw, "little")
    # Odd at the first write is garbage: make it even first.
    version = version + (version & 1) + 1 & 0xFFFF_FFFF
    if not vm.write_guest(gpa, version.to_bytes(4, "little")):
        return
    sec, nsec = divmod(time.time_ns() - vm.clock.kvmclock(), NSEC_PER_SEC)
    vm.write_guest(gpa, struct.pack("<III", version, sec & 0xFFFF_FFFF, nsec))
    vm.write_guest(gpa, (version + 1 & 0xFFFF_FFFF).to_bytes(4, "little"))


@vcpu_ioctl("KVM_KVMCLOCK_CTRL", Ignored(), cap="KVM_CAP_KVMCLOCK_CTRL")
def kvmclock_ctrl(vcpu: Vcpu) -> int:
    """Tell the guest, by a flag in its page, that it was stopped: its watchdogs must not bark.

    Errors:
        EINVAL  the guest has not turned kvmclock on
    Source: api.rst 4.72; x86.c kvm_set_guest_paused
    """
    if not vcpu.clock.has_page:
        raise KvmError(EINVAL, "the guest has no kvmclock")
    vcpu.clock.guest_stopped = True
    vcpu.clock.update_requested = vcpu.events.requested = True
    return 0


# ---- TSC ioctls ----------------------------------------------------------------------------------


def _wanted_khz(khz: int) -> int:
    khz &= 0xFFFF_FFFF
    if khz >= MAX_GUEST_TSC_KHZ:
        raise KvmError(EINVAL, f"{khz} kHz: at most {MAX_GUEST_TSC_KHZ}")
    return khz or host_tsc_khz()


@vcpu_ioctl("KVM_SET_TSC_KHZ", Value(), cap="KVM_CAP_TSC_CONTROL")
def set_tsc_khz(vcpu: Vcpu, khz: int) -> int:
    """Set the frequency of the vCPU's TSC in kHz; 0: the host's.

    Errors:
        EINVAL  too high
    Source: api.rst 4.55; x86.c kvm_set_tsc_khz
    """
    set_tsc_khz_of(vcpu, _wanted_khz(khz))
    vcpu.clock.update_requested = vcpu.events.requested = True
    return 0


@vcpu_ioctl("KVM_GET_TSC_KHZ", Ignored(), cap="KVM_CAP_GET_TSC_KHZ")
def get_tsc_khz(vcpu: Vcpu) -> int:
    """Return the frequency of the vCPU's TSC in kHz.

    Errors: none
    Source: api.rst 4.56
    """
    return vcpu.clock.virtual_tsc_khz


@vm_ioctl("KVM_SET_TSC_KHZ", Value(), cap="KVM_CAP_VM_TSC_CONTROL")
def vm_set_tsc_khz(vm: Vm, khz: int) -> int:
    """Set the TSC frequency of the vCPUs that will be made, in kHz; 0: the host's.

    Errors:
        EINVAL  too high; a vCPU exists
    Source: api.rst 4.55; x86.c kvm_arch_vm_ioctl
    """
    wanted = _wanted_khz(khz)
    with vm.lock:
        if vm.created_vcpus and vm.kernel.behaviour.tsc_khz_fixed:
            raise KvmError(EINVAL, "a vCPU exists")
        vm.clock.default_tsc_khz = wanted
    return 0


@vm_ioctl("KVM_GET_TSC_KHZ", Ignored(), cap="KVM_CAP_VM_TSC_CONTROL")
def vm_get_tsc_khz(vm: Vm) -> int:
    """Return the TSC frequency of the vCPUs that will be made, in kHz.

    Errors: none
    Source: api.rst 4.56
    """
    return vm.clock.default_tsc_khz


def _check_attr(attr: CData) -> None:
    if attr.group != uapi.KVM_VCPU_TSC_CTRL or attr.attr != uapi.KVM_VCPU_TSC_OFFSET:
        raise KvmError(ENXIO, f"no attribute {attr.attr} in group {attr.group}")


@vcpu_ioctl("KVM_HAS_DEVICE_ATTR", In("struct kvm_device_attr"), cap="KVM_CAP_VCPU_ATTRIBUTES")
def has_device_attr(vcpu: Vcpu, attr: CData) -> int:
    """Say if the vCPU has an attribute: group KVM_VCPU_TSC_CTRL has KVM_VCPU_TSC_OFFSET.

    Errors:
        ENXIO  it has not
    Source: api.rst 4.81; Documentation/virt/kvm/devices/vcpu.rst 4
    """
    del vcpu
    _check_attr(attr)
    return 0


@vcpu_ioctl("KVM_GET_DEVICE_ATTR", In("struct kvm_device_attr"), cap="KVM_CAP_VCPU_ATTRIBUTES", user=True)
def get_device_attr(vcpu: Vcpu, attr: CData, user: UserMemory) -> int:
    """Write the offset of the vCPU's TSC from the host's, 64 bits, to where attr.addr points.

    Errors:
        ENXIO  no such attribute
    Source: api.rst 4.80; Documentation/virt/kvm/devices/vcpu.rst 4
    """
    _check_attr(attr)
    user.write(attr.addr, vcpu.cpu.ctl.tsc_offset.to_bytes(8, "little"))
    return 0


@vcpu_ioctl("KVM_SET_DEVICE_ATTR", In("struct kvm_device_attr"), cap="KVM_CAP_VCPU_ATTRIBUTES", user=True)
def set_device_attr(vcpu: Vcpu, attr: CData, user: UserMemory) -> int:
    """Set the offset of the vCPU's TSC from the host's to the 64 bits that attr.addr points to.

    Errors:
        ENXIO  no such attribute
    Source: api.rst 4.80; Documentation/virt/kvm/devices/vcpu.rst 4
    """
    _check_attr(attr)
    offset = int.from_bytes(user.read(attr.addr, 8), "little")
    vm_clock, clock = vcpu.vm.clock, vcpu.clock
    with vm_clock.tsc_write_lock:
        tsc, ns = _now()
        vm_clock.user_set_tsc = True
        vm_clock.last_tsc_ns, vm_clock.last_tsc_khz = ns, clock.virtual_tsc_khz
        vm_clock.last_tsc_write = (scale_tsc(vcpu, tsc) + offset) & _MASK64
        vm_clock.cur_tsc_offset = offset
        vcpu.cpu.ctl.tsc_offset = offset
    clock.update_requested = vcpu.events.requested = True
    return 0
