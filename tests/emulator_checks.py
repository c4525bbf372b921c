"""What the tests ask of all emulated kernels: the same bits whatever comes first, and no synchronisation without a use.

A call is what takes the emulator's options and returns quantities and runs, such as partial(compute_emulated, inputs).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from .cases import Inputs
from .compare import Quantities, differences
from .emulated import Runs

Call = Callable[..., tuple[Quantities, Runs]]
Site = tuple[str, int, str]  # of a primitive: file, line, kind

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
# float16's kernels are bfloat16's but for one instruction.
each_width = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=SHORT.get)

# Fibers in other orders, copies that land at once or as late as they may, one thread or two.
ORDERS: tuple[dict[str, Any], ...] = (
    {"seed": 1},
    {"seed": 2, "copies": "at_wait"},
    {"seed": 3, "copies": "at_issue", "random_order": False},
    {"seed": 4, "threads": 1},
)
REMOVABLE = ("sync_block", "sync_warp", "cp_async_wait")


def order_dependence(call: Call) -> list[str]:
    """What is not the same bit for bit in every order of events."""
    wanted, _ = call()
    changed = {str(order): differences(wanted, call(**order)[0]) for order in ORDERS}
    return [f"{', '.join(names)} with {order}" for order, names in changed.items() if names]


def outcome(call: Call, wanted: Quantities, **emulator: Any) -> str:
    """What comes of a call: "" if it is right to the bit, else what went wrong."""
    try:
        got, _ = call(**emulator)
    except RuntimeError as error:
        return str(error)
    wrong = differences(wanted, got)
    return f"wrong: {', '.join(wrong)}" if wrong else ""


def leave_out_synchronisations(calls: Iterable[Call]) -> dict[Site, str]:
    """Every barrier and every wait for copies that the calls come by, and what comes of leaving out that one alone in
    the first call that misses it; "" where none does.
    """
    missed: dict[Site, str] = {}
    for call in calls:
        wanted, ran = call()
        for run in ran.values():
            for file, line, kind, count, _ in run["sites"]:
                site = (file, line, kind)
                if kind in REMOVABLE and count and not missed.get(site):
                    missed[site] = outcome(call, wanted, skip=site)
    return missed


def unnoticed(missed: dict[Site, str]) -> list[Site]:
    """What could be left out of the kernels, and nobody would know."""
    return sorted(site for site, what in missed.items() if not what)


def bank_conflicts(ran: Runs, but_for: Iterable[tuple[str, str]] = ()) -> dict[Site, int]:
    """Cycles that accesses to shared memory wait for banks, where they do; without files' accesses of some kind."""
    sites = [(Path(file).name, line, kind, n) for run in ran.values() for file, line, kind, _, n in run["sites"] if n]
    return {(file, line, kind): n for file, line, kind, n in sites if (file, kind) not in but_for}


def poisoned(inputs: Inputs) -> Inputs:
    """NaN in the keys and values that kv_lengths excludes."""
    k, v = inputs.k.clone(), inputs.v.clone()
    for b, length in enumerate(inputs.kwargs["kv_lengths"]):
        k[b, :, length:] = math.nan
        v[b, :, length:] = math.nan
    return replace(inputs, k=k, v=v)
