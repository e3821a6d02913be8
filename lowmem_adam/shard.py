"""ZeRO-1: which rank keeps the moments of which blocks, and how the others get the parameters that it steps.

All parameters' blocks, taken as one list, are cut into as many contiguous shards as there are ranks. A rank holds
moments for its shard alone and steps it; then every rank broadcasts the parameters of its shard, bucket by bucket,
while it steps the next bucket. A world of one has one shard and nobody to send it to.

Source: Rajbhandari et al. 2020 (arXiv 1910.02054), stage 1.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lowmem_adam.layout import Layout, Run, boxes, cut_into_shards
from lowmem_adam.local import Span, is_dtensor, place_of

# ---------------------------------------------------------------- pieces of parameters


@dataclass(frozen=True, slots=True)
class Piece:
    """Blocks ``[first_block, end_block)`` of a parameter, which are flat elements ``[start, stop)``, row by row."""

    param: Tensor
    layout: Layout
    first_block: int
    end_block: int

    @property
    def start(self) -> int:
        """Flat index of the first element."""
        return self.layout.block_start(self.first_block)

    @property
    def stop(self) -> int:
        """Flat index one past the last element."""
        return self.layout.block_start(self.end_block)

    @property
    def nbytes(self) -> int:
        """Bytes of the parameter's elements."""
        return (self.stop - self.start) * self.param.element_size()


def read(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Flat elements ``[start, stop)``, one dimension: a view of a contiguous tensor, a copy of any other."""
    tensor = tensor.detach()
    if tensor.is_contiguous():
        return tensor.view(-1)[start:stop]
    parts = [tensor[box].reshape(-1) for box in boxes(tensor.shape, start, stop)]
    return torch.cat(parts) if parts else tensor.new_empty(0)


def write(tensor: Tensor, start: int, stop: int, values: Tensor) -> None:
    """Put what ``read`` gave back into its place; nothing to do where that was a view."""
    tensor = tensor.detach()
    if tensor.is_contiguous():
        place = tensor.view(-1)[start:stop]
        if place.data_ptr() != values.data_ptr():
            place.copy_(values)
        return
    offset = 0
    for box in boxes(tensor.shape, start, stop):
        place = tensor[box]
        place.copy_(values[offset : offset + place.numel()].view(place.shape))
        offset += place.numel()


# ---------------------------------------------------------------- who takes part


def check_shard_group(value: Any) -> None:
    """Check the setting ``shard_group``.

    Raises:
        ValueError: names what is accepted.
    """
    accepted = "accepted: None, 'world', a ProcessGroup of which this process is a member, a one-dimensional DeviceMesh"
    if value is None or (isinstance(value, str) and value == "world"):
        return
    if dist.is_available():  # DeviceMesh and ProcessGroup exist only then
        if isinstance(value, DeviceMesh):
            if value.ndim != 1:
                raise ValueError(
                    f"shard_group is a DeviceMesh of {value.ndim} dimensions, {value.mesh_dim_names}; {accepted}, such "
                    "as mesh['dp']"
                )
            return
        if isinstance(value, dist.ProcessGroup):
            return
        if value is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(f"shard_group is a group of which this process is not a member; {accepted}")
    raise ValueError(f"shard_group is {value!r}; {accepted}")


def check_bucket_cap(value: object) -> None:
    """Check the setting ``bucket_cap_mb``.

    Raises:
        ValueError: no number above 0.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < float("inf"):
        raise ValueError(f"bucket_cap_mb is {value!r}; accepted: finite numbers above 0, in MiB")


@dataclass(frozen=True, slots=True)
class World:
    """The ranks that share the moments. ``group`` is None for a process alone, which sends nothing."""

    rank: int = 0
    size: int = 1
    group: Any = None

    @classmethod
    def of(cls, shard_group: Any) -> World:
        """What a checked setting stands for, now that it is needed.

        ``"world"`` in a process that was not started as one of several is a world of one.

        Raises:
            RuntimeError: ``"world"`` in one of several processes before ``init_process_group``.
            ValueError: a DeviceMesh of other processes.
        """
        if shard_group is None:
            return cls()
        if isinstance(shard_group, str):
            if not (dist.is_available() and dist.is_initialized()):
                launched = os.environ.get("WORLD_SIZE", "1")
                if launched not in ("", "1"):
                    raise RuntimeError(
                        f"shard_group is 'world' and WORLD_SIZE is {launched}, but torch.distributed is not "
                        "initialized; accepted: torch.distributed.init_process_group before the first step"
                    )
                return cls()
            group = dist.group.WORLD
        else:
            group = shard_group
            if isinstance(shard_group, DeviceMesh):
                group = shard_group.get_group() if shard_group.get_coordinate() is not None else None
        rank = -1 if group is None else dist.get_rank(group)
        if rank < 0:
            raise ValueError(
                f"shard_group is {shard_group!r}, of which this process, rank {dist.get_rank()}, is not a member; "
                "accepted: groups and meshes of which it is one"
            )
        return cls(rank, dist.get_world_size(group), group)


# ---------------------------------------------------------------- the cut


@dataclass(slots=True)
class Bucket:
    """What is stepped, then gathered, at one time: for every rank the pieces of its shard."""

    pieces: list[list[Piece]]
    copied: int
    """Bytes that are sent in copies."""


@dataclass(slots=True)
class Partition:
    """Who holds which blocks. It grows by parameters; what is cut already stays where it is.

    Args:
        world: the ranks.
        bucket_bytes: of parameters that a rank sends at a time, and of all ranks' copies that are on their way.
    """

    world: World
    bucket_bytes: int
    buckets: list[Bucket] = field(default_factory=list)
    loads: list[int] = field(init=False)
    _layouts: dict[Tensor, Layout] = field(default_factory=dict)
    _spans: dict[Tensor, list[Span]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.loads = [0] * self.world.size

    def __contains__(self, param: Tensor) -> bool:
        return param in self._spans

    def __len__(self) -> int:
        return len(self._spans)

    @property
    def alone_from(self) -> int:
        """Bytes from which a piece is sent by itself, from and to where it lies, and not in a copy with others.

        A broadcast costs about a millisecond whatever its size where ranks share cores, a copy its bytes.
        """
        return min(1 << 20, max(1 << 12, self.bucket_bytes // 64))

    def sends_alone(self, piece: Piece) -> bool:
        """Whether a piece is sent by itself."""
        return piece.nbytes >= self.alone_from and piece.param.is_contiguous()

    @property
    def params(self) -> Iterable[Tensor]:
        """The parameters that were cut, in that order."""
        return self._spans.keys()

    @property
    def device(self) -> torch.device:
        """Where the first parameter lies."""
        return next(iter(self._spans)).device if self._spans else torch.device("cpu")

    def layout(self, param: Tensor) -> Layout:
        """What numbers a parameter's blocks."""
        return self._layouts[param]

    def span(self, param: Tensor, rank: int | None = None) -> Span:
        """Blocks ``[first, end)`` of a parameter that a rank holds, this process's by default; ``(0, 0)`` for none."""
        return self._spans[param][self.world.rank if rank is None else rank]

    def without_group(self) -> Partition:
        """The same without the process group, which cannot be copied; it shares what it consists of."""
        other = copy.copy(self)
        other.world = World(self.world.rank, self.world.size, None)
        return other

    def copied(self) -> Partition:
        """The same, which stays as it is when this one grows."""
        other = copy.copy(self)
        other.buckets, other.loads = list(self.buckets), list(self.loads)
        other._layouts, other._spans = dict(self._layouts), dict(self._spans)
        return other

    def rejoin(self, world: World) -> None:
        """Take a process group again.

        Raises:
            RuntimeError: this process has another rank, or the group another size.
        """
        if (world.rank, world.size) != (self.world.rank, self.world.size):
            raise RuntimeError(
                f"this copy of an optimizer holds the shard of rank {self.world.rank} of {self.world.size}, and the "
                f"process is rank {world.rank} of {world.size}; accepted: the same (a state_dict fits any number)"
            )
        self.world = world

    def spans(self, param: Tensor) -> list[Span]:
        """Blocks of a parameter that each rank holds."""
        return self._spans[param]

    def own(self, param: Tensor) -> Piece:
        """What this process holds of a parameter, in one piece."""
        return Piece(param, self.layout(param), *self.span(param))

    def extend(self, params: Sequence[Tensor], moments: Mapping[Tensor, str] | None = None) -> None:
        """Cut parameters that are new, in an order that all ranks share. A process alone has what lies here.

        Args:
            params: the new ones.
            moments: the setting of each one's group; blocks are those of ``"8bit"`` without it.
        """
        places = [place_of(param) if moments is None else place_of(param, moments[param]) for param in params]
        layouts = [place.layout for place in places]
        if self.world.size == 1:
            shards = [[Run(index, *place.span) for index, place in enumerate(places) if place.span[0] < place.span[1]]]
        else:
            if any(map(is_dtensor, params)):
                raise ValueError(
                    "parameters are DTensors, which are sharded already, and there is a shard_group; accepted with "
                    "DTensors: shard_group=None"
                )
            shards = cut_into_shards(layouts, self.world.size, self.loads)
        self._layouts.update(zip(params, layouts, strict=True))
        for param in params:
            self._spans[param] = [(0, 0)] * self.world.size
        for rank, shard in enumerate(shards):
            for run in shard:
                self._spans[params[run.param]][rank] = (run.first_block, run.end_block)
                self.loads[rank] += run.end_block - run.first_block
        chunks = [list(_chunks(params, layouts, shard, self)) for shard in shards]
        for index in range(max(map(len, chunks))):
            pieces = [chunk[index] if index < len(chunk) else [] for chunk in chunks]
            copied = sum(p.nbytes for of_rank in pieces for p in of_rank if not self.sends_alone(p))
            self.buckets.append(Bucket(pieces, copied))


def _chunks(
    params: Sequence[Tensor], layouts: Sequence[Layout], shard: Sequence[Run], partition: Partition
) -> Iterator[list[Piece]]:
    """A shard in pieces, as many together as a bucket has room for (one block at least).

    A bucket has room for ``bucket_bytes`` of every rank's pieces that are sent by themselves, and for as many of all
    ranks' together that are sent in a copy. Of a process alone all is one bucket: there is nothing to overlap.
    """
    ranks = partition.world.size
    chunk: list[Piece] = []
    room = partition.bucket_bytes
    for run in shard:
        param, layout = params[run.param], layouts[run.param]
        first = run.first_block
        while first < run.end_block:
            piece = Piece(param, layout, first, run.end_block)
            if ranks > 1:
                weight = 1 if partition.sends_alone(piece) and room >= partition.alone_from else ranks
                end = end_within(layout, first, run.end_block, room // weight, param.element_size())
                if end == first and chunk:
                    yield chunk
                    chunk, room = [], partition.bucket_bytes
                    continue
                piece = Piece(param, layout, first, max(end, first + 1))
                room = max(0, room - piece.nbytes * (1 if partition.sends_alone(piece) else ranks))
            chunk.append(piece)
            first = piece.end_block
    if chunk:
        yield chunk


def end_within(layout: Layout, first: int, end: int, nbytes: int, element_size: int) -> int:
    """The largest block number up to ``end`` so that blocks from ``first`` on take at most ``nbytes``."""
    limit = layout.block_start(first) + nbytes // element_size
    low, high = first, end
    while low < high:
        middle = (low + high + 1) // 2
        if layout.block_start(middle) <= limit:
            low = middle
        else:
            high = middle - 1
    return low


# ---------------------------------------------------------------- the gather


class Gather:
    """One bucket's parameters on their way from the ranks that stepped them to all others.

    The bytes are sent as they are: large pieces from memory to memory, small ones and those of parameters that do not
    lie in one run copied together.
    """

    def __init__(self, bucket: Bucket, partition: Partition) -> None:
        world = partition.world
        self._rank = world.rank
        self._works: list[Any] = []
        self._packs: list[tuple[int, list[Piece], Tensor]] = []
        for owner, pieces in enumerate(bucket.pieces):
            together: dict[torch.device, list[Piece]] = {}
            for piece in pieces:
                if partition.sends_alone(piece):
                    self._send(_bytes_of(read(piece.param, piece.start, piece.stop)), owner, world)
                else:
                    together.setdefault(piece.param.device, []).append(piece)
            for device, small in together.items():
                small.sort(key=lambda piece: -piece.param.element_size())  # so that every part is aligned to its dtype
                buffer = torch.empty(sum(piece.nbytes for piece in small), dtype=torch.uint8, device=device)
                if owner == world.rank:
                    for piece, part in _parts(small, buffer):
                        part.copy_(_bytes_of(read(piece.param, piece.start, piece.stop)))
                self._packs.append((owner, small, buffer))
                self._send(buffer, owner, world)

    def _send(self, buffer: Tensor, owner: int, world: World) -> None:
        """From its owner to all others.

        gloo has two threads for collectives, and each broadcast is a task of one; messages from one rank to another are
        left to the connection itself. Bytes are the same.
        """
        if buffer.device.type != "cpu":
            self._works.append(dist.broadcast(buffer, group=world.group, group_src=owner, async_op=True))
        elif owner == world.rank:
            others = [rank for rank in range(world.size) if rank != owner]
            self._works += [dist.isend(buffer, group=world.group, group_dst=rank) for rank in others]
        else:
            self._works.append(dist.irecv(buffer, group=world.group, group_src=owner))

    def wait(self) -> None:
        """Until all parameters of the bucket have arrived and lie in their places."""
        for work in self._works:
            work.wait()
        for owner, pieces, buffer in self._packs:
            if owner != self._rank:
                for piece, part in _parts(pieces, buffer):
                    write(piece.param, piece.start, piece.stop, part.view(piece.param.dtype))
        self._works.clear()
        self._packs.clear()


def _bytes_of(flat: Tensor) -> Tensor:
    return flat.view(torch.uint8)


def _parts(pieces: Sequence[Piece], buffer: Tensor) -> Iterator[tuple[Piece, Tensor]]:
    """Every piece with its bytes in a buffer of all."""
    offset = 0
    for piece in pieces:
        yield piece, buffer[offset : offset + piece.nbytes]
        offset += piece.nbytes
