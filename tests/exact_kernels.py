"""Kernels that compare the device code's divisions and square roots with Triton's own, element by element."""

from __future__ import annotations

import triton
import triton.language as tl

from lowmem_adam.kernels.gpu import exact


@triton.jit
def roots_kernel(differ, start, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Counts floats, by their bits from ``start`` on, whose roots differ."""
    index = start + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = exact.float_of(index.to(tl.int32))
    wrong = exact.bits_of(exact.sqrt(x, True)) != exact.bits_of(tl.sqrt_rn(x))
    tl.atomic_add(differ, tl.sum(wrong.to(tl.int64)))


@triton.jit
def quotients_kernel(numerators, denominators, differ, INTEGERS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Counts quotients that differ."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(numerators + index)
    y = tl.load(denominators + index)
    quotient = exact.divide_integers(x, y, True) if INTEGERS else exact.divide(x, y, True)
    wrong = exact.bits_of(quotient) != exact.bits_of(tl.div_rn(x, y))
    tl.atomic_add(differ, tl.sum(wrong.to(tl.int64)))
