"""fastattn.additive_attention: its numbers and gradients against the reference, and that against the definition.

The bound is that of tests/compare.py, and the cases are those of tests/cases.py with a w.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import reference

from .additive_calls import (
    DTYPES,
)
from .cases import ADDITIVE_CASES, Case, make_inputs
from .compare import compute, expected, violations
from .conftest import levels_of
from .test_parity import dtype_id

# --- Numbers ----------------------------------------------------------------------------------------------------------


def matrix() -> Iterator[Any]:
    for case in ADDITIVE_CASES:
        for dtype in DTYPES:
            for isa in levels_of(torch.float32 if dtype == torch.bfloat16 else dtype):  # no dot products
                yield pytest.param(case, dtype, isa, id=f"{case.id}-{dtype_id(dtype)}-{isa}")


@pytest.mark.parametrize(("case", "dtype", "isa"), list(matrix()), indirect=["isa"])
def test_parity(case: Case, dtype: torch.dtype, isa: str) -> None:
    inputs = make_inputs(case, dtype).require_grad()
    broken = violations(compute(inputs), expected(case, dtype))
    assert not broken, "\n".join([f"{case.id} in {dtype} on {isa}:", *broken])


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_the_bound_notices(dtype: torch.dtype) -> None:
    """One wrong element or a wrong scale of any quantity, w's gradient among them, breaks it."""
    wanted = expected(Case(70, 131, D=16, B=2, gqa=2, causal="top_left", kv_lengths=(0, 131), w="h"), dtype)
    good = wanted.exact
    assert "dw" in good
    assert not violations(good, wanted)
    for name, exact in good.items():
        limit = wanted.limits(name, torch.float64)[0]
        one_off = exact.clone(memory_format=torch.contiguous_format)
        one_off.flatten()[-1] += 1.01 * (2 * limit.plain.largest + limit.tiny.largest)
        for what, wrong in {"one element": one_off, "scale": exact * 1.1, "NaN": exact * torch.nan}.items():
            found = violations(good | {name: wrong}, wanted)
            assert found, f"{name}: {what} went unnoticed"


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("size", [30.0, 88.0, 200.0, 1000.0])
def test_numbers_that_overflow_the_exponential(isa: str, dtype: torch.dtype, size: float) -> None:
    """q = -k far out cancels to a tanh that counts; elsewhere it is 1 or -1, and nothing is NaN."""
    D = 16
    q = torch.full((1, 1, 33, D), size)
    q[..., 1::2] = -size
    k = -q[:, :, :1].repeat(1, 1, 20, 1) + torch.linspace(-2, 2, 20).view(1, 1, 20, 1)
    k[:, :, 10:] = 3 * size  # and keys where both are far
    q, k = q.to(dtype).requires_grad_(), k.to(dtype).requires_grad_()
    v, w = torch.randn(1, 1, 20, 5).to(dtype).requires_grad_(), torch.randn(D).to(dtype).requires_grad_()
    o, lse = fastattn.additive_attention(q, k, v, w, return_lse=True)
    grads = torch.autograd.grad(o.double().sin().sum() + lse.double().cos().sum(), (q, k, v, w))
    exact, exact_lse = reference.additive_attention(q, k, v, w, return_lse=True, dtype=torch.float64)
    wanted = torch.autograd.grad(exact.sin().sum() + exact_lse.cos().sum(), (q, k, v, w))
    eps = max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(o.double(), exact, atol=4 * eps, rtol=4 * eps)
    torch.testing.assert_close(lse.double(), exact_lse, atol=40 * eps, rtol=4 * eps)
    for ours, theirs in zip(grads, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), atol=20 * eps, rtol=20 * eps)


def test_w_learns_from_very_many_sequences() -> None:
    """The sum over batches does not drift: a chain of as many float32 additions would."""
    case = Case(3, 5, D=8, B=20_000, Hkv=1, w="h")
    broken = violations(compute(make_inputs(case, torch.float32).require_grad()), expected(case, torch.float32))
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_one_head_without_its_dimension(isa: str, dtype: torch.dtype) -> None:
    """(B, L, D) is (B, 1, L, D), bit for bit: results, gradients, masks, lengths; w is (D,) or (1, D)."""
    for w_shape, mask in itertools.product(((8,), (1, 8)), ((2, 5, 7), (5, 7), (2, 1, 7), (7,), None)):
        q, k, v = (torch.randn(2, *shape).to(dtype).requires_grad_() for shape in ((5, 8), (7, 8), (7, 6)))
        w = torch.randn(w_shape).to(dtype).requires_grad_()
        kwargs: dict[str, Any] = {"kv_lengths": torch.tensor([7, 4], dtype=torch.int32), "causal": True}
        four = dict(kwargs)
        if mask is not None:
            kwargs["mask"] = torch.rand(mask) < 0.7
            four["mask"] = kwargs["mask"].unsqueeze(-3) if len(mask) == 3 else kwargs["mask"]
        o, lse = fastattn.additive_attention(q, k, v, w, return_lse=True, **kwargs)
        assert (o.shape, lse.shape) == ((2, 5, 6), (2, 5))
        wanted = fastattn.additive_attention(*(x.unsqueeze(1) for x in (q, k, v)), w, return_lse=True, **four)
        assert torch.equal(o, wanted[0].squeeze(1))
        assert torch.equal(lse, wanted[1].squeeze(1))
        seen = lse.masked_fill(lse == -torch.inf, 0).sum()
        seen_wanted = wanted[1].masked_fill(wanted[1] == -torch.inf, 0).sum()
        ours = torch.autograd.grad(o.float().sin().sum() + seen, (q, k, v, w))
        theirs = torch.autograd.grad(wanted[0].float().sin().sum() + seen_wanted, (q, k, v, w))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_bahdanau_in_plain_code() -> None:
    """One step of the paper's decoder, written as its equations are, beside one call."""
    states, annotations = torch.randn(3, 12), torch.randn(3, 9, 20)
    W, U, v = torch.randn(16, 12), torch.randn(16, 20), torch.randn(16)
    energies = torch.stack([v @ torch.tanh(W @ states[b].unsqueeze(1) + U @ annotations[b].T) for b in range(3)])
    context = (torch.softmax(energies, -1).unsqueeze(1) @ annotations).squeeze(1)
    got = fastattn.additive_attention((states @ W.T).unsqueeze(1), annotations @ U.T, annotations, v)
    torch.testing.assert_close(got.squeeze(1), context)


# --- The definition ---------------------------------------------------------------------------------------------------


def test_reference_follows_the_definition() -> None:
    """fastattn.reference.additive_scores pair by pair."""
    q, k = torch.randn(2, 4, 3, 5).double(), torch.randn(2, 2, 6, 5).double()
    for w in (torch.randn(4, 5).double(), torch.randn(5).double()):
        s = reference.additive_scores(q, k, w, kv_lengths=torch.tensor([6, 4]))
        for b, h, i, j in itertools.product(range(2), range(4), range(3), range(6)):
            if b == 1 and j >= 4:
                assert s[b, h, i, j] == -torch.inf
            else:
                wanted = ((w[h] if w.dim() == 2 else w) * torch.tanh(q[b, h, i] + k[b, h // 2, j])).sum()
                torch.testing.assert_close(s[b, h, i, j], wanted)


def test_reference_derivatives() -> None:
    q, k, v, w = (
        torch.randn(shape).double().requires_grad_() for shape in ((1, 2, 3, 4), (1, 1, 4, 4), (1, 1, 4, 2), (4,))
    )
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1] = False

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        o, lse = reference.additive_attention(*tensors, mask=mask, return_lse=True)
        return o, lse.masked_fill(lse == -torch.inf, 0)

    assert torch.autograd.gradcheck(function, (q, k, v, w))
    assert torch.autograd.gradgradcheck(function, (q, k, v, w))
