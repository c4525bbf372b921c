"""The implementations that are timed: fastattn, PyTorch's SDPA, and what else there is for the job's device: on a CPU
other libraries' attention kernels where installed, on a GPU each of SDPA's backends and FlexAttention.

Each is prepared outside the clock, in the form that suits it best: its own memory layout, compiled, masks in the form
it takes. What it cannot do raises Unsupported with the reason.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import itertools
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
from bench.cases import Job, interval_mask
from bench.timing import Runner
from tests.cases import Case, Inputs

BASELINE = "sdpa"
OURS = "fastattn"
MATH_SCORES_LIMIT_BYTES = {"cpu": 1 << 30, "cuda": 4 << 30}  # SDPA's math backend keeps several such matrices
NOT_IN_SDPA = ("softcap", "alibi", "sinks", "kv_lengths")


class Unsupported(Exception):
    """This implementation cannot do this job; the message says why."""


@dataclass(frozen=True)
class Prepared:
    runner: Runner
    results: Callable[[], tuple[Tensor, ...]]  # (o,) of a forward job, else (dq, dk, dv)


@dataclass(frozen=True)
class Peer:
    name: str
    title: str
    prepare: Callable[[Job, Inputs], Prepared]
    needs: tuple[str, ...] = ()  # modules
    compiles: bool = False  # for seconds per job
    devices: tuple[str, ...] = ("cpu",)

    def missing(self) -> list[str]:
        return [module for module in self.needs if importlib.util.find_spec(module) is None]

    def version(self) -> str:
        return importlib.metadata.version(self.needs[0] if self.needs else "torch")


# ----------------------------------------------------------------------------------------------- PyTorch functions


def prepare_function(
    name: str,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    job: Job,
    inputs: Inputs,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Prepared:
    """A differentiable function of (q, k, v) - and of the bias, where that is wanted - run in the job's direction."""
    wants_grad = job.direction != "forward"
    q, k, v = (x.detach().requires_grad_(wants_grad) for x in (inputs.q, inputs.k, inputs.v))
    # `attend` knows the bias by itself.
    variables = (q, k, v, inputs.kwargs["bias"].requires_grad_()) if job.bias_gradient else (q, k, v)
    return prepare_direction(name, lambda: (attend(q, k, v),), variables, (inputs.d_o,), job.direction, context)


def prepare_direction(
    name: str,
    forward: Callable[[], tuple[Tensor, ...]],
    variables: Sequence[Tensor],
    d_outputs: Sequence[Tensor],
    direction: str,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Prepared:
    """A differentiable computation on `variables`, run in a direction. As many of its results, the first ones, as there
    are `d_outputs` are differentiated.
    """
    differentiable = len(d_outputs)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward()[:differentiable], variables, d_outputs)

    if direction == "forward":

        def without_grad() -> AbstractContextManager[Any]:
            stack = ExitStack()
            stack.enter_context(context())
            stack.enter_context(torch.no_grad())
            return stack

        runner = Runner(name, forward, without_grad)
    elif direction == "backward":
        with context():
            outputs = forward()[:differentiable]
        runner = Runner(name, lambda: torch.autograd.grad(outputs, variables, d_outputs, retain_graph=True), context)
    else:
        runner = Runner(name, step, context)

    def results() -> tuple[Tensor, ...]:
        with runner.context():
            return runner.call()

    return Prepared(runner, results)


def sdpa_arguments(case: Case, inputs: Inputs) -> dict[str, Any]:
    """What F.scaled_dot_product_attention needs beside q, k and v: a window becomes a mask, its only form for one."""
    unknown = [feature for feature in NOT_IN_SDPA if getattr(case, feature)]
    if unknown or case.dropout_p:
        raise Unsupported(f"SDPA has no {' and no '.join(unknown or ['repeatable dropout'])}")
    mask, bias = inputs.kwargs.get("mask"), inputs.kwargs.get("bias")
    is_causal = case.causal == "top_left" or (bool(case.causal) and case.Lq == case.Lk)
    if case.window or (case.causal and not is_causal):
        interval = interval_mask(case).to(inputs.q.device)
        mask, is_causal = interval if mask is None else mask & interval, False
    if bias is not None and mask is not None:
        mask = bias.masked_fill(~mask, float("-inf"))
    elif bias is not None:
        mask = bias
    arguments = {"attn_mask": mask, "is_causal": is_causal, "scale": case.scale, "enable_gqa": case.gqa > 1}
    return {name: value for name, value in arguments.items() if value is not None and value is not False}


def prepare_fastattn(job: Job, inputs: Inputs) -> Prepared:
    """Through the SDPA-compatible function where it can express the case, else through fastattn.attention."""
    case = job.case
    if case.window or case.causal == "bottom_right" or any(getattr(case, feature) for feature in NOT_IN_SDPA):
        kwargs = inputs.kwargs
        return prepare_function(OURS, lambda q, k, v: fastattn.attention(q, k, v, **kwargs), job, inputs)
    arguments = sdpa_arguments(case, inputs)
    ours = fastattn.scaled_dot_product_attention
    return prepare_function(OURS, lambda q, k, v: ours(q, k, v, **arguments), job, inputs)


def prepare_sdpa(job: Job, inputs: Inputs) -> Prepared:
    arguments = sdpa_arguments(job.case, inputs)
    sdpa = F.scaled_dot_product_attention
    return prepare_function(BASELINE, lambda q, k, v: sdpa(q, k, v, **arguments), job, inputs)


def prepare_backend(name: str, backend: SDPBackend, job: Job, inputs: Inputs) -> Prepared:
    """SDPA with one of its backends, and no other to fall back to."""
    arguments = sdpa_arguments(job.case, inputs)
    sdpa = F.scaled_dot_product_attention

    def only_this() -> AbstractContextManager[Any]:
        return sdpa_kernel(backend)

    return prepare_function(name, lambda q, k, v: sdpa(q, k, v, **arguments), job, inputs, only_this)


def prepare_math(job: Job, inputs: Inputs) -> Prepared:
    case, limit = job.case, MATH_SCORES_LIMIT_BYTES[job.device]
    if 4 * case.B * case.Hq * case.Lq * case.Lk > limit:
        raise Unsupported(f"its score matrix would exceed {limit >> 30} GiB")
    return prepare_backend("math", SDPBackend.MATH, job, inputs)


def _backend(name: str, backend: SDPBackend) -> Callable[[Job, Inputs], Prepared]:
    """One of the fused backends, tried at once: where it does not serve, SDPA's own warnings say why."""

    def prepare(job: Job, inputs: Inputs) -> Prepared:
        prepared = None
        with warnings.catch_warnings(record=True) as reasons:
            warnings.simplefilter("always")
            try:
                prepared = prepare_backend(name, backend, job, inputs)
                prepared.results()
            except RuntimeError as refusal:
                if not any(words in str(refusal) for words in ("No available kernel", "No viable backend")):
                    raise
                raise Unsupported(why_refused(backend, [str(reason.message) for reason in reasons])) from None
        return prepared

    return prepare


_REFUSALS = {
    SDPBackend.FLASH_ATTENTION: "flash attention kernel not used because",
    SDPBackend.CUDNN_ATTENTION: "cudnn attention kernel not used because",
    SDPBackend.EFFICIENT_ATTENTION: "memory efficient kernel not used because",
}


def why_refused(backend: SDPBackend, warned: list[str]) -> str:
    """From what SDPA warns of when it finds no backend: a heading for each of them, and its first reason."""
    lines = [text.partition(" (Triggered internally")[0].strip() for text in warned]
    for heading, reason in itertools.pairwise(lines):
        if heading.lower().startswith(_REFUSALS[backend]) and " not used because" not in reason:
            return f"not served: {reason}"
    return "not served"


def prepare_flex(job: Job, inputs: Inputs) -> Prepared:
    import torch._functorch.config as functorch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # A backward pass that may overwrite what the forward pass saved refuses to run a second time, as timing has it do.
    if hasattr(functorch, "donated_buffer"):
        functorch.donated_buffer = False
    case, device = job.case, job.device
    if job.direction != "forward" and device == "cpu":
        raise Unsupported("FlexAttention on CPU has no backward")
    if case.bias is not None and device == "cpu":
        raise Unsupported("a bias given as a tensor is not tried with FlexAttention on CPU")
    arguments = sdpa_arguments(case, inputs)
    keep, bias = (
        None if x is None else x.reshape((1,) * (4 - x.dim()) + x.shape)
        for x in (inputs.kwargs.get("mask"), inputs.kwargs.get("bias"))
    )
    offset = 0 if case.causal == "top_left" else case.Lk - case.Lq
    left, right = case.window or (None, None)
    right = 0 if case.causal else right

    def pick(x: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        where = (index if size > 1 else 0 for index, size in zip((b, h, i, j), x.shape, strict=True))
        return x[tuple(where)]

    def see(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Comparisons of indices where they will do, as its users would write it."""
        seen = i >= i
        if left is not None:
            seen = seen & (j >= i + (offset - left))
        if right is not None:
            seen = seen & (j <= i + (offset + right))
        return seen if keep is None else seen & pick(keep, b, h, i, j)

    def add_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        assert bias is not None
        return score + pick(bias, b, h, i, j)

    block_mask = None
    if left is not None or right is not None or keep is not None:
        B = case.B if keep is not None and keep.shape[0] > 1 else None
        H = case.Hq if keep is not None and keep.shape[1] > 1 else None
        block_mask = create_block_mask(see, B, H, case.Lq, case.Lk, device=device)
    torch.compiler.reset()  # else the limit on recompilations is reached after a few cases
    compiled = torch.compile(flex_attention, dynamic=False)
    options: dict[str, Any] = {
        "block_mask": block_mask,
        "enable_gqa": bool(arguments.get("enable_gqa")),
        "scale": case.scale,
    }
    score_mod = None if bias is None else add_bias
    return prepare_function("flex", lambda q, k, v: compiled(q, k, v, score_mod, **options), job, inputs)


# -------------------------------------------------------------------------------------------------- other libraries


def _forward_only(job: Job, name: str, dtypes: tuple[str, ...]) -> None:
    if job.direction != "forward":
        raise Unsupported(f"{name} has no backward")
    if job.dtype not in dtypes:
        raise Unsupported(f"{name} has no {job.dtype} attention on CPU")


def _float_mask(case: Case, inputs: Inputs) -> Tensor | None:
    """Whatever the case hides or adds, without is_causal, as one float32 (B|1, H|1, Lq, Lk) to add to the scores."""
    mask = sdpa_arguments(case, inputs).get("attn_mask")
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -1e9)
    mask = mask.float().reshape((1,) * (4 - mask.dim()) + mask.shape)
    return mask.expand(*mask.shape[:2], case.Lq, case.Lk).contiguous()


def prepare_onnxruntime(job: Job, inputs: Inputs) -> Prepared:
    onnxruntime, onnx = (importlib.import_module(module) for module in ("onnxruntime", "onnx"))
    helper, FLOAT = onnx.helper, onnx.TensorProto.FLOAT

    _forward_only(job, "onnxruntime", ("float32",))
    case = job.case
    if case.gqa > 1:
        raise Unsupported("MultiHeadAttention has no grouped heads")
    mask = _float_mask(case, inputs)
    is_causal = bool(case.causal) and not case.window

    def in_rows(x: Tensor) -> np.ndarray:  # (B, L, H * D), the operator's own layout
        return np.ascontiguousarray(x.transpose(1, 2).flatten(2).numpy())

    feeds = {"query": in_rows(inputs.q), "key": in_rows(inputs.k), "value": in_rows(inputs.v)}
    names = list(feeds)
    if mask is not None:
        feeds["attention_bias"] = mask.numpy()
        names += ["", "", "attention_bias"]  # no bias of projections, no key padding mask
    out_shape = (case.B, case.Lq, case.Hq * case.value_dim)
    node = helper.make_node(
        "MultiHeadAttention", names, ["o"], domain="com.microsoft", num_heads=case.Hq, unidirectional=int(is_causal)
    )
    graph = helper.make_graph(
        [node],
        "attention",
        [helper.make_tensor_value_info(name, FLOAT, x.shape) for name, x in feeds.items()],
        [helper.make_tensor_value_info("o", FLOAT, out_shape)],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # or its threads slow the next in turn
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(x) for name, x in feeds.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    o = onnxruntime.OrtValue.ortvalue_from_shape_and_type(out_shape, np.float32)
    binding.bind_ortvalue_output("o", o)

    def call() -> None:
        session.run_with_iobinding(binding)

    def results() -> tuple[Tensor, ...]:
        call()
        return (torch.from_numpy(o.numpy()).unflatten(2, (case.Hq, case.value_dim)).transpose(1, 2),)

    return Prepared(Runner("onnxruntime", call), results)


def prepare_openvino(job: Job, inputs: Inputs) -> Prepared:
    ov, opset13 = (importlib.import_module(module) for module in ("openvino", "openvino.opset13"))

    _forward_only(job, "OpenVINO", ("float32", "bfloat16"))
    case = job.case
    if case.gqa > 1:
        raise Unsupported("ScaledDotProductAttention has no grouped heads")
    element = ov.Type.f32 if job.dtype == "float32" else ov.Type.bf16
    mask = _float_mask(case, inputs)
    is_causal = bool(case.causal) and not case.window
    if is_causal and mask is not None:
        raise Unsupported("ScaledDotProductAttention takes causal or a mask, not both")

    def shared(x: Tensor) -> Any:  # the same memory; NumPy has no bfloat16, hence the detour over its bits
        x = x.contiguous()
        if x.dtype == torch.bfloat16:
            return ov.Tensor(x.view(torch.int16).numpy(), ov.Shape(list(x.shape)), ov.Type.bf16)
        return ov.Tensor(x.numpy(), shared_memory=True)

    operands = [inputs.q.contiguous(), inputs.k.contiguous(), inputs.v.contiguous()]
    if mask is not None:
        operands.append(mask.to(operands[0].dtype))
    tensors = [shared(x) for x in operands]
    parameters = [opset13.parameter(list(x.shape), element) for x in operands]
    node = opset13.scaled_dot_product_attention(*parameters, causal=is_causal)
    model = ov.Model([node], parameters, "attention")
    config = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32" if job.dtype == "float32" else "bf16",
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = ov.Core().compile_model(model, "CPU", config).create_infer_request()
    for index, tensor in enumerate(tensors):
        request.set_input_tensor(index, tensor)
    o = torch.empty(case.B, case.Hq, case.Lq, case.value_dim, dtype=operands[0].dtype)
    if job.dtype == "float32":
        request.set_output_tensor(0, shared(o))

    def call(_alive: object = operands) -> None:  # the request shares the operands' memory
        request.infer()

    def results() -> tuple[Tensor, ...]:
        call()
        if job.dtype == "float32":
            return (o,)
        bits = np.frombuffer(request.get_output_tensor(0).data.tobytes(), dtype=np.int16).copy()
        return (torch.from_numpy(bits).view(torch.bfloat16).reshape(o.shape),)

    return Prepared(Runner("openvino", call), results)


def prepare_zentorch(job: Job, inputs: Inputs) -> Prepared:
    os.environ.setdefault("ZENTORCH_PY_LOG_LEVEL", "ERROR")
    importlib.import_module("zentorch")  # registers torch.ops.zentorch

    _forward_only(job, "zentorch", ("float32", "bfloat16"))
    if job.case.gqa > 1:
        raise Unsupported("zentorch_sdpa has no grouped heads")
    arguments = sdpa_arguments(job.case, inputs)
    mask, is_causal = arguments.get("attn_mask"), bool(arguments.get("is_causal"))
    if mask is not None:
        mask = _float_mask(job.case, inputs)
        assert mask is not None
        mask = mask.to(inputs.q.dtype)
    op = torch.ops.zentorch.zentorch_sdpa
    return prepare_function(
        "zentorch", lambda q, k, v: op(q, k, v, 0.0, is_causal, attn_mask=mask, scale=job.case.scale)[0], job, inputs
    )


BOTH = ("cpu", "cuda")

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(OURS, "fastattn", prepare_fastattn, devices=BOTH),
        Peer(BASELINE, "PyTorch SDPA", prepare_sdpa, devices=BOTH),
        Peer("flash", "SDPA, flash backend", _backend("flash", SDPBackend.FLASH_ATTENTION), devices=("cuda",)),
        Peer("cudnn", "SDPA, cuDNN backend", _backend("cudnn", SDPBackend.CUDNN_ATTENTION), devices=("cuda",)),
        Peer(
            "efficient",
            "SDPA, efficient backend",
            _backend("efficient", SDPBackend.EFFICIENT_ATTENTION),
            devices=("cuda",),
        ),
        Peer("math", "SDPA, math backend", prepare_math, devices=BOTH),
        Peer("flex", "FlexAttention, compiled", prepare_flex, compiles=True, devices=BOTH),
        Peer("onnxruntime", "onnxruntime MultiHeadAttention", prepare_onnxruntime, ("onnxruntime", "onnx")),
        Peer("openvino", "OpenVINO SDPA", prepare_openvino, ("openvino",)),
        Peer("zentorch", "zentorch SDPA", prepare_zentorch, ("zentorch",)),
    )
}


def choose(names: list[str] | None, device: str = "cpu") -> tuple[list[Peer], list[str]]:
    """The peers to time beside ours on a device, and a note for each that was asked for and is not installed.

    None: SDPA, its math backend and whatever is installed. An empty list: all, with notes. Else those named.
    """
    there = {name: peer for name, peer in PEERS.items() if device in peer.devices}
    wanted = names or list(there)
    unknown = sorted(set(wanted) - set(there))
    if unknown:
        raise ValueError(f"unknown peers {', '.join(unknown)}; there are {', '.join(there)}")
    chosen, notes = [], []
    for name, peer in there.items():
        if name not in wanted and name not in (OURS, BASELINE):
            continue
        missing = peer.missing()
        if not missing:
            chosen.append(peer)
        elif names is not None:
            notes.append(f"{peer.title}: not installed (needs {', '.join(missing)})")
    return chosen, notes
