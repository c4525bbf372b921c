"""Attention worked out by hand in NumPy, one step at a time, beside fastattn's: the same numbers.

    python examples/numpy_walkthrough.py       with fastattn installed
    python -m examples.numpy_walkthrough       from a checkout's root, after `make build`

First the example of the textbooks: one query, three keys, a softmax without any scaling. Then self-attention in a
sentence of six words with made-up embeddings: what each word looks for (its query), what it offers (its key) and what
it tells (its value) are chosen by hand, so that one can see why "sat" looks at "cat" and at "mat".

The run fails unless fastattn's results are those of NumPy to within rounding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm  # type: ignore[import-untyped]

import fastattn

try:
    from examples import common
except ImportError:  # run as a file: its folder, not the root, is on the path
    import common  # type: ignore[import-not-found, no-redef]

Array = NDArray[np.float64]

DIFFERENCE = 1e-12  # fastattn computes these in float64, as NumPy does

WORDS = ("the", "cat", "sat", "on", "the", "mat")
FEATURES = ("article", "animal", "action", "place")
# A word is what it is: one row for each word, one column for each feature.
EMBEDDINGS = np.array(
    [
        [1.0, 0.0, 0.0, 0.0],  # the
        [0.0, 1.0, 0.1, 0.0],  # cat
        [0.0, 0.1, 1.0, 0.2],  # sat
        [0.0, 0.0, 0.3, 0.6],  # on
        [1.0, 0.0, 0.0, 0.0],  # the
        [0.0, 0.0, 0.0, 1.0],  # mat
    ]
)
# What a word with this feature (row) looks for in others (column).
LOOKS_FOR = np.array(
    [
        [0.0, 3.0, 0.0, 3.0],  # an article: for what it belongs to
        [2.0, 1.0, 4.0, 0.0],  # an animal: for its article, and for what it does
        [0.0, 5.0, 0.0, 4.0],  # an action: for who does it, and where
        [1.0, 0.0, 4.0, 2.0],  # a place: for what happens there
    ]
)


def softmax(scores: Array) -> Array:
    """exp(s) / sum exp(s), over the last dimension. Subtracting the maximum changes nothing but avoids overflow."""
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def by_fastattn(q: Array, k: Array, v: Array, scale: float) -> tuple[Array, Array]:
    """fastattn's weights (Lq, Lk) and outputs (Lq, Dv) for one batch element and one head."""
    # fastattn's layout is (B, H, L, D): batch and heads in front
    tensors = [torch.from_numpy(x)[None, None] for x in (q, k, v)]
    o = fastattn.attention(*tensors, scale=scale)
    return fastattn.attention_weights(*tensors[:2], scale=scale)[0, 0].numpy(), o[0, 0].numpy()


def textbook() -> dict[str, Any]:
    """One query, three keys, no scaling."""
    query = np.array([1.0, 0.0, 1.0])
    keys = np.array([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    values = np.array([[10.0, 0.0], [0.0, 10.0], [5.0, 5.0]])

    scores = keys @ query  # how well each key fits: its dot product with the query
    weights = softmax(scores)  # positive, and 1 together
    output = weights @ values  # the values, each as much as its key fits
    p, o = by_fastattn(query[None], keys, values, scale=1.0)

    print(f"query   {query}")
    for n, key in enumerate(keys):
        products = " + ".join(f"{a:g}*{b:g}" for a, b in zip(query, key, strict=True))
        print(f"key {n}   {key}   score = {products} = {scores[n]:g}")
    exponentials = " + ".join(f"e^{score:g}" for score in scores)
    print(f"{exponentials} = {np.exp(scores).sum():.4f}")
    for n, weight in enumerate(weights):
        print(f"weight {n} = e^{scores[n]:g} / {np.exp(scores).sum():.4f} = {weight:.4f}      fastattn {p[0, n]:.4f}")
    terms = " + ".join(f"{weight:.4f} * {value}" for weight, value in zip(weights, values, strict=True))
    print(f"output = {terms} = {output.round(4)}      fastattn {o[0].round(4)}")
    return {
        "scores": scores.tolist(),
        "weights": weights.tolist(),
        "output": output.tolist(),
        "difference": float(max(np.abs(p - weights).max(), np.abs(o - output).max())),
    }


def sentence() -> dict[str, Any]:
    """Every word attends to all words: scaled by 1 / sqrt(D), as in the transformer."""
    q, k, v = EMBEDDINGS @ LOOKS_FOR, EMBEDDINGS, EMBEDDINGS  # (6, 4) each
    scale = 1 / np.sqrt(q.shape[1])
    scores, weights, outputs = [], [], []
    with tqdm(WORDS, desc="words", unit="word") as bar:
        for word, query in zip(bar, q, strict=True):
            s = scale * (k @ query)  # 1. a score for each word of the sentence
            p = softmax(s)  # 2. weights
            o = p @ v  # 3. the weighted sum of the values
            scores.append(s)
            weights.append(p)
            outputs.append(o)
            bar.write(f"\n{word}")
            steps = (
                ("looks for", FEATURES, query),
                ("scores", WORDS, s),
                ("weights", WORDS, p),
                ("output", FEATURES, o),
            )
            for step, names, numbers in steps:
                named = (f"{name} {number:.2f}" for name, number in zip(names, numbers, strict=True))
                bar.write(f"  {step:10}{'   '.join(named)}")
    p, o = by_fastattn(q, k, v, float(scale))
    difference = max(np.abs(p - weights).max(), np.abs(o - outputs).max())
    return {
        "scores": np.array(scores).tolist(),
        "weights": np.array(weights).tolist(),
        "outputs": np.array(outputs).tolist(),
        "difference": float(difference),
    }


def write_plot(options: Any, small: dict[str, Any], large: dict[str, Any]) -> None:
    figure = common.new_figure(13, 7.4)
    figure.suptitle("Attention, step by step: scores, their softmax, the weighted sum of the values", fontsize=13)
    top, bottom = np.asarray(figure.subfigures(2, 1, height_ratios=(1, 2.2)))
    top.suptitle("One query [1, 0, 1] and three keys, unscaled", fontsize=10.5)
    bottom.suptitle(
        "Self-attention in a sentence: each row is a word that looks at all words, scaled by 1 / √4", fontsize=10.5
    )
    keys = ["[1, 0, 1]", "[0, 1, 0]", "[1, 1, 0]"]
    for part, found, rows, columns, names, output, values_are in (
        (top, small, ["query"], keys, ("first", "second"), small["output"], "[10, 0], [0, 10], [5, 5]"),
        (bottom, large, WORDS, WORDS, FEATURES, large["outputs"], "the words' features"),
    ):
        axes = part.subplots(1, 3, width_ratios=(len(columns), len(columns), len(names)))
        for ax, values, labels, title, cmap in zip(
            axes,
            (found["scores"], found["weights"], output),
            (columns, columns, names),
            ("1. scores: query · key", "2. weights: softmax of the scores", f"3. weights × values\n({values_are})"),
            ("Oranges", "Blues", "Greens"),
            strict=True,
        ):
            values = np.atleast_2d(values)
            fastattn.plot_attention(values, labels, rows, ax, annotate=".2f", cmap=cmap, colorbar=False)
            ax.set_title(title, fontsize=10)
    common.save_figure(figure, options.plot)


def main() -> None:
    options = common.parse_options("numpy_walkthrough", __doc__.splitlines()[0], "no different: it takes no time")
    small = textbook()
    large = sentence()
    if not options.no_plot:
        write_plot(options, small, large)
    difference = max(small["difference"], large["difference"])
    common.finish(
        options,
        {"textbook": small, "sentence": large, "difference": difference},
        [common.Promise("largest difference from fastattn", difference, DIFFERENCE, at_most=True)],
    )


if __name__ == "__main__":
    main()
