"""How the masks of fastattn.nn.MultiheadAttention reach the kernel."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.nn import MultiheadAttention, multihead

from .multihead_calls import E, H, L, N


@pytest.fixture
def calls_of_attention(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of every call of fastattn.attention that the module makes."""
    calls: list[dict[str, Any]] = []

    def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        calls.append({"q": q, "k": k, "v": v, **options})
        return fastattn.attention(q, k, v, **options)

    monkeypatch.setattr(multihead, "attention", attention)
    return calls


def test_a_bool_padding_mask_is_not_expanded(calls_of_attention: list[dict[str, Any]]) -> None:
    ours = MultiheadAttention(E, H, batch_first=True)
    x = torch.randn(N, L, E)
    padding = torch.arange(L) >= torch.tensor([[L], [3], [2]])
    ours(x, x, x, key_padding_mask=padding, need_weights=False)
    (call,) = calls_of_attention
    assert torch.equal(call["mask"], ~padding.view(N, 1, 1, L))
    assert call["bias"] is None


def test_two_bool_masks_are_not_joined(calls_of_attention: list[dict[str, Any]]) -> None:
    ours = MultiheadAttention(E, H, batch_first=True)
    x = torch.randn(N, L, E)
    padding, mask = torch.zeros(N, L, dtype=torch.bool), torch.zeros(L, L, dtype=torch.bool)
    ours(x, x, x, key_padding_mask=padding, attn_mask=mask, need_weights=False)
    (call,) = calls_of_attention
    assert call["mask"].shape == (1, 1, L, L)
    assert call["bias"].shape == (N, 1, 1, L)


def test_float_masks_let_tiles_be_skipped(calls_of_attention: list[dict[str, Any]]) -> None:
    ours = MultiheadAttention(E, H, batch_first=True)
    x = torch.randn(N, L, E)
    padding = torch.zeros(N, L).masked_fill(torch.arange(L) >= torch.tensor([[L], [3], [2]]), -math.inf)
    causal = torch.zeros(L, L).masked_fill(torch.ones(L, L, dtype=torch.bool).triu(1), -math.inf)
    for options, shape in (
        ({"key_padding_mask": padding}, (N, 1, 1, L)),
        ({"attn_mask": causal}, (1, 1, L, L)),
        ({"attn_mask": causal, "key_padding_mask": padding}, (1, 1, L, L)),
    ):
        ours(x, x, x, **options, need_weights=False)
        mask = calls_of_attention[-1]["mask"]
        assert mask.shape == shape
        assert torch.equal(mask.view(-1, L), (options.get("attn_mask", padding) == 0).view(-1, L))
    ours(x, x, x, attn_mask=causal.expand(N * H, L, L), need_weights=False)
    assert calls_of_attention[-1]["mask"] is None


def test_one_projection_without_copies(calls_of_attention: list[dict[str, Any]]) -> None:
    ours = MultiheadAttention(E, H, batch_first=True)
    x = torch.randn(N, L, E)
    ours(x, x, x, need_weights=False)
    (call,) = calls_of_attention
    q, k, v = call["q"], call["k"], call["v"]
    storages = {t.untyped_storage().data_ptr() for t in (q, k, v)}
    assert len(storages) == 1
    assert q.untyped_storage().nbytes() == N * L * 3 * E * q.element_size()


def test_is_causal_is_relied_upon_with_padding_too(calls_of_attention: list[dict[str, Any]]) -> None:
    ours = MultiheadAttention(E, H, batch_first=True)
    x = torch.randn(N, L, E)
    padding = torch.arange(L) >= torch.tensor([[L], [3], [2]])
    mask = torch.ones(L, L, dtype=torch.bool).triu(1)
    options: dict[str, Any] = {"key_padding_mask": padding, "attn_mask": mask, "need_weights": False}
    slow, _ = ours(x, x, x, **options)
    fast, _ = ours(x, x, x, **options, is_causal=True)
    assert calls_of_attention[1]["causal"] == "top_left"
    assert calls_of_attention[1]["mask"].shape == (N, 1, 1, L)
    torch.testing.assert_close(fast, slow)
