"""The one table of cases, shared by the tests and by bench/: what a case is, the inputs it stands for, and the list.

for case in CASES:
    inputs = make_inputs(case, torch.bfloat16)
    o = fastattn.attention(inputs.q, inputs.k, inputs.v, **inputs.kwargs)
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "blhd", "qkv", "offset", "expanded", "repeated_keys", "columns")


@dataclass(frozen=True)
class Case:
    """One attention problem: its shape, its features and how its tensors lie in memory. Everything but the numbers.

    Shapes of bias and mask are written as the dimensions that they have, in order, out of b, h, q and k, with a 1 for
    one that is broadcast: "bhqk" is full, "1h1k" is (1, Hq, 1, Lk), "qk" is (Lq, Lk), "" is a single number.
    """

    Lq: int
    Lk: int
    D: int = 16
    Dv: int | None = None  # None: D
    B: int = 1
    Hkv: int = 2
    gqa: int = 1  # query heads per key head

    causal: str | bool = False
    window: tuple[int | None, int | None] | None = None
    scale: float | None = None
    softcap: float | None = None
    bias: str | None = None
    bias_values: str = "normal"  # normal | -inf | -1e9 | min: the last three hide a third of the keys and whole rows
    bias_float32: bool = False  # for 16-bit inputs; else it has their dtype
    mask: str | None = None
    mask_values: str = "random"  # random | rows | blocks | padding | none | all
    alibi: str | None = None  # "h" | "bh"
    sinks: bool = False
    kv_lengths: tuple[int, ...] | None = None
    dropout_p: float = 0.0

    w: str | None = None  # additive scores: "h", a row for each head, or "", one for all
    magnitude: float = 1.0  # of the elements of q and k

    layout: str = "contiguous"
    heavy: bool = False  # long sequences, for what only they reach: tests run these in few dtypes

    def __post_init__(self) -> None:
        assert self.layout in LAYOUTS
        assert self.kv_lengths is None or len(self.kv_lengths) == self.B

    @property
    def Hq(self) -> int:
        return self.Hkv * self.gqa

    @property
    def value_dim(self) -> int:
        return self.D if self.Dv is None else self.Dv

    @property
    def id(self) -> str:
        """What a reader needs, and unlike every other case's: causal-win3_all-Lq127-Lk129-D64-gqa4."""
        parts: list[str] = []
        if self.w is not None:
            parts.append(f"additive{'_h' if self.w else ''}")
        if self.causal:
            parts.append("topleft" if self.causal == "top_left" else "causal")
        if self.window is not None:
            parts.append("win" + "_".join("all" if side is None else str(side) for side in self.window))
        if self.scale is not None:
            parts.append(f"scale{self.scale:g}")
        if self.softcap is not None:
            parts.append(f"cap{self.softcap:g}")
        if self.bias is not None:
            values = "" if self.bias_values == "normal" else f"({self.bias_values})"
            parts.append(f"bias{32 if self.bias_float32 else ''}_{self.bias or 'scalar'}{values}")
        if self.mask is not None:
            values = "" if self.mask_values == "random" else f"({self.mask_values})"
            parts.append(f"mask_{self.mask or 'scalar'}{values}")
        if self.alibi is not None:
            parts.append("alibi" if self.alibi == "h" else "alibi_bh")
        if self.sinks:
            parts.append("sinks")
        if self.kv_lengths is not None:
            parts.append("lens" + "_".join(map(str, self.kv_lengths)))
        if self.dropout_p:
            parts.append(f"drop{self.dropout_p:g}")
        if self.magnitude != 1.0:
            parts.append(f"size{self.magnitude:g}")
        parts = parts or ["dense"]
        parts += [f"Lq{self.Lq}", f"Lk{self.Lk}", f"D{self.D}"]
        if self.value_dim != self.D:
            parts.append(f"Dv{self.Dv}")
        if self.B != 1:
            parts.append(f"B{self.B}")
        if self.Hkv != 2:
            parts.append(f"H{self.Hq}")
        if self.gqa != 1:
            parts.append("mqa" if self.Hkv == 1 else f"gqa{self.gqa}")
        if self.layout != "contiguous":
            parts.append(self.layout)
        return "-".join(parts)

    def sizes(self, shape: str) -> tuple[int, ...]:
        """The shape that a string such as "1h1k" stands for."""
        size = {"1": 1, "b": self.B, "h": self.Hq, "q": self.Lq, "k": self.Lk}
        return tuple(size[dim] for dim in shape)


@dataclass
class Inputs:
    """The tensors of a case; `kwargs` go to fastattn.attention as they are, or with a w to additive_attention."""

    q: Tensor
    k: Tensor
    v: Tensor
    d_o: Tensor  # upstream gradients: like o, and (B, Hq, Lq) in lse's dtype
    d_lse: Tensor
    kwargs: dict[str, Any] = field(default_factory=dict)

    def differentiable(self) -> dict[str, Tensor]:
        """What has a gradient, by name: q, k, v and, where the case has them, bias, sinks and w."""
        named = {"q": self.q, "k": self.k, "v": self.v}
        return named | {name: self.kwargs[name] for name in ("bias", "sinks", "w") if self.kwargs.get(name) is not None}

    def require_grad(self) -> Inputs:
        for x in self.differentiable().values():
            x.requires_grad_()
        return self


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_layout(x: Tensor, layout: str) -> Tensor:
    """x's numbers, (B, H, L, D), arranged in memory as the layout says; "expanded" and "repeated_keys" repeat some."""
    B, H, L, D = x.shape
    if layout == "blhd":  # heads inside rows, as projections leave them
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "qkv":  # one of three in a packed projection
        packed = torch.zeros(B, L, 3, H, D, dtype=x.dtype)
        packed[:, :, 1] = x.transpose(1, 2)
        return packed[:, :, 1].transpose(1, 2)
    if layout == "offset":  # rows wider than D, neither they nor the first element aligned to anything
        wide = torch.zeros(B, H, L + 2, D + 3, dtype=x.dtype)
        wide[:, :, 1 : L + 1, 1 : D + 1] = x
        return wide[:, :, 1 : L + 1, 1 : D + 1]
    if layout == "expanded":  # one head serves all heads and sequences, stride 0
        return x[:1, :1].contiguous().expand(B, H, L, D) if B and H else x
    if layout == "repeated_keys":  # one row serves all rows, stride 0
        return x[:, :, :1].contiguous().expand(B, H, L, D) if L else x
    if layout == "columns":  # the last dimension is not the contiguous one
        return x.mT.contiguous().mT
    return x


def _hide(shape: tuple[int, ...], rows: bool, generator: torch.Generator) -> Tensor:
    """Bool, True = hidden: a third of the entries, and with `rows` every fifth row (of the last dimension) wholly."""
    hidden = torch.rand(shape, generator=generator) < 1 / 3
    if rows and len(shape) >= 2:
        hidden[..., 1::5, :] = True
    return hidden


def _make_bias(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    shape = case.sizes(case.bias or "")
    if case.bias_float32 and dtype.itemsize == 2:
        dtype = torch.float32
    bias = torch.randn(shape, generator=generator)
    if case.bias_values != "normal":
        hidden = _hide(shape, True, generator)
        # -1e9 does not exist in float16 and becomes -inf there, as it does for whoever writes it.
        fill = torch.finfo(dtype).min if case.bias_values == "min" else float(case.bias_values)
        return bias.to(dtype).masked_fill(hidden, torch.tensor(fill).to(dtype))
    return bias.to(dtype)


def _make_mask(case: Case, generator: torch.Generator) -> Tensor:
    shape = case.sizes(case.mask or "")
    if case.mask_values in ("none", "all"):
        return torch.full(shape, case.mask_values == "all")
    if case.mask_values == "blocks":  # every other 64 x 64 tile empty, the others full
        i, j = torch.arange(shape[-2]).view(-1, 1) // 64, torch.arange(shape[-1]) // 64
        return ((i + j) % 2 == 0).expand(shape).contiguous()
    if case.mask_values == "padding":  # the last keys are hidden, more of them in each sequence
        keep = torch.ones(shape, dtype=torch.bool)
        for b in range(keep.shape[0]):
            keep[b, ..., max(0, case.Lk - 7 * (b + 1)) :] = False
        return keep
    return ~_hide(shape, case.mask_values == "rows", generator)


def make_inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """The same numbers every time, and for every dtype, up to rounding: normal variates, one stream per case."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.id.encode()) + seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    B, Hq, Hkv, Lq, Lk = case.B, case.Hq, case.Hkv, case.Lq, case.Lk
    q, k, v, d_o = (
        x.to(dtype)
        for x in (randn(B, Hq, Lq, case.D), randn(B, Hkv, Lk, case.D), randn(B, Hkv, Lk, case.value_dim),
                  randn(B, Hq, Lq, case.value_dim))
    )  # fmt: skip
    d_lse = randn(B, Hq, Lq).to(accumulator(dtype))
    if case.magnitude != 1.0:
        q, k = q * case.magnitude, k * case.magnitude

    layout = case.layout
    only_keys = layout in ("expanded", "repeated_keys")
    if layout == "expanded" and d_o.numel():
        d_o = d_o.flatten()[0].expand_as(d_o)  # what o.sum().backward() hands down
    elif not only_keys:
        d_o = in_layout(d_o, layout)
    q = q if only_keys else in_layout(q, layout)
    k = in_layout(k, layout)
    v = v if layout == "repeated_keys" else in_layout(v, layout)

    kwargs: dict[str, Any] = {}
    if case.causal:
        kwargs["causal"] = case.causal
    for name in ("window", "scale", "softcap"):
        if getattr(case, name) is not None:
            kwargs[name] = getattr(case, name)
    if case.bias is not None:
        kwargs["bias"] = _make_bias(case, dtype, generator)
    if case.mask is not None:
        kwargs["mask"] = _make_mask(case, generator)
    if case.alibi is not None:
        kwargs["alibi_slopes"] = torch.rand(case.sizes(case.alibi), generator=generator).to(accumulator(dtype))
    if case.sinks:
        kwargs["sinks"] = (2 * randn(Hq)).to(accumulator(dtype))
    if layout != "contiguous":
        for name in ("bias", "mask"):
            if name in kwargs and kwargs[name].dim() >= 2:
                kwargs[name] = kwargs[name].mT.contiguous().mT  # keys are the slow dimension
    if case.kv_lengths is not None:
        kwargs["kv_lengths"] = torch.tensor(case.kv_lengths, dtype=torch.int32)
    if case.dropout_p:
        kwargs["dropout_p"] = case.dropout_p
    if case.w is not None:
        kwargs["w"] = randn(*case.sizes(case.w), case.D).to(dtype)
        if layout != "contiguous":
            kwargs["w"] = kwargs["w"].mT.contiguous().mT if case.w else torch.stack([kwargs["w"]] * 2, 1)[:, 0]
    return Inputs(q, k, v, d_o, d_lse, kwargs)


# ---------------------------------------------------------------------------------------------------------- the list

# Around the sizes that kernels cut lengths into, T: T - 1, T, T + 1 and 3T + 5.
TILES = (16, 64, 96)
LENGTHS = (0, 1, *sorted(n for T in TILES for n in (T - 1, T, T + 1, 3 * T + 5)))
DIMS = (1, 3, 8, 17, 32, 64, 80, 96, 128, 192, 256, 300)
SHAPES = tuple(
    "".join(dim if bits >> n & 1 else "1" for n, dim in enumerate("bhqk")) for bits in range(16)
)  # all 16 of (b or 1)(h or 1)(q or 1)(k or 1)


def _lengths() -> list[Case]:
    """Every pair of lengths once, and the telling ones with every kind of interval mask."""
    kinds: list[dict[str, Any]] = [
        {},
        {"causal": "bottom_right"},
        {"causal": "top_left"},
        {"window": (20, 10)},
    ]
    cases = []
    for n, Lq in enumerate(LENGTHS):
        for m, Lk in enumerate(LENGTHS):
            kind = kinds[(n + m) % len(kinds)]
            cases.append(Case(Lq, Lk, D=(8, 16, 32, 64)[(n + 3 * m) % 4], Hkv=1 + (n + m) % 2, **kind))
    telling = (1, 16, 53, 64, 65, 97, 197)
    cases += [Case(Lq, Lk, D=24, **kind) for Lq in telling for Lk in telling for kind in kinds]
    return cases


def _dims() -> list[Case]:
    """Every head dim, alone and with another one for the values, with many rows and with few."""
    cases = []
    for n, D in enumerate(DIMS):
        Dv = DIMS[(n + 5) % len(DIMS)]
        for Lq, Lk, gqa in ((70, 131, 1), (2, 67, 1), (1, 40, 4)):
            cases += [Case(Lq, Lk, D=D, gqa=gqa), Case(Lq, Lk, D=D, gqa=gqa, Dv=Dv, causal="bottom_right")]
    return cases


def _gqa() -> list[Case]:
    cases = []
    for Hkv, gqa in ((2, 1), (2, 2), (2, 4), (1, 8), (1, 3), (3, 5)):
        for Lq, Lk in ((1, 77), (5, 77), (70, 66), (17, 130)):
            cases.append(Case(Lq, Lk, D=32, B=2, Hkv=Hkv, gqa=gqa, causal="bottom_right"))
            cases.append(Case(Lq, Lk, D=20, Dv=12, B=2, Hkv=Hkv, gqa=gqa, bias="1hqk"))
    return cases


def _windows() -> list[Case]:
    cases = []
    sides = ((0, 0), (0, None), (None, 0), (3, 5), (None, 7), (7, None), (64, 0), (100, 30), (5000, 5000), (None, None))
    for window in sides:
        for causal in (False, "top_left", "bottom_right"):
            for Lq, Lk in ((70, 131), (131, 70), (197, 197)):
                cases.append(Case(Lq, Lk, D=16, causal=causal, window=window))
    # Far from the corner: rows, and whole tiles, that see nothing.
    cases += [Case(300, 40, D=16, causal=causal, window=(5, 5)) for causal in (False, "top_left", "bottom_right")]
    cases += [Case(40, 300, D=16, causal=causal, window=(5, 5)) for causal in (False, "top_left", "bottom_right")]
    return cases


def _bias_and_mask() -> list[Case]:
    cases = []
    small: dict[str, Any] = {"Lq": 19, "Lk": 70, "D": 8, "B": 2, "gqa": 2}
    for shape in SHAPES:
        cases.append(Case(**small, bias=shape))
        cases.append(Case(**small, mask=shape))
        cases.append(Case(**small, bias=shape, mask=SHAPES[-1 - SHAPES.index(shape)], causal="bottom_right"))
    # Fewer dimensions than four.
    for shape in ("", "k", "1", "qk", "q1", "hqk", "h1k"):
        cases += [Case(**small, bias=shape), Case(**small, mask=shape)]
    # More than one tile each way, and one row.
    for shape in ("bhqk", "11qk", "1hqk", "b11k", "bh1k", "b1q1", "1h11"):
        cases.append(Case(70, 133, D=32, B=2, gqa=2, bias=shape))
        cases.append(Case(197, 67, D=32, B=2, bias=shape, causal="top_left"))
        cases.append(Case(1, 133, D=32, B=2, gqa=2, bias=shape, mask="b11k"))
        cases.append(Case(3, 50, D=32, B=2, gqa=4, bias=shape))
    for shape in ("bhqk", "11qk", "1h1k"):
        cases += [Case(50, 77, D=24, B=2, gqa=2, bias=shape, bias_float32=True, bias_values=values)
                  for values in ("normal", "min", "-1e9", "-inf")]  # fmt: skip
        cases += [Case(50, 77, D=24, B=2, gqa=2, bias=shape, bias_values=values) for values in ("min", "-1e9", "-inf")]
        cases += [Case(130, 140, D=16, B=2, bias=shape, bias_values=values, causal="bottom_right")
                  for values in ("min", "-1e9", "-inf")]  # fmt: skip
    for values in ("rows", "blocks", "padding", "none", "all"):
        for shape in ("11qk", "bhqk"):
            cases.append(Case(150, 210, D=16, B=2, gqa=2, mask=shape, mask_values=values))
            cases.append(Case(210, 150, D=16, B=2, mask=shape, mask_values=values, causal="bottom_right"))
    cases += [Case(1, 210, D=16, B=2, mask=shape, mask_values=values)
              for shape in ("b11k", "bhqk") for values in ("padding", "none")]  # fmt: skip
    return cases


def _modifiers() -> list[Case]:
    """ALiBi, softcap, sinks, lengths, scale and dropout, alone and with the masks that it may be mixed up with."""
    cases = []
    for causal in (False, "top_left", "bottom_right"):
        for Lq, Lk in ((70, 131), (131, 70), (1, 77)):
            for alibi in ("h", "bh"):
                cases.append(Case(Lq, Lk, D=16, B=2, gqa=2, causal=causal, alibi=alibi))
            cases.append(Case(Lq, Lk, D=16, B=2, causal=causal, alibi="h", kv_lengths=(Lk, Lk // 2)))
            cases.append(Case(Lq, Lk, D=16, B=2, causal=causal, sinks=True))
            cases.append(Case(Lq, Lk, D=16, B=2, gqa=2, causal=causal, kv_lengths=(Lk // 3, Lk - 1)))
            cases.append(Case(Lq, Lk, D=16, B=2, gqa=2, causal=causal, window=(9, 4), kv_lengths=(Lk // 3, Lk)))
    cases += [Case(70, 131, D=16, softcap=cap, **more)
              for cap in (0.5, 5.0, 50.0)
              for more in ({}, {"causal": "bottom_right"}, {"bias": "11qk"}, {"scale": 3.0})]  # fmt: skip
    cases += [Case(70, 131, D=64, scale=scale, causal=causal)
              for scale in (-0.3, 0.0, 1e-4, 1.0) for causal in (False, "bottom_right")]  # fmt: skip
    cases += [Case(5, 40, D=64, scale=scale) for scale in (-0.3, 0.0, 1.0)]
    cases += [Case(19, 70, D=16, B=3, kv_lengths=lengths, **more)
              for lengths in ((0, 0, 0), (70, 70, 70), (0, 1, 69), (64, 65, 16))
              for more in ({}, {"causal": "bottom_right"}, {"causal": "top_left"}, {"sinks": True},
                           {"mask": "bhqk", "mask_values": "rows"}, {"bias": "1h1k"})]  # fmt: skip
    cases += [Case(1, 70, D=16, B=3, gqa=4, kv_lengths=(0, 1, 69), sinks=sinks) for sinks in (False, True)]
    cases += [Case(40, 50, D=16, sinks=True, **more)
              for more in ({"window": (2, 2)}, {"mask": "11qk", "mask_values": "rows"},
                           {"mask": "", "mask_values": "none"},
                           {"bias": "1hqk", "bias_values": "-inf"}, {"bias": "1hqk", "bias_values": "min"},
                           {"gqa": 4}, {"softcap": 2.0})]  # fmt: skip
    for p in (0.1, 0.5, 0.9, 1.0):
        cases.append(Case(70, 131, D=16, B=2, dropout_p=p))
        cases.append(Case(131, 70, D=32, dropout_p=p, causal="bottom_right", gqa=2))
        cases.append(Case(3, 70, D=32, dropout_p=p, gqa=4, bias="11qk"))
        cases.append(Case(19, 37, D=16, dropout_p=p, sinks=True, mask="11qk", mask_values="rows", kv_lengths=(30,)))
    return cases


def _layouts() -> list[Case]:
    cases = []
    for layout in LAYOUTS[1:]:
        cases.append(Case(70, 131, D=32, B=2, gqa=2, layout=layout))
        cases.append(Case(67, 35, D=17, Dv=24, B=2, gqa=2, causal="bottom_right", layout=layout))
        cases.append(Case(1, 50, D=32, B=2, gqa=2, layout=layout))
        cases.append(Case(33, 66, D=16, B=2, bias="1hqk", mask="b1qk", sinks=True, layout=layout))
    return cases


def _combinations(count: int = 140) -> list[Case]:
    """Random mixtures of everything, the same ones every time."""
    dice = random.Random(7)

    def maybe(chance: float, value: Any, otherwise: Any = None) -> Any:
        return value if dice.random() < chance else otherwise

    def side() -> int | None:
        return dice.choice((None, 0, 3, 40))

    cases = []
    for _ in range(count):
        B, D = dice.choice((1, 2)), dice.choice((4, 16, 33, 64))
        Lq, Lk = dice.choice((1, 4, 17, 64, 90, 130)), dice.choice((1, 16, 50, 65, 128, 200))
        layouts = ("contiguous", "blhd", "offset", "columns")
        cases.append(
            Case(
                Lq,
                Lk,
                D=D,
                Dv=maybe(0.3, dice.choice((8, 48))),
                B=B,
                Hkv=dice.choice((1, 2)),
                gqa=dice.choice((1, 1, 2, 3)),
                causal=dice.choice((False, "top_left", "bottom_right")),
                window=maybe(0.3, (side(), side())),
                scale=maybe(0.2, 0.4),
                softcap=maybe(0.3, 4.0),
                bias=maybe(0.4, dice.choice(SHAPES)),
                bias_values=dice.choice(("normal", "normal", "-inf", "min")),
                bias_float32=maybe(0.3, True, False),
                mask=maybe(0.4, dice.choice(SHAPES)),
                mask_values=dice.choice(("random", "random", "rows")),
                alibi=maybe(0.3, dice.choice(("h", "bh"))),
                sinks=maybe(0.4, True, False),
                kv_lengths=maybe(0.3, tuple(dice.randint(0, Lk) for _ in range(B))),
                dropout_p=maybe(0.25, 0.3, 0.0),
                layout=dice.choice(layouts),
            )
        )
    return cases


def _many_rows() -> list[Case]:
    """Around the number of rows, 512, that the backward pass takes at a time; more keys than one chunk of it, 256."""
    return [
        Case(512, 70, D=16, Hkv=1, sinks=True),
        Case(513, 70, D=24, Hkv=1, gqa=2, causal="bottom_right", bias="1hqk"),
        Case(577, 300, D=16, Hkv=1, causal="top_left", bias="11qk"),
        Case(577, 300, D=16, Hkv=1, B=2, bias="1h1k", mask="b1qk", dropout_p=0.2),
        Case(1030, 33, D=8, Hkv=1, window=(20, 20), softcap=3.0, bias="11q1"),
        Case(530, 520, D=16, Hkv=1, B=2, kv_lengths=(520, 250), sinks=True, bias="11qk", causal="bottom_right"),
        Case(530, 520, D=16, Hkv=1, gqa=2, bias="bh11", alibi="h", window=(100, 30)),
        Case(40, 600, D=16, Hkv=2, B=2, gqa=2, bias="11q1", sinks=True, kv_lengths=(257, 0)),
    ]


def _decoding() -> list[Case]:
    """A few rows over many keys: more than a block of them, 64, and more than a part, 256; groups of every size."""
    cases = []
    for n, (Lq, gqa) in enumerate(((1, 1), (1, 2), (1, 3), (1, 5), (2, 2), (3, 4), (7, 1), (8, 8), (15, 1), (15, 4))):
        for m, Lk in enumerate((63, 64, 65, 129, 300)):
            D, causal = (8, 20, 32, 64, 128)[(n + m) % 5], (False, "bottom_right", "top_left")[(n + m) % 3]
            cases.append(Case(Lq, Lk, D=D, Hkv=1 + n % 2, gqa=gqa, causal=causal))
    cases += [Case(1, 600, D=D, Dv=Dv, Hkv=1, gqa=2) for D, Dv in ((33, 70), (72, 144), (160, 16), (4, 200))]
    # More heads in a group than an item has rows; more keys in a part than there are of the shorter sequences.
    cases += [Case(1, 90, D=16, Hkv=1, gqa=130), Case(5, 90, D=16, Hkv=1, gqa=33, causal="bottom_right")]
    cases.append(Case(3, 1100, D=16, B=3, gqa=2, kv_lengths=(1100, 5, 520), causal="bottom_right", sinks=True))
    every: dict[str, Any] = {"bias": "bhqk", "mask": "b1qk", "alibi": "bh", "sinks": True, "softcap": 4.0}
    for Lq in (1, 4):
        for more in (
            {"window": (100, 0)},
            {"mask": "11qk", "mask_values": "rows"},
            {"mask": "b11k"},
            {"bias": "1h1k"},
            {"bias": "bhqk", "bias_values": "min"},
            {"bias": "11q1", "bias_float32": True},
            {"scale": -0.4},
            {"scale": 0.0},
            {"softcap": 2.0},
            {"alibi": "h", "causal": "top_left"},
            {"sinks": True},
            every,
        ):
            cases.append(Case(Lq, 531, D=32, B=2, Hkv=1, gqa=3, kv_lengths=(531, 300), **more))
        cases += [Case(Lq, 270, D=24, B=2, gqa=2, layout=layout, bias="1hqk", mask="b1qk") for layout in LAYOUTS[1:]]
    # Enough rows for tiles, and so few heads that the keys are cut.
    cases += [Case(16, 900, D=16, Hkv=1, **every), Case(33, 800, D=24, B=2, kv_lengths=(800, 0), dropout_p=0.2),
              Case(64, 530, D=16, gqa=2, causal="bottom_right", sinks=True)]  # fmt: skip
    return cases


def _long() -> list[Case]:
    """Long enough for one head to be cut into chunks of keys, and for tiles to be skipped far from the diagonal."""
    long: dict[str, Any] = {"Hkv": 1, "heavy": True}
    return [
        Case(1100, 1100, D=64, **long),
        Case(1100, 1100, D=64, causal="bottom_right", **long),
        Case(1, 4100, D=64, gqa=4, **long),
        Case(5, 3000, D=32, gqa=2, causal="bottom_right", **long),
        Case(700, 2100, D=16, window=(300, 0), sinks=True, **long),
        Case(2100, 300, D=16, gqa=2, bias="1h1k", **long),
        Case(900, 1300, D=16, B=2, bias="11qk", mask="11qk", mask_values="blocks", dropout_p=0.2, **long),
        Case(1300, 900, D=16, B=2, alibi="h", causal="top_left", kv_lengths=(900, 411), **long),
    ]


def _unique(cases: list[Case]) -> list[Case]:
    return list({case.id: case for case in cases}.values())


CASES: list[Case] = _unique(
    _lengths()
    + _dims()
    + _gqa()
    + _windows()
    + _bias_and_mask()
    + _modifiers()
    + _layouts()
    + _combinations()
    + _many_rows()
    + _decoding()
    + _long()
)


def _additive() -> list[Case]:
    """Additive scores: with every mask that they can have, tiles straddled both ways, and numbers that overflow exp."""
    cases = []
    lengths = (1, 15, 16, 17, 64, 65, 97)
    kinds = (False, "top_left", "bottom_right")
    for n, Lq in enumerate(lengths):
        for m, Lk in enumerate(lengths):
            D = (5, 16, 32)[(n + 2 * m) % 3]
            cases.append(Case(Lq, Lk, D=D, Hkv=1 + m % 2, causal=kinds[(n + m) % 3], w="h" if (n + m) % 2 else ""))
    for n, D in enumerate(DIMS):
        cases.append(Case(35, 53, D=D, Dv=DIMS[(n + 5) % len(DIMS)], w="h"))
        cases.append(Case(1, 40, D=D, gqa=3, w=""))
    small: dict[str, Any] = {"Lq": 19, "Lk": 70, "D": 8, "B": 2, "gqa": 2, "w": "h"}
    cases += [Case(**small, mask=shape) for shape in ("bhqk", "11qk", "b11k", "1hq1", "k", "")]
    cases += [Case(70, 131, D=16, B=2, mask=shape, mask_values=values, causal=causal, w="h")
              for shape, values, causal in (("11qk", "rows", False), ("bhqk", "blocks", "bottom_right"),
                                            ("b11k", "padding", False), ("11qk", "none", "top_left"))]  # fmt: skip
    cases += [Case(19, 70, D=16, B=3, kv_lengths=n, causal=causal, w="")
              for n in ((0, 1, 69), (64, 65, 16)) for causal in kinds]  # fmt: skip
    cases += [Case(70, 131, D=16, B=2, dropout_p=p, gqa=2, w="h") for p in (0.1, 0.9, 1.0)]
    cases.append(Case(3, 70, D=32, dropout_p=0.5, causal="bottom_right", kv_lengths=(60,), w=""))
    cases += [Case(35, 66, D=16, Dv=24, B=2, gqa=2, mask="b1qk", layout=layout, w=w)
              for layout in LAYOUTS[1:] for w in ("", "h")]  # fmt: skip
    # tanh is 1 from 9.5 on in float32, exp(2 x) is infinite from 44 on.
    cases += [Case(Lq, 53, D=24, magnitude=size, causal="top_left", w="h")
              for size in (1e-3, 0.1, 5.0, 15.0, 40.0, 200.0) for Lq in (1, 35)]  # fmt: skip
    # The backward pass takes 512 rows at a time, and keys in chunks.
    cases += [Case(530, 70, D=8, Hkv=1, w=""), Case(40, 530, D=8, Hkv=1, B=2, kv_lengths=(520, 250), w="h")]
    return cases


ADDITIVE_CASES: list[Case] = _unique(_additive())


def find(case_id: str) -> Case:
    """The case with this id."""
    return next(case for case in CASES if case.id == case_id)


# ------------------------------------------------------------------------------------------------- what bench/ times


def bench_case(L: int, D: int = 64, *, H: int = 8, **features: Any) -> Case:
    return replace(Case(L, L, D=D, Hkv=H), **features)


BENCH_CASES: list[Case] = [
    bench_case(2048, 64),
    bench_case(2048, 128),
    bench_case(2048, 64, causal="top_left"),
    bench_case(512, 64, causal="top_left"),
    bench_case(197, 64, H=12, B=8),
    bench_case(8192, 64),
    bench_case(8192, 64, causal="bottom_right", window=(256, 0)),
    bench_case(2048, 64, mask="11qk", mask_values="blocks"),
    bench_case(2048, 64, bias="1hqk"),
    bench_case(2048, 128, H=4, gqa=8, causal="top_left"),
    bench_case(4096, 64, H=1),
    Case(1, 4096, D=128, Hkv=8, gqa=4),
]
