"""Scaled dot-product attention."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastattn import _errors, _ops, _transforms, reference
from fastattn._arguments import Causal, Window, accumulator, autocast, causal_code, constant_slopes, window_sides
from fastattn._autograd import Operator, Tensors

# --- The operators ----------------------------------------------------------------------------------------------------


@torch.library.register_fake("fastattn::attention_forward")
def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    kv_lengths: Tensor | None,
    rng_state: Tensor | None,
    causal: int,
    window_left: int,
    window_right: int,
    scale: float | None,
    softcap: float,
    dropout_p: float,
    save_stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _ops.check_fake(
        "attention",
        {
            "q": q,
            "k": k,
            "v": v,
            "bias": bias,
            "mask": mask,
            "alibi_slopes": alibi_slopes,
            "sinks": sinks,
            "kv_lengths": kv_lengths,
            "rng_state": rng_state,
        },
        (causal, window_left, window_right, scale, softcap, dropout_p),
    )
    B, Hq, Lq, _ = q.shape
    o = _ops.empty_rows_like(q, B, Hq, Lq, v.shape[3])
    accumulator = _ops.accumulator_dtype(q.dtype)
    lse = q.new_empty((B, Hq, Lq), dtype=accumulator)
    stats = q.new_empty((2, B, Hq, Lq) if save_stats else (0,), dtype=accumulator)
    return o, lse, stats


@torch.library.register_fake("fastattn::attention_backward")
def _backward_fake(
    d_o: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    stats: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    kv_lengths: Tensor | None,
    rng_state: Tensor | None,
    causal: int,
    window_left: int,
    window_right: int,
    scale: float | None,
    softcap: float,
    dropout_p: float,
    need_d_bias: bool,
    need_d_sinks: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    accumulator = _ops.accumulator_dtype(q.dtype)
    nothing = q.new_empty((0,), dtype=accumulator)
    d_bias = bias.new_empty(bias.shape) if need_d_bias and bias is not None else nothing
    d_sinks = sinks.new_empty(sinks.shape) if need_d_sinks and sinks is not None else torch.empty_like(nothing)
    dq, dk, dv = (_ops.empty_rows_like(x, *x.shape) for x in (q, k, v))
    return dq, dk, dv, d_bias, d_sinks


def _by_reference(tensors: Tensors, settings: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """o and lse as attention_forward gives them, through plain torch operations in the accumulator type."""
    causal, window_left, window_right, scale, softcap, dropout_p = settings
    q, k, v = _ops.required(tensors, "q", "k", "v")
    o, lse = reference.attention(
        q,
        k,
        v,
        **_ops.reference_mask(tensors, causal, window_left, window_right),
        **_ops.reference_dropout(tensors, dropout_p),
        scale=scale,
        softcap=softcap or None,
        bias=tensors["bias"],
        alibi_slopes=tensors["alibi_slopes"],
        sinks=tensors["sinks"],
        return_lse=True,
        dtype=_ops.accumulator_dtype(q.dtype),
    )
    return o.to(q.dtype), lse


_operator = Operator(
    "attention",
    inputs=("q", "k", "v", "bias", "mask", "alibi_slopes", "sinks", "kv_lengths", "rng_state"),
    differentiable=("q", "k", "v", "bias", "sinks"),
    results=("o", "lse"),
    upstream=("o", "lse"),
    saved=("q", "k", "v", "o", "stats", "bias", "mask", "alibi_slopes", "sinks", "kv_lengths", "rng_state"),
    wanted=("bias", "sinks"),
    reference=_by_reference,
)
_forward_op, _backward_op = _operator.forward_op, _operator.backward_op
_forward_call, _backward_call = _operator.forward_call, _operator.backward_call


class _Attention(torch.autograd.Function):
    """What ``_operator`` makes for calls outside of a trace, written out: for tiny tensors, 62 µs instead of 66."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        sinks: Tensor | None,
        others: tuple[Tensor | None, ...],
        settings: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor]:
        mask, alibi_slopes, kv_lengths, rng_state = others
        with torch._C._AutoDispatchBelowAutograd():
            o, lse, stats = _forward_call(
                q, k, v, bias, mask, alibi_slopes, sinks, kv_lengths, rng_state, *settings, True
            )
        ctx.save_for_backward(q, k, v, o, stats, bias, mask, alibi_slopes, sinks, kv_lengths, rng_state)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    def backward(ctx: Any, d_o: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        need_dq, need_dk, need_dv, need_d_bias, need_d_sinks, _, _ = ctx.needs_input_grad
        if d_o is None or torch.is_grad_enabled() or _transforms.are_active():
            return (*_operator.gradients(ctx, (d_o, d_lse), ctx.needs_input_grad[:5]), None, None)
        saved = ctx.saved_tensors  # a checkpoint computes them now, and needs autograd for that
        with torch._C._AutoDispatchBelowAutograd():
            dq, dk, dv, d_bias, d_sinks = _backward_call(d_o, d_lse, *saved, *ctx.settings, need_d_bias, need_d_sinks)
        return (
            dq if need_dq else None,
            dk if need_dk else None,
            dv if need_dv else None,
            d_bias if need_d_bias else None,
            d_sinks if need_d_sinks else None,
            None,
            None,
        )


# torch.autograd.Function.apply without its look at torch.func's transforms, which `attention` has taken.
_apply: Any = super(torch.autograd.Function, _Attention).apply


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    kv_lengths: Tensor | None,
    causal: int,
    window_left: int,
    window_right: int,
    scale: float | None,
    softcap: float,
    dropout_p: float,
    rng_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """o and lse of four-dimensional tensors: attention_forward and its gradients, in the cheapest way for the caller.

    The arguments are the operator's. Without rng_state, dropout draws one from the default generator of q's device.
    """
    # A probability beyond [0, 1] is the operator's to refuse.
    if rng_state is None and dropout_p and 0.0 < dropout_p <= 1.0:
        rng_state = _ops.draw_rng_state(q.device)
    settings = (causal, window_left, window_right, scale, softcap, dropout_p)
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        o, lse = _operator((q, k, v, bias, mask, alibi_slopes, sinks, kv_lengths, rng_state), settings)
        return o, lse
    if torch.is_grad_enabled() and (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (bias is not None and bias.requires_grad)
        or (sinks is not None and sinks.requires_grad)
    ):
        others = (mask, alibi_slopes, kv_lengths, rng_state)
        return _apply(q, k, v, bias, sinks, others, settings)
    with torch._C._AutoDispatchBelowAutograd():
        o, lse, _ = _forward_call(q, k, v, bias, mask, alibi_slopes, sinks, kv_lengths, rng_state, *settings, False)
    return o, lse


# --- The function -----------------------------------------------------------------------------------------------------


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: Causal = ...,
    window: Window | None = ...,
    scale: float | None = ...,
    softcap: float | None = ...,
    bias: Tensor | None = ...,
    mask: Tensor | None = ...,
    alibi_slopes: Tensor | None = ...,
    sinks: Tensor | None = ...,
    kv_lengths: Tensor | None = ...,
    dropout_p: float = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: Causal = ...,
    window: Window | None = ...,
    scale: float | None = ...,
    softcap: float | None = ...,
    bias: Tensor | None = ...,
    mask: Tensor | None = ...,
    alibi_slopes: Tensor | None = ...,
    sinks: Tensor | None = ...,
    kv_lengths: Tensor | None = ...,
    dropout_p: float = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Scaled dot-product attention, fused: O(L) memory, exact, differentiable.

    With G = Hq / Hkv query heads to a key head, n keys in sequence b (``kv_lengths[b]``, or Lk), and j over the keys
    that row i sees::

        s[b, h, i, j] = softcap(scale * q[b, h, i] . k[b, h/G, j]) + bias[b, h, i, j] - slope[b, h] * |i + n - Lq - j|
        lse[b, h, i]  = log(sum_j exp(s[b, h, i, j]) + exp(sinks[h]))             softcap(x) = c * tanh(x / c)
        o[b, h, i]    = sum_j dropout(exp(s[b, h, i, j] - lse[b, h, i])) * v[b, h/G, j]

    A row sees key j when j < n, ``mask`` keeps it, its bias is not -inf, and it lies in the row's window around the
    diagonal. Where ``causal`` is False, True or "bottom_right", the diagonal of row i is key ``i + n - Lq``: the last
    row stands at the last key that exists, as a decoder that continues a sequence needs. With "top_left" it is key i,
    as in ``torch.nn.functional.scaled_dot_product_attention(is_causal=True)``. The two are the same when Lq = n. A row
    that sees no key has o = 0, lse = -inf and gradients of 0, with sinks too.

    Products and sums are accumulated in float32 (float64 for float64), and each result is rounded once. The same
    inputs, seed and number of threads give the same bits; with and without gradients the last bits may differ, for
    fewer than 16 rows have a kernel of their own (decoding), which a backward pass cannot follow. On a GPU that needs
    no ``torch.use_deterministic_algorithms``: there is one backward pass, and it is deterministic. Under
    ``torch.autocast``, q, k, v and bias are cast to the autocast dtype, as PyTorch's own attention does.

    Args:
        q: (B, Hq, Lq, D), float32, bfloat16, float16 or float64, any D >= 1. Any strides will do; a tensor whose last
            dimension is not contiguous is copied first. o lies in memory as q does. On a GPU of compute capability 8.0
            or later: no float64, D and Dv at most 256.
        k: (B, Hkv, Lk, D), of q's dtype and device; Hq is a multiple of Hkv. Query head h reads key head h // G.
        v: (B, Hkv, Lk, Dv), Dv may differ from D.
        causal: False; True or "bottom_right"; or "top_left": no row sees keys after its diagonal.
        window: (left, right): the number of keys that a row sees before and after its diagonal, None without limit.
            With ``causal``, right counts as 0.
        scale: Factor on the dot products, 1/sqrt(D) by default.
        softcap: Bounds the scaled dot products to (-softcap, softcap). None or 0: no bound.
        bias: Float, broadcastable to (B, Hq, Lq, Lk), added to the scores; of q's dtype, or float32 with 16-bit
            inputs. Differentiable in its own shape: what it broadcasts is summed without an (Lq, Lk) buffer.
        mask: Bool, broadcastable to (B, Hq, Lq, Lk); True = keep. Tiles of the scores that it leaves empty are skipped.
        alibi_slopes: (Hq,) or (B, Hq), float, not differentiable: a penalty on the distance in keys.
        sinks: (Hq,), float, differentiable: a score that takes part in each row's softmax and has no value.
        kv_lengths: (B,), int32, on q's device: the number of keys and values that exist; what lies beyond is not read.
            Each must lie in [0, Lk]. On a GPU nobody checks that, for it would mean to wait for the values: there,
            others count as the nearest that does.
        dropout_p: Probability in [0, 1] that a weight is dropped; the others are divided by 1 - dropout_p. Always
            applied: pass 0.0 in evaluation. Reproducible under ``torch.manual_seed``: the seed is drawn from the
            generator of q's device, and the same seed drops the same weights on every device.
        return_lse: Return the log of the softmax's denominator too.

    Returns:
        o, (B, Hq, Lq, Dv) in q's dtype; with ``return_lse`` the pair (o, lse), where lse is (B, Hq, Lq), float32
        (float64 for float64), a natural logarithm, includes the sink, ignores dropout and is differentiable.

    Raises:
        ValueError: Shapes, sizes, devices, numbers or lengths break a rule above; the message names which. Or q is on a
            device for which there is no kernel.
        TypeError: An argument has the wrong type, layout or dtype.

    Second derivatives and forward-mode derivatives are right but not fused: they go through plain torch operations and
    take O(Lq * Lk) memory.

    Source:
        T. Dao, "FlashAttention-2: Faster attention with better parallelism and work partitioning", ICLR 2024.

    Example:
        >>> import torch, fastattn
        >>> q = torch.randn(2, 8, 128, 64, requires_grad=True)
        >>> k, v = torch.randn(2, 2, 256, 64), torch.randn(2, 2, 256, 64)
        >>> o, lse = fastattn.attention(q, k, v, causal=True, window=(64, 0), return_lse=True)
        >>> o.shape, lse.shape
        (torch.Size([2, 8, 128, 64]), torch.Size([2, 8, 128]))
        >>> o.sum().backward()
    """
    try:
        if torch._C._is_any_autocast_enabled():
            q, k, v, bias = autocast(q, k, v, bias)
        if alibi_slopes is not None:
            alibi_slopes = constant_slopes(alibi_slopes, q)
        if sinks is not None:
            sinks = accumulator("sinks", sinks, q)
        o, lse = attend(
            q,
            k,
            v,
            bias,
            mask,
            alibi_slopes,
            sinks,
            kv_lengths,
            0 if causal is False else causal_code(causal),
            *window_sides(window),
            scale,
            0.0 if softcap is None else softcap,
            dropout_p,
        )
    except Exception as error:
        _errors.raise_explained(
            error,
            {
                "q": q,
                "k": k,
                "v": v,
                "bias": bias,
                "mask": mask,
                "alibi_slopes": alibi_slopes,
                "sinks": sinks,
                "kv_lengths": kv_lengths,
            },
            {"scale": scale, "softcap": softcap, "dropout_p": dropout_p},
        )
    return (o, lse) if return_lse else o
