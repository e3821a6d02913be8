"""The step-time benchmark in short: who may be timed, and that a wrong step of a coarse format is found."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("rich", reason="the benchmark prints tables")
pytest.importorskip("typer", reason="the benchmark has a command line")

from torch.nn import Parameter
from torch.optim import Optimizer

from benchmarks import step_contestants
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
