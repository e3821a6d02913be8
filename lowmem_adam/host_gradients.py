"""Gradients that go to the host as a backward pass makes them, and their memory on the device is free.

A hook on each parameter takes its gradient, once it has been accumulated, down through the pinned buffers of its
device's lane, and leaves a ``HostGradient`` in ``param.grad``. What the next backward pass adds to that comes down in
the same way and is added on the host. A buffer that is full is on its way while the next one is filled; when its turn
comes again, the host waits for it and takes it over to where the gradients are kept, in memory that is not pinned.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor

from lowmem_adam.local import is_dtensor
from lowmem_adam.offload import ALIGNMENT, Lane, Offload, Slot
from lowmem_adam.stand_ins import HostGradient, local_part, place_like

SMALLEST_BUFFER = 1024
"""Bytes, however small the buckets are: a cache line for each of many small gradients, or some of a large one."""


class Arrival(NamedTuple):
    """Elements of a gradient in a pinned buffer."""

    buffer: Tensor
    target: Tensor
    """Where they are kept, one dimension."""
    adds: bool
    """They are added to what is there."""


class Load(NamedTuple):
    """What is on its way in one buffer."""

    slot: Slot
    arrivals: list[Arrival]
    arrived: torch.Event


class Descent:
    """One device's way down, filled gradient by gradient."""

    def __init__(self, lane: Lane, buffer_bytes: int) -> None:
        self._lane = lane
        self._room = max(buffer_bytes, SMALLEST_BUFFER)
        # The backward passes of several threads may meet here.
        self._lock = threading.RLock()
        self._loads: deque[Load] = deque()
        self._slot: Slot | None = None
        self._used = 0
        self._arrivals: list[Arrival] = []

    def take(self, grad: Tensor, memory: Tensor, *, adds: bool) -> None:
        """Queue a gradient's way down; its memory may be given up at once.

        Args:
            grad: on the device; any shape.
            memory: the host's, of the same shape and without gaps, which has the gradient after ``settle``.
            adds: whether it is added to what the memory has then.
        """
        with self._lock:
            self._lane.follow()
            with self._lane.down:
                elements = _in_order_of(memory, grad)
            target = _in_order_of(memory, memory)
            size = grad.element_size()
            start = 0
            while start < grad.numel():
                slot = self._open(size)
                stop = min(grad.numel(), start + (self._room - self._used) // size)
                nbytes = (stop - start) * size
                buffer = slot.memory[self._used : self._used + nbytes].view(grad.dtype)
                with self._lane.down:
                    buffer.copy_(elements[start:stop], non_blocking=True)
                self._arrivals.append(Arrival(buffer, target[start:stop], adds))
                self._used += -(-nbytes // ALIGNMENT) * ALIGNMENT
                start = stop
            grad.record_stream(self._lane.down)

    def _open(self, size: int) -> Slot:
        """The buffer that is being filled, with room for an element at least."""
        if self._slot is not None and self._used + size > self._room:
            self._close()
        if self._slot is None:
            slot = self._lane.next_slot()
            while any(load.slot is slot for load in self._loads):
                self._unload()
            slot.take([self._room])
            if slot.sent is not None:
                self._lane.down.wait_event(slot.sent)
            self._slot, self._used = slot, 0
        return self._slot

    def _close(self) -> None:
        assert self._slot is not None
        self._loads.append(Load(self._slot, self._arrivals, self._lane.down.record_event()))
        self._slot, self._used, self._arrivals = None, 0, []

    def _unload(self) -> None:
        """Take over the oldest load."""
        load = self._loads.popleft()
        load.arrived.synchronize()
        for arrival in load.arrivals:
            if arrival.adds:
                arrival.target.add_(arrival.buffer)
            else:
                arrival.target.copy_(arrival.buffer)

    def drop(self) -> None:
        """Forget what is on its way."""
        with self._lock:
            self._loads.clear()
            self._slot, self._used, self._arrivals = None, 0, []

    @torch.no_grad()
    def settle(self) -> None:
        """Until everything that was taken is where it is kept."""
        with self._lock:
            if self._slot is not None:
                self._close()
            while self._loads:
                self._unload()


def _in_order_of(memory: Tensor, values: Tensor) -> Tensor:
    """The elements in the order in which those of a tensor without gaps lie, one dimension; a view where it can be."""
    if values.stride() != memory.stride():
        values = torch.empty_strided(memory.shape, memory.stride(), dtype=values.dtype, device=values.device).copy_(
            values
        )
    return values.as_strided((values.numel(),), (1,))


class Descents:
    """The ways down of all devices. Knows no parameters, so that what stands for a gradient keeps none alive."""

    def __init__(self, offload: Offload) -> None:
        self._offload = offload
        self._by_device: dict[torch.device, Descent] = {}
        self._given: WeakSet[TakenGradient] = WeakSet()
        self.paused = False
        """The buffers are somebody else's."""

    def take(self, grad: Tensor, memory: Tensor) -> TakenGradient:
        """Start a gradient on its way to the host's memory, and give out what stands for it."""
        taken = TakenGradient(memory, self)
        self._given.add(taken)  # before anything can fail
        self._start(grad, memory, adds=False)
        return taken

    def add(self, grad: Tensor, memory: Tensor) -> None:
        """Start a gradient on its way to what is added to the host's memory."""
        if self.paused:
            self.settle()
            memory.add_(grad.cpu())
        else:
            self._start(grad, memory, adds=True)

    def settle(self) -> None:
        """Until all gradients that were taken are on the host.

        Raises:
            RuntimeError: a device has not brought them.
        """
        with self._lost_if_it_fails():
            for descent in list(self._by_device.values()):
                descent.settle()

    def pause(self, paused: bool) -> None:
        """Leave the buffers to somebody else, or take them again."""
        self.settle()
        self.paused = paused

    def _start(self, grad: Tensor, memory: Tensor, *, adds: bool) -> None:
        if grad.device not in self._by_device:
            self._by_device[grad.device] = Descent(self._offload.lane(grad.device), self._offload.buffer_bytes)
        with self._lost_if_it_fails():
            self._by_device[grad.device].take(grad, memory, adds=adds)

    @contextlib.contextmanager
    def _lost_if_it_fails(self) -> Iterator[None]:
        """Nobody can tell which gradients have arrived when a copy has failed, so none of them is to be used."""
        try:
            yield
        except BaseException:
            for taken in list(self._given):
                taken.lost = True
            for descent in list(self._by_device.values()):
                descent.drop()
            raise


class TakenGradient:
    """A gradient in the host's memory, or on its way there."""

    def __init__(self, memory: Tensor, descents: Descents) -> None:
        self.memory = memory
        self._descents = descents
        self.lost = False

    def settle(self) -> None:
        """Until all of it is there.

        Raises:
            RuntimeError: it never will be.
        """
        self._descents.settle()
        self._check()

    def add(self, grad: Tensor) -> None:
        """Add a gradient of the same shape and dtype that is on the device."""
        self._check()
        self._descents.add(grad, self.memory)

    def _check(self) -> None:
        if self.lost:
            raise RuntimeError(
                "this gradient was lost on its way to the host, when a copy failed; accepted: "
                "zero_grad(set_to_none=True) and another backward pass"
            )


class _Kept(NamedTuple):
    """The host's memory for a parameter's gradient, and what was last given out of it."""

    memory: Tensor
    taken: weakref.ref[TakenGradient]
    device: torch.device
    """That brings it: what another one has left on its way here must not come later."""


class HostGradients:
    """Takes the gradients of an optimizer's parameters.

    Parameters on the host keep theirs, as there is nothing to free. So do plain parameters in one of several processes:
    ``DistributedDataParallel`` reduces gradients only after the hooks of their parameters and holds all of them in
    buffers of its own. FSDP2 calls the hooks after it has reduced. A gradient that has a graph (``create_graph=True``)
    stays too.

    Args:
        offload: has the lanes.
    """

    def __init__(self, offload: Offload) -> None:
        self.descents = Descents(offload)
        # Not weakly: torch does not swap tensors that something refers to weakly.
        self._kept: dict[Tensor, _Kept] = {}
        self._hooks: dict[Tensor, Any] = {}
        self._watched: list[tuple[int, bool]] = []
        self._told = False

    def watch(self, params: Sequence[Tensor]) -> None:
        """Take the gradients of those that can have any, and of no others, from now on."""
        told = [(id(param), param.requires_grad) for param in params]
        if told == self._watched:
            return
        present = {identity for identity, _ in told}
        for param in [param for param in self._hooks if id(param) not in present]:
            self._hooks.pop(param).remove()
            self._kept.pop(param, None)
        for param in params:
            if param.requires_grad and param not in self._hooks:
                hook = param.register_post_accumulate_grad_hook(_hook_of(self))  # type: ignore[no-untyped-call]
                self._hooks[param] = hook
        self._watched = told

    @torch.no_grad()
    def take(self, param: Tensor) -> None:
        """What the hook does: the gradient goes to the host, unless it is there or has to stay."""
        if param.grad is None or self.descents.paused:
            return
        grad = local_part(param.grad)
        if type(grad) is not Tensor or grad.is_cpu or grad.is_meta or grad.layout != torch.strided or not grad.numel():
            return
        if grad.requires_grad or param.grad.requires_grad:
            return
        if may_be_reduced_later(param):
            self._tell_that_they_stay()
            return
        taken = self.descents.take(grad, self._memory_for(param, grad))
        self._kept[param] = _Kept(taken.memory, weakref.ref(taken), grad.device)
        param.grad = place_like(param.grad, lambda _: HostGradient(taken.memory, grad.device, taken))

    def _memory_for(self, param: Tensor, grad: Tensor) -> Tensor:
        """The memory that the last gradient had, unless somebody still has that."""
        kept = self._kept.get(param)
        memory = torch.empty_like(grad, device="meta")  # says how it lies
        if kept is not None and kept.taken() is None and kept.device == grad.device:
            there = kept.memory
            if (there.shape, there.stride(), there.dtype) == (memory.shape, memory.stride(), memory.dtype):
                return there
        return torch.empty_like(memory, device="cpu")

    def _tell_that_they_stay(self) -> None:
        if not self._told:
            self._told = True
            warnings.warn(
                "offload_gradients leaves the gradients of plain parameters on their device in "
                f"{dist.get_world_size()} processes, where DistributedDataParallel reduces them later and keeps all of "
                "them; what it takes are those of one process, and of FSDP2's DTensors",
                RuntimeWarning,
                stacklevel=2,
            )

    @property
    def nbytes(self) -> int:
        """Bytes of the host's memory that gradients are kept in."""
        return sum(kept.memory.nbytes for kept in self._kept.values())


def _hook_of(gradients: HostGradients) -> Callable[[Tensor], None]:
    """A hook that does not keep the optimizer alive."""
    reference = weakref.ref(gradients)

    def take_gradient(param: Tensor) -> None:
        taker = reference()
        if taker is not None:
            taker.take(param)

    return take_gradient


def may_be_reduced_later(param: Tensor) -> bool:
    """Whether others may still change a gradient that has been accumulated: that of a plain parameter in one of several
    processes.
    """
    return several_processes() and not is_dtensor(param)


def several_processes() -> bool:
    """Whether this is one of several processes of torch.distributed."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
