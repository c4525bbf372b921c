"""Hard attention with its projections."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from fastattn._arguments import Causal
from fastattn._hard import (
    ESTIMATORS,
    MODES,
    Estimator,
    HardAttentionOutput,
    Mode,
    check_choice,
    check_temperature,
    hard_attention,
)
from fastattn.nn.projected import ProjectedKeys, ProjectedKeysAttention, join_heads, per_row, reset_linear
from fastattn.nn.weights import dot_weights


class HardAttention(ProjectedKeysAttention):
    r"""Hard attention: each query takes the value of one key, drawn or the most probable one, fused.

    With D = attn_dim / num_heads and t = temperature, for the queries s_i and the keys a_j of one sequence::

        e_ij     = (W_q s_i + b_q) . (W_k a_j + b_k) / (t sqrt(D))          W_q: query_proj    W_k: key_proj
        p_ij     = softmax over j of e_ij                                   over the keys that the masks keep
        index_i  ~ p_i in training mode, argmax p_i in eval mode
        output_i = value[index_i]                                           log_prob_i = log p_i,index_i

    The choice has no derivative. With ``estimator="reinforce"`` gradients reach the projections through log_prob: put
    ``-(reward * log_prob).mean()`` into the loss, where the reward has no gradient and is best measured against a
    baseline. With ``"straight_through"`` the output has the gradient of soft attention, which is biased and needs no
    reward.

    With several heads, each makes a choice of its own, and takes its part of the values' features.

    Args:
        query_dim: Features of the queries.
        key_dim: Features of the keys.
        attn_dim: Features of the dot product, all heads together; a multiple of num_heads.
        value_dim: Features of the values, key_dim by default; a multiple of num_heads.
        num_heads: The number of heads, H.
        bias: Whether the projections have biases.
        estimator: "reinforce" or "straight_through".
        temperature: A positive number; high ones make all keys alike.
        train_mode: "sample" or "argmax": what to do in training mode.
        eval_mode: "argmax" or "sample": what to do in eval mode.
        device: Where the parameters are.
        dtype: Their type.

    Raises:
        ValueError: A size is not positive or not a multiple of num_heads, or another argument is none of the values
            above.
        TypeError: A size is no int, or temperature no float.

    Source:
        K. Xu et al., "Show, attend and tell: neural image caption generation with visual attention", ICML 2015, section
        4.1. (Their scores come from a small network of both; here it is the dot product.) R. J. Williams, "Simple
        statistical gradient-following algorithms for connectionist reinforcement learning", Machine Learning 8, 1992.

    Example:
        >>> import torch, fastattn
        >>> attend = fastattn.nn.HardAttention(query_dim=32, key_dim=48, attn_dim=16)
        >>> state, patches = torch.randn(2, 32), torch.randn(2, 9, 48)
        >>> glimpse, index, log_prob = attend(state, patches)
        >>> glimpse.shape, index.shape, torch.equal(glimpse[0], patches[0, index[0]])
        (torch.Size([2, 48]), torch.Size([2]), True)
        >>> reward = glimpse.detach().mean(dim=-1)
        >>> (-(reward - reward.mean()) * log_prob).mean().backward()
    """

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        attn_dim: int,
        value_dim: int | None = None,
        num_heads: int = 1,
        bias: bool = True,
        estimator: Estimator = "reinforce",
        temperature: float = 1.0,
        train_mode: Mode = "sample",
        eval_mode: Mode = "argmax",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._set_sizes(query_dim, key_dim, attn_dim, value_dim, num_heads)
        check_choice("estimator", estimator, ESTIMATORS)
        check_temperature(temperature)
        check_choice("train_mode", train_mode, MODES)
        check_choice("eval_mode", eval_mode, MODES)
        self.estimator, self.temperature = estimator, temperature
        self.train_mode, self.eval_mode = train_mode, eval_mode
        self.query_proj = torch.nn.Linear(query_dim, attn_dim, bias=bias, device=device, dtype=dtype)
        self.key_proj = torch.nn.Linear(key_dim, attn_dim, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew: Glorot's uniform distribution for the projections, 0 for the biases."""
        reset_linear(self.query_proj)
        reset_linear(self.key_proj)

    def extra_repr(self) -> str:
        """What is shown between the parentheses, beside the projections."""
        return f"num_heads={self.num_heads}, estimator={self.estimator!r}, temperature={self.temperature}"

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
        generator: torch.Generator | None = ...,
        need_weights: Literal[False] = ...,
    ) -> HardAttentionOutput: ...

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
        generator: torch.Generator | None = ...,
        need_weights: Literal[True],
    ) -> tuple[HardAttentionOutput, Tensor]: ...

    def forward(
        self,
        query: Tensor,
        key: Tensor | ProjectedKeys,
        value: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        kv_lengths: Tensor | None = None,
        causal: Causal = False,
        generator: torch.Generator | None = None,
        need_weights: bool = False,
    ) -> HardAttentionOutput | tuple[HardAttentionOutput, Tensor]:
        """The values that were chosen, which they are, and their log-probabilities.

        Args:
            query: (B, Lq, query_dim), or (B, query_dim) for one query to each sequence.
            key: (B, Lk, key_dim), or what `project_keys` returned.
            value: (B, Lk, value_dim); None = the keys. Projected keys have theirs already.
            mask: Bool, **True = keep** (unlike torch.nn.MultiheadAttention): (B, Lk) for padding, (B, Lq, Lk) or
                (B, H, Lq, Lk); each dimension may be 1.
            kv_lengths: (B,), int32: the number of keys that exist. Values beyond are not read; keys beyond are
                projected like the others, so they must be finite for the gradients of the projection.
            causal: As in fastattn.attention.
            generator: Where to draw from; None = torch's default one of the query's device.
            need_weights: Whether to compute and return the probabilities p, with plain operations: for looking at.

        Returns:
            HardAttentionOutput(output, index, log_prob): (B, Lq, value_dim), and twice (B, Lq), with several heads
            (B, H, Lq); for a query (B, query_dim) all without Lq. A query that sees no key has output 0, index -1 and
            log_prob 0. With need_weights the pair (that, p), where p is (B, Lq, Lk), with several heads (B, H, Lq, Lk).

        Raises:
            ValueError: Shapes, sizes, devices or lengths break a rule above.
            TypeError: An argument has the wrong type or dtype.
        """
        q, k, v, mask = self._prepare(query, key, value, mask)
        o, index, log_prob = hard_attention(
            q,
            k,
            v,
            mode=self.train_mode if self.training else self.eval_mode,
            temperature=self.temperature,
            estimator=self.estimator,
            mask=mask,
            causal=causal,
            kv_lengths=kv_lengths,
            generator=generator,
        )
        chosen = HardAttentionOutput(join_heads(o, query), per_row(index, query), per_row(log_prob, query))
        if not need_weights:
            return chosen
        scale = q.size(-1) ** -0.5 / self.temperature
        p = dot_weights(q, k, scale=scale, mask=mask, kv_lengths=kv_lengths, causal=causal)
        return chosen, per_row(p.to(o.dtype), query)
