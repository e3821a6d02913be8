"""Backends of the step, by name.

A backend is a function ``step_(work) -> skipped blocks`` that steps many fragments in place; all give the same bits as
``reference.adam_step_`` on one after the other. The count is a tensor where reading it would wait for a device.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lowmem_adam.kernels import cpu, reference, triton

Backend = Callable[[Sequence[Any]], Tensor | int]

BACKENDS: dict[str, Backend] = {
    "cpu": cpu.adam_step_,
    "triton": triton.adam_step_,
    "reference": reference.adam_steps_,
}


def choose(backend: str | None, device: torch.device) -> str:
    """The name of the backend for parameters on a device; ``None`` takes the best there is.

    Raises:
        LibraryError: ``"cpu"``, and the native library cannot be loaded.
        TritonError: ``"triton"``, and it is not installed.
        ValueError: ``"cpu"`` or ``"triton"`` for parameters elsewhere.
    """
    if backend == "cpu":
        if device.type != "cpu":
            raise ValueError(f'backend is "cpu" for a parameter on {device}; accepted: parameters on the CPU')
        cpu.load()
    if backend == "triton":
        triton.check_available(device)
    if backend is not None:
        return backend
    if device.type == "cuda" and _triton_or_warning():
        return "triton"
    return "cpu" if device.type == "cpu" and _native_or_warning() else "reference"


@functools.cache
def _triton_or_warning() -> bool:
    """Whether Triton is installed; where it is not, one warning says what that costs."""
    if triton.available(torch.device("cuda")):
        return True
    warnings.warn(
        "Triton is not installed; steps on CUDA devices take the reference backend, which is many times slower and "
        "needs more memory. It comes with torch for CUDA and ROCm on Linux; on Windows it is triton-windows.",
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
