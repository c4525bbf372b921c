"""Additive attention (Bahdanau, Cho and Bengio, 2015).

For batch b, query head h, query row i and key j, with G = Hq / Hkv query heads to a key head:

    s[i, j] = w[h] . tanh(q[b, h, i] + k[b, h / G, j])

w is (Hq, D), or (D,) where the heads share one row of it. Masks, lengths, lse, dropout and rows without a key are as in
fastattn.reference._attention; there is no scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.reference._attention import existing, for_query_heads, hidden, softmax, weighted_sum


def additive_scores(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    *,
    causal: bool | str = False,
    mask: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """s, (B, Hq, Lq, Lk), with -inf where the key is not visible. Takes O(Lq * Lk * D) memory."""
    compute = q.dtype if dtype is None else dtype
    q, w = q.to(compute), w.to(compute)
    k = for_query_heads(existing(k.to(compute), kv_lengths), q.shape[1])
    t = torch.tanh(q.unsqueeze(3) + k.unsqueeze(2))  # (B, Hq, Lq, Lk, D)
    s = (t @ w.view(-1, 1, w.shape[-1], 1)).squeeze(-1)
    return hidden(s, causal=causal, mask=mask, kv_lengths=kv_lengths)


def additive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    *,
    causal: bool | str = False,
    mask: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_keep: Tensor | None = None,
    return_lse: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """o (B, Hq, Lq, Dv), and with return_lse also lse (B, Hq, Lq); the arguments are those of `attention`, and w."""
    s = additive_scores(q, k, w, causal=causal, mask=mask, kv_lengths=kv_lengths, dtype=dtype)
    p, lse = softmax(s)
    o = weighted_sum(p, v if dtype is None else v.to(dtype), kv_lengths, dropout_p, dropout_keep)
    return (o, lse) if return_lse else o
