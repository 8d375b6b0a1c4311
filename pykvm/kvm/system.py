"""/dev/kvm itself: the object behind its descriptors, and its own ioctls."""

from __future__ import annotations

from errno import EINVAL
from typing import TYPE_CHECKING

from pykvm.abi import uapi
from pykvm.abi.errors import KvmError
from pykvm.abi.ioctl import NoArg, Value, system_ioctl
from pykvm.fd.table import anon_inode_getfd
from pykvm.kvm import profile
from pykvm.kvm.offer import offer
from pykvm.kvm.vm import VCPU_MMAP_SIZE, Vm

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pykvm.kvm.profile import Kernel, Processor

# What a client can ask for; without it pykvm answers as upstream x86 does with its defaults.
# no-tdp: shadow paging instead of two-dimensional (kvm_intel.ept=0).
EXTENSIONS = frozenset({"x86-osi", "no-tdp"})


class System:
    """What one open of /dev/kvm is: the options its VMs are made with.

    `extensions`: names of `EXTENSIONS` that are on.  `kernel`, `processor`: what it claims to be;
    `offer`: what follows for CPUID; `absent_msrs`: registers that either has not.
    """

    def __init__(
        self, extensions: Iterable[str] = (), *, kernel: str | None = None, cpu: str | None = None
    ) -> None:
        """Take the options.

        kernel, cpu: names of profiles; None: the default.
        Raises ValueError for an extension or a profile that does not exist.
        """
        self.kernel: Kernel = profile.kernel(kernel or profile.DEFAULT_KERNEL)
        self.processor: Processor = profile.processor(cpu or profile.DEFAULT_PROCESSOR)
        self.extensions = frozenset(extensions) | self.kernel.extensions
        if not self.processor.two_dimensional_paging:
            self.extensions |= {"no-tdp"}
        if unknown := self.extensions - EXTENSIONS:
            msg = f"no extension {', '.join(sorted(unknown))}; there are {', '.join(sorted(EXTENSIONS))}"
            raise ValueError(msg)
        self.offer = offer(self.kernel, self.processor, tdp="no-tdp" not in self.extensions)
        self.absent_msrs = self.kernel.msrs.absent | self.processor.absent_msrs

    @property
    def system(self) -> System:
        """Return itself: a capability is asked of a System or a Vm, and both have `system`."""
        return self

    @property
    def absent_requests(self) -> frozenset[int]:
        """Requests on /dev/kvm that its kernel does not know."""
        return profile.absent_requests(self.kernel, "system")

    def open(self, *, cloexec: bool = True) -> int:
        """Open the device and return a descriptor that the caller owns.  Raises EMFILE, ENFILE."""
        return anon_inode_getfd("kvm", "system", self, cloexec=cloexec)

    def release(self) -> None:
        """Let the last descriptor go; VMs hold the System themselves."""


@system_ioctl("KVM_GET_API_VERSION", NoArg())
def get_api_version(system: System) -> int:
    """Return 12, the version of the stable API.

    Errors:
        EINVAL  the argument is not 0
    Source: api.rst 4.1; kvm_main.c kvm_dev_ioctl
    """
    del system
    return uapi.KVM_API_VERSION


@system_ioctl("KVM_GET_VCPU_MMAP_SIZE", NoArg())
def get_vcpu_mmap_size(system: System) -> int:
    """Return the bytes a client maps of a vCPU: kvm_run, PIO data and the coalesced ring, a page each.

    Errors:
        EINVAL  the argument is not 0
    Source: api.rst 4.5; kvm_main.c kvm_dev_ioctl
    """
    del system
    return VCPU_MMAP_SIZE


@system_ioctl("KVM_CREATE_VM", Value())
def create_vm(system: System, machine_type: int) -> int:
    """Make a VM without vCPUs and memory, and return its descriptor.

    machine_type: KVM_X86_DEFAULT_VM.

    Errors:
        EINVAL  a machine type that is not in KVM_CAP_VM_TYPES
        EMFILE, ENFILE  no descriptor left
    Source: api.rst 4.2; kvm_main.c kvm_dev_ioctl_create_vm
    """
    if machine_type != uapi.KVM_X86_DEFAULT_VM:
        raise KvmError(EINVAL, f"no machine type {machine_type:#x}")
    return Vm(system).open()
