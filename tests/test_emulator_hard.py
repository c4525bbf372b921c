"""The CUDA kernels of hard attention on the host emulator: the draw, its gradients, and proof that nothing in them is
there for nothing. What the emulator is: test_emulator.py.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from .cases import Case, make_inputs
from .choices import HARD_CASES, Choice, hard_quantities, score_error, violations, wrong_choices
from .compare import differences
from .emulated import MANY_MULTIPROCESSORS, NEVER_SPLIT, arguments, array, core, tensor
from .emulated_choices import BACKWARD, RNG_STATE, compute_hard, hard_backward, hard_forward
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
@pytest.mark.parametrize("case", HARD_CASES, ids=lambda case: case.id)
def test_parity(case: Case, dtype: torch.dtype) -> None:
    """The key that float64 draws with the same noise, log_prob, every gradient; drawn and not, keys split and not."""
    inputs = make_inputs(case, dtype)
    for rng_state in (RNG_STATE, None):
        for multiprocessors in (NEVER_SPLIT, MANY_MULTIPROCESSORS):
            results, choice = hard_forward(inputs, rng_state, multiprocessors=multiprocessors)
            wrong = wrong_choices(inputs, choice, rng_state)
            exact = hard_quantities(inputs, choice.index, torch.float64)
            plain = hard_quantities(inputs, choice.index, dtype)
            gradients = hard_backward(inputs, results)
            got = {"log_prob": choice.log_prob} | {name: tensor(gradients[name]) for name in BACKWARD}
            wrong += violations(got, exact, plain, 2 * score_error(inputs))
            assert not wrong, "\n".join([f"{case.id} in {dtype}, {rng_state}, {multiprocessors}:", *wrong])


@each_dtype
@pytest.mark.parametrize("case", HARD_CASES[:17:2], ids=lambda case: case.id)
def test_the_draw_is_the_cpus(case: Case, dtype: torch.dtype) -> None:
    """The same noise and the same scores, but for rounding: where they take another key, float64 finds both as good."""
    inputs = make_inputs(case, dtype)
    kwargs = inputs.kwargs
    left, right = (-1 if side is None else side for side in kwargs.get("window") or (None, None))
    causal = {False: 0, "top_left": 1, "bottom_right": 2}[kwargs.get("causal", False)]
    for rng_state in (RNG_STATE, None):
        _, emulated = hard_forward(inputs, rng_state)
        o, index, log_prob, _ = torch.ops.fastattn.hard_attention_forward(
            *(inputs.q, inputs.k, inputs.v, kwargs.get("mask"), kwargs.get("kv_lengths")),
            *(torch.tensor(rng_state) if rng_state else None, causal, left, right, kwargs.get("scale"), False),
        )
        assert not wrong_choices(inputs, Choice(index, o, log_prob), rng_state)
        same = emulated.index == index
        assert same.double().mean() > 0.99
        assert torch.equal(emulated.o[same], o[same])
        torch.testing.assert_close(emulated.log_prob[same], log_prob[same], rtol=1e-4, atol=1e-4)


def test_statistics_are_attentions() -> None:
    """row_max and row_sum, from which the backward pass of attention computes the straight-through gradient."""
    for case in (HARD_CASES[0], HARD_CASES[3], HARD_CASES[8], HARD_CASES[10]):
        for dtype in DTYPES:
            inputs = make_inputs(case, dtype)
            hard, _ = hard_forward(inputs, RNG_STATE)
            q, k, v = (array(x) for x in (inputs.q, inputs.k, inputs.v))
            soft = core.emulated_attention_forward(q, k, v, **arguments(inputs, None))
            assert (hard["row_max"] == soft["row_max"]).all()
            torch.testing.assert_close(tensor(hard["row_sum"]), tensor(soft["row_sum"]), rtol=2e-6, atol=0)


@each_dtype
def test_one_visible_key_leaves_no_gradient_of_scores(dtype: torch.dtype) -> None:
    for case in (Case(70, 1, D=32), Case(70, 70, D=32, window=(0, 0)), Case(70, 70, D=64, Hkv=1, window=(0, 0))):
        inputs = make_inputs(case, dtype)
        inputs.q.detach().mul_(30)
        got, _ = compute_hard(inputs)
        assert (got["row_sum"] == 1).all()
        assert (got["log_prob"] == 0).all()
        assert (got["dq"] == 0).all()
        assert (got["dk"] == 0).all()


def test_noise_is_counted_as_dropout_counts() -> None:
    """Uniform scores: the key that is drawn is the one with the largest noise, to the last row, head and key."""
    inputs = make_inputs(Case(70, 131, D=8, B=2, gqa=2), torch.float32)
    inputs.q.zero_()
    for rng_state in (RNG_STATE, (0, 0), (2**64 - 1 - 2**63, 2**40 + 3)):
        _, choice = hard_forward(inputs, rng_state)
        assert not wrong_choices(inputs, choice, rng_state)
        assert wrong_choices(inputs, choice, (rng_state[0], rng_state[1] + 1))
        assert choice.index.unique().numel() > 100
    # A word's uniform number is never 0 or 1, and its exponential variate at either end is finite and positive.
    assert choice.log_prob.isfinite().all()


@each_dtype
def test_the_lowest_key_wins_among_equals(dtype: torch.dtype) -> None:
    inputs = make_inputs(Case(20, 200, D=16, B=2), dtype)
    inputs.k[:] = inputs.k[:, :, :1]
    inputs.k[:, :, 77:] = -inputs.k[:, :, 77:]  # keys 0 to 76 are one key, the others its opposite
    for multiprocessors in (NEVER_SPLIT, MANY_MULTIPROCESSORS):
        _, choice = hard_forward(inputs, None, multiprocessors=multiprocessors)
        assert set(choice.index.unique().tolist()) == {0, 77}


@each_dtype
def test_nan_goes_to_the_first_visible_key(dtype: torch.dtype) -> None:
    """As on the CPU: some key that exists and that the mask shows, the same one everywhere, and log_prob says NaN."""
    inputs = make_inputs(Case(70, 150, D=16, window=(100, 100), mask="11qk"), dtype)
    inputs.q[0, 1, 5:9] = math.nan
    inputs.k[0, 0, 120] = math.nan
    keep = inputs.kwargs["mask"][0, 0] & (
        (torch.arange(150) - torch.arange(70).view(-1, 1) - 80).abs() <= 100
    )  # the diagonal starts at Lk - Lq
    for rng_state in (RNG_STATE, None):
        for multiprocessors in (NEVER_SPLIT, MANY_MULTIPROCESSORS):
            _, choice = hard_forward(inputs, rng_state, multiprocessors=multiprocessors)
            is_nan = torch.zeros(1, 2, 70, dtype=torch.bool)
            is_nan[0, 1, 5:9] = True
            is_nan[0, 0] |= keep[:, 120]
            assert torch.equal(choice.log_prob.isnan(), is_nan)
            first = keep.int().argmax(-1).expand(1, 2, 70)
            assert torch.equal(choice.index[is_nan], first[is_nan])


@pytest.mark.parametrize("which", ["d_o", "d_log_prob", "neither"])
def test_absent_gradients_are_zero(which: str) -> None:
    inputs = make_inputs(Case(70, 90, D=20, Dv=12, B=2, gqa=2), torch.bfloat16)
    results, _ = hard_forward(inputs, RNG_STATE)
    whole = hard_backward(inputs, results)
    part = hard_backward(inputs, results, d_o=which == "d_o", d_log_prob=which == "d_log_prob")
    for name in BACKWARD:
        given = which == ("d_o" if name == "dv" else "d_log_prob")
        assert (part[name] == (whole[name] if given else 0)).all(), name


def test_values_are_added_up_however_many_take_them() -> None:
    """All rows take one key: more hits than the kernel has under way at a time."""
    inputs = make_inputs(Case(100, 40, D=16, Dv=70, gqa=3), torch.float32)
    results, _ = hard_forward(inputs, RNG_STATE)
    for key in (0, 7, 8, 39):
        results["index"][:] = key
        dv = tensor(hard_backward(inputs, results)["dv"])
        wanted = inputs.d_o.double().sum(2).unflatten(1, (2, 3)).sum(2)
        torch.testing.assert_close(dv[:, :, key].double(), wanted, rtol=1e-5, atol=1e-4)
        dv[:, :, key] = 0
        assert (dv == 0).all()


# ------------------------------------------------------------------------------------------------------ nothing leaks


@each_dtype
def test_padding_is_not_read(dtype: torch.dtype) -> None:
    for case in (
        Case(40, 200, D=64, B=3, kv_lengths=(1, 130, 65), causal="bottom_right"),
        Case(2, 200, D=24, B=3, gqa=4, kv_lengths=(0, 130, 65), window=(90, 0)),
        Case(33, 90, D=256, B=2, Hkv=1, kv_lengths=(89, 17), mask="b11k"),
    ):
        inputs = make_inputs(case, dtype)
        for multiprocessors in (NEVER_SPLIT, MANY_MULTIPROCESSORS):
            wanted, _ = compute_hard(inputs, multiprocessors=multiprocessors)
            got, _ = compute_hard(poisoned(inputs), multiprocessors=multiprocessors)
            assert not differences(wanted, got)


def test_what_is_not_served_is_refused() -> None:
    x = torch.zeros(1, 1, 2, 300).numpy()
    with pytest.raises(ValueError, match="head dims up to 256"):
        core.emulated_hard_attention_forward(x, x, x)
    x = torch.zeros(1, 1, 2, 8, dtype=torch.float64).numpy()
    with pytest.raises(ValueError, match="float64"):
        core.emulated_hard_attention_forward(x, x, x)


# -------------------------------------------------------------------------------------------------- the emulator bites

TELLING = [
    Case(140, 200, D=64, Hkv=1, causal="bottom_right"),
    Case(70, 140, D=24, Hkv=1, gqa=2, mask="11qk", B=2, kv_lengths=(140, 77)),
    Case(3, 300, D=128, Hkv=1, gqa=2, layout="offset"),
]


@each_width
@pytest.mark.parametrize("case", TELLING, ids=lambda case: case.id)
def test_no_order_of_events_changes_a_bit(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    for multiprocessors in (NEVER_SPLIT, MANY_MULTIPROCESSORS):
        assert not order_dependence(partial(compute_hard, inputs, multiprocessors=multiprocessors))


@each_width
def test_no_synchronisation_can_be_left_out(dtype: torch.dtype) -> None:
    missed = leave_out_synchronisations(partial(compute_hard, make_inputs(case, dtype)) for case in TELLING)
    # Of each walk a wait and a barrier, and two barriers of a warp where a gradient is written.
    assert len(missed) == 6, sorted(missed)
    assert not unnoticed(missed)


@each_width
@pytest.mark.parametrize("D", [64, 128, 256])
def test_main_loops_are_free_of_bank_conflicts(D: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(Case(100, 140, D=D, Hkv=1, causal="bottom_right"), dtype)
    _, ran = compute_hard(inputs)
    # The store that ends a tile of a gradient, once for a CTA's whole walk: two words of float32 to a lane.
    assert not bank_conflicts(ran, but_for=[("gemm.cuh", "store_shared")])


# --------------------------------------------------------------------------------------------------------------- plans


def test_keys_are_split_where_rows_are_few() -> None:
    def plan(**shape: Any) -> dict[str, int]:
        return core.cuda_hard_forward_plan(**({"dtype": "bfloat16", "B": 1, "Hq": 8, "D": 128} | shape))

    assert plan(Lq=1, Lk=8192)["splits"] > 8
    assert plan(Lq=1, Lk=64)["splits"] == 1
    assert plan(Lq=1, Lk=0)["splits"] == 1
    assert plan(Lq=4096, Lk=4096)["splits"] == 1
    assert plan(Lq=1, Lk=4096, B=64)["splits"] == 1
    for D in (1, 64, 65, 128, 129, 256):
        for dtype in ("float32", "bfloat16"):
            for Lq, Lk in ((1, 1000), (65, 3), (1000, 70000)):
                p = plan(D=D, dtype=dtype, Lq=Lq, Lk=Lk)
                assert p["dim"] >= D
                assert (p["row_blocks"] - 1) * p["resident"] < Lq <= p["row_blocks"] * p["resident"]
                assert (p["key_blocks"] - 1) * p["resident"] < Lk <= p["key_blocks"] * p["resident"]
                assert 1 <= p["splits"] <= -(-Lk // p["streamed"])


def test_parts_of_the_keys_agree() -> None:
    """Split or not, the same key but for rounding, and the merge of the parts leaves the same statistics."""
    inputs = make_inputs(Case(2, 700, D=64, Hkv=2), torch.bfloat16)
    whole, _ = hard_forward(inputs, RNG_STATE, multiprocessors=NEVER_SPLIT)
    split, _ = hard_forward(inputs, RNG_STATE, multiprocessors=MANY_MULTIPROCESSORS)
    assert (
        core.cuda_hard_forward_plan(
            dtype="bfloat16",
            B=1,
            Hq=2,
            Lq=2,
            Lk=700,
            D=64,
            multiprocessors=MANY_MULTIPROCESSORS,
            shared_bytes=99 * 1024,
        )["splits"]
        > 4
    )
    assert (whole["index"] == split["index"]).all()
    for name in ("log_prob", "row_max", "row_sum"):
        a, b = tensor(whole[name]), tensor(split[name])
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_kernels_are_those_of_the_table() -> None:
    inputs = make_inputs(HARD_CASES[0], torch.float16)
    _, ran = compute_hard(inputs)
    assert [run["kernels"] for run in ran.values()] == [
        ["hard_attention_forward", "hard_attention_finish"],
        [
            "hard_attention_backward_rows",
            "hard_attention_backward_dk",
            "hard_attention_backward_dq",
            "hard_attention_backward_dv",
        ],
    ]


def test_the_tensor_type_of_index_survives() -> None:
    index: Tensor = hard_forward(make_inputs(HARD_CASES[1], torch.bfloat16), None)[1].index
    assert index.dtype == torch.int64
