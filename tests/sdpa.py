"""What the tests of scaled_dot_product_attention share: the two functions, and how they are compared."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn

sdpa = fastattn.scaled_dot_product_attention
torch_sdpa = F.scaled_dot_product_attention


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def assert_as_exact(fast: Tensor, torchs: Tensor, exact: Tensor, what: str) -> None:
    """fast is at most twice as far from the exact values as PyTorch's result in the same dtype, or a few roundings."""
    assert fast.shape == torchs.shape == exact.shape, what
    assert fast.dtype == torchs.dtype, what
    if fast.numel() == 0:
        return
    error, allowed = ((x.double() - exact).abs().max().item() for x in (fast, torchs))
    allowed = 2 * allowed + 8 * torch.finfo(fast.dtype).eps * max(1.0, exact.abs().max().item())
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def compare(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> None:
    """Output and all gradients against PyTorch's function, in the inputs' dtype and, as the exact values, in float64.

    A mask together with is_causal is given to PyTorch as one mask: it does not take both in all shapes.
    """

    def run(function: Any, dtype: torch.dtype | None) -> dict[str, Tensor]:
        def leaf(x: Tensor | None) -> Tensor | None:
            if x is None or not x.is_floating_point():
                return x
            x = x.detach() if dtype is None else x.detach().to(dtype)
            return x.requires_grad_()

        q, k, v, mask = (leaf(x) for x in (query, key, value, attn_mask))
        arguments, given = dict(options), mask
        if function is torch_sdpa and mask is not None and options.get("is_causal"):
            visible = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
            given = mask & visible if mask.dtype == torch.bool else mask.masked_fill(~visible, -math.inf)
            arguments["is_causal"] = False
        o = function(q, k, v, given, **arguments)
        upstream = torch.linspace(-1, 1, o.numel(), dtype=torch.float64).sin().reshape(o.shape).to(o.dtype)
        leaves = {"q": q, "k": k, "v": v} | ({"mask": mask} if mask is not None and mask.requires_grad else {})
        grads = torch.autograd.grad(o, list(leaves.values()), upstream)
        return {"o": o.detach()} | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}

    fast, torchs, exact = run(sdpa, None), run(torch_sdpa, None), run(torch_sdpa, torch.float64)
    for name in exact:
        assert_as_exact(fast[name], torchs[name], exact[name], name)
    with torch.no_grad():
        assert_as_exact(sdpa(query, key, value, attn_mask, **options), torchs["o"], exact["o"], "o without gradients")
