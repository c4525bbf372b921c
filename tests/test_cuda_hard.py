"""Hard attention on a GPU, through the public function: the definition with the same noise, the CPU's draw, gradients,
streams and graphs. Nothing here runs without a GPU; the same kernels run in test_emulator_hard.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn._ops import draw_rng_state

from .cases import Case, Inputs, make_inputs
from .choices import HARD_CASES, Choice, hard_quantities, score_error, violations, wrong_choices
from .gpu import DEVICE, moved_inputs, seeds_of_the_cpu
from .gpu_checks import (
    each_dtype,
    first_device,  # noqa: F401  it applies to every test here
)

LARGE = [
    Case(1100, 1300, D=128, B=2, Hkv=2, gqa=2, causal="bottom_right"),
    Case(1, 20000, D=64, Hkv=4, gqa=2),  # keys split over the device
    Case(17, 19, D=32, B=70000, Hkv=1),  # more blocks than a grid has along y
]


def compute(inputs: Inputs, mode: str) -> tuple[Choice, dict[str, Tensor]]:
    """The choice, log_prob and all gradients, on the CPU; drawn as the CPU draws after manual_seed(0)."""
    torch.manual_seed(0)
    q, k, v = (x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    with seeds_of_the_cpu():
        out = fastattn.hard_attention(q, k, v, mode=mode, **inputs.kwargs)
    grads = torch.autograd.grad([out.output, out.log_prob], (q, k, v), [inputs.d_o, inputs.d_lse])
    got = {"log_prob": out.log_prob.detach()} | dict(zip(("dq", "dk", "dv"), grads, strict=True))
    choice = Choice(out.index.cpu(), out.output.detach().cpu(), out.log_prob.detach().cpu())
    return choice, {name: x.cpu() for name, x in got.items()}


def state_drawn() -> tuple[int, int]:
    torch.manual_seed(0)
    first, second = (int(x) for x in draw_rng_state())
    return first, second


@each_dtype
@pytest.mark.parametrize("case", [*HARD_CASES, LARGE[0]], ids=lambda case: case.id)
def test_parity(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    for mode in ("sample", "argmax"):
        choice, got = compute(moved_inputs(inputs), mode)
        wrong = wrong_choices(inputs, choice, state_drawn() if mode == "sample" else None)
        exact = hard_quantities(inputs, choice.index, torch.float64)
        plain = hard_quantities(inputs, choice.index, dtype)
        wrong += violations(got, exact, plain, 2 * score_error(inputs))
        assert not wrong, "\n".join([f"{case.id} in {dtype}, {mode}:", *wrong])


@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.id)
def test_the_draw_is_the_cpus(case: Case) -> None:
    inputs = make_inputs(case, torch.bfloat16)
    fast, got = compute(moved_inputs(inputs), "sample")
    slow, wanted = compute(inputs, "sample")
    same = fast.index == slow.index
    assert same.double().mean() > 0.99
    assert torch.equal(fast.o[same], slow.o[same])
    torch.testing.assert_close(fast.log_prob[same], slow.log_prob[same], rtol=1e-4, atol=1e-4)
    if same.all():
        for name, x in wanted.items():
            torch.testing.assert_close(got[name].float(), x.float(), rtol=2e-2, atol=2e-2)


def test_repeats_are_equal_to_the_bit() -> None:
    inputs = moved_inputs(make_inputs(Case(700, 900, D=64, B=2, Hkv=2, gqa=2, causal="bottom_right"), torch.bfloat16))
    first, wanted = compute(inputs, "sample")
    for _ in range(20):
        again, got = compute(inputs, "sample")
        assert torch.equal(again.index, first.index)
        for name, x in wanted.items():
            assert torch.equal(got[name], x), name


def test_straight_through_has_the_soft_gradient() -> None:
    inputs = make_inputs(Case(70, 131, D=32, B=2, gqa=2), torch.float32)
    found = []
    for there in (moved_inputs(inputs), inputs):
        torch.manual_seed(0)
        q, k, v = (x.detach().requires_grad_() for x in (there.q, there.k, there.v))
        with seeds_of_the_cpu():
            out = fastattn.hard_attention(q, k, v, estimator="straight_through", temperature=0.5)
        found.append([x.cpu() for x in torch.autograd.grad(out.output, (q, k, v), there.d_o)])
    for fast, slow in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)


def test_on_another_stream_and_in_a_graph() -> None:
    """A captured graph draws anew when it is replayed."""
    inputs = moved_inputs(make_inputs(Case(64, 300, D=64, B=2), torch.bfloat16))
    q, k, v = (x.detach() for x in (inputs.q, inputs.k, inputs.v))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        fastattn.hard_attention(q, k, v)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fastattn.hard_attention(q, k, v)
    draws = []
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        draws.append(out.index.clone())
        assert torch.equal(out.output, v.gather(2, out.index.unsqueeze(-1).expand(-1, -1, -1, v.shape[3])))
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[1], draws[2])


def test_padding_is_not_read() -> None:
    inputs = moved_inputs(make_inputs(Case(70, 300, D=64, B=3, kv_lengths=(300, 0, 65)), torch.bfloat16))
    _, wanted = compute(inputs, "sample")
    for b, length in enumerate((300, 0, 65)):
        inputs.k[b, :, length:] = math.nan
        inputs.v[b, :, length:] = math.nan
    _, got = compute(inputs, "sample")
    for name, x in wanted.items():
        assert torch.equal(got[name], x), name


@pytest.mark.parametrize(("change", "message"), [({"D": 300}, "300"), ({"dtype": torch.float64}, "float64")])
def test_refusals(change: dict[str, Any], message: str) -> None:
    q = torch.zeros(1, 1, 4, change.get("D", 8), dtype=change.get("dtype", torch.float32), device=DEVICE)
    with pytest.raises((ValueError, TypeError), match=message):
        fastattn.hard_attention(q, q, q)
