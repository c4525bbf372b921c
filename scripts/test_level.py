"""Runs the tests with one instruction set level in use throughout: `python scripts/test_level.py avx2 -- -k causal`.

The level is the process's own, by FASTATTN_CPU_CAPABILITY, so that everything runs on it that does not ask for another.
What is the same on every level stays out: the emulator, the examples, the tools. On a processor that lacks the level
nothing can be tested; that is said, and no failure.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VARIABLE = "FASTATTN_CPU_CAPABILITY"
SAME_ON_EVERY_LEVEL = (
    "test_bench",
    "test_cuda",
    "test_docstrings",
    "test_emulator",
    "test_examples",
    "test_gpu",
    "test_readme",
    "test_symbols",
    "test_transformers",
    "test_wheel",
    "test_workflows",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("level", help="baseline, avx2, avx512 or avx512_bf16; on ARM baseline, neon or neon_bf16")
    parser.add_argument("arguments", nargs="*", metavar="ARGUMENT", help="passed on to pytest, after --")
    options = parser.parse_args()
    unforced = {name: value for name, value in os.environ.items() if name != VARIABLE} | {"PYTHONPATH": str(ROOT)}
    environment = unforced | {VARIABLE: options.level}
    question = [sys.executable, "-c", "import fastattn; print(*fastattn.info().isas)"]
    levels = subprocess.run(question, cwd=ROOT, env=unforced, check=True, capture_output=True, text=True).stdout.split()
    if options.level not in levels:
        refused = subprocess.run(question, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)
        reason = refused.stderr.strip().splitlines()[-1]
        if "is unknown" in reason:
            raise SystemExit(f"test-level: {reason}")
        print(f"test-level: NOTHING WAS TESTED: {reason}")
        return
    files = [
        str(path)
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        if not path.name.startswith(SAME_ON_EVERY_LEVEL)
    ]
    command = [sys.executable, "-m", "pytest", "-n", "auto", "--maxprocesses", "8", "--dist", "worksteal"]
    sys.exit(subprocess.run([*command, *options.arguments, *files], cwd=ROOT, env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
