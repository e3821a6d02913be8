"""Hyperparameters and addresses that are put together on the device, where a CUDA graph replays a step.

A replay runs kernels with the arguments that they were captured with, and nothing of Python. So the step is counted on
the device, in the same doubles as ``StepScalars.at_step``, and the addresses of gradients, which are the graph's own,
are written down by kernels that have them as arguments.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowmem_adam.kernels.gpu.step import LIVE, RECORD_WORDS, SEED_HASH, STEP

# Columns of recipes, float64: settings that are known on the host.
BETA1, BETA2, EPS, L2_DECAY, DECOUPLED_DECAY, SIGN = range(6)
RECIPE_WORDS = 6
# Columns of places, int64: where the step is counted, which row of rates, the seed's hash.
STEP_ADDRESS, RATES, HASH = range(3)
PLACE_WORDS = 3
# Columns of rates, float64: what may be a tensor.
LR, GRAD_SCALE, FOUND_INF = range(3)
RATE_WORDS = 3

ROWS_AT_ONCE = 16
"""Gradients whose addresses one launch writes."""

_ROWS_AT_ONCE: tl.constexpr = tl.constexpr(ROWS_AT_ONCE)
_MAX_STEP_BITS: tl.constexpr = tl.constexpr(63)
_RECORD_WORDS: tl.constexpr = tl.constexpr(RECORD_WORDS)
_SEED_HASH: tl.constexpr = tl.constexpr(SEED_HASH)
_STEP: tl.constexpr = tl.constexpr(STEP)
_LIVE: tl.constexpr = tl.constexpr(LIVE)
_RECIPE_WORDS: tl.constexpr = tl.constexpr(RECIPE_WORDS)
_PLACE_WORDS: tl.constexpr = tl.constexpr(PLACE_WORDS)
_RATE_WORDS: tl.constexpr = tl.constexpr(RATE_WORDS)


@triton.jit
def _power(base, exponent):
    """``fragment.power``."""
    result = base * 0.0 + 1.0
    for _ in range(_MAX_STEP_BITS):
        result = tl.where((exponent & 1) != 0, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result


@triton.jit
def record_kernel(
    recipes,  # float64 (fragments, RECIPE_WORDS)
    places,  # int64 (fragments, PLACE_WORDS)
    rates,  # float64 (groups, RATE_WORDS)
    records,  # float32 (fragments, RECORD_WORDS)
    record_words,  # the same as int32
):
    """Counts a fragment's step and writes its record: ``StepScalars.at_step`` and ``records.pack``."""
    index = tl.program_id(0)
    recipe = recipes + index * _RECIPE_WORDS
    place = places + index * _PLACE_WORDS
    rate = rates + tl.load(place + 1) * _RATE_WORDS
    record = records + index * _RECORD_WORDS
    words = record_words + index * _RECORD_WORDS

    live = (tl.load(rate + 2) == 0.0).to(tl.int32)
    counter = tl.load(place).to(tl.pointer_type(tl.int64))
    step = tl.load(counter) + live
    beta1 = tl.load(recipe)
    beta2 = tl.load(recipe + 1)
    lr = tl.load(rate)
    root_correction = tl.sqrt(1.0 - _power(beta2, step))
    step_size = lr * root_correction / (1.0 - _power(beta1, step))
    tl.store(record, beta1.to(tl.float32))
    tl.store(record + 1, (1.0 - beta1).to(tl.float32))
    tl.store(record + 2, beta2.to(tl.float32))
    tl.store(record + 3, (1.0 - beta2).to(tl.float32))
    tl.store(record + 4, (tl.load(recipe + 2) * root_correction).to(tl.float32))
    tl.store(record + 5, tl.load(recipe + 3).to(tl.float32))
    tl.store(record + 6, (1.0 - lr * tl.load(recipe + 4)).to(tl.float32))
    tl.store(record + 7, step_size.to(tl.float32))
    tl.store(record + 8, (tl.load(recipe + 5) * tl.load(rate + 1)).to(tl.float32))
    tl.store(words + _SEED_HASH, tl.load(place + 2).to(tl.int32))
    tl.store(words + _STEP, step.to(tl.int32))
    tl.store(words + _LIVE, live)
    tl.store(counter, step)


@triton.jit
def _plain(word):
    """What ``kernels.triton`` has made an odd and large number of."""
    return (word & ((1 << 60) - 1)) >> 1


@triton.jit
def address_kernel(
    gradients,  # int64 (fragments, 2), as of adam_step_kernel
    rows,  # a tuple of ROWS_AT_ONCE numbers, made odd and large: Triton compiles anew for 1 and multiples of 16
    addresses,  # likewise, as are the next
    places,
):
    """Writes rows of the table of gradients from its own arguments."""
    for index in tl.static_range(_ROWS_AT_ONCE):
        row = gradients + _plain(rows[index]) * 2
        tl.store(row, _plain(addresses[index]))
        tl.store(row + 1, _plain(places[index]))
