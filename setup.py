"""Builds fastattn's compiled libraries; everything else about the package is in pyproject.toml.

``fastattn/_C_cpu.so`` is a plain shared library over LibTorch's stable ABI: no Python symbols, no C++ torch symbols and
no OpenMP, so that one wheel serves every CPython >= 3.10 and every torch >= 2.10. ``csrc/sources.txt`` lists what goes
in. Environment:

* ``MAX_JOBS``: compilers at once; by default as many as cores and free memory allow.
* ``FASTATTN_CUDA``: ``0``, ``1`` or ``auto`` (default). This version has no CUDA sources, so that ``1`` is an error.
* ``FASTATTN_DEBUG``: ``1`` builds with ``-O0 -g``.
"""

from __future__ import annotations

import os
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10, the oldest torch that the library loads under
# What one compiler takes at most; the heaviest files are the per-ISA kernels.
JOB_MEMORY_BYTES = 2 << 30

DEBUG = os.environ.get("FASTATTN_DEBUG", "0") == "1"
# No -march: code beyond baseline x86-64 lives in csrc/cpu/isa_*.cpp, inside target regions of its own.
FLAGS = [
    "-std=c++20",
    *(["-O0", "-g"] if DEBUG else ["-O3", "-g0"]),
    "-fno-wrapv",  # Python's own flags, which come first, would have it
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
]
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
# Spares torch's headers the warnings.
SYSTEM_INCLUDES = [flag for path in include_paths() for flag in ("-isystem", path)]


def read_sources(group: str) -> list[str]:
    """Paths, relative to this file, of one group of ``csrc/sources.txt``."""
    lines = (ROOT / "csrc" / "sources.txt").read_text(encoding="utf-8").splitlines()
    entries = [line.split() for line in lines if line.strip() and not line.startswith("#")]
    return [f"csrc/{path}" for name, path in entries if name == group]


def check_cuda_choice() -> None:
    choice = os.environ.get("FASTATTN_CUDA", "auto").lower()
    if choice not in ("0", "1", "auto"):
        raise SystemExit(f"FASTATTN_CUDA is {choice!r}; it must be 0, 1 or auto.")
    if choice == "1" and not read_sources("cuda"):
        raise SystemExit("FASTATTN_CUDA=1, but this version of fastattn has no CUDA sources; use 0 or auto.")


def default_jobs() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        meminfo = Path("/proc/meminfo").read_text(encoding="utf-8")
        available = (
            int(next(line.split()[1] for line in meminfo.splitlines() if line.startswith("MemAvailable"))) * 1024
        )
    except (OSError, StopIteration):
        return cores
    return max(1, min(cores, available // JOB_MEMORY_BYTES))


class Wheel(bdist_wheel):  # type: ignore[misc]
    """The library links nothing of Python's, so that the wheel is for every Python 3, on one platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


check_cuda_choice()
os.environ.setdefault("MAX_JOBS", str(default_jobs()))

setup(
    ext_modules=[
        CppExtension(
            "fastattn._C_cpu",
            [*read_sources("cpu"), *read_sources("torch")],
            # Absolute: ninja compiles in the build folder.
            include_dirs=[str(ROOT / "csrc")],
            define_macros=[
                ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
                ("FASTATTN_BUILD_FLAGS", f'"{" ".join(FLAGS)}"'),
            ],
            extra_compile_args=[*FLAGS, *WARNINGS, *SYSTEM_INCLUDES],
            # --as-needed and --no-undefined: link libtorch's C functions and nothing else, and notice what is missing.
            extra_link_args=[
                "-Wl,--as-needed",
                "-Wl,--no-undefined",
                "-Wl,--exclude-libs,ALL",
                *([] if DEBUG else ["-s"]),
            ],
            py_limited_api=True,
        )
    ],
    cmdclass={
        "build_ext": BuildExtension.with_options(no_python_abi_suffix=True, use_ninja=True),
        "bdist_wheel": Wheel,
    },
)
