"""What stands in ``param.grad`` for a gradient that is not there: one on the host, or one that was stepped already.

Code that does not know of this library reads gradients where it is used to: ``torch.nn.utils.clip_grad_norm_``,
``torch.amp.GradScaler``, a trainer that logs norms. With nothing in that place it would find no gradient, do nothing
and not say so. A tensor stands there instead that answers as the gradient would, or refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lowmem_adam.local import is_dtensor

_aten = torch.ops.aten


class Taken(Protocol):
    """A gradient's values in the host's memory; ``lowmem_adam.host_gradients`` has it."""

    memory: Tensor

    def settle(self) -> None:
        """Wait until all of them are there."""

    def add(self, grad: Tensor) -> None:
        """Add a gradient of the same shape and dtype that is on the device."""


class HostGradient(Tensor):
    """A gradient whose values are on the host, seen from its parameter's device.

    Operators on it are computed on the host. What they write into goes back to where it was, what they return to the
    parameter's device, unless it is this gradient or a view of it. A gradient of the device that is added to it, as a
    further backward pass does, comes down beside that pass.

    Args:
        host: the values, or a view of them, in the host's memory; any shape.
        device: the parameter's.
        taken: the whole gradient.
    """

    _host: Tensor
    _taken: Taken

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, host: Tensor, device: torch.device, taken: Taken) -> HostGradient:
        made = Tensor._make_wrapper_subclass(
            cls, host.shape, strides=host.stride(), dtype=host.dtype, device=device, requires_grad=False
        )
        made._host, made._taken = host, taken
        return made

    def values(self) -> Tensor:
        """The values themselves, all of them there, in the host's memory.

        Raises:
            RuntimeError: they were lost on their way.
        """
        self._taken.settle()
        return self._host

    def on_device(self) -> Tensor:
        """A copy on the parameter's device."""
        return self.values().to(self.device, copy=True)

    def tolist(self) -> Any:
        """As ``Tensor.tolist``."""
        return self.values().tolist()

    def share_memory_(self) -> HostGradient:
        """Nothing to do, as with tensors of an accelerator."""
        return self

    def __dlpack__(self, **keywords: Any) -> Any:
        return self.on_device().__dlpack__(**keywords)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"HostGradient({self.values()!r}, device={str(self.device)!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.on_device().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        memo[id(self)] = copied = self.on_device()
        return copied

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is _aten.add_.Tensor and not kwargs and _can_be_added(args[0], args[1]):
            args[0]._taken.add(args[1])
            return args[0]
        return _on_host(func, args, kwargs or {})


def _can_be_added(grad: Any, other: Any) -> bool:
    return (
        type(grad) is HostGradient
        and grad._host is grad._taken.memory
        and type(other) is Tensor
        and not other.requires_grad
        and other.device == grad.device
        and other.dtype is grad.dtype
        and other.shape == grad.shape
    )


def _on_host(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    gradients = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, HostGradient)]
    memory = {gradient.values().untyped_storage().data_ptr(): gradient for gradient in gradients}
    whole = {id(gradient._host): gradient for gradient in gradients}
    copies: dict[int, Tensor] = {}

    def down(leaf: Any) -> Any:
        if isinstance(leaf, HostGradient):
            return leaf._host
        if isinstance(leaf, Tensor) and not leaf.is_cpu:
            if id(leaf) not in copies:
                copies[id(leaf)] = leaf.cpu()
            return copies[id(leaf)]
        return leaf

    def up(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_cpu:
            return leaf
        if id(leaf) in whole:
            return whole[id(leaf)]
        viewed = memory.get(leaf.untyped_storage().data_ptr()) if leaf.numel() else None
        if viewed is not None:
            return HostGradient(leaf, viewed.device, viewed._taken)
        return leaf if kwargs.get("device") is not None else leaf.to(gradients[0].device)

    result = func(*tree_map(down, args), **tree_map(down, dict(kwargs)))
    given = {id(leaf): leaf for leaf in tree_leaves((args, kwargs))}
    for leaf in _written(func, args, kwargs):
        if id(leaf) in copies:
            leaf.copy_(copies[id(leaf)])
    by_copy = {id(copied): given[key] for key, copied in copies.items()}
    return tree_map(lambda leaf: by_copy[id(leaf)] if id(leaf) in by_copy else up(leaf), result)


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """The tensors that an operator writes into."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from tree_leaves(args[index] if index < len(args) else kwargs.get(argument.name))


class _Next:
    """What comes after a gradient that was stepped: shared by all that stand for it."""

    def __init__(self) -> None:
        self.is_zero = False
        self.gradient: Tensor | None = None


class SteppedGradient(Tensor):
    """Stands for a gradient that ``step_in_backward`` has used and freed; refuses whatever reads it or adds to it.

    Once it was set to zero, as ``zero_grad(set_to_none=False)`` does, the gradient that is added is the next one; it is
    not to be read then either.

    Args:
        grad: the gradient, or another that stands for it.
        owner: identifies who has stepped with it.

    Raises:
        RuntimeError: by all operators but those that set a gradient to zero, pass it on, or convert it.
    """

    owner: object
    _next: _Next

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, grad: Tensor, owner: object, **other: Any) -> SteppedGradient:
        kept: dict[str, Any] = {"dtype": grad.dtype, "device": grad.device, "strides": grad.stride()}
        made = Tensor._make_wrapper_subclass(cls, grad.shape, **{**kept, **other})
        made.owner, made._next = owner, grad._next if isinstance(grad, SteppedGradient) else _Next()
        return made

    def next(self) -> Tensor | None:
        """The gradient after the one that was stepped: zero or what was added to that, None where there is none."""
        if self._next.gradient is None and self._next.is_zero:
            return torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        return self._next.gradient

    def share_memory_(self) -> SteppedGradient:
        """Nothing to do: there is none."""
        return self

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"SteppedGradient(shape={tuple(self.shape)}, device={str(self.device)!r})"

    def copied(self) -> SteppedGradient:
        """Another that stands for as much, and is set to zero and added to apart from this one."""
        other = SteppedGradient(self, self.owner)
        other._next = _Next()
        other._next.is_zero = self._next.is_zero
        other._next.gradient = None if self._next.gradient is None else self._next.gradient.clone()
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> SteppedGradient:
        memo[id(self)] = copied = self.copied()
        return copied

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        grad, kwargs = args[0], kwargs or {}
        if func is _aten.zero_.default:
            grad._next.is_zero, grad._next.gradient = True, None
            return grad
        if func is _aten._foreach_zero_.default:
            for each in grad:
                each.zero_()
            return None
        if isinstance(grad, SteppedGradient):
            if func in (_aten.detach.default, _aten.alias.default):
                return SteppedGradient(grad, grad.owner)
            if func is _aten.clone.default:
                return grad.copied()
            if func is _aten.add.Tensor and grad._next.is_zero and grad._next.gradient is None and not kwargs:
                return args[1].clone()  # of a pass with a graph, whose gradients are added out of place
            if func is _aten._to_copy.default:
                changed = {key: kwargs[key] for key in ("dtype", "device") if kwargs.get(key) is not None}
                return SteppedGradient(grad, grad.owner, **changed)
            if func is _aten.add_.Tensor and not kwargs and type(args[1]) is Tensor:
                grad._add(args[1])
                return grad
        raise RuntimeError(
            f"{func} was asked of a gradient that step_in_backward has stepped with and freed; what needs all "
            "gradients at once, such as clipping by their global norm, a GradScaler or DistributedDataParallel, needs "
            "step() without step_in_backward"
        )

    def _add(self, grad: Tensor) -> None:
        if not self._next.is_zero:
            raise RuntimeError(
                "a second gradient came for a parameter that step_in_backward had stepped with the first one; "
                "accepted: one backward pass a step, with zero_grad() before it (gradients that are summed over "
                "several passes, or over parts of one as by reentrant checkpointing, need step() without "
                "step_in_backward)"
            )
        held = self._next.gradient
        self._next.gradient = grad if held is None else held + grad


def place_like(grad: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    """What is to stand for a gradient; of a DTensor it stands for the part that lies here.

    Args:
        grad: the gradient.
        make: makes it of a plain gradient.
    """
    if not is_dtensor(grad):
        return make(grad)
    from torch.distributed.tensor import DTensor

    part: Tensor = grad._local_tensor  # type: ignore[attr-defined]
    placed: Tensor = DTensor(make(part), grad._spec, requires_grad=False)  # type: ignore[attr-defined,no-untyped-call]
    return placed


def local_part(grad: Tensor) -> Tensor:
    """The part of a gradient that lies here, as it is: of a DTensor without another operator."""
    return grad._local_tensor if is_dtensor(grad) else grad  # type: ignore[attr-defined]
