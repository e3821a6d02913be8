"""The command line: what ``lowmem-adam info`` says with the native library and without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem_adam import __version__
from lowmem_adam.kernels import cpu

pytest.importorskip("typer")
pytest.importorskip("rich")


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The program as a user starts it, in a process of its own."""
    program = "import sys; from lowmem_adam.cli import app; sys.argv[0] = 'lowmem-adam'; app()"
    command = [sys.executable, "-c", program, *arguments]
    env = {**os.environ, "COLUMNS": "200", **variables}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def facts(**variables: str) -> dict[str, Any]:
    finished = run("info", "--json", **variables)
    assert finished.returncode == 0, finished.stderr
    told: dict[str, Any] = json.loads(finished.stdout)
    return told


def test_info_names_versions_and_threads() -> None:
    told = facts(OMP_NUM_THREADS="1")
    assert told["lowmem_adam"] == __version__
    assert told["torch"] == torch.__version__
    assert told["threads"] == 1
    assert told["OMP_NUM_THREADS"] == "1"
    table = run("info").stdout
    for name in told:
        assert name in table


def test_info_says_what_a_step_runs_on() -> None:
    try:
        library = cpu.load()
    except cpu.LibraryError as error:
        pytest.skip(str(error))
    told = facts(LOWMEM_ADAM_ISA="")
    assert told["backend"] == "cpu"
    assert told["library"] == str(library.path)
    assert told["isa"] in told["instruction sets"]
    assert facts(LOWMEM_ADAM_ISA="scalar")["isa"] == "scalar"


def test_info_without_the_library_says_why() -> None:
    told = facts(LOWMEM_ADAM_LIBRARY="none")
    assert told["backend"] == "reference"
    assert "LOWMEM_ADAM_LIBRARY=none" in told["reason"]
    assert "isa" not in told
    told = facts(LOWMEM_ADAM_LIBRARY="/nowhere/library.so")
    assert "/nowhere/library.so" in told["reason"]


def test_check_config(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    config = {"optimizer": {"type": "AdamW8bit", "params": {"lr": 1e-3}}, "zero_optimization": {"stage": 1}}
    file.write_text(json.dumps(config), encoding="utf-8")
    finished = run("check-config", str(file))
    assert finished.returncode == 1
    assert finished.stdout.startswith(f"{file}: zero_allow_untested_optimizer is missing: ")
    assert "Traceback" not in finished.stderr
    assert finished.stdout.count("\n") == 1
    both = run("check-config", str(file), "--client-optimizer")
    assert both.stdout.count("\n") == 2
    file.write_text(json.dumps({**config, "zero_allow_untested_optimizer": True}), encoding="utf-8")
    assert run("check-config", str(file)).returncode == 0
    for broken, words in ((tmp_path / "none.json", "No such file"), (tmp_path, "directory")):
        finished = run("check-config", str(broken))
        assert finished.returncode == 2
        assert words in finished.stderr
        assert "Traceback" not in finished.stderr


def test_help_and_wrong_options() -> None:
    assert "info" in run("--help").stdout
    assert run("info", "--xml").returncode == 2
    assert run("nonsense").returncode == 2
    assert run().returncode != 0
