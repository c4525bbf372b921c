"""fastattn.KVCache: against a list of tensors for each sequence, under random operations; and its rules."""

from __future__ import annotations

import copy
import pickle
import random
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn

from .bad_calls import Bad
from .kv_cache_calls import bits

Hq, Hkv, D, Dv = 4, 2, 8, 6
V, T = ValueError, TypeError


def new_tokens(B: int, L: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(B, Hq, L, D), torch.randn(B, Hkv, L, D), torch.randn(B, Hkv, L, Dv)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def check_invariants(cache: fastattn.KVCache) -> None:
    """Each page is free, or counted once for every sequence that has it; tables are as long as they need to be."""
    users = [0] * cache.pages
    for s in cache.sequences:
        table = cache._tables[s]
        assert len(table) == -(-cache.length(s) // cache._page_size)
        assert len(set(table)) == len(table)
        for page in table:
            users[page] += 1
    assert users == cache._references
    assert sorted(cache._free) == [page for page, count in enumerate(users) if count == 0]
    assert cache.used_pages == cache.pages - len(cache._free)
    assert cache.k_cache.shape == (cache.pages, Hkv, cache._page_size, D)


class Model:
    """What a cache should hold: for each sequence its keys and values, one tensor each."""

    def __init__(self) -> None:
        self.held: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, sequence: int) -> None:
        assert sequence not in self.held
        self.held[sequence] = torch.zeros(Hkv, 0, D), torch.zeros(Hkv, 0, Dv)

    def append(self, sequence: int, k: Tensor, v: Tensor) -> None:
        keys, values = self.held[sequence]
        self.held[sequence] = torch.cat((keys, k), 1), torch.cat((values, v), 1)

    def cut(self, sequence: int, length: int) -> tuple[Tensor, Tensor]:
        keys, values = self.held[sequence]
        return keys[:, :length], values[:, :length]

    def agrees(self, cache: fastattn.KVCache, tolerance: float) -> None:
        assert cache.sequences == sorted(self.held)
        assert cache.lengths == [self.held[s][0].shape[1] for s in sorted(self.held)]
        for s, (keys, values) in self.held.items():
            for got, wanted in ((cache.keys(s), keys), (cache.values(s), values)):
                assert got.shape == wanted.shape
                assert got.dtype == cache.dtype
                # Of a row's largest number, as the rule for int8 has it.
                assert ((got - wanted).abs() <= tolerance * wanted.abs().amax(-1, keepdim=True)).all()


KINDS: dict[str, dict[str, Any]] = {
    "contiguous": {},
    "contiguous-int8": {"quantize": "int8"},
    "contiguous-max": {"max_length": 40},
    "paged-1": {"page_size": 1},
    "paged-5": {"page_size": 5},
    "paged-16-int8": {"page_size": 16, "quantize": "int8"},
    "paged-4-pool": {"page_size": 4, "num_pages": 60, "max_length": 50},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_random_operations(kind: str, seed: int) -> None:
    """Appends, attention, forks, reorderings, truncations, sequences that come and go: no key is ever lost or mixed up.

    Calls that the cache refuses, because a pool or a sequence is full, leave it as it was.
    """
    dice = random.Random(seed)
    options = KINDS[kind]
    tolerance = 0.5 / 127 * 1.0001 if options.get("quantize") else 0.0
    cache, model = fastattn.KVCache(3, Hkv, D, v_head_dim=Dv, **options), Model()
    for s in range(3):
        model.add(s)
    refused = 0
    for _ in range(70):
        operation = dice.choice(("attend", "attend", "attend", "some", "fork", "reorder", "truncate", "free", "add"))
        live = cache.sequences
        if operation in ("attend", "some") and live:
            chosen = live if operation == "attend" else dice.sample(live, dice.randint(1, len(live)))
            new = dice.choice((0, 1, 1, 2, 7, 13))
            q, k, v = new_tokens(len(chosen), max(new, 1))
            given = {"k": k, "v": v} if new else {}
            try:
                o = cache.attend(q, **given, sequences=None if operation == "attend" else chosen, causal=True)
            except ValueError as error:
                if "max_length" not in str(error) and "num_pages" not in str(error):
                    raise
                refused += 1
            else:
                for b, s in enumerate(chosen):
                    if new:
                        model.append(s, k[b], v[b])
                    keys, values = cache.keys(s), cache.values(s)
                    wanted = fastattn.attention(q[b : b + 1], keys[None], values[None], causal=True)
                    assert torch.allclose(o[b], wanted[0], atol=2e-6)
        elif operation == "fork" and live and len(live) < 7:
            s = dice.choice(live)
            length = dice.choice((None, dice.randint(0, cache.length(s))))
            forked = cache.fork(s, length=length)
            model.held[forked] = model.cut(s, cache.length(forked))
        elif operation == "reorder" and live:
            index = [dice.choice(live) for _ in range(dice.randint(1, 6))]
            cache.reorder(dice.choice((index, torch.tensor(index))))
            model.held = {n: model.held[s] for n, s in enumerate(index)}
        elif operation == "truncate" and live:
            lengths = [dice.randint(0, cache.length(s)) for s in live]
            cache.truncate(lengths)
            for s, n in zip(live, lengths, strict=True):
                model.held[s] = model.cut(s, n)
        elif operation == "free" and len(live) > 1:
            s = dice.choice(live)
            cache.free(s)
            del model.held[s]
        elif operation == "add" and len(live) < 7:
            for s in cache.add(dice.randint(0, 2)):
                model.add(s)
        check_invariants(cache)
        model.agrees(cache, tolerance)
    cache.reset()
    assert set(cache.lengths) == {0}
    assert cache.used_pages == 0
    check_invariants(cache)
    assert refused == 0 or "max_length" in options


def test_forks_share_their_pages_until_one_of_them_appends() -> None:
    cache = fastattn.KVCache(1, Hkv, D, v_head_dim=Dv, page_size=4)
    cache.append(*new_tokens(1, 10)[1:])
    assert (cache.used_pages, cache.fork(0), cache.fork(0, length=4)) == (3, 1, 2)
    assert cache.used_pages == 3
    before = cache.keys(0).clone()
    cache.append(*new_tokens(1, 1)[1:], sequences=[1])  # copies the third page
    assert cache.used_pages == 4
    cache.append(*new_tokens(1, 1)[1:], sequences=[2])  # begins a page of its own
    assert cache.used_pages == 5
    cache.append(*new_tokens(1, 1)[1:], sequences=[0])  # is alone on its page by now
    assert cache.used_pages == 5
    assert torch.equal(cache.keys(0)[:, :10], before)
    cache.free(0)
    assert cache.used_pages == 4
    assert torch.equal(cache.keys(2)[:, :4], before[:, :4])


def test_memory_grows_by_doubling_and_says_how_much_it_is() -> None:
    cache = fastattn.KVCache(2, Hkv, D, dtype=torch.bfloat16)
    assert cache.nbytes == 0
    for length in (60, 10, 100):
        cache.append(*(x.to(torch.bfloat16) for x in (torch.randn(2, Hkv, length, D), torch.randn(2, Hkv, length, D))))
    assert cache.lengths == [170, 170]
    assert cache.nbytes == 2 * 2 * Hkv * 256 * D * 2
    fixed = fastattn.KVCache(2, Hkv, D, max_length=100, quantize="int8")
    where = fixed.k_cache.data_ptr()
    assert fixed.nbytes == 2 * 2 * Hkv * 100 * (D + 4)
    fixed.append(torch.randn(2, Hkv, 100, D), torch.randn(2, Hkv, 100, D))
    assert fixed.k_cache.data_ptr() == where
    pool = fastattn.KVCache(2, Hkv, D, page_size=16, num_pages=7)
    assert (pool.pages, pool.used_pages) == (7, 0)
    assert "7 pages of 16" in repr(pool)


def test_its_tensors_go_to_the_function() -> None:
    """Whoever wants to call attention_with_kv_cache directly, for one layer among several, can."""
    cache = fastattn.KVCache(2, Hkv, D, v_head_dim=Dv, page_size=4)
    cache.append(*new_tokens(2, 9)[1:])
    q = new_tokens(2, 3)[0]
    by_hand = fastattn.attention_with_kv_cache(
        q, cache.k_cache, cache.v_cache, cache_lengths=cache.cache_lengths(), block_table=cache.block_table()
    )
    assert torch.equal(by_hand, cache.attend(q))


def test_large_caches_are_tensors_like_others() -> None:
    """From 8 MB on their memory is not torch's own."""
    cache = fastattn.KVCache(2, kv_heads=8, head_dim=64, page_size=16, num_pages=1024, dtype=torch.float32)
    small = fastattn.KVCache(2, kv_heads=8, head_dim=64, page_size=16, dtype=torch.float32)
    assert cache.nbytes >= 2 * (8 << 20) > 16 * small.nbytes
    q, k, v = (torch.randn(2, 8, 40, 64) for _ in range(3))
    wanted = small.attend(q, k, v, causal=True)
    assert torch.equal(cache.attend(q, k, v, causal=True), wanted)
    twin = copy.deepcopy(cache)
    loaded = pickle.loads(pickle.dumps(cache))
    cache.attend(q, -k, -v, causal=True)
    for other in (twin, loaded):
        assert other.lengths == [40, 40]
        assert torch.equal(other.keys(1), k[1])
        assert torch.equal(other.values(1), v[1])
    keys = cache.keys(0)
    del cache  # what was read lives on
    assert torch.equal(keys[:, 40:], -k[0])


def test_memory_that_nobody_has_is_refused_by_torch() -> None:
    with pytest.raises(RuntimeError, match=r"(?i)memory|storage size"):
        fastattn.KVCache(1, kv_heads=1 << 10, head_dim=1 << 10, max_length=1 << 30)


def test_a_cache_made_in_inference_mode_lives_on_outside_of_it() -> None:
    """Growing, copying a shared page and appending, in either mode."""
    with torch.inference_mode():
        cache = fastattn.KVCache(1, Hkv, D, page_size=4)
        cache.append(*(torch.randn(1, Hkv, 6, D) for _ in range(2)))
    forked = cache.fork(0)
    cache.append(*(torch.randn(2, Hkv, 9, D) for _ in range(2)))
    with torch.inference_mode():
        cache.append(*(torch.randn(2, Hkv, 9, D) for _ in range(2)))
    assert cache.lengths == [24, 24]
    assert torch.equal(cache.keys(0)[:, :6], cache.keys(forked)[:, :6])


def test_views_without_pages_are_no_copies() -> None:
    cache = fastattn.KVCache(1, Hkv, D)
    cache.append(*(torch.randn(1, Hkv, 5, D) for _ in range(2)))
    assert cache.keys(0).data_ptr() == cache.k_cache.data_ptr()
    assert cache.values(0).shape == (Hkv, 5, D)


def cache_with(length: int, **options: Any) -> fastattn.KVCache:
    cache = fastattn.KVCache(2, Hkv, D, v_head_dim=Dv, **options)
    cache.append(*new_tokens(2, length)[1:])
    return cache


CONSTRUCTORS = [
    Bad("batch", V, ("batch_size is -1",), {"batch_size": -1}),
    Bad("batch-kind", T, ("batch_size is a float",), {"batch_size": 2.0}),
    Bad("heads", V, ("kv_heads is 0", "at least 1"), {"kv_heads": 0}),
    Bad("dim", V, ("head_dim is 0",), {"head_dim": 0}),
    Bad("page", V, ("page_size is 0",), {"page_size": 0}),
    Bad("pages-alone", V, ("num_pages is 3 but page_size is not given",), {"num_pages": 3}),
    Bad("dtype", T, ("dtype is torch.int8", "quantize='int8'"), {"dtype": torch.int8}),
    Bad("quantize", V, ("quantize is 'fp8'", "'int8'"), {"quantize": "fp8"}),
]


@pytest.mark.parametrize("bad", CONSTRUCTORS, ids=lambda bad: bad.id)
def test_bad_sizes(bad: Bad) -> None:
    bad.assert_refused(
        lambda more: fastattn.KVCache(**({"batch_size": 1, "kv_heads": 1, "head_dim": 4} | more)), bad.arguments
    )


def attend(length: int = 1, B: int = 2, **more: Any) -> Any:
    q, k, v = new_tokens(B, length)
    return lambda cache: cache.attend(**({"q": q, "k": k, "v": v} | more))


REFUSED: list[tuple[str, Any, dict[str, Any], Bad]] = [
    ("max", attend(5), {"max_length": 12}, Bad("", V, ("k has length 5 and sequence 0 has 10", "max_length is 12"))),
    ("pool", attend(5), {"page_size": 4, "num_pages": 7}, Bad("", V, ("k needs 2 more pages but 1 of num_pages = 7",))),
    ("batch", attend(B=3), {}, Bad("", V, ("q has batch size 3 but 2 sequences",))),
    ("unknown", attend(sequences=[0, 7]), {}, Bad("", V, ("sequence is 7", "it has [0, 1]", "add()"))),
    ("twice", attend(sequences=[1, 1]), {}, Bad("", V, ("sequences is [1, 1]", "once"))),
    ("own", attend(block_table=None), {}, Bad("", T, ("block_table is given", "leave it out"))),
    ("k-shape", attend(k=torch.zeros(2, 1, 1, D)), {}, Bad("", V, ("k has shape (2, 1, 1, 8)",))),
    ("k-shape-p", attend(k=torch.zeros(2, 1, 1, D)), {"page_size": 4}, Bad("", V, ("k has shape (2, 1, 1, 8)",))),
    ("k-kind", attend(k=[1.0]), {}, Bad("", T, ("k is a list",))),
    ("append-kind", lambda c: c.append([1], [2]), {}, Bad("", T, ("k has type list",))),
    ("causal", attend(causal="top_left"), {"page_size": 5}, Bad("", V, ("causal is 'top_left'",))),
    ("grow", lambda c: c.truncate(11, sequences=[0]) or c.truncate([11, 3]), {}, Bad("", V, ("11 for sequence 0",))),
    ("negative", lambda c: c.truncate(-1), {}, Bad("", V, ("-1 for sequence 0", "[0, 10]"))),
    ("count", lambda c: c.truncate([1, 2, 3]), {}, Bad("", V, ("3 numbers but there are 2 sequences",))),
    ("lengths", lambda c: c.truncate(torch.zeros(2)), {}, Bad("", T, ("lengths is a torch.float32 tensor",))),
    ("lengths-2", lambda c: c.truncate(["a"]), {}, Bad("", T, ("lengths is ['a']",))),
    ("fork", lambda c: c.fork(0, length=11), {"page_size": 4}, Bad("", V, ("length is 11 but sequence 0 has 10",))),
    ("fork-2", lambda c: c.fork("0"), {}, Bad("", T, ("sequence is a str",))),
    ("index", lambda c: c.reorder([0, 2]), {"page_size": 4}, Bad("", V, ("sequence is 2",))),
    ("free", lambda c: c.free(5), {}, Bad("", V, ("sequence is 5",))),
    ("add", lambda c: c.add(-1), {}, Bad("", V, ("count is -1",))),
]


@pytest.mark.parametrize(("call", "options", "bad"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_a_refused_call_changes_nothing(call: Any, options: dict[str, Any], bad: Bad) -> None:
    cache = cache_with(10, **options)
    memory, tables = [bits(x).clone() for x in cache._storage.tensors()], dict(cache._tables)
    bad.assert_refused(lambda _: call(cache), {})
    assert cache.lengths == [10, 10]
    assert cache._tables == tables
    check_invariants(cache)
    kept = [x[: old.shape[0]] for x, old in zip(cache._storage.tensors(), memory, strict=True)]
    for s in cache.sequences:  # a pool may have grown all the same
        for x, old in zip(kept[:2], memory[:2], strict=True):
            page_rows = [(page, min(cache._page_size, 10 - n * cache._page_size)) for n, page in enumerate(tables[s])]
            assert all(torch.equal(bits(x)[page, :, :rows], old[page, :, :rows]) for page, rows in page_rows)


def test_a_refused_call_gives_its_pages_back() -> None:
    cache = cache_with(8, page_size=4, num_pages=6)
    with pytest.raises(ValueError, match="causal is 'top_left'"):
        attend(3, causal="top_left")(cache)
    assert cache.used_pages == 4
    attend(4)(cache)
    assert cache.used_pages == 6
