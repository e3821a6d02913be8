"""README.md has the figures of benchmarks/results, and no others in their place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

for package in ("typer", "rich", "numpy"):
    pytest.importorskip(package, reason="the benchmarks need it")

from benchmarks import harness, readme  # noqa: E402

NAMES = readme.names()


def test_the_readme_has_the_figures_of_the_results() -> None:
    text = readme.README.read_text()
    assert readme.whole(text, readme.reader(harness.RESULTS)) == text


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    for name in NAMES:
        shutil.copyfile(harness.RESULTS / f"{name}.json", tmp_path / f"{name}.json")
    return tmp_path


def change(folder: Path, name: str, data: dict[str, Any]) -> None:
    (folder / f"{name}.json").write_text(json.dumps(data))


def scaled(value: Any) -> Any:
    """The same results with every measured number half as large again."""
    if isinstance(value, dict):
        kept = ("numel", "main", "cached", "ranks", "tensors", "beta2", "decades", "seeds", "logical_cpus", "quick")
        return {key: entry if key in kept else scaled(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [scaled(entry) for entry in value]
    return value * 1.5 if isinstance(value, float) else value


def test_results_are_found() -> None:
    assert {"step_time", "memory", "parity", "codec_fidelity", "gpu"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_other_results_are_other_figures(copied: Path, name: str) -> None:
    data = json.loads((copied / f"{name}.json").read_text())
    change(copied, name, scaled(data))
    assert readme.section(readme.reader(copied)) != readme.section(readme.reader(harness.RESULTS))


def test_quick_results_are_refused(copied: Path) -> None:
    change(copied, "memory", json.loads((copied / "memory.json").read_text()) | {"quick": True})
    with pytest.raises(
        readme.QuickResultsError, match=r"memory\.json is of a quick run; accepted: results of a whole one"
    ):
        readme.section(readme.reader(copied))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.60819, "0.61"), (14.246, "14"), (1234.5, "1,234"), (0.0109143, "0.011"), (0, "0"), (float("inf"), "diverges")],
)
def test_figures_have_two_digits(value: float, text: str) -> None:
    assert readme.figure(value) == text
