"""The benchmark under DeepSpeed in short: contestants follow the textbook, and whose kernel ran."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.deepspeed_jobs import begin
from tests.kernel_cases import without_library
from tests.launching import NEEDS_DEEPSPEED
from tests.ranks import NEEDS_GLOO, on_ranks

pytest.importorskip("rich", reason="the benchmark prints tables")
pytest.importorskip("typer", reason="the benchmark has a command line")

pytestmark = [NEEDS_GLOO, NEEDS_DEEPSPEED]


def measured(rank: int, folder: Path) -> dict[str, Any]:
    """DeepSpeedCPUAdam is left out: its build takes half a minute."""
    begin(rank)
    from benchmarks import bench_deepspeed
    from benchmarks.bench_deepspeed import OURS, TORCH

    found: dict[str, Any] = {"kernel": bench_deepspeed.whose_kernel()}
    found["rows"] = bench_deepspeed.measure(256, 2, (OURS, TORCH), 1 << 16)
    bench_deepspeed.ALLOWED[OURS] = 1e-5
    try:
        bench_deepspeed.measure(256, 2, (OURS,), 1 << 16)
    except AssertionError as error:
        found["refused"] = str(error)
    return found


def test_in_short(tmp_path: Path) -> None:
    (found,) = on_ranks(1, measured, tmp_path)
    assert found["kernel"] == ("reference" if without_library() else "cpu")
    ours, torchs = found["rows"]
    assert ours["state_bytes"] == pytest.approx(2 + 2 / 128, abs=1e-3)
    assert torchs["state_bytes"] == pytest.approx(8, abs=1e-3)
    assert torchs["ratio"] == pytest.approx(torchs["ns"] / ours["ns"])
    assert ours["triad_gb_s"] > 0
    assert "AdamW8bit is off the textbook" in found["refused"]
