"""attention_weights and merge_attention_states: against attention itself, and their gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


# --- attention_weights -----------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "dense": {},
    "causal": {"causal": True},
    "top_left": {"causal": "top_left"},
    "window": {"window": (2, 1)},
    "scale": {"scale": -0.7},
    "softcap": {"softcap": 0.5},
    "bias": {"bias": torch.linspace(-2, 2, 4 * 9).reshape(4, 1, 9).double()},
    "mask": {"mask": torch.arange(5 * 9).reshape(5, 9) % 3 > 0},
    "no_key": {"mask": torch.tensor([[True], [False], [True], [True], [False]])},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0]).double()},
    "sinks": {"sinks": torch.tensor([0.0, 3.0, -1.0, 0.5]).double()},
    "kv_lengths": {"kv_lengths": torch.tensor([9, 4], dtype=torch.int32), "causal": True},
}


def test_on_a_device_without_autocast() -> None:
    q, k = torch.randn(1, 2, 3, 8, device="meta"), torch.randn(1, 2, 5, 8, device="meta")
    p = fastattn.attention_weights(q, k, causal=True)
    assert (p.shape, p.device.type) == ((1, 2, 3, 5), "meta")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_weights_are_those_of_attention(options: dict[str, Any]) -> None:
    """With the identity for v, attention's output is its weights."""
    q, k = randn(2, 4, 5, 8), randn(2, 2, 9, 8)
    p = fastattn.attention_weights(q, k, **options)
    o, lse = fastattn.attention(q, k, torch.eye(9).double().expand(2, 2, 9, 9), return_lse=True, **options)
    assert isinstance(o, Tensor)
    torch.testing.assert_close(p, o, atol=1e-12, rtol=1e-12)
    sums = p.sum(-1)
    blind = lse == -math.inf
    assert not sums[blind].any()
    if "sinks" in options:
        assert (sums[~blind] < 1).all()
    else:
        torch.testing.assert_close(sums[~blind], torch.ones_like(sums[~blind]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_are_rounded_once(dtype: torch.dtype) -> None:
    q, k = randn(1, 2, 5, 64, dtype=dtype), randn(1, 2, 70, 64, dtype=dtype)
    p = fastattn.attention_weights(q, k)
    exact = fastattn.attention_weights(q.double(), k.double())
    assert p.dtype == dtype
    assert ((p.double() - exact).abs() <= torch.finfo(dtype).eps * exact + 1e-6).all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fastattn.attention_weights(q, k), p)


def test_weights_gradients() -> None:
    q, k = randn(1, 2, 3, 4).requires_grad_(), randn(1, 1, 4, 4).requires_grad_()
    bias, sinks = randn(2, 1, 4).requires_grad_(), randn(2).requires_grad_()

    def function(q: Tensor, k: Tensor, bias: Tensor, sinks: Tensor) -> Tensor:
        return fastattn.attention_weights(q, k, bias=bias, sinks=sinks, causal="top_left")

    assert torch.autograd.gradcheck(function, (q, k, bias, sinks))
    assert torch.autograd.gradgradcheck(function, (q, k, bias, sinks), fast_mode=True)


@pytest.mark.parametrize(
    ("q", "k", "options", "error", "message"),
    [
        (randn(2, 4, 5, 8), randn(2, 3, 9, 8), {}, ValueError, "k has 3 heads but q has 4"),
        (randn(2, 4, 5, 8), randn(2, 4, 9, 7), {}, ValueError, "k has head dimension 7 but q has 8"),
        (randn(4, 5, 8), randn(4, 9, 8), {}, ValueError, "q has 3 dimensions"),
        (randn(2, 4, 5, 8), randn(2, 4, 9, 8), {"mask": torch.ones(4, 9) > 0}, ValueError, "mask has shape"),
        (randn(2, 4, 5, 8), randn(2, 4, 9, 8), {"causal": "up"}, ValueError, "causal is 'up'"),
        (randn(2, 4, 5, 8), randn(2, 4, 9, 8), {"scale": math.nan}, ValueError, "scale is -?nan"),
        (randn(2, 4, 5, 8), None, {}, TypeError, "k is a NoneType"),
        (randn(2, 4, 5, 8).long(), randn(2, 4, 9, 8).long(), {}, TypeError, "q is torch.int64"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_weights_errors(q: Any, k: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^fastattn: {message}"):
        fastattn.attention_weights(q, k, **options)


# --- merge_attention_states ------------------------------------------------------------------------------------------


def states(q: Tensor, k: Tensor, v: Tensor, sizes: list[int], **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Attention over pieces of the keys. A mask in the options is cut with them."""
    mask = options.pop("mask", None)
    masks = [None] * len(sizes) if mask is None else mask.split(sizes, dim=-1)
    pieces = zip(k.split(sizes, dim=2), v.split(sizes, dim=2), masks, strict=True)
    results = [fastattn.attention(q, ki, vi, mask=mi, return_lse=True, **options) for ki, vi, mi in pieces]
    return [o for o, _ in results], [lse for _, lse in results]


@pytest.mark.parametrize("sizes", [[30], [1, 29], [10, 20], [7, 0, 5, 18]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge_equals_attention_over_all_keys(dtype: torch.dtype, sizes: list[int]) -> None:
    q, k, v = randn(2, 4, 6, 8, dtype=dtype), randn(2, 2, 30, 8, dtype=dtype), randn(2, 2, 30, 5, dtype=dtype)
    outs, lses = states(q, k, v, sizes)
    expected, expected_lse = fastattn.attention(q, k, v, return_lse=True)
    tolerance = 4 * torch.finfo(dtype).eps
    for given in ((outs, lses), (tuple(outs), iter(lses)), (torch.stack(outs), torch.stack(lses))):
        o, lse = fastattn.merge_attention_states(*given)
        assert o.dtype == dtype
        assert lse.dtype == expected_lse.dtype
        torch.testing.assert_close(o, expected, atol=tolerance, rtol=tolerance)
        # The bfloat16 kernel takes exponentials, and with them its lse, to 16 bits and a few more.
        close = {"atol": 2e-4, "rtol": 0.0} if dtype.itemsize == 2 else {}
        torch.testing.assert_close(lse, expected_lse, **close)


def test_merge_of_rows_without_a_key() -> None:
    """In one piece, in all pieces; NaN in an output without weight stays out."""
    q, k, v = (randn(1, 2, n, 8).requires_grad_() for n in (4, 10, 10))
    mask = torch.ones(4, 10, dtype=torch.bool)
    mask[1, :6] = False
    mask[2] = False
    mask[3, 6:] = False
    outs, lses = states(q, k, v, [6, 4], mask=mask)
    expected, expected_lse = fastattn.attention(q, k, v, mask=mask, return_lse=True)
    o, lse = fastattn.merge_attention_states(outs, lses)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(lse, expected_lse)
    assert (lse[:, :, 2] == -math.inf).all()
    upstream = randn(*o.shape)
    for wanted in (q, k, v):
        for loss in (lambda o, lse: (o * upstream).sum(), lambda o, lse: lse[:, :, [0, 1, 3]].sum()):
            fast, exact = (
                torch.autograd.grad(loss(*pair), wanted, retain_graph=True, allow_unused=True, materialize_grads=True)[
                    0
                ]
                for pair in ((o, lse), (expected, expected_lse))
            )
            torch.testing.assert_close(fast, exact)

    outs[0] = outs[0].detach().masked_fill((lses[0] == -math.inf).unsqueeze(-1), math.nan)
    torch.testing.assert_close(fastattn.merge_attention_states(outs, lses)[0], expected)


def test_merge_of_nothing_but_empty_pieces() -> None:
    outs, lses = [torch.zeros(2, 3, 4).requires_grad_() for _ in range(2)], [torch.full((2, 3), -math.inf)] * 2
    o, lse = fastattn.merge_attention_states(outs, lses)
    assert not o.any()
    assert (lse == -math.inf).all()
    assert not torch.autograd.grad(o.sum(), outs[0])[0].any()


def test_merge_is_stable_for_large_scores() -> None:
    outs = [torch.full((1, 1, 1), value, dtype=torch.float64) for value in (1.0, 3.0)]
    lses = [torch.full((1, 1), 1e5, dtype=torch.float64)] * 2
    o, lse = fastattn.merge_attention_states(outs, lses)
    torch.testing.assert_close(o.item(), 2.0)
    torch.testing.assert_close(lse.item(), 1e5 + math.log(2))


def test_merge_with_a_sink_in_one_piece() -> None:
    q, k, v, sinks = randn(1, 2, 4, 8), randn(1, 2, 10, 8), randn(1, 2, 10, 8), randn(2)
    first = fastattn.attention(q, k[:, :, :6], v[:, :, :6], sinks=sinks, return_lse=True)
    second = fastattn.attention(q, k[:, :, 6:], v[:, :, 6:], return_lse=True)
    o, lse = fastattn.merge_attention_states(*zip(first, second, strict=True))
    expected, expected_lse = fastattn.attention(q, k, v, sinks=sinks, return_lse=True)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(lse, expected_lse)


def test_merge_of_packed_states() -> None:
    """Any leading dimensions do: here (H, total)."""
    outs, lses = [randn(3, 11, 4) for _ in range(2)], [randn(3, 11) for _ in range(2)]
    o, lse = fastattn.merge_attention_states(outs, lses)
    shares = torch.softmax(torch.stack(lses), 0).unsqueeze(-1)
    torch.testing.assert_close(o, (shares * torch.stack(outs)).sum(0))
    torch.testing.assert_close(lse, torch.logaddexp(*lses))


def test_merge_gradients() -> None:
    outs = [randn(2, 3, 4).requires_grad_() for _ in range(3)]
    lses = [randn(2, 3).requires_grad_() for _ in range(3)]

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return fastattn.merge_attention_states(tensors[:3], tensors[3:])

    assert torch.autograd.gradcheck(function, (*outs, *lses))
    assert torch.autograd.gradgradcheck(function, (*outs, *lses), fast_mode=True)


def test_merge_compiles() -> None:
    torch._dynamo.reset()
    outs, lses = [randn(2, 3, 4) for _ in range(2)], [randn(2, 3) for _ in range(2)]
    compiled = torch.compile(fastattn.merge_attention_states, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(outs, lses), fastattn.merge_attention_states(outs, lses))


OUT, LSE = torch.zeros(2, 3, 4), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("outs", "lses", "error", "message"),
    [
        ([], [], ValueError, "outs is empty"),
        ([OUT, OUT], [LSE], ValueError, "there are 2 outs but 1 lses"),
        ([OUT, OUT[:1]], [LSE, LSE[:1]], ValueError, r"outs\[1\] has shape \(1, 3, 4\) and outs\[0\] \(2, 3, 4\)"),
        (
            [OUT],
            [LSE[:1]],
            ValueError,
            r"lses\[0\] has shape \(1, 3\) but outs\[0\] has \(2, 3, 4\).*dimension, \(2, 3\)",
        ),
        ([torch.tensor(1.0)], [torch.tensor(1.0)], ValueError, r"outs\[0\] has shape \(\)"),
        (torch.tensor(1.0), [LSE], ValueError, "outs has no dimensions"),
        ([OUT, OUT.to("meta")], [LSE, LSE], ValueError, r"outs\[1\] is on meta"),
        ([OUT], [LSE.to("meta")], ValueError, r"lses\[0\] is on meta but outs\[0\] is on cpu"),
        ([OUT, OUT.half()], [LSE, LSE], TypeError, r"outs\[1\] is torch.float16 but outs\[0\] is torch.float32"),
        ([OUT.long()], [LSE], TypeError, r"outs\[0\] is torch.int64"),
        ([OUT], [LSE.bool()], TypeError, r"lses\[0\] is torch.bool"),
        ([OUT, None], [LSE, LSE], TypeError, r"outs\[1\] is a NoneType"),
        (3, [LSE], TypeError, "outs is a int"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_merge_errors(outs: Any, lses: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^fastattn: {message}"):
        fastattn.merge_attention_states(outs, lses)
