"""bitsandbytes' 8-bit format: maps, nearest codes, blocks; against its own functions where they are exact."""

from __future__ import annotations

import bisect
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem_adam import dynamic_map
from tests.cases import generator

both_maps = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


def bitsandbytes() -> Any:
    return pytest.importorskip("bitsandbytes", reason="needs bitsandbytes' own functions")


def nearest_by_fractions(value: float, signed: bool) -> int:
    """The nearest of all values, by exact arithmetic; of two the one closer to zero."""
    values = dynamic_map.dynamic_map(signed).tolist()
    above = bisect.bisect_left(values, value)
    near = range(max(above - 1, 0), min(above + 1, 255) + 1)
    distances = {code: abs(Fraction(values[code]) - Fraction(value)) for code in near}
    return min(near, key=lambda code: (distances[code], abs(values[code])))


def code_of(values: Tensor, signed: bool) -> Tensor:
    """Codes of values within [-1, 1], in blocks whose absmax is 1."""
    rows = torch.ones(len(values), 2)
    rows[:, 0] = values
    codes, absmax = dynamic_map.encode(rows, signed)
    assert bool((absmax == 1).all())
    return codes[:, 0]


@both_maps
def test_maps_are_bitsandbytes_own(signed: bool) -> None:
    assert torch.equal(dynamic_map.dynamic_map(signed), bitsandbytes().functional.create_dynamic_map(signed=signed))


@both_maps
def test_maps_rise_and_have_zero_and_one(signed: bool) -> None:
    values = dynamic_map.dynamic_map(signed)
    assert values.dtype == torch.float32
    assert bool((values[1:] > values[:-1]).all())
    assert values[dynamic_map.ZERO_CODE[signed]] == 0
    assert values[255] == 1
    if signed:
        assert torch.equal(values[:127], -values[128:255].flip(0))


@both_maps
@pytest.mark.parametrize("scale", [1.0, 3.0, 1e-30, 2.0**-130, 3e38], ids=str)
def test_every_code_decodes_and_encodes_to_itself(signed: bool, scale: float) -> None:
    """With the largest value in the block, as in every block that was ever encoded."""
    codes = torch.arange(256, dtype=torch.uint8)[None]
    decoded = dynamic_map.decode(codes, torch.tensor([scale]), signed)
    again, absmax = dynamic_map.encode(decoded, signed)
    if scale == 2.0**-130:  # where float32 has too few bits for the products, several codes are one value
        again, codes = (dynamic_map.decode(each, absmax, signed) for each in (again, codes))
    assert torch.equal(again, codes)
    assert absmax[0] == torch.tensor(scale)


@both_maps
def test_nearest_at_every_middle_and_beside_it(signed: bool) -> None:
    """At the float32 number that is nearest to each middle of two values, and up to three on either side."""
    values = dynamic_map.dynamic_map(signed).double()
    near = ((values[1:] + values[:-1]) / 2).float()
    around = [near]
    for direction in (-torch.ones(()), torch.ones(())):
        number = near
        for _ in range(3):
            number = torch.nextafter(number, direction)
            around.append(number)
    numbers = torch.cat(around)
    expected = [nearest_by_fractions(number, signed) for number in numbers.tolist()]
    assert code_of(numbers, signed).tolist() == expected
    exact = near.double() == (values[1:] + values[:-1]) / 2
    assert 100 < int(exact.sum()) < 255  # ties there are, and middles between two float32 numbers


@both_maps
def test_nearest_of_random_numbers(signed: bool) -> None:
    drawn = generator(3)
    numbers = torch.rand(2000, generator=drawn) * 10.0 ** -(torch.rand(2000, generator=drawn) * 9)
    if signed:
        numbers[::2] *= -1
    assert code_of(numbers, signed).tolist() == [nearest_by_fractions(n, signed) for n in numbers.tolist()]


@both_maps
def test_largest_of_a_block_is_exact_unless_negative(signed: bool) -> None:
    rows = torch.tensor([[0.3, 0.1, 0.0]]) if not signed else torch.tensor([[0.3, -0.3, 0.0]])
    codes, absmax = dynamic_map.encode(rows, signed)
    assert absmax.tolist() == [torch.tensor(0.3).item()]
    assert codes[0, 0] == 255
    if signed:
        assert codes[0].tolist() == [255, 0, 127]


@both_maps
def test_zeros_have_code_0(signed: bool) -> None:
    codes, absmax = dynamic_map.encode(torch.tensor([[0.0, -0.0, 0.0]]), signed)
    assert codes.tolist() == [[0, 0, 0]]
    assert absmax.tolist() == [0.0]
    assert bool((dynamic_map.decode(codes, absmax, signed) == 0).all())


def test_what_is_not_finite_does_not_spoil_its_block() -> None:
    row = torch.tensor([[torch.inf, -torch.inf, torch.nan, 0.5, 0.25]])
    codes, absmax = dynamic_map.encode(row, True)
    assert codes[0, :4].tolist() == [255, 0, 127, 255]
    assert absmax.tolist() == [0.5]
    codes, absmax = dynamic_map.encode(row[:, [0, 2, 3, 4]], False)
    assert codes[0, :3].tolist() == [255, 255, 255]
    assert absmax.tolist() == [0.5]
    codes, absmax = dynamic_map.encode(torch.full((1, 3), torch.nan), True)
    assert codes.tolist() == [[0, 0, 0]]
    assert absmax.tolist() == [0.0]


def test_bitsandbytes_quantizer_on_the_cpu_is_exact_at_its_bins_alone() -> None:
    """It takes values to 65,536 bins over [-1, 1] first: only there its codes are the nearest for certain."""
    quantize = bitsandbytes() and torch.ops.bitsandbytes.quantize_blockwise
    bins = (torch.arange(65536) * (2 / 65535) - 1).float()
    for signed in (True, False):
        table = dynamic_map.dynamic_map(signed)
        values = bins if signed else bins[32768:]
        rows = torch.ones(-(-len(values) // 255), 256)  # the first of each block is 1
        padded = torch.ones(len(rows) * 255)
        padded[: len(values)] = values
        rows[:, 1:] = padded.view(-1, 255)
        theirs = quantize(rows.view(-1), table, 256)[0].view(rows.shape)
        assert torch.equal(theirs, dynamic_map.encode(rows, signed)[0])
        zero = torch.zeros(1, 256)
        zero[0, 0] = 1.0
        code = int(quantize(zero.view(-1), table, 256)[0][1])
        assert float(table[code]) == pytest.approx(2.125e-5 if signed else 1.5625e-5)  # next to 1 / 65535
        assert dynamic_map.encode(zero, signed)[0][0, 1] == dynamic_map.ZERO_CODE[signed]
