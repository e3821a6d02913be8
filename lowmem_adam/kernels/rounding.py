"""How a 16-bit parameter takes its float32 weight, and what is kept of the rest: the oracle of every kernel.

Without more memory a weight is rounded to nearest or stochastically. With more, a *master* tensor keeps what the
parameter cannot hold, an entry an element, so that the next step starts from the weight and not from its rounding:

* float32, the weight itself. The parameter is its rounding to nearest, ties to even.
* int16 or int8, a *correction*: the signed rest, in 65536ths or 256ths of the distance between the parameter's
  neighbours.

A correction comes about in three steps. The magnitude of the weight is written as a *word*, an integer in 65536ths of
the parameter's own steps, so that the upper half of a word is a parameter's bits:

* bfloat16: the bits of the float32, as they are;
* float16 from 2^-14 on: the bits of the float32 with the exponents that float16 has, ``(bits - (112 << 23)) << 3``;
* float16 below: fixed point, in multiples of 2^-40, so that the two meet at 2^-14. A weight from 2^-17 on is such a
  multiple; a smaller one is rounded to nearest.

For 8 bits the word is rounded to a multiple of 256, up with the probability of the part cut off, by the words that also
round stochastically: updates that are smaller add up on average. Then the word is rounded to a parameter, halves away
from zero, ``(word + 0x8000) >> 16``: the rest lies in [-0x8000, 0x7FFF] and its 16 bits are the lower half of the word.
So a weight of which 16 bits are kept comes back exactly, but for float16 below 2^-17.

A parameter may have been changed since, by a loaded model or by hand. A master weight that does not round to it is
dropped, and the parameter is the weight. A correction cannot tell; the weight then is one that still rounds to the
parameter, off by at most half of the distance to its neighbour. Two parameters take no such correction: infinities and
NaN take none, and zero takes none that is negative, which would borrow from its sign.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowmem_adam import codec

CORRECTIONS = (torch.int16, torch.int8)

_MAGNITUDE = 0x7FFFFFFF
_INFINITY = 0x7F800000
_INFINITE_HALF = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
"""The upper half of an infinity's word; NaN have larger ones."""
_NAN_WORD = {torch.bfloat16: 0x7FC00000, torch.float16: 0x7E000000}
_EXPONENTS_APART = 112 << 23
"""Between the exponents of float32 and float16, in bits of float32."""
_SMALLEST_NORMAL = 2.0**-14
_LOWEST_NORMAL_WORD = 1 << 26
"""Of float16, the word of 2^-14."""
_TO_NEAREST = 0.5 - 2.0**-25
"""What makes nearest of truncation: with a whole half, sums from 2^23 on would be rounded, and integers change."""


# ---------------------------------------------------------------- to the parameter, and back


def widen(param: Tensor, master: Tensor | None) -> Tensor:
    """The float32 weight of a parameter.

    Args:
        param: float32, bfloat16 or float16.
        master: of the same shape, float32, int16 or int8; None where nothing is kept.
    """
    if master is None:
        return param.to(torch.float32)
    if master.dtype != torch.float32:
        return _from_word(_joined(param, master), param)
    # A NaN fits no parameter: in one that is NaN as well there is nothing to keep.
    fits = (master.to(param.dtype).view(torch.int16) == param.view(torch.int16)) & ~master.isnan()
    return torch.where(fits, master, param.to(torch.float32))


def narrow(
    weight: Tensor, dtype: torch.dtype, master: torch.dtype | None, dither: codec.Dither, stochastic: bool
) -> tuple[Tensor, Tensor | None]:
    """A parameter of a dtype, and what is to be kept in a master tensor of another; the inverse of ``widen``.

    Args:
        weight: float32 ``(n_blocks, width)``.
        dtype: of the parameter.
        master: of what is kept; None for nothing.
        dither: of exactly these blocks.
        stochastic: how a parameter of which nothing is kept is rounded.
    """
    if master is None:
        return _rounded(weight, dtype, dither, stochastic), None
    if master == torch.float32:
        return weight.to(dtype), weight
    return split(weight, dtype, master, dither.update_words() if master == torch.int8 else None)


def split(weight: Tensor, dtype: torch.dtype, master: torch.dtype, words: Tensor | None) -> tuple[Tensor, Tensor]:
    """A parameter and its correction.

    ``words``: as of ``stochastic_bfloat16``, for 8 bits.
    """
    word = _to_word(weight, dtype)
    if words is not None:
        word = (word + (words >> 8)) & -256
    half = (word + 0x8000) >> 16
    rest = word - (half << 16)
    sign = (weight.view(torch.int32) >> 16) & 0x8000
    param = (half | sign).to(torch.int16).view(dtype)
    return param, rest.to(torch.int16) if master == torch.int16 else (rest >> 8).to(torch.int8)


def _joined(param: Tensor, correction: Tensor) -> Tensor:
    """The word of a parameter and its correction, whatever both are; int32, below 2^31."""
    half = param.view(torch.int16).to(torch.int32) & 0x7FFF
    rest = correction.to(torch.int32)
    if correction.dtype == torch.int8:
        rest <<= 8
    rest *= half < _INFINITE_HALF[param.dtype]
    return ((half << 16) + rest).clamp_(min=0)


def _to_word(weight: Tensor, dtype: torch.dtype) -> Tensor:
    magnitude = weight.view(torch.int32) & _MAGNITUDE
    word = magnitude
    if dtype == torch.float16:
        # Beyond 2^16 all is infinite.
        normal = (magnitude.clamp(max=(127 + 16) << 23) - _EXPONENTS_APART) << 3
        steps = weight.abs().clamp_(max=_SMALLEST_NORMAL).nan_to_num_(0.0).mul_(2.0**40)
        word = torch.where(weight.abs() < _SMALLEST_NORMAL, steps.add_(_TO_NEAREST).to(torch.int32), normal)
    # A NaN may have its mark in the bits that are cut off, and a carry out of all bits would make a sign of it.
    return word.masked_fill(magnitude > _INFINITY, _NAN_WORD[dtype])


def _from_word(word: Tensor, param: Tensor) -> Tensor:
    if param.dtype == torch.bfloat16:
        magnitude = word.view(torch.float32)
    else:
        # Words that no float32 has, as only a changed parameter gives them, lose bits: rounded up they could become
        # those of another parameter.
        exact = word & ~((word >> 24) | (word >> 25))
        below = exact.to(torch.float32).mul_(2.0**-40)
        normal = ((word >> 3) + _EXPONENTS_APART).view(torch.float32)
        magnitude = torch.where(word < _LOWEST_NORMAL_WORD, below, normal)
        magnitude = torch.where(param.isfinite(), magnitude, param.to(torch.float32))
    return magnitude.copysign(param.to(torch.float32))


# ---------------------------------------------------------------- where nothing is kept


def _rounded(weight: Tensor, dtype: torch.dtype, dither: codec.Dither, stochastic: bool) -> Tensor:
    if dtype == torch.float32 or not stochastic:
        return weight.to(dtype)
    words = dither.update_words()
    return stochastic_bfloat16(weight, words) if dtype == torch.bfloat16 else stochastic_float16(weight, words)


def stochastic_bfloat16(weight: Tensor, words: Tensor) -> Tensor:
    """Round float32 up or down to bfloat16, up in magnitude with probability of the part cut off.

    ``words``: uniform integers in [0, 65536), int32, in the weight's shape. Infinities and NaN keep.
    """
    rounded = ((weight.view(torch.int32) + words) & -65536).view(torch.float32)
    return _keep_nonfinite(rounded, weight).to(torch.bfloat16)


def stochastic_float16(weight: Tensor, words: Tensor) -> Tensor:
    """As ``stochastic_bfloat16`` for float16, with its fixed step of 2^-24 below 2^-14 and its overflow to infinity."""
    # 13 of the 16 bits: as many as are cut off, and few enough that a weight float16 can hold stays what it is.
    bits = ((weight.view(torch.int32) + (words >> 3)) & -8192).view(torch.float32)
    magnitude = weight.abs()
    below = ((magnitude * 2.0**24 + (words >> 3) * 2.0**-13).floor_() * 2.0**-24).copysign(weight)
    rounded = torch.where(magnitude < 2.0**-14, below, bits)
    return _keep_nonfinite(rounded, weight).to(torch.float16)


def _keep_nonfinite(rounded: Tensor, weight: Tensor) -> Tensor:
    """Take infinities and NaN from ``weight``: adding to their bits would make something else of them."""
    if weight.device.type == "cpu" and bool((weight * 0.0).sum() == 0):
        return rounded
    return torch.where(weight.isfinite(), rounded, weight)
