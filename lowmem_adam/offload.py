"""CPU offload: moments live on the host and are stepped there; gradients and parameters pass through pinned memory.

Each device has a lane: a stream down to the host, one back up, and pinned buffers that take turns. While the host steps
what is in one of them, another takes the next gradients, and a third sends its parameters back:

    down   | 0 | 1 | 2 | 3 | ...
    host       | 0 | 1 | 2 | 3 | ...
    up             | 0 | 1 | 2 | 3 | ...

Parameters come down with their gradients, so what a model was loaded with since the last step is what is stepped.
Nobody waits for a device: the host waits for the event of the buffer that it is about to step, and the device's own
stream, in which the next forward pass runs, for the event of the last parameters' arrival.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lowmem_adam.cores import share_of_cores
from lowmem_adam.shard import Piece, end_within, read, write

SLOTS = 4
"""Buffers of a lane: one on its way up, one that the host steps, the others on their way down. With two, whatever their
size, a buffer would have to come up before the next gradients go down into it."""
AHEAD = SLOTS - 2
"""Buffers that are begun before the host steps one."""

ALIGNMENT = 64
"""Bytes that parts of a buffer begin at multiples of: a cache line."""


def check_offload(value: object) -> None:
    """Check the setting ``offload``.

    Raises:
        ValueError: names what is accepted.
    """
    if value is not None and not (isinstance(value, str) and value == "cpu"):
        raise ValueError(f"offload is {value!r}; accepted: None, 'cpu'")


def check_offload_gradients(value: object, offload: str | None) -> None:
    """Check the setting ``offload_gradients``.

    Raises:
        ValueError: no truth value, or True without ``offload``.
    """
    if not isinstance(value, bool):
        raise ValueError(f"offload_gradients is {value!r}; accepted: True, False")
    if value and offload is None:
        raise ValueError("offload_gradients is True, and offload is None; accepted with it: offload='cpu'")


class Part(NamedTuple):
    """Flat elements ``[start, stop)``, row by row, of a parameter on a device and of its gradient, which may be on the
    host already.
    """

    param: Tensor
    grad: Tensor
    start: int
    stop: int

    @property
    def sizes(self) -> list[int]:
        """Bytes of what is on the device: of the parameter's elements, and of the gradient's."""
        return [(self.stop - self.start) * tensor.element_size() for tensor in on_device(self.param, self.grad)]


def on_device(param: Tensor, grad: Tensor) -> list[Tensor]:
    """What has to come down of a parameter and its gradient."""
    return [param] if grad.is_cpu else [param, grad]


def in_chunks(work: Sequence[tuple[Piece, int]], room: int) -> Iterator[list[tuple[int, Piece]]]:
    """Pieces of parameters cut at blocks, as many together as a buffer has room for (one block at least).

    Args:
        work: pieces, and bytes of an element of what has to come down of their parameter and gradient.
        room: bytes of a buffer.

    Returns:
        For every chunk its pieces, each with its place in ``work``.
    """
    chunk: list[tuple[int, Piece]] = []
    left = room
    for index, (piece, element_bytes) in enumerate(work):
        layout, first = piece.layout, piece.first_block
        while first < piece.end_block:
            end = end_within(layout, first, piece.end_block, max(0, left - 2 * ALIGNMENT), element_bytes)
            if end == first and chunk:
                yield chunk
                chunk, left = [], room
                continue
            part = Piece(piece.param, layout, first, max(end, first + 1))
            chunk.append((index, part))
            left -= (part.stop - part.start) * element_bytes + 2 * ALIGNMENT
            first = part.end_block
    if chunk:
        yield chunk


class Passage:
    """Parts of one device's parameters on the host, from their way down to their way back."""

    def __init__(self, parts: Sequence[Part], lane: Lane) -> None:
        self._parts, self._lane = parts, lane
        self._slot = lane.next_slot()
        sizes = [size for part in parts for size in part.sizes]
        buffers = iter(self._slot.take(sizes))
        self.fetched: list[tuple[Tensor, Tensor]] = []
        """Parameter and gradient of each part, on the host, once ``wait`` has returned."""
        with lane.down:
            if self._slot.sent is not None:
                lane.down.wait_event(self._slot.sent)
            for part in parts:
                here = []
                for tensor in on_device(part.param, part.grad):
                    host = next(buffers).view(tensor.dtype)
                    host.copy_(read(tensor, part.start, part.stop), non_blocking=True)
                    here.append(host)
                if part.grad.is_cpu:
                    here.append(read(part.grad, part.start, part.stop))
                self.fetched.append((here[0], here[1]))
        self._arrived = lane.down.record_event()

    def wait(self) -> None:
        """Until everything has arrived on the host."""
        self._arrived.synchronize()

    def send_back(self) -> None:
        """Queue the parameters' way back to where they came from."""
        up = self._lane.up
        with up:
            for part, (values, _) in zip(self._parts, self.fetched, strict=True):
                if part.param.is_contiguous():
                    read(part.param, part.start, part.stop).copy_(values, non_blocking=True)
                else:
                    write(part.param, part.start, part.stop, values.to(part.param.device, non_blocking=True))
        self._slot.sent = up.record_event()


class Slot:
    """A pinned buffer, and when it was last read by its device."""

    def __init__(self, allocate: Callable[[int], Tensor]) -> None:
        self._allocate = allocate
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.sent: torch.Event | None = None

    def take(self, sizes: Sequence[int]) -> list[Tensor]:
        """Parts of the buffer of these sizes; it grows where it is too small."""
        offsets = [0]
        for size in sizes:
            offsets.append(offsets[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
        if self.memory.numel() < offsets[-1]:
            if self.sent is not None:
                self.sent.synchronize()
                self.sent = None
            self.memory = torch.empty(0, dtype=torch.uint8)  # given up before more is asked for
            self.memory = self._allocate(offsets[-1])
        return [self.memory[start : start + size] for start, size in zip(offsets, sizes, strict=False)]


class Lane:
    """A device's way to the host and back; its streams and buffers stay from step to step."""

    def __init__(self, device: torch.device, allocate: Callable[[int], Tensor]) -> None:
        self.device = device
        self.down, self.up = torch.Stream(device=device), torch.Stream(device=device)
        self._slots = [Slot(allocate) for _ in range(SLOTS)]
        self._turn = 0

    def begin(self) -> None:
        """Start a step, with the first buffer, so that every part has the same place in every step."""
        self.follow()
        self._turn = 0

    def follow(self) -> None:
        """Let both streams wait for what the device does until now: make gradients, and read parameters."""
        ready = torch.accelerator.current_stream(self.device).record_event()
        self.down.wait_event(ready)
        self.up.wait_event(ready)

    def next_slot(self) -> Slot:
        """The buffer whose turn it is."""
        self._turn += 1
        return self._slots[(self._turn - 1) % SLOTS]

    def join(self) -> None:
        """Let what the device does from now on wait for all parameters that are on their way up."""
        torch.accelerator.current_stream(self.device).wait_event(self.up.record_event())

    @property
    def pinned_bytes(self) -> int:
        """Bytes of its buffers."""
        return sum(slot.memory.nbytes for slot in self._slots)


class Offload:
    """The lanes of an optimizer's devices. Parameters that are on the host already need none.

    Args:
        bucket_bytes: of a bucket. Each device has buffers of two buckets together, each of one block at least.
    """

    def __init__(self, bucket_bytes: int) -> None:
        self.buffer_bytes = 2 * bucket_bytes // SLOTS
        """Of one buffer."""
        self._lanes: dict[torch.device, Lane] = {}
        self._warned = False
        self._told_of_memory = False

    def begin(self) -> None:
        """Before the first ``fetch`` of a step."""
        if not self._warned:
            self._warned = True
            warn_of_one_thread()
        for lane in self._lanes.values():
            lane.begin()

    def lane(self, device: torch.device) -> Lane:
        """A device's way to the host and back."""
        if device not in self._lanes:
            self._lanes[device] = Lane(device, self._pinned)
            self._lanes[device].begin()
        return self._lanes[device]

    def fetch(self, parts: Sequence[Part]) -> Passage:
        """Start parts of one device's parameters, and their gradients, on their way to the host, as they will be when
        the device has done what it was told to until ``begin``, or the lane's last ``follow``.
        """
        return Passage(parts, self.lane(parts[0].param.device))

    def join(self) -> None:
        """Let devices wait for their parameters, before anything else reads them."""
        for lane in self._lanes.values():
            lane.join()

    def _pinned(self, nbytes: int) -> Tensor:
        try:
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            if not self._told_of_memory:
                self._told_of_memory = True
                warnings.warn(
                    f"offload got no pinned memory of {nbytes} bytes ({error}); it goes on with memory that is not "
                    "pinned, from and to which nothing is copied beside the step. Less is asked for with a smaller "
                    "bucket_cap_mb.",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return torch.empty(nbytes, dtype=torch.uint8)

    @property
    def pinned_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(lane.pinned_bytes for lane in self._lanes.values())


def warn_of_one_thread() -> None:
    """``accelerate launch`` and ``torchrun`` leave processes one thread, with which the host's step takes its time."""
    share = share_of_cores()
    if torch.get_num_threads() == 1 and share > 1:
        warnings.warn(
            f"offload steps on the host, where this process has one thread of {share} that it could have: call "
            f"lowmem_adam.integrations.accelerate.set_threads(), set OMP_NUM_THREADS={share}, accelerate launch "
            f"--num_cpu_threads_per_process {share}, or torch.set_num_threads({share})",
            RuntimeWarning,
            stacklevel=2,
        )
