"""The command that measures the README's figures: which benchmarks it has, and how it tells that one broke."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

for package in ("typer", "rich", "numpy"):
    pytest.importorskip(package, reason="the benchmarks need it")

import typer  # noqa: E402

from benchmarks import readme, run_all  # noqa: E402
from benchmarks.run_all import MISSED, STAGES, Ended, Stage  # noqa: E402


def test_all_results_of_the_readme_are_measured_but_those_of_a_gpu() -> None:
    for stage in STAGES:
        assert stage.results in readme.names(), f"the README quotes nothing of {stage.name}"
        assert importlib.util.find_spec(f"benchmarks.{stage.module}") is not None
    measured = {stage.results for stage in STAGES}
    assert {name for name in readme.names() if name not in measured} == {"gpu"}


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(typer.BadParameter, match="there is no benchmark 'speed'; accepted: fidelity, parity, memory"):
        run_all.choose(["memory", "speed"])
    assert [stage.name for stage in run_all.choose(["step", "memory"])] == ["memory", "step"]
    assert run_all.choose(None) == list(STAGES)


@pytest.mark.parametrize(
    ("status", "measured", "broken"), [(0, True, False), (MISSED, True, False), (2, True, True), (0, False, True)]
)
def test_a_missed_target_is_a_result_and_all_else_is_broken(status: int, measured: bool, broken: bool) -> None:
    assert Ended(STAGES[0], status, 1.0, measured).broken is broken


def test_results_of_before_are_not_taken_for_new_ones(tmp_path: Path) -> None:
    (tmp_path / "none.json").write_text("{}")
    stage = Stage("none", "no_such_benchmark", "none")
    ended = run_all.run(stage, quick=False, output=tmp_path, logs=tmp_path)
    assert not ended.measured
    assert ended.broken
    assert "no_such_benchmark" in (tmp_path / "none.log").read_text()


def test_a_benchmark_leaves_results_and_its_log(tmp_path: Path) -> None:
    stage = next(stage for stage in STAGES if stage.name == "host")
    ended = run_all.run(replace(stage, quick=("--quick", "--tensors", "4")), quick=True, output=tmp_path, logs=tmp_path)
    assert (ended.status, ended.measured, ended.verdict) == (0, True, "done")
    assert (tmp_path / "host_time.md").exists()
    assert "torch fused" in (tmp_path / "host.log").read_text()
