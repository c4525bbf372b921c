"""fastattn.nn.LuongAttention against its three formulas. What it shares with AdditiveAttention is tested there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.nn import LuongAttention

B, LQ, LK, QUERY, KEY, HIDDEN, VALUE = 3, 4, 9, 6, 10, 8, 12


def scores(module: LuongAttention, query: Tensor, key: Tensor) -> Tensor:
    """e, (B, Lq, Lk), as the paper writes it: concat with every pair of a query and a key joined."""
    if module.score == "dot":
        return torch.einsum("bqd,bkd->bqk", query, key)
    if module.score == "general":
        return torch.einsum("bqd,de,bke->bqk", query, module.query_proj.weight.T, key)
    joined = torch.cat(
        [query[:, :, None].expand(-1, -1, key.shape[1], -1), key[:, None].expand(-1, query.shape[1], -1, -1)], dim=-1
    )
    return torch.tanh(module.concat_proj(joined)) @ module.score_weight


CASES: dict[str, dict[str, Any]] = {
    "dot": {"score": "dot"},
    "dot-sized": {"score": "dot", "query_dim": KEY},
    "general": {"score": "general", "query_dim": QUERY, "key_dim": KEY},
    "general-square": {"score": "general", "query_dim": KEY},
    "concat": {"score": "concat", "query_dim": QUERY, "key_dim": KEY, "attn_dim": HIDDEN},
    "concat-bias": {"score": "concat", "query_dim": KEY, "bias": True},
}


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("with_value", [True, False], ids=["values", "keys"])
@pytest.mark.parametrize("name", CASES)
def test_the_formula(name: str, with_value: bool, masked: bool) -> None:
    module = LuongAttention(**CASES[name], dtype=torch.float64)
    if name == "concat-bias":
        torch.nn.init.normal_(module.concat_proj.bias)
    features = CASES[name].get("query_dim", KEY)
    shapes = ((B, LQ, features), (B, LK, KEY), (B, LK, VALUE))
    query, key, value = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    mask = torch.rand(B, LQ, LK) < 0.6 if masked else None
    e = scores(module, query, key)
    if mask is not None:
        mask[..., 0] = True
        mask[1, 2] = False  # a query that sees nothing
        e = e.masked_fill(~mask, -1e300)
    wanted_weights = torch.softmax(e, dim=-1) * (1 if mask is None else mask.any(-1, keepdim=True))
    wanted = wanted_weights @ (value if with_value else key)
    output, weights = module(query, key, value if with_value else None, mask=mask, need_weights=True)
    torch.testing.assert_close(output, wanted)
    torch.testing.assert_close(weights, wanted_weights)
    leaves = [query, key, *([value] if with_value else []), *module.parameters()]
    d = torch.randn_like(wanted)
    for a, b in zip(*(torch.autograd.grad(x, leaves, d, retain_graph=True) for x in (wanted, output)), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-10)
    leaves.pop(2 if with_value else 0)
    d = torch.randn_like(weights)
    for a, b in zip(*(torch.autograd.grad(x, leaves, d) for x in (wanted_weights, weights)), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-10)


def test_dot_is_unscaled() -> None:
    x = torch.tensor([[[1.0, 0.0, 1.0]]])
    keys = torch.tensor([[[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0]]])
    _, weights = LuongAttention("dot")(x, keys, need_weights=True)
    torch.testing.assert_close(weights[0, 0], torch.softmax(torch.tensor([2.0, 0.0, 1.0]), dim=-1))


def test_parameters_have_the_names_of_the_formula() -> None:
    shapes = {
        name: {k: tuple(v.shape) for k, v in LuongAttention(**o).state_dict().items()} for name, o in CASES.items()
    }
    assert shapes == {
        "dot": {},
        "dot-sized": {},
        "general": {"query_proj.weight": (KEY, QUERY)},
        "general-square": {"query_proj.weight": (KEY, KEY)},
        "concat": {"score_weight": (HIDDEN,), "concat_proj.weight": (HIDDEN, QUERY + KEY)},
        "concat-bias": {
            "score_weight": (KEY,),
            "concat_proj.weight": (KEY, 2 * KEY),
            "concat_proj.bias": (KEY,),
        },
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"score": "cosine"}, r"score is 'cosine'; it must be 'dot', 'general' or 'concat'"),
        ({"score": "general"}, r"query_dim is missing; the score 'general' has parameters"),
        ({"score": "concat", "key_dim": 3}, r"query_dim is missing; the score 'concat'"),
        ({"score": "general", "query_dim": 0}, r"query_dim is 0; it must be at least 1"),
        ({"score": "general", "query_dim": 1, "key_dim": 0}, r"key_dim is 0"),
        ({"score": "concat", "query_dim": 1, "attn_dim": 0}, r"attn_dim is 0"),
        ({"score": "dot", "attn_dim": 4}, r"attn_dim is 4 and bias False with the score 'dot'; only 'concat'"),
        (
            {"score": "general", "query_dim": 4, "bias": True},
            r"attn_dim is None and bias True with the score 'general'",
        ),
        ({"score": "dot", "query_dim": 4, "key_dim": 5}, r"query_dim is 4 and key_dim 5 with the score 'dot'"),
        ({"score": "dot", "dropout": -1.0}, r"dropout is -1\.0"),
    ],
)
def test_constructor_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^fastattn: {message}"):
        LuongAttention(**arguments)


def test_dot_needs_one_size() -> None:
    with pytest.raises(ValueError, match=r"^fastattn: query has 1 heads of 6 features .*a dot product needs"):
        LuongAttention("dot")(torch.ones(B, QUERY), torch.ones(B, LK, KEY))
    with pytest.raises(ValueError, match=r"^fastattn: key has 10 features but the module was constructed for 6"):
        LuongAttention("dot", QUERY)(torch.ones(B, QUERY), torch.ones(B, LK, KEY))
