"""One row of the table: check the job's numbers, then time it beside its peers and the machine's peak."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import DTYPES, Job, count_bytes, count_flop, visible_pairs
from bench.peers import BASELINE, OURS, Peer, Prepared, Unsupported, sdpa_arguments
from bench.timing import Clock, Runner, Timing, interleave
from tests.cases import Inputs

# Largest error that counts as right, in units in the last place (of the job's dtype) of the largest expected value.
# 16-bit results are off by one rounding, and by the rounding of the probabilities before they meet the values; float32
# ones by sums over some thousand terms, on both sides of the comparison.
ULPS = {"float32": 256.0, "bfloat16": 4.0, "float16": 4.0}


FLUSHED_SHARE = 1 / 3  # of the time for a case, on top of it, for timings with a cold cache


class WrongResult(Exception):
    """A number that must not be timed."""


class OursFailed(Exception):
    """Ours raised where it should have computed."""


def in_words(failure: Exception) -> str:
    return f"{type(failure).__name__}: {str(failure).partition(chr(10))[0]}"


class Meter(Protocol):
    """What a device is measured with: bench/peak.py for CPUs, bench/cuda.py for GPUs."""

    threads: int

    @property
    def clock(self) -> Clock:
        """What calls are timed by."""

    @property
    def flushed_clock(self) -> Clock | None:
        """The same with nothing of the operands in its cache; None: no such timings."""

    @property
    def level(self) -> str:
        """Instruction set or architecture in use."""

    def measure(self, dtype: str, threads: int | None = None) -> float:
        """GFLOP/s that percentages are of, measured now."""

    def peak_memory(self, runner: Runner) -> int | None:
        """Bytes that a call takes beyond what it is given, results included; None: cannot be told."""

    def summary(self) -> dict[str, float]:
        """GFLOP/s, the most measured of each kind."""


@dataclass
class Row:
    job: Job
    isa: str  # Meter.level
    threads: int
    pairs: int
    flop: int
    bytes: int
    peak_gflops: float
    timings: dict[str, Timing] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)  # in units of the bound: 1 is the largest that is right
    notes: dict[str, str] = field(default_factory=dict)  # why a peer has no timing, or lacks one of its figures
    flushed: dict[str, Timing] = field(default_factory=dict)  # on GPUs: timings with nothing in L2
    memory_bytes: dict[str, int] = field(default_factory=dict)  # Meter.peak_memory

    def gflops(self, name: str = OURS) -> float:
        return self.flop / (1e6 * self.timings[name].median_ms)

    def percent_of_peak(self, name: str = OURS) -> float:
        return 100 * self.gflops(name) / self.peak_gflops

    def gbytes_per_s(self, name: str = OURS, *, flushed: bool = False) -> float:
        timings = self.flushed if flushed else self.timings
        return self.bytes / (1e6 * timings[name].median_ms)

    def speedup(self, over: str = BASELINE) -> float | None:
        """How many times faster ours is; None where the other has no timing."""
        if over not in self.timings or OURS not in self.timings:
            return None
        return self.timings[over].median_ms / self.timings[OURS].median_ms


def expected_results(job: Job, inputs: Inputs) -> tuple[Tensor, ...]:
    """(o,) or (dq, dk, dv[, dbias]) by PyTorch's SDPA in float32, whatever the job's dtype."""
    q, k, v = (x.detach().float().requires_grad_(job.direction != "forward") for x in (inputs.q, inputs.k, inputs.v))
    arguments = sdpa_arguments(job.case, inputs)
    mask = arguments.get("attn_mask")
    if mask is not None and mask.dtype != torch.bool:
        arguments["attn_mask"] = mask.detach().float().requires_grad_(job.bias_gradient)
    o = F.scaled_dot_product_attention(q, k, v, **arguments)
    if job.direction == "forward":
        return (o.detach(),)
    bias = [arguments["attn_mask"]] if job.bias_gradient else []
    return torch.autograd.grad(o, (q, k, v, *bias), inputs.d_o.float())


def error_in_bounds(job: Job, results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest difference, in units of the largest one that counts as right; inf where a number is missing or NaN.

    Gradients share one yardstick: where a softmax is saturated dq and dk are differences that nearly cancel.
    """
    return error_of(job.dtype, results, expected)


def error_of(dtype: str, results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The same for tensors that are rounded to a dtype and share one yardstick."""
    if len(results) != len(expected) or any(r.shape != e.shape for r, e in zip(results, expected, strict=True)):
        return float("inf")
    scale = max((float(e.abs().max()) for e in expected if e.numel()), default=0.0)
    bound = ULPS[dtype] * torch.finfo(DTYPES[dtype]).eps * scale
    error = 0.0
    for result, value in zip(results, expected, strict=True):
        difference = (result.detach().float() - value).abs()
        if difference.numel():
            largest = float(difference.max())
            error = max(error, largest if largest == largest else float("inf"))
    return error / bound if bound else (float("inf") if error else 0.0)


def measure(
    job: Job,
    peers: list[Peer],
    meter: Meter,
    budget_s: float,
    *,
    on_step: Callable[[str], None] | None = None,
) -> Row:
    """Raises WrongResult when our numbers are wrong and OursFailed when we raise.

    A peer that raises, at whatever stage, is noted and has no timing; so is one with wrong numbers, but for SDPA.
    """
    say = on_step or (lambda _: None)
    inputs = job.make_inputs()
    pairs = visible_pairs(job.case, inputs)
    row = Row(job, meter.level, meter.threads, pairs, count_flop(job, pairs), count_bytes(job, inputs), 0.0)

    def drop(name: str, failure: Exception) -> None:
        if name == OURS:
            raise OursFailed(f"{job.id}: {in_words(failure)}") from failure
        row.notes[name] = f"failed: {in_words(failure)}"

    say("checking")
    expected = expected_results(job, inputs)
    prepared: list[Prepared] = []
    for peer in peers:
        try:
            say(f"preparing {peer.name}")
            one = peer.prepare(job, inputs)
            error = error_in_bounds(job, one.results(), expected)
        except Unsupported as reason:
            row.notes[peer.name] = str(reason)
            continue
        except Exception as failure:
            drop(peer.name, failure)
            continue
        row.errors[peer.name] = error
        if error > 1 and peer.name == OURS:
            raise WrongResult(f"{job.id}: off by {error:.3g} times the bound")
        if error > 1 and peer.name != BASELINE:
            row.notes[peer.name] = f"wrong: off by {error:.3g} times the bound"
            continue
        prepared.append(one)
    del expected

    say("peak")
    before = meter.measure(job.dtype)
    runners = [one.runner for one in prepared]
    row.timings = interleave(runners, budget_s, clock=meter.clock, on_turn=say, on_failure=drop)
    row.peak_gflops = max(before, meter.measure(job.dtype))
    runners = [runner for runner in runners if runner.name in row.timings]
    if meter.flushed_clock is not None:
        flushed_s = FLUSHED_SHARE * budget_s
        row.flushed = interleave(runners, flushed_s, clock=meter.flushed_clock, on_turn=say, on_failure=drop)
    for runner in runners:
        try:
            used = meter.peak_memory(runner)
        except Exception as failure:
            row.notes[runner.name] = f"its memory was not measured: {in_words(failure)}"
            continue
        if used is not None:
            row.memory_bytes[runner.name] = used
    return row
