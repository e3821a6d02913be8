"""The 8-bit format: all codes, all metadata, and the properties its users rely on."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from torch import Tensor

from lowmem_adam import codec
from lowmem_adam.codec import FORMAT, MAX_RATIO, Dither, Grid
from lowmem_adam.layout import Tile

ROOT_MIDDLE = torch.tensor(1.5)
RATIO_MIDDLE = torch.tensor(128.5)
NEAREST = torch.tensor(True)
ALL_ROOT_CODES = torch.arange(256, dtype=torch.uint8)
ALL_RATIO_CODES = torch.arange(-FORMAT.ratio_limit, FORMAT.ratio_limit + 1, dtype=torch.int8)


def all_grids() -> Grid:
    """Every floor and span that a step can write."""
    top = FORMAT.max_exponent
    pairs = [(f, s) for f in range(1, top) for s in range(1, FORMAT.max_octaves + 1) if f + s <= top]
    floor, span = zip(*pairs, strict=True)
    return Grid(torch.tensor(floor, dtype=torch.uint8), torch.tensor(span, dtype=torch.uint8))


def dither(n_blocks: int, step: int = 1, seed: int = 0, width: int = 128, first_block: int = 0) -> Dither:
    return Dither(Tile(n_blocks, width, first_block * width, first_block), step, seed, torch.device("cpu"))


def random_block_matrix(decades: float, n_blocks: int = 64) -> tuple[Tensor, Tensor]:
    """First moments and roots whose scales spread log-uniformly over ``decades`` inside each block."""
    scale = 10 ** ((torch.rand(n_blocks, 128) - 0.5) * decades)
    root = scale * (0.5 + torch.rand(n_blocks, 128))
    return root * torch.randn(n_blocks, 128), root


# ---------------------------------------------------------------- codes


def test_every_root_code_on_every_grid_survives_a_round_trip() -> None:
    grid = all_grids()
    codes = ALL_ROOT_CODES.expand(len(grid.floor), -1)
    root = codec.decode_root(codes, grid)
    # Read back with the threshold in the middle: the decoded value lies within 1e-4 codes of its own code.
    assert torch.equal(codec.encode_root(root, grid, ROOT_MIDDLE), codes)


def test_root_codes_are_monotone_from_the_floor_to_just_below_the_ceiling() -> None:
    grid = all_grids()
    root = codec.decode_root(ALL_ROOT_CODES.expand(len(grid.floor), -1), grid).double()
    assert (root[:, 0] == 0).all()
    assert (root[:, 1:] > 0).all()
    assert (root.diff(dim=1) > 0).all()
    assert torch.equal(root[:, 1], torch.exp2(grid.floor.double() - 127))
    # 2^23 is 254 * 33026 + 4: the steps of whole bits leave 4 bits an octave, less where they fill another step.
    ceiling = (grid.floor.int() + grid.span.int()) << 23
    highest = codec.decode_root(ALL_ROOT_CODES[-1:].expand(len(grid.floor), -1), grid)[:, 0].view(torch.int32)
    assert torch.equal(ceiling - highest, grid.span.int() * 2**23 % 254)
    assert (ceiling > highest).all()
    assert codec.decode_root(ALL_ROOT_CODES[-1:].expand(len(grid.floor), -1), grid).square().isfinite().all()


def test_a_root_is_off_by_less_than_one_interval() -> None:
    for decades in (0.0, 2.0, 6.0):
        exp_avg, root = random_block_matrix(decades)
        codes = codec.encode(exp_avg, root, dither(64))
        decoded = codec.decode(codes)[1]
        # Linear in the bits of the float: one interval is span * 2^23 / 254 bits, plus the rounding of the product
        # of a float32 of up to 24 * 2^23 (half of 2^4) twice, coding and decoding.
        interval = codes.grid.span.double()[:, None] * 2**23 / 254 + 16
        above_floor = root >= torch.exp2(codes.grid.floor.float()[:, None] - 127)
        error = (decoded.view(torch.int32) - root.view(torch.int32)).double().abs()
        assert above_floor.float().mean() > 0.99
        assert (error <= interval)[above_floor].all()


def test_ratio_codes_are_the_rational_numbers_they_are_documented_as() -> None:
    root = torch.ones(())
    decoded = codec.decode_ratio(ALL_RATIO_CODES, root)
    exact = [struct.unpack("f", struct.pack("f", q / (143 - abs(q))))[0] for q in range(-127, 128)]
    assert decoded.tolist() == exact
    assert decoded.max().item() == MAX_RATIO == 7.9375
    assert torch.equal(codec.encode_ratio(decoded, root, RATIO_MIDDLE, NEAREST), ALL_RATIO_CODES)


def test_all_pairs_of_codes_survive_a_round_trip() -> None:
    root_codes = ALL_ROOT_CODES[1:].repeat_interleave(255)[None]
    ratio_codes = ALL_RATIO_CODES.repeat(255)[None]
    for floor, span in ((1, 1), (52, 24), (100, 24), (127, 3), (167, 24), (190, 1)):
        grid = Grid(torch.tensor([floor], dtype=torch.uint8), torch.tensor([span], dtype=torch.uint8))
        root = codec.decode_root(root_codes, grid)
        exp_avg = codec.decode_ratio(ratio_codes, root)
        assert exp_avg.isfinite().all()
        # Near 2^-126 the products m = r * root are denormal and lose digits.
        if floor > 1:
            assert torch.equal(codec.encode_ratio(exp_avg, root, RATIO_MIDDLE, NEAREST), ratio_codes)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95), (0.95, 0.99), (0.0, 0.99)])
def test_the_bound_on_the_ratio_is_reached_but_not_passed(betas: tuple[float, float]) -> None:
    beta1, beta2 = betas
    bound = (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2))
    # The worst history for m / sqrt(v) weighs gradients by (beta1 / beta2)^age (Cauchy-Schwarz).
    m = v = 0.0
    for age in range(400, -1, -1):
        g = (beta1 / beta2) ** age
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    assert m / math.sqrt(v) == pytest.approx(bound, rel=1e-3)
    if betas == (0.9, 0.999):
        assert 7.2 < bound < MAX_RATIO


def test_a_ratio_beyond_the_last_code_saturates() -> None:
    root = torch.ones(2)
    exp_avg = torch.tensor([1e6, -1e30])
    code = codec.encode_ratio(exp_avg, root, RATIO_MIDDLE, NEAREST)
    assert code.tolist() == [127, -127]
    assert codec.decode_ratio(code, root).tolist() == [MAX_RATIO, -MAX_RATIO]


# ---------------------------------------------------------------- zeros, extremes, broken values


def test_zero_is_exact_and_positive_roots_stay_positive() -> None:
    exp_avg, root = random_block_matrix(decades=30.0)
    never = torch.rand(root.shape) < 0.3
    exp_avg, root = exp_avg.masked_fill(never, 0), root.masked_fill(never, 0)
    for step in range(1, 20):
        codes = codec.encode(exp_avg, root, dither(64, step))
        m, s = codec.decode(codes)
        assert torch.equal(codes.root == 0, root == 0)
        assert torch.equal(s > 0, root > 0)
        assert (m[never] == 0).all()
        assert (codes.exp_avg[never] == 0).all()


def test_a_block_of_zeros_decodes_to_zeros() -> None:
    zeros = torch.zeros(3, 128)
    codes = codec.encode(zeros, zeros, dither(3))
    assert all(bool((t == 0).all()) for t in (codes.exp_avg, codes.root, codes.grid.floor, codes.grid.span))
    m, s = codec.decode(codes)
    assert (m == 0).all()
    assert (s == 0).all()


def test_what_lies_too_far_below_takes_the_floor() -> None:
    root = torch.tensor([[1.0, 2.0**-23, 2.0**-30, 2.0**-100]])
    grid = codec.block_grid(root)
    decoded = codec.decode_root(codec.encode_root(root, grid, torch.tensor(1.0)), grid)
    assert grid.span.item() == FORMAT.max_octaves
    assert decoded[0, 1:].tolist() == [2.0**-23] * 3


@pytest.mark.parametrize("magnitude", [1e-45, 1e-38, 1e-22, 1e-10, 1.0, 1e10, 1.8e19])
def test_nothing_is_non_finite_at_any_magnitude(magnitude: float) -> None:
    root = torch.full((2, 128), magnitude)
    exp_avg = root * torch.linspace(-1, 1, 128)
    m, s = codec.decode(codec.encode(exp_avg, root, dither(2)))
    assert m.isfinite().all()
    assert s.isfinite().all()
    assert (s > 0).all()


def test_broken_elements_do_not_harm_their_neighbours() -> None:
    exp_avg, root = random_block_matrix(decades=1.0)
    want = codec.encode(exp_avg, root, dither(64))
    root[:, 5], root[:, 77] = torch.inf, torch.nan
    exp_avg[:, 5], exp_avg[:, 77], exp_avg[:, 80] = torch.nan, torch.nan, torch.inf
    got = codec.encode(exp_avg, root, dither(64))
    m, s = codec.decode(got)
    assert m.isfinite().all()
    assert s.isfinite().all()
    assert (got.root[:, 77] == 255).all()
    assert (got.root[:, 5] == 255).all()
    others = [i for i in range(128) if i not in (5, 77, 80)]
    same_grid = (got.grid.floor == want.grid.floor) & (got.grid.span == want.grid.span)
    assert same_grid.float().mean() > 0.5
    assert torch.equal(got.root[same_grid][:, others], want.root[same_grid][:, others])
    assert torch.equal(got.exp_avg[same_grid][:, others], want.exp_avg[same_grid][:, others])


# ---------------------------------------------------------------- dither


def test_thresholds_are_a_pure_function_of_seed_step_block_and_lane() -> None:
    whole = dither(40, step=7, seed=3)
    part = dither(5, step=7, seed=3, first_block=20)
    for a, b in zip(whole.moment_thresholds(), part.moment_thresholds(), strict=True):
        assert torch.equal(a[20:25], b)
    assert torch.equal(whole.update_words()[20:25], part.update_words())
    narrow = dither(40, step=7, seed=3, width=10)
    assert torch.equal(narrow.update_words(), whole.update_words()[:, :10])
    for other in (dither(40, step=8, seed=3), dither(40, step=7, seed=4), dither(40, step=7, seed=3 + 2**32)):
        assert not torch.equal(other.moment_thresholds()[0], whole.moment_thresholds()[0])
        assert not torch.equal(other.update_words(), whole.update_words())


def test_thresholds_lie_in_the_unit_interval_for_any_step_and_block() -> None:
    for step in (1, 2, 2**31 - 1, 2**31, 2**32 + 5, 2**40):
        for first_block in (0, 2**31 - 2, 2**33 + 1):
            d = dither(4, step, first_block=first_block)
            for threshold, offset in zip(d.moment_thresholds()[:2], (1, 128), strict=True):
                assert (threshold >= offset).all()
                assert (threshold < offset + 1).all()
            words = d.update_words()
            assert (words >= 0).all()
            assert (words < 65536).all()


def test_mix32_of_tensors_and_of_integers_agree() -> None:
    values = [0, 1, 2, 12345, 2**31, 2**32 - 1, 2**40 + 7, 2**62]
    assert codec._mix32_tensor(torch.tensor(values)).tolist() == [codec.mix32(v) for v in values]


def test_small_ratios_are_dithered_at_every_second_step_in_turns_and_large_ones_always() -> None:
    threshold = torch.tensor(128.99)
    for step in (1, 2):
        nearest = dither(6, step).moment_thresholds()[2]
        assert nearest[:, 0].tolist() == [(block + step) % 2 == 0 for block in range(6)]
    root, always = torch.ones(()), FORMAT.ratio_always_dithered
    # A little above code q: rounds up with this threshold and down to nearest. r = y / (1 - y) undoes the companding.
    for q, up_when_nearest in ((always - 1, 0), (always, 1), (-always, 0), (-always - 2, 1)):
        y = (q + 0.1) / FORMAT.ratio_scale
        exp_avg = torch.tensor(y / (1 - abs(y)))
        assert codec.encode_ratio(exp_avg, root, threshold, torch.tensor(False)).item() == q + 1
        assert codec.encode_ratio(exp_avg, root, threshold, NEAREST).item() == q + up_when_nearest


def test_thresholds_fill_the_interval_evenly_in_time() -> None:
    """Of any 1,000 steps every lane's thresholds are spread so that the share below x is x within 1%.

    The bound is above the sequences' extreme discrepancy (over all intervals modulo 1, hence for every start), computed
    from their sorted points at N = 1,000: 0.0062 and 0.0027. Random thresholds would be off by 1.4 / sqrt(N) = 0.04.
    """
    n = 1000
    root = torch.stack([dither(2, step).moment_thresholds()[0] for step in range(1, n + 1)])
    words = torch.stack([dither(2, step).update_words() for step in range(1, n + 1)]).double() / 65536
    for sequence in (root.double() - 1, words):
        for x in (0.01, 0.1, 0.25, 0.5, 0.77, 0.99):
            share = (sequence < x).double().mean(dim=0)
            assert (share - x).abs().max().item() <= 0.01


def test_coding_is_unbiased_over_steps() -> None:
    """A value coded afresh at every step decodes to itself on average; rounding to nearest would not."""
    exp_avg, root = random_block_matrix(decades=2.0, n_blocks=8)
    n = 2000
    total = torch.zeros_like(root, dtype=torch.float64)
    for step in range(1, n + 1):
        codes = codec.encode(exp_avg, root, dither(8, step))
        total += codec.decode_root(codes.root, codes.grid).view(torch.int32).double()
    interval = codes.grid.span.double()[:, None] * 2**23 / 254
    bias = (total / n - root.view(torch.int32).double()) / interval
    # The mean of dither errors is bounded by the sequence's extreme discrepancy, 0.0016 for 2,000 steps, plus 1e-4
    # codes of float rounding.
    assert bias.abs().max().item() <= 0.01
