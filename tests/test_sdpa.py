"""scaled_dot_product_attention against PyTorch's own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn

from .sdpa import compare, randn, sdpa, torch_sdpa

pytestmark = pytest.mark.usefixtures("sdpa_left_alone", "fresh_compiler")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


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
    original = fastattn._attention.attend

    def spy(*args: Any) -> Any:
        seen.extend(args[:3])
        return original(*args)

    cases = [((5, 8), (7, 8)), ((3, 5, 8), (1, 7, 8)), ((2, 3, 5, 8), (1, 1, 7, 8)), ((2, 3, 5, 8), (2, 3, 7, 8))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastattn._attention, "attend", spy)
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
