"""One run of the command: suites, their progress bars, and what they leave behind as JSON and plots."""

from __future__ import annotations

import argparse
import datetime
import math
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from bench import cases, cuda, cuda_targets, machine, measure, model, peak, peers, plot, report, sweep, targets
from bench.cases import Job

RESULTS = Path(__file__).resolve().parent / "results" / "local"
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


def chosen_groups(options: argparse.Namespace, groups: Collection[str]) -> list[str]:
    if not options.case:
        return list(groups)
    chosen = [group for group in groups if group in options.case.split(",")]
    if not chosen:
        raise SystemExit(f"--suite {options.suite} takes as --case one or more of {','.join(groups)}")
    return chosen


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A bar that counts steps, for as many as there will be."""
    with tqdm(unit="step", leave=False, disable=None) as bar:

        def say(step: str) -> None:
            bar.set_postfix_str(step)
            bar.update()

        yield say


class Run:
    """One run of the command: what it has measured so far, for the JSON and the plots."""

    def __init__(self, options: argparse.Namespace) -> None:
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
        self.sections: dict[str, Any] = {}
        self.failures: list[str] = []
        self.plots: list[Path] = []
        self.compiled_cases = 0
        stem = RESULTS / f"{options.suite}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
        self.json = options.json or stem.with_suffix(".json")
        self.plot = options.plot or self.json.with_suffix(".png")

    def second_plot(self, name: str) -> Path:
        return self.plot.with_name(f"{self.plot.stem}-{name}{self.plot.suffix}")

    def peers_of(self, job: Job) -> list[peers.Peer]:
        """All of them; those that compile only in a few cases, unless they were asked for."""
        if self.options.peers is not None:
            return self.peers
        compiling = job.direction == "forward" and not self.options.quick and self.compiled_cases < COMPILED_CASES
        self.compiled_cases += compiling
        return [peer for peer in self.peers if compiling or not peer.compiles]

    def time_cases(self, jobs: list[Job]) -> None:
        rows = []
        with tqdm(jobs, unit="case", leave=False, disable=None) as bar:

            def say(step: str) -> None:
                bar.set_postfix_str(step)

            for job in bar:
                bar.set_description_str(job.id)
                try:
                    rows.append(measure.measure(job, self.peers_of(job), self.meter, self.budget_s, on_step=say))
                except measure.WrongResult as wrong:
                    self.failures.append(f"WRONG, not timed: {wrong}")
        if not rows:
            return
        table = report.cuda_case_table(rows) if self.on_gpu else report.case_table(rows)
        print(table, report.peer_table(rows), report.speedup_table(rows), sep="\n\n")
        if self.options.peers is not None:
            print("\n" + "\n".join((*report.notes(rows), *self.absent)))
        self.sections["rows"] = [report.row_as_dict(row) for row in rows]
        self.plot_rows(rows)

    def time_sweep(self, jobs: list[Job], total_s: float, plot_path: Path) -> None:
        with tqdm(total=round(total_s), unit="s", leave=False, disable=None) as bar:

            def on_point(point: sweep.Point) -> None:
                bar.set_postfix_str(point.job.id)
                bar.update(max(0, min(bar.total, round(bar.format_dict["elapsed"])) - bar.n))

            result = sweep.run_sweep(jobs, total_s=total_s, on_point=on_point)
        self.failures += [f"WRONG, not timed: {point.job.id}: {point.error}" for point in result.wrong()]
        self.report_sweep(result, plot_path)

    def plot_rows(self, rows: list[measure.Row]) -> None:
        plot.plot_rows(self.plot, rows, self.machine)
        self.plots.append(self.plot)

    def report_sweep(self, result: sweep.Sweep, path: Path) -> None:
        print(sweep.sweep_report(result))
        self.sections["sweep"] = result.as_dict()
        if result.right():
            plot.plot_sweep(path, result.right(), self.machine)
            self.plots.append(path)

    def judge_targets(self) -> None:
        groups = chosen_groups(self.options, targets.GROUPS)
        sweep_s = self.options.sweep_time or (20 if self.options.quick else 180)
        assert isinstance(self.meter, peak.PeakMeter)
        with progress() as say:
            context = targets.Context(self.meter, self.budget_s, sweep_s, say)
            judged = targets.run_targets(context, groups)
        self.report_targets(judged, context.rows)
        if context.sweep:
            print()
            self.report_sweep(context.sweep, self.second_plot("sweep"))

    def judge_cuda_targets(self) -> None:
        groups = chosen_groups(self.options, cuda_targets.GROUPS)
        assert isinstance(self.meter, cuda.CudaMeter)
        deadline = time.monotonic() + (self.options.time_limit or math.inf)
        with progress() as say:
            context = cuda_targets.Context(self.meter, self.budget_s, deadline, self.copy_gbytes, say)
            judged = cuda_targets.run_targets(context, groups)
        if context.rows:
            print(report.cuda_case_table(context.rows), end="\n\n")
        self.report_targets(judged, context.rows)

    def report_targets(self, judged: list[targets.Target], rows: list[measure.Row]) -> None:
        print(targets.target_table(judged))
        self.failures += [
            f"WRONG, not timed: {target.detail}"
            for target in judged
            if target.quantity == "right numbers" and target.measured is not None
        ]
        self.sections["targets"] = [targets.target_as_dict(target) for target in judged]
        if rows:
            self.sections["rows"] = [report.row_as_dict(row) for row in rows]
            self.plot_rows(rows)

    def train(self) -> None:
        path = self.second_plot("model")
        try:
            self.sections["model"] = model.train_model(threads=self.threads, plot=path, smoke=self.options.quick)
            self.plots.append(path)
        except subprocess.CalledProcessError as failure:
            self.failures.append(f"the model's training failed with exit status {failure.returncode}")

    def finish(self) -> int:
        if self.on_gpu:  # while it is still warm from the work
            self.sections["gpu_at_the_end"] = cuda.query(*cuda.STATE)
            self.sections["copy_gbytes_per_s"] = self.copy_gbytes
        peaks = self.meter.summary()
        if peaks and self.on_gpu:
            gemm = max(peaks.values()) / 1e3
            print(
                f"\nMeasured in this run: {gemm:.0f} TFLOP/s in a bfloat16 GEMM, {self.copy_gbytes:.0f} GB/s in a copy"
            )
        elif peaks:
            listed = ", ".join(f"{key} {value:.0f} GFLOP/s" for key, value in peaks.items())
            print(f"\nLargest multiply-add peak measured in this run: {listed}")
        report.write_json(self.json, self.machine, peaks, self.sections)
        print(f"JSON: {self.json}")
        for path in self.plots:
            print(f"Plot: {path}")
        for failure in self.failures:
            print(failure, file=sys.stderr)
        return 1 if self.failures else 0


def run(options: argparse.Namespace) -> int:
    """The exit status: 0; 1 where a number was wrong; 2 where there was nothing to do."""
    groups: dict[str, Collection[str]] = {"targets": targets.GROUPS, "cuda-targets": cuda_targets.GROUPS}
    if options.suite in groups and options.list:
        print("\n".join(groups[options.suite]))
        return 0
    jobs = [] if options.suite in groups else chosen_jobs(options)
    if options.list:
        print("\n".join(job.id for job in jobs))
        return 0
    if not jobs and options.suite not in groups:
        print("no case matches; --list prints their names", file=sys.stderr)
        return 2
    if options.device == "cuda" and (reason := cuda.obstacle()):
        print(f"there is nothing to measure on a GPU: {reason}", file=sys.stderr)
        return 2
    try:
        run = Run(options)
    except (ValueError, RuntimeError) as failure:  # an instruction set or a peer that does not exist
        print(failure, file=sys.stderr)
        return 2
    print("\n".join(run.machine.lines()), end="\n\n", flush=True)
    if options.suite == "targets":
        run.judge_targets()
    elif options.suite == "cuda-targets":
        run.judge_cuda_targets()
    elif options.suite == "sweep":
        run.time_sweep(jobs, options.sweep_time or (20 if options.quick else 240), run.plot)
    else:
        run.time_cases(jobs)
        narrowed = options.case or options.dtype or options.direction
        if options.suite == "default" and not narrowed and not run.on_gpu:
            print(flush=True)
            shapes = sweep.candidates(sdpa_cap_s=0.02)
            run.time_sweep(shapes, options.sweep_time or (3 if options.quick else 20), run.second_plot("sweep"))
            if not options.no_model:
                print(flush=True)
                run.train()
    return run.finish()
