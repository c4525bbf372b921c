"""docs/support-matrix.md is what the code says, and the calls that it says are served are served."""

from __future__ import annotations

import importlib
import platform
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn

from .conftest import supported_isas

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def matrix() -> ModuleType:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        return importlib.import_module("support_matrix")
    finally:
        sys.path.remove(str(ROOT / "scripts"))


@pytest.mark.slow
def test_the_page_is_what_the_code_says(matrix: ModuleType) -> None:
    """python scripts/support_matrix.py writes it."""
    assert matrix.page() == matrix.PAGE.read_text(encoding="utf-8")


def tensors_of(result: Any) -> list[Tensor]:
    parts = result if isinstance(result, tuple) else (result,)
    return [x for x in parts if isinstance(x, Tensor)]


def check_call(matrix: ModuleType, name: str, problem: Any, feature: Any) -> None:
    """The call gives numbers, forward and backward, where the page says that it is served, and raises where not."""
    arguments = matrix.arguments_of(name, problem, feature)
    refusal = matrix.refusal(name, problem, feature)
    function = getattr(fastattn, name)
    if arguments is None:
        assert refusal == ""
        return
    if refusal is not None:
        with pytest.raises((ValueError, TypeError), match=r"^fastattn: "):
            function(**arguments)
        return
    q = "query" if "query" in arguments else "q"
    if name not in ("attention_with_kv_cache", "attention_summary"):
        arguments[q].requires_grad_()
    results = tensors_of(function(**arguments))
    assert results
    for x in results:
        assert not x.isnan().any(), "NaN"
    flows = [x for x in results if x.requires_grad]
    if flows:
        torch.autograd.backward([x.nan_to_num(neginf=0.0).sum() for x in flows])
        assert arguments[q].grad.isfinite().all()


NAMES = (
    *("attention", "scaled_dot_product_attention", "varlen_attention", "attention_with_kv_cache"),
    *("additive_attention", "hard_attention", "attention_summary"),
)


def test_all_functions_are_called(matrix: ModuleType) -> None:
    assert set(NAMES) == set(matrix.FUNCTIONS)
    fused = {name for name in fastattn.__all__ if "attention" in name and name.islower()}
    plain = {"attention_weights", "merge_attention_states", "plot_attention"}
    assert fused - plain == set(NAMES), "the page lacks a function"


@pytest.mark.parametrize("name", NAMES)
def test_features_on_the_cpu(matrix: ModuleType, isa: str, name: str) -> None:
    for feature in (None, *matrix.FEATURES, matrix.TOGETHER):
        for dtype in matrix.DTYPES:
            check_call(matrix, name, matrix.replace(matrix.PLAIN, dtype=dtype), feature)


@pytest.mark.parametrize("name", NAMES)
def test_head_dims_on_the_cpu(matrix: ModuleType, name: str) -> None:
    for dim in matrix.HEAD_DIMS:
        for dtype in matrix.DTYPES:
            check_call(matrix, name, matrix.replace(matrix.PLAIN, dtype=dtype, D=dim, Dv=dim), None)


@pytest.mark.parametrize("name", NAMES)
def test_cuda_refuses_what_the_page_says(matrix: ModuleType, name: str) -> None:
    """A sample of the cells, each with the limit in its message."""
    for changes, limit in (({"dtype": torch.float64}, "float64"), ({"D": 257}, "at most 256")):
        assert limit in matrix.refusal(name, matrix.replace(matrix.PLAIN, device="cuda", **changes))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert matrix.refusal(name, matrix.replace(matrix.PLAIN, device="cuda", dtype=dtype, D=256)) is None


def test_only_own_words_count_as_a_refusal(matrix: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(**arguments: Any) -> None:
        raise ValueError("something else is wrong")

    monkeypatch.setattr(fastattn, "attention", breaks)
    with pytest.raises(ValueError, match="something else"):
        matrix.refusal("attention", matrix.PLAIN)


def test_levels_are_those_of_the_library(matrix: ModuleType) -> None:
    """What this processor has are the first of its architecture's, in the page's order."""
    architecture = {"x86_64": "x86-64", "AMD64": "x86-64"}.get(platform.machine(), platform.machine())
    own = [level.name for level in matrix.levels() if level.architecture in ("", architecture)]
    assert own[: len(supported_isas())] == supported_isas()


def test_levels_that_hand_on_name_another(matrix: ModuleType) -> None:
    there = {level.name: level for level in matrix.levels()}
    for level in there.values():
        if level.rest:
            assert there[level.rest].architecture == level.architecture
            assert level.has_bf16_dot, "nothing else is known to be added"
    assert there["baseline"].architecture == ""
    assert there["avx512_bf16"].rest == "avx512"
