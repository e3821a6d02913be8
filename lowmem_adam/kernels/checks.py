"""What kernels that work on addresses take on trust about a fragment, and how its tensors lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from lowmem_adam.kernels.fragment import CodedMoments, DynamicMoments, Fragment
from lowmem_adam.layout import BLOCK_SIZE, FLAT_BLOCK_SIZE

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MASTER_DTYPES = (torch.float32, torch.int16, torch.int8)
_BLOCK_SIZES = {
    "CodedMoments": (BLOCK_SIZE,),
    "DynamicMoments": (FLAT_BLOCK_SIZE,),
    "FullMoments": (BLOCK_SIZE, FLAT_BLOCK_SIZE),
}


def merged_dimensions(tensor: Tensor) -> list[tuple[int, int]]:
    """Sizes and strides of a tensor, outermost first, with dimensions that run on in memory taken together."""
    merged: list[tuple[int, int]] = []
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return merged or [(1, 1)]


def check(fragment: Fragment, device: torch.device) -> None:
    """Check everything about parameter, moments and master that a kernel takes on trust.

    Raises:
        ValueError: another device, dtype or size, or moments that are not contiguous.
    """
    param, moments, layout = fragment.param, fragment.moments, fragment.layout
    numel = layout.block_start(fragment.end_block) - layout.block_start(fragment.first_block)
    if param.dtype not in _DTYPES or param.numel() != numel or param.device != device:
        raise ValueError(
            f"parameter of dtype {param.dtype} has {param.numel()} elements on {param.device}; "
            f"accepted: {', '.join(map(str, _DTYPES))}, {numel}, {device}"
        )
    blocks = fragment.end_block - fragment.first_block
    held: tuple[tuple[str, torch.dtype, int], ...]
    if isinstance(moments, CodedMoments):
        held = (
            ("exp_avg_code", torch.int8, numel),
            ("exp_avg_sq_code", torch.uint8, numel),
            ("block_floor", torch.uint8, blocks),
            ("block_span", torch.uint8, blocks),
        )
    elif isinstance(moments, DynamicMoments):
        held = (
            ("state1", torch.uint8, numel),
            ("state2", torch.uint8, numel),
            ("absmax1", torch.float32, blocks),
            ("absmax2", torch.float32, blocks),
        )
    else:
        held = (("exp_avg", torch.float32, numel), ("exp_avg_sq", torch.float32, numel))
    sizes = _BLOCK_SIZES[type(moments).__name__]
    if layout.block_size not in sizes:
        raise ValueError(
            f"layout has blocks of {layout.block_size} elements for {type(moments).__name__}; accepted: "
            f"{' or '.join(map(str, sizes))}"
        )
    tensors: tuple[Tensor, ...] = moments
    master = fragment.master
    if master is not None:
        if param.dtype == torch.float32 or master.dtype not in _MASTER_DTYPES:
            raise ValueError(
                f"master of dtype {master.dtype} for a parameter of dtype {param.dtype}; accepted: "
                f"{', '.join(map(str, _MASTER_DTYPES))} for one of torch.bfloat16 or torch.float16"
            )
        held, tensors = (*held, ("master", master.dtype, numel)), (*moments, master)
    for (name, dtype, elements), tensor in zip(held, tensors, strict=True):
        placed = tensor.is_contiguous() and tensor.device == device
        if tensor.dtype != dtype or tensor.numel() != elements or not placed:
            raise ValueError(
                f"{name} of dtype {tensor.dtype} has {tensor.numel()} elements on {tensor.device}, contiguous: "
                f"{tensor.is_contiguous()}; accepted: {dtype}, {elements}, {device}, contiguous"
            )
