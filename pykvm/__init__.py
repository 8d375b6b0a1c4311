"""pykvm: KVM without hardware, in this process.

::

    import pykvm

    kvm = pykvm.open("/dev/kvm")                          # a file descriptor
    vm = pykvm.ioctl(kvm, pykvm.uapi.KVM_CREATE_VM)       # takes what fcntl.ioctl takes

    with pykvm.installed():                               # or leave the program as it is
        fd = os.open("/dev/kvm", os.O_RDWR)

`Kvm`, `Vm` and `Vcpu` in `pykvm.client` are the same with types.  The native module is loaded when
the first of these names is used: ``python -m pykvm.abi._build`` works without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pykvm.abi import uapi
    from pykvm.abi.errors import KvmError
    from pykvm.client import Kvm
    from pykvm.device import installed, ioctl, open  # noqa: A004  as os.open

__all__ = ["Kvm", "KvmError", "installed", "ioctl", "open", "uapi"]
__version__ = "0.1.0"

_HOME = {
    "Kvm": "pykvm.client",
    "KvmError": "pykvm.abi.errors",
    "installed": "pykvm.device",
    "ioctl": "pykvm.device",
    "open": "pykvm.device",
    "uapi": "pykvm.abi",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module at its first use."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value
