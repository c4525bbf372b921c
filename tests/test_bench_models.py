"""The benchmark of what serving a model takes: who is checked before being timed, and its command line."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fastattn
from bench import decoding, llama, model_targets, packed
from bench.__main__ import main, parse
from bench.decoding import Step
from bench.measure import WrongResult
from bench.packed import Batch
from bench.timing import Timing

TINY_BATCH = Batch("float32", count=4, shortest=3, longest=40, H=2, D=16)
TINY_STEP = Step("float32", Hq=4, Hkv=2, Lk=48, D=16)
BUDGET_S = 1e-3


@pytest.fixture(autouse=True)
def little_to_rotate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "ROTATED_BYTES", 1)


@pytest.mark.parametrize("batch", [TINY_BATCH, replace(TINY_BATCH, causal=True), replace(TINY_BATCH, direction="step")])
def test_packed(batch: Batch) -> None:
    """Dense has about as many visible pairs as the packed sequences; nobody counts padding."""
    result = packed.measure(batch, BUDGET_S)
    assert set(result.timings) == {packed.OURS, packed.DENSE, packed.PADDED}
    lengths = batch.lengths()
    wanted = sum(sum(i + 1 if batch.causal else n for i in range(n)) for n in lengths)
    assert result.pairs[packed.OURS] == result.pairs[packed.PADDED] == wanted
    assert 0.9 < result.pairs[packed.DENSE] / wanted < 1.1
    assert (min(lengths), max(lengths), len(lengths)) == (3, 40, 4)
    result.timings = {name: Timing((1.0,)) for name in result.timings} | {packed.PADDED: Timing((3.0,))}
    assert result.over_padded == 3.0
    assert result.of_dense == pytest.approx(wanted / result.pairs[packed.DENSE])
    assert batch.id in packed.table([result])
    assert json.loads(json.dumps(packed.as_dict(result)))["speedup_over_padding"] == 3.0


@pytest.mark.parametrize(
    "step",
    [
        TINY_STEP,
        replace(TINY_STEP, cache="paged"),
        replace(TINY_STEP, cache="int8"),
        replace(TINY_STEP, B=3, Lq=2, ragged=True),
    ],
    ids=lambda step: step.id,
)
def test_decoding(step: Step) -> None:
    result = decoding.measure(step, BUDGET_S)
    other = decoding.SDPA if step.cache == decoding.CONTIGUOUS else decoding.CONTIGUOUS
    assert set(result.timings) == {decoding.OURS, other, decoding.READ}
    assert step.read_bytes == sum(step.lengths()) * 2 * 2 * (
        16 * (1 if step.cache == "int8" else 4) + 4 * (step.cache == "int8")
    )
    result.timings[decoding.OURS] = Timing((2.0,))
    assert result.gbs == pytest.approx(step.read_bytes / 2e6)
    result.timings[decoding.READ] = Timing((1.0,))
    scales = 8 if step.cache == "int8" else 0  # bytes, beside a key's and a value's 16 numbers, which are not read
    assert result.stored_bytes * (1 + scales / 32) == step.B * step.Lk / sum(step.lengths()) * step.read_bytes
    assert result.of_bandwidth == pytest.approx(result.gbs / (result.stored_bytes * 1e-6))
    assert json.loads(json.dumps(decoding.as_dict(result)))["id"] == step.id
    assert step.id in decoding.table([result])


def spoilt(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: function(*args, **kwargs) * 1.1


def test_wrong_numbers_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastattn, "varlen_attention", spoilt(fastattn.varlen_attention))
    with pytest.raises(WrongResult, match="off by"):
        packed.measure(TINY_BATCH, BUDGET_S)
    monkeypatch.setattr(fastattn, "attention", spoilt(fastattn.attention))
    with pytest.raises(WrongResult, match="off by"):
        decoding.measure(TINY_STEP, BUDGET_S)


def test_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong step is a missed target; the others go on."""
    monkeypatch.setattr(model_targets, "DECODING", [(TINY_STEP, 85, 2.5), (replace(TINY_STEP, Lq=2), 85, None)])
    monkeypatch.setattr(model_targets, "PAGED", [replace(TINY_STEP, cache="paged")])
    monkeypatch.setattr(model_targets, "QUANTISED", replace(TINY_STEP, cache="int8"))
    judged = list(model_targets.decode_targets(BUDGET_S, lambda _: None))
    assert [target.quantity for target in judged] == [
        "% of read bandwidth", "x SDPA", "% of read bandwidth", "time / contiguous", "x tokens of bfloat16"
    ]  # fmt: skip
    assert all(target.measured is not None for target in judged)
    monkeypatch.setattr(fastattn, "attention", spoilt(fastattn.attention))
    judged = list(model_targets.decode_targets(BUDGET_S, lambda _: None))
    assert [target.verdict for target in judged[:2]] == ["MISSED", "MISSED"]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "batches", lambda quick: [TINY_BATCH, replace(TINY_BATCH, dtype="bfloat16")])
    monkeypatch.setattr(decoding, "steps", lambda quick: [TINY_STEP])
    path = tmp_path / "models.json"
    arguments = ["models", "--case", "decode,packed", "--dtype", "float32", "--budget", "0.001", "--plot", "none"]
    assert main([*arguments, "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert [x["id"] for x in found["packed"]] == [TINY_BATCH.id]
    assert [x["id"] for x in found["decode"]] == [TINY_STEP.id]
    assert TINY_BATCH.id in capsys.readouterr().out
    assert main(["models", "--list"]) == 0
    assert capsys.readouterr().out.split() == ["decode", "packed", "llama"]
    with pytest.raises(SystemExit):
        parse(["models", "--suite", "full"])
    with pytest.raises(SystemExit):
        parse(["models", "--peers", "flex"])


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny one, both phases: everybody is checked, and each implementation's attention is what was clocked."""
    config = json.loads(llama.CONFIG.read_text())
    tiny = config | {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    tiny |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(tiny))
    monkeypatch.setattr(llama, "CONFIG", path)
    monkeypatch.setattr(llama, "measure_memory", lambda phase, implementation: 1 << 20)
    phases = [llama.Phase(llama.PREFILL, 24, "float32"), llama.Phase(llama.DECODE, 24, "bfloat16")]
    results = list(llama.measure_all(phases, BUDGET_S))
    for phase, result in zip(phases, results, strict=True):
        assert set(result.timings) == set(result.attention_ms) == set(llama.IMPLEMENTATIONS)
        assert all(result.attention_ms[name] > 0 for name in llama.IMPLEMENTATIONS)
        assert json.loads(json.dumps(llama.as_dict(result)))["id"] == phase.id
    assert llama.table(results).count("prefill-24-float32") == 3
    monkeypatch.setattr(fastattn, "attention", spoilt(fastattn.attention))
    with pytest.raises(WrongResult, match="logits are off"):
        list(llama.measure_all(phases[:1], BUDGET_S))


def test_the_model_has_100_million_parameters() -> None:
    c = json.loads(llama.CONFIG.read_text())
    heads = c["num_attention_heads"] + 2 * c["num_key_value_heads"]
    attention = c["hidden_size"] * c["head_dim"] * (heads + c["num_attention_heads"])
    layer = attention + 3 * c["hidden_size"] * c["intermediate_size"] + 2 * c["hidden_size"]
    total = c["vocab_size"] * c["hidden_size"] + c["num_hidden_layers"] * layer
    assert 95e6 < total < 105e6
