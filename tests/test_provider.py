"""The provider of PyTorch's flash attention: what activating it changes, and that nothing else does."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import attention as registry

import fastattn
from fastattn import _attention, _provider

if not _provider._registered:
    pytest.skip("this torch has no registry of flash attention providers", allow_module_level=True)
if not hasattr(registry, "restore_flash_attention_impl"):
    pytest.skip("this torch activates a provider for good: no test could undo it", allow_module_level=True)

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    assert registry.current_flash_attention_impl() is None, "a test left the provider active"


@pytest.fixture
def active() -> Iterator[None]:
    registry.activate_flash_attention_impl("fastattn")
    yield
    registry.restore_flash_attention_impl(_raise_warn=False)


class Spy:
    """Counts the calls of the operators while it is installed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forward = self.backward = 0
        forward_op, backward_op = _attention._forward_op, _attention._backward_op

        def forward(*args: Any) -> Any:
            self.forward += 1
            return forward_op(*args)

        def backward(*args: Any) -> Any:
            self.backward += 1
            return backward_op(*args)

        monkeypatch.setattr(_attention, "_forward_op", forward)
        monkeypatch.setattr(_attention, "_backward_op", backward)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch)


def natively(function: Any, *args: Any, **kwargs: Any) -> Any:
    """function(...) by PyTorch's own kernels, while the provider is active."""
    registry.restore_flash_attention_impl(_raise_warn=False)
    try:
        return function(*args, **kwargs)
    finally:
        registry.activate_flash_attention_impl("fastattn")


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def kernel(op: str, key: str) -> str:
    """Where the kernel of an operator comes from, in the dispatcher's words."""
    return str(torch.library.get_kernel(f"aten::{op}", key))


# --- Registering, activating, restoring ------------------------------------------------------------------------------


def test_importing_registers_and_does_not_activate() -> None:
    code = """
import torch
from torch.library import get_kernel
ops = [(op, key) for op, key, _ in KERNELS]
before = [str(get_kernel(f"aten::{op}", key)) for op, key in ops]
import fastattn
from torch.nn.attention import current_flash_attention_impl, list_flash_attention_impls
assert "fastattn" in list_flash_attention_impls()
assert current_flash_attention_impl() is None
assert [str(get_kernel(f"aten::{op}", key)) for op, key in ops] == before
""".replace("KERNELS", repr([(op, key, None) for op, key, _ in _provider._KERNELS]))
    subprocess.run([sys.executable, "-c", code], check=True)


def test_activate_and_restore() -> None:
    before = [kernel(op, key) for op, key, _ in _provider._KERNELS]
    assert _provider.state() == "registered, not active"
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            registry.activate_flash_attention_impl("fastattn")
        assert registry.current_flash_attention_impl() == "fastattn"
        assert _provider.state() == "active"
        assert all("_provider.py" in kernel(op, key) for op, key, _ in _provider._KERNELS)
        registry.restore_flash_attention_impl()
        assert [kernel(op, key) for op, key, _ in _provider._KERNELS] == before
    assert _provider.state() == "registered, not active"


def test_activating_twice_and_restoring_once() -> None:
    before = [kernel(op, key) for op, key, _ in _provider._KERNELS]
    registry.activate_flash_attention_impl("fastattn")
    registry.activate_flash_attention_impl("fastattn")
    registry.restore_flash_attention_impl()
    assert [kernel(op, key) for op, key, _ in _provider._KERNELS] == before


def test_removing_a_handle_twice() -> None:
    handle = _provider.Handle()
    handle.remove()
    handle.remove()
    assert "_provider.py" not in kernel("_native_multi_head_attention", "CPU")


def test_another_provider_is_named() -> None:
    registry.register_flash_attention_impl("other", register_fn=_NoHandle)
    registry.activate_flash_attention_impl("other")
    assert _provider.state() == "registered, not active (other is)"
    registry.restore_flash_attention_impl()


class _NoHandle:
    def remove(self) -> None:
        pass


# --- SDPA ------------------------------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def layouts(B: int, H: int, L: int, D: int, dtype: torch.dtype) -> dict[str, Tensor]:
    x = randn(B, H, L, D, dtype=dtype)
    packed = torch.empty(B, L, 3, H, D, dtype=dtype)
    packed[:, :, 1] = x.transpose(1, 2)
    return {
        "contiguous": x,
        "blhd": x.transpose(1, 2).contiguous().transpose(1, 2),
        "packed": packed[:, :, 1].transpose(1, 2),
        "expanded": x[:1].expand(B, -1, -1, -1),
        "lhbd": x.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3),
    }


def mask_of(kind: str | None, dtype: torch.dtype) -> Tensor | None:
    """For B = 2, H = 4, Lq = 33, Lk = 47."""
    if kind is None:
        return None
    if kind == "float":
        return randn(33, 47).to(dtype)
    if kind == "float32":
        return randn(2, 1, 33, 47)
    mask = torch.zeros(2, 1, 33, 47, dtype=dtype)
    hidden = {"bool": -math.inf, "-1e9": -1e9 if dtype != torch.float16 else -6e4, "min": torch.finfo(dtype).min}[kind]
    mask[:, :, :, 40:] = hidden
    mask[1, :, 5] = hidden  # a row without a key
    return mask == 0 if kind == "bool" else mask


def assert_close_to_exact(fast: Tensor, native: Tensor, exact: Tensor, what: str) -> None:
    error, allowed = ((x.double() - exact).abs().max().item() for x in (fast, native))
    allowed = 2 * allowed + 16 * torch.finfo(fast.dtype).eps * max(1.0, exact.abs().max().item())
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.usefixtures("active")
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("kind", [None, "bool", "float", "float32", "-1e9", "min"], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sdpa(dtype: torch.dtype, kind: str | None, is_causal: bool, spy: Spy) -> None:
    """Forward and backward. The exact values are the reference's: under finite masks PyTorch's backward is wrong."""
    mask = mask_of(kind, dtype)
    inputs = [randn(2, 4, length, 16, dtype=dtype).requires_grad_() for length in (33, 47, 47)]
    upstream = randn(2, 4, 33, 16, dtype=dtype)

    def run() -> list[Tensor]:
        o = F.scaled_dot_product_attention(*inputs, mask, is_causal=is_causal)
        return [o.detach(), *torch.autograd.grad(o, inputs, upstream)]

    fast = run()
    # Where lse is too large to hold what the backward pass needs, that is computed again.
    assert (spy.forward, spy.backward) == ((2, 1) if kind in ("-1e9", "min") else (1, 1))
    wide = [x.detach().double().requires_grad_() for x in inputs]
    is_bool = mask is not None and mask.dtype == torch.bool
    options = {"causal": "top_left" if is_causal else False, "scale": 16**-0.5}
    options |= {"mask": mask} if is_bool else {"bias": None if mask is None else mask.double()}
    o = fastattn.reference.attention(*wide, **options)
    exact = [o.detach(), *torch.autograd.grad(o, wide, upstream.double())]
    narrow = [x.detach().requires_grad_() for x in inputs]
    options |= {} if is_bool else {"bias": mask}
    o = fastattn.reference.attention(*narrow, **options)
    plain = [o.detach(), *torch.autograd.grad(o, narrow, upstream.to(o.dtype))]
    for name, *tensors in zip(("o", "dq", "dk", "dv"), fast, plain, exact, strict=True):
        assert_close_to_exact(*tensors, name)


@pytest.mark.usefixtures("active")
def test_finite_masks_have_right_gradients() -> None:
    """PyTorch's own kernel is off by a factor Lk here: its lse = -1e9 + log(Lk) has no room for the logarithm."""
    x = randn(1, 1, 8, 4).requires_grad_()
    value = randn(1, 1, 8, 4).requires_grad_()
    o = F.scaled_dot_product_attention(x, x, value, torch.full((8, 8), -1e9))
    (dv,) = torch.autograd.grad(o.sum(), value)
    torch.testing.assert_close(dv, torch.ones_like(dv))


@pytest.mark.usefixtures("active")
def test_rows_without_a_key_survive_deactivation() -> None:
    """Forward with the provider, backward without it, and the other way round."""
    mask = torch.zeros(5, 5)
    mask[2] = -math.inf
    grads = []
    for forward_native in (False, True):
        x = torch.linspace(-1, 1, 40).reshape(1, 1, 5, 8).requires_grad_()
        run = F.scaled_dot_product_attention
        o = natively(run, x, x, x, mask) if forward_native else run(x, x, x, mask)
        backward = torch.autograd.grad
        grads += backward(o.sum(), x) if forward_native else natively(backward, o.sum(), x)
    assert all(grad.isfinite().all() for grad in grads)
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.usefixtures("active")
@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (1, 3, 5, 8), (2, 1, 5, 8), (2, 3, 1, 8), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_lie_in_memory_as_pytorchs(shape: tuple[int, int, int, int], dtype: torch.dtype, spy: Spy) -> None:
    """Compiled code relies on it."""

    def strides(results: tuple[Tensor, ...]) -> list[Any]:
        # A dimension of size 1 may have any stride.
        return [
            (x.dtype, x.shape, [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size != 1])
            for x in results
        ]

    for name, query in layouts(*shape, dtype).items():
        args = (query, query, query)
        fast, native = flash(*args, 0.0, True), natively(flash, *args, 0.0, True)
        assert strides(fast) == strides(native), name
        torch.testing.assert_close(fast, native, atol=2e-2, rtol=2e-2)
        saved = (*native, 0.0, True)
        fast, native = flash_backward(query, *args, *saved), natively(flash_backward, query, *args, *saved)
        assert strides(fast) == strides(native), name
        torch.testing.assert_close(fast, native, atol=6e-2, rtol=6e-2)
    assert spy.forward > 0
    assert spy.backward > 0


@pytest.mark.usefixtures("active")
def test_shared_key_heads(spy: Spy) -> None:
    query, key, value = randn(2, 4, 5, 8), randn(2, 2, 7, 8), randn(2, 2, 7, 8)
    inputs = [x.requires_grad_() for x in (query, key, value)]

    def run() -> list[Tensor]:
        o = F.scaled_dot_product_attention(*inputs, enable_gqa=True)
        return [o, *torch.autograd.grad(o.square().sum(), inputs)]

    fast = run()
    assert (spy.forward, spy.backward) == (1, 1)
    torch.testing.assert_close(fast, natively(run))


@pytest.mark.usefixtures("active")
def test_what_is_not_served_goes_to_pytorchs_kernel() -> None:
    x = randn(1, 2, 5, 8)
    assert F.scaled_dot_product_attention(x, x, x, scale=math.inf).shape == x.shape
    with pytest.raises(RuntimeError, match="dropout"):
        flash(x, x, x, 0.5)
    with pytest.raises(ValueError, match="v has length 4 but k has 5"):
        flash(x, x, x[:, :, :4])


@pytest.mark.usefixtures("active")
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context: Any, spy: Spy) -> None:
    x = randn(1, 2, 5, 8).requires_grad_()
    with context():
        o = F.scaled_dot_product_attention(x, x, x).clone()
    assert spy.forward == 1
    torch.testing.assert_close(o, natively(F.scaled_dot_product_attention, x, x, x).detach())


@pytest.mark.usefixtures("active")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype, spy: Spy) -> None:
    x = randn(1, 2, 5, 8).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        o = F.scaled_dot_product_attention(x, x, x)
    assert spy.forward == 1
    assert o.dtype == dtype
    (grad,) = torch.autograd.grad(o.sum(), x)
    assert grad.dtype == torch.float32


@pytest.mark.usefixtures("active")
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend: str, spy: Spy) -> None:
    torch._dynamo.reset()

    def step(x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = x.unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v.contiguous(), mask).transpose(1, 2).flatten(2).relu()

    compiled = torch.compile(step, backend=backend, fullgraph=True)
    x = randn(2, 9, 96).requires_grad_()
    for mask in (None, torch.ones(9, 9, dtype=torch.bool).tril()):
        results = []
        for function in (compiled, step):
            o = function(x, mask)
            results.append((o, *torch.autograd.grad(o.square().sum(), x)))
        torch.testing.assert_close(*results)
        assert (spy.forward, spy.backward) == (2, 2)
        spy.forward = spy.backward = 0
        torch.testing.assert_close(results[0][0], natively(step, x, mask))


@pytest.mark.usefixtures("active")
def test_code_compiled_before_is_served_too(spy: Spy) -> None:
    """The kernels change underneath the graph; nothing is compiled again."""
    torch._dynamo.reset()
    x = randn(1, 2, 5, 8)
    compiled = torch.compile(lambda x: F.scaled_dot_product_attention(x, x, x), backend="aot_eager", fullgraph=True)
    expected = natively(compiled, x)
    assert spy.forward == 0
    torch.testing.assert_close(compiled(x), expected)
    assert spy.forward == 1


@pytest.mark.usefixtures("active")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript(spy: Spy) -> None:
    @torch.jit.script
    def step(x: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    x = randn(1, 2, 5, 8)
    torch.testing.assert_close(step(x), natively(step, x))
    assert spy.forward == 1


# --- The fast path of nn.TransformerEncoder --------------------------------------------------------------------------

LENGTHS = (7, 1, 4)


def encoder(**options: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not options.get("norm_first", False)).eval()


def padding() -> Tensor:
    return torch.arange(7) >= torch.tensor(LENGTHS)[:, None]


@pytest.mark.usefixtures("active")
@pytest.mark.filterwarnings("ignore:.*prototype stage", "ignore:Support for mismatched")
@pytest.mark.parametrize("masked", ["", "padding", "causal", "both", "per_head"])
@pytest.mark.parametrize(
    "options", [{}, {"norm_first": True}, {"dtype": torch.float64}, {"dtype": torch.bfloat16}], ids=str
)
def test_encoder_fast_path(options: dict[str, Any], masked: str, spy: Spy) -> None:
    model = encoder(**options)
    dtype = options.get("dtype", torch.float32)
    x = randn(3, 7, 32, dtype=dtype)
    masks: dict[str, Tensor] = {}
    if masked in ("padding", "both"):
        masks["src_key_padding_mask"] = padding()
    if masked in ("causal", "both"):
        masks["mask"] = torch.ones(7, 7, dtype=torch.bool).triu(1)
    if masked == "per_head":
        masks["mask"] = (torch.rand(12, 7, 7) > 0.7) & ~torch.eye(7, dtype=torch.bool)

    def run() -> Tensor:
        with torch.no_grad():
            return model(x, **masks)

    fast = run()
    # One call per layer, and with a padding mask, whose batch becomes a nested tensor, one per sequence.
    nested = masked == "padding" and not options.get("norm_first", False)
    assert spy.forward == 2 * (len(LENGTHS) if nested else 1)
    expected = natively(run)
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(fast, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.usefixtures("active")
def test_encoder_training_and_gradients(spy: Spy) -> None:
    """Outside of the fast path the encoder calls SDPA."""
    model = encoder(dropout=0.0).train()
    x = randn(3, 7, 32)

    def run() -> list[Tensor]:
        model.zero_grad()
        model(x).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    fast = run()
    assert (spy.forward, spy.backward) == (2, 2)
    torch.testing.assert_close(fast, natively(run), atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("active")
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_encoder(backend: str, spy: Spy) -> None:
    torch._dynamo.reset()
    model = encoder()
    x = randn(3, 7, 32)
    with torch.no_grad():
        o = torch.compile(model, backend=backend)(x)
        assert spy.forward == 2
        torch.testing.assert_close(o, natively(model, x), atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("active")
@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention_fast_path(need_weights: bool, spy: Spy) -> None:
    model = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    x = randn(3, 7, 32)

    def run() -> Any:
        with torch.no_grad():
            return model(x, x, x, key_padding_mask=padding(), need_weights=need_weights)

    o, weights = run()
    assert spy.forward == (0 if need_weights else 1), "the weights are PyTorch's to compute"
    expected_o, expected_weights = natively(run)
    torch.testing.assert_close(o, expected_o)
    assert (weights is None) == (expected_weights is None)
    if need_weights:
        torch.testing.assert_close(weights, expected_weights)


@pytest.mark.usefixtures("active")
def test_native_multi_head_attention_of_different_tensors(spy: Spy) -> None:
    """Only callers of the operator itself pass different tensors."""
    model = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    tensors = [randn(2, 5, 32) for _ in range(3)]
    weights = (model.in_proj_weight, model.in_proj_bias, model.out_proj.weight, model.out_proj.bias)

    def run() -> Tensor:
        with torch.no_grad():
            return torch._native_multi_head_attention(*tensors, 32, 4, *weights, None, False)[0]

    fast = run()
    assert spy.forward == 1
    torch.testing.assert_close(fast, natively(run))


@pytest.mark.usefixtures("active")
def test_native_multi_head_attention_hands_errors_to_pytorch() -> None:
    x = randn(2, 5, 32)
    with pytest.raises(RuntimeError, match="qkv_weight"):
        torch._native_multi_head_attention(
            x, x, x, 32, 4, randn(10, 32), randn(96), randn(32, 32), randn(32), None, False
        )
