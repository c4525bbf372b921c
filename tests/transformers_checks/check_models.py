"""Models under fastattn: outputs, gradients and generated tokens are those of eager."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import transformers
from harness import (
    BY_POSITION,
    DECODERS,
    FAMILIES,
    NAME,
    T5_ASKS,
    TOKENS,
    VERSION,
    WINDOW,
    build,
    close,
    compare,
    gradients,
    padding,
    recording,
)
from torch import Tensor


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_decoders_are_eager_and_build_no_matrix_of_masks(name: str, side: str | None, pair: Any) -> None:
    eager, fast = pair(name)
    mask = padding(side)
    real = torch.ones_like(TOKENS).bool() if mask is None else mask.bool()
    record = compare(
        eager, fast, lambda model: model(input_ids=TOKENS, attention_mask=mask, use_cache=False).logits[real]
    )
    assert len(record.calls) == 2
    assert record.dense == 0
    assert record.largest_mask == (1 if side == "left" else 0)
    assert {call["causal"] for call in record.calls} == {"top_left"}
    windows = {call["window"] for call in record.calls}
    expected = {"mistral": {(WINDOW - 1, None)}}.get(name)
    if name in ("gemma2", "gemma3", "gpt-oss"):
        expected = {(WINDOW - 1, None), None}
    assert windows == (expected or {None})


@pytest.mark.parametrize("name", DECODERS)
def test_training_on_a_left_padded_batch(name: str, pair: Any) -> None:
    """In training mode, with the loss that users have. A row of padding predicts the first token: not counted here."""
    eager, fast = pair(name)
    mask = padding("left")
    assert mask is not None
    labels = TOKENS.masked_fill(mask == 0, -100)
    labels[1, 4] = labels[2, 10] = -100
    losses, found = [], []
    for model in (eager, fast):
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        loss = model(input_ids=TOKENS, attention_mask=mask, labels=labels, use_cache=False).loss
        losses.append(loss.detach())
        found.append(gradients(model, loss))
    close(losses[1], losses[0], "the loss")
    for key, gradient in found[0].items():
        close(found[1][key], gradient, f"the gradient of {key}")


def generate(model: Any, inputs: Tensor, **options: Any) -> Tensor:
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0} | options
    with torch.no_grad():
        return model.generate(inputs, **settings)


@pytest.mark.parametrize("length", [12, 3])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_decoders_generate_the_tokens_of_eager(name: str, cache: str, length: int, pair: Any) -> None:
    """Left-padded prompts, longer and shorter than the windows, whose caches so start full or fill up on the way."""
    if length == 3 and name not in ("mistral", "gemma3"):
        length, cache_of = 8, {"dynamic": None, "static": "static"}[cache]
    else:
        cache_of = {"dynamic": None, "static": "static"}[cache]
    eager, fast = pair(name)
    options = {"attention_mask": padding("left", length), "cache_implementation": cache_of}
    wanted = generate(eager, TOKENS[:, :length], **options)
    with recording() as record:
        got = generate(fast, TOKENS[:, :length], **options)
    assert torch.equal(got, wanted)
    assert len(record.calls) == 2 * 6
    assert record.dense == 0
    assert record.largest_mask <= 1


LOOKUP = {"prompt_lookup_num_tokens": 2, "max_matching_ngram_size": 1, "eos_token_id": 98}


@pytest.mark.parametrize(
    ("name", "options"),
    [("llama", {"num_beams": 2}), ("mistral", {"num_beams": 2}), ("llama", LOOKUP)],
    ids=["llama-beams", "mistral-beams", "llama-lookup"],
)
def test_other_ways_to_generate(name: str, options: dict[str, Any], pair: Any) -> None:
    eager, fast = pair(name)
    tokens = TOKENS[:1, :4].repeat(1, 3)  # for the lookup to find something: several queries at a time, with a cache
    with recording() as record:
        got = generate(fast, tokens, **options)
    assert torch.equal(got, generate(eager, tokens, **options))
    assert record.dense == 0
    rows = max(call["q"].shape[2] for call in record.calls)
    assert rows == (12 if "num_beams" in options else 14)  # the prompt, and what was guessed


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_a_static_cache_is_not_read_beyond_what_was_written(name: str, pair: Any) -> None:
    eager, fast = pair(name)

    def steps(model: Any, poison: bool) -> Tensor:
        cache = transformers.StaticCache(config=model.config, max_cache_len=16)
        logits = []
        with torch.no_grad():
            for start, end in ((0, 3), (3, 5), (5, 6), (6, 9)):
                here: dict[str, Any] = {"attention_mask": torch.ones(3, end, dtype=torch.long)}
                if BY_POSITION:
                    here["cache_position"] = torch.arange(start, end)
                logits.append(model(input_ids=TOKENS[:, start:end], past_key_values=cache, **here).logits)
                for layer in cache.layers:
                    if poison and not layer.is_sliding:
                        layer.keys[:, :, end:] = float("nan")
                        layer.values[:, :, end:] = float("nan")
        return torch.cat(logits, dim=1)

    wanted = steps(eager, poison=False)
    with recording() as record:
        got = steps(fast, poison=True)
    close(got, wanted)
    assert record.dense == 0


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_packed_sequences(name: str, pair: Any) -> None:
    """position_ids that start anew: no token sees another sequence, and nothing is built to say so."""
    eager, fast = pair(name)
    positions = torch.cat([torch.arange(n) for n in (5, 1, 6)]).expand(3, -1).clone()
    positions[1] = torch.arange(12)
    record = compare(eager, fast, lambda model: model(input_ids=TOKENS, position_ids=positions, use_cache=False).logits)
    assert [call["function"] for call in record.calls] == ["varlen_attention"] * 2
    assert record.calls[0]["cu_seqlens_q"].tolist() == [0, 5, 6, 12, 24, 29, 30, 36]
    assert record.dense == 0
    with torch.no_grad():
        alone = fast(input_ids=TOKENS[:1, 6:], use_cache=False).logits
        close(fast(input_ids=TOKENS[:1], position_ids=positions[:1], use_cache=False).logits[:, 6:], alone)
        # As a collator for FlashAttention says it, on top of that or on its own.
        ends = torch.tensor([0, 5, 6, 12], dtype=torch.int32)
        said = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 6, "max_length_k": 6}
        close(fast(input_ids=TOKENS[:1], position_ids=positions[:1], use_cache=False, **said).logits[:, 6:], alone)


def test_dropout_is_the_layers_own(pair: Any) -> None:
    model = build("llama", NAME, attention_dropout=0.25)
    with recording() as record:
        model(input_ids=TOKENS)
        model.train()
        torch.manual_seed(3)
        first = model(input_ids=TOKENS).logits
        torch.manual_seed(3)
        again = model(input_ids=TOKENS).logits
        other = model(input_ids=TOKENS).logits
    assert [call["dropout_p"] for call in record.calls] == [0.0] * 2 + [0.25] * 6
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    mask = padding("left")
    found = []
    for checkpointed in (False, True):
        model = build("mistral", NAME).train()
        if checkpointed:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with recording() as record:
            loss = model(input_ids=TOKENS, attention_mask=mask, labels=TOKENS, use_cache=False).loss
            found.append(gradients(model, loss))
        assert len(record.calls) == 4 if checkpointed else 2
        assert record.dense == 0
    for key, gradient in found[0].items():
        close(found[1][key], gradient, f"the gradient of {key}")


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-oss"])
def test_bfloat16_by_the_error_rule(name: str, pair: Any) -> None:
    eager, fast = pair(name)
    mask = padding("left")
    assert mask is not None

    def logits(model: Any, dtype: torch.dtype) -> Tensor:
        with torch.no_grad():
            return copy.deepcopy(model).to(dtype)(input_ids=TOKENS, attention_mask=mask).logits[mask.bool()].double()

    exact = logits(eager, torch.float32)  # float64 would go through a softmax in float32, which makes -inf of its masks
    plain = (logits(eager, torch.bfloat16) - exact).abs()
    got = (logits(fast, torch.bfloat16) - exact).abs()
    unit = torch.finfo(torch.bfloat16).eps * exact.abs().max().item()
    assert got.max() <= 2 * plain.max() + unit
    assert got.square().mean().sqrt() <= 2 * plain.square().mean().sqrt() + unit / 4


# --- Encoders, and decoders that look at them -------------------------------------------------------------------------


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_encoders(name: str, side: str | None, pair: Any) -> None:
    eager, fast = pair(name)
    mask = padding(side)
    real = torch.ones_like(TOKENS).bool() if mask is None else mask.bool()
    record = compare(eager, fast, lambda model: model(input_ids=TOKENS, attention_mask=mask).last_hidden_state[real])
    if VERSION == 4:  # through PyTorch's function, with the model's own mask, that is as long as a row
        assert [call["function"] for call in record.calls] == ["scaled_dot_product_attention"] * 2
        assert {call["attn_mask"].shape for call in record.calls} == {(3, 1, 1, 12)}
        return
    assert [call["function"] for call in record.calls] == ["attention"] * 2
    assert record.dense == 0
    assert record.largest_mask == (1 if side == "left" else 0)
    assert all(("kv_lengths" in call) == (side == "right") for call in record.calls)


def test_vit(pair: Any) -> None:
    eager, fast = pair("vit")
    images = torch.randn(2, 3, 32, 32)
    record = compare(eager, fast, lambda model: model(pixel_values=images).last_hidden_state)
    assert len(record.calls) == 2
    assert not any(call.get("causal") for call in record.calls)


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_decoders(name: str, side: str | None, pair: Any) -> None:
    eager, fast = pair(name)
    mask, targets = padding(side), TOKENS[:, :6]
    late = padding("right", 6)
    assert late is not None

    def forward(model: Any) -> Tensor:
        return model(
            input_ids=TOKENS, attention_mask=mask, decoder_input_ids=targets, decoder_attention_mask=late
        ).logits[late.bool()]

    record = compare(eager, fast, forward)
    assert len(record.calls) == FAMILIES[name].attentions
    if VERSION >= 5 and record.calls:
        assert record.dense == 0
        assert record.largest_mask <= 1
    if name == "t5" and T5_ASKS:  # the gradient of the bias has been compared, too
        assert all(call["bias"].shape[1] == 4 for call in record.calls)
        assert sum(call["bias"].requires_grad for call in record.calls) == 4


def test_whisper(pair: Any) -> None:
    eager, fast = pair("whisper")
    features, targets = torch.randn(2, 8, 40), TOKENS[:2, :6]
    record = compare(eager, fast, lambda model: model(input_features=features, decoder_input_ids=targets).logits)
    assert len(record.calls) == 6
    assert record.dense == 0
    assert sum(bool(call.get("causal")) for call in record.calls) == 2


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_encoder_decoders_generate_the_tokens_of_eager(name: str, cache: str | None, pair: Any) -> None:
    eager, fast = pair(name)
    torch.manual_seed(5)
    inputs = torch.randn(3, 8, 40) if name == "whisper" else TOKENS
    options: dict[str, Any] = {"cache_implementation": cache}
    if name != "whisper":
        options["attention_mask"] = padding("right")
    wanted = generate(eager, inputs, **options)
    with recording() as record:
        assert torch.equal(generate(fast, inputs, **options), wanted)
    assert bool(record.calls) == (FAMILIES[name].attentions > 0)
