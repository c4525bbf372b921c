"""Results as PNG files: speed-up and share of the peak by case; and, for the sweep, every shape as one dot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")  # files only: no display needed

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from bench.cases import SHORT
from bench.machine import Machine
from bench.measure import Row
from bench.peers import BASELINE, OURS
from bench.report import format_ms

if TYPE_CHECKING:
    from bench.growth import Point as GrowthPoint
    from bench.sweep import Point
    from bench.textbook import Result

COLORS = {"float32": "#3b6fb6", "bfloat16": "#d9772b", "float16": "#3f9a6b"}
ALPHA = {"forward": 1.0, "backward": 0.75, "step": 0.6}
MARKERS = {"forward": "o", "step": "s", "backward": "s"}
INK, MUTED, FAINT = "#22262b", "#5b6470", "#c9ced6"

STYLE: Any = {
    "font.size": 9.5,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.dpi": 130,
}


def _label(row: Row) -> str:
    """The case in a reader's words: the dtype is the bar's colour."""
    case = row.job.case
    parts = [row.job.direction if row.job.direction != "step" else "fwd + bwd"]
    if case.window:
        parts.append(f"window {case.window[0]}")
    elif case.causal:
        parts.append("causal")
    if case.mask == "11qk" and case.mask_values == "blocks":
        parts.append("half-empty mask")
    elif case.mask is not None:
        parts.append("mask")
    if case.bias is not None:
        parts.append("bias")
    parts.append(f"L={case.Lq}" if case.Lq == case.Lk else f"Lq={case.Lq} Lk={case.Lk}")
    parts.append(f"D={case.D}")
    if (case.B, case.Hq) != (1, 8):
        parts.append(f"B={case.B} H={case.Hq}" + (f"/{case.Hkv}" if case.gqa > 1 else ""))
    return "  ".join(parts)


HEAD_INCHES = 0.95  # for title, machine and legend


def _headline(figure: Any, title: str, machine: Machine, handles: list[Any]) -> None:
    """Title and machine at the top left, the legend at the top right; the axes fill the rest."""
    height = figure.get_size_inches()[1]
    figure.text(0.012, 1 - 0.14 / height, title, ha="left", va="top", fontsize=15, fontweight="bold")
    lines = "\n".join(machine.lines())
    figure.text(0.012, 1 - 0.48 / height, lines, ha="left", va="top", fontsize=8, color=MUTED)
    corner = (0.995, 1 - 0.06 / height)
    figure.legend(handles=handles, loc="upper right", bbox_to_anchor=corner, ncols=len(handles), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - HEAD_INCHES / height))


def plot_rows(path: Path, rows: Sequence[Row], machine: Machine) -> None:
    """Left: how many times faster than SDPA (log scale). Right: % of the measured peak, SDPA's as a diamond."""
    with plt.rc_context(STYLE):
        height = HEAD_INCHES + 0.75 + 0.31 * len(rows)
        figure, (left, right) = plt.subplots(1, 2, sharey=True, figsize=(12.5, height), width_ratios=(1.35, 1))
        y = list(range(len(rows)))
        colors = [COLORS[row.job.dtype] for row in rows]
        alphas = [ALPHA[row.job.direction] for row in rows]
        speedups = [row.speedup() for row in rows]
        known = [speedup for speedup in speedups if speedup is not None]
        for position, speedup, color, alpha in zip(y, speedups, colors, alphas, strict=True):
            if speedup is None:
                left.annotate("no SDPA", (1, position), (4, 0), textcoords="offset points", va="center", color=MUTED)
                continue
            left.barh(position, speedup - 1, left=1, height=0.68, color=color, alpha=alpha)
            place = max(speedup, 1.0)
            left.annotate(
                f"{speedup:.1f}×", (place, position), (4, 0), textcoords="offset points", va="center", fontweight="bold"
            )
        left.set_xscale("log", base=2)
        left.set_xlim(min([1.0, *known]) * 0.97, max([2.0, *known]) * 1.28)
        left.xaxis.set_major_locator(LogLocator(base=2))
        left.xaxis.set_minor_locator(NullLocator())
        left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
        left.axvline(1, color=INK, linewidth=1)
        left.set_xlabel("times faster than PyTorch SDPA")
        left.set_yticks(y, [_label(row) for row in rows])
        left.tick_params(axis="y", length=0)
        left.set_ylim(len(rows) - 0.4, -0.6)

        for position, row, color, alpha in zip(y, rows, colors, alphas, strict=True):
            share = row.percent_of_peak()
            right.barh(position, share, height=0.68, color=color, alpha=alpha)
            inside = share > 20
            right.annotate(
                f"{share:.0f}%",
                (share, position),
                (-4 if inside else 4, 0),
                textcoords="offset points",
                va="center",
                ha="right" if inside else "left",
                color="white" if inside else INK,
                fontweight="bold",
            )
            if BASELINE in row.timings:
                right.plot(row.percent_of_peak(BASELINE), position, marker="D", markersize=5, color=INK, zorder=3)
        right.set_xlim(0, 104)
        right.axvline(100, color=INK, linewidth=1)
        on_gpu = bool(rows) and rows[0].job.device == "cuda"
        yardstick = "bfloat16 GEMM" if on_gpu else "multiply-add peak"
        right.set_xlabel(f"% of the {yardstick} measured beside each case")
        right.tick_params(axis="y", length=0)
        for axes in (left, right):
            axes.grid(axis="x", color=FAINT, linewidth=0.6, alpha=0.6)
            axes.set_axisbelow(True)

        dtypes = [dtype for dtype in COLORS if any(row.job.dtype == dtype for row in rows)]
        handles: list[Any] = [Patch(color=COLORS[dtype], label=SHORT[dtype]) for dtype in dtypes]
        handles.append(Line2D([], [], marker="D", linestyle="", color=INK, markersize=5, label="SDPA's share of peak"))
        _headline(figure, "fastattn against PyTorch SDPA", machine, handles)
        _save(figure, path)


def plot_sweep(path: Path, points: Sequence[Point], machine: Machine) -> None:
    """One dot for each shape: SDPA's time against the speed-up; hollow where only call overhead is left."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(11, 6.2))
        for point in points:
            axes.scatter(
                point.sdpa_us,
                point.ratio,
                s=22,
                edgecolors=COLORS[point.job.dtype],
                facecolors=COLORS[point.job.dtype] if point.counts else "none",
                marker=MARKERS[point.job.direction],
                alpha=0.75,
                linewidths=0.8,
            )
        axes.set_xscale("log")
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
        axes.axhline(1, color=INK, linewidth=1)
        axes.set_xlabel("time of PyTorch SDPA, µs")
        axes.set_ylabel("times faster than PyTorch SDPA")
        axes.grid(color=FAINT, linewidth=0.6, alpha=0.6)
        axes.set_axisbelow(True)
        handles: list[Any] = [Patch(color=color, label=SHORT[dtype]) for dtype, color in COLORS.items()]
        handles += [
            Line2D([], [], marker=MARKERS[direction], linestyle="", color=INK, label=label)
            for direction, label in (("forward", "forward"), ("step", "forward + backward"))
        ]
        if not all(point.counts for point in points):
            label = "hollow: call overhead"
            handles.append(Line2D([], [], marker="o", linestyle="", color=INK, fillstyle="none", label=label))
        _headline(figure, f"{len(points)} shapes against PyTorch SDPA", machine, handles)
        _save(figure, path)


OTHERS = {"eager": "#3b6fb6", "compiled": "#d9772b", "keras": "#3f9a6b", "attention": "#8a6fb0"}


def plot_textbook(path: Path, results: Sequence[Result], machine: Machine) -> None:
    """How many times as long the others take (log scale); fastattn.attention does less, and may be below 1."""
    bars = [(result, name) for result in results for name in OTHERS if name in result.timings]
    ratios = [result.ratio(name) or 1.0 for result, name in bars]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(11, HEAD_INCHES + 0.75 + 0.27 * len(bars)))
        for y, ((result, name), ratio) in enumerate(zip(bars, ratios, strict=True)):
            axes.barh(y, ratio - 1, left=1, height=0.7, color=OTHERS[name])
            text = f"{ratio:.2f}×" if ratio < 10 else f"{ratio:.0f}×"
            text += f"  ({format_ms(result.timings[OURS].median_ms)} ms)"
            place = (max(ratio, 1.0), y)
            axes.annotate(text, place, (4, 0), textcoords="offset points", va="center", fontsize=8.5)
        axes.set_xscale("log", base=2)
        axes.set_xlim(min([1.0, *ratios]) * 0.9, max([2.0, *ratios]) * 3)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
        axes.axvline(1, color=INK, linewidth=1)
        axes.set_xlabel("time of the others, in units of fastattn's (in brackets)")
        labels = [result.problem.id if name == first_of(result) else "" for result, name in bars]
        axes.set_yticks(range(len(bars)), labels)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.grid(axis="x", color=FAINT, linewidth=0.6, alpha=0.6)
        axes.set_axisbelow(True)
        there = {name for _, name in bars}
        handles = [Patch(color=color, label=name) for name, color in OTHERS.items() if name in there]
        _headline(figure, "Attentions of the textbooks", machine, handles)
        _save(figure, path)


def first_of(result: Result) -> str:
    return next(name for name in OTHERS if name in result.timings)


def plot_growth(path: Path, points: Sequence[GrowthPoint], machine: Machine) -> None:
    """Time and extra memory by length, both log scale: a column for each family, ours and plain code."""
    families = list(dict.fromkeys(point.family for point in points))
    styles = {"fastattn": ("#d9772b", "o"), "eager": ("#3b6fb6", "s")}
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(2, len(families), figsize=(11, 6.4), squeeze=False, sharex="col")
        for column, family in enumerate(families):
            for name, (color, marker) in styles.items():
                found = [point for point in points if (point.family, point.name) == (family, name) and point.ms]
                lengths = [point.length for point in found]
                megabytes = [max(point.extra_bytes or 0, 1 << 16) / 2**20 for point in found]  # a page or two is noise
                grid[0][column].plot(lengths, [point.ms for point in found], color=color, marker=marker)
                grid[1][column].plot(lengths, megabytes, color=color, marker=marker)
            grid[0][column].set_title(family)
            grid[1][column].set_xlabel("length")
            for axes in (grid[0][column], grid[1][column]):
                axes.set_xscale("log", base=2)
                axes.set_yscale("log")
                axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axes.grid(color=FAINT, linewidth=0.6, alpha=0.6)
        grid[0][0].set_ylabel("ms")
        grid[1][0].set_ylabel("MiB beyond inputs and results")
        handles = [Line2D([], [], color=color, marker=marker, label=name) for name, (color, marker) in styles.items()]
        _headline(figure, "Growth with the length", machine, handles)
        _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
