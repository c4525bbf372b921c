"""Installs a wheel as a user would, under several versions of torch and Python, and tries what was installed.

    python scripts/test_wheel.py dist/fastattn-0.1.0-py3-none-manylinux_2_28_x86_64.whl --torch torch==2.13.0

Every combination is a fresh environment. What runs there runs outside of the source tree, with no compiler on PATH:

* `pip check`: the wheel's requirements are met
* `python -m fastattn selftest`: parity of every function on every level, against plain operations
* under a torch with CUDA, the CUDA library must load; GPUs, where there are any, are part of the selftest
* how much `import fastattn` adds to `import torch`, and the first call to that
* a second interpreter refuses a forced level that does not exist, with the reason

Each torch is tried with the first Python, each other Python with one torch.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 10)
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "nvcc", "ninja", "cmake", "make")

# Runs in the environment. Seconds go to the first line, what the rest is judged by to the second.
TRY = """
import shutil, sys, time
compilers = [name for name in {compilers!r} if shutil.which(name)]
assert not compilers, compilers
start = time.perf_counter(); import torch
torch_s = time.perf_counter() - start
start = time.perf_counter(); import fastattn
import_s = time.perf_counter() - start
q = torch.randn(2, 4, 100, 64, requires_grad=True)
start = time.perf_counter(); o = fastattn.attention(q, q, q, causal=True)
call_s = time.perf_counter() - start
o.sum().backward()
print(f"import torch {{torch_s:.2f}} s, fastattn {{import_s * 1000:.0f}} ms more, first call {{call_s * 1000:.1f}} ms")
print(torch.version.cuda is not None, fastattn._cuda.missing is None, fastattn.__file__, fastattn._cuda.missing)
"""


@dataclass(frozen=True)
class Combination:
    """An environment to try the wheel in."""

    python: str
    torch: str


def pythons() -> list[str]:
    """One interpreter for each version that can make an environment: this one first, then PATH's and pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    names = (shutil.which(f"python3.{minor}") for minor in range(OLDEST_PYTHON[1], 20))
    candidates = [sys.executable, *(name for name in names if name), *map(str, sorted(pyenv.glob("*/bin/python3")))]
    found: dict[tuple[int, int], str] = {}
    for candidate in candidates:
        code = "import ensurepip, sys; print(*sys.version_info[:2], int(hasattr(sys, '_is_gil_enabled')))"
        answer = subprocess.run([candidate, "-c", code], check=False, capture_output=True, text=True)
        if answer.returncode == 0:
            major, minor = map(int, answer.stdout.split()[:2])
            if (major, minor) >= OLDEST_PYTHON:
                found.setdefault((major, minor), candidate)
    return list(found.values())


def run(command: list[str], environment: dict[str, str], folder: Path) -> str:
    """What a command prints; its failure is the end."""
    done = subprocess.run(command, cwd=folder, env=environment, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"test-wheel: {' '.join(command)} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def try_wheel(wheel: Path, combination: Combination, folder: Path) -> None:
    """Install the wheel into an environment in ``folder`` and run everything."""
    start = time.monotonic()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "FASTATTN_"))}
    venv, outside = folder / "venv", folder / "elsewhere"
    outside.mkdir()
    run([combination.python, "-m", "venv", str(venv)], environment, outside)
    python = str(venv / "bin" / "python")
    quiet = ["--quiet", "--disable-pip-version-check", "--no-input"]
    run([python, "-m", "pip", "install", *quiet, combination.torch, str(wheel)], environment, outside)
    run([python, "-m", "pip", "check", "--disable-pip-version-check"], environment, outside)
    installed_s = time.monotonic() - start

    environment["PATH"] = str(venv / "bin")
    seconds, facts = run([python, "-c", TRY.format(compilers=COMPILERS)], environment, outside).splitlines()
    torch_has_cuda, cuda_is_loaded, file, missing = facts.split(" ", 3)
    if not Path(file).is_relative_to(venv):
        raise SystemExit(f"test-wheel: {file} was imported, not what was installed into {venv}")
    with zipfile.ZipFile(wheel) as content:
        has_cuda = "fastattn/_C_cuda.so" in content.namelist()
    if has_cuda and torch_has_cuda == "True" and cuda_is_loaded != "True":
        raise SystemExit(f"test-wheel: under {combination.torch}, which has CUDA, {missing}")
    last = run([python, "-m", "fastattn", "selftest"], environment, outside).splitlines()[-1]
    refused = subprocess.run(
        [python, "-c", "import fastattn"],
        env=environment | {"FASTATTN_CPU_CAPABILITY": "mmx"},
        cwd=outside,
        check=False,
        capture_output=True,
        text=True,
    )
    if refused.returncode == 0 or "FASTATTN_CPU_CAPABILITY" not in refused.stderr:
        raise SystemExit(f"test-wheel: FASTATTN_CPU_CAPABILITY=mmx was not refused\n{refused.stderr}")
    cuda = "CUDA library loaded" if cuda_is_loaded == "True" else f"CUDA library not loaded: {missing}"
    version = run([python, "-c", "import platform; print(platform.python_version())"], environment, outside).strip()
    print(f"Python {version}, {combination.torch}: installed in {installed_s:.0f} s; {seconds}; {cuda}")
    print(f"  {last}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--torch", nargs="+", required=True, metavar="SPEC", help="torch==2.10.0 and the like")
    parser.add_argument("--torch-of-others", metavar="SPEC", help="for all but the first Python; default: the last")
    parser.add_argument("--python", nargs="+", metavar="PATH", help="interpreters; default: all that are found")
    options = parser.parse_args()
    if not re.fullmatch(r"fastattn-.*\.whl", options.wheel.name) or not options.wheel.is_file():
        parser.error(f"{options.wheel} is not a wheel of fastattn: make wheel builds one")
    interpreters = options.python or pythons()
    combinations = [Combination(interpreters[0], torch) for torch in options.torch]
    others = options.torch_of_others or options.torch[-1]
    combinations += [Combination(python, others) for python in interpreters[1:]]
    for combination in combinations:
        # A torch with CUDA takes 5 GB: one environment at a time.
        with tempfile.TemporaryDirectory(prefix="fastattn-wheel-") as folder:
            try_wheel(options.wheel.resolve(), combination, Path(folder))
    print(f"test-wheel: {options.wheel.name} passed in {len(combinations)} environments")


if __name__ == "__main__":
    main()
