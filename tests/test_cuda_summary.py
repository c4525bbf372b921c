"""The summary of attention on a GPU, through the public function. Nothing here runs without a GPU; the same kernels run
in test_emulator_summary.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastattn

from .cases import Case, Inputs, make_inputs
from .choices import SUMMARY_CASES, random_rows, score_error, summary_quantities, violations, wrong_tops
from .compare import Quantities
from .gpu import moved_inputs
from .gpu_checks import (
    each_dtype,
    first_device,  # noqa: F401  it applies to every test here
)

LARGE = [
    (Case(1100, 1300, D=128, Hkv=2, gqa=2, causal="bottom_right"), 8),
    (Case(1, 20000, D=64, Hkv=4, gqa=2), 128),
    (Case(17, 19, D=32, B=70000, Hkv=1), 3),
]


def compute(inputs: Inputs, top_k: int, rows: Tensor | None = None) -> tuple[Quantities, Tensor]:
    """Everything but the keys of the top weights, and those; on the CPU."""
    there = None if rows is None else rows.to(inputs.q.device)
    found = fastattn.attention_summary(inputs.q, inputs.k, top_k=top_k, rows=there, **inputs.kwargs)
    assert found.key_mass is not None
    quantities = {
        "entropy": found.entropy,
        "max_weight": found.maximum,
        "top_weights": found.top_weights,
        "key_mass": found.key_mass,
        "lse": found.lse,
    }
    return {name: x.cpu() for name, x in quantities.items()}, found.top_indices.cpu()


@each_dtype
@pytest.mark.parametrize(("case", "top_k"), [*SUMMARY_CASES, LARGE[0]], ids=lambda x: getattr(x, "id", f"top{x}"))
def test_parity(case: Case, top_k: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    rows = random_rows(case) if case.Lq % 2 else None
    got, index = compute(moved_inputs(inputs), top_k, rows)
    relative = 4 * score_error(inputs)
    exact = summary_quantities(inputs, torch.float64, top_k, rows)
    wrong = violations(got, exact, summary_quantities(inputs, dtype, top_k, rows), relative)
    wrong += wrong_tops(inputs, got["top_weights"], index, relative)
    assert not wrong, "\n".join([f"{case.id} in {dtype}:", *wrong])


@pytest.mark.parametrize(("case", "top_k"), LARGE, ids=lambda x: getattr(x, "id", f"top{x}"))
def test_large_is_the_cpus(case: Case, top_k: int) -> None:
    inputs = make_inputs(case, torch.bfloat16)
    got, index = compute(moved_inputs(inputs), top_k)
    wanted, wanted_index = compute(inputs, top_k)
    for name, x in wanted.items():
        torch.testing.assert_close(got[name], x, rtol=1e-4, atol=1e-5)
    assert (index == wanted_index).double().mean() > 0.99


def test_repeats_are_equal_to_the_bit() -> None:
    inputs = moved_inputs(make_inputs(Case(700, 900, D=64, B=2, gqa=2, causal="bottom_right"), torch.bfloat16))
    wanted, wanted_index = compute(inputs, 8)
    for _ in range(20):
        got, index = compute(inputs, 8)
        assert torch.equal(index, wanted_index)
        for name, x in wanted.items():
            assert torch.equal(got[name], x), name


def test_padding_is_not_read() -> None:
    inputs = moved_inputs(make_inputs(Case(70, 300, D=64, B=3, kv_lengths=(300, 0, 65)), torch.bfloat16))
    wanted, _ = compute(inputs, 8)
    for b, length in enumerate((300, 0, 65)):
        inputs.k[b, :, length:] = math.nan
    got, _ = compute(inputs, 8)
    for name, x in wanted.items():
        assert torch.equal(got[name], x), name


def test_in_a_graph() -> None:
    inputs = moved_inputs(make_inputs(Case(64, 300, D=64, B=2), torch.bfloat16))
    wanted = fastattn.attention_summary(inputs.q, inputs.k, top_k=4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = fastattn.attention_summary(inputs.q, inputs.k, top_k=4)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(got.top_indices, wanted.top_indices)
    assert torch.equal(got.entropy, wanted.entropy)
