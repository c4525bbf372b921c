"""Attention over packed sequences: fastattn.reference.attention for one sequence after the other."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastattn.reference._attention import attention


def _of_sequence(x: Tensor | None, b: int, Lq: int, Lk: int) -> Tensor | None:
    """What a tensor that broadcasts to (B, Hq, max_seqlen_q, max_seqlen_k) has for sequence b, of these lengths."""
    if x is None:
        return None
    x = x.reshape((1,) * (4 - x.dim()) + tuple(x.shape))
    x = x[b : b + 1] if x.shape[0] != 1 else x
    x = x[:, :, :Lq] if x.shape[2] != 1 else x
    return x[..., :Lk] if x.shape[3] != 1 else x


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_keep: Tensor | None = None,
    return_lse: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each of B packed sequences to its own keys.

    Args:
        q, k, v: (total_q, Hq, D), (total_k, Hkv, D), (total_k, Hkv, Dv).
        cu_seqlens_q, cu_seqlens_k: (B + 1,), integers: sequence b has the rows [cu[b], cu[b + 1]).
        bias, mask, dropout_keep: broadcast to (B, Hq, longest q, longest k); a sequence takes the part of its lengths.
        alibi_slopes: (Hq,) or (B, Hq).
        options: the others of :func:`attention`, the same for every sequence.

    Returns:
        o (total_q, Hq, Dv), and with return_lse also lse (Hq, total_q). Rows of no sequence have o = 0, lse = -inf.
    """
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    outs, lses = [], []
    for b in range(len(ends_q) - 1):
        rows, keys = slice(ends_q[b], ends_q[b + 1]), slice(ends_k[b], ends_k[b + 1])
        Lq, Lk = rows.stop - rows.start, keys.stop - keys.start
        found = attention(
            *(x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys])),
            bias=_of_sequence(bias, b, Lq, Lk),
            mask=_of_sequence(mask, b, Lq, Lk),
            dropout_keep=_of_sequence(dropout_keep, b, Lq, Lk),
            alibi_slopes=alibi_slopes[b : b + 1]
            if alibi_slopes is not None and alibi_slopes.dim() == 2
            else alibi_slopes,
            return_lse=True,
            **options,
        )
        outs.append(found[0][0].transpose(0, 1))
        lses.append(found[1][0])
    compute = options.get("dtype") or q.dtype
    left = q.shape[0] - (ends_q[-1] if ends_q else 0)
    outs.append(torch.zeros(left, q.shape[1], v.shape[2], dtype=outs[0].dtype if outs else compute, device=q.device))
    lses.append(torch.full((q.shape[1], left), -math.inf, dtype=lses[0].dtype if lses else compute, device=q.device))
    o, lse = torch.cat(outs), torch.cat(lses, dim=1)
    return (o, lse) if return_lse else o
