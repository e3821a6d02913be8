"""The memory benchmark in short: bytes of known states, what is found within tensor subclasses, and a whole run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

for package in ("matplotlib", "numpy", "rich", "scipy", "typer"):
    pytest.importorskip(package, reason="the benchmark needs it")

import torch  # noqa: E402
import typer  # noqa: E402
from torch.nn import Parameter  # noqa: E402

from benchmarks import bench_parity, harness, memory_probe, pictures  # noqa: E402
from benchmarks.bench_memory import Size, chosen_contestants, measure, tables, verdicts  # noqa: E402
from benchmarks.step_contestants import FUSED, OURS, Contestant, count, fused, own_settings  # noqa: E402
from benchmarks.step_timing import Plan  # noqa: E402

LABELS = (f"{OURS} fp32", f"{FUSED} fp32")
SMALL = Size(main=1 << 14, numels=(4096, 1 << 13, 1 << 14, 1 << 15), plan=Plan(rounds=3, seconds=1.0, least=2))


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return measure([c for c in chosen_contestants((), False) if c.label in LABELS], SMALL, 60.0, quick=True)


def test_bytes_of_states_that_are_known(found: dict[str, Any]) -> None:
    """torch: two float32 moments and a counter of 4 bytes; ours: two codes, 2 bytes a block of 128, 8 of counters."""
    for label, each, counters in ((LABELS[0], 2 + 2 / 128, 8), (LABELS[1], 8, 4)):
        rows = found["probes"][label]
        assert [row["numel"] for row in rows] == list(SMALL.numels)
        for row in rows:
            assert row["state_bytes"] == each * row["numel"] + counters
        assert found["growth"][label]["slope"] == pytest.approx(each, rel=1e-9)
        assert found["growth"][label]["constant"] == pytest.approx(counters, rel=1e-6)
        assert found["growth"][label]["linear"]


def test_files_hold_the_state_and_all_there_is_to_go_on_with(found: dict[str, Any]) -> None:
    for label in LABELS:
        for row in found["probes"][label]:
            if row["numel"] > SMALL.main:
                assert "file_bytes" not in row
                continue
            assert row["same_bits"]
            assert row["weights_only"]
            assert 0 < row["file_bytes"] - row["state_bytes"] < 8192  # names, shapes and settings
    for row in found["checkpoints"]["rows"]:
        assert row["rounds"] >= 2
        for kind in ("save", "load"):
            assert 0 < row[f"{kind}_p5"] <= row[f"{kind}_seconds"] <= row[f"{kind}_p95"]


def test_tables_and_verdicts(found: dict[str, Any]) -> None:
    for _, header, rows in tables(found):
        assert rows
        assert all(len(row) == len(header) for row in rows)
    judged = {v["check"]: v for v in found["verdicts"]}
    assert judged[f"{OURS} fp32: state, bytes a parameter"]["met"] is True
    worse = json.loads(json.dumps(found))
    for row in worse["probes"][LABELS[0]]:
        row |= {"state_bytes": 2.1 * row["numel"], "same_bits": False}
    failed = {v["check"].split(": ")[1] for v in verdicts(worse) if v["met"] is False}
    assert failed >= {"state, bytes a parameter", "sizes whose step after a load is another one"}


@pytest.mark.parametrize("contestant", own_settings(), ids=lambda c: c.label)
def test_our_settings_hold_what_they_say(contestant: Contestant) -> None:
    row = memory_probe.measure_one(contestant, 1 << 14, None)
    assert row["state_bytes"] == contestant.moment_bytes * (1 << 14) + 8


def test_tensors_are_found_wherever_they_are_and_storages_counted_once() -> None:
    base = torch.zeros(100)
    optimizer = torch.optim.AdamW([Parameter(torch.zeros(4))])
    param = optimizer.param_groups[0]["params"][0]
    optimizer.state[param] = {"one": base[:50], "nested": {"deep": [base[50:], (torch.zeros(10),)]}, "number": 3}
    assert memory_probe.held_bytes(optimizer) == 440


def test_tensor_subclasses_are_opened() -> None:
    optim = pytest.importorskip("torchao.optim")
    coded = optim.subclass_4bit.OptimState4bit.zeros((64, 256))
    tensors = list(memory_probe.tensors_within({"exp_avg": coded}))
    assert sum(tensor.nbytes for tensor in tensors) == 64 * 256 // 2 + 64 * 256 // 128 * 4 + 16 * 4


def test_a_checkpoint_that_leaves_something_out_is_told(tmp_path: Path) -> None:
    class Forgetful(torch.optim.AdamW):
        def load_state_dict(self, state_dict: Any) -> None:
            super().load_state_dict(state_dict)
            for state in self.state.values():
                state["exp_avg"].zero_()

    forgetful = Contestant("forgetful", torch.float32, lambda params: Forgetful(params, lr=0.1), 8)
    assert not memory_probe.measure_one(forgetful, 1 << 13, tmp_path)["same_bits"]
    whole = Contestant("whole", torch.float32, fused, 8)
    assert memory_probe.measure_one(whole, 1 << 13, tmp_path)["same_bits"]


def test_sizes_that_are_left_out_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Contestant("whole", torch.float32, fused, 8)
    numels = (1 << 12, 1 << 13, 1 << 14)
    rows = memory_probe.probe(whole, numels, 1 << 13, 0.0)
    assert ["left_out" in row for row in rows] == [False, False, True]
    assert rows[2]["left_out"].startswith("would take about")
    compiled = Contestant("compiled", torch.float32, fused, 8, compiled=True)
    rows = memory_probe.probe(compiled, (*numels, 1 << 15), 1 << 14, 60.0)
    assert [row.get("left_out") for row in rows] == [None, None, None, memory_probe.COMPILES]
    monkeypatch.setattr(memory_probe, "available_bytes", lambda: 1e3)
    assert "GB free" in memory_probe.probe(whole, numels, 1 << 13, 60.0)[0]["left_out"]


def test_shapes_are_whole_blocks_of_every_format() -> None:
    for numel in Size().numels:
        assert count(memory_probe.shape_of(numel)) % 256 == 0


def test_names_that_are_nobodys() -> None:
    assert {c.name for c in chosen_contestants(["fused"], True)} == {FUSED}
    with pytest.raises(typer.BadParameter, match="--only is nobody; accepted: parts of"):
        chosen_contestants(["nobody"], True)


def test_pictures_come_from_the_files_alone(found: dict[str, Any], tmp_path: Path) -> None:
    """Those whose results are there are drawn; the state's figures are what was measured."""
    harness.write_results("memory", found, "# one", tmp_path)
    assert pictures.draw(tmp_path, tmp_path / "out") == [tmp_path / "out" / "memory_by_setting.png"]
    assert (tmp_path / "out" / "memory_by_setting.png").read_bytes().startswith(b"\x89PNG")
    states = dict(pictures.main_states(json.loads((tmp_path / "memory.json").read_text())))
    assert states[LABELS[1]] == pytest.approx(8, abs=1e-3)
    assert states[LABELS[0]] == pytest.approx(2 + 2 / 128, abs=1e-3)


def test_rows_of_the_loss_picture() -> None:
    """In parts of the spread, 0.2; a run that diverged has no interval."""
    runs: dict[str, list[Any]] = {
        bench_parity.BASELINE: [1.0, 1.2, 1.4],
        bench_parity.OURS: [1.01, 1.23, 1.45],
        bench_parity.CONTROL: [2.0, 9.0, "inf"],
    }
    task = {"runs": {name: [{"final": final} for final in finals] for name, finals in runs.items()}}
    ours, control = pictures.parity_rows({"tasks": {"one": task}})
    assert ours[:2] == ("one", bench_parity.OURS)
    assert ours[2] == pytest.approx(0.03 / 0.2)
    assert ours[3] is not None
    assert ours[3][0] < ours[2] < ours[3][1]
    assert control[2:] == (float("inf"), None)


def test_committed_results_are_drawn(tmp_path: Path) -> None:
    results = harness.RESULTS
    drawn = {path.name for path in pictures.draw(results, tmp_path)}
    assert drawn >= {"step_time_peers.png", "loss_parity.png"}
