"""Real launchers in tests: two processes on the CPU, a bounded wait, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil  # accelerate brings it

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 200.0
"""Far above what a launch takes; it bounds a hang only."""


def cpu_environment() -> dict[str, str]:
    """What makes accelerate start CPU processes that join one another, with these sources first on their path."""
    # accelerate reads its settings from variables too: none of the surrounding run's may decide here.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return kept | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def accelerate_launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    """``accelerate launch`` with its output; the caller looks at the status.

    One that hangs is ended with all the processes it started: these are looked up by parentage, since torchrun gives
    each worker a session of its own, and one that lives on would hold the pipes open.

    Raises:
        AssertionError: it did not end in time; carries what it had written.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", *arguments]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=cpu_environment(),
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            launcher = psutil.Process(process.pid)
            for started in (launcher, *launcher.children(recursive=True)):
                started.kill()
            stdout, stderr = process.communicate()
            raise AssertionError(f"the launch did not end within {SECONDS:g} s:\n{stdout}\n{stderr}") from None
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)
