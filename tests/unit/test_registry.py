"""The registry: complete, consistent with the header, and strict with what it is given."""

from __future__ import annotations

import errno
import re
from errno import EINVAL, EPERM

import pytest

import pykvm.kvm  # noqa: F401  fills the registry
from pykvm import doc
from pykvm.abi import ffi, requests
from pykvm.abi import ioctl as registry
from pykvm.abi.errors import KvmError
from pykvm.abi.ioctl import (
    FOREIGN,
    REGISTRY,
    Array,
    In,
    InOut,
    NoArg,
    Out,
    RegistryError,
    Value,
    lookup,
    parse_docstring,
    rows,
)
from pykvm.abi.uaccess import BufferMemory

REQUESTS = requests()
GOOD = """Do something.

    More words.

    Errors:
        EINVAL  because
        EMFILE, ENFILE  there is nothing
                left at all
    Source: api.rst 4.1; x86.c function
    """


@pytest.mark.parametrize("name", REQUESTS)
def test_every_request_is_offered_or_declared_absent(name: str) -> None:
    request = REQUESTS[name]
    if request.fds == ("none",):
        assert name in FOREIGN
        return
    assert name not in FOREIGN
    for kind in request.fds:
        row = lookup(kind, request.number)
        assert row is not None, f"{name} on a {kind} descriptor is neither offered nor declared absent"
        assert row.name == name
        assert row.absent or row.source
        assert row.doc


def test_rows_are_where_the_header_has_them() -> None:
    for row in rows():
        assert row.kind in REQUESTS[row.name].fds, f"kvm.h does not say that {row.name} is for {row.kind}"
        assert row.request == REQUESTS[row.name].number


def test_the_capability_is_the_headers() -> None:
    # Where one request has two kinds of descriptor, the header names one capability only.
    for row in rows():
        if not row.absent and len(REQUESTS[row.name].fds) == 1:
            assert (row.cap or "") == REQUESTS[row.name].cap, row.name


def test_the_argument_is_the_headers() -> None:
    for row in rows():
        if row.form is None or row.form.ctype() is None or not REQUESTS[row.name].argument:
            continue
        assert ffi.typeof(row.form.ctype() or "") is ffi.typeof(REQUESTS[row.name].argument), row.name


def test_one_function_one_place() -> None:
    seen = [row.func for row in rows() if not row.absent]
    assert len(seen) == len(set(seen))
    for row in rows():
        if not row.absent:
            assert row.module.startswith("pykvm.kvm."), row.name


def test_docs_have_no_unknown_errno() -> None:
    for row in rows():
        for name in row.errors:
            assert hasattr(errno, name), f"{row.name}: {name}"


def test_the_sources_of_a_row_are_kernel_files() -> None:
    for row in rows():
        if not row.absent:
            assert re.search(r"api\.rst|\.c\b", row.source), row.name


# ---- what it refuses ---------------------------------------------------------------------------------


@pytest.fixture
def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "REGISTRY", {})


def handler(obj: object) -> int:
    del obj
    return 0


handler.__doc__ = GOOD


@pytest.mark.usefixtures("empty")
def test_a_typo_dies() -> None:
    with pytest.raises(RegistryError, match="KVM_GET_REGGS"):
        registry.vcpu_ioctl("KVM_GET_REGGS", NoArg())
    with pytest.raises(RegistryError, match="KVM_CAP_NONSENSE"):
        registry.vcpu_ioctl("KVM_GET_REGS", NoArg(), cap="KVM_CAP_NONSENSE")
    with pytest.raises(RegistryError, match="KVM_GET_REGS"):
        registry.vcpu_ioctl("KVM_GET_REGS", NoArg(), cap="KVM_GET_REGS")


@pytest.mark.usefixtures("empty")
def test_a_wrong_size_dies() -> None:
    with pytest.raises(RegistryError, match="312 bytes, the request says 144"):
        registry.vcpu_ioctl("KVM_GET_REGS", Out("struct kvm_sregs"))


@pytest.mark.usefixtures("empty")
def test_twice_dies() -> None:
    registry.vcpu_ioctl("KVM_NMI", NoArg())(handler)
    registry.vm_ioctl("KVM_CREATE_VCPU", NoArg())(handler)
    with pytest.raises(RegistryError, match="registered twice"):
        registry.vcpu_ioctl("KVM_NMI", Value())(handler)
    with pytest.raises(RegistryError, match="registered twice"):
        registry.not_offered("vcpu", "KVM_NMI", why="both")


@pytest.mark.parametrize(
    "text", [None, "", "Do.", "Do.\n\nErrors: none\n", "Do.\n\nSource: x\n\nErrors: none\n"]
)
def test_a_docstring_without_errors_and_source_dies(text: str | None) -> None:
    with pytest.raises(RegistryError, match="docstring"):
        parse_docstring("f", text)


def test_a_docstring_is_taken_apart() -> None:
    docs = parse_docstring("f", GOOD)
    assert docs.doc == "Do something."
    assert docs.errors == {
        "EINVAL": "because",
        "EMFILE": "there is nothing",
        "ENFILE": "there is nothing left at all",
    }
    assert docs.source == "api.rst 4.1; x86.c function"
    assert parse_docstring("f", "Do.\n\nErrors: none\nSource: x.c").errors == {}
    with pytest.raises(RegistryError, match="cannot read"):
        parse_docstring("f", "Do.\n\nErrors:\n  whatever\nSource: x.c")


@pytest.mark.usefixtures("empty")
def test_an_absent_row_answers_as_its_kind_does() -> None:
    registry.not_offered("vm", "KVM_CREATE_IRQCHIP", why="later")
    registry.not_offered("vcpu", "KVM_SMI", why="later", errno=EPERM)
    for kind, name, expected in (("vm", "KVM_CREATE_IRQCHIP", "ENOTTY"), ("vcpu", "KVM_SMI", "EPERM")):
        row = lookup_in(registry.REGISTRY, kind, name)
        assert list(row.errors) == [expected]
        with pytest.raises(KvmError, match=f"{expected}: {name} is not offered: later"):
            row.entry(None, 0, BufferMemory(bytearray(), writable=True))


def lookup_in(table: dict[tuple[str, int], registry.Ioctl], kind: str, name: str) -> registry.Ioctl:
    return table[kind, REQUESTS[name].number]


# ---- forms -------------------------------------------------------------------------------------------


def memory(data: bytearray) -> BufferMemory:
    return BufferMemory(data, writable=True)


def test_in_gives_a_copy() -> None:
    data = bytearray(b"\x05" + bytes(3))

    def take(obj: object, level: object) -> int:
        assert obj == "object"
        data[0] = 9
        return int(level.irq)  # type: ignore[attr-defined]

    entry = In("struct kvm_interrupt").bind(take, user=False)
    user = memory(data)
    assert entry("object", user.address, user) == 5


def test_out_is_written_only_on_success() -> None:
    data = bytearray(4)
    user = memory(data)
    state = ffi.new("struct kvm_mp_state *", {"mp_state": 3})

    def answer(obj: object) -> object:
        if obj is None:
            raise KvmError(EINVAL, "no")
        return state

    entry = Out("struct kvm_mp_state").bind(answer, user=False)
    with pytest.raises(KvmError):
        entry(None, user.address, user)
    assert data == bytes(4)
    assert entry("x", user.address, user) == 0
    assert data == b"\x03\0\0\0"


@pytest.mark.parametrize("writeback", [False, True])
def test_inout_is_written_on_success_or_on_demand(writeback: bool) -> None:
    data = bytearray(4)
    user = memory(data)

    def change(obj: bool, state: object) -> int:
        state.mp_state = 7  # type: ignore[attr-defined]
        if obj:
            raise KvmError(EINVAL, "no", writeback=writeback)
        return 5

    entry = InOut("struct kvm_mp_state").bind(change, user=False)
    with pytest.raises(KvmError):
        entry(True, user.address, user)
    assert data[0] == (7 if writeback else 0)
    assert entry(False, user.address, user) == 5
    assert data[0] == 7


LIST = Array("struct kvm_msr_list", entry="uint32_t", count="nmsrs", entries="indices", limit=10)


def test_an_array_copies_entries_and_count() -> None:
    data = bytearray((3).to_bytes(4, "little") + bytes(12))
    user = memory(data)

    def answer(obj: object, a: registry.ArrayArg) -> int:
        del obj
        assert a.n == 3
        a.reply(ffi.new("uint32_t[]", [7, 8]), 2)
        return 0

    assert LIST.bind(answer, user=False)(None, user.address, user) == 0
    assert data == b"".join(n.to_bytes(4, "little") for n in (2, 7, 8, 0))


def test_an_array_writes_the_needed_count_with_an_error() -> None:
    data = bytearray(4)
    user = memory(data)

    def answer(obj: object, a: registry.ArrayArg) -> int:
        del obj
        a.set_count(42)
        raise KvmError(7, "too small", writeback=True)

    with pytest.raises(KvmError):
        LIST.bind(answer, user=False)(None, user.address, user)
    assert data[0] == 42


def test_an_array_has_a_limit() -> None:
    data = bytearray((11).to_bytes(4, "little") + bytes(80))
    user = memory(data)
    seen: list[int] = []

    def count(obj: object, a: registry.ArrayArg) -> int:
        del obj
        seen.append(a.n)
        return 0

    with pytest.raises(KvmError, match="E2BIG"):
        LIST.bind(count, user=False)(None, user.address, user)
    clamped = Array(
        "struct kvm_msr_list", entry="uint32_t", count="nmsrs", entries="indices", limit=10, limit_errno=None
    )
    assert clamped.bind(count, user=False)(None, user.address, user) == 0
    assert seen == [10]


def test_the_table_in_the_documentation_has_every_row() -> None:
    text = doc.markdown(doc.ioctl_rows(), doc.HEAD)
    for row in rows():
        assert f"| {row.name} | {row.request:#010x} | {row.kind} |" in text
    assert len(text.splitlines()) == len(REGISTRY) + 2
