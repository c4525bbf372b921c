"""The machine's multiply-add peak, measured beside each case: what "% of peak" is a percentage of.

Clocks, neighbours and temperature move the peak between runs and within one. Each case is therefore set against the
larger of two measurements, right before and right after it; a disturbance can only lower a measurement, and the larger
one is the stricter yardstick.
"""

from __future__ import annotations

import torch

import fastattn  # noqa: F401  (loads the operators)
from bench.timing import Clock, Runner, WallClock

PAIRED_BF16_LEVELS = ("avx512_bf16", "neon_bf16")  # levels with a bfloat16 dot product, twice the float32 rate


def active_isa() -> str:
    return str(torch.ops.fastattn._isa())


def yardstick(dtype: str) -> str:
    """Operands of the multiply-adds that bound a dtype at the active level: float16 has none of its own at any."""
    return "bfloat16" if dtype == "bfloat16" and active_isa() in PAIRED_BF16_LEVELS else "float32"


class PeakMeter:
    """What a CPU is measured with; bench/cuda.py has the GPU's."""

    clock: Clock = WallClock()
    flushed_clock: Clock | None = None  # operands of a size that is worth timing do not stay in a CPU's caches anyway

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.measured: dict[str, list[float]] = {}  # GFLOP/s of each measurement, by ISA and operand type

    @property
    def level(self) -> str:
        """The instruction set in use."""
        return active_isa()

    def peak_memory(self, runner: Runner) -> int | None:
        """Bytes that a call takes beyond what it is given; on a CPU only a fresh process can tell: bench/memory.py."""
        return None

    def measure(self, dtype: str, threads: int | None = None) -> float:
        """GFLOP/s of multiply-adds in registers at the active level, over all threads."""
        operands, threads = yardstick(dtype), threads or self.threads
        gflops = float(torch.ops.fastattn._measure_peak(operands, threads)) / 1e9
        key = f"{active_isa()} {operands}" + ("" if threads == self.threads else f", {threads} threads")
        self.measured.setdefault(key, []).append(gflops)
        return gflops

    def summary(self) -> dict[str, float]:
        return {key: max(values) for key, values in self.measured.items()}
