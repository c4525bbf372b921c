"""Problems of additive attention for tests of the CUDA kernels, on the emulator and on a GPU: inputs, and the bound.

The bound is that of tests/compare.py, for o, lse and the gradients of q, k, v and w:

    max |fast - exact|  <=  2 * max |plain - exact| + tiny             and the same in root mean square

exact: fastattn.reference.additive_attention in float64; plain: the same in the inputs' own dtype.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fastattn
from fastattn import reference

from .cases import accumulator, in_layout

Quantities = dict[str, Tensor]  # "o", "lse", "dq", "dk", "dv", "dw"


@dataclass(frozen=True)
class AdditiveCase:
    """One problem: everything but the numbers."""

    Lq: int
    Lk: int
    D: int = 16
    Dv: int | None = None  # None: D
    B: int = 1
    Hkv: int = 1
    gqa: int = 1  # query heads per key head
    shared_w: bool = False  # (D,), else (Hq, D)

    causal: str | bool = False
    kv_lengths: tuple[int, ...] | None = None
    mask: str | None = None  # "random" | "rows": some of them wholly hidden
    dropout_p: float = 0.0

    q_size: float = 1.0  # standard deviations
    k_size: float = 1.0
    spikes: bool = False  # a few numbers of +-60 on both sides, at one column
    layout: str = "contiguous"

    @property
    def Hq(self) -> int:
        return self.Hkv * self.gqa

    @property
    def value_dim(self) -> int:
        return self.D if self.Dv is None else self.Dv

    @property
    def id(self) -> str:
        parts = [f"{self.causal}"] if self.causal else []
        parts += [f"lens{'_'.join(map(str, self.kv_lengths))}"] if self.kv_lengths else []
        parts += [f"mask_{self.mask}"] if self.mask else []
        parts += [f"drop{self.dropout_p:g}"] if self.dropout_p else []
        parts += [f"sizes{self.q_size:g}_{self.k_size:g}"] if (self.q_size, self.k_size) != (1, 1) else []
        parts += ["spikes"] if self.spikes else []
        parts += [f"Lq{self.Lq}", f"Lk{self.Lk}", f"D{self.D}"]
        parts += [f"Dv{self.Dv}"] if self.Dv is not None else []
        parts += [f"B{self.B}"] if self.B != 1 else []
        parts += [f"H{self.Hq}"] if self.Hq != 1 else []
        parts += [f"gqa{self.gqa}"] if self.gqa != 1 else []
        parts += ["shared"] if self.shared_w else []
        parts += [self.layout] if self.layout != "contiguous" else []
        return "-".join(parts)


@dataclass
class AdditiveInputs:
    """The tensors of a case; `kwargs` go to fastattn.additive_attention as they are."""

    q: Tensor
    k: Tensor
    v: Tensor
    w: Tensor
    d_o: Tensor
    d_lse: Tensor
    kwargs: dict[str, Any] = field(default_factory=dict)

    def differentiable(self) -> dict[str, Tensor]:
        return {"q": self.q, "k": self.k, "v": self.v, "w": self.w}

    def moved(self, move: Callable[[Tensor], Tensor]) -> AdditiveInputs:
        """With every tensor, once detached, replaced by what `move` makes of it."""
        tensors = (move(x.detach()) for x in (self.q, self.k, self.v, self.w, self.d_o, self.d_lse))
        kwargs = {name: move(x) if isinstance(x, Tensor) else x for name, x in self.kwargs.items()}
        return AdditiveInputs(*tensors, kwargs=kwargs)


def make_additive_inputs(case: AdditiveCase, dtype: torch.dtype) -> AdditiveInputs:
    """The same numbers every time. Keys beyond kv_lengths are NaN."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.id.encode()))

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    B, Hq, Hkv, Lq, Lk, D, Dv = case.B, case.Hq, case.Hkv, case.Lq, case.Lk, case.D, case.value_dim
    q, k = case.q_size * randn(B, Hq, Lq, D), case.k_size * randn(B, Hkv, Lk, D)
    if case.spikes:
        q[:, :, ::5, -1], k[:, :, ::3, -1], k[:, :, 1::3, -1] = 60.0, -60.0, 60.0
    v, d_o, d_lse = randn(B, Hkv, Lk, Dv), randn(B, Hq, Lq, Dv), randn(B, Hq, Lq)
    w = 4 / D**0.5 * (randn(D) if case.shared_w else randn(Hq, D))
    kwargs: dict[str, Any] = {}
    if case.causal:
        kwargs["causal"] = case.causal
    if case.kv_lengths is not None:
        kwargs["kv_lengths"] = torch.tensor(case.kv_lengths, dtype=torch.int32)
        for b, length in enumerate(case.kv_lengths):
            k[b, :, length:] = math.nan
            v[b, :, length:] = math.nan
    if case.mask is not None:
        mask = torch.rand(B, 1, Lq, Lk, generator=generator) < 2 / 3
        if case.mask == "rows":
            mask[..., 1::5, :] = False
        kwargs["mask"] = mask
    if case.dropout_p:
        kwargs["dropout_p"] = case.dropout_p
    q, k, v, d_o = (in_layout(x.to(dtype), case.layout) for x in (q, k, v, d_o))
    return AdditiveInputs(q, k, v, w.to(dtype), d_o, d_lse.to(accumulator(dtype)), kwargs)


def additive_gradients(o: Tensor, lse: Tensor, inputs: AdditiveInputs) -> Quantities:
    named = inputs.differentiable()
    grads = torch.autograd.grad([o, lse], list(named.values()), [inputs.d_o.to(o.dtype), inputs.d_lse.to(lse.dtype)])
    return {"o": o.detach(), "lse": lse.detach()} | {f"d{name}": x for name, x in zip(named, grads, strict=True)}


def compute_additive(inputs: AdditiveInputs, seed: int = 0) -> Quantities:
    """By fastattn, on the device where the inputs are."""
    torch.manual_seed(seed)
    for x in inputs.differentiable().values():
        x.requires_grad_()
    o, lse = fastattn.additive_attention(inputs.q, inputs.k, inputs.v, inputs.w, return_lse=True, **inputs.kwargs)
    return additive_gradients(o, lse, inputs)


def _by_reference(inputs: AdditiveInputs, dtype: torch.dtype, keep: Tensor | None) -> Quantities:
    copies = [x.detach().to(dtype).contiguous().requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.w)]
    copy = AdditiveInputs(*copies, inputs.d_o, inputs.d_lse, inputs.kwargs)
    o, lse = reference.additive_attention(*copies, return_lse=True, dropout_keep=keep, **inputs.kwargs)
    return additive_gradients(o, lse, copy)


@dataclass(frozen=True, eq=False)
class AdditiveExpected:
    exact: Quantities
    plain: Quantities
    # How much larger than its result the terms of a quantity's sums are, and what comes to that where the result is 0.
    spread: float
    least: dict[str, float]
    # What the rounding of o brings into a quantity by way of delta = do . o, in the units of o's dtype.
    through_o: dict[str, float]
    dtype: torch.dtype


def expected_by_reference(inputs: AdditiveInputs, keep: Tensor | None) -> AdditiveExpected:
    """keep: what dropout leaves, (B, Hq, Lq, Lk).

    A score is a sum of D terms w u, each off by about a unit of w, whose partial sums grow like a random walk; the
    weights, and all that follows from them, are off by as much in relation to their size. The tanh itself is off by a
    unit of 1, however small it is, and dw is a sum of dS tanh over all rows.
    """
    exact = _by_reference(inputs, torch.float64, keep)
    w, dq = inputs.w.double(), exact["dq"]
    spread = w.square().sum(-1).mean().item() ** 0.5 * (2 + w.shape[-1] / 2) ** 0.5
    ds = dq.norm().item() / max(dq.shape[-1], 1) ** 0.5 / w.square().mean().item() ** 0.5
    # Each row's delta is off by a root of squares, independently of the others; dw adds up the rows.
    through_o = (inputs.d_o.double() * exact["o"]).norm().item()
    dtype = inputs.q.dtype
    plain = _by_reference(inputs, dtype, keep)
    return AdditiveExpected(exact, plain, spread, {"lse": spread, "dw": ds}, {"dw": through_o}, dtype)


# As in compare.py.
DEVIATIONS_OF_LARGEST, DEVIATIONS_OF_RMS, DEVIATIONS_OF_O = 4 / 3**0.5, 1.5 / 3**0.5, 2 / 3**0.5


def additive_violations(fast: Quantities, wanted: AdditiveExpected) -> list[str]:
    """Every quantity that breaks the bound; empty if all is well."""
    found = []
    assert fast.keys() == wanted.exact.keys()
    for name, exact in wanted.exact.items():
        got, plain = fast[name].double(), wanted.plain[name].double()
        if got.shape != exact.shape:
            found.append(f"{name} has shape {tuple(got.shape)}, not {tuple(exact.shape)}")
            continue
        if not exact.numel():
            continue
        if not torch.equal(got == -math.inf, exact == -math.inf):
            found.append(f"{name} is not -inf where it should be, and only there")
        same = got == exact  # where both are -inf
        off = (got - exact).masked_fill(same, 0).abs().nan_to_num(nan=math.inf, posinf=math.inf)
        # Where plain float16 code overflows, its error is infinite, and no excuse.
        of_plain = (plain - exact).masked_fill(same, 0).abs().nan_to_num(nan=0.0, posinf=0.0)
        size = exact.masked_fill(exact.isinf(), 0).abs()
        # One rounding of the result as it is stored, and those in float32.
        unit, unit_sum = torch.finfo(fast[name].dtype).eps / 2, torch.finfo(torch.float32).eps / 2
        for what, measure, deviations in (
            ("", lambda x: x.max().item(), DEVIATIONS_OF_LARGEST),
            (" in root mean square", lambda x: x.square().mean().item() ** 0.5, DEVIATIONS_OF_RMS),
        ):
            sums = measure(size) * (1 + wanted.spread) + wanted.least.get(name, 0.0)
            unit_o = torch.finfo(wanted.dtype).eps / 2
            tiny = unit * measure(size) + deviations * unit_sum * sums
            tiny += DEVIATIONS_OF_O * unit_o * wanted.through_o.get(name, 0.0)
            if not measure(off) <= 2 * measure(of_plain) + tiny:
                of = f"{measure(off):.3g}{what}, plain code by {measure(of_plain):.3g}"
                found.append(f"{name} is off by {of}; tiny is {tiny:.3g}")
    return found


# What the kernels' tiles of 32 and 64 rows and steps of 64 columns meet: lengths around them, one query and two, rows
# that start anywhere, numbers near and far on either side, and every way to hide a key.
ADDITIVE_CASES = [
    AdditiveCase(1, 1, D=1),
    AdditiveCase(1, 50, D=64, B=3),
    AdditiveCase(2, 131, D=24, Hkv=2, causal="bottom_right"),
    AdditiveCase(3, 65, D=3, Dv=5, B=2),
    AdditiveCase(31, 63, D=17, Dv=24, layout="offset"),
    AdditiveCase(32, 64, D=64),
    AdditiveCase(33, 65, D=65, Dv=33, Hkv=2),
    AdditiveCase(70, 140, D=8, Dv=72, B=2, gqa=2, causal="top_left"),
    AdditiveCase(101, 77, D=40, causal="bottom_right"),
    AdditiveCase(40, 90, D=32, Hkv=2, gqa=3, shared_w=True, layout="blhd"),
    AdditiveCase(35, 200, D=130, Dv=7),
    AdditiveCase(5, 70, D=256, Dv=256),
    AdditiveCase(40, 130, D=20, B=3, kv_lengths=(130, 64, 0), causal="bottom_right"),
    AdditiveCase(2, 130, D=20, B=3, kv_lengths=(1, 129, 65), gqa=2),
    AdditiveCase(70, 131, D=16, B=2, mask="random", kv_lengths=(100, 31), dropout_p=0.2),
    AdditiveCase(50, 70, D=28, B=2, mask="rows", shared_w=True),
    AdditiveCase(66, 40, D=16, Hkv=2, gqa=2, dropout_p=0.4, causal="top_left"),
    AdditiveCase(20, 40, D=16, dropout_p=1.0),
    AdditiveCase(40, 70, D=32, q_size=200.0, k_size=200.0),
    AdditiveCase(40, 70, D=32, q_size=200.0),
    AdditiveCase(40, 70, D=32, k_size=30.0),
    AdditiveCase(2, 70, D=72, q_size=6.0, k_size=6.0),
    AdditiveCase(40, 70, D=70, spikes=True, gqa=2),
    AdditiveCase(40, 70, D=32, q_size=0.02, k_size=0.02),
    AdditiveCase(1, 2, D=3, B=530),  # so many parts of dw that they are summed in two levels
    AdditiveCase(33, 9, D=3, B=20, Hkv=2),
    AdditiveCase(0, 5),
    AdditiveCase(5, 0),
]


def first_of_each_kind() -> list[AdditiveCase]:
    """Few of them, which together reach every branch of the kernels."""
    return [
        AdditiveCase(70, 140, D=72, Dv=68, gqa=2, causal="bottom_right", dropout_p=0.3),
        AdditiveCase(2, 200, D=24, B=2, kv_lengths=(200, 70)),
        AdditiveCase(40, 70, D=70, spikes=True, mask="random"),
    ]
