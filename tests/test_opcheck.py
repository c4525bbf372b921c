"""attention's operators as torch.library checks them: schemas, fakes, gradients, and where results lie in memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .attention_calls import blhd, each_feature, operator_arguments, ops

pytestmark = pytest.mark.usefixtures("one_thread")


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
