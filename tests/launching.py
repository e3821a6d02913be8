"""Real launchers in tests: processes on the CPU, a bounded wait, and nothing left behind."""

from __future__ import annotations

import importlib.util
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil  # accelerate brings it
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 200.0
"""Far above what a launch takes; it bounds a hang only."""


def cpu_environment() -> dict[str, str]:
    """What makes accelerate start CPU processes that join one another, with these sources first on their path."""
    # accelerate reads its settings from variables too: none of the surrounding run's may decide here.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return kept | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def forget_accelerate() -> None:
    """Accelerate's process-wide state as in a process of its own."""
    from accelerate.state import AcceleratorState, GradientState  # others of these are used without it

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def extensions_folder() -> Path:
    """Where DeepSpeed builds its helper for processes on a CPU, once for all tests and runs: that takes 30 s."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    name = f"torch_extensions-torch{torch.__version__}-py{sys.version_info[0]}{sys.version_info[1]}"
    return Path(root) if root else ROOT / ".cache" / name


def deepspeed_environment() -> dict[str, str]:
    """As ``cpu_environment``, for DeepSpeed, which accelerate leaves out where ACCELERATE_USE_CPU is set."""
    environment = cpu_environment() | {
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "TORCH_EXTENSIONS_DIR": str(extensions_folder()),
        "PATH": path_with_scripts(),
    }
    del environment["ACCELERATE_USE_CPU"]
    return environment


def path_with_scripts() -> str:
    """The PATH, and what was installed beside this Python, as ninja may be."""
    return os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))


def why_no_deepspeed() -> str | None:
    """Why DeepSpeed cannot be started on a CPU here; None where nothing speaks against it."""
    for package in ("deepspeed", "transformers"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    for tool in (os.environ.get("CXX", "c++"), "ninja"):
        if shutil.which(tool, path=path_with_scripts()) is None:
            return f"DeepSpeed builds a helper for processes on a CPU, and there is no {tool} on the PATH"
    return None


NEEDS_DEEPSPEED = pytest.mark.skipif(why_no_deepspeed() is not None, reason=why_no_deepspeed() or "")


def free_port() -> int:
    """Below those that a system hands out itself, or a connection of another test may get it before the launchers."""
    for port in random.sample(range(20000, 32768), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def accelerate_launch(
    *arguments: str, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """``accelerate launch`` to its end; in the environment of ``cpu_environment`` where none is given."""
    return to_its_end([sys.executable, "-m", "accelerate.commands.launch", *arguments], environment)


def run_torchrun(*arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """``torchrun`` to its end; in the environment of ``cpu_environment`` where none is given."""
    return to_its_end([sys.executable, "-m", "torch.distributed.run", *arguments], environment)


def to_its_end(command: Sequence[str], environment: Mapping[str, str] | None) -> subprocess.CompletedProcess[str]:
    """A launcher with its output; the caller looks at the status.

    One that hangs is ended with all the processes it started: these are looked up by parentage, since torchrun gives
    each worker a session of its own, and one that lives on would hold the pipes open.

    Raises:
        AssertionError: it did not end in time; carries what it had written.
    """
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=cpu_environment() if environment is None else dict(environment),
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
