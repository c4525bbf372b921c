"""fastattn.hard_attention gives the same bits whatever surrounds it, and nothing where there is nothing."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastattn import reference

from .cases import Case, make_inputs
from .compare import differences
from .hard_calls import DTYPES, MODES, compute, with_grad
from .test_parity import dtype_id
from .test_poison import surround


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_repeats_and_thread_counts(isa: str, dtype: torch.dtype) -> None:
    for case in (
        Case(197, 197, D=33, B=2, Hkv=3),
        Case(600, 300, D=8, Hkv=1, gqa=2, causal="top_left"),
        Case(1, 3000, D=16, B=3, gqa=2, kv_lengths=(3000, 0, 131)),
    ):
        inputs = with_grad(make_inputs(case, dtype))
        torch.set_num_threads(1)
        first, index = compute(inputs)
        compute(with_grad(make_inputs(Case(43, 37, D=48, B=2), dtype)))
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            again, same = compute(inputs)
            assert torch.equal(same, index)
            assert not differences(again, first), f"{case.id}, {count} threads"


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_memory_does_not_matter(isa: str, dtype: torch.dtype) -> None:
    plain = Case(70, 133, D=40, Dv=24, B=2, gqa=2, causal="bottom_right", mask="b1qk")
    inputs = with_grad(make_inputs(plain, dtype))
    first, index = compute(inputs)
    for layout in ("blhd", "qkv", "offset", "columns"):
        moved = make_inputs(replace(plain, layout=layout), dtype)
        for name in ("q", "k", "v", "d_o", "d_lse"):
            getattr(moved, name).copy_(getattr(inputs, name).detach())
        moved.kwargs["mask"].copy_(inputs.kwargs["mask"])
        got, same = compute(with_grad(moved))
        assert torch.equal(same, index)
        assert not differences(got, first), layout


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_nothing_around_a_view_leaks(isa: str, dtype: torch.dtype) -> None:
    for case in (
        Case(70, 131, D=32, B=2, gqa=2),
        Case(67, 35, D=17, Dv=24, B=2, causal="bottom_right", mask="bhqk"),
        Case(1, 50, D=3, Dv=5, B=2, gqa=4, kv_lengths=(50, 31)),
    ):
        inputs = make_inputs(case, dtype)
        wanted, index = compute(with_grad(surround(inputs, 0.0)))
        for fill in (torch.nan, torch.inf):
            got, same = compute(with_grad(surround(inputs, fill)))
            assert torch.equal(same, index)
            assert all(torch.equal(got[name], x) for name, x in wanted.items()), case.id


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("estimator", ["reinforce", "straight_through"])
def test_nothing_beyond_the_lengths_leaks(isa: str, estimator: str, dtype: torch.dtype) -> None:
    beyond = torch.arange(131).view(1, 1, -1) >= torch.tensor((0, 77, 131)).view(-1, 1, 1)
    for Lq in (1, 70):
        case = Case(Lq, 131, D=17, Dv=24, B=3, gqa=2, kv_lengths=(0, 77, 131), causal="bottom_right")
        wanted, index = compute(with_grad(make_inputs(case, dtype)), estimator=estimator)
        for fill in (torch.nan, torch.inf, -torch.inf):
            inputs = make_inputs(case, dtype)
            for x in (inputs.k, inputs.v):
                x.masked_fill_(beyond.unsqueeze(-1), fill)
            got, same = compute(with_grad(inputs), estimator=estimator)
            assert torch.equal(same, index)
            assert all(torch.equal(got[name], x) for name, x in wanted.items())
            for name in ("dk", "dv"):
                assert (got[name].masked_fill(~beyond.unsqueeze(-1), 0) == 0).all(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("mode", MODES)
def test_a_row_keeps_its_nan(isa: str, mode: str, dtype: torch.dtype) -> None:
    """A row of q that is NaN has log_prob NaN and the first key that it sees; other rows keep their bits."""
    case = Case(70, 141, D=20, B=2, gqa=2, causal="bottom_right", window=(30, 0))
    wanted, index = compute(with_grad(make_inputs(case, dtype)), mode=mode)
    inputs = make_inputs(case, dtype)
    inputs.q[1, 2, 40] = torch.nan
    got, other = compute(with_grad(inputs), mode=mode)
    own = torch.zeros_like(index, dtype=torch.bool)
    own[1, 2, 40] = True
    for name in ("o", "log_prob", "dq"):
        assert torch.equal(got[name][~own], wanted[name][~own]), name
    assert torch.equal(other[~own], index[~own])
    assert int(other[own]) == 40 + 141 - 70 - 30
    log_p = reference.log_probabilities(inputs.q, inputs.k, **inputs.kwargs, dtype=torch.float64)
    assert torch.equal(reference.hard_choice(log_p)[own], other[own])
    assert got["log_prob"][own].isnan().all()
    assert got["dq"][own].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("zero", ["B", "Hkv", "Lq", "Lk", "Lq-Lk", "B-Lk"])
@pytest.mark.parametrize("estimator", ["reinforce", "straight_through"])
def test_sizes_of_zero(isa: str, estimator: str, zero: str, dtype: torch.dtype) -> None:
    sizes = {"B": 2, "Hkv": 2, "Lq": 5, "Lk": 7} | dict.fromkeys(zero.split("-"), 0)
    inputs = make_inputs(Case(D=8, Dv=6, gqa=2, mask="bhqk", **sizes), dtype)
    got, index = compute(with_grad(inputs), estimator=estimator)
    rows = (sizes["B"], 2 * sizes["Hkv"], sizes["Lq"])
    assert (got["o"].shape, index.shape, got["log_prob"].shape) == ((*rows, 6), rows, rows)
    assert (index == -1).all()
    assert all((x == 0).all() for x in got.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("estimator", ["reinforce", "straight_through"])
def test_blind_rows(isa: str, estimator: str, dtype: torch.dtype) -> None:
    """No visible key, for each reason there is: index -1, output 0, log_prob 0, no gradient, in either mode."""
    hide = torch.ones(6, 1, dtype=torch.bool)
    hide[2] = False
    reasons: list[tuple[dict[str, Any], int, list[int]]] = [
        ({"causal": "bottom_right"}, 4, [0, 1]),
        ({"window": (0, 0)}, 4, [0, 1]),
        ({"mask": hide}, 5, [2]),
        ({"kv_lengths": torch.tensor([0], dtype=torch.int32)}, 5, [0, 1, 2, 3, 4, 5]),
    ]
    for (kwargs, Lk, rows), mode in itertools.product(reasons, MODES):
        inputs = make_inputs(Case(6, Lk), dtype)
        inputs.kwargs.update(kwargs)
        got, index = compute(with_grad(inputs), estimator=estimator, mode=mode)
        blind = torch.zeros(6, dtype=torch.bool)
        blind[rows] = True
        assert (index[:, :, blind] == -1).all()
        assert (index[:, :, ~blind] >= 0).all()
        for name in ("o", "log_prob", "dq"):
            assert (got[name][:, :, blind] == 0).all(), name
        assert all(x.isfinite().all() for x in got.values())
        if blind.all():
            assert all((x == 0).all() for x in got.values())


def test_memory_grows_with_the_length() -> None:
    """Forward and backward at L = 8192: plain code holds 256 MiB of scores alone, several times."""
    program = """
import resource, torch, fastattn
torch.set_num_threads(2)
q, k, v = (torch.randn(1, 1, 8192, 8, requires_grad=True) for _ in range(3))
fastattn.hard_attention(*(x[:, :, :64] for x in (q, k, v)), estimator="straight_through").log_prob.sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fastattn.hard_attention(q, k, v).log_prob.sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert int(done.stdout) < 64 * 1024, f"{int(done.stdout) / 1024:.0f} MiB"
