"""One interface over what the fidelity benchmark compares: emulated formats, an installed kernel, our optimizer."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.peer_formats import (
    Coded,
    FlashOptim,
    Float32,
    FormatAdamW,
    Linear,
    MomentFormat,
    bitsandbytes_format,
    bytes_held,
    torchao_format,
)
from lowmem_adam import AdamW8bit, codec
from lowmem_adam.layout import Layout, Tile

OURS = "lowmem-adam"
BITSANDBYTES = "bitsandbytes"
CONTROL = "linear"


class BitsandbytesCpu:
    """The installed bitsandbytes' own CPU kernels, which bin the values below 3e-5 of a block's maximum coarsely."""

    name = "bitsandbytes-cpu"

    def __init__(self) -> None:
        from bitsandbytes import functional

        self.functional = functional
        self.tables = {key: functional.create_dynamic_map(signed=key == "exp_avg") for key in ("exp_avg", "exp_avg_sq")}

    def encode(self, exp_avg: Tensor, exp_avg_sq: Tensor, step: int) -> Coded:
        coded: Coded = {}
        for key, flat in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
            codes, state = self.functional.quantize_blockwise(flat, code=self.tables[key], blocksize=256)
            coded |= {f"{key}.codes": codes, f"{key}.absmax": state.absmax}
        return coded

    def decode(self, coded: Coded) -> tuple[Tensor, Tensor]:
        m, v = (
            self.functional.dequantize_blockwise(
                coded[f"{key}.codes"], absmax=coded[f"{key}.absmax"], code=table, blocksize=256
            )
            for key, table in self.tables.items()
        )
        return m, v


class Contestant:
    """A format inside the shared float32 AdamW."""

    def __init__(self, make_format: Callable[[], MomentFormat]) -> None:
        self.make_format = make_format
        self.name = make_format().name

    def optimizer(self, params: list[torch.nn.Parameter], **settings: Any) -> torch.optim.Optimizer:
        return FormatAdamW(params, self.make_format, **settings)

    def moments(self, optimizer: torch.optim.Optimizer, param: torch.nn.Parameter) -> tuple[Tensor, Tensor]:
        """`exp_avg` and sqrt(`exp_avg_sq`) as the next step would read them."""
        assert isinstance(optimizer, FormatAdamW)
        m, v = optimizer.coder.decode(optimizer.state[param]["coded"])
        return m.view_as(param), v.sqrt().view_as(param)

    def code_once(self, exp_avg: Tensor, root: Tensor, step: int) -> tuple[Tensor, Tensor, int]:
        """Both moments after one coding, and the bytes held."""
        coder = self.make_format()
        coded = coder.encode(exp_avg.flatten(), root.flatten().square(), step)
        m, v = coder.decode(coded)
        return m.view_as(exp_avg), v.sqrt().view_as(root), bytes_held(coded)


class Ours(Contestant):
    """lowmem_adam itself: the real optimizer in free runs, its codec for a single coding."""

    def __init__(self) -> None:
        self.name = OURS

    def optimizer(self, params: list[torch.nn.Parameter], **settings: Any) -> torch.optim.Optimizer:
        return AdamW8bit(params, **settings)

    def moments(self, optimizer: torch.optim.Optimizer, param: torch.nn.Parameter) -> tuple[Tensor, Tensor]:
        state = optimizer.state[param]
        tile = whole_tile(param)
        grid = codec.Grid(state["block_floor"].flatten(), state["block_span"].flatten())
        codes = codec.Codes(to_blocks(state["exp_avg_code"], tile), to_blocks(state["exp_avg_sq_code"], tile), grid)
        m, root = codec.decode(codes)
        return from_blocks(m, param, tile), from_blocks(root, param, tile)

    def code_once(self, exp_avg: Tensor, root: Tensor, step: int) -> tuple[Tensor, Tensor, int]:
        tile = whole_tile(exp_avg)
        dither = codec.Dither(tile, step, 0, exp_avg.device)
        codes = codec.encode(to_blocks(exp_avg, tile), to_blocks(root, tile), dither)
        m_coded, root_coded = codec.decode(codes)
        stored = [from_blocks(codes.exp_avg, exp_avg, tile), from_blocks(codes.root, exp_avg, tile), *codes.grid]
        held = sum(t.numel() * t.element_size() for t in stored)
        return from_blocks(m_coded, exp_avg, tile), from_blocks(root_coded, root, tile), held


def whole_tile(tensor: Tensor) -> Tile:
    layout = Layout.of(tensor.shape)
    return Tile(layout.rows, layout.cols, 0, 0)


def to_blocks(tensor: Tensor, tile: Tile) -> Tensor:
    """The block matrix of a tensor; rows that do not fill their last block are padded with zeros."""
    padding = tile.blocks_per_row * tile.width - tile.cols
    return torch.nn.functional.pad(tensor.reshape(tile.rows, tile.cols), (0, padding)).view(-1, tile.width)


def from_blocks(matrix: Tensor, like: Tensor, tile: Tile) -> Tensor:
    return matrix.view(tile.rows, -1)[:, : tile.cols].reshape(like.shape)


def contestants(everything: bool = True) -> list[Contestant]:
    """Ours, the peers and the control; without `everything` those whose long runs tell something new."""
    makers: list[Callable[[], MomentFormat]] = [Float32, bitsandbytes_format]
    if everything:
        makers.append(torchao_format)
    if importlib.util.find_spec("bitsandbytes") is not None:
        makers.append(BitsandbytesCpu)
    makers += [FlashOptim, Linear]
    return [Ours(), *(Contestant(make) for make in makers)]
