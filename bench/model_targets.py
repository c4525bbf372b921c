"""What serving a language model is held to: decoding, packed sequences, a model end to end. See bench/targets.py."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Generator, Iterator

from bench import decoding, llama, packed
from bench.decoding import Step
from bench.measure import WrongResult
from bench.packed import Batch
from bench.report import format_ms
from bench.target import AT_LEAST, AT_MOST, Target, wrong_target

Say = Callable[[str], None]

# Step, % of the read bandwidth, times SDPA; None where there is no such target.
DECODING: list[tuple[Step, float | None, float | None]] = [
    (Step("bfloat16"), 85, 20),
    (Step("float32"), 85, 2.5),
    (Step("bfloat16", Hkv=32), 85, None),
    (Step("float32", Hkv=32), 85, None),
    (Step("bfloat16", B=8), 85, None),
    (Step("float32", B=8), 85, None),
]
PAGED = [Step("bfloat16", "paged"), Step("float32", "paged")]
QUANTISED = Step("bfloat16", "int8", Lk=16384)


def decode_targets(budget_s: float, say: Say) -> Iterator[Target]:
    for step, percent, ratio in DECODING:
        result = yield from _decoded(step, budget_s, say)
        if result is None:
            continue
        detail = f"{result.gbs:.1f} of {result.bandwidth_gbs:.1f} GB/s"
        if percent is not None:
            yield Target(step.id, "% of read bandwidth", AT_LEAST, percent, 100 * result.of_bandwidth, detail)
        if ratio is not None:
            yield Target(step.id, "x SDPA", AT_LEAST, ratio, result.times(decoding.SDPA), _in_ms(result, decoding.SDPA))
    for step in PAGED:
        result = yield from _decoded(step, budget_s, say)
        times = result and result.times(decoding.CONTIGUOUS)
        if result and times:
            detail = _in_ms(result, decoding.CONTIGUOUS)
            yield Target(step.id, "time / contiguous", AT_MOST, 1.1, 1 / times, detail)
    result = yield from _decoded(QUANTISED, budget_s, say)
    if result:
        detail = _in_ms(result, decoding.CONTIGUOUS)
        yield Target(QUANTISED.id, "x tokens of bfloat16", AT_LEAST, 1.5, result.times(decoding.CONTIGUOUS), detail)


def _decoded(step: Step, budget_s: float, say: Say) -> Generator[Target, None, decoding.Result | None]:
    say(step.id)
    try:
        return decoding.measure(step, budget_s)
    except WrongResult as wrong:
        yield wrong_target(step.id, wrong)
    return None


def _in_ms(result: decoding.Result, other: str) -> str:
    mine, theirs = (format_ms(result.timings[name].median_ms) for name in (decoding.OURS, other))
    return f"{mine} ms, {other} {theirs} ms"


def packed_targets(budget_s: float, say: Say) -> Iterator[Target]:
    for batch in (Batch("bfloat16"), Batch("float32")):
        say(batch.id)
        result = packed.measure(batch, 2 * budget_s)
        mine, dense, padded = (
            format_ms(result.timings[x].median_ms) for x in (packed.OURS, packed.DENSE, packed.PADDED)
        )
        yield Target(batch.id, "rate / dense", AT_LEAST, 0.9, result.of_dense, f"{mine} ms, dense {dense} ms")
        yield Target(batch.id, "x padded SDPA", AT_LEAST, 3, result.over_padded, f"{mine} ms, padded {padded} ms")


LLAMA = {llama.PREFILL: 1.15, llama.DECODE: 1.5}
LLAMA_ATTENTION = 3.0  # times SDPA's own share of prefill


def llama_targets(budget_s: float, say: Say) -> Iterator[Target]:
    chosen = [phase for phase in llama.phases() if phase.dtype == "bfloat16"]
    if importlib.util.find_spec("transformers") is None:
        for phase in chosen:
            yield Target(
                f"Llama {phase.id}", "x SDPA", AT_LEAST, LLAMA[phase.kind], None, "transformers is not installed"
            )
        return
    for result in llama.measure_all(chosen, 4 * budget_s, say):
        name, kind = f"Llama {result.phase.id}", result.phase.kind
        mine, theirs = (format_ms(result.timings[x].median_ms) for x in (llama.OURS, llama.SDPA))
        yield Target(name, "x SDPA", AT_LEAST, LLAMA[kind], result.ratio(llama.SDPA), f"{mine} ms, SDPA {theirs} ms")
        if kind == llama.PREFILL:
            mine, theirs = (format_ms(result.attention_ms[x]) for x in (llama.OURS, llama.SDPA))
            detail = f"{mine} ms in attention, SDPA {theirs} ms"
            ratio = result.attention_ratio(llama.SDPA)
            yield Target(name, "attention, x SDPA", AT_LEAST, LLAMA_ATTENTION, ratio, detail)
