"""What is timed: a case of tests/cases.py in a dtype and a direction, with its flop and bytes.

flop: forward 2 * pairs * (D + Dv), backward 2 * pairs * (3 D + 2 Dv), that is 4 * pairs * D and 2.5 times as much where
D = Dv. A pair is one (query row, key) that the mask lets through, over all batch entries and query heads: what a kernel
computes beyond those (half-masked tiles, two-pass plans) counts against it.
bytes: every operand read once, every result written once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

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

    @property
    def id(self) -> str:
        return f"{SHORT[self.dtype]}-{self.direction}-{self.case.id}"

    def make_inputs(self) -> Inputs:
        return make_case_inputs(self.case, DTYPES[self.dtype])


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


def quick_jobs() -> list[Job]:
    """Seconds, not minutes: one job for each dtype and direction."""
    case = bench_case(512, 64, causal="top_left")
    return [Job(case, dtype, direction) for dtype in DTYPES for direction in ("forward", "step")]


def full_jobs() -> list[Job]:
    """Every case of the table in every dtype and direction."""
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
    return {"forward": forward, "backward": backward, "step": forward + backward}[job.direction]
