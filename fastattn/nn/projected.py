"""What the attention modules of encoder-decoder models share: projected keys, heads, masks, and queries that are one.

A recurrent decoder asks the same keys again and again, one query at a time. So its attention takes the keys as they are
or projected, and queries as (B, Lq, E), or as one state for each sequence, (B, E).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn import _errors
from fastattn.nn.checks import check_features, check_like_module


class ProjectedKeys(NamedTuple):
    """Keys and values as a module's `project_keys` leaves them, for any number of calls of that module.

    Gradients flow through them to the keys and to the projection. They are ordinary tensors with the batch first:
    ``ProjectedKeys(keys.key[rows], keys.value[rows])`` repeats or reorders the sequences, as a beam search needs.
    """

    key: Tensor  # (B, H, Lk, D), projected
    value: Tensor  # (B, H, Lk, Dv)


class ProjectedKeysAttention(torch.nn.Module):
    """The base of AdditiveAttention, LuongAttention and HardAttention."""

    num_heads: int
    query_dim: int | None  # None: any, as long as the scores can be computed
    key_dim: int | None
    value_dim: int | None  # None: any multiple of num_heads

    def project_keys(self, key: Tensor, value: Tensor | None = None) -> ProjectedKeys:
        """Prepare keys and values once; pass the result in the place of `key` as often as you like.

        Args:
            key: (B, Lk, key_dim).
            value: (B, Lk, Ev); None = the keys are the values.

        Returns:
            ProjectedKeys, for this module's `forward`.

        Raises:
            ValueError, TypeError: what `forward` refuses.
        """
        value = key if value is None else value
        for name, x, features in (("key", key, self.key_dim), ("value", value, self.value_dim)):
            self._check(name, x, features, (3,))
        if key.shape[:2] != value.shape[:2]:
            raise ValueError(
                f"fastattn: key has shape {tuple(key.shape)} and value {tuple(value.shape)}; each key has one value:"
                " their first two dimensions must be the same."
            )
        if value.size(-1) % self.num_heads:
            raise ValueError(
                f"fastattn: value has {value.size(-1)} features and the module {self.num_heads} heads; each head takes"
                " an equal part of them: they must be a multiple of num_heads."
            )
        return ProjectedKeys(self._heads(self._project_key(key)), self._heads(value))

    def _project_key(self, key: Tensor) -> Tensor:
        """Keys as they enter the scores, (B, Lk, H * D)."""
        raise NotImplementedError

    def _project_query(self, query: Tensor) -> Tensor:
        """Queries as they enter the scores, (B, Lq, H * D)."""
        raise NotImplementedError

    def _prepare(
        self, query: Tensor, key: Tensor | ProjectedKeys, value: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q (B, H, Lq, D), k (B, H, Lk, D), v (B, H, Lk, Dv) and the mask in four dimensions."""
        self._check("query", query, self.query_dim, (2, 3))
        if isinstance(key, ProjectedKeys):
            if value is not None:
                raise ValueError(
                    "fastattn: value was given together with projected keys, which hold the values already; pass it to"
                    " project_keys."
                )
        else:
            key = self.project_keys(key, value)
        k, v = key
        if query.size(0) != k.size(0):
            raise ValueError(
                f"fastattn: query has {query.size(0)} sequences and key {k.size(0)}; the first dimension is the batch"
                " and must be the same."
            )
        q = self._heads(self._project_query(query.unsqueeze(1) if query.dim() == 2 else query))
        if q.size(-1) != k.size(-1) or k.size(1) != self.num_heads:
            raise ValueError(
                f"fastattn: query has {self.num_heads} heads of {q.size(-1)} features for the scores, and key"
                f" {k.size(1)} of {k.size(-1)}; they must be the same: projected keys must come from this module's"
                " project_keys, and a dot product needs queries and keys of one size."
            )
        return q, k, v, _four_dimensions(mask, q, k)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, L, H * D) -> (B, H, L, D), a view."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _check(self, name: str, x: Any, features: int | None, dims: tuple[int, ...]) -> None:
        if not isinstance(x, Tensor):
            also = ", or what project_keys returns" if name == "key" else ""
            raise TypeError(f"fastattn: {name} is a {type(x).__name__}; it must be a torch.Tensor{also}.")
        if x.dim() not in dims:
            shapes = "(B, E) or (B, Lq, E)" if name == "query" else "(B, Lk, E)"
            raise ValueError(f"fastattn: {name} has shape {tuple(x.shape)}; it must be {shapes}.")
        if features is not None:
            check_features(name, x, features)
        parameter = next(self.parameters(), None)
        if parameter is not None and name != "value":
            check_like_module(name, x, parameter)
        # The kernels compare values, and what no parameter touches, with the queries.


def _four_dimensions(mask: Any, q: Tensor, k: Tensor) -> Tensor | None:
    """A mask (B, Lk), (B, Lq, Lk) or (B, H, Lq, Lk), True = keep, as one that broadcasts to (B, H, Lq, Lk)."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"fastattn: mask is a {type(mask).__name__}; it must be a torch.Tensor.")
    if mask.dtype != torch.bool:
        raise TypeError(f"fastattn: mask is {mask.dtype}; it must be bool, True = keep: convert with mask.bool().")
    if mask.device != q.device:
        raise _errors.wrong_device("mask", mask, q)
    B, H, Lq, _ = q.shape
    sizes = (B, H, Lq, k.size(2))
    wide = mask[:, None, None] if mask.dim() == 2 else mask[:, None] if mask.dim() == 3 else mask
    if wide.dim() != 4 or any(n not in (1, size) for n, size in zip(wide.shape, sizes, strict=True)):
        raise ValueError(
            f"fastattn: mask has shape {tuple(mask.shape)}; it must be (B, Lk) = {(B, sizes[3])}, (B, Lq, Lk) ="
            f" {(B, Lq, sizes[3])} or (B, H, Lq, Lk) = {sizes}, and each dimension may be 1."
        )
    return wide


def join_heads(o: Tensor, query: Tensor) -> Tensor:
    """(B, H, Lq, Dv) -> (B, Lq, H * Dv), without Lq if the queries had none."""
    o = o.transpose(1, 2).flatten(2)
    return o.squeeze(1) if query.dim() == 2 else o


def per_row(x: Tensor, query: Tensor) -> Tensor:
    """(B, H, Lq, ...) -> without H if there is one head, and without Lq if the queries had none."""
    if query.dim() == 2:
        x = x.squeeze(2)
    return x.squeeze(1) if x.size(1) == 1 else x
