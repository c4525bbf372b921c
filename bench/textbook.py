"""The textbook attentions - additive, hard, the summary of weights, and a transformer's layer - against plain PyTorch:
bench/textbook_peers.py has who is compared. Everybody is checked before it is timed, and timed in turns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bench.measure import Meter, OursFailed, WrongResult, in_words
from bench.peers import OURS, Unsupported
from bench.report import format_ms, format_ratio, text_table, timing_as_dict
from bench.textbook_peers import ATTENTION, COMPILED, EAGER, FAMILIES, KERAS, TITLES, Problem, draw
from bench.timing import Runner, Timing, interleave


@dataclass
class Result:
    problem: Problem
    level: str  # Meter.level
    timings: dict[str, Timing] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)  # in units of the bound: 1 is the largest that is right
    notes: dict[str, str] = field(default_factory=dict)  # why somebody has no timing
    memory_bytes: dict[str, int] = field(default_factory=dict)  # beyond what the call is given, its results included

    def ratio(self, over: str) -> float | None:
        """Its time in units of ours."""
        if over not in self.timings or OURS not in self.timings:
            return None
        return self.timings[over].median_ms / self.timings[OURS].median_ms


def measure(
    problem: Problem,
    meter: Meter,
    budget_s: float,
    *,
    names: Iterable[str] | None = None,
    on_step: Callable[[str], None] | None = None,
) -> Result:
    """names: who is timed beside ours; None: all. Raises WrongResult and OursFailed as bench.measure.measure does."""
    say = on_step or (lambda _: None)
    wanted = {OURS, *FAMILIES[problem.family]} if names is None else {OURS, *names}
    inputs = draw(problem)
    result = Result(problem, meter.level)

    def drop(name: str, failure: Exception) -> None:
        if name == OURS:
            raise OursFailed(f"{problem.id}: {in_words(failure)}") from failure
        result.notes[name] = f"failed: {in_words(failure)}"

    runners: list[Runner] = []
    for name, prepare in FAMILIES[problem.family].items():
        if name not in wanted:
            continue
        try:
            say(f"checking {name}")
            candidate = prepare(problem, inputs)
            error = candidate.error()
        except Unsupported as reason:
            result.notes[name] = str(reason)
            continue
        except Exception as failure:
            drop(name, failure)
            continue
        result.errors[name] = error
        if error > 1 and name == OURS:
            raise WrongResult(f"{problem.id}: off by {error:.3g} times the bound")
        if error > 1:
            result.notes[name] = f"wrong: off by {error:.3g} times the bound"
            continue
        runners.append(candidate.runner)
    result.timings = interleave(runners, budget_s, clock=meter.clock, on_turn=say, on_failure=drop)
    for runner in runners:
        if runner.name in result.timings and (used := meter.peak_memory(runner)) is not None:
            result.memory_bytes[runner.name] = used
    return result


# ------------------------------------------------------------------------------------------------------- what is timed


ADDITIVE = Problem("additive", 16, 1, 256, 256)
HARD = Problem("hard", 1, 8, 2048, 64)
SUMMARY = Problem("summary", 1, 8, 2048, 64)
ENCODER = Problem("encoder", 8, 8, 512, 64, "step")


def problems() -> list[Problem]:
    found = [replace(ADDITIVE, direction=way) for way in ("forward", "backward")]
    found += [replace(ADDITIVE, dtype="bfloat16"), Problem("additive", 4, 8, 197, 64, "step")]
    found += [HARD, replace(HARD, direction="step"), replace(HARD, dtype="bfloat16")]
    found += [SUMMARY, replace(SUMMARY, key_mass=False), replace(SUMMARY, dtype="bfloat16")]
    return [*found, replace(ENCODER, dropout_p=0.1), ENCODER]


def short_problems() -> list[Problem]:
    """Part of the default suite, without what has to be compiled: some half a minute."""
    additive = [Problem("additive", 4, 1, 256, 256, way) for way in ("forward", "backward")]
    return [*additive, HARD, SUMMARY, replace(ENCODER, dropout_p=0.1), ENCODER]


def quick_problems(device: str = "cpu") -> list[Problem]:
    additive = [Problem("additive", 1, 1, 128, 64, way) for way in ("forward", "backward")]
    others = [
        Problem("hard", 1, 2, 256, 64),
        Problem("summary", 1, 2, 256, 64),
        Problem("encoder", 1, 4, 64, 32, "step"),
    ]
    return on_device(device, [*additive, *others])


def cuda_problems() -> list[Problem]:
    """Larger, so that they fill a GPU, with bfloat16 beside float32."""
    additive = [replace(ADDITIVE, H=8, D=64, L=512, direction=way) for way in ("forward", "backward")]
    hard, summary = replace(HARD, B=8, H=16), replace(SUMMARY, B=8, H=16)
    found = [*additive, hard, replace(hard, direction="step"), summary, replace(summary, key_mass=False)]
    found = [replace(problem, dtype=dtype) for problem in found for dtype in ("float32", "bfloat16")]
    found += [replace(ENCODER, B=32, dtype="bfloat16", dropout_p=dropout_p) for dropout_p in (0.1, 0.0)]
    return on_device("cuda", found)


def on_device(device: str, problems: Iterable[Problem]) -> list[Problem]:
    return [replace(problem, device=device) for problem in problems]


def select(
    problems: Iterable[Problem], *, pattern: str | None, dtypes: Sequence[str], directions: Sequence[str]
) -> list[Problem]:
    """As bench.cases.select."""
    return [
        problem
        for problem in problems
        if (not dtypes or problem.dtype in dtypes)
        and (not directions or problem.direction in directions)
        and (pattern is None or re.search(pattern, problem.id))
    ]


# ------------------------------------------------------------------------------------------------------------- reports


TITLE = "Attentions of the textbooks. x: times as long as ours; / attention: ours in times of fastattn.attention"


def table(results: Sequence[Result]) -> str:
    """case | ms (median, IQR) | how many times slower each of the others is | our time in units of attention's."""
    names = [name for name in (EAGER, COMPILED, KERAS) if any(name in result.timings for result in results)]
    has_memory = any(result.memory_bytes for result in results)
    header = ["case", "ms (IQR)", *(f"{name} ms" for name in names), *(f"x {name}" for name in names), "/ attention"]
    lines = []
    for result in results:
        ours, ratio = result.timings[OURS], result.ratio(ATTENTION)
        others = [result.timings.get(name) for name in names]
        line = [result.problem.id, f"{format_ms(ours.median_ms)} ({format_ms(ours.iqr_ms)})"]
        line += ["-" if timing is None else format_ms(timing.median_ms) for timing in others]
        line += [format_ratio(result.ratio(name)) for name in names]
        line += [format_ratio(ratio and 1 / ratio)]
        if has_memory:
            line += [format_mib(result.memory_bytes.get(name)) for name in (OURS, EAGER)]
        lines.append(line)
    if has_memory:
        header += ["MiB", "eager MiB"]
    return text_table(header, lines)


def format_mib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.1f}"


def notes(results: Sequence[Result]) -> list[str]:
    """Why somebody has no timing, each reason once."""
    found = {(name, reason): result.problem.id for result in results for name, reason in result.notes.items()}
    return [f"{TITLES[name]}: {reason} ({problem})" for (name, reason), problem in found.items()]


def line(result: Result) -> str:
    """The result in short, for a log."""
    parts = [f"{format_ms(result.timings[OURS].median_ms)} ms"]
    parts += [f"{format_ratio(result.ratio(name))} x {name}" for name in result.timings if name != OURS]
    return f"{result.problem.id}: " + ", ".join(parts)


def failure_line(problem: Problem, failure: Exception) -> str:
    if isinstance(failure, WrongResult):
        return f"WRONG, not timed: {failure}"
    words = str(failure) if isinstance(failure, OursFailed) else f"{problem.id}: {in_words(failure)}"
    return f"FAILED, not timed: {words}"


def as_dict(result: Result) -> dict[str, Any]:
    names = {name: timing_as_dict(timing) for name, timing in result.timings.items()}
    for name, found in names.items():
        found["error_in_bounds"] = result.errors[name]
        if name in result.memory_bytes:
            found["peak_memory_bytes"] = result.memory_bytes[name]
    return {
        "id": result.problem.id,
        **{name: getattr(result.problem, name) for name in result.problem.__dataclass_fields__},
        "level": result.level,
        "results": names,
        "speedup": {name: result.ratio(name) for name in result.timings if name != OURS},
        "notes": result.notes,
    }
