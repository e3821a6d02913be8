"""A rank's part of a state tensor, as torch.distributed.checkpoint reads and writes it: nobody ever holds the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowmem_adam.callers import called_from
from lowmem_adam.layout import boxes

_PACKAGE = "torch.distributed.checkpoint"


class ShardTensor(Tensor):
    """Flat elements ``[start, start + local.numel())`` of a tensor of some shape that lies on several ranks.

    Saved and loaded by torch.distributed.checkpoint as the boxes that these elements fill, so that other cuts, other
    numbers of ranks and whole tensors of the same shape read it. Arithmetic on it is refused, and so is pickling:
    ``consolidate_state_dict`` makes whole tensors.

    Args:
        local: the elements, one dimension; shared, not copied.
        shape: of the whole tensor.
        start: flat index of the first element.
        private: made for a load alone, which may keep ``local`` instead of copying it.
    """

    local: Tensor
    start: int
    private: bool

    @staticmethod
    def __new__(cls, local: Tensor, shape: Sequence[int], start: int, *, private: bool = False) -> ShardTensor:
        """A tensor of the whole shape without memory of its own."""
        made: ShardTensor = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=local.dtype, device=local.device
        )
        made.local = local.detach().view(-1)
        made.start = start
        made.private = private
        return made

    def __init__(self, local: Tensor, shape: Sequence[int], start: int, *, private: bool = False) -> None:
        pass

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        stop = self.start + self.local.numel()
        return f"ShardTensor(elements {self.start} to {stop} of shape {tuple(self.shape)}, {self.dtype})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError(
            f"{self!r} is one rank's part and cannot be pickled; accepted: torch.distributed.checkpoint, or whole "
            "tensors as consolidate_state_dict(to=0) makes them"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardTensor:
        return self._like(self.local.clone())

    def _like(self, local: Tensor) -> ShardTensor:
        return ShardTensor(local, self.shape, self.start)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """What a checkpoint does to tensors: copies, also to another device. Everything else is refused."""
        aten = torch.ops.aten
        shard: Any = args[0] if args else None
        if func in (aten.detach.default, aten.alias.default) and isinstance(shard, ShardTensor):
            return shard._like(shard.local)
        copies = (aten.clone.default, aten._to_copy.default, aten.empty_like.default)
        if func in copies and isinstance(shard, ShardTensor):
            plain = {key: value for key, value in (kwargs or {}).items() if key != "memory_format"}
            return shard._like(func(shard.local, **plain))
        if func is aten.new_empty.default and isinstance(shard, ShardTensor):
            # How torch's stager asks for a tensor whose parts it then fills in by itself.
            return ShardTensor(shard.local.new_empty(0, **(kwargs or {})), args[1], shard.start)
        if func is aten.copy_.default and all(isinstance(arg, ShardTensor) for arg in args[:2]):
            shard.local.copy_(args[1].local)
            return shard
        # As torch itself of an operator that a tensor does not have. Of a TypeError it would make one with other words.
        raise NotImplementedError(
            f"{func} on a ShardTensor, which is one rank's part of a tensor; accepted: copies of it, "
            "torch.distributed.checkpoint, or whole tensors as consolidate_state_dict(to=0) makes them"
        )

    # ---------------------------------------------------------------- the protocol of torch.distributed.checkpoint

    def _chunks(self) -> list[Any]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return [
            ChunkStorageMetadata(
                offsets=torch.Size(part.start for part in box), sizes=torch.Size(part.stop - part.start for part in box)
            )
            for box in boxes(self.shape, self.start, self.start + self.local.numel())
        ]

    def __create_chunk_list__(self) -> list[Any]:
        return self._chunks()

    def __create_write_items__(self, fqn: str, tensor: Any) -> list[Any]:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shape),
            )
            for chunk in self._chunks()
        ]

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        offset = 0
        for chunk in self._chunks():
            if index.offset is None or chunk.offsets == index.offset:
                return self.local[offset : offset + chunk.sizes.numel()].view(chunk.sizes)
            offset += chunk.sizes.numel()
        raise ValueError(f"{self!r} has no chunk at {index}; accepted: {[chunk.offsets for chunk in self._chunks()]}")


def asked_by_checkpoint(for_load: bool = False) -> bool:
    """Whether torch.distributed.checkpoint is calling: it, and nobody else, wants each rank's own part.

    It has no other way of saying so: it calls ``state_dict()`` as everybody does.

    Args:
        for_load: ask whether it is about to load into what it gets.
    """
    return called_from(f"{_PACKAGE}.state_dict_loader" if for_load else _PACKAGE)
