"""Attention with a cache of keys and values: for models that generate."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastattn import _errors, _ops, _transforms, _vmap
from fastattn._arguments import Causal, Window, accumulator, causal_code, window_sides

# --- The operator -----------------------------------------------------------------------------------------------------


@torch.library.register_fake("fastattn::attention_with_kv_cache")
def _fake(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache_lengths: Tensor,
    block_table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    rotary_interleaved: bool,
    causal: int,
    window_left: int,
    window_right: int,
    scale: float | None,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    _ops.check_fake(
        "attention_with_kv_cache",
        {
            "q": q,
            "k_cache": k_cache,
            "v_cache": v_cache,
            "k": k,
            "v": v,
            "cache_lengths": cache_lengths,
            "block_table": block_table,
            "k_scale": k_scale,
            "v_scale": v_scale,
            "rotary_cos": rotary_cos,
            "rotary_sin": rotary_sin,
            "alibi_slopes": alibi_slopes,
            "sinks": sinks,
        },
        (rotary_interleaved, causal, window_left, window_right, scale, softcap),
    )
    B, Hq, Lq, _ = q.shape
    o = _ops.empty_rows_like(q, B, Hq, Lq, v_cache.shape[3])
    return o, q.new_empty((B, Hq, Lq), dtype=_ops.accumulator_dtype(q.dtype))


_op: Any = torch.ops.fastattn.attention_with_kv_cache.default
_call: Any = _op._op  # without the Python frame of OpOverload.__call__; not for tracing

_NAMES = (
    "q",
    "k_cache",
    "v_cache",
    "k",
    "v",
    "cache_lengths",
    "block_table",
    "k_scale",
    "v_scale",
    "rotary_cos",
    "rotary_sin",
    "alibi_slopes",
    "sinks",
)
_rules = {places: _vmap.Rule(_NAMES, ("o", "lse"), getattr(_vmap, places)) for places in ("CACHE", "PAGED")}


def _vmap_rule(op: Any, size: int, in_dims: tuple[int | None, ...], inputs: tuple[Any, ...]) -> Any:
    given, dims = dict(zip(_NAMES, inputs, strict=False)), dict(zip(_NAMES, in_dims, strict=False))
    if given["k"] is None:
        places = "CACHE" if given["block_table"] is None else "PAGED"
        return _rules[places](op, size, in_dims, inputs)
    for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
        if given[name] is not None and dims[name] is None:
            raise ValueError(
                f"fastattn: {name} is the same for all elements that vmap maps over, and each of them would append to"
                " it; map it too (in_dims), or append before, outside of vmap."
            )
    # Elements are views of the caches, which are written in place.
    return _vmap.one_by_one(op, size, in_dims, inputs)


_vmap.register(_op, _vmap_rule)


# --- The function -----------------------------------------------------------------------------------------------------


@overload
def attention_with_kv_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    k: Tensor | None = ...,
    v: Tensor | None = ...,
    cache_lengths: Tensor,
    block_table: Tensor | None = ...,
    k_scale: Tensor | None = ...,
    v_scale: Tensor | None = ...,
    rotary_cos: Tensor | None = ...,
    rotary_sin: Tensor | None = ...,
    rotary_interleaved: bool = ...,
    causal: Causal = ...,
    window: Window | None = ...,
    scale: float | None = ...,
    softcap: float | None = ...,
    alibi_slopes: Tensor | None = ...,
    sinks: Tensor | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def attention_with_kv_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    k: Tensor | None = ...,
    v: Tensor | None = ...,
    cache_lengths: Tensor,
    block_table: Tensor | None = ...,
    k_scale: Tensor | None = ...,
    v_scale: Tensor | None = ...,
    rotary_cos: Tensor | None = ...,
    rotary_sin: Tensor | None = ...,
    rotary_interleaved: bool = ...,
    causal: Causal = ...,
    window: Window | None = ...,
    scale: float | None = ...,
    softcap: float | None = ...,
    alibi_slopes: Tensor | None = ...,
    sinks: Tensor | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attention_with_kv_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    cache_lengths: Tensor,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    causal: Causal = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Append k and v to a cache in place, then attend over all of it: one step of generation, or a prefill.

    With c = ``cache_lengths[b]`` keys in the cache of sequence b, Lnew more in k, and n = c + Lnew::

        k_cache[b, h, c + t] = rotated(k[b, h, t], c + t)             v_cache[b, h, c + t] = v[b, h, t]
        o[b, h]              = attention(rotated(q[b, h, i], n - Lq + i), k_cache[b, h/G, :n], v_cache[b, h/G, :n])

    where ``attention`` is :func:`fastattn.attention` with its scale, softcap, ALiBi, window and sinks. The last row of
    q stands at the last key, n - 1: with ``causal`` row i sees the keys up to n - Lq + i, and Lq may be anything: 1 to
    generate, some to verify guessed tokens, all of a prompt to prefill. Keys beyond n are never read, whatever is in
    them. cache_lengths is not changed: add Lnew to it before the next call.

    The cache is contiguous, or in pages: then key j of sequence b is row ``j % page_size`` of page
    ``block_table[b, j // page_size]``, and sequences may share the pages to which none of them appends.
    :class:`fastattn.KVCache` does all of the bookkeeping.

    Inference only: there is no gradient. A call that is refused has changed nothing.

    Args:
        q: (B, Hq, Lq, D), float32, bfloat16, float16 or float64. Lq = 0 only appends.
        k_cache: (B, Hkv, Lmax, D), or with a block_table (pages, Hkv, page_size, D), any page size; of q's dtype, or
            int8 with scales. Any strides, but rows must be contiguous, and no two elements may share memory. Hq is a
            multiple of Hkv.
        v_cache: (B, Hkv, Lmax, Dv) or (pages, Hkv, page_size, Dv), Dv may differ from D. It may be the other half of
            k_cache's allocation.
        k: (B, Hkv, Lnew, D), what is appended, of q's dtype. None: nothing is, and the cache is only read.
        v: (B, Hkv, Lnew, Dv); with k.
        cache_lengths: (B,), int32, on q's device: the number of keys of each sequence before the append, in
            [0, Lmax - Lnew].
        block_table: (B, max_pages), int32: the pages of each sequence. Entries beyond n are not looked at, nor are
            those that lie before the window of every row.
        k_scale: (B, Hkv, Lmax) or (pages, Hkv, page_size), float32, for int8 caches: a key is its numbers times its
            scale. Written for the appended rows, as max|x| / 127. A row that holds an infinity or a NaN gets the
            scale NaN and so is NaN as a whole.
        v_scale: Likewise, for the values.
        rotary_cos: (positions, rotary_dim / 2), of q's dtype or float32: rotates q and the new k by their positions,
            in float32 and rounded once. rotary_dim <= D; the rest of a row stays as it is. Needs k, and Lq <= Lnew.
        rotary_sin: Likewise.
        rotary_interleaved: False: number x of a row is rotated with x + rotary_dim / 2, as in Llama. True: neighbours
            2x and 2x + 1 are, as in GPT-J.
        causal: False, True or "bottom_right".
        window: (left, right): the number of keys that a row sees before and after its own, None without limit.
        scale: Factor on the dot products, 1/sqrt(D) by default.
        softcap: Bounds the scaled dot products to (-softcap, softcap). None or 0: no bound.
        alibi_slopes: (Hq,) or (B, Hq), float: a penalty on the distance in keys.
        sinks: (Hq,), float: a score that takes part in each row's softmax and has no value.
        return_lse: Return the log of the softmax's denominator too.

    Returns:
        o, (B, Hq, Lq, Dv) in q's dtype; with ``return_lse`` the pair (o, lse), lse (B, Hq, Lq), float32 (float64 for
        float64). A row that sees no key has o = 0 and lse = -inf.

    Under ``torch.autocast``, q, k and v are cast to the dtype of the caches, or with int8 caches to autocast's.

    On a GPU nobody waits for the values of cache_lengths and block_table: what would lead out of the cache counts as
    the nearest that does not.

    Raises:
        ValueError: Shapes, sizes, devices, numbers, lengths or tables break a rule above; tensors overlap that must
            not, or two sequences would append to one page; an argument requires a gradient.
        TypeError: An argument has the wrong type, layout or dtype.

    Source:
        W. Kwon et al., "Efficient memory management for large language model serving with PagedAttention", SOSP 2023;
        J. Su et al., "RoFormer: enhanced transformer with rotary position embedding", 2021.

    Example:
        >>> import torch, fastattn
        >>> k_cache, v_cache = torch.empty(2, 2, 64, 16), torch.empty(2, 2, 64, 16)
        >>> lengths = torch.zeros(2, dtype=torch.int32)
        >>> for new in (5, 1, 1):  # a prompt, and two tokens
        ...     q, k, v = torch.randn(2, 8, new, 16), torch.randn(2, 2, new, 16), torch.randn(2, 2, new, 16)
        ...     o = fastattn.attention_with_kv_cache(
        ...         q, k_cache, v_cache, k=k, v=v, cache_lengths=lengths, causal=True
        ...     )
        ...     lengths += new
        >>> o.shape, lengths
        (torch.Size([2, 8, 1, 16]), tensor([7, 7], dtype=torch.int32))
    """
    try:
        if torch._C._is_any_autocast_enabled():
            q, k, v = _autocast(q, k, v, k_cache)
        if alibi_slopes is not None:
            alibi_slopes = accumulator("alibi_slopes", alibi_slopes, q)
        if sinks is not None:
            sinks = accumulator("sinks", sinks, q)
        tensors = (
            q,
            k_cache,
            v_cache,
            k,
            v,
            cache_lengths,
            block_table,
            k_scale,
            v_scale,
            rotary_cos,
            rotary_sin,
            alibi_slopes,
            sinks,
        )
        _refuse_gradients(tensors)
        if not isinstance(rotary_interleaved, bool):
            raise TypeError(
                f"fastattn: rotary_interleaved is a {type(rotary_interleaved).__name__}; it must be True (neighbours"
                " are rotated) or False (halves are)."
            )
        settings = (
            rotary_interleaved,
            0 if causal is False else causal_code(causal),
            *window_sides(window),
            scale,
            0.0 if softcap is None else softcap,
        )
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            o, lse = _op(*tensors, *settings)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                o, lse = _call(*tensors, *settings)
            if k is not None:
                _count_versions(k_cache, v_cache, k_scale, v_scale)
    except Exception as error:
        _errors.raise_explained(
            error,
            {
                "q": q,
                "k_cache": k_cache,
                "v_cache": v_cache,
                **({} if k is None else {"k": k}),
                **({} if v is None else {"v": v}),
                "cache_lengths": cache_lengths,
                "block_table": block_table,
                "k_scale": k_scale,
                "v_scale": v_scale,
                "rotary_cos": rotary_cos,
                "rotary_sin": rotary_sin,
                "alibi_slopes": alibi_slopes,
                "sinks": sinks,
            },
            {"scale": scale, "softcap": softcap},
        )
    return (o, lse) if return_lse else o


def _autocast(q: Tensor, k: Tensor | None, v: Tensor | None, k_cache: Tensor) -> list[Any]:
    if not torch.is_autocast_enabled(q.device.type):
        return [q, k, v]
    is_float = k_cache.is_floating_point()
    dtype = k_cache.dtype if is_float else torch.get_autocast_dtype(q.device.type)
    return [x if x is None or not x.is_floating_point() or x.dtype == torch.float64 else x.to(dtype) for x in (q, k, v)]


def _refuse_gradients(tensors: tuple[Tensor | None, ...]) -> None:
    if torch.is_grad_enabled():
        for name, x in zip(_NAMES, tensors, strict=True):
            if x is not None and x.requires_grad:
                raise ValueError(
                    f"fastattn: {name} requires a gradient, which attention_with_kv_cache does not compute; call it"
                    " under torch.no_grad(), or to train call fastattn.attention."
                )
    if torch.compiler.is_dynamo_compiling():
        if _transforms.in_trace() == "forward":
            raise ValueError(
                "fastattn: q may have a tangent in the code that is compiled, and attention_with_kv_cache has no"
                " derivative; to differentiate call fastattn.attention."
            )
    elif _transforms.is_forward_mode():
        for name, x in zip(_NAMES, tensors, strict=True):
            if x is not None and forward_ad.unpack_dual(x).tangent is not None:
                raise ValueError(
                    f"fastattn: {name} has a tangent, and attention_with_kv_cache has no derivative; to differentiate"
                    " call fastattn.attention."
                )


def _count_versions(*written: Tensor | None) -> None:
    """Lets autograd notice that these were written, where somebody has saved them for a backward pass."""
    for x in written:
        if x is not None and not x.is_inference():
            torch.autograd.graph.increment_version(x)
