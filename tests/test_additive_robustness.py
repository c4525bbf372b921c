"""fastattn.additive_attention gives the same bits whatever surrounds it, and zeros where there is nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn

from .additive_calls import (
    DTYPES,
)
from .cases import Case, make_inputs
from .compare import compute, differences
from .test_parity import dtype_id
from .test_poison import assert_same_bits, surround

# --- Nothing leaks ----------------------------------------------------------------------------------------------------


SURROUNDED = [
    Case(70, 131, D=32, B=2, gqa=2, w="h"),
    Case(67, 35, D=17, Dv=24, B=2, gqa=2, causal="bottom_right", w=""),
    Case(1, 50, D=3, Dv=5, B=2, gqa=4, w="h"),
    Case(97, 131, D=1, Dv=1, mask="bhqk", B=2, w=""),
    Case(33, 66, D=16, mask="b11k", B=2, kv_lengths=(66, 31), dropout_p=0.3, w="h"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", SURROUNDED, ids=lambda case: case.id)
def test_nothing_around_a_view_leaks(isa: str, case: Case, dtype: torch.dtype) -> None:
    """With NaN or inf before, after and between the rows of every input, the bits are those for zeros there."""
    inputs = make_inputs(case, dtype)
    wanted = compute(surround(inputs, 0.0).require_grad())
    assert all(x.isfinite().all() for name, x in wanted.items() if not name.startswith("lse"))
    for fill in (torch.nan, torch.inf):
        assert_same_bits(compute(surround(inputs, fill).require_grad()), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("causal", [False, "top_left", "bottom_right"])
def test_nothing_beyond_the_lengths_leaks(isa: str, causal: Any, dtype: torch.dtype) -> None:
    """NaN in the keys and values that do not exist changes no bit, and their gradients are 0."""
    for Lq in (1, 70):
        case = Case(Lq, 131, D=17, Dv=24, B=3, gqa=2, kv_lengths=(0, 77, 131), causal=causal, w="h")
        beyond = torch.arange(case.Lk).view(1, 1, -1) >= torch.tensor((0, 77, 131)).view(-1, 1, 1)
        wanted = compute(make_inputs(case, dtype).require_grad())
        for fill in (torch.nan, torch.inf, -torch.inf):
            inputs = make_inputs(case, dtype)
            for x in (inputs.k, inputs.v):
                x.masked_fill_(beyond.unsqueeze(-1), fill)
            got = compute(inputs.require_grad())
            assert_same_bits(got, wanted)
            for name in ("dk", "dv"):
                assert (got[name].masked_fill(~beyond.unsqueeze(-1), 0) == 0).all(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("Lq", [1, 70])
def test_a_row_keeps_its_nan(isa: str, dtype: torch.dtype, Lq: int) -> None:
    """NaN in a row of q spoils this row of o, lse and dq, and no other."""
    case = Case(Lq, 141, D=20, B=2, gqa=2, causal="bottom_right", w="h")
    wanted = compute(make_inputs(case, dtype).require_grad())
    inputs = make_inputs(case, dtype)
    inputs.q[1, 2, Lq // 2] = torch.nan
    got = compute(inputs.require_grad())
    for name in ("o", "lse", "dq"):
        own = torch.zeros_like(got[name], dtype=torch.bool)
        own[1, 2, Lq // 2] = True
        assert torch.equal(got[name][~own], wanted[name][~own]), name
        assert got[name][own].isnan().all()


# --- Sizes of zero, rows without a key --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("zero", ["B", "Hkv", "Lq", "Lk", "Lq-Lk", "B-Lk"])
@pytest.mark.parametrize("w", ["", "h"])
def test_sizes_of_zero(isa: str, zero: str, w: str, dtype: torch.dtype) -> None:
    sizes = {"B": 2, "Hkv": 2, "Lq": 5, "Lk": 7} | dict.fromkeys(zero.split("-"), 0)
    case = Case(D=8, Dv=6, gqa=2, w=w, mask="bhqk", dropout_p=0.5, **sizes)
    got = compute(make_inputs(case, dtype).require_grad())
    assert got["o"].shape == (case.B, case.Hq, case.Lq, 6)
    assert got["lse"].shape == (case.B, case.Hq, case.Lq)
    assert (got["lse"] == -torch.inf).all()
    for name, like in make_inputs(case, dtype).differentiable().items():
        assert (got[f"d{name}"].shape, got[f"d{name}"].dtype) == (like.shape, like.dtype)
    assert all((x == 0).all() for name, x in got.items() if not name.startswith("lse"))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_blind_rows_are_exactly_zero(isa: str, dtype: torch.dtype) -> None:
    """No visible key, for each reason there is: o 0, lse -inf, no gradient."""
    hide = torch.ones(6, 1, dtype=torch.bool)
    hide[2] = False
    reasons: list[tuple[dict[str, Any], int, list[int]]] = [
        ({"causal": "bottom_right"}, 4, [0, 1]),
        ({"mask": hide}, 5, [2]),
        ({"kv_lengths": torch.tensor([0], dtype=torch.int32)}, 5, [0, 1, 2, 3, 4, 5]),
    ]
    for kwargs, Lk, rows in reasons:
        inputs = make_inputs(Case(6, Lk, w="h"), dtype)
        inputs.kwargs.update(kwargs)
        got = compute(inputs.require_grad())
        blind = torch.zeros(6, dtype=torch.bool)
        blind[rows] = True
        assert (got["o"][:, :, blind] == 0).all()
        assert (got["lse"][:, :, blind] == -torch.inf).all()
        assert (got["dq"][:, :, blind] == 0).all()
        assert got["lse"][:, :, ~blind].isfinite().all()
        assert all(x.isfinite().all() for name, x in got.items() if not name.startswith("lse"))
        if blind.all():
            assert all((x == 0).all() for name, x in got.items() if not name.startswith("lse"))


# --- The same bits ----------------------------------------------------------------------------------------------------


REPEATED = [
    Case(130, 131, D=17, B=2, Hkv=2, w="h"),
    Case(90, 333, D=16, Hkv=1, gqa=4, causal="bottom_right", w=""),
    Case(530, 300, D=5, Hkv=1, causal="top_left", w="h"),
    Case(1, 700, D=16, B=3, gqa=2, kv_lengths=(700, 0, 131), dropout_p=0.3, w=""),
]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", REPEATED, ids=lambda case: case.id)
def test_repeats_and_thread_counts(isa: str, case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype).require_grad()
    torch.set_num_threads(1)
    first = compute(inputs)
    compute(make_inputs(Case(43, 37, D=48, B=2, w="h"), dtype).require_grad())
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        assert not differences(compute(inputs), first), f"{count} threads"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_w_that_is_expanded_has_a_gradient_for_each_head(dtype: torch.dtype) -> None:
    """One row of numbers with a stride of 0 is not one w for all heads."""
    q, k, v = (torch.randn(2, 3, 9, 8, dtype=dtype) for _ in range(3))
    expanded = torch.randn(1, 8, dtype=dtype).expand(3, 8).detach().requires_grad_()
    copy = expanded.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    assert expanded.stride(0) == 0
    got, wanted = (
        torch.autograd.grad(fastattn.additive_attention(q, k, v, w).square().sum(), w)[0] for w in (expanded, copy)
    )
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_memory_does_not_matter(isa: str, dtype: torch.dtype) -> None:
    """Where rows lie, how far apart and how aligned, changes no bit."""
    plain = Case(70, 133, D=40, Dv=24, B=2, gqa=2, causal="bottom_right", mask="b1qk", w="h")
    inputs = make_inputs(plain, dtype).require_grad()
    first = compute(inputs)
    for layout in ("blhd", "qkv", "offset", "columns"):
        moved = make_inputs(replace(plain, layout=layout), dtype)
        for name in ("q", "k", "v", "d_o", "d_lse"):
            getattr(moved, name).copy_(getattr(inputs, name).detach())
        for name in ("mask", "w"):
            moved.kwargs[name].copy_(inputs.kwargs[name].detach())
        assert not differences(compute(moved.require_grad()), first), layout


def test_without_gradients_the_same_bits(isa: str) -> None:
    for dtype in DTYPES:
        inputs = make_inputs(Case(70, 131, D=32, gqa=2, causal="bottom_right", w="h"), dtype)
        with_grad = compute(inputs.require_grad())
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                o, lse = fastattn.additive_attention(inputs.q, inputs.k, inputs.v, return_lse=True, **inputs.kwargs)
            assert torch.equal(o, with_grad["o"])
            assert torch.equal(lse, with_grad["lse"])
            assert not o.requires_grad


def test_dropout_follows_manual_seed() -> None:
    inputs = make_inputs(Case(20, 30, dropout_p=0.5, w="h"), torch.float32)

    def call() -> Tensor:
        return fastattn.additive_attention(inputs.q, inputs.k, inputs.v, **inputs.kwargs)

    torch.manual_seed(3)
    first, second = call(), call()
    torch.manual_seed(3)
    assert torch.equal(call(), first)
    assert torch.equal(call(), second)
    assert not torch.equal(first, second)


def test_memory_grows_with_the_length() -> None:
    """Forward and backward at L = 4096, D = 64: plain code holds 4 GiB of tanh alone, this not a twentieth of it."""
    program = """
import resource, torch, fastattn
torch.set_num_threads(2)
L = 4096
q, k, v = (torch.randn(1, 1, L, 64, requires_grad=True) for _ in range(3))
w = torch.randn(64, requires_grad=True)
few = [x[:, :, :64] for x in (q, k, v)]
fastattn.additive_attention(*few, w).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fastattn.additive_attention(q, k, v, w).sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert int(done.stdout) < 200 * 1024, f"{int(done.stdout) / 1024:.0f} MiB"
