"""The oracle itself: against PyTorch's own attention, and loops that follow the definition pair by pair."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
import torch.nn.functional as F

from fastattn import reference


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("Lq", "Lk", "D", "Dv"), [(5, 7, 4, 4), (7, 5, 3, 6), (1, 9, 8, 1), (6, 6, 1, 2)])
@pytest.mark.parametrize("kind", ["dense", "causal", "bool", "float", "scale", "gqa"])
def test_agrees_with_sdpa_math(Lq: int, Lk: int, D: int, Dv: int, kind: str) -> None:
    """Values and gradients of scaled_dot_product_attention's math backend, for everything that it can do."""
    Hkv = 2 if kind == "gqa" else 4
    q, k, v = randn(2, 4, Lq, D, seed=1), randn(2, Hkv, Lk, D, seed=2), randn(2, Hkv, Lk, Dv, seed=3)
    mask = bias = None
    theirs: dict[str, object] = {"enable_gqa": kind == "gqa"}
    ours: dict[str, object] = {}
    if kind == "causal":
        theirs["is_causal"], ours["causal"] = True, "top_left"
    if kind == "scale":
        theirs["scale"] = ours["scale"] = -0.3
    if kind == "bool":
        mask = randn(2, 1, Lq, Lk, seed=4) > 0
        mask[..., 0] = True
        theirs["attn_mask"] = ours["mask"] = mask
    if kind == "float":
        bias = randn(1, 4, Lq, Lk, seed=5).requires_grad_()
        theirs["attn_mask"] = ours["bias"] = bias
    inputs = [x.requires_grad_() for x in (q, k, v)] + ([bias] if bias is not None else [])
    grad = randn(2, 4, Lq, Dv, seed=6)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(q, k, v, **theirs)  # type: ignore[arg-type]
    got = reference.attention(q, k, v, **ours)  # type: ignore[arg-type]
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for mine, other in zip(
        torch.autograd.grad(got, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-12)


def by_loops(
    q, k, v, *, causal, window, scale, softcap, bias, mask, alibi_slopes, sinks, kv_lengths, dropout_p, dropout_keep
):  # type: ignore[no-untyped-def]
    """The definition at the head of fastattn/reference/_attention.py, on Python floats."""
    B, Hq, Lq, D = q.shape
    Lk, G = k.shape[2], Hq // k.shape[1]
    full = (B, Hq, Lq, Lk)
    bias = None if bias is None else bias.expand(full)
    mask = None if mask is None else mask.expand(full)
    slopes = None if alibi_slopes is None else alibi_slopes.expand(B, Hq)
    o, lse = torch.zeros(B, Hq, Lq, v.shape[3], dtype=torch.float64), torch.empty(B, Hq, Lq, dtype=torch.float64)
    for b, h, i in itertools.product(range(B), range(Hq), range(Lq)):
        n = Lk if kv_lengths is None else int(kv_lengths[b])
        diagonal = i if causal == "top_left" else i + n - Lq
        row: dict[int, float] = {}
        for j in range(n):
            if causal and j > diagonal:
                continue
            if window is not None and window[0] is not None and j < diagonal - window[0]:
                continue
            if window is not None and window[1] is not None and j > diagonal + window[1]:
                continue
            if mask is not None and not mask[b, h, i, j]:
                continue
            s = sum(float(q[b, h, i, d]) * float(k[b, h // G, j, d]) for d in range(D)) * (scale or D**-0.5)
            if softcap:
                s = softcap * math.tanh(s / softcap)
            if bias is not None:
                s += float(bias[b, h, i, j])
            if slopes is not None:
                s -= float(slopes[b, h]) * abs(i + n - Lq - j)
            if s > -math.inf:
                row[j] = s
        if not row:
            lse[b, h, i] = -math.inf
            continue
        total = sum(math.exp(s) for s in row.values()) + (0 if sinks is None else math.exp(float(sinks[h])))
        lse[b, h, i] = math.log(total)
        for j, s in row.items():
            if dropout_keep is None or dropout_keep[b, h, i, j]:
                o[b, h, i] += math.exp(s) / total / (1 - dropout_p) * v[b, h // G, j]
    return o, lse


@pytest.mark.parametrize("seed", range(40))
def test_agrees_with_loops(seed: int) -> None:
    """Random combinations of every feature against the definition written as loops."""
    dice = random.Random(seed)
    maybe = lambda x: x if dice.random() < 0.4 else None  # noqa: E731
    B, Hkv, G = dice.choice([1, 2]), dice.choice([1, 2]), dice.choice([1, 2, 3])
    Lq, Lk, D, Dv = dice.randint(1, 6), dice.randint(1, 7), dice.randint(1, 4), dice.randint(1, 4)
    Hq = Hkv * G
    shape = [dice.choice([1, n]) for n in (B, Hq, Lq, Lk)]
    bias = randn(*shape, seed=seed + 1)
    bias[randn(*shape, seed=seed + 2) > 1] = -math.inf
    mask = randn(*[dice.choice([1, n]) for n in (B, Hq, Lq, Lk)], seed=seed + 3) > -0.7
    slopes = randn(*dice.choice([(Hq,), (B, Hq)]), seed=seed + 4).abs()
    side = lambda: dice.choice([None, 0, 1, 2, 9])  # noqa: E731
    dropout_p = dice.choice([0.0, 0.0, 0.3])
    kwargs = {
        "causal": dice.choice([False, "top_left", "bottom_right"]),
        "window": maybe((side(), side())),
        "scale": maybe(0.7),
        "softcap": maybe(1.5),
        "bias": maybe(bias),
        "mask": maybe(mask),
        "alibi_slopes": maybe(slopes),
        "sinks": maybe(randn(Hq, seed=seed + 5)),
        "kv_lengths": maybe(torch.tensor([dice.randint(0, Lk) for _ in range(B)], dtype=torch.int32)),
        "dropout_p": dropout_p,
        "dropout_keep": randn(B, Hq, Lq, Lk, seed=seed + 6) > -0.5 if dropout_p else None,
    }
    q, k, v = randn(B, Hq, Lq, D, seed=seed), randn(B, Hkv, Lk, D, seed=seed + 7), randn(B, Hkv, Lk, Dv, seed=seed + 8)
    o, lse = reference.attention(q, k, v, **kwargs, return_lse=True)  # type: ignore[arg-type, misc]
    expected_o, expected_lse = by_loops(q, k, v, **kwargs)
    torch.testing.assert_close(o, expected_o, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)


def everything_small() -> tuple[tuple[torch.Tensor, ...], dict[str, object]]:
    """Inputs that need a gradient, and the rest: every feature at once, with blind rows and a sequence without keys."""
    mask = torch.ones(2, 1, 3, 4, dtype=torch.bool)
    mask[0, :, 1] = False
    inputs = (
        randn(2, 2, 3, 2, seed=1),
        randn(2, 1, 4, 2, seed=2),
        randn(2, 1, 4, 3, seed=3),
        randn(1, 2, 1, 4, seed=4),
        randn(2, seed=5),
    )
    rest = {
        "causal": "bottom_right",
        "window": (2, None),
        "softcap": 2.0,
        "alibi_slopes": torch.tensor([0.5, 0.25], dtype=torch.float64),
        "mask": mask,
        "kv_lengths": torch.tensor([3, 0], dtype=torch.int32),
        "dropout_p": 0.25,
        "dropout_keep": randn(2, 2, 3, 4, seed=6) > -0.5,
    }
    return tuple(x.requires_grad_() for x in inputs), rest


def test_gradients_and_second_derivatives() -> None:
    """gradcheck and gradgradcheck of o and lse with every feature at once; lse without its rows of -inf."""
    inputs, rest = everything_small()

    def run(q, k, v, bias, sinks):  # type: ignore[no-untyped-def]
        o, lse = reference.attention(q, k, v, bias=bias, sinks=sinks, return_lse=True, **rest)
        return o, lse.masked_fill(lse == -math.inf, 0)

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("fill", [-1e9, torch.finfo(torch.float64).min, -math.inf])
def test_masked_rows_have_no_nan(fill: float) -> None:
    """Gradients through o and lse are finite whatever hides a row, and a row hidden by -inf gets none at all."""
    q, k, v = (randn(1, 2, 3, 4, seed=s).requires_grad_() for s in range(3))
    bias = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    bias[:, :, 1] = fill
    bias.requires_grad_()
    o, lse = reference.attention(q, k, v, bias=bias, return_lse=True)
    grads = torch.autograd.grad([o, lse], [q, k, v, bias], [torch.ones_like(o), torch.ones_like(lse)])
    assert all(g.isfinite().all() for g in grads)
    if fill == -math.inf:
        assert (o[:, :, 1] == 0).all()
        assert (lse[:, :, 1] == -math.inf).all()
        assert (grads[0][:, :, 1] == 0).all()
        assert (grads[3][:, :, 1] == 0).all()
    elif fill != -1e9:
        torch.testing.assert_close(o[:, :, 1], v.mean(dim=2))
        d_bias = torch.autograd.grad(reference.attention(q, k, v, bias=bias, return_lse=True)[1].sum(), bias)[0]
        torch.testing.assert_close(d_bias[:, :, 1], torch.full((1, 1, 3), 2 / 3, dtype=torch.float64))  # two heads


def test_what_does_not_exist_is_not_used() -> None:
    """NaN beyond kv_lengths reaches neither results nor gradients."""
    q, k, v = randn(2, 1, 3, 4, seed=1), randn(2, 1, 5, 4, seed=2), randn(2, 1, 5, 4, seed=3)
    lengths = torch.tensor([5, 2], dtype=torch.int32)
    k[1, :, 2:] = v[1, :, 2:] = math.nan
    inputs = [x.requires_grad_() for x in (q, k, v)]
    o, lse = reference.attention(q, k, v, kv_lengths=lengths, return_lse=True)
    grads = torch.autograd.grad([o, lse], inputs, [torch.ones_like(o), torch.ones_like(lse)])
    assert all(x.isfinite().all() for x in (o, lse, *grads))
    assert (grads[1][1, :, 2:] == 0).all()
    assert (grads[2][1, :, 2:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_baseline_stays_in_its_dtype(dtype: torch.dtype) -> None:
    """dtype=None computes in the inputs' dtype, and not better: the error bound of the kernels hangs on it."""
    q, k, v = (randn(1, 2, 9, 16, seed=s).to(dtype) for s in range(3))
    o, lse = reference.attention(q, k, v, softcap=2.0, return_lse=True)
    exact, _ = reference.attention(q, k, v, softcap=2.0, return_lse=True, dtype=torch.float64)
    assert o.dtype == lse.dtype == dtype
    assert exact.dtype == torch.float64
    error = (o.double() - exact).abs().max().item()
    assert 0.1 * torch.finfo(dtype).eps < error < 8 * torch.finfo(dtype).eps
