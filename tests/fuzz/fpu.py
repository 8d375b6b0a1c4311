"""What the fuzzer has to know of x87, MMX and the instructions that save their state."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.fuzz.generate import Encoding, Generator, Row, Template

# fuzz.h
DATA = 0x1000_0000
VECTOR, FPU = 64, 128

FORMS = {"x87", "mmx", "mmx,Ib", "mmx,DI"}
WITHOUT_OPERANDS = {"fwait", "emms"}
# XSAVES and XRSTORS are not for a user program.
STATE = {"fxsave", "fxrstor", "xsave", "xsaveopt", "xsavec", "xrstor"}
RAX, RDX, RDI = 0, 2, 7
MXCSR, XSTATE_BV = 24, 512
COMPACTED = 1 << 63


def is_fpu(row: Row) -> bool:
    """Is this an instruction of x87, MMX or saved state?"""
    return row.form in FORMS or row.name in STATE | WITHOUT_OPERANDS


def alignment(row: Row) -> int:
    """Of the memory operand, where it matters or makes operands meaningful (fpu_data() in cases.c)."""
    return 64 if row.name.startswith("x") else 16


def choose_state(generator: Generator, row: Row, e: Encoding, t: Template) -> None:
    """Flags, registers and data of a template."""
    t.flags |= VECTOR | FPU
    if row.form == "mmx,DI":
        # a fault leaves a state for MMX behind on AMD; ours come before anything changes
        t.fixed[RDI] = generator.writable_address() - e.segment_base()
    if row.name in STATE and e.memory:
        choose_area(generator, row, e, t)
    t.ignored = ignored(row, e)


def choose_area(generator: Generator, row: Row, e: Encoding, t: Template) -> None:
    """An area that can be loaded, mostly, and components that the core has as well."""
    if row.name.startswith("x"):
        if {e.base, e.index} & {RAX, RDX}:
            t.fixed = {}  # given up
            return
        t.fixed[RAX], t.fixed[RDX] = generator.random.getrandbits(3), 0
    if row.name.endswith("rstor") and DATA <= e.target <= DATA + 0x1FF8 - 576 and not generator.chance(8):
        t.zeroed = [(e.target + MXCSR, 8)]
        t.patch = (e.target + MXCSR, generator.number(16))
    if row.name == "xrstor" and t.zeroed:
        t.zeroed.append((e.target + XSTATE_BV, 64))
        xstate_bv = generator.random.getrandbits(3)
        compacted = (e.target + XSTATE_BV + 8, COMPACTED | xstate_bv)
        t.patch = compacted if generator.chance(4) else (e.target + XSTATE_BV, xstate_bv)


def ignored(row: Row, e: Encoding) -> list[tuple[int, int]]:
    """Parts of the data, (address, size), that differ between processors."""
    if not e.memory:
        return []
    if row.name in {"fnstenv", "fnsave"}:
        # FCS and FDS: zero where CPUID.7.EBX bit 13 is set, as we have it (SDM vol. 1 8.1.8)
        field = 2 if e.opsize(row) == 2 else 4
        return [(e.target + 4 * field, 2), (e.target + 6 * field, 2)]
    if "save" in row.name:
        # FOP, FIP, FDP: saved by AMD only with an exception pending (APM vol. 2 11.4.4), and the last
        # ones of the host are the kernel's when it was interrupted; MXCSR_MASK: AMD has bit 17
        return [(e.target + 6, 18), (e.target + 28, 4)]
    return []
