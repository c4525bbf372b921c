"""Hard attention."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fastattn import _attention, _errors, _ops, _transforms, _vmap, reference
from fastattn._arguments import Causal, Window, autocast, causal_code, register_result, window_sides
from fastattn._autograd import Operator, Tensors

Mode = Literal["sample", "argmax"]
Estimator = Literal["reinforce", "straight_through"]
MODES: tuple[str, ...] = get_args(Mode)
ESTIMATORS: tuple[str, ...] = get_args(Estimator)

# --- The operators ----------------------------------------------------------------------------------------------------


@torch.library.register_fake("fastattn::hard_attention_forward")
def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    kv_lengths: Tensor | None,
    rng_state: Tensor | None,
    causal: int,
    window_left: int,
    window_right: int,
    scale: float | None,
    save_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors: Tensors = {"q": q, "k": k, "v": v, "mask": mask, "kv_lengths": kv_lengths, "rng_state": rng_state}
    _ops.check_fake("hard_attention", tensors, (causal, window_left, window_right, scale))
    B, Hq, Lq, _ = q.shape
    o = _ops.empty_rows_like(q, B, Hq, Lq, v.shape[3])
    index = q.new_empty((B, Hq, Lq), dtype=torch.int64)
    accumulator = _ops.accumulator_dtype(q.dtype)
    log_prob = q.new_empty((B, Hq, Lq), dtype=accumulator)
    stats = q.new_empty((2, B, Hq, Lq) if save_stats else (0,), dtype=accumulator)
    return o, index, log_prob, stats


@torch.library.register_fake("fastattn::hard_attention_backward")
def _backward_fake(
    d_o: Tensor | None, d_log_prob: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (_ops.empty_rows_like(x, *x.shape) for x in (q, k, v))
    return dq, dk, dv


def _by_reference(tensors: Tensors, settings: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """o and log_prob of a choice as the operator gives them, through plain torch operations in the accumulator type."""
    causal, window_left, window_right, scale = settings
    q, k, v, index = _ops.required(tensors, "q", "k", "v", "index")
    hidden = _ops.reference_mask(tensors, causal, window_left, window_right)
    log_p = reference.log_probabilities(q, k, scale=scale, **hidden, dtype=_ops.accumulator_dtype(q.dtype))
    return reference.hard_attention(log_p, v, index, kv_lengths=hidden["kv_lengths"])


class _Choice(torch.autograd.Function):
    """The index alone, which has no derivative in any mode."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return _operator.forward_op(*inputs, False)[1]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)
        ctx.count = len(inputs)

    @staticmethod
    def backward(ctx: Any, _: Any) -> tuple[None, ...]:
        return (None,) * ctx.count

    @staticmethod
    def jvp(*_: Any) -> None:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        (index,), (out_dim,) = _choice_rule(lambda *x: (_Choice.apply(*x),), info.batch_size, in_dims, inputs)
        return index, out_dim


_choice_rule = _vmap.Rule(("q", "k", "v", "mask", "kv_lengths", "rng_state"), ("index",), _vmap.PADDED)


def _in_forward_mode(tensors: Tensors, settings: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """All results, for tensors with tangents."""
    choice: Any = _Choice.apply
    index = choice(*tensors.values(), *settings)
    o, log_prob = _by_reference({**tensors, "index": index}, settings)
    return o, index, log_prob


_operator = Operator(
    "hard_attention",
    inputs=("q", "k", "v", "mask", "kv_lengths", "rng_state"),
    differentiable=("q", "k", "v"),
    results=("o", "index", "log_prob"),
    upstream=("o", "log_prob"),
    saved=("q", "k", "v", "index", "stats", "mask", "kv_lengths"),
    needs_first=False,
    reference=_by_reference,
    forward_mode=_in_forward_mode,
)


# --- The function -----------------------------------------------------------------------------------------------------


class HardAttentionOutput(NamedTuple):
    """What :func:`hard_attention` returns."""

    output: Tensor
    """(B, Hq, Lq, Dv), q's dtype: the values that were taken, bit for bit."""
    index: Tensor  # type: ignore[assignment]  # tuple has a method of that name, which nobody will miss
    """(B, Hq, Lq), int64: their keys; -1 in a row that sees none."""
    log_prob: Tensor
    """(B, Hq, Lq), float32 (float64 for float64): the logarithm of the probability of that choice."""


register_result(HardAttentionOutput)


def hard_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mode: Mode = "sample",
    temperature: float = 1.0,
    estimator: Estimator = "reinforce",
    mask: Tensor | None = None,
    causal: Causal = False,
    window: Window | None = None,
    scale: float | None = None,
    kv_lengths: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> HardAttentionOutput:
    r"""Hard attention: each row takes the value of one key, drawn or the most probable. Fused: O(L) memory, one pass.

    With G = Hq / Hkv query heads to a key head, and j over the keys that row i sees::

        p[b, h, i, j]     = softmax_j(scale * q[b, h, i] . k[b, h/G, j] / temperature)
        index[b, h, i]    = a j drawn with the probabilities p, or the most probable (the lowest among equals)
        log_prob[b, h, i] = log p[b, h, i, index[b, h, i]]
        output[b, h, i]   = v[b, h/G, index[b, h, i]]

    A draw is the argmax of log p plus Gumbel noise (the Gumbel-max trick), which needs no second pass over the keys.
    The noise belongs to (seed, b, h, i, j): a seed draws the same on every device, up to rounding where two keys come
    out equal. A row that sees no key has index -1, output 0, log_prob 0 and no gradient.

    The choice has no derivative. ``log_prob`` is differentiable with respect to q and k, and output with respect to v;
    how q and k learn from the output is the estimator's to say:

    - "reinforce": not at all. Train them by log_prob: with a reward for each row, ``-(reward * log_prob).mean()`` has
      the gradient that the expected reward falls by (without bias, for a mode of "sample").
    - "straight_through": backward, the output counts as that of soft attention, sum_j p * v, so q, k and v get its
      gradient. That costs one call of :func:`fastattn.attention` more.

    Which keys a row sees, the alignment of ``causal`` (True is "bottom_right": the last row sees the last key that
    exists) and of ``window``, determinism, autocast and second derivatives are as in :func:`fastattn.attention`.

    Args:
        q: (B, Hq, Lq, D), float32, bfloat16, float16 or float64, any D >= 1 and any strides.
        k: (B, Hkv, Lk, D), of q's dtype and device; Hq is a multiple of Hkv. Query head h reads key head h // G.
        v: (B, Hkv, Lk, Dv), Dv may differ from D.
        mode: "sample" draws; "argmax" takes the most probable key, and is the choice in evaluation.
        temperature: Positive; divides the scores. Towards 0 a draw becomes the argmax, towards infinity uniform.
        estimator: "reinforce" or "straight_through", see above. It changes gradients only.
        mask: Bool, broadcastable to (B, Hq, Lq, Lk); True = keep.
        causal: False; True or "bottom_right"; or "top_left": no row sees keys after its diagonal.
        window: (left, right): the number of keys that a row sees before and after its diagonal, None without limit.
        scale: Factor on the dot products, 1/sqrt(D) by default.
        kv_lengths: (B,), int32, on q's device: the number of keys and values that exist; what lies beyond is not read.
        generator: Where to draw the seed, a generator of q's device; by default torch's own, which
            ``torch.manual_seed`` sets. Code under ``torch.compile`` has only the default.

    Returns:
        HardAttentionOutput(output, index, log_prob): (B, Hq, Lq, Dv) in q's dtype; (B, Hq, Lq), int64; (B, Hq, Lq),
        float32 (float64 for float64).

    Raises:
        ValueError: Shapes, sizes, devices, numbers or lengths break a rule above; the message names which. Or q is on a
            device for which there is no kernel.
        TypeError: An argument has the wrong type, layout or dtype.

    Source:
        K. Xu et al., "Show, attend and tell: neural image caption generation with visual attention", ICML 2015, section
        4.1; R. J. Williams, "Simple statistical gradient-following algorithms for connectionist reinforcement
        learning", 1992; C. J. Maddison, D. Tarlow and T. Minka, "A* sampling", NeurIPS 2014, section 2.

    Example:
        >>> import torch, fastattn
        >>> q = torch.randn(2, 4, 10, 16, requires_grad=True)
        >>> k, v = torch.randn(2, 4, 30, 16), torch.randn(2, 4, 30, 16)
        >>> glimpse = fastattn.hard_attention(q, k, v)
        >>> glimpse.output.shape, glimpse.index.shape
        (torch.Size([2, 4, 10, 16]), torch.Size([2, 4, 10]))
        >>> reward = -(glimpse.output - 1.0).square().mean(-1)
        >>> (-reward.detach() * glimpse.log_prob).mean().backward()
    """
    try:
        check_choice("mode", mode, MODES)
        check_choice("estimator", estimator, ESTIMATORS)
        check_temperature(temperature)
        if torch._C._is_any_autocast_enabled():
            q, k, v = autocast(q, k, v)
        _check_generator(generator, q)
        settings = (
            0 if causal is False else causal_code(causal),
            *window_sides(window),
            _scale_at(temperature, scale, q),
        )
        rng_state = None
        if mode == "sample":
            drawn_from = {} if generator is None else {"generator": generator}
            rng_state = _ops.draw_rng_state(q.device, **drawn_from)
        if estimator == "straight_through" and _may_be_differentiated(q, k, v):
            output, index, log_prob = _operator((q, k, v.detach(), mask, kv_lengths, rng_state), settings)
            soft, _ = _attention.attend(q, k, v, None, mask, None, None, kv_lengths, *settings, 0.0, 0.0)
            # Adds 0, or NaN where a value that the row sees is not finite: its gradient would be NaN as well.
            output = output.detach() + (soft - soft.detach())
        else:
            output, index, log_prob = _operator((q, k, v, mask, kv_lengths, rng_state), settings)
    except Exception as error:
        _errors.raise_explained(
            error,
            {"q": q, "k": k, "v": v, "mask": mask, "kv_lengths": kv_lengths},
            {"temperature": temperature, "scale": scale},
        )
    return HardAttentionOutput(output, index, log_prob)


def _may_be_differentiated(*tensors: Tensor) -> bool:
    if torch.compiler.is_dynamo_compiling():
        if _transforms.in_trace() is not None:
            return True
    elif _transforms.are_active():
        return True
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuses what is none of these."""
    if value not in choices:
        raise ValueError(f"fastattn: {name} is {value!r}; it must be {' or '.join(map(repr, choices))}.")


def check_temperature(temperature: Any) -> None:
    """Refuses what scores cannot be divided by."""
    if isinstance(temperature, bool) or not isinstance(temperature, int | float):
        raise TypeError(f"fastattn: temperature is a {type(temperature).__name__}; it must be a float.")
    if not (temperature > 0.0 and temperature < math.inf):
        raise ValueError(
            f"fastattn: temperature is {temperature}; it must be positive and finite: the limit at 0 is the mode"
            " 'argmax'."
        )


def _check_generator(generator: Any, q: Tensor) -> None:
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"fastattn: generator is a {type(generator).__name__}; it must be a torch.Generator, or None for torch's"
            " default."
        )
    if generator.device.type != q.device.type or generator.device.index not in (None, q.device.index):
        raise ValueError(
            f"fastattn: generator is on {generator.device} but q is on {q.device}; make it there with"
            " torch.Generator(q.device)."
        )


def _scale_at(temperature: float, scale: float | None, q: Tensor) -> float | None:
    """The factor on the dot products that stands for both; where scale itself is wrong, the operator says so."""
    if temperature == 1.0 or q.dim() != 4:
        return scale
    undivided = 1.0 / math.sqrt(max(q.shape[3], 1)) if scale is None else scale
    largest = torch.finfo(_ops.accumulator_dtype(q.dtype)).max
    if abs(undivided) <= largest < abs(undivided) / temperature:
        raise ValueError(
            f"fastattn: temperature is {temperature}, and scale / temperature is too large for"
            f" {_ops.accumulator_dtype(q.dtype)}: pass mode='argmax' for the limit at 0."
        )
    return undivided / temperature
