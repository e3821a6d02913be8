"""What the scenarios of other projects' optimizer tests share: formats, devices, gradients, and what a step may be off.

No tolerance here is fitted to what is measured: each follows from the format that moments are kept in
(``lowmem_adam.codec`` has it) and from the roundings of float32 that a step takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.peer_formats import as_blocks, dynamic_map
from lowmem_adam import Adam8bit
from lowmem_adam.codec import FORMAT
from lowmem_adam.foreign.moments import decode_into
from lowmem_adam.kernels import reference
from lowmem_adam.layout import Layout, is_coded
from tests.cases import generator
from tests.oracle import TextbookAdam

MOMENTS = ("8bit", "32bit")
"""Every format the scenarios run with, each of them a row of ``FORMATS`` below."""

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))

on_every_device = pytest.mark.parametrize("device", DEVICES)
with_all_moments = pytest.mark.parametrize("moments", MOMENTS)

UNIT = 2.0**-24
"""Largest relative error of one fp32 rounding."""
ROUNDINGS = 8 * UNIT
"""Of a new moment, relative to the sum of its parts' magnitudes: L2 decay takes two, which count twice in a square; the
product with beta, the constants in float32, and the sum take the other four."""


def decoded(opt: Adam8bit, param: Tensor) -> tuple[Tensor, Tensor]:
    """The moments that the state of a parameter stands for, float64, of its shape."""
    exp_avg, exp_avg_sq = (torch.zeros(param.shape, dtype=torch.float64, device=param.device) for _ in range(2))
    if opt.state.get(param):
        decode_into(opt.state[param], exp_avg, exp_avg_sq)
    return exp_avg, exp_avg_sq


class Range(NamedTuple):
    """From where to where a value may lie, float64."""

    low: Tensor
    high: Tensor

    def holds(self, value: Tensor) -> Tensor:
        """Which elements lie within, bool."""
        return (self.low <= value.double()) & (value.double() <= self.high)


def around(value: Tensor, margin: Tensor) -> Range:
    """A range with its middle."""
    return Range(value - margin, value + margin)


class Exact(NamedTuple):
    """What a step should come to, float64, and the magnitudes of the terms it was added up from."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    param: Tensor
    exp_avg_parts: Tensor
    exp_avg_sq_parts: Tensor
    update_parts: Tensor

    @classmethod
    def step(cls, oracle: TextbookAdam, grad: Tensor) -> Exact:
        """Take the oracle's step from where it is."""
        beta1, beta2 = oracle.betas
        size = grad.double().abs() + (0.0 if oracle.decoupled else oracle.weight_decay * oracle.param.abs())
        first = beta1 * oracle.exp_avg.abs() + (1 - beta1) * size
        second = beta2 * oracle.exp_avg_sq + (1 - beta2) * size**2
        oracle.step(grad)
        root = (oracle.exp_avg_sq / (1 - beta2**oracle.t)).sqrt()
        update = oracle.lr * first / (1 - beta1**oracle.t) / (root + oracle.eps)
        return cls(oracle.exp_avg, oracle.exp_avg_sq, oracle.param, first, second, update)


def allowed_32bit(exact: Exact) -> tuple[Range, Range]:
    """Ranges of the first moment and of the second's root: fp32 roundings of one step."""
    root = exact.exp_avg_sq.sqrt()
    margin = _root_roundings(exact)
    return around(exact.exp_avg, ROUNDINGS * exact.exp_avg_parts), around(root, margin)


def allowed_8bit(exact: Exact) -> tuple[Range, Range]:
    """The same where both are coded once: what ``lowmem_adam.codec`` says, put into inequalities.

    * A block's grid goes from the power of two at or below its smallest positive root to the one above its largest, at
      most 24 octaves. A dithered root is off by less than one of 254 intervals, which are equal in the bits of a float.
      What lies below the floor takes the floor. Zero is exact.
    * The first moment is ``y = 143 m / (root + |m|)`` to within one code (half a code where it is rounded to nearest),
      at most 127, and is decoded with the root as it was coded: ``m = q / (143 - |q|) * root``. Zero is exact.
    """
    scale, limit = FORMAT.ratio_scale, FORMAT.ratio_limit
    root = exact.exp_avg_sq.sqrt()
    rounded = _root_roundings(exact)
    floor, span = _grids(root, rounded)
    share = span / FORMAT.root_intervals
    positive = root > 0
    within = torch.where(positive, root, 1.0)
    high = torch.maximum(_value_at(_bits_of(within) + share) + rounded, floor)
    low = torch.minimum(_value_at(_bits_of(within) - share) - rounded, high)
    roots = Range(torch.where(positive, low.clamp(min=0), 0.0), torch.where(positive, high, 0.0))

    total = (root + exact.exp_avg.abs()).clamp(min=torch.finfo(torch.float64).tiny)
    code = scale * exact.exp_avg / total
    # One code, and what rounding makes of y: of m, of the root, and 1.1e-6 of the reciprocal with four more roundings.
    off = 1 + scale * (ROUNDINGS * exact.exp_avg_parts + rounded) / total + scale * (1.2e-6 + 4 * UNIT)
    first = [y.clamp(-limit, limit) for y in (code - off, code + off)]
    least, most = (y / (scale - y.abs()) for y in first)
    least = least * torch.where(least > 0, roots.low, roots.high)
    most = most * torch.where(most > 0, roots.high, roots.low)
    zero = exact.exp_avg_parts == 0
    slack = 4 * UNIT * (least.abs() + most.abs())  # of decoding, in float32
    return Range((least - slack).masked_fill(zero, 0.0), (most + slack).masked_fill(zero, 0.0)), roots


def allowed_bnb8bit(exact: Exact) -> tuple[Range, Range]:
    """The same of bitsandbytes' format: each moment, over the largest of 256 elements, is the nearest value of a map.

    So it is off by at most half of the distance between the two values of the map that it lies between.
    """
    ranges = []
    for value, parts, signed in (
        (exact.exp_avg, exact.exp_avg_parts, True),
        (exact.exp_avg_sq, exact.exp_avg_sq_parts, False),
    ):
        table = dynamic_map(signed).double().to(value.device)
        rounded = ROUNDINGS * parts
        blocks = as_blocks(value.flatten(), 256)
        largest = blocks.abs().amax(dim=1, keepdim=True)
        scaled = blocks / largest.clamp(min=torch.finfo(torch.float64).tiny)
        place = torch.searchsorted(table, scaled.contiguous()).clamp(1, len(table) - 1)
        half = (table[place] - table[place - 1]) / 2 * largest
        margin = half.flatten()[: value.numel()].view(value.shape) + rounded
        # The largest itself is rounded, and all of its block is multiplied by it; so is a product on its way back.
        slack = (ROUNDINGS * largest).expand_as(blocks).flatten()[: value.numel()].view(value.shape)
        ranges.append(around(value, margin + slack))
    first, second = ranges
    return first, Range(second.low.clamp(min=0).sqrt(), second.high.sqrt())


class Format(NamedTuple):
    """What is documented of a format, and so asked of it.

    allowed: where the first moment and the root of the second may lie after one step from what was held before.
    nbytes: of all moments of a parameter that is coded.
    figures: displacement error after 300 free steps, by the decades that gradient scales in a block spread over; none
        where roundings are all there is.
    root_ratio: within which the middle 90% of roots stay relative to fp32's, where a block has at most two decades.
    stays: the kinds of gradients under which a free run keeps to its figures, all if there are none named; under the
        others it must be found to leave.
    """

    allowed: Callable[[Exact], tuple[Range, Range]]
    nbytes: Callable[[Layout], int]
    figures: tuple[tuple[float, float], ...] = ()
    root_ratio: tuple[float, float] = (1 - 1e-3, 1 + 1e-3)
    stays: tuple[str, ...] = ()


FORMATS = {
    # What it was designed to; benchmarks/results/codec_fidelity.md measures it. Codes, and two bytes a block.
    "8bit": Format(
        allowed_8bit,
        lambda rows: 2 * rows.numel + 2 * rows.n_blocks,
        ((0.0, 0.020), (2.0, 0.039), (4.0, 0.059), (6.0, 0.074)),
        (0.87, 1.14),
    ),
    "32bit": Format(allowed_32bit, lambda rows: 8 * rows.numel),
    # Measured of its map beside ours. Two float32 maxima for 256 elements. A second moment far below the largest, as of
    # what has a gradient seldom, becomes 0 while the first does not.
    "bnb8bit": Format(
        allowed_bnb8bit,
        lambda rows: 2 * rows.numel + 8 * -(-rows.numel // 256),
        ((0.0, 0.024), (2.0, 0.096), (4.0, 4.07), (6.0, 3.88)),
        (0.80, 1.20),
        ("normal", "constant", "stops"),
    ),
}
"""By ``moments``."""


def allowed_moments(moments: str, exact: Exact) -> tuple[Range, Range]:
    """Those of the format, of a parameter whose shape decides whether it is coded at all."""
    return FORMATS[moments if is_coded(exact.param.shape) else "32bit"].allowed(exact)


def allowed_param(exact: Exact, dtype: torch.dtype, low_precision_update: str) -> Range:
    """Where a parameter may lie after one step from what it was: it does not depend on how moments are coded then.

    Four roundings of its own size (decay and its factor, product, difference); of the update those of the first moment,
    those of the root, and eight more (corrections, step size, division). A 16-bit parameter is that rounded to nearest,
    which keeps the order of values, or to one of its two neighbours.
    """
    root = exact.exp_avg_sq.sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    relative = ROUNDINGS + _root_roundings(exact) / root + 8 * UNIT
    margin = UNIT * 4 * exact.param.abs() + relative * exact.update_parts
    wide = around(exact.param, margin)
    if dtype == torch.float32:
        return wide
    low, high = (bound.to(dtype) for bound in wide)
    if low_precision_update == "stochastic":
        low = torch.where(low.double() > wide.low, torch.nextafter(low, torch.full_like(low, -torch.inf)), low)
        high = torch.where(high.double() < wide.high, torch.nextafter(high, torch.full_like(high, torch.inf)), high)
    return Range(low.double(), high.double())


def gap(values: Tensor, dtype: torch.dtype) -> Tensor:
    """From the magnitude of values to the next one that ``dtype`` has, float64."""
    size = values.abs().to(dtype)
    return torch.nextafter(size, torch.full_like(size, torch.inf)).double() - size.double()


def _bits_of(values: Tensor) -> Tensor:
    """The bits of a float read as a number, in octaves: log2 at powers of two, straight lines between them."""
    mantissa, exponent = torch.frexp(values)
    return exponent + (2 * mantissa - 2)


def _value_at(octaves: Tensor) -> Tensor:
    """The inverse of ``_bits_of``."""
    whole = octaves.floor()
    return torch.exp2(whole) * (1 + octaves - whole)


def _root_roundings(exact: Exact) -> Tensor:
    root = exact.exp_avg_sq.sqrt()
    # Of a root: half of what its square is off relatively, and its own rounding.
    return ROUNDINGS * exact.exp_avg_sq_parts / (2 * root).clamp(min=torch.finfo(torch.float64).tiny) + UNIT * root


def _grids(root: Tensor, rounded: Tensor) -> tuple[Tensor, Tensor]:
    """Floor and octaves of every element's block, the widest there may be within rounding; of the elements' shape."""
    rows = Layout.of(root.shape)
    tile = next(iter(rows.tiles(0, rows.n_blocks, rows.numel)))
    values, margin = (reference.to_blocks(t.reshape(-1), tile) for t in (root, rounded))
    positive = values > 0
    least = torch.where(positive, values - margin, torch.inf).amin(dim=1, keepdim=True)
    most = (values + margin).amax(dim=1, keepdim=True)
    bottom, top = least.log2().floor(), most.log2().floor() + 1
    bottom = torch.maximum(bottom, top - FORMAT.max_octaves)
    empty = ~positive.any(dim=1, keepdim=True)
    floor, span = (
        torch.where(empty, 0.0, t).expand_as(values).contiguous() for t in (torch.exp2(bottom), top - bottom)
    )
    return tuple(reference.from_blocks(t, tile).view(root.shape) for t in (floor, span))  # type: ignore[return-value]


# ---------------------------------------------------------------- gradients


class Kind(NamedTuple):
    """A gradient: what is drawn once for a run, and what an element has at step t (from 0) of ``steps``."""

    name: str
    at: Callable[[torch.Generator, Tensor, int, int], Tensor]


def _normal(noise: torch.Generator, fixed: Tensor, t: int, steps: int) -> Tensor:
    return torch.randn(fixed.shape, generator=noise)


def _student(noise: torch.Generator, fixed: Tensor, t: int, steps: int) -> Tensor:
    """Student's t with two degrees of freedom: normal over the root of a unit exponential; its variance is infinite."""
    return _normal(noise, fixed, t, steps) / torch.empty(fixed.shape).exponential_(generator=noise).sqrt_()


def _rows_seldom(noise: torch.Generator, fixed: Tensor, t: int, steps: int) -> Tensor:
    """As of an embedding: a row has a gradient with a chance of its own, from 1 in 1000 to 1 in 10, and zeros else."""
    chance = 10.0 ** (-1 - 2 * fixed[:, :1])
    return _normal(noise, fixed, t, steps) * (torch.rand(chance.shape, generator=noise) < chance)


def _elements_seldom(noise: torch.Generator, fixed: Tensor, t: int, steps: int) -> Tensor:
    """One element in twenty at a step."""
    return _normal(noise, fixed, t, steps) * (torch.rand(fixed.shape, generator=noise) < 0.05)


def _outliers_fixed(noise: torch.Generator, fixed: Tensor, t: int, steps: int) -> Tensor:
    """The same elements, one in 1e4, of 1e4 times the scale of all others."""
    return _normal(noise, fixed, t, steps) * torch.where(fixed < 1e-4, 1e4, 1.0)


def _outliers(noise: torch.Generator, fixed: Tensor, t: int, steps: int) -> Tensor:
    """One element in 1e4, other ones at each step, of 1e4 times the scale."""
    rare = torch.rand(fixed.shape, generator=noise) < 1e-4
    return _normal(noise, fixed, t, steps) * torch.where(rare, 1e4, 1.0)


def _decades(noise: torch.Generator, fixed: Tensor, t: int, steps: int) -> Tensor:
    """Every element with a scale of its own, evenly over six decades."""
    return _normal(noise, fixed, t, steps) * 10.0 ** (-6 * fixed)


def _constant(noise: torch.Generator, fixed: Tensor, t: int, steps: int) -> Tensor:
    """The same at every step, over two decades and of both signs."""
    return (fixed - 0.5).sign() * 10.0 ** (-4 * (fixed - 0.5).abs())


def _stops(noise: torch.Generator, fixed: Tensor, t: int, steps: int) -> Tensor:
    """Exactly zero for all elements from half of the run on."""
    return _normal(noise, fixed, t, steps) * float(t < steps // 2)


def _half_stops(noise: torch.Generator, fixed: Tensor, t: int, steps: int) -> Tensor:
    """Six decades, and every second element's is exactly zero from half of the run on, among others that go on."""
    values = _decades(noise, fixed, t, steps)
    if t >= steps // 2:
        values[:, ::2] = 0
    return values


KINDS = (
    Kind("normal", _normal),
    Kind("heavy-tailed", _student),
    Kind("rows seldom", _rows_seldom),
    Kind("elements seldom", _elements_seldom),
    Kind("outliers in place", _outliers_fixed),
    Kind("outliers anywhere", _outliers),
    Kind("six decades", _decades),
    Kind("constant", _constant),
    Kind("stops", _stops),
    Kind("half stops", _half_stops),
)

every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def kind_named(name: str) -> Kind:
    return next(kind for kind in KINDS if kind.name == name)


class Gradients:
    """The gradients of one run, drawn on the CPU, so that every device gets the same ones.

    Args:
        kind: what they are like.
        shape: ``(rows, columns)``.
        steps: of the run.
        dtype: that of the parameter; what float16 cannot hold takes its largest value.
        device: where they are wanted.
    """

    def __init__(
        self, kind: Kind, shape: tuple[int, int], steps: int, dtype: torch.dtype, device: Any, seed: int = 0
    ) -> None:
        self.kind, self.steps, self.dtype, self.device = kind, steps, dtype, device
        self.noise = generator(seed, 1)
        self.fixed = torch.rand(shape, generator=self.noise)

    def at(self, t: int) -> Tensor:
        """Those of step t, from 0; to be asked for in order."""
        values = self.kind.at(self.noise, self.fixed, t, self.steps)
        largest = torch.finfo(self.dtype).max
        return values.clamp(-largest, largest).to(self.dtype).to(self.device)


def mixed_gradients(rows: int, cols: int, steps: int, dtype: torch.dtype, device: Any) -> Callable[[int], Tensor]:
    """Every kind of gradient there is, a band of rows each, then rows that never have one; steps in order."""
    band = rows // len(KINDS)
    parts = [Gradients(kind, (band, cols), steps, dtype, device, seed) for seed, kind in enumerate(KINDS)]
    rest = torch.zeros(rows - band * len(KINDS), cols, dtype=dtype, device=device)
    return lambda t: torch.cat([*(part.at(t) for part in parts), rest])
