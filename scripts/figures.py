"""Draws the figures of the documentation as SVG files in docs/.

Which keys a row sees comes from `fastattn.reference.visible`, the specification that the tests hold the kernels to; the
sizes of tiles, from the sources that define them; measurements, from the files in bench/results.
`python scripts/figures.py` draws all; --check says whether that would change a file.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from fastattn.reference import visible  # noqa: E402

DOCS = ROOT / "docs"

INK, MUTED, FAINT, PAPER = "#22262b", "#5b6470", "#c9ced6", "#ffffff"
BLUE, ORANGE, GREEN, PURPLE = "#3b6fb6", "#d9772b", "#3f9a6b", "#8a6fb0"
PALE_BLUE, PALE_ORANGE, PALE_GREEN, PALE_PURPLE = "#dbe6f4", "#fae5d4", "#d9eee2", "#e8e1f1"
PALE = "#f1f3f6"


class Drawing:
    """An SVG file as a list of shapes, from the back to the front."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.shapes: list[str] = []
        self.rect(0, 0, width, height, PAPER)

    def rect(
        self, x: float, y: float, w: float, h: float, fill: str, line: str = "none", *, round: float = 0, dash: str = ""
    ) -> None:
        extra = (f' rx="{round:g}"' if round else "") + (f' stroke-dasharray="{dash}"' if dash else "")
        self.shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" fill="{fill}" stroke="{line}"{extra}/>'
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: float = 13,
        color: str = INK,
        anchor: str = "start",
        bold: bool = False,
        mono: bool = False,
        turned: bool = False,
    ) -> None:
        style = (' font-weight="bold"' if bold else "") + (' font-family="monospace"' if mono else "")
        turn = f' transform="rotate(-90 {x:g} {y:g})"' if turned else ""
        self.shapes.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{color}" text-anchor="{anchor}"{style}{turn}>'
            f"{escape(words, quote=False)}</text>"
        )

    def lines(self, x: float, y: float, words: Sequence[str], *, step: float = 17, **options: Any) -> None:
        for n, line in enumerate(words):
            self.text(x, y + n * step, line, **options)

    def line(self, points: Sequence[tuple[float, float]], color: str = INK, width: float = 1, dash: str = "") -> None:
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        extra = f' stroke-dasharray="{dash}"' if dash else ""
        self.shapes.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width:g}"{extra}/>')

    def arrow(self, *points: tuple[float, float], color: str = MUTED, width: float = 1.5) -> None:
        """A line through the points, along the axes or not, with a head at the last."""
        (x0, y0), (x1, y1) = points[-2:]
        length = max(((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5, 1e-9)
        dx, dy = (x1 - x0) / length, (y1 - y0) / length
        self.line([*points[:-1], (x1 - 6 * dx, y1 - 6 * dy)], color, width)
        left, right = (x1 - 8 * dx - 4 * dy, y1 - 8 * dy + 4 * dx), (x1 - 8 * dx + 4 * dy, y1 - 8 * dy - 4 * dx)
        head = " ".join(f"{x:g},{y:g}" for x, y in ((x1, y1), left, right))
        self.shapes.append(f'<polygon points="{head}" fill="{color}"/>')

    def svg(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width:g}" height="{self.height:g}"'
            f' viewBox="0 0 {self.width:g} {self.height:g}" font-family="Helvetica, Arial, sans-serif">'
        )
        return "\n".join([head, *self.shapes, "</svg>\n"])


# --- Masks ------------------------------------------------------------------------------------------------------------

CELL = 24


def grid(d: Drawing, x: float, y: float, sees: torch.Tensor, title: str, note: str = "") -> None:
    """Rows are queries, columns keys; blue = visible. The first and last key that a row sees are its interval."""
    Lq, Lk = sees.shape
    d.text(x, y - 26, title, bold=True, size=13.5)
    for j in range(Lk):
        d.text(x + (j + 0.5) * CELL, y - 6, f"k{j}", size=10, color=MUTED, anchor="middle")
    for i in range(Lq):
        d.text(x - 6, y + (i + 0.68) * CELL, f"q{i}", size=10, color=MUTED, anchor="end")
        for j in range(Lk):
            d.rect(x + j * CELL, y + i * CELL, CELL, CELL, BLUE if sees[i, j] else PALE, FAINT)
        if not sees[i].any():
            d.text(x + Lk * CELL + 8, y + (i + 0.68) * CELL, "o = 0, lse = −inf", size=10.5, color=MUTED)
    if note:
        d.text(x, y + Lq * CELL + 18, note, size=11.5, color=MUTED)


def diagonal(d: Drawing, x: float, y: float, sees: torch.Tensor, offset: int) -> None:
    """A dot where each row stands: key i + offset."""
    Lq, Lk = sees.shape
    for i in range(Lq):
        if 0 <= i + offset < Lk:
            cx, cy = x + (i + offset + 0.5) * CELL, y + (i + 0.5) * CELL
            d.shapes.append(f'<circle cx="{cx:g}" cy="{cy:g}" r="4" fill="{PALE_ORANGE}" stroke="{ORANGE}"/>')


def mask_legend(d: Drawing, x: float, y: float) -> None:
    d.rect(x, y - 11, 14, 14, BLUE, FAINT)
    d.text(x + 20, y, "visible", size=11.5)
    d.rect(x + 78, y - 11, 14, 14, PALE, FAINT)
    d.text(x + 98, y, "hidden", size=11.5)
    d.shapes.append(f'<circle cx="{x + 163:g}" cy="{y - 4:g}" r="4" fill="{PALE_ORANGE}" stroke="{ORANGE}"/>')
    d.text(x + 173, y, "where the row stands: its diagonal", size=11.5)


def causal_alignment() -> Drawing:
    d = Drawing(800, 390)
    places = {(3, 6): 62, (6, 3): 210}
    for column, causal in enumerate(("top_left", "bottom_right")):
        for (Lq, Lk), y in places.items():
            sees = visible(Lq, Lk, causal=causal)[0, 0]
            x = 60 + 370 * column
            name = f'"{causal}"' + (" (True)" if causal == "bottom_right" else "")
            grid(d, x, y, sees, f"Lq = {Lq}, Lk = {Lk}, causal: {name}")
            diagonal(d, x, y, sees, 0 if causal == "top_left" else Lk - Lq)
    mask_legend(d, 60, 378)
    return d


def windows() -> Drawing:
    d = Drawing(900, 290)
    Lq, Lk = 6, 9
    choices: list[tuple[bool | str, tuple[int | None, int | None], str]] = [
        (False, (2, 1), "window=(2, 1)"),
        ("bottom_right", (3, 0), "causal=True, window=(3, 0)"),
        ("top_left", (3, 0), 'causal="top_left", window=(3, 0)'),
    ]
    for column, (causal, window, title) in enumerate(choices):
        sees = visible(Lq, Lk, causal=causal, window=window)[0, 0]
        x = 46 + 292 * column
        grid(d, x, 62, sees, title)
        diagonal(d, x, 62, sees, 0 if causal == "top_left" else Lk - Lq)
    d.text(
        46,
        232,
        f"Lq = {Lq}, Lk = {Lk}. Without a causal mask the diagonal is the bottom-right one.",
        size=11.5,
        color=MUTED,
    )
    mask_legend(d, 46, 268)
    return d


def lengths() -> Drawing:
    d = Drawing(640, 250)
    Lq, Lk, kv_lengths = 4, 8, (8, 5)
    sees = visible(Lq, Lk, causal=True, kv_lengths=torch.tensor(kv_lengths, dtype=torch.int32), B=2)[:, 0]
    for b, length in enumerate(kv_lengths):
        x = 46 + 300 * b
        grid(d, x, 62, sees[b], f"sequence {b}: kv_lengths[{b}] = {length}")
        diagonal(d, x, 62, sees[b], length - Lq)
        for j in range(length, Lk):
            for i in range(Lq):
                d.rect(x + j * CELL, 62 + i * CELL, CELL, CELL, PAPER, FAINT, dash="2 3")
    d.text(46, 188, f"causal=True, Lq = {Lq}, Lk = {Lk}. Dashed: not read, whatever is there.", size=11.5, color=MUTED)
    mask_legend(d, 46, 224)
    return d


def tiles() -> Drawing:
    """The tiles of 64 x 64 of 640 rows and keys under a causal window, by what is visible in each."""
    L, window, T, size = 640, (300, 0), 64, 40
    sees = visible(L, L, causal=True, window=window)[0, 0]
    d = Drawing(760, 510)
    x0, y0, count = 60, 62, L // T
    d.text(x0, 26, f"causal=True, window={window}, Lq = Lk = {L}, tiles of {T} x {T}", bold=True, size=13.5)
    totals = {"skipped": 0, "partial": 0, "full": 0}
    colors = {"skipped": PALE, "partial": PALE_ORANGE, "full": BLUE}
    for i in range(count):
        d.text(x0 - 8, y0 + (i + 0.6) * size, f"{i * T}", size=10.5, color=MUTED, anchor="end")
        d.text(x0 + (i + 0.5) * size, y0 - 8, f"{i * T}", size=10.5, color=MUTED, anchor="middle")
        for j in range(count):
            part = sees[i * T : (i + 1) * T, j * T : (j + 1) * T]
            kind = "full" if part.all() else "partial" if part.any() else "skipped"
            totals[kind] += 1
            d.rect(x0 + j * size, y0 + i * size, size, size, colors[kind], PAPER)
    # The edges themselves: first and last visible key of each row.
    scale = size / T
    first = [(x0 + float(row.float().argmax()) * scale, y0 + i * scale) for i, row in enumerate(sees)]
    last = [(x0 + (L - float(row.flip(0).float().argmax())) * scale, y0 + i * scale) for i, row in enumerate(sees)]
    for edge in (first, last):
        d.line([*edge[::4], edge[-1]], ORANGE, 1.5)
    x = x0 + count * size + 36
    texts = {
        "skipped": ("no row sees a key:", "never visited"),
        "partial": ("on an edge: single", "elements are masked"),
        "full": ("all rows see all keys:", "no masking code runs"),
    }
    for n, (kind, words) in enumerate(texts.items()):
        y = y0 + 20 + 92 * n
        d.rect(x, y, 22, 22, colors[kind], FAINT)
        d.text(x + 32, y + 16, f"{kind}: {totals[kind]} of {count * count}", bold=True)
        d.lines(x + 32, y + 36, words, size=12, color=MUTED)
    d.line([(x, y0 + 310), (x + 22, y0 + 310)], ORANGE, 1.5)
    d.text(x + 32, y0 + 314, "first and last key of a row", size=12, color=MUTED)
    d.text(x0 - 46, y0 + count * size / 2, "query rows", size=12, color=MUTED, anchor="middle", turned=True)
    d.text(x0 + count * size / 2, y0 + count * size + 24, "keys", size=12, color=MUTED, anchor="middle")
    return d


# --- Kernels ----------------------------------------------------------------------------------------------------------


def constant(path: str, name: str) -> int:
    """A constexpr integer of the sources."""
    found = re.search(rf"\b{name} = (\d+)", (ROOT / "csrc" / path).read_text(encoding="utf-8"))
    assert found, f"{path} does not say {name}"
    return int(found.group(1))


def cpu_forward() -> Drawing:
    """A block of rows on its way through the tiles of keys."""
    rows, keys = constant("cpu/kernels.h", "kBlockRows"), constant("cpu/tile.h", "kMaxBlockKeys")
    D = 64
    kb = lambda count: f"{count * 4 / 1024:.0f} KB"  # noqa: E731
    d = Drawing(980, 545)
    d.text(24, 30, f"One item: {rows} query rows of a head, all the keys that they see", bold=True, size=15)
    d.text(
        24,
        50,
        f"Sizes: float32, D = Dv = {D}, AVX-512. A vector holds 16 query rows, one to a lane.",
        size=12,
        color=MUTED,
    )

    # Q and its transpose
    d.rect(40, 96, 64, 84, PALE_BLUE, BLUE)
    d.text(72, 142, "Q", anchor="middle", bold=True)
    d.text(72, 88, f"{rows} x D", anchor="middle", size=11, color=MUTED)
    d.lines(28, 204, ["caller's memory"], size=11, color=MUTED, step=14)
    d.arrow((108, 138), (190, 138))
    d.lines(149, 118, ["pack once"], anchor="middle", size=11, color=MUTED)
    d.lines(149, 156, ["transpose,", "times scale"], anchor="middle", size=11, color=MUTED, step=14)
    d.rect(196, 96, 150, 84, PALE_BLUE, BLUE)
    for n in range(1, 4):
        d.line([(196 + n * 37.5, 96), (196 + n * 37.5, 180)], PAPER, 1)
    d.text(271, 142, "Qᵀ", anchor="middle", bold=True)
    d.text(271, 88, f"D x {rows} lanes, {kb(D * rows)}", anchor="middle", size=11, color=MUTED)

    # What is done for each tile of keys
    d.rect(20, 230, 790, 240, "none", MUTED, round=8, dash="5 4")
    d.text(798, 222, "for each tile of keys", size=12.5, bold=True, color=MUTED, anchor="end")

    # K
    d.rect(40, 262, 64, 164, PALE_GREEN, GREEN)
    d.text(72, 356, "K", anchor="middle", bold=True)
    d.text(72, 254, f"up to {keys} x D", anchor="middle", size=11, color=MUTED)
    d.lines(40, 442, ["read where it lies,", "scalars, broadcast"], size=11, color=MUTED, step=14)
    d.rect(40, 296, 64, 22, GREEN, "none")
    d.text(72, 311, "6 keys", anchor="middle", size=10.5, color=PAPER)

    # S^T
    d.rect(196, 262, 150, 164, PALE_ORANGE, ORANGE)
    d.rect(196, 296, 150, 22, ORANGE, "none")
    d.text(271, 311, "6 x 4 vectors in registers", anchor="middle", size=10, color=PAPER)
    d.text(271, 356, "Sᵀ = K Qᵀ", anchor="middle", bold=True)
    d.text(271, 376, "maxima on the way", anchor="middle", size=10.5, color=MUTED)
    d.text(271, 442, f"keys x {rows} lanes, up to {kb(keys * rows)}", anchor="middle", size=11, color=MUTED)
    d.arrow((271, 184), (271, 256))
    d.arrow((108, 307), (190, 307))

    # Softmax
    d.arrow((350, 352), (424, 352))
    d.rect(430, 262, 150, 164, PALE_ORANGE, ORANGE)
    d.text(505, 346, "Pᵀ", anchor="middle", bold=True)
    d.text(505, 364, "in the memory of Sᵀ", anchor="middle", size=10.5, color=MUTED)
    d.lines(387, 316, ["mask,", "exp(s − m)"], anchor="middle", size=11, color=MUTED, step=14)

    # V and O^T
    d.rect(640, 262, 150, 84, PALE_BLUE, BLUE)
    d.text(715, 302, "Oᵀ = Oᵀ r + Vᵀ Pᵀ", anchor="middle", bold=True)
    d.text(715, 320, "r = exp(m_old − m)", anchor="middle", size=10.5, color=MUTED)
    d.text(715, 254, f"Dv x {rows} lanes, {kb(D * rows)}", anchor="middle", size=11, color=MUTED)
    d.rect(640, 384, 64, 76, PALE_GREEN, GREEN)
    d.text(672, 426, "V", anchor="middle", bold=True)
    d.lines(714, 416, ["keys x Dv,", "scalars,", "broadcast"], size=11, color=MUTED, step=14)
    d.arrow((584, 304), (634, 304))
    d.arrow((672, 380), (672, 352))
    d.arrow((794, 304), (860, 304))
    d.lines(840, 274, ["once, at", "the end"], anchor="middle", size=11, color=MUTED, step=14)
    d.rect(866, 262, 84, 84, PALE_BLUE, BLUE)
    d.text(908, 308, "O", anchor="middle", bold=True)
    d.lines(908, 364, ["transposed", "back, times", "1 / l"], anchor="middle", size=11, color=MUTED, step=14)

    # What stays from tile to tile
    d.rect(430, 96, 150, 26, PALE_PURPLE, PURPLE)
    d.text(505, 113, "m: row maximum", anchor="middle", size=11.5)
    d.rect(430, 128, 150, 26, PALE_PURPLE, PURPLE)
    d.text(505, 145, "l: row sum", anchor="middle", size=11.5)
    d.lines(
        596,
        112,
        ["one max and one add for each vector of scores;", "nothing goes across lanes"],
        size=11.5,
        color=MUTED,
    )
    d.arrow((505, 158), (505, 256))

    d.lines(
        40,
        500,
        [
            "Registers: the 24 accumulators of one micro-kernel. First-level cache: Qᵀ, which every 6 keys meet.",
            "Second level: Sᵀ and Oᵀ, read and written in order. Beyond: K and V, which stream past once for an item.",
        ],
        size=12.5,
        step=20,
    )
    return d


def cuda_forward() -> Drawing:
    """Who owns what in a CTA, and what is under way while."""
    text = (ROOT / "csrc/cuda/heuristics.h").read_text(encoding="utf-8")
    tiles = re.search(r"return \{(128), (64), (4)\};\n\}", text)
    assert tiles, "the plain tiles of forward_tiles are not those of the figure"
    block_m, block_n, warps = (int(n) for n in tiles.groups())
    D = 64
    shared = (block_m + 2 * block_n) * D * 2 // 1024
    d = Drawing(980, 620)
    d.text(24, 30, f"One CTA: {block_m} query rows of one (batch, head), {warps} warps", bold=True, size=15)
    d.text(24, 50, f"The plain kernel for 16-bit heads of {D}: {shared} KB of shared memory.", size=12, color=MUTED)

    d.text(40, 88, "shared memory", size=12, bold=True, color=MUTED)
    d.rect(40, 98, 110, 200, PALE_BLUE, BLUE)
    d.text(95, 118, f"q  {block_m} x {D}", anchor="middle", bold=True)
    for w in range(warps):
        if w:
            d.line([(40, 98 + 50 * w), (150, 98 + 50 * w)], BLUE, 1, "3 3")
        d.text(95, 98 + 50 * w + 36, f"rows of warp {w}", anchor="middle", size=11, color=MUTED)
    d.rect(190, 98, 110, 100, PALE_GREEN, GREEN)
    d.text(245, 144, f"k  {block_n} x {D}", anchor="middle", bold=True)
    d.text(245, 162, "one tile", anchor="middle", size=11, color=MUTED)
    d.rect(190, 198, 110, 100, PALE_PURPLE, PURPLE)
    d.text(245, 244, f"v  {block_n} x {D}", anchor="middle", bold=True)
    d.text(245, 262, "one tile", anchor="middle", size=11, color=MUTED)
    d.lines(
        40,
        322,
        [
            "Rows of 16-byte chunks; chunk c of row r lies at place c ^ (r % 8),",
            "so that what ldmatrix reads at once lies in different banks.",
        ],
        size=11.5,
        color=MUTED,
        step=16,
    )

    d.text(470, 88, f"registers of a warp: {block_m // warps} whole rows", size=12, bold=True, color=MUTED)
    d.rect(470, 98, 120, 90, PALE_ORANGE, ORANGE)
    d.text(530, 138, "s, then p", anchor="middle", bold=True)
    d.text(530, 156, f"{block_m // warps} x {block_n}, float32", anchor="middle", size=11, color=MUTED)
    d.rect(650, 98, 120, 90, PALE_BLUE, BLUE)
    d.text(710, 138, "o", anchor="middle", bold=True)
    d.text(710, 156, f"{block_m // warps} x {D}, float32", anchor="middle", size=11, color=MUTED)
    d.rect(830, 98, 110, 90, PALE, FAINT)
    d.text(885, 138, "m, l", anchor="middle", bold=True)
    d.text(885, 156, "of each row", anchor="middle", size=11, color=MUTED)
    d.arrow((304, 132), (464, 132))
    d.text(384, 122, "gemm_nt: q kᵀ", anchor="middle", size=11.5, mono=True)
    d.arrow((304, 248), (710, 248), (710, 194))
    d.arrow((594, 142), (644, 142))
    d.text(484, 238, "gemm_rn: p v, p from registers", anchor="middle", size=11.5, mono=True)
    d.lines(
        470,
        286,
        [
            "p never sees shared memory: what gemm_nt leaves in a lane is,",
            "rounded and packed, the left operand of gemm_rn.",
            "No warp shares a row with another: the softmax has no barrier.",
        ],
        size=11.5,
        color=MUTED,
        step=16,
    )

    # The pipeline of two tiles
    y = 396
    d.text(
        24,
        y,
        "Two tiles of keys, the last one first (lengths mean nothing: no kernel has been timed)",
        bold=True,
        size=13.5,
    )
    left, tile_width = 130, 420
    d.text(left - 12, y + 52, "copies", anchor="end", size=12, bold=True, color=MUTED)
    d.text(left - 12, y + 112, "arithmetic", anchor="end", size=12, bold=True, color=MUTED)
    for n in range(2):
        x = left + n * tile_width
        name = "n" if n == 0 else "n − 1"
        d.rect(x + 8, y + 34, 236, 28, PALE_PURPLE, PURPLE)
        d.text(x + 126, y + 52, f"v of tile {name}", anchor="middle", size=12)
        d.rect(x + 256, y + 34, 156, 28, PALE_GREEN, GREEN)
        d.text(x + 334, y + 52, "k of tile n − 1" if n == 0 else "k of tile n − 2", anchor="middle", size=12)
        for at, width, words, fill, line in (
            (8, 104, "s = q kᵀ", PALE_ORANGE, ORANGE),
            (116, 128, "mask, softmax", PALE_ORANGE, ORANGE),
            (256, 156, "o += p v", PALE_BLUE, BLUE),
        ):
            d.rect(x + at, y + 94, width, 28, fill, line)
            d.text(x + at + width / 2, y + 112, words, anchor="middle", size=12)
    for n, x in enumerate((left, left + 250, left + tile_width, left + tile_width + 250, left + 2 * tile_width)):
        if n == 4:
            continue
        d.line([(x + 2, y + 24), (x + 2, y + 136)], INK, 2.5)
        words = ("k has arrived,", "v has been used") if n % 2 == 0 else ("v has arrived,", "k has been used")
        d.lines(x + 2, y + 154, words, size=11, color=MUTED, step=14, anchor="middle")
    d.text(left, y + 206, "Black: cp.async.wait_group and a barrier of the CTA, two for each tile.", size=12)
    return d


def emulator() -> Drawing:
    """Fibers, collectives, barriers, and what is known of each word of shared memory."""
    d = Drawing(980, 600)
    d.text(24, 30, "One block on the emulator", bold=True, size=15)
    d.text(
        24,
        50,
        "The kernel's own source, compiled for the host; every thread is a fiber, and one of them runs at a time.",
        size=12,
        color=MUTED,
    )

    # lanes of a warp
    x, y = 40, 84
    d.text(
        x,
        y,
        "A warp between two collectives: lanes run one after the other, in an order drawn at random",
        size=12.5,
        bold=True,
    )
    order = [(5 + 7 * n) % 32 for n in range(5)]  # from a lane, in steps of an odd number, both drawn
    for n, lane in enumerate(order):
        d.rect(x + n * 92, y + 18, 84, 30, PALE_BLUE, BLUE)
        d.text(x + n * 92 + 42, y + 37, f"lane {lane}", anchor="middle", size=12)
        if n:
            d.arrow((x + n * 92 - 8, y + 33), (x + n * 92, y + 33))
    d.text(x + 472, y + 38, "...", size=14)
    d.rect(x + 500, y + 10, 250, 46, PALE_ORANGE, ORANGE)
    d.text(x + 625, y + 29, "mma, shuffle, ldmatrix, sync_warp", anchor="middle", size=12, bold=True)
    d.text(x + 625, y + 46, "the last to arrive computes it for all 32", anchor="middle", size=11, color=MUTED)
    d.lines(x + 766, y + 26, ["lanes at different", "places: a report"], size=11.5, color=ORANGE, step=15)

    # warps and the barrier
    y = 184
    d.text(x, y, "Warps change places at barriers and, at random, after collectives", size=12.5, bold=True)
    spans = [(0, (30, 150)), (1, (160, 250)), (2, (260, 380)), (3, (390, 470))]
    for w, (a, b) in spans:
        yy = y + 16 + 30 * w
        d.text(x + 4, yy + 17, f"warp {w}", size=11.5, color=MUTED)
        d.line([(x + 54, yy + 13), (x + 920, yy + 13)], FAINT)
        d.rect(x + 30 + a, yy, b - a, 24, PALE_GREEN, GREEN)
    again = [(2, (530, 620)), (0, (630, 720)), (3, (730, 800)), (1, (810, 890))]
    for w, (a, b) in again:
        d.rect(x + 30 + a, y + 16 + 30 * w, b - a, 24, PALE_GREEN, GREEN)
    d.line([(x + 528, y + 10), (x + 528, y + 140)], INK, 2.5)
    d.text(x + 528, y + 156, "sync_block: clock + 1", anchor="middle", size=11.5)
    d.text(x + 920, y + 156, "who never comes is reported, not waited for", size=11.5, color=ORANGE, anchor="end")

    # shared memory
    y = 380
    d.text(
        x,
        y,
        "Shared memory starts as NaN, and keeps for each word who wrote and who read it, and when",
        size=12.5,
        bold=True,
    )
    names = [
        ("write, thread 5", "clock 7", PALE_BLUE, BLUE),
        ("sync_block", "clock 8", PAPER, INK),
        ("read, thread 70", "clock 8: ordered", PALE_GREEN, GREEN),
        ("write, thread 40", "clock 8: a race with 70", PALE_ORANGE, ORANGE),
    ]
    for n, (who, when, fill, line) in enumerate(names):
        at = x + n * 224
        d.rect(at, y + 16, 196, 48, fill, line)
        d.text(at + 98, y + 37, who, anchor="middle", size=12, bold=True)
        d.text(at + 98, y + 54, when, anchor="middle", size=11, color=MUTED)
        if n:
            d.arrow((at - 28, y + 40), (at, y + 40))
    d.text(
        x,
        y + 86,
        "A report names both call sites; of accesses out of bounds, misaligned, or to what is not yet copied, too.",
        size=11.5,
        color=MUTED,
    )

    # copies
    y = 504
    d.text(x, y, "An asynchronous copy lands when it is least convenient", size=12.5, bold=True)
    d.line([(x, y + 44), (x + 800, y + 44)], INK, 1.5)
    for at, words in ((20, "cp_async"), (400, "..."), (740, "cp_async_wait")):
        d.line([(x + at, y + 38), (x + at, y + 50)], INK, 1.5)
        d.text(x + at, y + 68, words, anchor="middle", size=11.5, mono=True)
    for at, words in ((40, "at issue,"), (370, "in between,"), (650, "or as late as the waits allow")):
        d.text(x + at, y + 32, words, size=11.5, color=PURPLE)
    return d


# --- Measurements -----------------------------------------------------------------------------------------------------


def results(name: str) -> dict[str, Any]:
    """One of the committed results of the benchmark."""
    document: dict[str, Any] = json.loads((ROOT / "bench" / "results" / name).read_text(encoding="utf-8"))
    return document


def measured_on(document: dict[str, Any]) -> str:
    m = document["machine"]
    return f"{m['cpu']}, {m['isa']}, {m['threads']} threads, torch {m['versions']['torch']}, {m['date'][:10]}"


class Axes:
    """Both axes logarithmic: a frame, its grid, and places in it."""

    def __init__(
        self, d: Drawing, box: tuple[float, float, float, float], x: tuple[float, float], y: tuple[float, float]
    ) -> None:
        self.d, self.box, self.x, self.y = d, box, x, y
        left, top, width, height = box
        d.rect(left, top, width, height, PAPER, FAINT)

    def at(self, x: float, y: float) -> tuple[float, float]:
        left, top, width, height = self.box
        (x0, x1), (y0, y1) = self.x, self.y
        across = math.log(x / x0) / math.log(x1 / x0)
        up = math.log(y / y0) / math.log(y1 / y0)
        return round(left + across * width, 1), round(top + (1 - up) * height, 1)

    def ticks_x(self, values: Sequence[float], unit: str = "") -> None:
        _, top, _, height = self.box
        for value in values:
            x, _ = self.at(value, self.y[0])
            self.d.line([(x, top), (x, top + height)], FAINT, 0.6)
            self.d.text(x, top + height + 15, f"{value:g}{unit}", size=10.5, color=MUTED, anchor="middle")

    def ticks_y(self, values: Sequence[float], unit: str = "") -> None:
        left, _, width, _ = self.box
        for value in values:
            _, y = self.at(self.x[0], value)
            self.d.line([(left, y), (left + width, y)], FAINT, 0.6)
            self.d.text(left - 6, y + 4, f"{value:g}{unit}", size=10.5, color=MUTED, anchor="end")

    def dot(self, x: float, y: float, color: str, radius: float = 3.5, *, hollow: bool = False) -> None:
        cx, cy = self.at(x, y)
        fill = PAPER if hollow else color
        self.d.shapes.append(f'<circle cx="{cx:g}" cy="{cy:g}" r="{radius:g}" fill="{fill}" stroke="{color}"/>')


def growth() -> Drawing:
    """Time and memory by length, for what plain code computes with a matrix of scores or worse."""
    document = results("cpu-zen4-textbook.json")
    points = document["growth"]
    d = Drawing(980, 560)
    d.text(24, 28, "Growth with the length: fastattn and eager PyTorch", bold=True, size=15)
    d.text(24, 47, f"float32. {measured_on(document)}", size=11.5, color=MUTED)
    colors = {"fastattn": ORANGE, "eager": BLUE}
    families = list(dict.fromkeys(point["family"] for point in points))
    lengths = sorted({point["length"] for point in points})
    for column, family in enumerate(families):
        left = 86 + 308 * column
        d.text(left, 80, family, bold=True, size=13)
        for row, (quantity, limits, ticks) in enumerate(
            (("ms", (1, 10000), (1, 10, 100, 1000, 10000)), ("MiB", (0.1, 10000), (0.1, 1, 10, 100, 1000, 10000)))
        ):
            axes = Axes(d, (left, 92 + 222 * row, 240, 180), (lengths[0] / 1.2, lengths[-1] * 1.2), limits)
            axes.ticks_x(lengths)
            axes.ticks_y(ticks)
            if column == 0:
                words = "ms" if row == 0 else "MiB beyond inputs and results"
                d.text(26, 92 + 222 * row + 90, words, size=11.5, color=MUTED, anchor="middle", turned=True)
            for name, color in colors.items():
                own = [p for p in points if (p["family"], p["name"]) == (family, name) and p["ms"] is not None]
                values = [p["ms"] if quantity == "ms" else max(p["extra_bytes"] / 2**20, limits[0]) for p in own]
                places = [(p["length"], value) for p, value in zip(own, values, strict=True)]
                d.line([axes.at(*place) for place in places], color, 1.8)
                for place in places:
                    axes.dot(*place, color)
    d.line([(86, 542), (110, 542)], ORANGE, 1.8)
    d.text(118, 546, "fastattn", size=12)
    d.line([(200, 542), (224, 542)], BLUE, 1.8)
    d.text(232, 546, "eager PyTorch; where its line ends, it had not the memory", size=12)
    return d


def sweep() -> Drawing:
    """Every shape of the sweep as a dot."""
    document = results("cpu-zen4.json")
    points = [point for point in document["sweep"]["points"] if not point["error"]]
    d = Drawing(900, 470)
    d.text(24, 28, f"{len(points)} shapes against PyTorch SDPA, drawn at random", bold=True, size=15)
    d.text(24, 47, measured_on(document), size=11.5, color=MUTED)
    times, ratios = [point["sdpa_us"] for point in points], [point["ratio"] for point in points]
    low, high = 2.0 ** math.floor(math.log2(min(*ratios, 1.0))), 2.0 ** math.ceil(math.log2(max(ratios)))
    limits = (10.0 ** math.floor(math.log10(min(times))), 10.0 ** math.ceil(math.log10(max(times))))
    axes = Axes(d, (80, 66, 790, 330), limits, (low, high))
    axes.ticks_x([10.0**n for n in range(round(math.log10(limits[0])), round(math.log10(limits[1])) + 1)])
    axes.ticks_y([2.0**n for n in range(round(math.log2(low)), round(math.log2(high)) + 1)], "×")
    d.line([axes.at(limits[0], 1.0), axes.at(limits[1], 1.0)], INK, 1.2)
    colors = {"fp32": BLUE, "bf16": ORANGE, "fp16": GREEN}
    for point in points:
        dtype, direction = point["id"].split("-")[:2]
        axes.dot(point["sdpa_us"], point["ratio"], colors[dtype], 4, hollow=direction == "step")
    d.text(475, 430, "time of PyTorch SDPA, µs", size=12, color=MUTED, anchor="middle")
    d.text(26, 231, "times as fast", size=12, color=MUTED, anchor="middle", turned=True)
    for n, (dtype, color) in enumerate(colors.items()):
        d.rect(80 + 110 * n, 446, 12, 12, color)
        d.text(98 + 110 * n, 457, {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[dtype], size=12)
    d.text(420, 457, "filled: forward; hollow: forward and backward", size=12)
    return d


FIGURES: dict[str, Callable[[], Drawing]] = {
    "causal-alignment": causal_alignment,
    "windows": windows,
    "lengths": lengths,
    "tiles": tiles,
    "cpu-forward": cpu_forward,
    "cuda-forward": cuda_forward,
    "emulator": emulator,
    "growth": growth,
    "sweep": sweep,
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw the figures of the documentation.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 where a figure is not new")
    options = parser.parse_args()
    changed = []
    for name, draw in FIGURES.items():
        path, text = DOCS / f"{name}.svg", draw().svg()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            changed.append(path.name)
            if not options.check:
                path.write_text(text, encoding="utf-8")
    if changed:
        print(f"{'not what the code says' if options.check else 'drawn'}: {', '.join(changed)}")
    return int(options.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
