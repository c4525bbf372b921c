"""What tests on a GPU need: a case's inputs moved there as they lie, and the seeds that the CPU would draw."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import _ops

from .cases import Inputs
from .compare import Quantities

DEVICE = torch.device("cuda:0")


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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_ops, "draw_rng_state", lambda device="cpu": draw("cpu").to(device))
        yield
