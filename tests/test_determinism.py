"""The same inputs give the same bits: forward and backward, whatever ran before and wherever memory came from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import fastattn

from . import hard_calls
from .cases import Case, make_inputs
from .compare import compute, differences
from .conftest import level_of, supported_isas

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

CASES = [
    Case(197, 197, D=64, B=2, Hkv=3),
    Case(150, 333, D=32, Hkv=1, gqa=4, causal="bottom_right"),
    Case(600, 900, D=16, Hkv=1, causal="top_left", sinks=True),  # keys in chunks, summed afterwards
    Case(70, 530, D=24, Dv=40, B=2, gqa=2, bias="11qk", alibi="h"),  # a bias gradient summed over sequences and heads
    Case(300, 130, D=16, B=2, bias="1h1k", bias_values="min", mask="b1qk", mask_values="blocks"),
    Case(130, 300, D=16, B=3, gqa=2, bias="1111", softcap=5.0, kv_lengths=(300, 0, 131), window=(70, 20)),
    Case(90, 280, D=33, B=2, gqa=3, dropout_p=0.3, causal="bottom_right", layout="blhd"),
    Case(1, 2000, D=64, Hkv=2, gqa=4),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_repeats_are_bit_equal(isa: str, case: Case, dtype: torch.dtype) -> None:
    """Three times, with other work in between that leaves its traces in scratch memory and moves allocations."""
    inputs = make_inputs(case, dtype).require_grad()
    first = compute(inputs)
    held = []
    for size in (33, 4097):
        other = make_inputs(Case(size % 50 + 40, size % 90 + 30, D=48, B=2), dtype).require_grad()
        held.append(torch.full((size,), torch.nan))
        compute(other)
        assert not differences(compute(inputs), first)


# Several blocks of rows of a head, or several heads that share its keys: copies of what one of them read may serve the
# next. Lengths and diagonals are odd, so that keys are paired in more than one way.
PLACED = [
    Case(97, 133, D=40, Dv=24, B=2, gqa=2, causal="bottom_right", bias="1hqk", mask="b1qk", sinks=True),
    Case(197, 211, D=33, Dv=17, B=2),
    Case(230, 451, D=32, Hkv=1, gqa=2, causal="bottom_right"),
    Case(300, 261, D=16, B=2, window=(70, 21), kv_lengths=(261, 130)),
    Case(20, 700, D=16, gqa=5, causal="top_left"),
    Case(330, 330, D=16, B=2, window=(64, 0)),
    Case(331, 331, D=16, window=(65, 30), causal="top_left"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plain", PLACED, ids=lambda case: case.id)
def test_memory_does_not_matter(isa: str, plain: Case, dtype: torch.dtype) -> None:
    """Where rows lie, how far apart and how aligned, changes no bit."""
    inputs = make_inputs(plain, dtype).require_grad()
    first = compute(inputs)
    for layout in ("blhd", "qkv", "offset", "columns"):
        case = replace(plain, layout=layout)
        moved = make_inputs(case, dtype)
        for name in ("q", "k", "v", "d_o", "d_lse"):
            moved_x = getattr(moved, name)
            moved_x.copy_(getattr(inputs, name).detach())
        for name in moved.kwargs.keys() & {"bias", "mask", "sinks"}:
            moved.kwargs[name].copy_(inputs.kwargs[name].detach())
        assert not differences(compute(moved.require_grad()), first), layout


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "blhd"])
def test_numbers_that_changed_in_place_are_read_again(isa: str, layout: str, dtype: torch.dtype) -> None:
    """Memory that a call leaves to the next one holds nothing that the next one may believe."""
    inputs = make_inputs(Case(150, 333, D=32, Hkv=1, gqa=2, kv_lengths=(332,), layout=layout), dtype)
    q, k, v, lengths = inputs.q, inputs.k, inputs.v, inputs.kwargs["kv_lengths"]
    fastattn.attention(q, k, v, kv_lengths=lengths)
    k.neg_()
    v.mul_(3)
    k[:, :, 332:] = v[:, :, 332:] = torch.nan
    changed = fastattn.attention(q, k, v, kv_lengths=lengths)
    wanted = fastattn.attention(q, k[:, :, :332].clone(), v[:, :, :332].clone())
    assert torch.equal(changed, wanted)
    lengths.fill_(331)  # the pair of the last key is none now
    k[:, :, 331:] = v[:, :, 331:] = torch.nan
    assert fastattn.attention(q, k, v, kv_lengths=lengths).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"window": (100, 0)}], ids=["causal", "window"])
def test_a_prompt_in_pages_is_one_in_a_row(isa: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, heads, 333, 32).to(dtype) for heads in (4, 2, 2))
    cache = fastattn.KVCache(2, kv_heads=2, head_dim=32, page_size=7, dtype=dtype)
    assert torch.equal(
        cache.attend(q, k, v, causal=True, **options), fastattn.attention(q, k, v, causal=True, **options)
    )


def test_more_keys_than_a_copy_of_a_head_holds() -> None:
    q, k, v = (torch.randn(1, L, 2, 128) for L in (200, 8500, 8500))
    o = fastattn.attention(*[x.transpose(1, 2) for x in (q, k, v)])
    assert torch.equal(o, fastattn.attention(*[x.transpose(1, 2).contiguous() for x in (q, k, v)]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sequences_do_not_mix(isa: str, dtype: torch.dtype) -> None:
    """The forward pass of a sequence and head has the same bits alone as among others."""
    case = Case(97, 133, D=40, B=3, Hkv=2, gqa=2, causal="top_left")
    inputs = make_inputs(case, dtype)
    o, lse = fastattn.attention(inputs.q, inputs.k, inputs.v, causal="top_left", return_lse=True)
    for b in range(3):
        for h in range(4):
            q, k, v = inputs.q[b, h], inputs.k[b, h // 2], inputs.v[b, h // 2]
            alone = fastattn.attention(q[None, None], k[None, None], v[None, None], causal="top_left", return_lse=True)
            assert torch.equal(alone[0][0, 0], o[b, h])
            assert torch.equal(alone[1][0, 0], lse[b, h])


@pytest.fixture
def level() -> Iterator[None]:
    """Puts the active level back after a test that changes it."""
    before = torch.ops.fastattn._isa()
    yield
    torch.ops.fastattn._set_isa(before)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize(
    ("dtype", "w"),
    [*((dtype, w) for dtype in DTYPES if dtype != torch.bfloat16 for w in (None, "h")), (torch.bfloat16, "h")],
)
def test_levels_that_share_a_path(dtype: torch.dtype, w: str | None) -> None:
    """The same bits on all of them, forward and backward: so the other tests of a type need run on one alone."""
    kwargs: dict[str, Any] = {"w": w} if w else {"bias": "1hqk", "window": (70, 20), "sinks": True}
    shape: dict[str, Any] = {"Lq": 97, "Lk": 333, "D": 33, "Dv": 24, "B": 2, "gqa": 2}
    case = Case(**shape, causal="bottom_right", mask="b1qk", kv_lengths=(333, 131), **kwargs)
    inputs = make_inputs(case, dtype).require_grad()
    first: dict[str, Any] = {}
    for isa in supported_isas():
        torch.ops.fastattn._set_isa(isa)
        path = level_of(isa, torch.float32 if w and dtype == torch.bfloat16 else dtype)  # no dot products
        found = compute(inputs)
        assert not differences(found, first.setdefault(path, found)), isa


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_levels_that_share_a_path_in_hard_attention_and_summaries(dtype: torch.dtype) -> None:
    inputs = hard_calls.with_grad(make_inputs(Case(97, 333, D=33, Dv=24, B=2, gqa=2, mask="b1qk"), dtype))
    first: dict[str, list[torch.Tensor]] = {}
    for isa in supported_isas():
        torch.ops.fastattn._set_isa(isa)
        quantities, index = hard_calls.compute(inputs)
        summary = fastattn.attention_summary(inputs.q, inputs.k, top_k=5, **inputs.kwargs)
        found = [*quantities.values(), index, *summary]
        wanted = first.setdefault(level_of(isa, dtype), found)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), isa


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_levels_that_share_a_path_in_caches(dtype: torch.dtype, quantize: Any) -> None:
    q, k, v = (torch.randn(2, heads, 70, 32).to(dtype) for heads in (4, 2, 2))
    first: dict[str, torch.Tensor] = {}
    for isa in supported_isas():
        torch.ops.fastattn._set_isa(isa)
        cache = fastattn.KVCache(2, kv_heads=2, head_dim=32, page_size=16, dtype=dtype, quantize=quantize)
        parts = [cache.attend(*[x[:, :, a:b] for x in (q, k, v)], causal=True) for a, b in ((0, 65), (65, 70))]
        found = torch.cat(parts, dim=2)
        assert torch.equal(found, first.setdefault(level_of(isa, dtype), found)), isa
