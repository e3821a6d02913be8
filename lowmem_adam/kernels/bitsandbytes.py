"""The step of ``moments="bnb8bit"`` by bitsandbytes' own operators, ``torch.ops.bitsandbytes``: on CUDA what it is for.

The same state and the same formulas as our own step, but not the same bits. Its CUDA kernel divides approximately,
decays the weight after the update instead of before, and moves the code of a first moment that would have lost its sign
by one. Its CPU kernel finds codes by a table of 65,536 bins over [-1, 1], which moves values by up to 1.5e-5 of their
block's absmax: 0 becomes 1.56e-5 of it, or 2.1e-5 in the signed map. A gradient that is not finite leaves its element
and zeroes the element's moments on CUDA, and propagates on the CPU.

bitsandbytes is imported when it is first needed; importing it takes seconds.

Source: bitsandbytes 0.50.2, ``backends/{cpu,cuda}/ops.py``; its ``csrc/kernels.cu``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowmem_adam.dynamic_map import dynamic_map
from lowmem_adam.kernels.fragment import CodedMoments, DynamicMoments, Fragment, StepScalars, Work
from lowmem_adam.layout import FLAT, FLAT_BLOCK_SIZE

OPERATORS = ("optimizer_update_8bit_blockwise", "optimizer_update_32bit")

MOST_ELEMENTS = 1 << 30
"""Of a tensor that an operator gets at a time: it counts them in 32 bits."""


@functools.cache
def _problem() -> str | None:
    """Why there are no operators; None where there are."""
    try:
        import bitsandbytes
    except Exception as error:  # noqa: BLE001 (what a broken installation raises is its own)
        return f"bitsandbytes cannot be imported ({type(error).__name__}: {error})"
    missing = [name for name in OPERATORS if not hasattr(torch.ops.bitsandbytes, name)]
    if missing:
        return f"bitsandbytes {bitsandbytes.__version__} has no operator {' and no '.join(missing)} (0.50.2 has)"
    return None


def _refusal(group: Mapping[str, Any] | None, dtype: torch.dtype) -> str | None:
    """What of a group's settings the operators cannot do, and what is accepted instead; None for nothing."""
    if group is None or group["moments"] != FLAT:
        return f"moments is {'8bit' if group is None else group['moments']!r}; accepted: {FLAT!r}"
    if group["nonfinite"] == "skip":
        return "nonfinite is 'skip'; accepted: 'error' and 'propagate'"
    if group["weight_decay"] and not group["decoupled_weight_decay"]:
        return f"weight_decay is {group['weight_decay']!r} as L2; accepted: 0, or AdamW8bit, which decouples it"
    if dtype != torch.float32 and group["low_precision_update"] != "nearest":
        return f"low_precision_update is {group['low_precision_update']!r} for a {dtype} parameter; accepted: 'nearest'"
    return None


def why_not(group: Mapping[str, Any] | None, dtype: torch.dtype) -> str | None:
    """Why the operators cannot step a param group's parameters of a dtype; None where they can."""
    return _refusal(group, dtype) or _problem()


def check(group: Mapping[str, Any] | None, dtype: torch.dtype) -> None:
    """Check that the operators can step a param group.

    Raises:
        ValueError: a setting that they do not have; names what is accepted.
        RuntimeError: bitsandbytes is not there, or has no such operators.
    """
    if refusal := _refusal(group, dtype):
        raise ValueError(f'backend is "bitsandbytes" and {refusal}')
    if problem := _problem():
        raise RuntimeError(f'backend is "bitsandbytes", and {problem}; accepted: backend="reference" or None')


@functools.cache
def _map_on(signed: bool, device: torch.device) -> Tensor:
    return dynamic_map(signed).to(device, copy=True)  # the operator's schema says that it may write


def adam_steps_(work: Sequence[Work]) -> int:
    """One step of many fragments with ``DynamicMoments`` or ``FullMoments``, in place; one operator call for each.

    Returns:
        0: no blocks are skipped.
    """
    for fragment, scalars in work:
        _step_(fragment, scalars)
    return 0


def _step_(fragment: Fragment, scalars: StepScalars) -> None:
    assert not isinstance(fragment.moments, CodedMoments)
    assert fragment.layout.block_size == FLAT_BLOCK_SIZE
    assert fragment.master is None
    # As bitsandbytes' optimizers do, but the parameter stays where it is.
    param, grad = fragment.param.contiguous(), fragment.grad.contiguous()
    for low in range(0, param.numel(), MOST_ELEMENTS):
        high = min(low + MOST_ELEMENTS, param.numel())
        _call(param.view(-1)[low:high], grad.view(-1)[low:high], _part(fragment, low, high), scalars)
    if param.data_ptr() != fragment.param.data_ptr():
        fragment.param.copy_(param)


def _part(fragment: Fragment, low: int, high: int) -> list[Tensor]:
    first, second, *scales = (tensor.view(-1) for tensor in fragment.moments)
    blocks = slice(low // FLAT_BLOCK_SIZE, -(-high // FLAT_BLOCK_SIZE))
    return [first[low:high], second[low:high], *(scale[blocks] for scale in scales)]


def _call(param: Tensor, grad: Tensor, moments: Sequence[Tensor], s: StepScalars) -> None:
    operators: Any = torch.ops.bitsandbytes
    factor = -s.grad_scale if s.maximize else s.grad_scale
    if len(moments) == len(DynamicMoments._fields):
        state1, state2, absmax1, absmax2 = moments
        maps = (_map_on(signed, param.device) for signed in (True, False))
        operators.optimizer_update_8bit_blockwise(
            "adam", grad, param, state1, state2, s.beta1, s.beta2, 0.0, 0.0, s.plain_eps, s.step, s.lr, *maps,
            absmax1, absmax2, s.decoupled_decay, factor, False,
        )  # fmt: skip
    else:
        operators.optimizer_update_32bit(
            "adam", grad, param, *moments, None, 0.0, 0.0, s.beta1, s.beta2, 0.0, 0.0, s.plain_eps, s.decoupled_decay,
            s.step, s.lr, factor, False,
        )  # fmt: skip
