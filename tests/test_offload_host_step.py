"""The host's step of the offload benchmark in short: who may be timed, who is left out and why, and what is held."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("rich", reason="the benchmark prints tables")
pytest.importorskip("typer", reason="the benchmark has a command line")

import torch
from torch.nn import Parameter

from benchmarks.host_contestants import Contestant, Running, displacement, heavy_tailed, missing, normal
from benchmarks.offload_host_step import FIELDS, FUSED_BF16, OURS, SPLIT, STOCHASTIC, measure, setting, tables
from benchmarks.step_contestants import FUSED
from benchmarks.step_timing import Plan

PLAN = Plan(3, 1.0, 2, 1e-4)
HELD = {
    ("fp32", OURS): (2 + 2 / 128, 0),
    ("fp32", FUSED): (12, 4),
    ("bf16", STOCHASTIC): (2 + 2 / 128, 0),
    ("bf16", SPLIT): (4 + 2 / 128, 0),
    ("bf16", FUSED): (12, 8),
    ("bf16", FUSED_BF16): (6, 2),
}
OPTIONAL = [name for _, contestants in FIELDS.values() for name, each in contestants.items() if each.optional]


@pytest.fixture
def _no_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setitem(sys.modules, "deepspeed.ops.adam", None)


@pytest.mark.parametrize(("field", "name"), [(field, name) for field in FIELDS for name in FIELDS[field][1]])
def test_every_contestant_follows_the_textbook(field: str, name: str) -> None:
    dtype, contestants = FIELDS[field]
    absent = missing({name: contestants[name]}, dtype)
    if absent:
        pytest.skip(f"{name}: {absent[name]}")
    error, allowed = displacement(contestants[name], dtype, heavy_tailed)
    assert error <= allowed


@pytest.mark.usefixtures("_no_deepspeed")
def test_what_is_not_installed_is_left_out_and_said() -> None:
    data = measure(1 << 14, 1 << 14, PLAN)
    there = {(field, row["name"]): row for field, found in data["fields"].items() for row in found["rows"]}
    assert list(there) == list(HELD)
    for key, (kept, passing) in HELD.items():
        assert there[key]["passing_bytes"] == passing
        assert there[key]["state_bytes"] == pytest.approx(kept, abs=1e-3)  # and the number of steps
    assert {name: why for found in data["fields"].values() for name, why in found["absent"].items()} == dict.fromkeys(
        OPTIONAL, "not installed"
    )
    *of_fields, (_, _, ratios) = tables(data)
    assert len(of_fields) == len(FIELDS)
    assert sum("not installed" in row for _, _, rows in of_fields for row in rows) == len(OPTIONAL)
    assert [row[1:3] for row in ratios] == [[OURS, FUSED]] + [
        [mine, peer] for mine in (STOCHASTIC, SPLIT) for peer in (FUSED, FUSED_BF16)
    ]
    assert all(row[4] <= row[5] <= row[6] for row in ratios)  # type: ignore[operator]
    assert "heavy-tailed" in setting(data)


def test_what_does_not_build_is_left_out_if_it_is_optional() -> None:
    def build(_: Parameter) -> Running:
        raise RuntimeError("the op failed to build\nand a page about it")

    optional = Contestant(build, 0.0, 0.0, 0.0, optional=True)
    assert missing({"a": optional}, torch.float32) == {"a": "not available: RuntimeError: the op failed to build"}
    assert not missing({"a": optional._replace(optional=False)}, torch.float32)


def test_one_that_is_wrong_is_no_missing_package() -> None:
    """What can be built has to be right."""
    _, contestants = FIELDS["fp32"]
    wrong = contestants[FUSED]._replace(error=0.0, weight_eps=0.0, optional=True)
    assert not missing({"a": wrong}, torch.float32)
    error, allowed = displacement(wrong, torch.float32, heavy_tailed)
    assert error > allowed


@pytest.mark.usefixtures("_no_deepspeed")
def test_threads_are_those_asked_for_and_then_as_before() -> None:
    before = torch.get_num_threads()
    assert measure(1 << 12, 1 << 12, Plan(2, 0.1, 2, 1e-5), threads=before + 1)["threads"] == before + 1
    assert torch.get_num_threads() == before


def test_gradients_are_heavy_tailed_and_none_is_zero() -> None:
    shape = (256, 1024)
    first, second = (heavy_tailed(shape, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    for dtype in (torch.float32, torch.bfloat16):
        assert bool((first.to(dtype) != 0).all())
    for values, at_least, at_most in ((first, 0.9, 1.0), (normal(shape, torch.Generator().manual_seed(0)), 0.0, 0.1)):
        squares = values.double().square().flatten().sort(descending=True).values
        assert at_least <= float(squares[: len(squares) // 100].sum() / squares.sum()) <= at_most
    logs = torch.stack([values.abs().log().flatten() for values in (first, second)])
    assert float(torch.corrcoef(logs)[0, 1]) > 0.5  # an element keeps its scale
