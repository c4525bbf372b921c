"""On a GPU: packed sequences beside a batch of equal lengths, padding and PyTorch's own packed kernel; and one token's
attention over a cache in pages, or of int8, beside the same cache in one piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

import fastattn
from bench import packed
from bench.cases import DTYPES
from bench.measure import ULPS, WrongResult
from bench.report import format_ms
from bench.target import AT_LEAST, Target
from bench.timing import Clock, Runner, Timing, interleave

BATCHES = [
    packed.Batch("bfloat16", direction, causal, H=16, D=128, device="cuda")
    for causal in (False, True)
    for direction in ("forward", packed.STEP)
]
OF_DENSE, OVER_PADDED = 0.9, 3.0
CONTIGUOUS, SDPA = "contiguous", "sdpa"
# Of the same cache in one piece, how fast: pages of this size, and int8 rows.
GOALS = {"page 16": 0.9, "page 64": 0.9, "page 256": 0.9, "int8": 1.5}


def judge_packed(result: packed.Result) -> Iterator[Target]:
    parts = [f"{name} {format_ms(timing.median_ms)} ms" for name, timing in result.timings.items()]
    detail = "; ".join(parts)
    yield Target(result.batch.id, "of the dense rate", AT_LEAST, OF_DENSE, result.of_dense, detail)
    yield Target(result.batch.id, "x padded SDPA", AT_LEAST, OVER_PADDED, result.over_padded, detail)


@dataclass(frozen=True)
class Decoding:
    """One new token for each of B sequences, whose caches have L tokens with it."""

    B: int = 8
    Hq: int = 32
    Hkv: int = 8
    L: int = 8192
    D: int = 128
    dtype: str = "bfloat16"
    device: str = "cuda"

    @property
    def id(self) -> str:
        return f"{self.dtype}-cache-B{self.B}-L{self.L}-H{self.Hq}_{self.Hkv}-D{self.D}"


DECODING = [Decoding(), Decoding(B=1, L=32768)]


def _in_pages(cache: torch.Tensor, size: int, order: torch.Tensor) -> torch.Tensor:
    """(B, H, L, D) as (pages, H, size, D), in no order."""
    pages = cache.unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1)
    scattered = torch.empty_like(pages)
    scattered[order] = pages
    return scattered


def measure_cache(job: Decoding, budget_s: float, clock: Clock | None) -> dict[str, Timing]:
    """Each call appends the token, always the same one, and attends."""
    device, dtype, B, L = job.device, DTYPES[job.dtype], job.B, job.L

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    q = randn(B, job.Hq, 1, job.D)
    new: dict[str, Any] = {name: randn(B, job.Hkv, 1, job.D) for name in ("k", "v")}
    k_cache, v_cache = (randn(B, job.Hkv, L, job.D) for _ in range(2))
    lengths = torch.full((B,), L - 1, dtype=torch.int32, device=device)

    def calls(**cache: Any) -> Any:
        return lambda: fastattn.attention_with_kv_cache(q, **cache, **new, cache_lengths=lengths, causal=True)

    runners = [Runner(CONTIGUOUS, calls(k_cache=k_cache, v_cache=v_cache), torch.inference_mode)]
    for size in (16, 64, 256):
        if L % size == 0:
            order = torch.randperm(B * (L // size), device=device)
            caches = {"k_cache": _in_pages(k_cache, size, order), "v_cache": _in_pages(v_cache, size, order)}
            table = order.view(B, -1).to(torch.int32)
            runners.append(Runner(f"page {size}", calls(**caches, block_table=table), torch.inference_mode))
    scales = {name: torch.full((B, job.Hkv, L), 1 / 32, device=device) for name in ("k_scale", "v_scale")}
    numbers = {
        name: (32 * cache.float()).round().clamp(-127, 127).to(torch.int8)
        for name, cache in (("k_cache", k_cache), ("v_cache", v_cache))
    }
    runners.append(Runner("int8", calls(**numbers, **scales), torch.inference_mode))
    wanted = runners[0].call()

    def sdpa() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k_cache, v_cache, enable_gqa=True)

    runners.append(Runner(SDPA, sdpa, torch.inference_mode))
    for runner in runners:
        error = (runner.call().float() - wanted.float()).abs().max().item() / wanted.float().abs().max().item()
        bound = 0.1 if runner.name == "int8" else ULPS[job.dtype] * torch.finfo(dtype).eps
        if not error <= bound:
            raise WrongResult(f"{job.id}: {runner.name} is off by {error:.3g} of the largest value")
    return interleave(runners, budget_s, clock=clock)


def judge_cache(job: Decoding, timings: dict[str, Timing]) -> Iterator[Target]:
    detail = "; ".join(f"{name} {format_ms(timing.median_ms)} ms" for name, timing in timings.items())
    for name, goal in GOALS.items():
        if name in timings:
            speed = timings[CONTIGUOUS].median_ms / timings[name].median_ms
            yield Target(job.id, f"{name}: x contiguous", AT_LEAST, goal, speed, detail)


def on_cpu() -> None:
    """For a rehearsal: small and few, and not on a GPU."""
    BATCHES[:] = [replace(BATCHES[0], dtype="float32", count=3, longest=64, H=2, D=16, device="cpu")]
    DECODING[:] = [Decoding(B=2, Hq=4, Hkv=2, L=256, D=16, dtype="float32", device="cpu")]
