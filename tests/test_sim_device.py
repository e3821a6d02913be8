"""The simulated accelerator: that it is one to torch, and that it shows the mistakes it is there for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import sim_device
from tests.sim_device import cases_device, cases_failing, cases_races, cases_waits, running

# The first run builds the device.
pytestmark = pytest.mark.slow

REASON = sim_device.why_unavailable()
NEEDS_COMPILER = pytest.mark.skipif(REASON is not None, reason=REASON or "")


MODULES = (cases_device, cases_waits, cases_races)
CASES = [(module, name) for module in MODULES for name in running.cases_of(module)]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return running.outcomes(MODULES, tmp_path_factory.mktemp("sim") / "results.jsonl")


@NEEDS_COMPILER
@pytest.mark.parametrize("case", [running.full_name(module, name) for module, name in CASES])
def test_case(outcomes: dict[str, str], case: str) -> None:
    assert not outcomes[case], outcomes[case]


@pytest.mark.skipif(REASON is not None and "Linux" in REASON, reason="the simulated device is built on Linux only")
def test_without_a_compiler_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(sim_device.SimUnavailableError, match="no no-such-compiler on the PATH"):
        sim_device.load()


@NEEDS_COMPILER
def test_a_case_that_fails_or_ends_its_process_is_reported(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    # What a build that was ended leaves behind; torch would wait for it to go.
    with sim_device.building() as folder:
        (folder / "lock").touch()
    with pytest.raises(AssertionError, match=r"ended with status 7 before or in the case cases_failing\.ends"):
        running.outcomes([cases_failing], results)
    failures = results.read_text().splitlines()
    assert len(failures) == 2
    assert "1 == 2" in failures[0]
    assert "DID NOT RAISE" in failures[1]
