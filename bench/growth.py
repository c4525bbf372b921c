"""How time and memory of the textbook attentions grow with the length, ours beside plain code.

Each point is a fresh process: inputs in place, the high-water mark of its resident memory is reset, one training step
runs (forward and backward; a summary has no backward), and what the mark has grown by, less the results, is the extra
memory. Then the step is timed. The unit is one float32 copy of q, k and v.

    python -m bench.growth additive fastattn --length 4096
    python -m bench.growth additive eager --length 4096 --at-most-gib 8      fails, for want of memory
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from bench import textbook_peers
from bench.machine import ROOT
from bench.memory import count_growth
from bench.peers import OURS, Unsupported
from bench.report import format_ms, format_ratio, text_table
from bench.textbook import format_mib
from bench.textbook_peers import EAGER, FAMILIES, TITLES, Problem, draw

LENGTHS = (256, 512, 1024, 2048, 4096)
QUICK_LENGTHS = (128, 256)
BASES = {
    "additive": Problem("additive", 1, 1, 0, 256, "step"),
    "hard": Problem("hard", 1, 8, 0, 64, "step"),
    "summary": Problem("summary", 1, 8, 0, 64),
}
CALLS = 3
FAILED = "failed: "  # a note that is no reason, but a fault, begins so


@dataclass(frozen=True)
class Point:
    family: str
    name: str
    length: int
    ms: float | None = None  # None: it could not be run, and `note` says why
    extra_bytes: int | None = None
    unit_bytes: int = 0
    note: str = ""

    @property
    def extra_units(self) -> float | None:
        return None if self.extra_bytes is None else self.extra_bytes / self.unit_bytes


def _run_here(family: str, name: str, B: int, length: int) -> Point:
    problem = replace(BASES[family], L=length, B=B)
    small = replace(problem, L=64)
    warm_up = FAMILIES[family][name](small, draw(small)).runner  # loads libraries, starts threads
    with warm_up.context():
        warm_up.call()

    inputs = draw(problem)
    runner = FAMILIES[family][name](problem, inputs).runner
    growth, results = count_growth(runner)
    extra = max(0, growth - sum(x.nbytes for x in results))
    del results
    samples = []
    with runner.context():
        for _ in range(CALLS):
            start = time.perf_counter()
            runner.call()
            samples.append(1e3 * (time.perf_counter() - start))
            if samples[-1] > 2e3:
                break
    unit = 4 * (inputs["q"].numel() + inputs["k"].numel() + inputs["v"].numel())
    return Point(family, name, length, statistics.median(samples), extra, unit)


def measure_point(
    family: str, name: str, length: int, *, threads: int, B: int = 1, at_most_gib: int | None = None
) -> Point:
    """at_most_gib: of address space. Raises only where the process itself cannot be run."""
    command = [sys.executable, "-m", "bench.growth", family, name, f"--length={length}", f"--batch={B}"]
    command += [f"--threads={threads}"] + ([f"--at-most-gib={at_most_gib}"] if at_most_gib else [])
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command[1:])} failed:\n{done.stderr}")
    return Point(**json.loads(done.stdout))


def measure_growth(lengths: Sequence[int], *, threads: int, say: Callable[[str], None]) -> Iterator[Point]:
    for family in BASES:
        for name in (OURS, EAGER):
            for length in lengths:
                say(f"growth: {family}, {name}, L={length}")
                try:
                    yield measure_point(family, name, length, threads=threads)
                except RuntimeError as failure:  # the others are wanted all the same
                    yield Point(family, name, length, note=FAILED + str(failure).strip().splitlines()[-1])


def count(lengths: Sequence[int]) -> int:
    return len(BASES) * 2 * len(lengths)


def table(points: Sequence[Point]) -> str:
    found = {(point.family, point.length, point.name): point for point in points}
    header = ["step", "L", "ms", "eager ms", "x eager", "extra MiB", "in copies of q, k, v", "eager extra MiB"]
    lines = []
    for family, length in dict.fromkeys((point.family, point.length) for point in points):
        ours, eager = (found.get((family, length, name)) for name in (OURS, EAGER))
        ms = [None if point is None else point.ms for point in (ours, eager)]
        units = None if ours is None else ours.extra_units
        ratio = ms[1] / ms[0] if ms[0] and ms[1] else None
        line = [family, str(length), *("-" if x is None else format_ms(x) for x in ms), format_ratio(ratio)]
        ours_mib, eager_mib = (format_mib(None if point is None else point.extra_bytes) for point in (ours, eager))
        line += [ours_mib, "-" if units is None else f"{units:.2f}"]
        lines.append([*line, eager_mib])
    missing = [
        f"{TITLES[point.name]}, {point.family}, L={point.length}: {point.note}" for point in points if point.note
    ]
    title = "Growth with the length, float32, one training step (of a summary: one call)"
    return "\n".join([title, text_table(header, lines), *missing])


def as_dict(point: Point) -> dict[str, Any]:
    return asdict(point)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.growth", description="Time and extra memory at a length, as JSON."
    )
    parser.add_argument("family", choices=list(BASES))
    parser.add_argument("name", choices=[OURS, EAGER])
    parser.add_argument("--length", type=int, default=4096, help="queries, and as many keys; default: %(default)s")
    parser.add_argument("--batch", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: as many as PyTorch uses")
    parser.add_argument(
        "--at-most-gib", type=int, help="of address space; without it, plain code refuses what is large"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.at_most_gib:
        size = options.at_most_gib << 30
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        textbook_peers.PLAIN_LIMIT_BYTES = sys.maxsize  # it is to try
    try:
        point = _run_here(options.family, options.name, options.batch, options.length)
    except Unsupported as reason:
        point = Point(options.family, options.name, options.length, note=str(reason))
    except RuntimeError as failure:
        asked = re.search(r"can't allocate memory: you tried to allocate (\d+) bytes", str(failure))
        if not asked:
            raise
        note = f"asks for {int(asked[1]) / 2**30:.1f} GiB, which it does not get"
        point = Point(options.family, options.name, options.length, note=note)
    print(json.dumps(asdict(point)))


if __name__ == "__main__":
    main()
