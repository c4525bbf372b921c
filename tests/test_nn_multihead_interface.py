"""fastattn.nn.MultiheadAttention is a torch.nn.MultiheadAttention by all appearances."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch

from fastattn.nn import MultiheadAttention

from .multihead_calls import MODULES, E, H, L, Module, N


@pytest.mark.parametrize("config", [m for m in MODULES if m.layout == "batch_second"], ids=str)
def test_parameters_are_those_of_torch(config: Module) -> None:
    torch.manual_seed(3)
    theirs = torch.nn.MultiheadAttention(**config.arguments(torch.float32))
    torch.manual_seed(3)
    ours = MultiheadAttention(**config.arguments(torch.float32))
    assert isinstance(ours, torch.nn.MultiheadAttention)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, x in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], x), name
    ours._reset_parameters()
    assert not torch.equal(ours.out_proj.weight, torch.zeros(E, E))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)


def test_device_and_dtype() -> None:
    ours = MultiheadAttention(E, H, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in ours.parameters()} == {("meta", torch.bfloat16)}
    x = torch.empty(L, N, E, device="meta", dtype=torch.bfloat16)
    output, weights = ours(x, x, x)
    assert (output.shape, output.dtype, weights.shape) == ((L, N, E), torch.bfloat16, (N, L, L))


def test_outputs_are_contiguous_where_those_of_torch_are() -> None:
    x = torch.randn(L, N, E)
    assert MultiheadAttention(E, H)(x, x, x, need_weights=False)[0].is_contiguous()
    assert MultiheadAttention(E, H, batch_first=True)(x, x, x, need_weights=False)[0].is_contiguous()


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_work_and_keep_their_mark(how: str) -> None:
    ours = MultiheadAttention(E, H, batch_first=True).eval()
    ours.register_forward_pre_hook(_shout)
    if how == "deepcopy":
        twin = copy.deepcopy(ours)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(ours))
    else:
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert type(twin) is MultiheadAttention
    x = torch.randn(N, L, E)
    assert torch.equal(twin(x, x, x)[0], ours(x, x, x)[0])
    assert list(twin._forward_pre_hooks) == list(ours._forward_pre_hooks)
    assert "fastattn" in twin._forward_pre_hooks


def _shout(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
    """A hook that can be pickled."""


def test_a_state_without_the_mark_gets_it() -> None:
    ours = MultiheadAttention(E, H)
    state = dict(ours.__dict__, _forward_pre_hooks={})
    other = MultiheadAttention.__new__(MultiheadAttention)
    other.__setstate__(state)
    assert "fastattn" in other._forward_pre_hooks
