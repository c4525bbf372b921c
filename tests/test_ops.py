"""The operators as torch sees them: schemas, fakes, gradients of first and second order, torch.compile, torch.func,
autocast, inference mode, layouts. Numbers are compared with fastattn.reference, and compiled code with eager code.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

import fastattn
from fastattn import reference

ops = torch.ops.fastattn
# Small, for gradcheck's sake, which calls a function once or twice for every number.
B, Hq, Hkv, Lq, Lk, D, Dv = 2, 4, 2, 3, 5, 4, 3


def randn(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = False) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_(grad)


@pytest.fixture(autouse=True)
def seed_and_one_thread() -> Iterator[None]:
    """One thread: tens of thousands of tiny calls would mostly wait for a second one to wake up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def qkv(dtype: torch.dtype = torch.float64, grad: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    return (
        randn(B, Hq, Lq, D, dtype=dtype, grad=grad),
        randn(B, Hkv, Lk, D, dtype=dtype, grad=grad),
        randn(B, Hkv, Lk, Dv, dtype=dtype, grad=grad),
    )


def slopes() -> Tensor:
    return torch.tensor([0.5, 0.25, 0.1, 0.01])


# Each feature alone, and all together: what fastattn.attention is called with beside q, k and v.
FEATURES: dict[str, Callable[[], dict[str, Any]]] = {
    "dense": dict,
    "causal": lambda: {"causal": True},
    "top_left": lambda: {"causal": "top_left"},
    "window": lambda: {"window": (2, 1)},
    "scale": lambda: {"scale": -0.7},
    "softcap": lambda: {"softcap": 1.5},
    "bias": lambda: {"bias": randn(B, Hq, Lq, Lk, grad=True)},
    "bias_row": lambda: {"bias": randn(Hq, 1, Lk, grad=True)},
    "bias_scalar": lambda: {"bias": randn(grad=True)},
    "mask": lambda: {"mask": torch.rand(B, 1, Lq, Lk) < 0.6},
    "mask_rows": lambda: {"mask": torch.arange(Lq).view(Lq, 1) % 2 == 0},
    "alibi": lambda: {"alibi_slopes": slopes()},
    "sinks": lambda: {"sinks": randn(Hq, grad=True)},
    "lengths": lambda: {"kv_lengths": torch.tensor([Lk, 3], dtype=torch.int32)},
    "no_keys": lambda: {"kv_lengths": torch.tensor([0, 3], dtype=torch.int32)},
    "dropout": lambda: {"dropout_p": 0.4},
    "all": lambda: {
        "causal": True,
        "window": (3, None),
        "scale": 0.4,
        "softcap": 2.0,
        "bias": randn(1, Hq, 1, Lk, grad=True),
        "mask": torch.rand(B, 1, Lq, Lk) < 0.8,
        "alibi_slopes": slopes().expand(B, Hq),
        "sinks": randn(Hq, grad=True),
        "kv_lengths": torch.tensor([Lk, 5], dtype=torch.int32),
        "dropout_p": 0.2,
    },
}
each_feature = pytest.mark.parametrize("feature", FEATURES)


def inputs_of(feature: str, dtype: torch.dtype = torch.float64) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    tensors = qkv(dtype)
    kwargs = FEATURES[feature]()
    for name in ("bias", "sinks"):
        if name in kwargs:
            kwargs[name] = kwargs[name].detach().to(dtype).requires_grad_()
    return tensors, kwargs


def differentiable(tensors: tuple[Tensor, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    return (*tensors, *(kwargs[name] for name in ("bias", "sinks") if name in kwargs))


def function_of(kwargs: dict[str, Any], attention: Any = fastattn.attention) -> Callable[..., tuple[Tensor, Tensor]]:
    """(o, lse) as a function of the differentiable tensors alone, with the same dropout every time, and lse finite."""
    names = [name for name in ("bias", "sinks") if name in kwargs]

    def function(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(7)
        o, lse = attention(q, k, v, return_lse=True, **kwargs | dict(zip(names, rest, strict=True)))
        return o, lse.masked_fill(lse == -torch.inf, 0.0)  # finite differences need numbers

    return function


# --- Schemas and fakes ------------------------------------------------------------------------------------------------


def operator_arguments(feature: str, dtype: torch.dtype, grad: bool, save_stats: bool = True) -> tuple[Any, ...]:
    """What the operator gets for fastattn.attention(**FEATURES[feature])."""
    caught: list[tuple[Any, ...]] = []
    tensors, kwargs = inputs_of(feature, dtype)

    class Catch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if op is ops.attention_forward.default:
                caught.append(args)
            return op(*args, **(kwargs or {}))

    with torch.no_grad(), Catch():
        fastattn.attention(*tensors, **kwargs)
    args = list(caught[0])
    for i in (0, 1, 2, 3, 6):
        if args[i] is not None:
            args[i] = args[i].detach().requires_grad_(grad)
    args[-1] = save_stats
    return tuple(args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_feature
def test_opcheck_forward(feature: str, dtype: torch.dtype) -> None:
    torch.library.opcheck(ops.attention_forward.default, operator_arguments(feature, dtype, grad=True))


@each_feature
def test_opcheck_forward_without_gradients(feature: str) -> None:
    args = operator_arguments(feature, torch.float32, grad=False, save_stats=False)
    torch.library.opcheck(ops.attention_forward.default, args)


@each_feature
def test_opcheck_backward(feature: str) -> None:
    args = operator_arguments(feature, torch.float32, grad=False)
    o, lse, stats = ops.attention_forward(*args)
    for d_lse in (None, torch.randn_like(lse)):
        d_o = torch.randn_like(o)
        needs = (args[3] is not None, args[6] is not None)
        torch.library.opcheck(ops.attention_backward.default, (d_o, d_lse, *args[:3], o, stats, *args[3:-1], *needs))


def test_opcheck_dropout_mask() -> None:
    torch.library.opcheck(ops.dropout_mask.default, (torch.tensor([3, 4]), 2, 3, 5, 7, 0.3))


def blhd(x: Tensor) -> Tensor:
    """The same numbers in memory order (B, L, H, D), as a projection that was split into heads leaves them."""
    return x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(x.requires_grad)


@pytest.mark.parametrize("layout", ["contiguous", "blhd"])
@pytest.mark.parametrize("shape", [(2, 4, 5, 8), (2, 4, 1, 8), (2, 1, 5, 8), (1, 1, 1, 1), (0, 4, 5, 8), (2, 4, 0, 8)])
def test_results_lie_as_inputs_do(shape: tuple[int, ...], layout: str) -> None:
    """Real and fake results have the strides that the layout rule says."""
    arrange = blhd if layout == "blhd" else torch.Tensor.contiguous
    b, h, l, d = shape
    q, k, v = (arrange(torch.randn(s)) for s in (shape, (b, h, l + 2, d), (b, h, l + 2, 3)))
    args = (q, k, v, *[None] * 6, 0, -1, -1, None, 0.0, 0.0, True)
    o, lse, stats = ops.attention_forward(*args)
    grads = ops.attention_backward(
        torch.randn_like(o), None, q, k, v, o, stats, *[None] * 6, 0, -1, -1, None, 0.0, 0.0, False, False
    )
    for like, result in ((q, o), (q, grads[0]), (k, grads[1]), (v, grads[2])):
        heads_inside_rows = like.stride(1) < like.stride(2)
        wanted = torch.empty_like(result, memory_format=torch.contiguous_format)
        assert result.stride() == (blhd(wanted) if heads_inside_rows else wanted).stride()
    assert lse.is_contiguous()
    assert stats.is_contiguous()
    fakes = ops.attention_forward(*(x.to("meta") if isinstance(x, Tensor) else x for x in args))
    for real, fake in zip((o, lse, stats), fakes, strict=True):
        assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


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


# --- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> None:
    torch._dynamo.reset()


def run(function: Callable[..., Any], tensors: tuple[Tensor, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(11)
    o, lse = function(*tensors, return_lse=True, **kwargs)
    loss = o.sin().sum() + torch.where(lse == -torch.inf, 0.0, lse).cos().sum()
    return [o.detach(), lse.detach(), *torch.autograd.grad(loss, differentiable(tensors, kwargs))]


@each_feature
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.usefixtures("fresh_compiler")
def test_compile(feature: str, backend: str, dynamic: bool) -> None:
    """One graph, forward and backward, and the numbers of eager code."""
    tensors, kwargs = inputs_of(feature, torch.float32)
    compiled = torch.compile(fastattn.attention, fullgraph=True, dynamic=dynamic, backend=backend)
    # Inductor draws other random numbers.
    if not (kwargs.get("dropout_p") and backend == "inductor"):
        torch.testing.assert_close(run(compiled, tensors, kwargs), run(fastattn.attention, tensors, kwargs))
    else:
        assert all(x.isfinite().any() for x in run(compiled, tensors, kwargs))
    with torch.no_grad():
        o = compiled(*tensors, **kwargs | {"dropout_p": 0.0})
        torch.testing.assert_close(o, fastattn.attention(*tensors, **kwargs | {"dropout_p": 0.0}))


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_dynamic_shapes_do_not_recompile() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    counts = []
    compiled = torch.compile(fastattn.attention, fullgraph=True, dynamic=True, backend=counter)
    for b, h, lq, lk in ((2, 4, 5, 7), (3, 6, 9, 11), (4, 8, 33, 64), (2, 2, 7, 5)):
        q, k, v = (randn(b, h, n, 8, dtype=torch.float32, grad=True) for n in (lq, lk, lk))
        bias = torch.randn(h, 1, lk, requires_grad=True)
        o = compiled(q, k, v, bias=bias, causal=True)
        grads = torch.autograd.grad(o.sin().sum(), (q, k, v, bias))
        eager = fastattn.attention(q, k, v, bias=bias, causal=True)
        torch.testing.assert_close((o, *grads), (eager, *torch.autograd.grad(eager.sin().sum(), (q, k, v, bias))))
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 4


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_layouts() -> None:
    """Strides of results in a trace are those that the operator gives."""

    def block(x: Tensor, weight: Tensor) -> Tensor:
        q, k, v = (x @ weight).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return fastattn.attention(q, k, v, causal=True).transpose(1, 2).flatten(2)

    x, weight = randn(2, 9, 32, dtype=torch.float32, grad=True), randn(32, 96, dtype=torch.float32, grad=True)
    compiled = torch.compile(block, fullgraph=True)
    results = []
    for function in (compiled, block):
        o = function(x, weight)
        results.append((o.detach(), *torch.autograd.grad(o.sin().sum(), (x, weight))))
    torch.testing.assert_close(*results)


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_autocast() -> None:
    q, k, v = qkv(torch.float32)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return fastattn.attention(q, k, v)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = fastattn.attention(q, k, v)
    assert torch.equal(block(q, k, v), wanted)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_dropout_is_reproducible_and_its_backward_agrees() -> None:
    """v = identity shows which weights the forward pass dropped; the gradient must drop the same."""
    q, k = randn(1, 1, 20, 8, dtype=torch.float32), randn(1, 1, 20, 8, dtype=torch.float32)
    v = torch.eye(20).view(1, 1, 20, 20).requires_grad_()
    compiled = torch.compile(fastattn.attention, fullgraph=True)
    torch.manual_seed(5)
    p = compiled(q, k, v, dropout_p=0.5)
    torch.manual_seed(5)
    assert torch.equal(p, compiled(q, k, v, dropout_p=0.5))
    (d_v,) = torch.autograd.grad(p, v, torch.eye(20).view(1, 1, 20, 20))
    assert 0.3 < (p == 0).float().mean() < 0.7
    torch.testing.assert_close(d_v, p.detach().mT)


def test_export() -> None:
    class Block(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return fastattn.attention(q, k, v, causal=True)

    q, k, v = qkv(torch.float32, grad=False)
    length = torch.export.Dim("length", min=2, max=1024)
    shapes = ({}, {2: length}, {2: length})
    exported = torch.export.export(Block(), (q, k, v), dynamic_shapes=shapes)
    assert any(node.target is ops.attention_forward.default for node in exported.graph.nodes)
    longer = torch.cat([k, k], 2), torch.cat([v, v], 2)
    torch.testing.assert_close(exported.module()(q, *longer), fastattn.attention(q, *longer, causal=True))


# --- torch.func and forward mode --------------------------------------------------------------------------------------


def transform_cases() -> dict[str, Callable[[Any], Any]]:
    q, k, v = qkv(grad=False)
    stack = [torch.stack([x, x.flip(2), -x]) for x in (q, k, v)]
    masks = torch.rand(3, Lq, Lk) < 0.7
    func = torch.func

    def loss(attention: Any) -> Callable[..., Tensor]:
        return lambda q, k, v: attention(q, k, v, causal=True).sin().sum()

    def nested(attention: Any) -> Any:
        return func.grad(lambda q: func.grad(loss(attention))(q, k, v).square().sum())(q)

    def dual(attention: Any) -> Any:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(attention(forward_ad.make_dual(q, q.flip(3)), k, v)).tangent

    return {
        "grad": lambda f: func.grad(loss(f), argnums=(0, 1, 2))(q, k, v),
        "grad_of_grad": nested,
        "vjp": lambda f: func.vjp(lambda q, v: f(q, k, v, return_lse=True), q, v)[1]((q[..., :Dv], q[..., 0])),
        "vmap": lambda f: func.vmap(f)(*stack),
        "vmap_shared_keys": lambda f: func.vmap(f, in_dims=(0, None, None))(stack[0], k, v),
        "vmap_masks": lambda f: func.vmap(lambda m: f(q, k, v, mask=m))(masks),
        "per_sample_gradients": lambda f: func.vmap(func.grad(loss(f), argnums=(0, 2)))(*stack),
        "jacrev": lambda f: func.jacrev(lambda q: f(q, k, v).sum(0))(q),
        "jvp": lambda f: func.jvp(lambda q, k: f(q, k, v, causal=True), (q, k), (q.flip(2), k.flip(3))),
        "jacfwd": lambda f: func.jacfwd(lambda v: f(q, k, v).sum(0))(v),
        "hessian": lambda f: func.hessian(lambda q: loss(f)(q, k[:1], v[:1]))(q[:1]),
        "dual": dual,
    }


@pytest.mark.parametrize("name", transform_cases())
def test_transforms(name: str) -> None:
    transform = transform_cases()[name]
    torch.manual_seed(0)
    torch.testing.assert_close(transform(fastattn.attention), transform(reference.attention))


def test_vmap_dropout_follows_randomness() -> None:
    q, k, v = qkv(grad=False)
    x = torch.stack([q, q])

    def dropped(q: Tensor) -> Tensor:
        return fastattn.attention(q, k, v, dropout_p=0.5)

    same = torch.func.vmap(dropped, randomness="same")(x)
    assert torch.equal(same[0], same[1])
    different = torch.func.vmap(dropped, randomness="different")(x)
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(dropped)(x)
