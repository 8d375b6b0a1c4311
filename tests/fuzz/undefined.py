"""Which status flags an instruction leaves undefined, and by which source.

The core gives them the values of AMD's Zen 5; on such a host they are compared too.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.fuzz.generate import Row

CF, PF, AF, ZF, SF, DF, OF = 0x1, 0x4, 0x10, 0x40, 0x80, 0x400, 0x800
STATUS = CF | PF | AF | ZF | SF | OF
CHECKED_FLAGS = STATUS | DF
ZEN5_FAMILY = 26

# SDM vol. 2, "Flags Affected" of the instruction named.
UNDEFINED = {
    "and": AF, "or": AF, "xor": AF, "test": AF, "andn": AF | PF,
    "mul": SF | ZF | AF | PF, "imul": SF | ZF | AF | PF,
    "div": STATUS, "idiv": STATUS,
    "shl": AF, "shr": AF, "sar": AF, "shld": AF, "shrd": AF,
    "bt": OF | SF | AF | PF, "bts": OF | SF | AF | PF, "btr": OF | SF | AF | PF, "btc": OF | SF | AF | PF,
    "bsf": CF | OF | SF | AF | PF, "bsr": CF | OF | SF | AF | PF,
    "lzcnt": OF | SF | AF | PF, "tzcnt": OF | SF | AF | PF,
    "bextr": AF | SF | PF, "bzhi": AF | PF, "blsr": AF | PF, "blsi": AF | PF, "blsmsk": AF | PF,
    "aaa": OF | SF | ZF | PF, "aas": OF | SF | ZF | PF, "aam": OF | AF | CF, "aad": OF | AF | CF,
    "daa": OF, "das": OF,
}  # fmt: skip

# OF is defined for a count of 1 only (SDM vol. 2, SAL/SAR/SHL/SHR, RCL/RCR/ROL/ROR, SHLD, SHRD); CF
# not for counts beyond the operand.
SHIFTS = {"shl", "shr", "sar", "rol", "ror", "rcl", "rcr", "shld", "shrd"}
# A fault in the middle restores the flags on Intel (SDM vol. 2, REP) and not on AMD.
COMPARISONS = {"cmps", "scas"}


@cache
def host() -> tuple[str, int, frozenset[str]]:
    """Vendor, family and feature names of the host processor."""
    values: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        values.setdefault(key.strip(), value.strip())
    family = int(values.get("cpu family", "0"))
    return values.get("vendor_id", ""), family, frozenset(values.get("flags", "").split())


def undefined_flags(row: Row, size: int, imm: bytes) -> int:
    """Bits of RFLAGS that need not agree between the host and the core."""
    vendor, family, _ = host()
    if vendor == "AuthenticAMD" and family == ZEN5_FAMILY:
        return 0
    flags = UNDEFINED.get(row.name, 0)
    if row.name in SHIFTS and not (row.form == "E,1" or imm == b"\1"):
        flags |= OF | CF if size < 4 or row.name in {"shld", "shrd"} else OF
    return flags | (STATUS if row.name in COMPARISONS else 0)
