"""fastattn.nn.AdditiveAttention against its formula, and what it shares with LuongAttention and HardAttention."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.nn import AdditiveAttention, LuongAttention, ProjectedKeys

B, LQ, LK, QUERY, KEY, HIDDEN, VALUE = 3, 4, 9, 6, 10, 8, 12
LENGTHS = torch.tensor([9, 5, 0], dtype=torch.int32)


def formula(
    module: AdditiveAttention, query: Tensor, key: Tensor, value: Tensor, keep: Tensor
) -> tuple[Tensor, Tensor]:
    """The output and the weights (B, H, Lq, Lk), one pair of query and key at a time as the papers write it."""
    H = module.num_heads
    q = module.query_proj(query).unflatten(-1, (H, -1))
    k = module.key_proj(key).unflatten(-1, (H, -1))
    e = torch.einsum("bqkhd,hd->bhqk", torch.tanh(q[:, :, None] + k[:, None]), module.score_weight)
    a = torch.softmax(e.masked_fill(~keep, -1e300), dim=-1) * keep.any(-1, keepdim=True)
    c = torch.einsum("bhqk,bkhd->bqhd", a, value.unflatten(-1, (H, -1)))
    return c.flatten(2), a


def tensors(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = ((B, LQ, QUERY), (B, LK, KEY), (B, LK, VALUE))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


MASKS: dict[str, Any] = {
    "none": lambda H: (None, torch.ones(1, 1, 1, LK, dtype=torch.bool)),
    "padding": lambda H: (m := torch.rand(B, LK) < 0.6, m[:, None, None]),
    "pairs": lambda H: (m := torch.rand(B, LQ, LK) < 0.6, m[:, None]),
    "shared-pairs": lambda H: (m := torch.rand(1, LQ, LK) < 0.6, m[:, None]),
    "heads": lambda H: (m := torch.rand(B, H, LQ, LK) < 0.6, m),
}


@pytest.mark.parametrize("num_heads", [1, 2])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("with_value", [True, False], ids=["values", "keys"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_the_formula(bias: bool, with_value: bool, mask: str, num_heads: int) -> None:
    value_dim = VALUE if with_value else None
    module = AdditiveAttention(QUERY, KEY, HIDDEN, value_dim, num_heads, bias, dtype=torch.float64)
    query, key, value = tensors()
    value = value if with_value else key
    given, keep = MASKS[mask](num_heads)
    keep = keep.expand(B, num_heads, LQ, LK)
    wanted, wanted_weights = formula(module, query, key, value, keep)
    output, weights = module(query, key, value if with_value else None, mask=given, need_weights=True)
    torch.testing.assert_close(output, wanted)
    torch.testing.assert_close(weights, wanted_weights.squeeze(1) if num_heads == 1 else wanted_weights)
    assert torch.equal(module(query, key, value if with_value else None, mask=given), output)
    leaves = [query, key, *([value] if with_value else []), *module.parameters()]
    d_output, d_weights = torch.randn_like(wanted), torch.randn_like(wanted_weights)
    d_found = d_weights.squeeze(1) if num_heads == 1 else d_weights
    for through in ("output", "weights"):
        pairs = (
            ((wanted, d_output), (output, d_output))
            if through == "output"
            else ((wanted_weights, d_weights), (weights, d_found))
        )
        for a, b in zip(
            *(torch.autograd.grad(x, leaves, d, retain_graph=True, allow_unused=True) for x, d in pairs), strict=True
        ):
            if a is not None or b is not None:
                torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-10)


def test_lengths_and_causal() -> None:
    module = AdditiveAttention(QUERY, KEY, HIDDEN, VALUE, dtype=torch.float64)
    query, key, value = tensors()
    with torch.no_grad():
        value[1, 5:] = value[2] = float("nan")  # beyond the length: never read
        key[1, 5:] = key[2] = 1e30  # the projection reads these
    output, weights = module(query, key, value, kv_lengths=LENGTHS, causal=True, need_weights=True)
    keep = fastattn.reference.visible(LQ, LK, True, None, LENGTHS, B)
    clean = [x.masked_fill(torch.arange(LK).view(1, -1, 1) >= LENGTHS.view(-1, 1, 1), 0) for x in (key, value)]
    wanted, wanted_weights = formula(module, query, *clean, keep)
    torch.testing.assert_close(output, wanted)
    torch.testing.assert_close(weights, wanted_weights.squeeze(1))
    assert not output[2].any()
    output.sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_heads", [1, 2])
def test_other_dtypes_are_the_projections_and_the_function(num_heads: int, dtype: torch.dtype) -> None:
    """Bit for bit: the accuracy is that of fastattn.additive_attention, which has tests of its own."""
    module = AdditiveAttention(QUERY, KEY, HIDDEN, num_heads=num_heads, dtype=dtype)
    query, key, _ = tensors(dtype)
    output, weights = module(query, key, need_weights=True)
    q, k, v = (
        x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (module.query_proj(query), module.key_proj(key), key)
    )
    wanted = fastattn.additive_attention(q, k, v, module.score_weight).transpose(1, 2).flatten(2)
    assert output.dtype == weights.dtype == dtype
    assert torch.equal(output, wanted)
    leaves = [query, key, *module.parameters()]
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), leaves) for x in (output, wanted)), strict=True):
        assert torch.equal(a, b)
    keep = torch.ones(1, num_heads, 1, LK, dtype=torch.bool)
    _, exact = formula(copy.deepcopy(module).double(), query.double(), key.double(), key.double(), keep)
    torch.testing.assert_close(weights.double().view_as(exact), exact, rtol=0, atol=4 * torch.finfo(dtype).eps)


# --- One query at a time ---------------------------------------------------------------------------------------------

MODULES = {
    "additive": lambda **o: AdditiveAttention(QUERY, KEY, HIDDEN, **o),
    "additive-heads": lambda **o: AdditiveAttention(QUERY, KEY, HIDDEN, num_heads=2, **o),
    "dot": lambda **o: LuongAttention("dot", **o),
    "general": lambda **o: LuongAttention("general", QUERY, KEY, **o),
    "concat": lambda **o: LuongAttention("concat", QUERY, KEY, **o),
}


def inputs(name: str) -> tuple[Tensor, Tensor]:
    return torch.randn(B, LQ, KEY if name == "dot" else QUERY), torch.randn(B, LK, KEY)


@pytest.mark.parametrize("name", MODULES)
def test_projected_keys_and_single_queries(name: str) -> None:
    module = MODULES[name]()
    query, key = inputs(name)
    key.requires_grad_()
    padding = torch.arange(LK) < torch.tensor([[LK], [5], [2]])
    wanted, wanted_weights = module(query, key, mask=padding, need_weights=True)
    keys = module.project_keys(key)
    assert isinstance(keys, ProjectedKeys)
    steps = [module(query[:, i], keys, mask=padding, need_weights=True) for i in range(LQ)]
    output = torch.stack([o for o, _ in steps], dim=1)
    assert steps[0][0].shape == (B, KEY)
    torch.testing.assert_close(output, wanted)
    torch.testing.assert_close(torch.stack([w for _, w in steps], dim=-2), wanted_weights)
    # Gradients of all steps add up in the keys, which were projected once.
    leaves = [key, *module.parameters()]
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), leaves) for x in (output, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    # A beam search takes rows of them.
    rows = torch.tensor([2, 0, 0, 1])
    chosen = ProjectedKeys(keys.key[rows], keys.value[rows])
    torch.testing.assert_close(module(query[rows], chosen, mask=padding[rows]), wanted[rows])


@pytest.mark.parametrize("name", MODULES)
def test_dropout(name: str) -> None:
    module = MODULES[name](dropout=0.5)
    query, key = inputs(name)
    torch.manual_seed(1)
    first, second = module(query, key), module(query, key)
    torch.manual_seed(1)
    assert torch.equal(module(query, key), first)
    assert not torch.equal(first, second)
    _, weights = module(query, key, need_weights=True)  # before dropout
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    module.eval()
    assert torch.equal(module(query, key), module(query, key))


@pytest.mark.parametrize("name", MODULES)
def test_autocast_compile_and_copies(name: str, fresh_compiler: None) -> None:
    module = MODULES[name]()
    query, key = inputs(name)
    wanted, wanted_weights = module(query, key, need_weights=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, weights = module(query, key, need_weights=True)
    assert output.dtype == weights.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), wanted, rtol=0.05, atol=0.05)
    torch.testing.assert_close(weights.float(), wanted_weights, rtol=0.05, atol=0.05)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(query, key, need_weights=True), (wanted, wanted_weights))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(query, key), wanted)
    other = MODULES[name]()
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(query, key), wanted)


@pytest.mark.parametrize("name", MODULES)
def test_meta_device_and_dtype(name: str) -> None:
    module = MODULES[name](device="meta", dtype=torch.bfloat16)
    query, key = (x.to("meta", torch.bfloat16) for x in inputs(name))
    output, weights = module(query, key, need_weights=True)
    assert output.shape == (B, LQ, KEY)
    assert weights.shape == ((B, 2, LQ, LK) if "heads" in name else (B, LQ, LK))
    assert output.dtype == torch.bfloat16


@pytest.mark.parametrize("name", MODULES)
def test_reset_parameters(name: str) -> None:
    torch.manual_seed(1)
    module = MODULES[name]()
    first = copy.deepcopy(module.state_dict())
    module.reset_parameters()
    if name != "dot":
        assert not torch.equal(module.state_dict()[next(iter(first))], first[next(iter(first))])
    torch.manual_seed(1)
    again = MODULES[name]()
    for key, x in again.state_dict().items():
        assert torch.equal(x, first[key])
    assert "dropout=0.0" in repr(module)


def test_no_hidden_features_are_kept() -> None:
    """Plain code would save B * Lq * Lk * attn_dim numbers for the backward pass."""
    module = AdditiveAttention(QUERY, KEY, 64)
    saved: list[int] = []
    query, key = torch.randn(2, 50, QUERY), torch.randn(2, 60, KEY)

    def pack(x: Tensor) -> Tensor:
        saved.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        module(query, key)
    assert saved
    assert max(saved) <= 2 * 60 * 64


# --- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query_dim": 0}, r"query_dim is 0; it must be at least 1"),
        ({"key_dim": -2}, r"key_dim is -2"),
        ({"attn_dim": 0}, r"attn_dim is 0"),
        ({"value_dim": 0}, r"value_dim is 0"),
        ({"num_heads": 0}, r"num_heads is 0"),
        ({"num_heads": 3}, r"attn_dim is 8 and num_heads 3; each head takes an equal part"),
        ({"num_heads": 4}, r"value_dim is 10 and num_heads 4; each head"),
        ({"dropout": 2.0}, r"dropout is 2\.0; it is a probability"),
    ],
)
def test_constructor_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^fastattn: {message}"):
        AdditiveAttention(**({"query_dim": QUERY, "key_dim": KEY, "attn_dim": HIDDEN} | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query_dim": None}, r"query_dim is a NoneType; it must be an int\."),
        ({"key_dim": 10.0}, r"key_dim is a float; it must be an int\."),
        ({"num_heads": True}, r"num_heads is a bool; it must be an int\."),
        ({"dropout": "0.1"}, r"dropout is a str; it must be a float\."),
    ],
)
def test_constructor_refuses_types(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"^fastattn: {message}"):
        AdditiveAttention(**({"query_dim": QUERY, "key_dim": KEY, "attn_dim": HIDDEN} | arguments))


def ones(*shape: int, **options: Any) -> Tensor:
    return torch.ones(*shape, **options)


KEYS = ProjectedKeys(torch.ones(B, 2, LK, 4), torch.ones(B, 2, LK, 5))
BAD: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "query-type": (TypeError, r"query is a list; it must be a torch\.Tensor\.", {"query": [1.0]}),
    "key-type": (TypeError, r"key is a tuple; .*Tensor, or what project_keys returns", {"key": (1, 2)}),
    "query-rank": (ValueError, r"query has shape \(6,\); it must be \(B, E\) or \(B, Lq, E\)", {"query": ones(QUERY)}),
    "key-rank": (ValueError, r"key has shape \(9, 10\); it must be \(B, Lk, E\)", {"key": ones(LK, KEY)}),
    "query-features": (ValueError, r"query has 7 features .* constructed for 6", {"query": ones(B, LQ, 7)}),
    "key-features": (ValueError, r"key has 7 features .* constructed for 10", {"key": ones(B, LK, 7)}),
    "value-features": (ValueError, r"value has 7 features .* constructed for 10", {"value": ones(B, LK, 7)}),
    "value-length": (ValueError, r"key has .* and value \(3, 8, 10\); each key has one", {"value": ones(B, 8, KEY)}),
    "batch": (ValueError, r"query has 2 sequences and key 3; the first dimension", {"query": ones(2, QUERY)}),
    "dtype": (TypeError, r"key is torch\.float64 but the module is torch\.float32", {"key": ones(B, LK, KEY).double()}),
    "value-dtype": (TypeError, r"v is torch\.float64", {"value": ones(B, LK, KEY).double()}),
    "device": (ValueError, r"query is on meta but the module is on cpu", {"query": ones(B, QUERY, device="meta")}),
    "twice": (ValueError, r"value was given together with projected keys", {"key": KEYS, "value": ones(B, LK, KEY)}),
    "other-keys": (
        ValueError,
        r"query has 1 heads of 8 features .* and key 2 of 4; they must be the same",
        {"key": KEYS},
    ),
    "mask-type": (TypeError, r"mask is a list; it must be a torch\.Tensor", {"mask": [True]}),
    "mask-dtype": (TypeError, r"mask is torch\.float32; it must be bool, True = keep", {"mask": ones(B, LK)}),
    "mask-device": (ValueError, r"mask is on meta", {"mask": ones(B, LK, device="meta").bool()}),
    "mask-rank": (ValueError, r"mask has shape \(9,\); it must be \(B, Lk\) = \(3, 9\)", {"mask": ones(LK).bool()}),
    "mask-size": (
        ValueError,
        r"mask has shape \(4, 9\); .* or \(B, H, Lq, Lk\) = \(3, 1, 4, 9\)",
        {"mask": ones(LQ, LK).bool()},
    ),
    "lengths": (ValueError, r"kv_lengths", {"kv_lengths": torch.tensor([1, 2], dtype=torch.int32)}),
    "causal": (ValueError, r"causal is 'left'", {"causal": "left"}),
}


@pytest.mark.parametrize("id", BAD)
def test_call_refuses(id: str) -> None:
    kind, message, arguments = BAD[id]
    module = AdditiveAttention(QUERY, KEY, HIDDEN)
    with pytest.raises(kind, match=rf"^fastattn: .*{message}"):
        module(**({"query": ones(B, LQ, QUERY), "key": ones(B, LK, KEY)} | arguments))


def test_values_that_heads_cannot_share() -> None:
    module = AdditiveAttention(QUERY, KEY, HIDDEN, num_heads=2)
    module.value_dim = None
    with pytest.raises(ValueError, match=r"^fastattn: value has 7 features and the module 2 heads; each head takes"):
        module.project_keys(ones(B, LK, KEY), ones(B, LK, 7))
