"""torch.compile of everything public that computes: one graph, static and dynamic, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

import fastattn

from .attention_calls import FEATURES, differentiable, each_feature, inputs_of, qkv, randn
from .public_calls import CALLS, OTHER_SIZES, OTHERS, SIZES, Hkv, every_public_name, numbers, outcome

pytestmark = pytest.mark.usefixtures("fresh_compiler", "one_thread")
each_call = pytest.mark.parametrize("name", CALLS)


def test_the_table_is_complete() -> None:
    assert {call.public for call in CALLS.values()} == every_public_name() - OTHERS
    assert every_public_name() >= OTHERS


@each_call
def test_shapes_become_dynamic_once(name: str) -> None:
    """One graph for the first shape, one for all others: the same results and gradients as eager code."""
    call = CALLS[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call.function, fullgraph=True, backend=counter)
    for n, sizes in enumerate((SIZES, *OTHER_SIZES)):
        found, wanted = (outcome(f, call, call.arguments(sizes)) for f in (compiled, call.function))
        torch.testing.assert_close(found, wanted)
        assert type(found[0]) is type(wanted[0])
        assert counter.frame_count == min(n + 1, 2)


@pytest.mark.parametrize("name", [name for name in CALLS if "-" not in name and name != "replaced"])
def test_marked_dimensions_are_dynamic_at_once(name: str) -> None:
    call = CALLS[name]
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(call.function, fullgraph=True, backend=counter)
    for sizes in (SIZES, OTHER_SIZES[0]):
        arguments = call.arguments(sizes)
        for x in arguments:
            for dim, size in enumerate(x.shape):
                if size in {*SIZES, SIZES[0] + 1, SIZES[1] + SIZES[2], SIZES[0] * SIZES[1], SIZES[0] * SIZES[2]}:
                    torch._dynamo.mark_dynamic(x, dim)
        torch.testing.assert_close(compiled(*arguments), call.function(*call.arguments(sizes)))
    assert counter.frame_count == 1


# The others are plain operations around these, and take Inductor's C++ compiler up to half a minute each.
@pytest.mark.parametrize(
    "name", [name for name in CALLS if "-" not in name and name not in ("weights", "merge", "replaced")]
)
def test_inductor(name: str) -> None:
    call = CALLS[name]
    compiled = torch.compile(call.function, fullgraph=True)
    torch.testing.assert_close(*(outcome(f, call, call.arguments()) for f in (compiled, call.function)))


def run(function: Any, tensors: tuple[Tensor, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(11)
    results = function(*tensors, return_lse=True, **kwargs)
    return [*(x.detach() for x in results), *torch.autograd.grad(numbers(results), differentiable(tensors, kwargs))]


@each_feature
def test_features_of_attention(feature: str) -> None:
    """Each argument in a graph of symbolic shapes, with gradients and without."""
    tensors, kwargs = inputs_of(feature, torch.float32)
    compiled = torch.compile(fastattn.attention, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, tensors, kwargs), run(fastattn.attention, tensors, kwargs))
    with torch.no_grad():
        kwargs["dropout_p"] = 0.0
        torch.testing.assert_close(compiled(*tensors, **kwargs), fastattn.attention(*tensors, **kwargs))


def test_inductor_takes_all_features() -> None:
    tensors, kwargs = inputs_of("all", torch.float32)
    kwargs["dropout_p"] = 0.0  # it draws other random numbers
    compiled = torch.compile(fastattn.attention, fullgraph=True)
    torch.testing.assert_close(run(compiled, tensors, kwargs), run(fastattn.attention, tensors, kwargs))
    assert set(kwargs) >= {name for make in FEATURES.values() for name in make()}


def test_packed_lengths_do_not_compile_anew() -> None:
    """max_seqlen is an int, and a graph holds for one value of it: it counts as the next power of four."""

    def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        return fastattn.varlen_attention(
            q, k, v, cu_seqlens, cu_seqlens, max_seqlen_q=longest, max_seqlen_k=longest, causal=True
        )

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for B, n in ((3, 5), (5, 17), (7, 33), (9, 64), (11, 40)):
        q, k, v = randn(B * n, 4, 8), randn(B * n, Hkv, 8), randn(B * n, Hkv, 6)
        cu_seqlens = torch.arange(B + 1, dtype=torch.int32) * n
        torch.testing.assert_close(compiled(q, k, v, cu_seqlens, n), attend(q, k, v, cu_seqlens, n))
    assert counter.frame_count == 2


def test_layouts() -> None:
    """Strides of results in a trace are those that the operator gives."""

    def block(x: Tensor, weight: Tensor) -> Tensor:
        q, k, v = (x @ weight).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return fastattn.attention(q, k, v, causal=True).transpose(1, 2).flatten(2)

    x, weight = randn(2, 9, 32, dtype=torch.float32, grad=True), randn(32, 96, dtype=torch.float32, grad=True)
    results = []
    for function in (torch.compile(block, fullgraph=True), block):
        o = function(x, weight)
        results.append((o.detach(), *torch.autograd.grad(o.sin().sum(), (x, weight))))
    torch.testing.assert_close(*results)


def test_autocast() -> None:
    q, k, v = qkv(torch.float32)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return fastattn.attention(q, k, v)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = fastattn.attention(q, k, v)
    assert torch.equal(block(q, k, v), wanted)


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


# --- Transforms of torch.func inside of what is compiled, and around it -----------------------------------------------

TRANSFORMED = ("attention", "varlen", "additive", "hard")


def float_call(name: str) -> tuple[Any, tuple[Tensor, ...]]:
    """A function of float tensors alone, and these."""
    call = CALLS[name]
    arguments = [x.detach() for x in call.arguments((2, 3, 5), torch.float64)]
    given = [x for x in arguments if x.is_floating_point()]
    rest = arguments[len(given) :]
    return (lambda *x: call.function(*x, *rest)), tuple(given)


@pytest.mark.parametrize(
    ("name", "transform"),
    [
        *((name, transform) for name in TRANSFORMED for transform in ("grad", "per_sample", "jvp")),
        *((name, transform) for name in ("attention", "hard") for transform in ("vmap", "dual_level")),
    ],
)
def test_transforms_in_the_graph(name: str, transform: str) -> None:
    function, given = float_call(name)
    stack = [torch.stack([x, -x, x.flip(-1)]) for x in given]
    tangents = tuple(x.cos() for x in given)
    every = tuple(range(len(given)))

    def loss(*x: Tensor) -> Tensor:
        return numbers(function(*x))

    def dual(*x: Tensor) -> Any:
        with forward_ad.dual_level():
            pairs = zip(x, tangents, strict=True)
            o = function(*(forward_ad.make_dual(primal, tangent) for primal, tangent in pairs))[0]
            return forward_ad.unpack_dual(o).tangent

    transformed, arguments = {
        "vmap": (torch.func.vmap(function), stack),
        "grad": (torch.func.grad(loss, argnums=every), given),
        "per_sample": (torch.func.vmap(torch.func.grad(loss, argnums=every)), stack),
        "jvp": (lambda *x: torch.func.jvp(function, x, tangents), given),
        "dual_level": (dual, given),
    }[transform]
    # dual_level itself breaks the graph.
    compiled = torch.compile(transformed, fullgraph=transform != "dual_level", backend="aot_eager")
    if name == "varlen" and transform == "jvp":
        with pytest.raises(Exception, match="fastattn: varlen_attention's second and forward-mode derivatives"):
            compiled(*arguments)
    else:
        torch.testing.assert_close(compiled(*arguments), transformed(*arguments))


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_transforms_of_compiled_code(transform: str) -> None:
    function, given = float_call("attention")

    def apply(f: Any) -> Any:
        if transform == "vmap":
            return torch.func.vmap(f)(*(torch.stack([x, -x]) for x in given))
        if transform == "grad":
            return torch.func.grad(lambda *x: numbers(f(*x)))(*given)
        return torch.func.jvp(f, given, given)

    torch.testing.assert_close(apply(torch.compile(function, backend="aot_eager")), apply(function))


def test_a_cache_has_no_tangent_in_compiled_code_either() -> None:
    q, *rest = (x.detach() for x in CALLS["kv_cache"].arguments())

    def step(q: Tensor) -> Any:
        return torch.func.jvp(lambda q: CALLS["kv_cache"].function(q, *rest), (q,), (q,))

    with pytest.raises(Exception, match="attention_with_kv_cache has no derivative"):
        torch.compile(step, backend="eager", fullgraph=True)(q)


# --- KVCache, and models whose attention was replaced -----------------------------------------------------------------


def test_the_cache_is_one_break_and_compiles_once() -> None:
    weight = torch.randn(8, 8)

    def step(cache: fastattn.KVCache, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return cache.attend((q @ weight).relu(), k * 2, v, causal=True) * 2

    caches = [fastattn.KVCache(3, 2, 8, page_size=4) for _ in range(2)]
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(step, backend=counter)
    for n in (5, *[1] * 12):
        q, k, v = torch.randn(3, 4, n, 8), torch.randn(3, 2, n, 8), torch.randn(3, 2, n, 8)
        torch.testing.assert_close(compiled(caches[0], q, k, v), step(caches[1], q, k, v))
    assert caches[0].lengths == caches[1].lengths
    assert counter.frame_count == 4  # before and after it, for a prompt and for a token
    with pytest.raises(Exception, match=r"call\s+fastattn.attention_with_kv_cache"):
        torch.compile(step, backend="eager", fullgraph=True)(caches[0], q, k, v)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.usefixtures("sdpa_left_alone")
def test_a_model_compiled_while_sdpa_is_replaced(dropout_p: float) -> None:
    """Forward and backward, with a mask; and after the block the same model runs PyTorch's attention."""
    F = torch.nn.functional
    mask = torch.rand(7, 7) < 0.7
    linear = torch.nn.Linear(8, 8)

    def model(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(linear(x), x, x, mask, dropout_p)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 7, 8, requires_grad=True)
    results = []
    with fastattn.replaced_sdpa():
        for function in (compiled, model):
            torch.manual_seed(4)
            o = function(x)
            results.append((o, *torch.autograd.grad(o.sin().sum(), (x, linear.weight))))
    torch.testing.assert_close(*results)
    assert fastattn.sdpa_calls(reset=True) == fastattn.SdpaCalls(2, {})
    torch.manual_seed(4)
    after = compiled(x)
    torch.manual_seed(4)
    torch.testing.assert_close(after, model(x))
    assert fastattn.sdpa_calls() == fastattn.SdpaCalls(0, {})
