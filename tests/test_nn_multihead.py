"""The numbers of fastattn.nn.MultiheadAttention against those of torch.nn.MultiheadAttention."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.nn import MultiheadAttention

from .multihead_calls import CALLS, MODULES, Call, E, H, L, Module, S, masks, pairs, results

# --- The whole grid, in float64 ---------------------------------------------------------------------------------------


def test_the_grid_has_every_call() -> None:
    made = {call for module in MODULES for call in pairs(module)}
    assert made == set(CALLS)


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@pytest.mark.parametrize("config", MODULES, ids=str)
def test_everything_agrees_with_torch(config: Module) -> None:
    torch.manual_seed(MODULES.index(config))
    theirs = torch.nn.MultiheadAttention(**config.arguments())
    ours = MultiheadAttention(**config.arguments())
    ours.load_state_dict(theirs.state_dict())
    kdim, vdim = config.dims or (E, E)
    for call in pairs(config):
        if call.inputs == "self" and config.dims:
            call = Call("distinct", call.padding, call.mask, call.is_causal, call.weights)
        sizes = {"self": [(L, E)], "memory": [(L, E), (S, kdim)], "distinct": [(L, E), (S, kdim), (S, vdim)]}
        shapes = sizes["distinct" if kdim != vdim else call.inputs]
        inputs = [config.tensor(*shape) for shape in shapes]
        options = {
            **masks(config, call, L, shapes[-1][0]),
            "need_weights": call.weights != "no",
            "average_attn_weights": call.weights == "averaged",
            "is_causal": call.is_causal,
        }
        wanted, found = results(theirs, inputs, options), results(ours, inputs, options)
        # Where PyTorch drops the mask for is_causal, it has no gradient; where only fastattn does, its part is missing.
        if call.is_causal and "d attn_mask" in wanted and call.weights == "no":
            wanted.pop("d attn_mask")
            found.pop("d attn_mask", None)
        assert found.keys() == wanted.keys(), call
        for name, x in wanted.items():
            torch.testing.assert_close(
                found[name], x, rtol=1e-9, atol=1e-11, msg=lambda m, n=name, c=call: f"{n}: {c}\n{m}"
            )


# --- Accuracy in the other dtypes -------------------------------------------------------------------------------------


def check_accuracy(found: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """The project's bound; tiny is a rounding of the result and four of its root mean square."""
    assert found.keys() == plain.keys() == exact.keys()
    for name, x in exact.items():
        assert found[name].dtype == plain[name].dtype, name
        error, allowed = (found[name] - x).abs().max().item(), (plain[name] - x).abs().max().item()
        unit = torch.finfo(found[name].dtype).eps / 2
        tiny = unit * (x.abs().max() + 4 * x.square().mean().sqrt()).item()
        assert error <= 2 * allowed + tiny, (
            f"{name} is off by {error:.3g}, PyTorch by {allowed:.3g}; tiny is {tiny:.3g}"
        )


ACCURACY_CALLS = {
    "plain": {},
    "padding": {"key_padding_mask": True},
    "causal": {"attn_mask": True, "is_causal": True},
    "padding-causal-weights": {"key_padding_mask": True, "attn_mask": True, "need_weights": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ACCURACY_CALLS)
def test_accuracy(name: str, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"need_weights": False, "attn_mask": None, **ACCURACY_CALLS[name]}
    if options["attn_mask"]:
        options["attn_mask"] = torch.nn.Transformer.generate_square_subsequent_mask(33, dtype=dtype)
    if "key_padding_mask" in options:
        options["key_padding_mask"] = torch.zeros(2, 33, dtype=dtype)
        options["key_padding_mask"][1, 20:] = -math.inf
    theirs = torch.nn.MultiheadAttention(64, 4, batch_first=True, dtype=dtype)
    ours = MultiheadAttention(64, 4, batch_first=True, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 33, 64, dtype=dtype)
    plain, found = results(theirs, [x], options), results(ours, [x], options)
    wide = {k: v.double() if isinstance(v, Tensor) and v.dtype != torch.bool else v for k, v in options.items()}
    exact = results(copy.deepcopy(theirs).double(), [x.double()], wide)
    check_accuracy(found, plain, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("need_weights", [False, True])
def test_autocast(dtype: torch.dtype, need_weights: bool) -> None:
    theirs = torch.nn.MultiheadAttention(64, 4)
    ours = MultiheadAttention(64, 4)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(17, 2, 64)
    options = {"attn_mask": torch.zeros(17, 17).triu(1), "need_weights": need_weights}
    exact = results(
        copy.deepcopy(theirs).double(), [x.double()], options | {"attn_mask": options["attn_mask"].double()}
    )
    with torch.autocast("cpu", dtype=dtype):
        found, plain = results(ours, [x], options), results(theirs, [x], options)
    check_accuracy({k: found[k] for k in exact}, {k: plain[k] for k in exact}, exact)


def test_a_float32_mask_of_finfo_min_hides_16_bit_keys_without_emptying_the_row() -> None:
    ours = MultiheadAttention(E, H, batch_first=True, dtype=torch.bfloat16)
    x = torch.randn(1, L, E, dtype=torch.bfloat16)
    padding = torch.full((1, L), torch.finfo(torch.float32).min)
    _, weights = ours(x, x, x, key_padding_mask=padding)
    assert torch.allclose(weights.float(), torch.full((1, L, L), 1 / L), atol=1e-3)  # a uniform row, not an empty one


# --- What is there instead of PyTorch's NaN ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_a_query_without_a_key_has_the_bias_for_output_and_no_gradient(kind: str, need_weights: bool) -> None:
    ours = MultiheadAttention(E, H, batch_first=True)
    torch.nn.init.normal_(ours.out_proj.bias)
    x = torch.randn(2, L, E, requires_grad=True)
    padding = torch.tensor([[False] * L, [True] * L])
    if kind == "float":
        padding = torch.zeros(2, L).masked_fill(padding, -math.inf)
    output, weights = ours(x, x, x, key_padding_mask=padding, need_weights=need_weights)
    assert torch.equal(output[1], ours.out_proj.bias.expand(L, E))
    assert weights is None or not weights[1].any()
    (output.square().sum() + (weights.square().sum() if weights is not None else 0)).backward()
    assert not x.grad[1].any()
    assert all(p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("shape", [(0, L), (2, 0)], ids=["no-batch", "no-keys"])
def test_nothing_to_attend_to(shape: tuple[int, int]) -> None:
    ours = MultiheadAttention(E, H, batch_first=True)
    memory = torch.randn(*shape, E)
    output, weights = ours(torch.randn(shape[0], 3, E), memory, memory)
    assert output.shape == (shape[0], 3, E)
    assert weights.shape == (shape[0], 3, shape[1])
    assert torch.equal(output, ours.out_proj.bias.expand_as(output))
