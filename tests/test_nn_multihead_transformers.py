"""fastattn.nn.MultiheadAttention in PyTorch's transformers, and with the nested tensors that they make."""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any

import pytest
import torch

from fastattn.nn import MultiheadAttention

from .multihead_calls import E, H, L, N, nested

# --- Nested tensors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", [True, False])
def test_nested_tensors_agree_with_torch(average: bool) -> None:
    theirs = torch.nn.MultiheadAttention(E, H, batch_first=True).eval()
    ours = MultiheadAttention(E, H, batch_first=True).eval()
    ours.load_state_dict(theirs.state_dict())
    x = nested(4, 7, 1)
    with torch.no_grad():
        wanted, wanted_weights = theirs(x, x, x, average_attn_weights=average)
        found, weights = ours(x, x, x, average_attn_weights=average)
        assert ours(x, x, x, need_weights=False)[1] is None
    for a, b in zip(found.unbind(), wanted.unbind(), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(weights, wanted_weights)


def test_nested_tensors_in_cross_attention_and_with_gradients() -> None:
    ours = MultiheadAttention(E, H, batch_first=True)
    query, memory = nested(4, 2).requires_grad_(), nested(3, 6).requires_grad_()
    output, _ = ours(query, memory, memory)
    sum(x.square().sum() for x in output.unbind()).backward()
    for i, x in enumerate(output.unbind()):
        q, k = (t.unbind()[i].detach().requires_grad_() for t in (query, memory))
        alone, _ = ours(q, k, k)
        torch.testing.assert_close(x, alone)
        alone.square().sum().backward()
        torch.testing.assert_close(query.grad.unbind()[i], q.grad)
        torch.testing.assert_close(memory.grad.unbind()[i], k.grad)


# --- Transformers -----------------------------------------------------------------------------------------------------


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each call of the module's forward."""
    calls: list[int] = []
    forward = MultiheadAttention.forward

    def count(self: MultiheadAttention, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(MultiheadAttention, "forward", count)
    return calls


PADDING = torch.arange(L) >= torch.tensor([[L], [3], [2]])
CAUSAL = torch.nn.Transformer.generate_square_subsequent_mask(L)


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "batch_second"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
def test_encoder_layers_use_it(monkeypatch: pytest.MonkeyPatch, mode: str, norm_first: bool, batch_first: bool) -> None:
    """Set in by hand. In eval mode without gradients PyTorch would pass self_attn by."""
    theirs = torch.nn.TransformerEncoderLayer(
        E, H, 32, dropout=0.0, batch_first=batch_first, norm_first=norm_first, activation="gelu"
    )
    ours = copy.deepcopy(theirs)
    ours.self_attn = MultiheadAttention(E, H, batch_first=batch_first)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(*((N, L) if batch_first else (L, N)), E)
    for layer in (theirs, ours):
        layer.train(mode == "train")
    calls = counted(monkeypatch)
    for padding, mask, is_causal in itertools.product((None, PADDING), (None, CAUSAL), (False, True)):
        if is_causal and mask is None:
            continue
        calls.clear()
        options: dict[str, Any] = {"src_key_padding_mask": padding, "src_mask": mask, "is_causal": is_causal}
        with torch.set_grad_enabled(mode != "no_grad"), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a bool and a float mask
            wanted, found = theirs(x, **options), ours(x, **options)
        assert len(calls) == 1
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("enable_nested_tensor", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
def test_encoders_use_it(monkeypatch: pytest.MonkeyPatch, mode: str, enable_nested_tensor: bool) -> None:
    """The conversion to nested tensors included, whose padding comes back as zeros."""
    layer = torch.nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True)
    theirs = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=enable_nested_tensor)
    layer.self_attn = MultiheadAttention(E, H, batch_first=True)
    ours = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=enable_nested_tensor)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(N, L, E)
    for encoder in (theirs, ours):
        encoder.train(mode == "train")
    calls = counted(monkeypatch)
    for padding, mask in itertools.product((None, PADDING), (None, CAUSAL)):
        calls.clear()
        with torch.set_grad_enabled(mode != "no_grad"), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            wanted, found = (encoder(x, mask=mask, src_key_padding_mask=padding) for encoder in (theirs, ours))
        assert len(calls) == 2
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
