"""The torch-free engine through its test module, _fastattn_core: mask geometry, Philox, every kernel on NumPy arrays.

Nothing here imports torch or fastattn. What attention is, and what its gradients are, is written out once more, as
matrix formulas in NumPy. The kernels below float64 are also tested in csrc/testing/attention_test.cpp and
additive_test.cpp, on many more shapes.
"""

from __future__ import annotations

import functools
import itertools
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .core_module import load_core

Array = np.ndarray[Any, Any]
UNLIMITED = -1
CAUSAL = ("none", "top_left", "bottom_right")


core = load_core()
ISAS = tuple(core.all_isas())  # of this architecture


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param not in core.supported_isas():
        pytest.skip(f"this processor or build has no {request.param}")
    before = core.active_isa()
    core.set_isa(request.param)
    yield request.param
    core.set_isa(before)


# ---- Mask geometry --------------------------------------------------------------------------------------------------


def visible(Lq: int, Lk: int, causal: str, window: tuple[int, int], kv_length: int | None = None) -> Array:
    """Which keys (columns) each row sees, from the definition of the masks."""
    length = Lk if kv_length is None else kv_length
    diagonal = np.arange(Lq)[:, None] + (0 if causal == "top_left" else length - Lq)
    j = np.arange(Lk)[None, :]
    left, right = window
    keep = np.broadcast_to(j < length, (Lq, Lk)).copy()
    if causal != "none":
        keep &= j <= diagonal
    if left != UNLIMITED:
        keep &= j >= diagonal - left
    if right != UNLIMITED:
        keep &= j <= diagonal + right
    return keep


def span(claims: Array) -> tuple[int, int] | None:
    """The range that holds exactly the true elements, None where there are none; they must be contiguous."""
    (where,) = np.nonzero(claims)
    if len(where) == 0:
        return None
    assert len(where) == where[-1] + 1 - where[0]
    return int(where[0]), int(where[-1]) + 1


def non_empty(begin: int, end: int) -> tuple[int, int] | None:
    return (begin, end) if begin < end else None


@pytest.mark.parametrize("causal", CAUSAL)
def test_mask_geometry_of_every_small_shape(causal: str) -> None:
    for Lq, Lk, left, right in itertools.product(range(6), range(6), (-1, 0, 1, 3, 6), (-1, 0, 2, 6)):
        for kv_length in {Lk, Lk // 2}:
            geometry = core.MaskGeometry(Lq, Lk, causal, (left, right), kv_length)
            keep = visible(Lq, Lk, causal, (left, right), kv_length)
            where = f"Lq={Lq} Lk={Lk} kv_length={kv_length} window=({left}, {right})"
            assert geometry.visible_pairs() == keep.sum(), where
            for i in range(Lq):
                assert non_empty(geometry.lo(i), geometry.hi(i)) == span(keep[i]), f"{where} i={i}"
                assert [geometry.keep(i, j) for j in range(Lk)] == keep[i].tolist(), f"{where} i={i}"
            for i0, rows in itertools.product(range(Lq), range(1, 4)):
                i1 = min(i0 + rows, Lq)
                begin, end, full_begin, full_end = geometry.key_range(i0, i1)
                assert non_empty(begin, end) == span(keep[i0:i1].any(axis=0)), f"{where} rows {i0}:{i1}"
                assert non_empty(full_begin, full_end) == span(keep[i0:i1].all(axis=0)), f"{where} rows {i0}:{i1}"
            for j0, keys in itertools.product(range(kv_length), range(1, 4)):
                j1 = min(j0 + keys, kv_length)
                begin, end, full_begin, full_end = geometry.row_range(j0, j1)
                assert non_empty(begin, end) == span(keep[:, j0:j1].any(axis=1)), f"{where} keys {j0}:{j1}"
                assert non_empty(full_begin, full_end) == span(keep[:, j0:j1].all(axis=1)), f"{where} keys {j0}:{j1}"
                for i0 in range(Lq):
                    tile = keep[i0 : i0 + 2, j0:j1]
                    kind = "full" if tile.all() else "partial" if tile.any() else "skip"
                    assert geometry.classify_tile(i0, min(i0 + 2, Lq), j0, j1) == kind, f"{where} tile {i0} {j0}:{j1}"


def test_a_mask_geometry_needs_a_known_causal_mask() -> None:
    with pytest.raises(ValueError, match="causal is 'diagonal'"):
        core.MaskGeometry(2, 2, "diagonal")


# ---- Philox ---------------------------------------------------------------------------------------------------------


def philox4x32(seed: int, counters: Array) -> Array:
    """Philox4x32-10 of counters (n, 4), from the paper's description; returns words (n, 4)."""
    c = counters.astype(np.uint64)
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        product0, product1 = c[:, 0] * np.uint64(0xD2511F53), c[:, 2] * np.uint64(0xCD9E8D57)
        high0, high1 = product0 >> np.uint64(32), product1 >> np.uint64(32)
        low0, low1 = product0 & np.uint64(0xFFFFFFFF), product1 & np.uint64(0xFFFFFFFF)
        c = np.stack([high1 ^ c[:, 1] ^ np.uint64(key[0]), low1, high0 ^ c[:, 3] ^ np.uint64(key[1]), low0], axis=1)
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def dropout_keep(seed: int, offset: int, B: int, Hq: int, Lq: int, Lk: int, p: float) -> Array:
    bh, i, j4 = np.meshgrid(np.arange(B * Hq), np.arange(Lq), np.arange((Lk + 3) // 4), indexing="ij")
    counters = np.stack([j4, i, bh, np.full_like(bh, offset & 0xFFFFFFFF)], axis=-1)
    words = philox4x32(seed, counters.reshape(-1, 4)).reshape(B, Hq, Lq, -1)[..., :Lk]
    return words >= min(int(p * 2.0**32), 2**32 - 1) if p < 1.0 else np.zeros((B, Hq, Lq, Lk), bool)


@pytest.mark.parametrize(
    ("seed", "counter", "words"),
    [
        (0, [0] * 4, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (2**64 - 1, [2**32 - 1] * 4, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            0x299F31D0A4093822,
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_known_answers(seed: int, counter: list[int], words: list[int]) -> None:
    assert list(core.philox4x32(seed, counter)) == words
    assert philox4x32(seed, np.array([counter])).tolist() == [words]


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.999, 1.0])
def test_dropout_mask(p: float) -> None:
    seed, offset = 0xFEDCBA9876543210, 5
    mask = core.dropout_mask(seed, offset, 2, 3, 7, 129, p)
    np.testing.assert_array_equal(mask, dropout_keep(seed, offset, 2, 3, 7, 129, p))
    n = mask.size
    assert abs(mask.sum() - n * (1 - p)) <= 5 * np.sqrt(n * p * (1 - p))


def test_neighbouring_dropout_masks_are_independent() -> None:
    shape = (1, 1, 64, 64)
    masks = [core.dropout_mask(seed, offset, *shape, 0.5) for seed, offset in [(1, 0), (2, 0), (1, 1), (1 + 2**32, 0)]]
    for a, b in itertools.combinations(masks, 2):
        agreement = (a == b).mean()
        assert abs(agreement - 0.5) < 5 * 0.5 / np.sqrt(a.size)


# ---- Attention ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    Lq: int
    Lk: int
    D: int = 8
    Dv: int = 8
    B: int = 2
    Hkv: int = 2
    group: int = 1
    causal: str = "none"
    window: tuple[int, int] = (UNLIMITED, UNLIMITED)
    scale: float | None = None
    softcap: float = 0.0
    bias: tuple[int, int, int, int] | None = None  # 1: this dimension of (B, Hq, Lq, Lk) in full, 0: broadcast
    bias_hides: bool = False
    mask: tuple[int, int, int, int] | None = None
    alibi: str | None = None  # "h" | "bh"
    sinks: bool = False
    kv_lengths: tuple[int, ...] | None = None
    dropout_p: float = 0.0
    w: str | None = None  # additive scores: "h" | "shared"
    d_lse: bool = True

    @property
    def Hq(self) -> int:
        return self.Hkv * self.group

    @property
    def id(self) -> str:
        fields = [f"Lq{self.Lq}", f"Lk{self.Lk}", f"D{self.D}"]
        fields += [f"Dv{self.Dv}"] if self.Dv != self.D else []
        for name in ("group", "causal", "window", "scale", "softcap", "bias", "bias_hides", "mask", "alibi", "sinks"):
            value = getattr(self, name)
            if value != getattr(type(self), name):
                shown = "_".join(map(str, value)) if isinstance(value, tuple) else str(value)
                fields.append(name if value is True else f"{name}{shown}")
        fields += [f"lengths{'_'.join(map(str, self.kv_lengths))}"] if self.kv_lengths else []
        fields += [f"dropout{self.dropout_p}"] if self.dropout_p else []
        fields += [f"w_{self.w}"] if self.w else []
        return "-".join(fields)


CASES = [
    Case(5, 7),
    Case(1, 1, D=1, Dv=1),
    Case(0, 3),
    Case(3, 0, sinks=True, bias=(1, 1, 1, 0)),
    Case(4, 4, B=0, bias=(0, 1, 1, 1), sinks=True),
    Case(33, 70, D=20, Dv=9, group=3),
    Case(6, 9, causal="bottom_right"),
    Case(9, 6, causal="bottom_right"),
    Case(9, 6, causal="top_left"),
    Case(20, 20, window=(4, 2)),
    Case(20, 12, window=(0, 0), causal="top_left"),
    Case(12, 20, window=(5, UNLIMITED), causal="bottom_right"),
    Case(10, 11, scale=-0.7, softcap=1.5),
    Case(10, 11, alibi="h"),
    Case(10, 11, alibi="bh", causal="top_left", kv_lengths=(7, 3)),
    Case(10, 11, sinks=True, group=2),
    Case(10, 11, kv_lengths=(0, 4), window=(3, 3)),
    Case(10, 70, dropout_p=0.3, group=2),
    Case(4, 5, dropout_p=1.0),
    Case(5, 7, w="h"),
    Case(33, 70, D=20, Dv=9, group=3, causal="bottom_right", w="shared"),
    Case(1, 11, D=33, group=2, kv_lengths=(0, 4), w="h"),
    Case(70, 70, D=5, mask=(1, 0, 1, 1), causal="top_left", dropout_p=0.2, w="shared"),
    Case(4, 4, B=0, w="h"),
    Case(3, 0, w="shared"),
    Case(10, 11, bias=(1, 1, 1, 1), bias_hides=True, sinks=True),
    Case(70, 70, group=2, mask=(1, 0, 1, 1), causal="bottom_right"),
    *(Case(7, 9, group=2, bias=full) for full in itertools.product((0, 1), repeat=4)),  # type: ignore[arg-type]
    *(Case(7, 9, group=2, mask=full) for full in itertools.product((0, 1), repeat=4)),  # type: ignore[arg-type]
    Case(
        *(21, 34),
        D=5,
        Dv=6,
        group=2,
        causal="bottom_right",
        window=(25, UNLIMITED),
        softcap=2.0,
        bias=(1, 0, 1, 1),
        bias_hides=True,
        mask=(0, 1, 1, 1),
        alibi="bh",
        sinks=True,
        kv_lengths=(34, 17),
        dropout_p=0.2,
    ),
]
SEED, OFFSET = 123456789012345, 9


@dataclass
class Problem:
    """A case's arrays in float64; `kwargs` are those of the engine's functions."""

    q: Array
    k: Array
    v: Array
    d_o: Array
    d_lse: Array | None
    kwargs: dict[str, Any]


@functools.cache
def make_problem(case: Case, seed: int = 0) -> Problem:
    random = np.random.default_rng(seed)
    kwargs: dict[str, Any] = {"causal": case.causal, "window": case.window, "softcap": case.softcap}
    sizes = (case.B, case.Hq, case.Lq, case.Lk)
    if case.scale is not None:
        kwargs["scale"] = case.scale
    if case.bias is not None:
        bias = random.normal(size=[n if full else 1 for n, full in zip(sizes, case.bias, strict=True)])
        if case.bias_hides:
            bias[random.random(bias.shape) < 0.2] = -np.inf
            bias[random.random(bias.shape[:3]) < 0.1] = -np.inf  # whole rows
            bias[random.random(bias.shape[:3]) < 0.1] = np.finfo(np.float64).min
        kwargs["bias"] = bias
    if case.mask is not None:
        mask = random.random([n if full else 1 for n, full in zip(sizes, case.mask, strict=True)]) < 0.7
        mask &= random.random((*mask.shape[:3], 1)) < 0.9  # whole rows
        kwargs["mask"] = mask
    if case.alibi is not None:
        kwargs["alibi_slopes"] = random.random(sizes[:2] if case.alibi == "bh" else sizes[1:2])
    if case.sinks:
        kwargs["sinks"] = random.normal(size=case.Hq)
    if case.kv_lengths is not None:
        kwargs["kv_lengths"] = np.array(case.kv_lengths, np.int32)
    if case.dropout_p:
        kwargs.update(dropout_p=case.dropout_p, seed=SEED, offset=OFFSET)
    if case.w is not None:
        kwargs["w"] = random.normal(size=(case.Hq, case.D) if case.w == "h" else case.D)
    return Problem(
        q=random.normal(size=(case.B, case.Hq, case.Lq, case.D)),
        k=random.normal(size=(case.B, case.Hkv, case.Lk, case.D)),
        v=random.normal(size=(case.B, case.Hkv, case.Lk, case.Dv)),
        d_o=random.normal(size=(case.B, case.Hq, case.Lq, case.Dv)),
        d_lse=random.normal(size=sizes[:3]) if case.d_lse else None,
        kwargs=kwargs,
    )


def sum_to(x: Array, shape: tuple[int, ...]) -> Array:
    """The sum of x over the dimensions that `shape` broadcasts."""
    axes = tuple(axis for axis, n in enumerate(shape) if n == 1)
    return x.sum(axis=axes, keepdims=True)


def matrix_attention(
    case: Case, q: Array, k: Array, v: Array, d_o: Array, d_lse: Array | None, kw: dict[str, Any]
) -> dict[str, Array]:
    """Attention and its gradients in the dtype of its arguments, as matrices."""
    B, Hq, Lq, Lk, group = case.B, case.Hq, case.Lq, case.Lk, case.group
    k_full, v_full = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scale = case.scale if case.scale is not None else 1.0 / np.sqrt(case.D)
    x = scale * np.einsum("bhid,bhjd->bhij", q, k_full)
    if "w" in kw:
        w = np.broadcast_to(kw["w"], (Hq, case.D))
        tanh_of_sum = np.tanh(q[:, :, :, None] + k_full[:, :, None])
        x = np.einsum("bhijd,hd->bhij", tanh_of_sum, w)
    t = np.tanh(x / case.softcap) if case.softcap else np.zeros_like(x)
    s = case.softcap * t if case.softcap else x
    lengths = kw.get("kv_lengths", np.full(B, Lk))
    if "bias" in kw:
        s = s + kw["bias"]
    if "alibi_slopes" in kw:
        slopes = np.broadcast_to(kw["alibi_slopes"], (B, Hq))[:, :, None, None]
        i, j = np.arange(Lq)[:, None], np.arange(Lk)[None, :]
        s = s - slopes * np.abs(i + lengths[:, None, None, None] - Lq - j)
    keep = np.zeros((B, 1, Lq, Lk), bool)
    for b in range(B):
        keep[b, 0] = visible(Lq, Lk, case.causal, case.window, int(lengths[b]))
    keep = keep & kw["mask"] if "mask" in kw else np.broadcast_to(keep, s.shape)
    s = np.where(keep, s, -np.inf)

    sinks = kw["sinks"][None, :, None] if "sinks" in kw else np.full((1, Hq, 1), -np.inf)
    top = s.max(axis=-1, initial=-np.inf)
    seen = top > -np.inf
    m = np.where(seen, np.maximum(top, sinks), -np.inf)
    base = np.where(seen, m, 0.0)
    e = np.exp(s - base[..., None])
    e_sink = np.where(seen, np.exp(sinks - base), 0.0)
    l = e.sum(axis=-1) + e_sink
    safe_l = np.where(seen, l, 1.0)
    p = e / safe_l[..., None]
    z = np.ones_like(p)
    if case.dropout_p:
        keeps = dropout_keep(SEED, OFFSET, B, Hq, Lq, Lk, case.dropout_p)
        z = keeps / (1.0 - case.dropout_p) if case.dropout_p < 1 else np.zeros_like(p)
    o = np.einsum("bhij,bhjd->bhid", z * p, v_full)
    lse = np.where(seen, base + np.log(safe_l), -np.inf)

    dp = z * np.einsum("bhid,bhjd->bhij", d_o, v_full)
    inner = (p * dp).sum(axis=-1)
    if d_lse is not None:
        inner = inner - d_lse
    ds = p * (dp - inner[..., None])
    dx = scale * ds * (1.0 - t * t)
    results = {
        "o": o,
        "lse": lse,
        "row_max": m,
        "row_sum": np.where(seen, l, 0.0),
        "dq": np.einsum("bhij,bhjd->bhid", dx, k_full),
        "dk": np.einsum("bhij,bhid->bhjd", dx, q).reshape(B, case.Hkv, group, Lk, case.D).sum(axis=2),
        "dv": np.einsum("bhij,bhid->bhjd", z * p, d_o).reshape(B, case.Hkv, group, Lk, case.Dv).sum(axis=2),
    }
    if "w" in kw:
        dx = ds * (1.0 - t * t)
        dy = dx[..., None] * w[:, None, None] * (1.0 - tanh_of_sum**2)
        results["dq"] = dy.sum(axis=3)
        results["dk"] = dy.sum(axis=2).reshape(B, case.Hkv, group, Lk, case.D).sum(axis=2)
        results["dw"] = np.einsum("bhij,bhijd->" + ("hd" if case.w == "h" else "d"), dx, tanh_of_sum)
    if "bias" in kw:
        results["d_bias"] = sum_to(ds, kw["bias"].shape)
    if "sinks" in kw:
        results["d_sinks"] = (e_sink / safe_l * -inner).sum(axis=(0, 2))
    return results


@functools.cache
def expected_results(case: Case) -> dict[str, Array]:
    problem = make_problem(case)
    return matrix_attention(case, problem.q, problem.k, problem.v, problem.d_o, problem.d_lse, problem.kwargs)


def run_engine(problem: Problem, **options: Any) -> dict[str, Array]:
    kwargs = {**problem.kwargs, **options}
    results = core.attention_forward(problem.q, problem.k, problem.v, **kwargs)
    gradients = core.attention_backward(
        problem.d_o, problem.q, problem.k, problem.v, results, d_lse=problem.d_lse, **kwargs
    )
    return {**results, **gradients}


def assert_close(got: dict[str, Array], expected: dict[str, Array], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, right in expected.items():
        x = widen(got[name])
        assert x.shape == right.shape, name
        finite = np.isfinite(right)
        np.testing.assert_array_equal(x[~finite], right[~finite], err_msg=name)
        bound = tolerance * max(1.0, np.abs(right[finite]).max(initial=0.0))
        error = np.abs(x[finite] - right[finite]).max(initial=0.0)
        assert error <= bound, f"{name} is off by {error:.3g}, allowed are {bound:.3g}"


def assert_same_bits(a: dict[str, Array], b: dict[str, Array]) -> None:
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert x.tobytes() == b[name].tobytes(), name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_float64_attention_and_gradients(case: Case) -> None:
    assert_close(run_engine(make_problem(case)), expected_results(case), 1e-12)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.B * case.Lq * case.Lk > 0 and not case.bias_hides], ids=lambda case: case.id
)
def test_the_matrix_gradients_are_derivatives(case: Case) -> None:
    """Along random directions: the loss sum(o * d_o) + sum(lse * d_lse) is what d_o and d_lse are the gradient of."""
    problem, results = make_problem(case), expected_results(case)
    if case.bias is not None and not np.isfinite(problem.kwargs["bias"]).all():
        raise AssertionError("a direction through an infinite bias leads nowhere")

    def loss(changes: dict[str, Array]) -> float:
        arrays = {name: getattr(problem, name) + changes[name] for name in ("q", "k", "v")}
        kwargs = {
            **problem.kwargs,
            **{name: problem.kwargs[name] + changes[name] for name in changes.keys() & problem.kwargs.keys()},
        }
        now = matrix_attention(case, **arrays, d_o=problem.d_o, d_lse=problem.d_lse, kw=kwargs)
        total = float((now["o"] * problem.d_o).sum())
        if problem.d_lse is not None:
            total += float((now["lse"] * problem.d_lse)[np.isfinite(now["lse"])].sum())
        return total

    random, step = np.random.default_rng(1), 1e-5
    for varied in ["q", "k", "v", *({"bias", "sinks", "w"} & problem.kwargs.keys())]:
        gradient = results["d_" + varied if varied in ("bias", "sinks") else "d" + varied]
        direction = random.normal(size=gradient.shape)
        still = {name: np.zeros(1) for name in ("q", "k", "v")}
        slope = (loss({**still, varied: step * direction}) - loss({**still, varied: -step * direction})) / (2 * step)
        assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-6, abs=1e-6), varied


def test_float64_takes_a_float32_bias() -> None:
    case = Case(7, 9, bias=(1, 1, 1, 1))
    problem = make_problem(case)
    bias = problem.kwargs["bias"].astype(np.float32)
    kwargs = {**problem.kwargs, "bias": bias}
    expected = matrix_attention(case, problem.q, problem.k, problem.v, problem.d_o, problem.d_lse, kwargs)
    assert_close(run_engine(problem, bias=bias), expected, 1e-12)


# ---- The other dtypes, on every instruction set ---------------------------------------------------------------------


def to_bfloat16(x: Array) -> Array:
    """The bits of x, rounded to nearest even; no NaN among them."""
    with np.errstate(over="ignore"):
        bits = x.astype(np.float32).view(np.uint32)
    return ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype(np.uint16)


def widen(x: Array) -> Array:
    if x.dtype == np.uint16:
        return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return x.astype(np.float64)


def narrow(x: Array, dtype: str) -> Array:
    return to_bfloat16(x) if dtype == "bfloat16" else x.astype(dtype)


def rounded_problem(case: Case, dtype: str) -> tuple[Problem, dict[str, Array]]:
    """The case in `dtype`, and what float64 makes of the rounded numbers."""
    wide = make_problem(case)
    kwargs = dict(wide.kwargs)
    if "bias" in kwargs:
        # The most negative number is float32's: in float16 the scores of such a row would be rounded coarsely.
        bias = np.maximum(
            kwargs["bias"], np.finfo(np.float32).min, where=np.isfinite(kwargs["bias"]), out=kwargs["bias"].copy()
        )
        kwargs["bias"] = bias.astype(np.float32) if case.bias_hides else narrow(bias, dtype)
    for name in {"alibi_slopes", "sinks"} & kwargs.keys():
        kwargs[name] = kwargs[name].astype(np.float32)
    if "w" in kwargs:
        kwargs["w"] = narrow(kwargs["w"], dtype)
    q, k, v, d_o = (narrow(x, dtype) for x in (wide.q, wide.k, wide.v, wide.d_o))
    d_lse = None if wide.d_lse is None else wide.d_lse.astype(np.float32)
    exact = {name: widen(x) if name in ("bias", "alibi_slopes", "sinks", "w") else x for name, x in kwargs.items()}
    expected = matrix_attention(case, widen(q), widen(k), widen(v), widen(d_o), d_lse, exact)
    return Problem(q, k, v, d_o, d_lse, kwargs), expected


TOLERANCES = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_attention_and_gradients(case: Case, dtype: str, isa: str) -> None:
    problem, expected = rounded_problem(case, dtype)
    assert_close(run_engine(problem), expected, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", ["float64", *TOLERANCES])
def test_bits_do_not_depend_on_repetition_or_threads(dtype: str, isa: str) -> None:
    # Both are work enough for several threads; the second has keys enough to be cut into chunks.
    masked = Case(90, 250, D=40, Dv=40, group=2, mask=(0, 0, 1, 1), bias=(0, 1, 1, 1), dropout_p=0.2, sinks=True)
    for case in (masked, Case(150, 600, D=32, Dv=32, B=1, Hkv=1, bias=(0, 0, 0, 1), sinks=True)):
        problem = make_problem(case) if dtype == "float64" else rounded_problem(case, dtype)[0]
        first = run_engine(problem, threads=1)
        for threads in (1, 2, 3, 8):
            assert_same_bits(run_engine(problem, threads=threads), first)


@pytest.mark.parametrize("dtype", ["float64", *TOLERANCES])
def test_strides_do_not_change_the_result(dtype: str, isa: str) -> None:
    case = Case(19, 37, D=12, Dv=7, group=2, bias=(1, 1, 1, 1), mask=(1, 1, 1, 1))
    dense = make_problem(case) if dtype == "float64" else rounded_problem(case, dtype)[0]
    expected = run_engine(dense)

    def heads_in_rows(x: Array) -> Array:
        return np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)

    def in_a_larger_array(x: Array) -> Array:
        around = np.full([n + 2 for n in x.shape], 0xFFFF if x.dtype == np.uint16 else np.nan, x.dtype)
        around[1:-1, 1:-1, 1:-1, 1:-1] = x
        return around[1:-1, 1:-1, 1:-1, 1:-1]

    def backwards(x: Array) -> Array:
        return np.ascontiguousarray(x[:, ::-1, ::-1])[:, ::-1, ::-1]

    def columns_first(x: Array) -> Array:
        return np.asfortranarray(x)

    for relayout in (heads_in_rows, in_a_larger_array, backwards):
        arrays = {name: relayout(getattr(dense, name)) for name in ("q", "k", "v", "d_o")}
        kwargs = {**dense.kwargs, "bias": columns_first(dense.kwargs["bias"]), "mask": backwards(dense.kwargs["mask"])}
        assert_same_bits(run_engine(Problem(**arrays, d_lse=dense.d_lse, kwargs=kwargs)), expected)


@pytest.mark.parametrize("dtype", ["float64", *TOLERANCES])
def test_broadcast_views(dtype: str, isa: str) -> None:
    """Keys, values and even queries with stride 0 give what their copies give."""
    case = Case(9, 21, group=2)
    dense = make_problem(case) if dtype == "float64" else rounded_problem(case, dtype)[0]
    views = {
        name: np.broadcast_to(getattr(dense, name)[:1, :1], getattr(dense, name).shape) for name in ("q", "k", "v")
    }
    copies = {name: view.copy() for name, view in views.items()}
    rest = {"d_o": dense.d_o, "d_lse": dense.d_lse, "kwargs": dense.kwargs}
    assert_same_bits(run_engine(Problem(**views, **rest)), run_engine(Problem(**copies, **rest)))


@pytest.mark.parametrize("dtype", ["float64", *TOLERANCES])
def test_nothing_past_a_length_is_read(dtype: str, isa: str) -> None:
    case = Case(40, 150, kv_lengths=(97, 0), bias=(1, 1, 1, 1), causal="bottom_right")
    clean = make_problem(case) if dtype == "float64" else rounded_problem(case, dtype)[0]
    poison = 0x7FC1 if dtype == "bfloat16" else np.nan
    k, v, bias = clean.k.copy(), clean.v.copy(), clean.kwargs["bias"].copy()
    for b, length in enumerate(clean.kwargs["kv_lengths"]):
        k[b, :, length:] = v[b, :, length:] = poison
        bias[b, :, :, length:] = poison
    poisoned = Problem(clean.q, k, v, clean.d_o, clean.d_lse, {**clean.kwargs, "bias": bias})
    assert_same_bits(run_engine(poisoned), run_engine(clean))


# ---- Instruction sets -----------------------------------------------------------------------------------------------


def test_instruction_sets() -> None:
    wanted = {
        "x86_64": ("baseline", "avx2", "avx512", "avx512_bf16"),
        "aarch64": ("baseline", "neon", "neon_bf16"),
    }
    assert wanted.get(platform.machine(), ISAS) == ISAS
    supported = core.supported_isas()
    assert supported[0] == "baseline"
    assert [name for name in ISAS if name in supported] == supported
    assert core.best_isa() == supported[-1]


def test_supported_instruction_sets_are_those_of_the_processor() -> None:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or len(ISAS) == 1:
        pytest.skip("no /proc/cpuinfo to compare with, or no level but the baseline")
    heading = "flags" if platform.machine() == "x86_64" else "Features"
    flags = set(next(line for line in cpuinfo.read_text().splitlines() if line.startswith(heading)).split())
    if platform.machine() == "x86_64":
        needed = {"avx2": {"avx2", "fma", "f16c"}}
        needed["avx512"] = needed["avx2"] | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
        needed["avx512_bf16"] = needed["avx512"] | {"avx512_bf16"}
    else:
        needed = {"neon": {"asimd"}, "neon_bf16": {"asimd", "bf16"}}
    for name, flags_of_level in needed.items():
        assert (name in core.supported_isas()) == (flags_of_level <= flags), name


def test_setting_an_instruction_set() -> None:
    before = core.active_isa()
    try:
        for name in core.supported_isas():
            core.set_isa(name)
            assert core.active_isa() == name
        with pytest.raises(ValueError, match="no instruction set 'sse9'"):
            core.set_isa("sse9")
        assert core.active_isa() == core.supported_isas()[-1]
    finally:
        core.set_isa(before)
