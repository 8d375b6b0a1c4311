"""Debian's QEMU, unmodified, under `pykvm exec`: what its guests print is what they print under TCG."""

from __future__ import annotations

import pytest

from tests.clients import guests, linux_boot, qemu

pytestmark = pytest.mark.skipif(not qemu.is_there(), reason=f"{qemu.QEMU} is not installed")
LAST_WORDS = "No bootable device."
# On a machine that does ten other things.
PATIENCE = 60


def firmware_says(engine: str, *options: str) -> str:
    """Return what SeaBIOS prints, from its first word on."""
    with qemu.Console(qemu.command(engine, "-m", "256", *options)) as console:
        console.expect(LAST_WORDS, PATIENCE)
        return console.text[console.text.index("SeaBIOS") :].strip()


@pytest.mark.spec("env.seabios")
@pytest.mark.parametrize(
    "options",
    [("-M", "pc"), ("-M", "q35"), ("-M", "pc", "-cpu", "max", "-sandbox", "on,spawn=deny")],
    ids=" ".join,
)
def test_seabios_runs_to_its_end(options: tuple[str, ...]) -> None:
    assert firmware_says("pykvm", *options) == firmware_says("tcg", *options)


@pytest.mark.skipif(not guests.are_fetched(), reason=f"no kernel: run {guests.FETCH} once")
def test_debians_kernel_boots_to_a_shell() -> None:
    """The kernel of Debian's linux-image-amd64, to the shell's prompt and back down."""
    boot = linux_boot.boot("pykvm")
    assert set(boot.shell) >= linux_boot.SHELL_SAYS
    assert not [message for message in boot.messages if linux_boot.is_trouble(message)]
