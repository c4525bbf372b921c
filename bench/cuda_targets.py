"""The figures that the CUDA kernels are held to, each measured and set beside its target: met or missed.

They are for one large GPU and for 16-bit numbers, B * L = 16384, heads that are 2048 wide together, unless a name says
otherwise. "flash" is PyTorch's own flash backend in the same run, "SDPA" what PyTorch chooses by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from bench import cuda_packed, packed, textbook
from bench.cases import BIAS_CASE, WINDOW_CASE, Job, decode_case, on_cuda, training_case
from bench.measure import Meter, OursFailed, Row, WrongResult, in_words, measure
from bench.peers import BASELINE, OURS, PEERS
from bench.target import AT_LEAST, Target, wrong_target
from bench.targets import judge_textbook
from bench.textbook_peers import ATTENTION, COMPILED, EAGER, Problem
from tests.cases import BENCH_CASES

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
DIMS = (64, 128)
KINDS: tuple[dict[str, Any], ...] = ({}, {"causal": "top_left"})
BACKENDS = ("flash", "cudnn", "efficient", "math")
BUDGET_S = 0.35  # of timing for each job, by default: a GPU's times vary little
FLASH_GOALS = {"forward": 1.0, "backward": 0.95}
DECODE_BATCHES = (1, 8, 32)
BANDWIDTH_GOAL = 75.0
JOB_S, COMPILING_JOB_S = 5.0, 45.0  # no job is started with less time left than that


@dataclass
class Context:
    meter: Meter
    budget_s: float
    deadline: float  # of time.monotonic(); what is not reached by then is not measured
    copy_gbytes: float
    say: Callable[[str], None]
    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)  # where ours raised
    textbook: list[textbook.Result] = field(default_factory=list)

    def measure(self, job: Job, peers: Sequence[str]) -> Row | Target:
        """A row; or, where the time is over or something went wrong, what stands in its place in the table."""
        chosen = [PEERS[name] for name in (OURS, BASELINE, *peers)]
        needed_s = COMPILING_JOB_S if any(peer.compiles for peer in chosen) else JOB_S
        if time.monotonic() + needed_s > self.deadline:
            return not_measured(job, "the time was over")
        self.say(job.id)
        try:
            row = measure(job, chosen, self.meter, self.budget_s, on_step=lambda step: self.say(f"{job.id}: {step}"))
        except WrongResult as wrong:
            return wrong_target(job.id, wrong)
        except OursFailed as failure:
            self.failures.append(f"FAILED, not timed: {failure}")
            return not_measured(job, f"ours failed: {failure}")
        except Exception as failure:  # no memory for the inputs, say: the other figures are wanted all the same
            return not_measured(job, f"failed: {in_words(failure)}")
        if OURS not in row.timings:
            return not_measured(job, row.notes[OURS])
        self.rows.append(row)
        return row


def not_measured(job: Job | Problem, reason: str) -> Target:
    return Target(job.id, "right numbers", AT_LEAST, 1, None, reason)


def describe(row: Row, *names: str) -> str:
    """Ours and the others' TFLOP/s, and ours in per cent of the matrix product."""
    parts = [f"{row.gflops() / 1e3:.0f} TFLOP/s, {row.percent_of_peak():.0f}% of a GEMM"]
    parts += [f"{name} {row.gflops(name) / 1e3:.0f}" for name in names if name in row.timings]
    return "; ".join(parts)


def over(row: Row, peer: str, goal: float) -> Target:
    """How many times faster than a peer."""
    detail = describe(row, *(name for name in row.timings if name != OURS))
    if peer in row.notes:
        detail = f"{peer}: {row.notes[peer]}; {detail}"
    return Target(
        row.job.id, f"x {PEERS[peer].title.replace('PyTorch ', '')}", AT_LEAST, goal, row.speedup(peer), detail
    )


def judge(context: Context, jobs: Sequence[Job], peers: Sequence[str], goals: dict[str, float]) -> Iterator[Target]:
    """Each job against each of `goals`, which are by peer; those of `peers` are timed beside them."""
    for job in on_cuda(jobs):
        row = context.measure(job, [*peers, *(name for name in goals if name not in (*peers, BASELINE))])
        if isinstance(row, Target):
            yield row
        else:
            yield from (over(row, peer, goal) for peer, goal in goals.items())


def training_jobs(direction: str) -> list[Job]:
    cases = (training_case(L, D, **kind) for D, kind, L in product(DIMS, KINDS, LENGTHS))
    return [Job(case, "bfloat16", direction) for case in cases]


def forward_targets(context: Context) -> Iterator[Target]:
    return judge(context, training_jobs("forward"), BACKENDS, {"flash": FLASH_GOALS["forward"]})


def backward_targets(context: Context) -> Iterator[Target]:
    return judge(context, training_jobs("backward"), BACKENDS, {"flash": FLASH_GOALS["backward"]})


def decode_targets(context: Context) -> Iterator[Target]:
    """Bandwidth is that of keys, values, queries and results that come from memory: with nothing left in L2."""
    for B in DECODE_BATCHES:
        (job,) = on_cuda([Job(decode_case(B), "bfloat16")])
        row = context.measure(job, BACKENDS)
        if isinstance(row, Target):
            yield row
            continue
        gbytes = row.gbytes_per_s(flushed=True)
        others = (f"{name} {row.gbytes_per_s(name, flushed=True):.0f}" for name in row.flushed if name != OURS)
        detail = "; ".join([f"{gbytes:.0f} GB/s of {context.copy_gbytes:.0f}", *others])
        percent = 100 * gbytes / context.copy_gbytes
        yield Target(job.id, "% of a copy's bandwidth", AT_LEAST, BANDWIDTH_GOAL, percent, detail)


def feature_jobs() -> list[Job]:
    """What PyTorch's fast kernels do not do: gradients of a bias, float32, windows."""
    jobs = [Job(BIAS_CASE, dtype, "backward", bias_gradient=True) for dtype in ("bfloat16", "float32")]
    jobs += [Job(replace(BIAS_CASE, D=128, Hkv=8), "bfloat16", "backward", bias_gradient=True)]
    fp32 = [training_case(2048, D, tokens=8192, **kind) for D, kind in product(DIMS, KINDS)]
    jobs += [Job(case, "float32", direction) for case, direction in product(fp32, ("forward", "backward"))]
    windows = (replace(WINDOW_CASE, D=64), WINDOW_CASE)
    return jobs + [Job(case, "bfloat16", direction) for case, direction in product(windows, ("forward", "backward"))]


def feature_targets(context: Context) -> Iterator[Target]:
    return judge(context, feature_jobs(), BACKENDS, {BASELINE: 2.0})


def table_targets(context: Context) -> Iterator[Target]:
    """The table of cases that the CPU is measured with: for a GPU most of them are small."""
    jobs = [
        Job(case, dtype, direction)
        for case in BENCH_CASES
        for dtype in ("bfloat16", "float32")
        for direction in ("forward", "backward")
    ]
    return judge(context, jobs, (), {BASELINE: 1.0})


def flex_targets(context: Context) -> Iterator[Target]:
    """FlexAttention compiles for many seconds in each of these."""
    causal = training_case(4096, 128, causal="top_left")
    jobs = [Job(case, "bfloat16", way) for case, way in product((WINDOW_CASE, causal), ("forward", "backward"))]
    return judge(context, [*jobs, Job(decode_case(8), "bfloat16")], (), {"flex": 1.0})


_ADDITIVE, _HARD, _SUMMARY = (
    Problem("additive", 16, 8, 512, 64, dtype="bfloat16", device="cuda"),
    Problem("hard", 8, 16, 2048, 64, dtype="bfloat16", device="cuda"),
    Problem("summary", 8, 16, 2048, 64, dtype="bfloat16", device="cuda"),
)
# As bench.targets.TEXTBOOK.
TEXTBOOK: list[tuple[Problem, dict[str, float]]] = [
    (_ADDITIVE, {EAGER: 10, COMPILED: 2}),
    (replace(_ADDITIVE, direction="backward"), {EAGER: 10}),
    (_HARD, {ATTENTION: 1.5}),
    (_SUMMARY, {ATTENTION: 2.2}),
]


def textbook_targets(context: Context) -> Iterator[Target]:
    for problem, goals in TEXTBOOK:
        if time.monotonic() + (COMPILING_JOB_S if COMPILED in goals else JOB_S) > context.deadline:
            yield not_measured(problem, "the time was over")
            continue
        context.say(problem.id)
        try:
            result = textbook.measure(problem, context.meter, context.budget_s, names=goals)
        except WrongResult as wrong:
            yield wrong_target(problem.id, wrong)
        except OursFailed as failure:
            context.failures.append(f"FAILED, not timed: {failure}")
            yield not_measured(problem, f"ours failed: {failure}")
        except Exception as failure:
            yield not_measured(problem, f"failed: {in_words(failure)}")
        else:
            context.textbook.append(result)
            yield from judge_textbook(result, goals)


def _guarded(context: Context, name: str, judging: Callable[[], list[Target]]) -> list[Target]:
    """Figures that are no rows of the table: what goes wrong with them stands in their place."""
    if time.monotonic() + JOB_S > context.deadline:
        return [Target(name, "right numbers", AT_LEAST, 1, None, "the time was over")]
    context.say(name)
    try:
        return judging()
    except WrongResult as wrong:
        return [wrong_target(name, wrong)]
    except Exception as failure:
        context.failures.append(f"FAILED, not timed: {name}: {in_words(failure)}")
        return [Target(name, "right numbers", AT_LEAST, 1, None, f"failed: {in_words(failure)}")]


def packed_targets(context: Context) -> Iterator[Target]:
    for batch in cuda_packed.BATCHES:

        def judging(batch: packed.Batch = batch) -> list[Target]:
            result = packed.measure(batch, context.budget_s, context.say, context.meter.clock)
            return list(cuda_packed.judge_packed(result))

        yield from _guarded(context, batch.id, judging)


def cache_targets(context: Context) -> Iterator[Target]:
    """With nothing left in L2: a cache is read once for a token."""
    for job in cuda_packed.DECODING:

        def judging(job: cuda_packed.Decoding = job) -> list[Target]:
            clock = context.meter.flushed_clock or context.meter.clock
            return list(cuda_packed.judge_cache(job, cuda_packed.measure_cache(job, context.budget_s, clock)))

        yield from _guarded(context, job.id, judging)


# In order of how much each is wanted: a run whose time ends has the first of them.
GROUPS: dict[str, Callable[[Context], Iterator[Target]]] = {
    "forward": forward_targets,
    "backward": backward_targets,
    "decode": decode_targets,
    "packed": packed_targets,
    "cache": cache_targets,
    "flex": flex_targets,
    "features": feature_targets,
    "textbook": textbook_targets,
    "table": table_targets,
}


def run_targets(context: Context, groups: Sequence[str]) -> Iterator[Target]:
    for group in groups:
        yield from GROUPS[group](context)
