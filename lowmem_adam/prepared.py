"""What is known of a parameter from one step to the next, so that it need not be checked and described again.

A model of 300 small tensors would otherwise spend ten times longer in checks than in arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowmem_adam import inputs
from lowmem_adam.kernels.fragment import Fragment, FullMoments, Moments
from lowmem_adam.layout import Layout
from lowmem_adam.local import Span, is_dtensor, local
from lowmem_adam.shard import read
from lowmem_adam.state import check_state, master_of, moments_of

MOST_PIECES = 128
"""Pieces of a parameter by way of the host that something is kept of."""


class Prepared:
    """A checked parameter with its state: what a kernel is given, but for the gradient.

    Holds as long as ``fits`` says so: the same memory, seen in the same way, and the same tensors in the state.

    Args:
        param: one that ``inputs.check_param`` accepts.
        state: its state, with the tensors that ``moments`` calls for.
        moments: the setting of its group.
        label: names the parameter in errors.
        layout: numbers the parameter's blocks.
        span: those that lie here and that the state is of.
        master: as what the state keeps the rest of the weight, as ``state.master_dtype`` says.
        home: where the state lies.
        counted: where its steps are counted.

    Raises:
        ValueError: state that does not fit the parameter.
    """

    __slots__ = (
        "_addresses",
        "_all",
        "_caches",
        "_device",
        "_layout",
        "_master",
        "_master_dtype",
        "_moments",
        "_setting",
        "_span",
        "_tensors",
        "param",
    )

    def __init__(
        self,
        param: Tensor,
        state: Mapping[str, Tensor],
        moments: str,
        label: str,
        layout: Layout,
        span: Span,
        master: torch.dtype | None,
        home: torch.device,
        counted: torch.device,
    ) -> None:
        check_state(state, param.shape, moments, label, None if is_dtensor(param) else span, master)
        inputs.check_devices(state, home, counted, label)
        self.param = local(param).detach()
        # As numbers: memory can move below a tensor that stays the same, by share_memory_() or an assignment to .data.
        self._addresses = _addresses(param, state)
        self._setting = moments
        self._span = span
        # What lies here is the whole parameter, or all of a DTensor's part.
        self._all = span if is_dtensor(param) else (0, layout.n_blocks)
        self._tensors = tuple(state.items())
        self._moments = moments_of(state)
        held = master_of(state)
        self._master = None if held is None else local(held)
        self._master_dtype = master
        self._layout = layout
        self._device = param.device
        self._caches: dict[tuple[int, ...], dict[str, Any]] = {}

    def fits(self, param: Tensor, state: Mapping[str, Tensor], moments: str, master: torch.dtype | None) -> bool:
        """Whether nothing has changed but values."""
        given, held, param = param, self.param, local(param)
        return (
            param.dtype is held.dtype
            and param.shape == held.shape
            and param.stride() == held.stride()
            and param.device == self._device
            and moments == self._setting
            and master is self._master_dtype
            and len(state) == len(self._tensors)
            and all(state.get(key) is tensor for key, tensor in self._tensors)
            and _addresses(given, state) == self._addresses
        )

    def fragment(self, grad: Tensor, first_block: int, end_block: int) -> Fragment:
        """Some of the blocks that the state is of, for a kernel.

        Of a parameter that does not lie in one run, a part is a copy: ``shard.write`` puts it back.
        """
        layout, key = self._layout, (first_block, end_block)
        cache = self._caches.get(key)
        if cache is None:
            cache = self._caches[key] = {}
        if key == self._all:
            return Fragment(self.param, grad.detach(), self._moments, layout, *key, cache, self._master)
        start, stop = layout.block_start(first_block), layout.block_start(end_block)
        if "piece" in cache:
            param, moments, master = cache["piece"]
        else:
            param = read(self.param, start, stop)
            moments, master = self._moments_between(first_block, end_block), self._master_between(start, stop)
            if self.param.is_contiguous():
                cache["piece"] = (param, moments, master)
        # A copy lies elsewhere each time: nothing can be kept about it.
        kept = cache if "piece" in cache else None
        return Fragment(param, read(grad, start, stop), moments, layout, first_block, end_block, kept, master)

    def elements(self, first_block: int, end_block: int) -> tuple[int, int]:
        """Flat elements ``[start, stop)`` of ``param``, which is what lies here, that some blocks are."""
        layout = self._layout
        origin = layout.block_start(self._all[0])
        return layout.block_start(first_block) - origin, layout.block_start(end_block) - origin

    def fetched_fragment(self, param: Tensor, grad: Tensor, first_block: int, end_block: int) -> Fragment:
        """As ``fragment``, of a parameter's and a gradient's elements on the host, which come to the same place there
        from step to step or else are known anew.
        """
        key, address = (first_block, end_block), param.data_ptr()
        cache = self._caches.get(key)
        if cache is None or cache.get("address") != address:
            layout = self._layout
            start, stop = layout.block_start(first_block), layout.block_start(end_block)
            held = (self._moments_between(first_block, end_block), self._master_between(start, stop))
            if len(self._caches) >= MOST_PIECES:
                self._caches.clear()  # where a parameter is cut depends on which others have gradients
            cache = self._caches[key] = {"held": held, "address": address}
        moments, master = cache["held"]
        return Fragment(param, grad, moments, self._layout, first_block, end_block, cache, master)

    def _master_between(self, start: int, stop: int) -> Tensor | None:
        if self._master is None:
            return None
        origin = self._layout.block_start(self._span[0])
        return self._master.view(-1)[start - origin : stop - origin]

    def _moments_between(self, first_block: int, end_block: int) -> Moments:
        blocks = slice(first_block - self._span[0], end_block - self._span[0])
        origin = self._layout.block_start(self._span[0])
        elements = slice(*(self._layout.block_start(block) - origin for block in (first_block, end_block)))
        flat = [tensor.view(-1) for tensor in self._moments]
        if isinstance(self._moments, FullMoments):
            return FullMoments(*(tensor[elements] for tensor in flat))
        first, second, *metadata = flat
        return type(self._moments)(first[elements], second[elements], *(tensor[blocks] for tensor in metadata))


def _addresses(param: Tensor, state: Mapping[str, Tensor]) -> list[int]:
    if is_dtensor(param):
        return [local(tensor).data_ptr() for tensor in (param, *state.values())]
    return [param.data_ptr(), *[tensor.data_ptr() for tensor in state.values()]]


def is_plain_gradient(param: Tensor, grad: Tensor) -> bool:
    """Whether ``inputs.check_gradient`` is certain to accept: the usual case, told with few questions."""
    return (
        type(grad) is Tensor
        and not is_dtensor(param)
        and grad.dtype is param.dtype
        and grad.shape == param.shape
        and grad.layout is torch.strided
        and grad.device == param.device
        and not grad.is_meta
    )
