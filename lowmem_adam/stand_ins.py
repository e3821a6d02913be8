"""What stands in ``param.grad`` for a gradient that is not there: one on the host, or one that was stepped already.

Code that does not know of this library reads gradients where it is used to: ``torch.nn.utils.clip_grad_norm_``,
``torch.amp.GradScaler``, a trainer that logs norms. With nothing in that place it would find no gradient, do nothing
and not say so. A tensor stands there instead that answers as the gradient would, or refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lowmem_adam.local import is_dtensor

_aten = torch.ops.aten


class HostGradient(Tensor):
    """A gradient whose values are on the host, seen from its parameter's device.

    Operators on it are computed on the host. What they write into goes back to where it was, what they return to the
    parameter's device, unless it is this gradient or a view of it. Adding a gradient of the device to it, as a further
    backward pass does, waits for nothing.

    Args:
        host: the values, in the host's memory; any shape.
        device: the parameter's.
        settle: waits until all values are there.
        add: adds a gradient of the same shape and dtype that is on the device, without waiting for it.
        viewed: the gradient that this is a view of, which must live as long.
    """

    _host: Tensor
    _settle: Callable[[], None]
    _add: Callable[[Tensor, Tensor], None]
    _viewed: HostGradient | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls,
        host: Tensor,
        device: torch.device,
        settle: Callable[[], None],
        add: Callable[[Tensor, Tensor], None],
        viewed: HostGradient | None = None,
    ) -> HostGradient:
        made = Tensor._make_wrapper_subclass(
            cls, host.shape, strides=host.stride(), dtype=host.dtype, device=device, requires_grad=False
        )
        made._host, made._settle, made._add, made._viewed = host, settle, add, viewed
        return made

    def values(self) -> Tensor:
        """The values themselves, all of them there, in the host's memory."""
        self._settle()
        return self._host

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"HostGradient({self.values()!r}, device={str(self.device)!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied: Tensor = self.values().to(self.device, copy=True)
        memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is _aten.add_.Tensor and not kwargs and _can_be_added(args[0], args[1]):
            args[0]._add(args[0]._host, args[1])
            return args[0]
        return _on_host(func, args, kwargs or {})


def _can_be_added(grad: Any, other: Any) -> bool:
    return (
        type(grad) is HostGradient
        and grad._viewed is None
        and type(other) is Tensor
        and other.device == grad.device
        and other.dtype is grad.dtype
        and other.shape == grad.shape
    )


def _on_host(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    gradients = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, HostGradient)]
    memory = {gradient.values().untyped_storage().data_ptr(): gradient for gradient in gradients}
    copies: dict[int, Tensor] = {}

    def down(leaf: Any) -> Any:
        if isinstance(leaf, HostGradient):
            return leaf._host
        if isinstance(leaf, Tensor) and not leaf.is_cpu:
            return copies.setdefault(id(leaf), leaf.cpu())
        return leaf

    def up(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_cpu:
            return leaf
        for gradient in gradients:
            if leaf is gradient._host:
                return gradient
        viewed = memory.get(leaf.untyped_storage().data_ptr()) if leaf.numel() else None
        if viewed is not None:
            return HostGradient(leaf, viewed.device, viewed._settle, viewed._add, viewed)
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


class SteppedGradient(Tensor):
    """Stands for a gradient that ``step_in_backward`` has used and freed; refuses whatever reads it or adds to it.

    Once it was set to zero, as ``zero_grad(set_to_none=False)`` does, the gradient that is added is the next one.

    Raises:
        RuntimeError: by all operators but those that set a gradient to zero or pass it on.
    """

    added: Tensor | None
    """The next gradient."""
    _is_zero: bool

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, grad: Tensor) -> SteppedGradient:
        made = Tensor._make_wrapper_subclass(
            cls, grad.shape, strides=grad.stride(), dtype=grad.dtype, device=grad.device
        )
        made._is_zero, made.added = False, None
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"SteppedGradient(shape={tuple(self.shape)}, device={str(self.device)!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> SteppedGradient:
        return SteppedGradient(self)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (_aten.zero_.default, _aten._foreach_zero_.default):
            for grad in args[0] if isinstance(args[0], list | tuple) else [args[0]]:
                grad._is_zero, grad.added = True, None
            return args[0]
        if func is _aten.add_.Tensor and args[0]._is_zero and not kwargs and type(args[1]) is Tensor:
            args[0]._is_zero, args[0].added = False, args[1]
            return args[0]
        if func in (_aten.detach.default, _aten.alias.default):
            return SteppedGradient(args[0])
        if func is _aten.add_.Tensor:
            raise RuntimeError(
                "a second gradient came for a parameter that step_in_backward had stepped with the first one; "
                "accepted: one backward pass a step, with zero_grad() before it (gradients that are summed over "
                "several passes, or over parts of one as by reentrant checkpointing, need step() without "
                "step_in_backward)"
            )
        raise RuntimeError(
            f"{func} was asked of a gradient that step_in_backward has stepped with and freed; what needs all "
            "gradients at once, such as clipping by their global norm or a GradScaler, needs step() without "
            "step_in_backward"
        )


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


def part_of(grad: Tensor) -> Tensor:
    """The part of a gradient that lies here, as it is: of a DTensor without another operator."""
    return grad._local_tensor if is_dtensor(grad) else grad  # type: ignore[attr-defined]
