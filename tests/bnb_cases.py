"""What the tests of ``moments="bnb8bit"`` share: bitsandbytes itself, gradients that are hard on its format, and what
its quantizer on the CPU makes of values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem_adam import dynamic_map
from lowmem_adam.layout import FLAT_BLOCK_SIZE
from tests.cases import Shape, generator

NESTED = "__bnb_optimizer_quant_state__"
SETTINGS: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.99), "eps": 1e-7, "weight_decay": 0.03}
THEIRS: dict[str, Any] = {"moments": "bnb8bit", "nonfinite": "propagate", "low_precision_update": "nearest"}
"""With these our optimizer is asked for what bitsandbytes' does."""

SHAPES = (
    Shape("blocks", (64, 128), True),
    Shape("tail of one", (17, 241), True),
    Shape("vector", (5000,), True),
    Shape("at the limit", (4096,), True),
    Shape("below the limit", (4095,), False),
    Shape("convolution", (32, 16, 3, 3), True),
    Shape("bias", (7,), False),
)

GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "normal": lambda n, u: n * 0.01,
    "heavy-tailed": lambda n, u: n * 0.01 / (u + 1e-4),
    "zeros": lambda n, u: torch.where(u < 0.7, 0.0, n * 0.01),
    "all zero": lambda n, u: n * 0.0,
    "outliers": lambda n, u: torch.where(u < 0.002, n * 100.0, n * 0.01),
    "scales over four decades": lambda n, u: n * 10.0 ** (u * 4 - 6),
}


def bitsandbytes() -> Any:
    return pytest.importorskip("bitsandbytes", reason="needs bitsandbytes itself")


def gradient(kind: str, shape: tuple[int, ...], dtype: torch.dtype, *key: int) -> Tensor:
    drawn = generator(*key)
    return GRADIENTS[kind](torch.randn(shape, generator=drawn), torch.rand(shape, generator=drawn)).to(dtype)


def blocks_of(values: Tensor) -> Tensor:
    """Flat values as blocks, padded with zeros."""
    flat = values.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -len(flat) % FLAT_BLOCK_SIZE)).view(-1, FLAT_BLOCK_SIZE)


def bins(values: Tensor) -> Tensor:
    """What its CPU quantizer takes blocks of values for: of 65,536 numbers over [-1, 1] the nearest to each scaled one.

    In float32 as it computes it: a product with ``1 / absmax``, ``floor((x + 1) * 32767.5 + 0.5)``.
    """
    absmax = values.abs().amax(dim=1, keepdim=True)
    scaled = (values * (1.0 / absmax)).clamp(-1.0, 1.0)
    return ((scaled + 1.0) * 32767.5 + 0.5).floor() * (2 / 65535) - 1.0


def codes_by_bins(values: Tensor, signed: bool) -> Tensor:
    """The codes that its CPU quantizer gives blocks: nearest of the bins, and 0 where all is zero."""
    near = bins(values) if signed else bins(values).clamp(min=0.0)
    with_one = torch.cat([near, torch.ones(len(near), 1)], dim=1)  # so that they are scaled by 1
    codes = dynamic_map.encode(with_one, signed)[0][:, :-1]
    return torch.where(values.abs().amax(dim=1, keepdim=True) > 0, codes, 0)
