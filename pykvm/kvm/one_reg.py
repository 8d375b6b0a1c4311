"""Registers by number: the model-specific ones as KVM_GET_ONE_REG names them."""

from __future__ import annotations

from errno import E2BIG, EINVAL
from typing import TYPE_CHECKING

from pykvm.abi import CData, uapi
from pykvm.abi.errors import KvmError
from pykvm.abi.ioctl import In, User, vcpu_ioctl
from pykvm.kvm.msr import MsrError, get_msr, set_msr

if TYPE_CHECKING:
    from pykvm.abi.uaccess import UserMemory
    from pykvm.kvm.vcpu import Vcpu

_INDEX = 0xFFFF_FFFF
_MSR = uapi.KVM_REG_X86 | uapi.KVM_REG_SIZE_U64 | uapi.KVM_X86_REG_TYPE_MSR << 32
# Registers that are KVM's by name: the guest's shadow stack pointer, which needs CET.
_KVM_REGISTERS: tuple[int, ...] = ()


def _msr_index(reg: CData) -> int:
    if reg.id & ~_INDEX != _MSR:
        raise KvmError(EINVAL, f"register {reg.id:#x}: neither a model-specific one nor one that is there")
    return int(reg.id & _INDEX)


@vcpu_ioctl("KVM_GET_ONE_REG", In("struct kvm_one_reg"), cap="KVM_CAP_ONE_REG", user=True)
def get_one_reg(vcpu: Vcpu, reg: CData, user: UserMemory) -> int:
    """Write a register, 64 bits, to where reg.addr points.

    Errors:
        EINVAL  another architecture's id, another size than 64 bits, reserved bits; no such register
    Source: api.rst 4.69; x86.c kvm_get_set_one_reg
    """
    index = _msr_index(reg)
    try:
        value = get_msr(vcpu, index, host=True)
    except MsrError:
        raise KvmError(EINVAL, f"MSR {index:#x} cannot be read") from None
    user.write(reg.addr, value.to_bytes(8, "little"))
    return 0


@vcpu_ioctl("KVM_SET_ONE_REG", In("struct kvm_one_reg"), cap="KVM_CAP_ONE_REG", user=True)
def set_one_reg(vcpu: Vcpu, reg: CData, user: UserMemory) -> int:
    """Set a register to the 64 bits that reg.addr points to.

    Errors:
        EINVAL  what KVM_GET_ONE_REG refuses; a value that the register does not take
    Source: api.rst 4.68; x86.c kvm_get_set_one_reg
    """
    index = _msr_index(reg)
    value = int.from_bytes(user.read(reg.addr, 8), "little")
    try:
        set_msr(vcpu, index, value, host=True)
    except MsrError:
        raise KvmError(EINVAL, f"MSR {index:#x} does not take {value:#x}") from None
    return 0


@vcpu_ioctl("KVM_GET_REG_LIST", User("struct kvm_reg_list"), cap="KVM_CAP_ONE_REG")
def get_reg_list(vcpu: Vcpu, user: UserMemory, addr: int) -> int:
    """List the registers that only KVM_GET_ONE_REG has; n is how many there are. There is none.

    Errors:
        E2BIG  there is room for fewer; n is written all the same
    Source: api.rst 4.84; x86.c kvm_get_reg_list
    """
    del vcpu
    room = int.from_bytes(user.read(addr, 8), "little")
    user.write(addr, len(_KVM_REGISTERS).to_bytes(8, "little"))
    if room < len(_KVM_REGISTERS):
        raise KvmError(E2BIG, f"room for {room} registers, there are {len(_KVM_REGISTERS)}")
    return 0
