"""Bytes of our own optimizer, by what makes its state, its shards and its buffers, on tensors without memory."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem_adam.local import Span
from lowmem_adam.offload import SLOTS, Offload, Slot, in_chunks
from lowmem_adam.plan.model import Weight
from lowmem_adam.plan.settings import Row, Settings
from lowmem_adam.shard import Partition, World
from lowmem_adam.state import MASTER_KEYS, expected_tensors, master_dtype


@dataclass(slots=True)
class Cut:
    """A model's parameters, on the meta device, and who steps which of their blocks."""

    params: list[Tensor]
    partition: Partition

    @classmethod
    def of(cls, weights: Sequence[Weight], settings: Settings) -> Cut:
        """As the first step cuts them."""
        params = [torch.empty(weight.shape, dtype=weight.dtype, device="meta") for weight in weights]
        partition = Partition(World(0, settings.shards), int(settings.bucket_cap_mb * 2**20))
        partition.extend(params, dict.fromkeys(params, settings.moments))
        return cls(params, partition)


def own_row(cut: Cut, settings: Settings, rank: int | None = None) -> Row:
    """What our optimizer takes, with ``settings.zero_stage`` 0.

    Args:
        cut: the parameters, cut by these settings.
        settings: checked ones.
        rank: the one asked for; None for the one that holds most state.
    """
    states = _states(cut, settings)
    if rank is None:
        rank = max(range(len(states)), key=lambda each: (sum(states[each].values()), -each))
    row = Row("lowmem_adam", state=states[rank], rank=rank)
    weights = sum(param.nbytes for param in cut.params)
    row.device.parameters = weights
    gradients = row.host if settings.offload_gradients else row.device
    gradients.gradients = weights
    home = row.host if settings.offload else row.device
    for name, nbytes in states[rank].items():
        if name == "step":  # counted on the host
            row.host.moments += nbytes
        elif name in MASTER_KEYS.values():
            home.master += nbytes
        else:
            home.moments += nbytes
    row.device.transient = _copies(cut.partition)
    if settings.offload:
        row.host.transient = _pinned(cut, settings, rank)
        if settings.offload_gradients:
            largest = max(param.nbytes for param in cut.params)
            row.device.transient += min(weights, largest + 2 * cut.partition.bucket_bytes)
    return row


def _states(cut: Cut, settings: Settings) -> list[dict[str, int]]:
    """Bytes of state on every rank, by key."""
    ranks: list[dict[str, int]] = [{} for _ in range(settings.shards)]
    everywhere: dict[str, int] = {}
    for param in cut.params:
        master = master_dtype(param.dtype, settings.group)
        _add(everywhere, param, settings.moments, (0, 0), master)  # ``step``, which all ranks have, and empty tensors
        for kinds, span in zip(ranks, cut.partition.spans(param), strict=True):
            if span != (0, 0):
                _add(kinds, param, settings.moments, span, master)
    for kinds in ranks:
        kinds.pop("step", None)
        for name, nbytes in everywhere.items():
            kinds[name] = kinds.get(name, 0) + nbytes
    return ranks


def _add(kinds: dict[str, int], param: Tensor, moments: str, span: Span, master: torch.dtype | None) -> None:
    for name, (shape, dtype) in expected_tensors(param.shape, moments, span, master).items():
        kinds[name] = kinds.get(name, 0) + math.prod(shape) * dtype.itemsize


def _copies(partition: Partition) -> int:
    """Bytes of the copies in which parameters are sent, at the time at which most of them are on their way.

    Buckets are let go of as ``updating.Flow`` does it: the oldest first, until the next one has room.
    """
    if partition.world.size == 1:
        return 0
    held: deque[int] = deque()
    most = 0
    for bucket in partition.buckets:
        while held and bucket.copied + sum(held) > partition.bucket_bytes:
            held.popleft()
        held.append(bucket.copied)
        most = max(most, sum(held))
    return most


def _pinned(cut: Cut, settings: Settings, rank: int) -> int:
    """Bytes of the pinned buffers of a rank's device once they have taken all that a step sends through them."""
    buffer_bytes = Offload(cut.partition.bucket_bytes).buffer_bytes
    slots = [Slot(lambda nbytes: torch.empty(nbytes, dtype=torch.uint8, device="meta")) for _ in range(SLOTS)]
    turn = 0
    tensors = 1 if settings.offload_gradients else 2  # the parameter alone comes down, or its gradient with it
    for bucket in cut.partition.buckets:
        work = [(piece, tensors * piece.param.element_size()) for piece in bucket.pieces[rank]]
        for chunk in in_chunks(work, buffer_bytes):
            slots[turn % SLOTS].take([piece.nbytes for _, piece in chunk for _ in range(tensors)])
            turn += 1
    if settings.offload_gradients:
        for slot in slots:  # gradients come down in whole buffers, in as many of them as there are to be had
            slot.take([buffer_bytes])
    return sum(slot.memory.nbytes for slot in slots)


def flat_moments(numels: Sequence[int], moments: str) -> tuple[int, int]:
    """Bytes of the moments of flat fp32 partitions, as DeepSpeed's ZeRO hands them over, and of their step counters."""
    tensors = [entry for numel in numels for entry in expected_tensors((numel,), moments).items()]
    sizes = [(name, math.prod(shape) * dtype.itemsize) for name, (shape, dtype) in tensors]
    return sum(size for name, size in sizes if name != "step"), sum(size for name, size in sizes if name == "step")
