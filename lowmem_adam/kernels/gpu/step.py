"""The step as Triton kernels: one launch for all fragments of a kind, as ``reference.adam_step_`` to the last bit.

A program steps a few blocks of one fragment. ``kernels.triton`` makes the tables that it finds them by; here
are their columns. Nothing is tuned at run time: that would step several times.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowmem_adam.kernels.gpu.exact import are_usual, bits_of, divide, float_of, sqrt
from lowmem_adam.kernels.gpu.format import (
    INFINITY,
    MAGNITUDE,
    OCTAVE_BITS,
    block_grid,
    block_key,
    decode,
    encode_ratio,
    encode_root,
    extremes,
    finite_moments,
    moment_words,
    power_of_two,
    ratio_octaves,
    update_words,
)
from lowmem_adam.kernels.gpu.weights import (
    CORRECTION8,
    FLOAT32,
    NOTHING,
    load_weight,
    master_pointer,
    pointer,
    store_weight,
    typed,
    widened,
)
from lowmem_adam.layout import BLOCK_SIZE

NUM_WARPS = 2

# How a fragment's elements lie in memory.
WHOLE: tl.constexpr = tl.constexpr(0)  # blocks of 128 elements, one after the other, aligned to 16 bytes
ALIGNED: tl.constexpr = tl.constexpr(1)  # rows of a multiple of 16 elements, aligned to 16 bytes
ANY: tl.constexpr = tl.constexpr(2)  # one after the other
STRIDED: tl.constexpr = tl.constexpr(3)  # parameter or gradient in up to MAX_DIMS dimensions

BLOCKS = {WHOLE.value: 8, ALIGNED.value: 8, ANY.value: 4, STRIDED.value: 2}
"""Blocks of a program: with 1,024 elements a thread has 16 codes in one 128-bit load. On an H100 programs of eight
warps took up to a half longer, those of four warps and two alike, or a sixth longer with corrections of 16 bits. Where
codes are loaded one by one, a thread has elements of each block, and more of them would want more registers than there
are."""

MAX_DIMS = 4

# Columns of the table of fragments, int64: addresses, then blocks, then sizes and strides of the innermost dimension
# first, of the parameter and of the gradient.
PARAM, EXP_AVG, EXP_AVG_SQ, FLOOR, SPAN, MASTER = range(6)
COLS, BLOCKS_PER_ROW, FIRST_BLOCK, COUNT, ORIGIN, FIRST_PROGRAM = range(6, 12)
PARAM_DIMS = 12
GRAD_DIMS = PARAM_DIMS + 2 * MAX_DIMS
FRAGMENT_WORDS = GRAD_DIMS + 2 * MAX_DIMS

# Words of a record: nine float32, as records.pack has them, then 32-bit integers.
SEED_HASH, STEP, LIVE = 12, 13, 14
RECORD_WORDS = 16

_BLOCK_SIZE: tl.constexpr = tl.constexpr(BLOCK_SIZE)
_MAX_DIMS: tl.constexpr = tl.constexpr(MAX_DIMS)
_FRAGMENT_WORDS: tl.constexpr = tl.constexpr(FRAGMENT_WORDS)
_RECORD_WORDS: tl.constexpr = tl.constexpr(RECORD_WORDS)
_PARAM: tl.constexpr = tl.constexpr(PARAM)
_EXP_AVG: tl.constexpr = tl.constexpr(EXP_AVG)
_EXP_AVG_SQ: tl.constexpr = tl.constexpr(EXP_AVG_SQ)
_FLOOR: tl.constexpr = tl.constexpr(FLOOR)
_SPAN: tl.constexpr = tl.constexpr(SPAN)
_MASTER: tl.constexpr = tl.constexpr(MASTER)
_COLS: tl.constexpr = tl.constexpr(COLS)
_BLOCKS_PER_ROW: tl.constexpr = tl.constexpr(BLOCKS_PER_ROW)
_FIRST_BLOCK: tl.constexpr = tl.constexpr(FIRST_BLOCK)
_COUNT: tl.constexpr = tl.constexpr(COUNT)
_ORIGIN: tl.constexpr = tl.constexpr(ORIGIN)
_FIRST_PROGRAM: tl.constexpr = tl.constexpr(FIRST_PROGRAM)
_PARAM_DIMS: tl.constexpr = tl.constexpr(PARAM_DIMS)
_GRAD_DIMS: tl.constexpr = tl.constexpr(GRAD_DIMS)
_SEED_HASH: tl.constexpr = tl.constexpr(SEED_HASH)
_STEP: tl.constexpr = tl.constexpr(STEP)
_LIVE: tl.constexpr = tl.constexpr(LIVE)


@triton.jit
def _strided(flat, dims):
    """Where elements lie that are numbered in row-major order; ``dims`` are their sizes and strides."""
    offset = flat * 0
    for dim in tl.static_range(_MAX_DIMS):
        size = tl.load(dims + 2 * dim)
        offset += flat % size * tl.load(dims + 2 * dim + 1)
        flat = flat // size
    return offset


@triton.jit
def _update(moment, denominator):
    # Where eps vanishes in float32, an element that never had a gradient would be 0 / 0. It does not move.
    return tl.where(denominator == 0.0, 0.0, tl.div_rn(moment, denominator))


@triton.jit
def adam_step_kernel(
    programs,  # int32 (programs,): the fragment of each
    fragments,  # int64 (fragments, FRAGMENT_WORDS)
    gradients,  # int64 (fragments, 2): the gradient's address, and which record is the fragment's
    records,  # float32 (records, RECORD_WORDS)
    record_words,  # the same as int32
    skipped,  # int64: is added the number of blocks left out
    PARAM_KIND: tl.constexpr,
    GRAD_KIND: tl.constexpr,
    MASTER_KIND: tl.constexpr,
    CODED: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCKS_AT_ONCE: tl.constexpr,
    DECAYS_GRADIENT: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr,
    WIDE: tl.constexpr,
    FAST: tl.constexpr,
):
    """One Adam step on blocks of a fragment, in place."""
    program = tl.program_id(0)
    index = tl.load(programs + program).to(tl.int64)
    fragment = fragments + index * _FRAGMENT_WORDS
    gradient = gradients + index * 2
    record = tl.load(gradient + 1) * _RECORD_WORDS
    words = record_words + record
    record = records + record
    seed_hash = tl.load(words + _SEED_HASH).to(tl.uint32, bitcast=True)
    step = tl.load(words + _STEP).to(tl.uint32, bitcast=True)

    # Blocks of this program, counted from the fragment's first; none where nothing is to be stepped.
    count = tl.load(fragment + _COUNT) * tl.load(words + _LIVE)
    start = (program - tl.load(fragment + _FIRST_PROGRAM)) * BLOCKS_AT_ONCE
    local = start + tl.arange(0, BLOCKS_AT_ONCE)[:, None].to(tl.int64)
    inside = local < count
    block = tl.load(fragment + _FIRST_BLOCK) + local
    lane = tl.arange(0, _BLOCK_SIZE)[None, :]
    if LAYOUT == WHOLE:
        # The scalar goes into the addresses: what is left of the offsets fits 32 bits.
        origin = start * _BLOCK_SIZE
        at = tl.arange(0, BLOCKS_AT_ONCE)[:, None] * _BLOCK_SIZE + lane
        mask = inside & (lane >= 0)
    else:
        origin = start * 0
        cols = tl.load(fragment + _COLS)
        if LAYOUT == ALIGNED:
            cols = tl.multiple_of(cols, 16)
        per_row = tl.load(fragment + _BLOCKS_PER_ROW)
        row = block // per_row
        before = (block - row * per_row) * _BLOCK_SIZE
        first = row * cols + before - tl.load(fragment + _ORIGIN)
        width = cols - before
        if LAYOUT == ALIGNED:
            first = tl.multiple_of(first, [1, 16])
            width = tl.multiple_of(width, [1, 16])
        at = first + lane
        mask = inside & (lane < width)
    at_param = _strided(at, fragment + _PARAM_DIMS) if LAYOUT == STRIDED else at
    at_grad = _strided(at, fragment + _GRAD_DIMS) if LAYOUT == STRIDED else at

    ALIGNMENT: tl.constexpr = 16 if LAYOUT == WHOLE or LAYOUT == ALIGNED else 1
    param = pointer(tl.load(fragment + _PARAM), PARAM_KIND, ALIGNMENT) + origin
    grad = pointer(tl.load(gradient), GRAD_KIND, ALIGNMENT) + origin
    exp_avg_address = tl.load(fragment + _EXP_AVG)
    exp_avg_sq_address = tl.load(fragment + _EXP_AVG_SQ)

    g = widened(tl.load(grad + at_grad, mask=mask, other=0), GRAD_KIND) * tl.load(record + 8)
    write = mask
    keep = inside
    if SKIP_NONFINITE:
        finite = tl.max(bits_of(g) & MAGNITUDE, axis=1, keep_dims=True) < INFINITY
        left_out = tl.sum((inside & (finite == 0)).to(tl.int64))
        tl.atomic_add(skipped, left_out, mask=left_out > 0)
        write = mask & finite
        keep = inside & finite

    stored = tl.load(param + at_param, mask=mask, other=0)
    if MASTER_KIND == NOTHING:
        weight = widened(stored, PARAM_KIND)
    else:
        master = master_pointer(tl.load(fragment + _MASTER), MASTER_KIND, ALIGNMENT) + origin
        weight = load_weight(stored, tl.load(master + at, mask=mask, other=0), PARAM_KIND, MASTER_KIND)
    if DECAYS_GRADIENT:
        g = g + weight * tl.load(record + 5)

    if CODED:
        codes = typed(exp_avg_address, tl.int8, ALIGNMENT) + origin
        roots = typed(exp_avg_sq_address, tl.uint8, ALIGNMENT) + origin
        floors = typed(tl.load(fragment + _FLOOR), tl.uint8, 1) + local
        spans = typed(tl.load(fragment + _SPAN), tl.uint8, 1) + local
        exp_avg, root = decode(
            tl.load(codes + at, mask=mask, other=0).to(tl.int32),
            tl.load(roots + at, mask=mask, other=0).to(tl.int32),
            tl.load(floors, mask=inside, other=0).to(tl.int32),
            tl.load(spans, mask=inside, other=0).to(tl.int32),
            FAST,
        )
        exp_avg_sq = root * root
    else:
        exp_avgs = typed(exp_avg_address, tl.float32, ALIGNMENT) + origin
        exp_avg_sqs = typed(exp_avg_sq_address, tl.float32, ALIGNMENT) + origin
        exp_avg = tl.load(exp_avgs + at, mask=mask, other=0.0)
        exp_avg_sq = tl.load(exp_avg_sqs + at, mask=mask, other=0.0)

    exp_avg_sq = exp_avg_sq * tl.load(record + 2) + (g * tl.load(record + 3)) * g
    exp_avg = exp_avg * tl.load(record) + g * tl.load(record + 1)
    eps = tl.load(record + 4)
    step_size = tl.load(record + 7)
    if CODED:
        square_bits = bits_of(exp_avg_sq) & MAGNITUDE
        largest, smallest = extremes(square_bits)
        finite_exp_avg = exp_avg
        usual = 0
        if FAST:
            usual = are_usual(exp_avg, largest, smallest, eps, step_size)
        if usual != 0:
            root = sqrt(exp_avg_sq, FAST)
            update = divide(exp_avg * step_size, root + eps, FAST)
            finite_root = root
        else:
            # Lanes beyond a row's end count as zeros, whatever a factor makes of their gradient.
            square_bits = tl.where(mask & (square_bits < INFINITY), square_bits, 0)
            largest, smallest = extremes(square_bits)
            root = tl.where(mask, tl.sqrt_rn(exp_avg_sq), 0.0)
            update = _update(exp_avg * step_size, root + eps)
            finite_exp_avg, finite_root = finite_moments(exp_avg, root)
    else:
        update = _update(exp_avg * step_size, tl.sqrt_rn(exp_avg_sq) + eps)
    weight = weight * tl.load(record + 6) - update

    key = block_key(block, seed_hash)
    lanes = lane.to(tl.uint32)
    noise = lane
    if PARAM_KIND != FLOAT32 and (MASTER_KIND == CORRECTION8 or (STOCHASTIC and MASTER_KIND == NOTHING)):
        noise = update_words(key, lanes, step)
    stored, kept = store_weight(weight, noise, PARAM_KIND, MASTER_KIND, STOCHASTIC)
    tl.store(param + at_param, stored, mask=write)
    if MASTER_KIND != NOTHING:
        tl.store(master + at, kept, mask=write)

    if CODED:
        # Roots are in the order of their squares. Of a block without any, the smallest is not looked at.
        floor, span = block_grid(bits_of(tl.sqrt_rn(float_of(largest))), bits_of(tl.sqrt_rn(float_of(smallest))))
        root_bits = bits_of(root) & MAGNITUDE
        dither = moment_words(key, lanes, step)
        nearest = ((block.to(tl.uint32) ^ step) & 1) == 0
        root_code = encode_root(root_bits, floor, span, dither)
        scale = 1.0
        if WIDE:
            octaves = ratio_octaves(exp_avg, root)
            span += octaves << OCTAVE_BITS
            scale = power_of_two(octaves)
        code = encode_ratio(finite_exp_avg, finite_root, scale, dither, nearest, WIDE)
        tl.store(roots + at, root_code.to(tl.uint8), mask=write)
        tl.store(codes + at, code.to(tl.int8), mask=write)
        tl.store(floors, floor.to(tl.uint8), mask=keep)
        tl.store(spans, span.to(tl.uint8), mask=keep)
    else:
        tl.store(exp_avgs + at, exp_avg, mask=write)
        tl.store(exp_avg_sqs + at, exp_avg_sq, mask=write)
