"""State for parameters that get their first gradient: all of it is made before any of it is put in.

So a step for which there is not enough memory changes nothing, and may be tried again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lowmem_adam.local import is_dtensor
from lowmem_adam.shard import Partition
from lowmem_adam.state import new_state, refitted, state_bytes
from lowmem_adam.updating import Task


def made(
    tasks: Sequence[Task], partition: Partition, home_of: Callable[[Tensor], torch.device]
) -> dict[Tensor, dict[str, Tensor]]:
    """What the state of these tasks' parameters is to be; nothing changes.

    Args:
        tasks: without state, or with state that keeps another rest of the weight than their group now asks for.
        partition: has cut their parameters.
        home_of: where a parameter's state lies.

    Raises:
        torch.OutOfMemoryError: says for which parameter, how many bytes, and what takes less.
    """
    out: dict[Tensor, dict[str, Tensor]] = {}
    for task in tasks:
        param, span, home = task.param, partition.span(task.param), home_of(task.param)
        try:
            if task.state is None:
                out[param] = new_state(param, task.moments, span, task.master, home)
            else:
                out[param] = refitted(task.state, param, task.moments, span, task.master, home)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            out.clear()  # the error's traceback would keep it
            here, in_all = _bytes(task, partition), sum(_bytes(each, partition) for each in tasks)
            raise torch.OutOfMemoryError(
                f"{task.label} of shape {tuple(param.shape)}: no memory on {home} for {here} bytes of optimizer state, "
                f"of {in_all} bytes to begin {len(tasks)} parameter(s), none of which has changed. Less is taken by "
                f"{_what_takes_less(task, partition, home)}. ({error})"
            ) from error
    return out


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory could not be had: on accelerators by the error's type, on the host by the allocator's name."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _bytes(task: Task, partition: Partition) -> int:
    return state_bytes(task.param, task.moments, partition.span(task.param), task.master, task.state or {})


def _what_takes_less(task: Task, partition: Partition, home: torch.device) -> str:
    shared = partition.world.size > 1 or is_dtensor(task.param)
    ways = {
        'moments="8bit"': task.moments == "32bit",
        'low_precision_update="stochastic"': task.master is not None,
        'offload="cpu"': home.type != "cpu",
        "more ranks that share it": shared,
        "shard_group, whose ranks share it": not shared,
    }
    return " or ".join(way for way, applies in ways.items() if applies)
