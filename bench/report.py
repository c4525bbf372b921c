"""Results as text tables and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.cases import SHORT
from bench.machine import Machine
from bench.measure import Row
from bench.peers import BASELINE, OURS, PEERS
from bench.timing import Timing

SCHEMA = 1  # raised when a reader of the JSON would have to change


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Columns as wide as they need to be, those in `left` flush left and the others flush right."""
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]

    def format_line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([format_line(header), rule, *(format_line(row) for row in rows)])


def format_ms(value: float) -> str:
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def format_ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def case_table(rows: Sequence[Row]) -> str:
    """case | ms (median, IQR) | GFLOP/s | % of peak | GB/s | x SDPA, and how many times faster than each other peer."""
    others = [name for name in PEERS if name not in (OURS, BASELINE) and any(name in row.timings for row in rows)]
    header = [
        "case",
        "ms (IQR)",
        "GFLOP/s",
        "% of peak",
        "GB/s",
        "SDPA ms",
        "x SDPA",
        *(f"x {name}" for name in others),
    ]
    lines = []
    for row in rows:
        ours, sdpa = row.timings[OURS], row.timings.get(BASELINE)
        lines.append(
            [
                row.job.id,
                f"{format_ms(ours.median_ms)} ({format_ms(ours.iqr_ms)})",
                f"{row.gflops():.0f}",
                f"{row.percent_of_peak():.0f}",
                f"{row.gbytes_per_s():.1f}",
                "-" if sdpa is None else format_ms(sdpa.median_ms),
                format_ratio(row.speedup()),
                *(format_ratio(row.speedup(name)) for name in others),
            ]
        )
    return text_table(header, lines)


def cuda_case_table(rows: Sequence[Row]) -> str:
    """The same for a GPU: times with a warm and with a flushed L2, and GB/s with the latter; % of a matrix product; the
    memory that a call takes; and how many times faster than each peer.
    """
    others = [name for name in PEERS if name != OURS and any(name in row.timings for row in rows)]
    columns = [
        "case",
        "ms (IQR)",
        "flushed ms",
        "TFLOP/s",
        "% of GEMM",
        "GB/s",
        "MiB",
        *(f"x {name}" for name in others),
    ]
    lines = []
    for row in rows:
        ours, flushed, memory = row.timings[OURS], row.flushed.get(OURS), row.memory_bytes.get(OURS)
        lines.append(
            [
                row.job.id,
                f"{format_ms(ours.median_ms)} ({format_ms(ours.iqr_ms)})",
                "-" if flushed is None else format_ms(flushed.median_ms),
                f"{row.gflops() / 1e3:.0f}",
                f"{row.percent_of_peak():.0f}",
                "-" if flushed is None else f"{row.gbytes_per_s(flushed=True):.0f}",
                "-" if memory is None else f"{memory / 2**20:.0f}",
                *(format_ratio(row.speedup(name)) for name in others),
            ]
        )
    return text_table(columns, lines)


def peer_table(rows: Sequence[Row]) -> str:
    """GFLOP/s (TFLOP/s on a GPU) and % of peak of every peer by case; "" where only SDPA was timed beside ours."""
    names = [name for name in PEERS if any(name in row.timings for row in rows)]
    if len(names) <= 2:
        return ""
    unit, scale = ("TFLOP/s", 1e3) if rows[0].job.device == "cuda" else ("GFLOP/s", 1.0)

    def cell(row: Row, name: str) -> str:
        if name not in row.timings:
            return "-"
        return f"{row.gflops(name) / scale:.0f} ({row.percent_of_peak(name):.0f}%)"

    lines = [[row.job.id, *(cell(row, name) for name in names)] for row in rows]
    return f"{unit} (% of peak)\n" + text_table(["case", *names], lines)


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def speedup_table(rows: Sequence[Row]) -> str:
    """Speed-up over SDPA by dtype and direction: how many cases, least, geometric mean, most."""
    groups: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        ratio = row.speedup()
        if ratio is not None:
            groups.setdefault((row.job.dtype, row.job.direction), []).append(ratio)
    lines = [
        [
            SHORT[dtype],
            direction,
            str(len(ratios)),
            format_ratio(min(ratios)),
            format_ratio(geometric_mean(ratios)),
            format_ratio(max(ratios)),
        ]
        for (dtype, direction), ratios in sorted(groups.items())
    ]
    header = ["dtype", "direction", "cases", "least", "mean", "most"]
    return "Times faster than PyTorch SDPA\n" + text_table(header, lines, left=(0, 1))


def notes(rows: Sequence[Row]) -> list[str]:
    """Why peers have no timing, each reason once with how many cases it concerns."""
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        for name, reason in row.notes.items():
            counts[name, reason] = counts.get((name, reason), 0) + 1
    return [
        f"{PEERS[name].title}: {reason}" + (f" ({count} cases)" if count > 1 else "")
        for (name, reason), count in counts.items()
    ]


def timing_as_dict(timing: Timing) -> dict[str, Any]:
    q25, q75 = timing.quartiles_ms
    return {"median_ms": timing.median_ms, "q25_ms": q25, "q75_ms": q75, "samples": len(timing.samples_ms)}


def row_as_dict(row: Row) -> dict[str, Any]:
    case = row.job.case
    results: dict[str, dict[str, Any]] = {}
    for name, timing in row.timings.items():
        results[name] = {
            **timing_as_dict(timing),
            "gflops": row.gflops(name),
            "percent_of_peak": row.percent_of_peak(name),
            "gbytes_per_s": row.gbytes_per_s(name),
            "error_in_bounds": row.errors.get(name),
        }
        if name in row.flushed:
            gbytes = row.gbytes_per_s(name, flushed=True)
            results[name]["flushed"] = {**timing_as_dict(row.flushed[name]), "gbytes_per_s": gbytes}
        if name in row.memory_bytes:
            results[name]["peak_memory_bytes"] = row.memory_bytes[name]
    return {
        "id": row.job.id,
        "dtype": row.job.dtype,
        "direction": row.job.direction,
        "device": row.job.device,
        "shape": {
            name: getattr(case, name) for name in ("B", "Hq", "Hkv", "Lq", "Lk", "D", "value_dim", "causal", "window")
        },
        "isa": row.isa,
        "threads": row.threads,
        "visible_pairs": row.pairs,
        "flop": row.flop,
        "bytes": row.bytes,
        "peak_gflops": row.peak_gflops,
        "results": results,
        "speedup": {name: row.speedup(name) for name in row.timings if name != OURS},
        "notes": row.notes,
    }


def row_line(row: Row) -> str:
    """The row in short, for a log."""
    parts = [f"{format_ms(row.timings[OURS].median_ms)} ms", f"{row.percent_of_peak():.0f}% of peak"]
    parts += [f"{format_ratio(row.speedup(name))} x {name}" for name in row.timings if name != OURS]
    return f"{row.job.id}: " + ", ".join(parts)


def without_gaps(value: Any) -> Any:
    """The same with null in the place of every number that JSON has no way to write: NaN, Infinity."""
    if isinstance(value, dict):
        return {key: without_gaps(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_gaps(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, machine: Machine, peaks: dict[str, float], sections: dict[str, Any]) -> None:
    """All of it or nothing: who reads the file while it is rewritten, or after a kill, finds a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"schema": SCHEMA, "machine": machine.as_dict(), "peaks_gflops": peaks, **sections}
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(without_gaps(document), indent=2, allow_nan=False) + "\n")
    part.replace(path)
