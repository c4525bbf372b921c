"""Attention on a GPU: the case table and real sizes, any layout of memory, the same bits every time, dropout's mask.

Nothing here runs without a GPU; the same kernels run in the emulator (test_emulator.py), and what PyTorch does around
them on a GPU is in test_cuda_torch.py. scripts/gpu_check.sh runs this file.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import _cuda, reference
from fastattn._ops import draw_rng_state

from .cases import CASES, Case, Inputs, make_inputs
from .compare import Quantities, compute, differences, expected, gradients, violations
from .gpu import DEVICE, moved, moved_inputs, on_cpu, seeds_of_the_cpu
from .gpu_checks import (
    SHORT,
    each_dtype,
    each_mixed,
    first_device,  # noqa: F401  it applies to every test here
    on_gpu,
    randn,
)

ops = torch.ops.fastattn


# --- Numbers ---------------------------------------------------------------------------------------------------------


def too_wide(case: Case) -> bool:
    return max(case.D, case.value_dim) > _cuda.MAX_HEAD_DIM


@each_dtype
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_parity(case: Case, dtype: torch.dtype) -> None:
    inputs = on_gpu(case, dtype).require_grad()
    if too_wide(case):
        with pytest.raises(ValueError, match="head dimension 300; the CUDA kernels take at most 256"):
            compute(inputs)
        return
    with seeds_of_the_cpu():
        fast = compute(inputs)
    for name, x in fast.items():
        assert x.device == DEVICE, name
    broken = violations(on_cpu(fast), expected(case, dtype))
    assert not broken, "\n".join([f"{case.id} in {dtype} on {torch.cuda.get_device_name(DEVICE)}:", *broken])


# Sizes that fill a GPU, which the table's do not: several waves of blocks, more of them than a grid has along y, key
# lengths that are split. In one dtype each, for plain code in float64 takes its time.
LARGE = [
    (Case(2048, 2048, D=64, B=2, Hkv=8, causal="bottom_right"), torch.bfloat16),
    (Case(2048, 2048, D=128, Hkv=2, gqa=4, causal="top_left"), torch.bfloat16),
    (Case(1500, 1700, D=128, Hkv=4, window=(256, 0)), torch.float16),
    (Case(1024, 1024, D=64, Hkv=4), torch.float32),
    (Case(1000, 1100, D=64, B=2, Hkv=4, bias="1hqk"), torch.bfloat16),
    (Case(17, 19, D=32, B=70000, Hkv=1), torch.bfloat16),
    (Case(1, 33, D=32, B=1, Hkv=70000), torch.bfloat16),
    (Case(1, 65536, D=128, Hkv=1, gqa=8), torch.bfloat16),
    (Case(65536, 20, D=32, Hkv=1), torch.bfloat16),
]


@pytest.mark.parametrize(("case", "dtype"), [pytest.param(*x, id=f"{x[0].id}-{SHORT[x[1]]}") for x in LARGE])
def test_large(case: Case, dtype: torch.dtype) -> None:
    """Against plain code on the GPU: in float64 for the exact values, and in the dtype for what may be off."""
    inputs = on_gpu(case, dtype).require_grad()
    fast = compute(inputs)

    def plain(dtype: torch.dtype) -> Quantities:
        copies = [x.detach().to(dtype) for x in (inputs.q, inputs.k, inputs.v, inputs.d_o)]
        kwargs = {k: x.detach().to(dtype) if isinstance(x, Tensor) else x for k, x in inputs.kwargs.items()}
        copy = Inputs(*copies, inputs.d_lse, kwargs).require_grad()
        return gradients(*reference.attention(copy.q, copy.k, copy.v, return_lse=True, **kwargs), copy)

    exact, baseline = plain(torch.float64), plain(dtype)
    for name, wanted in exact.items():
        off = (fast[name].double() - wanted).abs().max().item()
        allowed = (baseline[name].double() - wanted).abs().max().item()
        tiny = 4 * torch.finfo(fast[name].dtype).eps * wanted.abs().max().item()
        assert off <= 2 * allowed + tiny, f"{name} is off by {off:.3g}; plain {dtype} code by {allowed:.3g}"


@each_dtype
@pytest.mark.parametrize(
    "kind", [{}, {"bias": "11qk"}, {"sinks": True, "causal": "bottom_right"}, {"softcap": 2.0, "bias": "1h1k"}], ids=str
)
def test_gradients_are_slopes(kind: dict[str, Any], dtype: torch.dtype) -> None:
    """Along a random direction the loss changes as the gradients say: no other formula is involved."""
    inputs = on_gpu(Case(37, 45, D=32, B=2, gqa=2, **kind), dtype).require_grad()
    named = inputs.differentiable()
    found = compute(inputs)
    directions = {name: torch.randn_like(x) for name, x in named.items()}
    slope = sum((found[f"d{name}"].double() * d.double()).sum() for name, d in directions.items())

    def loss(step: float) -> Tensor:
        moved = {name: (x.detach().double() + step * directions[name].double()) for name, x in named.items()}
        kwargs = inputs.kwargs | {name: moved[name] for name in ("bias", "sinks") if name in moved}
        q, k, v = (moved[name].float() for name in "qkv")
        kwargs = {name: x.float() if isinstance(x, Tensor) else x for name, x in kwargs.items()}
        o, lse = fastattn.attention(q, k, v, return_lse=True, **kwargs)
        return (o.double() * inputs.d_o.double()).sum() + (lse.double() * inputs.d_lse.double()).sum()

    step = 1e-2
    measured = (loss(step) - loss(-step)) / (2 * step)
    size = math.sqrt(sum(found[f"d{name}"].double().square().sum().item() for name in named))
    # float32's noise in the loss, over the step; and the rounding of 16-bit gradients, which is independent.
    noise = size * torch.finfo(dtype).eps + 2e-7 * abs(loss(0.0).item()) / step + 2e-3 * size
    torch.testing.assert_close(slope, measured, rtol=0, atol=4 * noise)


def test_second_derivatives() -> None:
    """They go through plain torch operations on the GPU, dropout's mask included."""
    q, k, v = (randn(2, 2, 9, 16, dtype=torch.float32, grad=True) for _ in range(3))

    def penalty(attention: Callable[..., Any]) -> Any:
        o = attention(q, k, v)
        grads = torch.autograd.grad(o.square().sum(), (q, k, v), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), (q, k, v))

    state = draw_rng_state(DEVICE)
    keep = ops.dropout_mask(state, 2, 2, 9, 9, 0.3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastattn._ops, "draw_rng_state", lambda device: state)
        ours = penalty(lambda *qkv: fastattn.attention(*qkv, causal=True, dropout_p=0.3))
    wanted = penalty(lambda *qkv: reference.attention(*qkv, causal=True, dropout_p=0.3, dropout_keep=keep))
    torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 2, 5, 7), (2, 0, 5, 7), (2, 2, 0, 7), (2, 2, 5, 0), (0, 0, 0, 0)], ids=str)
@each_dtype
def test_empty(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    B, H, Lq, Lk = shape
    q, k, v = (randn(B, H, L, D, dtype=dtype, grad=True) for L, D in ((Lq, 16), (Lk, 16), (Lk, 8)))
    bias = randn(1, 1, Lq, Lk, dtype=dtype, grad=True)
    sinks = torch.zeros(H, device=DEVICE, requires_grad=True)
    o, lse = fastattn.attention(q, k, v, bias=bias, sinks=sinks, return_lse=True)
    assert o.shape == (B, H, Lq, 8)
    assert not o.any()
    assert (lse == -torch.inf).all()
    grads = torch.autograd.grad([o, lse], [q, k, v, bias, sinks], [torch.ones_like(o), torch.ones_like(lse)])
    for x, grad in zip((q, k, v, bias, sinks), grads, strict=True):
        assert grad.shape == x.shape
        assert not grad.any()


# --- Memory ----------------------------------------------------------------------------------------------------------


@each_dtype
def test_how_tensors_lie_changes_no_bit(dtype: torch.dtype) -> None:
    """Aligned rows are copied in 16 bytes at a time, others element by element."""
    plain = Case(97, 133, D=40, Dv=24, B=2, gqa=2, causal="bottom_right", bias="1hqk", mask="b1qk", sinks=True)
    inputs = make_inputs(plain, dtype)
    first = compute(moved_inputs(inputs).require_grad())
    for layout in ("blhd", "qkv", "offset", "columns"):
        other = make_inputs(dataclasses.replace(plain, layout=layout), dtype)
        for name in ("q", "k", "v", "d_o", "d_lse"):
            getattr(other, name).copy_(getattr(inputs, name))
        for name in ("bias", "mask", "sinks"):
            other.kwargs[name].copy_(inputs.kwargs[name])
        assert not differences(compute(moved_inputs(other).require_grad()), first), layout


@each_dtype
@pytest.mark.parametrize("shift", [1, 2, 4, 8])
def test_any_alignment(shift: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(Case(65, 90, D=64, B=2, causal="bottom_right"), dtype)
    first = compute(moved_inputs(inputs).require_grad())

    def shifted(x: Tensor) -> Tensor:
        memory = torch.zeros(x.numel() + shift, dtype=x.dtype, device=DEVICE)
        view = memory[shift:].view(x.shape)
        view.copy_(x)
        return view

    q, k, v, d_o = (shifted(x) for x in (inputs.q, inputs.k, inputs.v, inputs.d_o))
    other = Inputs(q, k, v, d_o, inputs.d_lse.to(DEVICE), inputs.kwargs)
    assert not differences(compute(other.require_grad()), first)


@each_dtype
@pytest.mark.parametrize("Lq", [1, 70])
def test_what_lies_around_is_not_read(Lq: int, dtype: torch.dtype) -> None:
    """NaN before, between and after the rows, and in the keys beyond kv_lengths: no bit changes."""
    case = Case(Lq, 131, D=40, Dv=72, B=2, gqa=2, causal="bottom_right", kv_lengths=(100, 131))
    inputs = make_inputs(case, dtype)
    first = compute(moved_inputs(inputs).require_grad())

    def poisoned(x: Tensor) -> Tensor:
        B, H, L, D = x.shape
        around = torch.full((B + 1, H + 1, L + 130, D + 24), torch.nan, dtype=x.dtype, device=DEVICE)
        view = around[:B, :H, 1 : L + 1, 8 : D + 8]
        view.copy_(x)
        return view

    q, k, v, d_o = (poisoned(x) for x in (inputs.q, inputs.k, inputs.v, inputs.d_o))
    k[0, :, 100:] = torch.nan
    v[0, :, 100:] = torch.nan
    other = dataclasses.replace(moved_inputs(inputs), q=q, k=k, v=v, d_o=d_o).require_grad()
    assert not differences(compute(other), first)


@each_dtype
def test_lengths_beyond_the_keys_count_as_the_nearest(dtype: torch.dtype) -> None:
    q, k, v = (randn(3, 2, L, 32, dtype=dtype, grad=True) for L in (20, 50, 50))
    results = []
    for lengths in ((-7, 90, 2**31 - 1), (0, 50, 50)):
        kv_lengths = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        o, lse = fastattn.attention(q, k, v, causal=True, kv_lengths=kv_lengths, return_lse=True)
        results.append((o, lse, *torch.autograd.grad(o.float().sum(), (q, k, v))))
    for found, wanted in zip(*results, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("which", ["q", "k", "v", "bias"])
def test_elements_beyond_2_to_the_31(which: str) -> None:
    """A batch stride of more than 2^31 elements."""
    stride = 2**31 + 128
    free, _ = torch.cuda.mem_get_info(DEVICE)
    if free < 2 * stride + 2**30:
        pytest.skip(f"needs {2 * stride >> 30} GiB of GPU memory, of which {free >> 30} are free")
    inputs = on_gpu(Case(40, 60, D=64, B=2, Hkv=1, bias="b1qk"), torch.bfloat16)
    first = compute(inputs.require_grad())
    tensors = {"q": inputs.q, "k": inputs.k, "v": inputs.v, "bias": inputs.kwargs["bias"]}
    x = tensors[which].detach()
    try:
        far = torch.empty(stride + x[0].numel(), dtype=x.dtype, device=DEVICE)
    except torch.OutOfMemoryError:
        pytest.skip("another process has taken the GPU's memory meanwhile")
    tensors[which] = far.as_strided(x.shape, (stride, *x.stride()[1:])).copy_(x)
    kwargs = {"bias": tensors.pop("bias").detach()}
    other = Inputs(**{n: t.detach() for n, t in tensors.items()}, d_o=inputs.d_o, d_lse=inputs.d_lse, kwargs=kwargs)
    assert not differences(compute(other.require_grad()), first)


def test_memory_that_does_not_exist() -> None:
    """2^45 bytes of results. Training loops recognise the type, and the text."""
    huge = torch.zeros(1, 1, 1, 1, device=DEVICE).expand(2**14, 2**13, 2**10, 64)
    before = torch.cuda.memory_allocated()
    with pytest.raises(torch.OutOfMemoryError, match=r"^fastattn: CUDA out of memory: a torch.float32 tensor of shape"):
        fastattn.attention(huge, huge, huge)
    assert torch.cuda.memory_allocated() == before
    assert fastattn.attention(*[randn(1, 1, 4, 16)] * 3).shape == (1, 1, 4, 16)


def test_memory_does_not_grow_with_the_square() -> None:
    """Forward and backward of 16k x 16k scores in less than one such matrix of bits."""
    q, k, v = (randn(1, 2, 16384, 64, grad=True) for _ in range(3))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fastattn.attention(q, k, v, causal=True).sum().backward()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 16384**2 // 8 * 2


# --- The same bits ---------------------------------------------------------------------------------------------------


@each_dtype
@each_mixed
def test_50_repeats_are_bit_equal(case: Case, dtype: torch.dtype) -> None:
    """With other work in between, which leaves its traces in scratch memory and moves allocations."""
    inputs = on_gpu(case, dtype).require_grad()
    other = on_gpu(Case(83, 147, D=48, B=2, dropout_p=0.1), dtype).require_grad()
    first = compute(inputs)
    held = []
    for repeat in range(50):
        if repeat % 10 == 0:
            held.append(torch.full((1000 * repeat + 33,), torch.nan, device=DEVICE))
            compute(other)
        assert not differences(compute(inputs), first), f"repeat {repeat}"


@each_mixed
def test_the_deterministic_flag_changes_nothing(case: Case) -> None:
    """The only backward pass there is, is deterministic; and torch has nothing to complain about."""
    inputs = on_gpu(case, torch.bfloat16).require_grad()
    first = compute(inputs)
    torch.use_deterministic_algorithms(True)
    try:
        assert not differences(compute(inputs), first)
    finally:
        torch.use_deterministic_algorithms(False)


# --- Dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.999999, 1.0])
def test_the_mask_is_the_cpus(p: float) -> None:
    for shape in ((2, 3, 37, 130), (1, 1, 1, 1), (1, 2, 3, 1001), (0, 1, 2, 3)):
        state = torch.tensor([2**62 + 12345, 2**40 + 7])
        mask = ops.dropout_mask(state.to(DEVICE), *shape, p)
        assert mask.device == DEVICE
        assert mask.dtype == torch.bool
        assert torch.equal(mask.cpu(), ops.dropout_mask(state, *shape, p))
        strided = torch.stack((state, state + 1), 1)[:, 0]
        assert torch.equal(mask, ops.dropout_mask(moved(strided), *shape, p))


def test_the_seed_is_drawn_on_the_device() -> None:
    q, k, v = (randn(1, 2, 40, 32) for _ in range(3))

    def draw() -> Tensor:
        return fastattn.attention(q, k, v, dropout_p=0.5)

    for seed in (torch.manual_seed, torch.cuda.manual_seed):
        seed(5)
        first, second = draw(), draw()
        assert not torch.equal(first, second)
        seed(5)
        assert torch.equal(draw(), first)
    of_the_cpu = torch.get_rng_state()
    draw()
    assert torch.equal(torch.get_rng_state(), of_the_cpu)
