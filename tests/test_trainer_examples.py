"""launch/trainer_lm.py and launch/sft_lm.py: started as the README says, on real text, and gone on with."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate", reason="the examples are started by accelerate")
pytest.importorskip("transformers", reason="the Trainer is transformers'")

from typer.testing import CliRunner

from tests.launching import SECONDS, accelerate_launch, cpu_environment, forget_accelerate
from tests.ranks import NEEDS_GLOO

from tests.lm_cases import LAUNCH  # isort: skip  (puts launch/ on the path)

import trainer_lm

TEXT = Path(sysconfig.get_path("stdlib")) / "http"
SAVED, END = 2, 4
TINY = {
    "data": TEXT,
    "steps": END,
    "save-every": SAVED,
    "warmup-steps": 1,
    "lr": 1e-2,
    "seq-len": 256,
    "hidden-size": 64,
    "layers": 1,
    "batch-size": 2,
    "log-every": 1,
}


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each run on the CPU, with accelerate's process-wide state as in a process of its own."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    forget_accelerate()


def options(**changes: object) -> list[str]:
    chosen = TINY | {name.replace("_", "-"): value for name, value in changes.items()}
    return [part for name, value in chosen.items() for part in (f"--{name}", str(value))]


def losses(output_dir: Path) -> dict[int, Any]:
    """What was logged at each step of training, and the validation loss."""
    history = json.loads((output_dir / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    logged = {entry["step"]: (entry["loss"], entry["grad_norm"]) for entry in history if "loss" in entry}
    return logged | {-1: next(entry["eval_loss"] for entry in history if "eval_loss" in entry)}


@NEEDS_GLOO
@pytest.mark.slow
@pytest.mark.parametrize("name", ["trainer_lm", "sft_lm"])
def test_an_example_runs_on_two_processes_and_goes_on_on_one(name: str, tmp_path: Path) -> None:
    """One process takes two batches where two took one each: the same sums of two gradients, so the same bits."""
    if name == "sft_lm":
        pytest.importorskip("trl", reason="the SFTTrainer is TRL's")
    script, straight, resumed = str(LAUNCH / f"{name}.py"), tmp_path / "straight", tmp_path / "resumed"
    config = ["--config_file", str(LAUNCH / "configs" / "cpu_2.yaml")]
    two = accelerate_launch(*config, script, *options(output_dir=straight, expect_world_size=2))
    assert two.returncode == 0, two.stderr
    report = re.search(
        rf"{END} steps of AdamW8bit on 2 process\(es\): .* (\d\.\d\d) bytes of optimizer state", two.stdout
    )
    assert report, two.stdout
    # Half of what one process keeps; a tiny model's norms and short rows take more than 2.02.
    assert float(report[1]) < 1.1
    checkpoint = straight / f"checkpoint-{SAVED}"
    one = subprocess.run(
        [sys.executable, script, *options(output_dir=resumed, resume=checkpoint, gradient_accumulation_steps=2)],
        env=cpu_environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert one.returncode == 0, one.stderr
    assert f"{END} steps of AdamW8bit on 1 process(es)" in one.stdout
    # The checkpoint brings what was logged before it, so that all is compared; each step is logged for itself.
    assert losses(resumed) == losses(straight)
    assert losses(straight).keys() == {-1, *range(1, END + 1)}


@pytest.mark.parametrize("name", ["trainer_lm", "sft_lm"])
def test_the_readme_and_the_page_have_the_command(name: str) -> None:
    command = f"accelerate launch --config_file launch/configs/cpu_2.yaml launch/{name}.py"
    for page in ("README.md", "docs/trainer.md"):
        assert f"ACCELERATE_USE_CPU=true {command}" in (LAUNCH.parent / page).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schedule": "steps"}, "schedule must be one of cosine, linear, constant, got 'steps'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seq_len": 1}, "seq_len must be at least 2, got 1"),
        ({"hidden_size": 100}, "hidden_size must be a multiple of 64, got 100"),
        ({"resume": "nowhere"}, "--resume nowhere is no checkpoint of a Trainer"),
        ({"expect_world_size": 3}, "world size is 1, but --expect-world-size says 3"),
    ],
)
def test_options_that_do_not_fit_end_it_with_a_message(changes: dict[str, object], said: str) -> None:
    ended = CliRunner().invoke(trainer_lm.app, options(**changes))
    assert ended.exit_code == 2
    assert said in ended.stderr


@pytest.mark.parametrize("name", ["trainer_lm", "sft_lm"])
def test_help_does_not_wait_for_transformers(name: str) -> None:
    code = f"import sys; sys.path.insert(0, {str(LAUNCH)!r}); import {name}; print('transformers' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
