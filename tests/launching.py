"""Real launchers in tests: processes on the CPU, a bounded wait, and nothing left behind."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

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
            kill_tree(process)
            stdout, stderr = process.communicate()
            raise AssertionError(f"the launch did not end within {SECONDS:g} s:\n{stdout}\n{stderr}") from None
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


@contextmanager
def torchrun(log: Path, *arguments: str, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """``torchrun`` at work, writing to a file; what is left of it at the end is killed.

    Args:
        log: gets all output.
        arguments: of torchrun, script and its options included.
        variables: of its environment, beside what all launches have.
    """
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    environment = cpu_environment() | variables
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file, env=environment) as process:
        try:
            yield process
        finally:
            kill_tree(process)


def kill_tree(process: subprocess.Popen[Any]) -> None:
    """End a process and all that it started, as a machine that is lost ends them."""
    try:
        launcher = psutil.Process(process.pid)
        started = [launcher, *launcher.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for one in started:
        with suppress(psutil.NoSuchProcess):
            one.kill()


def wait_until(condition: Callable[[], bool], what: str, logs: Sequence[Path] = ()) -> None:
    """Look again and again until something has come about.

    Raises:
        AssertionError: it has not in time; carries ``what`` and the logs.
    """
    deadline = time.monotonic() + SECONDS
    while not condition():
        written = "\n".join(log.read_text(errors="replace") for log in logs if time.monotonic() > deadline)
        assert time.monotonic() < deadline, f"{what}: not within {SECONDS:g} s\n{written}"
        time.sleep(0.02)


def free_port() -> int:
    """Below those that a system hands out itself, or a connection of another test may get it before the launchers."""
    for port in random.sample(range(20000, 32768), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")
