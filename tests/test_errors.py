"""Every message that a bad argument earns: its type, what it names, and that nothing was computed first.

One test for each. The text is matched in parts: the argument and its value, then the remedy.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn

from .bad_calls import Bad
from .conftest import ISAS

B, Hq, Hkv, Lq, Lk, D, Dv = 2, 4, 2, 5, 7, 8, 6
ops = torch.ops.fastattn


def q(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape or (B, Hq, Lq, D), dtype=dtype)


def k(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape or (B, Hkv, Lk, D), dtype=dtype)


def v(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape or (B, Hkv, Lk, Dv), dtype=dtype)


def quantized(x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is about to drop these
        return torch.quantize_per_tensor(x, 1.0, 0, torch.qint8)


CALLS = [
    # --- what q, k and v are
    Bad("q-not-a-tensor", TypeError, ("q is a list", "must be a torch.Tensor"), {"q": [[1.0]]}),
    Bad("v-missing", TypeError, ("v is a NoneType", "must be a torch.Tensor"), {"v": None}),
    Bad("mask-not-a-tensor", TypeError, ("mask is a bool", "must be a torch.Tensor"), {"mask": True}),
    Bad("lengths-not-a-tensor", TypeError, ("kv_lengths is a list",), {"kv_lengths": [7, 7]}),
    Bad("sparse", TypeError, ("k has layout torch.sparse_coo", "k.to_dense()"), {"k": k().to_sparse()}),
    Bad("sparse-bias", TypeError, ("bias has layout torch.sparse_coo",), {"bias": q(1, 1, Lq, Lk).to_sparse()}),
    Bad(
        "nested",
        TypeError,
        ("q is a nested tensor", "kv_lengths"),
        {"q": torch.nested.nested_tensor([q(4, 5, 8), q(4, 3, 8)], layout=torch.jagged)},
    ),
    Bad(
        "quantized",
        TypeError,
        ("k is quantized", "k.dequantize()"),
        {"k": quantized(k())},
    ),
    Bad(
        "complex", TypeError, ("q is torch.complex64", "torch.float32, torch.bfloat16"), {"q": q(dtype=torch.complex64)}
    ),
    Bad("integers", TypeError, ("q is torch.int64", "convert with q.to()"), {"q": q(dtype=torch.int64)}),
    Bad("float8", TypeError, ("q is torch.float8_e4m3fn",), {"q": q(dtype=torch.float8_e4m3fn)}),
    Bad(
        "k-dtype",
        TypeError,
        ("k is torch.float64 but q is torch.float32", "k.to(torch.float32)"),
        {"k": k(dtype=torch.float64)},
    ),
    Bad(
        "v-dtype",
        TypeError,
        ("v is torch.bfloat16 but q is torch.float32", "v.to(torch.float32)"),
        {"v": v(dtype=torch.bfloat16)},
    ),
    Bad("k-device", ValueError, ("k is on meta but q is on cpu", "k.to(q.device)"), {"k": k().to("meta")}),
    Bad("mask-device", ValueError, ("mask is on meta but q is on cpu",), {"mask": torch.ones(1).bool().to("meta")}),
    Bad("lengths-device", ValueError, ("kv_lengths is on meta but q",), {"kv_lengths": torch.ones(B).int().to("meta")}),
    # --- shapes
    Bad("q-rank", ValueError, ("q has 3 dimensions, shape (4, 5, 8)", "unsqueeze"), {"q": q(Hq, Lq, D)}),
    Bad("k-rank", ValueError, ("k has 5 dimensions, shape (1, 2, 2, 7, 8)",), {"k": k(1, B, Hkv, Lk, D)}),
    Bad("v-rank", ValueError, ("v has 0 dimensions, shape ()",), {"v": torch.tensor(1.0)}),
    Bad("k-batch", ValueError, ("k has batch size 3 but q has 2", "expand()"), {"k": k(3, Hkv, Lk, D)}),
    Bad("v-batch", ValueError, ("v has batch size 1 but q has 2", "expand()"), {"v": v(1, Hkv, Lk, Dv)}),
    Bad("v-heads", ValueError, ("v has 4 heads but k has 2",), {"v": v(B, 4, Lk, Dv)}),
    Bad(
        "heads-multiple",
        ValueError,
        ("k has 3 heads but q has 4", "q's heads must be a multiple of k's"),
        {"k": k(B, 3, Lk, D), "v": v(B, 3, Lk, Dv)},
    ),
    Bad("no-key-heads", ValueError, ("k has 0 heads but q has 4",), {"k": k(B, 0, Lk, D), "v": v(B, 0, Lk, Dv)}),
    Bad("v-length", ValueError, ("v has length 6 but k has 7", "every key needs one value"), {"v": v(B, Hkv, 6, Dv)}),
    Bad("head-dim", ValueError, ("k has head dimension 9 but q has 8",), {"k": k(B, Hkv, Lk, 9)}),
    Bad("no-head-dim", ValueError, ("q and k have head dimension 0",), {"q": q(B, Hq, Lq, 0), "k": k(B, Hkv, Lk, 0)}),
    Bad("no-value-dim", ValueError, ("v has head dimension 0",), {"v": v(B, Hkv, Lk, 0)}),
    # --- bias and mask
    Bad(
        "bias-shape",
        ValueError,
        ("bias has shape (2, 3, 5, 7)", "(B, Hq, Lq, Lk) = (2, 4, 5, 7)"),
        {"bias": torch.zeros(2, 3, 5, 7)},
    ),
    Bad("bias-rank", ValueError, ("bias has shape (1, 2, 4, 5, 7)",), {"bias": torch.zeros(1, 2, 4, 5, 7)}),
    Bad("bias-bool", TypeError, ("bias is torch.bool", "as mask"), {"bias": torch.ones(Lq, Lk).bool()}),
    Bad(
        "bias-dtype",
        TypeError,
        ("bias is torch.float64 but q is torch.float32", "bias.to(torch.float32)"),
        {"bias": torch.zeros(Lq, Lk, dtype=torch.float64)},
    ),
    Bad(
        "bias-dtype-16-bit",
        TypeError,
        ("bias is torch.float16 but q is torch.bfloat16", "q's dtype or torch.float32", "bias.to(torch.bfloat16)"),
        {
            "q": q(dtype=torch.bfloat16),
            "k": k(dtype=torch.bfloat16),
            "v": v(dtype=torch.bfloat16),
            "bias": torch.zeros(Lq, Lk, dtype=torch.float16),
        },
    ),
    Bad("mask-shape", ValueError, ("mask has shape (7, 5)", "from the last"), {"mask": torch.ones(Lk, Lq).bool()}),
    Bad("mask-dtype", TypeError, ("mask is torch.float32", "bias"), {"mask": torch.ones(Lq, Lk)}),
    # --- per-head and per-sequence tensors
    Bad("alibi-shape", ValueError, ("alibi_slopes has shape (5,)", "(Hq,) = (4,)"), {"alibi_slopes": torch.zeros(5)}),
    Bad(
        "alibi-batch",
        ValueError,
        ("alibi_slopes has shape (3, 4)", "(B, Hq) = (2, 4)"),
        {"alibi_slopes": torch.zeros(3, 4)},
    ),
    Bad("alibi-dtype", TypeError, ("alibi_slopes is torch.int64",), {"alibi_slopes": torch.zeros(4).long()}),
    Bad(
        "alibi-grad",
        ValueError,
        ("alibi_slopes requires a gradient", "detach()"),
        {"alibi_slopes": torch.zeros(4, requires_grad=True)},
    ),
    Bad("sinks-shape", ValueError, ("sinks has shape (2,)", "(Hq,) = (4,)"), {"sinks": torch.zeros(2)}),
    Bad("sinks-rank", ValueError, ("sinks has shape (1, 4)",), {"sinks": torch.zeros(1, 4)}),
    Bad("sinks-dtype", TypeError, ("sinks is torch.bool",), {"sinks": torch.zeros(4).bool()}),
    Bad(
        "lengths-dtype",
        TypeError,
        ("kv_lengths is torch.int64", "kv_lengths.to(torch.int32)"),
        {"kv_lengths": torch.tensor([7, 7])},
    ),
    Bad(
        "lengths-shape",
        ValueError,
        ("kv_lengths has shape (3,)", "(B,) = (2,)"),
        {"kv_lengths": torch.tensor([7, 7, 7], dtype=torch.int32)},
    ),
    Bad(
        "lengths-large",
        ValueError,
        ("kv_lengths[1] is 8 but k has length 7", "clamp"),
        {"kv_lengths": torch.tensor([7, 8], dtype=torch.int32)},
    ),
    Bad(
        "lengths-negative",
        ValueError,
        ("kv_lengths[0] is -1", "[0, 7]"),
        {"kv_lengths": torch.tensor([-1, 8], dtype=torch.int32)},
    ),
    # --- causal and window
    Bad("causal-name", ValueError, ("causal is 'bottom-right'", "'bottom_right'"), {"causal": "bottom-right"}),
    Bad("causal-type", TypeError, ("causal is a Tensor",), {"causal": torch.tensor(True)}),
    Bad("causal-none", TypeError, ("causal is a NoneType",), {"causal": None}),
    Bad("window-number", TypeError, ("window is 128", "pair (left, right)"), {"window": 128}),
    Bad("window-triple", TypeError, ("window is (1, 2, 3)",), {"window": (1, 2, 3)}),
    Bad("window-float", TypeError, ("window is (1.5, 0)", "must be an int"), {"window": (1.5, 0)}),
    Bad("window-negative", ValueError, ("window is (-1, 0)", "None"), {"window": (-1, 0)}),
    # --- numbers
    Bad("scale-nan", ValueError, ("scale is nan", "finite"), {"scale": float("nan")}),
    Bad("scale-inf", ValueError, ("scale is inf", "None for 1/sqrt(D)"), {"scale": float("inf")}),
    Bad("scale-beyond-float32", ValueError, ("scale is 1e+39", "finite in torch.float32"), {"scale": 1e39}),
    Bad("scale-type", TypeError, ("scale is a str", "float"), {"scale": "0.5"}),
    Bad("softcap-negative", ValueError, ("softcap is -1", "None for no cap"), {"softcap": -1.0}),
    Bad("softcap-nan", ValueError, ("softcap is nan",), {"softcap": float("nan")}),
    Bad("softcap-inf", ValueError, ("softcap is inf",), {"softcap": float("inf")}),
    Bad("softcap-type", TypeError, ("softcap is a str",), {"softcap": "2"}),
    Bad("dropout-negative", ValueError, ("dropout_p is -0.1", "[0, 1]"), {"dropout_p": -0.1}),
    Bad("dropout-large", ValueError, ("dropout_p is 1.5", "[0, 1]"), {"dropout_p": 1.5}),
    Bad("dropout-nan", ValueError, ("dropout_p is nan",), {"dropout_p": float("nan")}),
    Bad("dropout-type", TypeError, ("dropout_p is a str",), {"dropout_p": "half"}),
    Bad("dropout-none", TypeError, ("dropout_p is a NoneType",), {"dropout_p": None}),
    # --- sizes
    Bad(
        "overflow",
        ValueError,
        ("too large to address", "2^63 bytes"),
        {
            "q": torch.zeros(1, 1, 1, 1).expand(2**20, 2**20, 1, 2**10),
            "k": torch.zeros(1, 1, 1, 1).expand(2**20, 2**20, 2**10, 2**10),
            "v": torch.zeros(1, 1, 1, 1).expand(2**20, 2**20, 2**10, 2**10),
        },
    ),
]


def call(arguments: dict[str, Any], **more: Any) -> Any:
    tensors = {"q": q(), "k": k(), "v": v()} | arguments
    return fastattn.attention(tensors.pop("q"), tensors.pop("k"), tensors.pop("v"), **tensors, **more)


@pytest.mark.parametrize("bad", [pytest.param(bad, id=bad.id) for bad in CALLS])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_message(bad: Bad, grad: bool) -> None:
    arguments = dict(bad.arguments)
    if grad and "q" not in arguments:
        arguments["q"] = q().requires_grad_()
    bad.assert_refused(call, arguments)


def test_good_arguments_pass() -> None:
    """So that the calls above fail for their one bad argument."""
    assert call({}).shape == (B, Hq, Lq, Dv)
    slopes, sinks = torch.zeros(B, Hq), torch.zeros(Hq)
    lengths = torch.tensor([0, Lk], dtype=torch.int32)
    o = call({}, bias=torch.zeros(Lq, Lk), mask=torch.ones(1, Lk).bool(), alibi_slopes=slopes, sinks=sinks,
             kv_lengths=lengths, causal="top_left", window=(0, None), scale=0.0, softcap=1.0, dropout_p=1)  # fmt: skip
    assert o.shape == (B, Hq, Lq, Dv)


def test_ids_are_unique() -> None:
    assert len({bad.id for bad in CALLS}) == len(CALLS)


def test_slopes_that_require_grad_are_fine_without_grad_mode() -> None:
    with torch.no_grad():
        call({"alibi_slopes": torch.zeros(Hq, requires_grad=True)})


def test_memory_that_does_not_exist() -> None:
    """2^58 bytes of results: refused by the allocator, named, and the process lives."""
    huge = torch.zeros(1, 1, 1, 1).expand(2**14, 2**14, 2**14, 2**14)
    with pytest.raises(
        RuntimeError, match=r"^fastattn: there is not enough memory for a torch.float32 tensor of shape"
    ):
        call({"q": huge, "k": huge, "v": huge})


def test_a_bad_probability_draws_nothing() -> None:
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="dropout_p"):
        call({}, dropout_p=2.0)
    assert torch.equal(torch.get_rng_state(), before)


# --- The operators' own arguments, which the Python functions always get right ----------------------------------------


# Of an operator called without the Python functions around it; which of the two depends on torch's version.
OPERATOR_ERROR = (ValueError, RuntimeError)


def forward(*, rng_state: Tensor | None = None, causal: int = 0, window: tuple[int, int] = (-1, -1),
            alibi_slopes: Tensor | None = None, sinks: Tensor | None = None, dropout_p: float = 0.0,
            save_stats: bool = True) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return ops.attention_forward(
        q(),
        k(),
        v(),
        None,
        None,
        alibi_slopes,
        sinks,
        None,
        rng_state,
        causal,
        *window,
        None,
        0.0,
        dropout_p,
        save_stats,
    )


def backward(d_o: Tensor, stats: Tensor, o: Tensor, d_lse: Tensor | None = None, need_d_bias: bool = False,
             need_d_sinks: bool = False) -> Any:  # fmt: skip
    nothing = [None] * 6
    return ops.attention_backward(
        d_o, d_lse, q(), k(), v(), o, stats, *nothing, 0, -1, -1, None, 0.0, 0.0, need_d_bias, need_d_sinks
    )


def good() -> dict[str, Tensor]:
    o, _, stats = forward()
    return {"d_o": torch.zeros_like(o), "stats": stats, "o": o}


OPERATOR_CALLS: list[tuple[str, Callable[[], Any], str]] = [
    ("causal-code", lambda: forward(causal=3), "causal is 3; it must be 0 (none)"),
    ("window-code", lambda: forward(window=(-2, 0)), "window is (-2, 0)"),
    ("rng-missing", lambda: forward(dropout_p=0.5), "rng_state is missing"),
    (
        "rng-shape",
        lambda: forward(dropout_p=0.5, rng_state=torch.zeros(3, dtype=torch.int64)),
        "fastattn: rng_state has shape (3,); it must be (2,)",
    ),
    (
        "rng-dtype",
        lambda: forward(dropout_p=0.5, rng_state=torch.zeros(2)),
        "fastattn[TypeError]: rng_state is torch.float32; it must be torch.int64",
    ),
    ("alibi-dtype", lambda: forward(alibi_slopes=torch.zeros(4).double()), "alibi_slopes is torch.float64"),
    ("sinks-dtype", lambda: forward(sinks=torch.zeros(4).half()), "sinks is torch.float16 but must be torch.float32"),
    ("d_o-shape", lambda: backward(**good() | {"d_o": q()}), "d_o has shape (2, 4, 5, 8); it must be (2, 4, 5, 6)"),
    ("d_o-dtype", lambda: backward(**good() | {"d_o": good()["o"].double()}), "d_o is torch.float64"),
    ("o-shape", lambda: backward(**good() | {"o": q()}), "o has shape"),
    ("stats-empty", lambda: backward(**good() | {"stats": torch.empty(0)}), "save_stats=True"),
    ("stats-shape", lambda: backward(**good() | {"stats": torch.zeros(2, 2, 4, 4)}), "stats has shape"),
    ("d_lse-shape", lambda: backward(**good(), d_lse=torch.zeros(2, 4)), "d_lse has shape (2, 4)"),
    ("d_lse-dtype", lambda: backward(**good(), d_lse=torch.zeros(2, 4, 5).double()), "d_lse is torch.float64"),
    ("no-bias", lambda: backward(**good(), need_d_bias=True), "need_d_bias is True but there is no bias"),
    ("no-sinks", lambda: backward(**good(), need_d_sinks=True), "need_d_sinks is True but there are no sinks"),
    ("mask-sizes", lambda: ops.dropout_mask(torch.zeros(2).long(), -1, 1, 1, 1, 0.5), "(-1, 1, 1, 1)"),
    ("mask-p", lambda: ops.dropout_mask(torch.zeros(2).long(), 1, 1, 1, 1, 1.5), "dropout_p is 1.5"),
    ("isa-unknown", lambda: ops._set_isa("sse9"), f'"sse9" is unknown; it must be one of {", ".join(ISAS)}.'),
    ("peak-dtype", lambda: ops._measure_peak("float16", 1), 'dtype is "float16"'),
    ("peak-threads", lambda: ops._measure_peak("float32", 0), "threads is 0"),
    ("words-of-a-view", lambda: ops._sum_words(torch.zeros(4, 4).T, torch.zeros(4)), "x has shape (4, 4)"),
    ("words-cut", lambda: ops._sum_words(torch.zeros(4), torch.zeros(3)), "y has shape (3,) and 12 bytes"),
]


@pytest.mark.parametrize(("function", "part"), [pytest.param(f, p, id=name) for name, f, p in OPERATOR_CALLS])
def test_operator_message(function: Callable[[], Any], part: str) -> None:
    with pytest.raises(OPERATOR_ERROR, match=re.escape(part)) as raised:
        function()
    assert str(raised.value).startswith("fastattn")


def test_backward_without_statistics() -> None:
    """Somebody calls the operator without save_stats, and then differentiates."""
    args = [q().requires_grad_(), k(), v(), *[None] * 6, 0, -1, -1, None, 0.0, 0.0, False]
    o, _, _ = ops.attention_forward(*args)
    with pytest.raises(OPERATOR_ERROR, match="stats is empty"):
        o.sum().backward()


# --- Tensors without data: meta tensors, and traces -------------------------------------------------------------------


@pytest.mark.parametrize("id", ["heads-multiple", "bias-shape", "lengths-shape", "k-dtype", "mask-dtype", "scale-nan"])
def test_meta_tensors_are_refused_alike(id: str) -> None:
    bad = next(bad for bad in CALLS if bad.id == id)
    tensors = {"q": q(), "k": k(), "v": v()} | bad.arguments
    meta = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in tensors.items()}
    with pytest.raises(bad.error, match=re.escape(bad.parts[0])):
        call(meta)


def test_compile_shows_the_message() -> None:
    compiled = torch.compile(fastattn.attention, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="k has 3 heads but q has 4"):
        compiled(q(), k(B, 3, Lk, D), v(B, 3, Lk, Dv))


def test_compiled_code_checks_values_when_it_runs() -> None:
    compiled = torch.compile(fastattn.attention, backend="eager", fullgraph=True)
    lengths = torch.tensor([7, 7], dtype=torch.int32)
    compiled(q(), k(), v(), kv_lengths=lengths)
    with pytest.raises(OPERATOR_ERROR, match=r"kv_lengths\[1\] is 8"):
        compiled(q(), k(), v(), kv_lengths=lengths + torch.tensor([0, 1], dtype=torch.int32))


# --- The environment --------------------------------------------------------------------------------------------------


def import_with(capability: str) -> subprocess.CompletedProcess[str]:
    code = "import fastattn, torch; print(torch.ops.fastattn._isa())"
    environment = os.environ | {"FASTATTN_CPU_CAPABILITY": capability}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_capability_is_forced() -> None:
    assert import_with("baseline").stdout.strip() == "baseline"


def test_unknown_capability_fails_the_import() -> None:
    result = import_with("avx9000")
    assert result.returncode != 0
    assert '"avx9000" is unknown' in result.stderr
    assert "FASTATTN_CPU_CAPABILITY" in result.stderr


def test_capability_that_the_processor_lacks_fails_the_import() -> None:
    lacking = set(ops._all_isas().split(",")) - set(ops._supported_isas().split(","))
    if not lacking:
        pytest.skip("this processor has every level")
    result = import_with(lacking.pop())
    assert result.returncode != 0
    assert "is not supported by this processor" in result.stderr
