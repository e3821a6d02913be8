"""Rows, blocks, tiles and shard cuts against brute force."""

from __future__ import annotations

import pytest

from lowmem_adam.layout import BLOCK_SIZE, Layout, Tile, cut_into_shards, is_coded

SHAPES = [(), (0,), (1,), (127,), (128,), (129,), (1000,), (3, 0), (0, 5), (7, 1), (5, 127), (4, 128), (3, 129),
          (2, 500), (16, 3, 3, 3), (300, 7), (2, 1024), (1, 4096)]  # fmt: skip


def brute_force_blocks(layout: Layout) -> list[range]:
    """The flat elements of every block, by the sentence of the definition: at most 128 elements of one row."""
    return [
        range(row * layout.cols + col, row * layout.cols + min(col + BLOCK_SIZE, layout.cols))
        for row in range(layout.rows)
        for col in range(0, layout.cols, BLOCK_SIZE)
    ]


def tile_blocks(tile: Tile) -> list[range]:
    """The flat elements of a tile's blocks."""
    inside = brute_force_blocks(Layout(tile.rows, tile.cols))
    return [range(tile.start + r.start, tile.start + r.stop) for r in inside]


@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_cover_each_element_once(shape: tuple[int, ...]) -> None:
    layout = Layout.of(shape)
    blocks = brute_force_blocks(layout)
    assert layout.n_blocks == len(blocks)
    assert [i for block in blocks for i in block] == list(range(layout.numel))
    assert [layout.block_start(k) for k in range(layout.n_blocks)] == [block.start for block in blocks]
    assert layout.block_start(layout.n_blocks) == layout.numel


@pytest.mark.parametrize("max_elements", [1, 128, 300, 1000, 10**6])
@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_are_the_blocks_in_order(shape: tuple[int, ...], max_elements: int) -> None:
    layout = Layout.of(shape)
    blocks = brute_force_blocks(layout)
    n = layout.n_blocks
    for first, end in {(0, n), (n // 3, n), (0, n // 2), (n // 4, n - n // 4), (n, n)}:
        tiles = list(layout.tiles(first, end, max_elements))
        assert [block for tile in tiles for block in tile_blocks(tile)] == blocks[first:end]
        ordinal = first
        for tile in tiles:
            assert tile.first_block == ordinal
            assert tile.stop - tile.start <= max(max_elements, BLOCK_SIZE)
            assert tile.width == max(len(block) for block in tile_blocks(tile))
            ordinal += tile.n_blocks


@pytest.mark.parametrize(
    ("shape", "coded"),
    [
        ((64, 64), True),
        ((63, 65), False),
        ((4096, 1), True),
        ((4096,), False),
        ((65536,), True),
        ((65535,), False),
        ((8, 8, 8, 8), True),
        ((), False),
        ((0, 4096), False),
    ],
)
def test_which_shapes_are_coded(shape: tuple[int, ...], coded: bool) -> None:
    assert is_coded(shape) is coded


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7, 64])
@pytest.mark.parametrize("shapes", [SHAPES, [(50257, 768)], [(3,)], []])
def test_shards_are_contiguous_and_differ_by_one_block(shapes: list[tuple[int, ...]], world_size: int) -> None:
    layouts = [Layout.of(shape) for shape in shapes]
    shards = cut_into_shards(layouts, world_size)
    sizes = [sum(run.end_block - run.first_block for run in shard) for shard in shards]
    assert len(shards) == world_size
    assert max(sizes) - min(sizes) <= 1
    in_order = [(run.param, run.first_block, run.end_block) for shard in shards for run in shard]
    assert all(first < end for _, first, end in in_order)
    rebuilt = dict.fromkeys(range(len(layouts)), 0)
    last_param = 0
    for param, first, end in in_order:
        assert param >= last_param
        assert first == rebuilt[param]
        rebuilt[param], last_param = end, param
    assert rebuilt == {param: layout.n_blocks for param, layout in enumerate(layouts)}


def test_a_world_of_none_is_refused() -> None:
    with pytest.raises(ValueError, match="world_size is 0; accepted: integers from 1"):
        cut_into_shards([], 0)
