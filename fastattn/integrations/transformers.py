"""fastattn under Hugging Face transformers: ``attn_implementation="fastattn"``.

Two functions go into transformers' registries under one name: the attention, and the mask that it understands. Without
the second, transformers passes no mask at all to an attention that it does not know, and every padded batch and every
sliding window would be wrong without a word.

The mask function (``_transformers_mask.py``) keeps causal order, sliding windows and padding as numbers, and builds a
matrix of masks only for what is neither. ``_transformers_models.py`` knows which layers of which models can be served;
docs/transformers.md lists them.
"""

from __future__ import annotations

import functools
import math
import sys
import warnings
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn.integrations._native_mask import NativeMask, Rule, options_of
from fastattn.integrations._transformers_mask import attention_mask
from fastattn.integrations._transformers_models import NAME, ServedAttention, check, prepare

__all__ = ["NAME", "ServedAttention", "check", "register", "unregister"]

_OLDEST = (4, 57)


# --- The attention function -------------------------------------------------------------------------------------------

# What models pass on through **kwargs, and what has no say in the result of attention.
_OF_NO_EFFECT = frozenset(
    (
        "allow_is_causal_skip",
        "attention_dropout",
        "cache_position",
        "deterministic",
        "debug_io",
        "debug_io_dir",
        "dtype",
        "encoder_attention_mask",
        "encoder_hidden_states",
        "images",
        "input_ids",
        "inputs_embeds",
        "labels",
        "layer_idx",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "past_key_value",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "prune_layers",
        "return_dict",
        "seq_idx",
        "target_dtype",
        "token_type_ids",
        "use_cache",
    )
)
# What says which keys a row sees, or what a key weighs, in a way of its own. `cache` is the paged cache of continuous
# batching, which an attention function must fill.
_REFUSED = frozenset(
    (
        "alibi",
        "alibi_bias",
        "block_indices",
        "block_table",
        "block_tables",
        "cache",
        "indices",
        "attn_bias",
        "attention_bias",
        "bias",
        "sinks",
    )
)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    head_mask: Tensor | None = None,
    output_attentions: bool | None = False,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The function that transformers calls in each attention layer, with ``fastattn.attention`` in it.

    Args:
        module: The layer. Of it are read is_causal, where nothing else says so, and GPT-2's own scaling.
        query: (B, Hq, Lq, D).
        key, value: (B, Hkv, Lk, D) and (B, Hkv, Lk, Dv), Hq a multiple of Hkv.
        attention_mask: What the mask function returned; or a mask of the user's or the model's own, with four
            dimensions, broadcastable to (B, Hq, Lq, Lk), bool (True = keep) or float (added to the scores), for at
            least Lk keys. It alone says what a row sees: is_causal and sliding_window count where it is None.
        dropout: Probability that a weight is dropped; models pass 0.0 in evaluation.
        scaling: Factor on the dot products, 1/sqrt(D) by default.
        is_causal: Without a mask and with Lq > 1: row i sees no key after i. By default as the layer says, or True.
        sliding_window: Without a mask: how many keys a row sees, itself included.
        softcap: Bounds the scaled dot products.
        s_aux: (Hq,), attention sinks.
        position_bias: Broadcastable to (B, Hq, Lq, Lk), added to the scores. Differentiable.
        head_mask: (1, Hq, 1, 1) or (B, Hq, 1, 1), a factor on each head's weights.
        output_attentions: Return the weights too, before dropout: the full matrix, computed a second time for it.
        cu_seq_lens_q, cu_seq_lens_k: (sequences + 1,), int32: the ends of packed sequences in a batch of one. The mask
            function finds them by itself where position_ids start anew.

    Returns:
        o, (B, Lq, Hq, Dv), contiguous, and the weights (B, Hq, Lq, Lk) or None.

    Raises:
        ValueError, TypeError: An argument that changes the result and is not served, or is refused by
            ``fastattn.attention``.
    """
    if kwargs:
        _check_unknown(kwargs)
    B, Hq, Lq, D = query.shape
    Lk = key.shape[2]
    if key.shape[0] != B == 1:  # learned queries, one for all sequences
        B = key.shape[0]
        query = query.expand(B, -1, -1, -1)
    if scaling is None and getattr(module, "scale_attn_weights", None) is not None:
        scaling = _scaling_of_gpt2(module, D)

    if cu_seq_lens_q is not None and cu_seq_lens_q.numel() > 2:
        attention_mask = _mask_of_packed(
            attention_mask, module, query, key, is_causal, sliding_window, cu_seq_lens_q, cu_seq_lens_k
        )
    weights_too = output_attentions or _weights_are_wanted()
    is_packed = isinstance(attention_mask, NativeMask) and attention_mask.cu_seqlens is not None
    if is_packed and position_bias is None and not weights_too:
        o = _attend_packed(attention_mask, query, key, value, scaling, softcap, s_aux, dropout)
        return (o if head_mask is None else o * _checked_head_mask(head_mask, B, Hq).transpose(1, 2)), None

    if isinstance(attention_mask, NativeMask):
        options, keys = _options_of_native(attention_mask, B, Lq, Lk)
    elif attention_mask is None:
        options, keys = _options_without_mask(module, Lq, Lk, is_causal, sliding_window)
    else:
        options, keys = _options_of_tensor(attention_mask, Lk), Lk
    if position_bias is not None:
        options["bias"] = _with_position_bias(position_bias, options.get("bias"), Lk)
    bias = options.get("bias")
    if bias is not None:
        if bias.dtype not in (query.dtype, torch.float32) or query.dtype == torch.float64:
            bias = bias.to(query.dtype)
        options["bias"] = bias[..., :keys] if bias.shape[-1] > keys else bias
    if keys < Lk:
        key, value = key[:, :, :keys], value[:, :, :keys]
    if s_aux is not None:
        options["sinks"] = s_aux.reshape(-1)
    if softcap is not None:
        options["softcap"] = softcap

    o = fastattn.attention(query, key, value, scale=scaling, dropout_p=dropout, **options)
    weights = None
    if weights_too:
        weights = F.pad(fastattn.attention_weights(query, key, scale=scaling, **options), (0, Lk - keys))
    if head_mask is not None:
        head_mask = _checked_head_mask(head_mask, B, Hq)
        o = o * head_mask
        weights = None if weights is None else weights * head_mask
    return o.transpose(1, 2).contiguous(), weights


@functools.cache
def _collector() -> Any:
    """Where transformers 5 notes which outputs of layers the running model is to return; None in 4."""
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:
        return None
    return _active_collector


def _weights_are_wanted() -> bool:
    """Whether the user asked for weights, in models whose layers do not pass that on to their attention function."""
    if torch.compiler.is_compiling():
        return False
    if (collector := _collector()) is not None:
        return any("attentions" in name for name in collector.get() or ())
    # Layers of transformers 4 such as GPT-2's have it as an argument of their own, and return None if we do.
    layer = sys._getframe(2)
    return "output_attentions" in layer.f_code.co_varnames and bool(layer.f_locals.get("output_attentions"))


def _options_of_native(mask: NativeMask, B: int, Lq: int, Lk: int) -> tuple[dict[str, Any], int]:
    rule = mask.rule
    if rule.Lk > Lk and rule.Lq == Lq:  # models cut the mask to the keys that there are
        short = mask.first_keys(Lk)
        if not isinstance(short, NativeMask):
            return {"mask": short}, Lk
        mask, rule = short, short.rule
    if rule.Lq != Lq or rule.Lk != Lk or (rule.B != B and rule.B != 1):
        raise ValueError(
            f"fastattn: attention_mask has shape {tuple(mask.shape)}; with these queries and keys it must be"
            f" broadcastable to {(B, 1, Lq, Lk)}: it was made for other lengths."
        )
    options, keys = options_of(mask)
    if "kv_lengths" in options and rule.B != B:
        options["kv_lengths"] = options["kv_lengths"].expand(B)
    return options, keys


def _options_without_mask(
    module: torch.nn.Module, Lq: int, Lk: int, is_causal: bool | None, sliding_window: int | None
) -> tuple[dict[str, Any], int]:
    """By transformers' rule: top-left where there are several rows. A single one is the last of its sequence."""
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    options: dict[str, Any] = {}
    if sliding_window is not None and sliding_window < Lk:
        options["window"] = (sliding_window - 1, None if causal else sliding_window - 1)
    if causal and Lq > 1:
        options["causal"] = "top_left"
        return options, min(Lq, Lk)
    return options, Lk


def _options_of_tensor(mask: Tensor, Lk: int) -> dict[str, Any]:
    """A mask of the user's or of the model's own."""
    if mask.ndim != 4:
        raise ValueError(
            f"fastattn: attention_mask has {mask.ndim} dimensions; in a layer it must have 4, (B, 1 or H, Lq, Lk): pass"
            " masks of shape (B, Lk) to the model, which asks fastattn's mask function for one of these."
        )
    if mask.shape[-1] > Lk:
        mask = mask[..., :Lk]
    if mask.dtype == torch.bool:
        return {"mask": mask}
    if not mask.is_floating_point():
        raise TypeError(
            f"fastattn: attention_mask is {mask.dtype}; a mask with 4 dimensions must be bool (True = keep) or float"
            " (added to the scores): convert with attention_mask.bool() if its ones are to be kept."
        )
    return {"bias": mask}


def _mask_of_packed(
    mask: Tensor | None,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    is_causal: bool | None,
    sliding_window: int | None,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor | None,
) -> Tensor:
    """The mask that cu_seq_lens_q adds to another one, which may know of the packed sequences itself."""
    if mask is not None and (not isinstance(mask, NativeMask) or mask.cu_seqlens is not None):
        return mask
    B, _, L, _ = query.shape
    rule = None if mask is None else mask.rule
    padded = mask is not None and (mask.keep is not None or mask.lengths is not None)
    same = cu_seq_lens_k is None or cu_seq_lens_k is cu_seq_lens_q or bool(torch.equal(cu_seq_lens_k, cu_seq_lens_q))
    cut = rule is not None and (rule.offset != 0 or rule.Lq != L or rule.Lk != L)
    if B != 1 or key.shape[2] != L or padded or not same or cut:
        raise ValueError(
            f"fastattn: cu_seq_lens_q has {cu_seq_lens_q.numel() - 1} sequences, with queries {tuple(query.shape)} and"
            f" keys {tuple(key.shape)}; packed sequences are served in a batch of one, with as many keys as queries,"
            " without a cache and without padding: pass them so, or padded with an attention_mask."
        )
    if rule is None:
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        left = None if sliding_window is None else sliding_window - 1
        rule = Rule(1, L, L, 0, causal, left, None if causal else left)
    cu_seqlens = cu_seq_lens_q.to(torch.int32)
    longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
    return NativeMask(replace(rule, longest=longest), query.device, cu_seqlens=cu_seqlens)


def _attend_packed(
    mask: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
    dropout: float,
) -> Tensor:
    """o (B, L, Hq, Dv) of sequences that lie one after the other in the rows of a batch."""
    rule, (B, _, L, _) = mask.rule, query.shape
    if (rule.B, rule.Lq, rule.Lk) != (B, L, key.shape[2]):
        raise ValueError(
            f"fastattn: attention_mask has shape {tuple(mask.shape)}; packed sequences take a mask of the queries' and"
            f" keys' own shape, {(B, 1, L, key.shape[2])}."
        )
    q, k, v = (x.transpose(1, 2).reshape(B * L, x.shape[1], x.shape[3]) for x in (query, key, value))
    o = fastattn.varlen_attention(
        q,
        k,
        v,
        mask.cu_seqlens,
        mask.cu_seqlens,
        max_seqlen_q=rule.longest,
        max_seqlen_k=rule.longest,
        causal=rule.causal,
        window=None if rule.left is None and rule.right is None else (rule.left, rule.right),
        scale=scaling,
        softcap=softcap,
        sinks=None if s_aux is None else s_aux.reshape(-1),
        dropout_p=dropout,
    )
    return o.contiguous().view(B, L, *o.shape[1:])


def _with_position_bias(position_bias: Tensor, bias: Tensor | None, Lk: int) -> Tensor:
    if position_bias.ndim == 4 and position_bias.shape[-1] > Lk:
        position_bias = position_bias[..., :Lk]
    return position_bias if bias is None else position_bias + bias


def _scaling_of_gpt2(module: torch.nn.Module, D: int) -> float:
    """GPT-2 in transformers 4.57 passes no scaling: what its own attention does is in the layer's attributes."""
    scaling = 1.0 / math.sqrt(D) if module.scale_attn_weights else 1.0
    if getattr(module, "scale_attn_by_inverse_layer_idx", False):
        scaling /= int(module.layer_idx) + 1  # type: ignore[arg-type]
    return scaling


def _checked_head_mask(head_mask: Tensor, B: int, Hq: int) -> Tensor:
    if head_mask.ndim != 4 or tuple(head_mask.shape[1:]) != (Hq, 1, 1) or head_mask.shape[0] not in (1, B):
        raise ValueError(
            f"fastattn: head_mask has shape {tuple(head_mask.shape)}; it must be (1, {Hq}, 1, 1) or ({B}, {Hq}, 1, 1),"
            ' a factor on each head: for masks that differ within a head use attn_implementation="eager".'
        )
    return head_mask


def _check_unknown(arguments: dict[str, Any]) -> None:
    for name, value in arguments.items():
        if value is None or value is False or name in _OF_NO_EFFECT:
            continue
        if name in _REFUSED:
            raise ValueError(
                f"fastattn: {name} is a {type(value).__name__}; this argument of a model's attention is not served: use"
                ' another attn_implementation, such as "eager" or "sdpa", for this model.'
            )
        _warn_unknown(name)


@functools.cache
def _warn_unknown(name: str) -> None:
    warnings.warn(
        f"fastattn: attention was given the argument {name}, which fastattn does not know and leaves unused; compare"
        ' the result with attn_implementation="eager" if it is meant to change what attention computes.',
        RuntimeWarning,
        stacklevel=4,
    )


# --- Registration -----------------------------------------------------------------------------------------------------


def register() -> str:
    """Make ``attn_implementation="fastattn"`` known to Hugging Face transformers, 4.57 or later.

    From then on models take it when they are built, and most also afterwards::

        model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fastattn")
        model.set_attn_implementation("fastattn")

    Training and inference, with all that the layers pass on: grouped queries, sliding windows, softcap, sinks, position
    biases with their gradient, dropout. Padding at either end, windows and causal order stay numbers: no Lq x Lk mask
    is built for them, and what they hide is not computed. A static cache is not read beyond what was written to it.
    Rows that are padding themselves may come out different from "eager", which gives them an average of everything.

    Some models have no layers that ask for an implementation. transformers 4 has many, T5 among them, and a warning
    says so here. In any version such a model is built as "eager", a warning names it, once for each class, and `check`
    says it of every layer. docs/transformers.md has the table.

    A second call does nothing. `unregister` undoes it.

    Returns:
        The name, "fastattn".

    Raises:
        ImportError: transformers is not installed, or too old.

    Example:
        >>> import torch, fastattn.integrations.transformers
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> name = fastattn.integrations.transformers.register()
        >>> config = LlamaConfig(
        ...     vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        ...     num_key_value_heads=2, attn_implementation=name, eos_token_id=None,
        ... )
        >>> model = LlamaForCausalLM(config).eval()
        >>> model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False, pad_token_id=0).shape
        torch.Size([1, 7])
        >>> print(fastattn.integrations.transformers.check(model))
        served by fastattn: 2
        left to transformers: 0
    """
    modeling_utils, masking_utils = _transformers()
    known = NAME in modeling_utils.AttentionInterface._global_mapping
    modeling_utils.AttentionInterface.register(NAME, attention_forward)
    masking_utils.AttentionMaskInterface.register(NAME, attention_mask)

    model = modeling_utils.PreTrainedModel
    original = model.get_correct_attn_implementation
    if not hasattr(original, "_fastattn_original"):

        @functools.wraps(original)
        def get_correct_attn_implementation(self: Any, requested: str | None, *args: Any, **kwargs: Any) -> Any:
            # Code that adds masks to scores must get those of "eager", which are floats.
            if requested == NAME and not prepare(type(self)):
                requested = "eager"
            return original(self, requested, *args, **kwargs)

        get_correct_attn_implementation._fastattn_original = original  # type: ignore[attr-defined]
        model.get_correct_attn_implementation = get_correct_attn_implementation
    if not known and (version := _version())[0] == 4:
        warnings.warn(
            f"fastattn: in transformers {'.'.join(map(str, version))} T5, mT5, LongT5, BLOOM, DeBERTa, XLNet and others"
            f' compute attention in their own code: instead of "{NAME}" they are built as "eager", with a warning.'
            " docs/transformers.md says which; T5 and its relatives are served by newer releases of transformers 5.",
            RuntimeWarning,
            stacklevel=2,
        )
    return NAME


def unregister() -> None:
    """Undo `register`. Models that were built with "fastattn" no longer run.

    Example:
        >>> import fastattn.integrations.transformers as integration
        >>> _ = integration.register()
        >>> integration.unregister()
        >>> from transformers import AttentionInterface
        >>> "fastattn" in AttentionInterface()
        False
    """
    modeling_utils, masking_utils = _transformers()
    for interface in (modeling_utils.AttentionInterface, masking_utils.AttentionMaskInterface):
        interface._global_mapping.pop(NAME, None)
    model = modeling_utils.PreTrainedModel
    original = getattr(model.get_correct_attn_implementation, "_fastattn_original", None)
    if original is not None:
        model.get_correct_attn_implementation = original


def _version() -> tuple[int, ...]:
    import transformers

    return tuple(int(part) for part in transformers.__version__.split(".")[:2])


def _transformers() -> tuple[Any, Any]:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "fastattn: transformers is not installed; fastattn.integrations.transformers needs it: pip install"
            ' "transformers>=4.57".'
        ) from error
    if _version() < _OLDEST:
        raise ImportError(
            f"fastattn: transformers is {transformers.__version__}; its attention interface is served from 4.57 on: pip"
            ' install "transformers>=4.57".'
        )
    from transformers import masking_utils, modeling_utils

    return modeling_utils, masking_utils
