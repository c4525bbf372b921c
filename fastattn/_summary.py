"""What there is to know about attention weights without holding them all."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn import _errors, _ops, _vmap
from fastattn._arguments import Causal, Window, accumulator, autocast, causal_code, register_result, window_sides
from fastattn._autograd import Tensors

_operator = torch.ops.fastattn.attention_summary.default


@torch.library.register_fake("fastattn::attention_summary")
def _fake(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    kv_lengths: Tensor | None,
    row_mask: Tensor | None,
    causal: int,
    window_left: int,
    window_right: int,
    scale: float | None,
    softcap: float,
    top_k: int,
    need_mass: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors: Tensors = {
        "q": q,
        "k": k,
        "bias": bias,
        "mask": mask,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
        "kv_lengths": kv_lengths,
        "rows": row_mask,
    }
    settings = (causal, window_left, window_right, scale, softcap, top_k, need_mass)
    _ops.check_fake("attention_summary", tensors, settings)
    B, Hq, Lq, _ = q.shape
    real = _ops.accumulator_dtype(q.dtype)
    entropy, max_weight, lse = (q.new_empty((B, Hq, Lq), dtype=real) for _ in range(3))
    top_weights = q.new_empty((B, Hq, Lq, top_k), dtype=real)
    top_index = q.new_empty((B, Hq, Lq, top_k), dtype=torch.int64)
    key_mass = q.new_empty((B, Hq, k.shape[2]) if need_mass else (0,), dtype=real)
    return entropy, max_weight, top_weights, top_index, key_mass, lse


_vmap.register(
    _operator,
    _vmap.Rule(
        ("q", "k", "bias", "mask", "alibi_slopes", "sinks", "kv_lengths", "row_mask"),
        ("entropy", "max_weight", "top_weights", "top_index", "key_mass", "lse"),
        _vmap.PADDED,
    ),
)


class AttentionSummary(NamedTuple):
    """What :func:`attention_summary` returns; all numbers are float32, float64 for float64 inputs."""

    entropy: Tensor
    """(B, Hq, Lq), in nats: 0 where one key has all the weight, log(n) where n keys share it evenly."""
    maximum: Tensor
    """(B, Hq, Lq): the largest weight of a key."""
    key_mass: Tensor | None
    """(B, Hq, Lk): the weight that each key gets from all rows that count; None if it was not asked for."""
    top_weights: Tensor
    """(B, Hq, Lq, top_k): the largest weights of each row, the largest first; 0 past the visible keys."""
    top_indices: Tensor
    """(B, Hq, Lq, top_k), int64: their keys, the lowest first among equals; -1 past the visible keys."""
    lse: Tensor
    """(B, Hq, Lq): the logarithm of the softmax's denominator, as from attention."""


register_result(AttentionSummary)


def attention_summary(
    q: Tensor,
    k: Tensor,
    *,
    top_k: int = 0,
    key_mass: bool = True,
    rows: Tensor | None = None,
    causal: Causal = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    kv_lengths: Tensor | None = None,
) -> AttentionSummary:
    r"""Entropy, mass and largest weights of attention, fused: without ever holding the (Lq, Lk) matrix of weights.

    With the weights p and the lse of :func:`fastattn.attention`, before dropout, a sink's weight p_sink, and j over the
    keys that row i sees::

        entropy[b, h, i]  = -sum_j p[b, h, i, j] log p[b, h, i, j] - p_sink log p_sink
        maximum[b, h, i]  = max_j p[b, h, i, j]
        key_mass[b, h, j] = sum_i p[b, h, i, j]                  over the rows that ``rows`` keeps
        top_weights[b, h, i], top_indices[b, h, i] = the top_k largest p[b, h, i, j], and their j

    A row that sees no key has entropy, maximum and weights of 0, indices of -1 and an lse of -inf. For the whole matrix
    there is :func:`fastattn.attention_weights`.

    This is for looking at a model, or steering it (which keys a cache can drop, where a head looks): it is computed
    under ``torch.no_grad``, and **nothing in it is differentiable**.

    Args:
        q: (B, Hq, Lq, D), float32, bfloat16, float16 or float64, any D >= 1 and any strides.
        k: (B, Hkv, Lk, D), of q's dtype and device; Hq is a multiple of Hkv. Query head h reads key head h // (Hq/Hkv).
        top_k: How many of each row's largest weights to list, at most 128.
        key_mass: Whether to compute the mass of each key.
        rows: Bool, broadcastable to (B, Hq, Lq): the rows that count for key_mass, by default all. Leave padding out
            of it, or ask what the last few rows looked at.
        causal, window, scale, softcap, bias, mask, alibi_slopes, sinks, kv_lengths: As in :func:`fastattn.attention`,
            where the alignment of causal (True is "bottom_right") and of window is explained.

    Returns:
        AttentionSummary(entropy, maximum, key_mass, top_weights, top_indices, lse): (B, Hq, Lq), (B, Hq, Lq),
        (B, Hq, Lk) or None, twice (B, Hq, Lq, top_k), and (B, Hq, Lq); float32 (float64 for float64), and int64 for the
        indices.

    Raises:
        ValueError: Shapes, sizes, devices, numbers or lengths break a rule above; the message names which. Or q is on a
            device for which there is no kernel.
        TypeError: An argument has the wrong type, layout or dtype.

    Source:
        The online softmax (Milakov and Gimelshein, 2018), with the sums that these numbers take beside its own.

    Example:
        >>> import torch, fastattn
        >>> q, k = torch.randn(1, 8, 100, 64), torch.randn(1, 8, 100, 64)
        >>> summary = fastattn.attention_summary(q, k, top_k=3, causal=True)
        >>> summary.top_weights.shape, summary.key_mass.shape
        (torch.Size([1, 8, 100, 3]), torch.Size([1, 8, 100]))
        >>> round(float(summary.key_mass[0, 0].sum()))  # each of the 100 rows gives away a weight of 1
        100
    """
    try:
        if isinstance(top_k, bool) or not isinstance(top_k, int):
            raise TypeError(f"fastattn: top_k is a {type(top_k).__name__}; it must be an int.")
        if not isinstance(key_mass, bool):
            raise TypeError(f"fastattn: key_mass is a {type(key_mass).__name__}; it must be a bool.")
        if torch._C._is_any_autocast_enabled():
            q, k, bias = autocast(q, k, bias)
        if alibi_slopes is not None:
            alibi_slopes = accumulator("alibi_slopes", alibi_slopes, q)
        if sinks is not None:
            sinks = accumulator("sinks", sinks, q)
        tensors = (q, k, bias, mask, alibi_slopes, sinks, kv_lengths, rows)
        settings = (
            0 if causal is False else causal_code(causal),
            *window_sides(window),
            scale,
            0.0 if softcap is None else softcap,
            top_k,
            key_mass,
        )
        entropy, maximum, top_weights, top_indices, mass, lse = _call(tensors, settings)
    except Exception as error:
        _errors.raise_explained(
            error,
            {
                "q": q,
                "k": k,
                "bias": bias,
                "mask": mask,
                "alibi_slopes": alibi_slopes,
                "sinks": sinks,
                "kv_lengths": kv_lengths,
                "rows": rows,
            },
            {"scale": scale, "softcap": softcap},
        )
    return AttentionSummary(entropy, maximum, mass if key_mass else None, top_weights, top_indices, lse)


def _call(tensors: tuple[Tensor | None, ...], settings: tuple[Any, ...]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return _operator(*tensors, *settings)
