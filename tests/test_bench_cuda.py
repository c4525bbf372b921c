"""The benchmark on a GPU, as far as it can be tested without one: what is timed, in which order, what comes of it."""

from __future__ import annotations

import itertools
import json
import math
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from bench import cases, cuda, cuda_packed, cuda_targets, machine, measure, peers, report, targets, timing
from bench.__main__ import main
from bench.cases import Job, count_bytes, count_flop, visible_pairs
from fastattn import reference
from tests.cases import Case, make_inputs

without_gpu = pytest.mark.skipif(cuda.obstacle() is None, reason="there is a GPU, on which this would run for minutes")


class Gpu:
    """Stands in for torch.cuda: writes down what is asked of it; each event happens a millisecond after the last."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.ticks = itertools.count()

    def Event(self, *, enable_timing: bool) -> Any:
        assert enable_timing
        gpu = self

        class Event:
            def record(self) -> None:
                self.tick = next(gpu.ticks)
                gpu.log.append("event")

            def elapsed_time(self, later: Any) -> float:
                return float(later.tick - self.tick)

        return Event()

    def synchronize(self) -> None:
        self.log.append("wait")

    def _sleep(self, cycles: int) -> None:
        assert 0 < cycles <= cuda.CYCLES_PER_S * cuda.MAX_SLEEP_S
        self.log.append("sleep")
        self.slept_s = cycles / cuda.CYCLES_PER_S

    def current_device(self) -> int:
        return 0

    def get_device_capability(self, device: torch.device) -> tuple[int, int]:
        return 9, 0

    def get_device_properties(self, device: Any) -> Any:
        return SimpleNamespace(L2_cache_size=3 << 20, uuid="6f4a-11")

    def reset_peak_memory_stats(self) -> None:
        self.peak = self.memory_allocated()

    def memory_allocated(self) -> int:
        return 100

    def max_memory_allocated(self) -> int:
        return self.peak + 7 * self.log.count("call")


def runner_of(gpu: Gpu) -> timing.Runner:
    @contextmanager
    def context() -> Iterator[None]:
        gpu.log.append("(")
        yield
        gpu.log.append(")")

    return timing.Runner("ours", lambda: gpu.log.append("call"), context)


def test_calls_back_to_back() -> None:
    """One sample is the mean of several short calls, and the host is ahead of the GPU from the start."""
    gpu = Gpu()
    clock = cuda.CudaClock(gpu=gpu)
    clock.host_s["ours"] = 1e-6
    samples = clock.take_turn(runner_of(gpu), estimate_s=timing.SAMPLE_S / 3, slot_s=2 * timing.SAMPLE_S)
    sample = ["event", "call", "call", "call", "event"]
    assert gpu.log == ["(", "wait", "sleep", *sample, *sample, "wait", ")"]
    assert samples == [1 / 3, 1 / 3]


def test_calls_after_a_flush() -> None:
    """What flushes L2 lies outside of what is timed, and every call has its own."""
    gpu = Gpu()
    clock = cuda.CudaClock(lambda: gpu.log.append("flush"), gpu)
    clock.host_s["ours"] = 1e-6
    samples = clock.take_turn(runner_of(gpu), estimate_s=1e-5, slot_s=2.5e-5)
    sample = ["flush", "event", "call", "event"]
    assert gpu.log == ["(", "wait", "sleep", *sample, *sample, "wait", ")"]
    assert samples == [1.0, 1.0]


def test_estimate_warms_up_first() -> None:
    gpu = Gpu()
    clock = cuda.CudaClock(gpu=gpu)
    assert clock.estimate(runner_of(gpu)) == pytest.approx(1e-3)
    assert gpu.log[:4] == ["(", "call", "call", "wait"]
    assert clock.host_s["ours"] > 0


@pytest.mark.parametrize("estimate_s", [1e-7, 1e-5, 1e-3, 10.0])
def test_a_turn_is_neither_empty_nor_longer_than_the_queue(estimate_s: float) -> None:
    gpu = Gpu()
    samples = cuda.CudaClock(gpu=gpu).take_turn(runner_of(gpu), estimate_s=estimate_s, slot_s=0.1)
    assert 1 <= len(samples) <= cuda.MAX_SAMPLES
    assert 1 <= gpu.log.count("call") <= cuda.MAX_CALLS


@pytest.mark.parametrize("flushes", [False, True])
@pytest.mark.parametrize("host_s", [1e-6, 1e-4, 1e-2, 10.0])
def test_the_wait_before_a_turn_is_no_longer_than_the_turn(host_s: float, flushes: bool) -> None:
    gpu = Gpu()
    clock = cuda.CudaClock((lambda: None) if flushes else None, gpu)
    clock.host_s["ours"] = host_s
    samples = clock.take_turn(runner_of(gpu), estimate_s=5e-6, slot_s=6e-3)
    calls = gpu.log.count("call")
    assert calls % len(samples) == 0
    one_call = cuda.PATIENCE * host_s
    assert gpu.slept_s == pytest.approx(min(cuda.MAX_SLEEP_S, one_call * calls), rel=1e-3)
    assert gpu.slept_s <= max(6e-3, one_call) * 1.001
    assert clock.host_s["ours"] < 1e-2  # as it was this time


def test_what_nvidia_smi_answers() -> None:
    names = ("clocks.sm", "power.draw", "temperature.gpu")
    assert cuda.parse_query(names, "1980, 345.21, 41\n") == {
        "clocks.sm": "1980",
        "power.draw": "345.21",
        "temperature.gpu": "41",
    }
    assert cuda.parse_query(names, "1980, [N/A], 41\n1, 2, 3\n") == {"clocks.sm": "1980", "temperature.gpu": "41"}
    for nothing in ("[Not Supported]", "[Unknown Error]", "[N/A]", "[GPU requires reset]"):
        assert cuda.parse_query(names, f"{nothing}, 345.21, {nothing}") == {"power.draw": "345.21"}
    assert cuda.parse_query(names, "No devices were found\n") == {}
    assert cuda.parse_query(names, "") == {}


def test_nvidia_smi_is_asked_for_the_gpu_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuda.gpu_id(Gpu()) == "GPU-6f4a-11"
    monkeypatch.setattr(Gpu, "get_device_properties", lambda self, device: SimpleNamespace())
    assert cuda.gpu_id(Gpu()) == "0"

    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\n[ "$3" = --id=GPU-7 ] && echo "1980, 41"\n')
    tool.chmod(0o755)
    monkeypatch.setattr(cuda, "gpu_id", lambda: "GPU-7")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert cuda.query("clocks.sm", "temperature.gpu") == {"clocks.sm": "1980", "temperature.gpu": "41"}
    monkeypatch.setattr(cuda, "gpu_id", lambda: "GPU-8")
    assert cuda.query("clocks.sm", "temperature.gpu") == {}


def test_what_flushes_a_cache_is_larger_than_it() -> None:
    written = cuda.make_flush(torch.device("cpu"), Gpu())()
    assert written.nbytes == 4 * (3 << 20)
    assert bool((written == 1).all())


def test_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "GEMM_SIZE", 64)
    monkeypatch.setattr(cuda, "COPY_BYTES", 1 << 16)
    monkeypatch.setattr(cuda, "WARM_UP_S", 0.02)
    gpu = Gpu()
    meter = cuda.CudaMeter(gpu, torch.device("cpu"))
    assert meter.level == "sm_90"
    assert meter.summary() == {}
    # Each of the stub's events is a millisecond after the last: so long does a call take there.
    assert meter.measure("float32") == pytest.approx(2 * 64**3 / 1e6)
    assert meter.measure_copy() == pytest.approx(2 * (1 << 16) / 1e6)
    assert meter.summary() == {"bfloat16 GEMM": pytest.approx(2 * 64**3 / 1e6)}
    gpu.log.clear()
    assert meter.peak_memory(runner_of(gpu)) == 7
    assert gpu.log == ["wait", "(", "call", ")", "wait"]
    assert {meter.clock.flush is None, meter.flushed_clock.flush is None} == {True, False}

    loads: list[int] = []

    def query(*names: str) -> dict[str, str]:
        before = gpu.log.count("wait")
        deadline = time.monotonic() + 10
        while gpu.log.count("wait") < before + 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        loads.append(gpu.log.count("wait") - before)
        return dict.fromkeys(names, "1")

    monkeypatch.setattr(cuda, "query", query)
    assert meter.state_under_load() == dict.fromkeys(cuda.STATE, "1")
    assert loads[0] >= 2  # it works on while it is asked


# ------------------------------------------------------------------------------------------------------------- cases


def test_jobs() -> None:
    for jobs in (cases.cuda_default_jobs(), cases.full_jobs("cuda"), cases.quick_jobs("cuda")):
        assert len({job.id for job in jobs}) == len(jobs) > 0
        assert {job.device for job in jobs} == {"cuda"}
    lengths = [cases.training_case(L, D) for L in cuda_targets.LENGTHS for D in cuda_targets.DIMS]
    assert {case.B * case.Lq for case in lengths} == {16384}
    assert {case.Hq * case.D for case in lengths} == {2048}
    assert (min(cuda_targets.LENGTHS), max(cuda_targets.LENGTHS)) == (512, 16384)
    for direction in ("forward", "backward"):
        jobs = cuda_targets.training_jobs(direction)
        assert len({job.id for job in jobs}) == 2 * 2 * 6
        assert {job.dtype for job in jobs} == {"bfloat16"}
    assert len({job.id for job in cuda_targets.feature_jobs()}) == len(cuda_targets.feature_jobs())


def test_decoding_reads_each_key_once() -> None:
    job = Job(cases.decode_case(2), "bfloat16")
    inputs = job.make_inputs()
    keys, rows = 2 * 8 * 8192 * 128, 2 * 64 * 128
    assert count_bytes(job, inputs) == 2 * (2 * keys + 2 * rows)
    assert count_flop(job, visible_pairs(job.case, inputs)) == 4 * 2 * 64 * 8192 * 128


def test_a_bias_gradient_is_written_once() -> None:
    case = replace(cases.BIAS_CASE, Lq=64, Lk=64)
    job = Job(case, "bfloat16", "backward", bias_gradient=True)
    inputs = job.make_inputs()
    bias = inputs.kwargs["bias"]
    assert bias.shape == (1, 16, 64, 64)
    assert count_bytes(job, inputs) - count_bytes(replace(job, bias_gradient=False), inputs) == bias.nbytes
    assert job.id == replace(job, bias_gradient=False).id + "-dbias"


@pytest.mark.parametrize(
    "case",
    [
        Case(20, 33, D=8, Dv=12, B=2, gqa=3, causal="top_left", scale=0.5),
        Case(33, 20, D=8, window=(3, 4), softcap=2.0, dropout_p=0.1),
    ],
    ids=lambda case: case.id,
)
def test_inputs_drawn_on_the_device_are_like_the_table_s(case: Case) -> None:
    drawn, made = cases.draw_on("cpu", case, torch.bfloat16), make_inputs(case, torch.bfloat16)
    for name in ("q", "k", "v", "d_o", "d_lse"):
        x, y = getattr(drawn, name), getattr(made, name)
        assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())
        assert 0.8 < float(x.float().std()) < 1.2
    assert drawn.kwargs == made.kwargs
    assert torch.equal(drawn.q, cases.draw_on("cpu", case, torch.bfloat16).q)


def test_inputs_that_move_stay_the_same() -> None:
    case = Case(20, 33, D=8, bias="1hqk", mask="b11k", sinks=True, causal=True)
    made = make_inputs(case, torch.float32)
    moved = cases.move_to("cpu", made)
    assert moved.kwargs.keys() == made.kwargs.keys()
    assert all(torch.equal(moved.kwargs[name], made.kwargs[name]) for name in ("bias", "mask", "sinks"))
    assert torch.equal(moved.v, made.v)


# ------------------------------------------------------------------------------------------------------------- peers


def test_peers_of_a_gpu() -> None:
    chosen, notes = peers.choose(None, "cuda")
    assert [peer.name for peer in chosen] == ["fastattn", "sdpa", "flash", "cudnn", "efficient", "math", "flex"]
    assert notes == []
    with pytest.raises(ValueError, match="unknown peers onnxruntime; there are fastattn, sdpa, flash"):
        peers.choose(["onnxruntime"], "cuda")
    with pytest.raises(ValueError, match="unknown peers flash"):
        peers.choose(["flash"])


def test_a_backend_serves_alone_or_says_why_not() -> None:
    """The CPU has a flash backend, and nothing like cuDNN's."""
    job = Job(Case(30, 30, D=16, causal="top_left"))
    inputs = job.make_inputs()
    flash = peers.PEERS["flash"].prepare(job, inputs)
    assert measure.error_in_bounds(job, flash.results(), measure.expected_results(job, inputs)) <= 1
    with pytest.raises(peers.Unsupported, match="not served"):
        peers.PEERS["cudnn"].prepare(job, inputs)


def test_why_a_backend_refused() -> None:
    tail = " (Triggered internally at sdp_utils.cpp:850.)"
    warned = [
        "Memory efficient kernel not used because:",
        "Memory Efficient attention has been runtime disabled.",
        "Flash attention kernel not used because:",
        "Flash Attention does not support non-null attn_mask.",
        "cuDNN attention kernel not used because:",
        "cuDNN attention has been runtime disabled.",
    ]
    warned = [line + tail for line in warned]
    assert peers.why_refused(SDPBackend.FLASH_ATTENTION, warned) == (
        "not served: Flash Attention does not support non-null attn_mask."
    )
    assert peers.why_refused(SDPBackend.EFFICIENT_ATTENTION, warned[2:]) == "not served"
    assert peers.why_refused(SDPBackend.FLASH_ATTENTION, []) == "not served"


@pytest.mark.parametrize("direction", ["backward", "step"])
@pytest.mark.parametrize("name", ["fastattn", "sdpa", "math"])
def test_bias_gradients(name: str, direction: str) -> None:
    job = Job(Case(20, 33, D=8, B=2, gqa=1, bias="1hqk"), "float32", direction, bias_gradient=True)
    inputs = job.make_inputs()
    expected = measure.expected_results(job, inputs)
    q, k, v, bias = (x.double().requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.kwargs["bias"]))
    exact = torch.autograd.grad(reference.attention(q, k, v, bias=bias), (q, k, v, bias), inputs.d_o.double())
    for wanted, value in zip(exact, expected, strict=True):
        torch.testing.assert_close(value.double(), wanted, atol=1e-5, rtol=1e-5)
    results = peers.PEERS[name].prepare(job, inputs).results()
    assert len(results) == 4
    assert results[3].shape == (1, 2, 20, 33)
    assert measure.error_in_bounds(job, results, expected) <= 1


# ----------------------------------------------------------------------------------------------------------- results


class Meter:
    """Stands in for bench.cuda.CudaMeter on a machine without a GPU."""

    threads = 0
    level = "sm_90"
    clock = timing.WallClock()
    flushed_clock = timing.WallClock()

    def measure(self, dtype: str, threads: int | None = None) -> float:
        return 800e3

    def peak_memory(self, runner: timing.Runner) -> int:
        return 3 << 20

    def summary(self) -> dict[str, float]:
        return {"bfloat16 GEMM": 800e3}


class WholeMeter(Meter, cuda.CudaMeter):
    """The same, for a whole run."""

    def __init__(self) -> None:
        pass

    def measure_copy(self) -> float:
        return 4000.0

    def state_under_load(self) -> dict[str, str]:
        return {"clocks.sm": "1755"}


GPU = cuda.Gpu("NVIDIA H200", "90", 132, 140 << 30, 60 << 20, "580.1", "13.0", "91000", {"clocks.sm": "1980"})


def make_context(deadline: float = math.inf) -> cuda_targets.Context:
    return cuda_targets.Context(Meter(), 0.005, deadline, 4000.0, lambda step: None)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs are few and small, and stay here."""

    def shrink(jobs: list[Job]) -> list[Job]:
        small = {"B": 1, "Hkv": 2, "Lq": 16, "Lk": 16, "D": 16}
        return [replace(job, case=replace(job.case, **small | ({"Lq": 1} if job.case.Lq == 1 else {}))) for job in jobs]

    monkeypatch.setattr(cuda_targets, "on_cuda", shrink)
    monkeypatch.setattr(cuda_targets, "LENGTHS", cuda_targets.LENGTHS[:1])
    monkeypatch.setattr(cuda_targets, "BENCH_CASES", cuda_targets.BENCH_CASES[:2])
    # In the place of what compiles for a minute: SDPA, which on a CPU has a backward pass too.
    flex = replace(peers.PEERS["flex"], prepare=lambda job, inputs: rename(peers.prepare_sdpa(job, inputs), "flex"))
    monkeypatch.setitem(peers.PEERS, "flex", flex)


def rename(prepared: peers.Prepared, name: str) -> peers.Prepared:
    return replace(prepared, runner=replace(prepared.runner, name=name))


def test_table_and_json() -> None:
    job = Job(Case(16, 16, D=8))
    row = measure.measure(job, [peers.PEERS[name] for name in ("fastattn", "sdpa", "flash")], Meter(), 0.01)
    row.timings["fastattn"] = timing.Timing((2.0,))
    row.timings["sdpa"], row.timings["flash"] = timing.Timing((4.0,)), timing.Timing((3.0,))
    row.flushed["fastattn"] = timing.Timing((2.5,))
    row.flop, row.bytes = 10**12, 10**10
    header, _, line = report.cuda_case_table([row]).splitlines()
    assert header.split("  ")[0] == "case"
    assert header.split()[-4:] == ["x", "sdpa", "x", "flash"]
    # 500 TFLOP/s in 2 ms, of 800; 4 TB/s in 2.5 ms.
    assert line.split() == [job.id, "2.000", "(0.0000)", "2.500", "500", "62", "4000", "3", "2.00", "1.50"]

    document = json.loads(json.dumps(report.row_as_dict(row)))
    assert document["isa"] == "sm_90"
    assert document["device"] == "cpu"
    ours = document["results"]["fastattn"]
    assert ours["median_ms"] == 2.0
    assert ours["flushed"] == {"median_ms": 2.5, "q25_ms": 2.5, "q75_ms": 2.5, "samples": 1, "gbytes_per_s": 4000.0}
    assert ours["peak_memory_bytes"] == 3 << 20
    assert document["speedup"] == {"sdpa": 2.0, "flash": 1.5}


def test_a_cpu_has_no_flushed_times() -> None:
    from bench.peak import PeakMeter

    row = measure.measure(Job(Case(16, 16, D=8)), [peers.PEERS["fastattn"], peers.PEERS["sdpa"]], PeakMeter(1), 0.005)
    assert row.flushed == row.memory_bytes == {}
    assert "flushed" not in report.row_as_dict(row)["results"]["fastattn"]
    assert report.cuda_case_table([row]).splitlines()[2].split()[3] == "-"


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("group", [x for x in cuda_targets.GROUPS if x not in ("textbook", "packed", "cache")])
def test_targets(group: str) -> None:
    context = make_context()
    judged = list(cuda_targets.run_targets(context, [group]))
    assert judged
    assert len(context.rows) == len(judged)
    assert not [target for target in judged if target.quantity == "right numbers"]
    if group in ("forward", "backward"):
        assert {target.quantity for target in judged} == {"x SDPA, flash backend"}
        assert {target.goal for target in judged} == {cuda_targets.FLASH_GOALS[group]}
        assert {target.verdict for target in judged} <= {"met", "MISSED"}
        assert "of a GEMM; sdpa " in judged[0].detail
    elif group == "decode":
        assert len(judged) == len(cuda_targets.DECODE_BATCHES)
        assert all(target.measured is not None and 0 < target.measured < 75 for target in judged)  # of 4 TB/s
        assert "of 4000; sdpa " in judged[0].detail
    elif group == "flex":
        assert [row.job.direction for row in context.rows] == ["forward", "backward"] * 2 + ["forward"]
        assert {target.quantity for target in judged} == {"x FlexAttention, compiled"}
        assert {target.goal for target in judged} == {1.0}
        assert all(target.measured is not None and "; sdpa 0; flex 0" in target.detail for target in judged)
    else:
        assert {target.quantity for target in judged} == {"x SDPA"}
        assert {target.goal for target in judged} == {2.0 if group == "features" else 1.0}


def test_packed_and_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every figure is measured, and a wrong result is not timed."""
    for name in ("BATCHES", "DECODING"):
        monkeypatch.setattr(cuda_packed, name, list(getattr(cuda_packed, name)))
    assert {batch.device for batch in cuda_packed.BATCHES} == {job.device for job in cuda_packed.DECODING} == {"cuda"}
    cuda_packed.on_cpu()
    context = make_context()
    judged = list(cuda_targets.run_targets(context, ["packed", "cache"]))
    assert not context.failures
    assert [target.quantity for target in judged] == [
        "of the dense rate", "x padded SDPA", *(f"{name}: x contiguous" for name in cuda_packed.GOALS)
    ]  # fmt: skip
    assert all(target.measured is not None and target.measured > 0 for target in judged)
    assert "sdpa " in judged[-1].detail

    def wrong(*_: Any, **__: Any) -> Any:
        raise measure.WrongResult("off")

    monkeypatch.setattr(cuda_packed, "measure_cache", wrong)
    (target,) = cuda_targets.run_targets(context, ["cache"])
    assert target.quantity == "right numbers"


@pytest.mark.usefixtures("on_cpu")
def test_a_backend_that_does_not_serve_is_no_target() -> None:
    (target,) = cuda_targets.judge(make_context(), cuda_targets.training_jobs("forward")[:1], (), {"cudnn": 1.0})
    assert target.verdict == "not measured"
    assert target.detail.startswith("cudnn: not served")


@pytest.mark.usefixtures("on_cpu")
def test_time_is_limited() -> None:
    judged = list(cuda_targets.run_targets(make_context(deadline=time.monotonic() - 1), list(cuda_targets.GROUPS)))
    assert {target.verdict for target in judged} == {"not measured"}
    assert {target.detail for target in judged} == {"the time was over"}

    # Enough for what does not compile.
    context = make_context(deadline=time.monotonic() + cuda_targets.COMPILING_JOB_S)
    judged = list(cuda_targets.run_targets(context, ["flex", "decode"]))
    compiling, others = judged[:5], judged[5:]
    assert {target.detail for target in compiling} == {"the time was over"}
    assert len(context.rows) == len(others) == len(cuda_targets.DECODE_BATCHES)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("raised", "verdict", "detail", "failures"),
    [
        (torch.OutOfMemoryError("full.\nMore"), "not measured", ": failed: OutOfMemoryError: full.", 0),
        (measure.OursFailed("x: RuntimeError: no"), "not measured", ": ours failed: x: RuntimeError: no", 3),
        (measure.WrongResult("off"), "MISSED", "off", 0),
    ],
    ids=["anything else", "ours", "wrong"],
)
def test_failures_do_not_end_the_run(
    raised: Exception, verdict: str, detail: str, failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise raised

    monkeypatch.setattr(cuda_targets, "measure", fail)
    context = make_context()
    judged = list(cuda_targets.run_targets(context, ["decode"]))
    assert {(target.quantity, target.verdict) for target in judged} == {("right numbers", verdict)}
    assert {target.detail for target in judged} == {detail.removeprefix(": ")}
    assert len(context.failures) == failures
    assert "right numbers" in targets.target_table(judged)


@pytest.mark.usefixtures("on_cpu")
def test_a_baseline_that_fails_costs_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second call of SDPA has no memory left; the target that is against another peer is judged all the same."""

    def prepare(job: Job, inputs: Any) -> peers.Prepared:
        right = peers.prepare_sdpa(job, inputs)

        def fail() -> None:
            raise torch.OutOfMemoryError("full")

        return replace(right, runner=replace(right.runner, call=fail))

    monkeypatch.setitem(peers.PEERS, "sdpa", replace(peers.PEERS["sdpa"], prepare=prepare))
    context = make_context()
    jobs = cuda_targets.training_jobs("forward")[:1]
    forward = list(cuda_targets.judge(context, jobs, (), {"flash": 1.0}))
    assert {target.verdict for target in forward} <= {"met", "MISSED"}
    (feature,) = cuda_targets.judge(context, jobs, (), {"sdpa": 2.0})
    assert (feature.quantity, feature.verdict) == ("x SDPA", "not measured")
    assert feature.detail.startswith("sdpa: failed: OutOfMemoryError: full; ")
    assert context.failures == []
    assert "flash" in report.cuda_case_table(context.rows)


# -------------------------------------------------------------------------------------------------- FlexAttention


@pytest.mark.parametrize(
    "case",
    [
        Case(40, 40, D=16, causal="top_left", gqa=2),
        Case(40, 56, D=16, causal="bottom_right", window=(9, 0)),
        Case(20, 33, D=16, B=2, mask="b11k", mask_values="padding"),
        Case(1, 40, D=16, gqa=4),
    ],
    ids=lambda case: case.id,
)
def test_what_flex_is_given(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled it computes the same, slowly; and it may run a backward pass as often as timing has it do."""
    import torch._functorch.config as functorch

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    job = Job(case)
    inputs = job.make_inputs()
    with functorch.patch(donated_buffer=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = peers.prepare_flex(job, inputs).results()
        assert functorch.donated_buffer is False
    assert measure.error_in_bounds(job, results, measure.expected_results(job, inputs)) <= 1


# ------------------------------------------------------------------------------------------------------ command line


@without_gpu
@pytest.mark.parametrize("arguments", [["--device", "cuda"], ["--suite", "cuda-targets"]])
def test_without_a_gpu_it_says_so(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "there is nothing to measure on a GPU: " in capsys.readouterr().err


def test_lists_need_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cuda", "--list"]) == 0
    assert capsys.readouterr().out.splitlines() == [job.id for job in cases.cuda_default_jobs()]
    assert main(["--suite", "cuda-targets", "--list"]) == 0
    assert capsys.readouterr().out.split() == list(cuda_targets.GROUPS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "cuda-targets", "--device", "cpu"], "cuda-targets needs --device cuda"),
        (["--suite", "sweep", "--device", "cuda"], "sweep is for the CPU"),
        (["--suite", "targets", "--device", "cuda"], "targets is for the CPU"),
    ],
)
def test_suites_have_their_devices(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("on_cpu")
def test_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As on a GPU, but for the GPU: the command line, the tables, the JSON and the plot."""
    monkeypatch.setattr(cuda, "obstacle", lambda: None)
    monkeypatch.setattr(cuda, "CudaMeter", WholeMeter)
    monkeypatch.setattr(machine, "describe_gpu", lambda: GPU)
    out = tmp_path / "targets.json"
    arguments = ["--suite", "cuda-targets", "--case", "forward,decode", "--budget", "0.005", "--json", str(out)]
    assert main(arguments) == 0
    text, log = capsys.readouterr()
    assert len(log.splitlines()) == 4 + len(cuda_targets.DECODE_BATCHES)  # each target as it came
    assert text.startswith(
        "NVIDIA H200 (sm_90, 132 multiprocessors, 140 GiB, 60 MiB of L2); driver 580.1; clocks.sm 1980\n"
    )
    for words in ("% of GEMM", "x SDPA, flash backend", "% of a copy's bandwidth", "targets met", "800 TFLOP/s in a"):
        assert words in text
    document = json.loads(out.read_text())
    assert document["machine"]["gpu"]["name"] == "NVIDIA H200"
    assert document["machine"]["versions"]["cuDNN"] == "91000"
    assert document["peaks_gflops"] == {"bfloat16 GEMM": 800e3}
    assert document["copy_gbytes_per_s"] == 4000.0
    assert len(document["targets"]) == len(document["rows"]) == 4 + len(cuda_targets.DECODE_BATCHES)
    assert document["gpu_under_load"] == {"clocks.sm": "1755"}
    assert "unfinished" not in document
    assert all("flushed" in row["results"]["fastattn"] for row in document["rows"])
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="takes as --case one or more of forward,backward,decode"):
        main(["--suite", "cuda-targets", "--case", "table-"])
