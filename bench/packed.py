"""Sequences of very different lengths, packed: against the same work as a batch of equal lengths, and against padding.

Dense has sequences of one length, as many visible pairs in all: what packing costs. Padded is PyTorch's SDPA on the
batch (B, H, longest, D) under a mask of the keys that exist, which is what people do without packing. On a GPU,
PyTorch's own kernel for packed sequences is timed as well.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from bench.cases import DTYPES
from bench.measure import ULPS, WrongResult
from bench.report import format_ms, format_ratio, text_table, timing_as_dict
from bench.timing import Clock, Runner, Timing, interleave

OURS, DENSE, PADDED, FLASH = "packed", "dense", "padded SDPA", "flash varlen"
STEP = "step"


@dataclass(frozen=True)
class Batch:
    """`count` sequences, their lengths spread evenly over [shortest, longest], in an order that is not theirs."""

    dtype: str
    direction: str = "forward"  # | "step": forward and backward
    causal: bool = False
    count: int = 32
    shortest: int = 16
    longest: int = 2048
    H: int = 8
    D: int = 64
    device: str = "cpu"

    @property
    def id(self) -> str:
        kind = "causal" if self.causal else "dense"
        return f"{self.dtype}-{self.direction}-{kind}-{self.count}x{self.shortest}..{self.longest}-H{self.H}-D{self.D}"

    def lengths(self) -> list[int]:
        spread = torch.linspace(self.shortest, self.longest, self.count).round().int()
        return spread[torch.randperm(self.count, generator=torch.Generator().manual_seed(0))].tolist()

    def equal_length(self) -> int:
        """Of `equal_count` sequences of one length, with as many visible pairs as these have."""
        return round(math.sqrt(sum(n * n for n in self.lengths()) / self.equal_count))

    @property
    def equal_count(self) -> int:
        return max(1, self.count // 2)


@dataclass
class Result:
    batch: Batch
    timings: dict[str, Timing]
    pairs: dict[str, int] = field(default_factory=dict)  # visible ones; of the padded batch those that are wanted

    def rate(self, name: str) -> float:
        """Visible pairs in a millisecond."""
        return self.pairs[name] / self.timings[name].median_ms

    @property
    def of_dense(self) -> float:
        return self.rate(OURS) / self.rate(DENSE)

    @property
    def over_padded(self) -> float:
        return self.timings[PADDED].median_ms / self.timings[OURS].median_ms


def visible(n: int, causal: bool) -> int:
    return n * (n + 1) // 2 if causal else n * n


def _stepped(attend: Callable[..., Tensor], tensors: list[Tensor], d_o: Tensor) -> Callable[[], Any]:
    def call() -> Any:
        return torch.autograd.grad(attend(*tensors), tensors, d_o)

    return call


def _runner(name: str, batch: Batch, attend: Callable[..., Tensor], tensors: list[Tensor]) -> Runner:
    if batch.direction == STEP:
        leaves = [x.requires_grad_() for x in tensors]
        return Runner(name, _stepped(attend, leaves, torch.randn_like(attend(*leaves))))
    return Runner(name, lambda: attend(*tensors), torch.inference_mode)


def measure(
    batch: Batch, budget_s: float, say: Callable[[str], None] = lambda _: None, clock: Clock | None = None
) -> Result:
    lengths, dtype, device = batch.lengths(), DTYPES[batch.dtype], batch.device
    B, H, L, D = batch.count, batch.H, batch.longest, batch.D
    packed = [torch.randn(sum(lengths), H, D).to(device, dtype) for _ in range(3)]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    padded = [torch.zeros(B, L, H, D, dtype=dtype, device=device) for _ in range(3)]
    for whole, parts in zip(padded, packed, strict=True):
        for b, part in enumerate(parts.split(lengths)):
            whole[b, : lengths[b]] = part
    exists = (torch.arange(L) < torch.tensor(lengths).view(B, 1)).to(device)
    mask = exists.view(B, 1, 1, L)
    if batch.causal:
        mask = mask & torch.ones(L, L, dtype=torch.bool, device=device).tril()
    length = batch.equal_length()
    equal = [torch.randn(batch.equal_count, H, length, D).to(device, dtype) for _ in range(3)]

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        options: dict[str, Any] = {"max_seqlen_q": L, "max_seqlen_k": L, "causal": batch.causal}
        return fastattn.varlen_attention(q, k, v, cu_seqlens, cu_seqlens, **options)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fastattn.attention(q, k, v, causal=batch.causal)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    say("checking")
    heads_first = [x.transpose(1, 2) for x in padded]
    got, wanted = ours(*packed), sdpa(*(x.float() for x in heads_first)).transpose(1, 2)[exists]
    error = (got.float() - wanted).abs().max().item() / wanted.abs().max().item()
    if not error <= ULPS[batch.dtype] * torch.finfo(dtype).eps:
        raise WrongResult(f"{batch.id}: off by {error:.3g} of the largest value")
    runners = [
        _runner(OURS, batch, ours, packed),
        _runner(DENSE, batch, dense, equal),
        _runner(PADDED, batch, sdpa, heads_first),
    ]
    if device == "cuda" and batch.dtype != "float32" and (flash := _torch_varlen()) is not None:
        window = (-1, 0) if batch.causal else (-1, -1)

        def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return flash(q, k, v, cu_seqlens, cu_seqlens, L, L, window_size=window)

        runners.append(_runner(FLASH, batch, theirs, [x.detach().clone() for x in packed]))
    timings = interleave(
        runners, budget_s, clock=clock, on_turn=say, on_failure=lambda name, failure: say(f"{name}: {failure}")
    )
    mine = sum(visible(n, batch.causal) for n in lengths)
    equal_pairs = batch.equal_count * visible(length, batch.causal)
    return Result(batch, timings, {OURS: mine, DENSE: equal_pairs, PADDED: mine, FLASH: mine})


def _torch_varlen() -> Any:
    """PyTorch's function for packed sequences, where it has one with a window."""
    try:
        module = importlib.import_module("torch.nn.attention.varlen")
        known = "window_size" in inspect.signature(module.varlen_attn).parameters
    except (ImportError, AttributeError):
        return None
    return module.varlen_attn if known else None


def batches(quick: bool = False) -> list[Batch]:
    if quick:
        return [Batch("float32", count=8, longest=256, H=2)]
    found = [Batch(dtype, direction) for dtype in ("bfloat16", "float32") for direction in ("forward", STEP)]
    return [*found, Batch("bfloat16", causal=True)]


# ------------------------------------------------------------------------------------------------------------- reports

TITLE = "Sequences of different lengths; / dense: visible pairs in a second, beside a batch of equal lengths"


def table(results: list[Result]) -> str:
    header = ["batch", "packed ms (IQR)", "dense ms", "padded SDPA ms", "/ dense", "x padded"]
    lines = [
        [
            result.batch.id,
            f"{format_ms(result.timings[OURS].median_ms)} ({format_ms(result.timings[OURS].iqr_ms)})",
            format_ms(result.timings[DENSE].median_ms),
            format_ms(result.timings[PADDED].median_ms),
            format_ratio(result.of_dense),
            format_ratio(result.over_padded),
        ]
        for result in results
    ]
    return text_table(header, lines)


def line(result: Result) -> str:
    ours = format_ms(result.timings[OURS].median_ms)
    return f"{result.batch.id}: {ours} ms, {result.of_dense:.2f} of dense, {format_ratio(result.over_padded)} x padded"


def as_dict(result: Result) -> dict[str, Any]:
    return {
        "id": result.batch.id,
        **{name: getattr(result.batch, name) for name in result.batch.__dataclass_fields__},
        "results": {name: timing_as_dict(timing) for name, timing in result.timings.items()},
        "visible_pairs": result.pairs,
        "rate_of_dense": result.of_dense,
        "speedup_over_padding": result.over_padded,
    }
