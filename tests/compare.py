"""How results are compared: everything that a case computes, by fastattn, by the oracle and by the baseline.

The bound, for o, lse and every gradient (one "quantity" each):

    max |fast - exact|  <=  2 * max |baseline - exact| + tiny             and the same in root mean square

exact: fastattn.reference in float64, on the inputs' exact values. baseline: the same file in the inputs' own dtype.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastattn
from fastattn import reference
from fastattn._ops import draw_rng_state
from fastattn.reference._attention import existing, softmax

from .cases import Case, Inputs, accumulator, make_inputs

Quantities = dict[str, Tensor]  # "o", "lse", "dq", "dk", "dv" and, where the case has them, "dbias", "dsinks", "dw"

# A few rows are another kernel's where no gradient will be asked for: o and lse from there are "o_alone", "lse_alone".
ALONE = "_alone"
FEW_ROWS = 16


def gradients(o: Tensor, lse: Tensor, inputs: Inputs) -> Quantities:
    """o, lse, and all gradients for the upstream gradients d_o and d_lse."""
    named = inputs.differentiable()
    upstream = [inputs.d_o.to(o.dtype), inputs.d_lse.to(lse.dtype)]
    grads = torch.autograd.grad([o, lse], list(named.values()), upstream)
    return {"o": o.detach(), "lse": lse.detach()} | {f"d{name}": g for name, g in zip(named, grads, strict=True)}


def dropout_keep(case: Case, seed: int) -> Tensor | None:
    """What fastattn.attention keeps when it is called right after torch.manual_seed(seed)."""
    if not case.dropout_p:
        return None
    torch.manual_seed(seed)
    return torch.ops.fastattn.dropout_mask(draw_rng_state(), case.B, case.Hq, case.Lq, case.Lk, case.dropout_p)


def compute(inputs: Inputs, seed: int = 0) -> Quantities:
    """By fastattn."""
    torch.manual_seed(seed)
    attend: Any = fastattn.additive_attention if "w" in inputs.kwargs else fastattn.attention
    o, lse = attend(inputs.q, inputs.k, inputs.v, return_lse=True, **inputs.kwargs)
    quantities = gradients(o, lse, inputs)
    if inputs.q.device.type == "cpu" and inputs.q.shape[2] < FEW_ROWS and not {"w", "dropout_p"} & inputs.kwargs.keys():
        with torch.no_grad():
            o, lse = attend(inputs.q, inputs.k, inputs.v, return_lse=True, **inputs.kwargs)
        quantities |= {"o" + ALONE: o, "lse" + ALONE: lse}
    return quantities


def _compute_by_reference(inputs: Inputs, keep: Tensor | None) -> Quantities:
    attend: Any = reference.additive_attention if "w" in inputs.kwargs else reference.attention
    o, lse = attend(inputs.q, inputs.k, inputs.v, return_lse=True, dropout_keep=keep, **inputs.kwargs)
    return gradients(o, lse, inputs)


def _copy(inputs: Inputs, dtype: torch.dtype | None) -> Inputs:
    """New contiguous tensors, ready for gradients; the floating-point ones in dtype, or with None in their own."""

    def copy(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.detach().clone(memory_format=torch.contiguous_format)
        return x.to(dtype) if dtype is not None and x.is_floating_point() else x

    return Inputs(
        *(copy(x) for x in (inputs.q, inputs.k, inputs.v, inputs.d_o, inputs.d_lse)),
        kwargs={name: copy(x) for name, x in inputs.kwargs.items()},
    ).require_grad()


@dataclass(frozen=True)
class Spread:
    """Standard deviations of the rounding errors in a quantity's elements: the largest, and the root mean square.

    In units of u / sqrt(3): the error of rounding x is spread evenly over [-u x, u x].
    """

    largest: float
    rms: float
    elements: float = (
        0.0  # that carry it: all of them if their errors are alike, 1 if one is far larger than the others
    )

    @staticmethod
    def of(variance: Tensor | None) -> Spread:
        if variance is None or not variance.numel():
            return Spread(0.0, 0.0)
        elements = variance.sum().square() / variance.square().sum().clamp_min(1e-300)
        return Spread(variance.max().item() ** 0.5, variance.mean().item() ** 0.5, elements.item())


@dataclass(frozen=True)
class Terms:
    """Where the rounding errors of a quantity come from."""

    sums: Spread  # from roundings in the accumulator's type
    through_o: Spread  # from the roundings of o and of the weights in the inputs' dtype


def dot_error2(a: Tensor, b: Tensor) -> Tensor:
    """Of the products of a's rows and b's, (..., N, D) and (..., M, D): see rounding_terms."""
    return (1 + a.shape[-1] / 2) * (a.square() @ b.square().mT)


def matmul_error2(a: Tensor, a_error2: Tensor, b: Tensor, reduce: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """Of reduce(a @ b), where a is off by a_error2 already."""
    return reduce(a_error2 @ b.square()) + reduce(a.abs() @ b.abs()).square() / 2


class DotScores:
    """Rounding errors of scale * q . k, and of what flows back through it; k has been repeated for the query heads."""

    def __init__(self, q: Tensor, k: Tensor, scale: float, heads_per_key: int) -> None:
        self.q, self.k, self.scale, self.heads_per_key = q, k, scale, heads_per_key
        self.error2 = scale**2 * (dot_error2(q, k) + (q @ k.mT).square())

    def sum_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, max(self.heads_per_key, 1))).sum(2)

    def sums2(self, ds: Tensor, ds_error2: Tensor) -> dict[str, Tensor]:
        """Of the gradients, from the gradient ds of the scores and its errors."""
        return {
            "dq": self.scale**2 * matmul_error2(ds, ds_error2, self.k),
            "dk": self.scale**2 * matmul_error2(ds.mT, ds_error2.mT, self.q, self.sum_heads),
        }

    def through_o2(self, p: Tensor, moved2: Tensor) -> dict[str, Tensor]:
        """Of the gradients, where each row's delta is off by moved2 (B, Hq, Lq, 1)."""
        return {
            "dq": self.scale**2 * moved2 * (p @ self.k).square(),
            "dk": self.scale**2 * self.sum_heads(p.square().mT @ (moved2 * self.q.square())),
        }


class AdditiveScores(DotScores):
    """The same for w . tanh(q + k); w is (Hq, D) or (D,).

    A tanh near 0 errs as much as one near 1, for it is taken as 1 - 2 / (1 + exp(2q) exp(2k)): about 1.5 units. Its
    derivative 1 - tanh^2 errs as much.
    """

    def __init__(self, q: Tensor, k: Tensor, w: Tensor, heads_per_key: int) -> None:
        self.heads_per_key, self.w = heads_per_key, w
        self.t = torch.tanh(q.unsqueeze(3) + k.unsqueeze(2))  # (B, Hq, Lq, Lk, D)
        self.w2 = w.square().view(-1, 1, 1, w.shape[-1])
        s = (self.t * w.view(-1, 1, 1, w.shape[-1])).sum(-1)
        self.error2 = (2 + w.shape[-1] / 2) * self.w2.sum(-1) + s.square()

    def _sum_to_w(self, x: Tensor) -> Tensor:
        """(B, Hq, ..., D) to w's shape."""
        return x.sum([d for d in range(x.dim() - 1) if d != 1]).sum_to_size(self.w.shape)

    def sums2(self, ds: Tensor, ds_error2: Tensor) -> dict[str, Tensor]:
        ds, ds_error2, slope2 = ds.unsqueeze(-1), ds_error2.unsqueeze(-1), self.w2 * (1 - self.t.square()).square()
        error2 = ds_error2 * slope2 + 2 * ds.square() * self.w2
        size = ds.abs() * slope2.sqrt()
        of_w = ds_error2 * self.t.square() + 2 * ds.square()
        return {
            "dq": error2.sum(3) + size.sum(3).square() / 2,
            "dk": self.sum_heads(error2.sum(2)) + self.sum_heads(size.sum(2)).square() / 2,
            "dw": self._sum_to_w(of_w) + self._sum_to_w(ds.abs() * self.t.abs()).square() / 2,
        }

    def through_o2(self, p: Tensor, moved2: Tensor) -> dict[str, Tensor]:
        p, slope2 = p.unsqueeze(-1), self.w2 * (1 - self.t.square()).square()
        return {
            "dq": moved2 * (p * slope2.sqrt()).sum(3).square(),
            "dk": self.sum_heads((moved2.unsqueeze(-1) * p.square() * slope2).sum(2)),
            "dw": self._sum_to_w(moved2 * (p * self.t).sum(3).square()),
        }


def rounding_terms(inputs: Inputs, keep: Tensor | None) -> dict[str, Terms]:
    """The rounding errors to expect in each quantity, from the exact values.

    They follow the size of the terms of a sum, not of the result, in which they may cancel: for a row with one visible
    key dp - delta is 0, but the difference of two sums that were added up in different orders is not. Each of N
    terms x has a rounding, and so has each of the partial sums, which grow like a random walk: together sum x^2
    (1 + N / 2). Where few of the terms count, (sum |x|)^2 stands for N sum x^2.

    A weight is the exponential of a score, so its relative error is the score's absolute one: about u * c_ij, where
    c_ij has the terms of the dot product, the product itself and its distance from the row's maximum.

    Flash attention takes delta = do . o from the o that was stored, in the inputs' dtype, and made of weights in that
    dtype, where plain code sums p * dp. With independent roundings u of o_d and of p_j, delta_i is off by about
    u * sqrt(sum_d (do_d o_d)^2 + sum_j (p_j dp_j)^2): the same for all keys of the row, independent between rows.
    """
    q, k, v, d_o, d_lse = (x.detach().double() for x in (inputs.q, inputs.k, inputs.v, inputs.d_o, inputs.d_lse))
    kwargs = {name: x.detach() if isinstance(x, Tensor) else x for name, x in inputs.kwargs.items()}
    dropout_p = kwargs.pop("dropout_p", 0.0)
    bias, sinks, scale, w = (kwargs.get(name) for name in ("bias", "sinks", "scale", "w"))
    if w is None:
        s = reference.scores(q, k, **{name: x for name, x in kwargs.items() if name != "sinks"}, dtype=torch.float64)
    else:
        s = reference.additive_scores(q, k, **kwargs, dtype=torch.float64)
    p, lse = softmax(s, sinks)
    lse = lse.masked_fill(lse == -math.inf, 0)
    z = torch.ones_like(p) if keep is None else reference.dropped(torch.ones_like(p), keep, dropout_p)
    G = q.shape[1] // max(k.shape[1], 1)
    k, v = (existing(x, kwargs.get("kv_lengths")).repeat_interleave(G, 1) for x in (k, v))

    if w is None:
        scores = DotScores(q, k, abs(q.shape[-1] ** -0.5 if scale is None else scale), G)
    else:
        scores = AdditiveScores(q, k, w.double(), G)

    def sum_to_bias(x: Tensor) -> Tensor:
        assert bias is not None
        return x.sum_to_size((1,) * (4 - bias.dim()) + bias.shape)

    below_max = (s - s.amax(-1, keepdim=True)).abs().nan_to_num(nan=0.0, posinf=0.0) if k.shape[2] else s
    c2 = scores.error2 + below_max.square()

    pz, dp = p * z, z * (d_o @ v.mT)
    o = pz @ v
    delta = (d_o * o).sum(-1, keepdim=True) - d_lse.unsqueeze(-1)
    delta_error2 = (1 + o.shape[-1] / 2) * (d_o * o).square().sum(-1, keepdim=True) + d_lse.square().unsqueeze(-1)
    ds = p * (dp - delta)
    ds_error2 = p.square() * (z.square() * dot_error2(d_o, v) + delta_error2) + ds.square() * c2
    pz_error2 = pz.square() * (1 + c2)

    sums2 = {
        "o": matmul_error2(pz, pz_error2, v),
        "lse": (p.square() * (1 + c2)).sum(-1),
        "dv": matmul_error2(pz.mT, pz_error2.mT, d_o, scores.sum_heads),
        **scores.sums2(ds, ds_error2),
    }
    moved2 = (d_o * o).square().sum(-1, keepdim=True) + (p * dp).square().sum(-1, keepdim=True)
    through_o2 = scores.through_o2(p, moved2)
    if bias is not None:
        sums2["dbias"] = sum_to_bias(ds_error2) + sum_to_bias(ds.abs()).square() / 2
        sums_keys = bias.dim() == 0 or bias.shape[-1] == 1
        # A bias without a key dimension sums over the keys, which share one delta: no root of squares there.
        share = p.sum(-1, keepdim=True).expand_as(p) / max(p.shape[-1], 1) ** 0.5 if sums_keys else p
        through_o2["dbias"] = sum_to_bias(moved2 * share.square())
    if sinks is not None:
        p_sink = torch.exp(sinks.double().view(1, -1, 1, 1) - lse.unsqueeze(-1)) * (p.sum(-1, keepdim=True) > 0)
        d_sink_error2 = p_sink.square() * (delta_error2 + delta.square() * (1 + (p * c2).sum(-1, keepdim=True)))
        sums2["dsinks"] = d_sink_error2.sum((0, 2, 3)) + (p_sink * delta).abs().sum((0, 2, 3)).square() / 2
        through_o2["dsinks"] = (p_sink.square() * moved2).sum((0, 2, 3))

    return {name: Terms(Spread.of(sums2[name]), Spread.of(through_o2.get(name))) for name in sums2}


# The largest of ten thousand elements lies four standard deviations out. Over the table, tiny then comes to some two to
# four times the baseline's largest error: right for a few elements, or an unlucky one, and more than a kernel should
# need everywhere. So the root mean square, which no single element moves, obeys the same rule with 1.5 deviations (not
# 1: where Lq = 1, all elements of a row of dv share the error of one weight).
DEVIATIONS_OF_LARGEST = (4.0, 2.0)
DEVIATIONS_OF_RMS = 1.5
MANY = 256  # elements with errors of much the same size, of which a root mean square says something


def tiny(exact: Tensor, terms: Terms, dtype: torch.dtype, stored: torch.dtype) -> Spread:
    """What the bound grants beyond twice the baseline's error, for when plain code happens to be (nearly) exact.

    One rounding of the result as it is stored, and the deviations above of what is rounded in the accumulator's type,
    and of what the rounding of o brings in. float64's baseline is the oracle itself, which errs as well: it is granted
    three times as much.
    """
    finite = exact[exact.isfinite()].abs()
    result, result_rms = (finite.max().item(), finite.square().mean().item() ** 0.5) if finite.numel() else (0.0, 0.0)
    unit, unit_stored, unit_sum = (torch.finfo(t).eps / 2 for t in (dtype, stored, accumulator(dtype)))
    of_sums, of_o = DEVIATIONS_OF_LARGEST
    largest = unit_stored * result + 3**-0.5 * (
        of_sums * unit_sum * terms.sums.largest + of_o * unit * terms.through_o.largest
    )
    rms = (
        DEVIATIONS_OF_RMS
        * 3**-0.5
        * (unit_stored * result_rms + unit_sum * terms.sums.rms + unit * terms.through_o.rms)
    )
    times = 3 if dtype == torch.float64 else 1
    return Spread(times * largest, times * rms, terms.sums.elements)


@dataclass(frozen=True)
class Limit:
    """How far some elements of a quantity may be off: each of them, and in root mean square."""

    part: Tensor | None  # which elements; None = all
    plain: Spread  # the baseline's errors: the largest, and in root mean square
    tiny: Spread


@dataclass(frozen=True, eq=False)
class Expected:
    """What a case must give in a dtype: the exact values, and what plain code in that dtype makes of it."""

    exact: Quantities
    baseline: Quantities
    terms: dict[str, Terms]
    dtype: torch.dtype

    def limits(self, name: str, stored: torch.dtype) -> list[Limit]:
        """A row hidden by a finite value has an lse as large as that: its rounding must not excuse errors elsewhere."""
        exact, plain = self.exact[name], self.baseline[name].double()
        infinite, huge = exact.isinf(), exact.abs() > 1e4
        ordinary = ~infinite & ~huge
        parts = [None] if ordinary.all() else [ordinary, ~infinite & huge]
        limits = []
        for part in parts:
            here, plain_here = (exact, plain) if part is None else (exact[part], plain[part])
            if here.numel():
                error = (plain_here - here).abs()
                # Where plain float16 code overflows, its error is infinite, and no excuse either.
                error = error[error.isfinite()]
                plain_error = Spread(error.max().item(), error.square().mean().item() ** 0.5)
                limits.append(Limit(part, plain_error, tiny(here, self.terms[name], self.dtype, stored)))
        return limits


# Tests go through the levels of a case and dtype one after the other.
@functools.lru_cache(maxsize=2)
def expected(case: Case, dtype: torch.dtype, seed: int = 0) -> Expected:
    """On the CPU. Dropout keeps what the CPU's generator draws."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for such small operations cost more than they bring
    inputs = make_inputs(case, dtype)
    keep = dropout_keep(case, seed)
    exact = _compute_by_reference(_copy(inputs, torch.float64), keep)
    baseline = exact if dtype == torch.float64 else _compute_by_reference(_copy(inputs, None), keep)
    terms = rounding_terms(inputs, keep)
    torch.set_num_threads(threads)
    return Expected(exact, baseline, terms, dtype)


@functools.lru_cache(maxsize=16)
def _limits(wanted: Expected, name: str, stored: torch.dtype) -> list[Limit]:
    return wanted.limits(name, stored)


def violations(fast: Quantities, wanted: Expected) -> list[str]:
    """Every quantity that breaks the bound, with both errors and the worst place; empty if all is well."""
    found = []
    assert {name.removesuffix(ALONE) for name in fast} == wanted.exact.keys()
    for name in fast:
        exact, got = wanted.exact[name.removesuffix(ALONE)], fast[name].double()
        if got.shape != exact.shape:
            found.append(f"{name} has shape {tuple(got.shape)}, not {tuple(exact.shape)}")
            continue
        if not torch.equal(got == -math.inf, exact == -math.inf):
            found.append(f"{name} is not -inf where it should be, and only there")
        for limit in _limits(wanted, name.removesuffix(ALONE), fast[name].dtype):
            error = (got - exact).abs()
            if limit.part is not None:
                error = error.masked_fill(~limit.part, 0)
            # NaN is larger than everything.
            error = error.nan_to_num(nan=math.inf, posinf=math.inf)
            plain = f"plain {str(wanted.dtype).removeprefix('torch.')} code is off by"
            if not error.max() <= 2 * limit.plain.largest + limit.tiny.largest:
                at = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
                found.append(
                    f"{name}{list(at)} is {got[at].item():.8g} instead of {exact[at].item():.8g}, off by"
                    f" {error[at].item():.3g}; {plain} up to {limit.plain.largest:.3g}, tiny is"
                    f" {limit.tiny.largest:.3g}"
                )
                continue
            elements = error.numel() if limit.part is None else int(limit.part.sum())
            rms = (error.square().sum() / elements).item() ** 0.5
            if limit.tiny.elements >= MANY and not rms <= 2 * limit.plain.rms + limit.tiny.rms:
                found.append(
                    f"{name} is off by {rms:.3g} in root mean square; {plain} {limit.plain.rms:.3g}, tiny is"
                    f" {limit.tiny.rms:.3g}"
                )
    return found


def differences(first: Quantities, second: Quantities) -> list[str]:
    """Names of what is not the same bit for bit; -0.0 is not 0.0, and NaN is NaN."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}

    def bits(x: Tensor) -> Tensor:
        return x.contiguous().view(integer[x.dtype.itemsize])

    return [name for name in first if not torch.equal(bits(first[name]), bits(second[name]))]
