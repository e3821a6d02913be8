"""The 8-bit format of Adam's moments: described once, encoded and decoded in plain torch.

What has to stay accurate is Adam's update ``u = m / (sqrt(v) + eps)`` of every element, also where gradient
scales inside one block lie decades apart. So, for a block of at most 128 elements:

* ``root = sqrt(v)`` is coded on its float's own bit pattern, linearly between two powers of two. Read as an
  integer, a float is a piecewise-linear log2 of itself: no table and no transcendental, hence the same bits on
  every machine. Code 0 is exact zero ("never had a gradient"); a positive root never decodes to zero. The block
  keeps two bytes: the biased exponent of its floor and the number of octaves above it. Whole octaves are on
  purpose: a grid that followed the block's maximum more closely would move at almost every step, and each move
  rounds all 128 roots anew.
* ``m`` is coded as the ratio ``r = m / root`` to the root *before its rounding*, companded by ``y = r / (1 + |r|)`` =
  ``m / (root + |m|)``, in one signed byte. It needs no scale of its own, its error is directly an error of u, and
  zero is exact. Decoded against the stored root, m takes over that root's rounding error, so that it cancels in u;
  coded against the stored root, m would be free of it and u would not. The code reaches ``MAX_RATIO`` = 7.94. |r| is
  at most (1-b1)/sqrt((1-b2)(1-b1^2/b2)) when b1^2 < b2, and has no bound otherwise: 7.27 for the default betas, 22.9
  for (0.9, 0.9999), 31.6 for (0, 0.999).
* **Ratio octaves.** Where the betas let a ratio exceed ``MAX_RATIO`` (``exceeds``), a block codes all of its ratios as
  r / 2^j with the least j from 0 to 7 for which the largest does not saturate: three bits that the count of octaves
  leaves free in its byte. j follows from the codes before their rounding, c = 143 r / (1 + r), of which the largest is
  compared with what 127/16 * 2^i would have, i = 0 .. 6. Beyond 1016 a code saturates, which errs to smaller steps.
  An element counts if its root is positive and finite and its moment finite: what underflowed or broke in one must
  not coarsen the 127 others. Other betas leave j at 0; decoding honours what a block has, whatever the betas are.
* **Dither.** With beta2 = 0.999 a step moves the root by far less than a code, so rounding to nearest would freeze
  the average. Thresholds follow a Weyl sequence in the step, keyed by (seed, block ordinal, lane): unbiased, one
  addition, and its errors cancel in time. Roots are dithered at every step, and so are ratios beyond 2.04, whose
  codes are wide and whose roots rise fast (the first hundred steps of a steady gradient). Smaller ratios are dithered
  at every second step, blocks taking turns, and rounded to nearest in between: never dithering leaves m stuck up to
  half a code / (1 - beta1) off (updates 12% too large after 400 steps of a constant gradient), always dithering
  costs a third more error in one coding; taking turns keeps the fixed point exact at half of that cost.

The quotient ``m / (root + |m|)`` is a product with ``reciprocal``, a few integer and float operations that round alike
on every machine: there are divisions enough in a step for it to wait for.

Moments on disk, kernels on other devices and tests all read ``FORMAT``; changing any number in it is a new version.
Version 1 had no ratio octaves: its bytes mean in version 2 what they meant.

Sources: Dettmers et al. 2022 (arXiv 2110.02861) for block-wise 8-bit moments; companding by softsign also in
FlashOptim (arXiv 2602.23349); integer hash constants from https://github.com/skeeto/hash-prospector; Weyl increments
from the R2 sequence of M. Roberts (2018), lanes from the fractional parts of sqrt(2) and sqrt(3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lowmem_adam.layout import BLOCK_SIZE, Tile

_MASK32 = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """Every constant of the format. Kernels read these; none of them is stored with a tensor."""

    version: int = 2
    oldest_version: int = 1
    """The first whose state reads the same in this one."""
    block_size: int = BLOCK_SIZE
    mantissa_bits: int = 23
    root_intervals: int = 254
    """Root codes 1 .. 255 stand for 0 .. 254 intervals above the floor."""
    max_octaves: int = 24
    """Roots more than this below the block's largest take the floor, which errs to smaller steps."""
    octave_bits: int = 5
    """Of a block's byte ``span``: the lower ones count the octaves of its roots, the upper three its ratio octaves."""
    ratio_scale: int = 143
    """Ratio code q stands for r = q / (ratio_scale - |q|)."""
    ratio_limit: int = 127
    ratio_always_dithered: int = 96
    """Ratios beyond this code are dithered at every step, the others at every second."""
    ratio_thresholds: tuple[float, ...] = tuple(
        map(
            float.fromhex,
            (
                *("0x1.fcp+6", "0x1.0d0d46p+7", "0x1.154466p+7", "0x1.1990dep+7"),
                *("0x1.1bc4p+7", "0x1.1ce0ep+7", "0x1.1d7028p+7"),
            ),
        )
    )
    """A block has as many ratio octaves as its largest code before rounding exceeds of these: 143 R / (1 + R) of
    R = 127/16 * 2^i, rounded to float32."""
    max_exponent: int = 191
    """Biased exponent of the highest ceiling, 2^64: roots are square roots of float32 numbers."""
    reciprocal_seed: int = 0x7EF32400
    reciprocal_first: float = float.fromhex("0x1.002a9ap1")
    """2.0013: centres the error of the first Newton step, 0.0013 either way."""
    reciprocal_second: float = float.fromhex("0x1.000008p1")
    """2.000001: centres that of the second, 1.1e-6 either way."""
    hash_fold: int = 0x9E3779B9
    hash_multipliers: tuple[int, int] = (0x7FEB352D, 0x846CA68B)
    hash_shifts: tuple[int, int, int] = (16, 15, 16)
    moment_step: int = 0xC13F91E1
    """Weyl increment a step: its upper and lower halves are the two coordinates of the R2 sequence."""
    moment_lane: int = 0x6A09BB67
    update_step: int = 0x9E3779B9
    update_lane: int = 0xBB67AE85
    update_key: int = 0x68E31DA4


FORMAT = BlockFormat()

_INFINITY_BITS = 0x7F800000

SMALLEST_NORMAL = 2.0**-126
LARGEST_ROOT = 2.0**64
"""No square root of a float32 reaches it: what stands for a root that is not finite."""
LARGEST_MOMENT = 2.0**100
"""Beyond every ratio to a root; a first moment reaches it only where the second overflows."""

MAX_RATIO = FORMAT.ratio_limit / (FORMAT.ratio_scale - FORMAT.ratio_limit)
"""Largest |m / root| that a code stands for: 127 / 16."""


class Grid(NamedTuple):
    """Metadata of blocks, both ``(n_blocks,)`` uint8: biased exponent of the floor; octaves above it and, in the upper
    three bits, ratio octaves.
    """

    floor: Tensor
    span: Tensor


class Codes(NamedTuple):
    """Coded moments of a block matrix: ``exp_avg`` int8, ``root`` uint8, both ``(n_blocks, width)``, and the grid."""

    exp_avg: Tensor
    root: Tensor
    grid: Grid


def mix32(word: int) -> int:
    """The hash of a non-negative integer to 32 bits: its upper bits folded in, then shifts and odd multipliers."""
    (first, second, third), (by, then_by) = FORMAT.hash_shifts, FORMAT.hash_multipliers
    word = (word ^ (word >> 32) * FORMAT.hash_fold) & _MASK32
    word = ((word ^ word >> first) * by) & _MASK32
    word = ((word ^ word >> second) * then_by) & _MASK32
    return word ^ word >> third


def _mix32_tensor(word: Tensor) -> Tensor:
    """``mix32`` of non-negative int64 values; products wrap, which leaves their low 32 bits right."""
    (first, second, third), (by, then_by) = FORMAT.hash_shifts, FORMAT.hash_multipliers
    word = (word ^ (word >> 32) * FORMAT.hash_fold) & _MASK32
    word = ((word ^ (word >> first)) * by) & _MASK32
    word = ((word ^ (word >> second)) * then_by) & _MASK32
    return word ^ (word >> third)


def _as_int32(word: Tensor) -> Tensor:
    """Unsigned 32-bit values held in int64 as the int32 of the same bits."""
    return torch.where(word > 0x7FFFFFFF, word - (1 << 32), word).to(torch.int32)


class Dither:
    """Rounding thresholds of a tile of blocks at one step: a pure function of (seed, step, block ordinal, lane).

    Modulo 2^32, ``key = mix32(block ^ mix32(seed))`` and ``w = key + lane * moment_lane + step * moment_step``; for
    16-bit parameters ``w' = mix32(key ^ update_key) + lane * update_lane + step * update_step``. The threshold of a
    root is ``(w >> 9) * 2^-23``, that of a ratio ``((w ^ 0x8000) & 0xFFFF) * 2^-16``, and a parameter gets
    ``w' >> 16``.

    Args:
        tile: the blocks (their ordinals count from the start of the parameter).
        step: 1 for the first step of the parameter.
        seed: of the optimizer, ``0 <= seed < 2**63``.
        device: where the thresholds are wanted.
    """

    def __init__(self, tile: Tile, step: int, seed: int, device: torch.device) -> None:
        self.width = tile.width
        self.step = step
        self.block = torch.arange(tile.first_block, tile.first_block + tile.n_blocks, dtype=torch.int64, device=device)
        self.key = _mix32_tensor(self.block ^ mix32(seed))

    def _words(self, key: Tensor, lane: int, step: int) -> Tensor:
        """``key + lane index * lane + self.step * step`` modulo 2**32, int32 ``(n_blocks, width)``."""
        lanes = torch.arange(self.width, dtype=torch.int64, device=key.device) * lane & _MASK32
        start = (key + (self.step * step & _MASK32)) & _MASK32
        return _as_int32(start)[:, None] + _as_int32(lanes)[None, :]

    def moment_thresholds(self) -> tuple[Tensor, Tensor, Tensor]:
        """Thresholds of the roots and of the ratios, and whether it is a block's turn to round small ratios to nearest.

        They come with the offset that the codes need anyway, as which their bits are put together without arithmetic.

        Returns:
            float32 ``(n_blocks, width)``, 1 + [0, 1) and 128 + [0, 1), and bool ``(n_blocks, 1)``.
        """
        words = self._words(self.key, FORMAT.moment_lane, FORMAT.moment_step)
        root = (words >> 9).bitwise_and_(0x7FFFFF).bitwise_or_(0x3F800000).view(torch.float32)
        ratio = words.bitwise_and_(0xFFFF).bitwise_xor_(0x43008000).view(torch.float32)
        return root, ratio, (((self.block + self.step) & 1) == 0)[:, None]

    def update_words(self) -> Tensor:
        """Uniform 16-bit integers for the stochastic rounding of parameters, int32 ``(n_blocks, width)``."""
        key = _mix32_tensor(self.key ^ FORMAT.update_key)
        return self._words(key, FORMAT.update_lane, FORMAT.update_step).bitwise_right_shift_(16).bitwise_and_(0xFFFF)


def block_grid(root: Tensor) -> Grid:
    """The grid of each block of roots, float32 ``(n_blocks, width)``; padding and untouched elements are zero.

    The floor is the power of two at or below the smallest positive root, the ceiling the one above the largest,
    unless they lie more than ``max_octaves`` apart. Infinite and NaN roots do not count: one of them must not ruin
    the 127 others. A block without a positive finite root gets floor 0 and span 0 (and is coded as if span were 1).
    There are no ratio octaves yet.
    """
    # As integers, without the sign that a NaN may have. Comparisons and selections of single elements cost torch
    # ten times what arithmetic does, so they are kept to whole blocks and to the rare case.
    bits = root.view(torch.int32) & 0x7FFFFFFF
    top = bits.amax(dim=1)
    if root.device.type != "cpu" or bool((top >= _INFINITY_BITS).any()):
        bits = torch.where(bits < _INFINITY_BITS, bits, 0)
        top = bits.amax(dim=1)
    # Subtracting 1 sends zeros beyond all others.
    bottom = (bits - 1).bitwise_and_(0x7FFFFFFF).amin(dim=1) + 1
    empty = top == 0
    top = top >> FORMAT.mantissa_bits
    floor = torch.maximum((bottom >> FORMAT.mantissa_bits).clamp_(min=1), top + 1 - FORMAT.max_octaves)
    floor = floor.masked_fill_(empty, 0)
    span = (top + 1 - floor).clamp_(min=1).masked_fill_(empty, 0)
    return Grid(floor.to(torch.uint8), span.to(torch.uint8))


def grid_octaves(span: Tensor) -> Tensor:
    """Of bytes ``span`` the octaves of the roots, uint8."""
    return span.bitwise_and((1 << FORMAT.octave_bits) - 1)


def ratio_octaves(span: Tensor) -> Tensor:
    """Of bytes ``span`` the ratio octaves, uint8."""
    return span >> FORMAT.octave_bits


def exceeds(beta1: float, beta2: float) -> bool:
    """Whether a ratio m / root can get beyond ``MAX_RATIO`` with these betas, so that blocks look for ratio octaves."""
    falls = 1.0 - beta1 * beta1 / beta2 if beta1 * beta1 < beta2 else 0.0
    return not (1.0 - beta1) ** 2 <= MAX_RATIO**2 * (1.0 - beta2) * falls


def _grid_bits(grid: Grid) -> tuple[Tensor, Tensor]:
    """Bits of the floor, and bits from one code to the next; both int32 ``(n_blocks, 1)``.

    A block of zeros (floor 0, span 0) counts as one octave from 2^-126 on: no code but 0 may decode to zero.
    """
    floor = grid.floor.to(torch.int32).clamp_(min=1)[:, None] << FORMAT.mantissa_bits
    span = grid_octaves(grid.span).to(torch.int32).clamp_(min=1)[:, None] << FORMAT.mantissa_bits
    return floor, torch.div(span, FORMAT.root_intervals, rounding_mode="floor")


def encode_root(root: Tensor, grid: Grid, threshold: Tensor) -> Tensor:
    """Roots, float32 ``(n_blocks, width)``, to uint8 codes: 0 for zero, else 1 .. 255; not finite takes the ceiling.

    With ``fl`` for one rounding to float32 (nearest, ties to even), ``bits`` the root's bits without their sign, and
    ``per_code = (span << 23) // 254``, an exact float:
    ``code = min(255, trunc(fl(fl(fl(max(bits - (floor << 23), 0)) * fl(1 / per_code)) + threshold)))``, where the
    threshold lies in [1, 2), and span is in octaves.
    """
    floor, per_code = _grid_bits(grid)
    bits = root.view(torch.int32) & 0x7FFFFFFF
    # Tensor by tensor: torch computes a number divided by a tensor as a product with the rounded reciprocal.
    codes_per_bit = torch.ones_like(root[:, :1]) / per_code.to(torch.float32)
    above = (bits - floor).clamp_(min=0).to(torch.float32)
    code = above.mul_(codes_per_bit).add_(threshold).floor_().clamp_(max=FORMAT.root_intervals + 1)
    return code.mul_(bits.clamp_(max=1)).to(torch.uint8)


def decode_root(code: Tensor, grid: Grid) -> Tensor:
    """uint8 codes ``(n_blocks, width)`` to float32 roots: the points of the grid, positive for every code but 0.

    ``bits = (floor << 23) + (code - 1) * per_code``; code 0 is 0.0. The highest point lies below the ceiling by
    4 * span bits, so that its square is finite also where the ceiling is 2^64.
    """
    floor, per_code = _grid_bits(grid)
    level = code.to(torch.int32)
    return (level * per_code).add_(floor - per_code).mul_(level.clamp_(max=1)).view(torch.float32)


def reciprocal(x: Tensor) -> Tensor:
    """``1 / x`` to 1.1e-6, for float32 from 2^-126 to 2^125: two Newton steps from an integer seed.

    With the seed ``s = float(reciprocal_seed - bits(x))``, which mirrors the exponent and is off by up to 5.1%:
    ``s' = fl(s * fl(reciprocal_first - fl(x * s)))``, and the same again with ``reciprocal_second``.
    """
    estimate = (FORMAT.reciprocal_seed - x.view(torch.int32)).view(torch.float32)
    for constant in (FORMAT.reciprocal_first, FORMAT.reciprocal_second):
        estimate = estimate * (x * estimate).neg_().add_(constant)
    return estimate


def _companded(exp_avg: Tensor, root: Tensor, octaves: Tensor | None) -> Tensor:
    """Codes of ratios before their rounding, between -143 and 143."""
    root = root.nan_to_num(LARGEST_ROOT, posinf=LARGEST_ROOT).clamp_(min=SMALLEST_NORMAL)
    exp_avg = exp_avg.nan_to_num(0.0).clamp_(-LARGEST_MOMENT, LARGEST_MOMENT)
    total = exp_avg.abs().add_(root if octaves is None else root.mul_(_power_of_two(octaves)))
    return (exp_avg * reciprocal(total)).mul_(FORMAT.ratio_scale)


def _power_of_two(octaves: Tensor) -> Tensor:
    """2^j of ratio octaves ``(n_blocks,)``, float32 ``(n_blocks, 1)``."""
    return (octaves.to(torch.int32)[:, None] + 127 << FORMAT.mantissa_bits).view(torch.float32)


def find_ratio_octaves(exp_avg: Tensor, root: Tensor) -> Tensor:
    """The ratio octaves of each block, uint8 ``(n_blocks,)``; arguments as of ``encode_ratio``.

    The number of ``ratio_thresholds`` below the largest ``|fl(fl(m * reciprocal(fl(max(root, 2^-126) + |m|))) * 143)|``
    of a finite m beside a finite and positive root; 0 where a block has none.
    """
    counts = (root > 0).logical_and_(root < torch.inf).logical_and_(exp_avg.abs() < torch.inf)
    largest = torch.where(counts, _companded(exp_avg, root, None).abs_(), 0.0).amax(dim=1)
    return torch.stack([largest > threshold for threshold in FORMAT.ratio_thresholds]).sum(dim=0).to(torch.uint8)


def encode_ratio(
    exp_avg: Tensor, root: Tensor, threshold: Tensor, nearest: Tensor, octaves: Tensor | None = None
) -> Tensor:
    """First moments, float32 ``(n_blocks, width)``, to int8 codes relative to the roots before their rounding.

    ``nearest``: bool ``(n_blocks, 1)``, where ratios up to ``ratio_always_dithered`` are rounded to nearest instead.
    ``octaves``: the ratio octaves j of each block, uint8 ``(n_blocks,)``; None where all are 0. An exact zero has code
    0, and so has a moment that is NaN.

    ``y = fl(fl(m * reciprocal(fl(max(root, 2^-126) * 2^j + |m|))) * 143)``; the threshold, in [128, 129), becomes 128.5
    where ``nearest`` and ``|y| <= 96``; ``code = clamp(trunc(fl(y + threshold)) - 128, -127, 127)``. A root that is
    not finite counts as 2^64, above which there is none, and an infinite moment as 2^100. Where g^2 underflows, root
    is 0 beside m: whatever the code is then, it decodes to 0.
    """
    code = _companded(exp_avg, root, octaves)
    # Where a block is to round small ratios to nearest, the threshold is 128.5. The selection is spelled as
    # arithmetic, which is exact here: `dithered` is 0 or 1, since codes beyond the limit exceed it by more than 2^-40.
    dithered = code.abs().sub_(FORMAT.ratio_always_dithered).mul_(2.0**40).clamp_(0, 1)
    dithered = dithered.add_((~nearest).to(torch.float32)).clamp_(max=1)
    code = dithered.mul_(threshold - 128.5).add_(128.5).add_(code).floor_().sub_(128.0)
    return code.clamp_(-FORMAT.ratio_limit, FORMAT.ratio_limit).to(torch.int8)


def decode_ratio(code: Tensor, root: Tensor, octaves: Tensor | None = None) -> Tensor:
    """int8 codes ``(n_blocks, width)`` and decoded roots to float32 moments; ``octaves`` as of ``encode_ratio``.

    ``fl(fl(fl(q / (143 - |q|)) * root) * 2^j)``.
    """
    code = code.to(torch.float32)
    exp_avg = code.div_(FORMAT.ratio_scale - code.abs()).mul_(root)
    return exp_avg if octaves is None else exp_avg.mul_(_power_of_two(octaves))


def encode(exp_avg: Tensor, root: Tensor, dither: Dither, wide: bool = False) -> Codes:
    """Code a block matrix of moments.

    Args:
        exp_avg: first moment, float32 ``(n_blocks, width)``, padding zero.
        root: square root of the second moment, same shape, not negative.
        dither: thresholds of exactly these blocks.
        wide: whether to look for ratio octaves, as the betas decide (``exceeds``).
    """
    root_threshold, ratio_threshold, nearest = dither.moment_thresholds()
    grid = block_grid(root)
    root_code = encode_root(root, grid, root_threshold)
    octaves = find_ratio_octaves(exp_avg, root) if wide else None
    exp_avg_code = encode_ratio(exp_avg, root, ratio_threshold, nearest, octaves)
    return Codes(exp_avg_code, root_code, grid if octaves is None else with_ratio_octaves(grid, octaves))


def with_ratio_octaves(grid: Grid, octaves: Tensor) -> Grid:
    """The grid with these in place of none."""
    return Grid(grid.floor, grid.span | octaves << FORMAT.octave_bits)


def decode(codes: Codes) -> tuple[Tensor, Tensor]:
    """The first moment and the root of the second that the codes stand for, float32 ``(n_blocks, width)``."""
    root = decode_root(codes.root, codes.grid)
    return decode_ratio(codes.exp_avg, root, ratio_octaves(codes.grid.span)), root
