"""Cases in Triton's interpreter: in a process of their own, as that is chosen before kernels are imported.

``tests/triton_cases.py`` and ``tests/triton_optimizer_cases.py`` have the cases; ``tests/test_gpu.py`` runs the same on
a CUDA device.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from tests.launching import ROOT

NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

SECONDS = 290
"""Far above what the cases take; it bounds a hang only, before pytest's own bound."""


def assert_all_pass(module: str) -> None:
    """Run a module of cases, none of which may be skipped."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    # Warnings are NumPy's, of overflows that are meant.
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-p", "no:warnings", f"tests/{module}.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.search(r"^\d+ passed in", done.stdout, re.MULTILINE), done.stdout[-500:]
