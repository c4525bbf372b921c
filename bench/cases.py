"""What is timed: a case of tests/cases.py in a dtype, a direction and on a device, with its flop and bytes.

flop: forward 2 * pairs * (D + Dv), backward 2 * pairs * (3 D + 2 Dv), that is 4 * pairs * D and 2.5 times as much where
D = Dv. A pair is one (query row, key) that the mask lets through, over all batch entries and query heads: what a kernel
computes beyond those (half-masked tiles, two-pass plans) counts against it.
bytes: every operand read once, every result written once.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.cases import BENCH_CASES, Case, Inputs, bench_case
from tests.cases import make_inputs as make_case_inputs

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
DIRECTIONS = ("forward", "backward", "step")  # step: forward and backward, as one training step does them


@dataclass(frozen=True)
class Job:
    case: Case
    dtype: str = "float32"
    direction: str = "forward"
    device: str = "cpu"
    bias_gradient: bool = False  # wanted beside those of q, k and v

    @property
    def id(self) -> str:
        return f"{SHORT[self.dtype]}-{self.direction}-{self.case.id}" + ("-dbias" if self.bias_gradient else "")

    def make_inputs(self) -> Inputs:
        """Normal variates, never zeros: on those a GPU draws less power, and runs faster than it ever will."""
        dtype = DTYPES[self.dtype]
        if self.device == "cpu":
            return make_case_inputs(self.case, dtype)
        if self.case == replace(self.case, **NO_TENSORS):
            return draw_on(self.device, self.case, dtype)
        return move_to(self.device, make_case_inputs(self.case, dtype))


# A case that is the same with these has no tensors but q, k and v, which lie in memory as they are made.
NO_TENSORS: dict[str, Any] = {
    "bias": None,
    "mask": None,
    "alibi": None,
    "sinks": False,
    "kv_lengths": None,
    "layout": "contiguous",
}


def draw_on(device: str, case: Case, dtype: torch.dtype) -> Inputs:
    """Other numbers than the CPU's, in a hundredth of the time that it takes the CPU to draw its own."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(case.id.encode()))

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    q, d_o = randn(case.B, case.Hq, case.Lq, case.D), randn(case.B, case.Hq, case.Lq, case.value_dim)
    k, v = randn(case.B, case.Hkv, case.Lk, case.D), randn(case.B, case.Hkv, case.Lk, case.value_dim)
    d_lse = torch.randn(case.B, case.Hq, case.Lq, generator=generator, device=device)
    kwargs = make_case_inputs(replace(case, B=1, Hkv=1, gqa=1, Lq=1, Lk=1), dtype).kwargs  # numbers, no tensors
    return Inputs(q, k, v, d_o, d_lse, kwargs)


def move_to(device: str, inputs: Inputs) -> Inputs:
    kwargs = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in inputs.kwargs.items()}
    q, k, v, d_o, d_lse = (x.to(device) for x in (inputs.q, inputs.k, inputs.v, inputs.d_o, inputs.d_lse))
    return Inputs(q, k, v, d_o, d_lse, kwargs)


# SDPA's float16 backward is some ten times slower than its float32 one: a shorter case keeps its share of a run small.
SHORT_BACKWARD = bench_case(1024, 64)


def default_jobs() -> list[Job]:
    """The compact table: each kind of case, and each dtype and direction, once or twice."""
    dense64, dense128, causal, causal512, vit = (
        bench_case(2048, 64),
        bench_case(2048, 128),
        bench_case(2048, 64, causal="top_left"),
        bench_case(512, 64, causal="top_left"),
        bench_case(197, 64, H=12, B=8),
    )
    blocks = bench_case(2048, 64, mask="11qk", mask_values="blocks")
    jobs = [Job(case) for case in (dense64, dense128, causal, causal512, vit, blocks)]
    jobs += [Job(bench_case(4096, 64, causal="bottom_right", window=(256, 0)))]
    jobs += [Job(Case(1, 4096, D=128, Hkv=8, gqa=4))]
    jobs += [Job(case, "bfloat16") for case in (dense64, dense128, causal)]
    jobs += [Job(case, "float16") for case in (dense64,)]
    jobs += [Job(case, "float32", "backward") for case in (dense64, dense128, causal)]
    jobs += [Job(case, "bfloat16", "backward") for case in (dense64, dense128)]
    jobs += [Job(SHORT_BACKWARD, "float16", "backward")]
    jobs += [Job(case, "float32", "step") for case in (causal512, vit)]
    return jobs


def cuda_default_jobs() -> list[Job]:
    """The compact table for a GPU: enough heads to fill it; short and long, each dtype, each kind of mask, decoding."""
    dense, causal = training_case(4096, 128), training_case(4096, 128, causal="top_left")
    jobs = [Job(case, "bfloat16") for case in (training_case(4096, 64), dense, causal, training_case(512, 64))]
    jobs += [Job(training_case(16384, 128, causal="top_left"), "bfloat16"), Job(dense, "float16")]
    jobs += [Job(case, "bfloat16", "backward") for case in (training_case(4096, 64), dense, causal)]
    jobs += [Job(WINDOW_CASE, "bfloat16", direction) for direction in ("forward", "backward")]
    jobs += [Job(BIAS_CASE, "bfloat16", "backward", bias_gradient=True)]
    jobs += [Job(training_case(2048, 64, tokens=8192), "float32", direction) for direction in ("forward", "backward")]
    jobs += [Job(decode_case(B), "bfloat16") for B in (1, 16)]
    return on_cuda(jobs)


def training_case(L: int, D: int, *, tokens: int = 16384, **features: Any) -> Case:
    """tokens = B * L in all, and heads that are 2048 wide together: the shapes of FlashAttention's own benchmark."""
    return bench_case(L, D, H=2048 // D, B=max(1, tokens // L), **features)


def decode_case(B: int) -> Case:
    """One new token for each of B sequences of 8192, eight query heads to a key head."""
    return Case(1, 8192, D=128, B=B, Hkv=8, gqa=8)


WINDOW_CASE = bench_case(8192, 128, H=16, B=2, causal="bottom_right", window=(256, 0))
BIAS_CASE = bench_case(2048, 64, H=16, B=4, bias="1hqk")  # a learnt bias by relative position, as T5 has


def on_cuda(jobs: Iterable[Job]) -> list[Job]:
    return [replace(job, device="cuda") for job in jobs]


def quick_jobs(device: str = "cpu") -> list[Job]:
    """Seconds, not minutes: one job for each dtype and direction."""
    case = bench_case(512, 64, causal="top_left")
    return [Job(case, dtype, direction, device) for dtype in DTYPES for direction in ("forward", "step")]


def full_jobs(device: str = "cpu") -> list[Job]:
    """Every case of the table in every dtype and direction."""
    if device != "cpu":
        return [Job(case, dtype, way, device) for case in BENCH_CASES for dtype in DTYPES for way in DIRECTIONS]
    jobs = []
    for case in BENCH_CASES:
        for dtype in DTYPES:
            for direction in DIRECTIONS:
                slow = dtype == "float16" and direction != "forward"  # for SDPA, see SHORT_BACKWARD
                if slow and case.B * case.Hq * case.Lq * case.Lk * case.D > 8 * 1024 * 1024 * 64:
                    continue
                jobs.append(Job(case, dtype, direction))
    jobs += [Job(SHORT_BACKWARD, "float16", direction) for direction in ("backward", "step")]
    return jobs


def select(
    jobs: Iterable[Job], *, pattern: str | None = None, dtypes: Iterable[str] = (), directions: Iterable[str] = ()
) -> list[Job]:
    """The jobs whose id matches the regular expression and whose dtype and direction are among those given."""
    dtypes, directions = set(dtypes) or set(DTYPES), set(directions) or set(DIRECTIONS)
    return [
        job
        for job in jobs
        if job.dtype in dtypes and job.direction in directions and (pattern is None or re.search(pattern, job.id))
    ]


def row_ranges(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """First visible key of each row, and one past the last, without lengths and masks given as tensors."""
    i = np.arange(case.Lq)
    diagonal = i if case.causal == "top_left" else i + case.Lk - case.Lq
    left, right = case.window or (None, None)
    if case.causal:
        right = 0
    lo = np.zeros_like(i) if left is None else diagonal - left
    hi = np.full_like(i, case.Lk) if right is None else diagonal + right + 1
    return np.clip(lo, 0, case.Lk), np.clip(hi, 0, case.Lk)


def interval_mask(case: Case) -> Tensor:
    """(Lq, Lk) bool, True = visible: causal and window spelled out, for libraries that take them in no other form."""
    lo, hi = (torch.from_numpy(x)[:, None] for x in row_ranges(case))
    j = torch.arange(case.Lk)
    return (j >= lo) & (j < hi)


def visible_pairs(case: Case, inputs: Inputs) -> int:
    """Pairs of a row and a key that it sees, over all batch entries and query heads."""
    if case.kv_lengths is not None:
        raise NotImplementedError("cases with kv_lengths are not timed")
    mask = inputs.kwargs.get("mask")
    if mask is None:
        lo, hi = row_ranges(case)
        return case.B * case.Hq * int(np.maximum(hi - lo, 0).sum())
    mask = mask.cpu()
    keep = mask & interval_mask(case) if case.causal or case.window else mask
    copies = case.B * case.Hq * case.Lq * case.Lk // max(1, keep.numel())  # what broadcasting repeats
    return int(keep.sum()) * copies


def count_flop(job: Job, pairs: int) -> int:
    D, Dv = job.case.D, job.case.value_dim
    forward, backward = 2 * pairs * (D + Dv), 2 * pairs * (3 * D + 2 * Dv)
    return {"forward": forward, "backward": backward, "step": forward + backward}[job.direction]


def count_bytes(job: Job, inputs: Inputs) -> int:
    def size(*tensors: Tensor | None) -> int:
        return sum(x.numel() * x.element_size() for x in tensors if x is not None)

    qkv = size(inputs.q, inputs.k, inputs.v)
    modifiers = size(inputs.kwargs.get("mask"), inputs.kwargs.get("bias"))
    o = size(inputs.d_o)
    forward = qkv + modifiers + o
    backward = 2 * qkv + modifiers + 2 * o  # reads q, k, v, o and d_o, writes dq, dk and dv
    if job.bias_gradient:
        backward += size(inputs.kwargs.get("bias"))
    return {"forward": forward, "backward": backward, "step": forward + backward}[job.direction]
