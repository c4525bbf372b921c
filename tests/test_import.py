"""Importing fastattn where something is missing or wrong: every error says what to do."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fastattn
from fastattn import _requirements


def run(code: str, folder: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    path = {"PYTHONPATH": str(folder)} if folder else {}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | path | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package without compiled libraries."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(Path(fastattn.__file__).parent, tmp_path / "fastattn", ignore=ignored)
    return tmp_path / "fastattn"


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_without_torch() -> None:
    said = last_line(run("import sys; sys.modules['torch'] = None; import fastattn"))
    assert said.startswith("ImportError: fastattn: torch is not installed; install it first, ")


def test_a_module_that_torch_lacks_is_not_taken_for_torch(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import a_module_that_is_not_there\n", encoding="utf-8")
    root = Path(fastattn.__file__).parents[1]
    said = last_line(run("import fastattn", PYTHONPATH=f"{tmp_path}{os.pathsep}{root}"))
    assert said == "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"


@pytest.mark.parametrize("version", ["2.9.1+cu128", "2.2.0", "1.13.1"])
def test_an_old_torch(version: str) -> None:
    said = last_line(run(f"import torch; torch.__version__ = {version!r}; import fastattn"))
    assert said == (
        f"ImportError: fastattn: torch is {version}, and fastattn needs 2.10 or later: pip install --upgrade torch"
    )


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cpu", "2.14.1+cu130", "2.15.0a0+git1234", "3.0.0", "unknown"])
def test_other_torches(version: str) -> None:
    _requirements.check_torch(version)


def test_the_oldest_torch_is_the_one_that_is_built_for() -> None:
    root = Path(fastattn.__file__).parents[1]
    if not (root / "setup.py").exists():
        pytest.skip("this is an installed fastattn")
    setup, project = ((root / name).read_text(encoding="utf-8") for name in ("setup.py", "pyproject.toml"))
    target = re.search(r'^TORCH_TARGET_VERSION = "0x(\w\w)(\w\w)0{12}"', setup, re.MULTILINE)
    assert target is not None
    assert (int(target[1], 16), int(target[2], 16)) == _requirements.OLDEST_TORCH
    assert 'dependencies = ["torch>={}.{}"]'.format(*_requirements.OLDEST_TORCH) in project


def test_without_the_library(package: Path) -> None:
    said = last_line(run("import fastattn", package.parent))
    assert said.startswith(f"ImportError: fastattn: the compiled library {package / '_C_cpu.so'} is missing; install a")
    assert "`pip install --no-build-isolation .`" in said


def for_another_processor(library: bytes) -> bytes:
    """The machine of an ELF file stands in its bytes 18 and 19: 243 is RISC-V."""
    return library[:18] + bytes([243, 0]) + library[20:]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of ELF files")
@pytest.mark.parametrize("spoil", [for_another_processor, lambda library: b"text"], ids=["processor", "text"])
def test_a_library_that_does_not_load(package: Path, spoil: Callable[[bytes], bytes]) -> None:
    real = (Path(fastattn.__file__).parent / "_C_cpu.so").read_bytes()
    (package / "_C_cpu.so").write_bytes(spoil(real))
    said = last_line(run("import fastattn", package.parent))
    assert said.startswith("ImportError: fastattn: the compiled library _C_cpu.so does not load on this machine (")
    assert f"torch {torch.__version__}" in said
    assert "pip install --force-reinstall" in said


@pytest.mark.parametrize("level", ["mmx", "AVX2", "avx513"])
def test_an_unknown_level(level: str) -> None:
    said = last_line(run("import fastattn", FASTATTN_CPU_CAPABILITY=level))
    assert said.startswith(f'ValueError: fastattn: CPU capability "{level}" is unknown; it must be one of baseline, ')
    assert said.endswith("It was set by the environment variable FASTATTN_CPU_CAPABILITY.")


def test_import_is_light() -> None:
    """What takes torch seconds is not imported along: its compiler, and libraries that only some functions need."""
    heavy = ["torch._inductor", "torch._dynamo.convert_frame", "transformers", "matplotlib", "numpy.testing"]
    code = (
        f"import sys, torch; old = set(sys.modules); import fastattn; print(set({heavy!r}) & (set(sys.modules) - old))"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "set()"
