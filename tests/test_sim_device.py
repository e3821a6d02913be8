"""The simulated accelerator: that it is one to torch, and that it shows the mistakes it is there for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import sim_device
from tests.sim_device import cases_device, cases_failing, cases_waits, running

REASON = sim_device.why_unavailable()
NEEDS_COMPILER = pytest.mark.skipif(REASON is not None, reason=REASON or "")


@pytest.fixture(scope="module")
def waits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return running.outcomes(cases_waits, tmp_path_factory.mktemp("waits") / "results.jsonl")


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return running.outcomes(cases_device, tmp_path_factory.mktemp("device") / "results.jsonl")


@NEEDS_COMPILER
@pytest.mark.parametrize("name", running.cases_of(cases_waits))
def test_waits(waits: dict[str, str], name: str) -> None:
    assert not waits[name], waits[name]


@NEEDS_COMPILER
@pytest.mark.parametrize("name", running.cases_of(cases_device))
def test_device(device: dict[str, str], name: str) -> None:
    assert not device[name], device[name]


@pytest.mark.skipif(REASON is not None and "Linux" in REASON, reason="the simulated device is built on Linux only")
def test_without_a_compiler_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(sim_device.SimUnavailableError, match="no no-such-compiler on the PATH"):
        sim_device.load()


@NEEDS_COMPILER
def test_a_case_that_fails_or_ends_its_process_is_reported(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"ended with status 7 before or in the case ends"):
        running.outcomes(cases_failing, tmp_path / "results.jsonl")
    assert "1 == 2" in (tmp_path / "results.jsonl").read_text()
