"""What models pass to the attention function beside q, k, v and the mask."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from harness import (
    COLLECTS,
    TOKENS,
    Layer,
    attend,
    close,
    padding,
    plain,
    tensors,
)

import fastattn.integrations.transformers as integration


def test_every_argument_that_changes_the_result_changes_it() -> None:
    q, k, v = tensors(4, 4)
    lower = torch.ones(4, 4, dtype=torch.bool).tril()
    s = (q @ k.transpose(2, 3)) * 3.0
    capped = (2.0 * torch.tanh(s / 2.0)).masked_fill(~lower, -torch.inf).softmax(-1)
    torch.testing.assert_close(attend(None, q, k, v, scaling=3.0, softcap=2.0), capped @ v)

    sinks = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    extra = torch.cat([s.masked_fill(~lower, -torch.inf), sinks.view(1, 2, 1, 1).expand(2, 2, 4, 1)], dim=3)
    wanted = extra.softmax(-1)[..., :-1] @ v
    got = attend(None, q, k, v, scaling=3.0, s_aux=sinks)
    torch.testing.assert_close(got, wanted)
    (gradient,) = torch.autograd.grad(wanted.square().sum(), sinks)
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), sinks)[0], gradient)

    # A position bias, for more keys than there are, with a float mask and with its gradient.
    bias = torch.randn(1, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    added = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    wanted = (s + bias[..., :4] + added).softmax(-1) @ v
    got = attend(added, q, k, v, scaling=3.0, position_bias=bias)
    torch.testing.assert_close(got, wanted)
    (gradient,) = torch.autograd.grad(wanted.square().sum(), bias)
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), bias)[0], gradient)
    rows = (s[:, :, :2] + bias[:, :, :2, :4]).masked_fill(~lower[:2], -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(attend(None, q[:, :, :2], k, v, scaling=3.0, position_bias=bias[:, :, :2]), rows)

    heads = torch.tensor([0.0, 0.5], dtype=torch.float64).view(1, 2, 1, 1)
    p = s.masked_fill(~lower, -torch.inf).softmax(-1)
    torch.testing.assert_close(attend(None, q, k, v, scaling=3.0, head_mask=heads), (p * heads) @ v)
    with pytest.raises(ValueError, match=r"^fastattn: head_mask has shape \(1, 2, 4, 1\); .*eager"):
        attend(None, q, k, v, head_mask=heads.expand(-1, -1, 4, -1))

    o, weights = integration.attention_forward(Layer(), q, k, v, None, scaling=3.0, output_attentions=True)
    torch.testing.assert_close(weights, p)
    torch.testing.assert_close(o.transpose(1, 2), p @ v)
    # With dropout all rows differ; one query for all sequences is one for each.
    assert not torch.equal(attend(None, q, k, v, dropout=0.5), attend(None, q, k, v))
    learned = attend(None, q[:1], k, v, is_causal=False)
    torch.testing.assert_close(learned, plain(q[:1].expand(2, -1, -1, -1), k, v, torch.ones(4, 4, dtype=torch.bool)))


def test_arguments_that_are_unknown_are_not_ignored_silently() -> None:
    integration._warn_unknown.cache_clear()
    q, k, v = tensors(2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        harmless = {"position_ids": torch.arange(2), "use_cache": True, "cache_position": torch.arange(2)}
        attend(None, q, k, v, num_items_in_batch=3, new_thing=None, other_thing=False, **harmless)
    with pytest.warns(RuntimeWarning, match=r"^fastattn: attention was given the argument new_thing, which"):
        attend(None, q, k, v, new_thing=1.0)
    for name in ("indices", "cache", "sinks", "alibi"):
        with pytest.raises(ValueError, match=rf"^fastattn: {name} is a Tensor; .* is not served: use another"):
            attend(None, q, k, v, **{name: torch.ones(2)})


def test_packed_sequences_that_are_not_served_are_refused() -> None:
    ends = torch.tensor([0, 2, 4], dtype=torch.int32)
    q, k, v = tensors(4, 4, B=1)
    blocks = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2)).bool()
    got = attend(None, q, k, v, is_causal=False, cu_seq_lens_q=ends, cu_seq_lens_k=ends.clone())
    torch.testing.assert_close(got, plain(q, k, v, blocks))
    torch.testing.assert_close(
        attend(None, q, k, v, sliding_window=2, cu_seq_lens_q=ends), plain(q, k, v, blocks.tril().triu(-1))
    )
    for tensors_, more in (
        (tensors(4, 4), {"cu_seq_lens_k": ends}),
        (tensors(4, 6, B=1), {"cu_seq_lens_k": ends}),
        (tensors(4, 4, B=1), {"cu_seq_lens_k": ends + 1}),
    ):
        with pytest.raises(ValueError, match=r"^fastattn: cu_seq_lens_q has 2 sequences, .*: pass them so"):
            attend(None, *tensors_, cu_seq_lens_q=ends, **more)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mistral"] + ["gpt-neox"] * COLLECTS)
def test_weights_are_returned_to_those_who_ask(name: str, pair: Any) -> None:
    eager, fast = pair(name)
    mask = padding("left")
    assert mask is not None
    more = {} if name == "bert" else {"use_cache": False}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", UserWarning)  # transformers 4 says that only eager can
        wanted = eager(input_ids=TOKENS, attention_mask=mask, output_attentions=True, **more).attentions
        got = fast(input_ids=TOKENS, attention_mask=mask, output_attentions=True, **more).attentions
        without = fast(input_ids=TOKENS, attention_mask=mask, **more)
    assert len(got) == len(wanted) == 2
    real = mask.bool()[:, None, :, None]
    for layer, expected in zip(got, wanted, strict=True):
        close(layer * real, expected * real, "a matrix of weights")
    assert without.get("attentions") is None
