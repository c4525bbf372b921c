"""What the modules refuse: sizes and probabilities in a constructor, features, devices and dtypes in a call."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor


def check_sizes(**sizes: Any) -> None:
    """Refuses sizes that are no integers of at least 1."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, Integral):
            raise TypeError(f"fastattn: {name} is a {type(size).__name__}; it must be an int.")
        if int(size) < 1:
            raise ValueError(f"fastattn: {name} is {size}; it must be at least 1.")


def check_dropout(dropout: Any) -> None:
    """Refuses what is no probability."""
    if not isinstance(dropout, Real):
        raise TypeError(f"fastattn: dropout is a {type(dropout).__name__}; it must be a float.")
    if not 0.0 <= float(dropout) <= 1.0:
        raise ValueError(f"fastattn: dropout is {dropout}; it is a probability and must lie in [0, 1].")


def check_heads(name: str, features: int, num_heads: int) -> None:
    """Refuses features that the heads cannot share."""
    if features % num_heads:
        raise ValueError(
            f"fastattn: {name} is {features} and num_heads {num_heads}; each head takes an equal part: {name} must be a"
            " multiple of num_heads."
        )


def check_features(name: str, x: Tensor, features: int) -> None:
    """Refuses an input of another number of features than the module was constructed for."""
    if x.size(-1) != features:
        raise ValueError(
            f"fastattn: {name} has {x.size(-1)} features but the module was constructed for {features}; the last"
            f" dimension of {name} must be {features}."
        )


def check_like_module(name: str, x: Tensor, parameter: Tensor) -> None:
    """Refuses an input on another device than a parameter of the module, or, without autocast, of another dtype."""
    if x.device != parameter.device:
        raise ValueError(
            f"fastattn: {name} is on {x.device} but the module is on {parameter.device}; move it with"
            f" {name}.to({str(parameter.device)!r}), or the module."
        )
    if x.dtype != parameter.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(
            f"fastattn: {name} is {x.dtype} but the module is {parameter.dtype}; they must agree: convert with"
            f" {name}.to({parameter.dtype}), or the module."
        )
