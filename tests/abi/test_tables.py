"""What there is and what there is not: each capability and each reason of an exit is one or the other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import pykvm
from pykvm import uapi
from pykvm.abi import capabilities, exit_reasons
from pykvm.kvm import absent
from tests.machine import Machine, errno_of

KVM = Path(pykvm.__file__).parent / "kvm"


@pytest.mark.spec("cap.foreign", "cap.obsolete", "cap.hyperv", "cap.xen", "cap.sev_sgx", "cap.vapic")
@pytest.mark.spec("cap.PMU_CAPABILITY", "cap.BUS_LOCK_EXIT", "cap.X86_NOTIFY_VMEXIT")
@pytest.mark.parametrize("name", capabilities())
def test_a_capability_is_there_or_says_why_not(kvm: int, name: str) -> None:
    answer = pykvm.ioctl(kvm, uapi.KVM_CHECK_EXTENSION, capabilities()[name])
    assert isinstance(answer, int)
    assert (answer == 0) is (absent.why_no_capability(name) is not None)


def test_reasons_are_given_for_what_exists_and_once() -> None:
    for reasons, names in ((absent.CAPABILITIES, capabilities()), (absent.EXITS, exit_reasons())):
        prefix = "KVM_CAP_" if names is capabilities() else "KVM_EXIT_"
        listed = [prefix + name for group in reasons.values() for name in group]
        assert len(listed) == len(set(listed))
        assert set(listed) <= set(names)


@pytest.mark.parametrize("name", [n for n in capabilities() if absent.why_no_capability(n)])
def test_what_is_not_there_cannot_be_enabled(machine: Machine, name: str) -> None:
    cap = capabilities()[name]
    for fd in (machine.vm, machine.vcpu):
        assert errno_of(lambda f=fd: machine.enable(f, cap, 1))


@pytest.mark.spec("exit.EXCEPTION", "exit.NMI", "exit.foreign", "exit.PAPR_HCALL", "exit.XEN", "exit.HYPERV")
@pytest.mark.spec("exit.TDX", "exit.AP_RESET_HOLD", "exit.X86_BUS_LOCK", "exit.NOTIFY", "exit.SYSTEM_EVENT")
@pytest.mark.parametrize("name", exit_reasons())
def test_a_reason_is_used_or_says_why_not(name: str) -> None:
    """Somewhere in the module it is written to kvm_run, or nowhere."""
    used = any(re.search(rf"\buapi\.{name}\b", file.read_text()) for file in KVM.glob("*.py"))
    assert used is (absent.why_no_exit(name) is None)
