"""The float32 weight of a 16-bit parameter, put together from the parameter and what its state keeps of the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lowmem_adam.kernels import rounding
from lowmem_adam.local import is_dtensor, like, local
from lowmem_adam.shard import Partition, read
from lowmem_adam.state import master_dtype, master_of

TILE = 1 << 16
"""Elements that are put together at a time."""


def weight_of(param: Tensor, state: Mapping[str, Any], group: Mapping[str, Any], partition: Partition) -> Tensor:
    """The whole weight, in new memory; of a DTensor a DTensor placed like it.

    A collective where several ranks share the state: each sends what it has.

    Args:
        param: the parameter.
        state: its state, empty before the first step.
        group: its param group. What state keeps by another setting is dropped by the next step, and here too.
        partition: who holds what of the state.
    """
    master = master_of(state)
    if master is not None and master.dtype != master_dtype(param.dtype, group):
        master = None
    held = local(param).detach()
    whole = torch.empty(held.shape, dtype=torch.float32, device=held.device)
    flat = whole.view(-1)
    if master is None or param not in partition:
        whole.copy_(held)
    elif partition.world.size == 1:
        _put_together(held, local(master).view(-1), 0, flat)
    else:
        layout, world = partition.layout(param), partition.world
        spans = [tuple(map(layout.block_start, span)) for span in partition.spans(param)]
        start, stop = spans[world.rank]
        _put_together(held, master.view(-1), start, flat[start:stop])
        for rank, (low, high) in enumerate(spans):
            if low < high:
                dist.broadcast(flat[low:high], group=world.group, group_src=rank)
    return like(param, whole, param.shape, by_block=False) if is_dtensor(param) else whole


def _put_together(param: Tensor, master: Tensor, start: int, out: Tensor) -> None:
    """The weights of flat elements from ``start`` on, as many as ``master`` has."""
    for low in range(0, master.numel(), TILE):
        part = master[low : low + TILE]
        values = read(param, start + low, start + low + part.numel())
        out[low : low + part.numel()].copy_(rounding.widen(values, part.to(values.device)))
