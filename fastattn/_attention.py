"""The native attention function."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from fastattn import _errors, _ops
from fastattn._arguments import Causal, Window, accumulator, autocast, causal_code, window_sides


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
    inputs, seed and number of threads give the same bits. On a GPU that needs no
    ``torch.use_deterministic_algorithms``: there is one backward pass, and it is deterministic. Under
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
            alibi_slopes = accumulator("alibi_slopes", alibi_slopes, q)
            if alibi_slopes.requires_grad and torch.is_grad_enabled():
                raise ValueError(
                    "fastattn: alibi_slopes requires a gradient, which attention does not compute; pass"
                    " alibi_slopes.detach(), or the penalty as a bias, which is differentiable."
                )
        if sinks is not None:
            sinks = accumulator("sinks", sinks, q)
        o, lse = _ops.attention(
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
        clean = _errors.explain(
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
        if clean is error:
            raise
        raise clean from None
    return (o, lse) if return_lse else o
