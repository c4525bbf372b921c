"""fastattn.integrations.flash_attn: FlashAttention's signatures and semantics, against the formula written out."""

from __future__ import annotations

import doctest
import importlib
import inspect
import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.integrations import flash_attn

from .bad_calls import Bad

B, Lq, Lk, H, Hkv, D = 2, 7, 11, 4, 2, 16
V, T = ValueError, TypeError


def textbook(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, window: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    slopes: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What FlashAttention's documentation says, in double: (B, L, H, D) in and out, and the log-sum-exp (B, H, Lq)."""
    n, m = q.shape[1], k.shape[1]
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    i, j = torch.arange(n).view(-1, 1) + m - n, torch.arange(m)
    if slopes is not None:
        s = s - slopes.double().view(-1, q.shape[1], 1, 1) * (i - j).abs()
    left, right = window
    hidden = (j > i) & causal | (j < i - left) & (left >= 0) | (j > i + right) & (right >= 0)
    s = s.masked_fill(hidden, -math.inf)
    return (s.softmax(-1).nan_to_num(0.0) @ v).transpose(1, 2), s.logsumexp(-1)


def tensors(*lengths: int, heads: tuple[int, ...] = (H, Hkv, Hkv)) -> list[Tensor]:
    return [torch.randn(B, L, h, D) for L, h in zip(lengths, heads, strict=True)]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (3, 1)},
    "left": {"causal": True, "window_size": (2, -1)},
    "right": {"window_size": (-1, 0)},
    "softcap": {"softcap": 1.5, "softmax_scale": 0.4},
    "alibi": {"alibi_slopes": torch.linspace(0.1, 0.9, H), "causal": True},
    "alibi-batch": {"alibi_slopes": torch.linspace(0.05, 0.8, B * H).view(B, H)},
}


def in_words(options: dict[str, Any]) -> dict[str, Any]:
    names = {"window_size": "window", "alibi_slopes": "slopes", "softmax_scale": "scale"}
    return {names.get(name, name): x for name, x in options.items()}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("rows", "keys"), [(Lq, Lk), (Lk, Lq)])
def test_func(name: str, rows: int, keys: int) -> None:
    """More keys than rows and the reverse: everything is aligned at the bottom right. With gradients."""
    given = tensors(rows, keys, keys)
    q, k, v = (x.requires_grad_() for x in given)
    o, lse, nothing = flash_attn.flash_attn_func(q, k, v, **OPTIONS[name], deterministic=True, return_attn_probs=True)
    exact, exact_lse = textbook(q, k, v, **in_words(OPTIONS[name]))
    assert nothing is None
    assert o.is_contiguous()
    assert torch.allclose(o.double(), exact, atol=5e-6)
    assert torch.allclose(lse.double(), exact_lse, atol=5e-6)
    grads = torch.autograd.grad(o.square().sum(), (q, k, v))
    wanted = torch.autograd.grad(exact.square().sum(), (q, k, v))
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(grads, wanted, strict=True))
    assert torch.equal(flash_attn.flash_attn_func(q, k, v, **OPTIONS[name]), o)


def packed(lengths: list[int], heads: int) -> tuple[Tensor, Tensor]:
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return torch.randn(sum(lengths), heads, D, requires_grad=True), ends


@pytest.mark.parametrize("name", [n for n in OPTIONS if n != "alibi-batch"])
def test_varlen_func(name: str) -> None:
    rows, keys = [3, 0, 9], [5, 4, 6]
    (q, ends_q), (k, ends_k), (v, _) = packed(rows, H), packed(keys, Hkv), packed(keys, Hkv)
    o, lse, _ = flash_attn.flash_attn_varlen_func(
        q, k, v, ends_q, ends_k, torch.tensor(9), 6, **OPTIONS[name], return_attn_probs=True
    )
    loss, exact_loss = o.square().sum(), torch.zeros((), dtype=torch.float64)
    assert lse.shape == (H, 12)
    for b in range(3):
        mine, theirs = slice(int(ends_q[b]), int(ends_q[b + 1])), slice(int(ends_k[b]), int(ends_k[b + 1]))
        exact, exact_lse = textbook(q[None, mine], k[None, theirs], v[None, theirs], **in_words(OPTIONS[name]))
        assert torch.allclose(o[mine].double(), exact[0], atol=5e-6)
        assert torch.allclose(lse[:, mine].double(), exact_lse[0], atol=5e-6)
        exact_loss = exact_loss + exact.square().sum()
    grads, wanted = (torch.autograd.grad(x, (q, k, v)) for x in (loss, exact_loss))
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(grads, wanted, strict=True))


def test_packed_projections() -> None:
    """The packed variants are views of one tensor, with one gradient for it."""
    qkv = torch.randn(B, Lq, 3, H, D, requires_grad=True)
    kv = torch.randn(B, Lk, 2, Hkv, D)
    q = torch.randn(B, Lq, H, D)
    o = flash_attn.flash_attn_qkvpacked_func(qkv, causal=True)
    assert torch.equal(o, flash_attn.flash_attn_func(*qkv.unbind(2), causal=True))
    o.sum().backward()
    assert qkv.grad is not None
    apart = flash_attn.flash_attn_func(q, kv[:, :, 0], kv[:, :, 1])
    assert torch.equal(flash_attn.flash_attn_kvpacked_func(q, kv), apart)
    ends = torch.tensor([0, Lq, B * Lq], dtype=torch.int32)
    flat = flash_attn.flash_attn_varlen_qkvpacked_func(qkv.flatten(0, 1), ends, Lq, causal=True)
    assert torch.allclose(flat, o.flatten(0, 1), atol=1e-6)
    flat = flash_attn.flash_attn_varlen_kvpacked_func(
        q.flatten(0, 1), kv.flatten(0, 1), ends, torch.tensor([0, Lk, B * Lk], dtype=torch.int32), Lq, Lk
    )
    assert torch.allclose(flat, apart.flatten(0, 1), atol=1e-6)


def test_dropout_is_served_without_the_weights() -> None:
    q, k, v = tensors(Lq, Lk, Lk)
    torch.manual_seed(1)
    o = flash_attn.flash_attn_func(q, k, v, 0.5)
    torch.manual_seed(1)
    wanted = fastattn.attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), dropout_p=0.5)
    assert torch.equal(o, wanted.transpose(1, 2))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("page_size", [None, 4])
def test_with_kvcache(name: str, page_size: int | None) -> None:
    """Appends in place at cache_seqlens, contiguous or in pages, and attends over what is then there."""
    before, new, size = [2, 5], 3, 12
    keys, values = torch.randn(B, size, Hkv, D), torch.randn(B, size, Hkv, D)
    q, k, v = tensors(new, new, new)
    table = None
    if page_size is None:
        k_cache, v_cache = keys.clone(), values.clone()
    else:
        table = torch.tensor([[4, 0, 2], [1, 5, 3]], dtype=torch.int32)
        k_cache, v_cache = (torch.zeros(7, page_size, Hkv, D) for _ in range(2))
        for cache, x in ((k_cache, keys), (v_cache, values)):
            cache[table.long()] = x.unflatten(1, (3, page_size))
    o, lse = flash_attn.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=torch.tensor(before, dtype=torch.int32), block_table=table,
        num_splits=3, return_softmax_lse=True, **OPTIONS[name],
    )  # fmt: skip
    slopes = OPTIONS[name].get("alibi_slopes")
    for b, n in enumerate(before):
        keys[b, n : n + new], values[b, n : n + new] = k[b], v[b]
        words = in_words(OPTIONS[name]) | ({} if slopes is None else {"slopes": slopes.view(-1, H)[-1 if b else 0]})
        part = slice(b, b + 1)
        exact, exact_lse = textbook(q[part], keys[part, : n + new], values[part, : n + new], **words)
        assert torch.allclose(o[part].double(), exact, atol=5e-6)
        assert torch.allclose(lse[part].double(), exact_lse, atol=5e-6)
    for cache, x in ((k_cache, keys), (v_cache, values)):
        assert torch.equal(cache if table is None else cache[table.long()].flatten(1, 2), x)


def test_cache_batch_idx_names_the_entries() -> None:
    k_cache, v_cache = torch.randn(5, 8, Hkv, D), torch.randn(5, 8, Hkv, D)
    q, k, v = tensors(1, 1, 1)
    old = k_cache.clone()
    index = torch.tensor([3, 0], dtype=torch.int32)
    o = flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=4, cache_batch_idx=index)
    old[3, 4], old[0, 4] = k[0, 0], k[1, 0]
    assert torch.equal(k_cache, old)
    exact, _ = textbook(q, k_cache[index.long(), :5], v_cache[index.long(), :5])
    assert torch.allclose(o.double(), exact, atol=5e-6)


def test_a_full_cache_needs_no_lengths() -> None:
    q, k, v = tensors(1, 9, 9)
    o = flash_attn.flash_attn_with_kvcache(q, k, v)
    assert torch.allclose(o.double(), textbook(q, k, v)[0], atol=5e-6)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary_turns_q_and_k_by_their_positions(interleaved: bool) -> None:
    """True by default, unlike fastattn's own."""
    new, first, R = 3, 4, 8
    q, k, v = tensors(new, new, new)
    angles = torch.rand(20, R // 2) * 6
    rotary = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
    k_cache, v_cache = torch.zeros(B, 10, Hkv, D), torch.zeros(B, 10, Hkv, D)
    more = {} if interleaved else {"rotary_interleaved": False}
    flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=first, causal=True, **rotary, **more)
    turn = torch.polar(torch.ones(new, 1, R // 2), angles[first : first + new].unsqueeze(1))
    pairs = (k[..., :R:2], k[..., 1:R:2]) if interleaved else (k[..., : R // 2], k[..., R // 2 : R])
    turned = torch.complex(*(x.contiguous() for x in pairs)) * turn
    found = k_cache[:, first : first + new]
    got = (found[..., :R:2], found[..., 1:R:2]) if interleaved else (found[..., : R // 2], found[..., R // 2 : R])
    assert torch.allclose(torch.complex(*(x.contiguous() for x in got)), turned, atol=1e-6)
    assert torch.equal(found[..., R:], k[..., R:])


def test_no_view_is_copied() -> None:
    """Caches are transposed views; and q's layout comes out again."""
    pages = torch.zeros(6, 4, Hkv, D)
    flash_attn.flash_attn_with_kvcache(
        torch.randn(1, 2, H, D), pages, torch.zeros(6, 4, Hkv, D), torch.ones(1, 2, Hkv, D), torch.ones(1, 2, Hkv, D),
        cache_seqlens=3, block_table=torch.tensor([[5, 1]], dtype=torch.int32),
    )  # fmt: skip
    assert pages.sum() == 2 * Hkv * D
    assert pages[5, 3].all()
    assert pages[1, 0].all()


def test_padding_helpers() -> None:
    x = torch.randn(3, 5, 4, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    tokens, indices, ends, longest, used = flash_attn.unpad_input(x, mask)
    assert (longest, ends.tolist(), used.tolist()) == (5, [0, 3, 3, 8], [3, 0, 5])
    assert ends.dtype == torch.int32
    assert torch.equal(tokens, x[mask.bool()])
    assert torch.equal(flash_attn.index_first_axis(x.flatten(0, 1), indices), tokens)
    padded = flash_attn.pad_input(tokens, indices, 3, 5)
    assert torch.equal(padded, x * mask.unsqueeze(-1))
    padded.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, mask.unsqueeze(-1).expand_as(x).float())
    more = torch.zeros_like(mask)
    more[1, 0] = 1
    assert flash_attn.unpad_input(x, mask, more)[2].tolist() == [0, 3, 4, 9]
    assert flash_attn.unpad_input(x, mask, more)[4].tolist() == [3, 0, 5]


def test_signatures_are_flash_attentions() -> None:
    """Names, order and defaults, as its documentation has them."""
    common = "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    common += "deterministic=False, return_attn_probs=False"
    lengths = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
    cache = "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
    cache += "cache_batch_idx=None, cache_leftpad=None"
    wanted = {
        "flash_attn_func": f"q, k, v, {common}",
        "flash_attn_kvpacked_func": f"q, kv, {common}",
        "flash_attn_qkvpacked_func": f"qkv, {common}",
        "flash_attn_varlen_func": f"q, k, v, {lengths}, {common}, block_table=None",
        "flash_attn_varlen_kvpacked_func": f"q, kv, {lengths}, {common}",
        "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {common}",
        "flash_attn_with_kvcache": f"{cache}, block_table=None, softmax_scale=None, causal=False, "
        "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
        "return_softmax_lse=False",
    }
    for name, text in wanted.items():
        signature = inspect.signature(getattr(flash_attn, name))
        bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
        assert str(inspect.Signature(bare)) == f"({text})"
        assert all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in bare)


def qkv() -> dict[str, Any]:
    return dict(zip("qkv", tensors(Lq, Lk, Lk), strict=True))


def cache(new: int = 2) -> dict[str, Any]:
    q, k, v = tensors(new, new, new)
    caches = {"k_cache": torch.zeros(B, 8, Hkv, D), "v_cache": torch.zeros(B, 8, Hkv, D)}
    return {"q": q, "k": k, "v": v, "cache_seqlens": 1} | caches


angles = {"rotary_cos": torch.zeros(8, 4), "rotary_sin": torch.zeros(8, 4)}
ends = torch.tensor([0, Lq], dtype=torch.int32)
REFUSED: list[tuple[str, dict[str, Any], Bad]] = [
    ("func", {"window_size": (-2, 0)}, Bad("window", V, ("window_size is (-2, 0)", "-1 for a side"))),
    ("func", {"window_size": (None, 0)}, Bad("window-none", T, ("window_size is (None, 0)",))),
    ("func", {"window_size": 4}, Bad("window-kind", T, ("window_size is 4",))),
    ("func", {"causal": "bottom_right"}, Bad("causal", T, ("causal is a str",))),
    ("func", {"deterministic": 3}, Bad("deterministic", T, ("deterministic is a int",))),
    (
        "func",
        {"return_attn_probs": True, "dropout_p": 0.1},
        Bad("probs", V, ("return_attn_probs is True with dropout",)),
    ),
    ("func", {"q": torch.zeros(3, 4)}, Bad("rank", V, ("q has 2 dimensions", "(batch, length, heads, head_dim)"))),
    ("func", {"k": [1.0]}, Bad("kind", T, ("k is a list",))),
    ("func", {"softmax_scale": math.inf}, Bad("scale", V, ("scale is inf",))),
    ("with_kvcache", {"cache_leftpad": ends}, Bad("leftpad", V, ("cache_leftpad is given", "not served"))),
    (
        "with_kvcache",
        {"cache_batch_idx": ends, "block_table": ends},
        Bad("both", V, ("cache_batch_idx and block_table",)),
    ),
    ("with_kvcache", {"cache_batch_idx": [0]}, Bad("idx", T, ("cache_batch_idx is a list",))),
    ("with_kvcache", {"cache_batch_idx": ends * 0}, Bad("idx-twice", V, ("are both page 0", "its own page"))),
    ("with_kvcache", {"cache_seqlens": None}, Bad("no-lengths", V, ("k is given but cache_seqlens is not",))),
    ("with_kvcache", {"cache_seqlens": ends.long()}, Bad("lengths", T, ("cache_seqlens is torch.int64",))),
    ("with_kvcache", {"cache_seqlens": 1.0}, Bad("lengths-kind", T, ("cache_seqlens is a float",))),
    ("with_kvcache", {"num_splits": None}, Bad("splits", T, ("num_splits is a NoneType",))),
    ("with_kvcache", dict(angles), Bad("rotary-all", V, ("rotary_cos is given", "causal=False", "causal=True"))),
    ("with_kvcache", angles | {"k": None, "v": None}, Bad("rotary-no-k", V, ("rotary_cos is given but k is not",))),
    (
        "with_kvcache",
        angles | {"q": torch.zeros(B, 1, H, D)},
        Bad("rotary-q", V, ("a q of length 1, a k of length 2",)),
    ),
    (
        "qkvpacked_func",
        {"qkv": torch.zeros(1, 2, 4, D)},
        Bad("packed", V, ("qkv has shape (1, 2, 4, 16)", "torch.stack")),
    ),
    ("qkvpacked_func", {"qkv": None}, Bad("packed-kind", T, ("qkv is a NoneType",))),
    ("varlen_func", {"block_table": ends}, Bad("varlen-pages", V, ("block_table is given", "flash_attn_with_kvcache"))),
    ("varlen_func", {"max_seqlen_q": 2}, Bad("varlen-max", V, ("max_seqlen_q is 2",))),
]


@pytest.mark.parametrize(("function", "more", "bad"), REFUSED, ids=[r[2].id for r in REFUSED])
def test_what_is_not_served_is_refused(function: str, more: dict[str, Any], bad: Bad) -> None:
    packed_calls = dict(zip("qkv", (torch.zeros(Lq, h, D) for h in (H, Hkv, Hkv)), strict=True))
    packed_calls |= {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": Lq, "max_seqlen_k": Lq}
    good = {"func": qkv, "with_kvcache": cache, "qkvpacked_func": dict, "varlen_func": lambda: packed_calls}[function]()
    bad.assert_refused(lambda given: getattr(flash_attn, f"flash_attn_{function}")(**given), good | more)
    if function == "with_kvcache":
        assert not good["k_cache"].any()


def test_install_stands_in_for_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name for name in sys.modules if name.partition(".")[0] == "flash_attn"}
    assert not before, "flash_attn is installed here, and this test would replace it"
    flash_attn.install()
    try:
        flash_attn.install()
        package = importlib.import_module("flash_attn")
        assert package.flash_attn_func is flash_attn.flash_attn_func
        assert importlib.import_module("flash_attn.bert_padding").pad_input is flash_attn.pad_input
        assert package.flash_attn_interface.flash_attn_varlen_func is flash_attn.flash_attn_varlen_func
        assert importlib.util.find_spec("flash_attn") is not None
        with pytest.raises(ImportError):
            importlib.import_module("flash_attn.ops")
    finally:
        flash_attn.uninstall()
    assert not {name for name in sys.modules if name.partition(".")[0] == "flash_attn"}
    flash_attn.uninstall()
    monkeypatch.setitem(sys.modules, "flash_attn", sys)  # somebody else's
    with pytest.raises(ImportError, match="the package flash_attn is there"):
        flash_attn.install()


def test_examples_in_the_docstrings_run() -> None:
    result = doctest.testmod(flash_attn, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0
    assert result.attempted > 20
