"""Timing several ways to do one thing, in turns, so that a machine that drifts slows all of them alike."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

SHORT_CALL_S = 200e-6  # below this, several calls make one sample: the clock and its own call take about 0.1 us
SAMPLE_S = 500e-6
LONG_CALL_S = 2.0


@dataclass(frozen=True)
class Runner:
    """One way to do it. `context` is entered around each turn, outside the clock."""

    name: str
    call: Callable[[], Any]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class Timing:
    samples_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        return float(np.median(self.samples_ms))

    @property
    def quartiles_ms(self) -> tuple[float, float]:
        q25, q75 = np.percentile(self.samples_ms, (25, 75))
        return float(q25), float(q75)

    @property
    def iqr_ms(self) -> float:
        q25, q75 = self.quartiles_ms
        return q75 - q25


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _time_calls(call: Callable[[], Any], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def _estimate(runner: Runner) -> float:
    """Seconds a call takes, after a warm-up call."""
    with runner.context():
        runner.call()
        estimate = _time_calls(runner.call, 1)
        if estimate < SAMPLE_S:  # short calls want a longer warm-up, and a steadier estimate
            estimate = _time_calls(runner.call, max(2, int(20 * SHORT_CALL_S / max(estimate, 1e-6))))
    return estimate


def _take_turn(runner: Runner, estimate_s: float, slot_s: float) -> list[float]:
    """Samples in ms, as many as fit into the slot and at least one."""
    calls = 1 if estimate_s >= SHORT_CALL_S else math.ceil(SAMPLE_S / estimate_s)
    count = min(20, max(1, int(slot_s / (calls * estimate_s))))
    with runner.context():
        return [1e3 * _time_calls(runner.call, calls) for _ in range(count)]


class Clock(Protocol):
    """A way to time calls."""

    def estimate(self, runner: Runner) -> float:
        """Seconds a call takes, after a warm-up call."""

    def take_turn(self, runner: Runner, estimate_s: float, slot_s: float) -> list[float]:
        """Samples in ms, as many as fit into the slot and at least one."""


class WallClock:
    """For calls that are over when they return: those on a CPU."""

    def estimate(self, runner: Runner) -> float:
        return _estimate(runner)

    def take_turn(self, runner: Runner, estimate_s: float, slot_s: float) -> list[float]:
        return _take_turn(runner, estimate_s, slot_s)


def interleave(
    runners: list[Runner],
    budget_s: float,
    *,
    clock: Clock | None = None,
    rounds: int = 10,
    min_rounds: int = 3,
    on_turn: Callable[[str], None] | None = None,
    on_failure: Callable[[str, Exception], None] | None = None,
) -> dict[str, Timing]:
    """Times the runners in turns A B C A B C ..., each for an equal slot of the budget and at least `min_rounds` calls.

    A runner whose single call takes longer than the whole budget, and long by any measure, has one turn only. One that
    raises has no timing, and the others go on, where there is an `on_failure` to hear of it.
    """
    clock = clock or WallClock()
    failed: set[str] = set()

    @contextmanager
    def dropping(runner: Runner) -> Iterator[None]:
        try:
            yield
        except Exception as failure:
            if on_failure is None:
                raise
            failed.add(runner.name)
            on_failure(runner.name, failure)

    with without_garbage_collection():
        estimates: dict[str, float] = {}
        for runner in runners:
            with dropping(runner):
                estimates[runner.name] = clock.estimate(runner)
        runners = [runner for runner in runners if runner.name in estimates]
        if not runners:
            return {}
        slot_s = budget_s / (rounds * len(runners))
        round_s = sum(max(slot_s, estimates[runner.name]) for runner in runners)
        turns = max(min_rounds, min(rounds, int(budget_s / round_s)))
        samples: dict[str, list[float]] = {runner.name: [] for runner in runners}
        for turn in range(turns):
            for runner in runners:
                if runner.name in failed or (turn and estimates[runner.name] > max(budget_s, LONG_CALL_S)):
                    continue
                if on_turn:
                    on_turn(runner.name)
                with dropping(runner):
                    samples[runner.name] += clock.take_turn(runner, estimates[runner.name], slot_s)
    return {name: Timing(tuple(values)) for name, values in samples.items() if name not in failed}
