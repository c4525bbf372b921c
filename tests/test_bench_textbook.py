"""The benchmark of the textbook attentions: who is right, who is refused, and its command line from end to end."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from bench import cases, cuda_targets, growth, measure, run, targets, textbook, textbook_peers, timing
from bench.__main__ import main
from bench.peak import PeakMeter
from bench.target import Target
from bench.textbook_peers import ATTENTION, COMPILED, EAGER, FAMILIES, KERAS, Problem

from .test_bench_cuda import make_context

OURS = "fastattn"
ADDITIVE, HARD, SUMMARY = (Problem(family, 2, 3, 37, 24) for family in ("additive", "hard", "summary"))
ENCODER = Problem("encoder", 2, 2, 19, 8, "step")
SMALL = [
    *(replace(ADDITIVE, direction=way) for way in ("forward", "backward", "step")),
    replace(ADDITIVE, dtype="bfloat16"),
    *(replace(HARD, direction=way) for way in ("forward", "backward", "step")),
    replace(HARD, dtype="bfloat16"),
    SUMMARY,
    replace(SUMMARY, key_mass=False),
    replace(SUMMARY, dtype="bfloat16"),
    *(replace(ENCODER, direction=way) for way in ("forward", "backward", "step")),
    *(replace(ENCODER, direction=way, dropout_p=0.1) for way in ("forward", "backward", "step")),
]
QUICK = (OURS, EAGER, ATTENTION)  # they need no compiler


def quick_candidates() -> list[Any]:
    return [
        pytest.param(problem, name, id=f"{problem.id}-{name}")
        for problem in SMALL
        for name in FAMILIES[problem.family]
        if name in QUICK
    ]


# ------------------------------------------------------------------------------------------------------- who is right


@pytest.mark.parametrize(("problem", "name"), quick_candidates())
def test_candidates_are_right_and_can_be_called_again(problem: Problem, name: str) -> None:
    candidate = FAMILIES[problem.family][name](problem, textbook_peers.draw(problem))
    assert candidate.runner.name == name
    assert candidate.error() <= 1
    with candidate.runner.context():
        first, second = candidate.runner.call(), candidate.runner.call()
    assert len(first) == len(second) >= 1
    assert candidate.error() <= 1


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "problem", [ADDITIVE, replace(ADDITIVE, direction="backward"), HARD, SUMMARY], ids=lambda x: x.id
)
def test_compiled_formulas_are_right(problem: Problem) -> None:
    candidate = FAMILIES[problem.family][COMPILED](problem, textbook_peers.draw(problem))
    assert candidate.error() <= 1
    with candidate.runner.context():
        candidate.runner.call()


def test_the_formula_to_fuse_is_the_formula() -> None:
    inputs = [textbook_peers.draw(ADDITIVE)[name].double() for name in "qkvw"]
    torch.testing.assert_close(
        textbook_peers.additive_formula(*inputs), textbook_peers.additive_formula_to_fuse(*inputs)
    )


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_what_is_right_does_not_depend_on_the_rows_at_a_time(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = replace(ADDITIVE, direction=direction)
    inputs = textbook_peers.draw(problem)
    whole = textbook_peers.expected_additive(problem, inputs)
    monkeypatch.setattr(textbook_peers, "CHUNK_BYTES", 4 * 2 * 3 * 37 * 24 * 5)  # five rows
    for x, y in zip(textbook_peers.expected_additive(problem, inputs), whole, strict=True):
        torch.testing.assert_close(x, y)


def spoil(formula: Callable[..., Any], at: int, by: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """The formula, but for one of its results."""

    def wrong(*args: Any) -> Any:
        results = formula(*args)
        if isinstance(results, Tensor):
            return by(results)
        return tuple(by(x) if n == at else x for n, x in enumerate(results))

    return wrong


def off(x: Tensor) -> Tensor:
    """One element of it is."""
    x = x.clone()
    x.view(-1)[5] = x.view(-1)[6] + 1
    return x


@pytest.mark.parametrize("by", [off, lambda x: x * torch.nan, lambda x: 1.01 * x], ids=["one", "nan", "all"])
@pytest.mark.parametrize("direction", ["forward", "step"])
def test_wrong_additive_attention_is_noticed(direction: str, by: Callable[[Tensor], Tensor]) -> None:
    problem = replace(ADDITIVE, direction=direction)
    attend = spoil(textbook_peers.additive_formula, 0, by)
    candidate = textbook_peers.additive_candidate("x", attend, problem, textbook_peers.draw(problem))
    # A single number that is off is a constant, which has no gradient: one gradient is then missing something.
    assert not candidate.error() <= 1


@pytest.mark.parametrize(
    ("at", "by"),
    [(0, off), (1, off), (2, lambda index: (index + 1) % 37), (2, lambda index: index + 37), (2, lambda index: -index)],
    ids=["output", "log_prob", "another key", "beyond", "before"],
)
def test_wrong_hard_attention_is_noticed(at: int, by: Callable[[Tensor], Tensor]) -> None:
    attend = spoil(textbook_peers.hard_formula, at, by)
    assert textbook_peers.hard_candidate("x", attend, HARD, textbook_peers.draw(HARD)).error() > 1


def test_a_wrong_gradient_of_hard_attention_is_noticed() -> None:
    attend = spoil(textbook_peers.hard_formula, 1, lambda x: 1.01 * x)
    problem = replace(HARD, direction="step")
    assert textbook_peers.hard_candidate("x", attend, problem, textbook_peers.draw(problem)).error() > 1


@pytest.mark.parametrize("at", range(5))
def test_a_wrong_summary_is_noticed(at: int) -> None:
    by = off if at != 3 else (lambda indices: (indices + 1) % 37)
    summarise = spoil(textbook_peers.summary_formula, at, by)
    assert textbook_peers.summary_candidate("x", summarise, SUMMARY, textbook_peers.draw(SUMMARY)).error() > 1


def test_a_wrong_encoder_layer_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def replace_modules(layer: torch.nn.Module) -> torch.nn.Module:
        with torch.no_grad():
            layer.self_attn.in_proj_weight.mul_(1.1)
        return layer

    monkeypatch.setattr(fastattn, "replace_modules", replace_modules)
    assert textbook_peers.encoder_ours(ENCODER, textbook_peers.draw(ENCODER)).error() > 1


def test_encoder_layers_differ_in_their_attention_alone() -> None:
    plain, ours = (textbook_peers.encoder_layer(ENCODER, is_replaced=which) for which in (False, True))
    assert type(plain.self_attn) is torch.nn.MultiheadAttention
    assert isinstance(ours.self_attn, fastattn.nn.MultiheadAttention)
    assert plain.training
    assert ours.training
    for name, x in plain.state_dict().items():
        assert torch.equal(x, ours.state_dict()[name])


def test_dropout_is_back_after_the_check() -> None:
    problem = replace(ENCODER, dropout_p=0.3, direction="forward")
    candidate = textbook_peers.encoder_ours(problem, textbook_peers.draw(problem))
    assert candidate.error() <= 1
    with candidate.runner.context():
        (first,), (second,) = candidate.runner.call(), candidate.runner.call()
    assert not torch.equal(first, second)


# ------------------------------------------------------------------------------------------------------ who is refused


def test_plain_code_of_any_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ADDITIVE.plain_bytes == 4 * 2 * 3 * 37 * 37 * 24
    assert HARD.plain_bytes == 4 * 2 * 3 * 37 * 37
    monkeypatch.setattr(textbook_peers, "PLAIN_LIMIT_BYTES", 1000)
    for problem in (ADDITIVE, HARD, SUMMARY):
        result = textbook.measure(problem, PeakMeter(1), 0.001, names=QUICK)
        assert result.notes == {EAGER: "a single tensor of it would take 0.0 GiB"}
        assert EAGER not in result.timings
        assert result.ratio(EAGER) is None


def test_without_a_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    result = textbook.measure(ADDITIVE, PeakMeter(1), 0.001, names=(COMPILED,))
    assert result.notes == {COMPILED: "torch.compile needs a C++ compiler, and there is none"}


class KerasLayer:
    """What is used of keras.layers.AdditiveAttention."""

    def __init__(self, dtype: str) -> None:
        self.dtype = getattr(torch, dtype)

    def build(self, shapes: list[Any]) -> None:
        value = torch.zeros(shapes[0][-1], dtype=self.dtype, requires_grad=True)
        self.scale = SimpleNamespace(value=value, assign=value.data.copy_)

    def __call__(self, inputs: list[Tensor]) -> Tensor:
        q, v, k = inputs
        return torch.softmax((self.scale.value * torch.tanh(q[:, :, None] + k[:, None])).sum(-1), -1) @ v


def make_keras(backend: str) -> ModuleType:
    keras = ModuleType("keras")
    keras.__spec__ = importlib.machinery.ModuleSpec("keras", None)
    keras.layers = SimpleNamespace(AdditiveAttention=KerasLayer)
    keras.backend = SimpleNamespace(backend=lambda: backend)
    keras.device = lambda name: torch.device("cpu")
    return keras


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_keras(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "keras", make_keras("torch"))
    problem = replace(ADDITIVE, H=1, direction=direction)
    candidate = FAMILIES["additive"][KERAS](problem, textbook_peers.draw(problem))
    assert candidate.error() <= 1
    result = textbook.measure(ADDITIVE, PeakMeter(1), 0.001, names=(KERAS,))
    assert result.notes == {KERAS: "keras.layers.AdditiveAttention has one head"}


def test_keras_on_another_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "keras", make_keras("jax"))
    result = textbook.measure(replace(ADDITIVE, H=1), PeakMeter(1), 0.001, names=(KERAS,))
    assert result.notes == {KERAS: "keras runs on jax here; KERAS_BACKEND=torch chooses torch"}


def test_keras_need_not_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "keras" else find(name))
    result = textbook.measure(ADDITIVE, PeakMeter(1), 0.001, names=(KERAS,))
    assert result.notes == {KERAS: "keras is not installed"}
    assert list(result.timings) == [OURS]


# ----------------------------------------------------------------------------------------------------------- measuring


def with_candidate(monkeypatch: pytest.MonkeyPatch, name: str, error: float, call: Callable[[], Any]) -> None:
    candidate = textbook_peers.Candidate(timing.Runner(name, call), lambda: error)
    monkeypatch.setitem(FAMILIES, "hard", FAMILIES["hard"] | {name: lambda problem, inputs: candidate})


def fail() -> None:
    raise RuntimeError("no kernel.\nMore words")


def test_wrong_numbers_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    with_candidate(monkeypatch, EAGER, 3.0, lambda: pytest.fail("timed"))
    result = textbook.measure(HARD, PeakMeter(1), 0.001, names=QUICK)
    assert result.notes == {EAGER: "wrong: off by 3 times the bound"}
    assert set(result.timings) == {OURS, ATTENTION}
    with_candidate(monkeypatch, OURS, float("inf"), lambda: pytest.fail("timed"))
    with pytest.raises(measure.WrongResult, match=f"^{HARD.id}: off by inf times the bound$"):
        textbook.measure(HARD, PeakMeter(1), 0.001, names=QUICK)


def test_who_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with_candidate(monkeypatch, EAGER, 0.0, fail)
    result = textbook.measure(HARD, PeakMeter(1), 0.001, names=QUICK)
    assert result.notes == {EAGER: "failed: RuntimeError: no kernel."}
    assert set(result.timings) == {OURS, ATTENTION}
    with_candidate(monkeypatch, OURS, 0.0, fail)
    with pytest.raises(measure.OursFailed, match=rf"^{HARD.id}: RuntimeError: no kernel\.$"):
        textbook.measure(HARD, PeakMeter(1), 0.001, names=QUICK)


def test_names_of_problems() -> None:
    everything = [*textbook.problems(), *textbook.cuda_problems()]
    for found in (textbook.problems(), textbook.cuda_problems(), textbook.quick_problems(), textbook.short_problems()):
        assert len({problem.id for problem in found}) == len(found)
        assert {problem.family for problem in found} == set(FAMILIES)
    assert {problem.device for problem in textbook.cuda_problems()} == {"cuda"}
    assert "additive-fp32-forward-B16-H1-L256-D256" in {problem.id for problem in everything}
    chosen = textbook.select(everything, pattern="^hard.*L2048", dtypes=["bfloat16"], directions=["forward"])
    assert [problem.id for problem in chosen] == [
        "hard-bf16-forward-B1-H8-L2048-D64",
        "hard-bf16-forward-B8-H16-L2048-D64",
    ]
    assert replace(ENCODER, dropout_p=0.1).id == "encoder-fp32-step-B2-H2-L19-D8-dropout0.1"
    assert replace(SUMMARY, key_mass=False).id == "summary-fp32-forward-B2-H3-L37-D24-rows"


def make_result(problem: Problem, **ms: float) -> textbook.Result:
    timings = {name: timing.Timing((value,)) for name, value in ms.items()}
    return textbook.Result(problem, "avx2", timings, dict.fromkeys(ms, 0.5))


def test_table_and_json() -> None:
    additive = make_result(ADDITIVE, fastattn=2.0, eager=90.0, compiled=12.0)
    hard = make_result(HARD, fastattn=3.0, attention=2.0)
    hard.notes = {EAGER: "failed: no"}
    header, _, first, second = textbook.table([additive, hard]).splitlines()
    assert header.split("  ")[0] == "case"
    assert header.split()[-6:] == ["x", "eager", "x", "compiled", "/", "attention"]
    assert first.split() == [ADDITIVE.id, "2.000", "(0.0000)", "90.0", "12.0", "45.0", "6.00", "-"]
    assert second.split() == [HARD.id, "3.000", "(0.0000)", "-", "-", "-", "-", "1.50"]
    assert textbook.notes([additive, hard]) == [f"eager PyTorch: failed: no ({HARD.id})"]
    assert textbook.line(hard) == f"{HARD.id}: 3.000 ms, 0.67 x attention"

    document = json.loads(json.dumps(textbook.as_dict(additive)))
    assert document["id"] == ADDITIVE.id
    assert document["family"] == "additive"
    assert document["speedup"] == {"eager": 45.0, "compiled": 6.0}
    assert document["results"]["eager"]["median_ms"] == 90.0
    assert document["results"]["eager"]["error_in_bounds"] == 0.5

    additive.memory_bytes = {OURS: 3 << 20, EAGER: 5 << 20}  # as on a GPU
    header, _, first = textbook.table([additive]).splitlines()
    assert header.split()[-3:] == ["MiB", "eager", "MiB"]
    assert first.split()[-2:] == ["3.0", "5.0"]
    assert textbook.as_dict(additive)["results"]["eager"]["peak_memory_bytes"] == 5 << 20


# -------------------------------------------------------------------------------------------------------------- growth


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_growth_counts_what_plain_code_holds() -> None:
    """tanh(q_i + k_j) alone has 64 MiB here, and its gradient as many."""
    eager, ours = (growth.measure_point("additive", name, 256, threads=1) for name in (EAGER, OURS))
    assert eager.unit_bytes == ours.unit_bytes == 3 * 4 * 256 * 256
    assert eager.ms is not None
    assert ours.ms is not None
    assert eager.extra_bytes is not None
    assert ours.extra_bytes is not None
    assert eager.extra_bytes > 120 << 20
    assert ours.extra_bytes < 30 << 20
    table = growth.table([eager, ours])
    assert "additive" in table
    assert len(table.splitlines()) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
@pytest.mark.parametrize(
    ("at_most_gib", "note"),
    [(6, "asks for 16.0 GiB, which it does not get"), (None, "a single tensor of it would take 16.0 GiB")],
)
def test_a_length_that_plain_code_has_no_memory_for(at_most_gib: int | None, note: str) -> None:
    point = growth.measure_point("additive", EAGER, 4096, threads=1, at_most_gib=at_most_gib)
    assert point == growth.Point("additive", EAGER, 4096, note=note)
    assert note in growth.table([point])


def test_a_point_that_fails_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure_point(family: str, name: str, length: int, *, threads: int) -> growth.Point:
        if (family, name, length) == ("hard", OURS, 128):
            raise RuntimeError("-m bench.growth failed:\nTraceback\nKeyError: 'x'\n")
        return growth.Point(family, name, length, 1.0, 2, 3)

    monkeypatch.setattr(growth, "measure_point", measure_point)
    points = list(growth.measure_growth((64, 128), threads=1, say=lambda step: None))
    assert len(points) == growth.count((64, 128)) == 12
    assert [point.note for point in points if point.note] == ["failed: KeyError: 'x'"]


# ------------------------------------------------------------------------------------------------------------- targets

TINY_TARGETS = [(ADDITIVE, {EAGER: 40.0}), (HARD, {ATTENTION: 1.5}), (replace(ENCODER, dropout_p=0.1), {EAGER: 1.3})]


def test_targets_are_those_of_the_library() -> None:
    goals = {problem.id: goals for problem, goals in targets.TEXTBOOK}
    assert goals["additive-fp32-forward-B16-H1-L256-D256"] == {EAGER: 40, COMPILED: 6}
    assert goals["additive-fp32-backward-B16-H1-L256-D256"] == {EAGER: 15}
    assert goals["hard-fp32-forward-B1-H8-L2048-D64"] == {ATTENTION: 1.5}
    assert goals["summary-fp32-forward-B1-H8-L2048-D64"] == {ATTENTION: 2.2}
    assert goals["encoder-fp32-step-B8-H8-L512-D64-dropout0.1"] == {EAGER: 1.3}
    for problem, names in (*targets.TEXTBOOK, *cuda_targets.TEXTBOOK):
        assert set(names) <= set(FAMILIES[problem.family])


def test_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "TEXTBOOK", TINY_TARGETS)
    monkeypatch.setattr(targets, "GROWTH_LENGTH", 64)
    context = targets.Context(PeakMeter(1), 0.005, 1.0, lambda step: None)
    judged = list(targets.run_targets(context, ["textbook"]))
    assert [target.name for target in judged[:3]] == [problem.id for problem, _ in TINY_TARGETS]
    assert [(target.quantity, target.relation, target.goal) for target in judged] == [
        ("x eager PyTorch", ">=", 40.0),
        ("time / attention", "<=", 1.5),
        ("x eager PyTorch", ">=", 1.3),
        ("copies of q, k, v", "<=", targets.GROWTH_GOAL),
    ]
    assert all(target.measured is not None and target.measured >= 0 for target in judged)
    assert len(context.textbook) == 3
    hard = context.textbook[1].timings
    assert judged[1].measured == pytest.approx(hard[OURS].median_ms / hard[ATTENTION].median_ms)
    assert judged[3].detail.endswith("eager PyTorch can do it, too")


def test_a_wrong_number_is_a_missed_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "TEXTBOOK", TINY_TARGETS)
    monkeypatch.setattr(targets, "length_target", lambda context: Target("l", "x", ">=", 1, None))
    with_candidate(monkeypatch, OURS, 2.0, fail)
    context = targets.Context(PeakMeter(1), 0.005, 1.0, lambda step: None)
    additive, hard, encoder, _ = targets.run_targets(context, ["textbook"])
    assert (hard.quantity, hard.verdict) == ("right numbers", "MISSED")
    assert hard.detail == f"{HARD.id}: off by 2 times the bound"
    assert additive.quantity == encoder.quantity == "x eager PyTorch"


def test_a_peer_without_a_timing_is_no_target() -> None:
    result = make_result(ADDITIVE, fastattn=2.0)
    result.notes = {COMPILED: "there is no compiler"}
    (target,) = targets.judge_textbook(result, {COMPILED: 6})
    assert target.verdict == "not measured"
    assert target.detail == "2.000 ms, torch.compile of the formula there is no compiler"


def test_targets_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, but for the GPU: problems stay on the CPU, and a clock and its memory are played."""
    monkeypatch.setattr(cuda_targets, "TEXTBOOK", TINY_TARGETS)
    context = make_context()
    judged = list(cuda_targets.run_targets(context, ["textbook"]))
    assert [target.quantity for target in judged] == ["x eager PyTorch", "time / attention", "x eager PyTorch"]
    assert all(result.memory_bytes[OURS] > 0 for result in context.textbook)
    with_candidate(monkeypatch, OURS, 0.0, fail)
    context = make_context()
    _, hard, encoder = cuda_targets.run_targets(context, ["textbook"])
    assert hard.verdict == "not measured"
    assert hard.detail == f"ours failed: {HARD.id}: RuntimeError: no kernel."
    assert context.failures == [f"FAILED, not timed: {HARD.id}: RuntimeError: no kernel."]
    assert encoder.measured is not None


# -------------------------------------------------------------------------------------------------------- command line


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--suite", "textbook", "--list"]) == 0
    assert capsys.readouterr().out.splitlines() == [problem.id for problem in textbook.problems()]
    assert main(["--suite", "textbook", "--device", "cuda", "--list", "--case", "encoder"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert main(["--suite", "textbook", "--case", "no such case"]) == 2
    with pytest.raises(SystemExit, match="2"):
        main(["--suite", "textbook", "--peers", "math"])
    assert "--peers is not for --suite textbook" in capsys.readouterr().err


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled, and one family grows."""
    monkeypatch.setattr(textbook, "quick_problems", lambda device="cpu": [ADDITIVE, HARD, SUMMARY, ENCODER])
    for family, without in itertools.product(FAMILIES, (COMPILED, KERAS)):
        kept = {name: prepare for name, prepare in FAMILIES[family].items() if name != without}
        monkeypatch.setitem(FAMILIES, family, kept)
    monkeypatch.setattr(growth, "BASES", {"additive": growth.BASES["additive"]})
    monkeypatch.setattr(growth, "QUICK_LENGTHS", (32,))


@pytest.mark.usefixtures("small")
def test_suite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "textbook.json"
    assert main(["--suite", "textbook", "--quick", "--budget", "0.005", "--json", str(out)]) == 0
    text, log = capsys.readouterr()
    for words in (textbook.TITLE, "x eager", "/ attention", "Growth with the length", "in copies of q, k, v"):
        assert words in text
    assert log.splitlines()[0].startswith(f"{ADDITIVE.id}: ")
    document = json.loads(out.read_text())
    assert [result["id"] for result in document["textbook"]] == [
        problem.id for problem in (ADDITIVE, HARD, SUMMARY, ENCODER)
    ]
    assert all(result["speedup"]["eager"] > 0 for result in document["textbook"])
    assert [(point["name"], point["length"]) for point in document["growth"]] == [(OURS, 32), (EAGER, 32)]
    assert "unfinished" not in document
    for plot in (out.with_suffix(".png"), out.with_name("textbook-growth.png")):
        assert plot.read_bytes().startswith(b"\x89PNG")
        assert f"Plot: {plot}" in text


@pytest.mark.usefixtures("small")
def test_the_default_suite_has_a_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "chosen_jobs", lambda options: [cases.Job(cases.bench_case(16, 16))])
    out = tmp_path / "all.json"
    arguments = ["--quick", "--no-model", "--sweep-time", "0.01", "--budget", "0.005", "--json", str(out)]
    assert main(arguments) == 0
    assert textbook.TITLE in capsys.readouterr().out
    document = json.loads(out.read_text())
    assert len(document["textbook"]) == 4
    assert "growth" not in document
    assert out.with_name("all-textbook.png").exists()


@pytest.mark.usefixtures("small")
def test_failures_are_said_and_cost_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_candidate(monkeypatch, OURS, 7.0, fail)
    monkeypatch.setitem(FAMILIES["summary"], OURS, lambda problem, inputs: fail())
    failed = growth.Point("hard", OURS, 32, note="failed: no")
    monkeypatch.setattr(growth, "measure_growth", lambda *args, **kwargs: iter([failed]))
    out = tmp_path / "textbook.json"
    assert main(["--suite", "textbook", "--quick", "--budget", "0.005", "--plot", "none", "--json", str(out)]) == 1
    log = capsys.readouterr().err
    assert f"WRONG, not timed: {HARD.id}: off by 7 times the bound" in log
    assert f"FAILED, not timed: {SUMMARY.id}: RuntimeError: no kernel." in log
    assert "fastattn, hard, L=32: failed: no" in log
    assert [result["id"] for result in json.loads(out.read_text())["textbook"]] == [ADDITIVE.id, ENCODER.id]
