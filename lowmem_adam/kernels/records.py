"""One step's hyperparameters as the kernels read them: float32, each rounded once, and integers."""

from __future__ import annotations

import ctypes
import math
import struct
import sys

import torch

from lowmem_adam.codec import SMALLEST_NORMAL, mix32
from lowmem_adam.kernels.fragment import StepScalars

RECORD = struct.Struct("9f iii II")
"""Nine float32, three flags, seed and step: ``struct lowmem_adam_scalars``."""
_BY_BITS = struct.Struct("9I iii II")
_FLOAT32_MAX = torch.finfo(torch.float32).max


def pack(s: StepScalars) -> bytes:
    """The record of a step, ``RECORD``; the gradient's factor is negative to ascend."""
    factor = -s.grad_scale if s.maximize else s.grad_scale
    betas = (s.beta1, 1.0 - s.beta1, s.beta2, 1.0 - s.beta2)
    rates = (s.eps, s.weight_decay, s.shrink, s.step_size, factor)
    values = (*betas, *rates)
    rest = (s.stochastic, s.skip_nonfinite, s.wide, mix32(s.seed), s.step & 0xFFFFFFFF)
    if all(value == 0.0 or SMALLEST_NORMAL <= abs(value) <= _FLOAT32_MAX for value in values):
        return RECORD.pack(*values, *rest)
    return _BY_BITS.pack(*map(_float32_bits, values), *rest)


def _float32_bits(value: float) -> int:
    """The bits of a double rounded to float32, infinite beyond its range.

    What becomes subnormal is rounded in integers: under ``torch.set_flush_denormal(True)`` a conversion would lose it.
    """
    if abs(value) < SMALLEST_NORMAL:
        return round(abs(value) * 2.0**149) | (0x80000000 if math.copysign(1.0, value) < 0 else 0)
    return int.from_bytes(bytes(ctypes.c_float(value)), sys.byteorder)
