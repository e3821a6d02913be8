"""Backends of the step, by name.

A backend is a function ``step_(work) -> skipped blocks`` that steps many fragments in place; all but ``"bitsandbytes"``
give the same bits as ``reference.adam_step_`` on one after the other. The count is a tensor where reading it would wait
for a device.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowmem_adam.kernels import bitsandbytes, cpu, reference, triton
from lowmem_adam.layout import FLAT

Backend = Callable[[Sequence[Any]], Tensor | int]

BACKENDS: dict[str, Backend] = {
    "cpu": cpu.adam_step_,
    "triton": triton.adam_step_,
    "reference": reference.adam_steps_,
    "bitsandbytes": bitsandbytes.adam_steps_,
}


def choose(
    backend: str | None, device: torch.device, group: Mapping[str, Any] | None = None, dtype: torch.dtype | None = None
) -> str:
    """The name of the backend for parameters on a device; ``None`` takes the best there is.

    Args:
        backend: the setting.
        device: where they are stepped.
        group: their param group, of which bitsandbytes' operator cannot do everything; None for ``moments="8bit"``.
        dtype: of the parameters; None for float32.

    Raises:
        LibraryError: ``"cpu"``, and the native library cannot be loaded.
        TritonError: ``"triton"``, and it is not installed.
        RuntimeError: ``"bitsandbytes"``, and it cannot be imported.
        ValueError: ``"cpu"`` or ``"triton"`` for parameters elsewhere; ``"bitsandbytes"`` or ``"triton"`` for what it
            cannot do.
    """
    dtype = dtype or torch.float32
    flat = group is not None and group["moments"] == FLAT
    if backend == "bitsandbytes":
        bitsandbytes.check(group, dtype)
    if backend == "triton" and flat:
        raise ValueError(f'backend is {backend!r} and moments is {FLAT!r}; accepted: None, "bitsandbytes", "reference"')
    if backend == "cpu":
        if device.type != "cpu":
            raise ValueError(f'backend is "cpu" for a parameter on {device}; accepted: parameters on the CPU')
        cpu.load()
    if backend == "triton":
        triton.check_available(device)
    if backend is not None:
        return backend
    if device.type == "cuda" and flat:
        return "bitsandbytes" if _bitsandbytes_or_warning(bitsandbytes.why_not(group, dtype)) else "reference"
    if device.type == "cuda" and _triton_or_warning(device):
        return "triton"
    return "cpu" if device.type == "cpu" and _native_or_warning() else "reference"


def of_gradient(chosen: str, backend: str | None, param: Tensor, grad: Tensor, label: str) -> str:
    """The chosen backend, or another one where it cannot take a gradient and ``backend`` leaves the choice.

    Raises:
        ValueError: the setting asks for bitsandbytes' operator, and the gradient has another dtype than its parameter.
    """
    if chosen != "bitsandbytes" or grad.dtype == param.dtype:
        return chosen
    if backend is not None:
        raise ValueError(
            f"{label}: its gradient has dtype {grad.dtype} and backend is {backend!r}; accepted: {param.dtype}, like "
            'its parameter, or backend="reference"'
        )
    return "reference"


@functools.cache
def _bitsandbytes_or_warning(reason: str | None) -> bool:
    """Whether bitsandbytes' operator can be used on a CUDA device; where it cannot, one warning says why."""
    if reason is not None:
        warnings.warn(
            f"moments is {FLAT!r}, and steps on CUDA devices take the reference backend, hundreds of times slower than "
            f"bitsandbytes' operator: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
    return reason is None


@functools.cache
def _triton_or_warning(device: torch.device) -> bool:
    """Whether Triton can step there; where it cannot, one warning says why and what that costs."""
    reason = triton.why_not(device)
    if reason is None:
        return True
    warnings.warn(
        f"{reason}; steps on {device} take the reference backend, which is many times slower and needs more memory",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


@functools.cache
def _native_or_warning() -> bool:
    """Whether the native library can be used; where it cannot, one warning says why, unless that was asked for."""
    try:
        cpu.load()
    except cpu.LibraryError as error:
        if os.environ.get("LOWMEM_ADAM_LIBRARY") != "none":
            warnings.warn(
                f"{error}; steps on the CPU take the reference backend, which is some fifty times slower. "
                "Installing again with a C++ compiler builds it.",
                RuntimeWarning,
                stacklevel=2,
            )
        return False
    return True
