"""The function that Hugging Face transformers asks for a mask: what causal order, windows and padding are, as numbers.

transformers describes a mask by functions of (batch, head, query, key), mostly closures over each other. They are taken
apart here, and what is causal order, a window, padding or packed sequences becomes a :class:`NativeMask`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.integrations._native_mask import NativeMask, Rule


@dataclass
class _Pattern:
    """A mask function of transformers, taken apart: all that is native in it."""

    causal: bool = False
    left: int | None = None
    right: int | None = None
    sequences: list[Tensor] = field(default_factory=list)

    def add_window(self, left: int | None, right: int | None) -> None:
        if left is not None:
            self.left = left if self.left is None else min(self.left, left)
        if right is not None:
            self.right = right if self.right is None else min(self.right, right)


@functools.cache
def _known_codes() -> dict[Any, str]:
    """The code of transformers' mask functions, most of which are closures, made anew for each call."""
    from transformers import masking_utils

    nothing: Any = torch.zeros(1, 1, dtype=torch.long)
    causal = masking_utils.causal_mask_function
    made: dict[str, Callable[[], Callable[..., Any]]] = {
        "causal_mask_function": lambda: causal,
        "bidirectional_mask_function": lambda: masking_utils.bidirectional_mask_function,
        "and_masks": lambda: masking_utils.and_masks(causal, causal),
        "sliding_window_overlay": lambda: masking_utils.sliding_window_overlay(1),
        "sliding_window_bidirectional_overlay": lambda: masking_utils.sliding_window_bidirectional_overlay(1),
        "packed_sequence_mask_function": lambda: masking_utils.packed_sequence_mask_function(nothing),
        "remap_positions_for_packed_sequence": lambda: masking_utils.remap_positions_for_packed_sequence(
            causal, nothing
        ),
    }
    # A version that lacks one of them has no mask of that kind.
    return {made[name]().__code__: name for name in made if hasattr(masking_utils, name)}


def _take_apart(mask_function: Any, pattern: _Pattern) -> bool:
    """Whether everything that the function says is native; it is then in the pattern."""
    kind = _known_codes().get(getattr(mask_function, "__code__", None))
    if kind is None:
        return False
    if kind in ("causal_mask_function", "bidirectional_mask_function"):
        pattern.causal |= kind == "causal_mask_function"
        return True
    cells = dict(
        zip(mask_function.__code__.co_freevars, (cell.cell_contents for cell in mask_function.__closure__), strict=True)
    )
    if kind == "and_masks":
        return all(_take_apart(part, pattern) for part in cells["mask_functions"])
    if kind == "remap_positions_for_packed_sequence":
        # Positions within a sequence differ as indices do.
        return _take_apart(cells["mask_function"], pattern)
    if kind == "packed_sequence_mask_function":
        pattern.sequences.append(cells["packed_sequence_mask"])
    else:
        window = cells["sliding_window"]
        both = kind == "sliding_window_bidirectional_overlay"
        pattern.add_window(window if both else window - 1, window if both else None)
    return True


def attention_mask(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int = 0,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    cache_position: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor:
    """The function that transformers asks for a mask, in 4.57 (by cache_position) and 5.x (by q_length and q_offset).

    Args:
        batch_size, kv_length: B and Lk.
        q_length, q_offset: Lq, and the position of the first query. Static caches have the latter in a tensor.
        kv_offset: The position of the first key: caches of sliding windows drop the first ones.
        mask_function: Says of (batch, head, query position, key position) whether the query sees the key.
        attention_mask: (B, positions), bool: which tokens are no padding.
        cache_position: (Lq,), the positions of the queries.
        allow_is_causal_skip: False where transformers would not leave out even a plain causal mask, as with caches for
            compiled models.
        kwargs: What transformers' own functions of this kind take besides.

    Returns:
        A :class:`NativeMask`; or, where a row's keys are no interval, a bool tensor (B, 1, Lq, Lk).
    """
    from transformers import masking_utils

    def dense(**skips: bool) -> Tensor:
        where = {"q_length": q_length, "q_offset": q_offset}
        if cache_position is not None:
            where = {"cache_position": cache_position}
        return masking_utils.sdpa_mask(
            batch_size=batch_size,
            **where,
            kv_length=kv_length,
            kv_offset=kv_offset,
            mask_function=mask_function or masking_utils.causal_mask_function,
            attention_mask=attention_mask,
            **{**kwargs, **skips},
        )

    if torch.compiler.is_compiling():
        # Inside of a graph there are no closures to take apart.
        return dense(allow_is_causal_skip=allow_is_causal_skip)

    device = torch.device(kwargs.get("device", "cpu")) if cache_position is None else cache_position.device
    Lq = q_length if cache_position is None else cache_position.shape[0]
    assert Lq is not None
    no_skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    pattern = _Pattern()
    if not _take_apart(mask_function or masking_utils.causal_mask_function, pattern):
        return dense(**no_skips)
    # 4.57 always passes a tensor that numbers the sequences of packed rows.
    packed = [ids for ids in pattern.sequences if bool((ids != ids[:, :1]).any())]
    if packed and (len(packed) > 1 or packed[0].shape != (batch_size, Lq) or attention_mask is not None):
        return dense(**no_skips)

    offset, ends = _where_rows_stand(Lq, kv_length, q_offset, kv_offset, cache_position, allow_is_causal_skip)
    if ends is not None and not pattern.causal:
        if pattern.left is not None or pattern.right is not None:
            return dense(**no_skips)
        offset, ends = 0, None  # of no importance to a rule without a diagonal
    rule = Rule(batch_size, Lq, kv_length, offset, pattern.causal, pattern.left, pattern.right)
    if not rule.is_native or (packed and (rule.offset != 0 or Lq != kv_length)):
        return dense(**no_skips)
    if packed:
        cu_seqlens = _starts_and_end(packed[0])
        longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
        return NativeMask(replace(rule, longest=longest), device, cu_seqlens=cu_seqlens)

    keep = attention_mask
    if keep is not None:
        keep = keep[:, kv_offset : kv_offset + kv_length]
        if keep.shape[1] < kv_length:
            keep = F.pad(keep, (0, kv_length - keep.shape[1]))
    keep, lengths = _padding(keep, rule)
    if ends is not None:
        ends = ends.to(torch.int32).expand(batch_size)
    return NativeMask(rule, device, keep=keep, lengths=lengths, ends=ends)


def _starts_and_end(ids: Tensor) -> Tensor:
    """cu_seqlens of the sequences that ids (B, L) numbers, in B * L rows: one ends with each row of the batch."""
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return F.pad(starts.flatten().nonzero()[:, 0], (0, 1), value=ids.numel()).to(torch.int32)


def _where_rows_stand(
    Lq: int,
    Lk: int,
    q_offset: int | Tensor,
    kv_offset: int,
    cache_position: Tensor | None,
    allow_is_causal_skip: bool,
) -> tuple[int | None, Tensor | None]:
    """(offset, None) of the first row, in keys; or (None, ends): one key past that of the last row, as a tensor (1,).

    A number is better, and a tensor is for where it lies on a GPU: reading it would mean to wait. It is also for
    steps with a cache for compiled models: with numbers, such a model would be compiled anew at each step.
    """
    readable = Lq > 1 or allow_is_causal_skip
    if cache_position is not None:
        if readable and cache_position.device.type == "cpu":
            return int(cache_position[0]) - kv_offset if Lq else 0, None
        if allow_is_causal_skip:
            return Lk - Lq, None  # a cache that grows: its last key is the last row's
        return None, cache_position[-1:] + 1 - kv_offset
    if isinstance(q_offset, Tensor):
        if readable and q_offset.device.type == "cpu":
            return int(q_offset) - kv_offset, None
        # A new tensor, for the cache goes on counting in its own.
        return None, (q_offset + (Lq - kv_offset)).reshape(1)
    return q_offset - kv_offset, None


def _padding(keep: Tensor | None, rule: Rule) -> tuple[Tensor | None, Tensor | None]:
    """(keep, lengths): what must be told about padding, as lengths where it is all at the end."""
    if keep is None or (rule.offset is None and keep.device.type != "cpu"):  # a step on a GPU does not wait for a look
        return keep, None
    seen = keep
    if rule.causal and rule.offset is not None:  # what follows the last row's key is hidden anyway
        seen = keep[:, : rule.offset + rule.Lq]
    if bool(seen.all()):
        return None, None
    # With causal rows elsewhere than at the first key, an end of its own for each sequence would move the diagonal.
    if not rule.is_interval or (rule.causal and rule.offset == 0):
        lengths = seen.sum(dim=1, dtype=torch.int32)
        if bool((seen == (torch.arange(seen.shape[1], device=seen.device) < lengths[:, None])).all()):
            return None, lengths
    return keep, None
