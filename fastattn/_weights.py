"""Attention weights for looking at, and the exact merge of attention over disjoint sets of keys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn import reference
from fastattn._arguments import Causal, Window, without_autocast
from fastattn._attention import attention

__all__ = ["attention_weights", "merge_attention_states"]


def attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    causal: Causal = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    kv_lengths: Tensor | None = None,
) -> Tensor:
    """The full matrix of attention weights, for looking at: the p of fastattn.attention, before dropout.

        p[b, h, i, j] = exp(s[b, h, i, j] - lse[b, h, i])        s and lse as in fastattn.attention

    This is the matrix that the rest of the library exists to avoid: it takes O(B Hq Lq Lk) memory several times over,
    and is computed with plain PyTorch operations, in float32 (float64 for float64) and rounded once at the end. Call it
    on the examples and heads that you want to see, not in a model.

    Args:
        q: (B, Hq, Lq, D).
        k: (B, Hkv, Lk, D), Hq a multiple of Hkv.
        causal, window, scale, softcap, bias, mask, alibi_slopes, sinks, kv_lengths: as in fastattn.attention. Alignment
            of causal and of window is bottom-right: the last row sees the last key. "top_left" is the other.

    Returns:
        (B, Hq, Lq, Lk), in q's dtype. A row sums to 1, with a sink to less than 1, and without any visible key to 0. It
        can be differentiated with respect to q, k, bias and sinks, twice as well.

    Raises:
        ValueError, TypeError: what fastattn.attention refuses.

    Example:
        >>> import torch, fastattn
        >>> q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
        >>> p = fastattn.attention_weights(q, k, causal=True)
        >>> p.shape, bool(p[0, 0, 0, 3:].any())
        (torch.Size([1, 2, 3, 5]), False)
    """
    options: dict[str, Any] = {
        "causal": causal,
        "window": window,
        "scale": scale,
        "softcap": softcap,
        "bias": bias,
        "mask": mask,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
        "kv_lengths": kv_lengths,
    }
    # The operator checks every argument. One column of k in place of v makes that a small part of what follows. The
    # tensors are detached; of torch.no_grad torch.export would make a part of the graph.
    checked: dict[str, Any] = {
        name: x.detach() if isinstance(x, Tensor) else x for name, x in {"q": q, "k": k, **options}.items()
    }
    checked["v"] = checked["k"][..., :1] if getattr(k, "ndim", 0) == 4 else checked["k"]
    attention(**checked)
    wide = torch.promote_types(q.dtype, torch.float32)
    with without_autocast(q.device):
        return reference.weights(q, k, dtype=wide, **options).to(q.dtype)


def merge_attention_states(outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor) -> tuple[Tensor, Tensor]:
    """Attention over a union of disjoint sets of keys, from the results over each set. Exact, up to rounding.

        lse = log( sum over n of exp(lses[n]) )           o = sum over n of exp(lses[n] - lse) * outs[n]

    Long sequences can so be attended to in pieces (on several devices, or a shared prefix once for many suffixes). With
    dropout the pieces merge just as well. A sink may be given to one piece only: it is counted once per piece.

    Args:
        outs: N tensors (..., L, Dv), float32, bfloat16, float16 or float64, or one tensor that stacks them,
            (N, ..., L, Dv).
        lses: their N log-sum-exps (..., L), as fastattn.attention returns them with return_lse=True, or (N, ..., L).
            -inf where a set has no key visible to the row.

    Returns:
        o (..., L, Dv), in the dtype of the outs, and lse (..., L), in float32 or wider, both differentiable with
        respect to all outs and lses. A row that no set has a key for is o = 0 and lse = -inf, without a gradient.

    Raises:
        ValueError: nothing to merge, as many outs as lses missing, shapes or devices that differ.
        TypeError: something that is no floating-point tensor, outs of different dtypes.

    Source: the online softmax (Milakov and Gimelshein, 2018), as FlashAttention (Dao et al., 2022) merges its blocks.

    Example:
        >>> import torch, fastattn
        >>> q, k, v = (torch.randn(1, 2, 100, 32) for _ in range(3))
        >>> halves = zip(k.split(50, dim=2), v.split(50, dim=2))
        >>> parts = [fastattn.attention(q, k_half, v_half, return_lse=True) for k_half, v_half in halves]
        >>> o, lse = fastattn.merge_attention_states(*zip(*parts))
        >>> torch.allclose(o, fastattn.attention(q, k, v), atol=1e-5)
        True
    """
    outs, lses = _checked_states(outs, lses)
    wide = torch.promote_types(torch.promote_types(outs[0].dtype, lses[0].dtype), torch.float32)
    stacked = torch.stack([lse.to(wide) for lse in lses])
    # exp(-inf - -inf) is NaN, and the gradient of a logsumexp of nothing is too: such rows are merged as if every lse
    # was 0, then blanked.
    blind = (stacked == -math.inf).all(dim=0)
    stacked = stacked.masked_fill(blind, 0)
    lse = torch.logsumexp(stacked, dim=0)
    weights = torch.exp(stacked - lse).masked_fill(blind, 0).unsqueeze(-1)
    o = torch.zeros((), dtype=wide, device=lse.device)
    for weight, part, out in zip(weights, lses, outs, strict=True):
        # Whatever stands in a row that saw nothing, it has no weight; were it NaN, 0 times it would be too.
        o = o + weight * out.to(wide).masked_fill((part == -math.inf).unsqueeze(-1), 0)
    return o.to(outs[0].dtype), lse.masked_fill(blind, -math.inf)


def _checked_states(
    outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The states as two equally long tuples of tensors that fit together."""
    pieces = []
    for name, states in (("outs", outs), ("lses", lses)):
        if isinstance(states, Tensor) and states.dim() == 0:
            raise ValueError(f"fastattn: {name} has no dimensions; it must stack the tensors to merge, (N, ..., L).")
        try:
            pieces.append(tuple(states.unbind() if isinstance(states, Tensor) else states))
        except TypeError:
            raise TypeError(
                f"fastattn: {name} is a {type(states).__name__}; it must be a sequence of tensors or a stacked tensor."
            ) from None
        for i, state in enumerate(pieces[-1]):
            if not isinstance(state, Tensor):
                raise TypeError(f"fastattn: {name}[{i}] is a {type(state).__name__}; it must be a torch.Tensor.")
            if not state.is_floating_point():
                raise TypeError(f"fastattn: {name}[{i}] is {state.dtype}; it must be of a floating-point dtype.")
    outs, lses = pieces
    if len(outs) != len(lses):
        raise ValueError(f"fastattn: there are {len(outs)} outs but {len(lses)} lses; every out needs its lse.")
    if not outs:
        raise ValueError("fastattn: outs is empty; there must be at least one state to merge.")
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if out.dim() < 1 or out.shape != outs[0].shape:
            raise ValueError(
                f"fastattn: outs[{i}] has shape {tuple(out.shape)} and outs[0] {tuple(outs[0].shape)}; all outs must "
                "have one shape (..., L, Dv)."
            )
        if lse.shape != out.shape[:-1]:
            raise ValueError(
                f"fastattn: lses[{i}] has shape {tuple(lse.shape)} but outs[{i}] has {tuple(out.shape)}; an lse has "
                f"its out's shape without the last dimension, {tuple(out.shape[:-1])}."
            )
        if out.dtype != outs[0].dtype:
            raise TypeError(
                f"fastattn: outs[{i}] is {out.dtype} but outs[0] is {outs[0].dtype}; all outs must have one dtype: "
                f"convert with outs[{i}].to({outs[0].dtype})."
            )
        for name, state in (("outs", out), ("lses", lse)):
            if state.device != outs[0].device:
                raise ValueError(
                    f"fastattn: {name}[{i}] is on {state.device} but outs[0] is on {outs[0].device}; all states must "
                    "be on one device."
                )
    return outs, lses
