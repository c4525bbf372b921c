"""`python -m fastattn selftest`: it passes here, and notices what it is for."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import __main__, _selftest


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """One type, one level, three calls."""
    monkeypatch.setattr(_selftest, "DTYPES", (torch.float32,))
    monkeypatch.setattr(_selftest, "_on_each_level", lambda levels: levels[-1:])
    some = [call for call in _selftest.calls() if call.name in ("attention", "lengths", "cache in pages")]
    assert len(some) == 3
    monkeypatch.setattr(_selftest, "calls", lambda: some)


def run() -> tuple[bool, list[str]]:
    out = io.StringIO()
    passed = _selftest.run(out)
    return passed, out.getvalue().splitlines()


@pytest.mark.parametrize("dtype", _selftest.DTYPES, ids=str)
@pytest.mark.parametrize("call", _selftest.calls(), ids=lambda call: call.name)
def test_every_call_passes(call: _selftest.Call, dtype: torch.dtype) -> None:
    tensors, wanted = _selftest.expect(call, dtype)
    report = _selftest.Report()
    report.check(call, dtype, fastattn.info().isa, tensors, wanted)
    assert not report.failures
    assert report.results == len(wanted.exact) > 0


def test_the_sample_has_every_function_and_argument() -> None:
    source = " ".join(_selftest.__loader__.get_source(_selftest.__name__).split())  # type: ignore[union-attr]
    for name in ("attention", "varlen_attention", "KVCache", "additive_attention", "hard_attention", "replaced_sdpa"):
        assert f"fastattn.{name}" in source
    for name in ("causal", "window", "scale", "softcap", "bias", "mask", "alibi_slopes", "sinks", "kv_lengths"):
        assert f"{name}=" in source or f'"{name}"' in source


@pytest.mark.usefixtures("short")
def test_it_ends_in_one_line() -> None:
    passed, lines = run()
    assert passed
    assert lines[0].startswith("float32 ")
    assert len(lines) == 2
    assert lines[1].startswith(f"fastattn {fastattn.__version__} selftest passed: ")
    assert f"on {fastattn.info().isas[0]}, " in lines[1]
    assert ("CUDA not tested: " in lines[1]) == (not _selftest._gpus()[0])


def spoil(change: Callable[[Tensor, int], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """fastattn.attention with its output changed; the number counts the calls."""
    real: Any = fastattn.attention
    count = 0

    def spoilt(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        nonlocal count
        count += 1
        o, lse = real(*args, **kwargs)
        return change(o, count), lse

    return spoilt


def one_element_wrong(o: Tensor, count: int) -> Tensor:
    wrong = torch.zeros_like(o)
    wrong.flatten()[7] = 1e-3
    return o + wrong


def blow_up(o: Tensor, count: int) -> Tensor:
    raise RuntimeError("no such instruction")


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (one_element_wrong, "float32, attention: o is off by "),
        (lambda o, count: o * torch.nan, "float32, attention: o has "),
        (lambda o, count: o * (1 + 1e-7 * (count % 2)), "float32, attention: o has other bits in a second run"),
        (blow_up, "float32, attention: RuntimeError: no such instruction"),
    ],
    ids=["one element", "NaN", "other bits", "an error"],
)
def test_it_notices(change: Callable[[Tensor, int], Tensor], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastattn, "attention", spoil(change))
    # A call takes the function when it is made.
    broken = _selftest._attention("attention", _selftest._inputs)
    monkeypatch.setattr(_selftest, "calls", lambda: [broken])
    passed, lines = run()
    assert not passed
    assert any(said in line for line in lines), lines
    assert "FAILURES in" in lines[-1]


@pytest.mark.parametrize("passes", [True, False])
def test_exit_status(passes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_selftest, "run", lambda: passes)
    with pytest.raises(SystemExit) as caught:
        __main__.main(["selftest"])
    assert caught.value.code == (not passes)
