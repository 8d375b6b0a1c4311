"""The kernel module's side of KVM: one subject, one module.

Importing this package fills the registry of ioctls.  The list is explicit, so that what is offered
can be read here.
"""

from pykvm.kvm import (
    absent,
    caps,
    clock,
    cpuid,
    debug,
    dirty,
    events,
    exits,
    hypercall,
    io,
    mce,
    memslots,
    mmu,
    mp_state,
    msr,
    regs,
    signals,
    system,
    translate,
    vcpu,
    vm,
    xsave,
)

__all__ = [
    "absent",
    "caps",
    "clock",
    "cpuid",
    "debug",
    "dirty",
    "events",
    "exits",
    "hypercall",
    "io",
    "mce",
    "memslots",
    "mmu",
    "mp_state",
    "msr",
    "regs",
    "signals",
    "system",
    "translate",
    "vcpu",
    "vm",
    "xsave",
]
