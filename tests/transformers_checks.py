"""What must hold of fastattn under the transformers that is importable: tests/test_transformers.py runs it on two.

Models are tiny and random. What they are compared with is their own attn_implementation="eager".
"""

from __future__ import annotations

import copy
import doctest
import inspect
import itertools
import pickle
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn

assert "transformers" not in sys.modules, "importing fastattn imports transformers"

import transformers  # noqa: E402
from transformers import masking_utils  # noqa: E402
from transformers.modeling_utils import AttentionInterface  # noqa: E402

import fastattn.integrations.transformers as integration  # noqa: E402
from fastattn.integrations import _transformers_models as models  # noqa: E402
from fastattn.integrations._native_mask import NativeMask, Rule  # noqa: E402

VERSION = int(transformers.__version__.split(".")[0])
# Some things changed between 5.0 and 5.23, the newest that these tests have seen.
BY_POSITION = "cache_position" in inspect.signature(masking_utils.sdpa_mask).parameters
T5_ASKS = "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(transformers.models.t5.modeling_t5)
COLLECTS = VERSION == 4 or integration._collector() is not None  # or GPT-NeoX cannot know that weights are wanted
NAME = integration.NAME
torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def registered(request: pytest.FixtureRequest) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # test_registration has it
        integration.register()
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\ntransformers {transformers.__version__}")


# --- What runs --------------------------------------------------------------------------------------------------------


@dataclass
class Record:
    """What went on below the models while it was kept."""

    calls: list[dict[str, Any]] = field(default_factory=list)  # arguments of fastattn's functions, by name
    dense: int = 0  # masks that were built with an element for each pair

    @property
    def largest_mask(self) -> int:
        """Elements of a mask for each sequence and key, in the largest of all calls."""
        masks = [call["mask"] for call in self.calls if call.get("mask") is not None]
        return max((mask.shape[1] * mask.shape[2] for mask in masks), default=0)


@contextmanager
def recording() -> Iterator[Record]:
    record = Record()
    monkeypatch = pytest.MonkeyPatch()

    def watch(name: str) -> None:
        function = getattr(fastattn, name)
        signature = inspect.signature(function)

        def watched(*args: Any, **kwargs: Any) -> Any:
            record.calls.append({**signature.bind(*args, **kwargs).arguments, "function": name})
            return function(*args, **kwargs)

        monkeypatch.setattr(fastattn, name, watched)

    def count(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            record.dense += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    for name in ("attention", "varlen_attention", "scaled_dot_product_attention"):
        watch(name)
    count(NativeMask, "dense")
    count(masking_utils, "sdpa_mask")
    try:
        yield record
    finally:
        monkeypatch.undo()


# --- The models -------------------------------------------------------------------------------------------------------

WINDOW = 5
SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
BART = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "dropout": 0.0,
}


@dataclass(frozen=True)
class Family:
    model: str
    config: str
    arguments: dict[str, Any]
    attentions: int = 2  # layers of attention that fastattn must serve
    changes_sinks: bool = False


GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
DECODERS = {
    "llama": Family("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "mistral": Family("MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": WINDOW}),
    "qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 8}),
    "gemma2": Family(
        "Gemma2ForCausalLM", "Gemma2Config", {**GROUPED, **GEMMA, "attn_logit_softcapping": 1.5, "dropout": 0.0}
    ),
    "gemma3": Family("Gemma3ForCausalLM", "Gemma3TextConfig", {**GROUPED, **GEMMA, **LAYERS}),
    "gpt-oss": Family(
        "GptOssForCausalLM",
        "GptOssConfig",
        {
            **GROUPED,
            "head_dim": 8,
            "sliding_window": WINDOW,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "max_position_embeddings": 131072,
        },
        changes_sinks=True,
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": 99,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 128,
            "bos_token_id": 1,
            "eos_token_id": None,
            "attn_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "scale_attn_by_inverse_layer_idx": True,  # which transformers 4 does not pass on
        },
    ),
    "gpt-neox": Family("GPTNeoXForCausalLM", "GPTNeoXConfig", SIZES),
}
BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
OTHERS = {
    "bert": Family("BertModel", "BertConfig", {**SIZES, **BERT}),
    "distilbert": Family(
        "DistilBertModel",
        "DistilBertConfig",
        {
            "vocab_size": 99,
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 48,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
    ),
    "vit": Family(
        "ViTModel",
        "ViTConfig",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "image_size": 32,
            "patch_size": 8,
        },
    ),
    "t5": Family(
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": 99,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
            "dropout_rate": 0.0,
        },
        attentions=6 if T5_ASKS else 0,
    ),
    "bart": Family(
        "BartForConditionalGeneration",
        "BartConfig",
        {**BART, "max_position_embeddings": 64, "eos_token_id": None, "forced_eos_token_id": None},
        attentions=6,
    ),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            **BART,
            "max_source_positions": 20,
            "max_target_positions": 40,
            "num_mel_bins": 8,
            "eos_token_id": 98,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "decoder_start_token_id": 1,
            "begin_suppress_tokens": None,
            "suppress_tokens": None,
        },
        attentions=6,
    ),
}
FAMILIES = DECODERS | OTHERS
_models: dict[tuple[str, str], Any] = {}


def build(name: str, implementation: str, **changes: Any) -> Any:
    family = FAMILIES[name]
    config = getattr(transformers, family.config)(**{**family.arguments, **changes})
    config._attn_implementation = implementation
    torch.manual_seed(0)
    model = getattr(transformers, family.model)(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("sinks"):
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()))
            elif parameter.ndim == 2 and ("q_proj" in key or "k_proj" in key or "query" in key or "key" in key):
                parameter.mul_(10)  # scores far enough apart for masks, caps and windows to show
    return model


@pytest.fixture
def pair() -> Callable[[str], tuple[Any, Any]]:
    """A family's model in eager and in fastattn, with the same weights."""

    def get(name: str) -> tuple[Any, Any]:
        for implementation in ("eager", NAME):
            if (name, implementation) not in _models:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore" if name == "t5" else "error", RuntimeWarning)
                    _models[name, implementation] = build(name, implementation)
        eager, fast = _models[name, "eager"], _models[name, NAME]
        for model in (eager, fast):
            model.eval()
            model.zero_grad()
        return eager, fast

    return get


# --- Comparing --------------------------------------------------------------------------------------------------------

TOKENS = torch.randint(2, 99, (3, 12), generator=torch.Generator().manual_seed(1))


def padding(side: str | None, length: int = 12) -> Tensor | None:
    """A mask of 3 sequences, of which the first is whole."""
    if side is None:
        return None
    mask = torch.ones(3, length, dtype=torch.long)
    mask[1, : length // 3] = 0
    mask[2, : length - 2] = 0
    return mask if side == "left" else mask.flip(1)


def close(fast: Tensor, eager: Tensor, what: str = "") -> None:
    assert fast.isfinite().all(), what
    scale = max(1.0, eager.abs().max().item())
    difference = (fast - eager).abs().max().item()
    assert difference <= 1e-5 * scale, f"{what} is off by {difference:.3g}, where {scale:.3g} is the largest"


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {key: x.grad.clone() for key, x in model.named_parameters() if x.grad is not None}


def compare(eager: Any, fast: Any, forward: Callable[[Any], Tensor]) -> Record:
    """Forward and backward of the two; what fastattn's record says."""
    wanted = forward(eager)
    wanted_gradients = gradients(eager, wanted.square().mean())
    with recording() as record:
        got = forward(fast)
    close(got.detach(), wanted.detach(), "the output")
    got_gradients = gradients(fast, got.square().mean())
    assert got_gradients.keys() == wanted_gradients.keys()
    for key, gradient in wanted_gradients.items():
        close(got_gradients[key], gradient, f"the gradient of {key}")
    return record


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


# --- The mask function ------------------------------------------------------------------------------------------------


def ask(
    function: Callable[..., Any], Lq: int, Lk: int, q_offset: int, kv_offset: int, *, tensor: bool = False, **more: Any
) -> Any:
    """A mask from transformers' own function or from ours, by this version's arguments."""
    if BY_POSITION:
        where: dict[str, Any] = {"cache_position": torch.arange(q_offset, q_offset + Lq)}
    else:
        where = {"q_length": Lq, "q_offset": torch.tensor(q_offset) if tensor else q_offset}
    return function(batch_size=2, kv_length=Lk, kv_offset=kv_offset, **where, **more)


def truth(Lq: int, Lk: int, q_offset: int, kv_offset: int, **more: Any) -> Tensor:
    more = {**more, "allow_is_causal_skip": False}
    return ask(masking_utils.sdpa_mask, Lq, Lk, q_offset, kv_offset, **more)


class Layer(torch.nn.Module):
    """As much of a layer as the attention function looks at."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        vars(self).update(attributes)


def tensors(Lq: int, Lk: int, B: int = 2, H: int = 2, D: int = 8) -> list[Tensor]:
    return [torch.randn(B, H, n, D, dtype=torch.float64) for n in (Lq, Lk, Lk)]


def attend(mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor, layer: Any = None, **more: Any) -> Tensor:
    o, weights = integration.attention_forward(layer or Layer(), q, k, v, mask, **more)
    assert weights is None
    assert o.is_contiguous()
    return o.transpose(1, 2)


def plain(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Attention in plain operations; a row that sees nothing is 0."""
    s = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).masked_fill(~visible, -torch.inf)
    return s.softmax(-1).nan_to_num(0.0) @ v


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


# --- Arguments that change the result ---------------------------------------------------------------------------------


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


# --- Registration -----------------------------------------------------------------------------------------------------


def test_registration() -> None:
    masks, functions = masking_utils.AttentionMaskInterface(), AttentionInterface()
    # The mask under the same name: otherwise transformers passes none at all.
    assert functions[NAME] is integration.attention_forward
    assert masks[NAME] is integration.attention_mask
    # transformers looks for these in a name.
    assert not any(word in NAME for word in ("sdpa", "flash", "eager", "flex", "paged", "/"))
    original = transformers.PreTrainedModel.get_correct_attn_implementation
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert integration.register() == NAME  # the second time: nothing to say, nothing to do
    assert transformers.PreTrainedModel.get_correct_attn_implementation is original
    integration.unregister()
    try:
        assert NAME not in AttentionInterface()
        assert NAME not in masking_utils.AttentionMaskInterface()
        assert not hasattr(transformers.PreTrainedModel.get_correct_attn_implementation, "_fastattn_original")
        integration.unregister()
        with pytest.raises((ValueError, KeyError)):
            build("llama", NAME)
    finally:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            integration.register()
    said = [str(warning.message) for warning in caught]
    assert (len(said) == 1 and "T5" in said[0]) if VERSION == 4 else not said


def test_an_old_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.49.0")  # it changes in sys.modules as it loads
    with pytest.raises(ImportError, match=r"^fastattn: transformers is 4\.49\.0; .* 4\.57 on: pip install"):
        integration.register()


def test_models_can_be_switched_after_they_were_built(pair: Any) -> None:
    eager, _ = pair("llama")
    model = copy.deepcopy(eager)
    wanted = model(input_ids=TOKENS).logits
    model.set_attn_implementation(NAME)
    with recording() as record:
        close(model(input_ids=TOKENS).logits, wanted)
    assert len(record.calls) == 2


@pytest.mark.parametrize("name", FAMILIES)
def test_check_says_what_is_served(name: str, pair: Any) -> None:
    eager, fast = pair(name)
    served = integration.check(fast)
    assert len(served.served) == FAMILIES[name].attentions
    assert bool(served.left) == (FAMILIES[name].attentions == 0)
    assert str(served).startswith(f"served by fastattn: {len(served.served)}\n")
    left = integration.check(eager)
    assert not left.served
    assert left.left
    reasons = set(left.left.values())
    assert all("in its own code" in reason or reason == "its attn_implementation is 'eager'" for reason in reasons)


def test_check_takes_models() -> None:
    with pytest.raises(TypeError, match=r"^fastattn: model is a str; it must be a torch\.nn\.Module\."):
        integration.check("bert")  # type: ignore[arg-type]


def test_models_that_ask_for_nothing_are_named_when_they_are_built() -> None:
    models._warn_bypass.cache_clear()
    config = transformers.BloomConfig(vocab_size=99, hidden_size=32, n_layer=1, n_head=4)
    eager = transformers.BloomModel(config).eval()
    config = copy.deepcopy(config)
    config._attn_implementation = NAME
    with pytest.warns(RuntimeWarning, match=r"^fastattn: BloomModel of transformers \d.* built as \"eager\"") as caught:
        model = transformers.BloomModel(config).eval()
    assert len(caught) == 1
    model.load_state_dict(eager.state_dict())
    mask = padding("left")
    # Left as it is it would add our masks to its scores.
    assert torch.equal(
        model(input_ids=TOKENS, attention_mask=mask).last_hidden_state,
        eager(input_ids=TOKENS, attention_mask=mask).last_hidden_state,
    )
    assert "BloomAttention computes attention in its own code" in str(integration.check(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transformers.BloomModel(config)  # once


def test_a_class_that_looks_at_the_implementation_itself_is_not_called_served() -> None:
    models._warn_bypass.cache_clear()
    config = transformers.FalconConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    config._attn_implementation = NAME
    with pytest.warns(RuntimeWarning, match=r'^fastattn: FalconModel of .* it is built as "eager"'):
        model = transformers.FalconModel(config)
    assert integration.check(model).served == ()
    assert len(integration.check(model).left) == 1


def test_models_with_a_class_for_each_implementation() -> None:
    """Most of transformers 4's BERTs; a few in 5."""

    class SdpaThing(torch.nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, q, q)

    module = types.ModuleType("modeling_of_mine")
    module.THING_ATTENTION_CLASSES = {"eager": torch.nn.Module, "sdpa": SdpaThing}  # type: ignore[attr-defined]
    SdpaThing.__module__ = SdpaThing.__qualname__ = module.__name__
    model_class = type("MyModel", (), {"__module__": module.__name__})
    sys.modules[module.__name__] = module
    try:
        assert models.prepare(model_class)
        layer = module.THING_ATTENTION_CLASSES[NAME]()
        assert type(layer).__name__ == "FastattnThing"
        q = torch.randn(1, 2, 4, 8)
        with recording() as record:
            close(layer(q), F.scaled_dot_product_attention(q, q, q))
        assert len(record.calls) == 1
        assert integration.check(layer).left == {}
        assert isinstance(pickle.loads(pickle.dumps(layer)), SdpaThing)
        module.OTHER_ATTENTION_CLASSES = {"eager": torch.nn.Module}  # type: ignore[attr-defined]
        models._warn_bypass.cache_clear()
        with pytest.warns(RuntimeWarning, match=r'^fastattn: MyModel of .* it is built as "eager"'):
            assert not models.prepare(model_class)
    finally:
        del sys.modules[module.__name__]


@pytest.mark.parametrize("name", ["register", "unregister", "check"])
def test_examples_run(name: str) -> None:
    function = getattr(integration, name)
    test = doctest.DocTestParser().get_doctest(inspect.getdoc(function) or "", {}, name, None, None)
    assert test.examples
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runner.run(test, out=report.append)
            integration.register()
    finally:
        assert runner.summarize(verbose=False).failed == 0, "".join(report)


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
