"""Packed sequences and caches on a GPU: the cases that the emulator runs, sizes that fill a device, and what only a
device shows: lengths that the host never sees, streams, graphs.

Nothing here runs without a GPU; the same kernels run in the emulator (test_emulator_packed.py, test_emulator_cache.py).
scripts/gpu_check.sh runs this file.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn

from .compare import Quantities, differences, violations
from .gpu import DEVICE, moved, on_cpu, seeds_of_the_cpu
from .gpu_checks import (
    each_dtype,
    first_device,  # noqa: F401  it applies to every test here
    randn,
)
from .kv_cache_calls import Call
from .packed import PackedCase, PackedProblem, cumulated
from .test_emulator_cache import CASES as CACHE_CASES
from .test_emulator_packed import CASES, WIDE


def packed_on_gpu(problem: PackedProblem, seed: int = 0) -> Quantities:
    """o, lse and all gradients of the packed call."""

    def there(x: Any) -> Any:
        return moved(x.detach()) if isinstance(x, Tensor) else x

    q, k, v = (there(x).requires_grad_() for x in (problem.q, problem.k, problem.v))
    kwargs = {name: there(x) for name, x in problem.kwargs.items()}
    leaves = {"q": q, "k": k, "v": v}
    leaves |= {name: kwargs[name].requires_grad_() for name in ("bias", "sinks") if name in kwargs}
    longest: dict[str, Any] = {"max_seqlen_q": problem.case.padded.Lq, "max_seqlen_k": problem.case.padded.Lk}
    cu_seqlens_q, cu_seqlens_k = (there(x) for x in problem.cu_seqlens)
    torch.manual_seed(seed)
    with seeds_of_the_cpu():
        o, lse = fastattn.varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, **longest, **kwargs, return_lse=True)
    grads = torch.autograd.grad([o, lse], list(leaves.values()), [there(problem.d_o), there(problem.d_lse)])
    found = {"o": o.detach(), "lse": lse.detach()}
    return on_cpu(found | {f"d{name}": x for name, x in zip(leaves, grads, strict=True)})


@each_dtype
@pytest.mark.parametrize("case", [*CASES, *WIDE], ids=lambda case: case.id)
def test_packed_parity(case: PackedCase, dtype: torch.dtype) -> None:
    problem = PackedProblem(case, dtype)
    broken = problem.violations(packed_on_gpu(problem))
    assert not broken, "\n".join([f"{case.id} in {dtype} on {torch.cuda.get_device_name(DEVICE)}:", *broken])


@each_dtype
@pytest.mark.parametrize("case", CACHE_CASES, ids=lambda case: case.id)
def test_cache_parity(case: Any, dtype: torch.dtype) -> None:
    """Results, with NaN in all that must not be read, and the appended rows."""
    call = Call(case, dtype)
    before = call.stored()
    there = Call(case, dtype)
    given: dict[str, Any] = {name: moved(x) if isinstance(x, Tensor) else x for name, x in there.arguments().items()}
    o, lse = fastattn.attention_with_kv_cache(**given, return_lse=True)
    for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
        if given[name] is not None:
            setattr(there, name, given[name].cpu())
    wanted = call.expected(there.stored() if case.int8 else before)
    assert not (found := violations(on_cpu({"o": o, "lse": lse}), wanted)), "\n".join(found)
    if not case.int8 and case.Lnew:
        _, keys, values = call.with_new((before[0].clone(), before[1].clone()), torch.float64)
        unit = torch.finfo(dtype).eps / 2 if case.rotary_dim else 0.0
        assert ((there.stored()[0] - keys).abs() <= unit * keys.abs() + 4e-7 * (unit != 0)).all()
        assert torch.equal(there.stored()[1], values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_many_sequences(causal: bool, dtype: torch.dtype) -> None:
    """32 sequences of 16 to 2048 rows, as in training: each of a few is the dense call, to the bit."""
    lengths = tuple(int(16 * 128 ** (n / 31)) for n in range(32))[::-1]
    total, Hq, Hkv, D = sum(lengths), 8, 2, 128
    q, d_o = (randn(total + 5, Hq, D, dtype=dtype) for _ in range(2))
    k, v = (randn(total + 5, Hkv, D, dtype=dtype) for _ in range(2))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    cu = cumulated(lengths).to(DEVICE)
    longest: dict[str, Any] = {"max_seqlen_q": max(lengths), "max_seqlen_k": max(lengths)}
    o, lse = fastattn.varlen_attention(q, k, v, cu, cu, **longest, causal=causal, return_lse=True)
    grads = torch.autograd.grad(o, (q, k, v), d_o)
    for x in (o, *grads):
        assert (x[total:] == 0).all()
    assert (lse[:, total:] == -math.inf).all()
    for n in (0, 1, 12, 31):
        mine = slice(sum(lengths[:n]), sum(lengths[: n + 1]))
        leaves = [x.detach()[mine].transpose(0, 1)[None].requires_grad_() for x in (q, k, v)]
        alone = fastattn.attention(*leaves, causal=causal)
        wanted = (alone, *torch.autograd.grad(alone, leaves, d_o[mine].transpose(0, 1)[None]))
        for x, y in zip((o, *grads), wanted, strict=True):
            # Where the dense call splits keys and the packed one does not, sums have another order.
            torch.testing.assert_close(x[mine].transpose(0, 1)[None], y, rtol=2e-2, atol=2e-2)


def test_lengths_are_read_by_the_device() -> None:
    """A captured graph takes what is in cu_seqlens, cache_lengths and block_table when it is replayed."""
    q, k, v = randn(200, 4, 64), randn(200, 2, 64), randn(200, 2, 64)
    cu = cumulated((50, 60, 70)).to(DEVICE)
    caches = [randn(12, 2, 16, 64) for _ in range(2)]
    table = torch.arange(12, dtype=torch.int32, device=DEVICE).view(3, 4)
    lengths = torch.tensor([3, 17, 40], dtype=torch.int32, device=DEVICE)
    new = [randn(3, h, 1, 64) for h in (4, 2, 2)]

    def call() -> tuple[Tensor, Tensor]:
        packed = fastattn.varlen_attention(q, k, v, cu, cu, max_seqlen_q=128, max_seqlen_k=128, causal=True)
        cached = fastattn.attention_with_kv_cache(
            new[0], *caches, k=new[1], v=new[2], cache_lengths=lengths, block_table=table, causal=True
        )
        return packed, cached

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    cu.copy_(cumulated((100, 1, 99)))
    lengths.copy_(torch.tensor([60, 0, 5]))
    table.copy_(table.flip(0))
    wanted = call()
    graph.replay()
    torch.cuda.synchronize()
    for x, y in zip(captured, wanted, strict=True):
        assert torch.equal(x, y)


def test_repeats_are_bit_equal() -> None:
    problem = PackedProblem(CASES[3], torch.bfloat16)
    first = packed_on_gpu(problem)
    for _ in range(10):
        assert not differences(packed_on_gpu(problem), first)


def test_generating_token_by_token_is_attention() -> None:
    L, D = 300, 128
    q, k, v = randn(2, 16, L, D), randn(2, 2, L, D), randn(2, 2, L, D)
    wanted = fastattn.attention(q, k, v, causal=True)
    for page_size in (None, 16):
        cache = fastattn.KVCache(2, 2, D, page_size=page_size, dtype=torch.bfloat16, device=DEVICE)
        rows, n = [], 0
        for new in (250, *[1] * 20, 30):
            part = slice(n, n + new)
            rows.append(cache.attend(q[:, :, part], k[:, :, part], v[:, :, part], causal=True))
            n += new
        torch.testing.assert_close(torch.cat(rows, 2), wanted, rtol=2e-2, atol=2e-2)
