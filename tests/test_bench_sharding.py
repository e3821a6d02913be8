"""The sharding benchmark in short: two ranks on a small model, its counter of bytes, what it refuses to time."""

from __future__ import annotations

import socket
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="the sharding benchmark draws")
pytest.importorskip("rich", reason="the sharding benchmark prints tables")
pytest.importorskip("typer", reason="the sharding benchmark has a command line")

import torch
import typer

from benchmarks import bench_sharding, sharding_ranks
from benchmarks.bench_sharding import fitting_case, models, tables, verdicts, with_ratios
from benchmarks.sharding_plot import plot
from benchmarks.sharding_ranks import OURS, OURS_SMALL, ZERO, ZERO_VIEWS, Case, Validation
from benchmarks.step_contestants import SETTINGS, count, gpt2_shapes
from lowmem_adam import AdamW8bit
from tests.ranks import NEEDS_GLOO, on_ranks

TINY = Case(2, "tiny", torch.float32, gpt2_shapes(2, 128, 512, 64), rounds=3)


def test_sent_bytes_are_the_payload() -> None:
    if sharding_ranks.tcp_bytes_sent() is None:
        pytest.skip("the kernel does not say what was sent")
    known = 1 << 20
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as near:
        far, _ = server.accept()
        with far:
            received = threading.Thread(target=lambda: [far.recv(known, socket.MSG_WAITALL) for _ in range(2)])
            before = sharding_ranks.tcp_bytes_sent()
            received.start()
            near.sendall(bytes(2 * known))
            received.join()
            after = sharding_ranks.tcp_bytes_sent()
    assert before is not None
    assert after is not None
    assert after - before == 2 * known


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return with_ratios(sharding_ranks.run_case(TINY))


@NEEDS_GLOO
@pytest.mark.slow
def test_case_measures_every_contestant(found: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == [OURS, OURS_SMALL, ZERO, ZERO_VIEWS]
    numel = count(TINY.shapes)
    for row in rows.values():
        assert len(row["rounds_ms"]) == TINY.rounds
        assert 0 < row["p5"] <= row["ms"] <= row["p95"]
        assert len(row["state_bytes"]) == TINY.ranks
        if row["sent_bytes"] is not None:
            assert row["sent_over_least"] == pytest.approx(1.0, abs=0.01)
    assert found["least_sent_bytes"] == 4 * numel
    # Two float32 moments, and a step count of four bytes for every tensor on one of the ranks.
    assert sum(rows[ZERO]["state_bytes"]) == 8 * numel + 4 * len(TINY.shapes)
    assert sum(rows[OURS]["state_bytes"]) < 2.1 * numel
    assert rows[OURS]["imbalance"] < 1.01
    assert rows[ZERO_VIEWS]["ratio"]["of_medians"] == 1.0


@NEEDS_GLOO
@pytest.mark.slow
def test_figures_become_tables_and_a_plot(found: dict[str, Any], tmp_path: Path) -> None:
    left_out = [{"label": "large", "why": "needs 9 GB of 1 GB free"}]
    data = {"cases": [found], "left_out": left_out, "verdicts": verdicts([found])}
    assert [(v["name"], v["check"].split()[0]) for v in data["verdicts"]] == [
        (OURS, "state"),
        (OURS, "bytes"),
        (OURS, "step"),
        (OURS, "extra"),
        (OURS_SMALL, "extra"),
    ]
    told = tables(data)
    assert [title for title, _, _ in told][1:3] == ["State", "Time of a step"]
    assert all(len(row) == len(header) for _, header, rows in told for row in rows)
    plot(data, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_threads_are_those_of_the_ranks() -> None:
    cases = [{"ranks": 2, "threads": 4}, {"ranks": 4, "threads": 2}, {"ranks": 2, "threads": 4}]
    assert bench_sharding.threads_of_ranks(cases) == "4 with 2 ranks, 2 with 4 ranks"


def refused_contestant(rank: int, folder: Path) -> str:
    """A sharded optimizer against another learning rate without shards."""
    case = replace(TINY, ranks=1)
    params = sharding_ranks.make_params(case)
    _, grads = sharding_ranks.reduced_gradients(params)
    wrong = replace(
        sharding_ranks.contestants([OURS])[0], alone=lambda params: AdamW8bit(params, **{**SETTINGS, "lr": 2e-2})
    )
    with pytest.raises(RuntimeError) as caught:
        Validation(case, grads).check(wrong, wrong.build(params), params)
    return str(caught.value)


@NEEDS_GLOO
def test_what_differs_from_the_optimizer_without_shards_is_not_timed(tmp_path: Path) -> None:
    (words,) = on_ranks(1, refused_contestant, tmp_path)
    assert "lowmem-adam differs from the same optimizer without shards in parameters [0, 1," in words


def test_layers_that_do_not_fit_into_memory_are_left_away(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models(quick=False)["llama"]
    needed = Case(2, "two", torch.bfloat16, model.shapes(2), 7, model.names).held_bytes
    for free, layers in ((1.2 * needed, 2), (1.1 * needed, 1)):
        monkeypatch.setattr(bench_sharding, "available_bytes", lambda free=free: free)
        case, why = fitting_case(model, 2, torch.bfloat16, 7)
        assert why is None
        assert case.label == f"TinyLlama ({layers} of 22 layers) bf16, 2 ranks"
        assert len(case.shapes) == 3 + 9 * layers
    monkeypatch.setattr(bench_sharding, "available_bytes", lambda: 1e9)
    _, why = fitting_case(model, 2, torch.bfloat16, 7)
    assert why is not None
    assert why.endswith("of 1.0 GB free")


def test_shapes_are_those_of_the_models() -> None:
    assert count(gpt2_shapes()) == 124_439_808
    assert count(bench_sharding.llama_shapes(22)) == 1_100_048_384


def test_unknown_choices_are_refused() -> None:
    with pytest.raises(typer.BadParameter, match="shapes is 'bert'; accepted: gpt2, llama"):
        bench_sharding.check_choices("shapes", ["bert"], ["gpt2", "llama"])
