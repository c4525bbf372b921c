"""The compiled operators: loading, shape rules for tracing, autograd.

``torch.ops.fastattn.attention_forward`` and ``attention_backward`` are ordinary torch operators: they have fakes and
registered gradients, so that ``torch.compile`` traces them without a graph break and ``torch.func`` sees through them.
Outside of a trace :func:`attention` goes past the registered gradient, to a ``torch.autograd.Function`` over the same
two functions ``_save`` and ``_gradients``: on tiny tensors, torch.library's general wrapper took 142 µs for forward and
backward, this 65 µs.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastattn import _cuda, _errors

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

_forward_op = torch.ops.fastattn.attention_forward.default
_backward_op = torch.ops.fastattn.attention_backward.default
# The same, without the Python frame of OpOverload.__call__; not for tracing.
_forward_call: Any = _forward_op._op
_backward_call: Any = _backward_op._op

# The arguments of attention_forward: nine tensors, then the settings (causal to dropout_p), then save_stats.
_TENSORS = 9
_DIFFERENTIABLE = (0, 1, 2, 3, 6)  # q, k, v, bias, sinks
_CAUSAL_NAMES: tuple[bool | str, ...] = (False, "top_left", "bottom_right")  # by the operator's code


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which the kernels accumulate: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- Shape rules -----------------------------------------------------------------------------------------------------


def _empty_rows_like(like: Tensor, B: int, H: int, L: int, D: int) -> Tensor:
    """A result (B, H, L, D) laid out as ``like``; empty_rows_like in csrc/torch/attention.cpp says the same."""
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    if guard_or_false(like.stride(1) < like.stride(2)):
        return like.new_empty((B, L, H, D)).transpose(1, 2)
    return like.new_empty((B, H, L, D))


def _check_fake(tensors: dict[str, Tensor | None], settings: tuple[Any, ...]) -> None:
    """Refuses what attention_forward would refuse, for tensors that have a shape and no data.

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
            torch.ops.fastattn._check_attention(*stand_ins.values(), *settings, q.device.type)
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
    _check_fake(
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
    o = _empty_rows_like(q, B, Hq, Lq, v.shape[3])
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
    dq, dk, dv = (_empty_rows_like(x, *x.shape) for x in (q, k, v))
    return dq, dk, dv, d_bias, d_sinks


@torch.library.register_fake("fastattn::dropout_mask")
def _dropout_mask_fake(rng_state: Tensor, B: int, H: int, Lq: int, Lk: int, p: float) -> Tensor:
    return rng_state.new_empty((B, H, Lq, Lk), dtype=torch.bool)


# --- Gradients -------------------------------------------------------------------------------------------------------


def _save(ctx: Any, tensors: tuple[Tensor | None, ...], settings: tuple[Any, ...], o: Tensor, stats: Tensor) -> None:
    """Keeps what :func:`_gradients` needs of an attention_forward: its arguments and results."""
    ctx.save_for_backward(*tensors, o, stats)
    ctx.settings = settings
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, d_o: Tensor | None, d_lse: Tensor | None, needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients of attention_forward for q, k, v, bias and sinks, those that ``needed`` asks for."""
    q, k, v, bias, mask, alibi_slopes, sinks, kv_lengths, rng_state, o, stats = ctx.saved_tensors
    need_dq, need_dk, need_dv, need_d_bias, need_d_sinks = needed
    if d_o is None:
        if d_lse is None:
            return None, None, None, None, None
        d_o = torch.zeros_like(o)
    args = (
        *(d_o, d_lse, q, k, v, o, stats, bias, mask, alibi_slopes, sinks, kv_lengths, rng_state),
        *(*ctx.settings, need_d_bias, need_d_sinks),
    )
    if torch._C._are_functorch_transforms_active():
        dq, dk, dv, d_bias, d_sinks = _FunctionalBackward.apply(*args)
    elif torch.is_grad_enabled():
        # create_graph=True: the operator's own registered gradient makes the second derivative.
        dq, dk, dv, d_bias, d_sinks = _backward_op(*args)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            dq, dk, dv, d_bias, d_sinks = _backward_call(*args)
    return (
        dq if need_dq else None,
        dk if need_dk else None,
        dv if need_dv else None,
        d_bias if need_d_bias else None,
        d_sinks if need_d_sinks else None,
    )


class _Attention(torch.autograd.Function):
    """attention_forward outside of a trace. Few arguments, because autograd looks at each."""

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
        tensors = (q, k, v, bias, mask, alibi_slopes, sinks, kv_lengths, rng_state)
        with torch._C._AutoDispatchBelowAutograd():
            o, lse, stats = _forward_call(*tensors, *settings, True)
        _save(ctx, tensors, settings, o, stats)
        return o, lse

    @staticmethod
    def backward(ctx: Any, d_o: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*_gradients(ctx, d_o, d_lse, ctx.needs_input_grad[:5]), None, None)


# torch.autograd.Function.apply without its look at torch.func's transforms, which `attention` has taken.
_apply: Any = super(torch.autograd.Function, _Attention).apply


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    o, _, stats = output
    ctx.mark_non_differentiable(stats)
    _save(ctx, inputs[:_TENSORS], inputs[_TENSORS:-1], o, stats)


def _forward_gradients(ctx: Any, d_o: Tensor | None, d_lse: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad
    found = _gradients(ctx, d_o, d_lse, tuple(needed[i] for i in _DIFFERENTIABLE))
    grads: list[Tensor | None] = [None] * len(needed)
    for i, grad in zip(_DIFFERENTIABLE, found, strict=True):
        grads[i] = grad
    return tuple(grads)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    d_o, d_lse, q, k, v, _o, _stats, *others = inputs
    ctx.save_for_backward(d_o, d_lse, q, k, v, *others[: _TENSORS - 3])
    ctx.settings = tuple(others[_TENSORS - 3 : -2])
    ctx.set_materialize_grads(False)


def _backward_gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of attention_backward: second derivatives, from the plain torch operations of fastattn.reference.

    The first derivatives are computed again in a form that can be differentiated, which takes O(Lq * Lk) memory.
    o and stats get no gradient: they follow from q, k and v, and are computed again too.
    """
    if all(grad is None for grad in grads):
        return (None,) * len(ctx.needs_input_grad)
    saved: list[Any] = list(ctx.saved_tensors)
    if not torch.is_grad_enabled():  # no third derivative is asked for
        saved = [x if x is None else x.detach() for x in saved]
    d_o, d_lse, q, k, v, bias, mask, alibi_slopes, sinks, kv_lengths, rng_state = saved
    cotangents = (d_o,) if d_lse is None else (d_o, d_lse)
    primals = {"q": q, "k": k, "v": v, "bias": bias, "sinks": sinks}
    primals = {name: x for name, x in primals.items() if x is not None}

    def first(primals: dict[str, Tensor], cotangents: tuple[Tensor, ...]) -> Any:
        def results(primals: dict[str, Tensor]) -> tuple[Tensor, ...]:
            q, k, v = primals["q"], primals["k"], primals["v"]
            others = (primals.get("bias"), mask, alibi_slopes, primals.get("sinks"), kv_lengths, rng_state)
            return attention_by_reference(q, k, v, *others, *ctx.settings)[: len(cotangents)]

        return torch.func.vjp(results, primals)[1](cotangents)[0]

    transformed: Any = torch.func.vjp(first, primals, cotangents)
    firsts, pullback = transformed
    given = dict(zip(("q", "k", "v", "bias", "sinks"), grads, strict=True))
    d_firsts = {name: torch.zeros_like(x) if given[name] is None else given[name] for name, x in firsts.items()}
    d_primals, d_cotangents = pullback(d_firsts)
    # In the order of attention_backward's arguments.
    second = [d_cotangents[0], d_cotangents[1] if d_lse is not None else None]
    names = ("q", "k", "v", "o", "stats", "bias", "mask", "alibi_slopes", "sinks")
    second += [d_primals.get(name) for name in names]
    return tuple(second + [None] * (len(ctx.needs_input_grad) - len(second)))


class _FunctionalForward(torch.autograd.Function):
    """attention_forward under the transforms of torch.func, which cannot see through torch.library's gradients."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _forward_op(*inputs)

    setup_context = staticmethod(_setup_forward)
    backward = staticmethod(_forward_gradients)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        return _one_by_one(_FunctionalForward.apply, info.batch_size, in_dims, inputs)


class _FunctionalBackward(torch.autograd.Function):
    """attention_backward, likewise."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return _backward_op(*inputs)

    setup_context = staticmethod(_setup_backward)
    backward = staticmethod(_backward_gradients)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        return _one_by_one(_FunctionalBackward.apply, info.batch_size, in_dims, inputs)


def _one_by_one(function: Any, size: int, in_dims: tuple[int | None, ...], inputs: tuple[Any, ...]) -> tuple[Any, Any]:
    """What torch.func.vmap makes of an operator: calls for one element after the other, and their results stacked."""
    results = [
        function(*(x if dim is None else x.select(dim, i) for x, dim in zip(inputs, in_dims, strict=True)))
        for i in range(size)
    ]
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


torch.library.register_autograd("fastattn::attention_forward", _forward_gradients, setup_context=_setup_forward)
torch.library.register_autograd("fastattn::attention_backward", _backward_gradients, setup_context=_setup_backward)


def attention_by_reference(
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
) -> tuple[Tensor, Tensor]:
    """o and lse as attention_forward gives them, through plain torch operations in the accumulator type."""
    from fastattn import reference

    if kv_lengths is not None and kv_lengths.is_cuda:
        kv_lengths = kv_lengths.clamp(0, k.shape[2])  # as the kernels do, for nobody has checked them
    keep = None
    if dropout_p > 0.0:
        B, Hq, Lq, _ = q.shape
        keep = torch.ops.fastattn.dropout_mask(rng_state, B, Hq, Lq, k.shape[2], dropout_p)
    o, lse = reference.attention(
        q,
        k,
        v,
        causal=_CAUSAL_NAMES[causal],
        window=(None if window_left < 0 else window_left, None if window_right < 0 else window_right),
        scale=scale,
        softcap=softcap or None,
        bias=bias,
        mask=mask,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        kv_lengths=kv_lengths,
        dropout_p=dropout_p,
        dropout_keep=keep,
        return_lse=True,
        dtype=accumulator_dtype(q.dtype),
    )
    return o.to(q.dtype), lse


# --- The call --------------------------------------------------------------------------------------------------------


def draw_rng_state(device: torch.device | str = "cpu") -> Tensor:
    """(seed, offset) for one call's dropout, int64, from the device's default generator, and in its memory.

    On a GPU the host never learns them, which would mean to wait, and the replay of a captured graph draws new ones.
    """
    return torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=device)


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
) -> tuple[Tensor, Tensor]:
    """o and lse of four-dimensional tensors: attention_forward and its gradients, in the cheapest way for the caller.

    The arguments are the operator's. Dropout draws its seed from the default generator of q's device.
    """
    # A probability beyond [0, 1] is the operator's to refuse.
    rng_state = draw_rng_state(q.device) if dropout_p and 0.0 < dropout_p <= 1.0 else None
    needs_grad = torch.is_grad_enabled() and (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (bias is not None and bias.requires_grad)
        or (sinks is not None and sinks.requires_grad)
    )
    settings = (causal, window_left, window_right, scale, softcap, dropout_p)
    if torch.compiler.is_compiling():
        o, lse, _ = _forward_op(q, k, v, bias, mask, alibi_slopes, sinks, kv_lengths, rng_state, *settings, needs_grad)
        return o, lse
    if forward_ad._current_level >= 0:
        # The kernels have no forward-mode derivative.
        return attention_by_reference(q, k, v, bias, mask, alibi_slopes, sinks, kv_lengths, rng_state, *settings)
    if torch._C._are_functorch_transforms_active():
        tensors = (q, k, v, bias, mask, alibi_slopes, sinks, kv_lengths, rng_state)
        o, lse, _ = _FunctionalForward.apply(*tensors, *settings, True)
        return o, lse
    if needs_grad:
        others = (mask, alibi_slopes, kv_lengths, rng_state)
        return _apply(q, k, v, bias, sinks, others, settings)
    with torch._C._AutoDispatchBelowAutograd():
        o, lse, _ = _forward_call(q, k, v, bias, mask, alibi_slopes, sinks, kv_lengths, rng_state, *settings, False)
    return o, lse
