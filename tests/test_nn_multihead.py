"""fastattn.nn.MultiheadAttention against torch.nn.MultiheadAttention: every argument, values and gradients."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import fastattn
from fastattn.nn import MultiheadAttention, multihead

E, H, L, S, N = 16, 4, 5, 7, 3


# --- The whole grid, in float64 --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Module:
    """How a module is constructed."""

    bias: bool
    append: str  # "bias_kv", "zero", "bias_kv+zero" or ""
    dims: tuple[int, int] | None  # kdim, vdim
    layout: str  # "batch_first", "batch_second" or "unbatched"

    def __str__(self) -> str:
        parts = [
            self.layout,
            "bias" if self.bias else "nobias",
            self.append,
            f"kdim{self.dims[0]}" if self.dims else "",
        ]
        return "-".join(part for part in parts if part)

    def arguments(self, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        kdim, vdim = self.dims or (None, None)
        return {
            "embed_dim": E,
            "num_heads": H,
            "bias": self.bias,
            "add_bias_kv": "bias_kv" in self.append,
            "add_zero_attn": "zero" in self.append,
            "kdim": kdim,
            "vdim": vdim,
            "batch_first": self.layout == "batch_first",
            "dtype": dtype,
        }

    def tensor(self, length: int, features: int) -> Tensor:
        shape = {
            "batch_first": (N, length, features),
            "batch_second": (length, N, features),
            "unbatched": (length, features),
        }[self.layout]
        return torch.randn(shape, dtype=torch.float64)


@dataclass(frozen=True)
class Call:
    """How it is called."""

    inputs: str  # "self": one tensor; "memory": key is value; "distinct"
    padding: str  # "", "bool" or "float"
    mask: str  # "", "bool2", "float2", "bool3", "float3", "causal_bool", "causal_float"
    is_causal: bool
    weights: str  # "no", "averaged" or "per_head"


MODULES = [
    Module(bias, append, dims, layout)
    for layout in ("batch_first", "batch_second", "unbatched")
    for bias in (True, False)
    for append in ("", "bias_kv", "zero", "bias_kv+zero")
    for dims in (None, (12, 20))
]
CALLS = [
    Call(inputs, padding, mask, is_causal, weights)
    for inputs in ("self", "memory", "distinct")
    for padding in ("", "bool", "float")
    for mask in ("", "bool2", "float2", "bool3", "float3", "causal_bool", "causal_float")
    for is_causal in (False, True)
    for weights in ("no", "averaged", "per_head")
    if not is_causal or mask.startswith("causal")
]
SHARE = 24  # each module makes one call in so many, each another; together they make every call


def pairs(module: Module) -> list[Call]:
    return CALLS[MODULES.index(module) % SHARE :: SHARE]


def test_the_grid_has_every_call() -> None:
    made = {call for module in MODULES for call in pairs(module)}
    assert made == set(CALLS)


def masks(module: Module, call: Call, length: int, keys: int) -> dict[str, Tensor | None]:
    batch = 1 if module.layout == "unbatched" else N
    padding = mask = None
    if call.padding:
        padding = torch.arange(keys) >= torch.tensor([[keys], [keys - 2], [keys - 3]])[:batch]
        if call.padding == "float":
            padding = torch.randn(batch, keys, dtype=torch.float64).masked_fill(padding, -math.inf)
        if module.layout == "unbatched":
            padding = padding[0]
    if call.mask:
        shape = (batch * H, length, keys) if call.mask.endswith("3") else (length, keys)
        mask = torch.rand(shape) < 0.3
        mask[..., 0] = False  # every row sees a key: PyTorch has NaN otherwise
        if call.mask.startswith("causal"):
            mask = torch.ones(length, keys, dtype=torch.bool).triu(1)
        if "float" in call.mask:
            values = torch.zeros(shape) if call.mask.startswith("causal") else torch.randn(shape)
            mask = values.double().masked_fill(mask, -math.inf).requires_grad_()
    return {"key_padding_mask": padding, "attn_mask": mask}


def results(
    module: torch.nn.MultiheadAttention, inputs: list[Tensor], options: dict[str, Any], seed: int = 1
) -> dict[str, Tensor]:
    """Output, weights, and the gradients of everything."""
    mask = options["attn_mask"]
    inputs = [x.detach().requires_grad_() for x in inputs]
    query, key, value = {1: inputs * 3, 2: [*inputs, inputs[-1]], 3: inputs}[len(inputs)]
    output, weights = module(query, key, value, **options)
    torch.manual_seed(seed)
    found = {"output": output}
    loss = (output * torch.randn(output.shape).to(output)).sum()
    if weights is not None:
        found["weights"] = weights
        loss = loss + (weights * torch.randn(weights.shape).to(weights)).sum()
    leaves = dict(zip(("query", "key", "value"), inputs, strict=False)) | dict(module.named_parameters())
    if mask is not None and mask.requires_grad:
        leaves["attn_mask"] = mask
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return found | {f"d {name}": x for name, x in zip(leaves, grads, strict=True) if x is not None}


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@pytest.mark.parametrize("config", MODULES, ids=str)
def test_everything_agrees_with_torch(config: Module) -> None:
    torch.manual_seed(MODULES.index(config))
    theirs = torch.nn.MultiheadAttention(**config.arguments())
    ours = MultiheadAttention(**config.arguments())
    ours.load_state_dict(theirs.state_dict())
    kdim, vdim = config.dims or (E, E)
    for call in pairs(config):
        if call.inputs == "self" and config.dims:
            call = Call("distinct", call.padding, call.mask, call.is_causal, call.weights)
        sizes = {"self": [(L, E)], "memory": [(L, E), (S, kdim)], "distinct": [(L, E), (S, kdim), (S, vdim)]}
        shapes = sizes["distinct" if kdim != vdim else call.inputs]
        inputs = [config.tensor(*shape) for shape in shapes]
        options = {
            **masks(config, call, L, shapes[-1][0]),
            "need_weights": call.weights != "no",
            "average_attn_weights": call.weights == "averaged",
            "is_causal": call.is_causal,
        }
        wanted, found = results(theirs, inputs, options), results(ours, inputs, options)
        # Where PyTorch drops the mask for is_causal, it has no gradient; where only fastattn does, its part is missing.
        if call.is_causal and "d attn_mask" in wanted and call.weights == "no":
            wanted.pop("d attn_mask")
            found.pop("d attn_mask", None)
        assert found.keys() == wanted.keys(), call
        for name, x in wanted.items():
            torch.testing.assert_close(
                found[name], x, rtol=1e-9, atol=1e-11, msg=lambda m, n=name, c=call: f"{n}: {c}\n{m}"
            )


# --- Accuracy in the other dtypes ------------------------------------------------------------------------------------


def check_accuracy(found: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """The project's bound; tiny is a rounding of the result and four of its root mean square."""
    assert found.keys() == plain.keys() == exact.keys()
    for name, x in exact.items():
        assert found[name].dtype == plain[name].dtype, name
        error, allowed = (found[name] - x).abs().max().item(), (plain[name] - x).abs().max().item()
        unit = torch.finfo(found[name].dtype).eps / 2
        tiny = unit * (x.abs().max() + 4 * x.square().mean().sqrt()).item()
        assert error <= 2 * allowed + tiny, (
            f"{name} is off by {error:.3g}, PyTorch by {allowed:.3g}; tiny is {tiny:.3g}"
        )


ACCURACY_CALLS = {
    "plain": {},
    "padding": {"key_padding_mask": True},
    "causal": {"attn_mask": True, "is_causal": True},
    "padding-causal-weights": {"key_padding_mask": True, "attn_mask": True, "need_weights": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ACCURACY_CALLS)
def test_accuracy(name: str, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"need_weights": False, "attn_mask": None, **ACCURACY_CALLS[name]}
    if options["attn_mask"]:
        options["attn_mask"] = torch.nn.Transformer.generate_square_subsequent_mask(33, dtype=dtype)
    if "key_padding_mask" in options:
        options["key_padding_mask"] = torch.zeros(2, 33, dtype=dtype)
        options["key_padding_mask"][1, 20:] = -math.inf
    theirs = torch.nn.MultiheadAttention(64, 4, batch_first=True, dtype=dtype)
    ours = MultiheadAttention(64, 4, batch_first=True, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 33, 64, dtype=dtype)
    plain, found = results(theirs, [x], options), results(ours, [x], options)
    wide = {k: v.double() if isinstance(v, Tensor) and v.dtype != torch.bool else v for k, v in options.items()}
    exact = results(copy.deepcopy(theirs).double(), [x.double()], wide)
    check_accuracy(found, plain, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("need_weights", [False, True])
def test_autocast(dtype: torch.dtype, need_weights: bool) -> None:
    theirs = torch.nn.MultiheadAttention(64, 4)
    ours = MultiheadAttention(64, 4)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(17, 2, 64)
    options = {"attn_mask": torch.zeros(17, 17).triu(1), "need_weights": need_weights}
    exact = results(
        copy.deepcopy(theirs).double(), [x.double()], options | {"attn_mask": options["attn_mask"].double()}
    )
    with torch.autocast("cpu", dtype=dtype):
        found, plain = results(ours, [x], options), results(theirs, [x], options)
    check_accuracy({k: found[k] for k in exact}, {k: plain[k] for k in exact}, exact)


def test_a_float32_mask_of_finfo_min_hides_16_bit_keys_without_emptying_the_row() -> None:
    ours = MultiheadAttention(E, H, batch_first=True, dtype=torch.bfloat16)
    x = torch.randn(1, L, E, dtype=torch.bfloat16)
    padding = torch.full((1, L), torch.finfo(torch.float32).min)
    _, weights = ours(x, x, x, key_padding_mask=padding)
    assert torch.allclose(weights.float(), torch.full((1, L, L), 1 / L), atol=1e-3)  # a uniform row, not an empty one


# --- What is there instead of PyTorch's NaN --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_a_query_without_a_key_has_the_bias_for_output_and_no_gradient(kind: str, need_weights: bool) -> None:
    ours = MultiheadAttention(E, H, batch_first=True)
    torch.nn.init.normal_(ours.out_proj.bias)
    x = torch.randn(2, L, E, requires_grad=True)
    padding = torch.tensor([[False] * L, [True] * L])
    if kind == "float":
        padding = torch.zeros(2, L).masked_fill(padding, -math.inf)
    output, weights = ours(x, x, x, key_padding_mask=padding, need_weights=need_weights)
    assert torch.equal(output[1], ours.out_proj.bias.expand(L, E))
    assert weights is None or not weights[1].any()
    (output.square().sum() + (weights.square().sum() if weights is not None else 0)).backward()
    assert not x.grad[1].any()
    assert all(p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("shape", [(0, L), (2, 0)], ids=["no-batch", "no-keys"])
def test_nothing_to_attend_to(shape: tuple[int, int]) -> None:
    ours = MultiheadAttention(E, H, batch_first=True)
    memory = torch.randn(*shape, E)
    output, weights = ours(torch.randn(shape[0], 3, E), memory, memory)
    assert output.shape == (shape[0], 3, E)
    assert weights.shape == (shape[0], 3, shape[1])
    assert torch.equal(output, ours.out_proj.bias.expand_as(output))


# --- How the masks reach the kernel ----------------------------------------------------------------------------------


@pytest.fixture
def calls_of_attention(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of every call of fastattn.attention that the module makes."""
    calls: list[dict[str, Any]] = []

    def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        calls.append({"q": q, "k": k, "v": v, **options})
        return fastattn.attention(q, k, v, **options)

    monkeypatch.setattr(multihead, "attention", attention)
    return calls


def test_a_bool_padding_mask_is_not_expanded(calls_of_attention: list[dict[str, Any]]) -> None:
    ours = MultiheadAttention(E, H, batch_first=True)
    x = torch.randn(N, L, E)
    padding = torch.arange(L) >= torch.tensor([[L], [3], [2]])
    ours(x, x, x, key_padding_mask=padding, need_weights=False)
    (call,) = calls_of_attention
    assert torch.equal(call["mask"], ~padding.view(N, 1, 1, L))
    assert call["bias"] is None


def test_two_bool_masks_are_not_joined(calls_of_attention: list[dict[str, Any]]) -> None:
    ours = MultiheadAttention(E, H, batch_first=True)
    x = torch.randn(N, L, E)
    padding, mask = torch.zeros(N, L, dtype=torch.bool), torch.zeros(L, L, dtype=torch.bool)
    ours(x, x, x, key_padding_mask=padding, attn_mask=mask, need_weights=False)
    (call,) = calls_of_attention
    assert call["mask"].shape == (1, 1, L, L)
    assert call["bias"].shape == (N, 1, 1, L)


def test_float_masks_let_tiles_be_skipped(calls_of_attention: list[dict[str, Any]]) -> None:
    ours = MultiheadAttention(E, H, batch_first=True)
    x = torch.randn(N, L, E)
    padding = torch.zeros(N, L).masked_fill(torch.arange(L) >= torch.tensor([[L], [3], [2]]), -math.inf)
    causal = torch.zeros(L, L).masked_fill(torch.ones(L, L, dtype=torch.bool).triu(1), -math.inf)
    for options, shape in (
        ({"key_padding_mask": padding}, (N, 1, 1, L)),
        ({"attn_mask": causal}, (1, 1, L, L)),
        ({"attn_mask": causal, "key_padding_mask": padding}, (1, 1, L, L)),
    ):
        ours(x, x, x, **options, need_weights=False)
        mask = calls_of_attention[-1]["mask"]
        assert mask.shape == shape
        assert torch.equal(mask.view(-1, L), (options.get("attn_mask", padding) == 0).view(-1, L))
    ours(x, x, x, attn_mask=causal.expand(N * H, L, L), need_weights=False)
    assert calls_of_attention[-1]["mask"] is None


def test_one_projection_without_copies(calls_of_attention: list[dict[str, Any]]) -> None:
    ours = MultiheadAttention(E, H, batch_first=True)
    x = torch.randn(N, L, E)
    ours(x, x, x, need_weights=False)
    (call,) = calls_of_attention
    q, k, v = call["q"], call["k"], call["v"]
    storages = {t.untyped_storage().data_ptr() for t in (q, k, v)}
    assert len(storages) == 1
    assert q.untyped_storage().nbytes() == N * L * 3 * E * q.element_size()


def test_is_causal_is_relied_upon_with_padding_too(calls_of_attention: list[dict[str, Any]]) -> None:
    ours = MultiheadAttention(E, H, batch_first=True)
    x = torch.randn(N, L, E)
    padding = torch.arange(L) >= torch.tensor([[L], [3], [2]])
    mask = torch.ones(L, L, dtype=torch.bool).triu(1)
    options: dict[str, Any] = {"key_padding_mask": padding, "attn_mask": mask, "need_weights": False}
    slow, _ = ours(x, x, x, **options)
    fast, _ = ours(x, x, x, **options, is_causal=True)
    assert calls_of_attention[1]["causal"] == "top_left"
    assert calls_of_attention[1]["mask"].shape == (N, 1, 1, L)
    torch.testing.assert_close(fast, slow)


# --- Dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
def test_output_and_weights_have_the_same_dropout(padded: bool) -> None:
    ours = MultiheadAttention(E, H, dropout=0.4, batch_first=True, dtype=torch.float64)
    q, memory = torch.randn(N, L, E).double(), torch.randn(N, 40, E).double()
    inputs = [q.requires_grad_(), memory.requires_grad_()]
    padding = torch.arange(40) >= torch.tensor([[40], [30], [20]]) if padded else None
    output, weights = ours(*inputs, memory, key_padding_mask=padding, average_attn_weights=False)
    assert 0.2 < (weights == 0)[0].double().mean() < 0.6
    v = torch.nn.functional.linear(memory, ours.in_proj_weight[2 * E :], ours.in_proj_bias[2 * E :])
    o = weights @ v.unflatten(-1, (H, -1)).transpose(1, 2)
    again = ours.out_proj(o.transpose(1, 2).flatten(2))
    torch.testing.assert_close(output, again)
    # The gradients are those of the same dropped weights: through the fused kernel, and through the weights.
    leaves = [*inputs, ours.in_proj_weight]
    for a, b in zip(
        *(torch.autograd.grad(x.square().sum(), leaves, retain_graph=True) for x in (output, again)), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_dropout_follows_the_seed_and_the_mode() -> None:
    ours = MultiheadAttention(E, H, dropout=0.5, batch_first=True)
    x = torch.randn(N, L, E)
    torch.manual_seed(5)
    first, _ = ours(x, x, x, need_weights=False)
    second, _ = ours(x, x, x, need_weights=False)
    torch.manual_seed(5)
    with_weights, _ = ours(x, x, x)
    assert torch.equal(first, with_weights)
    assert not torch.equal(first, second)
    ours.eval()
    output, weights = ours(x, x, x)
    torch.testing.assert_close(weights.sum(-1), torch.ones(N, L))
    assert torch.equal(output, ours(x, x, x)[0])


def test_dropout_of_everything() -> None:
    ours = MultiheadAttention(E, H, dropout=1.0)
    x = torch.randn(L, E)
    output, weights = ours(x, x, x)
    assert torch.equal(output, ours.out_proj.bias.expand(L, E))
    assert not weights.any()
    ours.dropout = 1.5
    for need_weights in (False, True):
        with pytest.raises(ValueError, match=r"fastattn: dropout_p is 1\.5"):
            ours(x, x, x, need_weights=need_weights)


# --- A torch.nn.MultiheadAttention by all appearances ----------------------------------------------------------------


@pytest.mark.parametrize("config", [m for m in MODULES if m.layout == "batch_second"], ids=str)
def test_parameters_are_those_of_torch(config: Module) -> None:
    torch.manual_seed(3)
    theirs = torch.nn.MultiheadAttention(**config.arguments(torch.float32))
    torch.manual_seed(3)
    ours = MultiheadAttention(**config.arguments(torch.float32))
    assert isinstance(ours, torch.nn.MultiheadAttention)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, x in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], x), name
    ours._reset_parameters()
    assert not torch.equal(ours.out_proj.weight, torch.zeros(E, E))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)


def test_device_and_dtype() -> None:
    ours = MultiheadAttention(E, H, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in ours.parameters()} == {("meta", torch.bfloat16)}
    x = torch.empty(L, N, E, device="meta", dtype=torch.bfloat16)
    output, weights = ours(x, x, x)
    assert (output.shape, output.dtype, weights.shape) == ((L, N, E), torch.bfloat16, (N, L, L))


def test_outputs_are_contiguous_where_those_of_torch_are() -> None:
    x = torch.randn(L, N, E)
    assert MultiheadAttention(E, H)(x, x, x, need_weights=False)[0].is_contiguous()
    assert MultiheadAttention(E, H, batch_first=True)(x, x, x, need_weights=False)[0].is_contiguous()


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_work_and_keep_their_mark(how: str) -> None:
    ours = MultiheadAttention(E, H, batch_first=True).eval()
    ours.register_forward_pre_hook(_shout)
    if how == "deepcopy":
        twin = copy.deepcopy(ours)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(ours))
    else:
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert type(twin) is MultiheadAttention
    x = torch.randn(N, L, E)
    assert torch.equal(twin(x, x, x)[0], ours(x, x, x)[0])
    assert list(twin._forward_pre_hooks) == list(ours._forward_pre_hooks)
    assert "fastattn" in twin._forward_pre_hooks


def _shout(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
    """A hook that can be pickled."""


def test_a_state_without_the_mark_gets_it() -> None:
    ours = MultiheadAttention(E, H)
    state = dict(ours.__dict__, _forward_pre_hooks={})
    other = MultiheadAttention.__new__(MultiheadAttention)
    other.__setstate__(state)
    assert "fastattn" in other._forward_pre_hooks


# --- Transforms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("need_weights", [False, True])
def test_compile(fresh_compiler: None, need_weights: bool) -> None:
    ours = MultiheadAttention(E, H, dropout=0.3, batch_first=True)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    padding = torch.arange(L) >= torch.tensor([[L], [3], [2]])
    for options in ({}, {"key_padding_mask": padding}):
        found = []
        for module in (ours, compiled):
            torch.manual_seed(0)
            x = torch.ones(N, L, E).cumsum(1).sin().requires_grad_()
            output, weights = module(x, x, x, need_weights=need_weights, **options)
            loss = output.square().sum() + (weights.square().sum() if weights is not None else 0)
            found.append([output, *torch.autograd.grad(loss, [x, *ours.parameters()])])
        for eager, traced in zip(*found, strict=True):
            torch.testing.assert_close(traced, eager)


def test_export_with_symbolic_sizes() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = MultiheadAttention(E, H, batch_first=True).eval()

        def forward(self, x: Tensor) -> Tensor:
            return self.attend(x, x, x, need_weights=False)[0]

    model = Model()
    sizes = {"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}}
    program = torch.export.export(model, (torch.randn(2, 5, E),), dynamic_shapes=sizes)
    x = torch.randn(4, 9, E)
    torch.testing.assert_close(program.module()(x), model(x))


def test_functional_transforms() -> None:
    ours = MultiheadAttention(E, H, batch_first=True)
    parameters = dict(ours.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(ours, parameters, (x, x, x))[0].square().sum()

    xs = torch.randn(3, N, L, E)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, xs)
    for i, x in enumerate(xs):
        wanted = torch.autograd.grad(loss(parameters, x), list(parameters.values()))
        for name, grad in zip(parameters, wanted, strict=True):
            torch.testing.assert_close(each[name][i], grad, rtol=1e-4, atol=1e-5)


def test_second_and_forward_mode_derivatives() -> None:
    ours = MultiheadAttention(8, 2, add_bias_kv=True, dtype=torch.float64)
    x = torch.randn(3, 2, 8, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor) -> tuple[Tensor, ...]:
        return ours(x, x, x)

    assert torch.autograd.gradcheck(function, (x,))
    assert torch.autograd.gradgradcheck(function, (x,))
    tangent = torch.randn_like(x)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(ours(*[forward_ad.make_dual(x, tangent)] * 3)[0]).tangent
    step = 1e-6
    numeric = (function(x + step * tangent)[0] - function(x - step * tangent)[0]) / (2 * step)
    torch.testing.assert_close(dual, numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_jit_trace_works_and_jit_script_is_refused() -> None:
    ours = MultiheadAttention(E, H, batch_first=True).eval()
    x, other = torch.randn(2, 5, E), torch.randn(3, 9, E)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # about the checks of shapes
        traced = torch.jit.trace(ours, (x, x, x))
        for a, b in zip(traced(other, other, other), ours(other, other, other), strict=True):
            torch.testing.assert_close(a, b)
    for module in (ours, torch.nn.Sequential(ours)):
        with pytest.raises(TypeError, match=r"cannot be compiled by torch\.jit\.script; use torch\.compile"):
            torch.jit.script(module)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # about the checks of shapes
def test_jit_trace_is_for_inference() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = MultiheadAttention(E, H, dropout=0.5, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attend(x, x, x, need_weights=False)[0]

    model, x, other = Model(), torch.randn(2, 5, E), torch.randn(3, 9, E)
    with torch.no_grad():
        traced = torch.jit.trace(model, (x,), check_trace=False)  # which would call it twice and compare
    outputs = []
    for module in (traced, model):
        torch.manual_seed(0)
        outputs.append(module(other))
    torch.testing.assert_close(*outputs)
    assert not torch.equal(traced(other), outputs[0])
    with pytest.raises(ValueError, match="fastattn: stats is empty"):
        outputs[0].sum().backward()
    with pytest.raises(torch.jit.TracingCheckError):
        torch.jit.trace(model.eval(), (x,))


# --- Nested tensors --------------------------------------------------------------------------------------------------


def nested(*lengths: int, features: int = E) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a prototype, says PyTorch
        return torch.nested.nested_tensor([torch.randn(n, features) for n in lengths])


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


# --- Transformers ----------------------------------------------------------------------------------------------------


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


# --- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embed_dim": 0}, "embed_dim is 0; it must be at least 1"),
        ({"num_heads": -1}, "num_heads is -1; it must be at least 1"),
        ({"kdim": 0}, "kdim is 0"),
        ({"vdim": 0}, "vdim is 0"),
        ({"num_heads": 3}, "embed_dim is 16 and num_heads 3; each head takes an equal part"),
        ({"dropout": 1.1}, r"dropout is 1.1; it is a probability and must lie in \[0, 1\]"),
        ({"dropout": -0.1}, "dropout is -0.1"),
    ],
)
def test_constructor_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^fastattn: {message}"):
        MultiheadAttention(**({"embed_dim": E, "num_heads": H} | arguments))


def blank(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(*(shape or (N, L, E)), **options)


BAD: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "no-tensor": (TypeError, "query is a list; it must be a torch.Tensor", {"query": [1.0]}),
    "four-dimensions": (
        ValueError,
        r"query has shape \(1, 1, 1, 16\); query, key and value",
        {"query": blank(1, 1, 1, E)},
    ),
    "mixed-ranks": (ValueError, r"key has shape \(5, 16\); query, key and value must all", {"key": blank(L, E)}),
    "features": (ValueError, "value has 15 features but the module was constructed for 16", {"value": blank(N, L, 15)}),
    "device": (
        ValueError,
        "key is on meta but the module is on cpu; move it with key.to",
        {"key": blank(device="meta")},
    ),
    "dtype": (TypeError, "query is torch.float64 but the module is torch.float32", {"query": blank().double()}),
    "lengths": (ValueError, r"key has shape \(3, 6, 16\) and value \(3, 5, 16\); each key", {"key": blank(N, 6, E)}),
    "batch": (
        ValueError,
        r"query has shape \(2, 5, 16\) and key \(3, 5, 16\); dimension 0 is the batch \(batch_first=True\)",
        {"query": blank(2, L, E)},
    ),
    "mask-type": (TypeError, "attn_mask is a str", {"attn_mask": "causal"}),
    "mask-dtype": (TypeError, r"attn_mask is torch.int64; it must be bool", {"attn_mask": blank(L, L).long()}),
    "padding-dtype": (
        TypeError,
        r"key_padding_mask is torch.uint8; .*\.bool\(\)",
        {"key_padding_mask": blank(N, L).byte()},
    ),
    "mask-device": (ValueError, "attn_mask is on meta", {"attn_mask": blank(L, L, device="meta")}),
    "mask-2d": (
        ValueError,
        r"attn_mask has shape \(5, 6\); it must be \(L, S\) = \(5, 5\)",
        {"attn_mask": blank(L, 6)},
    ),
    "mask-3d": (ValueError, r"attn_mask has .* or \(N \* H, L, S\) = \(12, 5, 5\)", {"attn_mask": blank(N, L, L)}),
    "padding": (ValueError, r"key_padding_mask has .* \(N, S\) = \(3, 5\)", {"key_padding_mask": blank(N, 6)}),
    "hint-alone": (ValueError, "is_causal is True without an attn_mask", {"is_causal": True}),
    "half-nested": (TypeError, "some are nested tensors; either all of them", {"key": nested(5, 5, 5)}),
}


@pytest.mark.parametrize("id", BAD)
def test_call_refuses(id: str) -> None:
    kind, message, arguments = BAD[id]
    ours = MultiheadAttention(E, H, batch_first=True)
    with pytest.raises(kind, match=rf"^fastattn: .*{message}"):
        ours(**({"query": blank(), "key": blank(), "value": blank()} | arguments))


def test_unbatched_masks_are_named_so() -> None:
    ours = MultiheadAttention(E, H)
    with pytest.raises(ValueError, match=r"attn_mask has .* or \(H, L, S\) = \(4, 5, 5\)"):
        ours(blank(L, E), blank(L, E), blank(L, E), attn_mask=blank(1, L, L))
    with pytest.raises(ValueError, match=r"key_padding_mask has .* \(S,\) = \(5,\)"):
        ours(blank(L, E), blank(L, E), blank(L, E), key_padding_mask=blank(1, L))


@pytest.mark.parametrize(
    ("message", "arguments", "inputs", "options"),
    [
        ("key_padding_mask, attn_mask or is_causal was given with nested", {}, None, {"attn_mask": blank(L, L)}),
        ("key_padding_mask, attn_mask or is_causal was given with nested", {}, None, {"key_padding_mask": blank(2, L)}),
        ("key_padding_mask, attn_mask or is_causal was given with nested", {}, None, {"is_causal": True}),
        ("query is a nested tensor and batch_first is False", {"batch_first": False}, None, {}),
        ("query is a nested tensor and the module appends keys", {"add_zero_attn": True}, None, {}),
        ("query is a nested tensor and the module appends keys", {"add_bias_kv": True}, None, {}),
        (r"key have lengths \[3, 4\] and those of value \[3, 5\]", {}, ((3, 4), (3, 4), (3, 5)), {}),
        ("query holds 1 sequences and key 2", {}, ((3,), (3, 4), (3, 4)), {}),
    ],
)
def test_nested_tensors_are_refused(
    message: str, arguments: dict[str, Any], inputs: tuple[tuple[int, ...], ...] | None, options: dict[str, Any]
) -> None:
    ours = MultiheadAttention(**({"embed_dim": E, "num_heads": H, "batch_first": True} | arguments))
    tensors = [nested(3, 5)] * 3 if inputs is None else [nested(*lengths) for lengths in inputs]
    with pytest.raises(ValueError, match=f"^fastattn: .*{message}"):
        ours(*tensors, **options)
