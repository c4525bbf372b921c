"""Additive attention (Bahdanau) with its projections."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from fastattn._additive import additive_attention
from fastattn._arguments import Causal
from fastattn.nn.checks import check_dropout, check_heads, check_sizes
from fastattn.nn.projected import ProjectedKeys, ProjectedKeysAttention, join_heads, per_row
from fastattn.nn.weights import additive_weights


class AdditiveScoreAttention(ProjectedKeysAttention):
    """The forward of modules whose score is w . tanh(q + k), with one row of w for each head."""

    dropout: float
    score_weight: torch.nn.Parameter  # (H, D) or (D,)

    def _attend_additive(
        self,
        query: Tensor,
        key: Tensor | ProjectedKeys,
        value: Tensor | None,
        mask: Tensor | None,
        kv_lengths: Tensor | None,
        causal: Causal,
        need_weights: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        q, k, v, mask = self._prepare(query, key, value, mask)
        dropout_p = self.dropout if self.training else 0.0
        w = self.score_weight
        o = additive_attention(q, k, v, w, mask=mask, kv_lengths=kv_lengths, causal=causal, dropout_p=dropout_p)
        output = join_heads(o, query)
        if not need_weights:
            return output
        p = additive_weights(q, k, w, mask=mask, kv_lengths=kv_lengths, causal=causal)
        return output, per_row(p.to(o.dtype), query)


class AdditiveAttention(AdditiveScoreAttention):
    r"""Additive attention, as it was introduced for alignment and translation, with its projections, fused.

    For the query s_i (a decoder's state) and the keys h_j (an encoder's annotations) of one sequence::

        e_ij = v_a . tanh(W_a s_i + U_a h_j + b)          W_a: query_proj    U_a, b: key_proj    v_a: score_weight
        a_ij = softmax over j of e_ij                     over the keys that the masks keep
        c_i  = sum_j dropout(a_ij) value_j                the values are the keys themselves, unless others are given

    Plain code holds tanh(...), B Lq Lk attn_dim numbers; this holds nothing of the kind, forward or backward. A decoder
    that takes one step after the other projects the keys once, with `project_keys`.

    With several heads, head h has its own row of score_weight, an equal part of attn_dim, and the h-th part of the
    values' features.

    Args:
        query_dim: Features of the queries.
        key_dim: Features of the keys.
        attn_dim: Hidden features of the scores, all heads together; a multiple of num_heads.
        value_dim: Features of the values, key_dim by default; a multiple of num_heads.
        num_heads: The number of heads, H.
        bias: Whether there is a b.
        dropout: Probability in [0, 1] that a weight is dropped, in training mode.
        device: Where the parameters are.
        dtype: Their type.

    Raises:
        ValueError: A size is not positive or not a multiple of num_heads, or dropout is no probability.
        TypeError: A size is no int, or dropout no number.

    Source:
        D. Bahdanau, K. Cho and Y. Bengio, "Neural machine translation by jointly learning to align and translate",
        ICLR 2015, section 3.1 and appendix A.1.2. (They have no b, no dropout and one head.)

    Example:
        >>> import torch, fastattn
        >>> attend = fastattn.nn.AdditiveAttention(query_dim=32, key_dim=48, attn_dim=64)
        >>> annotations, lengths = torch.randn(2, 9, 48), torch.tensor([9, 6], dtype=torch.int32)
        >>> keys = attend.project_keys(annotations)  # once
        >>> cell, state = torch.nn.GRUCell(48, 32), torch.zeros(2, 32)
        >>> for _ in range(3):
        ...     context, weights = attend(state, keys, kv_lengths=lengths, need_weights=True)
        ...     state = cell(context, state)
        >>> context.shape, weights.shape, bool(weights[1, 6:].any())
        (torch.Size([2, 48]), torch.Size([2, 9]), False)
    """

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        attn_dim: int,
        value_dim: int | None = None,
        num_heads: int = 1,
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        value_dim = key_dim if value_dim is None else value_dim
        check_sizes(query_dim=query_dim, key_dim=key_dim, attn_dim=attn_dim, value_dim=value_dim, num_heads=num_heads)
        check_heads("attn_dim", attn_dim, num_heads)
        check_heads("value_dim", value_dim, num_heads)
        check_dropout(dropout)
        self.query_dim, self.key_dim, self.attn_dim, self.value_dim = query_dim, key_dim, attn_dim, value_dim
        self.num_heads = num_heads
        self.dropout = dropout
        self.query_proj = torch.nn.Linear(query_dim, attn_dim, bias=False, device=device, dtype=dtype)
        self.key_proj = torch.nn.Linear(key_dim, attn_dim, bias=bias, device=device, dtype=dtype)
        self.score_weight = torch.nn.Parameter(
            torch.empty(num_heads, attn_dim // num_heads, device=device, dtype=dtype)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew: Glorot's uniform distribution for the projections, 0 for the bias.

        v_a is drawn so that the scores of independent hidden features have a variance of at most 1/3.
        """
        torch.nn.init.xavier_uniform_(self.query_proj.weight)
        torch.nn.init.xavier_uniform_(self.key_proj.weight)
        if self.key_proj.bias is not None:
            torch.nn.init.zeros_(self.key_proj.bias)
        bound = self.score_weight.size(-1) ** -0.5
        torch.nn.init.uniform_(self.score_weight, -bound, bound)

    def extra_repr(self) -> str:
        """What is shown between the parentheses, beside the projections."""
        return f"num_heads={self.num_heads}, dropout={self.dropout}"

    def _project_key(self, key: Tensor) -> Tensor:
        return self.key_proj(key)

    def _project_query(self, query: Tensor) -> Tensor:
        return self.query_proj(query)

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
            value: (B, Lk, value_dim); None = the keys. Projected keys have theirs already.
            mask: Bool, **True = keep** (unlike torch.nn.MultiheadAttention): (B, Lk) for padding, (B, Lq, Lk) or
                (B, H, Lq, Lk); each dimension may be 1.
            kv_lengths: (B,), int32: the number of keys that exist. Values beyond are not read; keys beyond are
                projected like the others, so they must be finite for the gradients of the projection.
            causal: As in fastattn.attention.
            need_weights: Whether to compute and return the weights, with plain operations in O(B Lq Lk attn_dim)
                memory: for looking at.

        Returns:
            output: (B, Lq, value_dim), or (B, value_dim). A query that sees no key has an output of 0.
            weights: (B, Lq, Lk), with several heads (B, H, Lq, Lk), for a query (B, query_dim) without Lq; before
                dropout, differentiable. Returned as the pair (output, weights) with need_weights.

        Raises:
            ValueError: Shapes, sizes, devices or lengths break a rule above.
            TypeError: An argument has the wrong type or dtype.
        """
        return self._attend_additive(query, key, value, mask, kv_lengths, causal, need_weights)
