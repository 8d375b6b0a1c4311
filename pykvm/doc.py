"""Tables made from the registry of ioctls and the instruction table, as Markdown or plain text."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pykvm import kvm as _kvm  # noqa: F401  fills the registry
from pykvm.abi import exit_reasons, ffi, lib
from pykvm.abi.ioctl import Ioctl, rows
from pykvm.kvm import absent, profile
from pykvm.kvm.caps import CAPS, Cap, check_extension
from pykvm.kvm.system import System

if TYPE_CHECKING:
    from collections.abc import Iterable

HEAD = ("ioctl", "number", "fd", "argument", "capability", "errors", "status", "source")
CAP_HEAD = ("capability", "number", "answer", "KVM_ENABLE_CAP on", "kernels", "status")
EXIT_HEAD = ("exit reason", "number", "kvm_run", "status")
INSN_HEAD = ("opcode", "name", "operands", "notes")
_MAPS = {"0f", "0f38", "0f3a"}
_SELECTORS = re.compile(r"/\d|66|64|f2|f3|np|mem|reg|rm\d|[WLB][01]|code\d+")
KERNEL_HEAD = ("kernel", "ioctls", "capabilities", "slots", "vCPUs", "CPUID entries", "PV leaf", "what it is")
CPU_HEAD = ("processor", "vendor", "family, model, stepping", "bits", "features", "paging", "what it is")


def cells(row: Ioctl) -> tuple[str, ...]:
    """Return a row of the table of ioctls, a cell per column of `HEAD`."""
    argument = (row.form.ctype() if row.form else None) or ""
    errors = "" if row.absent else ", ".join(row.errors)
    status = f"no ({next(iter(row.errors))}): {row.doc}" if row.absent else "yes"
    if row.removed:
        status = f"removed in {row.removed}: with an older kernel's profile only"
    return (
        row.name,
        f"{row.request:#010x}",
        row.kind,
        argument.removeprefix("struct "),
        row.cap or "",
        errors,
        status,
        row.source,
    )


def ioctl_rows() -> list[tuple[str, ...]]:
    """Return the table of all requests that x86 has, by descriptor and number."""
    return [cells(row) for row in rows()]


def cap_rows() -> list[tuple[str, ...]]:
    """Return the table of all capabilities, by number: what the default personality answers, or why not."""
    system = System()
    return [_cap_cells(row, check_extension(system, row.number)) for row in CAPS.values()]


def _cap_cells(row: Cap, answer: int) -> tuple[str, ...]:
    enabled = (("VM", row.enable_vm), ("vCPU", row.enable_vcpu))
    value = "the host's processors" if row.name == "KVM_CAP_NR_VCPUS" else str(answer)
    why = absent.why_no_capability(row.name)
    status = f"no: {why}" if why else "yes"
    on = ", ".join(where for where, enable in enabled if enable)
    return row.name, str(row.number), value, on, _kernels_with(row.name) if not why else "", status


def _kernels_with(name: str) -> str:
    """Return since which of the kernels that there are profiles of a capability is there."""
    kernels = [profile.kernel(each) for each in profile.kernels()]
    has = [each.capabilities is None or name in each.capabilities for each in kernels]
    if all(has):
        return "all"
    since = max(at for at, there in enumerate(has) if not there) + 1
    earlier = [each.name for each, there in zip(kernels[:since], has, strict=False) if there]
    return ", ".join([*earlier, f"{kernels[since].name} on"])


def exit_rows() -> list[tuple[str, ...]]:
    """Return the table of the reasons for which KVM_RUN returns, by number."""
    members = {name.upper() for name, _ in ffi.typeof("struct kvm_run").fields or ()}
    found: list[tuple[str, ...]] = []
    for name, number in exit_reasons().items():
        why, short = absent.why_no_exit(name), name.removeprefix("KVM_EXIT_")
        member = short if short in members else _EXIT_MEMBERS.get(short, "")
        found.append((name, str(number), "" if why else member.lower(), f"no: {why}" if why else "yes"))
    return found


# Members of struct kvm_run that are not named like the reason.
_EXIT_MEMBERS = {
    "UNKNOWN": "hw",
    "INTERNAL_ERROR": "internal",
    "X86_RDMSR": "msr",
    "X86_WRMSR": "msr",
}


def insn_rows() -> list[tuple[str, ...]]:
    """Return the table of instructions that the processor decodes."""
    found = []
    number = 0
    while line := lib.cpu_insn_row(number):
        found.append(_insn_cells(ffi.string(line).decode().split()))
        number += 1
    return found


def _insn_cells(words: list[str]) -> tuple[str, ...]:
    """Split "0f 11 66 movupd W,V sse": map, opcode and selectors, the name, operands, and the rest."""
    at = 2 if words[0] in _MAPS else 1
    while _SELECTORS.fullmatch(words[at]):
        at += 1
    operands = words[at + 1] if len(words) > at + 1 else ""
    return " ".join(words[:at]), words[at], operands, " ".join(words[at + 2 :])


def profiles() -> str:
    """Return the tables of kernels and processors for the documentation."""
    return markdown(kernel_rows(), KERNEL_HEAD) + "\n" + markdown(cpu_rows(), CPU_HEAD)


def kernel_rows() -> list[tuple[str, ...]]:
    """Return the table of kernels that the device can claim to be, of what their profiles say."""
    return [_kernel_cells(profile.kernel(name)) for name in profile.kernels()]


def _kernel_cells(kernel: profile.Kernel) -> tuple[str, ...]:
    limits = kernel.limits
    requests = "all" if kernel.ioctls is None else str(sum(map(len, kernel.ioctls.values())))
    caps = "all" if kernel.capabilities is None else str(len(kernel.capabilities))
    numbers = (limits.memslots, limits.vcpus, limits.cpuid_entries)
    leaf = f"{kernel.cpuid.signature_eax:#x}"
    return kernel.name, requests, caps, *map(str, numbers), leaf, kernel.title


def cpu_rows() -> list[tuple[str, ...]]:
    """Return the table of processors that the device can claim to be, by vendor and age."""
    found = [profile.processor(name) for name in profile.processors()]
    found.sort(key=lambda each: (not each.as_built, each.vendor == "amd", each.family, len(each.features)))
    return [_cpu_cells(each) for each in found]


def _cpu_cells(cpu: profile.Processor) -> tuple[str, ...]:
    if cpu.as_built:
        return cpu.name, cpu.vendor, "", "", "all", "two-dimensional", cpu.title
    signature = f"{cpu.family:#x}, {cpu.model:#x}, {cpu.stepping}"
    paging = "two-dimensional" if cpu.two_dimensional_paging else "shadow"
    bits = f"{cpu.phys_bits}, {cpu.virt_bits}"
    return cpu.name, cpu.vendor, signature, bits, str(len(cpu.features)), paging, cpu.title


def markdown(lines: Iterable[tuple[str, ...]], head: tuple[str, ...]) -> str:
    """Return a Markdown table."""

    def line(row: tuple[str, ...]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"

    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, lines)]) + "\n"


def text(lines: Iterable[tuple[str, ...]]) -> str:
    """Return a table in columns, without a head: for reading and for grep."""
    rows_ = list(lines)
    widths = [max(map(len, column)) for column in zip(*rows_, strict=True)]
    return "".join("  ".join(map(str.ljust, row, widths)).rstrip() + "\n" for row in rows_)


def summary() -> str:
    """Return how much of the API there is, in one line of Markdown."""
    offered = [row for row in rows() if not row.absent and not row.removed]
    absent = [row for row in rows() if row.absent or row.removed]
    kinds = ", ".join(f"{sum(r.kind == kind for r in offered)} {kind}" for kind in ("system", "vm", "vcpu"))
    insns = len({row[1] for row in insn_rows()})
    return (
        f"{len(offered)} ioctls are offered ({kinds}), {len(absent)} declared absent with a reason; "
        f"the processor decodes {insns} instructions.\n"
    )
