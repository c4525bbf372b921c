"""torch.func and forward mode: vmap, derivatives of every kind, and vmap's one call for all elements."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map

import fastattn
from fastattn import _vmap, reference

from .attention_calls import B, D, Dv, Hkv, Hq, Lk, Lq, qkv, randn, slopes
from .public_calls import CALLS, numbers

pytestmark = pytest.mark.usefixtures("one_thread")

# --- Transforms of attention, against those of the reference ----------------------------------------------------------


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


# --- vmap against a loop, for every tensor argument -------------------------------------------------------------------


def keep(*shape: int) -> Tensor:
    return torch.rand(shape) < 0.7


def attention(**kwargs: Any) -> Any:
    return fastattn.attention(**kwargs, return_lse=True)


def additive(**kwargs: Any) -> Any:
    return fastattn.additive_attention(**kwargs, causal=True, return_lse=True)


def hard(**kwargs: Any) -> Any:
    result = fastattn.hard_attention(**kwargs, mode="argmax", estimator="straight_through")
    return result.output, result.index, result.log_prob


def summary(**kwargs: Any) -> Any:
    with torch.no_grad():
        return tuple(fastattn.attention_summary(**kwargs, top_k=2))


def varlen(**kwargs: Any) -> Any:
    cu_seqlens = [torch.tensor(x, dtype=torch.int32) for x in ([0, 2, Lq], [0, 1, Lk])]
    return fastattn.varlen_attention(
        kwargs.pop("q"),
        kwargs.pop("k"),
        kwargs.pop("v"),
        *cu_seqlens,
        max_seqlen_q=2,
        max_seqlen_k=4,
        causal=True,
        return_lse=True,
        **kwargs,
    )


def read_cache(**kwargs: Any) -> Any:
    return fastattn.attention_with_kv_cache(**kwargs, return_lse=True)


def rows_of(b: int) -> dict[str, Tensor]:
    return {"q": randn(b, Hq, Lq, D), "k": randn(b, Hkv, Lk, D), "v": randn(b, Hkv, Lk, Dv)}


def lengths(b: int) -> Tensor:
    return torch.tensor([5, 3][:b], dtype=torch.int32)


# A function, and from the batch size its tensors.
MAPPED: dict[str, tuple[Callable[..., Any], Callable[[int], dict[str, Tensor]]]] = {
    "attention": (attention, rows_of),
    "bias": (attention, lambda b: rows_of(b) | {"bias": randn(b, Hq, Lq, Lk)}),
    "bias-row": (attention, lambda b: rows_of(b) | {"bias": randn(Hq, 1, Lk), "mask": keep(b, 1, Lq, Lk)}),
    "bias-scalar": (attention, lambda b: rows_of(b) | {"bias": randn(), "mask": keep(Lq, Lk)}),
    "alibi": (attention, lambda b: rows_of(b) | {"alibi_slopes": slopes(), "kv_lengths": lengths(b)}),
    "alibi-batch": (attention, lambda b: rows_of(b) | {"alibi_slopes": slopes().repeat(b, 1), "sinks": randn(Hq)}),
    "additive": (additive, lambda b: rows_of(b) | {"w": randn(Hq, D), "mask": keep(Lq, Lk)}),
    "additive-vector": (additive, lambda b: rows_of(b) | {"w": randn(D), "kv_lengths": lengths(b)}),
    "hard": (hard, lambda b: rows_of(b) | {"mask": keep(b, 1, Lq, Lk), "kv_lengths": lengths(b)}),
    "summary": (
        summary,
        lambda b: (
            {"q": randn(b, Hq, Lq, D), "k": randn(b, Hkv, Lk, D)}
            | {"rows": keep(Hq, Lq), "sinks": randn(Hq), "alibi_slopes": slopes()}
        ),
    ),
    "varlen": (
        varlen,
        lambda b: (
            {"q": randn(Lq, Hq, D), "k": randn(Lk, Hkv, D), "v": randn(Lk, Hkv, Dv)}
            | {"bias": randn(Hq, 1, 4), "mask": keep(2, 1, 2, 4), "alibi_slopes": slopes(), "sinks": randn(Hq)}
        ),
    ),
    "cache": (
        read_cache,
        lambda b: (
            {"q": randn(b, Hq, Lq, D), "k_cache": randn(b, Hkv, 8, D), "v_cache": randn(b, Hkv, 8, Dv)}
            | {"cache_lengths": lengths(b), "sinks": randn(Hq)}
        ),
    ),
    "pages": (
        read_cache,
        lambda b: (
            {"q": randn(b, Hq, Lq, D), "k_cache": randn(6, Hkv, 4, D), "v_cache": randn(6, Hkv, 4, Dv)}
            | {"cache_lengths": lengths(b), "block_table": torch.arange(2 * b, dtype=torch.int32).view(b, 2)}
        ),
    ),
}
SIZE = 3  # of the mapped dimension


def different(x: Tensor) -> Tensor:
    """Three of a kind, no two the same."""
    if x.is_floating_point():
        return torch.stack([x, x * 0.5 + 0.1, -x * 0.3])
    if x.dtype == torch.bool:
        return torch.stack([x, ~x, x.flip(-1)])
    return torch.stack([x, x.flip(0), (x + 1) % 5])


def loop(function: Callable[..., Any], in_dims: tuple[int | None, ...]) -> Callable[..., Any]:
    def each(*arguments: Tensor) -> Any:
        results = [
            function(*(x if d is None else x.select(d, i) for x, d in zip(arguments, in_dims, strict=True)))
            for i in range(SIZE)
        ]
        return tree_map(lambda *parts: torch.stack(parts), *results)

    return each


@pytest.mark.parametrize("b", [1, 2])
@pytest.mark.parametrize("name", MAPPED)
def test_vmap_is_a_loop(name: str, b: int) -> None:
    """One tensor mapped, two, or all, each along another dimension; the results, and gradients on either side of it."""
    function, make = MAPPED[name]
    tensors = make(b)
    names = list(tensors)
    stacked = {x: different(t) for x, t in tensors.items()}
    places = {x: i % stacked[x].dim() for i, x in enumerate(names)}
    floats = tuple(i for i, x in enumerate(names) if tensors[x].is_floating_point() and x != "alibi_slopes")
    for mapped in itertools.chain(*(itertools.combinations(names, r) for r in sorted({1, 2, len(names)}))):
        in_dims = tuple(places[x] if x in mapped else None for x in names)
        arguments = [stacked[x].movedim(0, places[x]) if x in mapped else tensors[x] for x in names]

        def call(*given: Tensor) -> Any:
            return function(**dict(zip(names, given, strict=True)))

        torch.testing.assert_close(torch.func.vmap(call, in_dims)(*arguments), loop(call, in_dims)(*arguments))
        if function in (summary, read_cache):
            continue

        def loss(*given: Tensor, call: Any = call) -> Tensor:
            return numbers(call(*given))

        grad = torch.func.grad(loss, argnums=floats)
        torch.testing.assert_close(torch.func.vmap(grad, in_dims)(*arguments), loop(grad, in_dims)(*arguments))
        found, wanted = (
            torch.func.grad(lambda *x, f=f: f(*x).sum(), argnums=floats)(*arguments)
            for f in (torch.func.vmap(loss, in_dims), loop(loss, in_dims))
        )
        torch.testing.assert_close(found, wanted)


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How vmap's rule computed each call."""
    taken: list[str] = []
    all_at_once, one_by_one = _vmap.Rule._all_at_once, _vmap.one_by_one

    def fold(self: Any, function: Any, axis: str, *rest: Any) -> Any:
        taken.append(axis)
        return all_at_once(self, function, axis, *rest)

    def each(*arguments: Any) -> Any:
        taken.append("loop")
        return one_by_one(*arguments)

    monkeypatch.setattr(_vmap.Rule, "_all_at_once", fold)
    monkeypatch.setattr(_vmap, "one_by_one", each)
    return taken


def test_vmap_is_one_call_where_it_can_be(ways: list[str]) -> None:
    q, k, v = (torch.stack([x, -x]) for x in qkv(grad=False))
    vmap = torch.func.vmap
    vmap(fastattn.attention)(q, k, v)
    vmap(lambda q, k, v, s: fastattn.attention(q, k, v, sinks=s))(q, k, v, randn(2, Hq))
    vmap(vmap(fastattn.attention))(*(x.unsqueeze(0) for x in (q, k, v)))
    assert ways == ["batch", "heads", "batch", "batch"]
    ways.clear()
    # One row each of a long cache that all share is not worth a copy of it for each.
    long = randn(2, Hkv, 500, D)
    vmap(fastattn.attention, (0, None, None))(torch.cat([q, q])[:, :, :, :1], long, long)
    vmap(lambda q, n, s: fastattn.attention(q, k[0], v[0], kv_lengths=n, sinks=s))(
        q, lengths(2).repeat(2, 1), randn(2, Hq)
    )
    vmap(lambda q, k, v: fastattn.attention(q, k, v, dropout_p=0.5), randomness="same")(q, k, v)
    assert ways == ["loop", "loop", "loop"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_that_vmap_sums_are_rounded_once(dtype: torch.dtype) -> None:
    """The bits of a loop: a bias for all rows of the batch has a sum over it."""
    q, k, v = (different(x) for x in qkv(dtype, grad=False))
    bias = different(randn(1, Hq, Lq, Lk, dtype=dtype))
    grad = torch.func.grad(lambda b, *x: fastattn.attention(*x, bias=b).float().sin().sum())
    assert torch.equal(torch.func.vmap(grad)(bias, q, k, v), loop(grad, (0,) * 4)(bias, q, k, v))


def test_vmap_over_nothing_is_refused() -> None:
    empty = randn(0, B, Hq, Lq, D)
    with pytest.raises(ValueError, match="fastattn: vmap maps over a dimension of size 0"):
        torch.func.vmap(fastattn.attention)(empty, empty, empty)


def test_vmap_of_a_cache_that_grows() -> None:
    """Each element appends to its own cache, in place; one that they share is refused."""
    call = CALLS["kv_cache"]
    plain, mapped = ([different(x) for x in call.arguments(dtype=torch.float64)] for _ in range(2))
    for x in (plain, mapped):
        x[-1] = torch.stack([x[-1][0]] * SIZE)
    torch.testing.assert_close(torch.func.vmap(call.function)(*mapped), loop(call.function, (0,) * 6)(*plain))
    torch.testing.assert_close(mapped, plain)
    with pytest.raises(ValueError, match="fastattn: k_cache is the same for all elements that vmap maps over"):
        torch.func.vmap(call.function, (0, None, None, 0, 0, 0))(mapped[0], plain[1][0], plain[2][0], *mapped[3:])


@pytest.mark.parametrize("randomness", ["same", "different", "error"])
def test_draws_under_vmap_follow_randomness(randomness: str) -> None:
    q, k, v = (torch.stack([x, x]).repeat(1, 1, 1, 20, 1) for x in qkv(grad=False))

    def draw(q: Tensor) -> Tensor:
        return fastattn.hard_attention(q, k[0], v[0]).index

    if randomness == "error":
        with pytest.raises(RuntimeError, match="randomness"):
            torch.func.vmap(draw, randomness=randomness)(q)
    else:
        first, second = torch.func.vmap(draw, randomness=randomness)(q)
        assert torch.equal(first, second) == (randomness == "same")


# --- Forward mode -----------------------------------------------------------------------------------------------------

DIFFERENTIABLE = [name for name, call in CALLS.items() if call.has_gradients and "-" not in name and name != "replaced"]


def float_call(name: str) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """A function of float tensors alone, with float results alone, and its arguments."""
    call = CALLS[name]
    arguments = [x.detach() for x in call.arguments((2, 3, 5), torch.float64)]
    given = tuple(x for x in arguments if x.is_floating_point())

    def function(*x: Tensor) -> tuple[Tensor, ...]:
        leaves = tree_leaves(call.function(*x, *arguments[len(given) :]))
        return tuple(x.masked_fill(x == -torch.inf, 0.0) for x in leaves if x.is_floating_point())

    return function, given


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_of_every_kind(name: str) -> None:
    """jvp against finite differences where the estimator is none, and it, jacfwd and hessian against reverse mode."""
    function, given = float_call(name)
    tangents = tuple(x.cos() for x in given)
    tangent = torch.func.jvp(function, given, tangents)[1]
    _, pullback = torch.func.vjp(function, *given)
    cotangents = tuple(x.sin() for x in tangent)
    forward = sum((a * b).sum() for a, b in zip(tangent, cotangents, strict=True))
    backward = sum((a * b).sum() for a, b in zip(pullback(cotangents), tangents, strict=True))
    torch.testing.assert_close(forward, backward)
    inputs = tuple(x.clone().requires_grad_() for x in given)
    if name != "straight_through":
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)

    if name in ("attention", "hard"):
        x, rest = given[0][:1], [y[:1] for y in given[1:]]

        def loss(x: Tensor) -> Tensor:
            return numbers(function(x, *rest))

        hessians = [f(loss)(x) for f in (torch.func.hessian, lambda f: torch.func.jacrev(torch.func.jacrev(f)))]
        torch.testing.assert_close(*hessians)


@pytest.mark.parametrize("name", [name for name in DIFFERENTIABLE if name not in ("weights", "merge")])
def test_tangents_that_only_the_upstream_gradient_has(name: str) -> None:
    """The forward pass is over when forward mode begins: the backward pass is linear in what flows into it."""
    function, given = float_call(name)
    inputs = tuple(x.clone().requires_grad_() for x in given)
    outputs = [x for x in function(*inputs) if x.requires_grad]
    upstream, tangents = [x.detach().cos() for x in outputs], [x.detach().sin() for x in outputs]
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    wanted = torch.autograd.grad(outputs, inputs, tangents, **options)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(upstream, tangents, strict=True)]
        found = [forward_ad.unpack_dual(x).tangent for x in torch.autograd.grad(outputs, inputs, duals, **options)]
    for x, grad in zip(found, wanted, strict=True):
        torch.testing.assert_close(torch.zeros_like(grad) if x is None else x, grad)
