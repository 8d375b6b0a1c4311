"""KvmError: the one exception that crosses an ioctl."""

from __future__ import annotations

import errno as _errno
import os


class KvmError(OSError):
    """An ioctl failed as Linux would have it fail.

    ``errno`` is what the client gets; ``why`` is what the real device cannot say: which rule was
    broken, by which value.  ``writeback`` asks the dispatcher to copy the argument structure back
    although the call failed (KVM_GET_MSR_INDEX_LIST's E2BIG reports the needed count that way).
    """

    why: str
    writeback: bool

    def __init__(self, errno: int, why: str, *, writeback: bool = False) -> None:
        """Make the error `errno` (a positive errno value) for the reason `why`."""
        super().__init__(errno, why)
        self.why = why
        self.writeback = writeback

    def __str__(self) -> str:
        """Return ``EINVAL: slot 3: gpa 0x1001 is not page-aligned``."""
        return f"{errno_name(self.errno)}: {self.why}"


def errno_name(number: int | None) -> str:
    """Return the symbol of an errno value: ``EINVAL`` for 22."""
    if number is None:
        return "no errno"
    # One number has two names, and the kernel's is this one.
    if number == _errno.EOPNOTSUPP:
        return "EOPNOTSUPP"
    return _errno.errorcode.get(number, f"errno {number} ({os.strerror(number)})")
