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


# By device index: GPUs are asked for their compute capability once.
_too_old: dict[int, str | None] = {}


def obstacle(index: int) -> str | None:
    """Why tensors on GPU `index` cannot be served whatever they are; None = they can."""
    if missing is not None:
        return missing
    if index not in _too_old:
        # Tensors without data may be on a GPU that is not there.
        there = torch.cuda.is_available() and index < torch.cuda.device_count()
        _too_old[index] = _capability_obstacle(torch.cuda.get_device_capability(index)) if there else None
    return _too_old[index]


def _capability_obstacle(capability: tuple[int, int]) -> str | None:
    if capability >= OLDEST_CAPABILITY:
        return None
    return f"compute capability {capability[0]}.{capability[1]} is below {OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]}"


# Runs while torch.compile traces, and leaves nothing in the trace; see the end of _sdpa.py.
obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]


def devices() -> list[str]:
    """Each GPU that torch finds, in words: "cuda:0 NVIDIA H200 (sm_90)", and whether it is too old."""
    found = []
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        text = f"cuda:{index} {torch.cuda.get_device_name(index)} (sm_{capability[0]}{capability[1]})"
        too_old = _capability_obstacle(capability)
        found.append(text if too_old is None else f"{text}, not served: {too_old}")
    return found


def why_no_device() -> str:
    """What keeps torch, built with CUDA, from finding a GPU."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver (libcuda.so.1)"
    return "torch finds no CUDA device"
