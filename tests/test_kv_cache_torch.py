"""attention_with_kv_cache as torch sees it: opcheck, torch.compile, autocast, version counters, inference mode."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn

from .kv_cache_calls import CacheCase, Call, bits

ops = torch.ops.fastattn
FEATURES = {
    "contiguous": CacheCase((3, 9), 2),
    "read": CacheCase((3, 9), 0, Lq=2),
    "paged": CacheCase((3, 9), 5, page_size=4, window=(4, 0), sinks=True, alibi=True),
    "int8": CacheCase((3, 9), 2, int8=True),
    "int8-paged-rotary": CacheCase((3, 9), 2, int8=True, page_size=4, rotary_dim=8, heads_inside=True),
}
NO_POISON = 0.0  # torch compares what came out, and NaN does not equal itself


def clean_call(case: CacheCase, dtype: torch.dtype = torch.float32) -> Call:
    call = Call(case, dtype)
    for x in call.memory():
        if x.is_floating_point():
            x.nan_to_num_(NO_POISON)
    return call


def operator_arguments(call: Call) -> tuple[Any, ...]:
    a = call.arguments()
    window = a.get("window") or (None, None)
    tensors = ("q", "k_cache", "v_cache", "k", "v", "cache_lengths", "block_table", "k_scale", "v_scale")
    tensors += ("rotary_cos", "rotary_sin", "alibi_slopes", "sinks")
    sides = (-1 if side is None else side for side in window)
    return (*(a.get(name) for name in tensors), a["rotary_interleaved"], 2, *sides, None, 0.0)


@pytest.mark.parametrize("feature", FEATURES)
def test_opcheck(feature: str) -> None:
    """The schema says what is written, the fake says the shapes, and a trace of the call gives the same."""
    torch.library.opcheck(ops.attention_with_kv_cache.default, operator_arguments(clean_call(FEATURES[feature])))


def test_the_fake_refuses_what_the_operator_refuses() -> None:
    call = clean_call(FEATURES["contiguous"])

    def broken(q: Tensor) -> Tensor:
        return fastattn.attention_with_kv_cache(q[:1], **{n: x for n, x in call.arguments().items() if n != "q"})

    with pytest.raises(Exception, match="k_cache has batch size 2 but q has 1"):
        torch.compile(broken, backend="eager", fullgraph=True)(call.q)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("feature", ["contiguous", "int8-paged-rotary"])
def test_compiles_without_a_break(fresh_compiler: None, feature: str, dynamic: bool) -> None:
    """A step of generation, lengths counted up in the graph: the same results and the same bytes in the cache."""

    def step(call: dict[str, Any], lengths: Tensor) -> Tensor:
        o = fastattn.attention_with_kv_cache(**call, cache_lengths=lengths)
        lengths += call["k"].shape[2]
        return o * 2

    eager, compiled = clean_call(FEATURES[feature]), clean_call(FEATURES[feature])
    fast = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    results = []
    for call, run in ((eager, step), (compiled, fast)):
        arguments = call.arguments()
        arguments.pop("cache_lengths")
        results.append(run(arguments, call.lengths))
    assert torch.equal(*results)
    assert torch.equal(eager.lengths, compiled.lengths)
    assert all(torch.equal(bits(x), bits(y)) for x, y in zip(eager.memory(), compiled.memory(), strict=True))


def test_a_compiled_step_copies_no_cache(fresh_compiler: None) -> None:
    """Functionalised, the call returns new caches; the compiler must see that the old ones can be written instead."""
    from torch._inductor.utils import fresh_cache, run_and_get_code

    call = clean_call(CacheCase((3, 9), 2))
    k_cache, v_cache = call.k_cache, call.v_cache

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fastattn.attention_with_kv_cache(q, k_cache, v_cache, k=k, v=v, cache_lengths=call.lengths, causal=True)

    with fresh_cache():
        o, (code,) = run_and_get_code(torch.compile(step, fullgraph=True), call.q, call.k, call.v)
    assert torch.equal(o, fastattn.attention_with_kv_cache(**call.arguments()))
    assert len(re.findall(r"fastattn\.attention_with_kv_cache", code)) >= 1
    shape = ", ".join(map(str, k_cache.shape))
    copies = [line for line in code.splitlines() if "empty_strided" in line and shape in line and "def " not in line]
    assert not copies, copies


def test_autocast_casts_to_the_dtype_of_the_cache() -> None:
    cache = torch.zeros(1, 2, 8, 16, dtype=torch.float16)
    lengths = torch.zeros(1, dtype=torch.int32)
    q, k = torch.randn(1, 4, 2, 16), torch.randn(1, 2, 2, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = fastattn.attention_with_kv_cache(q, cache, cache.clone(), k=k, v=k, cache_lengths=lengths)
        assert o.dtype == torch.float16
        assert torch.equal(cache[:, :, :2], k.half())
        scale = torch.zeros(1, 2, 8)
        numbers = torch.zeros(1, 2, 8, 16, dtype=torch.int8)
        o = fastattn.attention_with_kv_cache(
            q, numbers, numbers.clone(), k=k, v=k, k_scale=scale, v_scale=scale.clone(), cache_lengths=lengths
        )
        assert o.dtype == torch.bfloat16


def test_autograd_notices_that_the_cache_was_written() -> None:
    call = clean_call(FEATURES["contiguous"])
    weight = torch.ones(1, requires_grad=True)
    product = weight * call.k_cache
    call.run()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_caches_made_in_inference_mode() -> None:
    with torch.inference_mode():
        inside = clean_call(FEATURES["paged"])
        wanted = clean_call(FEATURES["paged"]).run()["o"]
    assert torch.equal(inside.run()["o"], wanted)


def test_q_with_its_heads_inside_gives_such_a_result() -> None:
    """(B, L, H, D) in memory, as a projection leaves it: o needs no copy before the next projection."""
    call = clean_call(FEATURES["contiguous"])
    call.q = call.q.transpose(1, 2).contiguous().transpose(1, 2)
    assert call.run()["o"].transpose(1, 2).is_contiguous()
