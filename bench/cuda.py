"""Measuring on a GPU: how long calls take there, what a matrix product and a copy reach beside them, and memory.

Events on the stream time what the GPU does, not how long the host takes to ask for it: the GPU is first made to wait
until the host is ahead. Each job is timed twice, with what the last call left in L2 ("warm", calls back to back) and
with L2 full of something else before each call ("flushed").

Percentages are of a bfloat16 matrix product of 8192 x 8192 x 8192 on random numbers, whatever the job's dtype, measured
right before and right after each job; the larger one counts. On zeros both would run faster than they ever will.
"""

from __future__ import annotations

import math
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bench.timing import SAMPLE_S, Runner

GEMM_SIZE = 8192
GEMM_CALLS = 8
COPY_BYTES = 1 << 30
COPY_CALLS = 8
MAX_SAMPLES = 20  # of one turn
MAX_CALLS = 200  # of one turn: the host can be about a thousand kernels ahead, and a backward pass has several
# The GPU waits by counting its own cycles, of which no GPU has more than this in a second: it waits as long or longer.
CYCLES_PER_S = 3.0e9
PATIENCE = 1.5  # it must wait longer than the host takes, not exactly as long
HOST_S = 3e-4  # what the host takes over a call, until that has been measured
MAX_SLEEP_S = 0.1  # whatever one slow call of the host's has suggested
WARM_UP_S = 0.5  # of matrix products, until clocks and power have become what they are under load


def obstacle() -> str | None:
    """Why there is nothing to measure on a GPU here; None = there is."""
    from fastattn import _cuda

    if torch.version.cuda is None:
        return "torch was built without CUDA"
    if not torch.cuda.is_available():
        return _cuda.why_no_device()
    reason = _cuda.obstacle(0)
    return None if reason is None else f"fastattn cannot serve it: {reason}"


class CudaClock:
    """Times calls by events. flush: called before each call, outside of what is timed; None: calls back to back."""

    def __init__(self, flush: Callable[[], Any] | None = None, gpu: Any = torch.cuda) -> None:
        self.flush = flush
        self.gpu = gpu
        self.host_s: dict[str, float] = {}  # how long the host takes over a call, by runner

    def estimate(self, runner: Runner) -> float:
        with runner.context():
            runner.call()
            runner.call()
            return statistics.median(self.time_calls(runner, 1, 3)) / 1e3

    def take_turn(self, runner: Runner, estimate_s: float, slot_s: float) -> list[float]:
        estimate_s = max(estimate_s, 1e-6)
        # The wait before them takes no longer than the slot itself, where the host is slower than the GPU.
        longest = min(MAX_CALLS, max(1, int(slot_s / (PATIENCE * self.host_s.get(runner.name, HOST_S)))))
        # Between two calls back to back there is no event, which itself takes a microsecond or two.
        calls = 1 if self.flush else min(longest, math.ceil(SAMPLE_S / estimate_s))
        count = min(MAX_SAMPLES, longest // calls, max(1, int(slot_s / (calls * estimate_s))))
        with runner.context():
            return self.time_calls(runner, calls, count)

    def time_calls(self, runner: Runner, calls: int, count: int) -> list[float]:
        """Milliseconds for a call: `count` samples, each the mean of `calls` of them."""
        start, end = ([self.gpu.Event(enable_timing=True) for _ in range(count)] for _ in range(2))
        self.gpu.synchronize()
        sleep_s = min(MAX_SLEEP_S, PATIENCE * self.host_s.get(runner.name, HOST_S) * calls * count)
        self.gpu._sleep(int(CYCLES_PER_S * sleep_s))
        begun = time.perf_counter()
        for sample in range(count):
            if self.flush is not None:
                self.flush()
            start[sample].record()
            for _ in range(calls):
                runner.call()
            end[sample].record()
        self.host_s[runner.name] = max(1e-6, (time.perf_counter() - begun) / (calls * count))
        self.gpu.synchronize()
        return [first.elapsed_time(last) / calls for first, last in zip(start, end, strict=True)]


def make_flush(device: torch.device, gpu: Any = torch.cuda) -> Callable[[], Any]:
    """Writes four times as much as L2 holds."""
    size = 4 * max(gpu.get_device_properties(device).L2_cache_size, 1 << 20)
    buffer = torch.zeros(size // 4, dtype=torch.int32, device=device)
    return lambda: buffer.add_(1)


class CudaMeter:
    """The counterpart of bench.peak.PeakMeter. gpu: torch.cuda, or what stands in for it."""

    threads = 0  # no part of a GPU's result

    def __init__(self, gpu: Any = torch.cuda, device: torch.device | None = None) -> None:
        self.gpu = gpu
        self.device = device or torch.device("cuda", gpu.current_device())
        self.clock = CudaClock(gpu=gpu)
        self.flushed_clock = CudaClock(make_flush(self.device, gpu), gpu)
        capability = gpu.get_device_capability(self.device)
        self.level = f"sm_{capability[0]}{capability[1]}"
        self.measured: dict[str, list[float]] = {}
        a, b = self._randn(GEMM_SIZE, GEMM_SIZE), self._randn(GEMM_SIZE, GEMM_SIZE)
        out = torch.empty_like(a)
        self._gemm = Runner("gemm", lambda: torch.mm(a, b, out=out))
        self.clock.estimate(self._gemm)

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(torch.bfloat16)

    def measure(self, dtype: str, threads: int | None = None) -> float:
        """GFLOP/s of the matrix product."""
        samples = self.clock.time_calls(self._gemm, 1, GEMM_CALLS)
        gflops = 2 * GEMM_SIZE**3 / (1e6 * statistics.median(samples))
        self.measured.setdefault("bfloat16 GEMM", []).append(gflops)
        return gflops

    def measure_copy(self) -> float:
        """GB/s of a copy within the GPU's memory, bytes read and bytes written together."""
        source = self._randn(COPY_BYTES // 2)
        target = torch.empty_like(source)
        runner = Runner("copy", lambda: target.copy_(source))
        self.clock.estimate(runner)
        return 2 * source.nbytes / (1e6 * statistics.median(self.clock.time_calls(runner, 1, COPY_CALLS)))

    def peak_memory(self, runner: Runner) -> int:
        self.gpu.synchronize()
        self.gpu.reset_peak_memory_stats()
        before = self.gpu.memory_allocated()
        with runner.context():
            runner.call()
        self.gpu.synchronize()
        return int(self.gpu.max_memory_allocated() - before)

    def state_under_load(self) -> dict[str, str]:
        """Clocks, power and temperature while the GPU multiplies matrices: idle, it lowers its clocks at once."""

        def load() -> None:
            for _ in range(GEMM_CALLS):
                self._gemm.call()
            self.gpu.synchronize()

        begun = time.monotonic()
        while time.monotonic() < begun + WARM_UP_S:
            load()
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(query, *STATE)
            while not answer.done():
                load()
        return answer.result()

    def summary(self) -> dict[str, float]:
        return {key: max(values) for key, values in self.measured.items()}


@dataclass(frozen=True)
class Gpu:
    """What a GPU says of itself."""

    name: str
    capability: str
    multiprocessors: int
    memory_bytes: int
    l2_bytes: int
    driver: str
    cuda: str
    cudnn: str
    state: dict[str, str]  # clocks in MHz, power in W, temperature in C, as nvidia-smi has them now

    def __str__(self) -> str:
        clocks = ", ".join(f"{name} {value}" for name, value in self.state.items())
        memory = f"{self.memory_bytes / 2**30:.0f} GiB, {self.l2_bytes / 2**20:.0f} MiB of L2"
        size = f"sm_{self.capability}, {self.multiprocessors} multiprocessors, {memory}"
        return f"{self.name} ({size}); driver {self.driver}; {clocks}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


STATE = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu")


def gpu_id(gpu: Any = torch.cuda) -> str:
    """What nvidia-smi knows torch's present GPU by: it numbers all there are, not the visible ones alone."""
    uuid = getattr(gpu.get_device_properties(gpu.current_device()), "uuid", None)
    return "0" if uuid is None else "GPU-" + str(uuid).removeprefix("GPU-")


def query(*names: str) -> dict[str, str]:
    """What nvidia-smi answers for the GPU in use; empty where it cannot be asked."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    command = [tool, f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits", f"--id={gpu_id()}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    return parse_query(names, done.stdout)


def parse_query(names: tuple[str, ...], text: str) -> dict[str, str]:
    """Without what has no value, for which it puts the reason in brackets: [N/A], [Not Supported]."""
    values = [value.strip() for value in text.partition("\n")[0].split(",")]
    if len(values) != len(names):
        return {}
    return {name: value for name, value in zip(names, values, strict=True) if value and not value.startswith("[")}


def describe_gpu() -> Gpu:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Gpu(
        name=properties.name,
        capability=f"{properties.major}{properties.minor}",
        multiprocessors=properties.multi_processor_count,
        memory_bytes=properties.total_memory,
        l2_bytes=properties.L2_cache_size,
        driver=query("driver_version").get("driver_version", "unknown"),
        cuda=str(torch.version.cuda),
        cudnn=str(torch.backends.cudnn.version()),
        state=query(*STATE),
    )
