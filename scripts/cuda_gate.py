"""The compile gate of the CUDA kernels: what ptxas made of each, held against the table in docs/cuda-resources.md.

    make cuda-gate                     after a build: fails on what is listed below
    scripts/cuda_gate.py --update      accepts what the build has, by writing the table anew

FASTATTN_CUDA_ARCHS says which architectures, as it did for the build; without it, all that setup.py compiles for.
Fails on: a warning; a spill; a kernel that takes more registers or more stack than the table says, or that the table
does not have, or that is missing; a build that lacks an architecture; a library that takes more than
60 MB of a wheel, or compilers that kept two cores busy for more than ten minutes, by the clock. Where CUDA's
disassembler is installed (`pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`) it also looks into the machine
code: tensor core products, matrix loads and asynchronous copies in every kernel that works on tiles, local memory in
none, and no instruction of a whole warp where some of its lanes may be elsewhere.

No GPU is needed. Without nvcc there is nothing to check, and it says so.
"""

from __future__ import annotations

import argparse
import heapq
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import cuda_build
from cuda_listing import COLLECTIVE, LOCAL, WANTED, Listing, find_disassembler, read_listing

ROOT = cuda_build.ROOT
TABLE = ROOT / "docs" / "cuda-resources.md"
LIBRARY = ROOT / "fastattn" / "_C_cuda.so"
HEADERS = ROOT / "csrc" / "cuda"

ARCHS = tuple(int(arch) for arch in cuda_build.DEFAULT_ARCHS.split(";"))
MAX_COMPRESSED_BYTES = 60_000_000
MAX_BUILD_S, BUILD_CORES = 600, 2
DTYPES = {0: "fp32", 1: "bf16", 2: "fp16", 3: "fp64"}  # csrc/core/params.h: DType


class Trouble(Exception):
    """The gate cannot do its work; the text says why."""


# ------------------------------------------------------------------------------------------------- what ptxas says


@dataclass(frozen=True)
class Usage:
    """What one kernel takes on one architecture."""

    registers: int
    stack: int = 0  # bytes for each thread, like the two below
    spill_stores: int = 0
    spill_loads: int = 0
    static_shared: int = 0

    @property
    def spills(self) -> bool:
        return bool(self.spill_stores or self.spill_loads)

    def __str__(self) -> str:
        stack = f" +{self.stack} stack" if self.stack else ""
        return f"{self.registers}{stack}" + (f" +{self.spill_stores}/{self.spill_loads} spilt" if self.spills else "")

    @staticmethod
    def parse(text: str) -> Usage:
        found = re.fullmatch(r"(\d+)(?: \+(\d+) stack)?(?: \+(\d+)/(\d+) spilt)?", text)
        if found is None:
            raise Trouble(f"{text!r} is no entry of the table: {TABLE.name} has been edited by hand?")
        return Usage(*(int(group or 0) for group in found.groups()))


@dataclass
class Log:
    usages: dict[tuple[str, int], Usage] = field(default_factory=dict)  # by mangled name and architecture
    warnings: list[str] = field(default_factory=list)
    spilling_functions: list[str] = field(default_factory=list)  # that are not kernels: called, not inlined


_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)[a-z]?'")
_PROPERTIES = re.compile(r"Function properties for (\S+)")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def parse_log(text: str) -> Log:
    """What `nvcc -Xptxas -v` printed. A kernel that several files instantiate counts with the most it takes."""
    log = Log()
    entry: tuple[str, int] | None = None
    function = ""
    stack = (0, 0, 0)
    for line in text.splitlines():
        if re.search(r"\bwarning\b", line, re.IGNORECASE):
            log.warnings.append(line.strip())
        elif found := _ENTRY.search(line):
            entry, stack = (found[1], int(found[2])), (0, 0, 0)
        elif found := _PROPERTIES.search(line):
            function = found[1]
        elif found := _STACK.search(line):
            frame, stores, loads = (int(number) for number in found.groups())
            if entry is not None and function == entry[0]:
                stack = (frame, stores, loads)
            elif stores or loads:
                log.spilling_functions.append(function)
        elif (found := _USED.search(line)) and entry is not None:
            shared = _SHARED.search(line)
            usage = Usage(int(found[1]), *stack, int(shared[1]) if shared else 0)
            before = log.usages.get(entry)
            log.usages[entry] = usage if before is None else _most(usage, before)
            entry = None
    return log


def _most(a: Usage, b: Usage) -> Usage:
    return Usage(*(max(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True)))


# ---------------------------------------------------------------------------------------------------- kernels' names


@dataclass(frozen=True)
class Constants:
    """What a kernel says of itself; see any of csrc/cuda/*.cuh."""

    name: str
    threads: int
    min_blocks: int
    shared: int  # dynamic
    block_m: int = 0  # 0: it has no tiles
    block_n: int = 0


@dataclass(frozen=True)
class Kernel:
    label: str  # "attention_forward bf16 D128 128x64 plain"
    constants: Constants

    @property
    def has_tiles(self) -> bool:
        return self.constants.block_m > 0


def demangle(names: Iterable[str]) -> dict[str, str]:
    names = list(names)
    tool = shutil.which("c++filt")
    if tool is None:
        raise Trouble("c++filt is missing; it comes with binutils")
    done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, done.stdout.splitlines(), strict=True))


def kernel_type(signature: str) -> str:
    """The kernel's struct, from its entry function: "void f::kernel_entry<f::Kernel<1> >(...)" -> "f::Kernel<1>"."""
    start = signature.find("<")
    if start < 0:
        raise Trouble(f"{signature} is no kernel_entry<Kernel>: csrc/cuda/launcher.cuh has changed")
    depth = 0
    for position in range(start, len(signature)):
        depth += {"<": 1, ">": -1}.get(signature[position], 0)
        if depth == 0:
            return signature[start + 1 : position].strip()
    raise Trouble(f"{signature} has unbalanced brackets")


def template_parameters(headers: Iterable[str]) -> dict[str, list[tuple[str, str, str | None]]]:
    """Type, name and default of the template parameters of every struct ...Kernel in the texts of some headers."""
    found: dict[str, list[tuple[str, str, str | None]]] = {}
    for text in headers:
        for match in re.finditer(r"(?:template <([^;{}]*)>\n)?struct (\w*Kernel)(?: : [^;{}]*)? {", text):
            parameters = []
            for parameter in (match[1] or "").split(","):
                if named := re.fullmatch(r"\s*(\w+) (\w+?)_?(?: = (\w+))?\s*", parameter):
                    parameters.append((named[1], named[2], named[3]))
            found[match[2]] = parameters
    return found


def describe(type_name: str, constants: Constants, parameters: Mapping[str, list[tuple[str, str, str | None]]]) -> str:
    """A kernel in a reader's words: its name, dtype, head dim, tile, and the variants that it is one of."""
    name, _, rest = type_name.partition("<")
    arguments = [argument.strip() for argument in rest.rstrip("> ").split(",")] if rest else []
    words = [constants.name]
    tile = f"{constants.block_m}x{constants.block_n}" if constants.block_m else ""
    declared = parameters.get(name.rpartition("::")[2], [])
    variants = []
    for argument, (kind, parameter, default) in zip(arguments, declared, strict=False):
        if kind == "DType":
            words.append(DTYPES[int(argument.rpartition(")")[2])])
        elif parameter == "kDim":
            words.append(f"D{argument}")
        elif parameter == "kModified":
            variants.append("modified" if argument == "true" else "plain")
        elif kind == "bool" and argument != default and not parameter.startswith("kWants"):  # those are in the name
            variants.append(("" if argument == "true" else "not ") + parameter.removeprefix("k").lower())
    return " ".join([*words, *([tile] if tile else []), *variants])


_PROBE = """#include <cstdio>
{includes}
template <class K>
void say() {{
  int block_m = 0, block_n = 0;
  if constexpr (requires {{ K::kBlockM; K::kBlockN; }}) {{
    block_m = K::kBlockM;
    block_n = K::kBlockN;
  }}
  std::printf("%s %d %d %d %d %d\\n", K::kName, K::kThreads, K::kMinBlocks, K::kSharedBytes, block_m, block_n);
}}
int main() {{
{calls}
}}
"""


def read_constants(types: list[str], toolkit: cuda_build.Toolkit) -> list[Constants]:
    """The constants of the kernels' structs, by a program that prints them: it runs on the host."""
    headers = [
        path
        for path in sorted(HEADERS.glob("*.cuh"))
        if re.search(r"struct \w*Kernel(?: : [^;{}]*)? {", path.read_text())
    ]
    source = _PROBE.format(
        includes="\n".join(f'#include "cuda/{path.name}"' for path in headers),
        calls="\n".join(f"  say<{name}>();" for name in types),
    )
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe"
        probe.with_suffix(".cu").write_text(source, encoding="utf-8")
        arch = f"-arch=sm_{cuda_build.VIRTUAL_ARCH}"
        command = [
            toolkit.nvcc,
            "-std=c++20",
            "-O0",
            arch,
            "-w",
            f"-I{ROOT / 'csrc'}",
            *cuda_build.host_compiler_flags(),
        ]
        command += [str(probe.with_suffix(".cu")), "-o", str(probe)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise Trouble(f"the kernels' constants could not be read:\n{done.stdout}{done.stderr}")
        lines = subprocess.run([str(probe)], capture_output=True, text=True, check=True).stdout.splitlines()
    return [Constants(name, *map(int, numbers)) for name, *numbers in (line.split() for line in lines)]


def identify(names: Iterable[str], toolkit: cuda_build.Toolkit) -> dict[str, Kernel]:
    """Kernels by mangled name."""
    signatures = demangle(sorted(set(names)))
    types = {mangled: kernel_type(signature) for mangled, signature in signatures.items()}
    distinct = sorted(set(types.values()))
    constants = dict(zip(distinct, read_constants(distinct, toolkit), strict=True))
    parameters = template_parameters(path.read_text(encoding="utf-8") for path in sorted(HEADERS.glob("*.cuh")))
    labels = {name: describe(name, constants[name], parameters) for name in distinct}
    shared_labels = {label for label, count in Counter(labels.values()).items() if count > 1}
    return {
        mangled: Kernel(f"{labels[name]} ({name})" if labels[name] in shared_labels else labels[name], constants[name])
        for mangled, name in types.items()
    }


# --------------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Entry:
    """A row of the table."""

    threads: int
    min_blocks: int
    shared: int  # static and dynamic
    usages: tuple[Usage, ...]  # in the order of the table's archs


@dataclass(frozen=True)
class Table:
    toolkit: str  # "13.0"
    entries: dict[str, Entry]
    archs: tuple[int, ...] = ARCHS

    def usage(self, label: str, arch: int) -> Usage:
        return self.entries[label].usages[self.archs.index(arch)]


def make_table(log: Log, kernels: Mapping[str, Kernel], toolkit: str, archs: tuple[int, ...] = ARCHS) -> Table:
    entries = {}
    for mangled, kernel in kernels.items():
        if missing := [arch for arch in archs if (mangled, arch) not in log.usages]:
            raise Trouble(
                f"{kernel.label} was not compiled for {listed(missing)}: build without {cuda_build.ARCHS_VARIABLE}, or"
                " check with what it was for the build"
            )
        usages = tuple(log.usages[mangled, arch] for arch in archs)
        constants = kernel.constants
        shared = constants.shared + max(usage.static_shared for usage in usages)
        entries[kernel.label] = Entry(constants.threads, constants.min_blocks, shared, usages)
    return Table(toolkit, entries, archs)


_HEAD = """# What the CUDA kernels take

Registers of each kernel on each architecture, as ptxas of CUDA {toolkit} allots them; `+16 stack` adds bytes of stack
for each thread, where a kernel has any. CTAs: how many of them the kernel asks to fit on a multiprocessor at once (its
launch bounds). Shared: bytes of shared memory for each CTA, at most.

`make cuda-gate` fails where a build takes more than this table says. It is written by `scripts/cuda_gate.py --update`,
which is how a change is accepted.

"""
_COLUMNS = ["kernel", "threads", "CTAs", "shared", *(f"sm_{arch}" for arch in ARCHS)]


def natural_order(label: str) -> list[tuple[int, str]]:
    """Sorts D64 before D128."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", label)]


def format_table(table: Table) -> str:
    lines = [
        "| " + " | ".join(_COLUMNS) + " |",
        "| --- |" + " ---: |" * (len(_COLUMNS) - 1),
    ]
    for label in sorted(table.entries, key=natural_order):
        entry = table.entries[label]
        numbers = map(str, (entry.threads, entry.min_blocks, entry.shared, *entry.usages))
        lines.append(f"| {label} | " + " | ".join(numbers) + " |")
    return _HEAD.format(toolkit=table.toolkit) + "\n".join(lines) + "\n"


def parse_table(text: str) -> Table:
    toolkit = re.search(r"ptxas of CUDA (\d+\.\d+)", text)
    if toolkit is None:
        raise Trouble(f"{TABLE.name} does not say of which CUDA it is; write it anew with --update")
    entries = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|") or cells[0] in ("kernel", "---"):
            continue
        if len(cells) != len(_COLUMNS):
            raise Trouble(f"{TABLE.name} has a row of {len(cells)} cells, not {len(_COLUMNS)}: {line}")
        label, threads, min_blocks, shared, *usages = cells
        entries[label] = Entry(int(threads), int(min_blocks), int(shared), tuple(map(Usage.parse, usages)))
    return Table(toolkit[1], entries)


@dataclass
class Findings:
    failures: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def find_faults(log: Log, built: Table) -> list[str]:
    """What no table can excuse."""
    faults = [f"warning: {warning}" for warning in dict.fromkeys(log.warnings)]
    faults += [
        f"{function}, which a kernel calls, spills registers" for function in dict.fromkeys(log.spilling_functions)
    ]
    for label, entry in built.entries.items():
        for arch, usage in zip(built.archs, entry.usages, strict=True):
            if usage.spills:
                stores, loads = usage.spill_stores, usage.spill_loads
                faults.append(f"{label} spills on sm_{arch}: {stores} bytes of stores, {loads} bytes of loads")
    return faults


def compare(built: Table, kept: Table) -> Findings:
    findings = Findings()
    # Another ptxas allots registers otherwise, which says nothing of the sources.
    is_same_toolkit = built.toolkit == kept.toolkit
    growth = findings.failures if is_same_toolkit else findings.remarks
    if not is_same_toolkit:
        findings.remarks.append(
            f"the table is of CUDA {kept.toolkit}, the build of {built.toolkit}: growth does not fail"
        )
    for label in sorted(set(built.entries) - set(kept.entries), key=natural_order):
        findings.failures.append(f"{label} is not in the table")
    for label in sorted(set(kept.entries) - set(built.entries), key=natural_order):
        findings.failures.append(f"{label} is in the table, but was not built")
    for label in sorted(set(kept.entries) & set(built.entries), key=natural_order):
        now, before = built.entries[label], kept.entries[label]
        if (now.threads, now.min_blocks, now.shared) != (before.threads, before.min_blocks, before.shared):
            findings.failures.append(
                f"{label} has {now.threads} threads, {now.min_blocks} CTAs and {now.shared} bytes of shared memory; the"
                f" table says {before.threads}, {before.min_blocks} and {before.shared}"
            )
        for arch in built.archs:
            usage, limit = built.usage(label, arch), kept.usage(label, arch)
            if usage.registers > limit.registers:
                growth.append(f"{label} takes {usage.registers} registers on sm_{arch}, {limit.registers} before")
            if usage.stack > limit.stack:
                findings.failures.append(
                    f"{label} takes {usage.stack} bytes of stack on sm_{arch}, {limit.stack} before"
                )
            if (usage.registers, usage.stack) < (limit.registers, limit.stack) and is_same_toolkit:
                findings.remarks.append(
                    f"{label} takes less on sm_{arch}: {usage}, before {limit}; --update records it"
                )
    return findings


# -------------------------------------------------------------------------------------------- the library as a whole


def compressed_bytes(path: Path) -> int:
    """What the file takes in a wheel."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    with path.open("rb") as file:
        size = sum(len(deflate.compress(block)) for block in iter(lambda: file.read(1 << 20), b""))
    return size + len(deflate.flush())


def read_ninja_log(text: str) -> dict[str, float]:
    """Seconds that each output took when it was last made. Outputs that are gone were other sources'."""
    seconds = {}
    for line in text.splitlines():
        cells = line.split("\t")
        if not line.startswith("#") and len(cells) >= 4 and Path(cells[3]).exists():
            seconds[cells[3]] = (int(cells[1]) - int(cells[0])) / 1000
    return seconds


def build_seconds(seconds: Iterable[float], cores: int) -> float:
    """How long a build of everything takes when that many compilers run at a time, each given the next source."""
    busy = [0.0] * cores
    for duration in seconds:
        heapq.heappush(busy, heapq.heappop(busy) + duration)
    return max(busy)


def newer_source() -> str:
    """A source that is newer than the log, or ""."""
    made = cuda_build.LOG.stat().st_mtime
    sources = [*(ROOT / "csrc").glob("core/*"), *(ROOT / "csrc").glob("cuda/*"), Path(cuda_build.__file__)]
    return next((str(path.relative_to(ROOT)) for path in sorted(sources) if path.stat().st_mtime > made), "")


# -------------------------------------------------------------------------------------------------- the machine code


def find_listing_faults(
    listings: Mapping[str, Listing], kernels: Mapping[str, Kernel], table: Table, arch: int
) -> list[str]:
    """Local memory is no fault of its own where the table has a stack."""
    missing = [kernel for name, kernel in kernels.items() if name not in listings]
    faults = [f"{kernel.label} has no machine code for sm_{arch}" for kernel in missing]
    for mangled, listing in listings.items():
        here = listing.counts
        kernel = kernels.get(mangled)
        label = kernel.label if kernel else mangled
        if label not in table.entries or not table.usage(label, arch).stack:
            found = {name: here[name] for name in LOCAL if here[name]}
            faults += [f"{label} has {count} {LOCAL[name]} ({name}) on sm_{arch}" for name, count in found.items()]
        if kernel and kernel.has_tiles:
            faults += [
                f"{label} has no {what} ({name}) on sm_{arch}" for name, what in WANTED.items() if not here[name]
            ]
        for places, where in ((listing.predicated, "under a predicate"), (listing.parted, "where lanes have parted")):
            found = {name: places[name] for name in COLLECTIVE if places[name]}
            faults += [f"{label} has {count} {name} {where} on sm_{arch}" for name, count in found.items()]
    return sorted(faults)


# ----------------------------------------------------------------------------------------------------------- the gate


def check(*, update: bool) -> Iterator[tuple[str, str]]:
    """Pairs of a verdict ("ok", "note" or "FAIL") and a sentence."""
    toolkit = cuda_build.find_toolkit()
    version = "{}.{}".format(*toolkit.version)
    for path in (cuda_build.LOG, LIBRARY):
        if not path.exists():
            raise Trouble(f"{path.relative_to(ROOT)} is missing: make build")
    if newer := newer_source():
        raise Trouble(f"{newer} is newer than the build: make build")

    log = parse_log(cuda_build.LOG.read_text(encoding="utf-8"))
    if not log.usages:
        raise Trouble(f"{cuda_build.LOG.relative_to(ROOT)} names no kernel")
    archs = chosen_architectures()
    kernels = identify((mangled for mangled, _ in log.usages), toolkit)
    built = make_table(log, kernels, version, archs)
    faults = find_faults(log, built)
    yield from (("FAIL", fault) for fault in faults)
    left_out = [arch for arch in ARCHS if arch not in archs]
    if left_out:
        yield "note", f"{listed(left_out)} not looked at: {cuda_build.ARCHS_VARIABLE} leaves them out"
    if update and left_out:
        raise Trouble(f"the table has {listed(ARCHS)}: --update needs a build for all of them")
    if update:
        TABLE.write_text(format_table(built), encoding="utf-8")
        yield "ok", f"{TABLE.relative_to(ROOT)} written: {len(built.entries)} kernels"
    elif not TABLE.exists():
        yield "FAIL", f"{TABLE.relative_to(ROOT)} is missing: scripts/cuda_gate.py --update"
    else:
        findings = compare(built, parse_table(TABLE.read_text(encoding="utf-8")))
        yield from (("note", remark) for remark in findings.remarks)
        yield from (("FAIL", failure) for failure in findings.failures)
        if findings.failures:
            yield "note", "if that is meant: scripts/cuda_gate.py --update, and say why in the commit"
        elif not faults:
            yield "ok", f"{len(built.entries)} kernels for {listed(archs)}: no warnings, no spills, no growth"

    share = len(archs) / len(ARCHS)
    size, most = compressed_bytes(LIBRARY), MAX_COMPRESSED_BYTES * share
    yield "ok" if size <= most else "FAIL", f"{LIBRARY.name} takes {size / 1e6:.1f} MB of a wheel, of {most / 1e6:.0f}"

    ninja_log = cuda_build.BUILD / ".ninja_log"
    if ninja_log.exists():
        durations = read_ninja_log(ninja_log.read_text(encoding="utf-8")).values()
        needed = build_seconds(durations, BUILD_CORES)
        # nvcc's front end runs once for all of them, and takes about as long as the assembler for one.
        limit = MAX_BUILD_S * (1 + len(archs)) / (1 + len(ARCHS))
        sentence = f"a build of it all takes {needed:.0f} s with {BUILD_CORES} compilers at a time, of {limit:.0f}"
        if needed <= limit:
            yield "ok", sentence
        else:
            yield "FAIL", f"{sentence}, by the clock: if the machine was busy meanwhile, build again"

    environment = find_disassembler()
    if environment is None:
        yield (
            "note",
            "machine code not looked at: no cuobjdump and nvdisasm (nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm)",
        )
        return
    before = len(faults)
    for arch in archs:
        try:
            listings = read_listing(LIBRARY, arch, environment)
        except RuntimeError as failure:
            raise Trouble(str(failure)) from None
        faults += find_listing_faults(listings, kernels, built, arch)
    yield from (("FAIL", fault) for fault in faults[before:])
    if len(faults) == before:
        yield (
            "ok",
            f"machine code: {', '.join(WANTED)} in every kernel with tiles, no {', no '.join(LOCAL)};"
            f" {', '.join(COLLECTIVE)} by whole warps",
        )


def chosen_architectures() -> tuple[int, ...]:
    """What the build was told to compile for, and this as well."""
    archs = cuda_build.architectures()
    if unknown := [arch for arch in archs if arch not in ARCHS]:
        raise Trouble(f"the table has {listed(ARCHS)}, and {cuda_build.ARCHS_VARIABLE} asks for {listed(unknown)}")
    return archs


def listed(archs: Iterable[int]) -> str:
    return ", ".join(f"sm_{arch}" for arch in archs)


def reason_to_skip() -> str:
    if os.environ.get("FASTATTN_CUDA", "auto").lower() == "0":
        return "FASTATTN_CUDA=0"
    try:
        cuda_build.find_toolkit()
    except cuda_build.Missing as missing:
        return str(missing)
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--update", action="store_true", help="write the table anew from the build")
    options = parser.parse_args()
    if reason := reason_to_skip():
        print(f"cuda-gate: skipped, the CUDA kernels are not built here: {reason}")
        return 0
    failed = False
    try:
        for verdict, sentence in check(update=options.update):
            failed = failed or verdict == "FAIL"
            print(f"cuda-gate: {'' if verdict == 'ok' else verdict + ': '}{sentence}", flush=True)
    except Trouble as trouble:
        print(f"cuda-gate: FAIL: {trouble}")
        return 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
