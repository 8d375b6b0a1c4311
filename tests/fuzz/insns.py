"""Executes random instructions on the host processor and in the core, and compares.

    python -m tests.fuzz.insns --long                             # ten million cases, of all three kinds of code
    python -m tests.fuzz.insns --count 1000000 --seed 7 --bits 32
    python -m tests.fuzz.insns --seed 1 --batch 17 --case 423     # one case again, with its state

Every case runs at CPL 3 of long mode, in 64-, 32- or 16-bit code.  On the host: natively, in a forked
child, under a trampoline (native.c).  Registers, defined flags, memory, the exception with its error
code and CR2 must agree.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cffi import FFI

from pykvm.abi import ffi, lib
from tests.fuzz.generate import GS_BASE, VECTOR, Generator, Template, is_generated, table
from tests.fuzz.undefined import host
from tests.guest.bare import CODE as ENTRY
from tests.guest.bare import GPRS, PD, Machine

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
INCLUDE = HERE.parent.parent / "include"
SOURCES = ("native.c", "core.c", "cases.c")
TEMPLATES, VARIANTS = 500, 8
BATCH = TEMPLATES * VARIANTS
LONG = 10_000_000
BRANCH_STEP = 8  # FUZZ_STEP

# As Linux and native.c have them (PUSH and MOV of segment registers).
SELECTORS = {
    64: {"cs": 0x33, "ds": 0x2B, "es": 0x2B, "ss": 0x2B, "fs": 0, "gs": 0},
    32: {"cs": 0x23, "ds": 0x2B, "es": 0x2B, "ss": 0x2B, "fs": 0, "gs": 0},
    16: {"cs": 0x07, "ds": 0x0F, "es": 0x17, "ss": 0x1F, "fs": 0, "gs": 0},
}

DATA_TABLE, CODE_TABLE, DATA_RAM, CODE_RAM = 0x100000, 0x101000, 0x110000, 0x120000


def build() -> Path:
    """The helper library, compiled when its sources are new."""
    sources = [HERE / name for name in (*SOURCES, "fuzz.h")]
    sources.append(INCLUDE / "pykvm" / "cpu.h")
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"pykvm-fuzz-{os.getuid()}" / f"libfuzz-{digest}.so"
    if not path.exists():
        path.parent.mkdir(mode=0o700, exist_ok=True)
        flags = ["-std=gnu11", "-D_GNU_SOURCE", "-O2", "-fPIC", "-shared", f"-I{INCLUDE}"]
        scratch = path.with_suffix(f".{os.getpid()}")
        command = [os.environ.get("CC", "cc"), *flags, "-o", str(scratch), *map(str, sources[: len(SOURCES)])]
        subprocess.run(command, check=True)
        scratch.rename(path)
    return path


def declarations() -> str:
    """fuzz.h as cffi wants it: of the directives only the constants."""
    text = re.sub(r"/\*.*?\*/", "", (HERE / "fuzz.h").read_text(), flags=re.DOTALL)
    lines = text.splitlines()
    constant = re.compile(r"#define FUZZ_\w+ \w+")
    return "\n".join(line for line in lines if line[:1] != "#" or constant.match(line))


class Core:
    """The processor, in long mode at CPL 3 with the fuzzer's pages mapped and nothing else."""

    def __init__(self, fuzz_ffi: Any, fuzz_lib: Any, bits: int) -> None:
        m = self.machine = Machine()
        m.long64(ENTRY, cpl=3)
        for entry in range(512):
            m.write(PD + 8 * entry, 0)
        m.load(DATA_TABLE, bytes(8192))
        m.write(PD + 8 * (0x1000_0000 >> 21), DATA_TABLE | 7)
        m.write(PD + 8 * (0x2000_0000 >> 21), CODE_TABLE | 7)
        for page in (0, 1, 3, 4):
            m.write(DATA_TABLE + 8 * page, DATA_RAM + 4096 * page | (5 if page == 3 else 7))
        for page in (0, 1):
            m.write(CODE_TABLE + 8 * page, CODE_RAM + 4096 * page | 5)
        m.load(CODE_RAM, b"\xcc" * 8192)
        m.seg("gs").base = GS_BASE
        if bits < 64:
            self._legacy_segments(fuzz_lib, bits)
        for name, selector in SELECTORS[bits].items():
            m.seg(name).selector = selector
        m.guest.cr0 |= lib.X86_CR0_AM
        m.guest.cr4 |= lib.X86_CR4_OSFXSR | lib.X86_CR4_OSXMMEXCPT | lib.X86_CR4_OSXSAVE
        m.guest.xcr0 = 7
        m.ctl.exception_bitmap = 2**32 - 1
        m.ctl.flags |= lib.CPU_AMD if host()[0] == "AuthenticAMD" else 0
        lib.cpu_state_changed(m.cpu)
        lib.cpu_flush_tlb(m.cpu)
        self.struct = fuzz_ffi.new("struct fuzz_core *")
        self.struct.cpu = fuzz_ffi.cast("void *", address(m.cpu))
        self.struct.vmcs = fuzz_ffi.cast("void *", address(lib.cpu_vmcs(m.cpu)))
        self.struct.data = fuzz_ffi.cast("uint8_t *", m.hva + DATA_RAM)
        self.struct.code = fuzz_ffi.cast("uint8_t *", m.hva + CODE_RAM)
        self.struct.enter = fuzz_ffi.cast("int (*)(void *)", address(ffi.addressof(lib, "cpu_enter")))
        sync_code = address(ffi.addressof(lib, "cpu_sync_code"))
        self.struct.sync_code = fuzz_ffi.cast("void (*)(void *)", sync_code)

    def _legacy_segments(self, fuzz: Any, bits: int) -> None:
        m = self.machine
        m.seg("cs").ar = 0xC0FB if bits == 32 else 0x00FB
        m.seg("fs").ar = m.seg("gs").ar = 0x10000
        if bits == 16:
            segments = {
                "cs": (fuzz.FUZZ_CODE, fuzz.FUZZ_CS_LIMIT, 0xFB),
                "ds": (fuzz.FUZZ_DATA, fuzz.FUZZ_DS_LIMIT, 0xF3),
                "es": (fuzz.FUZZ_DATA, fuzz.FUZZ_ES_LIMIT, 0xF7),
                "ss": (fuzz.FUZZ_DATA, fuzz.FUZZ_SS_LIMIT, 0xF3),
            }
            for name, (base, limit, ar) in segments.items():
                m.seg(name).base, m.seg(name).limit, m.seg(name).ar = base, limit, ar


def address(pointer: Any) -> int:
    return int(ffi.cast("uintptr_t", pointer))


@dataclass
class Difference:
    """A case on which the host and the core do not agree."""

    template: Template
    where: str
    case: int
    text: str

    def __str__(self) -> str:
        code = self.template.bytes.hex()
        return f"{code:30} {self.template.row.text}: {self.text}\n    {self.where} --case {self.case}"


class Fuzzer:
    """Generates, runs and compares batches of cases."""

    def __init__(self, bits: int = 64, only: frozenset[str] = frozenset()) -> None:
        self.bits = bits
        self.ffi = FFI()
        self.ffi.cdef(declarations())
        self.lib: Any = self.ffi.dlopen(str(build()))
        self.core = Core(self.ffi, self.lib, bits)
        features = host()[2]
        self.rows = [row for row in table() if is_generated(row, features, bits)]
        if only:
            self.rows = [row for row in self.rows if row.name in only]
        self.covered: Counter[str] = Counter()
        self.cases = self._shared("struct fuzz_case")
        self.native = self._shared("struct fuzz_result")
        self.emulated = self._shared("struct fuzz_result")

    def _shared(self, kind: str) -> Any:
        pointer = self.lib.fuzz_shared(BATCH * self.ffi.sizeof(kind))
        return self.ffi.cast(f"{kind} *", pointer)

    def _expand(self, template: Template, seed: int, at: int) -> None:
        t: Any = self.ffi.new("struct fuzz_template *")
        t.bytes = template.bytes.ljust(16, b"\0")
        t.len, t.flags, t.rip = len(template.bytes), template.flags, template.rip
        for register, value in template.fixed.items():
            t.fixed |= 1 << register
            t.value[register] = value & 2**64 - 1
        t.patch_at, t.patch = template.patch[0], template.patch[1] & 2**64 - 1
        t.flags_mask = template.flags_mask
        t.index_size, t.index_register = template.index
        for ranges, wanted in ((t.zeroed, template.zeroed), (t.ignored, template.ignored)):
            for k, (at_address, size) in enumerate(wanted):
                ranges[k].at, ranges[k].size = at_address & 2**64 - 1, size
        for k in range(VARIANTS):
            self.lib.fuzz_expand(t, seed + k, self.cases + at + k)
            if k & 1:
                self.cases[at + k].flags |= BRANCH_STEP

    def batch(self, seed: int, number: int) -> list[Difference]:
        """Runs one batch; what differs."""
        generator = Generator(f"{seed}:{number}", self.rows, self.bits)
        where = f"--bits {self.bits} --seed {seed} --batch {number}"
        return self.run(list(generator.templates(TEMPLATES)), generator.random.getrandbits(63), where)

    def run(self, templates: list[Template], seed: int, where: str = "") -> list[Difference]:
        """Runs the cases of some templates; what differs."""
        n = len(templates) * VARIANTS
        for k, template in enumerate(templates):
            self.covered[template.row.name] += VARIANTS
            self._expand(template, seed + k * VARIANTS, k * VARIANTS)
        done = self.lib.fuzz_native(self.cases, self.native, n)
        differences = []
        if done < n:
            text = "the host did not come back from it"
            differences.append(Difference(templates[max(done, 0) // VARIANTS], where, done, text))
        self.lib.fuzz_core_run(self.core.struct, self.cases, self.emulated, max(done, 0))
        at = 0
        while (at := self.lib.fuzz_differs(self.cases, self.native, self.emulated, at, done)) < done:
            differences.append(Difference(templates[at // VARIANTS], where, at, self.explain(at)))
            at += 1
        return differences

    def explain(self, at: int) -> str:
        """How the results of a case differ."""
        n, e, parts = self.native[at], self.emulated[at], []
        if n.vector != e.vector:
            parts.append(f"vector {n.vector}, core {e.vector}")
        elif n.vector >= 0 and (n.error, n.cr2) != (e.error, e.cr2):
            parts.append(f"error {n.error:#x} cr2 {n.cr2:#x}, core {e.error:#x} {e.cr2:#x}")
        for k, name in enumerate(GPRS):
            if n.out.gpr[k] != e.out.gpr[k]:
                parts.append(f"{name} {n.out.gpr[k]:#x}, core {e.out.gpr[k]:#x}")
        if n.out.rip != e.out.rip:
            parts.append(f"rip {n.out.rip:#x}, core {e.out.rip:#x}")
        if (n.out.rflags ^ e.out.rflags) & self.cases[at].flags_mask:
            parts.append(f"rflags {n.out.rflags:#x}, core {e.out.rflags:#x}")
        if n.memory_hash != e.memory_hash:
            parts.append("memory")
        if self.cases[at].flags & VECTOR:
            parts.extend(self.explain_vectors(at))
        return "; ".join(parts)

    def explain_vectors(self, at: int) -> Iterator[str]:
        """How MXCSR and the vector registers differ."""
        before, native, core = (
            bytes(self.ffi.buffer(state.xsave))
            for state in (getattr(self.cases[at], "in"), self.native[at].out, self.emulated[at].out)
        )
        if native[24:28] != core[24:28]:
            words = (f"{int.from_bytes(image[24:28], 'little'):#x}" for image in (native, core, before))
            yield "mxcsr {}, core {} (before: {})".format(*words)
        for n in range(16):
            registers = [image[o + 16 * n : o + 16 * n + 16][::-1].hex() for image in (native, core, before)
                         for o in (576, 160)]  # fmt: skip
            if registers[:2] != registers[2:4]:
                yield "ymm{} {}_{}, core {}_{} (before: {}_{})".format(n, *registers)

    def state(self, at: int) -> str:
        """Registers before a case."""
        c = getattr(self.cases[at], "in")
        regs = " ".join(f"{name}={c.gpr[k]:#x}" for k, name in enumerate(GPRS))
        return f"{regs} rip={c.rip:#x} rflags={c.rflags:#x} flags={self.cases[at].flags}"


def campaign(fuzzer: Fuzzer, seed: int, batches: range, show: int, case: int | None = None) -> int:
    """Run these batches and print what differs, and how often; the number of differences."""
    seen: Counter[str] = Counter()
    start = time.monotonic()
    for number in batches:
        for difference in fuzzer.batch(seed, number):
            seen[difference.template.row.text] += 1
            if case is not None and difference.case == case:
                print(fuzzer.state(case))
            if seen.total() <= show and seen[difference.template.row.text] <= 3:
                print(difference, flush=True)
    print(f"{fuzzer.bits}-bit code, seed {seed}: {len(batches) * BATCH} cases of {len(fuzzer.covered)} mnemonics "
          f"in {time.monotonic() - start:.0f} s, {seen.total()} differences", flush=True)  # fmt: skip
    for text, count in seen.most_common(50):
        print(f"  {count:6} {text}")
    return seen.total()


def main() -> int:
    """Command line; the status is 1 when something differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000, help="cases to run")
    parser.add_argument("--long", action="store_true", help=f"{LONG} cases, a third of each kind of code")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bits", type=int, choices=(64, 32, 16), default=64, help="kind of code")
    parser.add_argument("--batch", type=int, help="run only this batch of the seed")
    parser.add_argument("--case", type=int, help="show the state of this case of the batch")
    parser.add_argument("--only", default="", help="mnemonics, separated by commas")
    parser.add_argument("--show", type=int, default=40, help="differences to print")
    parser.add_argument("--coverage", action="store_true", help="print cases by mnemonic")
    args = parser.parse_args()
    kinds, count = ([64, 32, 16], -(-LONG // 3)) if args.long else ([args.bits], args.count)
    batches = range(-(-count // BATCH)) if args.batch is None else range(args.batch, args.batch + 1)
    differences = 0
    for bits in kinds:
        fuzzer = Fuzzer(bits, frozenset(filter(None, args.only.split(","))))
        differences += campaign(fuzzer, args.seed, batches, args.show, args.case)
        if args.coverage:
            print(" ".join(f"{name}:{count}" for name, count in sorted(fuzzer.covered.items())))
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
