"""Personalities: which kernel and which processor the fake device claims to be.

Each is data, one TOML file in pykvm/profiles, with its sources in comments.  What a file does not
say is as on the newest kernel, and as this processor can do it; a name that does not exist is an
error when the file is read.  Code that differs between kernels or vendors asks `vm.kernel` and
`vm.processor` for the one thing it needs to know, and never for a name.
"""

from __future__ import annotations

import dataclasses
import errno
import tomllib
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from pykvm.abi import capabilities, requests, uapi
from pykvm.abi.ioctl import KINDS, rows

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

DEFAULT_KERNEL = "6.18"
DEFAULT_PROCESSOR = "pykvm"
VENDORS = frozenset({"intel", "amd"})

Registers: TypeAlias = tuple[int, int, int, int]
T = TypeVar("T")


class ProfileError(ValueError):
    """A profile that says something impossible.  Seen in tests, or by who writes one."""


# ---- kernels ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much of something there can be.

    `soft_vcpus`: the recommended number; None: the host's processors.  `vcpu_ids`: ids are below it.
    `memslots`: per address space.  `cpuid_entries`: in a table, the client's or KVM's.
    """

    vcpus: int = 1024
    soft_vcpus: int | None = None
    vcpu_ids: int = 4096
    memslots: int = 32764
    address_spaces: int = 2
    cpuid_entries: int = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCpuid:
    """What the kernel makes of a processor's CPUID.

    `features`: those it can virtualize; None: all.  `software`: those it offers on any processor.
    `pv_features`: KVM_FEATURE_* it has, None: all.  `signature_eax`: highest leaf of the signature.
    `exact_room`: a table that just fits is enough.  `stateful_leaf_2`: leaf 2 is flagged as one that
    changes.  `host_topology`: leaf 0xB tells the host's.  `guest_phys_bits`: leaf 0x80000008 has them.
    `out_of_range`: what a leaf that is not there gives: "vendor": by the table's vendor, "basic": the
    highest basic leaf for all, "half": the highest leaf of the same half.
    `any_after_run`: a vCPU that has run takes another table.
    """

    max_basic: int = 0x24
    max_extended: int = 0x8000_0022
    features: frozenset[str] | None = None
    software: frozenset[str] = frozenset()
    pv_features: int | None = None
    signature_eax: int = 0x4000_0001
    exact_room: bool = True
    stateful_leaf_2: bool = False
    host_topology: bool = False
    guest_phys_bits: bool = True
    out_of_range: str = "vendor"
    any_after_run: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelMsrs:
    """Which registers the kernel knows.

    `save`: those of KVM_GET_MSR_INDEX_LIST in its order, None: all that are to be saved.
    `absent`: those it does not know at all.  `feature`: those that tell features, None: all.
    `others_on_system`: /dev/kvm reads registers that tell no feature, as 0.  `immutable`: those that tell
    features stay what they are once the vCPU has run.  `clears_unreadable`: the entry of one that cannot be
    read is set to 0.
    """

    save: tuple[int, ...] | None = None
    absent: frozenset[int] = frozenset()
    feature: frozenset[int] | None = None
    others_on_system: bool = True
    immutable: bool = True
    clears_unreadable: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """What changed in the way the kernel does things; the newest way is the default.

    `immediate_exit`: kvm_run.immediate_exit is looked at.  `sync_regs`: kvm_valid_regs and
    kvm_dirty_regs are.  `memory_fault_exit`: a KVM_RUN that fails for want of memory says where.
    `out_waits`: rip stays on an OUT until it is completed.  `emulation_failure_data`: such exits carry
    the instruction.  `delivery_event_gpa`, `last_cpu`: DELIVERY_EV exits always carry the address, and
    the host's processor.
    `mwait_is_nop`: MONITOR and MWAIT do nothing instead of raising #UD.
    `quirks`: KVM_X86_QUIRK_* that can be turned off, None: all.  `quirks_add_up`: each call turns more
    of them off.  `master_clock`: kvmclock can be one clock of all vCPUs.  `clock_set_flags`: flags
    KVM_SET_CLOCK takes.  `tsc_khz_fixed`: the VM's TSC frequency is, once it has vCPUs.
    `vcpu_events_get`: flags always in KVM_GET_VCPU_EVENTS; `vcpu_events_set`: those that can be set.
    `tss_slot_always`: KVM_SET_TSS_ADDR makes a slot on every processor of Intel's; `tss_slot_replaced`:
    and may be called again.  `tss_addr_errno`: its error for a bad address.
    `strict_memslots`: flags, address and existence of slots are checked.
    `strict_identity_map`, `strict_debugregs`, `strict_mp_state`: arguments of these are.
    `xsave_tells_host`: KVM_GET_XSAVE's image names the host's components, where software may.
    """

    immediate_exit: bool = True
    sync_regs: bool = True
    memory_fault_exit: bool = True
    out_waits: bool = True
    emulation_failure_data: bool = True
    delivery_event_gpa: bool = True
    last_cpu: bool = True
    mwait_is_nop: bool = True
    quirks: int | None = None
    quirks_add_up: bool = True
    master_clock: bool = True
    clock_set_flags: int = uapi.KVM_CLOCK_TSC_STABLE | uapi.KVM_CLOCK_REALTIME | uapi.KVM_CLOCK_HOST_TSC
    clock_get_flags: int = uapi.KVM_CLOCK_TSC_STABLE | uapi.KVM_CLOCK_REALTIME | uapi.KVM_CLOCK_HOST_TSC
    tsc_khz_fixed: bool = True
    vcpu_events_get: int = (
        uapi.KVM_VCPUEVENT_VALID_NMI_PENDING | uapi.KVM_VCPUEVENT_VALID_SHADOW | uapi.KVM_VCPUEVENT_VALID_SMM
    )
    vcpu_events_set: int = (
        uapi.KVM_VCPUEVENT_VALID_NMI_PENDING
        | uapi.KVM_VCPUEVENT_VALID_SIPI_VECTOR
        | uapi.KVM_VCPUEVENT_VALID_SHADOW
        | uapi.KVM_VCPUEVENT_VALID_SMM
        | uapi.KVM_VCPUEVENT_VALID_PAYLOAD
        | uapi.KVM_VCPUEVENT_VALID_TRIPLE_FAULT
    )
    tss_slot_always: bool = False
    tss_slot_replaced: bool = False
    tss_addr_errno: int = errno.EINVAL
    strict_memslots: bool = True
    strict_identity_map: bool = True
    strict_debugregs: bool = True
    strict_mp_state: bool = True
    xsave_tells_host: bool = True


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Kernel:
    """A version of Linux, as far as KVM's clients can tell.

    `extensions`: pykvm's, that come with it.  `capabilities`: answers of KVM_CHECK_EXTENSION by name,
    None: as built here; a mapping of None: all.  `not_enabled`: capabilities that are there and that
    KVM_ENABLE_CAP does not take.  `ioctls`: requests by kind of descriptor, None: all that were not
    removed.
    """

    name: str
    title: str
    extensions: frozenset[str] = frozenset()
    capabilities: Mapping[str, int | None] | None = None
    not_enabled: frozenset[str] = frozenset()
    ioctls: Mapping[str, frozenset[str]] | None = None
    limits: Limits = field(default_factory=Limits)
    cpuid: KernelCpuid = field(default_factory=KernelCpuid)
    msrs: KernelMsrs = field(default_factory=KernelMsrs)
    behaviour: Behaviour = field(default_factory=Behaviour)

    def capability(self, name: str, as_built: Callable[[], int]) -> int:
        """Return the answer to KVM_CHECK_EXTENSION; `as_built`: what it would be without a profile."""
        if self.capabilities is None:
            return as_built()
        if name not in self.capabilities:
            return 0
        value = self.capabilities[name]
        return as_built() if value is None else value

    def can_enable(self, name: str) -> bool:
        """Say if KVM_ENABLE_CAP may take a capability, provided that somebody can enable it."""
        known = self.capabilities is None or name in self.capabilities
        return known and name not in self.not_enabled

    def has_ioctl(self, kind: str, name: str, removed: str | None) -> bool:
        """Say if descriptors of a kind take a request; `removed`: the version that no longer had it."""
        if self.ioctls is None:
            return removed is None
        return name in self.ioctls.get(kind, ())


@cache
def absent_requests(kernel: Kernel, kind: str) -> frozenset[int]:
    """Return the requests of this kind of descriptor that are known here and not to the kernel."""
    return frozenset(row.request for row in rows(kind) if not kernel.has_ioctl(kind, row.name, row.removed))


# ---- processors ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """A cache: `type` "data", "instruction" or "unified"; `shared` by so many logical processors."""

    type: str
    level: int
    kib: int
    ways: int
    line: int = 64
    shared: int = 1
    inclusive: bool = False

    @property
    def registers(self) -> Registers:
        """Return its subleaf of leaf 4 or 0x8000001d; cores per package are for leaf 4 to add."""
        kinds = {"data": 1, "instruction": 2, "unified": 3}
        eax = kinds[self.type] | self.level << 5 | 1 << 8 | (self.shared - 1) << 14
        sets = (self.kib << 10) // (self.ways * self.line)
        return eax, self.line - 1 | (self.ways - 1) << 22, sets - 1, 2 if self.inclusive else 0


# Ice Lake's model number: its ARCH_CAPABILITIES say that a page may change its size under the iTLB.
_FIRST_WITH_PSCHANGE_MC_NO = 0x6A


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Processor:
    """A processor, as CPUID, KVM's vendor module and reset show it.

    `as_built`: it is just what this one can do, and nothing below counts but the vendor.
    `features`: names as in x86.h; what this processor cannot execute is left out when it is offered.
    `leaves`: registers of leaves that are not made of the other members.  `unrestricted_guest`: Intel's
    needs no TSS in guest memory for real mode.  `two_dimensional_paging`: EPT or NPT.
    `microcode`: the revision after reset.  `absent_msrs`: those that its vendor module does not know.
    """

    name: str
    title: str
    vendor: str
    as_built: bool = False
    brand: str = ""
    family: int = 0
    model: int = 0
    stepping: int = 0
    phys_bits: int = 0
    virt_bits: int = 48
    max_basic: int = 0
    max_extended: int = 0x8000_0008
    cores: int = 1
    threads: int = 1
    features: frozenset[str] = frozenset()
    caches: tuple[Cache, ...] = ()
    leaves: Mapping[int, Registers] = field(default_factory=dict)
    unrestricted_guest: bool = True
    two_dimensional_paging: bool = True
    microcode: int = 0x1_0000_0000
    absent_msrs: frozenset[int] = frozenset()

    @property
    def is_amd(self) -> bool:
        """Say if kvm_amd serves this processor."""
        return self.vendor == "amd"

    @property
    def itlb_multihit(self) -> bool:
        """Say if a code page that changes its size may stop it: Intel's before Ice Lake (cpu/common.c)."""
        return self.vendor == "intel" and not self.as_built and self.model < _FIRST_WITH_PSCHANGE_MC_NO

    @property
    def signature(self) -> int:
        """Return eax of leaf 1: family, model, stepping."""
        family, more = min(self.family, 0xF), max(self.family - 0xF, 0)
        return more << 20 | self.model >> 4 << 16 | family << 8 | (self.model & 0xF) << 4 | self.stepping

    def shadow_read_back(self, shadow: int) -> int:
        """Return what KVM_GET_VCPU_EVENTS tells of an interrupt shadow: AMD's have one kind only."""
        both = uapi.KVM_X86_SHADOW_INT_STI | uapi.KVM_X86_SHADOW_INT_MOV_SS
        return both if self.is_amd and shadow else shadow


# ---- reading them ------------------------------------------------------------------------------------


def _files(kind: str) -> tuple[str, ...]:
    names = (entry.name for entry in resources.files("pykvm").joinpath("profiles").iterdir())
    start, end = f"{kind}-", ".toml"
    found = (
        n.removeprefix(start).removesuffix(end) for n in names if n.startswith(start) and n.endswith(end)
    )
    return tuple(sorted(found, key=_sort_key))


def _sort_key(name: str) -> tuple[list[int], str]:
    numbers = [int(part) for part in name.split(".") if part.isdecimal()]
    return numbers, name


def kernels() -> tuple[str, ...]:
    """Return the names of all kernels, oldest first."""
    return _files("kernel")


def processors() -> tuple[str, ...]:
    """Return the names of all processors."""
    return _files("cpu")


def _read(kind: str, name: str, names: Callable[[], tuple[str, ...]]) -> dict[str, Any]:
    file = resources.files("pykvm").joinpath("profiles", f"{kind}-{name}.toml")
    try:
        text = file.read_text(encoding="utf-8") if name and "/" not in name else ""
    except OSError:
        text = ""
    if not text:
        what = "kernel" if kind == "kernel" else "processor"
        msg = f"no {what} {name}; there are {', '.join(names())}"
        raise ValueError(msg)
    return tomllib.loads(text)


@cache
def kernel(name: str = DEFAULT_KERNEL) -> Kernel:
    """Return a kernel's profile.  Raises ValueError when there is none of that name."""
    table = _read("kernel", name, kernels)
    values: dict[str, Any] = {"name": name, "title": _take(table, "title", str)}
    values["extensions"] = frozenset(_take(table, "extensions", list, []))
    if "capabilities" in table:
        values["capabilities"] = MappingProxyType(_capabilities(table.pop("capabilities")))
    values["not_enabled"] = frozenset(_known_caps(_take(table, "not_enabled", list, [])))
    if "ioctls" in table:
        values["ioctls"] = MappingProxyType(_ioctls(table.pop("ioctls")))
    values["limits"] = _fill(Limits, table.pop("limits", {}))
    values["cpuid"] = _fill(KernelCpuid, _kernel_cpuid(table.pop("cpuid", {})))
    values["msrs"] = _fill(KernelMsrs, _kernel_msrs(table.pop("msrs", {})))
    values["behaviour"] = _fill(Behaviour, _behaviour(table.pop("behaviour", {})))
    return _fill(Kernel, {**values, **table})


@cache
def processor(name: str = DEFAULT_PROCESSOR) -> Processor:
    """Return a processor's profile.  Raises ValueError when there is none of that name."""
    table = _read("cpu", name, processors)
    table["features"] = _features(table.get("features", []))
    table["caches"] = tuple(_fill(Cache, cache_) for cache_ in table.get("caches", []))
    table["leaves"] = MappingProxyType(
        {int(k, 16): _registers(v) for k, v in table.pop("leaves", {}).items()}
    )
    table["absent_msrs"] = frozenset(_msrs(table.get("absent_msrs", [])))
    found = _fill(Processor, {"name": name, **table})
    if found.vendor not in VENDORS:
        raise ProfileError(f"vendor {found.vendor}")
    return found


def _take(table: dict[str, Any], key: str, kind: type[T], default: T | None = None) -> T:
    value = table.pop(key, default)
    if not isinstance(value, kind):
        raise ProfileError(f"{key} is missing, or no {kind.__name__}")
    return value


def _fill(kind: type[T], table: dict[str, Any]) -> T:
    known = {each.name for each in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := table.keys() - known:
        raise ProfileError(f"{kind.__name__} has no {', '.join(sorted(unknown))}")
    return kind(**table)


def _known_caps(names: list[str]) -> list[str]:
    for name in names:
        if name not in capabilities():
            raise ProfileError(f"no capability {name}")
    return names


def _capabilities(table: dict[str, Any]) -> dict[str, int | None]:
    _known_caps(list(table))
    return {name: None if value is True else int(value) for name, value in table.items()}


def _ioctls(table: dict[str, list[str]]) -> dict[str, frozenset[str]]:
    for kind, names in table.items():
        if kind not in KINDS:
            raise ProfileError(f"no kind of descriptor {kind}")
        for name in names:
            if name not in requests() or kind not in requests()[name].fds:
                raise ProfileError(f"no request {name} on {kind}")
    return {kind: frozenset(names) for kind, names in table.items()}


def _registers(values: list[int]) -> Registers:
    a, b, c, d = values
    return a, b, c, d


@cache
def feature_words() -> Mapping[str, str]:
    """Return the word, such as "7_EBX", that each feature of x86.h is a bit of."""
    words = ("1_ECX", "1_EDX", "6_EAX", "7_EBX", "7_ECX", "7_EDX", "7_1_EAX", "D_1_EAX", "80000001_ECX",
             "80000001_EDX", "80000007_EDX", "80000008_EBX")  # fmt: skip
    found = {}
    for name in dir(uapi):
        for word in words:
            start = f"CPUID_{word}_"
            if name.startswith(start) and not name[len(start) :].startswith(("EAX_", "EBX_")):
                found[name[len(start) :]] = word
    return MappingProxyType(found)


def _features(names: list[str]) -> frozenset[str]:
    for name in names:
        if name not in feature_words():
            raise ProfileError(f"no feature {name}")
    return frozenset(names)


def _constant(name: str | int) -> int:
    value = getattr(uapi, name, None) if isinstance(name, str) else name
    if not isinstance(value, int):
        raise ProfileError(f"no constant {name}")
    return value


def _msrs(names: list[Any]) -> tuple[int, ...]:
    """Return registers by name or number; ["MSR_IA32_MC0_CTL2", 32] stands for 32 from there."""
    found: list[int] = []
    for name in names:
        first, count = name if isinstance(name, list) else (name, 1)
        found += range(_constant(first), _constant(first) + count)
    return tuple(found)


def _kernel_cpuid(table: dict[str, Any]) -> dict[str, Any]:
    if "features" in table:
        table["features"] = _features(table["features"])
    table["software"] = _features(table.get("software", []))
    if "pv_features" in table:
        table["pv_features"] = sum(1 << _constant(f"KVM_FEATURE_{n}") for n in table["pv_features"])
    if table.get("out_of_range", "vendor") not in {"vendor", "basic", "half"}:
        raise ProfileError(f"out_of_range is {table['out_of_range']}")
    return table


def _kernel_msrs(table: dict[str, Any]) -> dict[str, Any]:
    if "save" in table:
        table["save"] = _msrs(table["save"])
    for key in ("absent", "feature"):
        if key in table:
            table[key] = frozenset(_msrs(table[key]))
    return table


def _behaviour(table: dict[str, Any]) -> dict[str, Any]:
    prefixes = {
        "quirks": "KVM_X86_QUIRK_",
        "clock_set_flags": "KVM_CLOCK_",
        "clock_get_flags": "KVM_CLOCK_",
        "vcpu_events_get": "KVM_VCPUEVENT_VALID_",
        "vcpu_events_set": "KVM_VCPUEVENT_VALID_",
    }
    for key, prefix in prefixes.items():
        if key in table:
            table[key] = sum(_constant(prefix + name) for name in table[key])
    if "tss_addr_errno" in table:
        table["tss_addr_errno"] = int(getattr(errno, table["tss_addr_errno"]))
    return table
