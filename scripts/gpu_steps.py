"""The steps of scripts/gpu_check.sh that compute: each is started by scripts/gpu_check.py in a process of its own.

A step yields what it has found so far, after each problem, and the result file is written anew each time: a step that
is stopped, or dies, leaves what it knew. With --device cpu they are rehearsed, on tiny problems and the CPU's kernels.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

GRADIENT_TOLERANCE = 2e-3  # of the gradient's norm
REPEATS = 50
MATRICES = 16  # (Lq, Lk) matrices of float64 that the reference and the error bound have at once


@dataclass
class Report:
    """What a step has to say. status: ok or failed."""

    status: str = "ok"
    summary: str = ""
    detail: dict[str, Any] = field(default_factory=dict)


Reports = Iterator[Report]  # the last one counts


def verdict(broken: list[str], summary: str, **detail: Any) -> Report:
    return Report("failed" if broken else "ok", summary, {"broken": broken, **detail})


def name_device(device: str) -> Reports:
    """The GPU, its clocks and all versions. detail["no_gpu"]: there is nothing to check."""
    system = f"{platform.system()} {platform.machine()}"
    versions = {"python": platform.python_version(), "torch": torch.__version__, "system": system}
    if device == "cpu":
        yield Report(summary="a rehearsal without a GPU", detail={"name": "cpu", "versions": versions})
        return
    if torch.version.cuda is None or not torch.cuda.is_available():
        reason = "torch was built without CUDA" if torch.version.cuda is None else "torch finds no GPU"
        yield Report("failed", f"{reason} (torch {torch.__version__})", {"versions": versions, "no_gpu": True})
        return
    properties = torch.cuda.get_device_properties(0)
    versions["cuda"] = str(torch.version.cuda)
    detail = {
        "name": properties.name,
        "capability": f"{properties.major}{properties.minor}",
        "memory_bytes": properties.total_memory,
        "versions": versions,
        **describe_gpu(versions),
    }
    yield Report(summary=f"{detail.get('text', properties.name)}; torch {torch.__version__}", detail=detail)


def describe_gpu(versions: dict[str, str]) -> dict[str, Any]:
    """More of it, in the benchmark's words; {} where those cannot be had, which is the benchmark's trouble."""
    try:
        from bench import cuda

        gpu = cuda.describe_gpu()
    except Exception as failure:
        print(f"not described: {failure}")
        return {}
    versions |= {"cudnn": gpu.cudnn, "driver": gpu.driver}
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        pass
    return {**gpu.as_dict(), "text": str(gpu)}


def load(device: str) -> Reports:
    """Whether the libraries load and serve the device. detail["cannot_load"]: to compile them again may help."""
    try:
        import fastattn
        from fastattn import _cuda
    except (ImportError, OSError, RuntimeError) as failure:
        yield Report("failed", f"fastattn does not load: {failure}", {"cannot_load": True})
        return
    info = fastattn.info()
    print(info)
    obstacle = None if device == "cpu" else _cuda.obstacle(0)
    if obstacle is not None:
        is_too_old = torch.cuda.get_device_capability(0) < _cuda.OLDEST_CAPABILITY
        yield Report("failed", obstacle, {"cannot_load": not is_too_old})
        return
    build = [f"{name}: {value}" for name, value in info.cuda_build.items()]
    yield Report(summary="; ".join(["loads", *build]), detail={"info": str(info)})


# -------------------------------------------------------------------------------------------------------- real sizes


def size_problems(device: str) -> list[tuple[Any, str]]:
    """Cases and dtypes. B * L = 16384 and heads 2048 wide together, as in training, over all lengths; decoding; lengths
    that are no multiple of anything; more CTAs than a grid has along y.
    """
    from bench.cases import decode_case, training_case
    from tests.cases import Case

    if device == "cpu":
        return [(Case(64, 64, D=16, causal="top_left"), "bfloat16"), (Case(1, 96, D=16, B=2, gqa=4), "float32")]
    kinds: list[dict[str, Any]] = [{}, {"causal": "top_left"}, {"causal": "bottom_right", "window": (256, 0)}]
    problems = []
    for n, L in enumerate((512, 1024, 2048, 4096, 8192, 16384)):
        for D in (64, 128):
            problems += [(training_case(L, D, **kind), "bfloat16") for kind in kinds[:2]]
            problems.append((training_case(L, D, **kinds[n % 3]), ("float16", "float32")[n % 2]))
        problems.append((training_case(L, 128, **kinds[2]), "bfloat16"))
    problems += [(Case(L, L, D=128, B=2, Hkv=4, gqa=4, causal="bottom_right"), "bfloat16") for L in (2000, 4097)]
    problems += [(decode_case(B), dtype) for B, dtype in ((1, "bfloat16"), (16, "bfloat16"), (2, "float32"))]
    problems.append((Case(7, 30001, D=128, Hkv=2, gqa=8, causal="bottom_right"), "bfloat16"))
    problems += [(Case(17, 19, D=32, B=70000, Hkv=1), "bfloat16"), (Case(1, 33, D=32, Hkv=70000), "bfloat16")]
    problems += [(Case(1, 65536, D=128, Hkv=1, gqa=8), "bfloat16"), (Case(65536, 20, D=32, Hkv=1), "bfloat16")]
    return problems


def free_bytes() -> int:
    """What torch keeps for later is free as well."""
    kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return torch.cuda.mem_get_info()[0] + kept


def expect(inputs: Any, dtype: torch.dtype) -> Any:
    """tests.compare.expected, for inputs that are no case's own, and computed where they are."""
    from tests import compare

    exact = compare._compute_by_reference(compare._copy(inputs, torch.float64), None)
    baseline = compare._compute_by_reference(compare._copy(inputs, None), None)
    return compare.Expected(exact, baseline, compare.rounding_terms(inputs, None), dtype)


def check_heads(device: str, case: Any, dtype: torch.dtype) -> Iterator[tuple[list[str], dict[str, float]]]:
    """For two key heads of a problem, what is wrong with them, and the largest error of each result over plain code's.

    The reference takes whole matrices of scores in float64: it looks at the first head of the first sequence and at the
    last head of the last.
    """
    from bench.cases import draw_on
    from tests import compare
    from tests.cases import Inputs

    inputs = draw_on(device, case, dtype).require_grad()
    fast = compare.compute(inputs)
    for b, h in sorted({(0, 0), (case.B - 1, case.Hkv - 1)}):
        q_heads, kv_head = slice(h * case.gqa, (h + 1) * case.gqa), slice(h, h + 1)
        heads = {"q": q_heads, "k": kv_head, "v": kv_head, "d_o": q_heads, "d_lse": q_heads}
        part = {name: getattr(inputs, name).detach()[b : b + 1, where] for name, where in heads.items()}
        wanted = expect(Inputs(**part, kwargs=inputs.kwargs), dtype)
        found_in = {"o": q_heads, "lse": q_heads, "dq": q_heads, "dk": kv_head, "dv": kv_head}
        got = {name: fast[name][b : b + 1, where] for name, where in found_in.items()}
        ratios = {}
        for name, exact in wanted.exact.items():
            error = (got[name].double() - exact).abs().nan_to_num(nan=float("inf")).max().item()
            plain = (wanted.baseline[name].double() - exact).abs().max().item()
            ratios[name] = error / plain if plain else 0.0
        yield [f"batch {b}, key head {h}: {message}" for message in compare.violations(got, wanted)], ratios
        del wanted, got


def check_sizes(device: str) -> Reports:
    """o, lse and every gradient at real sizes, within the tests' error bound."""
    from bench.cases import DTYPES, SHORT

    broken: list[str] = []
    left_out: list[str] = []
    worst: dict[str, float] = {}
    checked = 0
    for case, dtype_name in size_problems(device):
        problem = f"{SHORT[dtype_name]}-{case.id}"
        print(problem, flush=True)
        try:
            if device != "cpu" and MATRICES * 8 * case.gqa * case.Lq * case.Lk > 0.7 * free_bytes():
                raise torch.OutOfMemoryError
            for messages, ratios in check_heads(device, case, DTYPES[dtype_name]):
                broken += [f"{problem} at {message}" for message in messages]
                for name, ratio in ratios.items():
                    key = f"{SHORT[dtype_name]} {name}"
                    worst[key] = max(worst.get(key, 0.0), ratio)
                checked += 1
        except torch.OutOfMemoryError:
            left_out.append(problem)
            print("left out for lack of memory", flush=True)
        summary = f"{checked} key heads, {len(broken)} results outside the bound"
        if worst:
            largest = max(worst, key=lambda key: worst[key])
            summary += f"; errors up to {worst[largest]:.2f} times plain code's ({largest})"
        if left_out:
            summary += f"; {len(left_out)} problems left out for lack of memory"
        yield verdict(broken, summary, left_out=left_out, error_over_plain=worst)
    if not checked:
        yield Report("failed", "no problem fits into the GPU's memory", {"left_out": left_out})


# ----------------------------------------------------------------------------------------------- gradients and repeats


def feature_inputs(device: str, *dtypes: torch.dtype) -> Iterator[tuple[Any, Any]]:
    """Small cases that have every feature between them."""
    from tests.cases import make_inputs
    from tests.gpu import MIXED, moved_inputs

    for case in MIXED:
        for dtype in dtypes:
            yield case, moved_inputs(make_inputs(case, dtype), torch.device(device)).require_grad()


def check_gradients(device: str) -> Reports:
    """Each gradient against the difference quotient of the forward pass, along a random direction."""
    broken: list[str] = []
    worst, count = 0.0, 0
    for case, inputs in feature_inputs(device, torch.float32):
        for name, slope, quotient, size in slopes(inputs):
            # Adding something to finfo.min shows no slope.
            if name == "bias" and case.bias_values != "normal":
                continue
            count += 1
            off = abs(quotient - slope) / size if size else abs(quotient)
            worst = max(worst, off)
            if not off <= GRADIENT_TOLERANCE:
                broken.append(f"d{name} of {case.id}: slope {slope:.6g}, difference quotient {quotient:.6g}")
        yield verdict(broken, f"{count} gradients, {len(broken)} are no slopes; off by up to {worst:.1e} of their norm")


def slopes(inputs: Any, step: float = 1e-2) -> Iterator[tuple[str, float, float, float]]:
    """For each differentiable input: its name, the slope along a direction by its gradient and by differences of the
    loss, and the gradient's norm.
    """
    import fastattn
    from tests.compare import gradients

    named = {name: x.detach() for name, x in inputs.differentiable().items()}

    def attend(**moved: Any) -> tuple[Any, Any]:
        now = {**inputs.differentiable(), **moved}
        kwargs = {**inputs.kwargs, **{name: x for name, x in now.items() if name not in ("q", "k", "v")}}
        torch.manual_seed(1)  # the same weights are dropped each time
        return fastattn.attention(now["q"], now["k"], now["v"], return_lse=True, **kwargs)

    def loss(**moved: Any) -> float:
        with torch.no_grad():
            o, lse = attend(**moved)
        lse = lse.masked_fill(lse == -torch.inf, 0.0)
        return float((o.double() * inputs.d_o.double()).sum() + (lse.double() * inputs.d_lse.double()).sum())

    found = gradients(*attend(), inputs)
    generator = torch.Generator().manual_seed(7)
    for name, x in named.items():
        grad = found[f"d{name}"].double()
        direction = torch.randn(x.shape, generator=generator).to(x)
        # Of fourth order: what is left is mostly the noise of float32 in the loss.
        near, far = (loss(**{name: x + h * direction}) - loss(**{name: x - h * direction}) for h in (step, 2 * step))
        quotient = (8 * near - far) / (12 * step)
        yield name, float((grad * direction.double()).sum()), quotient, float(grad.norm())


def check_repeats(device: str) -> Reports:
    """The same bits every time, forward and backward, with other work in between."""
    from bench.cases import decode_case, draw_on, training_case
    from tests.compare import compute, differences

    problems = list(feature_inputs(device, torch.bfloat16, torch.float16, torch.float32))
    if device != "cpu":
        large = [training_case(4096, 128, tokens=4096, causal="top_left"), training_case(4096, 64), decode_case(1)]
        problems += [(case, draw_on(device, case, torch.bfloat16).require_grad()) for case in large]
    repeats = REPEATS if device != "cpu" else 2
    broken: list[str] = []
    for done, (case, inputs) in enumerate(problems, 1):
        first = compute(inputs)
        different: set[str] = set()
        for n in range(repeats - 1):
            torch.full((1000 + 997 * n,), float("nan"), device=device)  # what scratch memory is taken from next
            different |= set(differences(compute(inputs), first))
        if different:
            broken.append(f"{case.id} in {inputs.q.dtype}: {', '.join(sorted(different))} differ")
        yield verdict(broken, f"{done} problems {repeats} times, {len(broken)} not the same bit for bit")


# ------------------------------------------------------------------------------------------------ compute-sanitizer


def sanitized_cases() -> list[Any]:
    """A small set in which every kind of kernel runs, whatever the number of multiprocessors. tests/test_gpu_check.py
    looks after that.
    """
    from tests.cases import Case

    return [
        Case(130, 200, D=64, Hkv=1, causal="top_left"),
        Case(200, 130, D=128, Hkv=1, gqa=2),
        Case(1, 600, D=128, Hkv=1, gqa=8),
        Case(3, 300, D=96, Dv=40, Hkv=1, gqa=2, bias="1hqk"),
        Case(70, 131, D=32, B=2, gqa=2, bias="1h1k", mask="b1qk", sinks=True, kv_lengths=(131, 40), dropout_p=0.3),
        Case(66, 70, D=33, Dv=17, Hkv=1, window=(20, 5), softcap=5.0, alibi="h", layout="offset"),
        Case(65, 65, D=256, Hkv=1),
        Case(40, 65, D=192, Hkv=1, bias="11qk"),
        Case(19, 70, D=8, B=4, gqa=2, bias="11qk"),
    ]


def sanitized_packed() -> list[Any]:
    """Packed sequences in which every kernel that serves them runs, one of no rows and one of no keys among them."""
    from tests.packed import PackedCase

    lengths = (5, 70, 0, 33), (9, 64, 12, 0)
    return [
        PackedCase(*lengths, {"causal": True, "gqa": 2, "Hkv": 1, "D": 64}),
        PackedCase(*lengths, {"bias": "1hqk", "sinks": True, "dropout_p": 0.2, "Hkv": 1, "D": 24}),
        PackedCase((1, 3), (700, 5), {"causal": True, "gqa": 8, "Hkv": 1, "D": 128}),
    ]


def sanitized_caches() -> list[Any]:
    from tests.kv_cache_calls import CacheCase

    return [
        CacheCase((0, 13, 90), 5, page_size=7, rotary_dim=8, Hkv=1),
        CacheCase((90, 400), 1, page_size=64, gqa=4, Hkv=1, D=128),
        CacheCase((30, 70), 20, page_size=16, int8=True, Hkv=1, window=(40, 0)),
    ]


def run_all_kernels(device: str, dtypes: tuple[str, ...]) -> Reports:
    """For compute-sanitizer to watch."""
    import fastattn
    from tests.additive import compute_additive, first_of_each_kind, make_additive_inputs
    from tests.cases import make_inputs
    from tests.choices import call_all, sanitized_choices
    from tests.compare import compute
    from tests.gpu import moved, moved_inputs
    from tests.kv_cache_calls import Call
    from tests.packed import PackedProblem

    def there(x: Any) -> Any:
        return moved(x.detach(), torch.device(device)) if isinstance(x, torch.Tensor) else x

    done = 0
    for dtype in dtypes:
        for case in sanitized_cases():
            compute(moved_inputs(make_inputs(case, getattr(torch, dtype)), torch.device(device)).require_grad())
            done += 1
            yield Report(summary=f"{done} cases")
        for packed in sanitized_packed():
            problem = PackedProblem(packed, getattr(torch, dtype))
            for name in ("q", "k", "v", "d_o", "d_lse"):
                setattr(problem, name, there(getattr(problem, name)))
            problem.kwargs = {name: there(x) for name, x in problem.kwargs.items()}
            first, second = problem.cu_seqlens
            problem.cu_seqlens = there(first), there(second)
            problem.compute()
            done += 1
            yield Report(summary=f"{done} cases")
        for cached in sanitized_caches():
            call = Call(cached, getattr(torch, dtype))
            fastattn.attention_with_kv_cache(**{name: there(x) for name, x in call.arguments().items()})
            done += 1
            yield Report(summary=f"{done} cases")
        for additive in first_of_each_kind():
            inputs = make_additive_inputs(additive, getattr(torch, dtype))
            compute_additive(inputs.moved(lambda x: moved(x, torch.device(device))))
            done += 1
            yield Report(summary=f"{done} cases")
        for case in sanitized_choices():
            call_all(moved_inputs(make_inputs(case, getattr(torch, dtype)), torch.device(device)))
            done += 1
            yield Report(summary=f"{done} cases")
    torch.ops.fastattn.dropout_mask(torch.tensor([3, 4], device=device), 1, 2, 5, 70, 0.3)
    if device != "cpu":
        torch.cuda.synchronize()
    yield Report(summary=f"{done} cases, {len(dtypes)} dtypes, and the mask of dropout")


STEPS: dict[str, Callable[[str], Reports]] = {
    "device": name_device,
    "load": load,
    "sizes": check_sizes,
    "gradients": check_gradients,
    "repeats": check_repeats,
    # The slower the tool, the less: 16-bit kernels differ in one instruction, and float32's have tiles of their own.
    "memcheck": functools.partial(run_all_kernels, dtypes=("bfloat16", "float32", "float16")),
    "racecheck": functools.partial(run_all_kernels, dtypes=("bfloat16", "float32")),
    "synccheck": functools.partial(run_all_kernels, dtypes=("bfloat16", "float32")),
}


def write(path: Path, report: Report) -> None:
    """All of it or nothing: whoever reads it may do so at any moment."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--result", type=Path, help="a JSON file to write")
    options = parser.parse_args()
    report = Report("failed", "it found nothing to do")
    said = 0
    for report in STEPS[options.step](options.device):
        broken = report.detail.get("broken", [])
        print("".join(f"{line}\n" for line in broken[said:]), end="", flush=True)
        said = len(broken)
        if options.result:
            write(options.result, report)
    print(f"{report.status}: {report.summary}")


if __name__ == "__main__":
    main()
