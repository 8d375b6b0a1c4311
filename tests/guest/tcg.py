"""The guests of the bare processor under QEMU's TCG: the same memory, the same registers, the same end.

    with Tcg() as tcg:
        end = tcg.run(snapshot(m), stop_at=None)     # to its HLT, or to a linear address
        differences(m, end)                          # [] when both agree

One QEMU serves any number of runs.  Its RAM is a file that is written and read here; a ROM brings
what differs into place with stores of the guest's own, so that TCG's translations of it end, and a
loader gets the processor into the state of the snapshot.  The end is read from the monitor.

What cannot be had by executing instructions (hidden parts of segment registers that no descriptor
describes, a pending event, ...) cannot be run: `snapshot` raises NotExportable.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import shutil
import struct
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from pykvm.abi import lib
from tests.guest.bare import ALL_ONES, GPRS, SEGMENTS, Machine, assemble, descriptor

QEMU = "qemu-system-x86_64"
RAM_SIZE = 16 << 20
LOADER, PARAMETERS, LIST, STAGING = 0x500000, 0x501000, 0x600000, 0x700000
PAGE = 4096
UNUSABLE = lib.CPU_AR_UNUSABLE
# What a snapshot may have in ctl.flags: none of it is seen by the guest.
PLAIN_FLAGS = lib.CPU_TDP | lib.CPU_EXIT_HLT | lib.CPU_EXIT_PAUSE

# ---- what runs before the guest ----------------------------------------------------------------------

GDT_SOURCE = f"""
    .balign 8
entries:
    .quad 0, {descriptor(0, 0xFFFFF, 0xC09B)}, {descriptor(0, 0xFFFFF, 0xC093)}
    .quad {descriptor(0, 0xFFFFF, 0xA09B)}, {descriptor(LOADER, 0xFFFF, 0x9B)}, {descriptor(0, 0xFFFF, 0x93)}
table:
    .word 47
    .long entries
"""

# Real mode at the reset vector, then 32 bits: LIST has a count and the addresses of the pages in STAGING.
ROM = f"""
    .code16
start:
    lgdtd cs:[table - start + 0xf000]
    mov eax, cr0
    or al, 1
    mov cr0, eax
    .byte 0x66, 0xea
    .long protected32
    .word 8
    .code32
protected32:
    mov eax, 16
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov esp, {PARAMETERS + 0x1000}
    cld
    mov edx, [{LIST}]
    mov ebx, {LIST + 4}
    mov esi, {STAGING}
1:  test edx, edx
    jz 2f
    mov edi, [ebx]
    mov ecx, 1024
    rep movsd
    add ebx, 4
    dec edx
    jmp 1b
2:  mov eax, {LOADER}
    jmp eax
{GDT_SOURCE}
    .org 0xff0
    .code16
    jmp start
    .org 0x1000
"""

PARAMETER_NAMES = (
    "kind", "cr0", "cr2", "cr3", "cr4", "efer", "dr0", "dr1", "dr2", "dr3", "dr6", "dr7", "rip", "rflags",
    *SEGMENTS, "gdt", "gdt_base", "idt", "idt_base", "fs_base", "gs_base", "busy", *GPRS,
    "star", "lstar", "cstar", "sfmask", "kernel_gs_base", "sysenter_cs", "sysenter_esp", "sysenter_eip",
)  # fmt: skip
AT = {name: PARAMETERS + 8 * k for k, name in enumerate(PARAMETER_NAMES)}
REAL, PROTECTED, LONG, INNER = 0, 1, 2, 4  # INNER: to CPL 3 or virtual-8086 mode, through IRET
MSRS = {
    "star": 0xC0000081, "lstar": 0xC0000082, "cstar": 0xC0000083, "sfmask": 0xC0000084,
    "kernel_gs_base": 0xC0000102, "sysenter_cs": 0x174, "sysenter_esp": 0x175, "sysenter_eip": 0x176,
}  # fmt: skip


def write_msr(number: int, name: str) -> str:
    return f"mov ecx, {number}; mov eax, [{AT[name]}]; mov edx, [{AT[name] + 4}]; wrmsr;"


def load_gprs(prefix: str, registers: tuple[str, ...], segment: str = "") -> str:
    names = [prefix + r[1:] for r in registers if r != "rsp"]
    return ";".join(
        f"mov {n}, {segment}[{AT[r]}]"
        for n, r in zip(names, [r for r in registers if r != "rsp"], strict=True)
    )


# 32-bit code with flat segments, paging off.
LOADER_SOURCE = f"""
    lgdt [table]
    {"".join(write_msr(number, name) for name, number in MSRS.items())}
    {"".join(f"mov eax, [{AT[r]}]; mov {r}, eax;" for r in ("cr2", "dr0", "dr1", "dr2", "dr3", "dr6"))}
    mov edi, [{AT["busy"]}]
    test edi, edi
    jz 1f
    and byte ptr [edi], 0xfd
1:  {write_msr(0xC0000080, "efer")}
    mov eax, [{AT["cr4"]}]
    mov cr4, eax
    mov eax, [{AT["cr3"]}]
    mov cr3, eax
    mov ebp, [{AT["kind"]}]
    test ebp, ebp
    jz to_real
    mov eax, [{AT["cr0"]}]
    mov cr0, eax
    test ebp, {LONG}
    jz protected
    .byte 0xea
    .long long
    .word 0x18
protected:
    lgdt [{AT["gdt"] + 6}]
    lidt [{AT["idt"] + 6}]
    lldt [{AT["ldtr"]}]
    cmp word ptr [{AT["tr"]}], 0
    jz 1f
    ltr [{AT["tr"]}]
1:  mov eax, [{AT["dr7"]}]
    mov dr7, eax
    test ebp, {INNER}
    jnz inner
    push [{AT["rflags"]}]
    popfd
    mov eax, [{AT["rip"]}]
    mov [target], eax
    mov ax, [{AT["cs"]}]
    mov [target + 4], ax
    mov eax, [{AT["rsp"]}]
    mov [top], eax
    mov ax, [{AT["ss"]}]
    mov [top + 4], ax
    mov es, [{AT["es"]}]
    mov fs, [{AT["fs"]}]
    mov gs, [{AT["gs"]}]
    mov ds, [{AT["ds"]}]
    lss esp, cs:[top]
    {load_gprs("e", GPRS[:8], "cs:")}
    jmp fword ptr cs:[target]
inner:
    {"".join(f"push [{AT[s]}];" for s in ("gs", "fs", "ds", "es", "ss", "rsp", "rflags", "cs", "rip"))}
    test dword ptr [{AT["rflags"]}], {lib.X86_EFLAGS_VM}
    jnz 1f
    mov es, [{AT["es"]}]
    mov fs, [{AT["fs"]}]
    mov gs, [{AT["gs"]}]
    mov ds, [{AT["ds"]}]
1:  {load_gprs("e", GPRS[:8], "cs:")}
    iretd
target: .long 0, 0
top: .long 0, 0

to_real:
    mov eax, [{AT["dr7"]}]
    mov dr7, eax
    push [{AT["rflags"]}]
    popfd
    mov eax, 0x28
    mov ds, eax
    mov es, eax
    mov fs, eax
    mov gs, eax
    mov ss, eax
    .byte 0xea
    .long real - {LOADER}
    .word 0x20
    .code16
    .set P, {PARAMETERS - LOADER}
real:
    lgdtd cs:[P + {AT["gdt"] + 6 - PARAMETERS}]
    lidtd cs:[P + {AT["idt"] + 6 - PARAMETERS}]
    mov eax, cs:[P + {AT["cr0"] - PARAMETERS}]
    mov cr0, eax
    {"".join(f"mov {s}, cs:[P + {AT[s] - PARAMETERS}];" for s in ("es", "ds", "fs", "gs", "ss"))}
    mov esp, cs:[P + {AT["rsp"] - PARAMETERS}]
    {"".join(f"mov e{r[1:]}, cs:[P + {AT[r] - PARAMETERS}];" for r in GPRS[:8] if r != "rsp")}
    jmp dword ptr cs:[P + {AT["cs"] - PARAMETERS - 2}]

    .code64
long:
    mov esp, {PARAMETERS + 0x1000}
    lgdt [{AT["gdt"] + 6}]
    lidt [{AT["idt"] + 6}]
    lldt [{AT["ldtr"]}]
    cmp word ptr [{AT["tr"]}], 0
    jz 1f
    ltr [{AT["tr"]}]
1:  mov es, [{AT["es"]}]
    mov ds, [{AT["ds"]}]
    mov fs, [{AT["fs"]}]
    mov gs, [{AT["gs"]}]
    {write_msr(0xC0000100, "fs_base")}
    {write_msr(0xC0000101, "gs_base")}
    mov rax, [{AT["cr2"]}]
    mov cr2, rax
    {"".join(f"mov rax, [{AT[r]}]; mov {r}, rax;" for r in ("dr0", "dr1", "dr2", "dr3", "dr7"))}
    {"".join(f"push [{AT[s]}];" for s in ("ss", "rsp", "rflags", "cs", "rip"))}
    {";".join(f"mov {r}, [{AT[r]}]" for r in GPRS if r != "rsp")}
    iretq
{GDT_SOURCE}
"""


# ---- what is to be run ----------------------------------------------------------------------------------


class NotExportableError(Exception):
    """No sequence of instructions leads to this state."""


class QemuError(Exception):
    """QEMU gave up; the message has what it said."""


@dataclass
class Snapshot:
    """Memory, and the parameters of the loader."""

    ram: bytes
    values: dict[str, int]


def linear_rip(m: Machine) -> int:
    """Where the next instruction is."""
    cs = m.seg("cs")
    wide = m.guest.efer & lib.EFER_LMA and cs.ar & lib.CPU_AR_L
    return int(m.guest.rip) if wide else int(cs.base + m.guest.rip) & ALL_ONES


def _expect(what: str, ok: bool) -> None:
    if not ok:
        raise NotExportableError(what)


def _check_controls(m: Machine) -> None:
    g, ctl = m.guest, m.ctl
    _expect("controls", not ctl.flags & ~PLAIN_FLAGS and not ctl.exception_bitmap and not ctl.insn_budget)
    _expect("features", all(ctl.cpuid[k] == ALL_ONES for k in range(lib.CPU_NR_CPUID)))
    _expect("an event", not ctl.entry_event.info & lib.CPU_EVENT_VALID)
    _expect("answers", not ctl.mmio_count and not ctl.pio_count and not ctl.pio_out_done)
    _expect("blocking", not g.interruptibility and not g.pending_dbg and not g.cr8)
    _expect("memory that is not plain", not m.has_holes)
    _expect("extended state", g.xcr0 == 1 and g.pkru == 0 and g.xss == 0)


def _descriptor_of(m: Machine, selector: int) -> tuple[int, int]:
    """Two words of the GDT or LDT."""
    table = m.seg("ldtr") if selector & 4 else m.guest.gdtr
    _expect("a selector outside its table", (selector | 7) <= table.limit)
    at = table.base + (selector & ~7)
    _expect("a table outside memory", at + 16 <= m.size)
    return m.read(at), m.read(at + 8)


def _check_segment(m: Machine, name: str, real: bool) -> None:
    """Would loading the selector give this segment register?"""
    s, long_mode = m.seg(name), bool(m.guest.efer & lib.EFER_LMA)
    system = name in {"ldtr", "tr"}
    if system and real:
        return
    if real or (m.guest.rflags & lib.X86_EFLAGS_VM and not system):
        _expect(f"{name} of real mode", s.base == s.selector << 4 and s.limit == 0xFFFF)
        return
    if s.ar & UNUSABLE:
        _expect(f"unusable {name}", not s.selector & ~3 and (name != "ss" or long_mode))
        return
    raw, high = _descriptor_of(m, s.selector)
    base = raw >> 16 & 0xFFFFFF | raw >> 32 & 0xFF000000
    limit = raw & 0xFFFF | raw >> 32 & 0xF0000
    ar = raw >> 40 & 0xF0FF
    limit = limit << 12 | 0xFFF if ar & lib.CPU_AR_G else limit
    if long_mode and system:
        base |= (high & ALL_ONES) << 32
    if long_mode and name in {"fs", "gs"}:
        base = s.base  # loaded with its MSR
    busy = 2 if name == "tr" else 1
    _expect(f"{name} is not its descriptor", (base, limit, ar | busy) == (s.base, s.limit, s.ar | busy))


def snapshot(m: Machine) -> Snapshot:
    """What `m` is about to run.

    Errors:
        NotExportableError  that is more than instructions can set up
    """
    g = m.guest
    _check_controls(m)
    real = not g.cr0 & lib.X86_CR0_PE
    for name in SEGMENTS:
        _check_segment(m, name, real)
    long_mode = bool(g.efer & lib.EFER_LMA)
    v86 = bool(g.rflags & lib.X86_EFLAGS_VM)
    inner = not real and (v86 or m.cpl > 0)
    kind = REAL if real else LONG if long_mode else PROTECTED | (INNER if inner else 0)
    _expect("paging as it is", not g.cr0 & lib.X86_CR0_PG or long_mode or not g.cr4 & lib.X86_CR4_PAE)
    traps = lib.X86_EFLAGS_TF | lib.X86_EFLAGS_RF
    _expect("flags", kind in {LONG, PROTECTED | INNER} or not g.rflags & traps)
    _expect("AC", kind != REAL or not g.rflags & lib.X86_EFLAGS_AC)
    values = {r: m.reg(r) for r in (*GPRS, "rip", "rflags", "cr0", "cr2", "cr3", "cr4", "dr6", "dr7")}
    values |= {f"dr{k}": int(g.dr[k]) for k in range(4)} | {r: m.reg(r) for r in MSRS}
    values |= m.selectors() | {"kind": kind, "efer": g.efer & ~lib.EFER_LMA}
    values |= {"fs_base": m.seg("fs").base, "gs_base": m.seg("gs").base}
    for name, table in (("gdt", g.gdtr), ("idt", g.idtr)):
        values |= {name: table.limit << 48, f"{name}_base": table.base}
    tr = m.seg("tr")
    busy = not real and bool(tr.selector) and not tr.ar & UNUSABLE
    values["busy"] = g.gdtr.base + (tr.selector & ~7) + 5 if busy else 0
    if not busy:
        values["tr"] = 0
    _expect("ip", not real or values["rip"] <= 0xFFFF)
    return Snapshot(bytes(m.ram[:]), values)


# ---- what came of it ---------------------------------------------------------------------------------------


@dataclass
class End:
    """How a run ended: "hlt", "there" (at stop_at), "triple fault" or "still running"."""

    how: str
    registers: dict[str, int] = field(default_factory=dict)
    ram: bytes = b""
    wide: bool = False  # all 64 bits of the registers are known
    real: bool = False  # it began in real mode


_REGISTER = re.compile(
    r"\b([ER][A-Z0-9]{2}|R[89]|R1[0-5]|CR[0-4]|DR[0-7]|EFL|RFL|EFER|HLT|II|CPL) ?=\s*([0-9a-f]+)"
)
_SEGMENT = re.compile(
    r"^([ECSDFGLT][SDR]T?) ?=([0-9a-f]{4}) ([0-9a-f]+) ([0-9a-f]{8}) ([0-9a-f]{8})", re.MULTILINE
)
_TABLE = re.compile(r"^([GI])DT= *([0-9a-f]+) ([0-9a-f]+)", re.MULTILINE)


def parse_registers(text: str) -> dict[str, int]:
    """The monitor's "info registers" by our names; segments as es, es.base, es.limit, es.ar."""
    found = {}
    for name, value in _REGISTER.findall(text):
        key = {"EFL": "rflags", "RFL": "rflags"}.get(name, name.lower())
        key = "r" + key[1:] if re.fullmatch(r"e[a-z]{2}", key) else key
        found[key] = int(value, 16)
    for name, selector, base, limit, flags in _SEGMENT.findall(text):
        key = {"LDT": "ldtr"}.get(name, name.lower())
        found[key] = int(selector, 16)
        found |= {f"{key}.base": int(base, 16), f"{key}.limit": int(limit, 16)}
        found[f"{key}.ar"] = int(flags, 16) >> 8 & 0xF0FF
    for name, base, limit in _TABLE.findall(text):
        found |= {f"{name.lower()}dt.base": int(base, 16), f"{name.lower()}dt.limit": int(limit, 16)}
    return found


class Tcg:
    """A QEMU that runs snapshots."""

    def __init__(self) -> None:
        self._dir = tempfile.TemporaryDirectory(prefix="pykvm-tcg-", dir="/dev/shm")
        path = Path(self._dir.name)
        with open(path / "ram", "w+b") as f:
            f.truncate(RAM_SIZE)
            self._ram = mmap.mmap(f.fileno(), RAM_SIZE)
        rom, _ = assemble(ROM, 0xFFFFF000, 16, ())
        (path / "rom").write_bytes(bytes(0xF000) + rom)
        loader, _ = assemble(LOADER_SOURCE, LOADER, 32, ())
        assert len(loader) <= PARAMETERS - LOADER
        self._ram[LOADER : LOADER + len(loader)] = loader
        self._process = subprocess.Popen(
            [
                QEMU, "-accel", "tcg", "-cpu", "max,vendor=GenuineIntel,phys-bits=40",
                "-machine", "microvm,pic=off,pit=off,rtc=off,isa-serial=off,memory-backend=ram",
                "-m", str(RAM_SIZE >> 20), "-object",
                f"memory-backend-file,id=ram,size={RAM_SIZE},mem-path={path}/ram,share=on",
                "-bios", str(path / "rom"), "-nodefaults", "-no-user-config", "-display", "none", "-S",
                "-qmp", "stdio",
            ],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._resets: list[bool] = []  # since the last reset asked for: by the guest?
        self._read()  # the greeting
        self._command("qmp_capabilities")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._ram.close()
        self._dir.cleanup()

    # ---- QMP

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith(b"{"):
            raise QemuError(line.decode() or "QEMU has ended")
        message: dict[str, Any] = json.loads(line)
        if message.get("event") == "RESET":
            self._resets.append(message["data"]["guest"])
        return message

    def _command(self, name: str, **arguments: object) -> Any:
        assert self._process.stdin is not None
        line = json.dumps({"execute": name, "arguments": arguments})
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()
        while "return" not in (message := self._read()):
            assert "error" not in message, message
        return message["return"]

    def _monitor(self, line: str) -> str:
        return str(self._command("human-monitor-command", **{"command-line": line}))

    # ---- running

    def run(self, s: Snapshot, stop_at: int | None = None, seconds: float = 5) -> End:
        """Run to the HLT with interrupts off or nothing to wake it, or until rip has `stop_at`.

        stop_at: linear address where there must be an endless loop (EB FE).
        """
        self._command("stop")
        self._resets.clear()
        self._command("system_reset")
        while False not in self._resets:
            self._read()
        self._stage(s)
        self._command("cont")
        end = time.monotonic() + seconds
        while True:
            text = self._monitor("info registers")
            registers = parse_registers(text)
            if True in self._resets:
                return self._end("triple fault", text, s)
            if registers["hlt"]:
                return self._end("hlt", text, s)
            # the loader's own addresses are above all guests
            where = registers["rip"] + (0 if "RIP=" in text else registers["cs.base"])
            if stop_at is not None and where == stop_at:
                return self._end("there", text, s)
            if time.monotonic() > end:
                return self._end("still running", text, s)
            time.sleep(0.0005)

    def _end(self, how: str, text: str, s: Snapshot) -> End:
        self._command("stop")
        real = s.values["kind"] == REAL
        return End(how, parse_registers(text), self._ram[: len(s.ram)], "RIP=" in text, real)

    def _stage(self, s: Snapshot) -> None:
        """Put what differs between the memory there is and that of the snapshot into the list."""
        size = min(len(s.ram), LOADER)
        pages = [at for at in range(0, size, PAGE) if self._ram[at : at + PAGE] != s.ram[at : at + PAGE]]
        self._ram[LIST : LIST + 4 + 4 * len(pages)] = struct.pack(f"<{len(pages) + 1}I", len(pages), *pages)
        for k, at in enumerate(pages):
            self._ram[STAGING + PAGE * k : STAGING + PAGE * (k + 1)] = s.ram[at : at + PAGE]
        mask = 2**64 - 1
        packed = struct.pack(f"<{len(PARAMETER_NAMES)}Q", *(s.values[n] & mask for n in PARAMETER_NAMES))
        if s.values["kind"] == REAL:
            offset = AT["cs"] - PARAMETERS - 2
            packed = packed[:offset] + struct.pack("<H", s.values["rip"]) + packed[offset + 2 :]
        self._ram[PARAMETERS : PARAMETERS + len(packed)] = packed


def available() -> str | None:
    """Why there is no TCG here, or None."""
    if not shutil.which(QEMU):
        return f"{QEMU} is not installed"
    return None if os.path.isdir("/dev/shm") else "no /dev/shm"


# ---- comparing ----------------------------------------------------------------------------------------------

COMPARED = ("rip", "rflags", "cr0", "cr2", "cr3", "cr4", "dr6", "dr7", "efer")


def differences(m: Machine, end: End, skip: tuple[int, int] = (0, 0)) -> list[str]:
    """Where the bare processor and TCG ended differently; `skip`: bytes of memory not to look at."""
    found = []
    mask = 2**64 - 1 if end.wide else ALL_ONES

    def compare(name: str, ours: int, theirs: int) -> None:
        if ours != theirs:
            found.append(f"{name}: {ours:#x}, TCG {theirs:#x}")

    for r in GPRS[: 16 if end.wide else 8]:
        compare(r, m.reg(r) & mask, end.registers[r])
    for r in COMPARED:
        # TCG clears RF only at the end of a translation: SDM vol. 3 17.3.1.1 says with every instruction
        ignored = lib.X86_EFLAGS_RF if r == "rflags" and not m.reg(r) & lib.X86_EFLAGS_RF else 0
        compare(r, m.reg(r) & mask & ~ignored, end.registers[r] & mask & ~ignored)
    for name in SEGMENTS:
        if not end.real or name not in {"ldtr", "tr"}:  # which the loader left alone then
            _compare_segment(m, name, end, compare)
    for name, table in (("gdt", m.guest.gdtr), ("idt", m.guest.idtr)):
        compare(f"{name}.base", table.base, end.registers[f"{name}.base"])
        compare(f"{name}.limit", table.limit, end.registers[f"{name}.limit"])
    ours, theirs = bytearray(m.ram), bytearray(end.ram)
    for ram in (ours, theirs):
        ram[LOADER:] = bytes(max(0, len(ram) - LOADER))
        ram[skip[0] : skip[1]] = bytes(skip[1] - skip[0])
    if ours != theirs:
        for at in range(0, len(ours), 8):
            a, b = ours[at : at + 8], theirs[at : at + 8]
            if a != b and not _is_missing_rf(bytes(a), bytes(b)):
                found.append(f"[{at:#x}]: {a.hex()}, TCG {b.hex()}")
    return found


def _is_missing_rf(ours: bytes, theirs: bytes) -> bool:
    """TCG 7.2 pushes the RF of faults as it was: SDM vol. 3 17.3.1.1 has it set."""
    return [a ^ b for a, b in zip(ours, theirs, strict=True) if a != b] == [1] and sum(ours) == sum(
        theirs
    ) + 1


def _compare_segment(m: Machine, name: str, end: End, compare: Any) -> None:
    s = m.seg(name)
    system = name in {"ldtr", "tr"}
    compare(name, s.selector, end.registers[name])
    if s.ar & UNUSABLE:
        return  # TCG keeps something of the old one, which nobody can see
    compare(f"{name}.base", s.base, end.registers[f"{name}.base"])
    if m.guest.efer & lib.EFER_LMA and m.seg("cs").ar & lib.CPU_AR_L and not system:
        return  # 64-bit mode looks at nothing else
    compare(f"{name}.limit", s.limit, end.registers[f"{name}.limit"])
    unseen = 2 if name == "tr" else 1  # busy and accessed: TCG sets them in memory
    compare(f"{name}.ar", s.ar | unseen, unseen | end.registers[f"{name}.ar"])
