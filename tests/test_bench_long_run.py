"""The long run: what it records of a training, and when its verdict is no."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_long_run, long_run_training
from benchmarks.long_run_training import EXACT, OURS, Job, Record, Shadow, build, moments_held, update_of
from tests.cases import FEW, gradient, make_params
from tests.launching import ROOT
from tests.oracle import TextbookAdam

SECONDS = 280
LR = 1e-3


@pytest.mark.parametrize(("name", "error"), [(EXACT, 1e-4), (OURS, 0.1)])
@pytest.mark.parametrize("beta2", bench_long_run.BETA2S)
def test_updates_are_those_that_optimizers_take(name: str, error: float, beta2: float) -> None:
    """From moments as they are held follows the step that comes: parameters move by lr * u, besides the decay."""
    params = [
        p for p in make_params(FEW) if p.is_contiguous()
    ]  # torch's fused step takes no other strides for the gradient
    opt = build(Job(name, beta2, 0), params, LR)
    oracles = [TextbookAdam(p, lr=LR, betas=(0.9, beta2), eps=1e-8, weight_decay=0.01) for p in params]
    shadow, record = Shadow(params, beta2), Record()
    for step in range(1, 4):
        for index, (param, oracle) in enumerate(zip(params, oracles, strict=True)):
            param.grad = gradient(param, 0, index, step)
            oracle.step(param.grad)
        shadow.take()
        opt.step()
    for param, oracle in zip(params, oracles, strict=True):
        wanted = update_of((oracle.exp_avg, oracle.exp_avg_sq), beta2, 3)
        got = update_of(moments_held(opt, param), beta2, 3)
        assert float((got - wanted).norm()) <= error * float(wanted.norm())
    shadow.compare(opt, 3, record)
    assert record.norm_ratio[0] == pytest.approx(1, abs=error)
    assert 0 <= record.update_error[0] <= error
    low, middle, high = record.root_ratio[0]
    assert low <= middle <= high
    assert middle == pytest.approx(1, abs=error)


def made_up(optimizer: str, seed: int, loss: float, ratio: float = 1.0, last: float = 1.0) -> dict[str, Any]:
    """A run of 40 entries with one loss, whose updates go from `ratio` to `last` times the exact size."""
    drifting = [ratio + (last - ratio) * index / 39 for index in range(40)]
    run: dict[str, Any] = {"optimizer": optimizer, "beta2": 0.999, "seed": seed, "steps": list(range(1, 41))}
    run |= {"loss": [loss] * 40, "validation": [loss] * 40, "update_norm": [1.0] * 40}
    exact = optimizer == EXACT
    run |= {"norm_ratio": [] if exact else drifting, "update_error": [] if exact else [0.01] * 40}
    return run | {"root_ratio": [] if exact else [[0.9, 1.0, 1.1]] * 40}


def verdict(*ours: dict[str, Any]) -> dict[str, Any]:
    runs = [made_up(EXACT, 0, 2.0), made_up(EXACT, 1, 2.2), *ours]
    (row,) = [row for row in bench_long_run.summary(runs) if row["optimizer"] == OURS]
    return row


def test_what_ends_beside_the_baseline_and_stays_holds() -> None:
    row = verdict(made_up(OURS, 0, 2.01), made_up(OURS, 1, 2.21))
    assert row["holds"]
    assert row["mean_difference"] == pytest.approx(0.01)
    assert row["steps"] == 40


@pytest.mark.parametrize(
    "ours",
    [
        (made_up(OURS, 0, 2.3), made_up(OURS, 1, 2.5)),
        (made_up(OURS, 0, 2.0, 1.0, 1.1), made_up(OURS, 1, 2.2, 1.0, 1.1)),
        (made_up(OURS, 0, 2.0, 0.97, 0.97), made_up(OURS, 1, 2.2, 0.97, 0.97)),
        (made_up(OURS, 0, 2.0, 0.999, 1.019), made_up(OURS, 1, 2.2, 0.999, 1.019)),
    ],
    ids=["another loss", "growing updates", "small updates", "updates that begin to grow"],
)
def test_what_ends_elsewhere_or_drifts_does_not_hold(ours: tuple[dict[str, Any], ...]) -> None:
    assert not verdict(*ours)["holds"]


def test_a_run_that_ends_early_is_compared_as_far_as_it_went_and_one_that_diverges_fails() -> None:
    short = made_up(OURS, 0, 2.0)
    for key in ("steps", "loss", "validation", "norm_ratio", "update_error", "root_ratio"):
        short[key] = short[key][:20]
    row = verdict(short, made_up(OURS, 1, 2.2))
    assert row["steps"] == 20
    assert row["holds"]
    diverged = copy.deepcopy(made_up(OURS, 1, 2.2))
    diverged["loss"][-1] = math.inf
    row = verdict(made_up(OURS, 0, 2.0), diverged)
    assert row["steps"] == 40
    assert not row["holds"]


def test_time_that_is_over_ends_a_run_at_a_look() -> None:
    record = long_run_training.train(Job(OURS, 0.999, 0), 1000, bench_long_run.QUICK, "cpu", 0.0)
    assert record.steps == [bench_long_run.QUICK.every]
    assert len(record.validation) == len(record.norm_ratio) == 1


def test_quick_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.bench_long_run", "--quick", "--no-peers", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode in (0, 1), done.stderr
    data = json.loads((tmp_path / "long_run.json").read_text())
    assert [(run["optimizer"], run["beta2"], run["seed"]) for run in data["runs"]] == [
        (name, beta2, seed) for seed in range(2) for beta2 in bench_long_run.BETA2S for name in (EXACT, OURS)
    ]
    assert all(len(run["steps"]) == 12 for run in data["runs"])
    assert "quick run, not to be quoted" in (tmp_path / "long_run.md").read_text()
    assert (tmp_path / "long_run.png").stat().st_size > 0
    # The same seed sees the same text: before their paths part, losses are those of the baseline.
    by_job = {(run["optimizer"], run["beta2"], run["seed"]): run for run in data["runs"]}
    for seed in range(2):
        first = [by_job[name, 0.999, seed]["loss"][0] for name in (EXACT, OURS)]
        assert first[0] == pytest.approx(first[1], rel=1e-3)
    assert torch.tensor(by_job[OURS, 0.999, 0]["norm_ratio"]).sub(1).abs().max() < 0.1
