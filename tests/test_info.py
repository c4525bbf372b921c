"""fastattn.info() and `python -m fastattn`."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import fastattn
from fastattn import __main__, _cuda, _info


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastattn", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_info_of_this_process() -> None:
    info = fastattn.info()
    assert info.version == fastattn.__version__
    assert info.torch_version == torch.__version__
    assert info.isa in info.isas
    assert info.isas[0] == "baseline"
    assert info.threads == torch.get_num_threads()
    assert set(info.build) == {"compiler", "flags", "torch headers", "torch ABI"}
    assert "-O3" in info.build["flags"]
    assert not info.sdpa_replaced
    with fastattn.replaced_sdpa():
        assert fastattn.info().sdpa_replaced


def test_levels_follow_the_one_in_use() -> None:
    before = fastattn.info()
    torch.ops.fastattn._set_isa("baseline")
    try:
        info = fastattn.info()
        assert info.isa == "baseline"
        assert info.isas == before.isas
        assert "ISA in use     baseline" in str(info)
    finally:
        torch.ops.fastattn._set_isa(before.isa)


def test_levels_that_are_missing_are_marked() -> None:
    levels = {"isa_levels": ("baseline", "avx2", "avx512", "avx512_bf16"), "isas": ("baseline", "avx2"), "isa": "avx2"}
    info = fastattn.Info(**(vars(fastattn.info()) | levels))
    assert "baseline, avx2, avx512 (not here), avx512_bf16 (not here)" in str(info)
    assert "ISA found      avx2" in str(info)


def test_cuda_here() -> None:
    """Of this process, whatever it has."""
    info = fastattn.info()
    assert info.cuda.startswith("not built: ") == (not _cuda.LIBRARY.exists())
    assert ("torch was built without CUDA" in info.cuda) == (torch.version.cuda is None)
    assert bool(info.cuda_build) == (_cuda.missing is None)
    assert f"CUDA           {info.cuda}" in str(info)
    for name, text in info.cuda_build.items():
        assert f"CUDA {name}".ljust(13) + "  " + text in str(info)


@dataclass(frozen=True)
class Machine:
    """What could be there or not, and what info() then says."""

    id: str
    said: str
    library: str = "good"  # good | none | broken
    torch_cuda: str | None = "13.0"
    driver: bool = True
    gpus: tuple[tuple[int, int], ...] = ((9, 0),)  # compute capabilities


NOT_BUILT = "not built: fastattn was built without its CUDA kernels (_C_cuda.so)"
MACHINES = [
    Machine("all", "cuda:0 NVIDIA Test (sm_90)"),
    Machine("nothing", f"{NOT_BUILT}; torch was built without CUDA", library="none", torch_cuda=None),
    Machine("no-library", NOT_BUILT, library="none"),
    Machine("no-library-no-gpu", f"{NOT_BUILT}; torch finds no CUDA device", library="none", gpus=()),
    Machine("torch-without-cuda", "built, not usable: torch was built without CUDA", torch_cuda=None),
    Machine("broken", "built, not usable: broken.so cannot be loaded: ", library="broken"),
    Machine("no-driver", "built, not usable: there is no NVIDIA driver (libcuda.so.1)", driver=False, gpus=()),
    Machine("no-gpu", "built, not usable: torch finds no CUDA device", gpus=()),
    Machine(
        "old-gpu",
        "cuda:0 NVIDIA Test (sm_75), not served: compute capability 7.5 is below 8.0; cuda:1 NVIDIA Test (sm_80)",
        gpus=((7, 5), (8, 0)),
    ),
]


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.id)
def test_cuda_says_what_is_missing(machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = tmp_path / {"good": "_C_cuda.so", "none": "_C_cuda.so", "broken": "broken.so"}[machine.library]
    if machine.library != "none":
        library.write_bytes(b"not a library")
    if machine.library == "good":
        monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    loaded: list[str] = []

    def load(name: str) -> None:
        loaded.append(name)
        if not machine.driver:
            raise OSError

    monkeypatch.setattr(ctypes, "CDLL", load if machine.library != "broken" else ctypes.CDLL)
    monkeypatch.setattr(_cuda, "LIBRARY", library)
    monkeypatch.setattr(_cuda, "missing", None)
    monkeypatch.setattr(_cuda, "_obstacles", {})
    monkeypatch.setattr(_cuda, "driver_version", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", machine.torch_cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(machine.gpus))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(machine.gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: machine.gpus[index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA Test")
    _cuda.load()
    said = _info._cuda_state()
    assert said == machine.said or (machine.library == "broken" and said.startswith(machine.said))
    assert "\n" not in said
    for index, capability in enumerate(machine.gpus):
        served = "not served" not in said and not said.startswith(("not built", "built, not usable"))
        assert (_cuda.obstacle(index) is None) == (served or (machine.id == "old-gpu" and capability >= (8, 0)))


@pytest.mark.parametrize(
    ("torch_cuda", "reason"), [("13.0", "_C_cuda.so cannot be loaded: "), (None, "torch was built")]
)
def test_a_cuda_library_of_no_use_does_not_break_the_import(
    torch_cuda: str | None, reason: str, tmp_path: Path
) -> None:
    package = tmp_path / "fastattn"
    shutil.copytree(Path(fastattn.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "_C_cuda.so"))
    (package / "_C_cuda.so").write_bytes(b"\x7fELF, but no more")
    code = (
        f"import torch; torch.version.cuda = {torch_cuda!r}; import fastattn; print(fastattn._cuda.missing);"
        "print(fastattn.__file__); print(fastattn.attention(*[torch.ones(1, 1, 2, 4)] * 3).sum())"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    missing, file, total = result.stdout.splitlines()
    assert missing.startswith(reason)
    assert Path(file).parent == package
    assert total == "tensor(8.)"


@pytest.mark.skipif(not hasattr(torch.nn.attention, "current_flash_attention_impl"), reason="torch has no registry")
def test_provider_state() -> None:
    assert fastattn.info().provider == "registered, not active"
    torch.nn.attention.activate_flash_attention_impl("fastattn")
    try:
        assert fastattn.info().provider == "active"
    finally:
        torch.nn.attention.restore_flash_attention_impl()


def test_command_line() -> None:
    result = run("info", FASTATTN_CPU_CAPABILITY="baseline")
    assert result.returncode == 0, result.stderr
    lines = dict(line.split(None, 1) for line in result.stdout.splitlines() if not line.startswith(("ISA", "torch ")))
    assert lines["fastattn"] == fastattn.__version__
    assert lines["SDPA"] == "not replaced"
    assert "ISA in use     baseline, forced by FASTATTN_CPU_CAPABILITY=baseline" in result.stdout
    assert all(len(line) < 250 for line in result.stdout.splitlines())


def test_command_line_errors(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["nonsense"]):
        with pytest.raises(SystemExit) as caught:
            __main__.main(arguments)
        assert caught.value.code == 2
        assert "usage: python -m fastattn" in capsys.readouterr().err
