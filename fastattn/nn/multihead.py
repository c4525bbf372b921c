"""Multi-head attention: torch.nn.MultiheadAttention over the fused kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import _errors, _ops, reference
from fastattn._attention import attend, attention
from fastattn.nn.checks import check_dropout, check_features, check_heads, check_like_module, check_sizes
from fastattn.nn.weights import dot_weights

# In eval mode torch.nn.TransformerEncoderLayer takes the parameters out of its self_attn and computes without calling
# it, except where a module in it has a hook. This key is no integer, as those of PyTorch's handles are: they begin
# again at 0 in a process that loads a pickled module, and would overwrite it.
_MARK = "fastattn"


def _is_to_be_called(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
    """The hook: it does nothing, its presence does."""


def mark(module: torch.nn.Module) -> None:
    """Keeps torch.nn.TransformerEncoderLayer from passing the module by."""
    module._forward_pre_hooks[_MARK] = _is_to_be_called  # type: ignore[index]


def unmark(module: torch.nn.Module) -> None:
    """Undoes `mark`."""
    module._forward_pre_hooks.pop(_MARK, None)  # type: ignore[call-overload]


class MultiheadAttention(torch.nn.MultiheadAttention):
    r"""Attention in several learned subspaces: torch.nn.MultiheadAttention, fused.

    With H = num_heads, D = embed_dim / H, and W, b the rows of the parameters that belong to head h::

        q_h = query W_q^T + b_q      k_h = key W_k^T + b_k      v_h = value W_v^T + b_v
        p_h = dropout(softmax(q_h k_h^T / sqrt(D) + masks))
        output = [p_1 v_1, ..., p_H v_H] W_o^T + b_o            weights = p_h, or their mean over h

    Constructor, arguments, shapes, parameters with their names and initial values, and results are those of
    torch.nn.MultiheadAttention, of which this is a subclass: state dicts load both ways. The output never comes from a
    matrix of weights: all of it between the projections is one operation, forward and backward, and a padding mask is
    used as the (N, S) that it is. ``need_weights=True`` computes the weights beside it, with plain operations in
    O(N H L S) memory; pass False wherever nobody looks at them.

    What differs from torch.nn.MultiheadAttention:

    - A query that may attend to no key has output ``b_o`` and weights of 0, with gradients of 0. PyTorch has NaN there.
    - The masks are True where a key is to be *ignored*, as PyTorch has them here; everywhere else in fastattn, and in
      torch.nn.functional.scaled_dot_product_attention, True keeps it.
    - ``is_causal=True`` is a promise that attn_mask is the causal mask. Without weights it is relied upon also when
      there is a key_padding_mask, and attn_mask is not read. (PyTorch relies on it only when there is none.)
    - Dropout draws other random numbers, reproducible under ``torch.manual_seed``; the weights that are returned have
      the very dropout that the output had.
    - A bool attn_mask goes together with a float key_padding_mask, and the other way round, without a warning.
    - Nested tensors of the strided layout are served in training and with gradients too.
    - What it refuses, it refuses with a ValueError or TypeError; PyTorch raises AssertionError or RuntimeError.
    - torch.compile and torch.export take it, torch.jit.script does not. torch.jit.trace records it for inference: trace
      it under ``torch.no_grad()``, and the result takes inputs of any size (weights after dropout: those of the size
      traced), draws dropout anew and has no gradients.

    In eval mode torch.nn.TransformerEncoderLayer has a path that passes its attention module by. A hook in every
    instance, which does nothing, keeps it from that.

    Args:
        embed_dim: Features of queries and of the output; a multiple of num_heads.
        num_heads: The number of heads, H.
        dropout: Probability in [0, 1] that a weight is dropped, in training mode.
        bias: Whether the projections have biases.
        add_bias_kv: Append a learned key and value, bias_k and bias_v, to each sequence.
        add_zero_attn: Append a key and value of zeros to each sequence.
        kdim: Features of keys, embed_dim by default.
        vdim: Features of values, embed_dim by default.
        batch_first: Whether tensors are (N, L, E) rather than (L, N, E).
        device: Where the parameters are.
        dtype: Their type.

    Raises:
        ValueError: A size is not positive, num_heads does not divide embed_dim, or dropout is no probability.
        TypeError: A size is no int, or dropout no number.

    Source:
        A. Vaswani et al., "Attention is all you need", NeurIPS 2017, section 3.2.2. T. Dao, "FlashAttention-2", ICLR
        2024.

    Example:
        >>> import torch, fastattn
        >>> attend = fastattn.nn.MultiheadAttention(embed_dim=64, num_heads=4, batch_first=True)
        >>> x = torch.randn(2, 10, 64)
        >>> padding = torch.arange(10) >= torch.tensor([[10], [7]])
        >>> output, weights = attend(x, x, x, key_padding_mask=padding)
        >>> output.shape, weights.shape, bool(weights[1, :, 7:].any())
        (torch.Size([2, 10, 64]), torch.Size([2, 10, 10]), False)
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        given = {"embed_dim": embed_dim, "num_heads": num_heads}
        given |= {name: size for name, size in (("kdim", kdim), ("vdim", vdim)) if size is not None}
        check_sizes(**given)
        check_heads("embed_dim", embed_dim, num_heads)
        check_dropout(dropout)
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        mark(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        mark(self)

    def __prepare_scriptable__(self) -> torch.nn.Module:
        raise TypeError(
            "fastattn: MultiheadAttention cannot be compiled by torch.jit.script; use torch.compile or torch.export, or"
            " put PyTorch's module back with fastattn.restore_modules(model) first."
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The output, and the weights if they are wanted.

        Args:
            query: (L, N, E), or (N, L, E) with batch_first, or (L, E) without a batch.
            key: (S, N, kdim), (N, S, kdim) or (S, kdim).
            value: (S, N, vdim), (N, S, vdim) or (S, vdim).
            key_padding_mask: (N, S), or (S,) without a batch. Bool: True = nobody attends to this key. Float: added to
                the scores of this key.
            need_weights: Whether to compute and return the weights.
            attn_mask: (L, S), or (N * H, L, S) with one for each sequence and head. Bool: True = this query does not
                attend to this key. Float: added to the scores; it may require a gradient.
            average_attn_weights: Whether the weights are averaged over the heads.
            is_causal: Promises that attn_mask, which must be given, is the causal mask: query i sees no key j > i.

        The three inputs may be nested tensors of the strided layout with batch_first, without masks; then the output is
        one too, and the weights are padded with zeros.

        Returns:
            output: the shape of query.
            weights: None; or (N, L, S), without average_attn_weights (N, H, L, S), without a batch (L, S) and
                (H, L, S); in the output's dtype, after dropout, differentiable. A row sums to 1 where there is no
                dropout. Keys that add_bias_kv and add_zero_attn append are counted in S.

        Raises:
            ValueError: Shapes, sizes or devices break a rule above, or is_causal comes without attn_mask.
            TypeError: An argument has the wrong type or dtype.
        """
        for name, x in (("query", query), ("key", key), ("value", value)):
            if not isinstance(x, Tensor):
                raise TypeError(f"fastattn: {name} is a {type(x).__name__}; it must be a torch.Tensor.")
        if query.is_nested or key.is_nested or value.is_nested:
            return self._forward_nested(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        weight = self.out_proj.weight  # once: where it is parametrized, each look at it computes it
        self._check_inputs(query, key, value, weight)
        q, k, v = self._project(query, key, value)
        appended = (self.bias_k is not None) + bool(self.add_zero_attn)
        _check_masks(q, k, query.dim() == 3, attn_mask, key_padding_mask)
        if is_causal and attn_mask is None:
            raise ValueError(
                "fastattn: is_causal is True without an attn_mask; it is a hint about attn_mask, which must be given:"
                " pass torch.nn.Transformer.generate_square_subsequent_mask(L)."
            )
        # A key that was appended lies beyond every row's diagonal, and PyTorch lets only the mask show it.
        is_causal = is_causal and not need_weights and (not appended or key_padding_mask is None)
        mask, bias = _masks(q, None if is_causal else attn_mask, key_padding_mask, appended)
        if appended:
            k, v = self._append(k, v)
        o, weights = self._attend(q, k, v, mask, bias, None, is_causal, need_weights, average_attn_weights)
        if query.dim() == 2:
            output = self._project_out(o.squeeze(0).transpose(0, 1), weight)
            return output, None if weights is None else weights.squeeze(0)
        # o lies in memory as (N, L, H, D): with batch_first no copy is made. Without, it makes the output contiguous,
        # as PyTorch's is there.
        o = o.transpose(1, 2) if self.batch_first else o.permute(2, 0, 1, 3).contiguous()
        return self._project_out(o, weight), weights

    def _forward_nested(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The same for nested tensors, which torch.nn.TransformerEncoder makes of padded ones in eval mode."""
        if not all(x.is_nested and x.layout is torch.strided for x in (query, key, value)):
            raise TypeError(
                "fastattn: of query, key and value some are nested tensors; either all of them are, with"
                " layout=torch.strided, or none: pad with torch.nested.to_padded_tensor and pass a key_padding_mask."
            )
        if key_padding_mask is not None or attn_mask is not None or is_causal:
            raise ValueError(
                "fastattn: key_padding_mask, attn_mask or is_causal was given with nested tensors; their lengths say"
                " what is padding, and other masks take padded tensors: pad with torch.nested.to_padded_tensor."
            )
        if not self.batch_first:
            raise ValueError(
                "fastattn: query is a nested tensor and batch_first is False; the sequences of a nested tensor come"
                " first: construct the module with batch_first=True."
            )
        if self.bias_k is not None or self.add_zero_attn:
            raise ValueError(
                "fastattn: query is a nested tensor and the module appends keys (add_bias_kv or add_zero_attn); they"
                " would come after the padding: pad with torch.nested.to_padded_tensor and pass a key_padding_mask."
            )
        lengths, key_lengths, value_lengths = ([x.size(0) for x in xs.unbind()] for xs in (query, key, value))
        if key_lengths != value_lengths:
            raise ValueError(
                f"fastattn: the sequences of key have lengths {key_lengths} and those of value {value_lengths}; each"
                " key has one value: they must be the same."
            )
        if len(lengths) != len(key_lengths):
            raise ValueError(
                f"fastattn: query holds {len(lengths)} sequences and key {len(key_lengths)}; they must hold the"
                " same number."
            )
        is_self, is_shared = query is key and key is value, key is value
        padded_query = query.to_padded_tensor(0.0)
        padded_key = padded_query if is_self else key.to_padded_tensor(0.0)
        padded_value = padded_key if is_shared else value.to_padded_tensor(0.0)
        weight = self.out_proj.weight
        self._check_inputs(padded_query, padded_key, padded_value, weight)
        q, k, v = self._project(padded_query, padded_key, padded_value)
        kv_lengths = torch.tensor(key_lengths, dtype=torch.int32, device=q.device)
        o, weights = self._attend(q, k, v, None, None, kv_lengths, False, need_weights, average_attn_weights)
        if weights is not None:
            rows = torch.arange(q.size(2)) >= torch.tensor(lengths).view(-1, 1)
            rows = rows.to(q.device).view(len(lengths), *(1,) * (weights.dim() - 3), -1, 1)
            weights = weights.masked_fill(rows, 0)
        output = self._project_out(o.transpose(1, 2), weight)
        return torch.nested.as_nested_tensor([x[:n] for x, n in zip(output, lengths, strict=True)]), weights

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> None:
        dims = (self.embed_dim, self.kdim, self.vdim)
        for name, x, features in zip(("query", "key", "value"), (query, key, value), dims, strict=True):
            if x.dim() not in (2, 3) or x.dim() != query.dim():
                raise ValueError(
                    f"fastattn: {name} has shape {tuple(x.shape)}; query, key and value must all have 3 dimensions, or"
                    " all 2 without a batch."
                )
            check_features(name, x, features)
            check_like_module(name, x, weight)
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"fastattn: key has shape {tuple(key.shape)} and value {tuple(value.shape)}; each key has one value:"
                " all but their last dimensions must be the same."
            )
        batch = 0 if self.batch_first else 1
        if query.dim() == 3 and query.size(batch) != key.size(batch):
            raise ValueError(
                f"fastattn: query has shape {tuple(query.shape)} and key {tuple(key.shape)}; dimension {batch} is the"
                f" batch (batch_first={self.batch_first}) and must be the same."
            )

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """q, k, v: (N, H, L, D), (N, H, S, D), (N, H, S, D), views of one matrix product where the inputs are one."""
        weight: Tensor | None = self.in_proj_weight
        bias: Tensor | None = self.in_proj_bias
        E = self.embed_dim
        # Inputs, and the rows of the projection that they go through: q's, k's and v's, in this order.
        if weight is None:
            inputs, sizes = [query, key, value], [E, E, E]
            weights: Sequence[Tensor] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        else:
            if query is key and key is value:
                inputs, sizes = [query], [3 * E]
            elif key is value:
                inputs, sizes = [query, key], [E, 2 * E]
            else:
                inputs, sizes = [query, key, value], [E, E, E]
            weights = weight.split(sizes)
        biases: Sequence[Tensor | None] = [None] * len(sizes) if bias is None else bias.split(sizes)
        packed = [F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]
        # The gradients of unbind's results are put together in one copy, those of slices in one sum each.
        heads = [x for xs in packed for x in xs.unflatten(-1, (-1, self.num_heads, self.head_dim)).unbind(-3)]
        if query.dim() == 2:
            return [x.transpose(0, 1).unsqueeze(0) for x in heads]
        return [x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3) for x in heads]

    def _append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k and v with what add_bias_kv and add_zero_attn append."""
        N, H, _, D = k.shape
        ends: list[list[Tensor]] = [[k], [v]]
        for parts, learned in zip(ends, (self.bias_k, self.bias_v), strict=True):
            x = parts[0]
            if learned is not None:
                parts.append(learned.to(x.dtype).view(1, H, 1, D).expand(N, -1, -1, -1))
            if self.add_zero_attn:
                parts.append(x.new_zeros(()).expand(N, H, 1, D))
        return torch.cat(ends[0], dim=2), torch.cat(ends[1], dim=2)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        kv_lengths: Tensor | None,
        is_causal: bool,
        need_weights: bool,
        average: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """o (N, H, L, D), and the weights (N, L, S) or (N, H, L, S) or None."""
        dropout_p = self.dropout if self.training else 0.0
        causal = "top_left" if is_causal else False
        if not need_weights:
            options: dict[str, Any] = {"causal": causal, "mask": mask, "bias": bias, "kv_lengths": kv_lengths}
            return attention(q, k, v, dropout_p=dropout_p, **options), None
        rng_state = _ops.draw_rng_state(q.device) if 0.0 < dropout_p <= 1.0 else None
        tensors = {"q": q, "k": k, "v": v, "bias": bias, "mask": mask, "kv_lengths": kv_lengths}
        try:
            o, _ = attend(
                q, k, v, bias, mask, None, None, kv_lengths, 0, -1, -1, None, 0.0, dropout_p, rng_state=rng_state
            )
        except Exception as error:
            _errors.raise_explained(error, tensors, {"dropout_p": dropout_p})
        p = dot_weights(q, k, bias=bias, mask=mask, kv_lengths=kv_lengths)
        if rng_state is not None:
            keep = torch.ops.fastattn.dropout_mask(rng_state, *p.shape, dropout_p)
            p = reference.dropped(p, keep, dropout_p)
        return o, (p.mean(dim=1) if average else p).to(o.dtype)

    def _project_out(self, o: Tensor, weight: Tensor) -> Tensor:
        """o (..., H, D) -> (..., E)."""
        return F.linear(o.flatten(-2), weight, self.out_proj.bias)


def _check_masks(
    q: Tensor, k: Tensor, is_batched: bool, attn_mask: Tensor | None, key_padding_mask: Tensor | None
) -> None:
    """Refuses masks that do not fit q (N, H, L, D) and k (N, H, S, D)."""
    N, H, L, _ = q.shape
    S = k.size(2)
    for name, mask in (("attn_mask", attn_mask), ("key_padding_mask", key_padding_mask)):
        if mask is None:
            continue
        if not isinstance(mask, Tensor):
            raise TypeError(f"fastattn: {name} is a {type(mask).__name__}; it must be a torch.Tensor.")
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(
                f"fastattn: {name} is {mask.dtype}; it must be bool (True = ignore this key) or float (added to the"
                f" scores): convert with {name}.bool()."
            )
        if mask.device != q.device:
            raise _errors.wrong_device(name, mask, q)
    if attn_mask is not None and attn_mask.shape not in ((L, S), (N * H, L, S)):
        raise ValueError(
            f"fastattn: attn_mask has shape {tuple(attn_mask.shape)}; it must be (L, S) = {(L, S)}, or"
            f" {'(N * H' if is_batched else '(H'}, L, S) = {(N * H, L, S)}."
        )
    padding_shape = (N, S) if is_batched else (S,)
    if key_padding_mask is not None and key_padding_mask.shape != padding_shape:
        raise ValueError(
            f"fastattn: key_padding_mask has shape {tuple(key_padding_mask.shape)}; it must be"
            f" {'(N, S)' if is_batched else '(S,)'} = {padding_shape}."
        )


def _masks(
    q: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, appended: int
) -> tuple[Tensor | None, Tensor | None]:
    """The bool mask (True = keep) and the bias that PyTorch's two masks come to.

    A mask and a bias broadcast apart, so that neither is larger than what was given; only two float masks make a sum,
    (N, 1 or H, L, S).
    """
    N, H, _, _ = q.shape
    if attn_mask is not None:
        attn_mask = F.pad(attn_mask, (0, appended)) if appended else attn_mask
        attn_mask = attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.unflatten(0, (N, H))
    if key_padding_mask is not None:
        key_padding_mask = F.pad(key_padding_mask, (0, appended)) if appended else key_padding_mask
        key_padding_mask = key_padding_mask.view(N, 1, 1, -1)
    hides, floats = [], []
    for x in (attn_mask, key_padding_mask):
        if x is not None and x.dtype == torch.bool:
            hides.append(x)
        elif x is not None:
            # A float32 mask stays float32 beside 16-bit scores: rounded to bfloat16, finfo.min would become -inf.
            floats.append(x if x.dtype == q.dtype else x.to(_ops.accumulator_dtype(q.dtype)))
    if len(hides) == 2:  # the larger one lets the kernel skip tiles
        floats.append(torch.zeros_like(hides[1], dtype=q.dtype).masked_fill(hides.pop(), -math.inf))
    bias = floats[0] + floats[1] if len(floats) == 2 else floats[0] if floats else None
    if hides:
        return ~hides[0], bias
    if bias is None or floats[0].size(1) == H > 1:  # as large as all scores
        return None, bias
    # The keys that -inf hides are hidden once more, for the kernel looks at masks alone to skip tiles. Transformer
    # layers make float masks of all: a third of padding took 87 ms so far and takes 68, a causal mask 88 and 52 (one
    # thread, N=4, L=512, H=8, D=64, forward and backward).
    return floats[0] != -math.inf, bias
