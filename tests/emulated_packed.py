"""Packed sequences and caches by the CUDA kernels on the host emulator: see tests/emulated.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn._ops import draw_rng_state

from .cases import Inputs
from .compare import Quantities
from .emulated import Runs, arguments, array, core, tensor
from .kv_cache_calls import Call
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


def compute_emulated_cache(call: Call, **emulator: Any) -> tuple[Quantities, list[str]]:
    """What attention_with_kv_cache does and gives, by the emulated kernels; the cache is changed in place."""
    given = call.arguments()
    k_cache, v_cache = array(call.k_cache), array(call.v_cache)
    lengths, kernels = call.lengths.numpy(), []
    cache = {name: given[name].numpy() for name in ("block_table", "k_scale", "v_scale") if given[name] is not None}
    q = array(call.q)
    if call.k is not None and call.v is not None:
        angles = {}
        if call.angles:
            angles = {"cos": array(call.angles["rotary_cos"]), "sin": array(call.angles["rotary_sin"]), "q": q}
        done = core.emulated_append_to_cache(
            array(call.k), array(call.v), k_cache, v_cache, lengths,
            interleaved=call.case.interleaved, emulator=emulator, **cache, **angles,
        )  # fmt: skip
        lengths, q = done["new_lengths"], done.get("rotated_q", q)
        kernels += done["run"]["kernels"]
    kwargs = arguments(Inputs(call.q, call.q, call.q, call.q, call.q, call.options), None)
    done = core.emulated_attention_forward(
        q, k_cache, v_cache, kv_lengths=lengths, emulator=emulator, **cache, **kwargs
    )
    return {name: tensor(done[name]) for name in ("o", "lse")}, [*kernels, *done["run"]["kernels"]]
