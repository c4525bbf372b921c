"""Scaled dot-product attention over packed sequences of different lengths."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastattn import _errors, _ops, _vmap, reference
from fastattn._arguments import Causal, Window, accumulator, autocast, causal_code, constant_slopes, window_sides
from fastattn._autograd import Operator, Tensors

# --- The operators ----------------------------------------------------------------------------------------------------


@torch.library.register_fake("fastattn::varlen_attention_forward")
def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    rng_state: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: int,
    window_left: int,
    window_right: int,
    scale: float | None,
    softcap: float,
    dropout_p: float,
    save_stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _ops.check_fake(
        "varlen_attention",
        {
            "q": q,
            "k": k,
            "v": v,
            "cu_seqlens_q": cu_seqlens_q,
            "cu_seqlens_k": cu_seqlens_k,
            "bias": bias,
            "mask": mask,
            "alibi_slopes": alibi_slopes,
            "sinks": sinks,
            "rng_state": rng_state,
        },
        (max_seqlen_q, max_seqlen_k, causal, window_left, window_right, scale, softcap, dropout_p),
    )
    total, Hq, _ = q.shape
    o = _ops.empty_packed_like(q, total, Hq, v.shape[2])
    accumulator = _ops.accumulator_dtype(q.dtype)
    lse = q.new_empty((Hq, total), dtype=accumulator)
    stats = q.new_empty((2, Hq, total) if save_stats else (0,), dtype=accumulator)
    return o, lse, stats


@torch.library.register_fake("fastattn::varlen_attention_backward")
def _backward_fake(
    d_o: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    stats: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    rng_state: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: int,
    window_left: int,
    window_right: int,
    scale: float | None,
    softcap: float,
    dropout_p: float,
    need_d_bias: bool,
    need_d_sinks: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    nothing = q.new_empty((0,), dtype=_ops.accumulator_dtype(q.dtype))
    d_bias = bias.new_empty(bias.shape) if need_d_bias and bias is not None else nothing
    d_sinks = sinks.new_empty(sinks.shape) if need_d_sinks and sinks is not None else torch.empty_like(nothing)
    dq, dk, dv = (_ops.empty_packed_like(x, *x.shape) for x in (q, k, v))
    return dq, dk, dv, d_bias, d_sinks


def _by_reference(tensors: Tensors, settings: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """o and lse as the operator gives them, through plain torch operations in the accumulator type."""
    if torch._guards.detect_fake_mode(tuple(tensors.values())) is not None:
        raise NotImplementedError(
            "fastattn: varlen_attention's second and forward-mode derivatives depend on the values of cu_seqlens_q and"
            " cu_seqlens_k, which a trace does not have; take them outside of torch.compile and torch.export."
        )
    max_seqlen_q, max_seqlen_k, causal, window_left, window_right, scale, softcap, dropout_p = settings
    q, k, v, cu_seqlens_q, cu_seqlens_k = _ops.required(tensors, "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")
    B, Hq = cu_seqlens_q.shape[0] - 1, q.shape[1]
    found = reference.varlen_attention(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        **_ops.reference_mask(tensors, causal, window_left, window_right),
        **_ops.reference_dropout(tensors, dropout_p, (B, Hq, max_seqlen_q, max_seqlen_k)),
        scale=scale,
        softcap=softcap or None,
        bias=tensors["bias"],
        alibi_slopes=tensors["alibi_slopes"],
        sinks=tensors["sinks"],
        return_lse=True,
        dtype=_ops.accumulator_dtype(q.dtype),
    )
    return found[0].to(q.dtype), found[1]


_operator = Operator(
    "varlen_attention",
    inputs=("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "bias", "mask", "alibi_slopes", "sinks", "rng_state"),
    differentiable=("q", "k", "v", "bias", "sinks"),
    results=("o", "lse"),
    upstream=("o", "lse"),
    saved=(
        "q",
        "k",
        "v",
        "o",
        "stats",
        "cu_seqlens_q",
        "cu_seqlens_k",
        "bias",
        "mask",
        "alibi_slopes",
        "sinks",
        "rng_state",
    ),
    wanted=("bias", "sinks"),
    reference=_by_reference,
    places=_vmap.PACKED,
)


# --- The function -----------------------------------------------------------------------------------------------------


@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: Causal = ...,
    window: Window | None = ...,
    scale: float | None = ...,
    softcap: float | None = ...,
    bias: Tensor | None = ...,
    mask: Tensor | None = ...,
    alibi_slopes: Tensor | None = ...,
    sinks: Tensor | None = ...,
    dropout_p: float = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: Causal = ...,
    window: Window | None = ...,
    scale: float | None = ...,
    softcap: float | None = ...,
    bias: Tensor | None = ...,
    mask: Tensor | None = ...,
    alibi_slopes: Tensor | None = ...,
    sinks: Tensor | None = ...,
    dropout_p: float = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: Causal = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Scaled dot-product attention over packed sequences: no padding, one call, differentiable.

    B sequences lie one after the other along the first dimension. Sequence b has the rows ``cu_seqlens_q[b]`` up to
    ``cu_seqlens_q[b + 1]`` of q, and the same of ``cu_seqlens_k`` of k and v; its rows attend to its keys as in::

        o[rows of b] = attention(q[rows of b], k[keys of b], v[keys of b], ...)

    where :func:`fastattn.attention` says what that is. Row i of a sequence, key j and the diagonal are counted within
    it: with n rows and m keys the diagonal of row i is key ``i + m - n`` unless ``causal`` is "top_left". A sequence
    may have no rows or no keys; a row that sees no key has o = 0, lse = -inf and gradients of 0. So have rows beyond
    the last sequence, and keys beyond it are not read.

    Work is shared out by what sequences have to compute, so that one long sequence among short ones keeps all threads
    busy. Accuracy, determinism, autocast and higher derivatives are as in :func:`fastattn.attention`; dropout drops
    the weights that it would drop in the padded batch (B, H, max_seqlen_q, max_seqlen_k) with the same seed.

    Args:
        q: (total_q, Hq, D), float32, bfloat16, float16 or float64, any D >= 1, any strides. o lies in memory as q does.
            On a GPU: no float64, D and Dv at most 256.
        k: (total_k, Hkv, D), of q's dtype and device; Hq is a multiple of Hkv. Query head h reads key head h // G.
        v: (total_k, Hkv, Dv), Dv may differ from D.
        cu_seqlens_q: (B + 1,), int32, on q's device: 0 and the cumulative sums of the sequences' numbers of rows.
        cu_seqlens_k: (B + 1,), int32: the same of their numbers of keys. On a GPU nobody checks the values of the two,
            for it would mean to wait for them: there, what leads out of the tensors counts as the nearest that does
            not.
        max_seqlen_q: Rows of the longest sequence, or more.
        max_seqlen_k: Keys of the longest sequence, or more.
        causal: False; True or "bottom_right"; or "top_left": no row sees keys after its diagonal.
        window: (left, right): the number of keys that a row sees before and after its diagonal, None without limit.
            With ``causal``, right counts as 0.
        scale: Factor on the dot products, 1/sqrt(D) by default.
        softcap: Bounds the scaled dot products to (-softcap, softcap). None or 0: no bound.
        bias: Float, broadcastable to (B, Hq, max_seqlen_q, max_seqlen_k), added to the scores: sequence b takes
            [b, :, :n, :m] of it. Of q's dtype, or float32 with 16-bit inputs. Differentiable in its own shape.
        mask: Bool, broadcastable likewise; True = keep.
        alibi_slopes: (Hq,) or (B, Hq), float, not differentiable: a penalty on the distance in keys.
        sinks: (Hq,), float, differentiable: a score that takes part in each row's softmax and has no value.
        dropout_p: Probability in [0, 1] that a weight is dropped; the others are divided by 1 - dropout_p.
        return_lse: Return the log of the softmax's denominator too.

    Returns:
        o, (total_q, Hq, Dv) in q's dtype; with ``return_lse`` the pair (o, lse), where lse is (Hq, total_q), float32
        (float64 for float64), a natural logarithm, includes the sink, ignores dropout and is differentiable.

    Raises:
        ValueError: Shapes, sizes, devices, numbers or lengths break a rule above; the message names which. Or q is on a
            device for which there is no kernel.
        TypeError: An argument has the wrong type, layout or dtype.

    Source:
        T. Dao, "FlashAttention-2: Faster attention with better parallelism and work partitioning", ICLR 2024.

    Example:
        >>> import torch, fastattn
        >>> lengths = torch.tensor([5, 90, 0, 33])
        >>> cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        >>> q = torch.randn(128, 8, 64, requires_grad=True)
        >>> k, v = torch.randn(128, 2, 64), torch.randn(128, 2, 64)
        >>> o = fastattn.varlen_attention(
        ...     q, k, v, cu_seqlens, cu_seqlens, max_seqlen_q=90, max_seqlen_k=90, causal=True
        ... )
        >>> o.shape
        torch.Size([128, 8, 64])
        >>> o.sum().backward()
    """
    try:
        if torch._C._is_any_autocast_enabled():
            q, k, v, bias = autocast(q, k, v, bias)
        if alibi_slopes is not None:
            alibi_slopes = constant_slopes(alibi_slopes, q)
        if sinks is not None:
            sinks = accumulator("sinks", sinks, q)
        rng_state = _ops.draw_rng_state(q.device) if dropout_p and 0.0 < dropout_p <= 1.0 else None
        if torch.compiler.is_compiling() and bias is None and mask is None:
            max_seqlen_q, max_seqlen_k = _bound(max_seqlen_q), _bound(max_seqlen_k)
        o, lse = _operator(
            (q, k, v, cu_seqlens_q, cu_seqlens_k, bias, mask, alibi_slopes, sinks, rng_state),
            (
                max_seqlen_q,
                max_seqlen_k,
                0 if causal is False else causal_code(causal),
                *window_sides(window),
                scale,
                0.0 if softcap is None else softcap,
                dropout_p,
            ),
        )
    except Exception as error:
        _errors.raise_explained(
            error,
            {
                "q": q,
                "k": k,
                "v": v,
                "cu_seqlens_q": cu_seqlens_q,
                "cu_seqlens_k": cu_seqlens_k,
                "bias": bias,
                "mask": mask,
                "alibi_slopes": alibi_slopes,
                "sinks": sinks,
            },
            {"scale": scale, "softcap": softcap, "dropout_p": dropout_p},
            {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k},
        )
    return (o, lse) if return_lse else o


def _bound(max_seqlen: Any) -> Any:
    """The next power of four: for every value of the operators' ints torch.compile would compile anew.

    Nothing depends on the bound but the shapes of a bias and of a mask, and how a GPU is asked for enough blocks.
    """
    if isinstance(max_seqlen, bool) or not isinstance(max_seqlen, int | torch.SymInt) or max_seqlen < 1:
        return max_seqlen
    bound = 1
    while bound < max_seqlen:
        bound *= 4
    return bound
