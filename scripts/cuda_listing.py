"""The machine code of CUDA kernels, as CUDA's disassembler lists it: what of interest a kernel has in it, and where."""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

WANTED = {"HMMA": "tensor core products", "LDSM": "matrix loads", "LDGSTS": "asynchronous copies"}
LOCAL = {"LDL": "loads from local memory", "STL": "stores to local memory"}
# All lanes of a warp together, or what they give is undefined: the products, the loads, shuffles and barriers.
COLLECTIVE = ("HMMA", "LDSM", "SHFL", "BAR")

_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]+)\*/\s+(?:@(!?\w+)\s+)?([A-Z0-9]+)(.*)")
# Jumps that each lane takes for itself: under a predicate of its own, or to an address of its own.
_JUMPS, _INDEXED_JUMPS = ("BRA", "BRX", "CALL", "EXIT", "JMP", "JMX", "RET"), ("BRX", "JMX")
_TARGET = re.compile(r"0x([0-9a-f]+) ;")


@dataclass
class Listing:
    """How often what is looked for occurs in a kernel's machine code."""

    counts: Counter[str] = field(default_factory=Counter)  # of WANTED and LOCAL
    # Of COLLECTIVE: those under a predicate of each lane's own, and those between the place where lanes may part and
    # the one where they meet again. BSSY names the latter and comes first: ptxas moves it up, also between instructions
    # of a whole warp, and lanes part at the first jump after it that not all of them may take. Code that was moved out
    # of between is not seen.
    predicated: Counter[str] = field(default_factory=Counter)
    parted: Counter[str] = field(default_factory=Counter)


def parse_listing(lines: Iterable[str]) -> dict[str, Listing]:
    """By function, what `cuobjdump -sass` prints."""
    listings: dict[str, Listing] = {}
    here, announced, meeting = Listing(), 0, 0
    for line in lines:
        if "Function :" in line:
            here, announced, meeting = listings.setdefault(line.split(":", 1)[1].strip(), Listing()), 0, 0
        elif found := _INSTRUCTION.match(line):
            address, predicate, name, rest = int(found[1], 16), found[2] or "PT", found[3], found[4]
            if name in WANTED or name in LOCAL:
                here.counts[name] += 1
            is_lanes_own = re.fullmatch(r"!?P\d+", predicate) is not None  # UP0 is the whole warp's
            if name in COLLECTIVE:
                here.predicated[name] += is_lanes_own
                here.parted[name] += address < meeting
            elif name == "BSSY" and (target := _TARGET.search(rest)):
                announced = max(announced, int(target[1], 16))
            elif name in _INDEXED_JUMPS or (name in _JUMPS and is_lanes_own):
                meeting = max(meeting, announced)
    return listings


def find_disassembler() -> dict[str, str] | None:
    """The environment in which cuobjdump finds nvdisasm; None where either is missing. On PATH, or PyPI's packages."""
    folders = [os.environ.get("PATH", "")]
    roots = {*site.getsitepackages(), site.getusersitepackages()}
    folders += [str(path) for root in sorted(roots) for path in sorted(Path(root).glob("nvidia/*/bin"))]
    path = os.pathsep.join(folders)
    if not all(shutil.which(tool, path=path) for tool in ("cuobjdump", "nvdisasm")):
        return None
    return {**os.environ, "PATH": path}


def read_listing(library: Path, arch: int, environment: dict[str, str]) -> dict[str, Listing]:
    """Of a library's kernels for one architecture; RuntimeError where cuobjdump fails."""
    tool = shutil.which("cuobjdump", path=environment["PATH"])
    command = [str(tool), "-sass", "-arch", f"sm_{arch}", str(library)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, errors="replace") as process:
        assert process.stdout is not None
        listings = parse_listing(process.stdout)
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed with exit status {process.returncode}")
    return listings
