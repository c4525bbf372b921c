"""The dropout of fastattn.nn.MultiheadAttention."""

from __future__ import annotations

import pytest
import torch

from fastattn.nn import MultiheadAttention

from .multihead_calls import E, H, L, N


@pytest.mark.parametrize("padded", [False, True])
def test_output_and_weights_have_the_same_dropout(padded: bool) -> None:
    ours = MultiheadAttention(E, H, dropout=0.4, batch_first=True, dtype=torch.float64)
    q, memory = torch.randn(N, L, E).double(), torch.randn(N, 40, E).double()
    inputs = [q.requires_grad_(), memory.requires_grad_()]
    padding = torch.arange(40) >= torch.tensor([[40], [30], [20]]) if padded else None
    output, weights = ours(*inputs, memory, key_padding_mask=padding, average_attn_weights=False)
    assert 0.2 < (weights == 0)[0].double().mean() < 0.6
    v = torch.nn.functional.linear(memory, ours.in_proj_weight[2 * E :], ours.in_proj_bias[2 * E :])
    o = weights @ v.unflatten(-1, (H, -1)).transpose(1, 2)
    again = ours.out_proj(o.transpose(1, 2).flatten(2))
    torch.testing.assert_close(output, again)
    # The gradients are those of the same dropped weights: through the fused kernel, and through the weights.
    leaves = [*inputs, ours.in_proj_weight]
    for a, b in zip(
        *(torch.autograd.grad(x.square().sum(), leaves, retain_graph=True) for x in (output, again)), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_dropout_follows_the_seed_and_the_mode() -> None:
    ours = MultiheadAttention(E, H, dropout=0.5, batch_first=True)
    x = torch.randn(N, L, E)
    torch.manual_seed(5)
    first, _ = ours(x, x, x, need_weights=False)
    second, _ = ours(x, x, x, need_weights=False)
    torch.manual_seed(5)
    with_weights, _ = ours(x, x, x)
    assert torch.equal(first, with_weights)
    assert not torch.equal(first, second)
    ours.eval()
    output, weights = ours(x, x, x)
    torch.testing.assert_close(weights.sum(-1), torch.ones(N, L))
    assert torch.equal(output, ours(x, x, x)[0])


def test_dropout_of_everything() -> None:
    ours = MultiheadAttention(E, H, dropout=1.0)
    x = torch.randn(L, E)
    output, weights = ours(x, x, x)
    assert torch.equal(output, ours.out_proj.bias.expand(L, E))
    assert not weights.any()
    ours.dropout = 1.5
    for need_weights in (False, True):
        with pytest.raises(ValueError, match=r"fastattn: dropout_p is 1\.5"):
            ours(x, x, x, need_weights=need_weights)
