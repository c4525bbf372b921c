"""Calls of hard_attention that its tests share: with every gradient, and small ones with each feature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastattn

from .cases import Inputs
from .compare import Quantities

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *SIXTEEN_BITS, torch.float64)
MODES = ("sample", "argmax")
ops = torch.ops.fastattn


def compute(inputs: Inputs, seed: int = 0, **more: Any) -> tuple[Quantities, Tensor]:
    """o, log_prob and every gradient by fastattn for the upstream gradients d_o and d_lse; and the index."""
    torch.manual_seed(seed)
    o, index, log_prob = fastattn.hard_attention(inputs.q, inputs.k, inputs.v, **inputs.kwargs, **more)
    upstream = [inputs.d_o.to(o.dtype), inputs.d_lse.to(log_prob.dtype)]
    grads = torch.autograd.grad([o, log_prob], [inputs.q, inputs.k, inputs.v], upstream)
    quantities = {"o": o.detach(), "log_prob": log_prob.detach()}
    return quantities | dict(zip(("dq", "dk", "dv"), grads, strict=True)), index


def qkv(dtype: torch.dtype = torch.float64, grad: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((B, Hq, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, Dv))
    q, k, v = (torch.randn(shape).to(dtype).requires_grad_(grad) for shape in shapes)
    return q, k, v


# Each feature alone, and all together: what hard_attention is called with beside q, k and v.
B, Hq, Hkv, Lq, Lk, D, Dv = 2, 4, 2, 3, 5, 4, 3
FEATURES: dict[str, Callable[[], dict[str, Any]]] = {
    "sample": dict,
    "argmax": lambda: {"mode": "argmax"},
    "temperature": lambda: {"temperature": 0.3},
    "causal": lambda: {"causal": True, "window": (2, None)},
    "mask": lambda: {"mask": torch.rand(B, 1, Lq, Lk) < 0.6},
    "lengths": lambda: {"kv_lengths": torch.tensor([0, 3], dtype=torch.int32)},
    "straight_through": lambda: {"estimator": "straight_through", "temperature": 2.0},
    "all": lambda: {
        "causal": "top_left",
        "window": (2, 1),
        "temperature": 1.7,
        "scale": -0.4,
        "mask": torch.rand(B, 1, Lq, Lk) < 0.8,
        "kv_lengths": torch.tensor([Lk, 2], dtype=torch.int32),
        "estimator": "straight_through",
    },
}


def with_grad(inputs: Inputs) -> Inputs:
    for x in (inputs.q, inputs.k, inputs.v):
        x.requires_grad_()
    return inputs
