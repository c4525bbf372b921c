"""What a transformers mask says, without the mask: a tensor that knows its rule and has no elements.

transformers asks a mask function for a (B, 1, Lq, Lk) mask once per forward pass, and hands what it returns through the
model's code to the attention function of each layer. A :class:`NativeMask` is a tensor for all that code: it has the
shape and the dtype (bool, True = keep) of the mask, can be sliced to fewer keys, moved, detached and checkpointed.
The attention function takes arguments of ``fastattn.attention`` from it (:func:`options_of`). An operation that
needs the elements after all makes them first: slower, and just as right. Code that adds the mask to scores means one of
floats, as "eager" has them, and gets it: 0 where the mask keeps, the smallest number elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """Row i, of Lq, stands at key i + offset, and sees the keys j, of Lk, of which all of this holds."""

    B: int
    Lq: int
    Lk: int
    offset: int | None  # None: the rows stand at the last Lq keys before NativeMask.ends[b]
    causal: bool  # j <= i + offset
    left: int | None  # j >= i + offset - left
    right: int | None  # j <= i + offset + right
    longest: int = 0  # rows of the longest of packed sequences
    # and, with the tensors of the NativeMask: j < lengths[b], keep[b, j], i and j in the same packed sequence

    @property
    def is_interval(self) -> bool:
        """Whether what a row sees depends on where it stands."""
        return self.causal or self.left is not None or self.right is not None

    @property
    def is_native(self) -> bool:
        """Whether ``fastattn.attention`` has an alignment for the diagonal: the last row at an existing key."""
        if not self.is_interval or self.offset is None:
            return True
        end = self.offset + self.Lq
        return (self.offset == 0 or self.Lq <= end <= self.Lk) if self.causal else end == self.Lk


# The tensors that a rule may need, all of which are as long as a row of the mask at most.
_PARTS = ("keep", "lengths", "ends", "cu_seqlens")


class NativeMask(Tensor):
    """A bool mask (B, 1, Lq, Lk), True = keep, held as a :class:`Rule` and at most one value for each key."""

    rule: Rule
    keep: Tensor | None  # (B, Lk), bool
    lengths: Tensor | None  # (B,), int32
    ends: Tensor | None  # (B,), int32, only with causal rules
    cu_seqlens: (
        Tensor | None
    )  # (sequences + 1,), int32: they lie one after the other in B * L rows; Lq = Lk = L, offset 0
    nothing: Tensor  # torch.compile takes tensors of this kind apart, and wants one to find

    # Every operation goes to __torch_dispatch__, below autograd, and from there to dense().
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls,
        rule: Rule,
        device: torch.device,
        *,
        keep: Tensor | None = None,
        lengths: Tensor | None = None,
        ends: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        nothing: Tensor | None = None,
    ) -> NativeMask:
        shape = (rule.B, 1, rule.Lq, rule.Lk)
        mask = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        mask.rule = rule
        mask.keep, mask.lengths, mask.ends, mask.cu_seqlens = keep, lengths, ends, cu_seqlens
        mask.nothing = torch.empty(0, dtype=torch.bool, device=device) if nothing is None else nothing
        return mask

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"NativeMask({self.rule}, with={[name for name in _PARTS if getattr(self, name) is not None]})"

    def __tensor_flatten__(self) -> tuple[list[str], Rule]:
        return ["nothing", *(name for name in _PARTS if getattr(self, name) is not None)], self.rule

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], rule: Rule, size: Any, stride: Any) -> NativeMask:
        return NativeMask(rule, parts["nothing"].device, **parts)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        mask = args[0] if args else None
        if isinstance(mask, NativeMask):
            if func in _COPIES:
                return mask._with(mask.rule)
            if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") in (None, torch.bool):
                return mask._with(mask.rule, kwargs.get("device"))
            if func is torch.ops.aten.slice.Tensor and (length := _first_keys(mask, *args[1:])) is not None:
                return mask.first_keys(length)
        if func in _SUMS and len(args) == 2 and not kwargs:
            args = tuple(_added_to(x, y) for x, y in (args, reversed(args)))
        dense = torch.utils._pytree.tree_map_only(NativeMask, NativeMask.dense, (args, kwargs))
        return func(*dense[0], **dense[1])

    def _with(self, rule: Rule, device: Any = None) -> NativeMask:
        def moved(part: Tensor | None) -> Tensor | None:
            return part if part is None or device is None else part.to(device)

        parts = {name: moved(getattr(self, name)) for name in _PARTS}
        return NativeMask(rule, self.device if device is None else torch.device(device), **parts)

    def first_keys(self, length: int) -> Tensor:
        """The mask of the first ``length`` keys."""
        if length == self.rule.Lk:
            return self._with(self.rule)
        # Ends may lie beyond, and to look would mean to wait for a GPU; packed rows are as many as their keys.
        if self.ends is not None or self.cu_seqlens is not None:
            return self.dense()[..., :length]
        mask = self._with(replace(self.rule, Lk=length))
        mask.keep = None if self.keep is None else self.keep[:, :length]
        mask.lengths = None if self.lengths is None else self.lengths.clamp(max=length)
        return mask

    def dense(self) -> Tensor:
        """The mask with all its elements."""
        rule, device = self.rule, self.device
        key = torch.arange(rule.Lk, device=device)
        row = torch.arange(rule.Lq, device=device)[:, None]
        if self.ends is None:
            row = row + (rule.offset or 0)
        else:
            row = row + (self.ends - rule.Lq)[:, None, None, None]
        visible = torch.ones((rule.B, 1, rule.Lq, rule.Lk), dtype=torch.bool, device=device)
        if rule.causal:
            visible &= key <= row
        if rule.left is not None:
            visible &= key >= row - rule.left
        if rule.right is not None:
            visible &= key <= row + rule.right
        if self.keep is not None:
            visible &= self.keep[:, None, None, :]
        if self.lengths is not None:
            visible &= key < self.lengths[:, None, None, None]
        if self.cu_seqlens is not None:
            rows = torch.arange(rule.B * rule.Lq, dtype=torch.int32, device=device)
            sequence = torch.searchsorted(self.cu_seqlens, rows, right=True).view(rule.B, 1, rule.Lq)
            visible &= sequence[..., :, None] == sequence[..., None, :]
        return visible


_SUMS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)


def _added_to(mask: Any, scores: Any) -> Any:
    if not isinstance(mask, NativeMask) or not isinstance(scores, Tensor) or not scores.is_floating_point():
        return mask
    hidden = torch.finfo(scores.dtype).min
    return torch.zeros((), dtype=scores.dtype, device=mask.device).where(mask.dense(), hidden)


_COPIES = (torch.ops.aten.alias.default, torch.ops.aten.detach.default, torch.ops.aten.clone.default)


def _first_keys(mask: NativeMask, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    """How many keys a slice leaves; None where it does not take the first keys."""
    size = mask.shape[dim]
    end = size if end is None else end
    end = min(size, end if end >= 0 else max(0, size + end))
    if (start or 0) != 0 or step != 1:
        return None
    if dim in (3, -1):
        return end
    return mask.rule.Lk if end == size else None


def options_of(mask: NativeMask) -> tuple[dict[str, Any], int]:
    """Arguments of ``fastattn.attention``, and how many of the keys to give it.

    Packed sequences are for ``fastattn.varlen_attention``; here they are a mask with elements. A function, for
    torch.compile takes no calls of a tensor's own methods into a graph.
    """
    rule = mask.rule
    options: dict[str, Any] = {}
    keys = rule.Lk
    if not rule.is_native or mask.cu_seqlens is not None:
        return {"mask": mask.dense()}, keys
    if mask.keep is not None:
        options["mask"] = mask.keep[:, None, None, :]
    if mask.lengths is not None:
        options["kv_lengths"] = mask.lengths
    if not rule.is_interval:
        return options, keys
    options["window"] = None if rule.left is None and rule.right is None else (rule.left, rule.right)
    options["causal"] = rule.causal
    if mask.ends is not None:
        options["kv_lengths"] = mask.ends
    elif rule.offset == 0 and rule.causal:
        # Top-left, for with lengths the bottom-right diagonal would end at each sequence's own.
        options["causal"] = "top_left"
        keys = min(keys, rule.Lq)
    elif rule.causal:
        # What lies beyond the last row's key is not there yet: the rest of a static cache.
        assert rule.offset is not None
        keys = min(keys, rule.offset + rule.Lq)
    if keys < rule.Lk and mask.keep is not None:
        options["mask"] = options["mask"][..., :keys]
    if keys < rule.Lk and mask.lengths is not None:
        options["kv_lengths"] = mask.lengths.clamp(max=keys)
    return options, keys
