"""Packed sequences by the CUDA kernels on the host emulator: the CPU's cases, and what only a device must decide."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from .compare import differences
from .emulated import MANY_MULTIPROCESSORS, NEVER_SPLIT, compute_emulated, core
from .emulated_packed import compute_emulated_packed
from .emulator_checks import DTYPES, SHORT, each_dtype, leave_out_synchronisations, order_dependence, unnoticed
from .packed import PackedCase, PackedProblem

LENGTHS = (5, 70, 0, 1, 131, 16), (9, 64, 12, 40, 131, 0)
EVERYTHING: dict[str, Any] = {"softcap": 4.0, "alibi": "bh", "sinks": True, "dropout_p": 0.2, "gqa": 2, "Hkv": 1}
CASES = [
    PackedCase(*LENGTHS, {"Hkv": 1}),
    PackedCase(*LENGTHS, {"causal": True, "gqa": 2, "Hkv": 1, "D": 64, "Dv": 40}),
    PackedCase(*LENGTHS, {"causal": "top_left", "D": 17, "Hkv": 1, "window": (40, None)}),
    PackedCase(*LENGTHS, {"window": (20, 3), "bias": "1hqk", "mask": "b11k", "mask_values": "padding", **EVERYTHING}),
    PackedCase(*LENGTHS, {"bias": "bh1k", "sinks": True, "causal": True, "D": 128, "Hkv": 1}),
    # Rows of several heads in one tile, keys that are split.
    PackedCase((2, 0, 1, 3), (300, 5, 0, 130), {"causal": True, "gqa": 4, "Hkv": 1, "D": 32, "sinks": True}),
]
WIDE = [PackedCase((20, 3), (33, 90), {"causal": True, "Hkv": 1, "D": D}) for D in (96, 192, 256)]


def matrix() -> Iterator[Any]:
    for case in (*CASES, *WIDE):
        for dtype in DTYPES if case in CASES else DTYPES[:2]:
            yield pytest.param(case, dtype, id=f"{case.id}-{SHORT[dtype]}")


@pytest.mark.parametrize(("case", "dtype"), list(matrix()))
def test_parity(case: PackedCase, dtype: torch.dtype) -> None:
    """Every sequence within the bound of tests/compare.py, rows of no sequence 0; where keys can be split, both."""
    problem = PackedProblem(case, dtype)
    got, ran = compute_emulated_packed(problem, multiprocessors=NEVER_SPLIT)
    assert "attention_combine" not in ran["forward"]["kernels"]
    broken = problem.violations(got)
    assert not broken, "\n".join([f"{case.id} in {dtype}:", *broken])
    if case is CASES[-1]:
        got, ran = compute_emulated_packed(problem, multiprocessors=MANY_MULTIPROCESSORS)
        assert ran["forward"]["kernels"] == ["attention_uncovered", "attention_forward", "attention_combine"]
        broken = problem.violations(got)
        assert not broken, "\n".join([f"{case.id} in {dtype}, keys split:", *broken])


@each_dtype
def test_one_sequence_is_attention(dtype: torch.dtype) -> None:
    """Bit for bit, in both passes."""
    n, m = 150, 170
    problem = PackedProblem(PackedCase((n,), (m,), {"causal": True, "gqa": 2, "Hkv": 1, "sinks": True}), dtype)
    packed, _ = compute_emulated_packed(problem)
    alone, _ = compute_emulated(problem.sequences[0])
    rows = {"o": n, "dq": n, "dk": m, "dv": m}
    got = {name: packed[name][:end].transpose(0, 1)[None] for name, end in rows.items()}
    got |= {"lse": packed["lse"][None, :, :n], "dsinks": packed["dsinks"]}
    assert not differences(got, alone)


def test_no_order_of_events_changes_a_bit_and_no_synchronisation_can_be_left_out() -> None:
    problem = PackedProblem(PackedCase((40, 0, 90), (70, 3, 90), {"causal": True, "Hkv": 1, "gqa": 2}), torch.bfloat16)
    call = partial(compute_emulated_packed, problem)
    assert not order_dependence(call)
    assert not unnoticed(leave_out_synchronisations([call]))


# cu_seqlens that no CPU would take. On a device nobody sees them before the kernels do.
ODD = {
    "beyond the tensors": ([0, 5, 4000, 2**31 - 1], [0, 9, 4000, 2**31 - 1]),
    "negative": ([-7, -3, 5, 20], [-(2**31), -3, 9, 20]),
    "descending": ([20, 12, 5, 0], [20, 9, 30, -1]),
    "longer than the longest": ([0, 20, 20, 23], [0, 23, 23, 23]),
}
# The rows that see a key, and the keys that a row sees.
COVERED = {
    "beyond the tensors": ([*range(13)], [*range(18)]),
    "negative": ([*range(13)], [*range(18)]),
    "descending": ([], []),
    "longer than the longest": ([*range(8)], [*range(9)]),
}


def surrounded(x: Tensor) -> Tensor:
    """The same numbers, as a part of a larger tensor full of NaN."""
    whole = x.new_full((x.shape[0] + 64, *x.shape[1:]), math.nan)
    whole[32:-32] = x
    return whole[32:-32]


@each_dtype
@pytest.mark.parametrize("odd", ODD.values(), ids=ODD.keys())
def test_odd_lengths_lead_nowhere(odd: tuple[list[int], list[int]], dtype: torch.dtype) -> None:
    """Nothing outside of the tensors is read, and every row and key is either of a sequence or 0."""
    case = PackedCase((5, 7, 8), (9, 5, 6), {"causal": True, "Hkv": 1, "D": 32})
    problem = PackedProblem(case, dtype, left_over=0.5)
    for name in ("q", "k", "v", "d_o"):
        setattr(problem, name, surrounded(getattr(problem, name)))
    first, second = (torch.tensor(x, dtype=torch.int64).to(torch.int32) for x in odd)
    problem.cu_seqlens = first, second
    got, _ = compute_emulated_packed(problem)
    for name, x in got.items():
        assert not x.isnan().any(), name
        assert name == "lse" or x.isfinite().all(), name
    # Rows and keys of sequences: max_seqlen_q is 8, max_seqlen_k 9, of 23 rows and keys.
    rows, keys = COVERED[next(name for name in ODD if ODD[name] is odd)]
    assert (got["lse"] != -math.inf).any(0).nonzero().flatten().tolist() == rows
    for name, covered in (("o", rows), ("dq", rows), ("dk", keys), ("dv", keys)):
        others = [n for n in range(got[name].shape[0]) if n not in covered]
        assert (got[name][others] == 0).all(), name


@each_dtype
def test_rows_without_any_sequence(dtype: torch.dtype) -> None:
    problem = PackedProblem(PackedCase((5, 7, 8), (9, 5, 6), {"causal": True, "Hkv": 1, "D": 32}), dtype)
    problem.cu_seqlens = (torch.zeros(1, dtype=torch.int32),) * 2
    got, _ = compute_emulated_packed(problem)
    assert (got.pop("lse") == -math.inf).all()
    assert set(got) == {"o", "dq", "dk", "dv"}
    assert all((x == 0).all() for x in got.values())


# --------------------------------------------------------------------------------------------------------------- plans


def test_the_longest_alone_does_not_make_a_device_full() -> None:
    """One long sequence among short ones: tiles that the short ones have no use for do not count as work."""
    shape: dict[str, Any] = {"dtype": "bfloat16", "Hq": 4, "Hkv": 4, "Lq": 2048, "Lk": 2048, "D": 128, "Dv": 128}
    padded = core.cuda_forward_plan(B=32, **shape)
    packed = core.cuda_forward_plan(B=32, packed_rows=2048 + 31, **shape)
    assert padded["splits"] == 1 < packed["splits"]
    # The grid has room for 32 long ones all the same: which one is long, only the device knows.
    assert packed["blocks"] == padded["blocks"] * packed["splits"]
    assert core.cuda_forward_plan(B=32, packed_rows=32 * 2048, **shape)["splits"] == 1
