"""Memory for caches that are read over and over."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

# Less than this is not worth a page of 2 MB at either end.
_LEAST_BYTES = 8 << 20


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.empty``, on large pages where the system has them.

    Linux gives out pages of 4 KB unless asked. A decoding step reads the whole cache once, and to find out where so
    many small pages lie takes time: in bfloat16, D=128, in pages of 16 keys in no order, 17% of it.
    """
    size = math.prod(shape) * dtype.itemsize
    is_watched = torch._C._len_torch_dispatch_stack() > 0  # by FakeTensorMode, say, which counts on it
    if device.type != "cpu" or size < _LEAST_BYTES or is_watched or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError):  # too much: torch has the better message
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    with contextlib.suppress(OSError):  # a kernel without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(tuple(shape))
