"""What is kept of a weight beside a 16-bit parameter: nothing is lost on the way there and back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowmem_adam import codec
from lowmem_adam.kernels import rounding
from lowmem_adam.layout import Layout
from tests.cases import generator

HALVES = (torch.bfloat16, torch.float16)
every_half = pytest.mark.parametrize("dtype", HALVES, ids=lambda dtype: str(dtype).removeprefix("torch."))
every_correction = pytest.mark.parametrize("kept", rounding.CORRECTIONS, ids=lambda dtype: f"{8 * dtype.itemsize} bits")

EDGES = (*(1, 2, 7, 8, 255, 256, 257, 4095, 4096), *(0x7FF8, 0x7FFC, 0x7FFE, 0x7FFF))


def all_halves(dtype: torch.dtype) -> Tensor:
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)


def every_pair(dtype: torch.dtype, kept: torch.dtype) -> tuple[Tensor, Tensor]:
    """All parameters, each with all corrections of 8 bits or with those of 16 where something happens."""
    edges = [-0x8000, *(-edge for edge in EDGES), 0, *EDGES]
    rests = torch.arange(-128, 128) if kept == torch.int8 else torch.tensor(edges)
    params = all_halves(dtype)[:, None].expand(-1, len(rests)).contiguous()
    return params, rests.to(kept).expand(params.shape).contiguous()


def words(shape: torch.Size, kept: torch.dtype) -> Tensor | None:
    drawn = torch.randint(0, 65536, shape, generator=generator(1)).to(torch.int32)
    return drawn if kept == torch.int8 else None


def some_floats() -> Tensor:
    """float32 of all bits, of usual size, tiny ones, and the edges."""
    drawn = generator(2)
    any_bits = torch.randint(-(2**31), 2**31, (1 << 20,), generator=drawn).to(torch.int32).view(torch.float32)
    usual = torch.randn(1 << 18, generator=drawn)
    special = [torch.inf, torch.nan, 3.4028234e38, 3.39e38, 65504.0, 65519.996, 65520.0, 65536.0, 1e6, 2.0**-14, 0.0]
    edges = torch.tensor([*special, 2.0**-24, 2.0**-25, 2.0**-41, 1e-45])
    odd = torch.tensor([0x7FFFFFFF, 0x7F800001, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    return torch.cat([any_bits, usual, usual * 1e-5, usual * 1e-38, edges, -edges, odd, -odd])


def same(a: Tensor, b: Tensor) -> Tensor:
    """Elements of equal bits, all NaN being equal."""
    bits = torch.int32 if a.dtype == torch.float32 else torch.int16
    return (a.view(bits) == b.view(bits)) | (a.isnan() & b.isnan())


@every_correction
@every_half
def test_a_parameter_stays_what_its_weight_rounds_to_with_any_correction(dtype: torch.dtype, kept: torch.dtype) -> None:
    """So a parameter that was changed from outside, beside a correction of another, is not changed once more."""
    params, rests = every_pair(dtype, kept)
    weights = rounding.widen(params, rests)
    again, rest = rounding.split(weights, dtype, kept, words(weights.shape, kept))
    assert same(again, params).all()
    assert same(rounding.widen(again, rest), weights).all()
    assert torch.equal(weights.signbit(), params.signbit())
    # Off by at most half of the distance to a neighbour.
    finite = params.isfinite()
    up, down = (torch.nextafter(params, torch.tensor(to, dtype=dtype)).float() for to in (torch.inf, -torch.inf))
    low, high = down.double() + params.double(), up.double() + params.double()
    inside = finite & up.isfinite() & down.isfinite()
    assert ((2 * weights.double() >= low) & (2 * weights.double() <= high))[inside].all()


@every_correction
@every_half
def test_infinities_nan_and_zeros_take_no_correction_that_would_make_something_else_of_them(
    dtype: torch.dtype, kept: torch.dtype
) -> None:
    params, rests = every_pair(dtype, kept)
    weights = rounding.widen(params, rests)
    special = ~params.isfinite() | ((params == 0) & (rests < 0))
    assert special.sum() >= 2 * rests.shape[1] + 2
    assert same(weights, params.float())[special].all()
    assert torch.equal(weights.isfinite(), params.isfinite())
    positive = (params == 0) & (rests > 0)
    assert (weights[positive] != 0).all()


@every_half
def test_16_bits_bring_a_weight_back(dtype: torch.dtype) -> None:
    weights = some_floats()
    params, rests = rounding.split(weights, dtype, torch.int16, None)
    nearest = weights.to(dtype)
    assert torch.equal(params.isnan(), weights.isnan())
    assert torch.equal(params.isinf(), nearest.isinf())
    assert torch.equal(params.signbit()[~weights.isnan()], weights.signbit()[~weights.isnan()])
    # Halves are rounded away from zero: the one difference from torch's rounding.
    ties = ~same(params, nearest)
    away = torch.nextafter(params, torch.zeros((), dtype=dtype)).double()
    assert torch.equal(2 * weights.double()[ties], params.double()[ties] + away[ties])
    back, finite = rounding.widen(params, rests), params.isfinite()
    exact = finite if dtype == torch.bfloat16 else finite & (weights.abs() >= 2.0**-17)
    assert exact.sum() > 200_000
    assert same(back, weights)[exact].all()
    assert ((back.double() - weights.double()).abs() <= 2.0**-41)[finite].all()


@every_half
def test_24_bits_round_a_weight_stochastically(dtype: torch.dtype) -> None:
    """Of all words the mean is the weight, within a 256th of the step between two weights that can be kept."""
    weights = torch.cat([torch.randn(200, generator=generator(3)), torch.randn(100, generator=generator(4)) * 1e-5])
    drawn = torch.arange(0, 65536, 256, dtype=torch.int32).expand(len(weights), -1)
    params, rests = rounding.split(weights[:, None].expand(drawn.shape).contiguous(), dtype, torch.int8, drawn)
    back = rounding.widen(params, rests).double()
    down, up = back.amin(dim=1), back.amax(dim=1)
    sixteen = rounding.widen(*rounding.split(weights, dtype, torch.int16, None)).double()
    assert ((down <= sixteen) & (sixteen <= up)).all()
    assert ((back == down[:, None]) | (back == up[:, None])).all()
    assert (back.mean(dim=1) - sixteen).abs().max() <= 1e-12
    assert (up > down).sum() > 250
    ulp = torch.nextafter(params[:, 0].abs(), torch.tensor(torch.inf, dtype=dtype)).double() - params[:, 0].abs()
    assert ((up - down) <= ulp / 256).all()


@every_half
def test_a_master_weight_is_kept_only_while_the_parameter_is_its_rounding(dtype: torch.dtype) -> None:
    weights = some_floats()
    params = weights.to(dtype)
    assert same(rounding.widen(params, weights), weights).all()
    # Another parameter of the same value but for the sign of zero, too.
    others = all_halves(dtype)
    for changed in (others, others.flip(0), torch.zeros_like(others), -torch.zeros_like(others)):
        masters = weights[torch.randint(0, len(weights), (65536,), generator=generator(5))]
        got, fits = rounding.widen(changed, masters), same(masters.to(dtype), changed)
        assert same(got[fits], masters[fits]).all()
        assert same(got[~fits], changed[~fits].float()).all()


@pytest.mark.parametrize("kept", [torch.float32, *rounding.CORRECTIONS])
@every_half
def test_narrow_is_the_inverse_of_widen(dtype: torch.dtype, kept: torch.dtype) -> None:
    layout = Layout(512, 128)
    (tile,) = layout.tiles(0, 512, 65536)
    dither = codec.Dither(tile, 3, 5, torch.device("cpu"))
    params = all_halves(dtype).view(512, 128)
    for stochastic in (False, True):  # which counts only where nothing is kept
        again, rest = rounding.narrow(params.float(), dtype, kept, dither, stochastic)
        assert rest is not None
        assert rest.dtype == kept
        assert same(again, params).all()
        assert same(rounding.widen(again, rest), params.float()).all()
