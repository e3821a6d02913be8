"""Parameters on the device, and what is kept beside them: ``rounding`` in its order, for a tile of elements.

bfloat16 is loaded, rounded and stored as its bits: conversions differ in what they make of NaN, and Triton's
interpreter truncates. Kinds are numbers, as a kernel is compiled for each of them; choices by kind need an ``else``,
since the compiler reads on after a ``return``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lowmem_adam.kernels import rounding
from lowmem_adam.kernels.gpu.exact import bits_of, float_of
from lowmem_adam.kernels.gpu.format import INFINITY, MAGNITUDE

FLOAT32: tl.constexpr = tl.constexpr(0)
BFLOAT16: tl.constexpr = tl.constexpr(1)
FLOAT16: tl.constexpr = tl.constexpr(2)
DTYPES = {torch.float32: FLOAT32.value, torch.bfloat16: BFLOAT16.value, torch.float16: FLOAT16.value}
"""Kinds of parameters and gradients."""

NOTHING: tl.constexpr = tl.constexpr(0)
WEIGHT: tl.constexpr = tl.constexpr(1)
CORRECTION16: tl.constexpr = tl.constexpr(2)
CORRECTION8: tl.constexpr = tl.constexpr(3)
MASTERS = {
    None: NOTHING.value,
    torch.float32: WEIGHT.value,
    torch.int16: CORRECTION16.value,
    torch.int8: CORRECTION8.value,
}
"""Kinds of what is kept beside a parameter."""

_EXPONENTS_APART: tl.constexpr = tl.constexpr(rounding._EXPONENTS_APART)
_SMALLEST_NORMAL: tl.constexpr = tl.constexpr(rounding._SMALLEST_NORMAL)
_LOWEST_NORMAL_WORD: tl.constexpr = tl.constexpr(rounding._LOWEST_NORMAL_WORD)
_TO_NEAREST: tl.constexpr = tl.constexpr(rounding._TO_NEAREST)
_BFLOAT16_INFINITY: tl.constexpr = tl.constexpr(rounding._INFINITE_HALF[torch.bfloat16])
_FLOAT16_INFINITY: tl.constexpr = tl.constexpr(rounding._INFINITE_HALF[torch.float16])
_BFLOAT16_NAN: tl.constexpr = tl.constexpr(rounding._NAN_WORD[torch.bfloat16])
_FLOAT16_NAN: tl.constexpr = tl.constexpr(rounding._NAN_WORD[torch.float16])


# ---------------------------------------------------------------- memory


@triton.jit
def typed(address, DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr):
    """An address as a pointer to elements; the hint holds for the very operation that it is given for."""
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), ALIGNMENT)


@triton.jit
def pointer(address, KIND: tl.constexpr, ALIGNMENT: tl.constexpr):
    """An address as a pointer to stored elements of a kind."""
    if KIND == FLOAT32:
        return typed(address, tl.float32, ALIGNMENT)
    else:
        return typed(address, tl.int16, ALIGNMENT)


@triton.jit
def master_pointer(address, MASTER: tl.constexpr, ALIGNMENT: tl.constexpr):
    """An address as a pointer to what is kept beside a parameter."""
    if MASTER == WEIGHT:
        return typed(address, tl.float32, ALIGNMENT)
    elif MASTER == CORRECTION16:
        return typed(address, tl.int16, ALIGNMENT)
    else:
        return typed(address, tl.int8, ALIGNMENT)


@triton.jit
def widened(stored, KIND: tl.constexpr):
    """Stored elements as float32."""
    if KIND == FLOAT32:
        return stored
    elif KIND == BFLOAT16:
        return float_of(stored.to(tl.int32) << 16)
    else:
        return stored.to(tl.float16, bitcast=True).to(tl.float32)


# ---------------------------------------------------------------- from the parameter


@triton.jit
def load_weight(stored, kept, KIND: tl.constexpr, MASTER: tl.constexpr):
    """The float32 weight of stored parameters and of what is kept beside them: ``rounding.widen``."""
    if MASTER == NOTHING:
        return widened(stored, KIND)
    elif MASTER == WEIGHT:
        fits = (_to_nearest(kept, KIND) == stored) & (kept == kept)
        return tl.where(fits, kept, widened(stored, KIND))
    else:
        return _from_word(_joined(stored, kept, KIND, MASTER), stored, KIND)


@triton.jit
def _joined(stored, kept, KIND: tl.constexpr, MASTER: tl.constexpr):
    half = stored.to(tl.int32) & 0x7FFF
    rest = kept.to(tl.int32)
    if MASTER == CORRECTION8:
        rest = rest << 8
    if KIND == BFLOAT16:
        rest = tl.where(half < _BFLOAT16_INFINITY, rest, 0)
    else:
        rest = tl.where(half < _FLOAT16_INFINITY, rest, 0)
    return tl.maximum((half << 16) + rest, 0)


@triton.jit
def _from_word(word, stored, KIND: tl.constexpr):
    sign = (stored.to(tl.int32) & 0x8000) << 16
    if KIND == BFLOAT16:
        return float_of(word | sign)
    else:
        exact = word & ~((word >> 24) | (word >> 25))
        below = exact.to(tl.float32) * 2.0**-40
        normal = float_of((word >> 3) + _EXPONENTS_APART)
        magnitude = tl.where(word < _LOWEST_NORMAL_WORD, below, normal)
        weight = float_of(bits_of(magnitude) | sign)
        finite = (stored.to(tl.int32) & 0x7FFF) < _FLOAT16_INFINITY
        return tl.where(finite, weight, widened(stored, KIND))


# ---------------------------------------------------------------- to the parameter


@triton.jit
def store_weight(weight, words, KIND: tl.constexpr, MASTER: tl.constexpr, STOCHASTIC: tl.constexpr):
    """What is stored of weights, and what is kept beside it: ``rounding.narrow``; ``words`` as its."""
    if KIND == FLOAT32:
        return weight, weight
    elif MASTER == CORRECTION16 or MASTER == CORRECTION8:
        return _split(weight, words, KIND, MASTER)
    elif MASTER == WEIGHT or not STOCHASTIC:
        return _to_nearest(weight, KIND), weight
    elif KIND == BFLOAT16:
        return _stochastic_bfloat16(weight, words), weight
    else:
        return _stochastic_float16(weight, words), weight


@triton.jit
def _to_nearest(weight, KIND: tl.constexpr):
    if KIND == BFLOAT16:
        bits = bits_of(weight)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where((bits & MAGNITUDE) > INFINITY, 0x7FC0, rounded).to(tl.int16)
    else:
        return weight.to(tl.float16).to(tl.int16, bitcast=True)


@triton.jit
def _stochastic_bfloat16(weight, words):
    bits = bits_of(weight)
    magnitude = bits & MAGNITUDE
    rounded = tl.where(magnitude < INFINITY, bits + words, bits) >> 16
    return tl.where(magnitude > INFINITY, 0x7FC0, rounded).to(tl.int16)


@triton.jit
def _stochastic_float16(weight, words):
    words = words >> 3
    bits = bits_of(weight)
    magnitude = tl.abs(weight)
    above = float_of((bits + words) & -8192)
    below = tl.floor(magnitude * 2.0**24 + words.to(tl.float32) * 2.0**-13) * 2.0**-24
    below = float_of(bits_of(below) | (bits & ~MAGNITUDE))
    rounded = tl.where(magnitude < _SMALLEST_NORMAL, below, above)
    rounded = tl.where((bits & MAGNITUDE) < INFINITY, rounded, weight)
    return rounded.to(tl.float16).to(tl.int16, bitcast=True)


@triton.jit
def _split(weight, words, KIND: tl.constexpr, MASTER: tl.constexpr):
    word = _to_word(weight, KIND)
    if MASTER == CORRECTION8:
        word = (word + (words >> 8)) & -256
    half = (word + 0x8000) >> 16
    rest = word - (half << 16)
    stored = (half | ((bits_of(weight) >> 16) & 0x8000)).to(tl.int16)
    if MASTER == CORRECTION16:
        return stored, rest.to(tl.int16)
    else:
        return stored, (rest >> 8).to(tl.int8)


@triton.jit
def _to_word(weight, KIND: tl.constexpr):
    magnitude = bits_of(weight) & MAGNITUDE
    if KIND == BFLOAT16:
        return tl.where(magnitude > INFINITY, _BFLOAT16_NAN, magnitude)
    else:
        # Beyond 2^16 all is infinite.
        normal = (tl.minimum(magnitude, (127 + 16) << 23) - _EXPONENTS_APART) << 3
        small = float_of(magnitude) < _SMALLEST_NORMAL
        steps = (tl.where(small, float_of(magnitude), 0.0) * 2.0**40 + _TO_NEAREST).to(tl.int32)
        return tl.where(magnitude > INFINITY, _FLOAT16_NAN, tl.where(small, steps, normal))
