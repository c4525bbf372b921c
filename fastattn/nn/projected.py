"""What the attention modules of encoder-decoder models share: projected keys, heads, masks, and queries that are one.

A recurrent decoder asks the same keys again and again, one query at a time. So its attention takes the keys as they are
or projected, and queries as (B, Lq, E), or as one state for each sequence, (B, E).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from fastattn import _errors
from fastattn._arguments import Causal, register_result
from fastattn.nn.checks import check_features, check_heads, check_like_module, check_sizes


class ProjectedKeys(NamedTuple):
    """Keys and values as a module's `project_keys` leaves them, for any number of calls of that module.

    Gradients flow through them to the keys and to the projection. They are ordinary tensors with the batch first:
    ``ProjectedKeys(keys.key[rows], keys.value[rows])`` repeats or reorders the sequences, as a beam search needs.
    """

    key: Tensor  # (B, H, Lk, D), projected
    value: Tensor  # (B, H, Lk, Dv)


register_result(ProjectedKeys)


class ProjectedKeysAttention(torch.nn.Module):
    """The base of AdditiveAttention, LuongAttention and HardAttention."""

    query_proj: torch.nn.Linear  # these two in modules that have such a projection; the others override _project_*
    key_proj: torch.nn.Linear
    num_heads: int
    query_dim: int | None  # None: any, as long as the scores can be computed
    key_dim: int | None
    value_dim: int | None  # None: any multiple of num_heads

    def __prepare_scriptable__(self) -> torch.nn.Module:
        raise TypeError(
            f"fastattn: {type(self).__name__} cannot be compiled by torch.jit.script; use torch.compile or"
            " torch.export."
        )

    def _set_sizes(self, query_dim: int, key_dim: int, attn_dim: int, value_dim: int | None, num_heads: int) -> None:
        """Checks and keeps the sizes of a module whose queries and keys are both projected to attn_dim features."""
        value_dim = key_dim if value_dim is None else value_dim
        check_sizes(query_dim=query_dim, key_dim=key_dim, attn_dim=attn_dim, value_dim=value_dim, num_heads=num_heads)
        check_heads("attn_dim", attn_dim, num_heads)
        check_heads("value_dim", value_dim, num_heads)
        self.query_dim, self.key_dim, self.attn_dim, self.value_dim = query_dim, key_dim, attn_dim, value_dim
        self.num_heads = num_heads

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
        return self.key_proj(key)

    def _project_query(self, query: Tensor) -> Tensor:
        """Queries as they enter the scores, (B, Lq, H * D)."""
        return self.query_proj(query)

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


class SoftAttention(ProjectedKeysAttention):
    """The base of AdditiveAttention and LuongAttention: each output is the mean of the values, by the weights."""

    dropout: float

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, **options: Any) -> Tensor:
        """(B, H, Lq, Dv). The options are mask, kv_lengths and causal."""
        raise NotImplementedError

    def _weights(self, q: Tensor, k: Tensor, **options: Any) -> Tensor:
        """The weights with which `_attend` sums, (B, H, Lq, Lk), before dropout."""
        raise NotImplementedError

    @overload
    def forward(
        self,
        query: Tensor,
        key: Tensor | ProjectedKeys,
        value: Tensor | None = ...,
        *,
        mask: Tensor | None = ...,
        kv_lengths: Tensor | None = ...,
        causal: Causal = ...,
        need_weights: Literal[False] = ...,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        query: Tensor,
        key: Tensor | ProjectedKeys,
        value: Tensor | None = ...,
        *,
        mask: Tensor | None = ...,
        kv_lengths: Tensor | None = ...,
        causal: Causal = ...,
        need_weights: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self,
        query: Tensor,
        key: Tensor | ProjectedKeys,
        value: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        kv_lengths: Tensor | None = None,
        causal: Causal = False,
        need_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The contexts, and the weights if they are wanted.

        Args:
            query: (B, Lq, query_dim), or (B, query_dim) for one query to each sequence.
            key: (B, Lk, key_dim), or what `project_keys` returned.
            value: (B, Lk, Ev), where Ev is AdditiveAttention's value_dim, and any number of features for
                LuongAttention; None = the keys. Projected keys have theirs already.
            mask: Bool, **True = keep** (unlike torch.nn.MultiheadAttention): (B, Lk) for padding, (B, Lq, Lk) or
                (B, H, Lq, Lk); each dimension may be 1. LuongAttention has one head, H = 1.
            kv_lengths: (B,), int32: the number of keys that exist. Values beyond are not read; keys beyond are
                projected like the others where the module projects keys, so there they must be finite for the gradients
                of the projection.
            causal: As in fastattn.attention.
            need_weights: Whether to compute and return the weights, with plain operations, for additive scores in
                O(B Lq Lk attn_dim) memory: for looking at.

        Returns:
            output: (B, Lq, Ev), or (B, Ev). A query that sees no key has an output of 0.
            weights: (B, Lq, Lk), with several heads (B, H, Lq, Lk), for a query (B, query_dim) without Lq; before
                dropout, differentiable. Returned as the pair (output, weights) with need_weights.

        Raises:
            ValueError: Shapes, sizes, devices or lengths break a rule above.
            TypeError: An argument has the wrong type or dtype.
        """
        q, k, v, mask = self._prepare(query, key, value, mask)
        options: dict[str, Any] = {"mask": mask, "kv_lengths": kv_lengths, "causal": causal}
        o = self._attend(q, k, v, self.dropout if self.training else 0.0, **options)
        output = join_heads(o, query)
        if not need_weights:
            return output
        p = self._weights(q, k, **options)
        return output, per_row(p.to(o.dtype), query)


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


def reset_linear(linear: torch.nn.Linear) -> None:
    """Draws a projection anew: Glorot's uniform distribution, 0 for the bias."""
    torch.nn.init.xavier_uniform_(linear.weight)
    if linear.bias is not None:
        torch.nn.init.zeros_(linear.bias)


def reset_score_weight(score_weight: Tensor) -> None:
    """Draws v_a anew, so that the scores of independent hidden features have a variance of at most 1/3."""
    bound = score_weight.size(-1) ** -0.5
    torch.nn.init.uniform_(score_weight, -bound, bound)
