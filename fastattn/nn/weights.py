"""The weights that modules return beside their outputs: plain operations in the accumulator type, differentiable."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastattn import _ops, reference
from fastattn._arguments import without_autocast
from fastattn.reference._attention import softmax


def dot_weights(q: Tensor, k: Tensor, **options: Any) -> Tensor:
    """The p of fastattn.attention, (B, H, Lq, Lk), not rounded to q's dtype yet."""
    with without_autocast(q.device):
        return reference.weights(q, k, dtype=_ops.accumulator_dtype(q.dtype), **options)


def additive_weights(q: Tensor, k: Tensor, w: Tensor, **options: Any) -> Tensor:
    """The p of fastattn.additive_attention, likewise. Takes O(B H Lq Lk D) memory."""
    with without_autocast(q.device):
        return softmax(reference.additive_scores(q, k, w, dtype=_ops.accumulator_dtype(q.dtype), **options))[0]
