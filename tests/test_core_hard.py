"""Hard attention and the summary of attention weights through _fastattn_core, against matrix formulas in NumPy.

csrc/testing/hard_test.cpp and summary_test.cpp have many more shapes, and the tests of the operators the tight bounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from .core_module import load_core

Array = np.ndarray[Any, Any]
B, HQ, HKV, LQ, LK, D, DV = 2, 4, 2, 37, 71, 12, 7
SEED, OFFSET = 0x123456789ABCDEF0, 5

core = load_core()
ISAS = tuple(core.all_isas())  # of this architecture


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param not in core.supported_isas():
        pytest.skip(f"this processor or build has no {request.param}")
    before = core.active_isa()
    core.set_isa(request.param)
    yield request.param
    core.set_isa(before)


def make_inputs(dtype: Any) -> tuple[Array, Array, Array, Array]:
    random = np.random.default_rng(4)
    q, k, v = (
        random.standard_normal(size).astype(dtype) for size in ((B, HQ, LQ, D), (B, HKV, LK, D), (B, HKV, LK, DV))
    )
    mask = random.random((B, 1, LQ, LK)) < 0.8
    mask[0, 0, 3] = False
    return q, k, v, mask


def per_query_head(x: Array) -> Array:
    return np.repeat(x.astype(np.float64), HQ // HKV, axis=1)


def scores_of(q: Array, k: Array, mask: Array, scale: float) -> Array:
    """-inf where a key is hidden: by the mask, or by a bottom-right causal one."""
    scores = scale * np.einsum("bhid,bhjd->bhij", q.astype(np.float64), per_query_head(k))
    causal = np.arange(LK) <= np.arange(LQ)[:, None] + LK - LQ
    return np.where(mask & causal, scores, -np.inf)


def softmax(scores: Array) -> tuple[Array, Array]:
    """The weights, 0 in a row without keys, and log(sum(exp(scores)))."""
    largest = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isinf(largest), 0.0, largest))
    total = weights.sum(-1, keepdims=True)
    lse = np.where(total > 0.0, largest + np.log(np.where(total > 0.0, total, 1.0)), -np.inf)[..., 0]
    return weights / np.where(total > 0.0, total, 1.0), lse


def gumbel_noise() -> Array:
    """From the words of Philox, which core/philox.h counts by j / 4, i, head and offset."""
    words = np.array(
        [
            [core.philox4x32(SEED, [quad, i, head, OFFSET]) for quad in range((LK + 3) // 4)]
            for head in range(B * HQ)
            for i in range(LQ)
        ],
        dtype=np.float64,
    )
    uniform = (words.reshape(B, HQ, LQ, -1)[..., :LK] + 0.5) / 2.0**32
    return -np.log(-np.log(uniform))


OPTIONS = {"causal": "bottom_right", "scale": 0.7, "seed": SEED, "offset": OFFSET}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("is_sampled", [False, True], ids=["argmax", "sample"])
def test_hard_attention_is_a_gumbel_argmax(isa: str, dtype: Any, is_sampled: bool) -> None:
    q, k, v, mask = make_inputs(dtype)
    scores = scores_of(q, k, mask, 0.7)
    weights, lse = softmax(scores)
    candidates = scores + gumbel_noise() if is_sampled else scores
    is_empty = np.isinf(lse)
    index = np.where(is_empty, -1, candidates.argmax(-1))

    results = core.hard_attention_forward(q, k, v, is_sampled=is_sampled, threads=2, mask=mask, **OPTIONS)
    np.testing.assert_array_equal(results["index"], index)
    taken = np.take_along_axis(per_query_head(v), np.maximum(index, 0)[..., None], axis=2)
    np.testing.assert_array_equal(results["o"], np.where(is_empty[..., None], 0.0, taken))
    taken_scores = np.take_along_axis(scores, np.maximum(index, 0)[..., None], axis=-1)[..., 0]
    log_prob = np.where(is_empty, 0.0, taken_scores) - np.where(is_empty, 0.0, lse)
    np.testing.assert_allclose(results["log_prob"], log_prob, atol=2e-6)

    # d sum(d_log_prob * log_prob), and d_o brought to the values that were taken.
    random = np.random.default_rng(5)
    d_log_prob = random.standard_normal((B, HQ, LQ)).astype(dtype)
    d_o = random.standard_normal((B, HQ, LQ, DV)).astype(dtype)
    gradients = core.hard_attention_backward(
        q, k, v, results, d_o=d_o, d_log_prob=d_log_prob, threads=2, mask=mask, **OPTIONS
    )
    one_hot = (np.arange(LK) == index[..., None]).astype(np.float64)
    d_scores = 0.7 * d_log_prob[..., None] * (one_hot - weights)
    dq = np.einsum("bhij,bhjd->bhid", d_scores, per_query_head(k))
    dk = np.einsum("bhij,bhid->bhjd", d_scores, q).reshape(B, HKV, HQ // HKV, LK, D).sum(2)
    dv = np.einsum("bhij,bhid->bhjd", one_hot, d_o).reshape(B, HKV, HQ // HKV, LK, DV).sum(2)
    for name, expected in (("dq", dq), ("dk", dk), ("dv", dv)):
        np.testing.assert_allclose(gradients[name], expected, atol=1e-5, err_msg=name)

    values_alone = core.hard_attention_backward(q, k, v, results, d_o=d_o, mask=mask, **OPTIONS)
    assert not values_alone["dq"].any()
    assert not values_alone["dk"].any()
    scores_alone = core.hard_attention_backward(q, k, v, results, d_log_prob=d_log_prob, mask=mask, **OPTIONS)
    assert not scores_alone["dv"].any()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_summary_is_that_of_the_weights(isa: str, dtype: Any) -> None:
    q, k, _, mask = make_inputs(dtype)
    sinks = np.linspace(-1.0, 2.0, HQ).astype(dtype)
    rows = np.random.default_rng(6).random((B, 1, LQ)) < 0.5
    scores = scores_of(q, k, mask, 0.7)
    with_sink = np.concatenate([scores, np.broadcast_to(sinks[:, None, None], (B, HQ, LQ, 1))], axis=-1)
    with_sink[np.isinf(scores).all(-1)] = -np.inf  # a sink alone does not make a row
    weights, lse = softmax(with_sink)
    entropy = -(weights * np.log(np.where(weights > 0.0, weights, 1.0))).sum(-1)
    weights = weights[..., :LK]
    order = np.argsort(-scores, axis=-1, kind="stable")[..., :9]
    top_weights = np.take_along_axis(weights, order, axis=-1)

    results = core.attention_summary(
        q, k, top_k=9, row_mask=rows, threads=2, mask=mask, sinks=sinks, causal="bottom_right", scale=0.7
    )
    np.testing.assert_allclose(results["entropy"], entropy, atol=3e-6)
    np.testing.assert_allclose(results["max_weight"], weights.max(-1), atol=3e-6)
    np.testing.assert_allclose(results["lse"], lse, atol=3e-6)
    np.testing.assert_allclose(results["top_weights"], top_weights, atol=3e-6)
    np.testing.assert_array_equal(results["top_index"], np.where(top_weights > 0.0, order, -1))
    np.testing.assert_allclose(results["key_mass"], (weights * rows[..., None]).sum(2), atol=1e-5)

    assert "key_mass" not in core.attention_summary(q, k, key_mass=False)


def test_the_test_module_refuses_what_does_not_fit() -> None:
    q, k, v, _ = make_inputs(np.float32)
    results = core.hard_attention_forward(q, k, v)
    results["index"] = results["index"] + LK
    with pytest.raises(ValueError, match="index must lie in"):
        core.hard_attention_backward(q, k, v, results)
    with pytest.raises(ValueError, match="top_k must lie in"):
        core.attention_summary(q, k, top_k=129)
    with pytest.raises(ValueError, match="row_mask must be broadcastable"):
        core.attention_summary(q, k, row_mask=np.ones((B, HQ, LQ + 1), dtype=bool))
