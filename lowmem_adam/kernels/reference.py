"""The step in plain torch and in the order of the paper: the oracle of every other kernel.

Each operation is one torch call that rounds once. Compound calls (``addcmul``, ``lerp``, ``add(alpha=)``) are avoided:
torch 2.13.0 on AVX-512 fuses their multiply-adds, which it cannot where a processor has none, and kernels must agree
in every bit. Work goes tile by tile, so that no temporary exceeds a few MiB however large the parameter.

Source: Kingma & Ba 2015 (arXiv 1412.6980), Algorithm 1 in the order of computation that ends its section 2: both bias
corrections in the step size and in eps, which keeps its meaning; it saves an operation an element. Decoupled decay of
Loshchilov & Hutter 2019 (arXiv 1711.05101), Algorithm 2, in torch's order (decay first).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem_adam import codec, dynamic_map
from lowmem_adam.kernels import rounding
from lowmem_adam.kernels.fragment import (
    CodedMoments,
    DynamicMoments,
    Fragment,
    FullMoments,
    Moments,
    StepScalars,
    Work,
)
from lowmem_adam.layout import Tile

TILE_ELEMENTS = 65536
"""Elements worked on at once, 256 KiB a temporary: half of it took a third more time in calls (2 MiB of L2 cache, one
thread), twice as much at most a fifth less, for temporaries of twice the size."""


def adam_steps_(work: Sequence[Work]) -> Tensor:
    """``adam_step_`` on many fragments; returns the sum of their skipped blocks, on the first one's device."""
    counts = [adam_step_(fragment, scalars) for fragment, scalars in work]
    return sum(counts[1:], start=counts[0]) if counts else torch.zeros((), dtype=torch.int64)


def adam_step_(fragment: Fragment, scalars: StepScalars) -> Tensor:
    """One Adam step on a fragment, in place.

    Returns:
        The number of blocks that were left as they were for a non-finite gradient: int64 scalar on the
        parameter's device, so that counting does not wait for it.
    """
    device = fragment.param.device
    skipped = torch.zeros((), dtype=torch.int64, device=device)
    param, grad = _FlatView(fragment.param), _FlatView(fragment.grad)
    offset = fragment.layout.block_start(fragment.first_block)
    for tile in fragment.layout.tiles(fragment.first_block, fragment.end_block, TILE_ELEMENTS):
        low, high = tile.start - offset, tile.stop - offset
        blocks = slice(tile.first_block - fragment.first_block, tile.first_block - fragment.first_block + tile.n_blocks)
        dither = codec.Dither(tile, scalars.step, scalars.seed, device)

        gradient = to_blocks(grad.read(low, high).to(torch.float32), tile)
        old = to_blocks(param.read(low, high), tile)
        master = None if fragment.master is None else fragment.master.view(-1)[low:high]
        rest = None if master is None else to_blocks(master, tile)
        weight = rounding.widen(old, rest)
        exp_avg, exp_avg_sq = load_moments(fragment.moments, tile, low, high, blocks)
        keep = _blocks_to_keep(gradient * scalars.grad_scale) if scalars.skip_nonfinite else None
        new_weight, new_exp_avg, new_exp_avg_sq, root = _adam(weight, gradient, exp_avg, exp_avg_sq, scalars)

        kind = None if master is None else master.dtype
        stored, new_rest = rounding.narrow(new_weight, old.dtype, kind, dither, scalars.stochastic)
        if keep is not None:
            skipped += keep.sum()
            stored = torch.where(keep, old, stored)
            new_rest = None if rest is None or new_rest is None else torch.where(keep, rest, new_rest)
        param.write(low, high, from_blocks(stored, tile))
        if master is not None and new_rest is not None:
            master.copy_(from_blocks(new_rest, tile))
        if isinstance(fragment.moments, CodedMoments):
            store_codes(
                fragment.moments, codec.encode(new_exp_avg, root, dither, scalars.wide), keep, tile, low, high, blocks
            )
        elif isinstance(fragment.moments, DynamicMoments):
            store_dynamic(fragment.moments, (new_exp_avg, new_exp_avg_sq), keep, tile, low, high, blocks)
        else:
            store_full(fragment.moments, (exp_avg, exp_avg_sq), (new_exp_avg, new_exp_avg_sq), keep, tile, low, high)
    return skipped


def _adam(
    weight: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, s: StepScalars
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """New weight, moments and root of the second moment; all float32 ``(n_blocks, width)``, inputs unchanged."""
    if s.grad_scale != 1.0 or s.maximize:
        gradient = gradient * (-s.grad_scale if s.maximize else s.grad_scale)
    if s.weight_decay != 0.0:
        gradient = gradient + weight * s.weight_decay
    new_exp_avg = (exp_avg * s.beta1).add_(gradient * (1.0 - s.beta1))
    new_exp_avg_sq = (exp_avg_sq * s.beta2).add_((gradient * (1.0 - s.beta2)).mul_(gradient))
    root = exact_sqrt(new_exp_avg_sq)
    denominator = root + s.eps
    update = (new_exp_avg * s.step_size).div_(denominator)
    if s.eps < codec.SMALLEST_NORMAL:
        # eps vanishes in float32: an element that never had a gradient would be 0 / 0. It does not move.
        update.masked_fill_(denominator == 0, 0.0)
    new_weight = (weight * s.shrink).sub_(update)
    return new_weight, new_exp_avg, new_exp_avg_sq, root


def exact_sqrt(x: Tensor) -> Tensor:
    """The correctly rounded square root of float32.

    ``torch.sqrt`` need not be: torch 2.13.0's CPU build with MKL, on AVX-512, is off by one unit for 0.59% of all
    mantissas (98,955 of 2^24, both parities of the exponent). The root in double is far more exact than any float32
    root is close to a rounding boundary.
    """
    return x.to(torch.float64).sqrt_().to(torch.float32)


def _blocks_to_keep(gradient: Tensor) -> Tensor | None:
    """Blocks with a non-finite gradient, bool ``(n_blocks, 1)``; on the CPU None where there is none."""
    # x * 0 is 0 for finite x and NaN otherwise, and a sum of these is NaN if one of them is: cheaper than isfinite.
    keep = (gradient * 0.0).sum(dim=1, keepdim=True) != 0
    if gradient.device.type == "cpu" and not bool(keep.any()):
        return None
    return keep


class _FlatView:
    """Row-major ranges of a tensor of any strides, read and written without a copy of the whole."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.flat = tensor.view(-1) if tensor.is_contiguous() else None

    def read(self, low: int, high: int) -> Tensor:
        if self.flat is not None:
            return self.flat[low:high]
        return self._memory()[self._positions(low, high)]

    def write(self, low: int, high: int, values: Tensor) -> None:
        if self.flat is not None:
            self.flat[low:high].copy_(values)
        else:
            self._memory()[self._positions(low, high)] = values

    def _memory(self) -> Tensor:
        """The memory that the tensor spans, as one dimension."""
        extent = 1 + sum((n - 1) * s for n, s in zip(self.tensor.shape, self.tensor.stride(), strict=True))
        return self.tensor.as_strided((extent,), (1,))

    def _positions(self, low: int, high: int) -> Tensor:
        """Where elements ``[low, high)`` of the row-major order lie in memory."""
        index = torch.arange(low, high, device=self.tensor.device)
        positions = torch.zeros_like(index)
        for size, stride in zip(reversed(self.tensor.shape), reversed(self.tensor.stride()), strict=True):
            positions += index % size * stride
            index = index // size
        return positions


def to_blocks(flat: Tensor, tile: Tile) -> Tensor:
    """A tile's elements as its block matrix ``(n_blocks, width)``, tails padded with zeros."""
    padding = tile.blocks_per_row * tile.block_size - tile.cols if tile.cols > tile.block_size else 0
    matrix = flat.view(tile.rows, tile.cols)
    return (F.pad(matrix, (0, padding)) if padding else matrix).view(tile.n_blocks, tile.width)


def from_blocks(matrix: Tensor, tile: Tile) -> Tensor:
    """The inverse of ``to_blocks``: the tile's elements, flat."""
    return matrix.view(tile.rows, -1)[:, : tile.cols].reshape(-1)


def load_moments(moments: Moments, tile: Tile, low: int, high: int, blocks: slice) -> tuple[Tensor, Tensor]:
    """First and second moment of a tile, float32 ``(n_blocks, width)``."""
    if isinstance(moments, DynamicMoments):
        codes = (to_blocks(code.view(-1)[low:high], tile) for code in (moments.state1, moments.state2))
        scales = (scale.view(-1)[blocks] for scale in (moments.absmax1, moments.absmax2))
        exp_avg, exp_avg_sq = map(dynamic_map.decode, codes, scales, (True, False))
        return exp_avg, exp_avg_sq
    if isinstance(moments, FullMoments):
        return (
            to_blocks(moments.exp_avg.view(-1)[low:high], tile),
            to_blocks(moments.exp_avg_sq.view(-1)[low:high], tile),
        )
    exp_avg, root = codec.decode(_load_codes(moments, tile, low, high, blocks))
    return exp_avg, root.mul_(root)


def _load_codes(moments: CodedMoments, tile: Tile, low: int, high: int, blocks: slice) -> codec.Codes:
    return codec.Codes(
        to_blocks(moments.exp_avg_code.view(-1)[low:high], tile),
        to_blocks(moments.exp_avg_sq_code.view(-1)[low:high], tile),
        codec.Grid(moments.block_floor.view(-1)[blocks], moments.block_span.view(-1)[blocks]),
    )


def store_codes(
    moments: CodedMoments, new: codec.Codes, keep: Tensor | None, tile: Tile, low: int, high: int, blocks: slice
) -> None:
    """Write new codes and metadata of a tile, but for what ``keep`` leaves as it is."""
    if keep is not None:
        old = _load_codes(moments, tile, low, high, blocks)
        new = codec.Codes(
            torch.where(keep, old.exp_avg, new.exp_avg),
            torch.where(keep, old.root, new.root),
            codec.Grid(
                torch.where(keep[:, 0], old.grid.floor, new.grid.floor),
                torch.where(keep[:, 0], old.grid.span, new.grid.span),
            ),
        )
    moments.exp_avg_code.view(-1)[low:high].copy_(from_blocks(new.exp_avg, tile))
    moments.exp_avg_sq_code.view(-1)[low:high].copy_(from_blocks(new.root, tile))
    moments.block_floor.view(-1)[blocks].copy_(new.grid.floor)
    moments.block_span.view(-1)[blocks].copy_(new.grid.span)


def store_dynamic(
    moments: DynamicMoments,
    new: tuple[Tensor, Tensor],
    keep: Tensor | None,
    tile: Tile,
    low: int,
    high: int,
    blocks: slice,
) -> None:
    """Code new moments, float32 ``(n_blocks, width)``, of a tile in flat blocks, but for what ``keep`` leaves."""
    for code, absmax, value, signed in (
        (moments.state1, moments.absmax1, new[0], True),
        (moments.state2, moments.absmax2, new[1], False),
    ):
        # Code 0, with which codes are padded, stands for a value that must not count for absmax.
        new_code, new_absmax = dynamic_map.encode(to_blocks(from_blocks(value, tile), tile), signed)
        code, absmax = code.view(-1)[low:high], absmax.view(-1)[blocks]
        if keep is not None:
            new_code = torch.where(keep, to_blocks(code, tile), new_code)
            new_absmax = torch.where(keep[:, 0], absmax, new_absmax)
        code.copy_(from_blocks(new_code, tile))
        absmax.copy_(new_absmax)


def store_full(
    moments: FullMoments,
    old: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
    keep: Tensor | None,
    tile: Tile,
    low: int,
    high: int,
) -> None:
    """Write new fp32 moments of a tile, but for what ``keep`` leaves as it is."""
    for tensor, before, after in zip((moments.exp_avg, moments.exp_avg_sq), old, new, strict=True):
        value = after if keep is None else torch.where(keep, before, after)
        tensor.view(-1)[low:high].copy_(from_blocks(value, tile))
