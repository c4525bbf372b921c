"""fastattn.varlen_attention: each sequence within the error bound on every dtype and level, and as torch sees it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import reference

from .bad_calls import Bad, zeros
from .compare import compute, differences
from .conftest import levels_of
from .packed import PackedCase, PackedProblem, cumulated
from .test_parity import SIXTEEN_BITS, dtype_id

ops = torch.ops.fastattn

LENGTHS = (5, 70, 0, 1, 131, 16), (9, 64, 12, 40, 131, 0)
CASES = [
    PackedCase(*LENGTHS),
    PackedCase(*LENGTHS, {"causal": True, "gqa": 2, "D": 32, "Dv": 24}),
    PackedCase(*LENGTHS, {"causal": "top_left", "sinks": True, "alibi": "bh", "D": 17}),
    PackedCase(*LENGTHS, {"window": (20, 3), "softcap": 4.0, "alibi": "h", "gqa": 4, "Hkv": 1}),
    PackedCase(*LENGTHS, {"bias": "1hqk", "mask": "b11k", "mask_values": "padding"}),
    PackedCase(*LENGTHS, {"bias": "bh1k", "sinks": True, "causal": True, "gqa": 2}),
    PackedCase(*LENGTHS, {"bias": "11qk", "bias_float32": True, "bias_values": "-1e9", "dropout_p": 0.2}),
    PackedCase(*LENGTHS, {"bias": "h11", "mask": "bhqk", "mask_values": "rows", "gqa": 2}),
    # Of the backward pass's chunks of keys the long sequence gets several, the short ones one.
    PackedCase((1, 2, 530, 3, 20), (1, 1, 530, 300, 6), {"causal": True, "Hkv": 1, "D": 8, "bias": "1hqk"}),
    PackedCase((40, 300), (40, 530), {"Hkv": 1, "gqa": 2, "D": 8, "sinks": True, "dropout_p": 0.1}),
]


def matrix() -> Iterator[Any]:
    for case in CASES:
        for dtype in (torch.float32, *SIXTEEN_BITS, torch.float64):
            for isa in levels_of(dtype):
                yield pytest.param(case, dtype, isa, id=f"{case.id}-{dtype_id(dtype)}-{isa}")


@pytest.mark.parametrize(("case", "dtype", "isa"), list(matrix()), indirect=["isa"])
def test_parity(case: PackedCase, dtype: torch.dtype, isa: str) -> None:
    """Behind the last sequence, and in what no sequence takes, there is NaN."""
    problem = PackedProblem(case, dtype)
    broken = problem.violations(problem.compute())
    assert not broken, "\n".join([f"{case.id} in {dtype} on {isa}:", *broken])


def test_the_bound_notices() -> None:
    """A wrong element anywhere, also in what sequences share."""
    problem = PackedProblem(CASES[5], torch.float32)
    good = problem.compute()
    assert not problem.violations(good)
    for name, x in good.items():
        wrong = x.clone()
        flat = wrong.view(-1)
        flat[flat.isfinite().nonzero()[0]] += 1e-3
        assert problem.violations(good | {name: wrong}), name


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BITS], ids=dtype_id)
def test_one_sequence_is_attention(isa: str, dtype: torch.dtype) -> None:
    """Bit for bit, in both passes."""
    n, m = 150, 170
    problem = PackedProblem(PackedCase((n,), (m,), {"causal": True, "gqa": 2, "sinks": True}), dtype)
    packed = problem.compute()
    one = problem.sequences[0]
    one.kwargs["sinks"] = one.kwargs["sinks"].detach()
    alone = compute(one.require_grad())
    rows = {"o": n, "dq": n, "dk": m, "dv": m}
    got = {name: packed[name][:end].transpose(0, 1)[None] for name, end in rows.items()}
    got |= {"lse": packed["lse"][None, :, :n], "dsinks": packed["dsinks"]}
    assert not differences(got, alone)


def test_threads_do_not_matter() -> None:
    problem = PackedProblem(CASES[8], torch.bfloat16)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(problem.compute())
    for other in results[1:]:
        assert not differences(results[0], other)


@pytest.mark.parametrize("layout", ["heads_first", "one_tensor", "every_other_row", "columns"])
def test_layouts(layout: str) -> None:
    """Any strides; o lies as q does, and gradients as their inputs."""
    cu = cumulated((40, 0, 33))
    base = torch.randn(73, 3, 4, 16)
    q, k, v = (x.contiguous() for x in base.unbind(1))
    kwargs: dict[str, Any] = {"max_seqlen_q": 40, "max_seqlen_k": 40, "causal": True}
    wanted = fastattn.varlen_attention(q, k, v, cu, cu, **kwargs)
    if layout == "heads_first":
        q, k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
    elif layout == "one_tensor":
        q, k, v = base.unbind(1)
    elif layout == "every_other_row":
        q, k, v = (x.repeat_interleave(2, 0)[::2] for x in (q, k, v))
    else:
        q, k, v = (x.mT.contiguous().mT for x in (q, k, v))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = fastattn.varlen_attention(*leaves, cu, cu, **kwargs)
    assert torch.equal(o, wanted)
    assert (o.stride(0) < o.stride(1)) == (layout == "heads_first")
    o.sum().backward()


@pytest.mark.parametrize(("B", "rows", "keys"), [(0, 0, 0), (0, 4, 3), (2, 0, 0), (2, 0, 5), (2, 4, 0), (1, 0, 0)])
def test_nothing_to_do(B: int, rows: int, keys: int) -> None:
    """No sequence, no row, no key: zeros, also for the rows and keys that belong to no sequence."""
    q, k, v = (torch.full((n, 2, 8), torch.nan).requires_grad_() for n in (rows, keys, keys))
    sinks = torch.randn(2, requires_grad=True)
    cu = [torch.zeros(B + 1, dtype=torch.int32) for _ in range(2)]
    o, lse = fastattn.varlen_attention(q, k, v, *cu, max_seqlen_q=rows, max_seqlen_k=keys, sinks=sinks, return_lse=True)
    assert (o.shape, lse.shape) == ((rows, 2, 8), (2, rows))
    assert torch.equal(o, torch.zeros_like(o))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))
    grads = torch.autograd.grad(o.sum(), (q, k, v, sinks))
    assert all(torch.equal(x, torch.zeros_like(x)) for x in grads)


# --- As torch sees it -------------------------------------------------------------------------------------------------

Hq, Hkv, D, Dv, ROWS, KEYS = 2, 1, 2, 3, (3, 0, 2), (4, 2, 1)


def tensors(dtype: torch.dtype = torch.float64, grad: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    total_q, total_k = sum(ROWS) + 1, sum(KEYS) + 1
    shapes = (total_q, Hq, D), (total_k, Hkv, D), (total_k, Hkv, Dv)
    q, k, v = (torch.randn(shape, dtype=dtype).requires_grad_(grad) for shape in shapes)
    return q, k, v


def everything(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    return {
        "causal": True,
        "window": (3, None),
        "scale": 0.4,
        "softcap": 2.0,
        "bias": torch.randn(1, Hq, 1, max(KEYS), dtype=dtype, requires_grad=True),
        "mask": torch.rand(len(ROWS), 1, max(ROWS), max(KEYS)) < 0.8,
        "alibi_slopes": torch.rand(len(ROWS), Hq),
        "sinks": torch.randn(Hq, dtype=dtype, requires_grad=True),
        "dropout_p": 0.2,
    }


def attend(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Any:
    cu = cumulated(ROWS), cumulated(KEYS)
    return fastattn.varlen_attention(q, k, v, *cu, max_seqlen_q=max(ROWS), max_seqlen_k=max(KEYS), **kwargs)


def operator_arguments(features: bool, grad: bool) -> tuple[Any, ...]:
    kwargs: dict[str, Any] = everything(torch.float32) if features else {}
    others = [kwargs.get(name) for name in ("bias", "mask", "alibi_slopes", "sinks")]
    others = [x.detach().requires_grad_(grad and x.is_floating_point()) if x is not None else None for x in others]
    if others[2] is not None:
        others[2].requires_grad_(False)
    state = torch.tensor([3, 4]) if features else None
    settings = (2, 3, -1, 0.4, 2.0, 0.2) if features else (0, -1, -1, None, 0.0, 0.0)
    qkv = tensors(torch.float32, grad)
    return (*qkv, cumulated(ROWS), cumulated(KEYS), *others, state, max(ROWS), max(KEYS), *settings)


@pytest.mark.parametrize("features", [False, True])
def test_opcheck(features: bool) -> None:
    torch.library.opcheck(ops.varlen_attention_forward.default, (*operator_arguments(features, True), True))
    args = operator_arguments(features, False)
    torch.library.opcheck(ops.varlen_attention_forward.default, (*args, False))
    o, lse, stats = ops.varlen_attention_forward(*args, True)
    upstream = (torch.randn_like(o), torch.randn_like(lse) if features else None)
    torch.library.opcheck(
        ops.varlen_attention_backward.default, (*upstream, *args[:3], o, stats, *args[3:], features, features)
    )


@pytest.mark.parametrize("features", [False, True])
def test_gradcheck(features: bool) -> None:
    """First and second derivatives."""
    kwargs = everything() if features else {}
    names = [name for name in ("bias", "sinks") if name in kwargs]

    def function(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(7)
        o, lse = attend(q, k, v, return_lse=True, **kwargs | dict(zip(names, rest, strict=True)))
        return o, lse.masked_fill(lse == -torch.inf, 0.0)

    torch.set_num_threads(1)
    inputs = (*tensors(), *(kwargs[name] for name in names))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.usefixtures("fresh_compiler")
def test_compile() -> None:
    """One graph, forward and backward, and the numbers of eager code."""
    qkv, kwargs = tensors(torch.float32), everything(torch.float32) | {"dropout_p": 0.0}
    leaves = (*qkv, kwargs["bias"], kwargs["sinks"])
    results = []
    for function in (torch.compile(attend, fullgraph=True, backend="aot_eager"), attend):
        o, lse = function(*qkv, return_lse=True, **kwargs)
        loss = o.sin().sum() + torch.where(lse == -torch.inf, 0.0, lse).cos().sum()
        results.append((o.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(*results)


def test_transforms() -> None:
    """grad, vmap and forward mode of torch.func, against the reference."""
    q, k, v = tensors(grad=False)
    cu = cumulated(ROWS), cumulated(KEYS)

    def by_reference(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Any:
        return reference.varlen_attention(q, k, v, *cu, **kwargs)

    def results(f: Any) -> Any:
        func = torch.func
        return (
            func.grad(lambda q: f(q, k, v, causal=True).sin().sum())(q),
            func.vmap(lambda q: f(q, k, v))(torch.stack([q, -q])),
            func.jvp(lambda k: f(q, k, v), (k,), (k.flip(0),)),
        )

    torch.testing.assert_close(results(attend), results(by_reference))


def test_autocast() -> None:
    qkv = tensors(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, lse = attend(*qkv, return_lse=True)
    assert (o.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert [x.dtype for x in torch.autograd.grad(o.sum(), qkv)] == [torch.float32] * 3


# --- Errors -----------------------------------------------------------------------------------------------------------


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


BAD_CALLS = [
    Bad(
        "rank",
        ValueError,
        ("q has 4 dimensions", "varlen_attention takes three, (total, H, D)"),
        {"q": zeros(1, 4, 9, 8)},
    ),
    Bad("v-length", ValueError, ("v has length 8 but k has 9", "cut or pad"), {"v": zeros(8, 2, 8)}),
    Bad("heads", ValueError, ("k has 3 heads but q has 4",), {"k": zeros(9, 3, 8), "v": zeros(9, 3, 8)}),
    Bad("head-dim", ValueError, ("k has head dimension 7 but q has 8",), {"k": zeros(9, 2, 7)}),
    Bad("list", TypeError, ("cu_seqlens_q is a list", "torch.Tensor"), {"cu_seqlens_q": [0, 4, 9]}),
    Bad("none", TypeError, ("cu_seqlens_k is a NoneType",), {"cu_seqlens_k": None}),
    Bad(
        "int64", TypeError, ("cu_seqlens_q is torch.int64", ".to(torch.int32)"), {"cu_seqlens_q": torch.tensor([0, 9])}
    ),
    Bad("matrix", ValueError, ("cu_seqlens_k has shape (1, 3)", "(B + 1,)"), {"cu_seqlens_k": int32(0, 4, 9)[None]}),
    Bad("empty", ValueError, ("cu_seqlens_q has shape (0,)", "(B + 1,)"), {"cu_seqlens_q": int32()}),
    Bad(
        "device", ValueError, ("cu_seqlens_k is on meta but q is on cpu",), {"cu_seqlens_k": int32(0, 4, 9).to("meta")}
    ),
    Bad("not-0", ValueError, ("cu_seqlens_q[0] is 1", "must be 0"), {"cu_seqlens_q": int32(1, 4, 9)}),
    Bad(
        "decreasing",
        ValueError,
        ("cu_seqlens_q[2] is 3 but cu_seqlens_q[1] is 4", "sums"),
        {"cu_seqlens_q": int32(0, 4, 3)},
    ),
    Bad("beyond", ValueError, ("cu_seqlens_k[2] is 10 but k has 9 rows",), {"cu_seqlens_k": int32(0, 4, 10)}),
    Bad("counts", ValueError, ("cu_seqlens_k has shape (4,)", "(3,)"), {"cu_seqlens_k": int32(0, 4, 9, 9)}),
    Bad(
        "longest-q", ValueError, ("max_seqlen_q is 4 but sequence 1 of cu_seqlens_q has length 5",), {"max_seqlen_q": 4}
    ),
    Bad("longest-k", ValueError, ("max_seqlen_k is 3 but sequence 0",), {"max_seqlen_k": 3}),
    Bad("negative", ValueError, ("max_seqlen_k is -1",), {"max_seqlen_k": -1}),
    Bad("float", TypeError, ("max_seqlen_q is a float", "must be an int"), {"max_seqlen_q": 5.0}),
    Bad("bool", TypeError, ("max_seqlen_k is a NoneType",), {"max_seqlen_k": None}),
    Bad("bias", ValueError, ("bias has shape (4, 9, 9)", "(2, 4, 5, 5)"), {"bias": zeros(4, 9, 9)}),
    Bad("mask", TypeError, ("mask is torch.float32", "mask.to(torch.bool)"), {"mask": zeros(5)}),
    Bad("slopes", ValueError, ("alibi_slopes has shape (3, 4)", "(2, 4)"), {"alibi_slopes": zeros(3, 4)}),
    Bad(
        "slopes-gradient",
        ValueError,
        ("alibi_slopes requires a gradient",),
        {"alibi_slopes": zeros(4).requires_grad_()},
    ),
    Bad("dropout", ValueError, ("dropout_p is 1.5", "[0, 1]"), {"dropout_p": 1.5}),
    Bad("causal", ValueError, ("causal is 'left'",), {"causal": "left"}),
]


@pytest.mark.parametrize("bad", BAD_CALLS, ids=lambda bad: bad.id)
def test_bad_calls(bad: Bad) -> None:
    good: dict[str, Any] = {
        "q": zeros(9, 4, 8),
        "k": zeros(9, 2, 8),
        "v": zeros(9, 2, 8),
        "cu_seqlens_q": int32(0, 4, 9),
        "cu_seqlens_k": int32(0, 4, 9),
        "max_seqlen_q": 5,
        "max_seqlen_k": 5,
    }
    bad.assert_refused(lambda arguments: fastattn.varlen_attention(**arguments), good | bad.arguments)


def test_meta_tensors_are_checked() -> None:
    """Tracing refuses what a call refuses, as far as shapes tell."""
    x = torch.zeros(9, 4, 8, device="meta")
    cu = torch.zeros(3, dtype=torch.int32, device="meta")
    assert fastattn.varlen_attention(x, x, x, cu, cu, max_seqlen_q=5, max_seqlen_k=5).shape == x.shape
    with pytest.raises(ValueError, match="cu_seqlens_k has shape"):
        fastattn.varlen_attention(x, x, x, cu, cu[:2], max_seqlen_q=5, max_seqlen_k=5)
