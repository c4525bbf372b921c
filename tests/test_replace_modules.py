"""fastattn.replace_modules, restore_modules and served_modules."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrize, prune

import fastattn
from fastattn import _cuda, _replace
from fastattn.nn import MultiheadAttention

E, H, L, N = 16, 4, 5, 3


class Doubling(torch.nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Named(torch.nn.MultiheadAttention):
    """A subclass that leaves forward alone."""

    def __init__(self, name: str) -> None:
        super().__init__(E, H, batch_first=True)
        self.name = name

    def greet(self) -> str:
        return f"I am {self.name}"


class NamedTwice(Named):
    """A subclass of that."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.was_loaded = True


class Own(torch.nn.MultiheadAttention):
    """A subclass with a forward of its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class Ours(MultiheadAttention):
    """A subclass of fastattn's."""


def attention(**options: Any) -> torch.nn.MultiheadAttention:
    return torch.nn.MultiheadAttention(E, H, batch_first=True, **options)


def output(module: torch.nn.Module, x: Tensor) -> Tensor:
    return module(x, x, x)[0]


# --- Models ----------------------------------------------------------------------------------------------------------

CAUSAL = torch.nn.Transformer.generate_square_subsequent_mask(L)
PADDING = torch.zeros(N, L).masked_fill(torch.arange(L) >= torch.tensor([[L], [3], [2]]), -torch.inf)


def encoder_layer() -> torch.nn.Module:
    return torch.nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True)


MODELS: dict[str, tuple[Any, int, Any, dict[str, Any]]] = {
    "attention": (attention, 1, 3, {"key_padding_mask": PADDING}),
    "encoder-layer": (encoder_layer, 1, 1, {"src_key_padding_mask": PADDING, "src_mask": CAUSAL}),
    "encoder": (
        lambda: torch.nn.TransformerEncoder(encoder_layer(), 2),  # type: ignore[arg-type]
        2,
        1,
        {"src_key_padding_mask": PADDING},
    ),
    "decoder": (
        lambda: torch.nn.TransformerDecoder(
            torch.nn.TransformerDecoderLayer(E, H, 32, dropout=0.0, batch_first=True, norm_first=True), 2
        ),
        4,
        2,
        {"tgt_mask": CAUSAL, "tgt_key_padding_mask": PADDING, "memory_key_padding_mask": PADDING},
    ),
    "transformer": (
        lambda: torch.nn.Transformer(E, H, 1, 1, 32, dropout=0.0, batch_first=True),
        3,
        2,
        {"tgt_mask": CAUSAL, "tgt_is_causal": True, "src_key_padding_mask": PADDING, "tgt_key_padding_mask": PADDING},
    ),
}


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
@pytest.mark.parametrize("name", MODELS)
def test_models_compute_the_same(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    construct, count, inputs, options = MODELS[name]
    theirs = construct().train(mode == "train")
    ours = copy.deepcopy(theirs)
    assert fastattn.replace_modules(ours) is ours
    assert len(fastattn.served_modules(ours).served) == count
    calls = []
    forward = MultiheadAttention.forward
    monkeypatch.setattr(MultiheadAttention, "forward", lambda *a, **o: calls.append(1) or forward(*a, **o))
    xs = [torch.randn(N, L, E)] * inputs
    outputs = []
    for model in (theirs, ours):
        leaf = xs[0].clone().requires_grad_(mode != "no_grad")
        with torch.set_grad_enabled(mode != "no_grad"):
            result = model(*[leaf] * inputs, **options)
        result = result[0] if isinstance(result, tuple) else result
        found = [result]
        if mode != "no_grad":
            found += torch.autograd.grad(result.square().sum(), [leaf, *model.parameters()])
        outputs.append(found)
    assert len(calls) == count
    for wanted, found_ in zip(*outputs, strict=True):
        torch.testing.assert_close(found_, wanted, rtol=1e-3, atol=1e-4)


# --- What stays as it was --------------------------------------------------------------------------------------------


def test_parameters_hooks_and_modes_stay() -> None:
    model = torch.nn.Sequential(encoder_layer(), encoder_layer().eval())
    attentions = [layer.self_attn for layer in model]
    seen: list[str] = []
    attentions[0].register_forward_hook(lambda *_: seen.append("after"))
    attentions[0].register_forward_pre_hook(lambda *_: seen.append("before"))
    attentions[1].in_proj_weight.requires_grad_(False)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = attentions[0].out_proj.weight.clone()
    fastattn.replace_modules(model)
    assert [layer.self_attn for layer in model] == attentions  # the very objects
    assert all(type(module) is MultiheadAttention for module in attentions)
    assert [module.training for module in attentions] == [True, False]
    assert not attentions[1].in_proj_weight.requires_grad
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    model(torch.randn(N, L, E)).sum().backward()
    assert seen == ["before", "after"]
    optimizer.step()
    assert not torch.equal(attentions[0].out_proj.weight, before)


def test_a_second_call_does_nothing() -> None:
    module = fastattn.replace_modules(attention())
    state = dict(vars(module), _forward_pre_hooks=dict(module._forward_pre_hooks))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fastattn.replace_modules(module) is module
    assert type(module) is MultiheadAttention
    assert dict(vars(module), _forward_pre_hooks=dict(module._forward_pre_hooks)) == state


def test_a_shared_module_is_replaced_once() -> None:
    shared = attention()
    model = torch.nn.ModuleList([shared, torch.nn.ModuleDict({"again": shared})])
    assert fastattn.served_modules(fastattn.replace_modules(model)).served == ("0",)
    assert model[0] is model[1]["again"] is shared


def test_replaced_modules_are_compiled_anew(fresh_compiler: None) -> None:
    module = attention().eval()
    compiled = torch.compile(module, backend="aot_eager")
    x = torch.randn(N, L, E)
    mask = torch.ones(N, L, dtype=torch.bool)
    compiled(x, x, x)
    fastattn.replace_modules(module)
    assert not compiled(x, x, x, mask)[1].any()  # PyTorch would have NaN


# --- Subclasses, parametrizations, pruning ---------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [Named, NamedTwice])
def test_subclasses_with_the_same_forward_stay_what_they_are(cls: type[Named]) -> None:
    module = cls("Ada")
    x = torch.randn(N, L, E)
    wanted = output(module, x)
    fastattn.replace_modules(module)
    assert isinstance(module, cls)
    assert isinstance(module, MultiheadAttention)
    assert type(module).__qualname__ == cls.__qualname__
    assert module.greet() == "I am Ada"
    torch.testing.assert_close(output(module, x), wanted)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is type(module)
        assert twin.greet() == "I am Ada"
        assert "fastattn" in twin._forward_pre_hooks
        assert hasattr(twin, "was_loaded") == (cls is NamedTwice)
        assert torch.equal(output(twin, x), output(module, x))
    assert type(fastattn.restore_modules(module)) is cls


def test_instances_of_a_subclass_share_one_class() -> None:
    assert type(fastattn.replace_modules(Named("a"))) is type(fastattn.replace_modules(Named("b")))


@pytest.mark.parametrize("cls", [torch.nn.MultiheadAttention, Named])
def test_parametrizations_stay(cls: type) -> None:
    module = Named("Ada") if cls is Named else attention()
    parametrize.register_parametrization(module, "in_proj_weight", Doubling())
    parametrize.register_parametrization(module.out_proj, "weight", Doubling())
    x = torch.randn(N, L, E)
    wanted = output(module, x)
    fastattn.replace_modules(module)
    assert isinstance(module, MultiheadAttention)
    assert parametrize.is_parametrized(module, "in_proj_weight")
    torch.testing.assert_close(output(module, x), wanted)
    assert torch.equal(output(copy.deepcopy(module), x), output(module, x))
    with pytest.raises(RuntimeError, match="only supported through state_dict"):
        pickle.dumps(module)
    # More of them, and fewer, after the replacement.
    parametrize.register_parametrization(module, "in_proj_bias", Doubling())
    assert parametrize.is_parametrized(module, "in_proj_bias")
    for name in ("in_proj_bias", "in_proj_weight"):
        parametrize.remove_parametrizations(module, name)
    assert isinstance(module, MultiheadAttention)
    torch.testing.assert_close(output(module, x), wanted)
    assert type(fastattn.restore_modules(module)) is cls


def test_parametrized_modules_are_restored() -> None:
    module = attention()
    parametrize.register_parametrization(module, "in_proj_weight", Doubling())
    x = torch.randn(N, L, E)
    wanted = output(module, x)
    fastattn.restore_modules(fastattn.replace_modules(module))
    assert not isinstance(module, MultiheadAttention)
    assert torch.equal(output(module, x), wanted)
    parametrize.remove_parametrizations(module, "in_proj_weight")
    assert type(module) is torch.nn.MultiheadAttention


def test_pruned_parameters() -> None:
    module = attention()
    prune.random_unstructured(module, "in_proj_weight", amount=0.5)
    x = torch.randn(N, L, E)
    wanted = output(module, x)
    torch.testing.assert_close(output(fastattn.replace_modules(module), x), wanted)
    prune.remove(module, "in_proj_weight")
    torch.testing.assert_close(output(module, x), wanted)


# --- What is left to PyTorch -----------------------------------------------------------------------------------------


def quantized() -> torch.nn.Module:
    """With out_proj as torch.ao.quantization makes it: its weight is a method."""
    module = attention()
    module.out_proj = torch.ao.nn.quantized.dynamic.Linear(E, E)  # type: ignore[assignment]
    return module


def patched() -> torch.nn.Module:
    module = attention()
    module.forward = lambda *args, **kwargs: None  # type: ignore[method-assign,assignment]
    return module


LEFT = {
    "own-forward": (lambda: Own(E, H), "Own has a forward of its own"),
    "patched": (patched, "its forward was replaced on the instance"),
    "quantized": (quantized, r"its out_proj is a torch\.ao\.nn\.quantized\.dynamic\S+\.Linear, which is no torch\.nn"),
    "quantizable": (lambda: torch.ao.nn.quantizable.MultiheadAttention(E, H), "has a forward of its own"),
    "dtype": (lambda: attention().to(torch.complex64), r"its parameters are torch\.complex64"),
}


@pytest.mark.filterwarnings("ignore:torch.ao.quantization:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize("id", LEFT)
def test_what_cannot_be_served_is_left_and_named(id: str) -> None:
    construct, reason = LEFT[id]
    module = construct()
    model = torch.nn.ModuleDict({"good": attention(), "bad": module})
    cls = type(module)
    with pytest.warns(UserWarning, match=rf"replace_modules left 1 attention modules to PyTorch: bad: .*{reason}"):
        fastattn.replace_modules(model)
    assert type(module) is cls
    assert "fastattn" not in module._forward_pre_hooks
    report = fastattn.served_modules(model)
    assert report.served == ("good",)
    assert list(report.left) == ["bad"]
    assert report.replaceable == ()
    with pytest.warns(UserWarning, match="to PyTorch: the model itself: "):
        fastattn.replace_modules(module)


class OnCuda:
    """As much of a tensor on a GPU as is asked for."""

    is_cuda = True
    device = torch.device("cuda:0")

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


@pytest.mark.parametrize(
    ("dtype", "head_dim", "obstacle", "reason"),
    [
        (torch.float32, 64, None, None),
        (torch.float32, 64, "the GPU is older", "the GPU is older"),
        (torch.float64, 64, None, "its parameters are torch.float64 on CUDA"),
        (torch.float32, 512, None, f"its head dimension is 512, above {_cuda.MAX_HEAD_DIM} on CUDA"),
    ],
)
def test_limits_on_cuda(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, head_dim: int, obstacle: str | None, reason: str | None
) -> None:
    monkeypatch.setattr(_cuda, "obstacle", lambda index: obstacle)
    monkeypatch.setattr(_replace, "_weight", lambda out_proj: OnCuda(dtype))
    module = torch.nn.MultiheadAttention(head_dim, 1, device="meta")
    assert _replace._obstacle(module) == reason


def test_a_model_without_attention_warns() -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.warns(UserWarning, match=r"found no torch\.nn\.MultiheadAttention in the Linear; .*replace_sdpa"):
        assert fastattn.replace_modules(model) is model


@pytest.mark.parametrize("function", [fastattn.replace_modules, fastattn.restore_modules, fastattn.served_modules])
def test_no_module(function: Any) -> None:
    with pytest.raises(TypeError, match=r"^fastattn: model is a list; it must be a torch\.nn\.Module"):
        function([attention()])


# --- Back, and the report --------------------------------------------------------------------------------------------


def test_restored_models_are_as_before() -> None:
    model = torch.nn.TransformerEncoder(encoder_layer(), 2).eval()  # type: ignore[arg-type]
    x = torch.randn(N, L, E)
    with torch.no_grad():
        wanted = model(x)
        fastattn.replace_modules(model)
        assert fastattn.restore_modules(model) is model
        assert torch.equal(model(x), wanted)  # the path in eval mode that passes self_attn by
    for module in model.modules():
        assert not isinstance(module, MultiheadAttention)
        assert not module._forward_pre_hooks


def test_restored_modules_can_be_scripted() -> None:
    module = fastattn.restore_modules(MultiheadAttention(E, H))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(module)
    x = torch.randn(L, N, E)
    torch.testing.assert_close(scripted(x, x, x)[0], output(module, x))


def test_subclasses_of_ours_cannot_be_restored() -> None:
    model = torch.nn.ModuleList([MultiheadAttention(E, H), Ours(E, H)])
    with pytest.warns(UserWarning, match=r"restore_modules left subclasses .* in their place: 1 \(Ours\)"):
        fastattn.restore_modules(model)
    assert [type(module) for module in model] == [torch.nn.MultiheadAttention, Ours]
    assert fastattn.served_modules(fastattn.replace_modules(model)).served == ("0", "1")


def test_the_report_reads() -> None:
    model = torch.nn.ModuleDict({"a": MultiheadAttention(E, H), "b": Own(E, H), "c": attention()})
    assert str(fastattn.served_modules(model)).splitlines() == [
        "served by fastattn: 1",
        "left to PyTorch: 2",
        "  b: Own has a forward of its own",
        "  c: can be replaced",
    ]
    assert str(fastattn.served_modules(attention())).endswith("(the model itself): can be replaced")
