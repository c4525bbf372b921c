"""`python -m fastattn selftest`: does this installation compute what it should, on this machine?

A sample of calls of every function, forward and backward, on each instruction set level that the processor has, each
type and each GPU, against fastattn.reference in float64. The bound is that of the library's own tests,

    max |fast - exact|  <=  2 * max |plain - exact| + tiny            plain: the reference in the call's own type

with a simpler, more generous tiny: here it is broken hardware, compilers and installations that are looked for. Every
call runs twice, and must give the same bits.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO

import torch
from torch import Tensor

import fastattn
from fastattn import _cuda, _ops, reference

__all__ = ["run"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SEED = 20_26
Tensors = dict[str, Tensor]
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Call:
    """A call of a public function and the same thing in plain operations; both return their results by name."""

    name: str
    make: Callable[[], Tensors]
    fast: Callable[[Tensors], Results]
    plain: Callable[[Tensors], Results]
    # Of these tensors the gradients are results as well.
    gradients: tuple[str, ...] = ("q", "k", "v")
    on: tuple[torch.dtype, ...] = DTYPES


def _inputs(Hq: int = 4, Hkv: int = 2, Lq: int = 67, Lk: int = 131, D: int = 32, Dv: int = 32, B: int = 2) -> Tensors:
    shapes = {"q": (B, Hq, Lq, D), "k": (B, Hkv, Lk, D), "v": (B, Hkv, Lk, Dv)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def _attention(name: str, make: Callable[[], Tensors], gradients: tuple[str, ...] = (), **settings: Any) -> Call:
    """A call of fastattn.attention; what `make` makes beside q, k and v goes by its name."""

    def named(function: Callable[..., Any]) -> Callable[[Tensors], Results]:
        def call(tensors: Tensors) -> Results:
            others = {name: x for name, x in tensors.items() if name not in ("q", "k", "v")}
            q, k, v = tensors["q"], tensors["k"], tensors["v"]
            o, lse = function(q, k, v, return_lse=True, **others, **settings)
            return {"o": o, "lse": lse}

        return call

    return Call(name, make, named(fastattn.attention), named(reference.attention), ("q", "k", "v", *gradients))


def _poisoned() -> Tensors:
    """NaN beyond every length: what is read there shows."""
    tensors = _inputs() | {"kv_lengths": torch.tensor([40, 131], dtype=torch.int32)}
    for name in ("k", "v"):
        tensors[name][0, :, 40:] = torch.nan
    return tensors


def _dropout() -> Call:
    p = 0.3

    def fast(tensors: Tensors) -> Results:
        torch.manual_seed(SEED)
        o, lse = fastattn.attention(tensors["q"], tensors["k"], tensors["v"], dropout_p=p, causal=True, return_lse=True)
        return {"o": o, "lse": lse}

    def plain(tensors: Tensors) -> Results:
        q, k, v = tensors["q"], tensors["k"], tensors["v"]
        torch.manual_seed(SEED)
        keep = torch.ops.fastattn.dropout_mask(_ops.draw_rng_state(), *q.shape[:3], k.shape[2], p)
        o, lse = reference.attention(q, k, v, dropout_p=p, dropout_keep=keep, causal=True, return_lse=True)
        return {"o": o, "lse": lse}

    return Call("dropout", _inputs, fast, plain)


def _packed() -> Call:
    ends_q, ends_k = torch.tensor([0, 30, 30, 97], dtype=torch.int32), torch.tensor([0, 51, 60, 131], dtype=torch.int32)

    def make() -> Tensors:
        return {"q": torch.randn(97, 4, 32), "k": torch.randn(131, 2, 32), "v": torch.randn(131, 2, 32)}

    def fast(tensors: Tensors) -> Results:
        q, k, v = tensors.values()
        ends = [x.to(q.device) for x in (ends_q, ends_k)]
        o, lse = fastattn.varlen_attention(
            q, k, v, ends[0], ends[1], max_seqlen_q=67, max_seqlen_k=71, causal=True, return_lse=True
        )
        return {"o": o, "lse": lse}

    def plain(tensors: Tensors) -> Results:
        q, k, v = tensors.values()
        o, lse = reference.varlen_attention(q, k, v, ends_q, ends_k, causal=True, return_lse=True)
        return {"o": o, "lse": lse}

    return Call("packed sequences", make, fast, plain)


def _cache(name: str, page_size: int | None) -> Call:
    """A prompt, then three tokens, in a cache that starts empty."""
    prompt, new = 45, 3

    def make() -> Tensors:
        return _inputs(Lq=prompt + new, Lk=prompt + new)

    def fast(tensors: Tensors) -> Results:
        q, k, v = (x.detach() for x in tensors.values())
        cache = fastattn.KVCache(2, 2, 32, page_size=page_size, dtype=q.dtype, device=q.device)
        steps = [slice(0, prompt), slice(prompt, prompt + new)]
        return {"o": torch.cat([cache.attend(q[:, :, i], k[:, :, i], v[:, :, i], causal=True) for i in steps], 2)}

    def plain(tensors: Tensors) -> Results:
        o = reference.attention(*(x.detach() for x in tensors.values()), causal=True)
        assert isinstance(o, Tensor)
        return {"o": o}

    return Call(name, make, fast, plain, gradients=())


def _additive() -> Call:
    def make() -> Tensors:
        return _inputs(Hkv=4, Lq=33, Lk=70) | {"w": torch.randn(4, 32)}

    def fast(tensors: Tensors) -> Results:
        o, lse = fastattn.additive_attention(*tensors.values(), causal=True, return_lse=True)
        return {"o": o, "lse": lse}

    def plain(tensors: Tensors) -> Results:
        o, lse = reference.additive_attention(*tensors.values(), causal=True, return_lse=True)
        return {"o": o, "lse": lse}

    return Call("additive", make, fast, plain, ("q", "k", "v", "w"))


def _hard() -> Call:
    """A draw depends on the seed alone, so that the plain version can look up which keys are taken."""

    def draw(tensors: Tensors) -> fastattn.HardAttentionOutput:
        torch.manual_seed(SEED)
        return fastattn.hard_attention(*tensors.values(), mode="sample", temperature=0.5)

    def fast(tensors: Tensors) -> Results:
        found = draw(tensors)
        return {"o": found.output, "log_prob": found.log_prob}

    def plain(tensors: Tensors) -> Results:
        index = draw({name: x.detach().double() for name, x in tensors.items()}).index
        log_p = reference.log_probabilities(tensors["q"], tensors["k"], temperature=0.5)
        o, log_prob = reference.hard_attention(log_p, tensors["v"], index)
        return {"o": o, "log_prob": log_prob}

    return Call("hard", _inputs, fast, plain)


def _summary() -> Call:
    def fast(tensors: Tensors) -> Results:
        found = fastattn.attention_summary(tensors["q"], tensors["k"], top_k=4, causal=True)
        assert found.key_mass is not None
        return {"entropy": found.entropy, "key mass": found.key_mass, "top weights": found.top_weights}

    def plain(tensors: Tensors) -> Results:
        found = reference.attention_summary(tensors["q"], tensors["k"], top_k=4, causal=True)
        return {"entropy": found["entropy"], "key mass": found["key_mass"], "top weights": found["top_weights"]}

    return Call("summary of weights", _inputs, fast, plain, gradients=())


def _replaced_sdpa() -> Call:
    def fast(tensors: Tensors) -> Results:
        with fastattn.replaced_sdpa():
            q, k, v = tensors.values()
            function = torch.nn.functional.scaled_dot_product_attention
            return {"o": function(q, k, v, is_causal=True, enable_gqa=True)}

    def plain(tensors: Tensors) -> Results:
        o = reference.attention(*tensors.values(), causal="top_left")
        assert isinstance(o, Tensor)
        return {"o": o}

    return Call("replaced SDPA", _inputs, fast, plain)


def calls() -> list[Call]:
    """The sample: lengths that straddle tiles, every argument, every function."""
    return [
        _attention("attention", _inputs),
        _attention("short", lambda: _inputs(Lq=5, Lk=7)),
        _attention("few rows, many keys", lambda: _inputs(Lq=3, Lk=700, D=64, Dv=64)),
        _attention("long", lambda: _inputs(B=1, Lq=300, Lk=517, D=64, Dv=64), causal=True),
        _attention("odd head dims", lambda: _inputs(D=65, Dv=43), causal="top_left", softcap=5.0),
        _attention("window", lambda: _inputs(Lk=67), window=(20, 3), scale=0.3),
        _attention("bias", lambda: _inputs() | {"bias": torch.randn(1, 4, 67, 131)}, ("bias",)),
        _attention(
            "mask, ALiBi", lambda: _inputs() | {"mask": torch.rand(67, 131) > 0.4, "alibi_slopes": torch.rand(4)}
        ),
        _attention("sinks", lambda: _inputs() | {"sinks": torch.randn(4)}, ("sinks",), causal=True),
        _attention("lengths", _poisoned, causal=True),
        _dropout(),
        _packed(),
        _cache("cache", None),
        _cache("cache in pages", 16),
        _additive(),
        _hard(),
        _summary(),
        _replaced_sdpa(),
    ]


# ---- Running them ---------------------------------------------------------------------------------------------------


def results(call: Call, function: Callable[[Tensors], Results], tensors: Tensors) -> Results:
    """What the function returns, and the gradients of its floating-point results for all of them at once."""
    leaves = {name: x.detach().requires_grad_(name in call.gradients) for name, x in tensors.items()}
    found = function(leaves)
    outputs = [x for x in found.values() if x.requires_grad]
    if outputs:
        # Not the sum of a result: a row's weights sum to 1, which has no gradient.
        upstream = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype, device=x.device).view(x.shape) for x in outputs]
        grads = torch.autograd.grad(outputs, [leaves[name] for name in call.gradients], upstream)
        found |= {f"d{name}": grad for name, grad in zip(call.gradients, grads, strict=True)}
    return {name: x.detach() for name, x in found.items()}


def cast(tensors: Tensors, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensors:
    return {name: x.to(device, dtype if x.is_floating_point() else None) for name, x in tensors.items()}


@dataclass(frozen=True)
class Expected:
    """What a call must give in a type."""

    exact: Results
    plain: Results

    def violations(self, found: Results, dtype: torch.dtype) -> list[str]:
        """The results that are out of bounds, in words."""
        wrong = []
        for name, exact in self.exact.items():
            x, plain = found[name].cpu().double(), self.plain[name].double()
            visible = exact.isfinite()
            if not torch.equal(x.isfinite(), visible):
                wrong.append(f"{name} has {int((x.isfinite() != visible).sum())} elements that are not finite")
                continue
            error, plain_error = ((y - exact)[visible].abs().max().item() for y in (x, plain))
            size = exact[visible].abs().max().item()
            bound = 2 * plain_error + (4 if dtype.itemsize == 2 else 32) * torch.finfo(dtype).eps * size
            if not error <= bound:
                wrong.append(f"{name} is off by {error:.2e}, and {bound:.2e} is allowed")
        return wrong


def expect(call: Call, dtype: torch.dtype) -> tuple[Tensors, Expected]:
    """The inputs of a call, on the CPU, and what it must give."""
    torch.manual_seed(SEED)
    tensors = cast(call.make(), dtype)
    exact = results(call, call.plain, cast(tensors, torch.float64))
    return tensors, Expected(exact, results(call, call.plain, tensors))


@dataclass
class Report:
    """What has been found so far."""

    results: int = 0
    failures: list[str] = field(default_factory=list)

    def check(self, call: Call, dtype: torch.dtype, where: str, tensors: Tensors, wanted: Expected) -> None:
        """Make the call on a GPU, or on the CPU's level that is in use."""
        label = f"{where}, {str(dtype).removeprefix('torch.')}, {call.name}"
        device = where if where.startswith("cuda") else "cpu"
        try:
            moved = cast(tensors, dtype, device)
            found, again = (results(call, call.fast, moved) for _ in range(2))
        except Exception as error:  # of whatever kind: the others shall still run
            self.failures.append(f"{label}: {type(error).__name__}: {error}")
            return
        self.results += len(found)
        self.failures += [f"{label}: {text}" for text in wanted.violations(found, dtype)]
        self.failures += [
            f"{label}: {name} has other bits in a second run"
            for name, x in found.items()
            if not torch.equal(x.nan_to_num(), again[name].nan_to_num())
        ]


def _on_each_level(levels: list[str]) -> Iterator[str]:
    """Puts one level after the other in use, then the first one again."""
    before = torch.ops.fastattn._isa()
    try:
        for level in levels:
            torch.ops.fastattn._set_isa(level)
            yield level
    finally:
        torch.ops.fastattn._set_isa(before)


def _gpus() -> tuple[list[str], str]:
    """The GPUs that are served, and what is to be said of those that are not."""
    if _cuda.missing is not None:
        return [], f"CUDA not tested: {_cuda.missing}"
    if not torch.cuda.is_available():
        return [], f"CUDA not tested: {_cuda.why_no_device()}"
    served = [index for index in range(torch.cuda.device_count()) if _cuda.obstacle(index) is None]
    reasons = [text for text in _cuda.devices() if ", not served: " in text]
    return [f"cuda:{index}" for index in served], "; ".join(reasons)


def run(out: TextIO | None = None) -> bool:
    """Check everything that there is; prints a line for each type, the failures, and one line at the end."""
    out = sys.stdout if out is None else out
    start = time.monotonic()
    levels = torch.ops.fastattn._supported_isas().split(",")
    gpus, untested = _gpus()
    report = Report()
    table = calls()
    for dtype in DTYPES:
        before, began = report.results, time.monotonic()
        for call in table:
            if dtype not in call.on:
                continue
            tensors, wanted = expect(call, dtype)
            # float64 has one path for all levels.
            for level in _on_each_level(levels[:1] if dtype == torch.float64 else levels):
                report.check(call, dtype, level, tensors, wanted)
            if dtype != torch.float64:
                for gpu in gpus:
                    report.check(call, dtype, gpu, tensors, wanted)
        name = str(dtype).removeprefix("torch.")
        print(f"{name:9} {report.results - before:5} results, {time.monotonic() - began:.1f} s", file=out, flush=True)
    for failure in report.failures:
        print(failure, file=out)
    verdict = f"{len(report.failures)} FAILURES in" if report.failures else "passed:"
    where = ", ".join([*levels, *gpus])
    seconds = time.monotonic() - start
    print(
        f"fastattn {fastattn.__version__} selftest {verdict} {report.results} results of {len(table)} calls on {where},"
        f" torch {torch.__version__}, {seconds:.0f} s{'; ' + untested if untested else ''}",
        file=out,
    )
    return not report.failures
