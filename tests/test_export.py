"""torch.export of everything public that computes: symbolic sizes, files, decompositions, what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import fastattn

from .public_calls import CALLS, OTHER_SIZES, SIZES

pytestmark = pytest.mark.usefixtures("fresh_compiler", "one_thread")
SAVED = ("attention", "kv_cache", "hard", "summary")  # a tuple of results, tensors that are written, named tuples
IN_ANOTHER_PROCESS = """
import pathlib, sys, torch, fastattn
for path in pathlib.Path(sys.argv[1]).glob("*.pt2"):
    inputs, wanted = torch.load(path.with_suffix(".pt"), weights_only=False)
    found = torch.export.load(path).module()(*inputs)
    assert type(found) is type(wanted), path
    torch.testing.assert_close(found, wanted, msg=lambda m: f"{path}: {m}")
    print(path.stem)
"""


class Program(torch.nn.Module):
    """A public call as torch.export takes it."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def exported(name: str, **options: Any) -> Any:
    inputs = tuple(x.detach() for x in CALLS[name].arguments())
    # Sizes that follow from B, Lq and Lk are symbols, as far as the call lets them be.
    sizes = tuple(dict.fromkeys(range(x.dim()), torch.export.Dim.AUTO) for x in inputs)
    return torch.export.export(Program(CALLS[name].function), inputs, dynamic_shapes=(sizes,), **options)


def other_inputs(name: str) -> tuple[Tensor, ...]:
    return tuple(x.detach() for x in CALLS[name].arguments(OTHER_SIZES[0]))


@pytest.mark.parametrize("name", CALLS)
def test_export(name: str) -> None:
    """Other sizes than those that were exported, before and after decompositions."""
    program = exported(name)
    for p in (program, program.run_decompositions()):
        ours, theirs = other_inputs(name), other_inputs(name)
        torch.testing.assert_close(p.module()(*ours), CALLS[name].function(*theirs))
        torch.testing.assert_close(ours, theirs)  # a cache was written
    assert {*SIZES}.isdisjoint(OTHER_SIZES[0])


@pytest.mark.parametrize("name", ["attention", "varlen", "kv_cache", "hard", "summary"])
def test_strict_export(name: str) -> None:
    inputs = tuple(x.detach() for x in CALLS[name].arguments())
    program = torch.export.export(Program(CALLS[name].function), inputs, strict=True)
    copies = tuple(x.clone() for x in inputs)
    torch.testing.assert_close(program.module()(*inputs), CALLS[name].function(*copies))


def test_programs_run_in_another_process(tmp_path: Path) -> None:
    """All that it needs is `import fastattn`, before torch.export.load."""
    for name in SAVED:
        torch.export.save(exported(name), tmp_path / f"{name}.pt2")
        inputs = other_inputs(name)
        torch.save((inputs, CALLS[name].function(*(x.clone() for x in inputs))), tmp_path / f"{name}.pt")
    command = [sys.executable, "-W", "ignore", "-c", IN_ANOTHER_PROCESS, str(tmp_path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert {*done.stdout.split()} == {*SAVED}


def test_jit_script_is_refused() -> None:
    for module in (fastattn.nn.AdditiveAttention(4, 4, 4), fastattn.nn.LuongAttention("dot")):
        with pytest.raises(TypeError, match=r"fastattn: \w+ cannot be compiled by torch.jit.script; use torch.compile"):
            torch.jit.script(module)


@pytest.mark.parametrize("options", [{"max_length": 8192}, {"page_size": 16, "num_pages": 2048}])
def test_a_large_cache_of_fake_tensors_takes_no_memory(options: dict[str, int]) -> None:
    with FakeTensorMode():
        cache = fastattn.KVCache(2, 8, 128, **options)
        o = cache.attend(torch.randn(2, 8, 1, 128), torch.randn(2, 8, 1, 128), torch.randn(2, 8, 1, 128))
        assert type(cache.k_cache) is type(cache.v_cache) is type(o) is FakeTensor
    assert cache.nbytes > 8 << 20
    assert cache.lengths == [1, 1]
