"""fastattn.nn.MultiheadAttention in the place of torch.nn.MultiheadAttention, in a model that exists."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.nn.utils import parametrize

from fastattn import _cuda
from fastattn.nn import multihead
from fastattn.nn.multihead import MultiheadAttention

Model = TypeVar("Model", bound=torch.nn.Module)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class ServedModules:
    """Which attention modules of a model fastattn computes.

    A module that stands in several places of the model counts once, under its first name. The name of the model itself
    is "".
    """

    served: tuple[str, ...]  # names of those that are fastattn.nn.MultiheadAttention
    left: dict[str, str]  # names of the other torch.nn.MultiheadAttention, with the reason why they cannot be replaced
    replaceable: tuple[str, ...]  # names of those that replace_modules would replace

    def __str__(self) -> str:
        lines = [
            f"served by fastattn: {len(self.served)}",
            f"left to PyTorch: {len(self.left) + len(self.replaceable)}",
        ]
        lines += [f"  {name or '(the model itself)'}: {reason}" for name, reason in self.left.items()]
        lines += [f"  {name or '(the model itself)'}: can be replaced" for name in self.replaceable]
        return "\n".join(lines)


def replace_modules(model: Model) -> Model:
    """Make every torch.nn.MultiheadAttention in a model a fastattn.nn.MultiheadAttention, in place.

    The modules stay the objects that they are, and change their class: parameters, buffers, hooks, parametrizations,
    training mode, device and whoever holds a reference to one stay as they were; optimizers go on; state dicts are the
    same. A module that the model uses in several places is served in all of them. Subclasses of
    torch.nn.MultiheadAttention that have its forward are served too, and remain instances of their class. A second call
    does nothing. So does a call for modules that are replaced already.

    torch.nn.TransformerEncoderLayer, TransformerDecoderLayer and Transformer use what was replaced, in training and in
    eval mode: the path of TransformerEncoderLayer in eval mode that passes its self_attn by is not taken.

    Modules that cannot be served are left as they are, and one warning names them with the reason: those with a forward
    of their own, be it the class's (as quantizable ones have) or the instance's, those whose out_proj is no plain
    linear layer (quantized ones), parameters of other types than float32, bfloat16, float16 and float64, and on CUDA
    what the kernels do not take. It also warns when there is no torch.nn.MultiheadAttention in the model at all.

    Args:
        model: Any module. Itself a torch.nn.MultiheadAttention, it is replaced too.

    Returns:
        The model. `served_modules(model)` says how many of its modules are served, and which.

    Raises:
        TypeError: model is no torch.nn.Module.

    Example:
        >>> import torch, fastattn
        >>> layer = torch.nn.TransformerEncoderLayer(d_model=64, nhead=4, batch_first=True)
        >>> model = fastattn.replace_modules(torch.nn.TransformerEncoder(layer, num_layers=2))
        >>> fastattn.served_modules(model).served
        ('layers.0.self_attn', 'layers.1.self_attn')
        >>> model(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])
    """
    found = False
    left = {}
    for name, module in _attention_modules(model):
        found = True
        if isinstance(module, MultiheadAttention):
            continue
        reason = _obstacle(module)
        if reason is None:
            _change_class(module, _served_class)
            multihead.mark(module)
        else:
            left[name] = reason
    if left:
        listed = "; ".join(f"{name or 'the model itself'}: {reason}" for name, reason in left.items())
        warnings.warn(
            f"fastattn: replace_modules left {len(left)} attention modules to PyTorch: {listed}.", stacklevel=2
        )
    elif not found:
        warnings.warn(
            f"fastattn: replace_modules found no torch.nn.MultiheadAttention in the {type(model).__name__}; models with"
            " attention of their own may call scaled_dot_product_attention: see fastattn.replace_sdpa.",
            stacklevel=2,
        )
    return model


def restore_modules(model: Model) -> Model:
    """Undo `replace_modules`: every fastattn.nn.MultiheadAttention in a model becomes PyTorch's, in place.

    Those that were constructed as fastattn.nn.MultiheadAttention become torch.nn.MultiheadAttention as well, with the
    same parameters. Subclasses of fastattn's class that somebody wrote are left, with a warning.

    Args:
        model: Any module.

    Returns:
        The model.

    Raises:
        TypeError: model is no torch.nn.Module.

    Example:
        >>> import torch, fastattn
        >>> module = fastattn.replace_modules(torch.nn.MultiheadAttention(64, 4))
        >>> type(fastattn.restore_modules(module)) is torch.nn.MultiheadAttention
        True
    """
    left = []
    for name, module in _attention_modules(model):
        if not isinstance(module, MultiheadAttention):
            continue
        if _restored_class(_plain_class(module)) is None:
            left.append(f"{name or 'the model itself'} ({type(module).__name__})")
        else:
            _change_class(module, _restored_class)
            multihead.unmark(module)
    if left:
        warnings.warn(
            "fastattn: restore_modules left subclasses of fastattn.nn.MultiheadAttention, for PyTorch has no class in"
            f" their place: {', '.join(left)}.",
            stacklevel=2,
        )
    return model


def served_modules(model: torch.nn.Module) -> ServedModules:
    """Which attention modules of a model fastattn serves, and which not, with the reason.

    Args:
        model: Any module, before or after `replace_modules`.

    Raises:
        TypeError: model is no torch.nn.Module.

    Example:
        >>> import torch, fastattn
        >>> decoder = torch.nn.TransformerDecoderLayer(64, 4)
        >>> print(fastattn.served_modules(fastattn.replace_modules(decoder)))
        served by fastattn: 2
        left to PyTorch: 0
    """
    served, replaceable, left = [], [], {}
    for name, module in _attention_modules(model):
        if isinstance(module, MultiheadAttention):
            served.append(name)
        elif (reason := _obstacle(module)) is not None:
            left[name] = reason
        else:
            replaceable.append(name)
    return ServedModules(tuple(served), left, tuple(replaceable))


def _attention_modules(model: Any) -> Iterator[tuple[str, torch.nn.MultiheadAttention]]:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"fastattn: model is a {type(model).__name__}; it must be a torch.nn.Module.")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.MultiheadAttention):
            yield name, module


def _obstacle(module: torch.nn.MultiheadAttention) -> str | None:
    """Why a module cannot be served; None = it can."""
    if type(module).forward is not torch.nn.MultiheadAttention.forward:
        return f"{type(module).__name__} has a forward of its own"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    weight = _weight(module.out_proj)
    if weight is None:
        cls = type(module.out_proj)
        return f"its out_proj is a {cls.__module__}.{cls.__name__}, which is no torch.nn.Linear"
    if weight.dtype not in _DTYPES:
        return f"its parameters are {weight.dtype}"
    if weight.is_cuda:
        if (obstacle := _cuda.obstacle(weight.device.index)) is not None:
            return obstacle
        if weight.dtype == torch.float64:
            return "its parameters are torch.float64 on CUDA"
        if module.head_dim > _cuda.MAX_HEAD_DIM:
            return f"its head dimension is {module.head_dim}, above {_cuda.MAX_HEAD_DIM} on CUDA"
    return None


def _weight(out_proj: Any) -> torch.Tensor | None:
    """The weight of a linear layer. A quantized one has it packed, and a method in its place."""
    weight = getattr(out_proj, "weight", None)
    return weight if isinstance(out_proj, torch.nn.Linear) and isinstance(weight, torch.Tensor) else None


# --- Classes ---------------------------------------------------------------------------------------------------------


@functools.cache
def _served_class(cls: type) -> type:
    """The class for a module of class cls: fastattn's, or for a subclass of PyTorch's one between the two."""
    if cls is torch.nn.MultiheadAttention:
        return MultiheadAttention
    # cls comes first: what it overrides stays overridden, and its super() is fastattn's class.
    namespace = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": _reduce,
        "_fastattn_replaced": cls,
    }
    return type(cls.__name__, (cls, MultiheadAttention), namespace)


def _restored_class(cls: type) -> type | None:
    """The inverse of _served_class; None for a class that is not one of its values."""
    return torch.nn.MultiheadAttention if cls is MultiheadAttention else vars(cls).get("_fastattn_replaced")


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    """How an instance of a class that _served_class made is pickled and copied: by the class that was replaced."""
    # Python 3.10's objects have no __getstate__; where there is one, it may refuse, as a parametrized module's does.
    state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
    return _new, (type(self)._fastattn_replaced,), state


def _new(replaced: type) -> Any:
    cls: Any = _served_class(replaced)
    return cls.__new__(cls)


def _plain_class(module: torch.nn.Module) -> type:
    """The module's class without the one that torch.nn.utils.parametrize put over it."""
    return parametrize.type_before_parametrizations(module)


def _change_class(module: torch.nn.Module, change: Any) -> None:
    """Gives a module the class change(its class)."""
    cls = type(module)
    plain = _plain_class(module)
    if cls is plain:
        module.__class__ = change(cls)
        return
    # The class that parametrize made holds a property for each parametrized tensor, and expects its base to be the
    # plain class: it is made once more, over the other one.
    namespace = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    base = change(plain)
    module.__class__ = type(f"Parametrized{base.__name__}", (base,), namespace)
