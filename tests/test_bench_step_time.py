"""The step-time benchmark in short: who may be timed, and that a wrong step of a coarse format is found."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("numpy", reason="the benchmark fits growth")
pytest.importorskip("scipy", reason="the benchmark fits growth")
pytest.importorskip("rich", reason="the benchmark prints tables")
pytest.importorskip("typer", reason="the benchmark has a command line")

from torch.nn import Parameter
from torch.optim import Optimizer

from benchmarks import step_contestants
from benchmarks.bench_step_time import QUICK, growth_table, time_growth
from benchmarks.peer_formats import FormatAdamW
from benchmarks.step_contestants import (
    SETTINGS,
    TORCHAO_4BIT,
    TORCHAO_FP8,
    Contestant,
    displacement_error,
    installed_peers,
    own_and_torch,
    own_settings,
    validate,
)

COARSE = {c.name: c for c in installed_peers() if c.coder is not None}


@pytest.mark.parametrize("contestant", [*own_and_torch(), *own_settings()], ids=lambda c: c.label)
def test_ours_and_torch_follow_the_textbook(contestant: Contestant) -> None:
    row = validate(contestant)
    assert row["status"] == "timed"
    assert 0 < row["error"] <= row["tolerance"]


def test_coarse_formats_are_named() -> None:
    assert list(COARSE) == [TORCHAO_4BIT, TORCHAO_FP8]


@pytest.mark.parametrize("name", COARSE)
@pytest.mark.parametrize(
    ("change", "follows"),
    [({}, True), ({"weight_decay": 1.9}, False), ({"betas": (0.9, 0.998)}, False), ({"lr": 0.99e-2}, False)],
    ids=["as said", "decay", "beta2", "lr"],
)
def test_a_wrong_step_is_found_behind_a_coarse_format(name: str, change: dict[str, Any], follows: bool) -> None:
    """Emulated, so that it needs no package: the format's own error, 0.19 in 4 bits, would hide all of these."""
    coder = COARSE[name].coder
    assert coder is not None

    def build(params: list[Parameter]) -> Optimizer:
        return FormatAdamW(params, coder, **{**SETTINGS, **change})

    error, allowed = displacement_error(replace(COARSE[name], build=build))
    assert (error <= allowed) is follows, (error, allowed)


@pytest.mark.slow
@pytest.mark.parametrize("name", COARSE)
def test_torchaos_coarse_optimizers_are_what_is_emulated(name: str) -> None:
    row = validate(COARSE[name])
    if row["status"].startswith("not installed"):
        pytest.skip(row["status"])
    assert row["status"] == "timed"
    assert row["error"] < 2 * step_contestants.correction_error()


def test_growth_is_fitted_over_all_sizes_and_over_those_beyond_the_caches() -> None:
    """Made-up medians of 50 microseconds and 0.5 ns a parameter."""
    numels = (10**4, 10**5, 10**6, 10**7, 10**8, 250 * 10**6)
    sweep = {
        str(n): {"times": [{"label": "one", "numel": n, "ns": 0.5 + 5e4 / n}, {"label": "two", "numel": n, "ns": n}]}
        for n in numels
    }
    found = time_growth(sweep)
    assert found["one"]["all"]["slope"] == pytest.approx(0.5e-9)
    assert found["one"]["all"]["constant"] == pytest.approx(5e-5)
    assert found["one"]["beyond caches"]["numels"] == list(numels[3:])
    assert [found["one"][sizes]["linear"] for sizes in ("all", "beyond caches")] == [True, True]
    assert [found["two"][sizes]["linear"] for sizes in ("all", "beyond caches")] == [False, False]
    _, header, rows = growth_table({"growth": found})
    assert len(rows) == 4
    assert all(len(row) == len(header) for row in rows)
    assert rows[0][2] == pytest.approx(0.5)
    assert time_growth({"1": {"times": []}}) == {}


def test_rounds_get_a_share_of_the_time_that_is_left() -> None:
    assert QUICK.plan_until(time.perf_counter() + 5.0, 0.2).seconds == pytest.approx(1.0, abs=0.1)
    late = QUICK.plan_until(time.perf_counter() - 1.0, 0.2)
    assert (late.seconds, late.least) == (0.0, QUICK.plan.least)
