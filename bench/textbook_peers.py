"""Who computes the textbook attentions, for bench/textbook.py to time: ours and plain code, in the form that suits it
best. "eager" is the formula as PyTorch's users write it, "compiled" the same through torch.compile. Beside those that
share their scores with fastattn.attention that stands too, as a yardstick of time.

    additive  softmax_j(w . tanh(q_i + k_j)) v_j     plain code holds (B, H, L, L, D) numbers
    hard      v at one key drawn from softmax(q k^T), and the logarithm of its probability
    summary   entropy, largest weight and the 8 largest of every row, and what each key receives
    encoder   torch.nn.TransformerEncoderLayer, and the same with its nn.MultiheadAttention replaced
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn
from bench.cases import DTYPES, SHORT
from bench.measure import error_of
from bench.peers import OURS, Unsupported, prepare_direction
from bench.timing import Runner

EAGER, COMPILED, KERAS, ATTENTION = "eager", "compiled", "keras", "attention"
TITLES = {
    OURS: "fastattn",
    EAGER: "eager PyTorch",
    COMPILED: "torch.compile of the formula",
    KERAS: "keras, torch backend",
    ATTENTION: "fastattn.attention",
}
TOP_K = 8
PLAIN_LIMIT_BYTES = 2 << 30  # of the largest tensor of plain code, which keeps two or three of that size
CHUNK_BYTES = 256 << 20  # of that which is checked at a time


@dataclass(frozen=True)
class Problem:
    """As many keys as queries, values as wide as keys. An encoder layer is H * D wide."""

    family: str
    B: int
    H: int
    L: int
    D: int
    direction: str = "forward"
    dtype: str = "float32"
    device: str = "cpu"
    dropout_p: float = 0.0
    key_mass: bool = True

    @property
    def id(self) -> str:
        parts = [self.family, SHORT[self.dtype], self.direction, f"B{self.B}-H{self.H}-L{self.L}-D{self.D}"]
        parts += [f"dropout{self.dropout_p:g}"] * bool(self.dropout_p) + ["rows"] * (not self.key_mass)
        return "-".join(parts)

    @property
    def plain_bytes(self) -> int:
        """The largest tensor that plain code makes."""
        per_pair = self.D if self.family == "additive" else 1
        return self.B * self.H * self.L * self.L * per_pair * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Candidate:
    """error: what one call returns, compared with what is right, in units of the largest difference that counts so."""

    runner: Runner
    error: Callable[[], float]


Inputs = dict[str, Tensor]
Prepare = Callable[[Problem, Inputs], Candidate]


def draw(problem: Problem) -> Inputs:
    generator = torch.Generator(problem.device).manual_seed(zlib.crc32(problem.id.encode()))

    def randn(*shape: int) -> Tensor:
        x = torch.empty(shape, device=problem.device, dtype=DTYPES[problem.dtype])
        return x.normal_(generator=generator)  # in place: a temporary would leave room for memory to hide in

    B, H, L, D = problem.B, problem.H, problem.L, problem.D
    if problem.family == "encoder":
        return {"x": randn(B, L, H * D), "d_o": randn(B, L, H * D)}
    inputs = {name: randn(B, H, L, D) for name in ("q", "k", "v", "d_o")}
    if problem.family == "additive":
        return inputs | {"w": randn(H, D).mul_(D**-0.5)}
    return inputs | {"d_log_prob": torch.randn(B, H, L, generator=generator, device=problem.device)}


def variables(problem: Problem, inputs: Inputs, names: Sequence[str]) -> list[Tensor]:
    return [inputs[name].detach().requires_grad_(problem.direction != "forward") for name in names]


def refuse_large(problem: Problem) -> None:
    if problem.plain_bytes > PLAIN_LIMIT_BYTES:
        raise Unsupported(f"a single tensor of it would take {problem.plain_bytes / 2**30:.1f} GiB")


def compile_formula(problem: Problem, formula: Callable[..., Any]) -> Callable[..., Any]:
    compilers = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    if problem.device == "cpu" and not any(shutil.which(compiler) for compiler in compilers if compiler):
        raise Unsupported("torch.compile needs a C++ compiler, and there is none")
    if problem.device == "cuda" and importlib.util.find_spec("triton") is None:
        raise Unsupported("torch.compile needs triton for a GPU, which is not installed")
    import torch._functorch.config as functorch

    # A backward pass that may overwrite what the forward pass saved refuses to run a second time, as timing has it do.
    if hasattr(functorch, "donated_buffer"):
        functorch.donated_buffer = False
    torch.compiler.reset()  # else the limit on recompilations is reached after a few problems
    return torch.compile(formula, dynamic=False)


# ------------------------------------------------------------------------------------------------------------ additive


def additive_formula(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """With a matrix product over D, which is what eager PyTorch is fastest with."""
    features = torch.tanh(q.unsqueeze(-2) + k.unsqueeze(-3))  # (B, H, Lq, Lk, D)
    return torch.softmax((features @ w[:, None, :, None]).squeeze(-1), -1) @ v


def additive_formula_to_fuse(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """With a sum over D, which a compiler can fuse with its operands: a matrix product needs them whole."""
    features = torch.tanh(q.unsqueeze(-2) + k.unsqueeze(-3))
    return torch.softmax((features * w[:, None, None]).sum(-1), -1) @ v


def expected_additive(problem: Problem, inputs: Inputs) -> tuple[Tensor, ...]:
    """(o,) or (dq, dk, dv, dw) in float32, a few rows at a time."""
    q, k, v, w = (x.float() for x in variables(problem, inputs, "qkvw"))
    rows = max(1, CHUNK_BYTES // (4 * problem.B * problem.H * problem.L * problem.D))
    outputs, d_q, others = [], [], [torch.zeros_like(x) for x in (k, v, w)]
    for begin in range(0, problem.L, rows):
        part = slice(begin, begin + rows)
        q_part = q[:, :, part]
        if problem.direction == "forward":
            outputs.append(additive_formula(q_part, k, v, w))
            continue
        o = additive_formula(q_part, k, v, w)
        dq, *rest = torch.autograd.grad(o, (q_part, k, v, w), inputs["d_o"][:, :, part].float())
        d_q.append(dq)
        for total, x in zip(others, rest, strict=True):
            total += x
    return (torch.cat(outputs, 2),) if problem.direction == "forward" else (torch.cat(d_q, 2), *others)


def additive_candidate(
    name: str, attend: Callable[..., Tensor], problem: Problem, inputs: Inputs, leaves: Sequence[Tensor] | None = None
) -> Candidate:
    """leaves: tensors of its own in the place of q, k, v and w."""
    leaves = leaves or variables(problem, inputs, "qkvw")
    direction, d_o = problem.direction, inputs["d_o"]
    prepared = prepare_direction(name, lambda: (attend(*leaves),), leaves, (d_o,), direction)

    def error() -> float:
        expected = expected_additive(problem, inputs)
        # keras has its own shapes for the same numbers.
        results = [x.reshape(e.shape) for x, e in zip(prepared.results(), expected, strict=True)]
        return error_of(problem.dtype, results, expected)

    return Candidate(prepared.runner, error)


def additive_ours(problem: Problem, inputs: Inputs) -> Candidate:
    return additive_candidate(OURS, fastattn.additive_attention, problem, inputs)


def additive_eager(problem: Problem, inputs: Inputs) -> Candidate:
    refuse_large(problem)
    return additive_candidate(EAGER, additive_formula, problem, inputs)


def additive_compiled(problem: Problem, inputs: Inputs) -> Candidate:
    return additive_candidate(COMPILED, compile_formula(problem, additive_formula_to_fuse), problem, inputs)


def additive_keras(problem: Problem, inputs: Inputs) -> Candidate:
    """keras.layers.AdditiveAttention, which has one head and calls w its scale."""
    if importlib.util.find_spec("keras") is None:
        raise Unsupported("keras is not installed")
    refuse_large(problem)
    if problem.H != 1:
        raise Unsupported("keras.layers.AdditiveAttention has one head")
    os.environ.setdefault("KERAS_BACKEND", "torch")
    keras = importlib.import_module("keras")
    if keras.backend.backend() != "torch":
        raise Unsupported(f"keras runs on {keras.backend.backend()} here; KERAS_BACKEND=torch chooses torch")
    q, k, v = (x.squeeze(1).detach() for x in (inputs["q"], inputs["k"], inputs["v"]))
    layer = keras.layers.AdditiveAttention(dtype=problem.dtype)
    with keras.device("cpu" if problem.device == "cpu" else "gpu:0"):
        layer.build([q.shape, v.shape, k.shape])
    layer.scale.assign(inputs["w"].squeeze(0))
    leaves = [*(x.requires_grad_(problem.direction != "forward") for x in (q, k, v)), layer.scale.value]

    def attend(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        return layer([q, v, k]).unsqueeze(1)

    return additive_candidate(KERAS, attend, problem, inputs, leaves)


# ---------------------------------------------------------------------------------------------------------------- hard


Hard = tuple[Tensor, Tensor, Tensor]  # output, log_prob, index


def hard_formula(q: Tensor, k: Tensor, v: Tensor) -> Hard:
    log_p = torch.log_softmax(q @ k.mT * q.shape[-1] ** -0.5, -1)
    with torch.no_grad():
        index = torch.multinomial(log_p.exp().flatten(0, -2), 1).view(*q.shape[:-1], 1)
    o = v.gather(2, index.expand(*q.shape[:-1], v.shape[-1]))
    return o, log_p.gather(-1, index).squeeze(-1), index.squeeze(-1)


def hard_ours_formula(q: Tensor, k: Tensor, v: Tensor) -> Hard:
    drawn = fastattn.hard_attention(q, k, v)
    return drawn.output, drawn.log_prob, drawn.index


def expected_hard(problem: Problem, inputs: Inputs, index: Tensor) -> tuple[Tensor, ...]:
    """For the keys that were drawn: (o, log_prob), or (dq, dk, dv), in float32 and a few heads at a time."""
    per_head: list[tuple[Tensor, ...]] = []
    for b in range(problem.B):
        for h in range(problem.H):
            q, k, v = (x.float()[b, h] for x in variables(problem, inputs, "qkv"))
            log_p = torch.log_softmax(q @ k.mT * problem.D**-0.5, -1)
            here = index[b, h, :, None]
            o, log_prob = v[index[b, h]], log_p.gather(-1, here).squeeze(-1)
            results: tuple[Tensor, ...] = (o, log_prob)
            if problem.direction != "forward":
                d_outputs = inputs["d_o"][b, h].float(), inputs["d_log_prob"][b, h]
                results = torch.autograd.grad((o, log_prob), (q, k, v), d_outputs)
            per_head.append(results)
    stacked = (torch.stack(x) for x in zip(*per_head, strict=True))
    return tuple(x.unflatten(0, (problem.B, problem.H)) for x in stacked)


def hard_candidate(name: str, attend: Callable[..., Hard], problem: Problem, inputs: Inputs) -> Candidate:
    leaves = variables(problem, inputs, "qkv")
    drawn: list[Tensor] = []  # the keys of the last forward pass

    def forward() -> Hard:
        o, log_prob, index = attend(*leaves)
        drawn[:] = [index]
        return o, log_prob, index

    prepared = prepare_direction(name, forward, leaves, (inputs["d_o"], inputs["d_log_prob"]), problem.direction)

    def error() -> float:
        results = prepared.results()[: 2 if problem.direction == "forward" else 3]
        (index,) = drawn
        if index.min() < 0 or index.max() >= problem.L:
            return math.inf
        expected = expected_hard(problem, inputs, index)
        # A gradient each, but a log-probability is no value: it has a yardstick of its own.
        groups = [(0, 1), (1, 2)] if problem.direction == "forward" else [(0, 3)]
        return max(error_of(problem.dtype, results[a:b], expected[a:b]) for a, b in groups)

    return Candidate(prepared.runner, error)


def hard_ours(problem: Problem, inputs: Inputs) -> Candidate:
    return hard_candidate(OURS, hard_ours_formula, problem, inputs)


def hard_eager(problem: Problem, inputs: Inputs) -> Candidate:
    refuse_large(problem)
    return hard_candidate(EAGER, hard_formula, problem, inputs)


def hard_compiled(problem: Problem, inputs: Inputs) -> Candidate:
    refuse_large(problem)
    return hard_candidate(COMPILED, compile_formula(problem, hard_formula), problem, inputs)


def attention_yardstick(problem: Problem, inputs: Inputs) -> Candidate:
    """fastattn.attention on the same operands: something else, which costs about as much."""
    leaves = variables(problem, inputs, "qkv")
    prepared = prepare_direction(
        ATTENTION, lambda: (fastattn.attention(*leaves),), leaves, (inputs["d_o"],), problem.direction
    )

    def error() -> float:
        q, k, v = (x.float() for x in leaves)
        o = F.scaled_dot_product_attention(q, k, v)
        expected = (o,) if problem.direction == "forward" else torch.autograd.grad(o, (q, k, v), inputs["d_o"].float())
        return error_of(problem.dtype, prepared.results(), expected)

    return Candidate(prepared.runner, error)


# ------------------------------------------------------------------------------------------------------------- summary


Summary = tuple[Tensor, ...]  # entropy, maximum, top weights, top indices, and the mass of keys where it is wanted


def summary_formula(q: Tensor, k: Tensor, key_mass: bool) -> Summary:
    p = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1)
    top = p.topk(TOP_K)
    results: Summary = (torch.special.entr(p).sum(-1), p.amax(-1), top.values, top.indices)
    return (*results, p.sum(-2)) if key_mass else results


def summary_ours_formula(q: Tensor, k: Tensor, key_mass: bool) -> Summary:
    found = fastattn.attention_summary(q, k, top_k=TOP_K, key_mass=key_mass)
    results: Summary = (found.entropy, found.maximum, found.top_weights, found.top_indices)
    return results if found.key_mass is None else (*results, found.key_mass)


def summary_candidate(name: str, summarise: Callable[..., Summary], problem: Problem, inputs: Inputs) -> Candidate:
    q, k = inputs["q"], inputs["k"]
    prepared = prepare_direction(name, lambda: summarise(q, k, problem.key_mass), (), (), "forward")

    def error() -> float:
        entropy, maximum, weights, indices, *mass = prepared.results()
        worst = 0.0
        for b in range(problem.B):
            for h in range(problem.H):
                p = torch.softmax(q[b, h].float() @ k[b, h].float().mT * problem.D**-0.5, -1)
                top = p.topk(TOP_K).values
                # Of equal weights any key will do: what counts is the weight of the one that was named.
                named = p.gather(-1, indices[b, h])
                pairs = [(entropy[b, h], torch.special.entr(p).sum(-1)), (maximum[b, h], p.amax(-1))]
                pairs += [(weights[b, h], top), (named, top), *((x[b, h], p.sum(0)) for x in mass)]
                worst = max(worst, *(error_of(problem.dtype, (x,), (y,)) for x, y in pairs))
        return worst

    return Candidate(prepared.runner, error)


def summary_ours(problem: Problem, inputs: Inputs) -> Candidate:
    return summary_candidate(OURS, summary_ours_formula, problem, inputs)


def summary_eager(problem: Problem, inputs: Inputs) -> Candidate:
    refuse_large(problem)
    return summary_candidate(EAGER, summary_formula, problem, inputs)


def summary_compiled(problem: Problem, inputs: Inputs) -> Candidate:
    refuse_large(problem)
    return summary_candidate(COMPILED, compile_formula(problem, summary_formula), problem, inputs)


# ------------------------------------------------------------------------------------------------------------- encoder


def encoder_layer(problem: Problem, *, is_replaced: bool) -> nn.Module:
    """The same weights whichever it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer: nn.Module = nn.TransformerEncoderLayer(
            problem.H * problem.D, problem.H, dropout=problem.dropout_p, batch_first=True
        )
    if is_replaced:
        layer = fastattn.replace_modules(layer)
    return layer.to(problem.device, DTYPES[problem.dtype])


def set_dropout(layer: nn.Module, dropout_p: float) -> None:
    for module in layer.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout_p
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = dropout_p


def encoder_candidate(name: str, problem: Problem, inputs: Inputs) -> Candidate:
    """In training. What dropout leaves is up to chance: without it, everything else is compared."""
    layer = encoder_layer(problem, is_replaced=name == OURS)
    (x,) = variables(problem, inputs, ["x"])
    leaves = [x, *layer.parameters()]
    prepared = prepare_direction(name, lambda: (layer(x),), leaves, (inputs["d_o"],), problem.direction)

    def error() -> float:
        plain = replace(problem, dropout_p=0.0)
        exact = encoder_layer(plain, is_replaced=False).float()
        exact_x = x.detach().float().requires_grad_()
        y = exact(exact_x)
        expected: tuple[Tensor, ...] = (y,)
        if problem.direction != "forward":
            expected = torch.autograd.grad(y, [exact_x, *exact.parameters()], inputs["d_o"].float())
        set_dropout(layer, 0.0)
        try:
            # Prepared anew: a backward pass alone would go through what dropout has left.
            results = prepare_direction(
                name, lambda: (layer(x),), leaves, (inputs["d_o"],), problem.direction
            ).results()
        finally:
            set_dropout(layer, problem.dropout_p)
        return error_of(problem.dtype, [result.detach() for result in results], [e.detach() for e in expected])

    return Candidate(prepared.runner, error)


def encoder_ours(problem: Problem, inputs: Inputs) -> Candidate:
    return encoder_candidate(OURS, problem, inputs)


def encoder_eager(problem: Problem, inputs: Inputs) -> Candidate:
    return encoder_candidate(EAGER, problem, inputs)


FAMILIES: dict[str, dict[str, Prepare]] = {
    "additive": {OURS: additive_ours, EAGER: additive_eager, COMPILED: additive_compiled, KERAS: additive_keras},
    "hard": {OURS: hard_ours, ATTENTION: attention_yardstick, EAGER: hard_eager, COMPILED: hard_compiled},
    "summary": {OURS: summary_ours, ATTENTION: attention_yardstick, EAGER: summary_eager, COMPILED: summary_compiled},
    "encoder": {OURS: encoder_ours, EAGER: encoder_eager},
}
