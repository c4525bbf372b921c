"""Packed sequences and caches by the CUDA kernels on the host emulator: see tests/emulated.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn._ops import draw_rng_state

from .cases import Inputs
from .compare import Quantities
from .emulated import Runs, arguments, array, core, tensor
from .packed import PackedProblem


def _heads_first(x: Tensor) -> Any:
    """(total, H, D) as the module takes it: (1, H, total, D), the same memory."""
    return array(x.detach().transpose(0, 1)[None])


def compute_emulated_packed(problem: PackedProblem, manual_seed: int = 0, **emulator: Any) -> tuple[Quantities, Runs]:
    """o, lse and every gradient of the packed call by the emulated kernels, and what they ran."""
    rng_state = None
    if problem.kwargs.get("dropout_p"):
        torch.manual_seed(manual_seed)
        rng_state = draw_rng_state()
    inputs = Inputs(problem.q, problem.k, problem.v, problem.d_o, problem.d_lse, problem.kwargs)
    kwargs = arguments(inputs, rng_state)
    kwargs["cu_seqlens_q"], kwargs["cu_seqlens_k"] = (x.numpy() for x in problem.cu_seqlens)
    kwargs["max_seqlens"] = [problem.case.padded.Lq, problem.case.padded.Lk]
    q, k, v, d_o = (_heads_first(x) for x in (problem.q, problem.k, problem.v, problem.d_o))
    forward = core.emulated_attention_forward(q, k, v, emulator=emulator, **kwargs)
    backward = core.emulated_attention_backward(
        d_o, q, k, v, forward, d_lse=problem.d_lse.numpy(), emulator=emulator, **kwargs
    )
    found = {name: tensor(x[name])[0].transpose(0, 1) for x, name in [(forward, "o")]}
    found |= {name: tensor(backward[name])[0].transpose(0, 1) for name in ("dq", "dk", "dv")}
    found["lse"] = tensor(forward["lse"])[0]
    bias = problem.kwargs.get("bias")
    if bias is not None:
        found["dbias"] = tensor(backward["d_bias"]).view(bias.shape).to(bias.dtype)
    if problem.kwargs.get("sinks") is not None:
        found["dsinks"] = tensor(backward["d_sinks"])
    return found, {"forward": forward["run"], "backward": backward["run"]}
