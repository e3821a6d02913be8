"""Gradients that are reduced to where they are stepped: every rank gets the mean of its shard's, and no others.

Plain data parallelism sums all gradients on all ranks, which sends each of them twice; the gather of parameters after a
sharded step sends each parameter once more. Here a gradient is sent once, to the rank that steps it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lowmem_adam.shard import Partition, read, write


def reduce_scatter(params: Sequence[Tensor], grads: Sequence[Tensor], buffer: Tensor, partition: Partition) -> Tensor:
    """Replace this rank's shard of some gradients by the mean over ranks, all others by NaN; a collective.

    The means are summed in float32, in the order of the ranks, and rounded once. NaN, since what else could stand for
    a gradient that is not here would be taken for one: a norm of all of them becomes NaN, and not just wrong.

    Args:
        params: parameters, all of them in the partition.
        grads: their gradients, views into the buffer, as ``GradBucket.gradients()`` gives them.
        buffer: one dimension.
        partition: who steps what.

    Returns:
        The buffer.
    """
    world = partition.world
    if world.group is None:
        return buffer
    parts = [[*_parts(params, grads, partition, rank)] for rank in range(world.size)]
    counts = [sum(stop - start for _, start, stop in of_rank) for of_rank in parts]
    send = torch.cat([read(grad, start, stop) for of_rank in parts for grad, start, stop in of_rank])
    own = parts[world.rank]
    received = torch.empty(world.size * counts[world.rank], dtype=send.dtype, device=send.device)
    size = send.element_size()
    # As bytes, since not every backend knows every dtype.
    dist.all_to_all_single(
        received.view(torch.uint8),
        send.view(torch.uint8),
        [size * counts[world.rank]] * world.size,
        [size * count for count in counts],
        group=world.group,
    )
    del send
    mean = _mean(received.view(world.size, -1))
    buffer.fill_(torch.nan)
    offset = 0
    for grad, start, stop in own:
        write(grad, start, stop, mean[offset : offset + stop - start])
        offset += stop - start
    return buffer


def _parts(
    params: Sequence[Tensor], grads: Sequence[Tensor], partition: Partition, rank: int
) -> Iterator[tuple[Tensor, int, int]]:
    """The gradients of a rank's shard, as flat elements ``[start, stop)`` of each."""
    for param, grad in zip(params, grads, strict=True):
        layout, (first, end) = partition.layout(param), partition.span(param, rank)
        if first < end:
            if _lies_permuted(param):
                # What DDP calls the gradient is the memory as if it were row-major; it lies as the parameter does.
                grad = grad.as_strided(param.shape, param.stride(), grad.storage_offset())
            yield grad, layout.block_start(first), layout.block_start(end)


def _lies_permuted(param: Tensor) -> bool:
    """Whether the elements fill their memory, in another order than row by row."""
    reach = sum((size - 1) * stride for size, stride in zip(param.shape, param.stride(), strict=True)) + 1
    return reach == param.numel() and not param.is_contiguous()


def _mean(rows: Tensor) -> Tensor:
    """Mean of rows, summed in their order."""
    total = rows[0].to(torch.float32)
    for row in rows[1:]:
        total = total + row
    return (total / len(rows)).to(rows.dtype)


def norm_of_shards(params: Sequence[Tensor], partition: Partition, norm_type: float) -> Tensor:
    """The norm of all gradients, of which each rank has its shard; a collective.

    Returns:
        A scalar, the same on all ranks.
    """
    norm_type = float(norm_type)
    pieces = [(p.grad, partition.own(p)) for p in params if p.grad is not None and p in partition]
    own = [read(grad, piece.start, piece.stop) for grad, piece in pieces if piece.start < piece.stop]
    norm = torch.nn.utils.get_total_norm(own, norm_type).to(device=partition.device, dtype=torch.float32)
    if partition.world.group is None:
        return norm
    largest = norm_type == float("inf")
    norm = norm if largest else norm**norm_type
    dist.all_reduce(norm, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=partition.world.group)
    return norm if largest else norm ** (1.0 / norm_type)
