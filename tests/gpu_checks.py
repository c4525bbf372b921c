"""What the tests that run on a GPU share. Without a GPU, whoever imports this is skipped; the same kernels run in the
emulator. scripts/gpu_check.sh runs them all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from .cases import Case, Inputs, make_inputs
from .conftest import cuda_obstacle
from .gpu import DEVICE, MIXED, moved_inputs

if (obstacle := cuda_obstacle()) is not None:
    pytest.skip(f"no CUDA: {obstacle}", allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
each_mixed = pytest.mark.parametrize("case", MIXED, ids=lambda case: case.id)


@pytest.fixture(autouse=True)
def first_device() -> Iterator[None]:
    """For every test of a file that imports it."""
    with torch.cuda.device(DEVICE):
        yield
        # An error of a kernel would otherwise show up in another test.
        torch.cuda.synchronize()


def on_gpu(case: Case, dtype: torch.dtype, seed: int = 0) -> Inputs:
    return moved_inputs(make_inputs(case, dtype, seed))


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False, device: Any = DEVICE) -> Tensor:
    return torch.randn(shape, dtype=dtype).to(device).requires_grad_(grad)
