"""What there is to know about the weights p of scaled dot-product attention, without looking at all of them.

    entropy[i] = -sum over j of p[i, j] log p[i, j]        in nats, the sink's term included; 0 for a row without a key
    maximum[i] = max over j of p[i, j]                     0 for a row without a key
    mass[j]    = sum over the rows i that count of p[i, j]
    top[i]     = the largest p[i, j] and their j, the largest first, the lowest j first among equals;
                 past the visible keys 0, and -1 for j

p as in fastattn.reference._attention, before dropout: with a sink a row's sum is less than 1.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastattn.reference._attention import scores, softmax


def attention_summary(
    q: Tensor,
    k: Tensor,
    *,
    top_k: int = 0,
    rows: Tensor | None = None,
    sinks: Tensor | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """The summary of `weights(q, k, ...)`.

    Args:
        q, k: (B, Hq, Lq, D), (B, Hkv, Lk, D).
        top_k: How many of the largest weights to list.
        rows: bool, broadcastable to (B, Hq, Lq): those that count for the mass; None = all.
        sinks, dtype, options: as in `weights`.

    Returns:
        entropy, maximum and lse (B, Hq, Lq), key_mass (B, Hq, Lk), top_weights and top_indices (B, Hq, Lq, top_k).
    """
    s = scores(q, k, dtype=dtype, **options)
    p, lse = softmax(s, sinks)
    entropy = torch.special.entr(p).sum(-1)
    if sinks is not None:
        p_sink = torch.exp(sinks.to(s.dtype).view(-1, 1) - lse).masked_fill(lse == -math.inf, 0)
        entropy = entropy + torch.special.entr(p_sink)
    counted = p if rows is None else p.masked_fill(~rows.expand(p.shape[:-1]).unsqueeze(-1), 0)

    Lk = s.shape[-1]
    order = s.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    shown = s.gather(-1, order) > -math.inf
    missing = (0, top_k - min(top_k, Lk))
    return {
        "entropy": entropy,
        "maximum": p.amax(-1) if Lk else p.sum(-1),
        "key_mass": counted.sum(-2),
        "top_weights": torch.nn.functional.pad(p.gather(-1, order).masked_fill(~shown, 0), missing),
        "top_indices": torch.nn.functional.pad(order.masked_fill(~shown, -1), missing, value=-1),
        "lse": lse,
    }
