"""The benchmark of master weights in short: who may be timed, and what is made of the times."""

from __future__ import annotations

import pytest

pytest.importorskip("rich", reason="the benchmark prints tables")
pytest.importorskip("typer", reason="the benchmark has a command line")

import torch

from benchmarks.bench_master_weights import CONTESTANTS, SPLIT, YARDSTICK, measure
from benchmarks.host_contestants import Contestant, Running, displacement
from benchmarks.step_timing import Plan


@pytest.mark.parametrize("name", CONTESTANTS)
def test_every_contestant_follows_the_textbook(name: str) -> None:
    error, allowed = displacement(CONTESTANTS[name])
    assert error <= allowed


def test_one_that_loses_its_weights_is_not_timed() -> None:
    """It rounds to nearest and says that it keeps a weight."""
    lossy = CONTESTANTS["nearest"]._replace(error=1e-5, weight_eps=2.0**-23)
    error, allowed = displacement(lossy)
    assert error > allowed

    def other(param: torch.nn.Parameter) -> Running:
        running = CONTESTANTS[SPLIT].build(param)
        return Running(running.step, lambda: running.weight() * 1.1)

    with pytest.raises(RuntimeError, match="not what the weight rounds to"):
        displacement(Contestant(other, 0.0, 1.0, 0.0))


def test_ratios_are_to_the_yardstick() -> None:
    rows = {row["name"]: row for row in measure(1 << 14, 1 << 14, Plan(3, 1.0, 2, 1e-4))}
    assert list(rows) == list(CONTESTANTS)
    assert rows[YARDSTICK]["ratio"] == 1.0
    for row in rows.values():
        assert row["ratio"] == pytest.approx(row["ns"] / rows[YARDSTICK]["ns"])
        assert row["p5"] <= row["ns"] <= row["p95"]
