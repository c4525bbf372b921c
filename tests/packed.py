"""Packed sequences: the cases, and what each sequence of a packed call must give.

A packed case is a padded one (tests/cases.py) with a number of rows and keys for each sequence: its tensors are those
of the padded batch with the padding cut out, and a few rows of no sequence behind. Every sequence is an attention
problem of its own, which tests/compare.py knows how to judge; what sequences share, the gradients of sinks and of a
bias that broadcasts over them, is judged by their sums.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

import fastattn

from .cases import Case, Inputs, make_inputs
from .compare import (
    Expected,
    Quantities,
    Spread,
    Terms,
    _compute_by_reference,
    _copy,
    dropout_keep,
    gradients,
    rounding_terms,
    violations,
)

LEFT_OVER = 3  # rows and keys behind the last sequence


@dataclass(frozen=True, eq=False)
class PackedCase:
    """Sequence b has rows[b] rows and keys[b] keys. Options are those of a Case; its lengths are the longest."""

    rows: tuple[int, ...]
    keys: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def padded(self) -> Case:
        return Case(max(self.rows, default=0), max(self.keys, default=0), B=len(self.rows), **self.options)

    @property
    def id(self) -> str:
        lengths = "_".join(f"{n}x{m}" if n != m else str(n) for n, m in zip(self.rows, self.keys, strict=True))
        return f"{self.padded.id}-{lengths}"


def cumulated(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def of_sequence(x: Tensor, b: int, n: int, m: int) -> Tensor:
    """What sequence b, n rows and m keys, takes of a tensor that broadcasts to (B, H, max rows, max keys)."""
    x = x.reshape((1,) * (4 - x.dim()) + tuple(x.shape))
    if x.shape[0] != 1:
        x = x[b : b + 1]
    return x[:, :, : n if x.shape[2] != 1 else 1, : m if x.shape[3] != 1 else 1]


class PackedProblem:
    """The tensors of a packed case in a dtype, and each of its sequences as a problem alone."""

    def __init__(self, case: PackedCase, dtype: torch.dtype, left_over: float = math.nan) -> None:
        self.case, self.dtype = case, dtype
        padded = make_inputs(case.padded, dtype)
        self.kwargs = padded.kwargs

        def packed(x: Tensor, lengths: tuple[int, ...]) -> Tensor:
            """(total, H, D), with rows of no sequence behind."""
            parts = [x[b, :, :n].transpose(0, 1) for b, n in enumerate(lengths)]
            return torch.cat([*parts, x.new_full((LEFT_OVER, x.shape[1], x.shape[3]), left_over)])

        self.q, self.d_o = packed(padded.q, case.rows), packed(padded.d_o, case.rows)
        self.k, self.v = packed(padded.k, case.keys), packed(padded.v, case.keys)
        self.d_lse = packed(padded.d_lse.unsqueeze(-1), case.rows).squeeze(-1).T.contiguous()
        self.cu_seqlens = cumulated(case.rows), cumulated(case.keys)
        self.sequences = [self._sequence(padded, b) for b in range(len(case.rows))]

    def _sequence(self, padded: Inputs, b: int) -> Inputs:
        n, m = self.case.rows[b], self.case.keys[b]
        kwargs = dict(self.kwargs)
        for name in ("bias", "mask"):
            if name in kwargs:
                kwargs[name] = of_sequence(kwargs[name], b, n, m)
        if "alibi_slopes" in kwargs and kwargs["alibi_slopes"].dim() == 2:
            kwargs["alibi_slopes"] = kwargs["alibi_slopes"][b : b + 1]
        rows, keys = slice(0, n), slice(0, m)
        return Inputs(
            padded.q[b : b + 1, :, rows],
            padded.k[b : b + 1, :, keys],
            padded.v[b : b + 1, :, keys],
            padded.d_o[b : b + 1, :, rows],
            padded.d_lse[b : b + 1, :, rows],
            kwargs,
        )

    def attend(self, **more: Any) -> Any:
        arguments = (self.q, self.k, self.v, *self.cu_seqlens)
        longest = {"max_seqlen_q": self.case.padded.Lq, "max_seqlen_k": self.case.padded.Lk}
        return fastattn.varlen_attention(*arguments, **longest, **self.kwargs, **more)

    def compute(self, seed: int = 0) -> Quantities:
        """o, lse and all gradients, packed, by fastattn."""
        inputs = Inputs(self.q, self.k, self.v, self.d_o, self.d_lse, self.kwargs).require_grad()
        torch.manual_seed(seed)
        o, lse = self.attend(return_lse=True)
        return gradients(o, lse, inputs)

    def violations(self, fast: Quantities, seed: int = 0) -> list[str]:
        """Every quantity that breaks the bound of tests/compare.py, and rows of no sequence that hold anything."""
        wanted = expected_of_sequences(self.case, self.dtype, seed)
        found: list[str] = []
        bias = self.kwargs.get("bias")
        shares_bias = bias is not None and (bias.dim() < 4 or bias.shape[0] == 1) and len(self.sequences) != 1
        apart = [name for name in fast if name != "dsinks" and not (name == "dbias" and shares_bias)]
        first_row = first_key = 0
        for b, (n, m) in enumerate(zip(self.case.rows, self.case.keys, strict=True)):
            rows, keys = slice(first_row, first_row + n), slice(first_key, first_key + m)
            mine = {name: fast[name][rows].transpose(0, 1)[None] for name in ("o", "dq")}
            mine |= {name: fast[name][keys].transpose(0, 1)[None] for name in ("dk", "dv")}
            mine["lse"] = fast["lse"][:, rows][None]
            if "dbias" in apart:
                mine["dbias"] = of_sequence(fast["dbias"], b, n, m)
            broken = violations({name: mine[name] for name in apart}, restricted(wanted[b], apart))
            found += [f"sequence {b}: {message}" for message in broken]
            first_row, first_key = rows.stop, keys.stop
        for name in fast:
            if name not in apart:
                found += violations({name: fast[name]}, self._summed(name, wanted, fast[name]))
        beyond = {name: fast[name][first_row:] for name in ("o", "dq")}
        beyond |= {name: fast[name][first_key:] for name in ("dk", "dv")}
        found += [f"{name} of rows of no sequence" for name, x in beyond.items() if not (x == 0).all()]
        if not (fast["lse"][:, first_row:] == -math.inf).all():
            found.append("lse of rows of no sequence")
        return found

    def _summed(self, name: str, wanted: list[Expected], like: Tensor) -> Expected:
        """What the sum of a gradient over all sequences must be; errors add up as random ones do."""

        def total(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
            whole = torch.zeros(like.shape, dtype=torch.float64).reshape((1,) * (4 - like.dim()) + tuple(like.shape))
            for part in parts:
                x = part.reshape((1,) * (4 - part.dim()) + tuple(part.shape))
                whole[tuple(slice(0, size) for size in x.shape)] += x
            return whole.reshape(like.shape).to(dtype)

        def joined(spreads: list[Spread]) -> Spread:
            return Spread(
                math.hypot(*(x.largest for x in spreads)), math.hypot(*(x.rms for x in spreads)), like.numel()
            )

        terms = [x.terms[name] for x in wanted]
        return Expected(
            {name: total([x.exact[name] for x in wanted], torch.float64)},
            {name: total([x.baseline[name] for x in wanted], torch.float64)},
            {name: Terms(joined([t.sums for t in terms]), joined([t.through_o for t in terms]))},
            self.dtype,
        )


# Tests go through the levels of a case and dtype one after the other.
@lru_cache(maxsize=2)
def expected_of_sequences(case: PackedCase, dtype: torch.dtype, seed: int) -> list[Expected]:
    keep = dropout_keep(case.padded, seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for such small operations cost more than they bring
    wanted = []
    for b, inputs in enumerate(PackedProblem(case, dtype).sequences):
        kept = None if keep is None else keep[b : b + 1, :, : case.rows[b], : case.keys[b]]
        exact = _compute_by_reference(_copy(inputs, torch.float64), kept)
        plain = exact if dtype == torch.float64 else _compute_by_reference(_copy(inputs, None), kept)
        wanted.append(Expected(exact, plain, rounding_terms(inputs, kept), dtype))
    torch.set_num_threads(threads)
    return wanted


def restricted(wanted: Expected, names: list[str]) -> Expected:
    return replace(
        wanted,
        exact={name: wanted.exact[name] for name in names},
        baseline={name: wanted.baseline[name] for name in names},
    )
