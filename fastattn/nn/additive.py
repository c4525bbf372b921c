"""Additive attention (Bahdanau) with its projections."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn._additive import additive_attention
from fastattn.nn.checks import check_dropout
from fastattn.nn.projected import SoftAttention, reset_linear, reset_score_weight
from fastattn.nn.weights import additive_weights


class AdditiveAttention(SoftAttention):
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
        self._set_sizes(query_dim, key_dim, attn_dim, value_dim, num_heads)
        check_dropout(dropout)
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
        reset_linear(self.query_proj)
        reset_linear(self.key_proj)
        reset_score_weight(self.score_weight)

    def extra_repr(self) -> str:
        """What is shown between the parentheses, beside the projections."""
        return f"num_heads={self.num_heads}, dropout={self.dropout}"

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, **options: Any) -> Tensor:
        return additive_attention(q, k, v, self.score_weight, dropout_p=dropout_p, **options)

    def _weights(self, q: Tensor, k: Tensor, **options: Any) -> Tensor:
        return additive_weights(q, k, self.score_weight, **options)
