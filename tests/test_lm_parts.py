"""The parts of the language-model job: its text, its optimizers, its settings and the files it writes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate", reason="the training job runs under accelerate")
pytest.importorskip("transformers", reason="the training job takes its model from transformers")

import torch

from tests.lm_cases import OURS_AND_TORCH, write_text  # isort: skip  (puts launch/ on the path)

import compare_runs
import lm_checkpoint
import lm_data
import lm_training
import optimizers
import reporting
import train_lm
from lm_settings import TrainingSettings
from schedules import warmup_cosine
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


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


def test_labels_say_where_the_state_was(tmp_path: Path) -> None:
    settings: list[dict[str, Any]] = [{}, {"shard": True}, {"offload": True}, {"shard": True, "offload": True}]
    summaries = [{"optimizer": "adamw8bit", "settings": chosen} for chosen in settings]
    labels = compare_runs.run_labels([tmp_path] * len(settings), summaries)
    assert labels == [f"adamw8bit{words}" for words in ("", " sharded", " offloaded", " sharded offloaded")]


WAYS: dict[str, dict[str, Any]] = {
    "shard": {"shard": True},
    "offload": {"offload": True},
    "offload_gradients": {"offload": True, "offload_gradients": True},
}


def settings_with(way: str, chosen: bool) -> optimizers.OptimizerSettings:
    return replace(optimizers.OptimizerSettings(), **WAYS[way] if chosen else {})


@pytest.mark.parametrize("name", optimizers.FACTORIES)
@pytest.mark.parametrize("way", ["shard", "offload"])
def test_only_ours_can_be_sharded_and_offloaded(name: str, way: str, tmp_path: Path) -> None:
    if name in optimizers.OURS:
        changes: dict[str, Any] = {way: True}
        assert getattr(TrainingSettings(output_dir=tmp_path, optimizer=name, **changes), way)
        return
    options = ["--optimizer", name, f"--{way}", "--output-dir", str(tmp_path / "run")]
    result = CliRunner().invoke(train_lm.app, options)
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert f"{way} is for {', '.join(optimizers.OURS)}; {name} keeps its" in line
    with pytest.raises(ValueError, match=f"{way} is for adamw8bit"):
        optimizers.build_optimizer(name, [torch.nn.Parameter(torch.zeros(3))], settings_with(way, True))


def test_gradients_go_to_the_host_with_the_state_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="offload_gradients goes with offload"):
        TrainingSettings(output_dir=tmp_path, offload_gradients=True)


@pytest.mark.parametrize("name", optimizers.OURS)
@pytest.mark.parametrize("way", WAYS)
def test_sharded_or_offloaded_in_one_process_on_the_cpu_is_the_same(name: str, way: str) -> None:
    held = []
    for chosen in (False, True):
        torch.manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(64, 128))
        optimizer = optimizers.build_optimizer(name, [parameter], settings_with(way, chosen))
        assert (getattr(optimizer, "_offload", None) == "cpu") == (chosen and way != "shard")
        assert getattr(optimizer, "_offload_gradients", None) == (chosen and way == "offload_gradients")
        parameter.grad = torch.randn(64, 128)
        optimizer.step()
        held.append((parameter.detach().clone(), reporting.optimizer_state_bytes(optimizer)))
    assert torch.equal(held[0][0], held[1][0])
    assert held[0][1] == held[1][1]


@pytest.mark.parametrize(
    ("sizes", "cell"), [([2**20], "1.00"), ([2**20, 2**19], "1.00, 0.50"), ([2**20, *[2**19] * 9], "0.50 to 1.00")]
)
def test_sizes_of_many_ranks_fit_into_a_cell(sizes: list[int], cell: str) -> None:
    assert reporting.sizes_by_rank(sizes) == cell


def test_counts_of_shards_add_up() -> None:
    by_rank = [{"skipped_blocks": 2}, {"skipped_blocks": 3}]
    assert lm_training.total_stats(by_rank, sharded=True) == {"skipped_blocks": 5}
    assert lm_training.total_stats([by_rank[0]] * 2, sharded=False) == {"skipped_blocks": 2}


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
