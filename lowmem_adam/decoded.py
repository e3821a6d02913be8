"""Codes that are seen as the fp32 moment they stand for: decoded where somebody reads them, and only there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lowmem_adam.foreign.moments import decode_into
from lowmem_adam.layout import Layout
from lowmem_adam.state import FULL_KEYS, part_of


class DecodedMoment(Tensor):
    """``exp_avg`` or ``exp_avg_sq`` of a one-dimensional parameter, float32, that exists as its codes alone.

    For programs that look for these two in saved state and read them as tensors. A slice decodes its elements, any
    other operator that has something to do all of them; both give plain tensors, which are copies. Writing to it is
    refused, while a write to such a copy, a slice for instance, reaches nobody else. In a file it takes the codes' 2
    bytes for both moments together, and whoever reads the file needs this package.

    Args:
        key: ``"exp_avg"`` or ``"exp_avg_sq"``.
        state: the parameter's whole state, codes and ``step``; shared, not copied.
        numel: elements of the parameter.
        moments: the setting of its group.
    """

    key: str
    state: Mapping[str, Tensor]
    moments: str

    @staticmethod
    def __new__(cls, key: str, state: Mapping[str, Tensor], numel: int, moments: str) -> DecodedMoment:
        """A tensor without memory of its own."""
        if key not in FULL_KEYS:
            raise ValueError(f"key is {key!r}; accepted: {', '.join(map(repr, FULL_KEYS))}")
        device = next(tensor.device for name, tensor in state.items() if name != "step")
        made: DecodedMoment = torch.Tensor._make_wrapper_subclass(cls, (numel,), dtype=torch.float32, device=device)
        made.key, made.state, made.moments = key, state, moments
        return made

    def __init__(self, key: str, state: Mapping[str, Tensor], numel: int, moments: str) -> None:
        pass

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"DecodedMoment({self.key!r} of {self.numel()} elements, moments={self.moments!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return DecodedMoment, (self.key, self.state, self.numel(), self.moments)

    def __deepcopy__(self, memo: dict[int, Any]) -> DecodedMoment:
        copied = {name: tensor.detach().clone() for name, tensor in self.state.items()}
        return DecodedMoment(self.key, copied, self.numel(), self.moments)

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """As ``Tensor.to``, a plain tensor also where it has the dtype and device asked for."""
        return self.decoded().to(*args, **kwargs)

    def decoded(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The values of elements ``[start, stop)``, a plain float32 tensor on the codes' device."""
        stop = self.numel() if stop is None else stop
        layout = Layout.of(self.shape, self.moments)
        span = (start // layout.block_size, min(-(-stop // layout.block_size), layout.n_blocks))
        first = layout.block_start(span[0])
        values = [torch.empty(layout.block_start(span[1]) - first, device=self.device) for _ in FULL_KEYS]
        decode_into(part_of(self.state, layout, span), *values)
        return values[FULL_KEYS.index(self.key)][start - first : stop - first]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Decode what is read."""
        aten = torch.ops.aten
        first: Any = args[0] if args else None
        if func in (aten.detach.default, aten.alias.default):
            return DecodedMoment(first.key, first.state, first.numel(), first.moments)
        if func is aten.slice.Tensor and isinstance(first, DecodedMoment):
            given: tuple[Any, ...] = (*args[1:], *(0, None, None, 1)[len(args) - 1 :])
            dim, (start, stop, step) = given[0], slice(*given[1:]).indices(first.numel())
            if dim in (0, -1) and step == 1:
                return first.decoded(start, max(start, stop))
        _refuse_writes(func, args, kwargs or {})
        plain = tree_map(lambda value: value.decoded() if isinstance(value, DecodedMoment) else value, (args, kwargs))
        return func(*plain[0], **(plain[1] or {}))


def _refuse_writes(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse an operator that would write to decoded values, which nobody keeps.

    Raises:
        RuntimeError: it does.
    """
    for index, argument in enumerate(func._schema.arguments):
        written = argument.alias_info is not None and argument.alias_info.is_write
        given = args[index] if index < len(args) else kwargs.get(argument.name)
        held = [one for one in (given if isinstance(given, list) else [given]) if isinstance(one, DecodedMoment)]
        if written and held:
            raise RuntimeError(
                f"{func} would write to {held[0]!r}, which is made of codes; accepted: reading it, and writes to "
                "a copy, as decoded() gives it"
            )
