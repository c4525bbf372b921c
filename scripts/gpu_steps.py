"""The steps of scripts/gpu_check.sh that compute: each is started by scripts/gpu_check.py in a process of its own.

With --device cpu they are rehearsed, on tiny problems and the CPU's kernels.
"""

from __future__ import annotations

import argparse
import json
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


def verdict(broken: list[str], summary: str, **detail: Any) -> Report:
    print("\n".join(broken))
    return Report("failed" if broken else "ok", summary, {"broken": broken, **detail})


def name_device(device: str) -> Report:
    """The GPU, its clocks and all versions."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "system": platform.platform()}
    if device == "cpu":
        return Report(summary="a rehearsal without a GPU", detail={"name": "cpu", "versions": versions})
    if torch.version.cuda is None or not torch.cuda.is_available():
        reason = "torch was built without CUDA" if torch.version.cuda is None else "torch finds no GPU"
        return Report("failed", f"{reason} (torch {torch.__version__})", {"versions": versions})
    properties = torch.cuda.get_device_properties(0)
    versions["cuda"] = str(torch.version.cuda)
    detail = {"name": properties.name, "versions": versions, **describe_gpu(versions)}
    return Report(summary=f"{detail.get('text', properties.name)}; torch {torch.__version__}", detail=detail)


def describe_gpu(versions: dict[str, str]) -> dict[str, Any]:
    """More of it; {} where fastattn, which the benchmark needs, has not been built yet."""
    try:
        from bench import cuda
    except (ImportError, OSError) as failure:
        print(f"not described: {failure}")
        return {}
    gpu = cuda.describe_gpu()
    versions |= {"cudnn": gpu.cudnn, "driver": gpu.driver}
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        pass
    return {**gpu.as_dict(), "text": str(gpu)}


def load(device: str) -> Report:
    """Whether the libraries load and serve the device."""
    try:
        import fastattn
        from fastattn import _cuda
    except (ImportError, OSError) as failure:
        return Report("failed", f"fastattn does not load: {failure}")
    info = fastattn.info()
    print(info)
    obstacle = None if device == "cpu" else _cuda.obstacle(0)
    if obstacle is not None:
        return Report("failed", obstacle)
    build = [f"{name}: {value}" for name, value in info.cuda_build.items()]
    return Report(summary="; ".join(["loads", *build]), detail={"info": str(info)})


# -------------------------------------------------------------------------------------------------------- real sizes


def size_problems(device: str) -> list[tuple[Any, str]]:
    """Cases and dtypes. B * L = 16384 and heads 2048 wide together, as in training, over all lengths; decoding; and
    lengths that are no multiple of anything.
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
    return problems


def expect(inputs: Any, dtype: torch.dtype) -> Any:
    """tests.compare.expected, for inputs that are no case's own, and computed where they are."""
    from tests import compare

    exact = compare._compute_by_reference(compare._copy(inputs, torch.float64), None)
    baseline = compare._compute_by_reference(compare._copy(inputs, None), None)
    return compare.Expected(exact, baseline, compare.rounding_terms(inputs, None), dtype)


def check_sizes(device: str) -> Report:
    """o, lse and every gradient at real sizes, within the tests' error bound. The reference takes whole matrices of
    scores in float64: it looks at single key heads, the first of the first sequence and the last of the last.
    """
    from bench.cases import DTYPES, SHORT, draw_on
    from tests import compare
    from tests.cases import Inputs

    broken: list[str] = []
    left_out: list[str] = []
    worst: dict[str, float] = {}
    checked = 0
    for case, dtype_name in size_problems(device):
        dtype, problem = DTYPES[dtype_name], f"{SHORT[dtype_name]}-{case.id}"
        if device != "cpu" and MATRICES * 8 * case.gqa * case.Lq * case.Lk > 0.7 * torch.cuda.mem_get_info()[0]:
            left_out.append(problem)
            continue
        inputs = draw_on(device, case, dtype).require_grad()
        fast = compare.compute(inputs)
        for b, h in sorted({(0, 0), (case.B - 1, case.Hkv - 1)}):
            q_heads, kv_head = slice(h * case.gqa, (h + 1) * case.gqa), slice(h, h + 1)
            heads = {"q": q_heads, "k": kv_head, "v": kv_head, "d_o": q_heads, "d_lse": q_heads}
            part = {name: getattr(inputs, name).detach()[b : b + 1, where] for name, where in heads.items()}
            wanted = expect(Inputs(**part, kwargs=inputs.kwargs), dtype)
            found_in = {"o": q_heads, "lse": q_heads, "dq": q_heads, "dk": kv_head, "dv": kv_head}
            got = {name: fast[name][b : b + 1, where] for name, where in found_in.items()}
            place = f"{problem} at batch {b}, key head {h}"
            broken += [f"{place}: {message}" for message in compare.violations(got, wanted)]
            for name, exact in wanted.exact.items():
                error = (got[name].double() - exact).abs().nan_to_num(nan=float("inf")).max().item()
                plain = (wanted.baseline[name].double() - exact).abs().max().item()
                key = f"{SHORT[dtype_name]} {name}"
                worst[key] = max(worst.get(key, 0.0), error / plain if plain else 0.0)
            checked += 1
            del wanted, got
        print(problem, flush=True)
    largest = max(worst, key=lambda key: worst[key])
    summary = f"{checked} key heads, {len(broken)} results outside the bound; errors up to {worst[largest]:.2f} times"
    summary += f" plain code's ({largest})" + (f"; {len(left_out)} left out for lack of memory" if left_out else "")
    return verdict(broken, summary, left_out=left_out, error_over_plain=worst)


# ----------------------------------------------------------------------------------------------- gradients and repeats


def feature_inputs(device: str, *dtypes: torch.dtype) -> Iterator[tuple[Any, Any]]:
    """Small cases that have every feature between them: those that the tests repeat on the CPU."""
    from tests.cases import make_inputs
    from tests.gpu import moved_inputs
    from tests.test_determinism import CASES

    for case in CASES:
        for dtype in dtypes:
            yield case, moved_inputs(make_inputs(case, dtype), torch.device(device)).require_grad()


def check_gradients(device: str) -> Report:
    """Each gradient against the difference quotient of the forward pass, along a random direction."""
    broken, worst, count = [], 0.0, 0
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
    return verdict(broken, f"{count} gradients, {len(broken)} are no slopes; off by up to {worst:.1e} of their norm")


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


def check_repeats(device: str) -> Report:
    """The same bits every time, forward and backward, with other work in between."""
    from bench.cases import decode_case, draw_on, training_case
    from tests.compare import compute
    from tests.test_determinism import differences

    problems = list(feature_inputs(device, torch.bfloat16, torch.float32))
    if device != "cpu":
        large = [training_case(4096, 128, tokens=4096, causal="top_left"), training_case(4096, 64), decode_case(1)]
        problems += [(case, draw_on(device, case, torch.bfloat16).require_grad()) for case in large]
    repeats = REPEATS if device != "cpu" else 2
    broken = []
    for case, inputs in problems:
        first = compute(inputs)
        different: set[str] = set()
        for n in range(repeats - 1):
            torch.full((1000 + 997 * n,), float("nan"), device=device)  # what scratch memory is taken from next
            different |= set(differences(compute(inputs), first))
        if different:
            broken.append(f"{case.id} in {inputs.q.dtype}: {', '.join(sorted(different))} differ")
    return verdict(broken, f"{len(problems)} problems {repeats} times, {len(broken)} not the same bit for bit")


# ------------------------------------------------------------------------------------------------ compute-sanitizer


def run_all_kernels(device: str) -> Report:
    """A small set in which every kind of kernel runs, for compute-sanitizer to watch."""
    from tests.cases import Case, make_inputs
    from tests.compare import compute
    from tests.gpu import moved_inputs

    cases = [
        Case(130, 200, D=64, Hkv=1, causal="top_left"),
        Case(200, 130, D=128, Hkv=1, gqa=2),
        Case(1, 600, D=128, Hkv=1, gqa=8),
        Case(3, 300, D=96, Dv=40, Hkv=1, gqa=2, bias="1hqk"),
        Case(70, 131, D=32, B=2, gqa=2, bias="1h1k", mask="b1qk", sinks=True, kv_lengths=(131, 40), dropout_p=0.3),
        Case(66, 70, D=33, Dv=17, Hkv=1, window=(20, 5), softcap=5.0, alibi="h", layout="offset"),
        Case(65, 65, D=256, Hkv=1),
        Case(40, 65, D=192, Hkv=1, bias="11qk"),
    ]
    for case in cases:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            compute(moved_inputs(make_inputs(case, dtype), torch.device(device)).require_grad())
    if device != "cpu":
        torch.cuda.synchronize()
    return Report(summary=f"{len(cases)} cases in 3 dtypes")


STEPS: dict[str, Callable[[str], Report]] = {
    "device": name_device,
    "load": load,
    "sizes": check_sizes,
    "gradients": check_gradients,
    "repeats": check_repeats,
    "sanitized": run_all_kernels,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--result", type=Path, help="a JSON file to write")
    options = parser.parse_args()
    report = STEPS[options.step](options.device)
    if options.result:
        options.result.write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    print(f"{report.status}: {report.summary}")


if __name__ == "__main__":
    main()
