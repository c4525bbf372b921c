"""fastattn.hard_attention as torch sees it: opcheck, torch.compile, torch.func, autocast, checkpoints."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import fastattn
from fastattn import reference

from .cases import Case, make_inputs
from .hard_calls import DTYPES, FEATURES, MODES, SIXTEEN_BITS, Dv, Lk, compute, ops, qkv, with_grad
from .test_parity import dtype_id


def operator_arguments(feature: str, grad: bool) -> tuple[Any, ...]:
    kwargs = FEATURES[feature]()
    causal = {False: 0, "top_left": 1, True: 2}[kwargs.get("causal", False)]
    sides = tuple(-1 if side is None else side for side in kwargs.get("window", (None, None)))
    state = None if kwargs.get("mode") == "argmax" else torch.tensor([3, 4])
    return (
        *qkv(torch.float32, grad),
        kwargs.get("mask"),
        kwargs.get("kv_lengths"),
        state,
        causal,
        *sides,
        kwargs.get("scale"),
    )


@pytest.mark.parametrize("feature", ["sample", "argmax", "lengths", "all"])
def test_opcheck(feature: str) -> None:
    torch.library.opcheck(ops.hard_attention_forward.default, (*operator_arguments(feature, True), True))
    args = operator_arguments(feature, False)
    torch.library.opcheck(ops.hard_attention_forward.default, (*args, False))
    o, index, log_prob, stats = ops.hard_attention_forward(*args, True)
    both = (torch.randn_like(o), torch.randn_like(log_prob))
    for d_o, d_log_prob in (both, (None, both[1]), (both[0], None)) if feature == "sample" else (both,):
        given = (d_o, d_log_prob, *args[:3], index, stats, *args[3:5], *args[6:])
        torch.library.opcheck(ops.hard_attention_backward.default, given)


@pytest.mark.parametrize(
    ("feature", "backend"),
    [*((feature, "aot_eager") for feature in FEATURES), ("argmax", "inductor"), ("all", "inductor")],
)
@pytest.mark.usefixtures("fresh_compiler")
def test_compile(feature: str, backend: str) -> None:
    """One graph, forward and backward, static and dynamic, and the numbers of eager code."""
    kwargs = FEATURES[feature]()
    if backend == "inductor":
        kwargs["mode"] = "argmax"  # it draws other random numbers
    tensors = qkv(torch.float32)

    def run(function: Any) -> tuple[Tensor, ...]:
        torch.manual_seed(11)
        result = function(*tensors, **kwargs)
        grads = torch.autograd.grad(result.output.sin().sum() + result.log_prob.cos().sum(), tensors)
        return result.output.detach(), result.index, result.log_prob.detach(), *grads

    # Of "all" Inductor makes C++ code, whose compilation takes longer than all else here; of "argmax" it makes none.
    for dynamic in (False, True) if (feature, backend) in (("all", "aot_eager"), ("argmax", "inductor")) else (True,):
        compiled = torch.compile(fastattn.hard_attention, fullgraph=True, dynamic=dynamic, backend=backend)
        torch.testing.assert_close(run(compiled), run(fastattn.hard_attention))
        assert isinstance(compiled(*tensors, **kwargs), fastattn.HardAttentionOutput)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_samples_are_reproducible() -> None:
    q, k, v = qkv(torch.float32, grad=False)
    q = q.repeat(1, 1, 50, 1)
    compiled = torch.compile(fastattn.hard_attention, fullgraph=True)
    torch.manual_seed(5)
    first = compiled(q, k, v)
    torch.manual_seed(5)
    assert torch.equal(compiled(q, k, v).index, first.index)
    assert len(first.index.unique()) == Lk
    assert torch.equal(
        first.output, v.repeat_interleave(2, 1).gather(2, first.index.unsqueeze(-1).expand(-1, -1, -1, Dv))
    )


@pytest.mark.parametrize("estimator", ["reinforce", "straight_through"])
@pytest.mark.parametrize(
    "name", ["grad", "grad_of_grad", "vmap", "vmap_shared_keys", "per_sample_gradients", "jvp", "hessian", "dual"]
)
def test_transforms(name: str, estimator: str) -> None:
    """In argmax mode, where the plain code needs no noise."""
    func = torch.func
    q, k, v = qkv(grad=False)
    stack = [torch.stack([x, x.flip(2), -x]) for x in (q, k, v)]

    def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        result = fastattn.hard_attention(q, k, v, mode="argmax", estimator=estimator, causal=True)
        return result.output, result.log_prob

    def plain(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        log_p = reference.log_probabilities(q, k, causal=True)
        o, log_prob = reference.hard_attention(log_p, v, log_p.detach().argmax(-1))
        if estimator == "straight_through":
            soft = log_p.exp() @ v.repeat_interleave(2, dim=1)
            o = o.detach() + (soft - soft.detach())
        return o, log_prob

    def loss(f: Any) -> Callable[..., Tensor]:
        def value(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            o, log_prob = f(q, k, v)
            return o.sin().sum() + log_prob.cos().sum()

        return value

    def dual(f: Any) -> Any:
        with forward_ad.dual_level():
            results = f(forward_ad.make_dual(q, q.flip(3)), k, forward_ad.make_dual(v, v.flip(2)))
            return [forward_ad.unpack_dual(x).tangent for x in results]

    transform: Callable[[Any], Any] = {
        "grad": lambda f: func.grad(loss(f), argnums=(0, 1, 2))(q, k, v),
        "grad_of_grad": lambda f: func.grad(lambda q: func.grad(loss(f))(q, k, v).square().sum())(q),
        "vmap": lambda f: func.vmap(f)(*stack),
        "vmap_shared_keys": lambda f: func.vmap(f, in_dims=(0, None, None))(stack[0], k, v),
        "per_sample_gradients": lambda f: func.vmap(func.grad(loss(f), argnums=(0, 2)))(*stack),
        "jvp": lambda f: func.jvp(lambda q, v: f(q, k, v), (q, v), (q.flip(2), v.flip(3))),
        "hessian": lambda f: func.hessian(lambda q: loss(f)(q, k[:1], v[:1]))(q[:1]),
        "dual": dual,
    }[name]
    torch.testing.assert_close(transform(ours), transform(plain))


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=dtype_id)
@pytest.mark.parametrize("estimator", ["reinforce", "straight_through"])
def test_autocast(dtype: torch.dtype, estimator: str) -> None:
    tensors = qkv(torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        torch.manual_seed(3)
        result = fastattn.hard_attention(*tensors, estimator=estimator)
    torch.manual_seed(3)
    wanted = fastattn.hard_attention(*(x.to(dtype) for x in tensors), estimator=estimator)
    assert (result.output.dtype, result.log_prob.dtype) == (dtype, torch.float32)
    assert torch.equal(result.output, wanted.output)
    assert torch.equal(result.log_prob, wanted.log_prob)
    for grad in torch.autograd.grad(result.output.float().sum() + result.log_prob.sum(), tensors):
        assert grad.dtype == torch.float32


def test_without_gradients_the_same_bits(isa: str) -> None:
    for dtype, mode in itertools.product(DTYPES, MODES):
        inputs = with_grad(make_inputs(Case(70, 131, D=32, gqa=2, causal="bottom_right"), dtype))
        wanted, index = compute(inputs, mode=mode)
        for context in (torch.no_grad(), torch.inference_mode()):
            torch.manual_seed(0)
            with context:
                result = fastattn.hard_attention(inputs.q, inputs.k, inputs.v, mode=mode, causal=True)
            assert torch.equal(result.output, wanted["o"])
            assert torch.equal(result.log_prob, wanted["log_prob"])
            assert torch.equal(result.index, index)
            assert not result.log_prob.requires_grad


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_draws_the_same_again(use_reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    inputs = qkv()

    def block(*tensors: Tensor) -> Tensor:
        result = fastattn.hard_attention(*tensors)
        return result.output.sin().sum() + result.log_prob.sum()

    torch.manual_seed(3)
    wanted = torch.autograd.grad(block(*inputs), inputs)
    torch.manual_seed(3)
    checkpoint(block, *inputs, use_reentrant=use_reentrant).backward()  # type: ignore[union-attr]
    torch.testing.assert_close(tuple(x.grad for x in inputs), wanted)
