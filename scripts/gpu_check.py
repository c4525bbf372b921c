"""What scripts/gpu_check.sh runs: one step after the other, each in a process of its own and within a time limit.

A kernel that fails takes its process's GPU context with it: the other steps start with a new one. A step is "ok",
"failed", "skipped" (it says why) or "out of time", and a step that is none of "ok" and "skipped" makes the exit status
1. The benchmark's own targets are reported, met or missed, and change nothing about the status.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "build" / "gpu-check"
RESULTS = ROOT / "bench" / "results"
SCHEMA = 1

TOTAL_S = 460
BENCH_LEAST_S = 75  # the steps before it end early enough to leave it that much
TAIL = 4000  # characters of a step's output that its entry keeps
SANITIZED_KERNELS = "kernel_entry"  # csrc/cuda/launcher.cuh: PyTorch's own kernels are none of our business


@dataclass
class Outcome:
    name: str
    status: str = "ok"  # ok | failed | skipped | out of time
    seconds: float = 0.0
    summary: str = ""
    detail: dict[str, Any] = field(default_factory=dict)
    output: str = ""  # the end of it, where the step did not end well

    @property
    def is_good(self) -> bool:
        return self.status in ("ok", "skipped")


@dataclass(frozen=True)
class Finished:
    status: int | None  # None: it was stopped when its time was over
    output: str


def run_limited(command: list[str], limit_s: float, log: Path, environment: dict[str, str] | None = None) -> Finished:
    """Stdout and stderr go to the log. All that the command has started ends with it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(timeout=max(1.0, limit_s))
        except subprocess.TimeoutExpired:
            status = None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Finished(status, log.read_text(encoding="utf-8", errors="replace"))


def conclude(name: str, finished: Finished, result: Path | None = None) -> Outcome:
    """From an exit status and, where the step wrote one, its result file."""
    outcome = Outcome(name)
    if result is not None and result.exists():
        written = json.loads(result.read_text(encoding="utf-8"))
        outcome.status, outcome.summary = written["status"], written["summary"]
        outcome.detail = written["detail"]
    if finished.status is None:
        outcome.status = "out of time"
    elif finished.status != 0:
        outcome.status = "failed"
        outcome.summary = outcome.summary or f"exit status {finished.status}"
    if not outcome.is_good:
        outcome.output = finished.output[-TAIL:]
    return outcome


class Check:
    """The steps as they are started, in order."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device: str = options.device
        self.deadline = time.monotonic() + options.seconds
        self.folder = Path(tempfile.mkdtemp(prefix="fastattn-gpu-check-"))

    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def left_before_bench_s(self) -> float:
        return self.left_s() - BENCH_LEAST_S

    def inside(
        self, name: str, limit_s: float, prefix: tuple[str, ...] = (), **environment: str
    ) -> tuple[Finished, Path]:
        """One of scripts/gpu_steps.py, in a process of its own."""
        result = self.folder / f"{name}.json"
        steps = str(ROOT / "scripts" / "gpu_steps.py")
        command = [*prefix, sys.executable, steps, name, f"--result={result}", f"--device={self.device}"]
        return run_limited(command, min(limit_s, self.left_before_bench_s()), LOGS / f"{name}.log", environment), result

    def plain(self, name: str, limit_s: float) -> Outcome:
        return conclude(name, *self.inside(name, limit_s))

    def build(self) -> Outcome:
        """Takes what is in fastattn/ if it loads, and compiles for this GPU alone if not."""
        outcome = self.plain("load", 60)
        outcome.name = "build"
        if outcome.status == "ok" or self.device == "cpu":
            return outcome
        sys.path.insert(0, str(ROOT / "scripts"))
        import cuda_build

        try:
            cuda_build.find_toolkit()
        except cuda_build.Missing as missing:
            outcome.summary += f"; and it cannot be built here: {missing}"
            return outcome
        capability = ask_nvidia_smi("compute_cap").replace(".", "") or str(cuda_build.VIRTUAL_ARCH)
        environment = {"FASTATTN_CUDA": "1", cuda_build.ARCHS_VARIABLE: capability}
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        finished = run_limited(command, self.left_before_bench_s(), LOGS / "build.log", environment)
        if finished.status != 0:
            return conclude("build", finished)
        again = self.plain("load", 60)
        again.name, again.summary = "build", f"built here: {again.summary}"
        return again

    def parity(self) -> Outcome:
        """The case table, and all else that the tests have for a GPU."""
        tests = ["tests/test_cuda.py"]
        if self.device == "cpu":
            tests = ["tests/test_parity.py", "-k", "Lq16-Lk16-D24 and fp32"]
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--maxfail=40", "-p", "no:cacheprovider", *tests]
        if subprocess.run([sys.executable, "-c", "import xdist"], capture_output=True, check=False).returncode == 0:
            workers = max(1, min(12, len(os.sched_getaffinity(0)) - 2))
            command += ["-n", str(workers)]
        finished = run_limited(
            command, min(150, self.left_before_bench_s()), LOGS / "parity.log", {"OMP_NUM_THREADS": "1"}
        )
        outcome = conclude("parity", finished)
        outcome.detail = count_tests(finished.output)
        counts = ", ".join(f"{count} {word}" for word, count in outcome.detail.items())
        outcome.summary = counts or outcome.summary or "pytest printed no summary"
        if outcome.status == "ok" and not outcome.detail.get("passed"):
            outcome.status, outcome.output = "failed", finished.output[-TAIL:]
        return outcome

    def sanitizer(self, tool: str) -> Outcome:
        sanitizer = find_sanitizer()
        if self.device == "cpu" or sanitizer is None:
            return Outcome(tool, "skipped", summary="there is no compute-sanitizer here")
        prefix = (
            *(sanitizer, "--tool", tool, "--kernel-name", f"kns={SANITIZED_KERNELS}"),
            *("--error-exitcode", "9", "--report-api-errors", "no", "--print-limit", "20"),
        )
        # Every tensor an allocation of its own, so that its end is the end of what may be touched.
        finished, _ = self.inside("sanitized", 60, prefix, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        return judge_sanitizer(tool, finished)

    def bench(self) -> Outcome:
        if self.device == "cpu":
            return Outcome("bench", "skipped", summary="a CPU is not what this is about")
        result = self.folder / "bench.json"
        seconds = max(60.0, self.left_s() - 5)
        command = [sys.executable, "-m", "bench", "--suite", "cuda-targets", f"--json={result}"]
        command += [f"--time-limit={seconds - 40:.0f}"]  # to start, to end what it has begun, and to plot
        finished = run_limited(command, seconds, LOGS / "bench.log")
        outcome = conclude("bench", finished)
        if result.exists():
            outcome.detail = json.loads(result.read_text(encoding="utf-8"))
            outcome.summary = count_verdicts(outcome.detail.get("targets", []))
        return outcome

    def steps(self) -> dict[str, Callable[[], Outcome]]:
        return {
            "device": lambda: self.plain("device", 60),
            "build": self.build,
            "parity": self.parity,
            "sizes": lambda: self.plain("sizes", 60),
            "gradients": lambda: self.plain("gradients", 40),
            "repeats": lambda: self.plain("repeats", 50),
            "memcheck": lambda: self.sanitizer("memcheck"),
            "racecheck": lambda: self.sanitizer("racecheck"),
            "synccheck": lambda: self.sanitizer("synccheck"),
            "bench": self.bench,
        }


def ask_nvidia_smi(name: str) -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    command = [tool, f"--query-gpu={name}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def find_sanitizer() -> str | None:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [f"{home}/{part}" for home in [*homes, "/usr/local/cuda"] for part in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def judge_sanitizer(tool: str, finished: Finished) -> Outcome:
    """A clean summary and a clean exit; a device that the tool refuses is a reason to skip."""
    outcome = conclude(tool, finished)
    text = finished.output
    if re.search(r"Device not supported|is not supported on this (device|platform)|No supported", text, re.IGNORECASE):
        return Outcome(tool, "skipped", summary="compute-sanitizer refuses this device")
    found = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", text)
    if found is None:
        if outcome.status == "ok":
            outcome.status, outcome.output = "failed", text[-TAIL:]
        outcome.summary = outcome.summary or "compute-sanitizer printed no summary"
        return outcome
    outcome.summary = found[1].strip()
    is_clean = re.match(r"0 (errors|hazards)\b", outcome.summary) and not re.search(
        r"\(([1-9]\d*) error", outcome.summary
    )
    if outcome.status == "ok" and not is_clean:
        outcome.status, outcome.output = "failed", text[-TAIL:]
    return outcome


def count_tests(output: str) -> dict[str, int]:
    """pytest's last line: {"passed": 2400, "skipped": 3}."""
    lines = [line for line in output.splitlines() if re.search(r"\d+ \w+.* in [\d.]+s", line)]
    if not lines:
        return {}
    return {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", lines[-1])}


def count_verdicts(targets: list[dict[str, Any]]) -> str:
    counts = {word: sum(target["verdict"] == word for target in targets) for word in ("met", "MISSED", "not measured")}
    return f"{len(targets)} targets: " + ", ".join(f"{count} {word.lower()}" for word, count in counts.items())


def write_result(path: Path, document: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def result_path(device_name: str, out: str | None) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") or "unknown"
    name = f"cuda-{slug.removeprefix('nvidia-')}-{datetime.date.today():%Y-%m-%d}.json"
    if out and out.endswith(".json"):
        return Path(out)
    return Path(out or RESULTS) / name


def format_summary(outcomes: list[Outcome]) -> str:
    width = max(len(outcome.name) for outcome in outcomes)
    return "\n".join(
        f"{outcome.name:<{width}}  {outcome.status:<11}  {outcome.seconds:5.0f} s  {outcome.summary}"
        for outcome in outcomes
    )


def check(options: argparse.Namespace) -> int:
    started = time.monotonic()
    checker = Check(options)
    steps = checker.steps()
    wanted = options.steps.split(",") if options.steps else list(steps)
    outcomes: list[Outcome] = []
    for name in steps:
        # Whatever is asked for, the result says on what.
        if name not in wanted and name not in ("device", "build"):
            continue
        begun = time.monotonic()
        print(f"-- {name}", flush=True)
        if checker.left_before_bench_s() < 5 and name != "bench":
            outcome = Outcome(name, "out of time", summary="the steps before took it all")
        else:
            outcome = steps[name]()
        outcome.seconds = time.monotonic() - begun
        outcomes.append(outcome)
        if outcome.output:
            print(outcome.output)
        print(f"   {outcome.status} in {outcome.seconds:.0f} s: {outcome.summary}", flush=True)
        if name in ("device", "build") and not outcome.is_good:
            break  # there is nothing that the others could work on

    device = outcomes[0].detail
    if not outcomes[0].is_good:
        print(f"gpu_check: there is no GPU to check: {outcomes[0].summary}", file=sys.stderr)
        return 2
    path = result_path(str(device.get("name", "")), os.environ.get("OUT"))
    document = {
        "schema": SCHEMA,
        "device": device,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "seconds": time.monotonic() - started,
        "steps": [{key: value for key, value in asdict(outcome).items() if value} for outcome in outcomes],
    }
    write_result(path, document)
    shutil.rmtree(checker.folder, ignore_errors=True)
    bench = LOGS / "bench.log"
    if outcomes[-1].name == "bench" and bench.exists() and outcomes[-1].detail:
        print("\n" + bench.read_text(encoding="utf-8", errors="replace").strip())
    print("\n" + format_summary(outcomes))
    print(f"\nJSON: {path}\nLogs: {LOGS}\n{time.monotonic() - started:.0f} s in all")
    return 0 if all(outcome.is_good for outcome in outcomes) else 1


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_check.sh", description="Checks the CUDA kernels on this machine's GPU."
    )
    names = "device, build, parity, sizes, gradients, repeats, memcheck, racecheck, synccheck, bench"
    parser.add_argument("--steps", metavar="NAMES", help=f"some of {names}, comma separated; the first two always run")
    parser.add_argument("--seconds", type=float, default=TOTAL_S, help=f"for all of it (default {TOTAL_S})")
    parser.add_argument(
        "--device",
        choices=["cuda", "cpu"],
        default="cuda",
        help="cpu: a rehearsal of the steps themselves, on tiny problems",
    )
    options = parser.parse_args()
    unknown = set((options.steps or "").split(",")) - {"", *names.split(", ")}
    if unknown:
        parser.error(f"there is no step {', '.join(sorted(unknown))}; there are {names}")
    return check(options)


if __name__ == "__main__":
    sys.exit(main())
