"""What ranks that share one optimizer must agree on, and how they find out, so that all raise and none waits."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lowmem_adam import settings
from lowmem_adam.shard import Partition, World, read

MEETING_SECONDS = 300.0
"""How long a rank waits for the others in ``state_dict()`` and ``load_state_dict()``: one may be writing or
reading a model before."""

TILE = 1 << 18
"""Elements that are hashed at a time."""


# ---------------------------------------------------------------- settings and shapes


def describe_settings(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for every setting of every param group, but for the backend, which is the machine's own."""
    lines = []
    for index, group in enumerate(groups):
        for name in (*settings.ALL, "decoupled_weight_decay"):
            value = group[name]
            lines.append(f"param group {index}: {name} {value.tolist() if isinstance(value, Tensor) else value}")
    return lines


def describe_saved(state_dict: Mapping[str, Any]) -> list[str]:
    """A line for every setting and for every parameter's steps in a state_dict that is about to be loaded."""
    steps = [
        f"parameter {key}: {int(state_dict['state'][key]['step'])} steps"
        for group in state_dict["param_groups"]
        for key in group["params"]
        if state_dict["state"].get(key)
    ]
    return [*describe_settings(state_dict["param_groups"]), *steps]


def describe(
    groups: Sequence[Mapping[str, Any]],
    partition: Partition,
    steps: Callable[[Tensor], int],
    *,
    gradients: bool = False,
) -> list[str]:
    """A line for every param group and parameter, with all that must be the same on all ranks beside settings.

    Args:
        groups: the optimizer's param groups.
        partition: who holds what.
        steps: how many steps a parameter has taken.
        gradients: also which parameters have a gradient.
    """
    lines = [f"{len(groups)} param groups", f"bucket_cap_mb {partition.bucket_bytes / 2**20:g}"]
    for index, group in enumerate(groups):
        where = f"param group {index}"
        lines.append(f"{where}: {len(group['params'])} parameters")
        for number, param in enumerate(group["params"]):
            words = [
                f"shape {tuple(param.shape)}",
                str(param.dtype),
                param.device.type,
                "contiguous" if param.is_contiguous() else "not contiguous",
                f"requires_grad {param.requires_grad}",
                f"{steps(param)} steps",
                f"blocks {partition.spans(param)}" if param in partition else "not cut",
            ]
            if gradients:
                words.append("no gradient" if param.grad is None else "a gradient")
            lines.append(f"{where}, parameter {number}: {', '.join(words)}")
    return lines


def agree(lines: Sequence[str], world: World, refusal: Exception | None = None) -> None:
    """Compare descriptions among all ranks; a collective.

    Args:
        lines: what this rank describes.
        world: the ranks.
        refusal: what this rank was about to raise, for others not to wait for it.

    Raises:
        RuntimeError: on every rank; names the first line in which a rank differs from rank 0.
        Exception: ``refusal``, on this rank; the others raise a RuntimeError that carries its words.
    """
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    said = _exchange((digest, None if refusal is None else str(refusal)), world)
    if refusal is not None:
        raise refusal
    for rank, (_, words) in enumerate(said):
        if words is not None:
            raise RuntimeError(f"rank {rank} refuses: {words}")
    if all(other == digest for other, _ in said):
        return
    everything: list[Sequence[str]] = _exchange(list(lines), world)
    for rank, theirs in enumerate(everything):
        for number in range(max(len(theirs), len(everything[0]))):
            first, other = (tuple(text[number : number + 1]) or ("nothing",) for text in (everything[0], theirs))
            if first != other:
                raise RuntimeError(
                    f"ranks that share moments differ: rank 0 has {first[0]}; rank {rank} has {other[0]}; accepted: "
                    "the same model, param groups, settings and steps taken on all ranks"
                )


def _exchange(mine: Any, world: World) -> list[Any]:
    everybody: list[Any] = [None] * world.size
    if world.group is None:
        return [mine]
    dist.all_gather_object(everybody, mine, group=world.group)
    return everybody


def any_rank(flag: bool, device: torch.device, groups: Sequence[Any]) -> bool:
    """Whether a flag is set on any rank of these process groups; a collective of each, one after the other."""
    flags = torch.tensor([int(flag)], dtype=torch.int32, device=device)
    for group in groups:
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=group)
    return bool(flags.item())


def stop_together(refusal: Exception | None, device: torch.device, groups: Sequence[Any]) -> None:
    """Raise on a rank that has nothing to complain of, where another has; a collective of the groups.

    Raises:
        RuntimeError: only another rank refuses its part.
    """
    if any_rank(refusal is not None, device, groups) and refusal is None:
        raise RuntimeError(
            "another rank cannot step its part of the parameters, and says why; nothing has changed here"
        )


# ---------------------------------------------------------------- parameters


def compare_replicas(params: Iterable[tuple[str, Tensor]], world: World) -> None:
    """Compare the bits of all parameters among all ranks; a collective that sends 8 bytes a parameter tensor.

    Raises:
        RuntimeError: on every rank; names the parameters that differ, and where.
    """
    named = list(params)
    mine = [_hash(param) for _, param in named]
    hashes: list[list[int]] = _exchange(mine, world)
    if any(len(theirs) != len(mine) for theirs in hashes):
        counts = ", ".join(f"rank {rank} {len(theirs)}" for rank, theirs in enumerate(hashes))
        raise RuntimeError(f"replicas differ in how many parameters they have: {counts}")
    apart = [
        f"{label} (ranks {[rank for rank, theirs in enumerate(hashes) if theirs[index] != hashes[0][index]]})"
        for index, (label, _) in enumerate(named)
        if any(theirs[index] != hashes[0][index] for theirs in hashes)
    ]
    if apart:
        more = f" and {len(apart) - 5} more" if len(apart) > 5 else ""
        raise RuntimeError(
            f"replicas differ from rank 0's in {len(apart)} of {len(named)} parameters: {', '.join(apart[:5])}{more}; "
            "broadcast them from one rank, or load a checkpoint"
        )


def _hash(param: Tensor) -> int:
    """All elements' bits, each times an odd number of its place, summed modulo 2**64: one changed bit changes it."""
    numel = param.numel()
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[param.element_size()]
    places = torch.arange(min(TILE, numel), dtype=torch.int64, device=param.device)
    # 2**64 over the golden ratio, as a signed number, spreads the places; an odd factor loses no bit.
    factors = (places * -7046029254386353131 ^ (places << 17)) | 1
    total = 0
    for tile, start in enumerate(range(0, numel, TILE)):
        bits = read(param, start, min(start + TILE, numel)).view(width).to(torch.int64)
        sum_ = int((bits * factors[: bits.numel()]).sum())
        total = (total * 0x9E3779B97F4A7C15 + sum_ + tile) % 2**64
    return total


# ---------------------------------------------------------------- meeting


def meet(lines: Sequence[str], world: World, call: str, accepted: str) -> None:
    """Wait for all ranks to come to the same call; no collective is begun before they have.

    All meet or none does. Ranks count themselves in at the process group's store: every ``world.size`` of them are a
    meeting, and the last one opens its door. One that has waited ``MEETING_SECONDS`` counts itself out again.

    Args:
        lines: what is met for, such as the optimizer's description, which tells it from others.
        world: the ranks.
        call: names it in the error.
        accepted: what the error says is to be done.

    Raises:
        RuntimeError: not all of them came.
    """
    store = dist.distributed_c10d._get_default_store()
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    key = f"lowmem_adam/{world.group.group_name}/{world.size}/{digest}"
    arrived = store.add(f"{key}/arrived", 1)
    meeting, place = divmod(arrived - 1, world.size)
    door, full = f"{key}/open/{meeting}", (meeting + 1) * world.size
    if place == world.size - 1:
        store.set(door, "1")
        return
    if _opens(store, door, MEETING_SECONDS):
        return
    # The last one may have arrived just now, and others may have counted themselves out since.
    if store.add(f"{key}/arrived", -1) + 1 >= full or _opens(store, door, 1.0):
        store.add(f"{key}/arrived", 1)  # it was held after all
        return
    raise RuntimeError(
        f"{call} of a sharded optimizer waited {MEETING_SECONDS:g} s for the other ranks; accepted: {accepted}"
    )


def _opens(store: Any, key: str, seconds: float) -> bool:
    """Whether a key is set in time. Polled: each kind of store ends a wait of its own in another way."""
    deadline = time.monotonic() + seconds
    pause = 0.001
    while not store.check([key]):
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
    return True
