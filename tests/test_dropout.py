"""Dropout: which weights are dropped, that they are the same everywhere, and that they look random."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn._ops import draw_rng_state

from .cases import Case, make_inputs
from .compare import compute
from .philox import philox4x32, random_words

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def dropout_mask(seed: int, offset: int, B: int, H: int, Lq: int, Lk: int, p: float) -> Tensor:
    """Bool, (B, H, Lq, Lk), True = kept."""
    return torch.ops.fastattn.dropout_mask(torch.tensor([seed, offset]), B, H, Lq, Lk, p)


# ------------------------------------------------------------------------------------------------ Philox, once more


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    """The generator of tests/philox.py gives the known answers that the authors publish with theirs."""
    got = philox4x32(key, tuple(torch.tensor(c) for c in counter))
    assert tuple(int(word) for word in got) == words


@pytest.mark.parametrize(
    ("seed", "offset"), [(0, 0), (1, 2), (0x123456789ABCDEF, 0xFEDCBA987654321), (2**63 - 1, 2**63 - 1), (-1, -1)]
)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.75])
def test_mask_is_philox(seed: int, offset: int, p: float) -> None:
    """Weight (b, h, i, j) is word j % 4 of the counter (j / 4, i, b H + h, offset) under the seed as key."""
    B, H, Lq, Lk = 2, 3, 19, 37
    word = random_words(seed, offset, B, H, Lq, Lk)
    assert torch.equal(dropout_mask(seed, offset, B, H, Lq, Lk, p), word >= int(p * 2**32))


# ------------------------------------------------------------------------------- what attention drops is that mask


def recovered(q: Tensor, k: Tensor, dtype: torch.dtype, p: float, seed: int, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """What forward and backward keep, (B, Hq, Lq, Lk) each: from o for v = identity, and from dv for d_o = identity."""
    (B, Hq, Lq, _), (_, Hkv, Lk, _) = q.shape, k.shape
    width = max(Lq, Lk)
    v = torch.eye(Lk, width, dtype=dtype).expand(B, Hkv, Lk, width).contiguous().requires_grad_()
    torch.manual_seed(seed)
    o = fastattn.attention(q, k, v, dropout_p=p, **kwargs)
    kept_forward = o[..., :Lk] > 0
    kept_backward = []
    for head in range(Hq):  # heads that share a key head add up in dv, so one at a time
        d_o = torch.zeros(B, Hq, Lq, width, dtype=dtype)
        d_o[:, head] = torch.eye(Lq, width, dtype=dtype)
        (dv,) = torch.autograd.grad(o, v, d_o, retain_graph=True)
        kept_backward.append(dv[:, head // (Hq // Hkv), :, :Lq].mT > 0)
    return kept_forward, torch.stack(kept_backward, dim=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("Lq", "Lk", "gqa", "kwargs"),
    [
        (70, 131, 1, {}),
        (131, 70, 2, {}),
        (1, 50, 4, {}),
        (3, 70, 2, {"window": (9, 9)}),
        (97, 65, 1, {"causal": "top_left"}),
        (65, 97, 2, {"causal": "bottom_right", "kv_lengths": torch.tensor([33, 97], dtype=torch.int32)}),
    ],
)
def test_forward_and_backward_drop_the_same(
    isa: str, dtype: torch.dtype, Lq: int, Lk: int, gqa: int, kwargs: dict[str, Any]
) -> None:
    """On every level, dtype and tiling, forward and backward keep exactly what dropout_mask says."""
    B, Hkv, p, seed = 2, 2, 0.4, 11
    q, k = torch.randn(B, Hkv * gqa, Lq, 16).to(dtype), torch.randn(B, Hkv, Lk, 16).to(dtype)
    torch.manual_seed(seed)
    mask = torch.ops.fastattn.dropout_mask(draw_rng_state(), B, Hkv * gqa, Lq, Lk, p)
    visible = {key: kwargs[key] for key in ("causal", "window", "kv_lengths") if key in kwargs}
    mask = mask & fastattn.reference.visible(Lq, Lk, **visible, B=B)
    forward, backward = recovered(q, k, dtype, p, seed, **kwargs)
    assert torch.equal(forward, mask)
    assert torch.equal(backward, mask)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_weights_are_scaled_up(isa: str, dtype: torch.dtype) -> None:
    """Equal scores: every kept weight is 1 / Lk / (1 - p), whatever its neighbours."""
    Lk, p = 64, 0.25
    q, k = torch.zeros(1, 2, 40, 8, dtype=dtype), torch.randn(1, 2, Lk, 8).to(dtype)
    o = fastattn.attention(q, k, torch.eye(Lk, dtype=dtype).expand(1, 2, Lk, Lk), dropout_p=p)
    kept = o[o > 0]
    assert 0.6 * o.numel() < kept.numel() < 0.9 * o.numel()
    expected = torch.full_like(kept, 1 / Lk / (1 - p))
    torch.testing.assert_close(kept, expected, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_everything_dropped(isa: str, dtype: torch.dtype) -> None:
    """p = 1: o and all gradients through it are 0, the lse is what it was, and its gradient still flows."""
    inputs = make_inputs(Case(33, 70, D=16, B=2, gqa=2, bias="1hqk"), dtype)
    _, lse = fastattn.attention(inputs.q, inputs.k, inputs.v, **inputs.kwargs, return_lse=True)
    inputs.kwargs["dropout_p"] = 1.0
    inputs.d_lse.zero_()
    got = compute(inputs.require_grad())
    assert torch.equal(got["lse"], lse)
    assert all((x == 0).all() for name, x in got.items() if not name.startswith("lse"))
    inputs.d_lse.fill_(1.0)
    got = compute(inputs)
    assert (got["dv"] == 0).all()
    assert (got["dbias"] > 0).any()


@pytest.mark.parametrize("p", [0.1, 0.9])
def test_lse_ignores_dropout(isa: str, p: float) -> None:
    inputs = make_inputs(Case(70, 131, D=16, causal="bottom_right"), torch.float32)
    call = (inputs.q, inputs.k, inputs.v)
    _, plain = fastattn.attention(*call, causal=True, return_lse=True)
    _, dropped = fastattn.attention(*call, causal=True, return_lse=True, dropout_p=p)
    assert torch.equal(plain, dropped)


# ------------------------------------------------------------------------------------------------------------ seeds


def test_manual_seed_reproduces() -> None:
    """The same seed gives the same bits, the next call other ones; without dropout the generator is left alone."""
    q, k, v = torch.randn(3, 1, 2, 40, 16).unbind()

    def call(p: float = 0.5) -> Tensor:
        return fastattn.attention(q, k, v, dropout_p=p)

    torch.manual_seed(3)
    first, second = call(), call()
    torch.manual_seed(3)
    assert torch.equal(call(), first)
    assert torch.equal(call(), second)
    assert not torch.equal(first, second)
    torch.manual_seed(4)
    assert not torch.equal(call(), first)

    torch.manual_seed(3)
    call(0.0)
    assert torch.equal(call(), first)


def test_draws_do_not_depend_on_the_shape() -> None:
    """A call advances the generator by the same amount, however large it is."""
    states = []
    for L in (1, 300):
        torch.manual_seed(5)
        x = torch.randn(1, 1, L, 4, generator=torch.Generator().manual_seed(0))
        fastattn.attention(x, x, x, dropout_p=0.3)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_other_process_and_level_drop_the_same() -> None:
    """A process of its own, on the lowest level and one thread, gives the mask that this one gives."""
    program = (
        "import torch, fastattn, sys; torch.set_num_threads(1); torch.manual_seed(21);"
        "q = torch.zeros(1, 2, 50, 8); v = torch.eye(70).expand(1, 2, 70, 70);"
        "o = fastattn.attention(q, torch.ones(1, 2, 70, 8), v, dropout_p=0.5);"
        "print(torch.ops.fastattn._isa(), ''.join('01'[int(x)] for x in (o > 0).flatten()))"
    )
    env = os.environ | {"FASTATTN_CPU_CAPABILITY": "baseline"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    isa, bits = done.stdout.split()
    assert isa == "baseline"
    torch.manual_seed(21)
    q, v = torch.zeros(1, 2, 50, 8), torch.eye(70).expand(1, 2, 70, 70)
    o = fastattn.attention(q, torch.ones(1, 2, 70, 8), v, dropout_p=0.5)
    assert bits == "".join("01"[int(x)] for x in (o > 0).flatten())


# ------------------------------------------------------------------------------------------------------- statistics
#
# All draws below are fixed by their seeds: these tests cannot fail by chance, only when the generator changes.


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_rate(p: float) -> None:
    """Kept weights are binomial: the total within 4 standard deviations, the counts of rows and columns chi-square."""
    B, H, Lq, Lk = 2, 4, 256, 512
    kept = dropout_mask(123, 456, B, H, Lq, Lk, p).double()
    q = 1 - p
    assert abs(kept.mean().item() - q) < 4 * math.sqrt(p * q / kept.numel())
    for dims in ((3,), (2,), (0, 1), (2, 3)):
        counts = kept.sum(dims)
        n = kept.numel() // counts.numel()
        chi2 = ((counts - n * q).square() / (n * p * q)).sum().item()
        freedom = counts.numel()
        # Of a chi-square variable: mean `freedom`, variance twice that.
        assert abs(chi2 - freedom) < 4 * math.sqrt(2 * freedom), dims


@pytest.mark.parametrize("shift", [(0, 0, 0, 1), (0, 0, 0, 4), (0, 0, 1, 0), (0, 0, 1, 1), (0, 1, 0, 0), (1, 0, 0, 0)])
def test_neighbours_are_independent(shift: tuple[int, ...]) -> None:
    """The correlation of a weight with its neighbour along each index is that of independent draws."""
    kept = dropout_mask(7, 8, 4, 4, 128, 256, 0.5).double() * 2 - 1
    moved = kept
    for dim, by in enumerate(shift):
        if by:
            kept, moved = kept.narrow(dim, 0, kept.shape[dim] - by), moved.narrow(dim, by, moved.shape[dim] - by)
    assert abs((kept * moved).mean().item()) < 4 / math.sqrt(kept.numel())


@pytest.mark.parametrize(
    ("first", "second"), [((1, 1), (2, 1)), ((1, 1), (1, 2)), ((1, 2), (2, 1)), ((0, 0), (2**32, 0))]
)
def test_seeds_are_independent(first: tuple[int, int], second: tuple[int, int]) -> None:
    a, b = (dropout_mask(*state, 2, 2, 128, 256, 0.5).double() * 2 - 1 for state in (first, second))
    assert abs((a * b).mean().item()) < 4 / math.sqrt(a.numel())


def test_expectation_of_o() -> None:
    """The mean of o over many seeds is o without dropout, within 5 standard errors of every element's own spread."""
    inputs = make_inputs(Case(20, 30, D=8), torch.float32)
    q, k, v = inputs.q, inputs.k, inputs.v
    torch.manual_seed(0)
    draws = torch.stack([fastattn.attention(q, k, v, dropout_p=0.4) for _ in range(2000)]).double()
    error = (draws.mean(0) - fastattn.attention(q, k, v)).abs()
    assert (error < 5 * draws.std(0) / math.sqrt(len(draws)) + 1e-6).all()
