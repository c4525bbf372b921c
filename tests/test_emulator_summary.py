"""The CUDA kernels of the summary of attention on the host emulator. What the emulator is: test_emulator.py."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from .cases import Case, Inputs, make_inputs
from .choices import (
    EVERYTHING,
    SUMMARY_CASES,
    random_rows,
    score_error,
    scores_in,
    summary_quantities,
    violations,
    wrong_tops,
)
from .compare import differences
from .emulated import arguments, array, core, tensor
from .emulated_choices import compute_summary
from .emulator_checks import (
    DTYPES,
    bank_conflicts,
    each_dtype,
    each_width,
    leave_out_synchronisations,
    order_dependence,
    poisoned,
    unnoticed,
)


@each_dtype
@pytest.mark.parametrize(("case", "top_k"), SUMMARY_CASES, ids=lambda x: x.id if isinstance(x, Case) else f"top{x}")
def test_parity(case: Case, top_k: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    rows = random_rows(case) if case.Lq % 2 else None
    got, _ = compute_summary(inputs, top_k=top_k, rows=rows)
    exact = summary_quantities(inputs, torch.float64, top_k, rows)
    plain = summary_quantities(inputs, dtype, top_k, rows)
    # A score beside a finite mask value has lost its last bits, in plain float32 code as well.
    relative = 4 * score_error(inputs)
    wrong = violations(got, exact, plain, relative)
    wrong += wrong_tops(inputs, got["top_weights"], got["top_index"], relative)
    assert not wrong, "\n".join([f"{case.id} in {dtype}:", *wrong])
    if top_k:
        assert torch.equal(got["max_weight"], got["top_weights"][..., 0])


def test_statistics_are_attentions() -> None:
    for case, _ in (SUMMARY_CASES[0], SUMMARY_CASES[4], SUMMARY_CASES[11]):
        for dtype in DTYPES:
            inputs = make_inputs(case, dtype)
            got, _ = compute_summary(inputs)
            q, k = array(inputs.q), array(inputs.k)
            soft = core.emulated_attention_forward(q, k, k, **arguments(inputs, None))
            assert torch.equal(got["row_max"], tensor(soft["row_max"]))
            torch.testing.assert_close(got["row_sum"], tensor(soft["row_sum"]), rtol=2e-6, atol=0)
            torch.testing.assert_close(got["lse"], tensor(soft["lse"]), rtol=2e-6, atol=2e-6)


@each_dtype
@pytest.mark.parametrize("top_k", [1, 7, 32, 128])
def test_the_lower_key_comes_first_among_equals(top_k: int, dtype: torch.dtype) -> None:
    """Small integers, whose products have no rounding: the keys are those of a stable sort."""
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randint(-1, 2, (1, 2, n, 16), generator=generator).to(dtype) for n in (70, 200))
    inputs = Inputs(q, k, k, q, q[..., 0].float(), {"scale": 0.5, "causal": "bottom_right"})
    got, _ = compute_summary(inputs, top_k=top_k)
    s = scores_in(inputs, torch.float64)
    order = s.sort(dim=-1, descending=True, stable=True)
    wanted = order.indices[..., :top_k].masked_fill(order.values[..., :top_k] == -math.inf, -1)
    assert torch.equal(got["top_index"], wanted)


@pytest.mark.parametrize("ascending", [True, False])
def test_sorted_scores(ascending: bool) -> None:
    """Every key joins the list, or none after the first ones: the longest and the shortest way through it."""
    k = torch.arange(150.0).view(1, 1, 150, 1)
    k = k if ascending else k.flip(2)
    q = torch.ones(1, 1, 20, 1)
    inputs = Inputs(q, k, k, q, q[..., 0], {"scale": 0.125})
    got, _ = compute_summary(inputs, top_k=100)
    best = torch.arange(149, 49, -1) if ascending else torch.arange(100)
    assert torch.equal(got["top_index"], best.expand(1, 1, 20, 100))


@each_dtype
def test_rows_hidden_by_finite_values_are_uniform(dtype: torch.dtype) -> None:
    inputs = make_inputs(Case(37, 130, D=16, gqa=2), dtype)
    inputs.kwargs["bias"] = torch.full((1, 1, 37, 130), torch.finfo(torch.float32).min)
    got, _ = compute_summary(inputs, top_k=4)
    torch.testing.assert_close(got["entropy"], torch.full_like(got["entropy"], math.log(130)), rtol=1e-6, atol=0)
    torch.testing.assert_close(got["key_mass"], torch.full_like(got["key_mass"], 37 / 130), rtol=1e-5, atol=0)
    assert torch.equal(got["top_index"], torch.arange(4).expand(1, 4, 37, 4))


def test_one_visible_key() -> None:
    for case in (Case(70, 1, D=32), Case(70, 70, D=32, window=(0, 0))):
        got, _ = compute_summary(make_inputs(case, torch.bfloat16), top_k=2)
        assert (got["row_sum"] == 1).all()
        assert (got["entropy"] == 0).all()
        assert (got["max_weight"] == 1).all()
        assert (got["top_weights"] == torch.tensor([1.0, 0.0])).all()
        assert torch.equal(got["key_mass"], torch.full_like(got["key_mass"], 70 if case.Lk == 1 else 1))


def test_rows_that_do_not_count() -> None:
    """Not even where they are NaN; a broadcast row_mask is the same as one written out."""
    case = Case(70, 100, D=16, B=2, gqa=2)
    inputs = make_inputs(case, torch.bfloat16)
    rows = random_rows(case)[:, :1]
    wanted, _ = compute_summary(inputs, rows=rows)
    written_out, _ = compute_summary(inputs, rows=rows.expand(2, 4, 70).contiguous())
    assert torch.equal(wanted["key_mass"], written_out["key_mass"])
    inputs.q.masked_fill_(~rows.unsqueeze(-1), math.nan)
    got, _ = compute_summary(inputs, rows=rows)
    assert torch.equal(got["key_mass"], wanted["key_mass"])
    assert got["entropy"][~rows.expand(2, 4, 70)].isnan().all()
    none, _ = compute_summary(inputs, rows=torch.zeros(1, 1, 1, dtype=torch.bool))
    assert (none["key_mass"] == 0).all()


def test_nan_stays_in_its_row() -> None:
    """And is all that is said of it, to the last entry of its list."""
    inputs = make_inputs(Case(70, 100, D=16, B=2, causal="bottom_right"), torch.float32)
    wanted, _ = compute_summary(inputs, top_k=120)
    inputs.q[1, 0, 33] = math.nan
    got, _ = compute_summary(inputs, top_k=120)
    for name in ("entropy", "max_weight", "top_weights", "lse"):
        assert got[name][1, 0, 33].isnan().all()
        got[name][1, 0, 33] = wanted[name][1, 0, 33]
        assert torch.equal(got[name], wanted[name]), name
    assert torch.equal(got["key_mass"][1, 0].isnan(), torch.arange(100) <= 63)


def test_what_is_not_wanted_is_not_computed() -> None:
    inputs = make_inputs(SUMMARY_CASES[0][0], torch.float16)
    whole, ran = compute_summary(inputs, top_k=8)
    assert ran["forward"]["kernels"] == ["summary_rows", "summary_mass"]
    part, ran = compute_summary(inputs, top_k=0, key_mass=False)
    assert ran["forward"]["kernels"] == ["summary_rows"]
    for name in ("entropy", "max_weight", "lse"):
        assert torch.equal(part[name], whole[name])


# ------------------------------------------------------------------------------------------------------ nothing leaks


@each_dtype
def test_padding_is_not_read(dtype: torch.dtype) -> None:
    for case in (
        Case(40, 200, D=64, B=3, kv_lengths=(1, 130, 65), causal="bottom_right"),
        Case(2, 200, D=24, B=3, gqa=4, kv_lengths=(0, 130, 65), window=(90, 0), bias="bhqk", alibi="h"),
        Case(33, 90, D=256, B=2, Hkv=1, kv_lengths=(89, 17), mask="b11k"),
    ):
        inputs = make_inputs(case, dtype)
        wanted, _ = compute_summary(inputs)
        got, _ = compute_summary(poisoned(inputs))
        assert not differences(wanted, got)


def test_what_is_not_served_is_refused() -> None:
    x = torch.zeros(1, 1, 2, 300).numpy()
    with pytest.raises(ValueError, match="head dims up to 256"):
        core.emulated_attention_summary(x, x)
    x = torch.zeros(1, 1, 2, 8).numpy()
    with pytest.raises(ValueError, match="top_k"):
        core.emulated_attention_summary(x, x, top_k=129)


# -------------------------------------------------------------------------------------------------- the emulator bites

TELLING = [
    Case(140, 200, D=64, Hkv=1, causal="bottom_right"),
    Case(70, 140, D=24, Hkv=1, gqa=2, B=2, kv_lengths=(140, 77), **EVERYTHING),
    Case(33, 200, D=200, Hkv=1, layout="offset"),
]


@each_width
@pytest.mark.parametrize("case", TELLING, ids=lambda case: case.id)
def test_no_order_of_events_changes_a_bit(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    assert not order_dependence(partial(compute_summary, inputs))


@each_width
def test_no_synchronisation_can_be_left_out(dtype: torch.dtype) -> None:
    missed = leave_out_synchronisations(partial(compute_summary, make_inputs(case, dtype)) for case in TELLING)
    # Of each walk a wait and a barrier, and the warp's before it looks for the largest scores.
    assert len(missed) == 5, sorted(missed)
    assert not unnoticed(missed)


@each_width
@pytest.mark.parametrize("D", [64, 128, 256])
def test_main_loops_are_free_of_bank_conflicts(D: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(Case(100, 140, D=D, Hkv=1, causal="bottom_right", bias="1h1k"), dtype)
    _, ran = compute_summary(inputs)
    # Lanes fetch scores that join their lists from wherever those are.
    assert not bank_conflicts(ran, but_for=[("summary.cuh", "load_shared")])
