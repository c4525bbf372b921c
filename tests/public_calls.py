"""One call of everything public in fastattn that computes, with sizes to choose: what compilers and transforms get."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastattn

# No two are equal: torch.compile takes equal sizes for the same symbol.
H, Hkv, D, Dv, E = 4, 2, 8, 6, 24
SIZES = (3, 7, 11)  # B, Lq, Lk
OTHER_SIZES = ((5, 9, 13), (9, 21, 34))


@dataclass(frozen=True)
class PublicCall:
    """A function of tensors alone.

    Args:
        public: Its name in fastattn.
        function: What to call; a module is made by `made`.
        inputs: From (B, Lq, Lk) to its tensors; those that are float have gradients if `has_gradients`.
        has_gradients: Whether the results are differentiable.
    """

    public: str
    function: Callable[..., Any]
    inputs: Callable[[int, int, int], tuple[Tensor, ...]]
    has_gradients: bool = True

    def arguments(self, sizes: tuple[int, int, int] = SIZES, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        tensors = [x.to(dtype) if x.is_floating_point() else x for x in self.inputs(*sizes)]
        return tuple(x.requires_grad_(self.has_gradients and x.is_floating_point()) for x in tensors)


def made(build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    torch.manual_seed(1)
    return build().eval()


def _qk(B: int, Lq: int, Lk: int) -> tuple[Tensor, ...]:
    return torch.randn(B, H, Lq, D), torch.randn(B, Hkv, Lk, D)


def _qkv(B: int, Lq: int, Lk: int) -> tuple[Tensor, ...]:
    return (*_qk(B, Lq, Lk), torch.randn(B, Hkv, Lk, Dv))


def _packed(B: int, Lq: int, Lk: int) -> tuple[Tensor, ...]:
    cu_seqlens = [torch.arange(B + 1, dtype=torch.int32) * n for n in (Lq, Lk)]
    tensors = (torch.randn(B * n, h, d) for n, h, d in ((Lq, H, D), (Lk, Hkv, D), (Lk, Hkv, Dv)))
    return (*tensors, *cu_seqlens)


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Any:
    return fastattn.varlen_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=64, max_seqlen_k=64, causal=True, return_lse=True
    )


def _cache(B: int, Lq: int, Lk: int) -> tuple[Tensor, ...]:
    lengths = torch.arange(B, dtype=torch.int32) % (Lk - 1)
    caches = torch.randn(B, Hkv, Lk + Lq, D), torch.randn(B, Hkv, Lk + Lq, Dv)
    return (torch.randn(B, H, Lq, D), *caches, torch.randn(B, Hkv, Lq, D), torch.randn(B, Hkv, Lq, Dv), lengths)


def _append(q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Any:
    return fastattn.attention_with_kv_cache(q, k_cache, v_cache, k=k, v=v, cache_lengths=lengths, causal=True)


def _states(B: int, Lq: int, _: int) -> tuple[Tensor, ...]:
    return (*(torch.randn(B, H, Lq, D) for _ in range(2)), *(torch.randn(B, H, Lq) for _ in range(2)))


def _sequences(B: int, Lq: int, Lk: int) -> tuple[Tensor, ...]:
    return torch.randn(B, Lq, E), torch.randn(B, Lk, E)


def _encoder() -> torch.nn.Module:
    layer = torch.nn.TransformerEncoderLayer(E, 4, 32, batch_first=True, dropout=0.0)
    return fastattn.replace_modules(torch.nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)).train()


def _module(build: Callable[[], torch.nn.Module], **options: Any) -> Callable[..., Any]:
    module = made(build)
    return lambda query, key: module(query, key, **options)


def _multihead() -> Callable[..., Any]:
    module = made(lambda: fastattn.nn.MultiheadAttention(E, 4, batch_first=True))
    return lambda query, key: module(query, key, key)


CALLS: dict[str, PublicCall] = {
    "attention": PublicCall(
        "attention", lambda q, k, v: fastattn.attention(q, k, v, causal=True, return_lse=True), _qkv
    ),
    "sdpa": PublicCall(
        "scaled_dot_product_attention",
        lambda q, k, v: fastattn.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        _qkv,
    ),
    "varlen": PublicCall("varlen_attention", _varlen, _packed),
    "kv_cache": PublicCall("attention_with_kv_cache", _append, _cache, has_gradients=False),
    "additive": PublicCall(
        "additive_attention",
        lambda q, k, v, w: fastattn.additive_attention(q, k, v, w, causal=True, return_lse=True),
        lambda *sizes: (*_qkv(*sizes), torch.randn(H, D)),
    ),
    "hard": PublicCall("hard_attention", lambda q, k, v: fastattn.hard_attention(q, k, v, mode="argmax"), _qkv),
    "straight_through": PublicCall(
        "hard_attention",
        lambda q, k, v: fastattn.hard_attention(q, k, v, mode="argmax", estimator="straight_through"),
        _qkv,
    ),
    "summary": PublicCall(
        "attention_summary", lambda q, k: fastattn.attention_summary(q, k, top_k=2), _qk, has_gradients=False
    ),
    "weights": PublicCall("attention_weights", lambda q, k: fastattn.attention_weights(q, k, causal=True), _qk),
    "merge": PublicCall(
        "merge_attention_states",
        lambda out, other, lse, other_lse: fastattn.merge_attention_states((out, other), (lse, other_lse)),
        _states,
    ),
    "nn-multihead": PublicCall("nn.MultiheadAttention", _multihead(), _sequences),
    "nn-additive": PublicCall(
        "nn.AdditiveAttention", _module(lambda: fastattn.nn.AdditiveAttention(E, E, 16, num_heads=2)), _sequences
    ),
    **{
        f"nn-luong-{score}": PublicCall(
            "nn.LuongAttention", _module(lambda score=score: fastattn.nn.LuongAttention(score, E)), _sequences
        )
        for score in ("dot", "general", "concat")
    },
    "nn-hard": PublicCall("nn.HardAttention", _module(lambda: fastattn.nn.HardAttention(E, E, 16)), _sequences),
    "replaced": PublicCall("replace_modules", made(_encoder), lambda B, Lq, Lk: (torch.randn(B, Lq, E),)),
}

# What computes nothing, or (a cache's books, replace_sdpa) is tested by itself.
OTHERS = {
    *("AttentionSummary", "HardAttentionOutput", "Info", "SdpaCalls", "ServedModules"),
    *("info", "integrations", "nn", "plot_attention", "reference"),
    *("restore_modules", "restore_sdpa", "sdpa_calls", "served_modules"),
    *("KVCache", "replace_sdpa", "replaced_sdpa"),
    "nn.ProjectedKeys",
}


def every_public_name() -> set[str]:
    return {*fastattn.__all__, *(f"nn.{name}" for name in fastattn.nn.__all__)}


def numbers(results: Any) -> Tensor:
    """One number from all float results, for a gradient that they all take part in."""
    leaves = [x for x in torch.utils._pytree.tree_leaves(results) if isinstance(x, Tensor) and x.is_floating_point()]
    total = torch.zeros((), dtype=torch.float64)
    for x in leaves:
        total = total + x.masked_fill(x == -torch.inf, 0.0).sin().double().sum()
    return total


def outcome(function: Callable[..., Any], call: PublicCall, arguments: tuple[Tensor, ...]) -> Any:
    """The results and the gradients."""
    torch.manual_seed(2)
    results = function(*arguments)
    if not call.has_gradients:
        return results, arguments  # a cache was written
    inputs = [x for x in arguments if x.requires_grad]
    return results, torch.autograd.grad(numbers(results), inputs, allow_unused=True, materialize_grads=True)
