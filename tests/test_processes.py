"""Copies, files, checkpoints and other processes: pickle, copy, torch.save, multiprocessing, DataLoader workers."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastattn

from .public_calls import CALLS, E, made, numbers

Module = torch.nn.Module
MODULES: dict[str, Callable[[], Module]] = {
    "multihead": lambda: fastattn.nn.MultiheadAttention(E, 4, dropout=0.3, batch_first=True),
    "additive": lambda: fastattn.nn.AdditiveAttention(E, E, 16, num_heads=2, dropout=0.3),
    "luong-dot": lambda: fastattn.nn.LuongAttention("dot"),
    "luong-general": lambda: fastattn.nn.LuongAttention("general", E),
    "luong-concat": lambda: fastattn.nn.LuongAttention("concat", E),
    "hard": lambda: fastattn.nn.HardAttention(E, E, 16),
    "replaced": lambda: fastattn.replace_modules(
        torch.nn.TransformerEncoderLayer(E, 4, 32, batch_first=True, dropout=0.0)
    ),
}


def saved_and_loaded(x: Any, **options: Any) -> Any:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, **options)


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "torch.save": lambda x: saved_and_loaded(x, weights_only=False),
}
each_copy = pytest.mark.parametrize("kind", COPIES)


def called(module: Module, x: Tensor) -> Any:
    torch.manual_seed(5)
    if isinstance(module, torch.nn.TransformerEncoderLayer):
        return module(x)
    return module(x, x, x) if isinstance(module, fastattn.nn.MultiheadAttention) else module(x, x)


@each_copy
@pytest.mark.parametrize("name", MODULES)
def test_modules_are_copied(name: str, kind: str) -> None:
    """After a forward and a backward pass, in training mode: the copy draws and computes the same."""
    module = made(MODULES[name]).train()
    x = torch.randn(2, 5, E, requires_grad=True)
    wanted = called(module, x)
    numbers(wanted).backward()
    other = COPIES[kind](module)
    assert type(other) is type(module)
    torch.testing.assert_close(called(other, x), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("name", MODULES)
def test_state_dicts_are_plain_weights(name: str) -> None:
    module, x = made(MODULES[name]), torch.randn(2, 5, E)
    other = MODULES[name]().eval()
    other.load_state_dict(saved_and_loaded(module.state_dict(), weights_only=True))
    torch.testing.assert_close(called(other, x), called(module, x), rtol=0, atol=0)


@each_copy
@pytest.mark.parametrize("name", ["hard", "summary"])
def test_results_are_copied(name: str, kind: str) -> None:
    call = CALLS[name]
    with torch.no_grad():
        wanted = call.function(*call.arguments())
    found = COPIES[kind](wanted)
    assert type(found) is type(wanted)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("options", [{}, {"page_size": 4}, {"quantize": "int8"}, {"page_size": 16, "num_pages": 4096}])
def test_caches_are_copied(options: dict[str, Any], kind: str) -> None:
    """With all of their books: the copy goes on where the cache was, without touching it, and is no larger."""
    cache = fastattn.KVCache(2, 2, 16, **options)

    def step(cache: fastattn.KVCache, new: int) -> Tensor:
        torch.manual_seed(new)
        return cache.attend(torch.randn(2, 4, new, 16), *torch.randn(2, 2, 2, new, 16), causal=True)

    step(cache, 7)
    cache.reorder([1, 1])  # shared pages
    other = COPIES[kind](cache)
    assert torch.equal(step(other, 3), step(cache, 3))
    assert (other.lengths, other.used_pages, other.nbytes) == (cache.lengths, cache.used_pages, cache.nbytes)
    storages = [{x.untyped_storage().data_ptr() for x in (c.k_cache, c.v_cache)} for c in (cache, other)]
    assert len(storages[0]) == len(storages[1])
    assert storages[0].isdisjoint(storages[1])
    assert len(pickle.dumps(cache)) < 1.1 * cache.nbytes + 10_000


# --- Checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_checkpoints_that_end_in_attention(name: str, use_reentrant: bool) -> None:
    """What is computed again is computed from within attention's backward pass, where autograd must be at work."""
    module = made(MODULES[name]).train()
    gradients = []
    for run in (lambda x: called(module, x), lambda x: checkpoint(called, module, x, use_reentrant=use_reentrant)):
        module.zero_grad()
        x = torch.ones(2, 5, E).cumsum(1).sin().requires_grad_()
        numbers(run(x)).backward()
        gradients.append([y.grad for y in (x, *module.parameters())])
    torch.testing.assert_close(*gradients)


def test_a_checkpoint_of_the_normaliser_alone() -> None:
    q, k, v = (x.detach().requires_grad_() for x in CALLS["attention"].arguments())
    lse = checkpoint(lambda q: CALLS["attention"].function(q, k, v)[1], q * 1, use_reentrant=False)
    wanted = torch.autograd.grad(numbers(CALLS["attention"].function(q, k, v)[1]), q)
    torch.testing.assert_close(torch.autograd.grad(numbers(lse), q), wanted)


# --- Processes --------------------------------------------------------------------------------------------------------


def large() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(1, 8, 256, 32) for _ in range(3))


def serve(inputs: tuple[Tensor, ...], module: Module, shared: Tensor, answers: Any) -> None:
    torch.set_num_threads(1)
    shared.copy_(fastattn.attention(*inputs))
    answers.put((numbers(called(module, torch.ones(2, 5, E))).item(), fastattn.__name__))


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.usefixtures("threads")
def test_processes(method: str) -> None:
    """A module and inputs go there, the result comes back in shared memory; the parent had used all of its threads."""
    torch.set_num_threads(2)
    inputs, module = large(), made(MODULES["additive"])
    wanted = fastattn.attention(*inputs)
    shared = torch.empty_like(wanted).share_memory_()
    context: Any = mp.get_context(method)
    answers = context.SimpleQueue()
    process = context.Process(target=serve, args=(inputs, module, shared, answers))
    process.start()
    process.join(120)
    alive = process.is_alive()
    if alive:
        process.kill()
    assert (alive, process.exitcode) == (False, 0)
    torch.testing.assert_close(shared, wanted)
    assert answers.get() == (pytest.approx(numbers(called(module, torch.ones(2, 5, E))).item()), "fastattn")


class Attended(torch.utils.data.Dataset[Tensor]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Tensor:
        return fastattn.attention(*large())[0, i]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_of_a_data_loader_run_attention() -> None:
    """They are forked, and torch gives each of them one thread."""
    wanted = fastattn.attention(*large())[0, :4]
    loader = torch.utils.data.DataLoader(Attended(), batch_size=2, num_workers=2, timeout=120)
    torch.testing.assert_close(torch.cat(list(loader)), wanted)
