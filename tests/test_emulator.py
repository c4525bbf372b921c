"""The CUDA kernels, run on the host emulator: parity over the whole case table, and proof that the emulator notices.

The kernels are the ones that nvcc compiles; the emulator runs their threads in random order, lets asynchronous copies
land late, and fails at races, deadlocks, and accesses out of bounds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn._ops import draw_rng_state

from .cases import CASES, Case, make_inputs
from .compare import differences, expected, violations
from .emulated import MANY_MULTIPROCESSORS, NEVER_SPLIT, array, compute_emulated, core, is_served, tensor
from .emulator_checks import (
    DTYPES,
    SHORT,
    bank_conflicts,
    each_dtype,
    each_width,
    leave_out_synchronisations,
    order_dependence,
    poisoned,
    unnoticed,
)


def matrix() -> Iterator[Any]:
    """Each case in float32 and one of the 16-bit types, which differ in conversions alone; every third in all."""
    for n, case in enumerate(CASES):
        left_out = {0: None, 1: torch.float16, 2: torch.bfloat16}[n % 3]
        for dtype in (torch.bfloat16,) if case.heavy else DTYPES:
            if is_served(case) and (dtype != left_out or case.heavy):
                yield pytest.param(case, dtype, id=f"{case.id}-{SHORT[dtype]}")


@pytest.mark.parametrize(("case", "dtype"), list(matrix()))
def test_parity(case: Case, dtype: torch.dtype) -> None:
    """o, lse and every gradient within the bound of tests/compare.py; where keys can be split, split and not."""
    inputs = make_inputs(case, dtype)
    got, ran = compute_emulated(inputs, multiprocessors=NEVER_SPLIT)
    assert "attention_combine" not in ran["forward"]["kernels"]
    broken = violations(got, expected(case, dtype))
    assert not broken, "\n".join([f"{case.id} in {dtype}:", *broken])

    got, ran = compute_emulated(inputs, multiprocessors=MANY_MULTIPROCESSORS)
    if "attention_combine" in ran["forward"]["kernels"]:
        broken = violations(got, expected(case, dtype))
        assert not broken, "\n".join([f"{case.id} in {dtype}, keys split:", *broken])


def test_the_table_reaches_every_kernel() -> None:
    """Every forward variant, both kinds of backward, splits and chunks: or the table would prove less than it seems."""
    kernels: set[str] = set()
    for case in CASES[::5]:
        if not case.heavy and is_served(case):
            for multiprocessors in (NEVER_SPLIT, MANY_MULTIPROCESSORS):
                _, ran = compute_emulated(make_inputs(case, torch.bfloat16), multiprocessors=multiprocessors)
                kernels |= {name for run in ran.values() for name in run["kernels"]}
    assert kernels == {
        "attention_forward",
        "attention_combine",
        "attention_backward_rows",
        "attention_backward_sinks",
        "attention_backward_dk_dv",
        "attention_backward_dk",
        "attention_backward_dv",
        "attention_backward_dq",
        "attention_backward_bias",
        "attention_backward_bias_sum",
    }


def test_what_is_not_served_is_refused() -> None:
    x = torch.zeros(1, 1, 2, 300).numpy()
    with pytest.raises(ValueError, match="head dims up to 256"):
        core.emulated_attention_forward(x, x, x)
    x = torch.zeros(1, 1, 2, 8, dtype=torch.float64).numpy()
    with pytest.raises(ValueError, match="float64"):
        core.emulated_attention_forward(x, x, x)


# ---------------------------------------------------------------------------------------------------- one result only

# One case for each kernel and way through it: plain and with everything, many rows and few, wide heads, split keys.
EVERYTHING: dict[str, Any] = {"bias": "11qk", "mask": "b11k", "sinks": True, "dropout_p": 0.3, "softcap": 5.0, "B": 2}
TELLING = [
    Case(140, 300, D=64, Hkv=1, causal="bottom_right"),
    Case(150, 140, D=32, Hkv=1, gqa=2, alibi="h", kv_lengths=(140, 77), causal="bottom_right", **EVERYTHING),
    Case(100, 150, D=192, Hkv=1),
    Case(3, 300, D=128, Hkv=1, gqa=4, window=(200, 0), causal="bottom_right"),
    Case(70, 90, D=17, Dv=24, Hkv=1, layout="offset", bias="1h1k"),
]


@each_width
@pytest.mark.parametrize("case", TELLING, ids=lambda case: case.id)
def test_no_order_of_events_changes_a_bit(case: Case, dtype: torch.dtype) -> None:
    """Fibers in other orders, copies that land at once or as late as they may, one thread or two: the same bits."""
    inputs = make_inputs(case, dtype)
    for multiprocessors in (NEVER_SPLIT, MANY_MULTIPROCESSORS):
        assert not order_dependence(partial(compute_emulated, inputs, multiprocessors=multiprocessors))


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropout_mask_is_the_cpus(p: float) -> None:
    for Lq, Lk in ((5, 7), (33, 64), (1, 1)):
        state = [int(x) for x in draw_rng_state()]
        fast = core.emulated_dropout_mask(*state, 2, 3, Lq, Lk, p)
        assert (fast == core.dropout_mask(*state, 2, 3, Lq, Lk, p)).all()


# ------------------------------------------------------------------------------------------------------ nothing leaks


@each_dtype
@pytest.mark.parametrize(
    "case",
    [
        Case(70, 131, D=32, B=3, gqa=2, kv_lengths=(131, 64, 0)),
        Case(40, 200, D=64, B=3, kv_lengths=(1, 130, 65), causal="bottom_right"),
        Case(2, 200, D=24, B=3, gqa=4, kv_lengths=(1, 130, 65), window=(90, 0)),
        Case(70, 131, D=17, B=2, kv_lengths=(100, 31), bias="bhqk", mask="b11k", dropout_p=0.2, sinks=True),
        Case(33, 90, D=256, B=2, Hkv=1, kv_lengths=(89, 17)),
    ],
    ids=lambda case: case.id,
)
def test_padding_is_not_read(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    for multiprocessors in (NEVER_SPLIT, MANY_MULTIPROCESSORS):
        wanted, _ = compute_emulated(inputs, multiprocessors=multiprocessors)
        got, _ = compute_emulated(poisoned(inputs), multiprocessors=multiprocessors)
        assert not differences(wanted, got)


@pytest.mark.parametrize("causal", ["none", "top_left", "bottom_right"])
def test_lengths_out_of_range_are_clamped(causal: str) -> None:
    """Their values cannot be checked without waiting for the device: keys beyond the last are not read for that."""
    for length, clamped in ((1000, 70), (71, 70), (-5, 0)):
        odd = core.MaskGeometry(20, 70, causal, kv_length=length)
        even = core.MaskGeometry(20, 70, causal, kv_length=clamped)
        assert odd.visible_pairs() == even.visible_pairs()
        assert [odd.hi(i) for i in range(20)] == [even.hi(i) for i in range(20)]


@pytest.mark.slow
def test_nothing_outside_of_the_inputs_is_read() -> None:
    """Inputs that end, or begin, where readable memory does: see tests/guard_pages.py."""
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "tests.guard_pages", "emulated"],
        cwd=root,
        env=os.environ | {"OMP_WAIT_POLICY": "passive"},
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stdout.splitlines()[-1:]
    assert done.returncode == 0, f"died in {last}: {done.stderr[-2000:]}"
    assert last[0].startswith("done: ")


# ---------------------------------------------------------------------------------------------------- rows of one kind


@each_dtype
def test_rows_hidden_by_finite_values_are_uniform(dtype: torch.dtype) -> None:
    """A bias of finfo.min everywhere: o is the mean of v, and dv is that of a mean. lse alone cannot tell."""
    inputs = make_inputs(Case(37, 130, D=16, gqa=2), dtype)
    inputs.kwargs["bias"] = torch.full((1, 1, 37, 130), torch.finfo(torch.float32).min)
    got, _ = compute_emulated(inputs)
    unit = torch.finfo(dtype).eps
    mean = inputs.v.double().mean(2, keepdim=True).repeat_interleave(2, 1).expand(1, 4, 37, 16)
    assert (got["o"].double() - mean).abs().max() <= unit * inputs.v.double().abs().max()
    dv = (inputs.d_o.double() / 130).sum(2, keepdim=True).unflatten(1, (2, 2)).sum(2).expand(1, 2, 130, 16)
    assert (got["dv"].double() - dv).abs().max() <= 4 * unit * dv.abs().max()


@each_dtype
@pytest.mark.parametrize(
    "case",
    [Case(70, 1, D=32), Case(70, 1, D=32, bias="11qk"), Case(70, 70, D=32, window=(0, 0)), Case(3, 3, window=(0, 0))],
    ids=lambda case: case.id,
)
def test_one_visible_key_leaves_no_gradient_of_scores(case: Case, dtype: torch.dtype) -> None:
    """Its weight is 1 whatever its score: dq and dk are 0, to the bit, where the rows are known to be saturated."""
    inputs = make_inputs(case, dtype)
    inputs.q.detach().mul_(30)  # scores of some size, whose product with log2(e) is rounded
    inputs.d_lse.zero_()
    got, _ = compute_emulated(inputs)
    assert (got["dq"] == 0).all()
    assert (got["dk"] == 0).all()
    # Two TF32 parts hold 22 bits of a float's 24.
    rtol = 2**-21 if dtype == torch.float32 else 0.0
    torch.testing.assert_close(got["o"], inputs.v.detach().expand_as(got["o"]), rtol=rtol, atol=0.0)


# -------------------------------------------------------------------------------------------------- the emulator bites


@each_width
def test_no_synchronisation_can_be_left_out(dtype: torch.dtype) -> None:
    """Every barrier and every wait for copies, in every kernel, left out one at a time: each is missed by some case."""
    missed = leave_out_synchronisations(
        partial(compute_emulated, make_inputs(case, dtype), multiprocessors=multiprocessors)
        for case in TELLING
        for multiprocessors in (NEVER_SPLIT, MANY_MULTIPROCESSORS)
    )
    assert len(missed) >= 15, sorted(missed)
    assert not unnoticed(missed)


def test_a_missing_swizzle_costs_conflicts() -> None:
    """Without the swizzle the same kernel gives the same bits, and its loads of fragments wait for banks."""
    inputs = make_inputs(Case(128, 128, D=64, Hkv=1), torch.bfloat16)
    arrays = [x.view(torch.uint16).numpy() for x in (inputs.q, inputs.k, inputs.v)]
    swizzled = core.emulated_attention_forward(*arrays)
    plain = core.emulated_attention_forward(*arrays, emulator={"unswizzled": True})
    assert swizzled["run"]["bank_conflicts_load"] == 0
    # Eight rows of 128 bytes at the same column are in the same four banks: seven cycles more for each phase.
    ldmatrix = [site for site in plain["run"]["sites"] if site[2] == "ldmatrix"]
    phases = 4 * sum(site[3] for site in ldmatrix) // 32
    assert sum(site[4] for site in ldmatrix) == 7 * phases > 0


# Stores that end a tile, once for a CTA's whole walk over its keys: two words of float32 to a lane, and sums of a bias.
EPILOGUES = {("gemm.cuh", "store_shared"), ("backward_bias.cuh", "store_shared"), ("backward_bias.cuh", "load_shared")}


@each_width
@pytest.mark.parametrize("D", [32, 64, 96, 128, 192, 256])
def test_main_loops_are_free_of_bank_conflicts(D: int, dtype: torch.dtype) -> None:
    for case in (
        Case(150, 200, D=D, Hkv=1, causal="bottom_right"),
        Case(70, 90, D=D, Hkv=1, bias="1h1k", dropout_p=0.1),
        Case(2, 200, D=D, Hkv=1, gqa=4),
    ):
        _, ran = compute_emulated(make_inputs(case, dtype))
        conflicts = bank_conflicts(ran, but_for=EPILOGUES)
        assert not conflicts, f"{case.id}: {conflicts}"


# --------------------------------------------------------------------------------------------------------------- plans


def plan(**shape: Any) -> dict[str, Any]:
    return core.cuda_forward_plan(**({"dtype": "bfloat16", "B": 1, "Hq": 16, "Hkv": 16, "D": 128, "Dv": 128} | shape))


def test_keys_are_split_where_rows_are_few() -> None:
    """Decoding, 8 heads to a key head: one row tile for each key head, and enough parts to fill 132 multiprocessors."""
    decode = plan(Lq=1, Lk=8192, Hq=32, Hkv=4)
    assert decode["variant"] == "few_rows"
    assert decode["packed_heads"] == 8
    assert decode["row_blocks"] == 1
    assert 132 * 1.5 <= decode["blocks"] <= 132 * 3
    # Never more parts than tiles of keys.
    assert plan(Lq=1, Lk=100, Hq=32, Hkv=4)["splits"] <= 2
    assert plan(Lq=1, Lk=0)["splits"] == 1


def test_keys_are_not_split_where_rows_fill_the_device() -> None:
    for L in (512, 1024, 4096, 16384):
        training = plan(B=16384 // L, Lq=L, Lk=L)
        assert training["splits"] == 1
        assert training["variant"] == "plain"
    assert plan(B=64, Lq=1, Lk=4096, Hq=32, Hkv=32)["splits"] == 1


def test_a_window_bounds_what_is_split() -> None:
    """512 visible keys are at most nine tiles of 64, however long the cache is."""
    assert 1 < plan(Lq=1, Lk=65536, window=(511, 0), Hq=8, Hkv=8)["splits"] <= 9
    assert plan(Lq=1, Lk=65536, Hq=8, Hkv=8)["splits"] > 9


def test_plans_are_sound_for_all_shapes() -> None:
    for dtype in ("float32", "bfloat16"):
        for Lq in (1, 2, 16, 17, 64, 65, 129, 1000):
            for Lk in (0, 1, 63, 64, 65, 1000, 100000):
                for Hq, Hkv in ((1, 1), (8, 8), (8, 2), (64, 1)):
                    for D in (1, 32, 33, 100, 160, 256):
                        p = plan(dtype=dtype, Lq=Lq, Lk=Lk, Hq=Hq, Hkv=Hkv, D=D, Dv=D // 2 + 1)
                        rows = Lq * p["packed_heads"]
                        assert p["packed_heads"] in (1, Hq // Hkv)
                        assert p["packed_heads"] == 1 or rows <= p["block_m"]
                        assert (p["row_blocks"] - 1) * p["block_m"] < rows <= p["row_blocks"] * p["block_m"]
                        assert p["blocks"] == p["row_blocks"] * Hq // p["packed_heads"] * p["splits"]
                        assert 1 <= p["splits"] <= max(1, -(-Lk // p["block_n"]))
                        assert p["dim"] >= D
                        assert p["shared_bytes"] <= 99 * 1024


def test_the_plan_is_what_runs() -> None:
    inputs = make_inputs(Case(1, 700, D=64, Hkv=1), torch.float16)
    _, split = compute_emulated(inputs, multiprocessors=MANY_MULTIPROCESSORS)
    _, whole = compute_emulated(inputs, multiprocessors=NEVER_SPLIT)
    assert split["forward"]["kernels"] == ["attention_forward", "attention_combine"]
    assert whole["forward"]["kernels"] == ["attention_forward"]


def test_tensors_keep_their_bits_on_the_way() -> None:
    """bfloat16 goes through NumPy as uint16."""
    x = torch.randn(2, 3, 5, 7).to(torch.bfloat16)
    back: Tensor = tensor(array(x))
    assert torch.equal(back, x)
    assert array(x.mT).flags["C_CONTIGUOUS"]
