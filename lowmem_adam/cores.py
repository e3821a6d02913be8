"""How many processor cores a process may use: what the system allows it, shared with its machine's other processes."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Cores that this process may use, at least 1: by its affinity, and by the time that its cgroups give it.

    A container with half of a machine's cores often sees all of them, and has a quota of time instead. A quota of two
    and a half cores counts as two.

    Source: Linux, Documentation/admin-guide/cgroup-v2.rst (cpu.max), scheduler/sched-bwc.rst (cpu.cfs_quota_us).
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(math.floor(quota) for quota in quotas(CGROUPS, OWN_CGROUPS))]))


LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
"""In which launchers tell how many processes they have started on a machine: torchrun and accelerate, DeepSpeed's own,
Open MPI, Intel's MPI."""


def local_processes() -> int:
    """How many processes the launcher has started on this machine, this one included; 1 without a launcher."""
    told = (os.environ.get(name, "") for name in LOCAL_SIZES)
    return max(1, next((int(number) for number in told if number.isdigit()), 1))


def share_of_cores() -> int:
    """The cores that this process may use, divided among the launcher's processes on this machine; at least 1."""
    return max(1, usable_cores() // local_processes())


def quotas(cgroups: Path, own: Path) -> Iterator[float]:
    """Cores' worth of time that a process and its cgroup's parents may use, one for each quota that there is.

    Args:
        cgroups: where the system shows cgroups.
        own: the file that names the process's own, a line ``number:controllers:path`` for each hierarchy.
    """
    for line in own.read_text().splitlines() if own.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = cgroups / controllers if controllers else cgroups
        folder = root / path.lstrip("/")
        for level in (folder, *folder.parents):
            quota = _quota_of(level)
            if quota is not None:
                yield quota
            if level == root:
                break


def _quota_of(cgroup: Path) -> float | None:
    """Of one cgroup; None where it has none, or where a container does not see it."""
    try:
        if (cgroup / "cpu.max").is_file():
            quota, period = (cgroup / "cpu.max").read_text().split()
        else:
            quota, period = ((cgroup / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    except OSError:
        return None
    return None if quota in ("max", "-1") else int(quota) / int(period)
