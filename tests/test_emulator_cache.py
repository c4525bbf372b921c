"""A cache by the CUDA kernels on the host emulator: append with rotary embedding, pages of any size, int8."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from .compare import Quantities, differences, violations
from .emulated import MANY_MULTIPROCESSORS, NEVER_SPLIT, Runs, array, core
from .emulated_packed import compute_emulated_cache
from .emulator_checks import DTYPES, SHORT, each_dtype, order_dependence
from .kv_cache_calls import CacheCase, Call, bits

RAGGED = (0, 13, 150)
CASES = [
    CacheCase(RAGGED, 1, Hkv=1, D=64),
    CacheCase(RAGGED, 1, page_size=1, gqa=4, Hkv=1),
    CacheCase(RAGGED, 5, page_size=16, D=20, Dv=12),
    CacheCase(RAGGED, 20, page_size=17, D=32, Hkv=1, sinks=True, alibi=True),
    CacheCase((90, 3), 70, page_size=64, D=64, Hkv=1, one_allocation=True),
    CacheCase((90, 3), 0, page_size=16, D=128, Hkv=1, heads_inside=True, gqa=8),
    CacheCase((200, 40), 3, page_size=16, window=(33, 0), Hkv=1, softcap=3.0, D=17),
    CacheCase(RAGGED, 5, rotary_dim=16, Hkv=1),
    CacheCase(RAGGED, 3, rotary_dim=10, interleaved=True, page_size=7, float32_angles=True, Lq=2, D=24, Hkv=1),
    CacheCase(RAGGED, 1, int8=True, Hkv=1, D=64),
    CacheCase(RAGGED, 5, int8=True, page_size=17, D=20, Dv=7, rotary_dim=8),
    CacheCase((90, 3), 40, int8=True, page_size=64, D=96, Hkv=1),
]


def matrix() -> Iterator[Any]:
    for case in CASES:
        for dtype in DTYPES:
            yield pytest.param(case, dtype, id=f"{case.id}-{SHORT[dtype]}")


@pytest.mark.parametrize(("case", "dtype"), list(matrix()))
def test_parity(case: CacheCase, dtype: torch.dtype) -> None:
    """Results with NaN in all that must not be read; the appended rows; and not a bit elsewhere."""
    for multiprocessors in (NEVER_SPLIT, MANY_MULTIPROCESSORS):
        call = Call(case, dtype)
        before, memory = call.stored(), [x.clone() for x in call.memory()]
        got, kernels = compute_emulated_cache(call, multiprocessors=multiprocessors)
        wanted = call.expected(call.stored() if case.int8 else before)
        assert not (found := violations(got, wanted)), "\n".join([str(kernels), *found])
        for x, old in zip(call.memory(), memory, strict=True):
            kept = torch.ones(x.shape[:3], dtype=torch.bool)
            for b, n in enumerate(case.lengths):
                kept[call.places(b, n, n + case.Lnew)] = False
            assert torch.equal(bits(x)[kept], bits(old)[kept])
        if not case.int8 and case.Lnew:
            _, keys, values = call.with_new((before[0].clone(), before[1].clone()), torch.float64)
            unit = torch.finfo(dtype).eps / 2 if case.rotary_dim else 0.0
            assert ((call.stored()[0] - keys).abs() <= unit * keys.abs() + 4e-7 * (unit != 0)).all()
            assert torch.equal(call.stored()[1], values)
        # 64 multiprocessors are more than the CTAs of any of these; what a window leaves may be too little to split.
        assert ("attention_combine" in kernels) == (multiprocessors == MANY_MULTIPROCESSORS) or case.window


@each_dtype
def test_int8_rows_are_rounded_by_the_rule(dtype: torch.dtype) -> None:
    """Bit for bit: scales, numbers, ties to even; rows of zeros; and rows that are not finite are NaN as a whole."""
    B, H, L, D = 2, 3, 9, 37
    k = torch.randn(B, H, L, D).to(dtype)
    k[0, 0, 0] = 0.0
    k[0, 0, 2] = 0.0
    k[0, 0, 2, :4] = torch.tensor([127.0, 0.5, 1.5, -2.5]).to(dtype)  # scale 1: ties
    k[1, 1, 3, 5], k[1, 2, 4, 36], k[1, 0, 5, 0] = math.nan, math.inf, -math.inf
    k_cache, v_cache = (torch.full((B, H, L, D), 99, dtype=torch.int8) for _ in range(2))
    k_scale, v_scale = (torch.full((B, H, L), 5.0) for _ in range(2))
    core.emulated_append_to_cache(
        array(k), array(k), k_cache.numpy(), v_cache.numpy(), torch.zeros(B, dtype=torch.int32).numpy(),
        k_scale=k_scale.numpy(), v_scale=v_scale.numpy(),
    )  # fmt: skip
    finite = k.isfinite().all(-1)
    scale = k.float().abs().amax(-1) / 127
    numbers = (k.float() / scale.unsqueeze(-1)).round().nan_to_num(0.0).to(torch.int8)
    assert torch.equal(k_scale[finite], scale[finite])
    assert torch.equal(k_cache[finite], numbers[finite])
    assert k_cache[0, 0, 2, :4].tolist() == [127, 0, 2, -2]
    assert k_scale[~finite].isnan().all()
    assert int((~finite).sum()) == 3
    assert torch.equal(k_cache, v_cache)
    assert torch.equal(bits(k_scale), bits(v_scale))


@each_dtype
def test_entries_before_the_window_are_not_looked_at(dtype: torch.dtype) -> None:
    """A server drops the pages that a window has left behind; their entries may be anything."""
    for page_size in (7, 64):
        case = CacheCase((100, 64), 3, page_size=page_size, window=(20, 0), D=32)
        kept, dropped = Call(case, dtype), Call(case, dtype)
        assert dropped.table is not None
        for b, n in enumerate(case.lengths):
            gone = (n - 20) // page_size
            dropped.k_cache[dropped.table[b, :gone].long()] = math.nan
            dropped.v_cache[dropped.table[b, :gone].long()] = math.nan
            dropped.table[b, :gone] = -1
        assert not differences(compute_emulated_cache(kept)[0], compute_emulated_cache(dropped)[0])


def test_lengths_and_entries_out_of_range_lead_nowhere() -> None:
    """Nobody can check them without waiting for the device: they count as the nearest that do not leave the cache."""
    for page_size in (None, 5):
        case = CacheCase((0, 4, 9), 2, page_size=page_size, room=0, D=8)
        clamped, odd = Call(case, torch.float32), Call(case, torch.float32)
        odd.lengths[:] = torch.tensor([-7, 4, 1 << 30], dtype=torch.int32)
        last = (11 if page_size is None else 15) - 2
        clamped.lengths[:] = torch.tensor([0, 4, last], dtype=torch.int32)
        if clamped.table is not None and odd.table is not None:
            clamped.table[1, 0], odd.table[1, 0] = clamped.pages - 1, 1 << 30
            clamped.table[2, :], odd.table[2, :] = 0, -5
        for call in (clamped, odd):
            for x in call.memory():
                x.nan_to_num_(0.5)
        wanted, got = (compute_emulated_cache(call)[0] for call in (clamped, odd))
        assert not differences(wanted, got)
        assert all(torch.equal(bits(x), bits(y)) for x, y in zip(clamped.memory(), odd.memory(), strict=True))


def test_no_order_of_events_changes_a_bit() -> None:
    for case in (replace(CASES[2], lengths=(70, 9)), replace(CASES[10], lengths=(70, 9)), CASES[4]):

        def once(case: CacheCase, **emulator: Any) -> tuple[Quantities, Runs]:
            return compute_emulated_cache(Call(case, torch.bfloat16), **emulator)[0], {}

        assert not order_dependence(partial(once, case))
