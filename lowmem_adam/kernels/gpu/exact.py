"""Division and square root, correctly rounded and without branches, for numbers that are known to be of usual size.

Triton's ``div_rn`` and ``sqrt_rn`` become a short sequence and a branch to a long one for unusual numbers: a branch an
element, which keeps the compiler from mixing the work of several. These are the short sequences, those that NVIDIA's
compiler has for ``div.rn`` and ``sqrt.rn``: from the processor's estimate Newton steps with fused multiply-adds, which
must keep subnormal remainders. A program asks once whether all of its numbers are usual (``are_usual``), and takes the
long way otherwise.

That the last step rounds correctly depends on the estimate: with one that is off by an ulp more, a handful of all
mantissas would not. So tests compare, on the device at hand, the roots of all floats, the inverses of all mantissas and
the quotients that lie nearest to the middle of two floats with Triton's. Only for NVIDIA (``FAST``): elsewhere, and in
the interpreter, they are Triton's. Source: P. Markstein 1990 (IBM J. Res. Dev. 34, pp. 111-119).
"""

from __future__ import annotations

import triton
import triton.language as tl

# Of v and |m|, so that roots and quotients are normal numbers; remainders may be subnormal, and are exact.
_SMALLEST_V: tl.constexpr = tl.constexpr((127 - 96) << 23)
_LARGEST_V: tl.constexpr = tl.constexpr((127 + 40) << 23)
_SMALLEST_M: tl.constexpr = tl.constexpr((127 - 60) << 23)
_LARGEST_M: tl.constexpr = tl.constexpr((127 + 40) << 23)


@triton.jit
def float_of(bits):
    """The float32 of 32 bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def bits_of(x):
    """The bits of a float32, int32."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def sqrt(x, FAST: tl.constexpr):
    """The square root; with ``FAST`` of zero and of numbers from 2^-96 below 2^96."""
    if FAST:
        estimate = tl.inline_asm_elementwise(
            "rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
        root = x * estimate
        root = tl.fma(tl.fma(-root, root, x), estimate * 0.5, root)
        return tl.where(x == 0.0, 0.0, root)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def _estimate(x):
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def divide(x, y, FAST: tl.constexpr):
    """``x / y``; with ``FAST`` of zeros and of numbers whose quotient is normal and whose remainder is exact."""
    if FAST:
        inverse = _estimate(y)
        inverse = tl.fma(inverse, tl.fma(-y, inverse, 1.0), inverse)
        quotient = x * inverse
        quotient = tl.fma(tl.fma(-y, quotient, x), inverse, quotient)
        quotient = tl.fma(tl.fma(-y, quotient, x), inverse, quotient)
        return tl.where(x == 0.0, x, quotient)  # with its sign
    else:
        return tl.div_rn(x, y)


@triton.jit
def divide_integers(x, y, FAST: tl.constexpr):
    """``x / y`` of whole numbers up to 256; tests have all that there are."""
    if FAST:
        inverse = _estimate(y)
        quotient = x * inverse
        return tl.fma(tl.fma(-y, quotient, x), inverse, quotient)
    else:
        return tl.div_rn(x, y)


@triton.jit
def are_usual(exp_avg, largest_v, smallest_v, eps, step_size):
    """Whether ``divide`` and ``sqrt`` may be fast for all elements of a program; int32.

    Args:
        exp_avg: new first moments.
        largest_v: bits of the largest new second moment of each block.
        smallest_v: of the smallest that is not zero, 2^31 - 1 where all are.
        eps: scalar, as is the next.
        step_size: what first moments are multiplied by.
    """
    magnitude = bits_of(exp_avg) & 0x7FFFFFFF
    largest = tl.max(magnitude, axis=1, keep_dims=True)
    smallest = tl.min((magnitude - 1).to(tl.uint32, bitcast=True), axis=1, keep_dims=True)
    usual = (largest < _LARGEST_M) & (smallest >= _SMALLEST_M)
    usual = usual & (largest_v < _LARGEST_V) & (smallest_v >= _SMALLEST_V)
    usual = usual & (eps >= 2.0**-60) & (eps <= 2.0**10) & (step_size >= 2.0**-30) & (step_size <= 2.0**10)
    return tl.min(usual.to(tl.int32))
