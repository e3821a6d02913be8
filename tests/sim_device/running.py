"""Cases on the simulated device, run in a process of their own: its name can be taken once an interpreter.

A module of cases is any module with functions named ``case_…``, which take nothing and assert. ``outcomes`` runs all
of them in one child, since each child takes three seconds to start, and a test then looks at one outcome each.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests import sim_device as sim
from tests.launching import ROOT

SECONDS = 240.0
"""Far above what the cases take; it bounds a hang only, before pytest's own bound."""

PREFIX = "case_"


def cases_of(module: ModuleType) -> dict[str, Callable[[], None]]:
    return {name.removeprefix(PREFIX): function for name, function in vars(module).items() if name.startswith(PREFIX)}


def full_name(module: ModuleType, name: str) -> str:
    return f"{module.__name__.rpartition('.')[2]}.{name}"


def outcomes(modules: Sequence[ModuleType], results: Path) -> dict[str, str]:
    """For each case of the modules, by full name, the traceback with which it failed, or the empty string.

    Raises:
        AssertionError: the child ended before all cases had run, or not at all; says in which case, and what it wrote.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    names = [module.__name__ for module in modules]
    command = [sys.executable, "-m", "tests.sim_device.running", str(results), *names]
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as child:
        try:
            output, _ = child.communicate(timeout=SECONDS)
            ended = f"with status {child.returncode}"
        except subprocess.TimeoutExpired:
            child.kill()
            output, _ = child.communicate()
            ended = "by the bound on its time"
    lines = results.read_text().splitlines() if results.exists() else []
    done: dict[str, str] = dict(map(json.loads, lines))
    names = [full_name(module, name) for module in modules for name in cases_of(module)]
    missing = [name for name in names if name not in done]
    assert not missing, f"the child ended {ended} before or in the case {missing[0]}:\n{output}"
    assert ended == "with status 0", f"the child ended {ended} after all cases:\n{output}"
    return done


def main(results: Path, module_names: Sequence[str]) -> None:
    # A case that hangs says where.
    faulthandler.enable()
    faulthandler.dump_traceback_later(SECONDS - 20)
    sim.load()
    torch.set_num_threads(1)
    default_stream = torch.accelerator.current_stream()
    modules = [importlib.import_module(name) for name in module_names]
    with results.open("w") as lines:
        for module in modules:
            for name, case in cases_of(module).items():
                sim.reset()
                torch.manual_seed(0)
                torch.accelerator.set_stream(default_stream)
                try:
                    case()
                    failure = ""
                except (Exception, pytest.fail.Exception):  # noqa: BLE001 - pytest's own is no Exception
                    failure = traceback.format_exc()
                lines.write(json.dumps([full_name(module, name), failure]) + "\n")
                lines.flush()
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
