"""Pictures of attention weights: labelled heatmaps, a grid of heads, image patches laid over the image.

matplotlib is an optional extra and is imported when something is drawn, not before.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike, NDArray

__all__ = ["plot_attention"]

_CELL_INCHES = 0.45  # side of a cell, as long as the axes stay within:
_AXES_INCHES = (0.8, 9.0)
_PANEL_INCHES = (0.8, 3.6)  # where there are several
_COLORBAR_INCHES = 0.9
_ROW_INCHES = 12.0  # as many images abreast as fit
_FONT_POINTS = (4.5, 10.0)
_GLYPH_WIDTH = 0.6  # mean width of a character, in font sizes
_OVERLAY_COLOR = "#ff7a00"
_OVERLAY_OPACITY = 0.85  # of the largest weight; 0 is transparent


def plot_attention(
    weights: Tensor | ArrayLike,
    xlabels: Sequence[Any] | None = None,
    ylabels: Sequence[Any] | None = None,
    ax: Axes | Sequence[Axes] | NDArray[Any] | None = None,
    *,
    image: Tensor | ArrayLike | None = None,
    patches: tuple[int, int] | None = None,
    smooth: bool = True,
    annotate: str | None = None,
    cmap: Any = None,
    vmax: float | None = None,
    colorbar: bool = True,
    label: str = "attention weight",
) -> Any:
    """Draws attention weights with matplotlib: source (keys) along x, target (queries) along y.

    One matrix is one heatmap. Heads are a grid of heatmaps. With an image, whose patches are the keys, every query is
    a panel: the image, with the query's weights laid over its patches. All panels share one colour scale.

    Nothing is shown and nothing is written: call ``ax.figure.savefig(path)`` or ``matplotlib.pyplot.show()``, and the
    methods of the axes returned for titles and the like. matplotlib comes with ``pip install fastattn[plot]``.

    Args:
        weights: (Lq, Lk), (Lk,) for one query, or (H, Lq, Lk) for heads, as attention_weights returns them for one
            batch element. A tensor of any dtype, on any device, with a gradient or without; or anything that NumPy
            makes a real array of. Usually probabilities, but any finite numbers will do.
        xlabels: Lk labels, one for each key; a string labels key by key with its characters. Default: numbers. None
            with an image, whose keys are patches.
        ylabels: Lq labels, one for each query, likewise. With an image: the panels' titles.
        ax: Where to draw: Axes, or for several panels at least as many Axes (an array in any shape, filled row by row).
            Default: a new figure of a size to match, made with matplotlib.pyplot.
        image: (height, width), (height, width, C) or (C, height, width), C = 1, 3 or 4 (grey, RGB, RGBA). Colours are
            integers in 0..255 or floats in 0..1; grey values of any range are stretched.
        patches: (rows, columns) of the image's patches, Lk = rows * columns, keys in row-major order. Default: the
            grid that makes patches square.
        smooth: Interpolate between the centres of patches; otherwise every patch has one colour.
        annotate: A format such as ".2f", to write each weight into its cell. Not with an image.
        cmap: A matplotlib colour map or its name. Default: "Blues"; over an image, orange. Over an image weak weights
            are transparent.
        vmax: The weight that has the strongest colour, a number. Default: the largest weight of all panels.
        colorbar: Whether to draw a colour bar.
        label: What the colour bar says.

    Returns:
        The matplotlib Axes, if weights is one matrix (with an image: one row). Otherwise a NumPy array of Axes: (H,)
        for heads, (Lq,) for the words over an image, (H, Lq) for both.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: dimensions, labels, axes or a grid of patches that do not fit; weights that are not finite; nothing
            to draw.
        TypeError: weights or an image that are no real numbers.

    Source: the alignment pictures of Bahdanau et al. (2015), figure 3; with an image, Xu et al. (2015), figure 5.

    Example:
        >>> import torch, fastattn
        >>> q, k = torch.randn(1, 4, 3, 16), torch.randn(1, 4, 5, 16)
        >>> p = fastattn.attention_weights(q, k)[0]  # (4, 3, 5)
        >>> axes = fastattn.plot_attention(p, "the cat sat down .".split(), "le chat s'assit".split())
        >>> axes.shape, axes[0].get_title()
        ((4,), 'head 0')
    """
    _require_matplotlib()
    values = _array("weights", weights)
    if values.ndim not in (1, 2, 3):
        raise ValueError(
            f"fastattn: weights has shape {values.shape}; it must be (Lk,), (Lq, Lk) or (H, Lq, Lk): choose one batch "
            "element with weights[0]."
        )
    if values.size == 0:
        raise ValueError(f"fastattn: weights has shape {values.shape}; there must be something to draw.")
    shape = values.shape[:-1]
    values = values[None] if values.ndim == 1 else values
    Lq, Lk = values.shape[-2:]
    columns = _labels("xlabels", xlabels, Lk, "keys")
    rows = _labels("ylabels", ylabels, Lq, "queries")
    limits = _limits(values, vmax)
    if annotate is not None:
        try:
            format(0.0, annotate)
        except (TypeError, ValueError):
            raise ValueError(
                f"fastattn: annotate is {annotate!r}; it must be a format of numbers: try '.2f'."
            ) from None

    draw: Callable[[Axes, NDArray[Any]], Any]
    if image is None:
        if patches is not None:
            raise ValueError("fastattn: patches is given without an image; pass image too, or leave patches out.")
        panels = values.reshape(-1, Lq, Lk)
        shape = shape[:-1] if len(shape) == 2 else ()
        grid = math.ceil(math.sqrt(len(panels)))
        inches = _heatmap_inches(Lq, Lk, rows, columns, several=len(panels) > 1)
        titles = [f"head {h}" for h in range(len(panels))] if shape else None

        def draw(axes: Axes, panel: NDArray[Any]) -> Any:
            return _heatmap(axes, panel, rows, columns, limits, cmap or "Blues", annotate)
    else:
        for name, given in (("xlabels", columns), ("annotate", annotate)):
            if given is not None:
                raise ValueError(
                    f"fastattn: {name} is given with an image; its keys are patches, which are not labelled: leave "
                    f"{name} out."
                )
        picture = _picture(image)
        panels = values.reshape(-1, *_patch_grid(patches, Lk, picture))
        inches = _picture_inches(picture, several=len(panels) > 1)
        grid = Lq if len(shape) == 2 else min(len(panels), max(1, int(_ROW_INCHES / inches[0])))
        titles = rows if rows is not None else [f"query {i}" for i in range(Lq)] if shape else None
        if titles is not None and len(shape) == 2:
            titles = [f"head {h}: {title}" for h in range(shape[0]) for title in titles]

        def draw(axes: Axes, panel: NDArray[Any]) -> Any:
            return _overlay(axes, panel, picture, limits, cmap, smooth)

    axes = _axes(ax, len(panels), grid, inches)
    drawn = [draw(a, panel) for a, panel in zip(axes, panels, strict=True)]
    for a, title in zip(axes, titles or [], strict=False):
        a.set_title(title, fontsize=_FONT_POINTS[1], parse_math=False)
    if colorbar:
        bar = axes[0].figure.colorbar(drawn[0], ax=list(axes), fraction=0.05, pad=0.02, aspect=25, label=label)
        bar.outline.set_visible(False)
    return axes.reshape(shape) if shape else axes[0]


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401 only to see that it is there
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise ImportError(
            "fastattn: matplotlib is not installed, and plot_attention draws with it; install it with pip install "
            "fastattn[plot]."
        ) from None


def _array(name: str, value: Any) -> NDArray[Any]:
    """A NumPy array of finite floats, or of integers as they are."""
    import numpy as np

    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_nested or value.is_quantized or value.is_meta:
            kind = "nested" if value.is_nested else "meta" if value.is_meta else "quantized or not strided"
            raise TypeError(f"fastattn: {name} is a {kind} tensor; it must be a dense tensor of numbers.")
        value = value.detach().cpu().resolve_neg()
        # NumPy has no bfloat16 nor float8, and float16 is too coarse to scale colours with.
        value = (value.float() if value.is_floating_point() and value.dtype != torch.float64 else value).numpy()
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"fastattn: {name} is no array: {error}; its rows must be of one length.") from None
    if array.dtype.kind not in "fiub":
        raise TypeError(f"fastattn: {name} has dtype {array.dtype}; it must hold real numbers.")
    if array.dtype.kind in "fb":
        array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise ValueError(
            f"fastattn: {name} holds NaN or infinity; every value must be finite: look where they come from, or "
            "replace them with torch.nan_to_num."
        )
    return array


def _labels(name: str, labels: Sequence[Any] | None, count: int, of: str) -> list[str] | None:
    if labels is None:
        return None
    if not isinstance(labels, Iterable):
        raise TypeError(f"fastattn: {name} is a {type(labels).__name__}; it must be a sequence of labels.")
    texts = [str(text) for text in labels]
    if len(texts) != count:
        raise ValueError(
            f"fastattn: {name} has {len(texts)} labels but weights has {count} {of}; there must be one label for each."
        )
    return texts


def _limits(values: NDArray[Any], vmax: Any) -> tuple[float, float]:
    """The values of the weakest and of the strongest colour."""
    # Colours begin at 0, or rows of nearly equal weights would look as if they differed. Scores may be negative.
    low = min(0.0, float(values.min()))
    if vmax is None:
        high = float(values.max())
        return low, (high if high > low else low + 1.0)
    try:
        # The largest weight of other panels is often a tensor, or a number of NumPy.
        high = math.nan if isinstance(vmax, str) else float(vmax)
    except (TypeError, ValueError, RuntimeError):
        high = math.nan
    if not low < high < math.inf:
        raise ValueError(f"fastattn: vmax is {vmax!r}; it must be a finite number above {low:g}, where colours begin.")
    return low, high


def _picture(image: Any) -> NDArray[Any]:
    """(height, width) grey, or (height, width, 3 or 4) with integers in 0..255 or floats in 0..1."""
    import numpy as np

    picture = _array("image", image)
    given = picture.shape
    if picture.ndim == 3 and given[-1] not in (1, 3, 4) and given[0] in (1, 3, 4):
        picture = np.moveaxis(picture, 0, -1)
    if picture.ndim == 3 and picture.shape[-1] == 1:
        picture = picture[..., 0]
    if picture.size == 0 or not (picture.ndim == 2 or (picture.ndim == 3 and picture.shape[-1] in (3, 4))):
        raise ValueError(
            f"fastattn: image has shape {given}; it must be (height, width), (height, width, C) or (C, height, width) "
            "with C = 1, 3 or 4."
        )
    top: int = 1 if picture.dtype.kind == "f" else 255
    if picture.ndim == 3 and not 0 <= picture.min() <= picture.max() <= top:
        raise ValueError(
            f"fastattn: image has colours in {picture.min():g}..{picture.max():g}; floats must lie in 0..1 and "
            "integers in 0..255: scale it."
        )
    return picture


def _patch_grid(patches: tuple[int, int] | None, Lk: int, picture: NDArray[Any]) -> tuple[int, int]:
    """(rows, columns) of the patches."""
    height, width = picture.shape[:2]
    if patches is None:
        # rows * columns = Lk and rows / columns = height / width
        rows = math.isqrt(Lk * height // width)
        if rows == 0 or rows * rows * width != Lk * height or Lk % rows:
            raise ValueError(
                f"fastattn: weights has {Lk} keys, which are no grid of square patches of an image of {height} x "
                f"{width} pixels; pass patches=(rows, columns)."
            )
        return rows, Lk // rows
    try:
        rows, columns = (operator.index(n) for n in patches)
    except (TypeError, ValueError):
        raise ValueError(f"fastattn: patches is {patches!r}; it must be two integers (rows, columns).") from None
    if rows < 1 or rows * columns != Lk:
        raise ValueError(
            f"fastattn: patches is {rows} x {columns} but weights has {Lk} keys; there must be one key for each patch."
        )
    return rows, columns


def _axes(ax: Any, count: int, columns: int, inches: tuple[float, float]) -> NDArray[Any]:
    """(count,) Axes: those given, or those of a new figure, a grid of so many columns with so many inches for each."""
    import numpy as np
    from matplotlib.axes import Axes

    if ax is None:
        from matplotlib import pyplot

        rows = math.ceil(count / columns)
        size = (columns * inches[0] + _COLORBAR_INCHES, rows * inches[1])
        figure = pyplot.figure(figsize=size, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for unused in axes[count:]:
            unused.remove()
        return axes[:count]
    axes = np.asarray(ax, dtype=object).ravel()
    for one in axes:
        if not isinstance(one, Axes):
            raise TypeError(
                f"fastattn: ax holds a {type(one).__name__}; it must be matplotlib Axes, or an array of them."
            )
    if len(axes) < count:
        raise ValueError(f"fastattn: ax has {len(axes)} Axes but there are {count} panels; pass one for each, or None.")
    return axes[:count]


def _heatmap_inches(
    Lq: int, Lk: int, rows: list[str] | None, columns: list[str] | None, *, several: bool
) -> tuple[float, float]:
    """Width and height of a heatmap with its labels: square cells, as large as fits."""
    low, high = _PANEL_INCHES if several else _AXES_INCHES
    cell = min(_CELL_INCHES, high / max(Lq, Lk))
    glyph = _GLYPH_WIDTH * _font_points(cell) / 72
    left, below = (glyph * max(map(len, texts)) if texts else 0.3 for texts in (rows, columns))
    return max(low, cell * Lk) + left + 0.3, max(low, cell * Lq) + below + 0.5


def _picture_inches(picture: NDArray[Any], *, several: bool) -> tuple[float, float]:
    height, width = picture.shape[:2]
    side = 2.4 if several else 4.5  # of the longer edge, but thin images get some height
    scale = max(side / max(height, width), 1.0 / min(height, width))
    return min(scale * width, 9.0) + 0.1, min(scale * height, 9.0) + 0.4


def _font_points(cell_inches: float) -> float:
    low, high = _FONT_POINTS
    return min(high, max(low, 0.75 * 72 * cell_inches))


def _heatmap(
    ax: Axes,
    weights: NDArray[Any],  # (Lq, Lk)
    rows: list[str] | None,
    columns: list[str] | None,
    limits: tuple[float, float],
    cmap: Any,
    annotate: str | None,
) -> Any:
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    Lq, Lk = weights.shape
    drawn = ax.imshow(weights, cmap=cmap, vmin=limits[0], vmax=limits[1], aspect="auto", interpolation="nearest")
    extent = ax.get_window_extent()
    cell_width, cell_height = extent.width / ax.figure.dpi / Lk, extent.height / ax.figure.dpi / Lq
    if columns is not None:
        size = _font_points(cell_width)
        fits = _GLYPH_WIDTH * size / 72 * (1 + max(map(len, columns))) <= cell_width
        turn: dict[str, Any] = {} if fits else {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
        if not fits and cell_width < 0.2:
            turn["rotation"] = 90  # slanted lines would touch
            turn["va"] = "center"
        ax.set_xticks(range(Lk), columns, fontsize=size, parse_math=False, **turn)
    else:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlabel("key")
    if rows is not None:
        ax.set_yticks(range(Lq), rows, fontsize=_font_points(cell_height), parse_math=False)
    else:
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_ylabel("query")
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    if annotate is not None:
        size = _font_points(min(cell_width / 2, cell_height))
        for (i, j), value in np.ndenumerate(weights):
            red, green, blue, _ = drawn.cmap(drawn.norm(value))
            dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
            ax.text(
                j,
                i,
                format(value, annotate),
                ha="center",
                va="center",
                fontsize=size,
                color="white" if dark else "black",
            )
    return drawn


def _overlay(
    ax: Axes,
    weights: NDArray[Any],  # (patch rows, patch columns)
    picture: NDArray[Any],
    limits: tuple[float, float],
    cmap: Any,
    smooth: bool,
) -> Any:
    import matplotlib
    import numpy as np
    from matplotlib.colors import ListedColormap

    height, width = picture.shape[:2]
    ax.imshow(picture, cmap="gray")
    # Opacity is part of the colour map, so that the colour bar shows it too.
    colors = matplotlib.colormaps.get_cmap(cmap or ListedColormap([_OVERLAY_COLOR]))(np.linspace(0, 1, 256))
    colors[:, 3] = np.linspace(0, _OVERLAY_OPACITY, 256)
    drawn = ax.imshow(
        weights,
        cmap=ListedColormap(colors),
        vmin=limits[0],
        vmax=limits[1],
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        interpolation="bilinear" if smooth else "nearest",
    )
    ax.set_axis_off()
    return drawn
