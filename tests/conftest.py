"""Fixtures that the tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Before torch loads OpenMP. Its threads spin while they wait; where the processor has other work to do as well, that
# made these thousands of small calls eight times as slow.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.nn.functional as F

import fastattn
from fastattn import _cuda
from fastattn._ops import CAPABILITY_VARIABLE

# Processes of pytest-xdist share the cores. Two threads each, all the same: a kernel on one has fewer ways to go wrong.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    torch.set_num_threads(min(torch.get_num_threads(), max(2, torch.get_num_threads() // workers)))

# The levels of this architecture; where one is forced, that one alone.
FORCED = os.environ.get(CAPABILITY_VARIABLE)
ISAS = (FORCED,) if FORCED else tuple(torch.ops.fastattn._all_isas().split(","))


def supported_isas() -> list[str]:
    return torch.ops.fastattn._supported_isas().split(",")


def level_of(isa: str, dtype: torch.dtype) -> str:
    """The first level whose code a level runs for a type."""
    if dtype == torch.float64:
        return ISAS[0]
    return isa if dtype == torch.bfloat16 else isa.removesuffix("_bf16")


def levels_of(dtype: torch.dtype) -> list[str]:
    """Those that have code of their own for a type."""
    return [isa for isa in ISAS if level_of(isa, dtype) == isa]


def cuda_obstacle() -> str | None:
    """Why nothing can be tested on a GPU here; None = it can."""
    if _cuda.missing is not None:
        return _cuda.missing
    return _cuda.obstacle(0) if torch.cuda.is_available() else _cuda.why_no_device()


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on each level; those that this processor lacks are reported as skipped."""
    if request.param not in supported_isas():
        pytest.skip(f"this processor (or build) has no {request.param}")
    before = torch.ops.fastattn._isa()
    torch.ops.fastattn._set_isa(request.param)
    yield request.param
    torch.ops.fastattn._set_isa(before)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What has one path on several levels runs on one of them; test_levels_that_share_a_path holds them to it."""

    def repeats_it(item: pytest.Item) -> bool:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        isa, dtype = parameters.get("isa"), parameters.get("dtype")
        return isa is not None and isinstance(dtype, torch.dtype) and level_of(isa, dtype) != isa

    if repeated := [item for item in items if repeats_it(item)]:
        config.hook.pytest_deselected(items=repeated)
        items[:] = [item for item in items if not repeats_it(item)]


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts torch's thread count back after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(threads: None) -> None:
    """Tens of thousands of tiny calls would mostly wait for a second thread to wake up."""
    torch.set_num_threads(1)


@pytest.fixture
def sdpa_left_alone() -> Iterator[None]:
    """Calls of scaled_dot_product_attention are counted from 0, and PyTorch's function is in its place afterwards."""
    before = F.scaled_dot_product_attention
    fastattn.sdpa_calls(reset=True)
    yield
    assert F.scaled_dot_product_attention is before, "a test left the replacement in place"


@pytest.fixture
def fresh_compiler() -> None:
    torch._dynamo.reset()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    lacking = [level for level in ISAS if level not in supported_isas()]
    if lacking:
        terminalreporter.write_line(f"fastattn: not tested, for this processor lacks them: {', '.join(lacking)}")
    if (obstacle := cuda_obstacle()) is not None:
        terminalreporter.write_line(f"fastattn: CUDA was not tested at all, no kernel ran on a GPU: {obstacle}")
