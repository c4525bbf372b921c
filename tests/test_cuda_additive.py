"""Additive attention on a GPU: the table of additive.py, sizes that fill a device, and that the bits never change.

Nothing here runs without a GPU; the same kernels run in the emulator (test_emulator_additive.py). scripts/gpu_check.sh
runs this file.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn._ops import draw_rng_state

from .additive import (
    ADDITIVE_CASES,
    AdditiveCase,
    AdditiveInputs,
    additive_violations,
    compute_additive,
    expected_by_reference,
    first_of_each_kind,
    make_additive_inputs,
)
from .compare import differences
from .gpu import DEVICE, moved, on_cpu, seeds_of_the_cpu
from .gpu_checks import (
    DTYPES,
    first_device,  # noqa: F401  it applies to every test here
)

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def dropout_keep(case: AdditiveCase) -> Tensor | None:
    """What the CPU's generator keeps after torch.manual_seed(0)."""
    if not case.dropout_p:
        return None
    torch.manual_seed(0)
    return torch.ops.fastattn.dropout_mask(draw_rng_state(), case.B, case.Hq, case.Lq, case.Lk, case.dropout_p)


def on_gpu(case: AdditiveCase, dtype: torch.dtype) -> AdditiveInputs:
    return make_additive_inputs(case, dtype).moved(moved)


@each_dtype
@pytest.mark.parametrize("case", ADDITIVE_CASES, ids=lambda case: case.id)
def test_parity(case: AdditiveCase, dtype: torch.dtype) -> None:
    with seeds_of_the_cpu():
        found = compute_additive(on_gpu(case, dtype))
    wanted = expected_by_reference(make_additive_inputs(case, dtype), dropout_keep(case))
    broken = additive_violations(on_cpu(found), wanted)
    assert not broken, "\n".join([f"{case.id} in {dtype} on {torch.cuda.get_device_name(DEVICE)}:", *broken])


# Several waves of CTAs, the translation of sentences step by step and all at once, more heads than a grid has along y,
# keys that are split. Against plain code on the GPU.
LARGE = [
    (AdditiveCase(256, 256, D=256, B=4), torch.float32),
    (AdditiveCase(1, 60, D=256, B=128, kv_lengths=tuple(range(60, 0, -1)) * 2 + (60,) * 8), torch.float32),
    (AdditiveCase(200, 300, D=128, B=4, Hkv=4, causal="bottom_right"), torch.bfloat16),
    (AdditiveCase(1, 20000, D=64, Dv=256), torch.bfloat16),
    (AdditiveCase(2000, 700, D=32, Hkv=2, gqa=2, shared_w=True), torch.float16),
    (AdditiveCase(3, 5, D=8, B=70000), torch.float32),
]


@pytest.mark.parametrize(("case", "dtype"), [pytest.param(*x, id=x[0].id[:60]) for x in LARGE])
def test_large(case: AdditiveCase, dtype: torch.dtype) -> None:
    inputs = on_gpu(case, dtype)
    found = compute_additive(inputs)
    broken = additive_violations(found, expected_by_reference(inputs, None))
    assert not broken, "\n".join(broken)


@each_dtype
@pytest.mark.parametrize("case", first_of_each_kind(), ids=lambda case: case.id)
def test_repeats_are_bit_equal(case: AdditiveCase, dtype: torch.dtype) -> None:
    inputs = on_gpu(case, dtype)
    first = compute_additive(inputs)
    for n in range(20):
        torch.full((1000 + 997 * n,), float("nan"), device=DEVICE)  # what scratch memory is taken from next
        assert not differences(compute_additive(inputs), first)


def test_a_graph() -> None:
    """Captured and replayed, with dropout drawn anew: forward and backward see one mask."""
    q, k, w = (torch.randn(*shape, device=DEVICE, requires_grad=True) for shape in ((1, 64, 32), (1, 64, 32), (32,)))
    v = torch.eye(64, device=DEVICE).view(1, 64, 64).requires_grad_()
    d_o = torch.randn(1, 64, 64, device=DEVICE)

    def step() -> tuple[Tensor, ...]:
        o = fastattn.additive_attention(q, k, v, w, dropout_p=0.5)
        return o, *torch.autograd.grad(o, (q, k, v, w), d_o)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, _, _, dv, _ = step()
    graph.replay()
    first = o == 0
    assert 0.4 < first.float().mean().item() < 0.6
    torch.testing.assert_close(dv, o.mT @ d_o, rtol=1e-4, atol=1e-5)
    graph.replay()
    assert not torch.equal(o == 0, first)


def test_memory_is_linear_in_length() -> None:
    """Plain code would hold 8 GB for the tanh alone."""
    L, D = 8192, 32
    q, k, v = (torch.randn(1, L, D, device=DEVICE, requires_grad=True) for _ in range(3))
    w = torch.randn(D, device=DEVICE, requires_grad=True)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fastattn.additive_attention(q, k, v, w).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 32 * L * D * 4
