"""Sizes of zero and one, sequences without keys, calls without gradients."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import fastattn

from .cases import Case, make_inputs
from .compare import compute, expected, violations

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Every feature that could divide by, or index with, a size of zero.
FEATURES: list[dict[str, Any]] = [
    {},
    {"causal": "bottom_right", "sinks": True},
    {"causal": "top_left", "window": (3, 3), "softcap": 2.0},
    {"bias": "bhqk", "mask": "bhqk", "alibi": "bh"},
    {"bias": "1h1k", "mask": "b1q1", "dropout_p": 0.5},
    {"bias": "1111", "alibi": "h", "dropout_p": 1.0, "sinks": True},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", FEATURES, ids=lambda features: "-".join(features) or "plain")
@pytest.mark.parametrize("zero", ["B", "Hkv", "Lq", "Lk", "Lq-Lk", "B-Lk"])
def test_sizes_of_zero(isa: str, zero: str, features: dict[str, Any], dtype: torch.dtype) -> None:
    """No sequences, heads, rows or keys: results of the right shape, o 0, lse -inf, gradients 0."""
    sizes = {"B": 2, "Hkv": 2, "Lq": 5, "Lk": 7} | dict.fromkeys(zero.split("-"), 0)
    case = Case(D=8, Dv=6, gqa=2, **sizes, **features)
    got = compute(make_inputs(case, dtype).require_grad())
    assert got["o"].shape == (case.B, case.Hq, case.Lq, 6)
    assert got["o"].dtype == dtype
    assert got["lse"].shape == (case.B, case.Hq, case.Lq)
    assert (got["lse"] == -torch.inf).all()
    for name, like in make_inputs(case, dtype).differentiable().items():
        assert got[f"d{name}"].shape == like.shape
        assert got[f"d{name}"].dtype == like.dtype
    assert all((x == 0).all() for name, x in got.items() if not name.startswith("lse"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sequences_without_keys(isa: str, dtype: torch.dtype) -> None:
    """kv_lengths of 0 beside others, and of 0 only: as if the keys were not there."""
    for lengths in ((0, 9), (9, 0), (0, 0)):
        for features in FEATURES:
            case = Case(5, 9, D=8, B=2, gqa=2, kv_lengths=lengths, **features)
            got = compute(make_inputs(case, dtype).require_grad())
            assert not violations(got, expected(case, dtype)), case.id
            for b in range(2):
                if lengths[b] == 0:
                    assert all((got[name][b] == 0).all() for name in ("o", "dq", "dk", "dv"))
                    assert (got["lse"][b] == -torch.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_of_one(isa: str, dtype: torch.dtype) -> None:
    """One of everything: o is v, whatever the score; and each size of one among others."""
    q, k, v = (torch.randn(1, 1, 1, 1).to(dtype).requires_grad_() for _ in range(3))
    o, lse = fastattn.attention(q, k, v, return_lse=True)
    assert torch.equal(o, v)
    torch.testing.assert_close(lse, (q.double() * k.double())[..., 0].to(lse.dtype))
    dq, dk, dv = torch.autograd.grad(o, (q, k, v), torch.ones_like(o))
    assert (dq == 0).all()
    assert (dk == 0).all()
    assert (dv == 1).all()
    for Lq, Lk, D, Dv in itertools.product((1, 2), repeat=4):
        case = Case(Lq, Lk, D=D, Dv=Dv, Hkv=1, causal="bottom_right", sinks=True)
        assert not violations(compute(make_inputs(case, dtype).require_grad()), expected(case, dtype)), case.id


@pytest.mark.parametrize("dtype", DTYPES)
def test_inference_alone(isa: str, dtype: torch.dtype) -> None:
    """Without gradients: no graph, the same bits as with them, o without lse, lse with it, and no statistics kept."""
    case = Case(33, 70, D=16, B=2, gqa=2, causal="bottom_right", bias="1hqk", sinks=True)
    inputs = make_inputs(case, dtype)
    call = (inputs.q, inputs.k, inputs.v)
    o, lse = fastattn.attention(*call, return_lse=True, **inputs.kwargs)
    assert o.grad_fn is None
    assert torch.equal(fastattn.attention(*call, **inputs.kwargs), o)
    recorded = compute(inputs.require_grad())
    assert torch.equal(recorded["o"], o)
    assert torch.equal(recorded["lse"], lse)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            got = fastattn.attention(*call, **inputs.kwargs)
        assert got.grad_fn is None
        assert torch.equal(got, o)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("names", [("q",), ("k",), ("v",), ("bias",), ("sinks",), ("q", "bias"), ("k", "v")])
def test_some_gradients_alone(isa: str, dtype: torch.dtype, names: tuple[str, ...]) -> None:
    """Those that are asked for have the bits that they have among all; through o alone, lse alone and both."""
    case = Case(33, 70, D=16, B=2, gqa=2, causal="bottom_right", bias="1hqk", sinks=True)

    def grads(required: tuple[str, ...], outputs: slice) -> dict[str, torch.Tensor]:
        inputs = make_inputs(case, dtype)
        named = {name: x.requires_grad_() for name, x in inputs.differentiable().items() if name in required}
        results = fastattn.attention(inputs.q, inputs.k, inputs.v, return_lse=True, **inputs.kwargs)[outputs]
        upstream = (inputs.d_o, inputs.d_lse)[outputs]
        given = torch.autograd.grad(results, list(named.values()), upstream, allow_unused=True)
        return dict(zip(named, given, strict=True))

    for outputs in (slice(0, 1), slice(1, 2), slice(0, 2)):
        everything = grads(("q", "k", "v", "bias", "sinks"), outputs)
        for name, g in grads(names, outputs).items():
            if g is None or everything[name] is None:
                assert name == "v"  # lse does not depend on it
                assert outputs == slice(1, 2)
            else:
                assert torch.equal(g, everything[name]), name
