"""Steps inside of functions that ``torch.compile`` traces: one operator that the compiler cannot look into.

What compilers make of the kernel may round differently, and a step's numbers, which change from step to step, would
have it compiled again and again. So the compiler sees ``lowmem_adam::step``, which changes the parameters, and nothing
of what it does. Everything that is no tensor is read from the optimizer when the operator runs: the learning rate, step
numbers, clipping.

The compiler may give the operator other tensors than the optimizer's. It makes a function that changes none of its
inputs of what it traced, which is why parameters may be copies, whose values it writes back itself; and gradients may
be those of the traced function, which become ``param.grad`` only after it. So the operator steps what it is given.
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


class Compilable(Protocol):
    """An optimizer, as far as this room needs it."""

    param_groups: list[dict[str, Any]]
    _number: int
    _stepper: Stepper
    _in_backward: object
    _clipped: weakref.ref[Tensor] | None

    def _step(self, closure: Callable[[], float] | None) -> float | None: ...


_numbers = itertools.count()
_optimizers: weakref.WeakValueDictionary[int, Compilable] = weakref.WeakValueDictionary()


def number_of(optimizer: Compilable) -> int:
    """A new number, by which the operator finds an optimizer as long as there is one."""
    number = next(_numbers)
    _optimizers[number] = optimizer
    return number


# ---------------------------------------------------------------- what is traced


def step(optimizer: Compilable, closure: Callable[[], float] | None) -> float | None:
    """A step as the compiler sees it: the operator, or a call that it leaves to Python and breaks its graph for.

    The latter with a closure; for DTensors and other tensor classes; with ``offload_gradients`` and
    ``step_in_backward``, whose gradients are of such classes; and where ``grad_scale`` or ``found_inf`` is no tensor.
    """
    params: list[Tensor] = []
    grads: list[Tensor | None] = []
    # Not optimizer.param_groups: asked by this name, the compiler watches all settings, and compiles anew for every lr.
    for group in optimizer.__dict__["param_groups"]:
        for param in group["params"]:
            params.append(param)
            grads.append(param.grad)
    scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    early = optimizer._stepper.gradients is not None or optimizer._in_backward is not None
    if closure is not None or early or not _are_plain([*params, *grads, scale, found_inf]):
        return _outside(optimizer, closure)
    torch.ops.lowmem_adam.step(optimizer._number, params, grads, scale, found_inf)
    return None


def zero_grad(optimizer: Compilable, set_to_none: bool) -> None:
    """``Optimizer.zero_grad`` as the compiler sees it, without a look at the settings."""
    for group in optimizer.__dict__["param_groups"]:
        for param in group["params"]:
            if param.grad is not None:
                if set_to_none:
                    param.grad = None
                else:
                    param.grad.zero_()


def _are_plain(tensors: Sequence[Any]) -> bool:
    return all(tensor is None or type(tensor) in (Tensor, Parameter) for tensor in tensors)


@torch._disable_dynamo  # type: ignore[attr-defined]
def _outside(optimizer: Compilable, closure: Callable[[], float] | None) -> float | None:
    return optimizer._step(closure)


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
        RuntimeError: there is no such optimizer, or it has other parameters now.
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
    clipped = None if optimizer._clipped is None else optimizer._clipped()
    try:
        for param, given, grad in zip(own, params, grads, strict=True):
            if not _is_same(param, given):
                memory.append((param, param.data))
                param.data = given
            held = param.grad
            if grad is not held and (grad is None or held is None or not _is_same(grad, held)):
                gradients.append((param, held))
                param.grad = grad
                if clipped is not None and held is clipped:  # the same gradients, changed in the traced function
                    optimizer._clipped = None if grad is None else weakref.ref(grad)
        yield
    finally:
        for param, held in gradients:
            param.grad = held
        for param, data in memory:
            param.data = data
        if memory:
            optimizer._stepper.forget()  # what it knows of the copies, or they would stay in memory


@contextmanager
def _scaled(optimizer: Compilable, grad_scale: Tensor | None, found_inf: Tensor | None) -> Iterator[None]:
    """For the time of a step, give the optimizer what a ``GradScaler`` tells it; also where it is told that already."""
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
