"""Registration, and which layers of which models are served."""

from __future__ import annotations

import copy
import doctest
import inspect
import pickle
import sys
import types
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from harness import (
    FAMILIES,
    NAME,
    TOKENS,
    VERSION,
    build,
    close,
    padding,
    recording,
)
from torch import Tensor
from transformers import masking_utils
from transformers.modeling_utils import AttentionInterface

import fastattn.integrations.transformers as integration
from fastattn.integrations import _transformers_models as models


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
