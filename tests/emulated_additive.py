"""Additive attention computed by the CUDA kernels on the host emulator: the counterpart of additive.py's
compute_additive().
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .additive import AdditiveInputs, Quantities
from .emulated import Runs, array, core, tensor

SEED, OFFSET = 3, 4  # of dropout


def dropout_keep(inputs: AdditiveInputs) -> Tensor | None:
    """What the emulated kernels keep of the weights; None without dropout."""
    p = inputs.kwargs.get("dropout_p")
    if not p:
        return None
    return torch.from_numpy(core.dropout_mask(SEED, OFFSET, *inputs.q.shape[:3], inputs.k.shape[2], p))


def compute_emulated_additive(inputs: AdditiveInputs, **emulator: Any) -> tuple[Quantities, Runs]:
    """o, lse and every gradient, and what was run."""
    given = inputs.kwargs
    causal = given.get("causal", False)
    kwargs: dict[str, Any] = {"causal": causal or "none", "w": array(inputs.w)}
    for name in ("mask", "kv_lengths"):
        if name in given:
            kwargs[name] = given[name].numpy()
    if "dropout_p" in given:
        kwargs |= {"dropout_p": given["dropout_p"], "seed": SEED, "offset": OFFSET}
    q, k, v, d_o = (array(x) for x in (inputs.q, inputs.k, inputs.v, inputs.d_o))
    forward = core.emulated_attention_forward(q, k, v, emulator=emulator, **kwargs)
    backward = core.emulated_attention_backward(
        d_o, q, k, v, forward, d_lse=inputs.d_lse.numpy(), emulator=emulator, **kwargs
    )
    found = {name: tensor(forward[name]) for name in ("o", "lse")}
    found |= {name: tensor(backward[name]) for name in ("dq", "dk", "dv", "dw")}
    return found, {"forward": forward["run"], "backward": backward["run"]}
