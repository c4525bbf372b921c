"""From the arguments that the public functions share to those of the operators."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from fastattn import _ops

Causal = bool | Literal["top_left", "bottom_right"]
Window = tuple[int | None, int | None]

_CAUSAL_CODES: dict[bool | str, int] = {False: 0, True: 2, "top_left": 1, "bottom_right": 2}


def autocast(*tensors: Tensor | None) -> list[Any]:
    """Float tensors cast to the autocast dtype of the first one's device; float64 stays, as it does in torch."""
    assert tensors[0] is not None
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [x.to(dtype) if x is not None and x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors]


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """For plain operations in a dtype of their own. On some devices, such as meta, there is no autocast."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def accumulator(name: str, tensor: Tensor, q: Tensor) -> Tensor:
    """A small per-head tensor in the type in which the kernels compute."""
    if not tensor.is_floating_point():
        raise TypeError(f"fastattn: {name} is {tensor.dtype}; it must be a float tensor: convert with {name}.float().")
    return tensor.to(_ops.accumulator_dtype(q.dtype))


def constant_slopes(alibi_slopes: Tensor, q: Tensor) -> Tensor:
    """ALiBi's slopes in the type in which the kernels compute; they have no gradient."""
    slopes = accumulator("alibi_slopes", alibi_slopes, q)
    if slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "fastattn: alibi_slopes requires a gradient, which attention does not compute; pass"
            " alibi_slopes.detach(), or the penalty as a bias, which is differentiable."
        )
    return slopes


def register_result(kind: type) -> None:
    """Lets torch.export.save write programs that take or return this named tuple, and torch.export.load read them."""
    from torch.utils import _pytree

    if hasattr(_pytree, "_register_namedtuple"):
        _pytree._register_namedtuple(kind, serialized_type_name=f"fastattn.{kind.__name__}")


def causal_code(causal: Any) -> int:
    """The operators' code of a causal argument."""
    if not isinstance(causal, bool | str):
        raise TypeError(
            f"fastattn: causal is a {type(causal).__name__}; it must be False, True, 'top_left' or 'bottom_right'."
        )
    if causal not in _CAUSAL_CODES:
        raise ValueError(
            f"fastattn: causal is {causal!r}; it must be False, True (the same as 'bottom_right'), 'top_left' or"
            " 'bottom_right'."
        )
    return _CAUSAL_CODES[causal]


def window_sides(window: Any) -> tuple[int, int]:
    """The operators' two sides of a window argument."""
    if window is None:
        return _ops.UNLIMITED, _ops.UNLIMITED
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise TypeError(
            f"fastattn: window is {window!r}; it must be a pair (left, right) of key counts, None without limit."
        )
    for side in window:
        if side is not None and (isinstance(side, bool) or not isinstance(side, int | torch.SymInt)):
            raise TypeError(f"fastattn: window is {window!r}; each side must be an int, or None without limit.")
        if side is not None and side < 0:
            raise ValueError(
                f"fastattn: window is {window!r}; each side counts keys and must be at least 0: pass None for a side"
                " without limit."
            )
    left, right = window
    return _ops.UNLIMITED if left is None else left, _ops.UNLIMITED if right is None else right
