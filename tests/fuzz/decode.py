"""Compares the instruction decoder with iced-x86: which bytes are an instruction, how long, its name.

    python -m tests.fuzz.decode                                 # the long form: 5 million of each mode
    python -m tests.fuzz.decode --count 100000 --bits 64 --seed 7

What differs and is meant is in the tables below, one by one; how often each was met is printed.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING

import iced_x86 as iced

from pykvm.abi import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

LONG = 5_000_000
MAX_LENGTH = 15
MNEMONIC_SIZE = 32

LEGACY_PREFIXES = b"\x66\x67\xf2\xf3\xf0\x2e\x36\x3e\x26\x64\x65"
PREFIXES = LEGACY_PREFIXES + b"\x40\x41\x44\x48\x4f"
# Where most of the structure is: escapes, VEX, groups and their sub-tables.
STARTS = (
    *[b""] * 8,
    *[b"\x0f"] * 6,
    *[b"\x0f\x38", b"\x0f\x3a", b"\x0f\x38\xf0", b"\x0f\x38\xf1", b"\x0f\x38\xf6"] * 2,
    *[b"\xc4\xe2", b"\xc4\xe3", b"\xc4\x42", b"\xc4\x22", b"\xc5", b"\xc4\xe2\x78\xf7"] * 2,
    *[b"\x0f\x00", b"\x0f\x01", b"\x0f\xae", b"\x0f\xc7", b"\x0f\xba", b"\x0f\xb8", b"\x0f\xbc"],
    *[b"\x80", b"\x83", b"\xc0", b"\xd3", b"\xf6", b"\xf7", b"\xfe", b"\xff", b"\x8f", b"\x63", b"\x90"],
)


# Features of instructions that are #UD here, because CPUID offers none of these.
ABSENT = {
    "XOP": "AMD Bulldozer", "FMA4": "AMD Bulldozer", "TBM": "AMD Bulldozer", "LWP": "AMD Bulldozer",
    "CYRIX_FPU": "Cyrix", "D3NOW": "3DNow!", "D3NOWEXT": "3DNow!", "CYRIX_D3NOW": "Cyrix", "SSE4A": "AMD",
    "PADLOCK_ACE": "VIA", "PADLOCK_PHE": "VIA", "PADLOCK_PMM": "VIA", "PADLOCK_RNG": "VIA",
    "PADLOCK_GMI": "Zhaoxin", "PADLOCK_UNDOC": "Zhaoxin",
    "AVX512F": "AVX-512", "AVX512VL": "AVX-512", "AVX512BW": "AVX-512", "AVX512DQ": "AVX-512",
    "AVX512CD": "AVX-512", "AVX512_VBMI": "AVX-512", "AVX512_VBMI2": "AVX-512", "AVX512_IFMA": "AVX-512",
    "AVX512_VNNI": "AVX-512", "AVX512_BITALG": "AVX-512", "AVX512_VPOPCNTDQ": "AVX-512",
    "AVX512_BF16": "AVX-512", "AVX512_FP16": "AVX-512", "AVX512_VP2INTERSECT": "AVX-512",
    "AMX_TILE": "AMX", "AMX_INT8": "AMX", "AMX_BF16": "AMX", "AMX_FP16": "AMX", "AMX_COMPLEX": "AMX",
    "AVX_VNNI": "VEX after AVX2", "AVX_VNNI_INT8": "VEX after AVX2", "AVX_VNNI_INT16": "VEX after AVX2",
    "AVX_IFMA": "VEX after AVX2", "AVX_NE_CONVERT": "VEX after AVX2",
    "SHA512": "VEX after AVX2", "SM3": "VEX after AVX2", "SM4": "VEX after AVX2",
    "AESKLE": "key locker", "WIDE_KL": "key locker", "KL": "key locker",
    "CET_SS": "shadow stacks", "CMPCCXADD": "CMPccXADD", "RAO_INT": "RAO-INT", "MOVDIRI": "MOVDIRI",
    "MOVDIR64B": "MOVDIR64B", "ENQCMD": "ENQCMD", "PTWRITE": "PTWRITE", "WAITPKG": "WAITPKG",
    "UINTR": "user interrupts", "FRED": "FRED", "LKGS": "LKGS", "MSRLIST": "MSR lists", "WRMSRNS": "WRMSRNS",
    "RTM": "TSX", "HLE_OR_RTM": "TSX", "TSXLDTRK": "TSX", "PCONFIG": "PCONFIG", "TSE": "PBNDKB",
    "VMX": "nested", "INVEPT": "nested", "INVVPID": "nested", "SVM": "nested", "SKINIT_OR_SVM": "nested",
    "SMX": "SMX", "SGX1": "SGX", "OSS": "SGX", "TDX": "TDX", "SEV_ES": "SEV", "SEV_SNP": "SEV",
    "RMPQUERY": "SEV", "INVLPGB": "INVLPGB", "MCOMMIT": "MCOMMIT", "RDPRU": "RDPRU", "CLZERO": "CLZERO",
    "MONITORX": "MONITORX", "MPX": "MPX",
}  # fmt: skip

# Our name: iced's, which also says the operand or address size.
SIZED = {
    "cbw": "cwde cdqe", "cwd": "cdq cqo", "jcxz": "jecxz jrcxz", "iret": "iretd iretq",
    "cmps": "cmpsb cmpsw cmpsd cmpsq", "movs": "movsb movsw movsd movsq", "ins": "insb insw insd",
    "outs": "outsb outsw outsd", "lods": "lodsb lodsw lodsd lodsq", "scas": "scasb scasw scasd scasq",
    "stos": "stosb stosw stosd stosq", "xlat": "xlatb", "popa": "popad", "pusha": "pushad",
    "popf": "popfd popfq", "pushf": "pushfd pushfq", "sysexit": "sysexitq", "sysret": "sysretq",
    "fxsave": "fxsave64", "fxrstor": "fxrstor64", "xsave": "xsave64", "xsavec": "xsavec64",
    "xsaveopt": "xsaveopt64", "xsaves": "xsaves64", "xrstor": "xrstor64", "xrstors": "xrstors64",
    "pcmpestri": "pcmpestri64", "pcmpestrm": "pcmpestrm64", "vpcmpestri": "vpcmpestri64",
    "vpcmpestrm": "vpcmpestrm64",
}  # fmt: skip
# (iced's, ours): the reason.
RENAMED = {
    **{(theirs, ours): "the size in the name" for ours, names in SIZED.items() for theirs in names.split()},
    ("sal", "shl"): "synonyms (/6 of the group is an undocumented SHL)",
    ("wait", "fwait"): "synonyms",
    ("push", "push_s"): "a segment register has a row of its own",
    ("pop", "pop_s"): "a segment register has a row of its own",
    ("fstpnce", "fstp"): "undocumented alias of FSTP (D9 /3)",
    ("reservednop", "nop"): "reserved NOP",
    ("cldemote", "nop"): "a hint, and NOP where it is not offered",
    ("endbr32", "nop"): "NOP where indirect branches are not tracked",
    ("endbr64", "nop"): "NOP where indirect branches are not tracked",
    ("rdsspd", "nop"): "NOP where shadow stacks are not offered",
    ("rdsspq", "nop"): "NOP where shadow stacks are not offered",
    ("reservednop", "prefetch"): "reserved NOP among the hints",
    **{
        (f"prefetch{kind}", "prefetch"): "one row for all hints"
        for kind in ["it0", "it1", "nta", "t0", "t1", "t2", "w", "wt1"]
    },
    ("pause", "xchg"): "F3 41 90 exchanges r8d and eax (measured on Zen 5)",
    ("wbnoinvd", "wbinvd"): "F3 is ignored where WBNOINVD is not offered",
    ("vmgexit", "vmmcall"): "prefixes of VMMCALL are ignored where SEV-ES is not offered",
}
LOCK_MOV_CR = "LOCK MOV CR0 is MOV CR8 with AMD, and where CPUID says so (APM vol. 3, MOV CRn)"
INVALID = "invalid"


def names_of(enumeration: ModuleType) -> dict[int, str]:
    """Names of the values of one of iced's enumerations."""
    return {value: name for name, value in vars(enumeration).items() if name.isupper()}


MNEMONICS = {value: name.lower() for value, name in names_of(iced.Mnemonic).items()}
FEATURES = names_of(iced.CpuidFeature)


def sequence(r: random.Random) -> bytes:
    """As many random bytes as an instruction can have, mostly with some structure at the front."""
    count = r.choice((0, 0, 0, 1, 1, 2, 3, r.randrange(14)))
    head = bytes(r.choices(PREFIXES, k=count)) + r.choice(STARTS)
    return (head + r.randbytes(MAX_LENGTH))[:MAX_LENGTH]


class Comparison:
    """Decodes sequences with both, and counts what is meant to differ."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.text = ffi.new("char[]", MNEMONIC_SIZE)
        self.agreed = {True: 0, False: 0}  # instructions, others
        self.exceptions: Counter[str] = Counter()

    def run(self, seed: int, count: int) -> Iterator[str]:
        """What differs and is not meant to."""
        r = random.Random(f"{seed}:{self.bits}")
        for _ in range(count):
            difference = self.compare(sequence(r))
            if difference:
                yield difference

    def compare(self, code: bytes) -> str | None:
        """Decode one sequence; how it differs."""
        length = lib.cpu_decode(code, len(code), self.bits, self.text, MNEMONIC_SIZE)
        ours = ffi.string(self.text).decode() if length else INVALID
        theirs = iced.Decoder(self.bits, code).decode()
        name = MNEMONICS[theirs.mnemonic]
        if ours == name and (ours == INVALID or length == theirs.len):
            self.agreed[ours != INVALID] += 1
            return None
        reason = self.reason(code, theirs, ours, length)
        if reason:
            self.exceptions[f"{name} is {ours}: {reason}"] += 1
            return None
        return f"{code.hex()}: {length} {ours}, iced: {theirs.len} {name} ({theirs})"

    def reason(self, code: bytes, theirs: iced.Instruction, ours: str, length: int) -> str | None:
        """Why what we do is meant; None: it is not."""
        if theirs.code == iced.Code.INVALID:
            return LOCK_MOV_CR if length == self.lock_mov_cr(code) else None
        if ours == INVALID:
            features = (FEATURES[value] for value in theirs.cpuid_features())
            return next((ABSENT[name] for name in features if name in ABSENT), None)
        return RENAMED.get((MNEMONICS[theirs.mnemonic], ours)) if length == theirs.len else None

    def lock_mov_cr(self, code: bytes) -> int:
        """Length of MOV CR8 as AMD has it; else 0."""
        amd = iced.Decoder(self.bits, code, iced.DecoderOptions.AMD).decode()
        return amd.len if int(iced.Register.CR8) in {int(amd.op0_register), int(amd.op1_register)} else 0


def main() -> int:
    """Command line; the status is 1 when something differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=LONG, help="sequences of each mode")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bits", type=int, choices=(16, 32, 64), help="this mode only")
    args = parser.parse_args()
    wrong = 0
    for bits in [args.bits] if args.bits else [16, 32, 64]:
        comparison, start = Comparison(bits), time.monotonic()
        differences = 0
        for difference in comparison.run(args.seed, args.count):
            differences += 1
            if differences <= 40:
                print(f"{bits}: {difference}", flush=True)
        print(f"{bits}-bit code: {args.count} sequences in {time.monotonic() - start:.0f} s: "
              f"{comparison.agreed[True]} instructions and {comparison.agreed[False]} invalid ones agree, "
              f"{comparison.exceptions.total()} exceptions, {differences} differences", flush=True)  # fmt: skip
        for text, count in sorted(comparison.exceptions.items()):
            print(f"  {count:8} {text}")
        wrong += differences
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
