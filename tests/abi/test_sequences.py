"""Random sequences of good and bad ioctls against a small model of what each of them needs to succeed.

With --real the same sequences go, a few of them, to the kernel's device: model, pykvm and Linux agree.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from dataclasses import dataclass, field
from errno import E2BIG, EBUSY, EEXIST, EINTR, EINVAL, ENOENT, ENOTTY
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from pykvm import uapi
from pykvm.abi import ffi, new
from tests.machine import CODE, RUN_SIZE, cpuid_list, errno_of

if TYPE_CHECKING:
    from pykvm.abi import CData
    from tests.machine import Backend

MAX_ID = 4096
PAGE = 0x1000
RAM = 4 * PAGE
LOG, READONLY = uapi.KVM_MEM_LOG_DIRTY_PAGES, uapi.KVM_MEM_READONLY
# in al, 0x11; out 0x12, al; hlt; jmp to the start
PROGRAM = b"\xe4\x11\xe6\x12\xf4\xeb\xf9"
EXITS = (uapi.KVM_EXIT_IO, uapi.KVM_EXIT_IO, uapi.KVM_EXIT_HLT)

IDS = st.sampled_from((0, 1, 2, 3, MAX_ID - 1, MAX_ID, MAX_ID + 1, 1 << 31))


@dataclass
class Slot:
    gpa: int
    size: int
    flags: int
    hva: int


@dataclass
class ModelVcpu:
    """What is known of a vCPU: where it is in PROGRAM, its registers that were set, its CPUID."""

    fd: int
    mapping: mmap.mmap
    run: CData
    started: bool = False
    has_run: bool = False
    at: int = 0
    pending: bool = False
    cpuid: int = 0
    nmis: int = 0
    db: list[int] = field(default_factory=lambda: [0] * 4)


class Sequences(RuleBasedStateMachine):
    """One VM and its model."""

    backend: Backend

    def __init__(self) -> None:
        super().__init__()
        backend = self.backend
        self.stack = contextlib.ExitStack()
        self.kvm = self.own(backend.open())
        self.vm = self.own(backend.ioctl(self.kvm, uapi.KVM_CREATE_VM))
        self.ram = mmap.mmap(-1, RAM)
        self.hva = int(ffi.cast("uintptr_t", ffi.from_buffer(self.ram)))
        self.ram[CODE : CODE + len(PROGRAM)] = PROGRAM
        self.slots: dict[int, Slot] = {}
        self.vcpus: dict[int, ModelVcpu] = {}
        self.boot_id = 0
        self.max_id = 0

    def own(self, fd: int) -> int:
        self.stack.callback(os.close, fd)
        return fd

    def teardown(self) -> None:
        self.stack.close()

    def check(self, expected: int, fd: int, request: int, arg: Any = 0) -> None:
        """Do an ioctl that the model says the errno of, 0 for none."""
        assert errno_of(lambda: self.backend.ioctl(fd, request, arg)) == expected

    def pick(self, number: int) -> ModelVcpu:
        return list(self.vcpus.values())[number % len(self.vcpus)]

    def has_vcpu(self) -> bool:
        return bool(self.vcpus)

    def enable(self, fd: int, cap: int, *args: int, flags: int = 0) -> CData:
        request = new("kvm_enable_cap")
        request.cap, request.flags = cap, flags
        for at, value in enumerate(args):
            request.args[at] = value
        return request

    # ---- the VM

    @rule(vcpu_id=IDS)
    def create_vcpu(self, vcpu_id: int) -> None:
        limit = self.max_id or MAX_ID
        if vcpu_id >= limit:
            # The first that is tried fixes the limit, if it is below the greatest there can be.
            self.max_id = self.max_id or (MAX_ID if vcpu_id < MAX_ID else 0)
            self.check(EINVAL, self.vm, uapi.KVM_CREATE_VCPU, vcpu_id)
        elif vcpu_id in self.vcpus:
            self.check(EEXIST, self.vm, uapi.KVM_CREATE_VCPU, vcpu_id)
        else:
            self.max_id = limit
            fd = self.own(self.backend.ioctl(self.vm, uapi.KVM_CREATE_VCPU, vcpu_id))
            mapping = mmap.mmap(fd, RUN_SIZE)
            run = ffi.cast("struct kvm_run *", ffi.from_buffer(mapping))
            self.vcpus[vcpu_id] = ModelVcpu(fd, mapping, run)

    @rule(vcpu_id=IDS)
    def set_boot_cpu_id(self, vcpu_id: int) -> None:
        out_of_range = EINVAL if vcpu_id > (self.max_id or MAX_ID) else 0
        expected = EBUSY if self.vcpus else out_of_range
        self.check(expected, self.vm, uapi.KVM_SET_BOOT_CPU_ID, vcpu_id)
        if not expected:
            self.boot_id = vcpu_id

    @rule(limit=st.sampled_from((1, 3, MAX_ID, MAX_ID + 1)), flags=st.sampled_from((0, 0, 1)))
    def lower_max_vcpu_id(self, limit: int, flags: int) -> None:
        bad = limit > MAX_ID or self.boot_id > limit or self.max_id not in {0, limit} or flags
        request = self.enable(self.vm, uapi.KVM_CAP_MAX_VCPU_ID, limit, flags=flags)
        self.check(EINVAL if bad else 0, self.vm, uapi.KVM_ENABLE_CAP, request)
        if not bad:
            self.max_id = limit

    @rule(cap=st.sampled_from((0, 3, uapi.KVM_CAP_PPC_OSI, 9999)))
    def enable_what_cannot_be(self, cap: int) -> None:
        self.check(EINVAL, self.vm, uapi.KVM_ENABLE_CAP, self.enable(self.vm, cap))

    @rule(address=st.sampled_from((0, PAGE, 0xFFFFC000)))
    def set_identity_map_addr(self, address: int) -> None:
        argument = ffi.new("uint64_t *", address)
        self.check(EINVAL if self.vcpus else 0, self.vm, uapi.KVM_SET_IDENTITY_MAP_ADDR, argument)

    @rule(address=st.sampled_from((0xFFFBD000, 0xFFFFD000, 0xFFFFE000, 1 << 32)))
    def set_tss_addr(self, address: int) -> None:
        self.check(EINVAL if address > 0xFFFFD000 else 0, self.vm, uapi.KVM_SET_TSS_ADDR, address)

    @rule(pages=st.sampled_from((0, 63, 64, 1000)))
    def set_nr_mmu_pages(self, pages: int) -> None:
        self.check(EINVAL if pages < 64 else 0, self.vm, uapi.KVM_SET_NR_MMU_PAGES, pages)

    @rule(number=st.sampled_from((0x00, 0x1F, 0x50, 0xFE)))
    def unknown(self, number: int) -> None:
        request = 0xAE00 | number if number else 0xAF00
        self.check(ENOTTY, self.vm, request)
        for vcpu in self.vcpus.values():
            self.check(EINVAL, vcpu.fd, request)

    # ---- memory

    @rule(
        slot=st.sampled_from((0, 0, 1, 2, 32764, 1 << 17)),
        gpa=st.sampled_from((0, 0, PAGE, 0x10000, 0x123, (1 << 64) - PAGE)),
        size=st.sampled_from((RAM, RAM, PAGE, 0, 0x800)),
        offset=st.sampled_from((0, 0, PAGE, 0x10)),
        flags=st.sampled_from((0, 0, LOG, READONLY, LOG | READONLY, 0x10)),
    )
    def set_memory(self, slot: int, gpa: int, size: int, offset: int, flags: int) -> None:
        wanted = Slot(gpa, size, flags, self.hva + offset)
        region = new("kvm_userspace_memory_region")
        region.slot, region.flags = slot, flags
        region.guest_phys_addr, region.memory_size, region.userspace_addr = gpa, size, wanted.hva
        expected = self.memory_errno(slot, wanted)
        self.check(expected, self.vm, uapi.KVM_SET_USER_MEMORY_REGION, region)
        if expected:
            return
        if size:
            self.slots[slot] = wanted
        else:
            del self.slots[slot]

    def memory_errno(self, slot: int, wanted: Slot) -> int:
        old = self.slots.get(slot)
        if wanted.flags & ~(LOG | READONLY) or (wanted.gpa | wanted.size | wanted.hva) % PAGE:
            return EINVAL
        if slot >= 32764 or wanted.gpa + wanted.size >= 1 << 64:
            return EINVAL
        if not wanted.size:
            return 0 if old else EINVAL
        if old and (
            (wanted.hva, wanted.size) != (old.hva, old.size) or (wanted.flags ^ old.flags) & READONLY
        ):
            return EINVAL
        if old and old.gpa == wanted.gpa:
            return 0
        others = (each for number, each in self.slots.items() if number != slot)
        end = wanted.gpa + wanted.size
        overlaps = any(each.gpa < end and wanted.gpa < each.gpa + each.size for each in others)
        return EEXIST if overlaps else 0

    @rule(slot=st.sampled_from((0, 1, 2, 32764)))
    def get_dirty_log(self, slot: int) -> None:
        bitmap = ffi.new("uint64_t[]", 4)
        log = new("kvm_dirty_log")
        log.slot, log.dirty_bitmap = slot, bitmap
        if slot >= 32764:
            expected = EINVAL
        else:
            known = self.slots.get(slot)
            expected = 0 if known and known.flags & LOG else ENOENT
        self.check(expected, self.vm, uapi.KVM_GET_DIRTY_LOG, log)

    # ---- a vCPU's state

    @precondition(has_vcpu)
    @rule(n=st.integers(0, 3), state=st.integers(0, 12))
    def set_mp_state(self, n: int, state: int) -> None:
        mp_state = new("kvm_mp_state")
        mp_state.mp_state = state
        self.check(EINVAL if state else 0, self.pick(n).fd, uapi.KVM_SET_MP_STATE, mp_state)

    @precondition(has_vcpu)
    @rule(
        n=st.integers(0, 3),
        flags=st.sampled_from((0, 0, 1)),
        dr6=st.sampled_from((0xFFFF0FF0, 1 << 32)),
        dr7=st.sampled_from((0x400, 1 << 63)),
        address=st.integers(0, (1 << 64) - 1),
    )
    def set_debugregs(self, n: int, flags: int, dr6: int, dr7: int, address: int) -> None:
        vcpu, regs = self.pick(n), new("kvm_debugregs")
        regs.flags, regs.dr6, regs.dr7, regs.db[2] = flags, dr6, dr7, address
        bad = flags or dr6 >> 32 or dr7 >> 32
        self.check(EINVAL if bad else 0, vcpu.fd, uapi.KVM_SET_DEBUGREGS, regs)
        if not bad:
            vcpu.db = [0, 0, address, 0]
        now = new("kvm_debugregs")
        self.check(0, vcpu.fd, uapi.KVM_GET_DEBUGREGS, now)
        assert list(now.db) == vcpu.db

    @precondition(has_vcpu)
    @rule(n=st.integers(0, 3), nr=st.sampled_from((2, 32, 255)), flags=st.sampled_from((0, 0x40, 1 << 31)))
    def set_bad_events(self, n: int, nr: int, flags: int) -> None:
        events = new("kvm_vcpu_events")
        events.flags, events.exception.injected, events.exception.nr = flags, 1, nr
        self.check(EINVAL, self.pick(n).fd, uapi.KVM_SET_VCPU_EVENTS, events)

    @precondition(has_vcpu)
    @rule(n=st.integers(0, 3), cr0=st.sampled_from((1 << 32, 0x20000010, 0x80000010)))
    def set_bad_sregs(self, n: int, cr0: int) -> None:
        vcpu, sregs = self.pick(n), new("kvm_sregs")
        self.check(0, vcpu.fd, uapi.KVM_GET_SREGS, sregs)
        before = bytes(ffi.buffer(sregs))
        sregs.cr0, sregs.cr2 = cr0, 0x5555
        self.check(EINVAL, vcpu.fd, uapi.KVM_SET_SREGS, sregs)
        self.check(0, vcpu.fd, uapi.KVM_GET_SREGS, sregs)
        assert bytes(ffi.buffer(sregs)) == before

    @precondition(has_vcpu)
    @rule(n=st.integers(0, 3), nent=st.sampled_from((0, 1, 1, 257)), eax=st.integers(1, 3))
    def set_cpuid(self, n: int, nent: int, eax: int) -> None:
        vcpu, cpuid = self.pick(n), cpuid_list(257)
        cpuid.nent = nent
        cpuid.entries[0].eax = eax
        wanted = eax if nent else 0
        changed = EINVAL if vcpu.has_run and wanted != vcpu.cpuid else 0
        expected = E2BIG if nent > 256 else changed
        self.check(expected, vcpu.fd, uapi.KVM_SET_CPUID2, cpuid)
        if not expected:
            vcpu.cpuid = wanted
        room = cpuid_list(8)
        self.check(0, vcpu.fd, uapi.KVM_GET_CPUID2, room)
        assert (room.nent, room.entries[0].eax) == (int(bool(vcpu.cpuid)), vcpu.cpuid)

    @precondition(has_vcpu)
    @rule(n=st.integers(0, 3), length=st.sampled_from((0, 4, 8, 16)))
    def set_signal_mask(self, n: int, length: int) -> None:
        mask = ffi.new("struct kvm_signal_mask *", {"sigset": 8})
        mask.len = length
        expected = 0 if length == 8 else EINVAL
        self.check(expected, self.pick(n).fd, uapi.KVM_SET_SIGNAL_MASK, mask)

    @precondition(has_vcpu)
    @rule(n=st.integers(0, 3), irq=st.sampled_from((256, 1 << 31)))
    def bad_interrupt(self, n: int, irq: int) -> None:
        request = new("kvm_interrupt")
        request.irq = irq
        self.check(EINVAL, self.pick(n).fd, uapi.KVM_INTERRUPT, request)

    # ---- running

    def can_run(self) -> bool:
        """Say if the guest's code is where it was, and no other slot is in its way."""
        slot = self.slots.get(0)
        return bool(self.vcpus) and slot is not None and (slot.gpa, slot.size, slot.hva) == (0, RAM, self.hva)

    @precondition(can_run)
    @rule(n=st.integers(0, 3))
    def start(self, n: int) -> None:
        vcpu, sregs, regs = self.pick(n), new("kvm_sregs"), new("kvm_regs")
        if vcpu.started:
            return
        self.check(0, vcpu.fd, uapi.KVM_GET_SREGS, sregs)
        sregs.cs.base = sregs.cs.selector = 0
        self.check(0, vcpu.fd, uapi.KVM_SET_SREGS, sregs)
        regs.rip, regs.rflags = CODE, 2
        self.check(0, vcpu.fd, uapi.KVM_SET_REGS, regs)
        vcpu.started = True

    @precondition(can_run)
    @rule(n=st.integers(0, 3), answer=st.integers(0, 255))
    def run(self, n: int, answer: int) -> None:
        vcpu = self.pick(n)
        if not vcpu.started:
            return
        self.check(0, vcpu.fd, uapi.KVM_RUN)
        assert vcpu.run.exit_reason == EXITS[vcpu.at]
        if vcpu.at == 0:
            vcpu.mapping[PAGE] = answer
            assert (vcpu.run.io.port, vcpu.run.io.direction) == (0x11, uapi.KVM_EXIT_IO_IN)
        elif vcpu.at == 1:
            assert (vcpu.run.io.port, vcpu.run.io.direction) == (0x12, uapi.KVM_EXIT_IO_OUT)
        vcpu.at, vcpu.has_run, vcpu.pending = (vcpu.at + 1) % 3, True, vcpu.at < 2

    @precondition(has_vcpu)
    @rule(n=st.integers(0, 3))
    def immediate_exit(self, n: int) -> None:
        vcpu = self.pick(n)
        vcpu.run.immediate_exit = 1
        self.check(EINTR, vcpu.fd, uapi.KVM_RUN)
        vcpu.run.immediate_exit = 0
        vcpu.pending = False
        if vcpu.started:
            regs = new("kvm_regs")
            self.check(0, vcpu.fd, uapi.KVM_GET_REGS, regs)
            # Before the IN, before the OUT, before the HLT; and behind it.
            assert regs.rip in ({0: (CODE, CODE + 5), 1: (CODE + 2,), 2: (CODE + 4,)}[vcpu.at])

    @precondition(has_vcpu)
    @rule(n=st.integers(0, 3), member=st.sampled_from(("cr8", "kvm_valid_regs", "kvm_dirty_regs", "arg")))
    def refused_run(self, n: int, member: str) -> None:
        vcpu = self.pick(n)
        if member != "arg":
            setattr(vcpu.run, member, 0x10)
        self.check(EINVAL, vcpu.fd, uapi.KVM_RUN, int(member == "arg"))
        if member != "arg":
            setattr(vcpu.run, member, 0)


@pytest.mark.spec(
    "vm.CREATE_VCPU", "vm.SET_USER_MEMORY_REGION", "vm.SET_BOOT_CPU_ID", "cap.NR_VCPUS", "run.order"
)
@pytest.mark.spec("vm.GET_DIRTY_LOG", "vcpu.SET_CPUID2", "vcpu.SET_MP_STATE", "vcpu.SET_DEBUGREGS")
def test_random_sequences(backend: Backend) -> None:
    class OnBackend(Sequences):
        pass

    OnBackend.backend = backend
    run_state_machine_as_test(
        OnBackend,
        settings=settings(
            max_examples=8 if backend.real else 60,
            stateful_step_count=25,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
