"""Checks of the tensors that a user hands over: parameters and gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowmem_adam.local import check_dtensor, is_dtensor, local
from lowmem_adam.stand_ins import HostGradient

PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_param(param: Any, label: str) -> None:
    """Check that a parameter is one that can be stepped.

    Raises:
        TypeError: no tensor at all.
        ValueError: another dtype or layout, shared memory, a tensor subclass, a part of an FSDP1 flat parameter.
    """
    if not isinstance(param, Tensor):
        raise TypeError(f"{label} is a {type(param).__name__}; accepted: tensors, or (name, tensor) pairs")
    if param.dtype not in PARAM_DTYPES:
        raise ValueError(f"{label} has dtype {param.dtype}; accepted: {', '.join(map(str, PARAM_DTYPES))}")
    if param.layout != torch.strided:
        raise ValueError(f"{label} has layout {param.layout}; accepted: torch.strided")
    if not is_dtensor(param) and type(param.detach()) is not Tensor:
        raise ValueError(
            f"{label} is a {type(param.detach()).__name__}; accepted: plain tensors and DTensors "
            "(quantized tensor classes are not supported in this version)"
        )
    part = local(param)
    if any(size > 1 and stride == 0 for size, stride in zip(part.shape, part.stride(), strict=True)):
        raise ValueError(
            f"{label} has strides {part.stride()}, so that elements share memory; accepted: an element each"
        )
    # FSDP1 marks its flat parameters, and the views into them that use_orig_params=True hands out. Their shapes are
    # those of one rank's shard, which must not decide what is coded.
    if getattr(param, "_is_flat_param", False) or getattr(param, "_fsdp_flattened", False):
        raise ValueError(
            f"{label} is (part of) an FSDP1 flat parameter; accepted: plain parameters, as under DDP, and DTensors, as "
            "FSDP2's fully_shard makes them"
        )


def check_params(params: Sequence[Any], groups: Sequence[Mapping[str, Any]], moments: str, where: str) -> None:
    """Check the parameters of a new param group.

    Args:
        params: parameters, or (name, parameter) pairs.
        groups: the param groups there are.
        moments: the setting of the new one.
        where: names the new one in errors.

    Raises:
        TypeError: as ``check_param``.
        ValueError: as ``check_param``; also a parameter given twice, here or in another group.
    """
    seen = {id(p): f"param group {g}" for g, group in enumerate(groups) for p in group["params"]}
    for index, entry in enumerate(params):
        name, param = entry if isinstance(entry, tuple) and len(entry) == 2 else (None, entry)
        label = f"{where}, parameter {index}" + (f" ({name!r})" if name else "")
        check_param(param, label)
        if is_dtensor(param):
            check_dtensor(param, moments, label)
        if id(param) in seen:
            raise ValueError(f"{label} is already in {seen[id(param)]}; accepted: each parameter once")
        seen[id(param)] = label


def check_gradient(param: Tensor, grad: Tensor, label: str) -> None:
    """Check that a gradient fits its parameter.

    Raises:
        ValueError: sparse; a tensor subclass; another dtype than the parameter's or float32; another shape or
            device; on the meta device, which holds no values.
    """
    if grad.layout != torch.strided:
        raise ValueError(f"{label}: its gradient has layout {grad.layout}; accepted: dense (torch.strided) gradients")
    kind, accepted_kind = (_kind_of(tensor) for tensor in (grad, param))
    if kind != accepted_kind and not (kind == "Tensor" and accepted_kind == "Parameter"):
        raise ValueError(f"{label}: its gradient is a {kind}; accepted: a {accepted_kind}, like its parameter")
    if is_dtensor(grad) and grad.device_mesh != param.device_mesh:  # type: ignore[attr-defined]
        raise ValueError(f"{label}: its gradient lies on another device mesh; accepted: its parameter's")
    accepted = tuple(dict.fromkeys((param.dtype, torch.float32)))
    if grad.dtype not in accepted:
        raise ValueError(f"{label}: its gradient has dtype {grad.dtype}; accepted: {', '.join(map(str, accepted))}")
    if grad.shape != param.shape:
        raise ValueError(f"{label}: its gradient has shape {tuple(grad.shape)}; accepted: {tuple(param.shape)}")
    if grad.device != param.device:
        raise ValueError(f"{label}: its gradient is on {grad.device}; accepted: {param.device}")
    if param.is_meta:
        raise ValueError(f"{label} is on the meta device; accepted: a device that holds values")


def _kind_of(tensor: Tensor) -> str:
    if is_dtensor(tensor):
        return "DTensor"
    return "Tensor" if isinstance(tensor, HostGradient) else type(tensor.detach()).__name__


def check_devices(state: Mapping[str, Tensor], home: torch.device, counted: torch.device, label: str) -> None:
    """Check that state lies where it belongs: ``step`` where steps are counted, all else at home.

    Raises:
        ValueError: a tensor elsewhere.
    """
    for key, tensor in state.items():
        accepted = counted if key == "step" else home
        if tensor.device != accepted:
            raise ValueError(f"{label}: {key} is on {tensor.device}; accepted: {accepted}")


def is_finite(grad: Tensor, factor: float) -> bool:
    """Whether all elements times a factor are, without a temporary of the gradient's size."""
    if grad.numel() == 0:
        return True
    largest = torch.linalg.vector_norm(grad, float("inf"), dtype=torch.float32)
    return bool((largest * factor).isfinite())
