"""What the fuzzer has to know of x87, MMX and the instructions that save their state."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.fuzz.generate import Encoding, Generator, Row, Template

# fuzz.h
DATA = 0x1000_0000
VECTOR, FPU, PARTS = 64, 128, 256

FORMS = {"x87", "mmx", "mmx,Ib", "mmx,DI"}
WITHOUT_OPERANDS = {"fwait", "emms"}
EIGHTY_BITS = {(0xDB, 5), (0xDB, 7), (0xDF, 4), (0xDF, 6)}  # FLD, FSTP, FBLD, FBSTP
# XSAVES and XRSTORS are not for a user program.
ENVIRONMENT = {"fnstenv", "fnsave", "fldenv", "frstor"}
STATE = {"fxsave", "fxrstor", "xsave", "xsaveopt", "xsavec", "xrstor"}
RAX, RDX, RDI = 0, 2, 7
MXCSR, XSTATE_BV, AREA = 24, 512, 832
MXCSR_OF_AMD = 1 << 17  # MM, misaligned operands (APM vol. 1 4.2.2): reserved elsewhere, and with us
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
        choose_masked_store(generator, e, t)
    if row.name in STATE | ENVIRONMENT or (row.opcode, row.group) in EIGHTY_BITS:
        t.flags |= PARTS
    if row.name in STATE and e.memory:
        choose_area(generator, row, e, t)
    t.ignored = ignored(row, e)


def choose_masked_store(generator: Generator, e: Encoding, t: Template) -> None:
    """None that faults: on AMD that leaves a state for MMX behind, ours faults before anything changes."""
    if {0x2E, 0x64, 0x65} & set(e.legacy) or (e.bits == 32 and e.asize == 2):
        t.fixed = {}
    else:
        t.fixed[RDI] = generator.writable_address() - e.segment_base()


def is_readable(offset: int) -> bool:
    """Is an area there of whole in the pages 0 and 1, or 3 and 4?"""
    return 0 <= offset <= 0x2000 - AREA or 0x3000 <= offset <= 0x5000 - AREA


def choose_area(generator: Generator, row: Row, e: Encoding, t: Template) -> None:
    """An area that can be loaded, mostly, and components that the core has as well."""
    if row.name.startswith("x"):
        if {e.base, e.index} & {RAX, RDX}:
            t.fixed = {}  # given up
            return
        t.fixed[RAX], t.fixed[RDX] = generator.random.getrandbits(3), 0
    if row.name.endswith("rstor") and is_readable(e.target - DATA):
        t.zeroed = [(e.target + MXCSR, 8)]
        mxcsr = generator.number(32 if generator.chance(4) else 16)
        t.patch = (e.target + MXCSR, mxcsr & ~MXCSR_OF_AMD)
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
        # FCS and FDS: zero where CPUID.7.EBX bit 13 is set, as we have it (SDM vol. 1 8.1.8). FIP, FOP
        # and FDP are lost on AMD when the host is interrupted before it
        field = 2 if e.opsize(row) == 2 else 4
        return [(e.target + 3 * field, 4 * field)]
    if "save" in row.name:
        # FOP, FIP, FDP: saved by AMD only with an exception pending (APM vol. 2 11.4.4);
        # MXCSR_MASK: AMD has bit 17
        return [(e.target + 6, 18), (e.target + 28, 4)]
    return []
