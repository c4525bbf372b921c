"""FlashAttention's functions, with its signatures and semantics, on fastattn's kernels: on a CPU, in every dtype.

Code that was written for the package flash_attn (2.x) imports them from here instead::

    from fastattn.integrations.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

or, where it is somebody else's, runs after :func:`install`, which puts a module of that name in place.

What is the same: layouts, (B, L, H, D), which become views of fastattn's without a copy; masks that end at the bottom
right; windows, where -1 is without limit; ALiBi, softcap, dropout, GQA and MQA; the order and names of arguments;
results and their shapes. Gradients flow through all functions but :func:`flash_attn_with_kvcache`. What is not:

- An argument that is not served is refused; none is ignored but two that mean nothing here: ``deterministic``, for
  these kernels always are, and ``num_splits``, for how a call is cut follows from its shape.
- The log-sum-exp of a row that sees no key is -inf, the log of what it sums, and not +inf.
- Dropout draws other numbers from the same seed, and the third result of ``return_attn_probs`` is None.
- float32, float64, and head dimensions above 256 (on the CPU) work as well.

Messages about a bad argument name it as fastattn's own functions do: scale for softmax_scale, window for window_size.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn._attention import attention
from fastattn._kv_cache import attention_with_kv_cache
from fastattn._varlen import varlen_attention

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "index_first_axis",
    "install",
    "pad_input",
    "uninstall",
    "unpad_input",
]

# The version whose signatures these are.
FLASH_ATTN_VERSION = "2.8.3"

Window = tuple[int, int]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention over a batch of sequences of one length.

    Args:
        q: (B, Lq, Hq, D).
        k: (B, Lk, Hkv, D), Hq a multiple of Hkv.
        v: (B, Lk, Hkv, Dv).
        dropout_p: Probability that a weight is dropped; 0.0 in evaluation.
        softmax_scale: 1/sqrt(D) by default.
        causal: Row i sees the keys up to i + Lk - Lq.
        window_size: (left, right) keys around i + Lk - Lq that row i sees; -1 without limit.
        softcap: Positive, bounds the scores; 0.0: no bound.
        alibi_slopes: (Hq,) or (B, Hq): adds -slope * abs(i + Lk - Lq - j).
        deterministic: Means nothing here: the backward pass always is.
        return_attn_probs: Return the log-sum-exp too.

    Returns:
        (B, Lq, Hq, Dv), or with return_attn_probs the triple (that, log-sum-exp (B, Hq, Lq) float32, None).

    Raises:
        ValueError: An argument breaks a rule, or is not served.
        TypeError: An argument has the wrong type or dtype.

    Source:
        T. Dao, "FlashAttention-2: Faster attention with better parallelism and work partitioning", ICLR 2024.

    Example:
        >>> import torch
        >>> from fastattn.integrations.flash_attn import flash_attn_func
        >>> q, k, v = torch.randn(2, 10, 8, 64), torch.randn(2, 20, 2, 64), torch.randn(2, 20, 2, 64)
        >>> out, lse, _ = flash_attn_func(q, k, v, causal=True, window_size=(5, 0), return_attn_probs=True)
        >>> out.shape, lse.shape
        (torch.Size([2, 10, 8, 64]), torch.Size([2, 8, 10]))
    """
    _check_bool("deterministic", deterministic)
    _check_probs(return_attn_probs, dropout_p)
    o, lse = attention(
        _heads_first("q", q),
        _heads_first("k", k),
        _heads_first("v", v),
        causal=_check_bool("causal", causal),
        window=_window(window_size),
        scale=softmax_scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        return_lse=True,
    )
    return (o.transpose(1, 2), lse, None) if return_attn_probs else o.transpose(1, 2)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_func` with k and v in one tensor, (B, Lk, 2, Hkv, D)."""
    k, v = _unpacked("kv", kv, 5, 2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_func` with q, k and v in one tensor, (B, L, 3, H, D)."""
    q, k, v = _unpacked("qkv", qkv, 5, 3)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """Attention over packed sequences of different lengths.

    Args:
        q: (total_q, Hq, D): all rows of all sequences.
        k: (total_k, Hkv, D).
        v: (total_k, Hkv, Dv).
        cu_seqlens_q: (B + 1,), int32: where the rows of each sequence begin, and where the last ends.
        cu_seqlens_k: (B + 1,), int32: the same for keys.
        max_seqlen_q: Rows of the longest sequence, or more.
        max_seqlen_k: Keys of the longest sequence, or more.
        dropout_p: As in :func:`flash_attn_func`, as are all that follow but the last.
        softmax_scale: 1/sqrt(D) by default.
        causal: Row i of a sequence with n rows and m keys sees its keys up to i + m - n.
        window_size: (left, right) keys around i + m - n; -1 without limit.
        softcap: Positive, bounds the scores; 0.0: no bound.
        alibi_slopes: (Hq,) or (B, Hq).
        deterministic: Means nothing here.
        return_attn_probs: Return the log-sum-exp too.
        block_table: Not served: :func:`flash_attn_with_kvcache` takes one.

    Returns:
        (total_q, Hq, Dv), or with return_attn_probs the triple (that, log-sum-exp (Hq, total_q) float32, None).

    Raises:
        ValueError: An argument breaks a rule, or is not served.
        TypeError: An argument has the wrong type or dtype.

    Source:
        T. Dao, "FlashAttention-2: Faster attention with better parallelism and work partitioning", ICLR 2024.

    Example:
        >>> import torch
        >>> from fastattn.integrations.flash_attn import flash_attn_varlen_func
        >>> q, k, v = torch.randn(30, 8, 64), torch.randn(30, 2, 64), torch.randn(30, 2, 64)
        >>> cu_seqlens = torch.tensor([0, 10, 30], dtype=torch.int32)
        >>> flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 20, 20, causal=True).shape
        torch.Size([30, 8, 64])
    """
    _check_bool("deterministic", deterministic)
    _check_probs(return_attn_probs, dropout_p)
    if block_table is not None:
        raise ValueError(
            "fastattn: block_table is given, which flash_attn_varlen_func does not serve; pages are read by"
            " flash_attn_with_kvcache: call that, or gather the keys and values first."
        )
    o, lse = varlen_attention(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q=_int(max_seqlen_q),
        max_seqlen_k=_int(max_seqlen_k),
        causal=_check_bool("causal", causal),
        window=_window(window_size),
        scale=softmax_scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        return_lse=True,
    )
    return (o, lse, None) if return_attn_probs else o


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_varlen_func` with k and v in one tensor, (total_k, 2, Hkv, D)."""
    k, v = _unpacked("kv", kv, 4, 2)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_varlen_func` with q, k and v in one tensor, (total, 3, H, D)."""
    q, k, v = _unpacked("qkv", qkv, 4, 3)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Appends k and v to a cache in place, at cache_seqlens, and attends over all of it. No gradient.

    Args:
        q: (B, Lq, Hq, D).
        k_cache: (B_cache, Lmax, Hkv, D), or with a block_table (num_blocks, page_block_size, Hkv, D), pages of any
            size.
        v_cache: (B_cache, Lmax, Hkv, Dv) or (num_blocks, page_block_size, Hkv, Dv).
        k: (B, Lnew, Hkv, D), or None to append nothing.
        v: (B, Lnew, Hkv, Dv).
        rotary_cos: (positions, rotary_dim / 2): rotates q and k at the positions of the appended tokens. With k, with
            Lq = Lnew, and for more than one token with causal or a window. (Without either, FlashAttention gives all
            rows of q one position: not served.)
        rotary_sin: Likewise.
        cache_seqlens: (B,), int32, or one int for all: the keys in the cache before the append. None: all of it is
            full, and nothing may be appended.
        cache_batch_idx: (B,), int32: the entry of the cache that each sequence has, by default its own number; each
            once where there is something to append. Not with block_table.
        cache_leftpad: Not served.
        block_table: (B, max_blocks), int32: the pages of each sequence.
        softmax_scale: 1/sqrt(D) by default.
        causal: Row i sees the keys up to i + n - Lq, n with the appended ones.
        window_size: (left, right) keys around that one; -1 without limit.
        softcap: Positive, bounds the scores; 0.0: no bound.
        rotary_interleaved: True: numbers 2x and 2x + 1 of a row are rotated together; False: x and x + rotary_dim / 2.
        alibi_slopes: (Hq,) or (B, Hq).
        num_splits: Means nothing here: how keys are split over threads follows from the shape.
        return_softmax_lse: Return the log-sum-exp too.

    Returns:
        (B, Lq, Hq, Dv), or with return_softmax_lse the pair (that, log-sum-exp (B, Hq, Lq) float32).

    Raises:
        ValueError: An argument breaks a rule of :func:`fastattn.attention_with_kv_cache`, or is not served. The cache
            is as it was.
        TypeError: An argument has the wrong type or dtype.

    Source:
        T. Dao, "FlashAttention-2: Faster attention with better parallelism and work partitioning", ICLR 2024.

    Example:
        >>> import torch
        >>> from fastattn.integrations.flash_attn import flash_attn_with_kvcache
        >>> k_cache, v_cache = torch.empty(2, 64, 2, 16), torch.empty(2, 64, 2, 16)
        >>> q, k, v = torch.randn(2, 5, 8, 16), torch.randn(2, 5, 2, 16), torch.randn(2, 5, 2, 16)
        >>> flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=0, causal=True).shape
        torch.Size([2, 5, 8, 16])
    """
    if cache_leftpad is not None:
        raise ValueError(
            "fastattn: cache_leftpad is given, which is not served; sequences of the cache begin at its first row:"
            " store them without padding on the left."
        )
    if isinstance(num_splits, bool) or not isinstance(num_splits, int):
        raise TypeError(f"fastattn: num_splits is a {type(num_splits).__name__}; it must be an int.")
    queries = _heads_first("q", q)
    keys, values = _heads_first("k_cache", k_cache), _heads_first("v_cache", v_cache)
    if cache_batch_idx is not None:
        if block_table is not None:
            raise ValueError(
                "fastattn: cache_batch_idx and block_table are both given; pages have no batch: pass the rows"
                " block_table[cache_batch_idx] alone."
            )
        # Whole entries of the cache are pages too.
        block_table = _sequence_entries(cache_batch_idx)
    new_keys, new_values = (None if x is None else _heads_first(name, x) for name, x in (("k", k), ("v", v)))
    window = _window(window_size)
    if rotary_cos is not None and k is not None:
        is_ordered = _check_bool("causal", causal) or window is not None
        if q.shape[1] != k.shape[1] or (q.shape[1] > 1 and not is_ordered):
            raise ValueError(
                f"fastattn: rotary_cos is given with a q of length {q.shape[1]}, a k of length {k.shape[1]} and"
                f" causal={causal}; a row of q is rotated at the position of its own key: pass q and k of one length"
                " and causal=True or a window, or rotate them before the call."
            )
    o, lse = attention_with_kv_cache(
        queries,
        keys,
        values,
        k=new_keys,
        v=new_values,
        cache_lengths=_lengths(cache_seqlens, q, keys, block_table, k is not None),
        block_table=block_table,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        rotary_interleaved=rotary_interleaved,
        causal=_check_bool("causal", causal),
        window=window,
        scale=softmax_scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        return_lse=True,
    )
    return (o.transpose(1, 2), lse) if return_softmax_lse else o.transpose(1, 2)


# --- flash_attn.bert_padding ------------------------------------------------------------------------------------------


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """``input[indices]``: some rows of the first dimension, differentiable."""
    return input.index_select(0, indices)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Packs the tokens of a padded batch.

    Args:
        hidden_states: (B, L, ...).
        attention_mask: (B, L), 1 = a token, 0 = padding.
        unused_mask: (B, L), 1 = a place that is kept although no token is in it yet.

    Returns:
        The tokens (total, ...); their indices (total,) in the flattened batch; cu_seqlens (B + 1,), int32;
        the length of the longest sequence; and the tokens of each sequence (B,), int32, without the unused ones.

    Source:
        The helper of the same name in flash_attn.bert_padding.

    Example:
        >>> import torch
        >>> from fastattn.integrations.flash_attn import unpad_input
        >>> mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
        >>> tokens, indices, cu_seqlens, longest, used = unpad_input(torch.randn(2, 3, 8), mask)
        >>> tokens.shape, indices.tolist(), cu_seqlens.tolist(), longest
        (torch.Size([3, 8]), [0, 1, 3], [0, 2, 3], 2)
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = kept.sum(-1, dtype=torch.int32)
    used = attention_mask.sum(-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if lengths.numel() else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, longest, used


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The reverse of :func:`unpad_input`: (total, ...) to (batch, seqlen, ...), with zeros for padding."""
    padded = hidden_states.new_zeros((batch * seqlen, *hidden_states.shape[1:]))
    return padded.index_copy(0, indices, hidden_states).unflatten(0, (batch, seqlen))


# --- import flash_attn ------------------------------------------------------------------------------------------------

_INTERFACE = tuple(name for name in __all__ if name.startswith("flash_attn"))
_PADDING = ("index_first_axis", "pad_input", "unpad_input")
_MODULES = {
    "flash_attn": _INTERFACE,
    "flash_attn.flash_attn_interface": _INTERFACE,
    "flash_attn.bert_padding": _PADDING,
}


def install() -> None:
    """Lets ``import flash_attn`` find these functions, where the package itself is not installed.

    The module says that it is version 2.8.3, whose signatures these are. Names that are not here, it does not have.
    Twice is the same as once.

    Raises:
        ImportError: The package is there.

    Source:
        The module names of the package flash_attn.

    Example:
        >>> from fastattn.integrations import flash_attn
        >>> flash_attn.install()
        >>> from flash_attn import flash_attn_func
        >>> from flash_attn.bert_padding import unpad_input
        >>> flash_attn.uninstall()
    """
    if _is_installed():
        return
    if "flash_attn" in sys.modules or importlib.util.find_spec("flash_attn") is not None:
        raise ImportError(
            "fastattn: the package flash_attn is there; install() stands in only where it is not: uninstall it, or"
            " import the functions from fastattn.integrations.flash_attn."
        )
    here = sys.modules[__name__]
    for name, contents in _MODULES.items():
        module = ModuleType(name, __doc__)
        module.__spec__ = ModuleSpec(name, None, origin=__file__, is_package=name == "flash_attn")
        module.__path__ = []  # no file will be looked for
        vars(module).update({item: getattr(here, item) for item in contents})
        sys.modules[name] = module
        if name == "flash_attn":
            vars(module).update(__version__=FLASH_ATTN_VERSION, _is_fastattn=True)
        else:
            setattr(sys.modules["flash_attn"], name.rpartition(".")[2], module)


def uninstall() -> None:
    """Takes back what :func:`install` did; who has imported something keeps it."""
    if _is_installed():
        for name in _MODULES:
            del sys.modules[name]


def _is_installed() -> bool:
    return getattr(sys.modules.get("flash_attn"), "_is_fastattn", False)


# --- From FlashAttention's arguments to fastattn's --------------------------------------------------------------------


def _heads_first(name: str, x: Any) -> Any:
    """(B, L, H, D) as (B, H, L, D), a view."""
    if not isinstance(x, Tensor):
        raise TypeError(f"fastattn: {name} is a {type(x).__name__}; it must be a torch.Tensor.")
    if x.dim() != 4:
        raise ValueError(
            f"fastattn: {name} has {x.dim()} dimensions, shape {tuple(x.shape)}; flash_attn's functions take four,"
            " (batch, length, heads, head_dim): add or merge dimensions with unsqueeze or flatten."
        )
    return x.transpose(1, 2)


def _unpacked(name: str, x: Any, dims: int, parts: int) -> tuple[Tensor, ...]:
    if not isinstance(x, Tensor):
        raise TypeError(f"fastattn: {name} is a {type(x).__name__}; it must be a torch.Tensor.")
    if x.dim() != dims or x.shape[-3] != parts:
        wanted = "batch, length" if dims == 5 else "total"
        raise ValueError(
            f"fastattn: {name} has shape {tuple(x.shape)}; it must be ({wanted}, {parts}, heads, head_dim): stack its"
            f" {parts} parts with torch.stack(parts, -3)."
        )
    return x.unbind(-3)


def _window(window_size: Any) -> tuple[int | None, int | None] | None:
    is_pair = isinstance(window_size, tuple | list) and len(window_size) == 2
    if not is_pair or not all(isinstance(side, int) and not isinstance(side, bool) for side in window_size):
        raise TypeError(
            f"fastattn: window_size is {window_size!r}; it must be a pair of ints, -1 for a side without limit."
        )
    if min(window_size) < -1:
        raise ValueError(
            f"fastattn: window_size is {tuple(window_size)}; each side counts keys, or is -1: pass -1 for a side"
            " without limit."
        )
    if window_size[0] == -1 and window_size[1] == -1:
        return None
    left, right = (None if side == -1 else side for side in window_size)
    return left, right


def _check_bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"fastattn: {name} is a {type(value).__name__}; it must be True or False.")
    return value


def _check_probs(return_attn_probs: Any, dropout_p: Any) -> None:
    if _check_bool("return_attn_probs", return_attn_probs) and dropout_p:
        raise ValueError(
            f"fastattn: return_attn_probs is True with dropout_p = {dropout_p}, which asks for the weights that dropout"
            " left; they are never formed: pass dropout_p=0.0, or call fastattn.attention_weights."
        )


def _int(value: Any) -> Any:
    """A length that somebody holds as a tensor of one number."""
    return int(value) if isinstance(value, Tensor) and value.numel() == 1 else value


def _sequence_entries(cache_batch_idx: Any) -> Tensor:
    if not isinstance(cache_batch_idx, Tensor) or cache_batch_idx.dim() != 1 or cache_batch_idx.dtype != torch.int32:
        what = (
            f"{cache_batch_idx.dtype} of shape {tuple(cache_batch_idx.shape)}"
            if isinstance(cache_batch_idx, Tensor)
            else f"a {type(cache_batch_idx).__name__}"
        )
        raise TypeError(f"fastattn: cache_batch_idx is {what}; it must be torch.int32 of shape (B,).")
    return cache_batch_idx.unsqueeze(1)


def _lengths(cache_seqlens: Any, q: Tensor, keys: Tensor, block_table: Tensor | None, is_appended: bool) -> Tensor:
    if isinstance(cache_seqlens, Tensor):
        if cache_seqlens.dtype != torch.int32:
            raise TypeError(
                f"fastattn: cache_seqlens is {cache_seqlens.dtype}; it must be torch.int32: convert with"
                " cache_seqlens.to(torch.int32)."
            )
        return cache_seqlens
    if cache_seqlens is None:
        if is_appended:
            raise ValueError(
                "fastattn: k is given but cache_seqlens is not; it says where k goes: pass the lengths before the"
                " append."
            )
        pages = block_table.shape[1] if isinstance(block_table, Tensor) and block_table.dim() == 2 else 1
        cache_seqlens = keys.shape[2] * pages
    if isinstance(cache_seqlens, bool) or not isinstance(cache_seqlens, int):
        raise TypeError(
            f"fastattn: cache_seqlens is a {type(cache_seqlens).__name__}; it must be an int32 tensor, or one int for"
            " all sequences."
        )
    return torch.full((q.shape[0],), cache_seqlens, dtype=torch.int32, device=q.device)
