"""The language-model job of launch/: its runs, its checkpoints, its processes, its report."""

from __future__ import annotations

import json
import re
import shutil
import traceback
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate", reason="the training job runs under accelerate")
pytest.importorskip("transformers", reason="the training job takes its model from transformers")

import torch
from PIL import Image
from typer.testing import CliRunner

from lowmem_adam import kernels
from tests.launching import accelerate_launch, forget_accelerate

from tests.lm_cases import (  # isort: skip  (puts launch/ on the path)
    LAUNCH,
    OURS_AND_TORCH,
    assert_same_checkpoint,
    tiny_options,
    tiny_settings,
    without_times,
    write_text,
)

import compare_runs
import lm_training
import reporting
import train_lm
from accelerate import Accelerator
from lm_job import start_accelerator
from lm_training import run_training


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each run on the CPU, with accelerate's process-wide state as in a process of its own."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    forget_accelerate()
    yield
    forget_accelerate()


# Runs


@pytest.fixture(scope="module")
def finished_runs(tmp_path_factory: pytest.TempPathFactory, text: Path) -> dict[str, Path]:
    """One run for each optimizer, with a checkpoint in the middle and one at the end."""
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        for name in OURS_AND_TORCH:
            forget_accelerate()
            folder = tmp_path_factory.mktemp(name)
            checkpoints = folder / "checkpoints"
            run_training(tiny_settings(folder, text, optimizer=name, checkpoint_dir=checkpoints, checkpoint_every=4))
            folders[name] = folder
    return folders


@pytest.mark.parametrize("name", OURS_AND_TORCH)
def test_run_learns_and_leaves_its_figures(name: str, finished_runs: dict[str, Path]) -> None:
    folder = finished_runs[name]
    records = reporting.read_metrics(folder / reporting.METRICS_FILE)
    steps, losses = reporting.series(records, "train", "loss")
    assert steps == list(range(1, 9))
    assert losses[-1] < losses[0] - 0.3
    assert reporting.series(records, "train", "tokens")[1] == [128 * step for step in steps]
    assert reporting.series(records, "train", "lr")[1][:3] == pytest.approx([0.005, 0.01, 0.01])
    assert reporting.series(records, "validation", "val_loss")[0] == [4, 8]
    summary = json.loads((folder / reporting.SUMMARY_FILE).read_text(encoding="utf-8"))
    assert summary["world_size"] == 1
    assert summary["final_val_loss"] == records[-1]["val_loss"]
    assert summary["optimizer_step_ms_median"] > 0
    with Image.open(folder / reporting.PICTURE_FILE) as picture:
        assert picture.width > 800


def test_state_bytes_of_the_runs(finished_runs: dict[str, Path]) -> None:
    summaries = {
        name: json.loads((folder / reporting.SUMMARY_FILE).read_text(encoding="utf-8"))
        for name, folder in finished_runs.items()
    }
    assert summaries["torch"]["state_bytes_per_parameter"] == pytest.approx(8.0, abs=0.01)
    ours = summaries["adamw8bit"]
    # The norms' moments stay in 32 bits, which weighs more in so small a model.
    assert ours["state_bytes_per_parameter"] < 2.2
    assert ours["optimizer_state_bytes"][0] == pytest.approx(ours["memory_report"]["total_bytes"], rel=0.02)


def test_same_data_and_weights_for_every_optimizer(finished_runs: dict[str, Path]) -> None:
    first_losses = [
        reporting.read_metrics(folder / reporting.METRICS_FILE)[0]["loss"] for folder in finished_runs.values()
    ]
    assert first_losses[0] == first_losses[1]


@pytest.mark.parametrize("name", OURS_AND_TORCH)
def test_resumed_run_is_the_same_run_bit_for_bit(
    name: str, finished_runs: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    whole = finished_runs[name]
    middle = whole / "checkpoints" / "step-000004"
    resumed = tmp_path / "resumed"
    run_training(tiny_settings(resumed, text, optimizer=name, checkpoint_dir=resumed / "checkpoints", resume=middle))
    expected = [
        without_times(record) for record in reporting.read_metrics(whole / reporting.METRICS_FILE) if record["step"] > 4
    ]
    got = [without_times(record) for record in reporting.read_metrics(resumed / reporting.METRICS_FILE)]
    assert got == expected
    assert_same_checkpoint(whole, resumed)


def test_resume_goes_on_in_the_same_log(text: Path, tmp_path: Path) -> None:
    settings = tiny_settings(
        tmp_path, text, optimizer="torch", steps=6, checkpoint_dir=tmp_path / "saved", checkpoint_every=3
    )
    run_training(settings)
    before = [without_times(record) for record in reporting.read_metrics(tmp_path / reporting.METRICS_FILE)]
    (tmp_path / "saved" / "step-000006" / "training.json").unlink()  # as if interrupted while writing it
    forget_accelerate()
    run_training(replace(settings, resume=tmp_path / "saved"))
    after = [without_times(record) for record in reporting.read_metrics(tmp_path / reporting.METRICS_FILE)]
    assert after == before


def test_checkpoint_of_another_run_is_refused(finished_runs: dict[str, Path], text: Path, tmp_path: Path) -> None:
    saved = finished_runs["torch"] / "checkpoints"
    with pytest.raises(ValueError, match=r"another run \(batch_size: 4 there, 2 here\)"):
        run_training(tiny_settings(tmp_path, text, optimizer="torch", batch_size=2, resume=saved))
    forget_accelerate()
    with pytest.raises(ValueError, match="neither a complete checkpoint"):
        run_training(tiny_settings(tmp_path, text, optimizer="torch", resume=tmp_path))


@pytest.mark.parametrize("name", ["optimizer.bin", "model.safetensors"])
def test_damaged_checkpoint_is_named(name: str, finished_runs: dict[str, Path], text: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "step-000004"
    shutil.copytree(finished_runs["adamw8bit"] / "checkpoints" / damaged.name, damaged)
    content = (damaged / name).read_bytes()
    (damaged / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"checkpoint {re.escape(str(damaged))} cannot be read"):
        run_training(tiny_settings(tmp_path / "run", text, optimizer="adamw8bit", resume=damaged))


def test_accumulated_batches_are_one_large_batch(text: Path, tmp_path: Path) -> None:
    split = tiny_settings(
        tmp_path / "split", text, optimizer="torch", steps=4, batch_size=2, gradient_accumulation_steps=2
    )
    run_training(split)
    forget_accelerate()
    run_training(tiny_settings(tmp_path / "whole", text, optimizer="torch", steps=4))
    losses, norms, rates = (
        [
            reporting.series(reporting.read_metrics(tmp_path / run / reporting.METRICS_FILE), "train", name)[1]
            for run in ("split", "whole")
        ]
        for name in ("loss", "grad_norm", "lr")
    )
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert norms[0] == pytest.approx(norms[1], rel=2e-2)
    assert rates[0] == rates[1]


def test_total_batch_is_shared_out_by_accumulation(text: Path, tmp_path: Path) -> None:
    run_training(tiny_settings(tmp_path / "total", text, steps=2, batch_size=2, total_batch_size=6))
    forget_accelerate()
    run_training(tiny_settings(tmp_path / "told", text, steps=2, batch_size=2, gradient_accumulation_steps=3))
    total, told = (
        [without_times(record) for record in reporting.read_metrics(tmp_path / run / reporting.METRICS_FILE)]
        for run in ("total", "told")
    )
    assert total == told
    settings = tiny_settings(tmp_path, text, batch_size=2, total_batch_size=12)
    assert [settings.on(world).gradient_accumulation_steps for world in (1, 2, 3, 6)] == [6, 3, 2, 1]
    with pytest.raises(ValueError, match=r"accepted with a batch_size of 2 and 4 processes: multiples of 8"):
        settings.on(4)
    with pytest.raises(ValueError, match="do not go together"):
        replace(settings, gradient_accumulation_steps=2).on(1)
    with pytest.raises(ValueError, match="total_batch_size must be a finite number of at least 1, got 0"):
        replace(settings, total_batch_size=0)


def test_another_total_batch_is_another_run(finished_runs: dict[str, Path], text: Path, tmp_path: Path) -> None:
    saved = finished_runs["torch"] / "checkpoints" / "step-000004"
    with pytest.raises(ValueError, match=r"another run \(total_batch_size: 4 there, 8 here\)$"):
        run_training(tiny_settings(tmp_path, text, optimizer="torch", total_batch_size=8, resume=saved))
    forget_accelerate()
    summary = run_training(
        tiny_settings(tmp_path, text, optimizer="torch", batch_size=2, total_batch_size=4, resume=saved)
    )
    whole = json.loads((finished_runs["torch"] / reporting.SUMMARY_FILE).read_text(encoding="utf-8"))
    # The same windows, but sums over them in another order; a run with other windows ends far off.
    assert summary["final_val_loss"] == pytest.approx(whole["final_val_loss"], rel=1e-4)


def test_latest_checkpoint_is_found_or_there_is_none(text: Path, tmp_path: Path) -> None:
    checkpoints = tmp_path / "saved"
    options = [
        *tiny_options(tmp_path, text, optimizer="torch", steps="6", checkpoint_dir=str(checkpoints)),
        *("--checkpoint-every", "3", "--resume-latest"),
    ]
    first = CliRunner().invoke(train_lm.app, options)
    assert first.exit_code == 0
    assert f"--resume-latest: no checkpoint in {checkpoints}, starting at step 0" in first.stdout
    log = [without_times(record) for record in reporting.read_metrics(tmp_path / reporting.METRICS_FILE)]
    # Started again when it is finished, as a launcher does that does not know, it has nothing to do.
    forget_accelerate()
    again = CliRunner().invoke(train_lm.app, options)
    assert again.exit_code == 0
    assert "step-000006 is at step 6 of 6: nothing left" in again.stderr
    forget_accelerate()
    asked = CliRunner().invoke(train_lm.app, [*options[:-1], "--resume", str(checkpoints)])
    assert asked.exit_code == 2
    assert "nothing left" in asked.stderr
    (checkpoints / "step-000006" / "training.json").unlink()  # as if interrupted while writing it
    forget_accelerate()
    interrupted = CliRunner().invoke(train_lm.app, options)
    assert interrupted.exit_code == 0
    assert f"passing over {checkpoints / 'step-000006'}, the saving of which was interrupted" in interrupted.stdout
    assert f"resumed from {checkpoints / 'step-000003'} at step 3" in interrupted.stdout
    assert log == [without_times(record) for record in reporting.read_metrics(tmp_path / reporting.METRICS_FILE)]


def test_latest_checkpoint_is_looked_for_in_one_place(text: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="resume_latest goes with a checkpoint_dir"):
        tiny_settings(tmp_path, text, resume_latest=True)
    with pytest.raises(ValueError, match="without resume"):
        tiny_settings(tmp_path, text, resume_latest=True, checkpoint_dir=tmp_path, resume=tmp_path)


def test_pure_bf16_and_mixed_precision_run(text: Path, tmp_path: Path) -> None:
    pure = run_training(tiny_settings(tmp_path / "pure", text, steps=4, optimizer="adamw8bit", param_dtype="bfloat16"))
    forget_accelerate()
    mixed = run_training(tiny_settings(tmp_path / "mixed", text, steps=4, optimizer="torch", precision="bf16"))
    assert pure["precision"] == "no"
    assert mixed["precision"] == "bf16"
    assert pure["final_val_loss"] == pytest.approx(mixed["final_val_loss"], rel=0.1)


def test_collectives_are_waited_for_no_longer_than_asked(text: Path, tmp_path: Path) -> None:
    accelerator = start_accelerator(tiny_settings(tmp_path, text, collective_timeout=20.0))
    assert accelerator.init_handler.timeout == timedelta(seconds=20)


# Runs that fail


@pytest.fixture
def group_ends(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Gets an entry each time a run leaves its process group."""
    ends: list[str] = []
    end_training = Accelerator.end_training

    def recorded(accelerator: Any) -> None:
        ends.append(accelerator.device.type)
        end_training(accelerator)

    monkeypatch.setattr(Accelerator, "end_training", recorded)
    return ends


def test_refusal_before_the_first_step_is_one_line(text: Path, tmp_path: Path, group_ends: list[str]) -> None:
    # Found when the text is read, when the held-out windows are cut and when the checkpoint is looked for.
    for name, value, words in (
        ("data", str(tmp_path / "absent"), "does not exist"),
        ("seq_len", "8000", "the held-out text has"),
        ("resume", str(tmp_path), "neither a complete checkpoint"),
    ):
        forget_accelerate()
        options = tiny_options(tmp_path / "run", text, optimizer="torch", **{name: value})
        result = CliRunner().invoke(train_lm.app, options)
        assert result.exit_code == 2
        assert words in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    assert len(group_ends) == 3
    assert not (tmp_path / "run").exists()


def test_fault_in_a_step_keeps_its_traceback(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group_ends: list[str]
) -> None:
    def broken(*_: Any) -> torch.Tensor:
        raise ValueError("a fault of the job")

    monkeypatch.setattr(lm_training, "language_model_loss", broken)
    result = CliRunner().invoke(train_lm.app, tiny_options(tmp_path, text, optimizer="torch"))
    assert isinstance(result.exception, ValueError)
    assert result.exc_info is not None
    functions = [frame.name for frame in traceback.extract_tb(result.exc_info[2])]
    assert functions[-2:] == ["training_step", "broken"]
    assert len(group_ends) == 1


def test_diverged_run_says_so(text: Path, tmp_path: Path, group_ends: list[str]) -> None:
    result = CliRunner().invoke(train_lm.app, tiny_options(tmp_path, text, optimizer="torch", lr="1e30"))
    assert result.exit_code == 1
    assert "try a learning rate below 1e+30" in result.stderr
    assert isinstance(result.exception, SystemExit)
    assert len(group_ends) == 1
    assert not (tmp_path / reporting.SUMMARY_FILE).exists()


# Launchers


def launch_two(folder: Path, text: Path, shard: str, **changes: str) -> dict[str, Any]:
    """A run of two processes with checkpoints, `shard` being the option for it or against it; its summary."""
    config = LAUNCH / "configs" / "cpu_2.yaml"
    saving = {"checkpoint_dir": str(folder / "checkpoints"), "checkpoint_every": "4"}
    chosen = {"batch_size": "2", "optimizer": "adamw8bit", "expect_world_size": "2"}
    options = tiny_options(folder, text, **chosen, **saving, **changes)
    result = accelerate_launch("--config_file", str(config), str(LAUNCH / "train_lm.py"), *options, shard)
    assert result.returncode == 0, result.stderr
    assert "world size: 2" in result.stdout
    assert "destroy_process_group" not in result.stderr
    summary: dict[str, Any] = json.loads((folder / reporting.SUMMARY_FILE).read_text(encoding="utf-8"))
    assert summary["world_size"] == 2
    return summary


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory, text: Path) -> dict[str, Path]:
    """The same run with the optimizer's whole state in each of two processes, and with half of it."""
    folders = {shard: tmp_path_factory.mktemp("two") for shard in ("--no-shard", "--shard")}
    for shard, folder in folders.items():
        launch_two(folder, text, shard)
    return folders


@pytest.mark.slow
def test_two_processes_train_one_model(two_processes: dict[str, Path], text: Path, tmp_path: Path) -> None:
    folder = two_processes["--no-shard"]
    summary = json.loads((folder / reporting.SUMMARY_FILE).read_text(encoding="utf-8"))
    assert len(summary["optimizer_state_bytes"]) == 2
    first_rank, second_rank = summary["weights_sha256"]
    assert first_rank == second_rank
    run_training(tiny_settings(tmp_path, text, optimizer="adamw8bit"))
    two, one = (reporting.read_metrics(run / reporting.METRICS_FILE) for run in (folder, tmp_path))
    for name in ("lr", "tokens"):
        assert reporting.series(two, "train", name) == reporting.series(one, "train", name)
    losses, alone = (reporting.series(records, "train", "loss")[1] for records in (two, one))
    assert losses[0] == pytest.approx(alone[0], rel=1e-6)
    # Later, sums in another order put a few moments into the next code. Rounding of relative size 2^-20 does so to
    # about 2^-20 / 0.028 of the elements a step (a ratio's code is 0.028 wide at ratio 1); their updates are then off
    # by at most a code of the root, a tenth (24 octaves in 254 codes). If none of it averaged out, that came to 3e-5
    # of the way of eight steps, on which the loss falls by 3: to 1e-4. Three times that is allowed for; the same run
    # with torch.optim.AdamW ends 1e-3 off.
    assert losses == pytest.approx(alone, rel=0, abs=3e-4)
    assert two[-1]["val_loss"] == pytest.approx(one[-1]["val_loss"], rel=0, abs=3e-4)


@pytest.mark.slow
def test_sharded_run_is_the_same_run_with_half_the_state(two_processes: dict[str, Path]) -> None:
    whole, sharded = (
        json.loads((two_processes[shard] / reporting.SUMMARY_FILE).read_text(encoding="utf-8"))
        for shard in ("--no-shard", "--shard")
    )
    assert sharded["weights_sha256"] == whole["weights_sha256"]
    assert sharded["stats"] == whole["stats"]
    metrics = [
        [without_times(record) for record in reporting.read_metrics(folder / reporting.METRICS_FILE)]
        for folder in two_processes.values()
    ]
    assert metrics[0] == metrics[1]
    all_bytes, other_bytes = whole["optimizer_state_bytes"]
    assert all_bytes == other_bytes
    # Half of the blocks each, and so half of the bytes but for this model's blocks of 64 to 128 elements, of which
    # those of its norms are in fp32. Each of its 12 tensors has its count of steps on both ranks.
    assert sharded["optimizer_state_bytes"] == pytest.approx([all_bytes / 2] * 2, rel=0.05)
    # The reference backend also keeps a count of skipped blocks, on each rank.
    counter = 0 if kernels.choose(None, torch.device("cpu")) == "cpu" else 8
    assert sum(sharded["optimizer_state_bytes"]) == all_bytes + 12 * 8 + counter
    assert [held + counter for held in sharded["memory_report"]["ranks"]] == sharded["optimizer_state_bytes"]
    parameters = whole["parameters"]
    assert sharded["state_bytes_per_parameter"] == max(sharded["optimizer_state_bytes"]) / parameters
    assert sharded["state_bytes_per_parameter_all_ranks"] == sum(sharded["optimizer_state_bytes"]) / parameters
    assert_same_checkpoint(*two_processes.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saved", "resumed"), [("--shard", "--shard"), ("--shard", "--no-shard"), ("--no-shard", "--shard")]
)
def test_checkpoint_resumes_with_and_without_shards(
    saved: str, resumed: str, two_processes: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    source = two_processes[saved]
    launch_two(tmp_path, text, resumed, resume=str(source / "checkpoints" / "step-000004"))
    expected = [
        without_times(record)
        for record in reporting.read_metrics(source / reporting.METRICS_FILE)
        if record["step"] > 4
    ]
    assert [without_times(record) for record in reporting.read_metrics(tmp_path / reporting.METRICS_FILE)] == expected
    assert_same_checkpoint(source, tmp_path)


@pytest.mark.slow
def test_sharded_checkpoint_of_another_world_size_is_refused(
    two_processes: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    # Not for the shards: as many ranks with the same batch each would read other windows.
    settings = tiny_settings(tmp_path, text, batch_size=2, shard=True, resume=two_processes["--shard"] / "checkpoints")
    words = r"another run \(world_size: 2 there, 1 here\); --total-batch-size lets any number of processes go on"
    with pytest.raises(ValueError, match=words):
        run_training(settings)


@pytest.mark.slow
def test_launch_that_silently_starts_one_process_fails(text: Path, tmp_path: Path) -> None:
    options = tiny_options(tmp_path, text, optimizer="torch", expect_world_size="2")
    result = accelerate_launch("--cpu", "--num_processes", "2", str(LAUNCH / "train_lm.py"), *options)
    assert result.returncode != 0
    assert "world size is 1, but --expect-world-size says 2" in result.stderr
    assert not (tmp_path / reporting.METRICS_FILE).exists()


# Comparison


def test_comparison_writes_table_and_picture(finished_runs: dict[str, Path], tmp_path: Path) -> None:
    arguments = [*map(str, finished_runs.values()), "--output-dir", str(tmp_path)]
    result = CliRunner().invoke(compare_runs.app, arguments)
    assert result.exit_code == 0, result.output
    table = (tmp_path / compare_runs.TABLE_FILE).read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]
    assert rows[0] == ["figure", *finished_runs]
    summaries = [
        json.loads((folder / reporting.SUMMARY_FILE).read_text(encoding="utf-8")) for folder in finished_runs.values()
    ]
    losses = ["final validation loss (nats a byte)", *(f"{summary['final_val_loss']:.4f}" for summary in summaries)]
    sizes = [f"{summary['state_bytes_per_parameter']:.3f}" for summary in summaries]
    assert losses in rows
    assert ["optimizer state of the largest rank, bytes a parameter", *sizes] in rows
    for value in (*losses[1:], *sizes):
        assert value in result.stdout
    assert "differ in more" not in table
    with Image.open(tmp_path / compare_runs.PICTURE_FILE) as picture:
        assert picture.width > 1200


def test_comparison_names_the_sharded_run(finished_runs: dict[str, Path], tmp_path: Path) -> None:
    whole, sharded = finished_runs["adamw8bit"], tmp_path / "sharded"
    sharded.mkdir()
    shutil.copy(whole / reporting.METRICS_FILE, sharded)
    summary = json.loads((whole / reporting.SUMMARY_FILE).read_text(encoding="utf-8"))
    summary["settings"]["shard"] = True
    summary["optimizer_state_bytes"] = [2 << 20, 3 << 20]
    (sharded / reporting.SUMMARY_FILE).write_text(json.dumps(summary), encoding="utf-8")
    compare_runs.compare([whole, sharded], tmp_path / "out")
    table = (tmp_path / "out" / compare_runs.TABLE_FILE).read_text(encoding="utf-8")
    assert "| figure | adamw8bit | adamw8bit sharded |" in table
    assert "| 2.00, 3.00 |" in table
    assert "differ in more" not in table


def test_comparison_says_what_else_differs(finished_runs: dict[str, Path], tmp_path: Path) -> None:
    folders = list(finished_runs.values())
    changed = tmp_path / "changed"
    changed.mkdir()
    for name in (reporting.SUMMARY_FILE, reporting.METRICS_FILE):
        content = (folders[0] / name).read_text(encoding="utf-8")
        (changed / name).write_text(content.replace('"seed": 0', '"seed": 7'), encoding="utf-8")
    compare_runs.compare([folders[0], changed], tmp_path / "out")
    table = (tmp_path / "out" / compare_runs.TABLE_FILE).read_text(encoding="utf-8")
    assert "seed: 0, 7" in table
    assert "torch (changed)" in table


def test_comparison_refuses_an_unfinished_run(tmp_path: Path) -> None:
    result = CliRunner().invoke(compare_runs.app, [str(tmp_path), "--output-dir", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "not the folder of a finished run" in result.stderr
