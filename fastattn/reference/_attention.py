"""Scaled dot-product attention with everything that fastattn.attention can do to it.

For batch b, query head h, query row i and key j, with G = Hq / Hkv query heads to a key head:

    s[i, j] = softcap(scale * q[b, h, i] . k[b, h / G, j]) + bias[b, h, i, j] - slope[b, h] * |i + n - Lq - j|
    lse[i]  = log( sum over visible j of exp(s[i, j])  +  exp(sink[h]) )            softcap(x) = c * tanh(x / c)
    p[i, j] = exp(s[i, j] - lse[i]) for a visible j, else 0
    o[i]    = sum over j of keep[i, j] / (1 - dropout_p) * p[i, j] * v[b, h / G, j]

where n is the number of keys of sequence b: kv_lengths[b], or Lk without kv_lengths. Key j is visible to row i when

    j < n                                        it exists,
    mask[b, h, i, j] is True                     the mask keeps it,
    s[i, j] > -inf                               the bias does not hide it,
    d - left <= j <= d + right                   and the window reaches it, around the diagonal d = i + offset:

`offset` is 0 for causal="top_left" and n - Lq otherwise ("bottom_right": the last row sees the last key that exists);
a causal row has right = 0 whatever the window says, and without a window left (and right) are unlimited. A row that
sees no key has o = 0, lse = -inf, and every gradient through it is 0, with or without a sink. The lse includes the
sink, and dropout leaves it alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Window = tuple[int | None, int | None]


def _diagonal_offset(Lq: int, Lk: int, causal: bool | str, kv_lengths: Tensor | None) -> int | Tensor:
    """The key on row 0's diagonal: an int, or (B, 1, 1, 1) where the sequences have lengths of their own."""
    if causal == "top_left":
        return 0
    return (Lk if kv_lengths is None else kv_lengths.long().view(-1, 1, 1, 1)) - Lq


def visible(
    Lq: int,
    Lk: int,
    causal: bool | str = False,
    window: Window | None = None,
    kv_lengths: Tensor | None = None,
    B: int = 1,
    device: torch.device | str | None = None,
) -> Tensor:
    """Which keys the causal mask, the window and the lengths leave to each row.

    Returns: bool, (B, 1, Lq, Lk) with kv_lengths, else (1, 1, Lq, Lk). True = visible.
    """
    if kv_lengths is not None:
        device = kv_lengths.device
        assert kv_lengths.shape == (B,), f"kv_lengths must have shape ({B},), not {tuple(kv_lengths.shape)}"
    left, right = window if window is not None else (None, None)
    if causal:
        right = 0
    i = torch.arange(Lq, device=device).view(1, 1, Lq, 1)
    j = torch.arange(Lk, device=device).view(1, 1, 1, Lk)
    diagonal = i + _diagonal_offset(Lq, Lk, causal, kv_lengths)
    sees = torch.ones(1, 1, Lq, Lk, dtype=torch.bool, device=device)
    if left is not None:
        sees = sees & (j >= diagonal - left)
    if right is not None:
        sees = sees & (j <= diagonal + right)
    if kv_lengths is not None:
        sees = sees & (j < kv_lengths.view(-1, 1, 1, 1))
    return sees


def hidden(
    s: Tensor,
    *,
    causal: bool | str = False,
    window: Window | None = None,
    mask: Tensor | None = None,
    kv_lengths: Tensor | None = None,
) -> Tensor:
    """Scores s, (B, Hq, Lq, Lk), with -inf where the key is not visible."""
    B, _, Lq, Lk = s.shape
    sees = visible(Lq, Lk, causal, window, kv_lengths, B, s.device)
    if mask is not None:
        sees = sees & mask
    return s.masked_fill(~sees, -math.inf)


def existing(x: Tensor, kv_lengths: Tensor | None) -> Tensor:
    """k or v, (B, Hkv, Lk, D), with zeros in the rows that do not exist: 0 * NaN would be NaN."""
    if kv_lengths is None:
        return x
    beyond = torch.arange(x.shape[2], device=x.device).view(1, 1, -1, 1) >= kv_lengths.view(-1, 1, 1, 1)
    return x.masked_fill(beyond, 0)


def for_query_heads(x: Tensor, Hq: int) -> Tensor:
    """k or v, (B, Hkv, Lk, D) -> (B, Hq, Lk, D): query head h reads key head h / G."""
    return x.repeat_interleave(Hq // max(x.shape[1], 1), dim=1)


def _alibi(slopes: Tensor, Lq: int, Lk: int, kv_lengths: Tensor | None, dtype: torch.dtype) -> Tensor:
    """-slope * |i + n - Lq - j|, (1 or B, Hq, Lq, Lk). Rounded to dtype once: a bfloat16 distance errs beyond 256."""
    i = torch.arange(Lq, device=slopes.device).view(1, 1, Lq, 1)
    j = torch.arange(Lk, device=slopes.device).view(1, 1, 1, Lk)
    distance = (i + _diagonal_offset(Lq, Lk, False, kv_lengths) - j).abs()
    wide = torch.promote_types(dtype, torch.float32)
    slopes = slopes.to(wide).view(-1, slopes.shape[-1], 1, 1)
    return (-slopes * distance.to(wide)).to(dtype)


def scores(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool | str = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """s, (B, Hq, Lq, Lk), with -inf where the key is not visible."""
    _, Hq, Lq, D = q.shape
    Lk = k.shape[2]
    compute = q.dtype if dtype is None else dtype
    q, k = q.to(compute), for_query_heads(existing(k.to(compute), kv_lengths), Hq)

    s = q @ k.mT * (1 / math.sqrt(max(D, 1)) if scale is None else scale)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        # A float32 bias on 16-bit inputs makes the scores float32 from here on, as PyTorch's promotion would.
        s = s + (bias if dtype is None else bias.to(dtype))
    if alibi_slopes is not None:
        s = s + _alibi(alibi_slopes, Lq, Lk, kv_lengths, s.dtype)
    return hidden(s, causal=causal, window=window, mask=mask, kv_lengths=kv_lengths)


def softmax(s: Tensor, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """p and lse of scores s; sinks (Hq,) or None."""
    Lk = s.shape[-1]
    # The softmax of a row of -inf is NaN, and so is its gradient: such rows are computed as rows of 0, then replaced.
    blind = (s == -math.inf).all(dim=-1, keepdim=True)
    s = s.masked_fill(blind, 0)
    if sinks is not None:
        # The sink is one more column of scores, whose weight is thrown away.
        s = torch.cat([s, sinks.to(s.dtype).view(1, -1, 1, 1).expand(*s.shape[:-1], 1)], dim=-1)
    p = torch.softmax(s, dim=-1)[..., :Lk].masked_fill(blind, 0)
    # torch.logsumexp differentiates as exp(s - lse). In a row hidden by a finite value like -1e38, lse has lost the
    # logarithm, and that is 1 for each of its keys, where 1 / (number of keys) is right. So the maximum stays apart.
    m = s.amax(dim=-1, keepdim=True).detach() if s.shape[-1] else s.new_zeros(*s.shape[:-1], 1)
    lse = ((s - m).exp().sum(dim=-1).log() + m.squeeze(-1)).masked_fill(blind.squeeze(-1), -math.inf)
    return p, lse


def weights(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool | str = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The probabilities p, (B, Hq, Lq, Lk), before dropout. A row sums to 1, less with a sink, 0 if it is blind."""
    s = scores(
        q,
        k,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        bias=bias,
        mask=mask,
        alibi_slopes=alibi_slopes,
        kv_lengths=kv_lengths,
        dtype=dtype,
    )
    return softmax(s, sinks)[0]


def dropped(p: Tensor, keep: Tensor, dropout_p: float) -> Tensor:
    """p with the weights not in `keep` (bool, p's shape) dropped, and the others scaled up to make up for it."""
    if dropout_p >= 1:
        return p * 0
    return (p / (1 - dropout_p)).masked_fill(~keep, 0)


def weighted_sum(
    p: Tensor, v: Tensor, kv_lengths: Tensor | None, dropout_p: float = 0.0, dropout_keep: Tensor | None = None
) -> Tensor:
    """o, (B, Hq, Lq, Dv), of the weights p (B, Hq, Lq, Lk) that dropout leaves and the values v (B, Hkv, Lk, Dv)."""
    if dropout_p > 0:
        assert dropout_keep is not None, "the reference draws no random numbers: pass dropout_keep"
        p = dropped(p, dropout_keep, dropout_p)
    v = for_query_heads(existing(v, kv_lengths), p.shape[1])
    return p.to(v.dtype) @ v


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool | str = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_keep: Tensor | None = None,
    return_lse: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention as the head of this file defines it.

    Args:
        q, k, v: (B, Hq, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, Dv), Hq a multiple of Hkv.
        causal: False, "top_left", "bottom_right", or True, which is "bottom_right".
        window: (left, right), how many keys before and after the diagonal are visible; None = unlimited.
        scale: None is 1 / sqrt(D). softcap: None and 0 are none.
        bias, mask: anything that broadcasts to (B, Hq, Lq, Lk); the mask is bool, True = keep.
        alibi_slopes: (Hq,) or (B, Hq). sinks: (Hq,). kv_lengths: (B,), integers.
        dropout_keep: bool, (B, Hq, Lq, Lk), the weights that dropout leaves; needed when dropout_p > 0.
        dtype: what to compute in; None is q's dtype.

    Returns:
        o (B, Hq, Lq, Dv), and with return_lse also lse (B, Hq, Lq), both in the dtype computed in (lse in float32 if
        a float32 bias promotes 16-bit scores).
    """
    s = scores(
        q,
        k,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        bias=bias,
        mask=mask,
        alibi_slopes=alibi_slopes,
        kv_lengths=kv_lengths,
        dtype=dtype,
    )
    p, lse = softmax(s, sinks)
    o = weighted_sum(p, v if dtype is None else v.to(dtype), kv_lengths, dropout_p, dropout_keep)
    return (o, lse) if return_lse else o
