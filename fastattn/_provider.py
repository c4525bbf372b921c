"""fastattn as a provider of PyTorch's flash attention: torch.nn.attention.activate_flash_attention_impl("fastattn").

Importing fastattn registers the provider (torch >= 2.11 has the registry) and changes nothing else. Activating it puts
these kernels in place of PyTorch's own at the dispatcher, below autograd, where every caller ends: Python, compiled
graphs, TorchScript and C++. torch.nn.attention.restore_flash_attention_impl() takes them out again.

    aten::_scaled_dot_product_flash_attention_for_cpu            what SDPA calls for 4-d inputs without dropout, with
    aten::_scaled_dot_product_flash_attention_for_cpu_backward   Dv = D, and a mask that needs no gradient
    aten::_native_multi_head_attention, dense and nested         the fast path of nn.TransformerEncoderLayer and of
                                                                 nn.MultiheadAttention, in evaluation: no SDPA there
    aten::_scaled_dot_product_flash_attention                    on a GPU, where torch and fastattn have CUDA: what SDPA
    aten::_scaled_dot_product_flash_attention_backward           calls when it chooses flash attention, for 16-bit
                                                                 inputs without a mask; served without dropout

SDPA's other calls (on the CPU: dropout, Dv != D, 2-d, 3-d and 5-d inputs, broadcasting, the gradient of a mask; on a
GPU: masks, float32) do not pass here: fastattn.replace_sdpa() serves those. Layouts and shapes of the results are
exactly PyTorch's, because compiled code relies on them. A call that these kernels do not cover goes to the kernel that
was there before.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.attention
import torch.nn.functional as F
from torch import DispatchKeySet, Tensor

from fastattn import _attention, _cuda

NAME = "fastattn"

# aten::_scaled_dot_product_flash_attention_for_cpu keeps lse = m + log(l) alone for its backward pass (m the row's
# largest score, l its sum of exponentials). Half a unit in the last place of lse is a relative error of up to
# 2^-24 |lse| in every probability of the row: at 256 no more than scores of that size have from their own rounding, and
# at the -1e9 of a finite mask all of log(l), a factor of up to Lk. Beyond the bound m and l are computed again.
_LSE_BOUND = 256.0

_NO_WINDOW = -1
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Handle:
    """What an activation is undone with. `remove()` is for torch's registry; a second one does nothing."""

    def __init__(self) -> None:
        self._library: torch.library.Library | None = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            # PyTorch warns that kernels are overridden, which is what the caller has asked for.
            warnings.filterwarnings("ignore", message="Warning only once for all operators", category=UserWarning)
            for op, key, kernel in (*_KERNELS, *(_CUDA_KERNELS if _cuda.missing is None else ())):
                self._override(op, key, kernel)

    def _override(self, op: str, key: str, kernel: Callable[..., Any]) -> None:
        previous = torch.library.get_kernel(f"aten::{op}", key)

        def override(keys: DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
            try:
                return kernel(*args, **kwargs)
            except _NotServed:
                return previous.call_boxed(keys, *args, **kwargs)

        assert self._library is not None
        self._library.impl(op, override, key, with_keyset=True)

    def remove(self) -> None:
        """Give the operators their previous kernels back."""
        if self._library is not None:
            self._library._destroy()
            self._library = None


class _NotServed(Exception):
    """The call is one for PyTorch's own kernel, which computes it, or refuses it in PyTorch's words."""


# --- SDPA ------------------------------------------------------------------------------------------------------------


def _attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """o, lse and stats. settings: causal (0 or 1), scale, save_stats."""
    causal, scale, save_stats = settings
    try:
        return _attention._forward_op(
            *(query, key, value, bias, mask),
            *(None, None, None, None),  # ALiBi, sinks, kv_lengths, dropout
            *(causal, _NO_WINDOW, _NO_WINDOW, scale, 0.0, 0.0, save_stats),
        )
    except ValueError:
        # PyTorch's kernel does not compare these two, and reads beyond the end of value.
        if key.size(2) != value.size(2):
            raise
        raise _NotServed from None


def _bias(attn_mask: Tensor | None, query: Tensor) -> Tensor | None:
    """SDPA's mask, which is a float by the time that it arrives here, as the operator takes it."""
    if attn_mask is None:
        return None
    if attn_mask.dim() < 4:
        attn_mask = attn_mask.expand((1,) * (4 - attn_mask.dim()) + attn_mask.shape)
    return attn_mask.double() if query.dtype == torch.float64 else attn_mask


def _flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """aten::_scaled_dot_product_flash_attention_for_cpu: o as torch.empty_like(query) lies, lse (B, Hq, Lq)."""
    if dropout_p != 0.0:
        raise _NotServed
    o, lse, _ = _attend(query, key, value, _bias(attn_mask, query), None, int(is_causal), scale, False)
    if attn_mask is not None:
        # PyTorch's kernel gives 0 to a row that sees nothing, and its backward pass would make NaN of -inf, should this
        # provider be deactivated in between.
        lse.nan_to_num_(nan=math.nan, posinf=math.inf, neginf=0.0)
    return _lying_as(query, o), _in_rows(lse)


def _flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """aten::_scaled_dot_product_flash_attention_for_cpu_backward: dq, dk and dv, with heads inside their rows."""
    if dropout_p != 0.0:
        raise _NotServed
    bias = _bias(attn_mask, query)
    causal = int(is_causal)
    stats = _stats(logsumexp)
    if logsumexp.numel() > 0 and not logsumexp.abs().amax().item() <= _LSE_BOUND:
        _, _, stats = _attend(query, key, value, bias, None, causal, scale, True)
    dq, dk, dv = _attend_backward(grad_out, query, key, value, out, stats, bias, causal, scale)
    return _in_rows(dq), _in_rows(dk), _in_rows(dv)


def _stats(logsumexp: Tensor) -> Tensor:
    """Row maximum m and sum l: probabilities are exp(s - m) / l, for any m and l with m + log(l) = lse.

    Not l = 1, though: from that the kernel concludes that one key has all the weight.
    """
    return torch.stack((logsumexp - math.log(2.0), torch.full_like(logsumexp, 2.0)))


def _attend_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    stats: Tensor,
    bias: Tensor | None,
    causal: int,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    try:
        dq, dk, dv, _, _ = _attention._backward_op(
            *(grad_out, None, query, key, value, out, stats, bias, None),
            *(None, None, None, None),
            *(causal, _NO_WINDOW, _NO_WINDOW, scale, 0.0, 0.0, False, False),
        )
    except ValueError:
        raise _NotServed from None
    return dq, dk, dv


def _lying_as(like: Tensor, x: Tensor) -> Tensor:
    """x with memory as torch.empty_like(like) has it."""
    if x.stride() == like.stride():
        return x
    expected = torch.empty_like(like)
    return x if x.stride() == expected.stride() else expected.copy_(x)


def _in_rows(x: Tensor) -> Tensor:
    """x, (B, H, L, ...), with memory of shape (B, L, H, ...), which is how PyTorch's kernels allocate theirs."""
    if x.size(1) == 1 or x.size(2) == 1 or x.stride(1) < x.stride(2):
        return x  # the operator's results have one of the two layouts
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _check_on_gpu(query: Tensor, key: Tensor, dropout_p: float, is_causal: bool) -> None:
    """Refuses what is PyTorch's: dropout, whose mask its own generator draws, and the corner of unequal lengths."""
    if (
        dropout_p != 0.0
        or (is_causal and query.size(2) != key.size(2))
        or query.dtype not in (torch.bfloat16, torch.float16)
        or _cuda.obstacle(query.device.index) is not None
    ):
        raise _NotServed


def _flash_forward_on_gpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """aten::_scaled_dot_product_flash_attention: o, lying as torch.empty_like(query), lse, and dropout's."""
    _check_on_gpu(query, key, dropout_p, is_causal)
    if return_debug_mask:
        raise _NotServed
    o, lse, _ = _attend(query, key, value, None, None, int(is_causal), scale, False)
    rng_state = torch.empty(2, dtype=torch.uint64, device=query.device)
    unused = torch.empty((), dtype=torch.uint64, device=query.device)
    debug_mask = query.new_empty(0)
    return _lying_as(query, o), lse, None, None, query.size(2), key.size(2), rng_state, unused, debug_mask


def _flash_backward_on_gpu(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """aten::_scaled_dot_product_flash_attention_backward: dq, dk and dv as torch.empty_like of their inputs lie.

    No mask comes this way, so that lse is no larger than the scores and says enough; nobody waits to look at it.
    """
    _check_on_gpu(query, key, dropout_p, is_causal)
    stats = _stats(logsumexp)
    grads = _attend_backward(grad_out, query, key, value, out, stats, None, int(is_causal), scale)
    dq, dk, dv = (_lying_as(x, grad) for x, grad in zip((query, key, value), grads, strict=True))
    return dq, dk, dv


# --- The fast path of nn.TransformerEncoderLayer and nn.MultiheadAttention -------------------------------------------


def _check_projections(
    query: Tensor, embed_dim: int, num_head: int, qkv_weight: Tensor, qkv_bias: Tensor, need_weights: bool
) -> None:
    if (
        need_weights
        or query.dtype not in _DTYPES
        or query.dim() != 3
        or num_head < 1
        or embed_dim < num_head
        or embed_dim % num_head
        or qkv_weight.shape != (3 * embed_dim, embed_dim)
        or qkv_bias.shape != (3 * embed_dim,)
    ):
        raise _NotServed


def _split_heads(x: Tensor, num_head: int) -> Tensor:
    """(B, L, H * D) -> (B, H, L, D), a view."""
    return x.unflatten(-1, (num_head, -1)).transpose(1, 2)


def _multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """aten::_native_multi_head_attention of (B, L, E) tensors; E = H * D, weights (3 E, E) and (E, E).

    mask_type 0: mask (L, L), 1: (B, L), 2: (B, H, L, L); whatever is not 0 in it hides the key, -inf of a mask that was
    made a float included.
    """
    _check_projections(query, embed_dim, num_head, qkv_weight, qkv_bias, need_weights)
    if query.numel() == 0 or not query.shape == key.shape == value.shape:
        raise _NotServed
    keep = None
    if mask is not None:
        if mask_type == 1:
            mask = mask[:, None, None, :]
        elif mask.dim() == 2:
            mask = mask[None, None]
        elif mask.dim() != 4:
            raise _NotServed
        keep = mask == 0
    if query is key and key is value:
        q, k, v = F.linear(query, qkv_weight, qkv_bias).chunk(3, dim=-1)
    else:
        weights, biases = qkv_weight.chunk(3), qkv_bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
    q, k, v = (_split_heads(x, num_head) for x in (q, k, v))
    o, _, _ = _attend(q, k, v, None, keep, 0, None, False)
    return F.linear(o.transpose(1, 2).flatten(2), proj_weight, proj_bias), None


def _nested_multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The same of nested tensors, (B, L_b, E) with a length of its own for each sequence, which is what a padding mask
    becomes. The projections take all sequences at once and attention one after the other, so that nothing is padded.
    """
    _check_projections(query, embed_dim, num_head, qkv_weight, qkv_bias, need_weights)
    if query is not key or key is not value or mask is not None:
        raise _NotServed
    sequences = query.unbind()
    if not sequences:
        raise _NotServed
    lengths = [sequence.size(0) for sequence in sequences]
    qkv = F.linear(torch.cat(sequences), qkv_weight, qkv_bias)  # (sum of lengths, 3 E)
    o = qkv.new_empty((sum(lengths), embed_dim))
    for rows, target in zip(qkv.split(lengths), o.split(lengths), strict=True):
        q, k, v = (_split_heads(x[None], num_head) for x in rows.chunk(3, dim=-1))
        target.copy_(_attend(q, k, v, None, None, 0, None, False)[0].transpose(1, 2).flatten(2)[0])
    return torch.nested.as_nested_tensor(list(F.linear(o, proj_weight, proj_bias).split(lengths))), None


_KERNELS: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("_scaled_dot_product_flash_attention_for_cpu", "CPU", _flash_forward),
    ("_scaled_dot_product_flash_attention_for_cpu_backward", "CPU", _flash_backward),
    ("_native_multi_head_attention", "CPU", _multi_head_attention),
    ("_native_multi_head_attention", "NestedTensorCPU", _nested_multi_head_attention),
)
# PyTorch's own fast path on a GPU ends at SDPA.
_CUDA_KERNELS: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("_scaled_dot_product_flash_attention", "CUDA", _flash_forward_on_gpu),
    ("_scaled_dot_product_flash_attention_backward", "CUDA", _flash_backward_on_gpu),
)


# --- The registry ----------------------------------------------------------------------------------------------------


def _register() -> bool:
    """Tell torch's registry of this provider. False: this torch has none, or no way back to its own kernels."""
    register = getattr(torch.nn.attention, "register_flash_attention_impl", None)
    if register is None or not hasattr(torch.library, "get_kernel"):
        return False
    register(NAME, register_fn=Handle)
    return True


_registered = _register()


def state() -> str:
    """The provider's state in words, for fastattn.info()."""
    if not _registered:
        return "not available: this torch has no registry of flash attention providers"
    current = torch.nn.attention.current_flash_attention_impl()
    if current == NAME:
        return "active"
    return "registered, not active" + (f" ({current} is)" if current is not None else "")
