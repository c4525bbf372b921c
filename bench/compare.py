"""Sets two JSON results side by side: `python -m bench.compare OLD.json NEW.json`.

Two runs, even on one machine, see it at different speeds. So a time is not compared with the other run's time, but in
units of what was measured in its own run: of a peer's time for the same case, and of the time that the processor's peak
would have taken. A case is slower when it is slower in every unit that both runs have, by more than the noise: three
times what the quartiles of all the times involved make the ratio uncertain by, and at least a floor. A report, and no
verdict: the exit status is 0, unless --fail asks for another.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.report import SCHEMA, text_table

# In results, ours has one of these names; the others are its peers, by preference.
OURS = ("fastattn", "packed")
# The quartiles of a normal distribution are 1.35 standard deviations apart.
IQR_DEVIATIONS = 1.349
DEVIATIONS = 3.0
FLOOR = 0.05
# One sample each way, of a call that may take a microsecond.
SWEEP_FLOOR = 0.25


@dataclass(frozen=True)
class Figure:
    """A time, and the same in units measured beside it; what is better the larger it is comes as its reciprocal."""

    section: str
    id: str
    time: float
    text: str  # the time as the table shows it
    floor: float = FLOOR
    noise: float = 0.0  # relative standard error of the time
    units: dict[str, tuple[float, float]] = field(default_factory=dict)  # name -> the unit and its relative error


@dataclass(frozen=True)
class Change:
    """What became of a figure."""

    old: Figure
    new: Figure
    ratios: dict[str, float]  # new / old, in each unit that both have
    noise: float  # by how much a ratio may differ from 1 for no reason

    @property
    def ratio(self) -> float:
        """The one nearest to no change, in favour of the new run."""
        above, below = min(self.ratios.values()), max(self.ratios.values())
        return above if above > 1 else below if below < 1 else 1.0

    @property
    def verdict(self) -> str:
        return "SLOWER" if self.ratio > 1 + self.noise else "faster" if self.ratio < 1 / (1 + self.noise) else ""


def relative_error(result: dict[str, Any]) -> float:
    """Of a median, by the quartiles of its samples."""
    spread = (result["q75_ms"] - result["q25_ms"]) / IQR_DEVIATIONS / max(result["median_ms"], 1e-9)
    # The median's own error is smaller by the root of the samples, if they are independent; neighbours are not.
    return float(spread / math.sqrt(min(max(result.get("samples", 1), 1), 4)))


def figures(document: dict[str, Any]) -> Iterator[Figure]:
    """Everything in a result that can be compared."""
    for section in ("rows", "textbook", "decode", "packed", "llama"):
        for row in document.get(section, []):
            results = row.get("results", {})
            name = next((name for name in OURS if name in results), None)
            if name is not None and "id" in row:
                yield _timed(section, row, results, name)
    for point in document.get("sweep", {}).get("points", []):
        if not point.get("error") and point.get("ours_us"):
            text = f"{point['ours_us']:.1f} us"
            unit = {"sdpa": (point["sdpa_us"], 0.0)} if point.get("sdpa_us") else {}
            yield Figure("sweep", point["id"], point["ours_us"], text, SWEEP_FLOOR, units=unit)
    for target in document.get("targets", []):
        value = target.get("measured")
        if isinstance(value, int | float) and value > 0:
            time = 1 / value if target["relation"].startswith(">") else value
            name = f"{target['name']}, {target['quantity']}"
            # What a target measures has its unit already.
            yield Figure("targets", name, time, f"{value:.4g}", 2 * FLOOR, units={"itself": (1.0, 0.0)})


def _timed(section: str, row: dict[str, Any], results: dict[str, Any], name: str) -> Figure:
    ours = results[name]
    units = {
        peer: (result["median_ms"], relative_error(result))
        for peer, result in results.items()
        if peer != name and "median_ms" in result
    }
    if row.get("flop") and row.get("peak_gflops"):
        units["peak"] = (row["flop"] / row["peak_gflops"] / 1e6, 0.0)
    return Figure(
        section, row["id"], ours["median_ms"], f"{ours['median_ms']:.4g} ms", FLOOR, relative_error(ours), units
    )


def compare(old: Figure, new: Figure, floor: float | None = None) -> Change | None:
    """None where they have no unit in common."""
    shared = [name for name in new.units if name in old.units and old.units[name][0] > 0 and new.units[name][0] > 0]
    if not shared:
        return None
    ratios = {name: (new.time / new.units[name][0]) / (old.time / old.units[name][0]) for name in shared}
    errors = [old.noise, new.noise, *(x.units[name][1] for x in (old, new) for name in shared)]
    # The unit with the largest error decides, for the ratio in it counts as much as the others.
    noise = DEVIATIONS * math.hypot(errors[0], errors[1], max(errors[2:]))
    return Change(old, new, ratios, max(new.floor if floor is None else floor, noise))


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between the machines and versions of two results."""
    a, b = old["machine"], new["machine"]
    names = [name for name in ("cpu", "gpu", "isa", "threads", "logical_cpus") if a.get(name) != b.get(name)]
    lines = [f"{name}: {a.get(name)} / {b.get(name)}" for name in names]
    versions = {*a.get("versions", {}), *b.get("versions", {})}
    for name in sorted(versions):
        one, other = a.get("versions", {}).get(name), b.get("versions", {}).get(name)
        if one != other:
            lines.append(f"{name}: {one} / {other}")
    return lines


def read(path: Path) -> dict[str, Any]:
    """A result; ValueError says what is wrong with the file."""
    try:
        document: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA or "machine" not in document:
        raise ValueError(f"{path} is not a result of `python -m bench` of schema {SCHEMA}")
    return dict(document)


def report(old: dict[str, Any], new: dict[str, Any], floor: float | None = None) -> tuple[str, list[Change]]:
    """The text, and what became slower."""
    before = {(figure.section, figure.id): figure for figure in figures(old)}
    after = {(figure.section, figure.id): figure for figure in figures(new)}
    pairs = [(before[key], after[key]) for key in after if key in before]
    changes = [change for pair in pairs if (change := compare(*pair, floor=floor)) is not None]
    changes.sort(key=lambda change: -change.ratio)
    lines = [f"OLD {_describe(old)}", f"NEW {_describe(new)}"]
    lines += [f"differs: {line}" for line in differences(old, new)]
    if changes:
        header = ["case", "old", "new", "new / old, by unit", "noise", ""]
        body = [
            [
                change.new.id,
                change.old.text,
                change.new.text,
                ", ".join(f"{ratio:.3f} ({name})" for name, ratio in change.ratios.items()),
                f"{100 * change.noise:.0f}%",
                change.verdict,
            ]
            for change in changes
        ]
        lines += ["", text_table(header, body, left=(0, 3, 5)), ""]
    slower = [change for change in changes if change.verdict == "SLOWER"]
    for name, there, missing in (("OLD", before, after), ("NEW", after, before)):
        alone = sorted(key[1] for key in there if key not in missing)
        if alone:
            shown = ", ".join(alone[:5]) + (", ..." if len(alone) > 5 else "")
            lines.append(f"{len(alone)} only in {name}: {shown}")
    faster = sum(change.verdict == "faster" for change in changes)
    lines.append(f"{len(changes)} compared: {len(slower)} slower beyond noise, {faster} faster")
    lines += [f"slower: {change.new.id}: {change.ratio:.2f} times its time" for change in slower]
    return "\n".join(lines), slower


def _describe(document: dict[str, Any]) -> str:
    machine = document["machine"]
    unfinished = ", unfinished" if document.get("unfinished") else ""
    return f"{machine.get('commit', '?')}, {machine.get('date', '?')}, {machine.get('cpu', '?')}{unfinished}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", type=Path, metavar="OLD.json")
    parser.add_argument("new", type=Path, metavar="NEW.json")
    parser.add_argument("--floor", type=float, metavar="PERCENT", help="least change that counts; default 5, sweep 25")
    parser.add_argument("--fail", action="store_true", help="exit with 1 where something became slower")
    options = parser.parse_args(arguments)
    if options.floor is not None and not 0 <= options.floor < 1000:
        parser.error(f"--floor must be a percentage from 0 on, not {options.floor}")
    try:
        old, new = read(options.old), read(options.new)
    except ValueError as error:
        parser.error(str(error))
    text, slower = report(old, new, floor=None if options.floor is None else options.floor / 100)
    print(text)
    return 1 if slower and options.fail else 0


if __name__ == "__main__":
    sys.exit(main())
