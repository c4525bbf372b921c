"""fastattn.attention_summary against the weights it summarises: every option of attention, every level and dtype."""

from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn import AttentionSummary, reference
from fastattn.reference._attention import existing, softmax

from .bad_calls import Bad, zeros
from .cases import LAYOUTS, SHAPES, Case, Inputs, accumulator, make_inputs
from .compare import DotScores, Expected, Quantities, Spread, Terms, differences, violations
from .conftest import levels_of
from .test_parity import dtype_id
from .test_poison import surround

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *SIXTEEN_BITS, torch.float64)
ops = torch.ops.fastattn
NUMBERS = ("entropy", "maximum", "key_mass", "top_weights", "lse")


def summary_cases() -> list[Case]:
    kinds: list[dict[str, Any]] = [{}, {"causal": "bottom_right"}, {"causal": "top_left"}, {"window": (20, 10)}]
    cases = []
    lengths = (1, 15, 17, 64, 65, 97)
    for n, Lq in enumerate(lengths):
        for m, Lk in enumerate(lengths):
            cases.append(Case(Lq, Lk, D=(5, 16, 32)[(n + 2 * m) % 3], Hkv=1 + m % 2, **kinds[(n + m) % 4]))
    cases += [Case(35, 53, D=D) for D in (1, 3, 64, 80, 128, 300)]
    cases += [Case(Lq, 70, D=16, B=2, gqa=gqa, Hkv=Hkv) for Lq in (1, 5, 70) for gqa, Hkv in ((4, 1), (3, 2))]
    small: dict[str, Any] = {"Lq": 19, "Lk": 70, "D": 8, "B": 2, "gqa": 2}
    cases += [Case(**small, mask=shape) for shape in ("bhqk", "11qk", "b11k", "1hq1", "k", "")]
    cases += [Case(**small, bias=shape) for shape in SHAPES[::3]]
    cases += [Case(50, 77, D=24, B=2, gqa=2, bias="bhqk", bias_float32=True, bias_values=values)
              for values in ("normal", "min", "-1e9", "-inf")]  # fmt: skip
    cases += [Case(70, 131, D=16, B=2, mask=shape, mask_values=values, causal=causal)
              for shape, values, causal in (("11qk", "rows", False), ("bhqk", "blocks", "bottom_right"),
                                            ("b11k", "padding", False), ("11qk", "none", "top_left"))]  # fmt: skip
    cases += [Case(70, 131, D=16, B=2, gqa=2, causal=causal, alibi=alibi)
              for causal in (False, "bottom_right") for alibi in ("h", "bh")]  # fmt: skip
    cases += [Case(35, 70, D=16, sinks=True, **more)
              for more in (*kinds, {"mask": "11qk", "mask_values": "rows"}, {"B": 2, "kv_lengths": (0, 69)},
                           {"bias": "1hqk", "bias_values": "min"}, {"softcap": 2.0})]  # fmt: skip
    cases += [Case(19, 70, D=16, B=3, kv_lengths=n, **kind)
              for n in ((0, 1, 69), (64, 65, 16)) for kind in kinds]  # fmt: skip
    cases += [Case(35, 70, D=16, scale=scale) for scale in (-0.3, 0.0, 3.0)]
    cases += [Case(35, 66, D=16, B=2, gqa=2, mask="b1qk", bias="1hqk", layout=layout) for layout in LAYOUTS[1:]]
    cases += [Case(530, 70, D=8, Hkv=1), Case(40, 530, D=8, Hkv=1, B=2, kv_lengths=(520, 250)), Case(1, 1500, D=16)]
    return list({case.id: case for case in cases}.values())


CASES = summary_cases()
TOP_K = (3, 8, 1, 16, 0, 128)


def compute(inputs: Inputs, **more: Any) -> AttentionSummary:
    return fastattn.attention_summary(inputs.q, inputs.k, **inputs.kwargs, **more)


def numbers(summary: Any) -> Quantities:
    """Those that the error bound holds for, which are not integers."""
    found = summary if isinstance(summary, dict) else summary._asdict()
    return {name: found[name] for name in NUMBERS if found[name] is not None}


def rows_of(case: Case, n: int) -> Tensor | None:
    """A different mask of rows for each case, in each of the shapes that broadcast; None for some."""
    B, H, L = case.B, case.Hq, case.Lq
    shape = (None, (B, H, L), (L,), (B, 1, L), (1, H, 1), (B, 1, 1))[n % 6]
    return None if shape is None else torch.rand(shape, generator=torch.Generator().manual_seed(n)) < 0.6


def rounding_terms(inputs: Inputs, rows: Tensor | None, top_k: int) -> dict[str, Terms]:
    """As in tests/compare.py. An entropy is lse - sum p s, so it errs like the lse and like a sum of p * (s - m).

    The terms of these two sums have one sign. Added one by one, a tile's N of them (in float64 a row's), partial sums
    do not walk at random but straight to their sum: N / 3 of its square, where the others have 1 / 2.
    """
    q, k = inputs.q.double(), inputs.k.double()
    kwargs = dict(inputs.kwargs)
    sinks = kwargs.pop("sinks", None)
    s = reference.scores(q, k, **kwargs, dtype=torch.float64)
    p, _ = softmax(s, sinks)
    G = q.shape[1] // max(k.shape[1], 1)
    k = existing(k, kwargs.get("kv_lengths")).repeat_interleave(G, 1)
    scores = DotScores(q, k, abs(kwargs.get("scale") or q.shape[-1] ** -0.5), G)
    m = s.amax(-1, keepdim=True) if s.shape[-1] else s
    if sinks is not None and s.shape[-1]:
        m = m.maximum(sinks.double().view(1, -1, 1, 1))
    below_max = (s - m).abs().nan_to_num(nan=0.0, posinf=0.0) if s.shape[-1] else s
    c2 = scores.error2 + below_max.square()
    p_error2 = p.square() * (1 + c2)
    counted = p if rows is None else p * rows.expand(p.shape[:-1]).unsqueeze(-1)
    counted_error2 = p_error2 * (counted > 0)
    of_lse = p_error2.sum(-1)
    straight = (k.shape[2] if inputs.q.dtype == torch.float64 else min(k.shape[2], 64)) / 3
    of_sum = (p.square() * below_max.square() * (1 + c2)).sum(-1) + straight * (p * below_max).sum(-1).square()
    of_weight = (p_error2 + p.square() * (1 + of_lse).unsqueeze(-1)).sort(-1, descending=True).values
    sums2 = {
        "entropy": 2 * of_lse + straight + of_sum,
        "maximum": of_weight.amax(-1) if s.shape[-1] else of_lse,
        "key_mass": (counted_error2 + counted.square() * (1 + of_lse).unsqueeze(-1)).sum(-2)
        + counted.sum(-2).square() / 2,
        "top_weights": of_weight[..., :top_k],
        "lse": of_lse,
    }
    return {name: Terms(Spread.of(x), Spread.of(None)) for name, x in sums2.items()}


def expected_summary(
    inputs: Inputs, rows: Tensor | None, top_k: int, dtype: torch.dtype
) -> tuple[Expected, Tensor, Tensor]:
    """The numbers that are right, and the scores and weights in float64."""
    exact = reference.attention_summary(
        inputs.q, inputs.k, top_k=top_k, rows=rows, dtype=torch.float64, **inputs.kwargs
    )
    baseline = exact
    if dtype != torch.float64:
        baseline = reference.attention_summary(inputs.q, inputs.k, top_k=top_k, rows=rows, **inputs.kwargs)
    wanted = Expected(numbers(exact), numbers(baseline), rounding_terms(inputs, rows, top_k), dtype)
    scores, weights = exact_scores(inputs)
    return wanted, scores, weights


def exact_scores(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The scores and the weights in float64."""
    kwargs = dict(inputs.kwargs)
    sinks = kwargs.pop("sinks", None)
    scores = reference.scores(inputs.q, inputs.k, **kwargs, dtype=torch.float64)
    return scores, softmax(scores, sinks)[0]


_expected: dict[Any, Any] = {}


def expected(case: Case, n: int, top_k: int, dtype: torch.dtype) -> tuple[Expected, Tensor, Tensor]:
    """Kept for the levels of a case and dtype, which follow each other."""
    if (case.id, dtype) not in _expected:
        _expected.clear()
        _expected[case.id, dtype] = expected_summary(make_inputs(case, dtype), rows_of(case, n), top_k, dtype)
    return _expected[case.id, dtype]


def matrix() -> Iterator[Any]:
    for n, case in enumerate(CASES):
        for dtype in DTYPES:
            for isa in levels_of(dtype):
                top_k = TOP_K[n % len(TOP_K)]
                yield pytest.param(case, n, top_k, dtype, isa, id=f"{case.id}-top{top_k}-{dtype_id(dtype)}-{isa}")


@pytest.mark.parametrize(("case", "n", "top_k", "dtype", "isa"), list(matrix()), indirect=["isa"])
def test_parity(case: Case, n: int, top_k: int, dtype: torch.dtype, isa: str) -> None:
    inputs = make_inputs(case, dtype)
    got = compute(inputs, top_k=top_k, rows=rows_of(case, n))
    for name, x in numbers(got).items():
        assert x.dtype == accumulator(dtype), name
    wanted, scores, weights = expected(case, n, top_k, dtype)
    broken = violations(numbers(got), wanted)
    assert not broken, "\n".join([f"{case.id} in {dtype} on {isa}:", *broken])
    assert_indices(got, scores, weights, accumulator(dtype))


def assert_indices(summary: AttentionSummary, scores: Tensor, weights: Tensor, accumulator: torch.dtype) -> None:
    """Each index once, of a visible key whose weight is that of its rank, up to rounding; -1 past the visible keys."""
    index, top_k = summary.top_indices, summary.top_indices.shape[-1]
    visible = scores > -math.inf
    shown = torch.arange(top_k) < visible.sum(-1, keepdim=True)
    assert index.dtype == torch.int64
    assert torch.equal(index >= 0, shown)
    assert (index[~shown] == -1).all()
    assert (summary.top_weights[~shown] == 0).all()
    assert (summary.top_weights.diff(dim=-1) <= 0).all()
    if not shown.any():
        return
    at = index.clamp_min(0)
    assert visible.gather(-1, at)[shown].all()
    taken = torch.zeros(weights.shape).scatter_add_(-1, at, shown.float())
    assert taken.max() <= 1
    missing = (0, top_k - min(top_k, weights.shape[-1]))
    ranked = F.pad(weights.sort(dim=-1, descending=True).values[..., :top_k], missing)
    error = (weights.gather(-1, at) - ranked).abs().masked_fill(~shown, 0)
    # A weight errs, relatively, by what its score errs, which is a few units of the scores' size. Scores that a bias of
    # -1e9 hides are alike for the kernels, and not for float64.
    ordinary = scores[visible].abs()
    size = ordinary[ordinary < 1e3].max() + 1 + scores.gather(-1, at).abs().nan_to_num(posinf=0.0)
    assert (error <= 16 * torch.finfo(accumulator).eps * size * ranked + 1e-30).all(), "a weight of another rank"


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_the_bound_notices(dtype: torch.dtype) -> None:
    case = Case(70, 131, D=16, B=2, gqa=2, causal="top_left", sinks=True)
    wanted, scores, weights = expected_summary(make_inputs(case, dtype), None, 8, dtype)
    assert not violations(wanted.exact, wanted)
    for name, exact in wanted.exact.items():
        for what, wrong in {"scale": exact * 1.1, "NaN": exact * torch.nan, "other": exact.roll(1, 2)}.items():
            assert violations(wanted.exact | {name: wrong}, wanted), f"{name}: {what} went unnoticed"
    good = reference.attention_summary(make_inputs(case, dtype).q, make_inputs(case, dtype).k, top_k=8,
                                       dtype=torch.float64, **make_inputs(case, dtype).kwargs)  # fmt: skip
    summary = AttentionSummary(**good)
    assert_indices(summary, scores, weights, torch.float64)
    for wrong in (good["top_indices"].roll(1, -1), good["top_indices"].clamp_min(0), good["top_indices"] * 0):
        with pytest.raises(AssertionError):
            assert_indices(summary._replace(top_indices=wrong), scores, weights, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("top_k", [1, 5, 40, 128])
def test_equal_weights_are_listed_in_order(isa: str, top_k: int, dtype: torch.dtype) -> None:
    """All scores equal: the lowest keys first; among the keys that a row sees, wherever they lie."""
    q, k = torch.randn(1, 2, 70, 16).to(dtype), torch.randn(1, 2, 1, 16).to(dtype).expand(1, 2, 200, 16)
    everything = fastattn.attention_summary(q, k, top_k=top_k)
    assert torch.equal(everything.top_indices, torch.arange(top_k).expand(1, 2, 70, top_k))
    torch.testing.assert_close(everything.entropy, torch.full_like(everything.entropy, math.log(200)))
    masked = fastattn.attention_summary(q, k, top_k=top_k, mask=torch.arange(200) % 3 == 2)
    wanted = torch.arange(2, 200, 3)[:top_k]
    wanted = F.pad(wanted, (0, top_k - len(wanted)), value=-1)
    assert torch.equal(masked.top_indices, wanted.expand(1, 2, 70, top_k))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_any_top_k(isa: str, dtype: torch.dtype) -> None:
    """Each number of weights is the beginning of the longest list, bit for bit; the sums have the same terms."""
    inputs = make_inputs(Case(9, 150, D=8, causal="bottom_right"), dtype)
    longest = compute(inputs, top_k=128)
    for top_k in (*range(18), 31, 32, 33, 63, 64, 65, 100, 127):
        got = compute(inputs, top_k=top_k)
        assert torch.equal(got.top_weights, longest.top_weights[..., :top_k])
        assert torch.equal(got.top_indices, longest.top_indices[..., :top_k])
        for name in ("entropy", "maximum", "key_mass", "lse"):
            torch.testing.assert_close(getattr(got, name), getattr(longest, name), atol=1e-5, rtol=1e-5)


def test_lse_and_maximum_are_those_of_attention(isa: str) -> None:
    for dtype in DTYPES:
        inputs = make_inputs(Case(70, 131, D=16, B=2, gqa=2, causal="bottom_right", sinks=True), dtype)
        got = compute(inputs, top_k=4)
        _, lse = fastattn.attention(inputs.q, inputs.k, inputs.v, return_lse=True, **inputs.kwargs)
        close = {"atol": 2e-4, "rtol": 0.0} if dtype.itemsize == 2 else {}
        torch.testing.assert_close(got.lse, lse, **close)
        torch.testing.assert_close(got.maximum, got.top_weights[..., 0], atol=0, rtol=1e-6)


def test_rows_that_count(isa: str) -> None:
    """The mass of two sets of rows adds up to that of all; NaN in a row that does not count stays out."""
    for dtype in DTYPES:
        inputs = make_inputs(Case(70, 131, D=16, B=2, gqa=2), dtype)
        rows = torch.rand(2, 4, 70) < 0.5
        everything, some, others = (compute(inputs, rows=x).key_mass for x in (None, rows, ~rows))
        assert everything is not None
        assert some is not None
        assert others is not None
        torch.testing.assert_close(some + others, everything, atol=1e-5, rtol=1e-5)
        inputs.q[1, 2, 40] = torch.nan
        rows[1, 2, 40] = False
        poisoned = compute(inputs, rows=rows).key_mass
        assert poisoned is not None
        assert poisoned.isfinite().all()
        assert compute(inputs, key_mass=False).key_mass is None
        assert torch.equal(compute(inputs, rows=torch.tensor(False)).key_mass, torch.zeros_like(everything))


# --- The definition ---------------------------------------------------------------------------------------------------


def test_reference_follows_the_definition() -> None:
    q, k = torch.randn(2, 4, 3, 5).double(), torch.randn(2, 2, 6, 5).double()
    sinks, rows = torch.randn(4).double(), torch.rand(2, 1, 3) < 0.5
    lengths = torch.tensor([6, 2], dtype=torch.int32)
    for given in (sinks, None):
        got = reference.attention_summary(q, k, top_k=4, rows=rows, sinks=given, kv_lengths=lengths, causal=True)
        p = reference.weights(q, k, sinks=given, kv_lengths=lengths, causal=True)
        for b, h, i in itertools.product(range(2), range(4), range(3)):
            row = [float(x) for x in p[b, h, i]]
            visible = min(int(lengths[b]), max(0, i + int(lengths[b]) - 2))
            rest = 0.0 if given is None or not visible else 1 - sum(row)
            entropy = -sum(x * math.log(x) for x in (*row, rest) if x > 1e-300)
            assert math.isclose(got["entropy"][b, h, i], entropy, rel_tol=1e-10, abs_tol=1e-12)
            assert got["maximum"][b, h, i] == max(row)
            ranked = sorted(range(visible), key=lambda j: (-row[j], j))[:4]
            assert got["top_indices"][b, h, i].tolist() == ranked + [-1] * (4 - len(ranked))
            assert got["top_weights"][b, h, i].tolist() == [row[j] for j in ranked] + [0.0] * (4 - len(ranked))
        for b, h, j in itertools.product(range(2), range(4), range(6)):
            mass = sum(float(p[b, h, i, j]) for i in range(3) if rows[b, 0, i])
            assert math.isclose(got["key_mass"][b, h, j], mass, rel_tol=1e-12, abs_tol=1e-12)


# --- The same bits, and nothing leaks ---------------------------------------------------------------------------------


def assert_same(got: AttentionSummary, wanted: AttentionSummary) -> None:
    assert torch.equal(got.top_indices, wanted.top_indices)
    assert not differences(numbers(got), numbers(wanted))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_repeats_and_thread_counts(isa: str, dtype: torch.dtype) -> None:
    for case in (
        Case(197, 197, D=33, B=2, Hkv=3),
        Case(600, 300, D=8, Hkv=1, gqa=2, causal="top_left", sinks=True),
        Case(1, 3000, D=16, B=3, gqa=2, kv_lengths=(3000, 0, 131), alibi="h"),
    ):
        inputs = make_inputs(case, dtype)
        torch.set_num_threads(1)
        first = compute(inputs, top_k=8)
        compute(make_inputs(Case(43, 37, D=48, B=2), dtype), top_k=20)
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            assert_same(compute(inputs, top_k=8), first)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_memory_does_not_matter(isa: str, dtype: torch.dtype) -> None:
    plain = Case(70, 133, D=40, B=2, gqa=2, causal="bottom_right", mask="b1qk", bias="1hqk", sinks=True)
    inputs = make_inputs(plain, dtype)
    first = compute(inputs, top_k=8)
    for layout in ("blhd", "qkv", "offset", "columns"):
        moved = make_inputs(replace(plain, layout=layout), dtype)
        for name in ("q", "k"):
            getattr(moved, name).copy_(getattr(inputs, name))
        for name in ("mask", "bias", "sinks"):
            moved.kwargs[name].copy_(inputs.kwargs[name])
        assert_same(compute(moved, top_k=8), first)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_nothing_around_a_view_leaks(isa: str, dtype: torch.dtype) -> None:
    for case in (
        Case(70, 131, D=32, B=2, gqa=2),
        Case(67, 35, D=17, B=2, causal="bottom_right", mask="bhqk", bias="1hq1"),
        Case(1, 50, D=3, B=2, gqa=4, kv_lengths=(50, 31), alibi="bh", sinks=True),
    ):
        inputs = make_inputs(case, dtype)
        wanted = compute(surround(inputs, 0.0), top_k=8)
        for fill in (torch.nan, torch.inf):
            assert_same(compute(surround(inputs, fill), top_k=8), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_nothing_beyond_the_lengths_leaks(isa: str, dtype: torch.dtype) -> None:
    """NaN in keys that do not exist, and in their biases; no mass, and no place among the first."""
    beyond = torch.arange(131).view(1, 1, -1) >= torch.tensor((0, 77, 131)).view(-1, 1, 1)
    for Lq in (1, 70):
        case = Case(Lq, 131, D=17, B=3, gqa=2, kv_lengths=(0, 77, 131), causal="bottom_right", bias="bhqk")
        wanted = compute(make_inputs(case, dtype), top_k=128)
        for fill in (torch.nan, torch.inf):
            inputs = make_inputs(case, dtype)
            inputs.k.masked_fill_(beyond.unsqueeze(-1), fill)
            inputs.kwargs["bias"].masked_fill_(beyond.unsqueeze(-2), fill)
            assert_same(compute(inputs, top_k=128), wanted)
        assert wanted.key_mass is not None
        assert (wanted.key_mass.masked_fill(~beyond, 0) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_a_row_keeps_its_nan(isa: str, dtype: torch.dtype) -> None:
    case = Case(70, 141, D=20, B=2, gqa=2, causal="bottom_right")
    wanted = compute(make_inputs(case, dtype), top_k=8)
    inputs = make_inputs(case, dtype)
    inputs.q[1, 2, 40] = torch.nan
    got = compute(inputs, top_k=8)
    own = torch.zeros(2, 4, 70, dtype=torch.bool)
    own[1, 2, 40] = True
    for name in ("entropy", "maximum", "lse", "top_weights", "top_indices"):
        assert torch.equal(getattr(got, name)[~own], getattr(wanted, name)[~own]), name
    for name in ("entropy", "maximum", "lse"):
        assert getattr(got, name)[own].isnan().all(), name
    assert ((got.top_indices >= -1) & (got.top_indices < 141)).all()
    assert got.key_mass is not None
    assert wanted.key_mass is not None
    heads = torch.ones(2, 4, dtype=torch.bool)
    heads[1, 2] = False
    assert torch.equal(got.key_mass[heads], wanted.key_mass[heads])


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("zero", ["B", "Hkv", "Lq", "Lk", "Lq-Lk", "B-Lk"])
def test_sizes_of_zero(isa: str, zero: str, dtype: torch.dtype) -> None:
    sizes = {"B": 2, "Hkv": 2, "Lq": 5, "Lk": 7} | dict.fromkeys(zero.split("-"), 0)
    case = Case(D=8, gqa=2, mask="bhqk", bias="1h1k", sinks=True, alibi="h", **sizes)
    got = compute(make_inputs(case, dtype), top_k=3)
    rows = (case.B, case.Hq, case.Lq)
    assert got.entropy.shape == got.maximum.shape == got.lse.shape == rows
    assert got.top_weights.shape == got.top_indices.shape == (*rows, 3)
    assert got.key_mass is not None
    assert got.key_mass.shape == (case.B, case.Hq, case.Lk)
    assert all((x == 0).all() for x in (got.entropy, got.maximum, got.key_mass, got.top_weights))
    assert (got.top_indices == -1).all()
    assert (got.lse == -torch.inf).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("sinks", [False, True])
def test_blind_rows(isa: str, sinks: bool, dtype: torch.dtype) -> None:
    """No visible key: everything 0 and -1, lse -inf, with a sink too; one visible key: a weight of 1, entropy 0."""
    case = Case(6, 4, causal="bottom_right", sinks=sinks)
    got = compute(make_inputs(case, dtype), top_k=2)
    for x in (got.entropy, got.maximum, got.top_weights):
        assert (x[:, :, :2] == 0).all()
    assert (got.top_indices[:, :, :2] == -1).all()
    assert (got.lse[:, :, :2] == -torch.inf).all()
    assert (got.top_indices[:, :, 2] == torch.tensor([0, -1])).all()
    if not sinks:
        assert (got.maximum[:, :, 2] == 1).all()
        assert (got.entropy[:, :, 2] == 0).all()
    assert (got.maximum[:, :, 2:] > 0).all()


def test_memory_grows_with_the_length() -> None:
    program = """
import resource, torch, fastattn
torch.set_num_threads(2)
q, k = (torch.randn(1, 1, 8192, 8) for _ in range(2))
fastattn.attention_summary(q[:, :, :64], k, top_k=8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fastattn.attention_summary(q, k, top_k=8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert int(done.stdout) < 64 * 1024, f"{int(done.stdout) / 1024:.0f} MiB"


# --- As torch sees it -------------------------------------------------------------------------------------------------

B, Hq, Hkv, Lq, Lk, D = 2, 4, 2, 3, 5, 4


def qk(dtype: torch.dtype = torch.float32, grad: bool = False) -> tuple[Tensor, Tensor]:
    q, k = (torch.randn(shape).to(dtype).requires_grad_(grad) for shape in ((B, Hq, Lq, D), (B, Hkv, Lk, D)))
    return q, k


def everything() -> dict[str, Any]:
    return {
        "top_k": 3,
        "rows": torch.rand(B, 1, Lq) < 0.6,
        "causal": True,
        "window": (3, None),
        "scale": 0.4,
        "softcap": 2.0,
        "bias": torch.randn(1, Hq, 1, Lk),
        "mask": torch.rand(B, 1, Lq, Lk) < 0.8,
        "alibi_slopes": torch.rand(B, Hq),
        "sinks": torch.randn(Hq),
        "kv_lengths": torch.tensor([Lk, 2], dtype=torch.int32),
    }


def test_nothing_is_differentiable() -> None:
    q, k = qk(grad=True)
    kwargs = everything()
    for name in ("bias", "sinks", "alibi_slopes"):
        kwargs[name].requires_grad_()
    for x in fastattn.attention_summary(q, k, **kwargs):
        assert not x.requires_grad
    with torch.inference_mode():
        assert fastattn.attention_summary(q, k).entropy.is_inference()


@pytest.mark.parametrize("need_mass", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_opcheck(full: bool, need_mass: bool) -> None:
    q, k = qk()
    kwargs = everything()
    names = ("bias", "mask", "alibi_slopes", "sinks", "kv_lengths", "rows")
    tensors = [kwargs[name] if full else None for name in names]
    torch.library.opcheck(ops.attention_summary.default, (q, k, *tensors, 2, 3, -1, 0.4, 2.0, 3, need_mass))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.usefixtures("fresh_compiler")
def test_compile(backend: str) -> None:
    for kwargs in ({}, everything(), {"key_mass": False}):
        for dynamic in (False, True) if backend == "aot_eager" else (None,):
            compiled = torch.compile(fastattn.attention_summary, fullgraph=True, backend=backend, dynamic=dynamic)
            q, k = qk(grad=True)
            got, wanted = compiled(q, k, **kwargs), fastattn.attention_summary(q, k, **kwargs)
            assert isinstance(got, AttentionSummary)
            torch.testing.assert_close(tuple(got), tuple(wanted))


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=dtype_id)
def test_autocast(dtype: torch.dtype) -> None:
    q, k = qk()
    bias = torch.randn(Lq, Lk)
    with torch.autocast("cpu", dtype=dtype):
        got = fastattn.attention_summary(q, k, bias=bias)
        assert fastattn.attention_summary(*qk(torch.float64)).entropy.dtype == torch.float64
    wanted = fastattn.attention_summary(q.to(dtype), k.to(dtype), bias=bias.to(dtype))
    assert got.entropy.dtype == torch.float32
    assert_same(got, wanted)


def test_inside_a_transform(capfd: pytest.CaptureFixture[str]) -> None:
    """Where a model is differentiated by torch.func, or in forward mode, it can still be looked at."""
    q, k = qk()

    def value(q: Tensor) -> Tensor:
        seen = fastattn.attention_summary(q, k).entropy
        return (q.square().sum(-1) * seen).sum()

    entropy = fastattn.attention_summary(q, k).entropy
    torch.testing.assert_close(torch.func.grad(value)(q), 2 * q * entropy.unsqueeze(-1))
    tangent = torch.func.jvp(value, (q,), (q,))[1]
    torch.testing.assert_close(tangent, (2 * q.square().sum(-1) * entropy).sum())
    each = torch.func.vmap(lambda q: fastattn.attention_summary(q, k).entropy)(torch.stack([q, 2 * q]))
    torch.testing.assert_close(each[1], fastattn.attention_summary(2 * q, k).entropy)
    assert "batching rule" not in capfd.readouterr().err  # which torch says, in C++, of operators without a vmap


# --- Messages ---------------------------------------------------------------------------------------------------------


CALLS = [
    Bad("top_k-type", TypeError, ("top_k is a float", "must be an int"), {"top_k": 2.0}),
    Bad("top_k-bool", TypeError, ("top_k is a bool", "must be an int"), {"top_k": True}),
    Bad("top_k-negative", ValueError, ("top_k is -1", "[0, 128]"), {"top_k": -1}),
    Bad("top_k-large", ValueError, ("top_k is 129", "attention_weights"), {"top_k": 129}),
    Bad("key_mass-type", TypeError, ("key_mass is a Tensor", "must be a bool"), {"key_mass": zeros(B, Hq, Lk)}),
    Bad("rows-shape", ValueError, ("rows has shape (3, 2)", "(B, Hq, Lq) = (2, 4, 3)"),
        {"rows": torch.ones(3, 2).bool()}),
    Bad("rows-rank", ValueError, ("rows has shape (1, 2, 4, 3)",), {"rows": torch.ones(1, B, Hq, Lq).bool()}),
    Bad("rows-dtype", TypeError, ("rows is torch.float32", "rows.to(torch.bool)"), {"rows": zeros(Lq)}),
    Bad("rows-device", ValueError, ("rows is on meta but q is on cpu",), {"rows": torch.ones(Lq).bool().to("meta")}),
    Bad("rows-not-a-tensor", TypeError, ("rows is a list", "must be a torch.Tensor"), {"rows": [True]}),
    Bad("q-not-a-tensor", TypeError, ("q is a list",), {"q": [1.0]}),
    Bad("k-none", TypeError, ("k is a NoneType",), {"k": None}),
    Bad("q-rank", ValueError, ("q has 3 dimensions",), {"q": zeros(Hq, Lq, D)}),
    Bad("q-integers", TypeError, ("q is torch.int64",), {"q": zeros(B, Hq, Lq, D).long()}),
    Bad("k-heads", ValueError, ("k has 3 heads but q has 4",), {"k": zeros(B, 3, Lk, D)}),
    Bad("k-dim", ValueError, ("k has head dimension 9 but q has 4",), {"k": zeros(B, Hkv, Lk, 9)}),
    Bad("k-dtype", TypeError, ("k is torch.float64 but q is torch.float32",), {"k": zeros(B, Hkv, Lk, D).double()}),
    Bad("bias-shape", ValueError, ("bias has shape (2, 3, 3, 5)",), {"bias": zeros(B, 3, Lq, Lk)}),
    Bad("bias-bool", TypeError, ("bias is torch.bool", "as mask"), {"bias": torch.ones(Lq, Lk).bool()}),
    Bad("mask-dtype", TypeError, ("mask is torch.float32",), {"mask": torch.ones(Lq, Lk)}),
    Bad("alibi-dtype", TypeError, ("alibi_slopes is torch.int64",), {"alibi_slopes": zeros(4).long()}),
    Bad("sinks-shape", ValueError, ("sinks has shape (2,)",), {"sinks": zeros(2)}),
    Bad("lengths-large", ValueError, ("kv_lengths[1] is 6 but k has length 5",),
        {"kv_lengths": torch.tensor([5, 6], dtype=torch.int32)}),
    Bad("causal-name", ValueError, ("causal is 'left'",), {"causal": "left"}),
    Bad("window-number", TypeError, ("window is 128",), {"window": 128}),
    Bad("scale-nan", ValueError, ("scale is nan",), {"scale": math.nan}),
    Bad("scale-type", TypeError, ("scale is a str",), {"scale": "1"}),
    Bad("softcap-negative", ValueError, ("softcap is -1",), {"softcap": -1.0}),
    Bad("softcap-type", TypeError, ("softcap is a str",), {"softcap": "2"}),
]  # fmt: skip


def call(arguments: dict[str, Any]) -> Any:
    return fastattn.attention_summary(**{"q": zeros(B, Hq, Lq, D), "k": zeros(B, Hkv, Lk, D)} | arguments)


@pytest.mark.parametrize("bad", [pytest.param(bad, id=bad.id) for bad in CALLS])
def test_message(bad: Bad) -> None:
    bad.assert_refused(call, bad.arguments)


def test_good_arguments_pass() -> None:
    kwargs = everything()
    assert call(kwargs).top_weights.shape == (B, Hq, Lq, 3)
    assert call({"rows": torch.tensor(True), "top_k": 128}).top_indices.shape == (B, Hq, Lq, 128)


@pytest.mark.parametrize("id", ["top_k-large", "rows-shape", "rows-dtype", "k-heads", "bias-shape"])
def test_meta_tensors_are_refused_alike(id: str) -> None:
    bad = next(bad for bad in CALLS if bad.id == id)
    arguments = {"q": zeros(B, Hq, Lq, D), "k": zeros(B, Hkv, Lk, D)} | bad.arguments
    meta = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in arguments.items()}
    with pytest.raises(bad.error, match=re.escape(bad.parts[0])):
        call(meta)
