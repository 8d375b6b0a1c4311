"""MSRs: lists, access by the client and by the guest, filters and exits."""

from __future__ import annotations

import struct
import time
from errno import E2BIG, EINTR, EINVAL
from typing import TYPE_CHECKING

import pytest

from pykvm import uapi
from pykvm.abi import ffi, new
from tests.machine import CODE, Machine, cpuid_list, emulated, errno_of, msr_list

if TYPE_CHECKING:
    from pykvm.abi import CData
    from tests.conftest import NewMachine

HLT = b"\xf4"
RDMSR, WRMSR = b"\x0f\x32", b"\x0f\x30"
UNKNOWN = 0xDEAD0000
_ALL = (1 << 64) - 1
GP_HANDLER = 0x3000


def with_supported_cpuid(machine: Machine) -> None:
    cpuid = cpuid_list(256)
    machine.ioctl(machine.kvm, uapi.KVM_GET_SUPPORTED_CPUID, cpuid)
    machine.do(uapi.KVM_SET_CPUID2, cpuid)


def listed(machine: Machine, request: int) -> list[int]:
    lists = ffi.new("struct kvm_msr_list *", {"indices": 2048})
    lists.nmsrs = 2048
    machine.ioctl(machine.kvm, request, lists)
    return [lists.indices[at] for at in range(lists.nmsrs)]


def guest_rdmsr(machine: Machine, index: int) -> int | None:
    """Return what RDMSR gives the guest, None for #GP."""
    gp_handler(machine)
    machine.start(RDMSR + HLT, rcx=index)
    assert machine.go() == uapi.KVM_EXIT_HLT
    regs = machine.regs
    return None if regs.rip == GP_HANDLER + 1 else int(regs.rax | regs.rdx << 32)


def guest_wrmsr(machine: Machine, index: int, data: int) -> bool:
    """Do WRMSR in the guest; False for #GP."""
    gp_handler(machine)
    machine.start(WRMSR + HLT, rcx=index, rax=data & 0xFFFF_FFFF, rdx=data >> 32)
    assert machine.go() == uapi.KVM_EXIT_HLT
    if machine.regs.rip == GP_HANDLER + 1:
        # The #GP is at the WRMSR.
        assert struct.unpack_from("<H", machine.ram, 0x8000 - 6)[0] == CODE
        return False
    return True


def gp_handler(machine: Machine) -> None:
    machine.load(struct.pack("<HH", GP_HANDLER, 0), uapi.GP_VECTOR * 4)
    machine.load(HLT, GP_HANDLER)


# ---- the lists -----------------------------------------------------------------------------------


@pytest.mark.spec("sys.GET_MSR_INDEX_LIST", "sys.GET_MSR_FEATURE_INDEX_LIST")
@pytest.mark.parametrize("request_name", ["KVM_GET_MSR_INDEX_LIST", "KVM_GET_MSR_FEATURE_INDEX_LIST"])
def test_too_little_room_tells_how_much(machine: Machine, request_name: str) -> None:
    request = getattr(uapi, request_name)
    lists = ffi.new("struct kvm_msr_list *", {"indices": 512})
    assert errno_of(lambda: machine.ioctl(machine.kvm, request, lists)) == E2BIG
    count = lists.nmsrs
    assert count > 0
    lists.nmsrs = count - 1
    assert errno_of(lambda: machine.ioctl(machine.kvm, request, lists)) == E2BIG
    assert (lists.nmsrs, lists.indices[0]) == (count, 0)
    lists.nmsrs = 512
    machine.ioctl(machine.kvm, request, lists)
    assert lists.nmsrs == count


@pytest.mark.spec("msr.index_list")
def test_the_list_has_what_every_vmm_saves(machine: Machine) -> None:
    indices = listed(machine, uapi.KVM_GET_MSR_INDEX_LIST)
    assert len(set(indices)) == len(indices)
    wanted = {0x174, 0x175, 0x176, 0x10, 0x3B, 0x277, 0x1A0, 0x11, 0x12, 0x4B564D00, 0x4B564D01}
    wanted |= set(range(0xC0000081, 0xC0000085)) | {0xC0000102}
    assert wanted <= set(indices)
    for not_listed in (uapi.MSR_EFER, uapi.MSR_IA32_APICBASE, uapi.MSR_IA32_MC0_CTL, 0x200, 0x802):
        assert not_listed not in indices


@pytest.mark.spec("msr.index_list", "vcpu.GET_MSRS", "vcpu.SET_MSRS", "msr.unknown")
@pytest.mark.parametrize("cpuid", [True, False])
def test_what_is_listed_is_read_and_written_back(machine: Machine, cpuid: bool) -> None:
    emulated(machine, "lists an APIC register that needs an APIC")
    if cpuid:
        with_supported_cpuid(machine)
    indices = listed(machine, uapi.KVM_GET_MSR_INDEX_LIST)
    values = {index: machine.get_msr(index) for index in indices}
    assert [hex(index) for index, value in values.items() if value is None] == []
    needs_apic = {uapi.MSR_KVM_ASYNC_PF_INT}
    refused = [i for i, v in values.items() if v is not None and not machine.set_msr(i, v)]
    assert set(refused) <= needs_apic


@pytest.mark.spec("sys.GET_MSRS", "msr.feature")
def test_feature_msrs_are_read_on_the_device(machine: Machine) -> None:
    features = listed(machine, uapi.KVM_GET_MSR_FEATURE_INDEX_LIST)
    msrs = msr_list((features[0], 0), (UNKNOWN, 0), (features[0], 7))
    assert machine.ioctl(machine.kvm, uapi.KVM_GET_MSRS, msrs) == 1
    assert msrs.entries[2].data == 7
    assert machine.ioctl(machine.kvm, uapi.KVM_GET_MSRS, msr_list((UNKNOWN, 0))) == 0
    # One that is listed, but tells no feature.
    msrs = msr_list((uapi.MSR_IA32_TSC, 0x1234))
    assert machine.ioctl(machine.kvm, uapi.KVM_GET_MSRS, msrs) == 1
    assert msrs.entries[0].data == 0
    assert errno_of(lambda: machine.ioctl(machine.kvm, uapi.KVM_SET_MSRS, msrs)) == EINVAL


@pytest.mark.spec("vcpu.GET_MSRS", "vcpu.SET_MSRS")
def test_the_first_bad_one_ends_the_call(machine: Machine) -> None:
    assert machine.do(uapi.KVM_GET_MSRS, msr_list()) == 0
    msrs = msr_list((0x174, 0x10), (0x175, 0x20), (UNKNOWN, 0), (0x176, 0x30))
    assert machine.do(uapi.KVM_SET_MSRS, msrs) == 2
    assert (machine.get_msr(0x175), machine.get_msr(0x176)) == (0x20, 0)
    assert machine.do(uapi.KVM_GET_MSRS, msrs) == 2
    assert machine.do(uapi.KVM_GET_MSRS, msr_list((UNKNOWN, 0), (0x174, 0))) == 0


@pytest.mark.spec("vcpu.GET_MSRS", "sys.GET_MSRS", "msr.unknown")
def test_the_first_bad_one_reads_as_0(machine: Machine) -> None:
    for fd in (machine.vcpu, machine.kvm):
        msrs = msr_list((UNKNOWN, 5), (0x174, 7))
        assert machine.ioctl(fd, uapi.KVM_GET_MSRS, msrs) == 0
        assert (msrs.entries[0].data, msrs.entries[1].data) == (0, 7)


@pytest.mark.spec("vcpu.GET_MSRS", "vcpu.SET_MSRS")
def test_256_are_too_many(machine: Machine) -> None:
    many = [(0x174, 0)] * 256
    for request in (uapi.KVM_GET_MSRS, uapi.KVM_SET_MSRS):
        assert machine.do(request, msr_list(*many[:255])) == 255
        assert machine.errno(request, msr_list(*many)) == E2BIG


# ---- values --------------------------------------------------------------------------------------

REFUSED = None
# index, reset, then (written, read afterwards or refused)
VALUES: dict[str, tuple[int, int | None, list[tuple[int, int | None]]]] = {
    "SYSENTER_CS": (0x174, 0, [(0x1234, 0x1234)]),
    "SYSENTER_EIP": (0x176, 0, [(0xFFFFFFFF81000000, 0xFFFFFFFF81000000), (1 << 63, 0)]),
    "STAR": (0xC0000081, 0, [(_ALL, _ALL)]),
    "LSTAR": (0xC0000082, 0, [(0xFFFFFFFF81000000, 0xFFFFFFFF81000000), (1 << 63, REFUSED)]),
    "CSTAR": (0xC0000083, 0, [(1 << 47, REFUSED)]),
    "SFMASK": (0xC0000084, 0, [(0x47700, 0x47700)]),
    "FS_BASE": (0xC0000100, 0, [(0xFFFF888000000000, 0xFFFF888000000000), (1 << 63, REFUSED)]),
    "KERNEL_GS_BASE": (0xC0000102, 0, [(0x7FFF00000000, 0x7FFF00000000), (1 << 48, REFUSED)]),
    "TSC_AUX": (0xC0000103, 0, [(5, 5)]),
    "EFER": (0xC0000080, 0, [(1, 1), (0x801, 0x801), (0x400, 0), (0x100, 0x100), (1 << 20, REFUSED)]),
    "APICBASE": (0x1B, 0xFEE00900, [(0xFEE00100, 0xFEE00100), (0xFEC00900, 0xFEC00900), (0x1, REFUSED)]),
    "MTRRCAP": (0xFE, 0x508, [(0x508, REFUSED)]),
    "MTRR_PHYSBASE0": (0x200, 0, [(6, 6), (2, REFUSED), (1 << 52, REFUSED)]),
    "MTRR_PHYSMASK0": (0x201, 0, [(0xF80000800, 0xF80000800), (0x7FF, REFUSED)]),
    "MTRR_PHYSBASE8": (0x210, REFUSED, [(6, REFUSED)]),
    "MTRR_FIX64K": (0x250, 0, [(0x0606060606060606, 0x0606060606060606), (2, REFUSED)]),
    "MTRR_DEF_TYPE": (0x2FF, 0, [(0xC06, 0xC06), (0x1000, REFUSED), (2, REFUSED)]),
    "MCG_CAP": (0x179, 32, [(32, REFUSED)]),
    "MCG_STATUS": (0x17A, 0, [(4, 4)]),
    "MCG_CTL": (0x17B, 0, [(_ALL, REFUSED), (0, 0)]),
    "MC0_CTL": (0x400, 0, [(_ALL, _ALL), (1, REFUSED), (0, 0)]),
    "MC0_STATUS": (0x401, 0, [(0x1234, 0x1234)]),
    "MC32_CTL": (0x480, REFUSED, [(0, REFUSED)]),
    "PLATFORM_INFO": (0xCE, 1 << 31, [(0, 0)]),
    "SMI_COUNT": (0x34, 0, [(5, 5)]),
    "HWCR": (0xC0010015, 0, [(0x148, 0), (0x1000, REFUSED)]),
    "EBC_FREQUENCY_ID": (0x2C, 1 << 24, [(0, REFUSED)]),
    "PERF_STATUS": (0x198, 4 << 40 | 1000, []),
    "FSB_FREQ": (0xCD, 3, []),
    "PATCH_LOADER": (0xC0010020, REFUSED, []),
    "x2APIC": (0x802, REFUSED, [(0, REFUSED)]),
    "unknown": (UNKNOWN, REFUSED, [(0, REFUSED)]),
    "KVM_SYSTEM_TIME_NEW": (0x4B564D01, 0, [(0x2001, 0x2001), (0, 0)]),
    "KVM_WALL_CLOCK_NEW": (0x4B564D00, 0, [(0x2000, 0x2000)]),
    "KVM_ASYNC_PF_EN": (0x4B564D02, 0, [(0, 0), (0x2001, REFUSED)]),
    "KVM_STEAL_TIME": (0x4B564D03, 0, [(0x2003, REFUSED)]),
    "KVM_PV_EOI_EN": (0x4B564D04, 0, [(0x2001, 0x2001)]),
    "KVM_POLL_CONTROL": (0x4B564D05, 1, [(0, 0), (1, 1), (2, REFUSED)]),
}


@pytest.mark.spec(
    "msr.canonical", "msr.mtrr_pat", "msr.mce", "msr.misc", "msr.apicbase", "msr.efer", "msr.poll",
    "msr.pv_eoi", "msr.steal", "msr.async_pf_en", "msr.unknown", "msr.vmm_set", "vcpu.GET_MSRS",
    "vcpu.SET_MSRS", "vcpu.MSR_x2apic", "vcpu.reset_state",
)  # fmt: skip
@pytest.mark.parametrize(("index", "reset", "writes"), VALUES.values(), ids=VALUES)
def test_values(
    machine: Machine, index: int, reset: int | None, writes: list[tuple[int, int | None]]
) -> None:
    with_supported_cpuid(machine)
    assert machine.get_msr(index) == reset
    for written, wanted in writes:
        before = machine.get_msr(index)
        assert machine.set_msr(index, written) == (wanted is not REFUSED), hex(written)
        assert machine.get_msr(index) == (before if wanted is REFUSED else wanted)


@pytest.mark.spec("msr.mtrr_pat")
def test_pat_takes_no_reserved_types(machine: Machine) -> None:
    emulated(machine, "takes any")
    assert machine.get_msr(0x277) == 0x0007_0406_0007_0406
    assert machine.set_msr(0x277, 0x0007_0106_0007_0106)
    for bad in (0x0202020202020202, 0x0800000000000000, 3):
        assert not machine.set_msr(0x277, bad)
    assert machine.get_msr(0x277) == 0x0007_0106_0007_0106


@pytest.mark.spec("msr.efer", "msr.apicbase")
def test_registers_shared_with_sregs(machine: Machine) -> None:
    with_supported_cpuid(machine)
    assert machine.set_msr(uapi.MSR_EFER, 0x801)
    sregs = machine.sregs
    assert sregs.efer == 0x801
    sregs.efer, sregs.fs.base, sregs.apic_base = 1, 0x12340000, 0xFEC00900
    machine.set_sregs(sregs)
    assert machine.get_msr(uapi.MSR_EFER) == 1
    assert machine.get_msr(uapi.MSR_FS_BASE) == 0x12340000
    assert machine.get_msr(uapi.MSR_IA32_APICBASE) == 0xFEC00900


@pytest.mark.spec("msr.feature")
def test_feature_msrs_are_fixed_by_the_first_run(machine: Machine) -> None:
    emulated(machine, "offers other features")
    with_supported_cpuid(machine)
    value = machine.get_msr(uapi.MSR_IA32_ARCH_CAPABILITIES)
    assert value is not None
    assert value & 1  # RDCL_NO
    assert machine.set_msr(uapi.MSR_IA32_ARCH_CAPABILITIES, 0)
    machine.start(HLT)
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert machine.set_msr(uapi.MSR_IA32_ARCH_CAPABILITIES, 0)
    assert not machine.set_msr(uapi.MSR_IA32_ARCH_CAPABILITIES, value)
    # The microcode's revision may change at any time.
    assert machine.set_msr(uapi.MSR_IA32_UCODE_REV, 0x42 << 32)
    assert machine.get_msr(uapi.MSR_IA32_UCODE_REV) == 0x42 << 32


@pytest.mark.spec("msr.feature", "sys.GET_MSRS", "sys.GET_MSR_FEATURE_INDEX_LIST")
def test_cpuid_faulting_is_a_feature(machine: Machine) -> None:
    assert uapi.MSR_PLATFORM_INFO in listed(machine, uapi.KVM_GET_MSR_FEATURE_INDEX_LIST)
    msrs = msr_list((uapi.MSR_PLATFORM_INFO, 0))
    assert machine.ioctl(machine.kvm, uapi.KVM_GET_MSRS, msrs) == 1
    assert msrs.entries[0].data == 1 << 31
    machine.start(HLT)
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert not machine.set_msr(uapi.MSR_PLATFORM_INFO, 0)
    assert machine.set_msr(uapi.MSR_PLATFORM_INFO, 1 << 31)


@pytest.mark.spec("msr.mce", "cap.MCE", "sys.X86_GET_MCE_CAP_SUPPORTED", "vcpu.X86_SETUP_MCE")
def test_machine_check_banks(machine: Machine) -> None:
    supported = ffi.new("uint64_t *")
    machine.ioctl(machine.kvm, uapi.KVM_X86_GET_MCE_CAP_SUPPORTED, supported)
    assert supported[0] & uapi.MCG_CTL_P
    assert machine.cap(uapi.KVM_CAP_MCE) == 32
    cap = ffi.new("uint64_t *")
    for bad in (0, 33, 10 | 1 << 30):
        cap[0] = bad
        assert machine.errno(uapi.KVM_X86_SETUP_MCE, cap) == EINVAL
    cap[0] = 10 | uapi.MCG_CTL_P
    machine.do(uapi.KVM_X86_SETUP_MCE, cap)
    assert machine.get_msr(uapi.MSR_IA32_MCG_CAP) == cap[0]
    assert machine.get_msr(uapi.MSR_IA32_MCG_CTL) == _ALL
    assert machine.get_msr(uapi.MSR_IA32_MC0_CTL + 4 * 9) == _ALL
    assert machine.get_msr(uapi.MSR_IA32_MC0_CTL + 4 * 10) is None


# ---- the guest -----------------------------------------------------------------------------------


@pytest.mark.spec("cpu.wrmsr_gp", "msr.unknown")
def test_guest_and_client_share_registers(machine: Machine) -> None:
    with_supported_cpuid(machine)
    assert machine.set_msr(0x174, 0x1234)
    assert guest_rdmsr(machine, 0x174) == 0x1234
    assert guest_rdmsr(machine, UNKNOWN) is None
    assert not guest_wrmsr(machine, UNKNOWN, 0)
    assert guest_wrmsr(machine, 0x2FF, 0xC06)
    assert machine.get_msr(0x2FF) == 0xC06
    assert not guest_wrmsr(machine, 0x2FF, 2)


@pytest.mark.spec("msr.efer", "cpu.efer_gp_rip")
def test_efer_of_a_guest(machine: Machine) -> None:
    with_supported_cpuid(machine)
    assert guest_wrmsr(machine, uapi.MSR_EFER, uapi.EFER_SCE | uapi.EFER_LME | uapi.EFER_NX)
    # LMA is not the guest's to write, and stays.
    assert guest_wrmsr(machine, uapi.MSR_EFER, uapi.EFER_LMA)
    assert machine.get_msr(uapi.MSR_EFER) == 0
    for bad in (1 << 20, uapi.EFER_SVME, 1 << 63):
        assert not guest_wrmsr(machine, uapi.MSR_EFER, bad)


@pytest.mark.spec("cpuid.governs", "msr.efer")
def test_efer_follows_cpuid(machine: Machine) -> None:
    emulated(machine, "knows the host's EFER only")
    cpuid = cpuid_list(1)
    cpuid.entries[0].function, cpuid.entries[0].edx = 0x80000001, 1 << uapi.CPUID_80000001_EDX_SYSCALL
    machine.do(uapi.KVM_SET_CPUID2, cpuid)
    assert guest_wrmsr(machine, uapi.MSR_EFER, uapi.EFER_SCE)
    assert not guest_wrmsr(machine, uapi.MSR_EFER, uapi.EFER_NX)
    assert machine.set_msr(uapi.MSR_EFER, uapi.EFER_NX)


@pytest.mark.spec("msr.canonical")
@pytest.mark.parametrize("index", [0xC0000082, 0xC0000083, 0xC0000100, 0xC0000101, 0xC0000102])
def test_noncanonical_bases_fault(machine: Machine, index: int) -> None:
    with_supported_cpuid(machine)
    assert guest_wrmsr(machine, index, 0xFFFF8000_00000000)
    assert machine.get_msr(index) == 0xFFFF8000_00000000
    assert not guest_wrmsr(machine, index, 1 << 47)


@pytest.mark.spec("msr.apicbase")
def test_apic_modes_of_a_guest(machine: Machine) -> None:
    with_supported_cpuid(machine)
    assert guest_wrmsr(machine, uapi.MSR_IA32_APICBASE, 0xFEE00100)
    assert machine.run.apic_base == 0xFEE00100
    assert not guest_wrmsr(machine, uapi.MSR_IA32_APICBASE, 0xFEE00901)


@pytest.mark.spec("msr.mce")
def test_a_guest_clears_status_only(machine: Machine) -> None:
    assert machine.set_msr(0x401, 0x1234)
    assert not guest_wrmsr(machine, 0x401, 0x1)
    assert guest_wrmsr(machine, 0x401, 0)
    assert machine.set_msr(uapi.MSR_K7_HWCR, 1 << 18)
    assert not guest_wrmsr(machine, 0x401, 0x1)


@pytest.mark.spec("msr.mce")
def test_on_amd_a_guest_may_ask_to_write_status(machine: Machine) -> None:
    cpuid = cpuid_list(1)
    entry = cpuid.entries[0]
    entry.ebx, entry.edx, entry.ecx = (int.from_bytes(text, "little") for text in (b"Auth", b"enti", b"cAMD"))
    machine.do(uapi.KVM_SET_CPUID2, cpuid)
    assert not guest_wrmsr(machine, 0x401, 0x1)
    assert machine.set_msr(uapi.MSR_K7_HWCR, 1 << 18)
    assert guest_wrmsr(machine, 0x401, 0x1)


@pytest.mark.spec("vcpu.SET_MSRS")
def test_tsc_aux_of_intel_has_32_bits(machine: Machine) -> None:
    assert not machine.set_msr(uapi.MSR_TSC_AUX, 1 << 32)


@pytest.mark.spec("msr.misc", "cap.MSR_PLATFORM_INFO")
def test_platform_info_may_be_hidden(machine: Machine) -> None:
    assert guest_rdmsr(machine, uapi.MSR_PLATFORM_INFO) == 1 << 31
    machine.enable(machine.vm, uapi.KVM_CAP_MSR_PLATFORM_INFO, 0)
    assert guest_rdmsr(machine, uapi.MSR_PLATFORM_INFO) is None
    assert machine.get_msr(uapi.MSR_PLATFORM_INFO) == 1 << 31


@pytest.mark.spec("cpuid.faulting")
def test_cpuid_faulting_needs_platform_info(machine: Machine) -> None:
    emulated(machine, "does not look at it")
    assert machine.set_msr(uapi.MSR_MISC_FEATURES_ENABLES, 1)
    assert machine.set_msr(uapi.MSR_MISC_FEATURES_ENABLES, 0)
    assert machine.set_msr(uapi.MSR_PLATFORM_INFO, 0)
    assert not machine.set_msr(uapi.MSR_MISC_FEATURES_ENABLES, 1)


@pytest.mark.spec("msr.enforce", "cap.ENFORCE_PV_FEATURE_CPUID")
def test_paravirtual_registers_follow_cpuid_on_demand(machine: Machine) -> None:
    index = uapi.MSR_KVM_POLL_CONTROL
    assert guest_rdmsr(machine, index) == 1
    machine.enable(machine.vcpu, uapi.KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 1)
    assert guest_rdmsr(machine, index) is None
    machine.enable(machine.vcpu, uapi.KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 0)
    assert guest_rdmsr(machine, index) == 1


# ---- filters and exits ---------------------------------------------------------------------------


def filter_of(flags: int, *ranges: tuple[int, int, int, bytes]) -> tuple[CData, list[CData]]:
    """Return (filter, what keeps its bitmaps alive); a range is (flags, base, nmsrs, bitmap)."""
    given, keep = new("kvm_msr_filter"), []
    given.flags = flags
    for at, (access, base, nmsrs, bitmap) in enumerate(ranges):
        keep.append(ffi.new("uint8_t[]", bitmap.ljust(0x700, b"\0")))
        each = given.ranges[at]
        each.flags, each.base, each.nmsrs, each.bitmap = access, base, nmsrs, keep[-1]
    return given, keep


@pytest.mark.spec("cap.X86_USER_SPACE_MSR", "exit.X86_RDMSR", "exit.X86_WRMSR", "run.complete_then_signal")
def test_unknown_msrs_can_be_the_clients(machine: Machine) -> None:
    with pytest.raises(OSError, match=r"EINVAL|Invalid"):
        machine.enable(machine.vm, uapi.KVM_CAP_X86_USER_SPACE_MSR, 8)
    machine.enable(machine.vm, uapi.KVM_CAP_X86_USER_SPACE_MSR, uapi.KVM_MSR_EXIT_REASON_UNKNOWN)
    msr = machine.run.msr
    machine.start(RDMSR + HLT, rcx=UNKNOWN)
    assert machine.go() == uapi.KVM_EXIT_X86_RDMSR
    assert (msr.index, msr.reason, msr.error) == (UNKNOWN, uapi.KVM_MSR_EXIT_REASON_UNKNOWN, 0)
    assert machine.regs.rip == CODE
    msr.data = 0x1122334455667788
    assert machine.complete() == EINTR
    regs = machine.regs
    assert (regs.rax, regs.rdx, regs.rip) == (0x55667788, 0x11223344, CODE + 2)
    machine.start(WRMSR + HLT, rcx=UNKNOWN, rax=7, rdx=9)
    assert machine.go() == uapi.KVM_EXIT_X86_WRMSR
    assert (msr.index, msr.data) == (UNKNOWN, 9 << 32 | 7)
    assert machine.go() == uapi.KVM_EXIT_HLT


@pytest.mark.spec("exit.X86_RDMSR", "exit.X86_WRMSR")
@pytest.mark.parametrize("code", [RDMSR, WRMSR])
def test_the_client_can_refuse(machine: Machine, code: bytes) -> None:
    machine.enable(machine.vm, uapi.KVM_CAP_X86_USER_SPACE_MSR, uapi.KVM_MSR_EXIT_REASON_UNKNOWN)
    gp_handler(machine)
    machine.start(code + HLT, rcx=UNKNOWN, rax=5)
    machine.go()
    machine.run.msr.error = 1
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert machine.regs.rip == GP_HANDLER + 1
    assert machine.regs.rax == 5


@pytest.mark.spec("vm.X86_SET_MSR_FILTER", "exit.X86_RDMSR")
def test_a_filter_binds_the_guest_and_not_the_client(machine: Machine) -> None:
    with_supported_cpuid(machine)
    read, both = uapi.KVM_MSR_FILTER_READ, uapi.KVM_MSR_FILTER_READ | uapi.KVM_MSR_FILTER_WRITE
    # LSTAR, which the processor keeps by itself, is not to be read; STAR is.
    given, keep = filter_of(0, (read, uapi.MSR_STAR, 2, b"\x01"))
    machine.ioctl(machine.vm, uapi.KVM_X86_SET_MSR_FILTER, given)
    assert guest_rdmsr(machine, uapi.MSR_STAR) == 0
    assert guest_rdmsr(machine, uapi.MSR_LSTAR) is None
    assert guest_wrmsr(machine, uapi.MSR_LSTAR, 0x1234)
    assert machine.get_msr(uapi.MSR_LSTAR) == 0x1234
    machine.enable(machine.vm, uapi.KVM_CAP_X86_USER_SPACE_MSR, uapi.KVM_MSR_EXIT_REASON_FILTER)
    machine.start(RDMSR + HLT, rcx=uapi.MSR_LSTAR)
    assert machine.go() == uapi.KVM_EXIT_X86_RDMSR
    assert machine.run.msr.reason == uapi.KVM_MSR_EXIT_REASON_FILTER
    assert machine.complete() == EINTR
    given, keep = filter_of(uapi.KVM_MSR_FILTER_DEFAULT_DENY, (both, uapi.MSR_STAR, 1, b"\x01"))
    machine.ioctl(machine.vm, uapi.KVM_X86_SET_MSR_FILTER, given)
    machine.enable(machine.vm, uapi.KVM_CAP_X86_USER_SPACE_MSR, 0)
    assert guest_wrmsr(machine, uapi.MSR_STAR, 5)
    assert not guest_wrmsr(machine, uapi.MSR_LSTAR, 5)
    given, keep = filter_of(0)
    machine.ioctl(machine.vm, uapi.KVM_X86_SET_MSR_FILTER, given)
    assert guest_rdmsr(machine, uapi.MSR_LSTAR) == 0x1234
    assert keep == []


@pytest.mark.spec("vm.X86_SET_MSR_FILTER")
@pytest.mark.parametrize(
    ("flags", "ranges"),
    [
        (2, ()),
        (uapi.KVM_MSR_FILTER_DEFAULT_DENY, ()),
        (0, ((0, 0x10, 1, b""),)),
        (0, ((4, 0x10, 1, b""),)),
        (0, ((1, 0x10, 0x600 * 8 + 1, b""),)),
    ],
    ids=["flags", "denies all", "no access", "unknown access", "too large"],
)
def test_bad_filters(machine: Machine, flags: int, ranges: tuple[tuple[int, int, int, bytes], ...]) -> None:
    given, keep = filter_of(flags, *ranges)
    assert errno_of(lambda: machine.ioctl(machine.vm, uapi.KVM_X86_SET_MSR_FILTER, given)) == EINVAL
    assert len(keep) == len(ranges)


# ---- time ----------------------------------------------------------------------------------------


@pytest.mark.spec("msr.tsc", "vcpu.TSC_KHZ")
def test_the_tsc_is_set_and_runs_on(new_machine: NewMachine) -> None:
    machine = new_machine()
    emulated(machine, "does not offset the TSC")
    with_supported_cpuid(machine)
    khz = machine.do(uapi.KVM_GET_TSC_KHZ)
    second = khz * 1000
    first = machine.get_msr(uapi.MSR_IA32_TSC)
    assert first is not None
    assert first < 10 * second  # it started with the vCPU
    assert machine.set_msr(uapi.MSR_IA32_TSC, 1 << 50)
    later = machine.get_msr(uapi.MSR_IA32_TSC)
    assert later is not None
    assert 1 << 50 < later < (1 << 50) + 10 * second
    # The client's write does not count as the guest's adjustment; the guest's own does.
    assert machine.get_msr(uapi.MSR_IA32_TSC_ADJUST) == 0
    assert guest_wrmsr(machine, uapi.MSR_IA32_TSC, 1 << 40)
    adjust = machine.get_msr(uapi.MSR_IA32_TSC_ADJUST)
    assert adjust is not None
    assert adjust >> 63
    # Writing the adjustment moves the guest's counter, not so for the client.
    assert guest_wrmsr(machine, uapi.MSR_IA32_TSC_ADJUST, 0)
    moved = guest_rdmsr(machine, uapi.MSR_IA32_TSC)
    assert moved is not None
    assert moved > 1 << 50
    assert machine.set_msr(uapi.MSR_IA32_TSC_ADJUST, 1 << 60)
    assert (machine.get_msr(uapi.MSR_IA32_TSC) or 0) < 1 << 51


@pytest.mark.spec("msr.tsc")
def test_vcpus_restored_one_after_another_agree(new_machine: NewMachine) -> None:
    machine = new_machine()
    emulated(machine, "does not offset the TSC")
    other = machine.ioctl(machine.vm, uapi.KVM_CREATE_VCPU, 1)
    offset, attr = ffi.new("uint64_t *"), new("kvm_device_attr")
    attr.group, attr.attr, attr.addr = uapi.KVM_VCPU_TSC_CTRL, uapi.KVM_VCPU_TSC_OFFSET, address(offset)

    def offset_of(vcpu: int) -> int:
        machine.ioctl(vcpu, uapi.KVM_GET_DEVICE_ATTR, attr)
        return int(offset[0])

    assert offset_of(machine.vcpu) == offset_of(other)
    assert machine.set_msr(uapi.MSR_IA32_TSC, 1 << 50)
    assert offset_of(machine.vcpu) != offset_of(other)
    # A little later, a little more: the same moment is meant.
    machine.ioctl(other, uapi.KVM_SET_MSRS, msr_list((uapi.MSR_IA32_TSC, (1 << 50) + 1000)))
    assert offset_of(machine.vcpu) == offset_of(other)
    machine.ioctl(other, uapi.KVM_SET_MSRS, msr_list((uapi.MSR_IA32_TSC, 1 << 51)))
    assert offset_of(machine.vcpu) != offset_of(other)


def address(pointer: CData) -> int:
    return int(ffi.cast("uintptr_t", pointer))


@pytest.mark.spec("vcpu.TSC_OFFSET", "vcpu.TSC_KHZ", "vm.TSC_KHZ", "cap.XCRS_TSC")
def test_tsc_attributes(new_machine: NewMachine) -> None:
    machine = new_machine()
    emulated(machine, "does not offset or scale the TSC")
    value, attr = ffi.new("uint64_t *"), new("kvm_device_attr")
    value[0] = 1 << 40
    attr.group, attr.attr, attr.addr = uapi.KVM_VCPU_TSC_CTRL, uapi.KVM_VCPU_TSC_OFFSET, address(value)
    for request in (uapi.KVM_HAS_DEVICE_ATTR, uapi.KVM_SET_DEVICE_ATTR, uapi.KVM_GET_DEVICE_ATTR):
        assert machine.do(request, attr) == 0
    assert value[0] == 1 << 40
    khz = machine.do(uapi.KVM_GET_TSC_KHZ)
    assert 100_000 < khz < 10_000_000
    assert khz == machine.ioctl(machine.vm, uapi.KVM_GET_TSC_KHZ)
    machine.do(uapi.KVM_SET_TSC_KHZ, khz // 2)
    assert machine.do(uapi.KVM_GET_TSC_KHZ) == khz // 2
    machine.do(uapi.KVM_SET_TSC_KHZ, 0)
    assert machine.do(uapi.KVM_GET_TSC_KHZ) == khz
    assert machine.errno(uapi.KVM_SET_TSC_KHZ, 0x7FFF_FFFF) == EINVAL
    assert errno_of(lambda: machine.ioctl(machine.vm, uapi.KVM_SET_TSC_KHZ, khz)) == EINVAL


@pytest.mark.spec("vcpu.TSC_OFFSET", "msr.tsc")
def test_a_tsc_written_after_an_offset_was_is_taken_for_the_same(machine: Machine) -> None:
    emulated(machine, "does not offset the TSC")
    value, attr = ffi.new("uint64_t *"), new("kvm_device_attr")
    attr.group, attr.attr, attr.addr = uapi.KVM_VCPU_TSC_CTRL, uapi.KVM_VCPU_TSC_OFFSET, address(value)
    value[0] = 1 << 40
    machine.do(uapi.KVM_SET_DEVICE_ATTR, attr)
    tsc = machine.get_msr(uapi.MSR_IA32_TSC)
    assert tsc is not None
    assert machine.set_msr(uapi.MSR_IA32_TSC, tsc + 1000)
    machine.do(uapi.KVM_GET_DEVICE_ATTR, attr)
    assert value[0] == 1 << 40


@pytest.mark.spec("msr.system_time", "vcpu.KVMCLOCK_CTRL")
@pytest.mark.parametrize(("gpa", "there"), [(0x2FE0, True), (0x2FE4, False)])
def test_kvmclock_does_not_cross_pages(machine: Machine, gpa: int, there: bool) -> None:
    with_supported_cpuid(machine)
    assert machine.set_msr(uapi.MSR_KVM_SYSTEM_TIME_NEW, gpa | 1)
    assert machine.errno(uapi.KVM_KVMCLOCK_CTRL) == (0 if there else EINVAL)
    machine.start(HLT)
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert any(machine.ram[gpa : gpa + 32]) is there


PVCLOCK = struct.Struct("<IIQQIbB2x")


@pytest.mark.spec(
    "msr.system_time", "msr.pvclock_protocol", "msr.pvclock_flags", "vcpu.KVMCLOCK_CTRL", "cpuid.f3"
)
def test_the_page_of_kvmclock(machine: Machine) -> None:
    assert machine.errno(uapi.KVM_KVMCLOCK_CTRL) == EINVAL
    assert guest_wrmsr(machine, uapi.MSR_KVM_SYSTEM_TIME_NEW, 0x2001)
    version, pad, timestamp, system_time, mul, shift, flags = PVCLOCK.unpack_from(machine.ram, 0x2000)
    assert version
    assert not version & 1
    assert pad == 0
    clock, tsc = new("kvm_clock_data"), 0
    machine.ioctl(machine.vm, uapi.KVM_GET_CLOCK, clock)
    tsc = machine.get_msr(uapi.MSR_IA32_TSC) or 0
    delta = (tsc - timestamp) & _ALL
    ns = system_time + ((delta << shift if shift >= 0 else delta >> -shift) * mul >> 32)
    if not machine.backend.real:
        assert abs(ns - clock.clock) < 50_000_000
        assert flags == uapi.PVCLOCK_TSC_STABLE_BIT
    machine.do(uapi.KVM_KVMCLOCK_CTRL)
    machine.start(HLT)
    assert machine.go() == uapi.KVM_EXIT_HLT
    newer, *_, flags = PVCLOCK.unpack_from(machine.ram, 0x2000)
    assert newer > version
    assert flags & uapi.PVCLOCK_GUEST_STOPPED
    # Off: the page is left alone.
    assert guest_wrmsr(machine, uapi.MSR_KVM_SYSTEM_TIME_NEW, 0)
    page = machine.ram[0x2000:0x2020]
    machine.set_regs(rip=CODE)
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert machine.ram[0x2000:0x2020] == page


@pytest.mark.spec("msr.wall_clock", "msr.wall_version", "cpuid.f0")
@pytest.mark.parametrize("index", [uapi.MSR_KVM_WALL_CLOCK, uapi.MSR_KVM_WALL_CLOCK_NEW])
def test_the_wall_clock(machine: Machine, index: int) -> None:
    before = time.time()
    machine.load(struct.pack("<I", 0xDEADBEEF), 0x2000)  # garbage, and odd
    assert guest_wrmsr(machine, index, 0x2000)
    version, sec, nsec = struct.unpack_from("<III", machine.ram, 0x2000)
    assert version == 0xDEADBEEF + 3
    clock = new("kvm_clock_data")
    machine.ioctl(machine.vm, uapi.KVM_GET_CLOCK, clock)
    # Time of day when kvmclock was 0, and kvmclock: now.
    assert abs(sec + nsec / 1e9 + clock.clock / 1e9 - before) < 5
    assert nsec < 1_000_000_000
    assert machine.get_msr(index) == 0x2000


@pytest.mark.spec("vm.GET_CLOCK", "vm.SET_CLOCK")
@pytest.mark.parametrize("flags", [0, uapi.KVM_CLOCK_REALTIME])
def test_kvmclock_wraps_around(machine: Machine, flags: int) -> None:
    clock = new("kvm_clock_data")
    clock.flags, clock.clock = flags, _ALL
    clock.realtime = time.time_ns() - 10**6
    machine.ioctl(machine.vm, uapi.KVM_SET_CLOCK, clock)
    guest_wrmsr(machine, uapi.MSR_KVM_SYSTEM_TIME_NEW, 0x2001)
    machine.ioctl(machine.vm, uapi.KVM_GET_CLOCK, clock)
    assert clock.clock < 10**11


@pytest.mark.spec("vm.GET_CLOCK", "vm.SET_CLOCK", "cap.ADJUST_CLOCK")
def test_kvmclock_of_the_vm(machine: Machine) -> None:
    clock = new("kvm_clock_data")

    def set_errno() -> int:
        return errno_of(lambda: machine.ioctl(machine.vm, uapi.KVM_SET_CLOCK, clock))

    clock.flags = 1
    assert set_errno() == EINVAL
    clock.flags, clock.clock = 0, 10**12
    assert set_errno() == 0
    machine.ioctl(machine.vm, uapi.KVM_GET_CLOCK, clock)
    assert 10**12 <= clock.clock < 10**12 + 10**10
    assert not clock.flags & ~machine.cap(uapi.KVM_CAP_ADJUST_CLOCK)
    if machine.backend.real:
        return
    assert clock.flags == 0xE
    clock.flags, clock.realtime = uapi.KVM_CLOCK_REALTIME, clock.realtime - 10**11
    assert set_errno() == 0
    machine.ioctl(machine.vm, uapi.KVM_GET_CLOCK, clock)
    assert clock.clock >= 10**12 + 10**11


@pytest.mark.spec("vm.X86_SET_MSR_FILTER")
def test_a_range_that_wraps_around_matches_nothing(machine: Machine) -> None:
    emulated(machine, "has no such register")
    machine.enable(machine.vm, uapi.KVM_CAP_X86_USER_SPACE_MSR, uapi.KVM_MSR_EXIT_REASON_FILTER)
    given, _keep = filter_of(0, (uapi.KVM_MSR_FILTER_READ, 0xFFFF_FFFF, 8, b"\0"))
    machine.ioctl(machine.vm, uapi.KVM_X86_SET_MSR_FILTER, given)
    assert guest_rdmsr(machine, 0xFFFF_FFFF) is None
