"""The step on an accelerator: all fragments of a kind in one launch of a Triton kernel.

Here is what the host does for it. Fragments are sorted by kind and described in tables (``tables``), which are sent
once and hold until something changes; a step sends the addresses of gradients and the hyperparameters, in one copy. The
kernels are in ``gpu.step``, which is imported with the first step: a machine without Triton needs it not.

Where steps are counted on the device (``DeviceStep``), a kernel makes the hyperparameters of a step, and in a CUDA
graph kernels write down the addresses too, so that a replay steps on.

With ``TRITON_INTERPRET=1`` in the environment from the start, kernels run on the CPU, interpreted.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor

from lowmem_adam.kernels import checks, reference
from lowmem_adam.kernels.fragment import AnyWork, Batch, DeviceStep, Work
from lowmem_adam.kernels.tables import Kind, Plan, capturing, step_code

LEAST_CAPABILITY = (7, 0)
"""Of NVIDIA's devices, those that Triton compiles for."""

MOST_REGISTERS = 168
"""Of a thread, on NVIDIA: 65,536 of a multiprocessor, by eights, for six programs of two warps."""

ALL_REGISTERS = 255
"""Of a thread, on NVIDIA, that there are."""

_MOST_PLANS = 4
"""Descriptions that are kept, of steps in which other parameters have gradients."""


class TritonError(RuntimeError):
    """There is no Triton for a device."""


def interpreted() -> bool:
    """Whether kernels run on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_not(device: torch.device) -> str | None:
    """Why kernels cannot run on CUDA devices like this one; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return (
            "Triton is not installed; it comes with torch for CUDA and ROCm on Linux, on Windows it is triton-windows"
        )
    if device.type == "cuda" and interpreted():
        return "TRITON_INTERPRET=1 has kernels run on the CPU"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device)
        if capability < LEAST_CAPABILITY:
            return f"Triton serves compute capabilities from {LEAST_CAPABILITY}, and this device has {capability}"
    return None


def check_available(device: torch.device) -> None:
    """Check that kernels can run on a device.

    Raises:
        TritonError: Triton is not installed, or does not serve this device.
        ValueError: parameters on another kind of device.
    """
    if device.type != ("cpu" if interpreted() else "cuda"):
        accepted = "the CPU, with TRITON_INTERPRET=1" if interpreted() else "CUDA devices"
        raise ValueError(f'backend is "triton" for a parameter on {device}; accepted: parameters on {accepted}')
    if reason := why_not(device):
        raise TritonError(f'backend is "triton", and {reason}')


# ---------------------------------------------------------------- the step


def check_walkable(tensor: Tensor, label: str) -> None:
    """Check that kernels can step a parameter, or read a gradient, where it lies, as ``capturable`` needs it.

    Raises:
        ValueError: a negative view, or too many dimensions that do not run on in memory.
    """
    dims = 0 if tensor.is_contiguous() else len(checks.merged_dimensions(tensor))
    if tensor.is_neg() or dims > step_code().MAX_DIMS:
        raise ValueError(
            f"{label} has strides {tensor.stride()}, {dims} dimensions that do not run on in memory"
            f"{' and the sign bit of a view' if tensor.is_neg() else ''}, and capturable is True; accepted with it: "
            f"up to {step_code().MAX_DIMS} such dimensions and no negative views"
        )


def adam_step_(work: Sequence[AnyWork]) -> Tensor:
    """One Adam step on many fragments, in place, as ``reference.adam_step_`` to the last bit.

    Args:
        work: fragments on one device and their hyperparameters: ``StepScalars``, or for all of them ``DeviceStep``.

    Returns:
        The number of blocks left as they were for a non-finite gradient, int64 scalar on the device.

    Raises:
        ValueError: a fragment of another device, dtype or size; nothing has changed.
        RuntimeError: in a CUDA graph capture, fragments that no step outside of it has described.
    """
    if not work:
        return torch.zeros((), dtype=torch.int64)
    device = work[0][0].param.device
    # The memory of a negative view has another sign than its values.
    if not isinstance(work, Batch) and any(fragment.grad.is_neg() for fragment, _ in work):
        work = [(fragment._replace(grad=fragment.grad.resolve_neg()), scalars) for fragment, scalars in work]
    with _on(device):
        plan = _plan_of(work, device)
        skipped, gradients, records = plan.tables(work)
        words = records.view(torch.int32)
        for kind, programs in plan.launches:
            step_code().adam_step_kernel[(len(programs),)](
                programs,
                plan.fragments,
                gradients,
                records,
                words,
                skipped,
                *kind,
                kind.coded and _is_nvidia(device),
                num_warps=step_code().NUM_WARPS,
                enable_fp_fusion=False,  # a fused multiply-add rounds once where the reference does twice
                **_register_options(kind, device),
            )
        for place in plan.left_over:
            skipped += reference.adam_step_(*cast("Work", work[place]))
    return skipped


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Kernels are launched on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _is_nvidia(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None


def _register_options(kind: Kind, device: torch.device) -> dict[str, int]:
    """Unasked, NVIDIA's assembler spills some kernels to get down to 128 registers, or takes too many."""
    code = step_code()
    if not _is_nvidia(device):
        return {}
    if kind.layout == code.WHOLE.value:
        return {"maxnreg": MOST_REGISTERS} if not kind.coded or kind.wide else {}
    loose = kind.layout in (code.ANY.value, code.STRIDED.value)
    return {"maxnreg": ALL_REGISTERS} if kind.coded and loose else {}


def _plan_of(work: Sequence[AnyWork], device: torch.device) -> Plan:
    """From the batch, or else the first fragment's cache, if it has one and what it keeps is of these fragments."""
    if not isinstance(work, Batch):
        return _plan_in(work[0][0].cache, work, device)
    plan: Plan | None = work.kept.get("triton")
    if plan is None or not plan.fits_batch(work):
        plan = work.kept["triton"] = _plan_in(work[0][0].cache, work, device)
    return plan


def _plan_in(cache: dict[str, Any] | None, work: Sequence[AnyWork], device: torch.device) -> Plan:
    plans: list[Plan] = [] if cache is None else cache.setdefault("triton", [])
    plan = next((plan for plan in plans if plan.fits(work)), None)
    if capturing():
        if plan is None:
            raise RuntimeError(
                "a step in a CUDA graph capture that is not like any taken before it; accepted: captures of a step "
                "that was taken before with the same parameters, settings and kinds of gradients: dtypes, strides, "
                "and whether they begin at a multiple of 16 bytes"
            )
        cast("DeviceStep", work[0][1]).captured.append(plan)  # its tables are read at every replay
    elif plan is None:
        plan = Plan(work, device)
        del plans[_MOST_PLANS - 1 :]
        plans.insert(0, plan)
    elif plan is not plans[0]:
        plans.remove(plan)
        plans.insert(0, plan)
    return plan
