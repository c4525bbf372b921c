"""Calls of attention_with_kv_cache that its tests share: what they are made of, and what must come of them."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastattn
from fastattn import reference

from .cases import Inputs, accumulator
from .compare import Expected, Quantities, rounding_terms

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class CacheCase:
    """One call: the sequences' lengths before it, what is appended, and how the cache lies in memory."""

    lengths: tuple[int, ...]
    Lnew: int
    Lq: int | None = None  # None: Lnew, or 1 where nothing is appended
    page_size: int | None = None
    D: int = 16
    Dv: int | None = None  # None: D
    Hkv: int = 2
    gqa: int = 2
    room: int = 3  # rows that the longest sequence leaves free at the end
    int8: bool = False
    rotary_dim: int = 0
    interleaved: bool = False
    float32_angles: bool = False
    heads_inside: bool = False  # (B, L, H, D) in memory, as flash_attn has caches
    one_allocation: bool = False  # keys and values are the halves of one tensor
    causal: bool = True
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    scale: float | None = None
    alibi: bool = False
    sinks: bool = False

    @property
    def B(self) -> int:
        return len(self.lengths)

    @property
    def Hq(self) -> int:
        return self.Hkv * self.gqa

    @property
    def value_dim(self) -> int:
        return self.D if self.Dv is None else self.Dv

    @property
    def rows(self) -> int:
        return self.Lq if self.Lq is not None else self.Lnew or 1

    @property
    def id(self) -> str:
        parts = [f"lens{'_'.join(map(str, self.lengths))}", f"new{self.Lnew}"]
        if self.Lq is not None:
            parts.append(f"Lq{self.Lq}")
        if self.page_size is not None:
            parts.append(f"page{self.page_size}")
        parts.append(f"D{self.D}")
        if self.value_dim != self.D:
            parts.append(f"Dv{self.Dv}")
        if (self.Hkv, self.gqa) != (2, 2):
            parts.append(f"H{self.Hq}_{self.Hkv}")
        if self.rotary_dim:
            parts.append(f"rope{self.rotary_dim}{'i' if self.interleaved else ''}{'f' if self.float32_angles else ''}")
        names = {"int8": "int8", "heads_inside": "blhd", "one_allocation": "halves", "alibi": "alibi", "sinks": "sinks"}
        parts += [text for name, text in names.items() if getattr(self, name)]
        if not self.causal:
            parts.append("all")
        if self.window is not None:
            parts.append("win" + "_".join("all" if side is None else str(side) for side in self.window))
        if self.softcap is not None:
            parts.append(f"cap{self.softcap:g}")
        if self.scale is not None:
            parts.append(f"scale{self.scale:g}")
        return "-".join(parts)


class Call:
    """The tensors of a case, poisoned wherever nothing may be read, and what stands for them in a padded batch."""

    def __init__(self, case: CacheCase, dtype: torch.dtype) -> None:
        self.case, self.dtype = case, dtype
        self.generator = torch.Generator().manual_seed(zlib.crc32(case.id.encode()))
        B, Hkv, D, Dv, Lnew = case.B, case.Hkv, case.D, case.value_dim, case.Lnew
        self.q = self.randn(B, case.Hq, case.rows, D)
        self.k = self.randn(B, Hkv, Lnew, D) if Lnew else None
        self.v = self.randn(B, Hkv, Lnew, Dv) if Lnew else None
        self.lengths = torch.tensor(case.lengths, dtype=torch.int32)
        longest = max(case.lengths, default=0) + Lnew + case.room
        size = case.page_size or longest
        per_sequence = -(-longest // size)
        # Pages in no order; two that nobody uses.
        pages = B * per_sequence + 2 if case.page_size else B
        order = torch.randperm(pages, generator=self.generator).to(torch.int32)
        self.table = order[: B * per_sequence].view(B, per_sequence).clone() if case.page_size else None
        self.size, self.pages = size, pages
        self.k_cache, self.v_cache = self._caches()
        self.k_scale = self.v_scale = None
        if case.int8:
            self.k_scale, self.v_scale = (torch.full((pages, Hkv, size), math.nan) for _ in range(2))
        for b, n in enumerate(case.lengths):
            at = self.places(b, 0, n)
            for cache, scale in ((self.k_cache, self.k_scale), (self.v_cache, self.v_scale)):
                if scale is None:
                    cache[at] = self.randn(n, Hkv, cache.shape[-1])
                else:
                    numbers = torch.randint(-127, 128, (n, Hkv, cache.shape[-1]), generator=self.generator)
                    cache[at] = numbers.to(torch.int8)
                    scale[at] = 0.01 + 0.02 * torch.rand(n, Hkv, generator=self.generator)
            if self.table is not None:  # entries beyond the keys are never looked at
                self.table[b, -(-(n + Lnew) // size) :] = 1 << 30
        self.options: dict[str, Any] = {"causal": case.causal}
        for name in ("window", "softcap", "scale"):
            if getattr(case, name) is not None:
                self.options[name] = getattr(case, name)
        if case.alibi:
            self.options["alibi_slopes"] = torch.rand(case.Hq, generator=self.generator).to(accumulator(dtype))
        if case.sinks:
            self.options["sinks"] = torch.randn(case.Hq, generator=self.generator).to(accumulator(dtype))
        self.angles: dict[str, Any] = {}
        if case.rotary_dim:
            turns = torch.rand(longest, case.rotary_dim // 2, generator=self.generator) * 6.3
            kind = torch.float32 if case.float32_angles else dtype
            self.angles = {"rotary_cos": turns.cos().to(kind), "rotary_sin": turns.sin().to(kind)}

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def _caches(self) -> tuple[Tensor, Tensor]:
        case, stored = self.case, torch.int8 if self.case.int8 else self.dtype
        fill: Any = 77 if case.int8 else math.nan
        if case.one_allocation:
            assert case.value_dim == case.D
            both = torch.full((self.pages, 2, case.Hkv, self.size, case.D), fill, dtype=stored)
            return both[:, 0], both[:, 1]
        caches = []
        for D in (case.D, case.value_dim):
            inner = (self.size, case.Hkv) if case.heads_inside else (case.Hkv, self.size)
            cache = torch.full((self.pages, *inner, D), fill, dtype=stored)
            caches.append(cache.transpose(1, 2) if case.heads_inside else cache)
        return caches[0], caches[1]

    def places(self, b: int, first: int, end: int) -> tuple[Any, ...]:
        """Where the keys [first, end) of sequence b lie: an index of the caches that gives (keys, Hkv, ...)."""
        keys = torch.arange(first, end)
        if self.table is None:
            return torch.full_like(keys, b), slice(None), keys
        return self.table[b].long()[keys // self.size], slice(None), keys % self.size

    def memory(self) -> list[Tensor]:
        return [x for x in (self.k_cache, self.v_cache, self.k_scale, self.v_scale) if x is not None]

    def arguments(self) -> dict[str, Any]:
        named = {"q": self.q, "k_cache": self.k_cache, "v_cache": self.v_cache, "k": self.k, "v": self.v}
        named |= {"cache_lengths": self.lengths, "block_table": self.table}
        named |= {"k_scale": self.k_scale, "v_scale": self.v_scale, "rotary_interleaved": self.case.interleaved}
        return named | self.angles | self.options

    def run(self) -> Quantities:
        o, lse = fastattn.attention_with_kv_cache(**self.arguments(), return_lse=True)
        return {"o": o, "lse": lse}

    def stored(self) -> tuple[Tensor, Tensor]:
        """(B, Hkv, longest, D) and Dv, in double: what the cache holds now, 0 beyond the lengths after the append."""
        n = max(self.case.lengths, default=0) + self.case.Lnew
        found = []
        for cache, scale in ((self.k_cache, self.k_scale), (self.v_cache, self.v_scale)):
            dense = torch.zeros(self.case.B, self.case.Hkv, n, cache.shape[-1], dtype=torch.float64)
            for b, before in enumerate(self.case.lengths):
                at = self.places(b, 0, before + self.case.Lnew)
                x = cache[at].double() if scale is None else cache[at].double() * scale[at].double().unsqueeze(-1)
                dense[b, :, : before + self.case.Lnew] = x.transpose(0, 1)
            found.append(dense)
        return found[0], found[1]

    def with_new(self, before: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """q and the padded keys and values after the append, by plain operations in this dtype."""
        q = self.q.to(dtype, copy=True)
        keys, values = (x.to(dtype) for x in before)
        if self.k is None or self.v is None:
            return q, keys, values
        k, v = self.k.to(dtype), self.v.to(dtype)
        for b, n in enumerate(self.case.lengths):
            to = slice(n, n + self.case.Lnew)
            keys[b, :, to] = self.rotated(k[b], n)
            values[b, :, to] = v[b]
            if self.angles:
                q[b] = self.rotated(q[b], n + self.case.Lnew - self.case.rows)
        return q, keys, values

    def rotated(self, x: Tensor, first: int) -> Tensor:
        """Rows (H, L, D) from position `first` on, in x's dtype."""
        R = self.case.rotary_dim
        if not R:
            return x
        cos, sin = (self.angles[name][first : first + x.shape[1]].to(x.dtype) for name in ("rotary_cos", "rotary_sin"))
        a, b = (x[..., :R:2], x[..., 1:R:2]) if self.case.interleaved else (x[..., : R // 2], x[..., R // 2 : R])
        pair = (a * cos - b * sin, b * cos + a * sin)
        turned = torch.stack(pair, -1).flatten(-2) if self.case.interleaved else torch.cat(pair, -1)
        return torch.cat((turned, x[..., R:]), -1)

    def expected(self, before: tuple[Tensor, Tensor]) -> Expected:
        """o and lse, exactly and in plain code of the dtype.

        `before` is stored() from before the call; of an int8 cache, from after it: what is appended has been rounded
        to 8 bits by then.
        """
        lengths = self.lengths + self.case.Lnew
        if self.case.int8:

            def padded(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
                keys, values = before
                q = self.with_new((keys.clone(), values.clone()), dtype)[0]
                return q, keys.to(dtype), values.to(dtype)

        else:

            def padded(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
                return self.with_new((before[0].clone(), before[1].clone()), dtype)

        def results(dtype: torch.dtype) -> Quantities:
            floats = {
                name: x.to(torch.float64 if dtype == torch.float64 else accumulator(dtype))
                if isinstance(x, Tensor)
                else x
                for name, x in self.options.items()
            }
            o, lse = reference.attention(*padded(dtype), kv_lengths=lengths, return_lse=True, **floats)
            return {"o": o, "lse": lse}

        exact = results(torch.float64)
        baseline = exact if self.dtype == torch.float64 else results(self.dtype)
        q, keys, values = padded(torch.float64)
        d_o, d_lse = torch.zeros_like(exact["o"]), torch.zeros_like(exact["lse"])
        terms = rounding_terms(Inputs(q, keys, values, d_o, d_lse, {**self.options, "kv_lengths": lengths}), None)
        return Expected(exact, baseline, {name: terms[name] for name in exact}, self.dtype)


def bits(x: Tensor) -> Tensor:
    """As whole numbers, so that NaN equals itself."""
    return x.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize])
