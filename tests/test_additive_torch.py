"""fastattn.additive_attention as torch sees it: opcheck, torch.compile, torch.func, autocast, memory layouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import fastattn
from fastattn import reference

from .additive_calls import (
    FEATURES,
    SIXTEEN_BITS,
    B,
    D,
    Dv,
    Hq,
    Lq,
    each_w,
    ops,
    tensors_of,
)
from .test_parity import dtype_id


def operator_arguments(feature: str, w_shape: tuple[int, ...], grad: bool) -> tuple[Any, ...]:
    kwargs = FEATURES[feature]()
    dropout_p = kwargs.get("dropout_p", 0.0)
    causal = {False: 0, "top_left": 1, True: 2}[kwargs.get("causal", False)]
    state = torch.tensor([3, 4]) if dropout_p else None
    q, k, v, w = tensors_of(w_shape, torch.float32, grad)
    return q, k, v, w, kwargs.get("mask"), kwargs.get("kv_lengths"), state, causal, dropout_p


@pytest.mark.parametrize("feature", ["dense", "all"])  # no optional argument, and every one
@each_w
def test_opcheck(feature: str, w_shape: tuple[int, ...]) -> None:
    torch.library.opcheck(ops.additive_attention_forward.default, (*operator_arguments(feature, w_shape, True), True))
    args = operator_arguments(feature, w_shape, False)
    torch.library.opcheck(ops.additive_attention_forward.default, (*args, False))
    o, lse, stats = ops.additive_attention_forward(*args, True)
    for d_lse in (None, torch.randn_like(lse)) if feature == "dense" else (torch.randn_like(lse),):
        upstream = (torch.randn_like(o), d_lse)
        torch.library.opcheck(ops.additive_attention_backward.default, (*upstream, *args[:4], o, stats, *args[4:]))


@pytest.mark.parametrize(
    ("feature", "backend", "rank"),
    [("dense", "aot_eager", 4), ("all", "aot_eager", 4), ("all", "aot_eager", 3), ("all", "inductor", 4)],
)
@pytest.mark.usefixtures("fresh_compiler")
def test_compile(feature: str, backend: str, rank: int) -> None:
    """One graph, forward and backward, static and dynamic, and the numbers of eager code."""
    kwargs = FEATURES[feature]()
    tensors = tensors_of((D,), torch.float32)
    if rank == 3:
        tensors[:3] = [x[:, 0].detach().requires_grad_() for x in tensors[:3]]
        kwargs |= {"mask": kwargs["mask"][:, 0]} if "mask" in kwargs else {}
    if backend == "inductor":
        kwargs.pop("dropout_p", None)  # it draws other random numbers
    for dynamic in (False, True) if feature == "all" and rank == 4 else (True,):
        compiled = torch.compile(fastattn.additive_attention, fullgraph=True, dynamic=dynamic, backend=backend)
        results = []
        for function in (compiled, fastattn.additive_attention):
            torch.manual_seed(11)
            o, lse = function(*tensors, return_lse=True, **kwargs)
            loss = o.sin().sum() + torch.where(lse == -torch.inf, 0.0, lse).cos().sum()
            results.append((o.detach(), lse.detach(), *torch.autograd.grad(loss, tensors)))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "name", ["grad", "grad_of_grad", "vmap", "vmap_shared_keys", "per_sample_gradients", "jvp", "hessian", "dual"]
)
def test_transforms(name: str) -> None:
    func = torch.func
    q, k, v, w = tensors_of(grad=False)
    stack = [torch.stack([x, x.flip(2), -x]) for x in (q, k, v)]

    def loss(attend: Any) -> Callable[..., Tensor]:
        return lambda q, k, v, w: attend(q, k, v, w, causal=True).sin().sum()

    def dual(attend: Any) -> Any:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(attend(q, k, v, forward_ad.make_dual(w, w.flip(1)))).tangent

    transform: Callable[[Any], Any] = {
        "grad": lambda f: func.grad(loss(f), argnums=(0, 1, 2, 3))(q, k, v, w),
        "grad_of_grad": lambda f: func.grad(lambda w: func.grad(loss(f), 3)(q, k, v, w).square().sum())(w),
        "vmap": lambda f: func.vmap(lambda q, k, v: f(q, k, v, w))(*stack),
        "vmap_shared_keys": lambda f: func.vmap(f, in_dims=(0, None, None, None))(stack[0], k, v, w),
        "per_sample_gradients": lambda f: func.vmap(func.grad(loss(f), 3), in_dims=(0, 0, 0, None))(*stack, w),
        "jvp": lambda f: func.jvp(lambda q, w: f(q, k, v, w), (q, w), (q.flip(2), w.flip(1))),
        "hessian": lambda f: func.hessian(lambda w: loss(f)(q[:1], k[:1], v[:1], w))(w),
        "dual": dual,
    }[name]
    torch.testing.assert_close(transform(fastattn.additive_attention), transform(reference.additive_attention))


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=dtype_id)
@pytest.mark.parametrize("given", [torch.float32, torch.float16, torch.bfloat16], ids=dtype_id)
def test_autocast(dtype: torch.dtype, given: torch.dtype) -> None:
    """All of q, k, v and w are cast; gradients have the inputs' dtype; float64 is left alone."""
    tensors = tensors_of(dtype=given)
    with torch.autocast("cpu", dtype=dtype):
        o, lse = fastattn.additive_attention(*tensors, return_lse=True)
        assert fastattn.additive_attention(*tensors_of()).dtype == torch.float64
    assert (o.dtype, lse.dtype) == (dtype, torch.float32)
    wanted = fastattn.additive_attention(*(x.to(dtype) for x in tensors))
    assert torch.equal(o, wanted)
    for x, grad in zip(tensors, torch.autograd.grad(o.float().sin().sum(), tensors), strict=True):
        assert grad.dtype == x.dtype


def test_a_change_in_place_is_noticed() -> None:
    for i in range(4):
        tensors = tensors_of()
        o = fastattn.additive_attention(*(x * 1 for x in tensors))
        copies = [x * 1 for x in tensors]
        o = fastattn.additive_attention(*copies)
        with torch.no_grad():
            copies[i].mul_(2.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            o.sum().backward()


@pytest.mark.parametrize("layout", ["contiguous", "blhd"])
def test_results_lie_as_inputs_do(layout: str) -> None:
    def arrange(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2) if layout == "blhd" else x

    q, k, v, w = tensors_of(grad=False, dtype=torch.float32)
    args = (arrange(q), arrange(k), arrange(v), w, None, None, None, 0, 0.0)
    results = ops.additive_attention_forward(*args, True)
    fakes = ops.additive_attention_forward(*(x.to("meta") if isinstance(x, Tensor) else x for x in args), True)
    for real, fake in zip(results, fakes, strict=True):
        assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)
    assert results[0].stride() == arrange(torch.empty(B, Hq, Lq, Dv)).stride()
