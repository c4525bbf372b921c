"""Calls of fastattn.attention, small enough for gradcheck: each feature alone, and all together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn

ops = torch.ops.fastattn
# Small, for gradcheck's sake, which calls a function once or twice for every number.
B, Hq, Hkv, Lq, Lk, D, Dv = 2, 4, 2, 3, 5, 4, 3


def randn(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = False) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_(grad)


def qkv(dtype: torch.dtype = torch.float64, grad: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    return (
        randn(B, Hq, Lq, D, dtype=dtype, grad=grad),
        randn(B, Hkv, Lk, D, dtype=dtype, grad=grad),
        randn(B, Hkv, Lk, Dv, dtype=dtype, grad=grad),
    )


def slopes() -> Tensor:
    return torch.tensor([0.5, 0.25, 0.1, 0.01])


# Each feature alone, and all together: what fastattn.attention is called with beside q, k and v.
FEATURES: dict[str, Callable[[], dict[str, Any]]] = {
    "dense": dict,
    "causal": lambda: {"causal": True},
    "top_left": lambda: {"causal": "top_left"},
    "window": lambda: {"window": (2, 1)},
    "scale": lambda: {"scale": -0.7},
    "softcap": lambda: {"softcap": 1.5},
    "bias": lambda: {"bias": randn(B, Hq, Lq, Lk, grad=True)},
    "bias_row": lambda: {"bias": randn(Hq, 1, Lk, grad=True)},
    "bias_scalar": lambda: {"bias": randn(grad=True)},
    "mask": lambda: {"mask": torch.rand(B, 1, Lq, Lk) < 0.6},
    "mask_rows": lambda: {"mask": torch.arange(Lq).view(Lq, 1) % 2 == 0},
    "alibi": lambda: {"alibi_slopes": slopes()},
    "sinks": lambda: {"sinks": randn(Hq, grad=True)},
    "lengths": lambda: {"kv_lengths": torch.tensor([Lk, 3], dtype=torch.int32)},
    "no_keys": lambda: {"kv_lengths": torch.tensor([0, 3], dtype=torch.int32)},
    "dropout": lambda: {"dropout_p": 0.4},
    "all": lambda: {
        "causal": True,
        "window": (3, None),
        "scale": 0.4,
        "softcap": 2.0,
        "bias": randn(1, Hq, 1, Lk, grad=True),
        "mask": torch.rand(B, 1, Lq, Lk) < 0.8,
        "alibi_slopes": slopes().expand(B, Hq),
        "sinks": randn(Hq, grad=True),
        "kv_lengths": torch.tensor([Lk, 5], dtype=torch.int32),
        "dropout_p": 0.2,
    },
}
each_feature = pytest.mark.parametrize("feature", FEATURES)


def inputs_of(feature: str, dtype: torch.dtype = torch.float64) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    tensors = qkv(dtype)
    kwargs = FEATURES[feature]()
    for name in ("bias", "sinks"):
        if name in kwargs:
            kwargs[name] = kwargs[name].detach().to(dtype).requires_grad_()
    return tensors, kwargs


def differentiable(tensors: tuple[Tensor, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    return (*tensors, *(kwargs[name] for name in ("bias", "sinks") if name in kwargs))


def function_of(kwargs: dict[str, Any], attention: Any = fastattn.attention) -> Callable[..., tuple[Tensor, Tensor]]:
    """(o, lse) as a function of the differentiable tensors alone, with the same dropout every time, and lse finite."""
    names = [name for name in ("bias", "sinks") if name in kwargs]

    def function(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(7)
        o, lse = attention(q, k, v, return_lse=True, **kwargs | dict(zip(names, rest, strict=True)))
        return o, lse.masked_fill(lse == -torch.inf, 0.0)  # finite differences need numbers

    return function


def operator_arguments(feature: str, dtype: torch.dtype, grad: bool, save_stats: bool = True) -> tuple[Any, ...]:
    """What the operator gets for fastattn.attention(**FEATURES[feature])."""
    caught: list[tuple[Any, ...]] = []
    tensors, kwargs = inputs_of(feature, dtype)

    class Catch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if op is ops.attention_forward.default:
                caught.append(args)
            return op(*args, **(kwargs or {}))

    with torch.no_grad(), Catch():
        fastattn.attention(*tensors, **kwargs)
    args = list(caught[0])
    for i in (0, 1, 2, 3, 6):
        if args[i] is not None:
            args[i] = args[i].detach().requires_grad_(grad)
    args[-1] = save_stats
    return tuple(args)


def blhd(x: Tensor) -> Tensor:
    """The same numbers in memory order (B, L, H, D), as a projection that was split into heads leaves them."""
    return x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(x.requires_grad)
