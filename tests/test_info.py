"""fastattn.info() and `python -m fastattn`."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import fastattn
from fastattn import __main__, _info


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
    info = fastattn.Info(**(vars(fastattn.info()) | {"isas": ("baseline", "avx2"), "isa": "avx2"}))
    assert "baseline, avx2, avx512 (not here), avx512_bf16 (not here)" in str(info)
    assert "ISA found      avx2" in str(info)


def test_cuda_says_what_is_missing() -> None:
    text = fastattn.info().cuda
    if _info._CUDA_LIBRARY.exists():
        assert text.startswith("built")
    else:
        assert text.startswith("not built: ")
        assert _info._CUDA_LIBRARY.name in text
        assert ("torch was built without CUDA" in text) == (torch.version.cuda is None)


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
