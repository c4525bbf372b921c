"""What torch makes of fastattn.nn.MultiheadAttention: compiled, exported, traced, differentiated."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastattn.nn import MultiheadAttention

from .multihead_calls import E, H, L, N


@pytest.mark.parametrize("need_weights", [False, True])
def test_compile(fresh_compiler: None, need_weights: bool) -> None:
    ours = MultiheadAttention(E, H, dropout=0.3, batch_first=True)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    padding = torch.arange(L) >= torch.tensor([[L], [3], [2]])
    for options in ({}, {"key_padding_mask": padding}):
        found = []
        for module in (ours, compiled):
            torch.manual_seed(0)
            x = torch.ones(N, L, E).cumsum(1).sin().requires_grad_()
            output, weights = module(x, x, x, need_weights=need_weights, **options)
            loss = output.square().sum() + (weights.square().sum() if weights is not None else 0)
            found.append([output, *torch.autograd.grad(loss, [x, *ours.parameters()])])
        for eager, traced in zip(*found, strict=True):
            torch.testing.assert_close(traced, eager)


def test_export_with_symbolic_sizes() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = MultiheadAttention(E, H, batch_first=True).eval()

        def forward(self, x: Tensor) -> Tensor:
            return self.attend(x, x, x, need_weights=False)[0]

    model = Model()
    sizes = {"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}}
    program = torch.export.export(model, (torch.randn(2, 5, E),), dynamic_shapes=sizes)
    x = torch.randn(4, 9, E)
    torch.testing.assert_close(program.module()(x), model(x))


def test_functional_transforms() -> None:
    ours = MultiheadAttention(E, H, batch_first=True)
    parameters = dict(ours.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(ours, parameters, (x, x, x))[0].square().sum()

    xs = torch.randn(3, N, L, E)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, xs)
    for i, x in enumerate(xs):
        wanted = torch.autograd.grad(loss(parameters, x), list(parameters.values()))
        for name, grad in zip(parameters, wanted, strict=True):
            torch.testing.assert_close(each[name][i], grad, rtol=1e-4, atol=1e-5)


def test_second_and_forward_mode_derivatives() -> None:
    ours = MultiheadAttention(8, 2, add_bias_kv=True, dtype=torch.float64)
    x = torch.randn(3, 2, 8, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor) -> tuple[Tensor, ...]:
        return ours(x, x, x)

    assert torch.autograd.gradcheck(function, (x,))
    assert torch.autograd.gradgradcheck(function, (x,))
    tangent = torch.randn_like(x)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(ours(*[forward_ad.make_dual(x, tangent)] * 3)[0]).tangent
    step = 1e-6
    numeric = (function(x + step * tangent)[0] - function(x - step * tangent)[0]) / (2 * step)
    torch.testing.assert_close(dual, numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_jit_trace_works_and_jit_script_is_refused() -> None:
    ours = MultiheadAttention(E, H, batch_first=True).eval()
    x, other = torch.randn(2, 5, E), torch.randn(3, 9, E)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # about the checks of shapes
        traced = torch.jit.trace(ours, (x, x, x))
        for a, b in zip(traced(other, other, other), ours(other, other, other), strict=True):
            torch.testing.assert_close(a, b)
    for module in (ours, torch.nn.Sequential(ours)):
        with pytest.raises(TypeError, match=r"cannot be compiled by torch\.jit\.script; use torch\.compile"):
            torch.jit.script(module)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # about the checks of shapes
def test_jit_trace_is_for_inference() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = MultiheadAttention(E, H, dropout=0.5, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attend(x, x, x, need_weights=False)[0]

    model, x, other = Model(), torch.randn(2, 5, E), torch.randn(3, 9, E)
    with torch.no_grad():
        traced = torch.jit.trace(model, (x,), check_trace=False)  # which would call it twice and compare
    outputs = []
    for module in (traced, model):
        torch.manual_seed(0)
        outputs.append(module(other))
    torch.testing.assert_close(*outputs)
    assert not torch.equal(traced(other), outputs[0])
    with pytest.raises(ValueError, match="fastattn: stats is empty"):
        outputs[0].sum().backward()
    with pytest.raises(torch.jit.TracingCheckError):
        torch.jit.trace(model.eval(), (x,))
