"""On a CUDA device: divisions and square roots without branches round as Triton's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.triton_cases import DEVICE

pytestmark = pytest.mark.gpu


def some_floats(exponents: tuple[int, int], count: int, *key: int) -> Tensor:
    """Random mantissas, a fourth of them near a power of two, and exponents, of both signs."""
    drawn = torch.Generator(DEVICE).manual_seed(sum(part << (8 * index) for index, part in enumerate(key)))
    mantissa = torch.randint(0, 1 << 23, (count,), generator=drawn, device=DEVICE, dtype=torch.int32)
    near = torch.randint(-4, 4, (count // 4,), generator=drawn, device=DEVICE, dtype=torch.int32) & 0x7FFFFF
    mantissa[: count // 4] = near
    exponent = torch.randint(exponents[0], exponents[1], (count,), generator=drawn, device=DEVICE, dtype=torch.int32)
    sign = torch.randint(0, 2, (count,), generator=drawn, device=DEVICE, dtype=torch.int32) << 31
    return (mantissa | ((exponent + 127) << 23) | sign).view(torch.float32)


def test_the_roots_of_all_usual_floats() -> None:
    from tests import exact_kernels

    differ = torch.zeros((), dtype=torch.int64, device=DEVICE)
    low, high = (127 - 96) << 23, (127 + 96) << 23
    exact_kernels.roots_kernel[((high - low) // 4096,)](differ, low, BLOCK=4096)
    exact_kernels.roots_kernel[(1,)](differ, 0, BLOCK=1)
    assert int(differ) == 0


def test_quotients() -> None:
    """2^31 of those that a step may meet, in all four quarters of exponents, and zeros of both signs."""
    from tests import exact_kernels

    count, differ = 1 << 26, torch.zeros((), dtype=torch.int64, device=DEVICE)
    for part in range(32):
        x = some_floats((-90, -20) if part % 2 else (-20, 50), count, part, 1)
        y = some_floats((-60, -20) if part % 4 < 2 else (-20, 21), count, part, 2).abs()
        x[::1000] *= 0.0
        exact_kernels.quotients_kernel[(count // 4096,)](x, y, differ, INTEGERS=False, BLOCK=4096)
    assert int(differ) == 0


def test_quotients_that_lie_nearest_to_the_middle_of_two_floats() -> None:
    """Where the last bit of an estimate shows: x * 2^25 = (2 k + 1) y + r, of 24-bit integers, with a small r.

    All odd y; x is r over 2^25 modulo y, by 25 halvings. And the inverses of all mantissas.
    """
    from tests import exact_kernels

    differ = torch.zeros((), dtype=torch.int64, device=DEVICE)
    y = torch.arange((1 << 23) + 1, 1 << 24, 2, device=DEVICE, dtype=torch.int64)
    for rest in (1, -1, 3, -3, 5, -5):
        x = torch.full_like(y, rest) % y
        for _ in range(25):
            x = torch.where(x % 2 == 0, x, x + y) // 2
        assert bool(((x * (1 << 25) - rest) % y == 0).all())
        normal = x.float() * 2.0 ** (24 - torch.frexp(x.float())[1]).float()
        for numerators in (normal * 2.0**-24, normal * 2.0**-70):
            exact_kernels.quotients_kernel[(len(y) // 4096,)](
                numerators, y.float() * 2.0**-30, differ, INTEGERS=False, BLOCK=4096
            )
    mantissas = torch.arange(1 << 23, 1 << 24, device=DEVICE, dtype=torch.int64).float() * 2.0**-23
    for numerator in (1.0, float.fromhex("0x1.fffffep0"), float.fromhex("0x1.aaaaa6p0")):
        exact_kernels.quotients_kernel[(len(mantissas) // 4096,)](
            torch.full_like(mantissas, numerator), mantissas, differ, INTEGERS=False, BLOCK=4096
        )
    assert int(differ) == 0


def test_quotients_of_all_codes() -> None:
    from tests import exact_kernels

    differ = torch.zeros((), dtype=torch.int64, device=DEVICE)
    code = torch.arange(-128, 128, device=DEVICE, dtype=torch.float32)
    exact_kernels.quotients_kernel[(1,)](code, 143 - code.abs(), differ, INTEGERS=True, BLOCK=256)
    assert int(differ) == 0
    x, y = torch.meshgrid(code, torch.arange(1, 257, device=DEVICE, dtype=torch.float32), indexing="ij")
    exact_kernels.quotients_kernel[(16,)](x.contiguous(), y.contiguous(), differ, INTEGERS=True, BLOCK=4096)
    assert int(differ) == 0
