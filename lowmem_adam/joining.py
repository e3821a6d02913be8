"""Sharded checkpoints as whole ones, without ranks: the files of all ranks, folders of torch.distributed.checkpoint."""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowmem_adam import resharding, saved_state
from lowmem_adam.layout import Layout
from lowmem_adam.spool import Spool
from lowmem_adam.state import entries

Named = Sequence[tuple[str, Mapping[str, Any]]]
"""State_dicts by the names of their files."""


class UnreadableError(ValueError):
    """A folder that is no checkpoint, or a damaged one."""


def is_part(state_dict: Mapping[str, Any]) -> bool:
    """Whether it is one rank's own state_dict, see ``resharding``."""
    return any(map(resharding.is_shard_key, state_dict))


# ---------------------------------------------------------------- files of all ranks


def joined(parts: Named, stand_ins: Callable[..., list[dict[str, Any]]], spool: Spool) -> dict[str, Any]:
    """What all ranks have saved of their shards as the whole, as ``consolidate_state_dict`` makes it.

    Args:
        parts: a state_dict of every rank, in any order; their form has been looked at.
        stand_ins: makes param groups for a state_dict and the shapes of its parameters.
        spool: where whole tensors are put.

    Raises:
        ValueError: not the parts of all ranks of one optimizer at one step; parts without their parameters' shapes.
    """
    shards = _in_order(parts)
    first_name, first = shards[0][0], shards[0][1]
    groups = first["param_groups"]
    for name, state_dict, _ in shards[1:]:
        if _plain(state_dict["param_groups"]) != _plain(groups):
            raise ValueError(f"{name} has other param groups than {first_name}; accepted: parts saved together")
    shapes: dict[Any, tuple[int, ...]] = {}
    for name, _, shard in shards:
        for key in shard["state"]:
            if key not in shard["shapes"] or key not in shard["spans"]:
                raise ValueError(
                    f"{name} has no shape of parameter {key}, or does not say which blocks it holds; accepted: parts "
                    "of this version (a running optimizer of as many ranks loads older ones)"
                )
            shape = tuple(shard["shapes"][key])
            if shapes.setdefault(key, shape) != shape:
                raise ValueError(f"{name}: parameter {key} has shape {shape}; accepted: {shapes[key]}, as in others")
    held = {key: {name: shard["state"].get(key, {}) for name, _, shard in shards} for key in shapes}
    some: dict[Any, Mapping[str, Any]]
    some = {key: next((state for state in by_name.values() if state), {}) for key, by_name in held.items()}
    owners = saved_state.owners_of({**first, "state": some}, stand_ins({**first, "state": some}, shapes))
    whole: dict[Any, dict[str, Tensor]] = {}
    for key in sorted(shapes, key=list(owners).index):
        pieces = [
            (name, shard["state"][key], tuple(shard["spans"][key]))
            for name, _, shard in shards
            if key in shard["state"]
        ]
        state = _whole_of(pieces, owners[key], spool)
        if int(state["step"]) > 0:  # else zero moments, which a load makes by itself
            whole[key] = state
    rest = {name: value for name, value in first.items() if not resharding.is_shard_key(name)}
    return {**rest, "state": whole}


def _in_order(parts: Named) -> list[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """Names, state_dicts and what they hold, by rank; checks that they are the parts of one whole."""
    by_rank: dict[int, tuple[str, Mapping[str, Any], Mapping[str, Any]]] = {}
    sizes: dict[int, str] = {}
    for name, state_dict in parts:
        keys = [key for key in state_dict if resharding.is_shard_key(key)]
        if len(keys) != 1:
            found = "whole state" if not keys else ", ".join(keys)
            raise ValueError(f"{name} is {found}; accepted: one rank's part, or a file of whole state by itself")
        rank, size = map(int, keys[0].removeprefix("shard_").split("_of_"))
        shard = state_dict[keys[0]]
        wanted = ("state", "spans", "shapes")
        if not isinstance(shard, Mapping) or not all(isinstance(shard.get(part), Mapping) for part in wanted):
            raise ValueError(
                f"{name}: {keys[0]} does not have dictionaries {', '.join(map(repr, wanted))}; accepted: parts that "
                "this version saved (a running optimizer of as many ranks loads older ones)"
            )
        if rank in by_rank:
            raise ValueError(f"{name} is {keys[0]}, and so is {by_rank[rank][0]}; accepted: a file of each rank")
        sizes.setdefault(size, name)
        if len(sizes) > 1:
            raise ValueError(f"{name} is {keys[0]}; accepted: parts of {next(iter(sizes))}, as {parts[0][0]}")
        by_rank[rank] = name, state_dict, shard
    (size,) = sizes
    if missing := [rank for rank in range(size) if rank not in by_rank]:
        raise ValueError(f"parts are of ranks {sorted(by_rank)} of {size}; accepted: all of them, missing: {missing}")
    return [by_rank[rank] for rank in sorted(by_rank)]


def _whole_of(
    pieces: Sequence[tuple[str, Mapping[str, Any], tuple[int, int]]], owner: saved_state.Owner, spool: Spool
) -> dict[str, Tensor]:
    """One parameter's state, of its parts: the names of their files, tensors, blocks ``[first, end)``."""
    layout = Layout.of(owner.param.shape, owner.moments)
    for name, state, span in pieces:
        for fault in saved_state.faults(state, owner, span):
            raise ValueError(f"{name}: {fault}")
    steps = {name: int(state["step"]) for name, state, _ in pieces}
    if len(set(steps.values())) > 1:
        raise ValueError(f"{owner.label}: step is {steps}; accepted: parts of one step")
    end = 0
    for name, _, span in sorted(pieces, key=lambda piece: piece[2]):
        if span[0] != span[1] and span[0] != end:
            raise ValueError(
                f"{owner.label}: {name} has blocks {list(span)}; accepted: from {end} on, after the others"
            )
        end = max(end, span[1])
    if end != layout.n_blocks:
        raise ValueError(f"{owner.label}: parts have blocks up to {end}; accepted: up to {layout.n_blocks}")
    first = pieces[0][1]
    whole = {}
    for name, (shape, dtype) in resharding.tensors_like(first, owner.param, layout).items():
        if name == "step":
            whole[name] = first[name].clone()
            continue
        whole[name] = spool.empty(shape, dtype)
        for _, state, span in pieces:
            low, high = entries(name, layout, span)
            whole[name].view(-1)[low:high].copy_(state[name].reshape(-1))
    return whole


def _plain(value: Any) -> Any:
    """Tensors as lists, so that settings can be compared."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


# ---------------------------------------------------------------- torch.distributed.checkpoint


def read_folder(folder: Path, spool: Spool) -> dict[str, Any]:
    """All that any number of ranks wrote with ``torch.distributed.checkpoint``, as one dictionary.

    It keeps names as strings; ids of parameters are made what the param groups list.

    Args:
        folder: with the file ``.metadata``.
        spool: where tensors are put.

    Raises:
        UnreadableError: damaged; holds more than tensors and plain values.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.planner import ReadItem
    from torch.distributed.checkpoint.state_dict_loader import load

    class Planner(DefaultLoadPlanner):
        def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
            # Its own would run whatever code the file names.
            self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)

    try:
        reader = FileSystemReader(folder)
        metadata = reader.read_metadata()
        flat: dict[str, Any] = {
            name: spool.empty(entry.size, entry.properties.dtype) if isinstance(entry, TensorStorageMetadata) else None
            for name, entry in metadata.state_dict_metadata.items()
        }
        planner = Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
            load(flat, storage_reader=reader, planner=planner, no_dist=True)
    except (CheckpointException, RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        words = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
        accepted = "a whole folder of tensors and plain values, as torch.distributed.checkpoint writes it"
        raise UnreadableError(f"{folder} cannot be read: {words}; accepted: {accepted}") from None
    whole: dict[str, Any] = {}
    for name, value in flat.items():
        *way, last = metadata.planner_data[name]
        place: Any = whole
        for step in way:
            place = place.setdefault(step, {})
        place[last] = value
    return _with_ids(_with_lists(whole))  # type: ignore[no-any-return]


def _with_lists(value: Any) -> Any:
    """Dictionaries by consecutive numbers as the lists that they were; other names are strings."""
    if not isinstance(value, dict):
        return value
    entries_ = {key: _with_lists(entry) for key, entry in value.items()}
    if entries_ and all(isinstance(key, int) for key in entries_):
        return [entries_[index] for index in sorted(entries_)]
    return entries_


def _with_ids(value: Any) -> Any:
    """State by the ids that its param groups list, which were written as strings."""
    if not isinstance(value, dict):
        return value
    if "param_groups" not in value:
        return {key: _with_ids(entry) for key, entry in value.items()}
    groups = value["param_groups"]
    listed = groups if isinstance(groups, list) else []
    ids = {str(key): key for group in listed if isinstance(group, Mapping) for key in group.get("params", [])}
    state = value.get("state", {})
    state = {ids.get(key, key): entry for key, entry in state.items()} if isinstance(state, dict) else state
    return {**value, "state": state}
