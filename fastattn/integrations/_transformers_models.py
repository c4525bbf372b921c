"""Which layers of Hugging Face transformers' models can be served, what that takes, and which ones are."""

from __future__ import annotations

import functools
import inspect
import re
import sys
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import fastattn

# transformers looks for "sdpa", "flash", "eager" and "/" in such names, and means something by them.
NAME = "fastattn"


# --- Models of transformers 4 that have a class of layers for each implementation ------------------------------------


class _SdpaHere(TorchFunctionMode):
    """Calls of PyTorch's scaled_dot_product_attention in this thread are fastattn's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            func = fastattn.scaled_dot_product_attention
            mask = kwargs.get("attn_mask")
            if mask is not None and mask.ndim == 2:  # DistilBERT hands on the user's own: (B, Lk), 1 = keep
                kwargs = {**kwargs, "attn_mask": (mask != 0)[:, None, None, :]}
        return func(*args, **kwargs)


@functools.cache
def _on_fastattn(sdpa_class: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """The class for a model's layers on SDPA, with fastattn's in its place."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _SdpaHere():
            return sdpa_class.forward(self, *args, **kwargs)

    name = sdpa_class.__name__.replace("Sdpa", "Fastattn")
    members = {
        "forward": forward,
        "__module__": sdpa_class.__module__,
        "__doc__": sdpa_class.__doc__,
        "_fastattn": True,
    }
    made = type(name, (sdpa_class,), members)
    setattr(sys.modules[sdpa_class.__module__], name, made)  # where pickle looks for it
    return made


# Modules such as transformers.models.bert.modeling_bert have BERT_SELF_ATTENTION_CLASSES["sdpa"].
_CLASSES = re.compile(r"[A-Z0-9_]+_ATTENTION_CLASSES")
# How a layer's code computes attention, or asks for a function that does.
_COMPUTES = re.compile(r"[sS]oftmax\(|scaled_dot_product_attention\(|_ATTENTION_FUNCTIONS?\b")
_ASKS = "_ATTENTION_FUNCTIONS"
_LAYER = re.compile(r"^class \w*Attention\w*\(", re.MULTILINE)


def prepare(model_class: type) -> bool:
    """Before the layers of a model are built: make the classes that it needs. False: its layers cannot be served."""
    module = sys.modules.get(model_class.__module__)
    if module is None:
        return True
    tables = [x for name, x in vars(module).items() if _CLASSES.fullmatch(name) and isinstance(x, dict)]
    # A class for both, such as Falcon's, looks at the name of the implementation itself.
    served = all("sdpa" in table and table["sdpa"] is not table.get("eager") for table in tables)
    code = _code_of(module)
    if tables and served:
        for table in tables:
            table.setdefault(NAME, _on_fastattn(table["sdpa"]))
        return True
    if not tables and (_ASKS in code or not _COMPUTES.search(code) or not _LAYER.search(code)):
        return True
    _warn_bypass(model_class)
    return False


@functools.cache
def _code_of(module_or_class: Any) -> str:
    try:
        return inspect.getsource(module_or_class)
    except (OSError, TypeError):
        return ""


@functools.cache
def _warn_bypass(model_class: Any) -> None:
    from transformers import __version__

    warnings.warn(
        f"fastattn: {model_class.__name__} of transformers {__version__} computes attention in its own code, with"
        f' no place for another: instead of "{NAME}" it is built as "eager".'
        " fastattn.integrations.transformers.check(model) lists such layers.",
        RuntimeWarning,
        stacklevel=7,
    )


# --- What is served ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ServedAttention:
    """Which attention layers of a model fastattn computes. The name of the model itself is ""."""

    served: tuple[str, ...]
    left: dict[str, str]  # the others, with the reason

    def __str__(self) -> str:
        lines = [f"served by fastattn: {len(self.served)}", f"left to transformers: {len(self.left)}"]
        lines += [f"  {name or '(the model itself)'}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def check(model: torch.nn.Module) -> ServedAttention:
    """Which attention layers of a transformers model fastattn serves, and which not, with the reason.

    It reads the code of every module whose class is called an attention, and runs nothing. A layer is served when its
    code asks for the model's attn_implementation and that is "fastattn", or when its class was made by fastattn (models
    of transformers 4 with a class for each implementation).

    Args:
        model: A model of transformers, or any module that has some in it.

    Raises:
        TypeError: model is no torch.nn.Module.

    Example:
        >>> import fastattn.integrations.transformers as integration
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
        >>> config._attn_implementation = integration.register()
        >>> integration.check(BertModel(config)).served
        ('encoder.layer.0.attention.self', 'encoder.layer.1.attention.self')
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"fastattn: model is a {type(model).__name__}; it must be a torch.nn.Module.")
    served, left = [], {}
    for name, module in model.named_modules():
        kind: Any = type(module)
        if "attention" in kind.__name__.lower() and _COMPUTES.search(code := _code_of_layer(kind)):
            reason = _why_left(module, code)
            if reason is None:
                served.append(name)
            else:
                left[name] = reason
    return ServedAttention(tuple(served), left)


def _code_of_layer(layer_class: Any) -> str:
    """The source of a class, and of those that it has its forward from."""
    texts = []
    for base in layer_class.__mro__:
        if base is torch.nn.Module:
            break
        texts.append(_code_of(base))
        if "forward" in vars(base) and texts[-1]:
            break
    return "\n".join(texts)


def _why_left(module: torch.nn.Module, code: str) -> str | None:
    if hasattr(type(module), "_fastattn"):
        return None
    if _ASKS not in code:
        return f"{type(module).__name__} computes attention in its own code"
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return None if implementation == NAME else f"its attn_implementation is {implementation!r}"
