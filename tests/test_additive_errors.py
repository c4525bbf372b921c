"""Every message of fastattn.additive_attention and its operators."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn

from .additive_calls import (
    B,
    D,
    Dv,
    Hkv,
    Hq,
    Lk,
    Lq,
    ops,
    tensors_of,
)
from .bad_calls import Bad, zeros

CALLS = [
    Bad("w-not-a-tensor", TypeError, ("w is a list", "must be a torch.Tensor"), {"w": [1.0]}),
    Bad("w-none", TypeError, ("w is a NoneType", "must be a torch.Tensor"), {"w": None}),
    Bad("q-not-a-tensor", TypeError, ("q is a float", "must be a torch.Tensor"), {"q": 1.0}),
    Bad("v-none", TypeError, ("v is a NoneType", "must be a torch.Tensor"), {"v": None}),
    Bad("w-sparse", TypeError, ("w has layout torch.sparse_coo", "w.to_dense()"), {"w": zeros(Hq, D).to_sparse()}),
    Bad("w-heads", ValueError, ("w has shape (2, 4)", "(D,) = (4,)", "(Hq, D) = (4, 4)"), {"w": zeros(2, D)}),
    Bad("w-dim", ValueError, ("w has shape (5,)", "(D,) = (4,)"), {"w": zeros(5)}),
    Bad("w-rank", ValueError, ("w has shape (1, 4, 4)",), {"w": zeros(1, Hq, D)}),
    Bad("w-dtype", TypeError, ("w is torch.float64 but q is torch.float32", "w.to(torch.float32)"),
        {"w": zeros(D, dtype=torch.float64)}),
    Bad("w-device", ValueError, ("w is on meta but q is on cpu", "w.to(q.device)"), {"w": zeros(D).to("meta")}),
    Bad("k-dim", ValueError, ("k has head dimension 5 but q has 4", "additive scores add q and k"),
        {"k": zeros(B, Hkv, Lk, 5)}),
    Bad("k-heads", ValueError, ("k has 3 heads but q has 4",), {"k": zeros(B, 3, Lk, D), "v": zeros(B, 3, Lk, Dv)}),
    Bad("k-dtype", TypeError, ("k is torch.float64 but q is torch.float32",), {"k": zeros(B, Hkv, Lk, D).double()}),
    Bad("q-integers", TypeError, ("q is torch.int64",), {"q": zeros(B, Hq, Lq, D).long()}),
    Bad("q-rank", ValueError, ("q has 2 dimensions, shape (3, 4)",), {"q": zeros(Lq, D)}),
    Bad("k-rank", ValueError, ("k has 3 dimensions", "additive_attention takes four, (B, H, L, D), or for one head"
        " three, (B, L, D), in all of q, k and v: add"), {"k": zeros(B, Lk, D)}),
    Bad("one-head-k-rank", ValueError, ("k has 4 dimensions, shape (2, 2, 5, 4), but q has 3", "unsqueeze(1)"),
        {"q": zeros(B, Lq, D)}),
    Bad("one-head-v-rank", ValueError, ("v has 4 dimensions", "but q has 3"),
        {"q": zeros(B, Lq, D), "k": zeros(B, Lk, D)}),
    Bad("one-head-mask-rank", ValueError,
        ("mask has shape (2, 1, 3, 5) but q has 3 dimensions", "(B, Lq, Lk) = (2, 3, 5)"),
        {"q": zeros(B, Lq, D), "k": zeros(B, Lk, D), "v": zeros(B, Lk, Dv), "mask": torch.ones(B, 1, Lq, Lk).bool()}),
    Bad("one-head-w", ValueError, ("w has shape (4, 4)", "(Hq, D) = (1, 4)"),
        {"q": zeros(B, Lq, D), "k": zeros(B, Lk, D), "v": zeros(B, Lk, Dv)}),
    Bad("one-head-mask-shape", ValueError,
        ("mask has shape (2, 5, 3) but q has 3 dimensions", "(B, Lq, Lk) = (2, 3, 5): each dimension must be 1"),
        {"q": zeros(B, Lq, D), "k": zeros(B, Lk, D), "v": zeros(B, Lk, Dv), "mask": torch.ones(B, Lk, Lq).bool()}),
    Bad("mask-shape", ValueError, ("mask has shape (5, 3)",), {"mask": torch.ones(Lk, Lq).bool()}),
    Bad("mask-dtype", TypeError, ("mask is torch.float32",), {"mask": torch.ones(Lq, Lk)}),
    Bad("mask-not-a-tensor", TypeError, ("mask is a bool", "must be a torch.Tensor"), {"mask": True}),
    Bad("lengths-dtype", TypeError, ("kv_lengths is torch.int64",), {"kv_lengths": torch.tensor([1, 1])}),
    Bad("lengths-large", ValueError, ("kv_lengths[1] is 6 but k has length 5",),
        {"kv_lengths": torch.tensor([5, 6], dtype=torch.int32)}),
    Bad("causal-name", ValueError, ("causal is 'left'", "'bottom_right'"), {"causal": "left"}),
    Bad("causal-type", TypeError, ("causal is a NoneType",), {"causal": None}),
    Bad("dropout-large", ValueError, ("dropout_p is 1.5", "[0, 1]"), {"dropout_p": 1.5}),
    Bad("dropout-type", TypeError, ("dropout_p is a str",), {"dropout_p": "half"}),
    Bad("dropout-none", TypeError, ("dropout_p is a NoneType",), {"dropout_p": None}),
]  # fmt: skip


def call(arguments: dict[str, Any]) -> Any:
    good: dict[str, Any] = {"q": zeros(B, Hq, Lq, D), "k": zeros(B, Hkv, Lk, D), "v": zeros(B, Hkv, Lk, Dv)}
    good["w"] = zeros(Hq, D)
    return fastattn.additive_attention(**good | arguments)


@pytest.mark.parametrize("bad", [pytest.param(bad, id=bad.id) for bad in CALLS])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_message(bad: Bad, grad: bool) -> None:
    arguments = dict(bad.arguments)
    if grad and "q" not in arguments:
        arguments["q"] = zeros(B, Hq, Lq, D).requires_grad_()
    bad.assert_refused(call, arguments)


def test_good_arguments_pass() -> None:
    lengths = torch.tensor([0, Lk], dtype=torch.int32)
    o = call({"mask": torch.ones(1, Lk).bool(), "kv_lengths": lengths, "causal": "top_left", "dropout_p": 1})
    assert o.shape == (B, Hq, Lq, Dv)


def test_a_bad_probability_draws_nothing() -> None:
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="dropout_p"):
        call({"dropout_p": 2.0})
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("id", ["w-heads", "w-dtype", "k-heads", "mask-shape", "lengths-dtype"])
def test_meta_tensors_are_refused_alike(id: str) -> None:
    bad = next(bad for bad in CALLS if bad.id == id)
    good = {"q": zeros(B, Hq, Lq, D), "k": zeros(B, Hkv, Lk, D), "v": zeros(B, Hkv, Lk, Dv), "w": zeros(Hq, D)}
    arguments = good | bad.arguments
    meta = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in arguments.items()}
    with pytest.raises(bad.error, match=re.escape(bad.parts[0])):
        call(meta)


def test_backward_without_statistics() -> None:
    """Somebody calls the operator without save_stats, and then differentiates."""
    q, k, v, w = tensors_of(dtype=torch.float32)
    o, _, _ = ops.additive_attention_forward(q, k, v, w, None, None, None, 0, 0.0, False)
    with pytest.raises((ValueError, RuntimeError), match="stats is empty"):
        o.sum().backward()
