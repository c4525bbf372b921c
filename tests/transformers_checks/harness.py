"""What all checks under transformers share: tiny random models, a record of what runs below them, and comparing.

tests/test_transformers.py loads this file as a plugin, for its fixtures. Models are compared with their own eager.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn

assert "transformers" not in sys.modules, "importing fastattn imports transformers"

import transformers  # noqa: E402
from transformers import masking_utils  # noqa: E402

import fastattn.integrations.transformers as integration  # noqa: E402
from fastattn.integrations._native_mask import NativeMask  # noqa: E402

VERSION = int(transformers.__version__.split(".")[0])
# Some things changed between 5.0 and 5.23, the newest that these tests have seen.
BY_POSITION = "cache_position" in inspect.signature(masking_utils.sdpa_mask).parameters
T5_ASKS = "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(transformers.models.t5.modeling_t5)
COLLECTS = VERSION == 4 or integration._collector() is not None  # or GPT-NeoX cannot know that weights are wanted
NAME = integration.NAME
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
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


# --- The attention and the mask function without a model --------------------------------------------------------------


def ask(
    function: Callable[..., Any], Lq: int, Lk: int, q_offset: int, kv_offset: int, *, tensor: bool = False, **more: Any
) -> Any:
    """A mask from transformers' own function or from ours, by this version's arguments."""
    if BY_POSITION:
        where: dict[str, Any] = {"cache_position": torch.arange(q_offset, q_offset + Lq)}
    else:
        where = {"q_length": Lq, "q_offset": torch.tensor(q_offset) if tensor else q_offset}
    return function(batch_size=2, kv_length=Lk, kv_offset=kv_offset, **where, **more)


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
