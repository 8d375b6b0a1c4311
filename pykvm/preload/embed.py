"""The Python side of the preload library: what shim.c's functions come down to.

`install` runs in the client's process, in the interpreter that start.c started.  No exception may
leave a function here: one that tries is a bug of pykvm's, is logged, and the client sees EIO.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import traceback
from errno import EBADF, EINTR, EIO, ENOTTY
from typing import TYPE_CHECKING, Any

from pykvm import device as _device  # noqa: F401  fills the registry
from pykvm.abi import ffi, lib, uapi
from pykvm.abi.errors import KvmError
from pykvm.abi.uaccess import address_of
from pykvm.fd import dispatch, table
from pykvm.kvm.memslots import hva_ranges, invalidate_range_end, invalidate_range_start
from pykvm.kvm.system import System
from pykvm.kvm.vm import live_vms
from pykvm.mmu import recorder, snapshot

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pykvm.kvm.vm import Vm
    from pykvm.mmu.snapshot import Snapshot

# What _build.py gives to cffi: the C functions that are Python, and what runs before the first.
EMBEDDING_API = """
struct embed_range { uint64_t start, end; };
struct embed_settings {
    const char *home, *path, *extensions, *kernel, *cpu;
    void (*set_ranges)(const struct embed_range *, int);
};
int pykvm_embed_open(int flags);
int64_t pykvm_embed_ioctl(int fd, uint32_t request, uint64_t arg, uint64_t mask);
void pykvm_embed_invalidate_start(uint64_t start, uint64_t end);
void pykvm_embed_invalidate_end(uint64_t start, uint64_t end);
int pykvm_embed_start(const struct embed_settings *settings, int own_interpreter);
uintptr_t pykvm_embed_guard_action(void);
"""
EMBEDDING_INIT = """
from _pykvm_preload import ffi
from pykvm.preload import embed
embed.install(ffi)
"""

NOT_OURS = -100000  # EMBED_NOT_OURS of embed.h
# A busy Python thread holds the interpreter for this long, in seconds; a vCPU that exits waits so long.
SWITCH_INTERVAL = 5e-4

# Those that a signal ends.
_INTERRUPTIBLE = frozenset({uapi.KVM_RUN, uapi.KVM_PRE_FAULT_MEMORY & 0xFFFF_FFFF})
_ioctl = dispatch.ioctl
_signals_held = lib.signals_held


def install(embedding: Any) -> None:
    """Define the functions of EMBEDDING_API."""
    shim = _Shim(embedding)
    embedding.def_extern(name="pykvm_embed_start", error=0, onerror=_log)(shim.start)
    embedding.def_extern(name="pykvm_embed_open", error=-EIO, onerror=_log)(shim.open)
    embedding.def_extern(name="pykvm_embed_ioctl", error=-EIO, onerror=_log)(shim.ioctl)
    embedding.def_extern(name="pykvm_embed_invalidate_start", onerror=_log)(shim.invalidate_start)
    embedding.def_extern(name="pykvm_embed_invalidate_end", onerror=_log)(shim.invalidate_end)
    embedding.def_extern(name="pykvm_embed_guard_action", onerror=_log)(shim.guard_action)


def _snapshot() -> Snapshot | None:
    """Return what the MMU of the process's first VM with a vCPU looks like."""
    return next((snapshot.take(vm) for vm in live_vms() if vm.vcpus), None)


def _log(kind: type[BaseException], error: BaseException, where: Any) -> None:
    print("pykvm: bug, please report; the program sees EIO:", file=sys.stderr)
    traceback.print_exception(kind, error, where, file=sys.stderr)


class _Shim:
    """The functions, with what they share."""

    def __init__(self, embedding: Any) -> None:
        self._ffi = embedding
        self._set_ranges: Any = None
        self._extensions: frozenset[str] = frozenset()
        self._kernel: str | None = None
        self._cpu: str | None = None
        self._recorder: recorder.Recorder | None = None
        # What begun in which thread is not over yet: the VMs that know.
        self._invalidating: dict[tuple[int, int, int], list[tuple[Vm, ...]]] = {}
        self._renew_lock()
        os.register_at_fork(after_in_child=self._renew_lock)
        self._slot_requests = {uapi.KVM_SET_USER_MEMORY_REGION, uapi.KVM_SET_USER_MEMORY_REGION2}

    def start(self, settings: Any, own_interpreter: int) -> int:
        """Take what `pykvm exec` and the shim have to say."""
        self._set_ranges = settings.set_ranges
        names = self._text(settings.extensions) or ""
        self._extensions = frozenset(filter(None, names.split(",")))
        self._kernel = self._text(settings.kernel)
        self._cpu = self._text(settings.cpu)
        if own_interpreter:
            sys.setswitchinterval(SWITCH_INTERVAL)
        # Not 0: that is what cffi answers when this module cannot be imported.
        return 1

    def _text(self, string: Any) -> str | None:
        return self._ffi.string(string).decode() if string else None

    def open(self, flags: int) -> int:
        """Open the device; a descriptor or a negated errno."""
        try:
            system = System(self._extensions, kernel=self._kernel, cpu=self._cpu)
            fd = system.open(cloexec=bool(flags & os.O_CLOEXEC))
        except KvmError as error:
            return -(error.errno or EIO)
        if self._recorder is None:
            self._recorder = recorder.from_environment(_snapshot, os.environ)
        return fd

    def ioctl(self, fd: int, request: int, arg: int, mask: int) -> int:
        """Do an ioctl; its result or a negated errno."""
        try:
            if request not in _INTERRUPTIBLE:
                result = _ioctl(fd, request, arg)
                if request in self._slot_requests:
                    self._refresh()
                return result
            _signals_held(1, mask)
            try:
                return _ioctl(fd, request, arg)
            finally:
                _signals_held(0, 0)
        except KvmError as error:
            number = error.errno or EIO
            if number in {ENOTTY, EBADF} and not table.is_ours(fd):
                return NOT_OURS
            return -number
        except BaseException as error:
            if not _raise_again(error):
                raise
            return -EINTR

    def guard_action(self) -> int:
        """Return the address of cpu_guard_action()."""
        return address_of(ffi.addressof(lib, "cpu_guard_action"))

    def invalidate_start(self, start: int, end: int) -> None:
        """Drop the translations to [start, end): the program is about to map something else there."""
        table.reap()
        # Those that are told of the end: another thread may make a VM meanwhile.
        vms = live_vms()
        self._invalidating.setdefault((threading.get_ident(), start, end), []).append(vms)
        for vm in vms:
            with contextlib.suppress(KvmError):
                invalidate_range_start(vm, start, end)
        self._refresh()

    def invalidate_end(self, start: int, end: int) -> None:
        """The program has done so: what is there now may be mapped for guests."""
        begun = self._invalidating[threading.get_ident(), start, end]
        for vm in begun.pop():
            invalidate_range_end(vm, start, end)
        if not begun:
            del self._invalidating[threading.get_ident(), start, end]

    def _renew_lock(self) -> None:
        self._lock = threading.RLock()

    def _refresh(self) -> None:
        # Held over both, so that an older list cannot be told after a newer one.
        with self._lock:
            merged = _merged(span for vm in live_vms() for span in hva_ranges(vm))
            self._set_ranges(self._ffi.new("struct embed_range[]", merged), len(merged))


def _raise_again(error: BaseException) -> bool:
    """Raise the signal whose handler raised `error`; False when none did.

    Only when the program is a Python one, in its main thread, and another thread took the signal: then
    the interpreter calls the handler in the middle of us.  Signals are blocked here: it comes when the
    call is over, where the program expects its exception.
    """
    # Not before: in a program that is not Python, importing it installs a handler for SIGINT.
    import signal  # noqa: PLC0415

    codes = {getattr(signal.getsignal(number), "__code__", None): number for number in signal.valid_signals()}
    walked = (frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__))
    raised = [codes[code] for code in walked if code in codes]
    if isinstance(error, KeyboardInterrupt):
        raised.insert(0, signal.SIGINT)
    if raised:
        signal.raise_signal(raised[0])
    return bool(raised)


def _merged(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the union of ranges as a sorted list of ranges that do not touch."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged
