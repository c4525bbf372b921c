"""Builds fastattn's compiled libraries; everything else about the package is in pyproject.toml.

``fastattn/_C_cpu.so`` and, where there is nvcc, ``fastattn/_C_cuda.so`` are plain shared libraries over LibTorch's
stable ABI: no Python symbols, no C++ torch symbols and no OpenMP, so that one wheel serves every CPython >= 3.10 and
every torch >= 2.10, with or without CUDA. ``csrc/sources.txt`` lists what goes in. Environment:

* ``MAX_JOBS``: compilers at once; by default as many as cores and free memory allow.
* ``FASTATTN_CUDA``: ``0`` builds without the CUDA kernels, ``1`` with them or not at all, ``auto`` (default) with them
  where nvcc is found: on PATH, in CUDA_HOME or in /usr/local/cuda. torch need not have CUDA.
* ``FASTATTN_CUDA_ARCHS``: the GPUs to compile for, ``80;90;100;120`` by default. Later ones compile the PTX of sm_80.
* ``FASTATTN_DEBUG``: ``1`` builds with ``-O0 -g``.
* ``FASTATTN_GLIBC``: the oldest glibc to load on, such as ``2.28``, as wheels need it; by default that of this system.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths, library_paths

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "scripts"))
import cuda_build  # noqa: E402
import glibc_stubs  # noqa: E402

TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10, the oldest torch that the library loads under
# What one compiler takes at most; the heaviest files are the per-ISA kernels.
JOB_MEMORY_BYTES = 2 << 30

DEBUG = os.environ.get("FASTATTN_DEBUG", "0") == "1"
# No -march: code beyond the processor's baseline lives in csrc/cpu/isa_*.cpp, inside target regions of its own.
OPTIMISE = ["-O0", "-g"] if DEBUG else ["-O3"]
FLAGS = [
    "-std=c++20",
    *OPTIMISE,
    *([] if DEBUG else ["-g0"]),
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


def choose_cuda() -> tuple[cuda_build.Toolkit | None, str]:
    """What to build the CUDA library with. None: it is not built, for the reason that comes with it."""
    choice = os.environ.get("FASTATTN_CUDA", "auto").lower()
    if choice not in ("0", "1", "auto"):
        raise SystemExit(f"fastattn: FASTATTN_CUDA is {choice!r}; it must be 0, 1 or auto.")
    if choice == "0":
        return None, "FASTATTN_CUDA=0"
    try:
        if not any(path.endswith(".cu") for path in read_sources("cuda")):
            raise cuda_build.Missing("csrc/sources.txt lists no .cu file")
        return cuda_build.find_toolkit(), ""
    except cuda_build.Missing as missing:
        if choice == "1":
            raise SystemExit(f"fastattn: FASTATTN_CUDA=1, but {missing}.") from None
        return None, str(missing)


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


class Wheel(bdist_wheel):
    """The library links nothing of Python's, so that the wheel is for every Python 3, on one platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


class Build(BuildExtension):
    """torch's own way for the CPU library, scripts/cuda_build.py's for the CUDA library."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, no_python_abi_suffix=True, use_ninja=True, **kwargs)

    def run(self) -> None:
        inplace = self.inplace or self.editable_mode  # the former is off while the base class runs
        super().run()
        if toolkit is None:
            print(f"fastattn: built without the CUDA kernels: {why_without_cuda}")
            # One of older sources must not meet the new CPU library.
            for folder in [Path(self.build_lib), *([ROOT] if inplace else [])]:
                (folder / "fastattn" / "_C_cuda.so").unlink(missing_ok=True)

    def build_extensions(self) -> None:
        everything = self.extensions
        self.extensions = [extension for extension in everything if extension.name != CUDA_LIBRARY]
        super().build_extensions()
        self.extensions = everything
        if toolkit is None:
            return
        cuda_build.build(
            Path(self.get_ext_fullpath(CUDA_LIBRARY)),
            toolkit,
            read_sources("cuda"),
            [*read_sources("torch"), *read_sources("cuda_torch")],
            binding_flags=[*FLAGS, *WARNINGS, "-fPIC", DEFINE_TARGET, f"-I{ROOT / 'csrc'}", *SYSTEM_INCLUDES],
            # One symbol stays undefined, that of the current stream. It is in libtorch_cuda.so, to which libtorch.so
            # leads wherever torch has CUDA; a torch without CUDA has an empty libtorch.so, which will do for linking.
            link_flags=[
                *OLD_GLIBC,
                *(f"-L{path}" for path in library_paths()),
                *("-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", "-ltorch_cpu", "-lc10"),
                "-Wl,--exclude-libs,ALL",
                *STRIP,
            ],
            optimise=OPTIMISE,
            jobs=os.environ["MAX_JOBS"],
        )


def link_flags() -> list[str]:
    """Links libtorch's C functions and nothing else, and leaves out the names of what is internal."""
    if sys.platform == "darwin":
        return ["-Wl,-dead_strip_dylibs", *([] if DEBUG else ["-Wl,-x"])]
    # --no-undefined: notice what is missing.
    return [*OLD_GLIBC, "-Wl,--as-needed", "-Wl,--no-undefined", "-Wl,--exclude-libs,ALL", *STRIP]


CUDA_LIBRARY = "fastattn._C_cuda"
DEFINE_TARGET = f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"
STRIP = [] if DEBUG else ["-s"]
# Before every library of the system.
OLD_GLIBC = (
    glibc_stubs.make_stubs(shlex.split(os.environ.get("CXX") or "c++"), glibc, ROOT / "build" / "glibc")
    if (glibc := os.environ.get(glibc_stubs.VARIABLE))
    else []
)
toolkit, why_without_cuda = choose_cuda()
os.environ.setdefault("MAX_JOBS", str(default_jobs()))

setup(
    ext_modules=[
        CppExtension(
            "fastattn._C_cpu",
            [*read_sources("cpu"), *read_sources("torch"), *read_sources("cpu_torch")],
            # Absolute: ninja compiles in the build folder.
            include_dirs=[str(ROOT / "csrc")],
            define_macros=[("FASTATTN_BUILD_FLAGS", f'"{" ".join(FLAGS)}"')],
            extra_compile_args=[*FLAGS, *WARNINGS, DEFINE_TARGET, *SYSTEM_INCLUDES],
            extra_link_args=link_flags(),
            py_limited_api=True,
        ),
        # Its sources are listed for the sake of sdist; Build reads them anew.
        *([Extension(CUDA_LIBRARY, [*read_sources("cuda"), *read_sources("cuda_torch")])] if toolkit else []),
    ],
    cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
)
