"""The benchmark: what it counts, that it refuses wrong numbers, and its command line from end to end."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import machine, measure, peers, report, sweep, targets, timing
from bench.__main__ import main
from bench.cases import DTYPES, Job, count_bytes, count_flop, default_jobs, full_jobs, interval_mask, visible_pairs
from bench.memory import measure_memory
from bench.peak import PeakMeter
from bench.target import AT_LEAST, AT_MOST, Target
from fastattn import reference
from tests.cases import BENCH_CASES, Case, Inputs, bench_case

ROOT = Path(__file__).resolve().parent.parent

COUNTED = [
    Case(7, 7),
    Case(5, 9, B=2, gqa=3),
    Case(9, 5, causal="bottom_right"),
    Case(9, 5, causal="top_left"),
    Case(17, 30, causal="bottom_right", window=(4, 2)),
    Case(30, 17, window=(3, 5)),
    Case(30, 30, window=(None, 0), B=3),
    Case(20, 33, window=(2, None), causal="top_left"),
    Case(19, 23, B=2, gqa=2, mask="11qk"),
    Case(19, 23, B=2, gqa=2, mask="b11k", causal="bottom_right"),
    Case(19, 23, B=2, gqa=2, mask="1hq1", window=(5, 5)),
    Case(19, 23, B=2, gqa=2, mask="bhqk", causal="top_left"),
    Case(130, 140, mask="11qk", mask_values="blocks"),
]


@pytest.mark.parametrize("case", COUNTED, ids=lambda case: case.id)
def test_pairs_are_those_that_the_reference_sees(case: Case) -> None:
    inputs = Job(case).make_inputs()
    visible = reference.visible(case.Lq, case.Lk, case.causal, case.window)
    if "mask" in inputs.kwargs:
        visible = visible & inputs.kwargs["mask"]
    assert visible_pairs(case, inputs) == int(visible.expand(case.B, case.Hq, case.Lq, case.Lk).sum())


def test_flop_and_bytes() -> None:
    case = Case(10, 20, D=64, B=2, Hkv=3, gqa=2)
    pairs = visible_pairs(case, Job(case).make_inputs())
    assert pairs == 2 * 6 * 10 * 20
    forward, backward, step = (count_flop(Job(case, direction=d), pairs) for d in ("forward", "backward", "step"))
    assert forward == 4 * pairs * 64
    assert backward == 2.5 * forward
    assert step == forward + backward
    uneven = replace(case, Dv=16)
    # Five matrix products: S and dQ and dK are D wide, dP and dV Dv wide.
    assert count_flop(Job(uneven, direction="backward"), 1) == 2 * (3 * 64 + 2 * 16)

    job = Job(case, "bfloat16")
    q, kv = 2 * 6 * 10 * 64, 2 * 3 * 20 * 64
    assert count_bytes(job, job.make_inputs()) == 2 * (2 * q + 2 * kv)
    assert count_bytes(replace(job, direction="backward"), job.make_inputs()) == 2 * (4 * q + 4 * kv)


def test_half_of_the_tiles_are_empty() -> None:
    half, dense = bench_case(2048, 64, mask="11qk", mask_values="blocks"), bench_case(2048, 64)
    assert 2 * visible_pairs(half, Job(half).make_inputs()) == visible_pairs(dense, Job(dense).make_inputs())


@pytest.mark.parametrize("direction", ["forward", "step"])
@pytest.mark.parametrize(
    "case",
    [
        Case(33, 33, D=8, causal="bottom_right", window=(5, 0)),
        Case(20, 33, D=8, causal="bottom_right"),
        Case(33, 33, D=8, causal="top_left", gqa=2),
        Case(20, 33, D=8, mask="b11k", mask_values="padding", B=2),
        Case(20, 33, D=8, bias="1hqk", window=(9, 9)),
    ],
    ids=lambda case: case.id,
)
def test_what_results_are_checked_against_is_right(case: Case, direction: str) -> None:
    """expected_results goes through SDPA, which has other forms for masks; the reference knows nothing of those."""
    job = Job(case, direction=direction)
    inputs = job.make_inputs()
    expected = measure.expected_results(job, inputs)
    inputs.require_grad()
    o = reference.attention(inputs.q, inputs.k, inputs.v, **inputs.kwargs, dtype=torch.float64)
    if direction == "forward":
        results = (o,)
    else:
        results = torch.autograd.grad(o, (inputs.q, inputs.k, inputs.v), inputs.d_o.to(o.dtype))
    for result, value in zip(results, expected, strict=True):
        torch.testing.assert_close(value, result.to(value.dtype), atol=1e-5, rtol=1e-5)


def test_interval_mask_is_the_reference_s() -> None:
    for case in COUNTED:
        visible = reference.visible(case.Lq, case.Lk, case.causal, case.window)
        assert torch.equal(interval_mask(case), visible.reshape(case.Lq, case.Lk)), case.id


def test_error_in_bounds() -> None:
    job, x = Job(Case(4, 4)), torch.ones(2, 3)
    assert measure.error_in_bounds(job, (x,), (x,)) == 0
    assert measure.error_in_bounds(job, (x + 1e-3,), (x,)) > 1
    assert measure.error_in_bounds(replace(job, dtype="bfloat16"), (x.bfloat16() + 0.0078125,), (x,)) < 1
    assert measure.error_in_bounds(job, (x * float("nan"),), (x,)) == float("inf")
    assert measure.error_in_bounds(job, (x[:1],), (x,)) == float("inf")
    assert measure.error_in_bounds(job, (x,), (0 * x,)) == float("inf")
    assert measure.error_in_bounds(job, (0 * x,), (0 * x,)) == 0


def _slightly_wrong(job: Job, inputs: object) -> peers.Prepared:
    right = peers.prepare_fastattn(job, inputs)  # type: ignore[arg-type]
    return peers.Prepared(right.runner, lambda: tuple(x + 0.01 for x in right.results()))


def test_wrong_numbers_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(Case(16, 16, D=8))
    ours, sdpa = peers.PEERS["fastattn"], peers.PEERS["sdpa"]
    monkeypatch.setattr(measure, "interleave", lambda *args, **kwargs: pytest.fail("timed"))
    with pytest.raises(measure.WrongResult, match="fp32-forward-dense-Lq16-Lk16-D8: off by"):
        measure.measure(job, [replace(ours, prepare=_slightly_wrong), sdpa], PeakMeter(1), 0.01)


def test_a_wrong_peer_is_noted_and_left_out() -> None:
    job = Job(Case(16, 16, D=8))
    wrong = replace(peers.PEERS["math"], prepare=_slightly_wrong)
    row = measure.measure(job, [peers.PEERS["fastattn"], peers.PEERS["sdpa"], wrong], PeakMeter(1), 0.01)
    assert set(row.timings) == {"fastattn", "sdpa"}
    assert row.notes["math"].startswith("wrong: off by")
    assert row.gflops() == pytest.approx(4 * 2 * 16 * 16 * 8 / (1e6 * row.timings["fastattn"].median_ms))


def _failing_at(call: int, prepare: Callable[[Job, Inputs], peers.Prepared]) -> Callable[[Job, Inputs], peers.Prepared]:
    """The same, but the call of that number, and each after it, raises."""

    def prepare_failing(job: Job, inputs: Inputs) -> peers.Prepared:
        right, calls = prepare(job, inputs), itertools.count(1)

        def fail() -> Any:
            if next(calls) >= call:
                raise torch.OutOfMemoryError("out of memory.\nMore words")
            return right.runner.call()

        return peers.Prepared(replace(right.runner, call=fail), right.results)

    return prepare_failing


@pytest.mark.parametrize("call", [1, 2, 5])
@pytest.mark.parametrize("name", ["sdpa", "math"])
def test_a_peer_that_fails_while_it_is_timed_is_left_out(name: str, call: int) -> None:
    chosen = [peers.PEERS[peer] for peer in ("fastattn", "sdpa", "math")]
    chosen = [replace(peer, prepare=_failing_at(call, peer.prepare)) if peer.name == name else peer for peer in chosen]
    row = measure.measure(Job(Case(256, 256, D=32)), chosen, PeakMeter(1), 0.01)
    assert set(row.timings) == {"fastattn", "sdpa", "math"} - {name}
    assert row.notes == {name: "failed: OutOfMemoryError: out of memory."}
    assert (row.speedup() is None) == (name == "sdpa")
    assert "fp32-forward" in report.case_table([row])
    assert report.row_as_dict(row)["notes"] == row.notes


def test_a_baseline_that_cannot_be_prepared_is_left_out() -> None:
    def fail(job: Job, inputs: Inputs) -> peers.Prepared:
        raise RuntimeError("no")

    chosen = [peers.PEERS["fastattn"], replace(peers.PEERS["sdpa"], prepare=fail)]
    row = measure.measure(Job(Case(16, 16, D=8)), chosen, PeakMeter(1), 0.01)
    assert set(row.timings) == {"fastattn"}
    assert row.notes == {"sdpa": "failed: RuntimeError: no"}


@pytest.mark.parametrize("call", [1, 3])
def test_ours_that_fails_ends_the_case(call: int) -> None:
    ours, sdpa = peers.PEERS["fastattn"], peers.PEERS["sdpa"]
    chosen = [replace(ours, prepare=_failing_at(call, ours.prepare)), sdpa]
    with pytest.raises(measure.OursFailed, match="fp32-forward-dense-Lq16-Lk16-D8: OutOfMemoryError: out"):
        measure.measure(Job(Case(16, 16, D=8)), chosen, PeakMeter(1), 0.01)


def test_memory_that_cannot_be_measured_costs_no_timing() -> None:
    class Meter(PeakMeter):
        def peak_memory(self, runner: timing.Runner) -> int | None:
            raise torch.OutOfMemoryError("full")

    row = measure.measure(Job(Case(16, 16, D=8)), [peers.PEERS["fastattn"], peers.PEERS["sdpa"]], Meter(1), 0.01)
    assert set(row.timings) == {"fastattn", "sdpa"}
    assert row.notes["fastattn"] == "its memory was not measured: OutOfMemoryError: full"


def test_json_is_whole_and_strict(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    here = machine.describe([])
    report.write_json(path, here, {"a": math.inf}, {"rows": [{"x": (1.5, math.nan)}], "n": 3})
    document = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert document["peaks_gflops"] == {"a": None}
    assert document["rows"] == [{"x": [1.5, None]}]
    assert document["n"] == 3
    with pytest.raises(TypeError):
        report.write_json(path, here, {}, {"rows": object()})
    assert json.loads(path.read_text()) == document
    assert list(path.parent.iterdir()) == [path]


def test_the_system_is_named_without_its_release() -> None:
    assert machine.describe([]).system == f"{platform.system()} {platform.machine()}"


def test_a_row_without_sdpa_is_drawn_without_a_ratio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import plot

    texts: list[str] = []
    monkeypatch.setattr(plot, "_save", lambda figure, path: texts.extend(t.get_text() for t in figure.axes[0].texts))
    with_both = measure.measure(
        Job(Case(16, 16, D=8)), [peers.PEERS["fastattn"], peers.PEERS["sdpa"]], PeakMeter(1), 0.01
    )
    alone = measure.measure(Job(Case(16, 16, D=8)), [peers.PEERS["fastattn"]], PeakMeter(1), 0.01)
    plot.plot_rows(tmp_path / "x.png", [alone, with_both], machine.describe([]))
    assert texts[0] == "no SDPA"
    assert texts[1].endswith("×")
    plot.plot_rows(tmp_path / "x.png", [alone], machine.describe([]))


def test_turns_alternate() -> None:
    turns: list[str] = []
    runners = [timing.Runner(name, lambda: sum(range(3000))) for name in "ab"]
    timings = timing.interleave(runners, 0.02, rounds=4, on_turn=turns.append)
    assert turns == ["a", "b"] * (len(turns) // 2)
    assert len(turns) >= 6
    for name in "ab":
        q25, q75 = timings[name].quartiles_ms
        assert 0 < q25 <= timings[name].median_ms <= q75
        assert timings[name].iqr_ms == q75 - q25


def test_peers() -> None:
    with pytest.raises(ValueError, match="unknown peers sdap; there are fastattn, sdpa, math"):
        peers.choose(["sdap"])
    chosen, notes = peers.choose(["math"])
    assert [peer.name for peer in chosen] == ["fastattn", "sdpa", "math"]
    assert notes == []
    chosen, notes = peers.choose([])
    on_cpu = [peer for peer in peers.PEERS.values() if "cpu" in peer.devices]
    absent = [peer for peer in on_cpu if peer.missing()]
    assert len(chosen) + len(absent) == len(on_cpu)
    assert [note.split(":")[0] for note in notes] == [peer.title for peer in absent]
    assert peers.choose(None)[1] == []


def test_peers_say_what_they_cannot_do() -> None:
    job = Job(Case(16, 16, D=8, softcap=2.0))
    with pytest.raises(peers.Unsupported, match="SDPA has no softcap"):
        peers.prepare_sdpa(job, job.make_inputs())
    job = Job(Case(16, 16, D=8), direction="step")
    with pytest.raises(peers.Unsupported, match="FlexAttention on CPU has no backward"):
        peers.prepare_flex(job, job.make_inputs())
    job = Job(bench_case(8192, 64))
    with pytest.raises(peers.Unsupported, match="score matrix"):
        peers.prepare_math(job, Job(Case(1, 1)).make_inputs())


def test_sweep_candidates() -> None:
    jobs = sweep.candidates(sdpa_cap_s=0.1)
    assert len({job.id for job in jobs}) == len(jobs) > 1000
    assert {job.dtype for job in jobs[:6]} == set(DTYPES)
    assert {job.direction for job in jobs} == {"forward", "step"}
    assert {job.case.Lk for job in jobs} == set(sweep.LENGTHS)
    assert {job.case.D for job in jobs} == set(sweep.DIMS)
    assert max(map(sweep.estimated_sdpa_s, jobs)) <= 0.1
    assert [job.id for job in jobs[:50]] == [job.id for job in sweep.candidates(sdpa_cap_s=0.1)[:50]]


def _point(ours_us: float, sdpa_us: float, direction: str = "forward", call_us: float | None = None) -> sweep.Point:
    return sweep.Point(Job(Case(4, 4), direction=direction), ours_us, sdpa_us, call_us or sdpa_us)


def test_sweep_judges_long_calls_by_ratio_and_short_ones_by_overhead() -> None:
    points = [_point(50, 100), _point(100, 90), _point(12, 8), _point(70, 50, "step", 9), _point(1, 20)]
    result = sweep.Sweep(points, 10)
    assert [point.counts for point in points] == [True, True, False, False, False]
    assert [sweep.looks_bad(point) for point in points] == [False, True, True, True, False]
    assert result.worst_ratio() is points[1]
    assert result.worst_excess("forward") is points[2]
    assert result.worst_excess("step") is points[3]
    text = sweep.sweep_report(result)
    assert "5 of 10 shapes, 2 of them" in text
    assert "0.900" in text
    assert "step: 1 shapes, at worst +20.0 us" in text


def test_sweep_ends_in_time_and_measures_bad_points_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    budgets = []

    def measure_point(job: Job, budget_s: float, *, check: bool = True) -> sweep.Point:
        budgets.append(budget_s)
        return replace(_point(100, 90 if check else 110), job=job)

    monkeypatch.setattr(sweep, "measure_point", measure_point)
    jobs = default_jobs()
    result = sweep.run_sweep(jobs, total_s=30)
    assert len(result.points) == len(jobs)
    assert all(point.measured_twice and point.ratio == 1.1 for point in result.points)
    assert len(budgets) == 2 * len(jobs)
    assert sweep.run_sweep(jobs, total_s=-1).points == []


def test_target_verdicts() -> None:
    at_least = Target("a", "x SDPA", AT_LEAST, 2.0, 2.5)
    assert at_least.verdict == "met"
    assert replace(at_least, measured=1.9).verdict == "MISSED"
    assert replace(at_least, relation=AT_MOST).verdict == "MISSED"
    assert replace(at_least, measured=None).verdict == "not measured"
    table = targets.target_table([at_least, replace(at_least, measured=1.9), replace(at_least, measured=None)])
    assert "1 of 3 targets met, 1 missed, 1 not measured" in table


def test_a_wrong_number_is_a_missed_target(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: object, **kwargs: object) -> None:
        raise measure.WrongResult("off")

    monkeypatch.setattr(targets, "measure", wrong)
    context = targets.Context(PeakMeter(1), 0.01, 1.0, lambda step: None)
    judged = list(targets.run_targets(context, ["table"]))
    assert len(judged) == len(targets.TABLE)
    assert {target.verdict for target in judged} == {"MISSED"}


def test_forced_isa_is_put_back() -> None:
    before = torch.ops.fastattn._isa()
    with targets.forced_isa("baseline"):
        assert torch.ops.fastattn._isa() == "baseline"
    assert torch.ops.fastattn._isa() == before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_memory_counts_what_a_score_matrix_takes() -> None:
    """The math backend keeps (B, H, L, L) matrices, 128 MiB each here; ours keeps none."""
    math, ours = (measure_memory(name, length=2048, threads=1) for name in ("math", "fastattn"))
    assert math.unit_bytes == 3 * 4 * 8 * 2048 * 64
    assert math.results_bytes == 4 * 4 * 8 * 2048 * 64
    assert math.extra_bytes > 200 << 20
    assert ours.extra_bytes < 60 << 20


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed == [job.id for job in default_jobs()]
    assert len(set(listed)) == len(listed) >= 15
    assert {name.split("-")[0] for name in listed} == {"fp32", "bf16", "fp16"}

    assert main(["--suite", "full", "--list", "--dtype", "bfloat16", "--direction", "step"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == len(BENCH_CASES)
    assert all(name.startswith("bf16-step-") for name in listed)

    assert main(["--suite", "targets", "--list"]) == 0
    assert capsys.readouterr().out.split() == list(targets.GROUPS)
    assert len({job.id for job in full_jobs()}) == len(full_jobs())


def test_command_line_rejects_what_it_cannot_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--case", "no such case"]) == 2
    assert "no case matches" in capsys.readouterr().err
    assert main(["--peers", "sdap"]) == 2
    assert "unknown peers sdap" in capsys.readouterr().err
    assert main(["--isa", "sse9"]) == 2
    assert "sse9" in capsys.readouterr().err
    for arguments in (["--threads", "0"], ["--dtype", "float8"], ["--suite", "all"]):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)


def test_table_and_json(tmp_path: Path) -> None:
    """A real run: one short case in both directions, one of them with a causal mask."""
    out = tmp_path / "results" / "result.json"
    command = [sys.executable, "-m", "bench", "--quick", "--case", "fp32-(forward|step)-topleft-Lq512", "--threads=1"]
    command += ["--budget=0.02", "--peers", "math", f"--json={out}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for column in ("case", "ms (IQR)", "GFLOP/s", "% of peak", "GB/s", "SDPA ms", "x SDPA", "x math"):
        assert column in done.stdout
    assert "Times faster than PyTorch SDPA" in done.stdout
    assert "1 thread;" in done.stdout
    assert f"JSON: {out}" in done.stdout

    document = json.loads(out.read_text())
    assert document["schema"] == report.SCHEMA
    assert document["machine"]["threads"] == 1
    assert document["machine"]["versions"]["torch"] == torch.__version__
    assert [row["id"] for row in document["rows"]] == [
        "fp32-forward-topleft-Lq512-Lk512-D64-H8",
        "fp32-step-topleft-Lq512-Lk512-D64-H8",
    ]
    pairs = 8 * 512 * 513 // 2
    for row, flop in zip(document["rows"], (4 * pairs * 64, 14 * pairs * 64), strict=True):
        assert row["visible_pairs"] == pairs
        assert row["flop"] == flop
        assert set(row["results"]) == {"fastattn", "sdpa", "math"}
        for result in row["results"].values():
            assert 0 < result["q25_ms"] <= result["median_ms"] <= result["q75_ms"]
            assert result["gflops"] == pytest.approx(flop / (1e6 * result["median_ms"]))
            assert result["percent_of_peak"] == pytest.approx(100 * result["gflops"] / row["peak_gflops"])
            assert result["error_in_bounds"] <= 1
        ours, sdpa = (row["results"][name]["median_ms"] for name in ("fastattn", "sdpa"))
        assert row["speedup"]["sdpa"] == pytest.approx(sdpa / ours)
    plot = out.with_suffix(".png").read_bytes()
    assert plot.startswith(b"\x89PNG")
    assert len(plot) > 20_000


def test_sweep_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sweep.json"
    arguments = ["--suite", "sweep", "--quick", "--case", "Lk(16|31)-D16(-|$)", "--sweep-time", "1", "--json", str(out)]
    assert main(arguments) == 0
    assert "Sweep: " in capsys.readouterr().out
    document = json.loads(out.read_text())
    points = document["sweep"]["points"]
    assert 0 < len(points) <= document["sweep"]["candidates"]
    assert all(point["ratio"] == point["sdpa_us"] / point["ours_us"] for point in points)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


SHORT_RUN = ["--quick", "--case", "fp32-forward-topleft-Lq512", "--budget", "0.01"]


@pytest.mark.parametrize("stop", ["ctrl-c", "sigterm"])
def test_a_run_that_is_stopped_keeps_what_it_has(
    stop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, seen = tmp_path / "result.json", []
    right = measure.measure

    def stopped_in_the_second(*args: Any, **kwargs: Any) -> measure.Row:
        if seen:
            document = json.loads(out.read_text())
            assert [row["id"] for row in document["rows"]] == seen
            assert document["unfinished"]
            if stop == "ctrl-c":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGTERM)
        row = right(*args, **kwargs)
        seen.append(row.job.id)
        return row

    monkeypatch.setattr(measure, "measure", stopped_in_the_second)
    before = signal.getsignal(signal.SIGTERM)
    arguments = ["--quick", "--case", "fp32-.*-topleft-Lq512", "--budget", "0.01", "--json", str(out)]
    assert main([*arguments, "--plot", str(tmp_path / "seen.png")]) == 1
    assert signal.getsignal(signal.SIGTERM) == before
    text, log = capsys.readouterr()
    assert f"JSON: {out}\nPlot: {tmp_path / 'seen.png'}\n" in text
    assert "Times faster than PyTorch SDPA" in text
    assert "stopped before its end" in log
    assert log.startswith(f"{seen[0]}: ")  # as it came
    document = json.loads(out.read_text())
    assert document["unfinished"]
    assert [row["id"] for row in document["rows"]] == seen
    assert len(seen) == 1


def test_a_plot_that_fails_costs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench import plot

    out = tmp_path / "result.json"

    def fail(*args: Any) -> None:
        assert not json.loads(out.read_text()).get("unfinished")
        raise RuntimeError("no font")

    monkeypatch.setattr(plot, "plot_rows", fail)
    assert main([*SHORT_RUN, "--json", str(out)]) == 0
    text, log = capsys.readouterr()
    assert f"JSON: {out}" in text
    assert "Plot: " not in text
    assert "a plot could not be drawn: RuntimeError: no font" in log


def test_no_plot_is_drawn_where_none_is_wanted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    assert main([*SHORT_RUN, "--json", str(out), "--plot", "none"]) == 0
    assert list(tmp_path.iterdir()) == [out]
    assert "Plot: " not in capsys.readouterr().out


def test_a_json_that_cannot_be_written_is_told_before_the_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "measure", lambda *args, **kwargs: pytest.fail("measured"))
    (tmp_path / "file").touch()
    assert main([*SHORT_RUN, "--json", str(tmp_path / "file" / "result.json")]) == 2
    assert "file" in capsys.readouterr().err


def test_tqdm_and_matplotlib_may_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    out = tmp_path / "result.json"
    assert main([*SHORT_RUN, "--json", str(out)]) == 0
    log = capsys.readouterr().err
    assert "no progress bar: tqdm is not installed" in log
    assert "no plots: matplotlib is not installed" in log
    assert list(tmp_path.iterdir()) == [out]


def test_the_benchmark_starts_without_tqdm_and_matplotlib() -> None:
    code = "import sys; sys.modules.update(tqdm=None, matplotlib=None); import bench.run"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
