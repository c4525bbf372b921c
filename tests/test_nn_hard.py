"""fastattn.nn.HardAttention against its formula."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.nn import HardAttention, ProjectedKeys

B, LQ, LK, QUERY, KEY, HIDDEN, VALUE = 3, 4, 9, 6, 10, 8, 12


def log_probabilities(module: HardAttention, query: Tensor, key: Tensor, keep: Tensor | None = None) -> Tensor:
    """log p, (B, H, Lq, Lk)."""
    q, k = (x.unflatten(-1, (module.num_heads, -1)) for x in (module.query_proj(query), module.key_proj(key)))
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) / (module.temperature * q.shape[-1] ** 0.5)
    return torch.log_softmax(s if keep is None else s.masked_fill(~keep, -1e300), dim=-1)


def inputs(dtype: torch.dtype = torch.float64, batch: int = B) -> list[Tensor]:
    shapes = ((batch, LQ, QUERY), (batch, LK, KEY), (batch, LK, VALUE))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def chosen(value: Tensor, index: Tensor) -> Tensor:
    """value[index] for (B, Lk, E) and (B, H, Lq), each head its part of the features."""
    parts = value.unflatten(-1, (index.shape[1], -1)).transpose(1, 2)
    at = index.clamp_min(0).unsqueeze(-1).expand(-1, -1, -1, parts.shape[-1])
    return parts.gather(2, at).masked_fill((index < 0).unsqueeze(-1), 0).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("num_heads", [1, 2])
@pytest.mark.parametrize("mode", ["sample", "argmax"])
@pytest.mark.parametrize("with_value", [True, False], ids=["values", "keys"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_the_formula(bias: bool, with_value: bool, mode: Any, num_heads: int) -> None:
    value_dim = VALUE if with_value else None
    module = HardAttention(
        QUERY, KEY, HIDDEN, value_dim, num_heads, bias, temperature=1.7, train_mode=mode, dtype=torch.float64
    )
    query, key, value = inputs()
    value = value if with_value else key
    keep = torch.rand(B, LQ, LK) < 0.6
    keep[0, 1] = False  # a query that sees nothing
    (output, index, log_prob), p = module(query, key, value if with_value else None, mask=keep, need_weights=True)
    if num_heads == 1:
        assert index.shape == log_prob.shape == (B, LQ)
        assert p.shape == (B, LQ, LK)
        index, log_prob, p = index.unsqueeze(1), log_prob.unsqueeze(1), p.unsqueeze(1)
    assert index.shape == log_prob.shape == (B, num_heads, LQ)
    log_p = log_probabilities(module, query, key, keep.unsqueeze(1))
    blind = ~keep.any(-1)[:, None].expand_as(index)
    assert torch.equal(index < 0, blind)
    if mode == "argmax":
        assert torch.equal(index, log_p.argmax(-1).masked_fill(blind, -1))
    assert torch.equal(output, chosen(value, index))
    wanted = log_p.gather(-1, index.clamp_min(0).unsqueeze(-1)).squeeze(-1).masked_fill(blind, 0)
    torch.testing.assert_close(log_prob, wanted)
    torch.testing.assert_close(p, log_p.exp() * ~blind.unsqueeze(-1))
    reward = torch.randn_like(wanted)
    leaves = [query, key, *module.parameters()]
    for a, b in zip(*(torch.autograd.grad((reward * x).mean(), leaves) for x in (log_prob, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_straight_through_has_the_gradient_of_soft_attention() -> None:
    module = HardAttention(
        QUERY, KEY, HIDDEN, VALUE, num_heads=2, estimator="straight_through", temperature=0.8, dtype=torch.float64
    )
    query, key, value = inputs()
    output, index, _ = module(query, key, value)
    assert torch.equal(output, chosen(value, index))
    p = log_probabilities(module, query, key).exp()
    soft = torch.einsum("bhqk,bkhd->bqhd", p, value.unflatten(-1, (2, -1))).flatten(2)
    d = torch.randn_like(soft)
    leaves = [query, key, value, *module.parameters()]
    for a, b in zip(*(torch.autograd.grad(x, leaves, d, retain_graph=True) for x in (output, soft)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_reinforce_gives_the_output_no_gradient_but_the_values() -> None:
    module = HardAttention(QUERY, KEY, HIDDEN, VALUE, dtype=torch.float64)
    query, key, value = inputs()
    output, index, _ = module(query, key, value)
    output.sum().backward()
    assert query.grad is None or not query.grad.any()
    counts = torch.zeros(B, LK, dtype=torch.float64).scatter_add_(1, index, torch.ones(B, LQ, dtype=torch.float64))
    assert torch.equal(value.grad, counts.unsqueeze(-1).expand_as(value))


def test_training_samples_and_evaluation_takes_the_most_probable() -> None:
    module = HardAttention(QUERY, KEY, HIDDEN, temperature=5.0)
    query, key, _ = inputs(torch.float32, 64)
    torch.manual_seed(2)
    first, second = module(query, key).index, module(query, key).index
    torch.manual_seed(2)
    assert torch.equal(module(query, key).index, first)
    assert not torch.equal(first, second)
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    assert torch.equal(*(module(query, key, generator=g).index for g in generators))
    module.eval()
    best = log_probabilities(module, query, key).squeeze(1).argmax(-1)
    assert torch.equal(module(query, key).index, best)
    module.eval_mode = "sample"
    assert not torch.equal(module(query, key).index, best)


def test_samples_follow_the_probabilities() -> None:
    module = HardAttention(QUERY, KEY, HIDDEN)
    query, key = torch.randn(1, 1, QUERY), 2 * torch.randn(1, LK, KEY)
    count = 20000
    index = module(query.expand(1, count, -1), key).index
    expected = count * log_probabilities(module, query, key).exp().flatten()
    observed = torch.bincount(index.flatten(), minlength=LK)
    chi2 = ((observed - expected).square() / expected).sum().item()
    assert chi2 < 26.1  # 8 degrees of freedom: 0.999


def test_lengths_and_causal() -> None:
    module = HardAttention(QUERY, KEY, HIDDEN, VALUE)
    query, key, value = inputs(torch.float32)
    lengths = torch.tensor([9, 5, 0], dtype=torch.int32)
    value = torch.arange(LK, dtype=torch.float32).view(1, LK, 1).expand(B, LK, VALUE)
    (output, index, _), p = module(query, key, value, kv_lengths=lengths, causal=True, need_weights=True)
    keep = fastattn.reference.visible(LQ, LK, True, None, lengths, B).squeeze(1)
    assert not p[~keep].any()
    assert (index[2] == -1).all()
    assert not output[2].any()
    seen = keep.gather(-1, index.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    assert seen[index >= 0].all()
    assert torch.equal(output[..., 0], index.clamp_min(0).float())


@pytest.mark.parametrize("num_heads", [1, 2])
def test_projected_keys_and_single_queries(num_heads: int) -> None:
    module = HardAttention(QUERY, KEY, HIDDEN, num_heads=num_heads).eval()
    query, key, _ = inputs(torch.float32)
    wanted, p = module(query, key, need_weights=True)
    keys = module.project_keys(key)
    assert isinstance(keys, ProjectedKeys)
    for i in range(LQ):
        one, p_one = module(query[:, i], keys, need_weights=True)
        assert torch.equal(one.output, wanted.output[:, i])
        assert torch.equal(one.index, wanted.index[..., i])
        torch.testing.assert_close(one.log_prob, wanted.log_prob[..., i])
        torch.testing.assert_close(p_one, p[..., i, :])


def test_autocast_compile_and_copies(fresh_compiler: None) -> None:
    module = HardAttention(QUERY, KEY, HIDDEN).eval()
    query, key, _ = inputs(torch.float32)
    wanted = module(query, key)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, p = module(query, key, need_weights=True)
    assert found.output.dtype == p.dtype == torch.bfloat16
    assert found.log_prob.dtype == torch.float32
    torch.testing.assert_close(p.float(), log_probabilities(module, query, key).squeeze(1).exp(), rtol=0.05, atol=0.05)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)(query, key)
    for twin in (copy.deepcopy(module)(query, key), pickle.loads(pickle.dumps(module))(query, key), compiled):
        assert torch.equal(twin.index, wanted.index)
        torch.testing.assert_close(twin.log_prob, wanted.log_prob)


def test_parameters() -> None:
    torch.manual_seed(1)
    module = HardAttention(QUERY, KEY, HIDDEN, num_heads=2, estimator="straight_through", device="cpu")
    first = copy.deepcopy(module.state_dict())
    assert {name: tuple(x.shape) for name, x in first.items()} == {
        "query_proj.weight": (HIDDEN, QUERY),
        "query_proj.bias": (HIDDEN,),
        "key_proj.weight": (HIDDEN, KEY),
        "key_proj.bias": (HIDDEN,),
    }
    module.reset_parameters()
    assert not torch.equal(module.query_proj.weight, first["query_proj.weight"])
    assert "num_heads=2, estimator='straight_through', temperature=1.0" in repr(module)
    meta = HardAttention(QUERY, KEY, HIDDEN, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in meta.parameters()} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query_dim": 0}, r"query_dim is 0; it must be at least 1"),
        ({"key_dim": 0}, r"key_dim is 0"),
        ({"attn_dim": 0}, r"attn_dim is 0"),
        ({"value_dim": -1}, r"value_dim is -1"),
        ({"num_heads": 0}, r"num_heads is 0"),
        ({"num_heads": 3}, r"attn_dim is 8 and num_heads 3"),
        ({"num_heads": 4}, r"value_dim is 10 and num_heads 4"),
        ({"estimator": "gumbel"}, r"estimator is 'gumbel'; it must be 'reinforce' or 'straight_through'"),
        ({"temperature": 0.0}, r"temperature is 0\.0; it must be positive and finite: the limit at 0 is the mode"),
        ({"temperature": float("inf")}, r"temperature is inf"),
        ({"temperature": float("nan")}, r"temperature is nan"),
        ({"train_mode": "soft"}, r"train_mode is 'soft'; it must be 'sample' or 'argmax'"),
        ({"eval_mode": None}, r"eval_mode is None"),
    ],
)
def test_constructor_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^fastattn: {message}"):
        HardAttention(**({"query_dim": QUERY, "key_dim": KEY, "attn_dim": HIDDEN} | arguments))


@pytest.mark.parametrize("arguments", [{"temperature": "1"}, {"temperature": None}, {"num_heads": 2.0}])
def test_constructor_refuses_types(arguments: dict[str, Any]) -> None:
    (name,) = arguments
    with pytest.raises(TypeError, match=rf"^fastattn: {name} is a \w+; it must be an? (int|float)\."):
        HardAttention(**({"query_dim": QUERY, "key_dim": KEY, "attn_dim": HIDDEN} | arguments))


def test_call_refuses() -> None:
    """The checks are those of AdditiveAttention, where all of them are tested."""
    module = HardAttention(QUERY, KEY, HIDDEN)
    with pytest.raises(ValueError, match=r"^fastattn: key has 7 features but the module was constructed for 10"):
        module(torch.ones(B, QUERY), torch.ones(B, LK, 7))
    with pytest.raises(TypeError, match=r"^fastattn: mask is torch\.int64; it must be bool, True = keep"):
        module(torch.ones(B, QUERY), torch.ones(B, LK, KEY), mask=torch.ones(B, LK).long())
