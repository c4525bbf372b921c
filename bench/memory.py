"""How much memory forward and backward take beyond inputs, output and gradients.

The call runs in a fresh process. The kernel's high-water mark of resident memory (VmHWM) is reset once inputs and d_o
are in place; what it has grown by after forward and backward, less o, dq, dk and dv, is the extra memory: saved
statistics, packed operands, partial gradients, thread stacks. The unit is one float32 copy of q, k and v.

    python -m bench.memory fastattn --length 16384
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.cases import DTYPES, Job
from bench.machine import ROOT
from bench.peers import BASELINE, OURS, PEERS
from bench.timing import Runner
from tests.cases import bench_case


@dataclass(frozen=True)
class Memory:
    name: str
    length: int
    dtype: str
    threads: int
    growth_bytes: int  # of the high-water mark
    results_bytes: int  # o, dq, dk and dv
    unit_bytes: int  # one float32 copy of q, k and v

    @property
    def extra_bytes(self) -> int:
        return max(0, self.growth_bytes - self.results_bytes)

    @property
    def extra_units(self) -> float:
        return self.extra_bytes / self.unit_bytes


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {name}")


def count_growth(runner: Runner) -> tuple[int, tuple[Tensor, ...]]:
    """By how many bytes a call raises the high-water mark of this process's memory; and what the call returns."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again at the present VmRSS
    before = _status_bytes("VmHWM")
    with runner.context():
        results = runner.call()
    return _status_bytes("VmHWM") - before, results


def _measure_here(name: str, length: int, dtype: str) -> Memory:
    warm_up = Job(bench_case(256, 64), dtype, "step")
    PEERS[name].prepare(warm_up, warm_up.make_inputs()).results()  # loads libraries, starts threads

    case = bench_case(length, 64)
    # Filled in place: a temporary of the inputs' own size would leave room for the call to hide in.
    q, k, v, d_o = (torch.empty(1, case.Hq, length, case.D, dtype=DTYPES[dtype]).normal_() for _ in range(4))
    inputs = Job(bench_case(1, 64), dtype).make_inputs()
    inputs.q, inputs.k, inputs.v, inputs.d_o = q, k, v, d_o
    prepared = PEERS[name].prepare(Job(case, dtype, "step"), inputs)

    growth, gradients = count_growth(prepared.runner)
    results = d_o.nbytes + sum(x.nbytes for x in gradients)
    unit = 4 * (q.numel() + k.numel() + v.numel())
    return Memory(name, length, dtype, torch.get_num_threads(), growth, results, unit)


def measure_memory(name: str, *, length: int, dtype: str = "float32", threads: int) -> Memory:
    """In a fresh process, so that nothing allocated before counts."""
    command = [sys.executable, "-m", "bench.memory", name, f"--length={length}", f"--dtype={dtype}"]
    done = subprocess.run([*command, f"--threads={threads}"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command[1:])} failed:\n{done.stderr}")
    return Memory(**json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description="Extra memory of forward + backward.")
    parser.add_argument("name", choices=[OURS, BASELINE, "math"])
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(json.dumps(asdict(_measure_here(options.name, options.length, options.dtype))))


if __name__ == "__main__":
    main()
