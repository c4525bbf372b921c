"""scripts/gpu_check.sh: what it makes of its steps' output, and a rehearsal of steps without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import gpu_check  # noqa: E402
from gpu_check import Finished, Outcome  # noqa: E402

MEMCHECK = "========= COMPUTE-SANITIZER\nok: 8 cases in 3 dtypes\n========= ERROR SUMMARY: {} errors\n"
RACECHECK = "========= RACECHECK SUMMARY: {} hazards displayed ({} errors, {} warnings)\n"


@pytest.mark.parametrize(
    ("finished", "status", "summary"),
    [
        (Finished(0, MEMCHECK.format(0)), "ok", "0 errors"),
        (Finished(9, MEMCHECK.format(3)), "failed", "3 errors"),
        (Finished(0, MEMCHECK.format(3)), "failed", "3 errors"),
        (Finished(0, RACECHECK.format(0, 0, 0)), "ok", "0 hazards displayed (0 errors, 0 warnings)"),
        (Finished(9, RACECHECK.format(1, 1, 0)), "failed", "1 hazards displayed (1 errors, 0 warnings)"),
        (Finished(0, "no words of the tool"), "failed", "compute-sanitizer printed no summary"),
        (Finished(1, "Traceback"), "failed", "exit status 1"),
        (Finished(None, "========= COMPUTE-SANITIZER\n"), "out of time", "compute-sanitizer printed no summary"),
        (Finished(1, "========= Error: Device not supported\n"), "skipped", "compute-sanitizer refuses this device"),
    ],
)
def test_what_compute_sanitizer_says(finished: Finished, status: str, summary: str) -> None:
    outcome = gpu_check.judge_sanitizer("memcheck", finished)
    assert (outcome.status, outcome.summary) == (status, summary)
    assert bool(outcome.output) == (not outcome.is_good)


def test_what_pytest_says() -> None:
    lines = [
        "....F  [100%]",
        "FAILED tests/test_cuda.py::test_parity[x]",
        "1 failed, 2400 passed, 3 skipped in 61.20s (0:01:01)",
    ]
    assert gpu_check.count_tests("\n".join(lines)) == {"failed": 1, "passed": 2400, "skipped": 3}
    assert gpu_check.count_tests("= 1 skipped, 1 error in 0.08s =") == {"skipped": 1, "error": 1}
    assert gpu_check.count_tests("no tests ran in 0.01s") == {}
    assert gpu_check.count_tests("Traceback") == {}


def test_where_the_result_goes(tmp_path: Path) -> None:
    name = gpu_check.result_path("NVIDIA H100 80GB HBM3", None).name
    assert name.startswith("cuda-h100-80gb-hbm3-20")
    assert gpu_check.result_path("NVIDIA H200", None).parent == ROOT / "bench" / "results"
    assert gpu_check.result_path("NVIDIA H200", str(tmp_path)).parent == tmp_path
    assert gpu_check.result_path("NVIDIA H200", str(tmp_path / "a.json")) == tmp_path / "a.json"


def test_verdicts_are_counted() -> None:
    targets = [{"verdict": "met"}, {"verdict": "met"}, {"verdict": "MISSED"}]
    assert gpu_check.count_verdicts(targets) == "3 targets: 2 met, 1 missed, 0 not measured"


def test_a_step_is_ended_when_its_time_is_over(tmp_path: Path) -> None:
    """With all that it has started, and what it has printed by then is kept."""
    script = "import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', %r])"
    sleep = "import time; print('child', flush=True); time.sleep(60)"
    start = time.monotonic()
    finished = gpu_check.run_limited([sys.executable, "-c", script % sleep], 1.5, tmp_path / "log")
    assert time.monotonic() - start < 30
    assert finished == Finished(None, "begun\nchild\n")
    assert gpu_check.conclude("sizes", finished).status == "out of time"


def test_a_step_s_own_verdict_counts(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    result.write_text(json.dumps({"status": "failed", "summary": "2 outside", "detail": {"broken": ["a", "b"]}}))
    outcome = gpu_check.conclude("sizes", Finished(0, "a\nb\n"), result)
    assert outcome == Outcome("sizes", "failed", summary="2 outside", detail={"broken": ["a", "b"]}, output="a\nb\n")
    crashed = gpu_check.conclude("sizes", Finished(-6, "CUDA error"), tmp_path / "none.json")
    assert (crashed.status, crashed.summary) == ("failed", "exit status -6")


def test_rehearsal(tmp_path: Path) -> None:
    """The steps that compute, on the CPU."""
    command = [
        sys.executable,
        str(ROOT / "scripts" / "gpu_check.py"),
        "--device=cpu",
        "--steps=sizes,gradients,memcheck",
    ]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OUT": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.iterdir()
    document = json.loads(path.read_text())
    steps = {step["name"]: step for step in document["steps"]}
    assert list(steps) == ["device", "build", "sizes", "gradients", "memcheck"]
    assert [step["status"] for step in steps.values()] == ["ok", "ok", "ok", "ok", "skipped"]
    assert steps["sizes"]["summary"].startswith("4 key heads, 0 results outside the bound")
    assert set(steps["sizes"]["detail"]["error_over_plain"]) >= {"bf16 o", "fp32 dq"}
    assert document["device"]["name"] == "cpu"
    assert f"JSON: {path}" in done.stdout


def test_unknown_steps(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--steps", "sizes,sized"])
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main()
    assert "there is no step sized; there are device, build" in capsys.readouterr().err
