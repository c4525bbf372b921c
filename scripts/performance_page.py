"""Writes the tables of docs/performance.md from the JSON files in bench/results.

A table stands between `<!-- table: FILE -->` and `<!-- end -->`, where FILE is a file of bench/results; the text around
it is written by hand. `python scripts/performance_page.py` writes the tables anew; --check says whether that would
change anything.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "bench" / "results"
BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
PEERS = {
    "sdpa": "SDPA",
    "math": "SDPA, math backend",
    "eager": "eager PyTorch",
    "compiled": "`torch.compile` of the formula",
    "keras": "keras",
    "attention": "`fastattn.attention`",
}


def number(x: float | None) -> str:
    """Three digits, or all before the point."""
    if x is None:
        return ""
    digits = max(0, 2 - len(str(int(abs(x)))) + 1) if abs(x) >= 1 else 3
    return f"{x:.{digits}f}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Markdown; the first `left` columns are text, the others numbers."""
    rules = ["---" if column < left else "---:" for column in range(len(header))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, rules, *rows))


def machine(document: dict[str, Any]) -> str:
    """Where and when, in one sentence."""
    m = document["machine"]
    peaks = {
        dtype: peak for dtype, peak in document.get("peaks_gflops", {}).items() if dtype in ("float32", "bfloat16")
    }
    peak = ", ".join(f"{value:.0f} GFLOP/s in {dtype}" for dtype, value in peaks.items())
    return (
        f"{m['cpu']}, {m['isa']}, {m['threads']} threads, torch {m['versions']['torch']}, {m['date']}, commit"
        f" {m['commit']}{f'; peak {peak}' if peak else ''}.\n"
    )


def cases(rows: list[dict[str, Any]]) -> str:
    """Against SDPA's default choice, as a share of the multiply-add peak, and against its math backend."""
    lines = []
    for row in rows:
        ours, sdpa = row["results"]["fastattn"], row["results"].get("sdpa")
        lines.append(
            [
                f"`{row['id']}`",
                number(ours["median_ms"]),
                f"{ours['gflops']:.0f}",
                f"{ours['percent_of_peak']:.0f}",
                number(sdpa and sdpa["median_ms"]),
                number(row["speedup"].get("sdpa")),
                number(row["speedup"].get("math")),
            ]
        )
    return table(["case", "ms", "GFLOP/s", "% of peak", "SDPA ms", "x SDPA", "x SDPA, math backend"], lines)


def textbook(results: list[dict[str, Any]]) -> str:
    """Each case beside whatever else computes it, a line for each."""
    lines = []
    for result in results:
        ours = result["results"]["fastattn"]["median_ms"]
        for name, ratio in result["speedup"].items():
            other = result["results"][name]["median_ms"]
            lines.append([f"`{result['id']}`", number(ours), PEERS.get(name, name), number(other), number(ratio)])
    return table(["case", "ms", "beside", "ms", "times as fast"], lines)


def growth(points: list[dict[str, Any]]) -> str:
    """Time and memory by length, beside plain code."""
    lines = []
    for point in points:
        mib = None if point["extra_bytes"] is None else point["extra_bytes"] / 2**20
        name = PEERS.get(point["name"], point["name"])
        memory = number(mib) if mib is not None else point["note"]
        lines.append([point["family"], name, str(point["length"]), number(point["ms"]), memory])
    header = ["family", "by", "length", "ms", "MiB beyond inputs and results"]
    return table(header, lines, left=2)


def targets(found: list[dict[str, Any]]) -> str:
    """What the library is held to, what was measured, and whether that is enough."""
    lines = [
        [
            f"`{t['name']}`" if re.fullmatch(r"\S+", t["name"]) else t["name"],
            t["quantity"],
            f"{t['relation']} {t['goal']:g}",
            number(t["measured"]),
            t["detail"],
            t["verdict"].lower(),
        ]
        for t in found
    ]
    text = table(["case", "quantity", "target", "measured", "in detail", "verdict"], lines, left=6)
    return text


SECTIONS = {"rows": cases, "textbook": textbook, "growth": growth, "targets": targets}


def tables(file: str) -> str:
    """All tables of one JSON file, or with FILE#section that one alone."""
    name, _, only = file.partition("#")
    document = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    sections = [only] if only else [section for section in SECTIONS if document.get(section)]
    return "\n".join([machine(document), *(SECTIONS[section](document[section]) for section in sections)])


def written(page: str) -> str:
    """The page with its tables made anew."""
    return BLOCK.sub(lambda match: f"{match.group(1)}\n{tables(match.group(2))}\n{match.group(3)}", page)


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the tables of docs/performance.md from bench/results.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 where a table is not new")
    options = parser.parse_args()
    before = PAGE.read_text(encoding="utf-8")
    after = written(before)
    if options.check:
        if after != before:
            print("docs/performance.md is not what bench/results says: python scripts/performance_page.py")
        return int(after != before)
    PAGE.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
