"""Decoding: a few new queries over a long cache, against the rate at which the machine reads memory.

K and V are read once and hardly computed on, so memory's bandwidth is the limit. What that is differs from one second
to the next where others use the same memory: so one of those who take turns does nothing but read the bytes of the
same caches. All rotate among so many caches that no cache of the processor's holds them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from bench.cases import DTYPES
from bench.measure import ULPS, WrongResult
from bench.report import format_ms, format_ratio, text_table, timing_as_dict
from bench.timing import Runner, Timing, interleave
from fastattn import _memory

OURS, SDPA, CONTIGUOUS, READ = "fastattn", "SDPA", "contiguous", "read"
MOST_CACHES = 64  # of small ones, whose time is not for reading
ROTATED_BYTES = 256 << 20


@dataclass(frozen=True)
class Step:
    """One call of B sequences that have Lk keys each (`ragged`: Lk / 8 to Lk) and Lq new queries."""

    dtype: str  # of the queries, and of the cache unless that is int8
    cache: str = CONTIGUOUS  # | "paged" | "int8"
    B: int = 1
    Hq: int = 32
    Hkv: int = 8
    Lq: int = 1
    Lk: int = 4096
    D: int = 128
    page_size: int = 16
    ragged: bool = False

    @property
    def id(self) -> str:
        cache = f"paged{self.page_size}" if self.cache == "paged" else self.cache
        length = f"{self.Lk}{'-ragged' if self.ragged else ''}"
        return f"{self.dtype}-{cache}-B{self.B}-H{self.Hq}/{self.Hkv}-Lq{self.Lq}-Lk{length}-D{self.D}"

    def lengths(self) -> list[int]:
        if not self.ragged:
            return [self.Lk] * self.B
        return torch.linspace(self.Lk // 8, self.Lk, self.B).round().int().tolist()

    @property
    def read_bytes(self) -> int:
        """Of the keys and values that exist, and their scales."""
        row = 2 * self.D * (1 if self.cache == "int8" else DTYPES[self.dtype].itemsize)
        return sum(self.lengths()) * self.Hkv * (row + (8 if self.cache == "int8" else 0))


@dataclass
class Result:
    step: Step
    timings: dict[str, Timing]
    stored_bytes: int  # of a cache, all of which READ reads

    @property
    def gbs(self) -> float:
        return self.step.read_bytes / self.timings[OURS].median_ms * 1e-6

    @property
    def bandwidth_gbs(self) -> float:
        return self.stored_bytes / self.timings[READ].median_ms * 1e-6

    @property
    def of_bandwidth(self) -> float:
        return self.gbs / self.bandwidth_gbs

    def times(self, name: str) -> float | None:
        """How many times faster than the other."""
        return self.timings[name].median_ms / self.timings[OURS].median_ms if name in self.timings else None


def _as_kvcache_does(x: Tensor) -> Tensor:
    """A copy in memory such as fastattn.KVCache takes."""
    return _memory.empty(x.shape, x.dtype, x.device).copy_(x)


def _paged(kv: tuple[Tensor, Tensor], page_size: int, order: Tensor) -> Tensor:
    """(B, H, L, D) twice as (pages, H, 2, page_size, D), page n of the sequences in turn at place order[n]."""
    B, H, L, D = kv[0].shape
    pages = torch.stack([x.view(B, H, L // page_size, page_size, D) for x in kv], dim=3)
    pages = pages.transpose(1, 2).flatten(0, 1)
    return _as_kvcache_does(pages).index_copy_(0, order, pages)


def _quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.float().abs().amax(-1) / 127
    return (x.float() / scale.unsqueeze(-1)).round().to(torch.int8), scale


class Caches:
    """The tensors of a step, so many of them that none is in a cache when its turn comes.

    A cache beside which a contiguous one is timed lies in the same kind of memory as that.
    """

    def __init__(self, step: Step) -> None:
        generator = torch.Generator().manual_seed(0)
        dtype, shape = DTYPES[step.dtype], (step.B, step.Hkv, step.Lk, step.D)
        self.step = step
        self.q = torch.randn(step.B, step.Hq, step.Lq, step.D, generator=generator).to(dtype)
        self.lengths = torch.tensor(step.lengths(), dtype=torch.int32)
        count = max(2, math.ceil(ROTATED_BYTES / step.read_bytes))
        k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        copy = torch.clone if step.cache == CONTIGUOUS else _as_kvcache_does
        self.plain = [(copy(k), copy(v)) for _ in range(min(count, MOST_CACHES))]
        self.mask = self._mask()
        self.options: list[dict[str, Any]] = [{} for _ in self.plain]
        self.stored = self.plain
        self.memory: list[Any] | None = None  # two tensors that hold a cache's bytes, where `stored` are views of them
        if step.cache == "paged":
            order = torch.randperm(step.B * step.Lk // step.page_size, generator=generator)
            table = {"block_table": order.view(step.B, -1).to(torch.int32)}
            pages = [_paged(kv, step.page_size, order) for kv in self.plain]
            self.stored = [(x[:, :, 0], x[:, :, 1]) for x in pages]
            self.memory = [x.view(2, -1) for x in pages]  # its halves, whatever they hold
            self.options = [table for _ in self.plain]
        elif step.cache == "int8":
            rows = [(_quantised(k), _quantised(v)) for k, v in self.plain]
            self.stored = [(_as_kvcache_does(k[0]), _as_kvcache_does(v[0])) for k, v in rows]
            self.options = [{"k_scale": k[1], "v_scale": v[1]} for k, v in rows]

    def ours(self, n: int) -> Tensor:
        if self.step.cache == CONTIGUOUS:
            lengths = self.lengths if self.step.ragged else None
            return fastattn.attention(self.q, *self.plain[n], causal=True, kv_lengths=lengths)
        return fastattn.attention_with_kv_cache(
            self.q, *self.stored[n], cache_lengths=self.lengths, causal=True, **self.options[n]
        )

    def read(self, n: int) -> Any:
        return torch.ops.fastattn._sum_words(*(self.memory or self.stored)[n])

    def contiguous(self, n: int) -> Tensor:
        return fastattn.attention(self.q, *self.plain[n], causal=True)

    def sdpa(self, n: int) -> Tensor:
        k, v = self.plain[n]
        return F.scaled_dot_product_attention(self.q, k, v, attn_mask=self.mask, enable_gqa=True)

    def _mask(self) -> Tensor | None:
        step = self.step
        if step.Lq == 1 and not step.ragged:
            return None
        i, j = torch.arange(step.Lq).view(-1, 1), torch.arange(step.Lk)
        lengths = self.lengths.view(-1, 1, 1, 1)
        return j <= i + lengths - step.Lq

    def check(self) -> None:
        step, (k, v) = self.step, self.stored[0]
        if step.cache == "int8":
            k, v = (x.float() * self.options[0][f"{name}_scale"].unsqueeze(-1) for name, x in (("k", k), ("v", v)))
        else:
            k, v = self.plain[0]
        heads = step.Hq // step.Hkv
        k, v = (x.float().repeat_interleave(heads, 1) for x in (k, v))
        wanted = F.scaled_dot_product_attention(self.q.float(), k, v, attn_mask=self.mask)
        error = (self.ours(0).float() - wanted).abs().max().item() / wanted.abs().max().item()
        if not error <= ULPS[step.dtype] * torch.finfo(self.q.dtype).eps:
            raise WrongResult(f"{step.id}: off by {error:.3g} of the largest value")


def _rotating(name: str, call: Callable[[int], Any], count: int) -> Runner:
    turn = itertools.cycle(range(count))
    return Runner(name, lambda: call(next(turn)), torch.inference_mode)


def measure(step: Step, budget_s: float, say: Callable[[str], None] = lambda _: None) -> Result:
    say("checking")
    caches = Caches(step)
    caches.check()
    count = len(caches.plain)
    runners = [_rotating(OURS, caches.ours, count)]
    if step.cache == CONTIGUOUS:
        runners.append(_rotating(SDPA, caches.sdpa, count))
    else:
        runners.append(_rotating(CONTIGUOUS, caches.contiguous, count))
    runners.append(_rotating(READ, caches.read, count))
    timings = interleave(runners, budget_s, on_turn=say)
    return Result(step, timings, sum(x.nbytes for x in caches.stored[0]))


def steps(quick: bool = False) -> list[Step]:
    if quick:
        return [Step("bfloat16", Lk=512, Hq=8, Hkv=2), Step("float32", "int8", Lk=256, Hq=4, Hkv=4)]
    found = [Step(dtype, Hkv=Hkv, B=B) for Hkv, B in ((8, 1), (32, 1), (8, 8)) for dtype in ("bfloat16", "float32")]
    found += [Step(dtype, "paged") for dtype in ("bfloat16", "float32")]
    found += [Step("bfloat16", "int8", Lk=16384), Step("float32", "int8", Lk=16384)]
    found += [Step("bfloat16", Lq=Lq) for Lq in (2, 4, 8, 16, 32)]
    return [*found, Step("bfloat16", B=8, ragged=True), Step("float16")]


# ------------------------------------------------------------------------------------------------------------- reports

TITLE = "Decoding; GB/s of keys and values, and of what merely reading them reaches; x: times as fast as"


def table(results: list[Result]) -> str:
    header = ["step", "ms (IQR)", "GB/s", "of bandwidth", "x SDPA", "x contiguous"]
    lines = [
        [
            result.step.id,
            f"{format_ms(result.timings[OURS].median_ms)} ({format_ms(result.timings[OURS].iqr_ms)})",
            f"{result.gbs:.1f}",
            f"{100 * result.of_bandwidth:.0f}%",
            format_ratio(result.times(SDPA)),
            format_ratio(result.times(CONTIGUOUS)),
        ]
        for result in results
    ]
    return text_table(header, lines)


def line(result: Result) -> str:
    ours = format_ms(result.timings[OURS].median_ms)
    return f"{result.step.id}: {ours} ms, {result.gbs:.1f} GB/s, {100 * result.of_bandwidth:.0f}% of the bandwidth"


def as_dict(result: Result) -> dict[str, Any]:
    step = result.step
    return {
        "id": step.id,
        **{name: getattr(step, name) for name in step.__dataclass_fields__},
        "results": {name: timing_as_dict(timing) for name, timing in result.timings.items()},
        "read_bytes": step.read_bytes,
        "gb_per_s": result.gbs,
        "bandwidth_gb_per_s": result.bandwidth_gbs,
        "of_bandwidth": result.of_bandwidth,
        "speedup_over_sdpa": result.times(SDPA),
        "speedup_over_contiguous": result.times(CONTIGUOUS),
    }
