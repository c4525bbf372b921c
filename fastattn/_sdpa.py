"""scaled_dot_product_attention with PyTorch's signature and semantics, and the switch that puts it in PyTorch's place.

    o = softmax(query key^T * scale + attn_mask) value                 with dropout on the softmax, when asked for

Two layers. `scaled_dot_product_attention` turns PyTorch's conventions (any number of batch dimensions, broadcasting,
one mask argument for both kinds of mask) into a call of the operator; four-dimensional inputs without broadcasting,
nearly every call there is, go to it straight. `replace_sdpa` and its kin install a function in
`torch.nn.functional` that decides, call by call, whether this library can serve it, and otherwise hands it to the
function that was there before.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import handle_torch_function

from fastattn import _attention, _cuda, _errors
from fastattn._arguments import autocast

__all__ = [
    "SdpaCalls",
    "replace_sdpa",
    "replaced_sdpa",
    "restore_sdpa",
    "scaled_dot_product_attention",
    "sdpa_calls",
]

_NOT_CAUSAL, _TOP_LEFT = 0, 1  # the operator's codes for `causal`
_UNLIMITED = -1


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention of every query to all keys, as torch.nn.functional.scaled_dot_product_attention computes it.

        s = scale * query key^T + attn_mask           -inf where a bool attn_mask is False or is_causal hides the key
        o = dropout(softmax(s)) value                 a row that sees no key gives 0

    Args:
        query: (..., Hq, Lq, D), float32, bfloat16, float16 or float64.
        key: (..., H, Lk, D), of query's dtype. All dimensions before the last two broadcast against query's.
        value: (..., H, Lk, Dv), of query's dtype; Dv may differ from D.
        attn_mask: broadcastable to (..., Hq, Lq, Lk). bool: True = the query may see the key. Otherwise it is added to
            the scores, in query's dtype or float32, and has a gradient, in its own shape.
        dropout_p: probability of dropping a weight, in [0, 1]. Applied whenever it is above 0: pass 0 in evaluation.
            The mask follows torch.manual_seed, but is not the one that PyTorch's function draws.
        is_causal: row i sees the keys 0 to i: the diagonal starts at the top left corner, also when Lq != Lk. Together
            with attn_mask both apply. (fastattn.attention has bottom-right alignment.)
        scale: factor on query key^T; None is 1 / sqrt(D).
        enable_gqa: let query have a multiple of key's and of value's heads (dimension -3): query head h reads key head
            h // (Hq / H).

    Returns:
        (..., Hq, Lq, Dv), in query's dtype. Under torch.autocast, in the dtype of autocast.

    Raises:
        ValueError: shapes that do not fit together, numbers out of range.
        TypeError: an argument of the wrong type or dtype.

    Inputs of two to four dimensions are never copied, provided that their last dimension is contiguous. With five and
    more, broadcast or strided batch dimensions may have to be. The gradient can be differentiated again.

    What PyTorch's function accepts on the CPU and this one does not: a head dimension of 0, a scale that is not finite,
    and tensor subclasses. What this one accepts beyond it: attn_mask together with is_causal for any shape, attn_mask
    of fewer than two dimensions, and forward-mode derivatives whatever the shape.

    Example:
        >>> import torch, fastattn
        >>> query = torch.randn(2, 8, 128, 64, requires_grad=True)
        >>> key, value = torch.randn(2, 8, 100, 64), torch.randn(2, 8, 100, 64)
        >>> padding = torch.arange(100) < 90
        >>> o = fastattn.scaled_dot_product_attention(query, key, value, attn_mask=padding)
        >>> o.shape
        torch.Size([2, 8, 128, 64])
        >>> o.sum().backward()
    """
    try:
        if torch._C._is_any_autocast_enabled():
            query, key, value, attn_mask = autocast(query, key, value, attn_mask)
        q, k, v = query.shape, key.shape, value.shape
        if not (
            len(q) == len(k) == len(v) == 4
            and q[0] == k[0] == v[0]
            and k[1] == v[1]
            and (q[1] == k[1] or enable_gqa or k[1] == 1)
        ):
            return _attend_any_rank(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        bias = mask = None
        if attn_mask is not None:
            rank = attn_mask.dim()
            if rank == 2:
                attn_mask = attn_mask.expand(1, 1, -1, -1)
            elif rank < 4:
                attn_mask = attn_mask.expand((1,) * (4 - rank) + attn_mask.shape)
            if attn_mask.dtype is torch.bool:
                mask = attn_mask
            elif attn_mask.dtype is torch.float32 and query.dtype is torch.float64:
                bias = attn_mask.double()
            else:
                bias = attn_mask
        if is_causal is False:
            causal = _NOT_CAUSAL
        elif is_causal is True:
            causal = _TOP_LEFT
        else:
            raise TypeError(f"fastattn: is_causal is {is_causal!r}; it must be True or False.")
        o, _ = _attention.attend(
            query,
            key,
            value,
            bias,
            mask,
            None,
            None,
            None,
            causal,
            _UNLIMITED,
            _UNLIMITED,
            scale,
            0.0,
            dropout_p,
        )
        return o
    except Exception as error:
        _errors.raise_instead(error, _explained(error, query, key, value, attn_mask, dropout_p, scale))


# What the operator's messages call the arguments, and what SDPA's callers do.
_SDPA_NAMES = {"q": "query", "k": "key", "v": "value", "bias": "attn_mask", "mask": "attn_mask"}


def _explained(
    error: Exception, query: object, key: object, value: object, attn_mask: object, dropout_p: object, scale: object
) -> Exception:
    """The exception to raise in place of `error`, with SDPA's names; `error` itself where that changes nothing."""
    tensors = {"q": query, "k": key, "v": value, "bias": attn_mask}
    clean = _errors.explain(error, tensors, {"scale": scale, "dropout_p": dropout_p})
    if not str(clean).startswith("fastattn: "):
        return clean
    if isinstance(attn_mask, Tensor) and "bias is torch." in str(clean):
        return TypeError(
            f"fastattn: attn_mask is {attn_mask.dtype} but query is {getattr(query, 'dtype', None)}; attn_mask must be "
            "torch.bool, True where the query may see the key, or a tensor in query's dtype or torch.float32 that is "
            "added to the scores: convert with attn_mask.to()."
        )
    text = re.sub(r"\b(q|k|v|bias|mask)\b", lambda match: _SDPA_NAMES[match[0]], str(clean))
    return clean if text == str(clean) else type(clean)(text)


def _attend_any_rank(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """What four equal-sized dimensions do not cover: any rank, broadcasting, and heads that differ between k and v.

    The inputs become views of shape (B, H, L, D), where H is dimension -3 and B all dimensions before it. Heads that
    the key and the value have one of are left at one: the operator shares them among the query heads without a copy.
    """
    rank = max(query.dim(), key.dim(), value.dim())
    if min(query.dim(), key.dim(), value.dim()) < (3 if enable_gqa else 2):
        raise ValueError(
            f"fastattn: query, key and value have shapes {tuple(query.shape)}, {tuple(key.shape)} and "
            f"{tuple(value.shape)}; each needs at least "
            + ("three dimensions, (H, L, D), with enable_gqa=True." if enable_gqa else "two dimensions, (L, D).")
        )
    if attn_mask is not None and attn_mask.dim() > rank:
        raise ValueError(
            f"fastattn: attn_mask has {attn_mask.dim()} dimensions, shape {tuple(attn_mask.shape)}, but query, key and "
            f"value have at most {rank}; it must broadcast to the scores (..., Lq, Lk): add dimensions to query."
        )
    q, k, v = (_with_rank(x, max(rank, 4)) for x in (query, key, value))

    Hq, Hk, Hv = q.shape[-3], k.shape[-3], v.shape[-3]
    if enable_gqa:
        if (Hk == 0 or Hq % Hk) if Hq else Hk:
            raise _heads_error("key", Hk, Hq)
        if (Hv == 0 or Hq % Hv) if Hq else Hv:
            raise _heads_error("value", Hv, Hq)
        if Hk != Hv:
            heads = Hk if Hk % Hv == 0 else Hv if Hv % Hk == 0 else Hq
            k, v = _repeat_heads(k, heads), _repeat_heads(v, heads)
    elif not Hq == Hk == Hv:
        heads = _broadcast_sizes([(Hq,), (Hk,), (Hv,)], "head counts (dimension -3)")[0]
        q = q.expand(*q.shape[:-3], heads, *q.shape[-2:])
        if not Hk == Hv == 1:
            k, v = (x.expand(*x.shape[:-3], heads, *x.shape[-2:]) for x in (k, v))

    batch = tuple(q.shape[:-3])
    if not batch == k.shape[:-3] == v.shape[:-3]:
        batch = _broadcast_sizes([batch, k.shape[:-3], v.shape[:-3]], "batch dimensions")
        q, k, v = (x.expand(*batch, *x.shape[-3:]) for x in (q, k, v))
    mask = attn_mask
    if mask is not None and rank > 4:
        mask = _with_rank(mask, rank)
        # A mask that is the same for the whole batch stays small; another is laid out over the batch it belongs to.
        lead = mask.shape[:-3]
        if any(size != 1 for size in lead):
            if _broadcast_sizes([batch, lead], "batch dimensions and those of attn_mask") != batch:
                raise ValueError(
                    f"fastattn: attn_mask has shape {tuple(mask.shape)}; its batch dimensions must broadcast to those "
                    f"of query, key and value, {batch}."
                )
            mask = mask.expand(*batch, *mask.shape[-3:])
        mask = mask.flatten(0, -4)
    if rank > 4:
        q, k, v = (x.flatten(0, -4) for x in (q, k, v))
    o = scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=True)
    if rank > 4:
        return o.unflatten(0, batch)
    return o.squeeze(0) if rank == 3 else o[0, 0] if rank == 2 else o


def _with_rank(x: Tensor, rank: int) -> Tensor:
    """A view of x with dimensions of size 1 in front."""
    missing = rank - x.dim()
    return x if not missing else x.unsqueeze(0) if missing == 1 else x.expand((1,) * missing + x.shape)


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Each head of x (dimension -3) `heads / H` times in a row."""
    return x if x.size(-3) == heads else x.repeat_interleave(heads // x.size(-3), dim=-3)


def _heads_error(name: str, heads: int, query_heads: int) -> ValueError:
    return ValueError(
        f"fastattn: {name} has {heads} heads but query has {query_heads}; query's heads must be a multiple of {name}'s."
    )


def _broadcast_sizes(shapes: Sequence[Sequence[int]], what: str) -> tuple[int, ...]:
    """The sizes that equally long shapes broadcast to."""
    sizes = []
    for dims in zip(*shapes, strict=True):
        size = next((d for d in dims if d != 1), 1)
        if any(d not in (1, size) for d in dims):
            shown = ", ".join(str(tuple(shape)) for shape in shapes)
            raise ValueError(
                f"fastattn: the {what} of query, key and value are {shown}; in each dimension they must be equal or 1"
                + (" (enable_gqa=True lets query have more heads)." if what.startswith("head") else ".")
            )
        sizes.append(size)
    return tuple(sizes)


# ---------------------------------------------------------------------------------------------------------------------
# The switch


@dataclass(frozen=True)
class SdpaCalls:
    """What became of the calls of torch.nn.functional.scaled_dot_product_attention while it was replaced.

    A call inside code that torch.compile compiles counts once, when it is traced, not each time that the code runs.
    """

    served: int
    handed_back: dict[str, int]  # by reason

    def __str__(self) -> str:
        lines = [f"served by fastattn: {self.served}", f"handed back to PyTorch: {sum(self.handed_back.values())}"]
        return "\n".join(lines + [f"  {reason}: {count}" for reason, count in sorted(self.handed_back.items())])


@dataclass
class _Switch:
    """The state of the replacement. `lock` guards all of it; reading `active` and `original` needs no lock."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    original: Callable[..., Tensor] = F.scaled_dot_product_attention
    wrapper: Callable[..., Tensor] | None = None  # somebody's, found around the replacement when it was to be taken out
    requested: bool = False  # by replace_sdpa()
    blocks: int = 0  # `with replaced_sdpa()` blocks that are being executed, in all threads
    suspensions: int = 0  # calls of tensor subclasses' own functions that are being executed, in all threads
    active: bool = False
    served: int = 0
    handed_back: dict[str, int] = field(default_factory=dict)


_switch = _Switch()


def replace_sdpa() -> None:
    """Make every caller of torch.nn.functional.scaled_dot_product_attention use fastattn, in all threads.

    Calls that fastattn cannot serve (tensors on other devices than CPU and CUDA, dtypes other than float32, bfloat16,
    float16 and float64, nested and sparse tensors, tensor subclasses, and arguments that fastattn refuses; on CUDA also
    float64, head dimensions above 256, GPUs older than compute capability 8.0, and everything where the CUDA kernels
    are not there) go to the function that was replaced. They are counted in `sdpa_calls()`, and the first one for each
    reason warns.

    TorchScript keeps PyTorch's function. So does code that looked it up before, as with `from torch.nn.functional
    import scaled_dot_product_attention`, and so do the callers inside PyTorch's C++, such as the fast path of
    nn.TransformerEncoder: `torch.nn.attention.activate_flash_attention_impl("fastattn")` reaches all three. A second
    call of replace_sdpa does nothing.

    Example:
        >>> import torch, fastattn
        >>> fastattn.replace_sdpa()
        >>> x = torch.randn(1, 4, 16, 32)
        >>> o = torch.nn.functional.scaled_dot_product_attention(x, x, x)
        >>> fastattn.sdpa_calls().served
        1
        >>> fastattn.restore_sdpa()
    """
    with _switch.lock:
        _switch.requested = True
        _install()


def restore_sdpa() -> None:
    """Undo `replace_sdpa()`. Without one it does nothing; inside `with replaced_sdpa():` it takes effect at its end."""
    with _switch.lock:
        _switch.requested = False
        _install()


@contextmanager
def replaced_sdpa() -> Iterator[None]:
    """A context in which fastattn serves torch.nn.functional.scaled_dot_product_attention, as after `replace_sdpa()`.

    Blocks may be nested, lie within replace_sdpa() ... restore_sdpa(), and run in several threads. The replacement is
    the whole process's: while one thread is in a block, the others' calls are served too.

    Example:
        >>> import torch, fastattn
        >>> x = torch.randn(1, 4, 16, 32)
        >>> with fastattn.replaced_sdpa():
        ...     o = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
    """
    with _switch.lock:
        _switch.blocks += 1
        _install()
    try:
        yield
    finally:
        with _switch.lock:
            _switch.blocks -= 1
            _install()


def sdpa_calls(*, reset: bool = False) -> SdpaCalls:
    """How many calls of the replaced function fastattn served, and how many PyTorch, by reason.

    Args:
        reset: set the counters to 0 afterwards; each reason will warn once more.
    """
    with _switch.lock:
        calls = SdpaCalls(_switch.served, dict(_switch.handed_back))
        if reset:
            _switch.served = 0
            _switch.handed_back.clear()
    return calls


def _install() -> None:
    """Put into torch.nn.functional what the switch says. The lock is held."""
    wanted = _switch.requested or _switch.blocks > 0
    current: Callable[..., Tensor] = F.scaled_dot_product_attention
    if wanted and not _switch.active and current is not _replacement and current is not _switch.wrapper:
        _switch.original = current
    if not wanted and _switch.active and current is not _replacement and not _switch.suspensions:
        # Taking the wrapper away would break its owner. With `active` off the replacement in it does nothing but call
        # the original, and when `active` is on again it serves.
        _switch.wrapper = current
    _switch.active = wanted
    if wanted and not _switch.suspensions:
        if current is _switch.original:
            F.scaled_dot_product_attention = _replacement  # type: ignore[assignment]
    elif current is _replacement:
        F.scaled_dot_product_attention = _switch.original


def _call_subclass(original: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """original(*args), for arguments that are subclasses with a function of their own for SDPA.

    PyTorch asks them for `original`, and some compare that with torch.nn.functional's attribute, which must be the same
    then: otherwise they do not recognise SDPA and compute something else.
    """
    with _switch.lock:
        _switch.suspensions += 1
        _install()
    try:
        return original(*args, **kwargs)
    finally:
        with _switch.lock:
            _switch.suspensions -= 1
            _install()


def _replacement(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What fastattn.replace_sdpa() installs: fastattn's function where it can serve the call, else PyTorch's."""
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    if not _switch.active:
        return _switch.original(query, key, value, attn_mask, dropout_p, is_causal, **options)
    if type(attn_mask).__module__ == "torch.nn.attention.bias":
        # CausalBias, whose import would import torch's compiler. It calls this again, with is_causal or a mask instead.
        args = (query, key, value, attn_mask, dropout_p, is_causal)
        kind: Any = type(attn_mask)
        return kind.__torch_function__(F.scaled_dot_product_attention, (kind,), args, options)
    if torch.compiler.is_dynamo_compiling():
        reason = _reason_to_hand_back(query, key, value, attn_mask)
        _count(reason)
        serve = _switch.original if reason else scaled_dot_product_attention
        return serve(query, key, value, attn_mask, dropout_p, is_causal, **options)
    if torch._C._is_torch_function_mode_enabled():
        # A mode (torch.set_default_device is one) sees the call, as it would see PyTorch's, and calls this again.
        tensors = (query, key, value, attn_mask)
        return handle_torch_function(_replacement, tensors, *tensors, dropout_p, is_causal, **options)
    refusal: Exception | None = None
    if (
        type(query) in _PLAIN
        and type(key) in _PLAIN
        and type(value) in _PLAIN
        and (attn_mask is None or type(attn_mask) in _PLAIN)
        and (query.is_cpu or _reason_to_hand_back(query, key, value, attn_mask) is None)
    ):
        try:
            o = scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        except (TypeError, ValueError) as error:
            refusal = error
        else:
            with _switch.lock:
                _switch.served += 1
            return o
    reason = _reason_to_hand_back(query, key, value, attn_mask)
    if reason is None and refusal is not None:
        # PyTorch takes some of these, and refuses the others in its own words. Its CPU kernel does not compare the
        # lengths of key and value, though, and would read beyond the end of value.
        if key.dim() > 1 and value.dim() > 1 and key.size(-2) != value.size(-2):
            raise refusal
        _count(_REFUSED, f" ({refusal})")
    else:
        _count(reason)
    if reason is _SUBCLASSES:
        return _call_subclass(_switch.original, query, key, value, attn_mask, dropout_p, is_causal, **options)
    return _switch.original(query, key, value, attn_mask, dropout_p, is_causal, **options)


_replacement.__name__ = _replacement.__qualname__ = "scaled_dot_product_attention"
# torch.jit.script compiles what it finds in torch.nn.functional; here it shall find PyTorch's operator, as ever.
if hasattr(torch.jit._builtins, "_register_builtin"):
    torch.jit._builtins._register_builtin(_replacement, "aten::scaled_dot_product_attention")

_REFUSED = "arguments that fastattn refuses"
_SUBCLASSES = "tensor subclasses"
_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
# Subclasses that change nothing about what a tensor computes.
_PLAIN = frozenset({Tensor, torch.nn.Parameter, FakeTensor})


def _reason_to_hand_back(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> str | None:
    """Why this call is not fastattn's to serve; None = it is, as far as can be said without looking at the sizes."""
    tensors = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    if not all(type(x) in _PLAIN for x in tensors):
        return _SUBCLASSES
    if query.is_nested or key.is_nested or value.is_nested:
        return "nested tensors"
    on_cuda = query.is_cuda and key.is_cuda and value.is_cuda
    if not on_cuda and not (query.is_cpu and key.is_cpu and value.is_cpu):
        return "tensors that are neither all on the CPU nor all on CUDA"
    if query.dtype not in _DTYPES:
        return f"dtype {query.dtype}"
    if not (query.layout is key.layout is value.layout is torch.strided):
        return "tensors that are not strided"
    return _reason_not_on_cuda(query, value) if on_cuda else None


def _reason_not_on_cuda(query: Tensor, value: Tensor) -> str | None:
    """The same of strided tensors on a GPU: the limits of the CUDA kernels, which must not break off a trace either."""
    obstacle = _cuda.obstacle(query.device.index)
    if obstacle is not None:
        return f"CUDA tensors: {obstacle}"
    if query.dtype == torch.float64:
        return f"dtype {query.dtype} on CUDA"
    if any(x.dim() > 0 and x.size(-1) > _cuda.MAX_HEAD_DIM for x in (query, value)):
        return f"a head dimension above {_cuda.MAX_HEAD_DIM} on CUDA"
    return None


def _count(reason: str | None, detail: str = "") -> None:
    """One call more that was served (None) or handed back; a reason's first call warns."""
    with _switch.lock:
        if reason is None:
            _switch.served += 1
            return
        count = _switch.handed_back[reason] = _switch.handed_back.get(reason, 0) + 1
    if count == 1:
        warnings.warn(
            f"fastattn: a call of scaled_dot_product_attention was handed back to PyTorch: {reason}{detail}. Further "
            "ones are counted in fastattn.sdpa_calls().",
            stacklevel=3,
        )


# A trace may neither read the counters (it would be compiled again for each value) nor break off for them: this runs
# while the trace is made, and leaves nothing in it. torch.compiler.assume_constant_result would set the same mark, but
# imports the compiler, which takes a second.
_count._dynamo_marked_constant = True  # type: ignore[attr-defined]
