"""Hard attention: each row takes the value of one key.

With the scores s of scaled dot-product attention and a temperature t,

    p[i, j]     = softmax over the visible j of s[i, j] / t
    index[i]    = argmax over the visible j of s[i, j] / t + g[i, j]            the lowest j among equals
    log_prob[i] = log p[i, index[i]]
    o[i]        = v[index[i]]

With g = 0 that is the most probable key. With Gumbel noise, g = -log(-log(u)) for u uniform on (0, 1), index[i] is
drawn with the probabilities p[i] (the Gumbel-max trick; Maddison, Tarlow and Minka, "A* sampling", 2014, section 2).
A row that sees no key has index -1, log_prob 0, o 0 and no gradient. One that sees a NaN has the first key that it sees
by mask, window and lengths, and log_prob NaN.

The choice has no derivative, so it stands apart: log_prob and o are functions of q, k and v for a given index.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.reference._attention import Window, existing, for_query_heads, hidden, scores


def log_probabilities(
    q: Tensor,
    k: Tensor,
    *,
    temperature: float = 1.0,
    causal: bool | str = False,
    window: Window | None = None,
    scale: float | None = None,
    mask: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """log p, (B, Hq, Lq, Lk), with -inf where the key is not visible."""
    scale = (1 / math.sqrt(max(q.shape[-1], 1)) if scale is None else scale) / temperature
    s = scores(q, k, causal=causal, window=window, scale=scale, mask=mask, kv_lengths=kv_lengths, dtype=dtype)
    # The softmax of a row of -inf is NaN, and so is its gradient.
    blind = (s == -math.inf).all(dim=-1, keepdim=True)
    log_p = torch.log_softmax(s.masked_fill(blind, 0), dim=-1).masked_fill(blind, -math.inf)
    # One score that is NaN makes the whole row NaN, but it makes no key visible.
    return hidden(log_p, causal=causal, window=window, mask=mask, kv_lengths=kv_lengths)


def hard_choice(log_p: Tensor, noise: Tensor | None = None) -> Tensor:
    """index, (B, Hq, Lq), int64, of log_p (B, Hq, Lq, Lk) and noise of its shape; None = none."""
    if not log_p.shape[-1]:
        return log_p.new_full(log_p.shape[:-1], -1, dtype=torch.int64)
    s = log_p.detach() if noise is None else log_p.detach() + noise
    largest = s.amax(dim=-1, keepdim=True)
    # torch.argmax does not say which of several equal elements it finds.
    index = ((s == largest) | s.isnan()).to(torch.int8).sort(dim=-1, descending=True, stable=True).indices[..., 0]
    return index.masked_fill(largest.squeeze(-1) == -math.inf, -1)


def hard_attention(
    log_p: Tensor, v: Tensor, index: Tensor, *, kv_lengths: Tensor | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """o (B, Hq, Lq, Dv) and log_prob (B, Hq, Lq) of the choice `index`, from v (B, Hkv, Lk, Dv)."""
    v = for_query_heads(existing(v if dtype is None else v.to(dtype), kv_lengths), log_p.shape[1])
    if not log_p.shape[-1]:
        nothing = log_p.sum(-1)
        return nothing.unsqueeze(-1).to(v.dtype) + v.sum(2, keepdim=True), nothing
    none = index < 0
    at = index.clamp_min(0).unsqueeze(-1)
    log_prob = log_p.masked_fill(none.unsqueeze(-1), 0).gather(-1, at).squeeze(-1)
    o = v.gather(2, at.expand(*at.shape[:-1], v.shape[-1])).masked_fill(none.unsqueeze(-1), 0)
    return o, log_prob
