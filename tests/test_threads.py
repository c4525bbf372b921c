"""Thread counts, Python threads, forked workers: the same bits everywhere, and nobody hangs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import fastattn

from .cases import Case, make_inputs
from .compare import Quantities, compute

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

CASES = [
    Case(197, 333, D=64, B=2, Hkv=2, causal="bottom_right"),
    Case(1, 3000, D=64, Hkv=1, gqa=8),
    Case(600, 1100, D=32, Hkv=1, sinks=True),
    Case(300, 700, D=16, B=2, bias="11qk", mask="11qk", mask_values="blocks", dropout_p=0.2),
    Case(300, 400, D=16, B=3, gqa=2, bias="1111", kv_lengths=(0, 400, 77), alibi="h"),
]


def same(first: Quantities, second: Quantities) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_bits_do_not_depend_on_the_thread_count(isa: str, case: Case, dtype: torch.dtype) -> None:
    """1, 2, 3 and 7 threads give the same bits, and the count is read anew on every call."""
    inputs = make_inputs(case, dtype).require_grad()
    torch.set_num_threads(1)
    wanted = compute(inputs)
    for count in (2, 1, 7, 3):
        torch.set_num_threads(count)
        assert same(compute(inputs), wanted), f"{count} threads"


@pytest.mark.usefixtures("threads")
def test_one_thread_stays_one_thread() -> None:
    """With torch.set_num_threads(1) the kernels start no thread: the process has as many afterwards."""
    program = """
import torch, fastattn
def threads():
    return next(line for line in open("/proc/self/status") if line.startswith("Threads")).split()[1]
torch.set_num_threads(1)
x = torch.randn(2, 4, 600, 64)
before = threads()
with torch.no_grad():
    fastattn.attention(x, x, x)
print(before, threads())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, after = done.stdout.split()
    assert before == after


# ---------------------------------------------------------------------------------------------------- Python threads


def test_concurrent_python_threads() -> None:
    """Eight threads call attention, forward and backward, on shapes of their own: each gets what it gets alone."""
    cases = [
        Case(
            40 + 30 * n, 500 - 40 * n, D=16 + 8 * n, B=1 + n % 2, gqa=1 + n % 3, causal="bottom_right", sinks=n % 2 == 0
        )
        for n in range(8)
    ]
    dtypes = [DTYPES[n % 4] for n in range(8)]
    everyone = [make_inputs(case, dtype).require_grad() for case, dtype in zip(cases, dtypes, strict=True)]
    alone = [compute(inputs) for inputs in everyone]
    start = threading.Barrier(8)

    def work(n: int) -> bool:
        start.wait()
        # compute() seeds torch's generator, which threads share, but none of these calls draws from it.
        return all(same(compute(everyone[n]), alone[n]) for _ in range(10))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_threads_that_share_their_inputs() -> None:
    inputs = make_inputs(Case(150, 350, D=32, B=2, gqa=2), torch.float32)

    def run(_: int) -> Tensor:
        with torch.no_grad():
            return fastattn.attention(inputs.q, inputs.k, inputs.v, causal=True)

    wanted = run(0)
    with ThreadPoolExecutor(6) as pool:
        assert all(torch.equal(o, wanted) for o in pool.map(run, range(60)))


def test_backward_in_threads() -> None:
    """Graphs that were recorded in one thread and run backward in others, at the same time."""
    inputs = make_inputs(Case(150, 350, D=32, B=2, gqa=2, bias="1hqk"), torch.float32).require_grad()
    wanted = compute(inputs)
    graphs = []
    for _ in range(8):
        o, lse = fastattn.attention(inputs.q, inputs.k, inputs.v, return_lse=True, **inputs.kwargs)
        graphs.append((o, lse))

    def run(graph: tuple[Tensor, Tensor]) -> bool:
        named = inputs.differentiable()
        grads = torch.autograd.grad(graph, list(named.values()), [inputs.d_o, inputs.d_lse])
        return all(torch.equal(g, wanted[f"d{name}"]) for name, g in zip(named, grads, strict=True))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, graphs))


def test_short_lived_threads() -> None:
    """Memory that a thread keeps for its next call goes when it goes: 300 threads leave no more behind than 100."""
    inputs = make_inputs(Case(200, 600, D=256), torch.float32)  # scratch of some 400 KB for a call

    def run() -> None:
        with torch.no_grad():
            fastattn.attention(inputs.q, inputs.k, inputs.v)

    def resident_mb() -> float:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20

    sizes = []
    for count in (100, 200):
        for _ in range(count):
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
        sizes.append(resident_mb())
    assert sizes[1] - sizes[0] < 20


# ------------------------------------------------------------------------------------------------------------- forks


class Attended(Dataset[Tensor]):
    """Items that a worker process computes with the kernels, forward and backward."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        got = compute(make_inputs(Case(60 + index, 200, D=32, causal="bottom_right"), torch.float32).require_grad())
        return torch.cat([got[name].flatten() for name in ("o", "dq", "dk", "dv")])[:20_000]


class Deadline:
    """Raises in the main thread when the body takes longer: a fork that inherits a held lock would wait for ever."""

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds

    def __enter__(self) -> None:
        def expired(*_: object) -> None:
            raise TimeoutError(f"not done after {self.seconds} s")

        self.before = signal.signal(signal.SIGALRM, expired)
        signal.alarm(self.seconds)

    def __exit__(self, *_: object) -> None:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, self.before)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores: on purpose
@pytest.mark.parametrize("workers", [1, 3])
def test_forked_data_loader_workers(workers: int) -> None:
    """Workers forked from a process that has used the kernels, with threads, compute what it computes."""
    data = Attended()
    wanted = [data[n] for n in range(len(data))]
    loader = DataLoader(
        data, batch_size=None, num_workers=workers, multiprocessing_context=multiprocessing.get_context("fork")
    )
    with Deadline(120):
        got = list(loader)
    assert len(got) == len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_fork_with_one_thread() -> None:
    """A bare fork, as multiprocessing makes it; torch's own thread pool does not survive one, so the child has none."""
    inputs = make_inputs(Case(197, 333, D=64, B=2, causal="bottom_right"), torch.float32).require_grad()
    wanted = compute(inputs)
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            with torch.no_grad():
                o = fastattn.attention(inputs.q, inputs.k, inputs.v, causal=True)
            os._exit(0 if torch.equal(o, wanted["o"]) else 1)
        finally:
            os._exit(2)
    with Deadline(60):
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert same(compute(inputs), wanted)


def test_spawned_worker() -> None:
    """A process that starts from nothing and loads the library itself."""
    data = Attended()
    loader = DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context="spawn", sampler=range(2))
    with Deadline(120):
        assert all(torch.equal(a, data[n]) for n, a in enumerate(loader))
