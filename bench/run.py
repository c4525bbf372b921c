"""One run of the command: suites, their progress, and what they leave behind as JSON and plots.

The JSON is written again after each row, so that a run which is killed leaves what it had measured by then. Ctrl-C and
SIGTERM end the measuring, and the run goes on to its tables, its JSON and its plots. Those come last of all.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench import (
    cases,
    cuda,
    cuda_targets,
    decoding,
    growth,
    llama,
    machine,
    measure,
    model,
    packed,
    peak,
    peers,
    report,
    sweep,
    targets,
    textbook,
)
from bench.cases import Job
from bench.progress import Progress
from bench.target import Target
from bench.textbook_peers import ATTENTION, EAGER, Problem

RESULTS = Path(__file__).resolve().parent / "results" / "local"
NO_PLOT = "none"
SAVE_EVERY_S = 5.0  # in a sweep, which has a point every few milliseconds
COMPILED_CASES = 2  # for which FlexAttention is compiled, some seconds each, where no peers are asked for


def chosen_jobs(options: argparse.Namespace) -> list[Job]:
    if options.suite == "sweep":
        jobs = sweep.candidates(sdpa_cap_s=0.02 if options.quick else 0.15)
    elif options.suite == "full":
        jobs = cases.full_jobs(options.device)
    elif options.quick and not options.case:
        jobs = cases.quick_jobs(options.device)
    else:
        jobs = cases.default_jobs() if options.device == "cpu" else cases.cuda_default_jobs()
    return cases.select(jobs, pattern=options.case, dtypes=options.dtype, directions=options.direction)


def chosen_problems(options: argparse.Namespace) -> list[Problem]:
    if options.quick and not options.case:
        problems = textbook.quick_problems(options.device)
    else:
        problems = textbook.problems() if options.device == "cpu" else textbook.cuda_problems()
    return textbook.select(problems, pattern=options.case, dtypes=options.dtype, directions=options.direction)


def chosen_groups(options: argparse.Namespace, groups: Collection[str]) -> list[str]:
    if not options.case:
        return list(groups)
    chosen = [group for group in groups if group in options.case.split(",")]
    if not chosen:
        raise SystemExit(f"--suite {options.suite} takes as --case one or more of {','.join(groups)}")
    return chosen


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """As by Ctrl-C."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def step_by_step(progress: Progress) -> Callable[[str], None]:
    """Counts steps, for as many as there will be."""

    def say(step: str) -> None:
        progress.say(step)
        progress.advance()

    return say


class Run:
    """One run of the command: what it has measured so far, for the JSON and the plots."""

    def __init__(self, options: argparse.Namespace) -> None:
        started = time.monotonic()
        self.deadline = started + (options.time_limit or math.inf)
        if options.threads:
            torch.set_num_threads(options.threads)
        if options.isa:
            torch.ops.fastattn._set_isa(options.isa)
        self.options = options
        self.threads = torch.get_num_threads()
        self.on_gpu = options.device == "cuda"
        self.peers, self.absent = peers.choose(options.peers, options.device)
        self.meter: measure.Meter = cuda.CudaMeter() if self.on_gpu else peak.PeakMeter(self.threads)
        self.copy_gbytes = self.meter.measure_copy() if isinstance(self.meter, cuda.CudaMeter) else 0.0
        self.machine = machine.describe(self.peers, options.device)
        usual_budget_s = cuda_targets.BUDGET_S if self.on_gpu else 1.5
        self.budget_s = options.budget or (0.2 if options.quick else usual_budget_s)
        # Parts of the JSON, each asked for whenever it is written; an empty one is left out.
        self.sections: dict[str, Callable[[], Any]] = {}
        self.failures: list[str] = []
        self.drawings: list[Callable[[], Path]] = []  # each leaves a plot
        self.is_stopped = False
        self.saved_at = -math.inf
        self.compiled_cases = 0
        stem = RESULTS / f"{options.suite}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
        self.json = options.json or stem.with_suffix(".json")
        self.plot: Path | None = options.plot or self.json.with_suffix(".png")
        if str(self.plot) == NO_PLOT:
            self.plot = None
        elif importlib.util.find_spec("matplotlib") is None:
            print("no plots: matplotlib is not installed", file=sys.stderr)
            self.plot = None
        self.save()  # whether it can be written is better known before than after the measuring

    def second_plot(self, name: str) -> Path | None:
        return self.plot and self.plot.with_name(f"{self.plot.stem}-{name}{self.plot.suffix}")

    def save(self, *, is_finished: bool = False) -> None:
        sections = {name: section() for name, section in self.sections.items()}
        sections = {name: section for name, section in sections.items() if section}
        if not is_finished:
            sections["unfinished"] = True
        report.write_json(self.json, self.machine, self.meter.summary(), sections)
        self.saved_at = time.monotonic()

    @contextmanager
    def until_stopped(self) -> Iterator[None]:
        """What is measured within ends early when the command is told to end."""
        try:
            yield
        except KeyboardInterrupt:
            self.is_stopped = True
            self.failures.append("stopped before its end")

    def peers_of(self, job: Job) -> list[peers.Peer]:
        """All of them; those that compile only in a few cases, unless they were asked for."""
        if self.options.peers is not None:
            return self.peers
        compiling = job.direction == "forward" and not self.options.quick and self.compiled_cases < COMPILED_CASES
        self.compiled_cases += compiling
        return [peer for peer in self.peers if compiling or not peer.compiles]

    def time_cases(self, jobs: list[Job]) -> None:
        rows: list[measure.Row] = []
        self.sections["rows"] = lambda: [report.row_as_dict(row) for row in rows]
        with self.until_stopped(), Progress("case", len(jobs)) as progress:
            for job in jobs:
                progress.say(job.id)
                row = self.time_case(job, progress)
                if row is not None:
                    rows.append(row)
                    progress.result(report.row_line(row))
                    self.save()
                progress.advance()
        if not rows:
            return
        table = report.cuda_case_table(rows) if self.on_gpu else report.case_table(rows)
        print(table, report.peer_table(rows), report.speedup_table(rows), sep="\n\n", flush=True)
        if self.options.peers is not None:
            print("\n" + "\n".join((*report.notes(rows), *self.absent)))
        self.draw_rows(rows)

    def time_case(self, job: Job, progress: Progress) -> measure.Row | None:
        """None: it cannot be timed, and `failures` has the reason."""

        def say(step: str) -> None:
            progress.say(f"{job.id}: {step}")

        reason = ""
        try:
            row = measure.measure(job, self.peers_of(job), self.meter, self.budget_s, on_step=say)
            if peers.OURS in row.timings:
                return row
            reason = f"FAILED, not timed: {job.id}: {row.notes[peers.OURS]}"
        except measure.WrongResult as wrong:
            reason = f"WRONG, not timed: {wrong}"
        except measure.OursFailed as failure:
            reason = f"FAILED, not timed: {failure}"
        except Exception as failure:  # no memory for the inputs, say: the other rows are wanted all the same
            reason = f"FAILED, not timed: {job.id}: {measure.in_words(failure)}"
        self.failures.append(reason)
        progress.result(reason)
        return None

    def time_textbook(self, problems: list[Problem], names: Collection[str] | None = None) -> None:
        """names: who is timed beside ours; None: everybody."""
        results: list[textbook.Result] = []
        self.sections["textbook"] = lambda: [textbook.as_dict(result) for result in results]
        with self.until_stopped(), Progress("case", len(problems)) as progress:
            for problem in problems:
                progress.say(problem.id)
                try:
                    result = textbook.measure(problem, self.meter, self.budget_s, names=names, on_step=progress.say)
                except Exception as failure:  # the others are wanted all the same
                    self.failures.append(textbook.failure_line(problem, failure))
                    progress.result(self.failures[-1])
                else:
                    results.append(result)
                    progress.result(textbook.line(result))
                    self.save()
                progress.advance()
        if results:
            print("\n".join([textbook.TITLE, textbook.table(results), *textbook.notes(results)]), flush=True)
            path = self.plot if self.options.suite == "textbook" else self.second_plot("textbook")
            self.draw_later(path, lambda plot, path: plot.plot_textbook(path, results, self.machine))

    def time_models(self) -> None:
        for group in chosen_groups(self.options, MODEL_GROUPS):
            if not self.is_stopped:
                MODEL_GROUPS[group](self)
                print(flush=True)

    def time_llama(self) -> None:
        results: list[llama.Result] = []
        self.sections["llama"] = lambda: [llama.as_dict(result) for result in results]
        if importlib.util.find_spec("transformers") is None:
            self.failures.append("the model was not timed: transformers is not installed")
            return
        chosen = [phase for phase in llama.phases(self.options.quick) if phase.dtype in self.wanted_dtypes()]
        budget_s = 4 * self.budget_s  # a call takes up to seconds
        with self.until_stopped(), Progress("phase", len(chosen)) as progress:
            self.time_each(llama.measure_all(chosen, budget_s, progress.say), results, llama.line, progress)
        if results:
            print(llama.TITLE, llama.table(results), sep="\n", flush=True)

    def time_packed(self) -> None:
        results: list[packed.Result] = []
        self.sections["packed"] = lambda: [packed.as_dict(result) for result in results]
        chosen = [batch for batch in packed.batches(self.options.quick) if batch.dtype in self.wanted_dtypes()]
        with self.until_stopped(), Progress("batch", len(chosen)) as progress:
            timed = (packed.measure(batch, 2 * self.budget_s, progress.say) for batch in chosen)
            self.time_each(timed, results, packed.line, progress)
        if results:
            print(packed.TITLE, packed.table(results), sep="\n", flush=True)

    def time_decoding(self) -> None:
        results: list[decoding.Result] = []
        self.sections["decode"] = lambda: [decoding.as_dict(result) for result in results]
        chosen = [step for step in decoding.steps(self.options.quick) if step.dtype in self.wanted_dtypes()]
        with self.until_stopped(), Progress("step", len(chosen)) as progress:
            timed = (decoding.measure(step, 2 * self.budget_s, progress.say) for step in chosen)
            self.time_each(timed, results, decoding.line, progress)
        if results:
            print(decoding.TITLE, decoding.table(results), sep="\n", flush=True)

    def wanted_dtypes(self) -> Collection[str]:
        return self.options.dtype or cases.DTYPES

    def time_each(
        self, timed: Iterator[Any], results: list[Any], line: Callable[[Any], str], progress: Progress
    ) -> None:
        """Takes what `timed` measures into `results`, as far as it gets."""
        try:
            for result in timed:
                results.append(result)
                progress.result(line(result))
                progress.advance()
                self.save()
        except measure.WrongResult as wrong:
            self.failures.append(f"WRONG, not timed: {wrong}")

    def measure_growth(self) -> None:
        """How time and memory grow with the length, on a CPU: each point is a process of its own."""
        points: list[growth.Point] = []
        self.sections["growth"] = lambda: [growth.as_dict(point) for point in points]
        lengths = growth.QUICK_LENGTHS if self.options.quick else growth.LENGTHS
        with self.until_stopped(), Progress("point", growth.count(lengths)) as progress:
            for point in growth.measure_growth(lengths, threads=self.threads, say=progress.say):
                points.append(point)
                if point.note.startswith(growth.FAILED):
                    self.failures.append(f"{point.name}, {point.family}, L={point.length}: {point.note}")
                progress.advance()
                self.save()
        if points:
            print("\n" + growth.table(points), flush=True)
            self.draw_later(self.second_plot("growth"), lambda plot, path: plot.plot_growth(path, points, self.machine))

    def time_sweep(self, jobs: list[Job], total_s: float, plot_path: Path | None) -> None:
        result = sweep.Sweep([], len(jobs))
        self.sections["sweep"] = result.as_dict
        started = time.monotonic()
        with self.until_stopped(), Progress("s", round(total_s)) as progress:

            def on_point(point: sweep.Point) -> None:
                progress.say(point.job.id)
                progress.advance(to=round(time.monotonic() - started))
                if time.monotonic() > self.saved_at + SAVE_EVERY_S:
                    self.save()

            sweep.run_sweep(jobs, total_s=total_s, on_point=on_point, result=result)
        self.failures += [f"WRONG, not timed: {point.job.id}: {point.error}" for point in result.wrong()]
        self.report_sweep(result, plot_path)

    def draw_later(self, path: Path | None, draw: Callable[[Any, Path], None]) -> None:
        """draw: called with the module bench.plot, which needs matplotlib, and with the path."""
        if path is None:
            return

        def drawn() -> Path:
            from bench import plot

            draw(plot, path)
            return path

        self.drawings.append(drawn)

    def draw_rows(self, rows: list[measure.Row]) -> None:
        self.draw_later(self.plot, lambda plot, path: plot.plot_rows(path, rows, self.machine))

    def report_sweep(self, result: sweep.Sweep, path: Path | None) -> None:
        print(sweep.sweep_report(result), flush=True)
        self.sections["sweep"] = result.as_dict
        right = result.right()
        if right:
            self.draw_later(path, lambda plot, path: plot.plot_sweep(path, right, self.machine))

    def judge_targets(self) -> None:
        groups = chosen_groups(self.options, targets.GROUPS)
        sweep_s = self.options.sweep_time or (20 if self.options.quick else 180)
        assert isinstance(self.meter, peak.PeakMeter)
        with Progress("step") as progress:
            context = targets.Context(self.meter, self.budget_s, sweep_s, step_by_step(progress))
            self.sections["textbook"] = lambda: [textbook.as_dict(result) for result in context.textbook]
            judged = self.collect_targets(targets.run_targets(context, groups), context.rows, progress)
        self.report_targets(judged, context.rows)
        if context.sweep:
            print()
            self.report_sweep(context.sweep, self.second_plot("sweep"))

    def judge_cuda_targets(self) -> None:
        groups = chosen_groups(self.options, cuda_targets.GROUPS)
        with Progress("step") as progress:
            say = step_by_step(progress)
            context = cuda_targets.Context(self.meter, self.budget_s, self.deadline, self.copy_gbytes, say)
            self.sections["textbook"] = lambda: [textbook.as_dict(result) for result in context.textbook]
            judged = self.collect_targets(cuda_targets.run_targets(context, groups), context.rows, progress)
        if context.rows:
            print(report.cuda_case_table(context.rows), end="\n\n")
        self.report_targets(judged, context.rows)
        self.failures += context.failures

    def collect_targets(self, judging: Iterator[Target], rows: list[measure.Row], progress: Progress) -> list[Target]:
        """Those that `judging`, which fills `rows` as it goes, has come to when it ends or is stopped."""
        judged: list[Target] = []
        self.sections["targets"] = lambda: [targets.target_as_dict(target) for target in judged]
        self.sections["rows"] = lambda: [report.row_as_dict(row) for row in rows]
        with self.until_stopped():
            for target in judging:
                judged.append(target)
                progress.result(targets.target_line(target))
                self.save()
        return judged

    def report_targets(self, judged: list[Target], rows: list[measure.Row]) -> None:
        print(targets.target_table(judged), flush=True)
        self.failures += [
            f"WRONG, not timed: {target.detail}"
            for target in judged
            if target.quantity == "right numbers" and target.measured is not None
        ]
        if rows:
            self.draw_rows(rows)

    def train(self) -> None:
        path = self.second_plot("model")
        with self.until_stopped():
            try:
                result = model.train_model(threads=self.threads, plot=path, smoke=self.options.quick)
            except subprocess.CalledProcessError as failure:
                self.failures.append(f"the model's training failed with exit status {failure.returncode}")
                return
            self.sections["model"] = lambda: result
            if path is not None:
                self.drawings.append(lambda: path)  # the example has drawn it

    def finish(self) -> int:
        if isinstance(self.meter, cuda.CudaMeter):
            self.ask_gpu(self.meter)
        peaks = self.meter.summary()
        if peaks and self.on_gpu:
            gemm = max(peaks.values()) / 1e3
            print(
                f"\nMeasured in this run: {gemm:.0f} TFLOP/s in a bfloat16 GEMM, {self.copy_gbytes:.0f} GB/s in a copy"
            )
        elif peaks:
            listed = ", ".join(f"{key} {value:.0f} GFLOP/s" for key, value in peaks.items())
            print(f"\nLargest multiply-add peak measured in this run: {listed}")
        self.save(is_finished=not self.is_stopped)
        print(f"JSON: {self.json}", flush=True)
        for drawing in self.drawings:
            try:
                print(f"Plot: {drawing()}", flush=True)
            except Exception as failure:  # a picture is not worth the numbers
                print(f"a plot could not be drawn: {measure.in_words(failure)}", file=sys.stderr)
        for line in self.failures:
            print(line, file=sys.stderr)
        return 1 if self.failures else 0

    def ask_gpu(self, meter: cuda.CudaMeter) -> None:
        """Its state under load, which takes a second."""
        self.sections["copy_gbytes_per_s"] = lambda: self.copy_gbytes
        if self.is_stopped:
            return
        try:
            state = meter.state_under_load()
        except RuntimeError as failure:  # a kernel that failed has taken the context with it
            print(f"the GPU's state is not known: {measure.in_words(failure)}", file=sys.stderr)
        else:
            self.sections["gpu_under_load"] = lambda: state


MODEL_GROUPS: dict[str, Callable[[Run], None]] = {
    "decode": Run.time_decoding,
    "packed": Run.time_packed,
    "llama": Run.time_llama,
}


def run(options: argparse.Namespace) -> int:
    """The exit status: 0; 1 where a number was wrong, a case failed or the run was stopped; 2 where none was begun."""
    groups: dict[str, Collection[str]] = {
        "targets": targets.GROUPS,
        "cuda-targets": cuda_targets.GROUPS,
        "models": MODEL_GROUPS,
    }
    if options.suite in groups and options.list:
        print("\n".join(groups[options.suite]))
        return 0
    problems = chosen_problems(options) if options.suite == "textbook" else []
    jobs = [] if options.suite in groups or options.suite == "textbook" else chosen_jobs(options)
    if options.list:
        print("\n".join([*(problem.id for problem in problems), *(job.id for job in jobs)]))
        return 0
    if not jobs and not problems and options.suite not in groups:
        print("no case matches; --list prints their names", file=sys.stderr)
        return 2
    if options.device == "cuda" and (reason := cuda.obstacle()):
        print(f"there is nothing to measure on a GPU: {reason}", file=sys.stderr)
        return 2
    try:
        run = Run(options)
    except (ValueError, RuntimeError, OSError) as failure:  # an instruction set, a peer or a folder that does not exist
        print(failure, file=sys.stderr)
        return 2
    print("\n".join(run.machine.lines()), end="\n\n", flush=True)
    with interrupted_by_sigterm():
        run_suite(run, jobs, problems)
        return run.finish()


def run_suite(run: Run, jobs: list[Job], problems: list[Problem]) -> None:
    options = run.options
    narrowed = options.case or options.dtype or options.direction
    if options.suite == "targets":
        run.judge_targets()
    elif options.suite == "cuda-targets":
        run.judge_cuda_targets()
    elif options.suite == "models":
        run.time_models()
    elif options.suite == "textbook":
        run.time_textbook(problems)
        if not narrowed and not run.on_gpu and not run.is_stopped:
            run.measure_growth()
    elif options.suite == "sweep":
        run.time_sweep(jobs, options.sweep_time or (20 if options.quick else 240), run.plot)
    else:
        run.time_cases(jobs)
        if options.suite == "default" and not narrowed and not run.on_gpu and not run.is_stopped:
            print(flush=True)
            shapes = sweep.candidates(sdpa_cap_s=0.02)
            run.time_sweep(shapes, options.sweep_time or (3 if options.quick else 20), run.second_plot("sweep"))
            if not run.is_stopped:
                print(flush=True)
                short = textbook.quick_problems() if options.quick else textbook.short_problems()
                run.time_textbook(short, (EAGER, ATTENTION))
            if not options.no_model and not run.is_stopped:
                print(flush=True)
                run.train()
