"""launch/deepspeed_lm.py: DeepSpeed's own engine on real text, resumed by as many processes and by one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.deepspeed_jobs import convert
from tests.launching import NEEDS_DEEPSPEED, ROOT, deepspeed_environment, run_torchrun
from tests.ranks import NEEDS_GLOO

pytest.importorskip("accelerate")
pytest.importorskip("transformers", reason="the example's model is transformers'")

pytestmark = [NEEDS_GLOO, NEEDS_DEEPSPEED]

STEPS, SAVED = 6, 3
CONFIG = ROOT / "launch" / "configs" / "deepspeed_engine.json"
SMALL = ("--hidden-size", "128", "--layers", "2", "--seq-len", "64", "--data", os.path.dirname(json.__file__))


def launch(processes: int, folder: Path, output: str, *options: str) -> dict[str, Any]:
    script = [str(ROOT / "launch" / "deepspeed_lm.py"), "--config", str(CONFIG), "--steps", str(STEPS), *SMALL]
    arguments = [f"--nproc_per_node={processes}", *script, "--output", str(folder / output), *options]
    finished = run_torchrun(*arguments, environment=deepspeed_environment())
    assert finished.returncode == 0, finished.stdout + finished.stderr
    told: dict[str, Any] = json.loads((folder / output).read_text(encoding="utf-8"))
    return told


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deepspeed_lm")


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, Any]:
    """The run without interruption, which leaves checkpoints."""
    return launch(2, folder, "whole.json", "--checkpoint-dir", str(folder), "--checkpoint-every", str(SAVED))


def test_two_processes(whole: dict[str, Any]) -> None:
    losses = list(whole["losses"].values())
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
    assert (whole["world_size"], whole["zero_stage"], whole["optimizer"]) == (2, 2, "AdamW8bit")
    assert whole["bytes_per_parameter"] < 2.05


def test_resumed_by_as_many(whole: dict[str, Any], folder: Path) -> None:
    resumed = launch(2, folder, "resumed.json", "--resume", str(folder / f"global_step{SAVED}"))
    assert resumed["losses"] == {step: whole["losses"][step] for step in ("4", "5", "6")}
    assert resumed["lr"] == whole["lr"]


def test_resumed_by_one_from_a_universal_checkpoint(whole: dict[str, Any], folder: Path) -> None:
    """The same windows of text: losses differ by bf16's rounding of other sums, 2^-8 of a value at most, and codes."""
    tag = convert(folder, f"global_step{SAVED}")
    resumed = launch(1, folder, "alone.json", "--resume", str(folder / tag), "--universal")
    assert resumed["world_size"] == 1
    assert list(resumed["losses"]) == ["4", "5", "6"]
    for step, loss in resumed["losses"].items():
        assert loss == pytest.approx(whole["losses"][step], rel=2**-8)


def test_a_config_that_would_not_step_with_ours(folder: Path) -> None:
    config = json.loads(CONFIG.read_text(encoding="utf-8"))
    del config["zero_allow_untested_optimizer"]
    file = folder / "wrong.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    script = str(ROOT / "launch" / "deepspeed_lm.py")
    finished = run_torchrun("--nproc_per_node=1", script, "--config", str(file), environment=deepspeed_environment())
    assert finished.returncode != 0
    assert f"{file}: zero_allow_untested_optimizer is missing" in finished.stderr
    assert "exitcode  : 2" in finished.stderr


def test_the_readme_has_the_command() -> None:
    command = "torchrun --nproc_per_node 2 launch/deepspeed_lm.py --config launch/configs/deepspeed_engine.json"
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")
