"""Many shapes, briefly: where is fastattn's advantage over SDPA smallest, and is it ever negative?

The grid is B, H, L from 1 to 8192, D from 16 to 256, masks, dtypes, forward and training step. Shapes whose SDPA call
is estimated to take longer than a cap are left out, and the rest is visited in an order that is shuffled once and for
all within each dtype and direction, in turns between those, so that a run that ends early is a fair sample of it.

A ratio counts where SDPA's call, without gradients, takes over COUNTS_FROM_US; below that only call overhead is left,
in the call as in the training step around it, and what is judged is how many microseconds ours takes longer. A shape
that looks bad is measured again, with more time, before it is reported: with some hundred shapes, one of them always
meets a disturbance.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from bench.cases import DTYPES, Job, count_flop
from bench.measure import error_in_bounds, expected_results
from bench.peers import BASELINE, OURS, PEERS
from bench.report import format_ratio, geometric_mean, text_table
from bench.timing import interleave
from tests.cases import Case, bench_case

COUNTS_FROM_US = 30.0
OVERHEAD_US = {"forward": 5.0, "step": 25.0}  # how much longer ours may take where SDPA takes less than that
DIRECTIONS = ("forward", "step")
AGAIN_BELOW = 1.15  # ratios that are measured a second time
SDPA_GFLOPS = {"float32": 120.0, "bfloat16": 100.0, "float16": 100.0}  # rough, to estimate what a shape will cost
SDPA_FP16_BACKWARD_GFLOPS = 10.0

SHAPES = ((1, 1), (1, 8), (2, 12), (8, 12), (32, 4), (64, 16))  # B, H
LENGTHS = (1, 2, 7, 16, 31, 64, 100, 128, 197, 256, 384, 512, 777, 1024, 2048, 4096, 8192)
DIMS = (16, 32, 40, 64, 80, 96, 128, 192, 256)


@dataclass(frozen=True)
class Point:
    job: Job
    ours_us: float
    sdpa_us: float
    sdpa_call_us: float  # the forward call alone; a step too long for it to matter has its own time here
    measured_twice: bool = False
    error: str = ""  # why the numbers are wrong; the times are then meaningless

    @property
    def ratio(self) -> float:
        return self.sdpa_us / self.ours_us

    @property
    def excess_us(self) -> float:
        return self.ours_us - self.sdpa_us

    @property
    def counts(self) -> bool:
        return self.sdpa_call_us > COUNTS_FROM_US

    def as_dict(self) -> dict[str, Any]:
        return {"id": self.job.id, **{k: v for k, v in asdict(self).items() if k != "job"}, "ratio": self.ratio}


@dataclass
class Sweep:
    points: list[Point]
    candidates: int  # shapes in the grid under the cap

    def right(self) -> list[Point]:
        return [point for point in self.points if not point.error]

    def wrong(self) -> list[Point]:
        return [point for point in self.points if point.error]

    def counting(self) -> list[Point]:
        return [point for point in self.right() if point.counts]

    def tiny(self, direction: str) -> list[Point]:
        return [point for point in self.right() if not point.counts and point.job.direction == direction]

    def worst_ratio(self) -> Point | None:
        return min(self.counting(), key=lambda point: point.ratio, default=None)

    def worst_excess(self, direction: str) -> Point | None:
        return max(self.tiny(direction), key=lambda point: point.excess_us, default=None)

    def as_dict(self) -> dict[str, Any]:
        return {"candidates": self.candidates, "points": [point.as_dict() for point in self.points]}


def estimated_sdpa_s(job: Job) -> float:
    """What SDPA will take, from the flop of all pairs: its causal tiles are not clipped, its masks skip nothing."""
    case = job.case
    flop = count_flop(job, case.B * case.Hq * case.Lq * case.Lk)
    if job.dtype == "float16" and job.direction != "forward":
        return flop / (1e9 * SDPA_FP16_BACKWARD_GFLOPS)
    return flop / (1e9 * SDPA_GFLOPS[job.dtype])


def _variants(B: int, H: int, L: int, D: int) -> Iterator[Case]:
    plain = bench_case(L, D, H=H, B=B)
    yield plain
    yield bench_case(L, D, H=H, B=B, causal="top_left")
    yield bench_case(L, D, H=H, B=B, layout="blhd")
    if L > 1:
        yield bench_case(L, D, H=H, B=B, causal="top_left", layout="blhd")
    if L >= 16:
        yield bench_case(L, D, H=H, B=B, mask="b11k", mask_values="padding")
        yield bench_case(L, D, H=H, B=B, mask="11qk")
        yield bench_case(L, D, H=H, B=B, bias="1hqk")
    if H % 4 == 0:
        yield bench_case(L, D, H=H // 4, B=B, gqa=4, causal="top_left")
        yield Case(1, L, D=D, Hkv=H // 4, gqa=4, B=B)
    yield Case(max(1, L // 4), L, D=D, Hkv=H, B=B)


def candidates(*, sdpa_cap_s: float, memory_cap_bytes: int = 1 << 30) -> list[Job]:
    """Every shape of the grid under the caps, dtypes and directions in turns."""
    queues = []
    for dtype in DTYPES:
        for direction in DIRECTIONS:
            jobs = {}
            for B, H in SHAPES:
                for L in LENGTHS:
                    for D in DIMS:
                        for case in _variants(B, H, L, D):
                            job = Job(case, dtype, direction)
                            operands = 4 * B * H * L * D * (4 if direction == "forward" else 12)
                            scores = 4 * L * L * (case.B if case.mask and "b" in case.mask else 1)
                            scores *= case.Hq if case.bias else 1
                            if operands + scores <= memory_cap_bytes and estimated_sdpa_s(job) <= sdpa_cap_s:
                                jobs[job.id] = job
            queue = list(jobs.values())
            random.Random(f"{dtype} {direction}").shuffle(queue)
            queues.append(queue)
    turns = []
    for position in range(max(map(len, queues))):
        turns += [queue[position] for queue in queues if position < len(queue)]
    return turns


def measure_point(job: Job, budget_s: float, *, check: bool = True) -> Point:
    inputs = job.make_inputs()
    ours, sdpa = PEERS[OURS].prepare(job, inputs), PEERS[BASELINE].prepare(job, inputs)
    if check:
        error = error_in_bounds(job, ours.results(), expected_results(job, inputs))
        if error > 1:
            return Point(job, 1.0, 1.0, 1.0, error=f"off by {error:.3g} times the bound")
    timings = interleave([ours.runner, sdpa.runner], budget_s, rounds=4)
    ours_us, sdpa_us = (1e3 * timings[name].median_ms for name in (OURS, BASELINE))
    call_us = sdpa_us
    if job.direction != "forward" and sdpa_us < 20 * COUNTS_FROM_US:
        forward = PEERS[BASELINE].prepare(replace(job, direction="forward"), inputs).runner
        call_us = 1e3 * interleave([forward], budget_s / 4, rounds=4)[BASELINE].median_ms
    return Point(job, ours_us, sdpa_us, call_us)


def looks_bad(point: Point) -> bool:
    if point.error:
        return False
    if point.counts:
        return point.ratio < AGAIN_BELOW
    return point.excess_us > 0.7 * OVERHEAD_US[point.job.direction]


def run_sweep(
    jobs: list[Job],
    *,
    total_s: float,
    budget_s: float = 0.03,
    on_point: Callable[[Point], None] | None = None,
    result: Sweep | None = None,
) -> Sweep:
    """Measures jobs in order until the time is over; each at least briefly, the bad ones twice.

    result: an empty one, to be filled, for who wants to see it before the end.
    """
    sweep = Sweep([], len(jobs)) if result is None else result
    deadline = time.monotonic() + total_s
    for job in jobs:
        if time.monotonic() > deadline:
            break
        point = measure_point(job, budget_s)
        if looks_bad(point):
            again = measure_point(job, max(8 * budget_s, 20e-6 * point.sdpa_us), check=False)
            point = replace(again, measured_twice=True)
        sweep.points.append(point)
        if on_point:
            on_point(point)
    return sweep


def sweep_report(sweep: Sweep, *, worst: int = 12) -> str:
    counting, lines = sweep.counting(), []
    for dtype in DTYPES:
        for direction in DIRECTIONS:
            ratios = [p.ratio for p in counting if (p.job.dtype, p.job.direction) == (dtype, direction)]
            if ratios:
                cells = (min(ratios), geometric_mean(ratios), max(ratios))
                below = sum(ratio < 1 for ratio in ratios)
                lines.append([dtype, direction, str(len(ratios)), *map(format_ratio, cells), str(below)])
    parts = [
        f"Sweep: {len(sweep.points)} of {sweep.candidates} shapes, {len(counting)} of them with an SDPA call of over "
        f"{COUNTS_FROM_US:g} us"
    ]
    if lines:
        header = ["dtype", "direction", "shapes", "worst", "mean", "best", "below 1.0"]
        parts.append("Times faster than PyTorch SDPA\n" + text_table(header, lines, left=(0, 1)))
        ranked = sorted(counting, key=lambda point: point.ratio)[:worst]
        parts.append(
            "The worst of them\n"
            + text_table(
                ["shape", "ours us", "SDPA us", "x SDPA"],
                [[p.job.id, f"{p.ours_us:.1f}", f"{p.sdpa_us:.1f}", f"{p.ratio:.3f}"] for p in ranked],
            )
        )
    for direction in DIRECTIONS:
        point = sweep.worst_excess(direction)
        if point:
            parts.append(
                f"Shorter calls, {direction}: {len(sweep.tiny(direction))} shapes, at worst {point.excess_us:+.1f} us "
                f"beside SDPA's {point.sdpa_us:.1f} us, at {point.job.id}"
            )
    parts += [f"WRONG, not timed: {point.job.id}: {point.error}" for point in sweep.wrong()]
    return "\n\n".join(parts)
