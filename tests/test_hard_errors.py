"""Every message of fastattn.hard_attention and its operators."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn

from .bad_calls import Bad, zeros
from .hard_calls import B, D, Dv, Hkv, Hq, Lk, Lq, ops

CALLS = [
    Bad("mode", ValueError, ("mode is 'soft'", "'sample' or 'argmax'"), {"mode": "soft"}),
    Bad("mode-type", ValueError, ("mode is None",), {"mode": None}),
    Bad("estimator", ValueError, ("estimator is 'gumbel'", "'reinforce' or 'straight_through'"),
        {"estimator": "gumbel"}),
    Bad("temperature-zero", ValueError, ("temperature is 0.0", "the mode 'argmax'"), {"temperature": 0.0}),
    Bad("temperature-negative", ValueError, ("temperature is -1",), {"temperature": -1}),
    Bad("temperature-nan", ValueError, ("temperature is nan",), {"temperature": math.nan}),
    Bad("temperature-inf", ValueError, ("temperature is inf", "finite"), {"temperature": math.inf}),
    Bad("temperature-tiny", ValueError, ("temperature is 1e-40", "too large for torch.float32"),
        {"temperature": 1e-40}),
    Bad("temperature-type", TypeError, ("temperature is a Tensor", "float"), {"temperature": torch.tensor(1.0)}),
    Bad("temperature-none", TypeError, ("temperature is a NoneType",), {"temperature": None}),
    Bad("temperature-bool", TypeError, ("temperature is a bool",), {"temperature": True}),
    Bad("generator-type", TypeError, ("generator is a int", "torch.Generator"), {"generator": 3}),
    Bad("generator-device", ValueError, ("generator is on cpu but q is on meta", "torch.Generator(q.device)"),
        {"q": zeros(B, Hq, Lq, D).to("meta"), "k": zeros(B, Hkv, Lk, D).to("meta"),
         "v": zeros(B, Hkv, Lk, Dv).to("meta"), "generator": torch.Generator()}),
    Bad("scale-inf", ValueError, ("scale is inf",), {"scale": math.inf}),
    Bad("scale-inf-cold", ValueError, ("scale is inf",), {"scale": math.inf, "temperature": 0.5}),
    Bad("scale-type", TypeError, ("scale is a str", "float"), {"scale": "1", "temperature": 0.5}),
    Bad("q-not-a-tensor", TypeError, ("q is a list", "must be a torch.Tensor"), {"q": [1.0]}),
    Bad("v-none", TypeError, ("v is a NoneType",), {"v": None}),
    Bad("k-sparse", TypeError, ("k has layout torch.sparse_coo",), {"k": zeros(B, Hkv, Lk, D).to_sparse()}),
    Bad("q-rank", ValueError, ("q has 3 dimensions",), {"q": zeros(Hq, Lq, D)}),
    Bad("q-rank-cold", ValueError, ("q has 3 dimensions",), {"q": zeros(Hq, Lq, D), "temperature": 0.5}),
    Bad("q-integers", TypeError, ("q is torch.int64",), {"q": zeros(B, Hq, Lq, D).long()}),
    Bad("q-integers-cold", TypeError, ("q is torch.int64",), {"q": zeros(B, Hq, Lq, D).long(), "temperature": 0.5}),
    Bad("k-heads", ValueError, ("k has 3 heads but q has 4",), {"k": zeros(B, 3, Lk, D), "v": zeros(B, 3, Lk, Dv)}),
    Bad("v-length", ValueError, ("v has length 6 but k has 5",), {"v": zeros(B, Hkv, 6, Dv)}),
    Bad("v-device", ValueError, ("v is on meta but q is on cpu",), {"v": zeros(B, Hkv, Lk, Dv).to("meta")}),
    Bad("mask-shape", ValueError, ("mask has shape (5, 3)",), {"mask": torch.ones(Lk, Lq).bool()}),
    Bad("mask-dtype", TypeError, ("mask is torch.float32",), {"mask": torch.ones(Lq, Lk)}),
    Bad("lengths-large", ValueError, ("kv_lengths[1] is 6 but k has length 5",),
        {"kv_lengths": torch.tensor([5, 6], dtype=torch.int32)}),
    Bad("causal-name", ValueError, ("causal is 'left'",), {"causal": "left"}),
    Bad("window-number", TypeError, ("window is 128", "pair (left, right)"), {"window": 128}),
    Bad("window-negative", ValueError, ("window is (-1, 0)",), {"window": (-1, 0)}),
]  # fmt: skip


def call(arguments: dict[str, Any]) -> Any:
    good: dict[str, Any] = {"q": zeros(B, Hq, Lq, D), "k": zeros(B, Hkv, Lk, D), "v": zeros(B, Hkv, Lk, Dv)}
    return fastattn.hard_attention(**good | arguments)


@pytest.mark.parametrize("bad", [pytest.param(bad, id=bad.id) for bad in CALLS])
@pytest.mark.parametrize("estimator", ["no_grad", "reinforce", "straight_through"])
def test_message(bad: Bad, estimator: str) -> None:
    arguments = dict(bad.arguments)
    if estimator != "no_grad":
        arguments = {"estimator": estimator, "q": zeros(B, Hq, Lq, D).requires_grad_()} | arguments
    bad.assert_refused(call, arguments)


def test_good_arguments_pass() -> None:
    lengths = torch.tensor([0, Lk], dtype=torch.int32)
    result = call({"mask": torch.ones(1, Lk).bool(), "kv_lengths": lengths, "causal": "top_left", "window": (0, None),
                   "temperature": 2, "scale": 0.0, "generator": torch.Generator()})  # fmt: skip
    assert result.output.shape == (B, Hq, Lq, Dv)
    assert isinstance(result, fastattn.HardAttentionOutput)
    output, index, log_prob = result
    assert output is result.output
    assert index is result.index
    assert log_prob is result.log_prob


@pytest.mark.parametrize("id", ["k-heads", "mask-shape", "v-length", "temperature-zero"])
def test_meta_tensors_are_refused_alike(id: str) -> None:
    bad = next(bad for bad in CALLS if bad.id == id)
    good = {"q": zeros(B, Hq, Lq, D), "k": zeros(B, Hkv, Lk, D), "v": zeros(B, Hkv, Lk, Dv)}
    meta = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in (good | bad.arguments).items()}
    with pytest.raises(bad.error, match=re.escape(bad.parts[0])):
        call(meta)


def backward_arguments() -> dict[str, Any]:
    q, k, v = zeros(B, Hq, Lq, D), zeros(B, Hkv, Lk, D), zeros(B, Hkv, Lk, Dv)
    o, index, log_prob, stats = ops.hard_attention_forward(q, k, v, None, None, None, 0, -1, -1, None, True)
    return {"d_o": o, "d_log_prob": log_prob, "q": q, "k": k, "v": v, "index": index, "stats": stats}


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"d_o": zeros(B, Hq, Lq, D)}, "d_o has shape (2, 4, 3, 4)"),
        ({"d_log_prob": zeros(B, Hq)}, "d_log_prob has shape (2, 4)"),
        ({"d_log_prob": zeros(B, Hq, Lq).double()}, "d_log_prob is torch.float64"),
        (
            {"index": torch.zeros(B, Hq, 1, dtype=torch.int64)},
            "fastattn: index has shape (2, 4, 1); it must be (2, 4, 3)",
        ),
        ({"index": torch.zeros(B, Hq, Lq, dtype=torch.int32)}, "fastattn[TypeError]: index is torch.int32; it must be"),
        ({"index": torch.full((B, Hq, Lq), Lk)}, "index holds 5 but k has length 5"),
        ({"index": torch.full((B, Hq, Lq), -2)}, "index holds -2 but k has length 5"),
        ({"stats": torch.empty(0)}, "save_stats=True"),
        ({"stats": zeros(2, B, Hq, 1)}, "stats has shape"),
    ],
)
def test_operator_message(change: dict[str, Any], part: str) -> None:
    arguments = backward_arguments() | change
    with pytest.raises((ValueError, RuntimeError), match=re.escape(part)) as raised:
        ops.hard_attention_backward(*arguments.values(), None, None, 0, -1, -1, None)
    assert str(raised.value).startswith("fastattn")
