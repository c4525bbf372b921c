"""o, lse and every gradient of every case, on every dtype and level, within the error bound of tests/compare.py.

Covered: all cases of the table in all types, on each level of the processor that has code of its own for the type. Long
cases: float32 on all of those, 16-bit on the highest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fastattn

from .cases import CASES, Case, make_inputs
from .compare import MANY, compute, expected, violations
from .conftest import ISAS, levels_of

SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def dtype_id(dtype: torch.dtype) -> str:
    return {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float64": "fp64"}[
        str(dtype)
    ]


def matrix() -> Iterator[Any]:
    for case in CASES:
        for dtype in (torch.float32, *SIXTEEN_BITS, torch.float64):
            levels = levels_of(dtype)
            if case.heavy and dtype != torch.float32:
                levels = levels[-1:] if dtype in SIXTEEN_BITS else []
            for isa in levels:
                yield pytest.param(case, dtype, isa, id=f"{case.id}-{dtype_id(dtype)}-{isa}")


@pytest.mark.parametrize(("case", "dtype", "isa"), list(matrix()), indirect=["isa"])
def test_parity(case: Case, dtype: torch.dtype, isa: str) -> None:
    inputs = make_inputs(case, dtype).require_grad()
    broken = violations(compute(inputs), expected(case, dtype))
    assert not broken, "\n".join([f"{case.id} in {dtype} on {isa}:", *broken])


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BITS, torch.float64], ids=dtype_id)
def test_the_bound_notices(dtype: torch.dtype) -> None:
    """A bound that nothing breaks proves nothing: one wrong element, a wrong scale, NaN, a row that should be blind."""
    case = Case(70, 131, D=16, B=2, gqa=2, causal="top_left", bias="1hqk", sinks=True, kv_lengths=(0, 131))
    wanted = expected(case, dtype)
    good = wanted.exact
    assert not violations(good, wanted)
    for name, exact in good.items():
        limit = wanted.limits(name, torch.float64)[0]
        visible = exact.isfinite()
        one_off = exact.clone(memory_format=torch.contiguous_format)
        one_off.flatten()[-1] += 1.01 * (2 * limit.plain.largest + limit.tiny.largest)
        spoilt = {"one element": one_off, "scale": exact * 1.1, "NaN": exact * torch.nan}
        if limit.tiny.elements >= MANY:
            noise = 1.01 * (2 * limit.plain.rms + limit.tiny.rms)
            assert noise < 0.9 * (2 * limit.plain.largest + limit.tiny.largest)
            spoilt["every element"] = exact + noise * torch.randn(exact.shape).sign()
        if name == "lse":
            spoilt["not blind"] = exact.masked_fill(~visible, -1e4)
            spoilt["blind"] = exact.masked_fill(exact == exact[visible].max(), -torch.inf)
        for what, wrong in spoilt.items():
            found = violations(good | {name: wrong}, wanted)
            assert found, f"{name}: {what} went unnoticed"
            assert all(message.startswith(name) for message in found)


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BITS], ids=dtype_id)
@pytest.mark.parametrize("fill", ["-1e9", "min"])
@pytest.mark.parametrize("Lk", [1, 50, 64, 130])
def test_rows_hidden_by_finite_values_are_uniform(isa: str, dtype: torch.dtype, fill: str, Lk: int) -> None:
    """A row whose bias is -1e9 or finfo.min everywhere: o is the mean of v, and its gradient that of the mean.

    lse alone cannot tell how many keys the row has: what lies in the accumulator beside -1e9 is lost.
    """
    case = Case(37, Lk, D=16, Dv=24, gqa=2)
    inputs = make_inputs(case, dtype)
    # float32, for -1e9 does not exist in float16, and its least number leaves room for the scores to count.
    value = float(fill) if fill != "min" else torch.finfo(torch.float32).min
    inputs.kwargs["bias"] = torch.full((1, 1, case.Lq, Lk), value)
    fast = compute(inputs.require_grad())
    v, d_o, d_lse = inputs.v.detach().double().repeat_interleave(2, 1), inputs.d_o.double(), inputs.d_lse.double()
    dp = d_o @ v.mT
    ds = (dp - dp.mean(-1, keepdim=True) + d_lse.unsqueeze(-1)) / Lk
    exact = {
        "o": v.mean(2, keepdim=True).expand_as(d_o),
        "dv": (d_o.sum(2, keepdim=True) / Lk).expand(-1, -1, Lk, -1).unflatten(1, (2, 2)).sum(2),
        "dbias": ds.sum(1, keepdim=True),
    }
    # The largest sums of |terms|, which eps is in proportion to; a result wrong by a factor Lk, or 1 / Lk, is far off.
    size = {
        "o": v.abs().mean(2).max(),
        "dv": d_o.abs().sum(2).max() / Lk * 2,
        "dbias": (d_o.abs() @ v.abs().mT + d_lse.abs().unsqueeze(-1)).max() / Lk * 4,
    }
    for name, wanted in exact.items():
        atol = torch.finfo(dtype).eps * size[name].item()
        torch.testing.assert_close(fast[name].double(), wanted, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(fast["lse"], torch.full_like(fast["lse"], value), rtol=1e-6, atol=0)


def test_blind_rows_are_exactly_zero(isa: str) -> None:
    """No visible key, for each reason there is: o 0, lse -inf, no gradient, with and without a sink."""
    hide = torch.zeros(1, 1, 6, 5)
    hide[:, :, 2] = -torch.inf
    reasons: list[dict[str, Any]] = [
        {"causal": "bottom_right", "k_rows": 4, "blind": [0, 1]},
        {"window": (0, 0), "k_rows": 4, "blind": [0, 1]},
        {"mask": torch.tensor([1, 1, 0, 1, 1, 1], dtype=torch.bool).view(1, 1, 6, 1), "blind": [2]},
        {"bias": hide, "blind": [2]},
        {"kv_lengths": torch.tensor([0], dtype=torch.int32), "blind": [0, 1, 2, 3, 4, 5]},
    ]
    for dtype in (torch.float32, *SIXTEEN_BITS, torch.float64):
        for reason in reasons:
            for sinks in (None, torch.randn(2)):
                kwargs = {key: value for key, value in reason.items() if key not in ("k_rows", "blind")}
                if "bias" in kwargs:
                    kwargs["bias"] = kwargs["bias"].to(dtype)
                inputs = make_inputs(Case(6, reason.get("k_rows", 5)), dtype)
                inputs.kwargs.update(kwargs, **({} if sinks is None else {"sinks": sinks.clone()}))
                got = compute(inputs.require_grad())
                blind = torch.zeros(6, dtype=torch.bool)
                blind[reason["blind"]] = True
                assert (got["o"][:, :, blind] == 0).all(), reason
                assert (got["lse"][:, :, blind] == -torch.inf).all(), reason
                assert (got["dq"][:, :, blind] == 0).all(), reason
                assert got["lse"][:, :, ~blind].isfinite().all(), reason
                assert all(x.isfinite().all() for name, x in got.items() if not name.startswith("lse")), reason
                if blind.all():
                    assert all((x == 0).all() for name, x in got.items() if not name.startswith("lse")), reason


def test_forced_level_is_the_active_level(isa: str) -> None:
    assert torch.ops.fastattn._isa() == isa


def test_highest_level_is_the_default() -> None:
    """What users get without FASTATTN_CPU_CAPABILITY; another process, for this one may have been forced."""
    import os
    import subprocess
    import sys

    env = {name: value for name, value in os.environ.items() if name != "FASTATTN_CPU_CAPABILITY"}
    program = "import torch, fastattn; print(torch.ops.fastattn._isa(), torch.ops.fastattn._supported_isas())"
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    active, supported = done.stdout.split()
    assert active == supported.split(",")[-1]
    assert set(supported.split(",")) <= set(ISAS)


def test_no_grad_gives_the_same_bits(isa: str) -> None:
    """Without gradients no statistics are saved; the result must not depend on that, but for a few rows (decoding)."""
    for dtype in (torch.float32, *SIXTEEN_BITS):
        inputs = make_inputs(Case(70, 131, D=32, gqa=2, causal="bottom_right"), dtype)
        with_grad = compute(inputs.require_grad())
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                o, lse = fastattn.attention(inputs.q, inputs.k, inputs.v, causal=True, return_lse=True)
                alone = fastattn.attention(inputs.q, inputs.k, inputs.v, causal=True)
            assert torch.equal(o, with_grad["o"])
            assert torch.equal(alone, with_grad["o"])
            assert torch.equal(lse, with_grad["lse"])
            assert not o.requires_grad
