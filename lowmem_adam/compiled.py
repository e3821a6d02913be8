"""Steps inside of functions that ``torch.compile`` traces: one operator that the compiler cannot look into.

What compilers make of the kernel may round differently, and a step's numbers, which change from step to step, would
have it compiled again and again. So the compiler sees ``lowmem_adam::step``, which changes the parameters, and nothing
of what it does. What is no tensor is read from the optimizer when the operator runs: settings, step numbers, clipping.

The compiler may give the operator other tensors than the optimizer's. It makes a function that changes none of its
inputs of what it traced, which is why parameters may be copies, whose values it writes back itself; and gradients may
be those of the traced function, which become ``param.grad`` only after it. So the operator steps what it is given.

Attributes of an optimizer must not be set where that is traced: torch 2.13 loses such assignments without a word.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from lowmem_adam.stepping import Stepper


class Zeroed(Protocol):
    """An optimizer whose gradients can be set to None."""

    _traced: Traced
    _stepper: Stepper
    _in_backward: Any
    _reduced: set[int] | None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As ``torch.optim.Optimizer.zero_grad``."""


class Compilable(Zeroed, Protocol):
    """An optimizer, as far as this room needs it."""

    param_groups: Any
    _clipped: weakref.ref[Tensor] | None

    def _step(self, closure: Callable[[], float] | None) -> float | None: ...


_numbers = itertools.count()
_optimizers: weakref.WeakValueDictionary[int, Compilable] = weakref.WeakValueDictionary()


class Traced:
    """What the compiler may look at of an optimizer.

    The compiler knows ``torch.optim.Optimizer``: who reads its ``param_groups`` has it watch all settings, and compile
    anew for every learning rate; who changes them gets a setting ``capturable`` besides. So they are read from here.
    """

    def __init__(self, optimizer: Compilable) -> None:
        self.number = next(_numbers)
        """By which the operator finds the optimizer as long as there is one."""
        self.groups: list[dict[str, Any]] = []
        """Its param groups, the list itself."""
        _optimizers[self.number] = optimizer


class Groups:
    """The attribute ``param_groups``, whose list is in ``Traced``, and in ``__dict__`` as of every other optimizer.

    Read in a compiled function it breaks the graph, after which the compiler takes its list for any other.
    """

    def __get__(self, optimizer: Any, owner: object = None) -> Any:
        if optimizer is None:
            return self
        if torch.compiler.is_dynamo_compiling():
            torch._dynamo.graph_break()
        return optimizer._traced.groups

    def __set__(self, optimizer: Any, groups: list[dict[str, Any]]) -> None:
        optimizer.__dict__["param_groups"] = groups
        optimizer._traced.groups = groups


# ---------------------------------------------------------------- what is traced


def step(optimizer: Compilable, closure: Callable[[], float] | None) -> float | None:
    """A step as the compiler sees it: the operator, or a call that it leaves to Python and breaks its graph for.

    The latter with a closure; where the function has changed settings before; for DTensors and other tensor classes;
    with ``offload_gradients`` and ``step_in_backward``, whose gradients are of such classes; and where ``grad_scale``
    or ``found_inf`` is no tensor.
    """
    if closure is not None or _steps_early(optimizer):
        return _step_outside(optimizer, closure)
    groups = optimizer._traced.groups
    torch._dynamo.comptime.comptime(_break_where_settings_change)
    params: list[Tensor] = []
    grads: list[Tensor | None] = []
    for group in groups:
        for param in group["params"]:
            params.append(param)
            grads.append(param.grad)
    scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    if not _are_plain([*params, *grads, scale, found_inf]):
        return _step_outside(optimizer, None)
    torch.ops.lowmem_adam.step(optimizer._traced.number, params, grads, scale, found_inf)
    return None


def _break_where_settings_change(context: Any) -> None:
    """While a function is traced, called by the compiler: break the graph where it has changed param groups.

    Such changes are written after the graph has run, and so after a step in the same graph has read settings.
    """
    changes = context._i_will_not_complain_if_bc_breaks_InstructionTranslator().output.side_effects
    groups = context.get_local("groups")._i_will_not_complain_if_bc_breaks_VariableTracker()
    groups = groups.realize()
    if any(changes.is_modified(watched) for watched in (groups, *(group.realize() for group in groups.items))):
        context.graph_break(msg="param groups are changed before a step")


def zero_grad(optimizer: Zeroed, set_to_none: bool) -> None:
    """``zero_grad`` as the compiler sees it, without a look at the settings.

    A clipping that no step has used is forgotten when other gradients are there. The compiler breaks its graph unless
    ``set_to_none``, and with ``offload_gradients``, ``step_in_backward`` and ``reduce_scatter_hook``.
    """
    if not set_to_none or _steps_early(optimizer) or optimizer._reduced is not None:
        _zero_grad_outside(optimizer, set_to_none)
        return
    for group in optimizer._traced.groups:
        for param in group["params"]:
            param.grad = None


def _steps_early(optimizer: Zeroed) -> bool:
    """Whether gradients are taken in the backward pass."""
    return optimizer._stepper.gradients is not None or optimizer._in_backward is not None


def _are_plain(tensors: Sequence[Any]) -> bool:
    return all(tensor is None or type(tensor) in (Tensor, Parameter) for tensor in tensors)


@torch._disable_dynamo  # type: ignore[attr-defined]
def _step_outside(optimizer: Compilable, closure: Callable[[], float] | None) -> float | None:
    return optimizer._step(closure)


@torch._disable_dynamo  # type: ignore[attr-defined]
def _zero_grad_outside(optimizer: Zeroed, set_to_none: bool) -> None:
    optimizer.zero_grad(set_to_none)


# ---------------------------------------------------------------- what runs


# A CUDA graph would replay one step's numbers for ever.
@torch.library.custom_op(
    "lowmem_adam::step",
    mutates_args=("params",),
    schema="(SymInt number, Tensor(a!)[] params, Tensor?[] grads, Tensor? grad_scale, Tensor? found_inf) -> ()",
    tags=(torch.Tag.cudagraph_unsafe,),
)
def _operator(
    number: int,
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Step an optimizer's parameters, or copies of them, with these gradients.

    Args:
        number: of the optimizer.
        params: all of its parameters, in the order of its groups.
        grads: a gradient for each, or None.
        grad_scale: what a ``GradScaler`` multiplied gradients by.
        found_inf: above zero where it found an infinity or NaN.

    Raises:
        RuntimeError: there is no such optimizer, or it has other parameters now; gradients were clipped, and others
            are given.
        Exception: as ``Adam8bit.step``.
    """
    optimizer = _optimizers.get(number)
    if optimizer is None:
        raise RuntimeError(f"lowmem_adam::step: there is no optimizer {number} any more; accepted: one that is there")
    own = [param for group in optimizer.param_groups for param in group["params"]]
    if [param.shape for param in own] != [param.shape for param in params]:
        raise RuntimeError(
            f"lowmem_adam::step: {len(params)} parameters were given, and the optimizer has {len(own)}, or they have "
            "other shapes; accepted: those that it has now"
        )
    with torch.no_grad(), _given(optimizer, own, params, grads), _scaled(optimizer, grad_scale, found_inf):
        optimizer._step(None)


@_operator.register_fake
def _fake(number: int, params: Any, grads: Any, grad_scale: Any, found_inf: Any) -> None:
    """Nothing is returned, and no tensor changes its shape."""


@contextmanager
def _given(
    optimizer: Compilable, own: Sequence[Tensor], params: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> Iterator[None]:
    """For the time of a step, let the optimizer's parameters have the memory and the gradients that are given."""
    memory: list[tuple[Tensor, Tensor]] = []
    gradients: list[tuple[Tensor, Tensor | None]] = []
    clipped = None
    if optimizer._clipped is not None:
        clipped = optimizer._clipped()
    try:
        for param, given, grad in zip(own, params, grads, strict=True):
            held = param.grad
            if grad is not held and (grad is None or held is None or not _is_same(grad, held)):
                if held is not None and held is clipped:  # dropped or kept, the clipping would be wrong for some
                    raise RuntimeError(
                        "clip_grad_norm_ was called before a compiled function that changes or replaces gradients and "
                        "then steps; accepted: clip_grad_norm_ in that function, right before step()"
                    )
                gradients.append((param, held))
                param.grad = grad
            if not _is_same(param, given):
                memory.append((param, param.data))
                param.data = given
        yield
    finally:
        for param, data in memory:
            param.data = data
        for param, held in gradients:
            param.grad = held
        if memory:
            optimizer._stepper.forget()  # what it knows of the copies, or they would stay in memory


@contextmanager
def _scaled(optimizer: Compilable, grad_scale: Tensor | None, found_inf: Tensor | None) -> Iterator[None]:
    """For the time of a step, tell the optimizer what a ``GradScaler`` tells it, which is given."""
    told = {"grad_scale": grad_scale, "found_inf": found_inf}
    before = {name: optimizer.__dict__[name] for name in told if name in optimizer.__dict__}
    optimizer.__dict__.update(told)
    try:
        yield
    finally:
        for name in told:
            optimizer.__dict__.pop(name, None)
        optimizer.__dict__.update(before)


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one is other or (
        one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
    )
