"""A language model end to end: Llama's architecture, random weights, under each implementation of attention.

bench/llama.json has the sizes: 100 million parameters, four key heads to twelve query heads. The model is Hugging Face
transformers' own, and `attn_implementation` is all that differs. Prefill reads a prompt into an empty cache; decode
reads one token more with a cache of that many. Logits are compared with those of eager float32 before anything is
timed, and the implementations take turns.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.cases import DTYPES
from bench.machine import ROOT
from bench.measure import WrongResult
from bench.memory import count_growth
from bench.report import format_ms, format_ratio, text_table, timing_as_dict
from bench.timing import Runner, Timing, interleave

CONFIG = Path(__file__).with_name("llama.json")
EAGER, SDPA, OURS = "eager", "sdpa", "fastattn"
IMPLEMENTATIONS = (EAGER, SDPA, OURS)
PREFILL, DECODE = "prefill", "decode"


@dataclass(frozen=True)
class Phase:
    """Prefill: a prompt of `tokens`. Decode: one token after `tokens`."""

    kind: str
    tokens: int
    dtype: str

    @property
    def id(self) -> str:
        return f"{self.kind}-{self.tokens}-{self.dtype}"

    @property
    def new_tokens(self) -> int:
        return self.tokens if self.kind == PREFILL else 1


@dataclass
class Result:
    phase: Phase
    timings: dict[str, Timing] = field(default_factory=dict)  # of the whole model
    attention_ms: dict[str, float] = field(default_factory=dict)  # spent in the attention function, all layers
    memory_bytes: dict[str, int] = field(default_factory=dict)  # by which a call raises the process's memory
    errors: dict[str, float] = field(default_factory=dict)  # of logits, largest, beside eager float32

    def ratio(self, over: str) -> float | None:
        if over not in self.timings or OURS not in self.timings:
            return None
        return self.timings[over].median_ms / self.timings[OURS].median_ms

    def attention_ratio(self, over: str) -> float | None:
        if over not in self.attention_ms or OURS not in self.attention_ms:
            return None
        return self.attention_ms[over] / self.attention_ms[OURS]


def phases(quick: bool = False) -> list[Phase]:
    prompt, context = (256, 512) if quick else (2048, 4096)
    return [
        Phase(kind, n, dtype) for dtype in ("bfloat16", "float32") for kind, n in ((PREFILL, prompt), (DECODE, context))
    ]


class Llama:
    """The model in one dtype, its weights shared by the implementations."""

    def __init__(self, dtype: str) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        from fastattn.integrations.transformers import register

        register()
        torch.manual_seed(0)
        self.model: Any = LlamaForCausalLM(LlamaConfig(**json.loads(CONFIG.read_text()))).to(DTYPES[dtype]).eval()
        self.vocabulary = self.model.config.vocab_size

    @contextmanager
    def using(self, implementation: str) -> Iterator[None]:
        self.model.set_attn_implementation(implementation)
        with torch.inference_mode():
            yield

    def prompt(self, tokens: int) -> Tensor:
        return torch.randint(self.vocabulary, (1, tokens), generator=torch.Generator().manual_seed(tokens))

    def prefill(self, ids: Tensor) -> Any:
        """Logits of the last token, and the cache."""
        from transformers import DynamicCache

        found = self.model(ids, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1)
        return found.logits, found.past_key_values

    def step(self, token: Tensor, cache: Any) -> Tensor:
        """Logits after one token more; the cache is left as it was."""
        logits = self.model(token, past_key_values=cache, use_cache=True).logits
        cache.crop(-1)
        return logits


@contextmanager
def clocked_attention(implementation: str) -> Iterator[list[float]]:
    """Seconds that each call of the implementation's attention function takes; eager's is in the model's file."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.llama import modeling_llama

    spent: list[float] = []

    def clocked(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            found = function(*args, **kwargs)
            spent.append(time.perf_counter() - start)
            return found

        return call

    if implementation == EAGER:
        original = modeling_llama.eager_attention_forward
        modeling_llama.eager_attention_forward = clocked(original)
    else:
        original = ALL_ATTENTION_FUNCTIONS[implementation]
        ALL_ATTENTION_FUNCTIONS[implementation] = clocked(original)
    try:
        yield spent
    finally:
        if implementation == EAGER:
            modeling_llama.eager_attention_forward = original
        else:
            ALL_ATTENTION_FUNCTIONS[implementation] = original


def runner_of(llama: Llama, phase: Phase, implementation: str) -> Runner:
    """One call: the whole prompt, or one step with a full cache."""
    ids = llama.prompt(phase.tokens)
    if phase.kind == PREFILL:
        return Runner(implementation, lambda: llama.prefill(ids)[0], lambda: llama.using(implementation))
    with llama.using(OURS):  # the fastest way to fill a cache; all have one of the same numbers
        cache = llama.prefill(ids)[1]
    token = ids[:, :1]
    return Runner(implementation, lambda: llama.step(token, cache), lambda: llama.using(implementation))


def measure(
    phase: Phase, llama: Llama, wanted: Tensor, budget_s: float, say: Callable[[str], None] = lambda _: None
) -> Result:
    """wanted: the logits of eager float32."""
    result = Result(phase)
    runners = [runner_of(llama, phase, name) for name in IMPLEMENTATIONS]
    for runner in runners:
        say(f"checking {runner.name}")
        with runner.context():
            result.errors[runner.name] = (runner.call().float() - wanted).abs().max().item()
    # The others' errors are the measure: all round to the same dtype, in different places.
    allowed = 2 * max(result.errors[EAGER], result.errors[SDPA]) + 1e-4 * wanted.abs().max().item()
    if not result.errors[OURS] <= allowed:
        raise WrongResult(f"{phase.id}: logits are off by {result.errors[OURS]:.3g}, of {allowed:.3g} allowed")
    result.timings = interleave(runners, budget_s, on_turn=say)
    for runner in runners:
        say(f"attention of {runner.name}")
        with clocked_attention(runner.name) as spent, runner.context():
            runner.call()
            per_call = []
            for _ in range(3):
                spent.clear()
                runner.call()
                per_call.append(sum(spent))
        result.attention_ms[runner.name] = 1e3 * sorted(per_call)[1]
        say(f"memory of {runner.name}")
        memory = measure_memory(phase, runner.name)
        if memory is not None:
            result.memory_bytes[runner.name] = memory
    return result


def measure_memory(phase: Phase, implementation: str) -> int | None:
    """In a fresh process, where nothing that was freed before can be taken again; None where nobody can tell."""
    command = [sys.executable, "-m", "bench.llama", phase.kind, str(phase.tokens), phase.dtype, implementation]
    command += [f"--threads={torch.get_num_threads()}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.llama", description="Memory of one call, in bytes.")
    parser.add_argument("kind", choices=(PREFILL, DECODE))
    parser.add_argument("tokens", type=int)
    parser.add_argument("dtype", choices=list(DTYPES))
    parser.add_argument("implementation", choices=IMPLEMENTATIONS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    llama = Llama(options.dtype)
    warm_up = runner_of(llama, Phase(PREFILL, 16, options.dtype), options.implementation)  # loads libraries
    with warm_up.context():
        warm_up.call()
    print(count_growth(runner_of(llama, Phase(options.kind, options.tokens, options.dtype), options.implementation))[0])


def expected_logits(phase: Phase) -> Tensor:
    llama = Llama("float32")
    runner = runner_of(llama, phase, EAGER)
    with runner.context():
        return runner.call().float()


def _say_of(say: Callable[[str], None], phase: Phase, step: str) -> None:
    say(f"{phase.id}: {step}")


def measure_all(chosen: list[Phase], budget_s: float, say: Callable[[str], None] = lambda _: None) -> Iterator[Result]:
    """Raises WrongResult for logits that are off."""
    wanted: dict[tuple[str, int], Tensor] = {}
    llama: tuple[str, Llama] | None = None
    for phase in chosen:
        say(f"{phase.id}: expected logits")
        key = phase.kind, phase.tokens
        if key not in wanted:
            wanted[key] = expected_logits(phase)
        if llama is None or llama[0] != phase.dtype:
            llama = phase.dtype, Llama(phase.dtype)
        yield measure(phase, llama[1], wanted[key], budget_s, partial(_say_of, say, phase))


# ------------------------------------------------------------------------------------------------------------- reports

TITLE = "A Llama-shaped model of 100 M parameters; x: the whole model's time over ours, and its attention's over ours"


def table(results: list[Result]) -> str:
    header = ["phase", "attention", "ms (IQR)", "tokens/s", "x", "attention ms", "share", "x", "MiB"]
    lines = []
    for result in results:
        for name, timing in result.timings.items():
            attention = result.attention_ms[name]
            lines.append(
                [
                    result.phase.id,
                    name,
                    f"{format_ms(timing.median_ms)} ({format_ms(timing.iqr_ms)})",
                    f"{1e3 * result.phase.new_tokens / timing.median_ms:.1f}",
                    format_ratio(result.ratio(name)),
                    format_ms(attention),
                    f"{100 * attention / timing.median_ms:.0f}%",
                    format_ratio(result.attention_ratio(name)),
                    f"{result.memory_bytes[name] / 2**20:.0f}" if name in result.memory_bytes else "-",
                ]
            )
    return text_table(header, lines, left=(0, 1))


def line(result: Result) -> str:
    ours = result.timings[OURS].median_ms
    return f"{result.phase.id}: {format_ms(ours)} ms, {format_ratio(result.ratio(SDPA))} x SDPA"


def as_dict(result: Result) -> dict[str, Any]:
    return {
        "id": result.phase.id,
        "kind": result.phase.kind,
        "tokens": result.phase.tokens,
        "dtype": result.phase.dtype,
        "results": {
            name: {
                **timing_as_dict(timing),
                "tokens_per_s": 1e3 * result.phase.new_tokens / timing.median_ms,
                "attention_ms": result.attention_ms[name],
                "memory_bytes": result.memory_bytes.get(name),
                "logits_error": result.errors[name],
            }
            for name, timing in result.timings.items()
        },
        "speedup": {name: result.ratio(name) for name in result.timings if name != OURS},
        "attention_speedup": {name: result.attention_ratio(name) for name in result.timings if name != OURS},
    }


if __name__ == "__main__":
    main()
