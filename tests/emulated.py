"""Cases computed by the CUDA kernels on the host emulator: the counterpart of tests/compare.py's compute()."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastattn._ops import draw_rng_state

from .cases import Case, Inputs
from .compare import Quantities
from .core_module import load_core

core = load_core()

Runs = dict[str, dict[str, Any]]  # of a "forward" and a "backward" call, what the emulator reports

MAX_HEAD_DIM = 256  # what the CUDA kernels serve
NEVER_SPLIT = 0  # multiprocessors of an emulated device that any problem fills
MANY_MULTIPROCESSORS = 64  # of an emulated device on which these small problems split their keys


def is_served(case: Case) -> bool:
    return max(case.D, case.value_dim) <= MAX_HEAD_DIM


def array(x: Tensor) -> Any:
    """The tensor's memory as a NumPy array, bfloat16 as uint16; rows that are not contiguous are copied."""
    x = x.detach()
    if x.dim() == 4 and x.dtype.is_floating_point and x.stride(3) != 1 and x.shape[3] > 1:
        x = x.contiguous()
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def tensor(x: Any) -> Tensor:
    return torch.from_numpy(x).view(torch.bfloat16) if x.dtype == np.uint16 else torch.from_numpy(x)


def _four_dimensional(x: Tensor) -> Tensor:
    return x.detach().view((1,) * (4 - x.dim()) + x.shape)


def arguments(inputs: Inputs, rng_state: Tensor | None) -> dict[str, Any]:
    """The keyword arguments of fastattn.attention as _fastattn_core takes them."""
    given = inputs.kwargs
    window = given.get("window") or (None, None)
    kwargs: dict[str, Any] = {
        "causal": {False: "none", True: "bottom_right"}.get(given.get("causal", False), given.get("causal")),
        "window": [-1 if side is None else side for side in window],
    }
    for name in ("scale", "softcap", "dropout_p"):
        if given.get(name) is not None:
            kwargs[name] = given[name]
    if given.get("bias") is not None:
        bias = _four_dimensional(given["bias"])
        kwargs["bias"] = (bias.view(torch.uint16) if bias.dtype == torch.bfloat16 else bias).numpy()
    if given.get("mask") is not None:
        kwargs["mask"] = _four_dimensional(given["mask"]).numpy()
    for name in ("alibi_slopes", "sinks", "kv_lengths"):
        if given.get(name) is not None:
            kwargs[name] = given[name].detach().numpy()
    if rng_state is not None:
        kwargs["seed"], kwargs["offset"] = (int(x) for x in rng_state)
    return kwargs


def compute_emulated(inputs: Inputs, manual_seed: int = 0, **emulator: Any) -> tuple[Quantities, Runs]:
    """o, lse and every gradient by the emulated kernels, and what they ran."""
    rng_state = None
    if inputs.kwargs.get("dropout_p"):
        torch.manual_seed(manual_seed)
        rng_state = draw_rng_state()
    kwargs = arguments(inputs, rng_state)
    q, k, v, d_o = (array(x) for x in (inputs.q, inputs.k, inputs.v, inputs.d_o))
    forward = core.emulated_attention_forward(q, k, v, emulator=emulator, **kwargs)
    backward = core.emulated_attention_backward(
        d_o, q, k, v, forward, d_lse=inputs.d_lse.numpy(), emulator=emulator, **kwargs
    )
    found = {"o": tensor(forward["o"]), "lse": tensor(forward["lse"])}
    found |= {name: tensor(backward[name]) for name in ("dq", "dk", "dv")}
    bias = inputs.kwargs.get("bias")
    if bias is not None:
        # As the binding does: summed in float32, rounded once.
        found["dbias"] = tensor(backward["d_bias"]).view(bias.shape).to(bias.dtype)
    if inputs.kwargs.get("sinks") is not None:
        found["dsinks"] = tensor(backward["d_sinks"])
    return found, {"forward": forward["run"], "backward": backward["run"]}
