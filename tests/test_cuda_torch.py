"""Attention on a GPU as PyTorch uses it: streams, graphs, code from Inductor, several devices, refusals, and in the
place of PyTorch's own.

Nothing here runs without a GPU; the operators' handling of CUDA tensors that needs none is in test_cuda_binding.py.
scripts/gpu_check.sh runs this file.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn import _cuda

from .cases import Case, make_inputs
from .compare import Quantities, compute, differences, gradients
from .gpu import DEVICE, moved_inputs, on_cpu, seeds_of_the_cpu, triton_obstacle
from .gpu_checks import (
    each_dtype,
    each_mixed,
    first_device,  # noqa: F401  it applies to every test here
    on_gpu,
    randn,
)

ops = torch.ops.fastattn


# --- Streams, and waiting --------------------------------------------------------------------------------------------

A_WHILE = 400_000_000  # cycles of torch.cuda._sleep: some tenths of a second


@pytest.mark.parametrize("layout", ["contiguous", "columns"])
def test_current_stream(layout: str) -> None:
    """On a stream of one's own, inputs that are written late are read late: forward, backward and copies of rows."""
    case = Case(70, 131, D=64, B=2, gqa=2, bias="1hqk", sinks=True, layout=layout)
    inputs, late = on_gpu(case, torch.bfloat16), on_gpu(case, torch.bfloat16)
    wanted = compute(inputs.require_grad())
    real = inputs.differentiable() | {"d_o": inputs.d_o, "d_lse": inputs.d_lse}
    targets = late.differentiable() | {"d_o": late.d_o, "d_lse": late.d_lse}
    for x in targets.values():
        x.zero_()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(A_WHILE)
        with torch.no_grad():
            for name, x in targets.items():
                x.copy_(real[name])
        found = compute(late.require_grad())
    stream.synchronize()
    assert not differences(found, wanted)


def test_nothing_waits() -> None:
    """While the GPU is busy, forward and backward of everything that a call can have are queued behind."""
    inputs = on_gpu(
        Case(70, 131, D=64, B=2, gqa=2, bias="1hqk", mask="b1qk", alibi="h", sinks=True, kv_lengths=(100, 131),
             dropout_p=0.2, causal="bottom_right"),
        torch.bfloat16,
    ).require_grad()  # fmt: skip
    compute(inputs)
    torch.cuda.synchronize()
    torch.cuda._sleep(10 * A_WHILE)
    slept = torch.cuda.Event()
    slept.record()
    torch.cuda.set_sync_debug_mode("error")
    try:
        start = time.perf_counter()
        compute(inputs)
        seconds = time.perf_counter() - start
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not slept.query(), f"the call returned {seconds:.3f} s later, after the work queued before it"


# --- CUDA graphs -----------------------------------------------------------------------------------------------------


def captured(step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


@each_dtype
@each_mixed
def test_graph(case: Case, dtype: torch.dtype) -> None:
    """Captured once, replayed with other numbers, lengths included: the same bits as without a graph."""
    case = dataclasses.replace(case, dropout_p=0.0)
    inputs = on_gpu(case, dtype).require_grad()

    def step() -> Quantities:
        return gradients(*fastattn.attention(inputs.q, inputs.k, inputs.v, return_lse=True, **inputs.kwargs), inputs)

    graph, results = captured(step)
    for seed in (1, 2):
        new = on_gpu(case, dtype, seed)
        with torch.no_grad():
            for name, x in inputs.differentiable().items():
                x.copy_(new.differentiable()[name])
            inputs.d_o.copy_(new.d_o)
            if "kv_lengths" in inputs.kwargs:
                inputs.kwargs["kv_lengths"].copy_(inputs.kwargs["kv_lengths"].flip(0))
        graph.replay()
        replayed = {name: x.clone() for name, x in results.items()}
        assert not differences(replayed, step()), f"seed {seed}"


# Kernels are loaded when they are first launched, and those that need more than 48 KB of shared memory have to say so
# first: here both happen while a graph is captured, in a process that has launched none of them.
COLD_CAPTURE = """
import torch
import fastattn

def step():
    o = fastattn.attention(q, k, v, causal=True)
    return (o, *torch.autograd.grad(o, (q, k, v), d_o)) if wants_gradients else (o,)

wants_gradients, D = {wants_gradients}, {D}
q, k, v = (torch.randn(2, 4, 150, D, device="cuda").to(torch.{dtype}).requires_grad_(wants_gradients) for _ in range(3))
d_o = torch.randn_like(q)
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    captured = step()
graph.replay()
replayed = [x.clone() for x in captured]
for found, wanted in zip(replayed, step(), strict=True):
    assert torch.equal(found, wanted)
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("wants_gradients", [False, True], ids=["forward", "step"])
@pytest.mark.parametrize(("D", "dtype"), [(64, "bfloat16"), (256, "bfloat16"), (256, "float32")])
def test_graph_without_a_warm_up(D: int, dtype: str, wants_gradients: bool) -> None:
    code = COLD_CAPTURE.format(D=D, dtype=dtype, wants_gradients=wants_gradients)
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_graph_with_dropout_draws_anew() -> None:
    q, k = (randn(1, 1, 64, 32, dtype=torch.float32) for _ in range(2))
    v = torch.eye(64, device=DEVICE).view(1, 1, 64, 64)  # o is the matrix of weights
    graph, o = captured(lambda: fastattn.attention(q, k, v, dropout_p=0.5))
    torch.manual_seed(3)
    masks = []
    for _ in range(4):
        graph.replay()
        masks.append(o == 0)
        assert 0.4 < masks[-1].float().mean().item() < 0.6
    for i, mask in enumerate(masks):
        for other in masks[:i]:
            assert 0.4 < (mask ^ other).float().mean().item() < 0.6
    torch.manual_seed(3)
    graph.replay()
    assert torch.equal(o == 0, masks[0])


def test_graph_with_dropout_differentiates_what_it_drew() -> None:
    """In a graph of forward and backward, both see one mask: where o has no weight, v gets no gradient from it."""
    q, k = (randn(1, 1, 64, 32, dtype=torch.float32, grad=True) for _ in range(2))
    v = torch.eye(64, device=DEVICE).view(1, 1, 64, 64).requires_grad_()
    d_o = randn(1, 1, 64, 64, dtype=torch.float32)

    def step() -> tuple[Tensor, ...]:
        o = fastattn.attention(q, k, v, dropout_p=0.5)
        return o, *torch.autograd.grad(o, (q, k, v), d_o)

    graph, (o, _, _, dv) = captured(step)
    for _ in range(3):
        graph.replay()
        torch.testing.assert_close(dv, o.mT @ d_o, rtol=1e-4, atol=1e-5)


# --- torch.compile, opcheck, autocast --------------------------------------------------------------------------------

needs_triton = pytest.mark.skipif(triton_obstacle() is not None, reason=str(triton_obstacle()))
BACKENDS = ["aot_eager", pytest.param("inductor", marks=needs_triton)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()

    def step(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        o, lse = fastattn.attention(q * 2, k, v, bias=bias, causal=True, softcap=20.0, return_lse=True)
        return o.sin(), lse

    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=dynamic)
    for Lq, Lk in ((33, 40), (50, 70)):
        tensors = [randn(2, 4, Lq, 32, grad=True), *(randn(2, 2, Lk, 32, grad=True) for _ in range(2)),
                   randn(4, Lq, Lk, grad=True)]  # fmt: skip
        found, wanted = compiled(*tensors), step(*tensors)
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
        grads = [torch.autograd.grad([x.float().sum() for x in results], tensors) for results in (found, wanted)]
        torch.testing.assert_close(grads[0], grads[1], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_with_dropout(backend: str) -> None:
    torch._dynamo.reset()
    q, k = (randn(1, 1, 64, 32, dtype=torch.float32) for _ in range(2))
    v = torch.eye(64, device=DEVICE).view(1, 1, 64, 64)
    compiled = torch.compile(lambda: fastattn.attention(q, k, v, dropout_p=0.5), backend=backend, fullgraph=True)
    torch.manual_seed(1)
    first, second = compiled(), compiled()
    assert 0.4 < (first == 0).float().mean().item() < 0.6
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(compiled(), first)


@needs_triton
def test_compile_into_a_graph() -> None:
    torch._dynamo.reset()
    q, k, v = (randn(2, 4, 70, 64, grad=True) for _ in range(3))
    compiled = torch.compile(lambda q, k, v: fastattn.attention(q, k, v, causal=True), mode="reduce-overhead")
    wanted = torch.autograd.grad(fastattn.attention(q, k, v, causal=True).float().sum(), (q, k, v))
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        found = torch.autograd.grad(compiled(q, k, v).float().sum(), (q, k, v))
        torch.testing.assert_close(found, wanted)


def operator_arguments(case: Case, dtype: torch.dtype) -> list[Any]:
    x = on_gpu(case, dtype)
    names = ("bias", "mask", "alibi_slopes", "sinks", "kv_lengths")
    state = torch.tensor([3, 4], device=DEVICE) if case.dropout_p else None
    causal = {False: 0, "top_left": 1, "bottom_right": 2}[case.causal]
    window = [-1 if side is None else side for side in case.window or (None, None)]
    tensors = [x.q, x.k, x.v, *(x.kwargs.get(name) for name in names), state]
    return [*tensors, causal, *window, case.scale, case.softcap or 0.0, case.dropout_p]


@each_mixed
def test_opcheck(case: Case) -> None:
    args = operator_arguments(case, torch.bfloat16)
    for tensor in (args[0], args[3]):
        if tensor is not None:
            tensor.requires_grad_()
    torch.library.opcheck(ops.attention_forward.default, (*args, True))
    args = [x.detach() if isinstance(x, Tensor) else x for x in args]
    o, lse, stats = ops.attention_forward(*args, True)
    needs = (args[3] is not None, args[6] is not None)
    d_o, d_lse = torch.randn_like(o), torch.randn_like(lse)
    torch.library.opcheck(ops.attention_backward.default, (d_o, d_lse, *args[:3], o, stats, *args[3:], *needs))


def test_opcheck_of_the_mask() -> None:
    torch.library.opcheck(ops.dropout_mask.default, (torch.tensor([3, 4], device=DEVICE), 2, 3, 5, 7, 0.3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    q, k, v = (randn(1, 2, 9, 16, dtype=torch.float32, grad=True) for _ in range(3))
    with torch.autocast("cuda", dtype):
        o = fastattn.attention(q, k, v)
        assert o.dtype == dtype
    o.sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32
    assert torch.equal(o, fastattn.attention(q.to(dtype), k.to(dtype), v.to(dtype)))


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_bias_has_its_dtype(bias_dtype: torch.dtype) -> None:
    q, k, v = (randn(2, 2, 9, 16) for _ in range(3))
    bias = torch.randn(2, 1, 9, device=DEVICE).to(bias_dtype).requires_grad_()
    fastattn.attention(q, k, v, bias=bias).float().sin().sum().backward()
    assert bias.grad is not None
    assert (bias.grad.dtype, bias.grad.shape, bias.grad.device) == (bias_dtype, bias.shape, DEVICE)
    assert bias.grad.any()


# --- Several GPUs ----------------------------------------------------------------------------------------------------

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2 or _cuda.obstacle(1) is not None, reason="one GPU is here")


@two_gpus
@each_mixed
def test_another_device_than_the_current_one(case: Case) -> None:
    other = torch.device("cuda:1")
    inputs = make_inputs(case, torch.bfloat16)
    with seeds_of_the_cpu():
        wanted = on_cpu(compute(moved_inputs(inputs).require_grad()))
        found = compute(moved_inputs(inputs, other).require_grad())
    assert torch.cuda.current_device() == DEVICE.index
    for name, x in found.items():
        assert x.device == other, name
    if (
        torch.cuda.get_device_properties(0).multi_processor_count
        == torch.cuda.get_device_properties(1).multi_processor_count
    ):
        assert not differences(on_cpu(found), wanted)
    else:  # keys may be split in another way
        for name, x in found.items():
            torch.testing.assert_close(x.cpu(), wanted[name], rtol=2e-2, atol=2e-2)


@two_gpus
def test_the_current_stream_of_the_other_device() -> None:
    other = torch.device("cuda:1")
    q = randn(1, 2, 64, 64, device=other)
    wanted = fastattn.attention(q, q, q)
    late = torch.zeros_like(q)
    stream = torch.cuda.Stream(other)
    torch.cuda.synchronize(other)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(A_WHILE)
        late.copy_(q)
    # The current device is the first again, and the other one's current stream is not the one above.
    with torch.cuda.device(other), torch.cuda.stream(stream), torch.cuda.device(DEVICE):
        found = fastattn.attention(late, late, late)
    torch.cuda.synchronize(other)
    assert torch.equal(found, wanted)


@two_gpus
@pytest.mark.parametrize("name", ["k", "v", "bias", "mask", "alibi_slopes", "sinks", "kv_lengths"])
def test_tensors_on_two_devices(name: str) -> None:
    arguments = good_arguments()
    arguments[name] = arguments[name].to("cuda:1")
    with pytest.raises(
        ValueError, match=f"^fastattn: {name} is on cuda:1 but q is on cuda:0; .*{name}.to\\(q.device\\)"
    ):
        fastattn.attention(**arguments)


# --- Refusals --------------------------------------------------------------------------------------------------------


def good_arguments() -> dict[str, Tensor]:
    return {
        "q": randn(2, 4, 5, 16),
        "k": randn(2, 2, 7, 16),
        "v": randn(2, 2, 7, 8),
        "bias": randn(5, 7),
        "mask": torch.ones(5, 7, dtype=torch.bool, device=DEVICE),
        "alibi_slopes": torch.zeros(4, device=DEVICE),
        "sinks": torch.zeros(4, device=DEVICE),
        "kv_lengths": torch.tensor([7, 3], dtype=torch.int32, device=DEVICE),
    }


def test_good_arguments_pass() -> None:
    assert fastattn.attention(**good_arguments()).shape == (2, 4, 5, 8)


@pytest.mark.parametrize("name", ["k", "v", "bias", "mask", "alibi_slopes", "sinks", "kv_lengths"])
def test_a_tensor_that_was_left_on_the_cpu(name: str) -> None:
    arguments = good_arguments()
    arguments[name] = arguments[name].cpu()
    before = torch.cuda.memory_allocated()
    with pytest.raises(ValueError, match=f"^fastattn: {name} is on cpu but q is on cuda:0; .*{name}.to\\(q.device\\)"):
        fastattn.attention(**arguments)
    assert torch.cuda.memory_allocated() == before


def test_q_that_was_left_on_the_cpu() -> None:
    arguments = good_arguments()
    arguments["q"] = arguments["q"].cpu()
    with pytest.raises(ValueError, match=r"^fastattn: k is on cuda:0 but q is on cpu"):
        fastattn.attention(**arguments)


def test_a_seed_that_was_left_on_the_cpu() -> None:
    q = randn(1, 1, 4, 16)
    args = (q, q, q, *[None] * 5, torch.tensor([1, 2]), 0, -1, -1, None, 0.0, 0.5, False)
    with pytest.raises((ValueError, RuntimeError), match="rng_state is on cpu but q is on cuda:0"):
        ops.attention_forward(*args)


def test_float64() -> None:
    q = randn(1, 1, 4, 16, dtype=torch.float64)
    with pytest.raises(
        TypeError, match=r"^fastattn: q is torch.float64, which the CUDA kernels .*q.float\(\).*q.cpu\(\)"
    ):
        fastattn.attention(q, q, q)


def test_wide_heads() -> None:
    q, wide = randn(1, 1, 4, 16), randn(1, 1, 4, 257)
    with pytest.raises(
        ValueError, match=r"^fastattn: q and k have head dimension 257; the CUDA kernels take at most 256"
    ):
        fastattn.attention(wide, wide, q)
    with pytest.raises(ValueError, match=r"^fastattn: v has head dimension 257"):
        fastattn.attention(q, q, wide)


# --- In PyTorch's place ----------------------------------------------------------------------------------------------


def test_replaced_sdpa_serves_the_gpu() -> None:
    q, k, v = (randn(2, 4, 33, 64) for _ in range(3))
    fastattn.sdpa_calls(reset=True)
    with fastattn.replaced_sdpa():
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert fastattn.sdpa_calls(reset=True) == fastattn.SdpaCalls(1, {})
    torch.testing.assert_close(o, F.scaled_dot_product_attention(q, k, v, is_causal=True), rtol=2e-2, atol=2e-2)
    assert torch.equal(o, fastattn.attention(q, k, v, causal="top_left"))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((1, 2, 9, 16), torch.float64, "dtype torch.float64 on CUDA"),
        ((1, 2, 9, 320), torch.float32, "a head dimension above 256 on CUDA"),
    ],
)
def test_replaced_sdpa_hands_back(shape: tuple[int, ...], dtype: torch.dtype, reason: str, compiled: bool) -> None:
    torch._dynamo.reset()
    x = randn(*shape, dtype=dtype)
    fastattn.sdpa_calls(reset=True)

    def step(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)

    with fastattn.replaced_sdpa(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        o = torch.compile(step, backend="eager", fullgraph=True)(x) if compiled else step(x)
    assert fastattn.sdpa_calls(reset=True) == fastattn.SdpaCalls(0, {reason: 1})
    torch.testing.assert_close(o, F.scaled_dot_product_attention(x, x, x))


needs_provider = pytest.mark.skipif(
    not hasattr(torch.nn.attention, "restore_flash_attention_impl"), reason="torch has no provider that can be undone"
)


@pytest.fixture
def provider() -> Iterator[None]:
    torch.nn.attention.activate_flash_attention_impl("fastattn")
    yield
    torch.nn.attention.restore_flash_attention_impl()


def kernel_names(step: Callable[[], Any]) -> set[str]:
    """Of torch's operators, as the profiler sees them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    return {event.key for event in profile.key_averages()}


@needs_provider
@pytest.mark.usefixtures("provider")
@pytest.mark.parametrize("layout", ["contiguous", "blhd"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_provider(compiled: bool, is_causal: bool, layout: str) -> None:
    """SDPA by these kernels when it chooses flash attention: the bits of o, and gradients in PyTorch's layout."""
    torch._dynamo.reset()
    inputs = on_gpu(Case(128, 128, D=64, B=2, Hkv=4, layout=layout), torch.bfloat16).require_grad()
    q, k, v = inputs.q, inputs.k, inputs.v

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)

    if compiled:
        step = torch.compile(step, backend="aot_eager", fullgraph=True)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        assert "fastattn::attention_forward" in kernel_names(lambda: step(q, k, v))
        o = step(q, k, v)
        assert "fastattn::attention_backward" in kernel_names(
            lambda: torch.autograd.grad(o, (q, k, v), inputs.d_o, retain_graph=True)
        )
        grads = torch.autograd.grad(o, (q, k, v), inputs.d_o)
    wanted = fastattn.attention(q, k, v, causal="top_left" if is_causal else False)
    assert torch.equal(o, wanted)
    assert o.stride() == torch.empty_like(q).stride()
    for x, grad, close in zip((q, k, v), grads, torch.autograd.grad(wanted, (q, k, v), inputs.d_o), strict=True):
        assert grad.stride() == torch.empty_like(x).stride()
        # lse alone says less about a row than its maximum and its sum do.
        torch.testing.assert_close(grad, close, rtol=2e-2, atol=2e-2)


@needs_provider
@pytest.mark.usefixtures("provider")
def test_provider_leaves_dropout_to_pytorch() -> None:
    q = randn(1, 4, 128, 64, grad=True)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        names = kernel_names(lambda: F.scaled_dot_product_attention(q, q, q, dropout_p=0.5).sum().backward())
    assert not [name for name in names if name.startswith("fastattn::")]


def test_info_names_the_device() -> None:
    info = fastattn.info()
    assert f"cuda:0 {torch.cuda.get_device_name(0)} (sm_" in info.cuda
    assert set(info.cuda_build) == {"toolkit", "archs"}
