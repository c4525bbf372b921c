"""Links a library for an older glibc than the one that it is built with, as wheels for many systems must be.

A program names the version of each C function that it uses. The linker takes the newest that it finds, so that a
library linked on a new system asks for ``exp`` of glibc 2.29 or ``pthread_create`` of 2.34, and loads on no older one,
although both have been there since 2.2.5 and new systems keep the old versions. So it is linked with stubs instead:
shared libraries without code, that have the C library's names and offer what it offered then, in the versions of then.
A function that the older one lacks is undefined to the linker, which names it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "FASTATTN_GLIBC"

# Before 2.34 these functions had libraries of their own, whose names still exist.
MOVED_IN = (2, 34)
FORMER_LIBRARIES = {
    "libpthread.so.0": re.compile(r"(__)?pthread_|sem_"),
    "libdl.so.2": re.compile(r"dl[a-z]"),
    "librt.so.1": re.compile(r"shm_|aio_|lio_|mq_|timer_"),
}

Version = tuple[int, ...]


def parse_version(text: str) -> Version:
    """The version in "2.28" or "GLIBC_2.2.5"."""
    return tuple(int(number) for number in text.removeprefix("GLIBC_").split("."))


@dataclass(frozen=True)
class Symbol:
    """A function or a variable of the C library."""

    name: str
    version: Version  # the one to link with
    newest: Version  # the one that the library at hand would give
    kind: str  # FUNC | OBJECT | IFUNC
    size: int


def symbols_of(listing: str, target: Version) -> list[Symbol]:
    """Of ``readelf --dyn-syms`` of a C library: what could be linked with under glibc ``target``."""
    row = r"^ *\d+: \w+ +(\w+) (FUNC|OBJECT|IFUNC) +\w+ +\w+ +\d+ (\w+)@(@?)GLIBC_([0-9.]+)(?: |$)"
    found: dict[str, list[tuple[bool, Version, str, int]]] = {}
    for size, kind, name, default, version in re.findall(row, listing, re.MULTILINE):
        found.setdefault(name, []).append((bool(default), parse_version(version), kind, int(size, 0)))
    chosen = []
    for name, versions in found.items():
        newest = next((version for is_default, version, _, _ in versions if is_default), None)
        usable = [(version, kind, size) for _, version, kind, size in versions if version <= target]
        # One without a default is there for old programs alone.
        if newest is not None and usable:
            version, kind, size = max(usable)
            chosen.append(Symbol(name, version, newest, kind, size))
    return chosen


def library_of(symbol: Symbol, library: str, target: Version) -> str:
    """Where a glibc of version ``target`` has what is in ``library`` today."""
    if target < MOVED_IN <= symbol.newest and library == "libc.so.6":
        for former, pattern in FORMER_LIBRARIES.items():
            if pattern.match(symbol.name):
                return former
    return library


def make_stubs(compiler: list[str], target_text: str, folder: Path) -> list[str]:
    """Write the stubs for glibc ``target`` ("2.28") into ``folder``; returns what to link with, before all else."""
    if not re.fullmatch(r"2\.\d+", target_text):
        raise SystemExit(f"fastattn: {VARIABLE} is {target_text!r}; it must be a version of glibc, such as 2.28.")
    target = parse_version(target_text)
    content: dict[str, list[Symbol]] = {}
    for library in ("libc.so.6", "libm.so.6"):
        path = _run([*compiler, f"-print-file-name={library}"]).strip()
        for symbol in symbols_of(_run(["readelf", "--dyn-syms", "--wide", path]), target):
            content.setdefault(library_of(symbol, library, target), []).append(symbol)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return ["-Wl,--as-needed", *(str(_make_stub(compiler, folder / name, content[name])) for name in content)]


def _make_stub(compiler: list[str], stub: Path, symbols: list[Symbol]) -> Path:
    source, script = stub.with_name(stub.name + ".s"), stub.with_name(stub.name + ".map")
    lines = [".data"]
    for symbol in symbols:
        kind = "object" if symbol.kind == "OBJECT" else "function"
        lines += [f".globl {symbol.name}", f".type {symbol.name}, %{kind}", f".size {symbol.name}, {symbol.size}"]
        lines += [f"{symbol.name}:", *([f".zero {symbol.size}"] if kind == "object" else [])]
    source.write_text("\n".join([*lines, '.section .note.GNU-stack, "", %progbits', ""]), encoding="utf-8")
    nodes = [
        "GLIBC_{} {{ {} }};\n".format(
            ".".join(map(str, version)), " ".join(f"{symbol.name};" for symbol in symbols if symbol.version == version)
        )
        for version in sorted({symbol.version for symbol in symbols})
    ]
    script.write_text("".join(nodes), encoding="utf-8")
    link = ["-shared", "-nostdlib", f"-Wl,-soname,{stub.name}", f"-Wl,--version-script,{script}"]
    _run([*compiler, *link, str(source), "-o", str(stub)])
    return stub


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", None) or error
        raise SystemExit(f"fastattn: {VARIABLE} asks for stubs of glibc, but {command[0]} failed: {detail}") from None
