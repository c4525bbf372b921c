"""scripts/gpu_check.sh: what it makes of its steps' output, that nothing is lost, and a rehearsal without a GPU."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from .cases import make_inputs

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import gpu_check  # noqa: E402
import gpu_steps  # noqa: E402
from gpu_check import Check, Finished, Outcome, Place  # noqa: E402

MEMCHECK = "========= COMPUTE-SANITIZER\nok: 8 cases in 3 dtypes\n========= ERROR SUMMARY: {} errors\n"
RACECHECK = "========= RACECHECK SUMMARY: {} hazards displayed ({} errors, {} warnings)\n"
REFUSED = "========= Error: Device not supported\n"


def options(**changed: Any) -> argparse.Namespace:
    defaults = {"steps": None, "seconds": 400.0, "device": "cuda", "started": time.time()}
    return argparse.Namespace(**{**defaults, **changed})


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    monkeypatch.setenv("OUT", str(tmp_path))
    return Check(options())


# -------------------------------------------------------------------------------------------------------- what is said


@pytest.mark.parametrize(
    ("finished", "status", "summary"),
    [
        (Finished(0, MEMCHECK.format(0)), "ok", "0 errors"),
        (Finished(9, MEMCHECK.format(3)), "failed", "3 errors; exit status 9"),
        (Finished(0, MEMCHECK.format(3)), "failed", "3 errors"),
        (Finished(1, MEMCHECK.format(0)), "failed", "0 errors; exit status 1"),
        (Finished(0, RACECHECK.format(0, 0, 0)), "ok", "0 hazards displayed (0 errors, 0 warnings)"),
        (Finished(9, RACECHECK.format(1, 1, 0)), "failed", "1 hazards displayed (1 errors, 0 warnings); exit status 9"),
        (Finished(0, "no words of the tool"), "failed", "compute-sanitizer printed no summary"),
        (Finished(1, "Traceback"), "failed", "compute-sanitizer printed no summary; exit status 1"),
        (
            Finished(None, "========= COMPUTE-SANITIZER\n"),
            "out of time",
            "compute-sanitizer printed no summary; stopped when its time was over",
        ),
        (Finished(1, REFUSED), "skipped", "compute-sanitizer refuses this device"),
        # The program's own words are no refusal.
        (Finished(9, "x is not supported on this device\n" + MEMCHECK.format(3)), "failed", "3 errors; exit status 9"),
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


def test_what_several_processes_of_pytest_say() -> None:
    fine = Finished(0, "10 passed, 1 skipped in 2.00s")
    outcome = gpu_check.judge_tests([fine, fine])
    assert (outcome.status, outcome.summary, outcome.output) == ("ok", "20 passed, 2 skipped", "")
    outcome = gpu_check.judge_tests([fine, Finished(1, "FAILED x\n1 failed, 9 passed in 2.00s")])
    assert (outcome.status, outcome.summary) == ("failed", "19 passed, 1 skipped, 1 failed; exit status 1")
    assert outcome.output.startswith("FAILED x")
    outcome = gpu_check.judge_tests([Finished(None, "4 passed in 150.00s"), fine])
    assert outcome.status == "out of time"
    assert outcome.summary == "14 passed, 1 skipped; stopped when its time was over"
    outcome = gpu_check.judge_tests([Finished(0, "3 skipped in 0.10s")])
    assert (outcome.status, outcome.summary) == ("failed", "3 skipped")


def test_verdicts_are_counted() -> None:
    targets = [{"verdict": "met"}, {"verdict": "met"}, {"verdict": "MISSED"}]
    assert gpu_check.count_verdicts(targets) == "3 targets: 2 met, 1 missed, 0 not measured"


def test_a_step_s_own_verdict_counts(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    result.write_text(json.dumps({"status": "failed", "summary": "2 outside", "detail": {"broken": ["a", "b"]}}))
    outcome = gpu_check.conclude("sizes", Finished(0, "a\nb\n"), result)
    assert outcome == Outcome("sizes", "failed", summary="2 outside", detail={"broken": ["a", "b"]}, output="a\nb\n")
    # What it found before its time was over is a failure all the same.
    outcome = gpu_check.conclude("sizes", Finished(None, "a\nb\n"), result)
    assert (outcome.status, outcome.summary) == ("failed", "stopped when its time was over; 2 outside")
    result.write_text(json.dumps({"status": "ok", "summary": "7 key heads", "detail": {}}))
    assert gpu_check.conclude("sizes", Finished(None, ""), result).status == "out of time"
    assert gpu_check.conclude("sizes", Finished(-6, ""), result).summary == "7 key heads; exit status -6"


@pytest.mark.parametrize("text", [None, "", '{"status": "ok", "sum', "[]", '{"status": "ok"}'])
def test_a_result_that_cannot_be_read(tmp_path: Path, text: str | None) -> None:
    result = tmp_path / "result.json"
    if text is not None:
        result.write_text(text)
    crashed = gpu_check.conclude("sizes", Finished(-6, "CUDA error"), result)
    assert (crashed.status, crashed.summary, crashed.output) == ("failed", "exit status -6", "CUDA error")
    assert gpu_check.conclude("sizes", Finished(None, ""), result).status == "out of time"
    silent = gpu_check.conclude("sizes", Finished(0, "?"), result)
    assert (silent.status, silent.summary) == ("failed", "it left no result")


def test_where_the_result_goes(tmp_path: Path) -> None:
    when = datetime.datetime(2026, 1, 2, 3, 4, 5)
    place = Place.choose(None, "cuda")
    assert place.path("NVIDIA H100 80GB HBM3", when) == (
        ROOT / "bench" / "results" / "cuda-h100-80gb-hbm3-20260102-030405.json"
    )
    assert place.logs == ROOT / "build" / "gpu-check"
    assert Place.choose("", "cpu").path("cpu", when).parent == ROOT / "bench" / "results" / "local"
    place = Place.choose(str(tmp_path), "cuda")
    assert place.path("", when) == tmp_path / "cuda-unknown-20260102-030405.json"
    assert place.logs == tmp_path / "logs"
    place = Place.choose(str(tmp_path / "a.json"), "cuda")
    assert (place.path("NVIDIA H200", when), place.logs) == (tmp_path / "a.json", tmp_path / "a-logs")


def test_the_result_names_no_folder_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "ROOT", Path("/srv/house"))
    monkeypatch.setattr(gpu_check.tempfile, "gettempdir", lambda: "/scratch")
    monkeypatch.setenv("HOME", "/home/me")
    text = '/srv/house/tests/a.py:7 in /scratch/run/logs, not /srv/house-old; "/home/me/b"; /x/scratch/run; /scratch/c'
    clean = './tests/a.py:7 in OUT/logs, not /srv/house-old; "~/b"; /x/scratch/run; TMP/c'
    assert gpu_check.without_paths(text, Path("/scratch/run")) == clean


def test_what_was_checked_is_named() -> None:
    found = gpu_check.describe_version()
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", found["version"])
    assert re.fullmatch(r"([0-9a-f]{40}\+?)?", found["commit"])
    assert len(found["sha256"]["_C_cpu.so"]) == 64


# ------------------------------------------------------------------------------------------------------ nothing is lost

CHILD = """
import subprocess, sys, time
print('begun', flush=True)
subprocess.run([sys.executable, '-c', "import time; print('child', flush=True); time.sleep(60)"])
"""
TALKER = """
import time
print('begun', flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print('found so far', flush=True)
"""
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('begun', flush=True); time.sleep(60)"
)


# Generous, for the machine may be busy with other tests: only what will not go takes all of its time.
START_S, GRACE_S = 4.0, 30.0


@pytest.mark.parametrize(
    ("script", "output", "grace_s"),
    [(CHILD, "begun\nchild\n", GRACE_S), (TALKER, "begun\nfound so far\n", GRACE_S), (STUBBORN, "begun\n", 1.0)],
    ids=["with a child", "that says what it has", "that will not go"],
)
def test_a_step_is_ended_when_its_time_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, output: str, grace_s: float
) -> None:
    monkeypatch.setattr(gpu_check, "GRACE_S", grace_s)
    begun = time.monotonic()
    finished = gpu_check.run_limited([sys.executable, "-c", script], START_S, tmp_path / "log")
    assert time.monotonic() - begun < 50  # of the 60 that it would take
    assert finished.status is None
    assert finished.output.startswith(output)


def test_several_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "GRACE_S", GRACE_S)
    scripts = ["print('a')", TALKER, "import sys; print('c'); sys.exit(3)"]
    commands = [([sys.executable, "-c", script], tmp_path / f"{n}.log") for n, script in enumerate(scripts)]
    first, second, third = gpu_check.run_together(commands, START_S)
    assert (first, third) == (Finished(0, "a\n"), Finished(3, "c\n"))
    assert second == Finished(None, "begun\nfound so far\n")


def test_a_step_that_raises_takes_none_along(check: Check, tmp_path: Path) -> None:
    """Nor what was found before it: the result is there, and whole, after each step."""
    seen: list[list[str]] = []

    def outcome(name: str, **found: Any) -> Callable[[], Outcome]:
        def step() -> Outcome:
            documents = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
            seen.append([entry["name"] for document in documents for entry in document["steps"]])
            return Outcome(name, **found)

        return step

    def broken() -> Outcome:
        raise RuntimeError(f"no words for it: {ROOT}/scripts")

    device = {"name": "NVIDIA H100", "memory_bytes": 80 << 30}
    check.steps = {"device": outcome("device", detail=device), "build": outcome("build"), "sizes": broken}
    check.steps["bench"] = outcome("bench", summary="2 targets")
    check.wanted = list(check.steps)
    check.run_steps()
    assert seen == [[], ["device"], ["device", "build", "sizes"]]
    document = json.loads(check.result.read_text())
    assert check.result.name.startswith("cuda-h100-2")
    sizes, bench = document["steps"][2:]
    assert sizes["summary"] == "RuntimeError: no words for it: ./scripts"
    assert "Traceback" in sizes["output"]
    assert str(ROOT) not in check.result.read_text()
    assert bench["summary"] == "2 targets"


def run_check(check: Check, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(gpu_check, "Check", lambda options: check)
    return gpu_check.check(check.options)


def test_only_the_device_step_says_that_there_is_no_gpu(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    check.steps["device"] = lambda: Outcome("device", "failed", summary="torch finds no GPU", detail={"no_gpu": True})
    assert run_check(check, monkeypatch) == 2
    assert not check.result.exists()


@pytest.mark.parametrize("status", ["out of time", "failed"])
def test_a_device_that_does_not_answer_is_a_failure(check: Check, monkeypatch: pytest.MonkeyPatch, status: str) -> None:
    check.steps["device"] = lambda: Outcome("device", status, output="torch._C._cuda_init() ...")
    assert run_check(check, monkeypatch) == 1
    assert json.loads(check.result.read_text())["steps"][0]["status"] == status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_the_result(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "gpu_check.py"), "--device=cpu", "--steps=gradients"]
    path = tmp_path / "result.json"
    environment = {**os.environ, "OUT": str(path)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line == "-- gradients\n":
                break
        time.sleep(1)
        process.send_signal(number)
        rest, errors = process.communicate(timeout=30)
    assert process.returncode == 1, rest + errors
    assert f"stopped by {number.name}" in errors
    steps = json.loads(path.read_text())["steps"]
    assert [step["status"] for step in steps] == ["ok", "ok", "failed"]
    assert steps[2]["summary"] == f"stopped by {number.name}"


# ------------------------------------------------------------------------------------------------------ single steps


def test_time_is_left_for_the_steps_that_follow(check: Check) -> None:
    assert list(check.steps) == check.wanted
    assert check.wanted.index("memcheck") < check.wanted.index("bench") < check.wanted.index("racecheck")
    least = sum(gpu_check.LEAST_S.values())
    assert check.limit_s("sizes") == pytest.approx(400 - gpu_check.GRACE_S - least, abs=5)
    assert check.limit_s("sizes", 60) == 60
    memcheck = check.limit_s("sizes") + gpu_check.LEAST_S["memcheck"]
    assert check.limit_s("memcheck") == pytest.approx(memcheck, abs=1)
    assert check.limit_s("bench") == pytest.approx(memcheck + gpu_check.LEAST_S["bench"], abs=1)
    assert check.limit_s("synccheck") == pytest.approx(400 - gpu_check.GRACE_S, abs=5)
    # What a shell script took before counts, and what is not asked for needs no time.
    late = Check(options(steps="sizes", started=time.time() - 40))
    assert late.limit_s("sizes") == pytest.approx(360 - gpu_check.GRACE_S, abs=5)


def test_parity_leaves_time_for_all_steps() -> None:
    """Even where it takes all of its own: 50 s for those before memcheck, and for the others what they need."""
    before_memcheck = gpu_check.TOTAL_S - gpu_check.GRACE_S - sum(gpu_check.LEAST_S.values())
    assert before_memcheck - gpu_check.PARITY_S >= 50
    assert gpu_check.TOTAL_S < 8 * 60


def test_steps_without_time_say_so(check: Check) -> None:
    check.steps = dict.fromkeys(check.steps, lambda: Outcome("x", detail={"name": "NVIDIA H100"}))
    check.deadline = time.monotonic() + sum(gpu_check.LEAST_S.values())  # and none for GRACE_S
    check.run_steps()
    assert [outcome.status for outcome in check.outcomes] == ["out of time"]
    assert check.outcomes[0].summary == "the steps before took it all"


@pytest.mark.parametrize(
    ("loaded", "libraries", "is_built"),
    [
        (Outcome("build"), gpu_check.LIBRARIES, False),
        (Outcome("build", "out of time"), gpu_check.LIBRARIES, False),
        (Outcome("build", "failed", summary="exit status -11"), gpu_check.LIBRARIES, False),
        (Outcome("build", "failed", detail={"cannot_load": False}), gpu_check.LIBRARIES, False),  # an old GPU
        (Outcome("build", "failed", detail={"cannot_load": True}), gpu_check.LIBRARIES, True),
        (Outcome("build", "failed"), gpu_check.LIBRARIES[:1], True),
    ],
)
def test_what_is_there_is_taken(
    check: Check,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    loaded: Outcome,
    libraries: tuple[str, ...],
    is_built: bool,
) -> None:
    commands: list[list[str]] = []

    def run_limited(command: list[str], *arguments: Any) -> Finished:
        commands.append(command)
        return Finished(1, "no compiler")

    (tmp_path / "fastattn").mkdir()
    for name in libraries:
        (tmp_path / "fastattn" / name).touch()
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check, "run_limited", run_limited)
    monkeypatch.setattr(check, "load", lambda: loaded)
    import cuda_build

    monkeypatch.setattr(cuda_build, "find_toolkit", lambda: None)
    outcome = check.build()
    assert [command[1:] for command in commands] == [["setup.py", "build_ext", "--inplace"]] * is_built
    assert outcome.status == ("failed" if is_built else loaded.status)


@pytest.mark.parametrize(("status", "verdict"), [(0, "ok"), (1, "failed"), (None, "out of time")])
def test_the_benchmark_s_result_is_taken(
    check: Check, monkeypatch: pytest.MonkeyPatch, status: int | None, verdict: str
) -> None:
    def run_limited(command: list[str], limit_s: float, log: Path) -> Finished:
        given = dict(part.removeprefix("--").split("=") for part in command if "=" in part)
        assert 0 < float(given["time-limit"]) < limit_s
        assert Path(given["plot"]).parent == check.result.parent
        from bench.__main__ import parse

        parse(command[3:])  # it has these options
        result = Path(given["json"])
        result.parent.mkdir(parents=True)
        result.write_text(json.dumps({"targets": [{"verdict": "met"}, {"verdict": "MISSED"}], "rows": []}))
        return Finished(status, "a table")

    monkeypatch.setattr(gpu_check, "run_limited", run_limited)
    outcome = check.bench()
    assert outcome.status == verdict
    assert outcome.summary.startswith("2 targets: 1 met, 1 missed, 0 not measured")
    assert outcome.output == "a table"
    assert len(outcome.detail["targets"]) == 2


def test_processes_of_tests() -> None:
    cores = len(os.sched_getaffinity(0))
    assert gpu_check.count_processes(80 << 30) == max(1, min(12, cores - 1))
    assert gpu_check.count_processes(3 << 30) == 1
    assert gpu_check.count_processes(0) == 1


def test_every_test_on_a_gpu_is_run() -> None:
    texts = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py")}
    on_gpu = [name for name, text in texts.items() if re.search(r"^from \.gpu_checks import", text, re.MULTILINE)]
    assert sorted(f"tests/{name}" for name in on_gpu) == sorted(gpu_check.GPU_TESTS)


def test_what_has_a_step_is_a_test() -> None:
    text = (ROOT / "tests" / "test_cuda.py").read_text(encoding="utf-8")
    for name in gpu_check.HAVE_STEPS:
        assert f"def {name}(" in text


# ---------------------------------------------------------------------------------------------------- compute-sanitizer


def test_compute_sanitizer_looks_at_our_kernels() -> None:
    """Every kernel is an instance of the one function whose name it goes by."""
    sources = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu*"))]
    names = [name for text in sources for name in re.findall(r"__global__\s+void[^;{]*?\b(\w+)\(const ", text)]
    assert names == [gpu_check.SANITIZED_KERNELS]
    assert sum(text.count("__global__ ") for text in sources) == 1


def every_kernel() -> set[str]:
    """Their names, from the sources."""
    headers = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "csrc" / "cuda").glob("*.cuh"))]
    values = [value for text in headers for value in re.findall(r"\bkName = ([^;]*);", text)]
    return {name for value in values for name in re.findall(r'"(\w+)"', value)}


@pytest.mark.parametrize("multiprocessors", [20, 132])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_compute_sanitizer_sees_every_kernel(dtype: torch.dtype, multiprocessors: int) -> None:
    from .additive import first_of_each_kind, make_additive_inputs
    from .choices import sanitized_choices
    from .emulated import compute_emulated
    from .emulated_additive import compute_emulated_additive
    from .emulated_choices import compute_hard, compute_summary
    from .emulated_packed import compute_emulated_cache, compute_emulated_packed
    from .kv_cache_calls import Call
    from .packed import PackedProblem

    launched = {"dropout_mask"}  # by an operator of its own
    runs = [compute_emulated(make_inputs(case, dtype), multiprocessors=multiprocessors)
            for case in gpu_steps.sanitized_cases()]  # fmt: skip
    runs += [compute_emulated_additive(make_additive_inputs(case, dtype)) for case in first_of_each_kind()]
    for case in sanitized_choices():
        inputs = make_inputs(case, dtype)
        runs += [compute_hard(inputs, multiprocessors=multiprocessors), compute_summary(inputs)]
    runs += [compute_emulated_packed(PackedProblem(case, dtype), multiprocessors=multiprocessors)
             for case in gpu_steps.sanitized_packed()]  # fmt: skip
    for cached in gpu_steps.sanitized_caches():
        launched |= set(compute_emulated_cache(Call(cached, dtype), multiprocessors=multiprocessors)[1])
    for _, ran in runs:
        launched |= {name for run in ran.values() for name in run["kernels"]}
    launched.add("zero_rows")  # where a gradient is absent
    assert launched == every_kernel()


def test_the_documentation_names_every_kernel() -> None:
    page = (ROOT / "docs" / "cuda-kernels.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    assert every_kernel() <= {name for row in rows for name in re.findall(r"`(\w+)`", row)}


# -------------------------------------------------------------------------------------------------------- rehearsals


def test_rehearsal(tmp_path: Path) -> None:
    """The steps that compute, on the CPU."""
    command = [str(ROOT / "scripts" / "gpu_check.sh"), "--device=cpu"]
    command += ["--steps=parity,sizes,gradients,repeats,memcheck,bench"]
    environment = {**os.environ, "OUT": "here", "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (tmp_path / "here").glob("*.json")
    document = json.loads(path.read_text())
    steps = {step["name"]: step for step in document["steps"]}
    assert list(steps) == ["device", "build", "parity", "sizes", "gradients", "repeats", "memcheck", "bench"]
    assert [step["status"] for step in steps.values()] == ["ok"] * 6 + ["skipped"] * 2
    assert steps["parity"]["detail"]["passed"] > 1
    assert steps["sizes"]["summary"].startswith("4 key heads, 0 results outside the bound")
    assert set(steps["sizes"]["detail"]["error_over_plain"]) >= {"bf16 o", "fp32 dq"}
    assert steps["repeats"]["summary"] == "30 problems 2 times, 0 not the same bit for bit"
    assert document["device"]["name"] == "cpu"
    assert document["fastattn"]["sha256"]
    assert f"JSON: {path}" in done.stdout
    passed = [gpu_check.count_tests(log.read_text())["passed"] for log in (path.parent / "logs").glob("parity-*.log")]
    assert len(passed) == 2
    assert sum(passed) == steps["parity"]["detail"]["passed"]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_rehearsal_of_what_compute_sanitizer_watches(tool: str) -> None:
    reports = list(gpu_steps.STEPS[tool]("cpu"))
    assert {report.status for report in reports} == {"ok"}
    assert reports[-1].summary.endswith("and the mask of dropout")


def test_what_is_too_large_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = gpu_steps.check_heads

    def check_heads(device: str, case: Any, dtype: torch.dtype) -> Any:
        if dtype == torch.float32:
            raise torch.OutOfMemoryError
        return heads(device, case, dtype)

    monkeypatch.setattr(gpu_steps, "check_heads", check_heads)
    first, last = gpu_steps.check_sizes("cpu")
    assert last.status == "ok"
    assert last.detail["left_out"] == ["fp32-dense-Lq1-Lk96-D16-B2-gqa4"]
    assert last.summary.startswith(first.summary)
    monkeypatch.setattr(gpu_steps, "check_heads", lambda *_: check_heads("cpu", None, torch.float32))
    assert list(gpu_steps.check_sizes("cpu"))[-1].status == "failed"


def test_the_steps_do_without_pytest() -> None:
    code = "import sys; sys.modules['pytest'] = None; import tests.cases, tests.compare, tests.gpu, bench.cases"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_unknown_steps(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--steps", "sizes,sized"])
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main()
    assert "there is no step sized; there are device, build" in capsys.readouterr().err
