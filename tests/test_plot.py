"""plot_attention: what it draws, where, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastattn

ROOT = Path(__file__).resolve().parent.parent

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib, which draws, is not installed")
np = pytest.importorskip("numpy")

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    pyplot.close("all")


def texts(labels: Any) -> list[str]:
    return [label.get_text() for label in labels]


def drawn(ax: Any, which: int = 0) -> Any:
    """The array behind an image of the axes."""
    return np.asarray(ax.images[which].get_array())


def colorbar_label(ax: Any) -> str | None:
    """That of the figure's colour bar, or None without one."""
    bars = [a for a in ax.figure.axes if a.get_label() == "<colorbar>"]
    assert len(bars) <= 1
    return (bars[0].get_ylabel() or bars[0].get_xlabel()) if bars else None


SOURCE, TARGET = ["le", "chat", "dort"], ["the", "cat"]


def test_heatmap_has_labels_values_and_a_colour_bar():
    p = torch.tensor([[0.7, 0.2, 0.1], [0.0, 0.9, 0.1]])
    ax = fastattn.plot_attention(p, SOURCE, TARGET)
    assert isinstance(ax, matplotlib.axes.Axes)
    np.testing.assert_array_equal(drawn(ax), p.double().numpy())
    assert texts(ax.get_xticklabels()) == SOURCE
    assert texts(ax.get_yticklabels()) == TARGET
    assert list(ax.get_xticks()) == [0, 1, 2]
    assert list(ax.get_yticks()) == [0, 1]
    assert colorbar_label(ax) == "attention weight"
    assert ax.images[0].get_clim() == (0, pytest.approx(0.9))
    ax.figure.canvas.draw()
    first, last = (ax.transData.transform((0, i))[1] for i in (0, 1))
    assert first > last, "the first target word is at the top"


def test_without_labels_there_are_numbers_and_names_of_the_sides():
    ax = fastattn.plot_attention(torch.rand(30, 40))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("key", "query")
    ax.figure.canvas.draw()
    assert all(text.lstrip("−-").isdigit() for text in texts(ax.get_xticklabels()))


def test_a_string_labels_with_its_characters():
    ax = fastattn.plot_attention(torch.rand(2, 5), "3 May", "ab")
    assert texts(ax.get_xticklabels()) == list("3 May")
    assert texts(ax.get_yticklabels()) == ["a", "b"]


def test_one_row_of_weights():
    ax = fastattn.plot_attention(torch.tensor([0.25, 0.75]), ["a", "b"], ["now"])
    np.testing.assert_array_equal(drawn(ax), [[0.25, 0.75]])
    assert texts(ax.get_yticklabels()) == ["now"]


@pytest.mark.parametrize("heads", [1, 3, 4])
def test_heads_in_a_grid(heads):
    p = torch.softmax(torch.randn(heads, 2, 3), -1)
    axes = fastattn.plot_attention(p, SOURCE, TARGET)
    assert isinstance(axes, np.ndarray)
    assert axes.shape == (heads,)
    for h, ax in enumerate(axes):
        assert ax.get_title() == f"head {h}"
        np.testing.assert_array_equal(drawn(ax), p[h].double().numpy())
        assert ax.images[0].get_clim() == (0, pytest.approx(float(p.max()))), "one scale for all"
        assert texts(ax.get_xticklabels()) == SOURCE
    assert len(axes[0].figure.axes) == heads + 1, "the heads, a colour bar and nothing else"


def test_words_over_an_image():
    p = torch.softmax(torch.randn(2, 8), -1)
    image = torch.rand(8, 16)
    axes = fastattn.plot_attention(p, None, TARGET, image=image)  # 8 square patches: 2 x 4
    assert axes.shape == (2,)
    for i, ax in enumerate(axes):
        assert ax.get_title() == TARGET[i]
        np.testing.assert_allclose(drawn(ax, 0), image.numpy())
        np.testing.assert_allclose(drawn(ax, 1), p[i].view(2, 4).double().numpy())
        assert ax.images[0].get_extent() == ax.images[1].get_extent(), "patches cover the image"
    assert colorbar_label(axes[0]) == "attention weight"


def rendered(ax: Any) -> Any:
    """The pixels of the axes, (height, width, 3) in 0..255."""
    figure = ax.figure
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int)
    box = ax.get_window_extent()
    top = pixels.shape[0] - round(box.y1)
    return pixels[top : top + round(box.height), round(box.x0) : round(box.x1)]


@pytest.mark.parametrize("smooth", [True, False])
def test_the_patch_attended_to_is_the_one_that_is_coloured(smooth):
    p = torch.zeros(6)
    p[5] = 1.0  # last row, last column of 2 x 3
    ax = fastattn.plot_attention(p, image=torch.zeros(40, 60), smooth=smooth, colorbar=False)
    pixels = rendered(ax)
    height, width = pixels.shape[:2]
    patch = pixels[height // 2 :, 2 * width // 3 :]
    assert patch[patch.shape[0] // 2, patch.shape[1] // 2].sum() > 200
    assert pixels[: height // 4].max() == 0, "a weight of 0 leaves the image as it is"
    assert (len(np.unique(patch[5:-5, 5:-5].reshape(-1, 3), axis=0)) > 10) == smooth


def test_heads_and_words_over_an_image():
    p = torch.rand(3, 2, 4)
    axes = fastattn.plot_attention(p, ylabels=TARGET, image=np.zeros((4, 4)))
    assert axes.shape == (3, 2)
    np.testing.assert_allclose(drawn(axes[2, 1], 1), p[2, 1].view(2, 2).double().numpy())
    assert axes[2, 1].get_title() == "head 2: cat"


@pytest.mark.parametrize(
    ("image", "shape"),
    [
        (torch.rand(3, 8, 6), (8, 6, 3)),
        (torch.rand(8, 6, 4), (8, 6, 4)),
        (torch.rand(1, 8, 6), (8, 6)),
        (torch.rand(8, 6, 1), (8, 6)),
        (torch.randint(256, (8, 6, 3), dtype=torch.uint8), (8, 6, 3)),
        (torch.rand(8, 6) > 0.5, (8, 6)),
    ],
    ids=["CHW", "HWC", "1HW", "HW1", "uint8", "bool"],
)
def test_images_of_all_layouts(image, shape):
    ax = fastattn.plot_attention(torch.rand(12), image=image)  # 4 x 3 patches
    assert isinstance(ax, matplotlib.axes.Axes)
    assert drawn(ax, 0).shape == shape
    assert drawn(ax, 1).shape == (4, 3)


def test_patches_that_are_not_square():
    ax = fastattn.plot_attention(torch.rand(10), image=np.zeros((4, 4)), patches=(2, 5))
    assert drawn(ax, 1).shape == (2, 5)


@pytest.mark.parametrize(
    "convert",
    [
        lambda p: p,
        lambda p: p.requires_grad_(),
        lambda p: p.bfloat16(),
        lambda p: p.half(),
        lambda p: p.double(),
        lambda p: p.T.contiguous().T,
        lambda p: p.numpy(),
        lambda p: p.tolist(),
    ],
    ids=["float32", "requires_grad", "bfloat16", "float16", "float64", "strided", "numpy", "list"],
)
def test_weights_of_every_kind(convert):
    p = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125]])
    np.testing.assert_array_equal(drawn(fastattn.plot_attention(convert(p.clone()))), p.double().numpy())


def test_counts_and_booleans_are_drawn_too():
    one_hot = torch.nn.functional.one_hot(torch.tensor([2, 0]), 3)
    np.testing.assert_array_equal(drawn(fastattn.plot_attention(one_hot)), one_hot.numpy())
    np.testing.assert_array_equal(drawn(fastattn.plot_attention(one_hot.bool())), one_hot.numpy())


def test_what_attention_weights_returns():
    q, k = torch.randn(2, 2, 3, 8), torch.randn(2, 2, 3, 8)
    p = fastattn.attention_weights(q, k, causal=True)
    axes = fastattn.plot_attention(p[1])
    np.testing.assert_allclose(drawn(axes[1]), p[1, 1].double().numpy())


def test_axes_of_the_caller():
    figure, grid = pyplot.subplots(2, 2)
    p = torch.rand(3, 2, 3)
    axes = fastattn.plot_attention(p, SOURCE, TARGET, grid, colorbar=False)
    assert list(axes) == list(grid.ravel()[:3])
    assert not grid[1, 1].images
    assert len(figure.axes) == 4
    assert fastattn.plot_attention(p[0], ax=grid[1, 1], colorbar=False) is grid[1, 1]
    assert pyplot.get_fignums() == [figure.number], "no figure of its own"


def test_a_figure_without_pyplot():
    figure = matplotlib.figure.Figure()
    ax = fastattn.plot_attention(torch.rand(2, 3), SOURCE, TARGET, figure.subplots())
    figure.savefig(os.devnull, format="png")
    assert colorbar_label(ax) == "attention weight"
    assert not pyplot.get_fignums()


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (60, 60)])
def test_figures_fit_their_labels(size, tmp_path):
    """Nothing reaches beyond the picture, and it is neither tiny nor huge."""
    rows, columns = ([f"word number {n}" for n in range(count)] for count in size)
    ax = fastattn.plot_attention(torch.rand(size), columns, rows)
    ax.figure.savefig(tmp_path / "plot.png")
    width, height = ax.figure.get_size_inches()
    assert 1 < width < 14
    assert 1 < height < 14
    frame = ax.figure.bbox
    for label in (*ax.get_xticklabels(), *ax.get_yticklabels()):
        box = label.get_window_extent()
        assert box.x0 >= frame.x0 - 1, label.get_text()
        assert box.y0 >= frame.y0 - 1, label.get_text()
        assert box.y1 <= frame.y1 + 1, label.get_text()


def test_long_labels_are_turned_and_short_ones_are_not():
    short = fastattn.plot_attention(torch.rand(2, 3), "abc")
    assert {label.get_rotation() for label in short.get_xticklabels()} == {0}
    long = fastattn.plot_attention(torch.rand(2, 3), ["a", "b", "incomprehensibility"])
    assert {label.get_rotation() for label in long.get_xticklabels()} == {45}
    many = fastattn.plot_attention(torch.rand(2, 80), ["incomprehensibility"] * 80)
    assert {label.get_rotation() for label in many.get_xticklabels()} == {90}


def test_labels_are_no_mathematics(tmp_path):
    words = ["$x_1$", "costs $5", r"\alpha"]
    ax = fastattn.plot_attention(torch.rand(1, 3), words)
    ax.figure.savefig(tmp_path / "plot.png")  # "costs $5" as mathematics would raise here
    assert texts(ax.get_xticklabels()) == words
    assert not any(label.get_parse_math() for label in ax.get_xticklabels())


def test_annotated_cells_are_readable():
    ax = fastattn.plot_attention(torch.tensor([[0.0, 1.0], [0.25, 0.5]]), annotate=".2f")
    assert [text.get_text() for text in ax.texts] == ["0.00", "1.00", "0.25", "0.50"]
    assert [text.get_color() for text in ax.texts][:2] == ["black", "white"]


def test_limits_of_the_colours():
    for vmax in (1.0, 1, np.float32(1), torch.tensor(1.0)):
        assert fastattn.plot_attention(torch.full((2, 2), 0.5), vmax=vmax).images[0].get_clim() == (0, 1)
    assert fastattn.plot_attention(torch.zeros(2, 2)).images[0].get_clim() == (0, 1)
    assert fastattn.plot_attention(torch.tensor([[-2.0, 3.0]]), label="score").images[0].get_clim() == (-2, 3)


def test_the_colour_map_can_be_chosen():
    assert fastattn.plot_attention(torch.rand(2, 2), cmap="viridis").images[0].get_cmap().name == "viridis"
    ax = fastattn.plot_attention(torch.rand(4), image=np.zeros((2, 2)), cmap="viridis")
    strongest = ax.images[1].get_cmap()(1.0)
    np.testing.assert_allclose(strongest[:3], matplotlib.colormaps["viridis"](1.0)[:3])


def test_colour_bar_and_its_label_can_be_chosen():
    assert colorbar_label(fastattn.plot_attention(torch.rand(2, 2), colorbar=False)) is None
    assert colorbar_label(fastattn.plot_attention(torch.rand(2, 2), label="score")) == "score"


P, IMAGE = torch.rand(2, 4), torch.rand(4, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weights": torch.rand(1, 2, 3, 4)}, ValueError, r"weights has shape \(1, 2, 3, 4\); .* weights\[0\]"),
        ({"weights": torch.tensor(1.0)}, ValueError, r"weights has shape \(\)"),
        ({"weights": torch.rand(0, 4)}, ValueError, "there must be something to draw"),
        ({"weights": torch.tensor([[0.5, torch.nan]])}, ValueError, "weights holds NaN or infinity"),
        ({"weights": torch.tensor([[0.5, -torch.inf]])}, ValueError, "weights holds NaN or infinity"),
        ({"weights": torch.zeros(2, 2, dtype=torch.complex64)}, TypeError, "weights has dtype complex64"),
        ({"weights": [["a", "b"]]}, TypeError, "weights has dtype .*U1; it must hold real numbers"),
        ({"weights": [[1.0], [1.0, 2.0]]}, ValueError, "weights is no array"),
        ({"weights": torch.rand(2, 4).to_sparse()}, TypeError, "weights is a .* tensor; it must be a dense"),
        ({"weights": torch.rand(2, 4, device="meta")}, TypeError, "weights is a meta tensor"),
        ({"xlabels": ["a", "b"]}, ValueError, "xlabels has 2 labels but weights has 4 keys"),
        ({"ylabels": "abc"}, ValueError, "ylabels has 3 labels but weights has 2 queries"),
        ({"xlabels": 3}, TypeError, "xlabels is a int; it must be a sequence"),
        ({"vmax": 0.0}, ValueError, "vmax is 0.0; it must be a finite number above 0"),
        ({"vmax": float("nan")}, ValueError, "vmax is nan"),
        ({"vmax": "much"}, ValueError, "vmax is 'much'"),
        ({"annotate": "two digits"}, ValueError, "annotate is 'two digits'; it must be a format"),
        ({"patches": (2, 2)}, ValueError, "patches is given without an image"),
        ({"image": IMAGE, "xlabels": "abcd"}, ValueError, "xlabels is given with an image"),
        ({"image": IMAGE, "annotate": ".2f"}, ValueError, "annotate is given with an image"),
        ({"image": torch.rand(4)}, ValueError, r"image has shape \(4,\)"),
        ({"image": torch.rand(5, 4, 5)}, ValueError, r"image has shape \(5, 4, 5\)"),
        ({"image": torch.rand(0, 4)}, ValueError, r"image has shape \(0, 4\)"),
        ({"image": 2 + torch.rand(4, 4, 3)}, ValueError, r"image has colours in 2\.\d+\.\.2\.\d+; floats must lie in"),
        ({"image": torch.full((4, 4, 3), 256)}, ValueError, "image has colours in 256..256"),
        (
            {"image": torch.rand(4, 5)},
            ValueError,
            "weights has 4 keys, which are no grid of square patches of .* 4 x 5",
        ),
        ({"image": IMAGE, "patches": (3, 2)}, ValueError, "patches is 3 x 2 but weights has 4 keys"),
        ({"image": IMAGE, "patches": 4}, ValueError, "patches is 4; it must be two integers"),
        ({"image": IMAGE, "patches": (2.5, 2)}, ValueError, r"patches is \(2.5, 2\); it must be two integers"),
        ({"vmax": torch.ones(2)}, ValueError, "vmax is tensor"),
        ({"ax": "left"}, TypeError, "ax holds a str; it must be matplotlib Axes"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message) as raised:
        fastattn.plot_attention(**({"weights": P} | arguments))
    assert str(raised.value).startswith("fastattn: ")
    assert not pyplot.get_fignums(), "refused before a figure is made"


def test_too_few_axes():
    _, axes = pyplot.subplots(1, 2)
    with pytest.raises(ValueError, match="fastattn: ax has 2 Axes but there are 3 panels"):
        fastattn.plot_attention(torch.rand(3, 2, 2), ax=axes)


def run(code: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "MPLBACKEND")}
    return subprocess.run(
        [sys.executable, "-c", code], check=False, cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"^fastattn: matplotlib is not installed.*pip install fastattn\[plot\]"):
        fastattn.plot_attention(torch.rand(2, 2))


def test_a_program_without_a_display_imports_matplotlib_only_to_draw(tmp_path):
    path = tmp_path / "plot.png"
    done = run(
        "import sys, fastattn, torch; assert 'matplotlib' not in sys.modules\n"
        f"fastattn.plot_attention(torch.rand(2, 2), 'ab', 'cd').figure.savefig({str(path)!r})"
    )
    assert done.returncode == 0, done.stderr
    assert path.read_bytes().startswith(b"\x89PNG")
