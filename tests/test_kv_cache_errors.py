"""Every call that attention_with_kv_cache refuses: what the message says, and that not a bit of the cache changed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn

from .bad_calls import Bad, zeros
from .kv_cache_calls import bits

B, Hq, Hkv, Lq, Lmax, D, Dv, Lnew = 2, 4, 2, 3, 12, 8, 6, 3
PAGES, PAGE = 5, 4


def int32(*numbers: Any) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def good(kind: str = "") -> dict[str, Any]:
    """A call that works: contiguous, "paged" or "int8"."""
    arguments: dict[str, Any] = {
        "q": zeros(B, Hq, Lq, D),
        "k_cache": zeros(B, Hkv, Lmax, D),
        "v_cache": zeros(B, Hkv, Lmax, Dv),
        "k": torch.ones(B, Hkv, Lnew, D),
        "v": torch.ones(B, Hkv, Lnew, Dv),
        "cache_lengths": int32(0, 5),
    }
    if kind == "paged":
        arguments |= {"k_cache": zeros(PAGES, Hkv, PAGE, D), "v_cache": zeros(PAGES, Hkv, PAGE, Dv)}
        arguments["block_table"] = int32([3, 0], [1, 4])
    if kind == "int8":
        arguments |= {"k_cache": zeros(B, Hkv, Lmax, D).char(), "v_cache": zeros(B, Hkv, Lmax, Dv).char()}
        arguments |= {"k_scale": zeros(B, Hkv, Lmax), "v_scale": zeros(B, Hkv, Lmax)}
    return arguments


def call(arguments: dict[str, Any]) -> Any:
    return fastattn.attention_with_kv_cache(**arguments)


def rotary(cos: Tensor | None = None, sin: Tensor | None = None, **more: Any) -> dict[str, Any]:
    cos = zeros(Lmax, 2) if cos is None else cos
    return {"rotary_cos": cos, "rotary_sin": torch.zeros_like(cos) if sin is None else sin, **more}


both = zeros(B, Hkv, Lmax, D + Dv)
one = zeros(B, Hkv, Lmax, D)
double = zeros(B, Hkv, Lmax, D).double()
V, T = ValueError, TypeError

CONTIGUOUS = [
    # --- kinds, dtypes and devices
    Bad("cache-not-a-tensor", T, ("k_cache is a list", "must be a torch.Tensor"), {"k_cache": [1.0]}),
    Bad("no-cache", T, ("v_cache is a NoneType",), {"v_cache": None}),
    Bad("no-lengths", T, ("cache_lengths is a NoneType",), {"cache_lengths": None}),
    Bad("lengths-list", T, ("cache_lengths is a list",), {"cache_lengths": [0, 5]}),
    Bad("q-dtype", T, ("q is torch.int64",), {"q": zeros(B, Hq, Lq, D).long()}),
    Bad(
        "cache-dtype", T, ("k_cache is torch.float64 but q is torch.float32", ".to(k_cache.dtype)"), {"k_cache": double}
    ),
    Bad("k-dtype", T, ("k is torch.float16 but q is torch.float32",), {"k": zeros(B, Hkv, Lnew, D).half()}),
    Bad(
        "lengths-dtype",
        T,
        ("cache_lengths is torch.int64", ".to(torch.int32)"),
        {"cache_lengths": torch.tensor([0, 5])},
    ),
    Bad("int8-no-scales", T, ("k_cache is torch.int8", "pass them"), {"k_cache": zeros(B, Hkv, Lmax, D).char()}),
    Bad("device", V, ("v_cache is on meta but q is on cpu",), {"v_cache": zeros(B, Hkv, Lmax, Dv).to("meta")}),
    Bad("lengths-device", V, ("cache_lengths is on meta",), {"cache_lengths": int32(0, 5).to("meta")}),
    # --- shapes
    Bad("q-rank", V, ("q has 3 dimensions", "(pages, H, page_size, D)"), {"q": zeros(Hq, Lq, D)}),
    Bad("cache-rank", V, ("k_cache has 3 dimensions",), {"k_cache": zeros(Hkv, Lmax, D)}),
    Bad("cache-batch", V, ("k_cache has batch size 3 but q has 2", "block_table"), {"k_cache": zeros(3, Hkv, Lmax, D)}),
    Bad("v-batch", V, ("v_cache has batch size 3 but q has 2",), {"v_cache": zeros(3, Hkv, Lmax, Dv)}),
    Bad("v-heads", V, ("v_cache has 1 heads but k_cache has 2",), {"v_cache": zeros(B, 1, Lmax, Dv)}),
    Bad(
        "heads",
        V,
        ("k_cache has 3 heads but q has 4", "multiple"),
        {"k_cache": zeros(B, 3, Lmax, D), "v_cache": zeros(B, 3, Lmax, Dv)},
    ),
    Bad("v-length", V, ("v_cache has length 11 but k_cache has 12",), {"v_cache": zeros(B, Hkv, 11, Dv)}),
    Bad("head-dim", V, ("k_cache has head dimension 9 but q has 8",), {"k_cache": zeros(B, Hkv, Lmax, 9)}),
    Bad("no-head-dim", V, ("v_cache has head dimension 0",), {"v_cache": zeros(B, Hkv, Lmax, 0)}),
    Bad("k-shape", V, ("k has shape (2, 1, 3, 8)", "(2, 2, 3, 8)"), {"k": zeros(B, 1, Lnew, D)}),
    Bad("v-shape", V, ("v has shape (2, 2, 2, 6)", "(2, 2, 3, 6)"), {"v": zeros(B, Hkv, 2, Dv)}),
    Bad("k-alone", V, ("k is given but v is not", "both or neither"), {"v": None}),
    Bad("v-alone", V, ("v is given but k is not",), {"k": None}),
    Bad("lengths-shape", V, ("cache_lengths has shape (3,)", "(2,)"), {"cache_lengths": int32(0, 5, 1)}),
    Bad(
        "too-many",
        V,
        ("k has length 13 but the cache holds 12 keys", "fastattn.KVCache"),
        {"k": zeros(B, Hkv, 13, D), "v": zeros(B, Hkv, 13, Dv)},
    ),
    # --- lengths
    Bad("overflow", V, ("cache_lengths[1] is 10 and 3 keys", "[0, 9]", "KVCache"), {"cache_lengths": int32(0, 10)}),
    Bad("negative", V, ("cache_lengths[0] is -1", "[0, 9]"), {"cache_lengths": int32(-1, 0)}),
    Bad("huge", V, ("cache_lengths[0] is 2147483647",), {"cache_lengths": int32(2**31 - 1, 0)}),
    # --- memory
    Bad(
        "columns",
        V,
        ("k_cache has stride 12 in its last dimension", "contiguous"),
        {"k_cache": zeros(B, Hkv, D, Lmax).mT},
    ),
    Bad(
        "expanded",
        V,
        ("k_cache has rows that share memory", "expand()"),
        {"k_cache": zeros(1, Hkv, Lmax, D).expand(B, Hkv, Lmax, D)},
    ),
    Bad("same", V, ("v_cache and k_cache share memory",), {"k_cache": one, "v_cache": one[..., 2:]}),
    Bad(
        "shifted",
        V,
        ("v_cache and k_cache share memory",),
        {"k_cache": both[..., :D], "v_cache": both[..., 7 : 7 + Dv]},
    ),
    Bad("k-in-cache", V, ("k and k_cache share memory", "k.clone()"), {"k_cache": one, "k": one[:, :, :Lnew]}),
    Bad("q-in-cache", V, ("q and k_cache share memory",), {"k_cache": one, "q": one[:, :1, :Lq].expand(B, Hq, Lq, D)}),
    # --- rotary
    Bad("cos-alone", V, ("rotary_cos is given but rotary_sin is not",), {"rotary_cos": zeros(Lmax, 2)}),
    Bad("cos-dtype", T, ("rotary_cos is torch.float16 but q",), rotary(zeros(Lmax, 2).half())),
    Bad("sin-dtype", T, ("rotary_sin is torch.float64 but rotary_cos",), rotary(sin=zeros(Lmax, 2).double())),
    Bad("cos-wide", V, ("rotary_cos has shape (12, 5)", "rotary_dim of 2 to D = 8"), rotary(zeros(Lmax, 5))),
    Bad("cos-rank", V, ("rotary_cos has shape (12,)",), rotary(zeros(Lmax))),
    Bad("sin-shape", V, ("rotary_sin has shape (12, 3)", "(12, 2)"), rotary(sin=zeros(Lmax, 3))),
    Bad("cos-short", V, ("cache_lengths[1] is 5", "rotary_cos has 7 positions"), rotary(zeros(7, 2))),
    Bad("cos-none", V, ("rotary_cos has 2 positions but 3 tokens",), rotary(zeros(2, 2))),
    Bad("rotary-no-k", V, ("rotary_cos is given but k is not",), rotary(k=None, v=None)),
    Bad("rotary-long-q", V, ("q has length 4 but k has 3", "rotary"), rotary(q=zeros(B, Hq, 4, D))),
    Bad("interleaved", T, ("rotary_interleaved is a int",), {"rotary_interleaved": 1}),
    # --- scores
    Bad("top-left", V, ("causal is 'top_left'", "'bottom_right'"), {"causal": "top_left"}),
    Bad("causal", V, ("causal is 'left'",), {"causal": "left"}),
    Bad("window", V, ("window is (-1, 0)",), {"window": (-1, 0)}),
    Bad("scale", V, ("scale is nan",), {"scale": math.nan}),
    Bad("softcap", V, ("softcap is -1",), {"softcap": -1.0}),
    Bad("softcap-kind", T, ("softcap is a str",), {"softcap": "1"}),
    Bad("alibi", V, ("alibi_slopes has shape (3,)",), {"alibi_slopes": zeros(3)}),
    Bad("sinks", V, ("sinks has shape (3,)",), {"sinks": zeros(3)}),
    # --- gradients
    Bad(
        "grad-q",
        V,
        ("q requires a gradient", "torch.no_grad()", "fastattn.attention"),
        {"q": zeros(B, Hq, Lq, D).requires_grad_()},
    ),
    Bad("grad-sinks", V, ("sinks requires a gradient",), {"sinks": zeros(Hq).requires_grad_()}),
]

PAGED = [
    Bad("table-rank", V, ("block_table has shape (4,)", "(B, max_pages)"), {"block_table": int32(0, 1, 2, 3)}),
    Bad("table-batch", V, ("block_table has shape (1, 2)", "B = 2"), {"block_table": int32([3, 0])}),
    Bad("table-dtype", T, ("block_table is torch.int64",), {"block_table": torch.tensor([[3, 0], [1, 4]])}),
    Bad("pages", V, ("v_cache has 4 pages but k_cache has 5",), {"v_cache": zeros(4, Hkv, PAGE, Dv)}),
    Bad("no-rows", V, ("k_cache has page size 0",), {"k_cache": zeros(5, Hkv, 0, D), "v_cache": zeros(5, Hkv, 0, Dv)}),
    Bad(
        "entry", V, ("block_table[1, 1] is 5 but k_cache has 5 pages", "[0, 5)"), {"block_table": int32([3, 0], [1, 5])}
    ),
    Bad("read-entry", V, ("block_table[1, 0] is -1",), {"block_table": int32([3, 0], [-1, 4])}),
    Bad("overflow", V, ("cache_lengths[1] is 6", "a wider block_table"), {"cache_lengths": int32(0, 6)}),
    Bad(
        "two-append",
        V,
        ("block_table[1, 1] and block_table[0, 0] are both page 4", "its own page"),
        {"block_table": int32([4, 0], [1, 4])},
    ),
    Bad(
        "read-and-overwritten",
        V,
        ("block_table[0, 0] is page 1, row 0", "block_table[1, 0] reads", "copy"),
        {"block_table": int32([1, 0], [1, 4])},
    ),
    Bad(
        "twice-in-one-sequence",
        V,
        ("block_table[1, 1] is page 1, row 1", "block_table[1, 0] reads"),
        {"block_table": int32([3, 0], [1, 1])},
    ),
]

INT8 = [
    Bad("scale-alone", V, ("k_scale is given but v_scale is not",), {"v_scale": None}),
    Bad("scale-dtype", T, ("v_scale is torch.float64", "v_scale.float()"), {"v_scale": zeros(B, Hkv, Lmax).double()}),
    Bad("scale-shape", V, ("k_scale has shape (2, 2)", "(2, 2, 12)"), {"k_scale": zeros(B, Hkv)}),
    Bad("float-cache", T, ("v_cache is torch.float32 but k_scale",), {"v_cache": zeros(B, Hkv, Lmax, Dv)}),
    Bad(
        "scale-expanded",
        V,
        ("v_scale has rows that share memory",),
        {"v_scale": zeros(1, 1, Lmax).expand(B, Hkv, Lmax)},
    ),
]

KINDS = {"": CONTIGUOUS, "paged": PAGED, "int8": INT8}


@pytest.mark.parametrize(
    ("kind", "bad"),
    [pytest.param(kind, bad, id=f"{kind or 'contiguous'}-{bad.id}") for kind, bads in KINDS.items() for bad in bads],
)
def test_refused_before_anything_is_written(kind: str, bad: Bad) -> None:
    arguments = good(kind) | bad.arguments
    caches = [
        x
        for name in ("k_cache", "v_cache", "k_scale", "v_scale")
        if isinstance(x := arguments.get(name), Tensor) and x.device.type == "cpu"
    ]
    before = [bits(x).clone() for x in caches]
    bad.assert_refused(call, arguments)
    assert all(torch.equal(bits(x), old) for x, old in zip(caches, before, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_calls_that_these_are_made_of_work(kind: str) -> None:
    arguments = good(kind)
    assert call(arguments).shape == (B, Hq, Lq, Dv)
    assert arguments["k_cache"].any()
    assert arguments["v_cache"].any()


def test_a_tangent_is_refused() -> None:
    arguments = good()
    with torch.autograd.forward_ad.dual_level():
        arguments["q"] = torch.autograd.forward_ad.make_dual(arguments["q"], torch.ones(B, Hq, Lq, D))
        Bad("", V, ("q has a tangent", "fastattn.attention")).assert_refused(call, arguments)


def test_gradients_matter_only_where_they_are_recorded() -> None:
    arguments = good() | {"q": zeros(B, Hq, Lq, D).requires_grad_()}
    with torch.no_grad():
        assert not call(arguments).requires_grad
    with torch.inference_mode():
        assert call(arguments).is_inference()


def test_halves_of_one_allocation_do_not_overlap() -> None:
    """Interleaved in any dimension; and with the same extent, one element apart."""
    for dim in (0, 1, 2, 3):
        halves = torch.zeros(4, 6, 10, 12).chunk(2, dim)
        B, H, _L, D = halves[0].shape
        new = torch.ones(B, H, 2, D)
        lengths = torch.zeros(B, dtype=torch.int32)
        fastattn.attention_with_kv_cache(new, *halves, k=new, v=2 * new, cache_lengths=lengths)
        assert (halves[0][:, :, :2] == 1).all()
        assert (halves[1][:, :, :2] == 2).all()
        assert not torch.cat(halves, dim)[:, :, -1].any()


def test_an_append_without_new_tokens_writes_nothing_and_asks_for_nothing() -> None:
    """A cache that is only read may share its memory with whatever it likes."""
    cache = torch.randn(1, 1, Lmax, D).expand(B, Hkv, Lmax, D)
    o = fastattn.attention_with_kv_cache(zeros(B, Hq, Lq, D), cache, cache, cache_lengths=int32(4, 12))
    assert torch.allclose(o[0, 0, 0], cache[0, 0, :4].mean(0), atol=1e-6)
