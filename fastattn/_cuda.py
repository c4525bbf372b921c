"""The CUDA library: loading it, and what is missing where it cannot serve a tensor.

``_C_cuda.so`` adds implementations to the operators that ``_C_cpu.so`` defines. To be loaded it needs a torch with
CUDA, on whose current stream the kernels run, but neither a GPU nor a driver. Without it everything else works.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_C_cuda.so")

# What the kernels serve; csrc/cuda/attention.h has the same.
OLDEST_CAPABILITY = (8, 0)
MAX_HEAD_DIM = 256

DRIVER = "libcuda.so.1"

# Why the library is not in use, in words that go on from "CUDA tensors cannot be served: "; None once it is loaded.
missing: str | None = "fastattn has not been imported"


def load() -> None:
    """Load the library where there is one for this torch. It must find the operators defined."""
    global missing
    if not LIBRARY.exists():
        missing = f"fastattn was built without its CUDA kernels ({LIBRARY.name})"
        if torch.version.cuda is None:
            missing += ", and torch without CUDA"
    elif torch.version.cuda is None:
        missing = "torch was built without CUDA"
    else:
        try:
            torch.ops.load_library(str(LIBRARY))
        except (OSError, RuntimeError) as error:
            # A broken library must not take the CPU's kernels along.
            missing = f"{LIBRARY.name} cannot be loaded: {' '.join(str(error).split())}"
        else:
            missing = None


def remedy() -> str:
    """What helps when the library is not in use."""
    if LIBRARY.exists():
        if torch.version.cuda is None:
            return "install a torch with CUDA"
        return "build fastattn again on this machine with FASTATTN_CUDA=1"
    return "build fastattn where nvcc is, with FASTATTN_CUDA=1"


# By device index: GPUs are asked for their compute capability, and the driver for its version, once.
_obstacles: dict[int, str | None] = {}


def obstacle(index: int) -> str | None:
    """Why tensors on GPU `index` cannot be served whatever they are; None = they can."""
    if missing is not None:
        return missing
    if index not in _obstacles:
        # Tensors without data may be on a GPU that is not there.
        there = torch.cuda.is_available() and index < torch.cuda.device_count()
        _obstacles[index] = _gpu_obstacle(torch.cuda.get_device_capability(index)) if there else None
    return _obstacles[index]


def _gpu_obstacle(capability: tuple[int, int]) -> str | None:
    if capability < OLDEST_CAPABILITY:
        return "compute capability {}.{} is below {}.{}".format(*capability, *OLDEST_CAPABILITY)
    driver = driver_version()
    # A driver runs what later minor versions of its CUDA built, but nothing of a later major one.
    if driver is not None and driver < ((toolkit := toolkit_version())[0], 0):
        return "the NVIDIA driver is for CUDA {}.{}, and the kernels were built with CUDA {}.{}".format(
            *driver, *toolkit
        )
    return None


def driver_version() -> tuple[int, int] | None:
    """The CUDA version that the NVIDIA driver is for; None where there is no driver."""
    version = ctypes.c_int()
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return None
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def build_info() -> dict[str, str]:
    """What the loaded library says of itself: "cuda" (the toolkit, "13.0") and "cuda archs" ("80 90 +ptx80")."""
    return parse_build_info(torch.ops.fastattn._cuda_build_info())


def parse_build_info(text: str) -> dict[str, str]:
    """Lines "key: value", as either library describes itself."""
    return dict(line.split(": ", 1) for line in text.splitlines())


def toolkit_version() -> tuple[int, int]:
    """The version of CUDA that the loaded library was built with."""
    major, minor = build_info()["cuda"].split(".")
    return int(major), int(minor)


# Runs while torch.compile traces, and leaves nothing in the trace; see the end of _sdpa.py.
obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]


def devices() -> list[str]:
    """Each GPU that torch finds, in words: "cuda:0 NVIDIA H200 (sm_90)", and why it is not served."""
    found = []
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        text = f"cuda:{index} {torch.cuda.get_device_name(index)} (sm_{capability[0]}{capability[1]})"
        reason = obstacle(index)
        found.append(text if reason is None else f"{text}, not served: {reason}")
    return found


def why_no_device() -> str:
    """What keeps torch, built with CUDA, from finding a GPU."""
    try:
        ctypes.CDLL(DRIVER)
    except OSError:
        return f"there is no NVIDIA driver ({DRIVER})"
    return "torch finds no CUDA device"
