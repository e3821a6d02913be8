"""Two machines, as two launchers on this one: one of them is lost, and the other goes on alone."""

from __future__ import annotations

import json
import math
import re
import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate", reason="the training job runs under accelerate")
pytest.importorskip("transformers", reason="the training job takes its model from transformers")

import torch
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser
from typer.main import get_command

from tests.launching import forget_accelerate, free_port, kill_tree, torchrun, wait_until

from tests.lm_cases import (  # isort: skip  (puts launch/ on the path)
    LAUNCH,
    assert_same_tree,
    tiny_options,
    tiny_settings,
    without_times,
    write_text,
)

import reporting
import train_lm
from lm_checkpoint import CHECKPOINT_MARKER, complete_checkpoints
from lm_training import prepare_job, run_job

STEPS = 120
"""The run goes on long enough for a machine to be lost in it."""
CHANGES: dict[str, Any] = {"steps": STEPS, "batch_size": 2, "total_batch_size": 4, "eval_every": STEPS}


def launched(folder: Path, port: int, machine: int) -> list[str]:
    """What both machines are started with; only the first one has the rendezvous."""
    # A machine that is silent for five seconds is lost, and no other one is waited for than within three.
    rendezvous = f"is_host={1 - machine},keep_alive_interval=1,keep_alive_max_attempt=5,last_call_timeout=3"
    options = tiny_options(folder / "run", folder / "text", **{name: str(value) for name, value in CHANGES.items()})
    return [
        "--nnodes=1:2",
        "--nproc-per-node=1",
        "--max-restarts=3",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port}",
        "--rdzv-id=run",
        f"--rdzv-conf={rendezvous}",
        str(LAUNCH / "train_lm.py"),
        *options,
        "--shard",
        *("--checkpoint-dir", str(folder / "checkpoints"), "--checkpoint-every", "10", "--resume-latest"),
    ]


def processes_that_saved(checkpoint: Path) -> int:
    marker = json.loads((checkpoint / CHECKPOINT_MARKER).read_text(encoding="utf-8"))
    processes: int = marker["run"]["world_size"]
    return processes


@pytest.fixture(scope="module")
def after_the_loss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that two machines began and one ended; its log is log_0.txt."""
    folder = tmp_path_factory.mktemp("machines")
    write_text(folder / "text")
    checkpoints, port, logs = folder / "checkpoints", free_port(), [folder / f"log_{machine}.txt" for machine in (0, 1)]
    with ExitStack() as stack:
        stays, lost = (
            stack.enter_context(
                # A store for each round of the rendezvous: see launch/multi_node.md.
                torchrun(logs[machine], *launched(folder, port, machine), TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
            )
            for machine in (0, 1)
        )
        wait_until(lambda: bool(complete_checkpoints(checkpoints)), "no checkpoint", logs)
        kill_tree(lost)
        assert lost.wait() < 0
        wait_until(lambda: stays.poll() is not None, "the machine that is left has not finished", logs)
        assert stays.returncode == 0, logs[0].read_text()
    return folder


@pytest.mark.slow
def test_what_is_left_goes_on_from_the_last_checkpoint(after_the_loss: Path) -> None:
    log = (after_the_loss / "log_0.txt").read_text()
    assert re.findall(r"world size: \d", log) == ["world size: 2", "world size: 1"]
    assert f"no checkpoint in {after_the_loss / 'checkpoints'}, starting at step 0" in log
    saved_by = {
        int(folder.name.removeprefix("step-")): processes_that_saved(folder)
        for folder in complete_checkpoints(after_the_loss / "checkpoints")
    }
    assert list(saved_by) == list(range(10, STEPS + 1, 10))
    last = max(step for step, processes in saved_by.items() if processes == 2)
    assert last < STEPS
    assert all(processes == (2 if step <= last else 1) for step, processes in saved_by.items())
    resumed = rf"resumed from \S*step-{last:06d}, which 2 processes saved, with 1 at step {last}\n"
    assert len(re.findall(resumed, log)) == 1


@pytest.mark.slow
def test_run_that_lost_a_machine_has_all_of_its_steps_and_learns(after_the_loss: Path) -> None:
    records = reporting.read_metrics(after_the_loss / "run" / reporting.METRICS_FILE)
    steps, losses = reporting.series(records, "train", "loss")
    assert steps == list(range(1, STEPS + 1))
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0] - 1.0
    assert reporting.series(records, "train", "tokens")[1] == [4 * 32 * step for step in steps]
    summary = json.loads((after_the_loss / "run" / reporting.SUMMARY_FILE).read_text(encoding="utf-8"))
    assert summary["world_size"] == 1


@pytest.mark.slow
def test_state_that_two_saved_is_what_one_goes_on_with(
    after_the_loss: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    forget_accelerate()
    checkpoints = complete_checkpoints(after_the_loss / "checkpoints")
    last = [folder for folder in checkpoints if processes_that_saved(folder) == 2][-1]
    options = {**CHANGES, "checkpoint_dir": tmp_path, "resume": last, "optimizer": "adamw8bit", "shard": True}
    job = prepare_job(tiny_settings(tmp_path, after_the_loss / "text", **options))
    whole = torch.load(last / "optimizer.bin", weights_only=True)
    assert any("exp_avg_code" in state for state in whole["state"].values())
    assert_same_tree(whole, job.optimizer.state_dict())
    # One process gives the same bits again, so the one that was left had begun with the same.
    run_job(job)
    again, first = (tmp_path / checkpoints[-1].name, checkpoints[-1])
    assert (again / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    assert_same_tree(*(torch.load(folder / "optimizer.bin", weights_only=True) for folder in (first, again)))
    log = reporting.read_metrics(after_the_loss / "run" / reporting.METRICS_FILE)
    step = int(last.name.removeprefix("step-"))
    expected = [without_times(record) for record in log if record["step"] > step]
    assert [without_times(record) for record in reporting.read_metrics(tmp_path / reporting.METRICS_FILE)] == expected
    forget_accelerate()


def test_commands_of_the_page_are_ones_that_the_launchers_and_the_job_take() -> None:
    page = (LAUNCH / "multi_node.md").read_text(encoding="utf-8")
    blocks = [
        " ".join(block.replace("\\\n", " ").split()) for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    ]
    elastic = next(block for block in blocks if "torchrun --nnodes" in block)
    told = get_args_parser().parse_args(shlex.split(elastic[elastic.index("torchrun") :])[1:])
    assert (told.nnodes, told.rdzv_backend) == ("1:2", "c10d")
    fixed = next(block for block in blocks if "accelerate launch --config_file" in block)
    chosen = launch_command_parser().parse_args(shlex.split(fixed)[2:])
    assert told.training_script == chosen.training_script == "launch/train_lm.py"
    assert told.training_script_args == chosen.training_script_args
    accepted = {name for parameter in get_command(train_lm.app).params for name in parameter.opts}
    assert {word for word in told.training_script_args if word.startswith("--")} <= accepted
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in elastic
