"""The 8-bit format on the device: what ``codec`` says, in its order and with its roundings, for a tile of blocks.

Tiles are ``(blocks, 128)``, what belongs to a block is ``(blocks, 1)``. Divisions and roots are the IEEE ones that
Triton has by name: its ``/`` and ``sqrt`` are approximations on NVIDIA. Kernels are to be compiled without FP fusion.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowmem_adam import codec
from lowmem_adam.codec import FORMAT
from lowmem_adam.kernels.gpu.exact import bits_of, divide_integers, float_of

INFINITY: tl.constexpr = tl.constexpr(0x7F800000)
MAGNITUDE: tl.constexpr = tl.constexpr(0x7FFFFFFF)
MANTISSA_BITS: tl.constexpr = tl.constexpr(FORMAT.mantissa_bits)
OCTAVE_BITS: tl.constexpr = tl.constexpr(FORMAT.octave_bits)

_INTERVALS: tl.constexpr = tl.constexpr(FORMAT.root_intervals)
_MAX_OCTAVES: tl.constexpr = tl.constexpr(FORMAT.max_octaves)
_OCTAVES: tl.constexpr = tl.constexpr((1 << FORMAT.octave_bits) - 1)
_BEYOND_0: tl.constexpr = tl.constexpr(FORMAT.ratio_thresholds[0])
_BEYOND_1: tl.constexpr = tl.constexpr(FORMAT.ratio_thresholds[1])
_BEYOND_2: tl.constexpr = tl.constexpr(FORMAT.ratio_thresholds[2])
_BEYOND_3: tl.constexpr = tl.constexpr(FORMAT.ratio_thresholds[3])
_BEYOND_4: tl.constexpr = tl.constexpr(FORMAT.ratio_thresholds[4])
_BEYOND_5: tl.constexpr = tl.constexpr(FORMAT.ratio_thresholds[5])
_BEYOND_6: tl.constexpr = tl.constexpr(FORMAT.ratio_thresholds[6])
_RATIO_SCALE: tl.constexpr = tl.constexpr(float(FORMAT.ratio_scale))
_RATIO_LIMIT: tl.constexpr = tl.constexpr(float(FORMAT.ratio_limit))
_ALWAYS_DITHERED: tl.constexpr = tl.constexpr(float(FORMAT.ratio_always_dithered))
_SEED: tl.constexpr = tl.constexpr(FORMAT.reciprocal_seed)
_FIRST: tl.constexpr = tl.constexpr(FORMAT.reciprocal_first)
_SECOND: tl.constexpr = tl.constexpr(FORMAT.reciprocal_second)
_FOLD: tl.constexpr = tl.constexpr(FORMAT.hash_fold)
_MULTIPLY_BY: tl.constexpr = tl.constexpr(FORMAT.hash_multipliers[0])
_THEN_BY: tl.constexpr = tl.constexpr(FORMAT.hash_multipliers[1])
_SHIFT: tl.constexpr = tl.constexpr(FORMAT.hash_shifts[0])
_THEN_SHIFT: tl.constexpr = tl.constexpr(FORMAT.hash_shifts[1])
_LAST_SHIFT: tl.constexpr = tl.constexpr(FORMAT.hash_shifts[2])
_MOMENT_STEP: tl.constexpr = tl.constexpr(FORMAT.moment_step)
_MOMENT_LANE: tl.constexpr = tl.constexpr(FORMAT.moment_lane)
_UPDATE_STEP: tl.constexpr = tl.constexpr(FORMAT.update_step)
_UPDATE_LANE: tl.constexpr = tl.constexpr(FORMAT.update_lane)
_UPDATE_KEY: tl.constexpr = tl.constexpr(FORMAT.update_key)
_SMALLEST_NORMAL: tl.constexpr = tl.constexpr(codec.SMALLEST_NORMAL)
_LARGEST_ROOT: tl.constexpr = tl.constexpr(codec.LARGEST_ROOT)
_LARGEST_MOMENT: tl.constexpr = tl.constexpr(codec.LARGEST_MOMENT)


# ---------------------------------------------------------------- dither


@triton.jit
def _mix32(word):
    word = (word ^ (word >> _SHIFT)) * _MULTIPLY_BY
    word = (word ^ (word >> _THEN_SHIFT)) * _THEN_BY
    return word ^ (word >> _LAST_SHIFT)


@triton.jit
def block_key(block, seed_hash):
    """``codec.Dither``'s key of block ordinals, int64; uint32, as ``seed_hash``."""
    low = (block & 0xFFFFFFFF).to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    return _mix32(low ^ seed_hash ^ (high * _FOLD))


@triton.jit
def moment_words(key, lane, step):
    """Words of the moments' thresholds, uint32; ``lane`` and ``step`` are uint32."""
    return (key + step * _MOMENT_STEP) + lane * _MOMENT_LANE


@triton.jit
def update_words(key, lane, step):
    """Uniform 16-bit integers for the rounding of parameters, int32."""
    words = (_mix32(key ^ _UPDATE_KEY) + step * _UPDATE_STEP) + lane * _UPDATE_LANE
    return (words >> 16).to(tl.int32)


# ---------------------------------------------------------------- decode


@triton.jit
def power_of_two(octaves):
    """2 to the power of ratio octaves, int32; float32."""
    return float_of((octaves + 127) << MANTISSA_BITS)


@triton.jit
def _grid_bits(floor, span):
    """As ``codec._grid_bits``; int32, ``span`` of octaves alone."""
    return tl.maximum(floor, 1) << MANTISSA_BITS, (tl.maximum(span, 1) << MANTISSA_BITS) // _INTERVALS


@triton.jit
def decode(exp_avg_code, root_code, floor, span, FAST: tl.constexpr):
    """First moments and roots, float32; codes and metadata are int32."""
    floor_bits, per_code = _grid_bits(floor, span & _OCTAVES)
    root = float_of(tl.where(root_code > 0, root_code * per_code + (floor_bits - per_code), 0))
    ratio = exp_avg_code.to(tl.float32)
    exp_avg = divide_integers(ratio, -(tl.abs(ratio) - _RATIO_SCALE), FAST) * root
    return exp_avg * power_of_two(span >> OCTAVE_BITS), root


# ---------------------------------------------------------------- encode


@triton.jit
def extremes(bits):
    """Of each block the largest of some bits without signs, and the smallest that are not zero or else 2^31 - 1."""
    smallest = tl.min((bits - 1) & MAGNITUDE, axis=1, keep_dims=True)
    return tl.max(bits, axis=1, keep_dims=True), tl.where(smallest < MAGNITUDE, smallest + 1, MAGNITUDE)


@triton.jit
def block_grid(largest, smallest):
    """Floor and span of blocks, int32, from the bits of their largest root and of the smallest that is not zero."""
    empty = largest == 0
    top = (largest >> MANTISSA_BITS) + 1
    floor = tl.maximum(tl.maximum(smallest >> MANTISSA_BITS, 1), top - _MAX_OCTAVES)
    floor = tl.where(empty, 0, floor)
    return floor, tl.where(empty, 0, tl.maximum(top - floor, 1))


@triton.jit
def encode_root(root_bits, floor, span, words):
    """Codes of roots, int32, from their bits without signs."""
    floor_bits, per_code = _grid_bits(floor, span)
    threshold = float_of(((words >> 9) | 0x3F800000).to(tl.int32))
    codes_per_bit = tl.div_rn(1.0, per_code.to(tl.float32))
    code = tl.maximum(root_bits - floor_bits, 0).to(tl.float32) * codes_per_bit + threshold
    # Positive, so that truncation is the floor.
    return tl.where(root_bits > 0, tl.minimum(code, _INTERVALS + 1.0).to(tl.int32), 0)


@triton.jit
def _reciprocal(x):
    # The interpreter wants tensors on the left of constants; -(a - b) is b - a, whatever the rounding.
    estimate = float_of(-(bits_of(x) - _SEED))
    estimate = estimate * -(x * estimate - _FIRST)
    return estimate * -(x * estimate - _SECOND)


@triton.jit
def finite_moments(exp_avg, root):
    """What stands for moments and roots that are not finite."""
    root = tl.where((bits_of(root) & MAGNITUDE) < INFINITY, root, _LARGEST_ROOT)
    exp_avg = tl.where(exp_avg == exp_avg, exp_avg, 0.0)
    return tl.minimum(tl.maximum(exp_avg, -_LARGEST_MOMENT), _LARGEST_MOMENT), root


@triton.jit
def _companded(exp_avg, reference):
    return (exp_avg * _reciprocal(tl.abs(exp_avg) + reference)) * _RATIO_SCALE


@triton.jit
def ratio_octaves(exp_avg, root):
    """Of each block the ratio octaves of any moments and roots, int32: ``codec.find_ratio_octaves``."""
    counts = (root > 0.0) & (bits_of(root) < INFINITY) & ((bits_of(exp_avg) & MAGNITUDE) < INFINITY)
    code = tl.abs(_companded(tl.where(counts, exp_avg, 0.0), tl.where(counts, root, 1.0)))
    largest = tl.max(code, axis=1, keep_dims=True)
    octaves = (largest > _BEYOND_0).to(tl.int32) + (largest > _BEYOND_1).to(tl.int32)
    octaves += (largest > _BEYOND_2).to(tl.int32) + (largest > _BEYOND_3).to(tl.int32)
    octaves += (largest > _BEYOND_4).to(tl.int32) + (largest > _BEYOND_5).to(tl.int32)
    return octaves + (largest > _BEYOND_6).to(tl.int32)


@triton.jit
def encode_ratio(exp_avg, root, scale, words, nearest, SCALED: tl.constexpr):
    """Codes of finite first moments, int32, with 2 to the power of ratio octaves where they are scaled at all.

    ``nearest`` tells of each block whether small ratios are rounded so.
    """
    reference = tl.maximum(root, _SMALLEST_NORMAL)
    code = _companded(exp_avg, reference * scale if SCALED else reference)
    threshold = float_of(((words & 0xFFFF) ^ 0x43008000).to(tl.int32))
    dithered = (tl.abs(code) > _ALWAYS_DITHERED) | (nearest == 0)
    code = tl.floor(tl.where(dithered, threshold, 128.5) + code) - 128.0
    return tl.minimum(tl.maximum(code, -_RATIO_LIMIT), _RATIO_LIMIT).to(tl.int32)
