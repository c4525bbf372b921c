"""The compiled operators: loading them, and what their registrations and their calls share.

``torch.ops.fastattn.attention_forward`` and its siblings are ordinary torch operators. The shape rules and gradients of
each are registered in the file of the public function that calls it: ``_attention.py``, ``_additive.py``, ``_hard.py``
and ``_summary.py``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastattn import _cuda, _errors, _requirements, _vmap
from fastattn._autograd import Tensors

_LIBRARY = Path(__file__).with_name("_C_cpu.so")

# A level forced on the CPU kernels: baseline, avx2, avx512 or avx512_bf16; on 64-bit ARM baseline, neon or neon_bf16.
CAPABILITY_VARIABLE = "FASTATTN_CPU_CAPABILITY"


def _load() -> None:
    _requirements.load_library(_LIBRARY)
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


# --- Shape rules ------------------------------------------------------------------------------------------------------


def empty_rows_like(like: Tensor, B: int, H: int, L: int, D: int) -> Tensor:
    """A result (B, H, L, D) laid out as ``like``; empty_rows_like in csrc/torch/inputs.cpp says the same."""
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    if guard_or_false(like.stride(1) < like.stride(2)):
        return like.new_empty((B, L, H, D)).transpose(1, 2)
    return like.new_empty((B, H, L, D))


def empty_packed_like(like: Tensor, total: int, H: int, D: int) -> Tensor:
    """A result (total, H, D) laid out as ``like``; empty_rows_like in csrc/torch/inputs.cpp says the same."""
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    if guard_or_false(like.stride(1) > like.stride(0)):
        return like.new_empty((H, total, D)).transpose(0, 1)
    return like.new_empty((total, H, D))


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
        _errors.raise_explained(error, stand_ins, {})


@torch.library.register_fake("fastattn::dropout_mask")
def _dropout_mask_fake(rng_state: Tensor, B: int, H: int, Lq: int, Lk: int, p: float) -> Tensor:
    return rng_state.new_empty((B, H, Lq, Lk), dtype=torch.bool)


_vmap.register(torch.ops.fastattn.dropout_mask.default, _vmap.one_by_one)


# --- What the references in plain torch operations take ---------------------------------------------------------------


def required(tensors: Tensors, *names: str) -> tuple[Tensor, ...]:
    """These tensors, which every call has."""
    found = tuple(x for name in names if (x := tensors[name]) is not None)
    assert len(found) == len(names)
    return found


def reference_mask(
    tensors: Tensors, causal: int, window_left: int = UNLIMITED, window_right: int = UNLIMITED
) -> dict[str, Any]:
    """fastattn.reference's arguments for what the operators' arguments hide."""
    k, kv_lengths = tensors["k"], tensors.get("kv_lengths")
    if k is not None and kv_lengths is not None and kv_lengths.is_cuda:
        kv_lengths = kv_lengths.clamp(0, k.shape[2])  # as the kernels do, for nobody has checked them
    sides = tuple(None if side == UNLIMITED else side for side in (window_left, window_right))
    return {"causal": _CAUSAL_NAMES[causal], "window": sides, "mask": tensors["mask"], "kv_lengths": kv_lengths}


def reference_dropout(
    tensors: Tensors, dropout_p: float, sizes: tuple[int, int, int, int] | None = None
) -> dict[str, Any]:
    """fastattn.reference's arguments for the dropout that the operators' arguments ask for.

    ``sizes`` are (B, Hq, Lq, Lk), where they are not those of a padded batch q and k.
    """
    if dropout_p <= 0.0:
        return {}
    q, k = required(tensors, "q", "k")
    B, Hq, Lq, Lk = (*q.shape[:3], k.shape[2]) if sizes is None else sizes
    keep = torch.ops.fastattn.dropout_mask(tensors["rng_state"], B, Hq, Lq, Lk, dropout_p)
    return {"dropout_p": dropout_p, "dropout_keep": keep}


# --- Random numbers ---------------------------------------------------------------------------------------------------


def draw_rng_state(device: torch.device | str = "cpu", generator: torch.Generator | None = None) -> Tensor:
    """(seed, offset) for one call's random numbers, int64, from the device's generator, and in its memory.

    On a GPU the host never learns them, which would mean to wait, and the replay of a captured graph draws new ones.
    """
    return torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=device, generator=generator)
