"""The figures that the library is held to, each measured and set beside its target: met or missed.

They are for two threads of a processor with AVX512-BF16. B=1 and H=8 unless a name says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from bench import growth, model_targets, textbook
from bench import sweep as shapes
from bench.cases import Job, visible_pairs
from bench.measure import Row, WrongResult, error_in_bounds, expected_results, measure
from bench.memory import measure_memory
from bench.peak import PeakMeter, active_isa
from bench.peers import BASELINE, OURS, PEERS
from bench.report import format_ms, text_table
from bench.target import AT_LEAST, AT_MOST, Target, wrong_target
from bench.textbook import ADDITIVE, ENCODER, HARD, SUMMARY
from bench.textbook_peers import ATTENTION, COMPILED, EAGER, TITLES, Problem
from bench.timing import Runner, interleave
from tests.cases import Case, bench_case

MEMORY_LENGTH = 16384


@dataclass
class Context:
    meter: PeakMeter
    budget_s: float  # for each timed job
    sweep_s: float
    say: Callable[[str], None]
    rows: list[Row] = field(default_factory=list)
    sweep: shapes.Sweep | None = None
    textbook: list[textbook.Result] = field(default_factory=list)

    def measure(self, job: Job) -> Row:
        self.say(job.id)
        row = measure(job, [PEERS[OURS], PEERS[BASELINE]], self.meter, self.budget_s)
        self.rows.append(row)
        return row


# Case, dtype, direction, % of peak, times SDPA; None where there is no such target.
TABLE: list[tuple[Case, str, str, float | None, float | None]] = [
    (bench_case(2048, 64), "float32", "forward", 88, 2.3),
    (bench_case(2048, 128), "float32", "forward", 90, 2.2),
    (bench_case(2048, 64, causal="top_left"), "float32", "forward", 80, 2.4),
    (bench_case(2048, 64), "bfloat16", "forward", 78, 4.2),
    (bench_case(2048, 128), "bfloat16", "forward", 80, 4.0),
    (bench_case(2048, 64), "float16", "forward", 80, 3.5),
    (bench_case(2048, 64), "float32", "backward", 82, 2.2),
    (bench_case(2048, 128), "float32", "backward", 82, 2.0),
    (bench_case(2048, 64), "bfloat16", "backward", 65, 2.4),
    (bench_case(2048, 128), "bfloat16", "backward", 65, 2.2),
    (bench_case(2048, 64), "float16", "backward", 75, 20),
    (bench_case(512, 64, causal="top_left"), "float32", "forward", None, 4),
    (bench_case(197, 64, H=12, B=8), "float32", "forward", None, 1.9),
    (bench_case(197, 64, H=12, B=8), "float32", "step", None, 1.9),
]


def table_targets(context: Context) -> Iterator[Target]:
    for case, dtype, direction, percent, ratio in TABLE:
        job = Job(case, dtype, direction)
        try:
            row = context.measure(job)
        except WrongResult as wrong:
            yield wrong_target(job.id, wrong)
        else:
            yield from _row_targets(row, job.id, percent, ratio)


def _row_targets(row: Row, name: str, percent: float | None, ratio: float | None) -> Iterator[Target]:
    if percent is not None:
        detail = f"{row.gflops():.0f} of {row.peak_gflops:.0f} GFLOP/s"
        yield Target(name, "% of peak", AT_LEAST, percent, row.percent_of_peak(), detail)
    if ratio is not None:
        detail = f"{row.timings[OURS].median_ms:.3f} ms, SDPA "
        detail += f"{row.timings[BASELINE].median_ms:.3f} ms" if BASELINE in row.timings else row.notes[BASELINE]
        yield Target(name, "x SDPA", AT_LEAST, ratio, row.speedup(), detail)


def own_times_ms(context: Context, *jobs: Job) -> list[float]:
    """Our own times for several jobs, in turns, each checked first."""
    runners = []
    for number, job in enumerate(jobs):
        context.say(job.id)
        inputs = job.make_inputs()
        prepared = PEERS[OURS].prepare(job, inputs)
        error = error_in_bounds(job, prepared.results(), expected_results(job, inputs))
        if error > 1:
            raise WrongResult(f"{job.id}: off by {error:.3g} times the bound")
        runners.append(Runner(str(number), prepared.runner.call, prepared.runner.context))
    timings = interleave(runners, context.budget_s)
    return [timings[runner.name].median_ms for runner in runners]


def window_targets(context: Context) -> Iterator[Target]:
    dense = Job(bench_case(8192, 64))
    window = Job(bench_case(8192, 64, causal="bottom_right", window=(256, 0)))
    share = visible_pairs(window.case, window.make_inputs()) / visible_pairs(dense.case, dense.make_inputs())
    dense_ms, window_ms = own_times_ms(context, dense, window)
    yield Target(
        f"window (256, 0) at L=8192, which sees {100 * share:.2f}% of the pairs",
        "time / (dense x share)",
        AT_MOST,
        1.3,
        window_ms / (dense_ms * share),
        f"{window_ms:.2f} ms, dense {dense_ms:.2f} ms",
    )


def mask_targets(context: Context) -> Iterator[Target]:
    dense = Job(bench_case(2048, 64))
    half = Job(bench_case(2048, 64, mask="11qk", mask_values="blocks"))
    dense_ms, half_ms = own_times_ms(context, dense, half)
    name = "fp32-forward, bool mask, half of the 64x64 tiles empty, L=2048"
    detail = f"{half_ms:.2f} ms, dense {dense_ms:.2f} ms"
    yield Target(name, "time / dense", AT_MOST, 0.6, half_ms / dense_ms, detail)
    yield from _row_targets(context.measure(half), name, None, 3)


@contextmanager
def forced_isa(name: str) -> Iterator[None]:
    before = active_isa()
    torch.ops.fastattn._set_isa(name)
    try:
        yield
    finally:
        torch.ops.fastattn._set_isa(before)


def avx2_targets(context: Context) -> Iterator[Target]:
    name = "fp32-forward, AVX2 forced, L=2048, D=64"
    if "avx2" not in str(torch.ops.fastattn._supported_isas()).split(","):
        yield Target(name, "% of peak", AT_LEAST, 85, None, "this processor has no AVX2")
        return
    with forced_isa("avx2"):
        row = context.measure(Job(bench_case(2048, 64)))
        yield from _row_targets(row, name, 85, 1.2)


def _on_threads(runner: Runner, count: int) -> Runner:
    """The same call, by this many threads."""

    @contextmanager
    def with_threads() -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            with runner.context():
                yield
        finally:
            torch.set_num_threads(before)

    return Runner(str(count), runner.call, with_threads)


def thread_targets(context: Context) -> Iterator[Target]:
    """One head, so that only a division within the head can occupy the second thread."""
    case = bench_case(4096, 64, H=1)
    threads = torch.get_num_threads()
    for direction in ("forward", "backward"):
        job = Job(case, "float32", direction)
        name = f"second thread, {job.id}"
        if threads < 2:
            yield Target(name, "x one thread", AT_LEAST, 1.85, None, "the benchmark runs on one thread")
            continue
        context.say(name)
        inputs = job.make_inputs()
        prepared = PEERS[OURS].prepare(job, inputs)
        runners = [_on_threads(prepared.runner, count) for count in (1, 2)]
        timings = interleave(runners, context.budget_s)
        one, two = (timings[str(count)].median_ms for count in (1, 2))
        peak = context.meter.measure(job.dtype, 2) / context.meter.measure(job.dtype, 1)
        detail = f"{one:.2f} ms, then {two:.2f} ms; the peak itself grows {peak:.2f} x"
        yield Target(name, "x one thread", AT_LEAST, 1.85, one / two, detail)


OVERHEAD_CASES = (
    bench_case(1, 16, H=1),
    bench_case(1, 64, H=8),
    bench_case(8, 32, H=2),
    bench_case(16, 16, H=4),
    bench_case(16, 64, H=1, causal="top_left"),
    bench_case(16, 64, H=2, layout="blhd"),
)


def overhead_targets(context: Context) -> Iterator[Target]:
    for direction, goal in shapes.OVERHEAD_US.items():
        points = []
        for case in OVERHEAD_CASES:
            job = Job(case, "float32", direction)
            context.say(f"overhead {job.id}")
            points.append(shapes.measure_point(job, context.budget_s))
        wrong = [point for point in points if point.error]
        if wrong:
            raise WrongResult(f"{wrong[0].job.id}: {wrong[0].error}")
        worst = max(points, key=lambda point: point.excess_us)
        name = f"small calls, {'without gradients' if direction == 'forward' else 'forward + backward'}"
        detail = f"worst of {len(points)}: {worst.job.id}, {worst.ours_us:.1f} us, SDPA {worst.sdpa_us:.1f} us"
        yield Target(name, "us more than SDPA", AT_MOST, goal, worst.excess_us, detail)


def memory_targets(context: Context) -> Iterator[Target]:
    name = f"memory beyond inputs, output and gradients, fp32 step, L={MEMORY_LENGTH}"
    context.say(name)
    try:
        ours = measure_memory(OURS, length=MEMORY_LENGTH, threads=torch.get_num_threads())
    except (OSError, RuntimeError) as failure:
        yield Target(name, "copies of q, k, v", AT_MOST, 1.0, None, str(failure).partition("\n")[0])
        return
    detail = f"{ours.extra_bytes / 2**20:.0f} MiB of {ours.unit_bytes / 2**20:.0f} MiB"
    yield Target(name, "copies of q, k, v", AT_MOST, 1.0, ours.extra_units, detail)


def sweep_targets(context: Context) -> Iterator[Target]:
    jobs = shapes.candidates(sdpa_cap_s=0.15)
    context.sweep = shapes.run_sweep(
        jobs, total_s=context.sweep_s, on_point=lambda point: context.say(f"sweep {point.job.id}")
    )
    wrong = context.sweep.wrong()
    if wrong:
        raise WrongResult(f"{wrong[0].job.id}: {wrong[0].error}")
    worst = context.sweep.worst_ratio()
    name = f"worst of {len(context.sweep.counting())} shapes of the sweep"
    yield Target(
        name,
        "x SDPA",
        AT_LEAST,
        1.0,
        worst.ratio if worst else None,
        f"{worst.job.id}, {worst.ours_us:.0f} us" if worst else "no shape was reached in the time given",
    )


# Problem, who is beside ours, and the goal: how many times as long it takes at least; or, beside attention, which does
# less, how many times as long ours may take.
TEXTBOOK: list[tuple[Problem, dict[str, float]]] = [
    (ADDITIVE, {EAGER: 40, COMPILED: 6}),
    (replace(ADDITIVE, direction="backward"), {EAGER: 15}),
    (HARD, {ATTENTION: 1.5}),
    (SUMMARY, {ATTENTION: 2.2}),
    (replace(ENCODER, dropout_p=0.1), {EAGER: 1.3}),  # its default
]
GROWTH_LENGTH, GROWTH_BATCH, GROWTH_GIB, GROWTH_GOAL = 4096, 4, 8, 3.0


def textbook_targets(context: Context) -> Iterator[Target]:
    for problem, goals in TEXTBOOK:
        context.say(problem.id)
        try:
            result = textbook.measure(problem, context.meter, context.budget_s, names=goals)
        except WrongResult as wrong:
            yield wrong_target(problem.id, wrong)
            continue
        context.textbook.append(result)
        yield from judge_textbook(result, goals)
    yield length_target(context)


def judge_textbook(result: textbook.Result, goals: dict[str, float]) -> Iterator[Target]:
    for name, goal in goals.items():
        ratio = result.ratio(name)
        detail = f"{format_ms(result.timings[OURS].median_ms)} ms, {TITLES[name]} "
        detail += result.notes[name] if ratio is None else f"{format_ms(result.timings[name].median_ms)} ms"
        if name == ATTENTION:
            yield Target(result.problem.id, "time / attention", AT_MOST, goal, ratio and 1 / ratio, detail)
        else:
            yield Target(result.problem.id, f"x {TITLES[name]}", AT_LEAST, goal, ratio, detail)


def length_target(context: Context) -> Target:
    """A length that plain code has no memory for."""
    name = f"memory beyond inputs and results, additive fp32 step, B={GROWTH_BATCH} L={GROWTH_LENGTH}"
    context.say(name)
    try:
        ours, eager = (
            growth.measure_point(
                "additive", who, GROWTH_LENGTH, threads=torch.get_num_threads(), B=GROWTH_BATCH, at_most_gib=GROWTH_GIB
            )
            for who in (OURS, EAGER)
        )
    except (OSError, RuntimeError) as failure:
        return Target(name, "copies of q, k, v", AT_MOST, GROWTH_GOAL, None, str(failure).partition("\n")[0])
    detail = f"within {GROWTH_GIB} GiB: {format_ms(ours.ms)} ms" if ours.ms else ours.note
    detail += f"; eager PyTorch {eager.note or 'can do it, too'}"
    return Target(name, "copies of q, k, v", AT_MOST, GROWTH_GOAL, ours.extra_units, detail)


GROUPS: dict[str, Callable[[Context], Iterator[Target]]] = {
    "table": table_targets,
    "window": window_targets,
    "mask": mask_targets,
    "avx2": avx2_targets,
    "threads": thread_targets,
    "overhead": overhead_targets,
    "memory": memory_targets,
    "textbook": textbook_targets,
    "decode": lambda context: model_targets.decode_targets(context.budget_s, context.say),
    "packed": lambda context: model_targets.packed_targets(context.budget_s, context.say),
    "llama": lambda context: model_targets.llama_targets(context.budget_s, context.say),
    "sweep": sweep_targets,
}


def run_targets(context: Context, groups: list[str]) -> Iterator[Target]:
    for group in groups:
        try:
            yield from GROUPS[group](context)
        except WrongResult as wrong:
            yield wrong_target(group, wrong)


def target_line(target: Target) -> str:
    measured = "" if target.measured is None else f" {target.measured:.2f}"
    goal = f"{target.relation} {target.goal:g}"
    return f"{target.name}: {target.quantity}{measured} ({goal}), {target.verdict}; {target.detail}"


def target_table(targets: list[Target]) -> str:
    lines = [
        [
            target.name,
            target.quantity,
            f"{target.relation} {target.goal:g}",
            "-" if target.measured is None else f"{target.measured:.2f}",
            target.verdict,
            target.detail,
        ]
        for target in targets
    ]
    missed = sum(target.verdict == "MISSED" for target in targets)
    unmeasured = sum(target.measured is None for target in targets)
    summary = f"{len(targets) - missed - unmeasured} of {len(targets)} targets met, {missed} missed"
    if unmeasured:
        summary += f", {unmeasured} not measured"
    return (
        text_table(["target", "quantity", "goal", "measured", "verdict", ""], lines, left=(0, 1, 5)) + "\n\n" + summary
    )


def target_as_dict(target: Target) -> dict[str, Any]:
    return {**asdict(target), "verdict": target.verdict}
