"""The benchmark of the host's time in short: who repeats steps, and what is made of the times."""

from __future__ import annotations

import pytest

pytest.importorskip("rich", reason="the benchmark prints tables")
pytest.importorskip("typer", reason="the benchmark has a command line")

import torch
from torch.nn import Parameter

from benchmarks.bench_host_time import CONTESTANTS, FUSED, OURS, PHASES, measure


def test_one_contestant_repeats_steps_and_one_does_not() -> None:
    repeats = {}
    for name in (OURS, PHASES):
        params = [Parameter(torch.ones(8)) for _ in range(3)]
        optimizer = CONTESTANTS[name](params)
        for _ in range(3):
            for param in params:
                param.grad = torch.ones(8)
            optimizer.step()
        repeats[name] = optimizer._stepper._repeat is not None  # type: ignore[attr-defined]
    assert repeats == {OURS: True, PHASES: False}


def test_ratios_are_to_torch() -> None:
    rows = {row["name"]: row for row in measure(4, torch.device("cpu"), rounds=3)}
    assert list(rows) == list(CONTESTANTS)
    assert rows[FUSED]["ratio"] == 1.0
    for row in rows.values():
        assert row["us_a_tensor"] == pytest.approx(row["us"] / 4)
        assert row["p5"] <= row["us"] <= row["p95"]
