"""NaN where no one should look: beyond kv_lengths, between the rows of views, before and after them, in other heads."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from .cases import Case, Inputs, make_inputs
from .compare import Quantities, compute
from .conftest import ISAS, supported_isas

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def assert_same_bits(got: Quantities, wanted: Quantities) -> None:
    for name, x in wanted.items():
        assert torch.equal(got[name], x), f"{name} differs by up to {(got[name] - x).abs().max()}"


# ------------------------------------------------------------------------------------------------ around the tensors


def surrounded(x: Tensor, fill: float) -> Tensor:
    """x inside a larger tensor full of `fill`: around it in every dimension, and at an odd offset."""
    if x.dim() == 0:
        return x
    wide = torch.full([size + 3 for size in x.shape], fill, dtype=x.dtype)
    inner = wide[tuple(slice(1, 1 + size) for size in x.shape)]
    inner.copy_(x)
    return inner


def surround(inputs: Inputs, fill: float) -> Inputs:
    tensors = [surrounded(x, fill) for x in (inputs.q, inputs.k, inputs.v, inputs.d_o, inputs.d_lse)]
    kwargs = {
        # A mask has no NaN, but it can be open where it should not be looked at; lengths beyond are out of range.
        name: surrounded(x, True if x.dtype == torch.bool else 7 if x.dtype == torch.int32 else fill)
        if isinstance(x, Tensor)
        else x
        for name, x in inputs.kwargs.items()
    }
    return Inputs(*tensors, kwargs=kwargs)


SURROUNDED = [
    Case(70, 131, D=32, B=2, gqa=2),
    Case(67, 35, D=17, Dv=24, B=2, gqa=2, causal="bottom_right"),
    Case(1, 50, D=3, Dv=5, B=2, gqa=4),
    Case(3, 97, D=80, B=2, gqa=2, causal="bottom_right", window=(30, 0)),
    Case(97, 131, D=1, Dv=1, bias="bhqk", mask="bhqk", alibi="bh", sinks=True, B=2),
    Case(33, 66, D=16, bias="1hq1", mask="b11k", alibi="h", sinks=True, B=2, kv_lengths=(66, 31)),
    Case(130, 70, D=20, bias="11qk", bias_float32=True, softcap=4.0, dropout_p=0.2, causal="top_left"),
    Case(600, 300, D=10, Hkv=1, bias="1h1k", mask="11qk", mask_values="blocks"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SURROUNDED, ids=lambda case: case.id)
def test_nothing_around_a_view_leaks(isa: str, case: Case, dtype: torch.dtype) -> None:
    """With NaN or inf before, after and between the rows of every input, the bits are those for zeros there."""
    inputs = make_inputs(case, dtype)
    wanted = compute(surround(inputs, 0.0).require_grad())
    assert all(x.isfinite().all() for name, x in wanted.items() if not name.startswith("lse"))
    for fill in (math.nan, math.inf):
        assert_same_bits(compute(surround(inputs, fill).require_grad()), wanted)


def malloc_checks() -> dict[str, str]:
    """Settings under which glibc ends the process when something was written past the end of an allocation, or {}."""
    name = "libc_malloc_debug.so.0"
    env = os.environ | {"LD_PRELOAD": name, "MALLOC_CHECK_": "3"}
    # The loader only complains about what it does not find.
    probe = subprocess.run(["/bin/true"], env=env, capture_output=True, check=False)
    return env if probe.returncode == 0 and not probe.stderr else {}


@pytest.mark.parametrize("level", ISAS)
def test_nothing_outside_a_tensor_is_read_or_written(level: str) -> None:
    """Inputs next to protected pages, results whose ends glibc watches: see tests/guard_pages.py."""
    if level not in supported_isas():
        pytest.skip(f"this processor (or build) has no {level}")
    watched = malloc_checks()
    done = subprocess.run(
        [sys.executable, "-m", "tests.guard_pages", level],
        cwd=Path(__file__).resolve().parent.parent,
        env=watched or None,
        capture_output=True,
        text=True,
        check=False,
    )
    last = (done.stdout.splitlines() or ["nothing"])[-1]
    assert done.returncode == 0, f"died in: {last}\n{done.stderr[-3000:]}"
    assert int(last.removeprefix("done: ")) > 700
    if not watched:
        pytest.skip("no libc_malloc_debug: reads outside of tensors were looked for and not found, writes were not")


# ------------------------------------------------------------------------------------------------- beyond the lengths


LENGTHS = [
    Case(70, 131, D=32, B=3, gqa=2, kv_lengths=(0, 77, 131)),
    Case(70, 131, D=17, Dv=24, B=3, gqa=2, kv_lengths=(64, 96, 1), causal="bottom_right"),
    Case(131, 70, D=16, B=2, kv_lengths=(5, 69), causal="top_left"),
    Case(1, 97, D=64, B=2, gqa=4, kv_lengths=(13, 96)),
    Case(5, 200, D=64, B=2, gqa=2, kv_lengths=(130, 3), window=(50, 2)),
    Case(90, 140, D=16, B=2, kv_lengths=(33, 128), bias="bhqk", mask="bhqk", sinks=True),
    Case(90, 140, D=16, B=2, kv_lengths=(33, 128), bias="1h1k", alibi="h", softcap=3.0),
    Case(90, 140, D=16, B=2, kv_lengths=(33, 128), dropout_p=0.3, layout="blhd"),
    Case(600, 600, D=16, B=2, Hkv=1, kv_lengths=(100, 517)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", LENGTHS, ids=lambda case: case.id)
def test_nothing_beyond_the_lengths_leaks(isa: str, case: Case, dtype: torch.dtype) -> None:
    """NaN or inf in the keys, values and biases that do not exist change no bit, and their gradients are 0."""
    assert case.kv_lengths is not None
    beyond = torch.arange(case.Lk).view(1, 1, -1) >= torch.tensor(case.kv_lengths).view(-1, 1, 1)
    clean = make_inputs(case, dtype)

    def poisoned(fill: float) -> Inputs:
        inputs = make_inputs(case, dtype)
        for x in (inputs.k, inputs.v):
            x.masked_fill_(beyond.unsqueeze(-1), fill)
        for name, value in (("bias", fill), ("mask", True)):
            if name in inputs.kwargs:
                x = inputs.kwargs[name]
                # Of a bias that sequences share, the columns beyond all of their lengths.
                columns = beyond if x.shape[0] != 1 else beyond.all(0, keepdim=True)
                x.masked_fill_(columns.unsqueeze(-2), value)
        return inputs

    wanted = compute(clean.require_grad())
    for fill in (math.nan, math.inf, -math.inf):
        got = compute(poisoned(fill).require_grad())
        assert_same_bits(got, wanted)
        for name in ("dk", "dv"):
            assert (got[name].masked_fill(~beyond.unsqueeze(-1), 0) == 0).all(), name
        if "dbias" in got:
            columns = beyond if got["dbias"].shape[0] != 1 else beyond.all(0, keepdim=True)
            assert (got["dbias"].masked_fill(~columns.unsqueeze(-2), 0) == 0).all()


# ------------------------------------------------------------------------------------- from one row or head to another


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("Lq", [1, 5, 70, 130])
def test_a_row_keeps_its_nan(isa: str, dtype: torch.dtype, Lq: int) -> None:
    """NaN in a row of q spoils this row of o, lse and dq, and no other; so does NaN in a row of d_o, for dq."""
    for row in {0, Lq // 2, Lq - 1}:
        for poisoned in ("q", "d_o", "d_lse"):
            inputs = make_inputs(Case(Lq, 141, D=20, B=2, gqa=2, causal="bottom_right"), dtype)
            wanted = compute(inputs.require_grad())
            spoilt = make_inputs(Case(Lq, 141, D=20, B=2, gqa=2, causal="bottom_right"), dtype)
            getattr(spoilt, poisoned)[1, 2, row] = math.nan
            got = compute(spoilt.require_grad())
            for name in ("o", "lse", "dq"):
                own = torch.zeros_like(got[name], dtype=torch.bool)
                own[1, 2, row] = True
                assert torch.equal(got[name][~own], wanted[name][~own]), f"{name}, {poisoned} row {row}"
                if poisoned == "q" or name == "dq":
                    assert got[name][own].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_head_keeps_its_nan(isa: str, dtype: torch.dtype) -> None:
    """NaN in a key head spoils the query heads that read it, in its own sequence, and no others."""
    case = Case(67, 133, D=20, B=2, Hkv=3, gqa=2, bias="bhqk")
    wanted = compute(make_inputs(case, dtype).require_grad())
    for name in ("k", "v"):
        inputs = make_inputs(case, dtype)
        getattr(inputs, name)[1, 1] = math.nan
        got = compute(inputs.require_grad())
        for quantity, x in wanted.items():
            own = torch.zeros_like(x, dtype=torch.bool)
            own[1, slice(2, 4) if x.shape[1] == case.Hq else 1] = True
            assert torch.equal(got[quantity][~own], x[~own]), f"{quantity}, NaN in {name}"


def test_results_are_written_whole(isa: str) -> None:
    """No element of a result is left as the allocator gave it: memory that was NaN before holds none afterwards."""
    for dtype in DTYPES:
        for case in (*SURROUNDED, *LENGTHS):
            inputs = make_inputs(case, dtype).require_grad()
            wanted = compute(inputs)
            for x in wanted.values():
                # The allocator hands the same memory out again for the same sizes.
                torch.full(x.shape, math.nan, dtype=x.dtype)
            assert_same_bits(compute(inputs), wanted)


def test_inputs_are_not_written() -> None:
    """Every input has the bits that it had."""
    for case in (*SURROUNDED, *LENGTHS):
        case = replace(case, layout="blhd")
        for dtype in DTYPES:
            inputs, copy = make_inputs(case, dtype), make_inputs(case, dtype)
            compute(inputs.require_grad())
            for name in ("q", "k", "v", "d_o", "d_lse"):
                assert torch.equal(getattr(inputs, name), getattr(copy, name)), name
            for name, x in copy.kwargs.items():
                if isinstance(x, Tensor):
                    assert torch.equal(inputs.kwargs[name], x), name
