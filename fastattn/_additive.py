"""Additive attention."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastattn import _errors, _ops, reference
from fastattn._arguments import Causal, autocast, causal_code
from fastattn._autograd import Operator, Tensors

# --- The operators ----------------------------------------------------------------------------------------------------


@torch.library.register_fake("fastattn::additive_attention_forward")
def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    mask: Tensor | None,
    kv_lengths: Tensor | None,
    rng_state: Tensor | None,
    causal: int,
    dropout_p: float,
    save_stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors: Tensors = {"q": q, "k": k, "v": v, "w": w, "mask": mask, "kv_lengths": kv_lengths, "rng_state": rng_state}
    _ops.check_fake("additive_attention", tensors, (causal, dropout_p))
    B, Hq, Lq, _ = q.shape
    o = _ops.empty_rows_like(q, B, Hq, Lq, v.shape[3])
    accumulator = _ops.accumulator_dtype(q.dtype)
    lse = q.new_empty((B, Hq, Lq), dtype=accumulator)
    stats = q.new_empty((2, B, Hq, Lq) if save_stats else (0,), dtype=accumulator)
    return o, lse, stats


@torch.library.register_fake("fastattn::additive_attention_backward")
def _backward_fake(
    d_o: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, w: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (_ops.empty_rows_like(x, *x.shape) for x in (q, k, v))
    return dq, dk, dv, w.new_empty(w.shape)


def _by_reference(tensors: Tensors, settings: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """o and lse as the operator gives them, through plain torch operations in the accumulator type."""
    causal, dropout_p = settings
    q, k, v, w = _ops.required(tensors, "q", "k", "v", "w")
    hidden = _ops.reference_mask(tensors, causal)
    del hidden["window"]
    o, lse = reference.additive_attention(
        q,
        k,
        v,
        w,
        **hidden,
        **_ops.reference_dropout(tensors, dropout_p),
        return_lse=True,
        dtype=_ops.accumulator_dtype(q.dtype),
    )
    return o.to(q.dtype), lse


_operator = Operator(
    "additive_attention",
    inputs=("q", "k", "v", "w", "mask", "kv_lengths", "rng_state"),
    differentiable=("q", "k", "v", "w"),
    results=("o", "lse"),
    upstream=("o", "lse"),
    saved=("q", "k", "v", "w", "o", "stats", "mask", "kv_lengths", "rng_state"),
    reference=_by_reference,
)


# --- The function -----------------------------------------------------------------------------------------------------


@overload
def additive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    *,
    mask: Tensor | None = ...,
    causal: Causal = ...,
    kv_lengths: Tensor | None = ...,
    dropout_p: float = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def additive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    *,
    mask: Tensor | None = ...,
    causal: Causal = ...,
    kv_lengths: Tensor | None = ...,
    dropout_p: float = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def additive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    *,
    mask: Tensor | None = None,
    causal: Causal = False,
    kv_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Additive (Bahdanau) attention, fused: O(L D) memory where plain code takes O(Lq Lk D), exact, differentiable.

    With G = Hq / Hkv query heads to a key head, n keys in sequence b (``kv_lengths[b]``, or Lk), and j over the keys
    that row i sees::

        s[b, h, i, j] = w[h] . tanh(q[b, h, i] + k[b, h/G, j])
        lse[b, h, i]  = log(sum_j exp(s[b, h, i, j]))
        o[b, h, i]    = sum_j dropout(exp(s[b, h, i, j] - lse[b, h, i])) * v[b, h/G, j]

    In the paper's notation q is W_a s_(i-1), k is U_a h_j and w is v_a: the projections are the caller's
    (``fastattn.nn.AdditiveAttention`` has them). There is no scale. Numbers of any size will do: far from 0 the tanh is
    1, as it should be.

    Which keys a row sees, the alignment of ``causal`` (True is "bottom_right": the last row sees the last key that
    exists), what a row without a key gives, dropout, determinism, autocast and second derivatives are as in
    :func:`fastattn.attention`.

    Args:
        q: (B, Hq, Lq, D), float32, bfloat16, float16 or float64, any D >= 1 and any strides. Or (B, Lq, D), which is
            one head; then k, v, o and lse have no head dimension either, and the mask broadcasts to (B, Lq, Lk).
        k: (B, Hkv, Lk, D), of q's dtype and device; Hq is a multiple of Hkv. Query head h reads key head h // G.
        v: (B, Hkv, Lk, Dv), Dv may differ from D.
        w: (Hq, D), or (D,) for all heads; of q's dtype and device.
        mask: Bool, broadcastable to (B, Hq, Lq, Lk); True = keep.
        causal: False; True or "bottom_right"; or "top_left": no row sees keys after its diagonal.
        kv_lengths: (B,), int32, on q's device: the number of keys and values that exist; what lies beyond is not read.
        dropout_p: Probability in [0, 1] that a weight is dropped; the others are divided by 1 - dropout_p. Always
            applied: pass 0.0 in evaluation. The seed is drawn from torch's generator of q's device.
        return_lse: Return the log of the softmax's denominator too.

    Returns:
        o, (B, Hq, Lq, Dv) in q's dtype; with ``return_lse`` the pair (o, lse), where lse is (B, Hq, Lq), float32
        (float64 for float64). Differentiable with respect to q, k, v and w.

    Raises:
        ValueError: Shapes, sizes, devices, numbers or lengths break a rule above; the message names which. Or q is on a
            device for which there is no kernel.
        TypeError: An argument has the wrong type, layout or dtype.

    Source:
        D. Bahdanau, K. Cho and Y. Bengio, "Neural machine translation by jointly learning to align and translate",
        ICLR 2015, section 3.1 and appendix A.1.2.

    Example:
        >>> import torch, fastattn
        >>> states, annotations = torch.randn(2, 1, 32), torch.randn(2, 50, 32)  # one step of a decoder
        >>> w = torch.randn(32, requires_grad=True)
        >>> context, lse = fastattn.additive_attention(states, annotations, annotations, w, return_lse=True)
        >>> context.shape, lse.shape
        (torch.Size([2, 1, 32]), torch.Size([2, 1]))
        >>> context.sum().backward()
    """
    try:
        if torch._C._is_any_autocast_enabled():
            q, k, v, w = autocast(q, k, v, w)
        is_one_head = q.dim() == 3
        if is_one_head:
            q, k, v, mask = _with_one_head(q, k, v, mask)
        # A probability beyond [0, 1] is the operator's to refuse.
        rng_state = _ops.draw_rng_state(q.device) if dropout_p and 0.0 < dropout_p <= 1.0 else None
        settings = (0 if causal is False else causal_code(causal), dropout_p)
        o, lse = _operator((q, k, v, w, mask, kv_lengths, rng_state), settings)
    except Exception as error:
        _errors.raise_explained(
            error,
            {"q": q, "k": k, "v": v, "w": w, "mask": mask, "kv_lengths": kv_lengths},
            {"dropout_p": dropout_p},
        )
    if is_one_head:
        o, lse = o.squeeze(1), lse.squeeze(1)
    return (o, lse) if return_lse else o


def _with_one_head(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Any, ...]:
    """The arguments of a call without a head dimension, with one."""
    for name, x in (("k", k), ("v", v)):
        if x.dim() != 3:
            raise ValueError(
                f"fastattn: {name} has {x.dim()} dimensions, shape {tuple(x.shape)}, but q has 3; additive_attention"
                " takes (B, L, D) for one head, or (B, H, L, D), for all of q, k and v: add a dimension with"
                " unsqueeze(1)."
            )
    if mask is not None and mask.dim() >= 3:
        sizes = (q.shape[0], q.shape[1], k.shape[1])
        has_heads = mask.dim() > 3
        if has_heads or any(n not in (1, size) for n, size in zip(mask.shape, sizes, strict=True)):
            remedy = "drop its head dimension with squeeze(1)" if has_heads else "each dimension must be 1 or that size"
            raise ValueError(
                f"fastattn: mask has shape {tuple(mask.shape)} but q has 3 dimensions; then the mask must broadcast to"
                f" (B, Lq, Lk) = {sizes}: {remedy}."
            )
        mask = mask.unsqueeze(1)
    return q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), mask
