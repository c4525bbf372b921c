"""fastattn.attention_with_kv_cache: parity, what it writes and what it leaves alone, int8, determinism."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

import fastattn

from .compare import Expected, violations
from .kv_cache_calls import DTYPES, CacheCase, Call, bits

RAGGED = (0, 13, 70)
CASES = [
    # --- contiguous: prefill, one token, some tokens, many; nothing new
    CacheCase((0, 0), 5),
    CacheCase((0,), 130, Hkv=1, gqa=1),
    CacheCase(RAGGED, 1),
    CacheCase(RAGGED, 5, D=20, Dv=12),
    CacheCase(RAGGED, 40, D=17, Dv=8, heads_inside=True),
    CacheCase(RAGGED, 0),
    CacheCase((9, 30), 0, Lq=7, causal=False),
    CacheCase((9, 210), 6, Lq=2),
    CacheCase((3, 5), 4, Lq=0),
    # --- pages
    CacheCase(RAGGED, 1, page_size=1),
    CacheCase(RAGGED, 5, page_size=16),
    CacheCase(RAGGED, 40, page_size=64, D=32),
    CacheCase(RAGGED, 40, page_size=7, Dv=24),
    CacheCase((250, 16, 0), 70, page_size=16, one_allocation=True),
    CacheCase(RAGGED, 0, page_size=16, heads_inside=True),
    CacheCase((64, 200), 16, page_size=64),
    # --- scores
    CacheCase(RAGGED, 5, page_size=16, window=(9, 0)),
    CacheCase((100, 300), 40, page_size=16, window=(33, 4), causal=False),
    CacheCase((100, 300), 1, window=(20, None), sinks=True),
    CacheCase(RAGGED, 5, sinks=True, softcap=3.0, scale=0.3),
    CacheCase(RAGGED, 9, page_size=7, alibi=True, Hkv=1, gqa=8),
    CacheCase((100, 31), 70, alibi=True, sinks=True, softcap=2.0, page_size=16),
    # --- rotary
    CacheCase(RAGGED, 5, rotary_dim=16),
    CacheCase(RAGGED, 1, rotary_dim=16, interleaved=True, page_size=16),
    CacheCase(RAGGED, 40, D=80, rotary_dim=20, float32_angles=True, page_size=7),
    CacheCase(RAGGED, 5, D=23, rotary_dim=22, interleaved=True, float32_angles=True),
    CacheCase((0, 20), 17, Lq=3, D=64, rotary_dim=34),
    CacheCase((0, 20), 4, D=3, rotary_dim=2),
    # --- int8
    CacheCase(RAGGED, 1, int8=True),
    CacheCase(RAGGED, 5, int8=True, page_size=16, D=20, Dv=7),
    CacheCase((100, 300), 40, int8=True, page_size=7, D=33, window=(64, 0)),
    CacheCase((0, 300), 70, int8=True, Hkv=1, gqa=4, sinks=True),
    CacheCase(RAGGED, 5, int8=True, rotary_dim=8, page_size=16, heads_inside=True),
]


def appended(call: Call) -> list[Tensor]:
    """For each of the cache's tensors, which rows the call may write."""
    masks = []
    for x in call.memory():
        mask = torch.zeros(x.shape[:3], dtype=torch.bool)
        for b, n in enumerate(call.case.lengths):
            mask[call.places(b, n, n + call.case.Lnew)] = True
        masks.append(mask)
    return masks


@functools.cache
def expected(case: CacheCase, dtype: torch.dtype) -> Expected:
    """The same for every level of instructions."""
    call = Call(case, dtype)
    return call.expected(call.stored())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_parity(isa: str, case: CacheCase, dtype: torch.dtype) -> None:
    """Results, with NaN in every row that must not be read; the appended rows; and not a bit elsewhere."""
    call = Call(case, dtype)
    before, memory = call.stored(), [x.clone() for x in call.memory()]
    if case.int8:
        got = call.run()
        wanted = call.expected(call.stored())
    else:
        wanted = expected(case, dtype)
        got = call.run()
    assert not (found := violations(got, wanted)), "\n".join(found)
    assert call.lengths.tolist() == list(case.lengths)

    for x, old, mask in zip(call.memory(), memory, appended(call), strict=True):
        assert torch.equal(bits(x)[~mask], bits(old)[~mask])
    if case.int8 or not case.Lnew:
        return
    _, keys, values = call.with_new((before[0].clone(), before[1].clone()), torch.float64)
    for found_rows, exact in zip(call.stored(), (keys, values), strict=True):
        if exact is values or not case.rotary_dim:
            assert torch.equal(found_rows, exact)
        else:
            # The roundings of two products and a sum in the accumulator's type, and one of the result.
            unit = torch.finfo(dtype).eps / 2
            assert ((found_rows - exact).abs() <= unit * exact.abs() + 4e-7 * (unit if unit < 1e-9 else 1)).all()


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """The rule, in plain operations: int8 numbers, and a float32 scale for each row."""
    largest = x.abs().amax(-1)
    scale = (largest / 127).float()
    numbers = (x / scale.to(x.dtype).unsqueeze(-1)).round().nan_to_num(0.0).clamp(-127, 127).to(torch.int8)
    return numbers, scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_rows_are_rounded_by_the_rule(isa: str, dtype: torch.dtype) -> None:
    """Bit for bit: scales, numbers, ties to even; rows of zeros; and rows that are not finite are NaN as a whole."""
    B, H, L, D = 2, 3, 9, 37
    k = torch.randn(B, H, L, D).to(dtype)
    k[0, 0, 0] = 0.0
    k[0, 0, 1] = torch.arange(D).to(dtype) - 0.5  # the last is 35.5: none of these is a tie yet
    k[0, 0, 2] = 0.0
    k[0, 0, 2, :4] = torch.tensor([127.0, 0.5, 1.5, -2.5]).to(dtype)  # scale 1: ties
    k[1, 1, 3, 5], k[1, 2, 4, 36], k[1, 0, 5, 0] = math.nan, math.inf, -math.inf
    k_cache = torch.full((B, H, L, D), 99, dtype=torch.int8)
    v_cache = k_cache.clone()
    k_scale, v_scale = torch.full((B, H, L), 5.0), torch.full((B, H, L), 5.0)
    fastattn.attention_with_kv_cache(
        k.new_zeros(B, H, 0, D), k_cache, v_cache, k=k, v=k, k_scale=k_scale, v_scale=v_scale,
        cache_lengths=torch.zeros(B, dtype=torch.int32),
    )  # fmt: skip
    finite = k.isfinite().all(-1)
    numbers, scale = quantised(k if dtype == torch.float64 else k.float())
    assert torch.equal(k_scale[finite], scale[finite])
    assert torch.equal(k_cache[finite], numbers[finite])
    assert k_cache[0, 0, 2, :4].tolist() == [127, 0, 2, -2]
    assert k_scale[~finite].isnan().all()
    assert int((~finite).sum()) == 3
    assert torch.equal(k_cache, v_cache)
    assert torch.equal(bits(k_scale), bits(v_scale))


def test_a_row_that_is_not_finite_reaches_those_that_see_it_alone() -> None:
    case = CacheCase((6,), 5, int8=True, Hkv=1, gqa=1)
    call = Call(case, torch.float32)
    assert call.k is not None
    call.k[0, 0, 2, 3] = math.inf
    o = call.run()["o"]
    assert o[0, 0, :2].isfinite().all()
    assert o[0, 0, 2:].isnan().all()


def test_int8_error() -> None:
    """What the documentation says of it: against 32-bit keys and values, relative to o's root mean square."""
    torch.manual_seed(0)
    B, Hq, Hkv, L, D, rows = 1, 4, 1, 1024, 128, 64
    q, k, v = torch.randn(B, Hq, rows, D), torch.randn(B, Hkv, L, D), torch.randn(B, Hkv, L, D)
    for outliers, bound in ((1.0, 0.015), (10.0, 0.08)):
        keys = k.clone()
        keys[..., [3, 77]] *= outliers
        exact = fastattn.attention(q, keys, v)
        cache = fastattn.KVCache(B, Hkv, D, quantize="int8")
        error = cache.attend(q, keys, v) - exact
        ratio = (error.square().mean() / exact.square().mean()).sqrt().item()
        assert bound / 4 < ratio < bound


def test_entries_before_the_window_are_not_looked_at() -> None:
    """A server drops the pages that a window has left behind; their entries may be anything."""
    case = CacheCase((100, 64), 3, page_size=16, window=(20, 0))
    kept, dropped = Call(case, torch.float32), Call(case, torch.float32)
    assert dropped.table is not None
    for b, n in enumerate(case.lengths):
        dropped.table[b, : (n - 20) // 16] = -1
    assert torch.equal(kept.run()["o"], dropped.run()["o"])


def test_sequences_may_share_the_pages_that_nobody_appends_to() -> None:
    case = CacheCase((32, 32), 4, page_size=16, room=12)
    call = Call(case, torch.float32)
    assert call.table is not None
    call.table[1, :2] = call.table[0, :2]
    assert call.k is not None
    assert call.v is not None
    call.q[1], call.k[1], call.v[1] = call.q[0], call.k[0], call.v[0]
    o = call.run()["o"]
    assert torch.equal(o[0], o[1])


@pytest.mark.parametrize("page_size", [None, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generating_token_by_token_is_attention(dtype: torch.dtype, page_size: int | None) -> None:
    """A prompt, single tokens, and a burst: the rows of one causal call over everything."""
    L, D = 41, 24
    q, k, v = torch.randn(2, 4, L, D).to(dtype), torch.randn(2, 2, L, D).to(dtype), torch.randn(2, 2, L, D).to(dtype)
    cache = fastattn.KVCache(2, 2, D, page_size=page_size, dtype=dtype)
    steps, rows, n = (17, 1, 1, 1, 12, 1, 8), [], 0
    for new in steps:
        part = slice(n, n + new)
        rows.append(cache.attend(q[:, :, part], k[:, :, part], v[:, :, part], causal=True))
        n += new
    together = fastattn.attention(q, k, v, causal=True)
    exact = fastattn.attention(q.double(), k.double(), v.double(), causal=True)
    error, allowed = (torch.cat(rows, 2) - exact).abs().max(), (together - exact).abs().max()
    assert error <= 2 * allowed + torch.finfo(dtype).eps


def test_the_same_bits_every_time_and_on_any_number_of_threads(threads: None) -> None:
    case = CacheCase((100, 300, 7), 40, page_size=16, rotary_dim=16)
    results = []
    for count in (1, 2, 3, 3):
        torch.set_num_threads(count)
        call = Call(case, torch.bfloat16)
        results.append((call.run(), [bits(x) for x in call.memory()]))
    for got, memory in results[1:]:
        assert all(torch.equal(bits(got[name]), bits(results[0][0][name])) for name in got)
        assert all(torch.equal(x, y) for x, y in zip(memory, results[0][1], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_empty(dtype: torch.dtype) -> None:
    """No sequence, no head, no key, no page."""
    lengths = torch.zeros(2, dtype=torch.int32)
    q = torch.randn(2, 4, 3, 8, dtype=dtype)
    nothing = torch.empty(2, 2, 0, 8, dtype=dtype)
    o, lse = fastattn.attention_with_kv_cache(q, nothing, nothing, cache_lengths=lengths, return_lse=True)
    assert not o.any()
    assert (lse == -math.inf).all()
    pages, table = torch.empty(0, 2, 4, 8, dtype=dtype), torch.empty(2, 0, dtype=torch.int32)
    o, lse = fastattn.attention_with_kv_cache(
        q, pages, pages.clone(), cache_lengths=lengths, block_table=table, return_lse=True
    )
    assert not o.any()
    assert (lse == -math.inf).all()
    none = torch.empty(0, 2, 5, 8, dtype=dtype)
    o = fastattn.attention_with_kv_cache(q[:0], none, none.clone(), k=none, v=none.clone(), cache_lengths=lengths[:0])
    assert o.shape == (0, 4, 3, 8)
    headless = torch.empty(2, 0, 5, 8, dtype=dtype)
    o = fastattn.attention_with_kv_cache(q[:, :0], headless, headless.clone(), cache_lengths=lengths)
    assert o.shape == (2, 0, 3, 8)
