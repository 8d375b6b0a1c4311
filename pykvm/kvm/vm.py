"""The VM: what its vCPUs share, how long it lives, and the ioctls about its making."""

from __future__ import annotations

import os
import threading
from errno import EBUSY, EEXIST, EINVAL
from typing import TYPE_CHECKING

from pykvm.abi import CData, Gpa, ffi, uapi
from pykvm.abi.errors import KvmError
from pykvm.abi.ioctl import User, Value, vm_ioctl
from pykvm.abi.uaccess import UserMemory, address_of
from pykvm.fd.table import File, anon_inode_getfd
from pykvm.kvm import memslots
from pykvm.kvm.caps import Args, capability, check_extension, vm_cap
from pykvm.kvm.clock import VmClock
from pykvm.kvm.coalesced_mmio import CoalescedMmio
from pykvm.kvm.dirty_ring import OFFSET as DIRTY_RING_OFFSET
from pykvm.kvm.dirty_ring import make_ring
from pykvm.kvm.profile import absent_requests
from pykvm.kvm.vcpu import Vcpu
from pykvm.mmu import new_mmu

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable

    from pykvm.kvm.msr_filter import MsrFilter
    from pykvm.kvm.stats import StatsFile
    from pykvm.kvm.system import System

PAGE_SIZE = 4096
# kvm_run, the PIO data page, the coalesced MMIO ring.
VCPU_MMAP_SIZE = 3 * PAGE_SIZE
DEFAULT_IDENTITY_MAP_ADDR = 0xFFFB_C000
# Three pages end at 4 GiB: x86.c kvm_vm_ioctl_set_tss_addr.
MAX_TSS_ADDR = 0xFFFF_D000
TSS_PAGES = 3
# Number of that slot among KVM's own, which come behind the client's.
TSS_PRIVATE_MEMSLOT = 0

capability("KVM_CAP_MULTI_ADDRESS_SPACE", lambda of: of.system.kernel.limits.address_spaces)
capability("KVM_CAP_MAX_VCPU_ID", lambda of: of.system.kernel.limits.vcpu_ids)


class _Live:
    """The VMs of this process that are not destroyed."""

    def __init__(self) -> None:
        self.start_anew()

    def start_anew(self) -> None:
        self.lock = threading.RLock()  # a client's signal handler may come in between
        self.vms: set[Vm] = set()

    def add(self, vm: Vm) -> None:
        with self.lock:
            self.vms.add(vm)

    def discard(self, vm: Vm) -> None:
        with self.lock:
            self.vms.discard(vm)


_live = _Live()
# The parent's VMs are not the child's, and another thread may have held the lock.
os.register_at_fork(after_in_child=_live.start_anew)


def live_vms() -> tuple[Vm, ...]:
    """Return the VMs of this process that are not destroyed."""
    with _live.lock:
        return tuple(_live.vms)


class Vm:
    """A VM.  It lives until its own, its vCPUs' and its devices' descriptors and mappings are gone.

    `lock`: the kernel's kvm->lock, for what is made and configured; `slots_lock`: kvm->slots_lock.
    `vcpus`: by id, in the order they were made.  `memslots`: one snapshot per address space.
    `kernel`, `processor`: what it claims to be made by; `absent_msrs`: registers that those have not.
    `is_dead`: it can be used no more, see `die`.
    `tss_addr`, `identity_map_addr`: stored and given back to nobody; this processor needs neither.
    `private_memory`: behind slots that are KVM's own, by slot.
    """

    def __init__(self, system: System) -> None:
        """Make a VM without vCPUs and memory."""
        self.system: System = system
        self.kernel = system.kernel
        self.processor = system.processor
        self.absent_msrs = system.absent_msrs
        self.lock = threading.RLock()
        self.slots_lock = threading.RLock()
        self.vcpus: dict[int, Vcpu] = {}
        self.created_vcpus = 0
        self.is_dead = False
        self.max_vcpu_ids = 0
        self.boot_cpu_id = 0
        self.tss_addr: Gpa | None = None
        self.identity_map_addr = Gpa(DEFAULT_IDENTITY_MAP_ADDR)
        self.max_halt_poll_ns: int | None = None
        self.dirty_log_manual_protect = False
        self.dirty_log_initially_set = False
        # Bytes of each vCPU's dirty ring, 0: there are none.
        self.dirty_ring_size = 0
        self.coalesced_mmio = CoalescedMmio()
        self.stats_files: tuple[StatsFile, ...] = ()
        self.exception_payload_enabled = False
        self.triple_fault_event = False
        self.exit_on_emulation_error = False
        self.guest_can_read_platform_info = True
        # Bits of KVM_X86_QUIRK_* that are off, and of hypercalls that exit.
        self.disabled_quirks = 0
        # KVM_X86_DISABLE_EXITS_*.
        self.disabled_exits = 0
        self.hypercall_exits = 0
        self.user_space_msr_mask = 0
        self.msr_filter: MsrFilter | None = None
        self.clock = VmClock()
        self.memslots = memslots.new_address_spaces(self.kernel.limits.address_spaces)
        self.private_memory: dict[int, mmap.mmap] = {}
        self.n_requested_mmu_pages = 0
        self.mmu = new_mmu(self, tdp="no-tdp" not in system.extensions)
        self._users = 0
        self._users_lock = threading.RLock()
        self._run_memory: dict[int, CData] = {}

    @property
    def absent_requests(self) -> frozenset[int]:
        """Requests on a VM that its kernel does not know."""
        return absent_requests(self.kernel, "vm")

    @property
    def hlt_in_guest(self) -> bool:
        """Say if HLT does not exit."""
        return bool(self.disabled_exits & uapi.KVM_X86_DISABLE_EXITS_HLT)

    # ---- how long it lives

    def get(self) -> None:
        """Take a reference (kvm_get_kvm): one per descriptor that stands for the VM or part of it."""
        with self._users_lock:
            self._users += 1

    def put(self) -> None:
        """Give a reference back; the last one destroys the VM."""
        with self._users_lock:
            self._users -= 1
            last = self._users == 0
        if last:
            self.destroy()

    def open(self) -> int:
        """Return a descriptor of the VM.  Raises EMFILE, ENFILE."""
        self.get()
        fd = anon_inode_getfd("kvm-vm", "vm", self)
        _live.add(self)
        return fd

    def release(self) -> None:
        """Let the VM's own descriptor go."""
        self.put()

    def die(self) -> None:
        """Refuse every ioctl on the VM and its vCPUs from now on, and end those that run (kvm_vm_dead)."""
        self.is_dead = True
        for vcpu in tuple(self.vcpus.values()):
            vcpu.is_dead = True
            vcpu.events.requested = True
            vcpu.cpu.kick()

    def destroy(self) -> None:
        """Free what the VM holds; nobody can reach it any more."""
        _live.discard(self)
        for vcpu in self.vcpus.values():
            vcpu.destroy()
            self.coalesced_mmio.drop_copy(vcpu.id)
        self.vcpus = {}
        self._run_memory = {}
        self.memslots = memslots.new_address_spaces(len(self.memslots))
        self.mmu.destroy()

    # ---- what others ask it

    def check_extension(self, cap: int) -> int:
        """Return what KVM_CHECK_EXTENSION answers on this VM."""
        return check_extension(self, cap)

    def read_guest(self, gpa: int, size: int, as_id: int = 0) -> bytes | None:
        """Return guest memory, None where there is none."""
        return memslots.read_guest(self, gpa, size, as_id)

    def write_guest(self, gpa: int, data: bytes, as_id: int = 0) -> bool:
        """Write guest memory and log it as dirty; False where there is none or it is READONLY."""
        return memslots.write_guest(self, gpa, data, as_id)

    @staticmethod
    def user_pointer(pointer: CData) -> int:
        """Return the address in a pointer member of a structure."""
        return address_of(pointer)

    # ---- vCPUs

    def create_vcpu(self, vcpu_id: int) -> int:
        """Make a vCPU and return its descriptor.  Errors: see `create_vcpu` below."""
        limits = self.kernel.limits
        if vcpu_id >= limits.vcpu_ids:
            raise KvmError(EINVAL, f"vCPU id {vcpu_id:#x}: must be below {limits.vcpu_ids}")
        with self.lock:
            if self.created_vcpus >= limits.vcpus:
                raise KvmError(EINVAL, f"the VM has {limits.vcpus} vCPUs already")
            # x86.c kvm_arch_vcpu_precreate: the first vCPU fixes the limit.
            self.max_vcpu_ids = self.max_vcpu_ids or limits.vcpu_ids
            if vcpu_id >= self.max_vcpu_ids:
                raise KvmError(
                    EINVAL, f"vCPU id {vcpu_id}: KVM_CAP_MAX_VCPU_ID was set to {self.max_vcpu_ids}"
                )
            if vcpu_id in self.vcpus:
                raise KvmError(EEXIST, f"vCPU {vcpu_id} exists")
            return self._new_vcpu(vcpu_id)

    def _new_vcpu(self, vcpu_id: int) -> int:
        vcpu = Vcpu(self, vcpu_id)
        self.get()
        try:
            fd = anon_inode_getfd(
                f"kvm-vcpu:{vcpu_id}", "vcpu", vcpu, self._vcpu_file_size(), install=self._run_installer(vcpu)
            )
        except BaseException:
            self.coalesced_mmio.drop_copy(vcpu_id)
            self._run_memory.pop(vcpu_id, None)
            vcpu.destroy()
            self.put()
            raise
        self.vcpus[vcpu_id] = vcpu
        self.created_vcpus += 1
        return fd

    def _vcpu_file_size(self) -> int:
        return DIRTY_RING_OFFSET + self.dirty_ring_size if self.dirty_ring_size else VCPU_MMAP_SIZE

    def _run_installer(self, vcpu: Vcpu) -> Callable[[File], None]:
        def install(file: File) -> None:
            # The vCPU stays part of the VM when its descriptor is closed, and so must its kvm_run.
            self._run_memory[vcpu.id] = file.memory
            vcpu.run = ffi.cast("struct kvm_run *", file.memory)
            self.coalesced_mmio.add_copy(vcpu.id, file.memory)
            if self.dirty_ring_size:
                vcpu.dirty_ring = make_ring(vcpu, file.memory, self.dirty_ring_size)

        return install


@vm_ioctl("KVM_CREATE_VCPU", Value())
def create_vcpu(vm: Vm, vcpu_id: int) -> int:
    """Make a vCPU in the state after reset and return its descriptor.

    vcpu_id is its APIC id; the boot processor is the one with KVM_SET_BOOT_CPU_ID's, default 0.

    Errors:
        EINVAL  id not below KVM_CAP_MAX_VCPU_ID, or below what was enabled as that; too many vCPUs
        EEXIST  there is or was a vCPU with this id
        EMFILE, ENFILE  no descriptor left
    Source: api.rst 4.7; kvm_main.c kvm_vm_ioctl_create_vcpu, x86.c kvm_arch_vcpu_precreate
    """
    return vm.create_vcpu(vcpu_id)


@vm_ioctl("KVM_SET_BOOT_CPU_ID", Value(), cap="KVM_CAP_SET_BOOT_CPU_ID")
def set_boot_cpu_id(vm: Vm, vcpu_id: int) -> int:
    """Say which vCPU is the boot processor.

    Errors:
        EBUSY   a vCPU exists
        EINVAL  no vCPU can have this id
    Source: api.rst 4.41; x86.c kvm_arch_vm_ioctl
    """
    with vm.lock:
        if vm.created_vcpus:
            raise KvmError(EBUSY, "a vCPU exists")
        # `>` as in the kernel: the limit itself is accepted although no vCPU can have it.
        if vcpu_id > vm.kernel.limits.vcpu_ids or (vm.max_vcpu_ids and vcpu_id > vm.max_vcpu_ids):
            raise KvmError(EINVAL, f"vCPU id {vcpu_id:#x} is out of range")
        vm.boot_cpu_id = vcpu_id
    return 0


@vm_ioctl("KVM_SET_TSS_ADDR", Value(), cap="KVM_CAP_SET_TSS_ADDR")
def set_tss_addr(vm: Vm, address: int) -> int:
    """Store where a processor without unrestricted guest may keep its real-mode TSS: three pages.

    Only an old processor of Intel's, or an old kernel on one of Intel's, puts a slot there.

    Errors:
        EINVAL  the pages do not end below 4 GiB; with a slot: not page-aligned
        EPERM   the former, up to 2.6.35
        EEXIST  with a slot: there is another, or this was called before
    Source: api.rst 4.33; x86.c kvm_vm_ioctl_set_tss_addr, svm.c svm_set_tss_addr, vmx.c vmx_set_tss_addr
    """
    rules = vm.kernel.behaviour
    if address > MAX_TSS_ADDR:
        raise KvmError(rules.tss_addr_errno, f"TSS at {address:#x}: above {MAX_TSS_ADDR:#x}")
    if not vm.processor.is_amd and (rules.tss_slot_always or not vm.processor.unrestricted_guest):
        slot = vm.kernel.limits.memslots + TSS_PRIVATE_MEMSLOT
        memslots.set_private_region(vm, slot, Gpa(address), TSS_PAGES, replace=rules.tss_slot_replaced)
    vm.tss_addr = Gpa(address)
    return 0


@vm_ioctl("KVM_SET_IDENTITY_MAP_ADDR", User("uint64_t"), cap="KVM_CAP_SET_IDENTITY_MAP_ADDR")
def set_identity_map_addr(vm: Vm, user: UserMemory, addr: int) -> int:
    """Store where a processor without unrestricted guest may keep its identity page table; 0: default.

    Errors:
        EINVAL  a vCPU exists
    Source: api.rst 4.42; x86.c kvm_arch_vm_ioctl
    """
    with vm.lock:
        strict = vm.kernel.behaviour.strict_identity_map
        # Before the address is read: a bad pointer is EINVAL then, too.
        if vm.created_vcpus and strict:
            raise KvmError(EINVAL, "a vCPU exists")
        given = int.from_bytes(user.read(addr, 8), "little")
        vm.identity_map_addr = Gpa(given or (DEFAULT_IDENTITY_MAP_ADDR if strict else 0))
    return 0


@vm_cap("KVM_CAP_MAX_VCPU_ID")
def enable_max_vcpu_id(vm: Vm, args: Args) -> int:
    """Lower the limit of vCPU ids to args[0], once and before the first vCPU.

    Errors:
        EINVAL  above KVM_CAP_MAX_VCPU_ID, below the boot processor's id, or not the value already set
    Source: api.rst 7.31; x86.c kvm_vm_ioctl_enable_cap
    """
    wanted = args[0]
    with vm.lock:
        if wanted > vm.kernel.limits.vcpu_ids:
            raise KvmError(EINVAL, f"limit {wanted:#x}: at most {vm.kernel.limits.vcpu_ids}")
        if vm.boot_cpu_id > wanted:
            raise KvmError(EINVAL, f"limit {wanted}: the boot processor has id {vm.boot_cpu_id}")
        if vm.max_vcpu_ids not in {0, wanted}:
            raise KvmError(EINVAL, f"limit {wanted}: it is {vm.max_vcpu_ids} already")
        vm.max_vcpu_ids = wanted
    return 0


@vm_cap("KVM_CAP_HALT_POLL")
def enable_halt_poll(vm: Vm, args: Args) -> int:
    """Limit the time a halted vCPU is polled for, to args[0] nanoseconds.

    A halted vCPU sleeps at once here, which is within every limit.

    Errors:
        EINVAL  more than 32 bits
    Source: api.rst 7.21; kvm_main.c kvm_vm_ioctl_enable_cap_generic
    """
    if args[0] >> 32:
        raise KvmError(EINVAL, f"limit {args[0]:#x} ns: more than 32 bits")
    vm.max_halt_poll_ns = args[0]
    return 0
