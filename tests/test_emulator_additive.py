"""The CUDA kernels for additive scores, run on the host emulator: see test_emulator.py for what that is."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from .additive import (
    ADDITIVE_CASES,
    AdditiveCase,
    AdditiveInputs,
    additive_violations,
    expected_by_reference,
    first_of_each_kind,
    make_additive_inputs,
)
from .emulated import MANY_MULTIPROCESSORS, NEVER_SPLIT, core
from .emulated_additive import compute_emulated_additive as compute
from .emulated_additive import dropout_keep
from .emulator_checks import (
    bank_conflicts,
    each_dtype,
    each_width,
    leave_out_synchronisations,
    order_dependence,
    unnoticed,
)

each_kind = pytest.mark.parametrize("case", first_of_each_kind(), ids=lambda case: case.id)


@each_dtype
@pytest.mark.parametrize("case", ADDITIVE_CASES, ids=lambda case: case.id)
def test_parity(case: AdditiveCase, dtype: torch.dtype) -> None:
    """o, lse and every gradient within the bound of additive.py; where keys can be split, split and not."""
    inputs = make_additive_inputs(case, dtype)
    wanted = expected_by_reference(inputs, dropout_keep(inputs))
    got, ran = compute(inputs, multiprocessors=NEVER_SPLIT)
    assert "attention_combine" not in ran["forward"]["kernels"]
    broken = additive_violations(got, wanted)
    assert not broken, "\n".join([f"{case.id} in {dtype}:", *broken])
    if case.Lk > 64:
        got, ran = compute(inputs, multiprocessors=MANY_MULTIPROCESSORS)
        assert "attention_combine" in ran["forward"]["kernels"]
        broken = additive_violations(got, wanted)
        assert not broken, "\n".join([f"{case.id} in {dtype}, keys split:", *broken])


def test_the_kernels_that_run() -> None:
    _, ran = compute(make_additive_inputs(AdditiveCase(3, 70), torch.float32), multiprocessors=MANY_MULTIPROCESSORS)
    assert ran["forward"]["kernels"] == ["additive_forward", "attention_combine"]
    assert ran["backward"]["kernels"] == [
        "attention_backward_rows",
        "additive_backward_dk_dv",
        "additive_backward_dq",
        "additive_backward_dw",
    ]


# ---------------------------------------------------------------------------------------------------- one result only


@each_width
@each_kind
def test_no_order_of_events_changes_a_bit(case: AdditiveCase, dtype: torch.dtype) -> None:
    inputs = make_additive_inputs(case, dtype)
    for multiprocessors in (NEVER_SPLIT, MANY_MULTIPROCESSORS):
        assert not order_dependence(partial(compute, inputs, multiprocessors=multiprocessors))


# ------------------------------------------------------------------------------------------------- rows of one kind


@each_dtype
@pytest.mark.parametrize("Lq", [2, 40])
def test_one_visible_key_leaves_no_gradient_of_scores(Lq: int, dtype: torch.dtype) -> None:
    """Its weight is 1 whatever its score: o is v, and dq, dk and dw are 0, to the bit."""
    inputs = make_additive_inputs(AdditiveCase(Lq, 1, D=20, B=2), dtype)
    inputs.d_lse.zero_()
    got, _ = compute(inputs)
    for name in ("dq", "dk", "dw"):
        assert (got[name] == 0).all(), name
    assert torch.equal(got["o"], inputs.v.expand_as(got["o"]))


@each_dtype
def test_a_weight_that_is_all_there_is_counts_as_one(dtype: torch.dtype) -> None:
    """Scores 200 apart: the other weights underflow, and no gradient of the scores is left."""
    q, k = torch.zeros(1, 1, 3, 8), torch.full((1, 1, 70, 8), -9.0)
    k[:, :, 66] = 9.0
    v, d_o = torch.randn(1, 1, 70, 8), torch.randn(1, 1, 3, 8)
    q, k, v, w, d_o = (x.to(dtype) for x in (q, k, v, torch.full((1, 8), 15.0), d_o))
    got, _ = compute(AdditiveInputs(q, k, v, w, d_o, torch.zeros(1, 1, 3)))
    assert torch.equal(got["o"], v[:, :, 66:67].expand_as(got["o"]))
    for name in ("dq", "dk", "dw"):
        assert (got[name] == 0).all(), name


@each_dtype
def test_infinities_and_nan(dtype: torch.dtype) -> None:
    """An infinite q or k has a tanh of 1; a NaN, and inf - inf, spoil the rows that see them, and no others."""
    inputs = make_additive_inputs(AdditiveCase(40, 70, D=24, causal="bottom_right"), dtype)
    exact = replace(inputs, q=inputs.q.clone(), k=inputs.k.clone())
    inputs.q[..., 3, 5], inputs.k[..., 7, 2], inputs.k[..., 9, 6] = math.inf, -math.inf, math.inf
    exact.q[..., 3, 5], exact.k[..., 7, 2], exact.k[..., 9, 6] = 1e3, -1e3, 1e3
    wanted = expected_by_reference(exact, None)
    got, _ = compute(inputs)
    assert not additive_violations(got, wanted)

    inputs.q[..., 3, 2] = math.inf  # meets -inf
    inputs.q[..., 11, 0] = math.nan
    inputs.k[..., 69, 1] = math.nan  # only the last row sees it
    got, _ = compute(inputs)
    spoilt = torch.zeros(40, dtype=torch.bool)
    spoilt[[3, 11, 39]] = True
    assert got["o"][0, 0, spoilt].isnan().all()
    assert got["lse"][0, 0, spoilt].isnan().all()
    assert torch.equal(got["o"][0, 0, ~spoilt].isfinite(), torch.ones(37, 24, dtype=torch.bool))
    rest = (got["o"].double() - wanted.exact["o"])[0, 0, ~spoilt].abs().max().item()
    assert rest <= 2 * (wanted.plain["o"].double() - wanted.exact["o"]).abs().max().item() + 1e-5


# -------------------------------------------------------------------------------------------------- the emulator bites


def test_no_synchronisation_can_be_left_out() -> None:
    """Every barrier in every kernel, left out one at a time: each is missed by some case."""
    missed = leave_out_synchronisations(
        partial(compute, make_additive_inputs(case, torch.float32)) for case in first_of_each_kind()
    )
    assert len(missed) >= 11, sorted(missed)
    assert not unnoticed(missed)


@each_width
@pytest.mark.parametrize("D", [20, 64, 130])
def test_free_of_bank_conflicts(D: int, dtype: torch.dtype) -> None:
    """All of the kernels, not the main loops alone."""
    for case in (
        AdditiveCase(70, 100, D=D),
        AdditiveCase(2, 100, D=D, layout="offset"),
        AdditiveCase(40, 70, D=D, spikes=True),
    ):
        _, ran = compute(make_additive_inputs(case, dtype), multiprocessors=MANY_MULTIPROCESSORS)
        assert not bank_conflicts(ran), case.id


# --------------------------------------------------------------------------------------------------------------- plans


def plan(**shape: Any) -> dict[str, Any]:
    return core.cuda_additive_plan(**({"B": 1, "Hq": 1, "Dv": 64} | shape))


def test_keys_are_split_where_rows_are_few() -> None:
    decode = plan(B=16, Lq=1, Lk=4096)
    assert decode["row_blocks"] == 1
    # More than two CTAs to each of 132 multiprocessors: the forward kernel's registers leave room for three.
    assert 132 * 2 < decode["blocks"] == 16 * decode["splits"] <= 132 * 3
    assert plan(Lq=1, Lk=100)["splits"] == 2  # never more parts than tiles of keys
    assert plan(Lq=1, Lk=0)["splits"] == 1
    assert plan(B=16, Lq=1024, Lk=1024)["splits"] == 1


def test_plans_are_sound_for_all_shapes() -> None:
    for B, Hq in ((1, 1), (3, 8), (64, 16)):
        for Lq in (1, 2, 31, 32, 33, 1000):
            for Lk in (0, 1, 63, 64, 65, 1000, 100000):
                for Dv in (1, 64, 65, 256):
                    p = plan(B=B, Hq=Hq, Lq=Lq, Lk=Lk, Dv=Dv)
                    assert (p["row_blocks"] - 1) * 32 < Lq <= p["row_blocks"] * 32
                    assert p["blocks"] == p["row_blocks"] * B * Hq * p["splits"]
                    assert 1 <= p["splits"] <= max(1, -(-Lk // 64))
                    assert p["shared_bytes"] <= 99 * 1024
