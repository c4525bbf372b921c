"""What can be known about CUDA tensors without a GPU: shapes, refusals, who serves what, and how the library is built.

torch's fake tensors have a device and no data, so that "cuda" can be traced anywhere. Kernels run in test_cuda.py on a
GPU, and in test_emulator.py on the host.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fastattn
from fastattn import _cuda, _errors, _ops, _sdpa

from .conftest import cuda_obstacle

ROOT = Path(__file__).resolve().parent.parent
ops = torch.ops.fastattn


@pytest.fixture
def fake() -> Iterator[FakeTensorMode]:
    with FakeTensorMode() as mode:
        yield mode


def empty(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cuda") -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def arguments() -> dict[str, Tensor]:
    """Good ones, of every kind."""
    return {
        "q": empty(2, 4, 5, 16),
        "k": empty(2, 2, 7, 16),
        "v": empty(2, 2, 7, 8),
        "bias": empty(5, 7),
        "mask": empty(5, 7, dtype=torch.bool),
        "alibi_slopes": empty(4),
        "sinks": empty(4),
        "kv_lengths": empty(2, dtype=torch.int32),
    }


# --- Shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_results_are_where_q_is(dtype: torch.dtype, dropout_p: float) -> None:
    tensors = arguments()
    for name in ("q", "k", "v", "bias"):
        tensors[name] = tensors[name].to(dtype)
    o, lse = fastattn.attention(**tensors, causal=True, dropout_p=dropout_p, return_lse=True)
    assert (o.shape, o.dtype, o.device) == ((2, 4, 5, 8), dtype, torch.device("cuda:0"))
    assert (lse.shape, lse.dtype, lse.device) == ((2, 4, 5), torch.float32, torch.device("cuda:0"))
    tensors["q"] = empty(2, 5, 4, 16, dtype=dtype).transpose(1, 2)
    assert fastattn.attention(**tensors).transpose(1, 2).is_contiguous(), "heads inside rows, as q has them"


@pytest.mark.usefixtures("fake")
def test_another_device_than_the_first() -> None:
    q = empty(2, 4, 5, 16, device="cuda:1")
    assert fastattn.attention(q, q, q, dropout_p=0.5).device == torch.device("cuda:1")


@pytest.mark.usefixtures("fake")
def test_the_seed_is_where_q_is() -> None:
    """Drawn there as well, so that a captured graph draws anew when it is replayed."""
    for device in ("cpu", "cuda:0", "cuda:1", "meta"):
        state = _ops.draw_rng_state(torch.device(device))
        assert (state.device, state.dtype, state.shape) == (torch.device(device), torch.int64, (2,))
        mask = ops.dropout_mask(state, 2, 3, 5, 7, 0.5)
        assert (mask.device, mask.dtype, mask.shape) == (state.device, torch.bool, (2, 3, 5, 7))


def test_code_for_a_gpu_can_be_traced_without_one() -> None:
    with FakeTensorMode():
        q = empty(2, 4, 5, 16)
        traced = make_fx(lambda q: fastattn.attention(q, q, q, dropout_p=0.25, causal=True))(q)
    calls = [node for node in traced.graph.nodes if node.target is ops.attention_forward.default]
    assert len(calls) == 1
    state = calls[0].args[8]
    assert state.kwargs["device"] == torch.device("cuda:0")
    assert state.meta["val"].device == torch.device("cuda:0")


# --- Refusals --------------------------------------------------------------------------------------------------------

REFUSALS: list[tuple[str, type[Exception], tuple[str, ...], Any]] = [
    (
        "float64",
        TypeError,
        ("q is torch.float64, which the CUDA kernels do not take", "q.float()", "q.cpu()"),
        lambda: [empty(1, 2, 5, 8, dtype=torch.float64)] * 3,
    ),
    (
        "wide",
        ValueError,
        ("q and k have head dimension 257; the CUDA kernels take at most 256", "q.cpu()"),
        lambda: [empty(1, 2, 5, 257), empty(1, 2, 5, 257), empty(1, 2, 5, 8)],
    ),
    (
        "wide-values",
        ValueError,
        ("v has head dimension 300; the CUDA kernels take at most 256", "q.cpu()"),
        lambda: [empty(1, 2, 5, 8), empty(1, 2, 5, 8), empty(1, 2, 5, 300)],
    ),
    (
        "long",
        ValueError,
        ("q has length 2147483648; the CUDA kernels take at most 1073741824", "parts"),
        lambda: [empty(1, 1, 1, 8).expand(1, 1, 2**31, 8), empty(1, 1, 4, 8), empty(1, 1, 4, 8)],
    ),
    (
        "long-keys",
        ValueError,
        ("k and v have length 2147483648; the CUDA kernels", "merge_attention_states"),
        lambda: [empty(1, 1, 4, 8), *[empty(1, 1, 1, 8).expand(1, 1, 2**31, 8)] * 2],
    ),
]


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(("error", "parts", "make"), [pytest.param(*x[1:], id=x[0]) for x in REFUSALS])
def test_limits(error: type[Exception], parts: tuple[str, ...], make: Any) -> None:
    with pytest.raises(error) as raised:
        fastattn.attention(*make())
    assert type(raised.value) is error
    text = str(raised.value)
    assert text.startswith("fastattn: ")
    assert text.endswith(".")
    assert "\n" not in text
    for part in parts:
        assert part in text


OPERATORS: dict[str, tuple[Any, str, str, str]] = {  # function of q and k, what else for wide heads, who has many keys
    "attention": (
        lambda q, k: fastattn.attention(q, k, k),
        "torch.nn.functional.scaled_dot_product_attention",
        "k and v have",
        "merge_attention_states",
    ),
    "additive": (
        lambda q, k: fastattn.additive_attention(q, k, k, empty(q.shape[-1])),
        "fastattn.reference.additive_attention",
        "k and v have",
        "merge_attention_states",
    ),
    "additive-one-head": (
        lambda q, k: fastattn.additive_attention(q.squeeze(1), *[k.squeeze(1)] * 2, empty(q.shape[-1])),
        "fastattn.reference.additive_attention",
        "k and v have",
        "merge_attention_states",
    ),
    "hard": (
        lambda q, k: fastattn.hard_attention(q, k, k),
        "fastattn.reference.log_probabilities, hard_choice and hard_attention",
        "k and v have",
        "q.cpu()",
    ),
    "summary": (
        fastattn.attention_summary,
        "fastattn.reference.attention_summary",
        "k has",
        "q.cpu()",
    ),
}


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("name", OPERATORS)
def test_a_limit_names_what_the_operator_has_instead(name: str) -> None:
    function, for_wide_heads, keys, for_many_keys = OPERATORS[name]

    def message(q: Tensor, k: Tensor) -> str:
        with pytest.raises(ValueError, match=r"^fastattn: .*\.$") as raised:
            function(q, k)
        return str(raised.value)

    short, long = empty(1, 1, 4, 8), empty(1, 1, 1, 8).expand(1, 1, 2**31, 8)
    wide = message(empty(1, 1, 4, 257), empty(1, 1, 4, 257))
    assert wide == (
        "fastattn: q and k have head dimension 257; the CUDA kernels take at most 256: move the tensors to the CPU with"
        f" q.cpu(), where there is no limit, or call {for_wide_heads}."
    )
    many_rows = "fastattn: q has length 2147483648; the CUDA kernels take at most 1073741824: cut q into parts"
    assert message(long, short).startswith(many_rows)
    many_keys = message(short, long)
    assert many_keys.startswith(f"fastattn: {keys} length 2147483648; the CUDA kernels take at most 1073741824: ")
    assert for_many_keys in many_keys
    # Results over parts of the keys merge where there is an lse, and a choice or a summary has none to merge by.
    assert ("merge" in many_keys) == (for_many_keys == "merge_attention_states")


@pytest.mark.parametrize("name", OPERATORS)
def test_what_there_is_instead(name: str) -> None:
    """Messages name functions that exist, with their whole path or after one that has it."""
    place: Any = None
    for path in re.split(", | and ", OPERATORS[name][1]):
        *modules, function = path.split(".")
        place = importlib.import_module(".".join(modules)) if modules else place
        assert callable(getattr(place, function))


@pytest.mark.usefixtures("fake")
def test_the_limits_are_the_gpus_alone() -> None:
    for device in ("cpu", "meta"):
        x = empty(1, 2, 5, 300, dtype=torch.float64, device=device)
        assert fastattn.attention(x, x, x).shape == x.shape
    at_the_limit = empty(1, 2, 5, 256)
    assert fastattn.attention(at_the_limit, at_the_limit, at_the_limit).shape == at_the_limit.shape


def test_the_limits_are_the_same_everywhere() -> None:
    """The ones that Python has to know are those of the engine."""
    header = (ROOT / "csrc" / "cuda" / "attention.h").read_text(encoding="utf-8")
    assert re.search(rf"\bkMaxHeadDim = {_cuda.MAX_HEAD_DIM};", header)
    oldest = _cuda.OLDEST_CAPABILITY[0] * 10 + _cuda.OLDEST_CAPABILITY[1]
    assert re.search(rf"\bkMinComputeCapability = {oldest};", header)


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("name", ["k", "v", "bias", "mask", "alibi_slopes", "sinks", "kv_lengths"])
@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_tensors_on_two_devices(name: str, device: str) -> None:
    tensors = arguments()
    tensors[name] = tensors[name].to(device)
    text = f"fastattn: {name} is on {device} but q is on cuda:0; all tensors must be on one device: move it with"
    with pytest.raises(ValueError, match=re.escape(f"{text} {name}.to(q.device).")):
        fastattn.attention(**tensors)


@pytest.mark.usefixtures("fake")
def test_a_seed_on_another_device() -> None:
    q = empty(1, 1, 4, 16)
    state = empty(2, dtype=torch.int64, device="cpu")
    with pytest.raises(ValueError, match="rng_state is on cpu but q is on cuda:0"):
        ops.attention_forward(q, q, q, *[None] * 5, state, 0, -1, -1, None, 0.0, 0.5, False)


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("missing", "there", "torch_cuda", "remedy"),
    [
        ("fastattn was built without its CUDA kernels (_C_cuda.so)", False, "13.0", "build fastattn where nvcc is"),
        ("torch was built without CUDA", True, None, "install a torch with CUDA"),
        ("_C_cuda.so cannot be loaded: undefined symbol: x", True, "13.0", "build fastattn again on this machine"),
    ],
    ids=["not-built", "cpu-torch", "broken"],
)
def test_without_the_library(
    missing: str, there: bool, torch_cuda: str | None, remedy: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What torch says then ("Could not run ... with arguments from the 'CUDA' backend") becomes a sentence of use."""
    library = tmp_path / "_C_cuda.so"
    if there:
        library.touch()
    monkeypatch.setattr(_cuda, "LIBRARY", library)
    monkeypatch.setattr(_cuda, "missing", missing)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    error = _errors.explain(NotImplementedError("Could not run"), arguments(), {"dropout_p": 0.0})
    assert type(error) is ValueError
    assert str(error).startswith(f"fastattn: q is on cuda:0, but {missing}; {remedy}")
    assert str(error).endswith(", or move the tensors to the CPU with q.cpu().")


def test_kinds_of_errors_from_the_library() -> None:
    for mark, kind in {
        "fastattn[OutOfMemoryError]: CUDA out of memory: ...": torch.OutOfMemoryError,
        "fastattn[RuntimeError]: kernel x did not launch": RuntimeError,
        "fastattn[TypeError]: q is torch.float64": TypeError,
    }.items():
        error = _errors.explain(RuntimeError(mark), {}, {})
        assert type(error) is kind
        assert str(error) == "fastattn: " + mark.split("]: ")[1]


def test_other_devices_have_no_kernel() -> None:
    with FakeTensorMode():
        error = _errors.explain(NotImplementedError("Could not run"), {"q": empty(1, 1, 1, 1, device="xpu")}, {})
    assert "q is on xpu:0, for which there is no kernel" in str(error)


# --- In PyTorch's place ----------------------------------------------------------------------------------------------


@pytest.fixture
def usable(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with the library loaded, on GPUs that are new enough."""
    monkeypatch.setattr(_cuda, "missing", None)
    monkeypatch.setattr(_cuda, "_obstacles", {0: None, 1: None})


def calls_of(*tensors: Tensor) -> fastattn.SdpaCalls:
    fastattn.sdpa_calls(reset=True)
    with fastattn.replaced_sdpa(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        F.scaled_dot_product_attention(*tensors)
    return fastattn.sdpa_calls(reset=True)


@pytest.mark.usefixtures("fake", "usable")
def test_sdpa_on_a_gpu_is_served() -> None:
    x = empty(2, 4, 5, 16)
    assert calls_of(x, x, x) == fastattn.SdpaCalls(1, {})
    assert calls_of(x, x, x, empty(5, 5)) == fastattn.SdpaCalls(1, {})


@pytest.mark.usefixtures("fake", "usable")
@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((2, 4, 5, 16), torch.float64, "dtype torch.float64 on CUDA"),
        ((2, 4, 5, 257), torch.float32, "a head dimension above 256 on CUDA"),
    ],
)
def test_sdpa_beyond_the_limits_is_handed_back(shape: tuple[int, ...], dtype: torch.dtype, reason: str) -> None:
    x = empty(*shape, dtype=dtype)
    assert calls_of(x, x, x) == fastattn.SdpaCalls(0, {reason: 1})


@pytest.mark.usefixtures("fake", "usable")
@pytest.mark.parametrize("dims", [1, 2, 3, 4, 5])
def test_reasons_look_at_any_rank(dims: int) -> None:
    x = empty(*[3] * dims)
    assert _sdpa._reason_to_hand_back(x, x, x, None) is None
    assert _sdpa._reason_to_hand_back(empty(), empty(), empty(), None) is None


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("missing", "too_old", "reason"),
    [
        ("torch was built without CUDA", {}, "CUDA tensors: torch was built without CUDA"),
        (None, {0: "compute capability 7.5 is below 8.0"}, "CUDA tensors: compute capability 7.5 is below 8.0"),
    ],
)
def test_sdpa_on_a_gpu_that_is_not_served(
    missing: str | None, too_old: dict[int, str | None], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cuda, "missing", missing)
    monkeypatch.setattr(_cuda, "_obstacles", too_old)
    x = empty(2, 4, 5, 16)
    with fastattn.replaced_sdpa(), pytest.warns(UserWarning, match=re.escape(reason)):
        F.scaled_dot_product_attention(x, x, x)
    assert fastattn.sdpa_calls(reset=True) == fastattn.SdpaCalls(0, {reason: 1})


@pytest.mark.usefixtures("usable")
@pytest.mark.parametrize(
    ("shape", "calls"),
    [((2, 4, 5, 16), (1, {})), ((2, 4, 5, 257), (0, {"a head dimension above 256 on CUDA": 1}))],
    ids=["served", "handed-back"],
)
def test_sdpa_in_compiled_code(shape: tuple[int, ...], calls: tuple[int, dict[str, int]]) -> None:
    """The reasons are found while the trace is made, without breaking it."""
    torch._dynamo.reset()
    fastattn.sdpa_calls(reset=True)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with FakeTensorMode(), fastattn.replaced_sdpa(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = empty(*shape)
        torch.compile(lambda x: F.scaled_dot_product_attention(x, x, x), backend=backend, fullgraph=True)(x)
    assert fastattn.sdpa_calls(reset=True) == fastattn.SdpaCalls(*calls)
    assert ("attention_forward" in graphs[0].code) == bool(calls[0])


def test_capability_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def capability(index: int) -> tuple[int, int]:
        asked.append(index)
        return ((7, 5), (8, 0), (12, 0))[index]

    monkeypatch.setattr(_cuda, "missing", None)
    monkeypatch.setattr(_cuda, "_obstacles", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setattr(_cuda, "driver_version", lambda: None)
    for _ in range(2):
        found = [_cuda.obstacle(index) for index in range(4)]
        assert found == ["compute capability 7.5 is below 8.0", None, None, None]
    assert asked == [0, 1, 2]


@pytest.mark.parametrize(
    ("driver", "toolkit", "reason"),
    [
        ((12, 8), (13, 0), "the NVIDIA driver is for CUDA 12.8, and the kernels were built with CUDA 13.0"),
        ((13, 0), (13, 1), None),
        ((13, 2), (12, 8), None),
        (None, (13, 0), None),
    ],
)
def test_a_driver_of_an_earlier_cuda_is_an_obstacle(
    driver: tuple[int, int] | None, toolkit: tuple[int, int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cuda, "missing", None)
    monkeypatch.setattr(_cuda, "_obstacles", {})
    monkeypatch.setattr(_cuda, "driver_version", lambda: driver)
    monkeypatch.setattr(_cuda, "toolkit_version", lambda: toolkit)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA Test")
    assert _cuda.obstacle(0) == reason
    assert _cuda.devices() == ["cuda:0 NVIDIA Test (sm_90)" + (f", not served: {reason}" if reason else "")]


# --- The library -----------------------------------------------------------------------------------------------------


def test_the_library_loads_wherever_torch_has_cuda() -> None:
    """A GPU and a driver are not needed for that."""
    if not _cuda.LIBRARY.exists():
        pytest.skip("fastattn/_C_cuda.so is not built")
    assert (_cuda.missing is None) == (torch.version.cuda is not None), _cuda.missing
    for name in ("attention_forward", "attention_backward", "dropout_mask", "_check_attention"):
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(f"fastattn::{name}", "CUDA")
        assert has_kernel == (_cuda.missing is None), name
    if _cuda.missing is None:
        assert set(fastattn.info().cuda_build) == {"toolkit", "archs"}


def test_the_summary_says_when_nothing_ran_on_a_gpu() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", "tests/test_info.py"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ("fastattn: CUDA was not tested at all" in result.stdout) == (cuda_obstacle() is not None)


# --- The build -------------------------------------------------------------------------------------------------------


@pytest.fixture
def cuda_build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_build_under_test", ROOT / "scripts" / "cuda_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        (None, (80, 90, 100, 120)),
        ("", (80, 90, 100, 120)),
        ("80", (80,)),
        ("9.0 8.0", (80, 90)),
        ("120,80;90;80", (80, 90, 120)),
    ],
)
def test_architectures(
    cuda_build: ModuleType, text: str | None, archs: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FASTATTN_CUDA_ARCHS", raising=False)
    if text is not None:
        monkeypatch.setenv("FASTATTN_CUDA_ARCHS", text)
    assert cuda_build.architectures() == archs
    flags = " ".join(cuda_build.nvcc_flags((13, 0), archs))
    assert re.findall(r"arch=compute_(\d+),code=sm_(\d+)", flags) == [("80", str(arch)) for arch in archs]
    assert flags.count("code=compute_80") == 1
    assert "fast_math" not in flags


@pytest.mark.parametrize(
    ("text", "flags"),
    [(None, []), ("", []), ("g++-12", ["-ccbin", "g++-12"]), ("ccache /usr/bin/g++ -m64", ["-ccbin", "/usr/bin/g++"])],
)
def test_host_compiler(
    cuda_build: ModuleType, text: str | None, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    if text is not None:
        monkeypatch.setenv("CXX", text)
    assert cuda_build.host_compiler_flags() == flags


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("90a", "'90a' is no architecture"),
        ("sm_90", "'sm_90' is no arch"),
        ("75;80", "the kernels need sm_80 or later"),
    ],
)
def test_architectures_that_will_not_do(
    cuda_build: ModuleType, text: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTATTN_CUDA_ARCHS", text)
    with pytest.raises(SystemExit, match=re.escape(said)) as raised:
        cuda_build.architectures()
    assert str(raised.value).startswith(f"fastattn: FASTATTN_CUDA_ARCHS is '{text}'")


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


OLD_NVCC = """case "$1" in
--version) echo 'Cuda compilation tools, release 12.4, V12.4.99';;
*) echo '#$ LIBRARIES=  "-L/a b" "-L/c"' >&2;;
esac"""


@pytest.mark.parametrize(
    ("nvcc", "said"),
    [
        (None, "nvcc was not found on PATH, in CUDA_HOME, in /usr/local/cuda or among pip's packages"),
        (OLD_NVCC, "nvcc is of CUDA 12.4; at least 12.8 is needed"),
        ("exit 1", "nvcc does not run"),
        ("echo hello", "nvcc is not NVIDIA's compiler"),
    ],
    ids=["none", "old", "fails", "foreign"],
)
def test_nvcc_that_will_not_do(
    cuda_build: ModuleType, nvcc: str | None, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if nvcc is None:
        monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    else:
        script(tmp_path / "nvcc", nvcc)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(cuda_build.Missing, match=re.escape(said)):
        cuda_build.find_toolkit()


def test_where_nvcc_is_looked_for(cuda_build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    good = OLD_NVCC.replace("12.4", "13.1")
    for name in ("path", "home", "home/bin"):
        (tmp_path / name).mkdir()
    on_path, in_home = script(tmp_path / "path" / "nvcc", good), script(tmp_path / "home" / "bin" / "nvcc", good)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", f"{on_path.parent}:/bin:/usr/bin")
    assert cuda_build.find_toolkit() == cuda_build.Toolkit(str(on_path), (13, 1), ("-L/a b", "-L/c"))
    on_path.unlink()
    if shutil.which("nvcc") is None:
        assert cuda_build.find_toolkit().nvcc == str(in_home)


def test_choices_of_setup(tmp_path: Path) -> None:
    """Every choice that ends in an error does so in one line, before anything is compiled."""
    script(tmp_path / "nvcc", OLD_NVCC)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def setup(**variables: str) -> tuple[int, str]:
        command = [sys.executable, "setup.py", "--version"]
        result = subprocess.run(
            command, cwd=ROOT, env=environment | variables, capture_output=True, text=True, check=False
        )
        return result.returncode, (result.stdout if result.returncode == 0 else result.stderr).splitlines()[-1]

    status, said = setup(FASTATTN_CUDA="0")
    if said.startswith("ModuleNotFoundError"):
        pytest.skip(f"nothing can be built here: {said}")
    assert (status, said) == (0, fastattn.__version__)
    assert setup(FASTATTN_CUDA="2") == (1, "fastattn: FASTATTN_CUDA is '2'; it must be 0, 1 or auto.")
    status, said = setup(FASTATTN_CUDA="1")
    assert status == 1
    assert said == f"fastattn: FASTATTN_CUDA=1, but {tmp_path}/nvcc is of CUDA 12.4; at least 12.8 is needed."
    assert setup(FASTATTN_CUDA="auto") == (0, fastattn.__version__)


@pytest.mark.slow
def test_only_what_changed_is_compiled_again(
    cuda_build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    try:
        toolkit = cuda_build.find_toolkit()
    except cuda_build.Missing as missing:
        pytest.skip(str(missing))
    monkeypatch.setattr(cuda_build, "BUILD", tmp_path / "build")
    monkeypatch.setattr(cuda_build, "LOG", tmp_path / "build" / "ptxas.log")
    monkeypatch.setenv("FASTATTN_CUDA_ARCHS", "80")
    header = tmp_path / "number.h"
    header.write_text("#pragma once\nconstexpr int kNumber = 3;\n", encoding="utf-8")
    (tmp_path / "a.cu").write_text(
        '#include "number.h"\n__global__ void store_a(int* x) { *x = kNumber; }\n', encoding="utf-8"
    )
    (tmp_path / "b.cu").write_text("__global__ void store_b(int* x) { *x = 7; }\n", encoding="utf-8")
    (tmp_path / "c.cpp").write_text("int c() { return 1; }\n", encoding="utf-8")
    output = tmp_path / "out" / "library.so"

    def build() -> set[str]:
        sources = {name: str(tmp_path / name) for name in ("a.cu", "b.cu", "c.cpp")}
        cuda_build.build(
            output, toolkit, [sources["a.cu"], sources["b.cu"]], [sources["c.cpp"]],
            binding_flags=["-fPIC"], link_flags=[], optimise=["-O3"], jobs="1",
        )  # fmt: skip
        return set(re.findall(r"^\[\d+/\d+\] \w+ .*?([\w.]+?)(?:\.o)?$", capfd.readouterr().out, re.MULTILINE))

    assert build() == {"a.cu", "b.cu", "c.cpp", "library.so"}
    assert output.exists()
    log = cuda_build.LOG.read_text(encoding="utf-8")
    for kernel in ("store_a", "store_b"):
        assert re.search(rf"Compiling entry function '\w*{kernel}\w*' for 'sm_80'", log)
    assert build() == set()
    header.write_text("#pragma once\nconstexpr int kNumber = 4;\n", encoding="utf-8")
    assert build() == {"a.cu", "library.so"}
    assert cuda_build.LOG.read_text(encoding="utf-8").count("Compiling entry function") == 2
    # A warning is an error, and is shown.
    (tmp_path / "b.cu").write_text("__global__ void store_b(int* x) { int unused; *x = 7; }\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="the CUDA kernels did not compile"):
        build()
    assert "unused" in capfd.readouterr().out
