"""Bytes of other optimizers, by the formats that they document or that were measured.

On ranks that share nothing (plain data parallelism) each holds the whole, as these optimizers do by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from lowmem_adam.plan.model import Weight
from lowmem_adam.plan.ours import flat_moments
from lowmem_adam.plan.settings import Row, Settings

Moments = Callable[[Weight, int], int]
"""Of the moments of a parameter whose elements take so many bytes where they are stepped."""

SUB_GROUP = 10**9
"""Elements of DeepSpeed's ``sub_group_size``; 0.19.8, ``runtime/zero/config.py``."""
MAX_LIVE = 10**9
"""Its ``stage3_max_live_parameters``: elements that may be there gathered at one time."""


def peers(weights: Sequence[Weight], settings: Settings) -> list[Row]:
    """One row for each optimizer that others have, DeepSpeed's three stages included."""
    return [
        _plain("torch AdamW, fused", weights, settings, _torch, "16-bit moments, updates rounded to nearest"),
        _plain("bitsandbytes AdamW8bit", weights, settings, _bitsandbytes, "updates rounded to nearest", once=2048),
        _plain("torchao AdamW8bit", weights, settings, _torchao, _rounding_of_torchao(settings), host_step=4),
        _flashoptim(weights, settings),
        *(zero_row(weights, settings, stage) for stage in (1, 2, 3)),
    ]


# ---------------------------------------------------------------- on one device


def _torch(weight: Weight, size: int) -> int:
    # torch.optim.AdamW: two tensors like the parameter; with fused=True the step is a float32 on its device.
    return 2 * size * weight.numel + 4


def _bitsandbytes(weight: Weight, size: int) -> int:
    # bitsandbytes 0.50, optim/optimizer.py: two codes, and a float32 for each 256 elements of either; float32 below
    # min_8bit_size=4096. Its two maps of 256 floats are shared by all parameters (`once`).
    if weight.numel < 4096:
        return 8 * weight.numel
    return 2 * weight.numel + 8 * math.ceil(weight.numel / 256)


def _torchao(weight: Weight, size: int) -> int:
    # torchao 0.18, optim/adam.py and subclass_8bit.py: what has at least 4096 elements and whole blocks of 256 is
    # coded, everything else like the parameter; each coded moment has its own map of 256 floats.
    if weight.numel < 4096 or weight.numel % 256:
        return 2 * size * weight.numel
    return 2 * weight.numel + 8 * (weight.numel // 256) + 2 * 256 * 4


def _plain(
    name: str,
    weights: Sequence[Weight],
    settings: Settings,
    moments: Moments,
    narrow: str,
    once: int = 0,
    host_step: int = 0,
) -> Row:
    """An optimizer without float32 weights of its own; where they are asked for, it steps a float32 copy.

    Args:
        name: of the optimizer.
        weights: with dtypes.
        settings: of the plan.
        moments: bytes of a parameter's moments.
        narrow: what is to be known of it where it steps 16-bit parameters as they are.
        once: bytes that it holds besides.
        host_step: bytes of a parameter's step counter on the host.
    """
    row = Row(name)
    for weight in weights:
        size = _itemsize(weight)
        copied = settings.keeps_weights and size < 4
        row.device.parameters += size * weight.numel
        row.device.gradients += size * weight.numel
        row.device.master += 4 * weight.numel if copied else 0
        # The copy's gradients: the parameters' widened before the step (benchmarks/gpu_contestants.py, OnWeights).
        row.device.transient += 4 * weight.numel if copied else 0
        row.device.moments += moments(weight, 4 if copied else size)
        row.host.moments += host_step
    row.device.moments += once
    if row.device.master:
        row.note = "float32 weights beside the parameters, gradients widened for the step"
    elif any(_itemsize(weight) < 4 for weight in weights):
        row.note = narrow
    return row


def _rounding_of_torchao(settings: Settings) -> str:
    stochastic = settings.low_precision_update == "stochastic"
    return "bf16_stochastic_round=True" if stochastic else "updates rounded to nearest"


def _flashoptim(weights: Sequence[Weight], settings: Settings) -> Row:
    """FlashOptim's FlashAdamW: codes, and an fp16 scale for each 32 elements of either moment.

    arXiv 2602.23349; written out in benchmarks/peer_formats.py, and measured on its own package at 2.125 bytes a
    parameter, 3.125 with 24-bit weights (benchmarks/results/gpu.md). A parameter's weight takes 1 byte more for 24 bits
    and 2 for 32, none in float32. Counters of steps are not counted.
    """
    row = Row("FlashOptim FlashAdamW")
    bits = {"nearest": None, "stochastic": 24, "split": settings.master_bits, "fp32": 32}[settings.low_precision_update]
    for weight in weights:
        size = _itemsize(weight)
        row.device.parameters += size * weight.numel
        row.device.gradients += size * weight.numel
        row.device.moments += 2 * weight.numel + 4 * math.ceil(weight.numel / 32)
        if size < 4 and bits is not None:
            row.device.master += weight.numel * (bits - 16) // 8
    row.note = f"master_weight_bits={bits}" if any(_itemsize(weight) < 4 for weight in weights) else ""
    return row


def _itemsize(weight: Weight) -> int:
    assert weight.dtype is not None
    return weight.dtype.itemsize


# ---------------------------------------------------------------- DeepSpeed


def zero_row(weights: Sequence[Weight], settings: Settings, stage: int, moments: str | None = None) -> Row:
    """ZeRO with the Adam of DeepSpeed, or with ours.

    deepspeed 0.19.8, ``runtime/zero/stage_1_and_2.py`` and ``stage3.py``, with the defaults of its config but for the
    bucket: flat partitions of equal size, their fp32 weights, gradients whole (stage 1) or this rank's (2, 3). What is
    transient is the most that is held beside the other kinds at one time: the bucket and, in stage 3, parameters that
    are gathered, in the backward pass; gradients put together and widened in the step.

    Args:
        weights: with dtypes; DeepSpeed casts a model to one, 16 bits unless all are float32.
        settings: of the plan.
        stage: 1, 2 or 3.
        moments: our setting; None for fp32 moments.
    """
    row = Row(f"DeepSpeed stage {stage}" + ("" if moments is None else ", lowmem_adam"))
    ranks, numel = settings.world_size, sum(weight.numel for weight in weights)
    size = 4 if all(_itemsize(weight) == 4 for weight in weights) else 2
    largest = max(weight.numel for weight in weights)
    parts = _parts(weights, ranks, stage)
    part = sum(parts)
    home = row.host if settings.offload else row.device
    row.device.parameters = size * (part if stage == 3 else part * ranks)
    home.master = 4 * part  # the weights of a float32 model are copied too (measured: tests/test_plan_measured.py)
    if moments is None:
        home.moments = 8 * part
    else:
        home.moments, counters = flat_moments(parts, moments)
        row.host.moments += counters
    if stage == 3:
        home.gradients = size * part
    elif stage == 2:
        row.device.gradients = 0 if settings.offload else size * part  # with offload they go to the host one by one
    else:
        row.device.gradients = size * (max(0, numel - part) if settings.offload else numel)
    bucket = size * settings.zero_bucket
    if settings.offload:
        row.host.gradients += 4 * part
        row.host.transient = size * (part + largest) if stage < 3 else 0  # parameters on their way back; a gradient
        bucket += size * largest
    # A rank's gradients are put together, and widened, for the step: in stage 3 those of a sub-group at a time.
    widened = 0 if settings.offload else (size + (4 if size < 4 else 0)) * (max(parts) if stage == 3 else part)
    if stage == 3:
        row.device.transient = bucket + max(size * min(numel, MAX_LIVE), widened)
    else:
        # The gradients of others are freed before that, and the bucket at the end of the backward pass.
        others = max(0, row.device.gradients - size * part)
        row.device.transient = max(bucket, widened - others)
    row.note = f"reduce_bucket_size {settings.zero_bucket:,}" + (
        ", offload_optimizer on the cpu" if settings.offload else ""
    )
    return row


def _parts(weights: Sequence[Weight], ranks: int, stage: int) -> list[int]:
    """Elements of a rank's flat partitions, which are the tensors that the optimizer gets."""
    if stage < 3:
        return [2 * math.ceil(sum(weight.numel for weight in weights) / (2 * ranks))]
    parts, open_part = [], 0
    for weight in weights:
        open_part += math.ceil(weight.numel / ranks)
        if open_part >= SUB_GROUP:
            parts.append(open_part)
            open_part = 0
    return [*parts, open_part] if open_part else parts
