"""What the examples share besides their subject: options, a look, and an end that checks the numbers promised."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

import fastattn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GREY, BLUE, ORANGE, GREEN, MUTED = "#8a93a1", "#3b6fb6", "#d9772b", "#3f9a6b", "#5b6470"


def parse_options(name: str, description: str, smoke: str) -> argparse.Namespace:
    """The command line, with its seed and its threads already in force. smoke: what --smoke means."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--smoke", action="store_true", help=smoke)
    parser.add_argument("--threads", type=int, help="default: as many as PyTorch uses")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number here")
    parser.add_argument("--plot", type=Path, metavar="FILE", default=Path(f"{name}.png"), help="default: %(default)s")
    parser.add_argument("--no-plot", action="store_true")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    return options


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that belongs to no window: files only."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG, with the versions that made it in small print below."""
    versions = f"torch {torch.__version__}, fastattn {fastattn.__version__}, {torch.ops.fastattn._isa()}"
    threads = torch.get_num_threads()
    made_by = f"{versions}, {threads} {'thread' if threads == 1 else 'threads'}"
    figure.supxlabel(made_by, x=0.995, ha="right", fontsize=7, color=MUTED)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(f"Plot: {path}")


class Promise(NamedTuple):
    """A number that a run must reach: at least (or, with at_most, at most) the bound."""

    name: str
    value: float
    bound: float
    at_most: bool = False

    def __str__(self) -> str:
        return f"{self.name} {self.value:.4g} ({'at most' if self.at_most else 'at least'} {self.bound:g} is promised)"

    @property
    def is_kept(self) -> bool:  # NaN keeps nothing
        return self.value <= self.bound if self.at_most else self.value >= self.bound


def finish(options: argparse.Namespace, result: dict[str, Any], promises: list[Promise]) -> None:
    """Writes the JSON, prints the promises; exit status 1 and a message where one is broken."""
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    for promise in promises:
        print(promise)
    if broken := [str(promise) for promise in promises if not promise.is_kept]:
        raise SystemExit("Not reached: " + "; ".join(broken))
