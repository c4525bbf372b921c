"""A few rows over many keys, with no gradient asked for: what the case table (tests/test_parity.py) does not see.

Sequences alone and in a batch, keys in pages, int8 caches whose numbers are multiplied as they are, and that a call
cut into parts still is one softmax.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import reference

from .cases import Case, make_inputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def paged(x: Tensor, page_size: int, pages: int, table: Tensor) -> Tensor:
    """The rows of (B, H, L, D) in pages, as the table says; NaN in whatever is no row of theirs."""
    B, H, L, D = x.shape
    cache = torch.full((pages, H, page_size, D), math.nan).to(x.dtype)
    for b in range(B):
        for j in range(L):
            cache[table[b, j // page_size], :, j % page_size] = x[b, :, j]
    return cache


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [1, 5, 16, 100])
def test_pages_give_the_bits_of_rows(isa: str, dtype: torch.dtype, page_size: int) -> None:
    """Wherever pages begin in a block of keys, and with entries of the table that nobody may look at."""
    case = Case(3, 333, D=20, Dv=72, B=2, Hkv=2, gqa=3, kv_lengths=(333, 130), sinks=True)
    inputs = make_inputs(case, dtype)
    sinks = inputs.kwargs["sinks"]
    options: dict[str, Any] = {"causal": True, "window": (150, 0), "sinks": sinks, "return_lse": True}
    wanted = fastattn.attention(inputs.q, inputs.k, inputs.v, kv_lengths=inputs.kwargs["kv_lengths"], **options)
    per_sequence = -(-case.Lk // page_size)
    order = torch.randperm(2 * per_sequence, generator=torch.Generator().manual_seed(1)).to(torch.int32)
    table = order.view(2, per_sequence)
    k, v = (paged(x, page_size, 2 * per_sequence, table) for x in (inputs.k, inputs.v))
    lengths = torch.tensor(case.kv_lengths, dtype=torch.int32)
    for b, n in enumerate(case.kv_lengths or ()):
        table[b, -(-n // page_size) :] = 10**9
    got = fastattn.attention_with_kv_cache(inputs.q, k, v, cache_lengths=lengths, block_table=table, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("Lq", [1, 4])
def test_a_sequence_has_the_same_bits_in_any_batch(isa: str, dtype: torch.dtype, Lq: int) -> None:
    """How its keys are cut depends on itself alone: not on the others, nor on how long they might be."""
    lengths = (1100, 50, 0, 300)
    case = Case(Lq, 1100, D=32, B=4, Hkv=1, gqa=4, kv_lengths=lengths, causal="bottom_right")
    inputs = make_inputs(case, dtype)
    o, lse = fastattn.attention(inputs.q, inputs.k, inputs.v, return_lse=True, **inputs.kwargs)
    for b, n in enumerate(lengths):
        one = slice(b, b + 1)
        alone = fastattn.attention(
            inputs.q[one], inputs.k[one, :, :n], inputs.v[one, :, :n], causal=True, return_lse=True
        )
        assert torch.equal(alone[0], o[one])
        assert torch.equal(alone[1], lse[one])


def test_the_parts_of_a_long_sequence_are_one_softmax(isa: str) -> None:
    """One key with all the weight, or a NaN, in any part: the others count for nothing, and it for everything."""
    inputs = make_inputs(Case(2, 1500, D=16, Hkv=1, gqa=2), torch.float32)
    for j in (0, 255, 256, 700, 1499):
        k, v = inputs.k.clone(), inputs.v.clone()
        q = torch.ones_like(inputs.q)
        k[0, 0, j] = 1000.0
        o, lse = fastattn.attention(q, k, v, return_lse=True)
        torch.testing.assert_close(o, v[:, :, j : j + 1].expand_as(o), rtol=1e-6, atol=0)
        torch.testing.assert_close(lse, torch.full_like(lse, 4000.0), rtol=1e-6, atol=0)
        k[0, 0, j] = math.nan
        assert fastattn.attention(q, k, v).isnan().all()


# -------------------------------------------------------------------------------------------------------- int8 caches


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.float().abs().amax(-1) / 127
    return (x.float() / scale.unsqueeze(-1)).round().to(torch.int8), scale


def attend_int8(q: Tensor, k: tuple[Tensor, Tensor], v: tuple[Tensor, Tensor]) -> Tensor:
    lengths = torch.full((q.shape[0],), k[0].shape[2], dtype=torch.int32)
    return fastattn.attention_with_kv_cache(q, k[0], v[0], k_scale=k[1], v_scale=v[1], cache_lengths=lengths)


def plain_int8(q: Tensor, k: tuple[Tensor, Tensor], v: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """By the reference, in dtype, of the numbers times their scales rounded to it."""
    keys, values = ((numbers.double() * scale.double().unsqueeze(-1)).to(dtype) for numbers, scale in (k, v))
    return reference.attention(q.to(dtype), keys, values)[0].double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("D", "Dv"), [(128, 128), (64, 40), (33, 70), (16, 200), (5, 1)])
@pytest.mark.parametrize("Lq", [1, 2, 7])
def test_int8_numbers_are_what_they_say(isa: str, dtype: torch.dtype, D: int, Dv: int, Lq: int) -> None:
    """Against float64 on the same numbers: within the error rule, for scores of every size."""
    for gqa, Lk, size in ((1, 65, 1.0), (4, 300, 4.0), (5, 130, 0.05)):
        inputs = make_inputs(Case(Lq, Lk, D=D, Dv=Dv, Hkv=2, gqa=gqa), dtype)
        k, v = quantised(inputs.k), quantised(inputs.v)
        q = (inputs.q * size).to(dtype)
        exact = plain_int8(q, k, v, torch.float64)
        plain_error = (plain_int8(q, k, v, dtype) - exact).abs().max()
        error = (attend_int8(q, k, v).double() - exact).abs().max()
        assert error <= 2 * plain_error + torch.finfo(dtype).eps * exact.abs().max()


def test_int8_scales_of_every_kind(isa: str) -> None:
    """Negative, huge, tiny and zero scales are numbers like others; NaN in q or a scale spoils what it should."""
    inputs = make_inputs(Case(2, 200, D=48, Hkv=1, gqa=2), torch.bfloat16)
    q = inputs.q
    for k_factor, v_factor in ((-1.0, -1.0), (1.0, 1e20), (1.0, 1e-20), (1e-25, 1.0), (0.0, 0.0)):
        (k, k_scale), (v, v_scale) = quantised(inputs.k), quantised(inputs.v)
        k_scale[..., ::2] *= k_factor
        v_scale *= v_factor
        exact = plain_int8(q, (k, k_scale), (v, v_scale), torch.float64)
        got = attend_int8(q, (k, k_scale), (v, v_scale)).double()
        assert (got - exact).abs().max() <= 4 * 2**-8 * exact.abs().max()
    k8, v8 = quantised(inputs.k), quantised(inputs.v)
    spoilt = q.clone()
    spoilt[0, 1, 1, 7] = math.nan
    isnan = attend_int8(spoilt, k8, v8).isnan()
    assert isnan[0, 1, 1].all()
    assert isnan.sum() == isnan.shape[-1]
    for scale in (k8[1], v8[1]):
        kept = scale[0, 0, 77].clone()
        scale[0, 0, 77] = math.nan
        assert attend_int8(q, k8, v8).isnan().all()
        scale[0, 0, 77] = kept


def test_int8_pages_give_the_bits_of_rows(isa: str) -> None:
    inputs = make_inputs(Case(1, 130, D=32, B=2, gqa=4), torch.bfloat16)
    (k, k_scale), (v, v_scale) = quantised(inputs.k), quantised(inputs.v)
    wanted = attend_int8(inputs.q, (k, k_scale), (v, v_scale))
    table = torch.randperm(2 * 9, generator=torch.Generator().manual_seed(2)).view(2, 9).to(torch.int32)

    def in_pages(x: Tensor) -> Tensor:
        cache = torch.zeros(18, 2, 16, x.shape[-1], dtype=x.dtype)
        for b in range(2):
            for j in range(130):
                cache[table[b, j // 16], :, j % 16] = x[b, :, j]
        return cache

    scales: dict[str, Any] = {
        "k_scale": in_pages(k_scale.unsqueeze(-1))[..., 0],
        "v_scale": in_pages(v_scale.unsqueeze(-1))[..., 0],
    }
    lengths = torch.tensor([130, 130], dtype=torch.int32)
    got = fastattn.attention_with_kv_cache(
        inputs.q, in_pages(k), in_pages(v), cache_lengths=lengths, block_table=table, **scales
    )
    assert torch.equal(got, wanted)
