"""bitsandbytes' 8-bit format, described once: a dynamic map for each moment and blocks of 256 elements in flat order.

A coded moment is ``map[code] * absmax[block]``, where absmax is the largest magnitude of the block. Codes of the first
moment are of the signed map, those of the second, which is held as it is and not as its root, of the unsigned one. The
maps are constants and never part of a state.

* **Nearest.** A value's code is that of the map's value nearest to ``fl(value / absmax)``, compared exactly; of two
  that are equally near, the one closer to zero. -1 has no value of its own and becomes -0.993, as in bitsandbytes.
* **Zeros.** A block whose absmax is 0 has codes 0, as state has before its first step and as bitsandbytes' operator on
  the CPU writes it; 0 elsewhere is 127 in the signed map and 0 in the unsigned one. So a step with gradients of zero
  changes nothing in state that has had none.
* **Not finite.** What is infinite or NaN does not count for absmax. It takes the code of the largest value with its
  sign, and NaN that of 0 in the first moment and that of the largest in the second, which errs to smaller steps.

Sources: bitsandbytes 0.50.2, ``functional.py`` and ``backends/cpu/ops.py``; the dynamic map of Dettmers et al. 2022
(arXiv 2110.02861).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lowmem_adam.layout import FLAT_BLOCK_SIZE

ZERO_CODE = {True: 127, False: 0}
"""The code whose value is 0 in the signed map and in the unsigned one."""


@functools.cache
def dynamic_map(signed: bool) -> Tensor:
    """The 256 values of its 8-bit formats in rising order, float32, equal to its ``create_dynamic_map``.

    Seven decades below 1, each cut into twice as many equal parts as the one below, whose middles are the values: 1 to
    64 parts for each sign, or 2 to 128 without signs; and 0 and 1. Do not write into it: it is kept.
    """
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        edges = torch.linspace(0.1, 1.0, 2 ** (decade if signed else decade + 1) + 1)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6)
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values


@functools.cache
def thresholds(signed: bool) -> Tensor:
    """The largest float32 magnitudes that still have the code of the lower of two neighbouring values.

    float32, of the values from 0 on: 128 thresholds of the signed map, 255 of the unsigned one. A middle of two float32
    numbers is exact in double; what lies at it, or below, is nearer to zero.
    """
    upper = dynamic_map(signed)[ZERO_CODE[signed] :].to(torch.float64)
    middles = (upper[1:] + upper[:-1]) / 2
    nearest = middles.to(torch.float32)
    below = torch.nextafter(nearest, torch.zeros(()))
    return torch.where(nearest.to(torch.float64) > middles, below, nearest)


def scales_of(values: Tensor) -> Tensor:
    """Absmax of blocks, float32 ``(n_blocks, 1)``, of values float32 ``(n_blocks, width)``, padding zero."""
    magnitude = values.abs()
    return torch.where(magnitude < torch.inf, magnitude, 0.0).amax(dim=1, keepdim=True)


def encode(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """A block matrix of moments, float32 ``(n_blocks, width)``, padding zero.

    Returns:
        uint8 codes of the same shape, and absmax, float32 ``(n_blocks,)``.
    """
    scale = scales_of(values)
    limits = thresholds(signed).to(values.device)
    # Infinite ones are no larger than 1 after this, and NaN is what the format says.
    scaled = (values / torch.where(scale > 0, scale, 1.0)).nan_to_num(0.0 if signed else 1.0).clamp_(-1.0, 1.0)
    if signed:
        steps = torch.bucketize(scaled.abs(), limits)
        code = torch.where(scaled < 0, ZERO_CODE[True] - steps.clamp(max=ZERO_CODE[True]), ZERO_CODE[True] + steps)
    else:
        code = torch.bucketize(scaled, limits)
    return torch.where(scale > 0, code, 0).to(torch.uint8), scale[:, 0]


def decode(code: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """uint8 codes ``(n_blocks, width)`` and absmax ``(n_blocks,)`` to float32 moments: ``fl(map[code] * absmax)``.

    Zero is 0.0 also where code 0 of the signed map, a negative value, stands for it: a step with -0.0 would give a
    weight of -0.0 the other sign.
    """
    return (dynamic_map(signed).to(code.device)[code.int()] * absmax[:, None]).add_(0.0)


def n_blocks(numel: int) -> int:
    """Blocks of a tensor with so many elements, the shorter last one included."""
    return -(-numel // FLAT_BLOCK_SIZE)
