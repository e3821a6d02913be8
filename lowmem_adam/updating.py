"""The last phase of a step: this rank's shard in one pass, by way of the host where that is where moments are.

Work comes in stages. One is a bucket of the shard, or as much of it as fits into a buffer of the host's; while it is
stepped the next ones are on their way there, and what was stepped before is on its way back and to other ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lowmem_adam import kernels
from lowmem_adam.kernels.fragment import AnyWork, DeviceRates, DeviceSettings, DeviceStep, Fragment, StepScalars
from lowmem_adam.local import local
from lowmem_adam.offload import AHEAD, Offload, Part, Passage, in_chunks, on_device
from lowmem_adam.phases import CHECK, GATHER, NOBODY, STEP, TRANSFER, Listener
from lowmem_adam.prepared import Prepared
from lowmem_adam.shard import Bucket, Gather, Partition, Piece, write

OnDevice = tuple[DeviceSettings, DeviceRates, list[object]]
"""A ``DeviceStep`` but for the counter."""


class Task(NamedTuple):
    """A parameter that this step changes, with everything about it checked; of a DTensor's gradient what lies here.

    The gradient may be on the host, where the parameter is not.
    """

    param: Tensor
    grad: Tensor
    moments: str
    master: torch.dtype | None
    backend: str
    scalars: StepScalars | OnDevice
    """Of the step to be taken; where the device counts steps, what is known of it here."""
    label: str
    state: Mapping[str, Tensor] | None
    """None before its first step."""
    prepared: Prepared | None
    """None before its first step, and where the state keeps another rest of the weight than the group now asks for."""


class Stage(NamedTuple):
    """Pieces that are stepped at one time."""

    work: Sequence[tuple[Piece, Task]]
    passage: Passage | None
    """Their way to the host and back; None where they are stepped where they lie."""
    completes: Bucket | None
    """The bucket that is to be gathered then."""


Skipped = MutableMapping[torch.device, Tensor | int]
"""Blocks left out for a non-finite gradient, by the device that counts them."""


def update(
    tasks: Sequence[Task], partition: Partition, offload: Offload | None, skipped: Skipped, listener: Listener
) -> None:
    """Step this rank's shard and gather everybody's.

    Args:
        tasks: complete ones.
        partition: who steps what.
        offload: the way to the host; None where moments lie with their parameters.
        skipped: is added to.
        listener: is told of the phases.
    """
    listener.now(CHECK)
    flow = Flow(partition, offload, skipped, listener)
    for stage in _stages(tasks, partition, offload, listener):
        flow.put(stage)
    flow.finish()
    count(tasks)


def count(tasks: Iterable[Task]) -> None:
    """Write down that parameters have taken their step."""
    for task in tasks:
        assert task.state is not None
        if isinstance(task.scalars, StepScalars):
            task.state["step"].fill_(task.scalars.step)
        elif local(task.param).numel() == 0:  # others were counted on their device by what stepped them
            counter, found_inf = local(task.state["step"]), task.scalars[1].found_inf
            counter += found_inf.to(counter.device).reshape(()) == 0 if isinstance(found_inf, Tensor) else 1


class Flow:
    """Stages from their way down to their gather: buckets' gathers go on beside the next ones' steps.

    As many are on their way as the bytes of their copies allow. Every bucket is gathered, whatever has a gradient here:
    ranks that disagree about that still send alike.

    Args:
        partition: who steps what.
        offload: the way to the host; None where moments lie with their parameters.
        skipped: is added to.
        listener: is told of the phases.
    """

    def __init__(
        self, partition: Partition, offload: Offload | None, skipped: Skipped, listener: Listener = NOBODY
    ) -> None:
        self._partition, self._offload, self._skipped, self._listener = partition, offload, skipped, listener
        self._begun: deque[Stage] = deque()
        self._gathers: deque[tuple[Gather, int]] = deque()
        if offload is not None:
            listener.now(TRANSFER)
            offload.begin()
            listener.now(CHECK)

    def put(self, stage: Stage) -> None:
        """Add a stage, and step the oldest once enough of the next ones have been begun."""
        self._begun.append(stage)
        if len(self._begun) > (AHEAD if self._offload is not None else 0):
            self._step_next()

    def finish(self) -> None:
        """Step what is left, and let what reads parameters wait for all of them."""
        while self._begun:
            self._step_next()
        if self._offload is not None:
            self._listener.now(TRANSFER)
            self._offload.join()
        while self._gathers:
            self._listener.now(GATHER)
            self._gathers.popleft()[0].wait()
        self._listener.now(CHECK)

    def _step_next(self) -> None:
        stage = self._begun.popleft()
        _step(stage, self._skipped, self._listener)
        bucket = stage.completes
        if bucket is None or self._partition.world.size == 1:
            return
        if self._offload is not None:
            self._listener.now(TRANSFER)
            self._offload.join()
        self._listener.now(GATHER)
        while self._gathers and bucket.copied + sum(held for _, held in self._gathers) > self._partition.bucket_bytes:
            self._gathers.popleft()[0].wait()
        self._gathers.append((Gather(bucket, self._partition), bucket.copied))
        self._listener.now(CHECK)


def _stages(
    tasks: Sequence[Task], partition: Partition, offload: Offload | None, listener: Listener
) -> Iterator[Stage]:
    """The stages of this rank's shard in order; those by way of the host are on their way when they are returned."""
    by_id = {id(task.param): task for task in tasks}  # hashing a tensor takes longer than that
    for bucket in partition.buckets:
        pieces = bucket.pieces[partition.world.rank]
        work = [(piece, task) for piece in pieces if (task := by_id.get(id(piece.param))) is not None]
        yield from stages_of(work, offload, bucket, listener)


def stages_of(
    work: Sequence[tuple[Piece, Task]], offload: Offload | None, completes: Bucket | None, listener: Listener = NOBODY
) -> Iterator[Stage]:
    """The stages of some pieces; the last of them completes a bucket, where one is given."""
    here: list[tuple[Piece, Task]] = []
    elsewhere: dict[torch.device, list[tuple[Piece, Task]]] = {}
    for piece, task in work:
        if offload is None or task.param.is_cpu:
            here.append((piece, task))
        else:
            elsewhere.setdefault(task.param.device, []).append((piece, task))
    for of_device in elsewhere.values():
        assert offload is not None
        yield from _by_way_of_host(of_device, offload, listener)
    if here or completes is not None:
        yield Stage(here, None, completes)


def _by_way_of_host(work: Sequence[tuple[Piece, Task]], offload: Offload, listener: Listener) -> Iterator[Stage]:
    sizes = [(piece, sum(t.element_size() for t in on_device(task.param, task.grad))) for piece, task in work]
    for chunk in in_chunks(sizes, offload.buffer_bytes):
        pieces = [(piece, work[index][1]) for index, piece in chunk]
        parts = [_part(piece, task) for piece, task in pieces]
        listener.now(TRANSFER)
        passage = offload.fetch(parts)
        listener.now(CHECK)
        yield Stage(pieces, passage, None)


def _part(piece: Piece, task: Task) -> Part:
    assert task.prepared is not None
    start, stop = task.prepared.elements(piece.first_block, piece.end_block)
    return Part(task.prepared.param, task.grad.detach(), start, stop)


def _step(stage: Stage, skipped: Skipped, listener: Listener) -> None:
    calls: dict[tuple[str, torch.device], list[AnyWork]] = {}
    copies: list[tuple[Piece, Tensor]] = []
    if stage.passage is not None:
        listener.now(TRANSFER)
        stage.passage.wait()
        listener.now(CHECK)
    for index, (piece, task) in enumerate(stage.work):
        fragment = _fragment(piece, task, None if stage.passage is None else stage.passage.fetched[index])
        if fragment.cache is None:
            copies.append((piece, fragment.param))
        calls.setdefault((task.backend, fragment.param.device), []).append((fragment, _scalars(task)))
    listener.now(STEP)
    for (backend, device), fragments in calls.items():
        add_skipped(skipped, device, kernels.BACKENDS[backend](fragments))
    if stage.passage is not None:
        listener.now(TRANSFER)
        stage.passage.send_back()
    for piece, values in copies:
        write(piece.param, piece.start, piece.stop, values)
    listener.now(CHECK)


def add_skipped(skipped: Skipped, device: torch.device, left_out: Tensor | int) -> None:
    """Count blocks that a backend has left out."""
    if isinstance(held := skipped.get(device, 0), Tensor):
        held += left_out  # in place, as a CUDA graph does it again
    else:
        skipped[device] = held + left_out


def _scalars(task: Task) -> StepScalars | DeviceStep:
    if isinstance(task.scalars, StepScalars):
        return task.scalars
    assert task.state is not None
    return DeviceStep(local(task.state["step"]), *task.scalars)


def _fragment(piece: Piece, task: Task, fetched: tuple[Tensor, Tensor] | None) -> Fragment:
    assert task.prepared is not None
    if fetched is None:
        return task.prepared.fragment(task.grad, piece.first_block, piece.end_block)
    return task.prepared.fetched_fragment(*fetched, piece.first_block, piece.end_block)
