"""accelerate: ``accelerator.prepare(optimizer)`` is all it takes; here is what a launch should be asked before.

``accelerate launch`` leaves a process one thread unless told otherwise, and some of its calls silently start less than
they say: fewer processes, processes that do not know of one another, plain data parallelism in the place of FSDP.

    accelerator = Accelerator(...)
    check_launch(accelerator)
    set_threads()
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lowmem_adam.cores import local_processes, share_of_cores, usable_cores

FLAG = "num_cpu_threads_per_process"
"""Of ``accelerate launch``; ``--num-cpu-threads-per-process`` is the same to it."""


def set_threads(threads: int | None = None) -> int:
    """Give torch, and with it a step on the CPU, the threads that this process should have.

    Call it after ``Accelerator()``, which may set a number itself. Without one it keeps what the launcher was told:
    ``OMP_NUM_THREADS`` in the environment of ``accelerate launch`` or ``torchrun``, or
    ``--num_cpu_threads_per_process``, which DeepSpeed's launcher passes over. Told nothing, launchers give each process
    one thread, or all cores of a machine of which this container may use a few; then the cores that may be used are
    divided among the processes of this machine.

    Whether a launcher was told is read from the environment and the arguments it was started with. Where these cannot
    be read, 1 in ``OMP_NUM_THREADS`` is taken for the launcher's own and any other number for what it was told.

    Args:
        threads: how many, whatever was said elsewhere.

    Returns:
        How many there are now.

    Raises:
        ValueError: no whole number from 1.
    """
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise ValueError(f"threads is {threads!r}; accepted: whole numbers from 1, or None")
    torch.set_num_threads(threads or _told() or _share())
    return torch.get_num_threads()


def check_launch(accelerator: Any, processes: int | None = None) -> None:
    """See that the launcher has started what it was asked for.

    Args:
        accelerator: the ``Accelerator``.
        processes: how many there should be; None for as many as there are.

    Raises:
        RuntimeError: there are more or fewer processes; they do not know of one another, or would train a model each;
            DeepSpeed or FSDP was asked for and is not used. The message says how to start it.
    """
    found, kind = accelerator.num_processes, accelerator.distributed_type.value
    if processes is not None and processes != found:
        raise RuntimeError(f"the launch has {found} processes; accepted here: {processes}. {_HOW}")
    started = int(os.environ.get("WORLD_SIZE") or found)
    if started != found:
        raise RuntimeError(
            f"the launcher has started {started} processes, of which accelerate has joined {found}: each would train a "
            f"model of its own. {_HOW}"
        )
    for name, variable in {"DEEPSPEED": "ACCELERATE_USE_DEEPSPEED", "FSDP": "ACCELERATE_USE_FSDP"}.items():
        if os.environ.get(variable, "false").lower() == "true" and kind != name:
            raise RuntimeError(
                f"the launch asks for {name} and accelerate runs {kind} in its place; accepted: "
                + (
                    "one process or more on accelerators: accelerate has no FSDP on the CPU"
                    if name == "FSDP"
                    else "no ACCELERATE_USE_CPU in the environment and no cpu=True"
                )
            )
    if found > 1 and kind == "NO":
        raise RuntimeError(
            f"{found} processes have joined, and accelerate takes each for one alone, so that gradients would not be "
            f"reduced and each would train a model of its own. {_HOW}"
        )
    if found == 1 and _asked_for_several():
        raise RuntimeError(f"accelerate launch was asked for several processes and has started a single one. {_HOW}")


_HOW = (
    "Several processes on a CPU take a configuration with distributed_type: MULTI_GPU and use_cpu: true together with "
    "ACCELERATE_USE_CPU=true in the environment; --cpu --num_processes N starts one, and --multi_gpu without the "
    "variable starts such as do not know of one another"
)


def _share() -> int:
    """This process's part of the cores. Where accelerate has bound it to some of the machine's, at most these."""
    if os.environ.get("ACCELERATE_CPU_AFFINITY", "0") in ("0", "false", "False"):
        return share_of_cores()
    launchers = _launchers()
    cores = len(launchers[-1].cpu_affinity()) if launchers else os.cpu_count() or 1
    return min(usable_cores(), max(1, cores // local_processes()))


def _told() -> int | None:
    """The number of threads that the launcher, or this process where it has none, was told; None for no word."""
    launchers = _launchers()
    for launcher in launchers:
        told = _flag(launcher.cmdline())
        if told is not None:
            return told
    if launchers:
        return _number(launchers[-1].environ())
    told = _number(os.environ)
    return None if told == 1 and _launched(os.environ) else told


def _asked_for_several() -> bool:
    """Whether a launcher that starts one process was asked for more: it names a meeting point that it was not given."""
    if "MASTER_PORT" not in os.environ or "WORLD_SIZE" in os.environ:
        return False
    launchers = _launchers()
    return bool(launchers) and "MASTER_PORT" not in launchers[-1].environ()


def _launchers() -> list[Any]:
    """The processes that have launched this one, the nearest first: one, or a launcher and the launcher of that.

    Empty where there is none, or where the system does not let them be looked at.
    """
    try:
        import psutil  # which accelerate needs
    except ImportError:
        return []
    found: list[Any] = []
    process: Any = psutil.Process()
    try:
        while _launched(process.environ()):
            process = process.parent()
            if process is None:
                return []
            process.cmdline()
            found.append(process)
    except psutil.Error:
        return []
    return found


def _launched(environment: Mapping[str, str]) -> bool:
    return "ACCELERATE_MIXED_PRECISION" in environment or "TORCHELASTIC_RUN_ID" in environment


def _flag(command: Sequence[str]) -> int | None:
    for word, following in zip(command, [*command[1:], ""], strict=True):
        if word == sys.argv[0]:  # the script: what follows is its own
            break
        name, _, value = word.lstrip("-").replace("-", "_").partition("=")
        if word.startswith("--") and name == FLAG and (value or following).isdigit():
            return int(value or following)
    return None


def _number(environment: Mapping[str, str]) -> int | None:
    value = environment.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(value) if value.isdigit() and int(value) > 0 else None
