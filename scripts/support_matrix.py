"""Writes docs/support-matrix.md: what is served, as the code itself says.

- Which calls are served: the public functions are called with tensors that have a shape and a device and no data. The
  operators' shape rules refuse what the operators would refuse (`check_fake` in fastattn/_ops.py), on a machine without
  a GPU for "cuda" too.
- Which arguments there are: the functions' signatures.
- What has a gradient: small calls on the CPU, differentiated once and twice. On CUDA: whether the operator of the
  backward pass is registered for it (csrc/torch/operators.cpp, which both libraries share).
- What each instruction set does: csrc/cpu/isa_*.cpp and the headers that they include.

`python scripts/support_matrix.py` writes the page anew; --check says whether that would change anything. The page does
not depend on the machine.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fastattn  # noqa: E402
from fastattn import _cuda  # noqa: E402

PAGE = ROOT / "docs" / "support-matrix.md"
logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # it logs each refusal

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = {"CPU": "cpu", "CUDA": "cuda"}
HEAD_DIMS = (1, 8, 64, 65, 128, 256, 257, 512, 1024)
INT32 = torch.int32


# --- Calls ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """The shapes of a call."""

    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    B: int = 2
    Hq: int = 4
    Hkv: int = 4
    Lq: int = 5
    Lk: int = 7
    D: int = 16
    Dv: int = 16

    @property
    def accumulator(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def floats(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.rand(shape, dtype=dtype or self.dtype, device=self.device)

    def counts(self, *values: int) -> Tensor:
        if self.device == "cpu":
            return torch.tensor(values, dtype=INT32)
        return torch.zeros(len(values), dtype=INT32, device=self.device)  # a device that is not there keeps no numbers

    def qkv(self) -> dict[str, Tensor]:
        return {
            "q": self.floats(self.B, self.Hq, self.Lq, self.D),
            "k": self.floats(self.B, self.Hkv, self.Lk, self.D),
            "v": self.floats(self.B, self.Hkv, self.Lk, self.Dv),
        }


Arguments = dict[str, Any]


def _packed(p: Problem) -> Arguments:
    tensors = {
        "q": p.floats(p.B * p.Lq, p.Hq, p.D),
        "k": p.floats(p.B * p.Lk, p.Hkv, p.D),
        "v": p.floats(p.B * p.Lk, p.Hkv, p.Dv),
    }
    ends = {f"cu_seqlens_{x}": p.counts(*[b * n for b in range(p.B + 1)]) for x, n in (("q", p.Lq), ("k", p.Lk))}
    return {**tensors, **ends, "max_seqlen_q": p.Lq, "max_seqlen_k": p.Lk}


def _cached(p: Problem) -> Arguments:
    return {
        "q": p.floats(p.B, p.Hq, p.Lq, p.D),
        "k_cache": p.floats(p.B, p.Hkv, p.Lk, p.D),
        "v_cache": p.floats(p.B, p.Hkv, p.Lk, p.Dv),
        "cache_lengths": p.counts(*[p.Lk] * p.B),
    }


def _paged(p: Problem) -> Arguments:
    pages = {
        "k_cache": p.floats(p.B, p.Hkv, 8, p.D),
        "v_cache": p.floats(p.B, p.Hkv, 8, p.Dv),
    }
    return {**pages, "block_table": p.counts(*range(p.B)).view(p.B, 1)}


def _int8(p: Problem) -> Arguments:
    zeros = {
        f"{x}_cache": torch.zeros((p.B, p.Hkv, p.Lk, n), dtype=torch.int8, device=p.device)
        for x, n in (("k", p.D), ("v", p.Dv))
    }
    scales = {f"{x}_scale": p.floats(p.B, p.Hkv, p.Lk, dtype=torch.float32) for x in "kv"}
    return {**zeros, **scales}


def _appended(p: Problem) -> Arguments:
    new = {"k": p.floats(p.B, p.Hkv, 2, p.D), "v": p.floats(p.B, p.Hkv, 2, p.Dv)}
    return {**new, "cache_lengths": p.counts(*[p.Lk - 2] * p.B)}


def _rotated(p: Problem) -> Arguments:
    angles = {f"rotary_{x}": p.floats(p.Lk + 2, p.D // 2) for x in ("cos", "sin")}
    return {**_appended(p), **angles, "q": p.floats(p.B, p.Hq, 2, p.D)}


def _renamed(p: Problem) -> Arguments:
    tensors = p.qkv()
    return {"query": tensors["q"], "key": tensors["k"], "value": tensors["v"], "enable_gqa": p.Hq != p.Hkv}


# How each function is called; a name, and the arguments that it must have.
FUNCTIONS: dict[str, Callable[[Problem], Arguments]] = {
    "attention": Problem.qkv,
    "scaled_dot_product_attention": _renamed,
    "varlen_attention": _packed,
    "attention_with_kv_cache": _cached,
    "additive_attention": lambda p: {**p.qkv(), "w": p.floats(p.D)},
    "hard_attention": Problem.qkv,
    "attention_summary": lambda p: {name: x for name, x in p.qkv().items() if name != "v"},
}
PLAIN = Problem()


@dataclass(frozen=True)
class Feature:
    """Something that a call may ask for.

    Args:
        title: In a reader's words.
        ways: By the name of an argument: what asks for it. The first whose name the function has counts; "" stands for
            one that needs no argument of its own.
        shapes: How the problem is changed.
    """

    title: str
    ways: dict[str, Callable[[Problem], Arguments]]
    shapes: Callable[[Problem], Problem] = lambda p: p
    combines: bool = True  # with all others that do: it is part of the call that asks for everything at once


def _constant(**arguments: Any) -> Callable[[Problem], Arguments]:
    return lambda p: arguments


def _scores(p: Problem, dtype: torch.dtype | None = None) -> Tensor:
    return p.floats(1, p.Hq, p.Lq, p.Lk, dtype=dtype)


def _hidden(p: Problem) -> Tensor:
    return torch.ones((p.B, 1, p.Lq, p.Lk), dtype=torch.bool, device=p.device)


FEATURES = (
    Feature(
        "causal, top-left",
        {"causal": _constant(causal="top_left"), "is_causal": _constant(is_causal=True)},
        combines=False,
    ),
    Feature("causal, bottom-right", {"causal": _constant(causal="bottom_right")}),
    Feature("sliding window, one or both sides", {"window": _constant(window=(3, 1))}),
    Feature("scale", {"scale": _constant(scale=0.3)}),
    Feature("softcap", {"softcap": _constant(softcap=20.0)}),
    Feature(
        "bias on the scores",
        {"bias": lambda p: {"bias": _scores(p)}, "attn_mask": lambda p: {"attn_mask": _scores(p)}},
    ),
    Feature(
        "bias in float32 beside 16-bit inputs",
        {
            "bias": lambda p: {"bias": _scores(p, p.accumulator)},
            "attn_mask": lambda p: {"attn_mask": _scores(p, p.accumulator)},
        },
    ),
    Feature(
        "boolean mask",
        {"mask": lambda p: {"mask": _hidden(p)}, "attn_mask": lambda p: {"attn_mask": _hidden(p)}},
    ),
    Feature("ALiBi", {"alibi_slopes": lambda p: {"alibi_slopes": p.floats(p.Hq, dtype=p.accumulator)}}),
    Feature("attention sinks", {"sinks": lambda p: {"sinks": p.floats(p.Hq, dtype=p.accumulator)}}),
    Feature(
        "a number of keys for each sequence",
        {
            "kv_lengths": lambda p: {"kv_lengths": p.counts(*[p.Lk - 1] * p.B)},
            "cu_seqlens_k": _constant(),
            "cache_lengths": _constant(),
        },
    ),
    Feature("dropout", {"dropout_p": _constant(dropout_p=0.1)}),
    # A summary always has it.
    Feature("log-sum-exp", {"return_lse": _constant(return_lse=True), "top_k": _constant()}),
    Feature("grouped-query heads", {"": _constant()}, lambda p: replace(p, Hkv=2)),
    Feature(
        "Dv other than D",
        {"v": _constant(), "v_cache": _constant(), "value": _constant()},
        lambda p: replace(p, Dv=24),
    ),
    Feature("no rows, Lq = 0", {"": _constant()}, lambda p: replace(p, Lq=0), combines=False),
    Feature("no keys, Lk = 0", {"": _constant()}, lambda p: replace(p, Lk=0), combines=False),
    Feature("no sequence, B = 0", {"": _constant()}, lambda p: replace(p, B=0), combines=False),
    Feature("a cache in pages", {"block_table": _paged}, combines=False),
    Feature("an int8 cache", {"k_scale": _int8}, combines=False),
    Feature("appending to a cache", {"cache_lengths": _appended}, combines=False),
    Feature("rotary embedding", {"rotary_cos": _rotated}, combines=False),
)


VALUES = next(feature for feature in FEATURES if "v_cache" in feature.ways)


def _together() -> Feature:
    """All that combine, in one call of a problem whose shapes are those of all."""
    combined = [feature for feature in FEATURES if feature.combines]

    def shapes(problem: Problem) -> Problem:
        for feature in combined:
            problem = feature.shapes(problem)
        return problem

    return Feature("all of the above at once", {"": lambda p: {}}, shapes)


TOGETHER = _together()


def way_of(name: str, feature: Feature) -> Callable[[Problem], Arguments] | None:
    """How this function is asked for the feature; None where it has no argument for it."""
    parameters = inspect.signature(getattr(fastattn, name)).parameters
    return next((way for argument, way in feature.ways.items() if not argument or argument in parameters), None)


def arguments_of(name: str, problem: Problem, feature: Feature | None = None) -> Arguments | None:
    """Arguments for a call; None where the function has none for the feature."""
    if feature is None:
        return FUNCTIONS[name](problem)
    way = way_of(name, feature)
    if way is None:
        return None
    problem = feature.shapes(problem)
    arguments = {**FUNCTIONS[name](problem), **way(problem)}
    if feature is TOGETHER:
        for other in FEATURES:
            if other.combines and (way := way_of(name, other)) is not None:
                arguments.update(way(problem))
    return arguments


def refusal(name: str, problem: Problem, feature: Feature | None = None) -> str | None:
    """Why a call would be refused, asked with tensors that have no data; None = it is served, "" = no such argument.

    Only a refusal in this library's own words counts as one: anything else is an error here.
    """
    # To tensors without data "cuda" is a device like any other. Their numbers cannot be read: the checks see zeros.
    with FakeTensorMode(), torch.no_grad():
        arguments = arguments_of(name, problem, feature)
        if arguments is None:
            return ""
        try:
            getattr(fastattn, name)(**arguments)
        except (ValueError, TypeError) as error:
            if not str(error).startswith("fastattn: "):
                raise
            return str(error).removeprefix("fastattn: ")
    return None


def taken(device: str) -> list[torch.dtype]:
    """The dtypes that attention takes on a device."""
    return [dtype for dtype in DTYPES if refusal("attention", replace(PLAIN, dtype=dtype, device=device)) is None]


# --- Gradients --------------------------------------------------------------------------------------------------------

# What may have a gradient, by its name in the page. SDPA's bias is its mask.
GRADIENTS = {
    "q": ("q", "query"),
    "k": ("k", "key"),
    "v": ("v", "value"),
    "w": ("w",),
    "bias": ("bias", "attn_mask"),
    "sinks": ("sinks",),
}


def _outputs(result: Any) -> list[Tensor]:
    parts = result if isinstance(result, tuple) else (result,)
    return [x for x in parts if isinstance(x, Tensor) and x.requires_grad]


def gradients(name: str) -> tuple[list[str], bool, bool]:
    """What a function's results can be differentiated by, in float64 on the CPU; whether twice, and in forward mode."""
    function = getattr(fastattn, name)
    problem = replace(PLAIN, dtype=torch.float64)
    found, twice, forward = [], False, False
    for title, names in GRADIENTS.items():
        feature = next((feature for feature in FEATURES if title in feature.ways), None)
        arguments = arguments_of(name, problem, feature if title in ("bias", "sinks") else None)
        argument = next((x for x in names if arguments and x in arguments), None)
        if arguments is None or argument is None:
            continue
        x = arguments[argument].requires_grad_()
        try:
            outputs = _outputs(function(**arguments))
        except ValueError as error:
            if not str(error).startswith("fastattn: "):
                raise
            continue
        if not outputs:
            continue
        (gradient,) = torch.autograd.grad([y.square().sum() for y in outputs], x, create_graph=True)
        found.append(title)
        if title == "q":
            (second,) = torch.autograd.grad(gradient.square().sum(), x)
            twice = bool(second.isfinite().all())
            with forward_ad.dual_level():
                arguments[argument] = forward_ad.make_dual(x.detach(), torch.ones_like(x))
                results = function(**arguments)
                parts = results if isinstance(results, tuple) else (results,)
                forward = any(forward_ad.unpack_dual(y).tangent is not None for y in parts if isinstance(y, Tensor))
    return found, twice, forward


def registered() -> set[str]:
    """The operators that either library registers, from the one function that both call."""
    operators = (ROOT / "csrc/torch/operators.cpp").read_text(encoding="utf-8")
    for library, key in (("library.cpp", "CPU"), ("cuda_library.cpp", "CUDA")):
        text = (ROOT / "csrc/torch" / library).read_text(encoding="utf-8")
        assert re.search(rf"IMPL\(fastattn, {key}, m\) \{{\s*fastattn::register_operators\(m\)", text), library
    return set(re.findall(r'm\.impl\(\s*"(\w+)"', operators))


OPERATORS = {"scaled_dot_product_attention": "attention"}  # whose operator is another function's


# --- Instruction sets -------------------------------------------------------------------------------------------------

# By what a level's file is compiled for.
ARCHITECTURES = {"__x86_64__": "x86-64", "__aarch64__": "aarch64", "FASTATTN_HAS_NEON_BF16": "aarch64"}


@dataclass(frozen=True)
class Level:
    """One csrc/cpu/isa_<level>.cpp."""

    name: str
    architecture: str  # "" = any
    needs: str  # what its target region asks of a processor
    lanes: int  # floats in a vector
    has_bf16_dot: bool
    rest: str  # the level to which it hands what it has no kernels for

    def arithmetic(self, dtype: torch.dtype) -> str:
        if dtype == torch.float64:
            return "plain C++"
        if dtype == torch.bfloat16 and self.has_bf16_dot:
            return "bfloat16 dot products"
        if self.rest:
            return f"as `{self.rest}`"
        own = f"vectors of {self.lanes}" if self.architecture else f"vectors of {self.lanes}, by the compiler"
        return own if dtype == torch.float32 else f"as float32: {own}"


def levels() -> list[Level]:
    """All of them, of every architecture, each after those that it includes."""
    order = re.findall(r"level\(k\w+, (\w+)\)", (ROOT / "csrc/cpu/levels.h").read_text(encoding="utf-8"))
    found = []
    for path in sorted((ROOT / "csrc/cpu").glob("isa_*.cpp")):
        text = path.read_text(encoding="utf-8")
        settings = dict(re.findall(r"^#define FASTATTN_(ISA|BF16_DOT|REST) (\w+)", text, flags=re.MULTILINE))
        guard = re.search(r"^#if (?:defined\()?(\w+)", text, flags=re.MULTILINE)
        header = re.search(r'^#include "(cpu/simd/\w+\.h)"', text, flags=re.MULTILINE)
        assert "ISA" in settings, f"{path} does not name its level"
        assert header, f"{path} is written otherwise than its neighbours"
        simd = (ROOT / "csrc" / header.group(1)).read_text(encoding="utf-8")
        lanes = re.search(r"constexpr int kLanes = (\d+)", simd)
        assert lanes, f"{header.group(1)} does not say kLanes"
        has_bf16_dot = settings.get("BF16_DOT", "0") == "1"
        # Of two, the first is for bfloat16 dot products.
        targets = re.findall(r'^FASTATTN_BEGIN_TARGET\("([^"]*)"\)', simd, flags=re.MULTILINE)
        target = targets[0 if has_bf16_dot else -1] if targets else ""
        found.append(
            Level(
                name=settings["ISA"],
                architecture=ARCHITECTURES[guard.group(1)] if guard else "",
                needs=target.removeprefix("arch=").replace(",", ", "),
                lanes=int(lanes.group(1)),
                has_bf16_dot=has_bf16_dot,
                rest=settings.get("REST", ""),
            )
        )
    assert {level.name for level in found} == set(order), "csrc/cpu/levels.h and the files of the levels differ"
    return sorted(found, key=lambda level: order.index(level.name))


def additive_has_no_dot_products() -> bool:
    """Whether a level with bfloat16 dot products hands additive scores on (they have w)."""
    return "p.w == nullptr" in (ROOT / "csrc/cpu/instantiate.h").read_text(encoding="utf-8")


# --- The page ---------------------------------------------------------------------------------------------------------


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def head_dim_rows(name: str, *, of_values: bool) -> tuple[tuple[str, ...], ...]:
    """For each backend and dtype, which head dimensions are served; of v alone, where those of q and k are 16."""
    rows = []
    for backend, device in BACKENDS.items():
        for dtype in DTYPES:
            cells = []
            for dim in HEAD_DIMS:
                problem = replace(PLAIN, dtype=dtype, device=device, Dv=dim, D=PLAIN.D if of_values else dim)
                cells.append("yes" if refusal(name, problem) is None else "refused")
            rows.append((f"{backend}, {short(dtype)}", *cells))
    return tuple(rows)


def head_dims() -> str:
    """A table for each group of functions that agree."""
    groups: dict[tuple[tuple[str, ...], ...], list[str]] = {}
    for name in FUNCTIONS:
        rows = head_dim_rows(name, of_values=False)
        groups.setdefault(rows, []).append(name)
        if way_of(name, VALUES) is not None:
            assert head_dim_rows(name, of_values=True) == rows, f"{name}: the limits of Dv are not those of D"
    parts = []
    for rows, names in groups.items():
        parts.append(", ".join(f"`{name}`" for name in names) + ":\n")
        parts.append(table(["", *(f"D = {dim}" for dim in HEAD_DIMS)], rows))
    return "\n".join(parts)


def feature_cell(name: str, feature: Feature) -> str:
    """Which backends serve it, in every dtype that they take."""
    if way_of(name, feature) is None:
        return "–"
    served = []
    for backend, device in BACKENDS.items():
        answers = {dtype: refusal(name, replace(PLAIN, dtype=dtype, device=device), feature) for dtype in taken(device)}
        refused = [short(dtype) for dtype, answer in answers.items() if answer is not None]
        if not refused:
            served.append(backend)
        elif len(refused) < len(answers):
            served.append(f"{backend} but {', '.join(refused)}")
    return ", ".join(served) or "refused"


def features() -> str:
    names = list(FUNCTIONS)
    alone = [feature for feature in FEATURES if not feature.combines]
    ordered = [*(feature for feature in FEATURES if feature.combines), TOGETHER, *alone]
    rows = [[feature.title, *(feature_cell(name, feature) for name in names)] for feature in ordered]
    return table(["", *(f"`{name}`" for name in names)], rows)


def gradient_table() -> str:
    implemented = registered()
    rows = []
    for name in FUNCTIONS:
        by, twice, forward = gradients(name)
        backward = f"{OPERATORS.get(name, name)}_backward" in implemented
        assert bool(by) == backward, f"{name}: gradients without an operator, or the other way round"
        where = "CPU, CUDA" if backward else "no gradient"
        plain = ["plain operations" if x else "–" for x in (twice, forward)]
        rows.append([f"`{name}`", ", ".join(by) or "–", where, *plain])
    return table(["", "by", "backward pass, fused", "second derivatives", "forward mode"], rows)


def level_tables() -> str:
    there = levels()
    parts = []
    for architecture in ("x86-64", "aarch64"):
        own = [level for level in there if level.architecture in ("", architecture)]
        if all(not level.architecture for level in own):
            parts.append(f"### {architecture}\n\nThe level `baseline` alone.\n")
            continue
        rows = []
        for level in own:
            additive = f"as `{level.rest}`" if level.rest and additive_has_no_dot_products() else "as float32"
            cells = [level.arithmetic(dtype) for dtype in DTYPES]
            rows.append([f"`{level.name}`", level.needs or f"any {architecture}", *cells, additive])
        header = ["level", "needs", *map(short, DTYPES), "additive scores, not float64"]
        parts.append(f"### {architecture}\n\n{table(header, rows)}")
    return "\n".join(parts)


def refusals() -> str:
    """What CUDA refuses and the CPU does not, in the words of the error."""
    wide = {f"D = {dim}": {"D": dim} for dim in HEAD_DIMS if dim > _cuda.MAX_HEAD_DIM}
    problems = {"float64": {"dtype": torch.float64}, **dict(list(wide.items())[:1])}
    rows = []
    for title, changes in problems.items():
        text = refusal("attention", replace(PLAIN, device="cuda", **changes))
        assert text, f"CUDA takes {title}"
        rows.append([title, text])
    return table(["call", "error"], rows)


def page() -> str:
    dims = re.search(r"kHeadDims\[\] = \{([^}]*)\}", (ROOT / "csrc/cuda/heuristics.h").read_text(encoding="utf-8"))
    assert dims, "csrc/cuda/heuristics.h does not say kHeadDims"
    capability = ".".join(map(str, _cuda.OLDEST_CAPABILITY))
    return f"""# Support matrix

<!-- Written by scripts/support_matrix.py from the code; a test compares. Do not edit. -->

What the code says of itself: the operators' own checks were asked, on every backend, with tensors that have a shape and
no data (`scripts/support_matrix.py`). A test makes these calls for real on the CPU, on every instruction set that the
machine has. **No CUDA kernel has run on a GPU yet**: for CUDA this page says what is accepted, and what the kernels
compute on their emulator.

Wherever a call is refused, that is a `ValueError` or a `TypeError` before anything is computed, never a slower path.
`attention_weights` runs the checks of `attention`, and then plain torch operations; `merge_attention_states` is made of
these alone.

## Data types and head dimensions

What holds for D holds for Dv, which may differ.

{head_dims()}
CUDA kernels are for compute capability {capability} and up. They are compiled for heads of {dims.group(1)}; what is
missing in a row is filled with zeros.

## Features

Which backends serve it, in every data type that they take. "–": the function has no such argument.

{features()}
## Gradients

{gradient_table()}
`hard_attention` is differentiated through `log_prob` (by q and k) and through the values that are taken (by v), or by
the gradient of soft attention (`estimator="straight_through"`). "Plain operations" means right, as slow as plain
PyTorch, and with its memory.

## Instruction sets

The highest level that processor and operating system offer is taken at run time; `FASTATTN_CPU_CAPABILITY` forces one.
Every feature above is served on every level. "As float32": elements are widened as they are loaded.

{level_tables()}
Other architectures have the level `baseline`.

## What CUDA refuses

{refusals()}
Lengths up to 2^30 are served on CUDA. Values that lie in a GPU's memory (`kv_lengths`, `cu_seqlens`, block tables) are
not checked there, for that would mean to wait for the device: what leads out of the tensors counts as the nearest that
does not.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description="Write docs/support-matrix.md from the code.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 where the page is not new")
    options = parser.parse_args()
    text = page()
    if options.check:
        if text != PAGE.read_text(encoding="utf-8"):
            print("docs/support-matrix.md is not what the code says: python scripts/support_matrix.py")
            return 1
        return 0
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
