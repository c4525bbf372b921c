"""What tests on a GPU need: a case's inputs moved there as they lie, and the seeds that the CPU would draw. Without
pytest: scripts/gpu_steps.py needs it too.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastattn import _ops

from .cases import Case, Inputs
from .compare import Quantities

DEVICE = torch.device("cuda:0")

# One of each kind of work: dense and masked tiles, few rows over many keys, every modifier, every gradient.
MIXED = [
    Case(197, 197, D=64, B=2, Hkv=3),
    Case(150, 333, D=32, Hkv=1, gqa=4, causal="bottom_right"),
    Case(600, 900, D=128, Hkv=1, causal="top_left", sinks=True),
    Case(70, 530, D=24, Dv=40, B=2, gqa=2, bias="11qk", alibi="h"),
    Case(300, 130, D=96, B=2, bias="1h1k", bias_values="min", mask="b1qk", mask_values="blocks"),
    Case(130, 300, D=16, B=3, gqa=2, bias="1111", softcap=5.0, kv_lengths=(300, 0, 131), window=(70, 20)),
    Case(90, 280, D=33, B=2, gqa=3, dropout_p=0.3, causal="bottom_right", layout="blhd"),
    Case(70, 200, D=256, Dv=192, B=2),
    Case(1, 4000, D=128, Hkv=2, gqa=8),
    Case(3, 2000, D=64, B=2, gqa=2, bias="b11k", kv_lengths=(2000, 777)),
]


def triton_obstacle() -> str | None:
    """Why Inductor cannot compile for a GPU here; None = it can. Triton compiles C code of its own against Python.h."""
    if importlib.util.find_spec("triton") is None:
        return "Triton, which Inductor needs for a GPU, is not installed"
    compiler = os.environ.get("CC")
    if not any(shutil.which(name) for name in ([compiler] if compiler else ["gcc", "clang"])):
        return "Triton needs a C compiler, and there is none"
    if not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
        return "Triton needs Python.h, and it is missing (python3-dev)"
    return None


def moved(x: Tensor, device: torch.device = DEVICE) -> Tensor:
    """x with the same strides and offset: all of its memory is copied. Tensor.to would make most views contiguous."""
    storage = x.untyped_storage()
    everything = torch.empty(0, dtype=x.dtype).set_(storage, 0, (storage.nbytes() // x.itemsize,), (1,))
    return everything.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


def moved_inputs(inputs: Inputs, device: torch.device = DEVICE) -> Inputs:
    def move(x: Any) -> Any:
        return moved(x.detach(), device) if isinstance(x, Tensor) else x

    tensors = (move(x) for x in (inputs.q, inputs.k, inputs.v, inputs.d_o, inputs.d_lse))
    return Inputs(*tensors, kwargs={name: move(x) for name, x in inputs.kwargs.items()})


def on_cpu(quantities: Quantities) -> Quantities:
    return {name: x.cpu() for name, x in quantities.items()}


@contextmanager
def seeds_of_the_cpu() -> Iterator[None]:
    """Dropout's (seed, offset) come from the CPU's generator, so that a GPU drops what the CPU does."""
    draw = _ops.draw_rng_state
    with mock.patch.object(_ops, "draw_rng_state", lambda device="cpu": draw("cpu").to(device)):
        yield
