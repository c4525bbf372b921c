"""The mask function; masks of the user's own, and none."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import (
    NAME,
    TOKENS,
    VERSION,
    Layer,
    ask,
    attend,
    build,
    close,
    padding,
    plain,
    recording,
    tensors,
)
from torch import Tensor
from transformers import masking_utils

import fastattn.integrations.transformers as integration
from fastattn.integrations._native_mask import NativeMask, Rule


def truth(Lq: int, Lk: int, q_offset: int, kv_offset: int, **more: Any) -> Tensor:
    more = {**more, "allow_is_causal_skip": False}
    return ask(masking_utils.sdpa_mask, Lq, Lk, q_offset, kv_offset, **more)


PATTERNS: dict[str, Callable[[], Any]] = {
    "causal": lambda: masking_utils.causal_mask_function,
    "window1": lambda: masking_utils.sliding_window_causal_mask_function(1),
    "window3": lambda: masking_utils.sliding_window_causal_mask_function(3),
}
if hasattr(masking_utils, "bidirectional_mask_function"):
    PATTERNS["bidirectional"] = lambda: masking_utils.bidirectional_mask_function
if hasattr(masking_utils, "sliding_window_bidirectional_mask_function"):
    PATTERNS["both1"] = lambda: masking_utils.sliding_window_bidirectional_mask_function(1)
    PATTERNS["both2"] = lambda: masking_utils.sliding_window_bidirectional_mask_function(2)
SIDES = ("none", "left", "right", "holes", "short")


def tokens_kept(side: str, positions: int) -> Tensor | None:
    keep = torch.ones(2, positions, dtype=torch.bool)
    if side == "none":
        return None
    if side == "left":
        keep[0, : positions // 2] = False
    elif side == "right":
        keep[0, positions - positions // 2 :] = False
    elif side == "holes":
        keep[:, 1::2] = False
    else:  # fewer than the keys of a static cache, as generate() passes them
        keep = keep[:, : max(1, positions - 2)]
    return keep


@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_say_what_those_of_transformers_say(pattern: str) -> None:
    """Over all small sizes: prefill, steps with dynamic, static and sliding caches, padding of all kinds.

    The mask is compared element by element, and what attention makes of it with poison in every key that no row sees.
    """
    native = 0
    for Lq, past, room, dropped, side in itertools.product((1, 3), (0, 1, 5), (0, 3), (0, 1), SIDES):
        if dropped and (past == 0 or room):
            continue
        Lk = past + Lq + room - dropped
        more = {"mask_function": PATTERNS[pattern](), "attention_mask": tokens_kept(side, past + Lq + room)}
        wanted = truth(Lq, Lk, past, dropped, **more).expand(2, 1, Lq, Lk)
        q, k, v = tensors(Lq, Lk)
        unseen = ~wanted.any(dim=2).squeeze(1)
        poisoned = [x.masked_fill(unseen[:, None, :, None], torch.nan) for x in (k, v)]
        o = plain(q, k, v, wanted)
        # A static cache has its length in a tensor, and masks for it must not depend on numbers that change.
        for static in (False, True):
            more["allow_is_causal_skip"] = not static
            got = ask(integration.attention_mask, Lq, Lk, past, dropped, tensor=static, **more)
            case = f"{Lq=} {past=} {room=} {dropped=} {side=} {static=}"
            assert tuple(got.shape) == (2, 1, Lq, Lk), case
            assert got.dtype == torch.bool
            is_native = isinstance(got, NativeMask)
            assert is_native or pattern.startswith("both"), case
            native += is_native
            assert torch.equal(got.dense() if isinstance(got, NativeMask) else got, wanted), case
            with recording() as record:
                torch.testing.assert_close(attend(got, q, *poisoned), o, msg=case)
            assert not is_native or record.dense == 0, case
    assert native > 50


def test_what_is_no_interval_is_a_matrix() -> None:
    more = {"attention_mask": torch.ones(2, 6, dtype=torch.bool)}

    def every_third(b: Any, h: Any, q: Any, k: Any) -> Any:
        return k % 3 == 0

    causal = masking_utils.causal_mask_function
    functions = [
        masking_utils.or_masks(causal, every_third),
        masking_utils.and_masks(causal, every_third),
        masking_utils.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.long)),
    ]
    if hasattr(masking_utils, "blockwise_overlay"):
        blocks = torch.tensor([[-1, 0, 0, 0, 1, 1], [-1] * 6])
        functions.append(masking_utils.or_masks(causal, masking_utils.blockwise_overlay(blocks)))
    for function in functions:
        mask = ask(integration.attention_mask, 6, 6, 0, 0, mask_function=function, **more)
        assert not isinstance(mask, NativeMask)
        wanted = truth(6, 6, 0, 0, mask_function=function, **more)
        assert torch.equal(mask, wanted)
        q, k, v = tensors(6, 6)
        torch.testing.assert_close(attend(mask, q, k, v), plain(q, k, v, wanted))


def test_packed_and_windowed_at_once() -> None:
    ids = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 2]])
    window = masking_utils.sliding_window_causal_mask_function(2)
    function = masking_utils.and_masks(window, masking_utils.packed_sequence_mask_function(ids))
    mask = ask(integration.attention_mask, 6, 6, 0, 0, mask_function=function)
    assert isinstance(mask, NativeMask)
    wanted = truth(6, 6, 0, 0, mask_function=function)
    assert torch.equal(mask.dense(), wanted)
    q, k, v = tensors(6, 6)
    sinks = torch.zeros(2, dtype=torch.float64)
    with recording() as record:
        o = attend(mask, q, k, v, s_aux=sinks)
    assert [call["function"] for call in record.calls] == ["varlen_attention"]
    assert record.dense == 0
    extra = torch.cat([q @ k.transpose(2, 3) / 8**0.5, sinks.view(1, 2, 1, 1).expand(2, 2, 6, 1)], dim=3)
    keep = F.pad(wanted.expand(2, 2, 6, 6), (0, 1), value=True)
    torch.testing.assert_close(o, extra.masked_fill(~keep, -torch.inf).softmax(-1)[..., :-1] @ v)
    # With a bias for each pair, or for the weights, the sequences become a mask.
    bias = torch.randn(1, 2, 6, 6, dtype=torch.float64)
    s = (q @ k.transpose(2, 3) / 8**0.5 + bias).masked_fill(~wanted, -torch.inf).softmax(-1)
    torch.testing.assert_close(attend(mask, q, k, v, position_bias=bias), s @ v)
    o, weights = integration.attention_forward(Layer(), q, k, v, mask, position_bias=bias, output_attentions=True)
    torch.testing.assert_close(weights, s)


def test_native_masks_survive_what_models_do_to_masks() -> None:
    for more in ({}, {"attention_mask": tokens_kept("left", 9)}, {"attention_mask": tokens_kept("right", 9)}):
        mask = ask(integration.attention_mask, 5, 9, 0, 0, mask_function=PATTERNS["window3"](), **more)
        wanted = mask.dense()
        with recording() as record:
            same = [mask[:, :, :, :9], mask[..., :20], mask.detach(), mask.clone(), mask.contiguous(), mask.to("cpu")]
            same += [mask.to(torch.bool), mask.to(device="cpu", dtype=torch.bool), mask[:]]
            short = [mask[:, :, :, :n] for n in (0, 4, 5, 7)] + [mask[..., :-2]]
        assert record.dense == 0
        assert all(isinstance(x, NativeMask) for x in same + short)
        assert all(torch.equal(x.dense(), wanted) for x in same)
        for x in short:
            assert torch.equal(x.dense(), wanted[..., : x.shape[3]])
            q, k, v = tensors(5, x.shape[3])
            torch.testing.assert_close(attend(x, q, k, v), plain(q, k, v, x.dense()))
        others: list[Callable[[Tensor], Tensor]] = [
            lambda x: x + 1.0,
            lambda x: ~x,
            lambda x: torch.where(x, 0.0, -1.0),
            lambda x: x[:, :, 1:3, 2:],
            lambda x: x[:1],
            lambda x: x.expand(-1, 4, -1, -1),
            lambda x: x.to(torch.float32),
            lambda x: torch.cat([x, x], dim=-1),
            lambda x: x & torch.ones_like(x, dtype=torch.bool),
            lambda x: x.all(dim=-1),
        ]
        for change in others:
            assert torch.equal(change(mask), change(wanted))
        # Code that adds it to scores means the float mask of "eager", and not ones.
        scores = torch.randn(2, 4, 5, 9)
        added = torch.zeros(()).where(wanted, torch.finfo(torch.float32).min)
        assert torch.equal(scores + mask, scores + added)
        assert torch.equal(mask + scores, scores + added)
        assert torch.equal(scores.clone().add_(mask), scores + added)
        assert "Rule(" in repr(mask)


def test_a_mask_for_more_keys_than_there_are_and_for_other_rows() -> None:
    mask = ask(integration.attention_mask, 4, 9, 2, 0)
    q, k, v = tensors(4, 7)
    torch.testing.assert_close(attend(mask, q, k, v), plain(q, k, v, mask.dense()[..., :7]))
    for shape in ((3, 9), (4, 10)):
        with pytest.raises(
            ValueError, match=r"^fastattn: attention_mask has shape \(2, 1, 4, 9\); .* other lengths\.$"
        ):
            attend(mask, *tensors(*shape))
    packed = masking_utils.packed_sequence_mask_function(torch.tensor([[0, 0, 1, 1]]).expand(2, -1))
    function = masking_utils.and_masks(masking_utils.causal_mask_function, packed)
    mask = ask(integration.attention_mask, 4, 4, 0, 0, mask_function=function)
    with pytest.raises(ValueError, match=r"^fastattn: attention_mask has shape \(2, 1, 4, 4\); packed sequences"):
        attend(mask, *tensors(4, 5))


def test_graphs_take_native_masks_and_are_not_made_anew_at_each_step() -> None:
    torch._dynamo.reset()
    graphs = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    layer = Layer()

    @torch.compile(backend=backend, fullgraph=True)
    def step(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return integration.attention_forward(layer, q, k, v, mask, is_causal=True)[0]

    q, k, v = tensors(1, 9)
    for past in (3, 4, 5):
        more = {"attention_mask": tokens_kept("left", 9)}
        mask = ask(integration.attention_mask, 1, 9, past, 0, tensor=True, allow_is_causal_skip=False, **more)
        assert isinstance(mask, NativeMask)
        torch.testing.assert_close(step(q, k, v, mask).transpose(1, 2), plain(q, k, v, truth(1, 9, past, 0, **more)))
    assert graphs == 1


def test_a_whole_model_in_one_graph() -> None:
    torch._dynamo.reset()
    fast = build("mistral", NAME, num_hidden_layers=1)
    mask = padding("left")
    compiled = torch.compile(
        lambda tokens, mask: fast(input_ids=tokens, attention_mask=mask, use_cache=False).logits,
        backend="eager",
        fullgraph=True,
    )
    with torch.no_grad():
        close(compiled(TOKENS, mask), fast(input_ids=TOKENS, attention_mask=mask, use_cache=False).logits)


def test_rules_say_which_of_them_are_native() -> None:
    def native(Lq: int, Lk: int, offset: int | None, causal: bool, right: int | None = None) -> bool:
        return Rule(1, Lq, Lk, offset, causal, None, right).is_native

    assert native(4, 4, 0, True)
    assert native(4, 2, 0, True)  # top-left
    assert native(2, 6, 3, True)
    assert not native(2, 4, 3, True)  # the last row would stand beyond the last key
    assert not native(2, 4, -1, True)
    assert native(2, 4, -1, False)  # without a diagonal
    assert native(2, 4, 2, False, 1)
    assert not native(2, 5, 2, False, 1)


# --- Without a mask, or with one of the user's ------------------------------------------------------------------------


def test_without_a_mask_transformers_rule_of_causal_order_holds() -> None:
    q, k, v = tensors(4, 4)
    lower = torch.ones(4, 4, dtype=torch.bool).tril()
    everything = torch.ones(4, 4, dtype=torch.bool)
    torch.testing.assert_close(attend(None, q, k, v), plain(q, k, v, lower))  # a layer that says nothing is causal
    torch.testing.assert_close(attend(None, q, k, v, Layer(is_causal=True)), plain(q, k, v, lower))
    torch.testing.assert_close(attend(None, q, k, v, Layer(is_causal=False)), plain(q, k, v, everything))
    # The argument counts for more than the layer.
    torch.testing.assert_close(attend(None, q, k, v, Layer(is_causal=False), is_causal=True), plain(q, k, v, lower))
    torch.testing.assert_close(
        attend(None, q, k, v, Layer(is_causal=True), is_causal=False), plain(q, k, v, everything)
    )
    # One row sees all keys; several of them, in a static cache, are the first ones: top-left.
    torch.testing.assert_close(attend(None, q[:, :, :1], k, v), plain(q[:, :, :1], k, v, everything[:1]))
    k[:, :, 2:] = v[:, :, 2:] = torch.nan
    first = plain(q[:, :, :2], k[:, :, :2], v[:, :, :2], lower[:2, :2])
    torch.testing.assert_close(attend(None, q[:, :, :2], k, v), first)
    # A mask, native or not, says it all: is_causal adds nothing to it.
    q, k, v = tensors(4, 4)
    mask = everything[None, None]
    torch.testing.assert_close(attend(mask, q, k, v, is_causal=True), plain(q, k, v, everything))


def test_without_a_mask_sliding_windows_count() -> None:
    q, k, v = tensors(6, 6)
    i, j = torch.arange(6)[:, None], torch.arange(6)
    window = (j <= i) & (j > i - 3)
    torch.testing.assert_close(attend(None, q, k, v, sliding_window=3), plain(q, k, v, window))
    torch.testing.assert_close(attend(None, q[:, :, 5:], k, v, sliding_window=3), plain(q[:, :, 5:], k, v, window[5:]))
    both = attend(None, q, k, v, sliding_window=3, is_causal=False)
    torch.testing.assert_close(both, plain(q, k, v, (j - i).abs() < 3))
    everything = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    torch.testing.assert_close(attend(everything, q, k, v, sliding_window=3), plain(q, k, v, everything))


@pytest.mark.parametrize("kind", ["bool", "float", "finite", "heads", "longer"])
def test_masks_of_the_users_own(kind: str, pair: Any) -> None:
    eager, fast = pair("llama")
    keep = torch.rand(3, 1, 12, 12) < 0.6
    keep |= torch.eye(12, dtype=torch.bool)
    added = torch.zeros(3, 1, 12, 12).masked_fill(
        ~keep, -torch.inf if kind == "float" else torch.finfo(torch.float32).min
    )
    if kind == "finite":
        added[0, :, 3] = torch.finfo(torch.float32).min  # wholly masked by a finite value: eager makes it uniform
    if kind == "heads":
        added = added + torch.randn(3, 4, 12, 12)
    if kind == "longer":
        added = F.pad(added, (0, 3), value=1e3)[..., :12] if VERSION >= 5 else F.pad(added, (0, 3), value=1e3)
    with torch.no_grad():
        wanted = eager(input_ids=TOKENS, attention_mask=added, use_cache=False).logits
        mask = keep if kind == "bool" else added
        got = fast(input_ids=TOKENS, attention_mask=mask, use_cache=False).logits
    close(got, wanted)


def test_masks_that_are_none_are_refused() -> None:
    q, k, v = tensors(4, 4)
    with pytest.raises(ValueError, match=r"^fastattn: attention_mask has 2 dimensions; .* \(B, Lk\) to the model"):
        attend(torch.ones(2, 4), q, k, v)
    with pytest.raises(TypeError, match=r"^fastattn: attention_mask is torch\.int64; .* attention_mask\.bool\(\)"):
        attend(torch.ones(2, 1, 4, 4, dtype=torch.long), q, k, v)
    longer = torch.ones(2, 1, 4, 6, dtype=torch.bool)
    torch.testing.assert_close(attend(longer, q, k, v), plain(q, k, v, longer[..., :4]))


def test_rows_of_padding_are_zero_and_not_nan() -> None:
    keep = torch.tensor([[False, False, True, True], [True] * 4])
    q, k, v = (x.requires_grad_() for x in tensors(4, 4))
    o = attend(ask(integration.attention_mask, 4, 4, 0, 0, attention_mask=keep), q, k, v)
    assert not o[0, :, :2].any()
    o.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))
