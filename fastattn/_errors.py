"""From what an operator throws to the exception that a user sees.

The rules that arguments must keep, and the messages, are in ``csrc/torch/checks.cpp``. Added here are the cases that
never reach it: an argument that is no tensor, tensors that torch's dispatcher sends elsewhere (sparse, another device),
a number of the wrong type. Nothing in this file runs before an operator has failed.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from fastattn import _cuda

# How csrc/torch/errors.h marks what is no ValueError.
_MARKS: dict[str, type[Exception]] = {
    "fastattn[TypeError]: ": TypeError,
    "fastattn[RuntimeError]: ": RuntimeError,
    "fastattn[OutOfMemoryError]: ": torch.OutOfMemoryError,
}

# The arguments for which None does not stand for "not given".
_REQUIRED = (
    *("q", "k", "v", "k_cache", "v_cache", "cache_lengths"),
    *("w", "cu_seqlens_q", "cu_seqlens_k", "dropout_p", "temperature"),
)


def explain(
    error: Exception, tensors: dict[str, Any], numbers: dict[str, Any], counts: dict[str, Any] | None = None
) -> Exception:
    """The exception to raise in place of ``error``, which an operator raised for these arguments.

    Args:
        error: What came out of the operator.
        tensors: The tensor arguments by name, q first. None stands for one that was not passed, where that is allowed.
        numbers: The arguments that must be real numbers, by name.
        counts: Those that must be integers.

    Returns:
        An exception whose text starts with "fastattn: ", or ``error`` itself when nothing is known of it.
    """
    text = str(error)
    for mark, kind in _MARKS.items():
        if text.startswith(mark):
            return kind("fastattn: " + text[len(mark) :])
    if text.startswith("fastattn: "):
        # torch lets an operator's ValueError through up to 2.14, and makes it a RuntimeError from 2.15 on.
        return ValueError(text) if type(error) is RuntimeError else error
    return (
        _wrong_kind(tensors) or _wrong_number(numbers) or _wrong_count(counts or {}) or _wrong_place(tensors) or error
    )


def raise_explained(
    error: Exception, tensors: dict[str, Any], numbers: dict[str, Any], counts: dict[str, Any] | None = None
) -> NoReturn:
    """Raises what :func:`explain` makes of ``error``: the end of the public functions' ``except`` clauses.

    A function that is called there, and not a context manager around the call: what succeeds pays nothing for it.
    """
    raise_instead(error, explain(error, tensors, numbers, counts))


def raise_instead(error: Exception, clean: Exception) -> NoReturn:
    """Raises ``clean`` without a word about ``error``, which is being handled; or ``error`` itself where it is that."""
    if clean is error:
        raise error
    raise clean from None


def _wrong_kind(tensors: dict[str, Any]) -> Exception | None:
    for name, value in tensors.items():
        if value is None and name not in _REQUIRED:
            continue
        if not isinstance(value, Tensor):
            return TypeError(f"fastattn: {name} is a {type(value).__name__}; it must be a torch.Tensor.")
        if value.is_nested:
            return TypeError(
                f"fastattn: {name} is a nested tensor; attention takes dense tensors: pad it with"
                " torch.nested.to_padded_tensor and pass kv_lengths."
            )
        if value.layout != torch.strided:
            return TypeError(
                f"fastattn: {name} has layout {value.layout}; attention takes dense tensors: convert with"
                f" {name}.to_dense()."
            )
        if value.is_quantized:
            return TypeError(
                f"fastattn: {name} is quantized; attention takes floats: convert with {name}.dequantize()."
            )
    return None


def _wrong_number(numbers: dict[str, Any]) -> Exception | None:
    for name, value in numbers.items():
        if value is None and name not in _REQUIRED:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            return TypeError(f"fastattn: {name} is a {type(value).__name__}; it must be a float.")
    return None


def _wrong_count(counts: dict[str, Any]) -> Exception | None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
            return TypeError(f"fastattn: {name} is a {type(value).__name__}; it must be an int.")
    return None


def _wrong_place(tensors: dict[str, Any]) -> Exception | None:
    q = tensors["q"]
    for name, value in tensors.items():
        if value is not None and value.device != q.device:
            return wrong_device(name, value, q)
    if q.is_cuda and _cuda.missing is not None:
        return ValueError(
            f"fastattn: q is on {q.device}, but {_cuda.missing}; {_cuda.remedy()}, or move the tensors to the CPU with"
            " q.cpu()."
        )
    if not q.is_cpu and not q.is_cuda:
        return ValueError(
            f"fastattn: q is on {q.device}, for which there is no kernel; move it to the CPU with q.cpu()."
        )
    return None


def wrong_device(name: str, value: Tensor, q: Tensor) -> ValueError:
    """The exception for a tensor that is not where q is."""
    return ValueError(
        f"fastattn: {name} is on {value.device} but q is on {q.device}; all tensors must be on one device: move it with"
        f" {name}.to(q.device)."
    )
