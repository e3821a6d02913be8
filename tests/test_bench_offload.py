"""The offload benchmark in short: that it runs, and that it judges what it finds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="the offload benchmark draws")
pytest.importorskip("rich", reason="the offload benchmark prints tables")
pytest.importorskip("typer", reason="the offload benchmark has a command line")

from benchmarks.bench_offload import verdicts
from tests import sim_device
from tests.launching import ROOT

REASON = sim_device.why_unavailable()


@pytest.mark.slow
@pytest.mark.skipif(REASON is not None, reason=REASON or "")
def test_quick_run_counts_the_bytes_of_the_bus(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.bench_offload", "--quick", "--output", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    data = json.loads((tmp_path / "offload.json").read_text())
    for row, size in zip(data["memory"], (4, 2), strict=True):
        assert (row["down"], row["up"], row["device_peak"]) == (2 * size, size, 0)
        assert 0 < row["pinned_buckets"] <= 2
    assert data["overlap"]["buckets"] == 4
    assert len(data["overlap"]["timeline"]["host"]) == 4
    assert list(data["host_step"]["fields"]) == ["fp32", "bf16"]
    page = (tmp_path / "offload.md").read_text()
    step, taken, in_backward = data["gradients"]
    assert step["device"] >= 4 > taken["device"]
    assert in_backward["device"] < 4
    assert [row["host"] for row in data["gradients"]] == [0, 4, 0]
    assert [(row["down"], row["up"]) for row in data["gradients"]] == [(8, 4)] * 3
    assert data["waiting"][0]["seconds"] > data["waiting"][1]["seconds"]
    assert "quick run" in page
    assert "torch fused, all in bf16" in page
    assert (tmp_path / "offload.png").stat().st_size > 5000


def test_a_missed_target_is_said() -> None:
    row: dict[str, Any] = {"case": "one", "host": 2.04, "device_peak": 0, "pinned_buckets": 2.0, "down": 8.0, "up": 4.0}
    row |= {"least_down": 8.0, "least_up": 4.0}
    assert all(verdict["met"] for verdict in verdicts([row], {"over_bound": 1.0}))
    for key, worse in {"host": 2.06, "device_peak": 1, "pinned_buckets": 2.1, "down": 8.1, "up": 4.1}.items():
        assert [v["met"] for v in verdicts([row | {key: worse}], {"over_bound": 0.9})].count(False) == 1
    assert [v["met"] for v in verdicts([row], {"over_bound": 1.01})].count(False) == 1
