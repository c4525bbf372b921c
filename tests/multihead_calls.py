"""Modules and calls that the tests of fastattn.nn.MultiheadAttention share, and all that comes out of a call."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

E, H, L, S, N = 16, 4, 5, 7, 3


@dataclass(frozen=True)
class Module:
    """How a module is constructed."""

    bias: bool
    append: str  # "bias_kv", "zero", "bias_kv+zero" or ""
    dims: tuple[int, int] | None  # kdim, vdim
    layout: str  # "batch_first", "batch_second" or "unbatched"

    def __str__(self) -> str:
        parts = [
            self.layout,
            "bias" if self.bias else "nobias",
            self.append,
            f"kdim{self.dims[0]}" if self.dims else "",
        ]
        return "-".join(part for part in parts if part)

    def arguments(self, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        kdim, vdim = self.dims or (None, None)
        return {
            "embed_dim": E,
            "num_heads": H,
            "bias": self.bias,
            "add_bias_kv": "bias_kv" in self.append,
            "add_zero_attn": "zero" in self.append,
            "kdim": kdim,
            "vdim": vdim,
            "batch_first": self.layout == "batch_first",
            "dtype": dtype,
        }

    def tensor(self, length: int, features: int) -> Tensor:
        shape = {
            "batch_first": (N, length, features),
            "batch_second": (length, N, features),
            "unbatched": (length, features),
        }[self.layout]
        return torch.randn(shape, dtype=torch.float64)


@dataclass(frozen=True)
class Call:
    """How it is called."""

    inputs: str  # "self": one tensor; "memory": key is value; "distinct"
    padding: str  # "", "bool" or "float"
    mask: str  # "", "bool2", "float2", "bool3", "float3", "causal_bool", "causal_float"
    is_causal: bool
    weights: str  # "no", "averaged" or "per_head"


MODULES = [
    Module(bias, append, dims, layout)
    for layout in ("batch_first", "batch_second", "unbatched")
    for bias in (True, False)
    for append in ("", "bias_kv", "zero", "bias_kv+zero")
    for dims in (None, (12, 20))
]
CALLS = [
    Call(inputs, padding, mask, is_causal, weights)
    for inputs in ("self", "memory", "distinct")
    for padding in ("", "bool", "float")
    for mask in ("", "bool2", "float2", "bool3", "float3", "causal_bool", "causal_float")
    for is_causal in (False, True)
    for weights in ("no", "averaged", "per_head")
    if not is_causal or mask.startswith("causal")
]
SHARE = 24  # each module makes one call in so many, each another; together they make every call


def pairs(module: Module) -> list[Call]:
    return CALLS[MODULES.index(module) % SHARE :: SHARE]


def masks(module: Module, call: Call, length: int, keys: int) -> dict[str, Tensor | None]:
    batch = 1 if module.layout == "unbatched" else N
    padding = mask = None
    if call.padding:
        padding = torch.arange(keys) >= torch.tensor([[keys], [keys - 2], [keys - 3]])[:batch]
        if call.padding == "float":
            padding = torch.randn(batch, keys, dtype=torch.float64).masked_fill(padding, -math.inf)
        if module.layout == "unbatched":
            padding = padding[0]
    if call.mask:
        shape = (batch * H, length, keys) if call.mask.endswith("3") else (length, keys)
        mask = torch.rand(shape) < 0.3
        mask[..., 0] = False  # every row sees a key: PyTorch has NaN otherwise
        if call.mask.startswith("causal"):
            mask = torch.ones(length, keys, dtype=torch.bool).triu(1)
        if "float" in call.mask:
            values = torch.zeros(shape) if call.mask.startswith("causal") else torch.randn(shape)
            mask = values.double().masked_fill(mask, -math.inf).requires_grad_()
    return {"key_padding_mask": padding, "attn_mask": mask}


def results(
    module: torch.nn.MultiheadAttention, inputs: list[Tensor], options: dict[str, Any], seed: int = 1
) -> dict[str, Tensor]:
    """Output, weights, and the gradients of everything."""
    mask = options["attn_mask"]
    inputs = [x.detach().requires_grad_() for x in inputs]
    query, key, value = {1: inputs * 3, 2: [*inputs, inputs[-1]], 3: inputs}[len(inputs)]
    output, weights = module(query, key, value, **options)
    torch.manual_seed(seed)
    found = {"output": output}
    loss = (output * torch.randn(output.shape).to(output)).sum()
    if weights is not None:
        found["weights"] = weights
        loss = loss + (weights * torch.randn(weights.shape).to(weights)).sum()
    leaves = dict(zip(("query", "key", "value"), inputs, strict=False)) | dict(module.named_parameters())
    if mask is not None and mask.requires_grad:
        leaves["attn_mask"] = mask
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return found | {f"d {name}": x for name, x in zip(leaves, grads, strict=True) if x is not None}


def nested(*lengths: int, features: int = E) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a prototype, says PyTorch
        return torch.nested.nested_tensor([torch.randn(n, features) for n in lengths])
