"""Backends of the step, by name.

A backend is a function ``adam_step_(fragment, scalars) -> skipped blocks``; all give the same bits as
``reference.adam_step_``.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lowmem_adam.kernels import reference
from lowmem_adam.kernels.fragment import Fragment, StepScalars

Kernel = Callable[[Fragment, StepScalars], Tensor]

BACKENDS: dict[str, Kernel] = {"reference": reference.adam_step_}


def choose(backend: str | None) -> Kernel:
    """The kernel of a backend by name; ``None`` takes the best there is."""
    return BACKENDS[backend or "reference"]
