"""Which transforms of torch.func a call is under, and calls under them in code that torch.compile compiles.

torch.compile traces the transforms of code like ``torch.compile(torch.func.grad(loss))`` together with what they
transform. To an operator's registered gradient they are invisible then: torch.func.grad refuses it, and torch.func.jvp
would take the operator for a constant. So such a call goes into the graph as one function, :func:`call`, into which the
next stage looks with the transforms in force, as eager code would.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

if TYPE_CHECKING:
    from fastattn._autograd import Operator

operators: dict[str, Operator] = {}  # by name


def are_active() -> bool:
    """Whether this thread is in a transform of torch.func, or in a forward-mode level."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def is_forward_mode() -> bool:
    """Whether tensors may have tangents."""
    return forward_ad._current_level >= 0


def in_trace() -> str | None:
    """For use in a trace of torch.compile: "forward" if forward mode is being traced, "other" transforms, None = none.

    Strings, for a trace can take no enum from a function that it does not look into.
    """
    if not are_active():
        return None
    torch.compiler.allow_in_graph(call)  # imports the compiler, which is there
    return "forward" if is_forward_mode() else "other"


# It runs while the trace is made, and leaves its result in it. torch.compiler.assume_constant_result would set the same
# mark, but imports the compiler, which takes a second.
in_trace._dynamo_marked_constant = True  # type: ignore[attr-defined]


def call(
    name: str, is_forward_mode: bool, tensors: tuple[Tensor | None, ...], settings: tuple[Any, ...]
) -> tuple[Tensor, ...]:
    """An operator's results under the transforms that are in force, as one node of torch.compile's graph."""
    return operators[name].transformed(is_forward_mode, tensors, settings)
