"""Small calls of additive_attention that its tests share: each feature alone, and all together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *SIXTEEN_BITS, torch.float64)
ops = torch.ops.fastattn

# Each feature alone, and all together: what additive_attention is called with beside q, k, v and w.
B, Hq, Hkv, Lq, Lk, D, Dv = 2, 4, 2, 3, 5, 4, 3
FEATURES: dict[str, Callable[[], dict[str, Any]]] = {
    "dense": dict,
    "causal": lambda: {"causal": True},
    "mask": lambda: {"mask": torch.rand(B, 1, Lq, Lk) < 0.6},
    "lengths": lambda: {"kv_lengths": torch.tensor([0, 3], dtype=torch.int32)},
    "dropout": lambda: {"dropout_p": 0.4},
    "all": lambda: {
        "causal": "top_left",
        "mask": torch.rand(B, 1, Lq, Lk) < 0.8,
        "kv_lengths": torch.tensor([Lk, 2], dtype=torch.int32),
        "dropout_p": 0.2,
    },
}
each_feature = pytest.mark.parametrize("feature", FEATURES)
each_w = pytest.mark.parametrize("w_shape", [(Hq, D), (D,)], ids=["per-head", "shared"])


def tensors_of(
    w_shape: tuple[int, ...] = (Hq, D), dtype: torch.dtype = torch.float64, grad: bool = True
) -> list[Tensor]:
    shapes = ((B, Hq, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, Dv), w_shape)
    return [torch.randn(shape).to(dtype).requires_grad_(grad) for shape in shapes]


def function_of(kwargs: dict[str, Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    """(o, lse) with the same dropout every time, and lse finite."""

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(7)
        o, lse = fastattn.additive_attention(*tensors, return_lse=True, **kwargs)
        return o, lse.masked_fill(lse == -torch.inf, 0.0)

    return function
