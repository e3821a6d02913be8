"""State of sharded optimizers on its way out and in: a rank's part, a whole on one rank, and from either back.

Three forms of a ``state_dict``:

* *whole*: tensors of whole parameters, as an optimizer without shards has them. Any number of ranks loads it.
* *shard*: one rank's tensors, plain and flat, under the key ``shard_<rank>_of_<world_size>``. The same rank of as many
  loads it.
* *parts*: ``ShardTensor`` in the place of tensors, for torch.distributed.checkpoint.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lowmem_adam import saved_state
from lowmem_adam.layout import FLAT, FLAT_BLOCK_SIZE, Layout
from lowmem_adam.local import Span, distributed_like, is_dtensor, local, whole_tensor
from lowmem_adam.shard import Partition
from lowmem_adam.shard_tensor import ShardTensor
from lowmem_adam.state import METADATA_KEYS, entries, expected_tensors, master_of, part_of

CHUNK = 1 << 26
"""Bytes that are on their way through a device's memory to the host at a time."""


def shard_key(rank: int, world_size: int) -> str:
    """Under what a rank's own tensors lie in a state_dict of form *shard*."""
    return f"shard_{rank}_of_{world_size}"


# ---------------------------------------------------------------- out


def check_targets(to: int | Sequence[int], ranks: int) -> list[int]:
    """The ranks that get the whole.

    Raises:
        ValueError: not a rank, or not some, each once.
    """
    targets = [to] if isinstance(to, int) else list(to) if isinstance(to, Sequence) else []
    known = all(isinstance(rank, int) and not isinstance(rank, bool) and 0 <= rank < ranks for rank in targets)
    if not targets or not known or len(set(targets)) < len(targets):
        raise ValueError(f"to is {to!r}; accepted: ranks from 0 below {ranks}, one or several")
    return targets


def as_shard(state_dict: Mapping[str, Any], params: Sequence[Tensor], partition: Partition) -> dict[str, Any]:
    """A rank's own state_dict in form *shard*.

    Args:
        state_dict: as torch packs it, of this rank's tensors, keyed by place in ``params``.
        params: of all param groups.
        partition: who holds what.
    """
    world = partition.world
    state = {key: tensors for key, tensors in state_dict["state"].items() if tensors}
    spans = {key: list(partition.span(params[key])) for key in state}
    shapes = {key: list(params[key].shape) for key in state}  # with which files can be joined without the model
    shard = {"state": state, "spans": spans, "shapes": shapes}
    return {**state_dict, "state": {}, shard_key(world.rank, world.size): shard}


def as_parts(
    state_dict: Mapping[str, Any], params: Sequence[Tensor], partition: Partition, private: bool
) -> dict[str, Any]:
    """A rank's own state_dict in form *parts*; as ``as_shard``, and whether a load may keep the tensors."""
    state = {}
    for key, tensors in state_dict["state"].items():
        if not tensors:  # left behind where somebody read optimizer.state[param]
            continue
        param = params[key]
        layout, span = partition.layout(param), partition.span(param)
        whole = tensors_like(tensors, param, layout)
        state[key] = {
            name: value
            if name == "step" or 0 in whole[name][0]  # no rank would write what has no elements
            else ShardTensor(value, whole[name][0], entries(name, layout, span)[0], private=private)
            for name, value in tensors.items()
        }
    return {**state_dict, "state": state}


def as_whole(
    state_dict: Mapping[str, Any], params: Sequence[Tensor], partition: Partition, to: int
) -> dict[str, Any] | None:
    """All ranks' tensors put together on one of them, on the CPU, in form *whole*; a collective.

    One tensor after the other: only that rank ever holds more than its own.

    Args:
        state_dict: as for ``as_shard``.
        params: as for ``as_shard``.
        partition: who holds what.
        to: the rank that gets them.

    Returns:
        The state_dict on rank ``to``, None on others.
    """
    whole = {}
    for key, tensors in sorted(state_dict["state"].items()):
        if not tensors or int(tensors["step"]) == 0:  # zero moments, which a load makes by itself
            continue
        param = params[key]
        expected = tensors_like(tensors, param, partition.layout(param))
        whole[key] = {
            name: value.clone() if name == "step" else _collect(value, name, expected[name][0], param, partition, to)
            for name, value in tensors.items()
        }
    return {**state_dict, "state": whole} if partition.world.rank == to else None


def gathered(state_dict: Mapping[str, Any], to: int) -> dict[str, Any] | None:
    """DTensors put together on one rank of the default group, on the CPU; a collective, one tensor after the other."""
    here = dist.get_rank() == to
    state: dict[Any, dict[str, Any]] = {}
    for key, tensors in state_dict["state"].items():
        state[key] = {}
        for name, value in tensors.items():
            whole = whole_tensor(value) if is_dtensor(value) else value
            if here:
                state[key][name] = whole.to("cpu", copy=not is_dtensor(value))
    return {**state_dict, "state": state} if here else None


def _collect(
    own: Tensor, name: str, shape: tuple[int, ...], param: Tensor, partition: Partition, to: int
) -> Tensor | None:
    """One tensor of one parameter's state, whole, on rank ``to``."""
    world, layout = partition.world, partition.layout(param)
    carrier = _carrier(own, param, world.group)
    whole = torch.empty(shape, dtype=own.dtype) if world.rank == to else None
    for rank in range(world.size):
        first, end = entries(name, layout, partition.span(param, rank))
        if rank == to == world.rank:
            assert whole is not None
            whole.view(-1)[first:end].copy_(own.view(-1))
        elif rank != to and world.rank in (rank, to):
            for low in range(first, end, CHUNK):
                high = min(low + CHUNK, end)
                # As bytes, since not every backend knows every dtype.
                if whole is None:
                    part = own.view(-1)[low - first : high - first].to(carrier).view(torch.uint8)
                    dist.send(part, group=world.group, group_dst=to)
                elif carrier.type == "cpu":
                    dist.recv(whole.view(-1)[low:high].view(torch.uint8), group=world.group, group_src=rank)
                else:
                    passing = torch.empty(high - low, dtype=own.dtype, device=carrier)
                    dist.recv(passing.view(torch.uint8), group=world.group, group_src=rank)
                    whole.view(-1)[low:high].copy_(passing)
    return whole


def _carrier(own: Tensor, param: Tensor, group: Any) -> torch.device:
    """From where a group sends a tensor: where it lies, or from its parameter's device if the group knows no other."""
    known = {device.type for device in group._device_types}
    return own.device if own.device.type in known else param.device


def bytes_by_rank(states: Mapping[Tensor, Mapping[str, Tensor]], partition: Partition) -> list[int]:
    """Bytes of state of every rank: this one's as measured, others' by what they hold of the same parameters."""
    totals = []
    for rank in range(partition.world.size):
        total = 0
        for param, state in states.items():
            if rank == partition.world.rank or param not in partition:
                total += sum(local(value).nbytes for value in state.values())
            elif state:
                expected = tensors_like(state, param, partition.layout(param), partition.span(param, rank))
                total += sum(math.prod(shape) * dtype.itemsize for shape, dtype in expected.values())
        totals.append(total)
    return totals


def tensors_like(
    tensors: Mapping[str, Any], param: Tensor, layout: Layout, span: Span | None = None
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of state of a whole parameter, or of some blocks, whose settings were those of this state."""
    coded, master = "exp_avg_code" in tensors or "state1" in tensors, master_of(tensors)
    moments = FLAT if layout.block_size == FLAT_BLOCK_SIZE else "8bit"
    return expected_tensors(param.shape, moments, span, None if master is None else master.dtype, coded)


def copied(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state_dict as torch packs it with copies of its tensors."""
    state = {
        key: {name: value.clone() for name, value in tensors.items()} for key, tensors in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


# ---------------------------------------------------------------- in


def local_state(
    state_dict: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    partition: Partition,
    given_away: set[int],
) -> dict[str, Any]:
    """A state_dict of any form as this rank's own part of it, checked.

    Args:
        state_dict: what is to be loaded; its form has been looked at by ``saved_state.check_form``.
        groups: the optimizer's own param groups.
        partition: has cut all parameters that have saved state.
        given_away: gets the addresses of tensors that need not be copied.

    Raises:
        ValueError: as ``saved_state.check``; also the shard of another rank, world size or cut.
    """
    params = {
        key: param
        for saved, group in zip(state_dict["param_groups"], groups, strict=False)
        for key, param in zip(saved["params"], group["params"], strict=False)
    }

    moments = {param: group["moments"] for group in groups for param in group["params"]}

    def layout_of(param: Tensor) -> Layout:
        return partition.layout(param) if param in partition else Layout.of(param.shape, moments[param])

    def span_of(param: Tensor) -> Span:
        return partition.span(param) if param in partition else (0, layout_of(param).n_blocks)

    shard = _own_shard(state_dict, params, span_of, partition)
    if shard is not None:
        own = {**state_dict, "state": shard}
        saved_state.check(own, groups, span_of)
        return own
    if any(isinstance(value, ShardTensor) for state in state_dict["state"].values() for value in _values(state)):
        state = {
            key: {
                name: _own_part(value, name, params.get(key), layout_of, span_of, key)
                for name, value in tensors.items()
            }
            for key, tensors in state_dict["state"].items()
        }
        own = {**state_dict, "state": state}
        saved_state.check(own, groups, span_of)
        parts = [value for tensors in state_dict["state"].values() for value in tensors.values()]
        given_away.update(v.local.data_ptr() for v in parts if isinstance(v, ShardTensor) and v.private)
        return own
    saved_state.check(state_dict, groups)
    state = {
        key: _part(tensors, params[key], layout_of(params[key]), span_of(params[key])) if tensors else tensors
        for key, tensors in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def _part(tensors: Mapping[str, Any], param: Tensor, layout: Layout, span: Span) -> dict[str, Any]:
    """This process's part of a parameter's whole state."""
    if not is_dtensor(param):
        return part_of(tensors, layout, span)
    return {
        name: value if name == "step" else distributed_like(param, value, by_block=name in METADATA_KEYS)
        for name, value in tensors.items()
    }


def has_state(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> Callable[[Tensor], bool]:
    """Tells which of an optimizer's parameters a state_dict of any form has state of."""
    saved = [key for group in state_dict["param_groups"] for key in group["params"]]
    params = [param for group in groups for param in group["params"]]
    held = [state_dict["state"], *_shards_in(state_dict)]
    keys = {key for state in held for key in state if state[key]}
    loaded = {param for key, param in zip(saved, params, strict=False) if key in keys}
    return lambda param: param in loaded


def _shards_in(state_dict: Mapping[str, Any]) -> list[Mapping[Any, Any]]:
    found = [
        value.get("state") for key, value in state_dict.items() if is_shard_key(key) and isinstance(value, Mapping)
    ]
    return [state for state in found if isinstance(state, Mapping)]


def is_shard_key(key: Any) -> bool:
    """Whether it is one that ``shard_key`` makes."""
    return isinstance(key, str) and re.fullmatch(r"shard_\d+_of_\d+", key) is not None


def _values(state: Any) -> Sequence[Any]:
    return list(state.values()) if isinstance(state, Mapping) else []


def _own_shard(
    state_dict: Mapping[str, Any],
    params: Mapping[Any, Tensor],
    span_of: Callable[[Tensor], Span],
    partition: Partition,
) -> Any:
    """The tensors of a state_dict of form *shard*, None where it has another form."""
    keys = [key for key in state_dict if is_shard_key(key)]
    if not keys:
        return None
    world = partition.world
    accepted = shard_key(world.rank, world.size)
    if keys != [accepted]:
        raise ValueError(
            f"state_dict is {', '.join(keys)}, one rank's part of a sharded state; accepted here: {accepted}, or whole "
            "state as consolidate_state_dict(to=0) makes it"
        )
    shard = state_dict[accepted]
    if not isinstance(shard, Mapping) or not all(isinstance(shard.get(part), Mapping) for part in ("state", "spans")):
        raise ValueError(
            f"state_dict: {accepted} has no dictionaries 'state' and 'spans'; accepted: what state_dict made"
        )
    for key in shard["state"]:
        saved = shard["spans"].get(key)
        wanted = list(span_of(params[key])) if key in params else None
        if saved != wanted:
            raise ValueError(
                f"state_dict, parameter {key}: {accepted} holds blocks {saved}; accepted: {wanted} (another model, or "
                "param groups in another order; whole state, as consolidate_state_dict(to=0) makes it, fits any cut)"
            )
    return shard["state"]


def _own_part(
    value: Any,
    name: str,
    param: Tensor | None,
    layout_of: Callable[[Tensor], Layout],
    span_of: Callable[[Tensor], Span],
    key: Any,
) -> Any:
    """The tensor within a ``ShardTensor``, if it is this rank's."""
    if not isinstance(value, ShardTensor) or param is None:
        return value
    first, end = entries(name, layout_of(param), span_of(param))
    if (value.start, value.local.numel()) != (first, end - first):
        raise ValueError(
            f"state_dict, parameter {key}: {name} is {value!r}; accepted: {end - first} elements from {first} on"
        )
    return value.local.view(value.shape) if value.local.numel() == value.numel() else value.local
