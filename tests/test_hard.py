"""fastattn.hard_attention: its choices against the definition with the same noise, log_prob and gradients against the
reference, statistics, seeds, torch.compile, every message.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import fastattn
from fastattn import reference
from fastattn._ops import draw_rng_state
from fastattn.reference._attention import existing

from .cases import LAYOUTS, Case, Inputs, accumulator, make_inputs
from .compare import DotScores, Expected, Quantities, Spread, Terms, differences, matmul_error2, violations
from .conftest import ISAS
from .philox import gumbel_noise
from .test_parity import dtype_id
from .test_poison import surround

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *SIXTEEN_BITS, torch.float64)
MODES = ("sample", "argmax")
ops = torch.ops.fastattn


# --- Numbers ----------------------------------------------------------------------------------------------------------


def hard_cases() -> list[Case]:
    kinds: list[dict[str, Any]] = [{}, {"causal": "bottom_right"}, {"causal": "top_left"}, {"window": (20, 10)}]
    cases = []
    lengths = (1, 15, 17, 64, 65, 97)
    for n, Lq in enumerate(lengths):
        for m, Lk in enumerate(lengths):
            cases.append(Case(Lq, Lk, D=(5, 16, 32)[(n + 2 * m) % 3], Hkv=1 + m % 2, **kinds[(n + m) % 4]))
    cases += [Case(35, 53, D=D, Dv=Dv) for D, Dv in ((1, 8), (8, 1), (3, 17), (64, 64), (80, 128), (300, 40))]
    cases += [Case(Lq, 70, D=16, B=2, gqa=gqa, Hkv=Hkv) for Lq in (1, 5, 70) for gqa, Hkv in ((4, 1), (3, 2))]
    small: dict[str, Any] = {"Lq": 19, "Lk": 70, "D": 8, "B": 2, "gqa": 2}
    cases += [Case(**small, mask=shape) for shape in ("bhqk", "11qk", "b11k", "1hq1", "k", "")]
    cases += [Case(70, 131, D=16, B=2, mask=shape, mask_values=values, causal=causal)
              for shape, values, causal in (("11qk", "rows", False), ("bhqk", "blocks", "bottom_right"),
                                            ("b11k", "padding", False), ("11qk", "none", "top_left"))]  # fmt: skip
    cases += [Case(19, 70, D=16, B=3, kv_lengths=n, **kind)
              for n in ((0, 1, 69), (64, 65, 16)) for kind in kinds]  # fmt: skip
    cases += [Case(35, 70, D=16, scale=scale) for scale in (-0.3, 0.0, 2.0)]
    cases += [Case(35, 66, D=16, Dv=24, B=2, gqa=2, mask="b1qk", layout=layout) for layout in LAYOUTS[1:]]
    cases += [Case(530, 70, D=8, Hkv=1), Case(40, 530, D=8, Hkv=1, B=2, kv_lengths=(520, 250)), Case(1, 1500, D=16)]
    return list({case.id: case for case in cases}.values())


CASES = hard_cases()


def options(inputs: Inputs) -> dict[str, Any]:
    return dict(inputs.kwargs)


def compute(inputs: Inputs, seed: int = 0, **more: Any) -> tuple[Quantities, Tensor]:
    """o, log_prob and every gradient by fastattn for the upstream gradients d_o and d_lse; and the index."""
    torch.manual_seed(seed)
    o, index, log_prob = fastattn.hard_attention(inputs.q, inputs.k, inputs.v, **inputs.kwargs, **more)
    upstream = [inputs.d_o.to(o.dtype), inputs.d_lse.to(log_prob.dtype)]
    grads = torch.autograd.grad([o, log_prob], [inputs.q, inputs.k, inputs.v], upstream)
    quantities = {"o": o.detach(), "log_prob": log_prob.detach()}
    return quantities | dict(zip(("dq", "dk", "dv"), grads, strict=True)), index


def by_reference(inputs: Inputs, index: Tensor, temperature: float, dtype: torch.dtype | None) -> Quantities:
    """The same for a given index."""
    q, k, v = (x.detach().to(dtype or x.dtype).requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    log_p = reference.log_probabilities(q, k, temperature=temperature, **inputs.kwargs)
    o, log_prob = reference.hard_attention(log_p, v, index, kv_lengths=inputs.kwargs.get("kv_lengths"))
    upstream = [inputs.d_o.to(o.dtype), inputs.d_lse.to(log_prob.dtype)]
    grads = torch.autograd.grad([o, log_prob], [q, k, v], upstream)
    quantities = {"o": o.detach(), "log_prob": log_prob.detach()}
    return quantities | dict(zip(("dq", "dk", "dv"), grads, strict=True))


def rounding_terms(inputs: Inputs, index: Tensor, temperature: float) -> tuple[dict[str, Terms], Tensor]:
    """As in tests/compare.py, with dS = d_log_prob * ((j == index) - p); and the scores' own errors, squared."""
    q, k, d_o, d_lp = (x.detach().double() for x in (inputs.q, inputs.k, inputs.d_o, inputs.d_lse.unsqueeze(-1)))
    scale = abs(inputs.kwargs.get("scale", q.shape[-1] ** -0.5)) / temperature
    log_p = reference.log_probabilities(q, k, temperature=temperature, **inputs.kwargs)
    p, G = log_p.exp(), q.shape[1] // max(k.shape[1], 1)
    k = existing(k, inputs.kwargs.get("kv_lengths")).repeat_interleave(G, 1)
    scores = DotScores(q, k, scale, G)
    below_max = (log_p - log_p.amax(-1, keepdim=True)).abs().nan_to_num(nan=0.0, posinf=0.0) if k.shape[2] else log_p
    c2 = scores.error2 + below_max.square()
    taken = (torch.arange(k.shape[2]) == index.unsqueeze(-1)).double()
    of_lse = (p.square() * (1 + c2)).sum(-1)
    log_prob = log_p.masked_fill(log_p == -math.inf, 0)
    sums2 = {
        "o": torch.zeros_like(d_o),
        "log_prob": of_lse + (taken * (c2 + log_prob.square())).sum(-1),
        "dv": matmul_error2(taken.mT, torch.zeros_like(p.mT), d_o, scores.sum_heads),
        **scores.sums2(d_lp * (taken - p), d_lp.square() * (taken + p.square() * (1 + c2))),
    }
    return {name: Terms(Spread.of(x), Spread.of(None)) for name, x in sums2.items()}, c2


_expected: dict[Any, tuple[Tensor, Expected, Tensor]] = {}


def expected(
    case: Case, dtype: torch.dtype, inputs: Inputs, index: Tensor, temperature: float
) -> tuple[Expected, Tensor]:
    """For this index, which is almost always that of the other levels, so that the last one is kept."""
    key = (case.id, dtype, temperature)
    if key not in _expected or not torch.equal(_expected[key][0], index):
        _expected.clear()
        exact = by_reference(inputs, index, temperature, torch.float64)
        baseline = exact if dtype == torch.float64 else by_reference(inputs, index, temperature, None)
        terms, c2 = rounding_terms(inputs, index, temperature)
        _expected[key] = index, Expected(exact, baseline, terms, dtype), c2
    return _expected[key][1:]


def assert_best(inputs: Inputs, index: Tensor, c2: Tensor, seed: int, mode: str, temperature: float) -> None:
    """No key is better than the one taken, by more than the scores are rounded; -1 only where no key is visible."""
    case_shape = (*inputs.q.shape[:3], inputs.k.shape[2])
    q, k = inputs.q.detach().double(), inputs.k.detach().double()
    log_p = reference.log_probabilities(q, k, temperature=temperature, **inputs.kwargs)
    blind = (log_p == -math.inf).all(-1)
    assert torch.equal(index == -1, blind)
    if blind.all():
        return
    torch.manual_seed(seed)
    noise = gumbel_noise(draw_rng_state(), *case_shape) if mode == "sample" else None
    perturbed = log_p if noise is None else log_p + noise
    best = perturbed.amax(-1)
    got = perturbed.gather(-1, index.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    unit = torch.finfo(accumulator(inputs.q.dtype)).eps / 2
    # 6 standard deviations of two scores' errors, and the few units that the noise is off.
    slack = unit * (6 * (2 * c2.amax(-1) / 3).sqrt() + 12)
    missed = (best - got).masked_fill(blind, 0)
    assert (missed <= slack).all(), f"a better key by {(missed - slack).max()}"
    if noise is None:
        return
    wanted = reference.hard_choice(log_p, noise)
    assert (index == wanted).double().mean() > 0.999 or index.numel() < 1000


def matrix() -> Iterator[Any]:
    for n, case in enumerate(CASES):
        for dtype in DTYPES:
            for isa in ISAS[:1] if dtype == torch.float64 else ISAS:
                mode, temperature = MODES[n % 2], (1.0, 0.4, 3.0)[n % 3]
                name = f"{case.id}-{mode}-t{temperature:g}-{dtype_id(dtype)}-{isa}"
                yield pytest.param(case, mode, temperature, dtype, isa, id=name)


@pytest.mark.parametrize(("case", "mode", "temperature", "dtype", "isa"), list(matrix()), indirect=["isa"])
def test_parity(case: Case, mode: str, temperature: float, dtype: torch.dtype, isa: str) -> None:
    """The choice is the best one, the value its very bits, log_prob and gradients within the bound."""
    inputs = make_inputs(case, dtype)
    for x in (inputs.q, inputs.k, inputs.v):
        x.requires_grad_()
    got, index = compute(inputs, seed=5, mode=mode, temperature=temperature)
    wanted, c2 = expected(case, dtype, inputs, index, temperature)
    assert_best(inputs, index, c2, 5, mode, temperature)
    assert torch.equal(got["o"].double(), wanted.exact["o"])
    broken = violations(got, wanted)
    assert not broken, "\n".join([f"{case.id}, {mode} at {temperature}, in {dtype} on {isa}:", *broken])


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_the_bound_notices(dtype: torch.dtype) -> None:
    case = Case(70, 131, D=16, B=2, gqa=2, causal="top_left")
    inputs = make_inputs(case, dtype)
    index = torch.randint(0, 131, (2, 4, 70)).minimum(torch.arange(70))
    wanted, c2 = expected(case, dtype, inputs, index, 1.0)
    assert not violations(wanted.exact, wanted)
    for name, exact in wanted.exact.items():
        for what, wrong in {"scale": exact * 1.1, "NaN": exact * torch.nan, "other": exact.roll(1, 2)}.items():
            assert violations(wanted.exact | {name: wrong}, wanted), f"{name}: {what} went unnoticed"
    with pytest.raises(AssertionError, match="a better key"):
        assert_best(inputs, index, c2, 5, "sample", 1.0)


def test_every_level_and_float64_draw_the_same(isa: str) -> None:
    """Fixed seeds: a near tie that rounding decides would show, and there is none among these 11200 rows."""
    for seed in range(5):
        torch.manual_seed(seed)
        q, k = torch.randn(2, 8, 140, 16), torch.randn(2, 2, 131, 16)
        indices = []
        for dtype in (torch.float32, torch.float64):
            torch.manual_seed(100 + seed)
            result = fastattn.hard_attention(q.to(dtype), k.to(dtype), k.to(dtype), causal="top_left")
            indices.append(result.index)
        assert torch.equal(*indices)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_the_lowest_key_wins_among_equals(isa: str, dtype: torch.dtype) -> None:
    q, v = torch.randn(1, 2, 70, 16).to(dtype), torch.randn(1, 2, 200, 4).to(dtype)
    k = torch.randn(1, 2, 1, 16).to(dtype).expand(1, 2, 200, 16)
    assert (fastattn.hard_attention(q, k, v, mode="argmax").index == 0).all()
    windowed = fastattn.hard_attention(q, k, v, mode="argmax", causal=True, window=(3, 0))
    assert torch.equal(windowed.index, (torch.arange(70) + 130 - 3).expand(1, 2, 70))
    mask = torch.arange(200) >= 77
    assert (fastattn.hard_attention(q, k, v, mode="argmax", mask=mask).index == 77).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_large_scores(isa: str, dtype: torch.dtype) -> None:
    """Scores in the thousands: a draw is the argmax, log_prob 0, its gradient 0, nothing is NaN."""
    inputs = make_inputs(Case(35, 70, D=16, scale=300.0), dtype)
    for x in (inputs.q, inputs.k, inputs.v):
        x.requires_grad_()
    got, index = compute(inputs)
    assert all(x.isfinite().all() for x in got.values())
    _, best = compute(inputs, mode="argmax")
    assert (index == best).double().mean() > 0.95
    assert (got["log_prob"] <= 0).all()


# --- The definition ---------------------------------------------------------------------------------------------------


def test_reference_follows_the_definition() -> None:
    q, k, v = (torch.randn(2, 4, 3, 5).double(), torch.randn(2, 2, 6, 5).double(), torch.randn(2, 2, 6, 2).double())
    lengths = torch.tensor([6, 0], dtype=torch.int32)
    log_p = reference.log_probabilities(q, k, temperature=0.5, causal=True, kv_lengths=lengths)
    noise = -torch.empty_like(log_p).exponential_().log()
    for g in (None, noise):
        index = reference.hard_choice(log_p, g)
        o, log_prob = reference.hard_attention(log_p, v, index, kv_lengths=lengths)
        for b, h, i in itertools.product(range(2), range(4), range(3)):
            if b == 1:
                assert (index[b, h, i], log_prob[b, h, i]) == (-1, 0.0)
                assert (o[b, h, i] == 0).all()
                continue
            s = {j: 2 * float(q[b, h, i] @ k[b, h // 2, j]) / 5**0.5 for j in range(i + 4)}
            total = sum(math.exp(x) for x in s.values())
            best = max(s, key=lambda j: s[j] + (0 if g is None else float(g[b, h, i, j])))
            assert index[b, h, i] == best
            assert math.isclose(log_prob[b, h, i], s[best] - math.log(total), rel_tol=1e-12, abs_tol=1e-12)
            assert torch.equal(o[b, h, i], v[b, h // 2, best])
    assert (reference.hard_choice(torch.zeros(1, 1, 2, 9)) == 0).all()


def test_noise_is_that_of_the_definition() -> None:
    """-log(-log(u)) has the mean and variance of a Gumbel variate."""
    g = gumbel_noise(torch.tensor([3, 4]), 2, 4, 100, 200)
    assert abs(g.mean() - 0.5772156649) < 4 * math.pi / 6**0.5 / g.numel() ** 0.5
    assert abs(g.var() / (math.pi**2 / 6) - 1) < 0.02


# --- Gradients --------------------------------------------------------------------------------------------------------


def qkv(dtype: torch.dtype = torch.float64, grad: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((B, Hq, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, Dv))
    q, k, v = (torch.randn(shape).to(dtype).requires_grad_(grad) for shape in shapes)
    return q, k, v


# Each feature alone, and all together: what hard_attention is called with beside q, k and v.
B, Hq, Hkv, Lq, Lk, D, Dv = 2, 4, 2, 3, 5, 4, 3
FEATURES: dict[str, Callable[[], dict[str, Any]]] = {
    "sample": dict,
    "argmax": lambda: {"mode": "argmax"},
    "temperature": lambda: {"temperature": 0.3},
    "causal": lambda: {"causal": True, "window": (2, None)},
    "mask": lambda: {"mask": torch.rand(B, 1, Lq, Lk) < 0.6},
    "lengths": lambda: {"kv_lengths": torch.tensor([0, 3], dtype=torch.int32)},
    "straight_through": lambda: {"estimator": "straight_through", "temperature": 2.0},
    "all": lambda: {
        "causal": "top_left",
        "window": (2, 1),
        "temperature": 1.7,
        "scale": -0.4,
        "mask": torch.rand(B, 1, Lq, Lk) < 0.8,
        "kv_lengths": torch.tensor([Lk, 2], dtype=torch.int32),
        "estimator": "straight_through",
    },
}


@pytest.mark.parametrize("feature", [name for name in FEATURES if name not in ("straight_through", "all")])
def test_gradcheck(feature: str) -> None:
    """log_prob and output for the index that a seed gives, which does not change in a small neighbourhood."""
    kwargs = FEATURES[feature]()

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(7)
        result = fastattn.hard_attention(q, k, v, **kwargs)
        return result.output, result.log_prob

    q, k, v = qkv()
    assert torch.autograd.gradcheck(function, (q, k, v))
    assert torch.autograd.gradgradcheck(function, (q, k, v), fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("mode", MODES)
def test_straight_through_is_the_soft_gradient(isa: str, mode: str, dtype: torch.dtype) -> None:
    """Forward the bits of reinforce; backward those of attention at that temperature; log_prob as ever."""
    case = Case(35, 70, D=16, Dv=24, B=2, gqa=2, causal="bottom_right", mask="b1qk", kv_lengths=(60, 0))
    inputs = make_inputs(case, dtype)
    tensors = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    temperature = 0.5
    results = {}
    for estimator in ("reinforce", "straight_through"):
        torch.manual_seed(3)
        results[estimator] = fastattn.hard_attention(
            *tensors, mode=mode, temperature=temperature, estimator=estimator, **inputs.kwargs
        )
    hard, through = results["reinforce"], results["straight_through"]
    assert torch.equal(hard.output, through.output)
    assert torch.equal(hard.index, through.index)
    assert torch.equal(hard.log_prob, through.log_prob)
    soft = fastattn.attention(*tensors, scale=16**-0.5 / temperature, **inputs.kwargs)
    ours = torch.autograd.grad(through.output, tensors, inputs.d_o, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(ours, torch.autograd.grad(soft, tensors, inputs.d_o), strict=True))

    # q's own gradient through log_prob: that of reinforce, and v has none.
    by_log_prob = [
        torch.autograd.grad(r.log_prob, tensors, inputs.d_lse, retain_graph=True, allow_unused=True)
        for r in (hard, through)
    ]
    assert all(torch.equal(a, b) for a, b in zip(by_log_prob[0][:2], by_log_prob[1][:2], strict=True))
    assert by_log_prob[1][2] is None
    both = torch.autograd.grad([through.output, through.log_prob], tensors, [inputs.d_o, inputs.d_lse])
    eps = torch.finfo(dtype).eps
    for one, other, total in zip(ours[:2], by_log_prob[1][:2], both[:2], strict=True):
        torch.testing.assert_close(total, one + other, atol=4 * eps, rtol=4 * eps)
    with torch.no_grad():
        torch.manual_seed(3)
        again = fastattn.hard_attention(
            *tensors, mode=mode, temperature=temperature, estimator="straight_through", **inputs.kwargs
        )
    assert torch.equal(again.output, hard.output)


def test_reinforce_output_has_a_gradient_for_v_alone() -> None:
    q, k, v = qkv()
    result = fastattn.hard_attention(q, k, v)
    dq, dk, dv = torch.autograd.grad(result.output.sin().sum(), (q, k, v), materialize_grads=True)
    assert not dq.any()
    assert not dk.any()
    wanted = torch.zeros_like(v)
    for b, h, i in itertools.product(range(B), range(Hq), range(Lq)):
        wanted[b, h // 2, result.index[b, h, i]] += result.output[b, h, i].detach().cos()
    torch.testing.assert_close(dv, wanted)
    assert not result.index.requires_grad


def test_gradients_of_some_inputs_alone() -> None:
    for chosen, estimator in itertools.product(((0,), (1,), (2,), (0, 2)), ("reinforce", "straight_through")):
        grads = []
        for needed in (chosen, (0, 1, 2)):
            torch.manual_seed(0)
            tensors = [x.requires_grad_(i in needed) for i, x in enumerate(qkv(grad=False))]
            result = fastattn.hard_attention(*tensors, estimator=estimator)
            loss = result.output.sin().sum() + result.log_prob.cos().sum()
            grads.append(torch.autograd.grad(loss, [tensors[i] for i in chosen]))
        torch.testing.assert_close(*grads)


def test_reinforce_is_unbiased(isa: str) -> None:
    """The mean of reward * d log_prob over draws is the gradient of the expected reward, within 5 standard errors."""
    draws, keys = 20000, 6
    q = torch.randn(1, 1, 1, 8)
    rows, k = q.repeat(1, 1, draws, 1).requires_grad_(), torch.randn(1, 1, keys, 8)
    reward = torch.randn(keys)
    result = fastattn.hard_attention(rows, k, reward.view(1, 1, keys, 1), temperature=0.8)
    assert torch.equal(result.output.flatten(), reward[result.index.flatten()])
    (each,) = torch.autograd.grad((result.output.detach().squeeze(-1) * result.log_prob).sum(), rows)
    exact = q.double().requires_grad_()
    p = reference.log_probabilities(exact, k.double(), temperature=0.8).exp()
    (wanted,) = torch.autograd.grad((p * reward.double()).sum(), exact)
    each = each.double().squeeze()
    error = (each.mean(0) - wanted.squeeze()).abs()
    assert (error < 5 * each.std(0) / math.sqrt(draws)).all()
    assert (wanted.squeeze().abs() > 5 * each.std(0) / math.sqrt(draws)).any(), "nothing was measured"


# --- Statistics: all draws are fixed by their seeds, so that nothing here fails by chance -----------------------------


def chi_square(counts: Tensor, p: Tensor) -> float:
    """How far counts are from their expectation, in standard deviations of a chi-square variable."""
    wanted = counts.sum() * p
    freedom = int((p > 0).sum()) - 1
    statistic = ((counts - wanted).square() / wanted)[p > 0].sum().item()
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_samples_follow_the_softmax(isa: str, dtype: torch.dtype, temperature: float) -> None:
    """The same row 16384 times, over two heads: each key as often as its probability says, and hidden ones never."""
    rows, keys = 8192, 37
    q = torch.randn(1, 1, 1, 8).to(dtype).expand(1, 2, rows, 8)
    k = torch.randn(1, 1, keys, 8).to(dtype)
    mask = torch.rand(keys) < 0.8
    index = fastattn.hard_attention(q, k, k, temperature=temperature, mask=mask).index
    p = (
        reference.log_probabilities(q[:, :1, :1].double(), k.double(), temperature=temperature, mask=mask)
        .exp()
        .flatten()
    )
    counts = torch.bincount(index.flatten(), minlength=keys).double()
    assert (counts[p == 0] == 0).all()
    expected_counts = counts.sum() * p
    frequent = expected_counts >= 5  # what chi-square is for; the rest counts as one key
    merged = torch.cat([counts[frequent], counts[~frequent].sum().view(1)])
    merged_p = torch.cat([p[frequent], p[~frequent].sum().view(1)])
    assert abs(chi_square(merged, merged_p)) < 4


def test_draws_of_neighbours_are_independent(isa: str) -> None:
    """Rows next to each other, heads, sequences, and the same row under the next seed: pairs of draws are products."""
    rows, keys = 2048, 4
    q = torch.zeros(2, 2, rows, 4)
    k = torch.zeros(2, 2, keys, 4)
    torch.manual_seed(1)
    first = fastattn.hard_attention(q, k, k).index
    second = fastattn.hard_attention(q, k, k).index
    pairs = {
        "rows": (first[:, :, 1:], first[:, :, :-1]),
        "far rows": (first[:, :, 64:], first[:, :, :-64]),
        "heads": (first[:, 1], first[:, 0]),
        "sequences": (first[1], first[0]),
        "calls": (first, second),
    }
    for name, (one, other) in pairs.items():
        counts = torch.bincount((one * keys + other).flatten(), minlength=keys * keys).double()
        assert abs(chi_square(counts, torch.full((keys * keys,), 1 / keys**2).double())) < 4, name


def test_temperature_goes_from_the_argmax_to_the_uniform() -> None:
    q, k = torch.randn(1, 1, 4000, 8), torch.randn(1, 1, 10, 8)
    cold = fastattn.hard_attention(q, k, k, temperature=1e-4)
    best = fastattn.hard_attention(q, k, k, mode="argmax")
    assert (cold.index == best.index).double().mean() > 0.99
    hot = fastattn.hard_attention(q, k, k, temperature=1e6)
    assert (
        abs(chi_square(torch.bincount(hot.index.flatten(), minlength=10).double(), torch.full((10,), 0.1).double())) < 4
    )


# --- Seeds ------------------------------------------------------------------------------------------------------------


def test_manual_seed_reproduces() -> None:
    q, k, v = qkv(torch.float32, grad=False)
    q = q.repeat(1, 1, 50, 1)
    torch.manual_seed(3)
    first, second = (fastattn.hard_attention(q, k, v).index for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(fastattn.hard_attention(q, k, v).index, first)
    assert torch.equal(fastattn.hard_attention(q, k, v).index, second)
    assert not torch.equal(first, second)


def test_generator() -> None:
    """Its own stream, whatever torch's generator does; and the draw that torch's gives under the same seed."""
    q, k, v = qkv(torch.float32, grad=False)
    q = q.repeat(1, 1, 50, 1)
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(9)
    first, second = (fastattn.hard_attention(q, k, v, generator=generator).index for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, second)
    assert torch.equal(fastattn.hard_attention(q, k, v, generator=generator.manual_seed(9)).index, first)
    torch.manual_seed(9)
    assert torch.equal(fastattn.hard_attention(q, k, v).index, first)


def test_argmax_and_bad_calls_draw_nothing() -> None:
    q, k, v = qkv(torch.float32)
    before = torch.get_rng_state()
    fastattn.hard_attention(q, k, v, mode="argmax")
    for bad in ({"mode": "soft"}, {"temperature": 0.0}, {"estimator": "gumbel"}, {"causal": "left"}):
        with pytest.raises(ValueError):
            fastattn.hard_attention(q, k, v, **bad)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_call_draws_as_much_whatever_its_shape() -> None:
    states = []
    for L in (1, 300):
        torch.manual_seed(5)
        x = torch.ones(1, 1, L, 4)
        fastattn.hard_attention(x, x, x)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


# --- The same bits, and nothing leaks ---------------------------------------------------------------------------------


def with_grad(inputs: Inputs) -> Inputs:
    for x in (inputs.q, inputs.k, inputs.v):
        x.requires_grad_()
    return inputs


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


# --- The operators as torch sees them ---------------------------------------------------------------------------------


def operator_arguments(feature: str, grad: bool) -> tuple[Any, ...]:
    kwargs = FEATURES[feature]()
    causal = {False: 0, "top_left": 1, True: 2}[kwargs.get("causal", False)]
    sides = tuple(-1 if side is None else side for side in kwargs.get("window", (None, None)))
    state = None if kwargs.get("mode") == "argmax" else torch.tensor([3, 4])
    return (
        *qkv(torch.float32, grad),
        kwargs.get("mask"),
        kwargs.get("kv_lengths"),
        state,
        causal,
        *sides,
        kwargs.get("scale"),
    )


@pytest.mark.parametrize("feature", ["sample", "argmax", "lengths", "all"])
def test_opcheck(feature: str) -> None:
    torch.library.opcheck(ops.hard_attention_forward.default, (*operator_arguments(feature, True), True))
    args = operator_arguments(feature, False)
    torch.library.opcheck(ops.hard_attention_forward.default, (*args, False))
    o, index, log_prob, stats = ops.hard_attention_forward(*args, True)
    both = (torch.randn_like(o), torch.randn_like(log_prob))
    for d_o, d_log_prob in (both, (None, both[1]), (both[0], None)) if feature == "sample" else (both,):
        given = (d_o, d_log_prob, *args[:3], index, stats, *args[3:5], *args[6:])
        torch.library.opcheck(ops.hard_attention_backward.default, given)


@pytest.mark.parametrize(
    ("feature", "backend"),
    [*((feature, "aot_eager") for feature in FEATURES), ("argmax", "inductor"), ("all", "inductor")],
)
@pytest.mark.usefixtures("fresh_compiler")
def test_compile(feature: str, backend: str) -> None:
    """One graph, forward and backward, static and dynamic, and the numbers of eager code."""
    kwargs = FEATURES[feature]()
    if backend == "inductor":
        kwargs["mode"] = "argmax"  # it draws other random numbers
    tensors = qkv(torch.float32)

    def run(function: Any) -> tuple[Tensor, ...]:
        torch.manual_seed(11)
        result = function(*tensors, **kwargs)
        grads = torch.autograd.grad(result.output.sin().sum() + result.log_prob.cos().sum(), tensors)
        return result.output.detach(), result.index, result.log_prob.detach(), *grads

    for dynamic in (False, True) if feature == "all" else (True,):
        compiled = torch.compile(fastattn.hard_attention, fullgraph=True, dynamic=dynamic, backend=backend)
        torch.testing.assert_close(run(compiled), run(fastattn.hard_attention))
        assert isinstance(compiled(*tensors, **kwargs), fastattn.HardAttentionOutput)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_samples_are_reproducible() -> None:
    q, k, v = qkv(torch.float32, grad=False)
    q = q.repeat(1, 1, 50, 1)
    compiled = torch.compile(fastattn.hard_attention, fullgraph=True)
    torch.manual_seed(5)
    first = compiled(q, k, v)
    torch.manual_seed(5)
    assert torch.equal(compiled(q, k, v).index, first.index)
    assert len(first.index.unique()) == Lk
    assert torch.equal(
        first.output, v.repeat_interleave(2, 1).gather(2, first.index.unsqueeze(-1).expand(-1, -1, -1, Dv))
    )


@pytest.mark.parametrize("estimator", ["reinforce", "straight_through"])
@pytest.mark.parametrize(
    "name", ["grad", "grad_of_grad", "vmap", "vmap_shared_keys", "per_sample_gradients", "jvp", "hessian", "dual"]
)
def test_transforms(name: str, estimator: str) -> None:
    """In argmax mode, where the plain code needs no noise."""
    func = torch.func
    q, k, v = qkv(grad=False)
    stack = [torch.stack([x, x.flip(2), -x]) for x in (q, k, v)]

    def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        result = fastattn.hard_attention(q, k, v, mode="argmax", estimator=estimator, causal=True)
        return result.output, result.log_prob

    def plain(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        log_p = reference.log_probabilities(q, k, causal=True)
        o, log_prob = reference.hard_attention(log_p, v, log_p.detach().argmax(-1))
        if estimator == "straight_through":
            soft = log_p.exp() @ v.repeat_interleave(2, dim=1)
            o = o.detach() + (soft - soft.detach())
        return o, log_prob

    def loss(f: Any) -> Callable[..., Tensor]:
        def value(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            o, log_prob = f(q, k, v)
            return o.sin().sum() + log_prob.cos().sum()

        return value

    def dual(f: Any) -> Any:
        with forward_ad.dual_level():
            results = f(forward_ad.make_dual(q, q.flip(3)), k, forward_ad.make_dual(v, v.flip(2)))
            return [forward_ad.unpack_dual(x).tangent for x in results]

    transform: Callable[[Any], Any] = {
        "grad": lambda f: func.grad(loss(f), argnums=(0, 1, 2))(q, k, v),
        "grad_of_grad": lambda f: func.grad(lambda q: func.grad(loss(f))(q, k, v).square().sum())(q),
        "vmap": lambda f: func.vmap(f)(*stack),
        "vmap_shared_keys": lambda f: func.vmap(f, in_dims=(0, None, None))(stack[0], k, v),
        "per_sample_gradients": lambda f: func.vmap(func.grad(loss(f), argnums=(0, 2)))(*stack),
        "jvp": lambda f: func.jvp(lambda q, v: f(q, k, v), (q, v), (q.flip(2), v.flip(3))),
        "hessian": lambda f: func.hessian(lambda q: loss(f)(q, k[:1], v[:1]))(q[:1]),
        "dual": dual,
    }[name]
    torch.testing.assert_close(transform(ours), transform(plain))


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=dtype_id)
@pytest.mark.parametrize("estimator", ["reinforce", "straight_through"])
def test_autocast(dtype: torch.dtype, estimator: str) -> None:
    tensors = qkv(torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        torch.manual_seed(3)
        result = fastattn.hard_attention(*tensors, estimator=estimator)
    torch.manual_seed(3)
    wanted = fastattn.hard_attention(*(x.to(dtype) for x in tensors), estimator=estimator)
    assert (result.output.dtype, result.log_prob.dtype) == (dtype, torch.float32)
    assert torch.equal(result.output, wanted.output)
    assert torch.equal(result.log_prob, wanted.log_prob)
    for grad in torch.autograd.grad(result.output.float().sum() + result.log_prob.sum(), tensors):
        assert grad.dtype == torch.float32


def test_without_gradients_the_same_bits(isa: str) -> None:
    for dtype, mode in itertools.product(DTYPES, MODES):
        inputs = with_grad(make_inputs(Case(70, 131, D=32, gqa=2, causal="bottom_right"), dtype))
        wanted, index = compute(inputs, mode=mode)
        for context in (torch.no_grad(), torch.inference_mode()):
            torch.manual_seed(0)
            with context:
                result = fastattn.hard_attention(inputs.q, inputs.k, inputs.v, mode=mode, causal=True)
            assert torch.equal(result.output, wanted["o"])
            assert torch.equal(result.log_prob, wanted["log_prob"])
            assert torch.equal(result.index, index)
            assert not result.log_prob.requires_grad


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_draws_the_same_again(use_reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    inputs = qkv()

    def block(*tensors: Tensor) -> Tensor:
        result = fastattn.hard_attention(*tensors)
        return result.output.sin().sum() + result.log_prob.sum()

    torch.manual_seed(3)
    wanted = torch.autograd.grad(block(*inputs), inputs)
    torch.manual_seed(3)
    checkpoint(block, *inputs, use_reentrant=use_reentrant).backward()  # type: ignore[union-attr]
    torch.testing.assert_close(tuple(x.grad for x in inputs), wanted)


# --- Messages ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bad:
    """A call with one bad argument; those that are not given are good."""

    id: str
    error: type[Exception]
    parts: tuple[str, ...]
    arguments: dict[str, Any] = field(default_factory=dict)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


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
    with pytest.raises(bad.error) as raised:
        call(arguments)
    text = str(raised.value)
    assert type(raised.value) is bad.error
    assert text.startswith("fastattn: ")
    assert "\n" not in text
    assert text.endswith(".")
    for part in bad.parts:
        assert part in text


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
