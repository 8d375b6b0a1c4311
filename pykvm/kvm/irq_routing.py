"""GSI routing: which interrupt controller input, or which message, a GSI stands for.

Routes are of use to interrupt controllers in the kernel only.  A VM without one has none, and refuses
them; clients that keep the controllers themselves ask for the capability all the same.
"""

from __future__ import annotations

from errno import EINVAL
from typing import TYPE_CHECKING

from pykvm.abi.errors import KvmError
from pykvm.abi.ioctl import In, vm_ioctl
from pykvm.kvm.caps import capability

if TYPE_CHECKING:
    from pykvm.abi import CData
    from pykvm.kvm.vm import Vm

KVM_MAX_IRQ_ROUTES = 4096

capability("KVM_CAP_IRQ_ROUTING", KVM_MAX_IRQ_ROUTES)


@vm_ioctl("KVM_SET_GSI_ROUTING", In("struct kvm_irq_routing"), cap="KVM_CAP_IRQ_ROUTING")
def set_gsi_routing(vm: Vm, routing: CData) -> int:
    """Replace the routes; without interrupt controllers in the kernel there are none to replace.

    Errors:
        EINVAL  the VM has no interrupt controller in the kernel
    Source: api.rst 4.52; kvm_main.c kvm_vm_ioctl, x86 irq.c kvm_arch_can_set_irq_routing
    """
    del vm
    raise KvmError(EINVAL, f"{routing.nr} routes, but no interrupt controller in the kernel")
