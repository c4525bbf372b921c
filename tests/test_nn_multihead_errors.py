"""Every message of fastattn.nn.MultiheadAttention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.nn import MultiheadAttention

from .multihead_calls import E, H, L, N, nested


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embed_dim": 0}, "embed_dim is 0; it must be at least 1"),
        ({"num_heads": -1}, "num_heads is -1; it must be at least 1"),
        ({"kdim": 0}, "kdim is 0"),
        ({"vdim": 0}, "vdim is 0"),
        ({"num_heads": 3}, "embed_dim is 16 and num_heads 3; each head takes an equal part"),
        ({"dropout": 1.1}, r"dropout is 1.1; it is a probability and must lie in \[0, 1\]"),
        ({"dropout": -0.1}, "dropout is -0.1"),
    ],
)
def test_constructor_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^fastattn: {message}"):
        MultiheadAttention(**({"embed_dim": E, "num_heads": H} | arguments))


def blank(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(*(shape or (N, L, E)), **options)


BAD: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "no-tensor": (TypeError, "query is a list; it must be a torch.Tensor", {"query": [1.0]}),
    "four-dimensions": (
        ValueError,
        r"query has shape \(1, 1, 1, 16\); query, key and value",
        {"query": blank(1, 1, 1, E)},
    ),
    "mixed-ranks": (ValueError, r"key has shape \(5, 16\); query, key and value must all", {"key": blank(L, E)}),
    "features": (ValueError, "value has 15 features but the module was constructed for 16", {"value": blank(N, L, 15)}),
    "device": (
        ValueError,
        "key is on meta but the module is on cpu; move it with key.to",
        {"key": blank(device="meta")},
    ),
    "dtype": (TypeError, "query is torch.float64 but the module is torch.float32", {"query": blank().double()}),
    "lengths": (ValueError, r"key has shape \(3, 6, 16\) and value \(3, 5, 16\); each key", {"key": blank(N, 6, E)}),
    "batch": (
        ValueError,
        r"query has shape \(2, 5, 16\) and key \(3, 5, 16\); dimension 0 is the batch \(batch_first=True\)",
        {"query": blank(2, L, E)},
    ),
    "mask-type": (TypeError, "attn_mask is a str", {"attn_mask": "causal"}),
    "mask-dtype": (TypeError, r"attn_mask is torch.int64; it must be bool", {"attn_mask": blank(L, L).long()}),
    "padding-dtype": (
        TypeError,
        r"key_padding_mask is torch.uint8; .*\.bool\(\)",
        {"key_padding_mask": blank(N, L).byte()},
    ),
    "mask-device": (ValueError, "attn_mask is on meta", {"attn_mask": blank(L, L, device="meta")}),
    "mask-2d": (
        ValueError,
        r"attn_mask has shape \(5, 6\); it must be \(L, S\) = \(5, 5\)",
        {"attn_mask": blank(L, 6)},
    ),
    "mask-3d": (ValueError, r"attn_mask has .* or \(N \* H, L, S\) = \(12, 5, 5\)", {"attn_mask": blank(N, L, L)}),
    "padding": (ValueError, r"key_padding_mask has .* \(N, S\) = \(3, 5\)", {"key_padding_mask": blank(N, 6)}),
    "hint-alone": (ValueError, "is_causal is True without an attn_mask", {"is_causal": True}),
    "half-nested": (TypeError, "some are nested tensors; either all of them", {"key": nested(5, 5, 5)}),
}


@pytest.mark.parametrize("id", BAD)
def test_call_refuses(id: str) -> None:
    kind, message, arguments = BAD[id]
    ours = MultiheadAttention(E, H, batch_first=True)
    with pytest.raises(kind, match=rf"^fastattn: .*{message}"):
        ours(**({"query": blank(), "key": blank(), "value": blank()} | arguments))


def test_unbatched_masks_are_named_so() -> None:
    ours = MultiheadAttention(E, H)
    with pytest.raises(ValueError, match=r"attn_mask has .* or \(H, L, S\) = \(4, 5, 5\)"):
        ours(blank(L, E), blank(L, E), blank(L, E), attn_mask=blank(1, L, L))
    with pytest.raises(ValueError, match=r"key_padding_mask has .* \(S,\) = \(5,\)"):
        ours(blank(L, E), blank(L, E), blank(L, E), key_padding_mask=blank(1, L))


@pytest.mark.parametrize(
    ("message", "arguments", "inputs", "options"),
    [
        ("key_padding_mask, attn_mask or is_causal was given with nested", {}, None, {"attn_mask": blank(L, L)}),
        ("key_padding_mask, attn_mask or is_causal was given with nested", {}, None, {"key_padding_mask": blank(2, L)}),
        ("key_padding_mask, attn_mask or is_causal was given with nested", {}, None, {"is_causal": True}),
        ("query is a nested tensor and batch_first is False", {"batch_first": False}, None, {}),
        ("query is a nested tensor and the module appends keys", {"add_zero_attn": True}, None, {}),
        ("query is a nested tensor and the module appends keys", {"add_bias_kv": True}, None, {}),
        (r"key have lengths \[3, 4\] and those of value \[3, 5\]", {}, ((3, 4), (3, 4), (3, 5)), {}),
        ("query holds 1 sequences and key 2", {}, ((3,), (3, 4), (3, 4)), {}),
    ],
)
def test_nested_tensors_are_refused(
    message: str, arguments: dict[str, Any], inputs: tuple[tuple[int, ...], ...] | None, options: dict[str, Any]
) -> None:
    ours = MultiheadAttention(**({"embed_dim": E, "num_heads": H, "batch_first": True} | arguments))
    tensors = [nested(3, 5)] * 3 if inputs is None else [nested(*lengths) for lengths in inputs]
    with pytest.raises(ValueError, match=f"^fastattn: .*{message}"):
        ours(*tensors, **options)
