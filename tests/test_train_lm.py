"""The language-model job of launch/: its text, its optimizers, its runs, its checkpoints, its report."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate", reason="the training job runs under accelerate")
pytest.importorskip("transformers", reason="the training job takes its model from transformers")

import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
# The scripts of launch/ find one another by bare name, as they do when one of them is run.
sys.path.insert(0, str(LAUNCH))

import compare_runs  # noqa: E402
import lm_checkpoint  # noqa: E402
import lm_data  # noqa: E402
import lm_training  # noqa: E402
import optimizers  # noqa: E402
import reporting  # noqa: E402
import train_lm  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from lm_settings import TrainingSettings  # noqa: E402
from lm_training import run_training  # noqa: E402
from schedules import warmup_cosine  # noqa: E402

OURS_AND_TORCH = ("torch", "adamw8bit")
# Far above what a launch takes; it bounds a hang only.
LAUNCH_TIMEOUT = 200


def write_text(folder: Path) -> Path:
    """Ten small files that a small model can learn something from."""
    for index in range(10):
        lines = [f"value_{index}_{line} = compute(value_{line}, {line * index})\n" for line in range(60)]
        path = folder / f"part_{index % 3}" / f"file_{index}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines), encoding="utf-8")
    return folder


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


def forget_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def tiny_settings(output_dir: Path, text: Path, **changes: Any) -> TrainingSettings:
    settings = TrainingSettings(
        output_dir=output_dir,
        data=(text,),
        validation_every=5,
        steps=8,
        warmup_steps=2,
        lr=1e-2,
        batch_size=4,
        seq_len=32,
        hidden_size=64,
        intermediate_size=96,
        layers=1,
        heads=2,
        eval_every=4,
        eval_windows=8,
    )
    return replace(settings, **changes)


def tiny_options(output_dir: Path, text: Path, **changes: str) -> list[str]:
    """The same run for the command line."""
    settings = tiny_settings(output_dir, text)
    names = [
        "output_dir",
        "validation_every",
        "steps",
        "warmup_steps",
        "lr",
        "batch_size",
        "seq_len",
        "hidden_size",
        "intermediate_size",
        "layers",
        "heads",
        "eval_every",
        "eval_windows",
    ]
    values = {name: str(getattr(settings, name)) for name in names} | {"data": str(text)} | changes
    return [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", value)]


def launch(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """`accelerate launch` in a session of its own, so that a launch that hangs ends with all its processes."""
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=LAUNCH_TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        pytest.fail(f"the launch did not end within {LAUNCH_TIMEOUT} s:\n{stdout}\n{stderr}")
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if not name.endswith("_ms")}


# Text


def test_split_is_deterministic_and_by_file(text: Path) -> None:
    first, second = (lm_data.load_corpus([text], validation_every=5) for _ in range(2))
    assert first.digest() == second.digest()
    assert first.train_files == second.train_files
    assert len(first.train_files) == 8
    assert len(first.validation_files) == 2
    assert not set(first.train_files) & set(first.validation_files)
    for name in first.validation_files:
        assert Path(name).read_bytes() in first.validation.tobytes()
        assert Path(name).read_bytes() not in first.train.tobytes()


def test_text_does_not_depend_on_where_it_lies(text: Path, tmp_path: Path) -> None:
    assert lm_data.load_corpus([write_text(tmp_path)]).digest() == lm_data.load_corpus([text]).digest()


def test_standard_library_is_the_default_text() -> None:
    files = lm_data.find_text_files([])
    names = {path.name for path in files}
    assert {"abc.py", "argparse.py", "threading.py"} <= names
    assert files == lm_data.find_text_files([])
    assert not any("site-packages" in path.parts for path in files)


def test_single_file_is_split_near_its_end(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_bytes(bytes(range(1, 201)))
    corpus = lm_data.load_corpus([path], validation_every=10)
    assert corpus.train.tobytes() + corpus.validation.tobytes() == path.read_bytes()
    assert len(corpus.validation) == 20


def test_files_that_are_no_text_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "image.bin").write_bytes(b"\x89\0\0")
    with pytest.raises(ValueError, match="no text files"):
        lm_data.load_corpus([tmp_path])
    with pytest.raises(ValueError, match="does not exist"):
        lm_data.load_corpus([tmp_path / "absent"])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_windows_of_an_epoch_are_disjoint_over_ranks_and_steps(world_size: int) -> None:
    stream = lm_data._join([bytes(range(1, 250)) * 5])
    samplers = [lm_data.WindowSampler(stream, 16, 2, rank, world_size, seed=3) for rank in range(world_size)]
    steps = samplers[0].windows_per_epoch // (2 * world_size)
    starts = sorted(start for sampler in samplers for step in range(steps) for start in sampler.starts(step))
    assert len(starts) == steps * 2 * world_size
    assert all(later - earlier >= 16 for earlier, later in pairwise(starts))
    assert starts[0] >= 0
    assert starts[-1] + 16 < len(stream)


def test_ranks_together_read_what_one_process_with_their_batch_reads() -> None:
    stream = lm_data._join([bytes(range(1, 250)) * 20])
    alone = lm_data.WindowSampler(stream, 16, 6, 0, 1, seed=1)
    together = [lm_data.WindowSampler(stream, 16, 3, rank, 2, seed=1) for rank in range(2)]
    for step in range(200):  # several epochs
        assert alone.starts(step) == [start for sampler in together for start in sampler.starts(step)]


def test_data_order_depends_on_seed_and_epoch_only() -> None:
    stream = lm_data._join([bytes(range(1, 250)) * 5])
    first, second, other = (lm_data.WindowSampler(stream, 16, 4, 0, 1, seed=seed) for seed in (1, 1, 2))
    steps = range(3 * first.windows_per_epoch // 4)
    order = [first.starts(step) for step in steps]
    assert order == [second.starts(step) for step in reversed(steps)][::-1]
    assert order != [other.starts(step) for step in steps]
    inputs, targets = first.batch(0)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert inputs.shape == (4, 16)


# Optimizers and their state


def test_unknown_optimizer_is_refused_with_the_accepted_names(tmp_path: Path) -> None:
    result = CliRunner().invoke(train_lm.app, ["--optimizer", "adamx", "--output-dir", str(tmp_path)])
    assert result.exit_code == 2
    for name in ("adamx", *optimizers.FACTORIES):
        assert name in result.stderr


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package torchao"):
        optimizers.build_optimizer("torchao", [torch.nn.Parameter(torch.zeros(3))], optimizers.OptimizerSettings())


@pytest.mark.parametrize("name", [*OURS_AND_TORCH, "adam8bit", "adamw32bit"])
def test_optimizers_get_the_same_settings(name: str) -> None:
    settings = optimizers.OptimizerSettings(lr=0.5, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.25)
    optimizer = optimizers.build_optimizer(name, [torch.nn.Parameter(torch.zeros(3))], settings)
    (group,) = optimizer.param_groups
    for key in ("lr", "betas", "eps", "weight_decay"):
        assert group[key] == getattr(settings, key)


def test_state_bytes_count_each_storage_once_and_no_parameter() -> None:
    parameter = torch.nn.Parameter(torch.zeros(100))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(100)
    assert reporting.optimizer_state_bytes(optimizer) == 0
    optimizer.step()
    step_counter = 4
    assert reporting.optimizer_state_bytes(optimizer) == 800 + step_counter
    table = torch.zeros(64)
    optimizer.state[parameter]["alias"] = optimizer.state[parameter]["exp_avg"][10:20]
    optimizer.lookup = {"table": table, "again": [table.view(8, 8)]}  # type: ignore[attr-defined]
    assert reporting.optimizer_state_bytes(optimizer) == 800 + step_counter + 256


def test_schedule_counts_optimizer_steps() -> None:
    factors = [warmup_cosine(step, steps=100, warmup_steps=10, final_fraction=0.1) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == 1.0
    assert factors[100] == pytest.approx(0.1)
    assert all(later <= earlier for earlier, later in pairwise(factors[10:]))


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("precision", "fp8", "no, bf16"),
        ("param_dtype", "float16", "float32, bfloat16"),
        ("steps", 0, "at least 1"),
        ("hidden_size", 63, "a multiple of twice the heads"),
        ("checkpoint_every", 5, "needs a checkpoint_dir"),
        ("lr", math.nan, "a finite number above 0"),
        ("lr", math.inf, "a finite number above 0"),
        ("lr", 0.0, "a finite number above 0"),
        ("betas", (0.9, math.nan), "0..1, 1 excluded"),
        ("betas", (1.0, 0.999), "0..1, 1 excluded"),
        ("weight_decay", math.nan, "a finite number of at least 0"),
        ("weight_decay", -0.1, "a finite number of at least 0"),
        ("warmup_steps", -1, "a finite number of at least 0"),
        ("clip", math.inf, "a finite number of at least 0"),
        ("final_lr_fraction", math.nan, "0..1"),
        ("seed", 2**32, "0..4294967295"),
    ],
)
def test_wrong_settings_are_refused_by_name(name: str, value: Any, accepted: str) -> None:
    with pytest.raises(ValueError, match=name) as caught:
        replace(TrainingSettings(output_dir=Path("unused")), **{name: value})
    assert str(value) in str(caught.value)
    assert accepted in str(caught.value)


# What is written


def test_what_is_no_finite_number_is_null_in_the_files(tmp_path: Path) -> None:
    record = {"kind": "train", "step": 1, "grad_norm": math.inf, "nested": [(math.nan, 1.5)]}
    with reporting.MetricsLog(tmp_path, is_main_process=True) as log:
        log.write(record)
    reporting.write_json(tmp_path / "summary.json", record)
    (line,) = reporting.read_metrics(tmp_path / reporting.METRICS_FILE)
    assert line == json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert line == {"kind": "train", "step": 1, "grad_norm": None, "nested": [[None, 1.5]]}
    steps, (norm,) = reporting.series([line], "train", "grad_norm")
    assert steps == [1]
    assert math.isnan(norm)


def test_latest_checkpoint_is_the_one_with_the_highest_number(tmp_path: Path) -> None:
    for name in ("step-999999", "step-1000000", "step-last", "step-000002"):
        (tmp_path / name).mkdir()
        (tmp_path / name / lm_checkpoint.CHECKPOINT_MARKER).write_text("{}", encoding="utf-8")
    (tmp_path / "step-2000000").mkdir()  # interrupted: no marker
    assert lm_checkpoint.find_checkpoint(tmp_path) == tmp_path / "step-1000000"


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
    last = Path("checkpoints") / "step-000008"
    assert (resumed / last / "model.safetensors").read_bytes() == (whole / last / "model.safetensors").read_bytes()
    states = [torch.load(folder / last / "optimizer.bin", weights_only=True) for folder in (whole, resumed)]
    assert_same_tree(*states)


def assert_same_tree(expected: Any, got: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert torch.equal(expected, got)
    elif isinstance(expected, dict):
        assert expected.keys() == got.keys()
        for key in expected:
            assert_same_tree(expected[key], got[key])
    elif isinstance(expected, (list, tuple)):
        assert len(expected) == len(got)
        for one, other in zip(expected, got, strict=True):
            assert_same_tree(one, other)
    else:
        assert expected == got


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


def test_pure_bf16_and_mixed_precision_run(text: Path, tmp_path: Path) -> None:
    pure = run_training(tiny_settings(tmp_path / "pure", text, steps=4, optimizer="adamw8bit", param_dtype="bfloat16"))
    forget_accelerate()
    mixed = run_training(tiny_settings(tmp_path / "mixed", text, steps=4, optimizer="torch", precision="bf16"))
    assert pure["precision"] == "no"
    assert mixed["precision"] == "bf16"
    assert pure["final_val_loss"] == pytest.approx(mixed["final_val_loss"], rel=0.1)


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


@pytest.mark.slow
def test_two_processes_train_one_model(text: Path, tmp_path: Path) -> None:
    config = LAUNCH / "configs" / "cpu_2.yaml"
    options = tiny_options(tmp_path / "two", text, batch_size="2", optimizer="adamw8bit", expect_world_size="2")
    result = launch(["--config_file", str(config), str(LAUNCH / "train_lm.py"), *options])
    assert result.returncode == 0, result.stderr
    assert "world size: 2" in result.stdout
    assert "destroy_process_group" not in result.stderr
    summary = json.loads((tmp_path / "two" / reporting.SUMMARY_FILE).read_text(encoding="utf-8"))
    assert summary["world_size"] == 2
    assert len(summary["optimizer_state_bytes"]) == 2
    first_rank, second_rank = summary["weights_sha256"]
    assert first_rank == second_rank
    run_training(tiny_settings(tmp_path / "one", text, optimizer="adamw8bit"))
    two, one = (reporting.read_metrics(tmp_path / run / reporting.METRICS_FILE) for run in ("two", "one"))
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
def test_launch_that_silently_starts_one_process_fails(text: Path, tmp_path: Path) -> None:
    options = tiny_options(tmp_path, text, optimizer="torch", expect_world_size="2")
    result = launch(["--cpu", "--num_processes", "2", str(LAUNCH / "train_lm.py"), *options])
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
    assert ["optimizer state, bytes a parameter", *sizes] in rows
    for value in (*losses[1:], *sizes):
        assert value in result.stdout
    assert "differ in more" not in table
    with Image.open(tmp_path / compare_runs.PICTURE_FILE) as picture:
        assert picture.width > 1200


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
