"""What one ioctl's set is in another one's get, as Linux 6.18 was found to answer (all of it with --real)."""

from __future__ import annotations

import struct
from errno import EBUSY, EINTR, EINVAL
from typing import TYPE_CHECKING

import pytest

from pykvm import uapi
from pykvm.abi import CData, ffi, new, to_bytes
from tests.abi import differential
from tests.machine import Backend, Machine, emulated, errno_of
from tests.snapshot import supported_cpuid

if TYPE_CHECKING:
    from tests.conftest import NewMachine

HLT = b"\xf4"
MXCSR, ST, XMM, SW_RESERVED, HEADER, YMM = 24, 32, 160, 464, 512, 576
FP, SSE, AVX = 1, 2, 4
VALID = 1 << 63
OVER, UC, PCC, SIGNALED, ACTION = 1 << 62, 1 << 61, 1 << 57, 1 << 56, 1 << 55


def image(machine: Machine) -> bytearray:
    return bytearray(to_bytes(machine.get(uapi.KVM_GET_XSAVE, "kvm_xsave")))


def set_image(machine: Machine, data: bytes | bytearray, components: int) -> int:
    """Do KVM_SET_XSAVE; return its errno."""
    state = new("kvm_xsave")
    whole = bytearray(data.ljust(4096, b"\0"))
    struct.pack_into("<Q", whole, HEADER, components)
    ffi.memmove(state, bytes(whole), 4096)
    return machine.errno(uapi.KVM_SET_XSAVE, state)


def fpu_of(machine: Machine) -> CData:
    return machine.get(uapi.KVM_GET_FPU, "kvm_fpu")


def full() -> bytearray:
    """Return an image with a value of its own in every register of x87, SSE and AVX."""
    data = bytearray(4096)
    struct.pack_into("<HHHHQQI", data, 0, 0x27F, 0x3800, 0x80, 0x123, 0x1122, 0x3344, 0x1FA0)
    data[ST : ST + 128] = bytes(range(1, 129))
    data[XMM : XMM + 256] = bytes(n | 1 for n in range(256))
    data[YMM : YMM + 256] = bytes(n | 2 for n in range(256))
    return data


@pytest.mark.spec("vcpu.save_order")
def test_random_sets_are_in_the_gets_as_on_the_real_device(backend: Backend) -> None:
    if not backend.real:
        pytest.skip("compares with the real device: --real, or `python -m tests.abi.differential`")
    assert [found for seed in range(60) if (found := differential.compare(seed))] == []


# ---- XSAVE and FPU -------------------------------------------------------------------------------


@pytest.mark.spec("vcpu.SET_FPU", "vcpu.GET_XSAVE", "fpu.state_ioctl")
def test_set_fpu_makes_no_component_of_an_image(machine: Machine) -> None:
    fresh = image(machine)
    fpu = new("kvm_fpu")
    fpu.fcw, fpu.xmm[2][3], fpu.fpr[1][0] = 0x27F, 0x5A, 0x77
    machine.do(uapi.KVM_SET_FPU, fpu)
    assert image(machine) == fresh
    assert (fpu_of(machine).fcw, fpu_of(machine).xmm[2][3]) == (0x27F, 0x5A)
    # One that is there already shows it.
    assert set_image(machine, full(), FP | SSE) == 0
    machine.do(uapi.KVM_SET_FPU, fpu)
    after = image(machine)
    assert struct.unpack_from("<H", after) == (0x27F,)
    assert (after[XMM + 2 * 16 + 3], after[ST + 16], after[XMM]) == (0x5A, 0x77, 0)
    assert struct.unpack_from("<I", after, MXCSR) == (0x1FA0,)


@pytest.mark.spec("vcpu.SET_FPU", "fpu.state_ioctl")
def test_the_guest_has_what_set_fpu_set(machine: Machine) -> None:
    emulated(machine, "knows no SSE")
    fpu = new("kvm_fpu")
    fpu.fcw = 0x37F
    fpu.xmm[0][0], fpu.xmm[0][1] = 0x34, 0x12
    machine.do(uapi.KVM_SET_FPU, fpu)
    sregs = machine.sregs
    sregs.cr4 |= uapi.X86_CR4_OSFXSR
    machine.set_sregs(sregs)
    # movd eax, xmm0
    machine.start(b"\x66\x66\x0f\x7e\xc0"[1:] + HLT)
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert machine.regs.rax & 0xFFFF == 0x1234
    assert struct.unpack_from("<Q", image(machine), HEADER)[0] & SSE


@pytest.mark.spec("vcpu.SET_FPU", "vcpu.SET_XSAVE")
def test_set_fpu_does_not_bring_mxcsr_back(machine: Machine) -> None:
    # Without SSE the MXCSR of an image is checked and stored, and the register is initialised.
    assert set_image(machine, full(), FP) == 0
    fpu = fpu_of(machine)
    fpu.xmm[0][0] = 0x5A
    machine.do(uapi.KVM_SET_FPU, fpu)
    assert machine.complete() == EINTR
    assert struct.unpack_from("<I", image(machine), MXCSR) == (0x1F80,)


@pytest.mark.spec("vcpu.SET_XSAVE", "vcpu.GET_FPU", "fpu.state_ioctl")
@pytest.mark.parametrize("components", [0, FP, SSE, FP | SSE])
def test_what_an_image_leaves_out_is_initial_for_xsave_and_kept_for_fpu(
    machine: Machine, components: int
) -> None:
    assert set_image(machine, full(), FP | SSE) == 0
    before = fpu_of(machine)
    other = bytearray(b ^ 0xFF for b in full()[:HEADER])
    struct.pack_into("<I", other, MXCSR, 0x1F00)
    other[5] = 0
    assert set_image(machine, other, components) == 0
    fpu, after = fpu_of(machine), image(machine)
    assert fpu.fcw == (0x27F ^ 0xFFFF if components & FP else before.fcw)
    assert fpu.xmm[0][0] == (1 ^ 0xFF if components & SSE else before.xmm[0][0])
    assert struct.unpack_from("<H", after) == (0x27F ^ 0xFFFF if components & FP else 0x37F,)
    assert after[XMM] == (1 ^ 0xFF if components & SSE else 0)
    assert struct.unpack_from("<I", after, MXCSR) == (0x1F00 if components & SSE else 0x1F80,)
    assert struct.unpack_from("<QQ", after, HEADER) == (components, 0)


@pytest.mark.spec("vcpu.SET_XSAVE")
def test_mxcsr_is_checked_with_each_of_its_components(machine: Machine) -> None:
    data = full()
    struct.pack_into("<I", data, MXCSR, 1 << 31)
    for components in (FP, SSE, FP | SSE):
        assert set_image(machine, data, components) == EINVAL
    assert set_image(machine, data, 0) == 0


@pytest.mark.spec("vcpu.SET_XSAVE", "vcpu.GET_XSAVE")
def test_all_sixteen_bits_of_the_tag_word_come_back(machine: Machine) -> None:
    data = full()
    data[5] = 0xA5
    assert set_image(machine, data, FP) == 0
    assert image(machine)[4:6] == data[4:6]
    assert fpu_of(machine).ftwx == data[4]


@pytest.mark.spec("vcpu.GET_XSAVE")
def test_an_image_tells_what_the_host_has(new_machine: NewMachine) -> None:
    told = struct.unpack_from("<Q", image(new_machine()), SW_RESERVED)[0]
    assert told & (FP | SSE) == FP | SSE
    old = new_machine(kernel="5.10")
    if not old.backend.real:
        assert struct.unpack_from("<Q", image(old), SW_RESERVED) == (0,)


@pytest.mark.spec("vcpu.SET_XSAVE", "fpu.state_ioctl")
def test_pkru_stays_when_an_image_leaves_it_out(machine: Machine) -> None:
    cpuid = supported_cpuid(machine)
    machine.do(uapi.KVM_SET_CPUID2, cpuid)
    sizes = {e.index: (e.ebx, e.eax) for e in cpuid.entries[0 : cpuid.nent] if e.function == 0xD}
    if 9 not in sizes or machine.backend.real:
        pytest.skip("no PKRU")
    offset, pkru = sizes[9][0], 1 << 9
    data = full()
    struct.pack_into("<I", data, offset, 0x1234_5670)
    assert set_image(machine, data, FP | SSE | pkru) == 0
    assert struct.unpack_from("<I", image(machine), offset) == (0x1234_5670,)
    assert set_image(machine, full(), FP | SSE) == 0
    # Its bit is gone, and the register is as it was.
    assert not struct.unpack_from("<Q", image(machine), HEADER)[0] & pkru
    sregs = machine.sregs
    sregs.cr4 |= uapi.X86_CR4_PKE
    machine.set_sregs(sregs)
    # rdpkru
    machine.start(b"\x0f\x01\xee" + HLT, rcx=0)
    assert machine.go() == uapi.KVM_EXIT_HLT
    assert machine.regs.rax & 0xFFFF_FFFF == 0x1234_5670


# ---- events, debugging, registers ----------------------------------------------------------------


@pytest.mark.spec("vcpu.NMI", "vcpu.GET_VCPU_EVENTS", "vcpu.SET_VCPU_EVENTS")
def test_how_many_nmis_wait_follows_when_they_are_looked_at(machine: Machine) -> None:
    def masked(on: int) -> None:
        events = machine.events
        events.nmi.masked, events.flags = on, 0
        machine.set_events(events)

    for _ in range(3):
        machine.do(uapi.KVM_NMI)
    assert machine.events.nmi.pending == 2
    # Two wait, and one too many when NMIs are masked by then.
    masked(1)
    assert machine.events.nmi.pending == 1
    masked(0)
    assert machine.events.nmi.pending == 1
    # Sent while they are masked, and looked at by the call that unmasks them, before it does.
    events = machine.events
    events.nmi.masked, events.nmi.pending, events.flags = 1, 0, uapi.KVM_VCPUEVENT_VALID_NMI_PENDING
    machine.set_events(events)
    unmasked = machine.events
    unmasked.nmi.masked, unmasked.flags = 0, 0
    machine.do(uapi.KVM_NMI)
    machine.do(uapi.KVM_NMI)
    machine.set_events(unmasked)
    assert machine.events.nmi.pending == 1


@pytest.mark.spec("vcpu.SET_GUEST_DEBUG", "cap.X86_TRIPLE_FAULT_EVENT")
@pytest.mark.parametrize("inject", [uapi.KVM_GUESTDBG_INJECT_DB, uapi.KVM_GUESTDBG_INJECT_BP])
def test_nothing_is_injected_into_a_triple_fault(machine: Machine, inject: int) -> None:
    machine.enable(machine.vm, uapi.KVM_CAP_X86_TRIPLE_FAULT_EVENT, 1)
    events, debug = machine.events, new("kvm_guest_debug")
    events.triple_fault.pending = 1
    machine.set_events(events)
    debug.control = uapi.KVM_GUESTDBG_ENABLE | inject
    assert machine.errno(uapi.KVM_SET_GUEST_DEBUG, debug) == EBUSY
    assert machine.events.exception.injected == 0
    # Nor is this a moment for an interrupt.
    machine.run.request_interrupt_window = 1
    machine.start(b"\x90" + HLT, rflags=0x202)
    assert machine.go() == uapi.KVM_EXIT_SHUTDOWN
    assert machine.errno(uapi.KVM_SET_GUEST_DEBUG, debug) == 0


@pytest.mark.spec("vcpu.SET_GUEST_DEBUG", "vcpu.GET_REGS")
def test_steps_hide_the_guests_own(machine: Machine) -> None:
    tf, debug = uapi.X86_EFLAGS_TF, new("kvm_guest_debug")
    machine.set_regs(rflags=tf | 2)
    assert machine.regs.rflags & tf
    debug.control = uapi.KVM_GUESTDBG_ENABLE | uapi.KVM_GUESTDBG_SINGLESTEP
    machine.do(uapi.KVM_SET_GUEST_DEBUG, debug)
    assert not machine.regs.rflags & tf
    machine.set_regs(rflags=tf | 2)
    assert not machine.regs.rflags & tf
    debug.control = 0
    machine.do(uapi.KVM_SET_GUEST_DEBUG, debug)
    # The kernel steps by TF, and does not know then any more if the guest had set it, too; here it is known.
    assert bool(machine.regs.rflags & tf) is not machine.backend.real


@pytest.mark.spec("vcpu.TRANSLATE")
def test_the_highest_address_is_none(machine: Machine) -> None:
    translation = new("kvm_translation")
    for address, valid in (((1 << 64) - 1, 0), ((1 << 64) - 2, 1), (1 << 63, 1)):
        translation.linear_address = address
        machine.do(uapi.KVM_TRANSLATE, translation)
        assert (translation.physical_address, translation.valid) == (address, valid)


@pytest.mark.spec("msr.misc")
def test_an_amd_register_that_takes_0(machine: Machine) -> None:
    assert machine.set_msr(uapi.MSR_FAM10H_MMIO_CONF_BASE, 0)
    assert not machine.set_msr(uapi.MSR_FAM10H_MMIO_CONF_BASE, 1)
    assert machine.get_msr(uapi.MSR_FAM10H_MMIO_CONF_BASE) == 0


# ---- machine checks ------------------------------------------------------------------------------


def error(machine: Machine, bank: int, status: int, mcg_status: int = 0) -> int:
    mce = new("kvm_x86_mce")
    mce.bank, mce.status, mce.mcg_status, mce.addr, mce.misc = bank, status, mcg_status, 0x1234, 5
    return errno_of(lambda: machine.do(uapi.KVM_X86_SET_MCE, mce))


def bank_of(machine: Machine, bank: int) -> tuple[int | None, ...]:
    return tuple(machine.get_msr(uapi.MSR_IA32_MC0_CTL + 4 * bank + n) for n in range(1, 4))


@pytest.mark.spec("vcpu.X86_SET_MCE", "vcpu.X86_SETUP_MCE", "msr.mce")
def test_an_uncorrected_error_that_needs_no_action_is_logged(machine: Machine) -> None:
    machine.do(uapi.KVM_X86_SETUP_MCE, ffi.new("uint64_t *", 10 | uapi.MCG_CTL_P))
    # Whatever is turned off, and with CR4.MCE off: nobody is told.
    assert machine.set_msr(uapi.MSR_IA32_MCG_CTL, 0)
    assert machine.set_msr(uapi.MSR_IA32_MC0_CTL + 12, 0)
    for status in (VALID | UC, VALID | UC | 7):
        assert error(machine, 3, status) == 0
        assert bank_of(machine, 3) == (status, 0x1234, 5)
    assert machine.events.exception.injected == 0
    assert machine.get_msr(uapi.MSR_IA32_MCG_STATUS) == 0


@pytest.mark.spec("vcpu.X86_SET_MCE")
@pytest.mark.parametrize("bit", [PCC, SIGNALED, ACTION])
def test_one_that_needs_action_ends_a_guest_without_machine_checks(machine: Machine, bit: int) -> None:
    machine.enable(machine.vm, uapi.KVM_CAP_X86_TRIPLE_FAULT_EVENT, 1)
    machine.do(uapi.KVM_X86_SETUP_MCE, ffi.new("uint64_t *", 10))
    assert error(machine, 3, VALID | UC | bit) == 0
    assert machine.events.triple_fault.pending == 1
    assert bank_of(machine, 3) == (0, 0, 0)


@pytest.mark.spec("vcpu.X86_SET_MCE")
def test_errors_over_errors(machine: Machine) -> None:
    machine.do(uapi.KVM_X86_SETUP_MCE, ffi.new("uint64_t *", 10))
    sregs = machine.sregs
    sregs.cr4 |= uapi.X86_CR4_MCE
    machine.set_sregs(sregs)
    assert error(machine, 10, VALID) == error(machine, 0, UC) == EINVAL
    assert error(machine, 0, VALID) == error(machine, 0, VALID) == 0
    assert bank_of(machine, 0) == (VALID | OVER, 0x1234, 5)
    assert error(machine, 0, VALID | UC | PCC, mcg_status=4) == 0
    assert bank_of(machine, 0) == (VALID | UC | PCC | OVER, 0x1234, 5)
    assert machine.get_msr(uapi.MSR_IA32_MCG_STATUS) == 4
    assert (machine.events.exception.injected, machine.events.exception.nr) == (1, uapi.MC_VECTOR)
    # A corrected one does not replace it.
    assert error(machine, 0, VALID | 9) == 0
    assert bank_of(machine, 0)[0] == VALID | UC | PCC | OVER
