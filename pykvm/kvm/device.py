"""Devices made by number, of which x86 has only VFIO's and pykvm none; attributes of /dev/kvm itself."""

from __future__ import annotations

from errno import ENODEV, ENXIO
from typing import TYPE_CHECKING

from pykvm.abi import CData, uapi
from pykvm.abi.errors import KvmError
from pykvm.abi.ioctl import In, InOut, system_ioctl, vm_ioctl

if TYPE_CHECKING:
    from pykvm.abi.uaccess import UserMemory
    from pykvm.kvm.system import System
    from pykvm.kvm.vm import Vm


@vm_ioctl("KVM_CREATE_DEVICE", InOut("struct kvm_create_device"), cap="KVM_CAP_DEVICE_CTRL")
def create_device(vm: Vm, request: CData) -> int:
    """Make a device, or with KVM_CREATE_DEVICE_TEST say if there is one of this type; flags come later.

    Errors:
        ENODEV  no such type: there are no VFIO devices to pass through
    Source: api.rst 4.79; kvm_main.c kvm_ioctl_create_device
    """
    del vm
    raise KvmError(ENODEV, f"no device of type {request.type}")


def _check_attr(attr: CData) -> None:
    if attr.group != uapi.KVM_X86_GRP_SYSTEM or attr.attr != uapi.KVM_X86_XCOMP_GUEST_SUPP:
        raise KvmError(ENXIO, f"no attribute {attr.attr} in group {attr.group}")


@system_ioctl("KVM_HAS_DEVICE_ATTR", In("struct kvm_device_attr"), cap="KVM_CAP_SYS_ATTRIBUTES")
def has_device_attr(system: System, attr: CData) -> int:
    """Say if /dev/kvm has an attribute: group 0 has KVM_X86_XCOMP_GUEST_SUPP.

    Errors:
        ENXIO  it has not
    Source: api.rst 4.81; x86.c kvm_x86_dev_has_attr
    """
    del system
    _check_attr(attr)
    return 0


@system_ioctl("KVM_GET_DEVICE_ATTR", In("struct kvm_device_attr"), cap="KVM_CAP_SYS_ATTRIBUTES", user=True)
def get_device_attr(system: System, attr: CData, user: UserMemory) -> int:
    """Write the XCR0 that guests can have, 64 bits, to where attr.addr points.

    Errors:
        ENXIO  no such attribute
    Source: api.rst 4.80; x86.c kvm_x86_dev_get_attr
    """
    _check_attr(attr)
    user.write(attr.addr, system.offer.xcr0.to_bytes(8, "little"))
    return 0
