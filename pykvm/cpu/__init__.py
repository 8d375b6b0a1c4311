"""The processor: one thin wrapper over the C core and its VM-entry contract, include/pykvm/cpu.h.

As between KVM and VT-x: the module writes `guest` and `ctl` while the processor is out, calls
`enter`, and reads `exit` when it comes back.  Nothing here knows a memslot, an ioctl or a KVM_EXIT.
"""

from __future__ import annotations

from errno import ENOMEM
from functools import partial
from typing import TYPE_CHECKING

from pykvm.abi import CData, ffi, lib
from pykvm.abi.errors import KvmError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Cpu"]


class Cpu:
    """One processor, in the state after reset.

    `guest`, `ctl`, `exit`, `stats`: the parts of struct vmcs, as cdata.  `memory`: the whole struct
    vmcs as bytes, for what reads many members at once.  `gpr`: the sixteen general registers.
    `enter`: run the guest; returns the exit's reason.  `complete`: execute the one instruction at rip
    with the answers in `ctl`; returns EXIT_NONE when it is done, or the exit it met.
    `skip`: retire the instruction of the last exit without executing it.
    """

    __slots__ = (
        "_cpu",
        "_signal_mask",
        "complete",
        "ctl",
        "enter",
        "exit",
        "gpr",
        "guest",
        "memory",
        "skip",
        "stats",
    )

    def __init__(self) -> None:
        """Make a processor.  Raises ENOMEM."""
        cpu = lib.cpu_create()
        if not cpu:
            raise KvmError(ENOMEM, "no memory for a processor")
        self._cpu = ffi.gc(cpu, lib.cpu_destroy)
        vmcs = lib.cpu_vmcs(cpu)
        self.guest: CData = vmcs.guest
        self.ctl: CData = vmcs.ctl
        self.exit: CData = vmcs.exit
        self.stats: CData = vmcs.stats
        self.memory = memoryview(ffi.buffer(vmcs)).cast("B")
        first = ffi.offsetof("struct vmcs", "guest", "gpr")
        self.gpr: memoryview = self.memory[first : first + 16 * 8].cast("Q")
        # partial, not methods: a Python frame less on the way of every exit.
        self.enter: Callable[[], int] = partial(lib.cpu_enter, self._cpu)
        self.complete: Callable[[], int] = partial(lib.cpu_complete, self._cpu)
        self.skip: Callable[[], None] = partial(lib.cpu_skip, self._cpu)
        self._signal_mask: int | None = None

    def reset(self, *, init: bool = False) -> None:
        """Do a RESET, or an INIT."""
        lib.cpu_reset(self._cpu, int(init))

    def state_changed(self) -> None:
        """Have modes derived anew: segments, control registers, EFER or CPUID words were written."""
        lib.cpu_state_changed(self._cpu)

    def flush_tlb(self) -> None:
        """Forget every translation; the processor must be out of guest mode."""
        lib.cpu_flush_tlb(self._cpu)

    def sync_code(self) -> None:
        """Have decoded code compared with memory again; the processor must be out of guest mode."""
        lib.cpu_sync_code(self._cpu)

    def request(self, bits: int) -> None:
        """Ask for CPU_REQ_*, from any thread."""
        lib.cpu_request(self._cpu, bits)

    def kick(self) -> None:
        """Have the processor leave guest mode, from any thread."""
        lib.cpu_request(self._cpu, lib.CPU_REQ_KICK)

    def clear_kick(self) -> None:
        """Take a kick back, once whoever kicked will be listened to."""
        lib.cpu_clear_kick(self._cpu)

    def sync(self) -> None:
        """Wait until the processor has done the flushes requested, or is out of guest mode."""
        lib.cpu_sync(self._cpu)

    def set_signal_mask(self, mask: int) -> None:
        """Have `enter` return EXIT_KICK for pending signals outside `mask` (bit n - 1: signal n)."""
        if mask != self._signal_mask:
            lib.cpu_set_signal_mask(self._cpu, 1, mask)
            self._signal_mask = mask
