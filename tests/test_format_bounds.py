"""The error bounds that docs/format.md states, over all codes of the 8-bit format."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowmem_adam import codec
from lowmem_adam.codec import FORMAT, MAX_RATIO, Grid

PAGE = (Path(__file__).resolve().parents[1] / "docs/format.md").read_text(encoding="utf-8")
ROUNDING = 16
"""Bits of the float: a float32 of up to 24 * 2^23 is a multiple of 16, so codes are off by half of that, twice."""
ROOT_THRESHOLDS = (1.0, 1.5, 2.0 - 2.0**-23)
RATIO_THRESHOLDS = (128.0, 128.5, 129.0 - 2.0**-16)


def grid_of(span: int, floor: int = 120) -> Grid:
    return Grid(torch.tensor([floor], dtype=torch.uint8), torch.tensor([span], dtype=torch.uint8))


def levels(span: int) -> Tensor:
    """The 255 positive roots of a grid, float32."""
    return codec.decode_root(torch.arange(1, 256, dtype=torch.uint8)[None], grid_of(span))[0]


def table(heading: str) -> dict[str, list[str]]:
    """A table of the page: the cells of each row by its first cell."""
    lines = PAGE.partition(f"{heading}\n\n")[2].partition("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len(rows) > 2, heading
    return {row[0]: row[1:] for row in rows[2:]}


@pytest.mark.parametrize("span", range(1, FORMAT.max_octaves + 1))
def test_a_decoded_root_is_off_by_at_most_its_octaves_over_254(span: int) -> None:
    """All intervals of all spans, with roots at and around both ends and thresholds at both ends."""
    grid, points = grid_of(span), levels(span)
    bound = 1 + (span * 2**23 / 254 + ROUNDING) / 2**23
    of = points.view(torch.int32)
    bits = of[:, None] + torch.tensor([-40, -17, -16, -1, 0, 1, 16, 17, 40], dtype=torch.int32)
    bits = bits.clamp(min=120 << 23, max=(120 + span << 23) - 1)
    root = torch.cat([bits.flatten(), of[1:] // 2 + of[:-1] // 2]).view(torch.float32)[None]
    worst = 0.0
    for threshold in ROOT_THRESHOLDS:
        decoded = codec.decode_root(codec.encode_root(root, grid, torch.tensor(threshold)), grid)
        ratio = decoded.double() / root.double()
        worst = max(worst, ratio.max().item(), (1 / ratio).max().item())
    assert worst <= bound
    # It is reached: just above the floor, where a float's bits say most.
    assert worst >= 1 + span / 254 - 2e-5


def test_the_worst_error_of_a_root_is_the_pages() -> None:
    rows = table("#### Largest relative error of s")
    assert [int(name) for name in rows] == [1, 2, 4, 8, 16, 24]
    for name, (octaves, worst) in rows.items():
        assert octaves == f"{10 ** (int(name) * 0.30103):.3g}"
        assert worst == f"{int(name) / 254:.2%}"


def test_coding_a_root_has_no_bias_within_an_octave() -> None:
    """Both neighbours, weighed by the probabilities of the dither, give the root itself."""
    span = 3
    low, high = levels(span)[:-1].double(), levels(span)[1:].double()
    same_octave = low.log2().floor() == (high * (1 - 1e-9)).log2().floor()
    bits = levels(span).view(torch.int32)
    part = torch.tensor([0.1, 0.25, 0.5, 0.9], dtype=torch.float64)
    between = (bits[:-1, None] + part * (bits[1:] - bits[:-1])[:, None]).round().to(torch.int32)
    up = (between - bits[:-1, None]).double() / (bits[1:] - bits[:-1])[:, None].double()
    mean = low[:, None] * (1 - up) + high[:, None] * up
    root = between.view(torch.float32).double()
    off = ((mean / root) - 1).abs().amax(dim=1)
    assert off[same_octave].max() <= 1e-12
    assert 0 < off[~same_octave].max() <= (span / 254) / 4


def ratio_of(code: Tensor) -> Tensor:
    return code.double() / (FORMAT.ratio_scale - code.double().abs())


def test_ratios_of_neighbouring_codes_are_apart_as_the_page_says() -> None:
    ratio = ratio_of(torch.arange(-127, 128))
    product = (1 + ratio[1:].abs()) * (1 + ratio[:-1].abs()) / FORMAT.ratio_scale
    assert torch.allclose(ratio.diff(), product, rtol=1e-12, atol=0)


@pytest.mark.parametrize("span", [1, 3, 24])
def test_the_error_of_the_update_is_bounded_by_its_ratio(span: int) -> None:
    """|r' - r| <= (1 + |r|)(1 + |r'|) / 143 with dither and half of that to nearest, whatever the root became."""
    grid = grid_of(span)
    codes = torch.arange(-127, 127).double()
    y = ((codes[:, None] + torch.tensor([0.0, 1e-3, 0.25, 0.499, 0.501, 0.75, 0.999])) / FORMAT.ratio_scale).flatten()
    y = y[y.abs() <= FORMAT.ratio_limit / FORMAT.ratio_scale]
    wanted = (y / (1 - y.abs()))[None]
    for root in (levels(span)[0], levels(span)[100] * 1.001, levels(span)[254]):
        exp_avg = (wanted * root).float()
        exact = exp_avg.double() / root.double()
        stored = root.expand(exp_avg.shape)
        decoded_root = codec.decode_root(codec.encode_root(stored, grid, torch.tensor(1.5)), grid)
        for threshold in RATIO_THRESHOLDS:
            for nearest in (False, True):
                code = codec.encode_ratio(exp_avg, stored, torch.tensor(threshold), torch.tensor(nearest))
                ratio = codec.decode_ratio(code, decoded_root).double() / decoded_root.double()
                error = (ratio - exact).abs()
                # 1.1e-6 of the reciprocal times 143, and the float32 roundings of quotient, sum and decoding.
                largest = (1 + exact.abs()) * (1 + ratio.abs()) / FORMAT.ratio_scale * (1 + 4e-4)
                assert (error <= largest).all()
                if nearest:
                    small = code.abs() < FORMAT.ratio_always_dithered
                    assert (error <= largest / 2)[small].all()


def test_the_errors_of_the_update_are_the_pages() -> None:
    rows = table("#### Largest error of u")
    for name, (nearest, dithered) in rows.items():
        r = float(name)
        for cell, part in ((nearest, 0.5), (dithered, 1.0)):
            if cell == "always dithered":
                assert (FORMAT.ratio_scale * r / (1 + r)) > FORMAT.ratio_always_dithered
                continue
            # |r'| solves |r' - r| = part / 143 (1 + r)(1 + r'), outwards.
            k = part / FORMAT.ratio_scale * (1 + r)
            assert cell == f"{(r + k) / (1 - k) - r:.2g}", (name, cell)


def test_the_page_names_the_limits_of_the_format() -> None:
    assert f"127 / 16 = {MAX_RATIO:.2f}" in PAGE
    always = FORMAT.ratio_always_dithered
    assert f"beyond {always / (FORMAT.ratio_scale - always):.2f}" in PAGE
    words = re.findall(r"0x[0-9A-F]{8}", PAGE)
    assert f"0x{FORMAT.moment_step:08X}" in words
    # The two coordinates of the R2 sequence: 1 / p and 1 / p^2, where p^3 = p + 1.
    p = 1.324717957244746
    assert FORMAT.moment_step >> 16 == int(65536 / p)
    assert abs((FORMAT.moment_step & 0xFFFF) - 65536 / p**2) < 1


def test_every_threshold_comes_as_often_over_a_period() -> None:
    """An odd increment runs through all words modulo 2^n; 2^16 of them are looked at for the ratios' lower halves."""
    words = (torch.arange(65536) * FORMAT.moment_step + 12345) & 0xFFFFFFFF
    assert (words & 0xFFFF).unique().numel() == 65536
    for increment in (FORMAT.moment_step, FORMAT.update_step):
        assert increment % 2 == 1
