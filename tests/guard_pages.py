"""Runs the kernels on tensors that touch memory which cannot be read: a read outside of a tensor ends the process.

    python -m tests.guard_pages [isa ... | emulated]

"emulated" means the CUDA kernels on the host emulator. Each input is copied so that its last byte lies right before a
protected page, then so that its first byte lies right after one. tests/test_poison.py and tests/test_emulator.py start
this as a process of its own, and find the case on its last line if it dies.
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import sys

import torch
from torch import Tensor

import fastattn

from .cases import ADDITIVE_CASES, CASES, Case, Inputs, make_inputs
from .compare import compute

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_PROT_NONE = 0


class Guarded:
    """Copies tensors to the edge of protected pages, and gives the memory back when the `with` ends."""

    def __init__(self, at_end: bool) -> None:
        self.at_end = at_end
        self.regions: list[tuple[int, int]] = []

    def __enter__(self) -> Guarded:
        return self

    def __exit__(self, *_: object) -> None:
        for address, length in self.regions:
            _libc.munmap(address, length)

    def copy(self, x: Tensor) -> Tensor:
        """x with its strides, its storage ending (or beginning) where readable memory does."""
        if not x.numel():
            return x
        page = mmap.PAGESIZE
        extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        size_bytes = extent * x.dtype.itemsize
        inner = -(-size_bytes // page) * page
        prot, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        address = _libc.mmap(None, inner + 2 * page, prot, flags, -1, 0)
        if address in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), "mmap")
        self.regions.append((address, inner + 2 * page))
        for guard in (address, address + page + inner):
            if _libc.mprotect(guard, page, _PROT_NONE) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")
        start = address + page + (inner - size_bytes if self.at_end else 0)
        memory = (ctypes.c_char * size_bytes).from_address(start)
        flat = torch.frombuffer(memory, dtype=x.dtype)
        flat.copy_(x.as_strided((extent,), (1,)))
        return flat.as_strided(x.shape, x.stride())

    def inputs(self, inputs: Inputs) -> Inputs:
        tensors = [self.copy(x) for x in (inputs.q, inputs.k, inputs.v, inputs.d_o, inputs.d_lse)]
        return Inputs(
            *tensors, kwargs={name: self.copy(x) if isinstance(x, Tensor) else x for name, x in inputs.kwargs.items()}
        )


def chosen() -> list[Case]:
    """One case in five, which leaves some of each kind."""
    return [case for n, case in enumerate([*CASES, *ADDITIVE_CASES]) if not case.heavy and n % 5 == 0]


def compute_everything(inputs: Inputs) -> None:
    """Attention, and of the same inputs what hard_attention and attention_summary can take."""
    compute(inputs)
    options = {name: x for name, x in inputs.kwargs.items() if name not in ("w", "dropout_p")}
    fastattn.attention_summary(inputs.q, inputs.k, top_k=5, **options)
    for name in ("bias", "softcap", "alibi_slopes", "sinks"):
        options.pop(name, None)
    result = fastattn.hard_attention(inputs.q, inputs.k, inputs.v, **options)
    upstream = [inputs.d_o, inputs.d_lse]
    torch.autograd.grad([result.output, result.log_prob], [inputs.q, inputs.k, inputs.v], upstream)


def main(isas: list[str]) -> None:
    faulthandler.enable()
    count = 0
    for case in chosen():
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            original = make_inputs(case, dtype)
            for isa in isas if dtype != torch.float64 else isas[:1]:
                torch.ops.fastattn._set_isa(isa)
                for at_end in (True, False):
                    print(f"{case.id} {dtype} {isa} {'end' if at_end else 'start'}", flush=True)
                    with Guarded(at_end) as guarded:
                        compute_everything(guarded.inputs(original).require_grad())
                    count += 1
    print(f"done: {count}")


def main_emulated() -> None:
    from .additive import ADDITIVE_CASES, make_additive_inputs
    from .emulated import compute_emulated, is_served
    from .emulated_additive import compute_emulated_additive

    faulthandler.enable()
    count = 0
    for case in filter(is_served, (case for case in chosen() if case.w is None)):
        for dtype in (torch.float32, torch.bfloat16):
            original = make_inputs(case, dtype)
            for at_end in (True, False):
                print(f"{case.id} {dtype} {'end' if at_end else 'start'}", flush=True)
                with Guarded(at_end) as guarded:
                    compute_emulated(guarded.inputs(original))
                count += 1
    for additive in ADDITIVE_CASES[::2]:
        for dtype in (torch.float32, torch.bfloat16):
            inputs = make_additive_inputs(additive, dtype)
            for at_end in (True, False):
                print(f"{additive.id} {dtype} {'end' if at_end else 'start'}", flush=True)
                with Guarded(at_end) as guarded:
                    compute_emulated_additive(inputs.moved(guarded.copy))
                count += 1
    print(f"done: {count}")


if __name__ == "__main__":
    if sys.argv[1:] == ["emulated"]:
        main_emulated()
    else:
        main(sys.argv[1:] or torch.ops.fastattn._supported_isas().split(","))
