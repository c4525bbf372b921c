"""The examples run, and fail where they say they would."""

from __future__ import annotations

import argparse
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


EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py") if path.stem != "common")


def run(name: str, *options: str, as_file: bool = False, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    program = [str(ROOT / "examples" / f"{name}.py")] if as_file else ["-m", f"examples.{name}"]
    command = [sys.executable, *program, "--threads=1", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_train_vit_digits(tmp_path: Path) -> None:
    out, plot = tmp_path / "result.json", tmp_path / "plots" / "digits.png"
    done = run("train_vit_digits", "--smoke", f"--json={out}", f"--plot={plot}")
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
        ({"early_difference": 1e-3}, "difference of the losses, 20 steps 0.001"),
        ({"loss_difference": 0.1}, "difference of the losses, all steps 0.1"),
        ({"calls_served": 0}, "served 0"),
        ({"calls_handed_back": {"dtype": 3}}, "handed back to PyTorch 3"),
        ({"models": {"fastattn": {"accuracy": 0.94}}}, "fastattn: digits right 0.94"),
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
    assert all(promise.is_kept for promise in example.promises(good, example.ACCURACY))
    broken = [str(p) for p in example.promises(good | change, example.ACCURACY) if not p.is_kept]
    assert len(broken) == 1
    assert message in broken[0]


# What the result of each holds: a number, and what it must be between after the few steps of a smoke run.
NUMBERS: dict[str, dict[str, tuple[float, float]]] = {
    "caption_digits": {"models.soft.accuracy": (0.1, 1), "models.hard.accuracy": (0.1, 1)},
    "char_gpt": {"held_back_loss": (1, 3.2), "counting_losses.counting letters": (3, 3.5)},
    "numpy_walkthrough": {"difference": (0, 1e-12), "textbook.scores.0": (2, 2), "textbook.weights.0": (0.665, 0.666)},
    "speech_tones": {"accuracy": (0.1, 1), "monotonic": (0, 1)},
    "translate_dates": {"models.Bahdanau.characters": (0.25, 1), "models.Luong.characters": (0.25, 1)},
}


def test_every_example_is_tested_and_documented() -> None:
    assert {*NUMBERS, "train_vit_digits"} == set(EXAMPLES)
    page = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    for name in EXAMPLES:
        assert f"| `examples/{name}.py` |" in page, name


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NUMBERS))
def test_smoke_run(name: str, tmp_path: Path) -> None:
    out, plot = tmp_path / "result.json", tmp_path / "plots" / "plot.png"
    done = run(name, "--smoke", f"--json={out}", f"--plot={plot}")
    assert done.returncode == 0, done.stderr
    assert "is promised" in done.stdout
    assert "100%" in done.stderr, "a progress bar"
    result = json.loads(out.read_text())
    for path, (low, high) in NUMBERS[name].items():
        value: Any = result
        for key in path.split("."):
            value = value[int(key) if isinstance(value, list) else key]
        assert low <= value <= high, f"{path} is {value}"
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_an_example_runs_as_a_file_too(tmp_path: Path) -> None:
    done = run("numpy_walkthrough", as_file=True, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "numpy_walkthrough.png").exists()


@pytest.mark.parametrize("is_met", [True, False])
def test_a_promise_that_is_not_kept_is_an_exit_status_of_1(
    is_met: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = load("common")
    options = argparse.Namespace(json=tmp_path / "result.json")
    promises = [
        common.Promise("accuracy", 0.99 if is_met else 0.98, 0.99),
        common.Promise("loss", 1.5, 1.5, at_most=True),
    ]
    if is_met:
        common.finish(options, {"a": 1}, promises)
    else:
        with pytest.raises(SystemExit, match=r"Not reached: accuracy 0.98 \(at least 0.99 is promised\)$") as raised:
            common.finish(options, {"a": 1}, promises)
        assert isinstance(raised.value.code, str), "which Python prints, and exits with 1"
    assert json.loads(options.json.read_text()) == {"a": 1}
    assert "loss 1.5 (at most 1.5 is promised)" in capsys.readouterr().out


def test_not_a_number_keeps_no_promise() -> None:
    common = load("common")
    assert not common.Promise("loss", float("nan"), 1.0, at_most=True).is_kept
    assert not common.Promise("accuracy", float("nan"), 0.0).is_kept
