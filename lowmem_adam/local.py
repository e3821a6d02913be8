"""What a process has of a parameter: all of it, or of a DTensor the part that lies here.

FSDP2 and tensor parallelism hand over DTensors. A part that is whole rows, or whole blocks of a one-dimensional
parameter, is stepped as these blocks of the whole, so with the bits that one process gives. Columns of a matrix are
blocks of their own, numbered from 0 on every rank.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lowmem_adam.layout import BLOCK_SIZE, FLAT, Layout, is_coded

Span = tuple[int, int]
"""Blocks ``[first, end)`` of a layout."""


_PLAIN = (Tensor, Parameter)


@dataclass(frozen=True, slots=True)
class Place:
    """Blocks of a layout that a process has; ``shape`` is that of its tensor."""

    layout: Layout
    span: Span
    shape: tuple[int, ...]


def is_plain(tensor: Any) -> bool:
    """Whether it is a tensor or parameter of no other class."""
    return type(tensor) in _PLAIN


def is_dtensor(tensor: Any) -> bool:
    """Whether it is a DTensor, told without importing them: that takes a second."""
    if type(tensor) in _PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The plain tensor that lies here."""
    if type(tensor) in _PLAIN or not is_dtensor(tensor):
        return tensor
    part: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    return part


def local_gradient(param: Tensor, grad: Tensor) -> Tensor:
    """A gradient's part for a parameter's part; a DTensor that is placed in another way is placed like it first."""
    if is_dtensor(param) and is_dtensor(grad) and grad.placements != param.placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(placements=param.placements)  # type: ignore[attr-defined]
    return local(grad)


def place_of(param: Tensor, moments: str = "8bit") -> Place:
    """Which blocks of a parameter this process has under a ``moments`` setting; those of a DTensor keep to rows."""
    if not is_dtensor(param):
        layout = Layout.of(param.shape, moments)
        return Place(layout, (0, layout.n_blocks), tuple(param.shape))
    # Not public, and what torch.distributed.checkpoint itself places DTensors with.
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    shape, offset = compute_local_shape_and_global_offset(param.shape, mesh, placements)
    shape, offset = tuple(shape), tuple(offset)
    whole = Layout.of(param.shape)
    if 0 in shape:
        return Place(whole, (0, 0), shape)
    if len(shape) >= 2 and shape[1:] == tuple(param.shape[1:]):
        first = offset[0] * whole.blocks_per_row
        return Place(whole, (first, first + shape[0] * whole.blocks_per_row), shape)
    if len(shape) == 1:
        stop = offset[0] + shape[0]
        if offset[0] % BLOCK_SIZE == 0 and (stop % BLOCK_SIZE == 0 or stop == whole.cols):
            return Place(whole, (offset[0] // BLOCK_SIZE, -(-stop // BLOCK_SIZE)), shape)
    part = Layout.of(shape)
    return Place(part, (0, part.n_blocks), shape)


def check_dtensor(param: Any, moments: str, label: str) -> None:
    """Check that a DTensor is placed in a way that can be stepped.

    Raises:
        ValueError: sums that are not yet taken; 8-bit blocks that a cut would go through; blocks that lie flat.
    """
    if moments == FLAT:
        raise ValueError(
            f"{label} is a DTensor and moments is {moments!r}, whose blocks do not keep to rows; accepted for "
            'DTensors: moments="8bit" and moments="32bit"'
        )
    placements = tuple(param.placements)
    for placement in placements:
        if placement.is_partial():
            raise ValueError(f"{label} is a DTensor placed {placements}; accepted: Shard and Replicate")
    coded = moments == "8bit" and is_coded(param.shape)
    if coded and not _aligned_everywhere(param):
        raise ValueError(
            f"{label} of shape {tuple(param.shape)} is a DTensor placed {placements}, which cuts through blocks of "
            f'{BLOCK_SIZE} elements; accepted: cuts between them, or a param group with moments="32bit"'
        )


def _aligned_everywhere(param: Any) -> bool:
    """Whether every cut through the parameter, on all ranks, lies between two blocks."""
    cut = {placement.dim for placement in param.placements if _cuts(placement)}
    if param.ndim < 2:
        plain = all(placement.is_shard() for placement in param.placements if _cuts(placement))
        return not cut or (plain and _chunk(param, 0) % BLOCK_SIZE == 0)
    return cut <= {0} or (cut <= {0, 1} and _chunk(param, 1) * math.prod(param.shape[2:]) % BLOCK_SIZE == 0)


def _cuts(placement: Any) -> bool:
    """Whether it shards a dimension; of the kind that FSDP2 makes of tensor-parallel ones, ``is_shard`` denies it."""
    return hasattr(placement, "dim")


def _chunk(param: Any, dim: int) -> int:
    """What a rank has of a dimension that is cut, but for the last ones: DTensor cuts like torch.chunk."""
    ranks: int = math.prod(
        param.device_mesh.size(axis)
        for axis, placement in enumerate(param.placements)
        if getattr(placement, "dim", None) == dim
    )
    size: int = param.shape[dim]
    chunk: int = -(-size // ranks)
    return chunk


def like(param: Any, part: Tensor, shape: Sequence[int], *, by_block: bool) -> Tensor:
    """A tensor of the state, placed as its parameter.

    Args:
        param: the parameter.
        part: what lies here.
        shape: of the whole.
        by_block: it has an entry a block, ``(rows, blocks_per_row)``; of a one-dimensional parameter that is one row.
    """
    if not is_dtensor(param):
        return part
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    meta = TensorMeta(torch.Size(shape), strides, part.dtype)
    # Not from_local, which moves to the mesh's device: FSDP2 may keep parameters on the host.
    spec = DTensorSpec(param.device_mesh, tuple(_placements(param, by_block)), tensor_meta=meta)
    made: Tensor = DTensor(part, spec, requires_grad=False)  # type: ignore[no-untyped-call]
    return made


def whole_tensor(value: Any) -> Tensor:
    """A DTensor put together on every rank; a collective of its mesh."""
    device = value.device_mesh.device_type
    if local(value).device.type != device:  # state that is offloaded: ranks send from the mesh's device
        return whole_tensor(value.to(device))
    if value.dtype != torch.int16:
        whole: Tensor = value.full_tensor()
        return whole
    # Neither gloo nor NCCL sends these (pytorch issue 74734).
    return whole_tensor(value.to(torch.int32)).to(torch.int16)


def distributed_like(param: Any, value: Tensor, *, by_block: bool) -> Tensor:
    """A whole tensor, which every rank has, placed as its parameter; nothing is sent."""
    if not is_dtensor(param) or is_dtensor(value):
        return value
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(value.shape, param.device_mesh, _placements(param, by_block))
    here = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
    part = value[here].to(device=local(param).device, copy=True, memory_format=torch.contiguous_format)
    return like(param, part, value.shape, by_block=by_block)


def _placements(param: Any, by_block: bool) -> list[Any]:
    from torch.distributed.tensor import Shard

    if by_block and param.ndim == 1:
        return [Shard(1) if _cuts(placement) else placement for placement in param.placements]
    return list(param.placements)


def groups_of(params: Iterable[Any]) -> list[Any]:
    """The process groups that the parts of DTensors are spread over, each once."""
    # In the order of parameters and of a mesh's dimensions, which is the same on all ranks; names are not.
    groups: dict[str, Any] = {}
    for mesh in dict.fromkeys(param.device_mesh for param in params if is_dtensor(param)):
        for group in mesh.get_all_groups():
            groups[group.group_name] = group
    return list(groups.values())
