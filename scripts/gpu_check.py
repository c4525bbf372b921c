"""What scripts/gpu_check.sh runs: one step after the other, each in a process of its own and within a time limit.

A kernel that fails takes its process's GPU context with it: the other steps start with a new one. A step is "ok",
"failed", "skipped" (it says why) or "out of time", and a step that is none of "ok" and "skipped" makes the exit status
1. The benchmark's own targets are reported, met or missed, and change nothing about the status.

Nothing that has been found is lost: the result is written anew after each step, a step that computes writes its own
after each problem, and one whose time is over is interrupted, so that it can print what it has, before it is killed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "build" / "gpu-check"  # where OUT does not name another place
RESULTS = ROOT / "bench" / "results"
LIBRARIES = ("_C_cpu.so", "_C_cuda.so")
SCHEMA = 2

TOTAL_S = 460
GRACE_S = 10  # between an interrupt and the end
# A step's own limit is for the day on which something hangs, and all of them together are more than TOTAL_S. So this is
# what the steps before these leave them: 210 s remain for what comes before memcheck. What compute-sanitizer takes goes
# by launches: memcheck watches some 340 of our kernels, racecheck and synccheck 220 each.
LEAST_S = {"memcheck": 50, "bench": 90, "racecheck": 60, "synccheck": 40}
# The tests' plain code takes some 300 s of one core, of which attention's case table has 190 and the longest single
# test 30. From three processes on that is enough, with 40 s to start and for what Inductor compiles.
PARITY_S = 150
TAIL = 4000  # characters of a step's output that its entry keeps
LONG_TAIL = 20_000
SANITIZED_KERNELS = "kernel_entry"  # csrc/cuda/launcher.cuh: PyTorch's own kernels are none of our business
GPU_TESTS = tuple(f"tests/test_cuda{name}.py" for name in ("", "_torch", "_packed", "_additive", "_hard", "_summary"))
# Of tests/test_cuda.py, what has a step of its own.
HAVE_STEPS = ("test_large", "test_gradients_are_slopes", "test_50_repeats_are_bit_equal")
# What compiles at run time keeps its results here: there may be no home folder that can be written to.
CACHES = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "MPLCONFIGDIR": "matplotlib",
    "CUDA_CACHE_PATH": "cuda",
}


@dataclass
class Outcome:
    name: str
    status: str = "ok"  # ok | failed | skipped | out of time
    seconds: float = 0.0
    summary: str = ""
    detail: dict[str, Any] = field(default_factory=dict)
    output: str = ""  # the end of it: the benchmark's, and that of steps that did not end well

    @property
    def is_good(self) -> bool:
        return self.status in ("ok", "skipped")


@dataclass(frozen=True)
class Finished:
    status: int | None  # None: it was stopped when its time was over
    output: str


class Stopped(BaseException):
    """By a signal, whose name is the text."""


def stop_on_signals() -> None:
    def stop(number: int, frame: object) -> None:
        for each in signals:
            signal.signal(each, signal.SIG_IGN)  # once is enough, and the result is still to be written
        raise Stopped(signal.Signals(number).name)

    signals = (signal.SIGINT, signal.SIGTERM)
    for each in signals:
        signal.signal(each, stop)


# ------------------------------------------------------------------------------------------------ processes and results


def run_limited(command: list[str], limit_s: float, log: Path, environment: dict[str, str] | None = None) -> Finished:
    """Stdout and stderr go to the log. All that the command has started ends with it."""
    return run_together([(command, log)], limit_s, environment)[0]


def run_together(
    commands: Sequence[tuple[list[str], Path]], limit_s: float, environment: dict[str, str] | None = None
) -> list[Finished]:
    """Commands with their logs, all at the same time. Those whose time is over are interrupted, and then killed."""
    deadline = time.monotonic() + max(1.0, limit_s)
    processes: list[subprocess.Popen[bytes]] = []
    grace_s = 0.0
    try:
        for command, log in commands:
            processes.append(start(command, log, environment))  # each is known before the next one starts
        statuses: list[int | None] = [wait(process, deadline) for process in processes]
        grace_s = GRACE_S
    finally:  # where a signal came, without grace
        end(processes, grace_s)
    logs = (log.read_text(encoding="utf-8", errors="replace") for _, log in commands)
    return [Finished(status, text) for status, text in zip(statuses, logs, strict=True)]


def start(command: list[str], log: Path, environment: dict[str, str] | None) -> subprocess.Popen[bytes]:
    log.parent.mkdir(parents=True, exist_ok=True)
    caches = {name: str(LOGS / "cache" / folder) for name, folder in CACHES.items()}
    always = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", **caches}
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell makes its background jobs deaf to it, and all that they start: no step could be asked to end.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with log.open("wb") as file:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **always, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its own process group, which is what is stopped
        )


def wait(process: subprocess.Popen[bytes], deadline: float) -> int | None:
    try:
        return process.wait(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None


def end(processes: Sequence[subprocess.Popen[bytes]], grace_s: float) -> None:
    running = [process for process in processes if process.poll() is None]
    for number, seconds in ((signal.SIGINT, grace_s), (signal.SIGKILL, 5.0)):
        deadline = time.monotonic() + seconds
        for process in running if seconds else []:
            # A leader that has ended may have left others of its group behind.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        for process in running:
            wait(process, deadline)  # one that the driver holds cannot even be killed: it is left alone


def conclude(name: str, finished: Finished, result: Path | None = None, tail: int = TAIL) -> Outcome:
    """From an exit status and, where the step writes one, its result file."""
    outcome = Outcome(name)
    written = read_report(result) if result else None
    if written is not None:
        outcome.status, outcome.summary, outcome.detail = written["status"], written["summary"], written["detail"]
    elif result is not None and finished.status == 0:
        outcome.status, outcome.summary = "failed", "it left no result"
    if finished.status is None:
        outcome.status = "failed" if outcome.status == "failed" else "out of time"
        outcome.summary = f"stopped when its time was over; {outcome.summary}".removesuffix("; ")
    elif finished.status != 0:
        outcome.status = "failed"
        outcome.summary = f"{outcome.summary}; exit status {finished.status}".removeprefix("; ")
    if not outcome.is_good:
        outcome.output = finished.output[-tail:]
    return outcome


def read_report(path: Path) -> dict[str, Any] | None:
    """What a step has written, gpu_steps.Report; None where there is nothing of the kind."""
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return written if isinstance(written, dict) and {"status", "summary", "detail"} <= written.keys() else None


def write_result(path: Path, document: dict[str, Any]) -> None:
    """All of it or nothing: whatever happens meanwhile, the file is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(without_paths(json.dumps(document, indent=2), path.parent) + "\n", encoding="utf-8")
    os.replace(partial, path)


def without_paths(text: str, results: Path) -> str:
    """Without the names of this machine's folders, which mean nothing on another one."""
    names = {str(ROOT): ".", str(results): "OUT", tempfile.gettempdir(): "TMP", os.path.expanduser("~"): "~"}
    for folder in sorted(names, key=len, reverse=True):
        if len(folder) > 1:
            text = re.sub(rf"(?<![\w./-]){re.escape(folder)}(?![\w-])", names[folder], text)
    return text


@dataclass(frozen=True)
class Place:
    """Where the result and the logs go. OUT: a folder, or a path that ends in .json."""

    folder: Path
    logs: Path
    file: Path | None = None  # None: it is named after the GPU

    @staticmethod
    def choose(out: str | None, device: str) -> Place:
        if not out:
            # bench/results itself is for what is worth keeping.
            return Place(RESULTS if device == "cuda" else RESULTS / "local", LOGS)
        path = Path(out).absolute()
        if path.suffix == ".json":
            return Place(path.parent, path.with_name(f"{path.stem}-logs"), path)
        return Place(path, path / "logs")

    def path(self, device_name: str, when: datetime.datetime) -> Path:
        slug = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") or "unknown"
        return self.file or self.folder / f"cuda-{slug.removeprefix('nvidia-')}-{when:%Y%m%d-%H%M%S}.json"


def describe_version() -> dict[str, Any]:
    """Of what it is that was checked."""
    package = ROOT / "fastattn"
    version = re.search(r'^__version__ = "(.*)"', (package / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE)
    commit = git("rev-parse", "HEAD")
    if commit and git("status", "--porcelain", "--untracked-files=no"):
        commit += "+"  # files differ from it
    libraries = [package / name for name in LIBRARIES]
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in libraries if path.exists()}
    return {"version": version[1] if version else "", "commit": commit, "sha256": hashes}


def git(*arguments: str) -> str:
    command = ["git", *arguments]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


# --------------------------------------------------------------------------------------------------------------- steps


class Check:
    """The steps as they are started, in order."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device: str = options.device
        self.began = datetime.datetime.now().astimezone()
        self.place = Place.choose(os.environ.get("OUT"), self.device)
        self.outcomes: list[Outcome] = []
        # The shell script may have begun a while ago.
        self.deadline = time.monotonic() + options.seconds - max(0.0, time.time() - options.started)
        self.steps: dict[str, Callable[[], Outcome]] = {
            "device": lambda: self.plain("device", 60),
            "build": self.build,
            "parity": self.parity,
            "sizes": lambda: self.plain("sizes", 100),
            "gradients": lambda: self.plain("gradients", 40),
            "repeats": lambda: self.plain("repeats", 60),
            "memcheck": lambda: self.sanitizer("memcheck", 120),
            "bench": self.bench,
            "racecheck": lambda: self.sanitizer("racecheck"),
            "synccheck": lambda: self.sanitizer("synccheck"),
        }
        # Whatever is asked for, the result says on what.
        asked = options.steps.split(",") if options.steps else list(self.steps)
        self.wanted = [name for name in self.steps if name in ("device", "build", *asked)]

    # -- time and place

    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def limit_s(self, name: str, most_s: float = float("inf")) -> float:
        """What a step may take, so that the steps after it have their least."""
        later = self.wanted[self.wanted.index(name) + 1 :] if name in self.wanted else []
        return min(most_s, self.left_s() - GRACE_S - sum(LEAST_S.get(step, 0) for step in later))

    def log(self, name: str) -> Path:
        return self.place.logs / f"{name}.log"

    @property
    def detail(self) -> dict[str, Any]:
        """What the first step found out about the device."""
        return self.outcomes[0].detail if self.outcomes else {}

    @property
    def result(self) -> Path:
        return self.place.path(str(self.detail.get("name", "")), self.began)

    def save(self) -> None:
        document = {
            "schema": SCHEMA,
            "fastattn": describe_version(),
            "device": self.detail,
            "date": self.began.isoformat(timespec="seconds"),
            "seconds": self.options.seconds - self.left_s(),
            "steps": [{key: value for key, value in asdict(outcome).items() if value} for outcome in self.outcomes],
        }
        write_result(self.result, document)

    # -- the steps

    def inside(
        self, name: str, limit_s: float, prefix: tuple[str, ...] = (), **environment: str
    ) -> tuple[Finished, Path]:
        """One of scripts/gpu_steps.py, in a process of its own."""
        result = self.place.logs / f"{name}.json"
        result.unlink(missing_ok=True)  # an earlier run's
        steps = str(ROOT / "scripts" / "gpu_steps.py")
        command = [*prefix, sys.executable, steps, name, f"--result={result}", f"--device={self.device}"]
        return run_limited(command, limit_s, self.log(name), environment), result

    def plain(self, name: str, most_s: float) -> Outcome:
        return conclude(name, *self.inside(name, self.limit_s(name, most_s)))

    def build(self) -> Outcome:
        """Takes what is in fastattn/. Compiles, for this GPU alone, what is missing or says that it cannot load."""
        outcome = self.load()
        is_missing = not all((ROOT / "fastattn" / name).exists() for name in LIBRARIES)
        if outcome.status == "ok" or self.device == "cpu" or not (is_missing or outcome.detail.get("cannot_load")):
            return outcome
        sys.path.insert(0, str(ROOT / "scripts"))
        import cuda_build

        try:
            cuda_build.find_toolkit()
        except cuda_build.Missing as missing:
            outcome.summary += f"; and it cannot be built here: {missing}"
            return outcome
        capability = str(self.detail.get("capability", cuda_build.VIRTUAL_ARCH))
        environment = {"FASTATTN_CUDA": "1", cuda_build.ARCHS_VARIABLE: capability}
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        finished = run_limited(command, self.limit_s("build"), self.log("build"), environment)
        if finished.status != 0:
            return conclude("build", finished)
        again = self.load()
        again.summary = f"built here: {again.summary}"
        return again

    def load(self) -> Outcome:
        return conclude("build", *self.inside("load", self.limit_s("build", 60)))

    def parity(self) -> Outcome:
        """The case table, and all else that the tests have for a GPU, in several processes: most of the time goes into
        plain code on the CPU.
        """
        if not has_module("pytest"):
            return Outcome("parity", "failed", summary="pytest is missing, which runs the tests: pip install pytest")
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--maxfail=20", "-p", "no:cacheprovider"]
        command += ["-o", "faulthandler_timeout=60"]
        if self.device == "cpu":
            command += ["tests/test_parity.py", "-k", "Lq16-Lk16-D24 and fp32"]
        else:
            command += GPU_TESTS
            command += [f"--deselect=tests/test_cuda.py::{name}" for name in HAVE_STEPS]
        count = 2 if self.device == "cpu" else count_processes(int(self.detail.get("memory_bytes", 0)))
        shards = [
            ([*command, "-p", "tests.shard", f"--shard={n}/{count}"], self.log(f"parity-{n}"))
            for n in range(1, count + 1)
        ]
        return judge_tests(run_together(shards, self.limit_s("parity", PARITY_S), {"OMP_NUM_THREADS": "1"}))

    def sanitizer(self, tool: str, most_s: float = float("inf")) -> Outcome:
        sanitizer = find_sanitizer()
        if self.device == "cpu" or sanitizer is None:
            return Outcome(tool, "skipped", summary="there is no compute-sanitizer here")
        prefix = (
            *(sanitizer, "--tool", tool, "--kernel-name", f"kns={SANITIZED_KERNELS}"),
            *("--error-exitcode", "9", "--report-api-errors", "no", "--print-limit", "20"),
        )
        # Every tensor an allocation of its own, so that its end is the end of what may be touched.
        limit_s = self.limit_s(tool, most_s)
        finished, result = self.inside(tool, limit_s, prefix, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        return judge_sanitizer(tool, finished, result)

    def bench(self) -> Outcome:
        if self.device == "cpu":
            return Outcome("bench", "skipped", summary="a CPU is not what this is about")
        result = self.place.logs / "bench.json"
        result.unlink(missing_ok=True)
        seconds = self.limit_s("bench")
        command = [sys.executable, "-m", "bench", "--suite", "cuda-targets", f"--json={result}"]
        command += [f"--plot={self.result.with_suffix('.png')}"]
        command += [f"--time-limit={max(10, seconds - 40):.0f}"]  # to start, to end what it has begun, and to plot
        finished = run_limited(command, seconds, self.log("bench"))
        outcome = conclude("bench", finished)
        outcome.output = finished.output[-LONG_TAIL:]
        with contextlib.suppress(OSError, ValueError):  # there is none, or half of one
            outcome.detail = json.loads(result.read_text(encoding="utf-8"))
            verdicts = count_verdicts(outcome.detail.get("targets", []))
            outcome.summary = f"{verdicts}; {outcome.summary}".removesuffix("; ")
        return outcome

    # -- all of them

    def run_steps(self) -> None:
        for name in self.wanted:
            begun = time.monotonic()
            outcome = Outcome(name, "failed")
            print(f"-- {name}", flush=True)
            try:
                if self.limit_s(name) < 5:
                    outcome = Outcome(name, "out of time", summary="the steps before took it all")
                else:
                    outcome = self.steps[name]()
            except Stopped as stopped:
                outcome.summary = f"stopped by {stopped}"
                raise
            except Exception as failure:  # the other steps are wanted all the same
                outcome.summary = f"{type(failure).__name__}: {failure}"
                outcome.output = traceback.format_exc()[-TAIL:]
            finally:
                outcome.seconds = time.monotonic() - begun
                self.outcomes.append(outcome)
            if outcome.output:
                print(outcome.output)
            print(f"   {outcome.status} in {outcome.seconds:.0f} s: {outcome.summary}", flush=True)
            if outcome.detail.get("no_gpu"):
                return
            self.save()
            if name in ("device", "build") and not outcome.is_good:
                return  # there is nothing that the others could work on


def has_module(name: str) -> bool:
    return subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, check=False).returncode == 0


def count_processes(memory_bytes: int) -> int:
    """Of tests: one core each, but for one that is left to others, and 4 GiB of the GPU's memory."""
    return max(1, min(12, len(os.sched_getaffinity(0)) - 1, memory_bytes >> 32))


def find_sanitizer() -> str | None:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [f"{home}/{part}" for home in [*homes, "/usr/local/cuda"] for part in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def judge_sanitizer(tool: str, finished: Finished, result: Path | None = None) -> Outcome:
    """A clean summary and a clean exit; a device that the tool refuses is a reason to skip."""
    outcome = conclude(tool, finished, result)
    refusal = r"^=========.*(Device not supported|is not supported on this (device|platform)|No supported)"
    if re.search(refusal, finished.output, re.IGNORECASE | re.MULTILINE):
        return Outcome(tool, "skipped", summary="compute-sanitizer refuses this device")
    found = re.search(r"^=========.*(?:ERROR|RACECHECK) SUMMARY: (.*)", finished.output, re.MULTILINE)
    says = found[1].strip() if found else "compute-sanitizer printed no summary"
    is_clean = re.match(r"0 (errors|hazards)\b", says) and not re.search(r"\(([1-9]\d*) error", says)
    outcome.summary = f"{says}; {outcome.summary}".removesuffix("; ")
    if outcome.status == "ok" and not is_clean:
        outcome.status, outcome.output = "failed", finished.output[-TAIL:]
    return outcome


def judge_tests(shards: list[Finished]) -> Outcome:
    """What several processes of pytest have to say together."""
    statuses = [shard.status for shard in shards]
    bad = [shard.output for shard in shards if shard.status != 0]
    each = LONG_TAIL // max(1, len(bad))
    output = "\n".join(text[-each:] for text in bad)
    status = None if None in statuses else next((status for status in statuses if status), 0)
    outcome = conclude("parity", Finished(status, output), tail=LONG_TAIL)
    for shard in shards:
        for word, count in count_tests(shard.output).items():
            outcome.detail[word] = outcome.detail.get(word, 0) + count
    counts = ", ".join(f"{count} {word}" for word, count in outcome.detail.items()) or "pytest counted no tests"
    outcome.summary = f"{counts}; {outcome.summary}".removesuffix("; ")
    if outcome.status == "ok" and not outcome.detail.get("passed"):
        outcome.status, outcome.output = "failed", shards[0].output[-LONG_TAIL:]
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


def format_summary(outcomes: list[Outcome]) -> str:
    width = max(len(outcome.name) for outcome in outcomes)
    return "\n".join(
        f"{outcome.name:<{width}}  {outcome.status:<11}  {outcome.seconds:5.0f} s  {outcome.summary}"
        for outcome in outcomes
    )


def check(options: argparse.Namespace) -> int:
    checker = Check(options)
    for folder in (checker.place.folder, checker.place.logs):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        checker.run_steps()
    except Stopped as stopped:
        print(f"gpu_check: stopped by {stopped}", file=sys.stderr)
        checker.save()
    outcomes = checker.outcomes
    if checker.detail.get("no_gpu"):
        print(f"gpu_check: there is no GPU to check: {outcomes[0].summary}", file=sys.stderr)
        return 2
    print("\n" + format_summary(outcomes))
    print(f"\nJSON: {checker.result}\nLogs: {checker.place.logs}")
    print(f"{options.seconds - checker.left_s():.0f} s in all", flush=True)
    is_complete = len(outcomes) == len(checker.wanted)
    return 0 if is_complete and all(outcome.is_good for outcome in outcomes) else 1


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_check.sh", description="Checks the CUDA kernels on this machine's GPU."
    )
    names = "device, build, parity, sizes, gradients, repeats, memcheck, bench, racecheck, synccheck"
    parser.add_argument("--steps", metavar="NAMES", help=f"some of {names}, comma separated; the first two always run")
    parser.add_argument("--seconds", type=float, default=TOTAL_S, help=f"for all of it (default {TOTAL_S})")
    parser.add_argument(
        "--device",
        choices=["cuda", "cpu"],
        default="cuda",
        help="cpu: a rehearsal of the steps themselves, on tiny problems",
    )
    parser.add_argument("--started", type=float, default=time.time(), help=argparse.SUPPRESS)  # of the Unix clock
    options = parser.parse_args()
    unknown = set((options.steps or "").split(",")) - {"", *names.split(", ")}
    if unknown:
        parser.error(f"there is no step {', '.join(sorted(unknown))}; there are {names}")
    stop_on_signals()
    try:
        return check(options)
    except OSError as error:
        print(f"gpu_check: the result cannot be written: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
