"""The draws of fastattn.hard_attention: their statistics, and the seeds they follow."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import reference

from .hard_calls import DTYPES, qkv
from .test_parity import dtype_id

# --- Statistics: all draws are fixed by their seeds, so that nothing here fails by chance -----------------------------


def chi_square(counts: Tensor, p: Tensor) -> float:
    """How far counts are from their expectation, in standard deviations of a chi-square variable."""
    wanted = counts.sum() * p
    freedom = int((p > 0).sum()) - 1
    statistic = ((counts - wanted).square() / wanted)[p > 0].sum().item()
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_samples_follow_the_softmax(isa: str, dtype: torch.dtype, temperature: float) -> None:
    """The same row 16384 times, over two heads: each key as often as its probability says, and hidden ones never."""
    rows, keys = 8192, 37
    q = torch.randn(1, 1, 1, 8).to(dtype).expand(1, 2, rows, 8)
    k = torch.randn(1, 1, keys, 8).to(dtype)
    mask = torch.rand(keys) < 0.8
    index = fastattn.hard_attention(q, k, k, temperature=temperature, mask=mask).index
    p = (
        reference.log_probabilities(q[:, :1, :1].double(), k.double(), temperature=temperature, mask=mask)
        .exp()
        .flatten()
    )
    counts = torch.bincount(index.flatten(), minlength=keys).double()
    assert (counts[p == 0] == 0).all()
    expected_counts = counts.sum() * p
    frequent = expected_counts >= 5  # what chi-square is for; the rest counts as one key
    merged = torch.cat([counts[frequent], counts[~frequent].sum().view(1)])
    merged_p = torch.cat([p[frequent], p[~frequent].sum().view(1)])
    assert abs(chi_square(merged, merged_p)) < 4


def test_draws_of_neighbours_are_independent(isa: str) -> None:
    """Rows next to each other, heads, sequences, and the same row under the next seed: pairs of draws are products."""
    rows, keys = 2048, 4
    q = torch.zeros(2, 2, rows, 4)
    k = torch.zeros(2, 2, keys, 4)
    torch.manual_seed(1)
    first = fastattn.hard_attention(q, k, k).index
    second = fastattn.hard_attention(q, k, k).index
    pairs = {
        "rows": (first[:, :, 1:], first[:, :, :-1]),
        "far rows": (first[:, :, 64:], first[:, :, :-64]),
        "heads": (first[:, 1], first[:, 0]),
        "sequences": (first[1], first[0]),
        "calls": (first, second),
    }
    for name, (one, other) in pairs.items():
        counts = torch.bincount((one * keys + other).flatten(), minlength=keys * keys).double()
        assert abs(chi_square(counts, torch.full((keys * keys,), 1 / keys**2).double())) < 4, name


def test_temperature_goes_from_the_argmax_to_the_uniform() -> None:
    q, k = torch.randn(1, 1, 4000, 8), torch.randn(1, 1, 10, 8)
    cold = fastattn.hard_attention(q, k, k, temperature=1e-4)
    best = fastattn.hard_attention(q, k, k, mode="argmax")
    assert (cold.index == best.index).double().mean() > 0.99
    hot = fastattn.hard_attention(q, k, k, temperature=1e6)
    assert (
        abs(chi_square(torch.bincount(hot.index.flatten(), minlength=10).double(), torch.full((10,), 0.1).double())) < 4
    )


# --- Seeds ------------------------------------------------------------------------------------------------------------


def test_manual_seed_reproduces() -> None:
    q, k, v = qkv(torch.float32, grad=False)
    q = q.repeat(1, 1, 50, 1)
    torch.manual_seed(3)
    first, second = (fastattn.hard_attention(q, k, v).index for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(fastattn.hard_attention(q, k, v).index, first)
    assert torch.equal(fastattn.hard_attention(q, k, v).index, second)
    assert not torch.equal(first, second)


def test_generator() -> None:
    """Its own stream, whatever torch's generator does; and the draw that torch's gives under the same seed."""
    q, k, v = qkv(torch.float32, grad=False)
    q = q.repeat(1, 1, 50, 1)
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(9)
    first, second = (fastattn.hard_attention(q, k, v, generator=generator).index for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, second)
    assert torch.equal(fastattn.hard_attention(q, k, v, generator=generator.manual_seed(9)).index, first)
    torch.manual_seed(9)
    assert torch.equal(fastattn.hard_attention(q, k, v).index, first)


def test_argmax_and_bad_calls_draw_nothing() -> None:
    q, k, v = qkv(torch.float32)
    before = torch.get_rng_state()
    fastattn.hard_attention(q, k, v, mode="argmax")
    for bad in ({"mode": "soft"}, {"temperature": 0.0}, {"estimator": "gumbel"}, {"causal": "left"}):
        with pytest.raises(ValueError):
            fastattn.hard_attention(q, k, v, **bad)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_call_draws_as_much_whatever_its_shape() -> None:
    states = []
    for L in (1, 300):
        torch.manual_seed(5)
        x = torch.ones(1, 1, L, 4)
        fastattn.hard_attention(x, x, x)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
