"""fastattn under Hugging Face transformers: tests/transformers_checks, on transformers 4.57 and on 5.

Each version runs in a process of its own, with all of its tests: importing transformers takes as long as they do.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHECKS = Path(__file__).parent / "transformers_checks"
# Where the Makefile installs transformers 4; version 5 is in .venv.
TRANSFORMERS4 = Path(sys.prefix) / "transformers4"


def run(*command: str, folders: tuple[Path, ...] = ()) -> subprocess.CompletedProcess[str]:
    # A process of pytest-xdist tells its children so; they are none.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join(str(path) for path in (*folders, ROOT))
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("version", ["4", "5"])
def test_checks_pass_on_transformers(version: str) -> None:
    if version == "4" and not (TRANSFORMERS4 / ".installed").exists():
        pytest.skip(f"there is no transformers 4 in {TRANSFORMERS4}: make {TRANSFORMERS4}/.installed")
    folders = (CHECKS, TRANSFORMERS4) if version == "4" else (CHECKS,)
    options = ("-q", "-n", "0", "-p", "no:cacheprovider", "-p", "harness", "-o", "python_files=check_*.py")
    done = run("-m", "pytest", *options, str(CHECKS), folders=folders)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(rf"^transformers {version}\.\d+", done.stdout, re.MULTILINE), done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 100
    assert " skipped" not in done.stdout


def test_nothing_is_imported_before_it_is_used_and_a_missing_library_is_named() -> None:
    code = """
import sys
sys.modules["transformers"] = None  # importing it fails
import fastattn
assert "fastattn.integrations.transformers" not in sys.modules
integration = fastattn.integrations.transformers
assert "transformers" in dir(fastattn.integrations)
try:
    integration.register()
except ImportError as error:
    print(error)
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("fastattn: transformers is not installed; ")
    assert "pip install" in done.stdout
