"""fastattn.additive_attention: parity with the reference, gradients of every order, poison, empty rows, torch.compile,
every message. The bound is that of tests/compare.py, and the cases are those of tests/cases.py with a w.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import fastattn
from fastattn import reference

from .cases import ADDITIVE_CASES, Case, make_inputs
from .compare import compute, differences, expected, violations
from .conftest import ISAS
from .test_parity import dtype_id
from .test_poison import assert_same_bits, surround

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *SIXTEEN_BITS, torch.float64)
ops = torch.ops.fastattn


# --- Numbers ----------------------------------------------------------------------------------------------------------


def matrix() -> Iterator[Any]:
    for case in ADDITIVE_CASES:
        for dtype in DTYPES:
            for isa in ISAS[:1] if dtype == torch.float64 else ISAS:
                yield pytest.param(case, dtype, isa, id=f"{case.id}-{dtype_id(dtype)}-{isa}")


@pytest.mark.parametrize(("case", "dtype", "isa"), list(matrix()), indirect=["isa"])
def test_parity(case: Case, dtype: torch.dtype, isa: str) -> None:
    inputs = make_inputs(case, dtype).require_grad()
    broken = violations(compute(inputs), expected(case, dtype))
    assert not broken, "\n".join([f"{case.id} in {dtype} on {isa}:", *broken])


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_the_bound_notices(dtype: torch.dtype) -> None:
    """One wrong element or a wrong scale of any quantity, w's gradient among them, breaks it."""
    wanted = expected(Case(70, 131, D=16, B=2, gqa=2, causal="top_left", kv_lengths=(0, 131), w="h"), dtype)
    good = wanted.exact
    assert "dw" in good
    assert not violations(good, wanted)
    for name, exact in good.items():
        limit = wanted.limits(name, torch.float64)[0]
        one_off = exact.clone(memory_format=torch.contiguous_format)
        one_off.flatten()[-1] += 1.01 * (2 * limit.plain.largest + limit.tiny.largest)
        for what, wrong in {"one element": one_off, "scale": exact * 1.1, "NaN": exact * torch.nan}.items():
            found = violations(good | {name: wrong}, wanted)
            assert found, f"{name}: {what} went unnoticed"


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("size", [30.0, 88.0, 200.0, 1000.0])
def test_numbers_that_overflow_the_exponential(isa: str, dtype: torch.dtype, size: float) -> None:
    """q = -k far out cancels to a tanh that counts; elsewhere it is 1 or -1, and nothing is NaN."""
    D = 16
    q = torch.full((1, 1, 33, D), size)
    q[..., 1::2] = -size
    k = -q[:, :, :1].repeat(1, 1, 20, 1) + torch.linspace(-2, 2, 20).view(1, 1, 20, 1)
    k[:, :, 10:] = 3 * size  # and keys where both are far
    q, k = q.to(dtype).requires_grad_(), k.to(dtype).requires_grad_()
    v, w = torch.randn(1, 1, 20, 5).to(dtype).requires_grad_(), torch.randn(D).to(dtype).requires_grad_()
    o, lse = fastattn.additive_attention(q, k, v, w, return_lse=True)
    grads = torch.autograd.grad(o.double().sin().sum() + lse.double().cos().sum(), (q, k, v, w))
    exact, exact_lse = reference.additive_attention(q, k, v, w, return_lse=True, dtype=torch.float64)
    wanted = torch.autograd.grad(exact.sin().sum() + exact_lse.cos().sum(), (q, k, v, w))
    eps = max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(o.double(), exact, atol=4 * eps, rtol=4 * eps)
    torch.testing.assert_close(lse.double(), exact_lse, atol=40 * eps, rtol=4 * eps)
    for ours, theirs in zip(grads, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), atol=20 * eps, rtol=20 * eps)


def test_w_learns_from_very_many_sequences() -> None:
    """The sum over batches does not drift: a chain of as many float32 additions would."""
    case = Case(3, 5, D=8, B=20_000, Hkv=1, w="h")
    broken = violations(compute(make_inputs(case, torch.float32).require_grad()), expected(case, torch.float32))
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_one_head_without_its_dimension(isa: str, dtype: torch.dtype) -> None:
    """(B, L, D) is (B, 1, L, D), bit for bit: results, gradients, masks, lengths; w is (D,) or (1, D)."""
    for w_shape, mask in itertools.product(((8,), (1, 8)), ((2, 5, 7), (5, 7), (2, 1, 7), (7,), None)):
        q, k, v = (torch.randn(2, *shape).to(dtype).requires_grad_() for shape in ((5, 8), (7, 8), (7, 6)))
        w = torch.randn(w_shape).to(dtype).requires_grad_()
        kwargs: dict[str, Any] = {"kv_lengths": torch.tensor([7, 4], dtype=torch.int32), "causal": True}
        four = dict(kwargs)
        if mask is not None:
            kwargs["mask"] = torch.rand(mask) < 0.7
            four["mask"] = kwargs["mask"].unsqueeze(-3) if len(mask) == 3 else kwargs["mask"]
        o, lse = fastattn.additive_attention(q, k, v, w, return_lse=True, **kwargs)
        assert (o.shape, lse.shape) == ((2, 5, 6), (2, 5))
        wanted = fastattn.additive_attention(*(x.unsqueeze(1) for x in (q, k, v)), w, return_lse=True, **four)
        assert torch.equal(o, wanted[0].squeeze(1))
        assert torch.equal(lse, wanted[1].squeeze(1))
        seen = lse.masked_fill(lse == -torch.inf, 0).sum()
        seen_wanted = wanted[1].masked_fill(wanted[1] == -torch.inf, 0).sum()
        ours = torch.autograd.grad(o.float().sin().sum() + seen, (q, k, v, w))
        theirs = torch.autograd.grad(wanted[0].float().sin().sum() + seen_wanted, (q, k, v, w))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_bahdanau_in_plain_code() -> None:
    """One step of the paper's decoder, written as its equations are, beside one call."""
    states, annotations = torch.randn(3, 12), torch.randn(3, 9, 20)
    W, U, v = torch.randn(16, 12), torch.randn(16, 20), torch.randn(16)
    energies = torch.stack([v @ torch.tanh(W @ states[b].unsqueeze(1) + U @ annotations[b].T) for b in range(3)])
    context = (torch.softmax(energies, -1).unsqueeze(1) @ annotations).squeeze(1)
    got = fastattn.additive_attention((states @ W.T).unsqueeze(1), annotations @ U.T, annotations, v)
    torch.testing.assert_close(got.squeeze(1), context)


# --- The definition ---------------------------------------------------------------------------------------------------


def test_reference_follows_the_definition() -> None:
    """fastattn.reference.additive_scores pair by pair."""
    q, k = torch.randn(2, 4, 3, 5).double(), torch.randn(2, 2, 6, 5).double()
    for w in (torch.randn(4, 5).double(), torch.randn(5).double()):
        s = reference.additive_scores(q, k, w, kv_lengths=torch.tensor([6, 4]))
        for b, h, i, j in itertools.product(range(2), range(4), range(3), range(6)):
            if b == 1 and j >= 4:
                assert s[b, h, i, j] == -torch.inf
            else:
                wanted = ((w[h] if w.dim() == 2 else w) * torch.tanh(q[b, h, i] + k[b, h // 2, j])).sum()
                torch.testing.assert_close(s[b, h, i, j], wanted)


def test_reference_derivatives() -> None:
    q, k, v, w = (
        torch.randn(shape).double().requires_grad_() for shape in ((1, 2, 3, 4), (1, 1, 4, 4), (1, 1, 4, 2), (4,))
    )
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1] = False

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        o, lse = reference.additive_attention(*tensors, mask=mask, return_lse=True)
        return o, lse.masked_fill(lse == -torch.inf, 0)

    assert torch.autograd.gradcheck(function, (q, k, v, w))
    assert torch.autograd.gradgradcheck(function, (q, k, v, w))


# --- Nothing leaks ----------------------------------------------------------------------------------------------------

SURROUNDED = [
    Case(70, 131, D=32, B=2, gqa=2, w="h"),
    Case(67, 35, D=17, Dv=24, B=2, gqa=2, causal="bottom_right", w=""),
    Case(1, 50, D=3, Dv=5, B=2, gqa=4, w="h"),
    Case(97, 131, D=1, Dv=1, mask="bhqk", B=2, w=""),
    Case(33, 66, D=16, mask="b11k", B=2, kv_lengths=(66, 31), dropout_p=0.3, w="h"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", SURROUNDED, ids=lambda case: case.id)
def test_nothing_around_a_view_leaks(isa: str, case: Case, dtype: torch.dtype) -> None:
    """With NaN or inf before, after and between the rows of every input, the bits are those for zeros there."""
    inputs = make_inputs(case, dtype)
    wanted = compute(surround(inputs, 0.0).require_grad())
    assert all(x.isfinite().all() for name, x in wanted.items() if name != "lse")
    for fill in (torch.nan, torch.inf):
        assert_same_bits(compute(surround(inputs, fill).require_grad()), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("causal", [False, "top_left", "bottom_right"])
def test_nothing_beyond_the_lengths_leaks(isa: str, causal: Any, dtype: torch.dtype) -> None:
    """NaN in the keys and values that do not exist changes no bit, and their gradients are 0."""
    for Lq in (1, 70):
        case = Case(Lq, 131, D=17, Dv=24, B=3, gqa=2, kv_lengths=(0, 77, 131), causal=causal, w="h")
        beyond = torch.arange(case.Lk).view(1, 1, -1) >= torch.tensor((0, 77, 131)).view(-1, 1, 1)
        wanted = compute(make_inputs(case, dtype).require_grad())
        for fill in (torch.nan, torch.inf, -torch.inf):
            inputs = make_inputs(case, dtype)
            for x in (inputs.k, inputs.v):
                x.masked_fill_(beyond.unsqueeze(-1), fill)
            got = compute(inputs.require_grad())
            assert_same_bits(got, wanted)
            for name in ("dk", "dv"):
                assert (got[name].masked_fill(~beyond.unsqueeze(-1), 0) == 0).all(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("Lq", [1, 70])
def test_a_row_keeps_its_nan(isa: str, dtype: torch.dtype, Lq: int) -> None:
    """NaN in a row of q spoils this row of o, lse and dq, and no other."""
    case = Case(Lq, 141, D=20, B=2, gqa=2, causal="bottom_right", w="h")
    wanted = compute(make_inputs(case, dtype).require_grad())
    inputs = make_inputs(case, dtype)
    inputs.q[1, 2, Lq // 2] = torch.nan
    got = compute(inputs.require_grad())
    for name in ("o", "lse", "dq"):
        own = torch.zeros_like(got[name], dtype=torch.bool)
        own[1, 2, Lq // 2] = True
        assert torch.equal(got[name][~own], wanted[name][~own]), name
        assert got[name][own].isnan().all()


# --- Sizes of zero, rows without a key --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("zero", ["B", "Hkv", "Lq", "Lk", "Lq-Lk", "B-Lk"])
@pytest.mark.parametrize("w", ["", "h"])
def test_sizes_of_zero(isa: str, zero: str, w: str, dtype: torch.dtype) -> None:
    sizes = {"B": 2, "Hkv": 2, "Lq": 5, "Lk": 7} | dict.fromkeys(zero.split("-"), 0)
    case = Case(D=8, Dv=6, gqa=2, w=w, mask="bhqk", dropout_p=0.5, **sizes)
    got = compute(make_inputs(case, dtype).require_grad())
    assert got["o"].shape == (case.B, case.Hq, case.Lq, 6)
    assert got["lse"].shape == (case.B, case.Hq, case.Lq)
    assert (got["lse"] == -torch.inf).all()
    for name, like in make_inputs(case, dtype).differentiable().items():
        assert (got[f"d{name}"].shape, got[f"d{name}"].dtype) == (like.shape, like.dtype)
    assert all((x == 0).all() for name, x in got.items() if name != "lse")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_blind_rows_are_exactly_zero(isa: str, dtype: torch.dtype) -> None:
    """No visible key, for each reason there is: o 0, lse -inf, no gradient."""
    hide = torch.ones(6, 1, dtype=torch.bool)
    hide[2] = False
    reasons: list[tuple[dict[str, Any], int, list[int]]] = [
        ({"causal": "bottom_right"}, 4, [0, 1]),
        ({"mask": hide}, 5, [2]),
        ({"kv_lengths": torch.tensor([0], dtype=torch.int32)}, 5, [0, 1, 2, 3, 4, 5]),
    ]
    for kwargs, Lk, rows in reasons:
        inputs = make_inputs(Case(6, Lk, w="h"), dtype)
        inputs.kwargs.update(kwargs)
        got = compute(inputs.require_grad())
        blind = torch.zeros(6, dtype=torch.bool)
        blind[rows] = True
        assert (got["o"][:, :, blind] == 0).all()
        assert (got["lse"][:, :, blind] == -torch.inf).all()
        assert (got["dq"][:, :, blind] == 0).all()
        assert got["lse"][:, :, ~blind].isfinite().all()
        assert all(x.isfinite().all() for name, x in got.items() if name != "lse")
        if blind.all():
            assert all((x == 0).all() for name, x in got.items() if name != "lse")


# --- The same bits ----------------------------------------------------------------------------------------------------

REPEATED = [
    Case(130, 131, D=17, B=2, Hkv=2, w="h"),
    Case(90, 333, D=16, Hkv=1, gqa=4, causal="bottom_right", w=""),
    Case(530, 300, D=5, Hkv=1, causal="top_left", w="h"),
    Case(1, 700, D=16, B=3, gqa=2, kv_lengths=(700, 0, 131), dropout_p=0.3, w=""),
]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", REPEATED, ids=lambda case: case.id)
def test_repeats_and_thread_counts(isa: str, case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype).require_grad()
    torch.set_num_threads(1)
    first = compute(inputs)
    compute(make_inputs(Case(43, 37, D=48, B=2, w="h"), dtype).require_grad())
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        assert not differences(compute(inputs), first), f"{count} threads"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_w_that_is_expanded_has_a_gradient_for_each_head(dtype: torch.dtype) -> None:
    """One row of numbers with a stride of 0 is not one w for all heads."""
    q, k, v = (torch.randn(2, 3, 9, 8, dtype=dtype) for _ in range(3))
    expanded = torch.randn(1, 8, dtype=dtype).expand(3, 8).detach().requires_grad_()
    copy = expanded.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    assert expanded.stride(0) == 0
    got, wanted = (
        torch.autograd.grad(fastattn.additive_attention(q, k, v, w).square().sum(), w)[0] for w in (expanded, copy)
    )
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_memory_does_not_matter(isa: str, dtype: torch.dtype) -> None:
    """Where rows lie, how far apart and how aligned, changes no bit."""
    plain = Case(70, 133, D=40, Dv=24, B=2, gqa=2, causal="bottom_right", mask="b1qk", w="h")
    inputs = make_inputs(plain, dtype).require_grad()
    first = compute(inputs)
    for layout in ("blhd", "qkv", "offset", "columns"):
        moved = make_inputs(replace(plain, layout=layout), dtype)
        for name in ("q", "k", "v", "d_o", "d_lse"):
            getattr(moved, name).copy_(getattr(inputs, name).detach())
        for name in ("mask", "w"):
            moved.kwargs[name].copy_(inputs.kwargs[name].detach())
        assert not differences(compute(moved.require_grad()), first), layout


def test_without_gradients_the_same_bits(isa: str) -> None:
    for dtype in DTYPES:
        inputs = make_inputs(Case(70, 131, D=32, gqa=2, causal="bottom_right", w="h"), dtype)
        with_grad = compute(inputs.require_grad())
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                o, lse = fastattn.additive_attention(inputs.q, inputs.k, inputs.v, return_lse=True, **inputs.kwargs)
            assert torch.equal(o, with_grad["o"])
            assert torch.equal(lse, with_grad["lse"])
            assert not o.requires_grad


def test_dropout_follows_manual_seed() -> None:
    inputs = make_inputs(Case(20, 30, dropout_p=0.5, w="h"), torch.float32)

    def call() -> Tensor:
        return fastattn.additive_attention(inputs.q, inputs.k, inputs.v, **inputs.kwargs)

    torch.manual_seed(3)
    first, second = call(), call()
    torch.manual_seed(3)
    assert torch.equal(call(), first)
    assert torch.equal(call(), second)
    assert not torch.equal(first, second)


def test_memory_grows_with_the_length() -> None:
    """Forward and backward at L = 4096, D = 64: plain code holds 4 GiB of tanh alone, this not a twentieth of it."""
    program = """
import resource, torch, fastattn
torch.set_num_threads(2)
L = 4096
q, k, v = (torch.randn(1, 1, L, 64, requires_grad=True) for _ in range(3))
w = torch.randn(64, requires_grad=True)
few = [x[:, :, :64] for x in (q, k, v)]
fastattn.additive_attention(*few, w).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fastattn.additive_attention(q, k, v, w).sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert int(done.stdout) < 200 * 1024, f"{int(done.stdout) / 1024:.0f} MiB"


# --- The operators as torch sees them ---------------------------------------------------------------------------------

# Each feature alone, and all together: what additive_attention is called with beside q, k, v and w.
B, Hq, Hkv, Lq, Lk, D, Dv = 2, 4, 2, 3, 5, 4, 3
FEATURES: dict[str, Callable[[], dict[str, Any]]] = {
    "dense": dict,
    "causal": lambda: {"causal": True},
    "mask": lambda: {"mask": torch.rand(B, 1, Lq, Lk) < 0.6},
    "lengths": lambda: {"kv_lengths": torch.tensor([0, 3], dtype=torch.int32)},
    "dropout": lambda: {"dropout_p": 0.4},
    "all": lambda: {
        "causal": "top_left",
        "mask": torch.rand(B, 1, Lq, Lk) < 0.8,
        "kv_lengths": torch.tensor([Lk, 2], dtype=torch.int32),
        "dropout_p": 0.2,
    },
}
each_feature = pytest.mark.parametrize("feature", FEATURES)
each_w = pytest.mark.parametrize("w_shape", [(Hq, D), (D,)], ids=["per-head", "shared"])


def tensors_of(
    w_shape: tuple[int, ...] = (Hq, D), dtype: torch.dtype = torch.float64, grad: bool = True
) -> list[Tensor]:
    shapes = ((B, Hq, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, Dv), w_shape)
    return [torch.randn(shape).to(dtype).requires_grad_(grad) for shape in shapes]


def function_of(kwargs: dict[str, Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    """(o, lse) with the same dropout every time, and lse finite."""

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(7)
        o, lse = fastattn.additive_attention(*tensors, return_lse=True, **kwargs)
        return o, lse.masked_fill(lse == -torch.inf, 0.0)

    return function


@each_feature
@each_w
def test_gradcheck(feature: str, w_shape: tuple[int, ...]) -> None:
    tensors = tensors_of(w_shape)
    function = function_of(FEATURES[feature]())
    assert torch.autograd.gradcheck(function, tensors, fast_mode=w_shape == (D,))
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


def test_second_derivative_when_only_some_inputs_need_it() -> None:
    for chosen in ((0,), (2,), (3,), (1, 3)):
        tensors = tensors_of(grad=False)
        for i in chosen:
            tensors[i].requires_grad_()
        wrt = [tensors[i] for i in chosen]
        results = []
        for attend in (fastattn.additive_attention, reference.additive_attention):
            grads = torch.autograd.grad(attend(*tensors).square().sum(), wrt, create_graph=True)
            results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), wrt))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_second_derivative_of_other_dtypes(dtype: torch.dtype) -> None:
    """A gradient penalty, in each dtype, against float64; w's gradient and its own are of w's dtype."""
    inputs = tensors_of(dtype=dtype)

    def penalty(*tensors: Tensor) -> list[Tensor]:
        o = fastattn.additive_attention(*tensors, causal=True)
        grads = torch.autograd.grad(o.float().square().sum(), tensors, create_graph=True)
        return list(torch.autograd.grad(sum(g.double().square().sum() for g in grads), tensors))

    exact = penalty(*(x.detach().double().requires_grad_() for x in inputs))
    for ours, wanted, x in zip(penalty(*inputs), exact, inputs, strict=True):
        assert ours.dtype == x.dtype
        assert (ours.double() - wanted).abs().max() < 20 * torch.finfo(dtype).eps * wanted.abs().max()


def test_gradients_through_either_output() -> None:
    tensors = tensors_of()
    for use_o, use_lse in ((True, False), (False, True), (True, True)):
        results = []
        for attend in (fastattn.additive_attention, reference.additive_attention):
            o, lse = attend(*tensors, return_lse=True)
            loss = use_o * o.sin().sum() + use_lse * lse.cos().sum()
            results.append(torch.autograd.grad(loss, tensors, materialize_grads=True))
        torch.testing.assert_close(*results)


def operator_arguments(feature: str, w_shape: tuple[int, ...], grad: bool) -> tuple[Any, ...]:
    kwargs = FEATURES[feature]()
    dropout_p = kwargs.get("dropout_p", 0.0)
    causal = {False: 0, "top_left": 1, True: 2}[kwargs.get("causal", False)]
    state = torch.tensor([3, 4]) if dropout_p else None
    q, k, v, w = tensors_of(w_shape, torch.float32, grad)
    return q, k, v, w, kwargs.get("mask"), kwargs.get("kv_lengths"), state, causal, dropout_p


@pytest.mark.parametrize("feature", ["dense", "all"])  # no optional argument, and every one
@each_w
def test_opcheck(feature: str, w_shape: tuple[int, ...]) -> None:
    torch.library.opcheck(ops.additive_attention_forward.default, (*operator_arguments(feature, w_shape, True), True))
    args = operator_arguments(feature, w_shape, False)
    torch.library.opcheck(ops.additive_attention_forward.default, (*args, False))
    o, lse, stats = ops.additive_attention_forward(*args, True)
    for d_lse in (None, torch.randn_like(lse)) if feature == "dense" else (torch.randn_like(lse),):
        upstream = (torch.randn_like(o), d_lse)
        torch.library.opcheck(ops.additive_attention_backward.default, (*upstream, *args[:4], o, stats, *args[4:]))


@pytest.mark.parametrize(
    ("feature", "backend", "rank"),
    [("dense", "aot_eager", 4), ("all", "aot_eager", 4), ("all", "aot_eager", 3), ("all", "inductor", 4)],
)
@pytest.mark.usefixtures("fresh_compiler")
def test_compile(feature: str, backend: str, rank: int) -> None:
    """One graph, forward and backward, static and dynamic, and the numbers of eager code."""
    kwargs = FEATURES[feature]()
    tensors = tensors_of((D,), torch.float32)
    if rank == 3:
        tensors[:3] = [x[:, 0].detach().requires_grad_() for x in tensors[:3]]
        kwargs |= {"mask": kwargs["mask"][:, 0]} if "mask" in kwargs else {}
    if backend == "inductor":
        kwargs.pop("dropout_p", None)  # it draws other random numbers
    for dynamic in (False, True) if feature == "all" and rank == 4 else (True,):
        compiled = torch.compile(fastattn.additive_attention, fullgraph=True, dynamic=dynamic, backend=backend)
        results = []
        for function in (compiled, fastattn.additive_attention):
            torch.manual_seed(11)
            o, lse = function(*tensors, return_lse=True, **kwargs)
            loss = o.sin().sum() + torch.where(lse == -torch.inf, 0.0, lse).cos().sum()
            results.append((o.detach(), lse.detach(), *torch.autograd.grad(loss, tensors)))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "name", ["grad", "grad_of_grad", "vmap", "vmap_shared_keys", "per_sample_gradients", "jvp", "hessian", "dual"]
)
def test_transforms(name: str) -> None:
    func = torch.func
    q, k, v, w = tensors_of(grad=False)
    stack = [torch.stack([x, x.flip(2), -x]) for x in (q, k, v)]

    def loss(attend: Any) -> Callable[..., Tensor]:
        return lambda q, k, v, w: attend(q, k, v, w, causal=True).sin().sum()

    def dual(attend: Any) -> Any:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(attend(q, k, v, forward_ad.make_dual(w, w.flip(1)))).tangent

    transform: Callable[[Any], Any] = {
        "grad": lambda f: func.grad(loss(f), argnums=(0, 1, 2, 3))(q, k, v, w),
        "grad_of_grad": lambda f: func.grad(lambda w: func.grad(loss(f), 3)(q, k, v, w).square().sum())(w),
        "vmap": lambda f: func.vmap(lambda q, k, v: f(q, k, v, w))(*stack),
        "vmap_shared_keys": lambda f: func.vmap(f, in_dims=(0, None, None, None))(stack[0], k, v, w),
        "per_sample_gradients": lambda f: func.vmap(func.grad(loss(f), 3), in_dims=(0, 0, 0, None))(*stack, w),
        "jvp": lambda f: func.jvp(lambda q, w: f(q, k, v, w), (q, w), (q.flip(2), w.flip(1))),
        "hessian": lambda f: func.hessian(lambda w: loss(f)(q[:1], k[:1], v[:1], w))(w),
        "dual": dual,
    }[name]
    torch.testing.assert_close(transform(fastattn.additive_attention), transform(reference.additive_attention))


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=dtype_id)
@pytest.mark.parametrize("given", [torch.float32, torch.float16, torch.bfloat16], ids=dtype_id)
def test_autocast(dtype: torch.dtype, given: torch.dtype) -> None:
    """All of q, k, v and w are cast; gradients have the inputs' dtype; float64 is left alone."""
    tensors = tensors_of(dtype=given)
    with torch.autocast("cpu", dtype=dtype):
        o, lse = fastattn.additive_attention(*tensors, return_lse=True)
        assert fastattn.additive_attention(*tensors_of()).dtype == torch.float64
    assert (o.dtype, lse.dtype) == (dtype, torch.float32)
    wanted = fastattn.additive_attention(*(x.to(dtype) for x in tensors))
    assert torch.equal(o, wanted)
    for x, grad in zip(tensors, torch.autograd.grad(o.float().sin().sum(), tensors), strict=True):
        assert grad.dtype == x.dtype


def test_a_change_in_place_is_noticed() -> None:
    for i in range(4):
        tensors = tensors_of()
        o = fastattn.additive_attention(*(x * 1 for x in tensors))
        copies = [x * 1 for x in tensors]
        o = fastattn.additive_attention(*copies)
        with torch.no_grad():
            copies[i].mul_(2.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            o.sum().backward()


@pytest.mark.parametrize("layout", ["contiguous", "blhd"])
def test_results_lie_as_inputs_do(layout: str) -> None:
    def arrange(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2) if layout == "blhd" else x

    q, k, v, w = tensors_of(grad=False, dtype=torch.float32)
    args = (arrange(q), arrange(k), arrange(v), w, None, None, None, 0, 0.0)
    results = ops.additive_attention_forward(*args, True)
    fakes = ops.additive_attention_forward(*(x.to("meta") if isinstance(x, Tensor) else x for x in args), True)
    for real, fake in zip(results, fakes, strict=True):
        assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)
    assert results[0].stride() == arrange(torch.empty(B, Hq, Lq, Dv)).stride()


# --- Messages ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bad:
    """A call with one bad argument; those that are not given are good."""

    id: str
    error: type[Exception]
    parts: tuple[str, ...]
    arguments: dict[str, Any] = field(default_factory=dict)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


CALLS = [
    Bad("w-not-a-tensor", TypeError, ("w is a list", "must be a torch.Tensor"), {"w": [1.0]}),
    Bad("w-none", TypeError, ("w is a NoneType", "must be a torch.Tensor"), {"w": None}),
    Bad("q-not-a-tensor", TypeError, ("q is a float", "must be a torch.Tensor"), {"q": 1.0}),
    Bad("v-none", TypeError, ("v is a NoneType", "must be a torch.Tensor"), {"v": None}),
    Bad("w-sparse", TypeError, ("w has layout torch.sparse_coo", "w.to_dense()"), {"w": zeros(Hq, D).to_sparse()}),
    Bad("w-heads", ValueError, ("w has shape (2, 4)", "(D,) = (4,)", "(Hq, D) = (4, 4)"), {"w": zeros(2, D)}),
    Bad("w-dim", ValueError, ("w has shape (5,)", "(D,) = (4,)"), {"w": zeros(5)}),
    Bad("w-rank", ValueError, ("w has shape (1, 4, 4)",), {"w": zeros(1, Hq, D)}),
    Bad("w-dtype", TypeError, ("w is torch.float64 but q is torch.float32", "w.to(torch.float32)"),
        {"w": zeros(D, dtype=torch.float64)}),
    Bad("w-device", ValueError, ("w is on meta but q is on cpu", "w.to(q.device)"), {"w": zeros(D).to("meta")}),
    Bad("k-dim", ValueError, ("k has head dimension 5 but q has 4", "additive scores add q and k"),
        {"k": zeros(B, Hkv, Lk, 5)}),
    Bad("k-heads", ValueError, ("k has 3 heads but q has 4",), {"k": zeros(B, 3, Lk, D), "v": zeros(B, 3, Lk, Dv)}),
    Bad("k-dtype", TypeError, ("k is torch.float64 but q is torch.float32",), {"k": zeros(B, Hkv, Lk, D).double()}),
    Bad("q-integers", TypeError, ("q is torch.int64",), {"q": zeros(B, Hq, Lq, D).long()}),
    Bad("q-rank", ValueError, ("q has 2 dimensions, shape (3, 4)",), {"q": zeros(Lq, D)}),
    Bad("k-rank", ValueError, ("k has 3 dimensions", "additive_attention takes four, (B, H, L, D), or for one head"
        " three, (B, L, D), in all of q, k and v: add"), {"k": zeros(B, Lk, D)}),
    Bad("one-head-k-rank", ValueError, ("k has 4 dimensions, shape (2, 2, 5, 4), but q has 3", "unsqueeze(1)"),
        {"q": zeros(B, Lq, D)}),
    Bad("one-head-v-rank", ValueError, ("v has 4 dimensions", "but q has 3"),
        {"q": zeros(B, Lq, D), "k": zeros(B, Lk, D)}),
    Bad("one-head-mask-rank", ValueError,
        ("mask has shape (2, 1, 3, 5) but q has 3 dimensions", "(B, Lq, Lk) = (2, 3, 5)"),
        {"q": zeros(B, Lq, D), "k": zeros(B, Lk, D), "v": zeros(B, Lk, Dv), "mask": torch.ones(B, 1, Lq, Lk).bool()}),
    Bad("one-head-w", ValueError, ("w has shape (4, 4)", "(Hq, D) = (1, 4)"),
        {"q": zeros(B, Lq, D), "k": zeros(B, Lk, D), "v": zeros(B, Lk, Dv)}),
    Bad("one-head-mask-shape", ValueError,
        ("mask has shape (2, 5, 3) but q has 3 dimensions", "(B, Lq, Lk) = (2, 3, 5): each dimension must be 1"),
        {"q": zeros(B, Lq, D), "k": zeros(B, Lk, D), "v": zeros(B, Lk, Dv), "mask": torch.ones(B, Lk, Lq).bool()}),
    Bad("mask-shape", ValueError, ("mask has shape (5, 3)",), {"mask": torch.ones(Lk, Lq).bool()}),
    Bad("mask-dtype", TypeError, ("mask is torch.float32",), {"mask": torch.ones(Lq, Lk)}),
    Bad("mask-not-a-tensor", TypeError, ("mask is a bool", "must be a torch.Tensor"), {"mask": True}),
    Bad("lengths-dtype", TypeError, ("kv_lengths is torch.int64",), {"kv_lengths": torch.tensor([1, 1])}),
    Bad("lengths-large", ValueError, ("kv_lengths[1] is 6 but k has length 5",),
        {"kv_lengths": torch.tensor([5, 6], dtype=torch.int32)}),
    Bad("causal-name", ValueError, ("causal is 'left'", "'bottom_right'"), {"causal": "left"}),
    Bad("causal-type", TypeError, ("causal is a NoneType",), {"causal": None}),
    Bad("dropout-large", ValueError, ("dropout_p is 1.5", "[0, 1]"), {"dropout_p": 1.5}),
    Bad("dropout-type", TypeError, ("dropout_p is a str",), {"dropout_p": "half"}),
    Bad("dropout-none", TypeError, ("dropout_p is a NoneType",), {"dropout_p": None}),
]  # fmt: skip


def call(arguments: dict[str, Any]) -> Any:
    good: dict[str, Any] = {"q": zeros(B, Hq, Lq, D), "k": zeros(B, Hkv, Lk, D), "v": zeros(B, Hkv, Lk, Dv)}
    good["w"] = zeros(Hq, D)
    return fastattn.additive_attention(**good | arguments)


@pytest.mark.parametrize("bad", [pytest.param(bad, id=bad.id) for bad in CALLS])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_message(bad: Bad, grad: bool) -> None:
    arguments = dict(bad.arguments)
    if grad and "q" not in arguments:
        arguments["q"] = zeros(B, Hq, Lq, D).requires_grad_()
    with pytest.raises(bad.error) as raised:
        call(arguments)
    text = str(raised.value)
    assert type(raised.value) is bad.error
    assert text.startswith("fastattn: ")
    assert "\n" not in text
    assert text.endswith(".")
    for part in bad.parts:
        assert part in text


def test_good_arguments_pass() -> None:
    lengths = torch.tensor([0, Lk], dtype=torch.int32)
    o = call({"mask": torch.ones(1, Lk).bool(), "kv_lengths": lengths, "causal": "top_left", "dropout_p": 1})
    assert o.shape == (B, Hq, Lq, Dv)


def test_a_bad_probability_draws_nothing() -> None:
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="dropout_p"):
        call({"dropout_p": 2.0})
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("id", ["w-heads", "w-dtype", "k-heads", "mask-shape", "lengths-dtype"])
def test_meta_tensors_are_refused_alike(id: str) -> None:
    bad = next(bad for bad in CALLS if bad.id == id)
    good = {"q": zeros(B, Hq, Lq, D), "k": zeros(B, Hkv, Lk, D), "v": zeros(B, Hkv, Lk, Dv), "w": zeros(Hq, D)}
    arguments = good | bad.arguments
    meta = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in arguments.items()}
    with pytest.raises(bad.error, match=re.escape(bad.parts[0])):
        call(meta)


def test_backward_without_statistics() -> None:
    """Somebody calls the operator without save_stats, and then differentiates."""
    q, k, v, w = tensors_of(dtype=torch.float32)
    o, _, _ = ops.additive_attention_forward(q, k, v, w, None, None, None, 0, 0.0, False)
    with pytest.raises((ValueError, RuntimeError), match="stats is empty"):
        o.sum().backward()
