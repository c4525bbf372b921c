"""The compiled operators: loading them, what their tracing needs, and those of :func:`fastattn.attention`.

``torch.ops.fastattn.attention_forward`` and ``attention_backward`` are ordinary torch operators. Their shape rules are
here, and so is what ``fastattn._autograd`` makes their gradients of.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastattn import _cuda, _errors
from fastattn._autograd import Operator, Tensors

_LIBRARY = Path(__file__).with_name("_C_cpu.so")

# A level forced on the CPU kernels: baseline, avx2, avx512 or avx512_bf16.
CAPABILITY_VARIABLE = "FASTATTN_CPU_CAPABILITY"


def _load() -> None:
    if not _LIBRARY.exists():
        raise ImportError(
            f"fastattn's compiled library {_LIBRARY} is missing; build it with `pip install --no-build-isolation .`,"
            " or in a source tree with `python setup.py build_ext --inplace`."
        )
    torch.ops.load_library(str(_LIBRARY))
    _cuda.load()
    capability = os.environ.get(CAPABILITY_VARIABLE)
    if capability:
        try:
            torch.ops.fastattn._set_isa(capability)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{error} It was set by the environment variable {CAPABILITY_VARIABLE}.") from None


_load()

# The operators' codes; csrc/core/params.h has the same.
UNLIMITED = -1
_CAUSAL_NAMES: tuple[bool | str, ...] = (False, "top_left", "bottom_right")  # by the operator's code


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which the kernels accumulate: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- Shape rules -----------------------------------------------------------------------------------------------------


def empty_rows_like(like: Tensor, B: int, H: int, L: int, D: int) -> Tensor:
    """A result (B, H, L, D) laid out as ``like``; empty_rows_like in csrc/torch/attention.cpp says the same."""
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    if guard_or_false(like.stride(1) < like.stride(2)):
        return like.new_empty((B, L, H, D)).transpose(1, 2)
    return like.new_empty((B, H, L, D))


def check_fake(function: str, tensors: Tensors, settings: tuple[Any, ...]) -> None:
    """Refuses what the operator of this function would refuse, for tensors that have a shape and no data.

    The operator's own checks look at real tensors of the same shapes and dtypes, each of which is one number in memory,
    on the CPU, so that code for a GPU can be traced where there is none. A dimension that is symbolic counts with the
    size that it has now.
    """
    from torch.utils._python_dispatch import _disable_current_modes

    q = tensors["q"]
    assert q is not None
    stand_ins: dict[str, Tensor | None] = {}
    for name, tensor in tensors.items():
        if tensor is None:
            stand_ins[name] = None
            continue
        if tensor.device != q.device:
            raise _errors.wrong_device(name, tensor, q)
        shape: tuple[Any, ...] = tuple(tensor.shape)
        sizes: Any = [n if isinstance(n, int) else n.node.hint if n.node.has_hint() else None for n in shape]
        if None in sizes:
            return
        with _disable_current_modes():
            stand_ins[name] = torch.zeros((), dtype=tensor.dtype).expand(sizes)
    try:
        with _disable_current_modes():
            getattr(torch.ops.fastattn, f"_check_{function}")(*stand_ins.values(), *settings, q.device.type)
    except Exception as error:
        raise _errors.explain(error, stand_ins, {}) from None


@torch.library.register_fake("fastattn::attention_forward")
def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    kv_lengths: Tensor | None,
    rng_state: Tensor | None,
    causal: int,
    window_left: int,
    window_right: int,
    scale: float | None,
    softcap: float,
    dropout_p: float,
    save_stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_fake(
        "attention",
        {
            "q": q,
            "k": k,
            "v": v,
            "bias": bias,
            "mask": mask,
            "alibi_slopes": alibi_slopes,
            "sinks": sinks,
            "kv_lengths": kv_lengths,
            "rng_state": rng_state,
        },
        (causal, window_left, window_right, scale, softcap, dropout_p),
    )
    B, Hq, Lq, _ = q.shape
    o = empty_rows_like(q, B, Hq, Lq, v.shape[3])
    accumulator = accumulator_dtype(q.dtype)
    lse = q.new_empty((B, Hq, Lq), dtype=accumulator)
    stats = q.new_empty((2, B, Hq, Lq) if save_stats else (0,), dtype=accumulator)
    return o, lse, stats


@torch.library.register_fake("fastattn::attention_backward")
def _backward_fake(
    d_o: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    stats: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    kv_lengths: Tensor | None,
    rng_state: Tensor | None,
    causal: int,
    window_left: int,
    window_right: int,
    scale: float | None,
    softcap: float,
    dropout_p: float,
    need_d_bias: bool,
    need_d_sinks: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    accumulator = accumulator_dtype(q.dtype)
    nothing = q.new_empty((0,), dtype=accumulator)
    d_bias = bias.new_empty(bias.shape) if need_d_bias and bias is not None else nothing
    d_sinks = sinks.new_empty(sinks.shape) if need_d_sinks and sinks is not None else torch.empty_like(nothing)
    dq, dk, dv = (empty_rows_like(x, *x.shape) for x in (q, k, v))
    return dq, dk, dv, d_bias, d_sinks


@torch.library.register_fake("fastattn::dropout_mask")
def _dropout_mask_fake(rng_state: Tensor, B: int, H: int, Lq: int, Lk: int, p: float) -> Tensor:
    return rng_state.new_empty((B, H, Lq, Lk), dtype=torch.bool)


# --- Gradients -------------------------------------------------------------------------------------------------------


def _attention_by_reference(tensors: Tensors, settings: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """o and lse as attention_forward gives them, through plain torch operations in the accumulator type."""
    from fastattn import reference

    causal, window_left, window_right, scale, softcap, dropout_p = settings
    q, k, v = required(tensors, "q", "k", "v")
    o, lse = reference.attention(
        q,
        k,
        v,
        **reference_mask(tensors, causal, window_left, window_right),
        **reference_dropout(tensors, dropout_p),
        scale=scale,
        softcap=softcap or None,
        bias=tensors["bias"],
        alibi_slopes=tensors["alibi_slopes"],
        sinks=tensors["sinks"],
        return_lse=True,
        dtype=accumulator_dtype(q.dtype),
    )
    return o.to(q.dtype), lse


def required(tensors: Tensors, *names: str) -> tuple[Tensor, ...]:
    """These tensors, which every call has."""
    found = tuple(x for name in names if (x := tensors[name]) is not None)
    assert len(found) == len(names)
    return found


def reference_mask(
    tensors: Tensors, causal: int, window_left: int = UNLIMITED, window_right: int = UNLIMITED
) -> dict[str, Any]:
    """fastattn.reference's arguments for what the operators' arguments hide."""
    k, kv_lengths = tensors["k"], tensors["kv_lengths"]
    if k is not None and kv_lengths is not None and kv_lengths.is_cuda:
        kv_lengths = kv_lengths.clamp(0, k.shape[2])  # as the kernels do, for nobody has checked them
    sides = tuple(None if side == UNLIMITED else side for side in (window_left, window_right))
    return {"causal": _CAUSAL_NAMES[causal], "window": sides, "mask": tensors["mask"], "kv_lengths": kv_lengths}


def reference_dropout(tensors: Tensors, dropout_p: float) -> dict[str, Any]:
    """fastattn.reference's arguments for the dropout that the operators' arguments ask for."""
    if dropout_p <= 0.0:
        return {}
    q, k = required(tensors, "q", "k")
    B, Hq, Lq, _ = q.shape
    keep = torch.ops.fastattn.dropout_mask(tensors["rng_state"], B, Hq, Lq, k.shape[2], dropout_p)
    return {"dropout_p": dropout_p, "dropout_keep": keep}


_operator = Operator(
    "attention",
    inputs=("q", "k", "v", "bias", "mask", "alibi_slopes", "sinks", "kv_lengths", "rng_state"),
    differentiable=("q", "k", "v", "bias", "sinks"),
    results=("o", "lse"),
    upstream=("o", "lse"),
    saved=("q", "k", "v", "o", "stats", "bias", "mask", "alibi_slopes", "sinks", "kv_lengths", "rng_state"),
    wanted=("bias", "sinks"),
    reference=_attention_by_reference,
)
_forward_op, _backward_op = _operator.forward_op, _operator.backward_op
_forward_call, _backward_call = _operator.forward_call, _operator.backward_call


class _Attention(torch.autograd.Function):
    """What ``_operator`` makes for calls outside of a trace, written out: for tiny tensors, 62 µs instead of 66."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        sinks: Tensor | None,
        others: tuple[Tensor | None, ...],
        settings: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor]:
        mask, alibi_slopes, kv_lengths, rng_state = others
        with torch._C._AutoDispatchBelowAutograd():
            o, lse, stats = _forward_call(
                q, k, v, bias, mask, alibi_slopes, sinks, kv_lengths, rng_state, *settings, True
            )
        ctx.save_for_backward(q, k, v, o, stats, bias, mask, alibi_slopes, sinks, kv_lengths, rng_state)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    def backward(ctx: Any, d_o: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        need_dq, need_dk, need_dv, need_d_bias, need_d_sinks, _, _ = ctx.needs_input_grad
        if d_o is None or torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            return (*_operator.gradients(ctx, (d_o, d_lse), ctx.needs_input_grad[:5]), None, None)
        with torch._C._AutoDispatchBelowAutograd():
            dq, dk, dv, d_bias, d_sinks = _backward_call(
                d_o, d_lse, *ctx.saved_tensors, *ctx.settings, need_d_bias, need_d_sinks
            )
        return (
            dq if need_dq else None,
            dk if need_dk else None,
            dv if need_dv else None,
            d_bias if need_d_bias else None,
            d_sinks if need_d_sinks else None,
            None,
            None,
        )


# torch.autograd.Function.apply without its look at torch.func's transforms, which `attention` has taken.
_apply: Any = super(torch.autograd.Function, _Attention).apply


# --- The call --------------------------------------------------------------------------------------------------------


def draw_rng_state(device: torch.device | str = "cpu", generator: torch.Generator | None = None) -> Tensor:
    """(seed, offset) for one call's random numbers, int64, from the device's generator, and in its memory.

    On a GPU the host never learns them, which would mean to wait, and the replay of a captured graph draws new ones.
    """
    return torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=device, generator=generator)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    kv_lengths: Tensor | None,
    causal: int,
    window_left: int,
    window_right: int,
    scale: float | None,
    softcap: float,
    dropout_p: float,
    rng_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """o and lse of four-dimensional tensors: attention_forward and its gradients, in the cheapest way for the caller.

    The arguments are the operator's. Without rng_state, dropout draws one from the default generator of q's device.
    """
    # A probability beyond [0, 1] is the operator's to refuse.
    if rng_state is None and dropout_p and 0.0 < dropout_p <= 1.0:
        rng_state = draw_rng_state(q.device)
    settings = (causal, window_left, window_right, scale, softcap, dropout_p)
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        o, lse = _operator((q, k, v, bias, mask, alibi_slopes, sinks, kv_lengths, rng_state), settings)
        return o, lse
    if torch.is_grad_enabled() and (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (bias is not None and bias.requires_grad)
        or (sinks is not None and sinks.requires_grad)
    ):
        others = (mask, alibi_slopes, kv_lengths, rng_state)
        return _apply(q, k, v, bias, sinks, others, settings)
    with torch._C._AutoDispatchBelowAutograd():
        o, lse, _ = _forward_call(q, k, v, bias, mask, alibi_slopes, sinks, kv_lengths, rng_state, *settings, False)
    return o, lse
