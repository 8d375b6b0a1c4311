"""What pykvm does not offer, and why: absence is a row of the registry too.

Each answers as on a kernel that has not got it: a request with the errno of an unknown one, a capability
with 0, and an exit reason is never seen.  Who builds one removes its name here: the registry refuses a
request that is both offered and absent, and tests a capability or an exit reason.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pykvm.abi.ioctl import foreign, not_offered

if TYPE_CHECKING:
    from collections.abc import Mapping

_IRQCHIP = "interrupt controllers in the kernel come with a later issue"
_PIT = "the timer in the kernel comes with the interrupt controllers"
_EVENTFD = "eventfds come with the interrupt controllers"
_MEMORY = "guest_memfd and memory attributes are for guests whose memory is hidden from the host"
_ENCRYPTION = "there is no memory encryption (SEV, TDX) to emulate"
_XEN = "Xen guests are not emulated"
_HYPERV = "Hyper-V enlightenments are not emulated"
_PMU = "there are no performance counters to emulate"
_NESTED = "the processor has no virtualization extensions of its own"

# kind of descriptor -> why -> requests
_ABSENT: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "system": {
        _HYPERV: ("KVM_GET_SUPPORTED_HV_CPUID",),
    },
    "vm": {
        _IRQCHIP: (
            "KVM_CREATE_IRQCHIP",
            "KVM_IRQ_LINE",
            "KVM_IRQ_LINE_STATUS",
            "KVM_GET_IRQCHIP",
            "KVM_SET_IRQCHIP",
            "KVM_SIGNAL_MSI",
        ),
        _PIT: (
            "KVM_CREATE_PIT",
            "KVM_GET_PIT",
            "KVM_SET_PIT",
            "KVM_CREATE_PIT2",
            "KVM_GET_PIT2",
            "KVM_SET_PIT2",
            "KVM_REINJECT_CONTROL",
        ),
        _EVENTFD: ("KVM_IRQFD", "KVM_IOEVENTFD"),
        _MEMORY: ("KVM_SET_MEMORY_ATTRIBUTES", "KVM_CREATE_GUEST_MEMFD"),
        _PMU: ("KVM_SET_PMU_EVENT_FILTER",),
        _HYPERV: ("KVM_HYPERV_EVENTFD",),
        _XEN: (
            "KVM_XEN_HVM_CONFIG",
            "KVM_XEN_HVM_GET_ATTR",
            "KVM_XEN_HVM_SET_ATTR",
            "KVM_XEN_HVM_EVTCHN_SEND",
        ),
        _ENCRYPTION: (
            "KVM_MEMORY_ENCRYPT_OP",
            "KVM_MEMORY_ENCRYPT_REG_REGION",
            "KVM_MEMORY_ENCRYPT_UNREG_REGION",
        ),
    },
    "vcpu": {
        _IRQCHIP: ("KVM_GET_LAPIC", "KVM_SET_LAPIC", "KVM_TPR_ACCESS_REPORTING", "KVM_SET_VAPIC_ADDR"),
        _NESTED: ("KVM_GET_NESTED_STATE", "KVM_SET_NESTED_STATE"),
        _HYPERV: ("KVM_GET_SUPPORTED_HV_CPUID",),
        _XEN: ("KVM_XEN_VCPU_GET_ATTR", "KVM_XEN_VCPU_SET_ATTR"),
        _ENCRYPTION: ("KVM_MEMORY_ENCRYPT_OP",),
    },
    "device": {
        "x86 has no device but VFIO's, and there is nothing to pass through": (
            "KVM_SET_DEVICE_ATTR",
            "KVM_GET_DEVICE_ATTR",
            "KVM_HAS_DEVICE_ATTR",
        ),
    },
}

_REMOVED = "removed from Linux"
_OTHER_MACHINE = "of another architecture"

# why -> capabilities, without KVM_CAP_
CAPABILITIES: Mapping[str, tuple[str, ...]] = {
    _IRQCHIP: (
        "IRQCHIP",
        "VAPIC",
        "IRQ_INJECT_STATUS",
        "TSC_DEADLINE_TIMER",
        "SIGNAL_MSI",
        "IOAPIC_POLARITY_IGNORED",
        "SPLIT_IRQCHIP",
        "X2APIC_API",
    ),
    _PIT: ("PIT", "REINJECT_CONTROL", "PIT2", "PIT_STATE2"),
    _EVENTFD: ("IRQFD", "IOEVENTFD", "IRQFD_RESAMPLE", "IOEVENTFD_NO_LENGTH", "IOEVENTFD_ANY_LENGTH"),
    _MEMORY: ("MEMORY_ATTRIBUTES", "GUEST_MEMFD", "GUEST_MEMFD_FLAGS"),
    _ENCRYPTION: ("VM_COPY_ENC_CONTEXT_FROM", "VM_MOVE_ENC_CONTEXT_FROM"),
    _XEN: ("XEN_HVM",),
    _HYPERV: (
        "HYPERV",
        "HYPERV_VAPIC",
        "HYPERV_SPIN",
        "HYPERV_TIME",
        "HYPERV_SYNIC",
        "HYPERV_SYNIC2",
        "HYPERV_VP_INDEX",
        "HYPERV_EVENTFD",
        "HYPERV_TLBFLUSH",
        "HYPERV_SEND_IPI",
        "HYPERV_ENLIGHTENED_VMCS",
        "HYPERV_CPUID",
        "HYPERV_DIRECT_TLBFLUSH",
        "SYS_HYPERV_CPUID",
        "HYPERV_ENFORCE_CPUID",
    ),
    _PMU: ("PMU_EVENT_FILTER", "PMU_CAPABILITY", "PMU_EVENT_MASKED_EVENTS"),
    _NESTED: ("NESTED_STATE",),
    "the processor does not tell of bus locks": ("X86_BUS_LOCK_EXIT",),
    "no guest can hold the processor: every entry ends by a deadline": ("X86_NOTIFY_VMEXIT",),
    "there is no SGX": ("SGX_ATTRIBUTE",),
    "1 with shadow paging only, as in Linux": ("SMALLER_MAXPHYADDR",),
    "no version of Linux answers 1: KVM_VCPUEVENT_VALID_SHADOW in the flags says that it is there": (
        "INTR_SHADOW",
    ),
    "pykvm's extension x86-osi, when asked for": ("PPC_OSI",),
    _REMOVED: ("PV_MMU", "IOMMU", "ASSIGN_DEV_IRQ", "PCI_2_3", "MANUAL_DIRTY_LOG_PROTECT"),
    _OTHER_MACHINE: (
        "SW_TLB",
        "IRQ_MPIC",
        "IRQ_XICS",
        "VM_ATTRIBUTES",
        "GUEST_DEBUG_HW_BPS",
        "GUEST_DEBUG_HW_WPS",
        "MSI_DEVID",
        "PTP_KVM",
        "VM_GPA_BITS",
        "DIRTY_LOG_RING_WITH_BITMAP",
        "COUNTER_OFFSET",
    ),
}
# Of another architecture by their names.
_FOREIGN_PREFIXES = ("S390_", "PPC_", "SPAPR_", "ARM_", "MIPS_", "RISCV_", "LOONGARCH_")

# why -> reasons of an exit, without KVM_EXIT_
EXITS: Mapping[str, tuple[str, ...]] = {
    _IRQCHIP: ("TPR_ACCESS", "IOAPIC_EOI"),
    "what it tells of on x86 are crashes by Hyper-V's registers, SEV and TDX": ("SYSTEM_EVENT",),
    _ENCRYPTION: ("AP_RESET_HOLD", "TDX"),
    _XEN: ("XEN",),
    _HYPERV: ("HYPERV",),
    "the processor does not tell of bus locks": ("X86_BUS_LOCK",),
    "no guest can hold the processor: every entry ends by a deadline": ("NOTIFY",),
    "never used": ("EXCEPTION",),
    _OTHER_MACHINE: ("DCR", "NMI", "PAPR_HCALL", "WATCHDOG", "EPR"),
}


def why_no_capability(name: str) -> str | None:
    """Return why a KVM_CAP_* is not there; None when it is, or when nobody says."""
    return _reason(name.removeprefix("KVM_CAP_"), CAPABILITIES)


def why_no_exit(name: str) -> str | None:
    """Return why a KVM_EXIT_* never comes; None when it does, or when nobody says."""
    return _reason(name.removeprefix("KVM_EXIT_"), EXITS)


def _reason(name: str, reasons: Mapping[str, tuple[str, ...]]) -> str | None:
    listed = next((why for why, names in reasons.items() if name in names), None)
    return listed or (_OTHER_MACHINE if name.startswith(_FOREIGN_PREFIXES) else None)


for _kind, _groups in _ABSENT.items():
    for _why, _names in _groups.items():
        for _name in _names:
            not_offered(_kind, _name, why=_why)

_FOREIGN = {
    "S/390": (
        "KVM_S390_ENABLE_SIE",
        "KVM_S390_UCAS_MAP",
        "KVM_S390_UCAS_UNMAP",
        "KVM_S390_VCPU_FAULT",
        "KVM_S390_INTERRUPT",
        "KVM_S390_STORE_STATUS",
        "KVM_S390_SET_INITIAL_PSW",
        "KVM_S390_INITIAL_RESET",
        "KVM_S390_MEM_OP",
        "KVM_S390_GET_SKEYS",
        "KVM_S390_SET_SKEYS",
        "KVM_S390_IRQ",
        "KVM_S390_SET_IRQ_STATE",
        "KVM_S390_GET_IRQ_STATE",
        "KVM_S390_GET_CMMA_BITS",
        "KVM_S390_SET_CMMA_BITS",
        "KVM_S390_NORMAL_RESET",
        "KVM_S390_CLEAR_RESET",
        "KVM_S390_PV_COMMAND",
        "KVM_S390_PV_CPU_COMMAND",
        "KVM_S390_ZPCI_OP",
    ),
    "PowerPC": (
        "KVM_PPC_GET_PVINFO",
        "KVM_PPC_GET_SMMU_INFO",
        "KVM_PPC_ALLOCATE_HTAB",
        "KVM_CREATE_SPAPR_TCE",
        "KVM_CREATE_SPAPR_TCE_64",
        "KVM_ALLOCATE_RMA",
        "KVM_PPC_GET_HTAB_FD",
        "KVM_DIRTY_TLB",
        "KVM_PPC_RTAS_DEFINE_TOKEN",
        "KVM_PPC_RESIZE_HPT_PREPARE",
        "KVM_PPC_RESIZE_HPT_COMMIT",
        "KVM_PPC_CONFIGURE_V3_MMU",
        "KVM_PPC_GET_RMMU_INFO",
        "KVM_PPC_GET_CPU_CHAR",
        "KVM_PPC_SVM_OFF",
    ),
    "ARM": (
        "KVM_ARM_SET_DEVICE_ADDR",
        "KVM_ARM_VCPU_INIT",
        "KVM_ARM_PREFERRED_TARGET",
        "KVM_ARM_MTE_COPY_TAGS",
        "KVM_ARM_SET_COUNTER_OFFSET",
        "KVM_ARM_GET_REG_WRITABLE_MASKS",
        "KVM_ARM_VCPU_FINALIZE",
    ),
}

for _machine, _names in _FOREIGN.items():
    for _name in _names:
        foreign(_name, why=f"of {_machine}")
