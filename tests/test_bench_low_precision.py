"""The benchmark of bfloat16 at a small learning rate: what it concludes from losses, and a short run of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

for package in ("sklearn", "cv2", "scipy", "typer", "rich", "mlxtend", "matplotlib"):
    pytest.importorskip(package, reason="the benchmark needs it")

import torch  # noqa: E402
import typer  # noqa: E402
from torch import nn  # noqa: E402

# Only now: these modules import the packages above.
from benchmarks import bench_low_precision as bench  # noqa: E402
from benchmarks.low_precision_tasks import MasterWeightAdamW, Run, fine_tune  # noqa: E402
from benchmarks.parity_tasks import Task, cross_entropy  # noqa: E402
from lowmem_adam import AdamW8bit  # noqa: E402

START, FINALS = 3.0, (2.0, 2.1, 2.2)
"""Of the made runs: the loss before training, and the baseline's losses after it; their spread is 0.1."""


def made_runs(**shifts: float) -> dict[str, list[Run]]:
    """Runs that end as the baseline's, but the control, which gains a tenth of it; shifts are added to the ends."""
    names = {"peer": bench.PEER, "control": bench.CONTROL, "split24": "split, 24 bits", "baseline": bench.BASELINE}
    moved = {names.get(key, key): shift for key, shift in shifts.items()}
    runs = {}
    for name in bench.OPTIMIZERS:
        ends = [START - 0.1 * (START - end) if name == bench.CONTROL else end for end in FINALS]
        ends = [end + moved.get(name, 0.0) for end in ends]
        runs[name] = [Run(START, end, [(0, START), (10, end)], 0.5) for end in ends]
    return runs


@pytest.mark.parametrize(
    ("shifts", "valid", "met"),
    [
        ({}, True, True),
        ({"stochastic": 0.09, "split": -0.09, "split24": 0.09, "peer": -0.09}, True, True),
        ({"stochastic": 0.11}, True, False),
        ({"split": -0.11}, True, False),
        ({"split24": 0.11}, True, False),
        ({"split": math.inf}, True, False),
        ({"peer": 0.11}, False, True),
        ({"control": -0.8}, False, True),  # 0.01 from the baseline
        ({"control": -1.5}, False, True),  # far from it, but better
        ({"control": math.inf}, False, True),  # diverged, which is not a stall
        (dict.fromkeys(("baseline", "peer", "stochastic", "split", "split24"), 0.85), False, True),
    ],
)
def test_what_is_concluded(shifts: dict[str, float], valid: bool, met: bool) -> None:
    found = bench.verdicts_of(made_runs(**shifts))
    assert (found["valid"], found["met"]) == (valid, met)


def test_improvement_is_a_share_of_the_baselines() -> None:
    verdicts = bench.verdicts_of(made_runs(split=0.09))["verdicts"]
    assert verdicts[bench.BASELINE]["improvement"] == pytest.approx(1.0)
    assert verdicts["split"]["improvement"] == pytest.approx(0.9)
    assert verdicts[bench.CONTROL]["improvement"] == pytest.approx(0.1)
    assert verdicts["split"]["seed_spread"] == pytest.approx(0.1)


def made_data(quick: bool, **shifts: float) -> dict[str, Any]:
    runs = made_runs(**shifts)
    found = {name: [asdict(run) for run in group] for name, group in runs.items()}
    tasks = {"made": {"runs": found, **bench.verdicts_of(runs)}}
    return {"quick": quick, "seeds": 3, "cpu_seconds": {"made": 1.0}, "tasks": tasks}


@pytest.mark.parametrize(
    ("quick", "shifts", "failed"),
    [
        (False, {}, False),
        (False, {"split": 0.2}, True),
        (False, {"split": math.inf}, True),
        (False, {"control": -0.8}, True),
        (True, {"control": -0.8}, False),
    ],
)
def test_exit_status_and_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quick: bool, shifts: dict[str, float], failed: bool
) -> None:
    monkeypatch.setattr(bench, "measure", lambda *_: made_data(quick, **shifts))
    if failed:
        with pytest.raises(typer.Exit) as status:
            bench.main(quick=quick, output=tmp_path)
        assert status.value.exit_code == 1
    else:
        bench.main(quick=quick, output=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"low_precision.{end}" for end in ("json", "md", "png")}
    assert "| made | split |" in (tmp_path / "low_precision.md").read_text()


def test_a_task_that_is_not_known_is_refused() -> None:
    with pytest.raises(typer.BadParameter, match="accepted: bytes, words, images"):
        bench.main(task=["letters"])


def test_the_peer_is_the_baseline_with_32_bit_moments() -> None:
    """To the bit of the bfloat16 parameter in nearly all elements, under a learning rate that changes."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(64, 64, generator=generator).bfloat16()
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = (
        AdamW8bit([ours], lr=1e-3, moments="32bit", low_precision_update="fp32"),
        MasterWeightAdamW([theirs], 1e-3),
    )
    for step in range(20):
        gradient = torch.randn(64, 64, generator=generator).bfloat16()
        for optimizer, param in zip(optimizers, (ours, theirs), strict=True):
            optimizer.param_groups[0]["lr"] = 1e-3 / (1 + step)
            param.grad = gradient.clone()
            optimizer.step()
    assert (theirs != start).float().mean() > 0.3
    assert (ours != theirs).float().mean() < 1e-3
    masters = [param for group in optimizers[1].inner.param_groups for param in group["params"]]
    torch.testing.assert_close(optimizers[0].master_weight(ours), masters[0].detach(), rtol=1e-6, atol=1e-7)


def test_what_is_fine_tuned_is_bfloat16_and_a_copy() -> None:
    torch.manual_seed(0)
    pretrained = nn.Linear(8, 4)
    before = [param.detach().clone() for param in pretrained.parameters()]
    batch = (torch.randn(16, 8).bfloat16(), torch.randint(0, 4, (16,)))
    task = Task(1e-2, 5, lambda: pretrained, lambda _: [batch] * 5, cross_entropy, (batch,))
    seen: list[nn.Parameter] = []

    def make(params: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        seen.extend(params)
        return AdamW8bit(seen, lr=lr)

    run = fine_tune(task, pretrained, 0, make, evaluations=2)
    gradients = [param.grad for param in seen if param.grad is not None]
    assert {tensor.dtype for tensor in (*seen, *gradients)} == {torch.bfloat16}
    assert len(gradients) == len(seen) == 2
    assert all(torch.equal(a, b) for a, b in zip(before, pretrained.parameters(), strict=True))
    assert run.curve[0] == (0, run.start)
    assert run.final < run.start
    assert 0.5 < run.changed <= 1.0


@pytest.mark.slow
def test_the_quick_run_writes_its_files(tmp_path: Path) -> None:
    bench.main(task=["images"], quick=True, output=tmp_path)
    data = json.loads((tmp_path / "low_precision.json").read_text())
    assert data["seeds"] == 2
    runs = data["tasks"]["images"]["runs"]
    assert list(runs) == list(bench.OPTIMIZERS)
    for found in zip(*runs.values(), strict=True):
        assert len({run["start"] for run in found}) == 1
    assert runs["split"][0]["start"] != runs["split"][1]["start"]
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".png"}
