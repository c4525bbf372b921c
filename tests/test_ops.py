"""attention's gradients of first and higher order, autocast, inference mode, checkpoints, layouts.

Numbers are compared with fastattn.reference.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn import reference

from .attention_calls import (
    B,
    D,
    Dv,
    Hq,
    Lk,
    Lq,
    blhd,
    differentiable,
    each_feature,
    function_of,
    inputs_of,
    operator_arguments,
    ops,
    qkv,
    randn,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# --- Gradients --------------------------------------------------------------------------------------------------------


@each_feature
def test_gradcheck(feature: str) -> None:
    tensors, kwargs = inputs_of(feature)
    assert torch.autograd.gradcheck(function_of(kwargs), differentiable(tensors, kwargs))


@each_feature
def test_gradgradcheck(feature: str) -> None:
    tensors, kwargs = inputs_of(feature)
    # fast_mode compares along random directions rather than entry by entry.
    assert torch.autograd.gradgradcheck(function_of(kwargs), differentiable(tensors, kwargs), fast_mode=True)


@each_feature
def test_third_derivative(feature: str) -> None:
    """Of one number along one direction, against the reference's own."""
    tensors, kwargs = inputs_of(feature)
    inputs = differentiable(tensors, kwargs)
    directions = [torch.randn_like(x) for x in inputs]

    def third(attention: Any) -> list[Tensor]:
        o, lse = function_of(kwargs, attention)(*inputs)
        value = (o.sin().sum() + lse.cos().sum()).double()
        for _ in range(2):
            grads = torch.autograd.grad(value, inputs, create_graph=True, materialize_grads=True)
            value = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))  # type: ignore[assignment]
        return list(torch.autograd.grad(value, inputs, materialize_grads=True))

    for ours, theirs in zip(third(fastattn.attention), third(as_reference), strict=True):
        torch.testing.assert_close(ours, theirs)


def as_reference(q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float = 0.0, **kwargs: Any) -> Any:
    keep = None
    if dropout_p:
        state = fastattn._ops.draw_rng_state()
        keep = ops.dropout_mask(state, q.shape[0], q.shape[1], q.shape[2], k.shape[2], dropout_p)
    return reference.attention(q, k, v, dropout_p=dropout_p, dropout_keep=keep, **kwargs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_second_derivative_of_other_dtypes(dtype: torch.dtype) -> None:
    """A gradient penalty, in each dtype, against float64."""
    inputs = qkv(dtype)

    def penalty(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        o = fastattn.attention(q, k, v, causal=True)
        grads = torch.autograd.grad(o.float().square().sum(), (q, k, v), create_graph=True)
        return list(torch.autograd.grad(sum(g.double().square().sum() for g in grads), (q, k, v)))

    exact = penalty(*(x.detach().double().requires_grad_() for x in inputs))
    for ours, wanted, x in zip(penalty(*inputs), exact, inputs, strict=True):
        assert ours.dtype == x.dtype
        error = (ours.double() - wanted).abs().max() / wanted.abs().max()
        assert error < 20 * torch.finfo(dtype).eps


def test_second_derivative_when_only_some_inputs_need_it() -> None:
    q, k, v = qkv()
    bias = randn(Lq, Lk, grad=True)
    for chosen in ((q,), (v,), (bias,), (k, bias)):
        frozen = [x if any(x is y for y in chosen) else x.detach() for x in (q, k, v, bias)]
        o = fastattn.attention(*frozen[:3], bias=frozen[3])
        grads = torch.autograd.grad(o.square().sum(), chosen, create_graph=True)
        seconds = torch.autograd.grad(sum(g.square().sum() for g in grads), chosen)
        o = reference.attention(*frozen[:3], bias=frozen[3])
        grads = torch.autograd.grad(o.square().sum(), chosen, create_graph=True)
        wanted = torch.autograd.grad(sum(g.square().sum() for g in grads), chosen)
        torch.testing.assert_close(seconds, wanted)


@pytest.mark.parametrize("chosen", ["q", "k", "v", "bias", "sinks"])
def test_only_one_input_needs_a_gradient(chosen: str) -> None:
    q, k, v = qkv(grad=False)
    inputs = {"q": q, "k": k, "v": v, "bias": randn(1, Hq, Lq, 1), "sinks": randn(Hq)}
    inputs[chosen].requires_grad_()
    o = fastattn.attention(**inputs)
    (grad,) = torch.autograd.grad(o.sin().sum(), inputs[chosen])
    (wanted,) = torch.autograd.grad(reference.attention(**inputs).sin().sum(), inputs[chosen])
    torch.testing.assert_close(grad, wanted)


def test_gradients_through_either_output() -> None:
    """lse alone, o alone, both; and through neither there is nothing to do."""
    inputs = qkv()
    sinks = randn(Hq, grad=True)
    for use_o, use_lse in ((True, False), (False, True), (True, True)):
        results = []
        for attention in (fastattn.attention, reference.attention):
            o, lse = attention(*inputs, causal=True, sinks=sinks, return_lse=True)
            loss = use_o * o.sin().sum() + use_lse * lse.cos().sum()
            results.append(torch.autograd.grad(loss, (*inputs, sinks), materialize_grads=True))
        torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("kind", ["ones", "column", "transposed", "negative_view", "sliced"])
def test_upstream_gradient_of_any_strides(kind: str) -> None:
    inputs = qkv()
    o = fastattn.attention(*inputs)
    d_o = {
        "ones": torch.ones((), dtype=o.dtype).expand_as(o),  # what o.sum() hands down
        "column": randn(B, Hq, Lq, 1).expand_as(o),
        "transposed": randn(Dv, Lq, Hq, B).permute(3, 2, 1, 0),
        "negative_view": torch.imag(torch.randn(o.shape, dtype=torch.complex128).conj()),
        "sliced": randn(B, Hq, Lq, 2 * Dv)[..., ::2],
    }[kind]
    grads = torch.autograd.grad(o, inputs, d_o)
    torch.testing.assert_close(grads, torch.autograd.grad(reference.attention(*inputs), inputs, d_o))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias_dtype", [None, torch.float32])
def test_bias_gradient_has_the_dtype_and_shape_of_bias(dtype: torch.dtype, bias_dtype: torch.dtype | None) -> None:
    q, k, v = qkv(dtype)
    bias = torch.randn(Hq, 1, Lk, dtype=bias_dtype or dtype, requires_grad=True)
    fastattn.attention(q, k, v, bias=bias).float().sin().sum().backward()
    assert bias.grad is not None
    assert (bias.grad.dtype, bias.grad.shape) == (bias.dtype, bias.shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sinks_of_any_float_dtype(dtype: torch.dtype) -> None:
    sinks = torch.randn(Hq, dtype=dtype, requires_grad=True)
    o = fastattn.attention(*qkv(torch.float32), sinks=sinks)
    o.sin().sum().backward()
    assert sinks.grad is not None
    assert sinks.grad.dtype == dtype
    assert sinks.grad.abs().sum() > 0


def test_gradients_accumulate_and_repeat() -> None:
    q, k, v = qkv()
    o = fastattn.attention(q, k, v)
    o.sum().backward(retain_graph=True)
    once = q.grad.clone()  # type: ignore[union-attr]
    o.sum().backward()
    assert torch.equal(q.grad, 2 * once)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        o.sum().backward()


def test_a_change_in_place_is_noticed() -> None:
    q, k, v = qkv()
    o = fastattn.attention(q * 1, k, v)
    mask = torch.ones(Lq, Lk).bool()
    masked = fastattn.attention(q, k, v, mask=mask)
    with torch.no_grad():
        v.mul_(2.0)
        mask.fill_(False)
    for result in (o, masked):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.sum().backward()


def test_saved_tensors_pass_through_hooks() -> None:
    """Activations can be off-loaded."""
    packed: list[int] = []

    def pack(x: Tensor) -> Tensor:
        packed.append(x.numel())
        return x.clone()

    inputs = qkv()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        o = fastattn.attention(*inputs)
    assert len(packed) == 5  # q, k, v, o, stats
    grads = torch.autograd.grad(o.sin().sum(), inputs)
    torch.testing.assert_close(grads, torch.autograd.grad(reference.attention(*inputs).sin().sum(), inputs))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant: bool) -> None:
    """Dropout draws the same mask when the forward pass is run again."""
    from torch.utils.checkpoint import checkpoint

    inputs = qkv()

    def block(*tensors: Tensor) -> Tensor:
        return fastattn.attention(*tensors, dropout_p=0.3).sin()

    torch.manual_seed(3)
    wanted = torch.autograd.grad(block(*inputs).sum(), inputs)
    torch.manual_seed(3)
    for x in inputs:
        x.grad = None
    checkpoint(block, *inputs, use_reentrant=use_reentrant).sum().backward()  # type: ignore[union-attr]
    torch.testing.assert_close(tuple(x.grad for x in inputs), wanted)


def test_graph_is_freed() -> None:
    """No reference cycle keeps the inputs alive once the result is gone."""
    gc.disable()
    try:
        q, k, v = qkv()
        alive = weakref.ref(k)
        o = fastattn.attention(q, k, v)
        o.sum().backward()
        del q, k, v, o
        assert alive() is None
    finally:
        gc.enable()


# --- Modes ------------------------------------------------------------------------------------------------------------


def test_nothing_is_saved_without_gradients() -> None:
    q, k, v = qkv()
    with torch.no_grad():
        assert fastattn.attention(q, k, v).grad_fn is None
    with torch.inference_mode():
        o, lse = fastattn.attention(q, k, v, return_lse=True)
        assert o.is_inference()
        assert lse.is_inference()
    _, _, stats = ops.attention_forward(*operator_arguments("dense", torch.float32, grad=False, save_stats=False))
    assert stats.shape == (0,)
    assert not fastattn.attention(*qkv(grad=False)).requires_grad


def test_inference_tensors() -> None:
    with torch.inference_mode():
        q, k, v = qkv(grad=False)
        o = fastattn.attention(q, k, v)
    assert torch.equal(fastattn.attention(q, k, v), o)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        fastattn.attention(q.clone().requires_grad_(), k, v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.float16, torch.bfloat16])
def test_autocast(dtype: torch.dtype, given: torch.dtype) -> None:
    """The same dtypes and, to rounding, the same numbers as SDPA gives; gradients in the inputs' dtype."""
    q, k, v = (randn(B, Hq, Lq, D, dtype=given, grad=True) for _ in range(3))
    bias = randn(Lq, Lq, dtype=given, grad=True)
    with torch.autocast("cpu", dtype=dtype):
        o, lse = fastattn.attention(q, k, v, bias=bias, return_lse=True)
        wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    assert o.dtype == wanted.dtype == dtype
    assert lse.dtype == torch.float32
    torch.testing.assert_close(o, wanted, atol=0.03, rtol=0.03)
    for x in torch.autograd.grad(o.float().sin().sum(), (q, k, v, bias)):
        assert x.dtype == given


def test_autocast_leaves_float64_alone_and_can_be_off() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fastattn.attention(*qkv(torch.float64)).dtype == torch.float64
        with torch.autocast("cpu", enabled=False):
            assert fastattn.attention(*qkv(torch.float32)).dtype == torch.float32
    with torch.autocast("cpu", enabled=False):
        assert fastattn.attention(*qkv(torch.float32)).dtype == torch.float32


def test_autocast_mixes_dtypes() -> None:
    q, k, v = qkv(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = fastattn.attention(q, k.bfloat16(), v.half())
    assert o.dtype == torch.bfloat16


# --- Layouts ----------------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "blhd": blhd,
    "columns": lambda x: x.mT.contiguous().mT,
    "every_other": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "expanded_batch": lambda x: x[:1].expand_as(x),
    "expanded_all": lambda x: x.flatten()[0].expand_as(x),
    "offset": lambda x: F.pad(x, (3, 1, 2, 2))[:, :, 2:-2, 3:-1],
    "lhbd": lambda x: x.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    """Views give what their contiguous copies give: o, lse and gradients."""
    arrange = LAYOUTS[layout]
    views = [arrange(x.detach()).requires_grad_() for x in qkv(dtype)]
    copies = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in views]
    bias, mask = randn(B, Hq, Lq, Lk, dtype=dtype), torch.rand(B, Hq, Lq, Lk) < 0.7
    results = []
    for tensors, b, m in ((views, arrange(bias), arrange(mask.float()).bool()), (copies, bias, mask)):
        if tensors is copies:
            b, m = arrange(bias).contiguous(), arrange(mask.float()).bool().contiguous()
        o, lse = fastattn.attention(*tensors, bias=b, mask=m, return_lse=True)
        results.append((o, lse, *torch.autograd.grad((o.sin().sum() + lse.exp().sum()), tensors)))
    torch.testing.assert_close(*results)


def test_small_tensors_of_any_strides() -> None:
    q, k, v = qkv()
    alibi, sinks = torch.rand(Hq, B).mT, randn(2 * Hq)[::2]
    lengths = torch.tensor([[Lk, 0], [3, 0]], dtype=torch.int32)[:, 0]
    o = fastattn.attention(q, k, v, alibi_slopes=alibi, sinks=sinks, kv_lengths=lengths)
    wanted = reference.attention(q, k, v, alibi_slopes=alibi, sinks=sinks, kv_lengths=lengths)
    torch.testing.assert_close(o, wanted)
