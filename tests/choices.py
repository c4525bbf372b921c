"""What hard attention and the summary must give for a case: exactly, in float64, and as plain code in a dtype has it.

The bound of every quantity is max |fast - exact| <= 2 max |plain - exact| + tiny, as in compare.py; `tiny` grants one
rounding of the result as it is stored and what is rounded in float32 on the way: a weight is the exponential of a
score, so that its relative error is the score's absolute one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn import reference

from .cases import Case, Inputs
from .compare import Quantities
from .philox import gumbel_noise

SCORE_ARGUMENTS = ("causal", "window", "scale", "softcap", "bias", "mask", "alibi_slopes", "kv_lengths")
FLOAT32_UNIT = 2.0**-24


def scores_in(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """(B, Hq, Lq, Lk), -inf for what a row does not see."""
    kwargs = {name: x for name, x in inputs.kwargs.items() if name in SCORE_ARGUMENTS}
    compute = None if dtype == inputs.q.dtype else dtype
    return reference.scores(inputs.q.detach(), inputs.k.detach(), **kwargs, dtype=compute)


def score_error(inputs: Inputs) -> float:
    """How far a score computed in float32 may be off: a few roundings of the products that it sums, and of itself."""
    q, k = (torch.nan_to_num(x.detach().double()) for x in (inputs.q, inputs.k))
    scale = inputs.kwargs.get("scale")
    scale = 1 / math.sqrt(max(q.shape[-1], 1)) if scale is None else abs(scale)
    products = scale * q.norm(dim=-1).amax().item() * k.norm(dim=-1).amax().item() if q.numel() and k.numel() else 0.0
    return 4 * FLOAT32_UNIT * max(products, 1.0)


def off_by(x: Tensor, exact: Tensor) -> float:
    """The largest error; NaN counts as infinite."""
    return (x.double() - exact).abs().nan_to_num(nan=math.inf).max().item() if exact.numel() else 0.0


def violations(got: Quantities, exact: Quantities, plain: Quantities, relative: float) -> list[str]:
    """Every quantity that breaks the bound. relative: the error that float32 leaves, as a part of the largest value."""
    found = []
    for name, wanted in exact.items():
        fast = got[name]
        if fast.shape != wanted.shape:
            found.append(f"{name} has shape {tuple(fast.shape)}, not {tuple(wanted.shape)}")
            continue
        finite = wanted.isfinite()
        if not torch.equal(fast[~finite].double(), wanted[~finite]):
            found.append(f"{name} is not {wanted[~finite].unique().tolist()} where it should be")
        fast, wanted, baseline = fast[finite], wanted[finite], plain[name][finite]
        if not wanted.numel():
            continue
        size = wanted.abs().max().item()
        error, allowed = off_by(fast, wanted), off_by(baseline, wanted)
        tiny = (torch.finfo(fast.dtype).eps / 2 + relative) * size + 1e-30
        if not math.isfinite(allowed):
            allowed = 0.0  # where plain float16 code overflows, its error is no excuse
        if not error <= 2 * allowed + tiny:
            found.append(f"{name} is off by {error:.3g} of {size:.3g}; plain by {allowed:.3g}, tiny is {tiny:.3g}")
    return found


# ------------------------------------------------------------------------------------------------------ hard attention

HARD_CASES = [
    Case(70, 131, D=32, B=2, gqa=2),
    Case(64, 64, D=64, Hkv=1),
    Case(65, 129, D=64, Hkv=1, causal="bottom_right"),
    Case(129, 65, D=24, causal="bottom_right"),  # 64 rows that see nothing
    Case(90, 77, D=128, Hkv=1, causal="top_left"),
    Case(100, 150, D=100, Dv=36, Hkv=1, window=(20, 10)),
    Case(40, 90, D=256, Hkv=1, gqa=2),
    Case(33, 70, D=129, Dv=5, Hkv=1, mask="11qk"),
    Case(50, 200, D=16, B=2, mask="bhqk", mask_values="rows"),
    Case(50, 60, D=16, Dv=33, mask="1h1k", causal="bottom_right", window=(30, 3)),
    Case(70, 140, D=48, B=3, gqa=2, kv_lengths=(140, 0, 65)),
    Case(70, 140, D=64, B=3, kv_lengths=(1, 139, 64), causal="bottom_right", mask="b1qk"),
    Case(1, 300, D=64, gqa=4),
    Case(3, 300, D=128, Hkv=1, gqa=3, window=(200, 0)),
    Case(1, 1, D=1, Dv=1),
    Case(5, 3, D=17, Dv=24, layout="offset", B=2, gqa=3),
    Case(70, 90, D=40, layout="blhd", B=2, Hkv=2, scale=0.7),
    Case(30, 50, D=8, layout="columns"),
    Case(30, 50, D=32, layout="expanded"),
    Case(66, 100, D=32, scale=-0.3),  # negative
    Case(66, 100, D=32, scale=20.0),  # a low temperature: rows with all their weight on one key
    Case(20, 40, D=16, scale=0.0),
    Case(20, 0, D=16),
]


@dataclass(frozen=True)
class Choice:
    index: Tensor
    o: Tensor
    log_prob: Tensor


def wrong_choices(inputs: Inputs, got: Choice, rng_state: tuple[int, int] | None) -> list[str]:
    """What is wrong with the keys that were taken. Where two keys are as close as scores in float32 are rounded,
    either will do; without rounding, the lower one.
    """
    exact = scores_in(inputs, torch.float64)
    B, Hq, Lq, Lk = exact.shape
    blind = (exact == -math.inf).all(-1) if Lk else torch.ones(B, Hq, Lq, dtype=torch.bool)
    found = []
    if not torch.equal(got.index < 0, blind) or not (got.index[blind] == -1).all():
        found.append("index is not -1 for the rows that see nothing, and only for them")
        return found
    if (got.index >= Lk).any():
        found.append("index lies beyond the last key")
        return found
    if not (got.o[blind] == 0).all() or not (got.log_prob[blind] == 0).all():
        found.append("rows that see nothing have an output or a log_prob")
    if Lk == 0 or blind.all():
        return found
    taken = got.index.clamp_min(0).unsqueeze(-1)
    noisy = exact + (gumbel_noise(torch.tensor(rng_state), B, Hq, Lq, Lk) if rng_state is not None else 0)
    short = noisy.amax(-1) - noisy.gather(-1, taken).squeeze(-1)
    tolerance = 2 * score_error(inputs) + (1e-6 if rng_state is not None else 0)
    if not (short[~blind] <= tolerance).all():
        found.append(f"a key was taken that is {short[~blind].max().item():.3g} short of the best, of {tolerance:.3g}")
    v = inputs.v.detach().repeat_interleave(Hq // max(inputs.v.shape[1], 1), 1)
    values = v.gather(2, taken.expand(-1, -1, -1, v.shape[3]))
    if not torch.equal(got.o[~blind], values[~blind]):
        found.append("o is not v[index] bit for bit")
    return found


def log_probabilities(inputs: Inputs, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Of the keys that were taken, in dtype; differentiable."""
    kwargs = {name: x for name, x in inputs.kwargs.items() if name in SCORE_ARGUMENTS}
    compute = None if dtype == inputs.q.dtype else dtype
    s = reference.scores(inputs.q, inputs.k, **kwargs, dtype=compute)
    blind = index < 0
    if s.shape[-1] == 0:
        return s.new_zeros(index.shape) + 0 * (inputs.q.sum() + inputs.k.sum()).to(s.dtype)
    logs = torch.log_softmax(s.masked_fill(blind.unsqueeze(-1), 0), -1)
    return logs.gather(-1, index.clamp_min(0).unsqueeze(-1)).squeeze(-1).masked_fill(blind, 0)


def hard_quantities(inputs: Inputs, index: Tensor, dtype: torch.dtype) -> Quantities:
    """log_prob and the gradients of (d_lse . log_prob + d_o . v[index]), d_lse standing in for d_log_prob."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    copy = Inputs(q, k, v, inputs.d_o, inputs.d_lse, inputs.kwargs)
    log_prob = log_probabilities(copy, index, dtype)
    loss = (log_prob * inputs.d_lse.to(log_prob.dtype)).sum()
    B = index.shape[0]
    Hkv, Lk, Dv = v.shape[1:]
    # dv of v[index], added up in dtype.
    dv = torch.zeros(B, Hkv, Lk, Dv, dtype=dtype)
    if Lk and Hkv:
        taken = index.view(B, Hkv, -1).clamp_min(0).unsqueeze(-1).expand(-1, -1, -1, Dv)
        d_o = inputs.d_o.detach().to(dtype).masked_fill((index < 0).unsqueeze(-1), 0).reshape(B, Hkv, -1, Dv)
        dv.scatter_add_(2, taken, d_o)
    if dtype == torch.float64 and q.dtype != torch.float64:
        # Gradients with respect to the exact values, not rounded to the inputs' dtype.
        wide = Inputs(*(x.detach().double().requires_grad_() for x in (q, k, v)), inputs.d_o, inputs.d_lse,
                      {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
                       for name, x in inputs.kwargs.items()})  # fmt: skip
        log_prob = log_probabilities(wide, index, dtype)
        loss, q, k = (log_prob * inputs.d_lse.to(dtype)).sum(), wide.q, wide.k
    dq, dk = torch.autograd.grad(loss, (q, k))
    return {"log_prob": log_prob.detach(), "dq": dq, "dk": dk, "dv": dv}


# --------------------------------------------------------------------------------------------------------- the summary

EVERYTHING: dict[str, Any] = {"bias": "11qk", "mask": "b11k", "sinks": True, "softcap": 5.0, "alibi": "h"}
SUMMARY_CASES = [
    (Case(70, 131, D=32, B=2, gqa=2), 8),
    (Case(64, 64, D=64, Hkv=1), 64),
    (Case(65, 129, D=64, Hkv=1, causal="bottom_right"), 128),  # more than most rows see
    (Case(129, 65, D=24, causal="bottom_right"), 3),  # 64 rows that see nothing
    (Case(129, 65, D=24, causal="bottom_right", sinks=True), 3),
    (Case(90, 77, D=128, Hkv=1, causal="top_left"), 1),
    (Case(100, 150, D=100, Hkv=1, window=(20, 10)), 8),
    (Case(40, 90, D=256, Hkv=1, gqa=2), 8),
    (Case(33, 70, D=129, Hkv=1, mask="11qk", bias="1h1k"), 0),
    (Case(50, 200, D=16, B=2, mask="bhqk", mask_values="rows", sinks=True), 16),
    (Case(70, 140, D=48, B=3, gqa=2, kv_lengths=(140, 0, 65)), 8),
    (Case(70, 140, D=64, B=2, kv_lengths=(33, 139), causal="bottom_right", **EVERYTHING), 8),
    (Case(40, 80, D=24, gqa=2, bias="bhqk", alibi="bh", window=(40, 7), scale=0.4), 5),
    (Case(50, 77, D=24, B=2, bias="11qk", bias_float32=True, bias_values="min"), 8),
    (Case(50, 77, D=24, bias="11qk", bias_float32=True, bias_values="-1e9"), 8),
    (Case(50, 77, D=24, bias="11qk", bias_values="-inf", sinks=True), 8),
    (Case(1, 300, D=64, gqa=4), 8),
    (Case(300, 1, D=16), 2),
    (Case(5, 3, D=17, layout="offset", B=2, gqa=3, softcap=2.0), 4),
    (Case(30, 50, D=8, layout="columns", bias="11qk"), 4),
    (Case(66, 100, D=32, scale=20.0), 8),  # rows with all their weight on one key
    (Case(20, 0, D=16), 2),
]


def random_rows(case: Case, seed: int = 0) -> Tensor:
    return torch.rand(case.B, case.Hq, case.Lq, generator=torch.Generator().manual_seed(seed)) < 0.5


def summary_quantities(inputs: Inputs, dtype: torch.dtype, top_k: int, rows: Tensor | None) -> Quantities:
    """All but the keys of the top weights."""
    s = scores_in(inputs, dtype)
    B, Hq, Lq, Lk = s.shape
    sinks = inputs.kwargs.get("sinks")
    blind = (s == -math.inf).all(-1) if Lk else torch.ones(B, Hq, Lq, dtype=torch.bool)
    columns = s.masked_fill(blind.unsqueeze(-1), 0)
    if sinks is not None:
        columns = torch.cat([columns, sinks.to(s.dtype).view(1, -1, 1, 1).expand(B, Hq, Lq, 1)], -1)
    if not columns.shape[-1]:
        columns = s.new_zeros(B, Hq, Lq, 1)
    p = torch.softmax(columns, -1).masked_fill(blind.unsqueeze(-1), 0)
    lse = torch.logsumexp(columns, -1).masked_fill(blind, -math.inf)
    entropy = -torch.xlogy(p, p).sum(-1)
    p = p[..., :Lk]
    top = torch.zeros(B, Hq, Lq, top_k, dtype=p.dtype)
    kept = min(top_k, Lk)
    top[..., :kept] = p.topk(kept, -1).values
    counted = p if rows is None else p.masked_fill(~rows.expand(B, Hq, Lq).unsqueeze(-1), 0)
    return {
        "entropy": entropy,
        "max_weight": p.amax(-1) if Lk else p.new_zeros(B, Hq, Lq),
        "top_weights": top,
        "key_mass": counted.sum(2),
        "lse": lse,
    }


def wrong_tops(inputs: Inputs, weights: Tensor, index: Tensor, relative: float) -> list[str]:
    """What is wrong with the keys of the top weights."""
    s = scores_in(inputs, torch.float64)
    Lk, top_k = s.shape[-1], index.shape[-1]
    visible = (s > -math.inf).sum(-1, keepdim=True)
    exists = torch.arange(top_k) < visible
    found = []
    if not torch.equal(index >= 0, exists) or not (index[~exists] == -1).all() or not (weights[~exists] == 0).all():
        return ["top_index does not end after the visible keys with -1, or top_weights with 0"]
    if top_k == 0 or Lk == 0:
        return found
    if not (weights[..., :-1] >= weights[..., 1:]).all():
        found.append("top_weights are not in descending order")
    same = (weights[..., :-1] == weights[..., 1:]) & exists[..., 1:] & (weights[..., 1:] > 0)
    named = torch.where(exists, index, Lk + torch.arange(top_k))
    if not (named.sort(-1).values.diff(dim=-1) > 0).all():
        found.append("top_index names a key twice")
    # Their scores are the largest, but for rounding.
    mine = s.gather(-1, index.clamp_min(0)).masked_fill(~exists, -math.inf)
    kept = min(top_k, Lk)
    best = s.topk(kept, -1).values
    gap = (best - mine[..., :kept].sort(-1, descending=True).values).nan_to_num(nan=0.0)
    tolerance = 2 * score_error(inputs) + relative * best[best.isfinite()].abs().max().item() if kept else 0.0
    if not (gap <= tolerance).all():
        found.append(f"a key is missing whose score is {gap.max().item():.3g} above one that is there")
    if (
        same.any()
        and not (mine[..., :-1] - mine[..., 1:])[same].abs().max() <= 1e-3 * best[best.isfinite()].abs().max() + 1e-3
    ):
        found.append("keys of different scores have the same weight")
    return found


# ---------------------------------------------------------------------------------------------------- compute-sanitizer


def sanitized_choices() -> list[Case]:
    """Cases of both in which every kernel runs; tests/test_gpu_check.py looks after that."""
    return [HARD_CASES[2], HARD_CASES[6], HARD_CASES[7], HARD_CASES[11], HARD_CASES[13]]


def call_all(inputs: Inputs) -> None:
    """Every operator of hard attention and of the summary, each gradient present and absent."""
    kwargs = inputs.kwargs
    q, k, v, mask, kv_lengths = inputs.q, inputs.k, inputs.v, kwargs.get("mask"), kwargs.get("kv_lengths")
    left, right = (-1 if side is None else side for side in kwargs.get("window") or (None, None))
    causal = {False: 0, "top_left": 1, "bottom_right": 2}[kwargs.get("causal", False)]
    shape = (causal, left, right, kwargs.get("scale"))
    ops = torch.ops.fastattn
    for rng_state in (torch.tensor([3, 4], device=q.device), None):
        _, index, _, stats = ops.hard_attention_forward(q, k, v, mask, kv_lengths, rng_state, *shape, True)
        for d_o, d_log_prob in ((inputs.d_o, inputs.d_lse), (None, None)):
            ops.hard_attention_backward(d_o, d_log_prob, q, k, v, index, stats, mask, kv_lengths, *shape)
    ops.attention_summary(q, k, None, mask, None, None, kv_lengths, None, *shape, 0.0, 8, True)
