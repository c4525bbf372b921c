"""The weights that modules return beside their outputs: plain operations in the accumulator type, differentiable."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastattn import _ops, reference
from fastattn.reference._attention import softmax


def dot_weights(q: Tensor, k: Tensor, **options: Any) -> Tensor:
    """The p of fastattn.attention, (B, H, Lq, Lk), not rounded to q's dtype yet."""
    with _without_autocast(q.device):
        return reference.weights(q, k, dtype=_ops.accumulator_dtype(q.dtype), **options)


def additive_weights(q: Tensor, k: Tensor, w: Tensor, **options: Any) -> Tensor:
    """The p of fastattn.additive_attention, likewise. Takes O(B H Lq Lk D) memory."""
    with _without_autocast(q.device):
        return softmax(reference.additive_scores(q, k, w, dtype=_ops.accumulator_dtype(q.dtype), **options))[0]


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """There is none on some devices, such as meta."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
