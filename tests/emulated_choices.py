"""Hard attention and the summary of attention by the CUDA kernels on the host emulator: see emulated.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .cases import Inputs
from .choices import Choice
from .compare import Quantities
from .emulated import Runs, arguments, array, core, tensor

RNG_STATE = (0x1234_5678_9ABC_DEF0, 0x77)
FORWARD = ("o", "index", "log_prob", "row_max", "row_sum")
BACKWARD = ("dq", "dk", "dv")
SUMMARY = ("entropy", "max_weight", "top_weights", "top_index", "key_mass", "lse", "row_max", "row_sum")


def hard_forward(inputs: Inputs, rng_state: tuple[int, int] | None, **emulator: Any) -> tuple[dict[str, Any], Choice]:
    kwargs = arguments(inputs, torch.tensor(rng_state) if rng_state else None)
    q, k, v = (array(x) for x in (inputs.q, inputs.k, inputs.v))
    results = core.emulated_hard_attention_forward(
        q, k, v, is_sampled=rng_state is not None, emulator=emulator, **kwargs
    )
    return results, Choice(*(tensor(results[name]) for name in ("index", "o", "log_prob")))


def hard_backward(
    inputs: Inputs, results: dict[str, Any], *, d_o: bool = True, d_log_prob: bool = True, **emulator: Any
) -> dict[str, Any]:
    q, k, v = (array(x) for x in (inputs.q, inputs.k, inputs.v))
    return core.emulated_hard_attention_backward(
        q,
        k,
        v,
        results,
        d_o=array(inputs.d_o) if d_o else None,
        d_log_prob=inputs.d_lse.numpy() if d_log_prob else None,
        emulator=emulator,
        **arguments(inputs, None),
    )


def compute_hard(
    inputs: Inputs, rng_state: tuple[int, int] | None = RNG_STATE, **emulator: Any
) -> tuple[Quantities, Runs]:
    """Everything that a forward and a backward call write, and what they ran."""
    results, _ = hard_forward(inputs, rng_state, **emulator)
    gradients = hard_backward(inputs, results, **emulator)
    found = {name: tensor(results[name]) for name in FORWARD} | {name: tensor(gradients[name]) for name in BACKWARD}
    return found, {"forward": results["run"], "backward": gradients["run"]}


def compute_summary(
    inputs: Inputs, *, top_k: int = 8, key_mass: bool = True, rows: Tensor | None = None, **emulator: Any
) -> tuple[Quantities, Runs]:
    """Everything that is written, and what ran."""
    results = core.emulated_attention_summary(
        array(inputs.q),
        array(inputs.k),
        top_k=top_k,
        key_mass=key_mass,
        row_mask=None if rows is None else rows.numpy(),
        emulator=emulator,
        **arguments(inputs, None),
    )
    found = {name: tensor(results[name]) for name in SUMMARY if name in results}
    return found, {"forward": results["run"]}
