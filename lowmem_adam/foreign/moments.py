"""Our moments made of values, and values made of them, tile by tile; what the other formats share.

Values are coded to nearest, without dither. A single rounding needs no average over time, half a code is the least
error there is, and it makes coding the inverse of decoding: values that were decoded from our codes get the same codes
again. Ratio octaves are looked for whatever the betas. What our format cannot hold errs to smaller steps, as in
training: ratios m / sqrt(v) beyond 1016 saturate, and where v is 0 beside an m that is not, as bitsandbytes' map makes
it, the element stands still until its next gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowmem_adam import codec, saved_state
from lowmem_adam.kernels import reference
from lowmem_adam.kernels.fragment import CodedMoments, DynamicMoments
from lowmem_adam.layout import FLAT, Layout
from lowmem_adam.shard import read, write
from lowmem_adam.state import DYNAMIC_KEYS, expected_tensors, moments_of

SHARED_SETTINGS = ("lr", "betas", "eps", "weight_decay")
"""What every Adam's groups have."""

_OCTAVES = len(codec.FORMAT.ratio_thresholds) + 1
_ROOT_MIDDLE = 1.5
_RATIO_MIDDLE = 128.5
"""Thresholds of the codec that round to nearest."""


class Source(NamedTuple):
    """The saved moments of one parameter, whatever their format."""

    step: Tensor
    """int64 scalar on the CPU."""
    device: torch.device
    read: Callable[[int, int], tuple[Tensor, Tensor]]
    """Both moments of flat elements ``[start, stop)`` in row-major order, one dimension; any floating dtype."""
    as_they_are: Callable[[], DynamicMoments] | None = None
    """The codes themselves, where they are those of ``moments="bnb8bit"``: row-major, of the parameter's shape."""


class Format(NamedTuple):
    """Another optimizer's state: how it is told, read and written."""

    settings: tuple[str, ...]
    """What only its groups have. Values that would change what the moments are, ``check_group`` refuses."""
    is_ours: Callable[[set[str], set[str]], bool]
    """From the names of settings and of state."""
    check_group: Callable[[Mapping[str, Any], Mapping[str, Any], str], None]
    """Of a saved group, the optimizer's own group, and what names it in errors."""
    read_state: Callable[[Mapping[str, Any], Sequence[int], str], Source]
    """Of a parameter's saved state, its shape and label."""
    defaults: Callable[[Mapping[str, Any], str], dict[str, Any]]
    """All settings of its groups, in its order; of our saved group, which it checks, and its name in errors."""
    write_state: Callable[[Mapping[str, Tensor], Tensor, str], dict[str, Any]]
    """Of our state of a parameter, the parameter, and its group's ``moments``."""


def check_keys(state: Mapping[str, Any], accepted: Sequence[str], label: str) -> None:
    """Check that a parameter's state has these entries and no others.

    Raises:
        ValueError: names what is there and what is accepted.
    """
    if set(state) != set(accepted):
        raise ValueError(f"{label} has state {sorted(map(str, state))}; accepted: {sorted(accepted)}")


def plain_tensor(
    state: Mapping[str, Any], key: str, shape: Sequence[int], dtypes: Sequence[torch.dtype], label: str
) -> Tensor:
    """A tensor out of a parameter's state, detached.

    Raises:
        ValueError: no tensor, one of a subclass, or of another shape or dtype.
    """
    value = state[key]
    if not isinstance(value, Tensor) or type(value.detach()) is not Tensor:
        raise ValueError(f"{label}: {key} is a {type(value).__name__}; accepted: a plain tensor")
    if tuple(value.shape) != tuple(shape) or value.dtype not in dtypes:
        raise ValueError(
            f"{label}: {key} has shape {tuple(value.shape)} and dtype {value.dtype}; "
            f"accepted: {tuple(shape)} and {', '.join(map(str, dtypes))}"
        )
    return value.detach()


def step_count(value: Any, label: str) -> Tensor:
    """A step count, whether an int, a float or a tensor of one element, as ours: an int64 scalar on the CPU.

    Raises:
        ValueError: no whole number, or out of range.
    """
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    whole = isinstance(number, Real) and not isinstance(number, bool) and float(number).is_integer()
    if not whole or not 0 <= number < saved_state.MAX_STEP:
        raise ValueError(f"{label}: step is {value!r}; accepted: integers from 0 below {saved_state.MAX_STEP}")
    return torch.tensor(int(number), dtype=torch.int64)


# ---------------------------------------------------------------- values to ours


def coded_state(
    source: Source,
    shape: Sequence[int],
    moments: str,
    label: str,
    master: torch.dtype | None = None,
    coded: bool | None = None,
) -> dict[str, Tensor]:
    """Our state of a parameter of this shape in a group with this ``moments``, on the source's device.

    A master weight or correction of zero: whatever the parameter is, the next step starts from it. Codes that are
    those of the setting are copied. ``coded``: whether there are to be codes; None for what the shape says.

    Raises:
        ValueError: a value that is not finite, a negative second moment.
    """
    kept = source.as_they_are() if moments == FLAT and source.as_they_are is not None else None
    expected = expected_tensors(shape, moments, None, master, coded if kept is None else True)
    state = {key: torch.zeros(size, dtype=dtype, device=source.device) for key, (size, dtype) in expected.items()}
    state["step"] = source.step
    if kept is not None:
        for key, tensor in zip(DYNAMIC_KEYS, kept, strict=True):
            state[key].copy_(tensor)
        return state
    held = moments_of(state)
    layout = Layout.of(shape, moments)
    for tile in layout.tiles(0, layout.n_blocks, reference.TILE_ELEMENTS):
        first, second = (values.to(torch.float32) for values in source.read(tile.start, tile.stop))
        _check_values(first, second, label)
        exp_avg, exp_avg_sq = reference.to_blocks(first, tile), reference.to_blocks(second, tile)
        blocks = slice(tile.first_block, tile.first_block + tile.n_blocks)
        if isinstance(held, DynamicMoments):
            reference.store_dynamic(held, (exp_avg, exp_avg_sq), None, tile, tile.start, tile.stop, blocks)
        elif isinstance(held, CodedMoments):
            codes = _nearest_codes(exp_avg, reference.exact_sqrt(exp_avg_sq))
            reference.store_codes(held, codes, None, tile, tile.start, tile.stop, blocks)
        else:
            new = (exp_avg, exp_avg_sq)
            reference.store_full(held, new, new, None, tile, tile.start, tile.stop)
    return state


def _check_values(exp_avg: Tensor, exp_avg_sq: Tensor, label: str) -> None:
    for key, values, good, accepted in (
        ("exp_avg", exp_avg, exp_avg.abs() < torch.inf, "finite numbers"),
        ("exp_avg_sq", exp_avg_sq, (exp_avg_sq >= 0) & (exp_avg_sq < torch.inf), "finite numbers from 0"),
    ):
        if not bool(good.all()):
            raise ValueError(f"{label}: {key} has a value {values[~good][0].item()}; accepted: {accepted}")


def _nearest_codes(exp_avg: Tensor, root: Tensor) -> codec.Codes:
    """As ``codec.encode``, rounded to nearest, with the grid and ratio octaves that values have already, if they do."""
    grid = recovered_grid(root)
    octaves = codec.find_ratio_octaves(exp_avg, root)
    code = _ratio_codes(exp_avg, root, octaves)
    pending = codec.decode_ratio(code, root, octaves) != exp_avg
    # A dithered largest ratio may have crossed a threshold: lowered, or lifted to the very last code.
    natural = octaves.int()
    for change in (1, -1):
        rows = (pending.any(dim=1) & (natural + change >= 0) & (natural + change < _OCTAVES)).nonzero().squeeze(1)
        other = (natural[rows] + change).to(torch.uint8)
        other_code = _ratio_codes(exp_avg[rows], root[rows], other)
        same = (codec.decode_ratio(other_code, root[rows], other) == exp_avg[rows]).all(dim=1)
        octaves[rows[same]], code[rows[same]] = other[same], other_code[same]
    return codec.Codes(code, _root_codes(root, grid), codec.with_ratio_octaves(grid, octaves))


def _ratio_codes(exp_avg: Tensor, root: Tensor, octaves: Tensor) -> Tensor:
    nearest = torch.ones((), dtype=torch.bool, device=root.device)
    return codec.encode_ratio(exp_avg, root, torch.full((), _RATIO_MIDDLE, device=root.device), nearest, octaves)


def _root_codes(root: Tensor, grid: codec.Grid) -> Tensor:
    return codec.encode_root(root, grid, torch.full((), _ROOT_MIDDLE, device=root.device))


def recovered_grid(root: Tensor) -> codec.Grid:
    """The grid from which the roots of a block were decoded, if all lie on one; else ``codec.block_grid``'s.

    Rounding may have lifted a block's smallest root into the next octave, or lowered its largest into the one before,
    either by less than an octave. So the grid of decoded roots is ``block_grid``'s, or begins or ends an octave further
    out. No root lies on two grids of different floors: their points are apart by multiples of 33026 = 2 * 7^2 * 337
    bits, which an octave, 2^23 bits, is not. Grids of one floor share points: in its first octave, a grid of two has
    every second point of the grid of one. Where all of a block's roots are such points, and the largest may have been
    lowered, the wider grid is taken. For n roots on a narrower one, whose largest has its last code, that is wrong once
    in 2^(n-1); the codes are others then, and decode to the same bits.

    Args:
        root: float32 ``(n_blocks, width)``, finite, not negative.
    """
    natural = codec.block_grid(root)
    floor, span = natural.floor.clone(), natural.span.clone()
    largest = root.amax(dim=1, keepdim=True)
    pending = natural.span > 0
    for lower, higher in ((0, 1), (0, 0), (1, 0), (1, 1)):
        grid = codec.Grid(natural.floor - lower, natural.span + (lower + higher))
        possible = pending & (natural.floor > lower) & (grid.span <= codec.FORMAT.max_octaves)
        possible &= grid.floor.int() + grid.span <= codec.FORMAT.max_exponent
        if (lower, higher) == (0, 1):  # lowered from the octave above, and not the smallest at the same time
            next_point = codec.decode_root(_root_codes(largest, grid) + 1, grid)[:, 0].view(torch.int32)
            ceiling = (natural.floor.int() + natural.span) << codec.FORMAT.mantissa_bits
            possible &= (next_point > ceiling) & ((root > 0).sum(dim=1) > 1)
        # One root of a block rules out nearly all blocks that are on no grid at all.
        rows = (possible & _lies_on(largest, grid)).nonzero().squeeze(1)
        rows = rows[_lies_on(root[rows], codec.Grid(grid.floor[rows], grid.span[rows]))]
        floor[rows], span[rows], pending[rows] = grid.floor[rows], grid.span[rows], False
    return codec.Grid(floor, span)


def _lies_on(root: Tensor, grid: codec.Grid) -> Tensor:
    """Which blocks' roots are points of their grid, bool ``(n_blocks,)``."""
    return (codec.decode_root(_root_codes(root, grid), grid) == root).all(dim=1)


# ---------------------------------------------------------------- ours to values


def decode_into(state: Mapping[str, Tensor], exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
    """Write our moments of a parameter into tensors of its shape, of any floating dtype and strides."""
    held = moments_of({key: tensor.contiguous() for key, tensor in state.items()})
    layout = Layout.of(exp_avg.shape, FLAT if isinstance(held, DynamicMoments) else "8bit")
    for tile in layout.tiles(0, layout.n_blocks, reference.TILE_ELEMENTS):
        blocks = slice(tile.first_block, tile.first_block + tile.n_blocks)
        values = reference.load_moments(held, tile, tile.start, tile.stop, blocks)
        for target, value in zip((exp_avg, exp_avg_sq), values, strict=True):
            write(target, tile.start, tile.stop, reference.from_blocks(value, tile))


def pair_of_sources(exp_avg: Tensor, exp_avg_sq: Tensor) -> Callable[[int, int], tuple[Tensor, Tensor]]:
    """What reads two tensors that hold the moments themselves, of any strides."""
    return lambda start, stop: (read(exp_avg, start, stop), read(exp_avg_sq, start, stop))
