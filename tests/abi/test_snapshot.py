"""A vCPU saved at any exit and restored into a new VM goes on as if nothing had happened.

A random 64-bit guest runs twice with the same client: once undisturbed, once moved to a new VM at
random points, always by the sequence of a real client.  Exits, outputs, memory and registers must be
the same.  Points are exits (with the answer given and not yet taken), and single instructions.
"""

from __future__ import annotations

import random
import signal
import struct
from errno import EINTR
from typing import TYPE_CHECKING

import pytest

from pykvm import uapi
from pykvm.abi import ffi, new, to_bytes
from tests import snapshot
from tests.machine import HOLE, STACK, Machine, emulated

if TYPE_CHECKING:
    from tests.conftest import NewMachine

CODE, DATA = 0x1000, 0x7000
PML4, PDPT, PD, IDT, GDT, HANDLERS = 0x9000, 0xA000, 0xB000, 0xC000, 0xD000, 0xE000
# Handlers count what they see here.
COUNTERS = 0xF000
SMRAM = 0x30000
CODE64, DATA64 = 8, 16
END_PORT = 0xFE
UNKNOWN_MSR = 0x1234_5678
IRQ, NMI, DB = 0x40, 2, 1
OSI_RAX, OSI_RBX = 0x113724FA, 0x77810F9B
# An exit is told as what the client sees of it.
Log = list[tuple[object, ...]]


# ---- a random guest ------------------------------------------------------------------------------


def mov(register: int, value: int) -> bytes:
    """MOV r64, imm64."""
    return bytes((0x48 | register >> 3, 0xB8 | register & 7)) + struct.pack("<Q", value)


RAX, RCX, RDX, RBX, RSI, RDI = 0, 1, 2, 3, 6, 7


def program(seeded: random.Random, pieces: int) -> bytes:
    """Return guest code; every piece can be the last before the guest is moved."""
    code = b""
    for _ in range(pieces):
        code += seeded.choice(PIECES)(seeded)
    # OUT to the last port, HLT should the client go on.
    return code + bytes((0xE6, END_PORT)) + b"\xf4"


def _arithmetic(seeded: random.Random) -> bytes:
    a, b = seeded.choice((0, 1, 2, 8, 9, 10)), seeded.choice((0, 1, 2, 8, 9, 10))
    rex = 0x48 | (a >> 3) << 2 | b >> 3
    opcode = seeded.choice((0x01, 0x29, 0x31, 0x11, 0x19, 0x87))
    return mov(a, seeded.getrandbits(64)) + bytes((rex, opcode, 0xC0 | (a & 7) << 3 | b & 7))


def _stack(seeded: random.Random) -> bytes:
    register = seeded.choice((0, 1, 2, 3, 6, 7))
    return bytes((0x50 | register, 0x58 | register ^ 1))


def _out(seeded: random.Random) -> bytes:
    opcode = seeded.choice((b"\xe6", b"\xe7", b"\x66\xe7"))
    return mov(RAX, seeded.getrandbits(64)) + opcode + bytes((seeded.choice((0x10, 0x7E)),))


def _in(seeded: random.Random) -> bytes:
    return mov(RAX, seeded.getrandbits(64)) + seeded.choice((b"\xe4", b"\xe5", b"\x66\xe5")) + b"\x11"


def _rep_io(seeded: random.Random) -> bytes:
    count = mov(RCX, seeded.randrange(1, 5)) + mov(RSI, DATA) + mov(RDI, DATA + 0x100) + mov(RDX, 0x12)
    return count + b"\xf3" + seeded.choice((b"\x6e", b"\x6c", b"\x6f", b"\x6d", b"\x66\x6f"))


def _mmio(seeded: random.Random) -> bytes:
    # Some cross a page, and become two accesses.
    at = HOLE + seeded.choice((0, 4, 0x40, 0xFFD))
    access = seeded.choice(
        (
            b"\x48\x8b\x03",  # mov rax, [rbx]
            b"\x8a\x03",  # mov al, [rbx]
            b"\x48\x0f\xbf\x03",  # movsx rax, word [rbx]
            b"\x48\x89\x03",  # mov [rbx], rax
            b"\x88\x03",  # mov [rbx], al
            b"\x48\x01\x03",  # add [rbx], rax
            b"\xf0\x0f\xc1\x03",  # lock xadd [rbx], eax
            b"\xff\x33\x58",  # push [rbx]; pop rax
            b"\x0f\x10\x03",  # movups xmm0, [rbx]
            b"\x0f\x11\x0b",  # movups [rbx], xmm1
        )
    )
    if access[0] == 0xF0:
        at = HOLE
    return mov(RAX, seeded.getrandbits(64)) + mov(RBX, at) + access


def _rep_mmio(seeded: random.Random) -> bytes:
    to_mmio = seeded.random() < 0.5
    source, target = (DATA, HOLE) if to_mmio else (HOLE, DATA + 0x200)
    regs = mov(RCX, seeded.randrange(1, 4)) + mov(RSI, source) + mov(RDI, target)
    return regs + b"\xf3" + seeded.choice((b"\xa4", b"\xa5", b"\x48\xa5"))


def _msr(seeded: random.Random) -> bytes:
    return mov(RCX, UNKNOWN_MSR + seeded.randrange(4)) + seeded.choice((b"\x0f\x32", b"\x0f\x30"))


def _known_msr(seeded: random.Random) -> bytes:
    # KERNEL_GS_BASE, LSTAR, SYSENTER_EIP, PAT: 64 bits of 0 and 6 are good for all of them.
    index = seeded.choice((0xC0000102, 0xC0000082, 0x176, 0x277))
    return mov(RCX, index) + mov(RAX, seeded.choice((0, 0x06060606))) + mov(RDX, 0x606) + b"\x0f\x30"


def _osi(seeded: random.Random) -> bytes:
    del seeded
    return mov(RAX, OSI_RAX) + mov(RBX, OSI_RBX) + b"\x0f\x01\xc1"


def _floating(seeded: random.Random) -> bytes:
    return seeded.choice(
        (
            b"\xd9\xe8",  # fld1
            b"\xd9\xeb\xdc\xc0",  # fldpi; fadd st0, st0
            b"\xdb\xe3",  # fninit
            b"\x66\x0f\xfe\xc1",  # paddd xmm0, xmm1
            b"\x66\x48\x0f\x6e\xc8",  # movq xmm1, rax
            b"\x66\x0f\xef\xc9",  # pxor xmm1, xmm1
        )
    )


def _debug_register(seeded: random.Random) -> bytes:
    register = seeded.randrange(4)
    return mov(RAX, seeded.randrange(1 << 40)) + bytes((0x0F, 0x23, 0xC0 | register << 3))


def _halt(seeded: random.Random) -> bytes:
    del seeded
    return b"\xf4"


def _trap_flag(seeded: random.Random) -> bytes:
    """Set TF for a few instructions: their #DB must arrive once, wherever the guest is then."""
    inside = seeded.choice((b"\x90", b"\xe6\x13", b"\xe4\x13", mov(RBX, HOLE) + b"\x88\x03"))
    set_tf, clear_tf = b"\x9c\x80\x4c\x24\x01\x01\x9d", b"\x9c\x80\x64\x24\x01\xfe\x9d"
    return set_tf + inside + clear_tf


def _shadow(seeded: random.Random) -> bytes:
    """STI or MOV SS, whose shadow must be moved, too."""
    return seeded.choice((b"\xfb\x90", b"\xfb", b"\xfa", b"\xfb\xf4", b"\x8c\xd0\x8e\xd0\x90"))


PIECES = (
    _arithmetic,
    _arithmetic,
    _stack,
    _out,
    _in,
    _rep_io,
    _mmio,
    _mmio,
    _rep_mmio,
    _msr,
    _known_msr,
    _osi,
    _floating,
    _floating,
    _debug_register,
    _halt,
    _trap_flag,
    _shadow,
)


def handlers(machine: Machine) -> None:
    """Install handlers that count their vector, tell it at port 0x14 and return."""
    for vector in (DB, NMI, IRQ):
        at = HANDLERS + vector * 0x20
        # lock inc dword [counter]; out 0x14, al; iretq
        code = b"\xf0\xff\x04\x25" + struct.pack("<I", COUNTERS + 4 * vector) + b"\xe6\x14\x48\xcf"
        machine.load(code, at)
        gate = struct.pack("<HHBBHII", at & 0xFFFF, CODE64, 0, 0x8E, at >> 16, 0, 0)
        machine.load(gate, IDT + 16 * vector)


def build(new_machine: NewMachine) -> Machine:
    """Return a machine as a client makes it before it runs or restores."""
    machine = new_machine(extensions=("x86-osi",))
    machine.enable(machine.vm, uapi.KVM_CAP_EXCEPTION_PAYLOAD, 1)
    machine.enable(machine.vm, uapi.KVM_CAP_X86_TRIPLE_FAULT_EVENT, 1)
    machine.enable(machine.vm, uapi.KVM_CAP_X86_USER_SPACE_MSR, uapi.KVM_MSR_EXIT_REASON_UNKNOWN)
    machine.enable(machine.vcpu, uapi.KVM_CAP_PPC_OSI)
    # What an SMI runs: mov al, [a hole in memory]; out 0x15, al; rsm.
    smram = machine.add_slot(1 << 16, SMRAM, 0x10000)
    smram[0x8000:0x8007] = b"\xa0\x00\x70\xe6\x15\x0f\xaa"
    return machine


def memory(machine: Machine) -> bytes:
    """Return all memory of a machine: its own, and that of SMM."""
    return b"".join(each[:] for each in machine.memories)


def copy_memory(old: Machine, new_one: Machine) -> None:
    """Give a new machine the memory of an old one."""
    for source, target in zip(old.memories, new_one.memories, strict=True):
        target[:] = source[:]


def boot(machine: Machine, code: bytes) -> None:
    """Start code in 64-bit mode, with AVX state enabled."""
    machine.do(uapi.KVM_SET_CPUID2, snapshot.supported_cpuid(machine))
    machine.load(bytes(range(256)) * 2, DATA)
    machine.load(struct.pack("<Q", PDPT | 3), PML4)
    machine.load(struct.pack("<Q", PD | 3), PDPT)
    machine.load(struct.pack("<Q", 0x83), PD)
    machine.load(struct.pack("<3Q", 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF), GDT)
    handlers(machine)
    machine.load(code, CODE)
    sregs = machine.sregs
    sregs.cr3, sregs.cr0 = PML4, 0x80050033
    sregs.cr4 = uapi.X86_CR4_PAE | uapi.X86_CR4_OSFXSR | uapi.X86_CR4_OSXSAVE
    sregs.efer = uapi.EFER_LME | uapi.EFER_LMA
    sregs.gdt.base, sregs.gdt.limit = GDT, 23
    sregs.idt.base, sregs.idt.limit = IDT, 0xFFF
    for name in ("cs", "ss", "ds", "es"):
        segment = getattr(sregs, name)
        segment.base, segment.limit, segment.g = 0, 0xFFFFFFFF, 1
        segment.selector = CODE64 if name == "cs" else DATA64
        segment.type, segment.db, segment.l = (11, 0, 1) if name == "cs" else (3, 1, 0)
    machine.set_sregs(sregs)
    xcrs = new("kvm_xcrs")
    xcrs.nr_xcrs, xcrs.xcrs[0].value = 1, 7
    machine.do(uapi.KVM_SET_XCRS, xcrs)
    machine.set_regs(rip=CODE, rsp=STACK, rflags=2)


# ---- the client ----------------------------------------------------------------------------------


class Client:
    """Answers exits, the same whatever machine they come from, and moves the guest when told to."""

    def __init__(self, new_machine: NewMachine, seed: int, way: snapshot.Client | None) -> None:
        """Run the guest of `seed`; `way`: how it is moved, None: not at all."""
        self.new_machine, self.way = new_machine, way
        self.points = random.Random(seed * 3 + 1)
        self.machine = build(new_machine)
        boot(self.machine, program(random.Random(seed), 30))
        self.log: Log = []
        self.answers = random.Random(seed * 3 + 2)
        self.moves = 0
        self._ended = False

    def run(self) -> None:
        while not self.ended():
            assert len(self.log) < 1000
            if self.way is None:
                self.machine.go()
                self.handle()
            elif self.points.random() < 0.5:
                self.step_on()
            else:
                self.machine.go()
                self.handle()
            if self.way is not None and self.points.random() < 0.4:
                self.move(self.way)

    def ended(self) -> bool:
        """Say if the guest came to its last OUT."""
        return self._ended

    def step_on(self) -> None:
        """Do some instructions one by one, up to the next exit; the guest does not see that."""
        machine, debug = self.machine, new("kvm_guest_debug")
        debug.control = uapi.KVM_GUESTDBG_ENABLE | uapi.KVM_GUESTDBG_SINGLESTEP
        machine.do(uapi.KVM_SET_GUEST_DEBUG, debug)
        for _ in range(self.points.randrange(1, 6)):
            if machine.go() != uapi.KVM_EXIT_DEBUG:
                self.handle()
                break
        debug.control = 0
        machine.do(uapi.KVM_SET_GUEST_DEBUG, debug)

    def move(self, way: snapshot.Client) -> None:
        """Finish what is under way, and go on in a new VM."""
        if self.ended():
            return
        old = self.machine
        while (errno := old.complete()) != EINTR:
            assert errno == 0
            self.handle()
            if self.ended():
                return
        saved = snapshot.save(old, way)
        self.machine = build(self.new_machine)
        copy_memory(old, self.machine)
        snapshot.restore(self.machine, saved, way)
        old.close()
        self.moves += 1

    def handle(self) -> None:
        """Tell an exit, and answer it."""
        machine, run = self.machine, self.machine.run
        reason = run.exit_reason
        answer = self.answers.randbytes(64)
        if reason == uapi.KVM_EXIT_IO:
            io = run.io
            n = io.size * io.count
            out = machine.data_bytes(n) if io.direction == uapi.KVM_EXIT_IO_OUT else None
            self.log.append((reason, io.direction, io.size, io.port, io.count, out))
            self._ended = out is not None and io.port == END_PORT
            if out is None:
                machine.data[:n] = answer[:n]
        elif reason == uapi.KVM_EXIT_MMIO:
            written = machine.mmio_bytes() if run.mmio.is_write else None
            self.log.append((reason, run.mmio.phys_addr, run.mmio.len, written))
            if written is None:
                ffi.memmove(run.mmio.data, answer, run.mmio.len)
        elif reason in {uapi.KVM_EXIT_X86_RDMSR, uapi.KVM_EXIT_X86_WRMSR}:
            self.log.append((reason, run.msr.index, run.msr.data))
            run.msr.data = int.from_bytes(answer[:8], "little")
        elif reason == uapi.KVM_EXIT_OSI:
            self.log.append((reason, *list(run.osi.gprs)[:18]))
            for register in (RAX, RCX, RDX):
                run.osi.gprs[register] = int.from_bytes(answer[8 * register : 8 * register + 8], "little")
        else:
            assert reason == uapi.KVM_EXIT_HLT, machine.regs.rip
            self.log.append((reason, machine.run.flags, machine.regs.rip))
            self.wake(answer[0])

    def wake(self, how: int) -> None:
        """Send the guest an event, sometimes: it may be on its way when the guest is moved."""
        machine = self.machine
        if how % 4 == 0:
            machine.do(uapi.KVM_NMI)
        elif how % 4 == 1:
            machine.do(uapi.KVM_SMI)
        elif how % 4 == 2 and machine.run.ready_for_interrupt_injection:
            request = new("kvm_interrupt")
            request.irq = IRQ
            machine.do(uapi.KVM_INTERRUPT, request)

    def end(self) -> dict[str, object]:
        """Return all that is left of the guest."""
        assert self.machine.complete() == EINTR
        events = self.machine.events
        # Nothing is on its way: what was last is of no interest.
        assert not (events.exception.injected | events.exception.pending | events.interrupt.injected)
        events.exception.nr = events.interrupt.nr = 0
        state = snapshot.whole_state(self.machine)
        return {**state, "kvm_vcpu_events": to_bytes(events), "memory": memory(self.machine)}


@pytest.mark.spec("vcpu.save_order", "run.complete_then_signal", "run.multi_fragment", "run.order")
@pytest.mark.parametrize("way", snapshot.CLIENTS, ids=lambda way: way.name)
@pytest.mark.parametrize("seed", range(12))
def test_a_guest_that_moves_does_not_notice(new_machine: NewMachine, seed: int, way: snapshot.Client) -> None:
    emulated(new_machine(), "has no SSE, no OSI and no faithful traps")
    stays, moves = Client(new_machine, seed, None), Client(new_machine, seed, way)
    stays.run()
    moves.run()
    assert moves.moves
    assert moves.log == stays.log
    ours, wanted = moves.end(), stays.end()
    assert {name for name in wanted if ours[name] != wanted[name]} == set()


@pytest.mark.spec("vcpu.save_order", "exit.IO")
@pytest.mark.parametrize("way", snapshot.CLIENTS, ids=lambda way: way.name)
def test_a_single_step_trap_is_saved(new_machine: NewMachine, way: snapshot.Client) -> None:
    # The OUT is completed, its #DB is due and not delivered: KVM_GET_VCPU_EVENTS has to tell it.
    emulated(new_machine(), "has no faithful traps")
    machine = build(new_machine)
    boot(machine, b"\xe6\x10" + bytes((0xE6, END_PORT)))
    machine.set_regs(rflags=2 | uapi.X86_EFLAGS_TF)
    assert machine.go() == uapi.KVM_EXIT_IO
    assert machine.complete() == EINTR
    assert (machine.events.exception.pending, machine.events.exception.nr) == (1, DB)
    saved = snapshot.save(machine, way)
    other = build(new_machine)
    copy_memory(machine, other)
    snapshot.restore(other, saved, way)
    assert (other.go(), other.run.io.port) == (uapi.KVM_EXIT_IO, 0x14)
    assert struct.unpack_from("<I", other.ram, COUNTERS + 4 * DB) == (1,)
    assert other.get(uapi.KVM_GET_DEBUGREGS, "kvm_debugregs").dr6 & uapi.DR6_BS


@pytest.mark.spec("vcpu.save_order", "run.eintr")
@pytest.mark.parametrize("way", snapshot.CLIENTS, ids=lambda way: way.name)
def test_a_guest_that_a_signal_stopped_goes_on_elsewhere(
    new_machine: NewMachine, way: snapshot.Client
) -> None:
    """Anywhere in a loop of arithmetic, x87, SSE and memory: the result is that of an undisturbed run."""
    emulated(new_machine(), "has no SSE")
    turns = 300_000
    loop = (
        b"\x48\x01\xd8\x48\xff\xc0\xf3\x48\x0f\x2a\xc0\x0f\x58\xc8\xdc\xc0\x48\x31\x04\x25"
        + struct.pack("<I", DATA)
        + b"\x48\xff\xc9"
    )
    code = mov(RCX, turns) + mov(RBX, 12345) + b"\xd9\xe8" + loop
    code += b"\x75" + bytes((0x100 - len(loop) - 2,)) + bytes((0xE6, END_PORT))

    def run(*, moved: bool) -> tuple[dict[str, object], int]:
        machine, moves = build(new_machine), 0
        boot(machine, code)
        while True:
            if moved:
                signal.setitimer(signal.ITIMER_REAL, 0.002)
            errno = machine.go_errno()
            signal.setitimer(signal.ITIMER_REAL, 0)
            if errno == 0:
                assert machine.run.io.port == END_PORT
                assert machine.complete() == EINTR
                return {**snapshot.whole_state(machine), "memory": memory(machine)}, moves
            assert errno == EINTR
            saved, old = snapshot.save(machine, way), machine
            machine = build(new_machine)
            copy_memory(old, machine)
            snapshot.restore(machine, saved, way)
            old.close()
            moves += 1

    before = signal.signal(signal.SIGALRM, lambda *_: None)
    try:
        wanted, _ = run(moved=False)
        ours, moves = run(moved=True)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert moves
    assert {name for name in wanted if ours[name] != wanted[name]} == set()
