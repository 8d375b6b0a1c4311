"""Builds the native parts of pykvm: ``python -m pykvm.abi._build``.

When the package cannot be imported because they are missing or old, ``python pykvm/abi/_build.py``.
The same code is the hatchling build hook behind ``pip install .`` and ``pip install -e .``.  It makes

- ``pykvm/abi/_native.*.so``: the headers in ``include/pykvm`` and ``pykvm/abi`` through the filter
  below as a cffi API-mode module, linked with the C core in ``pykvm/cpu`` and with ``pykvm/abi/*.c``;
- ``pykvm/preload/libpykvm-preload.so``: the LD_PRELOAD library, a cffi embedding;
- ``pykvm/guest/*.bin`` and ``*.elf``: the guest images shipped in the package.

Only what changed is compiled again.  Objects live in ``build/<variant>``; environment variable
``PYKVM_BUILD`` names the variant:

- ``release`` (default);
- ``dev``: adds -Wall -Wextra -Werror -g; replaces the release build in place;
- ``asan``: AddressSanitizer and UndefinedBehaviorSanitizer.  Stays in ``build/asan`` beside the
  normal build, and is loaded when ``PYKVM_BUILD=asan`` is set at run time too::

      PYKVM_BUILD=asan python -m pykvm.abi._build
      PYKVM_BUILD=asan LD_PRELOAD="$(cc -print-file-name=libasan.so)" ASAN_OPTIONS=detect_leaks=0 pytest

This module imports nothing of pykvm: it runs before there is a native module to import.  hatchling
runs it without an entry in sys.modules, which dataclasses need; hence the named tuples.
"""

from __future__ import annotations

import ast
import fcntl
import filecmp
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from cffi import FFI

HEADERS = ("kvm.h", "x86.h", "cpu.h")
EXT_SUFFIX: str = sysconfig.get_config_var("EXT_SUFFIX")
JOBS = 2

CFLAGS = (
    "-std=gnu11",
    "-D_GNU_SOURCE=",  # spelled so that a file may define it too
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",
    "-fwrapv",
    "-pthread",
)
WARNINGS = ("-Wall", "-Wextra", "-Werror")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")


class BuildError(Exception):
    """A build that cannot go on; the message is for the person who asked for it."""


class Variant(NamedTuple):
    """One way to compile: its name is also its directory under ``build/``."""

    name: str
    cflags: tuple[str, ...]
    ldflags: tuple[str, ...] = ()
    in_place: bool = True


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("release", ("-O2",)),
        Variant("dev", ("-O2", "-g", *WARNINGS)),
        Variant("asan", ("-O1", "-g", *WARNINGS, *SANITIZERS), SANITIZERS, in_place=False),
    )
}


def source_root() -> Path:
    """Return the root of the source tree this file lies in."""
    return Path(__file__).resolve().parents[2]


def chosen_variant() -> Variant:
    """Return the variant that PYKVM_BUILD names."""
    name = os.environ.get("PYKVM_BUILD") or "release"
    if name not in VARIANTS:
        msg = f"PYKVM_BUILD={name}: must be one of {', '.join(VARIANTS)}"
        raise BuildError(msg)
    return VARIANTS[name]


# ---- headers -> cdef -------------------------------------------------------------------------------


def strip_comments(text: str) -> str:
    """Return C text without comments and with continued lines joined."""
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.DOTALL)
    text = re.sub(r"//[^\n]*", "", text)
    return text.replace("\\\n", " ")


def cdef_of(text: str) -> str:
    """Return what cffi can read of a header: declarations and integer constants.

    ``#define X 12`` stays, so that X can be an array size; ``#define X (1 << Y)`` becomes
    ``#define X ...`` and gets its value from the compiler.  Other directives go, attributes and
    ``#ifndef PYKVM_CDEF`` ... ``#endif`` too.
    """
    text = strip_comments(text)
    text = re.sub(r"^#ifndef PYKVM_CDEF$.*?^#endif$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"__attribute__\s*\(\((?:[^()]|\([^()]*\))*\)\)|_Alignas\s*\([^)]*\)|\b_Atomic\b", "", text)
    text = re.sub(r"_Static_assert\s*\(.*?\)\s*;", "", text, flags=re.DOTALL)
    lines = []
    for line in text.splitlines():
        if not line.lstrip().startswith("#"):
            lines.append(line)
        elif macro := re.match(r"\s*#\s*define\s+(\w+)\s+([^\s\"].*?)\s*$", line):
            name, value = macro.groups()
            literal = re.fullmatch(r"0[xX][0-9a-fA-F]+|[0-9]+", value)
            lines.append(f"#define {name} {value if literal else '...'}")
    return "\n".join(lines)


class RequestLine(NamedTuple):
    """One request of kvm.h: ``#define NAME KVM_IOW(nr, type)  /* fds: capability; foreign type */``."""

    name: str
    argument: str
    fds: str
    cap: str


def requests_of(text: str) -> list[RequestLine]:
    """Return the requests a header defines, in its order."""
    pattern = re.compile(
        r"^#define[ \t]+(?P<name>KVM_\w+)[ \t]+KVM_IO(?P<kind>W|R|WR|C|)\((?P<args>[^()]*)\)"
        r"[ \t]*/\*[ \t]*(?P<fds>[\w, ]+):[ \t]*(?P<cap>\w+)(?:;[ \t]*(?P<foreign>[\w ]+?))?[ \t]*\*/$",
        re.MULTILINE,
    )
    rows = []
    for match in pattern.finditer(text):
        typed = match["kind"] in {"W", "R", "WR"}
        argument = match["args"].split(",", 1)[1].strip() if typed else (match["foreign"] or "")
        cap = "" if match["cap"] == "always" else match["cap"]
        rows.append(RequestLine(match["name"], argument, match["fds"].replace(" ", ""), cap))
    return rows


def request_table(rows: Iterable[RequestLine]) -> tuple[str, str]:
    """Return (cdef, C source) of ``kvm_requests[]``, so that Python need not parse the header."""
    rows = list(rows)
    struct = (
        "struct kvm_request { const char *name; const char *argument; const char *fds; const char *cap;"
        " uint32_t number; };"
    )
    body = ",\n".join(f'    {{ "{r.name}", "{r.argument}", "{r.fds}", "{r.cap}", {r.name} }}' for r in rows)
    table = f"static const struct kvm_request kvm_requests[{len(rows)}]"
    return f"{struct}\n{table};", f"{struct}\n{table} = {{\n{body}\n}};"


# ---- compiling -------------------------------------------------------------------------------------


def run(command: Sequence[str]) -> str:
    """Run a tool and return its output; its messages go to the person who builds."""
    result = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        msg = f"failed: {shlex.join(command)}"
        raise BuildError(msg)
    return result.stdout


def cc() -> list[str]:
    """Return the C compiler's command."""
    return shlex.split(os.environ.get("CC", "cc"))


def is_current(target: Path, command: Sequence[str], inputs: Iterable[Path] = ()) -> bool:
    """Say if target was made by this command, later than its inputs and those its depfile lists."""
    stamp = target.with_name(target.name + ".cmd")
    if not (target.exists() and stamp.exists()) or stamp.read_text() != shlex.join(command):
        return False
    depfile = target.with_name(target.name + ".d")
    listed = depfile.read_text().replace("\\\n", " ").split(":", 1)[1].split() if depfile.exists() else []
    made = target.stat().st_mtime_ns
    files = [*inputs, *map(Path, listed)]
    return all(path.exists() and path.stat().st_mtime_ns <= made for path in files)


def make(target: Path, command: Sequence[str], inputs: Iterable[Path] = ()) -> bool:
    """Run command to make target unless it is current; say if it was run."""
    if is_current(target, command, inputs):
        return False
    target.unlink(missing_ok=True)
    run(command)
    target.with_name(target.name + ".cmd").write_text(shlex.join(command))
    return True


class Tree(NamedTuple):
    """Where things are: root of the source tree, variant, and the scratch directory of both."""

    root: Path
    variant: Variant

    @property
    def scratch(self) -> Path:
        """Return the directory of objects; one per Python, whose headers are compiled in."""
        return self.root / "build" / self.variant.name / (sys.implementation.cache_tag or "python")

    @property
    def includes(self) -> list[str]:
        """Return the -I flags; a C core file includes "pykvm/cpu.h" and "core.h"."""
        return [f"-I{self.root / path}" for path in ("include", "pykvm/cpu", "pykvm/abi")]

    def headers(self) -> list[Path]:
        """Return the headers that Python sees: the public ones, then those of pykvm.abi's own C."""
        paths = [self.root / "include" / "pykvm" / name for name in HEADERS]
        return [path for path in paths if path.exists()] + sorted((self.root / "pykvm" / "abi").glob("*.h"))

    def object(self, source: Path, flags: Sequence[str]) -> Path:
        """Compile one C file into the scratch directory, when needed."""
        target = self.scratch / f"{source.parent.name}-{source.stem}.o"
        depfile = target.with_name(target.name + ".d")
        depending = ["-MMD", "-MF", str(depfile)]
        make(target, [*cc(), *CFLAGS, *flags, *depending, "-c", str(source), "-o", str(target)])
        return target

    def objects(self, sources: Sequence[Path], flags: Sequence[str]) -> list[Path]:
        """Compile C files, two at a time."""
        with ThreadPoolExecutor(JOBS) as pool:
            return list(pool.map(lambda source: self.object(source, flags), sources))

    def generated_flags(self) -> list[str]:
        """Return the flags for what cffi writes: no warnings, they would not be ours to mend."""
        sanitizers = [flag for flag in self.variant.cflags if flag in SANITIZERS]
        return ["-O2", "-w", *sanitizers, f"-I{sysconfig.get_path('include')}", *self.includes]

    def link(self, name: str, objects: Sequence[Path], flags: Sequence[str] = ()) -> Path:
        """Link a shared object in the scratch directory."""
        target = self.scratch / name
        command = [*cc(), "-shared", "-pthread", *self.variant.ldflags, "-o", str(target)]
        make(target, [*command, *map(str, objects), *flags], objects)
        return target

    def install(self, built: Path, folder: str) -> Path:
        """Put a product where the package expects it; a running process keeps the file it has mapped."""
        if not self.variant.in_place:
            return built
        target = self.root / folder / built.name
        if not target.exists() or not filecmp.cmp(built, target, shallow=False):
            fresh = target.with_name(target.name + ".new")
            shutil.copyfile(built, fresh)
            shutil.copymode(built, fresh)
            fresh.replace(target)
        return target


# ---- the three products ----------------------------------------------------------------------------


def undefined_symbols(tree: Tree, objects: Sequence[Path]) -> list[str]:
    """Return what objects use and neither they nor libc nor Python define, weak references aside."""
    probe = [*cc(), "-shared", "-pthread", *tree.variant.ldflags, "-Wl,--no-undefined", "-o", os.devnull]
    command, env = [*probe, *map(str, objects), "-lm"], os.environ | {"LC_ALL": "C"}
    result = subprocess.run(command, check=False, capture_output=True, text=True, env=env)
    return sorted(set(re.findall(r"undefined reference to `(?!_?Py)(\w+)'", result.stderr)))


PLACEHOLDER = """
#include <stdio.h>
#include <stdlib.h>
static void missing(const char *name)
{
    fprintf(stderr, "pykvm: %s() is not written yet\\n", name);
    abort();
}
"""


def placeholders(tree: Tree, missing: Sequence[str]) -> Path:
    """Return an object that defines what an unfinished core lacks; calling it aborts.

    So that one who works on Python need not wait for all of the C.
    """
    print(f"pykvm: warning: not written yet, a call aborts: {' '.join(missing)}", file=sys.stderr)
    source = tree.scratch / "placeholders.c"
    bodies = [f'void {name}(void) {{ missing("{name}"); }}' for name in missing]
    source.write_text("\n".join([PLACEHOLDER, *bodies, ""]))
    return tree.object(source, ["-w"])


def native_cdef(tree: Tree) -> tuple[str, str]:
    """Return (cdef, C source) of the native module."""
    texts = {path: path.read_text() for path in tree.headers()}
    table_cdef, table = request_table(row for text in texts.values() for row in requests_of(text))
    cdef = "\n".join(map(cdef_of, texts.values()))
    includes = "".join(f'#include "{path}"\n' for path in texts)
    return f"{cdef}\n{table_cdef}", includes + table


def write_module(module: Callable[[], FFI], path: Path, key: str) -> Path:
    """Let cffi write a module's C source, unless it wrote it from the same input before."""
    stamp = path.with_name(path.name + ".key")
    if not (path.exists() and stamp.exists() and stamp.read_text() == key):
        module().emit_c_code(str(path))
        stamp.write_text(key)
    return path


def build_native(tree: Tree, *, unfinished: bool) -> Path:
    """Build the module ``pykvm.abi._native``: ``ffi`` and ``lib``; also when the core is unfinished."""
    from cffi import FFI  # noqa: PLC0415  only a build needs the parser

    sources = sorted(path for folder in ("abi", "cpu") for path in (tree.root / "pykvm" / folder).glob("*.c"))
    core = tree.objects(sources, [*tree.variant.cflags, *tree.includes])
    cdef, preamble = native_cdef(tree)

    def module() -> FFI:
        ffi = FFI()
        ffi.cdef(cdef)
        ffi.set_source("pykvm.abi._native", preamble)
        return ffi

    generated = write_module(module, tree.scratch / "_native.c", f"{cdef}\n{preamble}")
    glue = tree.object(generated, tree.generated_flags())
    objects = [glue, *core]
    if missing := undefined_symbols(tree, objects):
        if not unfinished:
            raise BuildError(f"not defined anywhere: {' '.join(missing)}")
        objects.append(placeholders(tree, missing))
    linked = tree.link(f"_native{EXT_SUFFIX}", objects, ["-lm"])
    if tree.variant.in_place:
        write_stub(tree.root, linked)
    return tree.install(linked, "pykvm/abi")


def libpython_flags() -> list[str] | None:
    """Return the flags to link with this Python's shared library; None when it has none."""
    if not sysconfig.get_config_var("Py_ENABLE_SHARED"):
        return None
    directory = sysconfig.get_config_var("LIBDIR")
    version = sysconfig.get_config_var("LDVERSION")
    return [f"-L{directory}", f"-Wl,-rpath,{directory}", f"-lpython{version}"]


def constant_of(path: Path, name: str) -> str:
    """Return a string constant of a Python file without importing it."""
    for node in ast.parse(path.read_text()).body:
        match node:
            case ast.Assign([ast.Name(id=target)], ast.Constant(str(value))) if target == name:
                return value
    msg = f"{path}: no string constant {name}"
    raise BuildError(msg)


def build_preload(tree: Tree) -> list[Path]:
    """Build ``libpykvm-preload.so`` and ``libpykvm-embed.so`` when there is a shared libpython.

    The first is ``preload/shim.c`` alone, and needs no Python; it loads the second, which is
    ``preload/start.c`` and a cffi embedding.  ``preload/embed.py`` says what is embedded in two string
    constants: EMBEDDING_API, the C prototypes that Python implements, and EMBEDDING_INIT, the code
    that the library runs when the first of them is called.
    """
    from cffi import FFI  # noqa: PLC0415

    folder = tree.root / "pykvm" / "preload"
    shim, start, embed = folder / "shim.c", folder / "start.c", folder / "embed.py"
    if not (shim.exists() and start.exists() and embed.exists()):
        return []
    python = libpython_flags()
    if python is None:
        print("pykvm: note: no shared libpython, so no preload library", file=sys.stderr)
        return []
    api, init = constant_of(embed, "EMBEDDING_API"), constant_of(embed, "EMBEDDING_INIT")
    preamble = '#include "embed.h"\n'

    def module() -> FFI:
        ffi = FFI()
        ffi.embedding_api(api)
        ffi.set_source("_pykvm_preload", preamble)
        ffi.embedding_init_code(init)
        return ffi

    generated = write_module(module, tree.scratch / "_pykvm_preload.c", f"{api}\n{init}\n{preamble}")
    includes = [*tree.includes, f"-I{folder}"]
    python_include = f"-I{sysconfig.get_path('include')}"
    shim_object = tree.object(shim, [*tree.variant.cflags, *includes])
    embed_objects = [
        tree.object(start, [*tree.variant.cflags, *includes, python_include]),
        tree.object(generated, [*tree.generated_flags(), f"-I{folder}"]),
    ]
    libraries = [
        tree.link("libpykvm-preload.so", [shim_object], ["-ldl"]),
        tree.link("libpykvm-embed.so", embed_objects, [*python, "-ldl"]),
    ]
    return [tree.install(library, "pykvm/preload") for library in libraries]


def build_guests(tree: Tree) -> list[Path]:
    """Assemble and link every ``pykvm/guest/NAME.S``.

    NAME.ld beside it is the linker script; one that says OUTPUT_FORMAT(binary) makes the flat image
    NAME.bin, any other NAME.elf.  Without a script the code starts at address 0.
    """
    images = []
    for source in sorted((tree.root / "pykvm" / "guest").glob("*.S")):
        script = source.with_suffix(".ld")
        flat = script.exists() and "OUTPUT_FORMAT(binary)" in script.read_text()
        target = tree.scratch / (source.stem + (".bin" if flat else ".elf"))
        layout = f"-Wl,-T,{script}" if script.exists() else "-Wl,-Ttext=0"
        linking = ["-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", "-Wl,-z,noexecstack", layout]
        depending = ["-MMD", "-MF", f"{target}.d", "-MT", str(target)]
        command = [*cc(), *linking, *depending, *tree.includes, "-o", str(target), str(source)]
        make(target, command, [source, script] if script.exists() else [source])
        images.append(tree.install(target, "pykvm/guest"))
    return images


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep two builds of the same tree from meeting."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(root: Path, variant: Variant, *, unfinished: bool = True) -> list[Path]:
    """Build everything; return the files that belong into the package."""
    tree = Tree(root, variant)
    with locked(tree.scratch / ".lock"):
        return [build_native(tree, unfinished=unfinished), *build_preload(tree), *build_guests(tree)]


# ---- the type stub ---------------------------------------------------------------------------------


def write_stub(root: Path, module: Path) -> None:
    """Write ``_native.pyi`` anew when the module's names changed; it is checked in.

    This is also the first time that the module is loaded: one that cannot be (an undefined symbol)
    is not installed, the one before it stays.
    """
    stub = root / "pykvm" / "abi" / "_native.pyi"
    text = run([sys.executable, str(root / "pykvm" / "abi" / "_stub.py"), str(module)])
    if not stub.exists() or stub.read_text() != text:
        stub.write_text(text)


def main() -> int:
    """Build in place, for ``python -m pykvm.abi._build``."""
    root = source_root()
    try:
        variant = chosen_variant()
        for path in build(root, variant):
            print(path.relative_to(root))
    except BuildError as error:
        print(f"pykvm: {error}", file=sys.stderr)
        return 1
    return 0


# ---- the hatchling hook ----------------------------------------------------------------------------

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # hatchling is a build dependency, not ours
    pass
else:

    class NativeBuildHook(BuildHookInterface[Any]):
        """Build for a wheel or an editable install, and name what belongs into it."""

        PLUGIN_NAME = "custom"

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            """Compile; ``version`` is "standard" or "editable"."""
            if self.target_name != "wheel":
                return
            root = Path(self.root)
            built = build(root, chosen_variant(), unfinished=version != "standard")
            build_data["pure_python"] = False
            build_data["infer_tag"] = True
            build_data["artifacts"] += [f"/{path.relative_to(root)}" for path in built]
            if version == "standard":
                build_data["force_include"][str(root / "include")] = "pykvm/include"


if __name__ == "__main__":
    sys.exit(main())
