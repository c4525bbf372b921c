"""Multiplicative attention (Luong): dot, general and concat."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn._additive import additive_attention
from fastattn._attention import attention
from fastattn.nn.checks import check_dropout, check_sizes
from fastattn.nn.projected import SoftAttention, reset_linear, reset_score_weight
from fastattn.nn.weights import additive_weights, dot_weights

Score = Literal["dot", "general", "concat"]


class LuongAttention(SoftAttention):
    r"""Global attention with one of Luong's three scores, fused.

    For the query h_i (a decoder's state) and the keys hs_j (an encoder's states) of one sequence::

        score="dot"        e_ij = h_i . hs_j                           no parameters; not divided by sqrt(D)
        score="general"    e_ij = h_i . W_a hs_j                       query_proj is W_a transposed
        score="concat"     e_ij = v_a . tanh(W_a [h_i; hs_j])          concat_proj is W_a, score_weight is v_a
        a_ij = softmax over j of e_ij                                  over the keys that the masks keep
        c_i  = sum_j dropout(a_ij) value_j                             the values are the keys, unless others are given

    "concat" is additive attention: the two halves of W_a project queries and keys apart, which plain code that joins
    every pair does not see. `project_keys` does the keys' half once for all steps of a decoder. The paper goes on from
    c_i to tanh(W_c [c_i; h_i]); that is the decoder's.

    Args:
        score: "dot", "general" or "concat".
        query_dim: Features of the queries. Not needed for "dot", whose queries and keys are of one size.
        key_dim: Features of the keys, query_dim by default.
        attn_dim: Hidden features of "concat", query_dim by default; for the other scores there are none.
        bias: Whether W_a of "concat" has a bias. The paper has none.
        dropout: Probability in [0, 1] that a weight is dropped, in training mode.
        device: Where the parameters are.
        dtype: Their type.

    Raises:
        ValueError: score has another value, a size that it needs is missing or not positive, a size or bias is given
            that it does not have, or dropout is no probability.
        TypeError: A size is no int, or dropout no number.

    Source:
        M.-T. Luong, H. Pham and C. D. Manning, "Effective approaches to attention-based neural machine translation",
        EMNLP 2015, section 3.1.

    Example:
        >>> import torch, fastattn
        >>> states, encoded = torch.randn(2, 4, 32), torch.randn(2, 9, 48)
        >>> attend = fastattn.nn.LuongAttention("general", query_dim=32, key_dim=48)
        >>> context, weights = attend(states, encoded, need_weights=True)
        >>> context.shape, weights.shape
        (torch.Size([2, 4, 48]), torch.Size([2, 4, 9]))
        >>> fastattn.nn.LuongAttention("dot")(states, torch.randn(2, 9, 32)).shape
        torch.Size([2, 4, 32])
    """

    def __init__(
        self,
        score: Score,
        query_dim: int | None = None,
        key_dim: int | None = None,
        attn_dim: int | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if score not in ("dot", "general", "concat"):
            raise ValueError(f"fastattn: score is {score!r}; it must be 'dot', 'general' or 'concat'.")
        sizes = {"query_dim": query_dim, "key_dim": key_dim, "attn_dim": attn_dim}
        check_sizes(**{name: size for name, size in sizes.items() if size is not None})
        check_dropout(dropout)
        if score != "dot" and query_dim is None:
            raise ValueError(f"fastattn: query_dim is missing; the score {score!r} has parameters of that size.")
        if score != "concat" and (attn_dim is not None or bias):
            raise ValueError(
                f"fastattn: attn_dim is {attn_dim} and bias {bias} with the score {score!r}; only 'concat' has hidden"
                " features and a bias: leave them out."
            )
        key_dim = query_dim if key_dim is None else key_dim
        if score == "dot" and query_dim != key_dim:
            raise ValueError(
                f"fastattn: query_dim is {query_dim} and key_dim {key_dim} with the score 'dot'; the dot product needs"
                " both to be the same: use 'general'."
            )
        self.score = score
        self.num_heads = 1
        self.query_dim, self.key_dim, self.value_dim = query_dim, key_dim, None
        self.dropout = dropout
        if query_dim is not None and key_dim is not None and score != "dot":
            if score == "general":
                self.query_proj = torch.nn.Linear(query_dim, key_dim, bias=False, device=device, dtype=dtype)
            else:
                self.attn_dim = query_dim if attn_dim is None else attn_dim
                features = query_dim + key_dim
                self.concat_proj = torch.nn.Linear(features, self.attn_dim, bias=bias, device=device, dtype=dtype)
                self.score_weight = torch.nn.Parameter(torch.empty(self.attn_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew: Glorot's uniform distribution for W_a, v_a so that scores have variance <= 1/3."""
        if self.score == "general":
            reset_linear(self.query_proj)
        elif self.score == "concat":
            reset_linear(self.concat_proj)
            reset_score_weight(self.score_weight)

    def extra_repr(self) -> str:
        """What is shown between the parentheses, beside the projections."""
        return f"{self.score!r}, dropout={self.dropout}"

    def _project_key(self, key: Tensor) -> Tensor:
        if self.score != "concat":
            return key
        # The bias goes with the keys: they are projected once.
        assert self.query_dim is not None
        return F.linear(key, self.concat_proj.weight[:, self.query_dim :], self.concat_proj.bias)

    def _project_query(self, query: Tensor) -> Tensor:
        if self.score == "dot":
            return query
        if self.score == "general":
            return self.query_proj(query)
        return F.linear(query, self.concat_proj.weight[:, : self.query_dim])

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, **options: Any) -> Tensor:
        if self.score == "concat":
            return additive_attention(q, k, v, self.score_weight, dropout_p=dropout_p, **options)
        return attention(q, k, v, scale=1.0, dropout_p=dropout_p, **options)

    def _weights(self, q: Tensor, k: Tensor, **options: Any) -> Tensor:
        if self.score == "concat":
            return additive_weights(q, k, self.score_weight, **options)
        return dot_weights(q, k, scale=1.0, **options)
