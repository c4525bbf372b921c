"""The gradients of fastattn.additive_attention numerically: first and second derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import reference

from .additive_calls import (
    FEATURES,
    D,
    each_feature,
    each_w,
    function_of,
    tensors_of,
)


@each_feature
@each_w
def test_gradcheck(feature: str, w_shape: tuple[int, ...]) -> None:
    tensors = tensors_of(w_shape)
    function = function_of(FEATURES[feature]())
    assert torch.autograd.gradcheck(function, tensors, fast_mode=w_shape == (D,))
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


def test_second_derivative_when_only_some_inputs_need_it() -> None:
    for chosen in ((0,), (2,), (3,), (1, 3)):
        tensors = tensors_of(grad=False)
        for i in chosen:
            tensors[i].requires_grad_()
        wrt = [tensors[i] for i in chosen]
        results = []
        for attend in (fastattn.additive_attention, reference.additive_attention):
            grads = torch.autograd.grad(attend(*tensors).square().sum(), wrt, create_graph=True)
            results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), wrt))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_second_derivative_of_other_dtypes(dtype: torch.dtype) -> None:
    """A gradient penalty, in each dtype, against float64; w's gradient and its own are of w's dtype."""
    inputs = tensors_of(dtype=dtype)

    def penalty(*tensors: Tensor) -> list[Tensor]:
        o = fastattn.additive_attention(*tensors, causal=True)
        grads = torch.autograd.grad(o.float().square().sum(), tensors, create_graph=True)
        return list(torch.autograd.grad(sum(g.double().square().sum() for g in grads), tensors))

    exact = penalty(*(x.detach().double().requires_grad_() for x in inputs))
    for ours, wanted, x in zip(penalty(*inputs), exact, inputs, strict=True):
        assert ours.dtype == x.dtype
        assert (ours.double() - wanted).abs().max() < 20 * torch.finfo(dtype).eps * wanted.abs().max()


def test_gradients_through_either_output() -> None:
    tensors = tensors_of()
    for use_o, use_lse in ((True, False), (False, True), (True, True)):
        results = []
        for attend in (fastattn.additive_attention, reference.additive_attention):
            o, lse = attend(*tensors, return_lse=True)
            loss = use_o * o.sin().sum() + use_lse * lse.cos().sum()
            results.append(torch.autograd.grad(loss, tensors, materialize_grads=True))
        torch.testing.assert_close(*results)
