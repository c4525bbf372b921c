"""The gradients of fastattn.hard_attention: numerically, and those of both estimators."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import reference

from .cases import Case, make_inputs
from .hard_calls import DTYPES, FEATURES, MODES, B, Hq, Lq, qkv
from .test_parity import dtype_id


@pytest.mark.parametrize("feature", [name for name in FEATURES if name not in ("straight_through", "all")])
def test_gradcheck(feature: str) -> None:
    """log_prob and output for the index that a seed gives, which does not change in a small neighbourhood."""
    kwargs = FEATURES[feature]()

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(7)
        result = fastattn.hard_attention(q, k, v, **kwargs)
        return result.output, result.log_prob

    q, k, v = qkv()
    assert torch.autograd.gradcheck(function, (q, k, v))
    assert torch.autograd.gradgradcheck(function, (q, k, v), fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("mode", MODES)
def test_straight_through_is_the_soft_gradient(isa: str, mode: str, dtype: torch.dtype) -> None:
    """Forward the bits of reinforce; backward those of attention at that temperature; log_prob as ever."""
    case = Case(35, 70, D=16, Dv=24, B=2, gqa=2, causal="bottom_right", mask="b1qk", kv_lengths=(60, 0))
    inputs = make_inputs(case, dtype)
    tensors = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    temperature = 0.5
    results = {}
    for estimator in ("reinforce", "straight_through"):
        torch.manual_seed(3)
        results[estimator] = fastattn.hard_attention(
            *tensors, mode=mode, temperature=temperature, estimator=estimator, **inputs.kwargs
        )
    hard, through = results["reinforce"], results["straight_through"]
    assert torch.equal(hard.output, through.output)
    assert torch.equal(hard.index, through.index)
    assert torch.equal(hard.log_prob, through.log_prob)
    soft = fastattn.attention(*tensors, scale=16**-0.5 / temperature, **inputs.kwargs)
    ours = torch.autograd.grad(through.output, tensors, inputs.d_o, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(ours, torch.autograd.grad(soft, tensors, inputs.d_o), strict=True))

    # q's own gradient through log_prob: that of reinforce, and v has none.
    by_log_prob = [
        torch.autograd.grad(r.log_prob, tensors, inputs.d_lse, retain_graph=True, allow_unused=True)
        for r in (hard, through)
    ]
    assert all(torch.equal(a, b) for a, b in zip(by_log_prob[0][:2], by_log_prob[1][:2], strict=True))
    assert by_log_prob[1][2] is None
    both = torch.autograd.grad([through.output, through.log_prob], tensors, [inputs.d_o, inputs.d_lse])
    eps = torch.finfo(dtype).eps
    for one, other, total in zip(ours[:2], by_log_prob[1][:2], both[:2], strict=True):
        torch.testing.assert_close(total, one + other, atol=4 * eps, rtol=4 * eps)
    with torch.no_grad():
        torch.manual_seed(3)
        again = fastattn.hard_attention(
            *tensors, mode=mode, temperature=temperature, estimator="straight_through", **inputs.kwargs
        )
    assert torch.equal(again.output, hard.output)


def test_reinforce_output_has_a_gradient_for_v_alone() -> None:
    q, k, v = qkv()
    result = fastattn.hard_attention(q, k, v)
    dq, dk, dv = torch.autograd.grad(result.output.sin().sum(), (q, k, v), materialize_grads=True)
    assert not dq.any()
    assert not dk.any()
    wanted = torch.zeros_like(v)
    for b, h, i in itertools.product(range(B), range(Hq), range(Lq)):
        wanted[b, h // 2, result.index[b, h, i]] += result.output[b, h, i].detach().cos()
    torch.testing.assert_close(dv, wanted)
    assert not result.index.requires_grad


def test_gradients_of_some_inputs_alone() -> None:
    for chosen, estimator in itertools.product(((0,), (1,), (2,), (0, 2)), ("reinforce", "straight_through")):
        grads = []
        for needed in (chosen, (0, 1, 2)):
            torch.manual_seed(0)
            tensors = [x.requires_grad_(i in needed) for i, x in enumerate(qkv(grad=False))]
            result = fastattn.hard_attention(*tensors, estimator=estimator)
            loss = result.output.sin().sum() + result.log_prob.cos().sum()
            grads.append(torch.autograd.grad(loss, [tensors[i] for i in chosen]))
        torch.testing.assert_close(*grads)


def test_reinforce_is_unbiased(isa: str) -> None:
    """The mean of reward * d log_prob over draws is the gradient of the expected reward, within 5 standard errors."""
    draws, keys = 20000, 6
    q = torch.randn(1, 1, 1, 8)
    rows, k = q.repeat(1, 1, draws, 1).requires_grad_(), torch.randn(1, 1, keys, 8)
    reward = torch.randn(keys)
    result = fastattn.hard_attention(rows, k, reward.view(1, 1, keys, 1), temperature=0.8)
    assert torch.equal(result.output.flatten(), reward[result.index.flatten()])
    (each,) = torch.autograd.grad((result.output.detach().squeeze(-1) * result.log_prob).sum(), rows)
    exact = q.double().requires_grad_()
    p = reference.log_probabilities(exact, k.double(), temperature=0.8).exp()
    (wanted,) = torch.autograd.grad((p * reward.double()).sum(), exact)
    each = each.double().squeeze()
    error = (each.mean(0) - wanted.squeeze()).abs()
    assert (error < 5 * each.std(0) / math.sqrt(draws)).all()
    assert (wanted.squeeze().abs() > 5 * each.std(0) / math.sqrt(draws)).any(), "nothing was measured"
