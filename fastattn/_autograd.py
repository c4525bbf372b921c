"""What torch needs of a fused function beside its kernels: gradients of every order, torch.func, forward mode.

A fused function is a pair of ordinary torch operators,

    name_forward(*inputs, *settings, save_stats) -> (*results, stats)
    name_backward(*upstream, *saved, *settings, *wanted) -> gradients, one for each differentiable input

and an :class:`Operator` says what these names stand for, and what the same function is in plain torch operations. From
that follow its registered gradients, with which ``torch.compile`` traces it without a graph break; the same two steps
as a ``torch.autograd.Function`` for calls outside of a trace, which go past torch.library's general wrapper (on tiny
tensors it took 142 µs for forward and backward, this 65 µs); the same again for the transforms of ``torch.func``, which
cannot see through torch.library's gradients; and forward-mode and second derivatives, by way of the plain operations.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastattn import _transforms, _vmap

Tensors = dict[str, Tensor | None]


class Operator:
    """A fused function, as the operators of its two passes and how they hang together.

    Args:
        name: fastattn::<name>_forward and fastattn::<name>_backward.
        inputs: The forward pass's tensors, by name, in order.
        differentiable: Those of them that have a gradient, in the order of the backward pass's results.
        results: The forward pass's results but for stats, in order.
        upstream: Those of them that have a gradient: what flows back through them comes first in the backward pass.
        saved: The tensors that follow, in order: inputs and results. A result without a gradient among them counts as a
            constant when the backward pass is differentiated; the others follow from the inputs.
        reference: (tensors by name, settings) -> the results with a gradient, in plain torch operations; the tensors
            are the inputs, and the constants among the saved results.
        wanted: Inputs whose gradient is optional: the backward pass ends in one bool for each.
        needs_first: Whether the backward pass must have the first upstream gradient; if not, None stands for 0.
        forward_mode: (tensors by name, settings) -> all results, for forward-mode derivatives, where they are more than
            the reference gives.
        places: Where the tensors have the batch and the heads, for vmap.
    """

    def __init__(
        self,
        name: str,
        *,
        inputs: tuple[str, ...],
        differentiable: tuple[str, ...],
        results: tuple[str, ...],
        upstream: tuple[str, ...],
        saved: tuple[str, ...],
        reference: Callable[[Tensors, tuple[Any, ...]], tuple[Tensor, ...]],
        wanted: tuple[str, ...] = (),
        needs_first: bool = True,
        forward_mode: Callable[[Tensors, tuple[Any, ...]], tuple[Tensor, ...]] | None = None,
        places: dict[str, _vmap.Place] = _vmap.PADDED,
    ) -> None:
        self.forward_op: Any = getattr(torch.ops.fastattn, f"{name}_forward").default
        self.backward_op: Any = getattr(torch.ops.fastattn, f"{name}_backward").default
        # The same, without the Python frame of OpOverload.__call__; not for tracing.
        self.forward_call, self.backward_call = self.forward_op._op, self.backward_op._op
        self._reference = reference
        self._forward_mode = forward_mode or reference

        self._inputs, self._differentiable, self._saved = inputs, differentiable, saved
        self._tensor_count, self._upstream_count, self._wanted_count = len(inputs), len(upstream), len(wanted)
        self._differentiable_at = tuple(inputs.index(name) for name in differentiable)
        self._pick_differentiable = itemgetter(*self._differentiable_at)
        self._pick_upstream = itemgetter(*(results.index(name) for name in upstream))
        self._constant_at = tuple(i for i, name in enumerate(results) if name not in upstream)
        self._wanted_at = tuple(differentiable.index(name) for name in wanted)
        self._first_at = saved.index(upstream[0]) if needs_first else None
        self._pick_saved = itemgetter(*((*inputs, *results, "stats").index(name) for name in saved))
        constants = [name for name in saved if name in results and name not in upstream]
        self._kept = tuple(name for name in saved if name in inputs or name in constants)
        self._pick_kept = itemgetter(*(len(upstream) + saved.index(name) for name in self._kept))

        others = tuple(name for name in inputs if name not in differentiable)
        self._pick_others = itemgetter(*(inputs.index(name) for name in others))
        # From (*differentiable, *others) to the operator's order.
        self._in_order = itemgetter(*((*differentiable, *others).index(name) for name in inputs))

        title = "".join(word.capitalize() for word in name.split("_"))
        self._eager_call = self._eager_function(title)
        forward_rule = _vmap.Rule(inputs, (*results, "stats"), places)
        backward_rule = _vmap.Rule((*upstream, *saved), differentiable, places, gradients=True, wanted=wanted)
        forward = (self.forward_op, self._setup_forward, self._forward_gradients)
        backward = (self.backward_op, self._setup_backward, self._backward_gradients)
        self._functional_forward = _functional(*forward, forward_rule)
        self._functional_backward = _functional(*backward, backward_rule)
        for (op, setup, gradients), rule in ((forward, forward_rule), (backward, backward_rule)):
            torch.library.register_autograd(op.name(), gradients, setup_context=setup)
            _vmap.register(op, rule)
        _transforms.operators[name] = self
        self._name = name

    def __call__(self, tensors: tuple[Tensor | None, ...], settings: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """The results, in the cheapest way that gives the gradients for which the caller can ask."""
        differentiable = [tensors[i] for i in self._differentiable_at]  # itemgetter cannot be traced
        needs_grad = False
        if torch.is_grad_enabled():
            for x in differentiable:
                if x is not None and x.requires_grad:
                    needs_grad = True
                    break
        if torch.compiler.is_dynamo_compiling():
            found = _transforms.in_trace()
            if found is not None:
                return _transforms.call(self._name, found == "forward", tensors, settings)
            return self.forward_op(*tensors, *settings, needs_grad)[:-1]
        is_forward_mode = forward_ad._current_level >= 0
        if is_forward_mode or torch._C._are_functorch_transforms_active():
            return self.transformed(is_forward_mode, tensors, settings)
        if torch.compiler.is_compiling():  # torch.export's trace, or another without Dynamo
            return self.forward_op(*tensors, *settings, needs_grad)[:-1]
        if needs_grad:
            return self._eager_call(self._pick_others(tensors), settings, *differentiable)
        with torch._C._AutoDispatchBelowAutograd():
            return self.forward_call(*tensors, *settings, False)[:-1]

    def transformed(
        self, is_forward_mode: bool, tensors: tuple[Tensor | None, ...], settings: tuple[Any, ...]
    ) -> tuple[Tensor, ...]:
        """The results under a transform of torch.func, or in forward mode, where tensors may have tangents."""
        if is_forward_mode:
            # The kernels have no forward-mode derivative.
            return self._forward_mode(dict(zip(self._inputs, tensors, strict=True)), settings)
        return self._functional_forward.apply(*tensors, *settings, True)[:-1]

    # --- The forward pass's gradient: the backward pass ---------------------------------------------------------------

    def gradients(
        self, ctx: Any, upstream: tuple[Tensor | None, ...], needed: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        """The gradients of the differentiable inputs, those that ``needed`` asks for."""
        given = self._pick_upstream(upstream)
        if given[0] is None and all(x is None for x in given):
            return (None,) * len(needed)
        saved = ctx.saved_tensors  # once: a checkpoint gives them out once
        if given[0] is None and self._first_at is not None:
            given = (torch.zeros_like(saved[self._first_at]), *given[1:])
        args = (*given, *saved, *ctx.settings, *[needed[i] for i in self._wanted_at])
        if forward_ad._current_level >= 0:
            # Tangents that only the upstream gradients have, for in forward mode no operator makes a graph.
            plain = self._plain_gradients(dict(zip(self._saved, saved, strict=True)), ctx.settings, given)
            found = tuple([plain.get(name) for name in self._differentiable])
        elif torch._C._are_functorch_transforms_active():
            found = self._functional_backward.apply(*args)
        elif torch.is_grad_enabled():
            # create_graph=True: the operator's own registered gradient makes the second derivative.
            found = self.backward_op(*args)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                found = self.backward_call(*args)
        if False in needed:
            found = tuple([x if need else None for x, need in zip(found, needed, strict=True)])
        return found

    def _eager_function(self, name: str) -> Any:
        """apply(others, settings, *differentiable), for calls outside of a trace and of torch.func's transforms.

        Few arguments, because autograd looks at each. Every microsecond here is one of all small calls, which is why
        the names that are used in it are local.
        """
        forward_call, in_order, pick_saved = self.forward_call, self._in_order, self._pick_saved
        gradients, constant_at = self.gradients, self._constant_at

        def forward(
            ctx: Any, others: tuple[Tensor | None, ...], settings: tuple[Any, ...], *differentiable: Tensor | None
        ) -> tuple[Tensor, ...]:
            tensors = in_order(differentiable + others)
            with torch._C._AutoDispatchBelowAutograd():
                results = forward_call(*tensors, *settings, True)
            ctx.save_for_backward(*pick_saved(tensors + results))
            ctx.settings = settings
            ctx.set_materialize_grads(False)
            if constant_at:
                ctx.mark_non_differentiable(*[results[i] for i in constant_at])
            return results[:-1]

        def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
            return (None, None, *gradients(ctx, upstream, ctx.needs_input_grad[2:]))

        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        function: Any = type(name, (torch.autograd.Function,), members)
        # torch.autograd.Function.apply without its look at torch.func's transforms, which __call__ has taken.
        return super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def _setup_forward(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*[output[i] for i in self._constant_at], output[-1])
        ctx.save_for_backward(*self._pick_saved((*inputs[: self._tensor_count], *output)))
        ctx.settings = inputs[self._tensor_count : -1]
        ctx.set_materialize_grads(False)

    def _forward_gradients(self, ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad
        found = self.gradients(ctx, upstream, self._pick_differentiable(needed))
        grads: list[Tensor | None] = [None] * len(needed)
        for i, grad in zip(self._differentiable_at, found, strict=True):
            grads[i] = grad
        return tuple(grads)

    def _plain_gradients(
        self, tensors: Tensors, settings: tuple[Any, ...], upstream: tuple[Tensor | None, ...]
    ) -> dict[str, Tensor]:
        """The backward pass in plain torch operations: the gradients of the differentiable inputs that are there."""
        present = [i for i, x in enumerate(upstream) if x is not None]
        primals = {name: tensors[name] for name in self._differentiable if tensors[name] is not None}

        def results(primals: dict[str, Tensor]) -> tuple[Tensor, ...]:
            found = self._reference({**tensors, **primals}, settings)
            return tuple(found[i] for i in present)

        pullback: Any = torch.func.vjp(results, primals)[1]
        return pullback(tuple(upstream[i] for i in present))[0]

    # --- The backward pass's gradient: second derivatives -------------------------------------------------------------

    def _setup_backward(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[: self._upstream_count], *self._pick_kept(inputs))
        tensors = self._upstream_count + len(self._saved)
        ctx.settings = tuple(inputs[tensors : len(inputs) - self._wanted_count])
        ctx.set_materialize_grads(False)

    def _backward_gradients(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of the backward pass, from the plain torch operations of fastattn.reference.

        The first derivatives are computed again in a form that can be differentiated, which takes O(Lq * Lk) memory.
        What was saved of the forward pass's results gets no gradient: it follows from the inputs, and is computed again
        too, or is a constant.
        """
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        saved: list[Any] = list(ctx.saved_tensors)
        if not torch.is_grad_enabled():  # no third derivative is asked for
            saved = [x if x is None else x.detach() for x in saved]
        upstream, kept = saved[: self._upstream_count], saved[self._upstream_count :]
        tensors: Tensors = dict(zip(self._kept, kept, strict=True))
        given_upstream = {i: x for i, x in enumerate(upstream) if x is not None}
        primals = {name: tensors[name] for name in self._differentiable if tensors[name] is not None}

        def first(primals: dict[str, Tensor], cotangents: dict[int, Tensor]) -> dict[str, Tensor]:
            given = tuple(cotangents.get(i) for i in range(self._upstream_count))
            return self._plain_gradients({**tensors, **primals}, ctx.settings, given)

        transformed: Any = torch.func.vjp(first, primals, given_upstream)
        firsts, pullback = transformed
        given = dict(zip(self._differentiable, grads, strict=True))
        d_firsts = {name: torch.zeros_like(x) if given[name] is None else given[name] for name, x in firsts.items()}
        d_primals, d_cotangents = pullback(d_firsts)
        # In the order of the backward pass's arguments.
        second: list[Tensor | None] = [d_cotangents.get(i) for i in range(self._upstream_count)]
        second += [d_primals.get(name) for name in self._saved]
        return tuple(second + [None] * (len(ctx.needs_input_grad) - len(second)))


def _functional(op: Any, setup: Any, gradients: Any, rule: Any) -> Any:
    """An operator with its gradient and its vmap as torch.func's transforms see them."""

    class Functional(torch.autograd.Function):
        forward = staticmethod(op)
        setup_context = staticmethod(setup)
        backward = staticmethod(gradients)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
            return rule(Functional.apply, info.batch_size, in_dims, inputs)

    return Functional
