"""Personalities: kernels and processors that the fake device claims to be."""

from __future__ import annotations

import contextlib
import struct
import subprocess
import sys
from errno import E2BIG, EEXIST, EFAULT, EINTR, EINVAL, EPERM
from typing import TYPE_CHECKING, Any

import pytest

import pykvm
from pykvm import uapi
from pykvm.abi import capabilities, ffi, new, requests
from pykvm.abi.ioctl import UNKNOWN_REQUEST, lookup
from pykvm.device import vcpu_of
from pykvm.kvm import cpuid, msr, profile
from pykvm.kvm.hypercall import OSI_MAGIC_RAX, OSI_MAGIC_RBX
from pykvm.kvm.profile import ProfileError
from pykvm.kvm.system import System
from pykvm.preload import doctor
from tests.abi.test_cpuid import CPUID, HLT, give, guest, leaf_of, supported
from tests.machine import CODE, Backend, Machine, cpuid_list, errno_of, msr_list

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pykvm.abi import CData

OLD = tuple(name for name in profile.kernels() if name != profile.DEFAULT_KERNEL)
NAMED = tuple(name for name in profile.processors() if name != profile.DEFAULT_PROCESSOR)
INTEL = tuple(name for name in NAMED if not profile.processor(name).is_amd)
AMD = tuple(name for name in NAMED if profile.processor(name).is_amd)
VENDOR = {"intel": b"GenuineIntel", "amd": b"AuthenticAMD"}
VMCALL, VMMCALL = b"\x0f\x01\xc1", b"\x0f\x01\xd9"
UD2 = b"\x0f\x0b"


@pytest.fixture
def make() -> Iterator[Callable[..., Machine]]:
    """Return a function that makes a machine of pykvm's with a personality."""
    with contextlib.ExitStack() as stack:

        def machine(**options: Any) -> Machine:
            made = Machine(Backend("pykvm"), **options)
            stack.callback(made.close)
            return made

        yield machine


def all_caps(machine: Machine) -> dict[str, int]:
    answers = {
        name: machine.ioctl(machine.kvm, uapi.KVM_CHECK_EXTENSION, number)
        for name, number in capabilities().items()
    }
    return {name: value for name, value in answers.items() if value}


def vm_errno(machine: Machine, request: int, arg: object = 0) -> int:
    return errno_of(lambda: machine.ioctl(machine.vm, request, arg))


def index_list(machine: Machine, request: int = uapi.KVM_GET_MSR_INDEX_LIST) -> list[int]:
    msrs = ffi.new("struct kvm_msr_list *", {"nmsrs": 256, "indices": 256})
    machine.ioctl(machine.kvm, request, msrs)
    return [int(msrs.indices[at]) for at in range(msrs.nmsrs)]


def cap(name: str) -> int:
    return int(getattr(uapi, f"KVM_CAP_{name}"))


# ---- the files -----------------------------------------------------------------------------------


def test_what_there_is_at_least() -> None:
    assert {"2.6.35", "4.14", "5.10", "6.1", "6.18"} <= set(profile.kernels())
    assert profile.kernels().index("2.6.35") == 0
    assert {"core2", "nehalem", "skylake", "k8", "epyc", "milan"} <= set(profile.processors())


@pytest.mark.parametrize("name", profile.kernels())
def test_a_kernel_is_only_what_it_lists(name: str) -> None:
    kernel = profile.kernel(name)
    assert kernel.name == name
    assert kernel.title
    if kernel.ioctls is not None:
        assert kernel.ioctls["vcpu"] >= {"KVM_RUN", "KVM_GET_REGS", "KVM_SET_CPUID2"}
    if kernel.msrs.save is not None:
        assert len(set(kernel.msrs.save)) == len(kernel.msrs.save)
        assert not set(kernel.msrs.save) & kernel.msrs.absent


@pytest.mark.parametrize("name", NAMED)
def test_a_processor_says_all_it_must(name: str) -> None:
    cpu = profile.processor(name)
    assert cpu.brand
    assert len(cpu.brand) < 48
    assert 36 <= cpu.phys_bits <= 52
    assert cpu.features >= {"LM", "NX", "SYSCALL", "SSE2", "SSE3", "CX16"}
    for cache in cpu.caches:
        assert cache.kib << 10 == cache.ways * cache.line * (cache.registers[2] + 1)


def test_signatures() -> None:
    assert profile.processor("skylake").signature == 0x50654
    assert profile.processor("epyc").signature == 0x800F12
    assert profile.processor("k8").signature == 0x40F13
    assert profile.processor("core2").signature == 0x6FB


@pytest.mark.parametrize(
    "options", [{"kernel": "3.2"}, {"kernel": "../kernel-6.18"}, {"cpu": "z80"}, {"cpu": ""}]
)
def test_a_name_that_is_not_there(options: dict[str, Any]) -> None:
    if options == {"cpu": ""}:
        pykvm.Kvm(cpu="").close()  # as None: an empty variable of the environment
        return
    for call in (pykvm.open, pykvm.Kvm):
        with pytest.raises(ValueError, match=r"no (kernel|processor) .*; there are .*"):
            call(**options)
    with pytest.raises(ValueError, match="there are"), pykvm.installed(**options):
        pass


@pytest.mark.parametrize(
    ("read", "table"),
    [
        (profile._capabilities, {"KVM_CAP_NONSENSE": True}),
        (profile._ioctls, {"vm": ["KVM_RUN"]}),
        (profile._ioctls, {"wm": []}),
        (profile._features, ["SSE5"]),
        (profile._msrs, ["MSR_IA32_NONSENSE"]),
        (profile._kernel_cpuid, {"out_of_range": "none"}),
        (profile._behaviour, {"quirks": ["NONSENSE"]}),
        (lambda table: profile._fill(profile.Limits, table), {"vcpu": 1}),
    ],
)
def test_a_typo_in_a_profile_is_found(read: Callable[[object], object], table: object) -> None:
    with pytest.raises(ProfileError):
        read(table)


# ---- the default -------------------------------------------------------------------------------


def test_the_default_is_as_built(make: Callable[..., Machine]) -> None:
    system = System()
    assert (system.kernel.name, system.processor.name) == ("6.18", "pykvm")
    assert system.offer.supported == cpuid.SUPPORTED_CPUID
    assert dict(system.offer.words) == cpuid.SUPPORTED
    assert system.offer.xcr0 == cpuid.SUPPORTED_XCR0
    plain, named = make(), make(kernel="6.18", cpu="pykvm")
    assert all_caps(plain) == all_caps(named)
    assert index_list(plain) == index_list(named) == [i for i, row in msr.MSRS.items() if row.save]
    assert ffi.buffer(plain.sregs)[:] == ffi.buffer(named.sregs)[:]


@pytest.mark.spec("vm.GET_NR_MMU_PAGES")
def test_what_was_removed_is_unknown_by_default(make: Callable[..., Machine]) -> None:
    assert vm_errno(make(), uapi.KVM_GET_NR_MMU_PAGES) == UNKNOWN_REQUEST["vm"]


# ---- kernels: capabilities and ioctls -----------------------------------------------------------


@pytest.mark.spec("cap.NR_MEMSLOTS", "cap.NR_VCPUS", "cap.ADJUST_CLOCK")
@pytest.mark.parametrize(
    ("kernel", "facts"),
    [
        (
            "2.6.35",
            {"NR_MEMSLOTS": 32, "NR_VCPUS": 64, "MAX_VCPUS": 0, "ADJUST_CLOCK": 1, "XSAVE": 0, "SYNC_REGS": 0}
            | {"IMMEDIATE_EXIT": 0, "ENABLE_CAP": 1, "PPC_OSI": 1, "INTR_SHADOW": 1, "MULTI_ADDRESS_SPACE": 0}
            | {"READONLY_MEM": 0, "USER_NMI": 0, "SET_GUEST_DEBUG": 0, "MP_STATE": 1, "DEBUGREGS": 1},
        ),
        (
            "4.14",
            {"NR_MEMSLOTS": 509, "NR_VCPUS": 240, "MAX_VCPUS": 288, "MAX_VCPU_ID": 1023, "ADJUST_CLOCK": 2}
            | {"IMMEDIATE_EXIT": 1, "SYNC_REGS": 0, "ENABLE_CAP": 0, "ENABLE_CAP_VM": 1, "USER_NMI": 1}
            | {"GET_MSR_FEATURES": 0, "EXCEPTION_PAYLOAD": 0, "PPC_OSI": 0, "READONLY_MEM": 1},
        ),
        (
            "5.10",
            {"NR_MEMSLOTS": 509, "MAX_VCPUS": 288, "MAX_VCPU_ID": 1023, "SYNC_REGS": 7, "GET_MSR_FEATURES": 1}
            | {"X86_USER_SPACE_MSR": 1, "SREGS2": 0, "XSAVE2": 0, "ENABLE_CAP": 0, "DISABLE_QUIRKS2": 0}
            | {"ADJUST_CLOCK": 2, "VM_TSC_CONTROL": 0, "LAST_CPU": 1},
        ),
        (
            "6.1",
            {"NR_MEMSLOTS": 32764, "MAX_VCPUS": 1024, "MAX_VCPU_ID": 4096, "SREGS2": 1, "XSAVE2": 4096}
            | {
                "ENABLE_CAP": 1,
                "ADJUST_CLOCK": 14,
                "MEMORY_FAULT_INFO": 0,
                "VM_TYPES": 0,
                "VM_TSC_CONTROL": 1,
            },
        ),
        (
            "6.18",
            {"NR_MEMSLOTS": 32764, "MEMORY_FAULT_INFO": 1, "VM_TYPES": 1, "PPC_OSI": 0, "INTR_SHADOW": 0},
        ),
    ],
)
def test_capabilities(kernel: str, facts: dict[str, int], make: Callable[..., Machine]) -> None:
    machine = make(kernel=kernel)
    found = {name: machine.ioctl(machine.kvm, uapi.KVM_CHECK_EXTENSION, cap(name)) for name in facts}
    assert found == facts


@pytest.mark.parametrize("kernel", OLD)
def test_nothing_but_what_the_kernel_has(kernel: str, make: Callable[..., Machine]) -> None:
    machine = make(kernel=kernel)
    fds = {"system": machine.kvm, "vm": machine.vm, "vcpu": machine.vcpu}
    listed = profile.kernel(kernel).ioctls
    assert listed is not None
    for name, request in requests().items():
        for kind in fds.keys() & set(request.fds):
            row = lookup(kind, request.number)
            if name not in listed[kind]:
                failed = errno_of(lambda fd=fds[kind], n=request.number: machine.ioctl(fd, n, 0))
                assert failed == UNKNOWN_REQUEST[kind], name
            elif row is not None and not row.absent:
                assert request.number not in profile.absent_requests(profile.kernel(kernel), kind), name
    assert all_caps(machine).keys() <= (profile.kernel(kernel).capabilities or {}).keys()
    for name, number in capabilities().items():
        if not profile.kernel(kernel).can_enable(name):
            request_ = new("kvm_enable_cap")
            request_.cap = number
            assert vm_errno(machine, uapi.KVM_ENABLE_CAP, request_) in {EINVAL, UNKNOWN_REQUEST["vm"]}, name


@pytest.mark.parametrize(
    ("kernel", "kind", "name", "there"),
    [
        ("2.6.35", "vm", "KVM_CHECK_EXTENSION", False),
        ("2.6.35", "vm", "KVM_ENABLE_CAP", False),
        ("2.6.35", "vm", "KVM_GET_NR_MMU_PAGES", True),
        ("2.6.35", "vcpu", "KVM_GET_XSAVE", False),
        ("2.6.35", "vcpu", "KVM_KVMCLOCK_CTRL", False),
        ("2.6.35", "vcpu", "KVM_GET_DEBUGREGS", True),
        ("2.6.35", "system", "KVM_GET_EMULATED_CPUID", False),
        ("4.14", "vcpu", "KVM_GET_XSAVE", True),
        ("4.14", "vcpu", "KVM_GET_TSC_KHZ", True),
        ("4.14", "system", "KVM_GET_MSR_FEATURE_INDEX_LIST", False),
        ("4.14", "vm", "KVM_CLEAR_DIRTY_LOG", False),
        ("5.10", "vm", "KVM_X86_SET_MSR_FILTER", True),
        ("5.10", "vm", "KVM_SET_TSC_KHZ", False),
        ("5.10", "vcpu", "KVM_GET_SREGS2", False),
        ("5.10", "vcpu", "KVM_GET_DEVICE_ATTR", False),
        ("6.1", "vcpu", "KVM_GET_SREGS2", True),
        ("6.1", "vm", "KVM_GET_NR_MMU_PAGES", True),
        ("6.1", "vm", "KVM_SET_USER_MEMORY_REGION2", False),
        ("6.18", "vm", "KVM_GET_NR_MMU_PAGES", False),
    ],
)
def test_ioctls(kernel: str, kind: str, name: str, there: bool, make: Callable[..., Machine]) -> None:
    machine = make(kernel=kernel)
    number = requests()[name].number
    assert (number in profile.absent_requests(profile.kernel(kernel), kind)) is not there
    fd = {"system": machine.kvm, "vm": machine.vm, "vcpu": machine.vcpu}[kind]
    # A pointer to nothing: EFAULT where it is known, if it takes one.
    failed = errno_of(lambda: machine.ioctl(fd, number, 8))
    assert (failed in {0, EFAULT}) if there else (failed == UNKNOWN_REQUEST[kind])


@pytest.mark.parametrize(("kernel", "limit"), [("2.6.35", 32), ("4.14", 509), ("5.10", 509), ("6.1", 32764)])
def test_slots(kernel: str, limit: int, make: Callable[..., Machine]) -> None:
    machine = make(kernel=kernel)
    machine.add_slot(limit - 1, 0x100000, 0x1000)
    assert errno_of(lambda: machine.add_slot(limit, 0x200000, 0x1000)) == EINVAL
    log = new("kvm_dirty_log")
    log.slot = limit
    assert vm_errno(machine, uapi.KVM_GET_DIRTY_LOG, log) == EINVAL


@pytest.mark.parametrize(("kernel", "limit"), [("4.14", 1023), ("5.10", 1023), ("6.1", 4096)])
def test_vcpu_ids(kernel: str, limit: int, make: Callable[..., Machine]) -> None:
    machine = make(kernel=kernel)
    machine._fd(machine.ioctl(machine.vm, uapi.KVM_CREATE_VCPU, limit - 1))
    assert vm_errno(machine, uapi.KVM_CREATE_VCPU, limit) == EINVAL
    request = new("kvm_enable_cap")
    request.cap, request.args[0] = uapi.KVM_CAP_MAX_VCPU_ID, limit
    assert vm_errno(machine, uapi.KVM_ENABLE_CAP, request) == (0 if kernel == "6.1" else EINVAL)


def test_number_of_vcpus(make: Callable[..., Machine]) -> None:
    machine = make(kernel="2.6.35")
    for at in range(1, 64):
        machine._fd(machine.ioctl(machine.vm, uapi.KVM_CREATE_VCPU, 1000 + at))
    assert vm_errno(machine, uapi.KVM_CREATE_VCPU, 5) == EINVAL


# ---- kernels: CPUID ---------------------------------------------------------------------------------


PV_2635 = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 24


@pytest.mark.spec("cpuid.signature", "cpuid.features")
@pytest.mark.parametrize(
    ("kernel", "eax", "most"),
    [
        ("2.6.35", 0, PV_2635),
        ("4.14", 0x40000001, PV_2635 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7),
        ("5.10", 0x40000001, 0x01007EFB),
        ("6.1", 0x40000001, 0x01007EFB),
    ],
)
def test_paravirtual_leaves(kernel: str, eax: int, most: int, make: Callable[..., Machine]) -> None:
    table = supported(make(kernel=kernel))
    assert leaf_of(table, 0x40000000) == (eax, 0x4B4D564B, 0x564B4D56, 0x4D)
    features = leaf_of(table, 0x40000001)
    assert features is not None
    assert features[0] & PV_2635 == PV_2635
    assert not features[0] & ~most
    assert features[1:] == (0, 0, 0)


@pytest.mark.parametrize(
    ("kernel", "basic", "extended"),
    [
        ("2.6.35", 0xB, 0x8000001A),
        ("4.14", 0xD, 0x8000001A),
        ("5.10", 0x1F, 0x8000001F),
        ("6.1", 0x1F, 0x80000021),
    ],
)
def test_highest_leaves(kernel: str, basic: int, extended: int, make: Callable[..., Machine]) -> None:
    for processor in ("icelake", "turin"):
        table = supported(make(kernel=kernel, cpu=processor))
        cpu = profile.processor(processor)
        first, second = leaf_of(table, 0), leaf_of(table, 0x80000000)
        assert first is not None
        assert second is not None
        assert first[0] == min(cpu.max_basic, basic)
        assert second[0] == min(cpu.max_extended, extended)
        functions = [table.entries[at].function for at in range(table.nent)]
        assert max(f for f in functions if f < 0x40000000) <= basic
        assert max(functions) <= extended


@pytest.mark.parametrize(
    ("kernel", "yes", "no"),
    [
        (
            "2.6.35",
            {"SSE4_2", "NX", "LM"},
            {"AES", "RDRAND", "SMEP", "FSGSBASE", "BMI1", "PCID", "HYPERVISOR"},
        ),
        (
            "4.14",
            {"AES", "SMEP", "BMI2"},
            {"UMIP", "RDPID", "FSRM", "ARCH_CAPABILITIES", "HYPERVISOR", "GFNI"},
        ),
        ("5.10", {"UMIP", "RDPID", "FSRM", "ARCH_CAPABILITIES"}, {"HYPERVISOR"}),
        ("6.1", {"UMIP", "SERIALIZE"}, {"HYPERVISOR"}),
        ("6.18", {"HYPERVISOR", "UMIP"}, set()),
    ],
)
def test_features_by_kernel(kernel: str, yes: set[str], no: set[str]) -> None:
    offer = System(kernel=kernel).offer
    assert {name for name in yes | no if offer.has(name)} == yes
    # The kernel hides bits of control registers; instructions are the processor's.
    assert bool(offer.cr4 & uapi.X86_CR4_SMEP) is offer.has("SMEP")
    assert bool(offer.cr4 & uapi.X86_CR4_UMIP) is offer.has("UMIP")
    assert dict(offer.words) == cpuid.SUPPORTED


@pytest.mark.parametrize(("kernel", "limit"), [("2.6.35", 40), ("4.14", 80), ("5.10", 256), ("6.1", 256)])
def test_entries_of_a_table(kernel: str, limit: int, make: Callable[..., Machine]) -> None:
    machine = make(kernel=kernel)
    assert machine.errno(uapi.KVM_SET_CPUID2, cpuid_list(limit)) == 0
    assert machine.errno(uapi.KVM_SET_CPUID2, cpuid_list(limit + 1)) == E2BIG
    for processor in profile.processors():
        table = supported(make(kernel=kernel, cpu=processor))
        assert table.nent <= limit


def test_a_table_that_just_fits(make: Callable[..., Machine]) -> None:
    for kernel, wanted in (("2.6.35", E2BIG), ("4.14", 0), ("6.18", 0)):
        machine = make(kernel=kernel)
        table = supported(machine)
        request = uapi.KVM_GET_SUPPORTED_CPUID
        assert errno_of(lambda m=machine, t=table, r=request: m.ioctl(m.kvm, r, t)) == wanted, kernel
        table = cpuid_list(table.nent + 1)
        assert machine.ioctl(machine.kvm, request, table) == 0


@pytest.mark.spec("vcpu.SET_CPUID2")
@pytest.mark.parametrize(
    ("kernel", "wanted"), [("2.6.35", 0), ("4.14", 0), ("5.10", 0), ("6.1", EINVAL), ("6.18", EINVAL)]
)
def test_another_table_after_a_run(kernel: str, wanted: int, make: Callable[..., Machine]) -> None:
    machine = make(kernel=kernel)
    give(machine, (0, None, (7, 1, 2, 3)))
    assert guest(machine, 0) == (7, 1, 2, 3)
    table = cpuid_list(1)
    table.entries[0].eax = 8
    assert machine.errno(uapi.KVM_SET_CPUID2, table) == wanted
    assert guest(machine, 0)[0] == (7 if wanted else 8)


AMD_WORDS = (0x68747541, 0x444D4163, 0x69746E65)


@pytest.mark.spec("cpuid.oor")
@pytest.mark.parametrize(
    ("kernel", "basic", "extended", "pv"),
    [
        ("2.6.35", 0x40000001, 0x80000001, 0x40000001),
        ("4.14", 0x22, 0x22, 0x22),
        ("5.10", 0, 0, 0),
        ("6.18", 0, 0, 0),
    ],
)
def test_past_the_end_of_an_amd_table(
    kernel: str, basic: int, extended: int, pv: int, make: Callable[..., Machine]
) -> None:
    machine = make(kernel=kernel)
    give(
        machine,
        (0, None, (2, *AMD_WORDS)),
        (2, None, (0x22, 0, 0, 0)),
        (0x40000001, None, (0x40000001, 0, 0, 0)),
        (0x80000000, None, (0x80000001, 0, 0, 0)),
        (0x80000001, None, (0x80000001, 0, 0, 0)),
    )
    assert guest(machine, 9)[0] == basic
    assert guest(machine, 0x80000009)[0] == extended
    assert guest(machine, 0x40000009)[0] == pv


@pytest.mark.parametrize(("kernel", "flags"), [("2.6.35", 6), ("4.14", 6), ("5.10", 0), ("6.18", 0)])
def test_leaf_2_was_stateful(kernel: str, flags: int, make: Callable[..., Machine]) -> None:
    table = supported(make(kernel=kernel))
    assert [table.entries[at].flags for at in range(table.nent) if table.entries[at].function == 2] == [flags]


# ---- kernels: MSRs -----------------------------------------------------------------------------------


@pytest.mark.spec("msr.index_list")
@pytest.mark.parametrize("kernel", profile.kernels())
def test_listed_registers_can_be_saved(kernel: str, make: Callable[..., Machine]) -> None:
    machine = make(kernel=kernel)
    listed = index_list(machine)
    assert len(listed) > 10
    kept = profile.kernel(kernel).msrs.save
    if kept is not None:
        assert listed == [index for index in kept if index in listed]
    # Its writer wants a local APIC in the kernel.
    msrs = msr_list(*((index, 0) for index in listed if index != uapi.MSR_KVM_ASYNC_PF_INT))
    assert machine.do(uapi.KVM_GET_MSRS, msrs) == msrs.nmsrs
    assert machine.do(uapi.KVM_SET_MSRS, msrs) == msrs.nmsrs


@pytest.mark.parametrize(
    ("kernel", "index", "there"),
    [
        ("2.6.35", uapi.MSR_IA32_TSC_ADJUST, False),
        ("2.6.35", uapi.MSR_PLATFORM_INFO, False),
        ("2.6.35", uapi.MSR_KVM_POLL_CONTROL, False),
        ("2.6.35", uapi.MSR_IA32_MC0_CTL2 + 3, False),
        ("2.6.35", uapi.MSR_KVM_SYSTEM_TIME_NEW, True),
        ("2.6.35", uapi.MSR_IA32_UCODE_REV, True),
        ("4.14", uapi.MSR_IA32_TSC_ADJUST, True),
        ("4.14", uapi.MSR_KVM_POLL_CONTROL, False),
        ("4.14", uapi.MSR_SMI_COUNT, False),
        ("5.10", uapi.MSR_KVM_POLL_CONTROL, True),
        ("5.10", uapi.MSR_IA32_MC0_CTL2, False),
        ("6.1", uapi.MSR_IA32_MC0_CTL2, True),
    ],
)
def test_registers(kernel: str, index: int, there: bool, make: Callable[..., Machine]) -> None:
    machine = make(kernel=kernel)
    assert (machine.get_msr(index) is not None) is there
    assert machine.set_msr(index, machine.get_msr(index) or 0) is there
    # rdmsr; the guest's #GP goes through the IVT to 0x3000
    machine.load(struct.pack("<HH", 0x3000, 0), uapi.GP_VECTOR * 4)
    machine.load(HLT, 0x3000)
    machine.start(b"\x0f\x32" + HLT, rcx=index)
    assert machine.go() == uapi.KVM_EXIT_HLT
    if index != uapi.MSR_IA32_MC0_CTL2:  # without CMCI not the guest's
        assert (machine.regs.rip != 0x3001) is there


@pytest.mark.spec("sys.GET_MSRS", "sys.GET_MSR_FEATURE_INDEX_LIST")
@pytest.mark.parametrize(("kernel", "others"), [("5.10", 0), ("6.1", 0), ("6.18", 1)])
def test_feature_registers(kernel: str, others: int, make: Callable[..., Machine]) -> None:
    machine = make(kernel=kernel)
    features = index_list(machine, uapi.KVM_GET_MSR_FEATURE_INDEX_LIST)
    assert uapi.MSR_IA32_ARCH_CAPABILITIES in features
    assert machine.ioctl(machine.kvm, uapi.KVM_GET_MSRS, msr_list((features[0], 0))) == 1
    assert machine.ioctl(machine.kvm, uapi.KVM_GET_MSRS, msr_list((uapi.MSR_STAR, 0))) == others


@pytest.mark.spec("msr.feature", "vcpu.SET_MSRS")
@pytest.mark.parametrize(("kernel", "changes"), [("6.1", True), ("6.18", False)])
def test_feature_registers_after_the_first_run(
    kernel: str, changes: bool, make: Callable[..., Machine]
) -> None:
    machine = make(kernel=kernel)
    machine.start(HLT)
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert machine.set_msr(uapi.MSR_PLATFORM_INFO, 0) is changes


@pytest.mark.spec("vcpu.GET_MSRS", "msr.unknown")
@pytest.mark.parametrize(("kernel", "data"), [("4.14", 5), ("5.10", 0), ("6.18", 0)])
def test_a_register_that_cannot_be_read(kernel: str, data: int, make: Callable[..., Machine]) -> None:
    msrs = msr_list((0xDEAD0000, 5))
    assert make(kernel=kernel).do(uapi.KVM_GET_MSRS, msrs) == 0
    assert msrs.entries[0].data == data


# ---- kernels: what changed ---------------------------------------------------------------------------


@pytest.mark.spec("run.immediate_exit")
@pytest.mark.parametrize(("kernel", "honoured"), [("2.6.35", False), ("4.14", True), ("6.18", True)])
def test_immediate_exit(kernel: str, honoured: bool, make: Callable[..., Machine]) -> None:
    machine = make(kernel=kernel)
    machine.start(HLT)
    machine.run.immediate_exit = 1
    assert machine.go_errno() == (EINTR if honoured else 0)


@pytest.mark.spec("run.sync_regs")
@pytest.mark.parametrize(("kernel", "honoured"), [("4.14", False), ("5.10", True)])
def test_sync_regs(kernel: str, honoured: bool, make: Callable[..., Machine]) -> None:
    machine = make(kernel=kernel)
    machine.start(HLT, rbx=0x1234)
    machine.run.kvm_valid_regs = uapi.KVM_SYNC_X86_REGS
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert machine.run.s.regs.regs.rbx == (0x1234 if honoured else 0)
    machine.run.kvm_valid_regs = 1 << 40
    machine.start(HLT)
    assert machine.go_errno() == (EINVAL if honoured else 0)


@pytest.mark.spec("run.return_values")
@pytest.mark.parametrize(("kernel", "told"), [("2.6.35", False), ("6.1", False), ("6.18", True)])
def test_a_memory_fault(kernel: str, told: bool, make: Callable[..., Machine]) -> None:
    machine = make(kernel=kernel)
    region = new("kvm_userspace_memory_region")
    region.slot, region.guest_phys_addr, region.memory_size, region.userspace_addr = (
        1,
        0x20000,
        0x1000,
        0x10000,
    )
    machine.ioctl(machine.vm, uapi.KVM_SET_USER_MEMORY_REGION, region)
    machine.start(b"\xa0\x00\x00" + HLT)  # mov al, [0]
    machine.segment("ds", 0x2000)
    assert machine.go_errno() == EFAULT
    assert machine.run.exit_reason == (uapi.KVM_EXIT_MEMORY_FAULT if told else 0xDEAD)


@pytest.mark.spec("cap.quirk_out7e")
@pytest.mark.parametrize(
    ("kernel", "rip"), [("2.6.35", CODE + 2), ("4.14", CODE + 2), ("5.10", CODE), ("6.18", CODE)]
)
def test_rip_at_an_out(kernel: str, rip: int, make: Callable[..., Machine]) -> None:
    machine = make(kernel=kernel)
    machine.start(b"\xe6\x80" + HLT, rax=0x42)
    assert machine.go() == uapi.KVM_EXIT_IO
    assert machine.data_bytes(1) == b"\x42"
    assert machine.regs.rip == rip
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert machine.regs.rip == CODE + 3


@pytest.mark.parametrize(
    ("kernel", "ndata"), [("2.6.35", 0), ("4.14", 0), ("5.10", 0), ("6.1", None), ("6.18", None)]
)
def test_data_of_an_emulation_failure(kernel: str, ndata: int | None, make: Callable[..., Machine]) -> None:
    machine = make(kernel=kernel)
    machine.start(HLT)
    sregs = machine.sregs
    sregs.cs.base, sregs.cs.selector = 0xD0000, 0xD000  # no memory to fetch from
    machine.set_sregs(sregs)
    machine.set_regs(rip=0)
    assert machine.go() == uapi.KVM_EXIT_INTERNAL_ERROR
    assert machine.run.internal.suberror == uapi.KVM_INTERNAL_ERROR_EMULATION
    assert (machine.run.internal.ndata > 0) if ndata is None else (machine.run.internal.ndata == ndata)


@pytest.mark.parametrize(("kernel", "ndata"), [("4.14", 3), ("5.10", 4), ("6.18", 5)])
def test_data_of_an_event_that_cannot_be_delivered(
    kernel: str, ndata: int, make: Callable[..., Machine]
) -> None:
    machine = make(kernel=kernel)
    region = new("kvm_userspace_memory_region")
    region.slot, region.guest_phys_addr, region.memory_size = 1, 0x20000, 0x1000
    memory = ffi.new("char[]", 0x2000)
    region.userspace_addr = int(ffi.cast("uintptr_t", memory)) + 0xFFF & ~0xFFF
    region.flags = uapi.KVM_MEM_READONLY
    machine.ioctl(machine.vm, uapi.KVM_SET_USER_MEMORY_REGION, region)
    machine.start(UD2)
    machine.segment("ss", 0x2000)  # the frame of #UD goes to memory that cannot be written
    machine.set_regs(rsp=0x800)
    assert machine.go() == uapi.KVM_EXIT_INTERNAL_ERROR
    assert machine.run.internal.suberror == uapi.KVM_INTERNAL_ERROR_DELIVERY_EV
    misconfigured = machine.run.internal.data[1] == 49
    assert machine.run.internal.ndata == ndata + (misconfigured and kernel != "6.18")


@pytest.mark.spec("vm.GET_CLOCK", "vm.SET_CLOCK")
@pytest.mark.parametrize(
    ("kernel", "flags", "settable"),
    [("2.6.35", 0, 0), ("4.14", 2, 0), ("5.10", 2, 0), ("6.1", 14, 14), ("6.18", 14, 14)],
)
def test_flags_of_the_clock(kernel: str, flags: int, settable: int, make: Callable[..., Machine]) -> None:
    machine = make(kernel=kernel)
    data = new("kvm_clock_data")
    machine.ioctl(machine.vm, uapi.KVM_GET_CLOCK, data)
    assert data.flags == flags
    assert bool(data.realtime) is bool(data.host_tsc) is bool(flags & 4)
    for flag in (2, 4, 8, 16):
        data.flags = flag
        assert vm_errno(machine, uapi.KVM_SET_CLOCK, data) == (0 if flag & settable else EINVAL)


@pytest.mark.parametrize(("kernel", "wanted"), [("6.1", 0), ("6.18", EINVAL)])
def test_tsc_frequency_of_a_vm_with_vcpus(kernel: str, wanted: int, make: Callable[..., Machine]) -> None:
    assert vm_errno(make(kernel=kernel), uapi.KVM_SET_TSC_KHZ, 1_000_000) == wanted


@pytest.mark.spec("vcpu.GET_VCPU_EVENTS", "vcpu.SET_VCPU_EVENTS")
@pytest.mark.parametrize(
    ("kernel", "told", "refused"),
    [("2.6.35", 7, 8), ("4.14", 13, 0x10), ("5.10", 13, 0x20), ("6.1", 13, 0x40)],
)
def test_flags_of_vcpu_events(kernel: str, told: int, refused: int, make: Callable[..., Machine]) -> None:
    machine = make(kernel=kernel)
    events = machine.events
    assert events.flags == told
    machine.set_events(events)
    events.flags = refused
    assert machine.errno(uapi.KVM_SET_VCPU_EVENTS, events) == EINVAL


@pytest.mark.spec("cap.DISABLE_QUIRKS")
@pytest.mark.parametrize(("kernel", "add_up"), [("6.1", False), ("6.18", True)])
def test_quirks_add_up(kernel: str, add_up: bool, make: Callable[..., Machine]) -> None:
    machine = make(kernel=kernel)
    machine.enable(machine.vm, uapi.KVM_CAP_DISABLE_QUIRKS2, uapi.KVM_X86_QUIRK_FIX_HYPERCALL_INSN)
    machine.enable(machine.vm, uapi.KVM_CAP_DISABLE_QUIRKS2, 0)
    machine.load(struct.pack("<HH", 0x3000, 0), uapi.UD_VECTOR * 4)
    machine.load(HLT, 0x3000)
    machine.start(VMMCALL + HLT)
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert (machine.regs.rip == 0x3001) is add_up


@pytest.mark.parametrize(("kernel", "bit"), [("4.14", 8), ("5.10", 0x20), ("6.1", 0x80)])
def test_a_quirk_that_was_none_yet_stays(kernel: str, bit: int, make: Callable[..., Machine]) -> None:
    machine = make(kernel=kernel)
    machine.enable(machine.vm, uapi.KVM_CAP_DISABLE_QUIRKS, bit)
    assert not vcpu_of(machine.vcpu).vm.disabled_quirks
    if kernel == "6.1":
        assert machine.cap(uapi.KVM_CAP_DISABLE_QUIRKS2) & ~0x7F == 0
        with pytest.raises(OSError, match="EINVAL"):
            machine.enable(machine.vm, uapi.KVM_CAP_DISABLE_QUIRKS2, bit)


# ---- 2.6.35: the seed documents ------------------------------------------------------------------------


@pytest.fixture
def seed(make: Callable[..., Machine]) -> Machine:
    return make(kernel="2.6.35")


SEED_CAPS = {
    "HLT", "MMU_SHADOW_CACHE_CONTROL", "USER_MEMORY", "SET_TSS_ADDR", "EXT_CPUID", "NR_VCPUS", "NR_MEMSLOTS",
    "NOP_IO_DELAY", "MP_STATE", "SYNC_MMU", "DESTROY_MEMORY_REGION_WORKS", "JOIN_MEMORY_REGIONS_WORKS", "MCE",
    "SET_BOOT_CPU_ID", "SET_IDENTITY_MAP_ADDR", "ADJUST_CLOCK", "INTERNAL_ERROR_DATA", "VCPU_EVENTS",
    "PCI_SEGMENT", "INTR_SHADOW", "DEBUGREGS", "PPC_OSI", "ENABLE_CAP",
}  # fmt: skip
# Of that kernel, too, and pykvm builds them in time.
SEED_CAPS_LATER = {
    "IRQCHIP", "VAPIC", "CLOCKSOURCE", "PIT", "COALESCED_MMIO", "REINJECT_CONTROL", "IRQ_ROUTING",
    "IRQ_INJECT_STATUS", "IRQFD", "PIT2", "PIT_STATE2", "IOEVENTFD", "XEN_HVM", "HYPERV", "HYPERV_VAPIC",
    "HYPERV_SPIN", "X86_ROBUST_SINGLESTEP",
}  # fmt: skip


@pytest.mark.spec("cap.base_s")
def test_seed_capabilities(seed: Machine) -> None:
    found = {name.removeprefix("KVM_CAP_") for name in all_caps(seed)}
    assert SEED_CAPS <= found <= SEED_CAPS | SEED_CAPS_LATER


@pytest.mark.spec("cpuid.signature", "cpuid.features", "cpuid.f24")
def test_seed_cpuid(seed: Machine) -> None:
    table = supported(seed)
    seed.do(uapi.KVM_SET_CPUID2, table)
    assert guest(seed, 0x40000000) == (0, 0x4B4D564B, 0x564B4D56, 0x4D)
    assert guest(seed, 0x40000001) == (0x0100000B, 0, 0, 0)


@pytest.mark.spec("vcpu.GET_VCPU_EVENTS", "vcpu.SET_VCPU_EVENTS", "vcpu.events_shadow")
def test_seed_vcpu_events(seed: Machine) -> None:
    events = seed.events
    assert ffi.offsetof("struct kvm_vcpu_events", "sipi_vector") == 16
    assert ffi.offsetof("struct kvm_vcpu_events", "flags") == 20
    events.flags = uapi.KVM_VCPUEVENT_VALID_SIPI_VECTOR | uapi.KVM_VCPUEVENT_VALID_SHADOW
    events.sipi_vector, events.interrupt.shadow = 0x9A, uapi.KVM_X86_SHADOW_INT_MOV_SS
    seed.set_events(events)
    events = seed.events
    assert (events.flags, events.sipi_vector, events.interrupt.shadow) == (7, 0x9A, 1)
    events.flags, events.sipi_vector, events.interrupt.shadow = 0, 1, 0
    seed.set_events(events)
    events = seed.events
    assert (events.sipi_vector, events.interrupt.shadow) == (0x9A, 1)
    # What came later is reserved space.
    assert not any(bytes(ffi.buffer(events))[24:])


@pytest.mark.spec("vcpu.SET_DEBUGREGS", "vcpu.SET_MP_STATE")
def test_seed_arguments_that_are_checked_today(seed: Machine) -> None:
    registers = new("kvm_debugregs")
    registers.dr6 = 1 << 40
    assert seed.errno(uapi.KVM_SET_DEBUGREGS, registers) == 0
    assert seed.get(uapi.KVM_GET_DEBUGREGS, "kvm_debugregs").dr6 == 1 << 40
    registers.flags = 1
    assert seed.errno(uapi.KVM_SET_DEBUGREGS, registers) == EINVAL
    state = new("kvm_mp_state")
    state.mp_state = uapi.KVM_MP_STATE_SIPI_RECEIVED
    assert seed.errno(uapi.KVM_SET_MP_STATE, state) == 0
    assert seed.get(uapi.KVM_GET_MP_STATE, "kvm_mp_state").mp_state == uapi.KVM_MP_STATE_SIPI_RECEIVED
    assert vm_errno(seed, uapi.KVM_SET_IDENTITY_MAP_ADDR, ffi.new("uint64_t *", 0)) == 0


@pytest.mark.spec("vm.SET_USER_MEMORY_REGION")
def test_seed_memory_regions(seed: Machine) -> None:
    memory = seed.add_slot(1, 0x100000, 0x2000, flags=0x80)
    memory[0] = 7
    region = new("kvm_userspace_memory_region")
    region.slot, region.guest_phys_addr, region.memory_size, region.userspace_addr = (
        1,
        0x20000,
        0x2000,
        0x7000,
    )
    # It moves; its memory stays.
    assert vm_errno(seed, uapi.KVM_SET_USER_MEMORY_REGION, region) == 0
    seed.start(b"\xa0\x00\x00" + HLT)
    seed.segment("ds", 0x2000)
    assert seed.go() == uapi.KVM_EXIT_HLT
    assert seed.regs.rax & 0xFF == 7
    region.memory_size = 0x3000
    assert vm_errno(seed, uapi.KVM_SET_USER_MEMORY_REGION, region) == EINVAL
    region.slot, region.memory_size = 2, 0x1000
    assert vm_errno(seed, uapi.KVM_SET_USER_MEMORY_REGION, region) == EEXIST
    region.memory_size = 0
    assert vm_errno(seed, uapi.KVM_SET_USER_MEMORY_REGION, region) == 0
    region.slot = 1 << 16
    assert vm_errno(seed, uapi.KVM_SET_USER_MEMORY_REGION, region) == EINVAL


@pytest.mark.spec("vm.SET_NR_MMU_PAGES", "vm.GET_NR_MMU_PAGES")
def test_seed_shadow_pages(seed: Machine) -> None:
    assert seed.ioctl(seed.vm, uapi.KVM_GET_NR_MMU_PAGES) == 64
    assert seed.ioctl(seed.vm, uapi.KVM_SET_NR_MMU_PAGES, 100) == 0
    assert seed.ioctl(seed.vm, uapi.KVM_GET_NR_MMU_PAGES) == 100
    assert vm_errno(seed, uapi.KVM_SET_NR_MMU_PAGES, 63) == EINVAL


@pytest.mark.spec("vm.SET_TSS_ADDR")
def test_seed_tss(seed: Machine) -> None:
    assert vm_errno(seed, uapi.KVM_SET_TSS_ADDR, 0xFFFFE000) == EPERM
    assert vm_errno(seed, uapi.KVM_SET_TSS_ADDR, 0xFFFBD000) == 0
    assert vm_errno(seed, uapi.KVM_SET_TSS_ADDR, 0xFFFAD000) == 0
    assert vm_errno(seed, uapi.KVM_SET_TSS_ADDR, 0x1000) == EEXIST


@pytest.mark.spec("vcpu.ENABLE_CAP")
def test_seed_osi(seed: Machine) -> None:
    assert ffi.sizeof("struct kvm_enable_cap") == 104
    seed.enable(seed.vcpu, uapi.KVM_CAP_PPC_OSI)
    seed.start(VMCALL + HLT, rax=OSI_MAGIC_RAX, rbx=OSI_MAGIC_RBX, rcx=0x55)
    assert seed.go() == uapi.KVM_EXIT_OSI
    assert seed.run.osi.gprs[1] == 0x55
    seed.run.osi.gprs[1] = 0x66
    assert seed.go() == uapi.KVM_EXIT_HLT
    assert seed.regs.rcx == 0x66
    request = new("kvm_enable_cap")
    request.cap = uapi.KVM_CAP_ENFORCE_PV_FEATURE_CPUID
    assert seed.errno(uapi.KVM_ENABLE_CAP, request) == EINVAL


def test_seed_registers(seed: Machine) -> None:
    """The list of 2.6.35 on an Intel processor, in its order."""
    clock = [0x12, 0x11, 0x4B564D01, 0x4B564D00]
    assert index_list(seed) == [
        *clock, 0x174, 0x175, 0x176, 0xC0000081, 0xC0000083, 0xC0000102, 0xC0000084, 0xC0000082, 0x10, 0x277,
        0x1A0, 0x17A, 0x17B,
    ]  # fmt: skip


def test_seed_mwait_is_undefined(seed: Machine) -> None:
    seed.load(struct.pack("<HH", 0x3000, 0), uapi.UD_VECTOR * 4)
    seed.load(HLT, 0x3000)
    seed.start(b"\x0f\x01\xc8" + HLT)  # monitor
    assert seed.go() == uapi.KVM_EXIT_HLT
    assert seed.regs.rip == 0x3001


# ---- processors ------------------------------------------------------------------------------------------


def names_of(table: CData) -> set[str]:
    """Return the features whose bit a table has."""
    found = set()
    for name, word in profile.feature_words().items():
        where = cpuid.WORDS.get(word)
        registers = leaf_of(table, where.function, where.index) if where else None
        if registers and where and registers[where.register] >> getattr(uapi, f"CPUID_{word}_{name}") & 1:
            found.add(name)
    return found


def vendor_words(name: str) -> tuple[int, int, int]:
    """Return ebx, ecx, edx of leaf 0."""
    text = VENDOR[profile.processor(name).vendor]
    b, d, c = struct.unpack("<3I", text)
    return b, c, d


@pytest.mark.spec("sys.GET_SUPPORTED_CPUID", "vcpu.SET_CPUID2", "cpuid.0", "cpuid.1", "cpuid.8")
@pytest.mark.parametrize("name", NAMED)
def test_a_guest_sees_the_processor(name: str, make: Callable[..., Machine]) -> None:
    machine, cpu = make(cpu=name), profile.processor(name)
    table = supported(machine)
    machine.do(uapi.KVM_SET_CPUID2, table)
    kept = cpuid_list(256)
    machine.do(uapi.KVM_GET_CPUID2, kept)
    assert kept.nent == table.nent
    assert guest(machine, 0) == (cpu.max_basic, *vendor_words(name))
    assert guest(machine, 1)[0] == cpu.signature
    brand = b"".join(struct.pack("<4I", *guest(machine, leaf)) for leaf in range(0x80000002, 0x80000005))
    assert brand.rstrip(b"\0").decode() == cpu.brand
    sizes = guest(machine, 0x80000008)[0]
    assert sizes & 0xFF == cpu.phys_bits
    assert sizes >> 8 & 0xFF in {48, cpu.virt_bits}
    assert vcpu_of(machine.vcpu).cpuid.maxphyaddr == cpu.phys_bits


@pytest.mark.parametrize("kernel", profile.kernels())
@pytest.mark.parametrize("name", profile.processors())
def test_features_are_what_all_three_have(name: str, kernel: str, make: Callable[..., Machine]) -> None:
    machine, cpu, rules = make(kernel=kernel, cpu=name), profile.processor(name), profile.kernel(kernel).cpuid
    offered = names_of(supported(machine))
    executed = {each.name for each in cpuid.FEATURES if cpuid.SUPPORTED[each.word] >> each.bit & 1}
    has = executed if cpu.as_built else set(cpu.features)
    virtualized = has if rules.features is None else has & rules.features
    assert offered <= executed
    assert offered <= virtualized | rules.software
    always = {each.name for each in cpuid.FEATURES if cpuid.WORDS[each.word].function in {1, 0x80000001}}
    assert offered >= virtualized & executed & always


@pytest.mark.parametrize(
    ("name", "yes", "no"),
    [
        ("core2", {"SSSE3", "LM"}, {"SSE4_1", "POPCNT", "AES", "RDTSCP", "GBPAGES", "SMEP"}),
        ("penryn", {"SSE4_1"}, {"SSE4_2", "POPCNT"}),
        ("nehalem", {"SSE4_2", "POPCNT", "RDTSCP"}, {"AES", "PCID", "GBPAGES"}),
        ("sandybridge", {"PCID", "GBPAGES"}, {"RDRAND", "SMEP", "FSGSBASE", "MOVBE", "BMI1"}),
        (
            "haswell",
            {"RDRAND", "SMEP", "FSGSBASE", "MOVBE", "BMI1", "BMI2", "INVPCID"},
            {"RDSEED", "ADX", "SMAP"},
        ),
        ("skylake", {"RDSEED", "ADX", "SMAP", "CLFLUSHOPT"}, {"UMIP", "RDPID", "FSRM", "SHA_NI"}),
        ("icelake", {"UMIP", "RDPID", "FSRM"}, {"SERIALIZE"}),
        ("sapphirerapids", {"SERIALIZE"}, set()),
        ("k8", {"RDTSCP", "CX16"}, {"POPCNT", "SSSE3", "ABM", "GBPAGES"}),
        ("k10", {"POPCNT", "ABM", "GBPAGES"}, {"SSSE3", "SSE4_1", "SMEP"}),
        (
            "epyc",
            {"SMEP", "SMAP", "RDSEED", "ADX", "MOVBE"},
            {"PCID", "INVPCID", "UMIP", "CLWB", "ERMS", "RDPID"},
        ),
        ("milan", {"PCID", "INVPCID", "UMIP", "CLWB", "ERMS", "FSRM"}, {"SERIALIZE"}),
    ],
)
def test_features_by_processor(name: str, yes: set[str], no: set[str]) -> None:
    offer = System(cpu=name).offer
    executed = {feature for feature in yes if System().offer.has(feature)}
    assert {feature for feature in yes | no if offer.has(feature)} == executed


@pytest.mark.spec("cpuid.governs")
@pytest.mark.parametrize(
    ("name", "code", "there"),
    [
        ("core2", b"\xf3\x66\x0f\xb8\xc3", False),  # popcnt
        ("nehalem", b"\xf3\x66\x0f\xb8\xc3", True),
        ("sandybridge", b"\x0f\x38\xf0\x07", False),  # movbe
        ("haswell", b"\x0f\x38\xf0\x07", True),
        ("haswell", b"\x66\x0f\x38\xf6\xc3", False),  # adcx
        ("skylake", b"\x66\x0f\x38\xf6\xc3", True),
        ("nehalem", b"\x0f\xc7\xf0", False),  # rdrand
        ("epyc", b"\x0f\xc7\xf0", True),
        ("k8", b"\x0f\x38\x00\xc1", False),  # pshufb
    ],
)
@pytest.mark.parametrize("table", [False, True])
def test_an_instruction_it_does_not_have_is_undefined(
    name: str, code: bytes, there: bool, table: bool, make: Callable[..., Machine]
) -> None:
    machine = make(cpu=name)
    if table:
        machine.do(uapi.KVM_SET_CPUID2, supported(make()))  # a table that promises everything
    machine.load(struct.pack("<HH", 0x3000, 0), uapi.UD_VECTOR * 4)
    machine.load(HLT, 0x3000)
    machine.start(code + HLT, rbx=5, rdi=0x2000)
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert (machine.regs.rip != 0x3001) is there


@pytest.mark.spec("cpuid.governs", "vcpu.SET_SREGS")
@pytest.mark.parametrize(
    ("name", "wanted"), [("nehalem", EINVAL), ("haswell", 0), ("k10", EINVAL), ("epyc", 0)]
)
def test_control_bits_it_does_not_have(name: str, wanted: int, make: Callable[..., Machine]) -> None:
    machine = make(cpu=name)
    machine.do(uapi.KVM_SET_CPUID2, supported(make()))
    sregs = machine.sregs
    sregs.cr4 |= uapi.X86_CR4_SMEP
    assert machine.errno(uapi.KVM_SET_SREGS, sregs) == wanted


@pytest.mark.spec("cpuid.2_4")
def test_caches(make: Callable[..., Machine]) -> None:
    table = supported(make(cpu="skylake"))
    leaves = [leaf_of(table, 4, index) for index in range(6)]
    assert [leaf[0] & 0x1F for leaf in leaves if leaf] == [1, 2, 3, 3, 0]
    l2 = leaves[2]
    assert l2 is not None
    assert ((l2[1] >> 22) + 1) * ((l2[1] & 0xFFF) + 1) * (l2[2] + 1) == 1 << 20
    assert leaf_of(table, 0x8000001D) is None


@pytest.mark.spec("cpuid.2_4", "cpuid.8")
def test_leaves_of_amd(make: Callable[..., Machine]) -> None:
    table = supported(make(cpu="epyc"))
    assert leaf_of(table, 4) == (0, 0, 0, 0)
    caches = [leaf_of(table, 0x8000001D, index) for index in range(5)]
    assert [cache[0] & 0x1F for cache in caches if cache] == [1, 2, 3, 3, 0]
    assert leaf_of(table, 0x8000001E) == (0, 0, 0, 0)
    assert leaf_of(table, 0x80000000) == (0x8000001F, *vendor_words("epyc"))
    first = leaf_of(table, 0x80000001)
    assert first is not None
    assert first[0] == 0x800F12
    flags = {table.entries[at].function: table.entries[at].flags for at in range(table.nent)}
    assert flags[0x8000001D] & uapi.KVM_CPUID_FLAG_SIGNIFCANT_INDEX
    assert leaf_of(supported(make(cpu="k10")), 0x8000001D) is None


@pytest.mark.spec("cpuid.b_1f")
def test_the_hosts_topology_was_told(make: Callable[..., Machine]) -> None:
    assert leaf_of(supported(make(cpu="skylake")), 0xB) == (0, 0, 0, 0)
    old = supported(make(cpu="skylake", kernel="5.10"))
    assert leaf_of(old, 0xB) == (1, 2, 0x100, 0)
    assert leaf_of(old, 0xB, 1) == (6, 40, 0x201, 0)


@pytest.mark.spec("cpuid.oor")
@pytest.mark.parametrize("name", ["skylake", "milan"])
def test_past_the_end(name: str, make: Callable[..., Machine]) -> None:
    machine = make(cpu=name)
    machine.do(uapi.KVM_SET_CPUID2, supported(machine))
    highest = guest(machine, profile.processor(name).max_basic)
    assert guest(machine, 0x30) == (highest if name == "skylake" else (0, 0, 0, 0))
    assert guest(machine, 0x80000060) == (highest if name == "skylake" else (0, 0, 0, 0))


@pytest.mark.spec("hc.patch", "cap.quirk_hypercall")
@pytest.mark.parametrize(
    ("name", "native", "other"), [("skylake", VMCALL, VMMCALL), ("epyc", VMMCALL, VMCALL)]
)
def test_the_other_vendors_hypercall(
    name: str, native: bytes, other: bytes, make: Callable[..., Machine]
) -> None:
    for fixed in (True, False):
        for code in (native, other):
            machine = make(cpu=name)
            if not fixed:
                machine.enable(
                    machine.vm, uapi.KVM_CAP_DISABLE_QUIRKS2, uapi.KVM_X86_QUIRK_FIX_HYPERCALL_INSN
                )
            machine.load(struct.pack("<HH", 0x3000, 0), uapi.UD_VECTOR * 4)
            machine.load(HLT, 0x3000)
            machine.start(code + HLT, rax=uapi.KVM_HC_VAPIC_POLL_IRQ)
            assert machine.go() == uapi.KVM_EXIT_HLT
            assert (machine.regs.rip == 0x3001) is (code is other and not fixed)


SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")


@pytest.mark.spec("vcpu.reset_state")
@pytest.mark.parametrize(
    ("name", "types"), [("skylake", (11, 3, 3, 3, 3, 3, 11, 2)), ("milan", (10, 3, 3, 3, 3, 2, 3, 2))]
)
def test_segments_after_reset(name: str, types: tuple[int, ...], make: Callable[..., Machine]) -> None:
    machine = make(cpu=name)
    sregs = machine.sregs
    assert tuple(getattr(sregs, each).type for each in SEGMENTS) == types
    # Given back, they stay; and the processor starts from them.
    machine.set_sregs(sregs)
    assert ffi.buffer(machine.sregs)[:] == ffi.buffer(sregs)[:]
    machine.start(HLT)
    assert machine.go() == uapi.KVM_EXIT_HLT


@pytest.mark.spec("vcpu.SET_SREGS")
@pytest.mark.parametrize(("name", "cs", "ds", "tr"), [("skylake", 11, 3, 11), ("milan", 10, 3, 11)])
def test_what_is_corrected_of_segments(
    name: str, cs: int, ds: int, tr: int, make: Callable[..., Machine]
) -> None:
    machine = make(cpu=name)
    sregs = machine.sregs
    sregs.cs.type, sregs.ds.type, sregs.tr.type = 10, 2, 11 if name == "skylake" else 9
    machine.set_sregs(sregs)
    found = machine.sregs
    assert (found.cs.type, found.ds.type, found.tr.type) == (cs, ds, tr)


@pytest.mark.spec("vcpu.events_shadow")
@pytest.mark.parametrize(("name", "back"), [("skylake", (0, 1, 2, 1)), ("milan", (0, 3, 3, 3))])
def test_the_interrupt_shadow(name: str, back: tuple[int, ...], make: Callable[..., Machine]) -> None:
    machine = make(cpu=name)
    for given, wanted in enumerate(back):
        events = machine.events
        events.flags, events.interrupt.shadow = uapi.KVM_VCPUEVENT_VALID_SHADOW, given
        machine.set_events(events)
        assert machine.events.interrupt.shadow == wanted


@pytest.mark.spec("vm.SET_TSS_ADDR")
@pytest.mark.parametrize(
    ("options", "private"),
    [
        ({"cpu": "nehalem"}, True),
        ({"cpu": "skylake"}, False),
        ({"cpu": "epyc"}, False),
        ({"cpu": "k8", "kernel": "4.14"}, False),
        ({"cpu": "skylake", "kernel": "4.14"}, True),
        ({}, False),
    ],
)
def test_the_slot_of_the_tss(options: dict[str, str], private: bool, make: Callable[..., Machine]) -> None:
    machine = make(**options)
    set_tss = uapi.KVM_SET_TSS_ADDR
    assert vm_errno(machine, set_tss, 0x20001) == (EINVAL if private else 0)
    assert vm_errno(machine, set_tss, 0x1000) == (EEXIST if private else 0)
    assert vm_errno(machine, set_tss, 0x20000) == 0
    assert vm_errno(machine, set_tss, 0x30000) == (EEXIST if private else 0)
    assert errno_of(lambda: machine.add_slot(1, 0x22000, 0x1000)) == (EEXIST if private else 0)
    machine.start(b"\xb0\x5a\xa2\x00\x00\xa0\x00\x00" + HLT)  # mov al, 0x5a; mov [0], al; mov al, [0]
    machine.segment("ds", 0x2000)
    assert machine.go() == (uapi.KVM_EXIT_HLT if private else uapi.KVM_EXIT_MMIO)


@pytest.mark.parametrize("name", ["core2", "k8"])
def test_without_nested_paging_there_is_shadow_paging(name: str, make: Callable[..., Machine]) -> None:
    machine = make(cpu=name)
    assert "no-tdp" in vcpu_of(machine.vcpu).vm.system.extensions
    machine.start(HLT)
    assert machine.go() == uapi.KVM_EXIT_HLT


@pytest.mark.spec("vcpu.GET_XCRS", "vcpu.SET_XCRS", "cap.XCRS_TSC")
@pytest.mark.parametrize(("name", "there"), [("nehalem", 0), ("k10", 0), ("sandybridge", 1), ("epyc", 1)])
def test_xcr0_needs_xsave(name: str, there: int, make: Callable[..., Machine]) -> None:
    machine = make(cpu=name)
    assert machine.cap(uapi.KVM_CAP_XCRS) == there
    registers = machine.get(uapi.KVM_GET_XCRS, "kvm_xcrs")
    assert registers.nr_xcrs == there
    assert machine.errno(uapi.KVM_SET_XCRS, registers) == (0 if there else EINVAL)
    image = machine.get(uapi.KVM_GET_XSAVE, "kvm_xsave")
    assert machine.errno(uapi.KVM_SET_XSAVE, image) == 0
    image.region[128] = uapi.XFEATURE_MASK_YMM
    offered = vcpu_of(machine.vcpu).vm.system.offer.xcr0 & uapi.XFEATURE_MASK_YMM
    assert machine.errno(uapi.KVM_SET_XSAVE, image) == (0 if offered else EINVAL)
    assert bool(offered) <= bool(there)


@pytest.mark.spec("msr.misc")
@pytest.mark.parametrize("name", ["skylake", "milan"])
def test_registers_of_a_vendor(name: str, make: Callable[..., Machine]) -> None:
    machine, amd = make(cpu=name), profile.processor(name).is_amd
    listed = index_list(machine)
    assert (uapi.MSR_IA32_FEAT_CTL in listed) is not amd
    assert (machine.get_msr(uapi.MSR_IA32_FEAT_CTL) is None) is amd
    assert machine.get_msr(uapi.MSR_IA32_UCODE_REV) == (0x01000065 if amd else 0x1_0000_0000)
    msrs = msr_list((uapi.MSR_IA32_UCODE_REV, 0))
    machine.ioctl(machine.kvm, uapi.KVM_GET_MSRS, msrs)
    assert msrs.entries[0].data == machine.get_msr(uapi.MSR_IA32_UCODE_REV)
    machine.do(uapi.KVM_SET_CPUID2, supported(machine))
    address = 0xFFFF_8000_1234_5678
    assert machine.set_msr(uapi.MSR_IA32_SYSENTER_EIP, address)
    assert machine.get_msr(uapi.MSR_IA32_SYSENTER_EIP) == (0x1234_5678 if amd else address)


def test_tsc_aux_is_listed_with_what_reads_it(make: Callable[..., Machine]) -> None:
    assert uapi.MSR_TSC_AUX in index_list(make(cpu="nehalem"))
    assert uapi.MSR_TSC_AUX not in index_list(make(cpu="core2"))


# ---- ways to ask for one ----------------------------------------------------------------------------------


def test_the_typed_layer_and_unchanged_programs() -> None:
    with pykvm.Kvm(kernel="5.10", cpu="epyc") as kvm:
        assert kvm.check_extension(uapi.KVM_CAP_NR_MEMSLOTS) == 509
        assert kvm.supported_cpuid()[0].ebx == vendor_words("epyc")[0]
    with pykvm.installed(kernel="2.6.35"):
        with pykvm.installed(cpu="k8"), open("/dev/kvm", "rb", buffering=0) as file:
            assert pykvm.ioctl(file, uapi.KVM_CHECK_EXTENSION, uapi.KVM_CAP_NR_MEMSLOTS) == 32764
        with open("/dev/kvm", "rb", buffering=0) as file:
            assert pykvm.ioctl(file, uapi.KVM_CHECK_EXTENSION, uapi.KVM_CAP_NR_MEMSLOTS) == 32


def test_two_personalities_in_one_process(make: Callable[..., Machine]) -> None:
    old, current = make(kernel="2.6.35", cpu="k8"), make()
    assert old.ioctl(old.kvm, uapi.KVM_CHECK_EXTENSION, uapi.KVM_CAP_NR_MEMSLOTS) == 32
    assert current.cap(uapi.KVM_CAP_NR_MEMSLOTS) == 32764
    assert leaf_of(supported(old), 0) != leaf_of(supported(current), 0)


PROGRAM = r"""
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <unistd.h>
static struct { struct kvm_cpuid2 head; struct kvm_cpuid_entry2 entries[100]; } table;
static void report(const char *who)
{
    int fd = open("/dev/kvm", O_RDWR);
    table.head.nent = 100;
    printf("%s %d %d ", who, ioctl(fd, KVM_CHECK_EXTENSION, KVM_CAP_NR_MEMSLOTS),
           ioctl(fd, KVM_GET_SUPPORTED_CPUID, &table));
    printf("%.4s%.4s%.4s\n", (char *)&table.entries[0].ebx, (char *)&table.entries[0].edx,
           (char *)&table.entries[0].ecx);
    fflush(stdout);
}
int main(int argc, char **argv)
{
    if (argc > 1) { report("child"); return 0; }
    clearenv();
    report("parent");
    if (!fork()) { execl("/proc/self/exe", "x", "child", (char *)0); _exit(1); }
    return wait(0) < 0;
}
"""


@pytest.mark.skipif(bool(doctor.installation_problems()), reason=str(doctor.installation_problems()))
@pytest.mark.parametrize(
    ("options", "answer"),
    [
        ((), "32764 0 GenuineIntel"),
        (("--kernel", "5.10", "--cpu", "skylake"), "509 0 GenuineIntel"),
        (("--kernel", "2.6.35", "--cpu", "k8"), "32 0 AuthenticAMD"),
    ],
)
def test_exec(options: tuple[str, ...], answer: str, tmp_path: Path) -> None:
    source, program = tmp_path / "client.c", tmp_path / "client"
    source.write_text(PROGRAM)
    subprocess.run(["cc", "-w", "-D_GNU_SOURCE", "-o", program, source], check=True)
    done = pykvm_command("exec", *options, "--", str(program))
    assert done.stdout == f"parent {answer}\nchild {answer}\n", done.stderr


def pykvm_command(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pykvm", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_command_line() -> None:
    listed = pykvm_command("profiles").stdout
    for name in (*profile.kernels(), *profile.processors()):
        assert f" {name} " in listed
    caps = pykvm_command("caps", "--kernel", "2.6.35").stdout
    assert "KVM_CAP_PPC_OSI" in caps
    assert "KVM_CAP_SYNC_REGS" not in caps
    assert (
        "hello from long mode on AuthenticAMD"
        in pykvm_command("run", "--cpu", "epyc", "--kernel", "6.1").stdout
    )
    for verb in (("run",), ("exec", "--", "/bin/true"), ("caps",)):
        refused = pykvm_command(verb[0], "--cpu", "z80", *verb[1:])
        assert refused.returncode == 2
        assert "no processor z80; there are core2" in refused.stderr


@pytest.mark.parametrize("name", profile.processors())
def test_the_guest_of_cpuid_runs_on_all(name: str, make: Callable[..., Machine]) -> None:
    """Without a table, as the first thing a client may do."""
    machine = make(cpu=name)
    machine.start(CPUID + HLT)
    assert machine.go() == uapi.KVM_EXIT_HLT
