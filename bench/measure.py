"""One row of the table: check the job's numbers, then time it beside its peers and the machine's peak."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import DTYPES, Job, count_bytes, count_flop, visible_pairs
from bench.peak import PeakMeter, active_isa
from bench.peers import BASELINE, OURS, Peer, Prepared, Unsupported, sdpa_arguments
from bench.timing import Timing, interleave
from tests.cases import Inputs

# Largest error that counts as right, in units in the last place (of the job's dtype) of the largest expected value.
# 16-bit results are off by one rounding, and by the rounding of the probabilities before they meet the values; float32
# ones by sums over some thousand terms, on both sides of the comparison.
ULPS = {"float32": 256.0, "bfloat16": 4.0, "float16": 4.0}


class WrongResult(Exception):
    """A number that must not be timed."""


@dataclass
class Row:
    job: Job
    isa: str
    threads: int
    pairs: int
    flop: int
    bytes: int
    peak_gflops: float
    timings: dict[str, Timing] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)  # in units of the bound: 1 is the largest that is right
    notes: dict[str, str] = field(default_factory=dict)  # why a peer has no timing

    def gflops(self, name: str = OURS) -> float:
        return self.flop / (1e6 * self.timings[name].median_ms)

    def percent_of_peak(self, name: str = OURS) -> float:
        return 100 * self.gflops(name) / self.peak_gflops

    def gbytes_per_s(self, name: str = OURS) -> float:
        return self.bytes / (1e6 * self.timings[name].median_ms)

    def speedup(self, over: str = BASELINE) -> float | None:
        """How many times faster ours is; None where the other has no timing."""
        if over not in self.timings or OURS not in self.timings:
            return None
        return self.timings[over].median_ms / self.timings[OURS].median_ms


def expected_results(job: Job, inputs: Inputs) -> tuple[Tensor, ...]:
    """(o,) or (dq, dk, dv) by PyTorch's SDPA in float32, whatever the job's dtype."""
    q, k, v = (x.detach().float().requires_grad_(job.direction != "forward") for x in (inputs.q, inputs.k, inputs.v))
    arguments = sdpa_arguments(job.case, inputs)
    mask = arguments.get("attn_mask")
    if mask is not None and mask.dtype != torch.bool:
        arguments["attn_mask"] = mask.float()
    o = F.scaled_dot_product_attention(q, k, v, **arguments)
    if job.direction == "forward":
        return (o.detach(),)
    return torch.autograd.grad(o, (q, k, v), inputs.d_o.float())


def error_in_bounds(job: Job, results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest difference, in units of the largest one that counts as right; inf where a number is missing or NaN.

    Gradients share one yardstick: where a softmax is saturated dq and dk are differences that nearly cancel.
    """
    if len(results) != len(expected) or any(r.shape != e.shape for r, e in zip(results, expected, strict=True)):
        return float("inf")
    scale = max((float(e.abs().max()) for e in expected if e.numel()), default=0.0)
    bound = ULPS[job.dtype] * torch.finfo(DTYPES[job.dtype]).eps * scale
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
    meter: PeakMeter,
    budget_s: float,
    *,
    on_step: Callable[[str], None] | None = None,
) -> Row:
    """Raises WrongResult when our numbers are wrong; a peer with wrong numbers is noted and not timed."""
    say = on_step or (lambda _: None)
    inputs = job.make_inputs()
    pairs = visible_pairs(job.case, inputs)
    row = Row(job, active_isa(), meter.threads, pairs, count_flop(job, pairs), count_bytes(job, inputs), 0.0)

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
            if peer.name in (OURS, BASELINE):
                raise
            row.notes[peer.name] = f"failed: {type(failure).__name__}: {str(failure).partition(chr(10))[0]}"
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
    row.timings = interleave([one.runner for one in prepared], budget_s, on_turn=say)
    row.peak_gflops = max(before, meter.measure(job.dtype))
    return row
