"""The benchmark of bitsandbytes' format in short: who may be timed, and what ratios are to."""

from __future__ import annotations

import pytest

pytest.importorskip("rich", reason="the benchmark prints tables")
pytest.importorskip("typer", reason="the benchmark has a command line")

from benchmarks.bench_bnb8bit import DTYPES, OURS, contestants, measure, verdicts
from benchmarks.host_contestants import displacement, missing
from benchmarks.step_contestants import BITSANDBYTES, FUSED
from benchmarks.step_timing import Plan


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", contestants(DTYPES["fp32"]))
def test_every_contestant_follows_the_textbook(name: str, dtype: str) -> None:
    found = {name: contestants(DTYPES[dtype])[name]}
    if absent := missing(found, DTYPES[dtype]):
        pytest.skip(f"{name}: {absent[name]}")
    error, allowed = displacement(found[name], DTYPES[dtype])
    assert error <= allowed


def test_one_that_does_not_is_refused() -> None:
    """A format of 8 bits that says it has 32."""
    error, allowed = displacement(contestants(DTYPES["fp32"])[OURS]._replace(error=1e-5), DTYPES["fp32"])
    assert error > allowed


def test_ratios_are_to_bitsandbytes() -> None:
    data = measure(1 << 14, 1 << 14, Plan(3, 1.0, 2, 1e-4))
    rows = {(row["dtype"], row["name"]): row for row in data["rows"]}
    assert (BITSANDBYTES in data["absent"]) == (("fp32", BITSANDBYTES) not in rows)
    assert set(verdicts(data["rows"])) == (set() if data["absent"] else set(DTYPES))
    for dtype in DTYPES:
        base = rows[dtype, BITSANDBYTES if not data["absent"] else OURS]
        assert rows[dtype, FUSED]["ratio"] == pytest.approx(rows[dtype, FUSED]["ns"] / base["ns"])
        assert rows[dtype, OURS]["state_bytes"] == pytest.approx(2 + 8 / 256, abs=1e-3)
