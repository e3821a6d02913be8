"""Backends of the step, by name.

A backend is a function ``step_(work) -> skipped blocks`` that steps many fragments in place; all give the same bits as
``reference.adam_step_`` on one after the other. The count is a tensor where reading it would wait for a device.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lowmem_adam.kernels import cpu, reference
from lowmem_adam.kernels.fragment import Work

Backend = Callable[[Sequence[Work]], Tensor | int]

BACKENDS: dict[str, Backend] = {"cpu": cpu.adam_step_, "reference": reference.adam_steps_}


def choose(backend: str | None, device: torch.device) -> str:
    """The name of the backend for parameters on a device; ``None`` takes the best there is.

    Raises:
        LibraryError: ``"cpu"``, and the native library cannot be loaded.
        ValueError: ``"cpu"`` for parameters elsewhere.
    """
    if backend == "cpu":
        if device.type != "cpu":
            raise ValueError(f'backend is "cpu" for a parameter on {device}; accepted: parameters on the CPU')
        cpu.load()
    if backend is not None:
        return backend
    return "cpu" if device.type == "cpu" and _native_or_warning() else "reference"


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
