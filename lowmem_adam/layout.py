"""Rows, blocks, tiles and shard cuts of a parameter: index arithmetic without tensors.

A parameter of shape ``(rows, ...)`` is seen as a matrix of ``rows x cols``. Each row is cut into blocks of
at most ``BLOCK_SIZE`` consecutive elements; the last block of a row may be shorter and no block straddles
two rows. A one-dimensional parameter is one row. Blocks are numbered row by row, and that number, the
block's *ordinal*, is the same whatever rank or fragment handles it.

Under ``moments="bnb8bit"`` a parameter of any shape is one row, in blocks of ``FLAT_BLOCK_SIZE``: bitsandbytes' blocks
count elements in row-major order whatever the rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

BLOCK_SIZE = 128
"""Elements that share one pair of metadata bytes, one dither key and one non-finite decision."""

MIN_CODED_NUMEL = 4096
"""Tensors of two and more dimensions with fewer elements keep fp32 moments: nothing worth saving."""

MIN_CODED_NUMEL_1D = 65536
"""One-dimensional tensors (norms, biases) keep fp32 moments below this; flat partitions lie above it."""


FLAT_BLOCK_SIZE = 256
"""Elements of a block of bitsandbytes' format, since its version 0.44."""

MIN_FLAT_CODED_NUMEL = 4096
"""Its ``min_8bit_size``: tensors with fewer elements keep fp32 moments under ``moments="bnb8bit"``, whatever their
dimensions."""

FLAT = "bnb8bit"
"""The ``moments`` setting whose blocks lie flat."""


def is_coded(shape: Sequence[int], moments: str = "8bit") -> bool:
    """Whether the moments of a parameter of this GLOBAL shape are stored in 8 bits.

    Always ask with the global shape: a decision on a rank's local part would differ between ranks and
    change when the world size does.

    Args:
        shape: of the parameter.
        moments: the setting of its group, one of those in 8 bits.
    """
    numel = math.prod(shape)
    if moments == FLAT:
        return numel >= MIN_FLAT_CODED_NUMEL
    return numel >= (MIN_CODED_NUMEL if len(shape) >= 2 else MIN_CODED_NUMEL_1D)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the blocks of one parameter lie: ``rows`` rows of ``cols`` elements, in blocks of ``block_size``."""

    rows: int
    cols: int
    block_size: int = field(default=BLOCK_SIZE, kw_only=True)

    @classmethod
    def of(cls, shape: Sequence[int], moments: str = "8bit") -> Layout:
        """The layout of a (global) shape under a ``moments`` setting; a scalar is one row of one element."""
        if moments == FLAT:
            return cls(1, math.prod(shape), block_size=FLAT_BLOCK_SIZE)
        if len(shape) < 2:
            return cls(1, math.prod(shape))
        return cls(shape[0], math.prod(shape[1:]))

    @property
    def numel(self) -> int:
        """Elements in all."""
        return self.rows * self.cols

    @property
    def blocks_per_row(self) -> int:
        """Blocks that one row takes, a shorter last one included."""
        return -(-self.cols // self.block_size)

    @property
    def n_blocks(self) -> int:
        """Blocks in all."""
        return self.rows * self.blocks_per_row

    def block_start(self, block: int) -> int:
        """Flat index of the first element of a block; ``block == n_blocks`` gives ``numel``."""
        if block == self.n_blocks:
            return self.numel
        row, within = divmod(block, self.blocks_per_row)
        return row * self.cols + within * self.block_size

    def tiles(self, first_block: int, end_block: int, max_elements: int) -> Iterator[Tile]:
        """Cover blocks ``[first_block, end_block)`` by tiles of at most about ``max_elements`` elements.

        Whole rows go together where several fit into a tile; a run that begins or ends inside a row, and a
        row longer than a tile, gives tiles of one (part of a) row. A tile holds at least one block.
        """
        per_row = self.blocks_per_row
        rows_per_tile = max(1, max_elements // max(1, self.cols))
        blocks_per_tile = max(1, max_elements // self.block_size)
        block = first_block
        while block < end_block:
            row, within = divmod(block, per_row)
            whole_rows = min(rows_per_tile, (end_block - block) // per_row)
            start = self.block_start(block)
            if within == 0 and whole_rows > 0 and per_row <= blocks_per_tile:
                yield Tile(whole_rows, self.cols, start, block, block_size=self.block_size)
                block += whole_rows * per_row
            else:
                n_blocks = min(blocks_per_tile, per_row - within, end_block - block)
                stop = min(start + n_blocks * self.block_size, (row + 1) * self.cols)
                yield Tile(1, stop - start, start, block, block_size=self.block_size)
                block += n_blocks


@dataclass(frozen=True, slots=True)
class Tile(Layout):
    """A contiguous piece of a parameter that is small enough to be worked on at once.

    ``rows`` rows of ``cols`` elements, every row starting at a block start; flat elements
    ``[start, start + rows * cols)``; blocks ``[first_block, first_block + n_blocks)``.
    """

    start: int
    first_block: int

    @property
    def stop(self) -> int:
        """Flat index one past the last element."""
        return self.start + self.numel

    @property
    def width(self) -> int:
        """Columns of the tile's block matrix ``(n_blocks, width)``: short rows need no padding to a full block."""
        return min(self.cols, self.block_size)


@dataclass(frozen=True, slots=True)
class Run:
    """Blocks ``[first_block, end_block)`` of the parameter with index ``param`` in a list of parameters."""

    param: int
    first_block: int
    end_block: int


def cut_into_shards(layouts: Sequence[Layout], world_size: int, loads: Sequence[int] | None = None) -> list[list[Run]]:
    """Cut the blocks of all parameters, taken as one list, into ``world_size`` contiguous shards.

    Shards differ by at most one block whatever the shapes; a rank may get none where there are too few. Where ranks
    have blocks already, these new ones are cut so that all of a rank's blocks together differ by at most one: ranks
    that have more than others by then, and of equal ones the first, keep the block that is over.

    Args:
        layouts: of the parameters, in an order that all ranks share.
        world_size: number of shards.
        loads: blocks that each rank has of earlier parameters, differing by at most one.

    Raises:
        ValueError: ``world_size`` is below 1.
    """
    if world_size < 1:
        raise ValueError(f"world_size is {world_size}; accepted: integers from 1")
    held = [0] * world_size if loads is None else list(loads)
    assert len(held) == world_size
    assert max(held) - min(held) <= 1, f"loads are {held}"
    base, over = divmod(sum(held) + sum(layout.n_blocks for layout in layouts), world_size)
    with_one_more = sorted(range(world_size), key=lambda rank: (-held[rank], rank))[:over]
    shards: list[list[Run]] = []
    first = 0
    for rank in range(world_size):
        end = first + base + (rank in with_one_more) - held[rank]
        shards.append(list(_runs_between(layouts, first, end)))
        first = end
    return shards


def _runs_between(layouts: Sequence[Layout], first: int, end: int) -> Iterator[Run]:
    offset = 0
    for param, layout in enumerate(layouts):
        low, high = max(first - offset, 0), min(end - offset, layout.n_blocks)
        if low < high:
            yield Run(param, low, high)
        offset += layout.n_blocks


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[slice, ...]]:
    """Cover flat elements ``[start, stop)`` of a row-major tensor by boxes, given as indices, in order.

    A run of whole sub-tensors is one box; a run that begins or ends inside of one gives boxes of it. So a tensor of d
    dimensions takes at most 2d - 1, and the elements of one after the other are the elements asked for, whatever the
    strides.
    """
    if start >= stop:
        return
    if not shape:
        yield ()
        return
    inner = math.prod(shape[1:])
    first, end = -(-start // inner), stop // inner  # whole sub-tensors
    if first > end:  # all of it lies inside of one
        yield from _boxes_inside(shape, end, start - end * inner, stop - end * inner)
        return
    if start < first * inner:
        yield from _boxes_inside(shape, first - 1, start - (first - 1) * inner, inner)
    if first < end:
        yield (slice(first, end), *[slice(0, size) for size in shape[1:]])
    yield from _boxes_inside(shape, end, 0, stop - end * inner)


def _boxes_inside(shape: Sequence[int], index: int, start: int, stop: int) -> Iterator[tuple[slice, ...]]:
    for box in boxes(shape[1:], start, stop):
        yield (slice(index, index + 1), *box)
