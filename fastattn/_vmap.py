"""torch.func.vmap of the operators: one call for all elements, where that gives what a loop over them would.

The mapped dimension, of size n, becomes a part of the batch, or of the heads:

    q (n, B, Hq, Lq, D) -> (n * B, Hq, Lq, D)    or    (B, n * Hq, Lq, D)        query head i * Hq + h reads key head
    k (n, B, Hkv, Lk, D) -> (n * B, Hkv, Lk, D)  or    (B, n * Hkv, Lk, D)       i * Hkv + h / G either way

The batch serves unless a tensor is mapped, or has a gradient for each element, that belongs to the heads alone: sinks,
additive attention's w, and all that packed sequences have. Where neither serves, the elements are computed one after
the other: with dropout and with draws, which depend on a row's place in the batch; where a cache is appended to; where
a head's tensor and a sequence's length are mapped together; and where copies of what is not mapped would be more than
twice all that is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

InDims = tuple[int | None, ...]


class Place(NamedTuple):
    """Where a tensor has the batch and the heads; None = it is the same for all of them."""

    batch: int | None
    heads: int | None
    rank: int | None = None  # of a tensor that may lack leading dimensions
    may_be_one: bool = False  # its dimensions may be 1 in place of their size


_ROWS = Place(0, 1)  # (B, H, L, ...)
# By the operators' names of their tensors.
PADDED: dict[str, Place] = {
    **dict.fromkeys(("q", "k", "v", "o", "lse", "index", "log_prob"), _ROWS),
    "stats": Place(1, 2),
    "bias": Place(0, 1, 4, may_be_one=True),
    "mask": Place(0, 1, 4, may_be_one=True),
    "row_mask": Place(0, 1, 3, may_be_one=True),
    "alibi_slopes": Place(0, 1, 2),
    "sinks": Place(None, 0),
    "w": Place(None, 0, 2),
    "kv_lengths": Place(0, None),
    **dict.fromkeys(("entropy", "max_weight", "top_weights", "top_index", "key_mass"), _ROWS),
}
# A packed batch's sequences are what cu_seqlens says, which no part of a call can say of another.
PACKED: dict[str, Place] = {
    **dict.fromkeys(("q", "k", "v", "o"), Place(None, 1)),
    "lse": Place(None, 0),
    "stats": Place(None, 1),
    "bias": Place(None, 1, 4, may_be_one=True),
    "mask": Place(None, 1, 4, may_be_one=True),
    "alibi_slopes": Place(None, 1, 2),
    "sinks": Place(None, 0),
    "cu_seqlens_q": Place(None, None),
    "cu_seqlens_k": Place(None, None),
}
CACHE: dict[str, Place] = {
    **PADDED,
    **dict.fromkeys(("k_cache", "v_cache", "k_scale", "v_scale", "k", "v"), _ROWS),
    "cache_lengths": Place(0, None),
    "block_table": Place(0, None),
    "rotary_cos": Place(None, None),
    "rotary_sin": Place(None, None),
}
# With a block_table the cache is a pool that all sequences share.
PAGED: dict[str, Place] = {
    **CACHE,
    **dict.fromkeys(("k_cache", "v_cache", "k_scale", "v_scale"), Place(None, 1)),
}
_NOWHERE = Place(None, None)


class Rule:
    """The vmap rule of one operator.

    Args:
        tensors: Its tensor arguments, in order; the others follow them.
        results: What it returns: names of `places`; in a backward pass, of the tensor whose gradient it is.
        places: Where each of them has the batch and the heads.
        gradients: Whether the results are gradients.
        wanted: Of gradients, those that the last arguments, one bool for each, ask for; the others always are.
    """

    def __init__(
        self,
        tensors: Sequence[str],
        results: Sequence[str],
        places: dict[str, Place],
        *,
        gradients: bool = False,
        wanted: Sequence[str] = (),
    ) -> None:
        self._tensors, self._results, self._places = tuple(tensors), tuple(results), places
        self._gradients, self._wanted = gradients, tuple(wanted)

    def __call__(self, function: Callable[..., Any], size: int, in_dims: InDims, inputs: Sequence[Any]) -> Any:
        """(results, out_dims) of function(*inputs) for each of `size` elements."""
        if size == 0:
            raise ValueError(
                "fastattn: vmap maps over a dimension of size 0, and there is no element to compute: skip the call."
            )
        for axis in ("batch", "heads"):
            plan = self._plan(axis, size, in_dims, inputs)
            if plan is not None:
                return self._all_at_once(function, axis, size, in_dims, inputs, plan)
        return one_by_one(function, size, in_dims, inputs)

    def _place(self, name: str, axis: str) -> tuple[Place, int | None]:
        place = self._places.get(name, _NOWHERE)
        return place, place.batch if axis == "batch" else place.heads

    def _active(self, inputs: Sequence[Any]) -> list[bool]:
        """Of the results that are gradients, whether they are computed."""
        flags = dict(zip(self._wanted, inputs[len(inputs) - len(self._wanted) :], strict=True))
        given = dict(zip(self._tensors, inputs, strict=False))
        return [given[name] is not None and flags.get(name, True) for name in self._results]

    def _plan(self, axis: str, size: int, in_dims: InDims, inputs: Sequence[Any]) -> list[int | None] | None:
        """For each tensor its size along the axis, None = it stays as it is; or None: this axis does not serve."""
        given = dict(zip(self._tensors, inputs, strict=False))
        if given.get("rng_state") is not None:
            return None
        active: set[str] = set()
        if self._gradients:
            active = {name for name, is_active in zip(self._results, self._active(inputs), strict=True) if is_active}
            if any(self._place(name, axis)[1] is None for name in active):
                return None
        q, q_dim = given["q"], in_dims[self._tensors.index("q")]
        at = self._place("q", axis)[1]
        if at is None:
            return None
        whole = _size(q, q_dim, at)
        held = copied = 0
        plan: list[int | None] = []
        for name, x, dim in zip(self._tensors, inputs, in_dims, strict=False):
            if x is None:
                plan.append(None)
                continue
            place, at = self._place(name, axis)
            held += x.numel()
            if at is None:
                if dim is not None:
                    return None
                plan.append(None)
                continue
            missing = 0 if place.rank is None else place.rank - x.dim() + (dim is not None)
            is_absent = at < missing
            own = 1 if is_absent else _size(x, dim, at - missing)
            is_shared = is_absent or (place.may_be_one and own == 1)
            if is_shared and dim is None and name not in active:
                plan.append(None)
                continue
            along = whole if is_shared else own
            if name in active and is_shared and along != 1 and x.dtype in (torch.bfloat16, torch.float16):
                return None  # its gradient would be a sum of numbers that are rounded already
            plan.append(along)
            if along != own or (dim is None and own != 1):
                copied += x.numel() // max(own, 1) * along * (1 if dim is not None else size)
        return None if copied > 2 * held else plan

    def _all_at_once(
        self,
        function: Callable[..., Any],
        axis: str,
        size: int,
        in_dims: InDims,
        inputs: Sequence[Any],
        plan: list[int | None],
    ) -> tuple[Any, Any]:
        folded = list(inputs)
        own: dict[str, tuple[tuple[int, ...], int]] = {}  # shape of an element, and where the axis is once it is there
        for i, (name, along) in enumerate(zip(self._tensors, plan, strict=True)):
            x, dim = inputs[i], in_dims[i]
            place, at = self._place(name, axis)
            if x is None or at is None:
                continue
            x = x.unsqueeze(0) if dim is None else x.movedim(dim, 0)
            missing = 0 if place.rank is None else place.rank + 1 - x.dim()
            own[name] = tuple(x.shape[1:]), max(at - missing, 0)
            if along is None:
                continue
            for _ in range(missing - at):  # up to the axis, and no more: slopes (1, Hq) are none where (Hq,) are
                x = x.unsqueeze(1)
            at = own[name][1]
            sizes = list(x.shape)
            sizes[0], sizes[1 + at] = size, along
            folded[i] = x.expand(sizes).movedim(0, at).flatten(at, at + 1)
        results = function(*folded)
        active = self._active(inputs) if self._gradients else [True] * len(results)
        found: list[Tensor] = []
        out_dims: list[int | None] = []
        for name, result, is_active in zip(self._results, results, active, strict=True):
            shape, at = own[name] if self._gradients and name in own else ((), self._place(name, axis)[1])
            if not is_active or at is None or result.dim() <= at:  # what was not asked for is empty
                found.append(result)
                out_dims.append(None)
                continue
            x = result.unflatten(at, (size, result.shape[at] // size))
            if self._gradients:
                x = x.movedim(at, 0)
                if x.dim() - 1 > len(shape) or shape[at] != x.shape[1 + at]:
                    x = x.sum(1 + at, keepdim=True)  # of what was the same for all of the batch, or of the heads
                x = x.reshape(size, *shape)
                at = 0
            found.append(x)
            out_dims.append(at)
        return tuple(found), tuple(out_dims)


def _size(x: Tensor, dim: int | None, at: int) -> Any:
    """The size of a tensor's dimension `at`, where `dim`, the mapped one, does not count."""
    return x.shape[at if dim is None or at < dim % x.dim() else at + 1]


def one_by_one(function: Callable[..., Any], size: int, in_dims: InDims, inputs: Sequence[Any]) -> tuple[Any, Any]:
    """Calls for one element after the other, and their results stacked: what is right for every operator."""
    results = [
        function(*(x if dim is None else x.select(dim, i) for x, dim in zip(inputs, in_dims, strict=True)))
        for i in range(size)
    ]
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


def register(op: Any, rule: Callable[..., Any]) -> None:
    """Makes a rule the one of an operator."""

    def batched(info: Any, in_dims: InDims, *inputs: Any) -> Any:
        return rule(op, info.batch_size, in_dims, inputs)

    torch.library.register_vmap(op.name(), batched)
