"""The examples run, and fail where they say they would."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytest.importorskip("sklearn", reason="scikit-learn, which has the digits, is not installed")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_train_vit_digits(tmp_path: Path) -> None:
    out, plot = tmp_path / "result.json", tmp_path / "plots" / "digits.png"
    command = [
        sys.executable,
        "-m",
        "examples.train_vit_digits",
        "--smoke",
        "--threads=1",
        f"--json={out}",
        f"--plot={plot}",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Largest difference of the loss curves" in done.stdout
    result = json.loads(out.read_text())
    assert set(result["models"]) == {"PyTorch SDPA", "fastattn"}
    assert result["loss_difference"] < 1e-4
    assert result["calls_served"] == 4 * result["steps"]
    for model in result["models"].values():
        assert len(model["losses"]) == result["steps"]
        assert model["losses"][-1] < 0.95 * model["losses"][0]
        assert model["attention_ms"] > 0
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"early_difference": 1e-3}, "at the start"),
        ({"loss_difference": 0.1}, "losses differ by"),
        ({"calls_served": 0}, "fastattn served 0 calls"),
        ({"calls_handed_back": {"dtype": 3}}, "handed back"),
        ({"models": {"fastattn": {"accuracy": 0.94}}}, "94.0% of the digits"),
    ],
)
def test_train_vit_digits_fails_where_the_trainings_differ(change: dict[str, Any], message: str) -> None:
    example = load("train_vit_digits")
    good: dict[str, Any] = {
        "steps": 10,
        "early_difference": 1e-7,
        "loss_difference": 1e-6,
        "calls_served": 10 * example.DEPTH,
        "calls_handed_back": {},
        "models": {"fastattn": {"accuracy": 0.97}, "PyTorch SDPA": {"accuracy": 0.97}},
    }
    example.check(good, example.ACCURACY)
    with pytest.raises(AssertionError, match=message):
        example.check(good | change, example.ACCURACY)
