"""How a run on several processes comes to its end."""

from __future__ import annotations

import time

from accelerate import Accelerator

SECONDS_FOR_LAST_WORKS = 0.2
"""What a thread needs that only waits for its turn is far below; once a run, nobody notices it."""


def leave(accelerator: Accelerator) -> None:
    """Leave the process group, as the last thing before the process ends."""
    settle(accelerator.num_processes)
    accelerator.end_training()


def settle(num_processes: int) -> None:
    """Wait for what the last collective has left to do, before the process group and the process end.

    A thread of gloo's may still hold the tensors of the last collective when that has returned, and needs the
    interpreter to let go of them. Should the interpreter have begun to end by then, the process aborts with "terminate
    called without an active exception" (pytorch issues 179291 and 190489; seen in 2 of 40 runs). Leaving the group
    joins these threads only where no DistributedDataParallel was made. So they are given their turn here.
    """
    if num_processes > 1:
        time.sleep(SECONDS_FOR_LAST_WORKS)
