"""`python -m tests.abi.differential`: random state for a vCPU, on the real /dev/kvm and on pykvm, compared.

A vCPU on each gets the same sequence of sets, good and bad; after each call its result and everything that
can be got are compared.  The device at hand (Linux 6.18, kvm_pvm) is left out of what is its own: SMM, paging
outside long mode, segment registers as they are, the size of addresses, MXCSR_MASK.
"""

from __future__ import annotations

import os
import random
import sys
from typing import TYPE_CHECKING, TypeAlias

import click

from pykvm import uapi
from pykvm.abi import CData, ffi, new
from tests.machine import Backend

if TYPE_CHECKING:
    from collections.abc import Callable

Call: TypeAlias = "tuple[str, int, int | CData]"
State: TypeAlias = "dict[str, bytes]"

GETS = {
    "events": (uapi.KVM_GET_VCPU_EVENTS, "kvm_vcpu_events"),
    "debugregs": (uapi.KVM_GET_DEBUGREGS, "kvm_debugregs"),
    "regs": (uapi.KVM_GET_REGS, "kvm_regs"),
    "fpu": (uapi.KVM_GET_FPU, "kvm_fpu"),
    "xsave": (uapi.KVM_GET_XSAVE, "kvm_xsave"),
    "xcrs": (uapi.KVM_GET_XCRS, "kvm_xcrs"),
    "sregs": (uapi.KVM_GET_SREGS, "kvm_sregs"),
    "mp_state": (uapi.KVM_GET_MP_STATE, "kvm_mp_state"),
}
CAPS = (uapi.KVM_CAP_EXCEPTION_PAYLOAD, uapi.KVM_CAP_X86_TRIPLE_FAULT_EVENT)
_TOP = 1 << 63


class Vcpu:
    """A new vCPU of one of the two."""

    def __init__(self, name: str, caps: tuple[int, ...]) -> None:
        self._backend = Backend(name)
        self._fds = [self._backend.open()]
        self._fds.append(self.call(uapi.KVM_CREATE_VM))
        for cap in caps:
            request = new("kvm_enable_cap")
            request.cap, request.args[0] = cap, 1
            self.call(uapi.KVM_ENABLE_CAP, request)
        self._fds.append(self.call(uapi.KVM_CREATE_VCPU))

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)

    def call(self, request: int, arg: int | CData = 0) -> int:
        """Do an ioctl on the newest descriptor; return its result, or the errno as a negative number."""
        try:
            return self._backend.ioctl(self._fds[-1], request, arg)
        except OSError as error:
            return -(error.errno or 0)

    def state(self) -> State:
        """Return all that can be got, without what is the device's own."""
        found = {}
        for name, (request, struct) in GETS.items():
            out = new(struct)
            result = self.call(request, out)
            if name == "events":
                out.flags &= ~uapi.KVM_VCPUEVENT_VALID_SMM
            raw = bytearray(ffi.buffer(out))
            if name == "xsave":
                raw[28:32], raw[464:472] = bytes(4), bytes(8)
            found[name] = result.to_bytes(4, "little", signed=True) + bytes(raw)
        return found


# ---- what is set: each returns (name, request, argument) ------------------------------------------


def events(pick: random.Random, caps: tuple[int, ...]) -> Call:
    x, flags = new("kvm_vcpu_events"), [0, 1, 2, 4, 5, 7, 0x10, 0x14, 0x40, 1 << 31]
    # Without its capability Linux refuses the flag when it has applied the rest.
    flags += [0x20, 0x35] if uapi.KVM_CAP_X86_TRIPLE_FAULT_EVENT in caps else []
    exception, interrupt, nmi = x.exception, x.interrupt, x.nmi
    exception.injected, exception.pending = pick.choice((0, 0, 1, 1, 2)), pick.choice((0, 1, 2))
    exception.nr = pick.choice((0, 1, 2, 3, 4, 6, 8, 13, 14, 31, 32, 255))
    exception.has_error_code, exception.error_code = pick.choice((0, 1, 2)), pick.getrandbits(32)
    interrupt.injected, interrupt.nr = pick.choice((0, 1, 2)), pick.getrandbits(8)
    interrupt.soft, interrupt.shadow = pick.choice((0, 1, 2)), pick.choice((0, 1, 2))
    nmi.injected, nmi.pending, nmi.masked = (pick.choice((0, 1, 2, n)) for n in (2, 255, 2))
    x.sipi_vector, x.flags = pick.choice((0, 1, 0x100)), pick.choice(flags)
    x.triple_fault.pending, x.exception_has_payload = pick.choice((0, 1, 2)), pick.choice((0, 1, 2))
    x.exception_payload = pick.choice((0, 1, 0x4000, 0x10000, 0x11000, _TOP, pick.getrandbits(32)))
    return "SET_VCPU_EVENTS", uapi.KVM_SET_VCPU_EVENTS, x


def debugregs(pick: random.Random, caps: tuple[int, ...]) -> Call:
    del caps
    x = new("kvm_debugregs")
    for n in range(4):
        x.db[n] = pick.choice((0, _TOP, pick.getrandbits(64)))
    x.dr6 = pick.choice((0xFFFF0FF0, 0, 0x1000, 1 << 32, pick.getrandbits(32)))
    x.dr7 = pick.choice((0x400, 0, 0x2400, 1 << 32, 0xFFFFFFFF))
    x.flags = pick.choice((0, 0, 0, 1, _TOP))
    return "SET_DEBUGREGS", uapi.KVM_SET_DEBUGREGS, x


def regs(pick: random.Random, caps: tuple[int, ...]) -> Call:
    del caps
    x = new("kvm_regs")
    x.rip, x.rax = pick.choice((0, 0xFFF0, _TOP)), pick.getrandbits(64)
    # But VM.
    x.rflags = pick.choice((0, 2, 0x202, 0x3D7FD7, 0x100, 0x40000, pick.getrandbits(64))) & ~(1 << 17)
    return "SET_REGS", uapi.KVM_SET_REGS, x


def mp_state(pick: random.Random, caps: tuple[int, ...]) -> Call:
    del caps
    x = new("kvm_mp_state")
    x.mp_state = pick.choice((*range(11), 1 << 31))
    return "SET_MP_STATE", uapi.KVM_SET_MP_STATE, x


def fpu(pick: random.Random, caps: tuple[int, ...]) -> Call:
    del caps
    x = new("kvm_fpu")
    ffi.memmove(x, bytes(pick.choice((0, 0, pick.getrandbits(8))) for _ in range(416)), 416)
    return "SET_FPU", uapi.KVM_SET_FPU, x


def xsave(pick: random.Random, caps: tuple[int, ...]) -> Call:
    del caps
    x = new("kvm_xsave")
    data = bytearray(pick.choice((0, 0, 0, pick.getrandbits(8))) for _ in range(832))
    data[512:576] = pick.choice((0, 1, 2, 3, 4, 6, 7, 8, 0x18, 1 << 62, _TOP)).to_bytes(64, "little")
    if pick.random() < 0.15:
        data[520 + pick.randrange(56)] = pick.choice((1, 0x80))
    data[24:28] = pick.choice((0, 0x1F80, 0x1FC0, 0xFFFF, 0x9F80, 1 << 31)).to_bytes(4, "little")
    ffi.memmove(x, bytes(data), len(data))
    return "SET_XSAVE", uapi.KVM_SET_XSAVE, x


def xcrs(pick: random.Random, caps: tuple[int, ...]) -> Call:
    del caps
    x = new("kvm_xcrs")
    x.nr_xcrs, x.flags = pick.choice((0, 1, 1, 1, 2, 16, 17)), pick.choice((0, 0, 0, 1))
    for n in range(3):
        x.xcrs[n].xcr = pick.choice((0, 0, 1, 5))
        x.xcrs[n].value = pick.choice((0, 1, 2, 3, 5, 6, 7, 0xF, _TOP, 0x1F))
    return "SET_XCRS", uapi.KVM_SET_XCRS, x


def interrupt(pick: random.Random, caps: tuple[int, ...]) -> Call:
    del caps
    x = new("kvm_interrupt")
    x.irq = pick.choice((0, 1, 0x20, 255, 256, 1 << 31))
    return "INTERRUPT", uapi.KVM_INTERRUPT, x


def nmi(pick: random.Random, caps: tuple[int, ...]) -> Call:
    del caps
    return "NMI", uapi.KVM_NMI, pick.choice((0, 1))


def guest_debug(pick: random.Random, caps: tuple[int, ...]) -> Call:
    del caps
    x = new("kvm_guest_debug")
    # No steps: Linux forgets the guest's own TF over them.
    x.control = pick.choice((0, 1, 0x10001, 0x20001, 0x40001, 0x80001, 0x40000, 0xC0001, 1 << 31))
    x.arch.debugreg[0], x.arch.debugreg[7] = pick.getrandbits(32), pick.choice((0, 0x400, 1))
    return "SET_GUEST_DEBUG", uapi.KVM_SET_GUEST_DEBUG, x


def kvmclock_ctrl(pick: random.Random, caps: tuple[int, ...]) -> Call:
    del pick, caps
    return "KVMCLOCK_CTRL", uapi.KVM_KVMCLOCK_CTRL, 0


OPERATIONS: tuple[Callable[[random.Random, tuple[int, ...]], Call], ...] = (
    events,
    events,
    debugregs,
    regs,
    mp_state,
    fpu,
    xsave,
    xsave,
    xcrs,
    interrupt,
    nmi,
    guest_debug,
    kvmclock_ctrl,
)
SREGS = {
    "cr0": (0x10, 0x60000010, 0x11, 0x80000010, 0x20000010, 1 << 32 | 0x10, 0x91, 0, 0x40000010, 0x12),
    "cr2": (0, 0x1234, _TOP),
    "cr3": (0x1000, 0xFFF, _TOP, 1 << 52, 0x1018),
    "cr4": (0, 0x20, 0x30, 0x600, 0x7FF, 0x8000, 1 << 32, 0x80, 0x100000, 0x800),
    "cr8": (0, 1, 15, 16, _TOP),
    "efer": (0, 1, 0x100, 0x400, 0x500, 0x800, 0x1000, 0x4000, _TOP, 2, 0x901),
    "apic_base": (0xFEE00900, 0xFEE00800, 0xFEE00100, 0xFEE00D00, 0xFEE00500, 0xFEE00901, 0x1000, 1 << 60),
}


def sregs(pick: random.Random, before: bytes) -> Call:
    """Change one of the system registers."""
    x = new("kvm_sregs")
    ffi.memmove(x, before, len(before))
    name = pick.choice((*SREGS, "interrupt"))
    if name == "interrupt":
        x.interrupt_bitmap[pick.randrange(4)] = 1 << pick.randrange(64)
    else:
        setattr(x, name, pick.choice(SREGS[name]))
    return "SET_SREGS", uapi.KVM_SET_SREGS, x


# ---- the comparison ------------------------------------------------------------------------------


def compare(seed: int, steps: int = 6) -> str | None:
    """Do one sequence; return what was different."""
    pick = random.Random(seed)
    caps = tuple(cap for cap in CAPS if pick.random() < 0.5)
    both = [Vcpu(name, caps) for name in ("real", "pykvm")]
    try:
        done: list[str] = []
        state = both[0].state()
        for _ in range(steps):
            if pick.random() < 0.15:
                name, request, arg = sregs(pick, state["sregs"][4:])
            else:
                name, request, arg = pick.choice(OPERATIONS)(pick, caps)
            results = [vcpu.call(request, arg) for vcpu in both]
            done.append(f"{name} = {results[0]}")
            state, other = (vcpu.state() for vcpu in both)
            different = [part for part in state if state[part] != other[part]]
            if results[0] != results[1] or different:
                return f"seed {seed}: {', '.join(done)}; pykvm {results[1]}; different: {different}"
    finally:
        for vcpu in both:
            vcpu.close()
    return None


@click.command()
@click.option("--seed", default=0, help="of the first sequence")
@click.option("--count", default=500, help="sequences")
def main(seed: int, count: int) -> None:
    """Compare that many sequences; say which differ."""
    found = [text for at in range(seed, seed + count) if (text := compare(at))]
    click.echo("\n".join([*found[:20], f"{len(found)} of {count} sequences differ"]))
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
