"""The command ``lowmem-adam profile``: what it reports and writes, and what it does not accept."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem_adam.phases import PHASES
from lowmem_adam.profiling import StepRecord
from lowmem_adam.state import MASTER_KEYS
from tests.profile_checks import check_sums, check_trace

Invoke = Callable[..., Any]


@pytest.fixture
def invoke() -> Invoke:
    testing = pytest.importorskip("typer.testing")
    pytest.importorskip("rich")
    app = importlib.import_module("lowmem_adam.cli").app
    return lambda *arguments: testing.CliRunner().invoke(app, ["profile", *arguments], env={"COLUMNS": "200"})


SMALL = ("--hidden-size", "32", "--layers", "1", "--vocab-size", "64", "--seq-len", "8", "--batch-size", "2")


def test_command_with_a_model(invoke: Invoke, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    folder = tmp_path / "new" / "folder"
    arguments = ("--steps", "5", "--compare", "--offload", "cpu", "--output-dir", str(folder), "--json")
    finished = invoke(*SMALL, *arguments)
    assert finished.exit_code == 0, finished.output
    told = json.loads(finished.stdout)
    written = json.loads((folder / "profile.json").read_text(encoding="utf-8"))
    assert {name: written[name] for name in told if name != "summary"} == {
        n: v for n, v in told.items() if n != "summary"
    }
    records = [StepRecord(**record) for record in written["records"]]
    check_sums(records)
    assert len(records) == told["summary"]["steps"] == told["compared"]["steps"] == 5
    check_trace(json.loads((folder / "trace.json").read_text(encoding="utf-8")), records)
    assert (folder / "profile.png").read_bytes().startswith(b"\x89PNG")
    summary, compared = told["summary"], told["compared"]
    # Embedding and head, four projections, three of the feed-forward part, three norms.
    assert summary["parameters"] == 2 * 64 * 32 + 4 * 32**2 + 3 * 32 * 128 + 3 * 32
    assert told["tensors"] == 12
    assert told["settings"]["offload"] == "cpu"
    assert 0 < summary["share_of_training"] < 1
    # Two fp32 moments, and an fp32 counter for each tensor.
    assert compared["total_bytes"] == 8 * summary["parameters"] + 4 * 12
    assert compared["bytes_ratio"] == summary["total_bytes"] / compared["total_bytes"]
    assert compared["time_ratio"] == summary["total_s"]["median"] / compared["step_s"]["median"]


def test_command_with_shapes(invoke: Invoke) -> None:
    arguments = ("--shapes", "64x128, 100,2x3x5", "--steps", "3", "--dtype", "bfloat16", "--threads", "1")
    finished = invoke(*arguments, "--low-precision-update", "fp32", "--json")
    told = json.loads(finished.stdout)
    assert told["summary"]["parameters"] == 64 * 128 + 100 + 30
    assert told["summary"]["bytes"][MASTER_KEYS[torch.float32]] == 4 * (64 * 128 + 100 + 30)
    assert told["summary"]["share_of_training"] is None
    assert told["dtypes"] == ["bfloat16"]
    assert told["threads"] == 1
    assert "compared" not in told
    table = invoke(*arguments, "--compare").stdout
    for words in (*PHASES, "whole step", "exp_avg_code", "torch.optim.AdamW(fused=True)", "8,322 parameters"):
        assert words in table
    assert "share of training" not in table


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--shapes", "4x0"), "shapes is '4x0', with '4x0' in it; accepted: shapes with commas"),
        (("--shapes", "4,,5"), "shapes is '4,,5', with '' in it; accepted"),
        (("--shapes", "4", "--dtype", "int8"), "dtype is 'int8'; accepted: float32, bfloat16, float16"),
        (("--shapes", "4", "--moments", "7bit"), "moments is '7bit'; accepted: '8bit', '32bit', 'bnb8bit'"),
        (("--shapes", "4", "--offload", "disk"), "offload is 'disk'; accepted: None, 'cpu'"),
        (("--shapes", "4", "--low-precision-update", "up"), "low_precision_update is 'up'; accepted"),
        (("--shapes", "4", "--master-bits", "20"), "master_bits is 20; accepted"),
        (("--shapes", "4", "--device", "nothing"), "device is 'nothing'; accepted here: cpu"),
        (("--shapes", "4", "--backend", "quick"), "backend is 'quick'; accepted"),
        (
            ("--hidden-size", "30", "--heads", "4"),
            "hidden-size is 30 with 4 heads; accepted with as many: multiples of 8",
        ),
        (("--steps", "1"), "steps is 1; accepted: whole numbers from 2"),
        (("--layers", "-3"), "layers is -3; accepted: whole numbers from 1"),
        (("--threads", "0"), "threads is 0; accepted: whole numbers from 1"),
        (("--steps", "many"), "--steps"),
    ],
)
def test_command_names_what_it_does_not_accept(invoke: Invoke, arguments: tuple[str, ...], words: str) -> None:
    finished = invoke(*arguments)
    assert finished.exit_code == 2
    assert words in finished.stderr
    assert finished.stdout == ""


def test_command_with_a_folder_that_cannot_be_made(invoke: Invoke, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("")
    finished = invoke("--shapes", "4", "--output-dir", str(tmp_path / "file"))
    assert finished.exit_code == 2
    assert str(tmp_path / "file") in finished.stderr
