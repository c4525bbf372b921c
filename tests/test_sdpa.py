"""scaled_dot_product_attention against PyTorch's own, and what replacing PyTorch's does to its callers."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn

sdpa = fastattn.scaled_dot_product_attention
torch_sdpa = F.scaled_dot_product_attention

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(autouse=True)
def _seed_and_counters() -> Iterator[None]:
    torch.manual_seed(0)
    fastattn.sdpa_calls(reset=True)
    yield
    assert F.scaled_dot_product_attention is torch_sdpa, "a test left the replacement in place"


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def assert_as_exact(fast: Tensor, torchs: Tensor, exact: Tensor, what: str) -> None:
    """fast is at most twice as far from the exact values as PyTorch's result in the same dtype, or a few roundings."""
    assert fast.shape == torchs.shape == exact.shape, what
    assert fast.dtype == torchs.dtype, what
    if fast.numel() == 0:
        return
    error, allowed = ((x.double() - exact).abs().max().item() for x in (fast, torchs))
    allowed = 2 * allowed + 8 * torch.finfo(fast.dtype).eps * max(1.0, exact.abs().max().item())
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def compare(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> None:
    """Output and all gradients against PyTorch's function, in the inputs' dtype and, as the exact values, in float64.

    A mask together with is_causal is given to PyTorch as one mask: it does not take both in all shapes.
    """

    def run(function: Any, dtype: torch.dtype | None) -> dict[str, Tensor]:
        def leaf(x: Tensor | None) -> Tensor | None:
            if x is None or not x.is_floating_point():
                return x
            x = x.detach() if dtype is None else x.detach().to(dtype)
            return x.requires_grad_()

        q, k, v, mask = (leaf(x) for x in (query, key, value, attn_mask))
        arguments, given = dict(options), mask
        if function is torch_sdpa and mask is not None and options.get("is_causal"):
            visible = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
            given = mask & visible if mask.dtype == torch.bool else mask.masked_fill(~visible, -math.inf)
            arguments["is_causal"] = False
        o = function(q, k, v, given, **arguments)
        upstream = torch.linspace(-1, 1, o.numel(), dtype=torch.float64).sin().reshape(o.shape).to(o.dtype)
        leaves = {"q": q, "k": k, "v": v} | ({"mask": mask} if mask is not None and mask.requires_grad else {})
        grads = torch.autograd.grad(o, list(leaves.values()), upstream)
        return {"o": o.detach()} | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}

    fast, torchs, exact = run(sdpa, None), run(torch_sdpa, None), run(torch_sdpa, torch.float64)
    for name in exact:
        assert_as_exact(fast[name], torchs[name], exact[name], name)
    with torch.no_grad():
        assert_as_exact(sdpa(query, key, value, attn_mask, **options), torchs["o"], exact["o"], "o without gradients")


# --- Values: shapes, masks, options ----------------------------------------------------------------------------------

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Shapes:
    query: Shape
    key: Shape
    value: Shape
    mask: Shape | None = None
    enable_gqa: bool = False

    @property
    def id(self) -> str:
        shapes = [self.query, self.key, self.value] + ([self.mask] if self.mask is not None else [])
        return "-".join("x".join(map(str, shape)) for shape in shapes) + ("-gqa" if self.enable_gqa else "")


SHAPES = [
    Shapes((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
    Shapes((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4)),
    # fewer dimensions
    Shapes((5, 8), (7, 8), (7, 8)),
    Shapes((5, 8), (7, 8), (7, 4), mask=(5, 7)),
    Shapes((3, 5, 8), (3, 7, 8), (3, 7, 8)),
    Shapes((3, 5, 8), (3, 7, 8), (3, 7, 8), mask=(3, 5, 7)),
    Shapes((3, 5, 8), (3, 7, 8), (3, 7, 8), mask=(1, 7)),
    # more
    Shapes((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 6)),
    Shapes((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 8), mask=(3, 1, 5, 7)),
    Shapes((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 8), mask=(2, 1, 1, 1, 7)),
    Shapes((2, 1, 3, 4, 5, 8), (2, 2, 3, 4, 7, 8), (2, 2, 3, 4, 7, 8)),
    # broadcast batch dimensions and heads
    Shapes((2, 3, 5, 8), (1, 3, 7, 8), (1, 3, 7, 8)),
    Shapes((1, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
    Shapes((2, 3, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)),
    Shapes((2, 1, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
    Shapes((2, 3, 5, 8), (2, 3, 7, 8), (1, 1, 7, 8)),
    Shapes((1, 1, 5, 8), (1, 1, 7, 8), (2, 3, 7, 8)),
    Shapes((3, 5, 8), (1, 7, 8), (1, 7, 8)),
    Shapes((3, 1, 4, 5, 8), (1, 2, 1, 7, 8), (2, 4, 7, 8)),
    # different numbers of dimensions
    Shapes((2, 3, 5, 8), (3, 7, 8), (3, 7, 8)),
    Shapes((2, 3, 5, 8), (7, 8), (7, 8)),
    Shapes((5, 8), (2, 7, 8), (7, 8)),
    Shapes((5, 8), (7, 8), (2, 2, 7, 8)),
    # every mask that broadcasts
    *(
        Shapes((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), mask=mask)
        for mask in [(5, 7), (5, 1), (1, 7), (1, 5, 7), (3, 5, 7), (3, 1, 1), (2, 1, 5, 7), (2, 3, 5, 7), (1, 1, 1, 1)]
    ),
    # shared key heads
    Shapes((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8), enable_gqa=True),
    Shapes((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6), mask=(4, 5, 7), enable_gqa=True),
    Shapes((2, 4, 5, 8), (2, 2, 7, 8), (2, 1, 7, 8), enable_gqa=True),
    Shapes((2, 4, 5, 8), (2, 1, 7, 8), (2, 2, 7, 8), enable_gqa=True),
    Shapes((2, 6, 5, 8), (2, 2, 7, 8), (2, 3, 7, 8), enable_gqa=True),
    Shapes((2, 4, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8), enable_gqa=True),
    Shapes((2, 4, 5, 8), (2, 7, 8), (2, 7, 8), enable_gqa=True),
    Shapes((4, 5, 8), (2, 7, 8), (2, 7, 8), enable_gqa=True),
    Shapes((3, 2, 4, 5, 8), (3, 2, 2, 7, 8), (3, 2, 2, 7, 8), enable_gqa=True),
    # nothing there
    Shapes((2, 3, 0, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
    Shapes((2, 3, 5, 8), (2, 3, 0, 8), (2, 3, 0, 8)),
    Shapes((5, 8), (0, 8), (0, 8)),
    Shapes((0, 3, 5, 8), (0, 3, 7, 8), (0, 3, 7, 8)),
    Shapes((2, 0, 5, 8), (2, 0, 7, 8), (2, 0, 7, 8)),
    Shapes((2, 0, 3, 5, 8), (2, 0, 3, 7, 8), (2, 0, 3, 7, 8)),
]


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("shapes", "mask_dtype"),
    [
        pytest.param(shapes, dtype, id=f"{shapes.id}-{str(dtype).removeprefix('torch.')}")
        for shapes in SHAPES
        for dtype in ([None] if shapes.mask is None else [torch.bool, torch.float32])
    ],
)
def test_shapes(shapes: Shapes, mask_dtype: torch.dtype | None, is_causal: bool) -> None:
    mask = None
    if shapes.mask is not None:
        mask = randn(*shapes.mask)
        mask = mask > -0.5 if mask_dtype == torch.bool else mask
    tensors = (randn(*shapes.query), randn(*shapes.key), randn(*shapes.value))
    compare(*tensors, mask, is_causal=is_causal, enable_gqa=shapes.enable_gqa)


@pytest.mark.parametrize("mask_dtype", [None, torch.bool, torch.float32, "own"], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype, mask_dtype: Any) -> None:
    mask = None
    if mask_dtype is not None:
        mask = randn(2, 1, 33, 40)
        mask = mask > -0.5 if mask_dtype is torch.bool else mask.to(dtype if mask_dtype == "own" else mask_dtype)
    compare(randn(2, 4, 33, 16, dtype=dtype), *(randn(2, 4, 40, 16, dtype=dtype) for _ in range(2)), mask)


@pytest.mark.parametrize("Lq", [1, 40, 63, 64, 65, 200])
def test_causal_is_top_left_aligned(Lq: int) -> None:
    compare(randn(1, 2, Lq, 8), randn(1, 2, 64, 8), randn(1, 2, 64, 8), is_causal=True)


@pytest.mark.parametrize("scale", [0.0, -0.3, 2, 1e-3])
@pytest.mark.parametrize("rank", [2, 3, 4])
def test_scale(scale: float, rank: int) -> None:
    lead = (2, 3)[: rank - 2]
    compare(randn(*lead, 5, 8), randn(*lead, 7, 8), randn(*lead, 7, 8), scale=scale)


@pytest.mark.parametrize("hidden", [-math.inf, -1e9, torch.finfo(torch.float32).min], ids=str)
@pytest.mark.parametrize("rank", [3, 4])
def test_wholly_masked_rows(hidden: float, rank: int) -> None:
    """-inf: the row is 0, and so are its gradients. A finite value: a uniform row, and the gradients of that."""
    lead = (2, 3)[: rank - 2]
    query, key, value = (randn(*lead, length, 8).requires_grad_() for length in (5, 7, 7))
    mask = torch.zeros(5, 7)
    mask[1] = hidden
    o = sdpa(query, key, value, mask)[..., 1, :]
    dq, dk, dv = torch.autograd.grad(o.sum(), (query, key, value))
    if hidden == -math.inf:
        for x in (o, dq, dk, dv):
            assert not x.any()
        return
    p = 1 / 7
    dp = value.detach().sum(-1)
    ds = p * (dp - dp.mean(-1, keepdim=True)) / math.sqrt(8)
    torch.testing.assert_close(o, value.mean(-2))
    torch.testing.assert_close(dv, torch.full_like(dv, p))
    torch.testing.assert_close(dq[..., 1, :], (ds.unsqueeze(-1) * key).sum(-2))
    torch.testing.assert_close(dk, ds.unsqueeze(-1) * query[..., 1:2, :])


def test_mask_and_causal_both_apply_in_every_shape() -> None:
    """PyTorch combines them on its fast CPU path, and raises on its other one."""
    for shapes in ((3, 5, 8), (2, 3, 5, 8)):
        x = randn(*shapes)
        keep = randn(5, 5) > -0.5
        expected = torch_sdpa(x, x, x, keep.tril())
        torch.testing.assert_close(sdpa(x, x, x, keep, is_causal=True), expected)


@pytest.mark.parametrize("mask_shape", [(), (7,)], ids=str)
def test_masks_of_fewer_than_two_dimensions(mask_shape: Shape) -> None:
    """PyTorch raises IndexError for these, though they broadcast."""
    query, key, value, mask = randn(2, 3, 5, 8), randn(2, 3, 7, 8), randn(2, 3, 7, 8), randn(*mask_shape)
    torch.testing.assert_close(sdpa(query, key, value, mask), torch_sdpa(query, key, value, mask.expand(5, 7)))


@pytest.mark.parametrize("layout", ["blhd", "packed", "last_dim_strided", "expanded"])
def test_strided_inputs(layout: str) -> None:
    if layout == "blhd":
        query, key, value = (randn(2, length, 3, 8).transpose(1, 2) for length in (5, 7, 7))
    elif layout == "packed":
        query, key, value = randn(2, 5, 3, 3, 8).permute(3, 0, 2, 1, 4)
    elif layout == "last_dim_strided":
        query, key, value = randn(2, 3, 8, 5).mT, randn(2, 3, 8, 7).mT, randn(2, 3, 14, 8)[:, :, ::2]
    else:
        query, key, value = randn(1, 3, 5, 8).expand(2, -1, -1, -1), *(randn(2, 1, 7, 8).expand(-1, 3, -1, -1),) * 2
    compare(query, key, value, is_causal=True)


def test_fewer_dimensions_are_views() -> None:
    """2-d to 4-d inputs and broadcast ones reach the operator without a copy."""
    seen: list[Tensor] = []
    original = fastattn._ops.attention

    def spy(*args: Any) -> Any:
        seen.extend(args[:3])
        return original(*args)

    cases = [((5, 8), (7, 8)), ((3, 5, 8), (1, 7, 8)), ((2, 3, 5, 8), (1, 1, 7, 8)), ((2, 3, 5, 8), (2, 3, 7, 8))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastattn._ops, "attention", spy)
        for query_shape, key_shape in cases:
            inputs = [randn(*query_shape), randn(*key_shape), randn(*key_shape)]
            seen.clear()
            sdpa(*inputs)
            assert [x.data_ptr() for x in seen] == [x.data_ptr() for x in inputs]
            assert all(x.dim() == 4 for x in seen)


# --- Dropout ---------------------------------------------------------------------------------------------------------


def test_dropout_is_applied_whenever_asked_for() -> None:
    """With value = identity the output is the weights: each is 0 or its undropped value / (1 - p)."""
    query, key = randn(1, 2, 256, 8), randn(1, 2, 64, 8)
    value = torch.eye(64).expand(1, 2, 64, 64)
    weights = sdpa(query, key, value)
    with torch.no_grad():
        dropped = sdpa(query, key, value, dropout_p=0.25)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], weights[kept] / 0.75)
    n = kept.numel()
    assert abs(kept.float().mean().item() - 0.75) < 5 * math.sqrt(0.25 * 0.75 / n)


def test_dropout_follows_the_seed() -> None:
    x = randn(2, 3, 16, 8)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return sdpa(x, x, x, dropout_p=0.5)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    torch.manual_seed(1)
    assert not torch.equal(sdpa(x, x, x, dropout_p=0.5), sdpa(x, x, x, dropout_p=0.5))


@pytest.mark.parametrize("shape", [(6, 8), (3, 6, 8), (2, 3, 6, 8), (2, 2, 3, 6, 8)], ids=str)
def test_dropout_1_gives_0(shape: Shape) -> None:
    x = randn(*shape).requires_grad_()
    o = sdpa(x, x, x, dropout_p=1.0)
    assert not o.any()
    assert not torch.autograd.grad(o.sum(), x)[0].any()


def test_dropout_gradient_uses_the_same_mask() -> None:
    query, key = randn(1, 1, 16, 8), randn(1, 1, 12, 8)
    value = torch.eye(12).expand(1, 1, 12, 12).clone().requires_grad_()
    o = sdpa(query, key, value, dropout_p=0.5)  # = the dropped weights
    (dv,) = torch.autograd.grad(o.sum(), value)
    torch.testing.assert_close(dv, o.detach().sum(-2).unsqueeze(-1).expand_as(dv))


# --- Gradients beyond the first, autocast, inference mode ------------------------------------------------------------


def test_gradcheck() -> None:
    query, key, value = (randn(1, 2, n, 3, dtype=torch.float64).requires_grad_() for n in (3, 4, 4))
    mask = randn(2, 1, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: sdpa(*x, is_causal=True), (query, key, value, mask))
    assert torch.autograd.gradgradcheck(sdpa, (query, key, value, mask), fast_mode=True)
    flat = [x[0].detach().requires_grad_() for x in (query, key[:, :1], value[:, :1])]
    assert torch.autograd.gradcheck(sdpa, flat)


def test_gradients_of_only_some_inputs() -> None:
    tensors = [randn(1, 2, 5, 8) for _ in range(3)] + [randn(5, 5)]
    for wanted in range(4):
        inputs = [x.clone().requires_grad_(i == wanted) for i, x in enumerate(tensors)]
        (fast,) = torch.autograd.grad(sdpa(*inputs).square().sum(), inputs[wanted])
        (expected,) = torch.autograd.grad(torch_sdpa(*inputs).square().sum(), inputs[wanted])
        torch.testing.assert_close(fast, expected)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("dtype", "mask_dtype"),
    [
        (dtype, mask)
        for dtype in DTYPES
        for mask in (None, torch.bool, torch.float32)
        # PyTorch casts a float32 mask and not a float64 query, and then refuses the pair.
        if not (dtype == torch.float64 and mask == torch.float32)
    ],
    ids=str,
)
@pytest.mark.parametrize("rank", [3, 4])
def test_autocast(autocast: torch.dtype, dtype: torch.dtype, mask_dtype: torch.dtype | None, rank: int) -> None:
    tensors = [randn(*(2, 3, length, 8)[4 - rank :], dtype=dtype).requires_grad_() for length in (5, 7, 7)]
    mask = None if mask_dtype is None else torch.ones(5, 7).tril().to(mask_dtype)
    with torch.autocast("cpu", dtype=autocast):
        fast, expected = sdpa(*tensors, mask), torch_sdpa(*tensors, mask)
    assert fast.dtype == expected.dtype
    torch.testing.assert_close(fast, expected, atol=2e-2, rtol=2e-2)
    (dq,) = torch.autograd.grad(fast.sum(), tensors[0])
    assert dq.dtype == dtype


def test_autocast_mixed_dtypes() -> None:
    x = randn(1, 2, 5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sdpa(x, x.bfloat16(), x.half()).dtype == torch.bfloat16


def test_inference_mode_and_no_grad() -> None:
    x = randn(2, 3, 5, 8).requires_grad_()
    expected = torch_sdpa(x, x, x).detach()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            o = sdpa(x, x, x)
        assert not o.requires_grad
        torch.testing.assert_close(o.clone(), expected)


# --- Errors ----------------------------------------------------------------------------------------------------------

Q, K, V = (2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8)


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ((Q, (2, 2, 7, 8), (2, 2, 7, 8)), {}, r"head counts \(dimension -3\).*\(4,\), \(2,\), \(2,\).*enable_gqa=True"),
        (
            (Q, (2, 3, 7, 8), (2, 3, 7, 8)),
            {"enable_gqa": True},
            "key has 3 heads but query has 4; query's heads must be",
        ),
        ((Q, (2, 2, 7, 8), (2, 3, 7, 8)), {"enable_gqa": True}, "value has 3 heads but query has 4"),
        ((Q, (2, 8, 7, 8), (2, 8, 7, 8)), {"enable_gqa": True}, "key has 8 heads but query has 4"),
        ((Q, (2, 0, 7, 8), (2, 0, 7, 8)), {"enable_gqa": True}, "key has 0 heads but query has 4"),
        ((Q, (3, 4, 7, 8), (3, 4, 7, 8)), {}, r"batch dimensions of query, key and value are \(2,\), \(3,\), \(3,\)"),
        (((3, 5, 8), (2, 7, 8), (2, 7, 8)), {}, "head counts"),
        ((Q, K, (2, 4, 6, 8)), {}, "value has length 6 but key has 7"),
        ((Q, (2, 4, 7, 9), V), {}, "key has head dimension 9 but query has 8"),
        (((5, 8), (7, 9), (7, 8)), {}, "key has head dimension 9 but query has 8"),
        (((2, 4, 5, 0), (2, 4, 7, 0), V), {}, "query and key have head dimension 0"),
        (((8,), (7, 8), (7, 8)), {}, r"shapes \(8,\), \(7, 8\) and \(7, 8\); each needs at least two dimensions"),
        (
            ((5, 8), (7, 8), (7, 8)),
            {"enable_gqa": True},
            r"each needs at least three dimensions, \(H, L, D\), with enable",
        ),
        ((Q, K, V, (5, 6)), {}, r"attn_mask has shape \(1, 1, 5, 6\), which does not broadcast to .*\(2, 4, 5, 7\)"),
        ((Q, K, V, (3, 1, 5, 7)), {}, r"attn_mask has shape \(3, 1, 5, 7\), which does not broadcast"),
        (((1, 4, 5, 8), (1, 4, 7, 8), (1, 4, 7, 8), (3, 1, 5, 7)), {}, r"attn_mask has shape \(3, 1, 5, 7\)"),
        ((Q, K, V, (1, 2, 4, 5, 7)), {}, r"attn_mask has shape \(1, 2, 4, 5, 7\), which does not broadcast"),
        (((5, 8), (7, 8), (7, 8), (3, 5, 7)), {}, r"attn_mask has 3 dimensions, shape \(3, 5, 7\), but query"),
        (
            ((2, 1, *Q[1:]), (2, 1, *K[1:]), (2, 1, *V[1:]), (2, 3, 1, 5, 7)),
            {},
            r"attn_mask has shape .*batch dimensions",
        ),
        ((Q, K, V), {"dropout_p": -0.1}, r"dropout_p is -0.1; it is a probability and must lie in \[0, 1\]"),
        ((Q, K, V), {"dropout_p": 1.5}, "dropout_p is 1.5"),
        ((Q, K, V), {"dropout_p": math.nan}, "dropout_p is -?nan"),
        ((Q, K, V), {"scale": math.inf}, "scale is inf; it must be finite"),
        ((Q, K, V), {"scale": math.nan}, "scale is -?nan; it must be finite"),
    ],
    ids=lambda x: str(x).replace(" ", "") if isinstance(x, tuple) else "",
)
def test_value_errors(shapes: tuple[Shape, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        sdpa(*(randn(*shape) for shape in shapes), **options)
    assert str(caught.value).startswith("fastattn: ")
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"query": "text"}, "query is a str; it must be a torch.Tensor"),
        ({"query": None}, "query is a NoneType; it must be a torch.Tensor"),
        ({"key": [1.0]}, "key is a list; it must be a torch.Tensor"),
        ({"value": 1.0}, "value is a float; it must be a torch.Tensor"),
        ({"attn_mask": [[True]]}, "attn_mask is a list; it must be a torch.Tensor"),
        ({"dropout_p": "0.1"}, "dropout_p is a str; it must be a float"),
        ({"scale": "1"}, "scale is a str; it must be a float"),
        ({"is_causal": 1}, "is_causal is 1; it must be True or False"),
        ({"is_causal": None}, "is_causal is None; it must be True or False"),
        ({"key": torch.ones(2, 4, 7, 8, dtype=torch.bfloat16)}, "key is torch.bfloat16 but query is torch.float32"),
        (
            dict.fromkeys(("query", "key", "value"), torch.ones(2, 4, 7, 8).long()),
            "query is torch.int64; attention takes",
        ),
        ({"attn_mask": torch.ones(5, 7).double()}, "attn_mask is torch.float64 but query is torch.float32"),
        ({"attn_mask": torch.ones(5, 7).half()}, "attn_mask is torch.float16 but query is torch.float32"),
        ({"attn_mask": torch.ones(5, 7).int()}, "attn_mask is torch.int32 .*must be torch.bool, True where"),
        ({"query": torch.ones(2, 4, 5, 8).to_sparse()}, "query has layout torch.sparse_coo"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_type_errors(replaced: dict[str, Any], message: str) -> None:
    arguments = {"query": randn(*Q), "key": randn(*K), "value": randn(*V)} | replaced
    with pytest.raises(TypeError, match=message) as caught:
        sdpa(**arguments)
    assert str(caught.value).startswith("fastattn: ")


def test_devices_must_be_the_same() -> None:
    with pytest.raises(ValueError, match=r"key is on meta"):
        sdpa(randn(*Q), torch.ones(K, device="meta"), randn(*V))


# --- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_compiles_without_a_break(rank: int, dynamic: bool) -> None:
    def step(x: Tensor, mask: Tensor) -> Tensor:
        return sdpa(x * 2, x, x, mask, scale=0.3).sin()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for length in (6, 9):
        x, mask = randn(*(2, 2, 3, length, 8)[5 - rank :]).requires_grad_(), randn(length, length)
        expected = step(x, mask)
        o = compiled(x, mask)
        torch.testing.assert_close(o, expected)
        grads = [torch.autograd.grad(y.sum(), x)[0] for y in (o, expected)]
        torch.testing.assert_close(*grads)


@pytest.mark.slow
def test_compiles_with_inductor() -> None:
    def step(x: Tensor) -> Tensor:
        q, k, v = x.unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return sdpa(q, k, v, is_causal=True).transpose(1, 2).flatten(2) + 1

    x = randn(2, 9, 96).requires_grad_()
    expected, o = step(x), torch.compile(step, fullgraph=True)(x)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(torch.autograd.grad(o.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0])


# --- The switch ------------------------------------------------------------------------------------------------------


def is_replaced() -> bool:
    return F.scaled_dot_product_attention is not torch_sdpa


def test_replace_and_restore() -> None:
    x = randn(2, 3, 5, 8)
    expected = torch_sdpa(x, x, x)
    fastattn.replace_sdpa()
    try:
        assert is_replaced()
        fastattn.replace_sdpa()
        torch.testing.assert_close(F.scaled_dot_product_attention(x, x, x), expected)
        assert fastattn.sdpa_calls().served == 1
    finally:
        fastattn.restore_sdpa()
    assert not is_replaced()
    fastattn.restore_sdpa()
    assert F.scaled_dot_product_attention is torch_sdpa
    F.scaled_dot_product_attention(x, x, x)
    assert fastattn.sdpa_calls(reset=True).served == 1
    assert fastattn.sdpa_calls() == fastattn.SdpaCalls(0, {})


def test_blocks_nest_and_survive_exceptions() -> None:
    with fastattn.replaced_sdpa():
        with fastattn.replaced_sdpa():
            assert is_replaced()
        assert is_replaced()
    assert not is_replaced()
    with pytest.raises(KeyError), fastattn.replaced_sdpa():
        raise KeyError
    assert not is_replaced()


def test_blocks_within_replace_and_restore() -> None:
    fastattn.replace_sdpa()
    with fastattn.replaced_sdpa():
        fastattn.restore_sdpa()
        assert is_replaced(), "restore_sdpa must not end somebody's block"
    assert not is_replaced()
    with fastattn.replaced_sdpa():
        fastattn.replace_sdpa()
    assert is_replaced(), "the end of a block must not undo replace_sdpa"
    fastattn.restore_sdpa()
    assert not is_replaced()


def test_what_is_restored_is_what_was_there() -> None:
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        return torch_sdpa(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", wrapper)
        with fastattn.replaced_sdpa():
            assert F.scaled_dot_product_attention is not wrapper
        assert F.scaled_dot_product_attention is wrapper


def test_a_wrapper_put_around_the_replacement_stays_and_works() -> None:
    x, y = randn(1, 2, 5, 8), torch.ones(1, 2, 5, 8, device="meta")
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        fastattn.replace_sdpa()
        inner = F.scaled_dot_product_attention

        def wrapper(*args: Any, **kwargs: Any) -> Tensor:
            calls.append(1)
            return inner(*args, **kwargs)

        patch.setattr(F, "scaled_dot_product_attention", wrapper)
        fastattn.restore_sdpa()
        assert F.scaled_dot_product_attention is wrapper
        F.scaled_dot_product_attention(x, x, x)
        assert calls == [1]
        assert fastattn.sdpa_calls().served == 0
        with fastattn.replaced_sdpa():
            F.scaled_dot_product_attention(x, x, x)
            with pytest.warns(UserWarning, match="neither all on the CPU"):
                F.scaled_dot_product_attention(y, y, y)
        assert calls == [1] * 3
        assert fastattn.sdpa_calls() == fastattn.SdpaCalls(
            1, {"tensors that are neither all on the CPU nor all on CUDA": 1}
        )
    F.scaled_dot_product_attention = torch_sdpa  # the wrapper's owner is gone
    fastattn.sdpa_calls(reset=True)
    test_replace_and_restore()


def test_a_reference_taken_while_replaced_obeys_the_switch() -> None:
    x = randn(1, 2, 5, 8)
    with fastattn.replaced_sdpa():
        taken = F.scaled_dot_product_attention
    torch.testing.assert_close(taken(x, x, x), torch_sdpa(x, x, x))
    assert fastattn.sdpa_calls().served == 0
    with fastattn.replaced_sdpa():
        taken(x, x, x)
    assert fastattn.sdpa_calls().served == 1


def test_threads_count_exactly_and_leave_nothing_behind() -> None:
    x = randn(1, 1, 2, 4)
    start = threading.Barrier(4)
    failures = []

    def work() -> None:
        start.wait()
        for _ in range(100):
            with fastattn.replaced_sdpa():
                if not is_replaced():
                    failures.append("not replaced within a block")
                F.scaled_dot_product_attention(x, x, x)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert not is_replaced()
    assert fastattn.sdpa_calls().served == 400


class TestHandedBack:
    """What fastattn cannot serve: the result is PyTorch's, the reason is counted, and its first call warns."""

    @pytest.fixture(autouse=True)
    def _replaced(self) -> Iterator[None]:
        with fastattn.replaced_sdpa():
            yield

    def check(self, reason: str, call: Any) -> Any:
        with pytest.warns(UserWarning, match=f"handed back to PyTorch: .*{reason}"):
            result = call()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*handed back")
            call()
        calls = fastattn.sdpa_calls()
        assert calls.served == 0
        assert list(calls.handed_back.values()) == [2]
        (counted,) = calls.handed_back
        assert reason in counted
        assert f"{counted}: 2" in str(calls)
        return result

    def test_meta(self) -> None:
        x = torch.ones(2, 3, 5, 8, device="meta")
        assert self.check("neither all on the CPU", lambda: F.scaled_dot_product_attention(x, x, x)).is_meta

    def test_dtype(self) -> None:
        x = torch.randn(2, 3, 5, 8, dtype=torch.complex64)

        def call() -> None:
            with pytest.raises(NotImplementedError):
                F.scaled_dot_product_attention(x, x, x)

        self.check("dtype torch.complex64", call)

    def test_sparse(self) -> None:
        x, y = randn(5, 8), randn(7, 8)
        o = self.check("strided", lambda: F.scaled_dot_product_attention(x.to_sparse(), y, y))
        torch.testing.assert_close(o, torch_sdpa(x, y, y))

    @pytest.mark.filterwarnings("ignore:.*prototype stage")
    def test_nested(self) -> None:
        strided = torch.nested.nested_tensor([randn(3, 2, 4), randn(3, 5, 4)])
        o = self.check("nested", lambda: F.scaled_dot_product_attention(strided, strided, strided))
        assert o.is_nested

    def test_jagged(self) -> None:
        jagged = torch.nested.nested_tensor([randn(3, 2, 4), randn(5, 2, 4)], layout=torch.jagged).transpose(1, 2)
        o = self.check("subclass", lambda: F.scaled_dot_product_attention(jagged, jagged, jagged))
        assert o.is_nested

    def test_subclasses_with_a_function_of_their_own(self) -> None:
        """They are asked for PyTorch's function, and find it in torch.nn.functional, where they may look it up."""

        class Doubling(Tensor):
            @classmethod
            def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if func is F.scaled_dot_product_attention:
                    args = [x.as_subclass(Tensor) if isinstance(x, Tensor) else x for x in args]
                    return 2 * F.scaled_dot_product_attention(*args, **(kwargs or {}))
                return super().__torch_function__(func, types, args, kwargs)

        x = randn(1, 2, 3, 8)
        y = x.as_subclass(Doubling)
        o = self.check("subclass", lambda: F.scaled_dot_product_attention(y, y, y))
        torch.testing.assert_close(o, 2 * torch_sdpa(x, x, x))
        assert is_replaced()

    def test_vmap(self) -> None:
        x = randn(6, 2, 3, 8)
        o = self.check("torch.func", lambda: torch.vmap(F.scaled_dot_product_attention)(x, x, x))
        torch.testing.assert_close(o, torch_sdpa(x, x, x))

    def test_functional_gradient(self) -> None:
        x = randn(2, 2, 3, 8)
        grad = self.check(
            "torch.func", lambda: torch.func.grad(lambda y: F.scaled_dot_product_attention(y, y, y).sum())(x)
        )
        y = x.clone().requires_grad_()
        torch.testing.assert_close(grad, torch.autograd.grad(torch_sdpa(y, y, y).sum(), y)[0])

    def test_forward_mode(self) -> None:
        x, tangent = randn(3, 8, dtype=torch.float64), randn(3, 8, dtype=torch.float64)

        def call() -> Tensor:
            with torch.autograd.forward_ad.dual_level():
                y = torch.autograd.forward_ad.make_dual(x, tangent)
                o = F.scaled_dot_product_attention(y, y, y)
                return torch.autograd.forward_ad.unpack_dual(o).tangent

        jvp = self.check("forward-mode", call)
        step = 1e-6
        ends = [torch_sdpa(y, y, y) for y in (x - step * tangent, x + step * tangent)]
        torch.testing.assert_close(jvp, (ends[1] - ends[0]) / (2 * step), atol=1e-8, rtol=1e-6)

    def test_refused_arguments_that_pytorch_takes(self) -> None:
        x = randn(1, 2, 5, 8)
        o = self.check("refuses", lambda: F.scaled_dot_product_attention(x, x, x, scale=math.inf))
        assert o.shape == x.shape

    def test_refused_arguments_raise_what_pytorch_raises(self) -> None:
        def call() -> None:
            with pytest.raises(RuntimeError, match="must match"):
                F.scaled_dot_product_attention(randn(2, 4, 5, 8), randn(2, 2, 5, 8), randn(2, 2, 5, 8))

        self.check("refuses", call)

    def test_too_few_dimensions(self) -> None:
        def call() -> None:
            with pytest.raises(RuntimeError, match="at least 2 dimensional"):
                F.scaled_dot_product_attention(randn(8), randn(8), randn(7))

        self.check("refuses", call)

    def test_a_read_beyond_the_value_is_not_handed_back(self) -> None:
        """PyTorch's CPU kernel does not compare the two lengths."""
        with pytest.raises(ValueError, match="value has length 6 but key has 7"):
            F.scaled_dot_product_attention(randn(1, 2, 5, 8), randn(1, 2, 7, 8), randn(1, 2, 6, 8))

    def test_fx_tracing_sees_pytorchs_function(self) -> None:
        class Module(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return F.scaled_dot_product_attention(x, x, x)

        graph = self.check("subclass", lambda: torch.fx.symbolic_trace(Module()))
        assert any(node.target is torch_sdpa for node in graph.graph.nodes)


class TestServed:
    """Callers of torch.nn.functional that must work as before, and be served."""

    @pytest.fixture(autouse=True)
    def _replaced(self) -> Iterator[None]:
        with fastattn.replaced_sdpa():
            yield
        assert fastattn.sdpa_calls().served > 0
        assert not fastattn.sdpa_calls().handed_back

    def test_signature(self) -> None:
        x = randn(2, 4, 5, 8)
        mask = torch.zeros(5, 5)
        o = F.scaled_dot_product_attention(query=x, key=x, value=x, attn_mask=mask, dropout_p=0.0, is_causal=True)
        torch.testing.assert_close(o, torch_sdpa(x, x, x, mask, 0.0, True))
        o = F.scaled_dot_product_attention(x, x[:, :2], x[:, :2], mask, 0.0, False, scale=0.2, enable_gqa=True)
        torch.testing.assert_close(o, torch_sdpa(x, x[:, :2], x[:, :2], mask, 0.0, False, scale=0.2, enable_gqa=True))
        with pytest.raises(TypeError):
            F.scaled_dot_product_attention(x, x, x, None, 0.0, False, 0.2)  # type: ignore[misc]

    @pytest.mark.parametrize("training", [True, False])
    def test_multihead_attention(self, training: bool) -> None:
        module = nn.MultiheadAttention(32, 4, batch_first=True).train(training)
        x = randn(2, 7, 32).requires_grad_()
        padding = torch.zeros(2, 7, dtype=torch.bool)
        padding[1, 5:] = True
        o, _ = module(x, x, x, key_padding_mask=padding, need_weights=False)
        assert fastattn.sdpa_calls().served == 1
        fastattn.restore_sdpa()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", torch_sdpa)
            expected, _ = module(x, x, x, key_padding_mask=padding, need_weights=False)
        torch.testing.assert_close(o, expected)
        torch.testing.assert_close(torch.autograd.grad(o.sum(), x), torch.autograd.grad(expected.sum(), x))

    def test_parameters(self) -> None:
        x = nn.Parameter(randn(1, 2, 5, 8))
        F.scaled_dot_product_attention(x, x, x, nn.Parameter(randn(5, 5)))

    @pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
    def test_causal_bias(self, compiled: bool) -> None:
        from torch.nn.attention.bias import causal_lower_right, causal_upper_left

        x, y = randn(1, 2, 3, 8), randn(1, 2, 5, 8)
        for bias, diagonal in ((causal_lower_right(3, 5), 2), (causal_upper_left(3, 5), 0)):

            def step(x: Tensor, y: Tensor, bias: Any = bias) -> Tensor:
                return F.scaled_dot_product_attention(x, y, y, bias)

            function = torch.compile(step, backend="eager", fullgraph=True) if compiled else step
            expected = torch_sdpa(x, y, y, torch.ones(3, 5, dtype=torch.bool).tril(diagonal))
            torch.testing.assert_close(function(x, y), expected)
        assert fastattn.sdpa_calls().served == 2

    def test_default_device(self) -> None:
        """torch.set_default_device installs a mode that sees every call of torch.nn.functional."""
        x = randn(1, 2, 5, 8)
        with torch.device("cpu"):
            torch.testing.assert_close(F.scaled_dot_product_attention(x, x, x), torch_sdpa(x, x, x))
        assert fastattn.sdpa_calls().served == 1

    def test_modes_see_the_call(self) -> None:
        seen = []

        class Mode(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                seen.append(func)
                return func(*args, **(kwargs or {}))

        x = randn(1, 2, 5, 8)
        with Mode():
            F.scaled_dot_product_attention(x, x, x, scale=0.5)
        assert seen.count(F.scaled_dot_product_attention) == 1

    def test_compile(self) -> None:
        def step(x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, is_causal=True) * 2

        compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
        x = randn(2, 3, 6, 8).requires_grad_()
        for _ in range(3):
            o = compiled(x)
        torch.testing.assert_close(o, 2 * torch_sdpa(x, x, x, is_causal=True))
        o.sum().backward()
        assert fastattn.sdpa_calls().served == 1, "a traced call counts once"
        assert "fastattn.attention_forward" in graph_of(step, x)

    def test_export(self) -> None:
        class Module(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return F.scaled_dot_product_attention(x, x, x)

        x = randn(1, 2, 5, 8)
        program = torch.export.export(Module(), (x,))
        assert "fastattn.attention_forward" in str(program.graph)
        torch.testing.assert_close(program.module()(x), torch_sdpa(x, x, x))

    def test_jit_trace(self) -> None:
        x, y = randn(1, 2, 5, 8), randn(1, 2, 9, 8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(lambda z: F.scaled_dot_product_attention(z, z, z), (x,))
        torch.testing.assert_close(traced(y), torch_sdpa(y, y, y))

    def test_checkpoint(self) -> None:
        from torch.utils.checkpoint import checkpoint

        x = randn(1, 2, 5, 8).requires_grad_()
        o = checkpoint(lambda y: F.scaled_dot_product_attention(y, y, y, dropout_p=0.5), x, use_reentrant=False)
        torch.manual_seed(0)
        torch.randn(1)
        o.sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()


def graph_of(function: Any, *args: Any) -> str:
    """The operators that torch.compile finds in function(*args)."""
    lines: list[str] = []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        lines.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compile(function, backend=backend, fullgraph=True)(*args)
    return "\n".join(lines)


def test_compiled_code_follows_the_switch() -> None:
    def step(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    x = randn(1, 2, 5, 8)
    compiled(x)
    assert fastattn.sdpa_calls().served == 0
    with fastattn.replaced_sdpa():
        compiled(x)
    assert fastattn.sdpa_calls().served == 1
    assert "fastattn" not in graph_of(step, x)


def test_compiled_calls_are_handed_back() -> None:
    def step(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x) + 1

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    x = torch.ones(1, 2, 5, 8, device="meta")
    with fastattn.replaced_sdpa(), pytest.warns(UserWarning, match="neither all on the CPU"):
        assert compiled(x).is_meta
    assert fastattn.sdpa_calls().handed_back == {"tensors that are neither all on the CPU nor all on CUDA": 1}


def test_compiled_transforms_are_handed_back() -> None:
    def step(x: Tensor) -> Tensor:
        return torch.vmap(lambda y: F.scaled_dot_product_attention(y, y, y))(x)

    x = randn(3, 2, 5, 8)
    with fastattn.replaced_sdpa(), pytest.warns(UserWarning, match="torch.func"):
        o = torch.compile(step, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(o, torch_sdpa(x, x, x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_uses_pytorchs_function() -> None:
    def step(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)

    x = randn(1, 2, 5, 8)
    with fastattn.replaced_sdpa():
        scripted = torch.jit.script(step)
    torch.testing.assert_close(scripted(x), torch_sdpa(x, x, x))


def test_importing_and_replacing_do_not_load_the_compiler() -> None:
    code = "import sys, fastattn; fastattn.replace_sdpa(); assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_models_can_be_copied_while_replaced() -> None:
    with fastattn.replaced_sdpa():
        module = nn.MultiheadAttention(8, 2)
        copy.deepcopy(module)
        pickle.loads(pickle.dumps(module))
