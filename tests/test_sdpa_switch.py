"""What replacing PyTorch's scaled_dot_product_attention does to its callers."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn

from .sdpa import randn, torch_sdpa

pytestmark = pytest.mark.usefixtures("sdpa_left_alone", "fresh_compiler")


def is_replaced() -> bool:
    return F.scaled_dot_product_attention is not torch_sdpa


def test_replace_and_restore() -> None:
    x = randn(2, 3, 5, 8)
    expected = torch_sdpa(x, x, x)
    fastattn.replace_sdpa()
    try:
        assert is_replaced()
        fastattn.replace_sdpa()
        torch.testing.assert_close(F.scaled_dot_product_attention(x, x, x), expected)
        assert fastattn.sdpa_calls().served == 1
    finally:
        fastattn.restore_sdpa()
    assert not is_replaced()
    fastattn.restore_sdpa()
    assert F.scaled_dot_product_attention is torch_sdpa
    F.scaled_dot_product_attention(x, x, x)
    assert fastattn.sdpa_calls(reset=True).served == 1
    assert fastattn.sdpa_calls() == fastattn.SdpaCalls(0, {})


def test_blocks_nest_and_survive_exceptions() -> None:
    with fastattn.replaced_sdpa():
        with fastattn.replaced_sdpa():
            assert is_replaced()
        assert is_replaced()
    assert not is_replaced()
    with pytest.raises(KeyError), fastattn.replaced_sdpa():
        raise KeyError
    assert not is_replaced()


def test_blocks_within_replace_and_restore() -> None:
    fastattn.replace_sdpa()
    with fastattn.replaced_sdpa():
        fastattn.restore_sdpa()
        assert is_replaced(), "restore_sdpa must not end somebody's block"
    assert not is_replaced()
    with fastattn.replaced_sdpa():
        fastattn.replace_sdpa()
    assert is_replaced(), "the end of a block must not undo replace_sdpa"
    fastattn.restore_sdpa()
    assert not is_replaced()


def test_what_is_restored_is_what_was_there() -> None:
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        return torch_sdpa(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", wrapper)
        with fastattn.replaced_sdpa():
            assert F.scaled_dot_product_attention is not wrapper
        assert F.scaled_dot_product_attention is wrapper


def test_a_wrapper_put_around_the_replacement_stays_and_works() -> None:
    x, y = randn(1, 2, 5, 8), torch.ones(1, 2, 5, 8, device="meta")
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        fastattn.replace_sdpa()
        inner = F.scaled_dot_product_attention

        def wrapper(*args: Any, **kwargs: Any) -> Tensor:
            calls.append(1)
            return inner(*args, **kwargs)

        patch.setattr(F, "scaled_dot_product_attention", wrapper)
        fastattn.restore_sdpa()
        assert F.scaled_dot_product_attention is wrapper
        F.scaled_dot_product_attention(x, x, x)
        assert calls == [1]
        assert fastattn.sdpa_calls().served == 0
        with fastattn.replaced_sdpa():
            F.scaled_dot_product_attention(x, x, x)
            with pytest.warns(UserWarning, match="neither all on the CPU"):
                F.scaled_dot_product_attention(y, y, y)
        assert calls == [1] * 3
        assert fastattn.sdpa_calls() == fastattn.SdpaCalls(
            1, {"tensors that are neither all on the CPU nor all on CUDA": 1}
        )
    F.scaled_dot_product_attention = torch_sdpa  # the wrapper's owner is gone
    fastattn.sdpa_calls(reset=True)
    test_replace_and_restore()


def test_a_reference_taken_while_replaced_obeys_the_switch() -> None:
    x = randn(1, 2, 5, 8)
    with fastattn.replaced_sdpa():
        taken = F.scaled_dot_product_attention
    torch.testing.assert_close(taken(x, x, x), torch_sdpa(x, x, x))
    assert fastattn.sdpa_calls().served == 0
    with fastattn.replaced_sdpa():
        taken(x, x, x)
    assert fastattn.sdpa_calls().served == 1


def test_threads_count_exactly_and_leave_nothing_behind() -> None:
    x = randn(1, 1, 2, 4)
    start = threading.Barrier(4)
    failures = []

    def work() -> None:
        start.wait()
        for _ in range(100):
            with fastattn.replaced_sdpa():
                if not is_replaced():
                    failures.append("not replaced within a block")
                F.scaled_dot_product_attention(x, x, x)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert not is_replaced()
    assert fastattn.sdpa_calls().served == 400


class TestHandedBack:
    """What fastattn cannot serve: the result is PyTorch's, the reason is counted, and its first call warns."""

    @pytest.fixture(autouse=True)
    def _replaced(self) -> Iterator[None]:
        with fastattn.replaced_sdpa():
            yield

    def check(self, reason: str, call: Any) -> Any:
        with pytest.warns(UserWarning, match=f"handed back to PyTorch: .*{reason}"):
            result = call()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*handed back")
            call()
        calls = fastattn.sdpa_calls()
        assert calls.served == 0
        assert list(calls.handed_back.values()) == [2]
        (counted,) = calls.handed_back
        assert reason in counted
        assert f"{counted}: 2" in str(calls)
        return result

    def test_meta(self) -> None:
        x = torch.ones(2, 3, 5, 8, device="meta")
        assert self.check("neither all on the CPU", lambda: F.scaled_dot_product_attention(x, x, x)).is_meta

    def test_dtype(self) -> None:
        x = torch.randn(2, 3, 5, 8, dtype=torch.complex64)

        def call() -> None:
            with pytest.raises(NotImplementedError):
                F.scaled_dot_product_attention(x, x, x)

        self.check("dtype torch.complex64", call)

    def test_sparse(self) -> None:
        x, y = randn(5, 8), randn(7, 8)
        o = self.check("strided", lambda: F.scaled_dot_product_attention(x.to_sparse(), y, y))
        torch.testing.assert_close(o, torch_sdpa(x, y, y))

    @pytest.mark.filterwarnings("ignore:.*prototype stage")
    def test_nested(self) -> None:
        strided = torch.nested.nested_tensor([randn(3, 2, 4), randn(3, 5, 4)])
        o = self.check("nested", lambda: F.scaled_dot_product_attention(strided, strided, strided))
        assert o.is_nested

    def test_jagged(self) -> None:
        jagged = torch.nested.nested_tensor([randn(3, 2, 4), randn(5, 2, 4)], layout=torch.jagged).transpose(1, 2)
        o = self.check("subclass", lambda: F.scaled_dot_product_attention(jagged, jagged, jagged))
        assert o.is_nested

    def test_subclasses_with_a_function_of_their_own(self) -> None:
        """They are asked for PyTorch's function, and find it in torch.nn.functional, where they may look it up."""

        class Doubling(Tensor):
            @classmethod
            def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if func is F.scaled_dot_product_attention:
                    args = [x.as_subclass(Tensor) if isinstance(x, Tensor) else x for x in args]
                    return 2 * F.scaled_dot_product_attention(*args, **(kwargs or {}))
                return super().__torch_function__(func, types, args, kwargs)

        x = randn(1, 2, 3, 8)
        y = x.as_subclass(Doubling)
        o = self.check("subclass", lambda: F.scaled_dot_product_attention(y, y, y))
        torch.testing.assert_close(o, 2 * torch_sdpa(x, x, x))
        assert is_replaced()

    def test_refused_arguments_that_pytorch_takes(self) -> None:
        x = randn(1, 2, 5, 8)
        o = self.check("refuses", lambda: F.scaled_dot_product_attention(x, x, x, scale=math.inf))
        assert o.shape == x.shape

    def test_refused_arguments_raise_what_pytorch_raises(self) -> None:
        def call() -> None:
            with pytest.raises(RuntimeError, match="must match"):
                F.scaled_dot_product_attention(randn(2, 4, 5, 8), randn(2, 2, 5, 8), randn(2, 2, 5, 8))

        self.check("refuses", call)

    def test_too_few_dimensions(self) -> None:
        def call() -> None:
            with pytest.raises(RuntimeError, match="at least 2 dimensional"):
                F.scaled_dot_product_attention(randn(8), randn(8), randn(7))

        self.check("refuses", call)

    def test_a_read_beyond_the_value_is_not_handed_back(self) -> None:
        """PyTorch's CPU kernel does not compare the two lengths."""
        with pytest.raises(ValueError, match="value has length 6 but key has 7"):
            F.scaled_dot_product_attention(randn(1, 2, 5, 8), randn(1, 2, 7, 8), randn(1, 2, 6, 8))

    def test_fx_tracing_sees_pytorchs_function(self) -> None:
        class Module(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return F.scaled_dot_product_attention(x, x, x)

        graph = self.check("subclass", lambda: torch.fx.symbolic_trace(Module()))
        assert any(node.target is torch_sdpa for node in graph.graph.nodes)


class TestServed:
    """Callers of torch.nn.functional that must work as before, and be served."""

    @pytest.fixture(autouse=True)
    def _replaced(self) -> Iterator[None]:
        with fastattn.replaced_sdpa():
            yield
        assert fastattn.sdpa_calls().served > 0
        assert not fastattn.sdpa_calls().handed_back

    def test_signature(self) -> None:
        x = randn(2, 4, 5, 8)
        mask = torch.zeros(5, 5)
        o = F.scaled_dot_product_attention(query=x, key=x, value=x, attn_mask=mask, dropout_p=0.0, is_causal=True)
        torch.testing.assert_close(o, torch_sdpa(x, x, x, mask, 0.0, True))
        o = F.scaled_dot_product_attention(x, x[:, :2], x[:, :2], mask, 0.0, False, scale=0.2, enable_gqa=True)
        torch.testing.assert_close(o, torch_sdpa(x, x[:, :2], x[:, :2], mask, 0.0, False, scale=0.2, enable_gqa=True))
        with pytest.raises(TypeError):
            F.scaled_dot_product_attention(x, x, x, None, 0.0, False, 0.2)  # type: ignore[misc]

    @pytest.mark.parametrize("training", [True, False])
    def test_multihead_attention(self, training: bool) -> None:
        module = nn.MultiheadAttention(32, 4, batch_first=True).train(training)
        x = randn(2, 7, 32).requires_grad_()
        padding = torch.zeros(2, 7, dtype=torch.bool)
        padding[1, 5:] = True
        o, _ = module(x, x, x, key_padding_mask=padding, need_weights=False)
        assert fastattn.sdpa_calls().served == 1
        fastattn.restore_sdpa()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", torch_sdpa)
            expected, _ = module(x, x, x, key_padding_mask=padding, need_weights=False)
        torch.testing.assert_close(o, expected)
        torch.testing.assert_close(torch.autograd.grad(o.sum(), x), torch.autograd.grad(expected.sum(), x))

    def test_vmap(self) -> None:
        x = randn(6, 2, 3, 8)
        o = torch.vmap(F.scaled_dot_product_attention)(x, x, x)
        torch.testing.assert_close(o, torch_sdpa(x, x, x))

    def test_functional_gradient(self) -> None:
        x = randn(2, 2, 3, 8)
        grad = torch.func.grad(lambda y: F.scaled_dot_product_attention(y, y, y).sum())(x)
        y = x.clone().requires_grad_()
        torch.testing.assert_close(grad, torch.autograd.grad(torch_sdpa(y, y, y).sum(), y)[0])

    @pytest.mark.parametrize("rank", [2, 4])
    def test_forward_mode(self, rank: int) -> None:
        """PyTorch's own function has no such derivative of its fused CPU kernel, which (B, H, L, D) gets."""
        x, tangent = (randn(*(2, 2, 3, 8)[4 - rank :], dtype=torch.float64) for _ in range(2))
        with torch.autograd.forward_ad.dual_level():
            y = torch.autograd.forward_ad.make_dual(x, tangent)
            jvp = torch.autograd.forward_ad.unpack_dual(F.scaled_dot_product_attention(y, y, y)).tangent
        step = 1e-6
        ends = [torch_sdpa(y, y, y) for y in (x - step * tangent, x + step * tangent)]
        torch.testing.assert_close(jvp, (ends[1] - ends[0]) / (2 * step), atol=1e-8, rtol=1e-6)

    def test_compiled_transforms(self) -> None:
        def loss(x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x).sin().sum()

        x = randn(3, 2, 5, 8)
        each = torch.vmap(torch.func.grad(loss))
        torch.testing.assert_close(torch.compile(each, backend="aot_eager", fullgraph=True)(x), each(x))

    def test_parameters(self) -> None:
        x = nn.Parameter(randn(1, 2, 5, 8))
        F.scaled_dot_product_attention(x, x, x, nn.Parameter(randn(5, 5)))

    @pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
    def test_causal_bias(self, compiled: bool) -> None:
        from torch.nn.attention.bias import causal_lower_right, causal_upper_left

        x, y = randn(1, 2, 3, 8), randn(1, 2, 5, 8)
        for bias, diagonal in ((causal_lower_right(3, 5), 2), (causal_upper_left(3, 5), 0)):

            def step(x: Tensor, y: Tensor, bias: Any = bias) -> Tensor:
                return F.scaled_dot_product_attention(x, y, y, bias)

            function = torch.compile(step, backend="eager", fullgraph=True) if compiled else step
            expected = torch_sdpa(x, y, y, torch.ones(3, 5, dtype=torch.bool).tril(diagonal))
            torch.testing.assert_close(function(x, y), expected)
        assert fastattn.sdpa_calls().served == 2

    def test_default_device(self) -> None:
        """torch.set_default_device installs a mode that sees every call of torch.nn.functional."""
        x = randn(1, 2, 5, 8)
        with torch.device("cpu"):
            torch.testing.assert_close(F.scaled_dot_product_attention(x, x, x), torch_sdpa(x, x, x))
        assert fastattn.sdpa_calls().served == 1

    def test_modes_see_the_call(self) -> None:
        seen = []

        class Mode(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                seen.append(func)
                return func(*args, **(kwargs or {}))

        x = randn(1, 2, 5, 8)
        with Mode():
            F.scaled_dot_product_attention(x, x, x, scale=0.5)
        assert seen.count(F.scaled_dot_product_attention) == 1

    def test_compile(self) -> None:
        def step(x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, is_causal=True) * 2

        compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
        x = randn(2, 3, 6, 8).requires_grad_()
        for _ in range(3):
            o = compiled(x)
        torch.testing.assert_close(o, 2 * torch_sdpa(x, x, x, is_causal=True))
        o.sum().backward()
        assert fastattn.sdpa_calls().served == 1, "a traced call counts once"
        assert "fastattn.attention_forward" in graph_of(step, x)

    def test_export(self) -> None:
        class Module(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return F.scaled_dot_product_attention(x, x, x)

        x = randn(1, 2, 5, 8)
        program = torch.export.export(Module(), (x,))
        assert "fastattn.attention_forward" in str(program.graph)
        torch.testing.assert_close(program.module()(x), torch_sdpa(x, x, x))

    def test_jit_trace(self) -> None:
        x, y = randn(1, 2, 5, 8), randn(1, 2, 9, 8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(lambda z: F.scaled_dot_product_attention(z, z, z), (x,))
        torch.testing.assert_close(traced(y), torch_sdpa(y, y, y))

    def test_checkpoint(self) -> None:
        from torch.utils.checkpoint import checkpoint

        x = randn(1, 2, 5, 8).requires_grad_()
        o = checkpoint(lambda y: F.scaled_dot_product_attention(y, y, y, dropout_p=0.5), x, use_reentrant=False)
        torch.manual_seed(0)
        torch.randn(1)
        o.sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()


def graph_of(function: Any, *args: Any) -> str:
    """The operators that torch.compile finds in function(*args)."""
    lines: list[str] = []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        lines.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compile(function, backend=backend, fullgraph=True)(*args)
    return "\n".join(lines)


def test_compiled_code_follows_the_switch() -> None:
    def step(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    x = randn(1, 2, 5, 8)
    compiled(x)
    assert fastattn.sdpa_calls().served == 0
    with fastattn.replaced_sdpa():
        compiled(x)
    assert fastattn.sdpa_calls().served == 1
    assert "fastattn" not in graph_of(step, x)


def test_compiled_calls_are_handed_back() -> None:
    def step(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x) + 1

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    x = torch.ones(1, 2, 5, 8, device="meta")
    with fastattn.replaced_sdpa(), pytest.warns(UserWarning, match="neither all on the CPU"):
        assert compiled(x).is_meta
    assert fastattn.sdpa_calls().handed_back == {"tensors that are neither all on the CPU nor all on CUDA": 1}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_uses_pytorchs_function() -> None:
    def step(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)

    x = randn(1, 2, 5, 8)
    with fastattn.replaced_sdpa():
        scripted = torch.jit.script(step)
    torch.testing.assert_close(scripted(x), torch_sdpa(x, x, x))


def test_importing_and_replacing_do_not_load_the_compiler() -> None:
    code = "import sys, fastattn; fastattn.replace_sdpa(); assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_models_can_be_copied_while_replaced() -> None:
    with fastattn.replaced_sdpa():
        module = nn.MultiheadAttention(8, 2)
        copy.deepcopy(module)
        pickle.loads(pickle.dumps(module))
